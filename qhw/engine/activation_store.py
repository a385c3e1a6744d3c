# SPDX-License-Identifier: Apache-2.0
"""Activations of many samples, in memory up to a budget and in memory-mapped files beyond it."""

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["ActivationStore"]


class ActivationStore:
    """Keeps lists of values by key: tensors, and what else a graph passes on (sizes, tuples of an LSTM).

    Args:
        budget_bytes: What may stay in memory; each further list of tensors is written to a temporary file of its own,
            gone when the list is dropped or the store is closed. Lists of other values always stay in memory.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._held: dict[int, tuple[Any, ...]] = {}
        self._in_memory: dict[int, int] = {}
        self._files: dict[int, Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._next = 0

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def spilled(self) -> int:
        """Lists that lie in files now."""
        return len(self._files)

    def put(self, values: list[Any]) -> int:
        """Keep a list of values; returns its key."""
        key = self._next
        self._next += 1
        tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        is_plain = all(isinstance(value, Tensor) for value in values) and len({t.dtype for t in tensors}) == 1
        if not is_plain or sum(self._in_memory.values()) + size <= self._budget:
            self._in_memory[key] = size
            self._held[key] = tuple(values)
        else:
            self._held[key] = self._spill(key, tensors)
        return key

    def get(self, key: int) -> tuple[Any, ...]:
        """The values of a key, in order."""
        return self._held[key]

    def drop(self, key: int) -> None:
        """Forget a list."""
        del self._held[key]
        self._in_memory.pop(key, None)
        file = self._files.pop(key, None)
        if file is not None:
            file.unlink(missing_ok=True)

    def _spill(self, key: int, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        if self._folder is None:
            # Windows keeps a mapped file until the last view is gone; what is left then is the system's to clean.
            self._folder = tempfile.TemporaryDirectory(prefix="qhw-", ignore_cleanup_errors=True)
        file = self._files[key] = Path(self._folder.name) / str(key)
        total = sum(tensor.numel() for tensor in tensors)
        mapped = torch.from_file(str(file), shared=True, size=max(total, 1), dtype=tensors[0].dtype)
        placed, start = [], 0
        for tensor in tensors:
            # With the strides that it has in memory: a kernel is chosen by strides, and each rounds in its own way.
            strides = torch.empty_like(tensor, device="meta").stride()
            view = mapped.as_strided(tensor.shape, strides, start)
            placed.append(view.copy_(tensor))
            start += tensor.numel()
        return tuple(placed)
