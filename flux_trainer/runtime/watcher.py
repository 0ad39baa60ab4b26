"""The watcher: a small process beside each rank that tells all others when its rank dies, and by name.

The watchers form a ring. Each talks to those of the next and the previous rank only, whatever the number of
ranks, and passes on what it hears. When its rank ends without having left in order, its watcher says so round
the ring; when a watcher itself falls silent (its machine is gone), its neighbours do. Every watcher then
gives its own rank GRACE seconds to notice by itself and say its last words, and kills what still hangs: in a
kernel of nccl, in a call that holds the interpreter's lock, stopped by a signal.

A thread of the rank could not do that, and torchrun waits for minutes (a checkpoint may be in the making)
before it kills. Nor could the rank's data workers, forked from it, keep a process's connections open after
its death, which delays what the other ranks notice by themselves.

What travels, as lines of JSON:

    place   a watcher to its neighbours: where in the mesh its rank is; from its rank before that
    left    the end is in order
    gone    a rank is dead: its number, and the sentence to print. Goes round the ring, and to the ranks
    waited  a rank has given up waiting for another. Goes round the ring; who does not react stands still
    failed  a rank to its watcher: it ends by an error of its own

No torch is imported here: a watcher starts in a few hundredths of a second and takes 13 MB.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any

from flux_trainer.runtime.log import init_logger, logger

GRACE = 3.0
"""Seconds a rank gets to end by itself."""
POLL = 0.1
"""Seconds between looks at whether the rank lives."""

Message = dict[str, Any]


class Line:
    """One end of a connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""

    def send(self, message: Message) -> None:
        """Send; nothing happens if the other end is gone, for that is learnt where one reads."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[Message] | None:
        """Wait for more; returns the lines that are complete by now.

        None where nothing more comes: the connection is closed or lost, or its timeout has passed.
        """
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


class Watcher:
    """The watcher of one rank, which is its parent process.

    Args:
        rank: number of the watched rank.
        parent: its process id.
        own: the connection with it.
        neighbours: number of rank, machine and connection of the two neighbours on the ring.
    """

    def __init__(self, rank: int, parent: int, own: Line, neighbours: list[tuple[int, str, Line]]) -> None:
        self.rank, self.parent, self.own = rank, parent, own
        self.neighbours = [line for _, _, line in neighbours]
        self.names = {line: f"Rank {number} (machine {machine})" for number, machine, line in neighbours}
        self.name = f"Rank {rank} (machine {socket.gethostname()})"
        self.gone: dict[int, str] = {}  # by number of a dead rank, what is to be said of it
        self.alarm: float | None = None  # when the first word of a dead or waiting rank was heard
        self.word = ""  # the last one from the own rank: left, failed, waited
        self.ended = self.killed = False  # the own rank
        self.selector = selectors.DefaultSelector()
        for line in (own, *self.neighbours):
            self.selector.register(line.connection, selectors.EVENT_READ, line)

    def run(self) -> None:
        """Watch until the rank has ended, and the ring knows."""
        while not self.over():
            for key, _ in self.selector.select(POLL):
                line: Line = key.data
                messages = line.receive()
                if messages is None:
                    self.selector.unregister(line.connection)
                    if line in self.neighbours:
                        self.lost_neighbour(line)
                for message in messages or ():
                    self.from_rank(message) if line is self.own else self.from_ring(message, line)
            self.look_at_rank()
        self.tell({"left": True})

    def over(self) -> bool:
        if self.word == "left":
            return True
        # Linger a little after an alarm, to pass on what is still to come.
        return self.ended and self.alarm is not None and time.monotonic() > self.alarm + GRACE + 1

    def from_rank(self, message: Message) -> None:
        if "place" in message:
            self.name = f"Rank {self.rank} ({message['place']}; machine {socket.gethostname()})"
            self.tell({"place": self.name})
        elif "failed" in message:
            self.word = "failed"
            self.add_gone(self.rank, f"{self.name} failed: {message['failed']}")
        elif "waited" in message:
            self.word = "waited"
            self.raise_alarm()
        else:
            self.word = "left"

    def from_ring(self, message: Message, line: Line) -> None:
        if "place" in message:
            self.names[line] = message["place"]
        elif "gone" in message:
            self.add_gone(message["gone"], message["sentence"], line)
        elif "waited" in message:
            self.raise_alarm(line)
        else:
            self.names[line] = ""

    def lost_neighbour(self, line: Line) -> None:
        """The connection is closed, or nothing has come from the other machine for some seconds."""
        if self.names[line]:  # otherwise it had taken its leave
            number = int(self.names[line].split()[1])
            self.add_gone(number, f"{self.names[line]} is gone: its machine does not answer any more.")

    def look_at_rank(self) -> None:
        """Learn of the rank's end, or bring it about where it is due."""
        if not self.ended and os.getppid() != self.parent:
            self.ended = True
            if not self.word and not self.gone:
                sentence = f"{self.name} is gone: its process died without a word, perhaps killed."
                logger.error(sentence)
                self.add_gone(self.rank, sentence)
        if self.ended or self.killed or self.alarm is None:
            return
        # Who has spoken may listen for the names of others (`peers.lost`) before it ends.
        if time.monotonic() > self.alarm + GRACE * (2 if self.word else 1):
            if not self.word and not self.gone:
                sentence = (
                    f"{self.name} stands still: another rank has given up waiting, and {GRACE:.0f} s later "
                    "this one has not noticed. It is killed."
                )
                logger.error(sentence)
                self.add_gone(self.rank, sentence)
            elif not self.word:
                who = " ".join(self.gone.values())
                logger.error(
                    f"{who} This one has not noticed in {GRACE:.0f} s, and is killed without saving."
                )
            os.kill(self.parent, signal.SIGKILL)
            self.killed = True

    def add_gone(self, number: int, sentence: str, source: Line | None = None) -> None:
        """Learn that a rank is dead; tell the own rank, and pass it on."""
        if number not in self.gone:
            self.gone[number] = sentence
            message = {"gone": number, "sentence": sentence}
            self.own.send(message)
            self.tell(message, source)
            self.alarm = self.alarm or time.monotonic()

    def raise_alarm(self, source: Line | None = None) -> None:
        """Learn that some rank waits in vain, and pass it on."""
        if self.alarm is None:
            self.alarm = time.monotonic()
            self.tell({"waited": True}, source)

    def tell(self, message: Message, source: Line | None = None) -> None:
        """Send to both neighbours, but not to where it came from."""
        for line in self.neighbours:
            if line is not source:
                line.send(message)


def main() -> None:
    """What `peers.watch` starts: `watcher JSON`, with the numbers of the inherited connections in it."""
    # A stop signal may go to all processes of a machine; the rank saves, then takes its leave.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    start = json.loads(sys.argv[1])
    init_logger(start["rank"])
    neighbours = [
        (number, machine, Line(socket.socket(fileno=fd))) for number, machine, fd in start["neighbours"]
    ]
    Watcher(start["rank"], start["parent"], Line(socket.socket(fileno=start["own"])), neighbours).run()


if __name__ == "__main__":
    main()
