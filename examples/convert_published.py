"""Make a folder for `MSAUnet.from_pretrained` of a checkpoint of the published MSA-Unet code.

    python examples/convert_published.py msa_unet.pth my-model --no-antialias --class-names polyp

The file holds a state dict, or one under "state_dict" or "model", with or without the prefix "module." of DataParallel.
It is opened with torch's weights_only loading, which runs no code of the file. The exit status is 2 if it does not fit.
"""

import argparse
import pickle
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from msa_unet import CheckpointError, ConfigError, MSAUnet


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that torch saved, under the published names."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as a state dict: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise CheckpointError(
            f"{path} holds no state dict: save the published network's with torch.save and try again."
        )
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=".pth or .pt")
    parser.add_argument("output", type=Path, help="folder to fill")
    parser.add_argument(
        "--antialias",
        action=argparse.BooleanOptionalAction,
        required=True,
        help="--no-antialias if it was trained with torchvision below 0.17",
    )
    parser.add_argument("--class-names", nargs="+", default=[], metavar="NAME", help="one per class")
    args = parser.parse_args(argv)
    try:
        model = MSAUnet.from_published(read(args.checkpoint), antialias=args.antialias)
        model.config = replace(model.config, class_names=tuple(args.class_names or model.config.class_names))
        model.save_pretrained(args.output)
    except (CheckpointError, ConfigError) as error:
        print(f"convert_published: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {len(model.load_report.loaded)} tensors, {len(model.load_report.dropped)} dropped")
    for name in model.load_report.dropped:
        print(f"  dropped {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
