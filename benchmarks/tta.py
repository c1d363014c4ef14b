"""What averaging over flips and quarter turns gains on a checkpoint's test split, and what it costs.

    python benchmarks/tta.py tf_efficientnet_lite0.dsb2018 ../shared/data/dsb2018 --out benchmarks/results/tta.json

Each image is segmented without and with `tta`, one after the other: mean Dice of both (classes absent from truth and
prediction have none), the mean gain with its 95 % bootstrap interval over images, the seconds of both, and whether the
uncertainty finds errors, that is its mean over wrong pixels and over right ones.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from pairs import dice, read_pairs

from msa_unet import MSAUnet, predict


def mean_dice(labels: np.ndarray, truth: np.ndarray, classes: dict[int, str]) -> float:
    """The mean over classes that either holds; not a number if there is none."""
    scores = [score for label in classes if (score := dice(labels == label, truth == label)) is not None]
    return float(np.mean(scores)) if scores else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data", type=Path, help="folder as for examples/finetune.py, with the splits of the training")
    parser.add_argument("--images", type=int, help="only the first of the split, to try the command")
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    args = parser.parse_args()
    model = MSAUnet.from_pretrained(args.checkpoint)
    pairs = list(read_pairs(args.data, "test", args.images))
    scores = np.empty((len(pairs), 2))
    seconds, unsure = np.zeros(2), {"wrong": [], "right": []}
    for i, (picture, truth) in enumerate(pairs):
        for tta in (0, 1):
            start = time.perf_counter()
            result = predict(model, picture, tta=bool(tta))
            seconds[tta] += time.perf_counter() - start
            scores[i, tta] = mean_dice(result.labels, truth, result.foreground)
        wrong = result.labels != truth
        for name, where in (("wrong", wrong), ("right", ~wrong)):
            if where.any():
                unsure[name].append(float(result.uncertainty[where].mean()))
    scores = scores[~np.isnan(scores).any(1)]
    gain = scores[:, 1] - scores[:, 0]
    means = np.random.default_rng(0).choice(gain, (10_000, len(gain))).mean(1)
    numbers = {
        "checkpoint": args.checkpoint,
        "images": len(gain),
        "dice": [round(float(value), 4) for value in scores.mean(0)],  # without, with
        "gain": [round(float(value), 4) for value in (gain.mean(), *np.quantile(means, (0.025, 0.975)))],
        "seconds": [round(float(value), 2) for value in seconds],
        "uncertainty": {name: round(float(np.mean(values)), 4) for name, values in unsure.items() if values},
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()},
    }
    print(json.dumps(numbers, indent=2))
    if args.out:
        args.out.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
