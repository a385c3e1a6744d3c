# SPDX-License-Identifier: Apache-2.0
"""Quantization points and operator placements: where tensors are quantized, and who runs what. Data only."""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["weight", "bias", "activation", "input", "edge"]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FixedEncoding(_Data):
    """Quantization parameters that the hardware prescribes."""

    scale: float
    zero_point: int


class QuantPoint(_Data):
    """A tensor that is quantized.

    Roles: `weight` and `bias` are parameters; `activation` is an operator's output, after what is fused to it;
    `input` is a model input or a host tensor as the accelerator reads it; `edge` is one operand that needs another
    format than its tensor has.
    """

    name: str
    role: Role
    operator: str = Field(description="The operator that owns the parameter, writes the tensor or reads the edge.")
    tensor: str = Field(description="Parameter name, or name of the value in the graph that is quantized.")
    consumers: tuple[str, ...] = Field((), description="Operators that read the quantized tensor; empty for weights.")
    legal: tuple[str, ...] = Field(description="Format ids that are legal here, preferred first.")
    format: str = Field(description="The format chosen.")
    group: str = Field(description="Points of one group share one scale and zero point.")
    axis: int | None = Field(None, description="Axis of the output channels (weights and biases).")
    group_size: int | None = Field(None, description="Elements of one group of weights that share a scale.")
    fixed: FixedEncoding | None = None
    is_dynamic: bool = Field(False, description="Scales are computed from live data; no range is set.")
    minimum: float | None = Field(
        None, description="Smallest real value that can occur, from the graph (0 after ReLU)."
    )
    maximum: float | None = Field(
        None, description="Largest real value that can occur, from the graph (6 after ReLU6)."
    )

    @property
    def is_given(self) -> bool:
        """Whether no step finds its scale: the hardware prescribes it, or computes it at run time."""
        return self.fixed is not None or self.is_dynamic


class OperatorPlacement(_Data):
    """Who runs an operator, with which kernel, and why."""

    name: str
    kind: str
    macs: int = Field(description="Multiply-accumulates per sample.")
    where: Literal["accelerator", "host", "folded"] = Field(description="`folded`: gone once the plan has run.")
    kernel: str | None = Field(None, description="Kernel id; absent for an operator that only moves data.")
    legal: tuple[str, ...] = Field((), description="Kernel ids that are legal here, the one chosen first.")
    members: tuple[str, ...] = Field((), description="Operators that its kernel computes, this one first.")
    fused_into: str | None = Field(
        None, description="The operator whose kernel computes this one too, or whose weights hold it."
    )
    subject: str = Field("", description="Target field or graph fact that decided.")
    reason: str = Field("", description="What it decided, in words.")

    @property
    def listed_as(self) -> str:
        """The kind as which the target lists what it runs; for what it does not run, no kind."""
        return self.subject.removeprefix("operators.").removesuffix(".kernels")


def input_point(points: Iterable[QuantPoint], operator: str) -> QuantPoint | None:
    """The point whose grid an operator's first operand is on, which it multiplies with its weights; None without."""
    readable: QuantPoint | None = None
    for point in points:
        if point.role == "edge" and point.name == f"{operator}.input.0":
            return point
        if readable is None and point.role in ("activation", "input") and operator in point.consumers:
            readable = point
    return readable
