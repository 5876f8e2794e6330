"""Parse the command line, call a verb, and turn whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, MissingArgumentError

from gtqlora.cli import bitdelta, building, checking, judging, planning, verbs
from gtqlora.cli.console import Silence, flushed, open_console, quieten, say_error, show_anything, trouble
from gtqlora.errors import ConfigError, GtqloraError, RunError
from gtqlora.ranks import agree, end_process, joined, speaker, started

_HELP = """Find where a behaviour lives in a Mixture-of-Experts model, edit it with GT-QLoRA, prove that nothing else
broke, and ship the weights.

MODEL is a local folder in hub layout, a hub id, or `organism:NAME` for an embedded toy model (routed, residual,
expert-only, redundant, null, routed-qwen3). `--contrast organism` and `--config organism` are the organisms' own pairs
and settings.

The tool turns one way: models come to refuse less of what is harmless and never less of what is harmful. Weights leave
only after `verify` certified the safety floor."""
_BY_RANKS = ("diagnose", "train", "verify")
"""Commands that several processes can run together."""
_READER_LEFT = 141  # as a shell says of a process that SIGPIPE ended
_STOPPED = 130  # as a shell says of a process that Ctrl-C ended


def _app() -> App:
    app = App(
        name="gtqlora",
        help=_HELP,
        version_flags=["--version"],
        help_format="markdown",
        suppress_keyboard_interrupt=False,  # `_run` says what stays
    )
    contrast = App(name="contrast", help="Work with contrast sets (preference pairs in three kinds).")
    app.command(verbs.inspect)
    app.command(planning.plan)
    app.command(contrast)
    contrast.command(building.build)
    contrast.command(checking.check)
    for verb in (verbs.diagnose, verbs.train, verbs.project, verbs.verify, verbs.export, verbs.report, verbs.demo):
        app.command(verb)
    app.command(judging.judge)
    app.command(bitdelta.app)
    return app


app = _app()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; whatever a user can mend is one line on standard error."""
    quieten()
    show_anything()
    try:
        code = _run(arguments)
    finally:
        failed = flushed()
    if failed is not None:
        say_error(trouble(failed, "standard output"))
        code = GtqloraError.exit_code
    if arguments is None:  # called as the process that it is
        end_process(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    # The order of these branches matters: BrokenPipeError is an OSError, and must not be told as trouble.
    try:
        if odd := [argument for argument in arguments or () if "\0" in argument]:
            raise RunError(f"{odd[0]!a}: holds a NUL byte, which no name may; choose another")
        return int(_called(arguments) or 0) if not started() else _called_by_ranks(arguments)
    except GtqloraError as error:
        say_error(str(error))
        return error.exit_code
    except BrokenPipeError:  # standard output's reader has what it wanted
        return _READER_LEFT
    except (OSError, UnicodeEncodeError) as error:  # a full disk, a name that no library takes: the user's to mend
        say_error(trouble(error, "input or output" if flushed() is None else "standard output"))
        return GtqloraError.exit_code
    except KeyboardInterrupt:
        open_console(stderr=True).print("stopped; finished artefacts stay, run the same command to go on")
        return _STOPPED


def _called_by_ranks(arguments: Sequence[str] | None) -> int:
    """Call the verb together with the other ranks; the leader alone is heard, and one of them where it goes wrong.

    Raises:
        ConfigError: the command is for one process.
    """
    silence = Silence()

    def speak(text: str) -> None:
        silence.end()
        say_error(text)
        silence.begin()  # the main thread may come so far, too, until the process has ended

    try:
        with joined(speak) as me:
            if not me.leads:
                silence.begin()
            _check_command(sys.argv[1:] if arguments is None else list(arguments))
            return int(_called(arguments) or 0)
    except BaseException as error:
        rank = speaker()
        if rank is None:
            silence.begin()
        elif rank:
            silence.end()
            open_console(stderr=True).print(f"rank {rank}:", end=" ", highlight=False)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # before the words are lost
            raise RunError(trouble(error, "input or output")) from error
        raise


def _check_command(given: list[str]) -> None:
    """Check that ranks can run this command, and all have the same; what its settings are is compared later.

    Raises:
        ConfigError: they cannot.
        RankError: one of them has another.
    """
    if not given or given[0] not in _BY_RANKS:
        raise ConfigError(f"only {', '.join(_BY_RANKS)} can be run by several processes; start it without torchrun")
    agree({"command": given[0]})
    agree({"options": " ".join(sorted({word.partition("=")[0] for word in given if word.startswith("--")}))})


def _called(arguments: Sequence[str] | None) -> int | None:
    """Parse the arguments and call the verb.

    Raises:
        ConfigError: the parser does not understand them.
    """
    # the parser's own way of telling is a panel of several lines
    try:
        return app(arguments, result_action="return_value", exit_on_error=False, print_error=False)
    except CycloptsError as error:
        verb = " ".join(("gtqlora", *(error.command_chain or ())))
        raise ConfigError(f"{_missing(error) or ' '.join(str(error).split())} See {verb} --help") from error


def _missing(error: CycloptsError) -> str:
    """Return the sentence that names what was left out, as it is typed; nothing if something else is wrong."""
    if not isinstance(error, MissingArgumentError) or error.argument is None or error.argument.tokens:
        return ""
    if error.keyword is not None:  # it was named, and only its value is missing
        return ""
    name = error.argument.name
    return f"{name.lstrip('-').upper() if error.argument.field_info.is_positional else name} is missing."
