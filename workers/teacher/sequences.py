"""Data set rows to token sequences: tokens, loss mask and truncation are decided here, once, for every student.

Three kinds of row, told apart by the columns of the first one: ``messages`` (through the chat template), ``prompt``
and ``response`` (tokenised apart, no template), ``text`` (all of it trained). The tokenizer's own BOS comes first
except before a template, which writes its own; EOS ends a response or text and is trained.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from cache_schema.sequence import TokenSequence
from workers.errors import InputError
from workers.teacher.chat import read_messages, render_chat, render_prompt, up_to_last_user
from workers.teacher.rows import Row, open_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Responses = Literal["dataset", "teacher"]
"""Who writes what is trained: the data set, or the teacher, who is then given the prompt alone."""

RowKind = Literal["messages", "prompt", "text"]

_ROWS_PER_BATCH = 1000  # a fast tokenizer runs the texts of a batch in parallel


@dataclass(frozen=True)
class TokenizedData:
    """A data set as the teacher will read it."""

    sequences: list[TokenSequence]
    """In the order of the rows, each once."""
    name: str
    sha256: str
    """Over the values read, in order: the same for the same file in any folder."""
    num_rows: int
    num_duplicates: int
    """Rows left out because an earlier one gave the same tokens and mask."""
    num_truncated: int
    """Rows cut on the right to ``max_tokens``, duplicates included."""


@dataclass(frozen=True)
class _Example:
    """A row's tokens before truncation."""

    where: str
    input_ids: list[int]  # [T]
    loss_mask: npt.NDArray[np.bool_]  # [T]


def read_sequences(
    data: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_tokens: int,
    responses: Responses,
    max_new_tokens: int,
    limit: int | None,
    split: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizedData:
    """Read and tokenize the first ``limit`` rows of ``data``, all of them if None.

    ``data`` and ``split`` are as in ``open_rows``. With ``responses="teacher"`` a sequence is the prompt alone, has no
    trained token and leaves room for ``max_new_tokens``, which nothing else reads. ``progress`` is called with the
    rows done and their total. Raises InputError with the row, its trouble and the way out.
    """
    source = open_rows(data, split)
    num_rows = source.num_rows if limit is None else min(limit, source.num_rows)
    rows = islice(source.rows, num_rows)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{data} has no rows: there is nothing to tokenize")
    kind = _row_kind(first)
    bos_ids = _bos_ids(tokenizer)
    content = hashlib.sha256()
    sequences: dict[bytes, TokenSequence] = {}
    done = num_truncated = 0
    batch = [first, *islice(rows, _ROWS_PER_BATCH - 1)]
    while batch:
        checked = [_read_row(row, kind, responses) for row in batch]
        for row in checked:
            content.update(_canonical_line(row))
        for example in _tokenize(checked, tokenizer, kind, responses, bos_ids):
            if responses == "dataset":
                num_truncated += len(example.input_ids) > max_tokens
                sequence = _cut(example, max_tokens, source.name)
            else:
                sequence = _with_room(example, max_tokens, max_new_tokens, source.name)
            sequences.setdefault(sequence.sequence_id, sequence)
        done += len(batch)
        if progress is not None:
            progress(done, num_rows)
        batch = list(islice(rows, _ROWS_PER_BATCH))
    return TokenizedData(
        sequences=list(sequences.values()),
        name=source.name,
        sha256=content.hexdigest(),
        num_rows=done,
        num_duplicates=done - len(sequences),
        num_truncated=num_truncated,
    )


# ---- rows ----


def _row_kind(row: Row) -> RowKind:
    if "messages" in row.values:
        return "messages"
    if "prompt" in row.values:
        return "prompt"
    if "text" in row.values:
        return "text"
    raise InputError(
        f"{row.where} has the columns {', '.join(row.values) or '(none)'}: name them `messages`, `prompt` and "
        "`response`, or `text`"
    )


def _read_row(row: Row, kind: RowKind, responses: Responses) -> Row:
    """Return the row with no more than what becomes tokens, and that checked."""
    if kind == "messages":
        messages = read_messages(row.values.get("messages"), row.where)
        if responses == "teacher":
            messages = up_to_last_user(messages, row.where)
        return Row(row.where, {"messages": messages})
    if responses == "teacher":
        return Row(row.where, {kind: _string(row, kind)})
    columns = ("prompt", "response") if kind == "prompt" else ("text",)
    values = {column: _string(row, column) for column in columns}
    if not values[columns[-1]]:
        raise InputError(
            f"{row.where} has an empty `{columns[-1]}`, so nothing to train: drop the row, or let the teacher write "
            "with `--responses teacher`"
        )
    return Row(row.where, values)


def _string(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        found = "no value" if value is None else f"a value of type {type(value).__name__}, not text,"
        raise InputError(f"{row.where} has {found} in column `{column}`: correct or drop the row")
    return value


def _canonical_line(row: Row) -> bytes:
    """Return what a row adds to the hash of the data."""
    line = json.dumps(row.values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    try:
        return line.encode() + b"\n"
    except UnicodeEncodeError:
        raise InputError(
            f"{row.where} has half of a surrogate pair (such as \\ud83d alone), which is no text: correct the row"
        ) from None


# ---- tokens ----


def _tokenize(
    rows: list[Row], tokenizer: "PreTrainedTokenizerBase", kind: RowKind, responses: Responses, bos_ids: list[int]
) -> Iterator[_Example]:
    if responses == "teacher":
        return _prompts(rows, tokenizer, kind, bos_ids)
    if kind == "messages":
        return _conversations(rows, tokenizer)
    return _completions(rows, tokenizer, kind, bos_ids)


def _prompts(
    rows: list[Row], tokenizer: "PreTrainedTokenizerBase", kind: RowKind, bos_ids: list[int]
) -> Iterator[_Example]:
    """Yield what the teacher is to continue, nothing of it trained."""
    if kind == "messages":
        texts = [render_prompt(tokenizer, row.values["messages"], row.where) for row in rows]
        bos_ids = []
    else:
        texts = [row.values[kind] for row in rows]
    for row, ids in zip(rows, _token_ids(tokenizer, texts), strict=True):
        input_ids = bos_ids + ids
        yield _Example(row.where, input_ids, np.zeros(len(input_ids), dtype=np.bool_))


def _completions(
    rows: list[Row], tokenizer: "PreTrainedTokenizerBase", kind: RowKind, bos_ids: list[int]
) -> Iterator[_Example]:
    """Yield prompts with their trained responses; a text is a response to nothing."""
    eos_id: int | None = tokenizer.eos_token_id
    if eos_id is None:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path or 'the teacher'} has no EOS token to end a response with: "
            "set eos_token in its tokenizer_config.json"
        )
    if kind == "prompt":
        prompts = _token_ids(tokenizer, [row.values["prompt"] for row in rows])
        responses = _token_ids(tokenizer, [row.values["response"] for row in rows])
    else:
        prompts = [[] for _ in rows]
        responses = _token_ids(tokenizer, [row.values["text"] for row in rows])
    for row, prompt, response in zip(rows, prompts, responses, strict=True):
        input_ids = [*bos_ids, *prompt, *response, eos_id]
        loss_mask = np.arange(len(input_ids)) >= len(bos_ids) + len(prompt)
        yield _Example(row.where, input_ids, loss_mask)


def _conversations(rows: list[Row], tokenizer: "PreTrainedTokenizerBase") -> Iterator[_Example]:
    """Yield whole conversations, the assistant's turns trained."""
    chats = [render_chat(tokenizer, row.values["messages"], row.where) for row in rows]
    encoded = tokenizer(
        [chat.text for chat in chats], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    for row, chat, ids, offsets in zip(rows, chats, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield _Example(row.where, ids, chat.loss_mask(offsets))


def _token_ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    # verbose: a text longer than the model's context is no news here; truncation comes later.
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _bos_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return what the tokenizer itself puts before a text; what it puts behind, an EOS perhaps, is left out."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [token_id for token_id, _ in takewhile(lambda pair: pair[1] == 1, pairs)]


# ---- lengths ----


def _cut(example: _Example, max_tokens: int, source: str) -> TokenSequence:
    """Cut on the right to ``max_tokens`` and refuse what then has nothing left to train."""
    where = example.where
    # Nothing predicts the first token, so it is never a target, whoever wrote it.
    trained = np.flatnonzero(example.loss_mask[1:]) + 1
    if len(trained) == 0:
        raise InputError(
            f"{where} has no token to train, only a prompt: drop the row, or let the teacher write the response with "
            "`--responses teacher`"
        )
    if trained[0] >= max_tokens:
        raise InputError(
            f"{where} has a prompt of {trained[0]:,} tokens, and max_tokens={max_tokens:,} leaves its response no "
            f"room: raise it with `--set data.max_tokens=N` to more than {trained[0]}, or drop the row"
        )
    loss_mask = example.loss_mask[:max_tokens].copy()
    loss_mask[0] = False
    return TokenSequence(_int32(example.input_ids[:max_tokens]), loss_mask, source)


def _with_room(example: _Example, max_tokens: int, max_new_tokens: int, source: str) -> TokenSequence:
    """Refuse a prompt that is too short to predict from or too long to answer."""
    where, num_tokens = example.where, len(example.input_ids)
    if num_tokens < 2:
        raise InputError(f"{where} has a prompt of {num_tokens} tokens, but a sequence needs two: drop the row")
    if num_tokens + max_new_tokens > max_tokens:
        raise InputError(
            f"{where} has a prompt of {num_tokens:,} tokens, and max_tokens={max_tokens:,} leaves the teacher no room "
            f"for max_new_tokens={max_new_tokens:,}: raise it with `--set data.max_tokens=N` to "
            f"{num_tokens + max_new_tokens} or more, or drop the row"
        )
    return TokenSequence(_int32(example.input_ids), example.loss_mask, source)


def _int32(input_ids: list[int]) -> npt.NDArray[np.int32]:
    return np.array(input_ids, dtype=np.int32)
