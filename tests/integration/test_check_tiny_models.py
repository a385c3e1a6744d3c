# SPDX-License-Identifier: Apache-2.0
"""Planner and judge agree: what is quantized and exported for a target is legal on it, model by model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.engine import SilentProgress
from qhw.legality import judge
from qhw.schema import load_target_file
from qhw_plugins.onnx_reader import OnnxReader

ROOT = Path(__file__).parents[2] / "targets/qhw_targets"
TARGETS = ("espressif/esp32-p4", "amd/xdna-a8w8", "openvino/cpu", "google/coral-edgetpu", "onnxruntime/cpu-x86-vnni")


class Branched(nn.Module):
    """Everything that ties and chains: a depthwise convolution, a sum, a concatenation, pools, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.side = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.side(x) + self.depthwise(x))
        x = torch.cat([nn.functional.max_pool2d(x, 2), nn.functional.avg_pool2d(x, 2)], 1)
        result: Tensor = self.head(x.mean((2, 3)))
        return result


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_exported_for_a_target_is_legal_on_it(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    target = load_target_file(ROOT / f"{name}.toml", find_base=lambda base: ROOT / f"{base}.toml")
    batches = [torch.randn(16, 3, 8, 8) for _ in range(2)]
    result = qhw.quantize(
        Branched().eval(), target, example_inputs=batches[0], calibration=batches, progress=SilentProgress()
    )
    (path, *_) = qhw.export(result, tmp_path, exporter="onnx_qdq")
    report = judge(OnnxReader().read(path, None), target, "model.onnx")
    assert [one.message for one in report.violations] == []
    planned = [one for one in result.plan.operators if one.where == "accelerator" and one.kernel is not None]
    assert report.count("legal") >= len(planned) > 4
