"""An address that several processes listen on, each with a socket of its own.

The kernel spreads connections over sockets that share an address (SO_REUSEPORT) by a hash of both ends. All
of them belong to the supervisor too, so that what has connected to a process that dies waits for the one that
takes over its socket. Elsewhere than on Linux they are one socket, and whoever is quicker accepts.

Measured on two cores, four processes, 400 streams that come at once, three runs (streams a process):
own sockets 81 to 116, one socket 37 to 176.

Rejected: one socket for all on Linux too. Who accepts takes all that wait, and streams stay where they are.
Rejected: sockets that the processes bind themselves. What waits in the queue of one that dies is reset.
"""

from __future__ import annotations

import socket
import sys

from streamjobs.config import Settings
from streamjobs.gateway.server import listen, require_guarded

SPREADS = sys.platform == "linux"
"""Whether the kernel spreads connections over sockets of one address; others give the last one all."""


class Port:
    """An address, held until `close`. Port 0 takes any free one. Raises `OSError` where it is taken."""

    def __init__(self, settings: Settings, port: int) -> None:
        self._settings = settings
        require_guarded(settings)
        self._held = _hold(settings.host, port) if SPREADS else listen(settings, port)
        self.number: int = self._held.getsockname()[1]

    def open(self) -> socket.socket:
        """A listening socket for one process."""
        if SPREADS:
            return listen(self._settings, self.number, is_shared=True)
        return self._held.dup()

    @property
    def url(self) -> str:
        """Where it can be reached."""
        host = self._settings.host
        return f"http://[{host}]:{self.number}" if ":" in host else f"http://{host}:{self.number}"

    def close(self) -> None:
        """Leave the address to others once all its sockets are closed."""
        self._held.close()


def _hold(host: str, port: int) -> socket.socket:
    """A socket that does not listen and keeps others than ours from the address."""
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
        # only now: bound with it, it would join a gateway that is there already
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError:
        held.close()
        raise
    return held
