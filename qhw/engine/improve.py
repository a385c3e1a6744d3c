# SPDX-License-Identifier: Apache-2.0
"""Improving one layer after the other, where each that is done is kept: a run that was stopped goes on behind it."""

import json
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from qhw.decisions import Json, Step
from qhw.engine.kept_layer import KeptLayer, content_digest
from qhw.engine.layerwise import Layer, LayerWalk
from qhw.engine.work import Context, Work
from qhw.errors import PlanError, QhwError
from qhw.graph import Operator

__all__ = ["Improve", "improve_layers"]

Improve = Callable[[Work, Layer, int], dict[str, Json]]
"""(working copy, layer, seed for its random numbers) -> figures for the report. It may change the layer's weight, bias
and scale in the working copy, and nothing else; its result depends on these three arguments and the options only."""


def improve_layers(
    work: Work, context: Context, step: Step, improve: Improve, *, samples: int | None = None, label: str = "layers"
) -> dict[str, dict[str, Json]]:
    """Walk through the layers of a step's sites in execution order, as `layers` does, and improve each.

    Where the run has a work folder, each finished layer is written there; layers that an earlier run of the same kind
    finished are put back instead of computed. The result is the same bit for bit.

    Args:
        work: The working copy; its reference is the float model.
        context: Data, progress and seed.
        step: Its sites are groups of weight points.
        improve: What is done with a layer; its seed is the run's plus the layer's number.
        samples: Calibration samples to use, whole micro-batches; None: all.
        label: What the progress bar says.

    Returns:
        Group -> figures, in execution order.

    Raises:
        PlanError: a site is no weight, or `improve` changed something else than its layer.
    """
    figures: dict[str, dict[str, Json]] = {}
    kept = context.kept
    with LayerWalk(work, context, step.sites, samples) as walk:
        if kept is not None:
            # Behind the walk's beginning, which reads the data once and so makes its digest known.
            kept.begin({"calibration": context.calibration.digest, "samples": samples, "state": _state(work)})
        for index, (group, operator) in enumerate(context.progress.track(walk.order, label, len(walk.order))):
            found = None if kept is None else kept.read(index, group)
            if found is None or not _put_back(work, group, operator, found):
                found = _improved(work, walk.layer(group, operator), improve, context.seed + index)
                if kept is not None:
                    kept.write(index, group, found)
            figures[group] = found.figures
            walk.settle(group, operator)
    return figures


def _improved(work: Work, layer: Layer, improve: Improve, seed: int) -> KeptLayer:
    """Improve a layer; tell what changed."""
    names = _own_tensors(layer.operator)
    before = {name: work.graph.tensor(name).detach().clone() for name in names}
    scale, others = work.qparams.get(layer.group), _others(work, layer.group, names)
    # Numbers from torch's own generator are the layer's own, too: layers that are put back draw none.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        figures = improve(work, layer, seed)
    changed = _difference(others, _others(work, layer.group, names))
    if changed is not None:
        raise PlanError(
            f"{layer.group}: improving it changed {changed}, which is not its own weight, bias or scale. "
            "Plugin author: change only the layer's own, or walk with qhw.engine.layers, which keeps nothing."
        )
    now = {name: work.graph.tensor(name).detach() for name in names}
    tensors = {name: value for name, value in now.items() if not torch.equal(value, before[name])}
    found = work.qparams.get(layer.group)
    return KeptLayer(tensors, None if found is scale else found, figures)


def _put_back(work: Work, group: str, operator: Operator, layer: KeptLayer) -> bool:
    """Do to the working copy what was done to it then; False, and nothing is changed, where the layer does not fit."""
    own = _own_tensors(operator)
    for name, value in layer.tensors.items():
        if name not in own or (value.shape, value.dtype) != _form(work.graph.tensor(name)):
            return False
    try:
        if layer.qparams is not None:
            work.set_qparams(group, layer.qparams)
    except QhwError:
        return False
    for name, value in layer.tensors.items():
        work.graph.set_tensor(name, value)
    return True


def _own_tensors(operator: Operator) -> tuple[str, ...]:
    return tuple(name for name in (operator.weight, operator.bias) if name is not None)


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _others(work: Work, group: str, names: Iterable[str]) -> dict[str, tuple[object, int]]:
    """What improving a layer must leave alone: words for it -> the object, and a count of its changes in place."""
    own = [work.graph.tensor(name) for name in names]
    found: dict[str, tuple[object, int]] = {f"operator '{o.name}'": (None, 0) for o in work.graph.operators}
    found |= {f"the scale of '{name}'": (qparams, 0) for name, qparams in work.qparams.items() if name != group}
    found |= {f"the channels of '{name}'": (normal, 0) for name, normal in work.normals.items()}
    module = work.graph.module
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if all(tensor is not other for other in own):
            found[f"'{name}'"] = (tensor, 0 if tensor.is_inference() else tensor._version)
    return found


def _difference(before: dict[str, tuple[object, int]], after: dict[str, tuple[object, int]]) -> str | None:
    def is_same(name: str) -> bool:
        if name not in before or name not in after:
            return False
        (first, count), (second, later) = before[name], after[name]
        return first is second and count == later

    return next((name for name in {**before, **after} if not is_same(name)), None)


def _state(work: Work) -> str:
    """SHA-256 of the working copy: graph, tensors, scales. Whatever earlier steps did shows here."""
    tensors: dict[str, Tensor] = {}
    headers = {}
    for group, qparams in work.qparams.items():
        parts, headers[group] = qparams.as_dict()
        tensors |= {f"{group}/{name}": value for name, value in parts.items()}
    return content_digest(tensors, json.dumps([work.graph.fingerprint(), headers], sort_keys=True))
