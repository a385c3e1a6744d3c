# SPDX-License-Identifier: Apache-2.0
"""One quantization by AIMET, measured in a fresh process of its own environment; `bench.aimet` starts it.

    /tmp/aimet-env/bin/python -P bench/aimet_worker.py --models ../shared/data/models.py --network resnet20 \
        --per axis --out result.json

Imports nothing of qhw. `measure` and `stopwatch` know neither tool, and `bench.aimet` measures qhw with them.
"""

import argparse
import functools
import gc
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

CALIBRATION, SAMPLES, MICRO_BATCH = 1000, 512, 32
NETWORKS: dict[str, Callable[[ModuleType], nn.Module]] = {
    "resnet20": lambda models: models.resnet(20),
    "mobilenetv2": lambda models: models.mobilenet_v2(),
    "unbalanced": lambda models: models.mobilenet_v2(unbalanced=True),
}


@dataclass
class Case:
    """What is quantized, and how long AdaRound learns."""

    network: str
    per: str
    seed: int
    iterations: int
    test_images: int | None


@dataclass
class Done:
    """A quantized model, and what AdaRound did."""

    run: Callable[[Tensor], Any]
    adaround_seconds: float
    steps: list[int]  # of each layer


def load(file: Path) -> ModuleType:
    """The shared module of models and images."""
    spec = importlib.util.spec_from_file_location("benchmark_models", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stopwatch(owner: type, name: str) -> list[float]:
    """From now on, the CPU seconds of each call of a method; a class method stays one."""
    original, seconds = getattr(owner, name), []
    is_bound = hasattr(original, "__self__")

    @functools.wraps(original)  # qhw checks the signatures of plugins
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - started)

    setattr(owner, name, staticmethod(timed) if is_bound else timed)
    return seconds


def peak_mib() -> float:
    """Peak resident memory. Linux: getrusage would count what the parent held when it started this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def top1(run: Callable[[Tensor], Any], images: Tensor, labels: Tensor) -> float:
    """Percent of the images whose highest output is their label."""
    with torch.no_grad():
        found = torch.cat([run(batch) for batch in images.split(100)])
    return 100 * (found.argmax(1) == labels).float().mean().item()


def measure(models: ModuleType, case: Case, quantize: Callable[[nn.Module, Tensor, Case], Done]) -> dict[str, Any]:
    """Figures of one quantization; the test images come after its peak is read."""
    images, _ = models.cifar10("train", CALIBRATION)
    model = NETWORKS[case.network](models)
    gc.collect()
    before = peak_mib()
    started, wall = time.process_time(), time.perf_counter()
    done = quantize(model, images, case)
    whole, wall = time.process_time() - started, time.perf_counter() - wall
    peak = peak_mib()
    test, labels = models.cifar10("test", case.test_images)
    return {
        **asdict(case),
        "float": top1(NETWORKS[case.network](models), test, labels),
        "top1": top1(done.run, test, labels),
        "adaround": done.adaround_seconds,
        "whole": whole,
        "wall": wall,
        "layers": len(done.steps),
        "steps": sum(done.steps),
        "before": before,
        "peak": peak,
    }


def stand_in_for_torchvision() -> Any:
    """Declare the two operators that torchvision's Python part expects of its compiled part.

    PyPI's torchvision is compiled for CUDA and does not load beside a CPU torch, and then `import torchvision` fails,
    of which AIMET uses only data sets and transforms. What is returned must be kept.
    """
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def quantize(model: nn.Module, images: Tensor, case: Case) -> Done:
    """AIMET as its documentation says: fold or equalize, AdaRound, then activation ranges with frozen weights."""
    import aimet_torch
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.cross_layer_equalization import equalize_model
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel
    from torch.utils.data import DataLoader

    file = "default_config_per_channel.json" if case.per == "axis" else "default_config.json"
    config = str(Path(aimet_torch.__file__).parent / "common" / "quantsim_config" / file)
    scheme, dummy = QuantScheme.post_training_tf_enhanced, images[:1]
    seconds = stopwatch(Adaround, "_adaround_model")
    torch.manual_seed(case.seed)
    model = prepare_model(model)
    if case.network == "unbalanced":
        equalize_model(model, dummy_input=dummy)
    else:
        fold_all_batch_norms(model, None, dummy_input=dummy)
    num_layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    loader: DataLoader[Tensor] = DataLoader(images[:SAMPLES], batch_size=MICRO_BATCH)  # type: ignore[arg-type]
    parameters = AdaroundParameters(loader, len(loader), default_num_iterations=case.iterations)
    with tempfile.TemporaryDirectory() as folder:
        model = Adaround.apply_adaround(
            model,
            dummy,
            parameters,
            folder,
            "weights",
            default_param_bw=4,
            default_quant_scheme=scheme,
            default_config_file=config,
        )
        sim = QuantizationSimModel(model, dummy, scheme, default_output_bw=8, default_param_bw=4, config_file=config)
        sim.set_and_freeze_param_encodings(f"{folder}/weights.encodings")

    def calibrate(simulated: nn.Module, _: Any = None) -> None:
        with torch.no_grad():
            for batch in images.split(100):
                simulated(batch)

    sim.compute_encodings(calibrate)
    return Done(sim.model, sum(seconds), [case.iterations] * num_layers)


def main() -> None:
    """Measure one case and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="the shared models.py")
    parser.add_argument("--network", choices=sorted(NETWORKS), required=True)
    parser.add_argument("--per", choices=("axis", "tensor"), required=True, help="granularity of the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=1000, help="of AdaRound, for each layer")
    parser.add_argument("--test-images", type=int, help="default: all")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with the figures")
    a = parser.parse_args()
    torch.set_num_threads(1)
    kept = stand_in_for_torchvision() if torch.version.cuda is None else None
    import aimet_torch  # in the process before the watch starts, like qhw on the other side

    case = Case(a.network, a.per, a.seed, a.iterations, a.test_images)
    figures = measure(load(a.models), case, quantize)
    del kept
    tools = {name: version(name) for name in ("aimet-torch", "torch", "torchvision")}
    assert aimet_torch is not None
    a.out.write_text(json.dumps({**figures, "versions": tools}), encoding="utf-8")


if __name__ == "__main__":
    main()
