"""The commands, and what becomes of an error: one clear line, and the exit status."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

import probekit
from probekit.cli import commands, options
from probekit.cli.signals import Stopped, undisguised
from probekit.cli.terminal import err, out, print_json, warnings_as_notices
from probekit.errors import ProbekitError, Remark
from probekit.ranks import ElsewhereError, Ranks

app = typer.Typer(
    name="probekit",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _with_debug(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with one more option, which is nobody's business but this file's."""

    @wraps(command)
    def without(*, debug: bool = False, **given: Any) -> None:
        if commands.name_of(command) not in DESCRIBES:
            options.check_place(given.get("device"), given.get("dtype"))
        command(**given)

    return _with_option(without, command, "debug", options.Debug, False)


def _with_cache(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with `--cache`, which holds for every model that it loads."""

    @wraps(command)
    def cached(*, cache: str | None = None, **given: Any) -> None:
        if cache is None:
            return command(**given)
        from probekit.models.gguf_copies import caching

        with caching(False if cache == "none" else cache):
            command(**given)

    return _with_option(cached, command, "cache", options.Cache, None)


def _with_device_map(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with `--device-map`, which holds for every model that it loads."""

    @wraps(command)
    def dealt(*, device_map: str | None = None, **given: Any) -> None:
        if device_map is None:
            return command(**given)
        from probekit.models.device_map import dealing_out

        with dealing_out(device_map):
            command(**given)

    return _with_option(dealt, command, "device_map", options.DeviceMap, None)


def _with_tensor_parallel(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with `--tensor-parallel`, which holds for every model that it loads."""

    @wraps(command)
    def split(*, tensor_parallel: bool = False, **given: Any) -> None:
        if not tensor_parallel:
            return command(**given)
        from probekit.models.device_map import splitting
        from probekit.ranks import connected

        with splitting(), connected():
            command(**given)

    return _with_option(split, command, "tensor_parallel", options.TensorParallel, False)


def _with_option(
    wrapped: Callable[..., None], command: Callable[..., None], name: str, annotation: Any, default: Any
) -> Callable[..., None]:
    """`wrapped` shows typer the options of `command`, and this one."""
    shown = signature(command, eval_str=True)
    option = Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    wrapped.__signature__ = shown.replace(parameters=[*shown.parameters.values(), option])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {name: each.annotation for name, each in wrapped.__signature__.parameters.items()}  # type: ignore[attr-defined]
    return wrapped


DESCRIBES = {"choose", "rank", "export"}  # these take devices that are not at hand, by their names
LOADING = {"inspect", "lens", "trace", "decode", "choose", "validate", "fit-heads", "study"}  # these load models
SHARED = {"trace", "validate", "rank"}  # these share their work among the processes of a job
SPLIT = {"trace", "decode", "validate"}  # these run a model that is split over them
for command in commands.ALL:
    name = commands.name_of(command)
    command = _with_tensor_parallel(command) if name in SPLIT else command
    app.command(name=name)(_with_debug(_with_cache(_with_device_map(command)) if name in LOADING else command))


def _version(asked: bool) -> None:
    if asked:
        out.print(f"probekit {probekit.__version__}", markup=False)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _probekit(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """From which layer should this model draft, how many tokens, and what will it gain?"""
    if context.invoked_subcommand is None:
        out.print(context.get_help(), markup=False, soft_wrap=True)


@dataclass(frozen=True)
class CommandLine:
    """What is known of the command line that runs: for the line that an error becomes."""

    words: list[str]

    @property
    def command(self) -> str:
        return next((word for word in self.words if word in map(commands.name_of, commands.ALL)), "")

    @property
    def as_json(self) -> bool:
        return "--json" in self.words

    @property
    def rank(self) -> int:
        """Which of the processes of a job this is; 0 alone, and where that is not well said."""
        with suppress(ProbekitError):
            return Ranks.of_environment().rank
        return 0

    @property
    def debug(self) -> bool:
        return bool({"--debug", "-v"} & set(self.words))


def run(arguments: Sequence[str]) -> int:
    """The exit status of one command line."""
    line = CommandLine(list(arguments))
    if line.rank and line.command not in SHARED and "--tensor-parallel" not in line.words:
        return 0  # the first of several processes does it alone
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("torchao", "torch.utils._pytree"):  # torchao warns of other devices' kernels when it is imported
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with undisguised(), warnings_as_notices("--quiet" in line.words, Remark):
            status = typer.main.get_command(app).main(args=line.words, prog_name="probekit", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except ElsewhereError as error:
        return error.exit_status
    except ProbekitError as error:
        return _fail(line, error.problem, error.hint, error.exit_status)
    except TyperException as error:
        if line.rank:
            return 2  # the first process says it
        known = f"probekit {line.command}".strip()
        return _fail(line, _message_of(error), f"Try `{known} --help`.", 2)
    except Stopped as stop:
        if line.rank:
            return stop.exit_status
        return _fail(line, f"{stop.said}. {stop.kept or 'Nothing was kept.'}", _go_on(line, stop), stop.exit_status)
    except (KeyboardInterrupt, typer.Abort):  # called from Python, where `main` turns no signal into Stopped
        return _fail(line, "interrupted.", "", 130)
    except OSError as error:
        if error.errno == errno.EPIPE:
            return _lost_output()
        return _fail(line, _of_the_system(error), "", 1)
    except MemoryError as error:
        said = f"the memory does not suffice: {error}".removesuffix(": ").rstrip(".")
        return _fail(line, f"{said}.", "Ask for less at once: fewer prompts, layers, draft lengths or rows.", 1)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return _fail(line, f"this is a fault of probekit's own, {said}.", "Please report what --debug shows.", 1)


def _go_on(line: CommandLine, stop: Stopped) -> str:
    added = [word for word in stop.again if word not in line.words]
    return f"{'Go on' if stop.kept else 'Begin again'} with: {shlex.join(['probekit', *line.words, *added])}"


def _message_of(error: TyperException) -> str:
    message = getattr(error, "format_message", lambda: str(error))()
    return " ".join(message.split())


def _of_the_system(error: OSError) -> str:
    """The disk is full, a file cannot be written: in the system's words, with the file that it is about."""
    said = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {said}." if error.filename else f"{said}."


def _lost_output() -> int:
    """Whoever read our output is gone (`| head`), or its disk is full: nothing more can be said there."""
    with suppress(OSError, ValueError):  # or the interpreter flushes into it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _fail(line: CommandLine, problem: str, hint: str, status: int) -> int:
    if line.debug:
        err.print(traceback.format_exc(), markup=False, highlight=False, soft_wrap=True)
    if line.as_json and not line.rank:
        try:
            print_json({"schema": f"probekit/{line.command or 'probekit'}/1", "error": problem, "hint": hint})
            return status
        except OSError:  # standard output is what failed: the other one is left
            pass
    said = " ".join(f"{f'probekit {line.command}'.strip()}: {problem} {hint}".split())  # others' words may have lines
    with suppress(OSError):
        err.print(said, markup=False, soft_wrap=True)
    try:
        sys.stdout.flush()
    except OSError:
        _lost_output()
    return status
