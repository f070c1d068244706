"""Threads: a process that trained on one ends well."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import thread_runs

PACKAGE = Path(thread_runs.ma.__file__).parent
RUNS = int(os.environ.get("THREAD_RUNS", "8"))  # processes of each kind; one in two failed, or more, before the cure
WAYS = ("thread", "threads", "pool", "asyncio", "not joined", "idle daemon", "fork", "spawn")


def run_process(work, way):
    command = [sys.executable, thread_runs.__file__, work, way]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("way", WAYS)
def test_a_process_that_trained_on_another_thread_ends_well(way):
    for _ in range(RUNS):
        run_process("small", way)


@pytest.mark.parametrize("work", sorted(set(thread_runs.WORK) - {"small"}))
def test_whatever_the_thread_did(work):
    for _ in range(RUNS // 4):
        run_process(work, "thread")


def test_nothing_in_the_package_is_compiled_for_all_threads():
    """A bare ``mx.compile`` leaves Python objects in a cache of the thread, which abort the process."""
    bare = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            imported = isinstance(node, ast.ImportFrom) and any(alias.name == "compile" for alias in node.names)
            if imported or (isinstance(node, ast.Attribute) and ast.unparse(node) == "mx.compile"):
                bare.append(file.relative_to(PACKAGE).as_posix())
    assert bare == ["update/compiled.py"]
