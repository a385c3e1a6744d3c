# SPDX-License-Identifier: Apache-2.0
"""Whether a graph read from a file computes the shapes it states. Nothing is computed: only shapes are followed."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qhw.errors import CaptureError
from qhw.graph.forms import DTYPES
from qhw.graph.graph import Graph

__all__ = ["not_finite", "verify_finite", "verify_shapes"]


def verify_shapes(graph: Graph, where: str) -> None:
    """Follow the example shapes through a graph, so that arguments no operator takes are found before it runs.

    A graph with an input that is no tensor is not followed.

    Raises:
        CaptureError: an operator refuses its arguments, or a stated shape or dtype is not what it gives.
    """
    inputs = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
    if any("shape" not in node.meta for node in inputs):
        return
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        examples = [torch.empty(node.meta["shape"], dtype=DTYPES[node.meta["dtype"]]) for node in inputs]
        _Follower(graph.module, where).run(*examples)


def verify_finite(graph: Graph, where: str) -> None:
    """Refuse NaN and infinite values in what is trained or measured. Other buffers may be masks of inf.

    Raises:
        CaptureError: a parameter or a batch-norm statistic holds one; names it.
    """
    name = not_finite(graph)
    if name is not None:
        raise CaptureError(f"{where}: '{name}' holds NaN or infinite values. Quantize again, or restore the file.")


def not_finite(graph: Graph) -> str | None:
    """The first parameter or batch-norm statistic that holds NaN or infinite values."""
    norms = [operator for operator in graph.operators if operator.kind == "BatchNormalization"]
    statistics = [f"{n.attributes['module']}.{field}" for n in norms for field in ("running_mean", "running_var")]
    for name, tensor in graph.module.state_dict(keep_vars=True).items():
        is_checked = isinstance(tensor, nn.Parameter) or name in statistics
        if is_checked and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return str(name)
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs a traceback of its own before it raises; our message says what the user needs."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Follower(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, where: str) -> None:
        super().__init__(module)
        self._where = where
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
            raise CaptureError(
                f"{self._where}: {n.name} cannot compute on its arguments: {reason}. "
                "Quantize again, or restore the file."
            ) from error
        first = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(first, Tensor) and n.op != "output":
            got = (tuple(first.shape), str(first.dtype).removeprefix("torch."))
            stated = (tuple(n.meta.get("shape", ())), n.meta.get("dtype"))
            if got != stated:
                raise CaptureError(
                    f"{self._where}: {n.name} is stated as {stated[1]} {list(stated[0])} and gives {got[1]} "
                    f"{list(got[0])}. Quantize again, or restore the file."
                )
        return value
