"""MSA-Unet: dense multi-level fusion on the way down, attention on the finest skip, and a vote of every depth.

    image -> encoder (one feature map per level) -> decoder (with attention on skips) -> head (logits per level) -> sum

Source: Xiaoyan Guo and Yuefei Wang, MSA-Unet, Chengdu University, 2023. This is an independent implementation.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import SpatialChannelAttention
from .config import Attention, MSAUnetConfig
from .encoders import MSAEncoder, TimmEncoder, parameters_of
from .errors import ConfigError, InputError
from .fusion import fold_batch_norms
from .layers import at_least_float32, double_conv, may_differ, resize
from .loading import LoadReport


class MSAUnet(nn.Module):
    """The segmentation network. `model(x)` maps (N, C, H, W) floats to (N, K, H, W) logits for any H and W from 1 up.

    >>> model = MSAUnet("resnet18", num_classes=3).eval()
    >>> model(torch.rand(1, 3, 250, 190)).shape
    torch.Size([1, 3, 250, 190])

    Args:
        encoder: "msa", the published network, or any architecture of timm (`msa_unet.list_encoders()`).
        in_channels: the C of the images.
        num_classes: K; 1 means one foreground class (sigmoid), more means softmax with class 0 as background.
        encoder_weights: False for random, True for timm's download, or a path to a .safetensors file with timm's keys.
        encoder_kwargs: passed on to timm, for example {"drop_path_rate": 0.1}.
        decoder_channels: width per level, finest first. "msa" has four (published: 64, 128, 256, 512), and a
            bottleneck of twice the last; a timm encoder has one per stride 2, 4, 8, ... up to its coarsest. Empty for
            the defaults.
        attention: which skips pass through attention: "finest" (published), "all" or "none".
        antialias: whether "msa" shrinks earlier levels with antialiasing, as image libraries do today, or without, as
            they did when the network was published.
        class_names: one per class.

    Raises:
        ConfigError: an argument has an impossible value.
        EncoderError: timm refuses `encoder_kwargs`, or `encoder_weights` do not fit or cannot be fetched.
    """

    def __init__(
        self,
        encoder: str = "msa",
        *,
        in_channels: int = 3,
        num_classes: int = 1,
        encoder_weights: bool | str | Path = False,
        encoder_kwargs: Mapping[str, Any] | None = None,
        decoder_channels: Sequence[int] = (),
        attention: Attention = "finest",
        antialias: bool = True,
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        config = MSAUnetConfig(
            encoder=encoder,
            in_channels=in_channels,
            num_classes=num_classes,
            decoder_channels=tuple(decoder_channels),
            attention=attention,
            antialias=antialias,
            encoder_kwargs=dict(encoder_kwargs or {}),
            class_names=tuple(class_names),
        )
        self.encoder: MSAEncoder | TimmEncoder
        if encoder == "msa":
            if encoder_weights or encoder_kwargs:
                raise ConfigError(
                    "encoder 'msa' takes no encoder_weights and no encoder_kwargs: it is not a timm model."
                )
            self.encoder = MSAEncoder(in_channels, config.decoder_channels, antialias)
        else:
            self.encoder = TimmEncoder(
                encoder, in_channels, config.decoder_channels, config.encoder_kwargs, encoder_weights
            )
        self.config = replace(config, decoder_channels=self.encoder.widths)
        self.load_report: LoadReport | None = None
        self.decoder = Decoder(self.encoder.channels, attention)
        self.head = VotingHead(self.encoder.channels, num_classes, subpixels=self.encoder.strides[0])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K, H, W) of images (N, C, H, W), which are normalised with `config.mean` and `config.std`.

        Raises:
            InputError: `x` is not a floating-point tensor of rank 4 with the network's number of channels.
        """
        (*coarse, finest), frame = self._votes(x)
        # coarser votes meet at the finest level's own resolution; their sum is resized once
        together = functools.reduce(torch.add, (self._at_finest(vote, frame) for vote in coarse))
        logits = resize(together, frame) + at_least_float32(finest)
        return logits[..., : x.shape[2], : x.shape[3]].to(finest.dtype)

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        """What each level votes, coarse to fine, each resized to (N, K, H, W); their sum is `model(x)`.

        For deep supervision: every level, or every running sum, can have a loss of its own.

        >>> levels = model.forward_levels(torch.rand(1, 3, 60, 80))
        >>> len(levels), levels[0].shape
        (5, torch.Size([1, 1, 60, 80]))
        """
        (*coarse, finest), frame = self._votes(x)
        levels = [resize(self._at_finest(vote, frame), frame).to(finest.dtype) for vote in coarse]
        return [level[..., : x.shape[2], : x.shape[3]] for level in (*levels, finest)]

    def _at_finest(self, vote: Tensor, frame: tuple[int, int]) -> Tensor:
        stride = self.encoder.strides[0]
        return resize(at_least_float32(vote), (frame[0] // stride, frame[1] // stride))

    def _votes(self, x: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """Logits per level at the level's own resolution, coarse to fine, and the padded size (H, W) they cover."""
        channels = self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point() or 0 in x.shape:
            raise InputError(
                f"MSAUnet takes a floating-point tensor of shape (N, {channels}, H, W), not {x.dtype} of shape "
                f"{tuple(x.shape)}; msa_unet.predict takes images of any type and prepares them."
            )
        height, width = x.shape[2:]
        frame = self.encoder.frame(height, width)
        # one graph for all sizes when compiled; replicated borders exist for any image size, reflected ones do not
        if torch.compiler.is_compiling() or frame != (height, width):
            borders = (0, frame[1] - width, 0, frame[0] - height)
            x = F.pad(at_least_float32(x), borders, mode="replicate").to(x.dtype)  # not every torch pads half precision
        return self.head(self.decoder(self.encoder(x))), frame

    def fuse(self) -> "MSAUnet":
        """A copy for inference: batch norms folded into convolutions, each attention path into two affine maps.

        The copy is in eval mode, computes the same function to rounding, and is not meant to be trained or saved.

        >>> x = torch.rand(1, 3, 60, 80)
        >>> torch.allclose(model.fuse()(x), model(x), atol=1e-3)
        True
        """
        fused = copy.deepcopy(self).eval()
        fold_batch_norms(fused, (1, self.config.in_channels, *self.encoder.frame(64, 64)))
        for module in fused.modules():
            if isinstance(module, SpatialChannelAttention):
                module.fuse()
        return fused.requires_grad_(False)

    @property
    def backbone(self) -> nn.Module:
        """The part that pretrained weights fill, which is the timm model, or all of the published network's encoder."""
        return self.encoder.backbone if isinstance(self.encoder, TimmEncoder) else self.encoder

    def freeze_encoder(self, stages: int | None = None) -> "MSAUnet":
        """Stop training the backbone, or what its first `stages` feature maps depend on; batch-norm statistics too.

        It outlasts `.train()`. Undo with `model.requires_grad_(True)`.

        >>> model = MSAUnet("resnet18").freeze_encoder()
        >>> [group["name"] for group in model.param_groups(lr=1e-3)]
        ['decoder']

        Raises:
            EncoderError: the backbone has fewer feature maps than `stages`.
        """
        training = self.training
        frozen = self.backbone.parameters() if stages is None else parameters_of(self.encoder, stages)
        for parameter in frozen:
            parameter.requires_grad_(False)
        return self.train(training)

    def train(self, mode: bool = True) -> "MSAUnet":
        super().train(mode)
        for module in self.backbone.modules():  # a frozen part keeps its statistics and drops nothing
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def param_groups(self, lr: float, encoder_lr_scale: float = 0.1) -> list[dict[str, Any]]:
        """Optimiser groups: the backbone at `lr * encoder_lr_scale`, the rest at `lr`, frozen parameters left out.

        >>> optimizer = torch.optim.AdamW(MSAUnet("resnet18").param_groups(1e-3))
        """
        pretrained = {id(p) for p in self.backbone.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) in pretrained], "lr": lr * encoder_lr_scale, "name": "encoder"},
            {"params": [p for p in trained if id(p) not in pretrained], "lr": lr, "name": "decoder"},
        ]
        return [group for group in groups if group["params"]]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's activations in the backward pass instead of keeping them.

        >>> MSAUnet("resnet18").set_grad_checkpointing()
        """
        self.encoder.set_grad_checkpointing(enable)

    @classmethod
    def from_config(cls, config: MSAUnetConfig) -> "MSAUnet":
        """The network that `config` describes, with random weights; nothing is downloaded.

        >>> twin = MSAUnet.from_config(model.config)
        >>> twin.config == model.config
        True
        """
        model = cls(
            config.encoder,
            in_channels=config.in_channels,
            num_classes=config.num_classes,
            encoder_kwargs=config.encoder_kwargs,
            decoder_channels=config.decoder_channels,
            attention=config.attention,
            antialias=config.antialias,
            class_names=config.class_names,
        )
        model.config = config
        return model

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        in_channels: int | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        map_location: str | torch.device | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "MSAUnet":
        """A trained network, in eval mode, that says in `load_report` what became of every tensor.

        >>> model = MSAUnet.from_pretrained("tf_efficientnet_lite0.dsb2018", class_names=["background", "nucleus"])
        >>> model.load_report.adapted[0]
        'head.votes.0.weight'

        Args:
            name_or_path: looked up in this order: a folder of `save_pretrained`; a name of `list_pretrained()`, from
                the weights that come along, a checkout's `weights/` or $MSA_UNET_WEIGHTS, else from the Hub's cache,
                else from the Hub at the revision that the registry pins; "organisation/name" on the Hub.
            num_classes: another number of classes, named as in a new network unless `class_names` are given.
            class_names: other classes. Those that the checkpoint has under the same name keep their rows of the head,
                in the new order; new ones are initialised.
            in_channels: another number of channels. What reads the image is adapted as timm adapts its stems: weights
                are summed for one channel, else repeated in turn and rescaled. `config.mean` and `std` follow.
            dtype: of the weights; None for float32, whatever the file holds.
            device: where to put them; `map_location` is the same. None for the CPU.
            revision: branch, tag or commit on the Hub.
            token: for private repositories, as in huggingface_hub.
            cache_dir: instead of the Hub's usual cache.
            local_files_only: never ask the network; HF_HUB_OFFLINE=1 does the same.

        Raises:
            CheckpointError: there is no such checkpoint, it cannot be reached, its sha256 is wrong, it is damaged, or
                tensors are missing, unexpected or misshapen; all of them are named.
            ConfigError: its config, or an argument, does not describe a network.
            EncoderError: the installed timm has no such encoder, or refuses its arguments.
        """
        from . import hub

        if device is not None and map_location is not None:
            raise ConfigError(f"device={device!r} and map_location={map_location!r} mean the same: give one of them.")
        return hub.from_pretrained(
            cls,
            name_or_path,
            num_classes=num_classes,
            class_names=class_names,
            in_channels=in_channels,
            dtype=dtype,
            device=device if map_location is None else map_location,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json, model.safetensors and a model card (README.md) into `folder`, each whole or not at all.

        `from_pretrained(folder)` reads them back bit-identical, without any download.

        >>> model.save_pretrained("my-model", dtype=torch.float16)
        >>> MSAUnet.from_pretrained("my-model").config.class_names
        ('nucleus',)

        Args:
            folder: created if absent; files of these three names are replaced, others stay.
            dtype: to store floating-point weights in, e.g. torch.float16 for half the size; None for what they are.

        Raises:
            CheckpointError: the disk refuses, or the network was changed into something that its config does not
                describe (`fuse()` does that).
        """
        from . import hub

        hub.save_pretrained(self, folder, dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | bool | None = None,
        commit_message: str = "Upload an MSA-Unet checkpoint",
    ) -> str:
        """Upload what `save_pretrained` writes to "organisation/name" on the Hub, in one commit, and return its id.

        >>> # the one example that the tests skip: it needs an account
        >>> model.push_to_hub("organisation/name", private=True)  # doctest: +SKIP

        Args:
            repo_id: created if absent.
            private: whether a created repository is.
            token: as in huggingface_hub; None for the one that `hf auth login` stored.

        Raises:
            CheckpointError: the Hub refuses or does not answer.
        """
        from . import hub

        return hub.push_to_hub(self, repo_id, private=private, token=token, commit_message=commit_message)

    @classmethod
    def from_published(cls, state_dict: Mapping[str, Tensor], antialias: bool = True) -> "MSAUnet":
        """The network of a checkpoint of the published code; widths, channels and classes are read off its tensors.

        >>> state_dict = MSAUnet(decoder_channels=(8, 16, 32, 64)).to_published()
        >>> MSAUnet.from_published(state_dict, antialias=False).config.decoder_channels
        (8, 16, 32, 64)

        Args:
            state_dict: tensors under the published names. The three attention blocks that never run are dropped, and
                `load_report.dropped` names them.
            antialias: False if the checkpoint was trained with torchvision below 0.17.

        Raises:
            CheckpointError: a tensor is missing, unexpected or has another shape; all of them are named.
        """
        from . import published

        return published.from_published(cls, state_dict, antialias)

    def to_published(self) -> dict[str, Tensor]:
        """The weights under the names of the published code, without the blocks that never run.

        >>> MSAUnet(decoder_channels=(8, 16, 32, 64)).to_published()["downs.0.conv.0.weight"].shape
        torch.Size([8, 3, 5, 5])

        Raises:
            ConfigError: this is not the published network.
        """
        from . import published

        return published.to_published(self)


class Decoder(nn.Module):
    """From the coarsest level up: transposed convolution, the skip (behind attention), two convolutions.

    Features finest first, [(N, c0, H, W), (N, c1, H/2, W/2), ...] -> the coarsest of them and one map of the same size
    and width per finer level, coarse to fine.
    """

    def __init__(self, channels: Sequence[int], attention: Attention) -> None:
        super().__init__()
        skips, coarser = channels[:-1], channels[1:]
        attended = {"finest": 1, "all": len(skips), "none": 0}[attention]
        self.ups = nn.ModuleList(nn.ConvTranspose2d(d, c, 2, stride=2) for c, d in zip(skips, coarser, strict=True))
        self.attention = nn.ModuleList(
            SpatialChannelAttention(c) if i < attended else nn.Identity() for i, c in enumerate(skips)
        )
        self.blocks = nn.ModuleList(double_conv(2 * c, c) for c in skips)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        outputs = [features[-1]]
        for i in reversed(range(len(self.ups))):
            skip = features[i]
            x = self.ups[i](outputs[-1])
            if may_differ(x.shape[2:], skip.shape[2:]):  # a size that was odd on the way down
                x = resize(x, skip.shape[2:])
            outputs.append(self.blocks[i](torch.cat([self.attention[i](skip), x], 1)))
        return outputs


class VotingHead(nn.Module):
    """Every depth votes: one convolution to K logits per level, coarse to fine, each at its own resolution.

    The published head resizes all levels to full resolution, concatenates and convolves by 1x1; convolution and resize
    commute, so the sum of the resized votes is the same function without the wide tensor. Where the finest level is not
    at full resolution, every level votes for each of the `subpixels` x `subpixels` pixels that one position covers,
    and the coarser ones, where it costs nothing, see the positions around.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, subpixels: int) -> None:
        super().__init__()
        self.shuffle = nn.PixelShuffle(subpixels) if subpixels > 1 else nn.Identity()
        rows, kernel = num_classes * subpixels**2, 3 if subpixels > 1 else 1
        finest, *coarser = channels
        self.votes = nn.ModuleList(
            nn.Conv2d(c, rows, kernel, padding=kernel // 2, bias=False) for c in reversed(coarser)
        )
        self.votes.append(nn.Conv2d(finest, rows, 1))

    def forward(self, outputs: list[Tensor]) -> list[Tensor]:
        return [self.shuffle(vote(x)) for vote, x in zip(self.votes, outputs, strict=True)]
