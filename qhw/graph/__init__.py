# SPDX-License-Identifier: Apache-2.0
"""What a model is: capture, operator kinds, quantization points, and the safe saved form."""

from qhw.graph.capture import capture
from qhw.graph.graph import Graph
from qhw.graph.inputs import ExampleInputs
from qhw.graph.kinds import ATEN_KINDS, KNOWN_KINDS, MOVEMENT_KINDS, VIEW_KINDS
from qhw.graph.operator import Operator
from qhw.graph.placement import Placement, place
from qhw.graph.points import FixedEncoding, OperatorPlacement, QuantPoint, input_point
from qhw.graph.room import SUMMING_KINDS, accumulator_width, num_products, sum_bits
from qhw.graph.saving import graph_from_json, graph_to_json
from qhw.schema import WEIGHTED_KINDS

__all__ = [
    "ATEN_KINDS",
    "KNOWN_KINDS",
    "MOVEMENT_KINDS",
    "SUMMING_KINDS",
    "VIEW_KINDS",
    "WEIGHTED_KINDS",
    "ExampleInputs",
    "FixedEncoding",
    "Graph",
    "Operator",
    "OperatorPlacement",
    "Placement",
    "QuantPoint",
    "accumulator_width",
    "capture",
    "graph_from_json",
    "graph_to_json",
    "input_point",
    "num_products",
    "place",
    "sum_bits",
]
