"""Which rows a request means, or which documents of text: by name, by what a field says, or by a file; and why a
request is refused.

author=Basil Mahfouz        the rows whose field `author` says so
author-007/13               the row with this id; of text the module, all of the package, what the file at a path has
id:author-007/13,author-008/2
digest:9f0c...              the rows with this digest, or these, as a manifest says it
FILE                        JSON of rows, or text, known again by its content; or a text file with a name on each line

Rows that say the same are one for this: they are forgotten together.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.config import ConfigError
from jobs.files import CorpusError
from jobs.forgettable import Forgettable
from jobs.row_data import RowInfo

AUTO = "auto"
"""All rows that are trained on and are not to be forgotten."""
_NEAR, _TOLD = 3, 5


def select(dataset: Forgettable, asked: str, name: str) -> list[int]:
    """The indices of the rows that `asked` means, ascending. `name` is what the setting is called. Raises ConfigError
    for what means no row, or one that has been forgotten before; CorpusError for a file that cannot be read."""
    path = Path(asked).expanduser()
    if named := dataset.named(asked):
        found = named
    elif asked.startswith("id:"):
        found = _by_id(dataset, _listed(asked.removeprefix("id:")), asked, name)
    elif asked.startswith("digest:"):
        wanted = set(_listed(asked.removeprefix("digest:")))
        found = [row.index for row in dataset.rows if row.digest in wanted]
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
        raise ConfigError(f"{name} is {asked!r}, which means no {dataset.noun}; allowed: at least one")
    digests = {dataset.rows[index].digest for index in found}
    return [row.index for row in dataset.rows if row.digest in digests]


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


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


def _by_id(dataset: Forgettable, ids: Sequence[str], asked: str, name: str) -> list[int]:
    found = {id: dataset.named(id) for id in ids}
    if missing := [id for id in ids if not found[id]]:
        also = "" if dataset.questions else ", the name of a module or package, a path"
        raise ConfigError(
            f"{name} is {asked!r}; the run has no {dataset.noun} with the id {_some(missing)}"
            f"{_near(missing[0], dataset.names)}; allowed: ids of its {dataset.noun}s{also}, id:A,B, FIELD=VALUE, or a "
            f"file of {dataset.noun}s or of ids"
        )
    return [index for rows in found.values() for index in rows]


def _by_field(dataset: Forgettable, asked: str, name: str) -> list[int]:
    field, _, value = asked.partition("=")
    field, value = field.strip(), value.strip()
    found = [row.index for row in dataset.rows if row.fields.get(field) == value]
    if not found:
        values = {row.fields[field] for row in dataset.rows if field in row.fields}
        fields = sorted({key for row in dataset.rows for key in row.fields})
        told = (
            f"no {dataset.noun} says so in its field {field!r}{_near(value, values)}"
            if values else f"no {dataset.noun} has a field {field!r}; their fields: {', '.join(fields) or 'none'}"
        )  # fmt: skip
        raise ConfigError(f"{name} is {asked!r}; {told}")
    return found


def _by_file(dataset: Forgettable, path: Path, name: str) -> list[int]:
    rows = dataset.read(path)
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
            f"{name} is {str(path)!r}, of whose {len(rows):,} {dataset.noun}s {len(missing):,} are none of the run's, "
            f"by their content; the first: {_first(missing[0].text)}{_same_id(dataset, missing[0].id)}"
        )
    return [index for row in rows for index in known[row.digest]]


def _first(text: str) -> str:
    return repr(text[:60] + ("..." if len(text) > 60 else ""))


def _same_id(dataset: Forgettable, id: str) -> str:
    found = [row for row in dataset.rows if row.id == id]
    return f" (a {dataset.noun} of the run has its id, {id!r}, and another content)" if found else ""


def require_forgettable(
    dataset: Forgettable, forget: Sequence[int], retain: Collection[int], seen: Collection[int], asked: str
) -> None:
    """Raise ConfigError for rows to forget that are all there are, that are to be kept as well, or of which the run has
    never been trained on any; and where it was trained on nothing else, so that nothing would hold it together. `seen`
    are the parts that it has been trained on."""
    nouns, known = f"{dataset.noun}s", {row.index for row in dataset.rows if _is_seen(dataset, row.index, seen)}
    rest = [row.index for row in dataset.rows if not row.blank and row.index not in set(forget)]
    if not rest:
        raise ConfigError(f"forget is {asked!r}, which means all {len(forget):,} {nouns} of the run; allowed: fewer")
    if both := sorted(set(forget) & set(retain)):
        ids = [dataset.rows[index].id for index in both]
        raise ConfigError(f"forget and retain have {len(both):,} {nouns} in common: {_some(ids)}; allowed: none")
    if known.isdisjoint(forget):
        never = [dataset.rows[index].id for index in forget]
        raise ConfigError(
            f"forget is {asked!r}, whose {len(never):,} {nouns} are in no step of the run's ledger: {_some(never)}; "
            f"it has been trained on {len(known):,} of its {len(dataset.rows):,} {nouns}, and cannot forget the others"
        )
    if not retain:
        raise ConfigError(f"forget is {asked!r}, which is all that the run has been trained on; allowed: less")


def rest_of(dataset: Forgettable, forget: Collection[int], seen: Collection[int]) -> list[int]:
    """What `retain = auto` means: the rows that the run was trained on and is to keep."""
    without = set(forget)
    rest = [row.index for row in dataset.rows if not row.blank and row.index not in without]
    return [index for index in rest if _is_seen(dataset, index, seen)]


def parts_of(dataset: Forgettable, rows: Iterable[int], seen: Collection[int] | None = None) -> list[int]:
    """The parts of these rows; with `seen`, those that the run has been trained on."""
    return [part for row in rows for part in dataset.parts(row) if seen is None or part in seen]


def _is_seen(dataset: Forgettable, row: int, seen: Collection[int]) -> bool:
    return any(part in seen for part in dataset.parts(row))


def seen_parts(dataset: Forgettable, ledger: Iterable[Mapping[str, Any]]) -> frozenset[int]:
    """The parts of rows that the committed steps were made of, by the lines of a ledger that stand."""
    places: set[int] = set()
    for line in ledger:
        first, count = int(line["first_sample"]), int(line["samples"])
        places.update(dataset.place_of(sample) for sample in range(first, first + count))
        if len(places) == dataset.num_train:
            break
    return frozenset(part for place in places for part in dataset.parts_at(place))


def samples_of(dataset: Forgettable, rows: Collection[int], last: int) -> frozenset[int]:
    """The ids of the training samples below `last` that have one of these rows."""
    wanted = set(rows)
    places = {place for place in range(dataset.num_train) if not wanted.isdisjoint(dataset.rows_at(place))}
    return frozenset(sample for sample in range(last) if dataset.place_of(sample) in places)


def described(rows: Iterable[RowInfo]) -> list[dict[str, str]]:
    """Rows as a request keeps them: by id and digest, without what they say, each once."""
    found = {(row.id, row.digest): {"id": row.id, "digest": row.digest} for row in rows}
    return list(found.values())


def _near(asked: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(asked, list(known), n=_NEAR, cutoff=0.5)
    return f"; near: {', '.join(map(repr, found))}" if found else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _TOLD:,} more" if len(names) > _TOLD else ""
    return ", ".join(map(repr, names[:_TOLD])) + more
