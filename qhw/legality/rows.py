# SPDX-License-Identifier: Apache-2.0
"""The kernel of the target that an operator is nearest to, and what separates it from that one."""

from collections.abc import Iterator
from dataclasses import dataclass

from qhw.legality.accumulators import accumulator_findings, weight_sum_findings
from qhw.legality.artefact import ArtefactOperator
from qhw.legality.bias import bias_findings
from qhw.legality.chain import Chain, chain_findings, implied
from qhw.legality.exponents import exponent_findings
from qhw.legality.finding import OTHER_TYPE, Finding
from qhw.legality.formats import nearest_format, takes_reals
from qhw.legality.real_range import range_findings
from qhw.legality.requantize import requantize_findings
from qhw.legality.sharing import fixed_findings, precision_findings, tie_findings, weight_scale_findings
from qhw.legality.site import Site
from qhw.schema import WEIGHTED_KINDS, TargetSpec
from qhw.schema import Operator as OperatorSpec

__all__ = ["Judged", "nearest_row"]


@dataclass(frozen=True, eq=False)
class Judged:
    """One operator under one kernel.

    Attributes:
        kernel: Its id.
        findings: What is broken or open.
        passed: Names of the operators computed along.
    """

    kernel: str
    findings: tuple[Finding, ...]
    passed: tuple[str, ...]

    @property
    def distance(self) -> int:
        """How far the operator is from the kernel."""
        return sum(one.distance for one in self.findings if not one.is_open)


def nearest_row(
    target: TargetSpec,
    operator: ArtefactOperator,
    path: str,
    spec: OperatorSpec,
    chain: Chain,
    *,
    leaves_in_float: bool,
    at_edge: tuple[str, ...] | None,
    derived_biases: bool,
) -> Judged:
    """The nearest of an operator's kernels: first by formats, bias and what is computed along, then by all else.

    Args:
        target: The accelerator.
        operator: As the artefact has it.
        path: Of the target's row, as `operators.Conv`.
        spec: That row; it lists kernels.
        chain: What follows the operator without a quantizer.
        leaves_in_float: Its result may be real numbers.
        at_edge: Formats of its result in place of its kernels', where it leaves the network.
        derived_biases: The toolchain quantizes biases by itself.
    """
    assert isinstance(spec.kernels, tuple) and spec.kernels
    found: list[tuple[Judged, Site]] = []
    for name in spec.kernels:
        row = target.kernels[name]
        listed = at_edge or (row.output if isinstance(row.output, tuple) else ())
        kept = implied(chain, [target.formats[f] for f in listed])
        site = Site(target, operator, path, spec, chain.output, kept.kinds, leaves_in_float)
        findings, output = _of_formats(site, name, at_edge)
        findings += chain_findings(path, spec, name, row, kept)
        if operator.kind in WEIGHTED_KINDS:
            findings += bias_findings(site, name, derived=derived_biases)
        findings += fixed_findings(site, output)
        findings += range_findings(site, output)
        findings += weight_scale_findings(site)
        passed = tuple(follower.name for follower in chain.followers)
        found.append((Judged(name, tuple(findings), passed), site))
    least = min(judged.distance for judged, _ in found)
    nearest = [(_with_arithmetic(judged, site), site) for judged, site in found if judged.distance == least]
    best, site = min(nearest, key=lambda pair: pair[0].distance)
    ties = tie_findings(site, {name: target.kernels[name] for name in spec.kernels})
    is_of_type = all(one.distance < OTHER_TYPE for one in best.findings)
    widths = precision_findings(site) if is_of_type else ()
    return Judged(best.kernel, (*best.findings, *ties, *widths), best.passed)


def _of_formats(site: Site, kernel: str, at_edge: tuple[str, ...] | None) -> tuple[list[Finding], str | None]:
    """What separates an operator's tensors from a kernel's formats; and the format of its result."""
    findings: list[Finding] = []
    output: str | None = None
    for field, listed, operand in site.operands(kernel):
        if operand.encoding is None and (takes_reals(site.target, listed) or _may_be_real(site, field, listed)):
            continue
        if field == "output" and listed is None:  # it gives real numbers, which whoever reads them quantizes
            continue
        if field == "weight" and listed is None and site.kind not in WEIGHTED_KINDS:
            continue
        clause = f"kernels.{kernel}.{field}"
        if field == "output" and at_edge is not None:
            clause, listed = "boundary.output_formats", at_edge
        name, found = nearest_format(site.target, clause, listed, operand)
        findings += found
        output = name if field == "output" else output
    return findings, output


def _may_be_real(site: Site, field: str, listed: object) -> bool:
    return field == "weight" and (
        site.spec.parameters == "float" or (listed is None and site.kind not in WEIGHTED_KINDS)
    )


def _with_arithmetic(judged: Judged, site: Site) -> Judged:
    """The same with clauses on sums and ratios; those on ratios make sense where scales and types are legal."""
    more: list[Finding] = []
    closed = [one for one in judged.findings if not one.is_open]
    if all(one.distance < OTHER_TYPE for one in closed):
        more += accumulator_findings(site, judged.kernel)
        more += weight_sum_findings(site, judged.kernel)
        if not any(".scale" in one.clause for one in closed):
            more += _of_scales(site, judged.kernel)
    return Judged(judged.kernel, (*judged.findings, *more), judged.passed)


def _of_scales(site: Site, kernel: str) -> Iterator[Finding]:
    yield from requantize_findings(site, kernel)
    yield from exponent_findings(site, kernel)
