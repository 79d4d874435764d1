"""The scripts as tests call them: at a time of the test's choosing, as shipped or broken on purpose.

A script reads the clock in one line of its text; that line is replaced here, the shipped code has no switch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import redis

from streamjobs.store.scripts import Limits, Script, Scripts
from tests.contract.keyspace import PREFIX
from tests.model import NewJob, wire

LEASE = 60_000
START = 4_000_000_000_000
"""Far in the future: keys with an expiry stay until the duel takes them away."""

LIMITS = Limits(
    lease=LEASE, sweep=1_000, retention=300_000, idempotency=600_000, owner_limit=2, owner_rate=6,
    owner_waiting=9, dead_cap=3, max_depth=2, max_children=2, max_crashes=2, crash_base=5_000,
    crash_cap=8_000, max_events=40, max_bytes=3_000, feed_cap=100_000, feed_bytes=150,
    owner_feed_cap=100_000, owner_feed_bytes=90, owner_feed_ttl=600_000, inline_bytes=300, scan=3,
)  # fmt: skip
"""Small enough that random programs meet every one of them."""

CLOCK = ("local TIME = redis.call('TIME')", "local TIME = OPT.clock")

SCRIPTS: dict[str, Script] = {
    "submit": Scripts.SUBMIT, "take": Scripts.TAKE, "append": Scripts.APPEND, "always": Scripts.APPEND_ALWAYS,
    "renew": Scripts.RENEW, "wake": Scripts.WAKE, "cancel": Scripts.CANCEL, "signal": Scripts.SIGNAL,
    "pause": Scripts.PAUSE, "resume": Scripts.RESUME, "inspect": Scripts.INSPECT,
    "artifact": Scripts.ARTIFACT, "permit": Scripts.PERMIT, "strike": Scripts.STRIKE, "rerun": Scripts.RERUN,
    "schedule": Scripts.SCHEDULE, "seal": Scripts.SEAL,
}  # fmt: skip


class Mutation(NamedTuple):
    """A change to the text of one script (or of several, through what they share)."""

    script: str
    old: str
    new: str


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{text.count(old)} times in the script: {old}"
    return text.replace(old, new)


def script_texts(mutation: Mutation | None = None) -> dict[str, str]:
    """Every script reading the tests' clock; with a mutation, broken on purpose."""
    texts = {name: replaced(script.text, *CLOCK) for name, script in SCRIPTS.items()}
    if mutation is not None:
        broken = SCRIPTS if mutation.script == "common" else mutation.script.split()
        texts |= {name: replaced(texts[name], mutation.old, mutation.new) for name in broken}
    return texts


def plain(reply: Any) -> Any:
    """A reply with text for bytes, and without the words that explain a refusal to people."""
    if isinstance(reply, bytes):
        return reply.decode()
    if not isinstance(reply, list | tuple):
        return reply
    words = [plain(word) for word in reply]
    return words[:1] if words[:1] in (["bad"], ["error"]) else words


class Ear:
    """Hears everything that scripts publish."""

    END = "test:heard"

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.pubsub: Any = client.pubsub(ignore_subscribe_messages=True)
        self.pubsub.psubscribe(f"{PREFIX}*", self.END)

    def heard(self) -> list[tuple[str, bytes]]:
        """Channel and message of each publish since the last call, in order."""
        self.client.publish(self.END, "")
        messages: list[tuple[str, bytes]] = []
        for message in self.pubsub.listen():
            channel = message["channel"].decode()
            if channel == self.END:
                return messages
            messages.append((channel.removeprefix(PREFIX), message["data"]))
        raise AssertionError("the subscription ended")

    def close(self) -> None:
        self.pubsub.close()


class ScriptCaller:
    """Calls the scripts on one Redis at a time of the caller's choosing."""

    def __init__(
        self, client: redis.Redis, limits: Limits = LIMITS, mutation: Mutation | None = None
    ) -> None:
        self.client = client
        self.now = START
        self._limits = msgspec.json.encode(limits)[:-1]
        self._shas = {name: client.script_load(text) for name, text in script_texts(mutation).items()}

    def __call__(self, name: str, *arguments: str | bytes | int) -> Any:
        seconds, rest = divmod(self.now, 1000)
        options = self._limits + b',"clock":[%d,%d]}' % (seconds, rest * 1000)
        key = f"{PREFIX}leases"
        return self.client.execute_command("EVALSHA", self._shas[name], 1, key, options, *arguments)


def submit_row(row: NewJob) -> list[str | bytes | int]:
    head = [row.id, row.owner, row.kind, row.queue, row.priority, row.delay, row.start_timeout, row.timeout]
    return [*head, row.ckey, row.idem, row.body, row.parent, wire(row.fields), row.tick]
