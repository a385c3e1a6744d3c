# SPDX-License-Identifier: Apache-2.0
"""A requantization in several steps, each of which rounds; and a zero point that is added before rounding."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.site import Site, unknown
from qhw.numerics import ROUNDING_RULES, Rounding, rescale_fixed_point, rescale_shift
from qhw.schema import Stage

__all__ = ["Operation", "Step", "order_decides", "rounded_behind", "run_steps", "steps_of"]

Operation = Literal["multiply", "shift", "add_zero_point"]
_OPERATIONS: tuple[Operation, ...] = ("multiply", "shift", "add_zero_point")


class Step(NamedTuple):
    """One step: what it does, and how it rounds; None where it is exact."""

    operation: Operation
    rounding: Rounding | None = None


def steps_of(site: Site, zero_point: int) -> tuple[Step, ...] | None:
    """The steps of an operator's requantization; None where one rule says it all, or the operator has one of its own.

    The zero point is the last step where none says otherwise.

    Raises:
        IntegerError: the target leaves a step open, or its steps are none that a multiplier and a shift take.
    """
    path, rule = site.requantize
    if rule.stages is None or site.spec.rounding is not None:
        return None
    if rule.stages == "unknown":
        raise unknown(f"{path}.stages", rule.stages)
    if rule.kind not in ("fixed_point", "shift"):
        raise IntegerError(f"{path}.stages needs kind fixed_point or shift; got {rule.kind}")
    steps = tuple(_step(f"{path}.stages[{index}]", stage) for index, stage in enumerate(rule.stages))
    names = [step.operation for step in steps]
    needed = ["multiply", "shift"] if rule.kind == "fixed_point" else ["shift"]
    if sorted(name for name in names if name != "add_zero_point") != needed:
        raise IntegerError(f"{path}.stages must have {' and '.join(needed)} once each; got {', '.join(names)}")
    adding = [index for index, name in enumerate(names) if name == "add_zero_point"]
    if len(adding) > 1 or (adding and "multiply" in names[adding[0] :]):
        raise IntegerError(f"{path}.stages must add the zero point once, behind multiply; got {', '.join(names)}")
    if adding:
        return steps
    if order_decides(str(steps[-1].rounding), zero_point) and site.adds_zero_point_first:
        raise IntegerError(
            f'{site.path}.rounding_order = "zero_point_before" needs a step add_zero_point in {path}.stages'
        )
    return (*steps, Step("add_zero_point"))


def _step(path: str, stage: Stage) -> Step:
    name = stage.operation
    if name is None or name == "unknown":
        raise unknown(f"{path}.operation", name, _OPERATIONS)
    if name == "activation":
        raise IntegerError(f'{path}.operation = "{name}" cannot be executed: no field says by what it multiplies')
    if name == "add_zero_point":
        return Step(name)
    rounding = stage.rounding
    if rounding is None or rounding == "unknown":
        raise unknown(f"{path}.rounding", rounding, ROUNDING_RULES)
    if rounding not in ROUNDING_RULES:
        raise IntegerError(f'{path}.rounding = "{rounding}" names no single rounding')
    return Step(name, rounding)  # type: ignore[arg-type]


def run_steps(
    acc: Tensor, steps: tuple[Step, ...], multiplier: Tensor | None, shift: Tensor, bits: int, zero_point: int
) -> Tensor:
    """Codes before the clamp: every step on the integer that the one before it made.

        multiply: round(v multiplier / 2^bits);  shift: round(v / 2^shift);  add_zero_point: v + zero point 2^s

    s is the shift where it is still to come, else 0. A shift to the left then comes before the sum.

    Args:
        acc: int64 [*shape].
        steps: In order.
        multiplier: int64, broadcasts; None where no step multiplies.
        shift: int64, broadcasts.
        bits: Of the multiplier.
        zero_point: Of the result.

    Returns:
        Tensor: int64 [*shape].
    """
    values, left = acc, shift
    for step in steps:
        if step.operation == "add_zero_point":
            right = left.clamp(min=0)
            added = rescale_shift(torch.full_like(acc, zero_point), -right, rounding="floor")
            values, left = rescale_shift(values, left.clamp(max=0), rounding="floor") + added, right
        elif step.operation == "shift":
            values, left = rescale_shift(values, left, rounding=_rule(step)), torch.zeros_like(left)
        else:
            assert multiplier is not None
            values = rescale_fixed_point(values, multiplier, torch.zeros_like(left), bits=bits, rounding=_rule(step))
    return values


def _rule(step: Step) -> Rounding:
    assert step.rounding is not None
    return step.rounding


def order_decides(rounding: str, zero_point: int) -> bool:
    """Whether it changes a code that an integer is added to an exact quotient before rounding, not behind it.

    Floor and half to plus infinity move along with any integer, half to even with an even one.
    """
    if rounding in ("floor", "half_to_plus_infinity"):
        return False
    return zero_point % 2 != 0 if rounding == "half_even" else zero_point != 0


def rounded_behind(quotient: Callable[[Tensor, Rounding], Tensor], acc: Tensor, rule: Rounding, added: int) -> Tensor:
    """round(x + added) for an exact x that is known by its roundings only: int64 [*shape].

    Args:
        quotient: Accumulators and a rule -> x, rounded; odd in the accumulators: x(-acc) = -x(acc).
        acc: int64 [*shape].
        rule: Rounding of the sum.
        added: The integer.
    """
    if rule == "toward_zero":
        low, high = quotient(acc, "floor"), -quotient(-acc, "floor")
        return torch.where(low + added >= 0, low, high) + added
    up, down = quotient(acc, "half_to_plus_infinity"), -quotient(-acc, "half_to_plus_infinity")  # differ at ties
    chooses_up = (up + added) % 2 == 0 if rule == "half_even" else up + added > 0
    return torch.where(chooses_up, up, down) + added
