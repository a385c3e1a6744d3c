# SPDX-License-Identifier: Apache-2.0
"""Integer codes on their way through a model: integers, carried in floats where these hold them exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qhw.numerics import QParams, code_dtype

__all__ = ["Codes", "carrier", "every_code", "is_one_grid", "reach"]

_FLOAT32_EXACT = 2**24


@dataclass(frozen=True)
class Codes:
    """A quantized tensor.

    Attributes:
        values: Whole numbers: float32 where every code stays below 2^24, else int64.
        qparams: What they stand for; per tensor.
    """

    values: Tensor
    qparams: QParams

    def integers(self) -> Tensor:
        """The codes in the smallest integer dtype that holds their grid, contiguous."""
        return self.values.to(code_dtype(self.qparams.quant_min, self.qparams.quant_max)).contiguous()

    def centred(self) -> Tensor:
        """Codes minus zero point, like `values`."""
        return self.values - self.qparams.zero_point.to(self.values.dtype)

    def reals(self) -> Tensor:
        """float32: scale * (code - zero point)."""
        return self.centred().float() * self.qparams.scale


def carrier(qparams: QParams) -> torch.dtype:
    """The dtype that carries a grid's codes: float32 below 2^24, so that products need no conversion, else int64."""
    return torch.float32 if max(abs(qparams.quant_min), abs(qparams.quant_max)) < _FLOAT32_EXACT else torch.int64


def every_code(qparams: QParams) -> Codes:
    """All codes of a grid, from the lowest on: what a table has an entry for."""
    return Codes(torch.arange(qparams.quant_min, qparams.quant_max + 1).to(carrier(qparams)), qparams)


def reach(qparams: QParams) -> int:
    """Largest magnitude of a code minus zero point."""
    zero = int(qparams.zero_point)
    return max(qparams.quant_max - zero, zero - qparams.quant_min)


def is_one_grid(a: QParams, b: QParams) -> bool:
    """Whether codes of one mean the same on the other."""
    return (float(a.scale), int(a.zero_point), a.quant_min, a.quant_max) == (
        float(b.scale), int(b.zero_point), b.quant_min, b.quant_max,
    )  # fmt: skip
