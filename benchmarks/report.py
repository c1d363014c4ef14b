"""Tables and plots of the accuracy runs.

    python benchmarks/report.py

rewrites the marked blocks of README.md and docs/*.md, accuracy-{val,test}.svg and speed.svg in docs/images/. A block
stands between `<!-- accuracy:begin SPLIT VARIANT ... -->` and `<!-- accuracy:end -->`: SPLIT is test if left out, the
first VARIANT is the reference that the others are compared with; without any, or with "..." for the others, all that
have results are shown, against msa or that reference.

`<!-- accuracy:begin summary VARIANT ... -->` holds one table of the test split's Dice, with the lead of the first
variant, msa if none is named, over each other one.

An image's score is the mean over its classes; the tiles of one photograph count as one image. Intervals are 95 %
percentile bootstraps: of a mean over images and seeds, of a difference over images, paired, with seeds averaged. Holm's
method adjusts the p values over the variants compared on one data set; 0.05 or above is "not separable".

A block `<!-- speed:begin ENCODER -->` to `<!-- speed:end -->` holds times and memory at that encoder, float32, one
image of 512x512 (two in a train step), from benchmarks/results/speed.json: the fastest of all rounds, and behind it
MSA-Unet's time as a share of that network's, median of the pairs of one round and the range of their middle 80 %. With
"all" behind ENCODER it holds every cell that was measured, a row each.

A block `<!-- rows:begin NAME -->` to `<!-- rows:end -->` holds the rows of benchmarks/results/NAME.json.

Plots need matplotlib.
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import ENCODER, RESULTS, ROOT, TOLERANCE, read

RESAMPLES = 10_000
SPEED_SIZE = 512
BLOCK = re.compile(r"(<!-- (accuracy|speed|rows):begin(.*?)-->\n).*?(<!-- \2:end -->)", re.DOTALL)
METRICS = {"dice": "Dice", "iou": "IoU", "nsd": f"NSD at {TOLERANCE:g} px", "cldice": "clDice"}

Setting = tuple[str, int, int, int]  # data set, size, epochs, batch
Scores = dict[
    str, dict[str, np.ndarray]
]  # per variant and metric (images, seeds), images in one order for all variants


def collect(results: Path, split: str, variants: Sequence[str] = ()) -> dict[Setting, Scores]:
    """Scores per setting, of `variants` or of all that have some."""
    rows: dict[Setting, list[dict[str, str]]] = defaultdict(list)
    for path in sorted(results.glob("*.csv")):
        for row in read(path) if path.stem != "runs" else []:
            if row["split"] == split and (not variants or row["variant"] in variants):
                rows[setting_of(path.stem, row)].append(row)
    return {setting: _matrices(rows[setting]) for setting in sorted(rows)}


def _matrices(rows: list[dict[str, str]]) -> Scores:
    values = defaultdict(list)
    for row in rows:
        image = re.sub(r"_r\dc\d$", "", row["image"])
        for metric in METRICS:
            if row[metric]:
                values[row["variant"], metric, int(row["seed"]), image].append(float(row[metric]))
    columns = sorted({(variant, metric, seed) for variant, metric, seed, _ in values})
    # an image on which a run had nothing to score, and rightly predicted nothing, is left out for all
    images = [i for i in sorted({image for *_, image in values}) if all((*c, i) in values for c in columns)]
    scores: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for variant, metric, seed in columns:
        scores[variant][metric].append([float(np.mean(values[variant, metric, seed, i])) for i in images])
    return {variant: {m: np.array(columns).T for m, columns in of.items()} for variant, of in scores.items()}


@functools.cache
def _weights(count: int, seed: int) -> np.ndarray:
    """How often each of `count` things is drawn, as shares, (RESAMPLES, count)."""
    return np.random.default_rng([seed, count]).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def bootstrap(scores: np.ndarray) -> np.ndarray:
    """Means of (images, seeds) when images and seeds are drawn with replacement, (RESAMPLES,)."""
    images, seeds = (_weights(count, axis) for axis, count in enumerate(scores.shape))
    return ((images @ scores) * seeds).sum(1)


def p_value(differences: np.ndarray) -> float:
    """Two-sided, of (images, 1): twice the share of bootstrap means on the rarer side of 0.

    Never below 2 / 2**images, the least that a sign-flip test can give: of two images that happen to agree, every
    bootstrap draw has their sign, and that proves nothing.
    """
    draws = bootstrap(differences)
    rarer = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, max(2 * (1 + rarer) / (1 + len(draws)), 2.0 ** (1 - len(differences)))))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p)[order]))
    return adjusted.tolist()


def verdict(reference: str, difference: float, p: float) -> str:
    if p >= 0.05:
        return f"not separable, p = {p:.2f}"
    return f"{reference} {'better' if difference > 0 else 'worse'}, p = {p:.4f}"


def compare(scores: Scores, reference: str) -> dict[str, tuple[str, str]]:
    """The reference's Dice minus that of every other variant, and what may be said of it."""
    seed_means = {variant: of["dice"].mean(1, keepdims=True) for variant, of in scores.items()}
    differences = {v: seed_means[reference] - mean for v, mean in seed_means.items() if v != reference}
    adjusted = holm([p_value(d) for d in differences.values()])
    return {
        v: (percent(d, "+"), verdict(reference, d.mean(), p))
        for (v, d), p in zip(differences.items(), adjusted, strict=True)
    }


def tables(results: Path, split: str = "test", variants: Sequence[str] = ()) -> str:
    """Markdown, one table per setting."""
    reference = variants[0] if variants else "msa"
    variants = () if "..." in variants else variants
    settings = collect(results, split, variants)
    runs, times = read_runs(results, split), read_times(results.parent)
    parts = []
    for setting, scores in settings.items():
        order = sorted(scores, key=lambda v: (v != reference, variants.index(v) if variants else v))
        metrics = [m for m in METRICS if m in scores[order[0]]]
        compared = compare(scores, reference) if reference in scores else {}
        lines = [
            ["variant", "seeds", *(METRICS[m] for m in metrics), f"Dice of {reference} minus its", "verdict"]
            + ["M parameters", "GMAC"]
            + [f"{what} at {SPEED_SIZE}x{SPEED_SIZE}, Unet = 1" for what in ("train step", "inference")]
        ]
        lines.append(["---"] * len(lines[0]))
        for variant in order:
            of, run = scores[variant], runs[setting, variant]
            cost = [f"{int(run['parameters']) / 1e6:.2f}", f"{float(run['gmac']):.2f}"]
            seeds, means = str(of["dice"].shape[1]), [percent(of[m]) for m in metrics]
            lines.append([variant, seeds, *means, *compared.get(variant, ("", "")), *cost, *times[variant]])
        data_set, size, epochs, batch = setting
        images, steps = len(scores[order[0]]["dice"]), runs[setting, order[0]]["steps"]
        parts.append(
            f"{data_set}, {split} split: {images} images, {size}x{size}, {epochs} epochs ({steps} steps of {batch})"
        )
        parts.append(markdown(lines))
    return "\n\n".join(parts or ["No results yet."]) + "\n"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of cells: head, rule, rows."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(results: Path, variants: Sequence[str] = ()) -> str:
    """Markdown, a row per setting of the test split: Dice of each variant, and the first one's lead over it."""
    reference = variants[0] if variants else "msa"
    settings = collect(results, "test", variants)
    others = variants[1:] or sorted({variant for scores in settings.values() for variant in scores} - {reference})
    lines = [["data set", "images", "seeds", reference, *others], ["---"] * (4 + len(others))]
    for (data_set, *_), scores in settings.items():
        if reference not in scores:
            continue
        compared = compare(scores, reference)
        cells = [
            f"{100 * scores[v]['dice'].mean():.1f}; {compared[v][0]}, {compared[v][1].partition(',')[0]}"
            if v in scores
            else ""
            for v in others
        ]
        images, seeds = scores[reference]["dice"].shape
        lines.append([data_set, str(images), str(seeds), percent(scores[reference]["dice"]), *cells])
    return markdown(lines) + "\n"


def percent(scores: np.ndarray, sign: str = "") -> str:
    """Mean and 95 % interval of (images, seeds), in percent."""
    low, high = np.percentile(bootstrap(scores), (2.5, 97.5))
    return f"{100 * scores.mean():{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def read_runs(results: Path, split: str) -> dict[tuple[Setting, str], dict[str, str]]:
    """What a variant costs, from the last of its runs in a setting."""
    rows = [row for row in read(results / "runs.csv") if row["split"] == split]
    return {(setting_of(row["data_set"], row), row["variant"]): row for row in rows}


def setting_of(data_set: str, row: dict[str, str]) -> Setting:
    return data_set, int(row["size"]), int(row["epochs"]), int(row["batch"])


def read_times(folder: Path) -> dict[str, tuple[str, str]]:
    """A train step's and inference's time per variant as a share of Unet's in the same run, blank if not measured."""
    times: dict[str, list[str]] = defaultdict(lambda: ["", ""])
    for encoder, mode in product((ENCODER, "ablations"), ("train", "inference")):
        rows = eager_rows(folder, encoder, mode)
        unet = next((row["ratio"] for row in rows if row["contender"] == "unet"), None)
        for row in rows if unet else []:
            times[row["contender"]][mode == "inference"] = f"{unet / row['ratio']:.2f}"  # ratios are msa's to theirs
    return defaultdict(lambda: ("", ""), {variant: (train, infer) for variant, (train, infer) in times.items()})


def read_speed(folder: Path) -> list[dict[str, Any]]:
    """All that speed.py found."""
    path = folder / "speed.json"
    return json.loads(path.read_text()) if path.exists() else []


def eager_rows(folder: Path, encoder: str, mode: str) -> list[dict[str, Any]]:
    """Those of `speed_rows` in one mode, not folded and not compiled."""
    return [row for row in speed_rows(folder, encoder) if (row["mode"], row["engine"]) == (mode, "eager")]


def speed_rows(folder: Path, encoder: str) -> list[dict[str, Any]]:
    """What speed.py found for one encoder at the size of the tables, float32: one image, or a train step on two."""
    wanted = {"encoder": encoder, "size": SPEED_SIZE, "dtype": "float32", "device": "cpu"}
    rows = [row for row in read_speed(folder) if all(row[key] == value for key, value in wanted.items())]
    return [row for row in rows if row["batch"] == {"inference": 1, "train": 2}[row["mode"]]]


def speed_table(folder: Path, encoder: str) -> str:
    """Markdown: per contender its cost, its time and MSA-Unet's share of that time, per mode and engine."""
    rows = speed_rows(folder, encoder)
    cells = {(row["contender"], row["mode"], row["engine"]): row for row in rows}
    columns = list(dict.fromkeys((row["mode"], row["engine"]) for row in rows))
    lines = [["network", "M parameters", "GMAC", "peak MB", *(f"{mode}, {engine}" for mode, engine in columns)]]
    lines.append(["---"] * len(lines[0]))
    for name in dict.fromkeys(row["contender"] for row in rows):
        first = next(row for row in rows if row["contender"] == name)
        peak = cells.get((name, "inference", "eager"), first).get("peak_mb")
        line = [name, f"{first['parameters'] / 1e6:.2f}", f"{first['gmac']:.2f}", f"{peak:.0f}" if peak else ""]
        for column in columns:
            row = cells.get((name, *column))
            share = (
                ""
                if row is None or name == "msa"
                else " ({:.2f}, {:.2f} to {:.2f})".format(row["ratio"], *row["ratio_range"])
            )
            line.append(f"{row['fastest_ms']:.0f} ms{share}" if row else "")
        lines.append(line)
    if not rows:
        return "No results yet.\n"
    return markdown(lines) + "\n"


def cells_table(folder: Path, encoder: str) -> str:
    """Markdown: a row per cell of speed.json at one encoder, MSA-Unet's time and its share of each other's."""
    rows = [row for row in read_speed(folder) if row["encoder"] == encoder]
    if not rows:
        return "No results yet.\n"
    key = ("mode", "size", "batch", "dtype", "engine")
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        cells[tuple(row[column] for column in key)][row["contender"]] = row
    others = [name for name in dict.fromkeys(row["contender"] for row in rows) if name != "msa"]
    lines = [[*key, "msa", *others], ["---"] * (len(key) + 1 + len(others))]
    for cell in sorted(cells):
        ours = cells[cell]["msa"]
        shares = [
            "{:.2f} ({:.2f} to {:.2f})".format(row["ratio"], *row["ratio_range"])
            if (row := cells[cell].get(name))
            else ""
            for name in others
        ]
        lines.append([*map(str, cell), f"{ours['fastest_ms']:.0f} ms", *shares])
    return markdown(lines) + "\n"


def rows_table(folder: Path, name: str) -> str:
    """Markdown: the rows of a results file, a column per key, ranges as "low to high"."""
    path = folder / f"{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    if not rows:
        return "No results yet.\n"
    cells = [[" to ".join(map(str, v)) if isinstance(v, list) else str(v) for v in row.values()] for row in rows]
    return markdown([list(rows[0]), ["---"] * len(rows[0]), *cells]) + "\n"


def rebuild(text: str, results: Path = RESULTS) -> str:
    """The document with every marked block made anew."""

    def block(match: re.Match[str]) -> str:
        kind, first, *variants = match[2], *(match[3].split() or ["test"])
        if (kind, first) == ("accuracy", "summary"):
            table = summary(results, variants)
        elif kind == "accuracy":
            table = tables(results, first, variants)
        elif kind == "rows":
            table = rows_table(results.parent, first)
        else:
            table = (cells_table if variants == ["all"] else speed_table)(results.parent, first)
        return f"{match[1]}\n{table}\n{match[4]}"

    return BLOCK.sub(block, text)


def documents() -> list[Path]:
    """The files that may have marked blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def plot(results: Path, split: str, path: Path) -> None:
    """Mean Dice with its interval per variant, and the same over GMAC; a row per setting."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "accuracy", "svg.fonttype": "none", "font.size": 8}  # the same file each time
    settings, runs = collect(results, split), read_runs(results, split)
    heights = [1.0 + 0.2 * len(scores) for scores in settings.values()]
    figure, axes = plt.subplots(
        len(settings), 2, figsize=(9, sum(heights) + 0.5), squeeze=False, layout="constrained", height_ratios=heights
    )
    for (setting, scores), (forest, cost) in zip(settings.items(), axes, strict=True):
        for y, (variant, of) in enumerate(sorted(scores.items(), key=lambda item: item[1]["dice"].mean())):
            mean, colour = 100 * of["dice"].mean(), "C3" if variant.startswith("msa") else "C0"
            low, high = 100 * np.percentile(bootstrap(of["dice"]), (2.5, 97.5))
            forest.plot([low, high], [y, y], color=colour)
            forest.plot(mean, y, "o", color=colour)
            cost.plot(float(runs[setting, variant]["gmac"]), mean, "o", color=colour)
            cost.annotate(variant, (float(runs[setting, variant]["gmac"]), mean), (4, 2), textcoords="offset points")
        forest.set_yticks(range(len(scores)), sorted(scores, key=lambda v: scores[v]["dice"].mean()))
        forest.margins(y=0.2)
        cost.margins(0.15)
        forest.set(xlabel="Dice, %", title="{0}, {1}x{1}, {2} epochs, batch {3}".format(*setting))
        cost.set(xlabel="GMAC per image", ylabel="Dice, %")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def plot_speed(folder: Path, path: Path) -> None:
    """Time of one image at 512x512, eager, per network: a panel per encoder."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "speed", "svg.fonttype": "none", "font.size": 8}  # the same file each time
    found = dict.fromkeys(row["encoder"] for row in read_speed(folder))
    panels = {
        encoder: {row["contender"]: row["fastest_ms"] for row in rows}
        for encoder in found
        if encoder != "ablations" and (rows := eager_rows(folder, encoder, "inference"))
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 2.2), squeeze=False, layout="constrained")
    for (encoder, times), axis in zip(panels.items(), axes[0], strict=True):
        names = sorted(times, key=times.__getitem__, reverse=True)
        colours = [{"msa": "C3", "encoder": "0.6"}.get(name, "C0") for name in names]
        axis.barh(names, [times[name] for name in names], color=colours)
        axis.set(xlabel="ms", title=encoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    for path in documents():
        text = path.read_text() if path.exists() else ""
        if rebuild(text) != text:
            path.write_text(rebuild(text))
            print(f"{path.relative_to(ROOT)} rebuilt")
    for split in ("val", "test"):
        if collect(RESULTS, split):
            plot(RESULTS, split, ROOT / "docs" / "images" / f"accuracy-{split}.svg")
    if read_speed(RESULTS.parent):
        plot_speed(RESULTS.parent, ROOT / "docs" / "images" / "speed.svg")


if __name__ == "__main__":
    main()
