# SPDX-License-Identifier: Apache-2.0
"""What a plan costs on its target: cycles, time and energy from the figures the target states, and which it lacks."""

from qhw.roofline.estimate import estimate
from qhw.roofline.figure import Figure
from qhw.roofline.report import CostReport, OperatorCost

__all__ = ["CostReport", "Figure", "OperatorCost", "estimate"]
