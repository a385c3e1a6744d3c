# SPDX-License-Identifier: Apache-2.0
"""Golden section: minima known by hand, and MSE ranges as good as those of the grid, in a fifth of the evaluations."""

import numpy as np
import pytest
import torch

from qhw.numerics import Grid, Histogram, PerAxis, mse_qparams_from_histogram, mse_qparams_from_tensor
from qhw.numerics.golden import golden_section
from qhw.numerics.mse import least_loss
from qhw.numerics.squared_error import HistogramError
from qhw.testing import reference

SIZE = 5_000
DRAWN = {
    "gauss": lambda rng: rng.normal(0.3, 1.0, SIZE),
    "laplace": lambda rng: rng.laplace(0, 1, SIZE),
    "uniform": lambda rng: rng.uniform(-1, 2, SIZE),
    "student": lambda rng: rng.standard_t(4, SIZE),
    "negative": lambda rng: -np.abs(rng.normal(2, 1, SIZE)),
    "far-outliers": lambda rng: np.concatenate([rng.laplace(0, 1, SIZE), [40.0, -25.0]]),
}
CODES = [(-128, 127), (-8, 7), (-2, 1)]


def sample(kind):
    return np.float32(DRAWN[kind](np.random.default_rng(0)))


def histogram_of(x):
    histogram = Histogram()
    histogram.update(torch.from_numpy(x))
    return histogram


def best_of_a_thousand(x, codes):
    """Least error over 1,000 fractions of the covering scale, by numpy."""
    covering, _ = reference.qparams_from_range(float(x.min()), float(x.max()), *codes, zero_point=0)
    return reference.least_squared_error(x, [(np.float32(covering * i / 1000), 0) for i in range(1, 1001)], *codes)[0]


def error_on(x, qparams):
    return reference.squared_error(x, qparams.scale.item(), 0, qparams.quant_min, qparams.quant_max)


def test_each_function_finds_its_own_minimum() -> None:
    wanted = torch.tensor([0.2, 0.5, 0.999, -1.0, 7.0], dtype=torch.float64)
    for power in (1, 2, 4):
        found = golden_section(lambda x, p=power: (x - wanted).abs() ** p, torch.zeros(5), torch.ones(5), 1e-6)
        # Below 1e-4 the fourth power of a distance is lost beside nothing, so each is found to the tolerance.
        assert torch.allclose(found, wanted.clamp(0, 1), atol=1e-6, rtol=0)


def test_every_interval_has_its_own_width() -> None:
    low, high = torch.tensor([0.0, 10.0, 5.0]), torch.tensor([1.0, 1000.0, 5.0])
    found = golden_section(lambda x: (x - 20.0).square(), low, high, 1e-3)
    assert torch.allclose(found, torch.tensor([1.0, 20.0, 5.0], dtype=torch.float64), atol=1e-3, rtol=0)


def test_evaluations_are_as_few_as_the_section_promises() -> None:
    calls = []
    golden_section(lambda x: calls.append(x) or x.square(), torch.zeros(2), torch.ones(2), 1e-3)
    # 0.618**14 = 0.00119 > 0.001 > 0.618**15: two evaluations make 0.618, each further one shrinks once.
    assert len(calls) == 2 + 14


def test_a_tie_keeps_the_upper_part_and_no_function_is_no_work() -> None:
    assert golden_section(torch.zeros_like, torch.zeros(1), torch.ones(1), 1e-3).item() > 0.999
    assert golden_section(torch.zeros_like, torch.zeros(0), torch.ones(0), 1e-3).shape == (0,)


@pytest.mark.parametrize("codes", CODES, ids=["8-bit", "4-bit", "2-bit"])
@pytest.mark.parametrize("kind", DRAWN)
def test_the_error_is_that_of_the_grid(kind, codes) -> None:
    x, grid = sample(kind), Grid(*codes, 0)
    best = best_of_a_thousand(x, codes)
    # 1 %: rounding gives the error ripples of that size, and the section ends in one of them.
    assert error_on(x, mse_qparams_from_tensor(torch.from_numpy(x), grid, search="golden")) <= best * 1.01
    assert error_on(x, mse_qparams_from_histogram(histogram_of(x), grid, search="golden")) <= best * 1.01


def test_it_takes_a_fifth_of_the_evaluations() -> None:
    x, grid = sample("gauss"), Grid(-8, 7, 0)
    histogram, counts = histogram_of(x), {"grid": 0, "golden": 0}
    for search in ("grid", "golden"):

        def error_of(scale, zero_point, search=search):
            counts[search] += len(scale)
            return HistogramError(histogram, grid)(scale, zero_point)

        least_loss(histogram.min.reshape(1), histogram.max.reshape(1), grid, error_of, search)
    assert counts["grid"] == 1 + 100 + 19
    assert counts["golden"] <= 1 + 8 + 2 + 14


def test_channels_are_searched_at_once_as_alone() -> None:
    w = torch.from_numpy(np.stack([sample("gauss"), 100 * sample("laplace"), 0 * sample("gauss"), sample("uniform")]))
    grid = Grid(-7, 7, 0)
    together = mse_qparams_from_tensor(w, grid, PerAxis(0), search="golden")
    for channel in (0, 1, 3):
        best = best_of_a_thousand(w[channel].numpy(), (-7, 7))
        error = reference.squared_error(w[channel].numpy(), together.scale[channel].item(), 0, -7, 7)
        assert error <= best * 1.01, channel
    # A dead channel gets the largest scale of the others' ranges.
    assert together.scale[2].item() == np.float32(np.abs(w[[0, 1, 3]].double().numpy()).max() / 7)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(0, 15),
        Grid(-8, 7, 0, "power_of_two"),
        Grid(-8, 7, 0, "enumerated", scale_values=(0.1, 0.3, 1.0)),
    ],
    ids=["free-zero-point", "power_of_two", "enumerated"],
)
def test_where_no_section_applies_the_grid_is_searched(grid) -> None:
    x = torch.from_numpy(sample("student"))
    assert mse_qparams_from_tensor(x, grid, search="golden") == mse_qparams_from_tensor(x, grid)


def test_bounds_and_several_zero_points_stay_legal() -> None:
    x = sample("laplace")
    best = best_of_a_thousand(x, (-8, 7))
    covering = max(x.max() / 7, x.min() / -8)
    coarse = [np.float32(1.0), np.float32((1.0 + covering) / 2), np.float32(covering)]
    errors = [reference.squared_error(x, scale, 0, -8, 7) for scale in coarse]
    assert best < errors[0] < errors[1] < errors[2]  # the error grows from the bound on
    bounded = mse_qparams_from_tensor(torch.from_numpy(x), Grid(-8, 7, 0, scale_min=1.0), search="golden")
    assert bounded.scale.item() == 1.0
    two = mse_qparams_from_tensor(torch.from_numpy(x), Grid(0, 15, (0, 8)), search="golden")
    assert two.zero_point.item() == 8  # the other one clips half of the values
    assert reference.squared_error(x, two.scale.item(), 8, 0, 15) <= best * 1.01


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_constants(value) -> None:
    found = mse_qparams_from_tensor(torch.full((50,), value), Grid(-8, 7, 0), search="golden")
    scale, _ = reference.qparams_from_range(value, value, -8, 7, zero_point=0)
    assert found.scale.item() == scale  # no candidate beats the code that is exact
