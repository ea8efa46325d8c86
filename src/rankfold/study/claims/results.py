"""The file of one claim: what was run, where, with which code and with what numbers; and whether that code is still the same.

Whoever reads a result may add a sentence to it as `reading`: what the numbers mean. It is printed, and goes with the next run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankfold.atomic import write_text
from rankfold.errors import FileError, UnknownName

from .protocol import Claim, Outcome, judge

__all__ = ["HERE", "RECORDED", "machine", "names", "outcomes", "read", "sources", "stale", "write"]

HERE = Path(__file__).parent
RECORDED = HERE / "results"
"""The runs that come with the package."""

SCHEMA = 1


def names() -> list[str]:
    """Every claim: a file of this folder that sets `CLAIM`. Found by parsing; nothing is imported.

    >>> "lora" in names()
    True
    """
    return sorted(file.stem.replace("_", "-") for file in HERE.glob("*.py") if _states_a_claim(file))


def _states_a_claim(file: Path) -> bool:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return any(isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "CLAIM" for t in n.targets) for n in body)


def file_of(name: str) -> Path:
    """The file that states a claim.

    Raises:
        UnknownName: no file does; the nearest are listed.
    """
    if name not in names():
        raise UnknownName.of("claim", name, names(), "every claim: rankfold claims")
    return HERE / f"{name.replace('-', '_')}.py"


def sources(name: str) -> dict[str, str]:
    """{file: sha256} of the claim's file and of the test beds that it imports: what a result depends on."""
    start = file_of(name)
    beds = sorted({start, *_beds(start)})
    return {bed.relative_to(HERE).as_posix(): hashlib.sha256(bed.read_bytes()).hexdigest() for bed in beds}


def _beds(file: Path) -> list[Path]:
    found: list[Path] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            bed = file.parent / f"{(node.module or '').replace('.', '/')}.py"
            if bed.parent.name == "beds" and bed.is_file():
                found += [bed, *_beds(bed)]
    return found


def stale(name: str, result: Mapping[str, Any]) -> list[str]:
    """Files that changed since the result was written; [] for a result that still speaks of the code that is there."""
    now, then = sources(name), result["sources"]
    return sorted(file for file in now.keys() | then.keys() if now.get(file) != then.get(file))


def machine() -> dict[str, Any]:
    """Where and when: processor, threads, versions, date, and the commit of the code."""
    import torch

    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """Of the checkout that holds this file; says so when the package has uncommitted changes."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", str(HERE.parents[1]))
        return git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"


def path_of(name: str, folder: Path) -> Path:
    return folder / f"{name}.json"


def write(name: str, folder: Path, result: Mapping[str, Any]) -> None:
    """Write a result as a whole, or not at all."""
    text = json.dumps({"schema": SCHEMA, "claim": name, **result}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path_of(name, folder), text + "\n")


def read(name: str, folder: Path) -> dict[str, Any] | None:
    """The result of a claim in a folder, or None.

    Raises:
        FileError: the file is damaged or of another version.
    """
    path = path_of(name, folder)
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["schema"] != SCHEMA or result["claim"] != name:
            raise ValueError(f"schema {result['schema']} of claim {result['claim']!r}; expected schema {SCHEMA} of {name!r}")
        if not {"sources", "quick", "runs", "tuning", "machine"} <= result.keys():
            raise ValueError("fields are missing")
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: not a result of this version ({error}); delete it and run: rankfold claims {name}") from error
    return dict(result)


def outcomes(claim: Claim, result: Mapping[str, Any]) -> list[Outcome]:
    """The verdicts of all checks from the numbers of a result."""
    runs = list(result["runs"].values())
    return [judge(c, [c.value(run) for run in (runs[:1] if c.kind == "identity" else runs)]) for c in claim.checks]


def as_rows(found: list[Outcome]) -> list[dict[str, Any]]:
    return [asdict(o) for o in found]
