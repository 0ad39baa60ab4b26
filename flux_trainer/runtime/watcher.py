"""The watcher: a small process beside each rank that tells all others when its rank dies, and by name.

The watchers form a ring. Each talks to those of the next and the previous rank only, whatever the number of
ranks, and passes on what it hears. When a rank ends without having left in order, or gives up waiting for
another, its watcher reports it; when a watcher itself falls silent (its machine is gone), its neighbours do.
The first report is the alarm: every watcher then reports how far its rank has come and what its process does,
and finds from the reports of all who is to blame (`blame.py`). It gives its own rank GRACE seconds to notice
by itself and say its last words, and kills what still hangs: in a kernel of nccl, in a call that holds the
interpreter's lock, stopped by a signal.

A thread of the rank could not do that, and torchrun waits for minutes (a checkpoint may be in the making)
before it kills. Nor could the rank's data workers, forked from it, keep a process's connections open after
its death, which delays what the other ranks notice by themselves.

What travels, as lines of JSON:

    place    a watcher to its neighbours: where in the mesh its rank is; from its rank before that
    left     the end is in order
    report   what is known of a rank. Goes round the ring: once for each rank, once more when it ends
    waited   a rank to its watcher: it has given up waiting for another
    failed   a rank to its watcher: it ends by an error of its own
    verdict  a watcher to its rank: who is to blame

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
from dataclasses import asdict

from flux_trainer.runtime import interrupt
from flux_trainer.runtime.blame import End, Report, blame, evident, text
from flux_trainer.runtime.line import Line, Message
from flux_trainer.runtime.log import init_logger, logger
from flux_trainer.runtime.progress import Look, Progress

GRACE = 3.0
"""Seconds a rank gets to end by itself."""
POLL = 0.1
"""Seconds between looks at whether the rank lives."""
LOOK = 0.3
"""Seconds between the two looks that tell what its process does."""
LATE = 1.0
"""Seconds within which what caused an alarm is heard of; what ends later may be its consequence."""


class Watcher:
    """The watcher of one rank, which is its parent process.

    Args:
        rank: number of the watched rank.
        size: number of ranks.
        parent: its process id.
        own: the connection with it.
        neighbours: number of rank, machine and connection of the two neighbours on the ring.
        progress: where the rank leaves its marks.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        parent: int,
        own: Line,
        neighbours: list[tuple[int, str, Line]],
        progress: Progress,
    ) -> None:
        self.rank, self.size, self.parent, self.own, self.progress = rank, size, parent, own, progress
        self.neighbours = [line for _, _, line in neighbours]
        self.names = {line: f"Rank {number} (machine {machine})" for number, machine, line in neighbours}
        self.name = f"Rank {rank} (machine {socket.gethostname()})"
        self.reports: dict[int, Report] = {}  # by rank, the latest one
        self.verdict: dict[int, str] = {}  # by rank to blame, what is to be said of it
        self.alarm: float | None = None  # when the first report was heard
        self.place = (0, 0)  # how far the own rank was then
        self.look: Look  # at it, then
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
        return self.ended and self.since_alarm() > GRACE + 1

    def since_alarm(self) -> float:
        """Seconds; negative while there has been none."""
        return -1.0 if self.alarm is None else time.monotonic() - self.alarm

    def from_rank(self, message: Message) -> None:
        if "place" in message:
            self.name = f"Rank {self.rank} ({message['place']}; machine {socket.gethostname()})"
            self.tell({"place": self.name})
        elif "failed" in message:
            self.word = "failed"
            self.report("failed", reason=message["failed"])
        elif "waited" in message:
            self.word = "waited"
            self.report("waited")
        else:
            self.word = "left"

    def from_ring(self, message: Message, line: Line) -> None:
        if "place" in message:
            self.names[line] = message["place"]
        elif "report" in message:
            self.heed(Report(**message["report"]), line)
        else:
            self.names[line] = ""

    def lost_neighbour(self, line: Line) -> None:
        """The connection is closed, or nothing has come from the other machine for some seconds."""
        if self.names[line]:  # otherwise it had taken its leave
            self.heed(Report(int(self.names[line].split()[1]), self.names[line], end="lost"))

    def report(self, end: End = "", activity: str = "", reason: str = "") -> None:
        """Report on the own rank, as of the alarm."""
        step, count = self.place if self.alarm is not None else self.progress.place
        idle, late = self.progress.idle, self.since_alarm() > LATE
        overdue = idle > self.progress.patience / 2
        self.heed(Report(self.rank, self.name, step, count, idle, overdue, activity, end, late, reason))

    def heed(self, report: Report, source: Line | None = None) -> None:
        """Take in a report, and pass it on unless it is known."""
        known = self.reports.get(report.rank)
        if known and (known.end or not report.end):
            return
        if self.alarm is None:
            self.alarm = time.monotonic()
            self.place, self.look = self.progress.place, Look.at(self.parent)
        self.reports[report.rank] = report
        self.tell({"report": asdict(report)}, source)

    def look_at_rank(self) -> None:
        """Learn of the rank's end, or bring it about where it is due."""
        if not self.ended and os.getppid() != self.parent:
            self.ended = True
            if not self.killed:
                self.report("died")
        if self.alarm is None:
            return
        if self.rank not in self.reports and self.since_alarm() > LOOK:
            self.report(activity=self.look.until(Look.at(self.parent)))
        if not self.verdict:
            self.judge()
        # Who has spoken may listen for the verdict (`peers.lost`) before it ends.
        if not self.ended and not self.killed and self.since_alarm() > GRACE * (2 if self.word else 1):
            if not self.word and list(self.verdict) == [self.rank]:
                logger.error(f"{self.verdict[self.rank]} It is killed.")
            elif not self.word:
                who = text(self.verdict)
                logger.error(
                    f"{who} This one has not noticed in {GRACE:.0f} s, and is killed without saving."
                )
            os.kill(self.parent, signal.SIGKILL)
            self.killed = True

    def judge(self) -> None:
        """Find who is to blame, once enough is known; tell the rank, or speak for it if it is dead."""
        complete = len(self.reports) == self.size or self.since_alarm() > LATE
        if not (complete and evident(self.reports)) and self.since_alarm() <= GRACE:
            return
        self.verdict = blame(self.reports, self.size)
        self.own.send({"verdict": text(self.verdict)})
        if self.ended and not self.word:
            who = self.verdict.get(self.rank) or f"{text(self.verdict)} This one died in the wait."
            logger.error(who)

    def tell(self, message: Message, source: Line | None = None) -> None:
        """Send to both neighbours, but not to where it came from."""
        for line in self.neighbours:
            if line is not source:
                line.send(message)


def main() -> None:
    """What `peers.watch` starts: `watcher JSON`, with the numbers of the inherited connections in it."""
    # A stop signal may go to all processes of a machine; the rank saves, then takes its leave.
    interrupt.ignore()
    start = json.loads(sys.argv[1])
    init_logger(start["rank"])
    neighbours = []
    for number, machine, fd in start["neighbours"]:
        connection = socket.socket(fileno=fd)
        connection.settimeout(LATE)  # a neighbour that does not read must not keep this one from its work
        neighbours.append((number, machine, Line(connection)))
    own, progress = Line(socket.socket(fileno=start["own"])), Progress(start["progress"])
    Watcher(start["rank"], start["size"], start["parent"], own, neighbours, progress).run()


if __name__ == "__main__":
    main()
