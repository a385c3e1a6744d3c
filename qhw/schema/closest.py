# SPDX-License-Identifier: Apache-2.0
"""The known name a mistyped one was probably meant to be."""

import difflib
from collections.abc import Iterable

__all__ = ["closest"]

ELSEWHERE = {
    **{"fullyconnected": "Gemm", "linear": "Gemm", "dense": "Gemm", "innerproduct": "Gemm", "deconv": "ConvTranspose"},
    **{"logistic": "Sigmoid", "mean": "ReduceMean", "eltwise": "Add", "batchmatmul": "MatMul", "swish": "Silu"},
    **{"truncate": "toward_zero", "truncation": "toward_zero", "trunc": "toward_zero", "rne": "half_even"},
    **{"pow2": "power_of_two", "po2": "power_of_two", "lut": "table", "clamp": "saturate", "axis": "out_channel"},
}
"""What other tools and documents call a name of ours, without capitals, where similarity of letters does not lead."""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name for what another tool calls so, else the most similar one, case ignored; None where none is."""
    names = list(known)
    if (meant := ELSEWHERE.get(name.lower())) in names:
        return meant
    folded = {other.lower(): other for other in reversed(names)}
    near = difflib.get_close_matches(name[:200].lower(), folded, n=1, cutoff=0.6)
    return folded[near[0]] if near else None
