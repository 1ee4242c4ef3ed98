"""Judge a chat template from an untrusted model: render it once in a small, short-lived process (no torch).

Run as a file, it is that process: it reads {"template", "special_tokens"} on stdin, limits itself, renders,
and exits 0, or 3 with the reason on stderr. It imports only jinja2, so it fits far below what torch needs.
"""

import json
import os
import resource
import subprocess
import sys
from typing import Any

CPU_LIMIT_S = 1  # an honest template needs a tenth of it, most of that to import jinja2
MEMORY_LIMIT_BYTES = 256 << 20
WALL_LIMIT_S = 60  # a template cannot sleep, but a crowded machine can make 1 s of CPU last
RENDERED_LIMIT_CHARS = 256 << 10
_REASON_LIMIT_CHARS = 300  # a template may have said it
REFUSED = 3

_USER = {"role": "user", "content": "Hello."}
_ASSISTANT = {"role": "assistant", "content": "Hi, how can I help?"}
_SYSTEM = {"role": "system", "content": "Be brief."}
_CALL = {"id": "call00000", "type": "function", "function": {"name": "look_up", "arguments": {"word": "flu"}}}
_TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
# With the tools of each. The first must render; the others may call raise_exception (some families know no
# system role), and those with tools may fail in any way: rows of that kind are then refused.
_CONVERSATIONS: tuple[tuple[list[dict[str, Any]], Any], ...] = (
    ([_USER], None),
    ([_SYSTEM, _USER], None),
    ([_USER, _ASSISTANT, _USER], None),
    ([_SYSTEM, _USER, _ASSISTANT, _USER, _ASSISTANT], None),
    (
        [
            _USER,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": "{}", "tool_call_id": "call00000", "name": "look_up"},
        ],
        _TOOLS,
    ),
)
# What rendering may raise beside jinja2's own errors.
RENDER_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class TemplateRefused(ValueError):
    """The chat template hangs, eats memory, breaks out of the sandbox, or does not render."""


def check_chat_template(template: str, *, special_tokens: dict[str, str]) -> None:
    """Raise TemplateRefused unless `template` renders short conversations within the limits.

    special_tokens: what the tokenizer would pass, such as {"bos_token": "<s>"}.
    """
    request = json.dumps({"template": template, "special_tokens": special_tokens})
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=request,
            capture_output=True,
            text=True,
            timeout=WALL_LIMIT_S,
            env={},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TemplateRefused("The chat template does not finish rendering.") from None
    if done.returncode < 0:
        raise TemplateRefused(
            f"The chat template does not finish rendering within {CPU_LIMIT_S} s of CPU time."
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise TemplateRefused(f"The chat template does not render: {lines[-1][:_REASON_LIMIT_CHARS]}")


def find_end_of_turn_ids(tokenizer: Any) -> list[int]:
    """The special token that the tokenizer's template writes after an assistant turn: 0 or 1 ids.

    A base model's `eos_token` is often not this token, and generation that only knows the former never stops.
    """
    if not tokenizer.chat_template:
        return []
    marker = "RESIDENCY-END-OF-TURN"
    messages = [_USER, {"role": "assistant", "content": marker}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    _, found, tail = text.rpartition(marker)
    if not found:
        return []
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next(([token_id] for token_id in ids if token_id in special), [])


def _build_environment() -> Any:
    """The sandbox that transformers renders templates in, rebuilt from jinja2 alone."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

        def _render(self, caller: Any) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda _format: "2000-01-01"
    return environment


def _render_all(template: str, special_tokens: dict[str, str]) -> str | None:
    """The reason to refuse, or None."""
    import jinja2
    import jinja2.exceptions

    try:
        compiled = _build_environment().from_string(template)
    except jinja2.TemplateError as error:
        return f"{type(error).__name__}: {error}"
    for index, (messages, tools) in enumerate(_CONVERSATIONS):
        for add_generation_prompt in (True, False):
            try:
                text = compiled.render(
                    messages=messages,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    **special_tokens,
                )
            except jinja2.exceptions.SecurityError as error:
                return f"SecurityError: {error}"
            except jinja2.TemplateError as error:
                if index == 0:
                    return f"{type(error).__name__}: {error}"
                continue
            except RENDER_ERRORS as error:
                if tools and not isinstance(error, MemoryError | RecursionError):
                    continue
                return f"{type(error).__name__}: {error}"
            if len(text) > RENDERED_LIMIT_CHARS:
                return f"{len(text)} characters for a short conversation"
            if index == 0 and add_generation_prompt and _USER["content"] not in text:
                return "the user's message is missing from the result"
    return None


def _main() -> int:
    request = json.load(sys.stdin)
    os.nice(19)  # one that hangs must not take the processor from those who wait for answers
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    refusal = _render_all(request["template"], request["special_tokens"])
    if refusal:
        sys.stderr.write(refusal)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main())
