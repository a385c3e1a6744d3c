# SPDX-License-Identifier: Apache-2.0
"""Accumulators: what each can reach, proven from the stored codes, and an input that reaches it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qhw.engine import QuantizedModel
from qhw.errors import IntegerError
from qhw.graph import WEIGHTED_KINDS
from qhw.integer.accumulate import Bounds
from qhw.integer.bounds import product_bounds, saturating_bounds
from qhw.integer.pairwise import stated_pair_bounds
from qhw.integer.site import Site, sites
from qhw.integer.uniform import has_elements
from qhw.integer.witness import Witness, pair_witness, sum_witness
from qhw.schema import Accumulator, Pairwise

__all__ = ["PairProof", "Proof", "Witness", "prove_accumulators"]


@dataclass(frozen=True)
class PairProof:
    """One operator's sums of two products, where these have a register of their own.

    Attributes:
        bounds: Lowest and highest sum of a pair per output channel; of any two products, and of whatever may be
            multiplied, as far as the target does not say which.
        bits: Width of the register; None where the target does not say.
        overflow: What it says happens past that.
        witness: An input that attains the largest magnitude; its peak is the sum of the pair. None where the target
            does not say which products make a pair, and where none was asked for.
    """

    bounds: Bounds
    bits: int | None
    overflow: str | None
    witness: Witness | None

    @property
    def overflowing(self) -> Tensor:
        """Which output channels have a pair that can leave the register: bool [out_channels]."""
        needed = self.bounds.bits
        return torch.zeros_like(needed, dtype=torch.bool) if self.bits is None else needed > self.bits


@dataclass(frozen=True)
class Proof:
    """One operator's accumulators.

    Attributes:
        operator: Its name.
        path: The target's entry, as `accumulators.sum`; None where the kernel names none.
        bounds: Lowest and highest value per output channel, at any moment, in any order of summation; where the
            accumulator saturates, with the bias in the place that the target says.
        bits_needed: Width that holds all of them, the sign included.
        bits: Width that the target has; None where it does not say.
        overflow: What it says happens past that.
        witness: An input that attains the largest magnitude; None where the bound is safe but not attained,
            and where none was asked for.
        pairs: Of sums of two products; None where these have no register of their own.
    """

    operator: str
    path: str | None
    bounds: Bounds
    bits_needed: int
    bits: int | None
    overflow: str | None
    witness: Witness | None
    pairs: PairProof | None = None

    @property
    def headroom(self) -> int | None:
        """Bits left; negative where some input overflows; None where the width is not known."""
        return None if self.bits is None else self.bits - self.bits_needed

    @property
    def overflowing_channels(self) -> int:
        """Output channels whose accumulator, or a pair of products before it, can leave its width."""
        needed = self.bounds.bits
        over = torch.zeros_like(needed, dtype=torch.bool) if self.bits is None else needed > self.bits
        return int((over if self.pairs is None else over | self.pairs.overflowing).sum())


def prove_accumulators(result: QuantizedModel, *, witnesses: bool = True) -> Iterator[Proof]:
    """The accumulators of every operator with integer inputs and weights, in execution order.

    Does not need the target to say how it requantizes.

    Args:
        result: The quantized model.
        witnesses: Whether inputs are looked for that attain the bounds: one gradient of one output per operator.
    """
    for site in sites(result):
        if site.operator.kind in WEIGHTED_KINDS and site.weight is not None and site.inputs and not has_elements(site):
            yield _proof(site, witnesses)


def _proof(site: Site, wants_witness: bool) -> Proof:
    bounds = saturating_bounds(site, product_bounds(site))
    path: str | None
    spec: Accumulator | None
    try:
        path, spec = site.accumulator
    except IntegerError:
        path, spec = None, None
    pairs = spec.pairwise if spec is not None and isinstance(spec.pairwise, Pairwise) else None
    return Proof(
        operator=site.name,
        path=path,
        bounds=bounds,
        bits_needed=int(bounds.bits.max()),
        bits=spec.bits if spec is not None and isinstance(spec.bits, int) else None,
        overflow=spec.overflow if spec is not None else None,
        witness=sum_witness(site, bounds) if wants_witness else None,
        pairs=None if pairs is None else _pair_proof(site, pairs, wants_witness),
    )


def _pair_proof(site: Site, spec: Pairwise, wants_witness: bool) -> PairProof:
    bounds = stated_pair_bounds(site)
    return PairProof(
        bounds=bounds,
        bits=spec.bits if isinstance(spec.bits, int) else None,
        overflow=spec.overflow,
        witness=pair_witness(site, bounds) if wants_witness else None,
    )
