# SPDX-License-Identifier: Apache-2.0
"""Batch-norm folding: a batch norm behind a convolution or linear operator becomes part of its weights and bias."""

from typing import Any

import torch
from torch import Tensor

from qhw.decisions import Reason, Resources, Site, Step, StepReport, Survey, Verdict, counted
from qhw.extension import Algorithm, PluginInfo, hookimpl
from qhw.graph import WEIGHTED_KINDS, Graph, Operator, Placement
from qhw.numerics import ChannelNormal, FoldedBatchNorm
from qhw.schema import TargetSpec


class BatchNormFolding(Algorithm):
    """Folds running statistics and affine parameters into the operator before.

        W~[k] = gamma[k] W[k] / sqrt(var[k] + eps)                                  (11)
        b~[k] = beta[k] + gamma[k] (b[k] - mean[k]) / sqrt(var[k] + eps)            (12)

    The function in eval mode is preserved up to float rounding; the products are formed in float64.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, eqs. 9 to 12. Differs: an existing bias b is folded, too.
    """

    name = "batch_norm_folding"
    stage = "prepare"
    summary = "Fold batch norms into the convolution or linear operator before them."

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Each batch norm is a site; it is taken where its producer is foldable and has no other reader."""
        norms = [operator for operator in graph.operators if operator.kind == "BatchNormalization"]
        if not norms:
            reason = Reason(subject="graph.batch_norms", value=0, rule="the model has no batch norm")
            return Survey(verdict=Verdict(taken=False, reasons=(reason,)))
        sites = tuple(_site(graph, norm) for norm in norms)
        count = sum(site.verdict.taken for site in sites)
        reason = Reason(
            subject="graph.batch_norms",
            value=f"{count} of {len(norms)}",
            rule="{value} batch norms "
            + ("follow an operator with weights" if count == len(norms) else "can be folded"),
        )
        return Survey(verdict=Verdict(taken=count > 0, reasons=(reason,)), sites=sites)

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Fold the planned batch norms, in order."""
        pairs = [(norm, work.graph.operator(norm.inputs[0])) for norm in map(work.graph.operator, step.sites)]
        with work.graph.changes():
            for norm, producer in pairs:
                work.normals[producer.name] = normal_of(work.graph, norm)
                work.folded_norms[producer.name] = folded_norm_of(work.graph, norm)
                fold(work.graph, producer, norm)
        return StepReport(
            stage=step.stage, algorithm=self.name, summary=f"{counted(len(step.sites), 'batch norm')} folded"
        )


def normal_of(graph: Graph, norm: Operator) -> ChannelNormal:
    """What a batch norm makes of a normalized input: mean beta, standard deviation |gamma| (paper, eqs. 18, 19)."""
    module: Any = graph.module.get_submodule(str(norm.attributes["module"]))
    ones = torch.ones_like(module.running_var, dtype=torch.float64)
    std = ones if module.weight is None else module.weight.detach().double().abs()
    mean = torch.zeros_like(ones) if module.bias is None else module.bias.detach().double()
    return ChannelNormal(mean, std)


def folded_norm_of(graph: Graph, norm: Operator) -> FoldedBatchNorm:
    """All that is needed to take a batch norm out again."""
    module: Any = graph.module.get_submodule(str(norm.attributes["module"]))
    inner_std = (module.running_var.detach().double() + module.eps).sqrt()
    return FoldedBatchNorm(inner_std, module.eps, module.momentum, normal_of(graph, norm))


def factor_of(graph: Graph, norm: Operator) -> Tensor:
    """What a batch norm multiplies each channel by: float64 [channels]."""
    module: Any = graph.module.get_submodule(str(norm.attributes["module"]))
    factor: Tensor = (module.running_var.double() + module.eps).rsqrt()
    return factor if module.weight is None else factor * module.weight.detach().double()


def fold(graph: Graph, producer: Operator, norm: Operator) -> None:
    """Fold one batch norm into the operator before it and take it out of the graph."""
    module: Any = graph.module.get_submodule(str(norm.attributes["module"]))
    factor = factor_of(graph, norm)
    offset = torch.zeros_like(factor) if module.bias is None else module.bias.detach().double()
    bias = 0.0 if producer.bias is None else graph.tensor(producer.bias).detach().double()
    folded_bias = offset + factor * (bias - module.running_mean.double())
    weight = graph.tensor(str(producer.weight)).detach()
    folded = weight.double() * _along_outputs(factor, producer, weight)
    graph.set_tensor(str(producer.weight), folded.to(weight.dtype))
    if producer.bias is None:
        graph.add_bias(producer, folded_bias.to(weight.dtype))
    else:
        graph.set_tensor(producer.bias, folded_bias.to(weight.dtype))
    graph.remove(norm)


def _along_outputs(factor: Tensor, producer: Operator, weight: Tensor) -> Tensor:
    """The factor [out_channels] in a shape that broadcasts over the weight."""
    ones = (1,) * (weight.dim() - 2)
    if producer.kind == "ConvTranspose":  # weight [in, out / groups, *kernel]; group g reads its own inputs
        groups = int(producer.attributes["groups"])
        return (
            factor.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0).reshape(*weight.shape[:2], *ones)
        )
    return factor.reshape(-1, 1, *ones) if producer.weight_axis == 0 else factor.reshape(1, -1, *ones)


def _site(graph: Graph, norm: Operator) -> Site:
    reason = _obstacle(graph, norm)
    if reason is not None:
        return Site(name=norm.name, verdict=Verdict(taken=False, reasons=(reason,)))
    return Site(name=norm.name, verdict=Verdict(taken=True), absorbs=(norm.name,))


def _obstacle(graph: Graph, norm: Operator) -> Reason | None:
    """Why a batch norm cannot be folded; None where it can."""

    def no(fact: str, value: Any, rule: str) -> Reason:
        return Reason(subject=f"graph.{norm.name}.{fact}", value=value, rule=rule)

    module: Any = graph.module.get_submodule(str(norm.attributes["module"]))
    if module.running_mean is None or module.running_var is None:
        return no("statistics", "none", "the batch norm keeps no running statistics")
    source = norm.inputs[0]
    producer = next((operator for operator in graph.operators if operator.name == source), None)
    if producer is None or producer.kind not in WEIGHTED_KINDS or producer.weight is None:
        return no("producer", producer.kind if producer else "input", "it follows {value}, which has no weights")
    if len(graph.consumers(source)) > 1 or source in graph.output_values:
        return no("readers", len(graph.consumers(source)), "{value} operators or outputs read what it normalizes")
    for role, parameter in (("weight", producer.weight), ("bias", producer.bias)):
        if parameter is not None and _num_readers(graph, parameter) > 1:
            return no(role, parameter, "{value} is shared with another operator")
    if sum(o.attributes.get("module") == norm.attributes["module"] for o in graph.operators) > 1:
        return no("module", str(norm.attributes["module"]), "{value} is called more than once")
    if producer.kind == "Gemm" and len(norm.shape) != 2:
        return no("rank", len(norm.shape), "it normalizes another axis than the linear operator's outputs")
    return None


def _num_readers(graph: Graph, parameter: str) -> int:
    """How often a parameter is read, under whatever name, as a weight or otherwise."""
    tensor = graph.tensor(parameter)
    nodes = [node for node in graph.module.graph.nodes if node.op == "get_attr"]
    return sum(len(node.users) for node in nodes if graph.tensor(str(node.target)) is tensor)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Batch-norm folding.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [BatchNormFolding]
