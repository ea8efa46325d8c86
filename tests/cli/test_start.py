"""What lists and helps imports nothing heavy, in a process of its own."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "matplotlib", "peft")


def imported_by(code: str) -> set[str]:
    """The heavy packages in sys.modules at the end of `code`."""
    script = f"import sys\n{code}\nprint('\\n' + '|'.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    return set(filter(None, done.stdout.splitlines()[-1].split("|")))


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["methods"], ["methods", "--json"], ["papers"], ["adapt", "--help"], ["inspect", "--help"]],
    ids=" ".join,
)
def test_a_command_that_only_tells_imports_nothing_heavy(arguments):
    assert imported_by(f"from rankfold.cli.entry import run; assert run({arguments!r}) == 0") == set()


@pytest.mark.parametrize(
    "name", ["rankfold", "rankfold.core.registry", "rankfold.methods.catalogue", "rankfold.jobs.adapt.settings"]
)
def test_a_module_that_only_lists_imports_nothing_heavy(name):
    assert imported_by(f"import {name}") == set()


def test_the_check_sees_what_is_imported():
    assert imported_by("import numpy") == {"numpy"}


def test_python_m_rankfold_is_the_command():
    done = subprocess.run([sys.executable, "-m", "rankfold", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rankfold ")


def test_a_reader_that_leaves_is_no_error():
    shell = f"{sys.executable} -m rankfold papers --json | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
