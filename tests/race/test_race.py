"""Whole races on a little task, with real processes: the same standings however they run, ties, and bad
recipes last.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import pytest

import downslope as ds
from downslope.errors import BadInput, UserCodeError
from downslope.race import Standings, race
from downslope.tasks import task as find

ADAMW = ds.Recipe(ds.chain(ds.adamw(lr=0.03)), steps=40, batch_size=16)


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(plain, count):
    plain.race(f"workers-{count}", workers=count)
    assert plain.bytes(f"workers-{count}") == plain.bytes("reference")


def test_a_finished_race_is_read_not_run_again(plain):
    before = plain.events("reference")
    assert plain.race("reference") == Standings.load(plain.folder("reference"))
    assert plain.events("reference") == before


def test_the_folder_holds_what_it_should(plain):
    names = {path.name for path in plain.folder("reference").iterdir()}
    assert {"journal.jsonl", "race.json", "standings.json", "times.json", "winner.toml"} <= names
    assert "trials" not in names
    table = Standings.load(plain.folder("reference"))
    assert ds.Recipe.load(plain.folder("reference") / "winner.toml") == table.winner
    assert (
        plain.events("reference", "end")[0]["standings"]
        == hashlib.sha256(plain.bytes("reference")).hexdigest()
    )
    assert "seconds" not in plain.bytes("reference").decode()
    assert json.loads((plain.folder("reference") / "times.json").read_text())["computing"] > 0


def test_the_baseline_is_in_the_finals_on_fresh_seeds(plain):
    finals = plain.events("reference", "final")
    baseline = plain.events("reference", "race")[0]["baseline"]
    assert sorted(event["seed"] for event in finals if event["trial"] == baseline) == [1, 2]
    assert all(event["test_metric"] is not None for event in finals)
    assert not any("test_metric" in event for event in plain.events("reference", "judged"))


def test_the_test_part_is_reported_and_never_used(plain, field):
    """With every label of the test part wrong, nothing changes but the test numbers."""
    other = field()
    other.file.write_text(
        other.file.read_text().replace(
            "    parts = dict", "    test[1].add_(1).remainder_(3)\n    parts = dict"
        )
    )
    other.race("reference")
    reported = ("test_metric", "test_loss")
    here, there = (
        [
            {k: v for k, v in asdict(row).items() if k not in reported}
            for row in Standings.load(one.folder("reference")).rows
        ]
        for one in (plain, other)
    )
    assert here == there
    assert other.bytes("reference") != plain.bytes("reference")


def test_no_cut_falls_into_a_warmup(plain):
    plan = plain.events("reference", "race")[0]
    warmup = {trial["trial"]: trial["warmup"] for trial in plan["trials"]}
    for event in plain.events("reference", "segment"):
        if event["run"] == "branch":
            assert event["start"] >= 2 * warmup[event["trial"]]


def test_runs_are_suspended_and_go_on_never_restarted(plain):
    """The updates of every trunk are trained once each, over all its rungs."""
    steps: dict[int, list[int]] = {}
    for event in plain.events("reference", "segment"):
        if event["run"] == "trunk":
            steps.setdefault(event["trial"], []).extend(range(event["start"], event["end"]))
    assert any(event["rung"] == 1 for event in plain.events("reference", "segment"))
    assert all(found == list(range(len(found))) for found in steps.values())


def test_one_recipe_under_two_names_is_tied_and_bad_recipes_are_last(plain):
    bad = {
        "rate 100 times too high": ADAMW.with_(lr=30.0),
        "rate 100 times too low": ADAMW.with_(lr=3e-5),
        "rate absurd": ADAMW.with_(lr=1e30),
        "decay 10": ADAMW.with_(weight_decay=100.0),
        "sgd too low": ds.Recipe(ds.chain(ds.sgd(lr=1e-5)), steps=40, batch_size=16),
    }
    good = {"one": ADAMW, "two": ADAMW, "three": ADAMW.with_(lr=0.02), "four": ADAMW.with_(lr=0.05)}
    table = plain.race("bad", recipes={**bad, **good}, rules=[], budget="12x")
    rows = {row.name: row for row in table.rows}
    assert rows["one"].rank == rows["two"].rank
    assert rows["one"].tied
    assert rows["two"].tied
    assert rows["one"].metrics == rows["two"].metrics
    assert {row.name for row in table.rows if row.origin == "given"} == {*bad, *good}
    assert {row.name for row in table.rows[-5:]} == set(bad)


def test_a_recipe_that_diverges_is_out_and_never_wins(plain):
    table = plain.race("nan", recipes={"absurd": ADAMW.with_(lr=1e38)}, rules=["adamw"], budget="6x")
    assert table.rows[-1].name == "absurd"
    assert table.rows[-1].status == "diverged" or table.rows[-1].metric < 0.7


def test_a_budget_in_time_is_measured_once_and_journalled(plain):
    table = plain.race("time", budget="20s")
    paces = plain.events("time", "pace")
    assert len(paces) == 1
    assert plain.race("time", budget="20s") == table
    assert len(plain.events("time", "pace")) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": "5x"}, "budget"),
        ({"seeds": 3}, "seeds"),
        ({"seed": 9}, "seed"),
        ({"rules": ["sgd"]}, "another race"),
    ],
)
def test_another_race_in_the_same_folder_is_refused(plain, change, said):
    before = plain.bytes("reference")
    with pytest.raises(BadInput, match=said):
        plain.race("reference", **change)
    assert plain.bytes("reference") == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": "lots"}, "A budget is"),
        ({"budget": "0.1x"}, "give"),
        ({"seeds": 0}, "seeds"),
        ({"workers": 0}, "workers"),
        ({"workers": True}, "workers"),
        ({"seed": -1}, "seed"),
        ({"rules": ["adamv"]}, "Did you mean 'adam'"),
        ({"rules": []}, "nothing to race"),
        ({"recipes": {"": ADAMW}}, "name"),
        ({"recipes": {"a\nb": ADAMW}}, "name"),
        ({"recipes": {"sgd 0.1": ADAMW}}, "Two recipes are called"),
        ({"recipes": {"x": "nowhere.toml"}}, "nowhere.toml"),
        ({"recipes": {"x": ds.Recipe(ADAMW.chain, 40, 16, roles={"bias": {"lr": 0.1}})}}, "role"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(plain, change, said):
    with pytest.raises(BadInput, match=said):
        plain.race("refused", **change)
    assert not plain.folder("refused").exists()


def test_a_task_that_lives_here_is_refused_with_a_hint(plain):
    with pytest.raises(BadInput, match=r"file\.py:function"):
        race(replace(find(plain.address), entry=None))


def test_a_folder_that_cannot_be_written_is_one_sentence(plain):
    plain.folder("file").write_text("")
    with pytest.raises(BadInput, match="cannot"):
        plain.race("file/below")


def test_the_folder_of_a_training_is_refused_and_left_alone(plain):
    ds.train(find(plain.address), ADAMW, out=plain.folder("training"))
    before = plain.events("training")
    with pytest.raises(BadInput, match="something else"):
        plain.race("training")
    assert plain.events("training") == before


def test_a_task_that_raises_is_the_users_fault_and_is_told_before_anything_is_planned(field):
    broken = field()
    broken.file.write_text(broken.file.read_text().replace("nn.Linear(5, 3)", "nn.Linear(4, 3)"))
    with pytest.raises(UserCodeError, match="shapes cannot be multiplied") as caught:
        broken.race("broken")
    assert "little.py" in str(caught.value.__cause__)
    assert not broken.events("broken")


def test_what_we_refuse_inside_the_users_loss_stays_bad_input_with_their_line(field):
    refused = field()
    wrong = "return ds.smoothed_cross_entropy(model(batch[0]), batch[1], smoothing=2)"
    text = refused.file.read_text()
    assert text.count("return cross_entropy(model, batch)") == 1
    refused.file.write_text(text.replace("return cross_entropy(model, batch)", wrong))
    with pytest.raises(BadInput, match=r"^little\.py:\d+: .*smoothing"):
        refused.race("refused")
    assert not refused.events("refused")
