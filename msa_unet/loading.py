"""Strict loading: what a checkpoint holds against what a network wants, reported in full."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Shapes = Mapping[str, Sequence[int]]


@dataclass
class LoadReport:
    """What became of every tensor when a checkpoint was loaded; prints as a short summary."""

    loaded: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        for kind in ("adapted", "initialised", "dropped"):
            names = getattr(self, kind)
            if names:
                lines.append(f"{len(names)} {kind}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}")
        return "\n".join(lines)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The shape of each tensor, by name."""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def mismatches(wanted: Shapes, found: Shapes, optional: Iterable[str] = ()) -> list[str]:
    """One phrase for every missing, unexpected and misshapen tensor; names in `optional` may be absent or differ."""
    free = set(optional)
    problems = [f"missing {name}" for name in sorted(wanted.keys() - found.keys() - free)]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - wanted.keys() - free)]
    problems += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and name not in free and list(found[name]) != list(shape)
    ]
    return problems
