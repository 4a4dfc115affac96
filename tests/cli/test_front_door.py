"""What a newcomer does in the first hour: each stop that was found, as a test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.processes import Command
from transformers import AutoModelForCausalLM

import probekit
from probekit.cli import main
from probekit.cli.app import run
from probekit.cli.signals import Stopped, stoppable
from probekit.errors import InputError
from probekit.presentation.study_folder import open_study

HERE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(probekit.__file__).parents[1])}


def probekit_process(*words: object) -> subprocess.Popen:
    """A real process of its own, in which a Ctrl-C is a Ctrl-C (a test runner's children may ignore it)."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from probekit.cli import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], env=HERE, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def fails(capsys, *words: object) -> str:
    assert run([*map(str, words)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("abc\ndefg\nhij\nk\n")
    return path


@pytest.fixture(scope="module")
def sampled_run(tiny_folder, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sampled"
    assert run(["trace", str(tiny_folder), "--prompts", str(prompts), "-o", str(folder), "--max-new-tokens", "8",
                "--temperature", "0.7", "--top-p", "0.9", "--device", "cpu", "--quiet"]) == 0  # fmt: skip
    return folder


# ------------------------------------------------------------------------------------------ the command itself
def test_the_version_and_the_help(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"probekit {probekit.__version__}"
    assert run([]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "Usage: probekit" in said.out
    assert "study" in said.out


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "probekit", "--version"], env=HERE, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("probekit ")


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["--version"], {"torch", "transformers", "pandas"}),
        (["models"], {"torch", "transformers"}),
        (["study", "--temperature", "0.7", "--print-config"], {"torch", "transformers"}),
    ],
)
def test_a_quick_answer_imports_nothing_large(words, unwanted):
    code = (
        "import sys; from probekit.cli.app import run; status = run(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], env=HERE, capture_output=True, text=True, check=True)
    assert not unwanted & set(done.stderr.split())


def test_wrong_use_names_the_help_of_the_command(capsys):
    assert fails(capsys, "trace").endswith("Try `probekit trace --help`.")
    assert fails(capsys, "trace", "--no-such-option").endswith("Try `probekit trace --help`.")
    assert fails(capsys, "no-such-command").endswith("Try `probekit --help`.")


@pytest.mark.parametrize("flag", ["-v", "--debug"])
def test_debug_shows_where_it_came_from(capsys, flag):
    assert run(["predict", "nowhere", flag]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.strip().splitlines()[-1].startswith("probekit predict: there is no run folder nowhere")


def test_a_fault_of_our_own_is_one_line_too(capsys, monkeypatch):
    monkeypatch.setattr("probekit.models.shipped.bundled_models", lambda: 1 / 0)
    assert run(["models"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "ZeroDivisionError" in line
    assert "--debug" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["models"], ["models", "--json"]])
def test_a_full_disk_is_one_line(words):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "probekit", *words], env=HERE, stdout=full,
                              stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == "probekit models: No space left on device."


def test_a_reader_that_is_gone_is_no_error():
    done = subprocess.run(
        f"'{sys.executable}' -m probekit models --json | head -c 1",
        shell=True,
        env=HERE,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "asked to end", marks=pytest.mark.second),
    ],
)
def test_a_signal_says_what_is_kept_and_how_to_go_on(tmp_path, number, status, said):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n" * 400)
    out = tmp_path / "a run"
    words = ["trace", "tales-tied", "--prompts", prompts, "-o", out, "--batch-size", "2", "--max-new-tokens", "4"]
    process = Command(tmp_path, *words)
    deadline = time.monotonic() + 60
    while not list(out.glob("layers-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    code, printed, line = process.ended()
    assert code == status
    assert printed == ""
    assert "Traceback" not in line
    line = line.strip().splitlines()[-1]  # libraries may remark on the machine first
    assert line.startswith(f"probekit trace: {said}")
    assert "of 400 prompts are kept in" in line
    assert line.endswith("4 --resume")
    assert f"'{out}'" in line  # a name with a space is quoted
    assert len(list(out.glob("*.unfinished"))) <= 1


@pytest.mark.second
def test_a_second_signal_ends_at_once_and_without_a_traceback(tmp_path):
    late = (
        "import signal, os, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from probekit.cli import main\n"
        "def slow(*_, **__):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT); time.sleep(300)\n"
        "    finally: os.kill(os.getpid(), signal.SIGINT); time.sleep(300)\n"
        "import probekit.models.loaded; probekit.models.loaded.load = slow\n"
        "main(['inspect', 'tales-tied'])\n"
    )
    done = subprocess.run([sys.executable, "-c", late], env=HERE, capture_output=True, text=True, timeout=150)
    assert done.returncode == -signal.SIGINT, "130, as a shell gives it"
    assert "Traceback" not in done.stderr


def test_a_signal_in_json(tmp_path):
    process = Command(tmp_path, "study", "tales-tied", "-o", tmp_path / "study", "--json")
    deadline = time.monotonic() + 60
    while not (tmp_path / "study" / "study.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status, printed, line = process.ended()
    assert status == 143
    assert "Traceback" not in line
    assert "probekit" not in line
    document = json.loads(printed)
    assert document["schema"] == "probekit/study/1"
    assert document["hint"].startswith("Go on with: probekit study tales-tied -o ")


@pytest.mark.second
@pytest.mark.parametrize("wait", [0.2, 0.6, 1.2])
def test_a_signal_while_it_starts(wait):
    """Also in the imports: never a traceback."""
    process = probekit_process("inspect", "tales-tied")
    time.sleep(wait)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (0, 143, -signal.SIGTERM)
    assert "Traceback" not in said


def test_a_signal_in_an_import_waits_for_its_end(tmp_path, monkeypatch):
    """Modules written in C++ end the process at an exception that falls into their imports."""
    source = "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.05)\nwhole = True\n"
    (tmp_path / "imported_slowly.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    def import_it():
        import imported_slowly  # noqa: F401

        time.sleep(5)

    with pytest.raises(Stopped) as stopped, stoppable():
        import_it()
    assert (stopped.value.number, sys.modules["imported_slowly"].whole) == (signal.SIGTERM, True)


def test_a_signal_that_an_import_made_another_error_of(capsys, monkeypatch):
    class Field:
        def __set_name__(self, owner, name):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    def imported_late(*_, **__):
        type("Of a library", (), {"field": Field()})  # Python 3.11 makes a RuntimeError of what is raised in there

    monkeypatch.setattr("probekit.models.loaded.load", imported_late)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "tales-tied"])
    assert ended.value.code == 143
    assert capsys.readouterr().err.startswith("probekit inspect: asked to end (SIGTERM). Nothing was kept.")


def test_a_signal_that_a_destructor_would_swallow(capsys, monkeypatch):
    class Rubbish:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    class Referent:
        pass

    def cleared_away(*_, **__):
        Rubbish()
        time.sleep(5)
        late.append("cleared away")

    def called_back(*_, **__):
        referent = Referent()
        watched = weakref.ref(referent, lambda _: Rubbish())
        del referent
        time.sleep(5)
        late.append(watched)

    late, hook = [], sys.unraisablehook
    for way in (cleared_away, called_back):
        monkeypatch.setattr("probekit.models.loaded.load", way)
        with pytest.raises(SystemExit) as ended:
            main(["inspect", "tales-tied"])
        assert ended.value.code == 143
        said = capsys.readouterr().err
        assert said.startswith("probekit inspect: asked to end (SIGTERM). Nothing was kept.")
        assert "Traceback" not in said
    assert not late
    assert sys.unraisablehook is hook


# ------------------------------------------------------------------------------------------ no wasted runs
def test_what_predict_would_refuse_is_refused_before_the_trace(capsys, tiny_folder, prompts, tmp_path):
    words = ["trace", tiny_folder, "--prompts", prompts, "-o", tmp_path / "run", "--statistics", "agreement"]
    assert "predict" in fails(capsys, *words, "--temperature", "0.7")
    assert "predict" in fails(capsys, *words, "--given")
    assert not (tmp_path / "run").exists()


def test_a_target_that_cannot_be_written_is_refused_before_the_work(capsys, sampled_run, tmp_path, monkeypatch):
    monkeypatch.setattr("probekit.cli.choose.costs_of", lambda *_, **__: pytest.fail("timed before it looked"))
    (tmp_path / "mine.txt").write_text("mine")
    assert "holds other files" in fails(capsys, "choose", sampled_run, "--export", tmp_path)
    assert "no folder" in fails(capsys, "lens", "tales-tied", "Once", "--html", tmp_path / "no" / "x.html")
    assert "no file" in fails(capsys, "lens", "tales-tied", "Once", "--html", tmp_path)
    assert "there is no model" in fails(capsys, "study", "tales-tied", "no/where/at/all", "-o", tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("given", ["1-99999999999999", "9223372036854775807", "1-1000000", "0-" + "9" * 400])
def test_numbers_are_bounded_before_they_are_expanded(capsys, sampled_run, given):
    for option in ("--exit-layers", "--draft-lengths"):
        assert "make sense here" in fails(capsys, "predict", sampled_run, option, given)


# ------------------------------------------------------------------------------------------ from Python
def test_python_takes_what_people_give(tiny_folder, sampled_run):
    model = probekit.load(tiny_folder, device="cpu")
    by_name = probekit.trace(str(tiny_folder), ["abc", "de"], max_new_tokens=4)
    assert by_name.manifest.model.weights_hash == model.weights_hash
    assert probekit.predict(sampled_run).text == "sampled"
    costs = probekit.measure_costs(model, 16, draft_lengths=[1, 2], repeats=1)
    assert probekit.choose(by_name, costs).prompts == 2
    assert (
        probekit.decode(tiny_folder, "abc", max_new_tokens=3).tokens
        == probekit.decode(model, "abc", max_new_tokens=3).tokens
    )
    assert probekit.validate(model, sampled_run, [(2, 2)], limit=1, costs=costs).text == "sampled"
    assert probekit.inspect_prompt(tiny_folder, "abc", max_new_tokens=2).loaded.name == model.name


def test_python_says_what_it_takes(tiny_folder):
    loaded = probekit.load(tiny_folder, device="cpu")
    bare = AutoModelForCausalLM.from_pretrained(tiny_folder)
    doors = (
        probekit.load, probekit.trace, lambda model: probekit.decode(model, "abc"), probekit.measure_costs,
        lambda model: probekit.inspect_prompt(model, "abc"), lambda model: probekit.validate(model, "nowhere"),
    )  # fmt: skip
    for door in doors:
        with pytest.raises(InputError, match=r"probekit\.wrap"):
            door(bare)
        with pytest.raises(InputError, match="is no model"):
            door(5)
    for wrong in (loaded, 5, None):
        with pytest.raises(InputError, match=r"probekit\.trace"):
            probekit.predict(wrong)
        with pytest.raises(InputError, match=r"probekit\.measure_costs"):
            probekit.choose(wrong, wrong)
    with pytest.raises(InputError, match="name a folder"):
        probekit.trace(loaded, ["abc"], max_new_tokens=2, keep_residuals=[1])
    for wrong in ([3.5], [["a", 5]], [None], [5], 5, "abc", [[]]):
        with pytest.raises(InputError):
            probekit.trace(loaded, wrong, max_new_tokens=2)


def test_python_takes_one_prompt_where_one_is_expected(tiny_folder):
    model = probekit.load(tiny_folder, device="cpu")
    ids = model.tokenizer("abc")["input_ids"]
    for given in (ids, tuple(ids), np.array(ids), torch.tensor(ids)):
        assert probekit.decode(model, given, max_new_tokens=2).tokens
    for given in (["abc", "de"], [ids], torch.tensor([ids]), {"prompt": "abc"}, None, 3):
        with pytest.raises(InputError, match="expected a text, or token ids"):
            probekit.decode(model, given, max_new_tokens=2)
    for door in (lambda given: probekit.inspect_prompt(model, given), lambda given: probekit.patch(model, given, "de")):
        for given in (["abc"], 3, None):
            with pytest.raises(InputError, match="expected"):
                door(given)


def test_chat_messages_are_prompts(tiny_folder):
    loaded = probekit.load(tiny_folder, device="cpu")
    loaded.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    one = [{"role": "user", "content": "abc"}]
    assert len(probekit.trace(loaded, one, max_new_tokens=2)) == 1
    several = probekit.trace(loaded, [one, [*one, {"role": "assistant", "content": "de"}]], max_new_tokens=2)
    assert len(several) == 2


def test_the_public_names_and_nothing_else():
    assert dir(probekit) == sorted(probekit.__all__)
    assert all(not name.startswith("_") and getattr(probekit, name) is not None for name in dir(probekit))
    assert probekit.look_inside is probekit.inspect_prompt  # an old name still works, and is not shown


def test_reprs_are_short_and_every_result_shows_itself(tiny_folder, sampled_run):
    model = probekit.load(tiny_folder, device="cpu")
    trace = probekit.Trace.open(sampled_run)
    prediction = probekit.predict(trace)
    costs = probekit.measure_costs(model, 16, draft_lengths=[1, 2], repeats=1)
    from probekit.tying.compare import compare_traces

    results = [
        model, trace, prediction, costs, probekit.choose(prediction, costs),
        probekit.validate(model, trace, [(2, 2)], limit=1, costs=costs),
        probekit.decode(model, "abc", max_new_tokens=40), probekit.inspect_prompt(model, "abc", max_new_tokens=3),
        compare_traces([trace, trace]), trace.manifest, model.anatomy,
    ]  # fmt: skip
    for result in results:
        assert len(repr(result)) <= 2000
        assert repr(result).startswith(type(result).__name__)
        assert "<t" in result._repr_html_() or "<p" in result._repr_html_()
    assert len(repr(prediction.cells[0])) < 200
    batches = tuple((prompt,) for prompt in range(1000))
    large = trace.manifest.but(batches=batches, files={f"tokens-{part}": "0" * 64 for part in range(1000)})
    for part in (large, large.plan, large.measured):
        assert len(repr(part)) <= 2000
    assert len(large._repr_html_()) < 20_000


# ------------------------------------------------------------------------------------------ settings
def test_the_lens_of_a_prompt_alone(capsys, tiny_folder):
    assert run(["lens", str(tiny_folder), "abc", "--max-new-tokens", "0", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert run(["lens", str(tiny_folder), "abc", "--max-new-tokens", "3", "--json"]) == 0
    longer = json.loads(capsys.readouterr().out)
    count = len(alone["positions"])
    inputs = [[place["input"] for place in found["positions"]] for found in (alone, longer)]
    assert inputs[0] == inputs[1][:count]
    assert len(longer["positions"]) == count + 2
    assert "0 or more" in fails(capsys, "lens", tiny_folder, "abc", "--max-new-tokens", "-1")


def test_a_config_file_and_back(capsys, tmp_path):
    file = tmp_path / "study.toml"
    file.write_text('models = ["tales-tied"]\nmax-new-tokens = 16\nexit_layers = [2, 3]\ntop_p = 0.9\n')
    assert run(["study", "--config", str(file), "--print-config", "--max-new-tokens", "8"]) == 0
    printed = capsys.readouterr().out
    found = tomllib.loads(printed)
    assert found["models"] == ["tales-tied"]
    assert (found["max-new-tokens"], found["exit-layers"], found["top-p"]) == (8, "2,3", 0.9)
    file.write_text(printed)  # what it prints, it takes
    assert run(["study", "--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("text", "said"),
    [("no-such = 1", "no-such"), ("top-p = [1, 'x']", "top-p"), ("= 1", "TOML"), ("seed = 'x'", "seed"),
     ("max-new-tokens = {a = 1}", "max-new-tokens")],
)  # fmt: skip
def test_a_wrong_config_file_is_named(capsys, tmp_path, text, said):
    file = tmp_path / "study.toml"
    file.write_text(text)
    assert said in fails(capsys, "study", "--config", file, "--print-config")
    assert "cannot be read" in fails(capsys, "study", "--config", tmp_path / "none.toml", "--print-config")


def test_a_roofline_is_that_of_a_server(capsys, tiny_folder, prompts, tmp_path):
    assert run(["trace", str(tiny_folder), "--prompts", str(prompts), "-o", str(tmp_path / "run"), "--device", "cpu",
                "--max-new-tokens", "8", "--quiet"]) == 0  # fmt: skip
    assert run(["choose", str(tmp_path / "run"), "--costs", "roofline", "--device", "h100", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)["costs"]
    assert (costs["dtype"], costs["context"], costs["device"]) == ("bfloat16", 1024, "h100")


@pytest.mark.second
def test_a_study_of_sampled_text_from_end_to_end(capsys, tiny_folder, prompts, tmp_path):
    words = ["study", tiny_folder, "-o", tmp_path / "study", "--prompts", prompts, "--max-new-tokens", 6,
             "--temperature", "0.8", "--exit-layers", "2,3", "--draft-lengths", "1,2", "--context", 16,
             "--batch-size", 2, "--export", tmp_path / "chosen", "--device", "cpu", "--json"]  # fmt: skip
    assert run(list(map(str, words))) == 0
    summary = json.loads(capsys.readouterr().out)
    [model] = summary["models"]
    assert model["choice"]["text"] == "sampled"
    assert model["choice"]["few_prompts"] is True
    assert model["choice"]["interval"] is None or model["choice"]["speculate"] is False
    assert {cell["exit_layer"] for cell in model["validation"]["cells"]} <= {2, 3}
    assert model["choice"]["costs"]["context"] == 16
    assert (tmp_path / "chosen" / model["name"] / "README.md").is_file()
    assert "From 2 prompts only" in model["sentence"]
    # `choose` of the study says what it chose
    assert run(["choose", str(tmp_path / "study")]) == 0
    assert model["sentence"].split(":")[0] in capsys.readouterr().out
    assert "one of its runs" in fails(capsys, "choose", tmp_path / "study", "--export", tmp_path / "x")
    drawn = ["figures", tmp_path / "study", "-o", tmp_path / "paper", "--only", "fig02", "--format", "svg", "--quiet"]
    assert run(list(map(str, drawn))) == 0  # sampled text has no single rounds; its tables are there all the same
    assert (tmp_path / "paper" / "fig02_agreement.svg").is_file()
    assert open_study(tmp_path / "study").table("rounds").empty
    # other settings are named; the same ones resume
    assert "sampling" in fails(capsys, *words[:-1], "--seed", "5")


def test_a_plan_says_what_it_takes_and_writes_nothing(capsys, tiny_folder, prompts, tmp_path):
    words = ["study", str(tiny_folder), "-o", str(tmp_path / "study"), "--prompts", str(prompts), "--plan",
             "--max-new-tokens", "8", "--draft-lengths", "1,2", "--context", "16", "--device", "cpu"]  # fmt: skip
    assert run([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    [model] = document["models"]
    assert model["prompts"] == 4
    assert model["tokens"] == 32
    assert min(model["memory_bytes"], model["memory_free"], model["disk_bytes"]) > 0
    assert document["total_s"] == pytest.approx(sum(model["seconds"].values()))
    assert document["total_s"] > 0
    assert run(words) == 0
    assert "about" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_says_which_drafts_better(capsys, sampled_run):
    assert run(["compare", str(sampled_run), str(sampled_run)]) == 0
    said = capsys.readouterr().out
    assert "no clear difference" in said
    assert "which factor" not in said
    assert "nan" not in said
