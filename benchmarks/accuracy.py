"""Train contenders with one recipe, score them image by image, keep every number.

    python benchmarks/imagenet_weights.py                              # once: the encoder's weights
    python benchmarks/accuracy.py --data-set kvasir_seg chase_db1 --variants msa unet msa+running --seeds 0 1
    python benchmarks/accuracy.py --data-set isic2017 --split test     # every peer, for the final comparison
    python benchmarks/report.py                                        # tables and plots

A variant is a name in `VARIANTS`, for networks with `forward_levels` followed by "+" and a name in `SUPERVISION`.
Everything else is the same for all: images squashed to size x size, mean and std 0.5, augmentation, loss, AdamW with
warm-up and cosine, batch, number of steps; the weights after the last step are scored (no epoch is chosen). The seed
varies the random initialisation, the data order and the augmentation drawn along with it. Scores are those at the
working size, against masks resized to it by nearest neighbour, of all classes but 0.

A run that is killed goes on after its last whole epoch; a finished one is skipped. Trained weights stay under
runs/accuracy/, so that a run is not trained again to be scored on the other split: delete them when the code that a
variant stands for has changed. Needs segmentation_models_pytorch, monai and scikit-image.
"""

import argparse
import csv
import fcntl
import functools
import json
import math
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import ablations
import numpy as np
import torch
import torch.nn.functional as F
from monai.metrics import compute_surface_dice
from PIL import Image
from skimage.morphology import skeletonize
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2

from msa_unet import MSAUnet

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
RUNS = ROOT / "runs" / "accuracy"
LOCK = Path(tempfile.gettempdir()) / "msa_unet_accuracy.lock"  # one per machine: two trainings would slow each other

LEARNING_RATE = 1e-3
ENCODER_LR_SCALE = 1.0
WEIGHT_DECAY = 1e-2
WARM_UP = 0.05  # share of the steps
TOLERANCE = 1.0  # of the normalised surface Dice, in pixels of the working size
SUBSETS = 4  # sums drawn per step by "mutation"

ENCODER = "tf_efficientnet_lite0"
NARROW = (32, 48, 64, 96, 128)
Build = Callable[[int, int, Path | None], nn.Module]  # in_channels, num_classes, encoder_weights (None: random)


def msa(*changes: ablations.Change, **options: Any) -> Build:
    """MSAUnet on the common encoder, with `options` of `MSAUnet` and `changes` from ablations.py."""

    def build(c: int, k: int, weights: Path | None) -> nn.Module:
        model = MSAUnet(ENCODER, in_channels=c, num_classes=k, encoder_weights=weights or False, **options)
        for change in changes:
            model = change(model)
        return model

    return build


def base(*changes: ablations.Change, **options: Any) -> Build:
    """The design that screening began with: coarser levels vote by 1x1 for whole positions, the rest as today."""
    return msa(ablations.votes(), *changes, **options)


def peer(name: str) -> Build:
    """The network `name` of segmentation_models.pytorch on the same encoder with the same weights."""

    def build(c: int, k: int, weights: Path | None) -> nn.Module:
        import segmentation_models_pytorch as smp
        from safetensors.torch import load_file

        model = getattr(smp, name)(f"tu-{ENCODER}", encoder_weights=None, in_channels=c, classes=k)
        if weights:
            loaded = model.encoder.model.load_state_dict(
                load_file(weights), strict=False
            )  # the classifier is left over
            if loaded.missing_keys:
                raise SystemExit(f"{weights} lacks {', '.join(loaded.missing_keys)}.")
        return model

    return build


def scratch_attention_unet(c: int, k: int, _: Path | None) -> nn.Module:
    """MONAI's Attention U-Net at the parameters of `scratch-msa`."""
    from monai.networks.nets import AttentionUnet

    return AttentionUnet(2, c, k, channels=(15, 30, 61, 123, 246), strides=(2, 2, 2, 2))


def scratch_unet(c: int, k: int, _: Path | None) -> nn.Module:
    """The plain U-Net at the parameters of `scratch-msa`."""
    from monai.networks.nets import BasicUNet

    return BasicUNet(2, c, k, features=(16, 31, 62, 124, 248, 16), act="relu", norm="batch")


VARIANTS: dict[str, Build] = {
    "msa": msa(),  # the default of the package
    "msa-narrow": msa(decoder_channels=NARROW),
    "msa-no-dense": msa(ablations.no_dense),
    "msa-one-vote": msa(ablations.one_vote),
    "msa-attention-none": msa(attention="none"),
    "msa-no-ideas": msa(ablations.no_ideas, attention="none"),
    # what screening began with, and one thing changed of that
    "base": base(),
    "base-narrow": base(decoder_channels=NARROW),
    "base-wide-finest": base(decoder_channels=(48, 64, 96, 128, 192)),
    "base-no-dense": base(ablations.no_dense),
    "base-one-vote": base(ablations.one_vote),
    "base-attention-all": base(attention="all"),
    "base-attention-none": base(attention="none"),
    "base-no-ideas": base(ablations.no_ideas, attention="none"),
    "base-full-resolution": base(ablations.full_resolution),
    "base-separable": base(ablations.separable_decoder(1, 1)),
    "base-separable-added": base(ablations.separable_decoder(1, 1), ablations.added_skip),
    "base-lean": base(ablations.separable_decoder(2, 2), decoder_channels=(32, 48, 96, 128, 192)),
    "base-residual": base(ablations.residual),
    "base-bottleneck": base(ablations.bottleneck),
    "base-bilinear": base(ablations.bilinear),
    "base-dysample": base(ablations.dysample),
    "base-group-norm": base(ablations.group_norm),
    "base-small-init": base(ablations.initialised(0.4)),
    "base-subpixel-votes": base(ablations.votes(subpixels=True)),
    "base-subpixel-votes-3x3": base(ablations.votes(3, subpixels=True, finest_kernel=3)),
    "base-subpixel-votes-3x3-coarse": base(ablations.votes(3, subpixels=True)),
    "base-narrow-subpixel-votes-3x3-coarse": base(ablations.votes(3, subpixels=True), decoder_channels=NARROW),
    "unet": peer("Unet"),
    "unetplusplus": peer("UnetPlusPlus"),
    "manet": peer("MAnet"),
    "deeplabv3plus": peer("DeepLabV3Plus"),
    "segformer": peer("Segformer"),
    # without ImageNet weights, at equal parameters
    "scratch-msa": lambda c, k, _: MSAUnet(in_channels=c, num_classes=k, decoder_channels=(16, 32, 64, 128)),
    "scratch-attention-unet": scratch_attention_unet,
    "scratch-unet": scratch_unet,
}
PEERS = ("msa", "unet", "unetplusplus", "manet", "deeplabv3plus")

# from the votes of the levels, coarse to fine, (N, K, H, W) each, to the logits that have a loss: the network's last
SUPERVISION: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "plain": lambda votes: [*votes, sum(votes)],
    "running": lambda votes: list(accumulate(votes)),
    "mutation": lambda votes: [*subset_sums(votes, SUBSETS), sum(votes)],
    "mutation-all": lambda votes: list(subset_sums(votes)),
}


def subset_sums(votes: list[Tensor], count: int | None = None) -> Iterable[Tensor]:
    """Sums over `count` random non-empty subsets of `votes`, or over each of them, all votes last.

    Source: MUTATION of MERIT (Rahman and Marculescu, 2023, arXiv 2303.16892).
    """
    every = 2 ** len(votes)
    for bits in range(1, every) if count is None else torch.randint(1, every, (count,)).tolist():
        yield sum(vote for i, vote in enumerate(votes) if bits >> i & 1)


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice of (N, K, H, W) logits against (N, H, W) class indices.

    Dice is taken per image and foreground class, over those that are there: of an absent class it says nothing about
    how much was predicted wrongly, cross-entropy does.
    """
    classes = logits.shape[1]
    if classes == 1:
        entropy = F.binary_cross_entropy_with_logits(logits[:, 0], target.float())
        p, t = logits.sigmoid(), target[:, None].float()
    else:
        entropy = F.cross_entropy(logits, target)
        p, t = logits.softmax(1)[:, 1:], F.one_hot(target, classes).movedim(-1, 1)[:, 1:].float()
    area = t.sum((2, 3))  # (N, K or K - 1)
    dice = 2 * (p * t).sum((2, 3)) / (p.sum((2, 3)) + area).clamp(min=1)
    there = area > 0
    return entropy + ((1 - dice) * there).sum() / there.sum().clamp(min=1)


def loss_of(model: nn.Module, x: Tensor, target: Tensor, supervision: str) -> Tensor:
    """The loss of the network's logits, plus the mean loss of what `supervision` derives from its levels."""
    if not supervision:
        return segmentation_loss(model(x), target)
    *others, logits = SUPERVISION[supervision](model.forward_levels(x))
    return segmentation_loss(logits, target) + sum(segmentation_loss(z, target) for z in others) / len(others)


@dataclass(frozen=True)
class Samples:
    """One split of a data set in memory: names, (N, 3, S, S) and (N, S, S) in uint8, and all classes' names."""

    stems: list[str]
    images: Tensor
    masks: Tensor
    classes: list[str]

    @property
    def num_classes(self) -> int:
        """What a network votes for: one class against the background, or all of them."""
        return 1 if len(self.classes) == 2 else len(self.classes)


def read_splits(folder: Path) -> dict[str, Any]:
    """Stems under "train", "val" and "test", names under "classes"."""
    splits: dict[str, Any] = json.loads((folder / "splits.json").read_text())
    return splits


@functools.lru_cache(maxsize=3)
def load(folder: Path, split: str, size: int) -> Samples:
    """Read a split of a folder with images/, masks/ and splits.json, squashed to `size` x `size`."""
    splits = read_splits(folder)
    paths = {path.stem: path for path in (folder / "images").iterdir()}
    images, masks = [], []
    for stem in splits[split]:
        with Image.open(paths[stem]) as image, Image.open(folder / "masks" / f"{stem}.png") as mask:
            images.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)))
            masks.append(np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)))
    return Samples(
        splits[split],
        torch.from_numpy(np.stack(images)).movedim(-1, 1).contiguous(),
        torch.from_numpy(np.stack(masks)),
        splits["classes"],
    )


UPRIGHT = {"hc18_fetal_head", "montgomery_cxr", "vocalfolds"}  # pictures that have an up and a down


def augmentation(upright: bool) -> v2.Transform:
    """Random flips, quarter turns, a small affine map and colour, for one uint8 image (3, S, S) and its mask."""
    turns = [] if upright else [v2.RandomVerticalFlip(), v2.RandomApply([v2.RandomRotation((90, 90))])]
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            *turns,
            v2.RandomAffine(15, (0.05, 0.05), (0.8, 1.25), interpolation=v2.InterpolationMode.BILINEAR),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        ]
    )


def normalise(images: Tensor) -> Tensor:
    """Floats with mean and std 0.5, channels last in memory, from (N, 3, S, S) uint8."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train(
    variant: str,
    data: Samples,
    epochs: int,
    batch: int,
    seed: int,
    weights: Path | None,
    upright: bool,
    checkpoint: Path,
    progress: Callable[[int, float, float], None] = lambda epoch, loss, seconds: None,
) -> tuple[nn.Module, float]:
    """The trained network and the seconds that its training took; goes on from `checkpoint` if there is one.

    `progress` is told after each epoch its number, mean loss and all seconds so far.
    """
    name, _, supervision = variant.partition("+")
    torch.manual_seed(seed * 10_000)
    model = VARIANTS[name](3, data.num_classes, weights).to(memory_format=torch.channels_last)
    encoder = getattr(model, "backbone", getattr(model, "encoder", nn.Module()))
    pretrained = {id(p) for p in encoder.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in pretrained], "scale": ENCODER_LR_SCALE},
        {"params": [p for p in model.parameters() if id(p) not in pretrained], "scale": 1.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    state = {"epoch": 0, "seconds": 0.0}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        if state["epoch"] < epochs:
            optimizer.load_state_dict(state["optimizer"])
    augment = augmentation(upright)
    per_epoch = steps_per_epoch(len(data.stems), batch)
    model.train()
    for epoch in range(state["epoch"], epochs):
        start = time.perf_counter()
        torch.manual_seed(seed * 10_000 + epoch + 1)  # an epoch depends on nothing before it but the weights
        total = 0.0
        for i, drawn in enumerate(torch.randperm(len(data.stems)).split(batch)[:per_epoch]):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * group["scale"] * schedule(epoch * per_epoch + i, epochs * per_epoch)
            pairs = [augment(tv_tensors.Image(data.images[j]), tv_tensors.Mask(data.masks[j])) for j in drawn]
            images, masks = (torch.stack(list(side)) for side in zip(*pairs, strict=True))
            loss = loss_of(model, normalise(images), masks.long(), supervision)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        state["seconds"] += time.perf_counter() - start
        state |= {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if epoch + 1 == epochs:
            del state["optimizer"]
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)
        progress(epoch + 1, total / per_epoch, state["seconds"])
    return model, state["seconds"]


def steps_per_epoch(images: int, batch: int) -> int:
    """Whole batches only: a batch norm over the one image left would be another recipe."""
    return max(1, images // batch)


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a linear warm-up, then half a cosine down to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))


@torch.no_grad()
def evaluate(model: nn.Module, data: Samples, thin: bool) -> list[dict[str, object]]:
    """One row per image and foreground class; classes neither in the mask nor in the prediction have none."""
    model.eval()
    rows = []
    for batch in torch.arange(len(data.stems)).split(8):
        logits = model(normalise(data.images[batch]))
        labels = (logits[:, 0] > 0).int() if data.num_classes == 1 else logits.argmax(1)
        for i, label in zip(batch.tolist(), labels.numpy(), strict=True):
            for k, name in list(enumerate(data.classes))[1:]:
                scores = score(label == k, data.masks[i].numpy() == k, thin)
                rows += [{"image": data.stems[i], "class": name} | scores] if scores else []
    return rows


def score(predicted: np.ndarray, true: np.ndarray, thin: bool) -> dict[str, object]:
    """Scores of one class on one image, (H, W) bool each; none if it is in neither, all 0 if it is in one of them.

    nsd: normalised surface Dice, the share of both outlines within `TOLERANCE` pixels of the other (MONAI).
    cldice: of thin structures, how far each skeleton lies in the other mask (Shit et al., CVPR 2021).
    """
    overlap, total = int((predicted & true).sum()), int(predicted.sum() + true.sum())
    if total == 0:
        return {}
    pair = [torch.from_numpy(side)[None, None] for side in (predicted, true)]
    with warnings.catch_warnings():  # that one of the two is empty is not news
        warnings.simplefilter("ignore")
        nsd = compute_surface_dice(*pair, [TOLERANCE], include_background=True).item()
    scores: dict[str, object] = {
        "dice": round(2 * overlap / total, 5),
        "iou": round(overlap / (total - overlap), 5),
        "nsd": round(nsd, 5),
        "cldice": "",
    }
    if thin:
        scores["cldice"] = round(centreline_dice(predicted, true), 5) if overlap else 0.0
    return scores


def centreline_dice(predicted: np.ndarray, true: np.ndarray) -> float:
    """Harmonic mean of the share of the predicted skeleton in the true mask and of the true one in the prediction."""
    precision, recall = true[skeletonize(predicted)].mean(), predicted[skeletonize(true)].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


@torch.no_grad()
def gmac(model: nn.Module, size: int) -> float:
    """Billions of multiply-accumulates for one image."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 2e9


KEY = ("data_set", "split", "size", "epochs", "batch", "variant", "seed")  # what makes a run


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in KEY if column in row)


def record(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Put a run's rows into a results file, in place of those that an earlier attempt may have left."""
    if not rows:
        return
    kept = [row for row in read(path) if key_of(row) != key_of(rows[0])]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])
    partial.replace(path)


def run(key: dict[str, Any], data: Path, weights: Path | None, progress: Callable[[int, float, float], None]) -> None:
    """Train and score one run and write its results."""
    data_set, split, size, epochs, batch, variant, seed = (key[column] for column in KEY)
    samples = load(data / data_set, "train", size)
    checkpoint = RUNS / f"{data_set}-{size}-{epochs}-{batch}-{variant}-{seed}.pt"
    model, seconds = train(variant, samples, epochs, batch, seed, weights, data_set in UPRIGHT, checkpoint, progress)
    rows = evaluate(model, load(data / data_set, split, size), thin=data_set == "chase_db1")
    scored = {column: key[column] for column in KEY if column != "data_set"}
    record(RESULTS / f"{data_set}.csv", [scored | row for row in rows])
    steps = epochs * steps_per_epoch(len(samples.stems), batch)
    summary = {
        "dice": round(float(np.mean([row["dice"] for row in rows])), 5) if rows else "",  # for a first look
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmac": round(gmac(model, size), 4),
        "steps": steps,
        "seconds": round(seconds, 1),
        "images_per_second": round(steps * batch / seconds, 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    record(RESULTS / "runs.csv", [key | summary])


def commit() -> str:
    """The version of the code, "-dirty" if it differs from what is committed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of data sets")
    parser.add_argument("--data-set", nargs="+", required=True)
    parser.add_argument(
        "--variants", nargs="+", default=PEERS, help=", ".join([*VARIANTS, *(f"+{s}" for s in SUPERVISION)])
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--split", choices=("val", "test"), default="val", help="choose on val; score test once")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--encoder-weights", type=Path, default=ROOT / "runs" / "imagenet" / f"{ENCODER}.safetensors")
    args = parser.parse_args()
    for name, _, supervision in (variant.partition("+") for variant in args.variants):
        if name not in VARIANTS or (supervision and supervision not in SUPERVISION):
            parser.error(
                f"unknown variant {name}+{supervision}: names are {', '.join(VARIANTS)}; {', '.join(SUPERVISION)}"
            )
    if not args.encoder_weights.exists():
        parser.error(f"{args.encoder_weights} is missing: benchmarks/imagenet_weights.py makes it.")
    if args.threads:
        torch.set_num_threads(args.threads)
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it even if the process is killed
        except OSError:
            raise SystemExit(f"Another accuracy run is going on ({LOCK}).") from None
        run_all(args)


def run_all(args: argparse.Namespace) -> None:
    done = {key_of(row) for row in read(RESULTS / "runs.csv")}
    common = {column: getattr(args, column) for column in ("split", "size", "epochs", "batch")}
    keys = [
        {"data_set": d} | common | {"variant": v, "seed": s}
        for s, d, v in product(args.seeds, args.data_set, args.variants)  # a seed is complete before the next begins
    ]
    todo = [key for key in keys if key_of(key) not in done]
    print(f"{len(keys) - len(todo)} of {len(keys)} runs are done", flush=True)
    images = [
        args.epochs * args.batch * steps_per_epoch(len(read_splits(args.data / key["data_set"])["train"]), args.batch)
        for key in todo
    ]
    for n, key in enumerate(todo):
        title = f"[{n + 1}/{len(todo)}] {key['data_set']} {key['variant']} seed {key['seed']}"

        def progress(epoch: int, loss: float, seconds: float, n: int = n, title: str = title) -> None:
            rate = images[n] * epoch / args.epochs / seconds
            left = images[n] * (args.epochs - epoch) / args.epochs / rate
            print(
                f"{title}: epoch {epoch}/{args.epochs}, loss {loss:.3f}, {rate:.1f} images/s, "
                f"{left / 60:.1f} min left, all runs about {(left + sum(images[n + 1 :]) / rate) / 60:.0f} min",
                flush=True,
            )

        run(key, args.data, args.encoder_weights, progress)
        row = next(row for row in read(RESULTS / "runs.csv") if key_of(row) == key_of(key))
        print(f"{title}: mean Dice on {key['split']} {row['dice']}", flush=True)


if __name__ == "__main__":
    main()
