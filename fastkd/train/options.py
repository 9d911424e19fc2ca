"""Options: a dataclass field with its help, limits and reader; parser.py makes command line and files of them."""

import argparse
import ast
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field
from types import NoneType
from typing import Any, get_args


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


def key_values(text: str, flag: str) -> Any:
    """Return an option whose KEY=VALUE pairs become a dictionary."""
    return option(text, factory=dict, flag=flag, metavar="KEY=VALUE", read=mapping)


def names(value: Any) -> tuple[str, ...] | None:
    """Return a tuple of names from a list or a text with commas."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)):
        raise BadValueError(f"needs names, got {value!r}")
    return None if value is None else tuple(value)


Size = int | tuple[int, int]  # side of square images, or (height, width), in pixels


def as_size(value: Any) -> Size:
    """Return the size of images from a number, a text HEIGHTxWIDTH or a pair."""
    parts = (
        value.lower().split("x") if isinstance(value, str) else value if isinstance(value, tuple | list) else [value]
    )
    if not 1 <= len(parts) <= 2 or not all(str(x).isdecimal() and int(x) > 0 for x in parts):
        raise BadValueError(f"needs a whole number at least 1, or HEIGHTxWIDTH, got {value!r}")
    height, width = int(parts[0]), int(parts[-1])
    return height if height == width else (height, width)


def read_size(value: Any) -> Size | None:
    return None if value is None else as_size(value)


def sides(img_size: Size) -> tuple[int, int]:
    """(height, width)"""
    return (img_size, img_size) if isinstance(img_size, int) else img_size


def pixels(img_size: Size) -> str:
    return "x".join(map(str, img_size)) if isinstance(img_size, tuple) else str(img_size)


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
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def tuples(value: Any) -> Any:
    """Return the value with its lists, which files have in place of tuples, as tuples."""
    if isinstance(value, list | tuple):
        return tuple(tuples(x) for x in value)
    return {key: tuples(x) for key, x in value.items()} if isinstance(value, Mapping) else value


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return YAML, with quotes around texts such as 1e3, which jsonargparse would read as numbers."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    number = re.compile(r"[-+]?[\d.]+[eE][-+]?\d+$")
    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def near(name: str, known: Sequence[str]) -> str:
    """Return a text that names the most similar known names, if any are similar."""
    found = difflib.get_close_matches(name, known, n=3)
    return f"; near it: {', '.join(found)}" if found else ""


def kind_of(hint: Any) -> tuple[Any, bool]:
    """Return the type that a value has if it is not None, and whether it may be None."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return (kinds[0], True) if len(kinds) < len(get_args(hint)) else (hint, False)
