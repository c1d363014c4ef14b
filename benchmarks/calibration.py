"""Whether a checkpoint's probabilities are frequencies: expected calibration error, reliability, and a temperature.

    python benchmarks/calibration.py weights/tf_efficientnet_lite0.dsb2018 ../shared/data/dsb2018 --write

The temperature is the one with the least cross-entropy on the validation split. It is kept only if the calibration
error falls there too; the test split is looked at once, with it and without. Of each image the same number of pixels is
drawn, so that large images do not count for more. `--write` puts the temperature into the checkpoint's config.json and
the diagram into its folder, and the numbers go to benchmarks/results/calibration/<checkpoint>.json.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from pairs import read_pairs
from PIL import Image
from scipy.optimize import minimize_scalar
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error
from tqdm import tqdm

from msa_unet import MSAUnet
from msa_unet.files import replacing
from msa_unet.inference import evaluating, prepare, to_unit_range

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results" / "calibration"
BINS = 15
Pair = tuple[Image.Image, np.ndarray]  # picture, class indices (H, W)


def drawn_pixels(model: MSAUnet, pairs: Iterable[Pair], count: int) -> tuple[Tensor, Tensor]:
    """Logits (P, K) and true labels (P,) of `count` random pixels of each image."""
    rng, logits, truth = np.random.default_rng(0), [], []
    for picture, labels in tqdm(pairs, unit="image"):
        with evaluating(model):
            scores = model(prepare(to_unit_range(picture), model.config))[0].flatten(1).T
        mask = torch.from_numpy(labels).flatten().long()
        chosen = torch.from_numpy(rng.choice(len(mask), min(count, len(mask)), replace=False))
        logits.append(scores[chosen].clone())
        truth.append(mask[chosen])
    return torch.cat(logits), torch.cat(truth)


def cross_entropy(logits: Tensor, truth: Tensor) -> float:
    if logits.shape[1] == 1:
        return float(F.binary_cross_entropy_with_logits(logits[:, 0], truth.float()))
    return float(F.cross_entropy(logits, truth))


def calibration_error(logits: Tensor, truth: Tensor) -> float:
    """Mean gap of confidence and accuracy over bins, weighted by how many pixels they hold; torchmetrics' l1."""
    if logits.shape[1] == 1:
        return float(binary_calibration_error(logits[:, 0].sigmoid(), truth, n_bins=BINS))
    return float(multiclass_calibration_error(logits.softmax(1), truth, logits.shape[1], n_bins=BINS))


def reliability(logits: Tensor, truth: Tensor) -> list[tuple[float, float, int]]:
    """Per bin that is not empty: mean probability, frequency, pixels; of the foreground, or of the likeliest class."""
    if logits.shape[1] == 1:
        p, happened = logits[:, 0].sigmoid(), truth.bool()
    else:
        p, label = logits.softmax(1).max(1)
        happened = label == truth
    index = (p * BINS).long().clamp(max=BINS - 1)
    return [
        (float(p[here].mean()), float(happened[here].float().mean()), int(here.sum()))
        for here in (index == i for i in range(BINS))
        if here.any()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder")
    parser.add_argument("data", type=Path, help="folder as for examples/finetune.py, with the splits of the training")
    parser.add_argument("--pixels", type=int, default=20_000, help="per image")
    parser.add_argument("--images", type=int, help="only the first of each split, to try the command")
    parser.add_argument("--write", action="store_true", help="keep the results")
    args = parser.parse_args()

    model = MSAUnet.from_pretrained(args.checkpoint)
    pairs = {split: list(read_pairs(args.data, split, args.images)) for split in ("val", "test")}
    (val, val_truth), (test, test_truth) = (drawn_pixels(model, of, args.pixels) for of in pairs.values())
    found = minimize_scalar(lambda t: cross_entropy(val / np.exp(t), val_truth), (-1, 1)).x
    fitted = round(float(np.exp(found)), 3)
    helps = calibration_error(val / fitted, val_truth) < calibration_error(val, val_truth)
    numbers = {
        "checkpoint": args.checkpoint.resolve().name,
        "pixels_per_image": args.pixels,
        "images": {split: len(of) for split, of in pairs.items()},
        "fitted_temperature": fitted,
        "kept_temperature": fitted if helps else 1.0,
    }
    for name, temperature in (("as_trained", 1.0), ("fitted", fitted)):
        numbers[name] = {
            "val_calibration_error": round(calibration_error(val / temperature, val_truth), 4),
            "val_cross_entropy": round(cross_entropy(val / temperature, val_truth), 4),
            "test_calibration_error": round(calibration_error(test / temperature, test_truth), 4),
            "test_cross_entropy": round(cross_entropy(test / temperature, test_truth), 4),
        }
    print(json.dumps(numbers, indent=2))
    if not args.write:
        return

    figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for name, temperature in (("as trained", 1.0), (f"temperature {fitted}", fitted)):
        p, frequency, _ = zip(*reliability(test / temperature, test_truth), strict=True)
        axes.plot(p, frequency, marker="o", label=name)
    axes.set(xlabel="probability", ylabel="frequency", title="Reliability, test split", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    figure.savefig(args.checkpoint / "reliability.png", dpi=120, metadata={"Software": None})
    RESULTS.mkdir(parents=True, exist_ok=True)
    with replacing(RESULTS / f"{numbers['checkpoint']}.json") as path:
        path.write_text(json.dumps(numbers, indent=2) + "\n")
    config = replace(model.config, temperature=numbers["kept_temperature"])
    with replacing(args.checkpoint / "config.json") as path:
        path.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


if __name__ == "__main__":
    main()
