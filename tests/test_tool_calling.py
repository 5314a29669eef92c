"""Tool calls: whatever a model writes is answered, nothing unregistered or unchecked runs; BFCL splits and scores."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import bfcl, checkpoints
from helpers.tool_calling import (
    Reply,
    Tools,
    check,
    converse,
    evaluate,
    generate,
    parse,
    stream,
    tool_tokenizer,
    training_rows,
)

RAN = []


def add(a: int, b: float = 1.0, unit: str | None = None) -> float:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
        unit: A unit. (choices: ["m", "s"])
    """
    RAN.append(("add", a, b))
    return a + b


def explode(names: list[str]) -> str:
    """Fail.

    Args:
        names: Whom to blame.
    """
    raise RuntimeError(f"boom {names}")


def delete_everything() -> str:
    """Not registered."""
    RAN.append("deleted")
    return "gone"


def circle() -> dict:
    """Give something that is no JSON."""
    loop = {}
    loop["self"] = loop
    return loop


@pytest.fixture
def tools():
    RAN.clear()
    return Tools([add, explode, circle])


@pytest.fixture(scope="module")
def tokenizer():
    return tool_tokenizer(checkpoints.byte_tokenizer())


def call(name="add", **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_calls_are_read_between_words_and_in_parallel():
    assert parse("hello") == Reply("hello")
    assert parse(f"Well. {call(a=1)}\n{call(a=2)}<|im_end|>ignored {call()}") == Reply(
        "Well.", [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}]
    )
    inside = parse(call("say", text="a </tool_call> and <tool_call> in a string"))
    assert not inside.faults and inside.calls[0]["arguments"]["text"].startswith("a </tool_call>")
    assert parse('<tool_call>{"name": "add", "arguments": {"a": 1}}').calls  # cut off after the JSON


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>", "<tool_call>{", "<tool_call>add(1)</tool_call>", '<tool_call>{"name": "add"', "<tool_call>[]",
        '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "a=1"}</tool_call>', "<tool_call>" + "[" * 100_000,
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1, "a": 2}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>",
    ],
)  # fmt: skip
def test_malformed_calls_are_faults_that_the_model_hears_of(tools, text):
    reply = parse(text)
    assert not reply.calls and len(reply.faults) == 1
    said = iter([text, "I give up."])
    conversation = converse(lambda *_: next(said), tools, [{"role": "user", "content": "?"}])
    assert [m["role"] for m in conversation] == ["user", "assistant", "tool", "assistant"] and not RAN
    assert "malformed" in json.loads(conversation[2]["content"])["error"]


def test_a_good_call_among_bad_ones_runs():
    reply = parse(f"<tool_call>oops</tool_call>{call(a=1)}")
    assert len(reply.calls) == len(reply.faults) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "hello", "a < b <tool", f"Well. {call(a=1)}\n{call(a=2)}<|im_end|>ignored {call()}", "",
        call("say", text="a </tool_call> and <tool_call> in a string"), call(a=1).removesuffix("\n</tool_call>"),
        f"<tool_call>oops</tool_call>{call(a=1)} and more", '<tool_call>12', f"{call(a=1)} then {call(a=2)} <|im_",
        '<tool_call>{"name": "add", "arguments": {"a": 1}} no tag {}',
    ],
)  # fmt: skip
def test_streaming_finds_what_the_whole_text_holds(text, size):
    wanted, found = parse(text), list(stream(text[i : i + size] for i in range(0, len(text), size)))
    words = "".join(event for event in found if isinstance(event, str))
    assert words.split() == wanted.content.split()
    assert [event for event in found if isinstance(event, dict) and "name" in event] == wanted.calls
    assert [event["fault"] for event in found if isinstance(event, dict) and "fault" in event] == wanted.faults


def test_a_streamed_call_is_known_before_the_next_begins():
    pieces = iter([f"Two: {call(a=1)}", call(a=2)])
    events = stream(pieces)
    assert next(events) == "Two: " and next(events)["arguments"] == {"a": 1}
    assert next(pieces) == call(a=2)  # not asked for yet


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("delete_everything", {}), "there is no tool 'delete_everything'; there are add, explode, circle"),
        (("__import__", {"name": "os"}), "there is no tool"),
        (("add", {}), "lacks 'a'"),
        (("add", {"a": "1"}), 'arguments.a is "1", not integer'),
        (("add", {"a": True}), "not integer"),
        (("add", {"a": 1.5}), "not integer"),
        (("add", {"a": 1, "c": 2}), "has no 'c'; there are a, b, unit"),
        (("add", {"a": 1, "unit": "kg"}), 'not one of ["m", "s"]'),
        (("explode", {"names": ["x", 3]}), "arguments.names[1] is 3, not string"),
        (("explode", {"names": ["x"]}), "RuntimeError: boom ['x']"),
        (("circle", {}), "ValueError"),
    ],
)
def test_what_cannot_run_is_answered(tools, asked, said):
    error = json.loads(tools.answer({"name": asked[0], "arguments": asked[1]}))["error"]
    assert said in error and not RAN


def test_registered_calls_run_and_their_results_return(tools):
    said = iter([call(a=2, b=3) + call("explode", names=[]), "Five."])
    seen = []
    conversation = converse(lambda m, s: seen.append(len(m)) or next(said), tools, [{"role": "user", "content": "2+3"}])
    assert RAN == [("add", 2, 3)] and seen == [1, 4]
    assert [json.loads(m["content"]) for m in conversation[2:4]] == [{"result": 5}, {"error": "RuntimeError: boom []"}]
    assert conversation[1]["tool_calls"][0]["function"]["name"] == "add" and conversation[-1]["content"] == "Five."
    endless = converse(lambda *_: call(a=1), tools, [{"role": "user", "content": "?"}], most_turns=3)
    assert [m["role"] for m in endless].count("assistant") == 3


def test_schemas_of_every_kind():
    schema = {"type": "object", "properties": {"p": {"type": "array", "items": {"anyOf": [{"type": "integer"}, {}]}}}}
    assert check({"p": [1, "x"]}, schema) == [] and check({"p": 1}, schema)
    assert check([1], {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]})
    assert check(None, {"type": "string", "nullable": True}) == []
    assert check({"any": 1}, {"type": "object"}) == []
    assert check(3, {"type": ["string", "null"]}) == ["arguments is 3, not string or null"]


def test_functions_that_cannot_be_described_are_named():
    def bare(x):
        return x

    with pytest.raises(ValueError, match="'bare' needs type hints"):
        Tools([bare])
    with pytest.raises(ValueError, match="two tools are called 'add'"):
        Tools([add, add])


def test_bfcl_halves_share_no_function_and_its_checker_judges():
    questions = bfcl.load("simple_python", "parallel", "irrelevance", "live_multiple")
    train, test = bfcl.split(questions)
    assert not set.union(*(q.names for q in train)) & set.union(*(q.names for q in test))
    assert len(train) + len(test) == len(questions) and len(test) > 0.25 * len(questions)
    judged = [q for q in test if q.category == "parallel"][:5] + [q for q in test if q.category == "irrelevance"][:5]
    gold = [bfcl.gold_calls(q) or [] if q.answers else [] for q in judged]
    assert bfcl.score(judged, gold)["all"]["accuracy"] == 1.0
    made_up = {"name": "x", "arguments": {}}
    wrong = [[c | {"arguments": c["arguments"] | {"bogus": 1}} for c in calls] or [made_up] for calls in gold]
    assert bfcl.score(judged, wrong)["all"]["accuracy"] == 0.0
    for question, calls in zip(judged, gold, strict=True):  # our own check agrees that gold calls fit their schemas
        schemas = {t["function"]["name"]: t["function"]["parameters"] for t in question.tools}
        assert all(check(c["arguments"], schemas[c["name"]]) == [] for c in calls)


def test_rows_teach_the_assistants_turns_and_nothing_else(tokenizer):
    questions = bfcl.load("simple_python")[:20] + bfcl.load("irrelevance")[:5]
    rows = training_rows(questions, tokenizer, max_length=6000)
    learned = [tokenizer.decode([t for t in row["labels"] if t != -100]) for row in rows]
    assert len(rows) >= 20
    for text in learned:
        turns = text.split("<|im_end|>")[:-1]
        first = parse(turns[0])
        assert not first.faults
        assert (len(turns), bool(first.calls)) in ((2, True), (1, False))
        assert "tool_response" not in text and "<tools>" not in text
    assert any("failed:" in text for text in learned) and any("gives" in text for text in learned)
    with pytest.raises(ValueError, match="raise max_length"):
        training_rows(questions, tokenizer, max_length=3)


def test_a_model_trained_on_one_call_makes_it(tokenizer):
    """Data, labels, batching and scoring in one: a tiny model learns two conversations by heart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    function = {"name": "f", "description": "F.", "parameters": {"type": "dict", "properties": {
        "x": {"type": "integer", "description": "X."}}, "required": ["x"]}}  # fmt: skip
    asks = [{"role": "user", "content": "f 3"}]
    question = bfcl.Question("1", "simple_python", asks, [function], [{"f": {"x": [3]}}])
    off_topic = bfcl.Question("2", "irrelevance", [{"role": "user", "content": "g"}], [function], [])
    rows = training_rows([question, off_topic], tokenizer, 4000)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer),
        pad_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        losses = [model(torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss for r in rows]
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
        if max(losses) < 0.01:
            break
    scores, texts = evaluate(model, tokenizer, [question, off_topic], new_tokens=70)
    assert scores["all"]["accuracy"] == 1.0, texts
    assert parse(texts[0]).calls == [{"name": "f", "arguments": {"x": 3}}]
    alone = generate(model, tokenizer, [(off_topic.messages, off_topic.tools)], new_tokens=70)
    assert alone[0] == texts[1]
