# SPDX-License-Identifier: Apache-2.0
"""Executor `onnxruntime`: runs an ONNX artefact on the CPU."""

import platform
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qhw.errors import ExportError
from qhw.extension import Executor, PluginInfo, hookimpl
from qhw_plugins.onnx_encodings import tensor_of

__all__ = ["OnnxRuntime", "optimized_operators"]

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")


class OnnxRuntime(Executor):
    """ONNX Runtime's CPU provider on one thread, so that sums of float operators have one order."""

    name = "onnxruntime"
    summary = "ONNX Runtime on the CPU, one thread."

    def available(self) -> str | None:
        """None where onnxruntime imports."""
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            return f"onnxruntime cannot be imported ({error}). Run: pip install onnxruntime"
        return None

    def load(self, artefact: Path) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
        """A function from inputs by name to the list of outputs.

        Raises:
            ExportError: onnxruntime refuses the file, or later an input.
        """
        session = _session(str(artefact), str(artefact))
        return lambda values: _run(session, values, str(artefact))

    def load_codes(self, artefact: Path) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        """A function from inputs by name to the codes behind each QuantizeLinear of the artefact.

        The codes are made outputs of the model. onnxruntime then still computes the operator before them in integers;
        int8 outputs need the session option that is set here anyway.

        Raises:
            ExportError: onnxruntime refuses the file, or later an input.
        """
        model, codes = _with_codes(artefact)
        session = _session(model, str(artefact))
        first = len(session.get_outputs()) - len(codes)

        def run(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = _run(session, values, str(artefact))[first:]
            return dict(zip(codes, found, strict=True))

        return run

    def versions(self) -> dict[str, str]:
        """onnxruntime, and the CPU features that decide its integer arithmetic."""
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__, "machine": platform.machine(), "cpu": " ".join(_cpu_flags())}


def optimized_operators(artefact: Path, folder: Path, *, codes: bool = False) -> Counter[str]:
    """Operator types of the graph that onnxruntime really runs, after its optimizations.

    Args:
        artefact: The model.
        folder: Where the optimized model may be written.
        codes: Of the graph that `OnnxRuntime.load_codes` runs.
    """
    import onnx

    optimized = folder / "optimized.onnx"
    model = _with_codes(artefact)[0] if codes else str(artefact)
    _session(model, str(artefact), optimized)
    return Counter(node.op_type for node in onnx.load(optimized).graph.node)


def _with_codes(artefact: Path) -> tuple[Any, list[str]]:
    """The model with the codes behind each QuantizeLinear as further outputs; the tensors that they belong to."""
    import onnx

    try:
        model = onnx.load(artefact)
    except Exception as error:  # OSError, or protobuf's own class, which moves between versions
        raise ExportError(f"{artefact}: cannot be read as ONNX: {_first_line(error)}. Export it again.") from error
    shown = {value.name for value in model.graph.output}
    made = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    codes = {name: tensor for name in made if (tensor := tensor_of(name)) is not None and name not in shown}
    known = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in codes)
    return model, list(codes.values())


def _run(session: Any, values: Mapping[str, np.ndarray], where: str) -> list[np.ndarray]:
    inputs = [value.name for value in session.get_inputs()]
    missing = [name for name in inputs if name not in values]
    if missing:
        raise ExportError(f"{where}: input '{missing[0]}' is missing. Inputs: {', '.join(inputs)}.")
    try:
        return session.run(None, {name: np.ascontiguousarray(values[name]) for name in inputs})  # type: ignore[no-any-return]
    except Exception as error:  # onnxruntime raises classes of its own, not exported as one base
        raise ExportError(f"{where}: onnxruntime fails: {_first_line(error)}") from error


def _session(model: Any, where: str, optimized: Path | None = None) -> Any:
    """A session of a model: the path of a file, or an `onnx.ModelProto`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if _quantizes_to_floats(model):
        # onnxruntime 1.32 takes a Relu before such a QuantizeLinear for one that saturation does (ReluQuantFusion), and
        # refuses a Clip there (ClipQuantFusion): both know zero points of integers alone.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = model if isinstance(model, str) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own, not exported as one base
        raise ExportError(f"{where}: onnxruntime refuses it: {_first_line(error)}") from error


def _quantizes_to_floats(model: Any) -> bool:
    """Whether a zero point, and with it the type of codes, is a small float."""
    import onnx

    from qhw_plugins.onnx_stored import CODE_TYPES

    try:
        graph = (onnx.load(model, load_external_data=False) if isinstance(model, str) else model).graph
    except Exception:  # no model: onnxruntime says so in its own words
        return False
    zeros = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2}
    kinds = (CODE_TYPES.get(tensor.data_type) for tensor in graph.initializer if tensor.name in zeros)
    return any(kind is not None and kind.elements is not None for kind in kinds)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _cpu_flags() -> list[str]:
    """The flags among those that matter; empty where the system does not tell."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text(encoding="utf-8", errors="replace").split()) if path.is_file() else set()
    return [flag for flag in _FLAGS if flag in words]


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Run ONNX artefacts in ONNX Runtime.")


@hookimpl
def qhw_register_executors() -> list[type[Executor]]:
    return [OnnxRuntime]
