"""What a run trains on: instruction rows from the Hub, a file of the user's, or Python's own documentation.

The embedded default asks about the functions of the running standard library and answers with their docstrings.
The sources are read with ``ast``; nothing is imported, no network is used, and the order is always the same.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

OIG = "hf://datasets/laion/OIG/unified_chip2.jsonl"
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo"}
ANSWER_CHARACTERS = (60, 700)  # long enough to teach, short enough for 256 tokens


def load_instructions(name: str = "auto", *, vocab_size: int | None = None, seed: int = 3407) -> Dataset:
    """Training rows in a form that TRL's ``SFTTrainer`` takes as they are.

    Args:
        name: ``auto`` (``oig`` where ``auto`` is the challenge's model, else ``python-docs``), ``python-docs``,
            ``oig``, ``random:LOW-HIGH[xROWS]`` (token ids drawn at random, LOW to HIGH tokens a row, for speed and
            memory only), a ``.jsonl`` or ``.json`` file, or a Hub data set id.
        vocab_size: upper bound of the ids of ``random:``.
        seed: of ``random:`` and of the shuffle of ``python-docs``.

    Returns:
        Rows of ``messages``, of ``text``, of ``prompt`` and ``completion``, or of ``input_ids``.

    Raises:
        ValueError: the name is not a file and not reachable, or a file holds none of those columns.
    """
    from datasets import Dataset, load_dataset

    name = resolve_data(name)
    if name == "python-docs":
        rows = list(_python_rows())
        random.Random(seed).shuffle(rows)
        return Dataset.from_list(rows)
    if name.startswith("random:"):
        return Dataset.from_list(list(_random_rows(name.removeprefix("random:"), vocab_size or 512, seed)))
    is_file = name.endswith((".jsonl", ".json"))
    if is_file and not Path(name).is_file():
        raise ValueError(f"data file {name!r} does not exist")
    try:
        if name == "oig":
            rows = load_dataset("json", data_files=OIG, split="train[:10%]")
        elif is_file:
            rows = load_dataset("json", data_files=name, split="train")
        else:
            rows = load_dataset(name, split="train")
    except Exception as error:
        what = "holds no JSON rows" if is_file else "is neither a .jsonl file nor reachable on the Hub"
        raise ValueError(
            f"data set {name!r} {what} ({type(error).__name__}); "
            "use 'python-docs', 'oig', 'random:200-1024', a .jsonl file or a Hub id"
        ) from error
    known = ({"messages"}, {"text"}, {"prompt", "completion"}, {"input_ids"})
    if not any(columns <= set(rows.column_names) for columns in known):
        wanted = ", ".join(" and ".join(sorted(columns, reverse=True)) for columns in known)
        raise ValueError(f"data set {name!r} has columns {rows.column_names}; one of these is needed: {wanted}")
    if len(rows) == 0:
        raise ValueError(f"data set {name!r} has no rows")
    return rows


def resolve_data(name: str) -> str:
    """The name that ``auto`` stands for on this machine; any other name as it is."""
    from . import checkpoints

    if name != "auto":
        return name
    return "oig" if checkpoints.challenge_runs_here() else "python-docs"


@functools.cache
def _python_rows() -> tuple[dict, ...]:
    return tuple(python_documentation())


def python_documentation() -> Iterator[dict]:
    """Question and answer about each documented public function, method and class of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, below, files in os.walk(library):
        below[:] = [name for name in below if name not in SKIPPED_FOLDERS and not name.startswith("_")]
        paths += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_")]
    for path in sorted(paths):
        module = path.relative_to(library).with_suffix("")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield from _documented(tree, ".".join(module.parts))


def _documented(node: ast.AST, prefix: str) -> Iterator[dict]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        is_class = isinstance(child, ast.ClassDef)
        answer = inspect.cleandoc(ast.get_docstring(child) or "").split("\n>>>")[0].strip()
        if ANSWER_CHARACTERS[0] <= len(answer) <= ANSWER_CHARACTERS[1]:
            verb = "is" if is_class else "does"
            tail = "" if is_class else " do"
            yield {
                "messages": [
                    {"role": "user", "content": f"In Python's standard library, what {verb} `{name}`{tail}?"},
                    {"role": "assistant", "content": answer},
                ]
            }
        if is_class:
            yield from _documented(child, name)


def _random_rows(spec: str, vocab_size: int, seed: int) -> Iterator[dict]:
    lengths, _, rows = spec.partition("x")
    low, _, high = lengths.partition("-")
    try:
        low_n, high_n, rows_n = int(low), int(high or low), int(rows or 2000)
    except ValueError as error:
        raise ValueError(f"'random:{spec}' is not of the form random:LOW-HIGH or random:LOW-HIGHxROWS") from error
    if not 0 < low_n <= high_n or rows_n < 1:
        raise ValueError(f"'random:{spec}': lengths must satisfy 0 < LOW <= HIGH, and ROWS be at least 1")
    draw = random.Random(seed)
    for _ in range(rows_n):
        yield {"input_ids": [draw.randrange(3, vocab_size) for _ in range(draw.randint(low_n, high_n))]}
