"""README's generated parts, which stand between ``<!-- results NAME -->`` and ``<!-- end -->``, and its figure.

``headline``: step time and memory of stock, Unsloth and ours from ``figures/trainer_bench.csv``; ``context``: longest
sequences from ``context_bench.csv``; ``costs``: a step's largest from ``step_costs.csv``; ``decode``: task A's kernel
on each GPU from ``nf4_bench.csv``; empty without their files.
``open``: links into Kaggle and Colab; ``overview``: a row a committed run; ``not_passed``: what failed or was not run,
and why. Everything measured comes from the results files.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from . import catalogue, step_costs
from .environment import ROOT
from .results import read_rows, write_atomically

BENCH = "trainer_bench.csv"  # as `python3 -m helpers.bench_trainer` writes it
CONTEXT = "context_bench.csv"  # as `python3 -m helpers.bench_context` does
DECODE = "nf4_bench.csv"  # as `helpers.bench_nf4` does: rows of several machines
PROMOTED = (BENCH, CONTEXT, "context_bench.png", step_costs.FILE, DECODE)  # what `build --promote` takes of benches
CONTENDERS = {"stock": "stock transformers + TRL", "unsloth": "Unsloth", "ours": "ours", "graphs": "ours, CUDA graphs"}
Rows = list[dict[str, str]]


def write() -> None:
    """Make README's generated parts and the headline figure anew."""
    if (rows := bench_rows()) and drawn_from() != _digest():
        draw(rows)
    path = ROOT / "README.md"
    write_atomically(path, with_parts(path.read_text(encoding="utf-8")))


def problems() -> list[str]:
    """What of README is not as the results files say."""
    readme, found = (ROOT / "README.md").read_text(encoding="utf-8"), []
    if with_parts(readme) != readme:
        found.append("README.md: its tables differ from the results in figures/; run `python3 -m helpers build`")
    if bench_rows() and drawn_from() != _digest():
        found.append(f"figures/{BENCH}: its plot was drawn from other rows; run `python3 -m helpers build`")
    return found


def with_parts(readme: str) -> str:
    """``readme`` with its generated parts made anew."""
    makers = {"headline": _headline, "context": _context, "costs": _costs, "decode": _decode, "open": _open,
              "overview": _overview, "not_passed": _not_passed}  # fmt: skip

    def part(match: re.Match[str]) -> str:
        return f"<!-- results {match[1]} -->\n{makers[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- results (\w+) -->\n.*?<!-- end -->", part, readme, flags=re.S)


def _results() -> list[tuple[catalogue.Notebook, dict[str, Any]]]:
    found = [(item, catalogue.last_results(item.letter, again)) for item in catalogue.notebooks() for again in (0, 1)]
    return [(item, results) for item, results in found if results]


def _overview() -> str:
    lines = ["| notebook | machine | minutes | peak GiB | PASS | FAIL | NOT RUN |", "|---|---|---|---|---|---|---|"]
    for item, results in _results():
        status = [row["status"] for row in results["criteria"]]
        place = catalogue.copies(item.path.stem)["kaggle" if results["rehearsal"] else "native"]
        where = results["environment"]
        cells = [f"[{item.letter}. {item.title}]({place.relative_to(ROOT).as_posix()})",
                 f"{where['machine']}, torch {where['versions']['torch']}, {results['date']}",
                 f"{results['minutes']:.1f}", f"{results['peak_gib']:.1f}"]  # fmt: skip
        lines.append(_row(*cells, *(status.count(kind) for kind in ("PASS", "FAIL", "NOT RUN"))))
    return "\n".join(lines)


def _not_passed() -> str:
    lines = ["| notebook on | | criteria | why |", "|---|---|---|---|"]
    for item, results in _results():
        why: dict[tuple[str, str], list[str]] = {}
        for row in results["criteria"]:
            if row["status"] == "FAIL":
                value = f"{row['measured']:.4g}" if isinstance(row["measured"], float) else row["measured"]
                measured = f"{value} {row['unit']}".rstrip()
                why["FAIL", f"{row['text']}: {measured}" + (row["bound"] and f" is not {row['bound']}")] = [row["id"]]
            elif row["status"] == "NOT RUN":
                why.setdefault((row["status"], row["reason"]), []).append(row["id"])
        machine = f"{item.letter} on {results['environment']['machine']}"
        lines += [_row(machine, status, ", ".join(ids), reason) for (status, reason), ids in why.items()]
    return "\n".join(lines)


def _open() -> str:
    lines, notebooks = ["| notebook | open it |", "|---|---|"], catalogue.notebooks()
    lines += [_row(f"{item.letter}. {item.title}", catalogue.badges(item.path.stem)) for item in notebooks]
    if new := [item.letter for item in notebooks if not catalogue.last_results(item.letter, rehearsal=True)]:
        lines += ["", f"The copies there of {', '.join(new)} were not executed before they were committed."]
    if catalogue.slug().startswith("OWNER/"):
        lines += ["", "These links hold once `python3 -m helpers build --slug owner/name` has named the repository."]
    return "\n".join(lines)


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def bench_rows(name: str = BENCH) -> Rows:
    """Rows of a committed bench, the trainer's if no other; none where there is none."""
    return read_rows(ROOT / "figures" / name)


def _headline() -> str:
    if not (rows := bench_rows()):
        return ""
    lines = [f"![Seconds and GiB of a training step](figures/{Path(BENCH).stem}.png)", "",
             "| training step, random weights | " + " | ".join(CONTENDERS.values()) + " | beside Unsloth |",
             "|---|" + "---|" * (len(CONTENDERS) + 1)]  # fmt: skip
    for case, by in _by_case(rows).items():
        cells = [f"{float(by[name]['step_s']):.3f} s, {float(by[name]['allocated_gib']):.2f} GiB" if name in by else ""
                 for name in CONTENDERS]  # fmt: skip
        lines.append(_row(case, *cells, _beside_unsloth(by)))
    return "\n".join([*lines, "", f"On {_machine(rows)}; medians of one run (`python3 -m helpers.bench_trainer`)."])


def _beside_unsloth(by: dict[str, dict[str, str]]) -> str:
    """How much faster the fastest of ours is than Unsloth, and what it takes of its memory."""
    possible = [by[name] for name in ("ours", "graphs") if name in by]
    if not possible or "unsloth" not in by:
        return ""
    ours = min(possible, key=lambda row: float(row["step_s"]))
    faster = float(by["unsloth"]["step_s"]) / float(ours["step_s"])
    memory = float(ours["allocated_gib"]) / float(by["unsloth"]["allocated_gib"])
    return f"{faster:.2f}x as fast, {memory:.2f} of its memory"


def _context() -> str:
    if not (rows := bench_rows(CONTEXT)):
        return ""
    names = [name for name in CONTENDERS if any(row["contender"] == name for row in rows)]
    lines = [f"![Longest sequences](figures/{Path(CONTEXT).stem}.png)", "",
             _row("longest row that trains, batch 1, checkpointing", *(CONTENDERS[name] for name in names)),
             "|---|" + "---|" * len(names)]  # fmt: skip
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        more = "" if row["next_does_not_fit"] == "True" else " or more"
        if peak := row.get("allocated_gib"):
            more += f", {float(peak):.1f} GiB"
        where = f"{row['shape']}, {row['cap_gib']} GiB, {row['dtype']}"
        found.setdefault(where, {})[row["contender"]] = f"{int(row['tokens']):,}{more}"
    lines += [_row(where, *(by.get(name, "") for name in names)) for where, by in found.items()]
    grid = "the next length is a quarter of an octave longer, and 131,072 the models' last; or more: it was not tried"
    return "\n".join([*lines, "", f"Tokens, random weights; {grid}."])


def _costs() -> str:
    if not (rows := bench_rows(step_costs.FILE)):
        return ""
    how = ["compiled", *(x.replace("_", " ") for x in ("cuda_graphs", "checkpointing") if rows[0][x] == "True")]
    said = (
        f"A step of {rows[0]['model'].removeprefix('shape:')}, random weights, {', '.join(how)}, on {_machine(rows)}:"
    )
    return f"{said}\n\n{step_costs.table(rows)}"


def _decode() -> str:
    """The ceiling's, Unsloth's and bitsandbytes' time over ours, the worst of the dtypes, on each machine."""
    if not (rows := [row for row in bench_rows(DECODE) if row["measurement"] == "decode, GPU time"]):
        return ""
    times: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for row in rows:
        case = times.setdefault(row["case"].replace("x", " x "), {}).setdefault(row["machine"], {})
        case.setdefault(row["dtype"], {})[row["contender"]] = float(row["value"])
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    lines = [_row("NF4 decode, GPU time", *machines), "|---|" + "---|" * len(machines)]
    for size, by in times.items():
        cells = []
        for machine in machines:
            of = by.get(machine, {}).values()
            least = {name: min((t[name] / t["ours"] for t in of if name in t), default=None)
                     for name in ("ceiling", "Unsloth", "bitsandbytes")}  # fmt: skip
            said = [f"{name} {ratio:.2f}" for name, ratio in least.items() if ratio is not None]
            cells.append(f"{max(t['ours'] for t in of):.1f} us: {', '.join(said)}" if of else "")
        lines.append(_row(size, *cells))
    said = "Ours, and others' time over it, the worse of fp16 and bf16; the ceiling moves as much and decodes nothing."
    return "\n".join([*lines, "", said])


def _by_case(rows: Rows) -> dict[str, dict[str, dict[str, str]]]:
    cases: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["contender"]] = row
    return cases


def _machine(rows: Rows) -> str:
    return f"{rows[0]['machine']}, torch {rows[0]['torch']}"


def draw(rows: Rows) -> None:
    """Draw step time and peak memory of each case beside the CSV; the picture notes which rows it is of."""
    from matplotlib.figure import Figure

    cases = _by_case(rows)
    figure = Figure(figsize=(10, 1 + 0.7 * len(cases)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column, label in zip(axes, ("step_s", "allocated_gib"), ("step, s", "peak memory, GiB"), strict=True):
        for i, name in enumerate(CONTENDERS):
            there = [(k, float(by[name][column])) for k, by in enumerate(cases.values()) if name in by]
            places, values = [k + 0.21 * (i - 1.5) for k, _ in there], [value for _, value in there]
            bars = axis.barh(places, values, 0.2, label=CONTENDERS[name])
            axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axis.set_xlabel(label)
        axis.margins(x=0.12)
    axes[0].set_yticks(range(len(cases)), cases)
    axes[0].invert_yaxis()
    figure.suptitle(f"QLoRA training, random weights, {_machine(rows)}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CONTENDERS))
    plot = (ROOT / "figures" / BENCH).with_suffix(".png")
    figure.savefig(plot, dpi=150, metadata={"Source": _digest()})


def drawn_from() -> str | None:
    """Digest of the rows that the headline figure was drawn from; None where it is not there."""
    from PIL import Image

    plot = (ROOT / "figures" / BENCH).with_suffix(".png")
    if not plot.exists():
        return None
    with Image.open(plot) as image:
        return image.text.get("Source")


def _digest() -> str:
    return hashlib.sha256((ROOT / "figures" / BENCH).read_bytes()).hexdigest()
