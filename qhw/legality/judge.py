# SPDX-License-Identifier: Apache-2.0
"""The walk over an artefact: who runs each operator, and whether the target allows it as it stands."""

from collections.abc import Iterator

from qhw.graph import VIEW_KINDS
from qhw.graph.cell import TWO_OPERANDS
from qhw.legality.artefact import Artefact, ArtefactOperator
from qhw.legality.chain import Chain, chain_of, within
from qhw.legality.clips import CLIPS, clip_codes
from qhw.legality.finding import Finding, unknown
from qhw.legality.formats import Operand, nearest_format, takes_reals
from qhw.legality.limits import limit_findings, network_findings, rank_findings
from qhw.legality.report import CheckReport, OperatorReport, Status, Unjudged, Unread, Violation
from qhw.legality.rows import nearest_row
from qhw.legality.settled import settle
from qhw.legality.sharing import tie_findings
from qhw.legality.site import Site, graph_operator
from qhw.legality.tensors import tensor_findings
from qhw.legality.unread import unread_clauses
from qhw.schema import WEIGHTED_KINDS, TargetSpec
from qhw.schema import Operator as OperatorSpec
from qhw.schema.kinds import row_kinds

__all__ = ["judge"]


def judge(artefact: Artefact, target: TargetSpec, name: str, *, host_allowed: bool = True) -> CheckReport:
    """Hold a quantized model against a target.

    Args:
        artefact: The model.
        target: The accelerator.
        name: What the report calls the artefact.
        host_allowed: False: an operator that the accelerator does not run is a violation, wherever else it could run.
    """
    return _Judge(artefact, target, name, host_allowed).report()


class _Judge:
    """One walk."""

    def __init__(self, artefact: Artefact, target: TargetSpec, name: str, host_allowed: bool) -> None:
        self._artefact = artefact
        self._target = target
        self._name = name
        self._fallback = target.fallback if host_allowed else "refuse"
        self._settled = settle(artefact)
        self._violations: dict[Violation, None] = {}  # in order; a tensor that is read twice breaks a clause once
        self._open: dict[tuple[str, str], list[str]] = {}
        self._taken: dict[str, str] = {}
        self._first_on_host: str | None = None

    def report(self) -> CheckReport:
        """Judge everything."""
        operators = tuple(self._judged(operator) for operator in self._settled.operators)
        self._given()
        run = sum(one.status in ("legal", "illegal") for one in operators)
        for finding in network_findings(self._target, self._artefact, run):
            self._note("", "", finding)
        tensors = 0
        for tensor, finding in tensor_findings(self._artefact, self._target):
            self._note(tensor, "", finding)
        if not self._settled.operators:
            tensors = len(self._artefact.activations) + len(self._artefact.parameters)
        unjudged = (Unjudged(clause, why, tuple(nodes)) for (clause, why), nodes in self._open.items())
        return CheckReport(
            self._name,
            self._artefact.form,
            self._target.name,
            operators,
            tensors,
            tuple(self._violations),
            tuple(unjudged),
            self._artefact.remarks,
            tuple(self._unread(operators)),
        )

    def _unread(self, operators: tuple[OperatorReport, ...]) -> Iterator[Unread]:
        kinds = {one.kind for one in operators}
        kernels = {one.kernel for one in operators if one.kernel is not None}
        return unread_clauses(self._target, self._artefact, kinds, kernels)

    def _note(self, node: str, kind: str, finding: Finding) -> None:
        if finding.is_open:
            nodes = self._open.setdefault((finding.clause, finding.must), [])
            if node and node not in nodes:
                nodes.append(node)
            return
        violation = Violation(node, kind, finding.tensor, finding.clause, finding.must, finding.got, finding.fix)
        self._violations[violation] = None

    def _judged(self, operator: ArtefactOperator) -> OperatorReport:
        if operator.name in self._taken:
            return _report(operator, "passed", reason=f"computed along with {self._taken[operator.name]}")
        if self._fallback == "single_partition" and self._first_on_host is not None:
            reason = f"fallback: all that follows '{self._first_on_host}', the first on the host, is there"
            return _report(operator, "host", reason=reason)
        if operator.kind in VIEW_KINDS:
            return self._view(operator)
        if operator.kind in CLIPS and _is_of_quantizer(operator):
            return _report(operator, "passed", reason="saturates as the quantizer behind it does")
        chain = chain_of(self._settled, operator)
        if not _is_touched(operator, chain):
            finding = _missing("operators", "has real numbers in and out", "Quantize it, or replace it.")
            return self._elsewhere(operator, finding)
        if operator.kind == "Unknown":
            finding = _missing("operators", f"{operator.type}, which no kind of qhw stands for", "Replace it.")
            return self._elsewhere(operator, finding)
        finding = _missing(f"operators.{operator.kind}", operator.type, "Replace it, or run it on the host.")
        for kind in row_kinds(operator.kind, self._target.operators):
            found = self._under(operator, f"operators.{kind}", self._target.operators[kind], chain)
            if isinstance(found, OperatorReport):
                return found
            finding = found
        return self._elsewhere(operator, finding)

    def _view(self, operator: ArtefactOperator) -> OperatorReport:
        """The same tensor seen otherwise; another grid behind it is a requantization."""
        too_many = next((one for one in rank_findings(self._target, operator) if not one.is_open), None)
        if too_many is not None:
            return self._elsewhere(operator, too_many)
        spec = self._target.operators.get(operator.kind)
        grids = [use.encoding for use in (*operator.inputs[:1], operator.output)]
        if spec is not None and None not in grids:
            site = Site(self._target, operator, f"operators.{operator.kind}", spec, operator.output)
            findings = list(tie_findings(site, {}))
            if findings:
                return self._noted(operator, None, findings)
        return _report(operator, "passed", reason="the same values, seen otherwise")

    def _under(
        self, operator: ArtefactOperator, path: str, spec: OperatorSpec, chain: Chain
    ) -> OperatorReport | Finding:
        """The operator under one row of the target, or what keeps it from that."""
        limits = [*limit_findings(graph_operator(operator), path, spec), *rank_findings(self._target, operator)]
        broken = next((one for one in limits if not one.is_open), None)
        if broken is not None:
            return broken
        if spec.kernels == "unknown":
            return self._noted(operator, None, [unknown(f"{path}.kernels")], "unjudged")
        if spec.kernels is None and operator.weight is None:
            return self._movement(operator, path, spec, limits)
        if not spec.kernels:
            return _missing(f"{path}.kernels", operator.type, "Replace it, or run it on the host.")
        rows = [self._target.kernels[name] for name in spec.kernels]
        gives_reals = any(takes_reals(self._target, row.output) for row in rows)
        chain = within(chain, operator, (spec.fused, *(row.fused for row in rows)), gives_reals=gives_reals)
        output = chain.output
        in_float, remark = self._leaves_in_float(spec, output.tensor, output.encoding is not None)
        why = self._left_in_float(operator, spec, chain, in_float)
        if why is not None:
            return self._elsewhere(operator, why)
        judged = nearest_row(
            self._target,
            operator,
            path,
            spec,
            chain,
            leaves_in_float=in_float,
            at_edge=self._at_edge(output.tensor),
            derived_biases=self._artefact.biases == "derived",
        )
        self._taken |= dict.fromkeys(judged.passed, operator.name)
        return self._noted(operator, judged.kernel, [*limits, *remark, *judged.findings])

    def _at_edge(self, tensor: str) -> tuple[str, ...] | None:
        """Formats of a result that leaves the network, where the target says which."""
        boundary = self._target.boundary
        stated = boundary.output_formats if boundary is not None else None
        is_last = tensor in self._artefact.outputs and not self._settled.readers.get(tensor)
        return stated if isinstance(stated, tuple) and is_last else None

    def _given(self) -> None:
        """Graph inputs in formats that the target does not take there."""
        boundary = self._target.boundary
        stated = boundary.input_formats if boundary is not None else None
        if not isinstance(stated, tuple):
            return
        for name in sorted(self._artefact.inputs):
            for reader in self._settled.readers.get(name, ())[:1]:
                use = next(use for use in reader.inputs if use.tensor == name)
                if use.encoding is not None:
                    _, found = nearest_format(
                        self._target, "boundary.input_formats", stated, Operand(name, use.encoding)
                    )
                    for finding in found:
                        self._note(reader.name, reader.kind, finding)

    def _movement(
        self, operator: ArtefactOperator, path: str, spec: OperatorSpec, limits: list[Finding]
    ) -> OperatorReport | Finding:
        real = [use.tensor for use in operator.inputs if use.encoding is None]
        if operator.kind == "Concat" and real and len(real) < len(operator.inputs):
            got = f"real numbers in '{real[0]}'"  # which are put together with others before all are quantized
            return _missing(f"{path}.same_scale", got, "Quantize it.", "quantized operands")
        site = Site(self._target, operator, path, spec, operator.output)
        return self._noted(operator, None, [*limits, *tie_findings(site, {})])

    def _leaves_in_float(self, spec: OperatorSpec, tensor: str, is_quantized: bool) -> tuple[bool, list[Finding]]:
        """Whether a result may be real numbers, and what of that is open."""
        if is_quantized or spec.output == "float":
            return spec.output == "float", []
        boundary = self._target.boundary
        stated = boundary.outputs if boundary is not None else None
        if tensor not in self._artefact.outputs or stated == "quantized":
            return False, []
        if stated == "float":
            return True, []
        return True, [unknown("boundary.outputs", "unknown" if stated else "the target does not say what leaves it")]

    def _left_in_float(
        self, operator: ArtefactOperator, spec: OperatorSpec, chain: Chain, leaves_in_float: bool
    ) -> Finding | None:
        """Why the artefact computes an operator in real numbers although the target has it; None where it does not."""
        names = spec.kernels if isinstance(spec.kernels, tuple) else ()
        rows, first = [self._target.kernels[name] for name in names], f"kernels.{names[0]}"
        weight = operator.weight

        def takes(field: str) -> bool:
            return any(takes_reals(self._target, getattr(row, field)) for row in rows)

        if operator.kind in WEIGHTED_KINDS:
            if weight is None:
                return _missing("operators", "a weight computed at run time", "Make it a constant.")
            if weight.encoding is None and spec.parameters != "float" and not takes("weight"):
                clause = f"{first}.weight"
                return _missing(clause, "weights in real numbers", "Quantize its weights.", "quantized weights")
            return None
        real = next((use.tensor for use in operator.inputs if use.encoding is None), None)
        constant_is_real = weight is not None and weight.encoding is None and spec.parameters != "float"
        needs_weight = any(row.weight is not None for row in rows) or operator.kind in TWO_OPERANDS
        if (real is not None or (constant_is_real and needs_weight)) and not takes("input"):
            what = real or (weight.name if weight is not None else "")
            clause = f"{first}.input"
            return _missing(clause, f"real numbers in '{what}'", "Quantize it.", "quantized operands")
        if chain.output.encoding is None and not leaves_in_float and not takes("output"):
            if all(row.output is None for row in rows):
                return None
            clause = f"{first}.output"
            return _missing(clause, "a result in real numbers", "Quantize its result.", "a quantized result")
        return None

    def _elsewhere(self, operator: ArtefactOperator, finding: Finding) -> OperatorReport:
        """An operator that the accelerator does not run: on the host, refused, or nobody knows."""
        reason = f"{finding.clause}: {finding.got}"
        weight = operator.weight
        is_meant = operator.kind in WEIGHTED_KINDS and weight is not None and weight.encoding is not None
        if is_meant or self._fallback == "refuse":
            return self._noted(operator, None, [finding])
        if self._fallback in ("host", "single_partition"):
            self._first_on_host = self._first_on_host or operator.name
            return _report(operator, "host", reason=reason)
        why = "unknown" if self._fallback else "the target does not say where operators go that it does not run"
        return self._noted(operator, None, [unknown("fallback", why)], "unjudged", reason)

    def _noted(
        self,
        operator: ArtefactOperator,
        kernel: str | None,
        findings: list[Finding],
        status: Status = "legal",
        reason: str = "",
    ) -> OperatorReport:
        for finding in findings:
            self._note(operator.name, operator.kind, finding)
        closed = [finding for finding in findings if not finding.is_open]
        if closed:
            return _report(operator, "illegal", kernel, ", ".join(dict.fromkeys(one.clause for one in closed)))
        return _report(operator, status, kernel, reason or (findings[0].clause if status == "unjudged" else ""))


def _report(operator: ArtefactOperator, status: Status, kernel: str | None = None, reason: str = "") -> OperatorReport:
    return OperatorReport(operator.name, operator.kind, operator.type, status, kernel, reason)


def _missing(clause: str, got: str, fix: str, wanted: str = "an operator that the target runs") -> Finding:
    return Finding(clause, f"must be {wanted}", got, fix)


def _is_touched(operator: ArtefactOperator, chain: Chain) -> bool:
    weight = operator.weight
    uses = (*operator.inputs, operator.output, chain.output)
    return any(use.encoding is not None for use in uses) or (weight is not None and weight.encoding is not None)


def _is_of_quantizer(clip: ArtefactOperator) -> bool:
    """Whether a clip is nothing but the codes that a quantizer uses: of real numbers, or beyond all of its codes."""
    e = clip.output.encoding
    codes = None if e is None else clip_codes(clip, e)
    if e is None or codes is None or clip.inputs[0].encoding is None:
        return codes is not None
    low, high = (-(1 << (e.bits - 1)), (1 << (e.bits - 1)) - 1) if e.signed else (0, (1 << e.bits) - 1)
    return clip.kind == "Clip" and not e.is_float and codes[0] <= low and high <= codes[1]
