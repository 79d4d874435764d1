"""Programs for a duel that reach what random ones seldom do: each end, limit and race by its name."""

from __future__ import annotations

from tests.contract.callers import LEASE
from tests.contract.commands import (
    Advance,
    Again,
    Append,
    Ask,
    Cancel,
    Command,
    Idle,
    Keep,
    Permit,
    Renew,
    Rerun,
    Row,
    Seal,
    Strike,
    Submission,
    Submit,
    Take,
    Wake,
)

ONE = Submit((Submission(),))

FINISH = Append((Row(outcome="completed"),))
WAIT = Append((Row(outcome="wait"),))

STORIES: dict[str, list[Command]] = {
    "poisoned": [ONE, *[Take(), Append((Row(events=("delta",)),)), Idle(3)] * 4],
    "pause and cancel of a job whose worker dies": [
        Submit((Submission(slot=1), Submission(slot=2))), Take(), Ask("pause", 1), Cancel(2), Idle(2),
        Ask("resume", 1),
    ],
    "sealed as it runs, and after its end": [
        ONE, Seal(flaw="empty"), Take(), Append((Row(events=("delta",) * 7),)), Seal(flaw="hole"),
        Seal(flaw="foreign"), Seal(size=2, flaw="gap"), Seal(leave=1), Again(), Seal(known="before"), Seal(),
        Append((Row(events=("note", "log")),)), Seal(snapshot=True), Again(),
        Append((Row(events=("note",)),)), Seal(), Seal(snapshot=True, known="before"), FINISH,
        Seal(leave=1, snapshot=True), Seal(snapshot=True), Again(), Seal(), Seal(flaw="again"),
    ],
    "sealed only after its end": [ONE, Take(), Append((Row(events=("delta",) * 7),)), FINISH, Seal(), Seal()],
    "sealed, and then a worker dies": [
        ONE, Take(), Append((Row(events=("delta",)),)), Seal(), Idle(3), Seal(), Take(), Seal(snapshot=True),
        Ask("pause", 0), Append((Row(events=("step",), unread=0),)), FINISH, Seal(slot=7),
    ],
    "events over the limit": [
        ONE, Take(), *[Append((Row(events=("note",) * 9),))] * 5,
        Append((Row(events=("note",) * 2),)), FINISH,
    ],
    "bytes over the limit": [
        ONE, Take(), *[Append((Row(events=("long",) * 7),))] * 5, Append((Row(outcome="failed"),)),
    ],
    "signals over the limit": [ONE, *[Ask("signal", 0, key) for key in range(42)]],
    "pauses over the limit": [
        ONE, Take(), *[Ask(what, 0, key) for key in range(22) for what in ("pause", "resume")],
    ],
    "a pause of a job whose log is full": [
        ONE, Take(), *[Append((Row(events=("note",) * 9),))] * 4, Append((Row(events=("note",) * 2),)),
        Ask("pause", 0), FINISH,
    ],
    "signals of more bytes than there may be": [
        ONE, Take(), *[Append((Row(events=("long",) * 7),))] * 3,
        *[Ask("signal", 0, key) for key in range(30)],
    ],
    "more jobs than may wait": [
        Submit(tuple(Submission(slot=slot) for slot in range(12))), Submit((Submission(slot=12, owner=1),)),
        Submit((Submission(slot=13, parent=0), Submission(slot=14, queue=1))), Again(), Take(), FINISH,
        Submit((Submission(slot=15),)),
    ],
    "a child wakes its parent": [
        ONE, Take(), Submit((Submission(slot=1, parent=0),)), WAIT, Take(), FINISH, Again(), Take(), FINISH,
        Again(), Submit((Submission(slot=2, parent=0), Submission(slot=3, parent=9))),
    ],
    "more of a family than there may be": [
        Submit((Submission(), Submission(slot=1, parent=0), Submission(slot=2, parent=1))),
        Submit((Submission(slot=3, parent=2), Submission(slot=4, parent=0), Submission(slot=5, parent=0))),
        Submit((Submission(slot=4, parent=0), Submission(slot=6, owner=1, parent=0))), Cancel(0),
        Submit((Submission(slot=7, parent=0),)),
    ],
    "cancelled with its family": [
        ONE, Submit((Submission(slot=1, parent=0), Submission(slot=2, parent=1))), Take(wanted=1),
        Cancel(0), Again(), Renew(), Append((Row(unread=1, outcome="yield"),)),
        Append((Row(outcome="yield"),)), Cancel(0), Cancel(7),
    ],
    "no children of a job that is being cancelled": [
        ONE, Take(), Cancel(0), Submit((Submission(slot=1, parent=0),)),
    ],
    "paused, resumed, asked again": [
        ONE, Ask("pause", 0), Again(), Ask("pause", 0, 1), Ask("resume", 0), Again(), Take(),
        Ask("pause", 0, 2), Ask("pause", 0, 3), Ask("resume", 0, 1),
        Ask("resume", 0, 2), Ask("pause", 5), Ask("resume", 5),
    ],
    "paused while an attempt fails": [
        ONE, Take(), Ask("pause", 0), Append((Row(outcome="retry", delay=2_000),)),
    ],
    "a timer during a back-off": [
        ONE, Take(), Append((Row(outcome="retry", delay=30_000, timers="soon"),)), Advance(20_000), Wake(),
        Advance(20_000), Wake(),
    ],
    "signalled": [
        ONE, Take(), WAIT, Ask("signal", 0), Again(), Take(), FINISH, Ask("signal", 0, 1), Ask("signal", 5),
    ],
    "batches out of order": [
        ONE, Take(),
        Append((Row(events=("step",)), Row(sent=True), Row(number=1), Row(number=-1))),
        Append((Row(events=("completed",)),)),
        Append((Row(outcome="retry"),)), Append((Row(stale=True),)), Renew(stale=True),
    ],
    "asleep without a timer": [
        ONE, Take(), Append((Row(outcome="sleep"), Row(outcome="sleep", timers="none"))),
        Append((Row(timers="soon"),)), Append((Row(outcome="sleep", timers="back"),)),
    ],
    "a timer that is taken back": [
        ONE, Take(), Append((Row(outcome="wait", timers="soon"),)), Ask("signal", 0), Take(),
        Append((Row(timers="back"),)), Advance(20_000), Wake(),
        Append((Row(outcome="sleep", timers="instead"),)), Advance(4_000), Wake(),
    ],
    "a key that is taken does not stop others": [
        Submit((Submission(ckey=1), Submission(slot=1), Submission(slot=2, ckey=1), Submission(slot=3))),
        Take(), Append((Row(lease=1, outcome="wait"),)), Take(), Wake(), Take(),
    ],
    "held, released, late": [
        Submit(tuple(Submission(slot=i, start_timeout=70_000, timeout=15_000) for i in range(4))), Take(),
        Take(again=True), FINISH, Idle(1), Take(), Idle(3),
    ],
    "the same submission": [
        Submit((Submission(idem=1), Submission(slot=1, idem=1), Submission(slot=2, idem=1, body=1))), Again(),
    ],
    "more due than one sweep works on": [
        Submit((Submission(delay=3_000), Submission(slot=1, delay=3_000))), Advance(4_000), Wake(1), Wake(1),
    ],
    "clock back by an hour": [
        ONE, Take(), Append((Row(timers="late"),)), Wake(), Advance(-3_600_000), Wake(),
        *[Advance(LEASE // 3), Wake()] * 4,
    ],
    "no tool starts after a cancel": [
        ONE, Take(), Append((Row(events=("call",)),)), Cancel(0),
        Append((Row(events=("tool", "call")), Row(sent=True))),
    ],
    "cancelled while the clock steps back": [
        ONE, Take(), Cancel(0), Advance(-3_600_000), Append((Row(outcome="yield"),)),
    ],
    "artifacts": [
        ONE, Take(), Keep(size=12), Again(), Keep(size=20), Keep(size=21), Keep(name="b", size=11),
        Keep(name="b", size=10), Keep(size=19), Keep(name="b", size=11), FINISH, Keep(stale=True),
        Advance(310_000), Keep(stale=True),
    ],
    "permits": [
        Permit(), Again(), Permit(), Permit(patience=7_000), Advance(400), Permit(patience=7_000), Permit(),
        Permit(name="b"), Advance(20_000), *[Permit()] * 3, Advance(-3_600_000), Permit(), Advance(7_334),
        *[Permit()] * 2,
    ],
    "a kind is struck": [
        Submit((Submission(), Submission(slot=1, kind="play"), Submission(slot=2), Submission(slot=3))),
        Strike(), Again(), Take(), Wake(), FINISH, Wake(), Take(), Strike("lift"), Again(), Wake(), Take(),
        FINISH, FINISH, Take(),
    ],
    "a kind is struck while some of it is held": [
        Submit(tuple(Submission(slot=i, kind="play" if i in {2, 4} else "work") for i in range(5))),
        Take(wanted=1), Strike(what="kind:play"), FINISH, Wake(), Take(), FINISH, Take(), FINISH, Wake(),
        Strike("lift", "kind:play"), Wake(), Take(),
    ],
    "a queue is struck": [
        Submit((Submission(), Submission(slot=1, queue=1))), Strike(what="queue:fast"), Take(),
        Take(queues=("fast",)), Strike("lift", "queue:fast"), Take(),
    ],
    "more dead than are listed, and they are forgotten": [
        *[
            command
            for slot in (0, 2, 4)
            for command in (
                Submit((Submission(slot=slot), Submission(slot=slot + 1))), Take(),
                Append((Row(outcome="failed"), Row(lease=1, outcome="failed"))), Advance(90_000),
            )
        ],
        Wake(), Advance(100_000), Wake(1), Advance(200_000), Wake(1), Wake(),
    ],
    "run again": [
        ONE, Take(), Rerun(), Append((Row(outcome="failed"),)), Rerun(), Again(), Rerun(new=2), Rerun(slot=5),
    ],
    "over the rate": [
        *[
            command
            for slot in (0, 2, 4)
            for command in (
                Submit((Submission(slot=slot), Submission(slot=slot + 1))), Take(),
                Append((Row(outcome="completed"), Row(lease=1, outcome="completed"))),
            )
        ],
        Submit((Submission(slot=6, priority="low"), Submission(slot=7), Submission(slot=8, queue=1))),
        Take(), Wake(), Advance(4_000), Wake(), Take(), Advance(6_000),
        Submit((Submission(slot=9, priority="low"),)), Take(), Wake(), Take(), FINISH,
        Ask("pause", 6), Ask("resume", 6), Take(), Advance(20_000), Take(), Wake(), Take(),
    ],
    "a delayed job pays when it wakes": [
        Submit(tuple(Submission(slot=i, delay=3_000) for i in range(8))), Advance(4_000), Wake(), Take(),
        *[Append((Row(outcome="completed"), Row(lease=1, outcome="completed"))), Take()] * 4,
        Advance(10_000), Wake(), Take(),
    ],
    "what is paid for goes first": [
        Submit(tuple(Submission(slot=i) for i in range(4))), Take(), FINISH, FINISH, Wake(), Take(), Wake(),
        Submit(tuple(Submission(slot=i, priority="high") for i in range(4, 9))), FINISH, FINISH,
        Wake(), Take(),
    ],
    "gone": [ONE, Take(), FINISH, Advance(310_000), Append((Row(stale=True),))],
}  # fmt: skip
