"""When a step's folder counts: the order of writes that leaves a whole checkpoint at any moment, and its
check.

A checkpoint is written into `step-N.tmp-x`: every rank syncs its files, the first rank adds `manifest.json`
with sizes and SHA-256, and renames the folder to `step-N`. Thus a folder called `step-N` is whole. Files are
hashed piece by piece, so that threads and ranks can share the work on one file as well as on many.
What must go is renamed before it is deleted, so that half-deleted folders do not look whole either. Only
names and files that the trainer makes are ever deleted, and of a link only the link. Files hold what the
names say only on a file system that all ranks share.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flux_trainer.checkpoint.errors import CheckpointError, DamagedError
from flux_trainer.config import outputs
from flux_trainer.runtime.files import sha256, sync, write_json
from flux_trainer.runtime.log import logger

MANIFEST = outputs.MANIFEST
STATE = "state.json"
METADATA = ".metadata"
"""DCP's table of contents."""
VERSION = 2
PIECE = 64 * 2**20
"""Bytes of a file that one hash covers; the last piece has what is left. Part of the format's version."""

_PASSING = re.compile(rf"{outputs.STEP.pattern}\.(tmp|old|gone)-[0-9a-f]{{8}}")
_OWN_FILES = (MANIFEST, STATE, METADATA, "*.distcp", ".*.tmp")
"""In the order of their deletion: without a manifest, the rest is no checkpoint."""

Manifest = dict[str, dict[str, Any]]
"""File name -> {"size": bytes, "sha256": [hex of each piece]}; a single hash is of the whole file."""

Piece = tuple[str, int]
"""A file's name, and which of its hashes."""

A = TypeVar("A")
B = TypeVar("B")


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step-{step}"


def whole_steps(folder: Path) -> list[int]:
    """Steps with a whole checkpoint in `folder`, oldest first. Their content is not looked at."""
    if not folder.is_dir():
        return []
    names = (outputs.STEP.fullmatch(path.parent.name) for path in folder.glob(f"step-*/{MANIFEST}"))
    return sorted(int(name[1]) for name in names if name)


def tidy(folder: Path) -> None:
    """Finish what a killed run left: delete passing folders, put back a checkpoint caught being replaced.

    What cannot be deleted stays, with a warning.
    """
    for path in folder.iterdir():
        name = _PASSING.fullmatch(path.name)
        if not name or not (path.is_dir() or path.is_symlink()):
            continue
        target = step_folder(folder, int(name[1]))
        if name[2] == "old" and not os.path.lexists(target) and (path / MANIFEST).is_file():
            path.rename(target)
        else:
            _delete(path)
    sync(folder)


def new_folder(folder: Path, step: int) -> Path:
    """Make the passing folder into which the checkpoint of `step` is written.

    Raises:
        CheckpointError: something that is no checkpoint has the name that this one will get.
    """
    final = step_folder(folder, step)
    if os.path.lexists(final) and not (final / MANIFEST).is_file():
        raise CheckpointError(
            f"{final} is not a complete checkpoint and blocks the one to be written. Move it away."
        )
    path = _passing(folder, step, "tmp")
    path.mkdir()
    return path


def seal(path: Path, pattern: str) -> Manifest:
    """Put the files in folder `path` that match a glob pattern on the disk; return sizes and hashes."""
    files = {}
    for file in sorted(path.glob(pattern)):
        sync(file)
        size = file.stat().st_size
        hashes = _in_threads(partial(sha256, file, size=PIECE), range(0, size or 1, PIECE))
        files[file.name] = {"size": size, "sha256": hashes}
    return files


def publish(path: Path, step: int, files: Manifest) -> None:
    """Turn a fully written passing folder into the checkpoint of `step`, in the place of an older one.

    Raises:
        CheckpointError: a file that some rank wrote is not here.
    """
    for name, record in files.items():
        if not (path / name).is_file() or (path / name).stat().st_size != record["size"]:
            raise CheckpointError(
                f"{name} was written by another rank and is not in {path} as the first rank sees it. "
                "job.dump_folder must lie on a file system that all ranks share."
            )
    write_manifest(path, step, files)
    final = step_folder(path.parent, step)
    old = _passing(path.parent, step, "old")
    replaces = os.path.lexists(final)
    if replaces:
        final.rename(old)
    path.rename(final)
    sync(path.parent)
    if replaces:
        _delete(old)


def write_manifest(path: Path, step: int, files: Manifest) -> None:
    """Put the list of a checkpoint's files beside them, into folder `path`."""
    body = {"version": VERSION, "step": step, "files": files}
    write_json(path / MANIFEST, {**body, "digest": _digest(body)})


def discard(folder: Path, step: int) -> None:
    """Delete the checkpoint of `step`, or as much of it as can be deleted: a warning says what stays.

    Of a link to a checkpoint, only the link is deleted.
    """
    path, gone = step_folder(folder, step), _passing(folder, step, "gone")
    try:
        path.rename(gone)
    except OSError as error:
        logger.warning(f"The old checkpoint {path} could not be deleted: {error.strerror}")
    else:
        _delete(gone)


def _delete(path: Path) -> None:
    """Delete what the trainer has written into a passing folder, and the folder unless it holds more."""
    try:
        if path.is_symlink():
            target = os.readlink(path)
            path.unlink()
            logger.info(f"{path.name.partition('.')[0]} was a link: it is deleted, and {target} stays")
            return
        for file in (file for pattern in _OWN_FILES for file in path.glob(pattern)):
            file.unlink()
        others = sorted(file.name for file in path.iterdir())
        if others:
            listed = ", ".join(others[:5])
            logger.warning(f"{path} stays: it holds files that the trainer did not write ({listed})")
        else:
            path.rmdir()
    except OSError as error:
        logger.warning(f"{path} could not be deleted: {error.filename}: {error.strerror}")


def set_aside(folder: Path, step: int) -> Path:
    """Rename a damaged checkpoint so that nobody resumes from it; returns its new place."""
    path = step_folder(folder, step)
    target = path.with_name(f"{path.name}.damaged")
    if os.path.lexists(target):
        target = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
    path.rename(target)
    sync(folder)
    return target


def read_manifest(path: Path) -> Manifest:
    """The files that make up the checkpoint in folder `path`.

    Raises:
        DamagedError: the manifest is not what was written.
        CheckpointError: there is no manifest, or another version of the trainer wrote it.
    """
    try:
        body = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is no checkpoint of this trainer: it has no {MANIFEST}. Give a step-N folder."
        ) from error
    except ValueError:
        body = None
    if not isinstance(body, dict) or body.pop("digest", "") != _digest(body):
        raise DamagedError(f"{path} is damaged: {MANIFEST} (content changed).")
    if not 1 <= body["version"] <= VERSION:
        raise CheckpointError(
            f"{path} has version {body['version']} of the checkpoint format; this trainer reads {VERSION}. "
            "Use the release that wrote it."
        )
    files: Manifest = body["files"]
    if body["version"] == 1:  # one hash of each file, as plain text
        files = {name: {**record, "sha256": [record["sha256"]]} for name, record in files.items()}
    return files


def pieces(files: Manifest, rank: int, size: int) -> list[Piece]:
    """What one of `size` ranks is to check: its share, in one run, of the pieces of all files."""
    every = [(name, index) for name, record in files.items() for index in range(len(record["sha256"]))]
    return every[rank * len(every) // size : (rank + 1) * len(every) // size]


def find_damage(path: Path, files: Manifest, share: Collection[Piece]) -> set[str]:
    """What is wrong with files of which these are pieces, as `name (reason)`; empty when nothing is."""
    return set(filter(None, _in_threads(lambda piece: _damage(path, files, *piece), share)))


def _damage(path: Path, files: Manifest, name: str, index: int) -> str | None:
    written, hashes = files[name]["size"], files[name]["sha256"]
    try:
        size = (path / name).stat().st_size
        if size != written:
            return f"{name} ({size} bytes, {written} were written)"
        if sha256(path / name, index * PIECE, PIECE if len(hashes) > 1 else None) != hashes[index]:
            return f"{name} (content changed)"
    except FileNotFoundError:
        return f"{name} (missing)"
    except OSError as error:
        if error.errno != errno.EIO:  # anything else is no fault of the file: rights, network
            raise
        return f"{name} (unreadable)"
    return None


def _in_threads(work: Callable[[A], B], items: Collection[A]) -> list[B]:
    """`work` of each item, in order, by this rank's share of the cores; an error is raised here."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this machine
    threads = max(1, min(8, (os.cpu_count() or 1) // ranks))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def _passing(folder: Path, step: int, purpose: str) -> Path:
    return folder / f"step-{step}.{purpose}-{uuid.uuid4().hex[:8]}"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
