"""Sentences of very different lengths, in groups of one meaning each; nearest neighbours can be judged by eye."""

SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "A kitten is dozing in the sun by the window.",
    "Our old tabby spends most of the afternoon curled up on the ledge where the light comes in, and only moves when "
    "somebody opens a tin in the kitchen.",
    "It rained all night.",
    "The storm kept pouring until the morning, and the river behind the house rose by almost a metre before the "
    "clouds finally moved off towards the coast.",
    "Heavy showers fell from dusk till dawn.",
    "Interest rates were raised by a quarter of a point.",
    "The central bank lifted its key rate again, saying that inflation was still too high.",
    "Borrowing became more expensive after the monetary authority tightened its policy for the third time this year, "
    "a step most analysts had expected but few households had planned for.",
    "She plays the violin in a string quartet.",
    "He has been first cellist with the city orchestra for twenty years.",
    "The musicians rehearsed the slow movement until the balance between the viola and the two violins was right.",
    "Bake the bread for forty minutes.",
    "Knead the dough, let it rise for an hour, shape it into a loaf and put it into a very hot oven.",
    "Bread needs flour, water, salt, yeast and time; of these the last matters most, because the flavour comes from a "
    "slow fermentation that cannot be hurried without losing it.",
    "The telescope found a planet.",
    "Astronomers detected an Earth-sized world orbiting a dim red star forty light years away.",
    "By watching how the star's light dips each time something passes in front of it, the observatory could measure "
    "both the size of the planet and the length of its year.",
    "The train to Vienna was delayed.",
    "Our express stood outside the station for an hour because of a broken signal.",
    "Passengers were told that a fault in the signalling system had stopped every service on the line.",
    "Vaccines train the immune system.",
    "A shot of harmless protein teaches white blood cells to recognise a virus before the real one arrives.",
    "Immunisation works because the body remembers: cells that once met an antigen stay behind for years and multiply "
    "quickly when they meet it again.",
    "The striker scored twice.",
    "Two late goals won the match for the visitors.",
    "After a goalless first half the home side tired, and the visiting captain put the ball in the net twice within "
    "five minutes to decide the final.",
    "The compiler removes dead code.",
    "An optimising compiler deletes instructions whose results nobody reads.",
    "Once the intermediate representation is in static single assignment form, finding values without users is a "
    "single backward walk, and everything that walk does not reach can go.",
    "The museum opens at ten.",
    "Visitors can see the paintings from ten o'clock every day except Monday.",
)
