"""What a notebook leaves behind: criteria judged by their bounds, figures with their rows, nothing by halves."""

from __future__ import annotations

import csv
import json
import math
import sys
import types
from collections import Counter

import pytest
import torch

from helpers import host, results, run, t4
from helpers.results import Results


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_OUT", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.mark.parametrize("values", [[math.nan, 1.0], [1.0, math.nan], [torch.tensor(1.0), math.nan, 2.0], []])
def test_the_worst_of_what_is_no_number_is_none(values):
    assert math.isnan(results.worst(values))
    judged = Results("A")
    judged.criterion("A.x", "text", results.worst(iter(values)), "<= 5")
    assert judged.criteria["A.x"]["status"] == results.FAIL
    assert results.worst([1.0, torch.tensor(3.0), 2]) == 3.0


@pytest.mark.parametrize(
    ("measured", "bound", "status"),
    [
        (1.2, ">= 1.15", "PASS"), (1.1, ">= 1.15", "FAIL"), (torch.tensor(0.5), "<= 0.5", "PASS"), (0, "== 0", "PASS"),
        (float("nan"), "<= 1", "FAIL"), (True, "== True", "PASS"), (False, "== True", "FAIL"),
    ],
)  # fmt: skip
def test_a_criterion_is_judged_by_its_bound(measured, bound, status):
    found = Results("Q")
    found.criterion("Q.one", "text", measured, bound)
    assert found.criteria["Q.one"]["status"] == status
    json.dumps(found.criteria)


@pytest.mark.parametrize("bound", ["1.15", "about 3", ">="])
def test_a_bound_without_an_operator_is_refused(bound):
    with pytest.raises(ValueError, match="bound"):
        Results("Q").criterion("Q.one", "text", 1, bound)


def test_what_is_saved_and_shown(folder):
    found = Results("Q")
    found.metric("step", 0.25, "s")
    found.criterion("Q.fast", "faster", 1.25, ">= 1.15", "x")
    found.not_run("Q.t4", "on a T4", "no T4 at hand")
    saved = json.loads(found.save().read_text())
    assert saved["metrics"] == {"step": {"value": 0.25, "unit": "s"}} and not saved["rehearsal"]
    assert torch.__version__.startswith(saved["environment"]["versions"]["torch"])  # metadata may leave out "+cu128"
    assert [row["status"] for row in saved["criteria"]] == ["PASS", "NOT RUN"]
    shown = found.table().data.splitlines()
    assert shown[2] == "| Q.fast | faster | 1.25 x | >=\u00a01.15 | PASS |"
    assert shown[3] == "| Q.t4 | on a T4 |  |  | NOT RUN: no T4 at hand |"
    assert {line.count("|") for line in shown} == {6}
    assert [path.name for path in folder.iterdir()] == ["Q_results.json"]


def test_a_rehearsal_says_so_and_judges_no_speed(folder, monkeypatch):
    monkeypatch.setattr(host, "rehearsing_t4", lambda: True)
    monkeypatch.setattr(t4, "targets", lambda: Counter({".target sm_75": 3, ".target sm_90a": 1}))
    monkeypatch.setattr(host, "environment", dict)
    found = Results("Q")
    found.criterion("Q.exact", "exact", 0, "== 0")
    found.criterion("Q.fast", "faster", 1.25, ">= 1.15", "x", speed=True)
    assert found.save().name == "Q_results_t4rehearsal.json"
    exact, fast, code = found.criteria.values()
    assert exact["status"] == "PASS" and exact["reason"] == "rehearsed, not run on a T4"
    assert fast["status"] == "NOT RUN" and "speed" in fast["reason"]
    assert code["status"] == "FAIL" and code["measured"] == 1  # a kernel that a T4 would not run


def test_a_figure_lies_beside_the_rows_it_is_drawn_from(folder):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots()
    axes.plot([1, 2], [3, 4])
    assert results.save_figure(fig, "Q_curve", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 4.0, "note": "x"}]) is fig
    assert (folder / "Q_curve.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "Q_curve.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"step": "1", "loss": "3.0", "note": ""}, {"step": "2", "loss": "4.0", "note": "x"},
        ]  # fmt: skip
    assert not plt.get_fignums()  # closed: shown once, by the notebook


@pytest.mark.parametrize(("named", "gib"), [(True, 3.0), (False, 5.0)])
def test_peak_memory_is_of_the_notebooks_own_gpus_and_processes(named, gib, monkeypatch):
    used = {0: [40, 70], 1: [2, 7]}  # GiB before and later, of which a notebook on card 1 holds 3

    def running(card):
        return [types.SimpleNamespace(pid=11 if named else 99, usedGpuMemory=3 * run.GIB)] if card == 1 else []

    fake = types.SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2, nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetMemoryInfo=lambda card: types.SimpleNamespace(used=used[card][0] * run.GIB),
        nvmlDeviceGetComputeRunningProcesses=running,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(run.psutil.Process, "children", lambda self, recursive: [types.SimpleNamespace(pid=11)])
    read = run._gpu_bytes_used()
    for amounts in used.values():
        amounts.pop(0)
    assert read() / run.GIB == gib
