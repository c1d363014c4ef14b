"""One frozen dataclass says what a network is and how its images are prepared; it is what `config.json` holds."""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import timm
from timm.models import get_pretrained_cfg

from .errors import ConfigError

Attention = Literal["finest", "all", "none"]

MAX_CHANNELS = 8192  # far above any network in use, far below what exhausts memory in one layer
MAX_CLASSES = 65536  # what a 16-bit label map can hold
MAX_KWARG = 4096  # some networks build tables in Python loops as long as the square of a size
MAX_TEXT = 1000
# arguments of timm's factory that would reach the file system or network, or that this package sets itself
RESERVED_ENCODER_KWARGS = {
    "cache_dir", "checkpoint_path", "device", "dtype", "feature_cls", "features_only", "in_chans", "num_classes",
    "exportable", "feature_cfg", "kwargs_filter", "no_jit", "out_indices", "pretrained", "pretrained_cfg",
    "pretrained_cfg_overlay", "pretrained_filter_fn", "pretrained_model_args", "pretrained_strict", "scriptable",
}  # fmt: skip


@dataclass(frozen=True)
class MSAUnetConfig:
    """Everything needed to rebuild a network and to feed it; JSON-able, validated when it is made.

    >>> config = MSAUnetConfig("resnet18", num_classes=2, class_names=("background", "polyp"))
    >>> config.mean
    (0.485, 0.456, 0.406)

    Raises:
        ConfigError: a field has the wrong type or an impossible value; the message names the field and the value.
    """

    # the architecture
    encoder: str = "msa"  # "msa", the published stages, or an architecture name of timm (a `.tag` may follow)
    in_channels: int = 3
    num_classes: int = 1  # 1: sigmoid; 2 or more: softmax, class 0 is the background
    decoder_channels: tuple[int, ...] = ()  # width per level, finest first; empty for the encoder's default
    attention: Attention = "finest"  # which skips pass through attention before the decoder reads them
    antialias: bool = True  # how "msa" shrinks earlier levels; False for checkpoints older than torchvision 0.17
    encoder_kwargs: Mapping[str, Any] = field(default_factory=dict)  # passed to timm, e.g. {"drop_path_rate": 0.1}
    # how images are prepared: scaled to [0, 1] by the range of their type, then (x - mean) / std per channel
    mean: tuple[float, ...] = ()  # empty for what the encoder's own weights expect
    std: tuple[float, ...] = ()
    input_size: tuple[int, int] | None = None  # (H, W) that the weights were trained at, for information
    temperature: float = 1.0  # logits are divided by it before they become probabilities; fitted after training
    # what the output means and where the weights come from
    class_names: tuple[str, ...] = ()  # one per class; empty for "foreground", or "class_0", "class_1", ...
    licence: str = ""  # of the weights, an SPDX identifier
    dataset: str = ""  # what the weights were trained on
    dataset_licence: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)  # on the test split of `dataset`
    weights_sha256: str = ""  # of model.safetensors beside the config
    version: int = 1  # of this schema

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, list):  # JSON has no tuples
                object.__setattr__(self, f.name, tuple(value))
        if self.version != 1 or type(self.version) is not int:
            raise ConfigError(
                f"The config has schema version {_short(self.version)}, and this release reads version 1: "
                "upgrade msa_unet to load it."
            )
        check_encoder_name(self.encoder)
        _integer("in_channels", self.in_channels, MAX_CHANNELS)
        _integer("num_classes", self.num_classes, MAX_CLASSES)
        if self.decoder_channels != ():
            for width in _tuple("decoder_channels", self.decoder_channels, int):
                _integer("decoder_channels", width, MAX_CHANNELS)
        if self.attention not in get_args(Attention):
            choices = ", ".join(get_args(Attention))
            raise ConfigError(f"attention is {_short(self.attention)}; it must be one of {choices}.")
        if not isinstance(self.antialias, bool):
            raise ConfigError(f"antialias is {_short(self.antialias)}; it must be true or false.")
        object.__setattr__(self, "encoder_kwargs", _encoder_kwargs(self.encoder_kwargs))
        for name in ("mean", "std"):
            if getattr(self, name) == ():
                object.__setattr__(self, name, _encoder_statistic(name, self.encoder, self.in_channels))
            values = _tuple(name, getattr(self, name), (int, float), self.in_channels)
            if not all(_is_number(v) and (name == "mean" or v > 0) for v in values):
                raise ConfigError(f"{name} is {_short(values)}; every entry must be finite, and those of std above 0.")
        if self.input_size is not None:
            for side in _tuple("input_size", self.input_size, int, 2):
                _integer("input_size", side, 1 << 20)
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise ConfigError(f"temperature is {_short(self.temperature)}; it must be a finite number above 0.")
        if self.class_names == ():
            names = ("foreground",) if self.num_classes == 1 else (f"class_{i}" for i in range(self.num_classes))
            object.__setattr__(self, "class_names", tuple(names))
        names = _tuple("class_names", self.class_names, str, self.num_classes)
        if len(set(names)) != self.num_classes:
            raise ConfigError(f"class_names {_short(names)} repeats a name; classes are known by name: make it unique.")
        for name in names:
            _text("class_names", name)
        for name in ("licence", "dataset", "dataset_licence", "weights_sha256"):
            _text(name, getattr(self, name))
        if not isinstance(self.metrics, Mapping) or not all(
            isinstance(k, str) and _is_number(v) for k, v in self.metrics.items()
        ):
            raise ConfigError(f"metrics is {_short(self.metrics)}; it must map names to numbers.")
        for name in self.metrics:
            _text("metrics", name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MSAUnetConfig":
        """The config that `to_dict` wrote.

        >>> MSAUnetConfig.from_dict({"encoder": "resnet18", "num_clases": 2})
        Traceback (most recent call last):
        msa_unet.errors.ConfigError: Unknown config key 'num_clases': did you mean 'num_classes'?

        Raises:
            ConfigError: `values` has a key that this release does not know (the nearest one is named), or a bad value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"A config is a JSON object, not {type(values).__name__}.")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            refuse_unknown("config key", key, known)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every field, in the order above.

        >>> MSAUnetConfig("resnet18").to_dict()["class_names"]
        ['foreground']
        """
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values


def refuse_unknown(kind: str, name: object, known: list[str]) -> None:
    """Raise `ConfigError` for a `name` that is not in `known`, with the nearest known one."""
    if name not in known:
        near = difflib.get_close_matches(str(name)[:100], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
        raise ConfigError(f"Unknown {kind} {_short(name)}: {hint}")


def check_encoder_name(name: object) -> None:
    """Raise `ConfigError` unless `name` is "msa" or an architecture that the installed timm registers.

    Names with a scheme or a path (`hf-hub:`, `local-dir:`) are refused: a config is untrusted, and timm would follow
    them to the network or the disk.
    """
    if name == "msa":
        return
    if not isinstance(name, str) or ":" in name or "/" in name or "\\" in name:
        raise ConfigError(f"encoder is {_short(name)}; it must be 'msa' or a plain timm name such as 'resnet34'.")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture[:100], timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "msa_unet.list_encoders() lists the names."
        raise ConfigError(f"encoder is {_short(name)}, which timm {timm.__version__} does not know: {hint}")
    try:
        get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ConfigError(
            f"encoder is {_short(name)}, and timm {timm.__version__} has no weights tagged {_short(tag)} for "
            f"{architecture}: timm.list_pretrained({architecture + '.*'!r}) lists the tags."
        ) from error


def _encoder_statistic(name: str, encoder: str, channels: int) -> tuple[float, ...]:
    """Mean or std that timm states for the encoder's weights; their average where the number of channels differs."""
    values = tuple(getattr(get_pretrained_cfg(encoder), name, (0.5, 0.5, 0.5)))
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _encoder_kwargs(kwargs: object) -> dict[str, Any]:
    """`kwargs` as a new dict, checked, with lists as the tuples that timm and a cache key want."""
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"encoder_kwargs is {_short(kwargs)}; it must map argument names to values.")
    for key, value in kwargs.items():
        if not isinstance(key, str) or key in RESERVED_ENCODER_KWARGS:
            raise ConfigError(
                f"encoder_kwargs has {_short(key)}, which msa_unet sets itself or does not let a config choose: "
                "leave it out (in_channels and encoder_weights are arguments of MSAUnet)."
            )
        flat = value if isinstance(value, (list, tuple)) else (value,)
        if len(flat) > 64 or not all(
            v is None or isinstance(v, (bool, str)) or (_is_number(v) and abs(v) <= MAX_KWARG) for v in flat
        ):
            raise ConfigError(
                f"encoder_kwargs[{_short(key)}] is {_short(value)}; only text, numbers up to {MAX_KWARG} and short "
                "lists of them fit."
            )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ConfigError(f"{name} is {_short(value)}; it must be one line of text that can be printed as it is.")


def _integer(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(f"{name} is {_short(value)}; it must be a whole number from 1 to {most}.")


def _tuple(name: str, value: Any, kind: Any, length: int | None = None) -> tuple[Any, ...]:
    wanted = f"{length} entries" if length else "entries"
    if (
        not isinstance(value, tuple)
        or (length is not None and len(value) != length)
        or not 1 <= len(value) <= MAX_CLASSES
        or not all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
    ):
        raise ConfigError(f"{name} is {_short(value)}; it must be a list of {wanted} of the right type.")
    return value


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 63
    return isinstance(value, float) and math.isfinite(value)


def _short(value: object) -> str:
    """`repr`, cut: a message must not carry a megabyte of somebody's file, nor its escape codes."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
