"""Strict loading: what a checkpoint holds against what a network wants, read without trust and reported in full."""

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import CheckpointError, ConfigError

Shapes = Mapping[str, Sequence[int]]

MAX_HEADER = 4 << 20  # bytes; timm's longest network needs a tenth of it
MAX_PARAMETERS = 1 << 13  # tensors; several times what timm's deepest network has
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = {"F32": FLOATS[0], "F16": FLOATS[1], "BF16": FLOATS[2], "F64": FLOATS[3], "I64": torch.int64}  # in safetensors


@dataclass
class LoadReport:
    """What became of every tensor when a checkpoint was loaded; prints as a short summary.

    >>> print(MSAUnet.from_pretrained("tf_efficientnet_lite0.dsb2018", in_channels=1).load_report)
    396 tensors loaded
    6 adapted: encoder.backbone.conv_stem.weight, encoder.fuse.0.0.weight, ...
    """

    loaded: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)  # loaded, and hold NaN or infinity

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        for kind in ("adapted", "initialised", "dropped", "not_finite"):
            names = getattr(self, kind)
            if names:
                shown = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
                lines.append(f"{len(names)} {kind.replace('_', ' ')}: {shown}")
        return "\n".join(lines)


def printable(text: object) -> str:
    """`text` on one line without control characters, escape codes or direction marks: safe in a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The shape of each tensor, by name."""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def mismatches(wanted: Shapes, found: Shapes, optional: Iterable[str] = ()) -> list[str]:
    """One phrase for every missing, unexpected and misshapen tensor; names in `optional` may be absent or differ."""
    free = set(optional)
    problems = [f"missing {name}" for name in sorted(wanted.keys() - found.keys() - free)]
    problems += [f"unexpected {printable(name)}" for name in sorted(found.keys() - wanted.keys() - free)]
    problems += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and name not in free and list(found[name]) != list(shape)
    ]
    return problems


def read_json(text: str | bytes, what: str) -> Any:
    """JSON from an untrusted file: a key that is given twice, NaN, deep nesting and bad Unicode are refused.

    Raises:
        CheckpointError: `text` is not such JSON; `what` names it.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a key is given twice")
        return values

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{what} is not valid JSON: {printable(error)[:200]}. Download or save it again."
        ) from error


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """(dtype, shape) of each tensor of a safetensors file, from its header alone.

    Raises:
        CheckpointError: the file is absent, truncated, or its header contradicts itself or the file's length.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{str(path)!r} is damaged: {size} bytes with a header of {length}. Delete it and fetch it again."
                )
            header = read_json(file.read(length), f"The header of {str(path)!r}")
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"The header of {str(path)!r} is not a JSON object: delete the file and fetch it again.")
    header.pop("__metadata__", None)
    try:
        tensors = {name: (str(t["dtype"]), [int(n) for n in t["shape"]]) for name, t in header.items()}
        end = 0
        for begin, stop, name in sorted((*t["data_offsets"], name) for name, t in header.items()):
            dtype, shape = tensors[name]
            kind = DTYPES.get(dtype)
            if kind is None:
                raise ValueError(f"{name} has dtype {dtype}, which no network here has")
            count = torch.Size(shape).numel() if all(0 <= n < 1 << 40 for n in shape) else -1
            if begin != end or stop - begin != count * kind.itemsize or begin % kind.itemsize:
                raise ValueError(f"{name} of shape {shape} claims bytes {begin} to {stop}, and {end} come before it")
            end = stop
        if end != size - 8 - length:
            raise ValueError(f"its tensors need {end} bytes and it has {size - 8 - length}")
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged: {printable(error)[:300]}. Delete it and fetch it again."
        ) from error
    return tensors


class unfilled(TorchFunctionMode):
    """Parameters made inside are not initialised: no random number is drawn, and no page of memory is touched.

    Buffers are. Position indices and rotary tables are computed when a network is built and are in no state dict, so
    nothing else could ever fill them.
    """

    FILLS = frozenset({
        "normal_", "uniform_", "trunc_normal_", "fill_", "zero_", "erfinv_", "clamp_", "mul_", "add_",  # of tensors
        "constant_", "ones_", "zeros_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
    })  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.FILLS:
            target = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(target, nn.Parameter) or (isinstance(target, Tensor) and target.is_meta):
                return target
        return func(*args, **(kwargs or {}))


@contextmanager
def weightless() -> Iterator[None]:
    """Modules built inside have shapes and no memory at all; one whose parameters do not end is refused."""
    owner, count = threading.get_ident(), 0

    def limit(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += threading.get_ident() == owner  # the hook is global, modules of other threads pass it too
        if count > MAX_PARAMETERS:
            raise ConfigError(f"The config describes more than {MAX_PARAMETERS} parameters: no known network does.")

    handle = nn.modules.module.register_module_parameter_registration_hook(limit)
    try:
        with torch.device("meta"), unfilled():
            yield
    finally:
        handle.remove()


def tables(model: nn.Module) -> list[Tensor]:
    """The tensors of a network that its state dict does not hold."""
    persistent = model.state_dict().keys()
    found = [buffer for name, buffer in model.named_buffers() if name not in persistent]
    return found + [v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor)]
