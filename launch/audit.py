"""`unbroken audit RUN`: whether anything that its requests have forgotten is still in the run folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.config import require
from jobs.documents import DOCUMENTS
from jobs.rows import read_rows
from jobs.text_rows import TextRows
from jobs.unlearn.audit import audit
from jobs.unlearn.guard import Guard
from jobs.unlearn.request import requests_of
from jobs.unlearn.update import TURNS_BACK
from recovery.generation import read_generation


@dataclass(frozen=True)
class AuditConfig:
    """Look into every file of a run for what its requests have forgotten; fails if something is there."""

    run: Path = Path("runs/default")
    """The run folder; also the first word: `unbroken audit RUN`."""
    forget: Path | None = None
    """The file of rows, or of text, that was to be forgotten: its answers, or its whole texts, are searched for."""
    json: bool = False
    """Print one JSON object."""


def audit_command(config: AuditConfig) -> tuple[dict[str, Any], str]:
    """What was found. Raises ConfigError, CorpusError, ForgottenError, GenerationError."""
    require((config.run / "ledger.jsonl").is_file(), "run", str(config.run), "a run folder")
    found = audit(config.run, [] if config.forget is None else _texts(config.run, config.forget))
    open_ones = [each.number for each in requests_of(config.run) if each.status != "complete"]
    guard = Guard.read(config.run / "model")
    values = {
        "generation": read_generation(config.run), "files": found.files, "fenced": found.fenced,
        "findings": [asdict(each) for each in found.findings], "unread": [list(each) for each in found.unread],
        "not_complete": open_ones, "guarded": None if guard is None else guard.method, "kept": found.kept,
        "ok": found.clean and not open_ones,
    }  # fmt: skip
    lines = [f"generation {values['generation']}, {found.files:,} files looked into"]
    lines += [f"fenced    {path}" for path in found.fenced]
    if guard is not None:
        told = f"its weights still know what {guard.method} suppresses, and say it without the guard"
        lines.append(f"guarded   model: {told}")
    lines += [f"FOUND     {each.path}: {each.what} ({each.how})" for each in found.findings]
    lines += [f"KEPT      {path}: {TURNS_BACK}" for path in found.kept]
    lines += [f"UNREAD    {path}: {why}" for path, why in found.unread]
    lines += [f"request {number} is not complete: `unbroken unlearn {config.run} --resume`" for number in open_ones]
    nothing = "nothing that was forgotten is left" + (", but for what was kept to be applied again" * bool(found.kept))
    lines.append(nothing if values["ok"] else "something is left, see above")
    return values, "\n".join(lines)


def _texts(run: Path, path: Path) -> list[str]:
    """What the file of somebody who asks says: answers, or texts as they stand. Raises ConfigError, CorpusError."""
    if (run / "data" / DOCUMENTS).is_file():
        said = TextRows.open(run / "data").read(path)
        require(said is not None, "forget", str(path), "a file of the text itself: this one has names in it")
        return [each.text for each in said or ()]
    rows = read_rows(str(path)) or []
    require(bool(rows), "forget", str(path), "a file of rows")
    return [row.answer for row in rows]
