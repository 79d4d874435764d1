"""Random workflows: a program is a tree made of a seed, and a pure function says what it must count.

A program is data (lists of nodes), so that any worker, and the test, make the same one of the same seed.
Every step that completes counts one for its name; branches add up.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from streamjobs import App, Context, Retry
from tests.faults.app import read_effects, take_effect

app = App(name="programs", builtin_tools=False)

DEPTH = 3


class Given(msgspec.Struct):
    """What a job of these is given."""

    seed: int
    depth: int = DEPTH


class Node(msgspec.Struct, frozen=True):
    """One thing that a program does. `what`: step, retrying, parallel, sleep, wait, never, child, emit."""

    what: str
    name: str = ""
    number: int = 0
    seconds: float = 0.0
    body: list[Node] = []


def program(seed: int, depth: int = DEPTH) -> list[Node]:
    """The program of a seed."""
    return _Maker(random.Random(seed)).block(depth, most=5)


class _Maker:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._count = 0

    def block(self, depth: int, most: int) -> list[Node]:
        return [self._node(depth) for _ in range(self._chance.randint(1, most))]

    def _node(self, depth: int) -> Node:
        kinds = ["step", "step", "retrying", "nap", "sleep", "wait", "never", "emit", "artifact"]
        kinds += ["parallel", "parallel", "child"] if depth else []
        what = self._chance.choice(kinds)
        self._count += 1
        name = f"{what}{self._count}"
        match what:
            case "parallel":
                branches = self._chance.randint(2, 3)
                body = [Node("block", body=self.block(depth - 1, most=3)) for _ in range(branches)]
                return Node(what, name, body=body)
            case "child":
                return Node(what, name, number=self._chance.randrange(10**6), body=[])
            case "retrying":
                return Node(what, name, number=self._chance.randint(1, 3), seconds=0.01)
            case "nap":
                return Node("sleep", name, seconds=self._chance.uniform(0.0, 0.1))
            case "sleep" | "never":
                return Node(what, name, seconds=self._chance.uniform(0.25, 0.6))
            case _:
                return Node(what, name, seconds=self._chance.choice([0.0, 0.0, 0.05, 0.15]))


def expected(nodes: list[Node], depth: int = DEPTH) -> Counter[str]:
    """What a program counts; children have a level less."""
    total: Counter[str] = Counter()
    for node in nodes:
        match node.what:
            case "parallel" | "block":
                total += expected(node.body, depth - 1 if node.what == "parallel" else depth)
            case "child":
                total += expected(program(node.number, depth - 1), depth - 1) + Counter({node.name: 1})
            case _:
                total[node.name] += 1
    return total


def signals(nodes: list[Node]) -> list[str]:
    """The names of all signals that this program, without its children, waits for."""
    return [
        name for node in nodes
        for name in ([node.name] if node.what == "wait" else signals(node.body))
    ]  # fmt: skip


async def _step(job: str, name: str, seconds: float) -> int:
    await asyncio.sleep(seconds / 2)
    take_effect("step", name, job)
    await asyncio.sleep(seconds / 2)
    return 1


async def _retrying(job: str, name: str, failures: int) -> int:
    """Fail so often, then succeed; a run that was killed counts as one that failed."""
    take_effect("step", name, job)
    runs = [effect for effect in read_effects(Path(os.environ["EFFECTS"])) if effect[1:] == (name, job)]
    if len(runs) <= failures:
        raise ConnectionError(f"run {len(runs)}")
    return 1


@app.workflow("program")
async def run(ctx: Context, given: Given) -> dict[str, int]:
    """Run the program of a seed; what it counted."""
    return dict(await Interpreter(ctx).block(program(given.seed, given.depth), given.depth))


class Interpreter:
    """Runs a program's nodes on a context."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    async def block(self, nodes: list[Node], depth: int) -> Counter[str]:
        total: Counter[str] = Counter()
        for node in nodes:
            total += await self._node(node, depth)
        return total

    async def _node(self, node: Node, depth: int) -> Counter[str]:
        ctx, job = self._ctx, self._ctx.job_id
        one: Any = 1
        match node.what:
            case "parallel":
                return await self._parallel(node, depth)
            case "child":
                child = await ctx.spawn("program", Given(node.number, depth - 1), key=node.name)
                return Counter(await child.result()) + Counter({node.name: 1})
            case "step":
                one = await ctx.step(node.name, _step, job, node.name, node.seconds)
            case "retrying":
                one = await ctx.step(node.name, _retrying, job, node.name, node.number,
                                     retry=Retry(attempts=node.number + 1, base=node.seconds))  # fmt: skip
            case "sleep":
                await ctx.sleep(node.seconds, key=node.name)
            case "wait":
                one = await ctx.wait_for(node.name, timeout=120.0)
            case "never":
                one = await ctx.wait_for(node.name, timeout=node.seconds, default=1)
            case "artifact":
                await ctx.artifact(node.name, b"x")
            case _:
                ctx.emit(node.name)
        return Counter({node.name: one})

    async def _parallel(self, node: Node, depth: int) -> Counter[str]:
        """All branches at once; the order in which they ended is shared, and so must be the same again."""
        ended: list[int] = []

        async def branch(number: int, nodes: list[Node]) -> Counter[str]:
            counted = await self.block(nodes, depth - 1)
            ended.append(number)
            return counted

        parts = await asyncio.gather(*(branch(i, block.body) for i, block in enumerate(node.body)))
        order = await self._ctx.step(f"order:{node.name}", _give, ended, key=node.name)
        assert order == ended, f"{node.name}: the branches ended as {order}, and in a replay as {ended}"
        return sum(parts, Counter())


async def _give(value: list[int]) -> list[int]:
    return value
