"""`rank`: every way of drafting that a trace can answer for, on one scale, and the oracle above them.

Fixed lengths of every drafter; policies at every exit, and among all exits; copied drafts; a draft model and imported
drafters where there are any; what is learned from the trace is judged on the half of it that it was not learned on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from probekit.choice.certainty import joint_certainty
from probekit.choice.choose import decoding_seconds
from probekit.choice.prices import Prices
from probekit.choice.ranking import Ranked, Ranking
from probekit.costs.profile import Costs
from probekit.drafting.drafters import Drafter, ExitLayer, outlook, sizes_of, traced_drafters
from probekit.drafting.keys import MODEL, DrafterKey
from probekit.drafting.policies import ConfidenceThreshold, EntropyThreshold, MarginThreshold, Policy, ResidualPolicy
from probekit.drafting.round_policies import NOBODY, DynamicExit, Heuristic, Planned
from probekit.drafting.text_drafters import PromptLookup, SuffixLookup
from probekit.drafting.tree_drafters import TreeDrafts
from probekit.drafting.trees import TreeShape
from probekit.drafting.ways import Way
from probekit.errors import InputError
from probekit.prediction.intervals import interval_of
from probekit.prediction.learning import learn_table
from probekit.prediction.oracle import best_path, options_of
from probekit.prediction.predict import predict
from probekit.prediction.replay import Replay, budget_of, replay
from probekit.prediction.rounds import FIRST_START, within_budget
from probekit.prediction.shapes import candidates
from probekit.prediction.table import Cell
from probekit.traces.trace import Trace, as_trace

GROWN = "best shape"
FIRST = FIRST_START["prefill"]  # as our decoder begins
LOOKUPS: tuple[Drafter, ...] = (PromptLookup(2), PromptLookup(3), PromptLookup(3, 2, "vllm"), SuffixLookup())
SHAPES = tuple(map(TreeShape.of_widths, ((3,), (2, 1, 1), (3, 2, 1))))
TREE_NODES = 16  # of the widest tree whose verification commands time
DEEPEST = 6  # levels of a tree whose shape is learned
STOPPING: Mapping[str, Policy] = {
    "confidence:0.4": ConfidenceThreshold(0.4),
    "confidence:0.6": ConfidenceThreshold(0.6),
    "confidence:0.8": ConfidenceThreshold(0.8),
    "entropy:1": EntropyThreshold(1.0),
    "entropy:2": EntropyThreshold(2.0),
    "margin:1": MarginThreshold(1.0),
    "margin:2": MarginThreshold(2.0),
    "heuristic:5": Heuristic(5),
}
"""Policies that are tried at every exit, by the names that the command line knows."""


def rank(
    trace: Trace,
    costs: Costs,
    exit_layers: Iterable[int] | None = None,
    draft_lengths: Iterable[int] = range(1, 9),
    *,
    draft_rows: int | None = None,
    lookups: Sequence[Drafter] = LOOKUPS,
    shapes: Sequence[TreeShape] = SHAPES,
    drafters: Sequence[Drafter] = (),
    policies: Mapping[str, Policy] = STOPPING,
    learn: bool = True,
) -> Ranking:
    """Rank every way of drafting.

    Parameters
    ----------
    exit_layers: 1..L-1 by default. draft_rows: F, for exits that draft among the first F tokens of the trace's draft
        vocabulary only.
    draft_lengths: K of fixed drafts; the longest is the most that any policy drafts.
    lookups: drafters that copy from the text. drafters: others, imported ones for instance.
    shapes: of trees that are tried at every exit, as far as the costs know passes as wide.
    policies: what is tried at every exit, by name. Without greedy text only fixed lengths are ranked, and no oracle: a
        policy sees other rounds in every sampled text.
    learn: rank learned ways, too, where there are four prompts or more.

    Raises
    ------
    InputError: for exits, lengths or costs that do not fit the trace.

    Examples
    --------
    >>> import probekit
    >>> from probekit.costs.roofline import roofline_costs
    >>> trace = probekit.trace("tales-layerskip", ["Once upon a time", "The king"], max_new_tokens=16)
    >>> costs = roofline_costs(trace, device="h100", dtype="bfloat16")
    >>> ranking = probekit.rank(trace, costs, exit_layers=[2, 3], draft_lengths=[2, 4])
    >>> ranking.to_pandas()["speedup"].max() >= 1
    np.True_
    """
    trace = as_trace(trace)
    known = traced_drafters(trace, exit_layers, draft_rows=draft_rows, draft_model=_timed_model(trace, costs))
    exits = [each for each in known if isinstance(each, ExitLayer)]
    lengths = sorted(within_budget(draft_lengths, trace.manifest.settings.max_new_tokens))
    if lengths and lengths[-1] > costs.longest_draft:
        raise InputError(
            f"these costs know drafts of up to {costs.longest_draft} tokens, not {lengths[-1]}.",
            "Make them with `draft_lengths` as long as you need.",
        )
    everyone = [*known, *lookups, *drafters]
    costs.check_draft_head(each.key for each in known)
    prices = Prices(costs, lengths[-1] if lengths else 0)
    greedy = trace.manifest.settings.text == "greedy"
    found = list(_fixed(trace, everyone, lengths, prices))
    trees = _trees(trace, exits, shapes, costs) if greedy else []
    if not found:
        raise InputError("there is nothing to rank: no text has a round.", "Trace more tokens.")
    oracle = of_turns = None
    grown: list[Drafter] = []
    if greedy:
        found += _planted(trace, trees, prices)
        found += _stopping(trace, exits, policies, prices)
        if exits:
            found += _choosing(trace, exits, prices)
        if learn and exits and len(trace) >= 4:
            found += _learned(trace, exits, lookups, prices)
            if trees:
                best, grown = _grown(trace, exits, found, prices)
                found.append(best)
        everyone += [*trees, *grown]
        takes_turns = [each for each in everyone if each.key.kind != MODEL]
        oracle, of_turns = _oracles(trace, everyone, takes_turns, prices)
    found.append(_alone(trace, prices))
    ways, oracle, of_turns = _with_certainty(sorted(found, key=lambda way: -way.speedup), oracle, of_turns, prices)
    kinds = dict(zip(trace.texts["prompt"].tolist(), trace.texts["kind"].tolist(), strict=True))
    return Ranking(
        trace.manifest.model.name,
        trace.manifest.settings.text,
        tuple(trace.prompts),
        tuple(str(kinds[prompt]) for prompt in trace.prompts),
        tuple(ways),
        costs,
        oracle,
        of_turns,
        tuple(_left_out(trace, exits, policies, learn=learn)),
    )


def _with_certainty(
    ways: Sequence[Ranked], oracle: Ranked | None, of_turns: Ranked | None, prices: Prices
) -> tuple[list[Ranked], Ranked | None, Ranked | None]:
    """The same, each with its joint interval, and whether it can be told apart from the first."""
    bounds = [each for each in (oracle, None if of_turns is oracle else of_turns) if each is not None]
    every = [*ways, *bounds]

    def total_s(again: Costs) -> list[float]:
        repriced = Prices(again, prices.longest)
        return [way.total_s(repriced) for way in every]

    sure = joint_certainty(
        np.stack([way.plain_s_of_prompt for way in every]), np.stack([way.seconds_of_prompt for way in every]),
        total_s, prices.costs, best=0,
    )  # fmt: skip
    found = []
    for place, way in enumerate(every):
        pair = interval_of(float(sure.low[place]), float(sure.high[place]), len(way.seconds_of_prompt))
        found.append(replace(way, joint=None if way.policy == "none" else pair, alike=bool(sure.alike[place])))
    judged, bounds = found[: len(ways)], found[len(ways) :]
    first = bounds[0] if bounds else None
    return judged, first, first if of_turns is oracle else bounds[-1]


def _left_out(
    trace: Trace, exits: Sequence[Drafter], policies: Mapping[str, Policy], *, learn: bool
) -> Iterator[tuple[str, str]]:
    """(ways, why they are not ranked)."""
    looking = sorted({name.partition(":")[0] for name, policy in policies.items() if policy.needs_confidence})
    if trace.manifest.settings.text != "greedy":
        yield (
            "policies",
            (
                "along sampled text drafts are accepted by chance, so what a policy has seen differs from run to run: "
                "the recursion over positions, which gives the expectation of fixed lengths, does not know it"
            ),
        )
        yield "trees", "a tree is verified greedily"
        yield "the oracle", "its plan needs rounds that are certain"
        return
    if trace.manifest.settings.statistics != "all":
        yield ", ".join([*looking, "trees"]), "this trace keeps agreement only: trace with --statistics all"
    elif trace.manifest.settings.batch_invariant:
        yield "trees", "a tree is not verified batch-invariantly"
    elif any(each.key.rows is not None for each in exits):
        yield ", ".join([*looking, "trees"]), "a trace does not say how sure a head of fewer rows is, nor its ranks"
    if learn and exits and len(trace) < 4:
        yield "learned ways", "they need four prompts, to be learned on one half and judged on the other"


def with_trees(trace: Trace, draft_lengths: Iterable[int], context: int) -> list[int]:
    """These draft lengths, and the widest tree's nodes where its models read so far beyond the context: for costs."""
    known = [record for record in (trace.manifest.model, trace.manifest.drafter) if record is not None]
    fits = all(context + TREE_NODES + 1 <= record.context for record in known)
    return [*draft_lengths, *([TREE_NODES] if fits else [])]


def _timed_model(trace: Trace, costs: Costs) -> bool:
    """Whether the trace has a draft model that these costs know."""
    return trace.manifest.drafter is not None and costs.drafter == trace.manifest.drafter.name


def priced(trace: Trace, way: Way, costs: Costs) -> Ranked:
    """One way of drafting along the texts of a greedy trace, by these costs."""
    return _of_replay(replay(trace, way), Prices(costs, way.draft_length))


def replayed_seconds(found: Replay, costs: Costs) -> np.ndarray:
    """(prompts,) predicted seconds of rounds that were replayed, what a policy watches among them."""
    return _seconds(found, Prices(costs, found.way.draft_length))


# Every way in turn.


def _fixed(trace: Trace, drafters: Sequence[Drafter], lengths: Sequence[int], prices: Prices) -> Iterator[Ranked]:
    table = predict(trace, draft_lengths=lengths, drafters=drafters)
    for cell in table.cells:
        if cell.rounds:
            yield _of_cell(cell, Way((cell.drafts,), cell.draft_length), "fixed", prices, exact=table.exact)


def _stopping(
    trace: Trace, exits: Sequence[Drafter], policies: Mapping[str, Policy], prices: Prices
) -> Iterator[Ranked]:
    """Each policy at each exit, a probe's at its own. What exits with fewer rows are sure of is not in a trace."""
    for name, policy in policies.items():
        own = [each for each in exits if _goes_with(policy, each.key)]
        if policy.needs_confidence and any(each.key.rows is not None for each in exits):
            continue
        if trace.manifest.settings.statistics != "all" and policy.needs_confidence:
            continue
        for cell in predict(trace, draft_lengths=[prices.longest], drafters=own, policy=policy).cells if own else ():
            if cell.rounds:
                way = Way((cell.drafts,), cell.draft_length, policy, name)
                yield _of_cell(cell, way, name, prices, exact=policy.exact)


def _goes_with(policy: Policy, key: DrafterKey) -> bool:
    """A policy that reads residuals goes with the exit whose residuals it reads."""
    if not isinstance(policy, ResidualPolicy):
        return True
    return key == DrafterKey.exit(policy.exit_layer, rows=key.rows, exit_heads=key.exit_heads)


def _choosing(trace: Trace, exits: Sequence[Drafter], prices: Prices) -> Iterator[Ranked]:
    """Among all exits: DEL by layers, as it was published, and by these costs."""
    seconds = {each.key: tuple(own.tolist()) for each, own in zip(exits, prices.of(exits), strict=True)}
    for name, policy in (
        ("del", DynamicExit(trace.depth)),
        ("del by costs", DynamicExit(trace.depth, seconds=seconds, plain_s=prices.plain_s)),
    ):
        yield _of_replay(replay(trace, Way(tuple(exits), prices.longest, policy, name)), prices)


def _learned(trace: Trace, exits: Sequence[Drafter], lookups: Sequence[Drafter], prices: Prices) -> Iterator[Ranked]:
    """A table over the exits, and one over exits and lookups."""
    for name, drafters in {"table": exits, "table with lookups": [*exits, *lookups]}.items():
        if name != "table" and not lookups:
            continue

        def table(part: Trace, name: str = name, drafters: Sequence[Drafter] = drafters) -> Way:
            reference = _best_exit(part, exits, prices)
            watch_s = prices.look(exits[reference].key.exit_layer, prices.longest)
            seconds, plain_s = prices.of(drafters) + watch_s, prices.plain_s + watch_s[0]
            return Way(tuple(drafters), prices.longest, learn_table(part, drafters, seconds, plain_s, reference), name)

        yield cross_fitted(trace, table, prices)


def cross_fitted(trace: Trace, learn: Callable[[Trace], Way], prices: Prices) -> Ranked:
    """A learned way, judged on each half of the prompts as it was learned on the other.

    Its `way` is what the whole trace teaches.
    """
    halves, replays = (trace.prompts[::2], trace.prompts[1::2]), []
    judged: dict[int, tuple[float, float, float, float]] = {}
    for mine, other in (halves, halves[::-1]):
        found = replay(trace.select(mine), learn(trace.select(other)))
        replays.append(found)
        counts = (found.of_prompt(name) for name in ("rounds", "drafted", "accepted"))
        seconds = _seconds(found, prices)
        judged |= dict(zip(found.prompts, zip(seconds, *counts, strict=True), strict=True))
    seconds, rounds, drafted, accepted = np.array([judged[prompt] for prompt in trace.prompts]).T
    way = learn(trace)
    tokens = _tokens(trace)
    return Ranked(
        way, _who(way), way.name, _exit_of(way), way.draft_length, tokens, seconds, tokens * prices.plain_s,
        int(rounds.sum()), int(drafted.sum()), int(accepted.sum()), exact=True, cross_fitted=True,
        total_s=lambda again: sum(float(_seconds(each, again).sum()) for each in replays),
    )  # fmt: skip


def _trees(trace: Trace, exits: Sequence[ExitLayer], shapes: Sequence[TreeShape], costs: Costs) -> list[TreeDrafts]:
    """Where a trace has ranks, its decoder takes trees, and the costs know verification passes as wide."""
    if trace.manifest.settings.statistics != "all" or trace.manifest.settings.batch_invariant:
        return []
    known = [shape for shape in shapes if len(shape.paths) <= costs.longest_draft]
    return [TreeDrafts(each, shape) for each in exits if each.rows is None for shape in known]


def _planted(trace: Trace, trees: Sequence[TreeDrafts], prices: Prices) -> Iterator[Ranked]:
    """Trees of a given shape, drafted whole."""
    if not trees:
        return
    deepest = max(tree.shape.depth for tree in trees)
    for cell, tree in zip(predict(trace, draft_lengths=[deepest], drafters=trees).cells, trees, strict=True):
        if cell.rounds:
            own = _of_cell(cell, Way((tree,), deepest), "fixed", prices, exact=not trace.rounds_logits)
            yield replace(own, draft_length=tree.shape.depth, way=Way((tree,), tree.shape.depth))


def _grown(
    trace: Trace, exits: Sequence[ExitLayer], found: Sequence[Ranked], prices: Prices
) -> tuple[Ranked, list[Drafter]]:
    """The best shape for these costs, at the exits that are best with a fixed length and with a given shape.

    With it all trees that it was judged by, each once: an oracle may take them, too.
    """
    order = sorted((way for way in found if way.policy == "fixed" and way.exit_layer), key=lambda way: -way.speedup)
    firsts = {way.drafter == "self": way.exit_layer for way in reversed(order)}  # of chains, and of trees
    some = [each for each in exits if each.exit_layer in firsts.values()]

    made: dict[DrafterKey, Drafter] = {}

    def shape(part: Trace) -> Way:
        tree = best_tree(part, some, prices.costs)
        made[tree.key] = tree
        return Way((tree,), tree.shape.depth, name=GROWN)

    best = cross_fitted(trace, shape, prices)
    given = {way.way.keys[0] for way in found if way.way is not None}
    return best, [tree for key, tree in made.items() if key not in given]


def best_tree(trace: Trace, exits: Sequence[ExitLayer], costs: Costs) -> TreeDrafts:
    """Of the trees that promise most (`prediction.shapes`), the one whose rounds along these texts take least time."""
    trees = [
        TreeDrafts(each, shape)
        for each in exits
        for shape in candidates(trace, each.exit_layer, costs.longest_draft, DEEPEST)
    ]
    if not trees:
        raise InputError("these costs know no pass over more than two rows.", "Make them with longer `draft_lengths`.")
    cells = predict(trace, draft_lengths=[DEEPEST], drafters=trees).cells
    seconds = [float(decoding_seconds(cell, costs).sum()) for cell in cells]
    return trees[int(np.argmin(seconds))]


def _best_exit(trace: Trace, exits: Sequence[Drafter], prices: Prices) -> int:
    """The place of the exit whose best fixed length is the fastest."""
    ranked = max(_fixed(trace, exits, range(1, prices.longest + 1), prices), key=lambda way: way.speedup)
    return [each.key.exit_layer for each in exits].index(ranked.exit_layer or 0)


def _oracles(
    trace: Trace, everyone: Sequence[Drafter], takes_turns: Sequence[Drafter], prices: Prices
) -> tuple[Ranked, Ranked]:
    """The best of all drafters, and of those that a decoder can let take turns."""
    bound = oracle_of(trace, everyone, prices.costs, prices.longest)
    if len(takes_turns) == len(everyone):
        return bound, bound
    return bound, oracle_of(trace, takes_turns, prices.costs, prices.longest)


def oracle_of(trace: Trace, drafters: Sequence[Drafter], costs: Costs, longest: int) -> Ranked:
    """The best that any policy could do along greedy texts with these drafters and at most `longest` drafts a round.

    Its way plays that plan; None where a draft model is among several drafters, which cannot take turns: then it is a
    bound.
    """
    prices = Prices(costs, longest)
    seconds, plans, totals = prices.of(drafters), {}, []
    sizes = [sizes_of(drafter, prices.longest) for drafter in drafters]
    drafted = accepted = 0
    counts, alone = np.zeros(seconds.shape), 0  # rounds with so many drafts of each drafter, and of nobody
    for prompt in trace.prompts:
        outlooks = [outlook(drafter, trace, prompt, prices.longest) for drafter in drafters]
        budget = budget_of(trace, prompt)
        path = best_path(options_of(outlooks, seconds, prices.plain_s, budget))
        plans[prompt] = path.plan
        totals.append(float(path.seconds[FIRST:][:1].sum()))
        for i in path.starts(FIRST):
            place, length = path.plan[:, i].tolist()
            accepted += int(path.options.emitted[path.option[i], i]) - 1
            if place == NOBODY:
                alone += 1
            else:
                levels = max(0, min(length, int(outlooks[place].drafted[i]), budget - i - 1))
                drafted += int(sizes[place][levels])
                counts[place, levels] += 1
    turns = len(drafters) == 1 or all(each.key.kind != MODEL for each in drafters)
    way = Way(tuple(drafters), prices.longest, Planned(plans), "oracle") if turns else None
    tokens = _tokens(trace)
    return Ranked(
        way, f"{len(drafters)} drafters in turn", "oracle", None, prices.longest, tokens, np.array(totals),
        tokens * prices.plain_s, alone + int(counts.sum()), drafted, accepted, exact=True,
        total_s=lambda again: float((counts * again.of(drafters)).sum() + alone * again.plain_s),
    )  # fmt: skip


def _tokens(trace: Trace) -> np.ndarray:
    """(prompts,) tokens that rounds emit."""
    return np.array([max(0, len(trace.outputs(prompt)) - FIRST) for prompt in trace.prompts])


def _alone(trace: Trace, prices: Prices) -> Ranked:
    tokens = _tokens(trace)
    seconds = tokens * prices.plain_s
    return Ranked(
        None, "autoregressive", "none", None, 0, tokens, seconds, seconds, int(tokens.sum()), 0, 0, exact=True,
        total_s=lambda again: float(tokens.sum()) * again.plain_s,
    )  # fmt: skip


# From counts to a row.


def _of_cell(cell: Cell, way: Way, name: str, prices: Prices, *, exact: bool) -> Ranked:
    total = cell.rounds_by_drafted.sum(axis=0)
    return Ranked(
        way, cell.drafter, name, cell.exit_layer, cell.draft_length, cell.tokens_of_prompt,
        decoding_seconds(cell, prices.costs), cell.tokens_of_prompt * prices.plain_s,
        cell.rounds, cell.drafted, cell.accepted, exact=exact,
        total_s=lambda again: float(total @ again.row(cell.drafts, cell.draft_length)),
    )  # fmt: skip


def _of_replay(found: Replay, prices: Prices) -> Ranked:
    counts = found.counts()
    return Ranked(
        found.way, _who(found.way), found.way.name, _exit_of(found.way), found.way.draft_length,
        found.tokens_of_prompt, _seconds(found, prices), found.tokens_of_prompt * prices.plain_s,
        counts["rounds"], counts["drafted"], counts["accepted"], exact=found.exact,
        total_s=lambda again: float(_seconds(found, again).sum()),
    )  # fmt: skip


def _seconds(found: Replay, prices: Prices) -> np.ndarray:
    drafters = found.way.drafters
    seconds = prices.of(drafters, found.way.draft_length)
    return found.seconds_of_prompt(
        seconds, prices.plain_s, prices.watching(found.way.policy, drafters, found.way.draft_length)
    )


def _who(way: Way) -> str:
    return way.keys[0].model if len(way.keys) == 1 else f"{len(way.keys)} drafters in turn"


def _exit_of(way: Way) -> int | None:
    return way.keys[0].exit_or_null if len(way.keys) == 1 else None
