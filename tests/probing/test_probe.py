"""`probe`: a planted direction, a shuffled label, every label of the trace, the user's own, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from probekit.errors import InputError
from probekit.hooks.edit import Edit
from probekit.models.synthetic import synthetic
from probekit.probing import probe as room
from probekit.probing.labels import class_of_token, label_named
from probekit.probing.probe import Estimator, choose_setting, deal, probe
from probekit.settings import KeptResiduals, Sampling
from probekit.traces.token_text import looped, looped_mask
from probekit.tracing.tracer import trace

PROMPTS = [[index + 1, 2 * index + 3, 5] for index in range(12)]
TOKENS = 24


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "run"
    return trace(tiny, PROMPTS, folder, max_new_tokens=TOKENS, keep_residuals=KeptResiduals(None, rows="scored"))


def coin(trace, rows, layer):
    """A label that nothing in the model knows."""
    return np.random.default_rng(5).random(len(rows)) < 0.5


def test_a_planted_direction_is_found_and_a_shuffled_label_is_not(run, monkeypatch):
    """A direction of a tenth of the stream's norm, added where the label is true."""
    residuals = run.residuals(2).scored()
    truth = coin(run, residuals.frame, 2)
    x = residuals.numpy()
    direction = np.random.default_rng(9).normal(size=x.shape[1])
    direction *= np.linalg.norm(x, axis=1).mean() / np.linalg.norm(direction)
    monkeypatch.setattr(type(residuals), "numpy", lambda self, generated=False: x + truth[:, None] * direction)
    found = probe(run, coin, [2]).layers[0]
    assert found.score.value > 0.99
    assert abs(found.control.value - 0.5) < 0.06 and found.selectivity > 0.4

    def shuffled(trace, rows, layer):
        return np.random.default_rng(6).permutation(truth)

    lost = probe(run, shuffled, [2], shuffles=8).layers[0]
    assert lost.control.low <= lost.score.value <= lost.control.high


def test_a_direction_that_an_edit_adds_is_found(tmp_path):
    """The same in the model itself: the stream after layer 2 is changed at every other position."""
    loaded = synthetic("tiny", seed=1)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    direction = torch.randn(loaded.anatomy.width, generator=torch.Generator().manual_seed(3))

    def push(residual):
        odd = (torch.arange(residual.shape[1]) % 2 == 1).to(residual)
        return residual + odd[None, :, None] * direction * residual.norm(dim=-1, keepdim=True).mean() / 4

    texts = [[1 + index, 7, *np.random.default_rng(index).integers(1, 90, 12).tolist()] for index in range(8)]
    with Edit(loaded.model, at={2: push}):
        kept = trace(loaded, texts, tmp_path / "run", max_new_tokens=1, keep_residuals=[2], given=True)
    odd = probe(kept, lambda trace, rows, layer: rows["position"].to_numpy() % 2 == 1, [2])
    assert odd.layers[0].score.value > 0.99
    assert all(torch.equal(before[name], value) for name, value in loaded.model.state_dict().items())


def test_a_fold_is_scikit_learns_on_the_same_split(run):
    """Folds by prompt, the chosen C, and the answers of scikit-learn's own pipeline: one AUROC."""
    mine = probe(run, "agrees", [2], grid={"C": [0.01]}).layers[0]
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, tol=1e-8, max_iter=5000))
    same = probe(run, "agrees", [2], estimator=theirs, grid={}).layers[0]
    assert np.isclose(mine.score.value, same.score.value, atol=1e-3) and np.isclose(mine.brier, same.brier, atol=1e-4)
    other = probe(run, "agrees", [2], estimator=KNeighborsClassifier(5), grid={"n_neighbors": [3, 9]})
    assert other.estimator == "KNeighborsClassifier" and set(other.layers[0].regularisation) <= {3.0, 9.0}


def test_prompts_are_never_split(run, monkeypatch):
    """Whatever a probe is fitted on shares no prompt with what it answers."""
    seen: list[np.ndarray] = []
    original = Estimator.fitted

    def fitted(self, setting, x, y):
        seen.append(np.asarray(x))
        return original(self, setting, x, y)

    monkeypatch.setattr(Estimator, "fitted", fitted)
    residuals = run.residuals(1).scored()
    prompt = residuals.frame["prompt"].to_numpy()
    whole = residuals.numpy()
    probe(run, "agrees", [1], shuffles=1)
    owner = {row.tobytes(): index for row, index in zip(whole, prompt.tolist(), strict=True)}
    counts = pd.Series(prompt).value_counts()
    fitted_on = [pd.Series([owner[row.tobytes()] for row in x]) for x in seen if x.shape[1] == whole.shape[1]]
    assert fitted_on and all(each.value_counts().to_dict() == counts[each.unique()].to_dict() for each in fitted_on)
    assert max(each.nunique() for each in fitted_on) == 9  # of twelve, in four folds


def test_regularisation_is_chosen_within_the_training_part(run):
    """What the held-out rows say changes nothing."""
    residuals = run.residuals(2).scored()
    prompt, x = residuals.frame["prompt"].to_numpy(), residuals.numpy()
    y = coin(run, residuals.frame, 2)
    fold = np.array([deal(run.prompts, 4, 0)[each] for each in prompt.tolist()])
    train = fold != 0
    engine = Estimator.of("logistic", None, False)
    one = choose_setting(engine, lambda rows: x[rows], y, prompt, train, np.array([False, True]))
    turned = np.where(train, y, ~y)
    other = choose_setting(engine, lambda rows: x[rows], turned, prompt, train, np.array([False, True]))
    assert one.setting == other.setting and not (one.judged & ~train).any()


@pytest.mark.parametrize("label", ["agrees", "accepted", "entropy", "looped", "position", "token-class"])
def test_every_label_of_a_trace(run, label):
    found = probe(run, label, [2], shuffles=1)
    [layer] = found.layers
    assert layer.positions == len(run.residuals(2).scored()) and layer.prompts == 12
    assert found.number == (label in ("entropy", "position"))
    document = json.loads(json.dumps(found.to_json()))
    scored = "r2" if found.number else "auroc"
    assert (
        document["layers"][0][scored] is not None and document["layers"][0]["auroc" if found.number else "r2"] is None
    )
    assert set(found.to_pandas()["kind"]) >= {"probe", "control", "confidence", "position"}
    assert label in found._repr_html_()


def test_labels_are_what_the_trace_says(run):
    rows = run.residuals(3).frame
    agreed = label_named("agrees")[1](run, rows, 3)
    place = rows.index[(rows["prompt"] == 4) & (rows["output"] == 7)][0]
    assert agreed[place] == run.agreement(4)[3, 7]
    assert np.array_equal(label_named("accepted")[1](run, rows, 3), agreed)
    entropy = label_named("entropy")[1](run, rows, 3)
    assert np.isclose(entropy[place], run.values(4, "entropy")[run.depth, 7])
    assert [class_of_token(text) for text in ("␣the", "ing", "12", "␣.", "⏎", "␣", "⟨0xE2⟩", "a1")] == [
        "word", "piece", "number", "punctuation", "space", "space", "other", "other",
    ]  # fmt: skip
    tokens = [1, 2, 3, 4, 5, 6, 7, 8] * 3
    assert looped_mask(tokens).tolist() == [False] * 8 + [True] * 16 and looped(tokens) == 16 / 24


def test_acceptance_on_sampled_text_is_drawn_by_its_chance(tiny, tmp_path):
    sampled = trace(tiny, PROMPTS, tmp_path / "run", max_new_tokens=TOKENS, keep_residuals=[3],
                    sampling=Sampling(temperature=1.0, seed=4))  # fmt: skip
    rows = sampled.residuals(3).scored().frame
    read = label_named("accepted")[1]
    drawn = read(sampled, rows, 3)
    assert np.array_equal(drawn, read(sampled, rows, 3))
    chance = np.concatenate([sampled.accept_probability(prompt)[3] for prompt in sampled.prompts])
    assert abs(drawn.mean() - chance.mean()) < 4 * 0.5 / len(rows) ** 0.5


def test_a_label_of_your_own(run, tmp_path):
    frame = run.residuals(2).scored().frame
    table = frame[["prompt", "position"]].assign(mine=coin(run, frame, 2)).iloc[::2]
    for name, write in {
        "labels.csv": lambda path: table.to_csv(path, index=False),
        "labels.parquet": lambda path: table.to_parquet(path),
        "labels.jsonl": lambda path: table.to_json(path, orient="records", lines=True),
    }.items():
        write(tmp_path / name)
        found = probe(run, tmp_path / name, [2], shuffles=1)
        assert found.label == "mine" and found.layers[0].positions == len(table)
    by_output = table.assign(output=frame["output"].iloc[::2]).drop(columns="position")
    assert probe(run, by_output, [2], shuffles=1).layers[0].score == found.layers[0].score
    number = table.assign(mine=np.linspace(0.5, 1.7, len(table)))
    assert probe(run, number, [2], shuffles=1).number
    with pytest.raises(InputError, match="twice"):
        probe(run, pd.concat([table, table.iloc[:1]]), [2])
    with pytest.raises(InputError, match="one column of labels"):
        probe(run, table.assign(more=1), [2])
    with pytest.raises(InputError, match="none of the rows"):
        probe(run, table.assign(prompt=table["prompt"] + 99), [2])
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read as a table"):
        probe(run, tmp_path / "bad.parquet", [2])


def test_rows_that_do_not_fit_into_memory(run, monkeypatch):
    held = probe(run, "agrees", [1, 3], shuffles=1)
    monkeypatch.setattr(room, "HELD_BYTES", 0)
    monkeypatch.setattr("probekit.probing.probes.HELD_BYTES", 0)
    streamed = probe(run, "agrees", [1, 3], shuffles=1)
    for one, other in zip(held.layers, streamed.layers, strict=True):
        np.testing.assert_allclose(one.score, other.score, atol=5e-3)


def test_what_is_refused(run, tiny, tmp_path):
    with pytest.raises(InputError, match="there is no label 'colour'"):
        probe(run, "colour")
    with pytest.raises(InputError, match="is no exit"):
        probe(run, "accepted", [5])
    with pytest.raises(InputError, match="nothing to tell apart"):
        probe(run, "agrees", [5])
    with pytest.raises(InputError, match="there is no probe 'tree'"):
        probe(run, "agrees", [2], estimator="tree")
    with pytest.raises(InputError, match="no estimator"):
        probe(run, "agrees", [2], estimator=object())
    with pytest.raises(InputError, match="needs 4"):
        probe(run.select([0, 1, 2]), "agrees", [2])
    with pytest.raises(InputError, match="no residuals of layer 1"):
        probe(trace(tiny, PROMPTS, max_new_tokens=2), "agrees", [1])
    with pytest.raises(InputError, match="kept no residuals"):
        probe(trace(tiny, PROMPTS, max_new_tokens=2), "agrees")
