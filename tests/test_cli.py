"""The command line, as a user runs it: a process of its own, its files, its exit status."""

import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msa_unet.cli import main

rng = np.random.default_rng(0)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    colour = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(colour).save(folder / "colour.png")
    Image.fromarray(colour).save(folder / "photo.jpg")
    Image.fromarray(colour[..., 0]).save(folder / "deeper" / "grey.tif")
    Image.fromarray(colour[..., 0].astype(np.uint16) * 16).save(folder / "deeper" / "camera.tiff")
    Image.fromarray(colour).quantize(8).save(folder / "palette.png")
    Image.fromarray(np.dstack([colour, colour[..., :1]])).save(folder / "alpha.png")
    return folder


def run(*arguments, **environment):
    command = [
        sys.executable,
        "-c",
        "import sys; from msa_unet.cli import main; sys.exit(main())",
        *map(str, arguments),
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    elsewhere = tempfile.gettempdir()  # in the checkout `-c` would find its package before the installed one
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False, cwd=elsewhere)


def bomb(path):
    """A PNG header that claims 100,000 x 100,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def test_a_folder_with_good_and_bad_files(images, checkpoint, tmp_path):
    (images / "empty.png").touch()
    (images / "cut.png").write_bytes((images / "colour.png").read_bytes()[:2000])
    bomb(images / "bomb.png")
    out = tmp_path / "out"
    result = run(
        "predict", images, images / "absent.png", "-o", out, "--model", checkpoint, "--overlay", "--probabilities"
    )
    assert result.returncode == 1
    complaints = result.stderr.strip().splitlines()[-4:]  # at the end, after the progress bar
    assert all(line.startswith("msa-unet: ") for line in complaints)
    for name in ("empty.png", "cut.png", "bomb.png", "absent.png"):
        assert sum(name in line for line in complaints) == 1
        assert result.stderr.count(f"{name}: ") == 1
    assert "Traceback" not in result.stderr
    good = ["alpha", "colour", "palette", "photo", "deeper/grey", "deeper/camera"]
    kinds = ("mask.png", "overlay.png", "probabilities.npy")
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert found == {f"{stem}_{kind}" for stem in good for kind in kinds}
    for stem in good:
        probabilities = np.load(out / f"{stem}_probabilities.npy")
        assert probabilities.shape == (1, 40, 50)
        assert np.array_equal(np.asarray(Image.open(out / f"{stem}_mask.png")), probabilities[0] > 0.5)
    assert result.stdout.count("cell") == len(good)


def test_json_and_threshold(images, checkpoint, tmp_path):
    result = run(
        "predict", images / "colour.png", "-o", tmp_path, "--model", checkpoint, "--json", "--threshold", "0.01"
    )
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout)
    mask = np.asarray(Image.open(tmp_path / "colour_mask.png"))
    assert line["pixels"] == {"cell": int(mask.sum())}
    assert line["share"]["cell"] == pytest.approx(mask.mean())
    assert (line["width"], line["height"]) == (50, 40)


def test_names_do_not_collide(checkpoint, tmp_path):
    picture = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    for name in ("a.png", "a.jpg", "b.png"):
        picture.save(tmp_path / name)
    (tmp_path / "other").mkdir()
    picture.save(tmp_path / "other" / "b.png")
    out = tmp_path / "out"
    paths = [tmp_path / "a.png", tmp_path / "a.jpg", tmp_path / "b.png", tmp_path / "other" / "b.png"]
    assert main(["predict", *map(str, paths), "-o", str(out), "--model", str(checkpoint)]) == 0
    assert {p.name for p in out.iterdir()} == {"a_mask.png", "a.jpg_mask.png", "b_mask.png", "b.png_mask.png"}
    assert main(["predict", str(tmp_path), "-o", str(tmp_path), "--model", str(checkpoint)]) == 2


def test_results_inside_the_folder_are_not_segmented_again(images, checkpoint):
    arguments = ["predict", str(images), "-o", str(images / "out"), "--model", str(checkpoint)]
    assert main(arguments) == 0
    first = sorted((images / "out").rglob("*"))
    assert main([*arguments, "--overwrite"]) == 0
    assert sorted((images / "out").rglob("*")) == first


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--threshold", "2"], "threshold"),
        (["--tile", "3"], "tile"),
        (["--batch", "0"], "batch"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "CUDA")]),
    ],
)
def test_bad_options_are_one_line(images, checkpoint, tmp_path, arguments, text, capsys):
    options = arguments if "--model" in arguments else [*arguments, "--model", str(checkpoint)]
    assert main(["predict", str(images / "colour.png"), "-o", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_told(checkpoint, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert main(["predict", str(tmp_path / "nothing"), "-o", str(tmp_path / "out"), "--model", str(checkpoint)]) == 1
    assert "no PNG, JPEG, TIFF or DICOM" in capsys.readouterr().err


def test_nothing_is_half_written(images, checkpoint, tmp_path, monkeypatch):
    def fail(self, path, *args):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    out = tmp_path / "out"
    assert main(["predict", str(images / "colour.png"), "-o", str(out), "--model", str(checkpoint)]) == 1
    assert list(out.iterdir()) == []


def test_the_command_that_is_installed():
    command = Path(sys.executable).with_name("msa-unet")
    if not command.exists():
        pytest.skip("msa_unet is not installed in this environment")
    result = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=120, check=True)
    assert "predict" in result.stdout
