"""The pure parts of the load tests: statistics, CPU lines, report cells and tables, the command line."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loadtests import __main__ as command
from loadtests import (
    cancel,
    crowd,
    fanout,
    idle,
    jobs,
    join,
    latency,
    many,
    measure,
    pacing,
    prose,
    provider,
    reconnect,
    report,
    retained,
    speaker,
    steps,
    streamjobs_peer,
    tokens,
    viewers,
)
from loadtests.marks import Marks, Pen
from loadtests.peers.peer import Peer
from loadtests.processes import RunError
from loadtests.token_systems import Transcript, _transcript

from streamjobs.testing.scenario import Conversation, choose, parse_scenario

MACHINE = measure.Machine("A processor", 2, 4.0, "Linux 6", "3.11")


class TestStatistics:
    def test_summary_is_median_and_ends(self) -> None:
        """Without the ends a reader cannot tell noise from a difference."""
        assert measure.summarize([3.0, 1.0, 10.0]) == measure.Summary(3.0, 1.0, 10.0)
        assert measure.summarize([]) is None

    def test_ratio_is_taken_round_by_round(self) -> None:
        """A round in which the machine was slow for both must not change the ratio."""
        ours, theirs = {1: 100.0, 2: 10.0, 3: 120.0}, {1: 50.0, 2: 5.0, 3: 40.0}
        assert measure.median_ratio(ours, theirs) == 2.0

    def test_ratio_needs_a_common_round(self) -> None:
        """A failed round must not be compared with another one."""
        assert measure.median_ratio({1: 100.0}, {2: 50.0}) is None
        assert measure.median_ratio({1: 100.0, 2: 30.0}, {2: 10.0}) == 3.0

    def test_spread_is_relative_to_the_median(self) -> None:
        """The report's noise figure."""
        assert measure.spread([1.0, 1.1, 0.9]) == pytest.approx(0.2)
        assert measure.spread([1.0]) == 0.0

    @pytest.mark.parametrize(("share", "expected"), [(0.5, 50.0), (0.99, 99.0), (1.0, 100.0), (0.001, 1.0)])
    def test_percentile_is_a_value_that_was_seen(self, share: float, expected: float) -> None:
        """Latency is quoted by it."""
        assert measure.percentile([float(n) for n in range(100, 0, -1)], share) == expected
        assert measure.percentile([], share) is None


class TestProcessTimes:
    def test_names_may_hold_anything(self) -> None:
        """A process called `a) R (b` must not shift the columns."""
        line = "42 (a) R (b) S 7 42 42 0 -1 4194560 1 2 3 4 100 20 3 4 20 0 1 0 55 1 2"
        assert measure.parse_stat(line) == measure.ProcessTimes(parent=7, ticks=127)

    def test_a_tree_is_all_descendants_and_nobody_else(self) -> None:
        """taskiq's worker is a grandchild; without it its CPU would be missing from the table."""
        parents = {1: 0, 10: 1, 11: 10, 12: 11, 20: 1, 21: 20}
        assert sorted(measure.tree_of(10, parents)) == [10, 11, 12]


class TestCells:
    @pytest.mark.parametrize(
        ("value", "text"),
        [(12345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (None, "-")],
    )
    def test_three_figures(self, value: float | None, text: str) -> None:
        """More figures than the noise allows would mislead."""
        assert report.three_figures(value) == text

    def test_one_value_has_no_ends(self) -> None:
        """A single round must not look like an interval."""
        assert report.summary([5.0]) == "5.00"
        assert report.summary([5.0, 4.0, 7.0]) == "5.00 (4.00-7.00)"
        assert report.summary([]) == report.NOTHING

    def test_a_table_refuses_rows_of_another_width(self) -> None:
        """A cell too few silently shifts numbers under the wrong header."""
        with pytest.raises(ValueError, match="2 cells under 3 headers"):
            report.table(report.Table(("a", "b", "c"), [("1", "2")]))

    def test_a_reason_cannot_break_the_table(self) -> None:
        """The output of a child that failed is quoted in a cell."""
        text = report.table(report.Table(("a", "b"), [("x", "no | pipe\nor line")]))
        assert text.splitlines()[2] == "| x | no \\| pipe or line |"


def make_report(*sections: report.Section) -> report.Report:
    return report.Report(
        "2020-01-01 00:00:00Z", "python -m loadtests", MACHINE, "7.0", [0.1, 0.11], [0.5, 0.4, 0.3], sections
    )


def test_the_page_names_machine_settings_and_noise() -> None:
    """Numbers without them cannot be compared with anything."""
    page = report.markdown(make_report(report.Section("One", "Intro.", [], notes=["a note"])))
    for part in ("A processor, 2 cores", "Redis 7.0", "appendonly no", "(2 times)", "## One", "- a note"):
        assert part in page


class TestJobsSection:
    options = command.parse(["jobs", "--repeat", "2"])
    ours = jobs.OURS.name

    def section(self, runs: list[jobs.Run], reasons: dict[str, str]) -> report.Section:
        peers: list[Peer] = [jobs.OURS, jobs.PEERS[-1]]
        return jobs.section(self.options, peers, runs, reasons, reasons)

    def run(self, peer: str, number: int, rate: float) -> jobs.Run:
        drain = jobs.Drain(jobs=1000, seconds=1000 / rate, worker_cpu=0.1, redis_cpu=None)
        return jobs.Run(peer, number, drain, enqueue_rate=5000.0, kept_bytes=900.0)

    def test_rows_hold_rates_ratios_and_cpu(self) -> None:
        """The comparison itself."""
        runs = [self.run(self.ours, 1, 2000), self.run("saq", 1, 1000), self.run(self.ours, 2, 2200)]
        rows = self.section(runs, {}).tables[0].rows
        assert rows[0][:4] == [self.ours, "2,100 (2,000-2,200)", "-", "100 (100-100)"]
        assert rows[1][:4] == ["saq", "1,000", "2.00 x", "100"]

    def test_what_is_not_measured_is_a_dash(self) -> None:
        """Where /proc is missing, no CPU figure may be made up."""
        row = self.section([self.run("saq", 1, 1000)], {}).tables[0].rows[1]
        assert row[4:6] == ["-", "10 %, -"] or row[4] == "-"

    def test_a_peer_that_did_not_run_keeps_its_row_and_reason(self) -> None:
        """A dropped row reads as if the peer had never been considered."""
        section = self.section([self.run(self.ours, 1, 2000)], {"saq": "not run: no saq here"})
        assert section.tables[0].rows[1][:2] == ["saq", "not run: no saq here"]
        assert "saq: not run: no saq here" in section.notes
        assert report.table(section.tables[0]) and report.table(section.tables[1])


class TestTokens:
    def test_tokens_are_counted_in_characters_of_whole_tokens(self) -> None:
        """Coalesced deltas hold many tokens; counting entries would miss most."""
        assert _transcript([("token ", 1000), ("token token ", 3000)]) == Transcript(3, 2, 1000)

    def test_half_a_token_fails_the_run(self) -> None:
        """A lost piece must not pass as a fast run."""
        with pytest.raises(tokens.RunError):
            _transcript([("tok", 1)])

    def test_arrivals_are_those_of_text_deltas(self) -> None:
        """A message carries all events of a commit; others must not count as tokens."""
        message = (
            b'1-5 turn.started {"ts":1}\n2-5 text.delta {"ts":1500,"text":"a b"}\n3-5 text.delta {"ts":2000}'
        )
        assert list(latency.arrivals(message)) == [1.5, 2.0]

    def test_the_scenario_is_one_that_the_provider_takes(self) -> None:
        """A model that no turn fits would be answered by an echo, and every run would fail."""
        script = parse_scenario(json.dumps(provider.scenario(50.0, 3)))
        for model, text in (("long", ["token "] * 3), ("short", ["token "] * provider.WARMUP_TOKENS)):
            said = Conversation(model=model, key="k", turn=0, round=0, user="go", tools=[])
            assert choose(script, said).turn.text == text

    def test_rows_compare_cpu_for_a_token(self) -> None:
        """The README quotes this ratio."""
        options = command.parse(["tokens", "--repeat", "1"])
        one = tokens.Run(
            "streamjobs", "paced", 1, 1.5, Transcript(1000, 500, 0), 2.0, 2.5,
            {"worker": 0.02, "redis": 0.01, "provider": None}, 100.0, {"p50": 0.004, "p99": 0.02},
        )  # fmt: skip
        other = replace(one, system=tokens.SYSTEMS[1].name, cpu=one.cpu | {"worker": 0.2}, delay={})
        section = tokens.section(options, [one, other], {})
        first, second = section.tables[0].rows[:2]
        assert first[2:6] == ["500", "0.50", "20.0", "-"]
        assert second[4:6] == ["200", "10.00 x"]
        assert section.tables[1].rows[0][4] == "4.00, 20.0"
        assert section.tables[1].rows[1][4] == "-"


class TestMarks:
    def test_only_whole_lines_and_first_marks_count(self, tmp_path: Path) -> None:
        """A worker writes while the file is read; a workflow that is replayed begins twice."""
        file = tmp_path / "marks"
        marks = Marks(file)
        assert marks.read().ended == {}
        pen = Pen(str(file))
        pen.begin(7)
        pen.end(7)
        with file.open("ab") as half:
            half.write(b"s 8 17")
            half.flush()
            assert list(marks.read().begun) == [7]
            half.write(b".5\ns 7 99.0\n")
        assert marks.read().begun[8] == 17.5
        assert marks.begun[7] != 99.0

    async def test_a_stream_whose_client_leaves_is_marked_by_its_number(self, tmp_path: Path) -> None:
        """Without it nobody knows when a cancel has reached the provider."""
        file = tmp_path / "marks"
        messages = iter(
            [{"type": "http.request", "body": b'{"content": "stream 12"}'}, {"type": "http.disconnect"}]
        )

        async def receive() -> Any:
            return next(messages)

        async def app(_scope: Any, receive: Any, _send: Any) -> None:
            await receive()
            assert Marks(file).read().ended == {}
            await receive()

        await provider.Witness(app, Pen(str(file)))({"type": "http"}, receive, receive)
        assert list(Marks(file).read().ended) == [12]


class TestPacing:
    async def test_a_slow_answer_delays_nobody(self) -> None:
        """Waiting for one answer before the next submission would hide every queue that builds up."""
        everyone = asyncio.Event()
        seen: list[int] = []

        async def submit(number: int) -> str:
            seen.append(number)
            if len(seen) == 3:
                everyone.set()
            await everyone.wait()
            return f"id-{number}"

        submitted = await pacing.submit_all(pacing.Plan(5, 3, 1000.0), submit)
        assert submitted.ids == ["id-5", "id-6", "id-7"]
        assert submitted.at == sorted(submitted.at)

    async def test_without_a_rate_every_number_is_submitted_once(self) -> None:
        """A workflow that is missing, or there twice, would make the clock run to the timeout."""
        seen: list[int] = []

        async def submit(number: int) -> str:
            seen.append(number)
            await asyncio.sleep(0)
            return str(number)

        submitted = await pacing.submit_all(pacing.Plan(0, 50, 0.0), submit)
        assert sorted(seen) == list(range(50))
        assert submitted.ids == [str(n) for n in range(50)]

    def test_a_plan_survives_the_command_line(self) -> None:
        """The submitting child gets it as arguments."""
        plan = pacing.Plan(3, 4, 0.5)
        assert pacing.Plan.parse(plan.arguments()) == plan


class TestStepsSection:
    options = command.parse(["steps", "--repeat", "1"])

    def run(self, system: str, rate: float, cpu: float | None) -> steps.Run:
        drain = steps.Drain(100, 1000 / rate, cpu, cpu)
        half = steps.HalfLoad(50, rate / 20, {"p50": 0.002, "p99": 0.009}, {"p50": 0.01, "p99": 0.05})
        return steps.Run(system, 1, drain, half)

    def section(self, runs: list[steps.Run], reasons: dict[str, str]) -> report.Section:
        return steps.section(self.options, steps.SYSTEMS[:2], runs, reasons, {})

    def test_rows_compare_rates_and_cpu(self) -> None:
        """The comparison itself: ten steps a workflow, worker and store together."""
        runs = [self.run("streamjobs", 5000.0, 0.05), self.run("DBOS", 500.0, 1.0)]
        drained, half = self.section(runs, {"DBOS": "not run: only for this test"}).tables[:2]
        assert drained.rows[0] == ["streamjobs", "5,000", "-", "50.0", "50.0", "10,000", "-"]
        assert drained.rows[1] == ["DBOS", "500", "10.00 x", "1,000", "1,000", "500", "20.00 x"]
        assert half.rows[0] == ["streamjobs", "250", "2.00", "9.00", "10.0", "50.0"]

    def test_a_system_that_did_not_run_keeps_its_rows_and_reason(self) -> None:
        """A machine without Postgres must still get a report, and the report must say what is missing."""
        reason = "not run: no `initdb` here"
        section = self.section([self.run("streamjobs", 5000.0, None)], {"DBOS": reason})
        assert [table.rows[1][1] for table in section.tables[:2]] == [reason, reason]
        assert section.tables[0].rows[0][3:6] == ["-", "-", "-"]
        assert all(report.table(table) for table in section.tables)
        assert section.failures == []

    def test_drains_add_up(self) -> None:
        """A fast system drains again and again, until its clock has run long enough to be read."""
        total = steps.Drain(10, 1.0, 0.5, None) + steps.Drain(30, 1.0, 0.25, 0.1)
        assert total == steps.Drain(40, 2.0, 0.75, None)
        assert total.rate == 200.0


class TestCancel:
    REQUESTED = ("job.cancel_requested", {"ts": 1000})
    DELTA = ("text.delta", {"ts": 1001})

    def cancelled(self, deltas: int) -> tuple[str, dict[str, Any]]:
        return "job.cancelled", {"ts": 1004, "deltas_after": deltas}

    def test_a_log_without_later_deltas_is_silent_at_once(self) -> None:
        """The figure that the proof of a cancel is about."""
        found = cancel.ending([self.DELTA, self.REQUESTED, self.cancelled(0)], 1.0025)
        assert found == cancel.Ending(0.0, pytest.approx(0.0025), pytest.approx(0.004), 0)

    def test_a_later_delta_counts_until_the_end(self) -> None:
        """When a delta was committed is not in the log; only the job's end bounds it."""
        found = cancel.ending([self.REQUESTED, self.DELTA, self.cancelled(1)], 1.002)
        assert (found.silent, found.deltas_after) == (pytest.approx(0.004), 1)

    @pytest.mark.parametrize("log", [[REQUESTED, DELTA], [REQUESTED, DELTA, ("job.completed", {"ts": 2})]])
    def test_a_job_that_was_not_cancelled_fails_the_run(self, log: list[Any]) -> None:
        """An early end by itself must not pass as a fast cancel."""
        with pytest.raises(RunError, match="ends with"):
            cancel.ending(log, 1.0)

    def test_a_proof_that_does_not_fit_the_log_fails_the_run(self) -> None:
        """`deltas_after` is what users rely on."""
        with pytest.raises(RunError, match="1 deltas follow"):
            cancel.ending([self.REQUESTED, self.DELTA, self.cancelled(0)], 1.0)

    def test_each_mode_has_its_three_times(self) -> None:
        """A mode that failed keeps its row, with the reason."""
        options = command.parse(["cancel"])
        endings = [cancel.Ending(0.0, 0.003, 0.004, 0), cancel.Ending(0.008, 0.005, 0.008, 2)]
        found = cancel.section(options, [cancel.Run("one by one", 1, endings)], {"all at once": "failed: no"})
        rows = found.tables[0].rows
        assert [row[2:5] for row in rows[:3]] == [
            ["0.00", "8.00", "8.00"],
            ["3.00", "5.00", "5.00"],
            ["4.00", "8.00", "8.00"],
        ]
        assert rows[0][5] == "2.00, 2"
        assert rows[3][:2] == ["all at once", "failed: no"]
        assert report.table(found.tables[0])


class TestJoin:
    options = command.parse(["join"])

    def run(self, way: str, viewers: int, seconds: float) -> join.Run:
        return join.Run(way, 1, viewers, [seconds / 2] * (viewers - 1) + [seconds], [0.02], 1000, 40, 0.5)

    def test_ways_are_compared_by_viewer(self) -> None:
        """The slow way is given fewer viewers: comparing the totals would flatter it."""
        runs = [self.run(join.OURS.name, 100, 0.2), self.run(join.WAYS[2].name, 10, 2.0)]
        memory = [{"deltas": 10, "text": 2000, "held": 2200}, {"deltas": "ended", "text": 2000, "held": 2400}]
        found = join.section(self.options, runs, {"streamjobs, plain": "failed: no"}, [
            *memory[:1], memory[1] | {"plain": 30_000},
        ])  # fmt: skip
        ours, plain, others = found.tables[0].rows
        assert ours[1:10] == ["20.0", "20.0", "100", "100", "100", "2.00", "-", "1,000", "0.50 x"]
        assert plain[:2] == ["streamjobs, plain", "failed: no"]
        assert others[7] == "100.00 x"
        assert found.tables[1].rows[0] == ["10", "2,000", "2,200", "1.10 x"]
        assert found.tables[1].rows[2][3] == "15.00 x"
        assert all(report.table(table) for table in found.tables)

    def test_a_run_without_a_job_keeps_its_rows(self) -> None:
        """A report without the table reads as if nobody had asked."""
        found = join.section(
            self.options, [], dict.fromkeys((way.name for way in join.WAYS), "failed: no"), []
        )
        assert [row[1] for row in found.tables[0].rows] == ["failed: no"] * 3
        assert len(found.failures) == 3
        assert all(report.table(table) for table in found.tables)


class TestRetained:
    options = command.parse(["retained"])

    def test_what_is_kept_stands_beside_the_text(self) -> None:
        """The ratio is what operators size their Redis by."""
        kept = retained.Kept(10, 20_000, 10_000, 30_000, {"job:<id>": 500.4})
        folding = retained.Folding(1000, 0.5, 0.01)
        plain, curve = retained.Plain(9000, 4000), [{"jobs": 10, "unsealed": 90_000, "sealed": 30_000}]
        found = retained.section(self.options, retained.Run(kept, plain, [folding], [folding], curve), "")
        held, aim = found.tables[0].rows[:2]
        assert held[1:] == ["3,000", "1.50 x", "3.00 x"]
        assert aim[1] == "2,100"
        assert found.tables[1].rows == [["job:<id>", "500"]]
        assert found.tables[2].rows[0][1:] == ["1,000", "2,000", "10.0"]
        assert found.tables[3].rows == [["10", "0.1", "0.0", "3,000"]]
        assert all(report.table(table) for table in found.tables)

    def test_a_failure_is_the_section(self) -> None:
        """A scenario that broke must say so, and fail the run."""
        found = retained.section(self.options, None, "failed: no")
        assert (found.notes, found.failures) == (["failed: no"], ["retained: failed: no"])

    def test_keys_are_counted_by_kind(self) -> None:
        """A table with a row for each job would say nothing."""
        assert streamjobs_peer.kind_of("sj:{0}:job:j0-abc:sealed") == "job:<id>:sealed"
        assert streamjobs_peer.kind_of("sj:{0}:feed") == "feed"


class TestProse:
    def test_a_seed_is_a_text(self) -> None:
        """Rounds that say something else would compress to something else."""
        assert prose.tokens(3, 50) == prose.tokens(3, 50) != prose.tokens(4, 50)
        assert all(word.endswith(" ") for word in prose.tokens(3, 50))


class TestViewers:
    async def test_a_viewer_that_missed_the_end_fails_the_run(self) -> None:
        """A gateway that stops early must not pass as a fast one."""
        viewer = viewers.Viewer(b"", 10)
        viewer.data_received(b"HTTP/1.1 200 OK\r\n\r\n2\r\n:\n\r\n1a\r\nid: 7-5\nevent: a\ndata: 1\n\n\r\n")
        assert viewer.done.done()
        viewer.require("7-5")
        with pytest.raises(RuntimeError, match="did not get 8-5"):
            viewer.require("8-5")


class TestCommandLine:
    def test_quick_shrinks_every_scenario(self) -> None:
        """CI runs --quick; a scenario that forgets it would take minutes there."""
        quick, full = command.parse(["--quick"]), command.parse([])
        assert quick.repeat == 1
        assert quick.jobs < full.jobs
        assert quick.streams * quick.seconds < full.streams * full.seconds
        assert quick.workflows < full.workflows
        assert quick.join_events * quick.join_viewers < full.join_events * full.join_viewers / 10
        assert quick.retained_jobs < full.retained_jobs

    def test_unknown_scenarios_are_refused(self) -> None:
        """A typo must not run everything."""
        with pytest.raises(SystemExit):
            command.parse(["job"])


class TestCrowd:
    def _fed(self, *pieces: bytes) -> crowd.Crowd:
        plan = crowd.Plan(port=1, paths=["/"], viewers=1, tokens=3, timeout=1.0)

        async def feed() -> crowd.Crowd:
            of = crowd.Crowd(plan)
            viewer = crowd.Watchful(of, b"")
            for piece in pieces:
                viewer.data_received(piece)
            of.viewers = [viewer]
            return of

        return asyncio.run(feed())

    def _event(self, *numbers: int) -> bytes:
        return b'id: 1-1\nevent: text.delta\ndata: {"ts":1795586124295,"text":"%b"}\n\n' % (
            speaker.text_of(range(numbers[0], numbers[-1] + 1)).encode()
        )

    def test_tokens_are_counted_wherever_the_bytes_are_cut(self) -> None:
        """Reads end anywhere; a count that depends on it would make every figure wrong."""
        whole = self._event(0) + self._event(1, 2)
        for at in range(1, len(whole)):
            seen = self._fed(whole[:at], whole[at:]).seen(0.0)
            assert (seen.tokens, seen.short, seen.holes) == (3, 0, 0)
            assert seen.delays["p50"] > 0

    def test_the_text_that_an_end_repeats_is_not_counted(self) -> None:
        """A chat's last events hold its whole text: every viewer would seem to have got it twice."""
        seen = self._fed(self._event(0, 2), self._event(0, 2)).seen(0.0)
        assert (seen.tokens, seen.short, seen.holes) == (3, 0, 0)

    @pytest.mark.parametrize("numbers", [(0, 2), (0, 0), (1, 2)])
    def test_a_missed_or_repeated_token_is_seen(self, numbers: tuple[int, int]) -> None:
        """A system that loses tokens would win."""
        seen = self._fed(*(self._event(number) for number in numbers)).seen(0.0)
        assert seen.holes > 0
        assert seen.short == 1


class TestSpeaker:
    def test_every_token_is_said_once_and_in_time(self) -> None:
        """The rate that the report names must be the rate that was offered."""
        said: list[int] = []

        async def say(start: int, end: int) -> None:
            said.extend(range(start, end))

        asyncio.run(speaker.speak(say, 50, 1000.0, 0.005))
        assert said == list(range(50))


class TestGrowth:
    def test_quick_runs_are_small(self) -> None:
        """CI would take an hour."""
        full, quick = command.parse([]), command.parse(["--quick"])
        assert len(fanout.sizes(quick)) == len(many.sizes(quick)) == len(idle.sizes(quick)) == 1
        assert len(fanout.sizes(full)) == len(many.sizes(full)) == 4
        assert quick.back_viewers * 10 < full.back_viewers

    def test_a_system_without_numbers_keeps_its_row(self) -> None:
        """A peer that is not installed would vanish from the page without a word."""
        options = command.parse(["--quick", "--repeat", "1"])
        failed = {f"{system.name}, 50 x 20/s": "not here" for system in fanout.SYSTEMS}
        section = fanout.section(options, [], failed)
        assert [row[3] for row in section.tables[0].rows] == ["not here"] * len(fanout.SYSTEMS)
        assert section.failures == []
        assert reconnect.section(options, [], {"abort": "failed: no"}).failures == [
            "reconnect, abort: failed: no"
        ]

    def test_charts_are_shown_from_beside_the_page(self) -> None:
        """The page would show broken pictures."""
        chart = report.Chart("many", "Many", "jobs", "ms", [report.Line("p99", [(1, 2.0), (2, 3.0)])])
        section = report.Section("Many", "", [], charts=[chart])
        page = report.markdown(report.Report("now", "", MACHINE, "7", [1.0], [0.0], [section]), "page")
        assert f"![Many]({report.chart_file('page', chart)})" in page
