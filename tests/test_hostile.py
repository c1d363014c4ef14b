"""Files from strangers: each kind of attack has one typed answer, at no cost in time, memory or network."""

import json
import re
import socket
import struct
import time
from pathlib import Path
from typing import Any

import fuzz_loading
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from msa_unet import CheckpointError, ConfigError, EncoderError, MSAUnet, MSAUnetConfig
from msa_unet.loading import read_header, weightless

PACKAGE = Path(__file__).parents[1] / "msa_unet"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> fuzz_loading.Target:
    return fuzz_loading.Target(tmp_path_factory.mktemp("fuzz") / "msa.cells")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- no pickle


def test_nothing_in_the_package_unpickles() -> None:
    opens_pickles = re.compile(
        r"torch\.load\b|\bpickle\b(?! files)|joblib|\bshelve\b|np\.load\b|allow_pickle|weights_only="
    )
    for path in PACKAGE.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not opens_pickles.search(line), f"{path}:{number}: {line}"


def test_loading_and_saving_never_call_torch_load(target: fuzz_loading.Target, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((torch, "load"), (torch.serialization, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)
    assert target.load(json.dumps(target.config).encode(), target.weights) == "loaded"
    MSAUnet.from_pretrained(target.folder).save_pretrained(target.folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "best.pth", "last.ckpt"])
def test_a_folder_of_pickles_is_refused_with_the_way_out(
    target: fuzz_loading.Target, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(target.config))
    (tmp_path / name).write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(CheckpointError, match=rf"{name}.*pickle.*save_pretrained"):
        MSAUnet.from_pretrained(tmp_path)


# --- configs


def refused(target: fuzz_loading.Target, config: bytes) -> str:
    """The message of the typed error for a config; `load` checks time, memory and that it can be printed."""
    assert target.load(config, target.weights) != "loaded"
    with pytest.raises((ConfigError, EncoderError)) as caught:
        MSAUnet.from_pretrained(target.folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"encoder_weigths": True}, "encoder_weigths"),
        ({"num_clases": 2}, "did you mean 'num_classes'"),
        ({"in_channels": "3"}, "in_channels"),
        ({"in_channels": -3}, "in_channels"),
        ({"num_classes": 10**9}, "num_classes"),
        ({"num_classes": True}, "num_classes"),
        ({"decoder_channels": [4, 8, -12, 16]}, "decoder_channels"),
        ({"decoder_channels": [10**12] * 4}, "decoder_channels"),
        ({"decoder_channels": [4] * 70000}, "decoder_channels"),
        ({"mean": [float(10**18)] * 3, "std": [0.0, 1, 1]}, "std"),
        ({"input_size": [10**9, 1]}, "input_size"),
        ({"attention": ["finest"]}, "attention"),
        ({"antialias": 1}, "antialias"),
        ({"class_names": ["a", "a"]}, "repeats"),
        ({"class_names": ["a", "\x1b]0;owned\x07"]}, "class_names"),
        ({"metrics": {"dice": "high"}}, "metrics"),
        ({"dataset": "x" * 100_000}, "dataset"),
        ({"version": 2}, "upgrade"),
        ({"version": "1"}, "version"),
        ({"encoder": "hf-hub:evil/model"}, "plain timm name"),
        ({"encoder": "local-dir:/etc"}, "plain timm name"),
        ({"encoder": "/etc/passwd"}, "plain timm name"),
        ({"encoder": "..\\model"}, "plain timm name"),
        ({"encoder": "resnet1" * 100_000}, "does not know"),
        ({"encoder": ["resnet18"]}, "encoder"),
        *(
            ({"encoder": "test_resnet", "encoder_kwargs": {key: "/etc/passwd"}}, key)
            for key in ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained")
        ),
        ({"encoder": "test_resnet", "encoder_kwargs": {"layers": [10**6] * 4}}, "layers"),
        ({"encoder": "test_resnet", "encoder_kwargs": {"layers": {"a": 1}}}, "layers"),
        ({"encoder": "test_resnet", "encoder_kwargs": {"stranger": 1}}, "stranger"),
        ({"encoder": "test_vit", "encoder_kwargs": {"patch_size": 0}}, "patch_size"),
        ({"encoder": "test_vit", "encoder_kwargs": {"depth": 4096}}, "parameters"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_each_hostile_config_has_its_own_error(target: fuzz_loading.Target, change: dict[str, Any], says: str) -> None:
    message = refused(target, json.dumps({**target.config, **change}).encode())
    assert says in message
    assert len(message) < 2000


@pytest.mark.parametrize(
    "text",
    [
        b"", b"null", b"[]", b"3", b'"text"', b"{", b"\xff\xfe{}", b"[" * 1_000_000, b'{"a":' * 100_000, b"9" * 10_000,
        b'{"version": 1, "version": 1}', b'{"mean": [NaN]}', b'{"std": Infinity}', b'{"dataset": "\\ud800"}',
        b'{"in_channels": 1' + b"0" * 4000 + b"}",
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_what_is_no_config_at_all(target: fuzz_loading.Target, text: bytes) -> None:
    kind = target.load(text, target.weights)
    assert kind in ("CheckpointError", "ConfigError")


def test_a_config_of_100_megabytes_is_not_read(target: fuzz_loading.Target) -> None:
    with (target.folder / "config.json").open("wb") as file:
        file.truncate(100 << 20)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="larger than"):
        MSAUnet.from_pretrained(target.folder)
    assert time.monotonic() - start < 1


def test_lists_in_a_config_come_back_as_they_were_given(tmp_path: Path) -> None:
    model = MSAUnet("test_resnet", encoder_kwargs={"layers": [1, 1, 2, 1]})
    model.save_pretrained(tmp_path)
    assert MSAUnet.from_pretrained(tmp_path).config.encoder_kwargs == {"layers": (1, 1, 2, 1)}
    assert MSAUnetConfig.from_dict(model.config.to_dict()) == model.config


# --- weights


def test_truncated_at_every_64th(target: fuzz_loading.Target) -> None:
    config = json.dumps(target.config).encode()
    for part in range(64):
        assert target.load(config, target.weights[: len(target.weights) * part // 64]) == "CheckpointError", part
    assert target.load(config, target.weights + b"\0") == "CheckpointError"


def spoiled(target: fuzz_loading.Target, change) -> bytes:
    """The weight file with a changed header."""
    length = int.from_bytes(target.weights[:8], "little")
    header = json.loads(target.weights[8 : 8 + length])
    header.pop("__metadata__")
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + target.weights[8 + length :]


def overlap(header: dict[str, Any]) -> None:
    first, second = sorted(header.values(), key=lambda t: t["data_offsets"])[:2]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]


def beyond(header: dict[str, Any]) -> None:
    max(header.values(), key=lambda t: t["data_offsets"])["data_offsets"][1] += 1 << 40


def huge_shape(header: dict[str, Any]) -> None:
    next(iter(header.values()))["shape"] = [2**62, 2**62]


def reshape(header: dict[str, Any]) -> None:
    weight = header["decoder.ups.0.weight"]
    weight["shape"] = weight["shape"][::-1]


def retype(header: dict[str, Any]) -> None:
    next(t for t in header.values() if t["dtype"] == "I64")["dtype"] = "F64"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (overlap, "come before it"), (beyond, "claims bytes"), (huge_shape, "claims bytes"), (reshape, "instead of"),
        (retype, "instead of torch.int64"),
    ],
)  # fmt: skip
def test_headers_that_lie(target: fuzz_loading.Target, change, says: str) -> None:
    config = json.dumps(target.config).encode()
    assert target.load(config, spoiled(target, change)) == "CheckpointError"
    with pytest.raises(CheckpointError, match=says):
        MSAUnet.from_pretrained(target.folder)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**63, 2**64 - 1])
def test_header_lengths_that_lie(target: fuzz_loading.Target, length: int) -> None:
    data = struct.pack("<Q", length) + target.weights[8:]
    assert target.load(json.dumps(target.config).encode(), data) == "CheckpointError"


def test_a_huge_header_is_not_read(target: fuzz_loading.Target, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90 << 20))
        file.truncate(100 << 20)
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(path)


def test_a_tensor_that_is_given_twice(target: fuzz_loading.Target) -> None:
    length = int.from_bytes(target.weights[:8], "little")
    text = target.weights[8 : 8 + length].rstrip()
    entry = re.search(rb'"head\.votes\.0\.weight": \{.*?\}', text).group()
    text = text[:-1] + b", " + entry + b"}"
    data = len(text).to_bytes(8, "little") + text + target.weights[8 + length :]
    assert target.load(json.dumps(target.config).encode(), data) == "CheckpointError"
    with pytest.raises(CheckpointError, match="given twice"):
        MSAUnet.from_pretrained(target.folder)


def test_small_weights_cannot_ask_for_huge_tables(tmp_path: Path) -> None:
    """A position table grows with the fourth power of a size in the config, and its weights with the square."""
    config = MSAUnetConfig("levit_128s", encoder_kwargs={"img_size": 2048})
    with weightless():
        shapes = {name: (t.shape, t.dtype) for name, t in MSAUnet.from_config(config).state_dict().items()}
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ConfigError, match="tables far larger"):
        MSAUnet.from_pretrained(tmp_path)


def test_files_of_other_writers_load_too(target: fuzz_loading.Target) -> None:
    """The library's own order of tensors, with data at any address: same weights, same output to the bit."""
    target.load(json.dumps(target.config).encode(), target.weights)
    path = target.folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors, target.folder / "other.safetensors")
    (target.folder / "other.safetensors").replace(path)
    with torch.no_grad():
        assert torch.equal(MSAUnet.from_pretrained(target.folder)(target.image), target.output)


# --- fuzzing; `python tests/fuzz_loading.py` runs as many as one likes


@pytest.mark.parametrize("encoder", ["msa", "test_vit"])
def test_mutations_end_in_typed_errors_or_correct_models(encoder: str) -> None:
    outcomes = fuzz_loading.run({"msa": 500, "test_vit": 100}[encoder], seed=0, encoder=encoder)
    kinds = {outcome.partition(": ")[2] for outcome in outcomes}
    assert kinds == {"loaded", "CheckpointError", "ConfigError"}, "each outcome is reached"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(fuzz_loading.SCALARS),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=10,
)


@settings(max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_configs_of_any_json(target: fuzz_loading.Target, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([*target.config, "other"]))
    target.load(json.dumps({**target.config, key: data.draw(JSON)}).encode(), target.weights)


@settings(max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True)
@given(at=st.integers(0, 2**20), patch=st.binary(max_size=16), cut=st.integers(0, 64))
def test_weight_files_with_any_bytes(target: fuzz_loading.Target, at: int, patch: bytes, cut: int) -> None:
    at %= len(target.weights)
    data = target.weights[:at] + patch + target.weights[at + cut :]
    target.load(json.dumps(target.config).encode(), data)
