# SPDX-License-Identifier: Apache-2.0
"""What a target demands between scales: each product of powers of scales that must lie within bounds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhw.engine import MatrixForm
from qhw.graph import WEIGHTED_KINDS, Graph, Operator, OperatorPlacement
from qhw.numerics import (
    LARGEST_FLOAT,
    SMALLEST_NORMAL,
    LegalRatios,
    PerGroup,
    QParams,
    accumulator_bounds,
    expand,
    legal_ratios,
    quantize,
)
from qhw.schema import Align, Approximation, ExponentBound, Kernel, Shift, TargetSpec
from qhw.schema import Operator as OperatorSpec

MULTIPLIER = "its multiplier"
_AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum")
_GATHERING = ("Concat", "Relu", "Clip")


@dataclass(frozen=True)
class Relation:
    """constant * product of scale^factor is legal.

    Attributes:
        operator: Whose.
        what: What the product is called, for messages.
        terms: Group of points and factor. Of those that may be raised the first that can be is.
        legal: Bounds.
        constant: What scales are multiplied with.
        precisions: Of the product of those with a positive factor, and of the division by the others.
        span: Largest sum that the ratio multiplies; None: that of the weight codes.
    """

    operator: str
    what: str
    terms: tuple[tuple[str, int], ...]
    legal: LegalRatios
    constant: float = 1.0
    precisions: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64)
    span: float | None = None

    def value(self, work: Any) -> Tensor:
        """The product as the target computes it: float64 [] or, with a scale per channel, [channels]."""
        first, second = self.precisions
        up = torch.ones((), dtype=first)
        for group, factor in self.terms:
            if factor > 0:
                up = up * work.qparams[group].scale.to(first) ** factor
        found = up.to(second)
        for group, factor in self.terms:
            if factor < 0:
                found = found / work.qparams[group].scale.to(second) ** -factor
        return found.double() * self.constant

    def exact(self, work: Any) -> Tensor:
        """The product in float64, which underflows nowhere."""
        found = torch.tensor(self.constant, dtype=torch.float64)
        for group, factor in self.terms:
            found = found * work.qparams[group].scale.double() ** factor
        return found


def relations(work: Any) -> Iterator[Relation]:
    """Everything that kernels and requantizations of a plan demand of its scales, in execution order."""
    operators = {operator.name: operator for operator in work.graph.operators}
    for placement in work.plan.operators:
        operator = operators.get(placement.name)
        if operator is not None and placement.where == "accelerator" and placement.kernel is not None:
            yield from _Reader(work, operator, placement).relations()


def stated(target: TargetSpec, placement: OperatorPlacement, kind: str) -> tuple[LegalRatios | None, str | None]:
    """What an operator's requantization can hold; and its id, where the kernel names one."""
    name = target.kernels[str(placement.kernel)].requantize
    if name is None or name == "unknown" or not is_requantized(kind):
        return None, None
    return legal_ratios(f"requantize.{name}", target.requantize[name]), name


def is_requantized(kind: str) -> bool:
    """Whether operators of a kind go through multipliers that are checked here."""
    return kind in (*WEIGHTED_KINDS, "MatMul", "Mul", "Add", "Sub", *_AVERAGES, *_GATHERING)


class _Reader:
    """One operator's relations."""

    def __init__(self, work: Any, operator: Operator, placement: OperatorPlacement) -> None:
        self._work = work
        self._operator = operator
        self._kernel_name = str(placement.kernel)
        self._kernel: Kernel = work.target.kernels[self._kernel_name]
        self._spec: OperatorSpec = work.target.operators[placement.subject.split(".")[1]]
        self._legal, self._name = stated(work.target, placement, operator.kind)
        points = work.plan.points
        name = operator.name
        self._output = next((p.group for p in points if p.role == "activation" and p.operator == name), None)
        self._weight = next((p.group for p in points if p.role == "weight" and name in p.consumers), None)
        self._edges = {p.name: p.group for p in points if p.role == "edge" and p.operator == name}
        self._tensors = {p.tensor: p.group for p in points if p.role in ("activation", "input")}
        self._sources = [self._source(work.graph, value) for value in operator.inputs]
        self._inputs = [self._edges.get(f"{name}.input.{index}", source) for index, source in enumerate(self._sources)]

    def _source(self, graph: Graph, value: str) -> str | None:
        while value not in self._tensors and value not in graph.inputs and graph.operator(value).is_view:
            value = graph.operator(value).inputs[0]
        return self._tensors.get(value)

    def relations(self) -> Iterator[Relation]:
        known = [group for group in self._inputs if group is not None]
        if len(known) == len(self._inputs):
            yield from self._exponents()
            if self._operator.kind in WEIGHTED_KINDS and self._weight is not None and not self._is_grouped():
                yield from self._sums(known[0], self._weight)
            elif self._output is not None and self._weight is None and self._legal is not None:
                yield from self._of_activations(known, self._output, self._legal)
        if self._legal is not None and not self._by_table():
            for source, wanted in zip(self._sources, self._inputs, strict=True):
                if source is not None and wanted is not None and source != wanted:
                    yield self._ratio(((source, 1), (wanted, -1)), self._legal, self._span(source), "float64")

    def _is_grouped(self) -> bool:
        return isinstance(self._work.qparams[self._weight].granularity, PerGroup)

    def _by_table(self) -> bool:
        rule = self._spec.approximation
        regrid = None if self._name is None else self._work.target.requantize[self._name].regrid
        return isinstance(rule, Approximation) or regrid in ("dequantize", "unknown")

    def _span(self, group: str) -> float:
        q: QParams = self._work.qparams[group]
        if q.elements is not None:
            return max(q.elements.highest, -q.elements.lowest)
        return float(max(q.quant_max - int(q.zero_point), int(q.zero_point) - q.quant_min))

    def _sums(self, x: str, weight: str) -> Iterator[Relation]:
        """Input scale times weight scale, the unit of sums and biases; and its ratio to the output scale."""
        float32 = (torch.float32, torch.float32)

        def is_normal(product: Tensor) -> Tensor:
            return (product >= SMALLEST_NORMAL) & (product <= LARGEST_FLOAT)

        unit = LegalRatios(SMALLEST_NORMAL, LARGEST_FLOAT, "float32", "float32", is_normal)
        what = "input scale times weight scale"
        yield Relation(self._operator.name, what, ((weight, 1), (x, 1)), unit, precisions=float32)
        if self._output is not None and self._legal is not None:
            yield self._ratio(((weight, 1), (x, 1), (self._output, -1)), self._legal, None)

    def _of_activations(self, inputs: list[str], output: str, legal: LegalRatios) -> Iterator[Relation]:
        kind, by_float = self._operator.kind, self._rule_kind == "float32"
        if kind in ("MatMul", "Mul") and len(inputs) == 2:
            a, b = inputs
            count = int(self._operator.attributes["reduced_elements"]) if kind == "MatMul" else 1
            yield self._ratio(((a, 1), (b, 1), (output, -1)), legal, self._span(a) * self._span(b) * count)
        elif kind in ("Add", "Sub") and len(inputs) == 2:
            yield from self._operands(inputs[0], inputs[1], output, legal)
        elif kind in _AVERAGES and not self._sums_reals() and (by_float or inputs[0] != output or kind == "ReduceSum"):
            count = self._count()
            divided = 1 if kind == "ReduceSum" or self._spec.mean_count == "multiplier" else count
            yield self._ratio(
                ((inputs[0], 1), (output, -1)), legal, self._span(inputs[0]) * count, constant=1 / divided
            )
        elif kind in _GATHERING and not self._by_table():
            for group in dict.fromkeys(inputs):
                if group != output:
                    yield self._ratio(((group, 1), (output, -1)), legal, self._span(group))

    @property
    def _rule_kind(self) -> str | None:
        return None if self._name is None else self._work.target.requantize[self._name].kind

    def _sums_reals(self) -> bool:
        accumulator = self._work.target.accumulators.get(str(self._kernel.accumulator))
        return accumulator is not None and accumulator.kind == "float"

    def _count(self) -> int:
        facts = self._operator.attributes
        return max(1, int(facts.get("reduced_elements") or math.prod(facts.get("kernel", (1,)))))

    def _operands(self, a: str, b: str, output: str, legal: LegalRatios) -> Iterator[Relation]:
        """Add and Sub: each operand's own ratio; by fixed point to twice the larger scale first, and from there.

        By shifts, and in fixed point on one scale without a pre-shift, the sum has one ratio.
        """
        table = self._spec.preshift_bits
        if self._rule_kind == "shift" or (
            self._rule_kind == "fixed_point" and table is None and self._spec.same_scale in ("inputs", "all")
        ):
            yield from self._aligned(a, b, output, legal)
            return
        if self._rule_kind != "fixed_point":
            for group in (a, b):
                yield self._ratio(((group, 1), (output, -1)), legal, self._span(group))
            return
        formats = self._kernel.input if isinstance(self._kernel.input, tuple) else ()
        bits = next((n for f, n in table.items() if f in formats), None) if isinstance(table, dict) else None
        if not isinstance(bits, int):
            return
        larger, smaller = sorted((a, b), key=lambda group: -float(self._work.qparams[group].scale))
        span = 2.0**bits * max(self._span(a), self._span(b))
        for group in (larger, smaller):
            if group != larger:
                yield self._ratio(((group, 1), (larger, -1)), legal, span, "float64", constant=0.5)
        yield self._ratio(((larger, 1), (output, -1)), legal, 2 * span, "float64", constant=2.0 ** (1 - bits))

    def _aligned(self, a: str, b: str, output: str, legal: LegalRatios) -> Iterator[Relation]:
        """Operands that shifts bring to one of both scales, and the ratio of their sum from there."""
        scales = {group: float(self._work.qparams[group].scale) for group in (a, b)}
        larger, smaller = sorted((a, b), key=lambda group: -scales[group])
        align = self._work.target.requantize[str(self._name)].align
        unit = larger
        if isinstance(align, Align):
            to_finer = align.to == "finer"
            unit = smaller if to_finer else larger
            if isinstance(align.shift, Shift) and larger != smaller:
                furthest = align.shift.min if to_finer else align.shift.max
                if isinstance(furthest, int):
                    path = f"requantize.{self._name}.align.shift.{'min' if to_finer else 'max'}"
                    low = 2.0 ** -abs(furthest)
                    bounds = LegalRatios(low, math.inf, path, path, lambda value: value >= low)
                    yield Relation(self._operator.name, "its operands' ratio", ((smaller, 1), (larger, -1)), bounds)
        span = sum(self._span(group) * scales[group] / scales[unit] for group in (a, b))
        yield self._ratio(((unit, 1), (output, -1)), legal, span)

    def _ratio(
        self,
        terms: tuple[tuple[str, int], ...],
        legal: LegalRatios,
        span: float | None,
        precision: str | None = None,
        constant: float = 1.0,
    ) -> Relation:
        """A ratio in the precision in which the target computes it."""
        kinds = (torch.float64, torch.float64)
        if self._rule_kind == "float32":
            kinds = (torch.float32, torch.float32)
        elif precision is None and self._spec.ratio in ("float32", "float32_product"):
            kinds = (torch.float32, torch.float32 if self._spec.ratio == "float32" else torch.float64)
        return Relation(self._operator.name, MULTIPLIER, terms, legal, constant, kinds, span)

    def _exponents(self) -> Iterator[Relation]:
        """Inequalities between exponents that the kernel states; 2^(sum of factor * exponent) is within 2^bounds."""
        bounds = self._kernel.exponents if isinstance(self._kernel.exponents, tuple) else ()
        for index, bound in enumerate(bounds):
            terms = self._terms(bound)
            if terms is not None:
                path = f"kernels.{self._kernel_name}.exponents.{index}"
                yield Relation(self._operator.name, bound.name or "sum of exponents", terms, _within(path, bound))

    def _terms(self, bound: ExponentBound) -> tuple[tuple[str, int], ...] | None:
        """Groups and factors; None where a tensor is not quantized, or is a bias on a scale of its own."""
        found: dict[str, int] = {}
        for term, factor in bound.terms.items():
            groups = self._groups_of(term)
            if groups is None:
                return None
            for group in groups:
                found[group] = found.get(group, 0) + factor
        # A weight is one operator's own: it goes before tensors that others read.
        ordered = sorted(found.items(), key=lambda item: item[0] != self._weight)
        return tuple((group, factor) for group, factor in ordered if factor)

    def _groups_of(self, term: str) -> tuple[str, ...] | None:
        inputs = [group for group in self._inputs if group is not None]
        by_scale = sorted(inputs, key=lambda group: float(self._work.qparams[group].scale))
        named = {
            "input": inputs[:1],
            "input_2": inputs[1:2],
            "weight": [self._weight],
            "output": [self._output],
            "inputs_min": by_scale[:1],
            "inputs_max": by_scale[-1:],
            "bias": [*inputs[:1], self._weight] if self._bias_follows() else [],
        }[term]
        return tuple(str(group) for group in named) if named and None not in named else None

    def _bias_follows(self) -> bool:
        """Whether the bias is in units of input scale times weight scale."""
        name = self._kernel.bias
        return name in self._work.target.biases and self._work.target.biases[str(name)].scale == "input*weight"


def _within(path: str, bound: ExponentBound) -> LegalRatios:
    low = 2.0**bound.min if isinstance(bound.min, int) else 0.0
    high = 2.0**bound.max if isinstance(bound.max, int) else math.inf
    return LegalRatios(low, high, f"{path}.min", f"{path}.max", lambda value: (value >= low) & (value <= high))


def sum_bounds(work: Any, operator: Operator, group: str) -> tuple[Tensor, Tensor]:
    """Lowest and highest sum of products of a weight's codes, without a bias: int64 [out_channels]."""
    weight, qparams, x = work.weight(group), work.weight_qparams(group), work.qparams[work.input_group(operator.name)]
    codes = quantize(weight, qparams).long() - expand(
        qparams.zero_point.long(), qparams.granularity, tuple(weight.shape)
    )
    return accumulator_bounds(
        MatrixForm(operator, tuple(weight.shape)).weight_rows(codes).flatten(0, 1),
        input_quant_min=x.quant_min,
        input_quant_max=x.quant_max,
        input_zero_point=int(x.zero_point),
    )


def bias_codes(work: Any, operator: Operator, group: str, channels: int) -> Tensor:
    """Biases in units of input scale times weight scale, rounded outwards: float64 [out_channels]."""
    if operator.bias is None:
        return torch.zeros(channels, dtype=torch.float64)
    unit = work.qparams[work.input_group(operator.name)].scale.double() * work.qparams[group].scale.double()
    bias: Tensor = work.graph.tensor(operator.bias).detach().double()
    codes = bias / per_channel(unit, channels)
    return codes.abs().ceil() * codes.sign()


def per_channel(values: Tensor, channels: int) -> Tensor:
    """One value for each output channel, from one for each scale of a weight.

    A grouped transposed convolution has weights [in, out / groups, ...]: its groups share the scales.
    """
    return values.repeat(channels // len(values)) if values.dim() else values.expand(channels)


def per_scale(values: Tensor, like: Tensor) -> Tensor:
    """The largest value of the channels that share a scale, like the scales."""
    return values.reshape(-1, len(like)).amax(0) if like.dim() else values.amax()
