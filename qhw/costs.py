# SPDX-License-Identifier: Apache-2.0
"""`qhw.cost`: cycles, time and energy of a model on a target, as far as the target's figures go."""

import os

from qhw.api import Model, graph_of, load_target, target_of
from qhw.decisions import QuantPlan, Resources
from qhw.engine import QuantizedModel, select
from qhw.errors import PlanError
from qhw.extension import Registry, default_registry
from qhw.graph import ExampleInputs, Graph
from qhw.roofline import CostReport, estimate
from qhw.schema import TargetSpec

__all__ = ["cost"]


def cost(
    model: Model | QuantizedModel,
    plan_or_target: QuantPlan | TargetSpec | str | os.PathLike[str] | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    target: TargetSpec | str | os.PathLike[str] | None = None,
    clock: str | None = None,
    registry: Registry | None = None,
) -> CostReport:
    """Estimate what one sample costs: a roofline per layer. Nothing is run; figures the target lacks are named.

    Args:
        model: A result of `qhw.quantize`, then without a second argument; or a module, or a captured graph.
        plan_or_target: A plan of `qhw.plan`, or a target as `qhw.plan` takes it: then with the formats that a plan
            without wishes would choose.
        example_inputs: One batch, where the model is not captured yet.
        target: The target of a plan that was read from a file, where no plugin registers it.
        clock: A preset of the target's `clocks`; absent: the default one.
        registry: Plugins to use; absent: all that are installed.

    Raises:
        TargetError: no such target or clock preset.
        PlanError: the target cannot run the model, or it is not said what to estimate.
    """
    registry = registry or default_registry()
    if isinstance(model, QuantizedModel):
        if plan_or_target is not None:
            raise PlanError("cost: a result has its plan and target already. Pass it alone.")
        return estimate(model.float_graph, model.plan, model.target, clock)
    graph: Graph = graph_of(model, example_inputs)
    if isinstance(plan_or_target, QuantPlan):
        return estimate(graph, plan_or_target, target_of(plan_or_target, target, registry), clock)
    if plan_or_target is None:
        raise PlanError("cost: needs a plan or a target beside a float model. Pass one, or a result of qhw.quantize.")
    spec = plan_or_target if isinstance(plan_or_target, TargetSpec) else load_target(plan_or_target, registry=registry)
    # Data decides ranges and algorithms, neither of which costs anything at run time.
    made = select(graph, spec, registry, Resources(calibration=True, labels=False))
    return estimate(graph, made, spec, clock)
