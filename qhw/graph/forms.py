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
_assert_scalar.default _assert_tensor_metadata.default _to_copy.default _upsample_bilinear2d_aa.vec
_upsample_nearest_exact2d.vec _weight_norm.default acos.default acosh.default adaptive_max_pool1d.default
adaptive_max_pool2d.default adaptive_max_pool3d.default add.Scalar addcdiv.default addcmul.default
affine_grid_generator.default all.default all.dim all.dims aminmax.default angle.default any.default any.dim any.dims
arange.default arange.start arange.start_step argmax.default argmin.default argsort.default argsort.stable asin.default
asinh.default atan.default atan2.default atanh.default baddbmm.default batch_norm.default bilinear.default
bitwise_and.Tensor bitwise_not.default bitwise_or.Tensor bitwise_xor.Tensor bucketize.Tensor cdist.default ceil.default
celu.default clamp.Tensor col2im.default complex.default conj.default conj_physical.default copy.default cos.default
cosh.default cosine_similarity.default count_nonzero.dim_IntList cross.default cummax.default cummin.default
cumprod.default cumsum.default det.default diag_embed.default diagonal.default diff.default dist.default div.Scalar
div.Tensor_mode dot.default dstack.default einsum.default empty.memory_format eq.Scalar eq.Tensor erf.default
erfc.default exp2.default expm1.default eye.default fft_fft.default fft_fft2.default fft_fftn.default
fft_fftshift.default fft_ifft.default fft_ifft2.default fft_ifftn.default fft_ifftshift.default fft_irfft.default
fft_irfft2.default fft_irfftn.default fft_rfft.default fft_rfft2.default fft_rfftn.default fill.Scalar fill.Tensor
flip.default floor.default floor_divide.default fmax.default fmin.default fmod.Scalar fmod.Tensor frac.default
full.default full_like.default ge.Scalar ge.Tensor glu.default grid_sampler.default grid_sampler_2d.default
grid_sampler_3d.default gru.input gru_cell.default gt.Scalar gt.Tensor hamming_window.default hann_window.default
hardshrink.default hsplit.int hstack.default hypot.default im2col.default imag.default index.Tensor index_add.default
index_copy.default index_fill.int_Scalar index_put.default inverse.default isclose.default isfinite.default
isinf.default isnan.default istft.default kron.default kthvalue.default le.Scalar le.Tensor lerp.Scalar lerp.Tensor
lift_fresh_copy.default linalg_cross.default linalg_det.default linalg_inv.default linalg_matrix_norm.default
linalg_norm.default linalg_solve.default linalg_vector_norm.default linspace.default log10.default log1p.default
log2.default log_sigmoid.default logaddexp.default logaddexp2.default logical_and.default logical_not.default
logical_or.default logical_xor.default logit.default logsumexp.default lstm.input lstm_cell.default lt.Scalar lt.Tensor
mH.default masked_fill.Scalar masked_fill.Tensor masked_scatter.default matrix_exp.default max.default max.dim
max_pool2d_with_indices.default max_unpool2d.default median.default median.dim meshgrid.default meshgrid.indexing
min.default min.dim mode.default mul.Scalar mv.default nan_to_num.default nansum.default native_group_norm.default
ne.Scalar ne.Tensor new_full.default new_ones.default new_zeros.default norm.Scalar norm.ScalarOpt_dim one_hot.default
ones.default ones_like.default outer.default pairwise_distance.default polar.default pow.Scalar pow.Tensor_Tensor
prod.default prod.dim_int real.default reciprocal.default remainder.Scalar remainder.Tensor repeat_interleave.self_int
rms_norm.default rnn_relu.input rnn_relu_cell.default rnn_tanh.input rnn_tanh_cell.default roll.default rot90.default
round.default row_stack.default rrelu.default rsub.Scalar scalar_tensor.default scatter.src scatter.value
scatter_add.default scatter_reduce.two searchsorted.Tensor selu.default sgn.default sign.default sin.default
sinc.default sinh.default softshrink.default sort.default square.default std.correction std.default std.dim std_mean.dim
stft.center stft.default sub.Scalar sum.default sym_size.int take.default take_along_dim.default tan.default
tensor_split.indices tensor_split.sections tensordot.default threshold.default to.device to.dtype to.dtype_layout
topk.default trace.default tril.default triu.default trunc.default type_as.default unfold.default upsample_bicubic2d.vec
upsample_nearest1d.vec upsample_nearest3d.vec var.correction var.default var.dim var_mean.correction var_mean.dim
vdot.default view_as_complex.default view_as_real.default vsplit.int vstack.default where.ScalarOther where.ScalarSelf
where.self xlogy.Tensor zero.default zeros.default zeros_like.default
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
