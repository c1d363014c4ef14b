"""Checkpoints on disk and on the Hub: saved atomically, found by name, loaded strictly, never unpickled."""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import loading, registry
from .adapt import adapt
from .config import MAX_CHANNELS, MSAUnetConfig
from .errors import CheckpointError, ConfigError, EncoderError
from .loading import LoadReport, printable
from .registry import CONFIG, README, WEIGHTS, PretrainedCard

if TYPE_CHECKING:
    from .model import MSAUnet

logger = logging.getLogger(__name__)

MAX_TABLES = 64 << 20  # bytes of position tables that any network may have, beside a multiple of its weights
ALIGNMENT = 64  # bytes, of the memory that torch allocates
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def save_pretrained(model: "MSAUnet", folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """See `MSAUnet.save_pretrained`."""
    _check_dtype(dtype)
    folder = Path(folder)
    state = {name: _cast(tensor.detach().cpu(), dtype).contiguous() for name, tensor in model.state_dict().items()}
    with loading.weightless():
        problems = loading.mismatches(
            loading.shapes(_build(type(model), model.config).state_dict()), loading.shapes(state)
        )
    if problems:
        raise CheckpointError(
            "This network is not what its config describes, so it would not load again: " + "; ".join(problems) + "."
        )
    created = not folder.exists()
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        _write_weights(state, temporary / WEIGHTS)
        config = replace(model.config, weights_sha256=loading.sha256_of(temporary / WEIGHTS))
        (temporary / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        (temporary / README).write_text(model_card(config, folder.resolve().name), encoding="utf-8")
        for name in (WEIGHTS, CONFIG, README):
            with (temporary / name).open("rb+") as file:
                os.fsync(file.fileno())
        # each file is replaced whole; were the power cut between two, the digest in the config would give it away
        for name in (WEIGHTS, CONFIG, README):
            os.replace(temporary / name, folder / name)
    except OSError as error:
        raise CheckpointError(
            f"Saving to {str(folder)!r} failed: {printable(error)}. What was there before is unchanged; free space "
            "or choose another folder."
        ) from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        if created:
            with contextlib.suppress(OSError):  # it stays if anything was saved
                folder.rmdir()


def _write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file in which tensors start at multiples of 64 bytes, as torch's own memory does.

    The library orders by name instead, so that mapped tensors lie anywhere: slower, and not the same sums to the bit.
    """
    order = sorted(state, key=lambda name: (state[name].nbytes % ALIGNMENT > 0, -state[name].itemsize, name))
    header, end = {}, 0
    for name in order:
        tensor = state[name]
        dtype = next(key for key, value in loading.DTYPES.items() if value == tensor.dtype)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(state[name].reshape(-1).view(torch.uint8).numpy().data)


def model_card(config: MSAUnetConfig, name: str) -> str:
    """README.md for the Hub: a YAML header that it indexes, and a body in which config values are plain text."""
    dataset = re.sub(r"[^\w.-]+", "-", config.dataset).strip("-")  # the header has room for an identifier
    results = [
        EvalResult("image-segmentation", dataset, config.dataset, metric_type=metric, metric_value=value)
        for metric, value in config.metrics.items()
        if dataset
    ]
    header = ModelCardData(
        model_name=name,
        library_name="msa-unet",
        pipeline_tag="image-segmentation",
        license=config.licence.lower() or None,
        datasets=[dataset] if dataset else None,
        metrics=list(config.metrics) or None,
        eval_results=results or None,
        tags=["msa-unet", "medical", "image-segmentation", "pytorch"],
    ).to_yaml()
    rows = {
        "encoder": config.encoder,
        "input channels": config.in_channels,
        "classes": ", ".join(config.class_names),
        "trained on": f"{config.dataset or 'unknown'} ({config.dataset_licence or 'licence unknown'})",
        "licence of the weights": config.licence or "unknown",
        "mean, std": f"{config.mean}, {config.std}",
        "input size": "x".join(map(str, config.input_size or ("any",))),
        **{f"{metric} on the test split": f"{value:.4g}" for metric, value in config.metrics.items()},
    }
    table = "\n".join(f"| {_literal(key)} | {_literal(value)} |" for key, value in rows.items())
    return f"""---
{header}
---

# {_literal(name)}

A 2D medical image segmentation network, made with the Python package `msa_unet`.

```python
from msa_unet import MSAUnet

model = MSAUnet.from_pretrained("path or Hub id of this folder")
```

| | |
|---|---|
{table}
"""


def push_to_hub(
    model: "MSAUnet",
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload an MSA-Unet checkpoint",
) -> str:
    """See `MSAUnet.push_to_hub`."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, repo_id.rpartition("/")[2])
        save_pretrained(model, folder)
        return upload_folder(folder, repo_id, private=private, token=token, commit_message=commit_message)


def upload_folder(
    folder: Path, repo_id: str, *, private: bool = False, token: str | bool | None = None, commit_message: str
) -> str:
    """Upload a checkpoint folder in one commit, without its registry card; returns the commit's id."""
    with _hub_errors(repo_id):
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            ignore_patterns=[registry.CARD, ".*", "__pycache__"],
        )
        return str(commit.oid)


def from_pretrained(
    cls: type["MSAUnet"],
    name_or_path: str | Path,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    in_channels: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> "MSAUnet":
    """See `MSAUnet.from_pretrained`."""
    _check_dtype(dtype)
    try:
        device = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device is {device!r}, which torch does not know: give for example 'cuda' or 'cpu'."
        ) from error
    folder, card = find(name_or_path, revision, token, cache_dir, local_files_only)
    config = read_config(folder / CONFIG)
    wanted = _adapted_config(config, num_classes, class_names, in_channels)
    path = folder / WEIGHTS
    if not path.is_file():
        raise _without_weights(str(folder), [p.name for p in folder.iterdir()])
    for digest in filter(None, {config.weights_sha256, card.sha256 if card else ""}):
        if loading.sha256_of(path) != digest:
            raise CheckpointError(
                f"{str(path)!r} is not the file that was published: its sha256 differs from {printable(digest)}. It is "
                f"not used; delete it (and {str(path.resolve())!r}) and load again."
            )
    header = loading.read_header(path)
    with loading.weightless():
        source = _build(cls, config)
        model = source if wanted == config else _build(cls, wanted)
    _check(path, source.state_dict(), header)
    if tables := loading.tables(model):
        if sum(t.nbytes for t in tables) > MAX_TABLES + 8 * path.stat().st_size:
            raise ConfigError(
                f"Encoder {config.encoder!r} with encoder_kwargs {dict(config.encoder_kwargs)} needs tables far larger "
                f"than the weights in {str(path)!r}: a size in encoder_kwargs is wrong."
            )
        with loading.unfilled():
            model = _build(cls, wanted)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in header}
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {printable(error)}.") from error
    # the sum of all is finite in nearly every case, and five times quicker to tell
    report = LoadReport(not_finite=[n for n, t in tensors.items() if not t.sum().isfinite() and not t.isfinite().all()])
    if report.not_finite:
        logger.warning("%d tensors hold NaN or infinity (load_report.not_finite).", len(report.not_finite))
    state = adapt(tensors, source, model, report)
    # mapped tensors are used in place where nothing changes, unless sums over them would differ in the last bit
    state = {name: _aligned(_cast(t, dtype or torch.float32)).to(device) for name, t in state.items()}
    model.load_state_dict(state, assign=True)
    model.to(device=device, dtype=dtype)  # what no state dict holds
    model.load_report = report
    return model.eval()


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def find(
    name_or_path: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Path, PretrainedCard | None]:
    """The folder of a checkpoint, and its card if it was asked for by registry name.

    In this order: an existing folder; a registry name, from `registry.roots()`, else from the Hub's cache, else from
    the Hub at the pinned revision; a Hub id, likewise, at `revision`.
    """
    text = os.fspath(name_or_path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"revision={revision!r} means a commit on the Hub, and {text!r} is a local folder.")
        return folder, None
    if isinstance(name_or_path, str) and registry.HUB_ID.fullmatch(text):
        return _download(text, revision, token, cache_dir, local_files_only), None
    if not isinstance(name_or_path, str) or re.search(r"[/\\~]", text) or text.startswith("."):
        raise CheckpointError(
            f"There is no folder {text!r}. A model on the Hub is written 'organisation/name'; "
            f"msa_unet.list_pretrained() lists the names that come with this package."
        )
    card = registry.get_card(text)
    if revision not in (None, card.revision):  # another revision is another file, which the card does not describe
        return _download(card.repo_id, revision, token, cache_dir, local_files_only), None
    for root in registry.roots():
        if (root / text / WEIGHTS).is_file() and (root / text / CONFIG).is_file():
            return root / text, card
    if not card.revision:
        raise CheckpointError(
            f"{text!r} is not on the Hub yet and its weights did not come with this installation: they are in weights/ "
            "of the source repository; point MSA_UNET_WEIGHTS at that folder."
        )
    return _download(card.repo_id, card.revision, token, cache_dir, local_files_only), card


def _download(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None, local_files_only: bool
) -> Path:
    """A snapshot folder of the Hub's cache with config and weights of one commit, downloaded unless they are there."""
    keywords: dict[str, Any] = {"token": token, "cache_dir": cache_dir}

    def snapshot(revision: str | None, offline: bool) -> Path:
        config = Path(hf_hub_download(repo_id, CONFIG, revision=revision, local_files_only=offline, **keywords))
        # a branch may move between two requests: the weights come from the commit that the config came from
        hf_hub_download(repo_id, WEIGHTS, revision=config.parent.name, local_files_only=offline, **keywords)
        return config.parent

    with _hub_errors(repo_id, revision):
        if re.fullmatch("[0-9a-f]{40}", revision or ""):  # cannot have moved, so nobody need be asked
            with contextlib.suppress(hub_errors.LocalEntryNotFoundError):
                return snapshot(revision, offline=True)
        silent: Exception | None = None
        if not local_files_only:
            # the download would try for minutes to reach a server that does not answer; this asks once
            try:
                url = hf_hub_url(repo_id, CONFIG, revision=revision)
                get_hf_file_metadata(url, token=token, timeout=hub_constants.HF_HUB_ETAG_TIMEOUT)
            except Exception as error:  # all other trouble the download meets again, and deals with
                silent = error if re.search("Timeout|Connect", type(error).__name__) else None
        try:
            for wait in (1, 2):  # seconds; not every version of the client tries again by itself, all resume
                try:
                    return snapshot(revision, local_files_only or silent is not None)
                except Exception as error:
                    if not _passes(error):
                        raise
                time.sleep(wait)
            return snapshot(revision, local_files_only)
        except hub_errors.LocalEntryNotFoundError as error:
            raise error from silent or error.__cause__
        except hub_errors.EntryNotFoundError as error:
            raise _without_weights(repo_id, HfApi(token=token).list_repo_files(repo_id, revision=revision)) from error


def _passes(error: Exception) -> bool:
    """Whether it is worth trying again: the server stumbled, or the connection broke off."""
    cause = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", 0)
    return status >= 500 or re.search("Protocol|Chunked|ReadError", type(cause).__name__) is not None


def _without_weights(place: str, files: Sequence[str]) -> CheckpointError:
    pickles = [printable(name) for name in files if name.endswith(PICKLES)]
    if pickles:
        return CheckpointError(
            f"{place!r} offers its weights only as {', '.join(pickles[:5])}, pickle files, which can run code when "
            "opened; none is opened here. Convert it where you trust it: build the network, load its state dict "
            "with torch's weights_only loading, call save_pretrained, and use that folder."
        )
    return CheckpointError(
        f"{place!r} is not a checkpoint of msa_unet: it needs {CONFIG} and {WEIGHTS}, and has "
        f"{', '.join(printable(name) for name in sorted(files)[:8]) or 'no files'}."
    )


@contextlib.contextmanager
def _hub_errors(repo_id: str, revision: str | None = None) -> Any:
    """What goes wrong between here and the Hub, as one typed sentence with the next step."""
    where = f"{repo_id!r}" + (f" at revision {printable(revision)!r}" if revision else "")
    try:
        yield
    except (CheckpointError, ConfigError):
        raise
    except hub_errors.LocalEntryNotFoundError as error:
        if error.__cause__ is None or isinstance(error.__cause__, hub_errors.OfflineModeIsEnabled):
            text = f"{where} is not in the cache, and downloads are switched off (local_files_only or HF_HUB_OFFLINE)"
            step = "allow one download, or copy its folder here and load it by path"
        else:
            text = f"{where} is not in the cache, and the Hub does not answer ({printable(error.__cause__)[:200]})"
            step = "check the connection and HF_ENDPOINT, or load a local folder by path"
        raise CheckpointError(f"{text}: {step}.") from error
    except hub_errors.RepositoryNotFoundError as error:
        names = [card.name for card in registry.cards().values() if card.name == repo_id.partition("/")[2]]
        hint = f" Did you mean the registry name {names[0]!r}?" if names else ""
        raise CheckpointError(
            f"There is no {where} on the Hub that you may read: check the spelling, or pass token= if it is private or "
            f"gated.{hint}"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo_id!r} has no revision {revision!r}: give a branch, tag or commit of it."
        ) from error
    except hub_errors.HFValidationError as error:
        raise ConfigError(f"{printable(error)[:300]}") from error
    except Exception as error:  # the client's transport errors have no common type across its versions
        raise CheckpointError(
            f"{where} could not be transferred: {type(error).__name__}: {printable(error)[:300]}. Try again; if the "
            "cache is read-only or full, pass cache_dir=."
        ) from error


def read_config(path: Path) -> MSAUnetConfig:
    """The config in `path`, a file that is not trusted.

    Raises:
        CheckpointError: it is absent, too large, or not JSON.
        ConfigError: it does not describe a network.
    """
    return MSAUnetConfig.from_dict(loading.read_json(registry.read_small(path), repr(str(path))))


def _build(cls: type["MSAUnet"], config: MSAUnetConfig) -> "MSAUnet":
    try:
        return cls.from_config(config)
    except (CheckpointError, ConfigError, EncoderError):
        raise
    except Exception as error:  # what timm raises for a value that makes no network has no common type
        raise ConfigError(
            f"Encoder {config.encoder!r} with encoder_kwargs {dict(config.encoder_kwargs)} makes no network: "
            f"{type(error).__name__}: {printable(error)[:200]}."
        ) from error


def _check(path: Path, wanted: Mapping[str, Tensor], header: Mapping[str, tuple[str, list[int]]]) -> None:
    """Raise unless the file holds just the tensors that are wanted; nothing has been allocated yet."""
    problems = loading.mismatches(loading.shapes(wanted), {name: shape for name, (_, shape) in header.items()})
    for name, tensor in wanted.items():
        if name in header:
            stored = loading.DTYPES[header[name][0]]
            if stored != tensor.dtype and not (stored.is_floating_point and tensor.is_floating_point()):
                problems.append(f"{name} is stored as {stored} instead of {tensor.dtype}")
    if problems:
        raise CheckpointError(
            f"{str(path)!r} does not fit the network that its config describes, {len(problems)} tensors differ: "
            + "; ".join(problems)
            + ". To change classes or channels of a trained network pass num_classes=, class_names= or in_channels=."
        )


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in loading.FLOATS:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(map(str, loading.FLOATS))}, or None.")


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _literal(value: object) -> str:
    """Any value as Markdown that shows it letter by letter."""
    return re.sub(r"([][!#$&*.:<>@\\^_`{|}~])", r"\\\1", printable(value))


def _adapted_config(
    config: MSAUnetConfig, num_classes: int | None, class_names: Sequence[str] | None, in_channels: int | None
) -> MSAUnetConfig:
    """The config of the network that is wanted, given that of the one that is stored."""
    changes: dict[str, Any] = {}
    if class_names is not None:
        changes |= {"class_names": tuple(class_names), "num_classes": num_classes or len(class_names)}
    elif num_classes is not None and num_classes != config.num_classes:
        changes |= {"class_names": (), "num_classes": num_classes}
    if in_channels is not None and in_channels != config.in_channels:
        mean, std = config.mean, config.std
        changes["in_channels"] = in_channels
        if isinstance(in_channels, int) and 0 < in_channels <= MAX_CHANNELS:  # else the config says what is wrong
            spread = [tuple(v[i % len(v)] for i in range(in_channels)) for v in (mean, std)]
            changes |= dict(
                zip(("mean", "std"), spread if in_channels > 1 else [(fmean(mean),), (fmean(std),)], strict=True)
            )
    if not changes:
        return config
    # the metrics, the temperature and the file's digest are those of the network as it was stored
    return replace(config, **changes, metrics={}, temperature=1.0, weights_sha256="")
