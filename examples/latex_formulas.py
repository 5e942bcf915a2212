"""Formulas made in code: what they are in LaTeX, how they are read aloud, and their pictures.

One picture has exactly one LaTeX: braces stand around every argument and nowhere else, and blanks around operators.
"""

from __future__ import annotations

import functools
import multiprocessing
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from PIL import Image

LETTERS = "abcdkmnpstxyz"
GREEK = ("alpha", "beta", "gamma", "theta", "lambda", "pi", "sigma", "omega")
DIGITS = "123456789"
FUNCTIONS = {"sin": "sine", "cos": "cosine", "log": "logarithm"}
OPERATORS = {"+": "plus", "-": "minus", "=": "equals"}


class Page(NamedTuple):
    """What formulas are written on: pixels of a picture, and of the font's em."""

    width: int
    height: int
    font_size: int


class Formula(NamedTuple):
    latex: str
    spoken: str


def expression(rng: random.Random, *, terms: int, nested: bool) -> Formula:
    """Up to so many terms between operators. `nested` puts sums into fractions and under roots, else single symbols."""
    found = _term(rng, nested)
    for _ in range(rng.randint(0, terms - 1)):
        found = _joined(found, rng.choice(list(OPERATORS)), _term(rng, nested))
    return found


def _term(rng: random.Random, nested: bool) -> Formula:
    kind = rng.random()
    if kind < 0.4:
        return _argument(rng, nested=False) if kind < 0.2 else _flat(rng)
    argument = functools.partial(_argument, rng, nested)
    return _fraction(argument(), argument()) if kind < 0.7 else _root(argument())


def _argument(rng: random.Random, nested: bool) -> Formula:
    if not nested:
        return _symbol(rng, LETTERS, GREEK, DIGITS)
    # No power or index: in a fraction they would be a few pixels high.
    one, other = (_flat(rng, scripts=False) if rng.random() < 0.3 else _argument(rng, False) for _ in range(2))
    return one if rng.random() < 0.4 else _joined(one, rng.choice("+-"), other)


def _flat(rng: random.Random, scripts: bool = True) -> Formula:
    """A function of a symbol, a product of two, or one with another as its power or index."""
    kind, base = rng.randrange(0 if scripts else 2, 4), _symbol(rng, LETTERS, GREEK)
    if kind == 2:
        name = rng.choice(list(FUNCTIONS))
        return Formula(f"\\{name} {base.latex}", f"{FUNCTIONS[name]} of {base.spoken}")
    if kind == 3:
        factor = rng.choice(DIGITS)
        return Formula(f"{factor} {base.latex}", f"{factor} times {base.spoken}")
    small = _symbol(rng, LETTERS, GREEK, DIGITS)
    sign, word = (("^", "to the"), ("_", "sub"))[kind]
    return Formula(f"{base.latex}{sign}{{{small.latex}}}", f"{base.spoken} {word} {small.spoken}")


def symbols() -> list[Formula]:
    return [_named(name) for name in (*LETTERS, *GREEK, *DIGITS)]


def _symbol(rng: random.Random, *alphabets: Sequence[str]) -> Formula:
    return _named(rng.choice(rng.choice(alphabets)))


def _named(name: str) -> Formula:
    return Formula(name if len(name) == 1 else f"\\{name}", name)


def _joined(one: Formula, sign: str, other: Formula) -> Formula:
    return Formula(f"{one.latex} {sign} {other.latex}", f"{one.spoken} {OPERATORS[sign]} {other.spoken}")


def _fraction(top: Formula, bottom: Formula) -> Formula:
    return Formula(f"\\frac{{{top.latex}}}{{{bottom.latex}}}", f"{top.spoken} over {bottom.spoken}")


def _root(inside: Formula) -> Formula:
    return Formula(f"\\sqrt{{{inside.latex}}}", f"root of {inside.spoken}")


def distinct(count: int, seed: int, *, terms: int, nested: bool, without: Iterable[Formula] = ()) -> list[Formula]:
    """`count` different formulas, none of which is in `without`. Errors: `ValueError` where there are too few."""
    rng, excluded, found = random.Random(seed), set(without), {}
    for _ in range(20 * count):
        formula = expression(rng, terms=terms, nested=nested)
        if formula not in excluded:
            found[formula] = None
        if len(found) == count:
            return list(found)
    raise ValueError(f"there are too few formulas of {terms} terms for {count:,}: ask for more terms")


def pictures(formulas: Sequence[Formula], page: Page) -> list[tuple[Formula, Image.Image]]:
    """The formulas that fit on the page, each with a gray picture: black on white, from the left edge on, on one base
    line. Where processes can be forked, every core draws a share."""
    draw = functools.partial(_draw, page=page)
    latex = [formula.latex for formula in formulas]
    if len(latex) < 500 or "fork" not in multiprocessing.get_all_start_methods():
        drawn = list(map(draw, latex))
    else:
        with multiprocessing.get_context("fork").Pool() as pool:
            drawn = pool.map(draw, latex, chunksize=100)
    found = zip(formulas, drawn, strict=True)
    return [(formula, Image.fromarray(pixels)) for formula, pixels in found if pixels is not None]


def _draw(latex: str, page: Page) -> np.ndarray | None:
    """uint8 [height, width], or None where the formula does not fit."""
    raster = _parser().parse(f"${latex}$", dpi=72, prop=FontProperties(size=page.font_size))
    ink = 255 - np.asarray(raster.image, dtype=np.uint8)
    base_line = round(0.65 * page.height) + round(raster.depth)
    room = (base_line - ink.shape[0], page.height - base_line), (0, page.width - ink.shape[1])
    return np.pad(ink, room, constant_values=255) if min(map(min, room)) >= 0 else None


@functools.cache
def _parser() -> MathTextParser:
    return MathTextParser("agg")
