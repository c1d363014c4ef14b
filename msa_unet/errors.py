"""The exceptions users meet: each names the offending value and the next step."""


class InputError(ValueError):
    """An image or tensor that the network cannot take: rank, channels, dtype, or an unreadable file."""


class ConfigError(ValueError):
    """A configuration that does not describe a network: unknown key, wrong type, impossible value."""


class EncoderError(ValueError):
    """An encoder that timm does not know, or arguments and weights that do not fit it."""


class CheckpointError(RuntimeError):
    """A checkpoint that is absent, damaged, or does not fit the network it is loaded into."""


class ExportError(RuntimeError):
    """A network that cannot be written in the format asked for, or a library or compiler for it that is missing."""
