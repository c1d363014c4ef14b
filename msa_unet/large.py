"""Images too large for memory, from disk to disk."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .errors import InputError
from .files import replacing
from .inference import check_threshold, need, to_labels, to_unit_range, window_rows

if TYPE_CHECKING:
    from .model import MSAUnet


def predict_large(
    model: "MSAUnet",
    image: str | Path | NDArray[Any],
    output: str | Path,
    *,
    tile: int = 1024,
    threshold: float = 0.5,
    tta: bool = False,
    batch: int = 1,
) -> NDArray[Any]:
    """Segment an image that does not fit in memory into a TIFF of labels; memory grows with its width alone.

    The labels are those of `predict(model, image, tile=tile)`. Needs `pip install msa-unet[predict]`.

    >>> labels = predict_large(model, np.asarray(image), "labels.tif", tile=64)
    >>> labels.shape, labels.dtype
    ((64, 96), dtype('uint8'))

    Args:
        model: as in `predict`, like `threshold` and `tta`.
        image: an uncompressed, untiled TIFF, or anything of shape (H, W) or (H, W, C) that reads rows from the disk
            when it is sliced: a numpy memmap, a zarr or an h5py array.
        output: the TIFF to write, uncompressed, so that programs can read it as a memory map; appears when complete.
        tile: side of the windows in pixels.
        batch: how many windows run together.

    Returns:
        labels: (H, W), read-only, mapped from `output`.

    Raises:
        InputError: the file or the array cannot be read by rows, or its values cannot be segmented.
    """
    tifffile = need("tifffile", "predict")
    check_threshold(threshold)
    if isinstance(image, (str, Path)):
        path = image

        def source() -> Any:  # mapped anew for each strip, so that what was read does not stay in memory
            try:
                return tifffile.memmap(path, mode="r")
            except (OSError, ValueError, tifffile.TiffFileError) as error:
                raise InputError(
                    f"{path} cannot be read by rows ({error}): save it as a TIFF without compression and tiles, or "
                    "give predict_large an array that reads from the disk."
                ) from error
    else:

        def source() -> Any:
            return image

    shape, dtype = source().shape, source().dtype
    if len(shape) not in (2, 3) or 0 in shape:
        raise InputError(f"A large image is (H, W) or (H, W, C) with at least one pixel, not {shape}.")
    height, width = shape[:2]
    brightest = max(int(source()[i : i + tile].max()) for i in range(0, height, tile)) if dtype == np.uint16 else None

    def read(rows: slice) -> NDArray[np.float32]:
        return to_unit_range(np.array(source()[rows]), brightest)

    kind = np.uint8 if model.config.num_classes <= 256 else np.uint16
    with replacing(Path(output)) as temporary, tqdm(total=height, unit="row") as bar:
        offset, _ = tifffile.imwrite(
            temporary, shape=(height, width), dtype=kind, photometric="minisblack", returnoffset=True
        )
        with temporary.open("r+b") as file:
            file.seek(offset)
            for probabilities in window_rows(model, read, (height, width), tile, tta, batch):
                labels = to_labels(probabilities, threshold)
                file.write(labels.tobytes())
                bar.update(len(labels))
    return np.asarray(tifffile.memmap(output, mode="r"))
