"""Safe reading and whole writing: what a stranger's file may do to us, and what a killed process may do to a user's."""

import json
import os
import struct
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold import atomic
from rankfold.adapters.files import (
    Limits,
    Schema,
    atomic_folder,
    read_header,
    read_json,
    read_tensors,
    recover_folder,
    write_json,
    write_tensors,
    write_text,
)
from rankfold.errors import FileError, NumericError, RankfoldError

fuzz = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def record(dtype="F32", shape=(2,), start=0, stop=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn],
)
def test_round_trip(tmp_path, dtype):
    t = torch.arange(6).reshape(2, 3).to(dtype)
    write_tensors(tmp_path / "a.safetensors", {"x": t, "y.A": t.mT, "empty": t[:0], "number": t[0, 0]}, {"format": "pt"})
    got = read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(got[k], v) for k, v in {"x": t, "y.A": t.mT, "empty": t[:0], "number": t[0, 0]}.items())
    assert read_header(tmp_path / "a.safetensors").metadata == {"format": "pt"}


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    t = torch.randn(4, 4)
    write_tensors(tmp_path / "a.safetensors", {"all": t, "again": t, "view": t[1:3], "row": t.view(-1)[:4]})
    got = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(got["view"], t[1:3])
    assert torch.equal(got["again"], t)
    assert (tmp_path / "a.safetensors").stat().st_size < 600, "a view does not drag its whole storage along"


BAD = {
    "empty": (b"", "too few"),
    "short": (b"\x01\x02", "too few"),
    "truncated header": (raw({}, length=50), "truncated"),
    "huge header": (raw({}, length=1 << 50), "claims a header"),
    "not json": (raw(b"{nonsense"), "not valid JSON"),
    "not utf-8": (raw(b"\xff\xfe"), "not valid JSON"),
    "a list": (raw([]), "not an object"),
    "duplicate key": (raw(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}'), "twice"),
    "deep": (raw(b'{"a":' * 60 + b"1" + b"}" * 60), "nests"),
    "very deep": (raw(b"[" * 100_000), "not valid JSON"),
    "long number": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "nan": (raw(b'{"a":NaN}'), "not valid JSON"),
    "unknown dtype": (raw({"a": record("F13")}, bytes(8)), "unknown dtype"),
    "extra field": (raw({"a": {**record(), "code": "x"}}, bytes(8)), "nothing else"),
    "negative size": (raw({"a": record(shape=(-2,))}, bytes(8)), "not a list"),
    "boolean size": (raw({"a": record(shape=(True,))}, bytes(8)), "not a list"),
    "too many dimensions": (raw({"a": record(shape=(1,) * 20)}, bytes(8)), "not a list"),
    "size and offsets differ": (raw({"a": record(shape=(3,))}, bytes(8)), "needs 12 bytes"),
    "bomb": (raw({"a": record(shape=(1 << 40, 1 << 20), stop=1 << 62)}, bytes(8)), "allowed"),
    "overlap": (raw({"a": record(), "b": record(start=4, stop=12)}, bytes(12)), "overlaps"),
    "hole": (raw({"a": record(), "b": record(start=12, stop=20)}, bytes(20)), "hole"),
    "truncated data": (raw({"a": record()}, bytes(4)), "truncated"),
    "trailing data": (raw({"a": record()}, bytes(9)), "follow the last tensor"),
    "traversal": (raw({"../../etc/passwd": record()}, bytes(8)), "path or control"),
    "absolute": (raw({"/x": record()}, bytes(8)), "path or control"),
    "backslash": (raw({"a\\b": record()}, bytes(8)), "path or control"),
    "control character": (raw({"a\nb": record()}, bytes(8)), "path or control"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "text only"),
    "zip": (b"PK\x03\x04" + bytes(60), "pickle"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}", "pickle"),
    "nan inside": (raw({"layer.A": record()}, struct.pack("<2f", 1.0, float("nan"))), "layer.A"),
    "inf inside": (raw({"layer.A": record()}, struct.pack("<2f", 1.0, float("inf"))), "layer.A"),
}


@pytest.mark.parametrize("name", BAD)
def test_hostile_and_damaged_files(tmp_path, name):
    data, message = BAD[name]
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(data)
    with pytest.raises(FileError, match=message):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_a_pickle_is_refused_and_never_run(tmp_path, suffix):
    path = tmp_path / f"adapter_model{suffix}"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"x": Bomb()}, path)
    for name in (path, path.rename(tmp_path / "disguised.safetensors")):
        name = name if name.exists() else tmp_path / "disguised.safetensors"
        with pytest.raises(FileError, match="pickle"):
            read_tensors(name)
    assert not (tmp_path / "pwned").exists()


def test_limits_and_missing_files(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {f"t{k}": torch.ones(4) for k in range(5)})
    for limits, message in [
        (Limits(tensors=4), "5 tensors"),
        (Limits(total_bytes=50), "bytes of tensors"),
        (Limits(header_bytes=20), "header"),
    ]:
        with pytest.raises(FileError, match=message):
            read_tensors(tmp_path / "a.safetensors", limits)
    with pytest.raises(FileError, match=r"no such file; the folder holds: a\.safetensors"):
        read_tensors(tmp_path / "b.safetensors")
    with pytest.raises(FileError, match="folder"):
        read_tensors(tmp_path)
    write_json(tmp_path / "a.json", {"x": "y" * 100})
    with pytest.raises(FileError, match="allowed"):
        read_json(tmp_path / "a.json", limits=Limits(json_bytes=50))


def test_nan_is_not_saved_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(2)})
    with pytest.raises(NumericError, match=r"layers\.0"):
        write_tensors(path, {"layers.0.A": torch.tensor([1.0, float("nan")])})
    assert read_tensors(path)["x"].sum() == 2
    write_tensors(path, {"best": torch.tensor(float("inf"))}, finite=False)
    assert read_tensors(path, finite=False)["best"] == float("inf")
    with pytest.raises(FileError, match="name"):
        write_tensors(path, {"../x": torch.ones(1)})


SCHEMA = Schema("options", {"rank": int, "name": str}, {"alpha": float, "tags": (list, type(None))}, version=2)
GOOD = {"schema": 1, "rank": 4, "name": "lora"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rnak": 4}, "unknown keys: rnak; nearest known: rank"),
        ({"rank": "4"}, "rank must be a whole number, not text"),
        ({"rank": True}, "not true/false"),
        ({"alpha": "x"}, "alpha must be a number"),
        ({"tags": 1}, "tags must be a list or null"),
        ({"schema": 3}, "reads up to 2"),
        ({"schema": 0}, "schema"),
        ({"schema": "1"}, "schema"),
        ({"name": None}, "name must be text, not null"),
    ],
)
def test_schema(tmp_path, change, message):
    write_json(tmp_path / "a.json", {**GOOD, **change})
    with pytest.raises(FileError, match=message):
        read_json(tmp_path / "a.json", SCHEMA)


def test_schema_accepts_and_names_what_is_missing(tmp_path):
    write_json(tmp_path / "a.json", {**GOOD, "alpha": 8, "tags": None})
    assert read_json(tmp_path / "a.json", SCHEMA)["alpha"] == 8
    write_json(tmp_path / "a.json", {"schema": 1})
    with pytest.raises(FileError, match="lacks: name, rank"):
        read_json(tmp_path / "a.json", SCHEMA)
    write_text(tmp_path / "a.json", "[1]")
    with pytest.raises(FileError, match="must be an object, not a list"):
        read_json(tmp_path / "a.json", SCHEMA)
    write_text(tmp_path / "a.json", '{"a": 1, "a": 2}')
    with pytest.raises(FileError, match="twice"):
        read_json(tmp_path / "a.json")
    for value in ({"x": float("nan")}, {"x": object()}, {"x": "\ud800"}):
        with pytest.raises(FileError):
            write_json(tmp_path / "a.json", value)


@fuzz
@given(st.binary(max_size=300))
def test_fuzz_any_bytes(tmp_path, data):
    for name, reader in (("a.safetensors", read_tensors), ("a.json", read_json)):
        (tmp_path / name).write_bytes(data)
        with suppress(RankfoldError):
            reader(tmp_path / name)


@fuzz
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 10_000))
def test_fuzz_a_valid_file_with_bytes_changed(tmp_path, changes, cut):
    good = bytearray(
        safetensors.torch.save({"layers.0.A": torch.ones(2, 3), "layers.0.B": torch.ones(3, 2).bfloat16()}, {"a": "b"})
    )
    for place, value in changes:
        good[place % len(good)] = value
    (tmp_path / "a.safetensors").write_bytes(bytes(good[: cut % (2 * len(good)) or None]))
    try:
        got = read_tensors(tmp_path / "a.safetensors")
    except RankfoldError:
        return
    assert all(torch.isfinite(t.float()).all() for t in got.values())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
header_like = st.dictionaries(
    st.sampled_from(["a", "b.c", "__metadata__", "..", ""]) | st.text(max_size=4),
    json_values
    | st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "?"]),
        "shape": st.lists(st.integers(-1, 5), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 64), max_size=3),
    }),
    max_size=4,
)  # fmt: skip


@fuzz
@given(header_like, st.binary(max_size=64))
def test_fuzz_headers(tmp_path, header, data):
    (tmp_path / "a.safetensors").write_bytes(raw(header, data))
    with suppress(RankfoldError):
        read_tensors(tmp_path / "a.safetensors")


@fuzz
@given(json_values)
def test_json_round_trip(tmp_path, value):
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


# --- whole writing ---------------------------------------------------------------------------------------------------------


def save(path: Path, version: str) -> None:
    with atomic_folder(path, owns=("*.txt",)) as folder:
        write_text(folder / "a.txt", version)
        write_text(folder / "b.txt", version)


def versions(path: Path) -> set[str]:
    return {(path / name).read_text() for name in ("a.txt", "b.txt")}


def test_a_folder_is_replaced_as_one_and_foreign_files_stay(tmp_path):
    path = tmp_path / "run"
    save(path, "one")
    (path / "report.html").write_text("mine")
    (path / "stale.txt").write_text("owned, and not written again")
    save(path, "two")
    assert versions(path) == {"two"}
    assert (path / "report.html").read_text() == "mine"
    assert not (path / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"], "nothing is left beside it"


def test_an_error_in_the_block_leaves_the_old_folder(tmp_path):
    path = tmp_path / "run"
    save(path, "one")

    def interrupted():
        with atomic_folder(path) as folder:
            write_text(folder / "a.txt", "two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert versions(path) == {"one"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_file_or_link_is_not_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("file", "link"):
        with pytest.raises(FileError, match="not a folder"), atomic_folder(tmp_path / name):
            pass


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch):
    path = tmp_path / "run"
    save(path, "one")
    monkeypatch.setattr(atomic, "flush_file", full_disk)
    with pytest.raises(FileError, match=r"no space left.*previous version is untouched|no space left.*nothing was left"):
        save(path, "two")
    monkeypatch.undo()
    assert versions(path) == {"one"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_really_full_disk(tmp_path):
    """A write to /dev/full fails as a full disk does; the message says so and the old file stays."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    path = tmp_path / "a.txt"
    write_text(path, "one")
    with pytest.raises(FileError, match="no space left"):
        atomic.atomic_file(path, lambda temporary: Path("/dev/full").write_text("x" * 10))
    assert path.read_text() == "one"


def test_a_library_that_reports_a_full_disk_in_words(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(2)})

    def fail(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(FileError, match=r"no space left.*previous version is untouched"):
        write_tensors(path, {"x": torch.zeros(2)})
    assert read_tensors(path)["x"].sum() == 2


KILL = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from test_files import save
    from rankfold import atomic
    path, name, count = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    owner = atomic if hasattr(atomic, name) else os
    true, calls = getattr(owner, name), 0
    def dying(*args, **kwargs):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*args, **kwargs)
    setattr(owner, name, dying)
    save(path, "two")
"""


@pytest.mark.parametrize(
    ("name", "count", "found"),
    [("flush_file", 1, "one"), ("flush_file", 4, "one"), ("rename", 1, "one"), ("rename", 2, "one"), ("rename", 3, "two"),
     ("_carry", 1, "two")],
)  # fmt: skip
def test_killed_while_saving(tmp_path, name, count, found):
    """kill -9 at every step of the swap: a reader finds a whole version, and the next save leaves nothing behind."""
    path = tmp_path / "run"
    save(path, "one")
    (path / "report.html").write_text("mine")
    command = [sys.executable, "-c", textwrap.dedent(KILL), str(Path(__file__).parent), str(path), name, str(count)]
    died = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert died.returncode == -9, died.stderr.decode()
    recover_folder(path)
    assert versions(path) == {found}
    os.utime(tmp_path)
    for left in tmp_path.glob(".run.*.tmp"):
        os.utime(left, (0, 0))  # as if it had been left long ago
    save(path, "three")
    assert versions(path) == {"three"}
    assert (path / "report.html").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
