"""The reference of the command line, from the commands themselves: `python docs/tools/commands.py` writes the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from probekit.cli.app import app

PAGE = Path(__file__).parent.parent / "reference" / "cli.md"

HEAD = """\
# Commands

This page is made from the commands themselves by `python docs/tools/commands.py`; `probekit COMMAND --help` says the
same.

With `--json` a command prints one [JSON document](json.md) on standard output, and everything else on standard error.
Progress is shown on a terminal only. The exit status is 0 when the work is done, 2 for wrong use or bad input (one
line says what was given, what was expected and what to do), 1 for anything else; `validate` ends with 1 when a
difference is no near-tie, `verify` when something is not as it was written. After Ctrl-C it is 130, after SIGTERM 143,
after SIGHUP 129: one line says what is kept, and the command that goes on; a second signal ends it
at once, without a word. `-v` shows the traceback of an error.

`study` takes its options from a TOML file, too (`--config study.toml`, with their long names as keys); the command line
comes before it, and `--print-config` prints what holds.

Layers and lengths are written as `2,4,8`, `1-8` or a mixture; files of prompts are described under [Choose an exit
layer](../how-to/choose-an-exit.md#prompts).

## Options that every command takes

"""

TABLE = ("| argument or option | what | default |", "|---|---|---|")


def page() -> str:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    common = set.intersection(*({each.name for each in command.params} for command in commands.values()))
    shared = [row(each) for each in commands["models"].params if each.name in common]
    sections = (section(name, command, common) for name, command in commands.items())
    return HEAD + "\n".join([*TABLE, *shared, "", *(line for lines in sections for line in lines)])


def section(name: str, command: Any, common: set[str]) -> Iterator[str]:
    own = [each for each in command.params if each.name not in common]
    arguments = [each for each in own if not is_option(each)]
    needed = [f"{each.opts[-1]} {value_of(each)}" for each in own if is_option(each) and each.required]
    yield f"## probekit {name}"
    yield ""
    yield " ".join(command.help.split())
    yield ""
    yield "```"
    yield " ".join(["probekit", name, *map(argument_of, arguments), *needed, "[OPTIONS]"])
    yield "```"
    yield ""
    if own:
        yield from TABLE
        yield from map(row, own)
        yield ""


def row(parameter: Any) -> str:
    spelled = argument_of(parameter)
    if is_option(parameter):
        names = ", ".join(sorted(parameter.opts, key=len, reverse=True))
        spelled = f"{names} {value_of(parameter)}".strip() + "".join(f"`, `{each}" for each in parameter.secondary_opts)
    what, default = help_of(parameter)
    return f"| `{spelled}` | {what} | {default} |"


def is_option(parameter: Any) -> bool:
    return parameter.opts[0].startswith("-")


def argument_of(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    if is_option(parameter) or parameter.nargs == 1:
        return name
    return f"{name} ..." if parameter.required else f"[{name} ...]"


def value_of(parameter: Any) -> str:
    """What follows the option; nothing for a switch."""
    if parameter.is_flag:
        return ""
    kind = parameter.type_descriptor.annotation
    words = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
    return parameter.metavar or next((word for known, word in words.items() if known.__name__ in str(kind)), "TEXT")


def help_of(parameter: Any) -> tuple[str, str]:
    """What it is, and its default: some are written at the end of the help, in brackets."""
    what, _, stated = (parameter.help or "").partition("[default: ")
    if stated:
        default = stated.rstrip("]")
    elif parameter.required:
        default = "required"
    elif parameter.default is None or parameter.default is False:
        default = ""
    else:
        default = f"`{parameter.default}`"
    return what.strip().replace("|", "\\|"), default


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
