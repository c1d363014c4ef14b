"""Build and run every encoder of the installed timm, at its native size, at 250x190 and at 33x47.

    python benchmarks/census.py                     # everything, about 40 minutes; resumes where it stopped
    python benchmarks/census.py "vit_*" --workers 1

A row per architecture goes to benchmarks/results/census.csv the moment it is known. Each runs forward at the three
sizes and backward into its backbone. Meta tensors carry no data but run the same shape checks, so they tell whether a
network builds, accepts a size, keeps it and is differentiable; an architecture that needs values (meta tensors fail)
runs for real. `gmac_512` is what torch's FlopCounterMode counts of the whole network for an image of 512x512, in
billions of multiply-accumulates. The smallest architecture of every timm module also takes a real training step (column
`train_step`).
"""

import argparse
import copy
import csv
import fnmatch
import multiprocessing
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models._registry import _model_to_module
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from msa_unet import MSAUnet

RESULTS = Path(__file__).parent / "results" / "census.csv"
SIZES = ("native", (250, 190), (33, 47))
COLUMNS = [
    "encoder", "module", "timm", "parameters", "reductions", "levels", "unit", "native", "ok_native", "ok_250x190",
    "ok_33x47", "backward", "mode", "gmac_512", "train_step", "seconds",
]  # fmt: skip


def examine(name: str) -> dict[str, object]:
    """One row of the census: "ok", or the reason of the failure, per check."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.perf_counter()
    height, width = getattr(get_pretrained_cfg(name), "input_size", (3, 224, 224))[1:]
    row: dict[str, object] = dict.fromkeys(COLUMNS, "")
    row |= {"encoder": name, "module": _model_to_module[name], "timm": timm.__version__, "native": f"{height}x{width}"}
    sizes = {"ok_native": (height, width), "ok_250x190": (250, 190), "ok_33x47": (33, 47)}
    for mode in ("meta", "cpu"):
        row["mode"] = mode
        try:
            with torch.device(mode):
                model = MSAUnet(name, num_classes=2).eval()
        except Exception as error:
            row |= dict.fromkeys([*sizes, "backward"], f"build: {reason(error)}")
            continue
        plan = model.encoder.plan
        row |= {
            "parameters": sum(p.numel() for p in model.parameters()),
            "reductions": " ".join(map(str, model.backbone.feature_info.reduction())),
            "levels": " ".join(map(str, plan.levels)),
            "unit": "x".join(map(str, plan.unit)) + (" split" if plan.split else "") if plan.unit else "",
        }
        for column, size in sizes.items():
            row[column] = _check(model, mode, size, backward=False)
        row["gmac_512"] = _gmac(model, mode, 512)
        row["backward"] = _check(model.train(), mode, (96, 64), backward=True)
        if all(row[column] == "ok" for column in [*sizes, "backward"]):
            break
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def _check(model: MSAUnet, device: str, size: tuple[int, int], backward: bool) -> str:
    image = torch.rand(2 if backward else 1, 3, *size, device=device)
    try:
        with torch.set_grad_enabled(backward):
            logits = model(image)
        if logits.shape != (len(image), 2, *size):
            return f"logits are {tuple(logits.shape)}"
        if backward:
            logits.sum().backward()
            if not any(p.grad is not None for p in model.backbone.parameters()):
                return "no gradient reaches the backbone"
        elif device == "cpu" and not logits.isfinite().all():
            return "logits are not finite"
    except Exception as error:
        return reason(error)
    return "ok"


def _gmac(model: MSAUnet, device: str, size: int) -> object:
    model = copy.deepcopy(model).requires_grad_(False)  # the counter's hooks mistake parameters that need a gradient
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, size, size, device=device))
    except Exception:  # its checks say what is wrong
        return ""
    return round(counter.get_total_flops() / 2e9, 2)


def train_step(name: str) -> str:
    """One real optimiser step; "ok" if the loss and all gradients are finite and a backbone weight moved."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        model = MSAUnet(name).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        before = [p.detach().clone() for p in model.backbone.parameters()]
        loss = model(torch.rand(2, 3, 70, 90)).square().mean()
        loss.backward()
        optimizer.step()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not loss.isfinite() or not all(g.isfinite().all() for g in gradients):
            return "not finite"
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.backbone.parameters(), strict=True))
        return "ok" if moved else "no backbone weight moved"
    except Exception as error:
        return reason(error)


def reason(error: Exception, length: int = 200) -> str:
    """The kind and text of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:length]


def _read() -> dict[str, dict[str, str]]:
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="") as file:
        rows = {row["encoder"]: row for row in csv.DictReader(file)}
    # what an older timm or an older census found is found anew
    return {name: row for name, row in rows.items() if row["timm"] == timm.__version__ and list(row) == COLUMNS}


def write(rows: Mapping[str, Mapping[str, object]], path: Path, columns: Sequence[str]) -> None:
    """Rows by encoder, in its order, as a CSV file; whole or not at all."""
    partial = path.with_suffix(".part")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--redo-failures", action="store_true", help="examine again what is not ok in the results")
    args = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    rows = _read()
    if args.redo_failures:
        rows = {name: row for name, row in rows.items() if failures(row) == []}
    names = [name for name in fnmatch.filter(timm.list_models(), args.pattern) if name not in rows]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn) as pool:
        for future in tqdm(
            as_completed([pool.submit(examine, n) for n in names]), total=len(names), desc="architectures"
        ):
            row = future.result()
            rows[row["encoder"]] = row
            write(rows, RESULTS, COLUMNS)
        smallest: dict[str, str] = {}
        for name in sorted(rows, key=lambda n: (int(rows[n]["parameters"] or 10**12), n), reverse=True):
            smallest[rows[name]["module"]] = name
        for name in rows.keys() - set(smallest.values()):
            rows[name]["train_step"] = ""
        todo = {pool.submit(train_step, n): n for n in smallest.values() if not rows[n]["train_step"]}
        for future in tqdm(as_completed(todo), total=len(todo), desc="real training steps"):
            rows[todo[future]]["train_step"] = future.result()
            write(rows, RESULTS, COLUMNS)
    print(summary(rows))


def failures(row: dict[str, str]) -> list[str]:
    """The checks of a row that did not pass."""
    return [c for c in ("ok_native", "ok_250x190", "ok_33x47", "backward") if row[c] != "ok"]


def summary(rows: dict[str, dict[str, str]]) -> str:
    counts = {
        c: sum(row[c] == "ok" for row in rows.values()) for c in ("ok_native", "ok_250x190", "ok_33x47", "backward")
    }
    steps = [row["train_step"] for row in rows.values() if row["train_step"]]
    lines = [f"{len(rows)} architectures of timm {timm.__version__}"]
    lines += [f"  {column:<12}{count}" for column, count in counts.items()]
    lines += [f"  {'train_step':<12}{steps.count('ok')} of {len(steps)} timm modules"]
    lines += [
        f"  {n}: {', '.join(f'{c}: {row[c]}' for c in failures(row))}" for n, row in rows.items() if failures(row)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
