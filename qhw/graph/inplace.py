# SPDX-License-Identifier: Apache-2.0
"""In-place operators rewritten to the pure ones, so that every value in the graph has one meaning."""

import operator

import torch
from torch import fx

from qhw.errors import CaptureError
from qhw.graph.operator import target_name

__all__ = ["remove_inplace"]


def remove_inplace(graph: fx.Graph) -> None:
    """Replace `aten.op_` by `aten.op`, and let later readers of the overwritten value read the new one.

    Raises:
        CaptureError: the overwritten value is a tensor of the model, shares memory with a value that is read later,
            or the operator has no pure form.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable:
            continue
        pure = _pure_form(node.target)
        overwritten = node.args[0] if node.args else None
        if pure is None or not isinstance(overwritten, fx.Node):
            raise CaptureError(
                f"{node.name}: '{node.target}' writes into a tensor and has no pure form. "
                "Rewrite that line without assigning into a tensor."
            )
        _refuse_shared_memory(node, overwritten)
        node.target = pure
        for user in [user for user in overwritten.users if _comes_after(user, node)]:
            user.replace_input_with(overwritten, node)


def _pure_form(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    pure = getattr(packet, target._overloadname, None) if packet is not None else None
    return pure if isinstance(pure, torch._ops.OpOverload) and not pure._schema.is_mutable else None


def _comes_after(user: fx.Node, node: fx.Node) -> bool:
    return user is not node and node < user


def _refuse_shared_memory(node: fx.Node, overwritten: fx.Node) -> None:
    """Writing into a view changes its base, too; we follow single values, not memory."""
    base = overwritten
    while (source := _aliased(base)) is not None:
        base = source
    if base.op == "get_attr":
        raise CaptureError(
            f"{node.name}: '{node.target}' writes into the model's own tensor '{base.target}', so forward keeps state. "
            "Compute a new value there, or skip that line in eval mode."
        )
    family, queue = {base}, [base]
    while queue:
        source = queue.pop()
        for user in source.users:
            # A view taken after the write sees the new value, as it reads what takes the old one's place.
            if user not in family and user is not node and user < node and _aliased(user) is source:
                family.add(user)
                queue.append(user)
    for member in family - {overwritten}:
        if any(_comes_after(user, node) for user in member.users):
            raise CaptureError(
                f"{node.name}: '{node.target}' writes into '{overwritten.name}', which shares memory with "
                f"'{member.name}' that is read later. Use the form without the trailing underscore there."
            )


def _aliased(node: fx.Node) -> fx.Node | None:
    """The value whose memory a node's result may be; None where it is new memory."""
    if node.op != "call_function" or not node.args:
        return None
    first = node.args[0]
    if node.target is operator.getitem or target_name(node).partition(".default")[0].endswith("dropout"):
        return first if isinstance(first, fx.Node) else None  # dropout hands its input through in eval mode
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    if not any(result.alias_info is not None for result in schema.returns):
        return None
    shared = [a for a, rule in zip(node.args, schema.arguments, strict=False) if rule.alias_info is not None]
    return next((a for a in shared if isinstance(a, fx.Node)), None)
