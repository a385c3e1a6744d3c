# SPDX-License-Identifier: Apache-2.0
"""Every command on real input, and every mistake a user can make on the command line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qhw.cli.words import format_words
from qhw.schema import parse_target

Run = Callable[..., Any]

PLAN = ("plan", "net:model", "--target", "tiny.toml", "--calibration", "net:batches")
QUANTIZE = ("quantize", "net:model", "--target", "tiny.toml", "--calibration", "net:batches", "--out", "out/net")


ODD = """
import torch
from torch import nn


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return torch.linalg.svdvals(self.fc(x))


def model():
    return Odd().eval(), torch.randn(2, 4, 4)


def batches():
    return torch.randn(8, 4, 4).split(4)


def stop():
    raise RuntimeError("the work has begun")
"""


def lines(ran: Any) -> list[str]:
    return ran.err.strip().splitlines()


def check_one_line(ran: Any, *words: str) -> None:
    """Exit status 1 and a single line on standard error that says all of the words; no traceback."""
    assert ran.status == 1, ran
    assert len(lines(ran)) == 1, ran.err
    assert ran.err.startswith("error: ")
    for word in words:
        assert word in ran.err, ran.err


def test_plan_reads_like_an_explanation(qhw_run: Run) -> None:
    ran = qhw_run(*PLAN)
    assert ran.status == 0, ran.err
    assert "acme/tiny · net:model · pipeline whitepaper-ptq · calibration data" in ran.out
    # 8 x 3 x 9 x 36 + 8 x 4 multiply-accumulates, all on the accelerator
    assert "100.0 % of 7.81 k MACs" in ran.out
    assert "GlobalAveragePool" in ran.out and "the target does not list it" in ran.out
    assert "batch_norm_folding" in ran.out and "1 of 1 batch norms follow an operator with weights" in ran.out
    assert "kernels.mac.bias" in ran.out and "biases are simulated in float" in ran.out
    assert "Refused" in ran.out and "min_max" in ran.out


TWO_WIDTHS = """
schema_version = 1
name = "acme/two"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.a16 = { bits = 16, signed = true, zero_point = 0, per = "tensor" }
formats.w8 = { bits = 8, signed = true, zero_point = 0, per = "out_channel" }
formats.w16 = { bits = 16, signed = true, zero_point = 0, per = "out_channel" }
formats.w4 = { bits = 4, signed = true, zero_point = 0, per = "out_channel" }
kernels.mac = { input = ["a8"], weight = ["w8"], output = ["a8"], macs_per_cycle = 16.0 }
kernels.wide = { input = ["a16"], weight = ["w16"], output = ["a16"], macs_per_cycle = 4.0 }
kernels.packed = { input = ["a8"], weight = ["w4"], output = ["a8"] }
operators.Conv = { kernels = ["mac", "wide"], fused = ["Relu"] }
operators.Gemm = { kernels = ["mac", "wide", "packed"], fused = ["Relu"] }
"""


def test_what_would_change_the_plan_is_priced_and_works(qhw_run: Run, folder: Path) -> None:
    """Convolution: 8 x 3 x 9 x 36 MACs, so a wider activation is offered there; linear: 8 x 4."""
    (folder / "two.toml").write_text(TWO_WIDTHS)
    plan = ("plan", "net:model", "--target", "two.toml", "--calibration", "net:batches")
    out = qhw_run(*plan).out
    hints = [line.split(maxsplit=2) for line in out[out.index("Would change") :].splitlines() if " --format '" in line]
    offered = {option.strip("'"): meaning for _, option, meaning in hints}
    assert offered == {
        "*.weight=w16": "int16 symmetric, per out channel; kernels.wide, 4 x the cycles of mac",
        "5.weight=w4": "int4 symmetric, per out channel; kernels.packed instead of mac",
        "0=a16": "int16 symmetric, per tensor; kernels.wide, 4 x the cycles of mac",
    }
    for option in offered:
        ran = qhw_run(*plan, "--format", option)
        assert ran.status == 0, ran.err
        assert f"formats.{option.partition('=')[2]}" in ran.out


def test_plan_as_json_is_the_plan(qhw_run: Run) -> None:
    from qhw import QuantPlan

    plan = QuantPlan.from_json(qhw_run(*PLAN, "--json").out)
    assert plan.target == "acme/tiny"
    assert plan.point("0.weight").format == "w8"


def test_wishes_reach_the_plan(qhw_run: Run) -> None:
    from qhw import QuantPlan

    ran = qhw_run(*PLAN, "--prefer", "min_max", "--keep-float", "5", "--json")
    plan = QuantPlan.from_json(ran.out)
    assert [step.algorithm for step in plan.steps if step.stage == "activation_range"] == ["min_max"]
    assert next(op for op in plan.operators if op.name == "5").where == "host"


def test_options_of_algorithms_reach_the_plan(qhw_run: Run) -> None:
    from qhw import QuantPlan

    plan = QuantPlan.from_json(qhw_run(*PLAN, "--set", "mse_weights.clipping_weight=3", "--json").out)
    assert next(step.options for step in plan.steps if step.algorithm == "mse_weights") == {"clipping_weight": 3}
    check_one_line(
        qhw_run(*PLAN, "--set", "mse_weights=3"), "--set: must be ALGORITHM.OPTION=VALUE", "got 'mse_weights=3'"
    )
    check_one_line(
        qhw_run(*PLAN, "--set", "mse_weights.clipping_weight=few"), "--set mse_weights.clipping_weight: Input"
    )
    check_one_line(qhw_run(*PLAN, "--set", "mse.search=foo"), "--set mse.search: Input should be 'grid' or 'golden'")


def test_plugin_show_lists_options(qhw_run: Run) -> None:
    shown = qhw_run("plugin", "show", "mse_weights")
    assert "clipping_weight" in shown.out and "the paper's criterion" in shown.out and "stage weight_range" in shown.out
    facts = json.loads(qhw_run("plugin", "show", "onnx_qdq", "--json").out)
    assert facts["stage"] is None and facts["options"]["batch"]["default"] == "dynamic"
    assert "It has no options." in qhw_run("plugin", "show", "nearest").out
    check_one_line(qhw_run("plugin", "show", "mse_weight"), "no algorithm or exporter", "Closest: mse_weights")


def test_quantize_writes_a_result_that_loads(qhw_run: Run, folder: Path) -> None:
    import qhw

    ran = qhw_run(*QUANTIZE, "--evaluate", "net:labelled")
    assert ran.status == 0, ran.err
    written = {path.name for path in (folder / "out/net").iterdir()}
    assert written == {
        "manifest.json", "target.json", "plan.json", "graph.json", "tensors.safetensors", "samples.safetensors",
        "steps.json",
        "evaluation.json", "artefacts",
    }  # fmt: skip
    assert qhw.load(folder / "out/net").plan.target == "acme/tiny"
    scores = json.loads((folder / "out/net/evaluation.json").read_text())
    assert [score["subject"] for score in scores] == ["float", "simulated", "artefact in onnxruntime"]
    assert "Result in out" in ran.out and "Next:" in ran.out
    again = qhw_run("plan", "out/net", "--target", "tiny.toml", "--calibration", "net:batches")
    assert again.status == 0, again.err
    assert "acme/tiny · out/net" in again.out


def test_quantize_json_and_metric(qhw_run: Run) -> None:
    ran = qhw_run(*QUANTIZE, "--evaluate", "net:labelled", "--metric", "net:share_of_zero", "--json")
    facts = json.loads(ran.out)
    assert facts["scores"][0]["metric"] == "share_of_zero"
    # float: conv 216 + 8, batch norm 8 x 4 + one int64 counter, linear 32 + 4
    assert facts["float_bytes"] == 4 * (216 + 8 + 32 + 32 + 4) + 8


def test_a_plan_is_edited_and_replayed(qhw_run: Run, folder: Path) -> None:
    import qhw

    assert qhw_run(*PLAN, "--out", "plan.json").status == 0
    plan = json.loads((folder / "plan.json").read_text())
    plan["steps"] = [
        {**step, "algorithm": "min_max"} if step["stage"] == "activation_range" else step for step in plan["steps"]
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    assert qhw_run(*QUANTIZE, "--plan", "plan.json").status == 0
    assert [step.algorithm for step in qhw.load(folder / "out/net").steps][-1] == "min_max"


def test_a_plan_names_its_target(qhw_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered one need not be given again; a file must be, for a plan holds its name only."""
    import qhw.api

    for target, name in (("google/litert-int8", "named.json"), ("tiny.toml", "file.json")):
        assert qhw_run(*PLAN[:2], "--target", target, *PLAN[4:], "--out", name).status == 0
    monkeypatch.setattr(qhw.api, "_planned", {})  # as another process starts
    replay = ("quantize", "net:model", "--calibration", "net:batches", "--out", "out/net", "--plan")
    ran = qhw_run(*replay, "named.json", "--json")
    assert json.loads(ran.out)["target"] == "google/litert-int8", ran.err
    check_one_line(
        qhw_run(*replay, "file.json"),
        "plan: was made for 'acme/tiny', which no installed plugin brings. Pass its file: target=PATH in Python, "
        "--target PATH on the command line.",
    )
    assert qhw_run(*replay, "file.json", "--target", "tiny.toml").status == 0
    check_one_line(
        qhw_run(*replay[:-1]), "--target: needed without --plan. Give a name (qhw target list), or a path to a .toml"
    )


def test_a_plan_of_other_weights_says_what_to_do(qhw_run: Run, folder: Path) -> None:
    net = folder / "net.py"
    net.write_text(net.read_text().replace("torch.manual_seed(0)", "torch.seed()"))
    assert qhw_run(*PLAN, "--out", "plan.json").status == 0
    check_one_line(
        qhw_run(*QUANTIZE, "--plan", "plan.json"),
        "was made for another model",
        "if its weights are drawn at random, seed them, as torch.manual_seed(0).",
    )


def test_a_model_that_cannot_be_saved_is_refused_before_the_work(qhw_run: Run, folder: Path) -> None:
    (folder / "odd.py").write_text(ODD)
    sys.modules.pop("odd", None)
    words = "operator 'aten.linalg_svdvals.default' is not on the list of operators that a saved graph may call"
    check_one_line(qhw_run("quantize", "odd:model", *QUANTIZE[2:4], "-c", "odd:stop", "-o", "out"), words)
    ran = qhw_run("plan", "odd:model", *PLAN[2:4], "-c", "odd:batches")
    assert ran.status == 0, ran.err
    assert lines(ran)[0].startswith("warning: 'qhw quantize' will refuse this model: ") and words in lines(ran)[0]


def test_a_plan_that_cannot_be_written_says_why(qhw_run: Run) -> None:
    check_one_line(
        qhw_run(*PLAN, "--out", "net.py/plan.json"),
        "net.py/plan.json: cannot be written: 'net.py' is a file, not a folder. Choose another --out.",
    )


def test_target_commands(qhw_run: Run) -> None:
    listed = json.loads(qhw_run("target", "list", "--json").out)
    assert "espressif/esp32-p4" in [target["name"] for target in listed]
    assert qhw_run("target", "lint", "tiny.toml").status == 0
    shown = qhw_run("target", "show", "espressif/esp32-p4").out
    assert "power_of_two" in shown and "sources" in shown
    assert json.loads(qhw_run("target", "schema").out)["title"] == "TargetSpec"
    assert qhw_run("target", "schema", "--json").out == qhw_run("target", "schema").out
    assert json.loads(qhw_run("target", "show", "tiny.toml", "--json").out)["name"] == "acme/tiny"


def test_lint_names_file_line_and_closest(qhw_run: Run, folder: Path) -> None:
    text = (
        (folder / "tiny.toml")
        .read_text()
        .replace('operators.Conv = { kernels = ["mac"]', 'operators.Conv = { kernels = ["mack"]')
    )
    (folder / "bad.toml").write_text(text)
    ran = qhw_run("target", "lint", "bad.toml")
    assert ran.status == 1
    assert "bad.toml:8" in ran.out and "operators.Conv.kernels" in ran.out and "Closest: mac" in ran.out


def test_plugin_list(qhw_run: Run) -> None:
    plugins = {plugin["name"]: plugin for plugin in json.loads(qhw_run("plugin", "list", "--json").out)}
    assert plugins["mse"]["brings"] == {"algorithms": ["mse", "mse_weights"]}
    assert "batch_norm_folding" in qhw_run("plugin", "list").out


def test_blocked_plugins_are_said(qhw_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QHW_BLOCK", "mse")
    assert "blocked by QHW_BLOCK" in qhw_run("plugin", "list").out


MISTAKES = {
    "unknown target": (("plan", "net:model", "--target", "espressif/esp32"), ("no target", "espressif/esp32-")),
    "no such model": (("plan", "nett:model", "--target", "tiny.toml"), ("cannot import 'nett'",)),
    "no such function": (("plan", "net:modell", "--target", "tiny.toml"), ("has no 'modell'",)),
    "not callable": (("plan", "net:number", "--target", "tiny.toml"), ("must be callable",)),
    "model function raises": (("plan", "net:broken", "--target", "tiny.toml"), ("the disk is gone", "net.py:")),
    "model function returns data": (("plan", "net:nothing", "--target", "tiny.toml"), ("must return (nn.Module",)),
    "pickled model": (("plan", "net.pt", "--target", "tiny.toml"), ("run code when loaded",)),
    "model is no name": (("plan", "net", "--target", "tiny.toml"), ("must be module:callable",)),
    "no data": ((*PLAN[:4], "--without", "batch_norm_ranges"), ("needs calibration data", "calibration")),
    "empty data": ((*QUANTIZE[:4], "-c", "net:nothing", "-o", "out/x"), ("holds no sample",)),
    "data function raises": ((*QUANTIZE[:4], "-c", "net:broken", "-o", "out/x"), ("the disk is gone",)),
    "no such file": ((*PLAN[:4], "-c", "no.npz"), ("no such file",)),
    "unknown algorithm": ((*PLAN, "--prefer", "mze"), ("no algorithm 'mze'", "mse")),
    "unknown pipeline": ((*PLAN, "--pipeline", "magic"), ("no pipeline 'magic'",)),
    "unknown operator": ((*PLAN, "--keep-float", "conv9"), ("--keep-float", "conv9")),
    "unknown format": ((*PLAN, "--format", "0.weight=w9"), ("no format 'w9'", "w8")),
    "unknown point": ((*PLAN, "--format", "nope=w8"), ("no point matches 'nope'",)),
    "format without point": ((*PLAN, "--format", "w8"), ("must be POINT=FORMAT",)),
    "no labels": ((*QUANTIZE, "--evaluate", "net:batches"), ("(inputs, labels)",)),
    "plan is missing": ((*QUANTIZE, "--plan", "none.json"), ("none.json: cannot be read",)),
    "a plan and a wish": ((*QUANTIZE, "--plan", "plan.json", "--prefer", "mse"), ("--plan", "prefer")),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES, ids=list(MISTAKES))
def test_a_mistake_is_one_line(qhw_run: Run, folder: Path, case: str) -> None:
    arguments, words = MISTAKES[case]
    check_one_line(qhw_run(*arguments), *words)
    assert not (folder / "out").exists() or not any((folder / "out").iterdir()), "something half-written is left"


def test_npz_data(qhw_run: Run, folder: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((20, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "good.npz", input=images)
    np.savez(folder / "named.npz", pixels=images)
    np.savez(folder / "shape.npz", input=images[:, :2])
    np.savez(folder / "dtype.npz", input=images.astype(np.float64))
    images[3, 0, 0, 0] = np.nan
    np.savez(folder / "nan.npz", input=images)
    np.savez(folder / "empty.npz")
    np.savez(folder / "objects.npz", input=np.array([{"a": 1}], dtype=object))
    np.save(folder / "objects.npy", np.array([{"a": 1}], dtype=object))
    (folder / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (folder / "cut.npz").write_bytes((folder / "good.npz").read_bytes()[:200])
    (folder / "text.npz").write_text("not an archive")
    base = (*QUANTIZE[:4], "--out", "out/net", "--calibration")
    assert qhw_run(*base, "good.npz").status == 0
    unreadable = "is no .npz file of plain arrays: "
    for name, words in {
        "named.npz": ("no input 'pixels'", "Inputs of the model: input"),
        "shape.npz": ("input 'input' must have shape [batch, 3, 8, 8]", "got [20, 2, 8, 8]"),
        "dtype.npz": ("input 'input' must be float32; got float64",),
        "nan.npz": ("input 'input' holds NaN or infinite values in sample 3 (counted from 0)",),
        "empty.npz": ("holds no array",),
        "objects.npz": (f"{unreadable}an array holds Python objects, which could run code. Write it with",),
        "objects.npy": (f"{unreadable}an array holds Python objects",),
        "cut.npz": (f"{unreadable}it is another kind of file, or cut short",),
        "cut.npy": (f"{unreadable}it is damaged",),
        "text.npz": (f"{unreadable}it is another kind of file",),
    }.items():
        ran = qhw_run(*base, name)
        check_one_line(ran, *words)
        assert ran.err.startswith(f"error: {name}: "), ran.err
        assert "allow_pickle" not in ran.err and "unsafely" not in ran.err


def test_one_array_is_enough_for_one_input(qhw_run: Run, folder: Path) -> None:
    images = np.random.default_rng(0).standard_normal((20, 3, 8, 8)).astype(np.float32)
    np.save(folder / "images.npy", images)
    (folder / "renamed.npz").write_bytes((folder / "images.npy").read_bytes())
    for name in ("images.npy", "renamed.npz"):
        ran = qhw_run(*QUANTIZE[:4], "--out", "out/net", "--calibration", name)
        assert ran.status == 0, ran.err
        assert "pipeline whitepaper-ptq · calibration data (20 samples)" in qhw_run(*PLAN[:4], "-c", name).out
    check_one_line(qhw_run(*PLAN[:4], "-c", "none.npy"), "none.npy: no such file")
    ran = qhw_run(*QUANTIZE, "--evaluate", "images.npy")
    check_one_line(ran, "images.npy: must be a dict of arrays with 'labels', or batches; got ndarray")


def test_labels_are_looked_for_before_the_work(qhw_run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qhw.api

    def work(*args: object, **kwargs: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(qhw.api, "run", work)
    check_one_line(qhw_run(*QUANTIZE, "--evaluate", "net:batches"), "net:batches: every batch must be (inputs, labels)")


def test_an_occupied_folder_is_left_alone(qhw_run: Run, folder: Path) -> None:
    (folder / "out/net").mkdir(parents=True)
    (folder / "out/net/diary.txt").write_text("mine")
    check_one_line(qhw_run(*QUANTIZE), "holds other files")
    assert (folder / "out/net/diary.txt").read_text() == "mine"


def test_interrupt_leaves_nothing(qhw_run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qhw.api

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qhw.api, "_written", interrupted)
    ran = qhw_run(*QUANTIZE)
    assert ran.status == 130
    assert "interrupted" in ran.err
    assert not any((folder / "out").iterdir())


def test_the_command_line_is_a_module_too() -> None:
    ran = subprocess.run([sys.executable, "-m", "qhw", "--version"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout[:6], ran.stderr) == (0, "qhw 0.", "")


@pytest.mark.parametrize(
    ("arguments", "status", "kind", "words"),
    [
        (("verify", "nowhere"), 1, "ResultError", "nowhere: is no result folder"),
        (("plan", "net:model", "--target", "acme/none"), 1, "TargetError", "acme/none"),
        (("verify",), 2, "UsageError", "Missing argument 'RESULT'"),
        (("verify", "out", "--sample", "3"), 2, "UsageError", "No such option: --sample"),
        (("golden", "out", "--out", "v", "--samples", "few"), 2, "UsageError", "should be a valid integer"),
    ],
    ids=["no result", "no target", "no argument", "no such option", "no number"],
)
def test_with_json_an_error_is_an_object_too(
    qhw_run: Run, arguments: tuple[str, ...], status: int, kind: str, words: str
) -> None:
    ran, plain = qhw_run(*arguments, "--json"), qhw_run(*arguments)
    error = json.loads(ran.out)["error"]
    assert (ran.status, error["type"]) == (status, kind)
    assert words in error["message"] and words in " ".join(ran.err.split())
    assert (plain.status, plain.out) == (status, "")
    if status == 1:
        assert ran.err == plain.err == f"error: {error['message']}\n"


NOISY = """
import net

print("importing the model")


def model():
    print("making the model")
    return net.model()


def batches():
    print("reading data")
    yield from net.batches()
"""


def test_with_json_what_the_users_modules_print_goes_to_standard_error(qhw_run: Run, folder: Path) -> None:
    (folder / "noisy.py").write_text(NOISY)
    sys.modules.pop("noisy", None)
    ran = qhw_run("plan", "noisy:model", "--target", "tiny.toml", "--calibration", "noisy:batches", "--json")
    assert json.loads(ran.out)["target"] == "acme/tiny", ran.err
    assert "importing the model\nmaking the model\n" in ran.err
    failed = qhw_run("plan", "noisy:model", "--target", "none.toml", "--json")
    assert json.loads(failed.out)["error"]["type"] == "TargetError"


def test_with_json_an_interrupt_is_an_object_too(qhw_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import qhw.api

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qhw.api, "_written", interrupted)
    ran = qhw_run(*QUANTIZE, "--json")
    assert ran.status == 130 and "interrupted" in ran.err
    assert json.loads(ran.out) == {
        "error": {"type": "Interrupted", "message": "nothing was written. Run the same command again."}
    }


def test_what_is_unknown_is_said_beside_the_share_of_macs(qhw_run: Run, folder: Path) -> None:
    (folder / "odd.py").write_text(ODD)
    sys.modules.pop("odd", None)
    ran = qhw_run("plan", "odd:model", *PLAN[2:4], "-c", "odd:batches")
    assert "100.0 % of 64 MACs, those of 1 unknown operator not counted" in " ".join(ran.out.split())


def test_help_and_version(qhw_run: Run) -> None:
    assert qhw_run("--version").out.startswith("qhw 0.")
    for command in (("plan",), ("quantize",), ("target", "lint"), ("plugin", "list")):
        assert "Usage" in qhw_run(*command, "--help").out


def test_lint_says_what_is_left_open_and_who_needs_it(qhw_run: Run) -> None:
    ran = qhw_run("target", "lint", "tiny.toml")
    assert ran.status == 0
    words = " ".join(ran.out.split())
    commands = "qhw verify, qhw golden and qhw accumulators cannot answer for Conv and Gemm, where they have a bias"
    assert f"Left open kernels.mac.bias absent: {commands} " in words
    assert "kernels.mac.requantize absent: qhw verify and qhw golden cannot answer for Conv and Gemm" in words
    assert words.endswith("tiny.toml: 1 info; 7 fields left open")
    facts = {fact["path"]: fact for fact in json.loads(qhw_run("target", "lint", "tiny.toml", "--json").out)}
    bias = facts["kernels.mac.bias"]
    assert (bias["severity"], bias["place"], bias["kinds"]) == ("open", "tiny.toml:7", ["Conv", "Gemm"])
    assert bias["commands"] == ["qhw verify", "qhw golden", "qhw accumulators"]
    assert facts["fallback"]["severity"] == "info"


def test_lint_counts_what_the_base_has_all_the_same_and_says_what_the_child_makes_of_it(
    qhw_run: Run, folder: Path
) -> None:
    child = 'schema_version = 1\nname = "acme/child"\nextends = "espressif/esp32-p4"\naccumulators.narrow.bits = 24\n'
    (folder / "child.toml").write_text(child)
    base = [line for line in qhw_run("target", "lint", "espressif/esp32-p4").out.splitlines() if "info: /" in line]
    infos = [line for line in qhw_run("target", "lint", "child.toml").out.splitlines() if line.startswith("info: ")]
    assert infos[1:] == [f"info: {len(base)} infos on its base as well: qhw target lint espressif/esp32-p4"]
    assert "narrow has 32 bits, and the accumulator it is added to 24" in infos[0]
    facts = json.loads(qhw_run("target", "lint", "child.toml", "--json").out)
    assert len([fact for fact in facts if fact["severity"] == "info"]) == len(base) + 1


def test_small_floats_are_named_in_plans_too(folder: Path) -> None:
    floats = 'kind = "float", exponent_bits = 4, mantissa_bits = 3, finite_max = 448'
    text = (folder / "tiny.toml").read_text().replace("codes = [-127, 127], zero_point = 0", floats)
    formats = parse_target(text).formats
    assert format_words(formats["w8"]) == "e4m3 up to 448, per out channel"
    assert format_words(formats["a8"]) == "int8 asymmetric, per tensor"


def test_lint_says_the_same_of_several_operators_once_and_unknown_things_once(qhw_run: Run, folder: Path) -> None:
    text = (folder / "tiny.toml").read_text().replace("bits = 32", 'bits = "unknown"')
    (folder / "open.toml").write_text(text)
    out = qhw_run("target", "lint", "open.toml").out
    assert out.count("rounding_order") == 1 and "operators.*.rounding_order" in out
    assert out.count("accumulators.acc.bits") == 1
    assert "cannot answer for Conv and Gemm" in " ".join(out[out.index("accumulators.acc.bits") :].split())
