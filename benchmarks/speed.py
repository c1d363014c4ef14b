"""Time and memory of MSA-Unet beside its peers, the bare encoder and the published form, side by side in one process.

    python benchmarks/speed.py                                    # every cell below; goes on where it was stopped
    python benchmarks/speed.py --encoders resnet34 --sizes 512 --batches 1 --modes inference --engines eager fused
    python benchmarks/speed.py --encoders ablations --sizes 512 --batches 1 --engines eager fused --dtypes float32
    python benchmarks/speed.py --device cuda                      # the same on a GPU, timed with its events

A cell is one encoder, size, batch, mode, engine and precision. In each of its rounds every contender runs once, in
turn, so that what else the machine does meets all alike; rounds go on for `--seconds`, at least five, after two that do
not count. Results go to benchmarks/results/speed.json the moment a cell is done: fastest and median time, and the ratio
of MSA-Unet's time to the contender's in the same round (median, and the range of the middle 80 %). Peak memory is that
of one more run in a process of its own: what it needs on top of the imported libraries, weights included.

Engines: eager; "fused" has batch norms folded, by `MSAUnet.fuse` or, for the others, by the same folding; compiled is
torch.compile. Precisions other than float32 run under autocast. `benchmarks/report.py` makes tables and plots of it.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accuracy import RESULTS, VARIANTS, gmac
from literal import LiteralMSAUnet
from torch import Tensor, nn

from msa_unet import MSAUnet
from msa_unet.fusion import fold_batch_norms

OUTPUT = RESULTS.parent / "speed.json"
ENCODERS = ("published", "tf_efficientnet_lite0", "resnet34", "convnext_tiny", "swin_tiny_patch4_window7_224")
PEERS = {
    "unet": "Unet",
    "unetplusplus": "UnetPlusPlus",
    "manet": "MAnet",
    "fpn": "FPN",
    "deeplabv3plus": "DeepLabV3Plus",
    "segformer": "Segformer",
}
CELL = ("encoder", "size", "batch", "mode", "engine", "dtype", "device")
LARGEST = 2 * 1024**2  # pixels of a batch
LITERAL = ("literal", "literal-nchw")  # in our layout, and in the one that it was published in
LITERAL_LARGEST = 512  # its side: the literal form needs over 20 GB beyond


def contenders(encoder: str, size: int) -> dict[str, Callable[[], nn.Module]]:
    """What is compared at one encoder, ours first."""
    if encoder == "published":
        return {"msa": MSAUnet} | (dict.fromkeys(LITERAL, LiteralMSAUnet) if size <= LITERAL_LARGEST else {})
    if encoder == "ablations":
        names = ["msa", "unet", *(name for name in VARIANTS if name.startswith(("base", "scratch")))]
        return {name: lambda name=name: VARIANTS[name](3, 1, None) for name in names}
    return {
        "msa": lambda: MSAUnet(encoder),
        **{name: lambda kind=kind: peer(kind, encoder, size) for name, kind in PEERS.items()},
        "encoder": lambda: timm.create_model(encoder, features_only=True, **sized(encoder, size)),
    }


def peer(kind: str, encoder: str, size: int) -> nn.Module:
    """A network of segmentation_models.pytorch on timm's encoder."""
    import segmentation_models_pytorch as smp

    return getattr(smp, kind)(f"tu-{encoder}", encoder_weights=None, **sized(encoder, size))


def sized(encoder: str, size: int) -> dict[str, int]:
    """What fixed-size encoders must be told."""
    cfg = timm.models.get_pretrained_cfg(encoder)
    return {"img_size": size} if cfg is not None and cfg.fixed_input_size else {}


def prepared(name: str, model: nn.Module, cell: dict[str, Any]) -> Callable[[], None]:
    """One step of a contender in a cell: a forward pass, or a whole train step."""
    device = torch.device(cell["device"])
    layout = torch.contiguous_format if name.endswith("-nchw") else torch.channels_last
    model = model.to(device, memory_format=layout).train(cell["mode"] == "train")
    if cell["engine"] == "fused":
        if isinstance(model, MSAUnet):
            model = model.fuse()
        else:
            fold_batch_norms(model, (1, 3, cell["size"], cell["size"]))
    x = torch.randn(cell["batch"], 3, cell["size"], cell["size"], device=device)
    x = x.contiguous(memory_format=layout)
    half = cell["dtype"] != "float32"
    autocast = torch.autocast(device.type, getattr(torch, cell["dtype"]), enabled=half)
    run = torch.compile(model) if cell["engine"] == "compiled" else model

    def logits() -> Tensor:
        with autocast:
            out = run(x)
        return out if isinstance(out, Tensor) else out[-1]

    if cell["mode"] == "inference":

        def step() -> None:
            with torch.inference_mode():
                logits()

        return step
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def train_step() -> None:
        loss = logits().float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return train_step


def timed(step: Callable[[], None], device: str) -> float:
    """Milliseconds."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    begin = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - begin)


def measure(cell: dict[str, Any], seconds: float, memory: bool, only: Sequence[str]) -> list[dict[str, Any]]:
    """A row per contender of the cell; contenders that cannot be built for it, or do not run, are said and left out."""
    wanted = {n: build for n, build in contenders(cell["encoder"], cell["size"]).items() if not only or n in only}
    attempts = {name: attempt(name, build, cell) for name, build in wanted.items()}
    ready = {name: found for name, found in attempts.items() if found is not None}
    steps = {name: step for name, (_, step) in ready.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    start = time.perf_counter()
    while len(times["msa"]) < 5 or time.perf_counter() - start < seconds:
        for name, step in steps.items():
            times[name].append(timed(step, cell["device"]))
    rows = []
    for name, ((parameters, macs), _) in ready.items():
        ratios = sorted(ours / theirs for ours, theirs in zip(times["msa"], times[name], strict=True))
        tenth = len(ratios) // 10
        row = cell | {
            "contender": name,
            "rounds": len(ratios),
            "fastest_ms": round(min(times[name]), 2),
            "median_ms": round(statistics.median(times[name]), 2),
            "ratio": round(statistics.median(ratios), 3),  # msa's time / the contender's
            "ratio_range": [round(ratios[tenth], 3), round(ratios[-1 - tenth], 3)],
            "parameters": parameters,
            "gmac": round(macs, 3),
        }
        if memory:
            row["peak_mb"] = peak_in_own_process(cell | {"contender": name})
        rows.append(row)
    return rows


def attempt(
    name: str, build: Callable[[], nn.Module], cell: dict[str, Any]
) -> tuple[tuple[int, float], Callable[[], None]] | None:
    """Parameters and GMAC of a contender, and its step, run once; None if it cannot."""
    try:
        model = build()
        cost = sum(p.numel() for p in model.parameters()), gmac(model, cell["size"])
        step = prepared(name, model, cell)
        step()
    except Exception as error:  # whatever a network raises for what it does not support
        print(f"  {name} does not run: {str(error)[:200]}", flush=True)
        return None
    return cost, step


def peak_in_own_process(what: dict[str, Any]) -> float | None:
    """Megabytes, None if the process did not survive."""
    command = [sys.executable, __file__, "--peak", json.dumps(what), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def peak(what: dict[str, Any]) -> float:
    """Megabytes that building a contender and two of its steps need, in this process."""
    if what["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = resident("VmRSS")
    name = what["contender"]
    step = prepared(name, contenders(what["encoder"], what["size"])[name](), what)
    step()
    step()
    if what["device"] == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Megabytes, from the kernel's own account of this process (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def record(rows: list[dict[str, Any]], output: Path) -> None:
    """Add rows to the results, in place of older ones of the same cells; whole or not at all."""

    def cell(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[c] for c in CELL)

    cells, old = {cell(row) for row in rows}, read(output)
    place = next((i for i, row in enumerate(old) if cell(row) in cells), len(old))
    kept = [row for row in old if cell(row) not in cells]
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".part")
    lines = ",\n".join(json.dumps(row) for row in [*kept[:place], *rows, *kept[place:]])
    partial.write_text(f"[\n{lines}\n]\n")
    partial.replace(output)


def read(output: Path) -> list[dict[str, Any]]:
    return json.loads(output.read_text()) if output.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=ENCODERS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 256, 1024])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 8], help="train steps need at least 2")
    parser.add_argument("--modes", nargs="+", default=["inference", "train"], choices=["inference", "train"])
    parser.add_argument("--engines", nargs="+", default=["eager", "fused", "compiled"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--contenders", nargs="+", default=(), help="msa and which others; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=15, help="of rounds per cell")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(json.loads(args.peak)))
        return
    done = {tuple(row[c] for c in CELL) for row in read(args.output)}
    product = itertools.product(
        args.encoders, args.sizes, args.batches, args.modes, args.engines, args.dtypes, [args.device]
    )
    machine = {"threads": args.threads, "torch": torch.__version__, "timm": timm.__version__, "cpu": platform.machine()}
    for values in product:
        cell = dict(zip(CELL, values, strict=True))
        pixels = cell["batch"] * cell["size"] ** 2
        training = cell["mode"] == "train"
        # nobody trains what is folded, and batch norms of some peers need two images
        impossible = training and (cell["engine"] == "fused" or cell["batch"] == 1)
        if values in done or impossible or pixels > LARGEST:
            continue
        print(" ".join(map(str, values)), flush=True)
        torch.manual_seed(0)
        rows = [row | machine for row in measure(cell, args.seconds, not args.no_memory, args.contenders)]
        record(rows, args.output)
        for row in rows:
            print(f"  {row['contender']:14} {row['fastest_ms']:9.1f} ms {row['ratio']:6.3f} {row['ratio_range']}")
        torch.compiler.reset()


if __name__ == "__main__":
    main()
