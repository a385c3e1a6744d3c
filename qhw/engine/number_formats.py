# SPDX-License-Identifier: Apache-2.0
"""What the codes of a target's formats stand for, as the plugins say that know their kinds."""

from collections.abc import Iterable

from qhw.engine.blame import blaming, must_be
from qhw.errors import PlanError
from qhw.extension import Registry, default_registry
from qhw.graph import QuantPoint, input_point
from qhw.numerics import ElementSet, ListedElements
from qhw.schema import INTEGER, Format, TargetSpec, closest

__all__ = ["check_number_formats", "check_static_biases", "elements_of"]


def elements_of(target: TargetSpec, name: str, registry: Registry | None = None) -> ElementSet | None:
    """The elements of a format; None where its codes are all integers of a range.

    Args:
        target: The accelerator.
        name: A format of it.
        registry: Plugins to look in; absent: all that are installed.

    Raises:
        PlanError: no plugin knows the format's kind, or it lacks what its plugin asks for.
        PluginError: the plugin raised, or returned no elements.
    """
    spec, where = target.formats[name], f"{target.name}: formats.{name}"
    if spec.kind == INTEGER:
        return _listed(spec)
    known = (registry or default_registry()).number_formats
    if spec.kind not in known:
        installed = ", ".join([INTEGER, *known])
        near = closest(spec.kind, [INTEGER, *known])
        raise PlanError(
            f"{where}.kind: no installed plugin brings the number format '{spec.kind}'. Installed: {installed}."
            f"{f' Closest: {near}.' if near else ''} Install its plugin, or choose another format."
        )
    entry = known[spec.kind]
    doing = f"number format '{entry.name}'"
    with blaming(entry.record, f"{doing}: problem"):
        problem = entry.value().problem(spec)
    if problem is not None:
        said = must_be(problem, str, entry.record, f"{doing}: problem")
        raise PlanError(f"{where}.{said.rstrip('.')}. Choose another format, or state it in a target file.")
    with blaming(entry.record, f"{doing}: elements"):
        found = entry.value().elements(spec)
    return must_be(found, ElementSet, entry.record, f"{doing}: elements")  # type: ignore[type-abstract]


def check_number_formats(target: TargetSpec, names: Iterable[str], registry: Registry) -> None:
    """Refuse formats whose kind no plugin knows, or that lack what theirs asks for.

    Args:
        target: The accelerator.
        names: Formats of it; those of biases are passed over.
        registry: Plugins to look in.

    Raises:
        PlanError: says which format, and what is installed.
    """
    for name in dict.fromkeys(names):
        if name in target.formats:
            elements_of(target, name, registry)


def check_static_biases(target: TargetSpec, points: Iterable[QuantPoint]) -> None:
    """Refuse integer biases in units of sums whose scale nobody knows before run time.

    Raises:
        PlanError: says which.
    """
    known = list(points)
    for point in known:
        if point.role == "bias" and target.biases[point.format].meets_sum:
            source = input_point(known, point.operator)
            if source is not None and source.is_dynamic:
                raise PlanError(
                    f"{point.name}: an integer bias in units of input*weight (biases.{point.format}) needs the scale "
                    f"of '{source.name}', which is computed at run time (formats.{source.format}.scale.dynamic). "
                    "Let the bias stay float in the target, or choose another --format."
                )


def _listed(spec: Format) -> ElementSet | None:
    codes = spec.code_set
    if not isinstance(codes, tuple) or len(codes) == codes[-1] - codes[0] + 1:
        return None
    return ListedElements(tuple(map(float, codes)), codes)
