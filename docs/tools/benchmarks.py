"""The page of benchmarks, from the records: `python docs/tools/benchmarks.py` writes it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent
PAGE = DOCS / "benchmarks.md"
RESULTS = DOCS / "results"

HEAD = """\
# Benchmarks

This page is made from the records in `docs/results/` by `python docs/tools/benchmarks.py`; the command under each
heading measures anew. Ways of doing the same job took turns in one process, on the same tokens; ratios were taken turn
by turn. A figure is a median, with its 20 % and 80 % quantiles in brackets. The machines were shared ones: compare
ratios, not seconds.
"""

Record = Mapping[str, Any]


def page() -> str:
    return "\n".join(
        [HEAD, *in_short(), *lens(), *capture(), *choice(), *decoding(), *rounds(), *batches(), *regret(), *checked()]
    )


def records(folder: str, pattern: str) -> list[Record]:
    """The bundled models last."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / folder).glob(pattern))]
    return sorted(found, key=bundled)


def bundled(record: Record) -> bool:
    return str(record.get("model", "")).startswith("tales")


def where(record: Record) -> str:
    """The machine and the versions, as a sentence."""
    machine, versions = record["machine"], record["versions"]
    device = machine.get("device", record.get("device", "cpu"))
    name = f" ({machine['name']})" if "name" in machine else ""
    packages = ", ".join(f"{package} {versions[package]}" for package in versions if package not in ("python", "numpy"))
    return (
        f"On {device}{name}, {machine['threads']} of {machine['cores']} cores, "
        f"{record.get('dtype', 'float32')}; {packages}."
    )


def spread(found: Mapping[str, float] | None, digits: int = 2) -> str:
    return "" if not found else ranged(found["p50"], found["p20"], found["p80"], digits)


def ranged(middle: float, low: float, high: float, digits: int = 2) -> str:
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + "|".join(["---", *["---:"] * (len(heads) - 1)]) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def section(heading: str, line: str, text: str) -> Iterator[str]:
    yield from (f"## {heading}\n", command(line), f"{text}\n")


def command(line: str) -> str:
    return f"```\n{line}\n```\n"


def prompts(count: int) -> str:
    return f"{count} prompt" if count == 1 else f"{count} prompts"


def in_short() -> Iterator[str]:
    """Every ratio of the records, a row a ratio and a column a model."""
    found = [record for kind in ("lens", "tracing", "choice") for record in records("benchmarks", f"{kind}-*.json")]
    models = list(dict.fromkeys(record["model"] for record in found))
    ratios: dict[str, dict[str, str]] = {}
    for record in found:
        for target in record["targets"]:
            ratios.setdefault(target["what"], {})[record["model"]] = ratio(target["measured"])
    yield "## In short\n"
    yield (
        "Ratios of the first three sections, on the device and with the versions that stand there. A ratio without "
        "brackets was measured once; an empty cell was not measured. `A over B` is the ratio A / B: below 1 is less.\n"
    )
    rows = [[what, *(by_model.get(model, "") for model in models)] for what, by_model in ratios.items()]
    yield from table(["ratio", *models], rows)


def ratio(found: Mapping[str, float]) -> str:
    """Quantiles of one measurement are no quantiles."""
    return spread(found) if found["p20"] < found["p80"] else f"{found['p50']:.2f}"


# ------------------------------------------------------------------------------------------------------ the records
def lens() -> Iterator[str]:
    found = records("benchmarks", "lens-*.json")
    yield from section(
        "The lens: every layer at every token",
        "python analyses/benchmark_lens.py --models path/to/model.gguf   # the bundled models without --models",
        "From token ids to what the final-norm lens says of every layer: the argmax alone by the peers, which have "
        "nothing else; all statistics, or agreement alone, by probekit. All give the same agreement. Memory is the "
        "peak beyond the model, in a fresh process.",
    )
    yield "![Seconds and memory of each way](results/benchmarks/lens.png)\n"
    for record in found:
        settings = record["settings"]
        yield f"**{record['model']}**: {settings['tokens']:,} tokens in {settings['texts']} texts. {where(record)}\n"
        rows = [
            [row["way"], spread(row["seconds"]), spread(row["tokens_per_s"], 0),
             spread(row["extra_bytes"] and {key: value / 2**20 for key, value in row["extra_bytes"].items()}, 0)]
            for row in record["rows"]
        ]  # fmt: skip
        yield from table(["way", "seconds", "tokens a second", "memory, MiB"], rows)


def capture() -> Iterator[str]:
    found = records("benchmarks", "tracing-*.json")
    yield from section(
        "Reading a model",
        "python analyses/benchmark_tracing.py --models path/to/model.gguf",
        "A forward pass with the residuals of all layers kept, over a plain one of the same library; and how a trace "
        "grows with its tokens, seconds for each token and peak memory.",
    )
    for record in found:
        yield f"**{record['model']}**: passes of {record['settings']['tokens']} tokens. {where(record)}\n"
        rows = [[row["way"], spread(row["seconds"], 3), spread(row["over_plain"])] for row in record.get("capture", ())]
        if rows:
            yield from table(["way", "seconds", "over the plain pass"], rows)


def choice() -> Iterator[str]:
    found = records("benchmarks", "choice-*.json")
    yield from section(
        "Finding the best pair",
        "python analyses/benchmark_choice.py --models path/to/model.gguf",
        "Seconds until a pair is chosen on some of the even prompts, and its regret on the odd ones: for each way the "
        "fewest seconds at a regret that both can reach. Sweeps are extrapolated "
        "from the pairs that were run; successive halving is played on a table of every pair's seconds, "
        "`measured` or `replayed` from the exact rounds and the costs of a round.",
    )
    for record in found:
        settings, equal = record["settings"], record["equal_regret"]
        yield (
            f"**{record['model']}**: {record['cells']} pairs, {prompts(settings['prompts'])}, {settings['tokens']} new "
            f"tokens, table {settings['table']}. {where(record)}\n"
        )
        rows = [
            [f"{equal['trace']['way']}, of {prompts(equal['trace']['prompts'])}",
             f"{equal['trace']['seconds']:.1f}", f"{equal['trace']['regret']:.1%}"],
            [f"{equal['halving']['way']}, from {prompts(equal['halving']['prompts'])} on",
             f"{equal['halving']['seconds']:.0f}", f"{equal['halving']['regret']:.1%}"],
            *([way, f"{seconds['p50']:,.0f}", ""] for way, seconds in record["every_pair_s"].items()),
        ]  # fmt: skip
        yield from table(["way", "seconds", "regret"], rows)


def decoding() -> Iterator[str]:
    yield from section(
        "Decoding",
        "python analyses/compare_decoding.py tales-layerskip --cell 3,2 --cell 4,2 --cell 4,3 --cell 6,4 --prompts 4 "
        "--max-new-tokens 64 --draft-model tales-draft --draft-rows 512 --fit-heads --compiled "
        "-o docs/results/decoding/compare-tales-layerskip",
        "The same weights, prompts and tokens in both libraries. Speedup: over the same library's autoregressive "
        "decoding. Against transformers: the same method, exit layer and draft length there. With rows and exit heads: "
        "both are learned from what the model writes after the other prompts.",
    )
    for record in records("decoding", "compare-*.json"):
        settings = record["settings"]
        yield (
            f"**{record['model']}**: {prompts(settings['prompts'])}, {settings['max_new_tokens']} new tokens, "
            f"{settings['repeats']} turns. {where(record)}\n"
        )
        rows = []
        for row in record["rows"]:
            cells = [
                "" if row[f"{name}_50"] is None else ranged(*(row[f"{name}_{at}"] for at in (50, 20, 80)), digits)
                for name, digits in (("tokens_per_s", 0), ("speedup", 2), ("against", 2))
            ]
            same = f"{row['same_tokens']} of {row['prompts']}"
            accepted = "" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
            rows.append([f"{row['engine']}, {row['method']}", same, accepted, *cells])
        heads = ["method", "same tokens", "acceptance", "tokens a second", "speedup", "against transformers"]
        yield from table(heads, rows)


def rounds() -> Iterator[str]:
    yield from section(
        "A round and its steps",
        "python analyses/benchmark_rounds.py tales-layerskip --cell 3,2 -o docs/results/decoding/rounds-layerskip",
        "The sum of a round's steps, each timed by itself in the order of a round, over the round of the running "
        "decoder: what is missing to 1 is overhead of the host. In the last column each step ran in a loop of its own, "
        "its weights in the processor's caches, where a round never finds them.",
    )
    rows = []
    for record in records("decoding", "rounds-*.json"):
        yield f"**{record['model']}**: {prompts(record['settings']['prompts'])}. {where(record)}\n"
        for cell in record["cells"]:
            low, middle, high = cell["steps_over_round_quantiles"]
            rows.append([record["model"], str(cell["exit_layer"]), str(cell["draft_length"]),
                         f"{1000 * cell['round_s']:.2f}", ranged(middle, low, high),
                         f"{cell['alone_over_round']:.2f}"])  # fmt: skip
    heads = ["model", "exit layer", "draft length", "round, ms", "steps / round", "steps in own loops / round"]
    yield from table(heads, rows)


def batches() -> Iterator[str]:
    yield from section(
        "Batches: predicted against measured",
        "python analyses/batch_rounds.py tales-layerskip --cell 1,2 --cell 3,3 -o batch-tales-layerskip",
        "Speedup of our own decoder over autoregressive decoding of the same batch. A batch starts together, and a row "
        "whose text has ended leaves it; its rounds are its rows' own, side by side, and each lasts as long as the row "
        "that drafts most. Measured in turns, by the processor's clock. `rounds`: whether every round of every batch "
        "had the predicted rows and drafts.",
    )
    rows, near = [], []
    for record in records("decoding", "batch-*.json"):
        settings = record["settings"]
        yield (
            f"**{record['model']}**: {prompts(settings['prompts'])}, {settings['max_new_tokens']} new tokens, "
            f"{settings['sweeps']} turns. {where(record)}\n"
        )
        for row in record["rows"]:
            near.append(abs(row["ratio"] - 1) <= 0.1)
            figures = [f"{row[name]:.2f}" for name in ("predicted", "measured", "ratio", "plain_against_plain")]
            cell = f"{row['exit_layer']}, {row['draft_length']}"
            rows.append([record["model"], str(row["rows"]), cell, "equal" if row["rounds_equal"] else "not equal",
                         *figures])  # fmt: skip
    heads = ["model", "rows", "exit layer, length", "rounds", "predicted", "measured", "ratio", "plain against plain"]
    yield from table(heads, rows)
    yield f"Within 10 %: {sum(near)} of {len(near)}.\n"


def regret() -> Iterator[str]:
    yield from section(
        "Regret: was the chosen pair the best one?",
        "python analyses/benchmark_regret.py tales-layerskip --threads 1 --max-new-tokens 64 --longest 4 --minutes 60",
        "The pair is chosen on the even prompts; then every pair really decodes the odd ones, taking turns. Regret: "
        "the share of the best pair's speed that the chosen one gives away, and its 95 % interval over prompts; held "
        "out: the best one looked for on half of the prompts, compared on the other half. Noise: the same "
        "for autoregressive decoding against itself, at 95 %. `head`: the rows of the head that drafts are "
        "chosen with, those of the most frequent tokens, and whether they go through exit heads; both are learned from "
        "what the model writes after every fourth prompt and its beginnings, on which then nothing is chosen.",
    )
    rows = []
    for record in records("decoding", "regret-*.json"):
        found, settings = record["regret"], record["settings"]
        head = f"{settings.get('draft_rows') or 'all'} rows" + (", exit heads" if settings.get("exit_heads") else "")
        yield (
            f"**{record['model']}**, {head}: {prompts(found['prompts'])}, "
            f"{found['pairs']} pairs, {settings['max_new_tokens']} new tokens. {where(record)}\n"
        )
        pair = ["no drafts" if not exit_layer else f"{exit_layer}, {length}" for exit_layer, length in
                (found["chosen"], found["best"])]  # fmt: skip
        low, high = found["chosen_speedup_interval"]
        rows.append([record["model"], head, *pair,
                     f"{found['chosen_speedup_predicted']:.2f}", ranged(found["chosen_speedup"], low, high),
                     f"{found['regret']:.1%} [{found['regret_interval'][0]:.1%}, {found['regret_interval'][1]:.1%}]",
                     f"{found['regret_held_out']:.1%}", f"{found['noise_95']:.1%}"])  # fmt: skip
    heads = ["model", "head", "chosen", "best", "speedup predicted", "measured", "regret", "held out", "noise"]
    yield from table(heads, rows)


def checked() -> Iterator[str]:
    yield from section(
        "The tokens of every method",
        "python analyses/check_decoding.py tales-layerskip -o checked-tales-layerskip",
        "Greedy, float32, every exit layer, draft lengths 1 to 8: each run's tokens against autoregressive decoding "
        "and its rounds against the prediction. Near-tie: two logits closer than the noise of a row alone and among "
        "others; anything else would be a bug.",
    )
    rows = []
    for record in records("decoding", "checked-*.json"):
        for model in record["models"]:
            for method, count in model["greedy"]["methods"].items():
                rows.append([f"{model['model']}, {method}", *(f"{count[name]:,}" for name in
                             ("runs", "rounds", "tokens", "runs_equal", "near_ties", "unexplained"))])  # fmt: skip
    yield from table(["method", "runs", "rounds", "tokens", "runs equal", "near-ties", "unexplained"], rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
