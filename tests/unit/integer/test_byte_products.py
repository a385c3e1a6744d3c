# SPDX-License-Identifier: Apache-2.0
"""Convolutions by the machine's byte instructions, by float32, and by pieces: the same sums as int64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qhw.engine import QuantizedModel
from qhw.integer import IntegerModel, byte_products, pieces
from qhw.integer.byte_products import byte_convolution
from tests import integer_support as reference
from tests.integer_support import S8, U8, W8, Grid, fill, quantized, result_of

RANDOM = st.integers(0, 2**32 - 1)
PHASES = (Phase.explicit, Phase.generate)
HAS_UNIT = byte_products._has_unit()
needs_unit = pytest.mark.skipif(not HAS_UNIT, reason="this machine adds products of bytes in pairs that saturate")


def convolution_of(
    model: nn.Conv2d, rng: np.random.Generator, shape: tuple[int, ...], low: int, zero: int = 0
) -> tuple[QuantizedModel, Any, Any]:
    """The model on random grids with extreme weights, codes for it, and its sums in int64."""
    x = Grid(2.0**-6, int(rng.integers(low, low + 256)), low, low + 255)
    w = Grid(np.full(model.out_channels, 2.0**-7), np.full(model.out_channels, zero), -128, 127, 0)
    b = Grid(np.full(model.out_channels, 2.0**-13), 0, -(2**31), 2**31 - 1)
    x_q, w_q = x.codes(rng, *shape), w.codes(rng, *model.weight.shape)
    fill(model.weight, w.reals(w_q))
    edges = [(int(p), int(p)) for p in model.padding]
    acc = reference.convolution(x.centred(x_q), w.centred(w_q), model.stride, edges, model.dilation, model.groups)
    grids = {"input": x, "weight": w, "result": Grid(2.0**-2)}
    if model.bias is not None:
        b_q = rng.integers(-(2**17), 2**17, model.out_channels)
        fill(model.bias, b.reals(b_q))
        grids["bias"] = b
        acc = acc + b_q[:, None, None]
    spec = reference.target(activation=S8 if low else U8, weight=W8)
    grids["result"] = Grid(np.float32(abs(acc).max() / 100 * 2.0**-13 + 2.0**-20), low + 100, low, low + 255)
    return quantized(model, spec, x.reals(x_q)[:2], grids), x_q, acc


def sums(model: IntegerModel, codes: Any) -> Any:
    (name,) = model.sites
    return model.accumulators(name, torch.from_numpy(codes)).numpy()


@needs_unit
@settings(max_examples=60, phases=PHASES, deadline=None)
@given(st.data())
def test_sums_of_bytes_are_those_of_int64(data: Any) -> None:
    draw = data.draw
    groups, per_in, per_out = draw(
        st.sampled_from([(1, 3, 16), (1, 16, 17), (1, 40, 8), (2, 8, 4), (24, 1, 1), (5, 1, 2)])
    )
    kernel, stride = draw(st.integers(1, 7)), draw(st.sampled_from([1, 2]))
    padding = draw(st.integers(0, kernel // 2))
    size = [max(kernel, 2) + stride + draw(st.integers(0, 7)) for _ in range(2)]
    rng = np.random.default_rng(draw(RANDOM))
    model = nn.Conv2d(groups * per_in, groups * per_out, kernel, stride, padding, 1, groups, draw(st.booleans()))
    shape = (draw(st.integers(1, 4)), groups * per_in, *size)
    result, codes, expected = convolution_of(model, rng, shape, draw(st.sampled_from([-128, 0])))
    found = IntegerModel(result)
    (site,) = found.sites.values()
    if 2 * 255 * 128 * per_in * kernel**2 < 2**24:
        assert byte_convolution(site, None) is not None
    np.testing.assert_array_equal(sums(found, codes), expected)


# oneDNN ends the process on the first, with channels last in memory, and sums bytes wrongly now and then on the others.
UNUSUAL = {
    "one tap spread apart": (nn.Conv2d(40, 8, (3, 1), 2, (2, 1), (2, 3)), (2, 40, 7, 1)),
    "steps over inputs": (nn.Conv2d(1, 1, (5, 3), (1, 4), (1, 1), (2, 1)), (4, 1, 11, 4)),
    "windows of padding": (nn.Conv2d(64, 64, (3, 1), 4, (2, 1), (2, 1)), (2, 64, 3, 2)),
    "larger than the image": (nn.Conv2d(3, 2, 5, 1, 2), (2, 3, 4, 4)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2), (2, 3, 9, 9)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_windows_that_the_unit_is_not_trusted_with_are_summed_in_float32(name: str) -> None:
    model, shape = UNUSUAL[name]
    result, codes, expected = convolution_of(model, np.random.default_rng(0), shape, -128)
    found = IntegerModel(result)
    (site,) = found.sites.values()
    assert byte_convolution(site, None) is None
    np.testing.assert_array_equal(sums(found, codes), expected)


def test_operands_and_sums_that_bytes_or_float32_do_not_hold_go_another_way() -> None:
    rng = np.random.default_rng(0)
    for model, zero in ((nn.Conv2d(2, 3, 3), 5), (nn.Conv2d(150, 2, 3), 0)):
        result, codes, expected = convolution_of(model, rng, (2, model.in_channels, 6, 6), -128, zero)
        if model.in_channels > 2:  # 2 * 255 * 128 * 1,350 > 2^24
            fill(model.weight, torch.full_like(model.weight, -1.0))
        found = IntegerModel(result)
        (site,) = found.sites.values()
        assert byte_convolution(site, None) is None
        np.testing.assert_array_equal(sums(found, codes), expected)


@pytest.mark.parametrize("low", [-128, 0])
def test_a_machine_without_the_unit_or_with_a_false_one_sums_in_float32(
    monkeypatch: pytest.MonkeyPatch, low: int
) -> None:
    rng = np.random.default_rng(1)
    result, codes, expected = convolution_of(nn.Conv2d(16, 8, 3, padding=1), rng, (3, 16, 7, 7), low)
    monkeypatch.setattr(byte_products, "_has_unit", lambda: False)
    model = IntegerModel(result)
    (site,) = model.sites.values()
    assert byte_convolution(site, None) is None
    np.testing.assert_array_equal(sums(model, codes), expected)

    def saturating(*_: object) -> byte_products.Product:
        return lambda values: torch.full((len(values), 8, 7, 7), 32767.0)

    monkeypatch.setattr(byte_products, "_has_unit", lambda: True)
    monkeypatch.setattr(byte_products, "_prepared", saturating)
    assert byte_convolution(site, None) is None
    np.testing.assert_array_equal(sums(IntegerModel(result), codes), expected)


@pytest.mark.parametrize("requantize", [reference.FLOAT32, reference.DOUBLE])
@pytest.mark.parametrize("unit", [False, True])
def test_pieces_make_the_whole(monkeypatch: pytest.MonkeyPatch, unit: bool, requantize: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, 9, 9)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())
    result = reference.calibrated(nn.Sequential(*model, nn.Linear(8 * 49, 5)), reference.target(requantize), x)
    if not unit:
        monkeypatch.setattr(byte_products, "_has_unit", lambda: False)
    whole = IntegerModel(result).codes(x)
    monkeypatch.setattr(pieces, "_PIECE", 1300)  # two samples of the first convolution, three of the second
    by_pieces = IntegerModel(result)
    assert by_pieces.codes(x).keys() == whole.keys()
    for name, codes in by_pieces.codes(x).items():
        assert torch.equal(codes, whole[name]), name
        assert codes.is_contiguous()
    for i in range(7):
        assert torch.equal(result_of_one(by_pieces, x[i : i + 1]), torch.from_numpy(result_of(whole))[i : i + 1])


def result_of_one(model: IntegerModel, x: Tensor) -> Tensor:
    return torch.from_numpy(result_of(model.codes(x)))


class View(nn.Module):
    """A convolution whose result is read row by row, by a view and by an operator of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return torch.sin(y), y.view(y.shape[0], -1)


def test_views_and_operators_of_the_host_read_codes_in_the_float_model_s_order() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 9, 9)
    result = reference.calibrated(View(), reference.target(), x)
    model = IntegerModel(result)
    codes = model.codes(x)
    (name,) = (name for name in codes if name.startswith("conv"))
    grid = reference.grid_of(result, name)
    reals = grid.reals(codes[name].numpy())
    of_host, viewed = model(x)
    assert of_host.is_contiguous()
    assert torch.equal(of_host, torch.sin(reals))
    assert torch.equal(viewed, reals.flatten(1))


def test_a_batch_of_none_gives_none() -> None:
    x = torch.randn(2, 3, 9, 9)
    result = reference.calibrated(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), reference.target(), x)
    assert IntegerModel(result)(x[:0]).shape == (0, 4, 7, 7)
