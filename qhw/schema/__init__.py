# SPDX-License-Identifier: Apache-2.0
"""What an accelerator is: target files, their models, loading, extending and checking them. Never torch, never onnx."""

from qhw.schema.arithmetic import Accumulator, Align, Bias, Pairwise, Ratio, Requantize, Shift, Stage
from qhw.schema.base import UNKNOWN, Table
from qhw.schema.closest import closest
from qhw.schema.compare import diff
from qhw.schema.difference import Difference
from qhw.schema.formats import INTEGER, Format
from qhw.schema.kernels import ExponentBound, Kernel
from qhw.schema.lint import Finding, lint
from qhw.schema.load import FindBase, LoadedTarget, Located, load_target_file, parse_target, read_target_file
from qhw.schema.marks import recorded_fields
from qhw.schema.open_field import OpenField
from qhw.schema.open_fields import open_fields
from qhw.schema.operators import (
    PLANNED_LIMITS,
    SUMMING_KINDS,
    WEIGHTED_KINDS,
    Approximation,
    Attribute,
    FixedOutput,
    Limit,
    LimitRange,
    Operator,
    RealRange,
)
from qhw.schema.scales import Palette, Scale
from qhw.schema.spec import TargetSpec
from qhw.schema.system import Artefact, Boundary, Clock, Conflict, Cost, Memory, Network, Reading
from qhw.schema.write import target_json_schema, to_json

__all__ = [
    "INTEGER",
    "PLANNED_LIMITS",
    "SUMMING_KINDS",
    "UNKNOWN",
    "WEIGHTED_KINDS",
    "Accumulator",
    "Align",
    "Approximation",
    "Artefact",
    "Attribute",
    "Bias",
    "Boundary",
    "Clock",
    "Conflict",
    "Cost",
    "Difference",
    "ExponentBound",
    "FindBase",
    "Finding",
    "FixedOutput",
    "Format",
    "Kernel",
    "Limit",
    "LimitRange",
    "LoadedTarget",
    "Located",
    "Memory",
    "Network",
    "OpenField",
    "Operator",
    "Pairwise",
    "Palette",
    "Ratio",
    "Reading",
    "RealRange",
    "Requantize",
    "Scale",
    "Shift",
    "Stage",
    "Table",
    "TargetSpec",
    "closest",
    "diff",
    "lint",
    "load_target_file",
    "open_fields",
    "parse_target",
    "read_target_file",
    "recorded_fields",
    "target_json_schema",
    "to_json",
]
