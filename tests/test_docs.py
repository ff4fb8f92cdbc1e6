"""What README and docs show is run as it is written."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from downslope.cli import run
from downslope.description import TOOLBOX
from downslope.errors import BadInput
from downslope.recipe import Recipe
from downslope.strategies import STRATEGIES
from downslope.tasks import load, size

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


NOT_FOR = re.compile(r"(^|[.;:)] )Not (for:?|beside) \S")
TOOLS = {name: tool for name, (tool, _) in TOOLBOX.items()}


def says_not_for(prose: str) -> bool:
    return NOT_FOR.search(" ".join(prose.split())) is not None


def blocks(language: str) -> list[tuple[str, str]]:
    found = [(page.name, match[2]) for page in PAGES for match in BLOCK.finditer(page.read_text("utf-8"))]
    kinds = [match[1] for page in PAGES for match in BLOCK.finditer(page.read_text("utf-8"))]
    return [block for block, kind in zip(found, kinds, strict=True) if kind == language]


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_runs_as_written(page: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "example.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_recipes_load_as_written(page: str, text: str) -> None:
    if "[[chain]]" not in text:  # a table of its own is a part of any recipe
        text = f'steps = 100\nbatch_size = 32\n{text}\n[[chain]]\npart = "adamw"\n'
    assert Recipe.parse(text, page).steps


def test_every_strategy_has_a_section_with_its_table() -> None:
    page = (ROOT / "docs" / "strategies.md").read_text("utf-8")
    sections = {part.split("\n")[0]: part for part in page.split("\n## ")[1:]}
    assert list(sections) == list(STRATEGIES)
    for name, text in sections.items():
        assert f"\n[{name}]\n" in text
        assert says_not_for(BLOCK.sub("", text)), name
        assert "](#" + name + ")" in page


@pytest.mark.parametrize(("name", "thing"), [*TOOLS.items(), *STRATEGIES.items()])
def test_every_tool_and_strategy_says_what_it_is_not_for(name: str, thing: object) -> None:
    assert says_not_for((inspect.getdoc(thing) or "").split(">>>")[0]), name


def test_the_wrong_key_of_the_recipe_page_is_refused_as_written() -> None:
    text = next(text for page, text in blocks("toml") if page == "recipe.md")
    line = next(sentence for _, sentence in blocks("") if sentence.startswith("recipe.toml:"))
    with pytest.raises(BadInput) as caught:
        Recipe.parse(text.replace("weight_decay = 0.01", "weight_deca = 0.01"))
    number, said = str(caught.value).removeprefix("recipe.toml:").split(":", 1)
    assert int(number) == text[: text.index("weight_decay")].count("\n") + 1
    assert said.startswith(line.strip().split(":", 2)[2].removesuffix(" …"))


def test_the_loop_of_ones_own_is_ten_lines() -> None:
    loop = next(code for page, code in blocks("python") if page == "README.md")
    assert len([line for line in loop.splitlines() if line]) <= 11


def test_the_example_of_a_task_is_twenty_lines_and_trains(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = next(code for page, code in blocks("python") if page == "task.md")
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 20
    path = tmp_path / "sine.py"
    path.write_text(code)
    assert size(load(f"{path}:sine").train) == 512
    assert run(["train", f"{path}:sine", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_every_picture_and_page_that_is_linked_exists() -> None:
    for page in PAGES:
        prose = BLOCK.sub("", page.read_text("utf-8"))  # `model["left"](inputs)` is code, and no link
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / target).exists(), f"{page.name} links {target}"
