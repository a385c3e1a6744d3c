# SPDX-License-Identifier: Apache-2.0
"""Exporter `onnx_qdq`: ONNX with QuantizeLinear and DequantizeLinear, weights as codes and int32 biases."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import onnx
from pydantic import Field

from qhw.engine import QuantizedModel
from qhw.errors import ExportError
from qhw.extension import AlgorithmOptions, Exporter, PluginInfo, hookimpl
from qhw.numerics import PerTensor
from qhw_plugins.onnx_encodings import size_in_bytes, storage_of
from qhw_plugins.onnx_model import HIGHEST_OPSET, LOWEST_OPSET, build

_LIMIT_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB; the inferred shapes come on top of the model


class OnnxQdqOptions(AlgorithmOptions):
    """What may be set."""

    opset: int | None = Field(
        None,
        ge=LOWEST_OPSET,
        le=HIGHEST_OPSET,
        description="ONNX opset; absent: the lowest that holds the model (13; 19 for 8-bit floats; 21 for 4 or "
        "16 bits and groups; 23 for 4-bit floats).",
    )
    batch: Literal["dynamic"] | int = Field("dynamic", description='Batch size of the artefact, or "dynamic".')
    int4: bool = Field(True, description="Store 4-bit weights in the 4-bit types of opset 21; False: in 8-bit types.")


class OnnxQdq(Exporter):
    """Writes `model.onnx`.

    Every quantized tensor is a QuantizeLinear -> DequantizeLinear pair, weights are codes behind a DequantizeLinear,
    biases int32 at input scale * weight scale, also where the target does not say how they are held; beside small
    floats they stay float32. Float16 and bfloat16 become a Cast there and back. A ReLU or clip that saturation does
    anyway is left out, so that runtimes fuse the operator before it. Inputs keep their names, outputs are named as in
    the model, and the batch stays dynamic. What had to be decided stands in the file's metadata, under `qhw.decided`.
    """

    name = "onnx_qdq"
    summary = "ONNX with QuantizeLinear / DequantizeLinear and integer weights (model.onnx)."
    Options = OnnxQdqOptions
    portable = True
    executor = "onnxruntime"

    options: OnnxQdqOptions

    def check(self, result: QuantizedModel) -> tuple[str, ...]:
        """What QDQ cannot say.

        Tensors that are no float32, wide or finer-than-tensor activations, another rounding, quantizers switched off.
        """
        problems: dict[str, None] = dict.fromkeys(_other_floats(result))
        for point in result.plan.points:
            quantizer = result.quantizer(point.group)
            qparams, activation = quantizer.qparams, point.role not in ("weight", "bias")
            if not quantizer.enabled:
                problems[f"{point.group}: its quantizer is switched off; call set_enabled(True) first"] = None
            if quantizer.rounding != "half_even":
                problems[f"{point.group}: rounds {quantizer.rounding}; QuantizeLinear rounds half_even"] = None
            storage = storage_of(qparams, activation=activation)
            if point.is_dynamic:
                what = f"formats.{point.format}.scale.dynamic: this form cannot say that scales are computed live"
                problems[f"{what}; choose another --format, or save without artefact (artefact=False)"] = None
            elif qparams.elements is not None and storage is None:
                what = f"formats.{point.format} holds {qparams.elements.words}, and this form has no type for them"
                problems[f"{what}; choose another --format, or save without artefact (artefact=False)"] = None
            elif storage is None:
                limit = "16 bits" if activation else "16 bits, or 32 with zero point 0,"
                problems[f"{point.group}: {qparams.bits} bits have no ONNX type; use {limit} or fewer"] = None
            elif activation and not isinstance(qparams.granularity, PerTensor):
                problems[f"{point.group}: {qparams.granularity}; an activation needs one scale per tensor"] = None
        return tuple(problems)

    def export(self, result: QuantizedModel, folder: Path) -> tuple[Path, ...]:
        """Write model.onnx, which onnx.checker has passed.

        Raises:
            ExportError: an operator has no ONNX form, the opset asked for is too low, or the file would pass 2 GB.
        """
        model = build(result, self.options.opset, self.options.batch, self.options.int4)
        size = size_in_bytes(list(model.graph.initializer))
        if size > _LIMIT_BYTES:
            raise ExportError(
                f"exporter 'onnx_qdq': one ONNX file holds 2 GB; the model has {size / 2**30:.1f} GB of tensors. "
                "Export it in parts."
            )
        try:
            model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
            onnx.checker.check_model(model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(
                f"exporter 'onnx_qdq': onnx.checker refuses the model: {reason}. Please report it."
            ) from error
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        return (path,)


def _other_floats(result: QuantizedModel) -> Iterator[str]:
    """The first tensor of a type that the artefact cannot have."""
    for node in result.module.graph.nodes:
        if str(node.meta.get("dtype", "float32")) == "bfloat16":
            name = node.meta.get("name", node.target)
            yield f"{name}: bfloat16 has no ONNX form here; compute in float32 there, then quantize again"
            return


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Export to ONNX with QuantizeLinear and DequantizeLinear.")


@hookimpl
def qhw_register_exporters() -> list[type[Exporter]]:
    return [OnnxQdq]
