# SPDX-License-Identifier: Apache-2.0
"""Equalization keeps the function and evens out ranges: against numpy by hand, on tiny models and on real ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qhw
from qhw.decisions import QuantPlan, Resources, StepReport, Survey
from qhw.engine import Calibration, Context, SilentProgress, Work
from qhw.errors import PlanError
from qhw.extension import Registry
from qhw.graph import Graph, Operator, place
from qhw.schema import TargetSpec, parse_target
from qhw.testing import MODELS, calibration_for, example
from qhw_plugins import batch_norm_folding, cross_layer_equalization, min_max, nearest
from qhw_plugins.cross_layer_equalization import CrossLayerEqualization, equalize
from qhw_plugins.equalization_pairs import Pair, PairFinder
from tests.equalizing import registry_of

TARGET = """
schema_version = 1
name = "acme/plain"
formats.a = { bits = 8, signed = false, per = "tensor" }
formats.w = { codes = [-127, 127], zero_point = 0, per = "tensor" }
kernels.mac = { input = ["a"], weight = ["w"], output = ["a"] }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
operators.DepthwiseConv = { kernels = ["mac"], fused = ["Relu"] }
operators.ConvTranspose = { kernels = ["mac"], fused = ["Relu"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }
fallback = "host"
"""


PLUGINS = (batch_norm_folding, cross_layer_equalization, min_max, nearest)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return registry_of(*PLUGINS, equalizing=("cross_layer_equalization",))


@pytest.fixture(scope="module")
def target() -> TargetSpec:
    return parse_target(TARGET)


@dataclass
class Done:
    """A model after the stages that preserve its function."""

    plan: QuantPlan
    work: Work
    reports: dict[str, StepReport]

    def weight(self, layer: str) -> np.ndarray:
        return self.work.graph.tensor(f"{layer}.weight").detach().double().numpy()

    def bias(self, layer: str) -> np.ndarray:
        return self.work.graph.tensor(f"{layer}.bias").detach().double().numpy()


Prepare = Callable[..., Done]


@pytest.fixture(scope="module")
def prepare(registry: Registry, target: TargetSpec) -> Prepare:
    """Plan, and apply the steps up to equalization."""

    def make(model: nn.Module, inputs: Any, spec: TargetSpec = target, edit: Any = None, **wishes: Any) -> Done:
        graph = qhw.capture(model, inputs)
        data = list(calibration_for(inputs))
        plan = qhw.plan(graph, spec, calibration=data, registry=registry, **wishes)
        plan = edit(plan) if edit else plan
        work = Work(graph.copy(), spec, plan)
        context = Context(Calibration(data, graph), SilentProgress(), 0)
        reports = {}
        for step in plan.steps:
            if step.stage in ("prepare", "equalize"):
                algorithm = registry.algorithm(step.algorithm)
                options = algorithm.Options.model_validate(step.options)
                reports[step.algorithm] = algorithm(options).apply(work, step, context)
        return Done(plan, work, reports)

    return make


def survey(graph: Graph, target: TargetSpec, absorbed: tuple[str, ...] = ()) -> Survey:
    points = place(graph, target, absorbed=absorbed)
    return CrossLayerEqualization().survey(graph, points, target, Resources())


def sites(plan: QuantPlan) -> tuple[str, ...]:
    return next((step.sites for step in plan.steps if step.stage == "equalize"), ())


def seeded(make: Callable[[], nn.Module], seed: int = 0, spread: float = 1.5) -> nn.Module:
    """A model whose channels differ in range by powers of e, batch norms with random statistics."""
    torch.manual_seed(seed)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.1
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        elif isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1:
            with torch.no_grad():
                shape = (-1, *(1,) * (module.weight.dim() - 1))
                module.weight *= torch.exp(spread * torch.randn(module.weight.shape[0])).reshape(shape)
    return model.eval()


def assert_same(done: Done, model: nn.Module, inputs: Any) -> None:
    """Float tolerance: rescaled weights round once more each, at 2^-24 of themselves."""
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(**inputs) if isinstance(inputs, dict) else model(inputs))
        found = torch.utils._pytree.tree_leaves(
            done.work.graph(*[inputs[name] for name in done.work.graph.inputs])
            if isinstance(inputs, dict)
            else done.work.graph(inputs)
        )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


TAKEN = {
    "conv_chain": ("conv1", "conv2"),
    "depthwise_separable": ("stem",),
    "convolutions": ("dilated",),
    "signal": ("conv",),
}


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_keep_their_function(prepare: Prepare, name: str) -> None:
    model, inputs = example(name)
    done = prepare(model, inputs)
    assert sites(done.plan) == TAKEN.get(name, ())
    assert_same(done, model, inputs)


# Ranges, against numpy


def out_first(weight: np.ndarray, kind: str) -> np.ndarray:
    return weight.swapaxes(0, 1) if kind == "transposed" else weight


def output_ranges(weight: np.ndarray, kind: str) -> np.ndarray:
    weight = out_first(weight, kind)
    return np.array([abs(weight[channel]).max() for channel in range(weight.shape[0])])


def input_ranges(weight: np.ndarray, kind: str) -> np.ndarray:
    if kind == "depthwise":
        return output_ranges(weight, kind)
    weight = out_first(weight, kind)
    return np.array([abs(weight[:, channel]).max() for channel in range(weight.shape[1])])


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "conv": lambda i, o: nn.Conv2d(i, o, 3, padding=1),
    "pointwise": lambda i, o: nn.Conv2d(i, o, 1),
    "depthwise": lambda i, o: nn.Conv2d(i, i, 3, padding=1, groups=i),
    "transposed": lambda i, o: nn.ConvTranspose2d(i, o, 2, stride=2),
}


@pytest.mark.parametrize(
    ("first", "second"),
    [(a, b) for a in ("conv", "transposed", "depthwise") for b in LAYERS if (a, b) != ("depthwise", "depthwise")],
)
def test_a_pair_follows_equations_21_and_22(prepare: Prepare, first: str, second: str) -> None:
    make: Any = seeded(
        lambda: nn.Sequential(LAYERS[first](4, 6), nn.ReLU(), LAYERS[second](4 if first == "depthwise" else 6, 5))
    )
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in (make[0].weight, make[0].bias, make[2].weight, make[2].bias))
    r1, r2 = output_ranges(w1, first), input_ranges(w2, second)
    scale = np.sqrt(r1 / r2)
    x = torch.randn(2, 4, 6, 6)
    done = prepare(make, x)
    assert_same(done, make, x)
    assert np.allclose(done.bias("0"), b1 / scale, rtol=1e-6)
    assert np.array_equal(done.bias("2"), b2)
    along = (-1, 1, 1, 1) if first != "transposed" else (1, -1, 1, 1)
    assert np.allclose(done.weight("0"), w1 / scale.reshape(along), rtol=1e-6)
    along = (-1, 1, 1, 1) if second in ("depthwise", "transposed") else (1, -1, 1, 1)
    assert np.allclose(done.weight("2"), w2 * scale.reshape(along), rtol=1e-6)
    assert np.allclose(output_ranges(done.weight("0"), first), np.sqrt(r1 * r2), rtol=1e-6)
    assert np.allclose(input_ranges(done.weight("2"), second), np.sqrt(r1 * r2), rtol=1e-6)
    after = np.sqrt(r1 * r2)
    assert done.reports["cross_layer_equalization"].sites["0"] == pytest.approx(
        {
            "channels": len(r1),
            "ratio_before": r1.max() / r1.min(),
            "ratio_after": after.max() / after.min(),
            "sweeps": 2,  # the second finds nothing to do
        }
    )


def test_linear_layers_in_either_orientation(prepare: Prepare) -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)
            self.matrix = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.fc(x)) @ self.matrix

    model: Any = seeded(Products)
    r1 = abs(model.fc.weight.detach().double().numpy()).max(1)
    r2 = abs(model.matrix.detach().double().numpy()).max(1)  # [in, out]
    x = torch.randn(2, 3)
    done = prepare(model, x)
    assert_same(done, model, x)
    assert np.allclose(abs(done.weight("fc")).max(1), np.sqrt(r1 * r2), rtol=1e-6)
    assert np.allclose(abs(done.work.graph.tensor("matrix").detach().double().numpy()).max(1), np.sqrt(r1 * r2))


def test_a_triple_follows_the_closed_form(prepare: Prepare) -> None:
    make: Any = seeded(
        lambda: nn.Sequential(
            LAYERS["pointwise"](3, 6), nn.ReLU(), LAYERS["depthwise"](6, 6), nn.ReLU(), nn.Conv2d(6, 4, 1)
        )
    )
    w1, w2, w3 = (make[i].weight.detach().double().numpy() for i in (0, 2, 4))
    b1, b2 = (make[i].bias.detach().double().numpy() for i in (0, 2))
    r1, r2, r3 = abs(w1).max((1, 2, 3)), abs(w2).max((1, 2, 3)), abs(w3).max((0, 2, 3))
    g = np.cbrt(r1 * r2 * r3)
    s12, s23 = r1 / g, g / r3
    x = torch.randn(2, 3, 6, 6)
    done = prepare(make, x)
    assert_same(done, make, x)
    column = (-1, 1, 1, 1)
    assert np.allclose(done.weight("0"), w1 / s12.reshape(column), rtol=1e-6)
    assert np.allclose(done.bias("0"), b1 / s12, rtol=1e-6)
    assert np.allclose(done.weight("2"), w2 * (s12 / s23).reshape(column), rtol=1e-6)
    assert np.allclose(done.bias("2"), b2 / s23, rtol=1e-6)
    assert np.allclose(done.weight("4"), w3 * s23.reshape(1, -1, 1, 1), rtol=1e-6)


@pytest.mark.parametrize("ends", [True, False], ids=["conv-at-the-end", "depthwise-at-the-end"])
def test_longer_runs_of_depthwise_layers_get_one_range(prepare: Prepare, ends: bool) -> None:
    layers = [LAYERS["pointwise"](3, 6), nn.ReLU(), LAYERS["depthwise"](6, 6), nn.ReLU(), LAYERS["depthwise"](6, 6)]
    make = seeded(lambda: nn.Sequential(*layers, *([nn.ReLU(), nn.Conv2d(6, 4, 1)] if ends else [])))
    names = ["0", "2", "4", *(["6"] if ends else [])]

    def ranges(weight: Callable[[str], np.ndarray]) -> np.ndarray:
        return np.stack([abs(weight(name)).max((0, 2, 3) if name == "6" else (1, 2, 3)) for name in names])

    before = ranges(lambda name: make.get_submodule(name).weight.detach().double().numpy())  # type: ignore[union-attr]
    x = torch.randn(2, 3, 6, 6)
    done = prepare(make, x)
    assert_same(done, make, x)
    wanted = np.exp(np.log(before).mean(0))
    assert np.allclose(ranges(done.weight), wanted, rtol=1e-6)


def test_chains_are_swept_until_every_pair_is_even(prepare: Prepare) -> None:
    make = seeded(
        lambda: nn.Sequential(*[m for i in range(4) for m in (nn.Conv2d(5, 5, 3, padding=1), nn.ReLU())][:-1])
    )
    x = torch.randn(2, 5, 6, 6)

    def uneven(done: Done) -> float:
        pairs = [("0", "2"), ("2", "4"), ("4", "6")]
        r1, r2 = zip(
            *((abs(done.weight(a)).max((1, 2, 3)), abs(done.weight(b)).max((0, 2, 3))) for a, b in pairs), strict=True
        )
        return float(abs(np.log(np.stack(r1) / np.stack(r2))).max())

    done = prepare(make, x)
    figures = done.reports["cross_layer_equalization"].sites
    assert_same(done, make, x)
    assert list(figures) == ["0", "2", "4"]
    sweeps = {site["sweeps"] for site in figures.values()}
    assert len(sweeps) == 1 and 2 < next(iter(sweeps)) < 50  # type: ignore[operator]
    assert uneven(done) < 4e-3  # a sweep moves each scale by less than 1e-3, and each range has two scales
    once = prepare(make, x, options={"cross_layer_equalization": {"max_sweeps": 1}})
    assert {site["sweeps"] for site in once.reports["cross_layer_equalization"].sites.values()} == {1}
    assert uneven(once) > 0.1
    exact = prepare(make, x, options={"cross_layer_equalization": {"tolerance": 1e-9, "max_sweeps": 1000}})
    assert uneven(exact) < 1e-6


# Dead channels


def test_dead_channels_keep_their_scale(prepare: Prepare) -> None:
    make: Any = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        make[0].weight[0] = 0.0  # nothing comes out but the bias
        make[2].weight[:, 1] = 0.0  # nobody reads it
        make[0].weight[2] = 1e-42  # a denormal: its ratio would be noise
    before = [p.detach().clone() for p in make.parameters()]
    x = torch.randn(2, 3, 4, 4)
    done = prepare(make, x)
    assert_same(done, make, x)
    after = [done.work.graph.tensor(name).detach() for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    assert all(torch.isfinite(tensor).all() for tensor in after)
    for index in (0, 1, 2):
        assert torch.equal(after[0][index], before[0][index])
        assert torch.equal(after[1][index], before[1][index])
        assert torch.equal(after[2][:, index], before[2][:, index])
    assert not torch.equal(after[0][3], before[0][3])


def test_a_channel_dead_in_one_layer_of_a_triple_keeps_its_scales(prepare: Prepare) -> None:
    make: Any = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        make[1].weight[2] = 0.0
    x = torch.randn(2, 3, 4, 4)
    done = prepare(make, x)
    assert_same(done, make, x)
    assert np.array_equal(done.weight("0")[2], make[0].weight[2].detach().double().numpy())
    assert np.array_equal(done.weight("2")[:, 2], make[2].weight[:, 2].detach().double().numpy())


def test_all_channels_dead_is_no_error(prepare: Prepare) -> None:
    make: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    nn.init.zeros_(make[0].weight)
    done = prepare(make, torch.randn(2, 3, 4, 4))
    figures = {"channels": 4, "ratio_before": 1.0, "ratio_after": 1.0, "sweeps": 1}
    assert done.reports["cross_layer_equalization"].sites["0"] == figures


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinite_ratios_keep_their_scale(value: float) -> None:
    make: Any = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    graph = qhw.capture(make, torch.randn(2, 3))
    weight = graph.tensor("0.weight").detach().clone()
    weight[1, 0] = value
    graph.set_tensor("0.weight", weight)
    pair = PairFinder(graph).after(graph.operator("0"))
    assert isinstance(pair, Pair)
    scale = equalize(graph, [pair]).scales[0]
    assert scale[1] == 1.0 and torch.isfinite(scale).all() and (scale > 0).all()


# What may lie in between


class Flattened(nn.Module):
    """Three channels become nine features each; a linear layer reads blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 3, 1), nn.Linear(27, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(torch.relu(self.conv(x)).flatten(1))
        return y


class Reduced(nn.Module):
    """A mean over the rows only, and one over the columns with the axis kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 3, 1), nn.Conv1d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.conv(x).mean(2).amax(2, keepdim=True))
        return y


class Reshaped(nn.Module):
    """Rows of an image become channels of a signal: each of the three channels is three of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.signal = nn.Conv2d(2, 3, 1), nn.Conv1d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.signal(F.leaky_relu(self.conv(x)).reshape(-1, 9, 3))
        return y


class PerChannel(nn.PReLU):
    def __init__(self) -> None:
        super().__init__(3)
        with torch.no_grad():
            self.weight.copy_(torch.tensor([0.5, -0.25, 2.0]))


BETWEEN: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Identity,
    "relu": nn.ReLU,
    "prelu": PerChannel,
    "prelu-one-slope": nn.PReLU,
    "leaky-relu": lambda: nn.LeakyReLU(0.3),
    "dropout": nn.Dropout,
    "upper-bound-zero": lambda: nn.Hardtanh(-float("inf"), 0.0),
    "max-pool": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, padding=1)),
    "average-pool": lambda: nn.AvgPool2d(3, stride=1, padding=1),
    "global-average": lambda: nn.Sequential(nn.PReLU(3), nn.AdaptiveAvgPool2d(1)),
    "zero-padding": lambda: nn.ZeroPad2d((1, 0, 2, 1)),
    "batch-norm": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_homogeneous_functions_keep_channels_apart(prepare: Prepare, between: str) -> None:
    make = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 1), BETWEEN[between](), nn.Conv2d(3, 2, 1)))
    x = torch.randn(2, 2, 3, 3)
    done = prepare(make, x)
    assert sites(done.plan) == ("0",)
    assert_same(done, make, x)
    assert np.allclose(abs(done.weight("0")).max((1, 2, 3)), abs(done.weight("2")).max((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("make", [Flattened, Reduced, Reshaped], ids=["flatten", "reductions", "reshape"])
def test_channels_are_followed_through_views_and_reductions(prepare: Prepare, make: Callable[[], nn.Module]) -> None:
    model = seeded(make)
    x = torch.randn(2, 2, 3, 3)
    done = prepare(model, x)
    assert sites(done.plan) == ("conv",)
    assert_same(done, model, x)
    last = "signal" if make is Reshaped else "fc"
    blocks = abs(done.weight(last)).reshape(4, 3, -1).max((0, 2))
    assert np.allclose(abs(done.weight("conv")).max((1, 2, 3)), blocks, rtol=1e-6)


# Refusals


class Built(nn.Module):
    """Layers a, b (and c), and a forward of the test's own."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._run = forward

    def forward(self, x: Tensor) -> Any:
        return self._run(self, x)


def conv(inputs: int = 4, outputs: int = 4, **words: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, **words)


def tied() -> nn.Module:
    model: Any = Built(lambda m, x: m.c(m.b(m.a(x))), a=conv(), b=conv(), c=conv())
    model.c.weight = model.a.weight
    return model  # type: ignore[no-any-return]


def tied_bias() -> nn.Module:
    model: Any = Built(lambda m, x: m.b(m.a(x)), a=conv(), b=conv())
    model.b.bias = model.a.bias
    return model  # type: ignore[no-any-return]


def chain(between: Callable[[Tensor], Any]) -> nn.Module:
    return Built(lambda m, x: m.b(between(m.a(x))), a=conv(), b=conv())


def added(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.b(x + m.a(x))
    return y


# fmt: off
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], nn.Module]]] = {
    "relu6": (
        lambda: chain(F.relu6),
        "the bound 6.0 is not scale-equivariant: it would have to differ from channel to channel (graph.clip.maximum)",
        lambda: chain(F.relu)),
    "clip-below": (
        lambda: chain(lambda x: x.clamp(min=-1.0)),
        "the bound -1.0 is not scale-equivariant: it would have to differ from channel to channel (graph.clip.minimum)",
        lambda: chain(lambda x: x.clamp(min=0.0))),
    "sigmoid": (
        lambda: chain(torch.sigmoid),
        "Sigmoid comes before the next operator with weights (graph.sigmoid.kind)",
        lambda: chain(F.leaky_relu)),
    "unknown": (
        lambda: chain(lambda x: x.cumsum(2)),
        "Unknown comes before the next operator with weights (graph.cumsum.kind)",
        lambda: chain(lambda x: x.contiguous())),
    "add": (
        lambda: Built(added, a=conv(), b=conv()),
        "Add joins it with other values; equalization stays inside the branch (graph.add.kind)",
        lambda: chain(lambda x: x)),
    "concat": (
        lambda: Built(lambda m, x: m.b(torch.cat([m.a(x), x], 1)), a=conv(), b=conv(8)),
        "Concat joins it with other values; equalization stays inside the branch (graph.concat.kind)",
        lambda: chain(lambda x: x)),
    "two-readers": (
        lambda: Built(lambda m, x: m.b(m.a(x)) * m.a(x).sum(), a=conv(), b=conv()),
        "a.weight is shared with another operator (graph.a.weight)",
        lambda: chain(lambda x: x)),
    "branch": (
        lambda: Built(lambda m, x: (lambda y: m.b(y) + m.c(y))(m.a(x)), a=conv(), b=conv(), c=conv()),
        "2 operators read it, which need one scale (graph.a.readers)",
        lambda: Built(lambda m, x: m.b(m.a(x)) + m.c(x), a=conv(), b=conv(), c=conv())),
    "output": (
        lambda: Built(lambda m, x: (lambda y: (m.b(y), y))(torch.relu(m.a(x))), a=conv(), b=conv()),
        "the model returns it, so that its scale must stay (graph.relu.is_output)",
        lambda: chain(torch.relu)),
    "grouped": (
        lambda: Built(lambda m, x: m.b(m.a(x)), a=conv(groups=2), b=conv()),
        "2 groups: only depthwise ones can be equalized (graph.a.groups)",
        lambda: Built(lambda m, x: m.b(m.a(x)), a=conv(groups=4), b=conv())),
    "grouped-second": (
        lambda: Built(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(groups=2)),
        "2 groups: only depthwise ones can be equalized (graph.b.groups)",
        lambda: Built(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(groups=4))),
    "multiplier": (
        lambda: Built(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(4, 8, groups=4)),
        "2 outputs of a depthwise channel share its scale (graph.b.multiplier)",
        lambda: Built(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(4, 4, groups=4))),
    "weight-under-two-names": (
        tied,
        "a.weight is shared with another operator (graph.a.weight)",
        lambda: Built(lambda m, x: m.c(m.b(m.a(x))), a=conv(), b=conv(), c=conv())),
    "bias-under-two-names": (
        tied_bias,
        "a.bias is shared with another operator (graph.a.bias)",
        lambda: chain(lambda x: x)),
    "computed-weight": (
        lambda: Built(lambda m, x: F.conv2d(m.a(x), m.b.weight * x.mean(), m.b.bias), a=conv(), b=conv()),
        "the weight or bias is computed, not stored (graph.conv.weight)",
        lambda: Built(lambda m, x: F.conv2d(m.a(x), m.b.weight, m.b.bias), a=conv(), b=conv())),
    "transposed-image": (
        lambda: chain(lambda x: x.transpose(1, 2)),
        "Transpose comes before the next operator with weights (graph.transpose.kind)",
        lambda: chain(lambda x: x)),
    "mean-over-channels": (
        lambda: Built(lambda m, x: m.b(m.a(x).mean(1, keepdim=True)), a=conv(), b=conv(1)),
        "ReduceMean does not keep channels apart (graph.reducemean.kind)",
        lambda: Built(lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True)), a=conv(), b=conv())),
    "pool-over-channels": (
        lambda: Built(lambda m, x: m.b(F.max_pool1d(m.a(x), 2)), a=nn.Linear(4, 4), b=nn.Linear(2, 4)),
        "MaxPool does not keep channels apart (graph.maxpool.kind)",
        lambda: Built(lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))),
    "channels-mixed-by-reshape": (
        lambda: Built(lambda m, x: m.b(m.a(x).reshape(-1, 2, 8, 4)), a=conv(), b=conv(2)),
        "Reshape does not keep channels apart (graph.reshape.kind)",
        lambda: Built(lambda m, x: m.b(m.a(x).reshape(-1, 8, 2, 4)), a=conv(), b=conv(8))),
    "linear-along-the-image": (
        lambda: Built(lambda m, x: m.b(m.a(x)), a=conv(), b=nn.Linear(4, 4)),
        "it sums over axis 3; the channels lie along axis 1 (graph.b.axis)",
        lambda: Built(lambda m, x: m.b(m.a(x).mean((2, 3))), a=conv(), b=nn.Linear(4, 4))),
    "depthwise-on-blocks": (
        lambda: Built(lambda m, x: m.b(m.a(x).reshape(-1, 8, 2, 4)), a=conv(), b=conv(8, 8, groups=8)),
        "2 of its 8 channels would share a scale (graph.b.in_channels)",
        lambda: Built(lambda m, x: m.b(m.a(x).reshape(-1, 8, 2, 4)), a=conv(), b=conv(8, 8))),
    "split": (
        lambda: Built(lambda m, x: m.b(m.a(x).chunk(2, 1)[0]), a=conv(), b=conv(2)),
        "Split comes before the next operator with weights (graph.split.kind)",
        lambda: chain(lambda x: x)),
    "padding-with-ones": (
        lambda: chain(lambda x: F.pad(x, (1, 1), value=1.0)),
        "padding with 1.0 does not scale with its input (graph.pad.value)",
        lambda: chain(lambda x: F.pad(x, (1, 1), value=0.0))),
    "padding-of-channels": (
        lambda: Built(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, 1))), a=conv(), b=conv(6)),
        "Pad does not keep channels apart (graph.pad.kind)",
        lambda: chain(lambda x: F.pad(x, (1, 1), value=0.0))),
    "batch-norm-not-folded": (
        lambda: Built(lambda m, x: m.b(m.n(torch.relu(m.a(x)))), a=conv(), n=nn.BatchNorm2d(4).eval(), b=conv()),
        "BatchNormalization that is not folded keeps no scale (graph.n.kind)",
        lambda: Built(lambda m, x: m.b(torch.relu(m.n(m.a(x)))), a=conv(), n=nn.BatchNorm2d(4).eval(), b=conv())),
}
# fmt: on


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_fact_and_turn_with_it(prepare: Prepare, target: TargetSpec, case: str) -> None:
    make, sentence, repaired = REFUSED[case]
    shape = (2, 4, 4) if case == "pool-over-channels" else (2, 4, 4, 4)
    x = torch.randn(shape)
    graph = qhw.capture(make().eval(), x)
    found = {site.name: site.verdict for site in survey(graph, target).sites}
    assert not found["a"].taken
    assert found["a"].sentence() == sentence
    model = repaired().eval()
    done = prepare(model, x)
    assert "a" in sites(done.plan)
    assert_same(done, model, x)


def test_a_batch_norm_that_nobody_folds_ends_the_chain(prepare: Prepare) -> None:
    model = seeded(lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2)))
    x = torch.randn(2, 3, 4, 4)
    assert sites(prepare(model, x).plan) == ("0",)
    left = prepare(model, x, without=["batch_norm_folding"])
    assert sites(left.plan) == ()
    refusal = next(r for r in left.plan.refused if r.algorithm == "cross_layer_equalization")
    assert refusal.verdict.sentence() == (
        "no operator with weights hands its scale to another (graph.pairs); "
        "BatchNormalization that is not folded keeps no scale (graph.1.kind); "
        "the model returns it, so that its scale must stay (graph.3.is_output)"
    )


def test_a_bias_that_is_no_value_per_channel_is_refused(target: TargetSpec) -> None:
    class Wide(nn.Module):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(shape))
            self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.addmm(self.bias, x, self.a))
            return y

    def verdict(shape: tuple[int, ...]) -> Any:
        graph = qhw.capture(Wide(shape).eval(), torch.randn(2, 3))
        return next(site.verdict for site in survey(graph, target).sites if site.name == "gemm")

    assert verdict((1,)).sentence() == "a bias of shape [1] is not one value per channel (graph.gemm.bias)"
    assert verdict((4,)).taken


def test_a_pair_on_the_host_is_left_alone(prepare: Prepare) -> None:
    model = seeded(lambda: nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 2)))
    x = torch.randn(2, 3, 4, 4)
    assert sites(prepare(model, x).plan) == ("0", "1")
    assert sites(prepare(model, x, keep_float=["0"]).plan) == ("0", "1")
    done = prepare(model, x, keep_float=["0", "1"])
    assert sites(done.plan) == ("1",)
    step = next(step for step in done.plan.steps if step.stage == "equalize")
    assert {site.name: site.verdict.sentence() for site in step.left_out} == {
        "0": "it runs on the host, and so does 1: neither is quantized (placement.0.where)",
        "2": "the model returns it, so that its scale must stay (graph.2.is_output)",
    }


@pytest.mark.parametrize(
    ("per", "sentence"),
    [
        ("tensor", "one scale per tensor serves channels of every range (formats.w.per)"),
        (
            "out_channel",
            "weights have a scale per out channel; equalization evens out the activations and the input channels "
            "(formats.w.per)",
        ),
    ],
)
def test_the_verdict_cites_how_weights_share_scales(prepare: Prepare, per: str, sentence: str) -> None:
    spec = parse_target(TARGET.replace('zero_point = 0, per = "tensor"', f'zero_point = 0, per = "{per}"'))
    model, inputs = example("conv_chain")
    step = next(step for step in prepare(model, inputs, spec).plan.steps if step.stage == "equalize")
    assert step.verdict.sentence() == (
        f"2 of 3 operators with weights hand their scale to the next (graph.pairs); {sentence}"
    )
    assert [(site.name, site.verdict.sentence()) for site in step.left_out] == [
        ("fc", "the model returns it, so that its scale must stay (graph.fc.is_output)")
    ]


def test_a_model_without_pairs_says_so(prepare: Prepare) -> None:
    done = prepare(nn.Sequential(conv(3, 4)).eval(), torch.randn(2, 3, 4, 4))
    refusal = next(r for r in done.plan.refused if r.algorithm == "cross_layer_equalization")
    assert refusal.verdict.sentence().startswith("no operator with weights hands its scale to another (graph.pairs)")


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("2", r"plan: step 'cross_layer_equalization': 2: the model returns it, so that its scale must stay "
              r"\(graph.2.is_output\). Take it out of the sites, or plan again\."),
        ("1", r"plan: step 'cross_layer_equalization': 1: is no operator with weights. Take it out of the sites\."),
    ],
)  # fmt: skip
def test_an_edited_plan_cannot_add_a_site_that_is_none(prepare: Prepare, site: str, message: str) -> None:
    def edit(plan: QuantPlan) -> QuantPlan:
        changed = {"sites": ("0", site)}
        steps = tuple(s.model_copy(update=changed) if s.stage == "equalize" else s for s in plan.steps)
        return plan.model_copy(update={"steps": steps})

    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)).eval()
    with pytest.raises(PlanError, match=message):
        prepare(model, torch.randn(2, 3, 4, 4), edit=edit)


def test_an_edited_plan_may_leave_a_pair_out(prepare: Prepare) -> None:
    def edit(plan: QuantPlan) -> QuantPlan:
        steps = tuple(s.model_copy(update={"sites": ("0",)}) if s.stage == "equalize" else s for s in plan.steps)
        return plan.model_copy(update={"steps": steps})

    model: Any = seeded(lambda: nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 2)))
    x = torch.randn(2, 3, 4, 4)
    done = prepare(model, x, edit=edit)
    assert_same(done, model, x)
    assert np.array_equal(done.weight("2"), model[2].weight.detach().double().numpy())


# Normals


def test_normals_follow_the_rescaled_channels(prepare: Prepare) -> None:
    """The batch norm's statistics are those of the data, so that its output is normal as it says."""
    model: Any = seeded(lambda: nn.Sequential(conv(6, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 3)))
    x = torch.randn(400, 6, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        raw = model[0](x)
    model[1].running_mean, model[1].running_var = raw.mean((0, 2, 3)), raw.var((0, 2, 3), correction=0)
    done = prepare(model, x[:2])
    normal = done.work.normals["0"]
    graph = done.work.graph
    with torch.no_grad():
        found = F.conv2d(x, graph.tensor("0.weight"), graph.tensor("0.bias")).double()
    assert torch.allclose(normal.mean, found.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert torch.allclose(normal.std, found.std((0, 2, 3), correction=0), rtol=1e-3)
    beta, gamma = model[1].bias.detach().double(), model[1].weight.detach().double().abs()
    scale = gamma / normal.std
    assert torch.allclose(normal.mean, beta / scale, rtol=1e-12)
    assert float((scale.log().abs()).max()) > 0.1


def test_the_last_layer_and_layers_without_batch_norm_have_the_normals_they_had(prepare: Prepare) -> None:
    model: Any = seeded(lambda: nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 3), nn.BatchNorm2d(3)))
    done = prepare(model, torch.randn(2, 3, 4, 4))
    assert list(done.work.normals) == ["2"]
    assert torch.equal(done.work.normals["2"].mean, model[3].bias.detach().double())


# The whole way


def test_the_user_s_model_stays_and_equal_runs_give_equal_reports(prepare: Prepare, registry: Registry) -> None:
    model, inputs = example("conv_chain")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reports = [prepare(model, inputs).reports for _ in range(2)]
    assert reports[0] == reports[1]
    assert reports[0]["cross_layer_equalization"].summary == "2 pairs equalized"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_equalized_models_quantize_better_per_tensor(registry: Registry, target: TargetSpec) -> None:
    model = seeded(lambda: nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 4)), spread=2.5)
    x = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = model(x).detach()

    def error(**wishes: Any) -> float:
        result = qhw.quantize(
            model, target, example_inputs=x[:2], calibration=x, registry=registry, progress=SilentProgress(), **wishes
        )
        return float((result(x).detach() - expected).square().mean())

    assert error() < 0.5 * error(without=["cross_layer_equalization"])


@pytest.mark.parametrize("options", [{"max_sweeps": 0}, {"tolerance": 0.0}], ids=["no-sweep", "no-tolerance"])
def test_options_are_checked(prepare: Prepare, options: dict[str, Any]) -> None:
    model, inputs = example("conv_chain")
    with pytest.raises(PlanError, match=f"--set cross_layer_equalization.{next(iter(options))}: Input should be"):
        prepare(model, inputs, options={"cross_layer_equalization": options})


# Random chains

ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda c: nn.Identity(),
    "relu": lambda c: nn.ReLU(),
    "prelu": lambda c: nn.PReLU(c),
    "leaky": lambda c: nn.LeakyReLU(0.2),
    "pool": lambda c: nn.MaxPool2d(2, 1, padding=1),
    "average": lambda c: nn.AvgPool2d(2, 1),
    "relu6": lambda c: nn.ReLU6(),
    "norm": lambda c: nn.BatchNorm2d(c),
    "norm-relu": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()),
}


def layers_of(steps: list[tuple[str, int, str]]) -> Iterator[nn.Module]:
    channels = 3
    for kind, width, activation in steps:
        outputs = channels if kind == "depthwise" else width
        yield LAYERS[kind](channels, outputs)
        yield ACTIVATIONS[activation](outputs)
        channels = outputs


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.sampled_from(list(LAYERS)), st.integers(1, 5), st.sampled_from(list(ACTIVATIONS))),
        min_size=2,
        max_size=5,
    ),
    st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_random_chains_keep_their_function(steps: list[tuple[str, int, str]], seed: int) -> None:
    model = seeded(lambda: nn.Sequential(*layers_of(steps)), seed)
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).double()
    model = model.double()
    expected = model(x)
    graph = qhw.capture(model, x)
    norms = [o for o in graph.operators if o.kind == "BatchNormalization" and _folds(graph, o)]
    for norm in norms:
        batch_norm_folding.fold(graph, graph.operator(norm.inputs[0]), norm)
    finder = PairFinder(graph)
    pairs = [pair for pair in map(finder.after, finder.firsts()) if isinstance(pair, Pair)]
    for chained in cross_layer_equalization._chains(pairs):
        equalize(graph, chained)
    assert (graph(x) - expected).abs().max() <= 1e-9 * expected.abs().max().clamp(min=1e-6)


def _folds(graph: Graph, norm: Operator) -> bool:
    return any(o.name == norm.inputs[0] and o.weight is not None and o.kind != "PRelu" for o in graph.operators)


# The real models


@pytest.fixture(scope="module")
def benchmark_models() -> Any:
    pytest.importorskip("PIL")
    from bench.data import load_models

    try:
        return load_models()
    except SystemExit as missing:
        pytest.skip(str(missing))


@pytest.mark.needs_data
@pytest.mark.parametrize(("name", "pairs"), [("unbalanced", 37), ("resnet20", 9)])
@pytest.mark.slow
def test_real_models_keep_their_function(prepare: Prepare, benchmark_models: Any, name: str, pairs: int) -> None:
    model = benchmark_models.resnet(20) if name == "resnet20" else benchmark_models.mobilenet_v2(unbalanced=True)
    images, _ = benchmark_models.cifar10("test", 64)
    done = prepare(model, images[:2])
    assert len(sites(done.plan)) == pairs
    with torch.inference_mode():
        expected, found = model(images), done.work.graph(images)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.needs_data
@pytest.mark.slow
def test_per_tensor_weights_of_the_unbalanced_network_are_rescued(
    registry: Registry, target: TargetSpec, benchmark_models: Any
) -> None:
    """Table 3 of the paper: 0.12 % become 69.9 %; here about 15 % become the float model's 77 %."""
    model = benchmark_models.mobilenet_v2(unbalanced=True)
    images, _ = benchmark_models.cifar10("train", 200)
    test, labels = benchmark_models.cifar10("test", 300)
    graph = qhw.capture(model, images[:2])

    def accuracy(**wishes: Any) -> float:
        result = qhw.quantize(graph, target, calibration=images, registry=registry, progress=SilentProgress(), **wishes)
        with torch.inference_mode():
            return float((result(test).argmax(1) == labels).double().mean())

    assert accuracy(without=["cross_layer_equalization"]) < 0.4
    assert accuracy() > 0.7
