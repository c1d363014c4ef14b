"""Operations and bytes of each part of the network at 512x512, and the time that a GPU's data sheet then allows.

    python benchmarks/roofline.py            # -> benchmarks/results/roofline.json, and the table of docs/cuda.md

Nothing is timed. Every operator of one forward pass (batch norms and attention folded, as for inference) runs on the
meta device; multiply-accumulates are torch's own count, bytes are those of all its inputs and outputs in 16-bit
floats, as if each operator read and wrote device memory. An operator takes at least the longer of operations / peak
and bytes / bandwidth; the sum over operators is a floor for eager kernels without launch cost. Fused kernels, caches
and CUDA graphs go below the bytes, launches go above.
"""

import json
from collections import defaultdict
from typing import Any

import torch
from accuracy import RESULTS, ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from msa_unet import MSAUnet

OUTPUT = RESULTS.parent / "roofline.json"
GPU = "H100 SXM"  # NVIDIA's data sheet: dense bfloat16 tensor cores, HBM3
PEAK = 989e12  # operations per second
BANDWIDTH = 3.35e12  # bytes per second
SIZE = 512
VIEWS = {"aten::view", "aten::_unsafe_view", "aten::permute", "aten::transpose", "aten::t", "aten::slice"} | {
    f"aten::{name}" for name in ("expand", "unsqueeze", "squeeze", "detach", "alias", "select", "split", "chunk")
}


class Account(TorchDispatchMode):
    """Adds up, per part of the network, what its operators compute and move."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0] not in VIEWS:
            count = flop_registry.get(func.overloadpacket)
            operations = count(*args, **(kwargs or {}), out_val=output) if count else 0
            tensors = [t for t in tree_leaves((args, kwargs, output)) if isinstance(t, torch.Tensor)]
            moved = 2 * sum(t.numel() for t in tensors)
            total = self.parts[self.part]
            total["gmac"] += operations / 2e9
            total["megabytes"] += moved / 1e6
            total["microseconds"] += 1e6 * max(operations / PEAK, moved / BANDWIDTH)
            total["operators"] += 1
        return output


def account(model: MSAUnet) -> dict[str, dict[str, float]]:
    """Per part, in the order of the data flow."""
    parts = {
        "backbone": [model.backbone],
        "dense fusion": list(getattr(model.encoder, "fuse", [])),
        "attention": list(model.decoder.attention),
        "decoder": [*model.decoder.ups, *model.decoder.blocks],
        "head": [model.head],
    }
    with Account() as counted:

        def enter(part: str) -> Any:
            return lambda module, inputs: setattr(counted, "part", part)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            counted.part = "pooling, concatenation, resizing"

        counted.part = "pooling, concatenation, resizing"
        for part, modules in parts.items():
            for module in modules:
                module.register_forward_pre_hook(enter(part))
                module.register_forward_hook(leave)
        model(torch.empty(1, model.config.in_channels, SIZE, SIZE, device="meta"))
    return {part: {key: round(value, 2) for key, value in of.items()} for part, of in counted.parts.items()}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = ["| network | part | GMAC | MB moved | operators | floor, µs |", "|---|---|---|---|---|---|"]
    for network, parts in results.items():
        total = {key: sum(of[key] for of in parts.values()) for key in next(iter(parts.values()))}
        for part, of in {**parts, "all": total}.items():
            lines.append(
                f"| {network} | {part} | {of['gmac']:.2f} | {of['megabytes']:.0f} | {of['operators']:.0f} "
                f"| {of['microseconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def rebuild(text: str) -> str:
    """The document with the table between its two marks made anew."""
    head, _, rest = text.partition("<!-- roofline:begin -->\n")
    _, _, tail = rest.partition("<!-- roofline:end -->")
    results = json.loads(OUTPUT.read_text())
    return f"{head}<!-- roofline:begin -->\n\n{table(results)}\n<!-- roofline:end -->{tail}"


def main() -> None:
    results = {}
    for encoder in ("msa", "tf_efficientnet_lite0", "resnet34", "convnext_tiny"):
        results[encoder] = account(MSAUnet(encoder).fuse().to("meta"))
    partial = OUTPUT.with_suffix(".part")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(OUTPUT)
    document = ROOT / "docs" / "cuda.md"
    document.write_text(rebuild(document.read_text()))
    print(table(results))


if __name__ == "__main__":
    main()
