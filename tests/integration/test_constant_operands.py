# SPDX-License-Identifier: Apache-2.0
"""Sums and products with a constant against onnxruntime's initializers and LiteRT's buffers: 0 codes differ."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qhw
from qhw.engine import QuantizedModel
from qhw.extension import default_registry
from qhw.integer import IntegerModel, Site, differences
from qhw.numerics import PerTensor, QParams
from tests.integer_support import FunctionOf
from tests.random_grids import input_of, rescaled
from tests.random_outcome import opposite

Function = Callable[[Tensor, Tensor], Tensor]
FUNCTIONS: dict[str, Function] = {
    "x + c": lambda x, c: x + c,
    "c + x": lambda x, c: c + x,
    "x * c": lambda x, c: x * c,
    "c * x": lambda x, c: c * x,
    "x - c": lambda x, c: x - c,
    "c - x": lambda x, c: c - x,
}
SHAPES = {"one": (1,), "channels": (5, 1, 1), "row": (7,), "all": (5, 6, 7)}
BEHIND = {"": lambda x: x, "relu": torch.relu}


def calibrated(name: str, shape: str, target: str, formats: dict[str, str], behind: str = "") -> Any:
    """A model of one operator, and what it was calibrated with."""
    generator = torch.Generator().manual_seed(len(name) + len(shape))
    x = torch.randn(4, 5, 6, 7, generator=generator)
    function, last = FUNCTIONS[name], BEHIND[behind]
    model = FunctionOf(lambda x, c: last(function(x, c)), torch.randn(SHAPES[shape], generator=generator) + 0.3)
    plan = qhw.plan(model.eval(), target, x, calibration=x, pipeline="ranges-ptq", formats=formats)
    assert {op.where for op in plan.operators} == {"accelerator"}
    return qhw.quantize(model, plan, calibration=x), x


@pytest.mark.parametrize("formats", [{}, {"*": "s8"}], ids=["u8", "s8"])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "-" not in name])
def test_onnxruntime_gives_the_same_codes(name: str, formats: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from qhw_plugins.onnxruntime_executor import OnnxRuntime
    from tests import onnxruntime_support as support
    from tests.machine import has_vnni

    if not has_vnni():
        pytest.skip("cannot verify here: this machine has no VNNI")
    mutated = 0
    for shape in SHAPES:
        result, x = calibrated(name, shape, "onnxruntime/cpu-x86-vnni", formats, "relu" if shape == "row" else "")
        for seed in range(6):
            other = rescaled(result, ("decimal", "random", "power_of_two")[seed % 3], seed, spread=4.0)
            path, given = support.exported(other, tmp_path), input_of(other, x, seed)
            assert support.float_islands(path, tmp_path) == ()
            theirs = OnnxRuntime().load_codes(path)({other.input_names[0]: given.numpy()})
            mine = IntegerModel(other).codes(given)
            found = list(differences(mine, {key: torch.from_numpy(codes) for key, codes in theirs.items()}))
            assert len(found) == 2 and [one for one in found if one.differing] == []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Site, "adds_zero_point_first", opposite(Site.adds_zero_point_first))
                mutated += sum(one.differing for one in differences(IntegerModel(other).codes(given), mine))
    assert mutated > 0


KINDS = {"+": "ADD", "*": "MUL", "-": "SUB"}


@pytest.mark.parametrize("shape", [pytest.param(s, marks=[] if s == "row" else pytest.mark.slow) for s in SHAPES])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_litert_gives_the_same_codes(name: str, shape: str) -> None:
    pytest.importorskip("ai_edge_litert")
    from ai_edge_litert import schema_py_generated as schema  # type: ignore[import-untyped]

    from tests import litert_support as litert

    kind, is_first = KINDS[name[2]], name.startswith("c")
    options = getattr(schema, f"{kind.capitalize()}OptionsT")()
    once, changed = 0, 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        scales = rng.uniform(0.01, 0.1, 3) if seed % 2 else np.array([0.02, 0.04, 0.08])
        scales[2] *= 4 if kind != "MUL" else 0.5
        zeros = [int(zero) for zero in rng.integers(-128, 128, 3)]
        x, c = (litert.Codes(rng.integers(-128, 128, s), np.float32(scale), zero)
                for s, scale, zero in zip(((4, 5, 6, 7), SHAPES[shape]), scales, zeros, strict=False))  # fmt: skip
        output = litert.Codes([], np.float32(scales[2]), zeros[2])
        theirs = litert.run_operator(kind, options, [x], output.encoding, [c], order=[1, 0] if is_first else [0, 1])
        for rule in ("double", "half_even"):
            found = codes_of(FUNCTIONS[name], x, c, output, rule)
            if rule == "double":
                changed += int((found != theirs).sum())
            else:
                once += int((found != theirs).sum())
    assert changed == 0
    assert once > 0


def codes_of(function: Function, x: Any, c: Any, output: Any, rounding: str) -> Any:
    """Codes of the shipped target, with a rounding of ours."""

    def reals(one: Any) -> Tensor:
        return torch.from_numpy(one.array.astype(np.float32) - one.zero_point) * torch.tensor(one.scale)

    def grid(one: Any) -> QParams:
        zero = torch.tensor(one.zero_point, dtype=torch.int32)
        return QParams(torch.tensor(float(one.scale)), zero, -128, 127, PerTensor())

    text = f"""
schema_version = 1
name = "acme/own"
extends = "google/litert-int8"
requantize.rescale = {{ rounding = "{rounding}", source = "memory" }}
requantize.sum = {{ rounding = "{rounding}", source = "memory" }}
"""
    spec = qhw.schema.parse_target(text, find_base=default_registry().target_path)
    graph = qhw.capture(FunctionOf(function, reals(c)).eval(), reals(x))
    plan = qhw.plan(graph, spec, calibration=[reals(x)])
    by_role = {"input": x, "weight": c, "activation": output}
    found = {point.group: grid(by_role[point.role]) for point in plan.points}
    return list(IntegerModel(QuantizedModel(graph, plan, spec, found)).codes(reals(x)).values())[-1].numpy()
