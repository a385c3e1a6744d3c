# SPDX-License-Identifier: Apache-2.0
"""The published table from ATen operators to operator kinds, named as ONNX names them, plus DepthwiseConv.

Where the kind depends on the arguments (a grouped convolution, a mean over the image), the entry names the general
kind, and `qhw.graph.operator` narrows it down.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qhw.schema.kinds import OPERATOR_KINDS, STAND_INS

__all__ = ["ATEN_KINDS", "FALLBACK_KINDS", "KNOWN_KINDS", "MODULE_KINDS", "MOVEMENT_KINDS", "VIEW_KINDS", "KindRule"]


@dataclass(frozen=True)
class KindRule:
    """How one ATen operator is read: its kind, and which positional arguments are what."""

    kind: str
    inputs: tuple[int, ...] = (0,)
    weight: int | None = None
    bias: int | None = None
    sequence: bool = False  # argument 0 is a list of tensors


_CONV = KindRule("Conv", weight=1, bias=2)
_TWO = (0, 1)

ATEN_KINDS: Mapping[str, KindRule] = MappingProxyType(
    {
        "aten.conv1d.default": _CONV,
        "aten.conv2d.default": _CONV,
        "aten.conv3d.default": _CONV,
        "aten.conv1d.padding": _CONV,
        "aten.conv2d.padding": _CONV,
        "aten.conv3d.padding": _CONV,
        "aten.conv_transpose1d.default": KindRule("ConvTranspose", weight=1, bias=2),
        "aten.conv_transpose2d.input": KindRule("ConvTranspose", weight=1, bias=2),
        "aten.conv_transpose3d.input": KindRule("ConvTranspose", weight=1, bias=2),
        "aten.linear.default": KindRule("Gemm", weight=1, bias=2),
        "aten.addmm.default": KindRule("Gemm", inputs=(1,), weight=2, bias=0),
        "aten.matmul.default": KindRule("MatMul", inputs=_TWO),
        "aten.mm.default": KindRule("MatMul", inputs=_TWO),
        "aten.bmm.default": KindRule("MatMul", inputs=_TWO),
        "aten.scaled_dot_product_attention.default": KindRule("Attention", inputs=(0, 1, 2)),
        "aten.add.Tensor": KindRule("Add", inputs=_TWO),
        "aten.sub.Tensor": KindRule("Sub", inputs=_TWO),
        "aten.mul.Tensor": KindRule("Mul", inputs=_TWO),
        "aten.div.Tensor": KindRule("Div", inputs=_TWO),
        "aten.maximum.default": KindRule("Max", inputs=_TWO),
        "aten.minimum.default": KindRule("Min", inputs=_TWO),
        "aten.pow.Tensor_Scalar": KindRule("Pow"),
        "aten.sqrt.default": KindRule("Sqrt"),
        "aten.rsqrt.default": KindRule("Rsqrt"),
        "aten.exp.default": KindRule("Exp"),
        "aten.log.default": KindRule("Log"),
        "aten.neg.default": KindRule("Neg"),
        "aten.abs.default": KindRule("Abs"),
        "aten.cat.default": KindRule("Concat", sequence=True),
        "aten.stack.default": KindRule("Concat", sequence=True),
        "aten.max_pool1d.default": KindRule("MaxPool"),
        "aten.max_pool2d.default": KindRule("MaxPool"),
        "aten.max_pool3d.default": KindRule("MaxPool"),
        "aten.avg_pool1d.default": KindRule("AveragePool"),
        "aten.avg_pool2d.default": KindRule("AveragePool"),
        "aten.avg_pool3d.default": KindRule("AveragePool"),
        "aten.adaptive_avg_pool1d.default": KindRule("AveragePool"),
        "aten.adaptive_avg_pool2d.default": KindRule("AveragePool"),
        "aten.adaptive_avg_pool3d.default": KindRule("AveragePool"),
        "aten.mean.dim": KindRule("ReduceMean"),
        "aten.mean.default": KindRule("ReduceMean"),
        "aten.sum.dim_IntList": KindRule("ReduceSum"),
        "aten.amax.default": KindRule("ReduceMax"),
        "aten.amin.default": KindRule("ReduceMin"),
        "aten.relu.default": KindRule("Relu"),
        "aten.relu6.default": KindRule("Clip"),
        "aten.hardtanh.default": KindRule("Clip"),
        "aten.clamp.default": KindRule("Clip"),
        "aten.clamp_min.default": KindRule("Clip"),
        "aten.clamp_max.default": KindRule("Clip"),
        "aten.leaky_relu.default": KindRule("LeakyRelu"),
        "aten.prelu.default": KindRule("PRelu", weight=1),
        "aten.elu.default": KindRule("Elu"),
        "aten.sigmoid.default": KindRule("Sigmoid"),
        "aten.tanh.default": KindRule("Tanh"),
        "aten.hardsigmoid.default": KindRule("HardSigmoid"),
        "aten.hardswish.default": KindRule("HardSwish"),
        "aten.silu.default": KindRule("Silu"),
        "aten.mish.default": KindRule("Mish"),
        "aten.softplus.default": KindRule("Softplus"),
        "aten.gelu.default": KindRule("Gelu"),
        "aten.softmax.int": KindRule("Softmax"),
        "aten.log_softmax.int": KindRule("LogSoftmax"),
        "aten.layer_norm.default": KindRule("LayerNormalization", weight=2, bias=3),
        "aten.group_norm.default": KindRule("GroupNormalization", weight=2, bias=3),
        "aten.instance_norm.default": KindRule("InstanceNormalization", weight=1, bias=2),
        "aten.embedding.default": KindRule("Embedding", inputs=(1,), weight=0),
        "aten.index_select.default": KindRule("Gather"),
        "aten.gather.default": KindRule("Gather"),
        "aten.select.int": KindRule("Gather"),
        "aten.slice.Tensor": KindRule("Slice"),
        "aten.narrow.default": KindRule("Slice"),
        "aten.pad.default": KindRule("Pad"),
        "aten.constant_pad_nd.default": KindRule("Pad"),
        "aten.permute.default": KindRule("Transpose"),
        "aten.transpose.int": KindRule("Transpose"),
        "aten.t.default": KindRule("Transpose"),
        "aten.numpy_T.default": KindRule("Transpose"),
        "aten.swapaxes.default": KindRule("Transpose"),
        "aten.movedim.int": KindRule("Transpose"),
        "aten.pixel_shuffle.default": KindRule("DepthToSpace"),
        "aten.pixel_unshuffle.default": KindRule("SpaceToDepth"),
        "aten.channel_shuffle.default": KindRule("ChannelShuffle"),
        "aten.upsample_nearest2d.vec": KindRule("Resize"),
        "aten.upsample_bilinear2d.vec": KindRule("Resize"),
        "aten.chunk.default": KindRule("Split"),
        "aten.split.Tensor": KindRule("Split"),
        "aten.split_with_sizes.default": KindRule("Split"),
        "aten.split.sizes": KindRule("Split"),
        "aten.unbind.int": KindRule("Split"),
        "aten.expand.default": KindRule("Expand"),
        "aten.expand_as.default": KindRule("Expand"),
        "aten.repeat.default": KindRule("Tile"),
        "aten.tile.default": KindRule("Tile"),
        "aten.view.default": KindRule("Reshape"),
        "aten.reshape.default": KindRule("Reshape"),
        "aten.view_as.default": KindRule("Reshape"),
        "aten.flatten.using_ints": KindRule("Flatten"),
        "aten.unflatten.int": KindRule("Reshape"),
        "aten.squeeze.dim": KindRule("Squeeze"),
        "aten.squeeze.dims": KindRule("Squeeze"),
        "aten.squeeze.default": KindRule("Squeeze"),
        "aten.unsqueeze.default": KindRule("Unsqueeze"),
        "aten.contiguous.default": KindRule("Identity"),
        "aten.clone.default": KindRule("Identity"),
        "aten.alias.default": KindRule("Identity"),
        "aten.detach.default": KindRule("Identity"),
        "operator.getitem": KindRule("Identity"),
    }
)
"""ATen operator -> how it is read. An operator that is missing here stays in float and is named as `Unknown`."""

MODULE_KINDS: Mapping[str, str] = MappingProxyType({"BatchNorm": "BatchNormalization", "Dropout": "Dropout"})
"""Submodules that capture re-emits because they read `self.training`."""

VIEW_KINDS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Split", "Dropout"})
"""Kinds whose output is the input seen otherwise: both are one quantized tensor, on any target."""

MOVEMENT_KINDS = frozenset(
    {"Transpose", "Slice", "Gather", "Pad", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "ChannelShuffle"}
)
"""Kinds that move values without changing them; a target must list them to run them."""

FALLBACK_KINDS = STAND_INS
"""A special case runs as the general kind where the target does not list the special one."""

KNOWN_KINDS = OPERATOR_KINDS
"""All kinds that a target may list."""
