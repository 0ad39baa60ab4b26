"""A run of `flux-trainer generate`: the run it draws from, its command, and what it wrote."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from helpers.tiny_run import MODEL, TinyTrainer, tiny_config
from PIL import Image

from flux_trainer.cli.main import main
from flux_trainer.config.pictures import Prompt
from flux_trainer.models.registry import FLAVORS

PROMPTS = ["a red apple", "a dog, asleep", "überall"]


def train(folder: Path) -> list[np.ndarray]:
    """A run of two steps with its checkpoint; returns what it draws of the prompts then."""
    flags = [
        "--training.steps=2",
        "--lr_scheduler.warmup_steps=0",
        "--checkpoint.enable",
        "--flow.guidance=2",
    ]
    drawing = ["--validation.enable", "--validation.denoising_steps=3", "--validation.prompts=x"]
    trainer = TinyTrainer(tiny_config(folder, *flags, *drawing))
    trainer.train()
    return [pixels.permute(1, 2, 0).numpy() for pixels in trainer.draw([Prompt(PROMPTS[0])])]


def generate(folder: Path, *words: str) -> list[str]:
    """Draw from the run in `folder`; returns what the console shows."""
    FLAVORS["flux-tiny"] = MODEL
    sys.stderr = io.StringIO()
    try:
        assert main(["generate", str(folder / "run"), *words]) == 0, sys.stderr.getvalue()
        return sys.stderr.getvalue().splitlines()
    finally:
        sys.stderr = sys.__stderr__


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


def words_of(path: Path) -> dict[str, Any]:
    return json.loads(Image.open(path).text["flux_trainer"])
