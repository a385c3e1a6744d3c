# SPDX-License-Identifier: Apache-2.0
"""Palettes end to end: planned, clustered, saved and loaded, sized; their neighbours at the stage leave them alone."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel, quantized_bytes
from qhw.errors import IntegerError, PlanError
from qhw.extension import Registry, load_plugins
from qhw.graph import Graph
from qhw.numerics import PaletteElements, PerAxis, PerTensor
from qhw.schema import parse_target
from qhw_plugins import adaround, batch_norm_folding, float_format, min_max, mse, nearest, palette_format
from tests import pipelines

HEAD = """
schema_version = 1
name = "acme/palette"
formats.x = { bits = 8, signed = true, per = "tensor" }
biases.b = { bits = "float" }
kernels.mac = { input = ["x"], weight = ["w"], bias = "b", output = ["x"] }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }
operators.ConvTranspose = { kernels = ["mac"], fused = ["Relu"] }
fallback = "host"
"""
MODULES = (adaround, batch_norm_folding, float_format, min_max, mse, nearest, palette_format, pipelines)


@pytest.fixture(scope="module")
def registry() -> Registry:
    extra = [(module.__name__.rpartition(".")[2], module) for module in MODULES]
    return load_plugins(block=(), entry_points=(), extra=extra)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def graph(images: Tensor) -> Graph:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2), nn.Flatten(), nn.Linear(245, 4)
    return qhw.capture(nn.Sequential(*layers).eval(), images[:2])


def quantized(graph: Graph, images: Tensor, registry: Registry, palette: str, **wishes: Any) -> QuantizedModel:
    target = parse_target(f'{HEAD}formats.w = {{ kind = "palette", palette = {{ {palette} }} }}\n')
    return qhw.quantize(graph, target, calibration=images, registry=registry, **wishes)


def table_of(result: QuantizedModel, name: str) -> np.ndarray:
    elements = result.quantizer(name).qparams.elements
    assert isinstance(elements, PaletteElements) and elements.table is not None
    return elements.table.numpy()


def test_one_table_of_floats_serves_the_whole_weight(graph: Graph, images: Tensor, registry: Registry) -> None:
    result = quantized(graph, images, registry, 'index_bits = 3, entry = "float16"')
    assert [s.algorithm for s in result.plan.steps if s.stage == "weight_range"] == ["palette_weights"]
    assert [s.algorithm for s in result.plan.steps if s.stage == "round"] == ["nearest"]
    preferred = quantized(graph, images, registry, 'index_bits = 3, entry = "float16"', prefer=("adaround",))
    (refused,) = (r for r in preferred.plan.refused if r.algorithm == "adaround")
    assert "palette codes are not one scale apart" in refused.verdict.sentence()
    table = table_of(result, "0.weight").reshape(-1)
    weight = result.float_graph.tensor("0.weight").detach()
    wanted = table[np.abs(weight.numpy()[..., None] - table).argmin(-1)]
    assert np.array_equal(result.quantizer("0.weight")(weight).detach().numpy(), wanted)
    assert result.quantizer("0.weight").qparams.granularity == PerTensor()
    assert len(table) == 8 and np.array_equal(table.astype(np.float16).astype(np.float32), table)


def test_channels_share_tables_and_have_scales(graph: Graph, images: Tensor, registry: Registry) -> None:
    text = 'index_bits = 2, entry = "float32", group_channels = 4, channel_scale = true'
    result = quantized(graph, images, registry, text)
    qparams = result.quantizer("0.weight").qparams
    weight = result.float_graph.tensor("0.weight").detach()
    assert qparams.granularity == PerAxis(0) and torch.equal(qparams.scale, weight.abs().amax((1, 2, 3)))
    assert table_of(result, "0.weight").shape == (2, 1, 1, 1, 4)
    assert table_of(result, "2.weight").shape == (1, 2, 1, 1, 4)  # transposed: channels along axis 1, 5 of them
    found, table = result.quantizer("0.weight")(weight).detach().numpy(), table_of(result, "0.weight").reshape(2, 4)
    for channel in range(6):
        scale = float(qparams.scale[channel])
        assert np.isin(found[channel], np.float32(table[channel // 4]) * np.float32(scale)).all()


def test_integer_entries_have_a_scale(graph: Graph, images: Tensor, registry: Registry) -> None:
    result = quantized(graph, images, registry, 'index_bits = 4, entry = "int8"')
    table = table_of(result, "0.weight")
    largest = float(result.float_graph.tensor("0.weight").detach().abs().max())
    assert float(result.quantizer("0.weight").qparams.scale) == pytest.approx(largest / 127, rel=1e-6)
    assert np.array_equal(table, table.round()) and np.abs(table).max() <= 127


def test_the_widest_index_that_is_allowed_is_taken(graph: Graph, images: Tensor, registry: Registry) -> None:
    result = quantized(graph, images, registry, 'index_bits = [1, 2, 4], entry = "float16"')
    assert table_of(result, "0.weight").shape[-1] == 16


def test_a_result_is_saved_loaded_and_copied_with_its_tables(
    graph: Graph, images: Tensor, registry: Registry, tmp_path: Path
) -> None:
    result = quantized(graph, images, registry, 'index_bits = 2, entry = "bfloat16", group_channels = 2')
    qhw.save(result, tmp_path / "out", artefact=False, registry=registry)
    loaded = qhw.load(tmp_path / "out", registry=registry)
    assert loaded.encodings() == result.encodings() == deepcopy(result).encodings()
    assert torch.equal(loaded(images), result(images))
    with pytest.raises(IntegerError, match="its weight is in a palette of 4 entries"):
        qhw.verify(loaded, images[:2], registry=registry)


def test_bytes_are_those_of_indexes_tables_and_scales(images: Tensor, registry: Registry) -> None:
    graph = qhw.capture(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), images[:2])
    ends = 2 * (4 + 1)  # scale and zero point of input and output
    plain = quantized(graph, images, registry, 'index_bits = 4, entry = "float16", group_channels = 2')
    assert quantized_bytes(plain) == 54 + 2 * 16 * 2 + 16 + ends  # no scale
    scaled = quantized(graph, images, registry, 'index_bits = 4, entry = "int8", channel_scale = true')
    assert quantized_bytes(scaled) == 54 + 16 + 4 * 4 + 16 + ends


def test_palettes_serve_weights_better_than_an_even_grid(graph: Graph, images: Tensor, registry: Registry) -> None:
    even = parse_target(f'{HEAD}formats.w = {{ bits = 2, signed = true, zero_point = 0, per = "tensor" }}\n')
    grid = qhw.quantize(graph, even, calibration=images, registry=registry)
    palette = quantized(graph, images, registry, 'index_bits = 2, entry = "float32"')

    def error(result: QuantizedModel) -> float:
        weight = result.float_graph.tensor("4.weight").detach()
        return float((result.quantizer("4.weight")(weight) - weight).square().sum())

    assert error(palette) < 0.6 * error(grid)


def test_range_algorithms_leave_palettes_alone_even_where_they_are_preferred(
    graph: Graph, images: Tensor, registry: Registry
) -> None:
    result = quantized(graph, images, registry, 'index_bits = 2, entry = "float16"', prefer=("min_max_weights",))
    assert [s.algorithm for s in result.plan.steps if s.stage == "weight_range"] == ["palette_weights"]


def test_without_its_algorithm_a_palette_has_no_entries(graph: Graph, images: Tensor, registry: Registry) -> None:
    with pytest.raises(PlanError, match=r"no algorithm fits target 'acme/palette' for its weights"):
        quantized(graph, images, registry, 'index_bits = 2, entry = "float16"', without=("palette_weights",))
