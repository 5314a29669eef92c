"""The FSDP2 bench's turns, with stand-ins as contenders: none is timed before all are warm, nor beside another."""

from __future__ import annotations

import csv
import json

import pytest

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


def test_contenders_take_turns_and_a_failed_one_stops_nobody(tmp_path):
    runs = ["2:ours, 8-bit Adam", "1:ours, 8-bit Adam", "1:ours, eager", "1:ours, bitsandbytes' linear"]
    (log := tmp_path / "log").mkdir()
    bench = Bench(Case(), runs, tmp_path / "out", limit_s=4, at_once=3)
    bench.entry = ["-c", STAND_IN.format(log=str(log))]
    rows = {f"{row['gpus']}:{row['contender']}": row for row in bench.start().finish()}
    assert list(rows) == runs
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


def test_an_unknown_contender_is_named():
    with pytest.raises(ValueError, match="'2:theirs' is not GPUS:CONTENDER"):
        Bench(Case(), ["2:theirs"], None, at_once=1)
