"""Tool calling from functions to answers: their schemas, the model's calls, checked and run, and the turn that follows.

What a model writes is text from outside. A call is parsed as strict JSON, looked up among the registered functions and
checked against the function's schema before anything runs; whatever is wrong goes back to the model as a tool's
answer, so that it can do better, and nothing that it writes raises here. The form is that of Qwen 2.5 and Hermes:
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as often in one turn as there are calls.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException
from trl.chat_template_utils import qwen2_5_chat_template

from . import bfcl
from .completions import NothingToLearnError, encode_conversation, labels_for

OPEN, CLOSE, END = "<tool_call>", "</tool_call>", "<|im_end|>"
MOST_CALLS = 16  # of one turn
MOST_CHARACTERS = 4000  # of one tool's answer
MOST_TOKENS = 64 * 1024  # of one batch that is generated from; a 1B model's keys and values then take about 2 GiB
TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
    "null": type(None),
}  # fmt: skip

Message = dict[str, Any]
Call = dict[str, Any]


def tool_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of a ChatML tokenizer that renders tools, calls and answers with Qwen 2.5's template (TRL ships it).

    Raises:
        ValueError: the tokenizer has no ``<|im_end|>``.
    """
    if END not in tokenizer.get_vocab():
        raise ValueError(f"{type(tokenizer).__name__} has no {END}: this template is for ChatML tokenizers")
    tokenizer = copy.deepcopy(tokenizer)
    who = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    tokenizer.chat_template = qwen2_5_chat_template.replace(who, "You are a helpful assistant.")
    tokenizer.eos_token = tokenizer.pad_token = END
    return tokenizer


@dataclass(frozen=True)
class Reply:
    """A model's turn: what it says, its calls (``{"name": .., "arguments": {..}}``), and what is wrong with others."""

    content: str
    calls: list[Call] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def parse(text: str) -> Reply:
    """Read a turn; calls stand in any number between words. Never raises."""
    text = text.split(END)[0]
    words, calls, faults, at = [], [], [], 0
    while (begin := text.find(OPEN, at)) >= 0:
        words.append(text[at:begin])
        start = begin + len(OPEN)
        start += len(text[start:]) - len(text[start:].lstrip())
        try:  # the JSON says where it ends: a string in it may hold the closing tag
            call, at = _JSON.raw_decode(text, start)
            calls.append(_call(call))
            rest = text[at:].lstrip()
            at = len(text) - len(rest) + (len(CLOSE) if rest.startswith(CLOSE) else 0)
        except (ValueError, RecursionError) as error:
            faults.append(f"malformed call: {str(error) or type(error).__name__}"[:200])
            close = text.find(CLOSE, start)
            at = len(text) if close < 0 else close + len(CLOSE)
    words.append(text[at:])
    if len(calls) > MOST_CALLS:
        faults.append(f"{len(calls)} calls in one turn: only the first {MOST_CALLS} are answered")
    return Reply("".join(words).strip(), calls[:MOST_CALLS], faults)


def stream(pieces: Iterable[str]) -> Iterator[str | Call]:
    """A turn while it is being written: its words, and each call as soon as its JSON is whole, in order.

    Args:
        pieces: the text as it comes, cut anywhere.

    Yields: what :func:`parse` finds in the whole text, words (``str``) and calls (``dict``). What cannot be read, or
        not yet, is held back; at the end faults come as ``{"fault": ...}``.
    """
    held, calls, after_call = "", 0, False
    for piece in pieces:
        held += piece
        ended = END in held
        held = held.split(END)[0]
        while True:
            if after_call:  # the closing tag belongs to the call
                rest = held.lstrip()
                if CLOSE.startswith(rest) and not ended:
                    break
                held, after_call = rest.removeprefix(CLOSE) if rest.startswith(CLOSE) else held, False
            begin = held.find(OPEN)
            words = held[:begin] if begin >= 0 else held[: len(held) - _begun(held)]
            if words:
                yield words
            held = held[len(words) :]
            if begin < 0:
                break
            text = held[len(OPEN) :].lstrip()
            try:
                call, at = _JSON.raw_decode(text)
                call = _call(call)
            except (ValueError, RecursionError):  # not whole yet, or never: the end will tell
                break
            if calls == MOST_CALLS:
                break
            yield call
            held, calls, after_call = text[at:], calls + 1, True
        if ended:
            break
    if after_call:
        rest = held.lstrip()
        held = rest.removeprefix(CLOSE) if rest.startswith(CLOSE) else held
    last = parse(held)
    yield from [last.content] if last.content else []
    yield from last.calls[: MOST_CALLS - calls]
    yield from ({"fault": fault} for fault in last.faults)


def check(value: Any, schema: Mapping[str, Any], where: str = "arguments") -> list[str]:
    """What is wrong with ``value`` by a JSON schema of the kind that ``get_json_schema`` and BFCL make; empty: nothing.

    An object whose properties are listed may have no others. A whole number written as a float is a number, not an
    integer; true and false are neither.
    """
    if value is None and schema.get("nullable"):
        return []
    if "anyOf" in schema:
        tried = [check(value, option, where) for option in schema["anyOf"]]
        return [] if any(not faults for faults in tried) else [faults[0] for faults in tried][:1]
    kinds = schema.get("type", list(TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(_is_a(value, kind) for kind in kinds):
        return [f"{where} is {json.dumps(value, default=str)[:60]}, not {' or '.join(kinds)}"]
    if schema.get("enum") and value not in schema["enum"]:
        return [f"{where} is {json.dumps(value)[:60]}, not one of {json.dumps(schema['enum'])}"]
    faults = []
    if isinstance(value, dict) and (known := schema.get("properties")) is not None:
        faults += [f"{where} lacks {name!r}" for name in schema.get("required", ()) if name not in value]
        for name, part in value.items():
            if name in known:
                faults += check(part, known[name], f"{where}.{name}")
            else:
                faults.append(f"{where} has no {name!r}; there are {', '.join(known)}")
    elif isinstance(value, list):
        parts = schema.get("prefixItems") or [schema.get("items") or {}] * len(value)
        if len(parts) != len(value):
            faults.append(f"{where} has {len(value)} items, not {len(parts)}")
        for i, (item, part) in enumerate(zip(value, parts, strict=False)):
            faults += check(item, part, f"{where}[{i}]")
    return faults


class Tools:
    """The functions that a model may call, and no others.

    Args:
        functions: each with type hints and a Google docstring that describes every argument.

    Raises:
        ValueError: a function that cannot be described so, or two of one name.
    """

    def __init__(self, functions: Iterable[Callable[..., Any]]):
        self._functions: dict[str, Callable[..., Any]] = {}
        self._schemas: dict[str, dict[str, Any]] = {}
        for function in functions:
            name = function.__name__
            if name in self._functions:
                raise ValueError(f"two tools are called {name!r}: rename one")
            try:
                self._schemas[name] = get_json_schema(function)
            except (DocstringParsingException, TypeHintParsingException) as error:
                raise ValueError(f"tool {name!r} needs type hints and a docstring of its arguments: {error}") from error
            self._functions[name] = function

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What chat templates take as ``tools``."""
        return list(self._schemas.values())

    def answer(self, call: Call) -> str:
        """Run one parsed call: JSON with its ``result``, or with the ``error`` that kept it from having one.

        A tool runs in this process and for as long as it takes: register only functions that may be called with
        anything their schema allows.
        """
        name = call["name"]
        if name not in self._functions:
            return json.dumps({"error": f"there is no tool {name!r:.60}; there are {', '.join(self._functions)}"})
        if faults := check(call["arguments"], self._schemas[name]["function"]["parameters"]):
            return json.dumps({"error": "; ".join(faults)[:MOST_CHARACTERS]})
        try:
            text = json.dumps({"result": self._functions[name](**call["arguments"])}, default=str, ensure_ascii=False)
        except Exception as error:  # whatever a tool raises is its answer
            return json.dumps({"error": f"{type(error).__name__}: {error}"[:MOST_CHARACTERS]}, ensure_ascii=False)
        return text if len(text) <= MOST_CHARACTERS else json.dumps({"error": f"the result has {len(text)} characters"})


def converse(
    say: Callable[[list[Message], list[dict]], str], tools: Tools, messages: Sequence[Message], most_turns: int = 4
) -> list[Message]:
    """Let a model talk and call tools until it calls none; returns the whole conversation.

    Args:
        say: ``say(messages, schemas)`` gives the text of the assistant's next turn.
        messages: the conversation so far, the user's turn last; not changed.
        most_turns: the assistant's turns after which the conversation ends anyway.
    """
    conversation = [dict(message) for message in messages]
    for _ in range(most_turns):
        text = say(conversation, tools.schemas).split(END)[0]
        reply = parse(text)
        turn: Message = {"role": "assistant", "content": text.strip() if reply.faults else reply.content}
        if reply.calls and not reply.faults:
            turn["tool_calls"] = [{"type": "function", "function": call} for call in reply.calls]
        conversation.append(turn)
        if not reply.calls and not reply.faults:
            break
        answers = [(call["name"], tools.answer(call)) for call in reply.calls]
        answers += [("", json.dumps({"error": fault})) for fault in reply.faults]
        conversation += [{"role": "tool", "name": name, "content": content} for name, content in answers]
    return conversation


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[tuple[list[Message], list[dict]]],
    new_tokens: int = 192,
    batch_size: int = 64,
) -> list[str]:
    """The model's greedy next turn in each of ``(messages, schemas)``.

    Rows of like length share a batch of at most ``batch_size`` rows and `MOST_TOKENS` tokens.
    """
    ids = []
    for messages, schemas in conversations:
        options = {"tools": schemas or None, "tokenize": False, "add_generation_prompt": True}
        prompt = tokenizer.apply_chat_template(messages, **options)
        ids.append(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    end, training, texts = tokenizer.convert_tokens_to_ids(END), model.training, [""] * len(ids)
    model.eval()
    while order:
        longest = len(ids[order[0]])
        fitting = max(1, min(batch_size, MOST_TOKENS // (longest + new_tokens)))
        rows, order = order[:fitting], order[fitting:]
        padded = torch.tensor([[end] * (longest - len(ids[i])) + ids[i] for i in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in rows], device=model.device)
        with torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32):
            out = model.generate(
                input_ids=padded, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=end,
                pad_token_id=end,
            )  # fmt: skip
        for i, text in zip(rows, tokenizer.batch_decode(out[:, longest:]), strict=True):
            texts[i] = text.split(END)[0]
    model.train(training)
    return texts


def evaluate(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[bfcl.Question], **options: Any
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """BFCL's scores by its own checker (`bfcl.score`), and the texts that were scored. ``options`` of `generate`."""
    texts = generate(model, tokenizer, [(question.messages, question.tools) for question in questions], **options)
    return bfcl.score(questions, [parse(text).calls for text in texts]), texts


REFUSAL = "None of the functions can answer this."


def training_rows(
    questions: Iterable[bfcl.Question], tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int = 3407
) -> list[dict[str, list[int]]]:
    """``input_ids`` and ``labels`` of conversations: the question, the gold calls, the tools' answers, a last word.

    Only what the assistant says is learned. BFCL's questions end with the call; the answers are made up here, numbers,
    words and now and then an error, so that the model learns to report what a tool said. Longer rows are left out.
    """
    draw = random.Random(seed)
    rows = []
    for row in bfcl.tool_rows(questions, REFUSAL):
        messages = [*row["messages"], *_last_words(row["messages"][-1].get("tool_calls", ()), draw)]
        ids, said = encode_conversation(tokenizer, messages, tools=row["tools"])
        if len(ids) <= max_length:
            rows.append({"input_ids": ids, "labels": labels_for(ids, said)})
    if not rows:
        raise NothingToLearnError(f"no conversation has at most {max_length} tokens: raise max_length")
    return rows


def _last_words(tool_calls: Sequence[Mapping[str, Any]], draw: random.Random) -> Iterator[Message]:
    words = []
    for call in tool_calls:
        name = call["function"]["name"]
        if draw.random() < 0.1:
            reason = draw.choice(("not found", "timed out", "access denied"))
            words.append(f"{name} failed: {reason}.")
            answer = {"error": reason}
        else:
            result = draw.choice((draw.randint(-999, 9999), round(draw.uniform(0, 1000), 2), draw.choice(_WORDS)))
            words.append(f"{name} gives {result}.")
            answer = {"result": result}
        yield {"role": "tool", "name": name, "content": json.dumps(answer)}
    if words:
        yield {"role": "assistant", "content": " ".join(words)}


_WORDS = ("cloudy", "Lisbon", "approved", "three of them", "blue", "unknown", "in March", "done", "hydrogen", "Mozart")


def _begun(text: str) -> int:
    """Characters at the end of ``text`` that may be the beginning of a tag."""
    for count in range(min(len(text), max(len(OPEN), len(END)) - 1), 0, -1):
        if OPEN.startswith(text[-count:]) or END.startswith(text[-count:]):
            return count
    return 0


def _call(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('a call is {"name": ..., "arguments": {...}}')
    if not isinstance(arguments := value.get("arguments", {}), dict):
        raise ValueError(f"the arguments of {value['name']!r:.60} are no JSON object")
    return {"name": value["name"], "arguments": arguments}


def _is_a(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind != "boolean":
        return False
    return kind not in TYPES or isinstance(value, TYPES[kind])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:20]} is beyond a float")
    return number


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
