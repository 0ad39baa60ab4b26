"""`flux-trainer generate`: pictures of prompts, from a run, its checkpoint or published weights.

Everything that can be refused is refused here, before torch is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from flux_trainer.cli.weights import KLEIN_BASE, find_weights, scales
from flux_trainer.config import toml
from flux_trainer.config.check import check_generation
from flux_trainer.config.flags import split
from flux_trainer.config.help import help_text
from flux_trainer.config.load import ConfigError, load
from flux_trainer.config.pictures import (
    Order,
    Prompt,
    file_names,
    missing_references,
    read_prompts,
    requests,
)
from flux_trainer.config.problems import COMMAND_LINE
from flux_trainer.config.schema import Inference, JobConfig
from flux_trainer.config.text import TextError, usable
from flux_trainer.hub.local import check_weights
from flux_trainer.models.registry import FLAVORS
from flux_trainer.models.widths import check_widths
from flux_trainer.parallel.arithmetic import check_sharing
from flux_trainer.runtime.log import init_logger, logger
from flux_trainer.runtime.paths import expand_home, folder_problem

_USAGE = """\
usage: flux-trainer generate WEIGHTS [PROMPT | -]... [--SECTION.KEY VALUE]...
       torchrun --nproc-per-node N -m flux_trainer generate WEIGHTS ...

Draws each PROMPT (-: each line of standard input) and writes PNG files with their settings inside.
  WEIGHTS     a run's folder (its newest checkpoint), a checkpoint (step-N), a safetensors file, the index
              of several, or a diffusers folder; which flavor it is, is found out
  --          what follows are prompts, also those that begin with a dash
  --reference FILE  an image that all prompts refer to (FLUX.2, FLUX.1 Kontext); several in this order
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
    "--overwrite": "overwrite",
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
    argv, references = _references(argv)
    words, names, literal = _words(argv)
    if not names:
        raise ConfigError(["WEIGHTS is missing: flux-trainer generate WEIGHTS PROMPT...; --help says more"])
    weights = find_weights(expand_home(names[0]))
    arguments = [*names[1:], *literal]
    if arguments:
        words += [f"--inference.prompts={toml.value(arguments)}", "--inference.prompts_path="]
    if references:
        words.append(f"--inference.references={toml.value(references)}")
    config, notices, origins = load(words, weights.settings)
    flavor = config.model.flavor
    if "model.flavor" not in origins:
        raise ConfigError([f"{names[0]} does not say which model it holds: add --model.flavor"])
    if weights.flavors and flavor not in weights.flavors:
        said = f'{origins["model.flavor"]}: model.flavor = "{flavor}"'
        held = " or ".join(weights.flavors)
        raise ConfigError([f"{said}, but {names[0]} holds {held}: leave the setting out"])
    check_generation(config, world_size, origins)
    check_widths(config)
    check_weights(config, training=False)
    check_sharing(config, world_size)
    if config.compile.enable and origins["compile.enable"] != COMMAND_LINE:
        where = origins["compile.enable"]
        notices.append(f"compile.enable of {where} is for training; add --compile.enable to compile here")
        config = config.model_copy(update={"compile": config.compile.model_copy(update={"enable": False})})
    section = config.inference
    prompts = _prompts(section, names[1:], literal, world_size)
    steps, guidance, cfg_scale = scales(flavor)
    if "klein" in flavor and section.denoising_steps is None and section.cfg_scale is None:
        notices.append(
            f"{flavor} is drawn as the distilled klein was made for, in {steps} steps without guidance; its "
            f"base model wants --steps {KLEIN_BASE[0]} --cfg {KLEIN_BASE[2]:g}"
        )
    if not FLAVORS[flavor].guidance_embed:
        if origins.get("inference.guidance") == COMMAND_LINE:
            notices.append(f"{flavor} has no embedding of guidance, so --guidance does nothing")
        section = section.model_copy(update={"guidance": None})
    elif guidance is None:
        guidance = config.flow.guidance
    side = config.training.img_size if "training.img_size" in origins else 1024
    wanted = requests(section, prompts, side=side, steps=steps, guidance=guidance, cfg_scale=cfg_scale)
    if len(once := list(dict.fromkeys(wanted))) < len(wanted):
        notices.append("what is asked for twice is drawn once; --count 2 draws each with two seeds")
    if missing := missing_references(Prompt(r.prompt, r.references) for r in once):
        raise ConfigError(missing)
    folder = Path(config.job.dump_folder) / section.save_img_folder
    order = Order(weights.path, once, [folder / name for name in file_names(once)])
    _check_files(order, section.overwrite)
    return order, config, notices


def _references(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without `--reference FILE`, which may come several times, and those files."""
    words, files, rest = [], [], iter(argv)
    for word in rest:
        name, equals, text = word.partition("=")
        if word == "--":
            words += [word, *rest]
        elif name == "--reference":
            file = text if equals else next(rest, "")
            if not file or file.startswith("--"):
                raise ConfigError(["--reference: the name of an image file is missing"])
            files.append(file)
        else:
            words.append(word)
    return words, files


def _words(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Those of settings, those that are none, and those behind `--`."""
    _check_text(argv[1:])
    end = argv.index("--") if "--" in argv else len(argv)
    words, names = split(_written_out(argv[:end]))
    literal = list(argv[end + 1 :])
    if odd := [name for name in names if name.startswith("-") and name != "-"]:
        raise ConfigError([f"{odd[0]}: not a flag; prompts that begin with a dash come after --"])
    return (words, names, literal) if names else (words, literal[:1], literal[1:])


def _prompts(
    section: Inference, names: Sequence[str], literal: Sequence[str], world_size: int
) -> list[Prompt]:
    """What to draw, with the lines of standard input where `-` stands for them."""
    if (section.prompts_path == "-" or "-" in names) and world_size > 1:
        raise ConfigError(["standard input reaches one process only: give several --inference.prompts_path"])
    if names or literal:
        prompts = [p for name in names for p in (read_prompts("-") if name == "-" else [Prompt(name)])]
        prompts += map(Prompt, literal)
    else:
        path = section.prompts_path
        prompts = read_prompts(path) if path else [Prompt(text) for text in section.prompts]
    if not prompts:
        sources = "as arguments, as lines of --inference.prompts_path FILE, or - for standard input's"
        raise ConfigError([f"nothing to draw: give prompts {sources}"])
    return prompts


def _check_text(words: Iterable[str]) -> None:
    """Raises ConfigError for bytes that are no text, which Python keeps as lone surrogates."""
    for word in words:
        try:
            usable(word)
        except TextError as error:
            raise ConfigError([f"{word!a} {error}"]) from error


def _written_out(argv: Sequence[str]) -> list[str]:
    """The words with short flags as settings."""
    words, out = [], False
    for word in argv:
        name, equals, text = word.partition("=")
        if out and not word.startswith("--"):
            word = os.path.abspath(expand_home(word))
        elif name in ALIASES:
            text = os.path.abspath(expand_home(text)) if name == "--out" and text else text
            word = f"--inference.{ALIASES[name]}{equals}{text}"
        out = name == "--out" and not equals
        words.append(word)
    return words


def _check_files(order: Order, overwrite: bool) -> None:
    """Raises ConfigError where pictures would fall on others, or cannot be written."""
    folder = order.paths[0].parent
    if problem := folder_problem(folder):
        raise ConfigError([f"{folder}: no pictures can be written there: {problem}"])
    taken = [path for path in order.paths if path.exists()]
    if taken and not overwrite:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise ConfigError(
            [f"{taken[0]}{more} would be replaced: take another --seed or --out, or --overwrite"]
        )
