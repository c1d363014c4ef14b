"""benchmarks/accuracy.py: metrics, losses, resuming, and contenders that really share their weights."""

import fcntl
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("monai")
pytest.importorskip("skimage")

import accuracy


def square(top: int, left: int, side: int, size: int = 32) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_scores_by_hand():
    scores = accuracy.score(square(4, 4, 8), square(4, 8, 8), thin=False)
    assert scores["dice"] == 0.5  # 2 * 32 / 128
    assert scores["iou"] == pytest.approx(1 / 3, abs=1e-5)
    assert scores["cldice"] == ""
    # outlines of 28 pixels each; of each, 5 in the top row, 5 in the bottom row and 2 beside them are within one pixel
    assert scores["nsd"] == pytest.approx(2 * 12 / 56, abs=1e-5)
    same = accuracy.score(square(4, 4, 8), square(4, 4, 8), thin=True)
    assert set(same.values()) == {1.0}


def test_a_class_that_is_nowhere_has_no_score_and_one_predicted_for_nothing_scores_0():
    nothing, something = square(0, 0, 0), square(4, 4, 8)
    assert accuracy.score(nothing, nothing, thin=True) == {}
    assert set(accuracy.score(something, nothing, thin=True).values()) == {0.0}
    assert set(accuracy.score(nothing, something, thin=True).values()) == {0.0}


def test_scores_are_those_of_torchmetrics():
    segmentation = pytest.importorskip("torchmetrics.segmentation")
    rng = np.random.default_rng(0)
    for _ in range(5):
        predicted, true = rng.random((2, 24, 24)) > 0.6
        scores = accuracy.score(predicted, true, thin=False)
        pair = [torch.from_numpy(side).long()[None, None] for side in (predicted, true)]
        dice = segmentation.DiceScore(1, include_background=True)(*pair)
        iou = segmentation.MeanIoU(1, include_background=True)(*pair)
        assert scores["dice"] == pytest.approx(dice.item(), abs=1e-5)
        assert scores["iou"] == pytest.approx(iou.item(), abs=1e-5)


def test_centreline_dice_of_a_vessel_with_a_gap():
    true = np.zeros((32, 32), bool)
    true[14:17, 2:30] = True
    predicted = true.copy()
    predicted[:, 16:] = False
    recall = predicted[accuracy.skeletonize(true)].mean()
    assert accuracy.centreline_dice(predicted, true) == pytest.approx(2 * recall / (1 + recall))
    assert 0.6 < accuracy.centreline_dice(predicted, true) < 0.75
    assert accuracy.centreline_dice(true, true) == 1


@pytest.mark.parametrize("classes", [1, 4])
def test_the_loss_is_that_of_monai_where_every_class_is_there(classes: int):
    from monai.losses import DiceCELoss

    torch.manual_seed(0)
    logits, target = torch.randn(3, classes, 16, 16), torch.randint(max(2, classes), (3, 16, 16))
    reference = DiceCELoss(
        sigmoid=classes == 1, softmax=classes > 1, to_onehot_y=classes > 1, include_background=classes == 1, smooth_nr=0
    )
    expected = reference(logits, target[:, None].float())
    assert accuracy.segmentation_loss(logits, target).item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("classes", [1, 3])
def test_an_empty_mask_has_only_cross_entropy(classes: int):
    logits, target = torch.full((2, classes, 8, 8), -9.0), torch.zeros(2, 8, 8, dtype=torch.long)
    logits[:, 0] = -9 if classes == 1 else 9
    logits.requires_grad_()
    loss = accuracy.segmentation_loss(logits, target)
    loss.backward()
    assert loss.item() < 1e-3
    assert logits.grad.isfinite().all()


def test_supervision_ends_with_the_logits_of_the_network():
    torch.manual_seed(0)
    votes = list(torch.randn(4, 2, 3, 5, 5))
    counts = {"plain": 5, "running": 4, "mutation": accuracy.SUBSETS + 1, "mutation-all": 15}
    for name, derive in accuracy.SUPERVISION.items():
        derived = derive(votes)
        assert len(derived) == counts[name]
        assert torch.allclose(derived[-1], sum(votes), atol=1e-6)


def test_schedule_warms_up_and_falls_to_0():
    rates = [accuracy.schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 1e-3


def test_augmentation_moves_image_and_mask_alike():
    torch.manual_seed(0)
    mask = torch.from_numpy(square(6, 10, 16, 48)).to(torch.uint8)
    augment = accuracy.augmentation(upright=False)
    for _ in range(10):
        image = accuracy.tv_tensors.Image(mask[None].expand(3, -1, -1) * 255)
        image, moved = augment(image, accuracy.tv_tensors.Mask(mask))
        assert image.dtype == moved.dtype == torch.uint8
        assert ((image[0] > 64) == (moved > 0)).float().mean() > 0.97


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set in the layout of the shared ones: 16 images to train on, 3 to score."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "squares"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    stems = [f"s{i:02}" for i in range(19)]
    for stem in stems:
        mask = square(*rng.integers(4, 24, 2), 12, size=48)
        Image.fromarray((mask * 120 + rng.integers(0, 80, (48, 48))).astype(np.uint8)).save(
            folder / f"images/{stem}.png"
        )
        Image.fromarray(mask.astype(np.uint8)).save(folder / f"masks/{stem}.png")
    splits = {"train": stems[:16], "val": stems[16:], "test": stems[16:], "classes": ["background", "square"]}
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


class Tiny(nn.Module):
    """A network whose training needs every piece of state: dropout, batch norm, two levels that vote."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.votes = nn.ModuleList(nn.Conv2d(8, classes, 1) for _ in range(2))

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        x = self.body(x)
        return [vote(x) for vote in self.votes]

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.forward_levels(x))


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(accuracy.VARIANTS, "tiny", lambda c, k, weights: Tiny(k))
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "results" / "accuracy")
    monkeypatch.setattr(accuracy, "RUNS", tmp_path / "runs")


@pytest.mark.usefixtures("_tiny")
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(folder: Path, tmp_path: Path):
    data = accuracy.load(folder, "train", 32)
    arguments = ("tiny+mutation", data, 4, 8, 1, None, False)

    def killed(epoch: int, loss: float, seconds: float) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accuracy.train(*arguments, tmp_path / "killed.pt", killed)
    epochs: list[int] = []
    resumed, _ = accuracy.train(*arguments, tmp_path / "killed.pt", lambda epoch, loss, seconds: epochs.append(epoch))
    whole, _ = accuracy.train(*arguments, tmp_path / "whole.pt")
    assert epochs == [3, 4]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.usefixtures("_tiny")
def test_runs_are_recorded_once_and_not_trained_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    weights = folder / "none.safetensors"
    weights.touch()
    monkeypatch.setattr(accuracy, "LOCK", folder / "lock")
    command = (
        f"accuracy.py --data {folder.parent} --data-set squares --variants tiny tiny+running --seeds 0 1 --size 32"
    )
    monkeypatch.setattr(sys, "argv", [*command.split(), "--epochs", "2", "--encoder-weights", str(weights)])
    accuracy.main()
    assert "[4/4] squares tiny+running seed 1: epoch 2/2" in capsys.readouterr().out
    assert len(accuracy.read(accuracy.RESULTS / "runs.csv")) == 4
    scores = accuracy.read(accuracy.RESULTS / "squares.csv")
    assert len(scores) <= 4 * 3
    assert {row["image"] for row in scores} <= {"s16", "s17", "s18"}

    # the same again does nothing; the other split is scored with the weights that are there
    before = (accuracy.RESULTS / "squares.csv").read_text()
    accuracy.main()
    assert (accuracy.RESULTS / "squares.csv").read_text() == before
    sys.argv += ["--split", "test"]
    capsys.readouterr()
    accuracy.main()
    assert "epoch" not in capsys.readouterr().out
    assert {row["split"] for row in accuracy.read(accuracy.RESULTS / "runs.csv")} == {"val", "test"}

    with accuracy.LOCK.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="Another"):
            accuracy.main()


def test_what_a_killed_run_left_in_the_scores_is_replaced(tmp_path: Path):
    row = {"split": "val", "size": 32, "epochs": 1, "batch": 8, "variant": "msa", "seed": 0, "image": "a", "dice": 0.1}
    accuracy.record(tmp_path / "x.csv", [row, row | {"image": "b"}])
    accuracy.record(tmp_path / "x.csv", [row | {"seed": 1}])
    accuracy.record(tmp_path / "x.csv", [row | {"dice": 0.2}])
    assert [(r["seed"], r["image"], r["dice"]) for r in accuracy.read(tmp_path / "x.csv")] == [
        ("1", "a", "0.1"),
        ("0", "a", "0.2"),
    ]


def test_contenders_start_from_the_same_encoder_weights(tmp_path: Path):
    pytest.importorskip("segmentation_models_pytorch")
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = tmp_path / "lite0.safetensors"
    save_file(timm.create_model(accuracy.ENCODER).state_dict(), weights)
    expected = accuracy.VARIANTS["msa"](3, 1, weights).backbone.state_dict()
    for name in (*accuracy.PEERS[1:], "segformer"):
        model = accuracy.VARIANTS[name](3, 1, weights)
        found = model.encoder.model.state_dict()
        assert found.keys() == expected.keys(), name
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


def test_networks_without_pretraining_have_equal_parameters():
    sizes = [
        sum(p.numel() for p in build(3, 1, None).parameters())
        for name, build in accuracy.VARIANTS.items()
        if name.startswith("scratch")
    ]
    assert len(sizes) == 3
    assert max(sizes) < 1.01 * min(sizes)
