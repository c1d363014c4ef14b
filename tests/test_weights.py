"""Every checkpoint that ships gives the scores that it says it has, where the data is present."""

import csv
import runpy
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, SHARED
from PIL import Image

from msa_unet import MSAUnet, predict
from msa_unet.registry import PretrainedCard

CARD = runpy.run_path(str(ROOT / "weights" / "card.py"))
FOLDERS = sorted(path.parent for path in (ROOT / "weights").glob("*/scores.csv"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_five_scores_are_reproduced(folder):
    found = sorted((SHARED / "data").glob(f"{folder.name.rpartition('.')[2]}*"))
    if not found:
        pytest.skip("needs ../shared/data")
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    with (folder / "scores.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            scores[row["image"]][row.get("class", "")] = float(row["dice"])
    model = MSAUnet.from_pretrained(folder)
    images = {path.stem: path for path in (found[0] / "images").iterdir()}
    for stem in list(scores)[:: max(1, len(scores) // 5)][:5]:
        mask = np.asarray(Image.open(found[0] / "masks" / f"{stem}.png"))
        result = predict(model, Image.open(images[stem]))
        for label, name in result.foreground.items():
            predicted, true = result.labels == label, mask == label
            wanted = scores[stem].get(name, scores[stem].get(""))
            if wanted is None:
                assert not (predicted | true).any()
            else:
                dice = 2 * (predicted & true).sum() / (predicted.sum() + true.sum())
                assert dice == pytest.approx(wanted, abs=1e-3)  # a pixel at the threshold may fall either way


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_card_is_what_the_files_say(folder):
    card = PretrainedCard.read(folder / "card.json")
    assert CARD["describe"](folder, card.repo_id.partition("/")[0]) == replace(card, revision="")


def test_the_tables_are_what_the_cards_say():
    for path, text in CARD["rebuild"]().items():
        assert path.read_text() == text, f"run weights/card.py: {path} is stale"
        assert text.count("(") > len(FOLDERS)


def test_intervals_are_over_images():
    assert CARD["interval"]([[0.7], [0.7]]) == (0.7, 0.7)
    assert CARD["interval"]([[0.2, 0.8]]) == (0.5, 0.5)  # both classes of the one image, each time
    low, high = CARD["interval"]([[0.0], [1.0]])
    assert (low, high) == (0, 1)


def test_kinds_of_images_have_rows_of_their_own(tmp_path):
    (tmp_path / "scores.csv").write_text("image,class,dice\na,x,0.25\na,y,0.75\nb,x,0.5\nc,x,1\n")
    table = CARD["kinds"](tmp_path, {"a": "grey", "b": "grey", "c": "colour"})
    assert table.splitlines()[2:] == [
        "| grey | 2 | 0.5000 (0.5000 to 0.5000) |",
        "| colour | 1 | 1.0000 (1.0000 to 1.0000) |",
    ]
