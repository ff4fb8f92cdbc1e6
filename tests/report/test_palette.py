"""The colours of the rules can be told apart, also by people who see fewer of them."""

import re
from itertools import combinations
from math import dist
from pathlib import Path

import pytest

from downslope.report import html

# Machado, Oliveira and Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency", table 1, severity 1.0: linear RGB as seen.
SIGHT = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.01182, 0.04294, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.3039),
    ),
}
# Björn Ottosson 2020, "A perceptual color space for image processing": linear RGB, LMS, cube root, Oklab.
LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
OKLAB = (
    (0.2104542553, 0.793617785, -0.0040720468),
    (1.9779984951, -2.428592205, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.808675766),
)
STYLE = (Path(html.__file__).parent / "assets" / "page.css").read_text("utf-8")
HUES = re.findall(r"\.h\d \{ --hue: light-dark\((#\w{6}), (#\w{6})\) \}", STYLE)

Colour = tuple[float, ...]


def linear(code: str) -> Colour:
    channels = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return tuple(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)


def apply(matrix: tuple[Colour, ...], colour: Colour) -> Colour:
    return tuple(sum(m * c for m, c in zip(row, colour, strict=True)) for row in matrix)


def oklab(colour: Colour) -> Colour:
    clipped = tuple(min(1.0, max(0.0, c)) for c in colour)
    return apply(OKLAB, tuple(c ** (1 / 3) for c in apply(LMS, clipped)))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_any_two_rules_can_be_told_apart(theme: int, sight: str) -> None:
    """0.1 in Oklab is five times what an eye just tells apart (about 0.02)."""
    assert len(HUES) == 8
    seen = [oklab(apply(SIGHT[sight], linear(pair[theme]))) for pair in HUES]
    for (i, one), (j, other) in combinations(enumerate(seen), 2):
        assert dist(one, other) > 0.1, (HUES[i][theme], HUES[j][theme])


@pytest.mark.parametrize(("theme", "paper"), [(0, "#ffffff"), (1, "#14171c")], ids=["light", "dark"])
def test_every_line_stands_out_from_the_paper(theme: int, paper: str) -> None:
    """WCAG 1.4.11: 3 : 1 for what is drawn."""
    assert f"--paper: light-dark({', '.join(('#ffffff', '#14171c'))})" in STYLE

    def light(code: str) -> float:
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(code), strict=True)) + 0.05

    for pair in HUES:
        low, high = sorted((light(pair[theme]), light(paper)))
        assert high / low >= 3, pair
