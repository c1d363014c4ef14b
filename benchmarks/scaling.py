"""Time and memory of one forward pass from 128x128 to 2048x2048 and from one image to sixteen, and of tiles beyond.

    python benchmarks/scaling.py

Every case runs once per round, in turn. Results: benchmarks/results/scaling.json, the fastest time of each case and the
peak memory of a process that runs it alone; docs/images/scaling.svg, the same over the number of pixels. Tiles are
windows of 1024 pixels, a quarter of each overlapping its neighbours, as `predict(tile=1024)` makes them.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from speed import resident, timed

from msa_unet import MSAUnet, predict

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
ENCODER = "tf_efficientnet_lite0"
CASES = [
    *({"by": "size", "size": size, "batch": 1} for size in (128, 256, 512, 1024, 2048)),
    *({"by": "batch", "size": 256, "batch": batch} for batch in (1, 2, 4, 8, 16)),
    *({"by": "tiles", "size": size, "batch": 1} for size in (2048, 4096)),
]


def prepared(case: dict[str, object]) -> Callable[[], object]:
    """One pass through a case."""
    torch.manual_seed(0)
    model = MSAUnet(ENCODER).eval().to(memory_format=torch.channels_last)
    size, batch = case["size"], case["batch"]
    if case["by"] == "tiles":
        image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
        return lambda: predict(model, image, tile=1024)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.inference_mode():
            model(x)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        before = resident("VmRSS")
        prepared(json.loads(args.peak))()
        print(resident("VmHWM") - before)
        return
    steps = [prepared(case) for case in CASES]
    times: list[list[float]] = [[] for _ in CASES]
    for turn in range(args.rounds + 1):
        for case, step, found in zip(CASES, steps, times, strict=True):
            if case["by"] == "tiles" and turn > 2:  # slow, and long enough to be steady
                continue
            found.append(timed(step, "cpu"))
    rows = []
    for case, found in zip(CASES, times, strict=True):
        command = [sys.executable, __file__, "--threads", str(args.threads), "--peak", json.dumps(case)]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        pixels = case["size"] ** 2 * case["batch"]
        fastest = min(found[1:])
        row = {"ms": round(fastest, 2), "ns_per_pixel": round(1e6 * fastest / pixels, 1), "peak_mb": round(peak)}
        rows.append(case | {"rounds": len(found) - 1} | row)
        print(rows[-1], flush=True)
    about = {"encoder": ENCODER, "threads": args.threads, "torch": torch.__version__, "cpu": platform.machine()}
    partial = RESULTS.with_suffix(".part")
    partial.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    partial.replace(RESULTS)
    plot(rows)


def plot(rows: list[dict[str, float]]) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.size": 8}  # the same file each time
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, column, label in ((axes[0], "ms", "time, ms"), (axes[1], "peak_mb", "peak memory, MB")):
        for by, name in (("size", "one image"), ("batch", "batch of 256x256"), ("tiles", "tiles of 1024x1024")):
            points = [(row["size"] ** 2 * row["batch"] / 1e6, row[column]) for row in rows if row["by"] == by]
            axis.plot(*zip(*points, strict=True), "o-", label=name)
        axis.set(xscale="log", yscale="log", xlabel="megapixels", ylabel=label)
    megapixel = next(row["ms"] for row in rows if row["size"] == 1024) / 1024**2 * 1e6
    axes[0].plot([0.01, 20], [0.01 * megapixel, 20 * megapixel], ":", color="grey", label="linear")
    axes[0].legend()
    figure.savefig(ROOT / "docs" / "images" / "scaling.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
