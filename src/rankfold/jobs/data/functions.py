"""Pairs of a sentence and a function: what a docstring says, and the code that does it."""

import ast
import re
import warnings
from collections.abc import Iterator

__all__ = ["first_sentence", "functions_with_docstrings", "nameless_code", "parse_quietly"]

_NEUTRAL = "function"


def parse_quietly(source: bytes) -> ast.Module | None:
    """The syntax tree, or None for a file that this Python cannot parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a library's own invalid escapes are not the user's concern
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def functions_with_docstrings(tree: ast.AST) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Every function and method with its docstring, in the order of the source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            yield node, text


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line.

    >>> first_sentence("Return the sum,\\n    e.g. of two.  Raises nothing.\\n\\n    More.")
    'Return the sum, e.g. of two.'
    """
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s)", paragraph)
    return paragraph[: end.end()] if end else paragraph


def nameless_code(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, int]:
    """(code, statements) of a function without its docstring, comments and decorators, its name now `function`.

    The name is replaced wherever it stands as a word, in recursive calls and in strings too.

    >>> tree = ast.parse('def total(xs):\\n    "Add up."\\n    return xs[0] + total(xs[1:]) if xs else 0')
    >>> nameless_code(tree.body[0])
    ('def function(xs):\\n    return xs[0] + function(xs[1:]) if xs else 0', 1)
    """
    body = node.body[1:] or [ast.Pass()]
    bare = type(node)(
        name=node.name, args=node.args, body=body, decorator_list=[], returns=node.returns, lineno=node.lineno, col_offset=0
    )
    bare.type_params = getattr(node, "type_params", [])  # type: ignore[union-attr]  # a field since Python 3.12
    code = re.sub(rf"\b{re.escape(node.name)}\b", _NEUTRAL, ast.unparse(bare))
    return code, sum(isinstance(part, ast.stmt) for statement in node.body[1:] for part in ast.walk(statement))
