"""Time from a saved folder to a network in memory: ours, segmentation_models_pytorch's, and reading the file alone.

    python benchmarks/load_time.py --rounds 15 --out benchmarks/results/load_time.json

Every contestant loads the same architecture of encoder from its own folder, in turn, in one process and on one thread,
after one round that does not count; a second table gives the first load of a fresh process, where ours also has to
find out how the encoder is to be used. The digest of the file is part of our time, as in use.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import load_file

from msa_unet import MSAUnet

GOAL = 0.7  # of their time


def loaders(folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    return {
        "msa_unet": lambda: MSAUnet.from_pretrained(folder / "ours"),
        "smp": lambda: smp.from_pretrained(folder / "theirs"),
        "file, ours": lambda: load_file(folder / "ours" / "model.safetensors"),
        "file, theirs": lambda: load_file(folder / "theirs" / "model.safetensors"),
    }


def timed(load: Callable[[], object]) -> float:
    start = time.perf_counter()
    load()
    return 1000 * (time.perf_counter() - start)


def first(folder: Path, name: str) -> float:
    """Milliseconds of the first load in a fresh process, imports not counted."""
    out = subprocess.run(
        [sys.executable, __file__, "--first", name, "--folder", folder], capture_output=True, text=True, check=True
    )
    return float(out.stdout.split()[-1])


def compare(encoder: str, rounds: int, fresh: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        MSAUnet(encoder).save_pretrained(folder / "ours")
        theirs = encoder if encoder in smp.encoders.encoders else f"tu-{encoder}"
        smp.Unet(theirs, encoder_weights=None).save_pretrained(folder / "theirs")
        contestants = loaders(folder)
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for i in range(rounds + 1):
            for name, load in contestants.items():  # interleaved: what else the machine does meets all alike
                milliseconds = timed(load)
                if i:
                    times[name].append(milliseconds)
        firsts = {name: [first(folder, name) for _ in range(fresh)] for name in ("msa_unet", "smp")}
        sizes = {name: (folder / name / "model.safetensors").stat().st_size for name in ("ours", "theirs")}
    middle = {name: round(statistics.median(values), 2) for name, values in times.items()}
    ratios = sorted(ours / theirs for ours, theirs in zip(times["msa_unet"], times["smp"], strict=True))
    row = {
        "encoder": encoder,
        "their encoder": theirs,
        "bytes": sizes,
        "median ms": middle,
        "fastest ms": {name: round(min(values), 2) for name, values in times.items()},
        "ours / theirs": round(statistics.median(ratios), 3),  # of pairs of one round
        "ours / theirs, least and most": [round(ratios[0], 3), round(ratios[-1], 3)],
    }
    if fresh:
        row["first load, median ms"] = {name: round(statistics.median(values), 2) for name, values in firsts.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=["tf_efficientnet_lite0", "resnet34", "resnet50"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fresh", type=int, default=3, help="fresh processes per contestant")
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    parser.add_argument("--first", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.first:
        print(timed(loaders(args.folder)[args.first]))
        return
    rows = []
    for encoder in args.encoders:
        rows.append(compare(encoder, args.rounds, args.fresh))
        print(json.dumps(rows[-1], indent=2), flush=True)
    print(f"goal of {GOAL} met: {all(row['ours / theirs'] < GOAL for row in rows)}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        versions = {"torch": torch.__version__, "timm": timm.__version__, "smp": smp.__version__}
        machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
        args.out.write_text(json.dumps({**versions, **machine, "rounds": args.rounds, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
