"""B11: seconds and modules until the first answer, each command in its own process; the floor is Python that does nothing."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from .results import Results

__all__ = ["COMMANDS", "measure", "run"]

CALL = """
import sys
sys.argv = {argv!r}
from rankfold.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
COMMANDS = {
    "python": "",
    "import rankfold": "import rankfold",
    "rankfold --help": CALL.format(argv=["rankfold", "--help"]),
    "rankfold methods": CALL.format(argv=["rankfold", "methods"]),
    "rankfold papers": CALL.format(argv=["rankfold", "papers"]),
    "import torch": "import torch",
    "import peft": "import peft",
}
COUNT = """
import sys, json
print(json.dumps([len(sys.modules), [m for m in ("torch", "transformers") if m in sys.modules]]))
"""


def measure(code: str, repeats: int) -> dict[str, Any]:
    """Median wall and CPU seconds of the whole process, the number of modules at its end, and which heavy ones are among them.

    Raises:
        RuntimeError: the command failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-c", f"{code}\n{COUNT}"]
    wall, cpu, said = [], [], ""
    for _ in range(repeats + 1):
        before, start = os.times(), time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        wall.append(time.perf_counter() - start)
        after = os.times()
        cpu.append(after.children_user + after.children_system - before.children_user - before.children_system)
        if done.returncode:
            raise RuntimeError(f"{code!r} failed: {done.stderr.strip()[-300:]}")
        said = done.stdout.strip().rsplit("\n", maxsplit=1)[-1]
    modules, heavy = json.loads(said)
    return {
        "wall": round(statistics.median(wall[1:]), 4),  # the first run also writes bytecode and fills the disk cache
        "cpu": round(statistics.median(cpu[1:]), 4),
        "modules": modules,
        "heavy": heavy,
        "repeats": repeats,
    }


def run(results: Results, size: str = "short", only: Sequence[str] = ()) -> None:
    for name, code in COMMANDS.items():
        if (only and name not in only) or (size == "toy" and name not in ("python", "import rankfold")):
            continue
        row = results.measure(name, lambda code=code: measure(code, 1 if size == "toy" else 5))
        heavy = f"   loads {', '.join(row['heavy'])}" if row["heavy"] else ""
        print(f"B11 {name:18} {row['wall']:.3f} s   {row['modules']:5} modules{heavy}", flush=True)
