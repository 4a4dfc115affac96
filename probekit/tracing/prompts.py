"""Prompts: from files, from chat messages, from the bundled sets; and how they become token ids. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from probekit.errors import InputError
from probekit.foreign.bounded import Bounded
from probekit.foreign.engine_logs import read_log
from probekit.foreign.prompt_files import READERS, STREAMS, read_dataset_folder
from probekit.foreign.prompt_records import normalised
from probekit.foreign.text import check_text

BUNDLED_SETS = ("tales", "general")


@dataclass(frozen=True)
class Prompt:
    """One prompt, named everywhere by its index.

    text: plain text; empty where `messages` are given.
    kind: what sort of prompt it is, for tables; may be empty.
    messages: chat messages, {"role", "content"}, which go through the tokenizer's chat template.
    response: the text that is scored after the prompt when given text is traced.
    ids, response_ids: token ids in place of texts, taken as they are; for models without a tokenizer, and for texts
        whose tokens are known.
    source: the file or the bundled set that it came from; empty for one from Python.
    """

    index: int
    text: str = ""
    kind: str = ""
    messages: tuple[Mapping[str, str], ...] | None = None
    response: str | None = None
    ids: tuple[int, ...] | None = None
    response_ids: tuple[int, ...] | None = None
    source: str = field(default="", compare=False)


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model will read it.

    text: what was encoded. ids: token ids of the whole. context: how many of them are context (P, at least 1); the
    ids behind them are the given text, if there is any.
    """

    prompt: Prompt
    text: str
    ids: tuple[int, ...]
    context: int


def load_prompts(path: str | os.PathLike[str], *, chat: bool = False, given: bool = False) -> list[Prompt]:
    """Read prompts, in the order of the file.

    Parameters
    ----------
    path: `.txt` (a prompt a line), `.jsonl` (objects with `prompt` or `messages`, and perhaps `kind` and
        `response`), `.json` (an array of such objects, or of texts),
        `.csv` or `.parquet` (a `prompt` column, and perhaps those), or a folder with a local dataset.
    chat: make each plain prompt the message of a user.
    given: a closing message of the assistant is the response; it and `response` are what is scored.

    Raises InputError, which names the line, for anything that is not a prompt.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import probekit
    >>> file = pathlib.Path(tempfile.mkdtemp(), "prompts.txt")
    >>> _ = file.write_text("Once upon a time\\nThe king\\n")
    >>> [prompt.text for prompt in probekit.load_prompts(file)]
    ['Once upon a time', 'The king']
    """
    path = _there(path)
    return list(_prompts_of(path, _records(path, READERS), chat=chat, given=given))


def stream_prompts(path: str | os.PathLike[str], *, chat: bool = False, given: bool = False) -> Iterator[Prompt]:
    """The prompts of `load_prompts`, one after the other: Parquet and Arrow files, of any size, are never held whole.

    Raises InputError at once for a file that is not there, and as `load_prompts` on the way.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import probekit
    >>> file = pathlib.Path(tempfile.mkdtemp(), "prompts.txt")
    >>> _ = file.write_text("Once upon a time\\nThe king\\n")
    >>> next(probekit.stream_prompts(file)).text
    'Once upon a time'
    """
    path = _there(path)
    return _prompts_of(path, _records(path, {**READERS, **STREAMS}), chat=chat, given=given)


def _there(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not os.path.exists(path):
        raise InputError(
            f"there is no prompts file {path}.", "Name a .txt, .jsonl, .json, .csv or .parquet file, or a folder."
        )
    if not os.path.isdir(path) and path.suffix.lower() not in READERS:
        raise InputError(
            f"{path} ends in {path.suffix!r}; expected .txt, .jsonl, .json, .csv or .parquet, or a dataset folder."
        )
    if not os.path.isdir(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise InputError(f"{path} cannot be read: it is no regular file.", "Write what it gives into a file.")
    return path


def _records(path: Path, readers: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return read_dataset_folder(path, readers) if os.path.isdir(path) else readers[path.suffix.lower()](path)


def _prompts_of(path: Path, records: Iterator[tuple[str, Any]], *, chat: bool, given: bool) -> Iterator[Prompt]:
    index = -1
    for index, (where, record) in enumerate(records):
        yield replace(_prompt(index, record, f"{path}, {where}", chat=chat, given=given), source=str(path))
    if index < 0:
        raise InputError(f"{path} holds no prompt: it is empty.", "Write at least one prompt into it.")


def load_log(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read texts that the model wrote elsewhere, as token ids, from the answers of an engine.

    path: `.jsonl` or `.json`, in the forms of `probekit.foreign.engine_logs`. Trace them with `logged=True`.

    Raises InputError, which names the line, for a record without token ids.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import probekit
    >>> file = pathlib.Path(tempfile.mkdtemp(), "log.jsonl")
    >>> _ = file.write_text('{"prompt_token_ids": [1, 5, 9], "token_ids": [7, 2]}\\n')
    >>> [(prompt.ids, prompt.response_ids) for prompt in probekit.load_log(file)]
    [((1, 5, 9), (7, 2))]
    """
    prompts = []
    for index, logged in enumerate(read_log(Path(path))):
        ids = None if isinstance(logged.prompt, str) else logged.prompt
        text = logged.prompt if isinstance(logged.prompt, str) else ""
        turns = None
        if logged.messages is not None:
            record = {"messages": logged.messages}
            turns = _prompt(index, record, f"{path}, text {index}", chat=False, given=False).messages
        prompts.append(
            Prompt(index, text, logged.kind, messages=turns, ids=ids, response_ids=logged.ids, source=str(path))
        )
    return prompts


def bundled_prompts(name: str) -> list[Prompt]:
    """A bundled set of 24: `tales` (openings from a book of fairy tales) or `general` (six kinds of four)."""
    if name not in BUNDLED_SETS:
        raise InputError(f"there is no bundled prompt set {name!r}; there are {', '.join(BUNDLED_SETS)}.")
    lines = files("probekit.tracing").joinpath("bundled", f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    records = map(json.loads, lines)
    return [
        Prompt(index, record["prompt"], record["kind"], source=f"bundled: {name}")
        for index, record in enumerate(records)
    ]


def bundled_prompts_for(model_name: str) -> list[Prompt]:
    """The bundled set that suits a model: tales for the models that were trained on tales, general for others."""
    return bundled_prompts("tales" if model_name.startswith("tales-") else "general")


def as_prompts(
    prompts: Iterable[Prompt | str | Sequence[int] | Mapping[str, Any]], *, chat: bool = False, given: bool = False
) -> list[Prompt]:
    """Prompts from Python: texts, lists of token ids, records as in a `.jsonl` file, or Prompts (indices kept).

    A Path is a file of them, as `load_prompts` reads it.
    A list of chat messages is one prompt, a list of such lists as many, as in transformers' pipelines. A DataFrame and
    a `datasets.Dataset` are records, with the columns of a `.jsonl` file's objects.
    """
    made = list(each_prompt(prompts, chat=chat, given=given))
    if len({prompt.index for prompt in made}) < len(made):
        raise InputError("two prompts have the same index.", "Number them apart.")
    return made


def each_prompt(
    prompts: Iterable[Prompt | str | Sequence[int] | Mapping[str, Any]], *, chat: bool = False, given: bool = False
) -> Iterator[Prompt]:
    """The same, one after the other, as the prompts come: from a generator or a streamed `datasets` set, too."""
    if isinstance(prompts, os.PathLike):
        yield from stream_prompts(prompts, chat=chat, given=given)
        return
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        what = "one text" if isinstance(prompts, str) else f"a {type(prompts).__name__}"
        raise InputError(f"prompts are a list of texts, not {what}.", 'Write ["..."].')
    if hasattr(prompts, "to_dict") and hasattr(prompts, "columns"):
        prompts = _records_of(prompts)
    coming: Iterator[Any] = iter(prompts)
    first = next(coming, None)
    if first is None:
        raise InputError("there is no prompt.", "Give at least one.")
    coming = chain([first], coming)
    if _is_message(first):  # messages of one prompt, or records that are none
        listed = list(coming)
        coming = iter([listed] if all(map(_is_message, listed)) else listed)
    for index, prompt in enumerate(coming):
        yield _one_of(prompt, index, chat=chat, given=given)


def _one_of(prompt: Any, index: int, *, chat: bool, given: bool) -> Prompt:
    if isinstance(prompt, Prompt):
        return _again(prompt, chat=chat, given=given)
    if isinstance(prompt, str | Mapping):
        record = {"prompt": prompt} if isinstance(prompt, str) else prompt
        return _prompt(index, record, f"prompt {index}", chat=chat, given=given)
    if isinstance(prompt, Sequence) and prompt and all(map(_is_message, prompt)):
        return _prompt(index, {"messages": list(prompt)}, f"prompt {index}", chat=chat, given=given)
    return _again(Prompt(index, ids=_token_ids(prompt, index)), chat=chat, given=given)


def _records_of(frame: Any) -> list[dict[str, Any]]:
    """The rows of a DataFrame, without the cells that are missing."""
    return [
        {name: value for name, value in record.items() if not (pd.api.types.is_scalar(value) and pd.isna(value))}
        for record in frame.to_dict("records")
    ]


def _is_message(record: Any) -> bool:
    return isinstance(record, Mapping) and {"role", "content"} <= set(record)


def _token_ids(given: Any, index: int) -> tuple[int, ...]:
    """Token ids as a list, an array or a tensor of whole numbers, one dimension."""
    listed = given.tolist() if hasattr(given, "tolist") else given
    whole = isinstance(listed, Sequence) and all(isinstance(one, int) and not isinstance(one, bool) for one in listed)
    if not whole:
        raise InputError(
            f"prompt {index} is {_short(given)}; expected a text, chat messages or token ids.",
            "A batch of token ids is a list of lists.",
        )
    return tuple(listed)


def _again(prompt: Prompt, *, chat: bool, given: bool) -> Prompt:
    """A Prompt that was made elsewhere, checked like any other."""
    where = f"prompt {prompt.index}"
    if prompt.ids is not None:
        if not prompt.ids:
            raise InputError(f"{where} has no token ids.", "Give at least one.")
        return prompt
    words = {"prompt": prompt.text} if prompt.messages is None else {"messages": list(prompt.messages)}
    record = {**words, "kind": prompt.kind, "response": prompt.response}
    made = _prompt(prompt.index, record, where, chat=chat, given=given)
    return replace(made, source=prompt.source, response_ids=prompt.response_ids)


def _prompt(index: int, record: Any, where: str, *, chat: bool, given: bool) -> Prompt:
    """Check one record and make it a prompt."""
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: expected an object with `prompt` or `messages`, not {_short(record)}.")
    given_names = record
    record = normalised(record, where)
    text, messages = record.get("prompt"), record.get("messages")
    response, kind = record.get("response"), record.get("kind") or ""
    if text is None and messages is None:
        if "prompt" in given_names:
            raise InputError(f"{where}: `prompt` is null; expected a text.")
        raise InputError(
            f"{where}: there is no `prompt`; it has {', '.join(map(str, given_names)) or 'nothing'}.",
            "Rename one." if given_names else "",
        )
    if messages is None:
        if not isinstance(text, str):
            raise InputError(f"{where}: `prompt` is {_short(text)}; expected a text.")
        if not text.strip():
            raise InputError(f"{where}: the prompt is empty.", "Write one, or delete the line.")
        if chat:
            text, messages = "", [{"role": "user", "content": text}]
    else:
        _check_messages(messages, where)
        text = ""
        if given and response is None and messages[-1]["role"] == "assistant":
            *messages, last = messages
            response = last["content"]
    if response is not None and (not isinstance(response, str) or not response.strip()):
        raise InputError(f"{where}: `response` is {_short(response)}; expected a text that is not empty.")
    for name, said in (("prompt", text), ("response", response or ""), ("kind", str(kind))):
        check_text(said, f"{where}: `{name}`")
    for message in messages or ():
        for name, said in message.items():
            check_text(str(said), f"{where}: `{name}` of a message")
    turns = None if messages is None else tuple(dict(message) for message in messages)
    if turns is not None and not turns:
        raise InputError(f"{where}: there is no message before the response.")
    return Prompt(index, text, str(kind), turns, response)


def _check_messages(messages: Any, where: str) -> None:
    whole = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0
    if not whole or not all(
        isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    ):
        raise InputError(
            f'{where}: `messages` is {_short(messages)}; expected a list of {{"role": .., "content": ..}}.'
        )
    if not messages[-1]["content"].strip():
        raise InputError(f"{where}: the last message is empty.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def chat_template(tokenizer: Any) -> Bounded:
    """The tokenizer's chat template, for `encode`: a stranger's program, in a process of its own. A context.

    It is what the tokenizer holds at the first text: a template that is changed later wants another one.
    """
    return Bounded(lambda messages: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode(prompt: Prompt, tokenizer: Any, *, given: bool = False, template: Bounded | None = None) -> Encoded:
    """The token ids of a prompt: as `tokenizer(prompt)` makes them, or through the chat template for messages.

    With `given`, prompt and response are encoded together, as one text, and what both encodings begin with is the
    context: a token that spans the border is scored. Without a response, all of the text is scored but its first
    token, which nothing precedes. template: `chat_template(tokenizer)`, where it is used for several prompts.
    """
    if prompt.ids is not None:
        whole = prompt.ids + (prompt.response_ids or ()) if given else prompt.ids
        context = 1 if given and prompt.response_ids is None else len(prompt.ids)
        return Encoded(prompt, prompt.text, whole, context)
    if tokenizer is None:
        raise InputError("this model has no tokenizer, which prompts need.", "Load it from a folder that has one.")
    if prompt.messages is None:
        text, special = prompt.text, True
    else:
        text, special = _through_template(prompt, tokenizer, template), False
    ids = _ids(tokenizer, text, special)
    if not given:
        return Encoded(prompt, text, ids, len(ids))
    if prompt.response_ids is not None:
        return Encoded(prompt, text, ids + prompt.response_ids, len(ids))
    if prompt.response is None:
        return Encoded(prompt, text, ids, 1)
    whole = _ids(tokenizer, text + prompt.response, special)
    shared = next((place for place, (one, two) in enumerate(zip(ids, whole, strict=False)) if one != two), len(ids))
    return Encoded(prompt, text, whole, max(1, min(shared, len(whole))))


def _ids(tokenizer: Any, text: str, special: bool) -> tuple[int, ...]:
    check_text(text, "a text" if special else "a text from the chat template")
    return tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _through_template(prompt: Prompt, tokenizer: Any, template: Bounded | None) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "this model's tokenizer has no chat template, which messages need.", "Give plain prompts, without --chat."
        )
    what = f"prompt {prompt.index}: the chat template of this model, with these messages,"
    messages = [dict(message) for message in prompt.messages or ()]
    if template is not None:
        return template.text(messages, what)
    with chat_template(tokenizer) as once:
        return once.text(messages, what)
