"""How a rank and the watchers talk: a connection that carries lines of JSON. No torch."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any

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
        except TimeoutError:  # it does not read; half a line may be on its way
            with suppress(OSError):  # or it is gone
                self.connection.shutdown(socket.SHUT_RDWR)
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
