"""Ranks as a notebook or a bench starts them: none outlives one that fails, whether or not anybody looks."""

from __future__ import annotations

import pytest

from helpers.ranks import Job

FAILS = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
if rank == "1":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in a collective that never ends
    (folder / "spinning").touch()
    time.sleep(60)
while not (folder / "spinning").exists():
    time.sleep(0.01)
raise RuntimeError("out of memory")
"""


def test_ranks_that_wait_for_a_failed_one_are_stopped_though_nobody_looks(tmp_path):
    job = Job("two", ["-c", FAILS, str(tmp_path)], tmp_path, ranks=2).start()
    assert job.processes[1].wait(timeout=30) == -9
    assert job.processes[0].wait(timeout=1) == 1
    while not job.ended():
        pass
    assert job.failure.startswith("rank 0 ended with code 1: RuntimeError: out of memory")


@pytest.mark.parametrize(("limit_s", "why"), [(0.5, "was not done after 0 s"), (60, "was interrupted")])
def test_a_job_ends_when_time_is_up_or_it_is_told_to(tmp_path, limit_s, why):
    job = Job("waits", ["-c", "import time; time.sleep(60)"], tmp_path, limit_s=limit_s).start()
    if limit_s > 1:
        job.stop(why)
    assert job.processes[0].wait(timeout=30) == -15
    while not job.ended():
        pass
    job.stop("too late to be a reason")
    assert job.failure.startswith(why)
