"""Conversations as text: what the chat template writes, and which of it the assistant has to learn."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from workers.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""``role`` and ``content``, both text, and whatever else the template reads."""

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the chat template writes it."""

    text: str
    assistant_spans: list[tuple[int, int]]
    """Half-open ranges of characters that the assistant wrote, end-of-turn token included."""

    def loss_mask(self, offsets: list[tuple[int, int]]) -> npt.NDArray[np.bool_]:
        """Return which tokens carry a character of the assistant's, given the characters of each. [T]"""
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        mask = np.zeros(len(offsets), dtype=np.bool_)
        for span_start, span_end in self.assistant_spans:
            # A tokenizer that trims offsets gives a token of spaces the empty range at its end.
            mask |= (ends > span_start) & ((starts < span_end) | (ends <= span_end))
        return mask


def read_messages(value: Any, where: str) -> list[Message]:
    """Return the messages of a row without their empty fields; raise InputError unless each has role and content."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `messages` is not a list of messages: write a list of {{role, content}}")
    for number, message in enumerate(value, start=1):
        for field in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(field), str):
                raise InputError(f"{where}: message {number} of `messages` has no text in `{field}`: correct the row")
    # Parquet gives every message every field that any message has; to a template, a field that is there is meant.
    return [{field: content for field, content in message.items() if content is not None} for message in value]


def up_to_last_user(messages: list[Message], where: str) -> list[Message]:
    """Return the messages the teacher is to answer: those up to the last of the user's."""
    for end in range(len(messages), 0, -1):
        if messages[end - 1]["role"] == "user":
            return messages[:end]
    raise InputError(f"{where}: `messages` has no message of role user to answer: correct or drop the row")


def render_prompt(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], where: str) -> str:
    """Return the text after which the assistant's next turn begins."""
    return _render(tokenizer, messages, where, add_generation_prompt=True).text


def render_chat(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], where: str) -> RenderedChat:
    """Return the whole conversation with the assistant's spans.

    They are the template's own where it marks them (``{% generation %}``). Elsewhere a turn runs from the end of the
    generation prompt before it to its end-of-turn token. Raises InputError where such a template rewrites earlier
    text as a conversation grows, because then no span can be told.
    """
    whole = _render(tokenizer, messages, where, add_generation_prompt=False)
    if _GENERATION_MARKER.search(_template(tokenizer)):
        return whole
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:turn], where, add_generation_prompt=True).text
        through = _render(tokenizer, messages[: turn + 1], where, add_generation_prompt=False).text
        if not (through.startswith(before) and whole.text.startswith(through)):
            raise InputError(
                f"{where}: with message {turn + 1} the chat template does not go on from its own generation prompt, or "
                "later rewrites that message, so the assistant's tokens cannot be told from the rest: put "
                "{% generation %} and {% endgeneration %} around the assistant's text in the template, or give each "
                "turn a row of its own"
            )
        # The model never has to write the line break that a template puts after the end-of-turn token.
        spans.append((len(before), max(len(before), len(through.rstrip()))))
    return RenderedChat(whole.text, spans)


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], where: str, *, add_generation_prompt: bool
) -> RenderedChat:
    """Render with the spans the template marks, none if it marks none.

    ``tokenizer.apply_chat_template(return_assistant_tokens_mask=True)`` renders the same, but its mask ends at the
    first turn that begins with a character without a token of its own.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    # Its annotation, a bare str, is wrong: it returns the texts and the spans of each.
    render: Callable[..., Any] = render_jinja_template
    template = _template(tokenizer)
    texts: list[str]
    spans: list[list[tuple[int, int]]]
    try:
        texts, spans = render(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=_GENERATION_MARKER.search(template) is not None,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise InputError(
            f"{where}: the chat template refuses its messages ({error}): correct or drop the row"
        ) from error
    return RenderedChat(texts[0], spans[0] if spans else [])


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    if tokenizer.chat_template is None:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path or 'the teacher'} has no chat template, which `messages` need: "
            "put a chat_template.jinja beside its tokenizer.json, or write the data as prompt and response"
        )
    template: str = tokenizer.get_chat_template()
    return template
