"""Chat templates of other people: which of their conversations are trained right, refused, or trained wrong.

    python benchmarks/templates.py FOLDER...

Each folder is a collection: its *.jinja files, and the `chat_template` of its *.json files. Every template is given a
few valid conversations (one turn, several, a system message, thoughts, a call of a tool) and a tokenizer of one token
per byte with the special tokens that it writes; rows are made as training makes them (`Encoder.rows`).

What is right is judged from the trained tokens alone, which are decoded: every word of the assistant is there once and
in its order, none of another speaker, every row ends with a special token, and beside those words there are only marks
of thoughts and channels. Refusals count apart where the template raises, or leaves out a word of the conversation.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tokenizer is that of the tests

from loratune.data.encode import Encoder
from loratune.data.formats import Conversation, RowError
from loratune.errors import Place
from tests import tiny

_SPECIAL = re.compile(
    r"<[|｜][^<>'\"{}\n]{1,40}[|｜]>|<[|｜][a-z_\"]+>|<[a-z_]+[|｜]>|<｜\w+:\w+>|</?s>|<(?:start|end)_of_turn>"
    r"|<end_of_utterance>|</?assistant>|</?user>|\[\|[a-z]+\|\]|<(?:end|begin|beginning)_of_(?:sentence|text)>|<sep>"
    r"|\[/?(?:[A-Z]{4,}|SYSTEM_PROMPT|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]|<SPECIAL_\d+>|<[a-z]+:[a-z_]+>"
    r"|\[e~\[|\]~b\]|<extra_id_\d>"
)
_MARKS = re.compile(
    r"</?(?:seed:|mm:)?think(?:ing|_fast|_slow|:\w+)?>|</?thought>|\bto=(?:user|self|zcallz)\b|(?<=<\|start\|>)assistant\b"
    r"|(?<=[|｜]>)(?:think|response|message)(?=<)|\b(?:analysis|final|commentary|thought|json|model)\b|^all\n|(?<=>)all\n"
)
OUTCOMES = ("right", "template", "hidden", "refused", "wrong")
_CALL = {"type": "function", "id": "call00001", "function": {"name": "zcallz", "arguments": {"zplacez": "zvaluez"}}}
_PLACE = {"zplacez": {"type": "string", "description": "xwherex"}}
_PARAMETERS = {"type": "object", "properties": _PLACE, "required": ["zplacez"]}
_TOOL = {"type": "function", "function": {"name": "zcallz", "description": "xdescribedx", "parameters": _PARAMETERS}}


def _says(role: str, *words: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": " ".join(words), **more}


_ASK, _ASK2 = _says("user", "xaskax", "xaskbx"), _says("user", "xaskcx", "xaskdx")
_SAY, _SAY2 = _says("assistant", "zfirstz", "zwordz"), _says("assistant", "zsecondz", "zanswerz")
_SYSTEM = _says("system", "xrulex", "xbriefx")
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one turn": ([_ASK, _SAY], None),
    "three turns": ([_ASK, _SAY, _ASK2, _SAY2, _ASK, _says("assistant", "zthirdz", "zlastz")], None),
    "system": ([_SYSTEM, _ASK, _SAY, _ASK2, _SAY2], None),
    "thought": ([_ASK, {**_SAY, "reasoning_content": "zmusez zponderz"}], None),
    "tools": ([_ASK, {"role": "assistant", "content": "", "tool_calls": [_CALL]},
               _says("tool", "xresultx", name="zcallz", tool_call_id="call00001"), _SAY], [_TOOL]),
}  # fmt: skip


def valid(template: str) -> list[str]:
    """Return the conversations a template can be given: thoughts and calls only where it asks for them."""
    asks = {"thought": "reasoning_content" in template, "tools": "tool_calls" in template and "tools" in template}
    return [name for name in CONVERSATIONS if asks.get(name, True)]


def outcome(template: str, name: str) -> tuple[str, str]:
    """Return what becomes of a conversation, and why where it is not trained right."""
    messages, tools = CONVERSATIONS[name]
    encoder = _encoder(template)
    trained = tuple(message["role"] == "assistant" for message in messages)
    example = Conversation(tuple(messages), trained, tuple(tools) if tools else None)
    try:
        rows = encoder.rows(example, Place("row"))
    except RowError as error:
        return _refusal(encoder, messages, tools), str(error)
    texts = [encoder.tokenizer.decode(row.ids[row.trained].tolist()) for row in rows]
    if ends := [text for row, text in zip(rows, texts, strict=True) if not _ends(encoder, row)]:
        return "wrong", f"no end: {ends[0][-60:]!r}"
    fault = _fault("".join(texts), messages, encoder)
    return ("wrong", f"{fault}: {''.join(texts)[:300]!r}") if fault else ("right", "")


def _refusal(encoder: Encoder, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    """Return whose a refusal is: the template's, which raises or leaves out a word (hidden), or ours."""
    try:
        text = encoder.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        asked = encoder.tokenizer.apply_chat_template(
            messages[:-1], tools=tools, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template is code from elsewhere: it can raise anything
        return "template"
    said = {word for one in (messages, tools or []) for word in re.findall(r"[xz][a-z]+[xz]", json.dumps(one))}
    thoughts = {word for one in messages for word in one.get("reasoning_content", "").split()}
    return "hidden" if any(word not in text + asked for word in said | thoughts) else "refused"


def _encoder(template: str) -> Encoder:
    special = dict.fromkeys(_SPECIAL.findall(template))
    try:  # some put the names of tokens together
        plain = tiny.tokenizer(template, (), "<BOS>", "<EOS>")
        special |= dict.fromkeys(_SPECIAL.findall(plain.apply_chat_template([_ASK, _SAY, _ASK], tokenize=False)))
    except Exception:  # a template is code from elsewhere: rows say why
        special |= {}
    return Encoder(tiny.tokenizer(template, tuple(special), "<BOS>", "<EOS>"))


def _ends(encoder: Encoder, row: Any) -> bool:
    """Whether the last trained token is special, and not the header of yet another answer."""
    ids, trained = row.ids.tolist(), row.ids[row.trained].tolist()
    before = int(row.trained.argmax())
    header = [tuple(ids[place - 2 : place]) for place in range(max(before - 1, 2), before + 1)]
    another = tuple(trained[-2:]) in header and trained[-2] in encoder.special
    return trained[-1] in encoder.special and not another


def _fault(text: str, messages: list[dict[str, Any]], encoder: Encoder) -> str | None:
    """Return what is wrong with all the trained text of a conversation, or None."""
    own = [message for message in messages if message["role"] == "assistant"]
    words = [word for message in own for key in ("reasoning_content", "content")
             for word in str(message.get(key) or "").split()]  # fmt: skip
    if found := re.findall(r"x[a-z]+x", text):
        return f"holds {found[0]} of another"
    called = any("tool_calls" in message for message in own)
    said = re.findall(r"z[a-z]+z", text)
    if called:
        if not {"zcallz", "zplacez", "zvaluez"} <= set(said):
            return "lacks the call"
        said = [word for word in said if word in words]
    if said != words:
        return f"holds {said}, not {words}"
    rest = _MARKS.sub(" ", re.sub(r"z[a-z]+z", "", text))
    for token in sorted(map(str, encoder.tokenizer.all_special_tokens), key=len, reverse=True):
        rest = rest.replace(token, " ")
    if not called and rest.strip():
        return f"holds {rest.strip()!r} that nobody said"
    return "holds a role" if re.search(r"\b(user|system)\b", rest) else None


def read(folder: Path) -> dict[str, str]:
    """Return the chat templates of a folder by their names."""
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.jinja"))}
    for path in sorted(folder.rglob("*.json")):
        given = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        named = (
            [(str(one.get("name")), one.get("template")) for one in given] if isinstance(given, list) else [("", given)]
        )
        found |= {f"{path.relative_to(folder)} {name}".strip(): one for name, one in named if isinstance(one, str)}
    return found


def main() -> None:
    """Print a table of counts, and with --why each conversation that is not trained right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--why", action="store_true", help="name each conversation refused by us or trained wrong")
    given = parser.parse_args()
    whole: Counter[str] = Counter()
    columns = ("collection", "templates", "right", "template raises", "template leaves out", "refused by us", "wrong")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    lines = []
    for folder in given.folders:
        templates, counts = read(folder), Counter[str]()
        for template_name, template in templates.items():
            for name in valid(template):
                kind, why = outcome(template, name)
                counts[kind] += 1
                if kind in ("refused", "wrong"):
                    lines.append(f"{kind}\t{folder.name}/{template_name}\t{name}\t{why}")
        whole += counts + Counter({"templates": len(templates)})
        print(_row(folder.name, len(templates), counts), flush=True)
    print(_row("all", whole["templates"], whole))
    if given.why:
        print("\n".join(lines))


def _row(name: str, templates: int, counts: Counter[str]) -> str:
    return f"| {name} | {templates} | " + " | ".join(str(counts[kind]) for kind in OUTCOMES) + " |"


if __name__ == "__main__":
    main()
