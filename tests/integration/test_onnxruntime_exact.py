# SPDX-License-Identifier: Apache-2.0
"""The integer execution of random graphs against onnxruntime: 0 codes differ, where neighbouring arithmetic differs.

A case counts only if onnxruntime's optimized graph holds no float operator. A run counts only if mutants of the
arithmetic, computed operator by operator on the same operands, each give other codes on it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip("onnxruntime")

import qhw
from qhw.engine import QuantizedModel
from qhw.graph import MOVEMENT_KINDS
from qhw.integer import IntegerModel, Site, differences
from qhw.integer.codes import Codes
from qhw.integer.model import Executed
from qhw.numerics import QParams, round_real
from qhw.schema import Requantize
from qhw_plugins.onnxruntime_executor import OnnxRuntime
from tests import onnxruntime_support as support
from tests.machine import has_vnni
from tests.random_grids import SCALES, input_of, rescaled
from tests.random_outcome import Mutant, Outcome, Rule, always, opposite
from tests.random_pairs import every_pair, pairs


def add_case(
    outcome: Outcome,
    result: QuantizedModel,
    inputs: tuple[Tensor, ...],
    folder: Path,
    mutants: Mapping[str, Mutant] | None = None,
    steps: Iterable[str] = (),
) -> None:
    """Run one model in integers and in onnxruntime, and the mutants on the operands of the integer run."""
    path = support.exported(result, folder)
    islands = support.float_islands(path, folder)
    if islands:
        outcome.islands[islands] += 1
        return
    model = IntegerModel(result)  # what cannot be executed exactly is refused: the graphs hold none of it
    run: list[Executed] = []
    reals = model(*inputs, trace=run.append)
    mine = {one.site.members[-1].name: one.result.integers() for one in run if isinstance(one.result, Codes)}
    feed = {name: x.numpy() for name, x in zip(result.input_names, inputs, strict=True)}
    theirs = as_tensors(OnnxRuntime().load_codes(path)(feed))
    kinds = {site.members[-1].name: site.operator.kind for site in model.sites.values()}
    assert {name for name, kind in kinds.items() if kind not in MOVEMENT_KINDS} <= theirs.keys()
    outcome.add(differences(mine, theirs), kinds, steps)
    # What ships shows no codes; it may be optimized otherwise, and must give the same.
    for found, expected in zip(tree_leaves(reals), OnnxRuntime().load(path)(feed), strict=True):
        outcome.differing["output"] += int((found != torch.from_numpy(expected)).sum())
    outcome.add_mutants(mutants or {}, run)


def as_tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same in torch."""
    return {name: torch.from_numpy(codes) for name, codes in arrays.items()}


# The mutants.


def _ratio_in_float64(original: Callable[..., Any]) -> Callable[..., Any]:
    def rescaler(site: Site, ratio: Callable[..., Tensor], zero_point: int, *rest: Any) -> Any:
        return original(site, lambda *_: ratio(torch.float64, torch.float64).float(), zero_point, *rest)

    return rescaler


def _scales_one_by_one(original: Callable[..., Any]) -> Callable[..., Any]:
    def rescaler(site: Site, ratio: Callable[..., Tensor], zero_point: int, *rest: Any) -> Any:
        rule = original(site, ratio, zero_point, *rest)
        second: QParams = site.inputs[1] if site.weight is None else site.weight.qparams
        scale = second.scale if second.scale.numel() == 1 else second.scale.reshape(rule.factor.shape)
        assert site.output is not None
        x, w, y = site.inputs[0].scale, scale, site.output.scale

        def run(acc: Tensor) -> Tensor:
            real = acc.float() * x * w / y
            return (real + zero_point).round() if rule.before else real.round() + zero_point

        return Rule(run)

    return rescaler


def _half_away(original: Callable[..., Any]) -> Callable[..., Any]:
    def rescaler(site: Site, ratio: Callable[..., Tensor], zero_point: int, *rest: Any) -> Any:
        rule = original(site, ratio, zero_point, *rest)
        before, after = (zero_point, 0) if rule.before else (0, zero_point)
        return Rule(lambda acc: round_real(acc.float() * rule.factor + before, "half_away_from_zero") + after)

    return rescaler


def _codes_averaged(original: Any) -> Any:
    from qhw.integer.pooling import lower_average

    return lower_average


def _requantize_by_ratio(site: Site) -> tuple[str, Requantize]:
    name = str(getattr(site.kernel, "requantize", None))
    return f"requantize.{name}", site.target.requantize[name].model_copy(update={"regrid": "ratio"})


def _stated_or_behind(original: property) -> property:
    """The target states no order where it rescales by tables: the mutant's is behind rounding."""
    return property(lambda site: site.spec.rounding_order == "zero_point_before")


def _by_ratio(original: Callable[..., Any]) -> Callable[..., Any]:
    from qhw.integer.codes import is_one_grid
    from qhw.integer.movement import Regridding, rescaler

    def regridded(site: Site, source: QParams, wanted: QParams) -> Any:
        if is_one_grid(source, wanted):
            return original(site, source, wanted)
        zero = int(wanted.zero_point)
        return Regridding(source, wanted, rescaler(site, lambda p, q: source.scale.to(q) / wanted.scale.to(q), zero))

    return regridded


RESCALERS = ("products.rescaler", "elementwise.rescaler", "pooling.rescaler")
MUTANTS: Mapping[str, Mutant] = {
    "ratio in float64": Mutant(
        ("Conv", "DepthwiseConv", "Gemm", "MatMul", "Mul", "GlobalAveragePool"),
        tuple((place, _ratio_in_float64) for place in RESCALERS),
    ),
    "scales one by one": Mutant(
        ("Conv", "DepthwiseConv", "Gemm", "MatMul", "Mul"),
        tuple((place, _scales_one_by_one) for place in RESCALERS[:2]),
    ),
    "half away from zero": Mutant(
        ("Conv", "DepthwiseConv", "Gemm", "MatMul", "Mul", "Add", "AveragePool", "GlobalAveragePool"),
        (
            *((place, _half_away) for place in RESCALERS),
            ("elementwise.rounding_of", always("half_away_from_zero")),
            ("real_average.rounding_of", always("half_away_from_zero")),
        ),
    ),
    "zero point on the other side of rounding": Mutant(
        ("Conv", "DepthwiseConv", "Gemm", "MatMul", "Mul", "Add", "GlobalAveragePool"),
        (("Site.adds_zero_point_first", opposite),),
    ),
    "sums not fused": Mutant(("Add",), (("elementwise.fma_float32", lambda original: lambda a, b, c: a * b + c),)),
    "summands in the other order": Mutant(("Add",), (("elementwise._is_first_broadcast", opposite),)),
    "codes averaged, not reals": Mutant(("AveragePool",), (("real_average._of_reals", _codes_averaged),)),
    "operands of a Concat by a ratio": Mutant(
        ("Concat",), (("movement.regridded", _by_ratio), ("Site.adds_zero_point_first", _stated_or_behind))
    ),
    "a window over the whole image as any other": Mutant(
        ("AveragePool",), (("real_average._is_whole", always(False)),)
    ),
}
PAIRS = {
    name: replace(mutant, kinds=kinds)
    for name, mutant in MUTANTS.items()
    if (kinds := tuple({"Add", "Mul"} & set(mutant.kinds)))
}

QUICK = (0, 2, 4, 5, 6, 8, 11, 12, 15, 17, 22, 28, 30, 34, 38, 39, 53, 65, 79, 154, 344)

# What a run of many draws at least once: it says nothing of what it does not hold.
STEPS = {
    "conv", "depthwise", "grouped", "linear", "matmul", "add", "mul", "concat", "average_pool", "max_pool",
    "max_pool_dilated", "max_pool_ceil", "global_average_pool", "maximum", "minimum", "sigmoid", "leaky_relu",
    "flatten", "reshape", "unsqueeze", "transpose", "slice", "strided_slice", "select", "split", "chunk", "expand",
    "tile", "pixel_shuffle", "relu", "relu6", "clip", "odd_clip", "low_clip", "high_clip",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _machine() -> None:
    if not has_vnni():
        pytest.skip("cannot verify here: this machine has no VNNI")


def run_graphs(seeds: Iterable[int], folder: Path) -> Outcome:
    """Every seed's graph on scales of every kind."""
    outcome = Outcome()
    for seed in seeds:
        drawn = support.calibrated(seed)
        if drawn.hosted:
            outcome.islands[drawn.hosted] += 1
            continue
        for kind in SCALES:
            other = rescaled(drawn.result, kind, seed)
            mutants = None if kind == "random" else MUTANTS  # random scales tell nothing apart
            add_case(outcome, other, (input_of(other, drawn.example, seed),), folder, mutants, drawn.steps)
    return outcome


def test_random_graphs_give_the_codes_of_onnxruntime_and_mutants_do_not(tmp_path: Path) -> None:
    outcome = run_graphs(QUICK, tmp_path)
    outcome.check([(name, mutant.kinds) for name, mutant in MUTANTS.items() if mutant.kinds != ("Add",)])


@pytest.mark.parametrize("formats", [{}, {"*": "s8"}], ids=["u8", "s8"])
@pytest.mark.parametrize("broadcast", ["", "a", "b"])
def test_sums_and_products_of_every_pair_of_codes_are_those_of_onnxruntime(
    tmp_path: Path, broadcast: str, formats: dict[str, str]
) -> None:
    outcome = Outcome()
    for operator in ("add", "mul"):
        result = pairs(operator, support.TARGET, formats, broadcast)
        for seed in range(8):
            kind = ("decimal", "random", "decimal", "power_of_two")[seed % 4]
            other = rescaled(result, kind, seed, spread=4.0)
            add_case(outcome, other, every_pair(other, broadcast), tmp_path, PAIRS)
    outcome.check([(name, (kind,)) for name, mutant in PAIRS.items() for kind in mutant.kinds])


class Mixed(torch.nn.Module):
    """One tensor that is read as uint8 and as int8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.narrow = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both readings."""
        y = self.first(x)
        return self.narrow(y), torch.cat([y, y], 1)


@pytest.mark.parametrize("operator", ["narrow", "concat"])
def test_an_operand_in_another_format_is_dequantized_and_quantized_again(tmp_path: Path, operator: str) -> None:
    # onnxruntime does so in float, between integer operators: the codes of their results are compared.
    torch.manual_seed(0)
    x = torch.randn(4, 3, 10, 10)
    graph = qhw.capture(Mixed().eval(), x)
    formats = {"*": "u8", "*.weight": "w8", operator: "s8"}
    plan = qhw.plan(graph, support.TARGET, calibration=x, pipeline="ranges-ptq", formats=formats)
    assert sum(point.role == "edge" for point in plan.points) == {"narrow": 1, "concat": 2}[operator]
    result = qhw.quantize(graph, plan, calibration=x)
    by_ratio = 0
    for seed in range(12):
        other = rescaled(result, "decimal", seed, spread=3.0)
        given = input_of(other, x, seed)
        theirs = OnnxRuntime().load_codes(support.exported(other, tmp_path))({"x": given.numpy()})
        mine = IntegerModel(other).codes(given)
        assert [one for one in differences(mine, as_tensors(theirs)) if one.differing] == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qhw.integer.movement.Approximation", type("Other", (), {}))
            patch.setattr("qhw.integer.site.Site.requantize", property(_requantize_by_ratio))
            patch.setattr(Site, "adds_zero_point_first", _stated_or_behind(Site.adds_zero_point_first))  # type: ignore[arg-type]
            by_ratio += sum(one.differing for one in differences(IntegerModel(other).codes(given), mine))
    assert by_ratio > 0


@pytest.mark.slow
def test_a_thousand_random_graphs_give_the_codes_of_onnxruntime_and_mutants_do_not(tmp_path: Path) -> None:
    outcome = run_graphs(range(1000), tmp_path)
    assert outcome.cases >= 2900, str(outcome)
    outcome.check([(name, (kind,)) for name, mutant in MUTANTS.items() for kind in mutant.kinds])
    assert outcome.steps.keys() >= STEPS, STEPS - outcome.steps.keys()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(2000, 2**31), kind=st.sampled_from(SCALES))
def test_any_random_graph_gives_the_codes_of_onnxruntime(
    tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str
) -> None:
    drawn = support.calibrated(seed)
    other = rescaled(drawn.result, kind, seed)
    outcome = Outcome()
    add_case(outcome, other, (input_of(other, drawn.example, seed),), tmp_path_factory.mktemp("graph"))
    assert outcome.differing.total() == 0, str(outcome)
