"""Records of prompts as other projects write them, brought into one form: `prompt` or `messages`, and `kind`.

- `turns` (Spec-Bench, MT-Bench, SPEED-Bench): the first is the prompt; later ones would need an answer before them.
- `category` is the kind of text.
- `conversations` (ShareGPT): {"from": "human" or "gpt", "value"} are messages, and the answer at the end the response.
- `body` (a request of OpenAI's batch files): what it holds.
- messages whose content is a list of parts (OpenAI): the texts, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from probekit.errors import InputError

FIELDS = ("prompt", "messages", "response", "kind", "turns", "conversations", "category")
"""What is read of a record; a table needs one of `PROMPTS`."""
PROMPTS = ("prompt", "messages", "turns", "conversations")

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def normalised(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The record with `prompt` or `messages`, `response` and `kind`. Raises InputError, which names the place."""
    made = {name: record[name] for name in record if record[name] is not None}
    if not set(PROMPTS) & set(made) and isinstance(made.get("body"), Mapping):
        made |= {name: value for name, value in made["body"].items() if value is not None}
    if "kind" not in made and "category" in made:
        made["kind"] = made["category"]
    if "prompt" in made or "messages" in made:
        pass
    elif "turns" in made:
        made["prompt"] = _first_turn(made["turns"], where)
    elif "conversations" in made:
        messages = [_message(each, where) for each in _listed(made["conversations"], "conversations", where)]
        if len(messages) > 1 and messages[-1]["role"] == "assistant":
            made.setdefault("response", messages.pop()["content"])
        made["messages"] = messages
    if isinstance(made.get("messages"), Sequence) and not isinstance(made["messages"], str):
        made["messages"] = [_joined(message, where) for message in made["messages"]]
    return made


def _listed(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(f"{where}: `{name}` is no list of at least one entry.")
    return list(value)


def _first_turn(turns: Any, where: str) -> str:
    first = _listed(turns, "turns", where)[0]
    if not isinstance(first, str):
        raise InputError(f"{where}: the first of `turns` is a {type(first).__name__}; expected a text.")
    return first


def _message(entry: Any, where: str) -> dict[str, Any]:
    role = entry.get("from") if isinstance(entry, Mapping) else None
    if not isinstance(role, str) or role not in _ROLES or not isinstance(entry.get("value"), str):
        raise InputError(
            f'{where}: a conversation is a list of {{"from": .., "value": ..}}, from one of {", ".join(_ROLES)}.'
        )
    return {"role": _ROLES[role], "content": entry["value"]}


def _joined(message: Any, where: str) -> Any:
    """A message whose content is a list of parts, as one text; any other as it is."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(f"{where}: a message has a part of type {kind!r}; only text can be read.")
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}
