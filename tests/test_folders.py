"""Folders: runs go on where they stopped, bad files stop nothing, and several processes do what one does."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from msa_unet.cli import main

rng = np.random.default_rng(0)
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def folder(tmp_path):
    """Eleven images, two of them in a folder below, three of another size, and two files that are none."""
    images = tmp_path / "images"
    (images / "deeper").mkdir(parents=True)
    for i in range(11):
        size = (40, 50, 3) if i % 4 else (33, 47, 3)
        name = f"deeper/{i}.png" if i > 8 else f"{i}.png"
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(images / name)
    (images / "bad.png").write_text("no picture")
    np.save(images / "other.npy", np.zeros(3))
    return images


def masks(out):
    return {p.relative_to(out).as_posix(): np.asarray(Image.open(p)) for p in out.rglob("*") if p.is_file()}


def test_a_batch_does_what_single_images_do(folder, checkpoint, tmp_path, capsys):
    for batch, name in (("1", "singly"), ("4", "batches")):
        arguments = ["predict", str(folder), "-o", str(tmp_path / name), "--model", str(checkpoint), "--batch", batch]
        assert main(arguments) == 1
        output = capsys.readouterr()
        assert output.err.count("bad.png: ") == 1
        assert output.out.count("cell") == 11
    singly, batches = masks(tmp_path / "singly"), masks(tmp_path / "batches")
    assert len(singly) == 11
    assert singly.keys() == batches.keys()
    assert all(np.array_equal(mask, batches[name]) for name, mask in singly.items())


def test_what_is_done_is_not_done_again(folder, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["predict", str(folder), "-o", str(out), "--model", str(checkpoint)]
    assert main(arguments) == 1
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    (out / "3_mask.png").unlink()
    (folder / "bad.png").unlink()
    capsys.readouterr()
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert "10 images have their results already" in output.err
    assert output.out.count("\n") == 1
    again = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert [path.name for path in first if first[path] != again[path]] == ["3_mask.png"]
    assert main([*arguments, "--overlay"]) == 0  # more is asked for than there is
    assert len(list(out.rglob("*_overlay.png"))) == 11
    assert main([*arguments, "--overwrite"]) == 0
    assert all(path.stat().st_mtime_ns > again[path] for path in again)


def test_a_killed_run_leaves_whole_files_and_goes_on(folder, checkpoint, tmp_path):
    out = tmp_path / "out"
    (folder / "bad.png").unlink()
    code = "import sys; from msa_unet.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "predict", folder, "-o", out, "--model", checkpoint]
    with subprocess.Popen([*map(str, command)], env=ENVIRONMENT, cwd=tempfile.gettempdir()) as process:
        deadline = time.monotonic() + 120
        while not list(out.glob("*_mask.png")) and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    left = list(out.rglob("*_mask.png"))
    assert left
    for path in left:
        Image.open(path).load()
    assert main(["predict", str(folder), "-o", str(out), "--model", str(checkpoint)]) == 0
    assert len(list(out.rglob("*_mask.png"))) == 11


def test_two_processes_do_what_one_does(folder, checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    assert main(["predict", str(folder), "-o", str(tmp_path / "one"), "--model", str(checkpoint)]) == 1
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]  # means CPUs
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    script = [ROOT / "examples" / "segment_folder.py", folder, tmp_path / "two", "--model", checkpoint, "--batch", "2"]
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "home")}

    def run():
        return subprocess.run(
            [*map(str, [*launch, *script])], capture_output=True, text=True, timeout=600, env=environment
        )

    result = run()
    assert result.returncode != 0  # the bad file
    assert "process 1 of 2: 6 images" in result.stdout
    assert "process 2 of 2: 6 images" in result.stdout
    assert result.stderr.count(f"{folder / 'bad.png'}: not a readable") == 1
    one, two = masks(tmp_path / "one"), masks(tmp_path / "two")
    assert len(one) == 11
    assert one.keys() == two.keys()
    assert all(np.array_equal(mask, two[name]) for name, mask in one.items())
    (folder / "bad.png").unlink()
    result = run()  # nothing is left to do
    assert result.returncode == 0, result.stderr
