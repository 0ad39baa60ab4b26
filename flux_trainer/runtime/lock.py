"""One run at a time in a folder: a lock that ends with the process that holds it. No torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flux_trainer.runtime.log import logger

NAME = ".lock"
"""The locked file. It stays when the lock ends: deleting it could let two processes in."""


class FolderInUse(OSError):
    """Another process holds the lock; the message names it."""


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of `folder` within the context; it is made if it is not there.

    A POSIX record lock: it also works between machines on NFS, is not inherited by data workers, and the
    kernel releases it however the process ends. The file must not be opened again in this process: any close
    of it would release the lock. Where a file system has no locks, a warning says so.

    Raises:
        FolderInUse: another process holds the lock.
        OSError: the folder cannot be written to.
    """
    path = Path(folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise FolderInUse(f"{folder} is in use by {_holder(descriptor)}") from None
            logger.warning(f"{folder} cannot be locked ({error.strerror}): do not start a second run in it")
        with suppress(OSError):  # a full disk: the lock holds without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _own_name().encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _own_name() -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n"


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has only just taken it
        return "another process"
