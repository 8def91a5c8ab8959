"""Writes the pages of settings from the settings themselves: `python -m docs.reference`, after any of them has changed.

A command's settings are one dataclass, made of groups that are each declared beside what owns them. A page has a table
for each group; a command that shares the groups of `train` has its own ones alone, and a link. A test compares.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from launch.cli import COMMANDS
from pipeline.settings import Within, bounds_of, declared

FOLDER = Path(__file__).parent / "pages" / "reference"
_WRITTEN = "<!-- Written by docs/reference.py from the settings' own texts: do not edit. -->"


def pages() -> dict[str, str]:
    """The name of each page -> its text."""
    shared = _groups(COMMANDS["train"].load()[0])
    found = {f"{name}.md": _page(name, shared if name != "train" else ()) for name in COMMANDS}
    return {"index.md": _index(), **found}


def _index() -> str:
    rows = [f"| [`unbroken {name}`]({name}.md) | {each.summary} |" for name, each in COMMANDS.items()]
    return "\n".join([
        "# Settings", _WRITTEN, "",
        "Every setting of every command, with its default and what it may be. `unbroken COMMAND --help` says the same.",
        "",
        "Settings come from their defaults, then from `--config FILE.toml`, then from flags. In a file they stand at",
        "the top, as `name = value`, with dashes or underscores. A switch is `--name` or `--no-name`.",
        "",
        "| command | what it does |", "| --- | --- |", *rows, "",
    ])  # fmt: skip


def _page(name: str, shared: tuple[type, ...]) -> str:
    command = COMMANDS[name]
    settings = command.load()[0]
    own = [group for group in _groups(settings) if group not in shared]
    lines = [f"# unbroken {name}", _WRITTEN, "", " ".join((settings.__doc__ or "").split()), ""]
    if command.first:
        lines += [f"The first word may be `--{command.first}` without its name: `unbroken {name} RUN`.", ""]
    if len(own) < len(_groups(settings)):
        lines += ["All settings of [train](train.md) hold as well.", ""]
    for group in own:
        lines += _table(group, settings, alone=len(own) == 1)
    return "\n".join(lines)


def _groups(settings: type) -> list[type]:
    """The dataclasses that declare its settings, in order."""
    return [each for each in settings.__mro__ if is_dataclass(each) and declared(each)]


def _table(group: type, settings: type, *, alone: bool) -> list[str]:
    texts, hints, bounds = texts_of(group), get_type_hints(settings), bounds_of(settings)
    heading = [] if alone else [f"## {_title(group)}", ""]
    rows = [
        f"| {_flag(name, hints[name])} | {_default(default)} | {_allowed(hints[name], bounds.get(name))} "
        f"| {_cell(texts[name])} |"
        for name, default in declared(group).items()
    ]
    return [*heading, "| setting | default | allowed | what it does |", "| --- | --- | --- | --- |", *rows, ""]


def texts_of(group: type) -> Mapping[str, str]:
    """Field -> the text below it, of a dataclass of settings."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(tree.body, tree.body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }  # fmt: skip


def _title(group: type) -> str:
    """What a group's docstring says first; a group of one system is called by it."""
    return " ".join((group.__doc__ or group.__name__).split()).partition(". ")[0].rstrip(".")


def _flag(name: str, hint: Any) -> str:
    dashed = name.replace("_", "-")
    return f"`--{dashed}`" + (f", `--no-{dashed}`" if hint is bool else "")


def _default(value: Any) -> str:
    if value is None or value == "":
        return "unset"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"`{value}`"


def _allowed(hint: Any, bounds: Within | None) -> str:
    if bounds is not None:
        return str(bounds)
    kinds = [each for each in (get_args(hint) or (hint,)) if each is not type(None)]
    if get_origin(hint) is Literal:
        return ", ".join(f"`{each}`" for each in kinds)
    return {bool: "on, off", Path: "a path", str: "text", int: "a number", float: "a number"}.get(kinds[0], "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Write the pages, and remove those of commands that are gone."""
    texts = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (FOLDER / name).write_text(text)
    print(f"{len(texts)} pages in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
