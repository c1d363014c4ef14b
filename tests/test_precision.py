"""Half precision and memory layout, on the CPU; tests/test_cuda.py asks the same of a GPU."""

import pytest
import torch
from conftest import layout_copies, small

from msa_unet.attention import SpatialChannelAttention

ENCODERS = ["msa", "resnet18", "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_autocast_trains_and_agrees_with_float32(encoder: str):
    model, x = small(encoder).eval(), torch.randn(2, 3, 70, 90)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    wanted = model(x)
    assert (logits.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_half_weights_take_half_images(encoder: str, dtype: torch.dtype):
    model, x = small(encoder).eval(), torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        wanted = model(x)
        logits = model.to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    assert (logits.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_pooling_over_a_large_map_keeps_its_precision_in_half():
    # a mean over 2**16 positions: each weight is below what a float16 sum near 1 can resolve
    attention = SpatialChannelAttention(16).eval()
    x = torch.randn(1, 16, 256, 256) + 2
    with torch.no_grad():
        wanted = attention(x)
        logits = attention.half()(x.half()).float()
    assert (logits - wanted).abs().max() < 0.01 * wanted.abs().max()


@pytest.mark.parametrize("size", [(64, 96), (70, 90)])
@pytest.mark.parametrize("encoder", ENCODERS[:4])
def test_channels_last_is_kept_inside(encoder: str, size: tuple[int, int]):
    model = small(encoder).to(memory_format=torch.channels_last).eval()
    copied = layout_copies(model)
    with torch.no_grad():
        model(torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last))
    assert copied == []
