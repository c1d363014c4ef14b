"""Images larger than the network or the memory: windows leave no seams, and files are read and written by rows."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from msa_unet import InputError, MSAUnet, MSAUnetConfig, predict, predict_large
from msa_unet.inference import even_step

pytest.importorskip("monai")
tifffile = pytest.importorskip("tifffile")
rng = np.random.default_rng(0)
REACH = 4  # pixels to each side that a `Local` network sees


class Local(nn.Module):
    """Stands in for MSAUnet where it matters how far a pixel reaches: two 5x5 convolutions, and borders of zeros."""

    def __init__(self, num_classes=1):
        super().__init__()
        torch.manual_seed(0)
        self.config = MSAUnetConfig(num_classes=num_classes, mean=(0.0,) * 3, std=(0.25,) * 3)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, num_classes, 5, padding=2))

    def forward(self, x):
        return 5 * self.layers(x)


def depth(side, tile):
    """How far each pixel of a line lies inside the windows that cover it; the image's own borders are no seams."""
    tile = min(tile, side)
    windows = [(s, s + tile) for s in (*range(0, side - tile, even_step(side, tile)), side - tile)]
    return np.array(
        [
            min(
                min(i - start if start else side, stop - 1 - i if stop < side else side)
                for start, stop in windows
                if start <= i < stop
            )
            for i in range(side)
        ]
    )


@pytest.mark.parametrize("size", [(150, 170), (96, 97), (64, 300), (50, 40), (131, 64)])
@pytest.mark.parametrize("num_classes", [1, 3])
def test_tiled_equals_whole_where_windows_see_the_same(size, num_classes):
    model, image = Local(num_classes), rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    whole, tiled = predict(model, image), predict(model, image, tile=64, batch=3)
    assert tiled.probabilities.shape == (num_classes, *size)
    difference = np.abs(whole.probabilities - tiled.probabilities).max(0)
    down, across = (depth(side, 64) for side in size)
    same = np.minimum(down[:, None], across) >= REACH
    assert same.mean() > 0.6
    assert difference[same].max() < 1e-5
    assert difference.max() < 0.02  # within reach of a window's border that border hardly counts


@pytest.mark.parametrize("tile", [64, 96])
def test_a_flat_image_shows_no_grid(tile):
    model, image = Local(), np.full((150, 170, 3), 200, np.uint8)
    inner = (0, slice(REACH, -REACH), slice(REACH, -REACH))
    whole = predict(model, image).probabilities
    assert np.ptp(whole) > 0.05  # borders show
    assert np.ptp(whole[inner]) < 1e-5
    assert np.ptp(predict(model, image, tile=tile).probabilities[inner]) < 1 / 255


def test_the_networks_own_seams_vanish_in_the_middle_of_windows():
    """Attention looks at the whole window, so the network that is compared has none."""
    torch.manual_seed(0)
    model = MSAUnet("resnet10t", decoder_channels=(8,) * 5, attention="none")
    image = rng.integers(0, 256, (64, 800, 3), dtype=np.uint8)
    whole, tiled = predict(model, image), predict(model, image, tile=512)  # windows: 0 to 512, 288 to 800
    assert np.abs(whole.probabilities - tiled.probabilities)[..., :20].max() < 1e-3


def test_labels_on_disk_are_those_in_memory(tmp_path):
    model, image = Local(3), rng.integers(0, 256, (150, 100, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "image.tif", image)
    wanted = predict(model, image, tile=64).labels
    for source in (tmp_path / "image.tif", str(tmp_path / "image.tif"), tifffile.memmap(tmp_path / "image.tif")):
        labels = predict_large(model, source, tmp_path / "labels.tif", tile=64)
        assert labels.dtype == np.uint8
        assert np.array_equal(labels, wanted)
        assert np.array_equal(tifffile.imread(tmp_path / "labels.tif"), wanted)
    assert {p.name for p in tmp_path.iterdir()} == {"image.tif", "labels.tif"}


def test_sixteen_bits_have_one_range_in_all_rows(tmp_path):
    image = rng.integers(0, 200, (150, 70)).astype(np.uint16)
    image[140, 3] = 4000  # told by the last strip: 12 bits
    tifffile.imwrite(tmp_path / "image.tif", image)
    labels = predict_large(Local(), tmp_path / "image.tif", tmp_path / "labels.tif", tile=64)
    assert np.array_equal(labels, predict(Local(), image, tile=64).labels)


def test_what_cannot_be_read_by_rows_is_told(tmp_path):
    model, out = Local(), tmp_path / "labels.tif"
    tifffile.imwrite(tmp_path / "packed.tif", np.zeros((99, 99), np.uint8), compression="zlib")
    (tmp_path / "text.tif").write_text("no image")
    for name in ("packed.tif", "text.tif", "absent.tif"):
        with pytest.raises(InputError, match=name):
            predict_large(model, tmp_path / name, out)
    with pytest.raises(InputError, match=r"\(2, 3, 4, 5\)"):
        predict_large(model, np.zeros((2, 3, 4, 5), np.uint8), out)
    late = np.zeros((200, 50), np.float32)
    late[199] = 2
    with pytest.raises(InputError, match="0, 1"):
        predict_large(model, late, out, tile=64)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_memory_grows_with_the_width_alone():
    """Peaks of fresh processes; as floats in memory the picture of 6,000 rows alone would take 72 MB."""
    peaks = []
    for rows in ("1000", "6000"):
        command = [sys.executable, ROOT / "benchmarks" / "large_image.py", "--rows", rows, "--columns", "1000"]
        command += ["--tile", "512", "--encoder", "resnet10t", "--decoder-channels", "4", "4", "4", "4", "4"]
        line = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True).stdout
        peaks.append(json.loads(line)["peak_mb"])
    assert peaks[1] - peaks[0] < 40, peaks
