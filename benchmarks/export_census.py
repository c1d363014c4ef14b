"""Export the smallest architecture of every timm module, by torch.export and to ONNX, and compare with eager mode.

    python benchmarks/export_census.py                     # about an hour; resumes where it stopped
    python benchmarks/export_census.py --modules hiera nest --per-module 2 --limit 600

A row per architecture goes to benchmarks/results/export.csv the moment it is known: "ok" or the reason of the failure,
and the largest difference of the logits at three small sizes, as a share of the largest logit (random weights make some
networks amplify rounding). Which is the smallest is read from census.csv. Each has a process of its own and a limit of
CPU time, since tracing an unsuitable network may never end.
"""

import argparse
import csv
import fnmatch
import json
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from census import reason, write
from tqdm import tqdm

from msa_unet import MSAUnet
from msa_unet.export import UNTRACEABLE, export, least_side, trace

RESULTS = Path(__file__).parent / "results" / "export.csv"
CENSUS = RESULTS.with_name("census.csv")
COLUMNS = [
    "encoder",
    "module",
    "timm",
    "torch",
    "traced",
    "least_side",
    "difference",
    "onnx",
    "onnx_difference",
    "seconds",
]
SIZES = ((2, 40, 70), (1, 97, 64), (1, 130, 150))  # batch, height, width
TOLERANCE = 1e-3  # of the largest logit


def smallest(per_module: int) -> dict[str, str]:
    """Architecture -> timm module, the smallest `per_module` of each, smallest first."""
    with CENSUS.open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["parameters"] or 10**12))
    first: dict[str, str] = {}
    for row in rows:
        if list(first.values()).count(row["module"]) < per_module:
            first[row["encoder"]] = row["module"]
    return first


def examine(name: str, limit: int) -> None:
    """Print what is found out, one JSON object per step, so that what was known survives the limit."""
    import onnxruntime

    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MSAUnet(name).eval()
    UNTRACEABLE.clear()  # what is refused is tried, too
    try:
        graph = trace(model)
        least = least_side(graph)
        report(traced="ok", least_side=least, difference=difference(graph.module(), model, least))
    except Exception as error:
        report(traced=reason(error, 400))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        try:
            export(model, path)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(path, options)

            def run(x: torch.Tensor) -> torch.Tensor:
                return torch.from_numpy(session.run(None, {"image": x.numpy()})[0])

            report(onnx="ok", onnx_difference=difference(run, model, least))
        except Exception as error:
            report(onnx=reason(error, 400))


def difference(run: Callable[[torch.Tensor], torch.Tensor], model: MSAUnet, least: int) -> float:
    worst = 0.0
    with torch.no_grad():
        for n, *size in SIZES:
            x = torch.randn(n, 3, *(side if side >= least else side + least for side in size))
            wanted = model(x)
            worst = max(worst, ((run(x) - wanted).abs().max() / wanted.abs().max()).item())
    return float(f"{worst:.1e}")


def report(**columns: object) -> None:
    print(json.dumps(columns), flush=True)


def row_of(name: str, module: str, limit: int) -> dict[str, object]:
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--one", name, "--limit", str(limit)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    row: dict[str, object] = dict.fromkeys(COLUMNS, "")
    row |= {"encoder": name, "module": module, "timm": timm.__version__, "torch": torch.__version__}
    row["seconds"] = round(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)  # of CPU
    for line in result.stdout.splitlines():
        if line.startswith("{"):
            row |= json.loads(line)
    if result.returncode:
        last = result.stderr.strip().rpartition("\n")[2][:300]
        row["onnx" if row["traced"] else "traced"] = f"more than {limit} s" if result.returncode < 0 else last
    return row


def failed(row: dict[str, object]) -> bool:
    differences = [float(row[c] or 0) for c in ("difference", "onnx_difference")]
    return row["traced"] != "ok" or row["onnx"] != "ok" or not max(differences) <= TOLERANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=["*"], help="of timm.models, as patterns")
    parser.add_argument("--per-module", type=int, default=1, help="how many architectures, smallest first")
    parser.add_argument("--limit", type=int, default=300, help="seconds of CPU time per architecture")
    parser.add_argument("--redo-failures", action="store_true", help="try again what is not ok in the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        examine(args.one, args.limit)
        return
    rows: dict[str, dict[str, object]] = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            rows = {row["encoder"]: row for row in csv.DictReader(file) if row["torch"] == torch.__version__}
    if args.redo_failures:
        rows = {name: row for name, row in rows.items() if not failed(row)}
    chosen = {n: m for n, m in smallest(args.per_module).items() if any(fnmatch.fnmatch(m, p) for p in args.modules)}
    todo = {name: module for name, module in chosen.items() if name not in rows}
    for name, module in tqdm(todo.items(), desc="architectures"):
        rows[name] = row_of(name, module, args.limit)
        write(rows, RESULTS, COLUMNS)
    bad = {name: row for name, row in rows.items() if failed(row)}
    print(f"{len(rows) - len(bad)} of {len(rows)} are exported and agree; timm {timm.__version__}")
    for name, row in bad.items():
        print(f"  {name}: {row['traced']} {row['difference']}; onnx: {row['onnx']} {row['onnx_difference']}")


if __name__ == "__main__":
    main()
