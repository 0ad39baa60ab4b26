"""Who of the other ranks is gone: a rank's side of the ring of watchers (`watcher.py`).

A rank has one watcher, as it has one default process group, so this is the state of the module. Ranks of a
world of one have none, and everything here does nothing.

The ring runs over TCP of its own: gloo would connect every rank with every other, shares its fate with the
rank's process, and notices a machine that is switched off only by its timeouts.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import flux_trainer
from flux_trainer.runtime.line import Line
from flux_trainer.runtime.progress import Progress
from flux_trainer.runtime.watcher import GRACE

_PACKAGE = Path(flux_trainer.__file__).parent
_ANSWER = GRACE + 2  # seconds within which a watcher knows who is gone

_line: Line | None = None
_process: subprocess.Popen[bytes] | None = None
_progress: Progress | None = None


@dataclass(frozen=True)
class Address:
    """Where a rank's watcher can be reached, by whoever knows its token."""

    host: str
    port: int
    token: str
    machine: str


class Door:
    """A port that is open until the previous rank of the ring has come in."""

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self.listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        port = self.listener.getsockname()[1]
        self.address = Address(_own_host(), port, secrets.token_hex(16), socket.gethostname())

    def enter(self, timeout: float) -> socket.socket:
        """Wait for the previous rank, and close the door behind it. Raises TimeoutError."""
        self.listener.settimeout(timeout)
        token = self.address.token.encode()
        while True:
            connection, _ = self.listener.accept()
            connection.settimeout(timeout)
            if connection.recv(len(token), socket.MSG_WAITALL) == token:
                self.listener.close()
                return connection
            connection.close()


def watch(rank: int, door: Door, addresses: Sequence[Address], timeout: float, silence: int) -> None:
    """Start this rank's watcher. All ranks call it together, with their doors open.

    Args:
        addresses: of all ranks, this one's door among them.
        timeout: seconds for the neighbours to come.
        silence: seconds after which a machine that does not answer is given up.

    Raises:
        OSError: a neighbour cannot be reached.
    """
    global _line, _process, _progress
    leave()  # a ring that this process was in before
    size = len(addresses)
    following, previous = (rank + 1) % size, (rank - 1) % size
    target = addresses[following]
    outgoing = socket.create_connection((target.host, target.port), timeout)
    outgoing.sendall(target.token.encode())
    connections = {"next": outgoing, "previous": door.enter(timeout)}
    for connection in connections.values():
        connection.settimeout(None)
        _notice_dead_machine(connection, silence)
    mine, its = socket.socketpair()
    progress = Progress.create()
    start = {
        "rank": rank,
        "size": size,
        "parent": os.getpid(),
        "own": its.fileno(),
        "progress": progress.fd,
        "neighbours": [
            (following, target.machine, connections["next"].fileno()),
            (previous, addresses[previous].machine, connections["previous"].fileno()),
        ],
    }
    handed = [its, *connections.values()]
    _process = subprocess.Popen(
        [sys.executable, "-m", "flux_trainer.runtime.watcher", json.dumps(start)],
        cwd=_PACKAGE.parent,  # where python -m finds the package
        stdin=subprocess.DEVNULL,
        pass_fds=[progress.fd, *(connection.fileno() for connection in handed)],
        start_new_session=True,  # a signal to the rank's process group is none to the watcher
    )
    for connection in handed:
        connection.close()
    os.close(progress.fd)  # the memory stays
    mine.settimeout(_ANSWER)
    _line, _progress = Line(mine), progress
    be_patient(timeout)


def introduce(place: str) -> None:
    """Say what this rank is, in words that others will print: `stage 1 of 2, dp_shard 0`."""
    if _line:
        _line.send({"place": place})


def mark(step: int | None = None) -> None:
    """Leave a mark of progress: something is done that others may wait for, or waiting for others begins.

    All ranks make the same marks in the same order, however far apart in time. Costs less than a microsecond.

    Args:
        step: the step that begins; counting starts anew.
    """
    if _progress:
        _progress.mark(step)


def be_patient(seconds: float) -> None:
    """Say how long this rank will wait for others: a process that dies after so long may be no culprit."""
    if _progress:
        _progress.patience = seconds


def failed(sentence: str) -> None:
    """Tell all ranks that this one ends by an error of its own."""
    if _line:
        _line.send({"failed": sentence[:1000]})


def lost() -> str | None:
    """Sentences that name the ranks to blame; for when a collective has failed.

    Takes a moment where a rank died or is stopped, some seconds where one stands still otherwise; such a one
    is killed.

    Returns:
        None where nothing is known.
    """
    if not _line:
        return None
    _line.send({"waited": True})
    return " ".join(message["verdict"] for message in _line.receive() or ()) or None


def leave() -> None:
    """End the watcher: what this process does from now on is nobody's concern."""
    global _line, _process, _progress
    if _line and _process:
        _line.send({"left": True})
        _line.connection.close()
        _process.wait()
        _line = _process = _progress = None


def _own_host() -> str:
    """The name or address by which other ranks reach this machine."""
    master = os.environ.get("MASTER_ADDR")
    if not master:
        return "127.0.0.1"  # ranks that met through a file
    # The address of the interface that leads to the first rank's machine. Nothing is sent.
    family, kind, _, _, address = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        host: str = probe.getsockname()[0]
    # A loopback address means that this is the first rank's machine, whose name everybody knows.
    return master if host == "::1" or host.startswith("127.") else host


def _notice_dead_machine(connection: socket.socket, silence: int) -> None:
    """Have the kernel close the connection when the other machine has not answered for `silence` seconds."""
    idle = max(1, silence // 3)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", idle),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", max(1, silence - idle)),
        ("TCP_USER_TIMEOUT", 1000 * silence),
    ):
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
