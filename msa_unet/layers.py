"""What every part of the network is made of: the convolution block, the bilinear resize, and the safe precision."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# whether torch.compile can ask what is known of a size without making a graph for one; older releases make some more
DYNAMO_ASKS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int = 3) -> list[nn.Module]:
    """A size-keeping convolution without bias, its batch norm and a ReLU."""
    return [
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def double_conv(in_channels: int, out_channels: int, kernel: int = 3) -> nn.Sequential:
    """Two convolution blocks, the unit of every U-Net; `kernel` is that of the first."""
    return nn.Sequential(
        *conv_bn_relu(in_channels, out_channels, kernel),
        *conv_bn_relu(out_channels, out_channels),
    )


def resize(x: Tensor, size: Sequence[int], antialias: bool = False) -> Tensor:
    """Bilinear resize of (N, C, h, w) to `size` = (H, W), half-pixel centres, as torchvision does it."""
    if not antialias:
        return F.interpolate(x, size, mode="bilinear", align_corners=False)
    # the antialiasing kernel does not exist for every half-precision type
    full = at_least_float32(x)
    return F.interpolate(full, size, mode="bilinear", align_corners=False, antialias=True).to(x.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, or its float32 copy if it is half precision: a softmax or a sum over an image needs the digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def may_differ(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sizes differ; in a graph for all sizes (compiled or exported), whether they do for any image."""
    symbolic = (torch.compiler.is_compiling() and DYNAMO_ASKS) or any(
        isinstance(side, torch.SymInt) for side in (*size, *other)
    )
    if not symbolic:
        return tuple(size) != tuple(other)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, and only needed here

    return not all(statically_known_true(a == b) for a, b in zip(size, other, strict=True))
