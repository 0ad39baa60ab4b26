"""`flux-trainer estimate`: what each rank of a run would hold and send, without any of its devices."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from math import prod
from typing import Any

from flux_trainer.config.check import check
from flux_trainer.config.load import ConfigError, load
from flux_trainer.config.pictures import reference_side
from flux_trainer.config.schema import JobConfig
from flux_trainer.parallel.arithmetic import check_mesh

_USAGE = """\
usage: flux-trainer estimate CONFIG... --gpus N [--json] [--SECTION.KEY VALUE]...

Shows the memory of the heaviest of N ranks and what it sends in a step. Nothing is allocated.
  CONFIG      TOML files, the later ones over the earlier
  --gpus N    number of ranks
  --json      bytes, for machines
"""


def main(argv: Sequence[str]) -> int:
    """Print the estimate for the settings in `argv`; returns the exit status."""
    if "-h" in argv or "--help" in argv:
        print(_USAGE, end="")
        return 0
    try:
        world_size, as_json, words = _own_flags(argv)
        config, notices, origins = load(words)
        notices += check(config, world_size, origins, files=False)
        check_mesh(config, world_size)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    try:
        figures = estimate(config, world_size)
    except ValueError as error:  # the encoders' files, which say how large they are, cannot be read
        print(f"flux-trainer estimate: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=2) if as_json else table(figures))
    return 0


def _own_flags(argv: Sequence[str]) -> tuple[int, bool, list[str]]:
    """Number of ranks, whether as JSON, and the words that are left for the settings."""
    world_size, as_json = 0, False
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        if name == "--json":
            as_json = True
        elif name == "--gpus":
            text = text if equals else next(words, "")
            if not text.isdecimal() or int(text) < 1:
                raise ConfigError([f"command line: --gpus = {text}: wrong type; expected an integer >= 1"])
            world_size = int(text)
        elif word.endswith(".toml") and not word.startswith("-") and not (rest and _takes_value(rest[-1])):
            rest.append(f"--job.config_file={word}")
        else:
            rest.append(word)
    if not world_size:
        raise ConfigError(["command line: --gpus is missing: say for how many ranks, such as --gpus 8"])
    return world_size, as_json, rest


def _takes_value(word: str) -> bool:
    return word.startswith("--") and "=" not in word


def estimate(config: JobConfig, world_size: int) -> dict[str, Any]:
    """All figures of the heaviest rank, in bytes. Raises ConfigError where the mesh is impossible."""
    from flux_trainer.encoders.choose import kind_of
    from flux_trainer.encoders.footprint import footprint
    from flux_trainer.models.flops import num_params
    from flux_trainer.parallel import estimate as e
    from flux_trainer.parallel.held import Memory, ahead, samples
    from flux_trainer.parallel.held import memory as held
    from flux_trainer.parallel.mesh import MODEL
    from flux_trainer.parallel.traffic import traffic

    p = e.plan(config, world_size)
    own, side = config.activation_checkpoint, config.training.img_size
    frozen = footprint(
        config.encoder,
        p.size(*MODEL),
        config.training.local_batch_size,
        max(side, reference_side(config.data, side)) if p.references else side,
        kind_of(p.model),
        p.model.context_in_dim,
    )
    with e.sharing(p) as mesh:
        stages = [e.parts(p, rank, mesh) for rank in range(p.sizes["pp"])]
        configured = e.describe(own)
        modes = e.MODES | {configured: own}
        costs = {name: e.costs(p, mesh, mode) for name, mode in modes.items()}
    own_step = "bfloat16" in (config.optimizer.state_dtype, config.training.dtype)
    all_at_once = config.optimizer.implementation == "foreach" and not (
        own_step or config.optimizer.in_backward
    )

    beside = ahead(p, frozen.encoding)

    def memory(rank: int, name: str) -> Memory:
        return held(p, stages[rank], rank, costs[name], modes[name])

    def phases(m: Memory) -> dict[str, int]:
        """What is held at the peak of each part of a step."""
        always = m.stored + frozen.weights + beside
        scratch = m.parameters if all_at_once else 0
        return {
            "encoding": always + (0 if beside else frozen.encoding),
            "forward and backward": always + m.training - m.stored + (0 if beside else samples(p)),
            "optimizer": always + m.gradients + scratch,
            "average": always + m.ema,  # of the differences
        }

    def peak(m: Memory) -> int:
        return max(phases(m).values())

    rank = max(range(p.sizes["pp"]), key=lambda rank: peak(memory(rank, configured)))
    m = memory(rank, configured)
    return {
        "model": config.model.flavor,
        "model_parameters": num_params(p.model),
        "ranks": world_size,
        "mesh": p.sizes,
        "pipeline_rank": rank,
        "blocks": [f"{part.blocks[0]} to {part.blocks[-1]}" for part in stages[rank]],
        "local_batch_size": p.batch,
        "micro_batches": p.micro_batches,
        "image_tokens": p.tokens[0] - p.references,
        "reference_tokens": p.references,
        "text_tokens": p.tokens[1],
        "memory": {
            "parameters": m.parameters,
            "optimizer": m.optimizer,
            "ema": m.ema,
            "gradients": m.gradients,
            "gradients_at_peak": m.gradients_at_peak,
            "reduction": m.reduction,
            "gathered": m.gathered,
            "activations": m.activations,
            "host": m.host,
            "t5": frozen.t5,
            "clip": frozen.clip,
            "llm": frozen.llm,
            "autoencoder": frozen.autoencoder,
            "samples": samples(p),
            "ahead": beside,
        },
        "assumed_encoders": list(frozen.assumed),
        "eight_bit_linears": config.quantize.linears,
        "phases": phases(m),
        "peak": peak(m),
        "checkpointing": configured,
        "modes": {
            name: {"activations": memory(rank, name).activations, "peak": peak(memory(rank, name))}
            for name in modes
        },
        "sent_per_step": {
            **traffic(p, stages[rank], own),
            # T5's or the language model's weights, gathered in every call.
            "text encoder": p.encoder_calls * (p.size(*MODEL) - 1) * (frozen.t5 + frozen.llm),
        },
    }


def table(figures: dict[str, Any]) -> str:
    """The figures of `estimate` for people."""
    f, memory = figures, figures["memory"]
    mesh = " x ".join(f"{name} {n}" for name, n in f["mesh"].items())
    references = f", at most {f['reference_tokens']} reference" if f["reference_tokens"] else ""
    lines = [
        f"{f['model']}, {f['model_parameters']:,} parameters, on {mesh} = {prod(f['mesh'].values())} ranks",
        f"Heaviest rank: number {f['pipeline_rank']} of its pipeline, {', '.join(f['blocks'])}",
        f"Step: {f['micro_batches']} micro-batches of {f['local_batch_size']} samples with "
        f"{f['image_tokens']} image{references} and {f['text_tokens']} text tokens",
        "",
        "At the peak of forward and backward",
    ]
    rows = {
        "parameters, stored": memory["parameters"],
        "optimizer state": memory["optimizer"],
        "average (EMA)": memory["ema"],
        f"gradients so far (of {size(memory['gradients']).strip()})": memory["gradients_at_peak"],
        "gradients being summed over ranks": memory["reduction"],
        "parameters, gathered": memory["gathered"],
        f"activations ({f['checkpointing']})": memory["activations"],
        **(
            {"language model": memory["llm"]}
            if memory["llm"]
            else {"T5": memory["t5"], "CLIP": memory["clip"]}
        ),
        "autoencoder": memory["autoencoder"],
        "encoded samples": memory["samples"],
        **({"the next ones, and encoding them": memory["ahead"]} if memory["ahead"] else {}),
    }
    lines += _rows(rows)
    lines += _rows({"sum": sum(rows.values())})
    if memory["host"]:
        lines += _rows({"beside, in host memory": memory["host"]})
    lines += ["", "Peak of each part of a step", *_rows(f["phases"]), *_rows({"peak": f["peak"]})]
    lines += ["", f"  {'checkpointing':<44}{'activations':>12}{'peak':>14}"]
    for name, mode in f["modes"].items():
        mark = "  <- configured" if name == f["checkpointing"] else ""
        lines.append(f"  {name:<44}{size(mode['activations']):>12}{size(mode['peak']):>14}{mark}")
    lines += ["", "Sent by this rank in a step", *_rows(f["sent_per_step"])]
    if f["assumed_encoders"]:
        names = " and ".join(f["assumed_encoders"])
        lines += ["", f"No config.json of {names} here: the published one is assumed."]
    if f["eight_bit_linears"] != "none":
        lines += [
            "",
            f"Linears in {f['eight_bit_linears']} count as in bfloat16: they keep the same for backward.",
        ]
    lines += ["", "Without the allocator's fragments, kernels' workspaces, CUDA context and NCCL's buffers."]
    return "\n".join(lines)


def _rows(figures: dict[str, int]) -> list[str]:
    return [f"  {name:<44}{size(number):>12}" for name, number in figures.items()]


def size(number: int) -> str:
    """Bytes, readable."""
    unit, value = "B", float(number)
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        unit, value = larger, value / 1024
    return f"{value:.{0 if unit == 'B' else 2}f} {unit:>3}"
