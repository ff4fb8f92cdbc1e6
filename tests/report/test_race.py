"""What a race's page draws is what its journal says."""

from pathlib import Path
from typing import Any

import pytest
from report.made_up import STEPS, Race

from downslope.journal import read
from downslope.report.curves import SMOOTH, trainings
from downslope.report.events import Standings, parse_json
from downslope.report.lanes import lanes
from downslope.report.log import Log, read_log
from downslope.report.race import race_page
from downslope.report.rates import rates

Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    folder = tmp_path_factory.mktemp("race")
    Race(folder)
    return read(folder / "journal.jsonl")


@pytest.fixture(scope="module")
def log(events: Events) -> Log:
    return read_log(events, "journal")


def of(events: Events, kind: str, **fields: Any) -> Events:
    return [
        e for e in events if e["kind"] == kind and all(e[name] == value for name, value in fields.items())
    ]


def test_a_trunk_is_all_its_segments_one_after_another(events: Events, log: Log) -> None:
    segments = of(events, "segment", trial=19, run="trunk")
    assert len(segments) == 3
    steps, seconds, losses = log.curve(19, "trunk")
    assert steps == [step for segment in segments for step in segment["curve"]["step"]]
    assert seconds == [second for segment in segments for second in segment["curve"]["seconds"]]
    assert losses == [loss for segment in segments for loss in segment["curve"]["loss"]]


def test_a_piece_that_was_done_twice_is_drawn_once(events: Events, log: Log) -> None:
    again = [*events, *of(events, "segment", trial=19)]
    assert read_log(again, "journal").curve(19, "trunk") == log.curve(19, "trunk")


def test_training_loss_is_the_mean_around_each_step(log: Log) -> None:
    steps, _, losses = log.curve(19, "trunk")
    track = next(s for s in trainings(log) if s.name == log.name(19)).tracks["train"]
    for step, value in zip(track.steps, track.values, strict=True):
        near = [loss for at, loss in zip(steps, losses, strict=True) if abs(at - step) <= SMOOTH * STEPS / 2]
        assert value == pytest.approx(sum(near) / len(near))


def test_dots_are_what_was_judged(events: Events, log: Log) -> None:
    dots = next(s for s in trainings(log) if s.name == f"{log.name(19)}, judged")
    judged = of(events, "judged", trial=19)
    assert dots.dots
    assert dots.tracks["valid"].values == tuple(e["loss"] for e in judged)
    assert dots.tracks["metric"].values == tuple(e["metric"] for e in judged)
    assert dots.tracks["metric"].steps == tuple(e["step"] for e in judged)
    assert dots.tracks["metric"].seconds == tuple(e["seconds"] for e in judged)


def test_one_training_of_each_rule_is_strong_and_a_final_where_there_is_one(log: Log) -> None:
    strong = [s for s in trainings(log) if not s.faint and not s.dots]
    assert len({s.hue for s in strong}) == len(strong) == 8
    names = {log.name(trial) for trial in log.finals}
    assert {s.name.split(",")[0] for s in strong if "final 1" in s.name} <= names
    assert sum("final" in s.name for s in strong) == len({log.hue(trial) for trial in log.finals})


def test_a_facet_is_the_first_judgement_of_the_grid(events: Events, log: Log) -> None:
    drawn = rates(log)
    assert drawn
    for facet in drawn.facets:
        first = {
            candidate.lr: of(events, "judged", trial=candidate.trial, rung=0)[0]["loss"]
            for candidate in log.plan.trials
            if candidate.rule == facet.rule and candidate.origin == "grid"
        }
        finite = {lr: loss for lr, loss in first.items() if loss == loss}
        assert len(facet.points) == len(first)
        assert float(facet.best) == pytest.approx(min(finite, key=finite.__getitem__))
        heights = sorted(finite, key=lambda lr: -finite[lr])
        places = {float(p.tip.split("learning rate ")[1].split(":")[0]): p.y for p in facet.points}
        assert [places[lr] for lr in heights] == sorted(places[lr] for lr in heights)
    assert next(f for f in drawn.facets if f.rule == "adamw").points[0].x > 0
    diverged = [p for f in drawn.facets for p in f.points if "diverged" in p.tip]
    assert [p.y for p in diverged] == [0.0]


def test_a_lane_ends_where_the_candidate_was_left_behind(events: Events, log: Log) -> None:
    drawn = lanes(log)
    assert drawn
    assert [(gate.label, gate.runners) for gate in drawn.gates] == [
        ("25 %", "24 ran"),
        ("50 %", "8 ran"),
        ("100 %", "4 ran"),
    ]
    ends = [trial.end for trial in drawn.trials]
    assert (ends.count(0.25), ends.count(0.5), ends.count(1.0)) == (
        16,
        3,
        5,
    )  # the baseline has a final whatever it did
    for trial in drawn.trials:
        number = next(c.trial for c in log.plan.trials if c.names[0] == trial.name)
        last = of(events, "judged", trial=number)[-1]
        assert trial.loss == last["loss"] or trial.loss != trial.loss
        assert trial.steps == max(e["step"] for e in events if e.get("trial") == number and "step" in e)
    assert [t.outcome for t in drawn.trials if t.fate == "failed"] == ["sgd lost its way"]
    assert {t.outcome for t in drawn.trials if t.fate == "cut"} == {
        "out at 25 %",
        "out at 50 %",
        "out at 100 %",
    }


def test_differences_on_each_seed_are_paired(tmp_path: Path) -> None:
    Race(tmp_path)
    log = read_log(read(tmp_path / "journal.jsonl"), "journal")
    log.standings = parse_json((tmp_path / "standings.json").read_bytes(), Standings, "standings")
    page = race_page(log, "again")
    assert page.standings
    winner, *others = page.standings.rows
    assert (winner.verdict, winner.pairs) == ("winner", ())
    for row in others:
        assert len(row.pairs) == 5
        assert row.difference == pytest.approx(sum(row.pairs) / 5)
        assert page.standings.axis.low < min(row.pairs)


def test_lower_is_better_turns_the_words_but_not_the_picture(events: Events) -> None:
    plan = {**events[0], "metric": "loss", "higher_is_better": False}
    page = race_page(read_log([plan, *events[1:]], "journal"), "again")
    assert page.curves
    assert {panel.quantity for panel in page.curves.panels} == {"train", "valid"}
    assert not page.metric.percent
    assert page.metric.better(0.1, 0.2)


def test_of_two_variants_at_one_rate_the_better_is_drawn(events: Events) -> None:
    first, second = (of(events, "judged", trial=trial, rung=0)[0]["loss"] for trial in (0, 1))
    twins = [{**trial, "lr": 0.1} if trial["trial"] < 2 else trial for trial in events[0]["trials"]]
    for order in (twins, [twins[1], twins[0], *twins[2:]]):
        drawn = rates(read_log([{**events[0], "trials": order}, *events[1:]], "journal"))
        assert drawn
        sgd = next(facet for facet in drawn.facets if facet.rule == "sgd")
        points = [point for point in sgd.points if "learning rate 0.1:" in point.tip]
        assert len(points) == 1
        assert points[0].y == pytest.approx(1 - drawn.y.place(min(first, second)))
