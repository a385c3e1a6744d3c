# SPDX-License-Identifier: Apache-2.0
"""`qhw accumulators`: proofs, exit status 1 where a sum can overflow, and witnesses that make it do so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Run = Callable[..., Any]

TARGET = """
schema_version = 1
name = "acme/sums"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
biases.b = { bits = 32, scale = "input*weight", applied = "before_requantize" }
accumulators.acc = { bits = BITS, overflow = "wrap" }
requantize.r = { kind = "float32", rounding = "half_even" }
kernels.mac = { input = ["a8"], weight = ["w8"], bias = "b", output = ["a8"], accumulator = "acc", requantize = "r" }
operators.Conv = { kernels = ["mac"], fused = ["Relu"], rounding_order = "zero_point_after" }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"], rounding_order = "zero_point_after" }
"""


@pytest.fixture
def result(folder: Path, qhw_run: Run) -> Callable[[str], str]:
    """Quantizes for a target with an accumulator of that width; nothing is repaired on the way."""

    def make(bits: str) -> str:
        (folder / "sums.toml").write_text(TARGET.replace("BITS", bits))
        ran = qhw_run(
            "quantize", "net:model", "--target", "sums.toml", "--calibration", "net:batches",
            "--out", f"out/{len(bits)}", "--pipeline", "ranges-ptq", "--without", "accumulator_projection",
        )  # fmt: skip
        assert ran.status == 0, ran.err
        return f"out/{len(bits)}"

    return make


def test_a_wide_accumulator_is_proven_with_the_bits_that_are_left(result: Any, qhw_run: Run) -> None:
    ran = qhw_run("accumulators", result("32"))
    assert ran.status == 0, ran.err
    assert "cannot overflow" in ran.out
    rows = json.loads(qhw_run("accumulators", result("32"), "--json").out)["layers"]
    assert [row["operator"] for row in rows] == ["0", "5"]
    assert "Proven 2 operators cannot overflow" in " ".join(ran.out.split())
    assert f"{32 - max(row['bits_needed'] for row in rows)} bits are left in the tightest" in " ".join(ran.out.split())


def test_the_bound_is_the_one_of_the_stored_codes(result: Any, qhw_run: Run) -> None:
    import qhw

    loaded = qhw.load(Path(result("32")))
    rows = {row["operator"]: row for row in json.loads(qhw_run("accumulators", result("32"), "--json").out)["layers"]}
    for name, row in rows.items():
        points = {p.role: p for p in loaded.plan.points if p.operator == name and p.role in ("weight", "bias")}
        weight, bias = (loaded.codes(points[role]).long().numpy() for role in ("weight", "bias"))
        source = next(p for p in loaded.plan.points if name in p.consumers and p.role in ("input", "activation"))
        grid = loaded.encodings()[source.group]
        low, high = grid.quant_min - int(grid.zero_point), grid.quant_max - int(grid.zero_point)
        flat = weight.reshape(len(weight), -1)
        ends = np.stack([flat * low, flat * high])
        assert row["highest"] == int((ends.max(0).sum(1) + bias.clip(min=0)).max())
        assert row["lowest"] == int((ends.min(0).sum(1) + bias.clip(max=0)).min())


def test_twelve_bits_overflow_with_status_1_and_the_written_witness_overflows_when_it_is_replayed(
    result: Any, qhw_run: Run, folder: Path
) -> None:
    import qhw
    from qhw.integer import IntegerModel

    place = result("12")
    ran = qhw_run("accumulators", place, "--witness", "witness.npz")
    assert ran.status == 1
    assert ran.err == ""
    assert "can overflow in" in ran.out
    assert "Can overflow 0, 5" in " ".join(ran.out.split())
    rows = {row["operator"]: row for row in json.loads(qhw_run("accumulators", place, "--json").out)["layers"]}
    model = IntegerModel(qhw.load(Path(place)))
    with np.load(folder / "witness.npz") as arrays:
        assert sorted(arrays) == sorted(rows)
        for name, row in rows.items():
            assert row["overflowing_channels"] > 0
            value, channel = row["witness"]["value"], row["witness"]["channel"]
            assert not -(2**11) <= row["witness"]["peak"] < 2**11
            replayed = model.accumulators(name, torch.from_numpy(arrays[name]))[0, channel].flatten().tolist()
            # The target wraps: the replayed sum is the witness's but for multiples of 2^12.
            assert any((got - value) % 2**12 == 0 for got in replayed)
            assert all(-(2**11) <= got < 2**11 for got in replayed)


def test_a_width_that_is_not_known_is_said_and_is_no_overflow(result: Any, qhw_run: Run) -> None:
    place = result('"unknown"')
    ran = qhw_run("accumulators", place)
    assert ran.status == 0, ran.err
    assert "width not known" in ran.out
    assert "the accumulator's width of 2 operators" in " ".join(ran.out.split())
    assert all(row["bits"] is None for row in json.loads(qhw_run("accumulators", place, "--json").out)["layers"])


def test_a_witness_that_cannot_be_written_and_a_result_that_is_none_are_one_line(result: Any, qhw_run: Run) -> None:
    for arguments, word in (((result("32"), "--witness", "no/such/w.npz"), "no/such/w.npz"), (("nowhere",), "nowhere")):
        ran = qhw_run("accumulators", *arguments)
        assert ran.status == 1
        assert len(ran.err.strip().splitlines()) == 1
        assert ran.err.startswith("error: ") and word in ran.err
    ran = qhw_run("accumulators", result("32"), "--witness", "no/such/w.npz")
    assert "cannot be written: No such file or directory. Choose another --witness." in ran.err


def test_json_names_the_target_the_units_and_the_version(result: Any, qhw_run: Run) -> None:
    found = json.loads(qhw_run("accumulators", result("32"), "--json").out)
    assert (found["schema_version"], found["target"]) == (1, "acme/sums")
    assert found["units"] == {
        "lowest, highest, value, peak": "accumulator codes; one is input scale * weight scale of its channel",
        "bits, bits_needed": "bits, the sign included",
    }
    assert all(row["bias_left_out"] is None for row in found["layers"])


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('bias = "b", ', "", "kernels.mac.bias"),
        ('bias = "b", ', 'bias = "unknown", ', "kernels.mac.bias"),
        ("biases.b = { bits = 32,", "biases.b = {", "biases.b.bits"),
    ],
    ids=["absent", "unknown", "no bits"],
)
def test_a_bias_that_the_target_leaves_open_is_in_no_sum_and_said(
    folder: Path, qhw_run: Run, old: str, new: str, field: str
) -> None:
    (folder / "sums.toml").write_text(TARGET.replace("BITS", "32").replace(old, new))
    quantized = (
        "quantize",
        "net:model",
        "-t",
        "sums.toml",
        "-c",
        "net:batches",
        "-o",
        "out",
        "--pipeline",
        "ranges-ptq",
    )
    assert qhw_run(*quantized).status == 0
    ran = qhw_run("accumulators", "out")
    words = " ".join(ran.out.split())
    assert f"Left out the bias of 2 operators: the target does not state {field}" in words
    assert "; the sums of products alone, without the biases that are left out" in words
    assert "bits left, its bias left out" in ran.out
    assert {row["bias_left_out"] for row in json.loads(qhw_run("accumulators", "out", "--json").out)["layers"]} == {
        field
    }


def test_a_result_without_sums_of_integers_says_so(folder: Path, qhw_run: Run) -> None:
    weight = 'kind = "float", bits = 8, exponent_bits = 4, mantissa_bits = 3, finite_max = 448.0, zero_point = 0'
    text = TARGET.replace("codes = [-127, 127], zero_point = 0", weight).replace("BITS", "32")
    (folder / "floats.toml").write_text(text)
    ran = qhw_run(
        "quantize", "net:model", "--target", "floats.toml", "--calibration", "net:batches", "--out", "out/floats"
    )
    assert ran.status == 0, ran.err
    ran = qhw_run("accumulators", "out/floats")
    assert (ran.status, "verdict" in ran.out) == (0, False)
    said = "Sums none to prove: no operator here sums products of integer activations and weights"
    assert said in " ".join(ran.out.split())
