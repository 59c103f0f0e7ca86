"""Attention programs put together at random, each run by eager code, in float64 and by flashfuse.

`python -m fuzz` (with tests/ on the path) runs many, test_fuzz.py a few; docs/fuzzing.md says what they have found.
"""
