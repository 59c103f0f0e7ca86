"""What a graph means: nodes lifted to index expressions, and the attention pattern over them. Reads, never writes."""
