# SPDX-License-Identifier: Apache-2.0
"""What this machine computes as a target does."""

from qhw_plugins.onnxruntime_executor import OnnxRuntime

__all__ = ["has_vnni", "onnxruntime_here"]


def has_vnni() -> bool:
    """Whether onnxruntime multiplies bytes by VNNI here, as onnxruntime/cpu-x86-vnni says."""
    return bool({"avx512_vnni", "avx_vnni"} & set(OnnxRuntime().versions()["cpu"].split()))


def onnxruntime_here() -> str:
    """The target that onnxruntime on this machine is: without VNNI pairs of products saturate."""
    return "onnxruntime/cpu-x86-vnni" if has_vnni() else "onnxruntime/cpu-x86-avx2"
