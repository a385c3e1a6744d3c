# SPDX-License-Identifier: Apache-2.0
"""Parameters of operators that the hardware holds on a grid: the working copy computes with those it really has."""

import logging

from qhw.engine.work import Work
from qhw.schema import Approximation

__all__ = ["round_parameters"]

_log = logging.getLogger("qhw")


def round_parameters(work: Work) -> None:
    """Give each LeakyRelu the slope that its hardware has, where `approximation.kind` is `rounded_parameter`.

        slope = round(slope * denominator) / denominator, ties to even

    An operator whose denominator is not stated keeps its slope.
    """
    leaky = {operator.name: operator for operator in work.graph.operators if operator.kind == "LeakyRelu"}
    found = [
        (leaky[placement.name], denominator)
        for placement in work.plan.operators
        if placement.name in leaky
        and placement.where == "accelerator"
        and (denominator := _denominator(work, placement.listed_as)) is not None
    ]
    if not found:
        return
    with work.graph.changes():
        for operator, denominator in found:
            exact = float(operator.attributes["slope"])
            rounded = round(exact * denominator) / denominator
            node = work.graph.node(operator.name)
            node.args, node.kwargs = (node.args[0], rounded), {}
            if rounded != exact:
                _log.info("%s: its slope %g is %g on this hardware.", operator.name, exact, rounded)


def _denominator(work: Work, kind: str) -> float | None:
    """What a kind's parameters are multiples of one over; None where the target states none."""
    row = work.target.operators.get(kind)
    rule = row.approximation if row is not None else None
    if not isinstance(rule, Approximation) or rule.kind != "rounded_parameter" or not isinstance(rule.constants, dict):
        return None
    found = rule.constants.get("denominator")
    return float(found) if found is not None and found > 0 else None
