"""`flux-trainer verify`: what a file or folder of weights is, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flux_trainer.runtime.paths import expand_home


def main(argv: Sequence[str]) -> int:
    """Print what lies at the paths in `argv`; returns 0 if all of it is whole, 1 if not, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="flux-trainer verify",
        description="Says what weights are and whether they are whole: a BFL, ComfyUI or diffusers file, a "
        "folder of diffusers, a checkpoint of this trainer or torchtitan, a run's folder.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", type=path_argument)
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    from flux_trainer.hub.verify import verify

    try:
        config = chosen_config(args)
    except (OSError, ValueError) as error:
        print(f"flux-trainer verify: {error}", file=sys.stderr)
        return 2
    whole = True
    for report in (report for path in args.paths for report in verify(path, config)):
        print(report.path)
        for what, text in report.facts.items():
            print(f"  {what + ':':<12} {text}")
        for problem in report.problems:
            print(f"  {'PROBLEM:':<12} {problem}")
        print(f"  {'verdict:':<12} {'NOT whole' if report.problems else 'whole'}")
        whole = whole and not report.problems
    return 0 if whole else 1


def path_argument(text: str) -> Path:
    """A path on a command line: `~` is not always the shell's to expand (`--config=~/model.json`)."""
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """How a command is told which model weights belong to, where they do not say."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--flavor", metavar="NAME", help="the model, such as flux-dev; found out if not given")
    which.add_argument(
        "--config",
        metavar="JSON",
        type=path_argument,
        help="a file with the model's fields, or diffusers' config.json",
    )


def chosen_config(args: argparse.Namespace) -> Any | None:
    """The config that the arguments of `add_model_arguments` name.

    Raises:
        ValueError: there is no such flavor, or the file describes no model.
        OSError: the file cannot be read.
    """
    from flux_trainer.hub.families import config_of, flavor_named

    if args.flavor:
        return flavor_named(args.flavor)
    if args.config is None:
        return None
    try:
        values = json.loads(args.config.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
        return config_of(values)
    except ValueError as error:
        raise ValueError(f"{args.config} cannot be used: {error}") from error
