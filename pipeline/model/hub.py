"""Models by their id at Hugging Face, such as HuggingFaceTB/SmolLM2-135M: those that are on this machine already.

Nothing here asks a network: a run must not wait for one, and each of its machines would. What is not in the local cache
is refused with the command that puts it there.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

_ID = re.compile(r"(?=.{1,96}$)\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def cached(model: str) -> Path | None:
    """The directory in the local cache of the model whose id that is, as it was downloaded last; None where it is not
    there. A path that exists is no id."""
    if not _ID.fullmatch(model) or Path(model).exists():
        return None
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def how_to_have(model: str) -> str:
    """What to say of an id that is not in the cache, or not whole; "" for what is none."""
    if not _ID.fullmatch(model) or "/" not in model:
        return ""
    return (
        f"; as an id it needs the files in the local cache of Hugging Face ({constants.HF_HUB_CACHE}): "
        f"`hf download {model}` puts them there"
    )
