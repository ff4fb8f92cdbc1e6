"""Several players: each moves its own part by its own loss and optimizer, and the run is one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train import problems

import downslope as ds
from downslope.errors import BadInput
from downslope.journal import read
from downslope.tasks import Player
from downslope.train import Diverged, Training, order, steps_per_epoch, verify_resume


class Duel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.maker = nn.Linear(6, 6)


def tells(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0]
    return model.critic(model.maker(x)).mean() - model.critic(x).mean() + model.critic(x).square().mean()


def fools(model: nn.Module, batch: Any) -> Tensor:
    made = model.maker(batch[0])
    return (made - batch[0]).square().mean() - model.critic(made).mean()


def recipe(**changes: Any) -> ds.Recipe:
    rate = ds.cosine(1e-2, steps="100 %", warmup="10 %")
    players = {"critic": ds.chain(ds.momentum(lr=0.05))}
    return ds.Recipe(ds.chain(ds.adam(lr=rate)), 40, 16, players=players).with_(**changes)


def duel(seed: int = 0, every: int = 1, **changes: Any) -> ds.Task:
    given = {
        "model": lambda: Duel().double(),
        "players": {"critic": Player(tells), "maker": Player(fools, every=every)},
        "recipe": recipe(),
    }
    parts = {part: (x.double(), y) for part, (x, y) in problems.parts(seed).items()}
    return ds.Task(**{**parts, **given, **changes})


def exploding(rounds: set[int], which: str = "maker") -> ds.Task:
    """The loss of one player is not finite in these rounds."""
    calls = [0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        whole = fools(model, batch) if which == "maker" else tells(model, batch)
        return whole * float("inf") if calls[0] - 1 in rounds else whole

    players = {"critic": Player(tells), "maker": Player(fools), which: Player(loss)}
    return duel(players=players)


def by_hand(model: Any, rounds: int, every: int) -> Any:
    """The same game with torch's optimizers, the gradients of each kept apart by `torch.autograd.grad`."""
    steps = rounds // every
    critic = torch.optim.SGD(model.critic.parameters(), lr=0.05, momentum=0.9)
    maker = torch.optim.Adam(model.maker.parameters(), lr=1e-2)
    rate = ds.cosine(1e-2, steps=steps, warmup=steps // 10)
    inputs, targets = duel().train  # type: ignore[misc]
    per_epoch, moved = steps_per_epoch(problems.SAMPLES, 16), 0
    for place in range(rounds):
        where = place % per_epoch
        chosen = order(problems.SAMPLES, 0, place // per_epoch)[where * 16 : (where + 1) * 16]
        batch = (inputs[chosen], targets[chosen])
        for optimizer, part, loss, n in (
            (critic, model.critic, tells, 1),
            (maker, model.maker, fools, every),
        ):
            if (place + 1) % n:
                continue
            if optimizer is maker:
                optimizer.param_groups[0]["lr"] = rate(moved)
                moved += 1
            parameters = list(part.parameters())
            for p, g in zip(parameters, torch.autograd.grad(loss(model, batch), parameters), strict=True):
                p.grad = g
            optimizer.step()
    return model


@pytest.mark.parametrize("every", [1, 5])
def test_a_game_is_the_one_that_torchs_optimizers_play(every: int) -> None:
    state = Training(duel(every=every))
    mine = copy.deepcopy(state.model)
    state.advance()
    expected = by_hand(mine, 40, every)
    for name, value in state.model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-10, atol=1e-12)
    assert [side.optimizer.steps for side in state.sides] == [40, 40 // every]
    assert state.step == 40


def test_a_move_leaves_the_others_weights_and_gradients_alone() -> None:
    state = Training(duel())
    critic, maker = state.sides
    batch = tuple(column[:16] for column in state.task.train)  # type: ignore[union-attr]
    weights = {name: value.clone() for name, value in state.model.critic.state_dict().items()}
    critic.optimizer.zero_grad()
    maker.move([(batch, 1.0)])
    assert all(p.grad is None for p in state.model.critic.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in state.model.critic.state_dict().items())
    assert all(p.requires_grad for p in state.model.parameters())


def test_a_loss_that_raises_leaves_the_other_parameters_trainable() -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise ZeroDivisionError

    state = Training(duel(players={"critic": Player(tells), "maker": Player(broken)}, loss=fools))
    with pytest.raises(ds.errors.UserCodeError, match=r"The loss of maker raised ZeroDivisionError"):
        state.advance(1)
    assert all(p.requires_grad for p in state.model.parameters())


def test_what_is_frozen_stays_frozen() -> None:
    def half() -> Duel:
        model = Duel().double()
        model.critic[0].bias.requires_grad_(False)
        return model

    state = Training(duel(model=half))
    before = state.model.critic[0].bias.clone()
    state.advance(3)
    assert torch.equal(state.model.critic[0].bias, before)
    assert not state.model.critic[0].bias.requires_grad


@pytest.mark.parametrize("stopped", [3, 20])
def test_stopped_saved_and_loaded_it_goes_on_to_the_bit(tmp_path: Path, stopped: int) -> None:
    strategies = [ds.strategies.average(), ds.strategies.micro(items=5)]
    task = duel(every=3, recipe=recipe(strategies=strategies))
    straight, first = Training(task), Training(task)
    straight.advance()
    first.advance(stopped)
    sha = first.save(tmp_path / "c")
    resumed = Training.load(tmp_path / "c", task, sha=sha)
    assert resumed.fields() == first.fields()
    resumed.advance()
    assert resumed.fields() == straight.fields()
    assert any(name.startswith("optimizer.critic groups 0") for name in straight.fields())


def test_resuming_is_proven_in_a_fresh_process() -> None:
    proof = verify_resume("digits-gan", steps=12)
    assert proof, str(proof)


def test_pieces_of_a_batch_add_up_to_it() -> None:
    whole = Training(duel())
    pieces = Training(duel(recipe=recipe(strategies=[ds.strategies.micro(items=5)])))
    whole.advance(10)
    pieces.advance(10)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(pieces.model.state_dict()[name], value, rtol=1e-9, atol=1e-12)


def test_a_skipped_move_is_the_players_own(tmp_path: Path) -> None:
    run = ds.train(exploding({2, 3}), out=tmp_path / "run", quiet=True, valid_every=20)
    events = read(tmp_path / "run" / "journal.jsonl")
    skips = [event for event in events if event["kind"] == "skip"]
    steps = [event for event in events if event["kind"] == "step"]
    assert [event["step"] for event in skips] == [2, 3]
    assert skips[0]["names"] == ["maker.weight", "maker.bias"]
    assert [event["step"] for event in steps] == list(range(40))
    assert [sorted(event["players"]) for event in steps[1:4]] == [["critic", "maker"], ["critic"], ["critic"]]
    assert run.steps == 40


def test_the_journal_and_the_progress_tell_every_players_loss_and_rate(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task = duel(every=5)
    ds.train(task, out=tmp_path / "run")
    told = [event for event in read(tmp_path / "run" / "journal.jsonl") if event["kind"] == "step"]
    seen: list[Any] = []
    Training(task, threads=None).advance(on_step=lambda attempt: seen.append(attempt))
    assert [{n: move.loss.item() for n, move in one.moves.items()} for one in seen] == [
        {name: player["loss"] for name, player in event["players"].items()} for event in told
    ]
    assert told[3]["players"].keys() == {"critic"}
    assert told[4]["players"].keys() == {"critic", "maker"}
    assert told[4]["loss"] == pytest.approx(sum(player["loss"] for player in told[4]["players"].values()))
    assert told[4]["players"]["critic"]["lr"] == 0.05
    last = {name: player["loss"] for event in told for name, player in event["players"].items()}
    said = ", ".join(f"{name} {loss:.4g}" for name, loss in last.items())
    assert f"step 40 of 40, loss {said}, valid loss" in capfd.readouterr().err


def test_a_round_in_which_nobody_moved_is_no_step_and_too_many_are_the_end() -> None:
    def never(model: nn.Module, batch: Any) -> Tensor:
        return tells(model, batch) * float("nan")

    state = Training(exploding(set(range(10**4))))
    with pytest.raises(
        Diverged, match=r"20 updates in a row of maker .* gradients of maker\.weight, maker\.bias"
    ):
        state.advance()
    assert (state.step, state.batches) == (20, 20)
    both = duel(players={"critic": Player(never), "maker": Player(never)}, loss=fools)
    state = Training(both)
    with pytest.raises(Diverged, match="of critic"):
        state.advance()
    assert (state.step, state.batches) == (0, 20)


def test_a_loss_that_reaches_no_own_parameter_is_said() -> None:
    with pytest.raises(BadInput, match=r"the loss of maker gave no parameter .* its trainable parameters"):
        Training(
            duel(
                players={
                    "critic": Player(tells),
                    "maker": Player(lambda m, b: fools(m, b).detach().requires_grad_()),
                }
            )
        ).advance(1)


def test_a_single_player_is_the_usual_task() -> None:
    task = duel(players={}, loss=tells)
    assert list(task.players) == [""]
    state = Training(task, recipe().with_(players={}))
    assert state.optimizer is state.sides[0].optimizer
    with pytest.raises(BadInput, match=r"the players critic, maker have an optimizer each"):
        _ = Training(duel()).optimizer


def test_the_loss_that_judges_is_the_sum_unless_one_is_given() -> None:
    state = Training(duel())
    batch = state.task.valid
    with torch.no_grad():
        expected = float(tells(state.model, batch) + fools(state.model, batch))
    assert state.evaluate().loss == pytest.approx(expected, rel=1e-12)
    assert duel(loss=fools).loss is fools


class Shared(Duel):
    def __init__(self) -> None:
        super().__init__()
        self.critic[0].weight = nn.Parameter(torch.zeros(6, 6))
        self.maker.weight = self.critic[0].weight


class Orphan(Duel):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": Shared}, r"maker\.weight of the model is critic's too"),
        ({"model": Orphan}, r"scale of the model is no player's \(critic, maker\)"),
        ({"model": lambda: nn.Linear(6, 1)}, "no submodule 'critic'"),
        ({"recipe": recipe(players={"critik": ds.sgd})}, "no player 'critik'. Did you mean 'critic'"),
        ({"recipe": recipe(strategies=[ds.strategies.smoothing()])}, r"\[smoothing\] is about one loss"),
        ({"players": {}, "loss": tells}, r"no player 'critic'\. It has one"),
        (
            {
                "recipe": recipe(
                    strategies=[ds.strategies.average()],
                    players={"critic": ds.rules()["schedule_free_adamw"]},
                )
            },
            "the rule of critic has evaluation weights",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        Training(duel(**changes))


@pytest.mark.parametrize(
    ("players", "sentence"),
    [
        ({"critic": Player(tells, every=2)}, "no player moves in every round"),
        ({"the critic": Player(tells)}, "in plain letters, got 'the critic'"),
        ({"critic": tells}, "'critic' must be a ds.Player, got function"),
        ([Player(tells)], "ds.Player by name, got list"),
    ],
)
def test_players_that_are_none_are_refused(players: Any, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        duel(players=players)


def test_a_recipe_with_players_reads_back_and_says_where_it_is_wrong() -> None:
    made = recipe(
        players={
            "critic": ds.sgd,
            "maker": ds.Recipe(ds.adamw, 1, 1, roles={"norm": {"weight_decay": 0}}, guard=False),
        }
    )
    assert ds.Recipe.parse(made.text()) == made
    assert made.players["maker"].steps == 40
    assert str(made.diff(made.with_(players={"critic": ds.sgd(lr=0.2), "maker": made.players["maker"]}))) == (
        "player.critic.sgd.lr: 0.1 → 0.2"
    )
    text = 'steps = 9\nbatch_size = 3\n[[chain]]\npart = "sgd"\n[player.critic]\nsteps = 4\n'
    with pytest.raises(BadInput, match=r"recipe\.toml:6: unknown key 'steps'\. .*guard, chain, route, roles"):
        ds.Recipe.parse(text)
    text = text.replace("steps = 4", "guard = false")
    assert ds.Recipe.parse(text).players["critic"].chain.name == "sgd"
    assert not ds.Recipe.parse(text).players["critic"].guard
