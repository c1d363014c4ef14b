"""The examples in the docstrings of the installed package run and print what they say."""

import copy
import doctest
import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import msa_unet
from msa_unet.export import export
from msa_unet.loading import LoadReport

MODULES = [importlib.import_module(m.name) for m in pkgutil.walk_packages(msa_unet.__path__, "msa_unet.")]
EXAMPLES = {m.__name__: [t for t in doctest.DocTestFinder().find(m) if t.examples] for m in MODULES}
EXTRAS = {"msa_unet.export": ["onnx", "onnxruntime", "onnxscript"], "msa_unet.large": ["monai", "tifffile"]}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def names():
    """What an example may use without saying where it comes from."""
    image = Image.open(ROOT / "examples" / "ihc.png").crop((200, 200, 296, 264))
    public = {name: getattr(msa_unet, name) for name in msa_unet.__all__}
    model = msa_unet.MSAUnet.from_pretrained("tf_efficientnet_lite0.dsb2018")
    return public | {"export": export, "image": image, "model": model, "np": np, "torch": torch}


@pytest.mark.parametrize("module", [name for name, examples in EXAMPLES.items() if examples])
def test_the_examples_run(module, names, tmp_path, monkeypatch):
    for extra in EXTRAS.get(module, ()):
        pytest.importorskip(extra)
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    report: list[str] = []
    for example in EXAMPLES[module]:
        example.globs |= names | {"model": copy.deepcopy(names["model"])}
        runner.run(example, out=report.append)
    assert not runner.summarize(verbose=False).failed, "".join(report)


def test_every_public_name_has_an_example():
    having = {test.name for examples in EXAMPLES.values() for test in examples}
    methods = [m for name, m in vars(msa_unet.MSAUnet).items() if name not in {"__init__", "forward", "train"}]
    methods = [getattr(m, "__func__", m) for m in methods]
    public = [*(getattr(msa_unet, name) for name in msa_unet.__all__), export, LoadReport]
    public += [m for m in methods if inspect.isfunction(m) and not m.__name__.startswith("_")]
    assert len(public) > 20
    assert [f for f in public if f"{f.__module__}.{f.__qualname__}" not in having] == []


def test_only_what_needs_an_account_is_skipped():
    skipped = [
        example.source
        for examples in EXAMPLES.values()
        for test in examples
        for example in test.examples
        if doctest.SKIP in example.options
    ]
    assert len(skipped) == 1
    assert "push_to_hub" in skipped[0]
