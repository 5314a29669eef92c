"""A notebook that goes on where a section fails: what was measured is shown, and the table says FAIL.

sections = Sections(results)      # in a cell; from the next one on
sections.begin("D4")              # what fails from here on is D4's
"""

from __future__ import annotations

import ast
import traceback

from .results import Results

GUARD = """
try:
    pass
except Exception as error:
    __shown__ = __sections__.failed(error)
"""


class Sections:
    """Lets every cell run to its end or its error; an error is printed and is a failed criterion of its section.

    It is a transformer of syntax trees, as IPython takes them: a cell becomes the body of a ``try``, and its last
    expression is shown as before. Outside IPython it does nothing.
    """

    def __init__(self, results: Results):
        from IPython import get_ipython

        self.results = results
        self.current = results.notebook
        if (shell := get_ipython()) is not None:
            shell.ast_transformers.append(self)
            shell.user_ns["__sections__"] = self

    def begin(self, id: str) -> None:
        """From here on errors count as those of the section ``id``, as ``D4`` or ``B.loss``."""
        self.current = id

    def failed(self, error: Exception) -> None:
        """Print ``error`` and record it, once a section: what comes after may only miss what was not made."""
        print("".join(traceback.format_exception(error, limit=-6)))
        id = f"{self.current}.error"
        if id not in self.results.criteria:
            said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            self.results.criterion(id, f"the section runs to its end; it raised {said}", False)

    def visit(self, module: ast.Module) -> ast.Module:
        """The cell within ``try``."""
        body, shown = list(module.body), []
        if body and isinstance(body[-1], ast.Expr):
            body[-1] = ast.copy_location(ast.Assign([ast.Name("__shown__", ast.Store())], body[-1].value), body[-1])
            shown = ast.parse("__shown__").body
        guard = ast.parse(GUARD).body[0]
        guard.body = body or guard.body
        module.body = [guard, *shown]
        return ast.fix_missing_locations(module)
