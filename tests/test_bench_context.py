"""The context bench without a GPU: its search, its reading of a probe's end, a real probe, and its files."""

from __future__ import annotations

import csv
import dataclasses
import threading

import pytest

from helpers import bench_context, bench_trainer
from helpers.bench_context import GRID, Probe, longest
from helpers.train import TrainArguments, train


def memory(fixed: float, per_token: float, cap: float, asked: list[int], fragments: float = 1.0):
    """An attempt that needs memory linear in the length, ``fragments`` times of which must fit."""

    def attempt(length: int) -> dict:
        asked.append(length)
        need = fixed + per_token * length
        return {"fits": need * fragments <= cap, "allocated_gib": need}

    return attempt


@pytest.mark.parametrize("fragments", [1.0, 1.15])
@pytest.mark.parametrize(("fixed", "end"), [(1.3, 700), (1.3, 5000), (5.0, 40_000), (9.0, 600_000), (2.0, 511)])
def test_search_ends_at_the_longest_that_fits_in_few_probes(fixed, end, fragments):
    cap, asked = 14.7, []
    per_token = (cap / fragments - fixed) / end
    found = longest(memory(fixed, per_token, cap, asked, fragments), cap)
    assert found == (max((n for n in GRID if n <= end), default=0), True, "")
    assert len(asked) == len(set(asked)) <= 8


def test_search_stops_for_what_is_not_memory():
    assert longest(lambda length: {"fits": False, "error": "no such kernel"}, 14.7) == (0, False, "no such kernel")
    late = {2048: {"fits": True, "allocated_gib": 2.0}}
    assert longest(lambda length: late.get(length, {}), 14.7) == (2048, False, "")
    assert longest(memory(1.0, 1e-9, 80, []), 80) == (GRID[-1], False, "")  # longer than the grid


@pytest.mark.parametrize(
    ("out", "err", "found"),
    [
        ('noise\nRESULT {"fits": true, "allocated_gib": 1.5}\n', "warnings", {"fits": True, "allocated_gib": 1.5}),
        ("", "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n", {"fits": False}),
        ("", "Traceback\nKeyError: 'x'\n", {"fits": False, "error": "KeyError: 'x'"}),
        ("", "", {"fits": False, "error": "no output"}),
    ],
)
def test_a_probes_end_is_read(out, err, found):
    assert bench_context.answer_of(out, err) == found


def test_a_probe_trains_two_steps_of_that_length(tmp_path, monkeypatch):
    seen = []

    def trained(arguments: TrainArguments, callbacks):
        seen.append(arguments)
        return train(dataclasses.replace(arguments, compile=False, offload=False, optimizer="auto"), callbacks)

    monkeypatch.setattr("helpers.train.train", trained)
    bench_trainer.save_shape("tiny", tmp_path / "weights")
    found = bench_context.run_probe(Probe("tiny", "ours", 14.7, "float32", 48), str(tmp_path / "weights"))
    assert found["fits"] and len(found["losses"]) == 2 and found["step_s"] > 0
    assert (
        seen[0].compile
        and seen[0].checkpointing
        and seen[0].offload
        and (seen[0].batch_size, seen[0].max_length) == (1, 48)
    )


def test_bench_writes_its_tables_and_figure(tmp_path, monkeypatch):
    """A probe's process is real; what the stock contender needs, a GPU, is its error, before it reads weights."""
    monkeypatch.setattr(bench_context, "SAVE", "import sys, pathlib; pathlib.Path(sys.argv[2]).mkdir()")
    monkeypatch.setitem(bench_context.CAPS, "T4", (14.7, "float32", 2048))
    monkeypatch.setattr(bench_context.importlib.util, "find_spec", lambda name: None)
    start, ours = bench_context.start_probe, memory(1.0, 0.001, 14.7, [])
    monkeypatch.setattr(
        bench_context, "start_probe",
        lambda probe, *more: ours(probe.length) if probe.contender == "ours" else start(probe, *more),
    )  # fmt: skip
    given = ["--out", str(tmp_path), "--shapes", "tiny", "--caps", "T4", "--most", "4096"]
    assert bench_context.main(given) == 1  # an error is no result
    with open(tmp_path / "context_bench.csv", newline="") as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"stock", "ours"}
    assert rows["ours"]["tokens"] == "4096" and rows["ours"]["next_does_not_fit"] == "False"
    assert float(rows["ours"]["allocated_gib"]) == pytest.approx(5.096) and not rows["stock"]["allocated_gib"]
    assert "--loss trl needs a GPU" in rows["stock"]["error"] and rows["stock"]["tokens"] == "0"
    with open(tmp_path / "context_probes.csv", newline="") as file:
        assert [row["contender"] for row in csv.DictReader(file)][0] == "stock"
    assert (tmp_path / "context_bench.png").read_bytes()[:4] == b"\x89PNG"


def test_searches_go_side_by_side_where_there_is_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_context, "SAVE", "pass")
    monkeypatch.setattr(bench_context, "places", lambda gib, cores: 2)
    both, seen, ours = threading.Barrier(2, timeout=60), [], memory(1.0, 0.001, 14.7, [])

    def probed(probe, weights, limit_s, gpu):
        if probe.length == bench_context.CAPS["T4"][2]:
            both.wait()  # one after the other, nobody would come
        seen.append(gpu)
        return ours(probe.length)

    monkeypatch.setattr(bench_context, "start_probe", probed)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    rows = bench_context.bench(["tiny"], ["stock", "ours"], ["T4"], tmp_path, 1, 60, [1024, 2048, 4096])
    assert [row["contender"] for row in rows] == ["stock", "ours"] and {row["tokens"] for row in rows} == {4096}
    assert set(seen) == {"5"}


def test_rows_of_another_memory_stay_and_those_searched_for_again_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_context, "SAVE", "pass")

    def searched(per_token, caps):
        attempt = memory(1.0, per_token, 14.7, [])
        monkeypatch.setattr(bench_context, "start_probe", lambda probe, *more: attempt(probe.length))
        bench_context.bench(["tiny"], ["ours"], caps, tmp_path, 1, 60, [1024, 2048, 4096])
        with open(tmp_path / "context_bench.csv", newline="") as file:
            return [(row["memory"], row["tokens"], row["next_does_not_fit"]) for row in csv.DictReader(file)]

    assert searched(0.005, ["T4"]) == [("T4", "2048", "True")]
    assert searched(0.001, ["H100"]) == [("T4", "2048", "True"), ("H100", "4096", "False")]
    assert searched(0.010, ["T4"]) == [("H100", "4096", "False"), ("T4", "1024", "True")]


def test_a_search_begins_where_an_earlier_one_ended_and_without_time_leaves_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_context, "SAVE", "pass")
    asked, grid = [], [1024, 2048, 4096, 8192]

    def searched(budget_s):
        attempt = memory(1.0, 0.003, 14.7, asked)
        monkeypatch.setattr(bench_context, "start_probe", lambda probe, *more: attempt(probe.length))
        return bench_context.bench(["tiny"], ["ours"], ["T4"], tmp_path, 1, budget_s, grid)[0]["tokens"]

    assert searched(60) == 4096 and asked[0] == 2048
    asked.clear()
    assert searched(60) == 4096 and asked[0] == 4096
    asked.clear()
    assert searched(-1) == 4096 and not asked
