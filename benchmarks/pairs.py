"""Images of a data set at their full size with their masks, and their Dice; for commands that score checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from msa_unet.inference import read_image


def read_pairs(folder: Path, split: str, count: int | None = None) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """The picture and the class indices (H, W) of the first `count` stems of a split of splits.json, or of all."""
    paths = {path.stem: path for path in (folder / "images").iterdir()}
    for stem in json.loads((folder / "splits.json").read_text())[split][:count]:
        with Image.open(folder / "masks" / f"{stem}.png") as mask:
            labels = np.array(mask)
        yield read_image(paths[stem]), labels


def dice(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """2 |A and B| / (|A| + |B|) of two masks (H, W) bool; none if both are empty."""
    total = int(predicted.sum() + true.sum())
    return 2 * int((predicted & true).sum()) / total if total else None
