# SPDX-License-Identifier: Apache-2.0
"""The operator kinds that a target may list, named as ONNX names them, plus `DepthwiseConv`."""

from collections.abc import Container, Mapping
from types import MappingProxyType

__all__ = ["OPERATOR_KINDS", "STAND_INS", "TWO_ACTIVATIONS", "row_kinds"]

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


def row_kinds(kind: str, listed: Container[str]) -> tuple[str, ...]:
    """The kinds of a target under whose rows an operator may run, in the order in which they are tried.

    Its own where the target lists it: one that breaks its limits, or that the hardware does not have, is not taken for
    the general kind.

    Args:
        kind: Of the operator.
        listed: Kinds that the target lists.
    """
    return (kind,) if kind in listed else tuple(one for one in STAND_INS.get(kind, ()) if one in listed)
