# SPDX-License-Identifier: Apache-2.0
"""Ranges of logits: no scale on a fine grid of numpy's changes the softmax less, and only logits are taken."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.decisions import QuantPlan
from qhw.engine import QuantizedModel
from qhw.errors import CalibrationError, PlanError, RangeError
from qhw.extension import Registry, load_plugins
from qhw.numerics import Grid
from qhw.numerics.range_loss import CrossEntropy, cross_entropy_qparams
from qhw.schema import parse_target
from qhw_plugins import cross_entropy
from tests.plugins.conftest import PLUGINS, TARGET, WORDS

Quantize = Callable[..., QuantizedModel]
Plan = Callable[..., QuantPlan]


@pytest.fixture(scope="module")
def plugins() -> Registry:
    modules = dict.fromkeys((*PLUGINS, cross_entropy))
    extra = [(module.__name__.rpartition(".")[2], module) for module in modules]
    return load_plugins(block=(), entry_points=(), extra=extra)


@pytest.fixture(scope="module")
def quantize(plugins: Registry) -> Quantize:
    def make(model: nn.Module, data: Any, **words: Any) -> QuantizedModel:
        example = data[:2] if isinstance(data, Tensor) else data[0]
        target = parse_target(TARGET.format(**(WORDS | words)))
        wishes = {"calibration": data, "prefer": ["cross_entropy"], "registry": plugins}
        return qhw.quantize(model, target, example_inputs=example, **wishes)

    return make


@pytest.fixture(scope="module")
def plan(plugins: Registry) -> Plan:
    def make(model: nn.Module, example: Tensor, text: str = TARGET) -> QuantPlan:
        target = parse_target(text.format(**WORDS))
        return qhw.plan(model.eval(), target, example, calibration=example, prefer=["cross_entropy"], registry=plugins)

    return make


def taken(made: QuantPlan) -> list[str]:
    return [site for step in made.steps if step.algorithm == "cross_entropy" for site in step.sites]


def refusal(made: QuantPlan) -> str:
    return next(r.verdict.sentence() for r in made.refused if r.algorithm == "cross_entropy")


def log_softmax(v: np.ndarray) -> np.ndarray:
    shifted = v - v.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def divergence(v: np.ndarray, scale: float, zero_point: int, low: int, high: int) -> float:
    """Cross-entropy beyond the entropy, summed over the rows, in float64; codes from a float32 quotient."""
    codes = np.clip(np.rint(np.float32(v) / np.float32(scale)).astype(np.float64) + zero_point, low, high)
    image = np.float64(np.float32(scale)) * (codes - zero_point)
    ours = log_softmax(np.float64(v))
    return float((np.exp(ours) * (ours - log_softmax(image))).sum())


def draw_logits(rows: int = 64, classes: int = 50) -> np.ndarray:
    """Many small logits, a few large ones that decide, and a far low tail."""
    rng = np.random.default_rng(2)
    v = rng.normal(-2, 2, (rows, classes))
    v[:, 0] -= 30
    v[np.arange(rows), rng.integers(1, classes, rows)] += 9
    return np.float32(v)


@pytest.mark.parametrize("scale", [0.001, 0.05, 1.0, 6.0])
@pytest.mark.parametrize("zero_point", [0, 5, 15])
def test_the_loss_is_that_of_numpy(scale: float, zero_point: int) -> None:
    v = draw_logits()
    found = CrossEntropy(torch.from_numpy(v), Grid(0, 15))(
        torch.tensor([[scale]]), torch.tensor([[zero_point]], dtype=torch.int32)
    )
    # Float32 exponentials and sums over 50 classes.
    assert found.item() == pytest.approx(divergence(v, scale, zero_point, 0, 15), rel=1e-5)


def test_a_small_loss_keeps_its_digits() -> None:
    v, scale = draw_logits(), 0.002
    found = CrossEntropy(torch.from_numpy(v), Grid(-32768, 32767, 0))(
        torch.tensor([[scale]]), torch.zeros(1, 1, dtype=torch.int32)
    )
    expected = divergence(v, scale, 0, -32768, 32767)
    assert expected < 1e-4  # of an entropy of tens: a difference of float32 logarithms would lose it
    assert found.item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("codes", [(-128, 127), (-8, 7), (-2, 1)], ids=str)
def test_a_symmetric_search_finds_the_best_of_a_thousand_scales(codes: tuple[int, int]) -> None:
    v = draw_logits()
    found = cross_entropy_qparams(torch.from_numpy(v), Grid(*codes, 0))
    covering = max(v.max() / codes[1], v.min() / codes[0])
    best = min(divergence(v, covering * i / 1000, 0, *codes) for i in range(1, 1001))
    # The search ends at steps of a thousandth of the range, around the best of its hundredths.
    assert divergence(v, found.scale.item(), 0, *codes) <= best * 1.02


def test_an_asymmetric_search_finds_the_best_pair() -> None:
    v = draw_logits()
    found = cross_entropy_qparams(torch.from_numpy(v), Grid(0, 15))
    mine = divergence(v, found.scale.item(), int(found.zero_point), 0, 15)
    covering = (float(v.max()) - float(v.min())) / 15
    grid = [(covering * i / 200, zero) for i in range(1, 201) for zero in range(16)]
    assert mine <= 1.02 * min(divergence(v, scale, zero, 0, 15) for scale, zero in grid)
    assert mine < 0.5 * divergence(v, covering, int(np.rint(-v.min() / covering)), 0, 15)  # the tail is clipped


@pytest.mark.parametrize(
    ("grid", "legal"),
    [
        (Grid(-8, 7, 0, "power_of_two"), [(2.0**e, 0) for e in range(-12, 6)]),
        (Grid(-8, 7, 0, "enumerated", scale_values=(0.25, 0.75, 4.0)), [(0.25, 0), (0.75, 0), (4.0, 0)]),
        (Grid(0, 15, (0, 8), "enumerated", scale_values=(0.5, 1.5)), [(s, z) for s in (0.5, 1.5) for z in (0, 8)]),
    ],
    ids=["power_of_two", "enumerated", "several-zero-points"],
)
def test_listed_scales_are_all_tried_and_nothing_else(grid: Grid, legal: list[tuple[float, int]]) -> None:
    v = draw_logits()
    found = cross_entropy_qparams(torch.from_numpy(v), grid)
    losses = {pair: divergence(v, *pair, grid.quant_min, grid.quant_max) for pair in legal}
    assert (found.scale.item(), int(found.zero_point)) == min(losses, key=lambda pair: losses[pair])


def test_a_bound_on_the_scale_is_kept() -> None:
    grid = Grid(-8, 7, 0, scale_min=3.5)
    assert 3.5 <= cross_entropy_qparams(torch.from_numpy(draw_logits()), grid).scale.item() <= 4.6  # 32 / 7


@pytest.mark.parametrize(
    ("v", "scale"),
    [
        (torch.zeros(3, 4), 1.0),
        (torch.full((3, 4), 3.0), 3.0 / 255),  # equal logits: every range keeps the softmax, the first one stays
        (torch.tensor([[-5.0]]), 5.0 / 255),
    ],
    ids=["zeros", "constant", "one-value"],
)
def test_where_nothing_can_be_lost_the_range_is_covered(v: Tensor, scale: float) -> None:
    assert cross_entropy_qparams(v, Grid(0, 255)).scale.item() == np.float32(scale)


def test_huge_logits_leave_no_nan() -> None:
    v = torch.tensor([[1e30, -1e30, 0.0], [3e38, 3e38, -3e38]])
    found = cross_entropy_qparams(v, Grid(-8, 7, 0))
    assert 0 < found.scale.item() < np.inf


def test_a_row_longer_than_a_block() -> None:
    v = np.float32(np.random.default_rng(0).normal(0, 3, (2, 70_001)))
    found = CrossEntropy(torch.from_numpy(v), Grid(-8, 7, 0))(torch.tensor([[0.9]]), torch.zeros(1, 1).int())
    assert found.item() == pytest.approx(divergence(v, 0.9, 0, -8, 7), rel=1e-4)  # float32 sums of 32,000 terms


def test_no_logits_and_broken_ones_are_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match=r"fc: cross-entropy needs at least one row of logits; got none"):
        cross_entropy_qparams(torch.empty(0, 4), Grid(0, 15), "fc")
    with pytest.raises(RangeError, match=r"fc: values must be finite; got nan"):
        cross_entropy_qparams(torch.tensor([[0.0, float("nan")]]), Grid(0, 15), "fc")


class Classifier(nn.Module):
    """A convolution, pooling, a linear layer with outlying classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 12)
        self.fc.weight.data.mul_(torch.linspace(1, 12, 12)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return Classifier().eval()


def test_logits_of_a_model_by_cross_entropy_the_others_by_mse(
    model: nn.Module, images: Tensor, quantize: Quantize
) -> None:
    result = quantize(model, images, bits=4)
    steps = {step.algorithm: step for step in result.plan.steps}
    assert steps["cross_entropy"].sites == ("fc",)
    assert set(steps["mse"].sites) == {p.group for p in result.plan.points if p.role != "weight"} - {"fc"}
    left_out = {site.name: site.verdict.sentence() for site in steps["cross_entropy"].left_out}
    assert left_out == dict.fromkeys(steps["mse"].sites, "only for logits, and the model returns fc (graph.outputs)")
    # What the linear layer gives with its weights, and the convolution's, fake-quantized by the result itself.
    reference: Any = Classifier().eval()
    for name in ("conv", "fc"):
        layer, encoding = getattr(reference, name), result.encodings()[f"{name}.weight"]
        layer.load_state_dict(model.get_submodule(name).state_dict())
        step = encoding.scale.reshape(-1, *([1] * (layer.weight.dim() - 1)))
        layer.weight.data = (layer.weight / step).round().clamp(-127, 127) * step
    v = reference(images).detach().numpy()
    found = result.encodings()["fc"]
    mine = divergence(v, found.scale.item(), int(found.zero_point), 0, 15)
    covering = (float(v.max()) - float(v.min())) / 15
    best = min(divergence(v, covering * i / 100, zero, 0, 15) for i in range(1, 101) for zero in range(16))
    assert mine <= best * 1.02
    figures = next(step for step in result.steps if step.algorithm == "cross_entropy").sites["fc"]
    assert figures == {"min": pytest.approx(v.min(), rel=1e-5), "max": pytest.approx(v.max(), rel=1e-5), "rows": 70}


@pytest.mark.parametrize("size", [1, 7, 64, 203])
def test_the_batch_size_of_the_loader_does_not_matter(model: nn.Module, quantize: Quantize, size: int) -> None:
    x = torch.randn(203, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    whole, split = quantize(model, x, bits=4), quantize(model, list(x.split(size)), bits=4)
    assert split.encodings() == whole.encodings()


def test_of_more_logits_than_fit_the_first_rows_count(
    model: nn.Module, images: Tensor, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = quantize(model, images[:40], bits=4).encodings()["fc"]
    monkeypatch.setattr(cross_entropy, "_MOST_VALUES", 40 * 12 + 11)
    capped = quantize(model, images, bits=4)
    assert next(s for s in capped.steps if s.algorithm == "cross_entropy").sites["fc"]["rows"] == 40
    # Micro-batches of 8 and 32 samples may round otherwise, and the two searches then end on neighbouring candidates.
    assert capped.encodings()["fc"].scale.item() == pytest.approx(few.scale.item(), rel=0.02)


def sequence(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("layers", "site"),
    [
        ((nn.Linear(6, 4),), "0"),
        ((nn.Linear(6, 4), nn.ReLU()), "0"),
        ((nn.Linear(6, 4), nn.Dropout(0.5)), "0"),
        ((nn.Linear(6, 4), nn.BatchNorm1d(4)), "0"),
        ((nn.Linear(6, 4), nn.Softmax(1)), "0"),
        ((nn.Linear(6, 4), nn.LogSoftmax(1)), "0"),
        ((nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), "2"),
    ],
    ids=["gemm", "relu", "dropout", "batch-norm", "softmax", "log-softmax", "two-layers"],
)
def test_what_logits_are(layers: tuple[nn.Module, ...], site: str, plan: Plan) -> None:
    assert taken(plan(sequence(*layers), torch.randn(2, 6))) == [site]


def test_the_softmax_of_a_segmentation_has_its_classes_on_axis_one(quantize: Quantize, plan: Plan) -> None:
    model = sequence(nn.Conv2d(3, 5, 1), nn.Softmax(1)).eval()
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    result = quantize(model, x, bits=4)
    figures = next(s for s in result.steps if s.algorithm == "cross_entropy").sites["0"]
    assert figures["rows"] == 6 * 4 * 4
    assert taken(plan(sequence(nn.Conv2d(3, 5, 1)), x[:2])) == []


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((nn.Linear(6, 4), nn.Sigmoid()), r"only for logits, and the model returns 1 \(graph\.outputs\)"),
        ((nn.Linear(6, 1),), r"1 class needs no softmax \(0\.classes\)"),
        ((nn.Linear(6, 4), nn.Unflatten(1, (2, 2))), r"returned with 3 axes, where logits have two"),
        ((nn.Unflatten(1, (2, 3)), nn.Linear(3, 4)), r"returned with 3 axes, where logits have two"),
        ((nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.Flatten()), r"cut anew to 2, 8, so that its classes are not"),
    ],
    ids=["sigmoid", "one-class", "reshaped", "rank-3", "flattened"],
)
def test_what_logits_are_not(layers: tuple[nn.Module, ...], reason: str, plan: Plan) -> None:
    made = plan(sequence(*layers), torch.randn(2, 6))
    assert taken(made) == []
    text = refusal(made)
    assert re.search(reason, text), text
    assert "none of the 2 activation ranges is of logits (points)" in text


def test_a_sigmoid_that_is_fused_gives_no_logits(plan: Plan) -> None:
    text = TARGET.replace(
        'Gemm = {{ kernels = ["mac"], fused = ["Relu"] }}', 'Gemm = {{ kernels = ["mac"], fused = ["Sigmoid"] }}'
    )
    made = plan(sequence(nn.Linear(6, 4), nn.Sigmoid()), torch.randn(2, 6), text)
    assert taken(made) == []
    assert "returned by the model, but Sigmoid gives no logits (1.kind)" in refusal(made)


def test_logits_that_share_a_scale_are_refused(plan: Plan) -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first, second = self.first(x), self.second(x)
            return first, first + second

    text = TARGET.replace(
        "fallback",
        'kernels.add = {{ input = ["a"], output = ["a"] }}\n'
        'operators.Add = {{ kernels = ["add"], same_scale = "inputs" }}\nfallback',
    )
    made = plan(Ensemble(), torch.randn(2, 6), text)
    assert taken(made) == []
    assert "logits that share their scale with other tensors: first, second (groups.first)" in refusal(made)


def test_it_asks_for_calibration_data(model: nn.Module, images: Tensor, plugins: Registry) -> None:
    target = parse_target(TARGET.format(**WORDS))
    with pytest.raises(PlanError, match=r"cross_entropy: needs calibration data \(resources\.calibration\)"):
        qhw.plan(model, target, images[:2], prefer=["cross_entropy"], registry=plugins)
