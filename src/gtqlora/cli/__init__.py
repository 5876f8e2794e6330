"""The command line: `gtqlora` and `python -m gtqlora`."""

from gtqlora.cli.app import main

__all__ = ["main"]
