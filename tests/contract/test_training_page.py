# SPDX-License-Identifier: Apache-2.0
"""docs/training.md: its plugin is taken by a plan, quantizes the share it was told, trains and freezes."""

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

import qhw
from qhw.extension import load_plugins
from tests.training_support import images, network, quantized, steps

TEXT = (Path(__file__).parents[2] / "docs/training.md").read_text()
PLUGIN = next(code for code in re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.M | re.S) if "hookimpl" in code)


def test_the_training_algorithm_of_the_page_trains_and_freezes() -> None:
    module = ModuleType("example")
    exec(PLUGIN, vars(module))  # noqa: S102  (our own documentation)
    registry = load_plugins(block=(), extra=[("example", module)])
    result = quantized(network(), images())
    qhw.trainable(result, options={"quant_noise": {"share": 0.25}}, registry=registry)
    (step,) = (step for step in result.plan.steps if step.algorithm == "quant_noise")
    assert set(step.sites) == {point.group for point in result.plan.points if point.role == "weight"}

    noisy = next(m for m in result.modules() if isinstance(m, module.NoisyQuantizer))
    x = (0.4 * noisy.scale.detach())[:, None].expand(-1, 6000)  # goes to 0 where it is quantized
    noisy.train()
    torch.manual_seed(0)
    assert abs(float((noisy(x) == 0).double().mean()) - 0.25) < 0.01  # 5 standard deviations of 36,000 draws or more

    assert np.isfinite(steps(result, 3)).all()
    last = next(m for m in result.modules() if isinstance(m, module.NoisyQuantizer) and m.name == "11.weight")
    scale = last.scale.clone()  # no batch norm stands behind it, whose scale would merge into this one
    assert qhw.freeze(result).encodings()["11.weight"].scale.equal(scale)
