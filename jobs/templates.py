"""A row as tokens: by the chat template of the tokenizer, or as a question and an answer in plain text.

Prompt and answer are encoded apart, so that the border between them is exact: what a model is asked with when it
answers is, token for token, what it was trained to go on from.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from jobs.files import CorpusError
from jobs.rows import Messages, Row, plain

_SAME_DAY = "{% macro strftime_now(form) %}{{ '26 Jul 2024' if form == '%d %b %Y' else '2024-07-26' }}{% endmacro %}"
"""Goes before templates that ask for today's date: a row has the same tokens on every day."""
_MARKS = range(0xE000, 0xF900)


def encode_row(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The tokens of a row, the end token last, and the index of the first one of its answer.

    Text that spells a special token is text; what the template itself writes is not. Where the template would close
    the answer with the end token, the one at the end is that. Raises CorpusError for a row that the template refuses.
    """
    prompt = encode_prompt(row.prompt, tokenizer, f"row {row.id!r}")
    answer = row.answer if tokenizer.chat_template else f" {row.answer}"
    return [*prompt, *as_text(answer, tokenizer), int(tokenizer.eos_token_id)], len(prompt)  # type: ignore[arg-type]


def encode_prompt(prompt: Messages, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """The tokens after which the answer begins. Raises CorpusError, which names `where`, if the template refuses."""
    if not tokenizer.chat_template:
        return as_text(plain(prompt), tokenizer)
    spelled = _Spelled(prompt, tokenizer)
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _SAME_DAY + template
    try:
        written: Any = tokenizer.apply_chat_template(
            spelled.messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        raise CorpusError(
            f"{where} is refused by the tokenizer's chat template: {error}; allowed: messages as the template takes "
            f"them; found: {', '.join(message['role'] for message in prompt)}"
        ) from error
    ids: list[int] = []
    for number, piece in enumerate(spelled.split(written)):
        ids += as_text(piece, tokenizer) if number % 2 else _ids(piece, tokenizer, specials_are_text=False)
    if not ids:
        raise CorpusError(f"{where}: the tokenizer's chat template writes nothing of it; allowed: a prompt with tokens")
    return ids


class _Spelled:
    """Messages in which whatever spells a special token is marked, so that it is known in what a template writes.

    A mark is the token between two characters for private use that no message has.
    """

    def __init__(self, prompt: Messages, tokenizer: PreTrainedTokenizerBase) -> None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        names = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        found = re.compile("|".join(map(re.escape, names)) or "(?!)")
        said = "".join(message["content"] for message in prompt)
        mark = next(chr(code) for code in _MARKS if chr(code) not in said)
        self._mark = re.compile(f"{mark}(.*?){mark}", re.DOTALL)
        self.messages = [
            {**message, "content": found.sub(rf"{mark}\g<0>{mark}", message["content"])} for message in prompt
        ]

    def split(self, written: str) -> list[str]:
        """What the template has written, cut at the marks: every other piece, from the second on, was marked."""
        return self._mark.split(written)


def as_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Its tokens; what spells a special token is text."""
    return _ids(text, tokenizer, specials_are_text=True)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, *, specials_are_text: bool) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=specials_are_text, verbose=False)
    return list(encoded["input_ids"])  # type: ignore[arg-type]
