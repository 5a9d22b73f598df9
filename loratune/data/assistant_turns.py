"""Find the trained turns of a conversation in its render, in characters.

They are derived from the model's own chat template. The render of the messages before a turn (with the generation
prompt) must be a prefix of the render with the turn; the turn is the difference. If a template marks turns itself with
`{% generation %}`, its marks are used unless they contradict that. If a prompt opens a thought that the template then
leaves out of the turn, it is no prefix, and the turn begins where the two differ. Or a recipe names the text around
turns. Where no answer is certain the row is refused, never guessed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from loratune.data.chat_template import FOLD, MARKS
from loratune.data.formats import Conversation, RowError

Span = tuple[int, int]  # characters: [start, end)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_TAGS = re.compile(r"<[^<>\s]*>(?:thought\b)?")  # tags with which a prompt opens or closes a thought
_ASKS, _SAYS = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
_CALL = {"type": "function", "id": "call00001", "function": {"name": "c", "arguments": {"d": "e"}}}
_CALLS = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_TOLD = {"role": "tool", "content": "f", "name": "c", "tool_call_id": "call00001"}

_HINT = "`data.turns` can give the markers around answers"


def _placeholder(index: int) -> str:
    return f"\ue000{index}\ue001"  # private-use characters: no template and hardly any text has them


@dataclass(frozen=True)
class Shape:
    """How a chat template renders a sequence of roles, independent of the contents.

    Attributes:
        literals: text of the template before, between and after the contents.
        turns: for each assistant message the (literal, offset in it) at which its turn starts and ends.
    """

    literals: tuple[str, ...]
    turns: dict[int, tuple[tuple[int, int], tuple[int, int]]]

    def fit(self, text: str, contents: Sequence[str]) -> list[int] | None:
        """Return the start of each literal in a render of these contents, or None if the render does not match."""
        starts, position = [0], len(self.literals[0])
        if not text.startswith(self.literals[0]):
            return None
        for content, literal in zip(contents, self.literals[1:], strict=True):
            for form in (content, content.strip()):
                if text.startswith(form, position) and text.startswith(literal, position + len(form)):
                    position += len(form)
                    break
            else:
                return None
            starts.append(position)
            position += len(literal)
        return starts if position == len(text) else None


class LaterTurnsChangeIt(RowError):
    """A turn that the chat template renders differently when other messages follow."""


class Turns:
    """Renders conversations with a tokenizer's chat template and finds the assistant's turns in them."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.template: str | None = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        if self.template is None and tokenizer.chat_template is not None:
            self.template = tokenizer.get_chat_template()
        self.marks_turns = bool(self.template and _GENERATION.search(self.template))
        found = MARKS.search(self.template or "")
        self.marks: dict[str, str] | None = json.loads(found[1]) if found else None
        self._shapes: dict[tuple[str, ...], Shape | Literal[False]] = {}
        self._skeletons: dict[tuple[tuple[str, ...], bool], str] = {}

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> str:
        """Render messages with the generation prompt, as a server does before the model answers."""
        return self._render(messages, tools, prompt=True)

    def spans(self, example: Conversation) -> tuple[str, list[Span]]:
        """Return the rendered conversation and the spans of its trained turns, in characters.

        Raises:
            RowError: when the template refuses the messages or the prefix property does not hold.
        """
        if self.marks:
            found = self._between(example, self.marks["assistant"], self.marks["end"])
        elif self.marks_turns:
            found = self._marked(example)
        elif by_shape := self._by_shape(example):
            return by_shape  # it contains every message exactly
        else:
            found = self._by_prefix(example)
        _check_all_shown(example, found[0])
        return found

    def _by_shape(self, example: Conversation) -> tuple[str, list[Span]] | None:
        """Return what `_by_prefix` would, from one render, or None where `_by_prefix` is needed.

        The cost of rendering prefixes is quadratic in the number of turns. It is paid once for each sequence of roles,
        with placeholders as contents. A row then needs one render, which must equal that skeleton with the row's
        contents (unchanged or stripped) in place of the placeholders.
        """
        if example.tools or any(message.keys() != {"role", "content"} for message in example.messages):
            return None
        if any("</think>" in message["content"] for message in example.messages):
            return None  # templates inspect thoughts
        roles = tuple(message["role"] for message in example.messages)
        shape = self._shape(roles)
        if shape is None:
            return None
        text = self._render(example.messages, None)
        starts = shape.fit(text, [message["content"] for message in example.messages])
        if starts is None:
            return None
        wanted = [index for index, trained in enumerate(example.trained) if trained]
        spans = [
            (starts[first] + at, starts[last] + until)
            for (first, at), (last, until) in (shape.turns[index] for index in wanted)
        ]
        # the longest prompt contains all that a template could have inspected: it must match the skeleton, too
        if self._render(example.messages[: wanted[-1]], None, prompt=True) != text[: spans[-1][0]]:
            return None
        return text, spans

    def _shape(self, roles: tuple[str, ...]) -> Shape | None:
        """Return the shape of a sequence of roles, or None; thread-safe."""
        kept = self._shapes.get(roles)
        if kept is None:
            if len(self._shapes) >= 4096:  # a file of long conversations with different roles
                self._shapes, self._skeletons = {}, {}
            kept = self._shapes[roles] = self._shape_of(roles) or False
        return kept or None

    def _skeleton(self, roles: tuple[str, ...], prompt: bool = False) -> str:
        """Render placeholders as messages of `roles`; cached, as most conversations have common prefixes."""
        kept = self._skeletons.get((roles, prompt))
        if kept is None:
            messages = [{"role": role, "content": _placeholder(index)} for index, role in enumerate(roles)]
            kept = self._skeletons[roles, prompt] = self._render(messages, None, prompt=prompt)
        return kept

    def _shape_of(self, roles: tuple[str, ...]) -> Shape | None:
        turns = [index for index, role in enumerate(roles) if role == "assistant"]
        spans: list[Span] = []
        try:
            text = self._skeleton(roles)
            for index in turns:
                before, after = self._skeleton(roles[:index], prompt=True), self._skeleton(roles[: index + 1])
                if index == 0 or not after.startswith(before) or not text.startswith(after):
                    return None
                spans.append((len(before), len(after)))
        except RowError:
            return None
        marks = [_placeholder(index) for index in range(len(roles))]
        places = [text.find(mark) for mark in marks]
        if -1 in places or places != sorted(places) or any(text.count(mark) > 1 for mark in marks):
            return None
        edges = [0, *(place + len(mark) for place, mark in zip(places, marks, strict=True))]
        literals = tuple(text[start:end] for start, end in zip(edges, [*places, len(text)], strict=True))
        if not all(literals[1:-1]):
            return None

        def inside(offset: int) -> tuple[int, int] | None:
            for index, literal in enumerate(literals):
                if edges[index] <= offset <= edges[index] + len(literal):
                    return index, offset - edges[index]
            return None

        found = {index: (inside(start), inside(end)) for index, (start, end) in zip(turns, spans, strict=True)}
        sure = {index: (a, b) for index, (a, b) in found.items() if a is not None and b is not None}
        return Shape(literals, sure) if len(sure) == len(turns) else None

    def _by_prefix(self, example: Conversation) -> tuple[str, list[Span]]:
        text = self._render(example.messages, example.tools)
        self._check_tools(example, text)
        found: list[Span] = []
        for index, trained in enumerate(example.trained):
            if not trained:
                continue
            if index == 0:
                raise RowError("messages[0]", "is the assistant's, with no message to answer")
            before = self._render(example.messages[:index], example.tools, prompt=True)
            after = self._render(example.messages[: index + 1], example.tools)
            start = len(before) if after.startswith(before) else self._parting(example, index, before, after)
            if start is None:
                raise RowError(
                    f"messages[{index}]",
                    "can't be masked: the chat template does not render it after the generation prompt; " + _HINT,
                )
            _check_shown(example.messages[index], index, after[start:])
            if not text.startswith(after):
                raise LaterTurnsChangeIt(
                    f"messages[{index}]", "can't be masked: the chat template renders it differently when others follow"
                )
            found.append((start, len(after)))
        return text, found

    def _between(self, example: Conversation, begin: str, end: str) -> tuple[str, list[Span]]:
        """Return a render and the spans between the recipe's turn marks; the last may lack its end.

        A turn may contain its own words and tags only; one with calls must not contain other messages' words.
        """
        text = self._render(example.messages, example.tools)
        self._check_tools(example, text)
        turns = [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
        starts = [match.end() for match in re.finditer(re.escape(begin), text)]
        if len(starts) > len(turns) and not text[starts[-1] :].strip():
            del starts[-1]  # a generation prompt, which some templates always write
        if len(starts) != len(turns):
            told = f"`{begin}` (`data.turns.assistant`) is rendered {len(starts)} times for {len(turns)} answers"
            raise RowError("", told)
        found = []
        for index, start, limit in zip(turns, starts, [*starts[1:], None], strict=True):
            if not example.trained[index]:
                continue
            stop = text.find(end, start, limit)
            if stop < 0 and index == len(example.messages) - 1:
                stop, text = len(text), text + end
            if stop < 0:
                raise RowError(f"messages[{index}]", f"is not rendered with `{end}` (`data.turns.end`) at its end")
            before = self._render(example.messages[:index], example.tools, prompt=True) if index else ""
            if text.startswith(before) and start <= len(before) <= stop:
                start = len(before)  # white space or a tag that is in the prompt already
            _check_shown(example.messages[index], index, text[start:stop])
            _check_only(example, index, text[start:stop])
            found.append((start, stop + len(end)))
        return text, found

    def _parting(self, example: Conversation, index: int, before: str, after: str) -> int | None:
        """Return the start of a turn whose prompt opens a thought that the template leaves out of the turn, or None.

        Both must continue the earlier messages with the same header. After it the prompt may have only tags of
        thoughts, and the turn nothing else before its words.
        """
        bare = self._render(example.messages[:index], example.tools)
        common = _common(before, after)
        start = len(common)
        while start > len(bare) and not (common[start - 1].isspace() or common[start - 1] in ">]"):
            start -= 1  # no tag is cut in two
        if (
            not common.startswith(bare)
            or not common[len(bare) : start].strip()
            or _TAGS.sub("", before[start:]).strip()
        ):
            return None
        message = example.messages[index]
        said = [message.get(name) for name in (*_THOUGHTS, "content")]
        found = [after.find(words.strip(), start) for words in said if isinstance(words, str) and words.strip()]
        found = [place for place in found if place >= 0]
        if not found:  # a call without text: the template decides how it begins
            return start if message.get("tool_calls") else None
        return None if _TAGS.sub("", after[start : min(found)]).strip() else start

    def ended(
        self, example: Conversation, text: str, spans: Sequence[Span], special: Iterable[str]
    ) -> tuple[str, list[Span]]:
        """Return a render and its spans; those without an end of their own are extended to the marker that follows.

        Some templates write nothing after a turn: it ends where the next role's marker begins, and a model must write
        that marker to stop. The last turn of a row gets the marker that the template writes before the next question
        (or before the result of a call). If that is no special token either, a turn at the end of a render gets the end
        of
        text.

        Args:
            example: that was rendered.
            text: its render.
            spans: of its trained turns.
            special: texts of the special tokens, the longest first.

        Raises:
            LaterTurnsChangeIt: when the end of text would have to be between two turns.
            RowError: when the template writes a generation prompt after a turn, though none was requested.
        """
        markers, found = tuple(special), list[Span]()
        for start, end in spans:
            _check_no_prompt(text[:start], text[start:end], markers)
            if not text[start:end].rstrip().endswith(markers):
                if end == len(text):
                    text += self._next_marker(bool(example.messages[-1].get("tool_calls")), markers)
                marker = _first(text[end:], markers)
                if not marker and self._is_bare(text[start:end], example.messages):
                    if end < len(text):
                        raise LaterTurnsChangeIt("", "no token ends its answers, so each needs a separate row")
                    marker, end = self.tokenizer.eos_token, len(text.rstrip())
                    text = text[:end] + marker
                end += len(marker)
            found.append((start, end))
        return text, found

    def _is_bare(self, turn: str, messages: Sequence[dict[str, Any]]) -> bool:
        """Return whether a turn ends with the assistant's words, and the tokenizer has an end of text to add."""
        said = (m["content"].strip() for m in messages if m["role"] == "assistant" and not m.get("tool_calls"))
        return bool(self.tokenizer.eos_token) and turn.rstrip().endswith(tuple(words for words in said if words))

    def note(self) -> str | None:
        """Return a note if no token ends the template's turns, else None."""
        try:
            text = self._render((_ASKS, _SAYS), None)
        except RowError:
            return None
        if self.marks or not self._is_bare(text, (_SAYS,)):
            return None
        if self._next_marker(False, self.tokenizer.all_special_tokens):
            return None
        end = self.tokenizer.eos_token
        return f"the chat template puts no token after an answer: `{end}` is added there, each answer in its own row"

    def _next_marker(self, called: bool, markers: Sequence[str]) -> str:
        """Return the special token that the template writes directly after a last turn when another follows, or ""."""
        said, following = ((_ASKS, _CALLS), _TOLD) if called else ((_ASKS, _SAYS), _ASKS)
        try:
            short, long = self._render(said, None), self._render((*said, following), None)
        except RowError:
            return ""
        return _first(long[len(short) :], markers) if long.startswith(short) else ""

    def _check_tools(self, example: Conversation, text: str) -> None:
        if example.tools and text == self._render_or_none(example.messages):
            raise RowError("tools", "are not rendered by the chat template: the model would never see them")
        for index, tool in enumerate(example.tools or ()):
            name = tool.get("function", tool).get("name")
            if isinstance(name, str) and name not in text:
                raise RowError(f"tools[{index}]", f"`{name}` is not rendered by the chat template")

    def _render_or_none(self, messages: Sequence[dict[str, Any]]) -> str | None:
        """Return messages rendered without tools; None where the template requires tools."""
        try:
            return self._render(messages, None)
        except RowError:
            return None

    def _marked(self, example: Conversation) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                conversations=[list(example.messages)],
                tools=list(example.tools) if example.tools else None,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template is code from elsewhere: it can raise anything
            raise _refused(error, example.messages if FOLD not in str(self.template) else ()) from None
        spans = [(start, end) for start, end in marks[0] if end > start]
        self._check_tools(example, texts[0])
        found = self._of_turns(example, texts[0], spans)
        for index, (start, end) in found:
            _check_shown(example.messages[index], index, texts[0][start:end])
        return texts[0], [span for _, span in found]

    def _of_turns(self, example: Conversation, text: str, marked: list[Span]) -> list[tuple[int, Span]]:
        """Return the trained messages with the spans a template marks in them, checked against the prefix difference.

        A turn may have several adjacent marks, and they may begin in the prompt; what is in the prompt is not trained.
        Without a prefix difference each turn must have exactly one mark.
        """
        turns = [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
        try:
            _, derived = self._by_prefix(example)
        except LaterTurnsChangeIt:  # marked, but not as the model must write it
            raise
        except RowError:
            if len(marked) != len(turns):
                told = f"the chat template marks {len(marked)} turns as generated, the row has {len(turns)}"
                raise RowError("", told) from None
            return [(index, span) for index, span in zip(turns, marked, strict=True) if example.trained[index]]
        found = []
        trained = [index for index, wanted in enumerate(example.trained) if wanted]
        for index, (first, last) in zip(trained, derived, strict=True):
            touching = [(start, end) for start, end in marked if start < last and end > first]
            elsewhere = any(end > last and text[last:end].strip() for _, end in touching)
            gaps = [text[one[1] : two[0]] for one, two in pairwise(touching)]
            if not touching or elsewhere or any(gap.strip() for gap in gaps):
                raise RowError(f"messages[{index}]", "is rendered elsewhere than the chat template marks it")
            found.append((index, (max(first, touching[0][0]), min(last, touching[-1][1]))))
        return found

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, prompt: bool = False
    ) -> str:
        if self.template is None:
            raise RowError(
                "", "the base model has no chat template; use `format: completion` or `text`, or an instruct model"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is code from elsewhere: it can raise anything
            raise _refused(error, () if prompt or FOLD in self.template else messages) from None
        return str(text)


def _check_all_shown(example: Conversation, text: str) -> None:
    """Refuse a row if its render lacks the words of a message that is not the model's.

    A system text may be inside of a user's turn, white space may differ, and a tool's result may be written as JSON.
    The assistant's own turns are checked where they are trained; from earlier ones templates omit thoughts.
    """
    rendered = _squeezed(text)
    others = [(index, message) for index, message in enumerate(example.messages) if message["role"] != "assistant"]
    said = {index: squeezed for index, message in others if (squeezed := _squeezed(message["content"]))}
    for index, content in said.items():
        given = example.messages[index]
        as_json = (_squeezed(json.dumps(given["content"], ensure_ascii=ascii)[1:-1]) for ascii in (True, False))
        if sum(rendered.count(form) for form in {content, *as_json}) < sum(one.count(content) for one in said.values()):
            hint = (
                "; `data.system: fold` puts it into the first user message"
                if given["role"] in ("system", "developer")
                else ""
            )
            raise RowError(f"messages[{index}]", f"({given['role']}) is not fully rendered by the chat template{hint}")


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _check_shown(message: dict[str, Any], index: int, turn: str) -> None:
    """Refuse a turn of whose message the template omits something, except for white space and the like."""
    content = message["content"]
    if content.strip() not in turn and _squeezed(content) not in _squeezed(turn):
        raise RowError(f"messages[{index}].content", "is not fully rendered by the chat template")
    for name in _THOUGHTS:
        thought = message.get(name)
        if isinstance(thought, str) and _squeezed(thought) not in _squeezed(turn):
            raise RowError(f"messages[{index}].{name}", "is not rendered by the chat template")
    calls = Counter(call["function"]["name"] for call in message.get("tool_calls", ()))
    if hidden := [name for name, number in calls.items() if turn.count(name) < number]:
        raise RowError(f"messages[{index}].tool_calls", f"are not rendered by the chat template: `{hidden[0]}`")


def _check_only(example: Conversation, index: int, turn: str) -> None:
    """Refuse a turn that contains more than its message: its end is not the recipe's mark."""
    message, rest = example.messages[index], _squeezed(turn)
    for words in (message["content"], *(message.get(name) for name in _THOUGHTS)):
        if isinstance(words, str):
            rest = rest.replace(_squeezed(words), "", 1)
    others = (_squeezed(other["content"]) for i, other in enumerate(example.messages) if i != index)
    if any(one and one in rest for one in others) if message.get("tool_calls") else _TAGS.sub("", rest):
        raise RowError(f"messages[{index}]", "is not all that is rendered between the markers of `data.turns`")


def _check_no_prompt(before: str, turn: str, markers: tuple[str, ...]) -> None:
    """Refuse a turn that ends with a header like the prompt's: what follows is not the model's.

    A single token at the end of both is an end of turn, in a template without headers.
    """
    closing, header = _closing(turn, markers), _closing(before, markers)
    if len(closing) > 1 and (closing[:1] == header[:1] or (closing[0], closing[1]) in pairwise(header[:3])):
        told = "can't be masked: the chat template adds another generation prompt after this answer"
        raise RowError("", f"{told}; {_HINT}")


def _closing(text: str, markers: tuple[str, ...]) -> list[str]:
    """Return the markers a text ends with, the last one first; white space between them is ignored."""
    found: list[str] = []
    while marker := next((one for one in markers if one and text.rstrip().endswith(one)), None):
        found.append(marker)
        text = text.rstrip().removesuffix(marker)
    return found


def _common(one: str, two: str) -> str:
    """Return the common prefix of two texts."""
    length = next(
        (index for index, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )
    return one[:length]


def _first(text: str, markers: Sequence[str]) -> str:
    """Return the marker that a text begins with, or ""; the longest ones come first."""
    return next((marker for marker in markers if marker and text.startswith(marker)), "")


def _refused(error: Exception, messages: Sequence[dict[str, Any]]) -> RowError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if messages and messages[0]["role"] in ("system", "developer") and re.search(r"(?i)system|developer|role", reason):
        reason += "; `data.system: fold` puts the system text into the first user message"
    return RowError("", f"the chat template refuses this row: {reason}")
