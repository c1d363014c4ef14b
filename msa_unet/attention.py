"""The spatial-channel attention of MSA-Unet, applied to a skip before the decoder reads it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import at_least_float32


class SpatialChannelAttention(nn.Module):
    """Multi-scale spatial-channel attention, (N, C, H, W) -> (N, C, H, W).

    The output is S + (wide(P1(x)) + narrow(P2(x))) * x: a spatial gate S in (0, 1) is *added* to the features, which
    two channel paths rescale, a wide one that ends in a sigmoid and a narrow one that does not, each behind a context
    pooling P of its own, a softmax-weighted mean over all positions.

    Source: MSA-Unet (Guo and Wang, 2023).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        c, eighth, sixteenth = channels, max(1, channels // 8), max(1, channels // 16)
        self.spatial = nn.Conv2d(c, 1, 1)
        self.wide_pool = nn.Conv2d(c, 1, 1)  # scores the positions
        self.wide = nn.Sequential(
            nn.Linear(c, 8 * c),
            nn.Linear(8 * c, 16 * c),
            nn.ReLU(),
            nn.Linear(16 * c, 8 * c),
            nn.Linear(8 * c, c),
            nn.Sigmoid(),
        )
        self.narrow_pool = nn.Conv2d(c, 1, 1)
        self.narrow = nn.Sequential(
            nn.Linear(c, eighth),
            nn.Linear(eighth, sixteenth),
            nn.ReLU(),
            nn.Linear(sixteenth, eighth),
            nn.Linear(eighth, c),
        )

    def forward(self, x: Tensor) -> Tensor:
        # three maps by one convolution, since reading x is what costs
        convs = [(conv.weight, conv.bias) for conv in (self.spatial, self.wide_pool, self.narrow_pool)]
        weight, bias = (torch.cat(parts) for parts in zip(*convs, strict=True))
        s, scores = at_least_float32(F.conv2d(x, weight, bias)).tensor_split([1], 1)  # (N, 1, H, W), (N, 2, H, W)
        gate = torch.sigmoid(s.mean(3, keepdim=True) * s.mean(2, keepdim=True))  # (N, 1, H, W)
        # at 512x512 one weight is near 4e-6, below what float16 resolves: the sum stays in float32 under autocast too
        device = "cpu" if x.is_meta else x.device.type  # meta tensors know no autocast
        with torch.autocast(device, enabled=False):
            positions = at_least_float32(x).flatten(2).transpose(1, 2)  # (N, HW, C)
            pooled = (scores.flatten(2).softmax(-1) @ positions).to(x.dtype)  # (N, 2, C)
        scale = self.wide(pooled[:, 0]) + self.narrow(pooled[:, 1])  # (N, C)
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
