# SPDX-License-Identifier: Apache-2.0
"""From a quantized model to integer operators: each kind's form, and what stands against it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from qhw.engine import QuantizedModel
from qhw.errors import IntegerError
from qhw.graph import MOVEMENT_KINDS, WEIGHTED_KINDS
from qhw.integer.approximation import approximation_of
from qhw.integer.elementwise import lower_add, lower_mul
from qhw.integer.float_result import is_float_result, lower_float_result
from qhw.integer.hard_swish import lower_hard_swish, lower_rsqrt
from qhw.integer.movement import lower_concat, lower_movement, onto_result, regridded
from qhw.integer.pooling import lower_average, lower_extremum, lower_maximum
from qhw.integer.products import Lowered, lower_matmul, lower_product
from qhw.integer.real_average import lower_average_pool
from qhw.integer.resize import lower_resize
from qhw.integer.site import PointIndex, Site, sites
from qhw.integer.softmax import lower_log_softmax, lower_softmax
from qhw.integer.tables import lower_clip, lower_slopes, lower_table
from qhw.integer.uniform import check_static, check_uniform

__all__ = ["Obstacle", "lower"]

_FORMS: Mapping[str, Callable[[Site], Lowered]] = {
    **dict.fromkeys(WEIGHTED_KINDS, lower_product),
    "MatMul": lower_matmul,
    **dict.fromkeys(("Add", "Sub"), lower_add),
    "Mul": lower_mul,
    "Concat": lower_concat,
    "AveragePool": lower_average_pool,
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean", "ReduceSum"), lower_average),
    **dict.fromkeys(("MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin"), lower_maximum),
    **dict.fromkeys(("Max", "Min"), lower_extremum),
    **dict.fromkeys(("Relu", "Clip"), lower_clip),
    **dict.fromkeys(("LeakyRelu", "Abs"), lower_slopes),
    **dict.fromkeys(
        ("Sigmoid", "Tanh", "Elu", "HardSigmoid", "Silu", "Mish", "Softplus", "Gelu", "Exp", "Sqrt", "Log", "Neg",
         "Pow"),
        lower_table,
    ),
    "HardSwish": lower_hard_swish,
    "Rsqrt": lower_rsqrt,
    "Softmax": lower_softmax,
    "LogSoftmax": lower_log_softmax,
    "Resize": lower_resize,
    **dict.fromkeys(MOVEMENT_KINDS, lower_movement),
}  # fmt: skip
_IN_FIXED_POINT = ("HardSwish", "Rsqrt", "Softmax", "LogSoftmax", "Resize")

_KEEPING_CODES = MOVEMENT_KINDS | {"MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Max", "Min"}


@dataclass(frozen=True)
class Obstacle:
    """An operator that cannot be executed exactly, and why: a field of the target, or a limit of qhw."""

    operator: str
    reason: str


def lower(result: QuantizedModel) -> tuple[dict[str, tuple[Site, Lowered]], tuple[Obstacle, ...]]:
    """Every operator that the accelerator runs, in integers.

    Args:
        result: The quantized model.

    Returns:
        tuple: operator -> its site and form, in execution order; and the operators that have none.
    """
    found: dict[str, tuple[Site, Lowered]] = {}
    obstacles: list[Obstacle] = []
    points = PointIndex(result.plan)
    for site in sites(result):
        try:
            check_uniform(site)
            check_static(site, result.float_graph, points)
            form = lower_float_result if is_float_result(site) else _FORMS.get(site.operator.kind)
            if form is None:
                raise IntegerError(f"{site.operator.kind} has no integer form in qhw yet")
            if form is not lower_float_result:
                _check_approximation(site)
            site = onto_result(site) if site.operator.kind in _KEEPING_CODES else site
            moves = tuple(regridded(site, *grids) for grids in zip(site.sources, site.inputs, strict=True))
            found[site.name] = site, replace(form(site), moves=moves)
        except IntegerError as error:
            obstacles.append(Obstacle(site.name, str(error)))
    return found, tuple(obstacles)


def _check_approximation(site: Site) -> None:
    """What computes something else than the operator is a table or in fixed point, or has no form here."""
    if site.spec.approximation is not None:
        more = {"LeakyRelu": ("rounded_parameter",)}.get(site.operator.kind, ())
        in_fixed_point = ("fixed_point",) if site.operator.kind in _IN_FIXED_POINT else ()
        approximation_of(site, "table", *in_fixed_point, *more)
