"""A drafter from a file: read against a trace, predicted, run, and refused by name where it does not fit."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from traces.fabricate import fabricate

from probekit.costs.roofline import roofline_costs
from probekit.decoding.speculative import Speculative
from probekit.drafting.drafters import DraftModel
from probekit.drafting.imported import ImportedDrafter, import_drafter
from probekit.errors import InputError
from probekit.prediction.predict import predict
from probekit.settings import Sampling
from probekit.tracing.tracer import trace
from probekit.validation.run import validate


@pytest.fixture(scope="module")
def run(tiny, tiny_draft):
    return trace(tiny, [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], max_new_tokens=24, draft_model=tiny_draft)


def argmaxes(loaded, run) -> pd.DataFrame:
    """What a second model says along the texts of a trace, in one pass of each: how such a file is made."""
    rows = []
    for prompt in run.prompts:
        context, text = run.prompt_ids(prompt).tolist(), run.outputs(prompt).tolist()
        logits = loaded.model(torch.tensor([[*context, *text][:-1]])).logits[0, len(context) - 1 :]
        rows += [(prompt, place, token) for place, token in enumerate(logits.argmax(-1).tolist())]
    return pd.DataFrame(rows, columns=["prompt", "output", "token"])


def written(frame: pd.DataFrame, folder, name: str = "eagle.parquet"):
    frame.to_parquet(folder / name, index=False)
    return folder / name


def test_a_draft_model_by_its_file_is_the_draft_model(tiny, tiny_draft, run, tmp_path):
    """The same rounds, though the file knows nothing behind a mismatch: drafts are counted, not judged, there."""
    imported = import_drafter(written(argmaxes(tiny_draft, run), tmp_path), run, step_s=0.001)
    assert (imported.key.kind, imported.key.model, imported.step_s) == ("imported", "eagle", 0.001)
    table = predict(run, draft_lengths=[1, 3, 5], drafters=[imported, DraftModel("tiny-draft")], with_rounds=True)
    for length in (1, 3, 5):
        mine, theirs = table.cell(imported.key, length), table.cell(None, length)
        assert (mine.rounds, mine.accepted, mine.tokens) == (theirs.rounds, theirs.accepted, theirs.tokens)
    found = validate(tiny, run, drafters=[imported], draft_lengths=[1, 3, 5], costs=roofline_costs(tiny))
    for cell in found.cells:
        assert cell.rounds_equal and cell.tokens_equal and cell.measured == cell.predicted
    assert sum(cell.measured["accepted"] for cell in found.cells) > 0
    print(f"{len(found.cells)} cells, {sum(cell.measured['rounds'] for cell in found.cells)} rounds equal")


def by_depth(run, depths: int, seed: int = 0) -> pd.DataFrame:
    """Right with a chance that falls with the depth; some drafts are missing, and end their chain."""
    random, rows = np.random.default_rng(seed), []
    for prompt in run.prompts:
        for place, token in enumerate(run.outputs(prompt).tolist()):
            for depth in range(min(depths, place + 1)):
                if depth and random.random() < 0.2:
                    continue
                right = random.random() < 0.9 - 0.2 * depth
                rows.append((prompt, place, depth, token if right else (token + 1) % 97, token))
    return pd.DataFrame(rows, columns=["prompt", "output", "depth", "token", "text_id"]).sample(frac=1, random_state=1)


def test_drafts_may_depend_on_where_their_round_began(tiny, run, tmp_path):
    frame = by_depth(run, 3)
    imported = import_drafter(written(frame, tmp_path), run)
    known = {(row.prompt, row.output, row.depth): row.token for row in frame.itertuples()}
    seen = imported.outlook(run, 0, 5)
    for start in range(len(seen.run)):
        chain = []
        while len(chain) < 5 and (0, start + len(chain), len(chain)) in known:
            chain.append(known[0, start + len(chain), len(chain)])
        text = run.outputs(0).tolist()[start:]
        matches = [draft == token for draft, token in zip(chain, text, strict=False)] + [False]
        assert (seen.drafted[start], seen.run[start]) == (len(chain), matches.index(False))
    assert seen.drafted.max() == 3
    found = validate(tiny, run, drafters=[imported], draft_lengths=[2, 5], costs=roofline_costs(tiny))
    assert all(cell.rounds_equal and cell.tokens_equal and cell.measured == cell.predicted for cell in found.cells)


def test_a_file_of_more_prompts_is_read_for_those_of_the_trace(run, tmp_path):
    path = written(by_depth(run, 1), tmp_path)
    some = run.select([1, 3])
    assert set(import_drafter(path, some).tokens) == {1, 3}


def test_the_first_position_may_be_missing_since_the_prefill_emits_it(run, tmp_path):
    frame = by_depth(run, 1)
    import_drafter(written(frame[frame["output"] > 0], tmp_path), run)


def test_probabilities_along_sampled_text(tmp_path):
    made = fabricate(text="sampled", tokens=20)
    rows = [
        {"prompt": prompt, "output": place, "token": 1, "accept_probability": float(w)}
        for prompt in made.prompts
        for place, w in enumerate(made.accept_probability(prompt)[4])
    ]
    imported = import_drafter(written(pd.DataFrame(rows), tmp_path), made)
    table = predict(made, [4], [3])
    mine = predict(made, draft_lengths=[3], drafters=[imported]).cells[0]
    assert mine.accepted == pytest.approx(table.cells[0].accepted)
    with pytest.raises(InputError, match="known along sampled texts only"):
        imported.on(None)
    frame = pd.DataFrame(rows).rename(columns={"accept_probability": "q"})
    with pytest.raises(InputError, match=r"gives q, and these texts were sampled with .*0\.8"):
        import_drafter(written(frame, tmp_path), made)
    given = fabricate(text="given", tokens=20)
    frame = pd.DataFrame(
        [{"prompt": p, "output": o, "token": 1, "q": 0.01} for p in given.prompts for o in range(len(given.outputs(p)))]
    )
    chances = import_drafter(written(frame, tmp_path), given).signal(given, 0)
    expected = np.minimum(1, 0.01 / np.exp(given.values(0, "log_probability")[-1]))
    assert chances == pytest.approx(expected, rel=1e-5)


def test_without_probabilities_a_sampled_text_is_drafted_for_certain(tmp_path):
    made = fabricate(text="sampled", tokens=20)
    imported = import_drafter(written(by_depth(made, 1), tmp_path), made)
    assert isinstance(imported, ImportedDrafter)
    cell = predict(made, draft_lengths=[3], drafters=[imported]).cells[0]
    assert cell.rounds == int(cell.rounds)


def test_it_runs_greedily_only(tiny, run, tmp_path):
    imported = import_drafter(written(by_depth(run, 1), tmp_path), run)
    with pytest.raises(InputError, match="known along greedy texts only"):
        Speculative(tiny, imported, 2).decode([[1, 2]], max_new_tokens=8, sampling=Sampling(1.0))


def test_prompts_that_the_file_has_not_are_decoded_without_drafts(tiny, run, tmp_path):
    imported = import_drafter(written(by_depth(run, 1), tmp_path), run)
    (done,) = Speculative(tiny, imported, 2).decode([[1, 2, 3]], max_new_tokens=8, indices=[99])
    assert sum(done.drafted) == 0


FAULTS = [
    (lambda frame: frame.drop(columns="token"), r"lacks \['token'\]"),
    (lambda frame: frame.assign(surprise=1), r"unknown columns \['surprise'\]"),
    (lambda frame: frame.assign(token=frame["token"].astype(float)), "holds double with 0 missing values as 'token'"),
    (lambda frame: frame.assign(token=frame["token"].astype(str)), "as 'token'; expected whole numbers"),
    (lambda frame: frame.assign(token=frame["token"].astype("Int64").mask(frame["output"] == 3)), "missing values"),
    (lambda frame: frame.assign(token=frame["token"] + 96), r"a token outside 0\.\.96"),
    (lambda frame: frame.assign(token=-1), r"a token outside 0\.\.96"),
    (lambda frame: frame.assign(token=2**40), "too large"),
    (lambda frame: frame.assign(output=frame["output"] + 1), "an output position outside its text"),
    (lambda frame: frame.assign(output=frame["output"] - 1), "an output position outside its text"),
    (lambda frame: frame.assign(prompt=frame["prompt"] + 50), "a prompt that the trace has not"),
    (lambda frame: frame.assign(depth=5000), "a depth outside"),
    (lambda frame: frame.assign(depth=frame["output"] + 1), "would begin before the text"),
    (lambda frame: pd.concat([frame, frame.iloc[:2]]), "stands there twice"),
    (lambda frame: frame[frame["output"] != 5], r"has no draft at output 5 of prompt 0 \(1 positions"),
    (lambda frame: frame[frame["prompt"] != 2], "has no draft at output 1 of prompt 2"),
    (lambda frame: frame.assign(text_id=frame["text_id"] + (frame["output"] == 4)), "is of another text: prompt 0"),
    (lambda frame: frame.iloc[:0], "holds no draft"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=[message[:30] for _, message in FAULTS])
def test_a_file_that_does_not_fit_is_refused(run, tmp_path, spoil, message):
    path = written(spoil(by_depth(run, 1).sort_values(["prompt", "output"], ignore_index=True)), tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        import_drafter(path, run)
    assert "\n" not in str(caught.value) and re.search(r"eagle\.parquet", str(caught.value))


def test_what_is_no_file_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        import_drafter(tmp_path / "nothing.parquet", run)
    path = tmp_path / "text.parquet"
    path.write_text("not Parquet at all")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        import_drafter(path, run)
    path.write_bytes(written(by_depth(run, 1), tmp_path).read_bytes()[:200])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        import_drafter(path, run)
    with pytest.raises(InputError, match="takes -1 seconds"):
        import_drafter(path, run, step_s=-1)
