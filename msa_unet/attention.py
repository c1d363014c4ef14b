"""The spatial-channel attention of MSA-Unet, applied to a skip before the decoder reads it."""

import torch
from torch import Tensor, nn

from .layers import at_least_float32


class ContextPool(nn.Module):
    """Softmax-weighted mean over all positions, (N, C, H, W) -> (N, C); one 1x1 convolution scores the positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = at_least_float32(self.score(x).flatten(2)).softmax(-1)  # (N, 1, HW)
        # at 512x512 one weight is near 4e-6, below what float16 resolves: the sum stays in float32 under autocast too
        device = "cpu" if x.is_meta else x.device.type  # meta tensors know no autocast
        with torch.autocast(device, enabled=False):
            positions = at_least_float32(x).flatten(2).transpose(1, 2)  # (N, HW, C)
            return (weights.to(positions.dtype) @ positions).squeeze(1).to(x.dtype)


class SpatialChannelAttention(nn.Module):
    """Multi-scale spatial-channel attention, (N, C, H, W) -> (N, C, H, W).

    The output is S + (wide(P1(x)) + narrow(P2(x))) * x: a spatial gate S in (0, 1) is *added* to the features, which
    two channel paths rescale, a wide one that ends in a sigmoid and a narrow one that does not, each behind a context
    pooling of its own.

    Source: MSA-Unet (Guo and Wang, 2023).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        c, eighth, sixteenth = channels, max(1, channels // 8), max(1, channels // 16)
        self.spatial = nn.Conv2d(c, 1, 1)
        self.wide_pool = ContextPool(c)
        self.wide = nn.Sequential(
            nn.Linear(c, 8 * c),
            nn.Linear(8 * c, 16 * c),
            nn.ReLU(),
            nn.Linear(16 * c, 8 * c),
            nn.Linear(8 * c, c),
            nn.Sigmoid(),
        )
        self.narrow_pool = ContextPool(c)
        self.narrow = nn.Sequential(
            nn.Linear(c, eighth),
            nn.Linear(eighth, sixteenth),
            nn.ReLU(),
            nn.Linear(sixteenth, eighth),
            nn.Linear(eighth, c),
        )

    def forward(self, x: Tensor) -> Tensor:
        s = at_least_float32(self.spatial(x))  # (N, 1, H, W)
        gate = torch.sigmoid(s.mean(3, keepdim=True) * s.mean(2, keepdim=True))
        scale = self.wide(self.wide_pool(x)) + self.narrow(self.narrow_pool(x))  # (N, C)
        return torch.addcmul(gate.to(x.dtype), scale.to(x.dtype)[:, :, None, None], x)

    def fuse(self) -> None:
        """Fold, in place, each pair of affine maps with nothing in between into one: same function, fewer weights."""
        for path in ("wide", "narrow"):
            first, second, relu, third, fourth, *rest = getattr(self, path)
            setattr(self, path, nn.Sequential(_compose(first, second), relu, _compose(third, fourth), *rest))


@torch.no_grad()
def _compose(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """The linear layer that computes `second(first(x))`; the products are taken in float64."""
    w1, b1, w2, b2 = (t.double() for t in (first.weight, first.bias, second.weight, second.bias))
    folded = nn.Linear(first.in_features, second.out_features, device=w1.device, dtype=first.weight.dtype)
    folded.weight.copy_(w2 @ w1)
    folded.bias.copy_(w2 @ b1 + b2)
    return folded
