"""From a source to committed copies: what is executed is taken, what differs by a character is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nbformat
import pytest

from helpers import build, catalogue, checks, readme, run
from helpers.environment import SetupError

ROOT = Path(__file__).parents[1]
PARTS = ("headline", "context", "costs", "decode", "open", "overview", "not_passed")
SOURCE = """# %% [markdown]
# # Q. A small notebook
#
# {{BADGES}}
#
# **Needs:** nothing.

# %%
REPOSITORY = "https://github.com/{{SLUG}}"
print("cloned at {{TAG}}")

# %% tags=["parameters"]
STEPS = 0

# %%
import json, os

results = {"date": "2026-11-25 12:00 UTC", "rehearsal": "QLORA_REHEARSE_T4" in os.environ, "metrics": {}, "criteria": [
    {"id": "Q.one", "text": "steps are at most two", "measured": STEPS, "unit": "", "bound": "<= 2", "reason": "",
     "status": "PASS" if STEPS <= 2 else "FAIL"}], "environment": {"machine": "a box", "versions": {"torch": "2.13"}}}
suffix = "_t4rehearsal" * results["rehearsal"]
for name, text in ((f"Q_results{suffix}.json", json.dumps(results)), (f"Q2_curve{suffix}.csv", "step,loss")):
    with open(os.path.join(os.environ["QLORA_OUT"], name), "w") as file:
        file.write(text)
"""


def project(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A repository of one small notebook, which the modules under test take for theirs."""
    (folder / "notebooks").mkdir(parents=True)
    (folder / "notebooks" / "Q_small.py").write_text(SOURCE)
    (folder / "README.md").write_text(
        "# Small\n" + "".join(f"\n<!-- results {part} -->\n<!-- end -->\n" for part in PARTS)
    )
    shutil.copy(ROOT / "pyproject.toml", folder)
    for module in (build, catalogue, readme, run):
        patch.setattr(module, "ROOT", folder)
    return folder


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a native run and of one that says it was a rehearsal, of the small notebook."""
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        folder = project(tmp_path_factory.mktemp("executed"), patch)
        for name in ("native", "rehearsed"):
            out = folder / "runs" / name
            out.mkdir(parents=True)
            patch.setenv("QLORA_OUT", str(out))
            if name == "rehearsed":
                patch.setenv("QLORA_REHEARSE_T4", "1")
            row = run.execute(*catalogue.notebooks(), out, {"STEPS": 2})
            assert not row["error"] and row["criteria"] == {"PASS": 1}
            runs.append(out)
    return tuple(runs)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    return project(tmp_path / "repository", monkeypatch)


def test_ids_are_stable_and_marks_filled_in():
    for item in catalogue.notebooks():
        first, second = (build.from_source(item.path) for _ in range(2))
        assert nbformat.writes(first) == nbformat.writes(second)
        nbformat.validate(first)
        assert len({cell.id for cell in first.cells}) == len(first.cells)
        text = nbformat.writes(first)
        assert "{{" + "BADGES" not in text and "{{" + "SLUG" not in text and "{{" + "TAG" not in text
        assert f"kaggle/{item.path.stem}/{item.path.stem}.ipynb" in first.cells[0].source


def test_a_failed_criterion_or_cell_is_shown_and_fails_the_run(repository, monkeypatch, capsys):
    for name in ("QLORA_OUT", "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    assert run.main(["q", "-p", "STEPS", "3"]) == 1
    (out,) = (repository / "runs").iterdir()
    shown = capsys.readouterr().out
    assert "[ 3/4]" in shown and shown.splitlines()[-1].split()[3:] == ["0", "1", "0"]  # PASS, FAIL, NOT RUN
    assert json.loads((out / "Q_results.json").read_text())["parameters"] == {"STEPS": 3}
    assert not (repository / "notebooks" / "Q_small.ipynb").exists() and len(list(out.glob("*.ipynb"))) == 1
    shutil.rmtree(repository / "runs")
    source = repository / "notebooks" / "Q_small.py"
    source.write_text(SOURCE.replace("import json, os", "import json, os, no_such_module"))
    assert run.main([]) == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'" in capsys.readouterr().out.splitlines()[-1]
    source.write_text(SOURCE.replace("import json, os", "import json, os\n\nos._exit(1)"))
    shutil.rmtree(repository / "runs")
    assert run.main([]) == 1
    assert "DeadKernelError: Kernel died" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_is_taken_whole_and_passes_the_check(repository, executed):
    for out in executed:
        build.promote(out)
    build.build()
    assert build.check() == ([], [])
    kaggle, colab = (nbformat.read(build.copies("Q_small")[host], 4) for host in build.HOSTS)
    native = nbformat.read(build.copies("Q_small")["native"], 4)
    assert [c.source for c in kaggle.cells] == [c.source for c in colab.cells] == [c.source for c in native.cells]
    assert kaggle.metadata.kaggle.accelerator == "nvidiaTeslaT4" and colab.metadata.colab.gpuType == "T4"
    assert native.metadata.executed_on["machine"] == "a box" and native.metadata.executed_on.parameters == {"STEPS": 2}
    assert {p.name for p in (repository / "figures").iterdir()} == {
        "Q_results.json", "Q_results_t4rehearsal.json", "Q2_curve.csv", "Q2_curve_t4rehearsal.csv",
    }  # fmt: skip
    text = (repository / "README.md").read_text()
    assert "| [Q. A small notebook](notebooks/Q_small.ipynb) | a box, torch 2.13, 2026-11-25 12:00 UTC | " in text
    assert text.count(" | 1 | 0 | 0 |\n") == 2 and "colab.research.google.com/github/OWNER" in text


@pytest.mark.parametrize("place", ["native", "kaggle"])
def test_one_character_of_a_source_makes_the_check_fail(repository, executed, place):
    build.promote(executed[place == "kaggle"])
    source = repository / "notebooks" / "Q_small.py"
    source.write_text(SOURCE.replace("STEPS = 0", "STEPS = 1"))
    build.build()  # leaves what was executed alone
    problems, _ = build.check()
    where = build.copies("Q_small")[place].relative_to(repository).as_posix()
    assert f"{where}: cell 2 differs from its source: 'STEPS = 1'" in problems
    with pytest.raises(SetupError, match="is not taken: cell 2 differs"):
        build.promote(executed[0])


def test_a_notebook_without_executed_copies_is_reported_and_does_not_fail(repository):
    build.build()
    problems, notes = build.check()
    assert not problems and notes == [
        f"{build.copies('Q_small')[kind].relative_to(repository).as_posix()}: not executed yet"
        for kind in ("native", "kaggle", "colab")
    ]


def test_a_run_that_is_incomplete_or_unfit_changes_nothing(repository, executed, tmp_path):
    def spoilt(change) -> Path:
        out = tmp_path / "spoilt"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(executed[0], out)
        notebook = nbformat.read(out / "Q_small.ipynb", 4)
        change(notebook)
        nbformat.write(notebook, out / "Q_small.ipynb")
        return out

    def skip(notebook):
        notebook.cells[-1].execution_count = None

    def show(text):
        return lambda notebook: notebook.cells[-1].outputs.append(nbformat.v4.new_output("stream", text=text))

    def fail(notebook):
        notebook.cells[-1].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]

    def widgets(notebook):
        notebook.metadata.widgets = {}

    for change, said in (
        (skip, "not executed in order"), (fail, "error output"), (widgets, "widget state"),
        (show("hf_" + "a" * 30), "a token"), (show("at /home/someone/x"), "a home path"), (show("x" * 10**6), "bytes"),
    ):  # fmt: skip
        with pytest.raises(SetupError, match=f"is not taken: .*{said}"):
            build.promote(spoilt(change))
    out = spoilt(lambda notebook: None)
    (out / "Q_results.json").unlink()
    with pytest.raises(SetupError, match="no Q_results.json"):
        build.promote(out)
    assert not (repository / "figures").exists() and not build.copies("Q_small")["native"].exists()


def test_tables_results_and_plots_that_do_not_belong_together_are_found(repository, executed):
    build.promote(executed[0])
    (repository / "figures" / "Q_lonely.png").touch()
    results = repository / "figures" / "Q_results.json"
    results.write_text(results.read_text().replace("2026-11-25", "2026-11-24"))
    problems, _ = build.check()
    assert [problem.partition(":")[0] for problem in problems] == [
        "notebooks/Q_small.ipynb", "figures/Q_lonely.png", "README.md",
    ]  # fmt: skip


def test_what_failed_or_was_not_run_is_in_readme(repository, executed):
    build.promote(executed[0])
    path = repository / "figures" / "Q_results.json"
    results = json.loads(path.read_text())
    (row,) = results["criteria"]
    left_out = [row | {"id": f"Q.{i}", "status": "NOT RUN", "reason": "needs a GPU"} for i in "ab"]
    results["criteria"] = [row | {"status": "FAIL", "measured": 3}, *left_out]
    path.write_text(json.dumps(results))
    readme.write()
    text = (repository / "README.md").read_text()
    assert "| Q on a box | FAIL | Q.one | steps are at most two: 3 is not <= 2 |" in text
    assert "| Q on a box | NOT RUN | Q.a, Q.b | needs a GPU |" in text


def test_the_headline_figure_follows_its_rows(repository, tmp_path):
    assert "bench" not in readme.with_parts((repository / "README.md").read_text())
    bench = tmp_path / "bench"
    bench.mkdir()
    header, machine = "case,contender,step_s,allocated_gib,machine,torch", "a GPU,2.13"
    rows = ["1B,stock,2,9", "1B,unsloth,1,8", "1B,ours,0.5,7", "8B,ours,3.25,6.5"]
    (bench / "trainer_bench.csv").write_text("\n".join([header, *(f"{row},{machine}" for row in rows)]))
    build.promote(bench)
    build.build()
    assert build.check()[0] == []
    text = (repository / "README.md").read_text()
    assert "| 1B | 2.000 s, 9.00 GiB | 1.000 s, 8.00 GiB | 0.500 s, 7.00 GiB |" in text
    assert "| 8B |  |  | 3.250 s, 6.50 GiB |" in text and "(figures/trainer_bench.png)" in text
    kept = repository / "figures" / "trainer_bench.csv"
    kept.write_text(kept.read_text().replace("0.5", "0.6"))
    assert [problem.partition(":")[0] for problem in build.check()[0]] == ["README.md", "figures/trainer_bench.csv"]


def test_other_benches_give_readme_their_tables(repository, tmp_path):
    header = "shape,contender,memory,cap_gib,dtype,tokens,next_does_not_fit,error"
    rows = ["llama,unsloth,T4,14.7,float16,8192,True,", "llama,ours,T4,14.7,float16,131072,False,"]
    (tmp_path / "context_bench.csv").write_text("\n".join([header, *rows]))
    (tmp_path / "context_bench.png").write_bytes(b"")
    costs = "cost,operations,ms,share,speedup_without,model,cuda_graphs,checkpointing,machine,torch"
    (tmp_path / "step_costs.csv").write_text(
        f"{costs}\nNF4 decoding,448,12.5,0.1,1.11,shape:llama,True,False,a GPU,2.13"
    )
    build.promote(tmp_path)
    build.build()
    assert build.check()[0] == []
    text = (repository / "README.md").read_text()
    assert "| llama, 14.7 GiB, float16 | 8,192 | 131,072 or more |" in text
    assert "A step of llama, random weights, compiled, cuda graphs, on a GPU, torch 2.13:" in text
    assert "| NF4 decoding | 448 | 12.5 | 10% | 1.11x as fast |" in text


def test_the_decoder_of_each_machine_stays_in_readmes_table(repository, tmp_path):
    header = "measurement,case,dtype,contender,value,unit,machine"

    def measured(machine: str, ours: float) -> None:
        rows = [f'"decode, GPU time",64x128,{dtype},{name},{value},us,{machine}' for dtype, name, value in (
            ("float16", "ours", ours), ("float16", "ceiling", 4.9), ("bfloat16", "ours", 5.0),
            ("bfloat16", "ceiling", 5.0), ("bfloat16", "Unsloth", 7.5),
        )]  # fmt: skip
        (tmp_path / "nf4_bench.csv").write_text("\n".join([header, *rows]))
        build.promote(tmp_path)

    for machine, ours in (("one", 5.0), ("other", 5.0), ("one", 10.0)):
        measured(machine, ours)
    build.build()
    text = (repository / "README.md").read_text()
    assert "| NF4 decode, GPU time | one | other |" in text
    assert "| 64 x 128 | 10.0 us: ceiling 0.49, Unsloth 1.50 | 5.0 us: ceiling 0.98, Unsloth 1.50 |" in text


def test_a_new_slug_is_stamped_everywhere_without_a_new_run(repository, executed):
    for out in executed:
        build.promote(out)
    build.set_slug("someone/their-fork")
    build.build()
    assert build.check() == ([], [])
    for place in build.copies("Q_small").values():
        text = place.read_text()
        assert "github.com/someone/their-fork" in text and "OWNER" not in text
    metadata = json.loads((repository / "kaggle" / "Q_small" / "kernel-metadata.json").read_text())
    assert metadata["id"] == "someone/qlora-q-small"


def test_every_notebook_passes_kaggles_own_checks(repository, tmp_path):
    for path in (ROOT / "notebooks").glob("*.py"):
        shutil.copy(path, repository / "notebooks")
    build.build()
    assert build.check()[0] == []
    slugs = [build.kernel_metadata(item.path.stem)["id"] for item in catalogue.notebooks()]
    assert len(set(slugs)) == len(slugs)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("machine_shape", "GPU T4 x2", "not 'NvidiaTeslaT4'"), ("enable_internet", False, "enable_internet is False"),
        ("title", "QLoRA", "does not match title"), ("language", "cobol", "kaggle refuses it"),
        ("code_file", "missing.ipynb", "kaggle refuses it"), ("is_private", True, "would not run it publicly"),
    ],
)  # fmt: skip
def test_kaggle_metadata_that_would_not_run_is_named(repository, key, value, said):
    build.build()
    folder = repository / "kaggle" / "Q_small"
    wanted = build.kernel_metadata("Q_small")
    (folder / "kernel-metadata.json").write_text(json.dumps(wanted | {key: value}))
    assert said in "\n".join(checks.kaggle_problems(folder, wanted))
