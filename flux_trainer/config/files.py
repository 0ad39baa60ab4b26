"""Files and packages that the settings name: each one that is not there, with the command that brings it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from flux_trainer.config.pictures import missing_references, read_prompts
from flux_trainer.config.schema import JobConfig, Source

Finding = tuple[str, str]
"""A key, and the sentence that goes on after "KEY = VALUE"."""

_ENCODERS = {
    "t5": "`hf download black-forest-labs/FLUX.1-dev --include 'text_encoder_2/*' "
    "--include 'tokenizer_2/*' --local-dir assets/hf/FLUX.1-dev` brings assets/hf/FLUX.1-dev/text_encoder_2",
    "clip": "`hf download openai/clip-vit-large-patch14 --include '*.json' --include '*.txt' "
    "--include model.safetensors --local-dir assets/hf/clip-vit-large-patch14` "
    "brings assets/hf/clip-vit-large-patch14",
}
_FLUX2 = {"flux2-dev": "FLUX.2-dev", "flux2-klein-9b": "FLUX.2-klein-9B"}
"""Where the text encoders of FLUX.2's flavors come from; klein 4B's is the smallest, for all others."""


def missing_files(config: JobConfig) -> Iterator[Finding]:
    """(key, sentence) for every local file, folder or optional package that is missing."""
    yield from _models(config)
    for name, sources in (
        ("data.sources", config.data.sources),
        ("validation.sources", config.validation.sources),
    ):
        for i, source in enumerate(sources):
            yield from _source(f"{name}.{i}", source)
    if path := config.validation.prompts_path:
        yield from (("validation.prompts_path", sentence) for sentence in _prompts(path))
    if config.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        yield (
            "metrics.enable_wandb",
            'needs a package that is not installed: pip install "flux_trainer[wandb]"',
        )
    path = config.checkpoint.initial_load_path
    if path and not os.path.exists(path):
        yield "checkpoint.initial_load_path", _not_there(path, "file or folder")


def missing_for_pictures(config: JobConfig) -> Iterator[Finding]:
    """The same for what `flux-trainer generate` reads."""
    yield from _models(config)
    path = config.inference.prompts_path
    if path not in ("", "-") and not os.path.isfile(path):
        yield "inference.prompts_path", _not_there(path, "file")


def looks_local(name: str) -> bool:
    """Whether a model's name means a folder: `owner/name` is a hub id unless `owner` is a folder here."""
    parts = Path(name).parts
    return os.path.isabs(name) or name.startswith(".") or len(parts) != 2 or os.path.isdir(parts[0])


def _models(config: JobConfig) -> Iterator[Finding]:
    path = Path(config.encoder.autoencoder_path)
    if not os.path.exists(path):
        default = "FLUX.2-dev" if config.model.flavor.startswith("flux2") else "FLUX.1-schnell"
        repo = path.parent.name if path.parent.name.startswith(("FLUX.1-", "FLUX.2-")) else default
        what = {"ae.safetensors": path.name, "vae": "--include 'vae/*'"}.get(path.name)
        command = f"hf download black-forest-labs/{repo} {what} --local-dir {path.parent}"
        brings = f"; `{command}` brings FLUX's" if what else ""
        yield "encoder.autoencoder_path", _not_there(str(path), "file" if path.suffix else "folder") + brings
    flux2 = config.model.flavor.startswith("flux2")
    commands = {"llm": _language_model(config.model.flavor)} if flux2 else _ENCODERS
    for key in [f"{name}_{part}" for part in ("encoder", "tokenizer") for name in commands]:
        name, brings = getattr(config.encoder, key), commands[key.partition("_")[0]]
        if name and looks_local(name) and not os.path.isdir(name):
            yield f"encoder.{key}", _not_there(name, "folder") + "; " + brings
        elif key == "llm_encoder" and not name:
            yield f"encoder.{key}", f"but {config.model.flavor} needs a language model; {brings}"


def _language_model(flavor: str) -> str:
    repo = _FLUX2.get(flavor, "FLUX.2-klein-4B")
    return (
        f"`hf download black-forest-labs/{repo} --include 'text_encoder/*' --include 'tokenizer/*' "
        f"--local-dir assets/hf/{repo}` brings assets/hf/{repo}/text_encoder"
    )


def _source(name: str, source: Source) -> Iterator[Finding]:
    if source.type == "folder" and source.path and not os.path.isdir(source.path):
        yield f"{name}.path", _not_there(source.path, "folder")
    for i, path in enumerate(source.reference_paths):
        if source.type == "folder" and not os.path.isdir(path):
            yield f"{name}.reference_paths.{i}", _not_there(path, "folder")
    if source.type == "jsonl" and source.path and not os.path.isfile(source.path):
        yield f"{name}.path", _not_there(source.path, "file")
    if source.type == "hf" and importlib.util.find_spec("datasets") is None:
        yield f"{name}.type", 'needs a package that is not installed: pip install "flux_trainer[hf]"'


def _prompts(path: str) -> Iterator[str]:
    if not os.path.isfile(path):
        yield _not_there(path, "file")
        return
    try:
        missing = missing_references(read_prompts(path))
    except (ValueError, OSError) as error:
        yield f"cannot be used: {error}"
    else:
        yield from (f"cannot be used: {sentence}" for sentence in missing)


def _not_there(path: str, kind: str) -> str:
    if os.path.islink(path) and not os.path.exists(path):
        return f"is a link to {os.readlink(path)}, which is not there"
    where = "" if os.path.isabs(path) else f" (looked in {os.getcwd()})"
    other = " but a folder is" if kind == "file" and os.path.isdir(path) else ""
    other = " but a file is" if kind == "folder" and os.path.isfile(path) else other
    return f"is not there{where}: no such {kind}{other}"
