"""Mutated configs, weight files and cards: each ends in a typed error or in a correct model, and soon.

python tests/fuzz_loading.py --count 2000 --seed 0
"""

import argparse
import copy
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from msa_unet import CheckpointError, ConfigError, EncoderError, MSAUnet
from msa_unet.registry import PretrainedCard

TYPED = (CheckpointError, ConfigError, EncoderError)
SECONDS = 5.0
MEGABYTES = 64  # that a refusal may take

SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 5, 16, 255, 2**16, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "a", "msa", "none", "all", "resnet18", "test_resnet", "test_vit.r160_in1k",
    "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "hf-hub:a/b", "local-dir:/etc", "/etc/passwd", "../x",
    "\x1b[31m", "\u202e", "\x00", "x" * 10_000, [], {}, [[]], [1], [1, 2], [0.5, 0.5, 0.5], [4, 8, 12, 16], [8192] * 4,
    [1] * 100, ["a"], ["a", "b"], {"a": 1}, {"depth": 1}, {"img_size": 64}, {"patch_size": 0}, {"embed_dim": -1},
    {"checkpoint_path": "/etc/passwd"}, {"pretrained": True}, {"drop_path_rate": "x"}, {"layers": [4096] * 4},
    {"depths": [1, 1, 1, 1]}, {"norm_layer": "x"}, {"img_size": 4096}, {"embed_dim": 4096}, {"depth": 4096},
    {"window_size": 4096}, {"num_heads": 0},
]  # fmt: skip


class Target:
    """A small checkpoint, what it computes, and a folder to spoil."""

    def __init__(self, folder: Path, encoder: str = "msa") -> None:
        torch.manual_seed(0)
        options = {"decoder_channels": (4, 8, 12, 16)} if encoder == "msa" else {}
        model = MSAUnet(encoder, num_classes=2, **options).eval()
        self.folder = folder
        model.save_pretrained(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.config["weights_sha256"] = ""  # else every other mutation of the weights ends there
        self.weights = (folder / "model.safetensors").read_bytes()
        self.tensors = load_file(folder / "model.safetensors")
        self.image = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            self.output = model(self.image)
        self.load(json.dumps(self.config).encode(), self.weights)

    def load(self, config: bytes, weights: bytes) -> str:
        """The kind of the typed error, or "loaded"; anything else that happens is raised."""
        (self.folder / "config.json").write_bytes(config)
        (self.folder / "model.safetensors").unlink(missing_ok=True)  # a new file: the old one may still be mapped
        (self.folder / "model.safetensors").write_bytes(weights)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            model = MSAUnet.from_pretrained(self.folder)
        except TYPED as error:
            text = str(error)
            assert text.isprintable(), f"not printable: {text[:300]!r}"
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
            assert grown <= MEGABYTES, f"{grown} MB to say {text[:100]}"
            return type(error).__name__
        finally:
            taken = time.monotonic() - start
            assert taken < SECONDS, f"{taken:.1f} s"
        self.check(model)
        return "loaded"

    def check(self, model: MSAUnet) -> None:
        """What loaded runs, and holds what the file holds."""
        stored = load_file(self.folder / "model.safetensors")
        state = model.state_dict()
        assert state.keys() == stored.keys()
        for name, tensor in state.items():
            wanted = stored[name].to(tensor.dtype)
            assert torch.equal(tensor.nan_to_num(), wanted.nan_to_num()), name
            if not wanted.isfinite().all():
                assert name in model.load_report.not_finite
        x = torch.rand(1, model.config.in_channels, 32, 32)
        with torch.no_grad():
            assert model(x).shape == (1, model.config.num_classes, 32, 32)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three places changed, removed, added or nested."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        keys = list(value)
        key, kind = rng.choice(keys) if keys else "x", rng.randrange(10)
        if kind < 6:
            value[key] = copy.deepcopy(rng.choice(SCALARS))
        elif kind == 6:
            value.pop(key, None)
        elif kind == 7:
            value[rng.choice(["stranger", "encoder_weight", "", "\x1b[2J", "x" * 5000])] = rng.choice(SCALARS)
        elif kind == 8:
            value[key] = [value.get(key)] * rng.choice((0, 1, 2, 1000))
        else:
            value[key] = {"a": value.get(key)}
    return value


def mutate_bytes(data: bytes, rng: random.Random, head: int = 0) -> bytes:
    """`data` cut, flipped, repeated or overwritten somewhere; mostly within the first `head` bytes if given."""
    spoiled = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(max(1, min(len(spoiled), head) if head and rng.random() < 0.7 else len(spoiled)))
        kind = rng.randrange(6)
        if kind == 0:
            del spoiled[at:]
        elif kind == 1 and spoiled:
            spoiled[min(at, len(spoiled) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            spoiled[at : at + 1] = rng.randbytes(rng.randrange(9))
        elif kind == 3:
            spoiled[at:at] = spoiled[at : at + rng.randrange(64)]
        elif kind == 4:
            del spoiled[at : at + rng.randrange(64)]
        else:
            spoiled[at : at + 1] = rng.choice(
                [b"[" * 5000, b'"', b"{", b"\xff", b"9" * 400, b"1e999", b"NaN", b"\\ud800"]
            )
    return bytes(spoiled)


def mutate_header(weights: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header tells something else about its tensors."""
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        one, other = (header.get(rng.choice(names)) for _ in range(2))
        kind = rng.randrange(9)
        if not isinstance(one, dict) or not isinstance(other, dict):
            continue
        if kind == 0:
            one["shape"] = rng.choice(SCALARS)
        elif kind == 1:
            one["dtype"] = rng.choice([*SCALARS, "F16", "BF16", "F64", "I64", "U8", "F8_E4M3", "F4"])
        elif kind == 2:
            one["data_offsets"] = rng.choice([*SCALARS, other.get("data_offsets"), [-8, 8], [0, 2**62], [8, 0]])
        elif kind == 3:
            one["data_offsets"], other["data_offsets"] = other.get("data_offsets"), one.get("data_offsets")
        elif kind == 4:
            header[rng.choice(names)] = rng.choice(SCALARS)
        elif kind == 5:
            header.pop(rng.choice(names), None)
        elif kind == 6:
            header["extra\x1b[1m"] = dict(one)
        elif kind == 7:
            one["shape"] = list(reversed(one["shape"])) if isinstance(one.get("shape"), list) else 1
        else:
            header["__metadata__"] = rng.choice(SCALARS)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:  # the same key twice
        text = text[:-1] + b", " + text[1:]
    length = rng.choice([len(text)] * 9 + [len(text) + 1, len(text) - 1, 0, 2**20, 2**63, 2**64 - 1])
    return length.to_bytes(8, "little") + text + weights[8 + int.from_bytes(weights[:8], "little") :]


def mutate_tensors(target: Target, rng: random.Random) -> bytes:
    """A sound safetensors file with tensors that are missing, more, of another shape, type or value."""
    tensors = {name: t.clone() for name, t in target.tensors.items()}
    for _ in range(rng.choice((1, 1, 2, 4))):
        name, kind = rng.choice(list(tensors)), rng.randrange(7)
        tensor = tensors[name]
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[rng.choice(["extra", "encoder", "head.votes.9.weight", "\x1b[31mred"])] = tensor.clone()
        elif kind == 2:
            tensors[name] = tensor.flatten()
        elif kind == 3:
            dtypes = [
                torch.float16,
                torch.bfloat16,
                torch.float64,
                torch.int64,
                torch.int8,
                torch.bool,
                torch.int16,
            ]
            tensors[name] = tensor.to(rng.choice(dtypes))
        elif kind == 4 and tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf])
        elif kind == 5:
            tensors[name] = torch.zeros(*tensor.shape, 1)
        else:
            tensors[name] = torch.zeros(0)
    path = target.folder / "made.safetensors"
    save_file(tensors, path)
    return path.read_bytes()


def case(target: Target, rng: random.Random) -> str:
    """One mutated config or weight file, and what came of it."""
    config, weights = json.dumps(target.config).encode(), target.weights
    kind = rng.randrange(6)
    if kind == 0:
        config = json.dumps(mutate_json(target.config, rng)).encode()
    elif kind == 1:
        config = mutate_bytes(config, rng)
    elif kind == 2:
        weights = mutate_bytes(weights, rng, head=8 + int.from_bytes(weights[:8], "little"))
    elif kind == 3:
        weights = mutate_header(weights, rng)
    elif kind == 4:
        weights = mutate_tensors(target, rng)
    else:
        config, weights = json.dumps(mutate_json(target.config, rng)).encode(), mutate_tensors(target, rng)
    return f"{('config', 'config bytes', 'bytes', 'header', 'tensors', 'both')[kind]}: {target.load(config, weights)}"


def card_case(card: dict[str, Any], path: Path, rng: random.Random) -> str:
    """One mutated card."""
    text = json.dumps(mutate_json(card, rng)).encode()
    path.write_bytes(mutate_bytes(text, rng) if rng.random() < 0.5 else text)
    try:
        PretrainedCard.read(path)
    except TYPED as error:
        text = str(error)
        assert text.isprintable(), repr(text)
        return f"card: {type(error).__name__}"
    return "card: loaded"


def run(count: int, seed: int, encoder: str = "msa") -> dict[str, int]:
    """`count` cases from `seed`; a failing one is named by a seed of its own."""
    outcomes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as parent:
        target = Target(Path(parent, "m.x"), encoder)
        card = vars(PretrainedCard.describe(target.folder, "lab/m.x"))
        for i in range(seed, seed + count):
            rng = random.Random(i)
            try:
                outcome = card_case(card, Path(parent, "card.json"), rng) if i % 10 == 9 else case(target, rng)
            except BaseException as error:
                error.add_note(f"case {i} with encoder {encoder}") if hasattr(error, "add_note") else print("case", i)
                raise
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder", default="msa")
    args = parser.parse_args()
    began = time.monotonic()
    for outcome, number in sorted(run(args.count, args.seed, args.encoder).items()):
        print(f"{number:6} {outcome}")
    print(f"{args.count} mutations in {time.monotonic() - began:.0f} s")
