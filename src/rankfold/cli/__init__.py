"""The command line: one file per command, and a command's name is the name of its job. Listing and helping import no torch."""

from .entry import main

__all__ = ["main"]
