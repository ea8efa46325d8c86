"""Any bytes in any reader: a table or one of our own errors, never anything else."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.errors import RankfoldError
from rankfold.jobs.data import TASKS, Table, read
from rankfold.jobs.data.reader import SUFFIXES

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENS = st.sampled_from(
    [b"text", b"label", b"query", b"document", b",", b"\t", b";", b"\n", b"\r", b'"', b"{", b"}", b"[", b"]", b":", b"1", b"null"]
    + [b"\\ud800", b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"NaN", b'{"text": "a", "label": "b"}\n', b"text,label\n", b"a,b\n"]
)
CONTENT = st.one_of(st.binary(max_size=200), st.lists(TOKENS, max_size=30).map(b"".join))
ENCODINGS = st.sampled_from([None, "utf-8", "iso-8859-1", "utf-16", "utf-7", "ascii", "rot13", "nonsense", "\0"])


def table_or_our_error(path: Path, task: str, **options) -> None:
    try:
        table = read(path, task, **options)
    except RankfoldError:
        return
    assert isinstance(table, Table)
    assert len(table) > 0
    assert all(isinstance(value, str) and value.encode() for values in table.columns.values() for value in values)


@pytest.mark.parametrize("suffix", SUFFIXES)
@FEW
@given(content=CONTENT, task=st.sampled_from(sorted(TASKS)), encoding=ENCODINGS)
def test_any_bytes(suffix, content, task, encoding, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    table_or_our_error(path, task, encoding=encoding)


def parquet(folder: Path) -> Path:
    path = folder / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": ["1", "2"]}), path)
    return path


def arrow(folder: Path) -> Path:
    table = pyarrow.table({"text": ["a", "b"], "label": ["1", "2"]})
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x.arrow"}]}))
    with pyarrow.OSFile(str(folder / "x.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return folder / "x.arrow"


@pytest.mark.parametrize("write", [parquet, arrow])
@FEW
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.integers(0, 10**6) | st.none())
def test_damaged_columns(write, place, value, cut, tmp_path):
    path = write(tmp_path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(bytes(content[: cut % len(content)] if cut is not None else content))
    table_or_our_error(path if write is parquet else tmp_path, "classify")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@FEW
@given(state=JSON, files=JSON, splits=JSON, which=st.sampled_from(["state.json", "dataset_dict.json"]))
def test_any_state_of_a_saved_data_set(state, files, splits, which, tmp_path):
    content = state | {"_data_files": files, "splits": splits} if isinstance(state, dict) else state
    for name in ("state.json", "dataset_dict.json"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / which).write_text(json.dumps(content))
    table_or_our_error(tmp_path, "classify")


@FEW
@given(name=st.text(st.characters(exclude_characters="."), max_size=30))
def test_any_path(name, tmp_path):
    with pytest.raises(RankfoldError):
        read(f"{tmp_path}/{name}", "lm")
