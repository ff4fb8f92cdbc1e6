"""One job in this process: the last branch is the recipe itself, and suspending a trunk changes nothing."""

from __future__ import annotations

import json

import pytest
import torch

import downslope as ds
from downslope.race.assignment import assignment
from downslope.race.planning import Request, planned
from downslope.race.record import Job, Record
from downslope.race.work import Bench, Work
from downslope.tasks import task
from downslope.train import Training


@pytest.fixture
def bench(tmp_path, plain):
    torch.set_num_threads(1)
    return Bench(task(plain.address), tmp_path / "trials")


@pytest.fixture
def record(bench):
    rapid = ds.Recipe(
        ds.chain(ds.momentum(lr=ds.cosine(0.1, steps="100 %", warmup=3))), steps=40, batch_size=16
    )
    request = Request(bench.task, "4x", 2, 0, {"mine": rapid}, ["adamw", "lion"])
    return Record.of([{"kind": "race", **planned(request, None)}])


def do(bench, record, job, until=None):
    """Do a job, journalling what it says, up to `until` messages."""
    said = []
    for message in Work(bench, json.loads(json.dumps(assignment(record, job))), lambda: None).messages():
        message.pop("over", None)
        record.take({**message, **job.data()})
        said.append(message)
        if len(said) == until:
            break
    return said


def full(bench, record, trial, seed=0):
    """The trial's recipe trained as it stands, in one go."""
    state = Training(bench.task, ds.Recipe.parse(record.trials[trial].recipe), seed)
    state.advance()
    return state


def test_the_last_rung_judges_the_full_recipe_bit_for_bit(bench, record):
    """Rung by rung on a suspended trunk, then cooled: the same as the recipe with its `wsd` in one go."""
    trial = next(trial.trial for trial in record.trials if trial.rule == "adamw" and trial.origin == "grid")
    assert len(record.rungs) > 1
    for rung in range(len(record.rungs)):
        *_, verdict = do(bench, record, Job(rung, None, trial))
    assert verdict["step"] == record.trials[trial].steps
    there = full(bench, record, trial).evaluate("valid")
    assert (verdict["loss"], verdict["metric"]) == there


def test_a_recipe_of_the_users_is_cooled_from_its_own_peak_and_repeated_as_it_is(bench, record):
    mine = record.trials[0]
    assert (mine.names, mine.lr, mine.warmup, mine.cooldown) == (("mine",), 0.1, 3, 8)
    rates = [m["curve"]["lr"] for m in do(bench, record, Job(0, None, 0)) if m["kind"] == "segment"]
    assert max(map(max, rates)) == 0.1
    assert rates[-1][0] == 0.1
    *_, verdict = do(bench, record, Job(None, 1, 0))
    state = full(bench, record, 0, seed=verdict["seed"])
    assert (verdict["loss"], verdict["metric"]) == state.evaluate("valid")
    assert (verdict["test_loss"], verdict["test_metric"]) == state.evaluate("test")


@pytest.mark.parametrize("until", range(1, 6))
@pytest.mark.parametrize("job", [Job(0, None, 1), Job(None, 0, 1)])
def test_trap_55_a_job_cut_behind_any_message_goes_on_to_the_same_verdict(bench, record, job, until):
    whole = do(bench, Record.of([{"kind": "race", **record.plan}]), job)
    do(bench, record, job, until)
    rest = do(bench, record, job)
    assert {**rest[-1], "seconds": 0} == {**whole[-1], "seconds": 0}
    said = [m for m in whole if m["kind"] == "segment"]
    again = [m for m in rest if m["kind"] == "segment"]
    assert len(again) <= max(1, len(said) - until)


def test_judging_leaves_the_trunk_as_it_was(bench, record):
    """The checkpoint from which the branch was cut is the trunk that the next rung goes on with."""
    job = Job(0, None, 1)
    do(bench, record, job)
    held = record.newest[1, None, "trunk"]
    state = Training.load(bench.trials / "trial-001" / held["checkpoint"], bench.task, sha=held["sha"])
    assert state.step == held["end"]
    assert state.optimizer.param_groups[0]["lr"] == record.trials[1].lr
    assert assignment(record, Job(1, None, 1))["start"]["checkpoint"] == held["checkpoint"]


def test_curves_are_sampled_and_true(bench, record):
    segments = [m for m in do(bench, record, Job(None, 0, 1)) if m["kind"] == "segment"]
    steps = [step for m in segments for step in m["curve"]["step"]]
    assert steps == list(range(40))
    seconds = [second for m in segments for second in m["curve"]["seconds"]]
    assert seconds == sorted(seconds)
    state = Training(bench.task, ds.Recipe.parse(record.trials[1].recipe), 1)
    losses = []
    state.advance(None, lambda attempt: losses.append(float(attempt.loss)))
    assert losses == [loss for m in segments for loss in m["curve"]["loss"]]


def test_a_rate_that_reacts_and_a_strategy_are_judged_to_the_end_as_they_are(bench, tmp_path):
    """In the search at its peak, cooled, as everybody; in the finals by its own validations."""
    rate = ds.plateau(0.1, factor=0.3, patience=1, threshold=0.05)
    strategies = [ds.strategies.average(decay=0.9), ds.strategies.micro(items=7)]
    own = ds.Recipe(ds.chain(ds.momentum(lr=rate)), 40, 16, strategies=strategies, observe=3)
    record = Record.of(
        [{"kind": "race", **planned(Request(bench.task, "4x", 2, 0, {"mine": own}, ["sgd"]), None)}]
    )
    (trial,) = [trial.trial for trial in record.trials if trial.origin == "given"]
    *_, searched = do(bench, record, Job(len(record.rungs) - 1, None, trial))
    assert (searched["outcome"], searched["step"]) == ("ok", 40)
    *_, final = do(bench, record, Job(None, 0, trial))
    there = full(bench, record, trial, seed=1)
    assert len(set(there.optimizer.seen)) == 13
    assert there.optimizer.param_groups[0]["lr"] < 0.1, "it must react to tell"
    assert (final["loss"], final["metric"]) == there.evaluate("valid")
