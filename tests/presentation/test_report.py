"""The report's parts that need no browser: what travels in the page, what stands in it, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from presentation.fabricate_study import fabricate_study, fabricate_trace
from traces.fabricate import fabricate

from probekit.errors import InputError
from probekit.presentation.report import ASSETS, joined_scripts, write_lens_page, write_report
from probekit.presentation.report_data import Source, pack_models, packed, safe_json, token_texts
from probekit.presentation.report_text import way_label
from probekit.presentation.study_folder import open_study
from probekit.presentation.tables import lens_table
from probekit.probing.attribution import attribute
from probekit.traces.token_text import visible
from probekit.traces.trace import Trace
from probekit.tracing.tracer import trace

MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(1)><!-- &amp; \u2028"


class Page(HTMLParser):
    """Elements and visible text of a page; data and scripts apart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.inside: list[str] = []
        self.text = ""
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in self.raw:
            self.raw[tag].append("")
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if self.inside:
            self.raw[self.inside[-1]][-1] += data
        else:
            self.text += data

    def attributes(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> dict:
        return json.loads(self.raw["script"][0])


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return fabricate_study(tmp_path_factory.mktemp("report") / "study", drafter=True, prompts=8)


@pytest.fixture(scope="module")
def page(study) -> Page:
    return Page(write_report(study))


def unpacked(piece: dict) -> np.ndarray:
    """The inverse of `packed`, in numpy's own words."""
    raw = base64.b64decode(piece["data"])
    if piece["kind"] == "bits":
        return np.unpackbits(np.frombuffer(raw, np.uint8), count=piece["length"]).astype(bool)
    kinds = {"u16": "<u2", "u32": "<u4", "f16": "<f2", "f32": "<f4"}
    return np.frombuffer(raw, kinds[piece["kind"]])


# ------------------------------------------------------------------------------------------------ data in the page
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda each: st.lists(each)))
def test_json_cannot_leave_its_element(document):
    text = safe_json(document)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == document


def test_json_refuses_what_is_no_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        safe_json(float("nan"))


@given(arrays(bool, array_shapes(max_dims=2, max_side=20)))
def test_bits_come_back(values):
    assert unpacked(packed(values)).tolist() == values.ravel().tolist()


@given(arrays(np.uint32, array_shapes(max_dims=2, max_side=20), elements=st.integers(0, 200_000)))
def test_counts_come_back_in_the_narrowest_kind(values):
    piece = packed(values)
    assert piece["kind"] == ("u16" if values.max() < 65536 else "u32")
    assert unpacked(piece).tolist() == values.ravel().tolist()


def test_chances_come_back_exactly_and_figures_to_three_digits():
    values = np.random.default_rng(0).random((3, 7)).astype(np.float32)
    assert (unpacked(packed(values)) == values.ravel()).all()
    assert unpacked(packed(values, "f16")) == pytest.approx(values.ravel(), rel=1e-3)


def test_packed_signal_is_the_traces_own(study, page):
    for model in page.data["models"]:
        trace = Trace.open(study / "traces" / model["label"])
        for prompt in model["prompts"]:
            index = prompt["prompt"]
            rows = [*trace.agreement(index)[1:-1], trace.drafter_agreement(index)]
            assert unpacked(prompt["signal"]).tolist() == np.concatenate(rows).tolist()
            ids = [*trace.prompt_ids(index), *trace.outputs(index)]
            names = token_texts(trace)
            shown = [model["tokens"][place] for place in unpacked(prompt["ids"])]
            assert shown == [names.get(token, f"#{token}") for token in ids]


def test_sampled_text_travels_as_chances(tmp_path):
    trace = fabricate(text="sampled", top=1)
    cells = pd.DataFrame({"exit_layer": [1], "draft_length": [2]})
    (model,) = pack_models([Source("m", trace, cells)])
    for prompt in model["prompts"]:
        expected = trace.accept_probability(prompt["prompt"])[1:-1]
        assert prompt["signal"]["kind"] == "f32"
        assert (unpacked(prompt["signal"]) == expected.ravel()).all()


def test_sixteen_bit_decoders_are_replayed_with_rounded_logits():
    trace = fabricate(dtype="bfloat16", top=1)
    flipped = trace.layers.assign(agrees_rounded=~trace.layers["agrees"])
    trace = Trace.from_frames(trace.manifest, trace.texts, trace.tokens, flipped, top=trace.top)
    (model,) = pack_models([Source("m", trace, pd.DataFrame({"exit_layer": [1], "draft_length": [2]}))])
    assert unpacked(model["prompts"][0]["signal"]).tolist() == (~trace.agreement(0)[1:-1]).ravel().tolist()


def test_the_page_fills_up_to_its_limit():
    trace = fabricate_trace("m", prompts=6)
    source = Source("m", trace, pd.DataFrame({"exit_layer": [1], "draft_length": [2]}))

    def parts(limit: int) -> tuple[list[bool], list[bool]]:
        (model,) = pack_models([source], limit)
        whole = [[prompt[part] is not None for prompt in model["prompts"]] for part in ("lens", "drafts")]
        assert all(prompt["signal"] for prompt in model["prompts"])
        return whole[0], whole[1]

    (everything,) = pack_models([source])
    size = len(safe_json(everything))
    assert parts(10 * size) == ([True] * 6, [True] * 6)
    lens, _ = parts(size // 2)
    assert lens[:1] == [True], "texts with a top ten come first"
    assert not lens[-1]
    assert parts(0) == ([False] * 6, [False] * 6)


def test_token_texts_knows_the_first_token_of_a_prompt():
    trace = fabricate(prompts=1, seed=3)
    ids = trace.prompt_ids(0).tolist()
    assert ids[0] not in ids[1:]
    first = "<start>" + "".join(f" w{token}" for token in ids[1:])
    kept = trace.tokens[trace.tokens["text_id"] != ids[0]]
    assert len(kept) == len(trace.tokens)
    trace = Trace.from_frames(trace.manifest, trace.texts.assign(text=first), trace.tokens, trace.layers)
    assert token_texts(trace)[ids[0]] == visible("<start>")


def test_a_trace_of_agreement_only_has_a_replay_and_no_lens_table(tmp_path):
    trace = fabricate(statistics="agreement")
    (model,) = pack_models([Source("m", trace, pd.DataFrame({"exit_layer": [1], "draft_length": [2]}))])
    assert all(prompt["signal"] and not prompt["lens"] and not prompt["drafts"] for prompt in model["prompts"])
    with pytest.raises(InputError, match="agreement only"):
        write_lens_page(trace, tmp_path / "lens.html")


# ------------------------------------------------------------------------------------------------ the page
def test_the_page_stands_alone(page):
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.source)
    assert "url(" not in page.raw["style"][0]


def test_only_the_pages_own_scripts_and_styles_may_run(page):
    (policy,) = [each["content"] for each in page.attributes("meta") if each.get("http-equiv")]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for text in (page.raw["script"][1], *page.raw["style"]):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert not [attributes for _, attributes in page.tags if "style" in attributes or "onclick" in attributes]


def test_scripts_are_one_module():
    script = joined_scripts()
    assert not re.search(r"^(import|export)\b", script, flags=re.MULTILINE)
    names = re.findall(r"^(?:const|let|function) (\w+)", script, flags=re.MULTILINE)
    assert len(set(names)) == len(names), "two modules use one name"


def test_the_recommendation_comes_first(page, study):
    summary = json.loads((study / "summary.json").read_text())
    assert [each.get("id") for each in page.attributes("section")][:3] == ["recommendation", "next", "agreement"]
    for model in summary["models"]:
        sentence = model["sentence"].removeprefix(f"{model['label']}: ")
        assert sentence[1:] in page.text
        if model["choice"]["speculate"]:
            low, high = model["choice"]["interval"]
            assert f"{model['choice']['speedup']:.2f}×" in page.text
            assert f"{low:.2f} to {high:.2f}" in page.text


def test_what_to_do_next_can_be_typed_and_pasted(study, page):
    summary = json.loads((study / "summary.json").read_text())
    for model in summary["models"]:
        choice = model["choice"]
        if not choice["speculate"]:
            assert "Decode without drafts" in page.text
            continue
        run = shlex.quote(str(study / model["trace"]))
        assert f"probekit choose {run} --export {model['name']}-choice" in page.text
        assert f"probekit validate {run}" in page.text
        assert f"num_assistant_tokens = {choice['draft_length']}" in page.text
    assert "Not measured here: other engines" in page.text


@pytest.mark.second
def test_do_not_speculate_is_said(study, tmp_path):
    folder = _copy(study, tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    choice = summary["models"][0]["choice"]
    choice |= {"speculate": False, "exit_layer": None, "draft_length": None, "speedup": 1.0, "interval": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(folder))  # another way pays
    assert "no pair pays" in page.text and "do not speculate" not in page.text
    assert page.data["models"][0]["chosen"] is None
    for model in summary["models"]:
        del model["choice"]["way"]
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "do not speculate" in Page(write_report(folder)).text


def test_markup_in_data_stays_data(tmp_path):
    folder = fabricate_study(tmp_path / "study", models=("a", "b"), prompts=2, tokens=8, draft_lengths=(1, 2))
    summary = json.loads((folder / "summary.json").read_text())
    for model in summary["models"]:
        model |= {"label": f"{model['label']}{MARKUP}", "sentence": MARKUP, "reference": MARKUP}
    summary |= {"settings": {"prompts": MARKUP}, "machine": {"system": MARKUP}, "versions": {"probekit": MARKUP}}
    (folder / "summary.json").write_text(json.dumps(summary))
    plain = Trace.open(folder / "traces" / "a")
    manifest = plain.manifest.but(prompts_source=MARKUP)
    trace = Trace.from_frames(
        manifest,
        plain.texts.assign(text=MARKUP, kind=MARKUP),
        plain.tokens.assign(text=MARKUP),
        plain.layers,
        top=plain.top.assign(token_text=MARKUP),
    )
    for path in (folder / "traces" / "a").iterdir():
        path.unlink()
    trace.save(folder / "traces" / "a")
    page = Page(write_report(folder))
    assert len(page.attributes("script")) == 2
    assert not page.attributes("img")
    assert "alert(1)" in page.text
    assert page.data["models"][0]["prompts"][0]["text"] == MARKUP


@pytest.mark.second
def test_a_study_of_default_size_stays_below_five_megabytes(tmp_path):
    folder = fabricate_study(tmp_path / "study", depth=12, prompts=24, tokens=96, draft_lengths=(1, 4, 8))
    page = write_report(folder)
    assert page.stat().st_size <= 5_000_000
    data = Page(page).data
    assert all(prompt["lens"] and prompt["drafts"] for model in data["models"] for prompt in model["prompts"])


def test_a_lens_page_of_one_trace(tmp_path):
    page = Page(write_lens_page(fabricate_trace("tales-tied", prompts=1), tmp_path / "lens.html"))
    assert [each["id"] for each in page.attributes("section")] == ["lens"]
    (model,) = page.data["models"]
    assert set(model["prompts"][0]["lens"]) == {"final-norm", "raw"}
    assert model["prompts"][0]["signal"] is None and model["prompts"][0]["attribution"] is None


def test_a_lens_page_without_scripts_has_the_table(tmp_path):
    run = fabricate_trace("tales-tied", depth=3, prompts=1)
    page = write_lens_page(run, tmp_path / "lens.html").read_text(encoding="utf-8")
    plain = "".join(re.findall(r"<noscript>(.*?)</noscript>", page, re.DOTALL))
    table = lens_table(run, 0)
    cells = re.findall(r'<td class="token-cell( agrees)?">(.*?)</td>', plain)
    tokens = [token for row in reversed(table.cells) for token, _ in row]
    assert [html.unescape(text) for _, text in cells] == tokens
    assert sum(bool(dot) for dot, _ in cells) == table.frame["agrees"].sum()
    assert plain.count('class="prompt"') == table.generated.count(False)
    assert "the table is shown without its colours" in plain
    assert "charts" not in plain and "replay" not in plain


def test_the_colours_have_the_names_that_the_page_gives_them():
    for name in ("report.css", "dark.css"):
        red, green, blue = map(int, re.search(r"--loss: (\d+) (\d+) (\d+);", (ASSETS / name).read_text()).groups())
        assert red > 1.9 * max(green, blue), "losses are red, the page says"


def test_who_wrote_a_logit_stands_beside_the_lens(tiny, tmp_path):
    """By layer as the lens table has it: layer n's branches in row n + 1, the embedding in row 0."""
    run = trace(tiny, [[1, 2, 3]], max_new_tokens=5, top_prompts=1)
    shares = attribute(tiny, [*run.prompt_ids(0).tolist(), *run.outputs(0).tolist()][:-1])
    page = Page(write_lens_page(run, tmp_path / "lens.html", {0: shares}))
    found = page.data["models"][0]["prompts"][0]["attribution"]
    written = {
        name: np.frombuffer(base64.b64decode(each["data"]), np.float32).reshape(-1, 7) for name, each in found.items()
    }
    assert written["attention"].shape == (6, 7) and not written["attention"][0].any()
    np.testing.assert_allclose(written["mlp"][3], shares.values[:, shares.terms.index("mlp:2")], rtol=1e-6)
    np.testing.assert_allclose(written["embedding"][0], shares.values[:, 0], rtol=1e-6)
    whole = sum(written[name].sum(axis=0) for name in ("embedding", "attention", "mlp", "other"))
    np.testing.assert_allclose(whole, written["logits"][0], atol=1e-4)


@pytest.mark.second
def test_a_study_says_who_wrote_the_logits_of_its_first_texts(tmp_path):
    """Two models' first two texts; what the third model's layers add is not known."""
    folder = fabricate_study(tmp_path / "study", attributed=2)
    table = pd.read_csv(folder / "tables" / "attribution.csv")
    page = Page(write_report(folder))
    known = [[each["attribution"] is not None for each in model["prompts"]] for model in page.data["models"]]
    assert known == [[True, True, False, False, False, False]] * 2 + [[False] * 6]
    assert "Of 4 texts it also says" in page.text
    found = page.data["models"][1]["prompts"][1]["attribution"]
    own = table[(table["model"] == "tales-tied") & (table["prompt"] == 1)]
    rows = own["position"].nunique()
    written = {
        name: np.frombuffer(base64.b64decode(each["data"]), np.float32).reshape(-1, rows)
        for name, each in found.items()
    }
    for term, kind, layer in (
        ("embedding", "embedding", 0),
        ("attention:3", "attention", 4),
        ("head bias", "other", 0),
    ):
        wanted = own[own["term"] == term].sort_values("position")["logit"]
        np.testing.assert_allclose(written[kind][layer], wanted, rtol=1e-6)
    np.testing.assert_allclose(written["logits"][0], own.groupby("position")["logit"].sum(), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def attributed(tmp_path_factory) -> Path:
    return fabricate_study(
        tmp_path_factory.mktemp("attributed") / "study", models=("tales-untied", "tales-tied"), attributed=1
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda table: table.iloc[:-1], "is not of prompt 0 of tales-untied"),
        pytest.param(lambda table: pd.concat([table, table.iloc[:1]]), "is not of prompt 0", marks=pytest.mark.second),
        pytest.param(lambda table: table.assign(prompt=77), "is not of prompt 77", marks=pytest.mark.second),
        pytest.param(
            lambda table: table.assign(term=table["term"].str.replace(":5", ":6")),
            "is not of prompt 0",
            marks=pytest.mark.second,
        ),
        (lambda table: table.assign(term=table["term"].replace("embedding", "<script>")), "is not of prompt 0"),
        pytest.param(lambda table: table.assign(logit="many"), "other values than numbers", marks=pytest.mark.second),
        pytest.param(
            lambda table: table.assign(position=table["position"] + 0.5),
            "other values than whole numbers",
            marks=pytest.mark.second,
        ),
        (lambda table: table.drop(columns="logit"), "has no column logit"),
    ],
)
def test_shares_that_are_not_those_of_the_run_are_refused(attributed, tmp_path, spoil, message):
    folder = _copy(attributed, tmp_path)
    path = folder / "tables" / "attribution.csv"
    spoil(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(InputError, match=message):
        write_report(folder)


def test_probes_have_their_part_where_they_were_drawn(study, page, tmp_path):
    folder = _copy(study, tmp_path)
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "probes.png").write_bytes(b"a picture")
    source = f"data:image/png;base64,{base64.b64encode(b'a picture').decode()}"
    for made, probed in ((page, False), (Page(write_report(folder)), True)):
        assert ("probes" in [each.get("id") for each in made.attributes("section")]) == probed
        assert ("#probes" in [each.get("href") for each in made.attributes("a")]) == probed
        assert (source in [each.get("src") for each in made.attributes("img")]) == probed


# ------------------------------------------------------------------------------------------------ what is refused
def _copy(study: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(study, tmp_path / "copy"))


def _without(name: str):
    def spoil(folder: Path) -> None:
        (folder / name).unlink()

    return spoil


def _empty(name: str):
    def spoil(folder: Path) -> None:
        (folder / name).write_text("")

    return spoil


def _column(folder: Path) -> None:
    path = folder / "tables" / "cells.csv"
    pd.read_csv(path).drop(columns="speedup").to_csv(path, index=False)


def _summary(**changes):
    def spoil(folder: Path) -> None:
        path = folder / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("summary.json"), "not a finished study: it has no summary.json"),
        (_empty("summary.json"), "cannot be read"),
        (_summary(schema="other/1"), "has schema 'other/1'; expected 'probekit/study/1'"),
        (_summary(models=[]), "names no model"),
        (_summary(models=[{"name": "a"}]), "has no label, trace, sentence for 'a'"),
        (_without("tables/layers.csv"), "has no .*layers.csv"),
        (_empty("tables/cells.csv"), "cells.csv cannot be read"),
        (_column, "cells.csv has no column speedup"),
        (_without("traces/tales-tied/manifest.json"), "it has no manifest.json"),
        (_without("traces/tales-tied/layers-00000.parquet"), "is not finished"),
    ],
)
def test_what_is_no_study_is_refused(study, tmp_path, spoil, message):
    folder = _copy(study, tmp_path)
    (folder / "report.html").unlink(missing_ok=True)
    spoil(folder)
    with pytest.raises(InputError, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_every_way_of_drafting_is_in_the_page(study, page):
    entries = open_study(study).entries
    section = re.search(r'<section id="ways".*?</section>', page.source, re.DOTALL)[0]
    for entry in entries:
        ways = entry["ways"]
        for row in ways["ladder"]:
            assert f"{row['speedup']:.2f}×" in section and row["rung"] in section
        for row in ways["ways"]:
            assert f">{way_label(row)}</th>" in section and f"{row['tokens_per_round']:.2f}" in section
        assert f"{100 * ways['ways'][0]['oracle_share']:.0f} %" in section
        assert len(re.findall(r"<td>\d+ / \d+</td>", section)) == 2 * 10 * len(entries)
    at = re.findall(r'x2="([\d.]+)"', section)
    assert at and all(0 <= float(each) <= 100 for each in at), "no bar leaves its drawing"
    assert section.count("<circle") == sum(len(entry["ways"]["ladder"]) for entry in entries)
    places = [float(x) for x in re.findall(r'<circle class="point" cx="([\d.]+)"', section)]
    assert min(places) > 0 and max(places) < 100
    assert "Every way</a>" in page.source


def test_a_study_that_ranked_no_ways_has_no_such_part(tmp_path):
    folder = fabricate_study(tmp_path / "study", ["tales-tied"], prompts=2, tokens=8, draft_lengths=(1, 2))
    summary = json.loads((folder / "summary.json").read_text())
    del summary["models"][0]["ways"]
    (folder / "summary.json").write_text(json.dumps(summary))
    page = write_report(folder).read_text(encoding="utf-8")
    assert 'id="ways"' not in page and "Every way</a>" not in page


def test_ways_of_sampled_text_have_no_oracle(tmp_path):
    page = write_report(fabricate_study(tmp_path / "study", ["tales-tied"], text="sampled")).read_text()
    section = re.search(r'<section id="ways".*?</section>', page, re.DOTALL)[0]
    assert "oracle</th>" not in section.split("By kind")[0] and "An oracle would" not in section
