# SPDX-License-Identifier: Apache-2.0
"""A sum, difference or product of two inputs, on every pair of their codes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel, SilentProgress
from qhw.numerics import dequantize
from tests.random_grids import grid_of

_FUNCTIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}


class _Pair(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self._function = _FUNCTIONS[kind]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self._function(a, b)


def pairs(kind: str, target: str, formats: Mapping[str, str] | None = None, broadcast: str = "") -> QuantizedModel:
    """A sum, difference or product of inputs [256, 256]; `broadcast` names the one that has one column, if any."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 1 if name == broadcast else 256, generator=generator) for name in "ab")
    graph = qhw.capture(_Pair(kind), (a, b))
    plan = qhw.plan(graph, target, calibration=[(a, b)], pipeline="ranges-ptq", formats=formats or {})
    return qhw.quantize(graph, plan, calibration=[(a, b)], progress=SilentProgress())


def every_pair(result: QuantizedModel, broadcast: str = "") -> tuple[Tensor, Tensor]:
    """Reals of every pair of codes."""
    a, b = (grid_of(result, name) for name in "ab")
    first, second = (torch.arange(q.quant_min, q.quant_max + 1).expand(256, 256) for q in (a, b))
    if broadcast == "a":
        return dequantize(first.t()[:, :1].contiguous(), a), dequantize(second, b)
    return dequantize(first, a), dequantize(second.t()[:, : 1 if broadcast else 256].contiguous(), b)
