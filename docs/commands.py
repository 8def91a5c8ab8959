"""The commands that a page shows: its ```bash blocks, and what the comment right above one says of how it is tried.

    <!-- parsed: REASON -->       it is not run by tests, only read
    <!-- run with: FLAGS -->      tests run it with these flags as well, which make it small

A reader of the page sees neither. A block without a comment is run as it stands.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAGES = Path(__file__).parent / "pages"
_BLOCK = re.compile(r"(?:<!-- (?P<how>parsed|run with): (?P<what>.*?) -->\n)?```bash\n(?P<text>.*?)```", re.DOTALL)
_TRAINS = re.compile(r"^( *unbroken (?:train|unlearn) (?:\\\n|[^#&|>\n])*)", re.MULTILINE)
_ENDS = {";", "|", "&", "&&", "||", "do", "done"}
_REDIRECTS = {">", ">>", "<"}


@dataclass(frozen=True)
class Block:
    """Some lines for a shell. `flags` make it small, or are None where it is not run."""

    text: str
    flags: str | None = ""

    @property
    def small(self) -> str:
        """The text with the flags, on what trains."""
        return _TRAINS.sub(rf"\1 {self.flags or ''} ", self.text)

    def words(self) -> Iterator[list[str]]:
        """The words of each command, as a shell reads them; a comment is none."""
        reader = shlex.shlex(
            self.text.replace("\\\n", " ").replace("\n", "\n; "), posix=True, punctuation_chars=";|&<>"
        )
        reader.whitespace_split = True
        found, redirected = list[str](), False
        for word in [*reader, ";"]:
            if word in _ENDS:
                if found:
                    yield found
                found = []
            elif word in _REDIRECTS or redirected:
                redirected = word in _REDIRECTS
            else:
                found.append(word)

    def of_unbroken(self) -> Iterator[list[str]]:
        """The words after `unbroken`, of each command that has it, be it under torchrun."""
        for words in self.words():
            if "unbroken" in words:
                yield words[words.index("unbroken") + 1 :]


def blocks(text: str) -> list[Block]:
    """The blocks of a page, in order."""
    return [
        Block(found["text"], None if found["how"] == "parsed" else found["what"] or "")
        for found in _BLOCK.finditer(text)
    ]


def pages() -> list[Path]:
    """All pages that are written by hand or by a script, in order."""
    return sorted(PAGES.rglob("*.md"))
