"""Preference pairs: a prompt, an answer that was chosen and one that was rejected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from loratune.config.section import as_tuple
from loratune.data.formats.base import (
    Alike,
    Conversation,
    Group,
    Plain,
    RowError,
    column,
    has_content,
    named,
    text_column,
    unread,
)
from loratune.data.formats.chat import (
    ASKS,
    known_tools,
    listed_in,
    lost_keys,
    messages_of,
    role_of,
    text_or_messages,
    tools_of,
    with_system,
)
from loratune.data.formats.section import FormatSection

Turn = tuple[dict[str, Any], bool]  # a message, and whether it may be trained

# columns of the two answers, the most certain first; `messages` are a whole conversation
_ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
    ("response", "rejected_response"),
)
_LISTS = ("messages", "conversations")
_QUESTIONS = ("instruction", "question", "query", "input")  # texts that a user says
_EMPTY = "is empty: there is nothing to compare"


@dataclass(frozen=True)
class _Names:
    """The columns of a row: of the prompt (or None), of more of it (or None), and of the answers."""

    prompt: str | None
    more: str | None
    chosen: str
    rejected: str


def _one_or_two(columns: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if columns is not None and len(columns) not in (1, 2):
        raise PydanticCustomError("expected", "must be one column, or two whose difference is meant")
    return columns


class Preference(FormatSection):
    """Rows of a prompt, the chosen and the rejected answer, in any of the columns that data sets have.

    Of each answer every token is compared. A text in `prompt`, with texts as answers, is tokenized as it is; everything
    else is messages for the chat template. Without a prompt, it is the common prefix of both conversations.
    """

    type: Literal["preference"] = "preference"
    sample: ClassVar[str] = "pair"
    whole: ClassVar[bool] = True
    prompt: str | None = Field(
        None,
        description="column with the text or the messages before both answers; null: `prompt`, `messages`, "
        "`conversations`, `instruction` (with `input`), `question`, `query` or `input`, the first that a row has",
    )
    chosen: str | None = Field(
        None,
        description="column with the answer that was preferred; null: `chosen`, `chosen_response`, `messages` or "
        "`response`, the first that a row has",
    )
    rejected: str | None = Field(
        None,
        description="column with the other answer; null: `rejected`, `rejected_response` or `rejected_messages`, the "
        "first that a row has",
    )
    texts: Literal["plain", "messages"] = Field(
        "plain",
        description="what a text in the column `prompt` (or the one named here) and texts as answers are: plain, "
        "tokenized as they are; messages of the user and the assistant, for the chat template",
    )
    margin: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(as_tuple, json_schema_input_type=str | list[str] | None),
        AfterValidator(_one_or_two),
    ] = Field(
        None,
        description="column with the number by which the chosen answer is better, or two columns whose difference it "
        "is, as [score_chosen, score_rejected]; for an objective that uses it",
    )

    @property
    def rows_per_sample(self) -> int:
        """Tokenized rows that one data row becomes: chosen and rejected."""
        return 2

    def names(self, labels: Sequence[float], classes: Sequence[str] = ()) -> Sequence[str]:
        """Return names of a sample's rows."""
        return ("chosen", "rejected")

    def read(self, row: Mapping[str, Any]) -> Group:
        """Return the two answers, each after the prompt, labelled with the margin if there is a column of it.

        Raises:
            RowError: when a column is missing or unusable, there is no common prompt, an answer is empty, or both are
                the same.
        """
        names = self._names(row)
        prompt, *answers = self._values(row, names)
        if self._is_plain(names, (prompt, *answers)):
            parts: tuple[Conversation | Plain, ...] = tuple(
                Plain(((str(prompt), False), (str(answer), True))) for answer in answers
            )
        else:
            parts = _conversations(row, names, prompt, answers)
        if parts[0] == parts[1]:
            raise Alike(names.rejected, f"is the same as `{names.chosen}`: nothing would be learned from it")
        return Group(parts, self._margin(row))

    def unread(self, row: Mapping[str, Any], template: str) -> list[str]:
        """Return the columns with content, and the keys of messages, that `read` does not use."""
        names = self._names(row)
        values = self._values(row, names)
        used = [name for name in (names.prompt, names.more, names.chosen, names.rejected) if name]
        used += [*(self.margin or ()), *(name for name in _LISTS if row.get(name) == row.get(names.chosen))]
        if self._is_plain(names, values):
            return unread(row, used)
        found = unread(row, [*used, "system", *known_tools(row, template)])
        for name, value in zip((names.prompt, names.chosen, names.rejected), values, strict=True):
            if name and isinstance(value, list):
                found += lost_keys(value, name, template)
        return found

    def _names(self, row: Mapping[str, Any]) -> _Names:
        """Return the columns of a row that are read."""
        some = {name for name, value in row.items() if has_content(value)}
        chosen, rejected = self.chosen or "chosen", self.rejected or "rejected"
        if not (self.chosen or self.rejected):
            kinds = (
                (one for one in _ANSWERS if set(one) <= some),
                (one for one in _ANSWERS if set(one) <= row.keys()),
                (one for one in _ANSWERS[:2] if set(one) & row.keys()),
            )
            chosen, rejected = next((one for kind in kinds for one in kind), _ANSWERS[0])
        if self.prompt:
            return _Names(self.prompt, None, chosen, rejected)
        known = ["prompt"]
        if not _is_whole(row.get(chosen), chosen):
            known += [name for name in (*_LISTS, *_QUESTIONS) if name not in (chosen, rejected)]
        prompt = next((name for name in known if name in some), "prompt" if "prompt" in row else None)
        more = "input" if prompt == "instruction" and "input" in some else None
        return _Names(prompt, more, chosen, rejected)

    def _values(self, row: Mapping[str, Any], names: _Names) -> tuple[str | list[Any] | None, ...]:
        """Return the prompt (or None) and both answers, each a text or a list of messages."""
        prompt = None
        if names.prompt is not None and (has_content(row.get(names.prompt)) or names.prompt not in row):
            prompt = text_or_messages(row, names.prompt)
        if names.more is not None and isinstance(prompt, str):
            prompt = f"{prompt}\n\n{text_column(row, names.more)}"
        answers = [text_or_messages(row, name) for name in (names.chosen, names.rejected)]
        for name, answer in zip((names.chosen, names.rejected), answers, strict=True):
            if not has_content(answer):
                raise RowError(name, _EMPTY)
        if prompt is None and _are_texts(answers):
            told = "are texts without a prompt, and where it ends can't be told from them"
            hint = "give it in a column `prompt`, or write both as lists of messages"
            raise RowError(names.chosen, f"and `{names.rejected}` {told}: {hint}")
        return prompt, *answers

    def _is_plain(self, names: _Names, values: Sequence[Any]) -> bool:
        """Return whether a row is texts that are tokenized as they are."""
        return self.texts == "plain" and names.prompt in (self.prompt, "prompt") and _are_texts(values)

    def _margin(self, row: Mapping[str, Any]) -> tuple[float, ...]:
        """Return the margin as a label, if the recipe names a column of it."""
        if self.margin is None:
            return ()
        numbers = []
        for name in self.margin:
            value = column(row, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RowError(name, f"must be a number, as it is the margin of a pair, given {named(value)}")
            if not abs(value) < 1e30:  # beyond float32
                raise RowError(name, f"must be a finite number, as it is the margin of a pair, given {_shown(value)}")
            numbers.append(float(value))
        return (numbers[0] - sum(numbers[1:]),)


def _shown(value: float) -> str:
    return f"{value}" if isinstance(value, float) and not math.isfinite(value) else "one beyond 1e30"


def _are_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_whole(value: Any, name: str) -> bool:
    """Return whether an answer is a conversation with its prompt."""
    turns = listed_in(value, name) if isinstance(value, str) else value
    return isinstance(turns, list) and bool(turns) and role_of(turns[0]) != "assistant"


def _conversations(
    row: Mapping[str, Any], names: _Names, prompt: str | list[Any] | None, answers: list[Any]
) -> tuple[Conversation, ...]:
    """Return both answers as conversations, of which the turns after the first difference are trained."""
    given = (names.chosen, names.rejected)
    turns = {name: _turns(value, name) for name, value in zip(given, answers, strict=True)}
    before = _before(names, prompt, turns)
    wholes: dict[str, list[Turn]] = {}
    for name, other, value in zip(given, given[::-1], answers, strict=True):
        asked = turns[other][:-1] if isinstance(value, str) and not before else before
        wholes[name] = turns[name] if _begins(turns[name], asked) else [*asked, *turns[name]]
    first, second = wholes.values()
    common = 0
    while common < min(len(first), len(second)) - 1 and first[common][0] == second[common][0]:
        common += 1
    for name, whole in wholes.items():
        _check_answer(name, whole[common:])
    _check_prompt(names, first[:common])
    if first[common][0] == second[common][0] and len(first) != len(second):
        raise RowError(names.rejected, f"and `{names.chosen}` are the same until one of them ends: they must differ")
    return tuple(_conversation(row, whole, common, name) for name, whole in wholes.items())


def _turns(value: str | list[Any], name: str) -> list[Turn]:
    return [({"role": "assistant", "content": value}, True)] if isinstance(value, str) else messages_of(value, name)


def _before(names: _Names, prompt: str | list[Any] | None, turns: Mapping[str, list[Turn]]) -> list[Turn]:
    """Return the messages before both answers, if they are not in these already."""
    if isinstance(prompt, list):
        assert names.prompt is not None
        return messages_of(prompt, names.prompt)
    if not prompt:
        return []
    for name, some in turns.items():
        said = next((message["content"] for message, _ in some if message["role"] == "user"), None)
        if some[0][0]["role"] != "assistant" and (said is None or said.strip() != prompt.strip()):
            raise RowError(names.prompt or "", f"differs from the first user message in `{name}`: which is meant?")
    whole = [some[0][0]["role"] != "assistant" for some in turns.values()]
    return [] if any(whole) else [({"role": "user", "content": prompt}, False)]


def _begins(turns: list[Turn], before: list[Turn]) -> bool:
    """Return whether messages begin with these, and go on."""
    pairs = zip(turns, before, strict=False)
    return len(turns) > len(before) and all(one[0] == other[0] for one, other in pairs)


def _check_prompt(names: _Names, before: list[Turn]) -> None:
    if not before:
        raise RowError(names.rejected, f"and `{names.chosen}` have no first message in common: there is no prompt")
    if (role := before[-1][0]["role"]) not in ASKS:
        told = f"must follow a message of the user's (or a tool's), but what they have in common ends with `{role}`"
        raise RowError(names.chosen, f"and `{names.rejected}` {told}")


def _check_answer(name: str, turns: list[Turn]) -> None:
    trained = [message for message, asked in turns if asked and message["role"] == "assistant"]
    if not trained:
        raise RowError(name, "has no assistant message to train on: there is nothing to learn")
    if turns[-1][0]["role"] != "assistant" or not turns[-1][1]:
        raise RowError(name, "must end with an assistant message that is trained on")
    for message in trained:
        if not any(has_content(value) for key, value in message.items() if key not in ("role", "name")):
            raise RowError(name, _EMPTY)


def _conversation(row: Mapping[str, Any], whole: list[Turn], common: int, name: str) -> Conversation:
    messages = tuple(message for message, _ in whole)
    trained = tuple(
        place >= common and asked and message["role"] == "assistant" for place, (message, asked) in enumerate(whole)
    )
    if whole[common][0]["role"] != "assistant":
        raise RowError(name, f"must answer with an assistant message, given `{whole[common][0]['role']}`")
    messages, trained = with_system(row, messages, trained, name)
    return Conversation(messages, trained, tools_of(row))
