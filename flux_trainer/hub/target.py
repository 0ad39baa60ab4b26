"""The place that weights are written to: what may be replaced there, and a passing name until all is written.

All that can be wrong with a place is found before hours of work.
"""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from flux_trainer.checkpoint.commit import MANIFEST, METADATA, STATE
from flux_trainer.hub.contents import INDEX_SUFFIX
from flux_trainer.hub.detect import CONFIG, STEM, SUFFIXES
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.foreign import PICKLES
from flux_trainer.runtime.files import sync
from flux_trainer.runtime.log import logger
from flux_trainer.runtime.paths import folder_problem

Format = Literal["bfl", "diffusers", "dcp", "torchtitan"]
"""bfl: one file. diffusers: a folder with config.json. dcp: a checkpoint (step-N) of this trainer, without an
optimizer. torchtitan: DCP with torchtitan's names."""

# All that convert writes into folders; one that holds anything else, such as other *.safetensors, is not
# replaced.
_OURS = (
    CONFIG,
    MANIFEST,
    STATE,
    METADATA,
    f"{STEM}.safetensors",
    f"{STEM}-[0-9]*-of-[0-9]*.safetensors",
    f"{STEM}{INDEX_SUFFIX}",
    "__0_0.distcp",
)
_OF_FILES = {*SUFFIXES, ".gguf", *PICKLES}


def check_target(target: Path, to: Format, overwrite: bool) -> Path:
    """Where weights of the format `to` are written for `target`: the path itself, or what it links to.

    Raises:
        WeightsError: nothing may be written there, or not what `to` writes.
    """
    if to == "bfl" and target.suffix != ".safetensors":
        raise WeightsError(f"{target}: the name of a file in BFL's layout must end in .safetensors.")
    if to != "bfl" and target.suffix.lower() in _OF_FILES:
        raise WeightsError(
            f"{target}: {to} is a folder; its name cannot end in {target.suffix}. "
            "A file is called *.safetensors and written with --to bfl."
        )
    link, target = target, Path(os.path.realpath(target))
    if problem := folder_problem(link.parent) or folder_problem(target.parent):
        raise WeightsError(f"{link} cannot be made: {problem}.")
    if link.is_symlink() and not target.parent.is_dir():
        raise WeightsError(
            f"{link} is a link to {target}, whose folder is not there. Mount its disk, or choose another "
            "name."
        )
    if not target.exists():
        return target
    if not overwrite:
        raise WeightsError(f"{target} exists already. Choose another name, or add --overwrite to replace it.")
    if to == "bfl" and not target.is_file():
        raise WeightsError(f"{target} is a folder, and {to} is a file. Choose another name.")
    if to != "bfl" and not target.is_dir():
        raise WeightsError(f"{target} is a file, and {to} is a folder. Choose another name.")
    if target.is_dir() and (strange := sorted(p.name for p in target.iterdir() if not _is_ours(p))):
        raise WeightsError(
            f"{target} holds more than weights that this trainer wrote ({', '.join(strange[:5])}), so it is "
            "not replaced as a whole. Choose another name."
        )
    return target


def _is_ours(path: Path) -> bool:
    return path.is_file() and any(map(path.match, _OURS))


def existing_parent(path: Path) -> Path:
    """The innermost of the folders above `path` that is there."""
    return next(parent for parent in path.absolute().parents if parent.exists())


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A passing name beside `target`: renamed to it when the body ends, deleted when it fails.

    The body writes a file or a folder there, and has put the files on the disk. What a killed process left of
    the same target is named in a warning, not deleted: it may be a living one's.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in sorted(target.parent.glob(f".{glob.escape(target.name)}.*-????????")):
        what = "what it replaced" if ".old-" in left.name else "unfinished"
        logger.warning(
            f"{left} ({what}) was left by a conversion that was killed. Delete it, unless one runs."
        )
    token = uuid.uuid4().hex[:8]
    passing = target.with_name(f".{target.name}.tmp-{token}")
    old = target.with_name(f".{target.name}.old-{token}")
    try:
        yield passing
        sync(passing)
        if target.is_dir():
            target.rename(old)
        passing.replace(target)
        sync(target.parent)
    finally:
        if old.exists() and not target.exists():  # stopped between the two
            old.rename(target)
        for path in (passing, old):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)  # the error itself matters more
            else:
                path.unlink(missing_ok=True)
