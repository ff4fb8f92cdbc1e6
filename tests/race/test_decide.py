"""The deciders: no order of arrival, no number of workers, no restart changes what they decide."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from race import synthetic

from downslope.race.decide import decide
from downslope.race.record import Job, Record, Verdict
from downslope.race.standings import standings

seeds = st.integers(0, 10_000)


@settings(deadline=None)
@given(seeds, seeds, st.integers(1, 40))
def test_any_order_of_arrival_gives_the_same_bytes(seed, order, workers):
    race = synthetic.plan()
    verdict = synthetic.truth(seed, race)
    alone = synthetic.run(race, verdict)
    crowd = synthetic.run(race, verdict, random.Random(order), workers)
    assert decide(Record.of(crowd)) == decide(Record.of(alone))
    assert standings(Record.of(crowd)).json() == standings(Record.of(alone)).json()


@settings(deadline=None)
@given(seeds, st.floats(0, 1))
def test_a_journal_cut_anywhere_goes_on_to_the_same_end(seed, where):
    race = synthetic.plan(rates=3)
    verdict = synthetic.truth(seed, race)
    events = synthetic.run(race, verdict)
    record = Record.of(events[: 2 + int(where * (len(events) - 2))])
    while jobs := decide(record).jobs:
        for event in synthetic.result(jobs[-1], race, verdict(jobs[-1])):
            record.take(event)
    assert standings(record).json() == standings(Record.of(events)).json()


@settings(deadline=None)
@given(seeds)
def test_decisions_are_never_taken_back(seed):
    race = synthetic.plan(rates=3)
    record, before = Record(), None
    for event in synthetic.run(race, synthetic.truth(seed, race), random.Random(seed), 4):
        record.take(event)
        if record.plan is None:
            continue
        decision = decide(record)
        if before is not None:
            assert decision.cuts[: len(before.cuts)] == before.cuts
            assert before.finalists in (None, decision.finalists)
        before = decision


def test_a_rung_is_cut_only_when_it_is_complete():
    race = synthetic.plan()
    record = Record.of([race])
    jobs = decide(record).jobs
    assert [job.trial for job in jobs] == list(range(40))
    for job in jobs[:-1]:
        record.take({"kind": "judged", **job.data(), "outcome": "ok", "metric": 0.9, "loss": 0.1})
        assert decide(record).cuts == ()
    record.take({"kind": "judged", **jobs[-1].data(), "outcome": "ok", "metric": 0.95, "loss": 0.1})
    assert decide(record).cuts[0].order == (39, *range(39))


def judged(record: Record, rung: int, metrics: dict[int, float], **more: object) -> None:
    for trial, metric in metrics.items():
        event = {
            "kind": "judged",
            "trial": trial,
            "rung": rung,
            "outcome": "ok",
            "loss": 0.1,
            "metric": metric,
        }
        record.take({**event, **more})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["loss", "metric"])
@pytest.mark.parametrize("higher", [True, False])
def test_what_is_not_finite_never_wins(bad, field, higher):
    event = {"kind": "judged", "outcome": "ok", "metric": 0.9, "loss": 0.1, field: bad}
    sick, sound = Verdict.of(event), Verdict("ok", metric=0.0 if higher else 1e9, loss=1e9)
    assert sick.outcome == "diverged"
    assert sound.key(higher) < sick.key(higher)
    assert sound.judged(higher) < sick.judged(higher)


def test_a_rung_is_judged_by_the_loss_then_the_metric_then_the_number():
    race = synthetic.plan(rates=1)
    record = Record.of([race])
    judged(record, 0, dict.fromkeys(range(8), 0.9))
    assert decide(record).cuts[0].order == tuple(range(8))
    record = Record.of([race])
    judged(record, 0, {5: 0.8}, loss=0.05)
    judged(record, 0, {6: 0.95})
    judged(record, 0, dict.fromkeys(range(8), 0.9))
    assert decide(record).cuts[0].order == (5, 6, 0, 1, 2, 3, 4, 7)


def test_finals_are_judged_by_the_metric_then_the_loss():
    fine, good = Verdict("ok", metric=0.9, loss=0.1), Verdict("ok", metric=0.91, loss=0.3)
    assert fine.judged(True) < good.judged(True)
    assert good.key(True) < fine.key(True)
    assert fine.key(False) < good.key(False)


def test_a_second_verdict_on_one_job_changes_nothing():
    record = Record.of([synthetic.plan()])
    judged(record, 0, {0: 0.9})
    judged(record, 0, {0: 0.1})
    assert record.verdicts[Job(0, None, 0)].metric == 0.9


def test_the_finals_hold_three_rules_not_three_rates_of_one():
    """Trials 0 to 7 are the eight rules at a low rate, 8 to 15 at a middle one, 16 to 23 at a high one."""
    race = synthetic.plan(rates=3)
    record = Record.of([race])
    best = {6: 0.99, 14: 0.98, 22: 0.97, 0: 0.9, 1: 0.8, 2: 0.7}
    for rung in range(3):
        judged(record, rung, {**dict.fromkeys(range(24), 0.1), **best})
    decision = decide(record)
    assert [cut.kept for cut in decision.cuts[:2]] == [(0, 1, 2, 3, 4, 6, 14, 22), (0, 1, 6)]
    assert decision.finalists == (6, 0, 1, 24)


def test_neighbours_fill_the_finals_where_rules_are_too_few():
    record = Record.of([synthetic.plan(rates=5, rules=["adamw"])])
    for rung in range(3):
        judged(record, rung, {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 0.5})
    assert decide(record).finalists == (4, 3, 2, 5)


def test_nobody_sound_leaves_the_baseline_alone():
    record = Record.of([synthetic.plan(rates=1, seeds=2)])
    judged(record, 0, dict.fromkeys(range(8), math.nan))
    decision = decide(record)
    assert decision.finalists == (8,)
    assert decision.jobs == (Job(None, 0, 8), Job(None, 1, 8))


def test_diverged_and_failed_trials_are_cut_even_if_there_is_room():
    record = Record.of([synthetic.plan(rates=1)])
    judged(record, 0, {0: 0.9, 1: 0.8})
    judged(record, 0, {2: math.nan, 3: 0.99}, outcome="diverged")
    for trial in range(4, 8):
        record.take({"kind": "failed", "trial": trial, "rung": 0, "reason": "ValueError: no"})
    cut = decide(record).cuts[0]
    assert cut.kept == (0, 1)
    assert cut.order == (0, 1, 2, 3, 4, 5, 6, 7)
