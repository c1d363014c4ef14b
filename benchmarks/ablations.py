"""MSA-Unet with one thing changed, for the ablation of its design; `VARIANTS` in accuracy.py has their names.

Each function changes a network made by `MSAUnet(<timm encoder>)` in place, before it is trained, and returns it.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msa_unet import MSAUnet
from msa_unet.encoders import TimmEncoder
from msa_unet.layers import conv_bn_relu, double_conv, resize
from msa_unet.model import Decoder, VotingHead

Change = Callable[[MSAUnet], MSAUnet]


class SparseEncoder(TimmEncoder):
    """Every level sees its own tap only; the finest sees the image, too."""

    def forward(self, x: Tensor) -> list[Tensor]:
        own: dict[int, list[Tensor]] = {stride: [] for stride in self.strides}
        for tap, level in zip(self.taps(x), self.plan.levels, strict=True):
            own[level].append(tap)
        own[self.strides[0]].append(F.pixel_unshuffle(x, 2))
        return [fuse(torch.cat(own[stride], 1)) for stride, fuse in zip(self.strides, self.fuse, strict=True)]


def no_dense(model: MSAUnet) -> MSAUnet:
    """Dense fusion off: a level is a 1x1 convolution of its own tap, as in an ordinary U-Net with equal widths."""
    encoder = model.encoder
    inputs = [0] * len(encoder.strides)
    for channels, level in zip(encoder.plan.channels, encoder.plan.levels, strict=True):
        inputs[encoder.strides.index(level)] += channels
    inputs[0] += 4 * encoder.in_channels
    encoder.fuse = nn.ModuleList(
        nn.Sequential(*conv_bn_relu(c, width, kernel=3 if i == 0 else 1))
        for i, (c, width) in enumerate(zip(inputs, encoder.channels, strict=True))
    )
    encoder.__class__ = SparseEncoder
    return model


class Votes(nn.Module):
    """A head whose coarser levels vote through convolutions of size `kernel` for 2x2 sub-pixels or whole positions."""

    def __init__(
        self, channels: Sequence[int], num_classes: int, kernel: int, subpixels: bool, finest_kernel: int
    ) -> None:
        super().__init__()
        self.shuffle = nn.PixelShuffle(2)
        self.subpixels = subpixels
        finest, *coarser = channels
        rows = 4 * num_classes if subpixels else num_classes
        self.votes = nn.ModuleList(nn.Conv2d(c, rows, kernel, padding=kernel // 2, bias=False) for c in coarser[::-1])
        self.votes.append(nn.Conv2d(finest, 4 * num_classes, finest_kernel, padding=finest_kernel // 2))

    def forward(self, outputs: list[Tensor]) -> list[Tensor]:
        *coarse, finest = (vote(x) for vote, x in zip(self.votes, outputs, strict=True))
        return [*map(self.shuffle, coarse), self.shuffle(finest)] if self.subpixels else [*coarse, self.shuffle(finest)]


def votes(kernel: int = 1, subpixels: bool = False, finest_kernel: int = 1) -> Change:
    """Another head; without arguments, the one that screening began with."""

    def change(model: MSAUnet) -> MSAUnet:
        model.head = Votes(model.encoder.channels, model.config.num_classes, kernel, subpixels, finest_kernel)
        return model

    return change


class FinestVote(nn.Module):
    """The last level's vote is the output, as in an ordinary U-Net."""

    def __init__(self, vote: nn.Conv2d) -> None:
        super().__init__()
        self.vote, self.shuffle = vote, nn.PixelShuffle(2)

    def forward(self, outputs: list[Tensor]) -> list[Tensor]:
        vote = self.shuffle(self.vote(outputs[-1]))
        return [torch.zeros_like(vote[..., :1, :1]), vote]


def one_vote(model: MSAUnet) -> MSAUnet:
    """Per-level head off."""
    model.head = FinestVote(model.head.votes[-1])
    return model


def no_ideas(model: MSAUnet) -> MSAUnet:
    """None of the three ideas: the attention is left out by `MSAUnet(attention="none")`."""
    return one_vote(no_dense(model))


class FullResolutionEncoder(TimmEncoder):
    """A level more, at full resolution, from the image alone; the others as they are."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.stem(x), *super().forward(x)]


def full_resolution(model: MSAUnet) -> MSAUnet:
    """A stem and a decoder level of 16 channels at full resolution, and no sub-pixel votes."""
    encoder, config = model.encoder, model.config
    encoder.stem = nn.Sequential(*conv_bn_relu(config.in_channels, 16))
    channels = (16, *encoder.channels)
    model.decoder = Decoder(channels, config.attention)
    model.head = VotingHead(channels, config.num_classes, subpixels=1)
    encoder.__class__ = FullResolutionEncoder
    return model


def separable(conv: nn.Conv2d) -> nn.Sequential:
    """Depthwise 3x3 and pointwise in place of a full convolution."""
    c = conv.in_channels
    return nn.Sequential(
        nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False), nn.Conv2d(c, conv.out_channels, 1, bias=False)
    )


def separable_decoder(first: int, second: int) -> Change:
    """Depthwise-separable convolutions in the decoder blocks from level `first` (`second`) on, for the first (second)
    convolution of each block; 0 is the finest level.
    """

    def change(model: MSAUnet) -> MSAUnet:
        for i, block in enumerate(model.decoder.blocks):
            for start, layer in ((first, 0), (second, 3)):
                if i >= start:
                    block[layer] = separable(block[layer])
        return model

    return change


class Adding(nn.Module):
    """A decoder block that adds its two inputs, which come concatenated, and may add their sum to its output."""

    def __init__(self, channels: int, residual: bool, full: bool = True) -> None:
        super().__init__()
        block = double_conv(channels, channels)
        if not full:
            block[0], block[3] = separable(block[0]), separable(block[3])
        self.block = block[:-1]
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        skip, up = x.chunk(2, 1)
        total = skip + up
        return F.relu(self.block(total) + total if self.residual else self.block(total))


def added_skip(model: MSAUnet) -> MSAUnet:
    """The finest skip is added, not concatenated."""
    model.decoder.blocks[0] = Adding(model.encoder.channels[0], residual=False)
    return model


def residual(model: MSAUnet) -> MSAUnet:
    """All skips are added, blocks are residual and, but for the finest, separable."""
    model.decoder.blocks = nn.ModuleList(
        Adding(c, residual=True, full=i == 0) for i, c in enumerate(model.encoder.channels[:-1])
    )
    return model


class Bilinear(nn.Module):
    """1x1 convolution, then twice the size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return resize(self.conv(x), [2 * side for side in x.shape[2:]])


class DySample(nn.Module):
    """1x1 convolution, then twice the size by sampling at learned offsets.

    Source: Liu et al., Learning to Upsample by Learning to Sample, ICCV 2023 (arXiv 2308.15085): the linear + pixel
    shuffle form with a static scope of 0.25 and four groups.
    """

    groups = 4

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)
        self.offset = nn.Conv2d(out_channels, 2 * 4 * self.groups, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, c, h, w = x.shape
        offset = F.pixel_shuffle(self.offset(x) * 0.25, 2)  # (N, 2 * groups, 2h, 2w), in pixels of x
        offset = offset.reshape(n * self.groups, 2, 2 * h, 2 * w).movedim(1, -1)
        ys, xs = ((torch.arange(2 * side, device=x.device, dtype=x.dtype) + 0.5) / 2 for side in (h, w))
        place = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1) + offset
        grid = 2 * place / torch.tensor([w, h], device=x.device, dtype=x.dtype) - 1
        x = x.contiguous().view(n * self.groups, c // self.groups, h, w)
        sampled = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return sampled.view(n, c, 2 * h, 2 * w).contiguous(memory_format=torch.channels_last)


def _upsample_by(model: MSAUnet, kind: type[nn.Module]) -> MSAUnet:
    model.decoder.ups = nn.ModuleList(kind(up.in_channels, up.out_channels) for up in model.decoder.ups)
    return model


def bilinear(model: MSAUnet) -> MSAUnet:
    """Bilinear upsampling instead of transposed convolutions."""
    return _upsample_by(model, Bilinear)


def dysample(model: MSAUnet) -> MSAUnet:
    """DySample instead of transposed convolutions."""
    return _upsample_by(model, DySample)


def group_norm(model: MSAUnet) -> MSAUnet:
    """Group norm of 8 groups instead of batch norm everywhere but in the backbone."""
    for part in (model.encoder.fuse, model.decoder.blocks):
        for block in part:
            for i, layer in enumerate(block):
                if isinstance(layer, nn.BatchNorm2d):
                    block[i] = nn.GroupNorm(8, layer.num_features)
    return model


def bottleneck(model: MSAUnet) -> MSAUnet:
    """The published bottleneck at the coarsest level: depthwise 3x3, pointwise, 3x3."""
    c = model.encoder.channels[-1]
    model.encoder.fuse[-1] = nn.Sequential(
        *model.encoder.fuse[-1],
        nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False),
        *conv_bn_relu(c, c, kernel=1),
        *conv_bn_relu(c, c),
    )
    return model


def initialised(scale: float) -> Change:
    """Convolutions of the fusion and the decoder start at `scale` times torch's default."""

    @torch.no_grad()
    def change(model: MSAUnet) -> MSAUnet:
        for part in (model.encoder.fuse, model.decoder.blocks):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.mul_(scale)
        return model

    return change
