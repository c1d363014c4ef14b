"""Exported files: the same function as in eager mode at any size, and they say how images are prepared."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_compiler
from PIL import Image

from msa_unet import ConfigError, ExportError, MSAUnet, predict
from msa_unet.cli import main
from msa_unet.export import UNTRACEABLE, export, least_side, trace

pytest.importorskip("onnx", reason="needs pip install 'msa-unet[export]'")
pytest.importorskip("onnxscript", reason="needs pip install 'msa-unet[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install 'msa-unet[export]'")
pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="export was tried with torch 2.14; older ones trace less"
)

NAME = "tf_efficientnet_lite0.dsb2018"
SIZES = [(1, 96, 128), (2, 64, 64), (3, 160, 32), (1, 70, 91), (2, 33, 47), (1, 32, 200), (1, 1, 1)]  # N, H, W
PICTURE = np.asarray(Image.open(ROOT / "examples" / "ihc.png").convert("RGB"))


def tiny(encoder="resnet10t"):
    torch.manual_seed(0)
    widths = (8, 16, 32, 64) if encoder == "msa" else ()
    return MSAUnet(encoder, num_classes=2, class_names=["background", "cell"], decoder_channels=widths).eval()


def onnx_session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def check(run, model, tolerance):
    generator = torch.Generator().manual_seed(0)
    for n, *size in SIZES[:-1] if model.config.encoder == "msa" else SIZES:  # that one from 32 up
        x = torch.randn(n, model.config.in_channels, *size, generator=generator)
        with torch.no_grad():
            wanted = model(x)
            given = torch.as_tensor(run(x))
        assert given.shape == wanted.shape
        assert (given - wanted).abs().max() <= tolerance


@pytest.fixture(scope="module")
def nuclei():
    return MSAUnet.from_pretrained(NAME)


@pytest.fixture(scope="module")
def nuclei_onnx(nuclei, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "nuclei.onnx"
    export(nuclei, path)
    return path


def test_a_graph_refuses_images_below_its_least_side():
    graph = trace(tiny("msa"))
    assert least_side(graph) == 32
    with pytest.raises(Exception, match=r"size\(\)\[2\] >= 32"):
        graph.module()(torch.zeros(1, 3, 31, 40))


@pytest.mark.parametrize(
    "encoder",
    [
        "msa",
        "resnet10t",
        "vit_tiny_patch16_224",
        "convnext_atto",
        "vit_tiny_patch16_dinov3_qkvb",  # rotary embeddings, which make floats of sizes
        "edgenext_xx_small",  # what it needs of sizes is true and beyond the tracer's proofs
    ],
)
def test_one_graph_for_all_sizes(encoder):
    model = tiny(encoder)
    check(trace(model).module(), model, 1e-4)


def test_onnx_agrees_at_unlike_sizes(nuclei, nuclei_onnx):
    session = onnx_session(nuclei_onnx)
    check(lambda x: session.run(None, {"image": x.numpy()})[0], nuclei, 1e-4)


def test_the_published_network_as_onnx(tmp_path):
    model = tiny("msa")
    export(model, tmp_path / "msa.onnx")
    session = onnx_session(tmp_path / "msa.onnx")
    check(lambda x: session.run(None, {"image": x.numpy()})[0], model, 1e-4)


def test_an_encoder_of_a_fixed_size_says_how_small_images_may_be(tmp_path):
    model = tiny("pit_ti_224")
    export(model, tmp_path / "pit.onnx")
    session = onnx_session(tmp_path / "pit.onnx")
    assert session.get_modelmeta().custom_metadata_map["least_side"] == "448"
    for n, *size in [(1, 448, 530), (2, 830, 460)]:
        x = torch.randn(n, 3, *size)
        with torch.no_grad():
            assert np.abs(session.run(None, {"image": x.numpy()})[0] - model(x).numpy()).max() <= 1e-4


def test_onnx_says_how_images_are_prepared(nuclei, nuclei_onnx):
    session = onnx_session(nuclei_onnx)
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert about == {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "value_range": [0.0, 1.0],
        "class_names": ["nucleus"],
        "temperature": nuclei.config.temperature,
        "activation": "sigmoid",
        "encoder": "tf_efficientnet_lite0",
        "least_side": 1,
    }
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[0].shape == ["batch", 1, "height", "width"]


@pytest.mark.parametrize(("dtype", "size", "agreement"), [("float16", 0.6, 0.999), ("int8", 0.4, 0.97)])
def test_smaller_types(nuclei, nuclei_onnx, tmp_path, dtype, size, agreement):
    path = tmp_path / "nuclei.onnx"
    crops = [PICTURE[y : y + 128, x : x + 128] for y in (0, 128) for x in (0, 128)]
    export(nuclei, path, dtype=dtype, calibration=crops if dtype == "int8" else ())
    assert path.stat().st_size < size * nuclei_onnx.stat().st_size
    session = onnx_session(path)
    assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float)"
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == ["nucleus"]
    crop = PICTURE[256:391, 200:340]  # odd, and not among those for calibration
    x = (crop.transpose(2, 0, 1)[None] / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    (logits,) = session.run(None, {"image": x})
    assert ((logits[0, 0] > 0) == predict(nuclei, crop).labels).mean() >= agreement


def test_the_model_is_left_as_it_was(tmp_path):
    model = tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "model.pt2")
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    files = {"metadata.json": ""}
    network = torch.export.load(tmp_path / "model.pt2", extra_files=files).module()
    assert json.loads(files["metadata.json"])["class_names"] == ["background", "cell"]
    check(network, model.eval(), 1e-4)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("model.pth", {}, r"\.onnx or \.pt2"),
        ("model.onnx", {"dtype": "float64"}, "float64"),
        ("model.onnx", {"aoti": True}, "aoti"),
        ("model.pt2", {"dtype": "int8", "calibration": [PICTURE]}, "ONNX alone"),
        ("model.onnx", {"dtype": "int8"}, "calibration"),
        ("model.onnx", {"calibration": [PICTURE]}, "calibration"),
    ],
)
def test_what_does_not_go_together(tmp_path, name, options, text):
    with pytest.raises(ConfigError, match=text):
        export(tiny(), tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_known_not_to_work_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("it started"))
    model = MSAUnet("swin_tiny_patch4_window7_224")
    with pytest.raises(ExportError, match=r"'swin_tiny_patch4_window7_224' cannot be exported: .*swin_transformer"):
        export(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_is_what_the_census_found():
    with (ROOT / "benchmarks" / "results" / "export.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["module"] for row in rows} >= UNTRACEABLE
    assert not {row["module"] for row in rows if row["traced"] == "ok"} & UNTRACEABLE


class Stubborn(torch.nn.Module):
    """A backbone that looks at the values."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x if x.mean() > 0 else -x)


def test_what_cannot_be_exported_is_named(tmp_path):
    model = tiny()
    model.encoder.backbone = Stubborn(model.encoder.backbone)
    with pytest.raises(ExportError, match=r"'resnet10t' cannot be exported.*data-dependent") as caught:
        export(model, tmp_path / "model.onnx")
    assert str(caught.value).count("\n") == 0
    assert list(tmp_path.iterdir()) == []


class Particular(torch.nn.Module):
    """A backbone for which images up to 300 pixels are another matter."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x if x.shape[-1] < 300 else -x)


def test_a_graph_for_some_sizes_alone_is_not_written(tmp_path):
    model = tiny()
    model.encoder.backbone = Particular(model.encoder.backbone)
    with pytest.raises(ExportError, match=r"'resnet10t' cannot be exported.*Runtime assertion failed"):
        export(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"onnxscript.*msa-unet\[export\]"):
        export(tiny(), tmp_path / "model.onnx")


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")
    monkeypatch.setattr(torch.export, "save", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ExportError, match="resnet10t"):
        export(tiny(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_line(tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "checkpoint")
    assert main(["export", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "model.pt2")]) == 0
    assert "model.pt2" in capsys.readouterr().out
    assert torch.export.load(tmp_path / "model.pt2").module()(torch.rand(1, 3, 20, 30)).shape == (1, 2, 20, 30)
    for arguments, text in (
        (["-o", str(tmp_path / "model.txt")], "model.txt"),
        (["-o", str(tmp_path / "absent" / "model.pt2")], "absent"),
        (["-o", str(tmp_path / "m.onnx"), "--dtype", "int8", "--calibration", str(tmp_path / "a.png")], "a.png"),
    ):
        assert main(["export", str(tmp_path / "checkpoint"), *arguments]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1


@pytest.mark.slow
@needs_compiler
def test_a_compiled_package_runs_without_this_one(tmp_path):
    torch.manual_seed(0)
    model = MSAUnet("resnet10t", decoder_channels=(8,) * 5, class_names=["cell"]).eval()
    export(model, tmp_path / "model.pt2", aoti=True)
    sizes = [(1, 70, 91), (3, 160, 32), (1, 1, 1)]
    images = [torch.randn(n, 3, *size) for n, *size in sizes]
    torch.save(images, tmp_path / "images.pt")
    library = tmp_path / "library"  # all that is installed here, but for this package
    library.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if "msa_unet" not in entry.name:
            (library / entry.name).symlink_to(entry)
    code = (
        "import importlib.util, sys\n"
        "sys.path.insert(0, 'library')\n"
        "assert importlib.util.find_spec('msa_unet') is None\n"
        "import torch\n"
        "network = torch._inductor.aoti_load_package('model.pt2')\n"
        "assert network.get_metadata()['class_names'] == '[\"cell\"]'\n"
        "torch.save([network(x) for x in torch.load('images.pt')], 'logits.pt')\n"
        "assert 'msa_unet' not in sys.modules\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-I", "-S", "-c", code]  # no .pth files either, which may lead to a checkout
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=1200)
    for x, logits in zip(images, torch.load(tmp_path / "logits.pt"), strict=True):
        with torch.no_grad():
            assert (logits - model(x)).abs().max() <= 1e-4


RECIPES = dict(
    re.findall(r"<!-- recipe: (.*?) -->\n```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.S)
)


@pytest.mark.parametrize(
    "recipe", ["onnx", "torch.export", pytest.param("aoti", marks=[pytest.mark.slow, needs_compiler])]
)
def test_the_documented_recipes(recipe, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(RECIPES[recipe], "docs/deploy.md", "exec"), names)
    if recipe == "onnx":
        assert np.mean(names["mask"] == predict(names["model"], PICTURE).labels) > 0.9999
        assert names["about"]["class_names"] == ["nucleus"]
    else:
        assert names["logits"].shape == (2, 1, 120, 70)
        assert "nucleus" in str(names["about"]["class_names"])
