"""`residency chat`: one question, or a conversation, with the answer printed as it is made."""

import json
import readline  # noqa: F401 (gives input() its history and line editing)
import sys
import time
from collections.abc import Generator
from contextlib import closing
from typing import Annotated, Any

import typer

from api.client import Client, ClientError, Refused, Unreachable, connect
from api.commands.output import errors, plain, strip_controls

LOADING_PATIENCE_S = 600.0


def chat(
    model: Annotated[str, typer.Argument()],
    *,
    message: Annotated[str | None, typer.Option(help="Ask this one question and end.")] = None,
    system: Annotated[str | None, typer.Option(help="Instruction that comes before all else.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print the answer when it is whole.")
    ] = False,
) -> None:
    """Chat with a model. Without --message, a conversation that Ctrl-D ends."""
    client = connect()
    options = {"model": model, "temperature": temperature, "max_completion_tokens": max_tokens}
    messages = [{"role": "system", "content": system}] if system else []
    if message is not None:
        messages.append({"role": "user", "content": message})
        _say(client, options | {"messages": messages, "stream": not no_stream})
        return
    errors.print(f"Chatting with {model}. /new starts afresh, Ctrl-D ends.")
    beginning = list(messages)
    while (line := _read_line()) is not None:
        if line == "/new":
            messages = list(beginning)
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = _say(client, options | {"messages": messages, "stream": not no_stream})
            messages.append({"role": "assistant", "content": answer})
        except KeyboardInterrupt:
            messages.pop()
            errors.print("\n(stopped)")
        except ClientError as error:
            messages.pop()
            errors.print(plain(str(error)), style="red")


def _read_line() -> str | None:
    """The next line that is not blank; None at the end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if line:
            return line


def _say(client: Client, body: dict[str, Any]) -> str:
    """Print the answer as it comes and return it whole."""
    said = []
    spinner = errors.status(f"Waiting for {body['model']}")
    spinner.start()
    try:
        # Closing the answer early closes the connection, which ends the generation.
        with closing(_answer_when_loaded(client, body)) as pieces:
            for piece in pieces:
                spinner.stop()
                typer.echo(strip_controls(piece), nl=False)
                said.append(piece)
    finally:
        spinner.stop()
    typer.echo()
    return "".join(said)


def _answer_when_loaded(client: Client, body: dict[str, Any]) -> Generator[str, None, None]:
    """The pieces of the answer; a model that is still loading is waited for."""
    give_up_at = time.monotonic() + LOADING_PATIENCE_S
    while True:
        try:
            yield from _stream(client, body) if body["stream"] else _whole(client, body)
            return
        except Refused as error:
            if error.code != "model_loading" or time.monotonic() > give_up_at:
                raise
            time.sleep(1.0 if error.retry_after_s is None else min(error.retry_after_s, 10.0))


def _whole(client: Client, body: dict[str, Any]) -> Generator[str, None, None]:
    choice = client.post("/v1/chat/completions", **body)["choices"][0]
    yield choice["message"]["content"] or ""
    _note_end(choice)


def _stream(client: Client, body: dict[str, Any]) -> Generator[str, None, None]:
    with client.stream("/v1/chat/completions", **body) as lines:
        for line in lines:
            if not line.startswith("data:"):
                continue  # blank lines end frames, those with a colon first keep the connection alive
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            frame = json.loads(data)
            if frame.get("error"):
                raise ClientError(f"The answer broke off: {frame['error'].get('message')}")
            for choice in frame["choices"]:
                yield choice["delta"].get("content") or ""
                _note_end(choice)
    raise Unreachable("The answer broke off before its end.")


def _note_end(choice: dict[str, Any]) -> None:
    if choice.get("finish_reason") == "length":
        errors.print(" … (cut at the token limit)", style="dim", end="")
