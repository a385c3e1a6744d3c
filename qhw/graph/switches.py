# SPDX-License-Identifier: Apache-2.0
"""Where an exported graph calls batch norm or dropout, put the submodule that reads `self.training`."""

import re
from typing import Any

from torch import Tensor, fx, nn

from qhw.graph.attributes import target_name
from qhw.graph.switching import DROPOUT_FORMS, BatchNorm, Dropout

__all__ = ["Switches", "layer_path"]

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_COUNTER = "num_batches_tracked"


class Switches:
    """Makes the submodules of one capture.

    Args:
        root: Holds the tensors captured so far, and gets the submodules.
        model: The model that was exported, to find its layers by path.
    """

    def __init__(self, root: nn.Module, model: nn.Module) -> None:
        self._root = root
        self._layers = dict(model.named_modules(remove_duplicate=False))
        self._buffers = dict(model.named_buffers(remove_duplicate=False))
        self._made: dict[str, nn.Module] = {}

    def switch(self, node: fx.Node, copy: fx.Node) -> None:
        """Turn a copied node into a call of a submodule, if it is a batch norm or a dropout.

        A batch norm whose scale or statistics are computed stays the operator it is.
        """
        name = target_name(copy)
        form = name.removeprefix("aten.").removesuffix(".default")
        if name == "aten.batch_norm.default":
            if any(isinstance(a, fx.Node) and a.op != "get_attr" for a in copy.args[1:5]):
                return
            path = self._batch_norm(node, copy)
        elif form in DROPOUT_FORMS:
            path = self._dropout(node, Dropout(float(copy.args[1]), form))  # type: ignore[arg-type]
        else:
            return
        copy.op, copy.target, copy.args, copy.kwargs = "call_module", path, (copy.args[0],), {}

    def _batch_norm(self, node: fx.Node, copy: fx.Node) -> str:
        given = {n: str(a.target) for n, a in zip(_TENSORS, copy.args[1:5], strict=True) if isinstance(a, fx.Node)}
        around = layer_path(node)[0]
        path = next(iter(given.values())).rpartition(".")[0] if given else around
        layer = self._layers.get(path)
        momentum, eps = copy.args[6], float(copy.args[7])  # type: ignore[arg-type]
        is_layer = bool(path) and (isinstance(layer, nn.modules.batchnorm._BatchNorm) or self._owns(path, given))
        if not is_layer:
            path = f"{around}.batch_norm" if around else "batch_norm"
        elif getattr(layer, "momentum", momentum) is None:
            momentum = None  # export wrote the 0.0 of eval mode in its place
        held = {**dict(self._root.named_parameters(remove_duplicate=False)), **dict(self._root.named_buffers())}
        tensors: dict[str, Tensor] = {name: held[target] for name, target in given.items()}
        counter = self._buffers.get(f"{path}.{_COUNTER}")
        if counter is not None and "running_mean" in tensors:
            tensors[_COUNTER] = counter
        module = BatchNorm(None if momentum is None else float(momentum), eps)  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(name, tensor)
            else:
                module.register_buffer(name, tensor)
        return self._put(path, module, is_layer)

    def _owns(self, path: str, given: dict[str, str]) -> bool:
        """Whether a module is a batch norm in all but class: its tensors, under the usual names, and nothing else."""
        layer = self._layers.get(path)
        if layer is None or not path or any(True for _ in layer.children()):
            return False
        own = {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())}
        return own <= {*_TENSORS, _COUNTER} and all(target == f"{path}.{name}" for name, target in given.items())

    def _dropout(self, node: fx.Node, module: Dropout) -> str:
        path = layer_path(node)[0]
        is_layer = bool(path) and isinstance(self._layers.get(path), nn.modules.dropout._DropoutNd)
        if not is_layer:
            path = f"{path}.dropout" if path else "dropout"
        return self._put(path, module, is_layer)

    def _put(self, path: str, module: nn.Module, is_layer: bool) -> str:
        """Add a submodule, in a layer's place or a free one; an equal one that was made is used again."""
        wanted, number = path, 0
        while path in self._made or (path in self._layers and not (is_layer and path == wanted)):
            if path in self._made and _same(self._made[path], module):
                return path
            number += 1
            path = f"{wanted}_{number}"
        parent, _, leaf = path.rpartition(".")
        holder = self._root
        for part in parent.split(".") if parent else ():
            if not hasattr(holder, part):
                holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        setattr(holder, leaf, module)
        self._made[path] = module
        return path


def _same(a: nn.Module, b: nn.Module) -> bool:
    def facts(module: Any) -> Any:
        plain = {key: module.__dict__.get(key) for key in ("momentum", "eps", "p", "form")}
        tensors = (*module.named_parameters(), *module.named_buffers())
        return type(module), plain, [(name, id(tensor)) for name, tensor in tensors]

    return bool(facts(a) == facts(b))


def layer_path(node: fx.Node) -> tuple[str, bool]:
    """Path of the innermost module around an exported node, and whether that is a torch.nn layer."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values())) if stack else ("", "")
    if path.startswith("_empty_nn_module_stack"):  # torch's mark for shape arithmetic
        path = ""
    return re.sub(r"@\d+$", "", path), bool(path) and str(kind).startswith("torch.nn.modules.")
