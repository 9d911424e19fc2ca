"""Options: one dataclass field each, from which jsonargparse derives command line, configuration file and help."""

import argparse
import ast
import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    restricted_number_type,
)

from . import InputError

KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
METAVARS = {int: "N", float: "X", str: "NAME"}
LIMITED: dict[tuple[type, float | None, float | None], Any] = {  # (kind, least, most)
    (int, 0, None): NonNegativeInt,
    (int, 1, None): PositiveInt,
    (int, 2, None): restricted_number_type(None, int, (">=", 2)),
    (float, 0, None): NonNegativeFloat,
    (float, 0, 1): ClosedUnitInterval,
}


class BadValueError(argparse.ArgumentTypeError, ValueError):
    """A value that an option cannot have. argparse shows the message of the one class, jsonargparse of the other."""


def option(
    text: str,
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    flag: str | None = None,
    metavar: str | None = None,
    shown: str | None = None,
    least: float | None = None,
    most: float | None = None,
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """Return a dataclass field that is an option.

    Args:
        text: the quantity and its unit, for the help.
        default, factory: as in dataclasses.field.
        flag: name on the command line, if it is not the field's; the option may then be repeated.
        metavar: name of the value in the help.
        shown: description of the default, if the value alone does not say it.
        least, most: limits of a number.
        read: function that turns the text of the command line, or the value of a file, into the field's value.
    """
    rules = {"text": text, "flag": flag, "metavar": metavar, "shown": shown, "least": least, "most": most, "read": read}
    given: dict[str, Any] = {"default": default} if factory is None else {"default_factory": factory}
    return field(**given, metadata=rules)


def names(value: Any) -> tuple[str, ...] | None:
    """Return a tuple of names from a list or a text with commas."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)):
        raise BadValueError(f"needs names, got {value!r}")
    return None if value is None else tuple(value)


def mapping(value: Any) -> dict[str, Any]:
    """Return a dictionary from a mapping, a text KEY=VALUE, or a list of these."""
    found: dict[str, Any] = {}
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str):
            key, equals, text = part.partition("=")
            part = {key: literal(text)} if equals and key.isidentifier() else None
        if not isinstance(part, Mapping):
            raise BadValueError(f"needs KEY=VALUE, got {value!r}")
        found |= {key: tuples(own) for key, own in part.items()}
    return found


def literal(text: str) -> Any:
    """Return the Python value of a text, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def tuples(value: Any) -> Any:
    """Return the value with its lists, which files have in place of tuples, as tuples."""
    if isinstance(value, list | tuple):
        return tuple(tuples(x) for x in value)
    return {key: tuples(x) for key, x in value.items()} if isinstance(value, Mapping) else value


def near(name: str, known: Sequence[str]) -> str:
    """Return a text that names the most similar known names, if any are similar."""
    found = difflib.get_close_matches(name, known, n=3)
    return f"; near it: {', '.join(found)}" if found else ""


class Parser(ArgumentParser):
    """A parser whose errors are InputErrors of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.needs: dict[str, tuple[str, bool]] = {}  # what the value of each option has to be, and if it may be null
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            name = unknown[1].partition("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            raise InputError(f"{name}: there is no such option{near(name, flags)}") from ex
        if unknown := re.match(r"Option '(.+)' is not accepted", message):
            known = [action.dest for action in self._actions]
            raise InputError(f"{unknown[1]}: there is no such option{near(unknown[1], known)}") from ex
        if wrong := re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
            action = next(action for action in self._actions if action.dest == wrong[1])
            value = re.search(r"Given value: (.*)", wrong[2], re.DOTALL)
            text = f"needs {self.needs[wrong[1]][0]}, got {value[1]}" if value else wrong[2]
            message = f"argument {action.option_strings[0]}: {text}"
        if chosen := re.match(r"argument \w+: invalid choice: '(.+?)' \(choose from (.*)\)", message):
            raise InputError(f"there is no command {chosen[1]!r}; the commands are {chosen[2]}") from ex
        raise InputError(" ".join(message.removeprefix("argument ").split())) from ex


class _Repeated(argparse.Action):
    """An option that may be repeated: mappings are joined, and so are tuples."""

    def __call__(self, _: Any, namespace: Any, value: Any, flag: str | None = None) -> None:
        before = namespace.get(self.dest)
        joined = value if before is None else before | value if isinstance(value, dict) else before + value
        setattr(namespace, self.dest, joined)


def add_options(parser: Parser, *groups: type, shown: Callable[[str], str | None] = lambda _: None) -> None:
    """Add the fields of each dataclass, in a group named after it; `shown` describes the default of a field."""
    for group in groups:
        own = parser.add_argument_group(group.__name__.lower())
        hints = get_type_hints(group)
        for item in dataclasses.fields(group):
            if item.metadata:
                described = item.metadata["shown"] or shown(item.name)
                parser.needs[item.name] = _add(own, item, hints[item.name], described)


def _add(group: Any, item: dataclasses.Field, hint: Any, shown: str | None) -> tuple[str, bool]:
    """Add a field and return what its value has to be, and whether it may be null."""
    rules = item.metadata
    kind, optional = kind_of(hint)
    flag = "--" + (rules["flag"] or item.name).replace("_", "-")
    text = f"{rules['text']} [{shown}]" if shown else rules["text"]
    arguments: dict[str, Any] = {"dest": item.name, "help": text.replace("%", "%%")}
    needs = KINDS.get(kind, "")
    if kind is bool:
        arguments |= {"action": argparse.BooleanOptionalAction, "type": _flag}
    elif rules["read"]:
        arguments |= {"type": rules["read"], "metavar": rules["metavar"]}
        arguments |= {"action": _Repeated} if rules["flag"] else {}
    elif get_origin(kind) is Literal:
        needs = f"one of {', '.join(get_args(kind))}"
        arguments |= {"type": kind | None}
    else:
        limited = LIMITED.get((kind, rules["least"], rules["most"]), kind)
        limits = (f"{word} {rules[word]:g}" for word in ("least", "most") if rules[word] is not None)
        needs = " ".join([needs, " and ".join(f"at {limit}" for limit in limits)]).strip()
        arguments |= {"type": Union[limited, None], "metavar": rules["metavar"] or METAVARS[kind]}  # noqa: UP007
    group.add_argument(flag, **arguments)
    return needs, optional


def kind_of(hint: Any) -> tuple[Any, bool]:
    """Return the type that a value has if it is not None, and whether it may be None."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return (kinds[0], True) if len(kinds) < len(get_args(hint)) else (hint, False)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadValueError(f"needs {KINDS[bool]}, got {value!r}")
    return value


def values_of(namespace: Namespace) -> dict[str, Any]:
    """Return the values of parsed options; numbers are Python's own in place of the parser's limited ones."""
    limited = {kind: tuple(own for own in LIMITED.values() if issubclass(own, kind)) for kind in (int, float)}
    return {
        name: next((kind(value) for kind, own in limited.items() if isinstance(value, own)), value)
        for name, value in vars(namespace).items()
    }


def read_file(path: str, *groups: type) -> dict[str, Any]:
    """Return the options of a YAML file, by their fields' names.

    Raises:
        InputError: the file cannot be read, has an unknown option, or a value that an option cannot have.
    """
    parser = Parser()
    add_options(parser, *groups)
    try:
        if not Path(path).is_file():
            raise InputError("is not a file")
        values = values_of(parser.parse_path(path, defaults=False))
        for name, value in values.items():
            if value is None and not parser.needs[name][1]:
                raise InputError(f"--{name.replace('_', '-')}: needs {parser.needs[name][0]}, got null")
    except InputError as error:
        raise InputError(f"--config: {path}: {error}") from error
    return values


def write_file(path: Path, values: Mapping[str, Any]) -> None:
    """Write options as a YAML file that read_file reads."""
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
