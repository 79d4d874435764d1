"""fakeredis as a server process: the last resort where no redis-server can be had.

Prints its port and serves until it is stopped, or until its standard input ends: so it does not outlive the
process that started it. For trying things out only: it is slow and keeps nothing.
"""

from __future__ import annotations

import os
import sys
import threading

from fakeredis import TcpFakeServer


def main() -> None:
    """Serve on a free loopback port, and say which."""
    server = TcpFakeServer(("127.0.0.1", 0), server_type="redis", server_version=(7, 0))
    threading.Thread(target=_end_with_input, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
