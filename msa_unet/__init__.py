"""MSA-Unet for 2D medical image segmentation: any timm encoder, pretrained checkpoints, ready for CUDA."""

from .config import MSAUnetConfig
from .encoders import list_encoders
from .errors import CheckpointError, ConfigError, EncoderError, ExportError, InputError
from .inference import Segmentation, predict
from .large import predict_large
from .model import MSAUnet
from .registry import list_pretrained

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EncoderError",
    "ExportError",
    "InputError",
    "MSAUnet",
    "MSAUnetConfig",
    "Segmentation",
    "list_encoders",
    "list_pretrained",
    "predict",
    "predict_large",
]
