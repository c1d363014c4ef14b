"""Segment a folder with several processes, on several GPUs or machines: each takes a share of the images.

    accelerate launch examples/segment_folder.py IMAGES OUT --model tf_efficientnet_lite0.dsb2018 --batch 8

The files are those of `msa-unet predict IMAGES -o OUT`; images whose masks exist are skipped, so that a run that was
killed goes on. Needs accelerate. The exit status is not 0 if an image could not be segmented. On a machine
without GPUs accelerate starts several processes only for `accelerate launch --multi_gpu --num_processes 2 ...`.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from msa_unet import MSAUnet
from msa_unet.folders import find_images, results_of, segment_files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder")
    parser.add_argument("output", type=Path, help="folder for the masks")
    parser.add_argument("--model", default="tf_efficientnet_lite0.dsb2018", metavar="NAME_OR_PATH")
    parser.add_argument("--batch", type=int, default=1, help="images of one size that run together, per process")
    parser.add_argument("--tile", type=int, help="go through large images in windows of this many pixels")
    args = parser.parse_args()

    state = PartialState(cpu=not torch.cuda.is_available())
    model = MSAUnet.from_pretrained(args.model).to(state.device)
    jobs, failures = find_images([args.images], args.output)
    todo = [(stem, image) for stem, image in jobs.items() if not all(path.exists() for path in results_of(stem))]
    state.wait_for_everyone()  # all have seen the same files before anybody writes one: the shares do not overlap
    share = dict(todo[state.process_index :: state.num_processes])
    print(f"process {state.process_index + 1} of {state.num_processes}: {len(share)} images", flush=True)
    results = segment_files(model, share, batch=args.batch, tile=args.tile)
    bar = tqdm(results, total=len(share), disable=not state.is_main_process, unit="image")
    failed = [(str(image), str(result)) for image, result in bar if isinstance(result, Exception)]
    failed = gather_object(failed)  # also waits: the launcher ends all processes when one leaves with an error
    failed += [(str(given), reason) for given, reason in failures.items()]
    if state.is_main_process:
        for image, reason in failed:
            print(f"{image}: {reason}", file=sys.stderr)
    state.destroy_process_group()  # its threads, still running when the interpreter ends, could abort the process
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
