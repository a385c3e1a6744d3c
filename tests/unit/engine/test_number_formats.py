# SPDX-License-Identifier: Apache-2.0
"""Numbers beyond integers through the engine: planned, simulated, saved, trained; a stranger's kind as well as ours."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel, quantized_bytes
from qhw.errors import IntegerError, PlanError, PluginError, ResultError, TargetError
from qhw.extension import NumberFormat, PluginInfo, Registry, hookimpl
from qhw.graph import Graph
from qhw.numerics import ElementSet, FloatElements, ListedElements
from qhw.schema import Format, TargetSpec, parse_target
from qhw_plugins import float_format

HEAD = """
schema_version = 1
name = "acme/numbers"
biases.b = { bits = "float" }
accumulators.acc = { kind = "float", bits = 32 }
kernels.mac = { input = ["x"], weight = ["w"], bias = "b", output = ["x"], accumulator = "acc" }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }
fallback = "host"
"""
E4M3 = 'kind = "float", exponent_bits = 4, mantissa_bits = 3, finite_max = 448.0'
FP8 = f'formats.x = {{ {E4M3}, per = "tensor" }}\nformats.w = {{ {E4M3}, per = "out_channel" }}'
BIPOLAR = (
    'formats.x = { bits = 8, signed = true, per = "tensor" }\nformats.w = { code_set = [-1, 1], per = "out_channel" }'
)
TAPER = (
    'formats.x = { bits = 8, signed = true, per = "tensor" }\n'
    'formats.w = { kind = "taper", parameters = { steps = 3 }, per = "out_channel" }'
)


class Taper(NumberFormat):
    """Numbers that lie closer near 0, as posits do: 0 and +-k^2."""

    name = "taper"
    summary = "Squares."

    def problem(self, spec: Format) -> str | None:
        given: Any = spec.parameters
        if not isinstance(given, dict) or not isinstance(given.get("steps"), int):
            return "parameters.steps: must be an integer"
        return None

    def elements(self, spec: Format) -> ElementSet:
        given: Any = spec.parameters
        codes = range(-given["steps"], given["steps"] + 1)
        return ListedElements(tuple(float(c * abs(c)) for c in codes), tuple(codes))


def plugin(*kinds: Any) -> Any:
    class Stranger:
        @hookimpl
        def qhw_plugin_info(self) -> PluginInfo:
            return PluginInfo(api=1, summary="numbers")

        @hookimpl
        def qhw_register_number_formats(self) -> list[Any]:
            return list(kinds)

    return Stranger()


@pytest.fixture(scope="module")
def numbers(load: Callable[..., Registry]) -> Registry:
    return load(("float_format", float_format), ("taper", plugin(Taper)))


def spec(formats: str) -> TargetSpec:
    return parse_target(f"{HEAD}{formats}\n")


@pytest.fixture(scope="module")
def made(graph: Graph, images: Tensor, numbers: Registry) -> Callable[[str], QuantizedModel]:
    """The small network on a target with these formats."""
    kept: dict[str, QuantizedModel] = {}

    def make(formats: str) -> QuantizedModel:
        if formats not in kept:
            kept[formats] = qhw.quantize(graph, spec(formats), calibration=images[:64], registry=numbers)
        return kept[formats]

    return make


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    found: np.ndarray = values[np.abs(x[..., None] - values).argmin(-1)]
    return found


@pytest.mark.parametrize(
    ("formats", "elements"),
    [
        (FP8, FloatElements(4, 3, 448.0)),
        (BIPOLAR, ListedElements((-1.0, 1.0), (-1, 1))),
        (TAPER, ListedElements((-9.0, -4.0, -1.0, 0.0, 1.0, 4.0, 9.0), tuple(range(-3, 4)))),
    ],
    ids=["float", "code set", "a stranger's"],
)
def test_weights_go_to_the_nearest_of_the_formats_numbers(
    made: Callable[[str], QuantizedModel], formats: str, elements: ElementSet
) -> None:
    result = made(formats)
    point = next(p for p in result.plan.points if p.role == "weight")
    qparams = result.quantizer(point.name).qparams
    assert qparams.elements == elements
    codes = torch.arange(elements.code_bounds[0], elements.code_bounds[1] + 1)
    values = elements.decode(codes)
    values = values[~values.isnan()].double().numpy()
    weight = result.float_graph.tensor(point.tensor).detach()
    scale = qparams.scale.reshape(-1, 1, 1, 1)
    wanted = nearest((weight / scale).double().numpy(), values) * scale.double().numpy()
    found = result.quantizer(point.name)(weight)
    # Ties of a random weight do not happen; float32 products differ from float64 ones in the last place.
    assert np.allclose(found.detach().numpy(), wanted, rtol=1e-6, atol=0)
    assert torch.equal(result.codes(point), elements.encode(elements.round_to(weight / scale)))


@pytest.mark.parametrize("formats", [FP8, BIPOLAR, TAPER], ids=["float", "code set", "a stranger's"])
def test_a_result_is_saved_loaded_and_copied_with_its_numbers(
    made: Callable[[str], QuantizedModel], formats: str, numbers: Registry, images: Tensor, tmp_path: Path
) -> None:
    result = made(formats)
    qhw.save(result, tmp_path / "out", artefact=False, registry=numbers)
    loaded = qhw.load(tmp_path / "out", registry=numbers)
    assert loaded.encodings() == result.encodings() == deepcopy(result).encodings()
    assert torch.equal(loaded(images[:8]), result(images[:8]))


def test_a_result_without_its_plugin_is_one_line(
    made: Callable[[str], QuantizedModel], registry: Registry, numbers: Registry, tmp_path: Path
) -> None:
    qhw.save(made(TAPER), tmp_path / "out", artefact=False, registry=numbers)
    with pytest.raises(
        ResultError,
        match=r"out: cannot be read: acme/numbers: formats\.w\.kind: no installed plugin brings .* 'taper'",
    ):
        qhw.load(tmp_path / "out", registry=registry)


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (
            TAPER.replace('"taper"', '"tapir"'),
            r"formats\.w\.kind: no installed plugin brings the number format 'tapir'\. "
            r"Installed: integer, float, taper\. Closest: taper\. Install its plugin, or choose another format\.",
        ),
        (TAPER.replace("steps = 3", "step = 3"), r"formats\.w\.parameters\.steps: must be an integer\. Choose another"),
        (
            FP8.replace("mantissa_bits = 3", "mantissa_bits = 22"),
            r"exponent_bits: float .* must have 1 to 8 and",
        ),
    ],
)
def test_numbers_that_nobody_knows_are_refused_when_planning(
    graph: Graph, numbers: Registry, formats: str, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        qhw.plan(graph, spec(formats), calibration=torch.zeros(2, 3, 8, 8), registry=numbers)


def test_an_open_number_leaves_the_operator_to_the_host(graph: Graph, numbers: Registry) -> None:
    text = FP8.replace(", finite_max = 448.0", "")
    plan = qhw.plan(graph, spec(text), calibration=torch.zeros(2, 3, 8, 8), registry=numbers)
    conv = next(op for op in plan.operators if op.name == "conv1")
    assert (conv.where, conv.reason) == ("host", 'formats.x.finite_max: absent; kind = "float" needs it')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"elements": lambda self, spec: [1.0]}, r"number format 'taper': elements must return ElementSet; got list"),
        ({"elements": lambda self, spec: 1 / 0}, r"number format 'taper': elements raised ZeroDivisionError"),
        ({"problem": lambda self, spec: 3}, r"number format 'taper': problem must return str; got int"),
    ],
)
def test_a_plugin_that_breaks_its_word_is_named(
    graph: Graph, load: Callable[..., Registry], change: dict[str, Any], message: str
) -> None:
    broken = load(("stranger", plugin(type("Broken", (Taper,), change))))
    with pytest.raises(PluginError, match=rf"plugin 'stranger' .*plugin author: {message}"):
        qhw.plan(graph, spec(TAPER), calibration=torch.zeros(2, 3, 8, 8), registry=broken)


def test_a_contiguous_code_set_is_a_range_of_integers(graph: Graph, images: Tensor, numbers: Registry) -> None:
    listed = BIPOLAR.replace("[-1, 1]", "[-1, 0, 1]")
    ranged = BIPOLAR.replace("code_set = [-1, 1]", "codes = [-1, 1], zero_point = 0")
    one, other = (
        qhw.quantize(graph, spec(text), calibration=images[:32], registry=numbers) for text in (listed, ranged)
    )
    assert one.encodings() == other.encodings()


def test_integer_execution_says_why_it_has_no_form(
    made: Callable[[str], QuantizedModel], numbers: Registry, images: Tensor
) -> None:
    with pytest.raises(IntegerError, match=r"Conv has no integer form: its input is in 8-bit floats \(e4m3\) \(conv1"):
        qhw.verify(made(FP8), images[:4], registry=numbers)
    with pytest.raises(IntegerError, match="its weight is in a set of 2 codes"):
        qhw.verify(made(BIPOLAR), images[:4], registry=numbers)
    assert list(qhw.integer.prove_accumulators(made(FP8))) == []


def test_a_format_of_another_kind_is_no_field_of_an_integer() -> None:
    with pytest.raises(TargetError, match="exponent_bits: needs kind"):
        spec('formats.x = { exponent_bits = 4, per = "tensor" }\nformats.w = { kind = "float", per = "tensor" }')


def test_floats_count_their_bits(images: Tensor, numbers: Registry) -> None:
    graph = qhw.capture(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), images[:2])
    half = 'kind = "float", exponent_bits = 2, mantissa_bits = 1, finite_max = 6.0'
    text = f'formats.x = {{ {E4M3}, per = "tensor" }}\nformats.w = {{ {half}, per = "out_channel" }}'
    scaled = text.replace('per = "out_channel"', 'per = "out_channel", scale = { kind = "e8m0" }')
    plain, powers = (qhw.quantize(graph, spec(t), calibration=images[:32], registry=numbers) for t in (text, scaled))
    # 108 codes of 4 bits, 4 biases of 4 bytes, 2 activation scales of 4 bytes, no zero points; 4 weight scales
    assert quantized_bytes(plain) == 54 + 16 + 8 + 4 * 4
    assert quantized_bytes(powers) == 54 + 16 + 8 + 4 * 1
