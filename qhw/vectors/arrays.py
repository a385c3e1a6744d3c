# SPDX-License-Identifier: Apache-2.0
"""Arrays that grow on disk, sample by sample, and become one .npz file: the same bytes for the same arrays."""

import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qhw.errors import IntegerError
from qhw.vectors.collect import Array

__all__ = ["ArrayStore"]

_BLOCK = 1 << 20
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can hold


class ArrayStore:
    """Integer arrays by key, in the order of their first appearance; only one sample's are ever in memory.

    Args:
        folder: An empty folder for them, removed by whoever made it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers: dict[str, int] = {}  # a key is no file name
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}

    def append(self, arrays: Mapping[str, Array]) -> None:
        """Put arrays behind those of the same key, along the first axis.

        Raises:
            IntegerError: the shape of one sample's array is another than that of the sample before.
        """
        for key, array in arrays.items():
            shape = array.shape or (1,)
            before = self._shapes.get(key)
            if before is not None and before[1:] != shape[1:]:
                raise IntegerError(
                    f"{key}: its shape changes from sample to sample. Capture with a dynamic batch axis."
                )
            self._shapes[key] = shape if before is None else (before[0] + shape[0], *shape[1:])
            self._dtypes[key] = array.dtype.newbyteorder("<")
            self._numbers.setdefault(key, len(self._numbers))
            with self._file(key).open("ab") as file:
                file.write(array.astype(self._dtypes[key], copy=False).tobytes())

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of an array."""
        return self._shapes[key]

    def dtype(self, key: str) -> str:
        """`int8` and the like."""
        return self._dtypes[key].name

    def num_bytes(self, key: str) -> int:
        """Bytes of its elements."""
        return self._file(key).stat().st_size

    def blocks(self, key: str) -> Iterator[bytes]:
        """Its elements, C order, little-endian, in pieces of whole elements."""
        with self._file(key).open("rb") as file:
            while block := file.read(_BLOCK):
                yield block

    def write_npz(self, path: Path, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Write an .npz file.

        Args:
            path: The file.
            keys: Which arrays, in their order.

        Returns:
            dict: key -> dtype, shape and SHA-256 of its elements.
        """
        found: dict[str, dict[str, Any]] = {}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for key in keys:
                digest = hashlib.sha256()
                member = zipfile.ZipInfo(f"{key}.npy", _DATE)
                member.compress_type = zipfile.ZIP_DEFLATED
                header = {"descr": self._dtypes[key].str, "fortran_order": False, "shape": self._shapes[key]}
                with archive.open(member, "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    for block in self.blocks(key):
                        digest.update(block)
                        file.write(block)
                found[key] = {
                    "dtype": self.dtype(key),
                    "shape": list(self._shapes[key]),
                    "sha256": digest.hexdigest(),
                }
        return found

    def _file(self, key: str) -> Path:
        return self._folder / f"{self._numbers[key]}.bin"
