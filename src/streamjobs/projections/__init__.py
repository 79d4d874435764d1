"""Projections: readers that fold the logs of jobs into what lists, statistics and notifications show.

A projection is imported when it is first asked for: a projector that runs one needs nothing of the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING

from streamjobs.errors import ConfigError

if TYPE_CHECKING:
    from streamjobs.projections.runner import Projection
    from streamjobs.store import Store

KNOWN: dict[str, str] = {
    "index": "IndexProjection",
    "notify": "NotifyProjection",
    "retention": "RetentionProjection",
    "snapshot": "SnapshotProjection",
    "stats": "StatsProjection",
}
"""Name of a projection, and of the module here that has it -> its class, which is made from a store."""


def build(names: Iterable[str], store: Store) -> list[Projection]:
    """The projections of these names. Raises `ConfigError` for one that nobody knows."""
    return [_build(name, store) for name in names]


def _build(name: str, store: Store) -> Projection:
    if name not in KNOWN:
        raise ConfigError(f"no projection {name!r}; there are: {', '.join(KNOWN)}")
    return getattr(import_module(f"{__name__}.{name}"), KNOWN[name])(store)
