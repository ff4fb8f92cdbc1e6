"""The page in a real browser: it draws, it answers mouse and keyboard, it complains and asks for nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from report.chromium import CHROMIUM, Browser
from report.made_up import GAME, TOLD, Race, training
from report.test_page import HOSTILE

from downslope.report import report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page is not seen")

SHOWN = (
    "[...document.querySelectorAll('.curves .panel')]"
    ".filter(p => getComputedStyle(p).display !== 'none').map(p => p.dataset.panel)"
)
BACKDROPS = """
[...document.querySelectorAll('h1,h2,p,dt,dd,th,td,label,legend,figcaption,small,text,code,span,button')]
  .filter(e => e.getBoundingClientRect().width > 0 && e.textContent.trim() && !e.closest('.unseen,#tip'))
  .map(e => {
    const style = getComputedStyle(e);
    const clear = b => getComputedStyle(b).backgroundColor === 'rgba(0, 0, 0, 0)';
    let behind = e;
    while (clear(behind) && behind.parentElement) behind = behind.parentElement;
    const name = e.tagName + '.' + (e.getAttribute('class') || '');
    return [name, e.tagName === 'text' ? style.fill : style.color, getComputedStyle(behind).backgroundColor];
  })
"""
FORBIDDEN = """
[...document.querySelectorAll('*')].flatMap(e => [...e.attributes].map(a => a.name))
  .filter(name => /^(on|style$|href|src)/.test(name))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as one:
        yield one


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("race")
    Race(folder)
    return report(folder)


@pytest.fixture(scope="module")
def one_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    training(folder)
    return report(folder)


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("game")
    training(folder, players=GAME)
    return report(folder)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told")
    training(folder, told=TOLD)
    return report(folder)


def painted(browser: Browser, selector: str) -> int:
    """How many of these have an area on the screen."""
    every = f"[...document.querySelectorAll({json.dumps(selector)})]"
    return int(browser.run(f"{every}.filter(e => e.getBoundingClientRect().width > 0).length"))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 768, 1400])
@pytest.mark.parametrize("kind", ["race", "one_training", "game", "told"])
def test_it_opens_without_a_complaint_a_request_or_a_sideways_scroll(
    browser: Browser, request: pytest.FixtureRequest, kind: str, width: int, dark: bool
) -> None:
    path = request.getfixturevalue(kind)
    browser.open(path, width=width, dark=dark)
    assert browser.complaints == []
    assert browser.requests == [path.resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert painted(browser, ".panel path.line") >= 2
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")


def test_every_plot_of_a_race_is_painted(browser: Browser, race: Path) -> None:
    browser.open(race)
    assert painted(browser, ".whisker .dot") == 4
    assert painted(browser, ".facet .dot") >= 20
    assert painted(browser, ".lane .run") == 24
    assert painted(browser, ".panel .line:not(.faint)") == 8


def test_an_injected_script_is_refused(browser: Browser, race: Path, tmp_path: Path) -> None:
    """The policy is alive: what the other tests call silence would be heard."""
    for bad in ("<script>document.title = 'mine'</script>", "<p onclick='1' style='color: red'>x</p>"):
        page = tmp_path / "bad.html"
        page.write_text(race.read_text("utf-8").replace("</main>", bad + "</main>"), "utf-8")
        browser.open(page)
        assert "Content Security Policy" in " ".join(browser.complaints)
        assert browser.run("document.title") == "digits-cnn · downslope race"
    assert (
        browser.run("(() => { try { eval('1'); return 'ran' } catch { return 'refused' } })()") == "refused"
    )
    write = "(() => { try { document.body.innerHTML = 'x'; return 'ran' } catch { return 'refused' } })()"
    assert browser.run(write) == "refused"
    browser.run("fetch('https://example.invalid').catch(() => 1)")
    assert "connect-src" in " ".join(browser.complaints)


def test_switches_choose_the_panel(browser: Browser, race: Path) -> None:
    browser.open(race)
    assert browser.run(SHOWN) == ["train-steps-log"]
    for quantity in ("train", "valid", "metric"):
        for against in ("steps", "seconds"):
            for scale in ("log", "linear"):
                for value in (quantity, against, scale):
                    browser.run(f"document.querySelector('input[value={value}]').click()")
                assert browser.run(SHOWN) == [f"{quantity}-{against}-{scale}"]
                assert painted(browser, f"[data-panel={quantity}-{against}-{scale}] .line") > 8


def test_every_panel_that_there_is_has_its_switch(
    browser: Browser, race: Path, one_training: Path, game: Path
) -> None:
    for path in (race, one_training, game):
        browser.open(path)
        panels = browser.run("[...document.querySelectorAll('.curves .panel')].map(p => p.dataset.panel)")
        seen = set()
        for panel in panels:
            for value in panel.split("-"):
                browser.run(f"document.querySelector('input[value={value}]').click()")
            seen.update(browser.run(SHOWN))
        assert seen == set(panels)


def test_a_legend_box_hides_its_lines_and_only_those(browser: Browser, race: Path) -> None:
    browser.open(race)
    before = painted(browser, "[data-panel=train-steps-log] .line")
    mine = painted(browser, "[data-panel=train-steps-log] .k6")
    assert 0 < mine < before
    browser.run("document.querySelector('[data-key=\"6\"]').click()")
    assert painted(browser, "[data-panel=train-steps-log] .k6") == 0
    assert painted(browser, "[data-panel=train-steps-log] .line") == before - mine
    browser.run("document.querySelector('[data-key=faint]').click()")
    assert painted(browser, "[data-panel=train-steps-log] .line") == 7


def test_every_player_has_a_line_in_losses_and_in_rates_and_a_box_beside_each(
    browser: Browser, game: Path
) -> None:
    browser.open(game)
    colour = "getComputedStyle(document.querySelector('{}')).stroke"
    for panel, names in (
        ("train-steps-log", ["critic", "maker", "validation", "every batch"]),
        ("rate-steps-linear", ["critic", "maker"]),
    ):
        lines = f"[data-panel={panel}] .line:not(.faint)"
        assert painted(browser, lines) == 2
        strokes = {browser.run(colour.format(f"{lines}.k{key}")) for key in (0, 1)}
        assert len(strokes) == 2
        section = f"document.querySelector('[data-panel={panel}]').closest('section')"
        boxes = f"[...{section}.querySelectorAll('.legend:not(.moments) label')]"
        assert browser.run(f"{boxes}.map(label => label.textContent.trim())") == names
    browser.run("document.querySelector('#schedule [data-key=\"1\"]').click()")
    assert painted(browser, "#schedule .line") == 1
    assert painted(browser, "[data-panel=train-steps-log] .line:not(.faint)") == 2
    browser.run("document.querySelector('#curves [data-key=\"0\"]').click()")
    assert painted(browser, "#schedule .line") == 1
    assert painted(browser, "[data-panel=train-steps-log] .k0") == 0
    browser.move(*point(browser, "[data-panel=train-steps-log] path.line.k1:not(.faint)"))
    assert browser.run("document.getElementById('tip').textContent").startswith("maker")


def test_what_happened_stands_at_its_step_and_goes_with_its_box(browser: Browser, told: Path) -> None:
    browser.open(told)
    panel = "[data-panel=train-steps-log]"
    boxes = "[...document.querySelectorAll('#curves .moments label')].map(l => l.textContent.trim())"
    assert browser.run(boxes) == [
        "[spikes] left the batch out, 40 times",
        "The guard left the update out, 2 times",
        "[restart] began anew, 2 times",
    ]
    browser.run(f"document.querySelector('{panel}').scrollIntoView({{behavior: 'instant'}})")
    box = "(b => [b.x, b.width, b.y, b.height])(document.querySelector('{}').getBoundingClientRect())"
    left, width, top, height = browser.run(box.format(f"{panel} .area"))
    x, _, y, tall = browser.run(box.format(f"{panel} .km2"))
    last = browser.run(
        "JSON.parse(document.getElementById('data').textContent).panels['train-steps-log'].x.high"
    )
    assert x == pytest.approx(left + width * 200 / last, abs=2)
    assert (y, tall) == pytest.approx((top, height), abs=2), "one that is rare goes through the panel"
    _, _, y, tall = browser.run(box.format(f"{panel} .km0"))
    assert y + tall == pytest.approx(top + height, abs=2), "many stand at the foot"
    assert tall < height / 10
    assert painted(browser, "#curves .panel .km2") == painted(browser, "#schedule .km2") == 1
    browser.run("document.querySelector('#curves [data-key=m2]').click()")
    assert painted(browser, "#curves .km2") == 0
    assert painted(browser, "#schedule .km2") == painted(browser, "#curves .km0") == 1


def test_the_table_of_what_happened_is_one_for_a_screen_reader_at_any_width(
    browser: Browser, told: Path
) -> None:
    for width in (390, 1100):
        browser.open(told, width=width)
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        roles = [(node.get("role", {}).get("value"), node.get("name", {}).get("value", "")) for node in nodes]
        assert [name for role, name in roles if role == "columnheader"] == ["Step", "Times", "What", "Why"]
        steps = [name for role, name in roles if role == "rowheader"]
        assert steps == ["40 to 79", "60 to 61", "200 to 300"]


def point(browser: Browser, selector: str) -> tuple[float, float]:
    """The middle of an element in the window, after scrolling to it."""
    element = f"document.querySelector({json.dumps(selector)})"
    browser.run(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    x, y = browser.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())")
    return x, y


def test_the_value_below_the_pointer_is_the_measured_one(browser: Browser, one_training: Path) -> None:
    browser.open(one_training)
    events = [
        json.loads(line[9:]) for line in (one_training.parent / "journal.jsonl").read_text().splitlines()
    ]
    losses = {
        (name, event["step"]): event["loss"]
        for name, kind in (("training", "step"), ("validation", "valid"))
        for event in events
        if event["kind"] == kind
    }
    x, y = point(browser, "[data-panel=train-steps-log] path.line")
    browser.move(x, y)
    name, value = browser.run("document.getElementById('tip').textContent").split("\n")
    step, _, loss = value.removeprefix("step ").partition(": ")
    assert float(loss) == pytest.approx(losses[name, int(step)], rel=1e-3)
    assert browser.run("document.getElementById('tip').hidden") is False
    browser.move(2, 2)
    assert browser.run("document.getElementById('tip').hidden") is True
    assert browser.complaints == []


def test_the_keyboard_reads_the_values(browser: Browser, race: Path) -> None:
    browser.open(race)
    browser.run("document.querySelector('[data-panel=train-steps-log] .plot').focus()")
    read = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        browser.press(key)
        read.append(browser.run("document.getElementById('tip').textContent"))
    assert len(set(read)) == 4
    assert read[0].split("\n")[0] == read[1].split("\n")[0] != read[2].split("\n")[0]
    browser.press("Escape")
    assert browser.run("document.getElementById('tip').hidden") is True


def test_a_learning_rate_tells_its_value(browser: Browser, race: Path) -> None:
    browser.open(race)
    browser.move(*point(browser, ".facet .dot.best"))
    assert "learning rate 0.3: " in browser.run("document.getElementById('tip').textContent")


def test_the_recipe_is_copied(browser: Browser, race: Path) -> None:
    browser.open(race)
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    x, y = point(browser, "button[data-copy=toml]")
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    button = "document.querySelector('button[data-copy=toml]')"
    said = f"new Promise(done => setTimeout(() => done({button}.textContent), 200))"
    assert browser.run(said) == "Copied"
    assert browser.run("navigator.clipboard.readText()") == browser.run(
        "document.getElementById('toml').textContent"
    )
    assert browser.run("document.getElementById('toml').textContent").startswith(
        "# adamw, raced on digits-cnn\nsteps"
    )


def test_hostile_words_are_only_words(browser: Browser, tmp_path: Path) -> None:
    Race(tmp_path / "race", "".join(HOSTILE[:8]))
    for i, text in enumerate(HOSTILE):
        kind = "race" if i % 4 == 0 else "training"
        folder = tmp_path / str(i)
        Race(folder, text) if kind == "race" else training(folder, text)
        browser.open(report(folder))
        assert browser.complaints == []
        assert len(browser.requests) == 1
        assert browser.run("document.scripts.length") == 2
        assert browser.run(FORBIDDEN) == []
        browser.run("document.querySelector('.panel .plot').focus()")
        browser.press("ArrowRight")
        assert browser.run("document.getElementById('tip').children.length") == 0


def test_it_prints_on_white_paper_without_switches(browser: Browser, race: Path) -> None:
    browser.open(race, dark=True)
    theme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.call("Emulation.setEmulatedMedia", media="print", features=[theme])
    try:
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert painted(browser, ".controls, button") == 0
        assert painted(browser, "[data-panel=train-steps-log] .line") > 8
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def test_without_javascript_tables_plots_and_switches_are_there(browser: Browser, race: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(race, settle=False)
        assert painted(browser, ".standings tbody tr") == 4
        assert painted(browser, ".lanes tbody tr") == 24
        assert painted(browser, "[data-panel=train-steps-log] .line") > 8
        assert painted(browser, "button[data-copy]") == 0
        x, y = point(browser, "input[value=metric]")
        for kind in ("mousePressed", "mouseReleased"):
            browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        assert browser.run(SHOWN) == ["metric-steps-log"]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_a_screen_reader_finds_tables_headings_and_names(browser: Browser, race: Path) -> None:
    for width in (390, 1100):
        browser.open(race, width=width)
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        roles = [(node.get("role", {}).get("value"), node.get("name", {}).get("value", "")) for node in nodes]
        names = [name for role, name in roles if role == "heading"]
        assert len(names) == 7
        assert [role for role, _ in roles].count("table") == 2
        assert [role for role, _ in roles].count("rowheader") == 28
        for role, name in roles:
            if role in ("button", "checkbox", "radio", "radiogroup", "group"):
                assert name or role == "group", (role, name)


def test_text_can_be_read_in_both_themes(browser: Browser, race: Path) -> None:
    """Every text has the contrast of WCAG AA (4.5 : 1) to what lies behind it."""
    for dark in (False, True):
        browser.open(race, dark=dark)
        pairs = {(fore, behind): tag for tag, fore, behind in browser.run(BACKDROPS)}
        assert len(pairs) > 4
        for (fore, behind), tag in pairs.items():
            if behind != "rgba(0, 0, 0, 0)":
                assert contrast(rgb(fore), rgb(behind)) >= 4.5, (tag, fore, behind)


def rgb(text: str) -> tuple[float, float, float]:
    red, green, blue = (float(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3])
    return red, green, blue


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    weights = (0.2126, 0.7152, 0.0722)
    lights = [sum(w * linear(c) for w, c in zip(weights, color, strict=True)) for color in (one, other)]
    dark, light = sorted(lights)
    return (light + 0.05) / (dark + 0.05)


def linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
