"""Train MSA-Unet on a folder of images and masks; the result is a folder that `MSAUnet.from_pretrained` loads.

    python examples/finetune.py DATA OUT --encoder tf_efficientnet_lite0 --encoder-weights lite0.safetensors

DATA holds images/ and masks/ (8-bit PNG, value = class index, same file stem) and splits.json, {"train": [stems],
"val": [stems], "test": [stems], "classes": ["background", "nucleus"]}. After each epoch the validation split is scored
at full size, and the best epoch is kept. The test split is scored once, at the end, with those weights. A run that was
killed goes on from its last epoch.
"""

import argparse
import csv
import json
import math
import random
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from msa_unet import MSAUnet, predict
from msa_unet.inference import prepare, read_image, to_unit_range


class Crops(Dataset):
    """Random square crops, `size` pixels after a random change of scale, flipped, turned and with shifted colours."""

    def __init__(self, folder: Path, stems: list[str], size: int, colour: float) -> None:
        self.size = size
        self.pairs = [load_pair(folder, stem) for stem in stems]  # uint8, small enough to keep
        self.look = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                v2.RandomApply([v2.RandomAffine(degrees=20, shear=5)], p=0.3),
                v2.ColorJitter(colour, colour, colour, colour / 4),
                v2.RandomGrayscale(0.2 if colour else 0),
            ]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture, mask = self.pairs[index]
        image, target = tv_tensors.Image(picture), tv_tensors.Mask(mask)
        side = round(self.size / random.uniform(0.7, 1.5))
        crop = v2.Compose([v2.RandomCrop(side, pad_if_needed=True), v2.Resize((self.size, self.size), antialias=True)])
        image, target = self.look(*crop(image, target))
        turns = random.randrange(4)
        return torch.rot90(image, turns, (1, 2)), torch.rot90(target, turns, (0, 1))


def load_pair(folder: Path, stem: str) -> tuple[Tensor, Tensor]:
    """Image (3, H, W) and mask (H, W), both uint8."""
    path = next(p for p in (folder / "images").glob(f"{stem}.*"))
    picture = torch.from_numpy(np.array(read_image(path).convert("RGB"))).permute(2, 0, 1)
    mask = torch.from_numpy(np.array(Image.open(folder / "masks" / f"{stem}.png")))
    if picture.shape[1:] != mask.shape:
        raise SystemExit(f"{stem}: the image is {tuple(picture.shape[1:])} and its mask {tuple(mask.shape)}.")
    return picture, mask


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice per image and class; a class absent from an image asks for no pixels of it there."""
    if logits.shape[1] == 1:
        truth = target[:, None].to(logits.dtype)
        entropy, guess = F.binary_cross_entropy_with_logits(logits, truth), logits.sigmoid()
    else:
        truth = F.one_hot(target.long(), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        entropy, guess = F.cross_entropy(logits, target.long()), logits.softmax(1)
    overlap, total = (guess * truth).sum((2, 3)), (guess + truth).sum((2, 3))
    return entropy + 1 - ((2 * overlap + 1) / (total + 1)).mean()


def dice_scores(labels: np.ndarray, truth: np.ndarray, classes: dict[int, str]) -> dict[str, tuple[float, float]]:
    """Dice and IoU per class that the truth or the prediction holds; a class absent from both has no score."""
    scores = {}
    for label, name in classes.items():
        a, b = labels == label, truth == label
        if union := (a | b).sum():
            both = (a & b).sum()
            scores[name] = (2 * both / (a.sum() + b.sum()), both / union)
    return scores


def evaluate(model: MSAUnet, folder: Path, stems: list[str]) -> list[tuple[str, str, float, float]]:
    """(stem, class, Dice, IoU) of every image at its full size."""
    rows = []
    for stem in stems:
        picture, mask = load_pair(folder, stem)
        result = predict(model, picture)
        for name, (dice, iou) in dice_scores(result.labels, mask.numpy(), result.foreground).items():
            rows.append((stem, name, dice, iou))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--encoder", default="tf_efficientnet_lite0")
    parser.add_argument("--encoder-weights", default="timm", help="timm (download), none, or a .safetensors file")
    parser.add_argument("--size", type=int, default=192, help="side of the training crops in pixels")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--encoder-lr-scale", type=float, default=0.3)
    parser.add_argument("--colour", type=float, default=0.3, help="strength of the colour changes, 0 to 0.5")
    parser.add_argument("--dataset", default="", help="name of the data for the config; default: the folder's")
    parser.add_argument("--dataset-licence", default="", help="SPDX identifier, for example CC0-1.0")
    parser.add_argument("--licence", default="", help="SPDX identifier of the weights, for example apache-2.0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    random.seed(args.seed)
    torch.manual_seed(args.seed)
    splits = json.loads((args.data / "splits.json").read_text())
    names = splits["classes"]
    single = len(names) == 2
    weights = {"timm": True, "none": False}.get(args.encoder_weights, args.encoder_weights)
    model = MSAUnet(
        args.encoder,
        num_classes=1 if single else len(names),
        class_names=names[1:] if single else names,
        encoder_weights=weights,
    ).to(args.device, memory_format=torch.channels_last)
    crops = Crops(args.data, splits["train"], args.size, args.colour)
    loader = DataLoader(crops, args.batch, shuffle=True, drop_last=len(crops) > args.batch)
    optimizer = torch.optim.AdamW(model.param_groups(args.lr, args.encoder_lr_scale), weight_decay=1e-2)
    steps = args.epochs * len(loader)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * s / steps)))
    )

    args.output.mkdir(parents=True, exist_ok=True)
    last, log = args.output / "last.pt", args.output / "log.csv"
    first, best, best_epoch, best_weights, spent = 0, -1.0, 0, {}, 0.0
    if last.exists():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first, best, best_epoch, best_weights, spent = (
            state[k] for k in ("epoch", "best", "best_epoch", "weights", "s")
        )
        torch.manual_seed(args.seed + first)
        random.seed(args.seed + first)
    for epoch in range(first, args.epochs):
        start, losses = time.perf_counter(), []
        model.train()
        bar = tqdm(loader, desc=f"epoch {epoch + 1} of {args.epochs}", mininterval=5)
        for images, targets in bar:
            x = torch.cat([prepare(to_unit_range(image), model.config) for image in images])
            x = x.to(args.device, memory_format=torch.channels_last)
            loss = segmentation_loss(model(x), targets.to(args.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", best=f"{best:.4f}")
        score = float(np.mean([row[2] for row in evaluate(model, args.data, splits["val"])]))
        spent += time.perf_counter() - start
        if score > best:
            best, best_epoch = score, epoch + 1
            best_weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        left = spent / (epoch + 1) * (args.epochs - epoch - 1)
        line = f"{epoch + 1},{np.mean(losses):.4f},{score:.4f},{spent:.0f}"
        print(f"epoch,loss,validation Dice,seconds: {line}; best {best:.4f}; {left / 60:.0f} min left", flush=True)
        with log.open("a") as file:
            file.write(line + "\n")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        state |= {"epoch": epoch + 1, "best": best, "best_epoch": best_epoch, "weights": best_weights, "s": spent}
        torch.save(state, args.output / "last.tmp")
        (args.output / "last.tmp").replace(last)

    model.load_state_dict(best_weights)
    model.half().float()  # scored as it will be stored
    rows = evaluate(model, args.data, splits["test"])
    with (args.output / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "class", "dice", "iou"])
        writer.writerows((stem, name, f"{dice:.5f}", f"{iou:.5f}") for stem, name, dice, iou in rows)
    dice = [row[2] for row in rows]
    metrics = {
        "test_dice": round(float(np.mean(dice)), 4),
        "test_iou": round(float(np.mean([row[3] for row in rows])), 4),
    }
    model.config = replace(
        model.config,
        input_size=(args.size, args.size),
        dataset=args.dataset or args.data.name,
        dataset_licence=args.dataset_licence,
        licence=args.licence,
        metrics=metrics,
    )
    model.save_pretrained(args.output, dtype=torch.float16)
    print(f"epoch {best_epoch} of {args.epochs}, validation Dice {best:.4f}, {spent:.0f} s of training")
    print(f"test Dice {np.mean(dice):.4f}, the mean of {len(rows)} scores")
    print("trained with: python examples/finetune.py " + shlex.join(sys.argv[1:]))


if __name__ == "__main__":
    main()
