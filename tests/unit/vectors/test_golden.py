# SPDX-License-Identifier: Apache-2.0
"""Golden vectors: a script without qhw recomputes them, names what was changed, and a C compiler takes the header."""

import ast
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qhw
from qhw.errors import CalibrationError, IntegerError, ResultError
from qhw.vectors import check as golden_check
from qhw.vectors.header import _Names

TARGET = """
schema_version = 1
name = "acme/exact"
fallback = "host"
formats.a = { ACTIVATION, per = "tensor" }
formats.w = { WEIGHT, zero_point = 0, per = "out_channel" }
biases.b = { bits = 32, scale = "input*weight", applied = "before_requantize" }
accumulators.acc = { bits = BITS, overflow = "wrap" }
requantize.r = { REQUANTIZE }
kernels.mac = { input = ["a"], weight = ["w"], bias = "b", output = ["a"], accumulator = "acc", requantize = "r" }
kernels.two = { input = ["a"], output = ["a"], bias = "none", accumulator = "acc", requantize = "r" }
ROWS
boundary = { inputs = "quantized", outputs = "OUTPUTS" }
"""
FLOAT32 = 'kind = "float32", rounding = "half_even"'
FIXED = 'kind = "fixed_point", rounding = "{}", multiplier_bits = {}, shift = {{ min = -30, max = 31 }}'
SHIFT = 'kind = "shift", rounding = "{}", shift = {{ min = -31, max = 31 }}'
ROUNDINGS = ("half_even", "half_away_from_zero", "half_to_plus_infinity", "floor", "toward_zero")
SUMS = ("Conv", "DepthwiseConv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "AveragePool", "ReduceSum")
MEANS = ("GlobalAveragePool", "ReduceMean")
SAME = ("MaxPool", "GlobalMaxPool", "ReduceMax", "Transpose", "Pad", "Slice", "Reshape", "Flatten")


def target(
    requantize: str,
    *,
    order: str = "zero_point_after",
    power: bool = False,
    bits: int = 32,
    outputs: str = "quantized",
    text: str = TARGET,
) -> qhw.TargetSpec:
    from qhw.schema import parse_target

    more = f', rounding_order = "{order}"'
    rows = {
        **{kind: f'kernels = ["mac"], fused = ["Relu", "Clip"]{more}' for kind in SUMS[:4]},
        **{kind: f'kernels = ["two"], fused = ["Relu"]{more}' for kind in (*SUMS[4:], *MEANS)},
        "Concat": f'kernels = ["two"], same_scale = "none"{more}',
        "Sigmoid": 'kernels = ["two"], approximation = { kind = "table" }',
        **{kind: 'kernels = ["two"], same_scale = "input_output"' for kind in SAME[:3]},
        **dict.fromkeys(SAME[3:], 'same_scale = "input_output"'),
    }
    for kind in ("Add", "Sub"):
        rows[kind] += ", preshift_bits = { a = 20 }"
    scale = (
        ', zero_point = 0, scale = { kind = "power_of_two", exponent_min = -40, exponent_max = 40 }' if power else ""
    )
    text = text.replace("ROWS", "\n".join(f"operators.{kind} = {{ {row} }}" for kind, row in rows.items()))
    text = text.replace("ACTIVATION", "bits = 8, signed = true" + scale)
    text = text.replace("WEIGHT", "bits = 8, signed = true" + scale.replace(", zero_point = 0", ""))
    return parse_target(text.replace("REQUANTIZE", requantize).replace("BITS", str(bits)).replace("OUTPUTS", outputs))


class Products(nn.Module):
    """Convolutions of every form, and what needs no rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(6, 6, 3, padding="same", dilation=2, groups=2)
        self.depthwise = nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=6, bias=False)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.last = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = self.depthwise(torch.nn.functional.relu6(self.dilated(x)))
        x = torch.nn.functional.max_pool2d(self.up(x), 3, 2, 1)
        return self.last(x.amax((2, 3)))


class Everything(Products):
    """Two-operand sums, means, a table, tensors that move and that join, and a product of two activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        y = self.dilated(x)
        x = torch.relu(x + y) - y * x
        x = torch.cat([x, torch.sigmoid(y)], 1)
        x = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (1, 1, 0, 0)), 2, padding=1)
        tokens = x.flatten(2).transpose(1, 2)
        x = torch.matmul(tokens, tokens.transpose(1, 2))
        return self.last(x.mean(1)[:, :4])


def quantized(
    net: nn.Module, spec: qhw.TargetSpec | str, without: tuple[str, ...] = ()
) -> tuple[qhw.QuantizedModel, torch.Tensor]:
    torch.manual_seed(0)
    data = torch.randn(8, 3, 9, 8)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return qhw.quantize(
        net.eval(), spec, example_inputs=data, calibration=data, pipeline="ranges-ptq", without=without
    ), data


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as an engineer runs it: no path but that of the interpreter's own packages."""
    command = [sys.executable, "-I", str(folder / "check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)


def check_all(folder: Path, layers: int, samples: int) -> None:
    ran = python(folder)
    assert (ran.returncode, ran.stdout) == (0, f"{layers} layers recomputed, {samples} sample(s): nothing differs\n")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of two samples for a fixed-point target."""
    result, data = quantized(Everything(), target(FIXED.format("double", 31)))
    return qhw.golden(result, tmp_path_factory.mktemp("golden") / "vectors", data, samples=2).folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "vectors"))


CASES = {
    **{f"float32-{rule}": f'kind = "float32", rounding = "{rule}"' for rule in ROUNDINGS},
    **{f"fixed_point-{rule}": FIXED.format(rule, 31) for rule in (*ROUNDINGS, "double")},
    "fixed_point-15-bits": FIXED.format("half_to_plus_infinity", 15),
}


@pytest.mark.parametrize("requantize", CASES.values(), ids=CASES.keys())
@pytest.mark.slow
def test_the_script_recomputes_every_operator_by_every_requantization(requantize: str, tmp_path: Path) -> None:
    result, data = quantized(Everything(), target(requantize))
    made = qhw.golden(result, tmp_path / "v", data, samples=2)
    kinds = {op["kind"] for op in manifest_of(tmp_path / "v")["operators"]}
    assert kinds >= {"Add", "Sub", "Mul", "Concat", "Sigmoid", "AveragePool", "MatMul", "Gemm", "Transpose", "Pad"}
    check_all(tmp_path / "v", len(made.operators), 2)


@pytest.mark.parametrize("rule", ROUNDINGS)
def test_a_target_of_shifts_is_recomputed(rule: str, tmp_path: Path) -> None:
    result, data = quantized(Products(), target(SHIFT.format(rule), power=True))
    made = qhw.golden(result, tmp_path / "v", data, samples=3)
    kinds = [op["kind"] for op in manifest_of(tmp_path / "v")["operators"]]
    assert kinds == ["Conv", "Conv", "DepthwiseConv", "ConvTranspose", "MaxPool", "GlobalMaxPool", "Gemm"]
    check_all(tmp_path / "v", len(made.operators), 3)


def test_a_zero_point_that_is_added_first_and_sums_by_fused_multiply_add(tmp_path: Path) -> None:
    result, data = quantized(Everything(), target(FLOAT32, order="zero_point_before"))
    made = qhw.golden(result, tmp_path / "v", data, samples=2)
    rules = {op["rule"] for op in manifest_of(tmp_path / "v")["operators"]}
    assert "add_fused_float32" in rules
    check_all(tmp_path / "v", len(made.operators), 2)


def test_sums_that_wrap_are_recomputed_before_and_behind_the_bias(tmp_path: Path) -> None:
    result, data = quantized(Products(), target(FLOAT32, bits=12), without=("accumulator_projection",))
    made = qhw.golden(result, tmp_path / "v", data, samples=1)
    sums = {op["name"]: op["accumulator"] for op in manifest_of(tmp_path / "v")["operators"] if op["accumulator"]}
    assert any(not one["lowest"] >= -(2**11) or not one["highest"] < 2**11 for one in sums.values())
    arrays = np.load(tmp_path / "v" / "vectors.npz")
    assert all(np.abs(arrays[f"{name}/accumulator"].astype(int)).max() <= 2**11 for name in sums)
    check_all(tmp_path / "v", len(made.operators), 1)


def test_a_result_that_leaves_in_float_has_sums_but_no_codes(tmp_path: Path) -> None:
    result, data = quantized(Products(), target(FLOAT32, outputs="float"))
    made = qhw.golden(result, tmp_path / "v", data)
    last = manifest_of(tmp_path / "v")["operators"][-1]
    assert last["output"]["array"] is None and last["accumulator"]["array"] == f"{last['name']}/accumulator"
    assert "float32" in last["facts"]["unit"]
    check_all(tmp_path / "v", len(made.operators), 1)


@pytest.mark.parametrize("name", ["onnxruntime/cpu-x86-vnni", "google/litert-int8"])
def test_shipped_targets_are_recomputed(name: str, tmp_path: Path) -> None:
    result, data = quantized(Residual(), name)
    made = qhw.golden(result, tmp_path / "v", data, samples=2)
    assert made.samples == 2 and len(made.operators) >= 5
    check_all(tmp_path / "v", len(made.operators), 2)


class Regridded(Products):
    """Sums on 8 bits read by operators on 16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return torch.cat([x * torch.sigmoid(x), self.dilated(x)], 1)


@pytest.mark.parametrize("requantize", [FLOAT32, FIXED.format("double", 31), FIXED.format("floor", 15)])
def test_an_operand_that_is_put_on_another_grid_is_recomputed_too(requantize: str, tmp_path: Path) -> None:
    wide = 'formats.h = { bits = 16, signed = true, zero_point = 0, per = "tensor" }\nformats.w ='
    text = TARGET.replace("formats.w =", wide)
    text = text.replace(
        'kernels.two = { input = ["a"], output = ["a"]', 'kernels.two = { input = ["h"], output = ["h"]'
    )
    result, data = quantized(Regridded(), target(requantize, text=text))
    made = qhw.golden(result, tmp_path / "v", data, samples=2)
    before = [one for op in manifest_of(tmp_path / "v")["operators"] for one in op["inputs"] if "before" in one]
    assert {(one["before"]["dtype"], one["dtype"]) for one in before} == {("int8", "int16")}
    check_all(tmp_path / "v", len(made.operators), 2)


class Means(Products):
    """Averages over windows and over axes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.avg_pool2d(self.first(x), 3, 2, 1, count_include_pad=False)
        return x.mean((2, 3))


@pytest.mark.parametrize("name", ["onnxruntime/cpu-x86-vnni", "google/litert-int8"])
def test_averages_of_shipped_targets_are_recomputed(name: str, tmp_path: Path) -> None:
    result, data = quantized(Means(), name)
    made = qhw.golden(result, tmp_path / "v", data, samples=2)
    check_all(tmp_path / "v", len(made.operators), 2)


class Residual(nn.Module):
    """What ResNets are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.depthwise(x))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def test_codes_are_those_of_the_integer_model_and_operators_hand_them_on(written: Path) -> None:
    from qhw.integer import IntegerModel

    result, data = quantized(Everything(), target(FIXED.format("double", 31)))
    codes = IntegerModel(result).codes(data[:2])
    arrays = np.load(written / "vectors.npz")
    outputs = {op["output"]["tensor"]: arrays[op["output"]["array"]] for op in manifest_of(written)["operators"]}
    assert list(outputs) == [name for name in codes if name != "x"]
    for name, expected in outputs.items():
        np.testing.assert_array_equal(expected, codes[name].numpy())
    np.testing.assert_array_equal(arrays["inputs/x"], codes["x"].numpy())


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def test_the_manifest_says_what_the_files_hold(written: Path) -> None:
    manifest = manifest_of(written)
    assert (manifest["schema_version"], manifest["qhw"], manifest["samples"]) == (1, qhw.__version__, 2)
    assert manifest["target"]["name"] == "acme/exact" and len(manifest["target"]["fingerprint"]) == 64
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((written / name).read_bytes()).hexdigest() == digest
    arrays = np.load(written / "vectors.npz", allow_pickle=False)
    assert list(arrays) == list(manifest["arrays"])
    for key, facts in manifest["arrays"].items():
        assert arrays[key].dtype.kind in "iu" and arrays[key].dtype.name == facts["dtype"]
        assert hashlib.sha256(arrays[key].tobytes()).hexdigest() == facts["sha256"]
    listed = [one["key"] for op in manifest["operators"] for one in op["arrays"]]
    assert listed == [key for key in arrays if not key.startswith("inputs/")]


def test_float_factors_are_exact_and_their_bits_are_those(tmp_path: Path) -> None:
    result, data = quantized(Products(), target(FLOAT32))
    qhw.golden(result, tmp_path / "v", data)
    first = manifest_of(tmp_path / "v")["operators"][0]
    scale = {name: np.float32(first[name]["scale"]) for name in ("weight", "output")}
    expected = np.float32(first["inputs"][0]["scale"]) * scale["weight"] / scale["output"]
    found = np.array([float.fromhex(text) for text in first["requantize"]["float32"]])
    np.testing.assert_array_equal(found, expected.astype(np.float64))
    assert np.array(first["requantize"]["bits"], np.uint32).view(np.float32).tolist() == found.tolist()
    assert first["requantize"]["shape"] == [6, 1, 1]


def test_the_same_vectors_have_the_same_bytes(written: Path, tmp_path: Path) -> None:
    result, data = quantized(Everything(), target(FIXED.format("double", 31)))
    qhw.golden(result, tmp_path / "again", data, samples=2)
    for file in written.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with np.load(folder / "vectors.npz") as loaded:
        arrays = dict(loaded)
    change(arrays)
    np.savez(folder / "vectors.npz", **arrays)


def keys(folder: Path) -> Iterator[str]:
    return (one["key"] for op in manifest_of(folder)["operators"] for one in op["arrays"])


def test_one_code_that_is_changed_in_any_array_names_its_layer(copied: Path) -> None:
    original = (copied / "vectors.npz").read_bytes()
    rng = np.random.default_rng(0)
    for key in keys(copied):
        (copied / "vectors.npz").write_bytes(original)

        def change(arrays: dict[str, Any], key: str = key) -> None:
            flat = arrays[key].reshape(-1)
            flat[rng.integers(flat.size)] ^= 1

        rewrite(copied, change)
        with pytest.raises(golden_check.Differs, match=f"^{key.rpartition('/')[0]}[ :]"):
            golden_check.check_vectors(golden_check.Vectors(copied))


@pytest.mark.parametrize("part", ["weight", "accumulator", "output"])
def test_the_script_ends_with_status_1_and_the_first_layer_that_differs(copied: Path, part: str) -> None:
    key = next(key for key in keys(copied) if key.endswith(f"/{part}"))

    def change(arrays: dict[str, Any]) -> None:
        arrays[key].reshape(-1)[3] += 1

    rewrite(copied, change)
    ran = python(copied)
    assert ran.returncode == 1 and ran.stdout.startswith(f"DIFFERS {key.rpartition('/')[0]} (Conv): ")
    assert "recomputed" in ran.stdout and "Traceback" not in ran.stderr


def test_one_byte_that_is_changed_in_the_file_names_a_layer(copied: Path) -> None:
    content = bytearray((copied / "vectors.npz").read_bytes())
    with zipfile.ZipFile(copied / "vectors.npz") as archive:
        members = archive.infolist()[1::7]
    for member in members:
        position = member.header_offset + 30 + len(member.filename) + 20 + member.compress_size // 2  # in its data
        content[position] ^= 0x10
        (copied / "vectors.npz").write_bytes(content)
        ran = python(copied)
        assert ran.returncode == 1 and ran.stdout.startswith(f"DIFFERS {member.filename.partition('/')[0]}: ")
        content[position] ^= 0x10


def test_one_digit_that_is_changed_in_the_header_is_told_and_a_header_that_is_gone_is_not(copied: Path) -> None:
    content = bytearray((copied / "vectors.h").read_bytes())
    position = max(place for place, byte in enumerate(content) if chr(byte) in "123456789")
    content[position] ^= 1
    (copied / "vectors.h").write_bytes(content)
    ran = python(copied)
    assert (ran.returncode, ran.stdout) == (1, "DIFFERS vectors.h was changed since it was written (SHA-256)\n")
    (copied / "vectors.h").unlink()
    assert python(copied).returncode == 0


def test_an_engineer_s_own_dump_is_compared(copied: Path) -> None:
    loaded = dict(np.load(copied / "vectors.npz"))
    outputs = {key: array for key, array in loaded.items() if key.endswith("/output")}
    dump = copied / "mine.npz"
    np.savez(dump, **{key: array.astype(np.int32).ravel() for key, array in outputs.items()}, other=np.zeros(1))
    ran = python(copied, "--output", str(dump))
    expected = f"{len(outputs)} arrays compared: nothing differs; not in the vectors: other\n"
    assert (ran.returncode, ran.stdout) == (0, expected)
    third = list(outputs)[2]
    outputs[third].reshape(-1)[0] ^= 1
    outputs[list(outputs)[4]].reshape(-1)[0] ^= 1
    np.savez(dump, **outputs)
    ran = python(copied, "--output", str(dump))
    assert ran.returncode == 1 and ran.stdout.startswith(f"DIFFERS {third.rpartition('/')[0]} (")
    assert "first at [0, " in ran.stdout


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros(3, np.int8)}, "has no array of these vectors"),
        (None, "cannot be read"),
    ],
    ids=["no array of theirs", "no file"],
)
def test_a_dump_that_is_none_is_status_2(copied: Path, arrays: dict[str, Any] | None, words: str) -> None:
    if arrays is not None:
        np.savez(copied / "mine.npz", **arrays)
    ran = python(copied, "--output", str(copied / "mine.npz"))
    assert ran.returncode == 2 and words in ran.stderr and "Traceback" not in ran.stderr


def test_a_dump_of_floats_and_one_of_another_shape_differ(copied: Path) -> None:
    key = next(keys(copied))
    wanted = np.load(copied / "vectors.npz")[key]
    for array, words in ((wanted.astype(np.float32), "must hold integers"), (wanted[:, :1], "must have")):
        np.savez(copied / "mine.npz", **{key: array})
        ran = python(copied, "--output", str(copied / "mine.npz"))
        assert ran.returncode == 1 and words in ran.stdout


def test_a_folder_without_vectors_is_status_2(copied: Path) -> None:
    (copied / "manifest.json").write_text("{}")
    ran = python(copied)
    assert ran.returncode == 2 and "no golden vectors" in ran.stderr and "Traceback" not in ran.stderr


def test_the_script_imports_the_standard_library_and_numpy_only(written: Path) -> None:
    tree = ast.parse((written / "check.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"numpy"}


def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        pytest.skip("no C compiler on this machine: vectors.h was not compiled")
    return found


def test_the_page_says_what_every_rule_computes() -> None:
    """Who recomputes vectors without `check.py` has the manifest and `docs/integer.md`."""
    page = Path("docs/integer.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    told = {name for row in rows for name in row.replace("`", "").replace(",", "").split()}
    assert set(golden_check.RULES) <= told


def test_the_header_is_c99_without_a_warning(written: Path) -> None:
    command = [compiler(), "-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only"]
    ran = subprocess.run([*command, str(written / "vectors.h")], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


PRINT = """
#include <stdio.h>
#include "vectors.h"
int main(void) {
  for (unsigned i = 0; i < sizeof(ARRAY) / sizeof(ARRAY[0]); i++) printf("%lld ", (long long)ARRAY[i]);
  printf("%u", (unsigned)((uintptr_t)ARRAY % 16));
  return 0;
}
"""


@pytest.mark.parametrize("part", ["weight", "bias", "accumulator", "output"])
def test_arrays_of_the_header_are_those_of_the_npz_and_aligned(written: Path, tmp_path: Path, part: str) -> None:
    (tmp_path / "print.c").write_text(PRINT.replace("ARRAY", f"golden_first_{part}"))
    command = [compiler(), "-std=c99", "-I", str(written), "-o", str(tmp_path / "print"), str(tmp_path / "print.c")]
    subprocess.run(command, check=True)
    *values, offset = subprocess.run([str(tmp_path / "print")], capture_output=True, text=True).stdout.split()
    assert [int(v) for v in values] == np.load(written / "vectors.npz")[f"first/{part}"].ravel().tolist()
    assert int(offset) == 0


def test_identifiers_are_valid_and_unique_whatever_layers_are_called() -> None:
    names = _Names()
    found = [names.unique(f"golden_{name}") for name in ("a.b", "a/b", "A_B", "0", "größe", "", "int", "a__b_")]
    assert found[:3] == ["golden_a_b", "golden_a_b_2", "golden_A_B_3"]
    assert all(name.isidentifier() and name.isascii() for name in found)
    assert len({name.lower() for name in found}) == len(found)


def test_layers_past_the_limit_are_left_out_of_the_header_and_named(tmp_path: Path) -> None:
    result, data = quantized(Products(), target(FLOAT32))
    whole = qhw.golden(result, tmp_path / "whole", data)
    assert whole.header_left_out == ()
    made = qhw.golden(result, tmp_path / "v", data, header_limit=3000)
    assert made.header_left_out and made.header_left_out != made.operators
    assert manifest_of(tmp_path / "v")["header"] == {"limit_bytes": 3000, "left_out": list(made.header_left_out)}
    text = (tmp_path / "v" / "vectors.h").read_text()
    assert text.count("exceed --header-limit") == len(made.header_left_out)
    assert all(f"golden_{name}_requantize_float32_bits[" in text for name in ("first", "last"))
    check_all(tmp_path / "v", len(made.operators), 1)
    assert qhw.golden(result, tmp_path / "v", data, header_limit=0).header_left_out == made.operators


def test_earlier_vectors_are_replaced_and_other_files_are_not(tmp_path: Path) -> None:
    result, data = quantized(Products(), target(FLOAT32))
    folder = tmp_path / "v"
    qhw.golden(result, folder, data)
    qhw.golden(result, folder, data, samples=2)
    assert manifest_of(folder)["samples"] == 2
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ResultError, match=r"holds 'notes.txt', which is no part of golden vectors"):
        qhw.golden(result, folder, data)
    assert (folder / "notes.txt").read_text() == "mine" and manifest_of(folder)["samples"] == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"format": "else"}')
    with pytest.raises(ResultError, match="not overwritten"):
        qhw.golden(result, other, data)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ResultError, match="is a file"):
        qhw.golden(result, tmp_path / "file", data)
    with pytest.raises(ResultError, match="cannot be written"):
        qhw.golden(result, tmp_path / "file" / "v", data)


class Stopping:
    """Ctrl-C while the files are written."""

    def track(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        for count, item in enumerate(items):
            if "write" in label and count == 3:
                raise KeyboardInterrupt
            yield item


def test_what_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    result, data = quantized(Products(), target(FLOAT32))
    with pytest.raises(KeyboardInterrupt):
        qhw.golden(result, tmp_path / "v", data, progress=Stopping())
    assert list(tmp_path.iterdir()) == []


def test_a_number_of_samples_that_there_are_not_is_refused(tmp_path: Path) -> None:
    result, data = quantized(Products(), target(FLOAT32))
    for count, words in ((0, "must be 1 or more; got 0"), (-1, "got -1"), (9, "there are 8 samples; got 9")):
        with pytest.raises(CalibrationError, match=words):
            qhw.golden(result, tmp_path / "v", data, samples=count)
    result.samples = {}
    with pytest.raises(CalibrationError, match="golden: the result keeps no samples"):
        qhw.golden(result, tmp_path / "v")
    with pytest.raises(ResultError, match="header_limit must be 0 or more"):
        qhw.golden(result, tmp_path / "v", data, header_limit=-1)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_leaves_its_arithmetic_open_is_named(tmp_path: Path) -> None:
    result, data = quantized(Products(), target('kind = "float32"'))
    with pytest.raises(IntegerError, match=r"requantize\.r\.rounding is not stated"):
        qhw.golden(result, tmp_path / "v", data)
    assert list(tmp_path.iterdir()) == []


def test_operators_of_the_host_are_listed_without_vectors(tmp_path: Path) -> None:
    class Hosted(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.softmax(torch.relu(self.stem(x)), 1).mean((2, 3)))

    result, data = quantized(Hosted(), target(FLOAT32))
    made = qhw.golden(result, tmp_path / "v", data, samples=2)
    assert [one["kind"] for one in manifest_of(tmp_path / "v")["host"]] == ["Softmax"]
    assert made.host and made.host[0] not in made.operators
    check_all(tmp_path / "v", len(made.operators), 2)
