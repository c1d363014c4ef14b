"""Folding batch norms into the convolutions before them, wherever that is exact, for any architecture."""

from collections import Counter
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@torch.no_grad()
def fold_batch_norms(model: nn.Module, input_shape: tuple[int, ...]) -> list[str]:
    """Fold, in place, each batch norm of `model` (in eval mode) that directly follows a convolution.

    Which one follows which is not guessed from names: the model runs once on a small image, and a pair counts if the
    convolution used its module's own weight once, and nothing but the batch norm read its output.

    Returns:
        the names of the batch norms that are gone.
    """
    folded = []
    for conv_name, bn_name in _pairs(model, input_shape):
        conv: Any = model.get_submodule(conv_name)
        bn: Any = model.get_submodule(bn_name)
        if type(bn) is nn.BatchNorm2d:
            rest: nn.Module = nn.Identity()
        elif type(bn) is BatchNormAct2d:
            rest = nn.Sequential(bn.drop, bn.act)
        else:
            continue
        statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        weight, bias = fuse_conv_bn_weights(*(_double(t) for t in (conv.weight, conv.bias, *statistics)))
        dtype = conv.weight.dtype
        conv.weight, conv.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))
        parent, _, leaf = bn_name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, rest)
        folded.append(bn_name)
    return folded


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _pairs(model: nn.Module, input_shape: tuple[int, ...]) -> list[tuple[str, str]]:
    """Names of (convolution, batch norm) pairs, as one run shows them."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    names = {id(t): name for name, t in tensors.items()}
    image = next(model.parameters()).new_zeros(input_shape)
    with _Recorder() as recorder:
        model(image)
    reads = Counter(id(t) for _, inputs, _, _ in recorder.calls for t in inputs)
    made_by = {}  # output of a convolution -> name of its module
    pairs = []
    for op, inputs, output, args in recorder.calls:
        if op == "aten::convolution" and reads[id(inputs[1])] == 1:
            module, _, leaf = names.get(id(inputs[1]), "").rpartition(".")
            transposed = args[6]
            if leaf == "weight" and not transposed:
                made_by[id(output)] = module
        elif "batch_norm" in op and id(inputs[0]) in made_by and reads[id(inputs[0])] == 1:
            statistic = next((names[id(t)] for t in inputs[1:] if names.get(id(t), "").endswith(".running_mean")), "")
            module = statistic.rpartition(".")[0]
            if module and reads[id(tensors[statistic])] == 1:
                pairs.append((made_by[id(inputs[0])], module))
    return pairs


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch gives the mode no types
    """Keeps every operator call with its tensors, alive, so that their identities stay unique."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # as above
        self.calls: list[tuple[str, list[Tensor], Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        self.calls.append((func.name().partition(".")[0], inputs, output, args))
        return output
