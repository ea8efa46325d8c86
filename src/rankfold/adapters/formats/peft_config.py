"""The config of Hugging Face's peft (0.21) for LoRA, rsLoRA and DoRA: its options checked, its patterns read and never run.

peft keeps it in adapter_config.json, diffusers one for each model of a pipeline in the header of its file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankfold.errors import FileError

from .numbers import number, rank_number

__all__ = ["CONFIG", "TENSORS", "alpha_of", "checked", "factor_names", "rank_of", "scale_of", "written"]

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# options that do not change what the stored tensors compute
HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "qalora_group_size", "runtime_config",
    "velora_config", "ensure_weight_tying", "target_parameters", "trainable_token_indices",
}  # fmt: skip
# inits after which peft's base is no longer the checkpoint: the stored factors alone do not give the function
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
LITERAL = re.compile(r"[\w.\-]+")
SWITCHES = {"use_rslora": False, "use_dora": False, "fan_in_fan_out": False}


def checked(config: Any, where: str | Path) -> dict[str, Any]:
    """The config with peft's defaults in place of what it lacks, its numbers as numbers.

    Raises:
        FileError: no object; another method than LoRA; an option that is not known not to matter; an init that moved the base;
            a value of another kind than peft writes; a number that can't be meant; an alpha_pattern that would have to be run.

    >>> checked({"peft_type": "LORA", "r": 4}, "a.json")["lora_alpha"]
    8
    """
    if not isinstance(config, dict):
        raise FileError(f"{where}: must be an object")
    if config.get("peft_type") != "LORA":
        raise FileError(
            f"{where}: peft_type {str(config.get('peft_type'))[:40]!r}; rankfold reads peft's LORA (rsLoRA and DoRA included)"
        )
    on = sorted(k for k, v in config.items() if k not in HARMLESS and v not in (None, False, {}, []))
    if on:
        shown = ", ".join(f"{k[:40]}={str(config[k])[:40]}" for k in on[:4])
        raise FileError(f"{where}: {shown}: rankfold does not know what that does, and it may change the function")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(REBASED):
        raise FileError(
            f"{where}: init_lora_weights={init[:40]!r}: these factors sit on a base that peft has changed, not on the "
            "checkpoint. Save it again with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    given = {k: v for k, v in config.items() if v is not None}
    kinds: dict[str, tuple[type, Any]] = {
        **{name: (bool, default) for name, default in SWITCHES.items()},
        "bias": (str, "none"), "rank_pattern": (dict, {}), "alpha_pattern": (dict, {}),
    }  # fmt: skip
    for key, (kind, default) in kinds.items():
        config[key] = value = given.get(key, default)
        if not isinstance(value, kind):
            raise FileError(f"{where}: {key} {str(value)[:40]!r} is not what peft writes there")
    config["r"] = rank_number(given.get("r", 8), f"{where}: r")
    config["lora_alpha"] = number(given.get("lora_alpha", 8), f"{where}: lora_alpha")
    if "lora_dropout" in given:
        config["lora_dropout"] = number(given["lora_dropout"], f"{where}: lora_dropout")
    for pattern in config["alpha_pattern"]:
        if _literal(pattern) is None:
            raise FileError(
                f"{where}: alpha_pattern {pattern[:60]!r} is a regular expression, and rankfold runs none from a file. "
                "Write the names in full"
            )
    for key, reads in (("rank_pattern", rank_number), ("alpha_pattern", number)):
        config[key] = {p: reads(v, f"{where}: {key} {p[:60]!r}") for p, v in config[key].items()}
    return config


def written(task: Any, base_model: str | None, **own: Any) -> dict[str, Any]:
    """A config to be stored beside factors: what every one of ours says, and its own options.

    Args:
        task: peft's name of the form of the model; whatever else is no name of one is left out.

    >>> written("CAUSAL_LM", None, r=8)["task_type"], written("poetry", None, r=8)["task_type"]
    ('CAUSAL_LM', None)
    """
    return {
        "peft_type": "LORA",
        "task_type": task if task in TASKS else None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "init_lora_weights": True,  # peft runs other inits again when it loads
        "lora_dropout": 0.0,
        **own,
    }


def factor_names(embedding: bool) -> tuple[str, str]:
    """What peft calls A and B behind the name of a module."""
    return ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")


def alpha_of(config: Mapping[str, Any], site: str) -> float:
    """alpha at a site of a checked config."""
    found = _matching(config["alpha_pattern"], site)
    return config["lora_alpha"] if found is None else found


def rank_of(config: Mapping[str, Any], site: str) -> int | None:
    """The rank that a checked config promises a site; None where a pattern of it would have to be run to tell."""
    found = _matching(config["rank_pattern"], site)
    if found is None and all(_literal(p) is not None for p in config["rank_pattern"]):
        return config["r"]
    return found


def scale_of(config: Mapping[str, Any], site: str, rank: int) -> float:
    """alpha / r, or alpha / √r under rsLoRA (Kalajdzievski, 2023).

    >>> config = checked({"peft_type": "LORA", "lora_alpha": 8, "use_rslora": True}, "a.json")
    >>> scale_of(config, "q", 4)
    4.0
    """
    return alpha_of(config, site) / (math.sqrt(rank) if config["use_rslora"] else rank)


def _literal(pattern: str) -> tuple[bool, str] | None:
    """(anchored, name) of a pattern that only spells a name; None if it would have to be run."""
    anchored = pattern.startswith("^")
    name = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".").replace(r"\-", "-")
    return (anchored, name) if LITERAL.fullmatch(name) else None


def _matching(patterns: Mapping[str, Any], site: str) -> Any:
    """The value of the first pattern that is the site's name or the end of it, as peft chooses; None if there is none."""
    for pattern, value in patterns.items():
        literal = _literal(pattern)
        if literal is not None and (site == literal[1] or (not literal[0] and site.endswith("." + literal[1]))):
            return value
    return None
