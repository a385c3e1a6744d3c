# SPDX-License-Identifier: Apache-2.0
"""How strangers are checked: tiny models, and a slow numpy reference that shares no code with `qhw.numerics`."""

from qhw.testing.models import MODELS, Example, calibration_for, example

__all__ = ["MODELS", "Example", "calibration_for", "example"]
