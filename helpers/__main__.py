"""``python3 -m helpers`` and its commands. Standard library only until the environment exists."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys

from . import environment

# A whole suite: a process a core, each of which takes file after file in the order that tests/conftest.py gives.
SPREAD = ["-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]


def parser() -> argparse.ArgumentParser:
    """The command line; `build` and `windows` parse theirs again."""
    top = argparse.ArgumentParser(prog="python3 -m helpers", description="Five QLoRA notebooks over one package.")
    commands = top.add_subparsers(dest="command", required=True, metavar="run | test | build | doctor | list | windows")
    run = commands.add_parser("run", help="execute notebooks with papermill into runs/<stamp>/")
    run.add_argument("notebooks", nargs="*", help="letters, as in A C; all by default")
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("--rehearse-t4", action="store_true", help="run a Tesla T4's code on the GPU at hand")
    test = commands.add_parser("test", help="pytest; further arguments go to it", add_help=False)
    which = test.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="also what needs llama.cpp, built once and cached")
    which.add_argument("--latest", action="store_true", help="the fast tests, with the newest transformers, TRL, PEFT")
    build = commands.add_parser("build", help="notebooks, Kaggle and Colab copies and README tables from their sources")
    build.add_argument("--check", action="store_true", help="change nothing; fail where a committed file is stale")
    build.add_argument("--promote", metavar="RUN", help="commit an executed run, as runs/<stamp>")
    build.add_argument("--slug", metavar="OWNER/NAME", help="the repository's name, for badges and clone commands")
    commands.add_parser("doctor", help="what is here, what is missing, and the next step for each")
    commands.add_parser("list", help="notebooks, what they need, minutes and memory")
    commands.add_parser("windows", help="whether the pinned set would work on Windows, asked from here", add_help=False)
    return top


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    args, rest = parser().parse_known_args(arguments)
    if rest and args.command not in ("test", "windows"):
        parser().error(f"unknown argument {rest[0]!r}")
    if args.command == "doctor":
        from . import doctor

        environment.check_python()
        elsewhere = not environment.uses_running_python() and environment.missing(development=False)
        if elsewhere and environment.missing_in_venv() is not None:
            return _start([environment.venv_python(), "-m", "helpers", "doctor"])
        return doctor.main()
    if args.command == "list":
        from . import catalogue

        return catalogue.main()
    python = environment.ready_python(development=args.command in ("test", "build"))
    if args.command == "test":
        chosen = ["-m", "gpu or llamacpp or not gpu"] if args.all else []
        if args.latest:
            from . import latest

            try:
                python, chosen = latest.ready_python(python), latest.fast_tests()
            except latest.NoIndexError as error:
                print(f"SKIPPED  test --latest: {error}, so what is newest is not known")
                return 0
        return _start([python, "-m", "pytest", *chosen, *(rest or SPREAD)])
    module = {"run": "helpers.run", "build": "helpers.build", "windows": "helpers.windows"}[args.command]
    return _start([python, "-m", module, *arguments[1:]])


def _start(command: list[str]) -> int:
    """Run ``command`` in the repository and return its exit code; Ctrl-C or SIGTERM ends it and its children."""
    process = subprocess.Popen(command, cwd=environment.ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    if os.name != "nt":  # unlike Ctrl-C, it reaches this process alone
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:  # the terminal sent it the same signal: let it end its own children first
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    try:
        sys.exit(main())
    except environment.SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
