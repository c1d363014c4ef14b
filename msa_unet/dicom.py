"""DICOM files as pictures: windowed, the right way round in brightness, with the size of their pixels."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import InputError
from .inference import SPACING, need


def read_dicom(path: str | Path) -> Image.Image:
    """The single frame of a DICOM file: mode "F" in [0, 1], or "RGB"; `info["spacing_mm"]` where the file has it.

    Values go through the modality LUT or rescale, then through the first window (VOI LUT) of the file, or without one
    from their least to their largest; MONOCHROME1 is inverted, palettes and YBR become RGB, deep colour 8 bits. Only
    PixelSpacing counts as a size: that of an imager or detector is not the patient's. Source: DICOM PS3.3, C.7.6.3,
    C.11.1 and C.11.2.

    Raises:
        InputError: pydicom is not installed, or the file is damaged, has no pixels, several frames, or a compression
            whose decoder is not installed.
    """
    pydicom, pixels = need("pydicom", "dicom"), need("pydicom.pixels", "dicom")
    try:
        dataset = pydicom.dcmread(path)
        if "PixelData" not in dataset:
            raise InputError(f"this DICOM file holds no pixels: {dataset.get('Modality', 'of no modality')}")
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise InputError(f"it has {dataset.NumberOfFrames} frames: split it and segment them one by one")
        values = pixels.pixel_array(dataset)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            values = pixels.apply_color_lut(values, dataset)
            bits = 8 * values.dtype.itemsize
        else:
            bits = dataset.BitsStored
        if values.ndim == 3:
            picture = Image.fromarray((values >> max(bits - 8, 0)).astype(np.uint8))
        else:
            picture = Image.fromarray(_windowed(values, dataset).astype(np.float32))
        if spacing := dataset.get("PixelSpacing"):
            picture.info[SPACING] = (float(spacing[0]), float(spacing[1]))
    except InputError:
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise InputError(f"not a readable DICOM file: {' '.join(str(error).split())}") from error
    return picture


def _windowed(values: Any, dataset: Any) -> Any:
    """(H, W) stored values -> [0, 1], brighter for larger; of MONOCHROME1 the other way round."""
    pixels = need("pydicom.pixels", "dicom")
    values = pixels.apply_modality_lut(values, dataset)
    if "WindowWidth" in dataset:
        # the range that windows map to depends on much; what far values become tells it
        with np.errstate(over="ignore"):
            low, high = pixels.apply_windowing(np.array([-1e9, 1e9]), dataset)
        values = pixels.apply_windowing(values, dataset)
    elif "VOILUTSequence" in dataset:
        count, first, bits = dataset.VOILUTSequence[0].LUTDescriptor
        count = count or 1 << 16
        if count > 1 << bits:  # pydicom would look up the index modulo 256
            raise InputError(f"its VOI LUT has {count} entries of {bits} bits: export it with a window instead")
        values = np.clip(np.rint(values).astype(np.int64), first, first + count - 1)
        low, high = 0, (1 << bits) - 1
        values = pixels.apply_voi(values, dataset)
    else:
        low, high = values.min(), values.max()
    unit = np.clip((values - np.float64(low)) / max(high - low, 1e-9), 0, 1)
    return 1 - unit if dataset.PhotometricInterpretation == "MONOCHROME1" else unit
