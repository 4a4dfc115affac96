"""Costs measured on the device at hand: the decoder's own steps, in the order in which a round runs them."""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit.costs.batch import BatchCosts
from probekit.costs.blocks import MOST_DRAFTS, assemble
from probekit.costs.profile import Costs, DraftHeadKey
from probekit.costs.trees import timed_exits, timed_shapes
from probekit.drafting.drafters import Drafter, DraftModel, ExitLayer
from probekit.drafting.keys import check_draft_model
from probekit.drafting.policies import FIXED, Policy
from probekit.drafting.tree_drafters import TreeDrafts
from probekit.errors import InputError
from probekit.progress import Progress, usual_progress
from probekit.settings import Sampling, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    from probekit.lens.exit_heads import ExitHead
    from probekit.models.loaded import Loaded

CALIBRATION_S = 4.0
FEWEST, MOST = 5, 40
"""A calibration sweeps over all steps for about CALIBRATION_S seconds, FEWEST times at least and MOST at most."""


def measure_costs(
    loaded: Loaded | str | Path,
    context: int = 128,
    *,
    exit_layers: Iterable[int] | None = None,
    draft_lengths: Iterable[int] = range(1, 9),
    drafter: Loaded | None = None,
    draft_vocabulary: Sequence[int] | Tensor | None = None,
    exit_heads: Mapping[int, ExitHead] | None = None,
    sampling: Sampling | None = None,
    policy: Policy | None = None,
    rows: int = 1,
    repeats: int | None = None,
    engine: str = "host",
    clock: str = "wall",
    progress: Progress | None = None,
) -> Costs:
    """Time the decoder's steps on the device that the model is on.

    Parameters
    ----------
    context: tokens in the cache when a step is timed; in a batch of the longest row, each further one has one less.
    exit_layers: exits to time beside the first and the last; by default those at a quarter and a half of the depth.
        The others are read off.
    draft_lengths: the longest decides how wide a verification pass can be.
    drafter: a draft model, to be timed too.
    draft_vocabulary: the tokens whose rows of the head exit layers draft with (`Trace.draft_head_ids`); all by default.
    exit_heads: {exit: head} that drafts go through (`traced_heads`); none by default.
    sampling: how tokens are chosen; greedy by default.
    policy: asked after each draft as in a decoder, which takes its time; by default none.
    rows: in the batch; seconds are of all of them together. Trees are timed for one row only.
    repeats: sweeps over all steps; by default as many as take a few seconds, and a few of a model that is split over
        processes, which go in step.
    engine: who runs the rounds, one of `decoding.device_decoding.ENGINES`; "cuda" times whole recorded rounds of exit
        layers, without a draft model and a policy.
    clock: "wall", or "processor": seconds of this process alone, on a CPU that does other things beside; of one thread
        (`torch.set_num_threads(1)`), for it counts those of all.
    progress: called as `progress("costs", percent, 100)`.

    Raises
    ------
    InputError: for a context that the model does not reach, an exit or draft length that does not exist, and a clock
        that would not tell the time of a step.

    Examples
    --------
    >>> import probekit
    >>> costs = probekit.measure_costs("tales-tied", context=64, draft_lengths=[2], repeats=1)
    >>> costs.source, costs.context, costs.autoregressive_s > 0
    ('measured', 64, True)
    """
    import torch

    from probekit.costs.recorded import RecordedTimer
    from probekit.costs.timing import RoundTimer
    from probekit.decoding.device_decoding import check_engine_name
    from probekit.decoding.self_check import check_decodable
    from probekit.lens.exit_heads import check_heads, fingerprint
    from probekit.models.loaded import as_loaded

    loaded, drafter = as_loaded(loaded), None if drafter is None else as_loaded(drafter)
    check_decodable(loaded)
    if check_engine_name(engine) == "cuda" and policy not in (None, FIXED):
        raise InputError(f"engine 'cuda' records rounds of a fixed length, not with {policy}.", "Use engine 'host'.")
    if loaded.depth < 2:
        raise InputError(f"{loaded.name} has one layer, and so no exit to draft from: there is nothing to measure.")

    heads = check_heads(exit_heads, loaded.anatomy) if exit_heads else {}
    head = DraftHeadKey(
        None if draft_vocabulary is None else len(draft_vocabulary), fingerprint(heads) if heads else None
    )
    longest = max(2, *_checked_lengths(draft_lengths))
    inner = exit_layers or [max(1, loaded.depth // 4), max(1, loaded.depth // 2)]
    exits = sorted({1, loaded.depth - 1, *map(loaded.anatomy.check_exit, inner)})
    whole_number("the context must be", context, 1)
    whole_number("rows of a batch must be", rows, 1)
    _check_clock(clock, loaded)
    if engine == "cuda" and rows > 1:
        raise InputError(f"engine 'cuda' records rounds of one row, not of {rows}.", "Use engine 'host'.")
    drafters: list[Drafter] = [
        ExitLayer(exit_layer, head.rows, head.exit_heads, draft_vocabulary, heads.get(exit_layer))
        for exit_layer in exits
    ]
    if drafter is not None:
        drafters.append(DraftModel(drafter.name, drafter))
    chains_only = engine == "cuda" or rows > 1 or loaded.anatomy.batch_invariant  # where no round of a tree runs
    if not chains_only and (sampling or Sampling()).greedy and (policy or FIXED) == FIXED and head.rows is None:
        drafters += [
            TreeDrafts(ExitLayer(exit_layer, exit_heads=head.exit_heads, exit_head=heads.get(exit_layer)), shape)
            for exit_layer in timed_exits(loaded.depth)
            for shape in timed_shapes(longest)
        ]
    for model in [loaded] if drafter is None else [loaded, check_draft_model(loaded, drafter)]:
        if context + longest + 1 > model.anatomy.context:
            raise InputError(
                f"a context of {context} tokens and drafts of {longest} exceed the {model.anatomy.context} tokens that "
                f"{model.name} reads."
            )

    started, report = time.perf_counter(), usual_progress(progress)
    widths = row_design(longest)
    order = random.Random(0)
    times: dict[str, list[float]] = defaultdict(list)
    blocks: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        bound = {each.key: each.on(loaded) for each in drafters}
        sampling = sampling or Sampling()
        timer: RoundTimer | RecordedTimer
        if engine == "cuda":
            timer = RecordedTimer(loaded, bound, context, longest, sampling)
        else:
            timer = RoundTimer(loaded, bound, context, longest, MOST_DRAFTS, sampling, policy or FIXED, rows, clock)
        jobs = list(bound)
        for job in jobs:  # to warm up
            deque(timer.measure(job, widths[-2:]), maxlen=0)
        began = time.perf_counter()
        sweeps, planned, share = 0, repeats or FEWEST, 0.0
        while sweeps < planned:
            order.shuffle(jobs)
            block: dict[str, list[float]] = defaultdict(list)
            for job in jobs:
                for step, seconds in timer.measure(job, order.sample(widths, len(widths))):
                    block[step].append(seconds)
            for step, each in block.items():
                times[step] += each
                blocks[step].append(float(np.median(each)))
            sweeps += 1
            if repeats is None and loaded.anatomy.split_over == 1:  # else all processes make the same passes
                planned = int(np.clip(CALIBRATION_S * sweeps / (time.perf_counter() - began), FEWEST, MOST))
            share = max(share, min(1.0, sweeps / planned))  # the plan is made again after every sweep
            report("costs", round(100 * share), 100)
    blank = Costs(
        source="measured",
        device=device_name(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        context=context,
        depth=loaded.depth,
        autoregressive_s=1.0,
        early_s={},
        head_s=1.0,
        verify_s={},
        draft_head=head,
        seconds=time.perf_counter() - started,
        sweeps=sweeps,
        engine=engine,
        rows=rows,
        blocks={step: tuple(each) for step, each in sorted(blocks.items())},
    )
    return assemble(times, exits, widths, blank, None if drafter is None else drafter.name)


def measure_batch(loaded: Loaded | str | Path, context: int = 128, *, rows: int, **settings: Any) -> BatchCosts:
    """Time the decoder's steps at 1, 2, 4, .. and `rows` rows: a batch empties row by row, and what lies between is
    read off straight lines. settings: as for `measure_costs`, `rows` left out. Raises what that raises."""
    whole_number("rows of a batch must be", rows, 1)
    return BatchCosts.of(rows, lambda size: measure_costs(loaded, context, rows=size, **settings))


def _check_clock(clock: str, loaded: Loaded) -> None:
    import torch

    from probekit.costs.timing import CLOCKS

    if clock not in CLOCKS:
        raise InputError(f"clock {clock!r} is not known: it is {' or '.join(CLOCKS)}.")
    threads = torch.get_num_threads()
    if clock == "processor" and (loaded.device.type != "cpu" or threads > 1):
        where = f"{threads} threads" if loaded.device.type == "cpu" else str(loaded.device)
        raise InputError(
            f"the processor's clock counts the time of one thread on a CPU; this model runs on {where}.",
            "Call torch.set_num_threads(1), or take the wall clock.",
        )


def _checked_lengths(draft_lengths: Iterable[int]) -> list[int]:
    lengths = list(draft_lengths)
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
            raise InputError(f"draft length {length!r} is out of range: a draft length is 1 or more.")
    if not lengths:
        raise InputError("no draft length was given; expected one or more, each 1 or more.")
    return [int(length) for length in lengths]


def row_design(longest: int) -> list[int]:
    """The widths of verification passes to time: every one up to 9 rows, then one in four, and the widest."""
    return sorted({*range(1, min(longest + 1, 9) + 1), *range(13, longest + 1, 4), longest + 1})


def device_name(device: Any) -> str:
    """What a person calls the device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
