"""fakeredis as a server process: the last resort where no redis-server can be had.

Prints its port and serves until it is stopped. For trying things out only: it is slow and keeps nothing.
"""

from __future__ import annotations

import socket
import sys

from fakeredis import TcpFakeServer


def main() -> None:
    """Serve on a free loopback port, and say which."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = TcpFakeServer(("127.0.0.1", port), server_type="redis", server_version=(7, 0))
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
