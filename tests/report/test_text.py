"""Words and numbers on the page."""

import math
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downslope.report.text import clip, number, redact, visible

SECRETS = [
    "https://ann:HUNTER2@host/path",
    "postgres://u:HUNTER2@db:5432/x",
    "API_TOKEN=HUNTER2",
    "aws_secret_access_key: HUNTER2",
    '{"password": "HUNTER2 with spaces"}',
    "PASSWORD='HUNTER2'",
    "HF_TOKEN=HUNTER2 python train.py",
    "Authorization: Bearer HUNTER2abcdef",
    "key hf_HUNTER2HUNTER2",
    "ghp_HUNTER2HUNTER2HUNTER2",
    "github_pat_HUNTER2_HUNTER2",
    "sk-proj-HUNTER2HUNTER2",
    "xoxb-1234-HUNTER2",
    "AKIAHUNTER2HUNTER2",
    "AIzaHUNTER2HUNTER2",
    "glpat-HUNTER2HUNTER2",
    "pypi-HUNTER2HUNTER2",
    "eyJHUNTER2.eyJHUNTER2.HUNTER2",
    "--api-key=HUNTER2",
    "failed: client_secret=HUNTER2, retrying",
]


@settings(deadline=None)
@given(st.text())
def test_no_character_that_is_shown_is_hidden_or_reorders_the_others(text: str) -> None:
    shown = visible(text)
    bad = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert not [c for c in shown if unicodedata.category(c) in bad and c not in "\n\t"]
    assert visible(shown) == shown


@pytest.mark.parametrize(
    "text", ["\x00", "\x1b[31m", "\u202e", "\u2066", "\u200b", "\ufeff", "\u2028", "\ud800", "\r"]
)
def test_a_hidden_character_is_shown_as_its_code(text: str) -> None:
    assert f"[U+{ord(text[0]):04X}]" in visible(text)


def test_letters_of_every_script_stay() -> None:
    assert visible("naïve Größe 学習率 η → 0") == "naïve Größe 学習率 η → 0"


@pytest.mark.parametrize("text", SECRETS)
def test_what_looks_like_a_secret_is_hidden(text: str) -> None:
    assert "HUNTER2" not in redact(text)


@pytest.mark.parametrize(
    "text", ["the loss is not finite", "IndexError: index 3 is out of range", "lr=0.003", "keyboard"]
)
def test_ordinary_words_are_not_hidden(text: str) -> None:
    assert redact(text) == text


@settings(deadline=None)
@given(st.floats(-1e307, 1e307) | st.sampled_from([math.inf, -math.inf, math.nan]))
def test_every_number_is_written_and_reads_back(value: float) -> None:
    text = number(value)
    plain = text.replace("−", "-").replace("∞", "inf").replace("not a number", "nan")
    back = float(plain)
    if value == value and abs(value) != float("inf"):
        assert back == pytest.approx(value, rel=6e-3, abs=1e-320)
    else:
        assert str(back) == str(value)


@settings(deadline=None)
@given(st.text(), st.integers(2, 50))
def test_a_clipped_text_is_short_and_begins_alike(text: str, length: int) -> None:
    short = clip(text, length)
    assert len(short) <= length
    assert short == text or (short.endswith("…") and text.startswith(short[:-1]))
