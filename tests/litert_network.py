# SPDX-License-Identifier: Apache-2.0
"""A whole quantized model as a TFLite file, made from its integer operators: every result is an output.

    network = build_network(result, batch=8)
    codes = run_network(network, x_q)      # int8 codes of the input -> codes of every quantized tensor

Needs ai-edge-litert; see `litert_support`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from numpy.typing import NDArray

from qhw.engine import QuantizedModel
from qhw.graph import Operator
from qhw.integer import Site, sites
from tests.litert_forms import value
from tests.litert_place import Place, encoding_of
from tests.litert_writer import Encoding, Value, Writer
from tests.random_grids import grid_of

Array = NDArray[Any]


@dataclass(frozen=True)
class Shown:
    """One output of the file.

    Attributes:
        name: Of the tensor in the plan.
        shape: As torch has it.
        is_image: Whether the file has it with channels last.
    """

    name: str
    shape: tuple[int, ...]
    is_image: bool

    def as_torch(self, codes: Array) -> Array:
        """Its codes as torch has them."""
        if not self.is_image:
            return codes
        moved = np.moveaxis(codes, -1, 1)
        return moved.reshape(len(moved), *self.shape[1:])


@dataclass(frozen=True)
class Network:
    """A TFLite file.

    Attributes:
        content: Its bytes.
        outputs: In order.
    """

    content: bytes
    outputs: tuple[Shown, ...]


def build_network(result: QuantizedModel, batch: int) -> Network:
    """The file of a model that runs whole on google/litert-int8, for inputs of `batch` samples."""
    writer, graph = Writer(), result.float_graph
    by_name = {site.name: site for site in sites(result)}
    behind = {member.name for site in by_name.values() for member in site.members[1:]}
    given = []
    for name in result.input_names:
        encoding, shape = encoding_of(grid_of(result, name)), (batch, *graph.inputs[name][1:])
        given.append(writer.given(shape, encoding))
        writer.values[name] = Value(encoding, shape, plain=given[-1])
    shown: list[str] = []
    for operator in graph.operators:
        if operator.name in behind:
            continue
        if operator.kind == "Split":  # its parts are cut off one by one
            writer.values[operator.name] = writer.values[operator.inputs[0]]
            continue
        site = by_name.get(operator.name)
        made = value(_place(result, writer, operator, site, batch))
        for member in site.members if site is not None else (operator,):
            writer.values[member.name] = made
        shown.append(site.members[-1].name if site is not None else operator.name)
    return _finished(writer, given, shown)


def _place(result: QuantizedModel, writer: Writer, operator: Operator, site: Site | None, batch: int) -> Place:
    shape = (batch, *operator.shape[1:])
    if site is None:
        assert operator.is_view, f"{operator.name}: {operator.kind} does not run on the accelerator"
        source = operator.inputs[0]
        return Place(writer, result.float_graph, operator, (source,), shape, None, writer.values[source].encoding)
    names = tuple(_regridded(writer, site, index) for index in range(len(site.inputs)))
    encoding = encoding_of(site.output or site.inputs[0])
    return Place(writer, result.float_graph, operator, names, shape, site, encoding)


def _regridded(writer: Writer, site: Site, index: int) -> str:
    """The name of an operand on the grid that the operator reads: behind a QUANTIZE where the tensor has another."""
    name, wanted = site.operator.inputs[index], encoding_of(site.inputs[index])
    held = writer.values[name]
    if _key(held.encoding) == _key(wanted):
        return name
    other = f"{site.name}.input.{index}"
    tensor = writer.add("QUANTIZE", None, [writer.plain(name)], wanted)
    writer.values[other] = Value(wanted, held.shape, plain=tensor)
    return other


def _key(encoding: Encoding) -> tuple[float, int]:
    return float(np.asarray(encoding.scale)), encoding.zero_point


def _finished(writer: Writer, given: list[int], names: list[str]) -> Network:
    """Every value once, in the layout that it was made in."""
    outputs: dict[int, Shown] = {}
    for name in names:
        made = writer.values[name]
        tensor, is_image = (made.plain, False) if made.plain is not None else (made.image, True)
        assert tensor is not None
        if tensor not in given:
            outputs.setdefault(tensor, Shown(name, made.shape, is_image))
    return Network(writer.finish(given, list(outputs)), tuple(outputs.values()))


def run_network(network: Network, *codes: Array) -> dict[str, Array]:
    """Codes of every result, as torch has them, by the portable reference kernels.

    Args:
        network: The file.
        codes: int8, of each input, as torch has them.
    """
    interpreter = Interpreter(
        model_content=network.content, experimental_op_resolver_type=OpResolverType.BUILTIN_REF, num_threads=1
    )
    interpreter.allocate_tensors()
    for place, values in zip(interpreter.get_input_details(), codes, strict=True):
        interpreter.set_tensor(place["index"], np.ascontiguousarray(values))
    interpreter.invoke()
    found = [interpreter.get_tensor(place["index"]) for place in interpreter.get_output_details()]
    return {one.name: one.as_torch(y) for one, y in zip(network.outputs, found, strict=True)}
