"""How Sphinx builds these pages: `sphinx-build -W --keep-going -b html docs OUT`."""

import csv
import os
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
GENERATED = DOCS / "_generated"  # git ignores it
WEIGHTS = DOCS.parent / "weights"
CENSUS = DOCS.parent / "benchmarks" / "results" / "census.csv"
EXPORTS = CENSUS.with_name("export.csv")
CHECKS = ("ok_native", "ok_250x190", "ok_33x47", "backward")

project = "msa_unet"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
html_show_copyright = False
html_static_path = ["_static"]
smartquotes = False  # options such as --overlay are to be copied as they stand
default_role = "literal"  # `x` in a docstring is code
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
maximum_signature_line_length = 80


def encoder_table(census: Path) -> list[list[str]]:
    """A head and one row per encoder of the census that passed every check, operations only where it counted them."""
    with census.open() as file:
        good = [row for row in csv.DictReader(file) if all(row[check] == "ok" for check in CHECKS)]
    counted = bool(good) and "gmac_512" in good[0]
    table = [["encoder", "million parameters", "native size", "strides", *(["GMAC at 512x512"] if counted else [])]]
    for row in good:
        cells = [row["encoder"], f"{int(row['parameters']) / 1e6:.1f}", row["native"], row["levels"]]
        table.append([*cells, *([row["gmac_512"]] if counted else [])])
    return table


def export_table(exports: Path) -> list[list[str]]:
    """A head and one row per timm module, the reason in place of a difference where there is none."""
    with exports.open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["module"])
    table = [["timm module", "smallest architecture", "torch.export", "ONNX"]]
    for row in rows:
        exported = row["difference"] if row["traced"] == "ok" else row["traced"]
        onnx = row["onnx_difference"] if row["onnx"] == "ok" else row["onnx"]
        table.append([row["module"], row["encoder"], exported, onnx])
    return table


def card_page(card: Path) -> str:
    """A model card without the header for the Hub, its links as seen from `GENERATED`."""
    text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(), flags=re.DOTALL)
    return re.sub(
        r"(?<=\]\()(?!\w+:|#)[^)\s]+", lambda link: os.path.relpath(card.parent / link.group(), GENERATED), text
    )


def generate(app: Any) -> None:
    """The tables of the two censuses and one page per checkpoint."""
    GENERATED.mkdir(exist_ok=True)
    for old in GENERATED.iterdir():
        old.unlink()
    for name, table in (("encoders", encoder_table(CENSUS)), ("exports", export_table(EXPORTS))):
        with (GENERATED / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(table)
    for card in WEIGHTS.glob("*/README.md"):
        (GENERATED / f"{card.parent.name}.md").write_text(card_page(card))


def lead_here(app: Any, path: Path, page: str, content: list[str]) -> None:
    """In included files, links to cards and to CONTRIBUTING.md lead to where this site has them."""
    content[0] = re.sub(r"\]\(([^/)]+)/README\.md\)", r"](_generated/\1.md)", content[0])
    content[0] = content[0].replace("](../CONTRIBUTING.md)", "](#add-a-checkpoint)")


def setup(app: Any) -> None:
    app.connect("builder-inited", generate)
    app.connect("include-read", lead_here)
