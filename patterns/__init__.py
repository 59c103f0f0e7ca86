"""What a graph means: lifting nodes to index expressions, and the attention pattern over them. Reads graphs, never writes."""
