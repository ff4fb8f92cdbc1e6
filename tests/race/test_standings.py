"""Standings: ties are shown, the sick come last, bytes are canonical."""

from __future__ import annotations

import json
import math

import pytest
from race import synthetic

from downslope.errors import BadInput
from downslope.race.decide import decide
from downslope.race.record import Record
from downslope.race.standings import Standings, standings


def finished(verdicts, **more):
    """A race in which `verdicts(job)` says the metric."""
    race = synthetic.plan(**more)

    def verdict(job):
        metric = verdicts(job)
        loss = 1 - metric if race["higher_is_better"] else metric
        return {"outcome": "ok" if math.isfinite(metric) else "diverged", "metric": metric, "loss": loss}

    return Record.of(synthetic.run(race, verdict))


def test_rows_are_complete_and_ordered():
    table = standings(Record.of(synthetic.journal(seed=3)))
    assert len(table.rows) == 41
    assert [row.stage for row in table.rows[:4]] == ["final"] * 4
    stages = [row.stage for row in table.rows]
    assert stages == sorted(stages, key=["final", "full", "1/2", "1/4"].index)
    assert all(row.difference <= 0 for row in table.rows[:4])
    assert sorted({row.trial for row in table.rows}) == list(range(41))


def test_two_names_of_one_recipe_are_tied_wherever_they_end():
    table = standings(Record.of(synthetic.journal(seed=3, names=2, rates=3)))
    for trial in {row.trial for row in table.rows}:
        first, second = (row for row in table.rows if row.trial == trial)
        assert first.rank == second.rank
        assert first.metric == second.metric
        assert first.tied
        assert second.tied


def test_equal_metrics_of_distinct_recipes_are_tied_with_the_winner():
    table = standings(finished(lambda job: 0.9 + 0.01 * (job.repeat or 0), rates=1))
    assert [row.rank for row in table.rows[:4]] == [1, 1, 1, 1]
    assert all(row.tied for row in table.rows[:4])
    assert (table.rows[1].low, table.rows[1].high) == (0.0, 0.0)


def test_a_clear_winner_is_not_tied():
    noise = [0.0, 0.004, -0.003, 0.002, 0.001]
    table = standings(
        finished(lambda job: 0.9 - 0.05 * job.trial + noise[(job.repeat or 0) * job.trial % 5], rates=1)
    )
    assert [row.rank for row in table.rows] == list(range(1, 10))
    assert not any(row.tied for row in table.rows)
    assert table.winner_name == "sgd 0.1"


def test_lower_is_better_where_the_task_says_so():
    table = standings(finished(lambda job: 0.1 + 0.05 * job.trial, rates=1, higher_is_better=False))
    assert table.rows[0].trial == 0
    assert table.rows[1].difference == pytest.approx(-0.05)


def test_one_seed_tells_nothing_apart():
    table = standings(finished(lambda job: 0.9 - 0.05 * job.trial, rates=1, seeds=1))
    assert [row.tied for row in table.rows[:4]] == [True] * 4
    assert table.rows[1].low is None


def test_a_finalist_that_diverges_once_is_last_of_the_finals():
    table = standings(
        finished(lambda job: math.nan if job[1:] == (2, 0) else 0.9 - 0.01 * job.trial, rates=1)
    )
    last = table.rows[3]
    assert (last.trial, last.status, last.metric, last.difference, last.tied) == (
        0,
        "diverged",
        None,
        None,
        False,
    )
    assert last.reason == "the loss is not finite (1 of 5 repeats)"
    assert len(last.metrics) == 5
    assert table.rows[0].trial == 1


def test_baseline_can_win_and_is_named():
    table = standings(finished(lambda job: 0.99 if job.trial == 8 else 0.9 - 0.01 * job.trial, rates=1))
    assert table.rows[0].origin == "baseline"


def test_every_finalist_broken_is_an_error():
    record = finished(lambda job: math.nan, rates=1)
    with pytest.raises(BadInput, match="No recipe could be trained"):
        standings(record)


def test_an_unfinished_race_has_no_standings():
    events = synthetic.journal()
    with pytest.raises(BadInput, match="not finished"):
        standings(Record.of(events[:100]))
    assert not decide(Record.of(events[:100])).finished


def test_bytes_are_strict_json_and_read_back(tmp_path):
    table = standings(Record.of(synthetic.journal(seed=5)))
    json.loads(table.json(), parse_constant=pytest.fail)
    (tmp_path / "standings.json").write_bytes(table.json())
    assert Standings.load(tmp_path) == table


@pytest.mark.parametrize(
    "text", [b"", b"{", b"{}", b"[]", b'{"schema": 2}', b'{"schema": 1, "rows": [{}]}', b"\xff"]
)
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "standings.json").write_bytes(text)
    with pytest.raises(BadInput, match=r"standings\.json"):
        Standings.load(tmp_path)


def test_prints_a_line_for_each_row():
    table = standings(Record.of(synthetic.journal(seed=5)))
    assert len(str(table).splitlines()) == 1 + len(table.rows)
