# SPDX-License-Identifier: Apache-2.0
"""The quantized model: an ordinary nn.Module that knows its plan, target and encodings."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from qhw.decisions import QuantPlan, StepReport
from qhw.engine.insert import insert_modules
from qhw.engine.quantizers import quantizer_of
from qhw.errors import ResultError
from qhw.graph import Graph, QuantPoint
from qhw.numerics import FakeQuantizer, FoldedBatchNorm, QParams, quantize
from qhw.schema import TargetSpec

__all__ = ["QuantizedModel"]


class QuantizedModel(nn.Module):
    """A model with quantizers at every point of its plan: it computes as the target rounds, in floating point.

    It trains, saves, deep-copies and compiles like any module. Inputs and outputs are the original model's, as flat
    tensors in the order of `input_names`.

    Args:
        graph: The graph after all steps; copied.
        plan: The decisions.
        target: The resolved target.
        qparams: Group of points -> its scale and zero point; all groups of the plan.
        steps: What each step reported.
        provenance: Facts for the manifest.
        samples: A few calibration samples by input name, to verify the result with.
        folded_norms: Operator -> the batch norm that is part of its weights.

    Attributes:
        input_names: Names of the inputs, in order.
        plan: The decisions.
        target: The resolved target.
        steps: What each step reported.
        provenance: Facts for the manifest: data digest, seed, versions.
        samples: A few calibration samples by input name; empty without data.
        folded_norms: Operator -> the batch norm that is part of its weights, for training to take out again.
        trained_form: What it trains as, between `qhw.trainable` and `qhw.freeze`; else None.

    Raises:
        ResultError: a group has no qparams.
    """

    def __init__(
        self,
        graph: Graph,
        plan: QuantPlan,
        target: TargetSpec,
        qparams: Mapping[str, QParams],
        steps: tuple[StepReport, ...] = (),
        provenance: Mapping[str, Any] | None = None,
        samples: Mapping[str, Tensor] | None = None,
        folded_norms: Mapping[str, FoldedBatchNorm] | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.target = target
        self.steps = steps
        self.provenance = dict(provenance or {})
        self.samples = dict(samples or {})
        self.folded_norms = dict(folded_norms or {})
        self.trained_form: Any = None
        missing = [point.group for point in plan.points if point.group not in qparams]
        if missing:
            raise ResultError(f"result: no scale for '{missing[0]}'. Quantize again.")
        self.input_names = tuple(graph.inputs)
        simulated = graph.copy()
        self._float_form = simulated.copy(share_tensors=True)
        self._paths = insert_modules(
            simulated,
            plan.points,
            lambda point: quantizer_of(target, graph, point, qparams[point.group]),
        )
        self.module = simulated.module
        self.module.train(False)
        self.training = False

    @property
    def float_graph(self) -> Graph:
        """The graph without quantizers, in the state after all steps; exporters read its operators.

        It holds this module's own tensors, not copies. Copy it before changing it.

        Raises:
            ResultError: it is being trained.
        """
        self._check_settled()
        for path, submodule in self._float_form.module.named_modules(remove_duplicate=False):
            own = self.module.get_submodule(path)
            submodule._parameters.update(own._parameters)
            submodule._buffers.update(own._buffers)
        return self._float_form

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The simulated output.

        Args:
            inputs: In the order of `input_names`.
            named: Or by name.

        Raises:
            ResultError: an input is missing, given twice, or not one of the model's.
        """
        if named or len(inputs) != len(self.input_names):
            rest = self.input_names[len(inputs) :]
            if set(named) != set(rest) or len(inputs) > len(self.input_names):
                got = ", ".join([*(f"input {i}" for i in range(len(inputs))), *named]) or "none"
                raise ResultError(f"result: the model takes {', '.join(self.input_names)}; got {got}. Pass each once.")
            inputs = (*inputs, *(named[name] for name in rest))
        return self.module(*inputs)

    def train_as(self, form: Any, module: fx.GraphModule, paths: Mapping[str, str]) -> None:
        """Take another module in this one's place, for training.

        Args:
            form: What can turn it back.
            module: Takes the same inputs.
            paths: Group -> path of its quantizer in that module; biases may be missing.
        """
        self.trained_form = form
        self.module = module
        self._paths = dict(paths)
        self.train(self.training)

    def _check_settled(self) -> None:
        if self.trained_form is not None:
            raise ResultError(
                "result: it is being trained, and its codes are not settled. Call qhw.freeze(result) first."
            )

    def quantizer(self, name: str) -> FakeQuantizer:
        """The quantizer of a point or group.

        Raises:
            ResultError: no such point, or one whose quantizer is made when training ends.
        """
        group = next((point.group for point in self.plan.points if name in (point.name, point.group)), None)
        if group is None:
            known = ", ".join(point.name for point in self.plan.points)
            raise ResultError(f"result: no quantizer at '{name}'. Points: {known}")
        if group not in self._paths:
            self._check_settled()
        return cast(FakeQuantizer, self.module.get_submodule(self._paths[group]))

    def encodings(self) -> dict[str, QParams]:
        """Group -> scale, zero point and code bounds.

        Raises:
            ResultError: it is being trained.
        """
        self._check_settled()
        return {group: self.quantizer(group).qparams for group in self.groups()}

    def groups(self) -> tuple[str, ...]:
        """All groups of points, in order of first use."""
        return tuple(dict.fromkeys(point.group for point in self.plan.points))

    def codes(self, point: QuantPoint) -> Tensor:
        """Integer codes of a weight or bias point, in the smallest dtype that holds them.

        Raises:
            ResultError: it is being trained.
        """
        value = self.float_graph.tensor(point.tensor).detach()
        return quantize(value, self.quantizer(point.group).qparams, name=point.name)

    def set_enabled(self, enabled: bool, points: Iterable[str] | None = None) -> None:
        """Switch quantizers on or off: all, or those of the named points. Off, the float passes through."""
        for name in self._paths if points is None else points:
            self.quantizer(name).enabled = enabled


def flat_outputs(output: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
