"""The commands, and what becomes of an error: one clear line, and the exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

from probekit.cli import commands
from probekit.cli.terminal import err, print_json
from probekit.errors import ProbekitError

app = typer.Typer(
    name="probekit",
    help="From which layer should this model draft, how many tokens, and what will it gain?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in commands.ALL:
    app.command(name=commands.name_of(command))(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 wrong use or bad input, 1 anything else."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(arguments))


def run(arguments: Sequence[str]) -> int:
    """The exit status of one command line."""
    command = next((word for word in arguments if not word.startswith("-")), "probekit")
    as_json = "--json" in arguments
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        status = typer.main.get_command(app).main(args=list(arguments), prog_name="probekit", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except ProbekitError as error:
        return _fail(command, error.problem, error.hint, error.exit_status, as_json)
    except TyperException as error:
        return _fail(command, _message_of(error), "Try `probekit --help`.", 2, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(command, "interrupted.", "What was written so far is whole; --resume goes on where there is one.",
                     1, as_json)  # fmt: skip
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _message_of(error: TyperException) -> str:
    message = getattr(error, "format_message", lambda: str(error))()
    return " ".join(message.split())


def _fail(command: str, problem: str, hint: str, status: int, as_json: bool) -> int:
    if as_json:
        print_json({"schema": f"probekit/{command}/1", "error": problem, "hint": hint})
    else:
        line = " ".join(f"probekit {command}: {problem} {hint}".split())  # what another library said may have lines
        err.print(line, markup=False, soft_wrap=True)
    return status
