"""Which rows a request means: by id, by what a field says, or by a file; and why a request is refused.

author=Basil Mahfouz        the rows whose field `author` says so
id:author-007/13,author-008/2
FILE                        JSON of rows, known again by their content; or a text file with an id on each line
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.config import ConfigError
from jobs.files import CorpusError
from jobs.row_data import RowDataset, RowInfo
from jobs.rows import read_rows

AUTO = "auto"
"""All rows that are trained on and are not to be forgotten."""
_NEAR, _TOLD = 3, 5


def select(dataset: RowDataset, asked: str, name: str) -> list[int]:
    """The indices of the rows that `asked` means, ascending. `name` is what the setting is called. Raises ConfigError
    for what means no row, or one that has been forgotten before; CorpusError for a file that cannot be read."""
    path = Path(asked).expanduser()
    if asked.startswith("id:"):
        found = _by_id(dataset, [id.strip() for id in asked.removeprefix("id:").split(",") if id.strip()], asked, name)
    elif _is_file(path):
        found = _by_file(dataset, path, name)
    elif "=" in asked:
        found = _by_field(dataset, asked, name)
    else:
        found = _by_id(dataset, [asked], asked, name)
    if blank := [dataset.rows[index].id for index in found if dataset.rows[index].blank]:
        raise ConfigError(
            f"{name} is {asked!r}, of which {_some(blank)} has been forgotten before; allowed: other rows"
        )
    if not found:
        raise ConfigError(f"{name} is {asked!r}, which means no row; allowed: at least one")
    return sorted(set(found))


def field_of(asked: str) -> str:
    """The field by which `asked` selects rows; "" where it does so in another way."""
    if asked.startswith("id:") or _is_file(Path(asked).expanduser()) or "=" not in asked:
        return ""
    return asked.partition("=")[0].strip()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _by_id(dataset: RowDataset, ids: Sequence[str], asked: str, name: str) -> list[int]:
    known = {row.id: row.index for row in dataset.rows}
    if missing := [id for id in ids if id not in known]:
        raise ConfigError(
            f"{name} is {asked!r}; the run has no row with the id {_some(missing)}{_near(missing[0], known)}; allowed: "
            "ids of its rows, id:A,B, FIELD=VALUE, or a file of rows or of ids"
        )
    return [known[id] for id in ids]


def _by_field(dataset: RowDataset, asked: str, name: str) -> list[int]:
    field, _, value = asked.partition("=")
    field, value = field.strip(), value.strip()
    found = [row.index for row in dataset.rows if row.fields.get(field) == value]
    if not found:
        values = {row.fields[field] for row in dataset.rows if field in row.fields}
        fields = sorted({key for row in dataset.rows for key in row.fields})
        told = (
            f"no row says so in its field {field!r}{_near(value, values)}"
            if values else f"no row has a field {field!r}; their fields: {', '.join(fields) or 'none'}"
        )  # fmt: skip
        raise ConfigError(f"{name} is {asked!r}; {told}")
    return found


def _by_file(dataset: RowDataset, path: Path, name: str) -> list[int]:
    rows = read_rows(str(path))
    if rows is None:
        try:
            ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"{name} is {str(path)!r}, which cannot be read: {error}") from error
        return _by_id(dataset, ids, str(path), name)
    known: dict[str, list[int]] = {}
    for row in dataset.rows:
        known.setdefault(row.digest, []).append(row.index)
    if missing := [row for row in rows if row.digest not in known]:
        raise ConfigError(
            f"{name} is {str(path)!r}, of whose {len(rows):,} rows {len(missing):,} are none of the run's, by their "
            f"content; the first: {_first(missing[0].text)}{_same_id(dataset, missing[0].id)}"
        )
    return [index for row in rows for index in known[row.digest]]


def _first(text: str) -> str:
    return repr(text[:60] + ("..." if len(text) > 60 else ""))


def _same_id(dataset: RowDataset, id: str) -> str:
    found = [row for row in dataset.rows if row.id == id]
    return f" (a row of the run has its id, {id!r}, and another content)" if found else ""


def require_forgettable(
    dataset: RowDataset, forget: Sequence[int], retain: Collection[int], seen: Collection[int], asked: str
) -> None:
    """Raise ConfigError for rows to forget that are all there are, that are to be kept as well, or that the run has
    never been trained on."""
    rest = [row.index for row in dataset.rows if not row.blank and row.index not in set(forget)]
    if not rest:
        raise ConfigError(f"forget is {asked!r}, which means all {len(forget):,} rows of the run; allowed: fewer")
    if both := sorted(set(forget) & set(retain)):
        ids = [dataset.rows[index].id for index in both]
        raise ConfigError(f"forget and retain have {len(both):,} rows in common: {_some(ids)}; allowed: none")
    if never := [dataset.rows[index].id for index in forget if index not in seen]:
        raise ConfigError(
            f"forget is {asked!r}, of which {len(never):,} rows are in no step of the run's ledger: {_some(never)}; "
            f"it has been trained on {len(seen):,} of its {len(dataset.rows):,} rows, and cannot forget the others"
        )


def rest_of(dataset: RowDataset, forget: Collection[int], seen: Collection[int]) -> list[int]:
    """What `retain = auto` means: the rows that the run was trained on and is to keep."""
    without = set(forget)
    return [row.index for row in dataset.rows if not row.blank and row.index not in without and row.index in seen]


def seen_rows(dataset: RowDataset, ledger: Iterable[Mapping[str, Any]]) -> frozenset[int]:
    """The rows that the committed steps were made of, by the lines of a ledger that stand."""
    found: set[int] = set()
    for line in ledger:
        first, count = int(line["first_sample"]), int(line["samples"])
        if len(found) == sum(not row.held_out or not dataset.held_out_share for row in dataset.rows):
            break
        for sample in range(first, first + count):
            found.update(dataset.rows_of(sample))
    return frozenset(found)


def samples_of(dataset: RowDataset, rows: Collection[int], last: int) -> frozenset[int]:
    """The ids of the training samples below `last` that have one of these rows."""
    wanted = set(rows)
    return frozenset(sample for sample in range(last) if not wanted.isdisjoint(dataset.rows_of(sample)))


def described(rows: Iterable[RowInfo]) -> list[dict[str, str]]:
    """Rows as a request keeps them: by id and digest, without what they say."""
    return [{"id": row.id, "digest": row.digest} for row in rows]


def _near(asked: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(asked, list(known), n=_NEAR, cutoff=0.5)
    return f"; near: {', '.join(map(repr, found))}" if found else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _TOLD:,} more" if len(names) > _TOLD else ""
    return ", ".join(map(repr, names[:_TOLD])) + more
