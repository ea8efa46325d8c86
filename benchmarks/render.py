"""Writes docs/benchmarks.md from results/*.json: every figure with floor, interval, conditions, and whether it is reached."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .b7_fidelity import CHECKS
from .reach import reach_of, why
from .results import FOLDER

__all__ = ["PAGE", "page", "render"]

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
Cells = Mapping[str, Mapping[str, Any]]

INTRO = """# Benchmarks

Written by `python -m benchmarks`; do not edit. One process, one thread, the same seeds, inputs, base weights and adapter tensors
for both; competitors interleaved A B C C B A after two warm-ups; each figure is the median of the rounds' paired ratios, with the
95 % bootstrap interval of that median. The **floor** is forward and input-gradient backward of the frozen model: what a machine
must do anyway. A cell fails unless ours and peft give the same output and gradients. The version of every tensor moves between
steps, as an optimizer would move it, so that nothing computed from a tensor is carried over. `make bench` measures the 256-token
cells, `make bench-all` all of them.
"""
STEP_INTRO = "All linear layers; Llama: 4 layers of 512, MLP 1408, rank 16; MiniLM-L6: 6 layers of 384, rank 8."


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _interval(ratio: Sequence[float]) -> str:
    return f"**{ratio[0]:.3f}** [{ratio[1]:.3f}, {ratio[2]:.3f}]"


def _verdict(benchmark: str, cell: Mapping[str, Any], ratio: float, over_peft: float | None) -> str:
    reach = reach_of(benchmark, cell)
    if reach is None:
        return "no figure set"
    if reach.met(ratio, over_peft):
        return f"{reach}: met"
    reason = why(benchmark, cell)
    return f"{reach}: missed" + (f" ({reason})" if reason else "")


def _name(cell: Mapping[str, Any]) -> str:
    model = {"llama": "Llama", "minilm": "MiniLM-L6"}.get(cell["model"], cell["model"])
    dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(cell["dtype"], cell["dtype"])
    return f"{model}, {dtype}, {cell['tokens']} tokens" + (f", dropout {cell['dropout']:g}" if cell["dropout"] else "")


def steps(benchmark: str, cells: Cells) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for row in cells.values():
            cell, ratios = row["cell"], row["ratios"]
            ours = ratios["ours/floor"]
            yield (
                _name(cell), f"{row['ms']['cpu']['floor']:.0f} ms", _interval(ours["cpu"]), f"{ours['wall'][0]:.3f}",
                f"{ratios['peft/floor']['cpu'][0]:.3f}", f"{ratios['ours/peft']['cpu'][0]:.3f}",
                _verdict(benchmark, cell, ours["cpu"][0], ratios["ours/peft"]["cpu"][0]),
            )  # fmt: skip

    head = ("cell", "floor", "ours / floor", "wall", "peft / floor", "ours / peft", "reach")
    return STEP_INTRO + " CPU time; wall time beside it.\n\n" + table(head, rows())


def structures(cells: Cells) -> str:
    """Geometric means over what is there; the median beside them, since one structure can carry a mean."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in cells.values():
        groups.setdefault((row["cell"]["dtype"], row["cell"]["tokens"]), []).append(row)
    parts = [
        "Llama as in B1, all linear layers, peft's default options, equal tensors: the outputs and gradients of both agree. "
        "Reach: mean ours / peft at most 0.65 over 20 structures and more, none slower than peft."
    ]
    for (dtype, tokens), rows in groups.items():
        ratios = sorted(row["ratios"]["ours/peft"]["cpu"][0] for row in rows)
        mean = math.exp(sum(math.log(r) for r in ratios) / len(ratios))
        lines = (
            (
                f"`{row['cell']['method']}`", str(row["cell"]["rank"]), f"{row['parameters']['ours']:,}",
                _interval(row["ratios"]["ours/floor"]["cpu"]), f"{row['ratios']['peft/floor']['cpu'][0]:.3f}",
                f"{row['ratios']['ours/peft']['cpu'][0]:.3f}",
            )
            for row in rows
        )  # fmt: skip
        parts.append(
            f"**{dtype}, {tokens} tokens**: geometric mean ours / peft **{mean:.3f}** over {len(ratios)}, "
            f"median {statistics.median(ratios):.3f}, worst {ratios[-1]:.3f}.\n\n"
            + table(("structure", "rank", "parameters", "ours / floor", "peft / floor", "ours / peft"), lines)
        )
    return "\n\n".join(parts)


def kept(cells: Cells) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for row in cells.values():
            cell, ratio, peak = row["cell"], row["kept/floor"], row["peak/floor"]
            yield (
                f"{cell['method']}, {_name(cell)}", f"{row['kept']['floor'] / 2**20:.1f} MB", f"**{ratio['ours']:.3f}**",
                f"{ratio['peft']:.3f}", f"{peak['ours']:.3f}", f"{peak['peft']:.3f}", _verdict("B4", cell, ratio["ours"], None),
            )  # fmt: skip

    head = ("cell", "floor keeps", "ours / floor", "peft / floor", "peak: ours", "peak: peft", "reach")
    text = (
        "Bytes that autograd keeps from forward to backward, each storage once, parameters and input left out; "
        "peak of the bytes of live tensors in a step, over the floor's."
    )
    return text + "\n\n" + table(head, rows())


def _number(value: Any) -> str:
    if not isinstance(value, float | int):
        return "refused"
    return "0" if value == 0 else f"{value:.1e}"


def _b7_verdict(row: Mapping[str, Any]) -> str:
    bitwise = ("disabled", "fold") + (("start",) if row["starts"] == "base" else ())
    bad = [c for c in bitwise if isinstance(row[c], float) and row[c] != 0]
    bad += [c for c in ("reload", "peft", "sum") if isinstance(row[c], float) and row[c] > 1e-6]
    return "met" if not bad else "missed: " + ", ".join(f"{c} {row[c]:.1e}" for c in bad)


def faults(cells: Cells) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for name, row in cells.items():
            if "what" in row:
                right, exact = ("1", abs(row["ours"] - 1) < 1e-6) if name == "U12" else ("0", row["ours"] < 1e-6)
                extra = [f"{row[k]:.3g}" for k in ("peft disabled", "ours disabled") if k in row]
                theirs, ours = (f"{row[k]:.3g}" for k in ("peft", "ours"))
                yield (
                    name, row["what"], theirs + (f" (disabled: {extra[0]})" if extra else ""),
                    ours + (f" (disabled: {extra[1]})" if extra else ""), f"{right}: {'met' if exact else 'missed'}",
                )  # fmt: skip

    return table(("fault", "what was done", "peft", "ours", "reach"), rows())


def fidelity(cells: Cells) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for name, row in cells.items():
            if "disabled" in row:
                yield (f"`{name}`", *(_number(row[c]) for c in CHECKS), _b7_verdict(row))

    refused = [f"- `{name}`: {row['refused']}" for name, row in cells.items() if "refused" in row]
    legend = "\n".join(f"- **{check}**: {meaning}" for check, meaning in CHECKS.items())
    text = (
        "Largest relative error of the logits of a small Llama; 0 means bitwise. Reach: 0 for start, disabled and fold, "
        f'at most 1e-6 elsewhere. "refused" is an error that says why.\n\n{legend}\n\n'
    )
    refusals = "\n\nPairs that refuse each other:\n\n" + "\n".join(refused) if refused else ""
    return text + table(("method", *CHECKS, "reach"), rows()) + refusals


BANK = {1: 1.1, 8: 1.5, 32: 1.7}


def bank(cells: Cells) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for row in (r for r in cells.values() if "adapters" in r):
            ours, theirs = row["over base"]["ours"], row["over base"]["peft"]
            reach = BANK.get(row["adapters"])
            verdict = f"≤ {reach:g}: {'met' if ours[0] <= reach else 'missed'}" if reach else ""
            anew = [row["over base"].get(f"{which} anew") for which in ("one", "all")]
            yield (
                str(row["adapters"]), f"{row['ms']['base']:.2f} ms", _interval(ours), *(f"{a[0]:.2f}" if a else "" for a in anew),
                f"{row['bound']:.2f}", _interval(theirs), verdict,
            )  # fmt: skip

    text = "One token for each of 32 rows, adapters of rank 4, 8 and 16 in a bank of rank 16, over the base model's step.\n\n"
    text += table(("adapters in the batch", "base", "ours", "one exchanged", "all exchanged", "bound", "peft", "reach"), rows())
    text += "\n\nThe bound is the base's step and the time to read the factors of the adapters present once from memory. "
    text += "Exchanged: before every step one of the batch's adapters, or each of them, makes way for another at all of its rows."
    row = cells.get("handling")
    if row is None:
        return text
    ours, theirs = row["ms"], row["peft ms"]
    fast = all(ours[n] <= 0.1 for n in ("add", "switch"))
    return (
        f"{text}\n\nWith {row['resident']} resident: add {ours['add']:.3f} ms (the row's copy alone "
        f"{ours['row copy']:.3f}), switch {ours['switch']:.3f} ms (reach: 0.1 each: "
        f"{'met' if fast else 'missed'}). peft with {theirs['resident']}: add "
        f"{theirs['add']:.1f} ms, switch {theirs['switch']:.1f} ms."
    )


def experts(cells: Cells) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for row in cells.values():
            cell, ratios = row["cell"], row["ratios"]
            dtype = {"float32": "fp32", "bfloat16": "bf16"}[cell["dtype"]]
            shape = f"{cell['chosen']} of {cell['experts']} experts, {cell['hidden']} x {cell['inner']}"
            over = (_interval(ratios[f"{name}/floor"]["cpu"]) for name in ("ours", "loop", "peft"))
            floor, beside = f"{row['ms']['cpu']['floor']:.0f} ms", f"{ratios['ours/peft']['cpu'][0]:.3f}"
            yield (f"{shape}, {dtype}, {cell['tokens']} tokens", floor, *over, beside)

    text = (
        "LoRA on both stacks of two layers, attention and router frozen; the floor runs the library's grouped products. "
        "Loop: ours, one product after the other for each expert. peft: `target_parameters`. CPU time."
    )
    return text + "\n\n" + table(("cell", "floor", "ours / floor", "loop / floor", "peft / floor", "ours / peft"), rows())


def startup(cells: Cells) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for name, row in cells.items():
            ours = "rankfold" in name
            met = row["wall"] <= 0.5 and not row["heavy"]
            reach = f"≤ 0.5 s, no torch: {'met' if met else 'missed'}" if ours else ""
            floor = cells["python"]["wall"] if "python" in cells else row["wall"]
            seconds = (f"{row['wall']:.3f} s", f"{row['wall'] - floor:.3f} s")
            yield (f"`{name}`", *seconds, str(row["modules"]), ", ".join(row["heavy"]), reach)

    head = ("command", "seconds", "above Python alone", "modules", "heavy ones", "reach")
    return "Median wall time of a whole process.\n\n" + table(head, rows())


def calibration(cells: Cells) -> str:
    import torch

    from rankfold.core import costs

    def rows() -> Iterator[Sequence[str]]:
        for dtype, row in cells.items():
            in_use = costs.PRICES[getattr(torch, dtype)]
            for name, value in row["prices"].items():
                yield f"`{name}`", dtype, f"{value:.3g}", f"{getattr(in_use, name):.3g}"

    return "In units of one FLOP of a large product in that dtype.\n\n" + table(("price", "dtype", "measured", "in use"), rows())


def choices(cells: Cells) -> str:
    groups: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for key, row in cells.items():
        groups.setdefault((row["cell"]["method"], row["cell"]["dtype"]), []).append((row["regret"], f"{key}: {row['chosen']}"))

    def rows() -> Iterator[Sequence[str]]:
        for (method, dtype), found in groups.items():
            worst, where = max(found)
            mean = sum(r for r, _ in found) / len(found)
            yield f"`{method}`", dtype, str(len(found)), f"{mean:.3f}", f"{worst:.2f} ({where})"

    everything = [r for found in groups.values() for r, _ in found]
    text = (
        'Time of what plan and memory "auto" run over that of the fastest plan, one linear site forward and backward; '
        'recomputation that "auto" chose for the sake of memory counts as lost time. Mean over all cells: '
        f"**{sum(everything) / len(everything):.3f}**.\n\n"
    )
    return text + table(("structure", "dtype", "cells", "mean", "worst"), rows())


def _conditions(cells: Cells) -> str:
    """One line for each set of conditions that occurs."""
    seen: dict[str, list[float]] = {}
    for row in cells.values():
        c = row["conditions"]
        text = (
            f"{c['cpu']}, {c['cores']} cores, {c['threads']} thread · torch {c['torch']}, peft {c['peft']}, "
            f"transformers {c['transformers']} · {c['date']} · source {c['source']}"
        )
        seen.setdefault(text, []).append(c["load"])
    lines = (f"<small>{text} · load {min(loads):.1f} to {max(loads):.1f}</small>\n" for text, loads in seen.items())
    return "\n".join(lines)


SECTIONS = {
    "B1": ("B1: a LoRA step", lambda cells: steps("B1", cells)),
    "B2": ("B2: a DoRA step", lambda cells: steps("B2", cells)),
    "B3": ("B3: every structure that peft has too", structures),
    "B4": ("B4: bytes", kept),
    "B5": ("B5: many adapters", bank),
    "B7": ("B7: fidelity", lambda cells: faults(cells) + "\n\n" + fidelity(cells)),
    "B11": ("B11: start-up", startup),
    "experts": ("Experts: a LoRA step", experts),
    "calibrate": ("The planner's prices", calibration),
    "regret": ("The planner's choices", choices),
}


def page(folder: Path = FOLDER) -> str:
    """The whole page; benchmarks without results are left out."""
    parts = [INTRO]
    for name, (title, write) in SECTIONS.items():
        file = folder / f"{name.lower()}.json"
        if file.exists():
            cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
            parts.append(f"## {title}\n\n{write(cells)}\n\n{_conditions(cells)}")
    return "\n".join(parts)


def render(folder: Path = FOLDER, out: Path = PAGE) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(folder), encoding="utf-8")
    return out


if __name__ == "__main__":
    print(render())
