# SPDX-License-Identifier: Apache-2.0
"""Capturing an nn.Module once, by torch.export, into a plain graph of ATen operators."""

import copy
import dataclasses
import inspect
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qhw.errors import CaptureError
from qhw.graph.attributes import shape_of, target_name
from qhw.graph.forms import is_plain_path
from qhw.graph.graph import Graph
from qhw.graph.inputs import ExampleInputs, as_call, batch_of, double_batch, dynamic_shapes, fresh
from qhw.graph.rebuild import rebuild

__all__ = ["capture"]

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_FAILS, _PASS = "fails on example_inputs", "Pass inputs of the shape and type that the model takes."
_FREE = "Keep axis 0 free of fixed sizes in forward, as in x.flatten(1) or x.reshape(x.shape[0], -1)."
_TOLERANCE = 1e-4  # relative to the largest output; the same kernels run, only batch norm may be called another way


def capture(model: nn.Module, example_inputs: ExampleInputs, *, dynamic_batch: bool = True) -> Graph:
    """Capture a model as a graph; the model itself is left as it was.

    The graph owns copies of the model's tensors under their own names. Batch norm and dropout read `self.training`,
    in-place operators are rewritten, parameters that the model shares stay shared. The captured graph is run once
    against the model.

    Args:
        model: Any module that torch.export accepts.
        example_inputs: One batch: a tensor, a tuple, or a dict by input name. A batch of 1 is repeated to 2.
        dynamic_batch: Let axis 0 vary. False freezes the example's batch size.

    Raises:
        CaptureError: the model cannot be exported (names the line at fault and the way out), or computes something
            else once captured.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model: must be a torch.nn.Module; got {type(model).__name__}. Pass an instance of one.")
    name = type(model).__name__
    _check_names(model, name)
    _check_shapes_known(model, name)
    args, kwargs = as_call(example_inputs)
    kwargs = _in_signature_order(model, kwargs)
    batch, given = batch_of((args, kwargs)), (args, kwargs)
    if dynamic_batch and batch == 1:
        args, kwargs, batch = double_batch(args), double_batch(kwargs), 2
    owned = _own_copy(model, name)
    try:
        expected = _run(owned, name, args, kwargs)
    except CaptureError as error:
        _run(owned, name, *given)  # the model's own mistake, in the shapes that were given
        said = str(error).replace(_FAILS, "takes one sample, but not two at once", 1)
        raise CaptureError(said.replace(_PASS, _FREE)) from error
    if not _tensors(_as_plain(expected)):
        raise CaptureError(f"{name}: returns no tensor, so there is nothing to quantize. Return what it computes.")
    exported = _export(owned, name, args, kwargs, batch if dynamic_batch else None)
    try:
        module = rebuild(exported, owned)
    except CaptureError as error:
        raise CaptureError(f"{name}: {error}") from error
    with torch.no_grad():
        observed = _ShapeRecorder(module.eval()).run(*torch.utils._pytree.tree_leaves((args, kwargs)))
    _compare(name, expected, observed, exported)
    return Graph(module, 1 if _is_unbatched(module) else batch)


def _check_names(model: nn.Module, name: str) -> None:
    """fx writes Python code from names; those of a saved graph are held to the same rule when it is loaded."""
    for path in (*dict(model.named_modules()), *model.state_dict(keep_vars=True)):
        if path and not is_plain_path(path):
            raise CaptureError(
                f"{name}: {path!r} cannot be captured: names of modules and tensors hold letters, digits, _ and - "
                "only. Rename it."
            )


def _check_shapes_known(model: nn.Module, name: str) -> None:
    """A lazy layer draws its weights at the first batch; drawn in our copy, they would not be the model's."""
    for path, tensor in model.state_dict(keep_vars=True).items():
        if nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"{name}: {path} has no shape yet, as its layer is lazy. Run the model on one batch before."
            )


def _own_copy(model: nn.Module, name: str) -> nn.Module:
    # Tensors that a hook computes at each call (nn.utils.weight_norm) cannot be copied with what they are made of.
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    try:
        return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed}).eval()
    except Exception as error:
        raise CaptureError(
            f"{name}: cannot be copied: {_first_line(error)}. Capture works on a copy; keep in the model only what "
            "copy.deepcopy can copy."
        ) from error


def _is_unbatched(module: nn.Module) -> bool:
    """Whether a convolution reads a sample without batch axis: then axis 0 is none, and the example is one sample."""
    for node in module.graph.nodes:  # type: ignore[union-attr]
        if target_name(node).startswith(("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.conv_transpose")):
            return len(shape_of(node.args[0])) == len(shape_of(node.args[1])) - 1
    return False


def _in_signature_order(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    unknown = [name for name in kwargs if name not in known]
    if unknown and not takes_any:
        raise CaptureError(
            f"example_inputs: no input '{unknown[0]}'. Inputs of the model: {', '.join(known)}. A dict gives inputs by "
            "name; one that forward takes as a whole is not supported: let it take each tensor as an input of its own."
        )
    ordered = {name: kwargs[name] for name in known if name in kwargs}
    return {**ordered, **kwargs}


def _run(model: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        with torch.no_grad():
            return model(*fresh(args), **fresh(kwargs))
    except Exception as error:
        raise CaptureError(f"{name}: {_FAILS}: {_first_line(error)}{_place(error)}. {_PASS}") from error


def _export(model: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int | None) -> Any:
    shapes: Any = None
    if batch is not None:
        shapes = dynamic_shapes(dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments), batch)
    try:
        with _quiet():
            return torch.export.export(model, fresh(args), fresh(kwargs), dynamic_shapes=shapes)
    except Exception as error:
        raise CaptureError(
            f"{name}: torch.export cannot capture it: {_first_line(error)}{_place(error)}. {_way_out(error)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """torch prints whole graphs when an export fails; our message says what the user needs."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    printed = io.StringIO()
    try:
        with redirect_stderr(printed), warnings.catch_warnings():
            # Of recurrent layers, whose list of weights export sets and puts back.
            warnings.filterwarnings("ignore", message=r"The tensor attributes? .* assigned during export", append=False)
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip().rstrip(".")


def _place(error: BaseException) -> str:
    """The innermost line outside torch and qhw, which is the user's."""
    ours = str(Path(__file__).parents[1])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_TORCH_FOLDER, ours, "<"))
    ]
    return f" (at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _way_out(error: BaseException) -> str:
    text = f"{type(error).__name__} {error}"
    if "register a pytree" in text:
        return "Return tensors in a tuple or a dict."
    if "data-dependent" in text or "DataDependent" in text:
        return "Replace the Python decision on tensor values by torch.where, or decide outside forward."
    if "Constraint" in text or "specialized" in text or "dynamic" in text.lower():
        return "Keep axis 0 free of fixed sizes in forward, or pass dynamic_batch=False to fix the batch size."
    return "Change that line to operators that torch.export knows, or capture the part of the model without it."


class _ShapeRecorder(fx.Interpreter):
    """Runs the graph once and notes the shape and dtype of every value."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        first = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(first, Tensor) and n.op != "output":
            n.meta["shape"] = tuple(first.shape)
            n.meta["dtype"] = str(first.dtype).removeprefix("torch.")
        return value


def _compare(name: str, expected: Any, observed: Any, exported: Any) -> None:
    wanted, got = _tensors(_as_plain(expected)), _tensors(observed)
    same = len(wanted) == len(got)
    for index, (a, b) in enumerate(zip(wanted, got, strict=False)):
        finite = _wide(a)[_wide(a).isfinite()].abs()
        bound = _TOLERANCE * (float(finite.max()) if finite.numel() else 0.0) + 1e-6
        close = a.shape == b.shape and torch.allclose(_wide(a), _wide(b), rtol=0, atol=bound, equal_nan=True)
        if not (same and close):
            raise CaptureError(
                f"{name}: output {index} of the captured graph differs from the model's. {_cause(exported)}"
            )


def _cause(exported: Any) -> str:
    """Why a captured graph may compute something else than its model."""
    for node in exported.graph.nodes:
        if target_name(node) == "aten.batch_norm.default" and node.args[3] is not None and node.args[5]:
            return f"'{node.name}' is a batch norm that trains in eval mode, too. Give it training=self.training."
    return "Is something random, or does forward keep state? Remove that in eval mode."


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_complex() else tensor.double()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _as_plain(value: Any) -> Any:
    """Tensors of containers that pytree does not know, in the order that export keeps."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return {key: _as_plain(item) for key, item in value.items()}
    return [_as_plain(item) for item in value] if isinstance(value, tuple | list) else value
