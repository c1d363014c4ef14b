"""The network around its encoder: sizes, inputs, levels, freezing, optimiser groups, checkpointing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_unet import EncoderError, InputError, MSAUnet

SMALL = {"msa": (16, 16, 32, 32), "resnet10t": (8, 8, 16, 16, 16)}


def small(encoder="resnet10t", **kwargs):
    return MSAUnet(encoder, decoder_channels=SMALL[encoder], **kwargs).eval()


@pytest.mark.parametrize("encoder", SMALL)
def test_any_batch_and_size(encoder):
    model = small(encoder, num_classes=3)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 3), st.integers(1, 150), st.integers(1, 150))
    def check(n, height, width):
        x = torch.randn(n, 3, height, width)
        with torch.no_grad():
            logits = model(x)
            levels = model.forward_levels(x)
        assert logits.shape == (n, 3, height, width)
        assert logits.isfinite().all()
        resized = [F.interpolate(v, (height, width), mode="bilinear", align_corners=False) for v in levels]
        assert torch.allclose(sum(resized), logits, atol=1e-4)

    check()


@pytest.mark.parametrize("encoder", SMALL)
def test_padding_does_not_change_what_needs_none(encoder):
    model = small(encoder)
    x = torch.randn(1, 3, 96, 64)
    padded = F.pad(x, (0, 0, 0, 32), mode="replicate")
    with torch.no_grad():
        assert torch.equal(model(x[..., :96, :64]), model(x))
        if encoder != "msa":  # 90 rows are padded to 96 with copies of the last row
            odd = x[:, :, :90]
            same = F.pad(odd, (0, 0, 0, 6), mode="replicate")
            assert torch.allclose(model(odd), model(same)[:, :, :90], atol=1e-6)
    assert padded.shape[2] == 128


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 32, 32),
        torch.zeros(1, 1, 32, 32),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 32, dtype=torch.long),
        torch.zeros(1, 3, 0, 32),
        torch.zeros(0, 3, 32, 32),
    ],
)
@pytest.mark.parametrize("encoder", SMALL)
def test_wrong_input_is_told_in_a_sentence(x, encoder):
    model = small(encoder)
    with pytest.raises(InputError, match=r"floating-point tensor of shape \(N, 3, H, W\), not torch\.\w+ of") as error:
        model(x)
    assert str(tuple(x.shape)) in str(error.value)


@pytest.mark.parametrize("attention", ["finest", "all", "none"])
def test_attention_sits_where_it_is_asked_for(attention):
    model = small(attention=attention)
    kinds = [type(m).__name__ == "SpatialChannelAttention" for m in model.decoder.attention]
    assert kinds == {"finest": [True, False, False, False], "all": [True] * 4, "none": [False] * 4}[attention]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1, 64, 64)


@pytest.mark.parametrize("encoder", SMALL)
def test_frozen_encoders_do_not_learn(encoder):
    model = small(encoder)
    backbone = model.backbone
    before = copy.deepcopy(backbone.state_dict())
    model.freeze_encoder().train()
    assert model.training
    assert model.decoder.training
    assert not any(m.training for m in backbone.modules())
    optimizer = torch.optim.SGD(model.param_groups(0.1), lr=1)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[name], t) for name, t in backbone.state_dict().items())
    model.requires_grad_(True).train()
    assert all(m.training for m in backbone.modules())


def test_the_first_stages_can_be_frozen():
    model = small().train().freeze_encoder(2)
    model.train()
    names = {name.split(".")[0] for name, p in model.backbone.named_parameters() if not p.requires_grad}
    assert names == {"conv1", "bn1", "layer1"}
    assert not model.backbone.bn1.training
    assert not model.backbone.layer1[0].bn1.training
    assert model.backbone.layer2[0].bn1.training
    msa = small("msa").train().freeze_encoder(1)
    assert not msa.encoder.stages[0][1].training
    assert msa.encoder.stages[1][1].training
    for stages in (0, 6, "all"):
        with pytest.raises(EncoderError, match="choose 1 to 5"):
            small().freeze_encoder(stages)


def test_freezing_leaves_no_trace_in_the_statistics():
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    model.freeze_encoder(3)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_param_groups_cover_each_trained_parameter_once():
    model = small()
    groups = model.param_groups(1e-3, encoder_lr_scale=0.2)
    assert [(g["name"], g["lr"]) for g in groups] == [("encoder", pytest.approx(2e-4)), ("decoder", 1e-3)]
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in model.backbone.parameters()}
    model.freeze_encoder()
    assert [g["name"] for g in model.param_groups(1e-3)] == ["decoder"]


@pytest.mark.parametrize(
    ("encoder", "widths"), [("msa", SMALL["msa"]), ("resnet10t", ()), ("test_vit", ()), ("tf_efficientnet_lite0", ())]
)
def test_gradient_checkpointing_changes_nothing_but_memory(encoder, widths):
    model = MSAUnet(encoder, decoder_channels=widths).train()
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    kept = []
    for network in (model, again):
        size = 0

        def count(t):
            nonlocal size
            size += t.numel()
            return t

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = network(x).square().mean()
        kept.append(size)
        loss.backward()
    assert kept[1] < kept[0]
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoder", SMALL)
def test_half_precision(encoder, dtype):
    model = small(encoder)
    x = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        wanted = model(x)
        halved = copy.deepcopy(model).to(dtype)(x.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(x)
    assert halved.dtype == dtype
    assert (halved.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert (cast.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("encoder", SMALL)
def test_deep_copies_and_moves(encoder):
    model = small(encoder)
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == (1, 1, 40, 40)
