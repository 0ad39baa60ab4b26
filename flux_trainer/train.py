"""One rank of a run: `torchrun -m flux_trainer.train --job.config_file FILE [--section.key value]`.

`python -m flux_trainer.launch` in place of torchrun ends with the sentence by which a rank failed.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack

from flux_trainer.config.check import check
from flux_trainer.config.load import ConfigError, load
from flux_trainer.config.outputs import folders_of_one_run
from flux_trainer.config.schema import JobConfig
from flux_trainer.config.toml import to_toml
from flux_trainer.models.widths import check_widths
from flux_trainer.parallel.arithmetic import check_mesh
from flux_trainer.runtime import launcher
from flux_trainer.runtime.files import sentence
from flux_trainer.runtime.interrupt import INTERRUPTED
from flux_trainer.runtime.lock import FolderInUse, exclusive
from flux_trainer.runtime.log import init_logger, logger


def main() -> int:
    """Train as the command line says; returns the exit status."""
    try:
        return _main()
    except KeyboardInterrupt:  # while torch is imported; later `exit_status` takes it
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def _main() -> int:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with ExitStack() as locks:
        try:
            config, notices, origins = load(sys.argv[1:])
            notices += check(config, world_size, origins)
            check_widths(config)
            check_mesh(config, world_size)
            init_logger(rank, colour=not config.metrics.disable_color_printing)
            if rank == 0:
                _lock(config, locks)
        except ConfigError as error:
            what = str(error)
            launcher.tell(what)
            if rank == 0:
                print(what, file=sys.stderr)
            return 2
        for notice in notices:
            logger.info(f"note: {notice}")
        if config.job.print_config:
            logger.info(f"Settings:\n{to_toml(config)}")
        return train(config)


def _lock(config: JobConfig, locks: ExitStack) -> None:
    """Keep other runs out of this one's folders: they would delete each other's files.

    Raises:
        ConfigError: another run is there, or the folder cannot be written to.
    """
    for key, folder in folders_of_one_run(config):
        try:
            locks.enter_context(exclusive(folder))
        except FolderInUse as error:
            advice = "wait for its end, stop it with SIGTERM, or choose another folder"
            raise ConfigError([f"{key}: {error}; {advice}"]) from error
        except OSError as error:  # what only shows when the folder is made: a quota, /proc
            raise ConfigError([f"{key} cannot be used: {sentence(error)}; name another folder"]) from error


def train(config: JobConfig) -> int:
    """Train as `config` says; returns the exit status."""
    # These import torch: not before the settings are known to be good.
    from flux_trainer.flux import FluxTrainer
    from flux_trainer.outcome import exit_status

    def run() -> None:
        trainer = FluxTrainer(config)
        trainer.train()
        trainer.close()

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
