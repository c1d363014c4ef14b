"""The command line: `msa-unet predict|list|info|export`."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from tqdm import tqdm

from .errors import CheckpointError, ConfigError, EncoderError, ExportError, InputError
from .export import Precision, export
from .files import replacing
from .inference import Segmentation, predict, read_image
from .model import MSAUnet
from .registry import add_info_parser, add_list_parser

DEFAULT_MODEL = "tf_efficientnet_lite0.dsb2018"
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 if anything asked for was not done."""
    parser = argparse.ArgumentParser(prog="msa-unet", description="Segment medical images with MSA-Unet.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("predict", help="segment images")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="PNG, JPEG or TIFF files, or folders")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the results")
    command.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME_OR_PATH", help="default: %(default)s")
    command.add_argument("--threshold", type=float, metavar="T", help="foreground probability, one-class models (0.5)")
    command.add_argument("--overlay", action="store_true", help="also write the image with the classes drawn on it")
    command.add_argument("--probabilities", action="store_true", help="also write (K, H, W) float32 as .npy")
    command.add_argument("--tile", type=int, metavar="N", help="go through large images in windows of N pixels")
    command.add_argument("--tta", action="store_true", help="average over flips and quarter turns (8 x the time)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--json", action="store_true", help="print one JSON object per image")
    command.set_defaults(run=run_predict)
    add_list_parser(commands)
    add_info_parser(commands)
    command = commands.add_parser("export", help="write a network as ONNX or for torch.export, to run without msa_unet")
    command.add_argument("model", metavar="NAME_OR_PATH")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="ends in .onnx or .pt2")
    command.add_argument("--dtype", choices=get_args(Precision), default="float32")
    command.add_argument("--aoti", action="store_true", help="compile for this machine's CPU (FILE.pt2)")
    command.add_argument(
        "--calibration", nargs="+", type=Path, default=[], metavar="IMAGE", help="files or folders, for int8"
    )
    command.set_defaults(run=run_export)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except (CheckpointError, ConfigError, EncoderError, ExportError, InputError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return 130
    return status


def run_predict(args: argparse.Namespace) -> int:
    """Segment every image, report each that cannot be done, go on with the others."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        return _complain("--device cuda: this machine or this build of torch has no CUDA; leave it at auto.")
    if args.tile is not None and args.tile < 32:
        return _complain(f"--tile is {args.tile}; windows need at least 32 pixels.")
    if args.threshold is not None and not 0 < args.threshold < 1:
        return _complain(f"--threshold is {args.threshold}; it must lie between 0 and 1.")
    status = 0
    jobs: dict[Path, Path] = {}  # stem of the outputs -> image
    for given in args.images:
        if given.is_dir() and given.resolve() == args.output.resolve():
            return _complain(
                f"-o {args.output} is also an input: choose another folder, results would be segmented too."
            )
        found = 0
        for image, stem in _images(given, args.output):
            found += 1
            if stem in jobs:
                stem = stem.with_name(image.name)  # a.png and a.jpg: keep the whole name
            if stem in jobs:
                status = _complain(f"{image}: {jobs[stem]} has the same name; segment them into separate folders.")
            jobs.setdefault(stem, image)
        if not found:
            status = _complain(f"{given}: no PNG, JPEG or TIFF image in this folder.")
    model = MSAUnet.from_pretrained(args.model).to(device)
    if args.threshold is not None and model.config.num_classes > 1:
        return _complain(f"--threshold is for models of one class; {args.model} has {model.config.num_classes}.")
    for stem, image in tqdm(jobs.items(), disable=len(jobs) < 2, unit="image"):
        try:
            result = predict(model, read_image(image), threshold=args.threshold or 0.5, tile=args.tile, tta=args.tta)
            _write(result, args.output / stem, args.overlay, args.probabilities)
        except (InputError, OSError) as error:
            status = _complain(f"{image}: {error}")
            continue
        tqdm.write(_summary(image, result, args.json), file=sys.stdout)
    return status


def run_export(args: argparse.Namespace) -> int:
    """Write a checkpoint in another format."""
    paths = [path for given in args.calibration for path, _ in _images(given, args.output)]
    images = []
    try:
        for path in paths:
            images.append(read_image(path))
    except InputError as error:
        return _complain(f"{path}: {error}")
    model = MSAUnet.from_pretrained(args.model)
    try:
        export(model, args.output, dtype=args.dtype, aoti=args.aoti, calibration=images)
    except OSError as error:
        return _complain(f"{args.output}: {error}")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


def _images(given: Path, output: Path) -> Iterator[tuple[Path, Path]]:
    """Image files below a folder, or the file itself, each with the stem of its outputs relative to OUT."""
    if not given.is_dir():
        yield given, Path(given.stem)
        return
    for path in sorted(given.rglob("*")):
        inside_output = output.resolve() in path.resolve().parents
        if path.suffix.lower() in SUFFIXES and path.is_file() and not inside_output:
            yield path, path.relative_to(given).with_suffix("")


def _write(result: Segmentation, stem: Path, overlay: bool, probabilities: bool) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    with replacing(stem.with_name(f"{stem.name}_mask.png")) as path:
        result.label_image().save(path, "PNG")
    if overlay:
        with replacing(stem.with_name(f"{stem.name}_overlay.png")) as path:
            result.overlay().save(path, "PNG")
    if probabilities:
        with replacing(stem.with_name(f"{stem.name}_probabilities.npy")) as path, path.open("wb") as file:
            np.save(file, result.probabilities)


def _summary(image: Path, result: Segmentation, as_json: bool) -> str:
    height, width = result.labels.shape
    areas = result.areas()
    shares = {name: pixels / (height * width) for name, pixels in areas.items()}
    if as_json:
        return json.dumps({"image": str(image), "width": width, "height": height, "pixels": areas, "share": shares})
    classes = ", ".join(f"{name} {pixels} pixels ({shares[name]:.1%})" for name, pixels in areas.items())
    return f"{image}: {width} x {height}, {classes}"


def _complain(message: str) -> int:
    tqdm.write(f"msa-unet: {message}", file=sys.stderr)
    return FAILED
