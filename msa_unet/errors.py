"""The exceptions users meet: each names the offending value and the next step."""


class InputError(ValueError):
    """An image or tensor that the network cannot take: rank, channels, dtype, or an unreadable file.

    >>> predict(model, np.zeros((8, 8), np.int32))
    Traceback (most recent call last):
    msa_unet.errors.InputError: An image of type int32 has no known range: convert it to uint8, ...
    """


class ConfigError(ValueError):
    """A configuration that does not describe a network: unknown key, wrong type, impossible value.

    >>> MSAUnet("resnet18", num_classes=0)
    Traceback (most recent call last):
    msa_unet.errors.ConfigError: num_classes is 0; it must be a whole number from 1 to 65536.
    """


class EncoderError(ValueError):
    """An encoder that timm does not know, or arguments and weights that do not fit it.

    >>> MSAUnet("resnet18", decoder_channels=(32, 64))
    Traceback (most recent call last):
    msa_unet.errors.EncoderError: decoder_channels (32, 64) has 2 widths, and resnet18 has 5 levels ...
    """


class CheckpointError(RuntimeError):
    """A checkpoint that is absent, damaged, or does not fit the network it is loaded into.

    >>> MSAUnet.from_pretrained("tf_efficientnet_lite0.dsb2017")
    Traceback (most recent call last):
    msa_unet.errors.CheckpointError: No checkpoint is named 'tf_efficientnet_lite0.dsb2017': did you mean ...
    """


class ExportError(RuntimeError):
    """A network that cannot be written in the format asked for, or a library or compiler for it that is missing.

    >>> with torch.device("meta"):
    ...     model = MSAUnet("maxvit_tiny_rw_224")
    >>> export(model, "maxvit.pt2")
    Traceback (most recent call last):
    msa_unet.errors.ExportError: ...
    """
