# SPDX-License-Identifier: Apache-2.0
"""Golden vectors: every layer's codes and sums as files, and a script without qhw that recomputes them."""

from qhw.vectors.files import GoldenVectors, write_golden

__all__ = ["GoldenVectors", "write_golden"]
