"""`flux-trainer convert`: weights from one layout to another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flux_trainer.cli.verify import add_model_arguments, chosen_config, path_argument
from flux_trainer.runtime.interrupt import INTERRUPTED, interrupting

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(argv: Sequence[str]) -> int:
    """Convert as the words of `argv` say; returns the exit status."""
    args = _parse(argv)
    if args.source_missing:
        print(f"flux-trainer convert: there is no file or folder {args.source.absolute()}", file=sys.stderr)
        return 2
    try:
        with interrupting() as asked:
            return _convert(args, asked)
    except KeyboardInterrupt:
        print(f"\nInterrupted: {args.target} was not written.", file=sys.stderr)
        return INTERRUPTED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flux-trainer convert",
        description="Writes weights in another layout; which one SOURCE has is found out. Needs memory for a "
        "few tensors only.",
    )
    parser.add_argument(
        "source",
        type=path_argument,
        metavar="SOURCE",
        help="a safetensors file (BFL, ComfyUI, diffusers), a folder of diffusers (of a pipeline: its "
        "transformer; name PIPELINE/vae for the autoencoder), a checkpoint, or a run's folder: its newest",
    )
    parser.add_argument(
        "target", type=path_argument, metavar="TARGET", help="file (bfl) or folder (the others)"
    )
    parser.add_argument(
        "--to",
        choices=["bfl", "diffusers", "dcp", "torchtitan"],
        help="bfl: one file; diffusers: a folder with config.json; dcp: a checkpoint of this trainer; "
        "torchtitan: one of torchtitan. Default: bfl for a name in .safetensors, else diffusers",
    )
    parser.add_argument(
        "--dtype", choices=[*_DTYPES, "keep"], default="keep", help="of all tensors; default: keep"
    )
    parser.add_argument("--ema", action="store_true", help="the moving average that a checkpoint holds")
    parser.add_argument("--overwrite", action="store_true", help="replace weights that are at TARGET")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    args.to = args.to or ("bfl" if args.target.suffix == ".safetensors" else "diffusers")
    args.source_missing = not args.source.exists()
    return args


def _convert(args: argparse.Namespace, asked: Sequence[int]) -> int:
    """`asked`: signals that have asked to stop."""
    import torch

    from flux_trainer.checkpoint.errors import CheckpointError
    from flux_trainer.checkpoint.load import verify
    from flux_trainer.hub.convert import convert
    from flux_trainer.hub.detect import locate
    from flux_trainer.hub.weights import open_weights
    from flux_trainer.metrics.progress import Progress

    dtype = getattr(torch, _DTYPES[args.dtype]) if args.dtype != "keep" else None
    try:
        config = chosen_config(args)
        place = locate(args.source)
        weights = open_weights(place, config=config, ema=args.ema, ahead=True)
        print(f"{place.path}: {weights.describe()}", file=sys.stderr)
        progress = Progress()

        def check() -> None:
            if place.kind == "checkpoint":
                print("checking its hashes ...", file=sys.stderr)
                verify(place.path)

        def show(done: int, total: int) -> None:
            if asked:
                raise KeyboardInterrupt
            progress.show(done, total, f"{done / 1e9:.3g} of {total / 1e9:.3g} GB")

        convert(weights, args.target, args.to, dtype, overwrite=args.overwrite, progress=show, before=check)
        progress.close()
    except (CheckpointError, OSError, ValueError, TypeError) as error:
        if asked:
            raise KeyboardInterrupt from error
        if isinstance(error, TypeError):
            raise
        print(f"flux-trainer convert: {error}", file=sys.stderr)
        return 1
    print(f"{args.target}: written ({args.to})", file=sys.stderr)
    return 0
