"""What the command line says when something goes wrong, and the code it ends with (docs/how-to/bad-input.md lists them)."""

import difflib

import typer

from rankfold.errors import RankfoldError

__all__ = ["MISTAKE", "STOPPED", "UNEXPECTED", "explain"]

UNEXPECTED, MISTAKE, STOPPED = 1, 2, 130
# typer has carried a copy of click since 0.20 or so; whichever it uses, this is the base of its errors
UsageError = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def explain(error: BaseException) -> tuple[str, int]:
    """The message for the screen ("" for none), and the exit code.

    >>> explain(FileNotFoundError(2, "No such file or directory", "train.csv"))
    ('error: train.csv: no such file or directory', 2)
    >>> explain(ZeroDivisionError("division by zero"))[1]
    1
    """
    if isinstance(error, typer.Exit):
        return "", error.exit_code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return str(error) or "stopped", STOPPED
    if isinstance(error, RankfoldError):
        return f"error: {error}", error.exit_code
    if isinstance(error, UsageError):
        return _usage(error), getattr(error, "exit_code", MISTAKE)
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.filename}: {(error.strerror or str(error)).lower()}", MISTAKE
    name = type(error).__name__
    return (
        f"error: {name}: {error}\n"
        "  rankfold did not expect this: please report it, with the traceback that rankfold --debug COMMAND ... shows"
    ), UNEXPECTED


def _usage(error: BaseException) -> str:
    """A usage error with the nearest option or command, and where help is."""
    context = getattr(error, "ctx", None)
    said = error.format_message()  # type: ignore[attr-defined]
    if type(error).__name__ == "NoArgsIsHelpError":  # the message is the help
        return said
    where = context.command_path if context is not None else "rankfold"
    asked = getattr(error, "option_name", None)
    if asked and context is not None and str(asked).startswith("-"):
        known = [o for p in context.command.params for o in (*p.opts, *p.secondary_opts)]
        close = difflib.get_close_matches(str(asked), known, n=3, cutoff=0.5)
        said = f"{where} has no option {asked}" + (f"; nearest: {', '.join(close)}" if close else "")
    return f"error: {said[0].lower()}{said[1:].rstrip('.')}\n  every option: {where} --help"
