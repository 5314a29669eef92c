"""Train on the assistant's words only: labels from the structure of the chat template, never by searching the text.

Where an assistant's turn begins and ends is read off the template itself. The conversation is rendered up to the turn
(with the prompt that asks for it) and through it; both are beginnings of the whole rendering, so their lengths are
the turn's bounds. Templates that render a conversation's beginning otherwise than its whole (Pixtral moves the system
message into the last user turn, Llama 3.2 Vision drops its system header once a later turn shows an image) are read a
second way: each assistant text is put between two random marks, and rendering must give the same text but for the
marks. Text of a user that contains the assistant's marker is a user's text both ways.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jinja2 import TemplateError

IGNORE = -100
Messages = list[dict[str, Any]]
Span = tuple[int, int]


class NothingToLearnError(ValueError):
    """Every label of a row is masked, so that it would add nothing but a division by zero to the loss."""


def train_on_responses_only(trainer_or_dataset: Any, processing_class: Any = None, *, last_only: bool = False) -> Any:
    """Mask every label that is not the assistant's, for text and for vision.

    Args:
        trainer_or_dataset: a TRL ``SFTTrainer`` (text or vision), changed in place, or a ``datasets`` data set with
            conversations in ``messages`` (or ``prompt`` and ``completion``).
        processing_class: the tokenizer; needed for a data set, a trainer brings its own.
        last_only: learn the last assistant turn of each conversation instead of all of them.

    Returns: the trainer, or the data set with ``input_ids`` and ``labels`` (-100 where nothing is learned), which
        ``SFTTrainer`` takes as they are. A vision trainer gets a :class:`helpers.vision.VisionCollator`, which does
        the same to each batch and masks the image tokens too.

    Raises:
        NothingToLearnError: a row without a token to learn, named by its number.
        ValueError: packed or already tokenised rows whose conversations are gone; images in a bare data set; a
            template whose turns cannot be told apart.
    """
    if hasattr(trainer_or_dataset, "train_dataset"):
        return _relabel_trainer(trainer_or_dataset, last_only)
    return _tokenize_dataset(trainer_or_dataset, processing_class, last_only)


def encode_conversation(
    tokenizer: Any,
    messages: Messages,
    *,
    chat_template: str | None = None,
    tools: list | str | None = None,
    last_only: bool = False,
    generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """Token ids of a rendered conversation, and for each whether the assistant said it.

    The end-of-turn token counts as said; white space at a turn's end does not.

    Args:
        tools: for templates that show them; a list, or it as JSON.
        generation_prompt: end with the template's call for an answer.

    Raises: ValueError where the tokenizer gives no offsets or the template's turns cannot be told apart.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets; load a fast tokenizer (use_fast=True)"
        )

    def render(part: Messages, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            part, chat_template=chat_template, tools=tools, tokenize=False, add_generation_prompt=prompt
        )

    tools = json.loads(tools) if isinstance(tools, str) else tools
    messages = fit_content(without_nones(messages), render)
    text = render(messages, generation_prompt)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    said = [False] * len(ids)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    spans = assistant_spans(messages, render, special)
    for start, end in spans[-1:] if last_only else spans:
        for i, (first, last) in enumerate(offsets):
            if first < end and last > start:
                said[i] = True
    return ids, said


def assistant_spans(messages: Messages, render: Callable[..., str], special_tokens: Sequence[str] = ()) -> list[Span]:
    """Character bounds of each assistant turn in ``render(messages)``, its end-of-turn marker included.

    Args:
        messages: the conversation; ``content`` is a string or a list of parts.
        render: ``render(messages, prompt=False)`` gives the template's text, with the generation prompt if asked.
        special_tokens: texts that can close a turn, such as ``<|im_end|>``.

    Raises: ValueError where neither way of reading the template (see the module) applies.
    """
    text = render(messages)
    spans = _spans_by_prefix(messages, text, render)
    if spans is None:
        spans = _spans_by_marks(messages, text, render, special_tokens)
    if spans is None:
        raise ValueError(
            "cannot tell the assistant's turns apart: this chat template neither renders a conversation's beginning "
            "as the beginning of the whole, nor shows every assistant text unchanged; give a template that does"
        )
    # White space after the end of a turn is the template's: no model is asked for it.
    return [(start, start + len(text[start:end].rstrip())) for start, end in spans]


def labels_for(ids: Sequence[int], said: Sequence[bool], masked: Iterable[int] = (), row: str = "the row") -> list[int]:
    """``ids`` where the assistant said them and they are not in ``masked`` (image tokens), -100 elsewhere.

    Raises: NothingToLearnError, naming ``row``, where all are masked.
    """
    masked = set(masked)
    labels = [t if mine and t not in masked else IGNORE for t, mine in zip(ids, said, strict=True)]
    # The first label has nothing before it to be predicted from.
    if all(label == IGNORE for label in labels[1:]):
        raise NothingToLearnError(
            f"{row} has no assistant token to learn among its {len(labels)} tokens: it has no assistant turn, an empty "
            "one, or truncation cut it off; drop it or raise max_length"
        )
    return labels


def fit_content(messages: Messages, render: Callable[..., str]) -> Messages:
    """The messages with text contents as strings, or all as lists of parts: whichever shows more of the texts.

    Templates read one or the other, and some leave out or spell out in Python what they cannot read.

    Raises: ValueError with the template's own words, where it takes neither form.
    """
    error, best, most = None, None, -1
    for form in (_as_strings, _as_parts):
        candidate = [form(message) for message in messages]
        try:
            rendered = render(candidate)
        except (TemplateError, TypeError) as refusal:
            error = error or refusal
            continue
        shown = sum(text.strip() in rendered for message in messages for text in _texts(message))
        if shown > most:
            best, most = candidate, shown
        if shown == sum(len(_texts(message)) for message in messages):
            break
    if best is None:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    return best


def _texts(message: dict[str, Any]) -> list[str]:
    content = message.get("content")
    return [content] if isinstance(content, str) else [part["text"] for part in content or [] if "text" in part]


def _as_strings(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list) or not all("text" in part for part in content):
        return _as_parts(message) if isinstance(content, list) else message
    return {**message, "content": "".join(_texts(message))}


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if content is None:
        return message
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    # Pixtral's first template read a text's `content`.
    return {**message, "content": [{**part, "content": part["text"]} if "text" in part else part for part in content]}


def without_nones(messages: Messages) -> Messages:
    """The messages, copied, without keys whose value is None: ``datasets`` adds those, and templates test for keys."""
    cleaned = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        if isinstance(message.get("content"), list):
            message["content"] = [{k: v for k, v in part.items() if v is not None} for part in message["content"]]
        cleaned.append(message)
    return cleaned


def _spans_by_prefix(messages: Messages, text: str, render: Callable[..., str]) -> list[Span] | None:
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before, after = render(messages[:turn], prompt=True), render(messages[: turn + 1])
        except (TemplateError, IndexError):  # such as a template that wants a first user turn
            return None
        if not (after.startswith(before) and text.startswith(after)):
            return None
        spans.append((len(before), len(after)))
    return spans


def _spans_by_marks(
    messages: Messages, text: str, render: Callable[..., str], special_tokens: Sequence[str]
) -> list[Span] | None:
    nonce = uuid.uuid4().hex  # drawn anew each time: no text can contain it on purpose

    def mark(string: str, turn: int) -> str:
        core = string.strip()  # inside the white space, so that a template's trim finds what it would have found
        at = string.index(core)
        return f"{string[:at]}<{nonce}:{turn}>{core}</{nonce}:{turn}>{string[at + len(core) :]}"

    marked = []
    for turn, message in enumerate(messages):
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, str):
            message = {**message, "content": mark(content, turn)}
        elif message["role"] == "assistant" and isinstance(content, list):
            texts = ("text", "content")
            parts = [{k: mark(v, turn) if k in texts else v for k, v in part.items()} for part in content]
            message = {**message, "content": parts}
        marked.append(message)
    found: dict[tuple[int, bool], list[int]] = {}  # (turn, closing) -> where its marks stand in the text without marks
    at, plain = 0, ""
    rendered = render(marked)
    for match in re.finditer(rf"<(/?){nonce}:(\d+)>", rendered):
        plain += rendered[at : match.start()]
        found.setdefault((int(match[2]), bool(match[1])), []).append(len(plain))
        at = match.end()
    if plain + rendered[at:] != text:
        return None
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if (turn, False) not in found or (turn, True) not in found:  # a bare tool call, or a text partly left out
            return None
        start, end = min(found[turn, False]), max(found[turn, True])
        tail = text[end:]
        blank = len(tail) - len(tail.lstrip())
        closing = [token for token in special_tokens if tail.startswith(token, blank)]
        spans.append((start, end + blank + len(max(closing, key=len)) if closing else end))
    return spans


def _tokenize_dataset(dataset: Any, tokenizer: Any, last_only: bool) -> Any:
    if tokenizer is None:
        raise ValueError("a data set needs its tokenizer: train_on_responses_only(dataset, tokenizer)")
    if hasattr(dataset, "keys"):  # DatasetDict
        return type(dataset)({name: _tokenize_dataset(part, tokenizer, last_only) for name, part in dataset.items()})
    columns = set(next(iter(dataset)))
    if columns & {"image", "images"}:
        raise ValueError(
            "this data set holds images, which are prepared batch by batch: give train_on_responses_only the trainer, "
            'or build VisionCollator(processor, responses="all")'
        )
    _check_conversations(columns)

    def tokenize(example: dict, row: int) -> dict:
        ids, said = encode_conversation(tokenizer, _messages(example), tools=example.get("tools"), last_only=last_only)
        return {"input_ids": ids, "labels": labels_for(ids, said, row=f"row {row}")}

    return dataset.map(tokenize, with_indices=True)


def _relabel_trainer(trainer: Any, last_only: bool) -> Any:
    from .vision import VisionCollator

    collator = trainer.data_collator
    if isinstance(collator, VisionCollator):
        collator.responses = "last" if last_only else "all"
        return trainer
    if processor := getattr(collator, "processor", None):  # TRL's own collator for vision
        trainer.data_collator = VisionCollator(
            processor, max_length=collator.max_length, responses="last" if last_only else "all"
        )
        return trainer
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    template = getattr(trainer, "chat_template", None)

    def relabel(example: dict, row: int) -> dict:
        ids, said = encode_conversation(
            tokenizer, _messages(example), chat_template=template, tools=example.get("tools"), last_only=last_only
        )
        kept = example["input_ids"]
        first = 0 if ids[: len(kept)] == kept else len(ids) - len(kept)  # truncation keeps the start or the end
        if first < 0 or ids[first : first + len(kept)] != kept:
            raise ValueError(
                f"row {row}: its input_ids do not come from its messages by this chat template; call "
                "train_on_responses_only on the data set, before it is given to the trainer"
            )
        return {"labels": labels_for(kept, said[first : first + len(kept)], row=f"row {row}")}

    def relabelled(dataset: Any) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: relabelled(part) for name, part in dataset.items()}
        columns = set(next(iter(dataset)))
        if "seq_lengths" in columns:
            raise ValueError(
                "the trainer's rows are packed, so that their conversations are gone; call train_on_responses_only on "
                "the data set, before it is given to the trainer"
            )
        _check_conversations(columns)
        return dataset.map(relabel, with_indices=True)

    train, evaluation = relabelled(trainer.train_dataset), relabelled(trainer.eval_dataset)
    trainer.train_dataset, trainer.eval_dataset = train, evaluation
    return trainer


def _check_conversations(columns: set[str]) -> None:
    if not ({"messages"} <= columns or {"prompt", "completion"} <= columns):
        raise ValueError(
            f"rows have columns {sorted(columns)}; conversations are needed to tell who speaks, in `messages`, or in "
            "`prompt` and `completion`"
        )


def _messages(example: dict) -> Messages:
    messages = example["messages"] if "messages" in example else [*example["prompt"], *example["completion"]]
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"a conversation is a list of messages with a role and a content; got {messages!r:.80}")
    return messages
