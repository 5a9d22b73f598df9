"""Preference pairs: a prompt, an answer that was chosen and one that was rejected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from loratune.data.formats.base import Group, Plain, RowError, has_content, named, text_column, unread
from loratune.data.formats.chat import joined, known_tools, lost_keys
from loratune.data.formats.section import FormatSection


class Preference(FormatSection):
    """Rows of a prompt, the chosen and the rejected answer; of each answer every token is compared.

    Texts are tokenized as they are. Lists of messages are rendered by the chat template; without a prompt column, the
    prompt is the common prefix of both conversations.
    """

    type: Literal["preference"] = "preference"
    sample: ClassVar[str] = "pair"
    prompt: str = Field("prompt", description="column with the text or the messages before both answers")
    chosen: str = Field("chosen", description="column with the answer that was preferred")
    rejected: str = Field("rejected", description="column with the other answer")

    @property
    def rows_per_sample(self) -> int:
        """Tokenized rows that one data row becomes: chosen and rejected."""
        return 2

    def read(self, row: Mapping[str, Any]) -> Group:
        """Return the two answers, each after the prompt.

        Raises:
            RowError: when a column is missing or of another kind than the others, an answer is empty, or both are the
                same.
        """
        lists = [name for name in (self.prompt, self.chosen, self.rejected) if isinstance(row.get(name), list)]
        pair = self._conversations(row) if lists else self._texts(row)
        if pair.parts[0] == pair.parts[1]:
            raise RowError(self.rejected, f"is the same as `{self.chosen}`: nothing would be learned from it")
        return pair

    def unread(self, row: Mapping[str, Any], template: str) -> list[str]:
        """Return the columns with content, and the keys of messages, that `read` does not use."""
        names = (self.prompt, self.chosen, self.rejected)
        if not isinstance(row.get(self.chosen), list):
            return unread(row, names)
        found = unread(row, [*names, *known_tools(row, template)])
        for name in names:
            found += lost_keys(row.get(name) or [], name, template)
        return found

    def _texts(self, row: Mapping[str, Any]) -> Group:
        prompt = text_column(row, self.prompt)
        answers = []
        for name in (self.chosen, self.rejected):
            if not (text := text_column(row, name)).strip():
                raise RowError(name, "is empty: there is nothing to compare")
            answers.append(Plain(((prompt, False), (text, True))))
        return Group(tuple(answers))

    def _conversations(self, row: Mapping[str, Any]) -> Group:
        names = (self.chosen, self.rejected)
        asked = (self.prompt, *names) if has_content(row.get(self.prompt)) else names
        lists: dict[str, list[Any]] = {}
        for name in asked:
            if not isinstance(value := row.get(name), list):
                raise RowError(name, f"must be a list of messages, as the others are, given {named(value)}")
            lists[name] = value
        if self.prompt not in lists:
            lists = dict(zip((self.prompt, *names), _apart(*lists.values()), strict=True))
        chosen, rejected = (
            joined(row, {self.prompt: lists[self.prompt], name: lists[name]}, learned=name) for name in names
        )
        for name, conversation in ((self.chosen, chosen), (self.rejected, rejected)):
            if not conversation.trained[-1]:
                raise RowError(name, "must end with an assistant message")
        return Group((chosen, rejected))


def _apart(one: list[Any], other: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the common prefix of two lists of messages, and the rest of each."""
    common = 0
    while common < min(len(one), len(other)) - 1 and one[common] == other[common]:
        common += 1
    return one[:common], one[common:], other[common:]
