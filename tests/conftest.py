"""Settings every test runs under."""

import os

# A test that compiles must compile: a cache hit would test another day's code.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
