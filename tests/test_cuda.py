"""What only a GPU can show. Everything here skips without one; tests/test_device.py shows the rest on any machine."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import layout_copies, small

from msa_unet import MSAUnet, predict

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ENCODERS = ["msa", "resnet18", "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224"]


def pair(encoder: str) -> tuple[MSAUnet, MSAUnet]:
    """The same network on the CPU and on the GPU."""
    model = small(encoder).eval()
    return model, copy.deepcopy(model).cuda()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_gpu_computes_what_the_cpu_computes(encoder: str):
    cpu, gpu = pair(encoder)
    x = torch.randn(2, 3, 70, 90)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            assert (gpu(x.cuda()).cpu() - cpu(x)).abs().max() < 1e-3
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_autocast_agrees_and_trains(encoder: str, dtype: torch.dtype):
    _, model = pair(encoder)
    x = torch.randn(2, 3, 70, 90, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype):
        logits = model(x).float()
    with torch.no_grad():
        wanted = model(x)
    assert (logits - wanted).abs().max() < 0.05 * wanted.abs().max()
    model.train()
    with torch.autocast("cuda", dtype):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_step_never_waits_for_the_gpu(encoder: str):
    _, model = pair(encoder)
    x = torch.randn(2, 3, 70, 90, device="cuda")
    model.train()(x).mean().backward()  # what the libraries set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).square().mean().backward()
        model.forward_levels(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("encoder", ENCODERS)
def test_cuda_graphs_replay_the_same_function(encoder: str):
    _, model = pair(encoder)
    static = torch.zeros(1, 3, 96, 96, device="cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        logits = model(static)
    for _ in range(2):
        x = torch.randn_like(static)
        static.copy_(x)
        graph.replay()
        with torch.no_grad():
            assert torch.allclose(logits, model(x), atol=1e-3)


def test_reduce_overhead_compiles_for_static_shapes():
    _, model = pair("resnet18")
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(1, 3, 96, 96, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            logits = compiled(x).clone()
        assert torch.allclose(logits, model(x), atol=1e-3)


def test_channels_last_is_kept_inside():
    _, model = pair("tf_efficientnet_lite0")
    model = model.to(memory_format=torch.channels_last)
    copied = layout_copies(model)
    with torch.no_grad():
        model(torch.randn(2, 3, 70, 90, device="cuda").contiguous(memory_format=torch.channels_last))
    assert copied == []


def test_the_published_network_needs_little_memory():
    model = MSAUnet().cuda().eval()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model(torch.randn(1, 3, 1024, 1024, device="cuda"))
    assert torch.cuda.max_memory_allocated() < 4e9


def test_predict_gives_arrays_of_the_host():
    cpu, gpu = pair("resnet18")
    image = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    ours, theirs = predict(gpu, image), predict(cpu, image)
    assert isinstance(ours.probabilities, np.ndarray)
    assert np.abs(ours.probabilities - theirs.probabilities).max() < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_as_one(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\n"
        "from msa_unet import MSAUnet\n"
        "rank = int(os.environ['RANK']); torch.cuda.set_device(rank); dist.init_process_group('nccl')\n"
        "torch.manual_seed(0); model = MSAUnet('resnet18').cuda().eval()\n"
        "x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).cuda()\n"
        "alone = torch.autograd.grad(model(x).square().mean(), list(model.decoder.parameters()))\n"
        "ddp = torch.nn.parallel.DistributedDataParallel(model, [rank])\n"
        "ddp(x[rank::2]).square().mean().backward()\n"
        "for p, g in zip(model.decoder.parameters(), alone):\n"
        "    torch.testing.assert_close(p.grad, g, atol=1e-4, rtol=1e-3)\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
