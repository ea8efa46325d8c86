"""The rules of the house that no other tool checks. Each rule is a function of source text, and is seen to reject.

Nothing below `methods/` knows a method by name; no method file is long; nothing is unpickled; no file holds a path of one
machine or the address of a package index; every public name exists.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from rankfold.errors import MissingExtra

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "rankfold"
METHODS = PACKAGE / "methods"
BELOW_METHODS = ("linalg", "kernels", "adapters", "measure", "core", "training")
LONGEST_METHOD = 120

# Names of methods that are also words of the algebra, of the contracts or of torch, each with what it means below methods/.
GENERAL_WORDS = {
    "adamw": "torch's optimizer",
    "dropout": "torch's layer",
    "fixed": "that does not change",
    "full": "whole, as in full_matrices",
    "gate": "a tensor's role",
    "gaussian": "the normal distribution",
    "hadamard": "the elementwise product",
    "kaiming": "torch's start of a layer",
    "kron": "the Kronecker product",
    "magnitude": "a tensor's role, and the operator that rescales rows",
    "mixture": "a sum with weights",
}

# Files of other tools say which of that tool's methods they hold: their readers and writers must name it.
FOREIGN_FORMATS = PACKAGE / "adapters" / "formats"


def sources(*folders: Path) -> list[Path]:
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def text_files() -> list[Path]:
    """Everything that a checkout holds, without what building and running leave behind."""
    folders = ("src", "tests", "docs", "benchmarks", ".ci")
    inside = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    outside = [file for file in ROOT.iterdir() if file.is_file() and (file.name[0] != "." or file.name == ".gitignore")]
    binary = {".pyc", ".png", ".safetensors", ".parquet", ".gz", ".npz", ".arrow"}
    built = ("__pycache__", ".egg-info")
    return sorted(f for f in inside + outside if f.suffix not in binary and not any(p.endswith(built) for p in f.parts))


# Nothing below methods/ names a method


@cache
def method_names() -> set[str]:
    """Names of the files in the rooms of methods/, of what they register, and of what the catalogue composes."""
    names = set()
    for file in METHODS.glob("*/*.py"):
        if file.stem.startswith("_"):
            continue
        names.add(file.stem)
        names |= registered(file.read_text(encoding="utf-8"))
    catalogue = METHODS / "catalogue.py"
    if catalogue.is_file():
        names |= dictionary_keys(catalogue.read_text(encoding="utf-8"))
    return {name.replace("_", "-").lower() for name in names} - GENERAL_WORDS.keys()


def registered(source: str) -> set[str]:
    """Every name in a `@register(axis, name, ...)`, with its aliases."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "register":
            found |= {a.value for a in node.args[1:] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
            for keyword in node.keywords:
                if keyword.arg in ("alias", "aliases"):
                    found |= {
                        c.value for c in ast.walk(keyword.value) if isinstance(c, ast.Constant) and isinstance(c.value, str)
                    }
    return found


def dictionary_keys(source: str) -> set[str]:
    keys = (key for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict) for key in node.keys)
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def named_methods(source: str, names: set[str]) -> list[str]:
    """Where code names a method: as a string or a word of one, an identifier or a word of one, or an import from methods.

    Docstrings and comments are prose and may name what they like.
    """
    tree = ast.parse(source)
    prose = set(docstrings(tree))
    said = [(node, text) for node in ast.walk(tree) if id(node) not in prose for text in spoken(node)]
    return [
        f"line {getattr(node, 'lineno', '?')}: {text!r}"
        for node, text in said
        if text.startswith("rankfold.methods") or words(text) & names
    ]


def docstrings(tree: ast.AST) -> Iterator[int]:
    """Identities of the nodes that are documentation: a string that stands alone as a statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield id(node.value)


def spoken(node: ast.AST) -> Iterator[str]:
    """The strings and identifiers that one node of the tree writes itself."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for field in ("id", "attr", "name", "arg", "asname", "module"):
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield value


def words(text: str) -> set[str]:
    """`merge_lora`, `DoraKernel`, "dora+init:eva": the words of each, in lower case, and chains of words joined by '-'."""
    chains = re.findall(r"[A-Za-z0-9]+(?:[-_][A-Za-z0-9]+)*", text)
    parts = [part for chain in chains for part in re.split(r"[-_]", chain)]
    humps = [hump for part in parts for hump in re.findall(r"[A-Z][a-z0-9]+", part)]
    return {word.replace("_", "-").lower() for word in chains + parts + humps}


@pytest.mark.parametrize("file", sources(*(PACKAGE / floor for floor in BELOW_METHODS)), ids=relative)
def test_nothing_below_methods_names_a_method(file):
    if FOREIGN_FORMATS in file.parents:
        pytest.skip("a foreign format names the methods of its tool")
    assert named_methods(file.read_text(encoding="utf-8"), method_names()) == []


@pytest.mark.parametrize(
    "source",
    [
        'if method == "lora": pass',
        'rule = {"lora-ga": 1}',
        'key = "magnitude+init:lora-ga"',
        "raise ValueError(f'{x} is no LORA')",
        "def merge_lora(a): pass",
        "class LoraKernel: pass",
        "is_lora = True",
        "def f(*, use_lora=False): pass",
        "from rankfold.methods.structures import anything",
        "import rankfold.methods",
        "x.lora(1)",
    ],
)
def test_the_rule_rejects_a_named_method(source):
    assert named_methods(source, {"lora", "lora-ga"})


@pytest.mark.parametrize(
    "source",
    [
        '"""LoRA is one case."""',
        "x = 1  # as lora does",
        "def f():\n    '''Like lora.'''",
        'key = "explorative"',
        "import rankfold.core",
    ],
)
def test_the_rule_accepts_prose_and_other_words(source):
    assert named_methods(source, {"lora", "lora-ga"}) == []


def test_names_of_methods_are_read_from_their_registration():
    source = '@register("structure", "kron", aliases=("lokr",), paper="nobody2024")\nclass Kron: pass'
    assert registered(source) == {"kron", "lokr"}
    assert dictionary_keys('CATALOGUE = {"dora": "magnitude+lora"}') == {"dora"}


# One idea, one small file


@pytest.mark.parametrize("file", sorted(METHODS.glob("*/*.py")), ids=relative)
def test_a_method_is_a_small_file(file):
    lines = file.read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST_METHOD, f"{lines} lines: what is shared belongs below methods/, what is another idea in another file"


def blocks(source: str) -> set[str]:
    """Logic as it could be copied: bodies of functions that are more than one call, and two statements after each other."""
    found = set()
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        body = [n for n in function.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        groups = [body, *(body[k : k + 2] for k in range(len(body) - 1))]
        found |= {text for group in groups if (text := "\n".join(map(ast.unparse, group))) and size(group) > 15}
    return found


def size(nodes: list[ast.stmt]) -> int:
    return sum(1 for node in nodes for _ in ast.walk(node))


def shared_logic(files: dict[str, str]) -> dict[str, list[str]]:
    """Blocks that stand in several of {name: source}, each with the names."""
    holders: dict[str, list[str]] = {}
    for name, source in files.items():
        for block in blocks(source):
            holders.setdefault(block, []).append(name)
    return {block: names for block, names in holders.items() if len(names) > 1}


def test_no_two_methods_share_a_block_of_logic():
    assert shared_logic({relative(f): f.read_text(encoding="utf-8") for f in METHODS.glob("*/*.py")}) == {}


SCALE = "def scale(self):\n    'Of {}.'\n    return 1.0 if self.alpha is None else self.alpha / self.rank**self.power"
PAIR = "def f(self, site):\n    {}\n    out, in_ = site.shape\n    return {{'B': (out, self.rank), 'A': (self.rank, in_)}}"


@pytest.mark.parametrize("source", [SCALE, PAIR])
def test_the_rule_rejects_a_block_that_stands_twice(source):
    assert shared_logic({"a.py": source.format("a"), "b.py": source.format("b")})


def test_the_rule_accepts_a_call_of_the_shared_piece():
    assert shared_logic(dict.fromkeys(("a.py", "b.py"), "def tensors(self, site):\n    return pair(site, self.rank)")) == {}


# One writer of files, which loads no torch


def own_writers(source: str) -> list[str]:
    """Calls by which a file takes another one's place: they belong to `rankfold.atomic`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [text for node in calls if (text := ast.unparse(node.func)) in ("os.replace", "os.rename", "tempfile.mkstemp")]


def test_one_module_puts_files_in_their_places():
    writers = [relative(f) for f in sources(PACKAGE) if own_writers(f.read_text(encoding="utf-8"))]
    assert writers == ["src/rankfold/atomic.py"]
    code = "import sys, rankfold.atomic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Nothing is unpickled, and no code comes with a model


def unsafe_reads(source: str) -> list[str]:
    """Imports and calls that can run code which a file brings along."""
    hits = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        hits += [f"line {node.lineno}: import of {m}" for m in modules if m.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.Call):
            hits += [f"line {node.lineno}: {reason}" for reason in unsafe_call(node)]
    return hits


UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def unsafe_call(node: ast.Call) -> Iterator[str]:
    function = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}

    def is_exactly(name: str, value: bool) -> bool:
        return isinstance(given.get(name), ast.Constant) and given[name].value is value

    if function == "torch.load" and not is_exactly("weights_only", True):
        yield "torch.load without weights_only=True"
    if function.endswith(("read_pickle", "unsafe_load")):
        yield function
    if function == "yaml.load":
        yield "yaml.load: use yaml.safe_load"
    for flag in ("allow_pickle", "trust_remote_code"):
        if flag in given and not is_exactly(flag, False):
            yield f"{flag} is not False"


@pytest.mark.parametrize("file", sources(ROOT / "src", ROOT / "benchmarks"), ids=relative)
def test_nothing_is_unpickled(file):
    assert unsafe_reads(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trust)",
    ],
)
def test_the_rule_rejects_an_unsafe_read(source):
    assert unsafe_reads(source)


@pytest.mark.parametrize(
    "source", ["torch.load(p, weights_only=True)", "f(trust_remote_code=False)", "np.load(p)", "import json"]
)
def test_the_rule_accepts_a_safe_read(source):
    assert unsafe_reads(source) == []


# The checkout is of no machine

MACHINE_PATH = re.compile(r"(?<![\w.~/:-])/(?:home|root|Users|work|tmp|opt|mnt|srv)/|\b[A-Z]:\\\\?Users\b")
INDEX_HOST = re.compile(
    r"\b(?:(?:test\.)?pypi\.org|pythonhosted\.org|download\.pytorch\.org|(?:conda\.)?anaconda\.org|ghcr\.io)\b"
)


def foreign_places(text: str) -> list[str]:
    """Absolute paths of one machine, and addresses of package indexes."""
    return [
        f"line {number}: {match[0]}"
        for number, line in enumerate(text.splitlines(), start=1)
        for pattern in (MACHINE_PATH, INDEX_HOST)
        for match in pattern.finditer(line)
    ]


@pytest.mark.parametrize("file", text_files(), ids=relative)
def test_a_file_is_of_no_machine(file):
    assert foreign_places(file.read_text(encoding="utf-8", errors="replace")) == []


@pytest.mark.parametrize(
    "parts",
    [("'/home", "/me/x'"), ("open('/tmp", "/x')"), ("cd /root", "/x"), (r"C:\Use", r"rs\me"), ("https://pypi", ".org/simple")],
    ids=lambda parts: "".join(parts),
)
def test_the_rule_rejects_a_place_of_one_machine(parts):
    assert foreign_places("".join(parts))  # written in two parts, so that this file obeys the rule itself


@pytest.mark.parametrize("text", ["docs/work/x", "../tmp/x", "https://site.example/home/x", "/usr/bin/env bash", "./opt/x"])
def test_the_rule_accepts_other_paths(text):
    assert foreign_places(text) == []


# Public names


def public_names(file: Path) -> list[str]:
    """The names in a module's `__all__`, read without importing it."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return [c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    return []


@pytest.mark.parametrize("file", [file for file in sources(PACKAGE) if public_names(file)], ids=relative)
def test_every_public_name_exists(file):
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rankfold"):
            raise
        pytest.skip(f"needs {error.name}")
    except MissingExtra as error:
        pytest.skip(str(error))
    missing = [name for name in public_names(file) if not hasattr(module, name)]
    assert missing == []
    assert len(set(public_names(file))) == len(public_names(file)), "a name stands twice in __all__"
