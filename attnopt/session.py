"""One command's surroundings: where talk, results and failures go."""

from __future__ import annotations

import contextlib
import json as json_module
import logging
import os
import sys
import tempfile
import traceback
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import typer

from attnopt.errors import AttnoptError
from attnopt.files import json_safe

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnopt.render import TerminalReporter


#: Exit code of a command stopped from the keyboard, as shells have it.
INTERRUPTED = 130


class Result(Protocol):
    """What a verb returns: data for programs, a view for people."""

    @property
    def exit_code(self) -> int: ...

    def to_json(self) -> dict[str, Any]: ...

    def view(self, *, quiet: bool) -> RenderableType: ...


class Session:
    """Use as a context manager around one verb.

    Inside, whatever prints to stdout is sent to stderr, so that stdout carries the result and nothing else.

    Args:
        json: print results as JSON.
        quiet: no progress, short results.
        verbose: also the warnings of the libraries underneath.
        tokens: calibration tokens, for the progress bars.
    """

    def __init__(self, *, json: bool, quiet: bool, verbose: bool, tokens: int = 0) -> None:
        from attnopt.render import TerminalReporter

        # Of several processes that torchrun started, only the first talks.
        self.silent = "MASTER_ADDR" in os.environ and os.environ.get("RANK", "0") != "0"
        self.json = json
        self.quiet = quiet = quiet or self.silent
        self.reporter: TerminalReporter = TerminalReporter(quiet=quiet, tokens=tokens)
        self._stdout = sys.stdout
        self._redirect = contextlib.redirect_stdout(sys.stderr)
        if not verbose:
            # Set before transformers is imported; it and its helpers draw bars and print advice of their own.
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            warnings.simplefilter("ignore")
            logging.getLogger("torch").setLevel(logging.ERROR)

    def __enter__(self) -> Session:
        self._redirect.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reporter.close()
        self._redirect.__exit__(kind, error, trace)

    def show(self, result: Result) -> int:
        """Print a result and return its exit code."""
        self.reporter.close()
        if self.silent:
            return result.exit_code
        if self.json:
            self._stdout.write(json_module.dumps(json_safe(result.to_json()), ensure_ascii=False) + "\n")
        else:
            from attnopt.render import output_console

            output_console(self._stdout).print(result.view(quiet=self.quiet))
        self._stdout.flush()
        return result.exit_code


def report_failure(error: BaseException, *, json: bool, verbose: bool) -> int:
    """Tell a failure on stderr (under --json also as a document on stdout) and return the exit code for it."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        sys.stderr.write("stopped; --resume goes on with a conversion that had finished layers\n")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has gone. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    message, hint, code = _explain(error, verbose)
    sys.stderr.write(f"error: {message}\n" + (f"hint: {hint}\n" if hint else ""))
    if json:
        document = {"schema": "attnopt.error/1", "exit_code": code, "message": message, "hint": hint}
        sys.stdout.write(json_module.dumps(document, ensure_ascii=False) + "\n")
    return code


def _explain(error: BaseException, verbose: bool) -> tuple[str, str, int]:
    if isinstance(error, AttnoptError):
        return error.message, error.hint, 1
    if isinstance(error, typer.TyperException):
        return _explain_usage(error)
    if isinstance(error, MemoryError):
        return "out of memory", "use fewer --calib-tokens, a shorter --context or a larger machine", 1
    trace = "".join(traceback.format_exception(error))
    if verbose:
        sys.stderr.write(trace)
        where = "the traceback is above"
    else:
        with tempfile.NamedTemporaryFile("w", prefix="attnopt-bug-", suffix=".txt", delete=False) as file:
            file.write(trace)
        where = f"the traceback is in {file.name}; please report it with the command you ran"
    first = str(error).strip().splitlines()
    return f"a bug in attnopt: {type(error).__name__}: {first[0] if first else ''}", where, 2


def _explain_usage(error: typer.TyperException) -> tuple[str, str, int]:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
        return "no command given", f"{context.command_path} --help lists them", 1
    message = error.format_message().replace("Value error, ", "")  # how pydantic, below typer, begins
    hint = f"{context.command_path if context else 'attnopt'} --help shows what is possible"
    return message[:1].lower() + message[1:], hint, 1
