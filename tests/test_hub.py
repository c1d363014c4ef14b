"""The real huggingface_hub client against a server that speaks its protocol, in fair weather and foul."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_client import digest
from hub_server import TOKEN, HubServer, serve

from msa_unet import MSAUnet
from msa_unet.registry import PretrainedCard

Ask = Callable[..., dict[str, str]]
REPO = "lab/msa.cells"
LIMIT = 60  # seconds, for any one request


class Client:
    """One process with the real client in it."""

    def __init__(self, server: HubServer, home: Path, **environment: str) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MSA_UNET_"))} | {
            "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*", "OMP_NUM_THREADS": "1", **environment,
        }  # fmt: skip
        script = Path(__file__).with_name("hub_client.py")
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.answer()

    def answer(self) -> dict[str, str]:
        timer = threading.Timer(LIMIT, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        assert line, "the client died, or took too long"
        return json.loads(line)

    def send(self, **request: Any) -> None:
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()

    def __call__(self, name: str = REPO, do: str = "load", **options: Any) -> dict[str, str]:
        self.send(do=do, name=name, **options)
        return self.answer()

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait(10)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with serve() as server:
        yield server


@contextmanager
def client(server: HubServer, home: Path, **environment: str) -> Iterator[Client]:
    process = Client(server, home, **environment)
    try:
        yield process
    finally:
        process.stop()


@pytest.fixture(scope="module")
def shared_client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    root = tmp_path_factory.mktemp("weights")
    with client(hub, tmp_path_factory.mktemp("home"), MSA_UNET_WEIGHTS=str(root)) as process:
        process.weights_root = root
        yield process


@pytest.fixture
def ask(hub: HubServer, shared_client: Client, tmp_path: Path) -> Iterator[Ask]:
    """Load with an empty cache; the server forgets what it had and what went wrong."""
    for store in (hub.repos, hub.blobs, hub.log):
        store.clear()
    hub.fail = hub.cut = 0
    hub.hang = hub.tamper = False
    hub.slow = 0.0
    yield lambda name=REPO, **options: shared_client(name, cache_dir=tmp_path / "cache", **options)
    hub.hang = False


def checkpoint(folder: Path, seed: int = 0, widths: tuple[int, ...] = (4, 8, 12, 16)) -> tuple[dict[str, bytes], str]:
    """The files of a small checkpoint, and the digest that a client which loaded it reports."""
    torch.manual_seed(seed)
    model = MSAUnet(decoder_channels=widths)
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}, digest(model)


def test_first_download_then_none(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    files, expected = checkpoint(tmp_path / "model")
    hub.add(REPO, files)
    assert ask() == {"digest": expected}
    assert len(hub.bodies()) == 2  # config and weights
    hub.log.clear()
    assert ask() == {"digest": expected}
    assert hub.bodies() == []


def test_pinned_revision_stays_and_main_moves(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    old_files, old = checkpoint(tmp_path / "old", 1)
    new_files, new = checkpoint(tmp_path / "new", 2)
    pinned = hub.add(REPO, old_files)
    assert ask() == {"digest": old}
    hub.add(REPO, new_files)
    assert ask() == {"digest": new}
    assert ask(revision=pinned) == {"digest": old}
    hub.log.clear()
    hub.hang = True  # what is pinned and cached asks nobody
    assert ask(revision=pinned) == {"digest": old}


def test_unknown_revision(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    hub.add(REPO, checkpoint(tmp_path / "model")[0])
    answer = ask(revision="v9")
    assert answer["error"] == "CheckpointError"
    assert "has no revision 'v9'" in answer["message"]


def test_private_repository_needs_a_token(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    files, expected = checkpoint(tmp_path / "model")
    hub.add(REPO, files, private=True)
    answer = ask()
    assert answer["error"] == "CheckpointError"
    assert "token=" in answer["message"]
    assert "token=" in ask(token="hf_wrong")["message"]
    assert ask(token=TOKEN) == {"digest": expected}


def test_missing_repository_and_names_mistaken_for_each_other(ask: Ask, shared_client: Client, tmp_path: Path) -> None:
    answer = ask("nobody/nothing")
    assert answer["error"] == "CheckpointError"
    assert "'nobody/nothing'" in answer["message"]
    folder = tmp_path / "msa.cells"
    checkpoint(folder)
    shutil.copytree(folder, shared_client.weights_root / "msa.cells")
    try:
        PretrainedCard.describe(folder, repo_id="lab/msa.cells").write(shared_client.weights_root / "msa.cells")
        assert "registry name 'msa.cells'" in ask("somebody/msa.cells")["message"]
        assert "did you mean 'msa.cells'" in ask("msa.cell")["message"]
        assert "organisation/name" in ask("msa.cell")["message"]
    finally:
        shutil.rmtree(shared_client.weights_root / "msa.cells")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_file(hub: HubServer, ask: Ask, tmp_path: Path, missing: str) -> None:
    files, _ = checkpoint(tmp_path / "model")
    del files[missing]
    hub.add(REPO, files)
    answer = ask()
    assert answer["error"] == "CheckpointError"
    assert "needs config.json and model.safetensors" in answer["message"]


def test_a_repository_of_pickles_is_refused(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    files, _ = checkpoint(tmp_path / "model")
    hub.add(REPO, {"config.json": files["config.json"], "pytorch_model.bin": b"\x80\x04."})
    answer = ask()
    assert answer["error"] == "CheckpointError"
    assert "pytorch_model.bin" in answer["message"]
    assert "save_pretrained" in answer["message"]
    assert not any("pytorch_model" in path for path in hub.bodies())


def test_an_error_of_the_server_that_passes(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    files, expected = checkpoint(tmp_path / "model")
    hub.add(REPO, files)
    hub.fail = 2
    assert ask() == {"digest": expected}
    assert hub.fail == 0


def test_a_cut_connection_is_resumed(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    files, expected = checkpoint(tmp_path / "model", widths=(32, 64, 128, 256))  # the client writes 10 MB at a time
    hub.add(REPO, files)
    hub.cut = 1
    assert ask() == {"digest": expected}
    sizes = [size for method, path, size in hub.log if method == "GET" and path.startswith("/objects/")]
    assert len(sizes) == 2
    assert sizes[1] < sizes[0] == len(files["model.safetensors"]), "what had arrived is not asked for again"


def test_a_server_that_never_answers(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    files, expected = checkpoint(tmp_path / "model")
    hub.add(REPO, files)
    hub.hang = True
    start = time.monotonic()
    answer = ask()
    assert time.monotonic() - start < 20
    assert answer["error"] == "CheckpointError"
    assert "does not answer" in answer["message"]
    assert "HF_ENDPOINT" in answer["message"]
    hub.hang = False
    assert ask() == {"digest": expected}
    hub.hang = True
    assert ask() == {"digest": expected}, "what is in the cache loads all the same"


def test_nobody_listens(tmp_path: Path, hub: HubServer) -> None:
    with client(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9") as process:
        answer = process()
    assert answer["error"] == "CheckpointError"
    assert "does not answer" in answer["message"]


def test_content_that_is_not_what_was_published(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    files, expected = checkpoint(tmp_path / "model")
    hub.add(REPO, files)
    hub.tamper = True
    answer = ask()
    assert answer["error"] == "CheckpointError"
    assert "sha256" in answer["message"]
    named = Path(answer["message"].split("'")[1])
    assert named.name == "model.safetensors"
    hub.tamper = False
    for path in (named.resolve(), named):  # as the message says
        path.unlink()
    assert ask() == {"digest": expected}


def test_two_processes_download_at_once(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    files, expected = checkpoint(tmp_path / "model")
    hub.add(REPO, files)
    hub.slow = 0.5
    with client(hub, tmp_path / "home") as one, client(hub, tmp_path / "home") as two:
        for process in (one, two):
            process.send(do="load", name=REPO)
        assert one.answer() == two.answer() == {"digest": expected}
    assert not list((tmp_path / "home").rglob("*.incomplete"))


def test_offline(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    files, expected = checkpoint(tmp_path / "model")
    hub.add(REPO, files)
    answer = ask(local_files_only=True)
    assert answer["error"] == "CheckpointError"
    assert "switched off" in answer["message"]
    assert "allow one download" in answer["message"]
    assert hub.log == []
    ask()
    hub.log.clear()
    assert ask(local_files_only=True) == {"digest": expected}
    with client(hub, tmp_path / "home", HF_HUB_OFFLINE="1") as process:
        assert process(cache_dir=tmp_path / "cache") == {"digest": expected}
        assert "switched off" in process("lab/other", cache_dir=tmp_path / "cache")["message"]
        assert process(str(tmp_path / "model")) == {"digest": expected}
    assert hub.log == []


def test_a_cache_that_cannot_be_written(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    files, expected = checkpoint(tmp_path / "model")
    hub.add(REPO, files)
    ask()
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copytree(tmp_path / "cache", tmp_path / "full", symlinks=True)
    for path in (empty, tmp_path / "full", *(tmp_path / "full").rglob("*")):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.getuid() and path.name.startswith("pytest-"):
            path.chmod(0o755)
    tmp_path.chmod(0o755)
    with client(hub, tmp_path / "home") as process:
        process(cache_dir=tmp_path / "cache")  # everything is imported now
        if os.getuid() == 0:
            process("65534", do="become")
        assert process(cache_dir=tmp_path / "full") == {"digest": expected}
        answer = process(cache_dir=empty)
    assert answer["error"] == "CheckpointError"
    assert "cache_dir=" in answer["message"]


def test_push_and_read_back_by_another_process(hub: HubServer, ask: Ask, tmp_path: Path) -> None:
    _, expected = checkpoint(tmp_path / "model")
    refused = ask("lab/pushed", do="push", folder=tmp_path / "model")
    assert refused["error"] == "TypeError"  # cache_dir is no option of a push
    with client(hub, tmp_path / "home") as pusher:
        assert "CheckpointError" in pusher("lab/pushed", do="push", folder=tmp_path / "model")["error"]
        answer = pusher("lab/pushed", do="push", folder=tmp_path / "model", token=TOKEN)
    repo = hub.repos["lab/pushed"]
    assert answer == {"commit": repo.ids()[-1]}
    assert len(repo.commits) == 2, "the empty one of a new repository, and one for all files"
    assert sorted(repo.commits[-1]) == ["README.md", "config.json", "model.safetensors"]
    assert ask("lab/pushed") == {"digest": expected}


def test_registry_name_is_fetched_at_the_pinned_revision(
    hub: HubServer, ask: Ask, shared_client: Client, tmp_path: Path
) -> None:
    """Cards come along with the package, weights need not: then the Hub has them, and the card has their digest."""
    files, expected = checkpoint(tmp_path / "msa.cells")
    pinned = hub.add(REPO, files)
    hub.add(REPO, checkpoint(tmp_path / "newer", 5)[0])
    place = shared_client.weights_root / "msa.cells"
    place.mkdir()
    try:
        card = PretrainedCard.describe(tmp_path / "msa.cells", repo_id=REPO, revision=pinned)
        card.write(place)
        assert ask("msa.cells") == {"digest": expected}
        assert hub.bodies() != []
        hub.log.clear()
        assert ask("msa.cells") == {"digest": expected}
        assert hub.log == [], "pinned and cached: nobody is asked"
        # the card's digest counts even if the repository's own config agrees with other weights
        PretrainedCard(**{**vars(card), "sha256": hashlib.sha256(b"other").hexdigest()}).write(place)
        assert "sha256" in ask("msa.cells")["message"]
        for name in ("config.json", "model.safetensors"):
            (place / name).write_bytes(files[name])
        card.write(place)
        hub.hang = True
        assert ask("msa.cells") == {"digest": expected}, "what came along needs no Hub"
        shutil.rmtree(place)
        place.mkdir()
        PretrainedCard(**{**vars(card), "revision": ""}).write(place)
        assert "not on the Hub yet" in ask("msa.cells")["message"]
    finally:
        shutil.rmtree(place)
