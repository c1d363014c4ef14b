"""Write card.json of a checkpoint folder from what is in it, which the registry reads, and the tables of all of them.

    python weights/card.py                                          # every folder beside this file
    python weights/card.py weights/tf_efficientnet_lite0.dsb2018
    python weights/card.py weights/tf_efficientnet_lite0.dsb2018 --groups modality ../shared/data/dsb2018/splits.json

The last prints the mean test Dice of each kind of image, too, as a table for the card: the entry of splits.json that is
named says what kind each image is.
The tables are those of README.md and weights/README.md. Intervals are 95 % bootstraps over the images of scores.csv, of
each with all its classes: 10,000 resamples.
"""

import argparse
import csv
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from msa_unet.registry import CARD, CONFIG, PretrainedCard

WEIGHTS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- checkpoints:begin -->\n).*?(<!-- checkpoints:end -->)", re.DOTALL)


def interval(images: list[list[float]]) -> tuple[float, float]:
    """95 % bootstrap interval over images of the mean of all scores; one list of scores per image."""
    total, count = (np.array([of(scores) for scores in images]) for of in (sum, len))
    drawn = np.random.default_rng(0).integers(0, len(images), (10_000, len(images)))
    low, high = np.quantile(total[drawn].sum(1) / count[drawn].sum(1), (0.025, 0.975))
    return round(float(low), 4), round(float(high), 4)


def read_scores(folder: Path, metric: str) -> dict[str, list[float]]:
    """The scores of each image by its name, one of each class that it has."""
    scores = defaultdict(list)
    with (folder / "scores.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            scores[row["image"]].append(float(row[metric]))
    return scores


def describe(folder: Path, organisation: str) -> PretrainedCard:
    """The card of a folder that holds config.json, model.safetensors and scores.csv."""
    metrics = json.loads((folder / CONFIG).read_text())["metrics"]
    scores = {name: read_scores(folder, name.removeprefix("test_")) for name in metrics}
    intervals = {name: interval(list(images.values())) for name, images in scores.items()}
    return PretrainedCard.describe(folder, f"{organisation}/{folder.resolve().name}", intervals=intervals)


def kinds(folder: Path, groups: dict[str, str]) -> str:
    """Markdown: a row per kind of image, the most frequent first; `groups` has the kind of each image."""
    scores: dict[str, list[list[float]]] = defaultdict(list)
    for image, values in read_scores(folder, "dice").items():
        scores[groups[image]].append(values)
    rows = ["| kind | images | mean Dice (95 % interval) |", "|---|---|---|"]
    for kind, images in sorted(scores.items(), key=lambda item: -len(item[1])):
        low, high = interval(images)
        rows.append(f"| {kind} | {len(images)} | {np.concatenate(images).mean():.4f} ({low:.4f} to {high:.4f}) |")
    return "\n".join(rows)


def table(links: str = "") -> str:
    """Markdown: a row per checkpoint, its name linked to its page below the folder `links`."""
    rows = [
        "| name | classes | data | licence of the data | MB | test Dice (95 % interval) |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(WEIGHTS.glob(f"*/{CARD}")):
        card, config = PretrainedCard.read(path), json.loads((path.parent / CONFIG).read_text())
        dice, low, high = card.metrics["test_dice"]
        name = f"[{card.name}]({links}{card.name}/README.md)"
        classes = ", ".join(config["class_names"])
        cells = (name, classes, card.dataset, config["dataset_licence"], f"{card.size / 1e6:.1f}")
        rows.append(f"| {' | '.join(cells)} | {dice:.3f} ({low:.3f} to {high:.3f}) |")
    return "\n".join(rows) + "\n"


def rebuild() -> dict[Path, str]:
    """The documents with the table as it should be."""
    documents = {WEIGHTS / "README.md": "", WEIGHTS.parent / "README.md": "weights/"}
    return {path: BLOCK.sub(rf"\g<1>{table(links)}\g<2>", path.read_text()) for path, links in documents.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", default=[path.parent for path in WEIGHTS.glob(f"*/{CONFIG}")])
    parser.add_argument("--organisation", default="msa-unet", help="of the Hub, where it is to be published")
    parser.add_argument("--groups", nargs=2, metavar=("ENTRY", "SPLITS"), help="kinds of images, for a table of them")
    args = parser.parse_args()
    for folder in args.folders:
        card = describe(folder, args.organisation)
        card.write(folder)
        print(card)
        if args.groups:
            entry, splits = args.groups
            print(kinds(folder, json.loads(Path(splits).read_text())[entry]))
    for path, text in rebuild().items():
        path.write_text(text)
