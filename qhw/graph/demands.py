# SPDX-License-Identifier: Apache-2.0
"""Formats that are demanded from outside: by the user, and by the target at the edge of the network."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Demands"]


@dataclass(frozen=True)
class Demands:
    """Formats that are demanded from outside.

    Attributes:
        weights: By parameter name: the user's.
        tensors: By tensor name: the user's.
        inputs: By name of an input of the network: those that the target allows there.
        outputs: By tensor name, of results of the network that operators read, too: those that the target allows.
    """

    weights: Mapping[str, str]
    tensors: Mapping[str, str]
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
