"""torch.compile: one graph for all sizes, without breaks, that computes what eager mode does, train step included."""

import copy

import pytest
import torch
from conftest import needs_compiler, small
from torch import nn
from torch._dynamo.testing import CompileCounter

from msa_unet import InputError, MSAUnet

for_new_torch = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="compiling was tried with torch 2.14; in 2.4 the graph breaks at the padding"
)

SIZES = ((96, 128), (64, 64), (160, 32), (70, 90), (33, 47), (300, 35))  # "msa" makes another graph below 32 pixels
TINY = {"msa": (8, 8, 16, 16), "resnet10t": (8, 8, 16, 16, 16), "convnext_atto": (), "vit_tiny_patch16_224": ()}


def tiny(encoder: str) -> MSAUnet:
    return MSAUnet(encoder, num_classes=2, decoder_channels=TINY[encoder])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@for_new_torch
@pytest.mark.parametrize("encoder", TINY)
def test_one_graph_without_breaks_for_all_sizes(encoder: str):
    counter = CompileCounter()
    model = tiny(encoder).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(2, 3, *size)
            assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


def test_bad_input_is_refused_when_compiled():
    with pytest.raises(InputError, match="uint8"):
        torch.compile(small("resnet10t"), backend="eager")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@needs_compiler
def test_inductor_computes_what_eager_mode_does():
    model = tiny("msa").eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in SIZES[-2:]:
            x = torch.randn(2, 3, *size)
            wanted = model(x)
            assert (compiled(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@for_new_torch
@needs_compiler
def test_inductor_trains_as_eager_mode_does():
    eager = tiny("resnet10t")
    compiled, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    x, target = torch.randn(4, 3, 70, 90), torch.randint(0, 2, (4, 70, 90))
    losses, gradients = [], []
    for model, run in ((exact, exact), (eager, eager), (compiled, torch.compile(compiled, fullgraph=True))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            loss = nn.functional.cross_entropy(run(x.to(next(model.parameters()).dtype)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            gradients.append([p.grad.double() for p in model.parameters()])
    assert losses[4:] == pytest.approx(losses[2:4], rel=1e-4)  # the second has seen the first one's step

    def error(found):  # rounding can turn a ReLU over, in eager mode as well
        largest = max(g.abs().max() for g in gradients[0])
        return max((a - b).abs().max() / largest for a, b in zip(found, gradients[0], strict=True))

    assert error(gradients[4]) < 2 * error(gradients[2]) + 1e-4
