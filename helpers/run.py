"""Executes notebooks with papermill into ``runs/<stamp>/``, one progress line a cell, one table at the end."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import papermill
import psutil
from papermill.engines import NBClientEngine, papermill_engines
from traitlets.config import Config

from . import build, catalogue
from .environment import ROOT, SetupError

GIB = 1024**3


class ProgressEngine(NBClientEngine):
    """papermill's own engine, saying how long each code cell took and under which heading it stands."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
        codes = [i for i, cell in enumerate(nb_man.nb.cells) if cell.cell_type == "code"]
        headings = _headings(nb_man.nb.cells)
        complete, started = nb_man.cell_complete, {}

        def cell_start(cell, cell_index=None, **more):
            started[cell_index] = time.perf_counter()
            return type(nb_man).cell_start(nb_man, cell, cell_index, **more)

        def cell_complete(cell, cell_index=None, **more):
            if cell_index in codes:
                seconds, number = time.perf_counter() - started[cell_index], codes.index(cell_index) + 1
                print(f"  [{number:2d}/{len(codes)}] {seconds:6.1f} s  {headings[cell_index][:76]}", flush=True)
            return complete(cell, cell_index, **more)

        nb_man.cell_start, nb_man.cell_complete = cell_start, cell_complete
        return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)


def _headings(cells) -> list[str]:
    """For each cell the Markdown heading that it stands under."""
    heading, found = "", []
    for cell in cells:
        if cell.cell_type == "markdown" and (match := re.search(r"^#+ (.+)$", cell.source, re.M)):
            heading = match[1]
        found.append(heading)
    return found


papermill_engines.register("progress", ProgressEngine)


class PeakMemory:
    """Peak GiB while the block runs: of the GPU's memory where there is one, else of the kernel's resident memory."""

    def __enter__(self) -> PeakMemory:
        self.gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        used = _gpu_bytes_used() or _resident_bytes
        while not self._stop.wait(0.2):
            self.gib = max(self.gib, used() / GIB)


def _gpu_bytes_used() -> Callable[[], int] | None:
    """Bytes that the notebook's processes hold on the fullest of its GPUs; None without a GPU.

    Where the driver does not name processes (in most containers), the bytes in use beyond those at the start.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        numbered = re.fullmatch(r"[\d, ]+", visible)  # or identifiers, or nothing
        wanted = map(int, visible.split(",")) if numbered else range(pynvml.nvmlDeviceGetCount())
        cards = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in wanted]
        before = [pynvml.nvmlDeviceGetMemoryInfo(card).used for card in cards]
    except Exception:  # no driver, no NVML: the machine has no GPU to watch
        return None

    def used() -> int:
        mine = {process.pid for process in psutil.Process().children(recursive=True)}
        running = [[p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(c) if p.pid in mine] for c in cards]
        if any(running):
            return max(sum(p.usedGpuMemory or 0 for p in processes) for processes in running)
        return max(pynvml.nvmlDeviceGetMemoryInfo(c).used - b for c, b in zip(cards, before, strict=True))

    return used


def _resident_bytes() -> int:
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


@contextlib.contextmanager
def _kernel_config() -> Iterator[Config]:
    """Sockets in a folder of their own where there are such: a kernel over TCP warns of missing encryption, and two
    kernels started at once in one folder take each other's sockets."""
    if os.name == "nt":
        yield Config()
        return
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        yield Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/socket"}})


def execute(notebook: catalogue.Notebook, folder: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Execute one notebook; returns its row of the final table and adds minutes and peak to its results file."""
    source = folder / f"{notebook.path.stem}.source.ipynb"
    build.write_notebook(build.from_source(notebook.path), source)
    mine = {name: value for name, value in parameters.items() if name in notebook.parameters}
    print(f"{notebook.letter}  {notebook.title}", flush=True)
    started, error = time.perf_counter(), ""
    with PeakMemory() as peak, _kernel_config() as config:
        try:
            papermill.execute_notebook(
                source, folder / f"{notebook.path.stem}.ipynb", mine, engine_name="progress", kernel_name="python3",
                progress_bar=False, cwd=ROOT, config=config, start_timeout=300, execution_timeout=7200,
            )  # fmt: skip
        except papermill.PapermillExecutionError as failure:
            error = f"{failure.ename}: {failure.evalue}".splitlines()[0]
            print("\n".join(failure.traceback), file=sys.stderr)
        except (RuntimeError, TimeoutError) as failure:  # a kernel that did not start, died, or ran out of time
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        finally:
            source.unlink()
    minutes = (time.perf_counter() - started) / 60
    results = sorted(folder.glob(f"{notebook.letter}_results*.json"))
    criteria: Counter[str] = Counter()
    if results:
        document = json.loads(results[0].read_text(encoding="utf-8"))
        document |= {"minutes": round(minutes, 2), "peak_gib": round(peak.gib, 2), "parameters": mine}
        results[0].write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        criteria.update(row["status"] for row in document["criteria"])
    elif not error:
        error = "left no results file"
    return {"letter": notebook.letter, "minutes": minutes, "peak": peak.gib, "criteria": criteria, "error": error}


def _new_folder(wanted: Path) -> Path:
    """Make ``wanted``, or ``wanted-2`` and so on where a run that began in the same second has it."""
    for folder in (wanted, *(wanted.with_name(f"{wanted.name}-{i}") for i in range(2, 100))):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise SetupError(f"{wanted.parent} is full of runs named {wanted.name}; remove some")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("notebooks", nargs="*")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[])
    parser.add_argument("--rehearse-t4", action="store_true")
    args = parser.parse_args(argv)
    chosen = catalogue.chosen(args.notebooks)
    parameters = catalogue.checked_parameters(args.parameter, chosen)
    if args.rehearse_t4 and _gpu_bytes_used() is None:
        raise SetupError("--rehearse-t4 runs a T4's code on a newer NVIDIA card; this machine has no GPU")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S") + ("-t4rehearsal" if args.rehearse_t4 else "")
    folder = _new_folder(ROOT / "runs" / stamp)
    os.environ["QLORA_OUT"] = str(folder.relative_to(ROOT))  # kernels start in ROOT; prints name no one's home
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if args.rehearse_t4:
        os.environ["QLORA_REHEARSE_T4"] = "1"
    rows = [execute(notebook, folder, parameters) for notebook in chosen]
    print(f"\nin runs/{folder.name}:")
    print(f"{'notebook':<10}{'minutes':>8}{'peak GiB':>10}{'PASS':>6}{'FAIL':>6}{'NOT RUN':>9}")
    for row in rows:
        counts = row["criteria"]
        print(f"{row['letter']:<10}{row['minutes']:>8.1f}{row['peak']:>10.2f}{counts['PASS']:>6}{counts['FAIL']:>6}"
              f"{counts['NOT RUN']:>9}   {row['error']}")  # fmt: skip
    return 1 if any(row["error"] or row["criteria"]["FAIL"] for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
