# SPDX-License-Identifier: Apache-2.0
"""What the steps share that make weights fit a register: sites, the search for a scale, the weights put back."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qhw.decisions import Json, Reason, Site, Step, Survey, Verdict
from qhw.engine import MatrixForm
from qhw.graph import WEIGHTED_KINDS, Graph, Operator, Placement
from qhw.numerics import Grid, PerAxis, QParams, expand, legal_scale

_CANDIDATES = 9


def weight_survey(graph: Graph, points: Placement, verdict: Callable[[Operator, str], Verdict]) -> Survey:
    """All weights that are multiplied and summed, each with its verdict.

    Args:
        graph: The captured model.
        points: Its points.
        verdict: Of an operator and the format of its weight.
    """
    names = {operator.name: operator for operator in graph.operators}
    sites = tuple(
        Site(name=point.group, verdict=verdict(names[point.operator], point.format))
        for point in points.points
        if point.role == "weight" and names[point.operator].kind in WEIGHTED_KINDS
    )
    if not sites:
        return Survey(verdict=refused("graph.weights", 0, "no operator sums products with weights"))
    return Survey(verdict=Verdict(taken=any(site.verdict.taken for site in sites)), sites=sites)


def refused(subject: str, value: Json, rule: str) -> Verdict:
    """A refusal for one reason."""
    return Verdict(taken=False, reasons=(Reason(subject=subject, value=value, rule=rule),))


def weighted_users(work: Any, step: Step) -> Iterator[tuple[str, Operator]]:
    """Each planned group of weights with each operator that sums products with it."""
    for group in step.sites:
        for operator in work.graph.weight_users(work.group(group)[0].tensor):
            if operator.kind in WEIGHTED_KINDS:
                yield group, operator


@dataclass(frozen=True)
class FittedWeight:
    """One operator's weight as rows that share a scale.

    Attributes:
        group: Of its points.
        form: How the weight is a matrix.
        rows: float64 [out_channels, inputs of an output], reals.
        start: Its qparams so far.
        scale: float64 [out_channels], what each row is quantized by.
        grid: Legal scales.
    """

    group: str
    form: MatrixForm
    rows: Tensor
    start: QParams
    scale: Tensor
    grid: Grid

    @classmethod
    def of(cls, work: Any, group: str, operator: Operator) -> "FittedWeight":
        """The weight of an operator in its present state."""
        weight, start = work.weight(group), work.weight_qparams(group)
        form = MatrixForm(operator, tuple(weight.shape))
        full = expand(start.scale, start.granularity, tuple(weight.shape)).expand(weight.shape)
        scale = form.weight_rows(full).flatten(0, 1)[:, 0].double()
        return cls(group, form, form.weight_rows(weight).flatten(0, 1).double(), start, scale, work.grid(group))

    @property
    def has_own_scales(self) -> bool:
        """Whether every row has a scale of its own."""
        return isinstance(self.start.granularity, PerAxis) and len(self.start.scale) == len(self.rows)

    def best_scale(self, growth: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
        """Among legal scales from the present one to one grown so far, that of the least error: float64 [out_channels].

        Args:
            growth: float64 [out_channels] >= 1.
            error: Scales [out_channels] -> error of each row; summed up where rows share a scale.
        """
        is_own = self.has_own_scales
        growth = growth if is_own else growth.amax().expand(len(self.rows))
        best, least = self.scale, torch.full_like(self.scale, math.inf)
        for share in torch.linspace(0, 1, _CANDIDATES, dtype=torch.float64):
            tried = legal_scale(self.scale * growth**share, self.grid).double()
            found = error(tried)
            found = found if is_own else found.sum().expand(len(self.rows))
            best, least = torch.where(found < least, tried, best), torch.minimum(found, least)
        return best

    def put(self, work: Any, codes: Tensor, scale: Tensor) -> None:
        """Give the weight these codes on these scales.

        Args:
            work: The working copy.
            codes: float64, like `rows`, whole numbers.
            scale: float64 [out_channels], legal.
        """
        before = self.start.scale
        chosen = scale.float() if self.has_own_scales else scale[: before.numel()].float().reshape(before.shape)
        work.set_qparams(self.group, replace(self.start, scale=chosen))
        tensor = work.group(self.group)[0].tensor
        weight = work.graph.tensor(tensor)
        real = self.form.weight_of((codes * scale[:, None]).reshape(self.form.weight_rows(weight).shape))
        work.graph.set_tensor(tensor, real.to(weight.dtype))
