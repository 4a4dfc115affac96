"""What speculation gains inside other engines: predicted from a trace and the engine's own costs, and measured there.

    python analyses/engine_speedups.py llama.cpp --environments build/engines -o docs/results/engine-speedups

The costs are those of `probekit costs`. Each cell is then decoded in turns with plain decoding of the same engine; what
a text of MORE tokens takes longer than one of FEWER is its time of decoding, predicted and measured alike. By the
clock of one processor, for a machine that does other things beside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import engine_turns as turns
import numpy as np
import typer
from rich.console import Console

from probekit.costs.profile import Costs
from probekit.drafting.drafters import Drafter, DraftModel, ExitLayer
from probekit.drafting.text_drafters import PromptLookup
from probekit.engines.engine import Drafting
from probekit.engines.known import ENGINES
from probekit.files import atomic_text
from probekit.prediction.predict import predict
from probekit.settings import Sampling
from probekit.traces.trace import Trace
from probekit.tracing.prompts import as_prompts, bundled_prompts_for
from probekit.tracing.tracer import trace
from probekit.validation.engine_costs import measure_home
from probekit.validation.engine_rounds import Session

CELLS = {
    "tales-layerskip": ((1, 2), (2, 4), (3, 3), (6, 5)),
    "smollm2": ((10, 2), (20, 3), (25, 4), (28, 6)),
}
LOOKUPS = {
    "transformers": (PromptLookup(1), PromptLookup(2)),
    "vllm": (PromptLookup(1, rule="vllm"), PromptLookup(2, rule="vllm")),
    "llama.cpp": (PromptLookup(1, rule="llama.cpp", copied=3), PromptLookup(2, rule="llama.cpp", copied=3)),
}
LOOKUP_LENGTH = HELPER_LENGTH = 3
SCHEMA = "probekit/engine-speedups/1"
RESULTS = Path("docs/results/engine-speedups")


def main(
    engine: Annotated[str, typer.Argument(help=" or ".join(LOOKUPS))],
    output: Annotated[Path, typer.Option("--output", "-o", help="Receives ENGINE.json.")] = RESULTS,
    models: Annotated[str, typer.Option(help="With commas between.")] = ",".join(CELLS),
    prompts: Annotated[int, typer.Option(min=1)] = 8,
    sweeps: Annotated[int, typer.Option(min=1, help="Of the costs, and the fewest turns of every way.")] = 5,
    most: Annotated[int, typer.Option(min=1, help="Turns, where plain decoding differs from itself.")] = 12,
    texts: Annotated[int, typer.Option(min=1, help="That the costs are measured on.")] = 3,
    folder: turns.Folder = turns.FOLDER,
    cache: turns.Cache = turns.CACHE,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "schema": SCHEMA, "engine": engine,
        "settings": turns.SETTINGS,
        **turns.measured_on(engine),
        "turns": {}, "profiles": {}, "rows": [],
    }  # fmt: skip
    record |= kept(output / f"{engine}.json", record)
    names = models.split(",")
    for name, home in zip(names, turns.homes(engine, names, folder, cache), strict=True):
        loaded = home.loaded
        lengths = {LOOKUP_LENGTH, *(length for _, length in CELLS[name])}
        profile = measure_home(home, turns.cost_plan(home, lengths, sweeps, texts))
        record["profiles"][loaded.name] = profile.to_json()
        record["turns"][loaded.name] = {"prompts": prompts, "sweeps": sweeps, "most": most, "texts": texts}
        record["rows"] = [row for row in record["rows"] if row["model"] != loaded.name]
        costs = profile.costs(loaded.depth)
        chosen = as_prompts(bundled_prompts_for(loaded.name))[:: max(1, 24 // prompts)][:prompts]
        run = trace(loaded, chosen, max_new_tokens=turns.MORE + turns.PAST, draft_model=home.helper)
        drafters: list[tuple[Drafter, int]] = [(ExitLayer(exit_layer), length) for exit_layer, length in CELLS[name]]
        drafters += [(lookup, LOOKUP_LENGTH) for lookup in LOOKUPS[engine]]
        if home.helper is not None:
            drafters.append((DraftModel(home.helper.name, home.helper), HELPER_LENGTH))
        for drafter, length in drafters:
            drafting = Drafting.with_drafter(drafter, length, Sampling())
            with home.open(Drafting()) as plain, home.open(drafting) as drafts:
                measured, noise = speedups(run, plain, drafts, sweeps, most)
            row = {"model": loaded.name, "drafter": drafter.key.label, "draft_length": length,
                   "predicted": predicted(run, drafter, length, costs, ENGINES[engine].first_round),
                   "measured": measured, "plain_against_plain": noise}  # fmt: skip
            row["ratio"] = row["predicted"] / row["measured"]
            record["rows"].append(row)
            atomic_text(output / f"{engine}.json", json.dumps(record, indent=1) + "\n")
            Console(soft_wrap=True).print(
                f"{loaded.name}: {row['drafter']} x {length}: predicted {row['predicted']:.3f}, measured "
                f"{row['measured']:.3f}, ratio {row['ratio']:.3f}", markup=False,
            )  # fmt: skip


def kept(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What was measured of other models in the same way: a run of one model leaves theirs."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = all(found.get(name) == record[name] for name in ("schema", "settings", "versions"))
    return {name: found[name] for name in ("turns", "profiles", "rows")} if same else {}


def speedups(run: Trace, plain: Session, drafts: Session, sweeps: int, most: int) -> tuple[float, float]:
    """(plain seconds / seconds with drafts, plain seconds / plain seconds) over all prompts."""
    seconds = turns.until_still(turns.prompt_ids(run), (plain, drafts, plain), sweeps, most)
    first, drafting, second = turns.decoding(seconds).sum(axis=0)
    both = turns.decoding(np.concatenate([seconds[:, :, [0]], seconds[:, :, [2]]])).sum()
    return float(both / drafting), float(first / second)


def predicted(run: Trace, drafter: Drafter, length: int, costs: Costs, first_round: str) -> float:
    """The same from the trace: the rounds of MORE tokens less those of FEWER."""
    rounds, tokens = np.zeros(length + 1), 0
    for budget, sign in ((turns.MORE, 1), (turns.FEWER, -1)):
        cell = predict(run, draft_lengths=[length], drafters=[drafter], first_round=first_round, budget=budget).cells[0]
        rounds += sign * cell.rounds_by_drafted.sum(axis=0)
        tokens += sign * sum(min(budget, len(run.outputs(prompt))) for prompt in run.prompts)
    return float(tokens * costs.autoregressive_s / (rounds @ costs.rounds_seconds(drafter.key, length)))


if __name__ == "__main__":
    typer.run(main)
