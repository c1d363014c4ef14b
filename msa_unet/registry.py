"""The checkpoints that are known by name: one card each, kept as data beside the weights."""

import argparse
import dataclasses
import difflib
import fnmatch
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .loading import printable, read_json, sha256_of

CONFIG, WEIGHTS, CARD, README = "config.json", "model.safetensors", "card.json", "README.md"
MAX_JSON = 4 << 20  # bytes; a config with 65,536 class names fits
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class PretrainedCard:
    """What is known of a checkpoint before it is opened; stored as `card.json` in its folder.

    Raises:
        CheckpointError: a field has the wrong type or an impossible value.
    """

    name: str  # `<encoder>.<training data>`, or `msa_small.<...>` for "msa" at reduced width
    repo_id: str  # "organisation/name" on the Hub
    revision: str  # the commit that from_pretrained downloads; "" until it is published
    sha256: str  # of model.safetensors
    size: int  # of model.safetensors, bytes
    encoder: str
    class_names: tuple[str, ...]
    dataset: str
    licence: str  # of the weights, an SPDX identifier
    metrics: dict[str, tuple[float, float, float]]  # value and its 95% confidence interval, low and high
    input_size: tuple[int, int] | None  # (H, W) that the weights were trained at

    def __post_init__(self) -> None:
        texts = [getattr(self, f.name) for f in dataclasses.fields(self) if f.type is str]
        rows = [tuple(row) for row in self.metrics.values()] if isinstance(self.metrics, dict) else [()]
        sides = () if self.input_size is None else tuple(self.input_size)
        valid = (
            isinstance(self.class_names, (list, tuple))
            and all(isinstance(t, str) and t.isprintable() for t in (*texts, *self.class_names, *self.metrics))
            and re.fullmatch(r"[\w.+-]+", self.name)
            and HUB_ID.fullmatch(self.repo_id)
            and re.fullmatch(r"[0-9a-f]{40}|", self.revision)
            and re.fullmatch(r"[0-9a-f]{64}", self.sha256)
            and all(len(row) == 3 and all(math.isfinite(v) for v in row) for row in rows)
            and all(type(n) is int and n > 0 for n in (self.size, *sides))
            and len(sides) in (0, 2)
        )
        if not valid:
            raise CheckpointError(f"The card {printable(self)[:300]} is not valid: correct its {CARD}.")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "metrics", dict(zip(self.metrics, rows, strict=True)))
        object.__setattr__(self, "input_size", sides or None)

    @classmethod
    def read(cls, path: Path) -> "PretrainedCard":
        """The card stored in `path`."""
        try:
            return cls(**read_json(read_small(path), repr(str(path))))
        except (TypeError, AttributeError) as error:
            raise CheckpointError(f"{str(path)!r} is not a card: {printable(error)[:200]}.") from error

    @classmethod
    def describe(
        cls,
        folder: Path,
        repo_id: str,
        revision: str = "",
        intervals: dict[str, tuple[float, float]] | None = None,
    ) -> "PretrainedCard":
        """The card of a folder of `save_pretrained`, from its files; `intervals` are those of the config's metrics."""
        config = read_json(read_small(folder / CONFIG), repr(str(folder / CONFIG)))
        weights = folder / WEIGHTS
        return cls(
            name=folder.resolve().name,
            repo_id=repo_id,
            revision=revision,
            sha256=sha256_of(weights),
            size=weights.stat().st_size,
            encoder=config["encoder"],
            class_names=tuple(config["class_names"]),
            dataset=config["dataset"],
            licence=config["licence"],
            metrics={k: (v, *(intervals or {}).get(k, (v, v))) for k, v in config["metrics"].items()},
            input_size=config["input_size"],
        )

    def write(self, folder: Path) -> None:
        """Store the card in `folder`."""
        (folder / CARD).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def read_small(path: Path) -> bytes:
    """The content of a JSON file, unless it is absent or absurdly large.

    Raises:
        CheckpointError: it is.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    if len(content) > MAX_JSON:
        raise CheckpointError(
            f"{str(path)!r} is larger than {MAX_JSON} bytes: no config or card is, so it is not read."
        )
    return content


def roots() -> list[Path]:
    """Folders that hold checkpoint folders: what was installed with the package, a checkout's, $MSA_UNET_WEIGHTS."""
    package = Path(__file__).parent
    found = [package / "weights"]
    if (package.parent / "setup.cfg").is_file():  # a checkout; beside an installed package `weights` is not ours
        found.append(package.parent / "weights")
    if os.environ.get("MSA_UNET_WEIGHTS"):
        found.append(Path(os.environ["MSA_UNET_WEIGHTS"]).expanduser())
    return found


def cards() -> dict[str, PretrainedCard]:
    """Every card by name; of two with one name the first in the order of `roots()` counts."""
    found: dict[str, PretrainedCard] = {}
    for root in roots():
        for path in sorted(root.glob(f"*/{CARD}")):
            card = PretrainedCard.read(path)
            if card.name != path.parent.name:
                raise CheckpointError(f"{str(path)!r} is the card of {card.name!r}: rename the folder or the card.")
            found.setdefault(card.name, card)
    return found


def list_pretrained(pattern: str = "*") -> list[str]:
    """Names that `MSAUnet.from_pretrained` knows.

    >>> "tf_efficientnet_lite0.dsb2018" in list_pretrained("*.dsb2018")
    True

    Args:
        pattern: shell-style wildcard.
    """
    return sorted(fnmatch.filter(cards(), pattern))


def get_card(name: str) -> PretrainedCard:
    """The card of a registry name.

    Raises:
        CheckpointError: there is no such name; the nearest ones are named.
    """
    known = cards()
    if name in known:
        return known[name]
    by_repo = [card.name for card in known.values() if name in (card.repo_id, card.repo_id.partition("/")[2])]
    near = by_repo or difflib.get_close_matches(name[:100], known, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?" if near else f"the names are {', '.join(known) or 'none yet'}."
    )
    raise CheckpointError(
        f"No checkpoint is named {printable(name)[:80]!r}: {hint} A model on the Hub is written 'organisation/name', "
        "a local one as the path of its folder."
    )


def add_list_parser(subparsers: Any) -> None:
    """`msa-unet list`: the names, what they segment and how well."""
    parser = subparsers.add_parser("list", help="list pretrained checkpoints")
    parser.add_argument("pattern", nargs="?", default="*", help="shell-style wildcard, e.g. '*.dsb2018'")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_list)


def add_info_parser(subparsers: Any) -> None:
    """`msa-unet info NAME`: everything on one card, or in a folder's config."""
    parser = subparsers.add_parser("info", help="show what a checkpoint is")
    parser.add_argument("name", help="a name that `msa-unet list` shows, or a folder of `save_pretrained`")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_info)


def _list(args: argparse.Namespace) -> int:
    known = cards()
    shown = [known[name] for name in list_pretrained(args.pattern)]
    if args.json:
        print(json.dumps([dataclasses.asdict(card) for card in shown], indent=2))
        return 0
    rows = [("name", "classes", "training data", "licence", "MB", "metrics")]
    rows += [
        (c.name, ", ".join(c.class_names), c.dataset, c.licence, f"{c.size / 1e6:.1f}", _metrics(c)) for c in shown
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _info(args: argparse.Namespace) -> int:
    if (Path(args.name) / CONFIG).is_file():
        from .hub import read_config

        values = read_config(Path(args.name) / CONFIG).to_dict()
        texts = {key: printable(value) for key, value in values.items()}
    else:
        card = get_card(args.name)
        values = dataclasses.asdict(card)
        texts = values | {"class_names": ", ".join(card.class_names), "metrics": _metrics(card)}
        texts |= {"size": f"{card.size} bytes", "input_size": "x".join(map(str, card.input_size or ("any",)))}
        texts["revision"] = card.revision or "not published yet"
    if args.json:
        print(json.dumps(values, indent=2))
        return 0
    for key, text in texts.items():
        print(f"{key.replace('_', ' '):<{max(map(len, texts))}} {text}")
    return 0


def _metrics(card: PretrainedCard) -> str:
    return ", ".join(f"{k} {v:.4g} [{low:.4g}, {high:.4g}]" for k, (v, low, high) in card.metrics.items())
