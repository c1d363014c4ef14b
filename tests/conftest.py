"""Fixtures shared by all tests: real data and goldens where they are, quiet single-threaded torch."""

from pathlib import Path

import pytest
import timm
import torch

from msa_unet import EncoderError
from msa_unet.encoders import make_plan

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


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


@pytest.fixture(scope="session")
def goldens():
    path = SHARED / "goldens" / "official_parity.safetensors"
    if not path.exists():
        pytest.skip("needs ../shared/goldens")
    from safetensors.torch import load_file

    return load_file(path)
