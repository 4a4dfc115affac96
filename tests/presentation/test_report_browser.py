"""The report in a real browser: headless Chromium, driven through chromedriver, from file://."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from presentation.fabricate_study import fabricate_costs, fabricate_study, fabricate_trace

from probekit.choice.rank import priced
from probekit.costs.profile import Costs
from probekit.drafting.drafters import ExitLayer
from probekit.drafting.policies import ConfidenceThreshold
from probekit.drafting.round_policies import DynamicExit, Heuristic, Planned
from probekit.drafting.text_drafters import PromptLookup, SuffixLookup
from probekit.drafting.tree_drafters import TreeDrafts
from probekit.drafting.trees import TreeShape
from probekit.drafting.ways import Way
from probekit.models.synthetic import synthetic
from probekit.prediction.predict import predict
from probekit.prediction.replay import replay
from probekit.prediction.rounds import expected_rounds, rounds_of
from probekit.presentation.report import ASSETS, STILLS, write_lens_page, write_report
from probekit.presentation.report_data import packed, token_texts
from probekit.presentation.report_replays import Played, played_ways
from probekit.presentation.study_folder import open_study
from probekit.presentation.tokens import shown
from probekit.probing.attribution import attribute
from probekit.traces.trace import Trace
from probekit.tracing.tracer import trace as trace_prompts

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
if BROWSER is None or DRIVER is None:
    pytest.skip("needs chromium and chromedriver on PATH (Debian: chromium, chromium-driver)", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'probekit[test]'")

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

pytestmark = pytest.mark.second

MARKUP = ("</script><script>alert(1)</script>", "<img/src=x/onerror=alert(1)>", "<!--", "&amp;", "\u2028")
DEPTH, LENGTHS = 6, (1, 2, 3, 4)
COUNTS = ("rounds", "drafted", "accepted", "tokens")
FIGURES = {"acceptanceRate": "acceptance_rate", "alpha": "alpha", "tokensPerRound": "tokens_per_round"}


# ------------------------------------------------------------------------------------------------ pages
class Report:
    """One page in the browser."""

    def __init__(self, driver, path: Path) -> None:
        self.driver, self.path = driver, path
        driver.get_log("browser")
        driver.get_log("performance")
        driver.get(path.as_uri())
        assert self.run("return document.documentElement.dataset.ready") == "yes", driver.get_log("browser")

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def control(self, section: str, name: str):
        return self.find(f"#{section} [data-control={name}]")

    def select(self, section: str, name: str, value) -> None:
        Select(self.control(section, name)).select_by_value(str(value))

    def slide(self, name: str, value: int) -> None:
        """Move a slider of the replay as a hand on the keyboard does."""
        slider = self.control("replay", name)
        now = int(slider.get_attribute("value"))
        slider.send_keys((Keys.ARROW_RIGHT if value > now else Keys.ARROW_LEFT) * abs(value - now))
        assert int(slider.get_attribute("value")) == value

    def set(self, **sliders: int) -> None:
        """Move sliders of the replay all at once."""
        for name, value in sliders.items():
            self.run(
                "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
                self.control("replay", name),
                value,
            )

    def figures(self) -> tuple[dict, dict]:
        """The figures of this text, and pooled: numbers as the page worked them out, None where it has none."""
        rows = self.run(
            "return [...document.querySelectorAll('[data-figure]')].map(row => [row.dataset.figure,"
            " ...[...row.querySelectorAll('td')].map(cell => cell.dataset.value ?? null)])"
        )
        columns = ({}, {})
        for name, *values in rows:
            for column, value in zip(columns, values, strict=True):
                column[name] = None if value is None else float(value)
        return columns

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def errors(self) -> list:
        return self.driver.get_log("browser")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--disable-dev-shm-usage", "--window-size=1280,900", f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def _study(folder: Path, **settings) -> Path:
    return write_report(fabricate_study(folder, depth=DEPTH, draft_lengths=LENGTHS, **settings))


@pytest.fixture(scope="module")
def greedy_page(tmp_path_factory) -> Path:
    return _study(tmp_path_factory.mktemp("greedy") / "study", drafter=True)


@pytest.fixture(scope="module")
def sampled_page(tmp_path_factory) -> Path:
    return _study(tmp_path_factory.mktemp("sampled") / "study", models=("tales-untied",), text="sampled")


@pytest.fixture
def greedy(driver, greedy_page) -> Report:
    return Report(driver, greedy_page)


@pytest.fixture
def sampled(driver, sampled_page) -> Report:
    return Report(driver, sampled_page)


def shown_token(names: dict[int, str], token: int) -> str:
    return names.get(int(token), f"#{token}")


def _trace(page: Path, model: str) -> Trace:
    return Trace.open(page.parent / "traces" / model)


# ------------------------------------------------------------------------------------------------ slow references
def walk(agrees, draft_length: int, budget: int, first: int) -> list[tuple[int, int, int, bool]]:
    """(start, drafted, accepted, rejected) of each round of a greedy text, word by word as the design has them."""
    rounds, i, n = [], first, len(agrees)
    while i < n:
        k = min(draft_length, budget - i - 1)
        run = 0
        while i + run < n and agrees[i + run]:
            run += 1
        a = min(run, k, n - i)
        rounds.append((i, k, a, a < min(k, n - i)))
        i += min(a + 1, n - i)
    return rounds


def expect(w, draft_length: int, budget: int, first: int) -> np.ndarray:
    """[rounds, drafted, accepted, rejections] expected of a sampled text, by what a round leads to."""

    @cache
    def after(i: int) -> tuple[float, ...]:
        if i >= len(w):
            return (0.0,) * 4
        k = min(draft_length, budget - i - 1)
        reach = min(k, len(w) - i)
        total, alive = np.zeros(4), 1.0
        for a in range(reach + 1):
            chance = alive * (1 - w[i + a]) if a < reach else alive
            total += chance * (np.array([1, k, a, a < reach]) + np.array(after(i + a + 1)))
            alive -= chance
        return tuple(total)

    return np.array(after(first))


def derived(rounds: float, drafted: float, accepted: float, rejections: float, tokens: int) -> dict:
    trials = accepted + rejections
    return {
        "rounds": rounds, "drafted": drafted, "accepted": accepted, "tokens": tokens,
        "acceptanceRate": accepted / drafted if drafted else None,
        "alpha": accepted / trials if trials else None,
        "tokensPerRound": tokens / rounds if rounds else None,
    }  # fmt: skip


def reference(trace: Trace, prompt: int, exit_layer: int | None, length: int, first_round: str) -> dict:
    """Every figure of one text, from the trace, slowly; the speedup at the fabricated costs."""
    first = {"prefill": 1, "draft": 0}[first_round]
    budget = trace.manifest.settings.max_new_tokens
    tokens = max(0, len(trace.outputs(prompt)) - first)
    if trace.manifest.settings.text != "greedy":
        w = trace.accept_probability(prompt)[exit_layer].astype(float).tolist()
        return derived(*expect(w, length, budget, first), tokens)
    agrees = trace.drafter_agreement(prompt) if exit_layer is None else trace.agreement(prompt)[exit_layer]
    rounds = walk(agrees.tolist(), length, budget, first)
    costs = fabricate_costs(trace.depth, max(LENGTHS), drafter=True)
    seconds = sum(costs.round_seconds(exit_layer, drafted) for _, drafted, _, _ in rounds)
    figures = derived(
        len(rounds), sum(r[1] for r in rounds), sum(r[2] for r in rounds), sum(r[3] for r in rounds), tokens
    )
    return figures | {"speedup": tokens * costs.autoregressive_s / seconds if rounds else None}


# ------------------------------------------------------------------------------------------------ one walk of rounds
ROUNDS_OF = """
const rounds = roundsOf(signal, length, budget, first), counts = countsOf(signal, length, budget, first);
return {
  start: rounds.map(each => each.start), drafted: rounds.map(each => each.drafted),
  accepted: rounds.map(each => each.accepted), emitted: rounds.map(each => each.emitted),
  rejected: rounds.map(each => each.rejected), tokens: counts.tokens, allAccepted: counts.accepted,
  rejections: counts.rejections, byDrafted: [...counts.byDrafted],
};"""
EXPECTED = """
const counts = expectedCountsOf(signal, length, budget, first);
return {
  starts: [...counts.starts], tokens: counts.tokens, accepted: counts.accepted, rejections: counts.rejections,
  byDrafted: [...counts.byDrafted],
};"""


def in_the_page(driver, body: str, cases: list[tuple]) -> list[dict]:
    """Run a function body of the page's `rounds.js` on (signal, draft length, budget, first round) of each case."""
    source = re.sub(r"^export ", "", (ASSETS / "rounds.js").read_text(encoding="utf-8"), flags=re.MULTILINE)
    each = f"([signal, length, budget, first]) => {{ {body} }}"
    return driver.execute_script(f"{source}\nreturn arguments[0].map({each});", cases)


def random_cases(seed: int, signal) -> list[tuple]:
    """500 texts of 1 to 40 tokens that end by themselves or fill their budget, under either first round."""
    random = np.random.default_rng(seed)
    cases = []
    for number in range(500):
        tokens = int(random.integers(1, 41))
        budget = tokens + int(random.integers(1, 12)) * (
            number // 2 % 2
        )  # the budget is filled, or the text ends before
        length, first = int(random.integers(1, 9)), ("prefill", "draft")[number % 2]
        cases.append((signal(random, tokens).tolist(), length, budget, first))
    return cases


def test_the_page_walks_greedy_texts_as_predict_does(driver):
    cases = random_cases(0, lambda random, tokens: random.random(tokens) < random.random())
    for case, found in zip(cases, in_the_page(driver, ROUNDS_OF, cases), strict=True):
        signal, length, budget, first = case
        rounds = rounds_of(np.array(signal), length, budget, first)
        assert {name: found[name] for name in rounds._fields} == {
            name: values.tolist() for name, values in rounds._asdict().items()
        }, case
        assert found["rejected"] == rounds.rejected.tolist(), case
        assert found["tokens"] == rounds.emitted.sum(), case
        assert found["allAccepted"] == rounds.accepted.sum(), case
        assert found["rejections"] == rounds.rejected.sum(), case
        assert found["byDrafted"] == np.bincount(rounds.drafted, minlength=length + 1).tolist(), case


def test_the_page_expects_of_sampled_texts_what_predict_does(driver):
    """Chances of exactly 0 and 1 are among them."""

    def chances(random: np.random.Generator, tokens: int) -> np.ndarray:
        return np.clip(random.normal(random.random(), 0.4, tokens), 0, 1).astype(np.float32).astype(float)

    cases = random_cases(1, chances)
    for case, found in zip(cases, in_the_page(driver, EXPECTED, cases), strict=True):
        expected = expected_rounds(np.array(case[0]), *case[1:])
        assert found["tokens"] == expected.tokens, case
        for name, value in (
            ("starts", expected.start_probability),
            ("accepted", expected.accepted),
            ("rejections", expected.rejections),
            ("byDrafted", expected.rounds_by_drafted),
        ):
            np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12, err_msg=f"{name} of {case}")


def test_the_page_plays_any_way_as_replay_does(driver):
    """1,000 texts of random traces, each by a way of its own kind: the packed rounds, unpacked in the page."""
    source = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in ("page.js", "rounds.js"))
    source = re.sub(r"^export ", "", source, flags=re.MULTILINE)
    body = """return arguments[0].map(([packed, tokens, seconds]) => {
        const rounds = roundsOfWay(unpack(packed), tokens);
        const { byDrafted, ...counts } = countsOfRounds(rounds, seconds);
        return { rounds, ...counts, byDrafted: [...byDrafted] };
    });"""
    costs, many, kinds = fabricate_costs(DEPTH, 9), 0, set()
    for seed in range(10):
        trace = fabricate_trace("tales-tied", DEPTH, 100, 8 + seed, seed=seed)
        exits = [ExitLayer(exit_layer) for exit_layer in range(1, DEPTH)]
        plans = {
            prompt: np.random.default_rng(prompt).integers([[-1], [1]], [[4], [5]], (2, 200))
            for prompt in trace.prompts
        }
        ways = [
            Way((exits[seed % 5],), 1 + seed % 4),
            Way((PromptLookup(1 + seed % 3),), 4),
            Way((SuffixLookup(),), 3),
            Way((TreeDrafts(exits[seed % 5], TreeShape.of_widths([(3,), (2, 1, 1), (2, 2)][seed % 3])),), 3),
            Way((exits[seed % 5],), 5, ConfidenceThreshold(0.3), "confidence"),
            Way((exits[seed % 5],), 6, Heuristic(5), "heuristic:5"),
            Way(tuple(exits), 4, DynamicExit(DEPTH), "del"),
            Way((*exits[:3], PromptLookup()), 4, Planned(plans), "oracle"),
        ]
        players = [Played(way, costs, trace.select(trace.prompts[place::8])) for place, way in enumerate(ways)]
        cases = [(player, prompt) for player in players for prompt in player.trace.prompts]
        given = [
            (packed(player.of(prompt).astype(np.uint32)), len(trace.outputs(prompt)), player.seconds[prompt])
            for player, prompt in cases
        ]
        shown_all = driver.execute_script(f"{source}\n{body}", given)
        walks = {id(player): replay(player.trace, player.way).rounds for player in players}
        for (player, prompt), found, (_, tokens, seconds) in zip(cases, shown_all, given, strict=True):
            own = walks[id(player)][player.trace.prompts.index(prompt)]
            for name in ("start", "drafted", "accepted", "emitted"):
                assert [row[name] for row in found["rounds"]] == getattr(own, name).tolist(), (player.way.name, prompt)
            assert [row["who"] for row in found["rounds"]] == own.way.tolist()
            rejected = (own.accepted < np.minimum(own.length, tokens - own.start)) & (own.emitted > own.accepted)
            assert [row["rejected"] for row in found["rounds"]] == rejected.tolist()
            assert (found["tokens"], found["accepted"]) == (own.emitted.sum(), own.accepted.sum())
            assert sum(k * rounds for k, rounds in enumerate(found["byDrafted"])) == own.drafted.sum()
            assert found["seconds"] == seconds
            many += 1
            kinds.add(player.way.name)
    assert many == 1000 and len(kinds) == 5


def test_any_way_is_replayed(greedy):
    """Each way of the page: its rounds as they went, its figures on this text and on all."""
    trace, study = _trace(greedy.path, "tales-untied"), open_study(greedy.path.parent)
    costs = Costs.from_json(study.entry("tales-untied")["choice"]["costs"])
    names = token_texts(trace)
    ways = played_ways(trace, costs, None, LENGTHS, None)
    greedy.select("replay", "text", 1)
    options = [each.get_attribute("value") for each in Select(greedy.control("replay", "drafter")).options]
    assert options == ["self", "other", *(f"way {place}" for place in range(len(ways)))] and len(ways) > 8
    assert {"oracle", "del", "fixed"} <= {each.way.name for each in ways}
    outputs = [names[token] for token in trace.outputs(1)]
    for place, played in enumerate(ways):
        greedy.select("replay", "drafter", f"way {place}")
        found, own = replay(trace, played.way), replay(trace, played.way).rounds[1]
        shown_rounds = greedy.run(
            "return [...document.querySelectorAll('#replay .round')].map(round =>"
            " [...round.querySelectorAll('.token')].map(token => [token.classList[1], token.textContent]))"
        )
        assert len(shown_rounds) == len(own.start)
        for start, accepted, emitted, tokens in zip(own.start, own.accepted, own.emitted, shown_rounds, strict=True):
            kept = [text for kind, text in tokens if kind == "accepted"]
            assert kept == outputs[start : start + accepted]
            if emitted > accepted:
                assert tokens[-1][0] in ("correction", "bonus") and tokens[-1][1] == outputs[start + accepted]
        mine, pooled = greedy.figures()
        counts, ranked = found.counts(), priced(trace, played.way, costs)
        assert {name: pooled[name] for name in COUNTS} == {name: counts[name] for name in COUNTS}
        assert pooled["speedup"] == pytest.approx(ranked.speedup, rel=1e-9)
        assert pooled["tokensPerRound"] == pytest.approx(ranked.tokens_per_round)
        assert (mine["rounds"], mine["drafted"]) == (len(own.start), own.drafted.sum())
    assert not greedy.control("replay", "length").is_enabled()
    assert not greedy.control("replay", "first-round").is_enabled()
    greedy.select("replay", "drafter", "self")
    assert greedy.control("replay", "length").is_enabled()


def test_a_rejected_draft_of_a_lookup_is_the_token_that_was_copied():
    trace = fabricate_trace("tales-tied", DEPTH, 4, 40, seed=3)
    played = Played(Way((PromptLookup(1),), 3), fabricate_costs(DEPTH, 4), trace)
    seen = 0
    for prompt in trace.prompts:
        text = [*trace.prompt_ids(prompt).tolist(), *trace.outputs(prompt).tolist()]
        many = len(trace.prompt_ids(prompt))
        for (length, _, accepted, _, wrong), start in zip(
            played.of(prompt).tolist(), replay(trace, played.way).rounds[prompt].start.tolist(), strict=True
        ):
            at = many + start  # the latest token stands before it; its first earlier occurrence decides
            first = text.index(text[at - 1])
            if wrong:
                assert text[first + 1 + accepted] == wrong - 1 != text[at + accepted] and length > accepted
                seen += 1
    assert seen > 10


# ------------------------------------------------------------------------------------------------ alone
def test_nothing_is_fetched_and_nothing_goes_wrong(greedy):
    for section, name, value in (("lens", "statistic", "kl"), ("replay", "first-round", "draft")):
        greedy.select(section, name, value)
    assert greedy.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    sent = [json.loads(entry["message"])["message"] for entry in greedy.driver.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [greedy.path.as_uri()]
    assert greedy.errors() == []


@pytest.mark.parametrize(
    "attempt",
    [
        "fetch('data:text/plain,x').then(() => done('got'), () => done('refused'))",
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        "document.body.append(s); done(window.ran ? 'got' : 'refused')",
        "const i = new Image(); i.onload = () => done('got'); i.onerror = () => done('refused');"
        "i.src = document.location.href.replace('report.html', 'x.png')",
    ],
)
def test_the_policy_refuses_what_the_page_does_not_hold(greedy, attempt):
    assert greedy.driver.execute_async_script(f"const done = arguments[0]; {attempt}") == "refused"
    assert any("Content Security Policy" in entry["message"] for entry in greedy.errors())


# ------------------------------------------------------------------------------------------------ the replay
def test_sliders_give_the_figures_of_a_slow_reference(greedy):
    trace = _trace(greedy.path, "tales-layerskip")
    greedy.select("replay", "model", 2)
    greedy.select("replay", "drafter", "self")
    for place, first_round, move in ((0, "prefill", greedy.slide), (3, "draft", _one(greedy.set))):
        greedy.select("replay", "text", place)
        greedy.select("replay", "first-round", first_round)
        for exit_layer in (1, 3, DEPTH - 1):
            move("exit", exit_layer)
            for length in LENGTHS:
                move("length", length)
                expected = reference(trace, trace.prompts[place], exit_layer, length, first_round)
                assert greedy.figures()[0] == pytest.approx(expected, rel=1e-12)


def _one(move):
    return lambda name, value: move(**{name: value})


@pytest.mark.parametrize(("pool", "lengths"), [("all", LENGTHS), ("even", (3,)), ("odd", (2,))])
def test_pooled_figures_are_those_of_predict(greedy, pool, lengths):
    trace = _trace(greedy.path, "tales-tied")
    chosen = {"all": trace.prompts, "even": trace.prompts[::2], "odd": trace.prompts[1::2]}[pool]
    prediction = predict(trace.select(chosen), draft_lengths=lengths)
    costs = fabricate_costs(DEPTH, max(LENGTHS), drafter=True)
    greedy.select("replay", "model", 1)
    greedy.select("replay", "pool", pool)
    for cell in prediction.cells:
        greedy.select("replay", "drafter", "other" if cell.exit_layer is None else "self")
        greedy.set(exit=cell.exit_layer or 1, length=cell.draft_length)
        pooled = greedy.figures()[1]
        assert {name: pooled[name] for name in COUNTS} == cell.counts()
        assert {name: pooled[name] for name in FIGURES} == pytest.approx(
            {name: getattr(cell, attribute) for name, attribute in FIGURES.items()}, rel=1e-12
        )
        spent = cell.rounds_by_drafted.sum(axis=0) @ costs.rounds_seconds(cell.exit_layer, cell.draft_length)
        assert pooled["speedup"] == pytest.approx(cell.tokens * costs.autoregressive_s / spent, rel=1e-12)


def test_sampled_text_shows_expected_figures(sampled):
    trace = _trace(sampled.path, "tales-untied")
    assert "expected ones" in sampled.find("#replay [data-for=sampled]").text
    assert not sampled.control("replay", "round").is_displayed()
    for first_round in ("prefill", "draft"):
        prediction = predict(trace, draft_lengths=LENGTHS, first_round=first_round)
        sampled.select("replay", "first-round", first_round)
        for exit_layer, length in ((1, 1), (3, 4), (5, 2)):
            sampled.set(exit=exit_layer, length=length)
            mine, pooled = sampled.figures()
            expected = reference(trace, 0, exit_layer, length, first_round)
            assert {name: mine[name] for name in expected} == pytest.approx(expected, rel=1e-9)
            assert {name: pooled[name] for name in COUNTS} == pytest.approx(
                prediction.cell(exit_layer, length).counts(), rel=1e-9
            )


def test_each_round_is_shown_as_it_went(greedy):
    trace = _trace(greedy.path, "tales-untied")
    names = token_texts(trace)
    greedy.select("replay", "drafter", "self")
    greedy.set(exit=4, length=3)
    rounds = walk(trace.agreement(0)[4].tolist(), 3, trace.manifest.settings.max_new_tokens, 1)
    replayed = greedy.run(
        "return [...document.querySelectorAll('#replay .round')].map(round =>"
        " [...round.querySelectorAll('.token')].map(token => [token.classList[1], token.textContent]))"
    )
    outputs = [names[token] for token in trace.outputs(0)]
    drafts = [shown_token(names, token) for token in trace.values(0, "argmax")[4]]
    assert len(replayed) == len(rounds) > 3
    for (start, drafted, accepted, rejected), tokens in zip(rounds, replayed, strict=True):
        expected = [["accepted", text] for text in outputs[start : start + accepted]]
        at = start + accepted
        if rejected:
            more = drafted - accepted - 1
            expected.append(["rejected", drafts[at] + (f"+{more}" if more else "")])
        if at < len(outputs):
            expected.append(["correction" if rejected else "bonus", outputs[at]])
        assert tokens == expected


def test_rounds_can_be_stepped_through(greedy):
    greedy.select("replay", "drafter", "self")
    greedy.set(exit=4)
    many = len(greedy.all("#replay .round"))
    assert greedy.all("#replay .round.now") == []
    greedy.control("replay", "next").click()
    assert len(greedy.all("#replay .round.later")) == many - 1
    greedy.control("replay", "next").send_keys(Keys.ENTER)
    assert greedy.text("#replay [data-place=round-words]").startswith("Round 2 drafts")
    greedy.control("replay", "previous").click()
    assert not greedy.control("replay", "previous").is_enabled()
    greedy.control("replay", "round").send_keys(Keys.END)
    assert greedy.text("#replay [data-place=round-value]") == f"{many} of {many}"
    greedy.control("replay", "whole").click()
    assert greedy.all("#replay .round.now, #replay .round.later") == []


def test_a_cell_of_the_table_is_replayed(greedy):
    cell = greedy.find("#table figure:nth-child(3) td[aria-label^='exit layer 2, draft length 3']")
    cell.click()
    assert greedy.control("replay", "model").get_attribute("value") == "2"
    assert greedy.control("replay", "exit").get_attribute("value") == "2"
    assert greedy.control("replay", "length").get_attribute("value") == "3"
    cells = pd.read_csv(greedy.path.parent / "tables" / "cells.csv").query("model == 'tales-layerskip'")
    row = cells[(cells["exit_layer"] == 2) & (cells["draft_length"] == 3)].iloc[0]
    assert cell.text == f"{row.speedup:.2f}"
    greedy.select("table", "measure", "tokens_per_round")
    assert greedy.find("#table figure:nth-child(3) td[aria-label^='exit layer 2, draft length 3']").text == (
        f"{row.tokens_per_round:.1f}"
    )


# ------------------------------------------------------------------------------------------------ the lens table
@pytest.mark.parametrize("lens", ["final-norm", "raw"])
def test_the_lens_table_is_the_traces(greedy, lens):
    trace = _trace(greedy.path, "tales-tied")
    greedy.select("lens", "model", 1)
    greedy.select("lens", "text", 1)
    greedy.select("lens", "lens", lens)
    rows = trace.layers.query("prompt == 1 and lens == @lens").sort_values(["layer", "position"])
    cells = greedy.run(
        "return [...document.querySelectorAll('#lens tbody tr')].map(row => [...row.querySelectorAll('td')]"
        ".map(cell => [cell.classList.contains('agrees'), cell.classList.contains('prompt'),"
        " cell.textContent]))"
    )
    own = trace.layers.query("prompt == 1 and lens == 'final-norm' and layer == @DEPTH").sort_values("position")
    agrees = rows["argmax"].to_numpy().reshape(DEPTH + 1, -1) == own["argmax"].to_numpy()
    prompt = (rows["output"] < 0).to_numpy().reshape(DEPTH + 1, -1)
    names = token_texts(trace)
    texts = [shown_token(names, token) for token in rows["argmax"]]
    assert [[cell[0] for cell in line] for line in cells] == agrees[::-1].tolist()
    assert [[cell[1] for cell in line] for line in cells] == prompt[::-1].tolist()
    assert [cell[2] for line in cells[::-1] for cell in line] == texts


@pytest.mark.parametrize("way", ["keyboard", "pointer"])
def test_the_top_ten_of_a_cell(greedy, way):
    trace = _trace(greedy.path, "tales-untied")
    row = len(trace.prompt_ids(0)) - 1
    layer = DEPTH - 2
    if way == "keyboard":
        greedy.find("#lens td[tabindex='0']").send_keys(Keys.ARROW_DOWN)
        greedy.driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
        greedy.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        assert greedy.driver.switch_to.active_element.get_attribute("aria-describedby") == "lens-detail"
    else:
        cell = greedy.all(f"#lens tbody tr:nth-child({DEPTH - layer + 1}) td")[row + 1]
        ActionChains(greedy.driver).scroll_to_element(cell).move_to_element(cell).perform()
    assert greedy.text("#lens-detail h3") == f"Layer {layer}, position {row + 1}"
    top = trace.top.query("prompt == 0 and lens == 'final-norm' and layer == @layer and position == @row + 1")
    ten = greedy.run(
        "return [...document.querySelectorAll('#lens-detail li')].map(li => [li.firstChild.textContent,"
        " li.lastChild.textContent])"
    )
    for (text, probability), expected in zip(ten, top.sort_values("place").itertuples(), strict=True):
        assert text == shown(expected.token_text)
        assert float(probability.lstrip("<")) == pytest.approx(expected.probability, abs=0.006)
    figures = trace.layers.query(
        "prompt == 0 and lens == 'final-norm' and layer == @layer and position == @row + 1"
    ).iloc[0]
    agrees, rank, entropy, kl = (element.text for element in greedy.all("#lens-detail dd"))
    assert (agrees, rank) == ("agrees" if figures["agrees"] else "differs", str(figures["rank"]))
    assert float(entropy.removesuffix(" nats")) == pytest.approx(figures["entropy"], abs=0.01)
    assert float(kl.removesuffix(" nats")) == pytest.approx(figures["kl"], abs=0.01)


def test_each_statistic_says_its_unit(greedy):
    first = "#lens tbody tr:nth-child(2) td"
    for name, words in (
        ("probability", ", 0."), ("entropy", " nats"), ("kl", " nats"), ("rank", ", "), ("agrees", "the model"),
    ):  # fmt: skip
        greedy.select("lens", "statistic", name)
        assert words in greedy.find(first).get_attribute("aria-label")
    assert "nats" in greedy.text("#lens [data-control=statistic]")


def test_who_wrote_the_logit_is_beside_the_lens(greedy, driver, tmp_path):
    """A colour for it and the cell's own figures where they are known; not offered where they are not."""
    assert "written" not in {
        each.get_attribute("value") for each in greedy.all("#lens [data-control=statistic] option")
    }
    loaded = synthetic("tiny", seed=1)
    run = trace_prompts(loaded, [[1, 2, 3]], max_new_tokens=5, top_prompts=1)
    shares = attribute(loaded, [*run.prompt_ids(0).tolist(), *run.outputs(0).tolist()][:-1])
    page = Report(driver, write_lens_page(run, tmp_path / "lens.html", {0: shares}))
    page.select("lens", "statistic", "written")
    page.all("#lens tbody tr")[5 - 3].find_elements(By.CSS_SELECTOR, "td")[4].click()  # a script's focus may go unheard
    pairs = dict(zip(*(
        [each.text.replace("\u2212", "-") for each in page.all(f"#lens-detail {tag}")] for tag in ("dt", "dd")
    ), strict=True))  # fmt: skip
    attention, mlp = (shares.values[4, shares.terms.index(f"{branch}:2")] for branch in ("attention", "mlp"))
    assert float(pairs["logit of the model's token"]) == pytest.approx(shares.logits[4], abs=0.006)
    assert float(pairs["by this layer's attention"]) == pytest.approx(attention, abs=0.006)
    assert float(pairs["by its MLP"]) == pytest.approx(mlp, abs=0.006)
    cell = page.all("#lens tbody tr")[5 - 3].find_elements(By.CSS_SELECTOR, "td")[4].get_attribute("aria-label")
    said = float(re.search(r"wrote (\S+) of the logit", cell)[1].replace("\u2212", "-"))
    assert said == pytest.approx(attention + mlp, abs=0.006) and page.errors() == []


def test_a_study_offers_who_wrote_the_logit_for_the_texts_that_it_knows_it_of(driver, tmp_path):
    page = Report(driver, _study(tmp_path / "study", models=("tales-tied", "tales-layerskip"), attributed=1))
    statistic = Select(page.control("lens", "statistic"))
    option = next(each for each in statistic.options if each.get_attribute("value") == "written")
    assert option.is_enabled()
    page.select("lens", "statistic", "written")
    assert "of the logit" in page.all("#lens tbody td")[0].get_attribute("aria-label")
    page.select("lens", "text", 1)
    assert not option.is_enabled() and statistic.first_selected_option.get_attribute("value") == "probability"
    page.select("lens", "text", 0)
    page.select("lens", "statistic", "written")
    page.select("lens", "model", 1)  # nothing is known of it
    assert statistic.first_selected_option.get_attribute("value") == "probability" and page.errors() == []


# ------------------------------------------------------------------------------------------------ data is data
def test_markup_shows_as_text(driver, tmp_path):
    plain = fabricate_trace("tales-tied", prompts=2)
    words = np.array(MARKUP, dtype=object)
    trace = Trace.from_frames(
        plain.manifest,
        plain.texts.assign(text="".join(MARKUP), kind=MARKUP[1]),
        plain.tokens.assign(text=words[plain.tokens["text_id"] % len(words)]),
        plain.layers,
        top=plain.top.assign(token_text=words[plain.top["token"] % len(words)]),
    )
    folder = fabricate_study(tmp_path / "study", models=("tales-tied",), prompts=2)
    shutil.rmtree(folder / "traces" / "tales-tied")
    trace.save(folder / "traces" / "tales-tied")
    summary = json.loads((folder / "summary.json").read_text())
    summary["models"][0] |= {"label": MARKUP[1], "sentence": MARKUP[0]}
    (folder / "summary.json").write_text(json.dumps(summary))

    report = Report(driver, write_report(folder))  # an alert would fail every call below
    assert report.all("img") == []
    assert len(report.all("script")) == 2
    assert MARKUP[0] in report.find("#recommendation").text
    assert report.text("#replay [data-place=prompt]") == "".join(MARKUP)
    assert MARKUP[0] in report.text("#replay [data-place=continuation]")
    assert MARKUP[1] in report.text("#lens table")
    assert "⟨2028⟩" in report.text("#lens table")
    assert MARKUP[1] in report.text("#agreement .legend")
    report.find("#lens td[tabindex='0']").send_keys(Keys.ARROW_RIGHT)
    assert any(word in report.text("#lens-detail ol") for word in MARKUP[:2])
    assert report.errors() == []


# ------------------------------------------------------------------------------------------------ for everyone
def test_the_tab_key_reaches_everything(greedy):
    for details in greedy.all("details"):
        greedy.run("arguments[0].open = true", details)
    greedy.run("document.body.focus()")
    reached = set()
    for _ in range(80):
        greedy.driver.switch_to.active_element.send_keys(Keys.TAB)
        active = greedy.run(
            "const e = document.activeElement; const s = e.closest('section');"
            "return [s ? s.id : '', e.dataset.control ?? e.id ?? '', e.tagName, e.className]"
        )
        if active[2] == "BODY":
            break
        reached.add(tuple(active))
    pairs = {(section, control) for section, control, _, _ in reached}
    controls = greedy.run(
        "return [...document.querySelectorAll('[data-control]:enabled')].filter(e => e.checkVisibility())"
        ".map(e => [e.closest('section').id, e.dataset.control])"
    )
    assert len(controls) >= 14
    assert {tuple(each) for each in controls} <= pairs
    assert ("", "theme") in pairs
    grids = [(section, kind) for section, _, tag, kind in reached if tag == "TD"]
    assert len([section for section, _ in grids if section == "table"]) >= 1
    assert ("lens" in {section for section, _ in grids}) and any(tag == "SUMMARY" for _, _, tag, _ in reached)


def test_every_control_has_a_name(greedy):
    nameless = greedy.run(
        "return [...document.querySelectorAll('select, input, button, [role=grid], svg[role=img]')]"
        ".filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))"
        ".map(e => e.outerHTML)"
    )
    assert nameless == []
    for place in ("summary", "round-words"):
        assert greedy.find(f"#replay [data-place={place}]").get_attribute("aria-live") == "polite"
    assert greedy.control("replay", "exit").get_attribute("aria-valuetext").endswith(f"of {DEPTH}")


def test_what_is_drawn_for_the_eye_only_is_hidden_from_readers(greedy):
    hidden = greedy.run(
        "return [...document.querySelectorAll('[aria-hidden]')].map(e => e.getAttribute('aria-hidden'))"
    )
    assert len(hidden) > 10
    assert set(hidden) == {"true"}
    assert greedy.run("return [...document.querySelectorAll('.ramp, .bar')].every(e => e.ariaHidden === 'true')")


def test_arrow_keys_move_through_the_table_and_enter_replays(greedy):
    greedy.find("#table figure:nth-child(1) td[tabindex='0']").send_keys(Keys.PAGE_UP, Keys.NULL)
    greedy.driver.switch_to.active_element.send_keys(Keys.HOME)
    greedy.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    greedy.driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    label = greedy.driver.switch_to.active_element.get_attribute("aria-label")
    assert label.startswith(f"exit layer {DEPTH - 2}, draft length 2: predicted speedup")
    greedy.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert greedy.driver.switch_to.active_element.get_attribute("id") == "replay-title"
    assert greedy.control("replay", "exit").get_attribute("value") == str(DEPTH - 2)
    assert greedy.control("replay", "length").get_attribute("value") == "2"


def test_light_and_dark(greedy):
    def light() -> bool:
        paper = greedy.run("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in paper[4:-1].split(",")) > 380

    def system(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        greedy.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    try:
        system("dark")
        assert not light()
        system("light")
        assert light()
        greedy.find("#theme").click()
        assert not light()
        assert greedy.find("#theme").text == "Light"
        greedy.find("#theme").click()
        system("dark")
        assert light(), "the reader's choice outlasts the system's"
    finally:
        greedy.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_narrow_window_scrolls_one_way_only(greedy):
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    greedy.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert greedy.run("return document.documentElement.scrollWidth <= innerWidth")
        assert greedy.run("return innerWidth") == 360
    finally:
        greedy.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_lens_page(driver, tmp_path):
    trace = fabricate_trace("tales-tied", prompts=1)
    report = Report(driver, write_lens_page(trace, tmp_path / "lens.html"))
    assert len(report.all("#lens tbody tr")) == trace.depth + 1
    assert report.all("#replay") == []
    assert report.errors() == []


# ------------------------------------------------------------------------------------------------ without scripts
def test_without_scripts_pictures_stand_in(driver, tmp_path):
    """Chromium with scripts switched off: the pictures are shown, and nothing is that would need a script."""
    folder = fabricate_study(tmp_path / "study", models=("a",), prompts=3)
    (folder / "figures").mkdir(exist_ok=True)
    drawing = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"><rect width="40" height="20"/></svg>'
    for name in STILLS:
        (folder / "figures" / f"{name}.svg").write_text(drawing)
    page = write_report(folder)
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(page.as_uri())
        pictures = driver.find_elements(By.CSS_SELECTOR, ".still img")
        assert len(pictures) == len(STILLS)
        assert all(picture.is_displayed() and picture.size["width"] == 40 for picture in pictures)
        shown = [each for each in driver.find_elements(By.CSS_SELECTOR, "select, input, button") if each.is_displayed()]
        assert shown == []
        assert not driver.find_element(By.ID, "replay").is_displayed()
        assert "Scripts are off" in driver.find_element(By.TAG_NAME, "main").text
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    opened = Report(driver, page)  # and with them the pictures are not there
    assert opened.all(".still") == []
    assert opened.find("#replay").is_displayed()
