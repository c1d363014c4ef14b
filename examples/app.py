"""A page to try checkpoints on: `pip install '.[app]' && python examples/app.py`, then open the address it prints.

It works without the internet if the checkpoints are there, and is ready to be a Hugging Face Space: see app_README.md.
"""

import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image

from msa_unet import CheckpointError, InputError, MSAUnet, Segmentation, list_pretrained, predict
from msa_unet.cli import DEFAULT_MODEL  # its weights come with every installation
from msa_unet.inference import MAX_PIXELS, read_image

EXAMPLES = sorted(str(path) for path in Path(__file__).parent.glob("*.png") if "overlay" not in path.stem)
TITLE = "# MSA-Unet\nSegments medical images. A research tool, not a medical device."


@dataclass
class Finding:
    """What the network found, kept per visitor so that the threshold moves without it; the files go when it goes."""

    name: str
    result: Segmentation
    folder: tempfile.TemporaryDirectory = field(default_factory=tempfile.TemporaryDirectory)


@lru_cache(maxsize=2)
def load(name: str) -> MSAUnet:
    return MSAUnet.from_pretrained(name, device="cuda" if torch.cuda.is_available() else "cpu")


def message(text: str, role: str = "status") -> str:
    """For the eyes and, by its role, for screen readers."""
    return f'<p role="{role}">{escape(text)}</p>'


def segment(checkpoint: str, path: str | None, threshold: float) -> list[object]:
    """A file and the name of a checkpoint -> the new state and everything that is shown."""
    nothing = [None] * 7
    if path is None:
        return [*nothing, message("Choose an image or an example."), gr.skip()]
    name = Path(path).name
    try:
        picture = read_image(path)
        if picture.width * picture.height > MAX_PIXELS:
            raise InputError(
                f"it has {picture.width} x {picture.height} pixels, this page takes {MAX_PIXELS / 1e6:.0f} million: "
                "the command line goes through larger images with --tile"
            )
        result = predict(load(checkpoint), picture)
    except (CheckpointError, InputError) as error:
        return [*nothing, message(f"{name} was not segmented: {error}", "alert"), gr.skip()]
    finding = Finding(Path(path).stem, result)
    one = len(result.class_names) == 1
    likely = result.probabilities[0] if one else 1 - result.probabilities[0]
    maps = [Image.fromarray((values * 255).round().astype(np.uint8)) for values in (likely, result.uncertainty)]
    done = message(f"{name}: {picture.width} x {picture.height} pixels, segmented by {checkpoint}.")
    return [finding, *cut(finding, threshold), *maps, done, gr.update(interactive=one)]


def cut(finding: Finding | None, threshold: float) -> list[object]:
    """Overlay, table, and the two files at a threshold; the network does not run."""
    if finding is None:
        return [None] * 4
    result = finding.result
    if len(result.class_names) == 1:
        result = result.with_threshold(threshold)
    areas, overlay = result.areas(), result.overlay()
    square_mm = result.areas_mm2() if result.spacing else dict.fromkeys(areas, "unknown")
    table = [[name, areas[name], f"{areas[name] / result.labels.size:.2%}", square_mm[name]] for name in areas]
    files = [Path(finding.folder.name) / f"{finding.name}_{kind}.png" for kind in ("mask", "overlay")]
    result.label_image().save(files[0])
    overlay.save(files[1])
    return [overlay, table, *map(str, files)]


def build() -> gr.Blocks:
    with gr.Blocks(title="MSA-Unet", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(TITLE)
        finding = gr.State(time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=1):
                checkpoint = gr.Dropdown(list_pretrained(), value=DEFAULT_MODEL, label="Checkpoint")
                image = gr.File(label="Image: PNG, JPEG, TIFF or DICOM", elem_id="image")
                gr.Examples(EXAMPLES, image, label="Examples")
                threshold = gr.Slider(0.01, 0.99, 0.5, step=0.01, label="Threshold", elem_id="threshold")
                status = gr.HTML(message("Choose an image or an example."), elem_id="status")
                mask = gr.DownloadButton("Download mask", elem_id="mask")
                drawn = gr.DownloadButton("Download overlay", elem_id="drawn")
            with gr.Column(scale=2):
                shown = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
                overlay = gr.Image(
                    label="Overlay", alt_text="The image with the classes drawn on it", elem_id="overlay", **shown
                )
                table = gr.Dataframe(
                    headers=["class", "pixels", "share", "mm2"], label="Areas", interactive=False, elem_id="areas"
                )
                with gr.Row():
                    likely = gr.Image(
                        label="Probability of foreground, white is 1", alt_text="Map of the probability", **shown
                    )
                    unsure = gr.Image(label="Uncertainty, white is 1", alt_text="Map of the uncertainty", **shown)
        at_threshold = [overlay, table, mask, drawn]
        gr.on(
            [image.change, checkpoint.change],
            segment,
            [checkpoint, image, threshold],
            [finding, *at_threshold, likely, unsure, status, threshold],
        )
        threshold.change(cut, [finding, threshold], at_threshold, trigger_mode="always_last", show_progress="hidden")
    return page


if __name__ == "__main__":
    build().launch(footer_links=[])
