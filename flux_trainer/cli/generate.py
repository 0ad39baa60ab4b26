"""`flux-trainer generate`: pictures of prompts, from a run, its checkpoint or published weights.

Everything that can be refused is refused here, before torch is imported.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flux_trainer.config import toml
from flux_trainer.config.check import check_generation
from flux_trainer.config.flags import split
from flux_trainer.config.help import help_text
from flux_trainer.config.load import ConfigError, load
from flux_trainer.config.pictures import Order, file_names, read_prompts, requests
from flux_trainer.config.problems import COMMAND_LINE
from flux_trainer.config.schema import JobConfig
from flux_trainer.config.weights import find_weights, scales
from flux_trainer.models.registry import FLAVORS
from flux_trainer.parallel.arithmetic import check_sharing
from flux_trainer.runtime.log import init_logger, logger

_USAGE = """\
usage: flux-trainer generate WEIGHTS [PROMPT | -]... [--SECTION.KEY VALUE]...
       torchrun --nproc-per-node N -m flux_trainer generate WEIGHTS ...

Draws each PROMPT (-: each line of standard input) and writes PNG files with their settings inside.
  WEIGHTS     a run's folder (its newest checkpoint), a checkpoint (step-N), a .safetensors file with
              Black Forest Labs' names, or a diffusers folder
The text encoders and the autoencoder are the run's, or lie beside the weights under their published names, or
are named by [encoder] in --job.config_file FILE or by flags. The dtype is training.mixed_precision_param.

"""

ALIASES = {
    "--out": "save_img_folder",
    "--size": "sizes",
    "--steps": "denoising_steps",
    "--seed": "seed",
    "--guidance": "guidance",
    "--cfg": "cfg_scale",
    "--negative": "negative_prompt",
    "--batch": "local_batch_size",
    "--count": "images_per_prompt",
}
"""Short flag -> key of [inference]. A folder given as --out is relative to where one is. None may be the
beginning of a flag of torchrun, which would stop at it."""


def main(argv: Sequence[str]) -> int:
    """Draw what `argv` asks for; returns the exit status."""
    if "-h" in argv or "--help" in argv:
        short = "".join(f"  {flag:<12}--inference.{key}\n" for flag, key in ALIASES.items())
        print(f"{_USAGE}{short}\n{help_text('inference')}", end="")
        return 0
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        order, config, notices = plan(argv, world_size)
    except (ValueError, OSError) as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return 2
    init_logger(rank, colour=not config.metrics.disable_color_printing)
    for notice in notices:
        logger.info(f"note: {notice}")

    # These import torch: not before everything is known to be good.
    from flux_trainer.generate import draw_pictures
    from flux_trainer.outcome import exit_status

    return exit_status(lambda: draw_pictures(order, config))


def plan(argv: Sequence[str], world_size: int) -> tuple[Order, JobConfig, list[str]]:
    """Which pictures to draw, with which settings, and what should be said of these.

    Raises:
        ConfigError: with one line for each mistake.
    """
    words, names = split(_written_out(argv))
    if not names:
        raise ConfigError(["WEIGHTS is missing: flux-trainer generate WEIGHTS PROMPT...; --help says more"])
    weights = find_weights(names[0])
    if names[1:] == ["-"]:
        words += ["--inference.prompts_path=-", "--inference.prompts=[]"]
    elif names[1:]:
        words += [f"--inference.prompts={toml.value(names[1:])}", "--inference.prompts_path="]
    config, notices, origins = load(words, weights.settings)
    check_generation(config, world_size, origins)
    check_sharing(config, world_size)
    section = config.inference
    if section.prompts_path == "-" and world_size > 1:
        raise ConfigError(["standard input reaches one process only: give several --inference.prompts_path"])
    prompts = read_prompts(section.prompts_path) if section.prompts_path else section.prompts
    if not prompts:
        sources = "as arguments, as lines of --inference.prompts_path FILE, or - for standard input's"
        raise ConfigError([f"nothing to draw: give prompts {sources}"])
    steps, guidance, cfg_scale = scales(config.model.flavor)
    if not FLAVORS[config.model.flavor].guidance_embed:
        if origins.get("inference.guidance") == COMMAND_LINE:
            notices.append(f"{config.model.flavor} has no embedding of guidance, so --guidance does nothing")
        section = section.model_copy(update={"guidance": None})
    elif guidance is None:
        guidance = config.flow.guidance
    side = config.training.img_size if weights.belong_to_run else 1024
    wanted = requests(section, prompts, side=side, steps=steps, guidance=guidance, cfg_scale=cfg_scale)
    folder = Path(config.job.dump_folder) / section.save_img_folder
    order = Order(weights.path, wanted, [folder / name for name in file_names(wanted)])
    _check_files(order, section.overwrite)
    return order, config, notices


def _written_out(argv: Sequence[str]) -> list[str]:
    """The words with short flags as settings."""
    words, out = [], False
    for word in argv:
        name, equals, text = word.partition("=")
        if out and not word.startswith("--"):
            word = os.path.abspath(word)
        elif name in ALIASES:
            text = os.path.abspath(text) if name == "--out" and text else text
            word = f"--inference.{ALIASES[name]}{equals}{text}"
        out = name == "--out" and not equals
        words.append(word)
    return words


def _check_files(order: Order, overwrite: bool) -> None:
    """Raises ConfigError where pictures would fall together, or on others that are there."""
    twice = [path.name for path, count in Counter(order.paths).items() if count > 1]
    if twice:
        raise ConfigError([f"the same picture is asked for twice: {twice[0]}"])
    there = [path for path in order.paths if path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        remedy = "take another --seed or --out, or set --inference.overwrite"
        raise ConfigError([f"{there[0]}{more} would be replaced: {remedy}"])
