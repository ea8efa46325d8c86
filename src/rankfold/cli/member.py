"""One member of the catalogue in full: formula, options with bounds, traits, what it composes with, source, limits."""

import ast
import re
import textwrap
from collections.abc import Mapping
from functools import cache

from rankfold.core.registry import AXES, Entry, Option, entries
from rankfold.methods.catalogue import COMPOSITIONS, Composition

__all__ = ["allowed", "by_reason", "page", "page_of_composition", "refusal", "refused"]

WIDTH = 120
BOUNDS = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}
TRAITS = {
    "starts": "start: {}",
    "input_dependent": "depends on the input: can't be folded or exported",
    "stochastic": "differs between training passes",
    "acts_on_input": "multiplies W from the right: not for embeddings",
    "owns": "trains an owned copy of every weight, norm and bias",
    "offset": "enters as an offset from where it starts: the function at the start is the base's",
    "needs": "needs: {}",
    "kinds": "only for sites of kind: {}",
    "shape_stable": "shapes stay fixed while training: {}",
    "own": "needs the optimizer of adaptation.optimizer(lr=...)",
    "steps": "acts during training, so it needs adaptation.optimizer(lr=..., total_steps=...)",
    "allocates": "gives each site its own rank before training",
    "point": "acts at: {}",
}


def page(entry: Entry) -> str:
    """The member in full."""
    body, example = _without_example(entry.doc)
    parts = [f"{entry.key}" + (f"   (also: {', '.join(entry.aliases)})" if entry.aliases else ""), "", body.strip()]
    if entry.options:
        parts += ["", "Options (bare, or as " + f"{entry.name}.OPTION):", *(f"  {_option(o)}" for o in entry.options)]
    traits = list(_traits(entry))
    if traits:
        parts += ["", "Traits:", *(f"  {line}" for line in traits)]
    parts += ["", "Composes:", *textwrap.indent(_composes(entry), "  ").splitlines()]
    if example:
        parts += ["", "Example:", textwrap.indent(example, "  ")]
    parts += ["", "Source:", *(f"  {line}" for line in _source(entry))]
    return "\n".join(parts)


def page_of_composition(name: str, composition: Composition) -> str:
    """A named composition in full, with the members that it stands for."""
    options = ", ".join(f"{k}={v}" for k, v in composition.options.items()) or "those of its parts"
    members = [e.key for token in composition.parts.split("+") for e in entries() if token in (e.key, e.name, *e.aliases)][:8]
    return "\n".join(
        [
            f"composition {name} = {composition.parts}",
            "",
            composition.doc,
            "",
            f"Presets: {options}; your own options win",
            f"Parts:   {', '.join(dict.fromkeys(members))} (each in full: rankfold methods NAME)",
            *([f"Source:  {composition.paper}"] if composition.paper else []),
        ]
    )


def _without_example(doc: str) -> tuple[str, str]:
    """(text, doctest lines) of a docstring."""
    start = re.search(r"^ *>>> ", doc, re.MULTILINE)
    return (doc, "") if start is None else (doc[: start.start()], textwrap.dedent(doc[start.start() :]).rstrip())


def _option(option: Option) -> str:
    default = "" if option.default in ("", "None") else f" = {option.default}"
    return f"{option.name}{default}   ({allowed(option.type)})"


def allowed(annotation: str) -> str:
    """What an annotation of the source allows, in words.

    >>> allowed("Annotated[int, Ge(1)]"), allowed("Annotated[float, Gt(0), Lt(1)] | None"), allowed("Literal['row', 'rank']")
    ('int >= 1', 'float > 0, < 1, or none', 'row, or rank')
    """
    node = ast.parse(annotation, mode="eval").body
    return ", or ".join(dict.fromkeys(_words(node)))


def _words(node: ast.expr) -> list[str]:
    if isinstance(node, ast.BinOp):
        return _words(node.left) + _words(node.right)
    if isinstance(node, ast.Constant):
        return ["none" if node.value is None else str(node.value)]
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        name = ast.unparse(node.value).rpartition(".")[2]
        if name == "Literal":
            return [word for each in inner for word in _words(each)]
        if name == "Annotated":
            bounds = [f"{BOUNDS[c.func.id]} {ast.unparse(c.args[0])}" for c in inner[1:] if _is_bound(c)]  # type: ignore[attr-defined]
            return [" ".join([*_words(inner[0]), ", ".join(bounds)]).strip()]
    return [ast.unparse(node)]


def _is_bound(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BOUNDS


def _traits(entry: Entry) -> list[str]:
    lines = []
    for name, value in entry.traits:
        if name == "exempt":
            reasons = _literal(value)
            pairs = reasons.items() if isinstance(reasons, dict) else [(value, "see its source")]
            lines += [f"exempt from law {law!r}: {reason}" for law, reason in pairs]
        elif name in TRAITS and value not in ("False", "None"):
            shown = _literal(value)
            shown = ", ".join(sorted(map(str, shown))) if isinstance(shown, frozenset | set | tuple | list) else shown
            lines.append(TRAITS[name].format(shown))
        elif name == "default" and value == "True":
            lines.append(f"the {entry.axis} where a method names none")
    return lines


def _literal(text: str) -> object:
    """The value of a literal in the source, `frozenset({...})` among them; the text itself where it is none."""
    inner = re.fullmatch(r"frozenset\((.*)\)", text, re.DOTALL)
    try:
        return frozenset(ast.literal_eval(inner[1])) if inner else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _composes(entry: Entry) -> str:
    """Every other axis, tried: who composes with this member, and who does not."""
    lines = [
        f"named: {n} = {c.parts}"
        for n, c in COMPOSITIONS.items()
        if any(t in (entry.name, entry.key) for t in c.parts.split("+"))
    ]
    for axis in AXES:
        if axis == entry.axis:
            continue
        tried = {other.name: refusal(entry, other) for other in entries(axis)}
        good = [n for n, reason in tried.items() if reason is None]
        bad = {n: reason for n, reason in tried.items() if reason is not None}
        if good:
            lines.append(f"{axis}: {', '.join(good)}" + ("" if bad else " (all)"))
        lines += [f"not with {axis} {', '.join(names)}: {reason}" for reason, names in by_reason(bad).items()]
    return "\n".join(_wrapped(lines))


def by_reason(refused: Mapping[str, str]) -> dict[str, list[str]]:
    """Names grouped by why they were refused: by what the one side asks for, where the other side differs from name to name.

    >>> by_reason({"bone": "init 'x' works on B; 'bone' trains value", "miss": "init 'x' works on B; 'miss' trains value"})
    {"init 'x' works on B": ['bone', 'miss']}
    """
    groups: dict[str, list[str]] = {}
    for name, reason in refused.items():
        groups.setdefault(reason.partition("; ")[0], []).append(name)
    return {refused[names[0]] if len(names) == 1 else reason: names for reason, names in groups.items()}


def _wrapped(lines: list[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, WIDTH - 4, subsequent_indent="  ") or [""]]


@cache
def refusal(one: Entry, other: Entry) -> str | None:
    """Why two members can't stand in one method, or None. Tried, so the structures' code is imported."""
    from rankfold.core.registry import resolve
    from rankfold.core.structure import Decorator

    members = sorted((one, other), key=lambda e: AXES.index(e.axis))
    chain = [m.name if m.axis == "structure" else m.key for m in members]
    if members[0].axis == "structure" and issubclass(resolve(members[0]), Decorator):
        default = next(e for e in entries("structure") if dict(e.traits).get("default") == "True")
        chain.insert(1, default.name)
    return refused("+".join(chain))


@cache
def refused(chain: str) -> str | None:
    """Why a chain is no method, in one line, or None."""
    from rankfold.errors import CompositionError
    from rankfold.training.method import method

    try:
        method(chain)
    except CompositionError as error:
        reason = str(error).partition("\n")[0]
        return (reason.partition(": ")[2] or reason).rstrip(".")
    return None


def _source(entry: Entry) -> list[str]:
    head = ast.get_docstring(ast.parse(entry.file.read_text(encoding="utf-8"))) or ""
    cited = [part for part in head.split("\n\n")[1:] if part.strip()]
    lines = textwrap.wrap(" ".join(" ".join(cited).split()), WIDTH - 2) if cited else []
    return [*lines, *([f"key {entry.paper}"] if entry.paper else []), f"file {entry.file.name}"]
