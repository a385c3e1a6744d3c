# SPDX-License-Identifier: Apache-2.0
"""The default pipeline at 4-bit weights on data and models that are not as the textbook has them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qhw
from qhw.engine import SilentProgress
from qhw.errors import CalibrationError, PlanError

pytestmark = pytest.mark.slow

TARGET = "whitepaper/generic-int8"
FORMATS = {"*.weight": "w4"}
IMAGE = (3, 12, 12)


class Net(nn.Module):
    """Three convolutions and a linear layer.

    Args:
        norm: Batch norm after each convolution; with its channels.
        groups: Of the second convolution.
    """

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=groups), norm(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 12, 1), norm(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.relu(self.norm3(self.conv3(x)))
        out: Tensor = self.fc(x.mean(dim=(2, 3)))
        return out


class Twice(Net):
    """The second convolution runs twice, with a batch norm each."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.relu(self.again(self.conv2(x)))
        x = F.relu(self.norm3(self.conv3(x)))
        out: Tensor = self.fc(x.mean(dim=(2, 3)))
        return out


class Tied(Net):
    """Two convolutions with one weight, and a bias and a batch norm each."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(8, 8, 3, padding=1)
        self.other.weight = self.conv2.weight
        self.again = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.relu(self.again(self.other(x)))
        x = F.relu(self.norm3(self.conv3(x)))
        out: Tensor = self.fc(x.mean(dim=(2, 3)))
        return out


def dead() -> Net:
    """The second convolution reads zeros only."""
    model = Net()
    for parameter in (*model.conv1.parameters(), *model.norm1.parameters()):
        nn.init.zeros_(parameter)
    return model


MAKERS: dict[str, Callable[[], Net]] = {
    "plain": Net,
    "grouped": lambda: Net(groups=2),
    "depthwise": lambda: Net(groups=8),
    "a layer that reads zeros": dead,
    "a layer called twice": Twice,
    "a weight used twice": Tied,
    "no batch norm": lambda: Net(norm=lambda channels: nn.Identity()),
    "batch norms without statistics": lambda: Net(
        norm=lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)
    ),
}
WITHOUT_STATISTICS = ("no batch norm", "batch norms without statistics")


def noise(count: int) -> Tensor:
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(1))


DATA = {
    "64 images": noise(64),
    "one image": noise(1),
    "constant images": torch.full((64, *IMAGE), 0.5),
    "black images": torch.zeros(64, *IMAGE),
}


def trained(name: str) -> Net:
    """A model with statistics of the data, in eval mode."""
    torch.manual_seed(0)
    model = MAKERS[name]().train()
    with torch.no_grad():
        for _ in range(30):
            model(noise(64))
    return model.eval()


def quantize(model: Net, data: Any, **wishes: Any) -> Any:
    options: dict[str, Any] = {} if data is None else {"adaround": {"iterations": 20}}
    wishes = {"formats": FORMATS, "options": options, "progress": SilentProgress(), **wishes}
    return qhw.quantize(model, TARGET, example_inputs=noise(2), calibration=data, **wishes)


def check(model: Net, result: Any, data: Tensor) -> None:
    """Scales that a kernel can hold, and an output near the float model's."""
    for name, qparams in result.encodings().items():
        assert bool(torch.isfinite(qparams.scale).all() & (qparams.scale > 0).all()), name
    with torch.no_grad():
        wanted, found = model(data), result(data)
    assert bool(torch.isfinite(found).all())
    # 4-bit weights in four layers: some per cent of the output; a wrong scale or a lost bias gives half of it and more.
    assert float((found - wanted).norm() / wanted.norm()) < 0.25


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", MAKERS)
def test_with_data(name: str, data: str) -> None:
    model = trained(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = quantize(model, DATA[data])
    rounded = next(step for step in result.plan.steps if step.stage == "round")
    assert rounded.algorithm == "adaround"
    assert len(rounded.sites) == 4
    check(model, result, DATA[data])
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in WITHOUT_STATISTICS])
def test_without_data(name: str) -> None:
    model = trained(name)
    result = quantize(model, None)
    assert {step.algorithm for step in result.plan.steps} >= {"nearest", "batch_norm_ranges"}
    check(model, result, noise(64))


@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
def test_the_plan_says_that_data_is_needed_before_anything_runs(name: str) -> None:
    message = (
        rf"^x: no algorithm fits target '{TARGET}' for its activations .* mse: needs calibration data .* "
        r"batch_norm_ranges: there is no batch norm with running statistics .*"
        r"Pass calibration= \(--calibration DATA\)\.$"
    )
    with pytest.raises(PlanError, match=message):
        qhw.plan(trained(name), TARGET, noise(2), formats=FORMATS)


@pytest.mark.parametrize(
    "algorithm", ["adaround", "empirical_bias_correction", "cross_entropy", "gptq", "sequential_mse"]
)
def test_the_plan_says_what_each_step_without_its_data_does_instead(algorithm: str) -> None:
    plan = qhw.plan(trained("plain"), TARGET, noise(2), formats=FORMATS, prefer=(algorithm,))
    (refused,) = (refusal for refusal in plan.refused if refusal.algorithm == algorithm)
    assert refused.verdict.sentence() == "needs calibration data (resources.calibration)"
    assert algorithm not in {step.algorithm for step in plan.steps}


def test_a_plan_made_with_data_refuses_to_run_without() -> None:
    model = trained("plain")
    plan = qhw.plan(model, TARGET, noise(2), calibration=DATA["64 images"], formats=FORMATS)
    with pytest.raises(PlanError, match=r"needs calibration data, and none was given\. Pass calibration=\.$"):
        qhw.quantize(model, plan, example_inputs=noise(2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"^calibration: holds no sample\. Pass at least one batch\.$"),
        (torch.full((4, *IMAGE), float("nan")), r"^calibration: input 'x' holds NaN or infinite values"),
    ],
    ids=["no image", "not a number"],
)
def test_data_that_tells_nothing_is_refused(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        quantize(trained("plain"), data)


def test_labels_are_needed_by_no_algorithm() -> None:
    """Those of the data are passed over: the result is that of the images alone."""
    images, model = DATA["64 images"], trained("plain")
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in images.split(32)]
    results = [quantize(model, data).encodings() for data in (images, labelled)]
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name].scale, results[1][name].scale) for name in results[0])


def test_a_weight_used_twice_has_one_scale_and_one_set_of_codes() -> None:
    result = quantize(trained("a weight used twice"), DATA["64 images"])
    (point,) = (p for p in result.plan.points if p.role == "weight" and p.operator in ("conv2", "other"))
    assert point.consumers == ("conv2", "other")


def test_batch_norms_without_statistics_stay_on_the_host_and_the_plan_says_why() -> None:
    plan = qhw.plan(trained("batch norms without statistics"), TARGET, noise(2), calibration=noise(64))
    assert {o.where for o in plan.operators if o.kind == "BatchNormalization"} == {"host"}
    (refused,) = (refusal for refusal in plan.refused if refusal.algorithm == "batch_norm_folding")
    assert "the batch norm keeps no running statistics" in refused.verdict.sentence()


class Recurrent(nn.Module):
    """Linear operators around an LSTM, which hands on a tuple and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.lstm, self.after = nn.Linear(8, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.lstm(self.before(x))[0][:, -1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("formats", [{}, {"*.weight": "w4"}])
def test_layers_around_an_lstm_are_corrected_and_rounded(formats: dict[str, str]) -> None:
    torch.manual_seed(0)
    model, x = Recurrent().eval(), torch.randn(64, 5, 8)
    asked = {"example_inputs": x[:2], "calibration": x, "options": {"adaround": {"iterations": 50}} if formats else {}}
    result = qhw.quantize(model, "whitepaper/generic-int8", formats=formats, **asked)
    with torch.no_grad():
        error = (result(x) - model(x)).square().mean() / model(x).square().mean()
    assert float(error) < 0.1
