# SPDX-License-Identifier: Apache-2.0
"""Quantize a model for a described accelerator, explain why, and prove the integer result.

target = qhw.load_target("onnxruntime/cpu-x86-vnni")
plan = qhw.plan(model, target, example_inputs, calibration=loader)
result = qhw.quantize(model, plan, calibration=loader)
qhw.export(result, "out/")
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Graph",
    "QhwError",
    "QuantPlan",
    "QuantizedModel",
    "TargetSpec",
    "__version__",
    "capture",
    "check",
    "compare",
    "cost",
    "evaluate",
    "export",
    "freeze",
    "golden",
    "load",
    "load_target",
    "parameter_groups",
    "plan",
    "quantize",
    "save",
    "train",
    "trainable",
    "verify",
]

if TYPE_CHECKING:
    from qhw.api import export, load, load_target, plan, quantize, save
    from qhw.checking import check
    from qhw.comparison import compare
    from qhw.costs import cost
    from qhw.decisions import QuantPlan
    from qhw.engine import QuantizedModel
    from qhw.errors import QhwError
    from qhw.evaluation import evaluate
    from qhw.golden_vectors import golden
    from qhw.graph import Graph, capture
    from qhw.schema import TargetSpec
    from qhw.training import freeze, parameter_groups, train, trainable
    from qhw.verification import verify

_PLACES = {
    "Graph": "qhw.graph",
    "QhwError": "qhw.errors",
    "QuantPlan": "qhw.decisions",
    "QuantizedModel": "qhw.engine",
    "TargetSpec": "qhw.schema",
    "capture": "qhw.graph",
    "check": "qhw.checking",
    "compare": "qhw.comparison",
    "cost": "qhw.costs",
    "evaluate": "qhw.evaluation",
    "golden": "qhw.golden_vectors",
    "verify": "qhw.verification",
    **dict.fromkeys(("freeze", "parameter_groups", "train", "trainable"), "qhw.training"),
    **dict.fromkeys(("export", "load", "load_target", "plan", "quantize", "save"), "qhw.api"),
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import qhw.schema` and the command line's help do not wait for torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'qhw' has no attribute '{name}'. It has: {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)
