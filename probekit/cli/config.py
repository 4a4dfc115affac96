"""A command's options from a TOML file, and back: `--config`, `--print-config`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import tomli_w
import typer

from probekit.errors import InputError
from probekit.foreign.text import read_bytes

_NOT_SETTINGS = {"config", "print_config", "as_json", "quiet", "debug", "help"}


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """An eager callback: what the file says becomes the default of the command's options.

    Raises InputError for a file that is no TOML, and for a name or a value that the command does not have.
    """
    if path is None or context.resilient_parsing:
        return path
    names = _names(context)
    try:
        document = tomllib.loads(read_bytes(path).decode("utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--config {path} cannot be read as TOML: {error}.") from None
    defaults: dict[str, Any] = {}
    for name, value in document.items():
        parameter = names.get(name.replace("_", "-"))
        if parameter is None:
            raise InputError(f"--config {path} has {name!r}; {context.command.name} has {', '.join(sorted(names))}.")
        defaults[parameter] = _as_given(value, f"--config {path}: {name}")
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def config_text(context: typer.Context) -> str:
    """The settings that this command line has, as TOML that `read_config` takes; those without a value are left out."""
    found = {name: context.params[parameter] for name, parameter in _names(context).items()}
    return tomli_w.dumps({name: _plain(value) for name, value in found.items() if value is not None})


def _names(context: typer.Context) -> dict[str, str]:
    """{name in the file: name of the parameter}: options by their long names, arguments by the parameter's."""
    found = {}
    for parameter in context.command.params:
        if parameter.name is None or parameter.name in _NOT_SETTINGS:
            continue
        long = [each for each in parameter.opts if each.startswith("--")]
        found[long[0][2:] if long else parameter.name] = parameter.name
    return found


def _as_given(value: Any, where: str) -> Any:
    """A value as the command line would give it: lists of layers as text, lists of models as they are."""
    if isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        return ",".join(map(str, value))
    if isinstance(value, dict) or (isinstance(value, list) and not all(isinstance(each, str) for each in value)):
        raise InputError(f"{where} is {value!r}; expected a number, a text, or a list of them.")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, (list, tuple)) else value
