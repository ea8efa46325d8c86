"""Parquet files and data sets saved by `datasets`: both are Arrow tables, and only their wanted columns are read.

Saved data sets are read from their own JSON and Arrow files, without importing `datasets`: no script of theirs runs
and nothing is unpickled.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankfold.errors import DataError, FileError, RankfoldError, UnknownName
from rankfold.jobs.data.limits import Limits
from rankfold.jobs.data.tasks import find_columns

__all__ = ["is_saved_dataset", "read_parquet", "read_saved"]


def read_parquet(path: Path, wanted: Mapping[str, str], limits: Limits) -> dict[str, list[Any]]:
    """Role to values of one parquet file; rows and decompressed bytes are checked before a column is read.

    Raises FileError for a file that is not parquet or is too large, UnknownName for a missing column.
    """
    import pyarrow.parquet

    def load() -> Any:
        with pyarrow.parquet.ParquetFile(path) as file:
            place = find_columns(wanted, file.schema_arrow.names, str(path))
            limits.check_rows(file.metadata.num_rows, str(path))
            groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
            limits.check_size(sum(group.total_byte_size for group in groups), str(path))
            names = [file.schema_arrow.names[index] for index in place.values()]
            return _values(file.read(columns=names), dict(zip(place, names)))

    limits.check_size(path.stat().st_size, str(path))
    return _guarded(load, path, "a parquet file")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def read_saved(folder: Path, wanted: Mapping[str, str], limits: Limits, split: str | None = None) -> dict[str, list[Any]]:
    """Role to values of a folder that `save_to_disk` wrote; class labels become their names.

    Args:
        split: which part of a saved DatasetDict; None means `train`, or the only one.

    Raises UnknownName for a missing split or column, FileError for damaged files.
    """
    if (folder / "dataset_dict.json").is_file():
        folder = folder / _chosen_split(folder, split)
    listed = _json(folder / "state.json").get("_data_files")
    shards = [folder / _file_name(item, folder) for item in listed] if isinstance(listed, list) else []
    if not shards:
        raise FileError(f"{folder}: state.json names no data files")

    def load() -> Any:
        import pyarrow
        import pyarrow.ipc

        tables = []
        for shard in shards:
            with pyarrow.memory_map(str(shard)) as file, pyarrow.ipc.open_stream(file) as stream:
                place = find_columns(wanted, stream.schema.names, str(folder))
                tables.append(stream.read_all().select(list(place.values())))
        table = pyarrow.concat_tables(tables)
        limits.check_rows(table.num_rows, str(folder))
        return _values(table, dict(zip(place, table.column_names)))

    for shard in shards:
        if not shard.is_file():
            raise FileError(f"{folder}: data file {shard.name} is missing")
    limits.check_size(sum(shard.stat().st_size for shard in shards), str(folder))
    return _guarded(load, folder, "a saved data set")


def _values(table: Any, columns: Mapping[str, str]) -> dict[str, list[Any]]:
    table.validate(full=True)  # Arrow trusts the offsets in a file: a damaged one reads outside of its buffers
    classes = _class_names(table.schema)
    result = {}
    for role, name in columns.items():
        values = table.column(name).to_pylist()
        if name in classes:
            values = [classes[name][v] if isinstance(v, int) and 0 <= v < len(classes[name]) else v for v in values]
        result[role] = values
    return result


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The label names that `datasets` keeps in the schema's metadata, by column."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _chosen_split(folder: Path, split: str | None) -> str:
    listed = _json(folder / "dataset_dict.json").get("splits")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    if not names:
        raise FileError(f"{folder}: dataset_dict.json names no splits")
    chosen = split or ("train" if "train" in names else names[0])
    if chosen not in names or (split is None and chosen != "train" and len(names) > 1):
        raise UnknownName.of(f"split of {folder}", split or "train", names, hint=f"splits there: {', '.join(names)}")
    return _plain(chosen, folder)


def _file_name(item: Any, folder: Path) -> str:
    name = item.get("filename") if isinstance(item, dict) else None
    if not isinstance(name, str):
        raise FileError(f"{folder}: state.json has a data file without a name")
    return _plain(name, folder)


def _plain(name: str, folder: Path) -> str:
    """A name inside the folder and nothing else: no path, no way up."""
    if not name or name in {".", ".."} or set(name) & set("/\\\0"):
        raise FileError(f"{folder}: unsafe file name {name[:80]!r}")
    return name


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as cause:
        raise FileError(f"{path}: cannot be read as JSON: {cause}") from cause
    if not isinstance(content, dict):
        raise FileError(f"{path}: expected a JSON object")
    return content


def _guarded(load: Callable[[], Any], path: Path, what: str) -> Any:
    try:
        return load()
    except RankfoldError:
        raise
    except MemoryError as cause:
        raise FileError(f"{path}: claims more than fits into memory") from cause
    except Exception as cause:  # a foreign parser on a foreign file: whatever it raises means that the file is damaged
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise DataError(f"{path}: cannot be read as {what}: {first[:200]}") from cause
