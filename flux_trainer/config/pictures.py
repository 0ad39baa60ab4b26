"""Which pictures are asked for, and what their files are called and say of them. No torch.

A picture is a function of its request and the weights; the request is written into the file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flux_trainer import __version__
from flux_trainer.config import text
from flux_trainer.config.schema import Data, Inference

SEED_LIMIT = 2**56
"""What the random numbers' key has room for."""


@dataclass(frozen=True)
class Request:
    """One picture."""

    prompt: str
    width: int
    """In pixels; a multiple of 16, as is the height."""
    height: int
    steps: int
    guidance: float | None
    """Distilled guidance, for models with an embedding of it."""
    cfg_scale: float
    """Of classifier-free guidance; 1: without."""
    seed: int
    draw: int = 0
    """Tells pictures of the same seed apart."""
    negative_prompt: str = ""
    references: tuple[str, ...] = ()
    """Files of the images that the picture refers to."""

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance takes part: the model then sees twice as many samples."""
        return self.cfg_scale != 1


@dataclass(frozen=True)
class Order:
    """What is to be drawn, from which weights, and where it goes."""

    weights: Path
    requests: list[Request]
    paths: list[Path]
    """A file for each of the requests."""


class Prompt(NamedTuple):
    """What is drawn."""

    text: str
    references: tuple[str, ...] = ()
    """Files of the images that it refers to."""


def read_prompts(path: str) -> list[Prompt]:
    """The lines of a UTF-8 text file (-: of standard input) that are not blank.

    In a .jsonl file each is an object {"prompt": "...", "references": ["a.png", ...]}. References may be
    missing; they are relative to the file's folder.

    Raises:
        ValueError: the file is not UTF-8 text, or a line is no such object.
    """
    name = "standard input" if path == "-" else path
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        lines = re.split(r"\r\n|\r|\n", text.decode(data))
    except text.TextError as error:
        raise ValueError(f"{name} {error}") from error
    numbered = [(number, line) for number, line in enumerate(map(text.trimmed, lines), 1) if line]
    if path.endswith(".jsonl"):
        return [_prompt(line, f"{path}, line {number}", Path(path).parent) for number, line in numbered]
    return [Prompt(line) for _, line in numbered]


def _prompt(line: str, where: str, folder: Path) -> Prompt:
    expected = 'expected {"prompt": "...", "references": ["a.png"]}'
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    if prompt is None:
        raise ValueError(f'{where} has no "prompt"; {expected}')
    try:
        prompt = text.trimmed(text.usable(prompt))
    except text.TextError as error:
        raise ValueError(f'{where}: "prompt" {error}') from error
    if not prompt:
        raise ValueError(f'{where}: "prompt" is empty; {expected}')
    if unknown := fields.keys() - {"prompt", "references"}:
        raise ValueError(f'{where}: unknown field "{min(unknown)}"; there are "prompt" and "references"')
    names = fields.get("references") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{where}: "references" is neither a path nor a list of paths')
    return Prompt(prompt, tuple(str(folder / name) for name in names))


def missing_references(prompts: Iterable[Prompt]) -> list[str]:
    """A sentence for each file that a prompt refers to and that is not there."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.references)
    return [f"{name}: no such reference image" for name in names if not Path(name).is_file()]


def reference_side(data: Data, img_size: int) -> int:
    """Side in pixels of the square whose area training leaves a reference image."""
    return img_size if data.reference_size == -1 else data.reference_size


def parse_size(text: str) -> tuple[int, int] | None:
    """(width, height) of "1024x768", or of "512" for a square; None where it is no such size."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None:
        return None
    width, height = int(match[1]), int(match[2] or match[1])
    good = all(side >= 16 and side % 16 == 0 for side in (width, height))
    return (width, height) if good else None


def requests(
    section: Inference,
    prompts: Sequence[Prompt],
    *,
    side: int,
    steps: int,
    guidance: float | None,
    cfg_scale: float,
) -> list[Request]:
    """Every prompt in every size, `images_per_prompt` times: the k-th with the seed `section.seed` + k.

    Args:
        section: checked.
        side, steps, guidance, cfg_scale: for what the section leaves open; side is that of a square.
    """
    sizes = [size for text in section.sizes if (size := parse_size(text))] or [(side, side)]
    return [
        Request(
            prompt.text,
            width=width,
            height=height,
            steps=section.denoising_steps or steps,
            guidance=guidance if section.guidance is None else section.guidance,
            cfg_scale=cfg_scale if section.cfg_scale is None else section.cfg_scale,
            seed=section.seed + k,
            negative_prompt=section.negative_prompt,
            references=(*section.references, *prompt.references),
        )
        for prompt in prompts
        for width, height in sizes
        for k in range(section.images_per_prompt)
    ]


def file_names(requests: Sequence[Request]) -> list[str]:
    """A name for each picture, in order: 002_a-red-apple_1024x768_seed7.png; 002 counts the prompts."""
    prompts = dict.fromkeys((r.prompt, r.references) for r in requests)
    numbers = {prompt: n for n, prompt in enumerate(prompts, 1)}
    digits = max(3, len(str(len(numbers))))
    return [
        f"{numbers[r.prompt, r.references]:0{digits}}_{_slug(r.prompt)}_{r.width}x{r.height}_seed{r.seed}.png"
        for r in requests
    ]


def _slug(prompt: str, length: int = 40) -> str:
    """The words of a prompt that fit, in lower case, joined by dashes."""
    return "-".join(re.findall(r"\w+", prompt.lower()))[:length].strip("-_") or "empty"


def metadata(request: Request, weights: str, ema: bool) -> dict[str, str]:
    """Text chunks of a picture's file: everything as JSON, and the line that other tools read."""
    r = request
    everything = {
        "prompt": r.prompt,
        "negative_prompt": r.negative_prompt if r.guided else None,
        "references": list(r.references) or None,
        "seed": r.seed,
        "width": r.width,
        "height": r.height,
        "steps": r.steps,
        "guidance": r.guidance,
        "cfg_scale": r.cfg_scale,
        "weights": weights,
        "ema": ema,
        "version": __version__,
    }
    settings = {
        "Steps": r.steps,
        "Sampler": "Euler",
        "CFG scale": r.cfg_scale,
        "Distilled CFG Scale": r.guidance,
        "Seed": r.seed,
        "Size": f"{r.width}x{r.height}",
        "Model": Path(weights).stem,
        "Version": f"flux_trainer {__version__}",
    }
    lines = [r.prompt]
    if r.guided and r.negative_prompt:
        lines.append(f"Negative prompt: {r.negative_prompt}")
    lines.append(", ".join(f"{key}: {value}" for key, value in settings.items() if value is not None))
    chunks = {"parameters": "\n".join(lines), "flux_trainer": json.dumps(everything, ensure_ascii=False)}
    # Names of files may hold bytes that are not UTF-8.
    return {name: chunk.encode(errors="replace").decode() for name, chunk in chunks.items()}
