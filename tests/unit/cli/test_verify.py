# SPDX-License-Identifier: Apache-2.0
"""`qhw verify`: what it shows, when its exit status is 1, and every mistake."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.machine import has_vnni

Run = Callable[..., Any]

EXACT = """
schema_version = 1
name = "acme/exact"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
biases.b = { bits = 32, scale = "input*weight", applied = "before_requantize" }
accumulators.acc = { bits = 32, overflow = "wrap" }
requantize.r = { kind = "float32", rounding = "half_even" }
kernels.mac = { input = ["a8"], weight = ["w8"], bias = "b", output = ["a8"], accumulator = "acc", requantize = "r" }
kernels.mean = { input = ["a8"], output = ["a8"], bias = "none", requantize = "r" }
operators.Conv = { kernels = ["mac"], fused = ["Relu"], rounding_order = "zero_point_after" }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"], rounding_order = "zero_point_after" }
operators.GlobalAveragePool = { kernels = ["mean"], rounding_order = "zero_point_after" }
"""


def quantize(run: Run, target: str, out: str, *more: str) -> None:
    ran = run(
        "quantize", "net:model", "--target", target, "--calibration", "net:batches", "--out", out,
        "--pipeline", "ranges-ptq", *more,
    )  # fmt: skip
    assert ran.status == 0, ran.err


@pytest.fixture
def exact(folder: Path, qhw_run: Run) -> Path:
    """A result for a target that states all, without an executor."""
    (folder / "exact.toml").write_text(EXACT)
    quantize(qhw_run, "exact.toml", "out/exact")
    return folder / "out/exact"


needs_vnni = pytest.mark.skipif(not has_vnni(), reason="the runtime's integer arithmetic needs VNNI")


def check_one_line(ran: Any, *words: str) -> None:
    assert ran.status == 1, ran
    lines = ran.err.strip().splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in ran.err, ran.err


def test_a_result_is_run_on_the_samples_it_keeps(exact: Path, qhw_run: Run) -> None:
    ran = qhw_run("verify", str(exact))
    assert ran.status == 0, ran.err
    assert "Samples" in ran.out and " 8" in ran.out
    assert "'acme/exact' names no executor" in ran.out
    assert "simulation differs" in ran.out


def test_other_data_is_taken_from_a_file_and_from_a_function(exact: Path, qhw_run: Run, folder: Path) -> None:
    np.savez(folder / "few.npz", input=np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32))
    for data, count in (("few.npz", 3), ("net:batches", 64)):
        found = json.loads(qhw_run("verify", str(exact), "--data", data, "--json").out)
        assert found["samples"] == count
        assert found["proven"] is False
        assert found["artefact"] == []
        first = found["simulated"][0]
        assert (first["tensor"], first["codes"], first["differing"]) == ("input", count * 3 * 64, 0)


def test_a_result_without_samples_needs_data(exact: Path, qhw_run: Run) -> None:
    quantize(qhw_run, "exact.toml", "out/bare", "--no-samples")
    assert not list(Path("out/bare").glob("samples*"))
    check_one_line(qhw_run("verify", "out/bare"), "verify: the result keeps no samples", "--data DATA")
    assert qhw_run("verify", "out/bare", "--data", "net:batches").status == 0


def test_a_damaged_samples_file_is_one_line(exact: Path, qhw_run: Run) -> None:
    (exact / "samples.safetensors").write_bytes(b"nonsense")
    check_one_line(qhw_run("verify", str(exact)), "samples.safetensors")


def test_a_missing_samples_file_is_one_line(exact: Path, qhw_run: Run) -> None:
    (exact / "samples.safetensors").unlink()
    check_one_line(qhw_run("verify", str(exact)), "samples.safetensors")


def test_something_that_is_no_result_is_one_line(folder: Path, qhw_run: Run) -> None:
    check_one_line(qhw_run("verify", "nowhere"), "nowhere")
    (folder / "empty").mkdir()
    check_one_line(qhw_run("verify", "empty"), "empty")


def test_data_that_does_not_fit_is_one_line(exact: Path, qhw_run: Run, folder: Path) -> None:
    np.savez(folder / "odd.npz", input=np.zeros((2, 5, 8, 8), np.float32))
    check_one_line(qhw_run("verify", str(exact), "--data", "odd.npz"), "got [2, 5, 8, 8]")
    np.savez(folder / "nan.npz", input=np.full((2, 3, 8, 8), np.nan, np.float32))
    check_one_line(qhw_run("verify", str(exact), "--data", "nan.npz"), "nan")
    check_one_line(qhw_run("verify", str(exact), "--data", "nothing.npz"), "nothing.npz")
    check_one_line(qhw_run("verify", str(exact), "--data", "net:nothing"), "holds no sample")


def test_a_target_that_leaves_open_what_decides_names_the_fields(folder: Path, qhw_run: Run) -> None:
    quantize(qhw_run, "tiny.toml", "out/open")
    check_one_line(
        qhw_run("verify", "out/open"), "'acme/tiny': its integer result cannot be computed",
        "kernels.mac.bias is not stated", "(0 and 1 more)", "--keep-float",
    )  # fmt: skip


def test_what_a_target_leaves_open_does_not_keep_the_rest_from_being_checked(folder: Path, qhw_run: Run) -> None:
    quantize(qhw_run, "tiny.toml", "out/open")
    ran = qhw_run("verify", "out/open")
    words = " ".join(ran.out.split())
    assert words.startswith("The integer result cannot be computed. Checked all the same: Sums 2 operators cannot ")
    assert "their biases left out (kernels.mac.bias)" in words
    assert "Artefact not run: 'acme/tiny' names no executor" in words
    assert f"Next: 'qhw target lint {Path('out/open') / 'target.json'}' lists all that the target leaves open." in words
    assert qhw_run("target", "lint", "out/open/target.json").status == 0
    ran = qhw_run("verify", "out/open", "--json")
    found = json.loads(ran.out)
    assert (ran.status, found["error"]["type"]) == (1, "IntegerError")
    assert [one["operator"] for one in found["obstacles"]] == ["0", "5"]
    assert found["still_checked"]["proven"] == ["0", "5"] and found["still_checked"]["samples"] == 0


@pytest.fixture
def half_open(folder: Path, qhw_run: Run) -> Path:
    """A result for a target with a runtime that does not say how it rounds."""
    text = EXACT.replace(', rounding = "half_even"', "") + 'artefact = { executor = "onnxruntime" }\n'
    (folder / "half.toml").write_text(text)
    quantize(qhw_run, "half.toml", "out/half")
    return Path("out/half")


def test_where_the_arithmetic_is_open_the_simulation_is_held_against_the_artefact(
    half_open: Path, qhw_run: Run
) -> None:
    ran = qhw_run("verify", str(half_open))
    assert ran.status == 1 and "requantize.r.rounding is not stated" in ran.err
    found = json.loads(qhw_run("verify", str(half_open), "--json", "--data", "net:batches").out)["still_checked"]
    codes = sum(one["codes"] for one in found["simulated"])
    assert (found["samples"], found["not_run"]) == (64, None) and codes > 0
    assert f"of {codes // 8:,} codes differ from the artefact's" in " ".join(ran.out.split())


def test_without_samples_the_rest_is_checked_without_the_artefact(half_open: Path, qhw_run: Run) -> None:
    quantize(qhw_run, "half.toml", "out/bare", "--no-samples")
    ran = qhw_run("verify", "out/bare")
    assert ran.status == 1 and "requantize.r.rounding is not stated" in ran.err
    assert "Artefact not run: there are no samples" in " ".join(ran.out.split())


def test_an_accumulator_of_unknown_width_and_one_that_overflows_are_said_in_the_rest(
    folder: Path, qhw_run: Run
) -> None:
    for bits, words in (
        ('"unknown"', "the accumulator's width of 2 operators is not known"),
        ("12", "2 operators can "),
    ):
        (folder / "open.toml").write_text(
            EXACT.replace("acc = { bits = 32", f"acc = {{ bits = {bits}").replace('kind = "float32", ', "")
        )
        quantize(qhw_run, "open.toml", "out/open", "--without", "accumulator_projection")
        ran = qhw_run("verify", "out/open")
        assert ran.status == 1 and words in " ".join(ran.out.split())


def test_an_operator_on_the_host_is_listed(exact: Path, qhw_run: Run) -> None:
    quantize(qhw_run, "exact.toml", "out/host", "--keep-float", "5")
    ran = qhw_run("verify", "out/host")
    assert ran.status == 0, ran.err
    assert "1 operator in float32, not compared: 5" in ran.out


# The artefact in the vendor's runtime.


@pytest.fixture
def vendor(folder: Path, qhw_run: Run) -> Path:
    """A result for onnxruntime, with its artefact."""
    quantize(qhw_run, "onnxruntime/cpu-x86-vnni", "out/vendor")
    return folder / "out/vendor"


@needs_vnni
def test_an_artefact_with_the_same_codes_is_proven(vendor: Path, qhw_run: Run) -> None:
    ran = qhw_run("verify", str(vendor))
    assert ran.status == 0, ran.err
    assert "0 of " in ran.out and "codes differ (onnxruntime " in ran.out
    found = json.loads(qhw_run("verify", str(vendor), "--json").out)
    assert found["proven"] is True
    assert {row["tensor"] for row in found["artefact"]} == {row["tensor"] for row in found["simulated"]}
    assert sum(row["differing"] for row in found["artefact"]) == 0


OTHER = """

def other():
    net, x = model()
    with torch.no_grad():
        net[0].weight.mul_(-1.0)
    return net, x


def wider():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return net.eval(), torch.randn(1, 3, 8, 8)


def stranger():
    class Stranger(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3)

        def forward(self, image):
            return self.layer(image)

    return Stranger().eval(), torch.randn(1, 3, 8, 8)
"""


def take_artefact(run: Run, folder: Path, model: str, into: Path) -> None:
    """Put the artefact of another model into a result."""
    with (folder / "net.py").open("a") as file:
        file.write(OTHER)
    import sys

    sys.modules.pop("net", None)
    ran = run(
        "quantize", f"net:{model}", "--target", "onnxruntime/cpu-x86-vnni", "--calibration", "net:batches",
        "--out", "out/other", "--pipeline", "ranges-ptq",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    for old in (into / "artefacts").iterdir():
        old.unlink()
    for new in Path("out/other/artefacts").iterdir():
        shutil.copy(new, into / "artefacts")


@needs_vnni
def test_another_artefact_ends_with_1_and_the_first_tensor_that_differs(
    vendor: Path, qhw_run: Run, folder: Path
) -> None:
    take_artefact(qhw_run, folder, "other", vendor)
    ran = qhw_run("verify", str(vendor))
    assert ran.status == 1
    assert ran.err == ""
    assert "First difference 2: " in " ".join(ran.out.split())
    found = json.loads(qhw_run("verify", str(vendor), "--json").out)
    assert found["proven"] is False
    assert next(row for row in found["artefact"] if row["tensor"] == "input")["differing"] == 0
    assert sum(row["differing"] for row in found["artefact"]) > 0


@needs_vnni
@pytest.mark.parametrize("model", ["wider", "stranger"])
def test_an_artefact_of_another_model_is_one_line(model: str, vendor: Path, qhw_run: Run, folder: Path) -> None:
    take_artefact(qhw_run, folder, model, vendor)
    check_one_line(qhw_run("verify", str(vendor)), "artefact")


@needs_vnni
def test_an_artefact_that_shows_no_tensor_of_the_result_proves_nothing(
    vendor: Path, qhw_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qhw_plugins.onnxruntime_executor import OnnxRuntime

    monkeypatch.setattr(OnnxRuntime, "load_codes", lambda self, artefact: lambda values: {})
    check_one_line(qhw_run("verify", str(vendor)), "model.onnx: shows codes of no tensor of this result")


@needs_vnni
def test_a_result_that_was_changed_after_its_export_differs(vendor: Path) -> None:
    import qhw

    result = qhw.load(vendor)
    artefact = next((vendor / "artefacts").iterdir())
    assert qhw.verify(result, artefact=artefact).is_proven
    name = next(point.tensor for point in result.plan.points if point.role == "weight")
    with torch.no_grad():
        result.float_graph.tensor(name).view(-1)[0].neg_()
    found = qhw.verify(result, artefact=artefact)
    assert not found.is_proven
    assert found.first_difference is not None
    assert found.first_difference.tensor != "input"


def test_a_machine_without_the_instructions_says_so_and_compares_the_rest(
    vendor: Path, qhw_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qhw_plugins.onnxruntime_executor import OnnxRuntime

    monkeypatch.setattr(OnnxRuntime, "versions", lambda self: {"onnxruntime": "1.32.0", "cpu": "avx2 avx512f"})
    ran = qhw_run("verify", str(vendor))
    assert ran.status == 0, ran.err
    words = " ".join(ran.out.split())
    assert "not run: cannot verify here: this machine has none of the CPU features avx512_vnni, avx_vnni" in words
    assert json.loads(qhw_run("verify", str(vendor), "--json").out)["proven"] is False


def test_a_runtime_that_cannot_be_imported_is_a_reason_not_an_error(
    vendor: Path, qhw_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qhw_plugins.onnxruntime_executor import OnnxRuntime

    monkeypatch.setattr(OnnxRuntime, "available", lambda self: "it is not here. Run: pip install it")
    ran = qhw_run("verify", str(vendor))
    assert ran.status == 0
    assert "not run: it is not here. Run: pip install it" in " ".join(ran.out.split())


def test_an_executor_that_no_plugin_brings_is_a_reason_not_an_error(folder: Path, qhw_run: Run, vendor: Path) -> None:
    (folder / "exact.toml").write_text(EXACT + 'artefact = { executor = "acme_sim" }\n')
    quantize(qhw_run, "exact.toml", "out/exact")
    ran = qhw_run("verify", "out/exact")
    assert ran.status == 0, ran.err
    assert "no installed plugin brings the executor 'acme_sim'" in " ".join(ran.out.split())


def test_an_artefact_that_is_gone_is_an_error_and_one_that_never_was_is_said(
    vendor: Path, folder: Path, qhw_run: Run
) -> None:
    import qhw

    qhw.save(qhw.load(vendor), folder / "out/bare", artefact=False)
    ran = qhw_run("verify", "out/bare")
    assert ran.status == 0, ran.err
    assert "not run: there is no artefact" in " ".join(ran.out.split())
    shutil.rmtree(vendor / "artefacts")
    ran = qhw_run("verify", str(vendor))
    assert ran.status == 1
    assert "model.onnx: is missing. Quantize again, or restore the file." in ran.err


@needs_vnni
def test_an_artefact_that_the_runtime_refuses_is_one_line(vendor: Path, qhw_run: Run) -> None:
    artefact = next((vendor / "artefacts").iterdir())
    artefact.write_bytes(b"nonsense")
    check_one_line(qhw_run("verify", str(vendor)), artefact.name)


def test_an_artefact_that_was_changed_is_said_where_it_is_not_run(exact: Path, qhw_run: Run) -> None:
    assert json.loads(qhw_run("verify", str(exact), "--json").out)["changed"] == []
    artefact = next((exact / "artefacts").iterdir())
    artefact.write_bytes(b"nonsense")
    words = " ".join(qhw_run("verify", str(exact)).out.split())
    assert f"Changed artefacts/{artefact.name}: not as exported (SHA-256 differs)" in words
    assert json.loads(qhw_run("verify", str(exact), "--json").out)["changed"] == [f"artefacts/{artefact.name}"]


RESULT_FILES = (
    *("manifest.json", "target.json", "plan.json", "graph.json", "steps.json"),
    *("tensors.safetensors", "samples.safetensors"),
)


@pytest.mark.parametrize("command", ["verify", "accumulators", "golden"])
def test_a_file_that_is_cut_short_or_missing_is_one_line_that_names_it(exact: Path, qhw_run: Run, command: str) -> None:
    more = ("--out", "vectors") if command == "golden" else ()
    for name in RESULT_FILES:
        content = (exact / name).read_bytes()
        (exact / name).write_bytes(content[: len(content) // 2])
        check_one_line(qhw_run(command, str(exact), *more), f"{name}: ")
        (exact / name).unlink()
        check_one_line(qhw_run(command, str(exact), *more), name)
        (exact / name).write_bytes(content)
    assert qhw_run(command, str(exact), *more).status == 0


def test_paths_with_spaces_and_letters_of_other_alphabets(exact: Path, qhw_run: Run, folder: Path) -> None:
    place = folder / "my \u7d50\u679c \u00e9"
    shutil.move(exact, place)
    np.save(folder / "\u00fc.npy", np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32))
    ran = qhw_run("verify", str(place), "--data", "\u00fc.npy")
    assert ran.status == 0, ran.err
    assert f"'qhw golden \"{place}\" --out vectors'" in ran.out
    assert qhw_run("golden", str(place), "--out", "v \u00e9").status == 0
    assert qhw_run("accumulators", str(place), "--witness", "\u00fc.npz").status == 0


@pytest.mark.parametrize("command", ["verify", "golden"])
def test_ctrl_c_is_one_line_with_status_130_and_leaves_nothing(
    exact: Path, qhw_run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from qhw.integer import IntegerModel

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(IntegerModel, "_run", interrupted)
    before = sorted(path.name for path in folder.iterdir())
    ran = qhw_run(command, str(exact), *(("--out", "vectors") if command == "golden" else ()))
    assert (ran.status, ran.out) == (130, "")
    assert ran.err == "interrupted: nothing was written. Run the same command again.\n"
    assert sorted(path.name for path in folder.iterdir()) == before


def test_bars_are_taken_away_before_an_error_is_printed(exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qhw
    from qhw.engine import RichProgress
    from qhw.errors import IntegerError
    from qhw.integer import IntegerModel

    def broken(*_: object, **__: object) -> None:
        raise IntegerError("it does not work")

    monkeypatch.setattr(IntegerModel, "codes", broken)
    progress = RichProgress()
    with pytest.raises(IntegerError, match="it does not work") as caught:
        qhw.verify(qhw.load(exact), progress=progress)
    assert caught.tb is not None and progress._bars is None
