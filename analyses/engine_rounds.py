"""Do other engines make the rounds that a trace predicts? Counted inside transformers, vLLM and llama.cpp.

    python analyses/engine_rounds.py transformers -o docs/results/engines
    python analyses/engine_rounds.py vllm --environments build/engines -o docs/results/engines
    python analyses/engine_rounds.py llama.cpp --environments build/engines -o docs/results/engines

Three models, four pairs (exit layer, draft length) each, n-grams, and a draft model of its own where there is one. The
exit is the draft checkpoint that `probekit export` cuts: the engine knows it as a draft model (transformers also as its
own early exit), and is told what the export says. One trace predicts every round; the engine decodes the same prompts
greedily in float32 and counts for itself. The trace is a little longer than the engine's budget, for vLLM drafts and
accepts past it. The record is written after every cell; a run that was cut short goes on where it ended.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import engine_environments as environments
import typer
from engine_turns import HELPERS
from fetch_real_models import fetch
from rich.console import Console

from probekit.drafting.drafters import Drafter, DraftModel, ExitLayer
from probekit.drafting.text_drafters import PromptLookup
from probekit.engines.engine import Drafting
from probekit.engines.known import ENGINES
from probekit.files import atomic_text
from probekit.models.cut import cut_checkpoint
from probekit.models.loaded import Loaded, load
from probekit.settings import Sampling
from probekit.tracing.prompts import as_prompts, bundled_prompts_for
from probekit.tracing.tracer import trace
from probekit.validation.engine_rounds import EngineRun, compared
from probekit.validation.llama_cpp import llama_cpp_rounds
from probekit.validation.open_engine import EngineHome
from probekit.validation.transformers import (
    transformers_accepted,
    transformers_assisted,
    transformers_lookup,
    verified,
)
from probekit.validation.vllm import vllm_rounds

CELLS = {
    "tales-layerskip": ((1, 2), (3, 3), (6, 4), (9, 5)),
    "smollm2": ((10, 2), (20, 3), (25, 4), (28, 5)),
    "qwen2.5-coder": ((8, 2), (16, 3), (20, 4), (22, 5)),
}
LOOKUPS = {
    "transformers": (PromptLookup(2), PromptLookup(3)),
    "vllm": (PromptLookup(2, rule="vllm"), PromptLookup(3, 2, rule="vllm")),
    "llama.cpp": (PromptLookup(1, rule="llama.cpp", copied=4), PromptLookup(2, rule="llama.cpp", copied=4)),
}
LOOKUP_LENGTH = 4
HELPER_LENGTH = 3
OF_ITS_OWN = "draft model of its own"
CONVENTION = {name: ENGINES[name].first_round for name in LOOKUPS}
PAST = 8  # tokens that are traced beyond the engine's budget
SCHEMA = "probekit/engine-rounds/1"
RESULTS = Path("docs/results/engines")


@dataclass(frozen=True)
class Job:
    """One drafter at one length in one engine, ready to run: name in the table, and prompts -> the engine's run."""

    name: str
    drafter: Drafter
    draft_length: int
    run: Callable[[Sequence[Sequence[int]]], EngineRun]


def main(
    engine: Annotated[str, typer.Argument(help=" or ".join(LOOKUPS))],
    output: Annotated[Path, typer.Option("--output", "-o", help="Receives ENGINE.json.")] = RESULTS,
    models: Annotated[str, typer.Option(help="With commas between.")] = ",".join(CELLS),
    prompts: Annotated[int, typer.Option(min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    folder: Annotated[Path, typer.Option("--environments", help="Where engines are, or are set up.")] = Path(
        "build/engines"
    ),
    cache: Annotated[Path, typer.Option(help="Holds the published models.")] = Path("~/.cache/probekit"),
) -> None:
    place = environments.ENGINES[engine](folder.absolute()) if engine in environments.ENGINES else Path()
    settings = {"prompts": prompts, "max_new_tokens": max_new_tokens, "traced_tokens": max_new_tokens + PAST,
                "dtype": "float32", "temperature": 0}  # fmt: skip
    record = begun(output / f"{engine}.json", engine, settings)
    for name in models.split(","):
        loaded = load(name if name == "tales-layerskip" else fetch(name, cache.expanduser()), device="cpu",
                      dtype="float32", cache=cache.expanduser())  # fmt: skip
        chosen = as_prompts(bundled_prompts_for(loaded.name))[:: max(1, 24 // prompts)][:prompts]
        helper = load(HELPERS[name], device="cpu", dtype="float32") if name in HELPERS else None
        run = trace(loaded, chosen, max_new_tokens=max_new_tokens + PAST, draft_model=helper)
        ids = [run.prompt_ids(prompt).tolist() for prompt in run.prompts]
        models_folder = folder.absolute() / "models" / loaded.name
        for job in jobs(engine, place, loaded, CELLS[name], helper, max_new_tokens, models_folder):
            cell = {"model": loaded.name, "family": loaded.anatomy.family.model_type, "way": job.name,
                    "drafter": job.drafter.key.label, "draft_length": job.draft_length}  # fmt: skip
            if any(cell.items() <= row.items() for row in record["rows"]):
                continue
            done = job.run(ids)
            found = compared(
                run, job.drafter, job.draft_length, done.texts, CONVENTION[engine], max_new_tokens,
                drafted=engine != "transformers",
            )  # fmt: skip
            record["versions"] |= {f"engine: {name}": each for name, each in done.versions.items()}
            record["rows"].append({**cell, **found.to_json(), "counters": dict(done.counters)})
            atomic_text(output / f"{engine}.json", json.dumps(record, indent=1) + "\n")
            Console(soft_wrap=True).print(
                f"{loaded.name}: {job.name} {found.label} x {found.draft_length}: rounds equal in {found.rounds_equal} "
                f"of {found.prompts} texts, tokens in {found.tokens_equal}; {dict(found.measured)}", markup=False,
            )  # fmt: skip


def begun(path: Path, engine: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of this engine at these settings and versions, as far as it was written; a new one, else."""
    new = {
        "schema": SCHEMA, "engine": engine, "convention": CONVENTION[engine], "settings": settings,
        "machine": {"processor": platform.processor() or platform.machine(), "system": platform.system()},
        "versions": {name: version(name) for name in ("probekit", "torch", "transformers")}
        | {"packages": " ".join(environments.PACKAGES.get(engine, ()))},
        "rows": [],
    }  # fmt: skip
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        return new
    old = json.loads(path.read_text(encoding="utf-8"))
    same = {**old, "rows": [], "versions": {name: old["versions"].get(name) for name in new["versions"]}} == new
    return old if same else new


def jobs(
    engine: str,
    place: Path,
    loaded: Loaded,
    cells: Sequence[tuple[int, int]],
    helper: Loaded | None,
    budget: int,
    folder: Path,
) -> Iterator[Job]:
    """What one engine runs of one model."""
    make = {"transformers": in_transformers, "vllm": in_vllm, "llama.cpp": in_llama_cpp}[engine]
    yield from make(place, loaded, cells, helper, budget, folder)


def in_transformers(
    place: Path, loaded: Loaded, cells: Sequence[tuple[int, int]], helper: Loaded | None, budget: int, folder: Path
) -> Iterator[Job]:
    def each(count: Callable[[Sequence[int]], Any]) -> Callable[[Sequence[Sequence[int]]], EngineRun]:
        def run(prompts: Sequence[Sequence[int]]) -> EngineRun:
            texts = [verified(count(ids)) for ids in prompts]
            return EngineRun(texts, {}, [None] * len(texts), {"transformers": version("transformers")})

        return run

    for exit_layer, length in cells:
        yield Job(
            "early exit", ExitLayer(exit_layer), length,
            each(lambda ids, at=exit_layer, k=length: transformers_accepted(loaded, ids, at, k, budget)),
        )  # fmt: skip
        drafter = load(cut_checkpoint(loaded, exit_layer, folder / f"drafter-{exit_layer}"), device="cpu",
                       dtype="float32")  # fmt: skip
        yield Job(
            "draft model", ExitLayer(exit_layer), length,
            each(lambda ids, by=drafter, k=length: transformers_assisted(loaded, by, ids, k, budget)),
        )  # fmt: skip
    for lookup in LOOKUPS["transformers"]:
        yield Job(
            "n-gram", lookup, LOOKUP_LENGTH,
            each(lambda ids, n=lookup.ngram: transformers_lookup(loaded, ids, n, LOOKUP_LENGTH, budget)),
        )  # fmt: skip
    if helper is not None:
        yield Job(
            OF_ITS_OWN, DraftModel(helper.name, helper), HELPER_LENGTH,
            each(lambda ids, by=helper: transformers_assisted(loaded, by, ids, HELPER_LENGTH, budget)),
        )  # fmt: skip


def in_vllm(
    python: Path, loaded: Loaded, cells: Sequence[tuple[int, int]], helper: Loaded | None, budget: int, folder: Path
) -> Iterator[Job]:
    home = EngineHome("vllm", loaded, folder, python, helper=helper)

    def way(name: str, drafter: Drafter, length: int) -> Job:
        config = home.told(Drafting.with_drafter(drafter, length, Sampling()))["speculative_config"]
        return Job(name, drafter, length, lambda prompts: vllm_rounds(python, home.whole(), prompts, budget, config))

    for exit_layer, length in cells:
        yield way("draft model", ExitLayer(exit_layer), length)
    for lookup in LOOKUPS["vllm"]:
        yield way("n-gram", lookup, LOOKUP_LENGTH)
    if helper is not None:
        yield way(OF_ITS_OWN, DraftModel(helper.name, helper), HELPER_LENGTH)


def in_llama_cpp(
    server: Path, loaded: Loaded, cells: Sequence[tuple[int, int]], helper: Loaded | None, budget: int, folder: Path
) -> Iterator[Job]:
    """Weights in float32: with quantised ones llama.cpp rounds the activations, too, and is another model."""
    home = EngineHome("llama.cpp", loaded, folder, server, plain=True, helper=helper)

    def way(name: str, drafter: Drafter, length: int) -> Job:
        told = home.told(Drafting.with_drafter(drafter, length, Sampling()))["arguments"]
        return Job(name, drafter, length, lambda prompts: llama_cpp_rounds(server, home.whole(), prompts, budget, told))

    for exit_layer, length in cells:
        yield way("draft model", ExitLayer(exit_layer), length)
    for lookup in LOOKUPS["llama.cpp"]:
        yield way("n-gram", lookup, lookup.copied)
    if helper is not None:
        yield way(OF_ITS_OWN, DraftModel(helper.name, helper), HELPER_LENGTH)


if __name__ == "__main__":
    typer.run(main)
