"""Encoders: an image in, one feature map per level out, finest first, every level fused with all finer ones.

`MSAEncoder` is the published network's; `TimmEncoder` gives the same idea to any architecture of timm. Both have
`channels` and `strides` (of the levels) and `frame(height, width)`, the size that an image must be padded to.
"""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from timm.layers.patch_embed import PatchEmbed
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import EncoderError
from .layers import conv_bn_relu, double_conv, may_differ, resize
from .loading import mismatches, shapes


def list_encoders(pattern: str = "*") -> list[str]:
    """Names that `MSAUnet(encoder=...)` takes: "msa" and every architecture of the installed timm.

    >>> list_encoders("resnet18*")
    ['resnet18', 'resnet18d']

    Args:
        pattern: shell-style wildcard, for example "convnext*".
    """
    return fnmatch.filter(["msa", *timm.list_models()], pattern)


class MSAEncoder(nn.Module):
    """The published encoder: four stages, each reading the image and every earlier stage, and a bottleneck.

    (N, C, H, W) -> [(N, f0, H, W), (N, f1, H/2, W/2), ..., (N, f3, H/8, W/8), (N, 2*f3, H/16, W/16)], sizes rounded
    down. H and W are at least 16.

    Source: MSA-Unet (Guo and Wang, 2023), "dense multi-level downsampling".
    """

    strides = (1, 2, 4, 8, 16)

    def __init__(self, in_channels: int = 3, widths: tuple[int, ...] = (), antialias: bool = True) -> None:
        super().__init__()
        self.widths = widths = widths or (64, 128, 256, 512)
        if len(widths) != 4:
            raise EncoderError(f"decoder_channels is {widths}; encoder 'msa' has four stages: give four widths.")
        f0, f1, f2, f3 = widths
        self.in_channels = in_channels
        self.antialias = antialias
        self.grad_checkpointing = False
        self.stages = nn.ModuleList(
            [
                double_conv(in_channels, f0, kernel=5),
                double_conv(f0 + in_channels, f1),
                double_conv(f1 + in_channels + f0, f2),
                double_conv(f2 + in_channels + f0 + f1, f3),
            ]
        )
        self.bottleneck = nn.Sequential(
            nn.Conv2d(f3, f3, 3, padding=1, groups=f3, bias=False),  # depthwise
            *conv_bn_relu(f3, 2 * f3, kernel=1),
            *conv_bn_relu(2 * f3, 2 * f3),
        )
        self.channels = (*widths, 2 * f3)

    def frame(self, height: int, width: int) -> tuple[int, int]:
        # four poolings need 16 pixels; nothing else is padded, the resizes make odd sizes meet again
        return torch.sym_max(height, 16), torch.sym_max(width, 16)  # type: ignore[return-value] # SymInt when traced

    def forward(self, x: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        pooled: list[Tensor] = []
        stage_input = x
        for stage in self.stages:
            if pooled:
                size = pooled[-1].shape[-2:]
                earlier = [resize(t, size, self.antialias) for t in (x, *pooled[:-1])]
                stage_input = torch.cat([pooled[-1], *earlier], 1)
            if self.grad_checkpointing and self.training:
                features.append(checkpoint(stage, stage_input, use_reentrant=False))
            else:
                features.append(stage(stage_input))
            pooled.append(F.max_pool2d(features[-1], 2))
        return [*features, self.bottleneck(pooled[-1])]

    def taps(self, x: Tensor) -> list[Tensor]:
        """The feature maps that `freeze_encoder` counts: here, all of them."""
        return self.forward(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: keep no activations inside the stages."""
        self.grad_checkpointing = enable


class TimmEncoder(nn.Module):
    """Any timm architecture with dense fusion: (N, C, H, W) -> one map per level at strides 2, 4, 8, ...

    H and W are as `frame` gives them. Each level sees the backbone's tap at its stride, where there is one, and all
    finer levels pooled to its size. The finest level sees the image itself, rearranged to stride 2, so that edges and
    thin structures have a skip even where the backbone starts at stride 4 or 16.

    Args:
        name: a timm architecture, `.tag` allowed.
        widths: channels per level, finest first; empty for the defaults.
        weights: False for random, True for timm's own download, or a path to a .safetensors file with the timm model's
            keys.

    Raises:
        EncoderError: timm refuses `kwargs`, or `weights` do not fit or cannot be fetched.
    """

    def __init__(
        self,
        name: str,
        in_channels: int = 3,
        widths: tuple[int, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        weights: bool | str | Path = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.plan = plan = make_plan(name, tuple(sorted((kwargs or {}).items())))
        self.backbone = _create(name, {**(kwargs or {}), **plan.options}, in_channels, weights)
        for module in self.backbone.modules():
            if isinstance(module, PatchEmbed) and not module.strict_img_size:
                module.img_size = None  # its check of the size, which `frame` makes idle, would compile once per size
        self.strides = tuple(2 << i for i in range(int(math.log2(max(plan.levels)))))
        self.channels = self.widths = widths or DEFAULT_WIDTHS[: len(self.strides)]
        if len(self.channels) != len(self.strides):
            raise EncoderError(
                f"decoder_channels {self.channels} has {len(self.channels)} widths, and {name} has {len(self.strides)} "
                f"levels (strides {', '.join(map(str, self.strides))}): give one width per level, finest first."
            )
        # taps that are moved to another level are thinned out first: a 1x1 convolution commutes with the resize
        self.project = nn.ModuleList(
            nn.Conv2d(channels, self.channels[self.strides.index(level)], 1, bias=False)
            if plan.spread
            else nn.Identity()
            for channels, level in zip(plan.channels, plan.levels, strict=True)
        )
        self.fuse = nn.ModuleList()
        dense = 4 * in_channels
        for i, (stride, width) in enumerate(zip(self.strides, self.channels, strict=True)):
            own = [
                width if plan.spread else c
                for c, level in zip(plan.channels, plan.levels, strict=True)
                if level == stride
            ]
            self.fuse.append(nn.Sequential(*conv_bn_relu(dense + sum(own), width, kernel=3 if i == 0 else 1)))
            dense += width

    def frame(self, height: int, width: int) -> tuple[int, int]:
        # three multiples of the coarsest stride at least: batch norm in training needs more than one position, and the
        # unpadded convolutions of the Inception family need 75 pixels
        return _frame(height, self.strides[-1]), _frame(width, self.strides[-1])

    def forward(self, x: Tensor) -> list[Tensor]:
        height, width = x.shape[-2:]
        own: dict[int, list[Tensor]] = {stride: [] for stride in self.strides}
        for tap, project, level in zip(self.taps(x), self.project, self.plan.levels, strict=True):
            tap = project(tap)
            size = (height // level, width // level)
            own[level].append(resize(tap, size) if may_differ(tap.shape[-2:], size) else tap)
        finer = [F.pixel_unshuffle(x, 2)]  # the image at stride 2, nothing lost: (N, 4C, H/2, W/2)
        features: list[Tensor] = []
        for stride, fuse in zip(self.strides, self.fuse, strict=True):
            if features:
                # every finer level is pooled once more per step down, never again from full resolution
                finer = [F.max_pool2d(features[-1], 2), *(F.avg_pool2d(t, 2) for t in finer)]
            features.append(fuse(torch.cat([*own[stride], *finer], 1)))
        return features

    def taps(self, x: Tensor) -> list[Tensor]:
        """The backbone's own feature maps, NCHW, finest first, at the strides it produces."""
        plan = self.plan
        rows = cols = 1
        if plan.unit:  # a backbone that takes only multiples of a size sees the frame resized to the nearest one
            rows, cols = (plan.units(side, unit) for side, unit in zip(x.shape[2:], plan.unit, strict=True))
            x = resize(x, (rows * plan.unit[0], cols * plan.unit[1]))
        elif plan.numerator != plan.denominator:  # e.g. patches of 14: shrink by 14/16 and the tokens land on stride 16
            x = resize(x, [side * plan.numerator // plan.denominator for side in x.shape[2:]])
        x = _split(x, rows, cols) if plan.split else x
        taps = [t.permute(0, 3, 1, 2) if plan.channels_last else t for t in self.backbone(x)][plan.skip :]
        return [_join(t, rows, cols) for t in taps] if plan.split else taps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in the backbone, timm's way."""
        backbone: Any = self.backbone
        for module in (backbone, getattr(backbone, "model", backbone)):
            if hasattr(module, "set_grad_checkpointing"):
                module.set_grad_checkpointing(enable)
                return
        raise EncoderError(f"{self.plan.name} has no gradient checkpointing in timm {timm.__version__}.")


DEFAULT_WIDTHS = (32, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Plan:
    """How a backbone is fed and where its taps go; found by asking a weightless copy on the meta device."""

    name: str
    options: dict[str, Any]  # what timm needs to take other sizes and to give taps from several depths
    channels: tuple[int, ...]  # per tap
    levels: tuple[int, ...]  # per tap, the power-of-two stride it serves
    spread: bool  # all taps had one stride and were spread over levels
    skip: int  # leading taps at stride 1 that no level wants
    channels_last: bool  # taps come as NHWC
    unit: tuple[int, int] | None  # (H, W) that the input must be a multiple of, if more than a level's stride
    split: bool  # the backbone has a fixed size: units are cut apart and go through as a batch
    numerator: int  # the input is scaled by numerator / denominator to bring taps to a power-of-two stride
    denominator: int

    def units(self, side: int, unit: int) -> int:
        """How many units come nearest to `side` scaled to the backbone's strides."""
        scaled, whole = side * self.numerator, unit * self.denominator
        return torch.sym_max((2 * scaled + whole) // (2 * whole), 1)  # type: ignore[return-value] # SymInt when traced


@cache
def make_plan(name: str, kwargs: tuple[tuple[str, Any], ...] = ()) -> Plan:
    """Find out from the architecture itself, without weights, what `TimmEncoder` must know of it."""
    given = dict(kwargs)
    with torch.device("meta"):
        net = _create(name, given)
        options: dict[str, Any] = {}
        reductions = list(net.feature_info.reduction())
        skip = sum(r < 2 for r in reductions)
        levels = [_nearest_level(r) for r in reductions[skip:]]
        spread = len(set(levels)) == 1
        if spread:  # a plain transformer or MLP: taps from the four quarters of its depth become a pyramid
            depth = len(net.feature_info.info)
            count = min(4, depth)
            options["out_indices"] = tuple(depth * (i + 1) // count - 1 for i in range(count))
            net = _create(name, {**given, **options})
            reductions = list(net.feature_info.reduction())
            levels = [max(2, int(levels[0] * 2.0 ** (i - count // 2))) for i in range(count)]
        scale = (reductions[-1], _nearest_level(reductions[-1]))
        cfg = get_pretrained_cfg(name) or PretrainedCfg()
        unit, split = None, False
        if cfg.fixed_input_size or cfg.min_input_size or spread:  # timm says, or the kind suggests, that sizes matter
            base = max(levels) * scale[0] // scale[1]
            more: dict[str, Any]
            if cfg.fixed_input_size:
                trials = [(1, more) for more in ({}, {"dynamic_img_size": True}, {"strict_img_size": False})]
            else:
                trials = [(multiple, {}) for multiple in (1, 2, 3, 4, 8)]
            for multiple, more in trials:
                if _takes(name, {**given, **options, **more}, (5 * multiple * base, 7 * multiple * base)):
                    options |= more
                    unit = (multiple * base,) * 2 if multiple > 1 else None
                    break
            else:
                unit, split = _native_size(name, given), True
    return Plan(
        name=name,
        options=options,
        channels=tuple(net.feature_info.channels())[skip:],
        levels=tuple(levels),
        spread=spread,
        skip=skip,
        channels_last="NHWC" in str(getattr(net, "output_fmt", "")),
        unit=unit,
        split=split,
        numerator=scale[0],
        denominator=scale[1],
    )


def _nearest_level(reduction: int) -> int:
    return 1 << max(1, round(math.log2(reduction)))


def _frame(side: int, stride: int) -> int:
    # a multiple of `stride` as it stands: torch.export can then divide it by two as often as the network does
    count: int = torch.sym_max((side + stride - 1) // stride, 3)  # type: ignore[assignment] # SymInt when traced
    return count * stride


def _split(x: Tensor, rows: int, cols: int) -> Tensor:
    """(N, C, rows*h, cols*w) -> (N*rows*cols, C, h, w)."""
    n, c, height, width = x.shape
    tiles = x.reshape(n, c, rows, height // rows, cols, width // cols).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(n * rows * cols, c, height // rows, width // cols)


def _join(x: Tensor, rows: int, cols: int) -> Tensor:
    """(N*rows*cols, C, h, w) -> (N, C, rows*h, cols*w), the inverse of `_split`."""
    c, h, w = x.shape[1:]
    return x.reshape(-1, rows, cols, c, h, w).permute(0, 3, 1, 4, 2, 5).reshape(-1, c, rows * h, cols * w)


def _native_size(name: str, kwargs: Mapping[str, Any]) -> tuple[int, int]:
    size = kwargs.get("img_size") or (get_pretrained_cfg(name) or PretrainedCfg()).input_size[1:]
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _takes(name: str, kwargs: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Whether the architecture, built so, gives every tap at its stride for an input of `size`."""
    try:
        net = _create(name, kwargs).eval()
        taps = net(torch.empty(1, 3, *size, device="meta"))
    except Exception as error:  # what a backbone raises for a size it cannot take has no common type
        return "meta tensors" in str(error)  # it got past its size checks to a line that needs values
    channels_last = "NHWC" in str(getattr(net, "output_fmt", ""))
    return all(
        abs(side / reduction - got) < 1
        for tap, reduction in zip(taps, net.feature_info.reduction(), strict=True)
        for side, got in zip(size, tap.shape[1:3] if channels_last else tap.shape[2:], strict=True)
    )


def _create(name: str, kwargs: Mapping[str, Any], in_channels: int = 3, weights: bool | str | Path = False) -> Any:
    """Timm's feature extractor `name`, with its refusals turned into one typed sentence."""
    overlay: dict[str, Any] | None = None
    if isinstance(weights, (str, Path)):
        _check_weights(name, kwargs, Path(weights))
        overlay = {"file": str(weights), "custom_load": False}
    elif weights and not getattr(get_pretrained_cfg(name), "has_weights", False):
        raise EncoderError(
            f"timm {timm.__version__} has no weights for {name!r}: choose encoder_weights=False or a file."
        )
    try:
        return timm.create_model(
            name,
            pretrained=bool(weights),
            pretrained_cfg_overlay=overlay,
            features_only=True,
            in_chans=in_channels,
            **kwargs,
        )
    except TypeError as error:
        raise EncoderError(
            f"timm {timm.__version__} refuses encoder_kwargs {dict(kwargs)} for {name!r}: {error}."
        ) from error
    except Exception as error:  # what the Hub's client raises has no common type
        if "features_only not implemented" in str(error):
            raise EncoderError(
                f"timm {timm.__version__} gives no feature maps of {name!r}: upgrade timm or choose another encoder."
            ) from error
        if weights is not True:
            raise
        raise EncoderError(
            f"timm's weights of {name!r} could not be fetched: {type(error).__name__}: {' '.join(str(error).split())}. "
            "Connect once, they stay in the Hub's cache; or give a .safetensors file or False as encoder_weights."
        ) from error


def _check_weights(name: str, kwargs: Mapping[str, Any], path: Path) -> None:
    """Raise `EncoderError` unless the file holds just the tensors of the timm model `name`, in their shapes."""
    if path.suffix != ".safetensors":
        raise EncoderError(
            f"encoder_weights is {str(path)!r}: only .safetensors files are read; save the state dict as one."
        )
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise EncoderError(f"encoder_weights {str(path)!r} cannot be read: {error}.") from error
    with torch.device("meta"):
        model: Any = timm.create_model(name, **{k: v for k, v in kwargs.items() if k != "out_indices"})
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))
    wanted = shapes(model.state_dict())
    problems = mismatches(wanted, found, optional=[key for key in wanted if heads and key.startswith(heads)])
    if problems:
        raise EncoderError(
            f"encoder_weights {str(path)!r} does not fit the timm model {name!r}, {len(problems)} tensors differ: "
            + "; ".join(problems)
            + "."
        )


def parameters_of(encoder: MSAEncoder | TimmEncoder, stages: int) -> list[nn.Parameter]:
    """The parameters that the first `stages` feature maps of the backbone depend on.

    Autograd itself answers, on one small image, so that it holds for every architecture. Leaves `encoder` in eval mode.

    Raises:
        EncoderError: the backbone has fewer feature maps.
    """
    net = _Taps(encoder).eval()  # so that the image leaves no trace in batch-norm statistics
    parameters = dict(net.named_parameters())
    leaves = {name: p.detach().requires_grad_(True) for name, p in parameters.items()}  # frozen ones take part too
    image = next(encoder.parameters()).new_zeros(1, encoder.in_channels, *encoder.frame(64, 64))
    taps = torch.func.functional_call(net, leaves, (image,))
    if not isinstance(stages, int) or not 1 <= stages <= len(taps):
        raise EncoderError(
            f"stages is {stages!r}; this encoder has {len(taps)}: choose 1 to {len(taps)}, or None for all."
        )
    total = torch.stack([tap.sum() for tap in taps[:stages]]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [p for p, gradient in zip(parameters.values(), gradients, strict=True) if gradient is not None]


class _Taps(nn.Module):
    def __init__(self, encoder: MSAEncoder | TimmEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.encoder.taps(x)
