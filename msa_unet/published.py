"""Checkpoints of the published code: where each of their tensors belongs here, and the way back."""

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import CheckpointError, ConfigError
from .loading import LoadReport, mismatches, shapes

if TYPE_CHECKING:
    from .model import MSAUnet

logger = logging.getLogger(__name__)

# published prefix -> ours; index k of the lists there and here counts levels
ATTENTION = {
    "conv": "spatial",
    "cat2.rat.conv1": "wide_pool",
    **{f"cat2.conv{i}": f"wide.{j}" for i, j in ((1, 0), (2, 1), (3, 3), (4, 4))},
    "cat2.cat1.rat.conv1": "narrow_pool",
    **{f"cat2.cat1.l{i}": f"narrow.{j}" for i, j in ((1, 0), (2, 1), (3, 3), (4, 4))},
}
MODULES = {
    **{f"downs.{k}.conv.{j}": f"encoder.stages.{k}.{j}" for k in range(4) for j in (0, 1, 3, 4)},
    **{f"bottleneck.conv.{j}": f"encoder.bottleneck.{j}" for j in (0, 1, 2, 4, 5)},
    **{f"ups.{3 * k}": f"decoder.ups.{3 - k}" for k in range(4)},
    **{f"ups.{3 * k + 2}.conv.{j}": f"decoder.blocks.{3 - k}.{j}" for k in range(4) for j in (0, 1, 3, 4)},
    **{f"ups.10.{theirs}": f"decoder.attention.0.{ours}" for theirs, ours in ATTENTION.items()},
}
DEAD = re.compile(r"ups\.[147]\.")  # attention blocks at the coarser skips, which the published forward never calls
HEAD_ORDER = (4, 0, 1, 2, 3)  # the published head reads the finest level first, ours is coarse to fine


def to_published(model: "MSAUnet") -> dict[str, Tensor]:
    """See `MSAUnet.to_published`."""
    if model.config.encoder != "msa" or model.config.attention != "finest":
        raise ConfigError(
            f"Only the published network has published names, and this one has encoder {model.config.encoder!r} with "
            f"attention {model.config.attention!r}: save it with save_pretrained instead."
        )
    state = model.state_dict()
    tensors = {}
    for theirs, ours in MODULES.items():
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if f"{ours}.{leaf}" in state:
                tensor = state[f"{ours}.{leaf}"]
                tensors[f"{theirs}.{leaf}"] = tensor[:, :, None, None] if _is_pointwise(theirs, leaf) else tensor
    tensors["finalconv.weight"] = torch.cat([state[f"head.votes.{i}.weight"] for i in HEAD_ORDER], 1)
    tensors["finalconv.bias"] = state["head.votes.4.bias"]
    return tensors


def from_published(cls: type["MSAUnet"], state_dict: Mapping[str, Tensor], antialias: bool) -> "MSAUnet":
    """See `MSAUnet.from_published`."""
    try:
        widths = tuple(state_dict[f"downs.{k}.conv.0.weight"].shape[0] for k in range(4))
        in_channels = state_dict["downs.0.conv.0.weight"].shape[1]
        num_classes = state_dict["finalconv.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"This is not a checkpoint of the published MSA-Unet, {error.args[0]} is missing; it has {len(state_dict)} "
            f"tensors, the first of them {', '.join(list(state_dict)[:5])}."
        ) from error
    with torch.device("meta"):
        model = cls(in_channels=in_channels, num_classes=num_classes, decoder_channels=widths, antialias=antialias)
    dead = [name for name in state_dict if DEAD.match(name)]
    live = {name: tensor for name, tensor in state_dict.items() if not DEAD.match(name)}
    problems = mismatches(shapes(to_published(model)), shapes(live))
    if problems:
        raise CheckpointError(
            f"This checkpoint does not fit the published MSA-Unet of widths {widths}, {len(problems)} tensors differ: "
            + "; ".join(problems)
            + "."
        )
    tensors = {}
    for theirs, ours in MODULES.items():
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if f"{theirs}.{leaf}" in live:
                tensor = live[f"{theirs}.{leaf}"]
                tensors[f"{ours}.{leaf}"] = tensor.flatten(1) if _is_pointwise(theirs, leaf) else tensor
    votes = torch.split(live["finalconv.weight"], [model.encoder.channels[::-1][i] for i in HEAD_ORDER], 1)
    tensors |= {f"head.votes.{i}.weight": vote for i, vote in zip(HEAD_ORDER, votes, strict=True)}
    tensors["head.votes.4.bias"] = live["finalconv.bias"]
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in tensors.items()}, assign=True)
    model.load_report = LoadReport(loaded=list(live), dropped=dead)
    if dead:
        logger.warning(
            "Dropped %d tensors of attention blocks that the published network never runs (see load_report.dropped).",
            len(dead),
        )
    return model.eval()


def _is_pointwise(theirs: str, leaf: str) -> bool:
    """Whether a published 1x1 convolution on a pooled vector is a linear layer here."""
    return leaf == "weight" and theirs.startswith("ups.10.cat2.conv")
