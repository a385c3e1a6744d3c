# SPDX-License-Identifier: Apache-2.0
"""Running a quantized model in integers, as its target computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qhw.engine import QuantizedModel
from qhw.errors import IntegerError
from qhw.graph import MOVEMENT_KINDS, Operator
from qhw.integer.codes import Codes, carrier
from qhw.integer.exact import exact_settings
from qhw.integer.lower import Obstacle, lower
from qhw.integer.products import Lowered
from qhw.integer.site import PointIndex, Site
from qhw.numerics import quantize
from qhw.wording import listed

__all__ = ["Executed", "IntegerModel"]

Watch = Callable[[str, Codes], None]
Trace = Callable[["Executed"], None]


@dataclass(frozen=True)
class Executed:
    """One operator that was run.

    Attributes:
        site: What decides its result.
        form: What ran.
        given: Its operands as they were made; None for one that came from the host in float32.
        operands: Its operands on the grids that it reads.
        result: What came out; a tensor of reals where it leaves the accelerator in float32.
    """

    site: Site
    form: Lowered
    given: tuple[Codes | None, ...]
    operands: tuple[Codes, ...]
    result: Codes | Tensor


class IntegerModel:
    """A quantized model lowered to integers: what the chip computes, bit for bit as far as its target says.

    Operators of the host run in float32 between dequantized inputs and quantized outputs, as they would there.

    Args:
        result: The quantized model; its weights are read once, now.

    Attributes:
        sites: Operator -> what decides its result.

    Raises:
        IntegerError: an operator has no exact form; names the fields of the target that are missing.
    """

    def __init__(self, result: QuantizedModel) -> None:
        lowered, obstacles = lower(result)
        if obstacles:
            raise IntegerError(_words(result, obstacles))
        self.sites: Mapping[str, Site] = {name: site for name, (site, _) in lowered.items()}
        self._forms: Mapping[str, Lowered] = {name: form for name, (_, form) in lowered.items()}
        self._graph = result.float_graph.copy()
        self._operators = {operator.node: operator for operator in self._graph.operators}
        self._anchor = {m.name: site.name for site in self.sites.values() for m in site.members[1:]}
        self._points = PointIndex(result.plan)
        self._hosted = {one.name for one in result.plan.operators if one.where == "host"}
        self._qparams = result.encodings()
        self._given = {
            self._graph.node(name): (name, self._qparams[point.group]) for name, point in self._points.given.items()
        }
        *self._nodes, self._output = list(self._graph.module.graph.nodes)
        self._last_use = _last_uses([*self._nodes, self._output])
        self.input_names = result.input_names

    def __call__(self, *inputs: Tensor, watch: Watch | None = None, trace: Trace | None = None) -> Any:
        """The model's outputs, dequantized to float32.

        Args:
            inputs: float32, in the order of `input_names`.
            watch: Called with each quantized value as it is made: name of the tensor in the plan, and its codes.
            trace: Called with each operator as it was run.
        """
        with exact_settings():
            return self._run(inputs, watch, trace)

    def codes(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Integer codes of every quantized tensor, by its name in the plan, in execution order."""
        found: dict[str, Tensor] = {}

        def keep(name: str, codes: Codes) -> None:
            found.setdefault(name, codes.integers())

        self(*inputs, watch=keep)
        return found

    def accumulators(self, operator: str, *operands: Tensor) -> Tensor:
        """Accumulators of one operator before requantization, int64.

        Args:
            operator: Its name.
            operands: Integer codes of its operands.

        Raises:
            IntegerError: it has none.
        """
        form = self._forms.get(operator)
        if form is None or form.accumulate is None:
            raise IntegerError(f"{operator}: sums no products on the accelerator.")
        site = self.sites[operator]
        with exact_settings():
            carried = [x.to(carrier(q)) for x, q in zip(operands, site.inputs, strict=True)]
            return form.accumulate(carried).round().long()

    def _run(self, inputs: tuple[Tensor, ...], watch: Watch | None, trace: Trace | None) -> Any:
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for index, node in enumerate(self._nodes):
            if node.op == "get_attr":
                values[node] = self._graph.tensor(str(node.target))
            elif node.op == "placeholder":
                values[node] = next(given)
            else:
                values[node] = self._value(node, values, watch, trace)
            if watch is not None and node in self._given and isinstance(values[node], Tensor):
                # Here and not where it is read: that may be a view of it, which has another shape.
                name, qparams = self._given[node]
                watch(name, Codes(quantize(values[node], qparams, name=name).to(carrier(qparams)), qparams))
            for source in [n for n in (*node.all_input_nodes, node) if self._last_use.get(n, index) <= index]:
                if source.op != "get_attr":
                    values.pop(source, None)
        return fx.map_arg(self._output.args[0], lambda n: _real(values[n]))

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], watch: Watch | None, trace: Trace | None) -> Any:
        operator = self._operators.get(node.name)
        if operator is None:  # arithmetic of shapes, constants
            return self._call(node, values, _bare)
        if operator.name in self._anchor:
            return values[self._node_of(operator.inputs[0])]
        if operator.name in self.sites:
            return self._integer(operator, values, watch, trace)
        source = values[node.all_input_nodes[0]]
        if operator.is_view and operator.name not in self._hosted and isinstance(source, Codes):
            moved = self._call(node, values, _bare)
            return tuple(Codes(part, source.qparams) for part in moved) if isinstance(moved, tuple | list) else Codes(
                moved, source.qparams
            )  # fmt: skip
        if operator.is_view and isinstance(source, tuple | list):
            return self._call(node, values, lambda value: value)
        return self._call(node, values, _real)

    def _integer(self, operator: Operator, values: dict[fx.Node, Any], watch: Watch | None, trace: Trace | None) -> Any:
        site, form = self.sites[operator.name], self._forms[operator.name]
        operands = [self._operand(site, index, name, values, watch) for index, name in enumerate(operator.inputs)]
        found: Any = form.run([operand.values for operand in operands])
        if site.output is not None:
            found = Codes(found, site.output)
            if watch is not None:
                watch(site.members[-1].name, found)
        elif operator.kind in MOVEMENT_KINDS:
            found = Codes(found, site.inputs[0])
        if trace is not None:
            sources = [values[self._node_of(name)] for name in operator.inputs]
            given = tuple(source if isinstance(source, Codes) else None for source in sources)
            trace(Executed(site, form, given, tuple(operands), found))
        return found

    def _operand(self, site: Site, index: int, name: str, values: dict[fx.Node, Any], watch: Watch | None) -> Codes:
        value = values[self._node_of(name)]
        if not isinstance(value, Codes):
            point = self._points.source(self._graph, name) or self._points.edge(site.name, index)
            if point is None:
                raise IntegerError(f"{site.name}: operand '{name}' has no grid. Plan again.")
            qparams = self._qparams[point.group]
            value = Codes(quantize(value, qparams, name=name).to(carrier(qparams)), qparams)
            if watch is not None and point.role == "edge":
                watch(point.tensor, value)
        return Codes(self._forms[site.name].moves[index](value.values), site.inputs[index])

    def _node_of(self, name: str) -> fx.Node:
        return self._graph.node(name)

    def _call(self, node: fx.Node, values: dict[fx.Node, Any], read: Callable[[Any], Any]) -> Any:
        args: Any = fx.map_arg(node.args, lambda n: read(values[n]))
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: read(values[n]))
        if node.op == "call_module":
            return self._graph.module.get_submodule(str(node.target))(*args, **kwargs)
        target: Any = node.target
        return target(*args, **kwargs)


def _bare(value: Any) -> Any:
    """For a view, which needs axes in memory as in the float model; operators leave them as they like."""
    return value.values.contiguous() if isinstance(value, Codes) else value


def _real(value: Any) -> Any:
    """For an operator of the host, whose float sums may depend on the order in memory."""
    return value.reals().contiguous() if isinstance(value, Codes) else value


def _last_uses(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    return {source: index for index, node in enumerate(nodes) for source in node.all_input_nodes}


def _words(result: QuantizedModel, obstacles: tuple[Obstacle, ...]) -> str:
    by_reason: dict[str, list[str]] = {}
    for obstacle in obstacles:
        by_reason.setdefault(obstacle.reason, []).append(obstacle.operator)
    parts = [f"{reason} ({listed(names, 1)})" for reason, names in by_reason.items()]
    is_open = any(" is not stated" in part or " is 'unknown'" in part for part in parts)
    return (
        f"'{result.target.name}': its integer result cannot be computed: {'; '.join(parts)}. "
        f"{'State what is open in the target, or keep' if is_open else 'Keep'} these operators in float with "
        "--keep-float; 'qhw accumulators' proves sums of integers all the same."
    )
