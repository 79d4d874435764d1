"""What answers look like: JSON that must be asked for anew, views with their ETag, accepted jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from streamjobs.cursor import Cursor
from streamjobs.events import encode_json
from streamjobs.gateway.snapshots import Snapshot

Headers = Mapping[str, str]


def answer(value: object, headers: Headers | None = None, status_code: int = 200) -> Response:
    """A JSON answer."""
    return encoded(encode_json(value), headers, status_code)


def encoded(body: bytes, headers: Headers | None = None, status_code: int = 200) -> Response:
    """A JSON answer that is encoded already."""
    caching = {"Cache-Control": "no-cache"}
    return Response(body, status_code, {**caching, **(headers or {})}, media_type="application/json")


def viewed(snapshot: Snapshot, headers: Headers | None = None) -> Response:
    """A job's view."""
    return encoded(snapshot.view, {**(headers or {}), "ETag": etag(snapshot.cursor)})


def accepted(job_id: str, kind: str, status: str, cursor: Cursor, headers: Headers, **more: Any) -> Response:
    """202: a job was submitted."""
    body: dict[str, Any] = {"id": job_id, "kind": kind, "status": status, "cursor": str(cursor)}
    return answer(body | more | {"links": links(job_id)}, headers, status_code=202)


def etag(cursor: Cursor) -> str:
    """The tag of a view: its position."""
    return f'"{cursor}"'


def links(job_id: str) -> dict[str, str]:
    """Where to go on from here."""
    here = f"/v1/jobs/{job_id}"
    return {"self": here, "events": f"{here}/events", "cancel": f"{here}/cancel"}
