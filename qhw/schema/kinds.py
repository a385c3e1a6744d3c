# SPDX-License-Identifier: Apache-2.0
"""The operator kinds that a target may list, named as ONNX names them, plus `DepthwiseConv`."""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["OPERATOR_KINDS", "STAND_INS", "TWO_ACTIVATIONS"]

STAND_INS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "DepthwiseConv": ("Conv",),
        "GlobalAveragePool": ("ReduceMean", "AveragePool"),
        "GlobalMaxPool": ("ReduceMax", "MaxPool"),
    }
)
"""A special case runs as the general kind where the target does not list the special one."""

TWO_ACTIVATIONS = frozenset({"Add", "Attention", "Div", "MatMul", "Max", "Min", "Mul", "Sub"})
"""Kinds whose kernels list the second activation under `weight`; absent there means: as `input`."""

_KINDS = """
    Abs Add ArgMax Attention AveragePool BatchNormalization ChannelShuffle Clip Concat Conv ConvTranspose DepthToSpace
    DepthwiseConv Div Dropout Elu Embedding Exp Expand Flatten Gather Gelu Gemm GlobalAveragePool GlobalMaxPool
    GroupNormalization Gru HardSigmoid HardSwish Identity InstanceNormalization L2Normalization LayerNormalization
    LeakyRelu Log LogSoftmax Lstm MatMul Max MaxPool Min Mish Mul Neg PRelu Pad Pow ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum Relu Reshape Resize Rsqrt Sigmoid Silu Slice Softmax Softplus Sort SpaceToDepth Split Sqrt
    Squeeze Sub Tanh Tile TopK Transpose Unsqueeze
"""
OPERATOR_KINDS: tuple[str, ...] = tuple(_KINDS.split())
"""All of them; some no captured model has as one operator yet."""
