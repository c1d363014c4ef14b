"""Upload checkpoint folders to the Hub, and write the commit that results back to their cards.

python weights/publish.py ORGANISATION                     # what would happen, for every folder beside this file
python weights/publish.py ORGANISATION NAME --yes          # do it, for one
"""

import argparse
from dataclasses import replace
from pathlib import Path

from msa_unet.hub import read_config, upload_folder
from msa_unet.registry import CARD, CONFIG, README, WEIGHTS, PretrainedCard, sha256_of


def publish(folder: Path, organisation: str, token: str | None = None, yes: bool = False) -> PretrainedCard:
    """Check a checkpoint folder against its card, upload it in one commit if `yes`, and return the card as it is then.

    Raises:
        CheckpointError: the folder is not what its card says, or the Hub refuses.
    """
    card = PretrainedCard.read(folder / CARD)
    read_config(folder / CONFIG)
    if sha256_of(folder / WEIGHTS) != card.sha256:
        raise SystemExit(f"{folder / WEIGHTS} is not the file that {CARD} describes: nothing is uploaded.")
    card = replace(card, repo_id=f"{organisation}/{card.name}")
    files = ", ".join(sorted(p.name for p in folder.iterdir() if p.name != CARD))
    print(f"{'uploading' if yes else 'would upload'} {files} ({card.size / 1e6:.1f} MB) to {card.repo_id}")
    if not (folder / README).is_file():
        raise SystemExit(f"{folder} has no model card: save it with save_pretrained.")
    if yes:
        message = f"Checkpoint {card.name}, sha256 {card.sha256[:12]}"
        card = replace(card, revision=upload_folder(folder, card.repo_id, token=token, commit_message=message))
        card.write(folder)
        print(f"{card.name} is pinned at {card.revision}; commit {folder / CARD}")
    return card


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organisation", help="of the Hub, or a user")
    parser.add_argument("names", nargs="*", help="folders beside this file; all of them if none is given")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent, help="where the folders are")
    parser.add_argument("--token", help="by default the one that `hf auth login` stored")
    parser.add_argument("--yes", action="store_true", help="upload; without it nothing leaves this machine")
    args = parser.parse_args(arguments)
    names = args.names or sorted(path.parent.name for path in args.root.glob(f"*/{CARD}"))
    for name in names:
        publish(args.root / name, args.organisation, args.token, args.yes)


if __name__ == "__main__":
    main()
