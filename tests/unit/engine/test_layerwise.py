# SPDX-License-Identifier: Apache-2.0
"""Walking through layers: what goes in and what should come out, against whole forward passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qhw.decisions import Resources
from qhw.engine import Calibration, Context, SilentProgress, Work, layers, select
from qhw.engine.activation_store import ActivationStore
from qhw.errors import CalibrationError, PlanError
from qhw.extension import Registry
from qhw.graph import Graph, capture
from qhw.numerics import fake_quantize, qparams_from_range, range_of
from qhw.schema import TargetSpec

GROUPS = ("conv1.weight", "conv2.weight", "fc.weight")


@pytest.fixture
def walk(graph: Graph, target: TargetSpec, registry: Registry, images: Tensor) -> Callable[..., tuple[Work, Context]]:
    def make(memory_bytes: int = 2**31) -> tuple[Work, Context]:
        plan = select(graph, target, registry, Resources(calibration=True))
        work = Work(graph.copy(), target, plan)
        work.keep_reference()
        for group in GROUPS:
            low, high = range_of(work.weight(group), work.granularity(group))
            work.set_qparams(group, qparams_from_range(low, high, work.grid(group), work.granularity(group)))
        return work, Context(Calibration(images[:70], graph), SilentProgress(), 0, memory_bytes)

    return make


def quantized_copy(work: Work, groups: tuple[str, ...]) -> Graph:
    copy = work.graph.copy()
    for group in groups:
        copy.set_tensor(group, fake_quantize(work.weight(group), work.qparams[group]))
    return copy


def value(graph: Graph, name: str, x: Tensor) -> Tensor:
    """A value of a forward pass, by running the graph node by node."""
    found: dict[Any, Any] = {}
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            found[node] = x
        elif node.op == "get_attr":
            found[node] = graph.tensor(str(node.target))
        elif node.op == "call_module":
            found[node] = graph.module.get_submodule(str(node.target))(*(found[a] for a in node.args))
        elif node.op == "call_function":
            found[node] = torch.fx.map_arg(node.args, found.__getitem__)
            found[node] = node.target(*found[node], **node.kwargs)
    return found[graph.node(name)]


def test_inputs_follow_the_quantized_model_and_outputs_the_float_one(walk: Any, graph: Graph) -> None:
    work, context = walk()
    batches = list(context.calibration)
    seen = []
    for layer in layers(work, context, GROUPS):
        seen.append(layer.group)
        before = quantized_copy(work, GROUPS)
        with torch.no_grad():
            for (x,), found, output in zip(batches, layer.inputs, layer.outputs, strict=True):
                assert torch.equal(found, value(before, layer.operator.inputs[0], x))
                assert torch.equal(output, value(graph, layer.operator.name, x))
    assert seen == list(GROUPS)


def test_a_change_of_a_layer_is_seen_by_the_next(walk: Any) -> None:
    work, context = walk()
    inputs = {}
    for layer in layers(work, context, GROUPS):
        inputs[layer.group] = layer.inputs[0].clone()
        if layer.group == "conv2.weight":
            work.graph.set_tensor("conv2.weight", torch.zeros_like(work.graph.tensor("conv2.weight")))
            work.graph.set_tensor("conv2.bias", torch.full((4,), 2.0))
    # Zero weights leave the bias, 2 everywhere: sin(relu(2)) reaches the linear layer.
    assert torch.equal(inputs["fc.weight"], torch.full_like(inputs["fc.weight"], 2.0).sin())


def test_the_clip_is_that_of_the_fused_activation(walk: Any) -> None:
    work, context = walk()
    clips = {layer.group: layer.clip for layer in layers(work, context, GROUPS)}
    assert clips["conv2.weight"] == (0.0, float("inf"))
    assert clips["fc.weight"] == (-float("inf"), float("inf"))


def test_samples_are_whole_micro_batches(walk: Any) -> None:
    work, context = walk()
    layer = next(layers(work, context, GROUPS, samples=40))
    assert [len(x) for x in layer.inputs] == [32, 32]


def test_what_exceeds_the_memory_lies_in_files_and_is_the_same(walk: Any) -> None:
    plain, spilled = ([layer.inputs[1].clone() for layer in layers(*walk(limit), GROUPS)] for limit in (2**31, 0))
    assert all(torch.equal(a, b) for a, b in zip(plain, spilled, strict=True))


def test_only_weights_are_walked_through(walk: Any) -> None:
    work, context = walk()
    with pytest.raises(PlanError, match=r"^x: must be a weight; got a point of role input\. Walk"):
        next(layers(work, context, ["x"]))


def test_the_store_spills_beyond_its_budget_and_cleans_up() -> None:
    first, second = [torch.arange(6.0)], [torch.arange(4.0).reshape(2, 2), torch.arange(3.0)]
    with ActivationStore(budget_bytes=24) as store:
        a, b = store.put(first), store.put(second)
        assert store.spilled == 1
        folder = next(iter(store._files.values())).parent
        assert torch.equal(store.get(a)[0], first[0])
        assert all(torch.equal(x, y) for x, y in zip(store.get(b), second, strict=True))
        store.drop(a)
        assert store.put(first) and store.spilled == 1
        store.drop(b)
        assert store.spilled == 0 and list(folder.iterdir()) == []
    assert not folder.exists()


def test_what_lies_in_files_keeps_its_strides() -> None:
    x = torch.randn(2, 3, 4, 5)
    layouts = {"channels-last": x.to(memory_format=torch.channels_last), "transposed": x.transpose(1, 3), "plain": x}
    for name, tensor in layouts.items():
        with ActivationStore(budget_bytes=0) as store:
            found = store.get(store.put([x, tensor, tensor]))[1]
            assert torch.equal(found, tensor) and found.stride() == tensor.stride(), name
    with ActivationStore(budget_bytes=0) as store:  # one value in many places takes a place each
        assert torch.equal(store.get(store.put([x[:1].expand(2, 3, 4, 5)]))[0], x[:1].expand(2, 3, 4, 5))


def test_a_model_of_another_batch_size_is_named(registry: Registry, target: TargetSpec, images: Tensor) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(0), torch.nn.Unflatten(0, (2, 144)))
    graph = capture(net.append(torch.nn.Linear(144, 2)).eval(), images[:2], dynamic_batch=False)
    plan = select(graph, target, registry, Resources(calibration=True))
    work = Work(graph.copy(), target, plan)
    context = Context(Calibration(images[:32], graph), SilentProgress(), 0)
    with pytest.raises(CalibrationError, match=r"^calibration: the model fails on 32 samples at once: .*dynamic_batch"):
        list(layers(work, context, ["3.weight"]))


def test_what_is_no_tensor_stays_in_memory_whatever_the_budget() -> None:
    with ActivationStore(0) as store:
        sizes, pairs = store.put([4, 8]), store.put([(torch.ones(2), torch.zeros(3))])
        tensors = store.put([torch.ones(2), torch.zeros(3)])
        assert store.get(sizes) == (4, 8)
        assert torch.equal(store.get(pairs)[0][1], torch.zeros(3))
        assert store.spilled == 1
        store.drop(pairs)
        store.drop(tensors)
        assert store.spilled == 0
