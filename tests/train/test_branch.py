"""A change of plan is a run of its own: nothing of the old one is lost, every number is as it was told."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from train import problems
from train.test_players import duel
from train.test_run import Pulled, pulled_at

import downslope as ds
from downslope.cli import run as command
from downslope.errors import BadInput
from downslope.journal import read
from downslope.report import report
from downslope.schedule.picture import draw
from downslope.train import Diverged, Training, order, steps_per_epoch
from downslope.train.branch import moved
from downslope.train.reader import Reader

PEAK, STEPS, WARMUP = 3e-3, 40, 4  # of problems.recipe()
AT = 16


def begin(out: Path, recipe: ds.Recipe | None = None, task: Any = f"{problems.__file__}:rich") -> Path:
    """A run that was stopped behind its checkpoint at step 16."""
    with pulled_at(AT + 2):
        ds.train(task, recipe or problems.recipe(), out=out, seed=1, save_every=8, valid_every=10, quiet=True)
    return out


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin(tmp_path_factory.mktemp("branch") / "old")


def changed(folder: Path, out: Path | None = None, *task: Any, **asked: Any) -> ds.Branch:
    return ds.branch(folder, out, *task, quiet=True, **asked)


def gone_on(folder: Path, out: Path, *task: Any, **asked: Any) -> ds.Run:
    changed(folder, out, *task, **asked)
    return ds.resume(out, *task, quiet=True)


def rates(run: ds.Run) -> dict[int, float]:
    return {event["step"]: event["lr"] for event in run.events if event["kind"] == "step"}


def last(out: Path, task: ds.Task | None = None) -> Training:
    path = max((out / "ckpt").iterdir())
    return Training.load(path, task or problems.rich())


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def old_rate(i: int) -> float:
    if i < WARMUP:
        return PEAK * (i + 1) / (WARMUP + 1)
    return PEAK * (1 + math.cos(math.pi * min(1, (i - WARMUP) / (STEPS - WARMUP)))) / 2


# --- what is kept -------------------------------------------------------------------------------------


def test_with_nothing_changed_it_ends_in_the_bits_of_the_run_itself(begun: Path, tmp_path: Path) -> None:
    before, old = content(begun), Path(shutil.copytree(begun, tmp_path / "old"))
    made = gone_on(begun, tmp_path / "new", then="keep", steps=STEPS)
    straight = ds.resume(old, quiet=True)
    assert last(tmp_path / "new").fields() == last(old).fields()
    assert (tmp_path / "new/result.json").read_bytes() == (old / "result.json").read_bytes()
    assert made.losses == {step: loss for step, loss in straight.losses.items() if step >= AT}
    assert content(begun) == before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_branch_computes_as_the_run_did(precision: str, tmp_path: Path) -> None:
    given = {"seed": 1, "save_every": 8, "quiet": True, "precision": precision}
    with pulled_at(AT + 2):
        ds.train(problems.rich(), problems.recipe(), out=tmp_path / "old", **given)
    gone_on(tmp_path / "old", tmp_path / "new", problems.rich(), then="keep")
    ds.resume(tmp_path / "old", problems.rich(), quiet=True)
    assert last(tmp_path / "new").fields() == last(tmp_path / "old").fields()
    assert json.loads((tmp_path / "new/run.json").read_text())["precision"] == precision


@pytest.mark.parametrize("steps", [24, 60])
def test_where_no_schedule_has_a_length_another_one_is_as_if_it_had_been_so_from_the_start(
    steps: int, tmp_path: Path
) -> None:
    def recipe(steps: int) -> ds.Recipe:
        return problems.recipe(steps=steps, lr=ds.inverse_sqrt(3e-3, every=5, warmup=3))

    begin(tmp_path / "old", recipe(STEPS))
    made = gone_on(tmp_path / "old", tmp_path / "new", steps=steps)
    straight = ds.train(
        problems.rich(), recipe(steps), out=tmp_path / "straight", seed=1, save_every=8, quiet=True
    )
    assert last(tmp_path / "new").fields() == last(tmp_path / "straight").fields()
    assert (made.valid, made.test, made.steps) == (straight.valid, straight.test, steps)


def test_the_new_recipe_says_every_number_from_the_first_update_on(begun: Path, tmp_path: Path) -> None:
    made = rates(gone_on(begun, tmp_path / "new", steps=60, rate=5e-3, then="rewarm"))
    rate = ds.Recipe.load(tmp_path / "new/recipe.toml").chain.lr
    assert isinstance(rate, ds.Schedule)
    assert rate.resolved
    assert [rate(i) for i in range(AT)] == pytest.approx([old_rate(i) for i in range(AT)], rel=1e-12)
    assert made == {i: rate(i) for i in range(AT, 60)}


def test_a_run_says_where_it_came_from_and_can_be_branched_again(begun: Path, tmp_path: Path) -> None:
    run = gone_on(begun, tmp_path / "new", steps=24, then="decay")
    (start,) = [event for event in read(tmp_path / "new/journal.jsonl") if event["kind"] == "start"]
    (saved,) = [e for e in read(begun / "journal.jsonl") if e["kind"] == "checkpoint" and e["step"] == AT]
    assert start["parent"] == json.loads((tmp_path / "new/run.json").read_text())["parent"]
    assert (start["parent"]["folder"], start["parent"]["step"], start["parent"]["sha"]) == (
        str(begun),
        AT,
        saved["sha"],
    )
    again = rates(gone_on(tmp_path / "new", tmp_path / "newer", steps=30, rate=1e-3, then="decay", at=16))
    assert again == pytest.approx({i: 1e-3 * (1 - (i - 16) / 14) for i in range(16, 30)}, rel=1e-12)
    assert run.steps == 24
    recipe = ds.Recipe.load(tmp_path / "new/recipe.toml")
    assert f"of {begun} from step {AT} on" in report(tmp_path / "new").read_text("utf-8")
    with pytest.raises(BadInput, match="holds another run"):
        ds.train(f"{problems.__file__}:rich", recipe, out=tmp_path / "new", seed=1, quiet=True)


def test_the_peak_that_a_new_rate_replaces_is_the_one_in_force(begun: Path, tmp_path: Path) -> None:
    gone_on(begun, tmp_path / "third", rate=1e-3)  # 3e-3 until then
    again = rates(gone_on(tmp_path / "third", tmp_path / "sixth", rate=5e-4, at=32))
    assert again == pytest.approx({i: old_rate(i) / 6 for i in range(32, 40)}, rel=1e-12)
    with pytest.raises(BadInput, match=r"to rise from 0\.001 to 0\.002"):
        changed(tmp_path / "third", rate=2e-3, at=32)


@pytest.mark.parametrize("whole", [0, 1])
def test_a_journal_torn_at_its_first_lines_still_begins_with_the_checkpoint(
    whole: int, begun: Path, tmp_path: Path
) -> None:
    changed(begun, tmp_path / "new", steps=24, then="decay")
    torn = Path(shutil.copytree(tmp_path / "new", tmp_path / "torn"))
    run = ds.resume(tmp_path / "new", quiet=True)
    lines = (tmp_path / "new/journal.jsonl").read_bytes().splitlines(keepends=True)
    (torn / "journal.jsonl").write_bytes(b"".join(lines[:whole]) + lines[whole][:20])
    assert rates(ds.resume(torn, quiet=True)) == rates(run)
    assert (torn / "result.json").read_bytes() == (tmp_path / "new/result.json").read_bytes()


def test_a_run_whose_plan_was_changed_by_hand_is_not_branched(begun: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(begun, tmp_path / "old"))
    (old / "run.json").write_text((old / "run.json").read_text().replace('"steps": 40', '"steps": 41'))
    with pytest.raises(BadInput, match="not what the run's journal says"):
        changed(old, tmp_path / "new", steps=60, then="keep")


def test_an_ordinary_run_is_written_as_ever(begun: Path) -> None:
    assert "parent" not in json.loads((begun / "run.json").read_text())


# --- the three ways on --------------------------------------------------------------------------------


def straight_down(share: float) -> float:
    return 1 - share


def as_cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


def as_root(share: float) -> float:
    return 1 - math.sqrt(share)


def kept(i: int) -> float:
    return old_rate(i) if i < STEPS else 0.0


def lowered(i: int) -> float:
    return old_rate(i) / 3


def rewarmed(i: int, steps: int = 60, peak: float = PEAK, warmup: int = 4) -> float:
    """4 is the old warmup's 10 % of the 44 updates that are left of 60."""
    now, behind = old_rate(AT), i - AT
    if behind < warmup:
        return now + (peak - now) * behind / warmup
    return peak * as_cosine((behind - warmup) / (steps - AT - warmup))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"steps": 60, "then": "keep"}, kept),
        ({"steps": 22, "then": "keep"}, kept),
        ({"rate": 1e-3}, lowered),
        ({"steps": 60, "then": "rewarm"}, rewarmed),
        ({"steps": 60, "rate": 9e-3, "then": "rewarm"}, lambda i: rewarmed(i, peak=9e-3)),
        ({"steps": 60, "then": "rewarm", "warmup": 7}, lambda i: rewarmed(i, warmup=7)),
        ({"steps": 60, "then": "rewarm", "warmup": "50 %"}, lambda i: rewarmed(i, warmup=22)),
        ({"steps": 60, "then": "rewarm", "warmup": 0}, lambda i: rewarmed(i, warmup=0)),
        ({"then": "rewarm", "warmup": 2}, lambda i: rewarmed(i, steps=40, warmup=2)),
        ({"then": "decay"}, lambda i: old_rate(AT) * straight_down((i - AT) / 24)),
        ({"steps": 20, "then": "decay"}, lambda i: old_rate(AT) * straight_down((i - AT) / 4)),
        (
            {"steps": 99, "then": "decay", "shape": "cosine"},
            lambda i: old_rate(AT) * as_cosine((i - AT) / 83),
        ),
        (
            {"steps": 50, "then": "decay", "shape": "sqrt", "rate": 1e-3},
            lambda i: 1e-3 * as_root((i - AT) / 34),
        ),
    ],
)
def test_every_rate_is_that_of_its_definition(
    asked: dict[str, Any], expected: Callable[[int], float], begun: Path, tmp_path: Path
) -> None:
    made = rates(gone_on(begun, tmp_path / "new", **asked))
    steps = asked.get("steps", STEPS)
    assert made == pytest.approx({i: expected(i) for i in range(AT, steps)}, rel=1e-12, abs=1e-18)


def stepped(out: Path, task: ds.Task, number: str, group: int = 0) -> list[float]:
    """What a number of a group is in every update of a branch."""
    state = Training.load(max((out / "ckpt").iterdir()), task)
    found = []
    while not state.done:
        found.append(state.optimizer.param_groups[group][number])
        state.advance(state.step + 1)
    return found


CYCLE = {
    "lr": ds.one_cycle(0.1, "100 %", base=0.01, end=0.0, rise="25 %", shape="linear"),
    "momentum": ds.one_cycle(0.85, "100 %", base=0.95, end=0.95, rise="25 %", shape="linear"),
}


def test_the_momentum_of_one_cycle_takes_the_same_way(tmp_path: Path) -> None:
    recipe = ds.Recipe(ds.chain(ds.momentum(**CYCLE)), steps=40, batch_size=16)
    begin(tmp_path / "old", recipe)
    now = {"lr": 0.1 * (1 - 6 / 30), "momentum": 0.85 + 0.1 * 6 / 30}
    changed(tmp_path / "old", tmp_path / "again", steps=56, then="rewarm")
    changed(tmp_path / "old", tmp_path / "down", steps=56, then="decay")
    for number, peak, end in (("lr", 0.1, 0.0), ("momentum", 0.85, 0.95)):
        up = [now[number] + (peak - now[number]) * i / 10 for i in range(10)]
        again = [*up, *(peak + (end - peak) * i / 30 for i in range(30))]
        assert stepped(tmp_path / "again", problems.rich(), number) == pytest.approx(again, rel=1e-12)
        down = [now[number] + (end - now[number]) * i / 40 for i in range(40)]
        assert stepped(tmp_path / "down", problems.rich(), number) == pytest.approx(down, rel=1e-12)


def test_parts_of_a_route_and_roles_keep_their_ratio_to_the_rate(tmp_path: Path) -> None:
    route = ds.route({"matrix": ds.momentum(lr=ds.linear(0.3, "100 %")), "rest": ds.adamw(lr=0.01)})
    recipe = ds.Recipe(route, steps=40, batch_size=16, roles={"norm": {"lr": 0.002, "weight_decay": 0.0}})
    begin(tmp_path / "old", recipe)
    changed(tmp_path / "old", tmp_path / "new", rate=0.005, steps=40)
    state = last(tmp_path / "new")
    found = {group.get("role"): place for place, group in enumerate(state.optimizer.param_groups)}
    assert {*found} == {"rest", "norm", "matrix"}
    by_role = {r: stepped(tmp_path / "new", problems.rich(), "lr", found[r]) for r in found}
    assert by_role["rest"] == pytest.approx([0.005] * 24)
    assert by_role["norm"] == pytest.approx([0.001] * 24)
    assert by_role["matrix"] == pytest.approx([0.15 * (1 - i / 40) for i in range(16, 40)])


def test_a_new_rate_is_the_top_of_a_decay_that_is_in_force(begun: Path, tmp_path: Path) -> None:
    changed(begun, tmp_path / "down", then="decay", steps=60)
    half = stepped(tmp_path / "down", problems.rich(), "lr")
    changed(tmp_path / "down", tmp_path / "half", rate=old_rate(AT) / 2)
    found = stepped(tmp_path / "half", problems.rich(), "lr")
    assert found == pytest.approx([rate / 2 for rate in half], rel=1e-12)


def test_the_rate_of_the_first_player_is_what_all_keep_their_ratio_to(tmp_path: Path) -> None:
    task = duel(every=3)
    begin(tmp_path / "old", task.recipe, task)
    made = changed(tmp_path / "old", tmp_path / "new", task, then="decay", rate=0.01)
    maker = 1e-2 * as_cosine((5 - 1) / (13 - 1)) * (0.01 / 0.05)
    assert made.courses["critic"].will(16) == pytest.approx(0.01, rel=1e-12)
    assert made.courses["maker"].will(5) == pytest.approx(maker, rel=1e-12)


def test_each_player_goes_on_by_its_own_updates(tmp_path: Path) -> None:
    task = duel(every=3)  # the critic's rate is 0.05, the maker moves in every third of 40 rounds
    begin(tmp_path / "old", task.recipe, task)
    changed(tmp_path / "old", tmp_path / "new", task, steps=61, then="decay")
    state = Training.load(max((tmp_path / "new/ckpt").iterdir()), task)
    found: dict[str, list[float]] = {"critic": [], "maker": []}

    def note(attempt: Any) -> None:
        for name, move in attempt.moves.items():
            found[name].append(move.lr)

    state.advance(on_step=note)
    present = 1e-2 * as_cosine((5 - 1) / (13 - 1))  # 5 of its 13 updates are behind, the first was a warmup
    assert found["critic"] == pytest.approx([0.05 * (1 - i / 45) for i in range(45)])
    assert found["maker"] == pytest.approx([present * (1 - i / 15) for i in range(15)])


def test_a_schedule_that_goes_by_validations_begins_where_they_have_led(tmp_path: Path) -> None:
    recipe = problems.recipe(lr=ds.plateau(1e-3, factor=0.5, patience=0, threshold=1.0))
    begin(
        tmp_path / "old", recipe
    )  # nothing is ever better by so much: a cut at each of 4 validations but one
    made = rates(gone_on(tmp_path / "old", tmp_path / "new", then="decay"))
    present = 1e-3 * 0.5**3
    assert made == pytest.approx({i: present * (1 - (i - AT) / 24) for i in range(AT, 40)})


def test_a_recipe_of_ones_own_may_change_any_number_of_the_same_rules(begun: Path, tmp_path: Path) -> None:
    other = problems.recipe(lr=ds.linear(1e-2, "100 %"), weight_decay=0.5)
    changed(begun, tmp_path / "new", recipe=other, then="rewarm", warmup=4, steps=40)
    rise = [old_rate(AT) + (1e-2 - old_rate(AT)) * i / 4 for i in range(4)]
    expected = [*rise, *(1e-2 * (1 - i / 20) for i in range(20))]
    assert stepped(tmp_path / "new", problems.rich(), "lr") == pytest.approx(expected, rel=1e-12)
    assert stepped(tmp_path / "new", problems.rich(), "weight_decay") == [0.5] * 24
    decay = ds.Recipe.load(tmp_path / "new/recipe.toml").chain.defaults["weight_decay"]
    assert isinstance(decay, ds.Schedule)
    assert [decay(AT - 1), decay(AT)] == [0.01, 0.5]


# --- another batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [70, 64, 5, 101])
@pytest.mark.parametrize(("old", "new"), [(16, 5), (16, 32), (7, 11), (10, 64), (1, 3), (3, 1)])
def test_no_sample_comes_twice_and_as_many_sit_out_as_is_said(samples: int, old: int, new: int) -> None:
    for batches in range(3 * steps_per_epoch(samples, old)):
        epoch, position = divmod(batches, steps_per_epoch(samples, old))
        seen = set(order(samples, 3, epoch)[: position * old].tolist())
        there, left_out = moved(batches, samples, old, new)
        task = problems.task(train=(torch.zeros(samples, 6), torch.zeros(samples)))
        reader = Reader(task, 3, new, torch.device("cpu"))
        coming = [
            number for number in range(there, there + samples + 1) if number // reader.per_epoch == epoch
        ]
        ahead = [index for number in coming for index in reader.indices(number).tolist()]
        assert len(seen) == position * old or samples < old
        assert not seen & {*ahead}
        if coming:
            beyond = samples % new if samples >= new else 0
            assert samples - len(seen) - len(ahead) == left_out + beyond
            assert left_out < new


def test_a_new_batch_takes_what_is_left_of_the_data_if_the_length_is_in_data(tmp_path: Path) -> None:
    recipe = problems.recipe(lr=1e-3, steps="10 epochs")  # of 4 batches of 16 of 70 samples
    begin(tmp_path / "old", recipe)
    made = changed(tmp_path / "old", tmp_path / "new", batch_size=10)
    assert made.steps == (40, 16 + 6 * 7)  # 4 passes are over; 6 are left, of 7 batches
    state = last(tmp_path / "new")
    assert (state.batches, state.epoch, state.position, state.step) == (28, 4, 0, 16)
    assert state.optimizer.steps == 16
    assert ds.resume(tmp_path / "new", quiet=True).steps == 58
    state = last(tmp_path / "new")
    assert (state.epoch, state.position) == (10, 0)


def test_a_length_in_updates_stays_whatever_the_batch(tmp_path: Path) -> None:
    begin(tmp_path / "old", problems.recipe(lr=1e-3))
    made = changed(tmp_path / "old", batch_size=10)
    assert made.steps == (40, 40)
    assert made.recipe.batch_size == 10


# --- strategies ---------------------------------------------------------------------------------------


def test_what_strategies_do_at_a_date_they_do_at_that_date(tmp_path: Path) -> None:
    beyond = [ds.strategies.average(kind="swa", start="50 %", every="1 epoch"), ds.strategies.spikes(keep=4)]
    begin(tmp_path / "old", problems.recipe(strategies=beyond))
    changed(tmp_path / "old", tmp_path / "new", steps=60, then="decay")
    average = ds.Recipe.load(tmp_path / "new/recipe.toml").strategies["average"]
    assert (average.data()["start"], average.data()["every"]) == (20, 4)
    state = last(tmp_path / "new")
    assert state.rescue.state() == {}  # what was kept to go back to follows the old plan
    assert last(tmp_path / "old").rescue.state() != {}
    assert ds.resume(tmp_path / "new", quiet=True).steps == 60


@pytest.mark.parametrize(
    ("strategy", "asked", "sentence"),
    [
        (ds.strategies.switch(at="50 %"), {"steps": 60}, r"\[switch\] fits its second chain"),
        (ds.strategies.restart(at="30 %"), {"rate": 1e-4, "steps": 40}, r"\[restart\] deals its starts out"),
        (ds.strategies.average(kind="tail"), {"steps": 60}, "last part of the whole length"),
        (ds.strategies.growth(times=2.0), {"batch_size": 8}, r"\[growth\] counts batches"),
        (
            ds.strategies.growth(times=ds.linear(1.0, "100 %", end=2.0)),
            {"steps": 60},
            r"\[growth\] counts batches",
        ),
    ],
)
def test_a_strategy_that_would_be_another_is_refused(
    strategy: Any, asked: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    begin(tmp_path / "old", problems.recipe(lr=1e-3, strategies=[strategy]))
    with pytest.raises(BadInput, match=sentence):
        changed(tmp_path / "old", tmp_path / "new", **asked)
    assert not (tmp_path / "new").exists()
    assert ds.resume(tmp_path / "old", quiet=True).steps == 40


# --- what it is for -----------------------------------------------------------------------------------


def test_a_run_that_diverged_goes_on_from_before_at_a_lower_rate(tmp_path: Path) -> None:
    wild = ds.constant(1e-3).then(ds.constant(1e30), at=12)
    recipe = ds.Recipe(ds.chain(ds.sgd(lr=wild)), steps=200, batch_size=16)
    with pytest.raises(Diverged):
        ds.train(problems.rich(), recipe, out=tmp_path / "old", seed=1, save_every=4, quiet=True)
    assert read(tmp_path / "old/journal.jsonl")[-1]["kind"] == "failed"
    asked = {"at": 8, "rate": 1e-4, "then": "decay", "steps": 28}
    run = gone_on(tmp_path / "old", tmp_path / "new", problems.rich(), **asked)
    assert run.steps == 28
    assert list(rates(run).values()) == pytest.approx([1e-4 * (1 - i / 20) for i in range(20)])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(begun: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(begun, tmp_path / "old"))
    with (old / "ckpt/step-000000016/model.safetensors").open("r+b") as file:
        file.write(b"?")
    made = changed(old, steps=60, then="keep")
    assert made.step == 8
    assert "step-000000016 is damaged" in str(made)
    with pytest.raises(BadInput, match="model.safetensors"):
        changed(old, steps=60, then="keep", at=16)


def test_a_branch_whose_only_checkpoint_is_damaged_does_not_begin_from_nothing(
    begun: Path, tmp_path: Path
) -> None:
    changed(begun, tmp_path / "new", steps=60, then="keep")
    with (tmp_path / "new/ckpt/step-000000016/model.safetensors").open("r+b") as file:
        file.write(b"?")
    with pytest.raises(BadInput, match=r"model\.safetensors.* has no other checkpoint: make it again"):
        ds.resume(tmp_path / "new", quiet=True)


# --- what is told -------------------------------------------------------------------------------------


def test_it_is_printed_and_drawn_before_it_runs(
    begun: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = ds.branch(begun, tmp_path / "new", steps=60, then="keep")
    said = capfd.readouterr().err
    assert said == f"{made}\n"
    assert "steps: 40 → 60" in said
    assert 'adamw.lr.steps: "100 %" → 40' in said
    assert "The rate is 0 from update 40 on: the last 20 updates" in said
    assert "decay" in said
    assert made.picture() in said
    assert "▲" in said
    assert made.data()["diff"] == [list(one) for one in made.old.diff(made.recipe)]
    curve = made.data()["rates"][""]
    assert curve["new"] == [(i, pytest.approx(kept(i), rel=1e-12)) for i in range(60)]
    assert (curve["old"][-1][0], curve["at"]) == (39, 16)
    assert json.dumps(made.data())
    assert changed(begun, steps=60, then="rewarm").said == ()


def test_the_picture_shows_both_courses_and_where_they_part() -> None:
    both = draw(lambda i: 1.0 if i < 4 else 0.0, 8, 40, 5, True, behind=(lambda i: 1.0, 12), at=4)
    assert both.splitlines() == [
        "  1 +************ ......................",
        "    |            *",
        "0.5 +            *",
        "    |            *",
        "  0 +            ***********",
        "    +-----------^-----+----------------+",
        "     0                6       12 updates",
    ]


def test_a_dry_run_writes_nothing(begun: Path) -> None:
    before, beside = content(begun), sorted(begun.parent.iterdir())
    changed(begun, steps=60, then="decay")
    assert (content(begun), sorted(begun.parent.iterdir())) == (before, beside)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"steps": 60}, "a schedule of the run was made for 40 updates, and there will be 60: say what"),
        ({"steps": 30}, "rewarm"),
        ({"rate": 1e-2}, "is to rise from 0.003 to 0.01: say how"),
        ({"steps": 16, "then": "keep"}, "begins at step 16 of 40: it must be above that, got 16"),
        ({"steps": "50 %", "then": "keep"}, "20 epochs"),
        ({"steps": "many", "then": "keep"}, "steps must be a whole number"),
        ({"rate": 0.0}, "above 0, got 0.0"),
        ({"rate": math.nan}, "above 0, got nan"),
        ({"rate": "fast"}, "above 0, got 'fast'"),
        ({"batch_size": 71}, "all 70 samples of the train part, got 71"),
        ({"batch_size": 0}, "got 0"),
        ({"at": 12}, "no checkpoint at step 12 to go on from. There are: 8, 16."),
        ({"then": "decays"}, "Did you mean 'decay'"),
        ({"then": "keep", "warmup": 3}, "a warmup is the way up of rewarm"),
        ({"then": "rewarm", "warmup": 24}, "does not fit into the 24 that are left"),
        ({"then": "rewarm", "shape": "sqrt"}, "shape is the way down of decay"),
        ({"then": "decay", "shape": "exponential"}, "linear, cosine, sqrt"),
        (
            {"recipe": ds.Recipe(ds.sgd(lr=0.1), 40, 16), "then": "rewarm"},
            "keep rules and roles, or train the recipe from its start",
        ),
        (
            {"recipe": problems.recipe(lr=ds.linear(1e-3, 40))},
            "keep goes on with the schedule that was begun",
        ),
        ({"recipe": problems.recipe(lr=ds.linear(1e-3, 40)), "then": "decay"}, "the recipe has another"),
        (
            {"recipe": problems.recipe(strategies=[ds.strategies.stop()])},
            "goes on with the strategies that the run was begun with",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(
    asked: dict[str, Any], sentence: str, begun: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput) as caught:
        changed(begun, tmp_path / "new", **asked)
    assert sentence in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_what_is_over_is_over(tmp_path: Path) -> None:
    ds.train(problems.rich(), problems.recipe(), out=tmp_path / "old", seed=1, save_every=8, quiet=True)
    task = problems.rich()
    with pytest.raises(BadInput, match="above that, got 40"):
        changed(tmp_path / "old", None, task, then="keep")
    with pytest.raises(BadInput, match="above that, got 40"):
        changed(tmp_path / "old", None, task, steps=40, then="rewarm")
    assert changed(tmp_path / "old", None, task, steps=60, then="rewarm").step == 40
    assert "nothing by it. rewarm would" in str(changed(tmp_path / "old", None, task, steps=60, then="keep"))


def test_a_schedule_made_of_others_is_not_begun_again_by_a_guess(begun: Path, tmp_path: Path) -> None:
    changed(begun, tmp_path / "new", steps=60, then="rewarm")
    with pytest.raises(BadInput, match="made of others already"):
        changed(tmp_path / "new", steps=80, then="rewarm")
    assert changed(tmp_path / "new", steps=80, then="rewarm", recipe=problems.recipe()).steps == (60, 80)


def test_a_run_that_stopped_early_is_over_from_there(tmp_path: Path) -> None:
    stopping = ds.strategies.stop(patience=1, min_delta=100.0)
    recipe = problems.recipe(lr=1e-3, strategies=[stopping])
    run = ds.train(problems.rich(), recipe, out=tmp_path / "old", seed=1, save_every=2, quiet=True)
    assert run.steps < 40
    with pytest.raises(BadInput, match=r"\[stop\] has ended the run"):
        changed(tmp_path / "old", None, problems.rich(), steps=60)


def test_a_folder_that_holds_anything_else_is_left_alone(begun: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    other = begin(tmp_path / "other")
    for out, sentence in ((tmp_path / "mine", "notes.txt"), (other, "another run"), (begun, "another run")):
        before = content(out)
        with pytest.raises(BadInput, match=sentence):
            changed(begun, out, steps=60, then="keep")
        assert {**content(out), "run.lock": b""} == {**before, "run.lock": b""}


# --- killed -------------------------------------------------------------------------------------------


@contextmanager
def killed_at(place: int | None, part: float = 0.0) -> Iterator[list[str]]:
    """Everything ends at one of the operations that change files, cleaning up too; of a write, a part is
    done yet.
    """
    seen: list[str] = []

    def ending(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*given: Any, **named: Any) -> Any:
            if name == "open" and not given[1] & os.O_CREAT:
                return real(*given, **named)
            seen.append(name)
            if place is None or len(seen) - 1 < place:
                return real(*given, **named)
            if len(seen) - 1 == place and name == "write" and part:
                real(given[0], given[1][: int(len(given[1]) * part)])
            raise Pulled

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate"):
            patch.setattr(os, name, ending(name, getattr(os, name)))
        if place is None:
            yield seen
        else:
            with pytest.raises(Pulled):
                yield seen


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.faults)])
def test_killed_at_any_operation_it_is_no_run_or_a_whole_one_and_goes_on(
    every: int, begun: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"steps": 18, "then": "decay"}
    with killed_at(None) as seen:
        changed(begun, tmp_path / "straight", **asked)
        made = len(seen)
        ds.resume(tmp_path / "straight", quiet=True)
    expected = last(tmp_path / "straight").fields()
    early = [
        (at, part) for at in range(made + 12) for part in ((0.0, 0.5) if seen[at] == "write" else (0.0,))
    ]
    assert made >= 20
    assert set(seen[:made]) >= {"write", "fsync", "rename", "mkdir"}
    for at, part in early[::every]:
        out = tmp_path / f"at-{at}-{part}"
        with killed_at(at, part):
            changed(begun, out, **asked)
            ds.resume(out, quiet=True)
        if not (out / "run.json").exists():
            with pytest.raises(BadInput, match="there is no run"):
                ds.resume(out, quiet=True)
        changed(begun, out, **asked)
        ds.resume(out, quiet=True)
        assert last(out).fields() == expected, (at, part, seen[at])
        shutil.rmtree(out)


def test_the_same_call_goes_on_and_another_is_refused(begun: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(begun, tmp_path / "old"))
    changed(old, tmp_path / "new", steps=60, then="decay")
    ds.resume(old, quiet=True)  # by now the old run has other checkpoints
    again = changed(old, tmp_path / "new", steps=60, then="decay")
    assert (again.step, again.steps, "has begun already" in str(again)) == (16, (40, 60), True)
    with pytest.raises(BadInput, match="holds another run"):
        changed(old, tmp_path / "new", steps=61, then="decay")


# --- the command --------------------------------------------------------------------------------------


def test_the_command_prints_draws_and_goes_on(
    begun: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = ["resume", str(begun), "--steps", "30", "--then", "decay", "--shape", "cosine"]
    assert command([*plan, "--dry-run"]) == 0
    drawn = capfd.readouterr().out
    assert "to step 30: decay" in drawn
    assert "▲" in drawn
    assert command([*plan, "--dry-run", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["step"], told["steps"], told["out"]) == (16, [40, 30], None)
    assert command([*plan, "--out", str(tmp_path / "new"), "--json"]) == 0
    said = capfd.readouterr()
    assert "to step 30" in said.err
    assert "▲" in said.err
    answer = json.loads(said.out)
    assert (answer["steps"], answer["branch"]["rates"]) == (30, told["rates"])
    rate = answer["branch"]["rates"][""]["new"][20]
    assert rate == [20, pytest.approx(old_rate(AT) * as_cosine(4 / 14), rel=1e-12)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--steps", "60"], "--steps makes another run of it: give that a folder by --out"),
        (["--batch-size", "8"], "--batch-size makes another run of it"),
        (["--then", "keep"], "--then makes another run of it"),
        (["--dry-run", "--steps", "60"], "say what it does then, keep"),
        (["--dry-run", "--steps", "60 epoch s"], "steps must be a whole number"),
        (["--dry-run", "--recipe", "nowhere.toml"], "nowhere.toml"),
        (["--dry-run", "--rate", "-1"], "above 0, got -1"),
    ],
)
def test_the_command_refuses_in_one_line(
    options: list[str], sentence: str, begun: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = content(begun)
    assert command(["resume", str(begun), *options]) == 2
    said = capfd.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert content(begun) == before
