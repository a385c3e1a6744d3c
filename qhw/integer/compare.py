# SPDX-License-Identifier: Apache-2.0
"""Codes beside codes: the integer model and the simulated one, tensor by tensor."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qhw.engine import QuantizedModel
from qhw.errors import IntegerError
from qhw.integer.model import IntegerModel
from qhw.numerics import FakeQuantizer, quantize

__all__ = ["Difference", "compare", "differences", "simulated_codes"]


@dataclass(frozen=True)
class Difference:
    """How the codes of one tensor differ.

    Attributes:
        tensor: Its name in the plan.
        codes: How many were compared.
        differing: How many differ.
        largest: Largest difference, in codes.
    """

    tensor: str
    codes: int
    differing: int
    largest: int

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            self.tensor,
            self.codes + other.codes,
            self.differing + other.differing,
            max(self.largest, other.largest),
        )


def simulated_codes(result: QuantizedModel, *inputs: Tensor) -> dict[str, Tensor]:
    """Codes of every quantized activation of the simulated model: tensor -> int32.

    Args:
        result: The quantized model.
        inputs: float32, in the order of its inputs.
    """
    collector = _Collector(result.module)
    with torch.no_grad():
        collector.run(*inputs)
    return collector.codes


def differences(mine: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Iterator[Difference]:
    """Of each tensor that both have, in the order of the first.

    Raises:
        IntegerError: the shapes of one tensor do not belong together.
    """
    for name, codes in mine.items():
        if name in others:
            if others[name].numel() != codes.numel():
                raise IntegerError(
                    f"{name}: has codes of shape {tuple(codes.shape)}, the artefact {tuple(others[name].shape)}: it is "
                    "another model's. Export the result again."
                )
            gap = (codes.long() - others[name].long().reshape(codes.shape)).abs()
            largest = int(gap.max()) if gap.numel() else 0
            yield Difference(name, gap.numel(), int((gap > 0).sum()), largest)


def compare(result: QuantizedModel, model: IntegerModel, batches: Iterable[tuple[Tensor, ...]]) -> list[Difference]:
    """The integer model against the simulated one.

    Args:
        result: The quantized model.
        model: The same in integers.
        batches: Inputs, batch by batch.

    Returns:
        One entry for each quantized activation, in execution order.
    """
    found: dict[str, Difference] = {}
    for batch in batches:
        for one in differences(model.codes(*batch), simulated_codes(result, *batch)):
            found[one.tensor] = found[one.tensor] + one if one.tensor in found else one
    return list(found.values())


class _Collector(fx.Interpreter):
    """Runs the simulated model and keeps what its quantizers make, as codes."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.codes: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().call_module(target, args, kwargs)
        module = self.fetch_attr(str(target))
        if isinstance(module, FakeQuantizer) and isinstance(found, Tensor):
            node = self._node
            name = _tensor_name(node)
            if name is not None and name not in self.codes:
                self.codes[name] = quantize(found, module.qparams, name=name)
        return found

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)


def _tensor_name(node: fx.Node) -> str | None:
    """The value that a quantizer quantizes; None for a parameter, and for an operand that gets a second grid."""
    source = node.all_input_nodes[0]
    if source.op == "get_attr" or "name" not in source.meta:
        return None
    return str(source.meta["name"])
