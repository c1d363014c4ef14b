"""A trained network's weights for other classes or another number of channels: kept where they mean the same."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import ConfigError
from .loading import LoadReport

if TYPE_CHECKING:
    from .model import MSAUnet


def adapt(tensors: Mapping[str, Tensor], source: "MSAUnet", model: "MSAUnet", report: LoadReport) -> dict[str, Tensor]:
    """The tensors of `source`, as stored, made to fit `model`; the two differ in classes and channels alone.

    Args:
        tensors: the state dict of `source`.
        source: the network as stored, without weights.
        model: the network as wanted, without weights.
        report: what became of each tensor is added to it.

    Raises:
        ConfigError: a layer of the backbone depends on the channels in a way that has no known adaptation.
    """
    old_names, names = source.config.class_names, model.config.class_names
    kept = [old_names.index(name) if name in old_names else None for name in names]
    same_classes = old_names == names
    old, new = source.config.in_channels, model.config.in_channels
    adapted = {}
    for name, wanted in model.state_dict().items():
        tensor = tensors[name]
        if name.startswith("head.") and not same_classes:
            fan_in = source.get_parameter(f"{name.rpartition('.')[0]}.weight")[0].numel()
            adapted[name] = _class_rows(tensor, kept, len(old_names), fan_in)
            (report.adapted if any(k is not None for k in kept) else report.initialised).append(name)
        elif tensor.shape != wanted.shape:
            first, stop, groups = _image_inputs(name, source)
            if tensor.shape[0] != wanted.shape[0] or stop - first != groups[0] * old * groups[1]:
                raise ConfigError(
                    f"in_channels={new} is not possible: {name} of {source.config.encoder!r} reads {old} channels in a "
                    "layout that is not known. Build a new MSAUnet with that many channels and train it."
                )
            part = _channels(tensor[:, first:stop], old, new, groups)
            adapted[name] = torch.cat([tensor[:, :first], part, tensor[:, stop:]], 1)
            report.adapted.append(name)
        else:
            adapted[name] = tensor
            report.loaded.append(name)
    report.initialised += [f"class {name!r}" for name in names if name not in old_names]
    report.dropped += [f"class {name!r}" for name in old_names if name not in names]
    return adapted


def _class_rows(tensor: Tensor, kept: list[int | None], num_classes: int, fan_in: int) -> Tensor:
    """The rows of a head convolution for other classes; new ones as torch initialises a convolution.

    A class has one row, or one per sub-pixel, side by side as PixelShuffle reads them.
    """
    rows = tensor.reshape(num_classes, -1, *tensor.shape[1:])
    bound = fan_in**-0.5
    fresh = torch.empty(len(kept), *rows.shape[1:], dtype=tensor.dtype).uniform_(-bound, bound)
    for row, index in zip(fresh, kept, strict=True):
        if index is not None:
            row.copy_(rows[index])
    return fresh.flatten(0, 1)


def _image_inputs(name: str, source: "MSAUnet") -> tuple[int, int, tuple[int, int]]:
    """Which inputs of a layer are the image's: first, stop, and how many groups lie around and within a channel."""
    channels = source.config.in_channels
    total = source.get_parameter(name).shape[1]
    if name.startswith("encoder.fuse."):  # reads the image last, rearranged by pixel_unshuffle(2): channel, sub-pixel
        return total - 4 * channels, total, (1, 4)
    if stage := re.match(r"encoder\.stages\.(\d)", name):  # reads the stage before, then the image
        k = int(stage[1])
        first = source.encoder.channels[k - 1] if k else 0
        return first, first + channels, (1, 1)
    if name.endswith("patch_embed.input_proj.weight"):  # channel, pixel of the patch
        return 0, total, (1, total // channels)
    return 0, total, (total // channels, 1)  # timm's stems: pixel of the patch, if any, then channel


def _channels(weight: Tensor, old: int, new: int, groups: tuple[int, int]) -> Tensor:
    """Input weights (O, around * old * within, ...) for `new` channels, as timm adapts stems."""
    around, within = groups
    split = weight.reshape(len(weight), around, old, within, *weight.shape[2:])
    if new == 1:
        return split.sum(2).flatten(1, 2)
    return (split[:, :, [i % old for i in range(new)]] * (old / new)).flatten(1, 3)
