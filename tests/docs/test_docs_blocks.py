"""Every Python and shell block of the documentation runs, page by page and in order, in a folder of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?P<info>(?:python|bash)[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S)
TITLE = re.compile(r'title="(?P<file>[\w.-]+\.py)"')


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(m["info"], m["code"]) for m in BLOCK.finditer(page.read_text(encoding="utf-8"))]


WITH_CODE = [p for p in PAGES if p.exists() and blocks(p)]


def test_the_pages_have_code() -> None:
    assert {"README.md", "add-a-method.md", "algebra.md", "planner.md", "tutorial.md"} <= {p.name for p in WITH_CODE}


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")  # trl reports its use to its makers, but not from tests
    names: dict[str, object] = {"__name__": "docs"}
    ran = 0
    for info, code in blocks(page):
        title = TITLE.search(info)
        if info.startswith("bash"):
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            done = subprocess.run(["bash", "-e", "-c", code], capture_output=True, text=True, env={**os.environ, "PATH": path})
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        elif title:  # a file that the reader is asked to save
            Path(title["file"]).write_text(code, encoding="utf-8")
        else:
            exec(compile(code, str(page), "exec"), names)
        ran += 1
    assert ran
