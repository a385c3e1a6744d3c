# SPDX-License-Identifier: Apache-2.0
"""Layer after layer: a model's float form and its quantized form side by side, each run once over the data.

An algorithm that improves one layer at a time needs, at each, the input that the layers before it give once they are
quantized, and the output that the float model has there. Both models advance together, up to the layer in question;
what lies behind is not computed until the layer is done, and what no later operator reads is dropped.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx

from qhw.engine.activation_store import ActivationStore
from qhw.engine.calibration import running
from qhw.engine.matrix_form import MatrixForm
from qhw.engine.work import Context, Work
from qhw.errors import PlanError
from qhw.graph import Graph, Operator
from qhw.numerics import fake_quantize

__all__ = ["Layer", "LayerWalk", "layers"]


@dataclass(frozen=True)
class Layer:
    """One operator with weights, with what goes in and what should come out.

    Attributes:
        group: Its weight's group of points.
        operator: As the working graph has it.
        form: The operator as a matrix product.
        inputs: Micro-batches of the input, from the model with the weights before it quantized.
        outputs: Micro-batches of the float model's output, before the activation.
        clip: Bounds of the activation that its kernel computes along, (-inf, inf) for none or another function.
    """

    group: str
    operator: Operator
    form: MatrixForm
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    clip: tuple[float, float]


def layers(
    work: Work, context: Context, groups: Iterable[str], *, samples: int | None = None, label: str = "layers"
) -> Iterator[Layer]:
    """Walk through the layers of weight groups in execution order.

    Between two layers the caller may change the weight or bias of the first: the later ones see it. Weights whose
    group has qparams are quantized, whether or not they are walked through. A weight that several operators share is
    met at the first of them. An algorithm whose work on a layer takes long uses `improve_layers`, which keeps it.

    Args:
        work: The working copy; its reference is the float model.
        context: Data and progress.
        groups: Groups of weight points.
        samples: Calibration samples to use, whole micro-batches; None: all.
        label: What the progress bar says.

    Yields:
        Layer: its tensors are valid until the next one is asked for.

    Raises:
        PlanError: a group is no weight.
    """
    with LayerWalk(work, context, groups, samples) as walk:
        for group, operator in context.progress.track(walk.order, label, len(walk.order)):
            yield walk.layer(group, operator)
            walk.settle(group, operator)


class LayerWalk:
    """A walk through layers in execution order, by hand; use it in a `with` block.

    A layer that is settled without being asked for costs nothing until a later one is.

    Args:
        work: The working copy; its reference is the float model.
        context: Data and memory.
        groups: Groups of weight points.
        samples: Calibration samples to use, whole micro-batches; None: all.

    Attributes:
        order: Groups and their operators, in execution order.

    Raises:
        PlanError: a group is no weight.
    """

    def __init__(self, work: Work, context: Context, groups: Iterable[str], samples: int | None) -> None:
        wanted = {_parameter(work, group): group for group in groups}
        order = []
        for operator in work.graph.operators:
            if operator.weight in wanted:
                order.append((wanted.pop(operator.weight), operator))
        self.order = tuple(order)
        self._work = work
        batches = _micro_batches(context, samples)
        self._simulated = work.graph.copy()
        _quantize_weights(work, self._simulated, work.qparams)
        self._quantized = _Stepper(self._simulated, batches)
        self._floats = _Stepper(work.reference, batches)
        self._store = ActivationStore(context.memory_bytes)

    def __enter__(self) -> "LayerWalk":
        self._store.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.__exit__(kind, error, trace)

    def layer(self, group: str, operator: Operator) -> Layer:
        """The next layer; its tensors are valid until the one after it is asked for."""
        name = operator.inputs[0]
        self._quantized.advance_before(operator.node, self._store)
        self._floats.advance_past(operator.node, self._store)
        weight = self._work.graph.tensor(str(operator.weight))
        return Layer(
            group=group,
            operator=operator,
            form=MatrixForm(operator, tuple(weight.shape)),
            inputs=self._quantized.values(self._simulated.node(name), self._store),
            outputs=self._floats.values(self._work.reference.node(operator.name), self._store),
            clip=_clip(self._work, operator),
        )

    def settle(self, group: str, operator: Operator) -> None:
        """Let later layers see the weight and bias as they are in the working copy now."""
        _quantize_weights(self._work, self._simulated, [group])
        if operator.bias is not None:
            self._simulated.set_tensor(operator.bias, self._work.graph.tensor(operator.bias).detach())


def _parameter(work: Work, group: str) -> str:
    point = work.group(group)[0]
    if point.role != "weight":
        raise PlanError(f"{group}: must be a weight; got a point of role {point.role}. Walk through weights only.")
    return point.tensor


def _micro_batches(context: Context, samples: int | None) -> list[tuple[Tensor, ...]]:
    taken: list[tuple[Tensor, ...]] = []
    count = 0
    for batch in context.calibration:
        if samples is None or count < samples:
            taken.append(batch)
            count += len(batch[0])
        elif context.calibration.digest is not None:
            break  # the first pass goes to the end, so that the manifest knows all of the data
    return taken


def _quantize_weights(work: Work, graph: Graph, groups: Iterable[str]) -> None:
    for group in groups:
        point = work.group(group)[0]
        if point.role == "weight" and group in work.qparams:
            value = work.graph.tensor(point.tensor).detach()
            graph.set_tensor(point.tensor, fake_quantize(value, work.qparams[group]))


def _clip(work: Work, operator: Operator) -> tuple[float, float]:
    """Bounds of the fused activation, if it is a clip."""
    placement = next((p for p in work.plan.operators if p.name == operator.name), None)
    members = [work.graph.operator(name) for name in (placement.members[1:] if placement else ()) if _has(work, name)]
    clips = [m for m in members if m.kind in ("Relu", "Clip")]
    if len(members) != 1 or not clips:
        return -float("inf"), float("inf")
    low, high = clips[0].attributes.get("minimum"), clips[0].attributes.get("maximum")
    return -float("inf") if low is None else low, float("inf") if high is None else high


def _has(work: Work, name: str) -> bool:
    return any(operator.name == name for operator in work.graph.operators)


class _Stepper:
    """Runs a graph node by node over all micro-batches; holds the values that later nodes read."""

    def __init__(self, graph: Graph, batches: list[tuple[Tensor, ...]]) -> None:
        self._graph = graph
        *computed, output = [node for node in graph.module.graph.nodes if node.op != "get_attr"]
        self._nodes = computed
        self._at = {node.name: index for index, node in enumerate(computed)}
        order = enumerate([*computed, output])
        self._last_use = {source: index for index, node in order for source in node.all_input_nodes}
        self._batches = batches
        self._done = 0
        self._kept: dict[fx.Node, int] = {}

    def advance_before(self, node: str, store: ActivationStore) -> None:
        """Compute everything before a node."""
        self._advance(self._at[node], store)

    def advance_past(self, node: str, store: ActivationStore) -> None:
        """Compute everything before a node, and the node."""
        self._advance(self._at[node] + 1, store)

    def values(self, node: fx.Node, store: ActivationStore) -> tuple[Tensor, ...]:
        """The value of a node, micro-batch by micro-batch."""
        return store.get(self._kept[node])

    def _advance(self, end: int, store: ActivationStore) -> None:
        if end <= self._done:
            return
        segment = self._nodes[self._done : end]
        kept = [node for node in segment if self._last_use.get(node, -1) >= end]
        gathered: dict[fx.Node, list[Tensor]] = {node: [] for node in kept}
        known = {node: store.get(key) for node, key in self._kept.items()}
        with torch.no_grad():
            for index, batch in enumerate(self._batches):
                values: dict[fx.Node, Any] = {node: parts[index] for node, parts in known.items()}
                inputs = iter(batch)
                with running(len(batch[0])):
                    for position, node in enumerate(segment, start=self._done):
                        values[node] = next(inputs) if node.op == "placeholder" else self._run(node, values)
                        for source in node.all_input_nodes:
                            if self._last_use[source] == position:
                                values.pop(source, None)  # a parameter is not among them
                for node in kept:
                    gathered[node].append(values[node])
        self._done = end
        for node in [n for n in self._kept if self._last_use[n] < end]:
            store.drop(self._kept.pop(node))
        self._kept |= {node: store.put(parts) for node, parts in gathered.items()}

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        def value(source: fx.Node) -> Any:
            # Parameters are read when they are used: an earlier layer's may have changed meanwhile.
            return self._graph.tensor(str(source.target)) if source.op == "get_attr" else values[source]

        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        if node.op == "call_module":
            return self._graph.module.get_submodule(str(node.target))(*args, **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
