"""Options in a file, under the names of the flags; those on the command line have precedence."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tp_cosep.cli.arguments import contradiction
from tp_cosep.errors import InputError, MissingDependencyError

__all__ = ["parse", "words_of"]

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, with the options of its ``--config`` file before its own.

    Args:
        parser: The parser of all commands.
        argv: The words of the command line.

    Returns:
        The options. Wrong usage raises ``SystemExit``.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    path = early.parse_known_args(argv)[0].config
    commands = _commands(parser)
    command = commands.get(argv[0]) if argv else None
    if command is None:
        return parser.parse_args(argv)
    try:
        words = [] if path is None else words_of(path, command, commands["prune"])
    except (InputError, MissingDependencyError, OSError) as error:
        command.error(str(error))
    options = parser.parse_args([argv[0], *words, *argv[1:]])
    if wrong := contradiction(options, command):
        command.error(wrong)
    return options


def words_of(path: Path, command: argparse.ArgumentParser, other: argparse.ArgumentParser) -> list[str]:
    """The options of a file as words of a command line.

    Args:
        path: A TOML or YAML file.
        command: The parser of the command.
        other: The parser of another command that may read the same file; options that it alone has are left out.

    Returns:
        The words, such as ``["--epochs=3"]``.

    Raises:
        InputError: If the file is not TOML or YAML, has an unknown option, or a value of another kind.
    """
    actions, elsewhere = _actions(command), _actions(other)
    words: list[str] = []
    for key, value in _read(path).items():
        name = str(key).replace("_", "-")
        if name in actions:
            words += _words(path, actions[name], value)
        elif name not in elsewhere:
            nearest = difflib.get_close_matches(str(key), {**actions, **elsewhere}, 1, 0)
            raise InputError(f"config {str(path)!r}: unknown option {key!r}; did you mean {nearest[0]!r}?")
    return words


def _actions(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {a.option_strings[0][2:]: a for a in command._actions if a.option_strings and a.dest not in _NOT_IN_FILES}


_NOT_IN_FILES = ("help", "config", "debug", "dry_run", "restart")


def _read(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "config: YAML requires PyYAML; pip install 'tp_cosep[cli]', or use TOML."
            ) from error
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"config {str(path)!r}: expected YAML, got {error}") from error
    elif path.suffix == ".toml":
        try:
            found = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"config {str(path)!r}: expected TOML, got {error}") from error
    else:
        raise InputError(f"config {str(path)!r}: expected a file that ends in .toml, .yaml or .yml.")
    if found is not None and not isinstance(found, dict):
        raise InputError(f"config {str(path)!r}: expected options by name, got a {type(found).__name__}.")
    return found or {}


def _words(path: Path, action: argparse.Action, value: Any) -> Iterable[str]:
    flag = action.option_strings[0]
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise InputError(f"config {str(path)!r}: expected true or false for {flag[2:]!r}, got {value!r}.")
        return [action.option_strings[0 if value else -1]] if value or len(action.option_strings) > 1 else []
    value = _as_written(action, value)
    if isinstance(value, dict):
        value = [f"{name}={x}" for name, x in value.items()]
        if action.nargs != "+" and len(value) == 1:
            value = value[0]
    parts = value if isinstance(value, list) else [value]
    has_bool = any(isinstance(part, bool) for part in parts)
    if isinstance(value, list) == (action.nargs == "+") and not has_bool and value is not None:
        return [flag, *map(str, parts)] if isinstance(value, list) else [f"{flag}={value}"]
    expected = "a list" if action.nargs == "+" else "a single value"
    hint = "; if it is meant as text, put it in quotes" if has_bool else ""
    raise InputError(f"config {str(path)!r}: expected {expected} for {flag[2:]!r}, got {value!r}{hint}.")


def _as_written(action: argparse.Action, value: Any) -> Any:
    """YAML parses off, no, on and yes as booleans; return the one among an option's choices."""
    if not isinstance(value, bool):
        return value
    meant = ("on", "yes") if value else ("off", "no")
    return next((choice for choice in action.choices or () if choice in meant), value)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(dict(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction))
