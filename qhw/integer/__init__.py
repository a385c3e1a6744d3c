# SPDX-License-Identifier: Apache-2.0
"""What the chip will compute: bit-exact integer execution under a target's arithmetic, and accumulator bounds."""

from qhw.integer.accumulate import Bounds
from qhw.integer.codes import Codes
from qhw.integer.compare import Difference, compare, differences, simulated_codes
from qhw.integer.lower import Obstacle, lower
from qhw.integer.model import IntegerModel
from qhw.integer.proof import PairProof, Proof, Witness, prove_accumulators
from qhw.integer.site import Site, sites

__all__ = [
    "Bounds",
    "Codes",
    "Difference",
    "IntegerModel",
    "Obstacle",
    "PairProof",
    "Proof",
    "Site",
    "Witness",
    "compare",
    "differences",
    "lower",
    "prove_accumulators",
    "simulated_codes",
    "sites",
]
