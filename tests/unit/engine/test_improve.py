# SPDX-License-Identifier: Apache-2.0
"""Improving layers with a work folder: a run that was stopped goes on, and ends as if it had not been."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

import qhw
from qhw.decisions import Reason, Site, StepReport, Survey, Verdict
from qhw.engine import QuantizedModel, SilentProgress, WorkFolder, improve_layers, save_result
from qhw.errors import PlanError, ResultError
from qhw.extension import Algorithm, AlgorithmOptions, Registry
from qhw.graph import Graph
from qhw.schema import TargetSpec

LAYERS = 3
TAKEN = Verdict(taken=True, reasons=(Reason(subject="test", value=True, rule="always"),))


class ShakeOptions(AlgorithmOptions):
    by: float = Field(0.01, description="How much.")


class Shake(Algorithm):
    """Changes weight, bias and scale by random numbers of torch's own generator and by its seed."""

    name = "shake"
    stage = "correct"
    summary = "Shakes weights."
    Options = ShakeOptions
    done: list[str]
    stop_at: int | None = None
    options: ShakeOptions

    def survey(self, graph: Any, points: Any, target: Any, resources: Any) -> Survey:
        sites = tuple(Site(name=p.group, verdict=TAKEN) for p in points.points if p.role == "weight")
        return Survey(verdict=TAKEN, sites=sites)

    def apply(self, work: Any, step: Any, context: Any) -> StepReport:
        figures = improve_layers(work, context, step, self.improve, samples=64)
        return StepReport(stage=self.stage, algorithm=self.name, summary="shaken", sites=figures)

    def improve(self, work: Any, layer: Any, seed: int) -> dict[str, Any]:
        if type(self).stop_at == len(type(self).done):
            raise KeyboardInterrupt
        type(self).done.append(layer.group)
        weight = work.weight(layer.group)
        work.graph.set_tensor(layer.operator.weight, weight + self.options.by * torch.rand(weight.shape))
        if layer.operator.bias is not None:
            bias = work.graph.tensor(layer.operator.bias)
            work.graph.set_tensor(layer.operator.bias, bias + layer.outputs[0].mean() + seed)
        qparams = work.weight_qparams(layer.group)
        grown = type(qparams)(2 * qparams.scale, *list(vars(qparams).values())[1:])
        work.set_qparams(layer.group, grown)
        return {"seed": seed, "mean": float(layer.inputs[0].double().mean()), "third": 1 / 3}


class Later(Algorithm):
    """Draws from torch's own generator behind the walk."""

    name = "later"
    stage = "fit"
    summary = "Draws."

    def survey(self, graph: Any, points: Any, target: Any, resources: Any) -> Survey:
        return Survey(verdict=TAKEN)

    def apply(self, work: Any, step: Any, context: Any) -> StepReport:
        return StepReport(stage=self.stage, algorithm=self.name, summary=f"{float(torch.rand(()))}")


@pytest.fixture
def run(
    graph: Graph, target: TargetSpec, images: Tensor, plugin: Any, load: Callable[..., Registry], tmp_path: Path
) -> Callable[..., QuantizedModel]:
    """Quantize with `shake`, which stops before the layer that is asked for; the folder is `tmp_path / "work"`."""

    def make(
        stop_at: int | None = None,
        folder: Any = "work",
        by: float = 0.01,
        data: Tensor = images[:70],
        prefer: tuple[str, ...] = ("shake", "later"),
        **more: Any,
    ) -> QuantizedModel:
        Shake.done, Shake.stop_at = [], stop_at
        registry = load(("stranger", plugin((Shake, Later))))
        options = {"shake": {"by": by}}
        wishes = {"prefer": prefer, "options": options}
        plan = qhw.plan(graph, target, calibration=data, registry=registry, **wishes)
        place = tmp_path / folder if isinstance(folder, str) else folder
        return qhw.quantize(graph, plan, calibration=data, registry=registry, work_folder=place, **more)

    return make


def saved(result: QuantizedModel, folder: Path) -> dict[str, bytes]:
    save_result(result, folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stopped(run: Callable[..., QuantizedModel], layers: int, **more: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=layers, **more)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(run: Any, tmp_path: Path, layers: int) -> None:
    whole = saved(run(folder=None), tmp_path / "whole")
    assert len(Shake.done) == LAYERS
    stopped(run, layers)
    assert (tmp_path / "work").exists() == (layers > 0)
    assert saved(run(), tmp_path / "resumed") == whole
    assert len(Shake.done) == LAYERS - layers
    assert not (tmp_path / "work").exists()


def test_it_may_be_stopped_more_than_once(run: Any, tmp_path: Path) -> None:
    whole = saved(run(folder=None), tmp_path / "whole")
    stopped(run, 1)
    stopped(run, 1)  # one layer more than before
    assert len(list((tmp_path / "work").iterdir())) == 2
    assert saved(run(), tmp_path / "resumed") == whole
    assert len(Shake.done) == 1


def test_all_layers_done_are_all_read_back(run: Any, tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work") as folder:
        whole = saved(run(folder=folder), tmp_path / "whole")
        assert (folder.read, folder.written) == (0, LAYERS)
        again = saved(run(folder=folder), tmp_path / "again")
        assert (folder.read, folder.written, Shake.done) == (LAYERS, LAYERS, [])
        assert (tmp_path / "work").is_dir()
    assert again == whole
    assert not (tmp_path / "work").exists()


def test_the_bar_counts_layers_that_are_read_back(run: Any) -> None:
    counts: list[tuple[str, int | None, int]] = []

    class Counting(SilentProgress):
        def track(self, items: Any, label: str, total: int | None = None) -> Any:
            count = 0
            for item in items:
                yield item
                count += 1
            counts.append((label, total, count))

    stopped(run, 2)
    run(progress=Counting())
    assert ("layers", LAYERS, LAYERS) in counts


CHANGES = {
    "seed": {"seed": 1},
    "options": {"by": 0.02},
    "calibration": {"data": torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(9))},
}


@pytest.mark.parametrize("name", CHANGES)
def test_layers_of_another_run_are_passed_over(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    whole = saved(run(folder=None, **CHANGES[name]), tmp_path / "whole")
    stopped(run, 2)
    assert saved(run(**CHANGES[name]), tmp_path / "result") == whole
    assert len(Shake.done) == LAYERS
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.endswith(f"is of another run ({name} differs); it is not used, and the work is done anew.")
    assert not (tmp_path / "work").exists()


def test_steps_behind_do_not_count(run: Any) -> None:
    stopped(run, 2)
    run(prefer=("shake",))
    assert len(Shake.done) == LAYERS - 2


def test_another_number_of_threads_is_another_run(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    stopped(run, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        run()
    finally:
        torch.set_num_threads(before)
    assert len(Shake.done) == LAYERS
    assert "(threads differs)" in caplog.text


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "foreign":
        save_file({"x": torch.zeros(2)}, path)
    elif how == "missing":
        path.unlink()
    else:
        last = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "changed": last}[how])


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "changed", "foreign", "folder"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_damaged_file_and_what_lies_behind_it_are_done_anew(run: Any, tmp_path: Path, how: str, index: int) -> None:
    whole = saved(run(folder=None), tmp_path / "whole")
    stopped(run, 2)
    damaged(sorted((tmp_path / "work").iterdir())[index], how)
    assert saved(run(), tmp_path / "resumed") == whole
    assert len(Shake.done) == LAYERS - index
    left = [path.name for path in (tmp_path / "work").rglob("*")] if how == "folder" else []
    assert len(left) == (how == "folder")  # a folder is nobody's layer


def test_files_of_others_are_left_alone(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "layer.safetensors").write_bytes(b"mine")
    (folder / "sub").mkdir()
    stopped(run, 2)
    run()
    assert sorted(path.name for path in folder.iterdir()) == ["layer.safetensors", "notes.txt", "sub"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_empty_folder_that_was_there_stays(run: Any, tmp_path: Path) -> None:
    stopped(run, 0)
    (tmp_path / "work").mkdir()
    stopped(run, 0)
    assert (tmp_path / "work").is_dir()


def test_what_a_kill_left_half_written_goes_at_the_end(run: Any, tmp_path: Path) -> None:
    stopped(run, 1)
    (tmp_path / "work" / ".qhw-a1b2_c3.partial").write_bytes(b"half")
    run()
    assert not (tmp_path / "work").exists()


def test_a_file_in_the_place_is_refused_before_any_work(run: Any, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("mine")
    with pytest.raises(
        ResultError, match=r"^[^\n]*work: must be a folder [^\n]*'[^\n]*work' is a file, not a folder\. M"
    ):
        run()
    with pytest.raises(ResultError, match="is a file, not a folder"):
        run(folder="work/deeper")
    assert Shake.done == [] and (tmp_path / "work").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write everywhere
    with pytest.raises(
        ResultError, match=r"^[^\n]*work: must be a folder [^\n]*' is not writable\. Move it, or choose"
    ):
        run()
    assert Shake.done == []


def test_a_full_disk_ends_the_keeping_and_not_the_run(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = saved(run(folder=None), tmp_path / "whole")

    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with WorkFolder(tmp_path / "work") as folder:
        with monkeypatch.context() as patched:
            patched.setattr(tempfile, "mkstemp", full)
            result = run(folder=folder)
        assert folder.kept == 0
    assert caplog.text.count("no more layers are kept: No space left on device. The work goes on.") == 1
    assert saved(result, tmp_path / "result") == whole
    assert not (tmp_path / "work").exists()


def other_weight(work: Any, layer: Any) -> None:
    work.graph.set_tensor("fc.weight", 2 * work.graph.tensor("fc.weight"))


def other_scale(work: Any, layer: Any) -> None:
    work.set_qparams("fc.weight", type(work.qparams["fc.weight"])(*vars(work.qparams["fc.weight"]).values()))


def other_operator(work: Any, layer: Any) -> None:
    work.graph.remove(work.graph.operator("fc"))


@pytest.mark.parametrize(
    ("meddle", "what"),
    [
        (other_weight, "'fc.weight'"),
        (other_scale, "the scale of 'fc.weight'"),
        (other_operator, "operator 'fc'"),
    ],
    ids=["another-weight", "another-scale", "the-graph"],
)
def test_only_the_layer_itself_may_be_changed(
    run: Any, monkeypatch: pytest.MonkeyPatch, meddle: Callable[..., None], what: str
) -> None:
    def improve(self: Any, work: Any, layer: Any, seed: int) -> dict[str, Any]:
        if layer.group == "conv1.weight":
            meddle(work, layer)
        return {}

    monkeypatch.setattr(Shake, "improve", improve)
    with pytest.raises(PlanError, match=rf"^conv1\.weight: improving it changed {what}.*Plugin author: change only"):
        run(folder=None)
