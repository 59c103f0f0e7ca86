"""flashfuse: a torch.compile backend that finds every attention in a model and runs it as a fused kernel."""
