# SPDX-License-Identifier: Apache-2.0
"""What is certainly wrong with calibration data: too few samples, and inputs that never change."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["FEW", "Look", "remarks_on"]

FEW = 32  # samples below which a maximum over them says little of the next one


class Look:
    """One input over all samples.

    Attributes:
        lowest: Smallest value so far.
        highest: Largest value so far.
        is_repeated: Whether every sample so far is the first one.
        is_flat: Whether every sample so far holds one value throughout.
    """

    def __init__(self) -> None:
        self.lowest, self.highest = float("inf"), float("-inf")
        self.is_repeated = self.is_flat = True
        self._first: Tensor | None = None

    def add(self, batch: Tensor) -> None:
        """Look at more samples: float [samples, ...]."""
        if not batch.numel():
            return
        flat = batch.flatten(1) if batch.dim() > 1 else batch.unsqueeze(1)
        low, high = flat.amin(1), flat.amax(1)
        self.lowest = min(self.lowest, float(low.min()))
        self.highest = max(self.highest, float(high.max()))
        self.is_flat = self.is_flat and flat.shape[1] > 1 and bool((low == high).all())
        if self._first is None:
            self._first = flat[:1].clone()
        self.is_repeated = self.is_repeated and bool(torch.equal(flat, self._first.expand_as(flat)))


def remarks_on(name: str, samples: int, looks: Mapping[str, Look]) -> Iterator[str]:
    """One line for each thing that makes samples unfit to set ranges with.

    Args:
        name: What messages call the data.
        samples: How many there are.
        looks: The float inputs.
    """
    if samples < FEW:
        are = "sample is" if samples == 1 else "samples are"
        yield f"{name}: {samples} {are} few: ranges may miss what the model meets later. Give {FEW} or more."
    for key, look in looks.items():
        if look.lowest == look.highest:
            yield f"{name}: input '{key}' is {look.lowest:g} everywhere: it has no range to learn. Check the data."
        elif look.is_repeated and samples > 1:
            yield f"{name}: input '{key}' is the same in all {samples} samples. Check the data."
        elif look.is_flat:
            yield f"{name}: every sample of input '{key}' holds one value throughout. Check the data."
