"""benchmarks/report.py: statistics against known results, and documents that agree with the numbers they show."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("skimage")

import accuracy
import report


def test_the_documents_agree_with_the_results():
    for path in report.documents():
        if path.exists():
            assert report.rebuild(path.read_text()) == path.read_text(), (
                f"run benchmarks/report.py: {path.name} is stale"
            )


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, never falling
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([0.5, 0.9]) == [1.0, 1.0]
    assert report.holm([]) == []


def test_bootstrap_of_images_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(0.8, 0.1, 60)
    low, high = np.percentile(report.bootstrap(values[:, None]), (2.5, 97.5))
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx(tuple(expected), abs=2e-3)


def test_bootstrap_of_seeds_widens_the_interval():
    # two seeds that differ by 0.2 on every image: half of the draws take both, a quarter each of the others
    draws = report.bootstrap(np.tile([0.7, 0.9], (50, 1)))
    values, counts = np.unique(draws.round(6), return_counts=True)
    assert values == pytest.approx([0.7, 0.8, 0.9])
    assert counts / len(draws) == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_p_values():
    rng = np.random.default_rng(0)
    clear, none = rng.normal(0.05, 0.02, (100, 1)), rng.normal(0, 0.02, (100, 1))
    none -= none.mean()
    assert report.p_value(clear) == pytest.approx(2 / (report.RESAMPLES + 1))
    assert report.p_value(none) > 0.9
    assert report.p_value(np.zeros((9, 1))) == 1
    assert report.p_value(np.array([[0.1], [0.2]])) == 0.5  # two images prove nothing


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two variants on two seeds: unet is worse, manet the same but for noise; tiles b_r0c0, b_r0c1 are one image."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "results" / "accuracy"
    images = [*(f"i{n}" for n in range(30)), "b_r0c0", "b_r0c1"]
    base = dict(zip(images, rng.uniform(0.7, 0.9, len(images)), strict=True))
    for variant, offset in {"msa": 0, "unet": -0.05, "manet": 0.001}.items():
        for seed in (0, 1):
            key = {"split": "test", "size": 64, "epochs": 2, "batch": 8, "variant": variant, "seed": seed}
            scores = [
                {"image": i, "class": "x", "dice": round(base[i] + offset + rng.normal(0, 0.01), 5)} for i in images
            ]
            rows = [key | s | {"iou": 0.5, "nsd": 0.25, "cldice": ""} for s in scores]
            accuracy.record(folder / "squares.csv", rows)
            run = {"data_set": "squares"} | key | {"parameters": 1_234_567, "gmac": 0.5, "steps": 20}
            accuracy.record(folder / "runs.csv", [run])
    cell = {"encoder": report.ENCODER, "size": report.SPEED_SIZE, "engine": "eager", "dtype": "float32"}
    cell |= {"device": "cpu", "contender": "unet", "parameters": 1_234_567, "gmac": 5.5, "peak_mb": 321.4}
    cell |= {"ratio": 0.6, "ratio_range": [0.55, 0.7]}
    speed = [
        cell | {"mode": "train", "batch": 2, "fastest_ms": 812.3},
        cell | {"mode": "inference", "batch": 1, "fastest_ms": 151.7},
    ]
    speed += [row | {"contender": "msa", "ratio": 1.0, "ratio_range": [1.0, 1.0]} for row in speed]
    (folder.parent / "speed.json").write_text(json.dumps(speed))
    return folder


def test_tables(results: Path):
    text = report.rebuild("a\n<!-- accuracy:begin -->\nold\n<!-- accuracy:end -->\nb\n", results)
    assert text.startswith(
        "a\n<!-- accuracy:begin -->\n\nsquares, test split: 31 images, 64x64, 2 epochs (20 steps of 8)\n\n"
    )
    assert text.endswith("\n\n<!-- accuracy:end -->\nb\n")
    assert report.rebuild(text, results) == text
    head, _, msa, manet, unet = (line.split(" | ") for line in text.splitlines() if line.startswith("|"))
    assert "clDice" not in head
    assert head[-4:] == ["M parameters", "GMAC", "train step at 512x512, Unet = 1", "inference at 512x512, Unet = 1 |"]
    assert msa[:2] == ["| msa", "2"]
    assert msa[3:5] == ["50.0 (50.0 to 50.0)", "25.0 (25.0 to 25.0)"]
    assert manet[6].startswith("not separable")
    assert unet[5].startswith("+")
    assert unet[6] == "msa better, p = 0.0004"  # 2 / 10001, times the two comparisons
    assert unet[-4:] == ["1.23", "0.50", "1.00", "1.00 |"]
    assert msa[-2:] == ["0.60", "0.60 |"]


def test_summary(results: Path):
    text = report.rebuild("<!-- accuracy:begin summary -->\n<!-- accuracy:end -->", results)
    head, _, row = (line.split(" | ") for line in text.splitlines() if line.startswith("|"))
    assert head == ["| data set", "images", "seeds", "msa", "manet", "unet |"]
    assert row[:3] == ["| squares", "31", "2"]
    assert row[4].endswith("not separable")
    assert re.match(r"[\d.]+; \+[\d.]+ \(\+[\d.]+ to \+[\d.]+\), msa better \|", row[5])
    assert report.rebuild(text, results) == text
    text = report.rebuild("<!-- accuracy:begin summary unet msa -->\n<!-- accuracy:end -->", results)
    assert "| data set | images | seeds | unet | msa |" in text
    assert "unet worse" in text


def test_speed_table(results: Path):
    text = report.rebuild(f"<!-- speed:begin {report.ENCODER} -->\n<!-- speed:end -->", results)
    assert "| unet | 1.23 | 5.50 | 321 | 812 ms (0.60, 0.55 to 0.70) | 152 ms (0.60, 0.55 to 0.70) |" in text
    assert "| msa | 1.23 | 5.50 | 321 | 812 ms | 152 ms |" in text
    assert report.rebuild(text, results) == text


def test_rows_of_a_results_file(results: Path):
    (results.parent / "thing.json").write_text('{"torch": "x", "rows": [{"size": 1, "range": [0.5, 2]}]}')
    text = report.rebuild("<!-- rows:begin thing -->\n<!-- rows:end -->", results)
    assert "| size | range |\n| --- | --- |\n| 1 | 0.5 to 2 |\n" in text
    assert report.rebuild(text, results) == text
    assert "No results yet." in report.rebuild("<!-- rows:begin other -->\n<!-- rows:end -->", results)


def test_table_of_all_cells(results: Path):
    text = report.rebuild(f"<!-- speed:begin {report.ENCODER} all -->\n<!-- speed:end -->", results)
    assert "| mode | size | batch | dtype | engine | msa | unet |" in text
    assert "| inference | 512 | 1 | float32 | eager | 152 ms | 0.60 (0.55 to 0.70) |" in text
    assert "| train | 512 | 2 | float32 | eager | 812 ms | 0.60 (0.55 to 0.70) |" in text
    assert report.rebuild(text, results) == text


def test_a_block_names_its_split_reference_and_variants(results: Path):
    assert report.rebuild("<!-- accuracy:begin val -->\n<!-- accuracy:end -->", results).count("No results yet.") == 1
    text = report.rebuild("<!-- accuracy:begin test unet msa -->\n<!-- accuracy:end -->", results)
    assert "manet" not in text
    assert "unet worse, p = 0.0002" in text
    text = report.rebuild("<!-- accuracy:begin test unet ... -->\n<!-- accuracy:end -->", results)
    assert "| manet |" in text
    assert "Dice of unet minus its" in text


def test_plots_are_the_same_file_each_time(results: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        report.plot(results, "test", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "manet" in (tmp_path / "a.svg").read_text()
    report.plot_speed(results.parent, tmp_path / "speed.svg")
    assert "unet" in (tmp_path / "speed.svg").read_text()
