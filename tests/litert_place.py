# SPDX-License-Identifier: Apache-2.0
"""One operator of a captured model where it is written into a TFLite file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from qhw.graph import Graph, Operator
from qhw.integer import Site
from qhw.numerics import QParams
from tests.litert_writer import Encoding, Value, Writer


@dataclass(frozen=True)
class Place:
    """One operator where it is written.

    Attributes:
        writer: The file.
        graph: The model.
        operator: The operator, and what is computed along with it by `site`.
        names: Its operands in the file.
        shape: Of its result, with the batch of the file.
        site: Its integers; None for a view.
        encoding: Where its result lies.
    """

    writer: Writer
    graph: Graph
    operator: Operator
    names: tuple[str, ...]
    shape: tuple[int, ...]
    site: Site | None
    encoding: Encoding

    @property
    def facts(self) -> Mapping[str, Any]:
        """The operator's attributes."""
        return self.operator.attributes

    @property
    def integers(self) -> Site:
        """The site of an operator that computes."""
        assert self.site is not None, self.operator
        return self.site

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the first operand."""
        return self.writer.values[self.names[0]].shape

    def plain(self, index: int = 0) -> int:
        """An operand as torch has it."""
        return self.writer.plain(self.names[index])

    def image(self) -> int:
        """The first operand with channels last."""
        return self.writer.image(self.names[0])

    def arguments(self) -> list[Any]:
        """Of the captured call, behind the first."""
        return list(self.graph.node(self.operator.name).args[1:])


def encoding_of(q: QParams) -> Encoding:
    """The same in the file's terms."""
    return Encoding(q.scale.numpy(), int(q.zero_point))


def as_plain(place: Place, tensor: int) -> Value:
    """The operator's result, in a tensor as torch has it."""
    return Value(place.encoding, place.shape, plain=tensor)


def as_image(place: Place, tensor: int) -> Value:
    """The operator's result, in a tensor with channels last."""
    return Value(place.encoding, place.shape, image=tensor)


def sliced(
    writer: Writer, tensor: int, ranges: Sequence[tuple[int, int]], encoding: Encoding, steps: Sequence[int] = ()
) -> int:
    """A tensor cut along every axis: first index, end and step."""
    begins, ends = zip(*ranges, strict=True)
    operands = [writer.numbers(*row) for row in (begins, ends, steps or [1] * len(begins))]
    return writer.add("STRIDED_SLICE", schema.StridedSliceOptionsT(), [tensor, *operands], encoding)
