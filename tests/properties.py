"""Settings and values for the tests of rules: the same few examples every time, quickly.

With `HYPOTHESIS_PROFILE=long` they draw a thousand, other ones each time.
"""

import os
import string

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SHARED = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", max_examples=40, derandomize=True, **SHARED)
settings.register_profile("long", max_examples=1000, **SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text()
WORDS = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8)
SIGMAS = st.floats(0, 1, width=32)
