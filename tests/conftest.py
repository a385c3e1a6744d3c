# SPDX-License-Identifier: Apache-2.0
"""Property tests draw the same examples on every CI run, and new ones at a developer's desk.

Where several processes share the tests, each computes with one thread, and so do the commands it starts.
"""

import os

from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is loaded, which reads it once
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
