"""From an image of any common type to a segmentation: prepare, run, and read the result."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from .config import MSAUnetConfig
    from .model import MSAUnet

MAX_PIXELS = 25_000_000  # without tiles; the activations of a larger image do not fit common machines
# Okabe and Ito's colours, told apart by colour-blind readers; repeated from the start for more classes
PALETTE = (
    (0, 158, 115), (230, 159, 0), (86, 180, 233), (213, 94, 0), (240, 228, 66), (0, 114, 178), (204, 121, 167),
)  # fmt: skip

Source = NDArray[Any] | Image.Image | Tensor


@dataclass(frozen=True)
class Segmentation:
    """What `predict` found in one image of H x W pixels with a network of K classes.

    Attributes:
        labels: (H, W) uint8 (uint16 above 256 classes); the class index, or for K = 1: 1 foreground, 0 background.
        probabilities: (K, H, W) float32 in [0, 1]; softmax over classes, or for K = 1 the foreground's sigmoid.
        uncertainty: (H, W) float32 in [0, 1]; the entropy of the class probabilities over its maximum.
        class_names: K names.
        image: (H, W, 3) uint8, the picture as the network saw it, for overlays.
    """

    labels: NDArray[Any]
    probabilities: NDArray[np.float32]
    uncertainty: NDArray[np.float32]
    class_names: tuple[str, ...]
    image: NDArray[np.uint8]

    @property
    def foreground(self) -> dict[int, str]:
        """Label -> class name, without the background: {1: the class} for K = 1, else classes 1 to K - 1."""
        return (
            dict(enumerate(self.class_names, 1))
            if len(self.class_names) == 1
            else dict(enumerate(self.class_names[1:], 1))
        )

    def areas(self) -> dict[str, int]:
        """Pixels per foreground class."""
        return {name: int((self.labels == label).sum()) for label, name in self.foreground.items()}

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
    model: "MSAUnet", image: Source, *, threshold: float = ..., tile: int | None = ..., tta: bool = ...
) -> Segmentation: ...
@overload
def predict(
    model: "MSAUnet", image: list[Source], *, threshold: float = ..., tile: int | None = ..., tta: bool = ...
) -> list[Segmentation]: ...
def predict(
    model: "MSAUnet",
    image: Source | list[Source],
    *,
    threshold: float = 0.5,
    tile: int | None = None,
    tta: bool = False,
) -> Segmentation | list[Segmentation]:
    """Segment an image, prepared the way `model.config` says the network was trained.

    Args:
        model: runs on its own device and in its own precision; its training mode is left as it was.
        image: an array (H, W) or (H, W, C), a PIL image, a tensor (C, H, W), or a list of them. uint8 and uint16 are
            scaled by their bit depth, floats must lie in [0, 1].
        threshold: foreground starts above this probability, in (0, 1); only for a network of one class.
        tile: side in pixels of overlapping windows for large images (needs `pip install msa-unet[predict]`, MONAI).
        tta: average over the eight flips and quarter turns, at eight times the cost.

    Raises:
        InputError: the image has a type, shape or values that cannot be segmented.
    """
    if isinstance(image, list):
        return [predict(model, item, threshold=threshold, tile=tile, tta=tta) for item in image]
    config = model.config
    if not 0 < threshold < 1:
        raise InputError(f"threshold is {threshold}; it must lie between 0 and 1.")
    pixels = to_unit_range(image)
    height, width = pixels.shape[:2]
    if tile is None and height * width > MAX_PIXELS:
        raise InputError(
            f"The image is {width} x {height} pixels: give tile=1024 (--tile 1024) to go through it in windows."
        )
    parameter = next(model.parameters())
    x = prepare(pixels, config).to(parameter.device, parameter.dtype)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            views = _symmetries(x) if tta else [(x, _same)]
            votes = [undo(_probabilities(_logits(model, view, tile))) for view, undo in views]
            probabilities = torch.cat(votes).mean(0).cpu().numpy()
    finally:
        for module, training in modes:
            module.training = training
    full = probabilities if len(probabilities) > 1 else np.concatenate([1 - probabilities, probabilities])
    labels = probabilities.argmax(0) if len(probabilities) > 1 else probabilities[0] > threshold
    entropy = -(full * np.log(np.clip(full, 1e-12, None))).sum(0) / np.log(len(full))
    picture = pixels[..., : 3 if pixels.shape[2] in (3, 4) else 1]  # without alpha
    return Segmentation(
        labels=labels.astype(np.uint8 if len(full) <= 256 else np.uint16),
        probabilities=probabilities,
        uncertainty=entropy.astype(np.float32),
        class_names=config.class_names,
        image=np.broadcast_to((picture * 255).round().astype(np.uint8), (height, width, 3)),
    )


def read_image(path: str | Path) -> Image.Image:
    """The picture in a PNG, JPEG or TIFF file, turned upright if the camera noted an orientation.

    Raises:
        InputError: the file is missing, damaged, of another format, has several pages, or is absurdly large.
    """
    try:
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
        raise InputError(f"it claims more pixels than any sane image has: {error}") from error
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise InputError(f"not a readable PNG, JPEG or TIFF: {' '.join(str(error).split())}") from error


def to_unit_range(image: Source) -> NDArray[np.float32]:
    """Any image as (H, W, C) float32 in [0, 1]; alpha and palettes are resolved.

    uint8 is divided by 255. uint16 is divided by the largest value of the bit depth in use (8, 10, 12, 14 or 16, told
    by the brightest pixel), since cameras store 12-bit pictures in 16-bit files.

    Raises:
        InputError: another type or rank, an empty image, or floats outside [0, 1].
    """
    if isinstance(image, Image.Image):
        pixels = _pil_array(image)
    elif isinstance(image, Tensor):
        pixels = np.moveaxis(image.detach().cpu().numpy(), 0, -1) if image.ndim == 3 else image.detach().cpu().numpy()
    else:
        pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise InputError(f"An image is (H, W) or (H, W, C) with at least one pixel, not {pixels.shape}.")
    if pixels.dtype == np.uint8:
        return np.asarray(pixels / np.float32(255))
    if pixels.dtype == np.uint16:
        brightest = int(pixels.max())
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


def _logits(model: "MSAUnet", x: Tensor, tile: int | None) -> Tensor:
    logits: Tensor
    if tile is None:
        logits = model(x)
        return logits
    try:
        from monai.inferers.utils import sliding_window_inference
    except ImportError as error:
        raise InputError("tile needs MONAI's sliding windows: pip install 'msa-unet[predict]'.") from error
    # a tensor, since the model returns one; MONAI states the union of all it could be
    logits = sliding_window_inference(x, (tile, tile), 4, model, overlap=0.25, mode="gaussian")  # type: ignore[assignment]
    return logits


def _probabilities(logits: Tensor) -> Tensor:
    logits = logits.float()
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def _symmetries(x: Tensor) -> Iterator[tuple[Tensor, Any]]:
    """The eight flips and quarter turns of `x`, each with the function that undoes it on the output."""
    for flip in (False, True):
        flipped = x.flip(3) if flip else x
        for turns in range(4):
            yield flipped.rot90(turns, (2, 3)), partial(_undo, flip=flip, turns=turns)


def _same(y: Tensor) -> Tensor:
    return y


def _undo(y: Tensor, flip: bool, turns: int) -> Tensor:
    y = y.rot90(-turns, (2, 3))
    return y.flip(3) if flip else y


def _colour(label: int) -> tuple[int, int, int]:
    return PALETTE[(label - 1) % len(PALETTE)]
