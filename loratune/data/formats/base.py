"""Types that formats return, and the error for a row that can't be read."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.errors import shorten


class RowError(Exception):
    """A row that can't be read: the field concerned and what was expected."""

    def __init__(self, field: str, message: str):
        super().__init__(f"`{field}` {message}" if field else message)


class Alike(RowError):
    """A row whose answers, which would be compared, are the same."""


@dataclass(frozen=True)
class Conversation:
    """Messages for the model's own chat template.

    Attributes:
        messages: as passed to the template: `role`, `content` and other keys of the row.
        trained: one flag per message; True if the message is trained.
        tools: JSON schemas of the functions the assistant may call, or None.
        whole: every token is trained, of any role.
    """

    messages: tuple[dict[str, Any], ...]
    trained: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    whole: bool = False


@dataclass(frozen=True)
class Plain:
    """Text that is tokenized as it is.

    Attributes:
        segments: (text, trained) in order.
        divisible: whether the text may be cut into several rows without losing its meaning.
        closed: whether an end-of-text token follows.
    """

    segments: tuple[tuple[str, bool], ...]
    divisible: bool = False
    closed: bool = True


@dataclass(frozen=True)
class Group:
    """Texts of one data row that an objective looks at together, or one text with labels.

    Attributes:
        parts: each with the prompt it follows.
        labels: what the row says besides its texts, as numbers that the objective knows.
        what: word for the parts, for messages.
        scored: whether no token is trained, as the objective looks at the last one.
        classes: names of the row's classes, which become labels once all are known.
    """

    parts: tuple[Conversation | Plain, ...]
    labels: tuple[float, ...] = ()
    what: str = "answers"
    scored: bool = False
    classes: tuple[str, ...] | None = None


Example = Conversation | Plain | Group


@dataclass(frozen=True)
class Unreadable:
    """Replaces a value that can't be read; reading its column is an error with the reason `why`."""

    why: str


_JSON = (int, float, list, dict, type(None))
BAD = ("label", "kto_tag")  # columns that mark an answer as liked or disliked


def has_content(value: Any) -> bool:
    """Return whether a value has content: null, blank text and empty lists and objects have none."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value not in ([], {})


def check_good(row: Mapping[str, Any]) -> None:
    """Check that a row does not mark its answer as bad.

    Raises:
        RowError: when it does.
    """
    for name in BAD:
        value = row.get(name)
        if value is False or (isinstance(value, str) and value.strip().lower() == "false"):
            raise RowError(
                name, "is false: a bad answer, which would be trained on as a good one; learn from both with "
                "`objective: kto`, remove such rows, or skip them with `data.on_bad_row: skip` and a `data.max_lost` "
                "as large as their fraction"
            )  # fmt: skip


def unread(row: Mapping[str, Any], used: Collection[str]) -> list[str]:
    """Return the columns of a row with content that are not among those used."""
    return [name for name, value in row.items() if name not in used and has_content(value)]


def column(row: Mapping[str, Any], name: str, key: str = "") -> Any:
    """Return a column of a row, or raise RowError naming the columns there are, and the recipe's key for its name."""
    if name not in row:
        there = ", ".join(f"`{shorten(key)}`" for key in list(row)[:8]) or "none"
        hint = f"; `{key}` names another" if key else ""
        raise RowError(name, f"is missing; the row's columns: {there}{hint}")
    return row[name]


def text_column(row: Mapping[str, Any], name: str) -> str:
    """Return a column that holds text, or raise RowError."""
    value = column(row, name)
    if not isinstance(value, str):
        hint = "" if isinstance(value, _JSON) else ": write that column as text, or name another in `data.format`"
        raise RowError(name, f"must be a string, given {named(value)}{hint}")
    return value


def parsed(text: str, name: str) -> Any:
    """Return the value of JSON text in a field, or raise RowError."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise RowError(name, f"is not JSON ({why_no_json(error)})") from None


class KeyTwice(ValueError):
    """A JSON object with a duplicate key, of which readers silently keep the last."""


def key_twice(pairs: list[tuple[str, Any]]) -> str | None:
    """Return the first duplicate key in the pairs of a JSON object, or None."""
    if len(dict(pairs)) == len(pairs):
        return None
    return next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (key := key_twice(pairs)) is not None:
        raise KeyTwice(f"`{key}` is given twice")
    return dict(pairs)


def why_no_json(error: Exception) -> str:
    """Return a short description of an error of `json.loads`."""
    if isinstance(error, KeyTwice):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deep" if isinstance(error, RecursionError) else "a number with too many digits"


def whole(value: Any) -> Any:
    """Return a number without a fraction as an integer: so does a table hold a column of integers with gaps."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def named(value: Any) -> str:
    """Return the name of a JSON value's type, for a message."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN (not a number)" if math.isnan(value) else "an infinite number"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, Unreadable):
        return f"a value that can't be read ({value.why})"
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)
