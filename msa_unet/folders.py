"""Folders of images: which they hold, and the results of each, written whole or not at all."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError
from .files import replacing
from .inference import Segmentation, predict, read_image
from .model import MSAUnet

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm"}


def find_images(inputs: Sequence[Path], output: Path) -> tuple[dict[Path, Path], dict[Path, str]]:
    """The images among `inputs`, files or folders, in an order that depends on their names alone.

    Returns:
        jobs: where the results of an image go, `output`/<its path in the folder, without suffix>, -> the image.
        failures: input -> why it is not among them.

    Raises:
        InputError: `output` is one of `inputs`.
    """
    jobs: dict[Path, Path] = {}
    failures = {}
    for given in inputs:
        if given.is_dir() and given.resolve() == output.resolve():
            raise InputError(f"{output} is also an input: choose another folder, results would be segmented too.")
        paths = sorted(given.rglob("*")) if given.is_dir() else [given]
        if given.is_dir():  # results of an earlier run may lie below it
            inside = output.resolve()
            paths = [
                p for p in paths if p.suffix.lower() in SUFFIXES and p.is_file() and inside not in p.resolve().parents
            ]
        if not paths:
            failures[given] = "no PNG, JPEG, TIFF or DICOM image in this folder."
        for path in paths:
            stem = output / (path.relative_to(given) if given.is_dir() else Path(path.name)).with_suffix("")
            stem = stem.with_name(path.name) if stem in jobs else stem  # a.png and a.jpg: keep the whole name
            if stem in jobs:
                failures[path] = f"{jobs[stem]} has the same name; segment them into separate folders."
            jobs.setdefault(stem, path)
    return jobs, failures


def results_of(stem: Path, overlay: bool = False, probabilities: bool = False) -> list[Path]:
    """The files that are written for one image."""
    kinds = ["mask.png", *(["overlay.png"] if overlay else []), *(["probabilities.npy"] if probabilities else [])]
    return [stem.with_name(f"{stem.name}_{kind}") for kind in kinds]


def segment_files(
    model: MSAUnet,
    jobs: Mapping[Path, Path],
    *,
    overlay: bool = False,
    probabilities: bool = False,
    batch: int = 1,
    **options: Any,
) -> Iterator[tuple[Path, Segmentation | InputError | OSError]]:
    """Segment and write `jobs` of `find_images`; yields each image with its result, or with what was wrong with it.

    Args:
        model: as in `predict`, like the other `options`.
        jobs: stem of the results -> image.
        overlay: also write the image with the classes drawn on it.
        probabilities: also write (K, H, W) float32 as .npy.
        batch: how many images are read at a time; those of one size run together.
    """
    todo = list(jobs.items())
    for i in range(0, len(todo), batch):
        yield from _segment(model, todo[i : i + batch], overlay, probabilities, batch, options)


def _segment(
    model: MSAUnet,
    jobs: list[tuple[Path, Path]],
    overlay: bool,
    probabilities: bool,
    batch: int,
    options: dict[str, Any],
) -> Iterator[tuple[Path, Segmentation | InputError | OSError]]:
    try:
        results = predict(model, [read_image(path) for _, path in jobs], batch=batch, **options)
        for (stem, _), result in zip(jobs, results, strict=True):
            _write(result, results_of(stem, overlay, probabilities))
    except (InputError, OSError) as error:
        if len(jobs) == 1:
            yield jobs[0][1], error
        else:  # one by one, to find out which
            for job in jobs:
                yield from _segment(model, [job], overlay, probabilities, batch, options)
    else:
        yield from zip([path for _, path in jobs], results, strict=True)


def _write(result: Segmentation, paths: list[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            if path.suffix == ".npy":
                with temporary.open("wb") as file:
                    np.save(file, result.probabilities)
            else:
                picture = result.overlay() if path.stem.endswith("_overlay") else result.label_image()
                picture.save(temporary, "PNG")
