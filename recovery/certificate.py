"""The certificate of a view: what every state is by content, on all who hold it, before the view becomes true.

Each worker testifies to what it holds now, to what it has given, and that what it did not take is what it was. One of
them compares all that with the layout and the moves: every state has exactly the holders that the layout wants, all
holders have the same bits, what was copied is what was given, and all count samples and draw random numbers alike. A
copy that is not what was given is made again; anything else ends the run by name, since nobody knows what is right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.state.layer_state import LayerState
from recovery.membership import Move, View
from recovery.remedy import states_of


@dataclass(frozen=True)
class Witness:
    """What one worker says: hashes of the states it `holds` and of those it `gave`, by name, which states are not what
    they were although nobody moved them, and what it counts and draws by."""

    holds: Mapping[str, int]
    gave: Mapping[str, int] = field(default_factory=dict)
    changed: Sequence[str] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, worker: int, held: Mapping[str, LayerState], known: Mapping[str, LayerState], before: Mapping[str, int],
        moves: Sequence[Move], keys: Mapping[str, Any],
    ) -> Witness:  # fmt: skip
        """`held` are the states of a worker now, `known` has those that it has given as well; `before` the hashes of
        those that it had when the view began, empty where all went back. Raises StateChanged where a copy that was kept
        for this is not what it was: there may be no other to compare it with, and it comes from elsewhere."""
        holds = {name: crc for state in held.values() for name, crc in state.fingerprints().items()}
        took = {name for move in moves if move.worker == worker for name in states_of(move.part)}
        gave = {
            name
            for move in moves
            for source, part in move.sources
            if source == worker and part == move.part
            for name in states_of(part) & set(known)  # a layer may own nothing but a shared weight
        }
        given = {name: holds[name] if name in holds else known[name].fingerprint() for name in sorted(gave)}
        now = holds | given  # what was given and is held no more may have had no other holder to compare it with
        for name in {name.split("/")[0] for name in now}:
            known[name].require_intact()
        changed = [
            name for name, was in before.items() if name in now and name.split("/")[0] not in took and now[name] != was
        ]
        return cls(holds, given, changed, keys)


def certify(
    holders: Mapping[str, Sequence[int]], moves: Sequence[Move], votes: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """What all testimonies come to: {"error": why the view must not become true, or "", "again": whether the moves may
    be made once more, "states": state -> its hash and who holds it}. `holders` is what the layout wants, by state;
    `moves` those that copy."""
    states: dict[str, dict[str, Any]] = {}
    for name, wanted in holders.items():
        found = {worker: vote["holds"][name] for worker, vote in sorted(votes.items()) if name in vote["holds"]}
        if sorted(found) != sorted(wanted):
            return _refused(f"state {name} is on workers {sorted(found)}; the layout wants {sorted(wanted)}")
        if wrong := _not_as_given(name, found, moves, votes):
            return {**_refused(wrong), "again": True}
        if len(set(found.values())) > 1:
            return _refused(f"the copies of state {name} differ, by checksum: {found}")
        states[name] = {"hash": next(iter(found.values())), "workers": list(found)}
    for worker, vote in sorted(votes.items()):
        if more := sorted(set(vote["holds"]) - set(holders)):
            return _refused(f"worker {worker} has states {', '.join(more)}, which the layout has not")
        if vote["changed"]:
            return _refused(f"states {', '.join(vote['changed'])} of worker {worker} have changed in the transition")
    keys = {json.dumps(vote["keys"], sort_keys=True): worker for worker, vote in votes.items()}
    if len(keys) > 1:
        return _refused(f"workers do not count or draw alike: {', '.join(f'{w}: {k}' for k, w in keys.items())}")
    return {"error": "", "again": False, "states": states}


def _refused(error: str) -> dict[str, Any]:
    return {"error": error, "again": False, "states": {}}


def _not_as_given(
    name: str, found: Mapping[int, int], moves: Sequence[Move], votes: Mapping[int, Mapping[str, Any]]
) -> str:
    """Who has something else of a state than it was given, if anybody."""
    for move in moves:
        for source, part in move.sources:
            if part == move.part and name in states_of(part) and move.worker in found:
                given = votes.get(source, {"gave": {}})["gave"].get(name)
                if given != found[move.worker]:
                    return f"state {name} is {found[move.worker]} on worker {move.worker}; {source} gave {given}"
    return ""


def write(folder: Path, view: View, step: int, states: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    """Keep the certificate of a view in a run's folder; a disk that fails costs the file."""
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        moves = [asdict(move) for move in view.moves]
        made = {
            "view": view.number, "step": step, "generation": view.generation, "layout": view.layout,
            "workers": list(view.workers), "moves": moves, "rollback": view.rollback, "keys": keys, "states": states,
        }  # fmt: skip
        unfinished = folder / f"view-{view.number:06}.tmp"
        unfinished.write_text(json.dumps(made))
        unfinished.rename(unfinished.with_suffix(".json"))
