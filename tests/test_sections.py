"""A cell that raises is shown and counted, and the next ones run."""

from __future__ import annotations

import pytest

from helpers.results import Results
from helpers.sections import Sections


@pytest.fixture
def shell(monkeypatch, tmp_path):
    import IPython
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setenv("QLORA_OUT", str(tmp_path))
    shell = InteractiveShell()
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    return shell


def test_an_error_is_its_sections_and_the_next_cells_run(shell, capsys):
    results = Results("D")
    sections = Sections(results)
    shell.user_ns["sections"] = sections
    assert shell.run_cell("sections.begin('D1')\nfirst = 1\nfirst + 1").result == 2
    ran = shell.run_cell("before = 1\nraise OSError('disk\\nfull')\nafter = 1")
    assert ran.success and "before" in shell.user_ns and "after" not in shell.user_ns
    shell.run_cell("missing")
    shell.run_cell("sections.begin('D2')")
    assert shell.run_cell("first + 2").result == 3
    assert shell.run_cell("missing").result is None
    shell.run_cell("")
    assert "OSError: disk" in capsys.readouterr().out
    found = {id: (row["status"], row["text"]) for id, row in results.criteria.items()}
    assert found == {
        "D1.error": ("FAIL", "the section runs to its end; it raised OSError: disk"),
        "D2.error": ("FAIL", "the section runs to its end; it raised NameError: name 'missing' is not defined"),
    }
