"""A program that only sweeps, in a process of its own: `python -m tests.integration.sweeps URL`."""

from __future__ import annotations

import asyncio
import sys

from streamjobs.store import Store
from streamjobs.store.sweeper import Sweeper
from tests.conftest import fast_settings


async def main(url: str) -> None:
    await Sweeper(await Store.open(fast_settings(url))).run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
