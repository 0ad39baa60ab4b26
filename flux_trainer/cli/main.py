"""`flux-trainer COMMAND`: one table of commands, each imported only when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from flux_trainer import __version__
from flux_trainer.runtime.interrupt import INTERRUPTED, interrupting

COMMANDS = {
    "config": ("flux_trainer.cli.config", "check the settings of a run and print them, resolved, as TOML"),
    "convert": (
        "flux_trainer.cli.convert",
        "write weights in another layout: BFL's, diffusers', a checkpoint",
    ),
    "estimate": (
        "flux_trainer.cli.estimate",
        "memory and communication of each rank, for any number of ranks",
    ),
    "generate": ("flux_trainer.cli.generate", "draw pictures of prompts, from a run or published weights"),
    "verify": ("flux_trainer.cli.verify", "what a file or folder of weights is, and whether it is whole"),
}
"""Command -> module with `main(argv) -> exit status`, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by the first word of `argv` (default: the process's); returns its exit status.

    Ctrl-C, SIGTERM and a closed terminal end any command alike: it removes what it had begun to write.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"flux_trainer {__version__}")
        return 0
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        guess = f"; did you mean {close[0]}?" if close else f"; the commands are {', '.join(COMMANDS)}"
        print(f"flux-trainer: {words[0]}: unknown command{guess}", file=sys.stderr)
        return 2
    try:
        with interrupting():
            status: int = importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    return status


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flux-trainer COMMAND ...",
            "",
            *rows,
            "",
            "flux-trainer COMMAND --help says more. ./run_train.sh trains.",
        ]
    )
