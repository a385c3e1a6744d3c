# SPDX-License-Identifier: Apache-2.0
"""Floating point as an integer unit: where whole numbers stay exact, and the settings that keep them so."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qhw.errors import IntegerError

__all__ = ["FLOAT32_EXACT", "exact_dtype", "exact_settings"]

FLOAT32_EXACT = 2**24
_FLOAT64_EXACT = 2**53


def exact_dtype(bound: int) -> torch.dtype:
    """The fastest dtype in which sums of whole numbers stay exact, no partial sum leaving [-bound, bound]."""
    if bound < FLOAT32_EXACT:
        return torch.float32
    return torch.float64 if bound < _FLOAT64_EXACT else torch.int64


@contextmanager
def exact_settings() -> Iterator[None]:
    """No autocast, no NNPACK (its Winograd transform rounds), IEEE float32 in oneDNN; a self-test on first use.

    Raises:
        IntegerError: a product of whole numbers comes out wrong on this machine all the same.
    """
    with _settings():
        _self_test()
        yield


@contextmanager
def _settings() -> Iterator[None]:
    onednn: Any = torch.backends.mkldnn
    places = (onednn.conv, onednn.matmul)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


@cache
def _self_test() -> None:
    """Products that fill 24 bits, by each kernel path, against int64."""
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator)

    def last(x: Tensor) -> Tensor:
        return x.float().contiguous(memory_format=torch.channels_last)

    x, w = codes(20, 16, 12, 12), codes(16, 16, 3, 3)
    cases: dict[str, tuple[Tensor, Tensor]] = {
        "convolution": (F.conv2d(x.float(), w.float(), padding=1), F.conv2d(x, w, padding=1)),
        "strided convolution": (F.conv2d(x.float(), w.float(), stride=2), F.conv2d(x, w, stride=2)),
        "depthwise convolution": (
            F.conv2d(x.float(), w[:, :1].float(), groups=16),
            F.conv2d(x, w[:, :1].contiguous(), groups=16),
        ),
        "convolution with channels last": (F.conv2d(last(x), last(w), padding=1), F.conv2d(x, w, padding=1)),
        "depthwise convolution with channels last": (
            F.conv2d(last(x), last(w[:, :1]), groups=16),
            F.conv2d(x, w[:, :1].contiguous(), groups=16),
        ),
        "transposed convolution": (F.conv_transpose2d(x.float(), w.float()), F.conv_transpose2d(x, w)),
        "linear": (F.linear(x[:, 0, 0].float(), w[:, 0, :, 0].repeat(1, 4).float()),
                   x[:, 0, 0] @ w[:, 0, :, 0].repeat(1, 4).t()),
    }  # fmt: skip
    for name, (found, expected) in cases.items():
        if not torch.equal(found.double(), expected.double()):
            raise IntegerError(
                f"integer: {name} in float32 must be exact below 2^24 and is not on this machine, with torch "
                f"{torch.__version__}. Verify elsewhere."
            )
