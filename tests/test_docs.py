"""The documentation: its tables are the results files', its links lead somewhere, its Python runs.

The gate builds the pages; here Sphinx is not needed.
"""

import csv
import re
import runpy
import subprocess
import sys

import convert_published
import numpy as np
import pytest
import torch
from conftest import ROOT
from literal import LiteralMSAUnet
from PIL import Image

from msa_unet import MSAUnet

DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text() for path in DOCS.glob("*.md")}
CONF = runpy.run_path(str(DOCS / "conf.py"))


def test_the_encoder_table_has_every_encoder_that_passed():
    with (ROOT / "benchmarks" / "results" / "census.csv").open() as file:
        good = [
            r for r in csv.DictReader(file) if {r[c] for c in r if c.startswith("ok_") or c == "backward"} == {"ok"}
        ]
    head, *rows = CONF["encoder_table"](CONF["CENSUS"])
    assert [row[0] for row in rows] == [row["encoder"] for row in good]
    assert len(rows) > 1000
    assert {len(row) for row in rows} == {len(head)}


@pytest.mark.parametrize("counted", [False, True])
def test_rows_by_hand(counted, tmp_path):
    census = tmp_path / "census.csv"
    end = ",gmac_512" if counted else ""
    census.write_text(
        f"encoder,parameters,levels,native,ok_native,ok_250x190,ok_33x47,backward{end}\n"
        f"small,4444613,2 4 8,224x224,ok,ok,ok,ok{',8.1' if counted else ''}\n"
        f"wide,1237405893,4 8 16 32,336x224,ok,ok,ok,ok{',' if counted else ''}\n"
        f"broken,1,2,224x224,ok,ok,RuntimeError: 33,ok{',1' if counted else ''}\n"
    )
    _, *rows = CONF["encoder_table"](census)
    wanted = [["small", "4.4", "224x224", "2 4 8", "8.1"], ["wide", "1237.4", "336x224", "4 8 16 32", ""]]
    assert rows == [row if counted else row[:4] for row in wanted]


def test_card_pages_have_no_header_and_links_that_lead_somewhere():
    cards = sorted(CONF["WEIGHTS"].glob("*/README.md"))
    assert cards
    for card in cards:
        page = CONF["card_page"](card)
        assert page.lstrip().startswith(f"# {card.parent.name}\n")
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page):
            assert (CONF["GENERATED"] / target).resolve().exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    text = PAGES[page]
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
    targets += re.findall(r"\{(?:literal)?include\} (\S+)", text)
    targets += [target for target in re.findall(r":file: (\S+)", text) if not target.startswith("_generated/")]
    targets += re.findall(r'src="([^":]+)"', text)
    for target in targets:
        assert (DOCS / target).exists(), target
    for path in re.findall(r"\b(?:benchmarks|docs|examples|msa_unet|tests|weights)/[\w./-]*\.(?:py|md|csv|png)", text):
        assert (ROOT / path).exists(), path


def test_the_table_of_contents_has_every_page():
    listed = [
        line
        for block in re.findall(r"```\{toctree\}\n(.*?)```", PAGES["index"], re.DOTALL)
        for line in block.splitlines()
        if line and not line.startswith(":")
    ]
    assert sorted(listed) == sorted(set(PAGES) - {"index"})


@pytest.fixture
def stand_ins(tmp_path):
    """The files that the pages open: an image, a 12-bit camera picture, a slide and a CT slice."""
    data = pytest.importorskip("pydicom.data")
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 4096, (40, 50), dtype=np.uint16)).save(tmp_path / "camera.tif")
    tifffile.imwrite(tmp_path / "slide.tif", rng.integers(0, 256, (300, 280, 3), dtype=np.uint8), photometric="rgb")
    (tmp_path / "scan.dcm").symlink_to(data.get_testdata_file("CT_small.dcm", download=False))
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of the other libraries
@pytest.mark.parametrize(
    ("page", "needs", "made"),
    [
        ("quickstart", ["monai"], ["overlay.png", "mask.png", "labels.tif"]),
        ("migrate", ["segmentation_models_pytorch"], ["my-model/model.safetensors"]),
    ],
)
def test_the_python_of_a_page_runs(page, needs, made, stand_ins, monkeypatch):
    for module in needs:
        pytest.importorskip(module)
    monkeypatch.chdir(stand_ins)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL))
    exec(compile(code, f"docs/{page}.md", "exec"), {})
    for name in made:
        assert (stand_ins / name).exists()


def convert(*arguments):
    command = [sys.executable, convert_published.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("antialias", [True, False])
def test_a_published_checkpoint_becomes_a_folder_with_the_same_logits(antialias, tmp_path):
    torch.manual_seed(1)
    wanted = MSAUnet(decoder_channels=(8, 16, 32, 64), num_classes=2, antialias=antialias).eval()
    tensors = {f"module.{name}": tensor for name, tensor in wanted.to_published().items()}
    torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "published.pth")
    flag = "--antialias" if antialias else "--no-antialias"
    run = convert(tmp_path / "published.pth", tmp_path / "new", flag, "--class-names", "background", "polyp")
    assert run.returncode == 0, run.stderr
    assert f"{len(tensors)} tensors, 0 dropped" in run.stdout
    model = MSAUnet.from_pretrained(tmp_path / "new")
    assert model.config.class_names == ("background", "polyp")
    x = torch.randn(1, 3, 67, 91)
    with torch.no_grad():
        assert torch.equal(model(x), wanted(x))


def test_conversion_names_what_it_drops(tmp_path):
    literal = LiteralMSAUnet(widths=(16, 32, 64, 128))
    torch.save({"model": literal.state_dict()}, tmp_path / "published.pt")
    run = convert(tmp_path / "published.pt", tmp_path / "new", "--antialias")
    assert run.returncode == 0, run.stderr
    dropped = [name for name in literal.state_dict() if name.startswith(("ups.1.", "ups.4.", "ups.7."))]
    assert run.stdout.splitlines()[1:] == [f"  dropped {name}" for name in dropped]


def test_what_cannot_be_converted_exits_with_2(tmp_path, capsys):
    torch.save(MSAUnet("resnet18").state_dict(), tmp_path / "other.pth")
    torch.save({"state_dict": [1, 2]}, tmp_path / "list.pth")
    torch.save(MSAUnet(decoder_channels=(8, 16, 32, 64)), tmp_path / "pickle.pth")  # a whole module
    (tmp_path / "text.pth").write_text("no checkpoint")
    good = MSAUnet(decoder_channels=(8, 16, 32, 64)).to_published()
    torch.save(good, tmp_path / "good.pth")
    for name, message, *more in (
        ("other", "not a checkpoint of the published MSA-Unet"),
        ("list", "holds no state dict"),
        ("pickle", "cannot be read as a state dict"),
        ("text", "cannot be read as a state dict"),
        ("absent", "cannot be read as a state dict"),
        ("good", "class_names", "--class-names", "background", "polyp"),
    ):
        arguments = [str(tmp_path / f"{name}.pth"), str(tmp_path / "new"), "--antialias", *more]
        assert convert_published.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("convert_published: ")
        assert message in error
    assert convert(*arguments).returncode == 2
    assert not (tmp_path / "new").exists()
