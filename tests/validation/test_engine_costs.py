"""Costs of an engine: steps that are known come out again, and what cannot be timed is refused."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
from cli.test_commands import document
from cli.test_front_door import fails

from probekit.drafting.text_drafters import PromptLookup
from probekit.engines.engine import Drafting
from probekit.errors import InputError, ResourceError
from probekit.models.loaded import load
from probekit.validation.engine_costs import LONGER, CostPlan, Equation, measure_engine, measure_home, solve
from probekit.validation.engine_rounds import EngineRounds, Turn
from probekit.validation.llama_cpp import llama_cpp_session
from probekit.validation.open_engine import EngineHome
from probekit.validation.vllm import vllm_session

PLAN = CostPlan((1, 5), (1, 2, 4), contexts=(64,), sweeps=2)
VERIFY = {1: 0.010, 2: 0.012, 3: 0.013, 5: 0.019}
DRAFT, FIRST, LOOKUP = {1: 0.002, 5: 0.008}, {1: 0.001, 5: 0.003}, 0.004


@dataclass
class Fabricated:
    """An engine whose steps take what they are said to take, beside a pass over the prompt and a request's own time."""

    drafting: Drafting
    slower: float = 1.0
    finds: bool = True

    def __call__(self, prompt_ids, max_new_tokens, *, rows=1, ignore_eos=False):
        drafted, accepted, plain, seconds, made = [], [], 1, 0.5 + 0.01 * len(prompt_ids), 1
        length, looks_up, begin = self.drafting.draft_length, self.drafting.lookup is not None, prompt_ids[0]
        while made < max_new_tokens:
            drafts = min(length, max_new_tokens - made - 1)
            seconds += LOOKUP if looks_up else 0.0
            if drafts and self.finds and not (looks_up and (made + begin) % (3 + begin % 5) == 0):
                taken = min(made % (drafts + 1), max_new_tokens - made - 1)
                drafted.append(drafts)
                accepted.append(taken)
                made += taken + 1
                low = {4: 0.016}.get(drafts + 1) or VERIFY[drafts + 1]  # halfway between 3 and 5 tokens
                seconds += low
                who = self.drafting.exit_layer or self.drafting.drafter
                if who is not None:
                    seconds += drafts * DRAFT.get(who, 0.0015) + FIRST.get(who, 0.0005)
            else:
                plain += 1
                made += 1
                seconds += VERIFY[1]
        seconds *= self.slower * (1 + (rows - 1) / 4)
        return Turn(EngineRounds(list(range(made)), drafted, accepted), plain, seconds, seconds)


@contextmanager
def opened(drafting):
    yield Fabricated(drafting)


def timed(plan=PLAN, engine=opened, rule="vllm"):
    return measure_engine("toy", engine, list(range(200)), plan, rule=rule, device="cpu", dtype="float32")


def check(profile, scale=1.0, **at):
    costs = profile.costs(6, **at)
    assert costs.autoregressive_s == pytest.approx(scale * VERIFY[1])
    for exit_layer in DRAFT:
        for drafts in (1, 2, 4):
            expected = drafts * DRAFT[exit_layer] + FIRST[exit_layer] + VERIFY[drafts + 1]
            assert costs.round_seconds(exit_layer, drafts) == pytest.approx(scale * expected)
    assert costs.whole_pass_seconds(3) == pytest.approx(scale * VERIFY[3])
    lookup = PromptLookup(2).key
    for drafts in (0, 2):  # also where nothing is found
        assert costs.round_seconds(lookup, drafts) == pytest.approx(scale * (VERIFY[drafts + 1] + LOOKUP))


def test_steps_that_are_known_come_out_again():
    profile = timed()
    check(profile)
    assert profile.details["largest_error"] < 1e-6
    assert profile.details["clock"] == "wall"
    few = timed(replace(PLAN, draft_lengths=(1, 4), texts=1), rule="transformers")
    assert few.details["largest_error"] is None  # no more equations than steps


def test_every_length_is_verified_by_lookups_and_a_few_by_draft_models():
    many = replace(PLAN, draft_lengths=(1, 2, 3, 4))
    assert many.exit_lengths == (1, 3, 4)
    profile = timed(many)
    check(profile)
    assert profile.costs(6).whole_pass_seconds(4) == pytest.approx(0.016)


def test_a_draft_model_of_its_own_is_timed_beside_the_exits():
    profile = timed(replace(PLAN, drafter="small"))
    check(profile)
    small = profile.costs(6).draft_model
    assert (small.name, small.step_s, small.first_s) == ("small", pytest.approx(0.0015), pytest.approx(0.002))


def test_a_length_that_no_lookup_found_is_read_off_its_neighbours():
    many = replace(PLAN, exit_layers=(5,), draft_lengths=(1, 2, 3, 4))
    equations = [
        Equation(Drafting(), 48, {}, 0.48),
        *(Equation(Drafting(length, lookup=PromptLookup(1)), plain, {length: 20},
                   (plain + 20) * LOOKUP + plain * VERIFY[1] + 20 * seconds)
          for length, plain, seconds in ((1, 2, 0.012), (3, 9, 0.016), (4, 20, 0.018))),
        *(Equation(Drafting(length, 5), 0, {length: 20}, 20 * (length * 0.008 + seconds))
          for length, seconds in ((1, 0.012), (3, 0.016), (4, 0.018))),
    ]  # fmt: skip
    steps, _ = solve(equations, many, 1, 64)
    verified = {step.tokens: step.seconds for step in steps if step.step == "verify"}
    assert verified == pytest.approx({2: 0.012, 4: 0.016, 5: 0.018})


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("transformers", ["ngram:1"] * 3),
        ("vllm", ["ngram:1:vllm", "ngram:3-3:vllm"] * 3),
        ("llama.cpp", ["ngram:1x1:llama.cpp", "ngram:1x2:llama.cpp", "ngram:1x4:llama.cpp", "ngram:3x4:llama.cpp"]),
    ],
)
def test_lookups_that_find_little_are_timed_where_an_engine_has_them(rule, names):
    """transformers looks for fewer tokens where it finds no three; llama.cpp drafts no fewer than it matched."""
    lookups = [way.lookup for way in PLAN.ways(rule) if way.lookup is not None]
    assert [each.key.model for each in lookups] == names
    assert {(way.exit_layer, way.draft_length) for way in PLAN.ways(rule) if way.exit_layer} == {
        (exit_layer, length) for exit_layer in (1, 5) for length in (1, 2, 4)
    }


def test_a_model_of_steps_that_does_not_fit_says_by_how_much():
    """Two drafts take longer than their steps: no first and no draft step explains it."""

    @contextmanager
    def crooked(drafting):
        yield Fabricated(drafting, slower=1.3 if drafting.exit_layer and drafting.draft_length == 2 else 1.0)

    assert 0.05 < timed(engine=crooked).details["largest_error"] < 0.3

    check(timed(replace(PLAN, clock="processor")))


def test_a_batch_has_steps_of_its_own():
    profile = timed(replace(PLAN, rows=(1, 5)))
    check(profile)
    check(profile, scale=2.0, rows=5)
    check(profile, scale=1.5, rows=3)


def test_one_by_one_a_machine_that_slows_down_is_seen_in_its_plain_steps():
    count = [0]

    @contextmanager
    def slower(drafting):
        count[0] += 1
        yield Fabricated(drafting, slower=1 + (count[0] - 1) // 2)  # each pair slower than the one before

    check(timed(replace(PLAN, together=False), slower))


def test_what_cannot_be_timed_is_refused():
    @contextmanager
    def finds_nothing(drafting):
        yield Fabricated(drafting, finds=False)

    @contextmanager
    def no_time(drafting):
        yield lambda *asked, **more: Turn(EngineRounds([0], [], []), 1, 0.0, 0.0)

    with pytest.raises(ResourceError, match="no round verified 1 drafts"):
        timed(engine=finds_nothing)
    with pytest.raises(ResourceError, match="too busy to be timed"):
        timed(engine=no_time)
    with pytest.raises(InputError, match="a context of 400 tokens needs as many of text; there are 200"):
        timed(replace(PLAN, contexts=(400,)))
    with pytest.raises(InputError, match="a context of 8 tokens is too short"):
        replace(PLAN, contexts=(8,))
    with pytest.raises(InputError, match="clock 'sun' is not known"):
        replace(PLAN, clock="sun")
    with pytest.raises(InputError, match="draft_lengths of a cost plan is empty"):
        replace(PLAN, draft_lengths=())


def test_homes_refuse_what_an_engine_has_not(tiny, tmp_path):
    with pytest.raises(InputError, match="there is no running 'sglang'"):
        EngineHome("sglang", tiny, tmp_path)
    with pytest.raises(InputError, match=r"llama\.cpp is asked for one row at a time, not 4"):
        EngineHome("llama.cpp", tiny, tmp_path, rows=4)
    with pytest.raises(InputError, match="expected a JSON object"):
        EngineHome("vllm", tiny, tmp_path, options="--dtype half")
    with pytest.raises(InputError, match="there is no program"):
        EngineHome("llama.cpp", tiny, tmp_path, program=tmp_path / "nowhere").found()


def test_transformers_is_timed_with_its_own_early_exit(tiny, tmp_path):
    home = EngineHome("transformers", tiny, tmp_path)
    with home.open(Drafting(3, 4)) as session:
        found = session([5, 6, 7], 12, ignore_eos=True)
    assert len(found.text.tokens) == 12
    assert sum(each + 1 for each in found.text.accepted) + found.plain == 12
    assert found.seconds > 0
    with home.open(Drafting()) as session:
        assert session([5, 6, 7], 12, ignore_eos=True).text.tokens == found.text.tokens


def test_an_engine_that_is_not_there_says_so(tmp_path):
    with (
        vllm_session(sys.executable, tmp_path, None) as session,
        pytest.raises(ResourceError, match=r"did not run: .*vllm"),
    ):
        session([1, 2], 4)


SERVER = """#!{python}
import http.server, json, sys
class Answers(http.server.BaseHTTPRequestHandler):
    def say(self, document):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(document).encode())
    def log_message(self, *more): pass
    def do_GET(self): self.say({{}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print("accepted  2/ 3 draft tokens\\naccepted  0/ 1 draft tokens", flush=True)
        self.say({{"tokens": asked["prompt"] + [9] * 5, "timings": {{"predicted_ms": 20, "predicted_n": 8, "draft_n": 4,
                   "draft_n_accepted": 2}}}})
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers).serve_forever()
"""


def test_a_server_is_asked_and_its_rounds_are_read(tmp_path):
    server = tmp_path / "llama-server"
    server.write_text(SERVER.format(python=sys.executable))
    server.chmod(0o755)
    with llama_cpp_session(server, tmp_path / "model.gguf") as session:
        for _ in range(2):
            found = session([1, 2, 3], 8)
            assert found.text == EngineRounds([1, 2, 3, 9, 9, 9, 9, 9], [3, 1], [2, 0])
            assert (found.plain, found.decoding_s) == (4, 0.020)
        assert session.totals["draft_n"] == 8
        assert found.seconds > 0 <= found.processor_s
        with pytest.raises(InputError, match="one row at a time, not 2"):
            session([1], 8, rows=2)


@pytest.mark.second
def test_the_command_writes_a_profile_that_choose_reads(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", time.process_time)  # whatever else this machine does
    traced, profile, prompts = tmp_path / "run", tmp_path / "profile.json", tmp_path / "prompts.txt"
    prompts.write_text("abc\nbcd\n")
    document(capsys, "trace", tiny_folder, "-o", traced, "--prompts", prompts, "--max-new-tokens", 16)
    asked = ("costs", tiny_folder, "--engine", "transformers", "-o", profile, "--sweeps", 1, "--draft-lengths", "1,3",
             "--contexts", 40, "--clock", "processor")  # fmt: skip
    found = document(capsys, *asked)
    assert found == json.loads(profile.read_text())
    assert {step["exit_layer"] for step in found["steps"]} == {None, 1, 4}
    assert found["details"]["tokens"][1] == LONGER
    for costs in (profile, "transformers"):
        chosen = document(capsys, "choose", traced, "--costs", costs, "--draft-lengths", "1,3", "--context", 40)
        assert (chosen["costs"]["source"], chosen["costs"]["dtype"]) == ("transformers", "float32")
    fails(capsys, ["choose", str(traced), "--costs", "sglang"], "--costs is 'sglang'; expected measured or roofline")


def test_a_draft_model_of_another_tokenizer_is_refused(tiny, tmp_path):
    whole = load("tales-layerskip", device="cpu")
    home = EngineHome("transformers", whole, tmp_path, helper=tiny)
    with pytest.raises(InputError, match="encodes text otherwise than tales-layerskip"):
        measure_home(home, PLAN)
    for engine, helper in (("transformers", None), ("vllm", None), ("llama.cpp", tiny)):
        with pytest.raises(InputError, match=f"{engine} was not given the draft model small"):
            EngineHome(engine, whole, tmp_path, helper=helper).open(Drafting(2, drafter="small"))


@pytest.mark.second
def test_transformers_assistant_is_timed_and_weighed(tmp_path, capsys):
    """The real assisted generation of a bundled pair, from the command that times it to the choice."""
    traced, profile, prompts = tmp_path / "run", tmp_path / "profile.json", tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe wolf said\n")
    document(capsys, "trace", "tales-layerskip", "-o", traced, "--prompts", prompts, "--max-new-tokens", 24,
             "--draft-model", "tales-draft", "--device", "cpu")  # fmt: skip
    found = document(capsys, "costs", "tales-layerskip", "--engine", "transformers", "-o", profile, "--sweeps", 1,
                     "--draft-model", "tales-draft", "--draft-lengths", "1,3", "--contexts", 40, "--clock",
                     "processor", "--device", "cpu")  # fmt: skip
    steps = {(step["step"], step.get("drafter")) for step in found["steps"]}
    assert {("draft", "tales-draft"), ("first", "tales-draft"), ("draft", None)} <= steps
    chosen = document(capsys, "choose", traced, "--costs", profile, "--draft-lengths", "1,3")
    assert chosen["costs"]["drafter"] == "tales-draft"
    assert "speculative" in {row["method"] for row in chosen["methods"]}
