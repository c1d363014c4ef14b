"""The published MSA-Unet in its published form, dead blocks and 1984-channel head included: what `MSAUnet()` replaces.

Module names are those of a published checkpoint, so its state dict loads as it is. Used by the benchmarks as the other
side and by the tests as an independent statement of the same function.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_pair(n_in: int, n_out: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(),
        nn.Conv2d(n_out, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(),
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, conv: nn.Sequential) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Rat(nn.Module):
    """Context pooling: one score per position, softmax over positions, weighted sum."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weights = self.conv1(x).reshape(n, 1, h * w).softmax(2)
        return (x.reshape(n, c, h * w) * weights).sum(2)


class Narrow(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.rat = Rat(c)
        self.l1, self.l2 = nn.Linear(c, c // 8), nn.Linear(c // 8, c // 16)
        self.l3, self.l4 = nn.Linear(c // 16, c // 8), nn.Linear(c // 8, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.l4(self.l3(torch.relu(self.l2(self.l1(self.rat(x))))))[:, :, None, None]


class Channel(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.rat = Rat(c)
        self.conv1, self.conv2 = nn.Conv2d(c, 8 * c, 1), nn.Conv2d(8 * c, 16 * c, 1)
        self.conv3, self.conv4 = nn.Conv2d(16 * c, 8 * c, 1), nn.Conv2d(8 * c, c, 1)
        self.cat1 = Narrow(c)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.conv2(self.conv1(self.rat(x)[:, :, None, None]))
        wide = torch.sigmoid(self.conv4(self.conv3(torch.relu(wide))))
        return (wide + self.cat1(x)) * x


class Attention(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, 1, 1)
        self.cat2 = Channel(c)

    def forward(self, x: Tensor) -> Tensor:
        s = self.conv(x)
        return torch.sigmoid(s.mean(3, keepdim=True) * s.mean(2, keepdim=True)) + self.cat2(x)


class LiteralMSAUnet(nn.Module):
    """(N, C, H, W) -> (N, K, H, W), H and W at least 16."""

    def __init__(
        self, in_channels: int = 3, num_classes: int = 1, widths: Any = (64, 128, 256, 512), antialias: bool = True
    ) -> None:
        super().__init__()
        self.antialias = antialias
        reads = [in_channels, *(widths[i] + in_channels + sum(widths[:i]) for i in range(3))]
        kernels = (5, 3, 3, 3)
        self.downs = nn.ModuleList(Block(conv_pair(*nfk)) for nfk in zip(reads, widths, kernels, strict=True))
        f3 = widths[-1]
        depthwise = nn.Conv2d(f3, f3, 3, padding=1, groups=f3, bias=False)
        pointwise = nn.Conv2d(f3, 2 * f3, 1, bias=False)
        last = nn.Conv2d(2 * f3, 2 * f3, 3, padding=1, bias=False)
        norms = nn.BatchNorm2d(2 * f3), nn.BatchNorm2d(2 * f3)
        self.bottleneck = Block(nn.Sequential(depthwise, pointwise, norms[0], nn.ReLU(), last, norms[1], nn.ReLU()))
        self.ups = nn.ModuleList()
        for f in reversed(widths):
            self.ups += [nn.ConvTranspose2d(2 * f, f, 2, 2), Attention(f), Block(conv_pair(2 * f, f))]
        self.finalconv = nn.Conv2d(sum(widths) + 2 * f3, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        def shrink(t: Tensor, like: Tensor) -> Tensor:
            return F.interpolate(t, like.shape[2:], mode="bilinear", antialias=self.antialias)

        skips: list[Tensor] = []
        pooled: list[Tensor] = []
        y = x
        for down in self.downs:
            if pooled:
                y = torch.cat([pooled[-1]] + [shrink(t, pooled[-1]) for t in [x, *pooled[:-1]]], 1)
            skips.append(down(y))
            pooled.append(F.max_pool2d(skips[-1], 2))
        outputs = [self.bottleneck(pooled[-1])]
        for i, skip in enumerate(reversed(skips)):
            y = self.ups[3 * i](outputs[-1])
            if y.shape != skip.shape:
                y = shrink(y, skip)
            if i == 3:
                skip = self.ups[3 * i + 1](skip)
            outputs.append(self.ups[3 * i + 2](torch.cat([skip, y], 1)))
        bottleneck, d3, d2, d1, finest = outputs
        size = finest.shape[2:]
        full = [F.interpolate(t, size, mode="bilinear") for t in (bottleneck, d3, d2, d1)]
        return self.finalconv(torch.cat([finest, *full], 1))
