"""Networks as files that run without this package: ONNX, torch.export and AOTInductor; one graph for all sizes.

Each takes "image", float32 (N, C, H, W) normalised by the mean and std that it carries, and gives "logits", float32
(N, K, H, W), for any N, H and W.
"""

import importlib
import inspect
import io
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .encoders import MSAEncoder
from .errors import ConfigError, ExportError
from .files import replacing
from .inference import Source, prepare, to_unit_range

if TYPE_CHECKING:
    from .config import MSAUnetConfig
    from .model import MSAUnet

Precision = Literal["float32", "float16", "int8"]
Run = Callable[[Tensor], Tensor]

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05}  # of the largest logit: a wrong graph is off by far more
AXES = {0: "batch", 2: "height", 3: "width"}
# timm modules of which no architecture tried was traced, some only failing after minutes (benchmarks/export_census.py)
UNTRACEABLE = {
    "davit",
    "gemma4_vit",
    "hieradet_sam2",
    "mvitv2",
    "sequencer",
    "swin_transformer",
    "swin_transformer_v2",
    "swin_transformer_v2_cr",
    "vision_transformer_sam",
}
WINDOWED = {"hiera", "nest"}  # attention of five dimensions, where torch's ONNX converter knows the fused one of four
# what a tracer assumes of sizes and cannot prove is then asserted when the graph runs (torch 2.9)
_WISH = "prefer_deferred_runtime_asserts_over_guards"
DEFERRED = {_WISH: True} if _WISH in inspect.signature(torch.export.export).parameters else {}


def export(
    model: "MSAUnet",
    path: str | Path,
    *,
    dtype: Precision = "float32",
    aoti: bool = False,
    calibration: Sequence[Source] = (),
) -> None:
    """Write `model`, fused and in eval mode, to `path`; what is there is replaced once all is well.

    >>> model = MSAUnet(decoder_channels=(8, 16, 32, 64)).eval()
    >>> export(model, "small.onnx")
    >>> export(model, "small8.onnx", dtype="int8", calibration=[image])

    Args:
        model: is left as it is.
        path: ends in .onnx (needs `pip install msa-unet[export]`) or in .pt2, for `torch.export.load`.
        dtype: of weights and activations; image and logits are float32 in any case. "int8" is for ONNX alone.
        aoti: compile for this machine's CPU, which needs a C++ compiler; `torch._inductor.aoti_load_package` reads it.
        calibration: for "int8", some twenty images such as the network will see, of the types that `predict` takes:
            they show the range of each activation.

    Raises:
        ConfigError: the arguments do not go together.
        ExportError: the encoder cannot be traced, or a library or compiler is missing or gives up.
        InputError: an image in `calibration` cannot be segmented.
        OSError: the disk refuses.
    """
    path = Path(path)
    onnx = path.suffix == ".onnx"
    if not onnx and path.suffix != ".pt2":
        raise ConfigError(
            f"The file is to be {str(path)!r}: its name must end in .onnx or .pt2, the formats there are."
        )
    if dtype not in get_args(Precision):
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(get_args(Precision))}.")
    if onnx and aoti:
        raise ConfigError("aoti makes a compiled package: choose a name that ends in .pt2, or leave it out for ONNX.")
    if dtype == "int8" and not onnx:
        raise ConfigError(f"int8 is for ONNX alone: choose a name that ends in .onnx, not {str(path)!r}.")
    if (dtype == "int8") != bool(calibration):
        raise ConfigError(
            "int8 needs images for calibration, some twenty of the kind it will see, and no other dtype does."
        )
    if onnx:
        _require_onnx()
    images = [prepare(to_unit_range(image), model.config) for image in calibration]
    kind = "ONNX" if onnx else "an AOTInductor package" if aoti else ".pt2"
    with replacing(path) as temporary:
        program = trace(model, "float16" if dtype == "float16" else "float32")
        properties = metadata(model.config) | {"least_side": least_side(program)}
        with _naming(model, f"be written as {kind}"):
            if onnx:
                _write_onnx(program, temporary, properties, images)
            elif aoti:
                _write_aoti(program, temporary, properties)
            else:
                with temporary.open("wb") as file:  # a name would have to end in .pt2
                    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(properties)})


def metadata(config: "MSAUnetConfig") -> dict[str, Any]:
    """What whoever uses the file must know; images are scaled to `value_range`, then (x - mean) / std."""
    return {
        "mean": config.mean,
        "std": config.std,
        "value_range": (0.0, 1.0),
        "class_names": config.class_names,
        "temperature": config.temperature,  # divides the logits,
        "activation": "sigmoid" if config.num_classes == 1 else "softmax",  # which makes probabilities of them
        "encoder": config.encoder,
    }


def trace(model: "MSAUnet", dtype: Literal["float32", "float16"] = "float32") -> ExportedProgram:
    """The graph of `model`, fused, for any batch, and for any height and width from `least_side(graph)` up.

    Raises:
        ExportError: the encoder does something that depends on the size in a way that no graph can hold.
    """
    name, module = model.config.encoder, _timm_module(model)
    if module in UNTRACEABLE:
        raise ExportError(
            f"Encoder {name!r} cannot be exported: what timm's {module} computes depends on the image's size in a way "
            "that no single graph can hold. docs/deploy.md says which encoders can."
        )
    coarsest = model.encoder.strides[-1]
    # a graph takes a size of 1 to be special, so nothing inside may become 1 for some images only
    if isinstance(model.encoder, MSAEncoder):
        return _trace(model, dtype, 2 * coarsest)
    unit = model.encoder.plan.unit
    if not unit:
        with suppress(ExportError):
            return _trace(model, dtype, 1)
    return _trace(model, dtype, 2 * max(4 * coarsest, *(unit or (0,))))


def _timm_module(model: "MSAUnet") -> str:
    name = model.config.encoder
    return "" if name == "msa" else timm.model_entrypoint(name.partition(".")[0]).__module__.rpartition(".")[2]


def least_side(graph: ExportedProgram) -> int:
    """The smallest height and width, in pixels, that a graph of `trace` takes."""
    (name,) = graph.graph_signature.user_inputs
    image = next(node for node in graph.graph.nodes if node.name == name).meta["val"]
    return max(1, *(int(graph.range_constraints[side.node.expr].lower) for side in image.shape[2:]))


def _trace(model: "MSAUnet", dtype: Literal["float32", "float16"], least: int) -> ExportedProgram:
    shapes = {0: Dim("batch"), 2: Dim("height", min=least), 3: Dim("width", min=least)}
    # unlike sides: equal ones would be taken to be so always
    image = torch.zeros(2, model.config.in_channels, 90 + 3 * (least - 1) // 2, 150 + 2 * (least - 1))
    with _naming(model, "be exported"), torch.no_grad():
        network = _Network(model, getattr(torch, dtype))
        if least > 1:  # then nothing is padded for being small, and the graph need not say so
            stride = 1 if isinstance(model.encoder, MSAEncoder) else model.encoder.strides[-1]
            network.model.encoder.frame = partial(_whole, stride)  # type: ignore[method-assign] # of this copy alone
        options: dict[str, Any] = {"dynamic_shapes": {"image": shapes}, "strict": False} | DEFERRED
        with _traceable_timm():
            graph = torch.export.export(network, (image,), **options)
        run = graph.module()
        for batch, height, width in ((1, 0, 61), (2, 57, 30), (1, 170, 317)):  # what was deferred must hold
            image = torch.empty(batch, image.shape[1], least + height, least + width)
            _compare(run, network, image, network.dtype)
        return graph


class _Network(nn.Module):
    """The folded network behind float32 images and logits."""

    def __init__(self, model: "MSAUnet", dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.model = model.fuse().float().cpu().to(dtype)
        if _timm_module(model) in WINDOWED:
            attentions: list[Any] = [part for part in self.model.modules() if hasattr(part, "fused_attn")]
            for attention in attentions:
                attention.fused_attn = False
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        rows, columns = self.model.encoder.frame(height, width)
        framed = F.pad(image, (0, columns - width, 0, rows - height), mode="replicate")
        logits: Tensor = self.model(framed.to(self.dtype)).float()
        # not a slice, whose end a tracer would want to compare with the frame
        return logits.index_select(2, torch.arange(height)).index_select(3, torch.arange(width))


def _whole(stride: int, height: int, width: int) -> tuple[int, int]:
    return (height + stride - 1) // stride * stride, (width + stride - 1) // stride * stride


@contextmanager
def _traceable_timm() -> Iterator[None]:
    """Sizes that timm turns into floats stay symbols of the tracer."""

    def same_padding(x: int, kernel_size: int, stride: int, dilation: int) -> int:
        # TensorFlow's, in whole numbers, which the tracer can simplify
        return max((-(-x // stride) - 1) * stride + (kernel_size - 1) * dilation + 1 - x, 0)

    rotary = "timm.layers.pos_embed_sincos.float"
    with patch("timm.layers.padding.get_same_padding", same_padding), patch(rotary, torch.sym_float, create=True):
        yield


@contextmanager
def _naming(model: "MSAUnet", what: str) -> Iterator[None]:
    """Turn whatever a tracer or compiler raises into one sentence that names the encoder; silence its chatter."""
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:  # these libraries have dozens of exceptions and no common one
        reason = str(error).strip().split("\n")[0] or "no reason given"
        raise ExportError(
            f"Encoder {model.config.encoder!r} cannot {what} by torch {torch.__version__}: {type(error).__name__}: "
            f"{reason[:300]}. Nothing was written; docs/deploy.md says which encoders can."
        ) from error


def _require_onnx() -> None:
    try:
        for module in ("onnx", "onnxruntime", "onnxscript"):
            importlib.import_module(module)
    except ImportError as error:
        raise ExportError(f"ONNX needs {error.name}: pip install 'msa-unet[export]'.") from error


def _check(run: Run, program: ExportedProgram) -> None:
    """Compare a converted graph with what it was made of, on one image: converters and compilers make mistakes."""
    channels, side = program.example_inputs[0][0].shape[1], max(70, least_side(program))
    image = torch.empty(1, channels, side, side + 61)
    _compare(run, program.module(), image, next(iter(program.parameters())).dtype)


@torch.no_grad()
def _compare(run: Run, network: Run, image: Tensor, dtype: torch.dtype) -> None:
    """Raise RuntimeError if two networks differ on noise of the size of `image`."""
    image.normal_(generator=torch.Generator().manual_seed(0))
    wanted = network(image)
    error = ((run(image) - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= TOLERANCES[dtype]:
        raise RuntimeError(f"its logits are off by {error:.1%} of the largest for an image of {tuple(image.shape)}")


def _texts(properties: dict[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in properties.items()}


def _write_aoti(program: ExportedProgram, path: Path, properties: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/model.pt2", inductor_configs={"aot_inductor.metadata": _texts(properties)}
        )
        _check(torch._inductor.aoti_load_package(package), program)
        path.write_bytes(Path(package).read_bytes())


def _write_onnx(program: ExportedProgram, path: Path, properties: dict[str, Any], images: Sequence[Tensor]) -> None:
    import onnx
    from onnxruntime import InferenceSession

    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"]}
    converted: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    proto = converted.model_proto
    session = InferenceSession(proto.SerializeToString())
    _check(lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), program)
    if images:
        proto = _quantise(proto, images)
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, name in AXES.items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    onnx.helper.set_model_props(proto, _texts(properties))
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def _quantise(proto: Any, images: Sequence[Tensor]) -> Any:
    """Static quantisation: 8-bit weights per channel, 8-bit activations within the ranges that `images` give them.

    The attention stays in float32: 8 bits cannot hold a softmax over all positions of an image.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc] # the library has no types
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {"image": image.numpy()}

    with TemporaryDirectory() as folder:
        float32, prepared, quantised = (f"{folder}/{name}.onnx" for name in ("float32", "prepared", "quantised"))
        onnx.save(proto, float32)
        quant_pre_process(float32, prepared, skip_symbolic_shape=True)
        attention = [
            node.name
            for node in onnx.load(prepared).graph.node
            if any("decoder.attention" in origin.value for origin in node.metadata_props)
        ]
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(prepared, quantised, Reader(), nodes_to_exclude=attention, per_channel=True, **kinds)
        return onnx.load(quantised)
