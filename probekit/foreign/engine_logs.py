"""Texts that another system wrote, as token ids, out of what engines print: vLLM, SGLang, llama.cpp, TensorRT-LLM.

One JSON object a line (or one document, an object or a list). A text is read from the first of these that is there:
- `token_ids`, or `output_ids` (TensorRT-LLM, SGLang), or `tokens` (llama.cpp with `return_tokens`): a list of ids;
- `logprobs.content[].token_id`, `completion_probabilities[].id` (llama.cpp), `meta_info.output_token_logprobs[][1]`
  (SGLang): the ids that come with log-probabilities.
`choices` (OpenAI's servers) and `outputs` (vLLM in Python) hold several texts of one prompt. The prompt is
`prompt_token_ids` or `input_ids`, `meta_info.input_token_logprobs[][1]`, or `prompt`: ids, or a text to be encoded.
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
_HINT = "Ask the engine for token ids (vLLM: return_token_ids; SGLang: return_logprob; llama.cpp: return_tokens)."


class LoggedText(NamedTuple):
    """A prompt, as ids or as a text, and the ids that followed it. kind: as in a prompts file; may be empty."""

    prompt: tuple[int, ...] | str
    ids: tuple[int, ...]
    kind: str


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
    several = record.get("choices") or record.get("outputs") or [record]
    if not isinstance(several, Sequence) or not all(isinstance(each, Mapping) for each in several):
        raise InputError(f"{where}: `choices` or `outputs` is no list of objects.", _HINT)
    for each in several:
        prompt = _first(_PROMPTS, each, where) or _first(_PROMPTS, record, where) or _written(record, where)
        ids = _first(_TEXTS, each, where)
        if prompt is None or not ids:
            lacks = "the prompt" if prompt is None else "the token ids of its text"
            raise InputError(f"{where} lacks {lacks}; it has {', '.join(map(str, record))[:200]}.", _HINT)
        yield LoggedText(prompt, ids, str(record.get("kind") or record.get("category") or ""))


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
        except (KeyError, TypeError, IndexError):
            continue
        if found is not None:
            return _ids(found, where)
    return None


_TEXTS: tuple[Callable[[Any], Any], ...] = (
    lambda record: record["token_ids"],
    lambda record: record["output_ids"],
    lambda record: record["tokens"] or None,
    lambda record: [each["token_id"] for each in record["logprobs"]["content"]],
    lambda record: [each["id"] for each in record["completion_probabilities"]],
    lambda record: [each[1] for each in record["meta_info"]["output_token_logprobs"]],
)
_PROMPTS: tuple[Callable[[Any], Any], ...] = (
    lambda record: record["prompt_token_ids"],
    lambda record: record["input_ids"],
    lambda record: [each[1] for each in record["meta_info"]["input_token_logprobs"]],
)


def _ids(found: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(found, Sequence) and not isinstance(found, str)
    if not whole or not all(type(one) is int and 0 <= one <= MOST_ID for one in found):
        raise InputError(f"{where}: token ids are whole numbers of at least 0, not {str(found)[:60]}.", _HINT)
    return tuple(found)
