# SPDX-License-Identifier: Apache-2.0
"""GPTQ against a plain numpy version of its algorithm, and against nearest rounding on real layers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.extension import Registry, load_plugins
from qhw.numerics import PerAxis, QParams
from qhw.schema import parse_target
from qhw_plugins import adaround, batch_norm_folding, gptq, min_max, mse, nearest
from qhw_plugins.gptq import compensated_codes
from qhw_plugins.layer_rows import RowGrid
from tests import pipelines
from tests.plugins.test_adaround import TARGET, errors, small


class Form:
    """Each group's rows are its own weight."""

    def weight_rows(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(0)


@pytest.fixture(scope="module")
def registry() -> Registry:
    modules = (adaround, gptq, batch_norm_folding, min_max, mse, nearest, pipelines)
    return load_plugins(entry_points=(), extra=[(m.__name__.rpartition(".")[2], m) for m in modules])


def by_numpy(weight: np.ndarray, scale: float, x: np.ndarray, damping: float) -> np.ndarray:
    """Optimal brain quantization, one input after the other: the textbook update by the inverse Hessian itself.

    After input i is rounded, the others move by -(w_i - q_i) / Hinv_ii * Hinv_i, and i leaves the inverse:
    Hinv <- Hinv - Hinv_:i Hinv_i: / Hinv_ii. (GPTQ's Cholesky factor holds the same numbers.)
    """
    hessian = x.T @ x
    hessian = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    order = np.argsort(-np.diag(x.T @ x), kind="stable")
    inverse = np.linalg.inv(hessian)
    w, codes = weight.astype(np.float64).copy(), np.zeros_like(weight, dtype=np.float64)
    for i in order:
        codes[:, i] = np.clip(np.rint(w[:, i] / scale), -7, 7)
        wrong = (w[:, i] - codes[:, i] * scale) / inverse[i, i]
        w = w - wrong[:, None] * inverse[i][None, :]
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("seed", range(5))
def test_the_codes_are_those_of_the_textbook_update(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(4, 7)).astype(np.float32)
    x = rng.normal(size=(50, 7)) @ rng.normal(size=(7, 7))
    qparams = QParams(torch.full((4,), 0.25), torch.zeros(4, dtype=torch.int32), -7, 7, PerAxis(0))
    grid = RowGrid(torch.from_numpy(weight), qparams, Form())
    hessian = torch.from_numpy(x.T @ x).unsqueeze(0)
    found = compensated_codes(grid, hessian, 0.01)[0].numpy()
    assert np.array_equal(found, by_numpy(weight, 0.25, x, 0.01))


def test_inputs_that_are_never_active_round_to_nearest() -> None:
    weight = torch.tensor([[0.3, -0.6, 0.9]])
    qparams = QParams(torch.full((1,), 0.25), torch.zeros(1, dtype=torch.int32), -7, 7, PerAxis(0))
    grid = RowGrid(weight, qparams, Form())
    assert torch.equal(compensated_codes(grid, torch.zeros(1, 3, 3).double(), 0.01), grid.nearest)


@pytest.mark.parametrize("kind", ["conv", "depthwise", "grouped", "transposed", "linear"])
def test_outputs_move_towards_the_float_model(registry: Registry, kind: str) -> None:
    net, noise = small(kind)
    # Neighbours alike, as in images: what one input loses, another can make up for only where they move together.
    x = nn.functional.avg_pool2d(noise, 3, 1, 1) * 2 + noise.mean(1, keepdim=True)
    target = parse_target(TARGET)
    asked: dict[str, Any] = {"example_inputs": x[:2], "calibration": x, "registry": registry}
    plain = qhw.quantize(net, target, without=("adaround",), **asked)
    rounded = qhw.quantize(net, target, prefer=("gptq",), **asked)
    for result in (plain, rounded):
        result.set_enabled(False, [p.group for p in result.plan.points if p.role not in ("weight", "bias")])
    before, after = errors(net, x, plain, rounded)
    assert after <= before
    report = next(step for step in rounded.steps if step.algorithm == "gptq")
    better = [site["loss"] < site["loss_nearest"] for site in report.sites.values()]  # type: ignore[operator]
    assert any(better) or kind == "depthwise"  # nine inputs of one channel leave little to make up with


def test_all_zero_data_is_no_error(registry: Registry) -> None:
    net, x = small("conv")
    result = qhw.quantize(
        net, parse_target(TARGET), example_inputs=x[:2], calibration=x[:2] * 0, prefer=("gptq",), registry=registry
    )
    assert all(torch.isfinite(p).all() for p in result.parameters())
