"""rankfold's own adapter folder: every structure's tensors as they are trained, nothing converted.

`adapter.safetensors` holds the tensors, `adapter.json` all else. The two are replaced together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.errors import FileError

from .files import (
    LIMITS,
    Limits,
    Schema,
    atomic_folder,
    check_object,
    read_json,
    read_tensors,
    recover_folder,
    write_json,
    write_tensors,
)
from .fingerprint import Fingerprint, TensorPrint

__all__ = ["JSON", "SCHEMA", "TENSORS", "NativeAdapter", "SiteRecord", "load_native", "save_native"]

SCHEMA = 1
JSON = "adapter.json"
TENSORS = "adapter.safetensors"

_RECORD = Schema(
    "the adapter",
    required={"method": str, "options": dict, "sites": list},
    optional={"labels": (list, type(None)), "base": (dict, type(None)), "trained": dict, "untied": list, "rankfold": str},
    version=SCHEMA,
)
_SITE = Schema(
    "a site",
    required={"name": str, "kind": str, "shape": list},
    optional={
        "rows": (list, type(None)),
        "rank": (int, type(None)),
        "alpha": (int, float, type(None)),
        "batch": (int, type(None)),
        "group": (str, type(None)),
        "tied": (str, type(None)),
    },
)
_PRINT = Schema("a fingerprint", required={"shape": list, "dtype": str, "hash": str})


@dataclass(frozen=True)
class SiteRecord:
    """A site as a file knows it: the fields of `Site`, its rank, and its alpha where that is not the method's."""

    name: str
    kind: str
    shape: tuple[int, int]
    rows: tuple[int, int] | None = None
    rank: int | None = None
    batch: int | None = None
    group: str | None = None
    tied: str | None = None
    alpha: float | None = None

    @property
    def key(self) -> str:
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


@dataclass(frozen=True, eq=False)
class NativeAdapter:
    """All that a saved adapter consists of.

    Args:
        method: the chain that made it, as `rf.method` takes it.
        options: its options, by part.
        sites: in model order.
        tensors: site key -> tensor name -> tensor.
        shared: tensors that several sites use, by owner and name.
        extras: heads, biases, norms by parameter name; whole values.
        labels: names of the classes, where there are any.
        base: fingerprint of the source checkpoint's adapted weights.
        trained: steps, seeds, data, metrics: anything that JSON holds.
        untied: names of extras that belong to their module alone, although the model shares that parameter among several.
    """

    method: str
    options: Mapping[str, Any]
    sites: tuple[SiteRecord, ...]
    tensors: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    base: Fingerprint | None = None
    trained: Mapping[str, Any] = field(default_factory=dict)
    untied: tuple[str, ...] = ()


def _flatten(record: NativeAdapter) -> dict[str, Tensor]:
    flat = {f"site:{key}:{name}": t for key, own in record.tensors.items() for name, t in own.items()}
    flat |= {f"shared:{name}": t for name, t in record.shared.items()}
    flat |= {f"extra:{name}": t for name, t in record.extras.items()}
    if record.base is not None:
        flat |= {f"base:{name}": p.sample for name, p in record.base.tensors.items()}
    return flat


def save_native(path: str | Path, record: NativeAdapter) -> None:
    """Write the folder; a previous adapter there stays whole until this one is, other files there are kept.

    Raises:
        FileError: a full disk, or a place that can't be written.
        NumericError: NaN or Inf in a tensor.

    >>> import tempfile, torch
    >>> record = NativeAdapter("lora", {"rank": 1}, (SiteRecord("q", "linear", (3, 2), rank=1),), {"q": {"B": torch.ones(3, 1)}})
    >>> save_native(path := Path(tempfile.mkdtemp()) / "adapter", record)
    >>> load_native(path).tensors["q"]["B"].shape
    torch.Size([3, 1])
    """
    site_fields = ("name", "kind", "shape", "rows", "rank", "batch", "group", "tied", "alpha")
    base = record.base and {n: {"shape": list(p.shape), "dtype": p.dtype, "hash": p.hash} for n, p in record.base.tensors.items()}
    document = {
        "schema": SCHEMA,
        "method": record.method,
        "options": dict(record.options),
        "sites": [{k: v for k in site_fields if (v := getattr(site, k)) is not None} for site in record.sites],
        "labels": None if record.labels is None else list(record.labels),
        "base": base,
        "trained": dict(record.trained),
        **({"untied": list(record.untied)} if record.untied else {}),
    }
    with atomic_folder(path, owns=(JSON, TENSORS)) as folder:
        write_tensors(folder / TENSORS, _flatten(record))
        write_json(folder / JSON, document)


def load_native(path: str | Path, limits: Limits = LIMITS) -> NativeAdapter:
    """Read a folder written by `save_native`.

    Raises:
        FileError: not such a folder, a file that is damaged or hostile, a newer schema, unknown or missing keys, tensors of sites
            that the record does not list.
    """
    path = Path(path)
    recover_folder(path)
    document = read_json(path / JSON, _RECORD, limits)
    sites = tuple(_site(item, str(path / JSON)) for item in document["sites"])
    keys = {s.key for s in sites}
    if len(keys) < len(sites):
        raise FileError(f"{path / JSON}: two sites have one name")
    tensors: dict[str, dict[str, Tensor]] = {key: {} for key in (s.key for s in sites)}
    shared: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    samples: dict[str, Tensor] = {}
    for name, t in read_tensors(path / TENSORS, limits).items():
        kind, _, rest = name.partition(":")
        if kind == "site":
            key, _, own = rest.rpartition(":")
            if key not in tensors:
                raise FileError(f"{path / TENSORS}: tensor {name!r} belongs to no site of {JSON}")
            tensors[key][own] = t
        elif kind in ("shared", "extra", "base"):
            {"shared": shared, "extra": extras, "base": samples}[kind][rest] = t
        else:
            raise FileError(f"{path / TENSORS}: unknown tensor {name!r}; names start with site:, shared:, extra: or base:")
    labels = document.get("labels")
    if labels is not None and not all(isinstance(x, str) for x in labels):
        raise FileError(f"{path / JSON}: labels must be a list of texts")
    trained = document.get("trained", {})
    if type(trained.get("seed", 0)) is not int:
        raise FileError(f"{path / JSON}: the seed {str(trained['seed'])[:40]!r} is not a whole number")
    return NativeAdapter(
        method=document["method"],
        options=document["options"],
        sites=sites,
        tensors=tensors,
        shared=shared,
        extras=extras,
        labels=None if labels is None else tuple(labels),
        base=_base(document.get("base"), samples, path),
        trained=trained,
        untied=tuple(map(str, document.get("untied", ()))),
    )


def _sizes(value: Any, count: int | None, where: str) -> tuple[int, ...]:
    good = isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)
    if not good or (count is not None and len(value) != count):
        raise FileError(f"{where}: {str(value)[:60]} is not a list of {count or 'some'} sizes")
    return tuple(value)


def _site(item: Any, where: str) -> SiteRecord:
    check_object(item, _SITE, where)
    out, in_ = _sizes(item["shape"], 2, where)
    rows = None
    if item.get("rows") is not None:
        start, stop = _sizes(item["rows"], 2, where)
        rows = (start, stop)
    rest = {k: item.get(k) for k in ("rank", "batch", "group", "tied", "alpha")}
    return SiteRecord(item["name"], item["kind"], (out, in_), rows, **rest)


def _base(value: Any, samples: Mapping[str, Tensor], path: Path) -> Fingerprint | None:
    if value is None:
        if samples:
            raise FileError(f"{path / TENSORS}: holds samples of a base that {JSON} does not name")
        return None
    if set(value) != set(samples):
        raise FileError(f"{path}: {JSON} and {TENSORS} name different weights of the base")
    prints = {}
    for name, item in value.items():
        check_object(item, _PRINT, str(path / JSON))
        prints[name] = TensorPrint(_sizes(item["shape"], None, str(path / JSON)), item["dtype"], item["hash"], samples[name])
    return Fingerprint(prints)
