"""The parts together: every pair of the trainer's switches trains, and no switch changes a loss beyond rounding."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import tempfile

import pytest

import helpers.compiling
from helpers.compiled_loss import CompiledModel
from helpers.train import TrainArguments, compiled_regions, train

SWITCHES = {
    "nf4": ("bitsandbytes", "triton"),
    "loss": ("full", "chunked"),
    "attention": ("sdpa", "eager", "stock"),
    "compile": (False, True),
    "checkpointing": (False, True),
    "packing": (False, True),
}
# Few runs in which every pair of values occurs, but for --compile with --loss full, which is refused.
RUNS = (
    ("bitsandbytes", "full", "stock", False, False, False),
    ("triton", "chunked", "sdpa", True, True, True),
    ("triton", "full", "eager", False, True, False),
    ("bitsandbytes", "chunked", "eager", True, False, True),
    ("triton", "chunked", "stock", True, True, False),
    ("bitsandbytes", "full", "sdpa", False, False, True),
    ("bitsandbytes", "chunked", "sdpa", True, True, False),
    ("triton", "chunked", "eager", False, False, True),
    ("bitsandbytes", "full", "stock", False, True, True),
    ("triton", "full", "sdpa", False, False, False),
    ("bitsandbytes", "chunked", "stock", True, False, False),
    ("triton", "full", "stock", False, False, True),
)


@functools.cache
def losses(run: tuple, offload: bool = False) -> tuple[tuple[float, ...], str]:
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
        result = train(TrainArguments(
            model="shape:tiny", dataset="random:5-30x24", steps=2, batch_size=2, accumulation=2, max_length=32,
            output_dir=folder, prompt="", offload=offload, **dict(zip(SWITCHES, run, strict=True)),
        ))  # fmt: skip
    return tuple(result.losses), said.getvalue().splitlines()[0]


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """The graphs are traced, not compiled: Inductor has tests of its own."""
    plain = helpers.compiling.compile_model
    monkeypatch.setattr(
        helpers.compiling, "compile_model", lambda model, **more: plain(model, **more | {"backend": "eager"})
    )


def test_the_runs_cover_every_pair():
    for a, b in itertools.combinations(SWITCHES, 2):
        wanted = set(itertools.product(SWITCHES[a], SWITCHES[b]))
        if (a, b) == ("loss", "compile"):
            wanted.remove(("full", True))
        i, j = list(SWITCHES).index(a), list(SWITCHES).index(b)
        assert wanted <= {(run[i], run[j]) for run in RUNS}, (a, b)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_switches_do_not_change_the_losses(run):
    packed = run[-1]
    reference, _ = losses(("bitsandbytes", "full", "stock", False, False, packed))
    found, first_line = losses(run)
    assert found == pytest.approx(reference, rel=1e-5)
    nf4, loss, attention, compiled, checkpointing, _ = run
    assert ("the Triton kernel" in first_line) == (nf4 == "triton")
    assert f"{loss} loss" in first_line
    assert ("eager, batch" not in first_line) == compiled and ("no checkpointing" not in first_line) == checkpointing
    assert f"attention {'sdpa' if attention == 'stock' else 'qlora_' + attention}" in first_line


def test_a_flag_that_cannot_be_honoured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--compile never makes all logits"):
        train(TrainArguments(compile=True, loss="full", output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="--attention 'fast' is not one of"):
        train(TrainArguments(attention="fast", output_dir=str(tmp_path)))


def test_inputs_in_host_memory_change_no_loss():
    run = ("bitsandbytes", "chunked", "sdpa", True, True, False)
    found, first_line = losses(run, offload=True)
    assert found == losses(run)[0] and "layer inputs (in host memory)" in first_line


@pytest.mark.parametrize(("checkpointing", "offload"), [(True, None), (False, False)])
def test_only_a_checkpointed_layers_input_waits(checkpointing, offload, monkeypatch):
    given = {}
    done = contextlib.nullcontext(CompiledModel())
    monkeypatch.setattr(helpers.compiling, "compile_model", lambda model, **how: given.update(how) or done)
    with compiled_regions(None, TrainArguments(compile=True, checkpointing=checkpointing)):
        assert given["offload"] is offload
