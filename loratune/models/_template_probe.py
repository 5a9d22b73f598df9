"""Render a chat template a few times under limits: run by `template_check.check` as a separate program.

It reads `{"template": ..., "tokens": {...}}` from stdin and writes a line `ready`, then `{"refused": null}` or why the
template is refused. It imports jinja2 and nothing of loratune: a child that imported torch would take seconds to start
and have more to lose. Sandbox, extensions and globals are those of transformers, but stricter: an attempt to leave the
sandbox is an error instead of an empty text.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from datetime import datetime
from typing import Any

CPU_SECONDS = 5
MEMORY = 512 << 20  # bytes of address space
LONGEST = 1_000_000  # characters of a render; a thousandth of it for a message of `raise_exception`
DUNDER = re.compile(r"(^|\.)__\w+__($|\.)")


def main() -> None:
    """Answer one request."""
    request = json.loads(sys.stdin.read())
    import jinja2.sandbox  # before the limits are set, which are meant for the template

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", flush=True)
    try:
        refused = _render_all(request["template"], request["tokens"])
    except MemoryError:
        refused = f"needs more than {MEMORY >> 20} MiB of memory"
    except RecursionError:
        refused = "is nested too deep"
    except OverflowError as error:
        refused = f"exceeds a limit: {error}"
    except jinja2.exceptions.SecurityError as error:
        refused = f"uses what a template must not use: {error}"
    except jinja2.TemplateSyntaxError:
        refused = None  # it never renders: each row reports why
    sys.stdout.write(json.dumps({"refused": refused and refused[:300]}))


def _render_all(source: str, tokens: dict[str, str]) -> str | None:
    import jinja2.sandbox
    from jinja2 import nodes

    environment = _environment()
    tree = environment.parse(source)
    if any(tree.find_all((nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends))):
        return "reads another file"
    names = [node.attr for node in tree.find_all(nodes.Getattr)] + [node.value for node in tree.find_all(nodes.Const)]
    if dunder := [name for name in names if isinstance(name, str) and DUNDER.search(name)]:
        return f"uses what a template must not use: `{dunder[0][:60]}`"
    template = environment.from_string(source)
    for messages, tools in _conversations():
        for prompt in (False, True):
            try:
                length = 0
                for piece in template.generate(
                    messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **tokens
                ):
                    length += len(piece)
                    if length > LONGEST:
                        return f"renders a few words as more than {LONGEST:,} characters"
            except (MemoryError, RecursionError, OverflowError, jinja2.exceptions.SecurityError):
                raise
            except Exception as error:  # it refuses this conversation, or has a fault: rows report it if they meet it
                if len(str(error)) > LONGEST // 1000:
                    return f"raises an error of more than {LONGEST // 1000:,} characters"
    return None


def _conversations() -> list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    user, answer = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "good morning"}
    system = {"role": "system", "content": "be brief"}
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "weather", "description": "tell the weather", "parameters": parameters}
    call = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "call00001"}
    return [
        ([user], None),
        ([user, answer], None),
        ([system, user, answer, user], None),
        ([user, answer] * 12, None),
        ([{"role": "user", "content": "word " * 2000}], None),
        ([user, called, result, answer], [{"type": "function", "function": function}]),
    ]


def _environment() -> Any:
    """Return the jinja2 environment in which transformers compiles templates; see `_compile_jinja_template` there."""
    import jinja2.ext
    import jinja2.meta
    import jinja2.sandbox
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Strict(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"`{str(attribute)[:60]}` of a {type(obj).__name__}")

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None,
        separators: tuple[str, str] | None = None, sort_keys: bool = False,
    ) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Strict(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


if __name__ == "__main__":
    main()
