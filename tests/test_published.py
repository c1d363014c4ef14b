"""`MSAUnet()` is the published network: against its tensors, and against its literal form on random weights."""

import logging

import pytest
import torch
from literal import LiteralMSAUnet

from msa_unet import CheckpointError, ConfigError, MSAUnet

WIDTHS = (16, 32, 64, 128)


@pytest.fixture(scope="module")
def published(goldens):
    prefix = "state_dict/"
    return {name.removeprefix(prefix): t for name, t in goldens.items() if name.startswith(prefix)}


def randomised(**kwargs):
    """A literal network in eval mode whose batch norms are not the identity."""
    torch.manual_seed(1)
    net = LiteralMSAUnet(widths=WIDTHS, **kwargs).eval()
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
    return net


def published_gradients(model):
    model.load_state_dict({name: p.grad for name, p in model.named_parameters()}, strict=False)
    return model.to_published()


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("case", [0, 1, 2])
def test_logits_match_the_goldens(goldens, published, case, antialias):
    model = MSAUnet.from_published(published, antialias=antialias)
    wanted = goldens[f"case{case}/logits_antialias_{str(antialias).lower()}"]
    with torch.no_grad():
        assert (model(goldens[f"case{case}/input"]) - wanted).abs().max() <= 1e-5
        assert (model.fuse()(goldens[f"case{case}/input"]) - wanted).abs().max() <= 1e-5


def test_gradients_match_the_goldens(goldens, published):
    model = MSAUnet.from_published(published).train()
    logits = model(goldens["train/input"])
    assert (logits - goldens["train/logits"]).abs().max() <= 1e-5
    loss = logits.square().mean()
    assert torch.isclose(loss, goldens["train/loss"], rtol=1e-6)
    loss.backward()
    found = published_gradients(model)
    wanted = {name.removeprefix("train/grad/"): t for name, t in goldens.items() if name.startswith("train/grad/")}
    assert len(wanted) == 4
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (64, 48), (67, 91)])
def test_same_function_as_the_literal_form(size, antialias, caplog):
    net = randomised(in_channels=2, num_classes=3, antialias=antialias)
    with caplog.at_level(logging.WARNING):
        model = MSAUnet.from_published(net.state_dict(), antialias=antialias)
    dead = sum(name.startswith(("ups.1.", "ups.4.", "ups.7.")) for name in net.state_dict())
    assert len(model.load_report.dropped) == dead > 0
    assert f"Dropped {dead} tensors" in caplog.text
    assert model.config.in_channels == 2
    assert model.config.num_classes == 3
    assert model.config.decoder_channels == WIDTHS
    x = torch.randn(2, 2, *size)
    with torch.no_grad():
        wanted = net(x)
        assert (model(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_same_gradients_as_the_literal_form():
    net = randomised().double().train()
    model = MSAUnet.from_published(net.state_dict()).train()
    x = torch.randn(2, 3, 40, 50, dtype=torch.float64)
    for network in (net, model):
        network(x).square().mean().backward()
    found = published_gradients(model)
    wanted = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert len(wanted) > 60
    for name, gradient in wanted.items():
        # a convolution bias in front of a softmax has no gradient but rounding
        assert (found[name] - gradient).norm() <= 1e-8 * gradient.norm() + 1e-12, name


def test_published_names_round_trip():
    state = randomised().state_dict()
    back = MSAUnet.from_published(state).to_published()
    live = {name for name in state if not name.startswith(("ups.1.", "ups.4.", "ups.7."))}
    assert set(back) == live
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype for name in live)


def test_a_checkpoint_that_does_not_fit_names_the_tensors():
    state = randomised().state_dict()
    state["ups.0.weight"] = state["ups.0.weight"][:5]
    del state["bottleneck.conv.4.weight"]
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        MSAUnet.from_published(state)
    for text in (
        "ups.0.weight is [5, 128, 2, 2] instead of [256, 128, 2, 2]",
        "missing bottleneck.conv.4.weight",
        "unexpected extra.weight",
    ):
        assert text in str(error.value)
    with pytest.raises(CheckpointError, match=r"downs\.0\.conv\.0\.weight is missing"):
        MSAUnet.from_published({"fc.weight": torch.zeros(1)})


def test_only_the_published_network_has_published_names():
    with pytest.raises(ConfigError, match="resnet18"):
        MSAUnet("resnet18").to_published()


def test_no_dead_parameters():
    model = MSAUnet()
    assert sum(p.numel() for p in model.parameters()) == 29_026_904
    model = MSAUnet(decoder_channels=WIDTHS)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_folding_the_attention_paths_keeps_an_eighth_of_their_weights():
    wide = MSAUnet().decoder.attention[0].wide
    fused = MSAUnet().fuse().decoder.attention[0].wide
    assert sum(p.numel() for p in wide.parameters()) == 1_116_224
    assert sum(p.numel() for p in fused.parameters()) == 132_160


def test_eval_allocates_nothing_wider_than_the_finest_concatenation():
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    with torch.device("meta"):
        model = MSAUnet().eval()
        x = torch.empty(1, 3, 128, 128)
    with torch.no_grad(), Largest():
        model(x)
    weights = max(p.numel() for p in model.parameters())
    assert largest <= max(128 * 128 * 128, weights)
