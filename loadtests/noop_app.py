"""The app that the streamjobs worker runs in the jobs scenario: one workflow that does nothing."""

from __future__ import annotations

from streamjobs import App, Context

app = App()


@app.workflow("noop")
async def noop(_ctx: Context, _n: int) -> None:
    """Do nothing."""
