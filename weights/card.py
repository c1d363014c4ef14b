"""Write card.json of a checkpoint folder from what is in it; the registry reads nothing else.

    python weights/card.py weights/tf_efficientnet_lite0.dsb2018

The interval of the test Dice is a bootstrap over the rows of scores.csv: 10,000 resamples of images, 95 %.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from msa_unet.registry import PretrainedCard


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    drawn = np.random.default_rng(0).choice(np.array(values), (10_000, len(values))).mean(1)
    return round(float(np.quantile(drawn, 0.025)), 4), round(float(np.quantile(drawn, 0.975)), 4)


def describe(folder: Path, organisation: str) -> PretrainedCard:
    """The card of a folder that holds config.json, model.safetensors and scores.csv."""
    with (folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    intervals = {f"test_{metric}": interval([float(row[metric]) for row in rows]) for metric in ("dice", "iou")}
    return PretrainedCard.describe(folder, f"{organisation}/{folder.resolve().name}", intervals=intervals)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--organisation", default="msa-unet", help="of the Hub, where it is to be published")
    args = parser.parse_args()
    card = describe(args.folder, args.organisation)
    card.write(args.folder)
    print(card)
