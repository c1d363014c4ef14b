"""From images of every common type to a segmentation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from msa_unet import InputError, MSAUnet, MSAUnetConfig, predict
from msa_unet.inference import prepare, read_image, to_unit_range


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MSAUnet("resnet10t", decoder_channels=(8,) * 5, class_names=["cell"])


@pytest.fixture(scope="module")
def classes():
    torch.manual_seed(0)
    return MSAUnet("resnet10t", decoder_channels=(8,) * 5, num_classes=3, class_names=["void", "liver", "tumour"])


rng = np.random.default_rng(0)
GREY = rng.integers(0, 256, (40, 50), dtype=np.uint8)
COLOUR = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)


def test_every_type_of_one_picture_gives_one_result(model):
    wanted = predict(model, COLOUR)
    same = [
        Image.fromarray(COLOUR),
        Image.fromarray(COLOUR).convert("RGBA"),
        COLOUR.astype(np.float32) / 255,
        COLOUR.astype(np.float64) / 255,
        torch.from_numpy(COLOUR).permute(2, 0, 1),
    ]
    for image in same:
        assert np.allclose(predict(model, image).probabilities, wanted.probabilities, atol=1e-5)
    rounded = torch.from_numpy(COLOUR).permute(2, 0, 1).to(torch.bfloat16) / 255
    exact = predict(model, rounded.float()).probabilities
    assert np.array_equal(predict(model, rounded).probabilities, exact)
    grey = predict(model, GREY)
    for image in (GREY[..., None], np.repeat(GREY[..., None], 3, 2), Image.fromarray(GREY), torch.from_numpy(GREY)):
        assert np.allclose(predict(model, image).probabilities, grey.probabilities, atol=1e-5)
    palette = Image.fromarray(COLOUR).quantize(16)
    assert np.array_equal(predict(model, palette).labels, predict(model, palette.convert("RGB")).labels)


def test_sixteen_bits_are_scaled_by_the_depth_in_use():
    for bits in (8, 10, 12, 14, 16):
        image = np.array([[0, (1 << bits) - 1]], np.uint16)
        assert to_unit_range(image).ravel().tolist() == [0, 1]
    assert to_unit_range(Image.fromarray(np.array([[0, 4095]], np.uint16))).ravel().tolist() == [0, 1]


def test_preprocessing_is_the_configs():
    config = MSAUnetConfig(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    x = prepare(np.full((2, 2, 3), 0.6, np.float32), config)
    assert x.shape == (1, 3, 2, 2)
    assert torch.allclose(x[0, :, 0, 0], torch.tensor([1.0, 1.0, 1.0]), atol=1e-5)
    grey = prepare(np.ones((2, 2, 3), np.float32), MSAUnetConfig(in_channels=1))
    assert torch.allclose(grey, torch.ones(1, 1, 2, 2), atol=1e-5)


def test_one_class(model):
    result = predict(model, COLOUR, threshold=0.3)
    assert result.probabilities.shape == (1, 40, 50)
    assert result.probabilities.dtype == np.float32
    assert result.labels.dtype == np.uint8
    assert np.array_equal(result.labels, result.probabilities[0] > 0.3)
    assert result.areas() == {"cell": int(result.labels.sum())}
    assert result.uncertainty.shape == (40, 50)
    p = result.probabilities[0]
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert np.allclose(result.uncertainty, entropy, atol=1e-4)


def test_many_classes(classes):
    result = predict(classes, COLOUR)
    assert np.allclose(result.probabilities.sum(0), 1, atol=1e-5)
    assert np.array_equal(result.labels, result.probabilities.argmax(0))
    assert result.foreground == {1: "liver", 2: "tumour"}
    assert set(result.areas()) == {"liver", "tumour"}
    assert result.uncertainty.min() >= 0
    assert result.uncertainty.max() <= 1.0001


def test_lists_and_training_mode(model):
    model.train()
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    results = predict(model, [COLOUR, GREY])
    assert model.training
    assert all(torch.equal(statistics[name], b) for name, b in model.named_buffers())
    assert [r.labels.shape for r in results] == [(40, 50), (40, 50)]
    assert np.allclose(results[0].probabilities, predict(model, COLOUR).probabilities)


def test_views_are_undone_exactly(model):
    """A prediction averaged over the symmetries of the square turns with the image."""
    whole = predict(model, COLOUR, tta=True).probabilities[0]
    turned = predict(model, np.rot90(COLOUR).copy(), tta=True).probabilities[0]
    assert np.allclose(np.rot90(whole), turned, atol=1e-5)
    mirrored = predict(model, COLOUR[:, ::-1].copy(), tta=True).probabilities[0]
    assert np.allclose(whole[:, ::-1], mirrored, atol=1e-5)


def test_batches_are_the_images_one_by_one(classes):
    images = [COLOUR, COLOUR[::-1].copy(), GREY[:20, :20], GREY[20:, :20], COLOUR[:, ::-1].copy()]
    calls = []
    handle = classes.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    results = predict(classes, images, batch=2)
    handle.remove()
    assert calls == [2, 2, 1]
    for image, result in zip(images, results, strict=True):
        assert np.allclose(result.probabilities, predict(classes, image).probabilities, atol=1e-5)
    with pytest.raises(InputError, match="batch is 0"):
        predict(classes, images, batch=0)


def test_tta_is_the_mean_and_disagreement_is_uncertain(model):
    views = [np.rot90(COLOUR[:, ::-1] if flip else COLOUR, k) for flip in (False, True) for k in range(4)]
    votes = [predict(model, view.copy()).probabilities[0] for view in views]
    undone = [np.rot90(v, -k)[:, :: -1 if flip else 1] for v, (flip, k) in zip(votes, np.ndindex(2, 4), strict=True)]
    result = predict(model, COLOUR, tta=True)
    assert np.allclose(result.probabilities[0], np.mean(undone, 0), atol=1e-5)
    single = predict(model, COLOUR).uncertainty
    assert result.uncertainty.mean() > np.mean([predict(model, view.copy()).uncertainty.mean() for view in views])
    assert not np.allclose(result.uncertainty, single, atol=1e-4)


def test_temperature(model, classes):
    for network in (model, classes):
        logits = np.log(predict(network, COLOUR).probabilities)
        config = network.config
        network.config = replace(config, temperature=2.0)
        soft = predict(network, COLOUR)
        network.config = config
        if network is classes:
            wanted = np.exp(logits / 2) / np.exp(logits / 2).sum(0)
        else:
            p = np.exp(logits)
            wanted = 1 / (1 + np.sqrt((1 - p) / p))
        assert np.allclose(soft.probabilities, wanted, atol=1e-4)
        assert np.array_equal(soft.labels, predict(network, COLOUR).labels)


def test_another_threshold_runs_no_network(model, classes):
    result = predict(model, COLOUR)
    threshold = float(np.median(result.probabilities))
    assert np.array_equal(result.with_threshold(threshold).labels, predict(model, COLOUR, threshold=threshold).labels)
    assert 0 < result.with_threshold(threshold).areas()["cell"] < COLOUR[..., 0].size
    with pytest.raises(InputError, match=r"threshold is 1\.5"):
        result.with_threshold(1.5)
    with pytest.raises(InputError, match="this one has 3"):
        predict(classes, COLOUR).with_threshold(0.5)


def test_overlay_and_label_image(classes):
    result = predict(classes, COLOUR)
    overlay = np.asarray(result.overlay())
    assert overlay.shape == (40, 50, 3)
    background = result.labels == 0
    assert np.array_equal(overlay[background], COLOUR[background])
    alpha = predict(classes, np.dstack([COLOUR, GREY]))
    assert np.array_equal(alpha.image, COLOUR)
    picture = result.label_image()
    assert picture.mode == "P"
    assert np.array_equal(np.asarray(picture), result.labels)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4), bool), "bool"),
        (np.full((4, 4), 1.5), "0, 1"),
        (np.full((4, 4), np.nan), "0, 1"),
        (np.zeros((0, 4), np.uint8), "at least one pixel"),
        (np.zeros((2, 4, 4, 3), np.uint8), "2, 4, 4, 3"),
        (np.zeros((4, 4, 7), np.uint8), "7 channels"),
    ],
)
def test_what_cannot_be_segmented_is_told(model, image, text):
    with pytest.raises(InputError, match=text):
        predict(model, image)


@pytest.mark.parametrize("threshold", [0, 1, -1, float("nan")])
def test_thresholds_are_probabilities(model, threshold):
    with pytest.raises(InputError, match="threshold"):
        predict(model, COLOUR, threshold=threshold)


def test_large_images_ask_for_tiles(model):
    with pytest.raises(InputError, match="tile=1024"):
        predict(model, np.zeros((6000, 5000), np.uint8))


def test_files(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.tiff", compression="tiff_lzw")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tiff")), COLOUR)
    sixteen = rng.integers(0, 65536, (8, 9)).astype(np.uint16)
    for name in ("b.png", "b.tif"):
        Image.fromarray(sixteen).save(tmp_path / name)
        assert np.array_equal(to_unit_range(read_image(tmp_path / name))[..., 0], sixteen / np.float32(65535))
    exif = Image.Exif()
    exif[274] = 6  # turned a quarter
    Image.fromarray(COLOUR).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (40, 50)


def test_files_that_cannot_be_read(tmp_path):
    def message(name, content=None):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError) as error:
            read_image(path)
        return str(error.value)

    Image.fromarray(COLOUR).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    assert "no such file" in message("absent.png")
    assert "not a readable" in message("empty.png", b"")
    assert "not a readable" in message("text.png", b"hello")
    for cut in (20, 100, len(whole) // 2, len(whole) - 30):
        assert "not a readable" in message("cut.png", whole[:cut])
    Image.fromarray(COLOUR).save(tmp_path / "a.gif")
    assert "not a readable" in message("a.gif")
    Image.fromarray(GREY).save(tmp_path / "pages.tif", save_all=True, append_images=[Image.fromarray(GREY)])
    assert "2 pages" in message("pages.tif")
