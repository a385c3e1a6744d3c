# SPDX-License-Identifier: Apache-2.0
"""Sites that the range and rounding plugins share: groups of weight points, groups of activation points."""

from qhw.decisions import Reason, Resources, Site, Survey, Verdict
from qhw.graph import Placement
from qhw.schema import Scale, TargetSpec

TAKEN = Verdict(taken=True)
DATA_GIVEN = Reason(subject="resources.calibration", value=True, rule="calibration data is given")


def weight_sites(points: Placement) -> tuple[str, ...]:
    """Groups of weight points, in order."""
    return tuple(dict.fromkeys(point.group for point in points.points if point.role == "weight"))


def ranged_weight_sites(points: Placement, target: TargetSpec) -> tuple[str, ...]:
    """Groups of weight points that a range decides, in order: all but palettes, whose entries are chosen themselves."""
    weights = (point for point in points.points if point.role == "weight")
    return tuple(dict.fromkeys(p.group for p in weights if target.formats[p.format].kind != "palette"))


def activation_sites(points: Placement) -> tuple[str, ...]:
    """Groups of activation points whose qparams the hardware leaves open, and does not compute itself, in order."""
    fixed = {point.group for point in points.points if point.is_given}
    activations = (p.group for p in points.points if p.role in ("activation", "input", "edge"))
    return tuple(dict.fromkeys(group for group in activations if group not in fixed))


def all_sites(names: tuple[str, ...], reasons: tuple[Reason, ...]) -> Survey:
    """Every site is taken, for the same reasons."""
    if not names:
        nothing = Reason(subject="points", value=0, rule="there is no point to act on")
        return Survey(verdict=Verdict(taken=False, reasons=(nothing,)))
    sites = tuple(Site(name=name, verdict=TAKEN) for name in names)
    return Survey(verdict=Verdict(taken=True, reasons=reasons), sites=sites)


def scale_reasons(points: Placement, target: TargetSpec, names: tuple[str, ...], rule: str) -> tuple[Reason, ...]:
    """One reason for each kind of scale that the formats of these groups have; {value} in the rule stands for it."""
    formats = dict.fromkeys(point.format for point in points.points if point.group in names)
    found: dict[str, Reason] = {}
    for name in formats:
        scale = target.formats[name].scale
        kind = scale.kind if isinstance(scale, Scale) else "float32"
        found.setdefault(kind, Reason(subject=f"formats.{name}.scale.kind", value=kind.replace("_", "-"), rule=rule))
    return tuple(found.values())


def free_scales(points: Placement, target: TargetSpec, rule: str, nothing: str) -> Survey:
    """Groups of weights and activations, those left out whose scale the format prescribes.

    Args:
        points: All points.
        target: Tells the scale of each format.
        rule: Why the others are taken; {value} stands for the kind of scale.
        nothing: What there is to say where none is left.
    """
    sites = tuple(_scale_site(points, target, name) for name in (*weight_sites(points), *activation_sites(points)))
    taken = tuple(site.name for site in sites if site.verdict.taken)
    reasons = scale_reasons(points, target, taken, rule) or (Reason(subject="points", value=0, rule=nothing),)
    return Survey(verdict=Verdict(taken=bool(taken), reasons=reasons), sites=sites)


def _scale_site(points: Placement, target: TargetSpec, group: str) -> Site:
    """A group, refused where its format prescribes the scale."""
    name = next(point.format for point in points.points if point.group == group)
    scale = target.formats[name].scale
    if getattr(scale, "kind", None) == "fixed":
        reason = Reason(subject=f"formats.{name}.scale.kind", value="fixed", rule="the scale is {value}")
        return Site(name=group, verdict=Verdict(taken=False, reasons=(reason,)))
    return Site(name=group, verdict=TAKEN)


def not_uniform(target: TargetSpec, name: str) -> Reason:
    """Why an algorithm for integers does nothing on a format whose codes are no range of them."""
    spec = target.formats[name]
    if spec.code_set is not None:
        rule = "the codes {value} are not one scale apart"
        return Reason(subject=f"formats.{name}.code_set", value=str(spec.code_set), rule=rule)
    return Reason(subject=f"formats.{name}.kind", value=spec.kind, rule="{value} codes are not one scale apart")


def needs_calibration(resources: Resources) -> Survey | None:
    """The refusal of an algorithm that needs data, where there is none."""
    if resources.calibration:
        return None
    reason = Reason(subject="resources.calibration", value=False, rule="needs calibration data")
    return Survey(verdict=Verdict(taken=False, reasons=(reason,)))


def weight_width_sites(
    points: Placement,
    target: TargetSpec,
    max_bits: int,
    algorithm: str,
    reasons: tuple[Reason, ...],
    per: tuple[str, ...] = ("tensor", "out_channel", "group"),
) -> Survey:
    """Weights of few bits are taken; more bits, or scales shared in another way, are a reason to refuse.

    Args:
        points: All points.
        target: Tells the width of each format.
        max_bits: The most bits that are few.
        algorithm: Who asks; its option `max_bits` is named.
        reasons: Of the algorithm as a whole.
        per: Ways of sharing scales that it can deal with.
    """
    sites = []
    for point in points.points:
        if point.role != "weight":
            continue
        spec = target.formats[point.format]
        bits, subject = spec.element_bits, f"formats.{point.format}"
        if not spec.is_uniform:
            verdict = Verdict(taken=False, reasons=(not_uniform(target, point.format),))
        elif not (isinstance(bits, int) and bits <= max_bits):
            rule = f"{{value}} bits: more than {max_bits}, where others do (--set {algorithm}.max_bits)"
            verdict = Verdict(taken=False, reasons=(Reason(subject=f"{subject}.bits", value=bits, rule=rule),))
        elif spec.per not in per:
            reason = Reason(subject=f"{subject}.per", value=spec.per, rule="a scale per {value} is not one per output")
            verdict = Verdict(taken=False, reasons=(reason,))
        else:
            rule = "{value} bits: how each weight is quantized decides"
            verdict = Verdict(taken=True, reasons=(Reason(subject=f"{subject}.bits", value=bits, rule=rule),))
        sites.append(Site(name=point.group, verdict=verdict))
    return Survey(verdict=Verdict(taken=any(s.verdict.taken for s in sites), reasons=reasons), sites=tuple(sites))
