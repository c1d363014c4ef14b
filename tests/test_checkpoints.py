"""What is saved loads back the same; what does not fit is refused in full; what is adapted is kept where it can be."""

import json
import os
import resource
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from msa_unet import CheckpointError, ConfigError, EncoderError, MSAUnet
from msa_unet.loading import sha256_of, tables, weightless

TINY = {"decoder_channels": (4, 8, 12, 16)}  # of the published network
# one architecture for each way of keeping what a state dict does not: rotary and index tables, tied or flat weights
FAMILIES = {
    "msa": {},
    "test_resnet": {},
    "test_efficientnet": {},
    "test_vit": {},
    "test_convnext": {},
    "test_nfnet": {},
    "test_byobnet": {},
    "test_mambaout": {},
    "test_maxvit": {},
    "test_coatnet": {},
    "test_vit_relpos": {},
    "resnetblur18": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]},
    "swinv2_cr_tiny_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)},
    "beit_base_patch16_224": {"embed_dim": 48, "depth": 4, "num_heads": 4},
    "eva02_tiny_patch14_224": {"depth": 4},
    "levit_conv_128s": {},
    "coat_lite_tiny": {},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
    "convit_tiny": {"depth": 4},
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[MSAUnet, Path]:
    """A small published network with three classes, and its folder."""
    torch.manual_seed(0)
    model = MSAUnet(num_classes=3, class_names=("background", "nucleus", "debris"), **TINY).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def edit(folder: Path, change) -> None:
    """Apply `change` to the saved tensors, and forget the digest, as someone who edits a checkpoint would."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    forget_digest(folder)


def forget_digest(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "weights_sha256": ""}))


@pytest.mark.parametrize("encoder", FAMILIES)
def test_reload_is_bit_identical_for_every_family(encoder: str, tmp_path: Path, no_network: None) -> None:
    torch.manual_seed(1)
    options = {"encoder_kwargs": FAMILIES[encoder]} if encoder != "msa" else TINY
    model = MSAUnet(encoder, num_classes=2, **options)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):  # not what a new network has
            buffer.add_(torch.rand_like(buffer) * 0.1)
    model.eval().save_pretrained(tmp_path)
    loaded = MSAUnet.from_pretrained(tmp_path)
    assert not loaded.training
    wanted, found = dict(model.named_buffers()), dict(loaded.named_buffers())
    for name, tensor in (model.state_dict() | wanted).items():
        assert torch.equal(tensor, (loaded.state_dict() | found)[name]), name
    x = torch.rand(1, 3, 60, 50)
    assert torch.equal(model(x), loaded(x))
    assert len(list(model.parameters())) == len(list(loaded.parameters())), "tied parameters came apart"
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.load_report.loaded == list(model.state_dict())
    loaded.save_pretrained(tmp_path)  # over the file that is mapped
    assert torch.equal(model(x), MSAUnet.from_pretrained(tmp_path)(x))


def test_a_network_that_was_trained_with_downloaded_weights_reloads_without_them(
    tmp_path: Path, no_network: None
) -> None:
    source = MSAUnet("test_resnet.r160_in1k")
    source.save_pretrained(tmp_path)
    assert "encoder_weights" not in json.loads((tmp_path / "config.json").read_text())
    assert MSAUnet.from_pretrained(tmp_path).config.encoder == "test_resnet.r160_in1k"


class Fills(TorchDispatchMode):
    """Counts the operators that fill tensors with random numbers, with or without memory."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("uniform_", "normal_", "rand", "randn")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("encoder", ["test_resnet", "test_coatnet"])  # one without tables, one with
def test_loading_initialises_nothing(encoder: str, tmp_path: Path) -> None:
    with Fills() as built:
        MSAUnet(encoder).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    with Fills() as loaded:
        model = MSAUnet.from_pretrained(tmp_path)
    assert built.count > 20
    assert loaded.count == 0
    assert torch.equal(before, torch.get_rng_state())
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_weights_are_mapped_not_copied(saved: tuple[MSAUnet, Path]) -> None:
    loaded = MSAUnet.from_pretrained(saved[1])
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(saved[1]) in line]
    mapped = sum(
        p.nbytes for p in loaded.parameters() if any(int(a, 16) <= p.data_ptr() < int(b, 16) for a, b in ranges)
    )
    assert mapped > 0.9 * sum(p.nbytes for p in loaded.parameters())
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())


def test_training_a_loaded_network_does_not_write_to_its_file(saved: tuple[MSAUnet, Path]) -> None:
    digest = sha256_of(saved[1] / "model.safetensors")
    loaded = MSAUnet.from_pretrained(saved[1]).train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    loaded(torch.rand(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(loaded.head.votes[0].weight, saved[0].head.votes[0].weight)
    assert sha256_of(saved[1] / "model.safetensors") == digest


def test_other_threads_keep_their_weights_while_one_loads() -> None:
    built: list[nn.Module] = []
    with weightless():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(4, 4)))
        thread.start()
        thread.join()
        assert nn.Linear(4, 4).weight.is_meta
    assert built[0].weight.abs().max() > 0
    assert not nn.Linear(4, 4).weight.is_meta


@pytest.mark.parametrize("encoder", ["test_maxvit"])
def test_tables_are_told_from_weights(encoder: str) -> None:
    with weightless():
        assert tables(MSAUnet(encoder))
        assert not tables(MSAUnet("test_resnet"))


# --- strictness


def test_every_difference_is_in_one_error(saved: tuple[MSAUnet, Path]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["encoder.bottleneck.0.weight"], tensors["decoder.ups.0.weight"]
        tensors["stranger\x1b[31m.weight"] = torch.zeros(2)
        tensors["head.votes.0.weight"] = torch.zeros(1, 2, 3)
        tensors["encoder.stages.0.1.num_batches_tracked"] = torch.zeros(())

    edit(saved[1], change)
    with pytest.raises(CheckpointError) as caught:
        MSAUnet.from_pretrained(saved[1])
    message = str(caught.value)
    assert "5 tensors differ" in message
    for part in (
        "missing encoder.bottleneck.0.weight",
        "missing decoder.ups.0.weight",
        "unexpected stranger",
        "head.votes.0.weight is [1, 2, 3] instead of [3, 32, 1, 1]",
        "encoder.stages.0.1.num_batches_tracked is stored as torch.float32 instead of torch.int64",
    ):
        assert part in message
    assert "\x1b" not in message


def test_a_mismatch_is_raised_before_weights_take_memory(tmp_path: Path) -> None:
    """A config of 8192-wide layers would need gigabytes; the file beside it holds nothing of the kind."""
    MSAUnet(**TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_channels": [8192] * 4}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="instead of"):
        MSAUnet.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_no_keyword_is_swallowed(saved: tuple[MSAUnet, Path]) -> None:
    for unknown in ({"encoder": "resnet34"}, {"strict": False}, {"encoder_weights": True}, {"mean": (0.5,)}):
        with pytest.raises(TypeError, match=next(iter(unknown))):
            MSAUnet.from_pretrained(saved[1], **unknown)


def test_a_fused_network_is_not_saved(saved: tuple[MSAUnet, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not what its config describes"):
        saved[0].fuse().save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_wrong_digest_names_the_file_to_delete(saved: tuple[MSAUnet, Path]) -> None:
    path = saved[1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256") as caught:
        MSAUnet.from_pretrained(saved[1])
    assert str(path) in str(caught.value)
    assert "delete" in str(caught.value)


# --- dtype and device


def test_half_precision_files_are_read_into_float32_unless_asked(saved: tuple[MSAUnet, Path], tmp_path: Path) -> None:
    model, folder = saved
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model.save_pretrained(tmp_path / "half", dtype=dtype)
        plain = MSAUnet.from_pretrained(tmp_path / "half")
        assert {p.dtype for p in plain.parameters()} == {torch.float32}
        for name, tensor in model.state_dict().items():
            expected = tensor.to(dtype).float() if tensor.is_floating_point() else tensor
            assert torch.equal(plain.state_dict()[name], expected)
        same = MSAUnet.from_pretrained(tmp_path / "half", dtype=dtype)
        assert {t.dtype for t in same.state_dict().values()} == {dtype, torch.int64}
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "saving changed the network"
    half, full = ((tmp_path / "half", torch.float16), (folder, None))
    model.save_pretrained(half[0], dtype=half[1])
    assert (half[0] / "model.safetensors").stat().st_size < 0.6 * (full[0] / "model.safetensors").stat().st_size


@pytest.mark.parametrize("encoder", ["test_maxvit"])
def test_tables_follow_dtype_and_device(encoder: str, tmp_path: Path) -> None:
    MSAUnet(encoder).save_pretrained(tmp_path)
    loaded = MSAUnet.from_pretrained(tmp_path, dtype=torch.bfloat16, device="meta")
    assert all(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert {t.dtype for t in loaded.buffers() if t.is_floating_point()} == {torch.bfloat16}


def test_device_and_map_location_mean_the_same(saved: tuple[MSAUnet, Path]) -> None:
    for keyword in ("device", "map_location"):
        loaded = MSAUnet.from_pretrained(saved[1], **{keyword: torch.device("meta")})
        assert {p.device.type for p in loaded.parameters()} == {"meta"}
    with pytest.raises(ConfigError, match="give one"):
        MSAUnet.from_pretrained(saved[1], device="cpu", map_location="cpu")
    with pytest.raises(ConfigError, match="nowhere"):
        MSAUnet.from_pretrained(saved[1], device="nowhere")
    for method in (MSAUnet.from_pretrained, saved[0].save_pretrained):
        with pytest.raises(ConfigError, match=r"torch\.int8"):
            method(saved[1], dtype=torch.int8)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_load_to_cuda(saved: tuple[MSAUnet, Path]) -> None:
    loaded = MSAUnet.from_pretrained(saved[1], device="cuda", dtype=torch.float16)
    assert loaded(torch.rand(1, 3, 32, 32, device="cuda", dtype=torch.float16)).isfinite().all()


# --- adaptation


@pytest.mark.parametrize("encoder", ["msa", "test_resnet", "test_vit"])  # the head of the last two votes for sub-pixels
def test_classes_keep_their_rows_by_name(encoder: str, tmp_path: Path) -> None:
    options = TINY if encoder == "msa" else {}
    model = MSAUnet(encoder, num_classes=3, class_names=("background", "nucleus", "debris"), **options).eval()
    model.save_pretrained(tmp_path)
    x = torch.rand(2, 3, 48, 64)
    loaded = MSAUnet.from_pretrained(tmp_path, class_names=["debris", "vessel", "background", "nerve"])
    assert loaded.config.class_names == ("debris", "vessel", "background", "nerve")
    before, after = model(x), loaded(x)
    assert torch.allclose(after[:, 0], before[:, 2], atol=1e-6)
    assert torch.allclose(after[:, 2], before[:, 0], atol=1e-6)
    report = loaded.load_report
    assert all(name.startswith("head.votes.") for name in report.adapted)
    assert len(report.adapted) == len(model.head.state_dict())
    assert report.initialised == ["class 'vessel'", "class 'nerve'"]
    assert report.dropped == ["class 'nucleus'"]
    assert sorted(report.loaded + report.adapted) == sorted(model.state_dict())
    assert "6 adapted" in str(report)
    assert "class 'nucleus'" in str(report)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(MSAUnet.from_pretrained(tmp_path / "again")(x), after)


def test_new_class_rows_are_initialised_as_in_a_new_network(saved: tuple[MSAUnet, Path]) -> None:
    loaded = MSAUnet.from_pretrained(saved[1], class_names=["background", "other"])
    for vote in loaded.head.votes:
        bound = vote.weight[0].numel() ** -0.5
        assert 0 < vote.weight[1].abs().max() <= bound


def test_num_classes_alone_keeps_only_rows_of_the_same_name(saved: tuple[MSAUnet, Path], tmp_path: Path) -> None:
    """A foreground's row is no background's: nothing is carried over by position."""
    loaded = MSAUnet.from_pretrained(saved[1], num_classes=2)
    assert loaded.config.class_names == ("class_0", "class_1")
    assert not loaded.load_report.adapted
    assert set(loaded.head.state_dict()) == {n.removeprefix("head.") for n in loaded.load_report.initialised[:-2]}
    MSAUnet(num_classes=2, **TINY).save_pretrained(tmp_path)
    assert MSAUnet.from_pretrained(tmp_path, num_classes=3).load_report.initialised == ["class 'class_2'"]
    same = MSAUnet.from_pretrained(saved[1], num_classes=3)
    assert same.config.class_names == ("background", "nucleus", "debris")
    with pytest.raises(ConfigError, match="class_names"):
        MSAUnet.from_pretrained(saved[1], num_classes=4, class_names=["a", "b"])


@pytest.mark.parametrize("encoder", ["msa", "test_resnet", "test_vit", "tresnet_m", "test_byobnet", "crossvit_9_240"])
def test_the_stem_is_adapted_as_timm_does(encoder: str, tmp_path: Path) -> None:
    """Grey from grey, and pairs of RGB from RGB, give what the trained network gives: nothing was thrown away."""
    options = TINY if encoder == "msa" else {}
    model = MSAUnet(encoder, num_classes=2, **options).eval()
    model.save_pretrained(tmp_path)
    grey, colour = torch.rand(1, 1, 64, 64), torch.rand(1, 3, 64, 64)
    one = MSAUnet.from_pretrained(tmp_path, in_channels=1)
    six = MSAUnet.from_pretrained(tmp_path, in_channels=6)
    torch.testing.assert_close(one(grey), model(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(six(colour.repeat(1, 2, 1, 1)), model(colour), rtol=1e-4, atol=1e-5)
    assert one.load_report.adapted == six.load_report.adapted
    assert not one.load_report.initialised
    assert any(name.startswith("encoder.") for name in one.load_report.adapted)


def test_adapted_convolutions_agree_with_timm(tmp_path: Path) -> None:
    from timm.models import adapt_input_conv

    model = MSAUnet("test_resnet")
    model.save_pretrained(tmp_path)
    stem = model.encoder.backbone.conv1[0].weight
    for channels in (1, 2, 4, 7):
        adapted = MSAUnet.from_pretrained(tmp_path, in_channels=channels).encoder.backbone.conv1[0].weight
        torch.testing.assert_close(adapted, adapt_input_conv(channels, stem.detach()))


def test_normalisation_follows_the_channels_and_the_config(tmp_path: Path) -> None:
    model = MSAUnet("test_resnet")
    model.config = replace(model.config, mean=(0.1, 0.2, 0.6), std=(0.2, 0.2, 0.5), dataset="cells", licence="MIT")
    model.save_pretrained(tmp_path)
    config = MSAUnet.from_pretrained(tmp_path).config
    assert (config.mean, config.std) == ((0.1, 0.2, 0.6), (0.2, 0.2, 0.5)), "not what timm states for the encoder"
    assert (config.dataset, config.licence) == ("cells", "MIT")
    assert MSAUnet.from_pretrained(tmp_path, in_channels=1).config.mean == pytest.approx((0.3,))
    assert MSAUnet.from_pretrained(tmp_path, in_channels=4).config.mean == (0.1, 0.2, 0.6, 0.1)
    for wrong in (0, -1, 1.5, True, 10**9, "3"):
        with pytest.raises(ConfigError, match="in_channels"):
            MSAUnet.from_pretrained(tmp_path, in_channels=wrong)


# --- saving


def test_saving_replaces_whole_files_and_leaves_others(saved: tuple[MSAUnet, Path]) -> None:
    model, folder = saved
    (folder / "scores.csv").write_text("kept")
    model.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors", "scores.csv"]
    config = json.loads((folder / "config.json").read_text())
    assert config["weights_sha256"] == sha256_of(folder / "model.safetensors")
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


DISK_FULL = """
import resource, signal, sys
from msa_unet import CheckpointError, MSAUnet
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = MSAUnet(decoder_channels=(4, 8, 12, 16))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    model.save_pretrained(sys.argv[1])
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(saved: tuple[MSAUnet, Path], tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in saved[1].iterdir()}
    command = [sys.executable, "-B", "-c", DISK_FULL]  # -B: the limit would cut byte code that Python caches as well
    for folder in (saved[1], tmp_path / "new"):
        out = subprocess.run([*command, folder], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert "Saving to" in out.stdout, out.stderr
        assert "unchanged" in out.stdout
    assert {p.name: p.read_bytes() for p in saved[1].iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_saving_where_it_cannot_be_is_a_typed_error(saved: tuple[MSAUnet, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        saved[0].save_pretrained(saved[1] / "config.json")


def test_interrupted_between_files_the_mix_is_noticed(saved: tuple[MSAUnet, Path], monkeypatch) -> None:
    other = MSAUnet(num_classes=3, class_names=("background", "nucleus", "debris"), **TINY)
    replace_file, calls = os.replace, []

    def crash(source: Path, target: Path) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(target)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(saved[1])
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="sha256"):
        MSAUnet.from_pretrained(saved[1])
    assert not list(saved[1].glob(".saving-*"))


def test_model_card_header_is_what_the_hub_reads(saved: tuple[MSAUnet, Path], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    model, _ = saved
    model.config = replace(
        model.config, licence="CC-BY-4.0", dataset="dsb2018", dataset_licence="CC0-1.0", metrics={"dice": 0.91}
    )
    model.save_pretrained(tmp_path / "card")
    data = ModelCard.load(tmp_path / "card" / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("msa-unet", "image-segmentation", "cc-by-4.0")
    assert data.datasets == ["dsb2018"]
    assert data.metrics == ["dice"]
    assert data.eval_results[0].metric_value == 0.91


def test_an_unknown_encoder_of_a_newer_timm_is_a_typed_error(saved: tuple[MSAUnet, Path]) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    (saved[1] / "config.json").write_text(json.dumps({**config, "encoder": "resnet35"}))
    with pytest.raises((ConfigError, EncoderError), match="resnet35"):
        MSAUnet.from_pretrained(saved[1])


def test_a_temperature_holds_for_the_classes_it_was_fitted_to(tmp_path):
    model = MSAUnet("resnet10t", decoder_channels=(8,) * 5, class_names=["cell"])
    model.config = replace(model.config, temperature=1.5)
    model.save_pretrained(tmp_path)
    assert MSAUnet.from_pretrained(tmp_path).config.temperature == 1.5
    assert MSAUnet.from_pretrained(tmp_path, class_names=["void", "cell"]).config.temperature == 1.0
