# SPDX-License-Identifier: Apache-2.0
"""Encodings as plain JSON, as ACME's compiler reads them."""

import json
from pathlib import Path
from typing import Any

from qhw.engine import QuantizedModel
from qhw.extension import Exporter


class AcmeJson(Exporter):
    """One object per quantized tensor: scales, zero points, codes. Sorted keys: equal results give equal files."""

    name = "acme_json"
    summary = "Scales and zero points of every tensor as JSON."

    def check(self, result: Any) -> tuple[str, ...]:
        """ACME's compiler reads activations and weights of 8 bits or fewer; biases follow from them."""
        encodings = result.encodings()
        wide = {p.format: encodings[p.group].bits for p in _tensors(result) if encodings[p.group].bits > 8}
        return tuple(
            f"formats.{name} has {bits} bits and ACME's compiler reads 8. Choose another with --format"
            for name, bits in sorted(wide.items())
        )

    def export(self, result: Any, folder: Path) -> tuple[Path, ...]:
        """Write `encodings.json`."""
        encodings = result.encodings()
        tensors = {
            point.name: {
                "role": point.role,
                "tensor": point.tensor,
                "scale": encodings[point.group].scale.reshape(-1).tolist(),
                "zero_point": encodings[point.group].zero_point.reshape(-1).tolist(),
                "codes": [encodings[point.group].quant_min, encodings[point.group].quant_max],
            }
            for point in _tensors(result)
        }
        path = folder / "encodings.json"
        content = {"target": result.plan.target, "tensors": tensors}
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return (path,)


def _tensors(result: QuantizedModel) -> list[Any]:
    """Points that have an encoding of their own."""
    present = set(result.groups())
    return [point for point in result.plan.points if point.role != "bias" and point.group in present]
