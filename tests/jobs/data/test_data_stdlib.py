"""The built-in sets: sizes, no leakage between train and test, the same in every process."""

import ast
import re
import subprocess
import sys

import pytest

from rankfold.errors import DataError, OptionError, UnknownName
from rankfold.jobs.data import load, names, read
from rankfold.jobs.data.functions import first_sentence, nameless_code
from rankfold.jobs.data.modules import library_modules


def top(module):
    return re.sub(r"^_py", "", module.split(".")[0]).lstrip("_")


def test_code_has_the_promised_size_and_no_leak():
    train, test = load("stdlib-code"), load("stdlib-code", "test")
    assert len(train) >= 2400
    assert len(test) >= 800
    assert not {top(module) for module in train["module"]} & {top(module) for module in test["module"]}
    both = {column: [*train[column], *test[column]] for column in ("query", "document")}
    assert len({query.lower() for query in both["query"]}) == len(both["query"])
    assert len(set(both["document"])) == len(both["document"])


def test_code_tells_neither_its_name_nor_its_docstring():
    table = load("stdlib-code", "test")
    for row in table.rows():
        (function,) = ast.parse(row["document"]).body
        assert function.name == "function"
        assert row["query"] not in row["document"]


def test_names_are_replaced_everywhere():
    source = '''
@cached
def total(xs, *, start=0):
    """Add up. More."""
    if not xs:
        raise ValueError("total of nothing; subtotal stays")
    return self.total(xs[1:]) + total.cache
'''
    code, statements = nameless_code(ast.parse(source).body[0])
    assert statements == 3
    assert code == (
        "def function(xs, *, start=0):\n    if not xs:\n        raise ValueError('function of nothing; subtotal stays')\n"
        "    return self.function(xs[1:]) + function.cache"
    )


def test_first_sentences():
    assert first_sentence("One.  Two.") == "One."
    assert first_sentence("Up to i.e. here! And more") == "Up to i.e. here!"
    assert first_sentence("Version 3.11 of\n   it\n\nMore.") == "Version 3.11 of it"


def test_library_modules_leave_out_tests_and_packages(tmp_path):
    for name in ("a.py", "b/__init__.py", "b/test/t.py", "site-packages/c.py", "_pyio.py", "not-a-name.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    found = {(module.name, module.group) for module in library_modules(tmp_path)}
    assert found == {("a", "a"), ("b", "b"), ("_pyio", "io")}
    with pytest.raises(DataError, match="no library sources"):
        list(library_modules(tmp_path / "site-packages" / "void"))


def test_docs_are_balanced_and_disjoint():
    train, test = load("stdlib-docs"), load("stdlib-docs", "test")
    assert set(train["label"]) == set(test["label"])
    assert len(set(train["label"])) == 10
    assert not set(train["text"]) & set(test["text"])


def test_source_splits_by_module():
    train, test = load("stdlib-source"), load("stdlib-source", "test")
    assert not {top(module) for module in train["module"]} & {top(module) for module in test["module"]}
    assert sum(map(len, train["text"])) > 5_000_000
    assert sum(map(len, test["text"])) > 1_000_000


def test_loading_options():
    table = load("stdlib-code", "test", limit=5)
    assert list(table.rows()) == list(load("stdlib-code", "test").rows())[:5]
    assert read("stdlib-code", "embed", split="test")["query"][:5] == table["query"]
    with pytest.raises(UnknownName, match="nearest: stdlib-code"):
        load("stdlib-kode")
    with pytest.raises(UnknownName, match="'tset'; nearest: test"):
        load("stdlib-code", "tset")
    with pytest.raises(OptionError, match="limit=0"):
        load("stdlib-code", limit=0)
    with pytest.raises(DataError, match="stdlib-code is for task embed, not classify"):
        read("stdlib-code", "classify")
    assert all(line.partition(":")[0] in ("embed", "classify", "lm") for line in names().values())


def test_another_process_gets_the_same_rows_without_torch():
    script = (
        "import sys; from rankfold.jobs.data import load; t = load('stdlib-code', 'test', 3);"
        "print(list(t.rows())); assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert result.stdout.strip() == str(list(load("stdlib-code", "test", 3).rows()))
