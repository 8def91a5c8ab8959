"""Bytes, a BPE trained on the corpus, or one that is there: always a tokenizer that transformers can save and load.

Both that are made here are byte level, as GPT-2's is: every text has tokens, and they decode to the same text. Their
end of text and their padding are two tokens, since an embedding never learns the row of its padding. Words are cut by
Qwen2's pattern, since transformers uses that one (and NFC) beside a Qwen2 config, whatever the tokenizer's own was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

from tokenizers import Regex, Tokenizer, __version__, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jobs.cache import Cache
from jobs.corpus import permutation
from jobs.files import CorpusError
from jobs.pieces import Texts, pieces
from pipeline.names import did_you_mean

END, PAD = "<|endoftext|>", "<|pad|>"
TOKENIZERS = ("bytes", "bpe", "model")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SAMPLE_CHARACTERS = 4_000_000
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

Progress = Callable[[str, float], None]
"""(what is being done, share done from 0 to 1)."""


class TokenizerError(ValueError):
    """A tokenizer that cannot be had: names what was asked, what was found and what is allowed."""


def build_tokenizer(
    kind: str, vocabulary: int, texts: Texts, model_dir: Path | None = None, progress: Progress | None = None,
    cache: Cache | None = None,
) -> PreTrainedTokenizerBase:  # fmt: skip
    """`bytes` (one token per byte), `bpe` (at most `vocabulary` tokens, trained on `texts`), `model` (of `model_dir`),
    or the one in the directory that `kind` names, such as another run's.

    Training reads a fixed random sample of `texts` of at most 4 million characters, and gives the same tokenizer each
    time, so that `cache` may have it from another run; a small corpus may give fewer tokens than asked for. Raises
    TokenizerError, or CorpusError from `texts`.
    """
    if kind == "model":
        return _of_model(model_dir)
    if kind not in TOKENIZERS:
        if not Path(kind).is_dir():
            near = did_you_mean(kind, TOKENIZERS)
            raise TokenizerError(f"tokenizer is {kind!r}; allowed: {', '.join(TOKENIZERS)}, or a directory{near}")
        return _saved_in(Path(kind), f"tokenizer is {kind!r}, which")
    alphabet = {character: byte for byte, character in enumerate(_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "bpe":
        tokenizer = _trained(tokenizer, vocabulary, texts, progress or (lambda what, share: None), cache or Cache())
    tokenizer.add_special_tokens([END, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, by byte (GPT-2's table: printable ones are
    themselves, the others follow from 256 on)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _trained(tokenizer: Tokenizer, vocabulary: int, texts: Texts, progress: Progress, cache: Cache) -> Tokenizer:
    """A tokenizer like this one, trained on a sample of the texts, now or by another run."""
    specials = len((END, PAD))
    if vocabulary < 256 + specials:
        raise TokenizerError(
            f"vocabulary is {vocabulary}; allowed for a bpe: {256 + specials} or more, 1 per byte and 2"
        )
    sample = _sample(texts)
    key = _key(tokenizer, vocabulary, sample)
    with BytesIO() as kept:
        if cache.take("tokenizer", key, kept) is not None:
            return Tokenizer.from_str(kept.getvalue().decode())
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=vocabulary - specials, initial_alphabet=_alphabet(), show_progress=False
    )
    progress("training the tokenizer", 0.0)
    tokenizer.train_from_iterator(_told(sample, progress), trainer)
    progress("training the tokenizer", 1.0)
    cache.put("tokenizer", key, {}, BytesIO(tokenizer.to_str().encode()))
    return tokenizer


def _sample(texts: Texts) -> list[str]:
    """Whole documents of the corpus in an order that is always the same, up to the sample's size."""
    left, sample = _SAMPLE_CHARACTERS, list[str]()
    for index in permutation(len(texts), key=0):
        taken = list[str]()
        for piece, _ in pieces(texts, int(index)):
            taken.append(piece[:left])
            left -= len(taken[-1])
            if not left:
                break
        sample.append("".join(taken))
        if not left:
            break
    if left == _SAMPLE_CHARACTERS:
        raise CorpusError("the corpus holds no text to train a tokenizer on; allowed: text, or tokenizer bytes")
    return sample


def _told(sample: list[str], progress: Progress) -> Iterator[str]:
    done = 0
    for text in sample:
        yield text
        done += len(text)
        progress("training the tokenizer", 0.9 * done / _SAMPLE_CHARACTERS)


def _key(tokenizer: Tokenizer, vocabulary: int, sample: list[str]) -> str:
    """A hash of everything that decides what training gives."""
    about = [__version__, vocabulary, len(sample), tokenizer.to_str()]
    digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
    for text in sample:
        digest.update(hashlib.blake2b(text.encode()).digest())
    return digest.hexdigest()


def _of_model(model_dir: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory."""
    if model_dir is None:
        raise TokenizerError("tokenizer is 'model', but a built-in model has none; allowed: bytes, bpe")
    return _saved_in(model_dir, f"tokenizer is 'model', but {str(model_dir)!r}")


def _saved_in(folder: Path, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a folder; `where` is how messages begin."""
    if not any((folder / name).is_file() for name in _FILES):  # transformers would make an empty one up
        raise TokenizerError(f"{where} holds none of {', '.join(_FILES)}; allowed: bytes, bpe")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers has many kinds of errors for files that it cannot read
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TokenizerError(f"{where} holds one that does not load: {told}; allowed: bytes, bpe") from error
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"{where} holds one without an end-of-text token, which joins documents; allowed: bytes, bpe"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
