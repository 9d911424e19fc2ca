"""The parser that jsonargparse derives from dataclasses of options, for the command line and for YAML files."""

import argparse
import dataclasses
import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    restricted_number_type,
)

from . import InputError
from .options import BadValueError, kind_of, near

KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
METAVARS = {int: "N", float: "X", str: "NAME"}
LIMITED: dict[tuple[type, float | None, float | None], Any] = {  # (kind, least, most)
    (int, 0, None): NonNegativeInt,
    (int, 1, None): PositiveInt,
    (int, 2, None): restricted_number_type(None, int, (">=", 2)),
    (float, 0, None): NonNegativeFloat,
    (float, 0, 1): ClosedUnitInterval,
}


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
            value = re.search(r"(?:Given|Got) value: (.*)", wrong[2], re.DOTALL)  # jsonargparse 4 and 5
            text = f"needs {self.needs[wrong[1]][0]}, got {value[1]}" if value else wrong[2]
            message = f"argument {action.option_strings[0]}: {text}"
        if chosen := re.match(r"argument \w+: invalid choice: '(.+?)' \(choose from (.*)\)", message):
            raise InputError(f"there is no command {chosen[1]!r}; the commands are {chosen[2]}") from ex
        if missing := re.match(r"the following arguments are required: \w+\.(\w+)", message):
            raise InputError(f"needs a {missing[1].replace('source', 'RUN_OR_MODEL')}") from ex
        raise InputError(" ".join(message.removeprefix("argument ").split())) from ex


class _Repeated(argparse.Action):
    """An option that may be repeated: mappings are joined, and so are tuples."""

    def __call__(self, _: Any, namespace: Any, value: Any, flag: str | None = None) -> None:
        before = namespace.get(self.dest)
        joined = value if before is None else before | value if isinstance(value, dict) else before + value
        setattr(namespace, self.dest, joined)


def add_options(
    parser: Parser,
    *groups: type,
    shown: Callable[[str], str | None] = lambda _: None,
    only: Container[str] | None = None,
) -> None:
    """Add the fields of each dataclass, in a group named after it.

    Args:
        shown: describes the default of a field.
        only: names of the fields to add, if not all.
    """
    for group in groups:
        own = parser.add_argument_group(group.__name__.lower())
        hints = get_type_hints(group)
        for item in dataclasses.fields(group):
            if item.metadata and (only is None or item.name in only):
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


def read_file(path: str, *groups: type, only: Container[str] | None = None) -> dict[str, Any]:
    """Return the options of a YAML file, by their fields' names.

    Raises:
        InputError: the file cannot be read, has an unknown option, or a value that an option cannot have.
    """
    parser = Parser()
    add_options(parser, *groups, only=only)
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
