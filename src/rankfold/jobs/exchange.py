"""Adapters in and out: `rf.load` reads rankfold's own folders and the files of other tools, `export` writes what they take."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rankfold.adapters.adapter import Adapter
from rankfold.adapters.algebra import join_rows
from rankfold.adapters.files import read_header
from rankfold.adapters.fingerprint import Fingerprint, compare
from rankfold.adapters.formats import gguf, kohya, peft, serving
from rankfold.adapters.formats.torchtune import is_torchtune
from rankfold.adapters.native import JSON, NativeAdapter, SiteRecord
from rankfold.adapters.rows import split_rows
from rankfold.atomic import recover_folder
from rankfold.core.attaching import specs_of
from rankfold.core.site import Site
from rankfold.core.store import store_of
from rankfold.core.targets import every_site
from rankfold.errors import CompositionError, FileError, FingerprintError, OptionError, UnknownName
from rankfold.training import saving
from rankfold.training.method import method
from rankfold.training.prints import fingerprint

from .folded import write_folded
from .foreign import Source, file_format, fitted, heads_of, only_file, origin, read_foreign

if TYPE_CHECKING:
    from rankfold.training.adaptation import Adaptation

__all__ = ["FORMATS", "ExportReport", "attach_adapter", "borrowed", "export", "folder_format", "load"]

FORMATS = ("peft", "folded", "serving", "kohya", "gguf")
FILES = {"kohya": "lora.safetensors", "gguf": "lora.gguf"}  # formats of one file: its name where `out` is a folder
PEFT_TWICE = "peft 0.21 adds the change of an attention's output projection twice: it is written at half its size, for that"
BORROWED = "rankfold-borrowed"  # name of an adapter that is attached only to be exported or looked at


def folder_format(path: str | Path) -> Literal["rankfold", "peft"] | Source:
    """Whose adapter a folder, or a single .safetensors file, holds.

    Raises:
        FileError: no such folder or file, nothing in it that rankfold reads, or several files that it might be.
    """
    path = Path(path)
    recover_folder(path)
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        raise FileError(f"{path}: there is no such folder or file")
    if (path / JSON).is_file():
        return "rankfold"
    if (path / peft.CONFIG).is_file():
        factors = path / peft.TENSORS
        return "torchtune" if factors.is_file() and is_torchtune(list(read_header(factors).tensors)) else "peft"
    if any(path.glob("*.safetensors")):
        return _of_file(only_file(path))
    there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FileError(f"{path}: no adapter here: neither {JSON} (rankfold) nor {peft.CONFIG} (peft); it holds: {there}")


def _of_file(path: Path) -> Source:
    if path.suffix == ".gguf":
        raise FileError(f"{path}: rankfold writes GGUF and does not read it; give the adapter that it was made of")
    whose = {"adapter.safetensors": JSON, peft.TENSORS: peft.CONFIG}.get(path.name)
    if path.suffix == ".json" or (whose is not None and (path.parent / whose).is_file()):
        raise FileError(f"{path}: is a file; give the folder that holds it")
    found = file_format(path)
    if found is None:
        said = ", ".join(list(read_header(path).tensors)[:3]) or "nothing"
        raise FileError(f"{path}: no adapter of kohya, LyCORIS, diffusers or torchtune by its keys; it holds: {said}")
    return found


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    force: bool = False,
    plan: str = "auto",
    memory: str = "auto",
    part: str | None = None,
) -> Adaptation:
    """Attach a saved adapter to its base: same function, without running an init.

    Args:
        path: a folder written by `adaptation.save` or by peft (LoRA, rsLoRA, DoRA), or a .safetensors file (or a folder with one)
            of kohya, LyCORIS, diffusers or torchtune; as they are stored, ready to train on in float32.
        name: of the adapter in this model, which may carry several; it is switched on.
        force: take a base with another fingerprint all the same.
        plan, memory: as in `rf.adapt`.
        part: what to read of a file for several models of a pipeline (kohya, diffusers): unet, text_encoder, ...

    Raises:
        FingerprintError: the base is another one.
        FileError: damaged, foreign, a pickle, or not fitting this model.

    >>> import tempfile, torch, rankfold as rf
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 6)), torch.ones(1, 8)
    >>> adaptation = rf.adapt(model, "lora", rank=2)
    >>> _ = adaptation.parameters()[0].data.fill_(0.1)
    >>> y, folder = model(x), adaptation.save(tempfile.mkdtemp())
    >>> adaptation.remove()
    >>> torch.equal(model(x), y), torch.equal(rf.load(model, folder).model(x), y)
    (False, True)
    """
    source = folder_format(path)
    if part is not None and source not in ("kohya", "diffusers"):
        raise OptionError(f"part={part!r}: {path} is an adapter of {source}, which is for one model")
    how: dict[str, Any] = {"name": name, "force": force, "plan": plan, "memory": memory}
    if source == "peft":
        return attach_adapter(model, peft.read_peft(path), str(path), **how)
    if source != "rankfold":
        found = fitted(read_foreign(path, source, model, part), model, str(path))
        if isinstance(found, NativeAdapter):
            extras, untied = _owned(model, found.extras)
            found = replace(found, extras=extras, untied=untied)
            return saving.attach_record(model, found, str(path), **how)
        return attach_adapter(model, found, str(path), **how)
    return saving.load(model, path, name=name, force=force, plan=plan, memory=memory)


def attach_adapter(
    model: nn.Module,
    adapter: Adapter,
    source: str = "adapter",
    *,
    name: str = "default",
    force: bool = False,
    plan: str = "auto",
    memory: str = "auto",
) -> Adaptation:
    """Attach an adapter in normal form, with each site's own rank and scale: as lora, or as magnitude+lora if it has magnitudes.

    Raises:
        FileError: it does not fit this model. FingerprintError: it brings copies of base weights, and they are not this model's.
        CompositionError: gains, or magnitudes at some sites only.
    """
    entries = list(adapter.entries.values())
    rescaled = [e for e in entries if e.magnitude is not None]
    if not entries or any(e.gain is not None for e in entries) or len(rescaled) not in (0, len(entries)):
        raise CompositionError(
            f"{source}: an adapter must change some weight, and have magnitudes at all of its sites or at none, and no gains"
        )
    copies = adapter.metadata.get("base_copies")
    if isinstance(copies, Fingerprint) and not force:
        _same_base(model, copies, source)
    if (dropout := (adapter.metadata.get("options") or {}).get("lora_dropout")) and isinstance(dropout, float):
        warnings.warn(
            f"{source}: trained with dropout {dropout:g}, which the loaded adapter does not have if it trains on", stacklevel=3
        )
    common, _ = Counter((e.rank, e.scale) for e in entries).most_common(1)[0]
    chosen = method("magnitude+lora" if rescaled else "lora", rank=common[0], alpha=_alpha(*common, source))
    known = {s.name: s for s in every_site(model)}
    records, tensors = [], {}
    for e in entries:
        site = saving.fitting_site(e, known, source)
        if adapter.metadata.get("format") == "peft" and (reason := _unlike_peft(model, site)):
            raise FileError(f"{source}: {e.key}: {reason}")
        alpha = _alpha(e.rank, e.scale, f"{source}: {e.key}")
        records.append(SiteRecord(site.name, site.kind, site.shape, site.rows, e.rank, site.batch, site.group, site.tied, alpha))
        by_role = {"B": e.B, "A": e.A, "magnitude": e.magnitude}
        specs = specs_of(chosen.structure.at_rank(e.rank, alpha), site)
        tensors[e.key] = {field_: by_role[spec.role] for field_, spec in specs.items()}
    extras, untied = _owned(model, adapter.extras)
    stored = adapter.metadata.get("dtypes") or sorted({str(t.dtype).removeprefix("torch.") for e in entries for t in (e.B, e.A)})
    record = NativeAdapter(
        chosen.text,
        chosen.options,
        tuple(records),
        tensors,  # type: ignore[arg-type]
        extras=extras,
        trained=origin(str(adapter.metadata.get("format", "an adapter")), tuple(stored)),
        untied=untied,
    )
    return saving.attach_record(model, record, source, name=name, force=force, plan=plan, memory=memory)


def _alpha(rank: int, scale: float, where: str) -> float:
    if not scale > 0 or not rank:
        raise FileError(f"{where}: rank {rank} and scale {scale:g}: such a site changes nothing that could train on")
    return scale * rank


def _same_base(model: nn.Module, copies: Fingerprint, source: str) -> None:
    names = sorted({n.rpartition(".")[0] for n in copies.tensors})
    present = {n for n, _ in model.named_modules()}
    verdict = compare(copies, fingerprint(model, [n for n in names if n in present]))
    if verdict.verdict == "different":
        raise FingerprintError(f"{source}: made for another base ({verdict.reason}). Load it all the same: force=True (--force)")


def _users(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter by each of its names: all its names, in model order."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if path.partition(".")[0] != "rankfold":
            for leaf, p in module._parameters.items():
                if p is not None:
                    names.setdefault(id(p), []).append(f"{path}.{leaf}" if path else leaf)
    return {name: group for group in names.values() for name in group}


def _owned(model: nn.Module, extras: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(extras, names of those that are untied): a shared parameter stays one where all its users bring the same value."""
    users = _users(model)
    kept: dict[str, Tensor] = {}
    untied = []
    for full, value in extras.items():
        sharers = users.get(full, [full])
        tied = all(name in extras and torch.equal(extras[name], value) for name in sharers)
        if tied and full != sharers[0]:
            continue
        kept[full] = value
        if not tied:
            untied.append(full)
    return kept, tuple(untied)


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what it cost.

    Args:
        to: the format.
        path: the folder.
        errors: ‖Δ' − Δ‖ / ‖Δ‖ by site; 0 where the form is exact.
        ranks: by site, where the format has ranks.
        notes: what a reader of the folder should know.
        dtype: of the factors or weights that were written.
    """

    to: str
    path: Path
    errors: Mapping[str, float]
    ranks: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dtype: str = ""

    @property
    def largest(self) -> float:
        return max(self.errors.values(), default=0.0)

    @property
    def worst(self) -> str | None:
        """The site of the largest error; None where everything is exact."""
        return max(self.errors, key=self.errors.__getitem__) if self.largest else None


def export(
    model: nn.Module,
    source: str | Path | Adaptation,
    to: str,
    out: str | Path,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    force: bool = False,
) -> ExportReport:
    """Write an adapter for other tools, and say what the form costs.

    "peft": its LoRA or DoRA folder, exact for whatever is a LoRA (an offset as rank 2r), a rotation, or a magnitude over these;
    the scale stays in alpha. "folded": the whole model with the changed weights, `save_pretrained` where the model has it, else
    model.safetensors. "serving": one rank, the scale folded into B, in one dtype. "kohya": one .safetensors file in the layout
    of sd-scripts, LoRA or DoRA, exact likewise. "gguf": one file for llama.cpp, exact where all sites have one alpha.

    Args:
        model: the base. It is as before afterwards.
        source: an adapter folder, or the model's own adaptation (with `name` where it has several).
        rank: cut every change to this rank; for serving also the common rank.
        out: a folder; for kohya and gguf also a file that ends with .safetensors or .gguf.
        dtype: of the written weights; by default the base's (folded), bfloat16 (serving), as they are (kohya, gguf). peft's
            factors stay as they are.

    Raises:
        CompositionError: a change that the format can't hold.
        UnknownName: no such format. FileError: the folder can't be written.
    """
    if to not in FORMATS:
        raise UnknownName.of("format", to, FORMATS, f"there are: {', '.join(FORMATS)}")
    if (to == "folded" and rank is not None) or (to == "peft" and dtype is not None):
        raise OptionError(
            f"export --to {to}: {'a folded model has no rank' if rank else 'the factors keep the dtype that they trained in'}"
        )
    out = Path(out)
    with borrowed(model, source, name, force) as (adaptation, name):
        ties = tuple(_broken_ties(model, adaptation, name))
        if to == "folded":
            errors = write_folded(adaptation, name, out, dtype)
            own = {p.dtype for n, p in model.named_parameters() if not n.startswith("rankfold.")}
            return ExportReport(to, out, errors, notes=ties, dtype=_named([dtype] if dtype else own))
        adapter, errors = saving.normal_form(adaptation, name, rank)
        alone = {e.name for e in adaptation.attached[name].member.extras.values() if e.alone}
        adapter = Adapter(adapter.entries, _whole_modules(model, adapter, alone), adapter.metadata)
        base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
        if to == "peft":
            unlike = [f"{slot.site.key}: {r}" for slot in adaptation.slots(name) if (r := _unlike_peft(model, slot.site))]
            if unlike:
                raise CompositionError(unlike[0])
            peft.write_peft(out, adapter, base_model)
            still = (f"{k}: no change, left out" for k, e in adapter.entries.items() if not e.rank and e.additive)
            labels = adaptation.attached[name].labels
            names = (f"names of labels have no place in this format: {', '.join(labels)}",) if labels else ()
            twice = () if all(e.kind != "multihead" for e in adapter.entries.values()) else (PEFT_TWICE,)
            notes = (*ties, *still, *twice, *names)
            return ExportReport(to, out, errors, adapter.ranks, notes, _factor_dtypes(adapter))
        if to in FILES:
            return _one_file(model, adaptation, name, adapter, errors, to, out, dtype, ties)
        report = serving.write_serving(out, adapter, dtype or torch.bfloat16, rank, base_model)
        left = (f"left out, engines take no whole modules: {', '.join(report.left_out)}",) if report.left_out else ()
        ranks = dict.fromkeys(report.errors, report.rank)
        return ExportReport(to, out, _both(errors, report.errors), ranks, (*ties, *left), _named([dtype or torch.bfloat16]))


def _named(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted({str(d).removeprefix("torch.") for d in dtypes}))


def _factor_dtypes(adapter: Adapter) -> str:
    return _named(t.dtype for e in adapter.entries.values() for t in (e.B, e.A))


def _one_file(
    model: nn.Module,
    adaptation: Adaptation,
    name: str,
    adapter: Adapter,
    errors: Mapping[str, float],
    to: str,
    out: Path,
    dtype: torch.dtype | None,
    notes: tuple[str, ...],
) -> ExportReport:
    """kohya and gguf."""
    file = out if out.suffix == Path(FILES[to]).suffix else out / FILES[to]
    if to == "kohya":
        unlike = [f"{s.site.key}: {r}" for s in adaptation.slots(name) if (r := _unlike_peft(model, s.site))]
        if unlike:
            raise CompositionError(unlike[0].replace("peft's", "kohya's"))
        text = all(e.name.removeprefix("text_model.").startswith("encoder.layers.") for e in adapter.entries.values())
        rounded = kohya.write_kohya(file, adapter, "lora_te" if text else "lora_unet", dtype)
    else:
        heads = heads_of(model)
        if heads is None:
            raise CompositionError("gguf: the model has no config of transformers, and llama.cpp knows such models only")
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        rounded = gguf.write_gguf(file, adapter, heads, tied, dtype)
    left = (f"left out, the format holds changes of weights only: {', '.join(adapter.extras)}",) if adapter.extras else ()
    ranks = {e.name: e.rank for e in join_rows(adapter).entries.values()}
    written = _named([dtype]) if dtype else _factor_dtypes(adapter)
    return ExportReport(to, file, _both(errors, rounded), ranks, (*notes, *left), written)


@contextmanager
def borrowed(
    model: nn.Module, source: str | Path | Adaptation, name: str | None = None, force: bool = False
) -> Iterator[tuple[Adaptation, str]]:
    """(handle, adapter's name), that adapter alone being on; the model is as before afterwards."""
    store = store_of(model)
    before = dict(store.active) if store is not None else {}
    from_folder = isinstance(source, str | Path)
    if from_folder:
        adaptation, name = load(model, source, name=BORROWED, force=force), BORROWED  # type: ignore[arg-type]
    else:
        adaptation = source  # type: ignore[assignment]
        name = adaptation._get(name).member.name
    try:
        adaptation.use(name)
        yield adaptation, name
    finally:
        if from_folder:
            adaptation.remove(name)
        if (store := store_of(model)) is not None:
            store.switch(before)


def _whole_modules(model: nn.Module, adapter: Adapter, alone: Collection[str]) -> dict[str, Tensor]:
    """The extra tensors as peft stores them: every module whole, and a copy for every user of a tied tensor."""
    users = _users(model)
    rows = {_at_embedding(model, full, users): t for full, t in adapter.extras.items() if split_rows(full)[1] is not None}
    whole = {full: value for full, value in adapter.extras.items() if split_rows(full)[1] is None}
    extras = {other: value for full, value in whole.items() for other in ([full] if full in alone else users[full])}
    adapted = {e.name for e in adapter.entries.values()}
    for owner in {full.rpartition(".")[0] for full in extras if not full.endswith(".bias")} - adapted:  # a bias may stand alone
        for leaf, p in model.get_submodule(owner)._parameters.items():
            if p is not None:
                extras.setdefault(f"{owner}.{leaf}", p.detach().cpu())
    return extras | rows


def _at_embedding(model: nn.Module, full: str, users: Mapping[str, list[str]]) -> str:
    """The name of these rows at the embedding, where a head shares them: peft takes a tie from there alone."""
    name = split_rows(full)[0]
    embeddings = [n for n in users[name] if isinstance(model.get_submodule(n.rpartition(".")[0]), nn.Embedding)]
    return (embeddings or [name])[0] + full.removeprefix(name)


def _broken_ties(model: nn.Module, adaptation: Adaptation, name: str) -> Iterator[str]:
    """Adapted weights that other modules share without being adapted: they keep the base's."""
    adapted = {s.site.name for s in adaptation.slots(name)}
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            users.setdefault(id(weight), []).append(path)
    for sharing in users.values():
        changed, kept = [n for n in sharing if n in adapted], [n for n in sharing if n not in adapted]
        if changed and kept:
            yield f"{', '.join(changed)}: shares its weight with {', '.join(kept)}, which is not adapted and keeps the base's"


def _unlike_peft(model: nn.Module, site: Site) -> str | None:
    """Why the same factors are another function in peft, or None: its A has the kernel, stride and padding of the base alone."""
    if site.kind != "convolution":
        return None
    module: Any = model.get_submodule(site.module)
    if module.padding_mode != "zeros" or any(d != 1 for d in module.dilation):
        return (
            "peft's LoRA ignores a convolution's dilation and padding_mode, so that the same factors are another function there"
        )
    return None


def _both(cut: Mapping[str, float], rounded: Mapping[str, float]) -> dict[str, float]:
    """Cutting, then rounding what was left: the relative errors add up to at most this."""
    by_module: dict[str, float] = {}
    for key, error in cut.items():
        module = key.partition("[")[0]
        by_module[module] = max(by_module.get(module, 0.0), error)
    return {k: by_module.get(k, 0.0) + error for k, error in rounded.items()}
