"""Draws the pictures of the pages by the commands on the pages: `python -m docs.pictures`, in the repository's root.

A page shows `unbroken draw ... --out NAME.svg` and ![...](../images/NAME.svg), or `unbroken plan ... --out NAME` and
![...](../images/NAME-timeline.svg), which is timeline.svg in that folder. Measured pictures are in benchmarks/results.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

from docs.commands import PAGES, blocks, pages
from launch.cli import main

ROOT = Path(__file__).resolve().parents[1]
IMAGES = PAGES / "images"


def commands() -> dict[str, list[str]]:
    """What a command of a page writes (a file, or a folder) -> the words of the command, where the page shows it."""
    found = dict[str, list[str]]()
    for page in pages():
        text = page.read_text()
        for block in blocks(text):
            for words in block.of_unbroken():
                if words[0] in ("draw", "plan") and "--out" in words:
                    out = words[words.index("--out") + 1]
                    if f"images/{out.removesuffix('.svg')}" in text:
                        found[out] = words
    return found


def drawn(names: tuple[str, ...] = ("draw", "plan")) -> dict[str, bytes]:
    """The name of each picture of these commands -> it. Raises RuntimeError for a command that fails."""
    found, here = dict[str, bytes](), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(ROOT / "benchmarks", Path(folder, "benchmarks"))
        os.chdir(folder)
        try:
            for out, words in commands().items():
                if words[0] not in names:
                    continue
                with contextlib.redirect_stdout(io.StringIO()):
                    code = main(words)
                if code:
                    raise RuntimeError(f"unbroken {' '.join(words)} ended with {code}")
                made = Path(out)
                for path in [made] if made.is_file() else sorted(made.glob("*.svg")):
                    found["-".join(path.parts)] = path.read_bytes()
        finally:
            os.chdir(here)
    return found


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for old in IMAGES.glob("*.svg"):
        old.unlink()
    for name, picture in drawn().items():
        (IMAGES / name).write_bytes(picture)
    print(f"{len(commands())} commands drew {len(list(IMAGES.glob('*.svg')))} pictures in {IMAGES}")
    sys.exit(0)
