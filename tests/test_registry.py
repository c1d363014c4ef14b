"""Cards say what the files are; names are found in the documented order; what is printed is text and nothing else."""

import argparse
import json
import re
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from msa_unet import CheckpointError, ConfigError, MSAUnet, list_pretrained, registry
from msa_unet.hub import find, model_card, read_config
from msa_unet.registry import CARD, CONFIG, WEIGHTS, PretrainedCard, cards, get_card

TINY = {"decoder_channels": (4, 8, 12, 16)}
SHIPPED = sorted((Path(__file__).parents[1] / "weights").glob(f"*/{CARD}"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of one checkpoint, msa.cells, and nothing else."""
    root = tmp_path / "root"
    model = MSAUnet(**TINY)
    model.config = replace(model.config, licence="MIT", dataset="cells", metrics={"dice": 0.9}, input_size=(64, 64))
    model.save_pretrained(root / "msa.cells")
    PretrainedCard.describe(root / "msa.cells", "lab/msa.cells", intervals={"dice": (0.85, 0.94)}).write(
        root / "msa.cells"
    )
    monkeypatch.setattr(registry, "roots", lambda: [root])
    return root


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.parent.name)
def test_shipped_cards_agree_with_their_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSA_UNET_WEIGHTS", str(path.parents[1]))  # an installed package has the cards of all only
    card, folder = PretrainedCard.read(path), path.parent
    described = PretrainedCard.describe(
        folder, card.repo_id, card.revision, {k: (low, high) for k, (_, low, high) in card.metrics.items()}
    )
    assert card == described
    encoder = card.encoder.partition(".")[0]
    assert card.name.startswith((f"{encoder}.", f"{encoder}_small."))
    assert all(low <= value <= high for value, low, high in card.metrics.values())
    assert card.licence
    assert read_config(folder / CONFIG).weights_sha256 == card.sha256
    assert (folder / "README.md").is_file()
    assert MSAUnet.from_pretrained(card.name).load_report.not_finite == []


def test_a_card_is_one_line_of_truth(root: Path) -> None:
    card = get_card("msa.cells")
    assert card == PretrainedCard.read(root / "msa.cells" / CARD)
    assert (card.name, card.repo_id, card.revision, card.encoder) == ("msa.cells", "lab/msa.cells", "", "msa")
    assert (card.size, card.input_size) == ((root / "msa.cells" / WEIGHTS).stat().st_size, (64, 64))
    assert card.metrics == {"dice": (0.9, 0.85, 0.94)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../up"), ("name", 3), ("repo_id", "no-slash"), ("revision", "main"), ("sha256", "abc"), ("size", -1),
        ("size", True), ("class_names", ["\x1b[2J"]), ("metrics", {"dice": [0.9]}), ("metrics", {"dice": ["a", 0, 1]}),
        ("metrics", []), ("input_size", [64]), ("input_size", 64), ("licence", None), ("unknown", 1),
        ("dataset", "a\nb"), ("class_names", 7), ("class_names", "cell"),
    ],
)  # fmt: skip
def test_bad_cards_are_typed_errors(root: Path, field: str, value: object) -> None:
    path = root / "msa.cells" / CARD
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError):
        cards()


def test_a_card_in_the_wrong_folder_is_refused(root: Path) -> None:
    (root / "msa.cells").rename(root / "msa.tissue")
    with pytest.raises(CheckpointError, match="rename"):
        cards()


def test_patterns_and_unknown_names(root: Path) -> None:
    assert list_pretrained() == list_pretrained("*.cells") == ["msa.cells"]
    assert list_pretrained("*.organs") == []
    with pytest.raises(CheckpointError, match=r"did you mean 'msa\.cells'"):
        MSAUnet.from_pretrained("msa.cell")
    with pytest.raises(CheckpointError, match=r"the names are msa\.cells"):
        MSAUnet.from_pretrained("zzz")
    for path in ("./msa.cells", "~/nowhere", "a/b/c", "C:\\model", Path("msa.cells")):
        with pytest.raises(CheckpointError, match=r"There is no folder .*organisation/name"):
            MSAUnet.from_pretrained(path)


def test_order_of_resolution(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder; then the roots in their order, where a card may stand before its weights; then the Hub."""
    assert find("msa.cells") == (root / "msa.cells", get_card("msa.cells"))
    folder = tmp_path / "work" / "msa.cells"
    MSAUnet(**TINY).save_pretrained(folder)
    monkeypatch.chdir(tmp_path / "work")
    assert find("msa.cells") == (Path("msa.cells"), None), "an existing folder comes first"
    with pytest.raises(ConfigError, match="revision"):
        find("msa.cells", revision="main")
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "bare" / "msa.cells"
    bare.mkdir(parents=True)
    shutil.copy(root / "msa.cells" / CARD, bare)
    monkeypatch.setattr(registry, "roots", lambda: [bare.parent, root])
    assert find("msa.cells")[0] == root / "msa.cells", "weights are looked for in every root"
    monkeypatch.setattr(registry, "roots", lambda: [bare.parent])
    with pytest.raises(CheckpointError, match=r"not on the Hub yet.*MSA_UNET_WEIGHTS"):
        find("msa.cells")


def test_roots_are_package_checkout_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MSA_UNET_WEIGHTS", str(tmp_path))
    package = Path(registry.__file__).parent
    checkout = [package.parent / "weights"] if (package.parent / "setup.cfg").exists() else []  # else it is installed
    assert registry.roots() == [package / "weights", *checkout, tmp_path]
    installed = tmp_path / "site-packages" / "msa_unet" / "registry.py"
    monkeypatch.setattr(registry, "__file__", str(installed))
    assert registry.roots() == [installed.parent / "weights", tmp_path], "a neighbour called weights is not ours"


def test_weights_that_are_not_those_of_the_card_are_not_used(root: Path) -> None:
    MSAUnet(**TINY).save_pretrained(root / "msa.cells")  # consistent in itself
    with pytest.raises(CheckpointError, match=r"sha256.*delete"):
        MSAUnet.from_pretrained("msa.cells")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    registry.add_list_parser(subparsers)
    registry.add_info_parser(subparsers)
    args = parser.parse_args(arguments)
    return int(args.run(args))


def test_list_and_info_for_people_and_programs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    table = capsys.readouterr().out
    for part in ("msa.cells", "foreground", "cells", "MIT", "dice 0.9 [0.85, 0.94]"):
        assert part in table
    run("list", "*.organs", "--json")
    assert json.loads(capsys.readouterr().out) == []
    run("list", "--json")
    card = json.loads(capsys.readouterr().out)[0]
    assert set(card) == {f.name for f in fields(PretrainedCard)}
    run("info", "msa.cells", "--json")
    assert json.loads(capsys.readouterr().out) == card == json.loads(json.dumps(asdict(get_card("msa.cells"))))
    run("info", "msa.cells")
    text = capsys.readouterr().out
    assert "not published yet" in text
    assert "64x64" in text
    with pytest.raises(CheckpointError, match="did you mean"):
        run("info", "msa.cels")
    (root / "msa.cells" / CARD).rename(root / "card.json")  # a folder of one's own has none
    run("info", str(root / "msa.cells"))
    assert re.search(r"^encoder +msa$", capsys.readouterr().out, re.MULTILINE)
    run("info", str(root / "msa.cells"), "--json")
    assert json.loads(capsys.readouterr().out) == read_config(root / "msa.cells" / CONFIG).to_dict()


def test_file_content_is_never_markup_or_escape_code() -> None:
    config = MSAUnet(**TINY).config
    hostile = "</td><script>alert(1)</script> [x](javascript:y) **b** `c` | www.a.b | ![i](j) @all # h"
    config = replace(config, class_names=(hostile,), dataset=hostile, licence=hostile, metrics={hostile: 0.5})
    header, body = model_card(config, hostile).removeprefix("---\n").split("\n---\n", 1)
    body = body.replace("```python", "").replace("```", "").replace("`msa_unet`", "")
    for special in "<>[]`*!#@":
        for line in body.splitlines():
            if "alert" in line:
                text = line.removeprefix("# ")
                assert text.count(special) == text.count("\\" + special), (special, line)
    assert "www." not in body
    import yaml

    data = yaml.safe_load(header)
    assert re.fullmatch(r"[\w.-]+", data["datasets"][0]), "the Hub takes identifiers"
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == hostile
    for escape in ("\x1b[31m", "\x07", "\u202e", "a\nb", "\x9b"):
        for name in ("dataset", "licence", "dataset_licence"):
            with pytest.raises(ConfigError, match=name):
                replace(config, **{name: escape})
        with pytest.raises(ConfigError, match="class_names"):
            replace(config, class_names=(escape,))


def test_publish_is_dry_by_default_and_pins_what_it_uploads(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "weights"))
    import publish

    uploads = []

    def upload(folder: Path, repo_id: str, **options: object) -> str:
        uploads.append((folder, repo_id))
        return "a" * 40

    monkeypatch.setattr(publish, "upload_folder", upload)
    publish.main(["lab", "--root", str(root)])
    assert "would upload README.md, config.json, model.safetensors" in capsys.readouterr().out
    assert uploads == []
    assert get_card("msa.cells").revision == ""
    publish.main(["clinic", "msa.cells", "--root", str(root), "--yes"])
    assert uploads == [(root / "msa.cells", "clinic/msa.cells")]
    assert (get_card("msa.cells").revision, get_card("msa.cells").repo_id) == ("a" * 40, "clinic/msa.cells")
    MSAUnet(**TINY).save_pretrained(root / "msa.cells")
    with pytest.raises(SystemExit, match="not the file"):
        publish.main(["clinic", "--root", str(root), "--yes"])
    assert len(uploads) == 1


def test_not_finite_weights_are_reported(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = MSAUnet(**TINY)
    with torch.no_grad():
        model.head.votes[0].weight[0] = torch.nan
        model.decoder.ups[0].bias[0] = torch.inf
    model.save_pretrained(root / "nan")
    report = MSAUnet.from_pretrained(root / "nan").load_report
    assert sorted(report.not_finite) == ["decoder.ups.0.bias", "head.votes.0.weight"]
    assert "2 not finite" in str(report)
    assert "NaN" in caplog.text
