"""examples/finetune.py as users run it: killed and resumed, on two processes, on bad data; and its parts by hand."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("monai")
pytest.importorskip("torchmetrics")

import finetune
from accelerate.state import AcceleratorState, GradientState

from msa_unet import MSAUnet, predict

SCRIPT = ROOT / "examples" / "finetune.py"
TINY = ["--encoder", "msa", "--decoder-channels", "8", "16", "32", "64", "--size", "48", "--batch", "4", "--epochs"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def write_data(folder, classes=2, count=24):
    """Bright squares on noise, one per foreground class; every fourth picture has none."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        mask = np.zeros((48, 48), np.uint8)
        for label in range(1, classes) if i % 4 else []:
            top, left = rng.integers(0, 32, 2)
            mask[top : top + 16, left : left + 16] = label
        image = rng.integers(0, 60, (48, 48, 3)) + 90 * mask[..., None].astype(int)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{i:02}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("squares"))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No settings of an earlier run in this process, and no graphics card."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def start(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def run(*arguments):
    process = start(*arguments)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def wait_for_change(path, process):
    """Until `path` is written (again); the process must not have ended before."""
    before = path.stat().st_mtime_ns if path.exists() else None
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, run(SCRIPT, data, out, *TINY, 6, "--licence", "apache-2.0")


def test_the_folder_is_ready_for_the_hub(finished, data):
    out, output = finished
    pictures = {"training.png", "validation.png", "typical.png", "worst.png"}
    tables = {"scores.csv", "training.csv", "splits.json"}
    assert {p.name for p in out.iterdir()} == {"README.md", "config.json", "model.safetensors"} | pictures | tables
    assert all(min(Image.open(out / name).size) > 200 for name in pictures)
    weights = load_file(out / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float16, torch.int64}

    # a stranger who loads the folder gets the scores that it reports
    splits = json.loads((out / "splits.json").read_text())
    model = MSAUnet.from_pretrained(out)
    scores = {row["image"]: row for row in rows_of(out / "scores.csv")}
    expected = []
    for stem in splits["test"]:
        truth = np.array(Image.open(data / "masks" / f"{stem}.png")) > 0
        found = predict(model, Image.open(data / "images" / f"{stem}.png")).labels > 0
        if (truth | found).any():
            expected.append(2 * (truth & found).sum() / (truth.sum() + found.sum()))
            assert float(scores.pop(stem)["dice"]) == pytest.approx(expected[-1], abs=1e-5)
    assert not scores
    assert model.config.metrics["test_dice"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert f"'test_dice': {model.config.metrics['test_dice']}" in output

    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: apache-2.0" in card
    assert f"python examples/finetune.py {data} {out} --encoder msa --decoder-channels 8 16 32 64" in card
    mean, low, high = map(
        float, re.search(rf"\| test_dice \| {len(expected)} \| (\S+) \| (\S+) to (\S+) \|", card).groups()
    )
    assert mean == model.config.metrics["test_dice"]
    assert min(expected) - 1e-4 <= low <= mean <= high <= max(expected) + 1e-4
    assert all((out / name).exists() for name in re.findall(r"\]\((\S+?)\)", card))


def test_splits_and_log(finished):
    out, _ = finished
    splits = json.loads((out / "splits.json").read_text())
    assert [len(splits[name]) for name in ("train", "val", "test")] == [20, 2, 2]
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == [f"{i:02}" for i in range(24)]
    log = rows_of(out / "training.csv")
    assert [(row["epoch"], row["step"]) for row in log] == [(str(i), str(5 * i)) for i in range(1, 7)]
    assert float(log[-1]["loss"]) < 0.8 * float(log[0]["loss"])
    best = max(float(row["val_dice"]) for row in log)
    assert best > 0.3
    state = torch.load(out.with_name("out.last.pt"), weights_only=True)
    assert round(state["best_dice"], 5) == best
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == state["best"].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in state["best"].items())


def test_killed_stopped_and_resumed_it_ends_where_it_would_have(finished, data, tmp_path):
    reference, _ = finished
    out, last = tmp_path / "out", tmp_path / "out.last.pt"
    command = (SCRIPT, data, out, *TINY, 6, "--licence", "apache-2.0")

    killed = start(*command)
    wait_for_change(last, killed)
    killed.kill()
    killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL
    step = torch.load(last, weights_only=True)["step"]
    assert 0 < step < 30

    stopped = start(*command)
    wait_for_change(last, stopped)
    stopped.terminate()
    output, _ = stopped.communicate(timeout=600)
    assert stopped.returncode == 128 + signal.SIGTERM, output
    further = torch.load(last, weights_only=True)["step"]
    assert f"stopped after step {further} of 30" in output
    assert step < further < 30

    run(*command)
    assert (out / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert (out / "scores.csv").read_bytes() == (reference / "scores.csv").read_bytes()
    states = [torch.load(path, weights_only=True) for path in (last, reference.with_name("out.last.pt"))]
    for part in ("model", "best"):
        assert states[0][part].keys() == states[1][part].keys()
        assert all(torch.equal(states[0][part][name], t) for name, t in states[1][part].items())
    for mine, other in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all(torch.equal(mine[name], t) for name, t in other.items())
    assert [row[:4] for row in states[0]["history"]] == [row[:4] for row in states[1]["history"]]


def test_two_processes_in_two_passes_train_what_one_does(data, tmp_path):
    script, torchrun = ROOT / "tests" / "finetune_recorded.py", ("-m", "torch.distributed.run", "--standalone")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run(script, tmp_path / "one", data, tmp_path / "out1", *TINY, 1)
    run(*torchrun, "--nproc-per-node=2", script, tmp_path / "two", data, tmp_path / "out2", *TINY, 1, "--accumulate=2")
    for step in range(5):
        one, first, second = (
            torch.cat([g.flatten() for g in torch.load(tmp_path / path, weights_only=True)])
            for path in (f"one/0-{step}.pt", f"two/0-{step}.pt", f"two/1-{step}.pt")
        )
        assert torch.equal(first, second)
        assert one.norm() > 1e-3
        assert (first - one).norm() < 1e-5 * one.norm()
    one, two = (torch.load(tmp_path / f"out{n}.last.pt", weights_only=True) for n in (1, 2))
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-5, atol=1e-5)  # a step is 1e-3
    assert two["history"][0][2] == pytest.approx(one["history"][0][2], abs=1e-5)
    assert "torchrun --nproc-per-node 2 examples/finetune.py" in (tmp_path / "out2" / "README.md").read_text()


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        finetune.main([str(a) for a in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_all_that_is_wrong_with_the_data_is_said_at_once(tmp_path, capsys):
    folder = write_data(tmp_path / "data")
    (folder / "masks" / "01.png").unlink()
    Image.new("L", (48, 40)).save(folder / "masks" / "02.png")
    Image.new("L", (48, 48), 255).save(folder / "masks" / "03.png")
    Image.new("RGB", (48, 48)).save(folder / "masks" / "05.png")
    (folder / "images" / "06.png").write_bytes(b"not a picture")
    (folder / "images" / "07.jpg").write_bytes(b"")
    stems = [f"{i:02}" for i in range(24)]
    splits = {"train": [*stems, "ghost"], "val": ["09"], "test": [], "classes": ["background", "square"]}
    (folder / "splits.json").write_text(json.dumps(splits))
    first, *lines = refusal(capsys, folder, tmp_path / "out").splitlines()
    assert re.fullmatch(r"finetune: .* has 9 problems:", first)
    wanted = (
        r".*07\.jpg: another file has this stem",
        r"09: listed 2 times in splits\.json",
        r"masks/01: there is no such file",
        r"02: the image is \(48, 48\), the mask \(40, 48\)",
        r"03: the mask has uint8 255 to 255, and classes are 0 to 1",
        r"05: the image is \(48, 48\), the mask \(48, 48, 3\)",
        r"images/06: not a readable PNG.*",
        r"images/ghost: there is no such file",
        r"the test split is empty, or its masks are",
    )
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(f"  {pattern}", line)


def test_masks_without_named_classes_hold_indices(tmp_path, capsys):
    folder = write_data(tmp_path / "data", count=6)
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.array(Image.open(path)) * 255).save(path)
    assert "the masks have the labels [0, 255], not 0, 1, ...:" in refusal(capsys, folder, tmp_path / "out")
    assert "3 problems" in refusal(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_keeps_its_classes_where_nothing_names_others(data, tmp_path, capsys):
    MSAUnet("resnet18", decoder_channels=(8,) * 5, class_names=["nucleus"]).save_pretrained(tmp_path / "old")
    finetune.main([str(a) for a in (data, tmp_path / "out", "--from", tmp_path / "old", "--size", 48, "--epochs", 1)])
    assert "initialised" not in capsys.readouterr().out
    assert MSAUnet.from_pretrained(tmp_path / "out").config.class_names == ("nucleus",)
    assert {row["class"] for row in rows_of(tmp_path / "out" / "scores.csv")} == {"nucleus"}
    assert json.loads((tmp_path / "out" / "splits.json").read_text())["classes"] == ["background", "nucleus"]


def test_from_a_checkpoint_with_other_classes_and_channels(tmp_path, capsys):
    folder = write_data(tmp_path / "data", classes=3)
    splits = {"train": [f"{i:02}" for i in range(12)], "val": ["13", "14"], "test": ["12", "17", "18"]}
    (folder / "splits.json").write_text(json.dumps(splits | {"classes": ["background", "cell", "gland"]}))
    MSAUnet(
        "resnet18", in_channels=3, decoder_channels=(8,) * 5, class_names=["background", "cell"], num_classes=2
    ).save_pretrained(tmp_path / "old")
    arguments = [folder, tmp_path / "out", "--from", tmp_path / "old", "--channels", 1, "--size", 64, "--epochs", 1]
    arguments += ["--mixed-precision", "bf16"]
    finetune.main([str(a) for a in arguments])
    report = capsys.readouterr().out
    assert re.search(r"\d+ adapted: .*conv1.weight", report)
    model = MSAUnet.from_pretrained(tmp_path / "out")
    assert model.config.class_names == ("background", "cell", "gland")
    assert model.config.in_channels == 1
    rows = rows_of(tmp_path / "out" / "scores.csv")
    assert {row["image"] for row in rows} >= {"17", "18"}  # both have both classes
    assert {row["class"] for row in rows} == {"cell", "gland"}
    card = (tmp_path / "out" / "README.md").read_text()
    for name in ("cell", "gland"):
        dice = [float(row["dice"]) for row in rows if row["class"] == name]
        assert f"| test_dice, {name} | {len(dice)} | {np.mean(dice):.4f} |" in card

    # the same again has nothing left to train, and the card's fields may change
    finetune.main([str(a) for a in (*arguments, "--licence", "MIT")])
    assert MSAUnet.from_pretrained(tmp_path / "out").config.licence == "MIT"
    assert rows_of(tmp_path / "out" / "scores.csv") == rows
    # other choices are another run
    assert "of a run with lr 0.001" in refusal(capsys, *arguments, "--lr", "0.1")
    (tmp_path / "out.last.pt").unlink()
    assert "holds the result of another run" in refusal(capsys, *arguments)


def test_a_batch_that_cannot_be_shared_out(data, tmp_path, capsys):
    assert "--batch 8 must be a multiple of --accumulate 3" in refusal(capsys, data, tmp_path, "--accumulate", 3)
    assert "--batch 0" in refusal(capsys, data, tmp_path, "--batch", 0)


@pytest.mark.parametrize("classes", [1, 3])
def test_the_loss_is_a_mean_over_images(classes):
    logits, target = torch.randn(4, classes, 16, 16), torch.randint(0, max(2, classes), (4, 16, 16), dtype=torch.uint8)
    target[0] = 0
    target[1][target[1] == 2] = 0
    alone = [finetune.segmentation_loss(logits[i : i + 1], target[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(finetune.segmentation_loss(logits, target), torch.stack(alone).mean())
    perfect = torch.nn.functional.one_hot(target.long(), max(2, classes)).movedim(-1, 1)[:, -classes:] * 200.0 - 100
    assert finetune.segmentation_loss(perfect, target) < 1e-6
    # an absent class adds nothing to the Dice part: without any, the cross-entropy is all
    entropy = torch.nn.functional.softplus(logits[0]) if classes == 1 else -logits[0].log_softmax(0)[0]
    torch.testing.assert_close(alone[0], entropy.mean())


def test_the_objective_is_the_loss_of_normalised_images():
    model = MSAUnet("msa", decoder_channels=(4, 4, 8, 8)).eval()
    images, masks = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 2, (2, 32, 32))
    expected = finetune.segmentation_loss(model((images / 255 - 0.5) / 0.5), masks)
    torch.testing.assert_close(finetune.Objective(model)(images, masks), expected)


def test_synchronised_batch_norms_are_stored_as_the_usual_ones(tmp_path):
    model = MSAUnet("resnet18", decoder_channels=(4,) * 5).eval()
    x = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        expected = model(x)
        synchronised = finetune.convert_sync_batchnorm(model)
        assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in synchronised.modules())
        synchronised.save_pretrained(tmp_path)
        torch.testing.assert_close(MSAUnet.from_pretrained(tmp_path)(x), expected)


def test_what_is_shown_depends_on_its_place_alone():
    masks = [torch.zeros(40, 50, dtype=torch.uint8) for _ in range(5)]
    for i, mask in enumerate(masks):
        mask[10:30, 5 + i : 30] = 1
    pairs = [(mask.expand(3, -1, -1) * 200, mask) for mask in masks]
    course = finetune.Course(pairs, 12, 32, upright=False, seed=3)
    assert sorted(course.order[:5].tolist()) == sorted(course.order[5:10].tolist()) == list(range(5))
    state = torch.get_rng_state()
    forwards = [course[i] for i in range(12)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for i in reversed(range(12)):
        for mine, other in zip(course[i], forwards[i], strict=True):
            assert torch.equal(mine, other)
    image, mask = forwards[0]
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((3, 32, 32), torch.uint8, (32, 32), torch.uint8)
    assert not torch.equal(course[0][0], finetune.Course(pairs, 12, 32, upright=False, seed=4)[0][0])
    for image, mask in forwards:  # what happens to the image happens to its mask
        assert ((image[0] > 80) == (mask == 1)).float().mean() > 0.95


def test_scores_by_hand(monkeypatch):
    def square(top, left, side, label=1):
        labels = np.zeros((32, 32), np.uint8)
        labels[top : top + side, left : left + side] = label
        return labels

    found = [square(4, 8, 8), square(0, 0, 0), square(0, 0, 0), square(4, 4, 8, label=2)]
    truth = [square(4, 4, 8), square(0, 0, 0), square(4, 4, 8), square(4, 4, 8, label=2)]
    results = [SimpleNamespace(labels=labels, foreground={1: "a", 2: "b"}) for labels in found]
    monkeypatch.setattr(finetune, "predict", lambda model, image: results[int(image)])
    model = SimpleNamespace(config=SimpleNamespace(num_classes=3))
    pairs = [(torch.tensor(i), torch.from_numpy(mask)) for i, mask in enumerate(truth)]
    scores = finetune.evaluate(model, pairs, finetune.Accelerator())
    # outlines of 28 pixels each; of each, 5 in the top row, 5 in the bottom row and 2 beside them are within one pixel
    np.testing.assert_allclose(scores[0, 0], [0.5, 1 / 3, 2 * 12 / 56], rtol=1e-6)
    assert np.isnan(scores[0, 1]).all()
    assert np.isnan(scores[1]).all()
    assert scores[2, 0].tolist() == [0, 0, 0]
    assert scores[3, 1].tolist() == [1, 1, 1]


def test_plain_pytorch(tmp_path):
    output = run(ROOT / "examples" / "plain_pytorch.py", write_data(tmp_path / "data", count=8), tmp_path / "out")
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss (\S+)", output)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    model, old = MSAUnet.from_pretrained(tmp_path / "out"), MSAUnet.from_pretrained("tf_efficientnet_lite0.dsb2018")
    assert model.config.class_names == ("background", "lesion")
    assert torch.equal(model.backbone.conv_stem.weight, old.backbone.conv_stem.weight)  # frozen
    assert not torch.equal(model.decoder.ups[0].weight, old.decoder.ups[0].weight)
