# SPDX-License-Identifier: Apache-2.0
"""Rules of Qualcomm's and Intel's files by hand: what each version puts on which scales."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qhw.decisions import QuantPlan
from qhw.engine.grids import grid_of
from qhw.numerics import legal_scale
from qhw.schema import TargetSpec, load_target_file

ROOT = Path(__file__).parents[2] / "targets" / "qhw_targets"
Planner = Callable[..., QuantPlan]


def shipped(name: str) -> TargetSpec:
    return load_target_file(ROOT / f"{name}.toml")


@pytest.mark.parametrize(("version", "weight"), [("v68", "w8t"), ("v69", "w8"), ("v73", "w8")])
def test_fully_connected_weights_have_a_scale_per_channel_from_v69_on(version: str, weight: str, plan: Planner) -> None:
    made = plan(shipped(f"qualcomm/htp-{version}"), "perceptron")
    assert made.point("hidden.weight").format == weight
    assert plan(shipped(f"qualcomm/htp-{version}"), "conv").point("conv.weight").format == "w8"


@pytest.mark.parametrize(("version", "is_fused"), [("v68", False), ("v73", True)])
def test_a_relu_is_fused_into_a_convolution_from_v73_on(version: str, is_fused: bool, plan: Planner) -> None:
    made = plan(shipped(f"qualcomm/htp-{version}"), "conv")
    assert ("relu" in next(op for op in made.operators if op.name == "conv").members) is is_fused


def test_scales_have_the_smallest_value_that_qnn_takes() -> None:
    spec = shipped("qualcomm/htp-v68")
    tiny = torch.tensor(1e-12)
    assert float(legal_scale(tiny, grid_of(spec, "u8"))) == pytest.approx(1e-4 / 255, rel=1e-6)
    assert float(legal_scale(tiny, grid_of(spec, "u16"))) == pytest.approx(1e-4 / 65535, rel=1e-6)
    assert (grid_of(spec, "u8s").zero_point, grid_of(spec, "u16s").zero_point) == (128, 32768)


@pytest.mark.parametrize(("wanted", "scale"), [(20.0, 16.0), (2.0, 16.0), (1.0, 1.0), (0.07, 1.0), (0.05, 0.0625)])
def test_gaudi_2_has_four_scales_and_gaudi_3_powers_of_two(wanted: float, scale: float) -> None:
    assert float(legal_scale(torch.tensor(wanted), grid_of(shipped("intel/gaudi2"), "f8"))) == scale
    power = 2.0 ** torch.tensor(wanted).log2().ceil()
    assert float(legal_scale(torch.tensor(wanted), grid_of(shipped("intel/gaudi3"), "f8p"))) == float(power)
