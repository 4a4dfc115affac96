"""Text out of another system's log: read in every engine's form, and held against the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import probekit
from probekit.cli.app import run
from probekit.errors import InputError
from probekit.foreign.engine_logs import read_log

PROMPT, TEXT = [1, 5, 9], [7, 2, 4]
FORMS = {
    "plain": {"prompt_token_ids": PROMPT, "token_ids": TEXT},
    "vllm server": {"choices": [{"prompt_token_ids": PROMPT, "token_ids": TEXT, "text": "x"}], "usage": {}},
    "vllm chat": {"prompt_token_ids": PROMPT, "choices": [{"token_ids": TEXT, "message": {}}]},
    "vllm in python": {"prompt_token_ids": PROMPT, "outputs": [{"token_ids": TEXT, "cumulative_logprob": -1.0}]},
    "sglang": {
        "text": "x",
        "meta_info": {
            "input_token_logprobs": [[None, id, None] for id in PROMPT],
            "output_token_logprobs": [[-0.1, id, "x"] for id in TEXT],
        },
    },
    "sglang ids": {"input_ids": PROMPT, "output_ids": TEXT, "meta_info": {}},
    "llama.cpp": {"prompt": PROMPT, "tokens": TEXT, "content": "x"},
    "llama.cpp probabilities": {
        "prompt": PROMPT, "tokens": [], "completion_probabilities": [{"id": id, "logprob": -0.1} for id in TEXT],
    },
    "tensorrt-llm": {"prompt_token_ids": PROMPT, "output_ids": TEXT},
}  # fmt: skip


CHOICE = {"token_ids": TEXT, "text": "x"}
FORMS |= {
    "vllm, ids for texts": {
        "prompt": PROMPT, "choices": [{"logprobs": {"tokens": [f"token_id:{id}" for id in TEXT]}, "text": "x"}],
    },
    "vllm chat, ids for texts": {
        "prompt_token_ids": PROMPT,
        "choices": [{"logprobs": {"content": [{"token": f"token_id:{id}", "logprob": -0.1} for id in TEXT]}}],
    },
    "vllm batch": {
        "custom_id": "7", "error": None,
        "response": {"status_code": 200, "body": {"choices": [{"prompt_token_ids": PROMPT, **CHOICE}]}},
    },
    "a proxy's": {"request": {"prompt": PROMPT, "temperature": 0}, "response": {"choices": [CHOICE]}},
    "sglang's openai server": {"prompt_token_ids": PROMPT, "choices": [{"response_token_ids": TEXT, "meta_info": {}}]},
    "sglang, with the prompt's tokens counted": {
        "output_ids": TEXT,
        "meta_info": {"prompt_tokens": 3, "input_token_logprobs": [[None, id, None] for id in PROMPT]},
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_log_of_each_engine_is_read(form, suffix, tmp_path):
    path = tmp_path / f"log{suffix}"
    lines = [json.dumps(FORMS[form])] * 2
    path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]")
    assert [(text.prompt, text.ids) for text in read_log(path)] == [(tuple(PROMPT), tuple(TEXT))] * 2


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"prompt": "a", "text": "b"}, "lacks the token ids"),
        ({"token_ids": TEXT}, "lacks the prompt"),
        ({"prompt_token_ids": PROMPT, "token_ids": []}, "lacks the token ids"),
        ({"prompt_token_ids": PROMPT, "token_ids": [1.5]}, "whole numbers"),
        ({"prompt_token_ids": PROMPT, "token_ids": [-1]}, "whole numbers"),
        ({"prompt_token_ids": PROMPT, "token_ids": [True]}, "whole numbers"),
        ({"prompt_token_ids": PROMPT, "token_ids": [2**40]}, "whole numbers"),
        ({"prompt_token_ids": PROMPT, "token_ids": "12"}, "whole numbers"),
        ({"prompt_token_ids": PROMPT, "choices": "x"}, "no list of objects"),
        ([1], "expected an object"),
        ({"prompt": PROMPT, "choices": [{"logprobs": {"tokens": ["a", "b"]}}]}, "lacks the token ids"),
        ({"request": {}, "response": {"choices": [{"token_ids": TEXT}]}}, "lacks the prompt"),
        (
            {"output_ids": TEXT, "meta_info": {"prompt_tokens": 3, "input_token_logprobs": [[-1.0, 9, None]]}},
            "has the ids of 1 of the 3 tokens of its prompt",
        ),
    ],
)
def test_what_is_no_log_is_refused_with_its_line(record, what, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(FORMS["plain"]) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(InputError, match=rf"line 2.*{what}"):
        read_log(path)


SAMPLES = Path(__file__).parent / "engine_logs"
COLOUR = [{"role": "user", "content": "Name a colour."}]


def test_what_llama_cpp_answers_is_read(tmp_path):
    """Answers of its server (build 11434) to SmolLM2-135M-Instruct, as they came: by itself, and by OpenAI's ways."""
    text = (28, 260, 2240, 282, 1315, 27108)  # ", the city of New Haven"
    for name in ("completion", "completion_ids"):
        [found] = read_log(SAMPLES / f"llama_cpp_{name}.json")
        assert found[:2] == ("Once upon a time", text)
    with pytest.raises(InputError, match="lacks the token ids"):
        read_log(SAMPLES / "llama_cpp_completion_plain.json")
    asked = {"v1_completions": {"prompt": "Once upon a time"}, "v1_chat": {"messages": COLOUR}}
    for name, request in asked.items():
        answer = json.loads((SAMPLES / f"llama_cpp_{name}.json").read_text())
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(answer))
        with pytest.raises(InputError, match=r"lacks the prompt.*write the prompt beside them"):
            read_log(path)
        path.write_text(json.dumps({"request": request, "response": answer}))
        [found] = read_log(path)
        assert found.ids == (text if name == "v1_completions" else (504, 7302, 314, 253, 3861, 284))
        assert (found.prompt, found.messages) == (request.get("prompt", ""), request.get("messages"))
    [prompt] = probekit.load_log(tmp_path / "v1_chat.json")
    assert prompt.messages == tuple(COLOUR) and prompt.text == ""


@pytest.mark.long
def test_a_real_servers_text_is_the_models_own(smollm2, tmp_path):
    path = tmp_path / "chat.json"
    answer = json.loads((SAMPLES / "llama_cpp_v1_chat.json").read_text())
    path.write_text(json.dumps({"request": {"messages": COLOUR}, "response": answer}))
    read = probekit.trace(smollm2, probekit.load_log(path), logged=True, statistics="agreement")
    assert len(read.prompt_ids(0)) == answer["usage"]["prompt_tokens"]
    assert read.manifest.measured.logged[0]["unlike"] == 0


def logged(traced, path, change=None):
    """The texts of a trace, as vLLM's server would have logged them."""
    with path.open("w") as file:
        for prompt in traced.prompts:
            text = traced.outputs(prompt).tolist()
            if change is not None:
                text = change(prompt, text)
            record = {"prompt_token_ids": traced.prompt_ids(prompt).tolist(), "token_ids": text}
            file.write(json.dumps({"choices": [record]}) + "\n")
    return probekit.load_log(path)


@pytest.mark.parametrize("statistics", ["all", "agreement"])
def test_a_log_of_the_models_own_text_gives_the_trace_that_generating_gives(any_tiny, statistics, tmp_path):
    own = probekit.trace(any_tiny, [[3, 4, 5], [6, 7], [8]], max_new_tokens=12, statistics=statistics)
    read = probekit.trace(any_tiny, logged(own, tmp_path / "log.jsonl"), statistics=statistics, logged=True)
    for prompt in own.prompts:
        assert np.array_equal(own.agreement(prompt), read.agreement(prompt))
        assert own.outputs(prompt).tolist() == read.outputs(prompt).tolist()
    one, two = probekit.predict(own), probekit.predict(read)
    assert two.exact and two.text == "greedy"
    assert one.to_pandas().equals(two.to_pandas())


def test_sampled_text_is_held_against_what_could_have_been_drawn(any_tiny, tmp_path):
    how = {"max_new_tokens": 12, "sampling": probekit.Sampling(temperature=1.0, top_k=3)}
    own = probekit.trace(any_tiny, [[3, 4, 5], [6, 7], [8]], **how)
    read = probekit.trace(any_tiny, logged(own, tmp_path / "log.jsonl"), logged=True, **how)
    assert read.manifest.own_text
    for prompt in own.prompts:
        assert np.allclose(own.accept_probability(prompt), read.accept_probability(prompt), atol=1e-5)
    narrow = probekit.Sampling(temperature=1.0, top_k=1)
    with pytest.raises(InputError, match="are not what"):
        probekit.trace(any_tiny, logged(own, tmp_path / "log.jsonl"), logged=True, sampling=narrow)


def test_a_few_tokens_of_another_kind_are_counted_and_many_are_refused(any_tiny, tmp_path):
    own = probekit.trace(any_tiny, [[3, token] for token in range(2, 10)], max_new_tokens=30)
    total = sum(len(own.outputs(prompt)) for prompt in own.prompts)
    swap = lambda prompt, text: text if prompt else [*text[:-1], (text[-1] + 1) % 20]  # noqa: E731
    read = probekit.trace(any_tiny, logged(own, tmp_path / "one.jsonl", swap), logged=True)
    [account] = read.manifest.measured.logged
    assert (account["unlike"], account["tokens"]) == (1, total)
    assert account["largest_gap"] > 0
    assert not probekit.predict(read).exact
    shuffled = logged(own, tmp_path / "all.jsonl", lambda _, text: [(token + 3) % 20 for token in text])
    with pytest.raises(InputError, match="are not what"):
        probekit.trace(any_tiny, shuffled, tmp_path / "run", logged=True)
    assert not (tmp_path / "run").exists()


def test_prompts_without_token_ids_are_no_log(any_tiny):
    with pytest.raises(InputError, match="no text of token ids"):
        probekit.trace(any_tiny, [[3, 4]], logged=True)


def test_the_command_reads_a_log(tiny_folder, tmp_path, capsys):
    loaded = probekit.load(tiny_folder)
    own = probekit.trace(loaded, ["abc", "defg"], max_new_tokens=8)
    logged(own, tmp_path / "log.jsonl")
    words = ["trace", str(tiny_folder), "--from-logprobs", str(tmp_path / "log.jsonl"), "-o", str(tmp_path / "run")]
    assert run(words) == 0
    assert "All 16 tokens of the log are this model's own." in capsys.readouterr().err
    assert run([*words[:2], "--prompts", "x.txt", *words[2:]]) == 2
