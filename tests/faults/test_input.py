"""F12, F13: whatever a recipe says and whatever is typed, the answer is a result or one sentence."""

import re
import resource
import time
from itertools import product
from pathlib import Path
from random import Random

import pytest
from faults.matrix import Figure, row
from typer.main import get_command

from downslope.cli import app, run
from downslope.errors import BadInput
from downslope.recipe import Recipe
from downslope.rules import links, rules
from downslope.schedule import KINDS
from downslope.strategies import STRATEGIES
from downslope.tasks import tasks

DOCS = Path(__file__).parents[2] / "docs"
HEAD = 'steps = "20 epochs"\nbatch_size = 64\n\n[[chain]]\npart = "adamw"\nlr = 0.001\n\n'
LONGEST = 1.0
"""Seconds of the processor that one text may take; a good one takes milliseconds."""
LARGEST = 100 * 1024
"""KB of memory that all texts together may leave behind."""


class Costs:
    """What each case costs; nothing may take long, and nothing may pile up."""

    def __init__(self) -> None:
        self._memory, self._began = self.memory(), time.process_time()

    def memory(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def check(self, case: object) -> None:
        assert time.process_time() - self._began < LONGEST, case
        assert self.memory() - self._memory < LARGEST, case
        self._began = time.process_time()


# --- F12: recipes -------------------------------------------------------------------------------------

KEYS = (
    *("steps", "batch_size", "guard", "observe", "chain", "roles", "roles.norm", "roles.norm.weight_decay"),
    *("chain.part", "chain.lr", "chain.lr.schedule", "chain.lr.peak", "chain.betas", "chain.nesterov"),
    *(f"{name}.x" for name in STRATEGIES),
)
VALUES = (
    *("0", "-1", "1e400", "nan", "-inf", "0.0", "1", "9223372036854775808", "true", "''", "'x'", "'5 %'"),
    *(
        "[]",
        "[1, 'a']",
        "[[]]",
        "{}",
        "{ schedule = 'cosine' }",
        "1979-05-27",
        "'''\n'''",
        "'\\u0000'",
        "0x7F",
    ),
)
WORDS = (
    *"[]{}=,.\"'\n#-_ 0159\\\0é\u2028",
    *("nan", "inf", "1e999", "true", "steps", "part", "chain", "[[chain]]", "lr", '"""', "schedule", "roles"),
    *('"5 %"', "'100 epochs'", "1" * 30, "[" * 30, "a." * 30, "\ud800"),
)


def by_hand(case: int) -> str:
    """One wrong or odd value for one key."""
    key, value = list(product(KEYS, VALUES))[case % (len(KEYS) * len(VALUES))]
    path = key.split(".")
    if path[0] == "chain" and path[1:]:
        return HEAD.replace("\n\n", "\n", 2).strip() + f"\n{'.'.join(path[1:])} = {value}\n"
    return f"{key} = {value}\n{HEAD}" if "." in key or key not in HEAD else HEAD + f"{key} = {value}\n"


def documented() -> list[str]:
    """Every recipe that the documentation shows, and every table of one, as a whole recipe."""
    blocks = [HEAD]
    for path in sorted(DOCS.glob("*.md")):
        blocks += re.findall(r"```toml\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    return [text for block in blocks for text in (block, HEAD + block) if valid(text)]


def valid(text: str) -> bool:
    try:
        return bool(Recipe.parse(text))
    except BadInput:
        return False


def mutated(text: str, draw: Random) -> str:
    """With a few pieces cut, doubled or put in."""
    for _ in range(draw.randint(1, 4)):
        a = draw.randrange(len(text) + 1)
        b = min(len(text), a + draw.randint(0, 12))
        text = text[:a] + draw.choice([draw.choice(WORDS), text[a:b] * 2, ""]) + text[b:]
    return text


def grown(draw: Random) -> str:
    """By the grammar: known names with any values, in any order."""

    def value(depth: int = 0) -> str:
        if depth < 2 and draw.random() < 0.2:
            kind = draw.choice([*KINDS, "cosin"])
            return f'{{ schedule = "{kind}", peak = {value(2)}, steps = {value(2)} }}'
        return (
            draw.choice(VALUES) if draw.random() < 0.3 else draw.choice(["0.1", "3", '"5 %"', '"2 epochs"'])
        )

    lines = [f"steps = {value(2)}", f"batch_size = {value(2)}"]
    for _ in range(draw.randint(0, 3)):
        name, part = draw.choice([*{**rules(), **links()}.items()])
        numbers = draw.sample([*part.numbers], min(len(part.numbers), draw.randint(0, 3)))
        lines += ["[[chain]]", f'part = "{name}"', *(f"{number} = {value()}" for number in numbers)]
    for name in draw.sample([*STRATEGIES], draw.randint(0, 2)):
        fields = [*STRATEGIES[name].__dataclass_fields__]
        lines += [f"[{name}]", *(f"{key} = {value()}" for key in draw.sample(fields, min(2, len(fields))))]
    return "\n".join(lines)


@row("F12", 10_000)
def test_f12_any_text_is_a_recipe_that_reads_back_or_one_line(
    figure: Figure, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts, file, out = documented(), tmp_path / "x.toml", tmp_path / "out"
    assert len(texts) > 10
    right, costs = 0, Costs()
    for number, draw in figure.draws():
        if number % 20 == 0:
            text = by_hand(number // 20)
        else:
            text = grown(draw) if number % 2 else mutated(draw.choice(texts), draw)
        try:
            recipe = Recipe.parse(text, "x.toml")
        except BadInput as error:
            assert re.fullmatch(r"x\.toml:\d+: [^\n]{1,600}", str(error)), text  # noqa: PT017
            if number % 20 == 0:
                file.write_text(text, "utf-8", "surrogatepass")
                assert run(["train", "cancer-logistic", "--recipe", str(file), "--out", str(out)]) == 2
                one_line(capfd.readouterr().err)
        else:
            assert Recipe.parse(recipe.text()) == recipe, text
            right += 1
        costs.check(text)
    assert figure.cases // 50 < right < figure.cases // 2
    assert not out.exists()


# --- F13: the command line ----------------------------------------------------------------------------

HOSTILE = (
    *("", " ", "-", "--", "-rf", "--help=x", "..", "/", "~", ".", "CON", "a/b", "a\\b", "x" * 10_000, "a\nb"),
    *(
        "../../etc/passwd",
        "/dev/zero",
        "/dev/null",
        "/proc/self/mem",
        "a\0b",
        "\ud800",
        "\u202egnp",
        "💥",
        "ä",
    ),
    *("$(touch pwned)", "`touch pwned`", "; touch pwned", "| cat", "%s%n", "{0.__class__}", "{{ 7 * 7 }}"),
    *("nan", "-inf", "1e999", "9" * 5000, "-1", "0x10", "١٢", "1_0", "True", "None", "20x", "10m", "5 steps"),
    *(
        "os.py:system",
        "nowhere.py:__import__('os')",
        "../x.py:f",
        "/dev/zero.py:f",
        "x.py:f.g",
        "a.py:",
        ":f",
    ),
    *("digits-mlpp", "adamm", "cosin", "runs/nothing", "recipe.toml", "__proto__", "\x1b[31m", "<script>"),
)
WITHOUT_WORK = ("show", "list")


def typed(draw: Random) -> list[str]:
    """A command with arguments and options of every kind; no task that it names is one."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    verb = draw.choice([*commands, draw.choice(HOSTILE), draw.choice(["rase", "trian", "--version"])])
    names = [*rules(), *KINDS, *tasks()] if verb in WITHOUT_WORK else []
    words = [draw.choice([*HOSTILE, *names[: len(HOSTILE)]]) for _ in range(draw.randint(0, 3))]
    options = [
        option
        for parameter in (commands[verb].params if verb in commands else [])
        for option in parameter.opts
        if option.startswith("--") and option != "--follow"  # waits for more, as it says
    ]
    for _ in range(draw.randint(0, 3)):
        option = draw.choice(options or ["--out"])
        words += [draw.choice([option, option[:-1], option + "x"])]
        words += [draw.choice(HOSTILE)] * (draw.random() < 0.8)
    return [verb, *words]


def one_line(said: str) -> None:
    assert said.startswith("downslope: "), said
    assert said.endswith("\n"), said
    assert said.count("\n") == 1, said


def names(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@row("F13", 5000)
def test_f13_whatever_is_typed_is_answered_in_one_line_and_makes_nothing(
    figure: Figure, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    codes, costs = [], Costs()
    for _, draw in figure.draws():
        arguments = typed(draw)
        codes.append(run(arguments))
        said = capfd.readouterr()
        assert codes[-1] in (0, 2), (arguments, said.err)
        if codes[-1] == 2:
            one_line(said.err)
            assert said.out == ""
        costs.check(arguments)
    assert names(tmp_path) == [str(here)]
    assert codes.count(2) > figure.cases // 2
