"""The Python client of a gateway."""

from streamjobs.client.client import Client, GatewayError, GatewayUnreachable, WatchedEvent
from streamjobs.client.handle import Handle, JobCancelled, JobFailed

__all__ = [
    "Client",
    "GatewayError",
    "GatewayUnreachable",
    "Handle",
    "JobCancelled",
    "JobFailed",
    "WatchedEvent",
]
