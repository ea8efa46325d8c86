"""Every format gives the same table; every mistake a message that says what to do."""

import csv
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rankfold.errors import DataError, FileError, OptionError, UnknownName
from rankfold.jobs.data import Limits, label_ids, label_names, read

ROWS = [
    {"text": "one, with a comma", "label": "a"},
    {"text": 'two "quoted"', "label": "b"},
    {"text": "three\nof two lines", "label": "a"},
    {"text": "fünf", "label": "b"},
]
TEXTS = tuple(row["text"] for row in ROWS)
LABELS = ("a", "b", "a", "b")


def write_csv(path: Path) -> Path:
    path.write_text(
        'id,label,text\n1,a,"one, with a comma"\n2,b,"two ""quoted"""\n3,a,"three\nof two lines"\n4,b,fünf\n', encoding="utf-8"
    )
    return path


def write_tsv(path: Path) -> Path:
    path.write_text(
        'text\tlabel\none, with a comma\ta\n"two ""quoted"""\tb\n"three\nof two lines"\ta\nfünf\tb\n', encoding="utf-8"
    )
    return path


def write_jsonl(path: Path) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")
    return path


def write_json(path: Path) -> Path:
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


def write_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def write_saved(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


def write_saved_splits(path: Path) -> Path:
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    datasets.DatasetDict(parts).save_to_disk(path)
    return path


def write_shards(path: Path) -> Path:
    path.mkdir()
    write_rows = lambda rows, name: (path / name).write_text("\n".join(map(json.dumps, rows)))
    write_rows(ROWS[:1], "part-0.jsonl")
    write_rows(ROWS[1:], "part-1.jsonl")
    return path


WRITERS = {
    "x.csv": write_csv,
    "x.tsv": write_tsv,
    "x.jsonl": write_jsonl,
    "x.json": write_json,
    "x.parquet": write_parquet,
    "saved": write_saved,
    "splits": write_saved_splits,
    "shards": write_shards,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name, tmp_path):
    table = read(WRITERS[name](tmp_path / name), "classify")
    assert (table["text"], table["label"]) == (TEXTS, LABELS)
    assert dict(table.dropped) == {}
    assert table.source == str(tmp_path / name)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_names_the_nearest_column(name, tmp_path):
    with pytest.raises(UnknownName, match=r"'labels'; nearest: label") as caught:
        read(WRITERS[name](tmp_path / name), "classify", {"label": "labels"})
    assert "--columns label=NAME" in str(caught.value)


def test_columns_by_mapping_by_order_and_only(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("frage,antwort\nwie,so\n")
    for columns in ({"prompt": "frage", "completion": "antwort"}, "prompt=frage,completion=antwort", "frage,antwort"):
        assert read(path, "sft", columns).row(0) == {"prompt": "wie", "completion": "so"}
    assert read(path, "sft", "prompt=frage", only=["prompt"]).columns == {"prompt": ("wie",)}
    with pytest.raises(OptionError, match="1 names"):
        read(path, "sft", ["frage"])
    with pytest.raises(UnknownName, match="'promt'; nearest: prompt"):
        read(path, "sft", "promt=frage")
    with pytest.raises(UnknownName, match="unknown task 'clasify'; nearest: classify"):
        read(path, "clasify")


def test_text_folders_and_files(tmp_path):
    for label, text in (("pos", "good"), ("neg", "bad"), ("pos", "fine")):
        (tmp_path / "films" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "films" / label / f"{text}.txt").write_text(text)
    table = read(tmp_path / "films", "classify")
    assert list(zip(table["text"], table["label"])) == [("bad", "neg"), ("fine", "pos"), ("good", "pos")]
    assert read(tmp_path / "films", "lm")["text"] == ("bad", "fine", "good")
    assert read(tmp_path / "films" / "pos", "lm")["text"] == ("fine", "good")
    with pytest.raises(DataError, match="lies in no class folder"):
        read(tmp_path / "films" / "pos", "classify")
    with pytest.raises(DataError, match="plain text has no columns query, document"):
        read(tmp_path / "films", "embed")

    lines = tmp_path / "films.txt"
    lines.write_text("1 a fine film\n\n0 a waste\r\n1 spaces  inside\n")
    table = read(lines, "classify")
    assert (table["text"], table["label"]) == (("a fine film", "a waste", "spaces  inside"), ("1", "0", "1"))
    assert read(lines, "classify", only=["text"])["text"][0] == "1 a fine film"
    assert len(read(lines, "lm")) == 1
    lines.write_text("1 a fine film\nalone\n")
    with pytest.raises(DataError, match="line 2 is one word"):
        read(lines, "classify")


def test_a_folder_of_different_tables_is_never_joined(tmp_path):
    write_csv(tmp_path / "train.csv")
    write_csv(tmp_path / "test.csv")
    with pytest.raises(DataError, match=r"several tables: test\.csv, train\.csv"):
        read(tmp_path, "classify")


def test_other_separators_and_marks(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("\ufefftext;label\r\na, b;1\r\nc;2\r\n".encode())
    assert read(path, "classify")["text"] == ("a, b", "c")
    path = tmp_path / "x.tsv"
    path.write_text('text\tlabel\n"He said so\t1\n5" wide\t2\n')  # quotes that quote nothing
    assert read(path, "classify")["text"] == ('"He said so', '5" wide')


def test_encodings(tmp_path):
    path = tmp_path / "old.csv"
    path.write_bytes("text,label\nfine,1\ncafé,2\n".encode("iso-8859-1"))
    with pytest.raises(DataError, match=r"byte 0xE9 at offset 21 \(line 3\)\n.*--encoding iso-8859-1"):
        read(path, "classify")
    assert read(path, "classify", encoding="iso-8859-1")["text"] == ("fine", "café")
    with pytest.raises(UnknownName, match="unknown encoding 'iso-8859-99'; nearest: iso8859_9"):
        read(path, "classify", encoding="iso-8859-99")
    path.write_bytes("text,label\nfine,1\ncafé,2\n".encode("utf-16"))
    with pytest.raises(DataError, match="--encoding utf-16"):
        read(path, "classify")
    assert read(path, "classify", encoding="utf-16")["text"] == ("fine", "café")
    path.write_bytes(b"\x1f\x8b\x08rubbish")
    with pytest.raises(DataError, match="unpack it first"):
        read(path, "classify")


MISTAKES = {
    "empty.csv": (b"", DataError, "empty file"),
    "empty.jsonl": (b"\n\n", DataError, "empty file"),
    "empty.parquet": (b"", DataError, "cannot be read as a parquet file"),
    "garbage.parquet": (b"PAR1" + b"\0" * 40 + b"PAR1", DataError, "cannot be read as a parquet file"),
    "header.csv": (b"text,label\n", DataError, "no rows under the column names"),
    "blank.csv": (b"text,label\n ,1\nx,\n", DataError, "no usable rows among the 2 there: 1 empty text, 1 empty label"),
    "one.csv": (b"text,label\nx,1\ny,1\n", DataError, "1 class only .'1'. in 2 rows; 2 needed"),
    "ragged.csv": (b"text,label\nx,1\ny,z,2\n", DataError, "line 3 has 3 fields, the header has 2"),
    "open.csv": (b'text,label\n"x,1\ny,2\n', DataError, "line 3: unexpected end of data"),
    "twice.csv": (b"text,label,text\nx,1,y\n", DataError, "2 columns are named 'text'"),
    "line.jsonl": (b'{"text": "x", "label": 1}\n{"text": \n', DataError, "line 2: not JSON: Expecting value at character 1"),
    "list.jsonl": (b'{"text": "x", "label": 1}\n["y", 2]\n', DataError, "line 2: expected an object, .* found list"),
    "deep.jsonl": (b'{"a":' * 100_000, DataError, "line 1: not JSON"),
    "digits.jsonl": (b'{"text": ' + b"9" * 5000 + b"}", DataError, "line 1: not JSON"),
    "kind.jsonl": (b'{"text": ["x"], "label": 1}', DataError, "row 1: text is list .* expected text"),
    "kind2.jsonl": (b'{"text": "x", "label": 1.5}', DataError, "row 1: label is float '1.5'"),
    "x.docx": (b"", UnknownName, r"'\.docx'; nearest: .*\n.*read here: \.csv"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_say_what_is_wrong(name, tmp_path):
    content, kind, message = MISTAKES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        read(tmp_path / name, "classify")
    assert str(tmp_path / name) in str(caught.value)


def test_missing_files_name_the_nearest(tmp_path):
    write_csv(tmp_path / "train.csv")
    with pytest.raises(UnknownName, match=r"'trian\.csv'; nearest: train\.csv"):
        read(tmp_path / "trian.csv", "classify")
    with pytest.raises(UnknownName, match="does not exist"):
        read(tmp_path / "nowhere" / "train.csv", "classify")
    with pytest.raises(UnknownName, match="nearest: stdlib-code"):
        read("stdlib-kode", "embed")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"no \.txt file"):
        read(tmp_path / "void", "lm")


def test_rows_without_content_are_counted(tmp_path):
    rows = [
        {"query": "a", "document": "b"},
        {"query": " ", "document": "b"},
        {"query": "a"},
        {"query": "\ud800", "document": "c"},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = read(tmp_path / "x.jsonl", "embed")
    assert len(table) == 1
    assert dict(table.dropped) == {"empty query": 1, "missing document": 1, "query that is not valid Unicode": 1}
    assert table.describe().endswith("1 rows; 3 left out (1 empty query, 1 missing document, 1 query that is not valid Unicode)")


def test_class_labels_of_saved_data_become_names(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, None]}, features=features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "x.parquet")
    for source in ("saved", "x.parquet"):
        table = read(tmp_path / source, "classify")
        assert table["label"] == ("yes", "no")
        assert dict(table.dropped) == {"missing label": 1}


def test_saved_splits(tmp_path):
    path = write_saved_splits(tmp_path / "splits")
    assert len(read(path, "classify", split="test")) == 2
    with pytest.raises(UnknownName, match="'tets'; nearest: test"):
        read(path, "classify", split="tets")
    with pytest.raises(OptionError, match="has no splits"):
        read(write_csv(tmp_path / "x.csv"), "classify", split="test")


def test_saved_data_cannot_name_files_elsewhere(tmp_path):
    path = write_saved(tmp_path / "saved")
    for name in ("../secret.arrow", "/etc/passwd", "..", ""):
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(FileError, match="unsafe file name"):
            read(path, "classify")
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    with pytest.raises(FileError, match=r"gone\.arrow is missing"):
        read(path, "classify")


@pytest.mark.parametrize("name", WRITERS)
def test_limits_hold_in_every_format(name, tmp_path):
    path = WRITERS[name](tmp_path / name)
    with pytest.raises(FileError, match=r"4 rows; at most 3 are read(.|\n)*Limits\(rows="):
        read(path, "classify", limits=Limits(rows=3))
    with pytest.raises(FileError, match=r"bytes; at most 9 are read"):
        read(path, "classify", limits=Limits(size=9))


def test_compressed_parquet_is_measured_unpacked(tmp_path):
    rows = pyarrow.table({"text": ["x" * 100_000], "label": ["1"]})
    pyarrow.parquet.write_table(rows, tmp_path / "x.parquet", compression="zstd")
    small = (tmp_path / "x.parquet").stat().st_size
    assert small < 50_000
    with pytest.raises(FileError, match="at most 50,000"):
        read(tmp_path / "x.parquet", "classify", limits=Limits(size=50_000))


def test_long_fields_and_the_csv_modules_own_limit(tmp_path):
    before = csv.field_size_limit(1234)  # another part of the program may rely on its own value
    (tmp_path / "x.csv").write_text("text,label\n" + "x" * 200_000 + ",1\ny,2\n")
    try:
        assert len(read(tmp_path / "x.csv", "classify")["text"][0]) == 200_000
        assert csv.field_size_limit() == 1234
    finally:
        csv.field_size_limit(before)


def test_labels():
    assert label_names(["b", "a", "b"]) == ("a", "b")
    assert label_ids(["b", "a"], ("a", "b")) == [1, 0]
    with pytest.raises(DataError, match="1 labels that training does not know, the first 'aa'; nearest known: a"):
        label_ids(["a", "aa"], ("a", "b"))


def test_a_test_file_may_hold_one_class(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\nx,1\n")
    assert len(read(tmp_path / "x.csv", "classify", classes=1)) == 1
