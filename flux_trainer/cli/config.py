"""`flux-trainer config`: what a run would use. `run_train.sh` asks it before any process starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flux_trainer.config.check import check
from flux_trainer.config.load import ConfigError, load
from flux_trainer.config.toml import to_toml
from flux_trainer.hub.local import check_weights
from flux_trainer.models.widths import check_widths
from flux_trainer.parallel.arithmetic import check_mesh

_USAGE = """\
usage: flux-trainer config [--ngpu N] [--quiet] [--SECTION.KEY VALUE]...

Checks the settings and prints all of them as TOML. Exit status: 0, or 2 with one line for each mistake.
  --ngpu N    also check what depends on the number of ranks
  --quiet     print mistakes only
"""


def main(argv: Sequence[str]) -> int:
    """Check the settings in `argv` and print them; returns the exit status."""
    try:
        world_size, quiet, words = _own_flags(argv)
        if "-h" in words or "--help" in words:
            print(_USAGE)
        config, notices, origins = load(words)
        notices += check(config, world_size, origins)
        check_widths(config)
        check_weights(config, training=True)
        if world_size:
            check_mesh(config, world_size)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2
    if not quiet:
        for notice in notices:
            print(f"note: {notice}", file=sys.stderr)
        print(to_toml(config), end="")
    return 0


def _own_flags(argv: Sequence[str]) -> tuple[int | None, bool, list[str]]:
    """This command's flags, and the words that are left for the settings."""
    world_size: int | None = None
    quiet = False
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        if name == "--quiet":
            quiet = True
        elif name == "--ngpu":
            text = text if equals else next(words, "")
            if not text.isdecimal() or int(text) < 1:
                raise ConfigError([f"command line: --ngpu = {text}: wrong type; expected an integer >= 1"])
            world_size = int(text)
        else:
            rest.append(word)
    return world_size, quiet, rest
