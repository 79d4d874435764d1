"""What a Redis user must be allowed: the least with which everything works, and who lacks what of it.

Rule 1: `deploy/redis/users.acl` grants exactly this; the tests' store works under it, so a command that a
script begins to use stands here, or tests fail.
Rule 2: nothing here reaches beyond `sj:*`, but `SCAN`, which names keys, and `INFO`, which counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamjobs.errors import MissingPermission
from streamjobs.store import keys
from streamjobs.store.scripts import Scripts, text

if TYPE_CHECKING:
    from streamjobs.store import Store

KEYS = "sj:*"
"""Keys, and channels of pub/sub."""

_KEYED = (
    "del", "exists", "get", "hdel", "hexists", "hget", "hgetall", "hincrby", "hkeys", "hlen", "hmget",
    "hscan", "hset", "hsetnx", "hstrlen", "mget", "persist", "pexpire", "pexpireat", "pexpiretime", "pttl",
    "sadd", "scard", "set", "sismember", "smembers", "srem", "type", "unlink", "xack", "xadd", "xautoclaim",
    "xgroup|create", "xgroup|delconsumer", "xgroup|setid", "xinfo|consumers", "xinfo|groups", "xinfo|stream",
    "xlen", "xpending", "xrange", "xrevrange", "xtrim", "zadd", "zcard", "zcount", "zmscore", "zrange",
    "zrangebyscore", "zrem", "zremrangebyrank", "zremrangebyscore", "zrevrange", "zrevrangebyscore", "zscore",
)  # fmt: skip
_OTHERS = (
    "eval", "evalsha", "exec", "info", "multi", "ping", "publish", "scan", "subscribe", "time", "unsubscribe",
    "xread", "xreadgroup",
)  # fmt: skip

_CHANNELS = {"publish", "subscribe"}

COMMANDS = tuple(sorted((*_KEYED, *_OTHERS)))
"""Every command that streamjobs sends, or that one of its scripts calls."""

_PROBE = f"{keys.prefix(0)}probe"
_ARGUMENTS = {
    "eval": ("return", "1", _PROBE),
    "evalsha": ("0" * 40, "1", _PROBE),
    "publish": (_PROBE, ""),
    "scan": ("0",),
    "subscribe": (_PROBE,),
    "xread": ("STREAMS", _PROBE, "0"),
    "xreadgroup": ("GROUP", "g", "c", "STREAMS", _PROBE, ">"),
}


async def missing_permissions(store: Store) -> list[str]:
    """The commands that Redis does not let this user run on our keys and channels, as an ACL names them.

    Asks and changes nothing. Raises `MissingPermission` where it may not even ask, which takes `EVAL`.
    """
    if store.is_plain:  # which has no users
        return []
    rows = [" ".join((command, *_example(command))) for command in COMMANDS]
    return [text(command) for command in await store.scripts.call(Scripts.ALLOWED, 0, *rows)]


async def require_permissions(store: Store) -> None:
    """Raise `MissingPermission` that names everything which the user lacks, as an ACL would grant it."""
    missing = await missing_permissions(store)
    if missing:
        raise MissingPermission(
            f"Redis does not let its user do all that is needed; grant it {' '.join(_grants(missing))}"
        )


def _grants(missing: list[str]) -> list[str]:
    """What to add to an ACL. Where nothing may be done with our channels, perhaps these are missing."""
    channels = [f"&{KEYS}"] if set(missing) >= _CHANNELS else []
    return channels + [f"+{command}" for command in missing]


def _example(command: str) -> tuple[str, ...]:
    if command in _ARGUMENTS:
        return _ARGUMENTS[command]
    return (_PROBE,) * 4 if command in _KEYED else ()
