"""The named compositions: what a bare name stands for when it is no member of an axis itself. Literals only; imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["COMPOSITIONS", "Composition"]


@dataclass(frozen=True)
class Composition:
    """A method as a chain of parts with preset options.

    Args:
        parts: the chain, as one would type it.
        options: presets, each under the name of its part ("lora.power"); the user's own options win.
        doc: one line.
        paper: citation key.
    """

    parts: str
    options: Mapping[str, float | int | str | None] = field(default_factory=dict)
    doc: str = ""
    paper: str | None = None


COMPOSITIONS: dict[str, Composition] = {
    "rslora": Composition(
        "lora",
        {"lora.power": 0.5},
        "LoRA with s = alpha / √rank: the step keeps its size as rank grows.",
        "kalajdzievski2023rslora",
    ),
    "dora": Composition("magnitude+lora", {}, "LoRA for the directions of the rows, lengths trained apart.", "liu2024dora"),
    "dvora": Composition("magnitude+vera", {}, "VeRA for the directions of the rows, lengths trained apart.", "liu2024dora"),
    "pissa": Composition("lora+init:pissa", {}, "LoRA started at the principal components of W.", "meng2024pissa"),
    "eva": Composition(
        "lora+init:eva+rank:eva",
        {},
        "A started at principal components of the inputs, ranks where they explain most.",
        "paischer2024eva",
    ),
    "lora-ga": Composition(
        "lora+init:lora-ga", {}, "LoRA started so that its first step is that of full fine-tuning.", "wang2024loraga"
    ),
    "adalora": Composition(
        "gate+lora+init:gaussian+rank:adalora",
        {"gate.per": "rank", "gate.start": 0.0, "gaussian.std": 0.02, "gaussian.std_b": 0.02},
        "B diag(g) A whose least important components are switched off on the way to the budget.",
        "zhang2023adalora",
    ),
    "loraplus": Composition("lora+update:loraplus", {}, "LoRA whose B learns faster than its A.", "hayou2024loraplus"),
    "lora-fa": Composition(
        "bma", {"bma.middle": "identity", "bma.train": "B"}, "LoRA with A frozen: no input of A is kept.", "zhang2023lorafa"
    ),
    "moslora": Composition("bma", {"bma.start": "orthogonal"}, "LoRA with a trained mixer between B and A.", "wu2024moslora"),
    "slora": Composition("bma", {}, "LoRA with a trained square core between B and A.", "guo2025nlora"),
    "nlora": Composition("bma+init:nlora", {}, "SLoRA started at blocks of W.", "guo2025nlora"),
    "inttune": Composition(
        "bma+init:nlora", {"bma.train": "M"}, "A square core alone, between frozen blocks of W.", "guo2025nlora"
    ),
    "lora-xs": Composition(
        "bma+init:spectrum",
        {"bma.train": "M", "spectrum.values": "B"},
        "A square core alone, between the frozen leading singular vectors of W.",
        "balazy2024loraxs",
    ),
    "lamda": Composition(
        "bma+init:spectrum",
        {"bma.train": "BM"},
        "B and a square core, from the singular triplets of W, before a frozen A.",
        "azizi2024lamda",
    ),
    "svfit": Composition(
        "bma+init:spectrum",
        {"bma.rank": None, "bma.middle": "diagonal", "bma.train": "M"},
        "The singular values of W, all of them, and nothing else.",
        "sun2024svfit",
    ),
    "loldu": Composition(
        "bma+init:loldu",
        {"bma.middle": "diagonal", "bma.train": "M"},
        "The leading pivots of W between its frozen triangular factors.",
        "shi2024loldu",
    ),
    "loran": Composition(
        "sinelora",
        {"sinelora.form": "loran", "sinelora.frequency": 1000},
        "A LoRA whose product is bent by a sine.",
        "deng2025loran",
    ),
    "lora-dash": Composition(
        "dash+rank:lora-dash", {}, "A LoRA, and later coordinates along the singular directions that it uses.", "si2024loradash"
    ),
    "fine-tuning": Composition("full", {}, "Every parameter of an owned copy of the model.", None),
}
