# SPDX-License-Identifier: Apache-2.0
"""The fused multiply-add of processors, in torch, which has none."""

import torch
from torch import Tensor

from qhw.errors import RangeError


def fma_float32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c with one rounding, as an FMA instruction computes it.

    The product of two float32 numbers is exact in float64. The sum is rounded to odd there (an inexact one takes the
    neighbour whose last bit is 1), so that the final rounding to float32, half to even, decides as the exact sum would.

    Args:
        a: float32, broadcasts against the others.
        b: float32.
        c: float32.

    Returns:
        Tensor: float32 [*shape]. Infinite values and NaN as IEEE 754 has them.

    Raises:
        RangeError: an argument is not float32.

    Reference:
        Boldo, Melquiond, 2008, "Emulation of a FMA and correctly rounded sums", IEEE Transactions on Computers 57(4).
    """
    for name, x in (("a", a), ("b", b), ("c", c)):
        if x.dtype != torch.float32:
            raise RangeError(f"fma_float32: {name} must be float32; got {x.dtype}. Convert it.")
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    # Knuth's two-sum: what the float64 addition lost, exactly.
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    inexact = (lost != 0) & torch.isfinite(lost) & (bits & 1 == 0)
    # One step in the magnitude of the sum, towards what was lost.
    step = torch.where((lost > 0) == (total > 0), 1, -1)
    odd = torch.where(inexact, bits + step, bits).view(torch.float64)
    return odd.float()
