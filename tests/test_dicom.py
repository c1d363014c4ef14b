"""DICOM: the files that come with pydicom, and variants of them where the right answer is known."""

import json
import warnings

import numpy as np
import pytest
import torch

from msa_unet import InputError, MSAUnet, predict
from msa_unet.cli import main
from msa_unet.inference import SPACING, read_image, to_unit_range

pydicom = pytest.importorskip("pydicom")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def file(name):
    path = pydicom.data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"this pydicom does not come with {name}")
    return path


def pixels(path):
    return to_unit_range(read_image(path))[..., 0]


@pytest.fixture
def variant(tmp_path):
    """A CT slice with changed attributes, as a file; None deletes one."""

    def write(**attributes):
        dataset = pydicom.dcmread(file("CT_small.dcm"))
        for name, value in attributes.items():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset.save_as(tmp_path / "variant.dcm")
        return tmp_path / "variant.dcm"

    return write


def hounsfield():
    dataset = pydicom.dcmread(file("CT_small.dcm"))
    return dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)


def test_windows_are_those_of_the_standard(variant):
    values = hounsfield()
    wanted = np.clip((values - (40 - 0.5)) / (400 - 1) + 0.5, 0, 1)  # PS3.3, C.11.2.1.2.1
    assert np.allclose(pixels(variant(WindowCenter=40, WindowWidth=400)), wanted, atol=1e-5)
    assert np.allclose(pixels(variant(WindowCenter=[40, 0], WindowWidth=[400, 9])), wanted, atol=1e-5)
    exact = np.clip((values - 40) / 400 + 0.5, 0, 1)
    found = pixels(variant(WindowCenter=40, WindowWidth=400, VOILUTFunction="LINEAR_EXACT"))
    assert np.allclose(found, exact, atol=1e-5)
    found = pixels(variant(WindowCenter=40, WindowWidth=400, VOILUTFunction="SIGMOID"))
    assert np.allclose(found, 1 / (1 + np.exp(-4 * (values - 40) / 400)), atol=1e-5)


def test_without_a_window_the_whole_range_counts():
    values = hounsfield()
    assert np.allclose(pixels(file("CT_small.dcm")), (values - values.min()) / np.ptp(values), atol=1e-5)


def test_monochrome1_is_inverted(variant):
    upright = pixels(variant(WindowCenter=40, WindowWidth=400))
    inverted = pixels(variant(WindowCenter=40, WindowWidth=400, PhotometricInterpretation="MONOCHROME1"))
    assert np.allclose(inverted, 1 - upright, atol=1e-6)


def test_a_lookup_table(variant):
    table = pydicom.Dataset()
    table.LUTDescriptor = [3, 1000, 8]  # three entries from value 1000 up
    table.add_new("LUTData", "US", [0, 51, 255])
    path = variant(VOILUTSequence=[table], RescaleIntercept=0)
    stored = pydicom.dcmread(path).pixel_array
    wanted = np.select([stored <= 1000, stored == 1001], [0, 0.2], 1)
    assert set(np.unique(wanted)) == {0, 0.2, 1}
    assert np.allclose(pixels(path), wanted, atol=1e-6)
    table.LUTDescriptor = [300, 1000, 8]
    with pytest.raises(InputError, match="300 entries of 8 bits"):
        read_image(variant(VOILUTSequence=[table]))


@pytest.mark.parametrize(
    ("name", "mode", "spacing"),
    [
        ("MR_small.dcm", "F", (0.3125, 0.3125)),
        ("MR_small_RLE.dcm", "F", (0.3125, 0.3125)),
        ("MR_small_bigendian.dcm", "F", (0.3125, 0.3125)),
        ("SC_rgb_rle.dcm", "RGB", (1, 1)),
        ("SC_rgb_rle_16bit.dcm", "RGB", (1, 1)),
        ("SC_ybr_full_422_uncompressed.dcm", "RGB", (1, 1)),
        ("examples_palette.dcm", "RGB", None),
        ("examples_rgb_color.dcm", "RGB", None),
    ],
)
def test_shipped_files(name, mode, spacing):
    picture = read_image(file(name))
    assert picture.mode == mode
    assert picture.info.get(SPACING) == spacing
    assert 0.3 < np.ptp(to_unit_range(picture)) <= 1


def test_one_picture_in_several_encodings():
    plain = pixels(file("MR_small.dcm"))
    for name in ("MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"):
        assert np.array_equal(pixels(file(name)), plain)
    eight = to_unit_range(read_image(file("SC_rgb_rle.dcm")))
    assert np.array_equal(to_unit_range(read_image(file("SC_rgb_rle_16bit.dcm"))), eight)
    assert np.abs(to_unit_range(read_image(file("SC_ybr_full_422_uncompressed.dcm"))) - eight).mean() < 0.02


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rtdose.dcm", "15 frames"),
        ("rtplan.dcm", "no pixels: RTPLAN"),
        ("MR_truncated.dcm", "not a readable DICOM"),
        ("JPEGLSNearLossless_08.dcm", "not a readable DICOM"),
    ],
)
def test_what_cannot_be_segmented_is_told(name, text):
    if name.startswith("JPEGLS") and any(map(__import__("importlib").util.find_spec, ("pylibjpeg", "jpeg_ls", "gdcm"))):
        pytest.skip("a decoder of JPEG-LS is installed")
    with pytest.raises(InputError, match=text):
        read_image(file(name))


def test_areas_have_a_unit(variant, tmp_path, capsys):
    torch.manual_seed(0)
    model = MSAUnet("resnet10t", decoder_channels=(8,) * 5, in_channels=1, class_names=["organ"])
    path = variant(PixelSpacing=[0.5, 0.25])
    result = predict(model, read_image(path))
    assert result.spacing == (0.5, 0.25)
    assert result.areas_mm2() == {"organ": result.areas()["organ"] * 0.125}
    result = predict(model, read_image(variant(PixelSpacing=None)))
    with pytest.raises(InputError, match="how large its pixels are"):
        result.areas_mm2()

    model.save_pretrained(tmp_path / "model")
    path = variant(PixelSpacing=[0.5, 0.25])
    assert (
        main(["predict", str(tmp_path), "-o", str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--json"]) == 0
    )
    line = json.loads(capsys.readouterr().out)
    assert line["image"] == str(path)
    assert line["spacing_mm"] == [0.5, 0.25]
    assert line["mm2"]["organ"] == pytest.approx(line["pixels"]["organ"] * 0.125)
    assert (tmp_path / "out" / "variant_mask.png").exists()
