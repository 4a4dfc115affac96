"""The options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probekit.errors import InputError
from probekit.models.placement import check_device_name, check_dtype_name

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A bundled name, a Hugging Face id, a local folder or a GGUF file.")
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="FOLDER", help="An adapter of MODEL, as peft saves it (LoRA and the like)."),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `probekit trace` wrote.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ... [default: cuda if there is one]")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Keeps dequantised copies of GGUF files; none: keep none. [default: ~/.cache/probekit, by XDG]",
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="auto[:DEVICE=SIZE,..]",
        help="Deals a large model out over GPUs, memory and disk: auto, or auto:0=70GiB,cpu=100GiB.",
    ),
]
TensorParallel = Annotated[
    bool, typer.Option("--tensor-parallel", help="Split every layer over the processes that torchrun started.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no remarks.")]
Debug = Annotated[bool, typer.Option("--debug", "-v", help="Show the traceback of an error.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Budget of new tokens for each prompt.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k most probable tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the smallest set of this probability; 1 keeps all.")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random draw.")]
Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", help=".txt, .jsonl, .json, .csv, .parquet or a dataset folder. [default: bundled]"),
]
ExitLayers = Annotated[str | None, typer.Option("--exit-layers", help="As 2,4,8 or 1-11. [default: all]")]
DraftLengths = Annotated[str | None, typer.Option("--draft-lengths", help="As 1,2,4 or 1-8. [default: 1-8]")]
DraftModel = Annotated[
    str | None, typer.Option("--draft-model", help="A second model with the same tokenizer, that drafts.")
]

BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Most prompts in a batch. [default: from the memory at hand]")
]
DraftVocabulary = Annotated[
    Path | None,
    typer.Option("--draft-vocabulary", metavar="RUN", help="Draft heads keep this run's most frequent tokens first."),
]
DraftRows = Annotated[
    int | None,
    typer.Option("--draft-rows", help="Exit layers draft with the head's rows of so many tokens. [default: all]"),
]
Engine = Annotated[
    str, typer.Option("--engine", help="host, or cuda: whole rounds recorded into CUDA graphs (not yet run on a GPU).")
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="No row depends, bit for bit, on how many are computed with it; slower, and no near-tie decides anything.",
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        "--policy",
        help="When a round stops drafting early: fixed (never), confidence:0.6, or your own module.Class.",
    ),
]
Drafter = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        help="Who drafts: exit, model, ngram:N, suffix, imported:FILE or tree:4x2x1. "
        "[default: every exit, and the run's draft model]",
    ),
]
ExitHeads = Annotated[
    Path | None,
    typer.Option(
        "--exit-heads", metavar="FILE", help="Exit layers draft through these: `fit-heads`, a tuned or a Jacobian lens."
    ),
]


MOST = 10_000  # layers, drafts in a round, or numbers at all: a slip of the keyboard should cost no memory
MOST_TOKENS = 10_000_000  # in a cache


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def integers(text: str | None, name: str, most: int = MOST) -> list[int] | None:
    """`2,4,8`, `1-8` or a mixture as a sorted list without repeats; None stays None (the default)."""
    if text is None:
        return None
    numbers: set[int] = set()
    try:
        for piece in text.split(","):
            first, dash, last = piece.strip().partition("-")
            ends = int(first), int(last if dash else first)
            if max(map(abs, ends)) > most:
                raise InputError(f"{name} names {piece.strip()}; numbers up to {most:,} make sense here.")
            if ends[1] - ends[0] > MOST:
                raise InputError(f"{name} names {piece.strip()}, more than {MOST:,} numbers.")
            numbers.update(range(ends[0], ends[1] + 1))
    except ValueError:
        raise InputError(f"{name} is {_short(text)}; expected whole numbers as 2,4,8 or 1-8.") from None
    if not numbers:
        raise InputError(f"{name} is {text!r}, which names no number.", "Write the smaller number first: 1-8.")
    return sorted(numbers)


def counts(text: str | None, name: str, most: int = MOST) -> list[int] | None:
    """The same for what there is at least one of."""
    numbers = integers(text, name, most)
    if numbers is not None:
        at_least_one(numbers[0], name)
    return numbers


def at_least(least: int, value: int, name: str) -> int:
    if value < least:
        raise InputError(f"{name} is {value}; expected {least} or more.")
    return value


def check_place(device: str | None, dtype: str | None) -> None:
    """Raise InputError for a device or a dtype that no machine has, also where a command has no use for it."""
    if device is not None:
        check_device_name(device)
    if dtype is not None:
        check_dtype_name(dtype)


def within(least: int, most: int, value: int, name: str) -> int:
    if not least <= value <= most:
        raise InputError(f"{name} is {value}; expected {least} to {most:,}.")
    return value


def at_least_one(value: int, name: str) -> int:
    return at_least(1, value, name)
