"""Paths as people write them, and whether a folder can be made and written to. No torch."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def expand_home(path: str) -> str:
    """`path` with the home folder in place of a leading `~` or `~user`.

    Raises:
        ValueError: there is no such user here.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"{user} is no known home folder; a name that begins with ~ is written ./{path}")
    return expanded


def folder_problem(folder: str | Path) -> str | None:
    """Why a folder cannot be made, or not be written to if it is there; None: nothing is in the way.

    A clause with its remedy, such as "/data/a.txt is a file; name a folder". Nothing is made.
    """
    path = Path(os.path.abspath(folder))
    for place in (path, *path.parents):
        try:
            mode = os.stat(place).st_mode
        except FileNotFoundError:
            if place.is_symlink():
                target = os.readlink(place)
                return f"{place} is a link to {target}, which is not there; mount its disk, or name a folder"
        except NotADirectoryError:
            pass  # of a file above it, which comes next
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            return f"{place} cannot be reached ({why}); name another folder"
        else:
            return _obstacle(place, mode)
    return None


def _obstacle(place: Path, mode: int) -> str | None:
    """What keeps a folder from being made in `place`, or files if it is the folder itself."""
    if not stat.S_ISDIR(mode):
        return f"{place} is a file; name a folder"
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return f"{place} lies on a file system that is read-only; name another folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} is not writable (permission denied); name another folder"
    return None
