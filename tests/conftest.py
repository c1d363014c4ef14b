"""Fixtures shared by all tests: real data and goldens where they are, quiet single-threaded torch."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from msa_unet import EncoderError, MSAUnet
from msa_unet.attention import SpatialChannelAttention
from msa_unet.encoders import make_plan

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
# inductor and AOTInductor write C++ and look for one of these
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def require_encoder(name):
    """Skip a test of an encoder that the installed timm does not have or take apart; older releases lack a few."""
    if name == "msa" or timm.__version__ == "1.0.31":
        return
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    try:
        make_plan(name)
    except (EncoderError, NotImplementedError) as error:  # no feature maps; no meta kernel in an older torch
        pytest.skip(str(error)[:200])


@pytest.fixture(autouse=True)
def _encoder_is_there(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if isinstance(parameters.get("encoder"), str):
        require_encoder(parameters["encoder"])


def small(encoder):
    """A network of two classes, the published one at a width that tests can afford."""
    return MSAUnet(encoder, num_classes=2, decoder_channels=(8, 16, 32, 64) if encoder == "msa" else ())


def layout_copies(model):
    """A list that fills, as `model` runs, with the layers whose input is not channels-last."""
    copied = []

    def note(name, x):
        if x.ndim == 4 and x.shape[1] > 1 and not x.is_contiguous(memory_format=torch.channels_last):
            copied.append(name)

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d | SpatialChannelAttention):
            module.register_forward_pre_hook(lambda m, inputs, name=name: note(name, inputs[0]))
    return copied


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a small network with random weights and one class."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    MSAUnet("resnet10t", decoder_channels=(8,) * 5, class_names=["cell"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def goldens():
    path = SHARED / "goldens" / "official_parity.safetensors"
    if not path.exists():
        pytest.skip("needs ../shared/goldens")
    from safetensors.torch import load_file

    return load_file(path)
