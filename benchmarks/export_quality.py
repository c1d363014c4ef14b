"""What float16 and int8 lose in Dice and gain in time, on a real checkpoint and its test split, in onnxruntime.

    python benchmarks/export_quality.py                                     # writes results/export_quality.json
    python benchmarks/export_quality.py --limit 3 --rounds 1 --out try.json          # to see that it runs

Every image goes through at its full size. int8 is calibrated on images of the training split. Dice is the mean over
images of the first class; a loss is against float32 in eager mode, image by image. Times are of one image on
`--threads` threads: of each image the median over the rounds, contenders in turn within a round after one that does not
count. The gain is eager's time over theirs, image by image: the median, and the range of the middle 80 % of images.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from pairs import dice, read_pairs
from PIL import Image

from msa_unet import MSAUnet
from msa_unet.export import export
from msa_unet.inference import prepare, to_unit_range

ROOT = Path(__file__).parents[1]
Contender = Callable[[np.ndarray], np.ndarray]  # image (1, C, H, W) -> logits (1, K, H, W)


def contenders(model: MSAUnet, folder: Path, calibration: list[Image.Image], threads: int) -> dict[str, Contender]:
    """What is compared, by name; exported files go to `folder`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads

    def eager(network: torch.nn.Module) -> Contender:
        @torch.inference_mode()
        def run(image: np.ndarray) -> np.ndarray:
            return network(torch.from_numpy(image)).numpy()

        return run

    def exported(dtype: str) -> Contender:
        path = folder / f"{dtype}.onnx"
        export(model, path, dtype=dtype, calibration=calibration if dtype == "int8" else ())
        session = onnxruntime.InferenceSession(path, options)
        return lambda image: session.run(None, {"image": image})[0]

    return {
        "eager": eager(model),
        "eager, fused": eager(model.fuse()),
        **{f"onnx {dtype}": exported(dtype) for dtype in ("float32", "float16", "int8")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT / "weights" / "tf_efficientnet_lite0.dsb2018"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "dsb2018")
    parser.add_argument("--calibration", type=int, default=20, help="images of the training split")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="only so many images of the test split")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "export_quality.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = MSAUnet.from_pretrained(args.checkpoint)
    if model.config.num_classes != 1:
        parser.error(f"{args.checkpoint} has {model.config.num_classes} classes; masks of one are scored here.")
    pairs = [(picture, labels == 1) for picture, labels in read_pairs(args.data, "test", args.limit)]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        calibration = [image for image, _ in read_pairs(args.data, "train", args.calibration)]
        networks = contenders(model, folder, calibration, args.threads)
        sizes = {f"onnx {path.stem}": path.stat().st_size for path in folder.glob("*.onnx")}
        scores: dict[str, list[float]] = {name: [] for name in networks}
        times: dict[str, list[float]] = {name: [] for name in networks}
        for i, (picture, mask) in enumerate(pairs, 1):
            image = prepare(to_unit_range(picture), model.config).numpy()
            laps: dict[str, list[float]] = {name: [] for name in networks}
            for turn in range(args.rounds + 1):
                for name, network in networks.items():  # interleaved: what else the machine does meets all alike
                    start = time.perf_counter()
                    logits = network(image)
                    laps[name].append(time.perf_counter() - start)
                    if turn == 0:
                        scores[name].append(dice(logits[0, 0] > 0, mask))
            for name in networks:
                times[name].append(statistics.median(laps[name][1:]))
            print(f"{i} of {len(pairs)} images", flush=True)
    scored = [i for i, score in enumerate(scores["eager"]) if score is not None]
    rows = []
    for name in networks:
        losses = [scores["eager"][i] - (scores[name][i] or 0.0) for i in scored]
        gains = np.divide(times["eager"], times[name])
        rows.append(
            {
                "network": name,
                "MB": round(sizes[name] / 1e6, 2) if name in sizes else "",
                "Dice": round(statistics.mean(scores[name][i] or 0.0 for i in scored), 5),
                "Dice lost, mean": round(statistics.mean(losses), 5),
                "Dice lost, most": round(max(losses), 5),
                "ms per image": round(1000 * statistics.mean(times[name]), 1),
                "times as fast as eager": round(float(np.median(gains)), 2),
                "range over images": [round(float(gain), 2) for gain in np.quantile(gains, (0.1, 0.9))],
            }
        )
    print(json.dumps(rows, indent=2))
    about = {
        "checkpoint": Path(args.checkpoint).name,
        "data": args.data.name,
        "images": len(pairs),
        "scored": len(scored),
        "calibration images": args.calibration,
        "rounds": args.rounds,
        "threads": args.threads,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    partial = args.out.with_suffix(".part")
    partial.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    partial.replace(args.out)


if __name__ == "__main__":
    main()
