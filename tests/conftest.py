# SPDX-License-Identifier: Apache-2.0
"""Property tests draw the same examples on every CI run, and new ones at a developer's desk."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
