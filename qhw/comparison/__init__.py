# SPDX-License-Identifier: Apache-2.0
"""One model on many targets: what each allows, what it costs there, and what is left of its accuracy."""

from qhw.comparison.matrix import compare
from qhw.comparison.names import target_names
from qhw.comparison.row import Comparison, Headroom, HostOperator, Row

__all__ = ["Comparison", "Headroom", "HostOperator", "Row", "compare", "target_names"]
