"""The README keeps its word: its Python runs, its files exist, its numbers are those of the results files."""

import csv
import json
import re

import numpy as np
import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
NAME = "tf_efficientnet_lite0.dsb2018"


def test_the_python_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "my-model" / "model.safetensors").exists()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_checkpoints_number_is_its_scores():
    with (ROOT / "weights" / NAME / "scores.csv").open() as file:
        dice = [float(row["dice"]) for row in csv.DictReader(file)]
    mean, low, high = json.loads((ROOT / "weights" / NAME / "card.json").read_text())["metrics"]["test_dice"]
    assert mean == pytest.approx(np.mean(dice), abs=1e-4)
    assert f"| {np.mean(dice):.3f} ({low:.3f} to {high:.3f}) |" in README


def test_the_census_line_is_the_census():
    with (ROOT / "benchmarks" / "results" / "census.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = ("ok_native", "ok_250x190", "ok_33x47", "backward")
    good = [sum(row[column] == "ok" for row in rows) for column in columns]
    line = f"of {len(rows)} architectures of timm {rows[0]['timm']}, {min(good[:3])} run at"
    assert line in " ".join(README.split())
