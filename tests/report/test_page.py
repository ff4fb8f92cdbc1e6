"""The page as a file: whole, self-contained, and deaf to whatever a journal would like it to do."""

import base64
import hashlib
import json
import math
import re
import runpy
import zlib
from collections import Counter
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report.made_up import GAME, TOLD, Race, training

import downslope as ds
from downslope.errors import BadInput
from downslope.journal import Journal, read
from downslope.report import report
from downslope.report.text import visible

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    '" autofocus onfocus="alert(1)',
    "<a href=javascript:alert(1)>x</a>",
    "<iframe src=//evil.example></iframe>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<style>@import 'https://evil.example'</style>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<base href=//evil.example/>",
    "<!-- --><script>alert(1)</script>",
    "--><script>alert(1)</script>",
    "]]><script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>",
    "{{ 7 * 7 }}{% for x in ().__class__.__base__.__subclasses__() %}x{% endfor %}",
    "${7*7}#{7*7}<%= 7*7 %>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "\\u003cscript\\u003e",
    "`${alert(1)}`",
    "\u2028alert(1)\u2029",
    "\u202egnp.exe",
    "\u2066hidden\u2069",
    "a\x00b\x1b[31mc\x7f",
    "\ufeff\u200b\u00ad",
    "__proto__",
    "constructor",
    "\U0001f600 学習率 e\u0301",
    "%3Cscript%3E",
    "javascript:alert(1)",
    "url(https://evil.example)",
    "; style-src 'unsafe-inline'",
    "'unsafe-eval' *",
    "/*</script>*/",
    "<plaintext>",
    "<textarea><noscript><template>",
    "x" * 280,
]


class Seen(HTMLParser):
    """What a browser would find in a page: elements, addresses, handlers, and the text that people see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.blocks: dict[str, list[str]] = {"script": [], "style": []}
        self.shown: list[str] = []
        self.comments: list[str] = []
        self._inside: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self._inside = [tag]

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[0] in self.blocks:
            self.blocks[self._inside[0]].append(data)
            self._inside = []
        else:
            self.shown.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def text(self) -> str:
        return "".join(self.shown)


def check(html: str) -> Seen:
    """The laws of every page."""
    seen = Seen(html)
    assert len(html.encode()) <= 5_000_000
    assert seen.tags.count("script") == len(seen.blocks["script"]) == 2
    assert seen.tags.count("style") == len(seen.blocks["style"]) == 1
    assert not seen.comments
    assert not {"a", "img", "iframe", "link", "base", "object", "embed", "form", "template", "use"} & set(
        seen.tags
    )
    assert [tag for tag in seen.tags if tag == "meta"] == ["meta"] * 5
    for tag, name, value in seen.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in {
            "href",
            "src",
            "srcset",
            "action",
            "formaction",
            "style",
            "background",
            "xlink:href",
        }
        assert not re.match(r"\s*(javascript|data|https?):", value) or name.startswith(("data-", "aria-")), (
            value
        )
    policy = next(v for t, n, v in seen.attributes if n == "content" and v.startswith("default-src"))
    data, script = seen.blocks["script"]
    for directive, code in (("script-src", script), ("style-src", seen.blocks["style"][0])):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert policy.count(";") == 6
    assert not set("<>&\u2028\u2029") & set(data)
    json.loads(data)
    return seen


def page(folder: Path) -> str:
    return report(folder).read_text("utf-8")


def test_a_race_tells_who_won_by_how_much_and_how_surely(tmp_path: Path) -> None:
    Race(tmp_path)
    seen = check(page(tmp_path))
    assert "adamw-0.003 leads on digits-cnn, tied with 2 others" in seen.text
    assert re.search(
        r"It beats adamw-0\.0006 by \d\.\d\d points \(95 % interval: \d\.\d\d to \d\.\d\d\)", seen.text
    )
    for section in ("standings", "curves", "rates", "race", "recipe", "method"):
        assert ("section", "id", section) in seen.attributes
    assert "downslope race digits-cnn --budget 20x --seeds 5" in seen.text
    assert 'ds.Recipe.load("winner.toml")' in seen.text
    assert 'peak = 0.003, steps = "100 %"' in seen.text


def test_a_clear_winner_is_not_called_a_tie(tmp_path: Path) -> None:
    race = Race(tmp_path)
    sealed = json.loads((tmp_path / "standings.json").read_text())
    for row in sealed["rows"]:
        row["tied"] = False
    data = json.dumps(sealed).encode()
    (tmp_path / "standings.json").write_bytes(data)
    with Journal.open(race.folder / "journal.jsonl") as journal:
        journal.append("end", standings=hashlib.sha256(data).hexdigest())
    text = check(page(tmp_path)).text
    assert "adamw-0.003 trains digits-cnn best" in text
    assert "tied" not in text


def test_numbers_of_the_standings_are_those_of_the_file(tmp_path: Path) -> None:
    Race(tmp_path)
    text = check(page(tmp_path)).text
    for row in json.loads((tmp_path / "standings.json").read_text())["rows"]:
        assert f"{100 * row['metric']:.2f} %" in text
        assert f"{100 * row['test_metric']:.2f} %" in text


def test_every_beginning_of_a_race_is_a_page(tmp_path: Path) -> None:
    Race(tmp_path)
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for n in [*range(1, len(lines), 7), len(lines) - 1]:
        path.write_bytes(b"".join(lines[:n]))
        text = check(page(tmp_path)).text
        assert "The race on digits-cnn is not finished" in text
        assert "goes on where" in text


def test_every_beginning_of_a_training_is_a_page(tmp_path: Path) -> None:
    training(tmp_path)
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for n in [1, 2, 3, 50, len(lines) - 1]:
        path.write_bytes(b"".join(lines[:n]))
        assert "The training of digits-cnn is at step" in check(page(tmp_path)).text


def test_what_a_crash_took_back_is_not_drawn(tmp_path: Path) -> None:
    training(tmp_path, finished=False)
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        journal.append("resume", step=1, after=1)
        journal.append("step", step=1, loss=0.5, lr=0.1, seconds=0.1)
    seen = check(page(tmp_path))
    assert "The training of digits-cnn is at step 1" in seen.text
    series = json.loads(seen.blocks["script"][0])["series"]
    assert {s["tracks"]["train"]["values"][-1] for s in series if "train" in s["tracks"]} == {0.5}


def test_a_training_that_failed_says_why(tmp_path: Path) -> None:
    training(tmp_path, finished=False)
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        journal.append("failed", step=400, reason="the data ended: PASSWORD=HUNTER2")
    text = check(page(tmp_path)).text
    assert "It stopped: the data ended: PASSWORD=[hidden]" in text


def test_a_training_tells_what_it_reached_and_what_it_skipped(tmp_path: Path) -> None:
    training(tmp_path)
    seen = check(page(tmp_path))
    assert "digits-cnn reached a validation accuracy of 98.30 %" in seen.text, "what it ended with"
    assert "The best accuracy on the way was 98.47 %" in seen.text
    assert "2 updates were skipped" in seen.text
    assert "conv.weight" in seen.text
    assert seen.tags.count("pre") == 3


def drawn(seen: Seen, quantity: str) -> dict[str, dict[str, list[float]]]:
    """The tracks of this quantity that the page draws, by the name of their line."""
    series = json.loads(seen.blocks["script"][0])["series"]
    return {s["name"]: s["tracks"][quantity] for s in series if quantity in s["tracks"]}


def test_of_several_players_each_loss_and_rate_is_drawn_and_never_their_sum(tmp_path: Path) -> None:
    training(tmp_path, players=GAME)
    seen = check(page(tmp_path))
    steps = {e["step"]: e for e in read(tmp_path / "journal.jsonl") if e["kind"] == "step"}
    for name, every in (("critic", 1), ("maker", 5)):
        batches, rates = drawn(seen, "train")[f"{name}, one batch"], drawn(seen, "rate")[name]
        assert batches["steps"] == rates["steps"] == list(range(every, 401, every))
        own = [steps[step]["players"][name] for step in batches["steps"]]
        assert batches["values"] == pytest.approx([move["loss"] for move in own], rel=1e-5)
        assert rates["values"] == pytest.approx([move["lr"] for move in own], rel=1e-5)
    assert set(drawn(seen, "train")) == {"critic", "maker", "critic, one batch", "maker, one batch"}
    assert set(drawn(seen, "valid")) == {"validation"}
    assert "critic and maker; a step is a round of them" in seen.text
    for own_steps in ('"critic"), steps=400', '"maker"), steps=80'):
        assert own_steps in seen.text


def test_what_the_page_says_of_players_in_a_loop_of_ones_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training(tmp_path, players=GAME)
    task = ds.task("digits-gan")
    task.recipe.save(tmp_path / "recipe.toml")
    html = page(tmp_path)
    loop = re.search(r'<pre id="python"[^>]*><code>(.*?)</code>', html, re.DOTALL)
    assert loop
    (tmp_path / "loop.py").write_text(unescape(loop[1]))
    monkeypatch.chdir(tmp_path)
    model, losses = task.model(), {name: player.loss for name, player in task.players.items()}
    given = {"model": model, "losses": losses, "batches": [(task.train[0][:32],)] * 5}
    before = [parameter.clone() for parameter in model.parameters()]
    made = runpy.run_path("loop.py", given)
    assert {name: optimizer.steps for name, optimizer in made["optimizers"].items()} == {
        "critic": 5,
        "maker": 5,
    }
    rates = [optimizer.param_groups[0]["lr"] for optimizer in made["optimizers"].values()]
    assert rates == pytest.approx([0.0025 * (1 + math.cos(math.pi * 5 / n)) for n in (400, 80)])
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_batches_that_grow_are_drawn(tmp_path: Path) -> None:
    training(tmp_path, growing=True)
    seen = check(page(tmp_path))
    assert "that every applied update used, and how many of the data's batches it took" in seen.text
    taken = drawn(seen, "batches")["batches per update"]
    assert taken["values"] == [1 if step <= 100 else step // 50 for step in taken["steps"]]
    assert taken["steps"][0] == 1
    assert taken["steps"][-1] == 400
    training(tmp_path / "even")
    assert not drawn(check(page(tmp_path / "even")), "batches")


def rows(seen: Seen) -> list[list[str]]:
    """The table of what happened."""
    table = re.search(r'<table class="deeds".*?</table>', seen.html, re.DOTALL)
    found = re.findall(r"<tr.*?</tr>", table[0], re.DOTALL)[1:] if table else []
    return [
        [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in found
    ]


def test_what_strategies_did_is_told_with_its_reason_and_equal_ones_once(tmp_path: Path) -> None:
    training(tmp_path, told=TOLD)
    seen = check(page(tmp_path))
    assert rows(seen) == [
        ["40 to 79", "40", "[spikes] left the batch out", "its loss jumped: loss 50 to 89"],
        ["60 to 61", "2", "The guard left the update out", "a gradient was not finite: in conv.weight"],
        ["200 to 300", "2", "[restart] began anew", "at = 25 %: start 2 to 3"],
    ]
    assert "44 events beside the updates" in seen.text


def test_of_a_training_in_which_nothing_happened_there_is_no_table_and_no_mark(tmp_path: Path) -> None:
    training(tmp_path, steps=50)  # before the updates that are skipped
    seen = check(page(tmp_path))
    assert "What happened" not in seen.text
    assert "Marked" not in seen.text
    assert not any("mark" in value.split() for _, name, value in seen.attributes if name == "class")


def test_hundreds_of_events_that_take_turns_are_few_rows(tmp_path: Path) -> None:
    def deed(did: str, step: int) -> dict[str, Any]:
        return {"by": "spikes", "did": did, "why": "its loss jumped", "facts": {"loss": float(step)}}

    turns = {step: [deed(("skip", "cut", "back")[step % 3], step)] for step in range(1, 391)}
    far = {395: [deed("skip", 395)]}
    training(tmp_path, told=turns | far)
    found = rows(check(page(tmp_path)))
    assert 3 < len(found) <= 40
    assert sum(int(times) for _, times, *_ in found) == 393  # the guard's two among them
    training(tmp_path / "many", told={s: [deed(f"did {s}", s)] for s in range(1, 101)})
    seen = check(page(tmp_path / "many"))
    assert len(rows(seen)) == 40
    assert "The first 40 kinds of 101 are shown" in seen.text


def test_a_mark_stands_where_its_step_does_in_steps_and_in_seconds(tmp_path: Path) -> None:
    """Places from the journal alone: the axis ends a hundredth behind the last step, at 0.011 s a step."""
    training(tmp_path, told=TOLD)
    paths = re.findall(
        r'data-panel="(\w+-\w+-\w+)".*?<path class="mark m2 km2" d="(.*?)"', page(tmp_path), re.DOTALL
    )
    assert {name for name, _ in paths} >= {"train-steps-log", "train-seconds-linear", "rate-steps-linear"}
    for _, d in paths:
        places = [int(place) for place in re.findall(r"M(\d+) 0v1000", d)]
        assert places == pytest.approx([1000 * step / 404 for step in (200, 300)], abs=1)


def test_rates_that_are_one_all_along_are_one_line(tmp_path: Path) -> None:
    training(tmp_path, players={"critic": (1, 0.005), "maker": (1, 0.005), "judge": (1, 0.001)})
    assert set(drawn(check(page(tmp_path)), "rate")) == {"critic and maker", "judge"}
    training(tmp_path / "two", players={"critic": (1, 0.005), "maker": (1, 0.005)})
    assert "every applied update of critic and maker used" in check(page(tmp_path / "two")).text


def test_more_players_than_colours_are_told_and_not_drawn(tmp_path: Path) -> None:
    training(tmp_path, players={f"p{i}": (1, 0.001 * (i + 1)) for i in range(30)})
    seen = check(page(tmp_path))
    assert "The first 12 of 30 players are drawn" in seen.text
    assert len(drawn(seen, "rate")) == 12


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("kind", ["race", "training", "unfinished"])
def test_what_a_journal_says_is_text_and_nothing_else(tmp_path: Path, text: str, kind: str) -> None:
    if kind == "training":
        deed = {"by": "spikes" + text, "did": text, "why": text, "facts": {text: text}}
        training(tmp_path, text, players=GAME, told={7: [deed]})
        names = json.loads(check(page(tmp_path)).blocks["script"][0])["series"]
        assert visible(f"critic{text}") in [series["name"] for series in names]
        assert visible(f"[spikes{text}] {text}")[:290] in check(page(tmp_path)).text
    else:
        Race(tmp_path, text, finished=kind == "race")
    seen = check(page(tmp_path))
    assert visible("digits-cnn" + text) in seen.text
    if kind == "race":
        for told in ("adamw-0.003", "sgd lost its way", "20x", "python 3.11.7"):
            assert visible(told + text)[:299] in seen.text.replace("…", ""), told
        names = [series["name"] for series in json.loads(seen.blocks["script"][0])["series"]]
        assert visible(f"lion-0.002{text}") in names


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_is_harmless(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    check_anywhere(tmp_path_factory.mktemp("race"), text)


def check_anywhere(folder: Path, text: str) -> None:
    Race(folder / "race", text)
    training(folder / "training", text)
    for kind in ("race", "training"):
        assert visible("digits-cnn" + text)[:280] in check(page(folder / kind)).text


def test_no_secret_that_an_error_text_held_is_on_the_page(tmp_path: Path) -> None:
    Race(tmp_path, " API_TOKEN=HUNTER2 https://ann:HUNTER2@host")
    html = page(tmp_path)
    told = html[html.index("sgd lost its way") :][:200]
    assert "HUNTER2" not in told


def test_a_large_race_stays_below_the_limit(tmp_path: Path) -> None:
    Race(tmp_path, copies=60)
    seen = check(page(tmp_path))
    assert "are drawn" in seen.text


def test_a_long_training_stays_below_the_limit(tmp_path: Path) -> None:
    training(tmp_path, steps=30_000)
    assert len(page(tmp_path)) < 1_000_000


def test_a_recipe_too_long_to_read_is_named_instead(tmp_path: Path) -> None:
    training(tmp_path)
    (tmp_path / "recipe.toml").write_text("# x\n" * 100_000)
    seen = check(page(tmp_path))
    assert "Too long for a page: read recipe.toml." in seen.text


def test_standings_that_were_changed_are_refused(tmp_path: Path) -> None:
    Race(tmp_path)
    path = tmp_path / "standings.json"
    path.write_bytes(path.read_bytes().replace(b"0.9", b"1.9", 1))
    with pytest.raises(BadInput, match="is not what the journal sealed"):
        report(tmp_path)


def test_standings_that_are_gone_are_missed(tmp_path: Path) -> None:
    Race(tmp_path)
    (tmp_path / "standings.json").unlink()
    with pytest.raises(BadInput, match="standings.json"):
        report(tmp_path)


@pytest.mark.parametrize(
    "standings", [b"", b"[]", b"{", b"[" * 100_000, b'{"rows": [{"rank": 1}]}', b'{"level": "x"}']
)
def test_standings_of_another_form_are_refused_by_name(tmp_path: Path, standings: bytes) -> None:
    Race(tmp_path)
    (tmp_path / "standings.json").write_bytes(standings)
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        journal.append("end", standings=hashlib.sha256(standings).hexdigest())
    if standings == b"":
        with pytest.raises(BadInput, match="is not JSON"):
            report(tmp_path)
    else:
        with pytest.raises(BadInput, match=r"standings\.json: "):
            report(tmp_path)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("segment", {"trial": "<b>"}, "event 1 .segment.: trial"),
        ("segment", {"trial": 0, "run": "other", "end": 1}, "event 1 .segment.: run"),
        ("judged", {"trial": 0}, "event 1 .judged.: step"),
        ("judged", {"trial": 99, "rung": 0, "step": 1, "loss": 0.1, "metric": 0.1}, "trial 99, which is not"),
        ("finalists", {"trials": [0, 77]}, "trial 77, which is not"),
    ],
)
def test_an_event_of_another_form_is_refused_by_its_number(
    tmp_path: Path, kind: str, fields: dict[str, object], message: str
) -> None:
    Race(tmp_path)
    first = (tmp_path / "journal.jsonl").read_bytes().splitlines(keepends=True)[0]
    (tmp_path / "journal.jsonl").write_bytes(first)
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        journal.append(kind, **fields)
    with pytest.raises(BadInput, match=message):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_unknown_events_and_fields_are_passed_over(tmp_path: Path) -> None:
    Race(tmp_path)
    before = page(tmp_path)
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        journal.append("of-the-future", trial="<b>", rows=[1, 2])
    assert re.sub(r"The whole race.*?</div>", "", page(tmp_path)) == re.sub(
        r"The whole race.*?</div>", "", before
    )


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no race or training was run there"):
        report(tmp_path)
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(BadInput, match="has not begun"):
        report(tmp_path)


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    Race(tmp_path)
    (tmp_path / "report.html").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(BadInput, match="cannot write"):
        report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_same_journal_gives_the_same_bytes(tmp_path: Path) -> None:
    Race(tmp_path)
    assert page(tmp_path) == page(tmp_path)


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -1, 2**63])
STRANGE = st.sampled_from([[], {}, [[1]], {"a": 1}]) | st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def leaves(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """The places inside plain data, tables and lists themselves included."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value[:2]):
            yield from leaves(inner, (*path, i))


def put(value: Any, path: tuple[Any, ...], strange: object) -> Any:
    """The same data with something else in one place."""
    if not path:
        return strange
    changed = value.copy()
    changed[path[0]] = put(value[path[0]], path[1:], strange)
    return changed


@pytest.fixture(scope="module", params=["race", "training", "game"])
def events(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A short journal in which every kind of event is."""
    folder = tmp_path_factory.mktemp("whole")
    if request.param == "race":
        Race(folder)
    else:
        training(folder, steps=62, players=GAME if request.param == "game" else {})
    kinds: Counter[str] = Counter()
    few = []
    for event in read(folder / "journal.jsonl"):
        kinds[event["kind"]] += 1
        if kinds[event["kind"]] < 4 and event["kind"] != "end":
            few.append(event)
    return few


def test_strange_data_gives_a_page_or_one_clear_sentence(events: list[Any], tmp_path: Path) -> None:
    places = [
        [(i, path) for path in leaves(event) if path and path != ("seq",)] for i, event in enumerate(events)
    ]

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(places).flatmap(st.sampled_from), STRANGE)
    def attempt(place: tuple[int, tuple[object, ...]], strange: object) -> None:
        i, path = place
        changed = [*events[:i], put(events[i], path, strange), *events[i + 1 :]]
        lines = [
            json.dumps(
                {"seq": seq, **plain({k: v for k, v in event.items() if k != "seq"})}, separators=(",", ":")
            )
            for seq, event in enumerate(changed)
        ]
        texts = [b"%08x %s\n" % (zlib.crc32(line.encode()), line.encode()) for line in lines]
        (tmp_path / "journal.jsonl").write_bytes(b"".join(texts))
        page_or_sentence(tmp_path)

    attempt()


def test_strange_standings_give_a_page_or_one_clear_sentence(tmp_path: Path) -> None:
    Race(tmp_path)
    path = tmp_path / "standings.json"
    whole = json.loads(path.read_bytes())
    journal = (tmp_path / "journal.jsonl").read_bytes()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(list(leaves(whole))), STRANGE)
    def attempt(place: tuple[object, ...], strange: object) -> None:
        data = json.dumps(put(whole, place, strange)).encode()
        path.write_bytes(data)
        (tmp_path / "journal.jsonl").write_bytes(journal)
        with Journal.open(tmp_path / "journal.jsonl") as sealed:
            sealed.append("end", sync=False, standings=hashlib.sha256(data).hexdigest())
        page_or_sentence(tmp_path)

    attempt()


def page_or_sentence(folder: Path) -> None:
    try:
        html = page(folder)
    except BadInput as error:
        html, sentence = "", str(error)
    assert check(html) if html else "\n" not in sentence


def plain(value: Any) -> Any:
    """As the journal writes it: JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
