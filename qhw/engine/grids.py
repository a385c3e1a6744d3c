# SPDX-License-Identifier: Apache-2.0
"""From a target's format to the plain grid and granularity that the numerics work with."""

from qhw.engine.number_formats import elements_of
from qhw.errors import PlanError
from qhw.extension import Registry
from qhw.graph import QuantPoint
from qhw.numerics import ElementSet, Granularity, Grid, PerAxis, PerGroup, PerTensor
from qhw.numerics.grid import ScaleKind
from qhw.schema import Format, TargetSpec
from qhw.schema import Scale as ScaleSpec

__all__ = ["granularity_of", "grid_of", "grid_with"]


def grid_of(target: TargetSpec, name: str, registry: Registry | None = None) -> Grid:
    """The grid of a format.

    Args:
        target: The accelerator.
        name: A format of it.
        registry: Plugins that know kinds of numbers; absent: all that are installed, asked only where one is needed.

    Raises:
        PlanError: the format does not say enough, or says something that is recorded only, or no plugin knows its kind.
    """
    reason = target.formats[name].unplannable_reason
    if reason is not None:
        raise PlanError(f"{target.name}: formats.{name}.{reason}. Choose another format, or state it in a target file.")
    return grid_with(target, name, elements_of(target, name, registry))


def grid_with(target: TargetSpec, name: str, elements: ElementSet | None) -> Grid:
    """The grid of a format that can be planned, its elements known.

    Raises:
        PlanError: the format does not say which codes there are.
    """
    spec = target.formats[name]
    low, high = (spec.quant_min, spec.quant_max) if elements is None else elements.code_bounds
    if low is None or high is None:  # excluded by unplannable_reason; said again for the type checker
        raise PlanError(f"{target.name}: formats.{name}.codes: not known.")
    scale = spec.scale if isinstance(spec.scale, ScaleSpec) else ScaleSpec()
    if spec.scale is None and elements is not None and elements.is_absolute:
        scale = ScaleSpec(kind="fixed", values=(1.0,))
    kind: ScaleKind = "float32" if scale.kind == "fixed_point" or scale.kind == "unknown" else scale.kind
    return Grid(
        quant_min=low,
        quant_max=high,
        zero_point=0 if not spec.is_uniform else spec.zero_point if isinstance(spec.zero_point, int | tuple) else None,
        scale_kind=kind,
        scale_min=_number(scale.min),
        scale_max=_number(scale.max),
        scale_values=scale.values if isinstance(scale.values, tuple) else (),
        exponent_min=scale.exponent_min if isinstance(scale.exponent_min, int) else None,
        exponent_max=scale.exponent_max if isinstance(scale.exponent_max, int) else None,
        elements=elements,
    )


def granularity_of(spec: Format, point: QuantPoint) -> Granularity:
    """Which elements of a point's tensor share a scale."""
    if point.role != "weight" or spec.shared_per == "tensor" or point.axis is None:
        return PerTensor()
    if spec.per == "group":
        size = point.group_size or (spec.group_size if isinstance(spec.group_size, int) else max(_sizes(spec)))
        return PerGroup(axis=1 if point.axis == 0 else 0, group_size=size)
    return PerAxis(point.axis)


def _sizes(spec: Format) -> tuple[int, ...]:
    return spec.group_size if isinstance(spec.group_size, tuple) else (1,)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
