"""The command line: `msa-unet predict|list|info|export`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

from .errors import CheckpointError, ConfigError, EncoderError, ExportError, InputError
from .export import Precision, export
from .folders import find_images, results_of, segment_files
from .inference import MIN_TILE, Segmentation, check_threshold, read_image
from .model import MSAUnet
from .registry import add_info_parser, add_list_parser

DEFAULT_MODEL = "tf_efficientnet_lite0.dsb2018"
SOME_FAILED, FAILED = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if an image could not be segmented, 2 if none was tried."""
    parser = argparse.ArgumentParser(prog="msa-unet", description="Segment medical images with MSA-Unet.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("predict", help="segment images")
    command.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="PNG, JPEG, TIFF or DICOM files, or folders"
    )
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the results")
    command.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME_OR_PATH", help="default: %(default)s")
    command.add_argument("--threshold", type=float, metavar="T", help="foreground probability, one-class models (0.5)")
    command.add_argument("--overlay", action="store_true", help="also write the image with the classes drawn on it")
    command.add_argument("--probabilities", action="store_true", help="also write (K, H, W) float32 as .npy")
    command.add_argument("--tile", type=int, metavar="N", help="go through large images in windows of N pixels")
    command.add_argument("--tta", action="store_true", help="average over flips and quarter turns (8 x the time)")
    command.add_argument(
        "--batch", type=int, default=1, metavar="N", help="images of one size, or windows, run together"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="do again what has results; for new options or models"
    )
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
    """Segment every image that is not done yet, go on where one cannot be, and say at the end which those were."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        return _complain("--device cuda: this machine or this build of torch has no CUDA; leave it at auto.")
    if args.tile is not None and args.tile < MIN_TILE:
        return _complain(f"--tile is {args.tile}; windows need at least {MIN_TILE} pixels.")
    if args.batch < 1:
        return _complain(f"--batch is {args.batch}; it is a number of images, at least 1.")
    if args.threshold is not None:
        check_threshold(args.threshold)
    jobs, failures = find_images(args.images, args.output)
    model = MSAUnet.from_pretrained(args.model).to(device)
    if args.threshold is not None and model.config.num_classes > 1:
        return _complain(f"--threshold is for models of one class; {args.model} has {model.config.num_classes}.")
    options = {"threshold": args.threshold or 0.5, "tile": args.tile, "tta": args.tta, "batch": args.batch}
    kinds = {"overlay": args.overlay, "probabilities": args.probabilities}
    done = {stem for stem in jobs if not args.overwrite and all(path.exists() for path in results_of(stem, **kinds))}
    if done:
        tqdm.write(
            f"msa-unet: {len(done)} images have their results already (--overwrite does them again).", sys.stderr
        )
    todo = {stem: image for stem, image in jobs.items() if stem not in done}
    for image, result in tqdm(
        segment_files(model, todo, **kinds, **options), total=len(todo), disable=len(todo) < 2, unit="image"
    ):
        if isinstance(result, Exception):
            failures[image] = str(result)
        else:
            tqdm.write(_summary(image, result, args.json), file=sys.stdout)
    for image, reason in failures.items():
        _complain(f"{image}: {reason}")
    return SOME_FAILED if failures else 0


def run_export(args: argparse.Namespace) -> int:
    """Write a checkpoint in another format."""
    jobs, failures = find_images(args.calibration, args.output)
    for given, reason in failures.items():
        return _complain(f"{given}: {reason}")
    images = []
    try:
        for path in jobs.values():
            images.append(read_image(path))
    except (InputError, OSError) as error:
        return _complain(f"{path}: {error}")
    model = MSAUnet.from_pretrained(args.model)
    try:
        export(model, args.output, dtype=args.dtype, aoti=args.aoti, calibration=images)
    except OSError as error:
        return _complain(f"{args.output}: {error}")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


def _summary(image: Path, result: Segmentation, as_json: bool) -> str:
    height, width = result.labels.shape
    areas = result.areas()
    shares = {name: pixels / (height * width) for name, pixels in areas.items()}
    square_mm = result.areas_mm2() if result.spacing else {}
    if as_json:
        line = {"image": str(image), "width": width, "height": height, "pixels": areas, "share": shares}
        return json.dumps(line | ({"spacing_mm": result.spacing, "mm2": square_mm} if result.spacing else {}))
    classes = ", ".join(
        f"{name} {pixels} pixels ({shares[name]:.1%}{f', {square_mm[name]:.1f} mm2' if square_mm else ''})"
        for name, pixels in areas.items()
    )
    return f"{image}: {width} x {height}, {classes}"


def _complain(message: str) -> int:
    tqdm.write(f"msa-unet: {message}", file=sys.stderr)
    return FAILED
