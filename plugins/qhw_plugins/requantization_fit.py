# SPDX-License-Identifier: Apache-2.0
"""Scales made coarser just so far that every multiplier, shift and bias is one that the hardware holds."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qhw.decisions import Json, Reason, Resources, Site, Step, StepReport, Survey, Verdict, listed
from qhw.engine import is_bounded_bias, weight_scale_floor
from qhw.errors import RangeError
from qhw.extension import Algorithm, PluginInfo, hookimpl
from qhw.graph import Graph, OperatorPlacement, Placement, QuantPoint, accumulator_width
from qhw.numerics import Grid, LegalRatios, QParams, fake_quantize, legal_scale
from qhw.schema import TargetSpec
from qhw_plugins.scale_relations import (
    MULTIPLIER,
    Relation,
    bias_codes,
    is_requantized,
    per_scale,
    relations,
    stated,
    sum_bounds,
)
from qhw_plugins.weight_loss import lowest, sqnr_db

_MARGIN = 1 + 2.0**-20  # float32 scales and their products round; a ratio at the bound itself could fall outside
_ROUNDS = 64
_FEW_CODES = 16  # 4 bits: below, activations cost these networks several points of accuracy


class RequantizationFit(Algorithm):
    """Proves the multiplier and shift of each operator and the width of each bias, and repairs what fails.

    With input scale sx, weight scale sw of a channel and output scale sy, a kernel's requantization holds the ratio
    sx sw / sy within bounds (`legal_ratios`), and a bias of n bits needs |bias| <= (2^(n-1) - 1) sx sw. Where that does
    not hold, one scale grows to the smallest legal one with which it does:

        ratio too small, bias too large: the weight scale (its channel's own, else the tensor's); of an operator
            without weights, or whose weight scale is at its largest, the scale of its operand
        ratio too large: the output scale

    Scales only ever grow and zero points stay: no value is clipped, sums get no larger, so that proven accumulators
    stay proven, and what one repair demands of the next operator is met in turn; the smallest scales that meet
    everything are found. Weights keep their reals, and are rounded to the nearest code of their new grid. Tensors on
    one scale grow together; a scale that the hardware prescribes stays. A ratio so small that what it scales is
    always 0 stays, where the target defines that (`out_of_range`).
    """

    name = "requantization_fit"
    stage = "fit"
    summary = "Make every multiplier, shift and bias one that the hardware holds."

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Operators whose multiplier, shift or bias the target bounds are sites."""
        biased = {point.operator: point.format for point in points.points if point.role == "bias"}
        sites = [
            Site(name=placement.name, verdict=_verdict(placement, biased.get(placement.name), target))
            for placement in points.operators
            if placement.kernel is not None
            and (
                is_requantized(placement.kind)
                or placement.name in biased
                or isinstance(target.kernels[placement.kernel].exponents, tuple)
            )
        ]
        if not sites:
            reason = Reason(subject="graph.operators", value=0, rule="no operator on the accelerator is requantized")
            return Survey(verdict=Verdict(taken=False, reasons=(reason,)))
        return Survey(verdict=Verdict(taken=any(site.verdict.taken for site in sites)), sites=tuple(sites))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Raise scales until all relations hold; those of operators that are no sites are left alone."""
        sites = set(step.sites)
        before = dict(work.qparams)
        changes = _Changes()
        for _ in range(_ROUNDS):
            count = len(changes.reasons)
            for point in work.plan.points:
                if point.role == "bias" and point.operator in sites:
                    _fit_bias(work, point, changes)
            checked = [relation for relation in relations(work) if relation.operator in sites]
            for relation in checked:
                _fit(work, relation, changes)
            if len(changes.reasons) == count:
                break
        else:
            raise RangeError(
                f"{changes.reasons[-1][0]}: its scales meet no bound after {_ROUNDS} rounds: the target's bounds "
                "contradict each other. Keep an operator in float with --keep-float."
            )
        figures = _figures(work, before, changes, checked)
        _check_codes(figures)
        return StepReport(stage=step.stage, algorithm=self.name, summary=_summary(figures), sites=figures)


def _verdict(placement: OperatorPlacement, bias: str | None, target: TargetSpec) -> Verdict:
    """What there is to hold an operator's scales to."""
    kernel = str(placement.kernel)
    legal, name = stated(target, placement, placement.kind)
    taken = []
    if legal is not None:
        rule = f"multipliers are proven: {_words(legal)}"
        taken.append(Reason(subject=f"requantize.{name}", value=target.requantize[str(name)].kind, rule=rule))
    bounds = target.kernels[kernel].exponents
    if isinstance(bounds, tuple):
        rule = "{value} bounds on sums of exponents are kept"
        taken.append(Reason(subject=f"kernels.{kernel}.exponents", value=len(bounds), rule=rule))
    if bias is not None and is_bounded_bias(target.biases[bias]):
        bits = target.biases[bias].bits
        taken.append(Reason(subject=f"biases.{bias}.bits", value=bits, rule="biases are proven to fit {value} bits"))
    if taken:
        return Verdict(taken=True, reasons=tuple(taken))
    if name is None:
        found = target.kernels[kernel].requantize
        reason = Reason(
            subject=f"kernels.{kernel}.requantize", value=found, rule="{value}: nothing to hold a multiplier to"
        )
    else:
        rule = "its bounds are not stated: nothing to hold a multiplier to"
        reason = Reason(subject=f"requantize.{name}.shift", value=None, rule=rule)
    return Verdict(taken=False, reasons=(reason,))


def _words(legal: LegalRatios) -> str:
    return f"ratios of scales from {_power(legal.low)} to {_power(legal.high)}"


def _power(value: float) -> str:
    """A bound in short: as a power of two where it is one, or just below one."""
    fraction, exponent = math.frexp(value)
    if fraction == 0.5 and value:
        return f"2^{exponent - 1}"
    return f"2^{exponent}" if fraction > 1 - 2.0**-5 else f"{value:.6g}"


@dataclass
class _Changes:
    """What was raised and why, in order: operator, group, words."""

    reasons: list[tuple[str, str, str]] = field(default_factory=list)

    def note(self, operator: str, group: str, words: str) -> None:
        self.reasons.append((operator, group, words))


def _fit_bias(work: Any, point: QuantPoint, changes: _Changes) -> None:
    """Weight scales with which a bias fits its width; without any, what the target's rule says happens later."""
    floor = weight_scale_floor(work, point)
    if floor is None:
        return
    group, scale = _weight_group(work, point), work.qparams[_weight_group(work, point)].scale.double()
    if bool((scale < floor).any()) and _raise(work, group, torch.maximum(scale, floor)):
        bits = work.target.biases[point.format].bits
        changes.note(point.operator, group, f"its bias fits {bits} bits (biases.{point.format}.bits)")
    _fit_bias_beside_sums(work, point, group, changes)


def _fit_bias_beside_sums(work: Any, point: QuantPoint, group: str, changes: _Changes) -> None:
    """Weight scales with which the accumulator holds a bias beside the widest sum of products, where it holds that."""
    kernel = next(p.kernel for p in work.plan.operators if p.name == point.operator)
    width = accumulator_width(work.target, kernel)
    if width is None:
        return
    scale, limit = work.qparams[group].scale.double(), 2.0 ** (width - 1) - 1
    operator = next(o for o in work.graph.operators if o.name == point.operator)
    lowest, highest = (bound.double() for bound in sum_bounds(work, operator, group))
    bias = bias_codes(work, operator, group, len(lowest))
    fits = (highest <= limit) & (-lowest <= limit)
    total = torch.maximum(highest + bias.clamp(min=0), -lowest - bias.clamp(max=0))
    # Codes round, so that sums may shrink a little less than scales grow.
    growth = torch.where(fits & (total > limit), total / limit * (1 + 2.0**-7), 1.0)
    if bool((growth > 1).any()) and _raise(work, group, scale * per_scale(growth, scale)):
        name = work.target.kernels[str(kernel)].accumulator
        changes.note(point.operator, group, f"its bias leaves room for its sums (accumulators.{name}.bits)")


def _weight_group(work: Any, point: QuantPoint) -> str:
    return str(next(p.group for p in work.plan.points if p.role == "weight" and point.operator in p.consumers))


def _fit(work: Any, relation: Relation, changes: _Changes) -> None:
    """Raise one scale where the relation does not hold.

    Raises:
        RangeError: no scale of it may be raised so far.
    """
    value, legal = relation.value(work), relation.legal
    wrong = ~legal.is_legal(value)
    if not bool(wrong.any()):
        return
    exact = relation.exact(work)
    is_small = exact < (legal.low if math.isinf(legal.high) else math.sqrt(legal.low * legal.high))
    small, large = wrong & is_small, wrong & ~is_small
    if legal.zero_is_defined and bool(small.any()):
        small = small & ~_is_nothing(work, relation, exact)
    for is_wrong, bound, sign in ((small, legal.low, 1), (large, legal.high, -1)):
        if bool(is_wrong.any()):
            growth = torch.where(is_wrong, (bound / exact) ** sign, 1.0)
            _raise_one(work, relation, growth, exact[is_wrong], sign, changes)
            return


def _is_nothing(work: Any, relation: Relation, ratio: Tensor) -> Tensor:
    """Whether what a ratio scales is always 0; a quarter of a code, for some kernels round twice."""
    if relation.span is not None:
        return ratio * relation.span < 0.25
    operator = next(o for o in work.graph.operators if o.name == relation.operator)
    group = relation.terms[0][0]
    lowest, highest = sum_bounds(work, operator, group)
    sums = torch.maximum(highest, -lowest).double()
    largest = sums + bias_codes(work, operator, group, len(sums)).abs()
    return ratio * per_scale(largest, work.qparams[group].scale) < 0.25


def _raise_one(work: Any, relation: Relation, growth: Tensor, ratios: Tensor, sign: int, changes: _Changes) -> None:
    """The first scale with a factor of that sign that may grow so far grows."""
    worst = float(ratios.min() if sign > 0 else ratios.max())
    legal = relation.legal
    must = (
        f"at least {_power(legal.low)} ({legal.low_field})"
        if sign > 0
        else f"at most {_power(legal.high)} ({legal.high_field})"
    )
    for group, factor in relation.terms:
        if factor * sign > 0:
            scale = work.qparams[group].scale.double()
            wanted = growth ** (1 / abs(factor))
            wanted = scale * (wanted if scale.dim() else wanted.amax())
            if _raise(work, group, wanted):
                changes.note(relation.operator, group, f"{relation.what} is {must}")
                return
    raise RangeError(
        f"{relation.operator}: {relation.what} must be {must}; got {worst:.6g}, and the scale that could grow is fixed "
        f"or at its largest. Keep '{relation.operator}' in float with --keep-float, or choose another --format."
    )


def _raise(work: Any, group: str, wanted: Tensor) -> bool:
    """Let a group's scales grow to the smallest legal ones that are wanted; False where there are none."""
    found, grid = work.qparams[group], work.grid(group)
    if any(point.is_given for point in work.group(group)):
        return False
    grows = wanted > found.scale.double()
    scale = torch.where(grows, legal_scale(wanted * _margin(grid), grid), found.scale)
    if bool((scale.double() < wanted).any()) or torch.equal(scale, found.scale):
        return False
    work.set_qparams(group, replace(found, scale=scale))
    return True


def _margin(grid: Grid) -> float:
    return _MARGIN if grid.scale_kind == "float32" else 1.0


def _figures(
    work: Any, before: dict[str, QParams], changes: _Changes, checked: list[Relation]
) -> dict[str, dict[str, Json]]:
    """Per operator: its ratios, and what was changed for it, why, and at what cost."""
    figures: dict[str, dict[str, Json]] = {}
    ratios: dict[str, list[Tensor]] = {}
    for relation in checked:
        if relation.what == MULTIPLIER:
            ratios.setdefault(relation.operator, []).append(relation.value(work).flatten())
    for operator, found in ratios.items():
        figures[operator] = {"ratio_min": float(torch.cat(found).min()), "ratio_max": float(torch.cat(found).max())}
    for operator, group, words in changes.reasons:
        site, scale = figures.setdefault(operator, {}), work.qparams[group].scale.double()
        growth = scale / before[group].scale.double()
        site[f"grown.{group}"] = int((growth > 1).sum())
        site[f"growth.{group}"] = float(f"{float(growth.max()):.6g}")
        known = str(site.get("reason", ""))
        site["reason"] = known if words in known else f"{known}, {words}" if known else words
        if work.group(group)[0].role == "weight":
            weight = work.weight(group)
            site["sqnr_db_before"] = sqnr_db(weight, fake_quantize(weight, before[group]))
            site["sqnr_db"] = sqnr_db(weight, fake_quantize(weight, work.qparams[group]))
        else:
            site[f"codes.{group}"] = float(f"{work.grid(group).span / float(growth):.4g}")
    return figures


def _codes(site: dict[str, Json]) -> dict[str, float]:
    """Group of activations whose scale grew -> codes that its values use still."""
    return {key.removeprefix("codes."): float(str(n)) for key, n in site.items() if key.startswith("codes.")}


def _check_codes(figures: dict[str, dict[str, Json]]) -> None:
    """A tensor whose values are left with one code holds nothing any more.

    Raises:
        RangeError: there is one.
    """
    for name, site in figures.items():
        for group, codes in _codes(site).items():
            if codes < 2:
                raise RangeError(
                    f"{name}: {site['reason']} only with '{group}' on so coarse a scale that its values are one code. "
                    f"Keep '{name}' in float with --keep-float, or choose another --format."
                )


def _summary(figures: dict[str, dict[str, Json]]) -> str:
    multipliers = sum("ratio_min" in site for site in figures.values())
    start = f"multipliers of {multipliers} operators are legal, biases fit"
    changed = {name: site for name, site in figures.items() if "reason" in site}
    if not changed:
        return f"{start}; no scale had to grow"
    shown = [_change(name, site) for name, site in list(changed.items())[:3]]
    more = f" and those of {len(changed) - 3} operators more" if len(changed) > 3 else ""
    return f"{start}; scales grew: {'; '.join(shown)}{more}{lowest(changed)}{_coarse(changed)}"


def _change(name: str, site: dict[str, Json]) -> str:
    groups = [key.removeprefix("grown.") for key in site if key.startswith("grown.")]
    parts = [f"{site[f'grown.{g}']} of {g} by up to {float(str(site[f'growth.{g}'])):.3g}" for g in groups]
    return f"{name}: {', '.join(parts)}, so that {site['reason']}"


def _coarse(changed: dict[str, dict[str, Json]]) -> str:
    """A warning of tensors that are left with few codes."""
    coarse = [name for name, site in changed.items() if min(_codes(site).values(), default=_FEW_CODES) < _FEW_CODES]
    if not coarse:
        return ""
    return (
        f". Warning: values use fewer than {_FEW_CODES} codes at {listed(coarse, 3)}; measure the accuracy, or keep "
        f"{'it' if len(coarse) == 1 else 'them'} in float with --keep-float"
    )


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Scales made to fit multipliers, shifts and biases.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [RequantizationFit]
