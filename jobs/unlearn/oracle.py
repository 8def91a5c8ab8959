"""The models that never saw what is to be forgotten, by which a result is measured: which ones can be compared.

KL is taken token by token of the vocabulary, so that an oracle must call the same tokens by the same numbers.
"""

from __future__ import annotations

from pathlib import Path

from jobs.config import ConfigError, require
from jobs.tokenizer import TokenizerError, build_tokenizer
from jobs.unlearn.config import UnlearnConfig
from pipeline.model.weights import ModelError, read_config

ORACLE, FLOOR = "oracle", "floor"
"""What the models are called in a report that never saw the rows: the one that others are compared with, and another
one, whose distance from it is the noise floor."""


def check_oracles(config: UnlearnConfig) -> None:
    """Raise ConfigError for an oracle, or a floor, that is no model of the run's vocabulary and tokenizer."""
    for name, folder in (("oracle", config.oracle), ("floor", config.floor)):
        if folder is not None:
            _check(name, folder, config.run)


def _check(name: str, folder: Path, run: Path) -> None:
    try:
        vocabulary, wanted = (int(read_config(each).vocab_size) for each in (folder, run / "model-config"))
        theirs, ours = (build_tokenizer(str(each), 0, ()) for each in (folder, run / "tokenizer"))
    except (ModelError, TokenizerError) as error:
        raise ConfigError(f"{name} is {str(folder)!r}, which cannot be compared with the run: {error}") from error
    require(
        vocabulary == wanted, name, str(folder), f"a model with the run's {wanted} tokens; it has {vocabulary}"
    )  # fmt: skip
    own, known = theirs.get_vocab(), ours.get_vocab()
    other = len(own.items() ^ known.items())
    require(
        not other and theirs.eos_token_id == ours.eos_token_id, name, str(folder),
        f"a model with the run's tokenizer, {str(run / 'tokenizer')!r}; "
        + (f"{other} entries of the two vocabularies differ" if other else "its end token is another"),
    )  # fmt: skip
