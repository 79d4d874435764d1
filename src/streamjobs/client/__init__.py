"""The Python client of a gateway."""

from streamjobs.client.client import Client, GatewayError, GatewayUnreachable, WatchedEvent

__all__ = ["Client", "GatewayError", "GatewayUnreachable", "WatchedEvent"]
