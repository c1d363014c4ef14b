"""Train MSA-Unet on a folder of images and masks; the result is a folder ready for `from_pretrained` and the Hub.

    python examples/finetune.py DATA OUT --from tf_efficientnet_lite0.dsb2018
    python examples/finetune.py DATA OUT --encoder convnext_tiny --epochs 60
    accelerate launch --num_processes 4 examples/finetune.py DATA OUT --mixed-precision bf16

DATA holds images/ and masks/ (one channel, value = class index, the image's stem) and may hold splits.json, {"train":
[stems], "val": [stems], "test": [stems], "classes": ["background", "nucleus"]}; without it a tenth of the images each
is drawn for validation and test. After each epoch the validation split is scored at full size, and the best epoch is
kept. The test split is scored once, at the end, with those weights as they are stored.

The last state is OUT.last.pt, beside OUT. The same command goes on from it after a kill; SIGTERM finishes the step
and saves first. Delete it when all is done. docs/finetune.md has more.
"""

import argparse
import csv
import hashlib
import json
import random
import shlex
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import broadcast, set_seed
from matplotlib.figure import Figure
from monai.metrics import compute_surface_dice
from timm.layers import convert_sync_batchnorm
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.functional.segmentation import dice_score, mean_iou
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from msa_unet import CheckpointError, ConfigError, EncoderError, InputError, MSAUnet, predict
from msa_unet.files import replacing
from msa_unet.inference import prepare, read_image, to_unit_range

warnings.filterwarnings("ignore", module="monai")  # that a class is in one of two masks only is not news
SPLITS = ("train", "val", "test")
SCORES = ("dice", "iou", "nsd")
TOLERANCE = 1.0  # pixels; of nsd, the normalised surface Dice: the share of both outlines that near to the other
CARD = f"""
## Results

The {{images}} images of the test split at full size, scored once, with these weights in half precision: the mean over
[scores.csv](scores.csv), where a class that neither the mask nor the network has in an image has no score. NSD is the
normalised surface Dice at a tolerance of {TOLERANCE:g} pixel.

| | images | mean | 95 % interval (bootstrap over images) |
|---|---|---|---|
{{table}}
Typical images, and the worst: each as it is, with its mask, with what the network finds.

![Typical test images](typical.png)
![The worst test images](worst.png)

## Training

```bash
{{command}}
```

The epoch that was best on the validation split was kept. [training.csv](training.csv) has all of them,
[splits.json](splits.json) says which image was in which split.

![Loss and validation Dice](training.png)
"""
Pair = tuple[Tensor, Tensor]  # image (C, H, W) and mask (H, W), uint8


def read_folder(folder: Path, seed: int) -> tuple[dict[str, Pair], dict[str, list[str]]]:
    """Every pair by its stem; the stems of each split, and the names of the "classes".

    Raises:
        InputError: with all that is wrong in the folder, one problem a line.
    """
    files = [(kind, path) for kind in ("images", "masks") for path in sorted((folder / kind).glob("[!.]*"))]
    paths = {(kind, path.stem): path for kind, path in files}
    problems = [f"{path}: another file has this stem" for kind, path in files if paths[kind, path.stem] != path]
    if (folder / "splits.json").exists():
        try:
            splits = json.loads((folder / "splits.json").read_text())
            splits = {key: [str(entry) for entry in splits[key]] for key in (*SPLITS, "classes")}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}/splits.json needs lists train, val, test and classes: {error!r}.") from error
    else:
        stems = [path.stem for kind, path in files if kind == "images"]
        random.Random(seed).shuffle(stems)
        tenth = max(1, len(stems) // 10)
        splits = {"train": stems[2 * tenth :], "val": stems[:tenth], "test": stems[tenth : 2 * tenth], "classes": []}
    times = Counter(stem for split in SPLITS for stem in splits[split])
    problems += [f"{stem}: listed {count} times in splits.json" for stem, count in times.items() if count > 1]
    classes = len(splits["classes"]) or 256

    def read(stem: str) -> Pair | str:
        try:
            kind = "images"
            pixels = to_unit_range(read_image(paths.get((kind, stem), Path(kind, stem))))
            kind = "masks"
            labels = np.asarray(read_image(paths.get((kind, stem), Path(kind, stem))))
        except InputError as error:
            return f"{kind}/{stem}: {error}"
        if labels.shape != pixels.shape[:2]:
            return f"{stem}: the image is {pixels.shape[:2]}, the mask {labels.shape}"
        if labels.dtype.kind not in "bui" or labels.min() < 0 or labels.max() >= classes:
            found = f"{labels.dtype} {labels.min()} to {labels.max()}"
            return f"{stem}: the mask has {found}, and classes are 0 to {classes - 1}"
        pixels = (pixels * 255).round().astype(np.uint8)  # 16-bit images too: training needs no more
        return torch.from_numpy(pixels).movedim(-1, 0), torch.from_numpy(labels.astype(np.uint8))

    with ThreadPoolExecutor() as pool:
        results = dict(zip(times, pool.map(read, times), strict=True))
    problems += [result for result in results.values() if isinstance(result, str)]
    pairs = {stem: result for stem, result in results.items() if not isinstance(result, str)}
    if not splits["classes"]:
        labels = sorted({label for _, mask in pairs.values() for label in mask.unique().tolist()})
        splits["classes"] = ["background", "foreground"] if len(labels) < 3 else [f"class_{i}" for i in labels]
        if labels != list(range(len(labels))):
            problems.append(f"the masks have the labels {labels}, not 0, 1, ...: write class indices or a splits.json")
    for split in SPLITS:
        if not any(pairs[stem][1].any() for stem in splits[split] if stem in pairs):
            problems.append(f"the {split} split is empty, or its masks are")
    if problems:
        raise InputError(f"{folder} has {len(problems)} problems:\n  " + "\n  ".join(problems))
    return pairs, splits


class Course(Dataset):
    """A whole training as one list: item i is the i-th image shown, changed by random numbers that depend on i alone.

    So neither the number of workers nor that of processes nor a restart makes a difference.
    """

    def __init__(self, pairs: Sequence[Pair], length: int, size: int, upright: bool, seed: int) -> None:
        self.pairs, self.seed = pairs, seed
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-length // len(pairs))
        self.order = torch.cat([torch.randperm(len(pairs), generator=generator) for _ in range(epochs)])
        turns = [] if upright else [v2.RandomVerticalFlip(), v2.RandomApply([v2.RandomRotation((90, 90))])]
        small = v2.RandomAffine(15, (0.05, 0.05), (0.8, 1.25), interpolation=v2.InterpolationMode.BILINEAR)
        colour = [v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1), v2.RandomGrayscale(0.1)]
        crop = v2.RandomCrop(size, pad_if_needed=True)
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip(), *turns, small, *colour])

    def __getitem__(self, i: int) -> Pair:
        image, mask = self.pairs[self.order[i]]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.seed << 32) + i)
            return self.augment(tv_tensors.Image(image), tv_tensors.Mask(mask))


class Objective(nn.Module):
    """Images (N, C, S, S) and masks (N, S, S), uint8 -> loss; one module, so that DDP and the compiler see it all."""

    def __init__(self, model: MSAUnet) -> None:
        super().__init__()
        self.model = model
        self.normalise = v2.Normalize(model.config.mean, model.config.std)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        x = self.normalise(images.float() / 255).contiguous(memory_format=torch.channels_last)
        return segmentation_loss(self.model(x), masks)


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice of (N, K, H, W) logits against (N, H, W) labels, the mean over images.

    A mean over images, so that equal shares on several processes average to what the whole batch gives. Dice counts
    the foreground classes that an image has: of an absent one it says nothing about how wrong a prediction is.
    """
    logits, classes = logits.float(), logits.shape[1]
    if classes == 1:
        entropy = F.binary_cross_entropy_with_logits(logits[:, 0], target.float())
        p, t = logits.sigmoid(), target[:, None].float()
    else:
        entropy = F.cross_entropy(logits, target.long())
        p, t = logits.softmax(1)[:, 1:], F.one_hot(target.long(), classes).movedim(-1, 1)[:, 1:].float()
    area = t.sum((2, 3))  # (N, K or K - 1)
    missed = 1 - 2 * (p * t).sum((2, 3)) / (p.sum((2, 3)) + area).clamp(min=1)
    return entropy + ((missed * (area > 0)).sum(1) / (area > 0).sum(1).clamp(min=1)).mean()


def evaluate(model: MSAUnet, pairs: Sequence[Pair], accelerator: Accelerator) -> np.ndarray:
    """(images, foreground classes, SCORES) at full size, NaN for a class that neither the mask nor the network has."""
    scores = torch.zeros(len(pairs), max(1, model.config.num_classes - 1), len(SCORES), device=accelerator.device)
    for i in range(accelerator.process_index, len(pairs), accelerator.num_processes):
        result = predict(model, pairs[i][0])
        for k, label in enumerate(result.foreground):
            one = [side[None, None] == label for side in (torch.from_numpy(result.labels), pairs[i][1])]
            if not (one[0] | one[1]).any():
                scores[i, k] = torch.nan
                continue
            nsd = compute_surface_dice(*one, [TOLERANCE], include_background=True)
            values = dice_score(*one, num_classes=1, average="none"), mean_iou(*one, num_classes=1), nsd
            scores[i, k] = torch.tensor([value.item() for value in values])
    return accelerator.reduce(scores).cpu().numpy()  # each process has filled its rows


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    with replacing(path) as part, part.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def draw_curves(path: Path, history: list[list[float]]) -> None:
    epochs, _, losses, dice, _ = zip(*history, strict=True)
    figure = Figure((8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, losses, marker=".")
    left.set(xlabel="epoch", ylabel="training loss")
    right.plot(epochs, dice, marker=".")
    right.set(xlabel="epoch", ylabel="validation Dice")
    with replacing(path) as part:
        figure.savefig(part, format="png")


def draw_predictions(path: Path, model: MSAUnet, pairs: dict[str, Pair]) -> None:
    """A row per image: as it is, with its mask, with what the network finds."""
    figure = Figure((9, 3 * len(pairs)), layout="constrained")
    for axes, (title, (image, mask)) in zip(figure.subplots(len(pairs), 3, squeeze=False), pairs.items(), strict=True):
        found = predict(model, image)
        pictures = (found.image, replace(found, labels=mask.numpy()).overlay(), found.overlay())
        for axis, picture, name in zip(axes, pictures, (title, "mask", "network"), strict=True):
            axis.imshow(picture)
            axis.set_title(name, fontsize=8)
            axis.axis("off")
    with replacing(path) as part:
        figure.savefig(part, format="png")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path)
    add("output", type=Path)
    add("--from", dest="checkpoint", help="registry name, Hub id or folder to start from, instead of --encoder")
    add("--encoder", default="tf_efficientnet_lite0", help="'msa' or any architecture of timm")
    add("--encoder-weights", default="timm", help="timm (download), none, or a .safetensors file; 'msa' has none")
    add("--decoder-channels", type=int, nargs="+", default=(), help="width per level, finest first")
    add("--channels", type=int, choices=(1, 3), help="of the network's input; default: the checkpoint's, or 3")
    add("--size", type=int, default=192, help="side of the training crops in pixels")
    add("--upright", action="store_true", help="the pictures have an up and a down: do not turn them over")
    add("--epochs", type=int, default=30)
    add("--batch", type=int, default=8, help="images per step, over all processes")
    add("--accumulate", type=int, default=1, help="passes that a step's images go through the network in")
    add("--lr", type=float, default=1e-3)
    add("--encoder-lr-scale", type=float, default=1.0)
    add("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: as `accelerate launch` says, else no")
    add("--compile", action="store_true", help="torch.compile: slow to start, then faster")
    add("--workers", type=int, default=4 if torch.cuda.is_available() else 0, help="that augment, per process")
    add("--seed", type=int, default=0)
    add("--dataset", default="", help="name of the data; default: the folder's")
    add("--dataset-licence", default="", help="SPDX identifier, for example CC0-1.0")
    add("--licence", default="", help="SPDX identifier of the weights, for example apache-2.0")
    return parser.parse_args(argv)


def build(args: argparse.Namespace, splits: dict[str, list[str]]) -> MSAUnet:
    """The network to start from; of two classes, the second against the rest."""
    others = 1 if len(splits["classes"]) == 2 else 0
    background, names = splits["classes"][:others], splits["classes"][others:]
    if args.checkpoint:
        if not (args.data / "splits.json").exists():
            model = MSAUnet.from_pretrained(args.checkpoint, in_channels=args.channels)
            if model.config.num_classes == len(names):
                splits["classes"] = [*background, *model.config.class_names]  # nothing says that they are others
                return model
        return MSAUnet.from_pretrained(args.checkpoint, class_names=names, in_channels=args.channels)
    weights = {"timm": args.encoder != "msa", "none": False}.get(args.encoder_weights, args.encoder_weights)
    options = {"in_channels": args.channels or 3, "decoder_channels": args.decoder_channels, "encoder_weights": weights}
    return MSAUnet(args.encoder, num_classes=len(names), class_names=names, **options)


def train(args: argparse.Namespace, accelerator: Accelerator, command: str) -> None:
    pairs, splits = read_folder(args.data, args.seed)
    last = args.output.with_name(args.output.name + ".last.pt")
    free = ("data", "output", "workers", "compile", "dataset", "dataset_licence", "licence")  # may change on the way
    choices = {k: str(v) for k, v in vars(args).items() if k not in free}
    choices["splits"] = hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:8]  # no test image may change sides
    state = {"choices": choices, "step": 0, "loss": 0.0, "seconds": 0.0, "history": [], "best": {}, "best_dice": -1.0}
    if last.exists():
        state = torch.load(last, map_location="cpu", weights_only=True)
        if other := [f"{k} {v}" for k, v in state["choices"].items() if choices.get(k) != v]:
            raise ConfigError(f"{last} is of a run with {', '.join(other)}: repeat that, or delete it to start anew.")
    elif (args.output / "scores.csv").exists():
        raise ConfigError(f"{args.output} holds the result of another run: choose a new folder.")

    set_seed(args.seed)
    model = build(args, splits)
    accelerator.print(model.load_report or f"{sum(p.numel() for p in model.parameters()):,} parameters")
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = convert_sync_batchnorm(model)  # the CPU has none: each process normalises by what it sees
    model.to(accelerator.device, memory_format=torch.channels_last)
    c = model.config.in_channels
    raw = replace(model.config, mean=(0.0,) * c, std=(1.0,) * c)  # as many channels as the network takes, still uint8
    for stem, (image, mask) in pairs.items():
        pairs[stem] = ((prepare(to_unit_range(image), raw)[0] * 255).round().byte(), mask)
    data = {split: [pairs[stem] for stem in splits[split]] for split in SPLITS}

    epoch = max(1, round(len(data["train"]) / args.batch))  # in steps; all batches are full
    steps = args.epochs * epoch
    warm_up = max(1, round(0.05 * steps))
    course = Course(data["train"], steps * args.batch, args.size, args.upright, args.seed)
    todo = range(state["step"] * args.batch, steps * args.batch)
    loader = DataLoader(course, args.batch // args.accumulate, sampler=todo, num_workers=args.workers)
    optimizer = torch.optim.AdamW(model.param_groups(args.lr, args.encoder_lr_scale), weight_decay=1e-2, fused=True)
    cosine = {"t_initial": steps + 1 - warm_up, "warmup_t": warm_up, "warmup_prefix": True, "t_in_epochs": False}
    schedule = CosineLRScheduler(optimizer, **cosine)
    objective, optimizer, loader = accelerator.prepare(Objective(model), optimizer, loader)
    stateful = {"model": model, "optimizer": optimizer, "scaler": accelerator.scaler}
    stateful = {name: thing for name, thing in stateful.items() if thing is not None}
    if last.exists():
        for name, thing in stateful.items():
            thing.load_state_dict(state.pop(name))

    signal.signal(signal.SIGTERM, lambda *_: accelerator.set_trigger())
    start = time.perf_counter() - state["seconds"]
    loss = torch.tensor(state["loss"], device=accelerator.device)  # the sum of the epoch's steps so far
    dice = state["history"][-1][3] if state["history"] else float("nan")
    pace = 0.5 if sys.stderr.isatty() else 30  # seconds
    bar = tqdm(total=steps, initial=state["step"], mininterval=pace, disable=not accelerator.is_main_process)
    objective.train()
    for i, (images, masks) in enumerate(loader if todo else (), state["step"] * args.accumulate):
        torch.manual_seed((args.seed << 32) + i * accelerator.num_processes + accelerator.process_index)  # for dropout
        with accelerator.accumulate(objective):
            part_loss = objective(images, masks)
            accelerator.backward(part_loss)
            schedule.step_update(state["step"] + 1)
            optimizer.step()
            optimizer.zero_grad()
        loss += part_loss.detach() / args.accumulate
        if not accelerator.sync_gradients:
            continue
        state["step"] += 1
        done = (state["step"] - 1) % epoch + 1
        if bar.update():  # it is time to show it; every step would make a GPU wait
            bar.set_postfix(loss=f"{loss.item() / done:.3f}", val_dice=f"{dice:.3f}")
        stopped = accelerator.check_trigger()
        if done < epoch and not stopped:
            continue
        state["loss"] = accelerator.reduce(loss, "mean").item()
        if not np.isfinite(state["loss"]):
            raise ConfigError(f"The loss is {state['loss']} at step {state['step']}: try a lower --lr than {args.lr}.")
        if done == epoch:
            broadcast(list(model.buffers()))  # the first process's batch-norm statistics are those that are stored
            dice = float(np.nanmean(evaluate(model, data["val"], accelerator)[..., 0]))
            if better := dice > state["best_dice"]:
                state |= {"best_dice": dice, "best": {name: as_stored(t) for name, t in model.state_dict().items()}}
            row = [state["step"] // epoch, state["step"], state["loss"] / epoch, dice, time.perf_counter() - start]
            state["history"].append([round(value, 5) for value in row])
            state["loss"] = 0.0
            loss.zero_()
            if accelerator.is_main_process:
                args.output.mkdir(parents=True, exist_ok=True)
                header = ("epoch", "step", "loss", "val_dice", "seconds")
                write_csv(args.output / "training.csv", header, state["history"])
                draw_curves(args.output / "training.png", state["history"])
                if better:
                    model.save_pretrained(args.output, dtype=torch.float16)
                    shown = {stem: pairs[stem] for stem in splits["val"][:4]}
                    draw_predictions(args.output / "validation.png", model, shown)
        state["seconds"] = time.perf_counter() - start
        if accelerator.is_main_process:
            last.parent.mkdir(parents=True, exist_ok=True)
            with replacing(last) as part:
                torch.save(state | {name: thing.state_dict() for name, thing in stateful.items()}, part)
        accelerator.wait_for_everyone()
        if stopped:
            accelerator.print(f"stopped after step {state['step']} of {steps}: the same command goes on from there")
            raise SystemExit(128 + signal.SIGTERM)
    bar.close()

    model.load_state_dict(state["best"])
    scores = evaluate(model, data["test"], accelerator)
    if accelerator.is_main_process:
        minutes = f"{state['seconds'] / 60:.1f} minutes on {accelerator.num_processes} x {accelerator.device.type}"
        publish(args, model, splits, pairs, scores, f"{command}\n# {steps} steps, {minutes}")
        print(f"{args.output} is ready: {minutes}, {dict(model.config.metrics)}")


def as_stored(tensor: Tensor) -> Tensor:
    return (tensor.half() if tensor.is_floating_point() else tensor.clone()).cpu()


def publish(args, model, splits, pairs, scores: np.ndarray, command: str) -> None:
    """Fill the folder: scores and splits, pictures of typical and of the worst test images, weights, card."""
    there = ~np.isnan(scores[..., 0])
    stems, names = splits["test"], splits["classes"][1:]
    rows = [[stems[i], names[k], *scores[i, k].round(5)] for i, k in np.argwhere(there)]
    write_csv(args.output / "scores.csv", ("image", "class", *SCORES), rows)
    with replacing(args.output / "splits.json") as part:
        part.write_text(json.dumps(splits, indent=1) + "\n")
    dice = {stems[i]: scores[i, there[i], 0].mean() for i in np.flatnonzero(there.any(1))}
    ranked = sorted(dice, key=dice.__getitem__)
    for name, first in {"worst": 0, "typical": max(0, len(ranked) // 2 - 2)}.items():
        shown = {f"{stem[:24]}: Dice {dice[stem]:.3f}": pairs[stem] for stem in ranked[first : first + 4]}
        draw_predictions(args.output / f"{name}.png", model, shown)

    means = {f"test_{name}": round(float(scores[there, m].mean()), 4) for m, name in enumerate(SCORES)}
    values = {name: scores[..., m] for m, name in enumerate(means)}  # (images, classes) each
    if len(names) > 1:
        values |= {f"test_dice, {name}": scores[:, [k], 0] for k, name in enumerate(names) if there[:, k].any()}
    drawn = np.random.default_rng(0).integers(len(scores), size=(10_000, len(scores)))  # images, not rows
    table = ""
    for name, value in values.items():
        count = (~np.isnan(value)).sum(1)
        low, high = np.quantile(np.nansum(value, 1)[drawn].sum(1) / count[drawn].sum(1).clip(1), (0.025, 0.975))
        table += f"| {name} | {(count > 0).sum()} | {np.nanmean(value):.4f} | {low:.4f} to {high:.4f} |\n"
    source = {"dataset": args.dataset or args.data.resolve().name, "dataset_licence": args.dataset_licence}
    size = (args.size, args.size)
    model.config = replace(model.config, **source, input_size=size, licence=args.licence, metrics=means)
    model.save_pretrained(args.output, dtype=torch.float16)
    readme = args.output / "README.md"
    text = readme.read_text(encoding="utf-8") + CARD.format(images=len(scores), table=table, command=command)
    with replacing(readme) as part:
        part.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulate,
        dynamo_backend="inductor" if args.compile else None,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    many = accelerator.num_processes
    launch = f"torchrun --nproc-per-node {many}" if many > 1 else "python"
    try:
        if min(args.epochs, args.size, args.batch, args.accumulate) < 1 or args.batch % (args.accumulate * many):
            raise ConfigError(
                f"--batch {args.batch} must be a multiple of --accumulate {args.accumulate} x {many} processes."
            )
        train(args, accelerator, f"{launch} examples/finetune.py {shlex.join(argv)}")
    except (CheckpointError, ConfigError, EncoderError, InputError) as error:
        if accelerator.is_main_process:
            print(f"finetune: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    main()
