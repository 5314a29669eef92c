"""The FSDP2 bench's turns, with stand-ins as contenders: none is timed before all are warm, nor beside another."""

from __future__ import annotations

import collections
import csv
import json
import sys
import threading
import time
import types

import pytest
import torch

from helpers import bench_trainer, clocks, memory, turns
from helpers.bench_fsdp2 import Bench, Case

STAND_IN = """
import json, os, pathlib, sys, time
request = json.loads(sys.argv[1])
name, rank, folder = request["contender"], os.environ.get("RANK", "0"), pathlib.Path(request["folder"])
log = pathlib.Path({log!r})
def note(what):
    (log / f"{{time.monotonic():020.6f}} {{what}} {{request['ranks']}} {{name}}").touch()
if name == "ours, eager":
    raise RuntimeError("no kernel")
if name == "ours, bitsandbytes' linear":
    time.sleep(60)
note("warm")
(folder / f"ready {{rank}}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
note("begins")
time.sleep(0.3)
note("ends")
found = {{"seconds": [2.0, 1.0, 9.0], "losses": [3.0], "allocated_gib": 5.0 + int(rank), "reserved_gib": 6.0,
         "memory": [{{"seconds": 0.2, "allocated_gib": 1.0}}]}}
(folder / f"measured {{rank}}").write_text(json.dumps(found))
"""


def test_contenders_take_turns_and_a_failed_one_stops_nobody(tmp_path, capsys):
    runs = ["2:ours, 8-bit Adam", "1:ours, 8-bit Adam", "1:ours, eager", "1:ours, bitsandbytes' linear"]
    (log := tmp_path / "log").mkdir()
    left_out = ["2:ours, float32 AdamW"]
    bench = Bench(Case(), runs, tmp_path / "out", limit_s=4, further=left_out, until=time.monotonic(), at_once=3)
    bench.entry = ["-c", STAND_IN.format(log=str(log))]
    rows = {f"{row['gpus']}:{row['contender']}": row for row in bench.start().finish()}
    assert list(rows) == runs and f"for want of time: {left_out[0]}" in capsys.readouterr().out
    assert "RuntimeError: no kernel" in rows[runs[2]]["error"] and "not warmed up after 4 s" in rows[runs[3]]["error"]
    for run, allocated in ((runs[0], 6.0), (runs[1], 5.0)):
        assert not rows[run]["error"] and rows[run]["step_s"] == 2.0 and rows[run]["allocated_gib"] == allocated
        assert rows[run]["tokens_per_s"] == round(2048 * 2 * 4 * int(run[0]) / 2.0)
    events = [path.name.split(" ", 1)[1] for path in sorted(log.iterdir())]
    assert [event.split()[0] for event in events[:3]] == ["warm"] * 3  # two ranks and one, before anybody begins
    assert [event for event in events if not event.startswith("warm")] == [
        *["begins 2 ours, 8-bit Adam"] * 2, *["ends 2 ours, 8-bit Adam"] * 2,
        "begins 1 ours, 8-bit Adam", "ends 1 ours, 8-bit Adam",
    ]  # fmt: skip
    with open(tmp_path / "out" / "fsdp2_bench.csv", newline="") as file:
        assert [row["error"] == "" for row in csv.DictReader(file)] == [True, True, False, False]
    assert (tmp_path / "out" / "2 ours, 8-bit Adam, memory of GPU 1.csv").read_text().startswith("seconds")
    assert json.loads(json.dumps(list(rows.values())))


def test_further_contenders_take_the_places_left_while_there_is_time(tmp_path):
    (log := tmp_path / "log").mkdir()
    further = ["2:ours, 8-bit Adam", "1:ours, float32 AdamW"]
    bench = Bench(Case(), ["1:ours, 8-bit Adam"], tmp_path / "out", limit_s=20, further=further, at_once=2)
    bench.entry = ["-c", STAND_IN.format(log=str(log))]
    rows = bench.finish()
    assert [f"{row['gpus']}:{row['contender']}" for row in rows if not row["error"]] == ["1:ours, 8-bit Adam", *further]
    events = [path.name.split(" ", 1)[1] for path in sorted(log.iterdir())]
    assert [event.split()[0] for event in events[:3]] == ["warm"] * 3 and events[-3].startswith("warm 1 ours, float32")


def test_clocks_and_watts_are_those_of_the_named_cards_while_they_are_watched(monkeypatch):
    reads = collections.Counter()

    def clock(card, kind):
        reads[card] += 1
        if reads[card] == 3:
            seen.set()
        return 1500 + 100 * card if reads[card] > 1 else 300

    fake = types.SimpleNamespace(
        nvmlInit=lambda: None, NVML_CLOCK_SM=1, nvmlDeviceGetHandleByIndex=lambda i: i, nvmlDeviceGetClockInfo=clock,
        nvmlDeviceGetHandleByUUID={"GPU-a": 0}.get, nvmlDeviceGetPowerUsage=lambda card: 690_400,
        nvmlDeviceGetPowerManagementLimit=lambda card: 700_000,
    )  # fmt: skip
    seen = threading.Event()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with clocks.watched(["3", "GPU-a"]) as found:
        assert seen.wait(60)
    assert found == {"sm_mhz": "1800 1500", "watts": "690 690", "limit_watts": "700 700"}
    fake.nvmlDeviceGetPowerUsage = None  # a card that does not say
    with clocks.watched(["0"]) as found:
        pass
    assert found == {"sm_mhz": "", "watts": "", "limit_watts": ""}


def test_an_unknown_contender_is_named():
    with pytest.raises(ValueError, match="'2:theirs' is not GPUS:CONTENDER"):
        Bench(Case(), [], None, further=["2:theirs"])


TRAINER_STAND_IN = """
import json, pathlib, sys, time
request = json.loads(sys.argv[1])
folder, saved = pathlib.Path(request["folder"]), pathlib.Path(request["saved"])
while not saved.exists():
    time.sleep(0.01)
if request["contender"] == "stock":
    raise RuntimeError("out of memory")
(folder / "ready 0").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
found = {"seconds": [3.0, 1.0, 2.0], "losses": [12.5, 12.25], "allocated_gib": 3.0, "reserved_gib": 4.0,
         "trainable_dtype": "float32"}
(folder / "measured 0").write_text(json.dumps(found))
"""


def test_the_trainers_bench_keeps_what_did_not_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_trainer, "ENTRY", ["-c", TRAINER_STAND_IN])
    monkeypatch.setattr(bench_trainer, "SAVE", "import sys, pathlib; pathlib.Path(sys.argv[2]).mkdir()")
    rows = bench_trainer.bench(bench_trainer.CASES[:2], ("stock", "ours"), tmp_path, limit_s=20)
    assert [(row["case"], row["contender"], row["step_s"]) for row in rows] == [
        (case.name, "ours", 2.0) for case in bench_trainer.CASES[:2]
    ]
    with open(tmp_path / "trainer_bench.csv", newline="") as file:
        assert [row["first_losses"] for row in csv.DictReader(file)] == ["12.50000 12.25000"] * 2
    assert "stock    FAILED: rank 0 ended with code 1: RuntimeError: out of memory" in capsys.readouterr().out


def test_memory_over_time_counts_what_recordings_hold(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"allocated_bytes.all.current": memory.GIB})
    monkeypatch.setattr(memory, "_recorded", 0)
    memory.note_replay(2 * memory.GIB)
    timeline = turns._Timeline()
    while not timeline.rows:
        pass
    assert timeline.rows[0]["allocated_gib"] == 3


def test_memory_beside_pytorchs_counts_as_long_as_somebody_holds_it():
    class Holder:
        pass

    before, holder = memory.uncounted(), Holder()
    memory.note_outside(memory.GIB, holder)
    assert memory.uncounted() == before + memory.GIB
    del holder
    assert memory.uncounted() == before
