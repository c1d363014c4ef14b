"""Ready for CUDA without a GPU: nothing is made on a default device, copied to the host or decided by values.

Fake tensors carry a device without having one: an operator that mixes a "cuda" tensor with one that the code made on
the CPU fails, and so does everything that would read a value. The backward pass cannot run with them on a machine
without a GPU (autograd's engine asks for the device), so there the same is seen on the meta device.
"""

import pytest
import torch
from conftest import small
from test_encoders import NAMES
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msa_unet import MSAUnet

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="fake tensors were tried with torch 2.14; in 2.4 they end the process"
)

CUDA = torch.device("cuda:0")
# timm: the position encoding of EdgeNeXt makes a mask on the host and copies it over, CSATv2 its constants
KNOWN_STRAYS = {
    "edgenext_xx_small": {"aten::zeros", "aten::_to_copy"},
    "csatv2": {"aten::lift_fresh", "aten::_to_copy", "prim::device"},
}


class Strays(TorchDispatchMode):
    """Notes the operators that touch a tensor with more than one element anywhere but on `device`, or read a value.

    `.item()`, a branch on a value, `.cpu()` and `.numpy()` are all among them.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, output)) if isinstance(t, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default or any(
            t.device != self.device and t.numel() > 1 for t in tensors
        ):
            self.found.add(func.name())
        return output


def on_meta(encoder: str) -> MSAUnet:
    return small(encoder).to("meta")  # encoders that read values while they are built cannot be built without any


def as_fake(tensor: torch.Tensor, mode: FakeTensorMode) -> FakeTensor:
    return FakeTensor(mode, tensor.detach().to("meta"), CUDA)


def to_fake_cuda(model: MSAUnet, mode: FakeTensorMode) -> MSAUnet:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(as_fake(parameter, mode), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = as_fake(buffer, mode)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("encoder", ["msa", *NAMES])
def test_forward_stays_on_the_device(encoder: str, training: bool):
    mode = FakeTensorMode()
    model = on_meta(encoder)
    if not torch.cuda.is_available() and any(isinstance(module, torch.nn.LSTM) for module in model.modules()):
        pytest.skip("torch asks the GPU's own library how to run an LSTM")
    to_fake_cuda(model, mode).train(training)
    x = as_fake(torch.empty(2, 3, 250, 190), mode)
    with mode, Strays(CUDA) as strays:
        levels = model.forward_levels(x)
        logits = model(x)
    assert logits.shape == (2, 2, 250, 190)
    assert {t.device for t in (logits, *levels)} == {CUDA}
    assert strays.found <= KNOWN_STRAYS.get(encoder, set())


@pytest.mark.parametrize("encoder", ["msa", *NAMES])
def test_backward_stays_on_the_device(encoder: str):
    model = on_meta(encoder).train()
    x = torch.empty(2, 3, 250, 190, device="meta")
    with Strays(torch.device("meta")) as strays:
        model(x).square().mean().backward()
    assert strays.found <= KNOWN_STRAYS.get(encoder, set())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert {g.device.type for g in gradients} == {"meta"}


@pytest.mark.parametrize("sin", [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: x.numpy(), lambda x: x[x > 0]])
def test_what_reads_the_device_is_noticed(sin):
    mode = FakeTensorMode()
    x = as_fake(torch.empty(4), mode)
    strays = Strays(CUDA)
    try:
        with mode, strays:
            sin(x)
    except Exception:  # the mode itself refuses most of them
        return
    assert strays.found
