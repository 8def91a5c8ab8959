"""Bytes, a BPE trained on the corpus, or the model's own tokenizer: always one that transformers can save and load.

Both that are made here are byte level, as GPT-2's is: every text has tokens, and they decode to the same text. Their
end of text and their padding are two tokens, since an embedding never learns the row of its padding. Words are cut by
Qwen2's pattern, since transformers uses that one (and NFC) beside a Qwen2 config, whatever the tokenizer's own was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jobs.corpus import CorpusError, Texts, permutation

END, PAD = "<|endoftext|>", "<|pad|>"
KINDS = ("bytes", "bpe", "model")
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
    kind: str, vocabulary: int, texts: Texts, model_dir: Path | None = None, progress: Progress | None = None
) -> PreTrainedTokenizerBase:
    """`bytes` (one token per byte), `bpe` (at most `vocabulary` tokens, trained on `texts`), `model` (of `model_dir`).

    Training reads a fixed random sample of `texts` of at most 4 million characters, and gives the same tokenizer each
    time; a small corpus may give fewer tokens than asked for. Raises TokenizerError, or CorpusError from `texts`.
    """
    if kind == "model":
        return _of_model(model_dir)
    if kind not in KINDS:
        raise TokenizerError(f"tokenizer is {kind!r}; allowed: {', '.join(KINDS)}")
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
        _train(tokenizer, vocabulary, texts, progress or (lambda what, share: None))
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


def _train(tokenizer: Tokenizer, vocabulary: int, texts: Texts, progress: Progress) -> None:
    specials = len((END, PAD))
    if vocabulary < 256 + specials:
        raise TokenizerError(
            f"vocabulary is {vocabulary}; allowed for a bpe: {256 + specials} or more, 1 per byte and 2"
        )
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=vocabulary - specials, initial_alphabet=_alphabet(), show_progress=False
    )
    progress("training the tokenizer", 0.0)
    tokenizer.train_from_iterator(_sample(texts, progress), trainer)
    progress("training the tokenizer", 1.0)


def _sample(texts: Texts, progress: Progress) -> Iterator[str]:
    """Whole documents of the corpus in an order that is always the same, up to the sample's size."""
    left = _SAMPLE_CHARACTERS
    for index in permutation(len(texts), key=0):
        text = texts[int(index)][:left]
        left -= len(text)
        yield text
        progress("training the tokenizer", 0.9 * (1 - left / _SAMPLE_CHARACTERS))
        if not left:
            return
    if left == _SAMPLE_CHARACTERS:
        raise CorpusError("the corpus holds no text to train a tokenizer on; allowed: text, or tokenizer bytes")


def _of_model(model_dir: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory."""
    if model_dir is None:
        raise TokenizerError("tokenizer is 'model', but a built-in model has none; allowed: bytes, bpe")
    where = f"tokenizer is 'model', but {str(model_dir)!r}"
    if not any((model_dir / name).is_file() for name in _FILES):  # transformers would make an empty one up
        raise TokenizerError(f"{where} holds none of {', '.join(_FILES)}; allowed: bytes, bpe")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
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
