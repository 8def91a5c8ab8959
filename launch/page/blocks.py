"""What a report is made of: sections, each with blocks of a few kinds. How they look is the template's business.

Everything in them is plain text, and is escaped where it is put into the page. Only pictures are markup: they are
drawn here, from numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, what a pointer shows, where it leads, and its looks: "changed", "bad", "good"."""

    text: str
    title: str = ""
    href: str = ""
    looks: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under named columns. `numbers` are the columns that are set to the right; the first column names its row,
    and `anchor` + number of the row is its id, where it is set."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str
    numbers: frozenset[int] = frozenset()
    anchor: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    pairs: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "words"


@dataclass(frozen=True)
class Picture:
    """An SVG file, as base64, and what it shows."""

    data: str
    caption: str
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Share:
    """A part of a bar: its share (0 to 1), and the number that stands beside it."""

    name: str
    share: float
    value: str
    colour: str


@dataclass(frozen=True)
class Bar:
    """Shares of a whole."""

    shares: Sequence[Share]
    caption: str
    kind: ClassVar[str] = "bar"


@dataclass(frozen=True)
class Box:
    """A worker's stay in a strip: `left` and `width` in percent, on a lane."""

    worker: int
    lane: int
    left: float
    width: float
    text: str
    title: str
    ended: bool


@dataclass(frozen=True)
class Strip:
    """Lanes over time, with bands behind them in which nothing was committed, and ticks (percent, text)."""

    lanes: int
    boxes: Sequence[Box]
    bands: Sequence[tuple[float, float, str]]
    ticks: Sequence[tuple[float, str]]
    flags: Sequence[Flag]
    caption: str
    kind: ClassVar[str] = "strip"


@dataclass(frozen=True)
class Flag:
    """A numbered mark over a picture, at `left` percent: a loss, told in the table of them under its number."""

    number: int
    left: float
    title: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when they are asked for."""

    summary: str
    blocks: Sequence[object]
    kind: ClassVar[str] = "fold"


@dataclass(frozen=True)
class Card:
    """A figure that counts, with its name and a line about it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading; `wide` ones take its whole width."""

    key: str
    title: str
    blocks: Sequence[object]
    about: str = ""
    wide: bool = True


@dataclass(frozen=True)
class Sheet:
    """A whole page. `state` is running, done, stopped, failed, broken or compared."""

    title: str
    state: str
    said: str
    about: str
    cards: Sequence[Card] = ()
    sections: Sequence[Section] = ()
    drawn: float = 0.0
    live: bool = False
    more: dict[str, str] = field(default_factory=dict)
