"""From an image of any common type to a segmentation: prepare, run, and read the result."""

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from .config import MSAUnetConfig
    from .model import MSAUnet

MAX_PIXELS = 25_000_000  # without tiles; the activations of a larger image do not fit common machines
MIN_TILE = 32
OVERLAP = 0.25  # of a window's side, or a little more
# Okabe and Ito's colours, told apart by colour-blind readers; repeated from the start for more classes
PALETTE = (
    (0, 158, 115), (230, 159, 0), (86, 180, 233), (213, 94, 0), (240, 228, 66), (0, 114, 178), (204, 121, 167),
)  # fmt: skip

SPACING = "spacing_mm"  # under which `read_image` keeps the size of a pixel in the `info` of a picture

Source = NDArray[Any] | Image.Image | Tensor


@dataclass(frozen=True)
class Segmentation:
    """What `predict` found in one image of H x W pixels with a network of K classes.

    >>> result = predict(model, image)
    >>> result.foreground, result.areas().keys(), result.uncertainty.shape
    ({1: 'nucleus'}, dict_keys(['nucleus']), (64, 96))
    >>> result.with_threshold(0.9).overlay().save("overlay.png")

    Attributes:
        labels: (H, W) uint8 (uint16 above 256 classes); the class index, or for K = 1: 1 foreground, 0 background.
        probabilities: (K, H, W) float32 in [0, 1]; softmax over classes, or for K = 1 the foreground's sigmoid.
        class_names: K names.
        image: (H, W, 3) uint8, the picture as the network saw it, for overlays.
        spacing: millimetres from pixel to pixel, down and across, where the image says so (DICOM does).
    """

    labels: NDArray[Any]
    probabilities: NDArray[np.float32]
    class_names: tuple[str, ...]
    image: NDArray[np.uint8]
    spacing: tuple[float, float] | None = None

    @cached_property
    def uncertainty(self) -> NDArray[np.float32]:
        """(H, W) float32 in [0, 1]; the entropy of the class probabilities over its maximum.

        With `tta` the probabilities are a mean over views, so that places where the views differ count as uncertain.
        """
        p = self.probabilities
        full = p if len(p) > 1 else np.concatenate([1 - p, p])
        return np.asarray(-(full * np.log(np.clip(full, 1e-12, None))).sum(0) / np.log(len(full)), np.float32)

    @property
    def foreground(self) -> dict[int, str]:
        """Label -> class name of every class but the background; for K = 1 the one class is label 1."""
        return foreground(self.class_names)

    def areas(self) -> dict[str, int]:
        """Pixels per foreground class."""
        return areas(self.labels, self.class_names)

    def areas_mm2(self) -> dict[str, float]:
        """Square millimetres per foreground class.

        Raises:
            InputError: the image did not say how large its pixels are.
        """
        if self.spacing is None:
            raise InputError("This image does not say how large its pixels are: areas() counts them.")
        return {name: pixels * self.spacing[0] * self.spacing[1] for name, pixels in self.areas().items()}

    def with_threshold(self, threshold: float) -> "Segmentation":
        """The same probabilities of a network of one class, cut at another threshold; no network runs.

        Raises:
            InputError: `threshold` is not in (0, 1), or there are several classes, which need none.
        """
        if len(self.class_names) > 1:
            raise InputError(f"A threshold is for networks of one class; this one has {len(self.class_names)}.")
        check_threshold(threshold)
        return replace(self, labels=to_labels(self.probabilities, threshold))

    def overlay(self, opacity: float = 0.35) -> Image.Image:
        """The picture with each foreground class tinted and outlined in its colour."""
        picture = self.image.astype(np.float32)
        padded = np.pad(self.labels, 1, mode="edge")
        centre = padded[1:-1, 1:-1]
        neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        outline = np.any([n != centre for n in neighbours], axis=0)
        for label in self.foreground:
            here = centre == label
            colour = np.array(_colour(label), np.float32)
            picture[here] = (1 - opacity) * picture[here] + opacity * colour
            picture[here & outline] = colour
        return Image.fromarray(picture.round().astype(np.uint8))

    def label_image(self) -> Image.Image:
        """The labels as a picture whose pixel values are the labels and whose palette shows them in colour."""
        if self.labels.dtype != np.uint8:
            return Image.fromarray(self.labels)
        picture = Image.fromarray(self.labels).convert("P")
        picture.putpalette([0, 0, 0, *(v for label in range(1, 256) for v in _colour(label))])
        return picture


@overload
def predict(
    model: "MSAUnet",
    image: Source,
    *,
    threshold: float = ...,
    tile: int | None = ...,
    tta: bool = ...,
    batch: int = ...,
) -> Segmentation: ...
@overload
def predict(
    model: "MSAUnet",
    image: list[Source],
    *,
    threshold: float = ...,
    tile: int | None = ...,
    tta: bool = ...,
    batch: int = ...,
) -> list[Segmentation]: ...
def predict(
    model: "MSAUnet",
    image: Source | list[Source],
    *,
    threshold: float = 0.5,
    tile: int | None = None,
    tta: bool = False,
    batch: int = 1,
) -> Segmentation | list[Segmentation]:
    """Segment an image, prepared the way `model.config` says the network was trained.

    >>> result = predict(model, image)  # a picture 96 pixels wide and 64 high
    >>> result.labels.shape, result.probabilities.shape
    ((64, 96), (1, 64, 96))

    Args:
        model: runs on its own device and in its own precision; its training mode is left as it was.
        image: an array (H, W) or (H, W, C), a PIL image, a tensor (C, H, W), or a list of them. uint8 and uint16 are
            scaled by their bit depth, floats must lie in [0, 1].
        threshold: foreground starts above this probability, in (0, 1); only for a network of one class.
        tile: side in pixels of overlapping windows for large images (needs `pip install msa-unet[predict]`, MONAI);
            `predict_large` is for images that do not fit in memory.
        tta: average over the eight flips and quarter turns, at eight times the cost.
        batch: how many images of one size in a row of the list, or windows of one image, run together.

    Raises:
        InputError: the image has a type, shape or values that cannot be segmented, or an option is out of range.
    """
    if not isinstance(image, list):
        return predict(model, [image], threshold=threshold, tile=tile, tta=tta, batch=batch)[0]
    check_threshold(threshold)
    if batch < 1:
        raise InputError(f"batch is {batch}; it is a number of images, at least 1.")
    results = []
    for (height, width, _), alike in groupby(map(to_unit_range, image), key=np.shape):
        if tile is None and height * width > MAX_PIXELS:
            raise InputError(
                f"The image is {width} x {height} pixels: give tile=1024 (--tile 1024) to go through it in windows."
            )
        while pictures := list(islice(alike, 1 if tile else batch)):
            if tile is None:
                x = torch.cat([prepare(picture, model.config) for picture in pictures])
                with evaluating(model):
                    probabilities = vote(model, x, tta).cpu().numpy()
            else:
                rows = window_rows(model, pictures[0].__getitem__, (height, width), tile, tta, batch)
                probabilities = np.concatenate(list(rows), 1)[None]
            for picture, found in zip(pictures, probabilities, strict=True):
                shown = picture[..., : 3 if picture.shape[2] in (3, 4) else 1]  # without alpha
                results.append(
                    Segmentation(
                        labels=to_labels(found, threshold),
                        probabilities=found,
                        class_names=model.config.class_names,
                        image=np.broadcast_to((shown * 255).round().astype(np.uint8), (height, width, 3)),
                    )
                )
    spacings = [getattr(source, "info", {}).get(SPACING) for source in image]
    return [replace(result, spacing=spacing) for result, spacing in zip(results, spacings, strict=True)]


def read_image(path: str | Path) -> Image.Image:
    """The picture in a PNG, JPEG, TIFF or DICOM file, turned upright if the camera noted an orientation.

    >>> image.save("slide.tif")
    >>> read_image("slide.tif").size
    (96, 64)

    Raises:
        InputError: the file is missing, damaged, of another format, has several pages, or is absurdly large.
    """
    try:
        with open(path, "rb") as start:
            if start.read(132)[128:] == b"DICM":
                from .dicom import read_dicom  # pydicom is an extra

                return read_dicom(path)
        with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as file:
            pages = getattr(file, "n_frames", 1)
            if pages > 1:
                raise InputError(f"it has {pages} pages: split it and segment them one by one")
            return ImageOps.exif_transpose(file)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError("there is no such file") from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"it claims too many pixels to be read at once; msa_unet.predict_large reads a TIFF bit by bit: {error}"
        ) from error
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise InputError(f"not a readable PNG, JPEG, TIFF or DICOM: {' '.join(str(error).split())}") from error


def to_unit_range(image: Source, brightest: int | None = None) -> NDArray[np.float32]:
    """Any image as (H, W, C) float32 in [0, 1]; alpha and palettes are resolved.

    uint8 is divided by 255. uint16 is divided by the largest value of the bit depth in use (8, 10, 12, 14 or 16, told
    by the brightest pixel), since cameras store 12-bit pictures in 16-bit files.

    Args:
        image: see `predict`.
        brightest: its largest value, where `image` is only a part of a uint16 picture.

    Raises:
        InputError: another type or rank, an empty image, or floats outside [0, 1].
    """
    if isinstance(image, Image.Image):
        pixels = _pil_array(image)
    elif isinstance(image, Tensor):
        tensor = image.detach().cpu()
        pixels = (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16
        pixels = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels
    else:
        pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise InputError(f"An image is (H, W) or (H, W, C) with at least one pixel, not {pixels.shape}.")
    if pixels.dtype == np.uint8:
        return np.asarray(pixels / np.float32(255))
    if pixels.dtype == np.uint16:
        brightest = int(pixels.max()) if brightest is None else brightest
        depth = next(bits for bits in (8, 10, 12, 14, 16) if brightest < 1 << bits)
        return np.asarray(pixels / np.float32((1 << depth) - 1))
    if not np.issubdtype(pixels.dtype, np.floating):
        raise InputError(
            f"An image of type {pixels.dtype} has no known range: convert it to uint8, uint16 or floats in [0, 1]."
        )
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # also refuses NaN
        raise InputError(
            f"A float image must lie in [0, 1], and this one spans {pixels.min():g} to {pixels.max():g}: rescale it."
        )
    return pixels.astype(np.float32)


def prepare(pixels: NDArray[np.float32], config: "MSAUnetConfig") -> Tensor:
    """(H, W, C) in [0, 1] -> the normalised (1, config.in_channels, H, W) that the network takes.

    Grey is repeated for a network of three channels; colour becomes luminance for a network of one.

    Raises:
        InputError: the channels fit neither way.
    """
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    given, wanted = len(x), config.in_channels
    if given != wanted and given in (2, 4):  # grey or colour with alpha
        x = x[: given - 1]
    if len(x) == 1 and wanted == 3:
        x = x.expand(3, -1, -1)
    elif len(x) == 3 and wanted == 1:
        x = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)  # ITU-R BT.601
    if len(x) != wanted:
        raise InputError(f"The image has {given} channels and the network takes {wanted}.")
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    return ((x - mean) / std)[None]


def _pil_array(image: Image.Image) -> NDArray[Any]:
    if image.mode in ("L", "RGB", "F"):
        return np.asarray(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise InputError(
                f"A 32-bit image that spans {values.min()} to {values.max()} has no known range: rescale it to 16 bits."
            )
        return values.astype(np.uint16)
    grey = image.mode in ("1", "LA", "La")
    return np.asarray(image.convert("L" if grey else "RGB"))


@contextmanager
def evaluating(model: "MSAUnet") -> Iterator[None]:
    """The network in eval mode and without gradients; afterwards each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def vote(model: "MSAUnet", x: Tensor, tta: bool) -> Tensor:
    """Prepared images (N, C, H, W) -> probabilities (N, K, H, W) in float32, a mean over the views if `tta`."""
    views = [(flip, turns) for flip in (False, True) for turns in range(4)] if tta else [(False, 0)]
    parameter = next(model.parameters())
    x = x.to(parameter.device, parameter.dtype)
    total: Tensor | float = 0.0
    for flip, turns in views:
        logits = model((x.flip(3) if flip else x).rot90(turns, (2, 3))).float() / model.config.temperature
        probabilities = (logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)).rot90(-turns, (2, 3))
        total = total + (probabilities.flip(3) if flip else probabilities)
    return torch.as_tensor(total / len(views))


def window_rows(
    model: "MSAUnet",
    read: Callable[[slice], NDArray[np.float32]],
    size: tuple[int, int],
    tile: int,
    tta: bool,
    batch: int,
) -> Iterator[NDArray[np.float32]]:
    """Probabilities (K, rows, W) of an image from the top down; the rows add up to its height.

    Windows overlap by a quarter or more and are blended with Gaussian weights, along a strip by MONAI, from strip to
    strip here: the weights are a product of one over rows and one over columns, so only one strip is ever held.

    Args:
        model: as in `predict`.
        read: rows of the image -> (rows, W, C) in [0, 1].
        size: (H, W).
        tile: side of the windows; an image that is smaller is one window.
        tta: see `predict`, for each window.
        batch: how many windows run together.

    Raises:
        InputError: MONAI is not installed, `tile` is too small, or the image cannot be prepared for the network.
    """
    inferers, weighing = need("monai.inferers.utils", "predict"), need("monai.data.utils", "predict")
    if tile < MIN_TILE:
        raise InputError(f"tile is {tile}; windows need at least {MIN_TILE} pixels.")
    height, width = size
    high, wide = min(tile, height), min(tile, width)
    across = weighing.compute_importance_map((wide,), mode="gaussian").expand(high, wide)
    down = weighing.compute_importance_map((high,), mode="gaussian")[:, None]
    weighted, weights = torch.zeros(()), torch.zeros_like(down)
    # evenly spaced: beside a last window that was only pushed back a little, the border of the one before would count
    down_step, across_step = even_step(height, high), even_step(width, wide)
    starts = [*range(0, height - high, down_step), height - high]
    for top, following in pairwise([*starts, height]):
        x = prepare(read(slice(top, top + high)), model.config)
        with evaluating(model):
            strip = inferers.sliding_window_inference(
                x,
                (high, wide),
                batch,
                partial(vote, model, tta=tta),
                overlap=(0, 1 - (across_step + 0.5) / wide),  # whose interval is rounded down
                roi_weight_map=across,
                sw_device=next(model.parameters()).device,
                device=x.device,
            )[0]
        weighted, weights = weighted + down * strip, weights + down
        done = following - top
        yield (weighted[:, :done] / weights[:done]).numpy()
        weighted, weights = (F.pad(t[..., done:, :], (0, 0, 0, done)) for t in (weighted, weights))


def even_step(side: int, tile: int) -> int:
    """Pixels from window to window along a side, so that the fewest windows that overlap enough end with it."""
    steps = max(1, math.ceil((side - tile) / (tile * (1 - OVERLAP))))
    return max(1, math.ceil((side - tile) / steps))


def need(module: str, extra: str) -> Any:
    """A module that only `pip install msa-unet[extra]` is sure to bring."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise InputError(f"This needs {name}, which is not installed: pip install 'msa-unet[{extra}]'.") from error


def to_labels(probabilities: NDArray[np.float32], threshold: float) -> NDArray[Any]:
    """(K, H, W) -> (H, W): the likeliest class, or for K = 1 whether it is likelier than `threshold`."""
    if len(probabilities) == 1:
        return np.asarray(probabilities[0] > threshold, np.uint8)
    return np.asarray(probabilities.argmax(0), np.uint8 if len(probabilities) <= 256 else np.uint16)


def foreground(class_names: tuple[str, ...]) -> dict[int, str]:
    """See `Segmentation.foreground`."""
    return dict(enumerate(class_names if len(class_names) == 1 else class_names[1:], 1))


def areas(labels: NDArray[Any], class_names: tuple[str, ...]) -> dict[str, int]:
    """See `Segmentation.areas`; one row at a time, since `labels` may lie on the disk."""
    classes = foreground(class_names)
    counts = np.zeros(1 + max(classes), np.int64)
    for row in labels:
        counts += np.bincount(row, minlength=len(counts))
    return {name: int(counts[label]) for label, name in classes.items()}


def check_threshold(threshold: float) -> None:
    """Raise `InputError` unless `threshold` is a probability to cut at."""
    if not 0 < threshold < 1:
        raise InputError(f"threshold is {threshold}; it must lie between 0 and 1.")


def _colour(label: int) -> tuple[int, int, int]:
    return PALETTE[(label - 1) % len(PALETTE)]
