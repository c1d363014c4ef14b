"""Segment a large image from disk to disk in a fresh process and say how much memory that took at most.

    python benchmarks/large_image.py --rows 20000 --columns 20000 --out benchmarks/results/large_image.json

The image is a TIFF of random blocks, uint8 RGB, 1.2 GB for 20,000 x 20,000, written to a temporary folder. The peak is
that of the process that segments (`getrusage`), with Python, torch and the network in it.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tifffile

GOAL_MB = 3000


def write_image(path: Path, rows: int, columns: int) -> None:
    """Blocks of 16 pixels in random colours, written block row by block row."""
    rng = np.random.default_rng(0)
    offset, _ = tifffile.imwrite(path, shape=(rows, columns, 3), dtype=np.uint8, photometric="rgb", returnoffset=True)
    with path.open("r+b") as file:
        file.seek(offset)
        for top in range(0, rows, 16):
            colours = rng.integers(0, 256, (1, -(-columns // 16), 3), dtype=np.uint8)
            block = np.kron(colours, np.ones((16, 16, 1), np.uint8))[: rows - top, :columns]
            file.write(block.tobytes())


def segment(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    from msa_unet import MSAUnet, predict_large

    if args.encoder:
        model = MSAUnet(args.encoder, decoder_channels=args.decoder_channels)
    else:
        model = MSAUnet.from_pretrained(args.model)
    start = time.perf_counter()
    labels = predict_large(model, folder / "image.tif", folder / "labels.tif", tile=args.tile)
    seconds = time.perf_counter() - start
    assert labels.shape == (args.rows, args.columns)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return {"peak_mb": round(peak), "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--columns", type=int, default=20_000)
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--model", default="tf_efficientnet_lite0.dsb2018")
    parser.add_argument("--encoder", help="a network with random weights instead of --model")
    parser.add_argument("--decoder-channels", type=int, nargs="*", default=())
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, spawn) as pool:
        write_image(Path(folder) / "image.tif", args.rows, args.columns)
        row = pool.submit(segment, args, Path(folder)).result()
    row = {"rows": args.rows, "columns": args.columns, "tile": args.tile, "model": args.encoder or args.model, **row}
    print(json.dumps(row))
    print(f"under {GOAL_MB} MB: {row['peak_mb'] < GOAL_MB}", file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
