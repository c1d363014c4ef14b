"""Fixtures shared by all tests: real data and goldens where they are, quiet single-threaded torch."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT / "benchmarks"))  # for the literal form of the published network


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def goldens():
    path = SHARED / "goldens" / "official_parity.safetensors"
    if not path.exists():
        pytest.skip("needs ../shared/goldens")
    from safetensors.torch import load_file

    return load_file(path)
