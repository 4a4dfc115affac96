"""What a report advises next: commands that can be typed, settings that can be pasted."""

from __future__ import annotations

import shlex
from pathlib import Path

from probekit.presentation.next_steps import next_steps
from probekit.settings import Sampling


def test_few_texts_and_hostile_names_in_the_next_steps():
    entry = {"name": "a'; rm -rf b", "trace": "traces/a", "choice": {
        "speculate": True, "few_prompts": True, "prompts": 3, "exit_layer": 2, "draft_length": 4}}  # fmt: skip
    steps = next_steps(entry, Path("a study") / "traces" / "a'; rm")
    assert "rests on 3 texts" in steps["words"]
    for command in steps["commands"]:
        assert shlex.split(command)[:2] in (["probekit", "choose"], ["probekit", "validate"])
        assert "a study/traces/a'; rm" in shlex.split(command)
    compile(steps["snippet"], "snippet", "exec")
    sampled = next_steps(entry, Path("a"), Sampling(0.7, top_p=0.9))["snippet"]
    assert "assistant_early_exit=2, do_sample=True, temperature=0.7, top_k=0, top_p=0.9)" in sampled


def test_the_next_steps_follow_the_best_of_all_ways():
    nothing = {"speculate": False, "speedup": 1.0, "exit_layer": None, "draft_length": None}
    lookup = {"drafter": "ngram:2", "policy": "fixed", "exit_layer": None, "draft_length": 4, "speedup": 1.2}
    steps = next_steps({"name": "a", "choice": nothing | {"way": lookup}}, Path("a run"))
    assert "prompt lookup" in steps["words"]
    assert "prompt_lookup_num_tokens=4, max_matching_ngram_size=2" in steps["snippet"]
    compile(steps["snippet"], "snippet", "exec")
    for command in steps["commands"]:
        words = shlex.split(command)
        assert words[0] == "probekit" and "a run" in words and "ngram:2" in words
    of_vllm = next_steps({"name": "a", "choice": nothing | {"way": lookup | {"drafter": "ngram:2-3:vllm"}}}, Path("a"))
    assert "--engine vllm" in of_vllm["commands"][0] and not of_vllm["snippet"]

    pair = {"speculate": True, "speedup": 1.1, "exit_layer": 3, "draft_length": 2}
    tree = {"drafter": "tree:2x1", "policy": "fixed", "exit_layer": 3, "draft_length": 2, "speedup": 1.3}
    steps = next_steps({"name": "a", "choice": pair | {"way": tree}}, Path("a"))
    assert "validate a --ways" in steps["commands"][0] and "assistant_early_exit=3" in steps["snippet"]
    alone = next_steps({"name": "a", "choice": nothing | {"way": tree}}, Path("a"))
    assert "no way that pays here" in alone["words"] and not alone["snippet"]
    slower = next_steps({"name": "a", "choice": pair | {"way": lookup | {"speedup": 1.1}}}, Path("a"))
    assert "assistant_early_exit=3" in slower["snippet"] and "prompt lookup" not in slower["words"]


def test_what_gained_nothing_when_measured_is_not_handed_on_without_a_word():
    entry = {"name": "a", "choice": {"speculate": True, "exit_layer": 2, "draft_length": 4}}
    assert "gained nothing" not in next_steps(entry, Path("a"))["words"]
    for measured, said in ((0.96, True), (1.0, True), (1.07, False), (None, False)):
        words = next_steps(entry | {"chosen_validation": {"speedup_measured": measured}}, Path("a"))["words"]
        assert words.startswith("Measured, it gained nothing") == said
    way = {"drafter": "exit", "policy": "tree", "speedup": 1.9, "draft_length": 2}
    entry["choice"] |= {"way": way, "speedup": 1.2}
    for measured, said in ((0.72, True), (1.1, False), (None, False)):
        ran = {"chosen_validation": {"speedup_measured": 0.5}, "ways": {"validated": [{"speedup_measured": measured}]}}
        words = next_steps(entry | ran, Path("a"))["words"]
        assert words.startswith("Measured, it gained nothing") == said, "of the way that is advised"
