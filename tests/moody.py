"""A module that is imported well, except by the fork server of isolated tools: there MOOD says how."""

from __future__ import annotations

import os
import sys
import time

from streamjobs.app import App

app = App(name="moody", builtin_tools=False)


@app.tool(isolated=True)
def answers() -> str:
    """Answer."""
    return os.environ.get("MOOD", "")


def _is_fork_server() -> bool:
    main = getattr(sys.modules["__main__"], "__spec__", None)
    return main is not None and main.name.endswith(".forkserver")


if _is_fork_server():
    match os.environ.get("MOOD", ""):
        case "hangs":
            time.sleep(3600)
        case "raises":
            raise KeyError("DATABASE_URL")
        case "exits":
            os._exit(3)
        case _:
            pass
