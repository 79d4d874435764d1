"""The command line: one file a command group."""

from streamjobs.cli.main import main

__all__ = ["main"]
