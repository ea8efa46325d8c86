"""From the words of a command line to a job, and from whatever goes wrong to one clean message and an exit code."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold import __version__
from rankfold.core import registry
from rankfold.errors import FileError, RankfoldError

from .adapt import adapt
from .claims import claims
from .demo import demo
from .export import export
from .failures import explain
from .inspect import inspect
from .methods import methods
from .papers import papers
from .predict import predict

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="rankfold",
    help="Low-rank learning for PyTorch: adapt a model to your data, look inside, hand the result on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: brackets mean what they say, and nothing slow is imported for it
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (adapt, predict, demo, methods, papers, inspect, export, claims):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rankfold {__version__}")
        raise typer.Exit


@app.callback()
def _settings(
    plugin: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Python file with methods of your own; may be repeated.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # read by `run`
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    for file in plugin or ():
        try:
            registry.load_file(file)
        except (SyntaxError, ValueError) as error:
            if isinstance(error, RankfoldError):
                raise
            raise FileError(f"--plugin {file}: can't be read as Python with literals in @register: {error}") from error


def run(arguments: Sequence[str]) -> int:
    """Do what a command line says and give the exit code; errors are printed, never raised."""
    debug = "--debug" in arguments
    words = [word for word in arguments if word != "--debug"]  # it may stand anywhere
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _say
            with typer.main.get_command(app).make_context("rankfold", words) as context:
                context.command.invoke(context)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left, as in `rankfold papers | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, code = explain(error)
        if debug and code:
            traceback.print_exception(error)
        if message:
            print(message, file=sys.stderr)
        return code
    return 0


REMARKS = ("torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers that tell, whenever transformers is loaded, which of their kernels this machine lacks."""


def _say(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    """Our own warnings as one line; those that libraries send to programmers are not for the user of a command."""
    if issubclass(category, UserWarning) and "rankfold" in Path(filename).parts:
        print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    """The command `rankfold`."""
    # threads that spin while they wait slow everything eightfold as soon as something else wants the core; read when torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for library in REMARKS:
        logging.getLogger(library).setLevel(logging.ERROR)
    sys.exit(run(sys.argv[1:]))
