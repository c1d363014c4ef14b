"""examples/finetune.py in float64, its batch norms keeping their statistics, which notes the gradients of every step.

    python tests/finetune_recorded.py FOLDER_FOR_GRADIENTS [arguments of finetune.py]

Batch statistics of half a batch are not those of the whole, and without CUDA there is no layer that shares them. In
float32 a ReLU whose input is zero to rounding falls either way.
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import finetune

FOLDER = Path(sys.argv[1])


class Recorder(torch.optim.AdamW):
    steps = 0

    def step(self, closure=None):
        gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        torch.save(gradients, FOLDER / f"{os.environ.get('RANK', '0')}-{self.steps}.pt")
        self.steps += 1
        return super().step(closure)


def train(self, mode=True, original=finetune.MSAUnet.train):
    original(self, mode)
    for module in self.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return self


def forward(self, x, original=finetune.MSAUnet.forward):
    return original(self, x.double())


torch.set_default_dtype(torch.float64)
finetune.MSAUnet.train = train
finetune.MSAUnet.forward = forward
torch.optim.AdamW = Recorder
finetune.main(sys.argv[2:])
