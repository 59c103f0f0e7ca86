"""Measurements against other implementations, each in one process and interleaved with its peers."""
