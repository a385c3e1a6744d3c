# SPDX-License-Identifier: Apache-2.0
"""Weights, biases and inputs of 1e-30 and 1e30, NaN and infinity: an exact result, or one line that names the layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel, SilentProgress
from qhw.errors import CalibrationError, QhwError, RangeError
from qhw.integer import IntegerModel
from qhw.verification import verify

pytestmark = pytest.mark.slow

ORT, LITERT = "onnxruntime/cpu-x86-vnni", "google/litert-int8"
PIPELINES = ["ranges-ptq", "whitepaper-ptq"]
# Factor of weights, of biases, of which layers (None: all), of the inputs.
CASES: dict[str, tuple[float, float, int | None, float]] = {
    "first-weights-1e-30": (1e-30, 1.0, 0, 1.0),
    "all-weights-1e-30": (1e-30, 1.0, None, 1.0),
    "all-parameters-1e-30": (1e-30, 1e-30, None, 1.0),
    "first-weights-1e30": (1e30, 1.0, 0, 1.0),
    "last-weights-1e30": (1e30, 1.0, 4, 1.0),
    "one-bias-1e30": (1.0, 1e30, 2, 1.0),
    "biases-1e-30": (1.0, 1e-30, None, 1.0),
    "inputs-1e30": (1.0, 1.0, None, 1e30),
    "inputs-1e-30": (1.0, 1.0, None, 1e-30),
    "inputs-and-weights-1e-30": (1e-30, 0.0, None, 1e-30),
    "inputs-1e30-weights-1e-30": (1e-30, 1e-30, 0, 1e30),
    "denormal-weights": (1e-42, 1.0, 0, 1.0),
    "denormal-inputs": (1.0, 1.0, None, 1e-42),
    "weights-0": (0.0, 1.0, 2, 1.0),
    "inputs-0": (1.0, 1.0, None, 0.0),
}
BROKEN: dict[str, tuple[tuple[float, float, int | None, float], type[QhwError], str]] = {
    "overflowing-activations": ((1e30, 1e30, None, 1.0), RangeError, r"^2: (its output holds|values must be finite)"),
    "infinite-inputs": (
        (1.0, 1.0, None, float("inf")),
        CalibrationError,
        r"^calibration: input 'input' holds NaN or inf",
    ),
    "nan-inputs": ((1.0, 1.0, None, float("nan")), CalibrationError, r"^calibration: input 'input' holds NaN or inf"),
    "nan-weights": ((float("nan"), 1.0, 2, 1.0), RangeError, r"^2\.weight: holds NaN or infinite values\. Repair the"),
    "infinite-bias": ((1.0, float("inf"), 2, 1.0), RangeError, r"^2\.bias: holds NaN or infinite values\. Repair the"),
}


def model(weights: float, biases: float, only: int | None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)
    )
    with torch.no_grad():
        for index in (0, 2, 4) if only is None else (only,):
            net[index].weight.mul_(weights)  # type: ignore[operator]
            net[index].bias.mul_(biases)  # type: ignore[operator]
    return net.eval()


def data(factor: float) -> Tensor:
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * factor


def quantized(
    target: str, pipeline: str, case: tuple[float, float, int | None, float]
) -> tuple[QuantizedModel, Tensor]:
    weights, biases, only, inputs = case
    x = data(inputs)
    wishes: dict[str, Any] = {"example_inputs": x[:2], "calibration": x, "pipeline": pipeline}
    return qhw.quantize(model(weights, biases, only), target, progress=SilentProgress(), **wishes), x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_gives_the_same_codes(case: str, pipeline: str, tmp_path: Path) -> None:
    result, x = quantized(ORT, pipeline, CASES[case])
    found = verify(result, x, artefact=qhw.export(result, tmp_path / "out")[0], progress=SilentProgress())
    if found.not_run is not None:
        pytest.skip(found.not_run)
    assert found.artefact and sum(one.differing for one in found.artefact) == 0
    assert torch.isfinite(IntegerModel(result)(x)).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("case", CASES)
def test_litert_gives_the_same_codes_or_the_layer_is_named(case: str, pipeline: str) -> None:
    pytest.importorskip("ai_edge_litert")
    from tests.litert_network import build_network, run_network

    try:
        result, x = quantized(LITERT, pipeline, CASES[case])
    except RangeError as error:  # outputs so far below the bias that 2^30 does not reach
        assert str(error).startswith("0: its bias") and "Keep '0' in float with --keep-float" in str(error)
        assert "\n" not in str(error) and pipeline == "whitepaper-ptq"
        return
    (given,) = result.input_names
    mine = IntegerModel(result).codes(x)
    theirs = run_network(build_network(result, len(x)), mine.pop(given).numpy())
    differing = {name: int((codes != torch.from_numpy(theirs[name])).sum()) for name, codes in mine.items()}
    assert differing == dict.fromkeys(mine, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("target", [ORT, LITERT])
@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named_in_one_line(case: str, target: str, pipeline: str) -> None:
    factors, error, message = BROKEN[case]
    with pytest.raises(error, match=message) as raised:
        quantized(target, pipeline, factors)
    assert "\n" not in str(raised.value)
