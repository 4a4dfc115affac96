"""Texts that another system wrote, as token ids, out of what engines print: vLLM, SGLang, llama.cpp, TensorRT-LLM.

One JSON object a line (or one document, an object or a list). A text is read from the first of these that is there:
- `token_ids`, `output_ids` (TensorRT-LLM, SGLang), `response_token_ids` (SGLang's OpenAI server), or `tokens`
  (llama.cpp with `return_tokens`): a list of ids;
- `completion_probabilities[].id` (llama.cpp), `logprobs.content[].id` (its OpenAI server) or `.token_id`, and
  `meta_info.output_token_logprobs[][1]` (SGLang): the ids that come with log-probabilities; or "token_id:5" in place of
  a token's text, `logprobs.tokens[]` and `logprobs.content[].token` (vLLM with `return_tokens_as_token_ids`).
`choices` (OpenAI's servers) and `outputs` (vLLM in Python) hold several texts of one prompt. The prompt is
`prompt_token_ids` or `input_ids`, `meta_info.input_token_logprobs[][1]`, or `prompt`: ids, or a text to be encoded; or
`messages`, for the chat template. An answer may stand in `response` (in its `body`, as OpenAI's batches have it), and
what was asked in `request`, as proxies log them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from probekit.errors import InputError
from probekit.foreign.json import read_json
from probekit.foreign.prompt_files import READERS

MOST_ID = 2**31 - 1
_HINT = (
    "Ask the engine for token ids (vLLM: return_token_ids; SGLang: return_logprob; llama.cpp: return_tokens), and "
    "write the prompt beside them where its answer has none."
)


class LoggedText(NamedTuple):
    """A prompt, as ids, a text or chat messages, and the ids that followed it. kind: as in a prompts file, or empty."""

    prompt: tuple[int, ...] | str
    ids: tuple[int, ...]
    kind: str
    messages: list[dict[str, Any]] | None = None


def read_log(path: str | Path) -> list[LoggedText]:
    """The texts of a log, in its order. Raises InputError, which names the line, for a record without token ids."""
    path = Path(path)
    texts = [text for where, record in _records(path) for text in _texts(record, f"{path}, {where}")]
    if not texts:
        raise InputError(f"{path} holds no text.", _HINT)
    return texts


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    if not os.path.exists(path):
        raise InputError(f"there is no log file {path}.", "Name a .json or .jsonl file of an engine's answers.")
    if path.suffix.lower() == ".jsonl":
        yield from READERS[".jsonl"](path)
        return
    document = read_json(path)
    for number, record in enumerate(document if isinstance(document, list) else [document]):
        yield f"entry {number}", record


def _texts(record: Any, where: str) -> Iterator[LoggedText]:
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: expected an object, not {type(record).__name__}.", _HINT)
    answer, asked = _unpacked(record, "response"), _unpacked(record, "request")
    several = answer.get("choices") or answer.get("outputs") or [answer]
    if not isinstance(several, Sequence) or not all(isinstance(each, Mapping) for each in several):
        raise InputError(f"{where}: `choices` or `outputs` is no list of objects.", _HINT)
    for each in several:
        places = (each, answer, record, asked)
        prompt: tuple[int, ...] | str | None = next(
            (ids for place in places if (ids := _first(_PROMPTS, place, where))), None
        )
        if isinstance(prompt, tuple):
            _check_whole(prompt, each, where)
        else:
            prompt = next((text for place in places if (text := _written(place, where))), None)
        messages = None if prompt is not None else (record.get("messages") or asked.get("messages"))
        ids = _first(_TEXTS, each, where)
        if (prompt is None and messages is None) or not ids:
            lacks = "the token ids of its text" if not ids else "the prompt"
            raise InputError(f"{where} lacks {lacks}; it has {', '.join(map(str, record))[:200]}.", _HINT)
        kind = str(record.get("kind") or record.get("category") or "")
        yield LoggedText(prompt or "", ids, kind, messages)


def _unpacked(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The answer, or what was asked, where a record holds it by that name; for an answer else the record itself."""
    inner = record.get(name)
    body = inner.get("body", inner) if isinstance(inner, Mapping) else None
    if isinstance(body, Mapping):
        return body
    return record if name == "response" else {}


def _check_whole(prompt: tuple[int, ...], answer: Mapping[str, Any], where: str) -> None:
    """SGLang gives log-probabilities from `logprob_start_len` on: by default none of the prompt's but the last."""
    meta = answer.get("meta_info")
    tokens = meta.get("prompt_tokens") if isinstance(meta, Mapping) else None
    if isinstance(tokens, int) and tokens != len(prompt):
        raise InputError(
            f"{where} has the ids of {len(prompt)} of the {tokens} tokens of its prompt.",
            "Ask SGLang for all of them: logprob_start_len=0; or write them beside the answer, as `input_ids`.",
        )


def _written(record: Mapping[str, Any], where: str) -> tuple[int, ...] | str | None:
    """`prompt` as an engine was given it: ids, or a text."""
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        return prompt if prompt.strip() else None
    return None if prompt is None else _ids(prompt, f"{where}: `prompt`") or None


def _first(readers: Sequence[Callable[[Any], Any]], record: Any, where: str) -> tuple[int, ...] | None:
    """What the first reader finds that finds anything."""
    for read in readers:
        try:
            found = read(record)
        except (KeyError, TypeError, IndexError, AttributeError):
            continue
        if found is not None:
            return _ids(found, where)
    return None


_TEXTS: tuple[Callable[[Any], Any], ...] = (
    lambda record: record["token_ids"],
    lambda record: record["output_ids"],
    lambda record: record["response_token_ids"],
    lambda record: record["tokens"] or None,
    lambda record: [each["token_id"] for each in record["logprobs"]["content"]],
    lambda record: [each["id"] for each in record["logprobs"]["content"]],
    lambda record: [_named_id(each["token"]) for each in record["logprobs"]["content"]],
    lambda record: [_named_id(each) for each in record["logprobs"]["tokens"]],
    lambda record: [each["id"] for each in record["completion_probabilities"]],
    lambda record: [each[1] for each in record["meta_info"]["output_token_logprobs"]],
)
_PROMPTS: tuple[Callable[[Any], Any], ...] = (
    lambda record: record["prompt_token_ids"],
    lambda record: record["input_ids"],
    lambda record: [each[1] for each in record["meta_info"]["input_token_logprobs"]],
)


def _named_id(token: Any) -> int:
    """5 of "token_id:5"; TypeError for the text of a token."""
    name, colon, number = token.partition(":")
    if name != "token_id" or not colon or not number.isdecimal():
        raise TypeError(f"{token!r} is a token's text")
    return int(number)


def _ids(found: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(found, Sequence) and not isinstance(found, str)
    if not whole or not all(type(one) is int and 0 <= one <= MOST_ID for one in found):
        raise InputError(f"{where}: token ids are whole numbers of at least 0, not {str(found)[:60]}.", _HINT)
    return tuple(found)
