"""`unbroken audit RUN`: whether anything that its requests have forgotten is still in the run folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.config import require
from jobs.rows import read_rows
from jobs.unlearn.audit import audit
from jobs.unlearn.request import requests_of
from jobs.unlearn.update import TURNS_BACK
from recovery.generation import read_generation


@dataclass(frozen=True)
class AuditConfig:
    """Look into every file of a run for what its requests have forgotten; fails if something is there."""

    run: Path = Path("runs/default")
    """The run folder; also the first word: `unbroken audit RUN`."""
    forget: Path | None = None
    """The file of rows that were to be forgotten: their text is searched for, too."""
    json: bool = False
    """Print one JSON object."""


def audit_command(config: AuditConfig) -> tuple[dict[str, Any], str]:
    """What was found. Raises ConfigError, CorpusError, ForgottenError, GenerationError."""
    require((config.run / "ledger.jsonl").is_file(), "run", str(config.run), "a run folder")
    rows = [] if config.forget is None else (read_rows(str(config.forget)) or [])
    require(config.forget is None or bool(rows), "forget", str(config.forget), "a file of rows")
    found = audit(config.run, [row.answer for row in rows])
    open_ones = [each.number for each in requests_of(config.run) if each.status != "complete"]
    values = {
        "generation": read_generation(config.run), "files": found.files, "fenced": found.fenced,
        "findings": [asdict(each) for each in found.findings], "unread": [list(each) for each in found.unread],
        "kept": found.kept,
        "not_complete": open_ones, "ok": found.clean and not open_ones,
    }  # fmt: skip
    lines = [f"generation {values['generation']}, {found.files:,} files looked into"]
    lines += [f"fenced    {path}" for path in found.fenced]
    lines += [f"FOUND     {each.path}: {each.what} ({each.how})" for each in found.findings]
    lines += [f"KEPT      {path}: {TURNS_BACK}" for path in found.kept]
    lines += [f"UNREAD    {path}: {why}" for path, why in found.unread]
    lines += [f"request {number} is not complete: `unbroken unlearn {config.run} --resume`" for number in open_ones]
    nothing = "nothing that was forgotten is left" + (", but for what was kept to be applied again" * bool(found.kept))
    lines.append(nothing if values["ok"] else "something is left, see above")
    return values, "\n".join(lines)
