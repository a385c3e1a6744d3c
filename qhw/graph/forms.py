# SPDX-License-Identifier: Apache-2.0
"""What a saved graph may hold: the operators it may call, and the checked form of its JSON."""

import keyword
import operator
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from qhw.graph.kinds import ATEN_KINDS
from qhw.graph.switching import DROPOUT_FORMS

__all__ = [
    "ALLOWED_ATEN",
    "BUILTINS",
    "DTYPES",
    "FORMATS",
    "LAYOUTS",
    "MODULES",
    "GraphForm",
    "NodeForm",
    "is_allowed",
    "is_plain_path",
]

_PURE = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg)
BUILTINS: Mapping[str, Callable[..., Any]] = MappingProxyType({function.__name__: function for function in _PURE})
"""Python operators that shape arithmetic uses."""

_EXTRA_ATEN = """
_assert_scalar.default _assert_tensor_metadata.default _to_copy.default adaptive_max_pool1d.default
adaptive_max_pool2d.default add.Scalar all.default any.default arange.default arange.start arange.start_step
argmax.default argmin.default baddbmm.default batch_norm.default bitwise_and.Tensor bitwise_not.default
bitwise_or.Tensor celu.default clamp.Tensor copy.default cos.default cumsum.default div.Scalar div.Tensor_mode
einsum.default empty.memory_format eq.Scalar eq.Tensor erf.default eye.default fill.Scalar fill.Tensor flip.default
floor.default floor_divide.default full.default full_like.default ge.Scalar ge.Tensor glu.default gt.Scalar gt.Tensor
index.Tensor index_put.default le.Scalar le.Tensor lift_fresh_copy.default linalg_vector_norm.default log1p.default
log_sigmoid.default logical_and.default logical_not.default logical_or.default logsumexp.default lt.Scalar lt.Tensor
masked_fill.Scalar masked_fill.Tensor max.default max.dim min.default min.dim mul.Scalar ne.Scalar ne.Tensor
new_full.default new_ones.default new_zeros.default norm.ScalarOpt_dim one_hot.default ones.default ones_like.default
pow.Scalar pow.Tensor_Tensor reciprocal.default repeat_interleave.self_int rms_norm.default roll.default round.default
rsub.Scalar scalar_tensor.default scatter.src selu.default sign.default sin.default sort.default square.default
sub.Scalar sum.default sym_size.int to.device to.dtype to.dtype_layout topk.default tril.default triu.default
type_as.default unfold.default upsample_bicubic2d.vec upsample_nearest1d.vec upsample_nearest3d.vec where.ScalarOther
where.ScalarSelf where.self zero.default zeros.default zeros_like.default
"""

ALLOWED_ATEN = frozenset(name for name in ATEN_KINDS if name.startswith("aten.")) | {
    f"aten.{name}" for name in _EXTRA_ATEN.split()
}
"""Operators that a saved graph may call: pure functions of tensors and numbers."""

MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType({"BatchNorm": ("momentum", "eps"), "Dropout": ("p", "form")})
"""Submodules that a saved graph may hold, and their settings."""

DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
FORMATS = {str(f).removeprefix("torch."): f for f in vars(torch).values() if isinstance(f, torch.memory_format)}
LAYOUTS = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.layout)}

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*|_[A-Za-z0-9][A-Za-z0-9_-]*")


def is_allowed(target: str) -> bool:
    """Whether a saved graph may call a function of that name."""
    return target in ALLOWED_ATEN or (target.startswith("operator.") and target[len("operator.") :] in BUILTINS)


def is_plain_path(path: str) -> bool:
    """Whether a dotted name is made of letters, digits, _ and -; other characters could reach generated code."""
    return all(_PART.fullmatch(part) for part in path.split("."))


def _path(value: str) -> str:
    if not is_plain_path(value):
        raise ValueError(f"'{value[:80]}' is no plain name")
    return value


def _identifier(value: str) -> str:
    if not (value.isascii() and value.isidentifier()) or keyword.iskeyword(value) or value.startswith("__"):
        raise ValueError(f"'{value[:80]}' is no plain name")
    return value


Path = Annotated[str, Field(max_length=1000), AfterValidator(_path)]
Identifier = Annotated[str, Field(max_length=1000), AfterValidator(_identifier)]
Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModuleForm(_Form):
    """A batch norm or dropout that reads `self.training`."""

    type: Literal["BatchNorm", "Dropout"]
    momentum: float | None = None
    eps: float = 1e-5
    p: Annotated[float, Field(ge=0, le=1)] = 0.0
    form: str = "dropout"

    @model_validator(mode="after")
    def _form_is_known(self) -> "ModuleForm":
        if self.form not in DROPOUT_FORMS:
            raise ValueError(f"form must be one of {', '.join(DROPOUT_FORMS)}; got '{self.form[:80]}'")
        return self


class MetaForm(_Form):
    """What capture found out about a node's value."""

    name: Annotated[str, Field(max_length=1000)] | None = None
    shape: Annotated[tuple[Size, ...], Field(strict=False, max_length=64)] | None = None
    dtype: str | None = None

    @model_validator(mode="after")
    def _dtype_is_known(self) -> "MetaForm":
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"no dtype '{self.dtype[:80]}'")
        return self


class NodeForm(_Form):
    """One node of an fx graph."""

    op: Literal["placeholder", "get_attr", "call_function", "call_module", "output"]
    name: Identifier
    target: Annotated[str, Field(max_length=1000)]
    args: list[JsonValue]
    kwargs: dict[Identifier, JsonValue]
    meta: MetaForm

    @model_validator(mode="after")
    def _fits_its_op(self) -> "NodeForm":
        if self.op == "placeholder":
            _identifier(self.target)
        elif self.op in ("get_attr", "call_module"):
            _path(self.target)
        if self.op in ("placeholder", "get_attr") and (self.args or self.kwargs):
            raise ValueError(f"'{self.name}' takes no arguments")
        if (self.op == "output" and len(self.args) != 1) or (self.op in ("output", "call_module") and self.kwargs):
            raise ValueError(f"'{self.name}' takes one argument")
        if self.op not in ("get_attr", "output") and self.meta.name is None:
            raise ValueError(f"'{self.name}' has no meta.name")
        if self.meta.shape is not None and self.meta.dtype is None:
            raise ValueError(f"'{self.name}' has a shape and no dtype")
        return self


class GraphForm(_Form):
    """A whole graph without its tensors."""

    graph_version: Literal[1]
    batch: Annotated[int, Field(ge=1)]
    modules: dict[Path, ModuleForm]
    parameters: list[Path]
    buffers: list[Path]
    shared: list[Annotated[list[Path], Field(min_length=2)]]
    nodes: list[NodeForm]

    @model_validator(mode="after")
    def _holds_together(self) -> "GraphForm":
        ops = [node.op for node in self.nodes]
        if ops.count("output") != 1 or ops[-1] != "output":
            raise ValueError("a graph has one output, which is its last node")
        for what, names in (
            ("tensors", [*self.parameters, *self.buffers]),
            ("values", [n.meta.name for n in self.nodes if n.meta.name is not None and n.op != "get_attr"]),
            ("shared tensors", [name for group in self.shared for name in group]),
        ):
            twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
            if twice is not None:
                raise ValueError(f"two {what} are named '{twice}'")
        tensors = {*self.parameters, *self.buffers}
        if any(group[0] not in tensors or tensors & set(group[1:]) for group in self.shared):
            raise ValueError("the first name of shared tensors, and no other, is a tensor's")
        return self
