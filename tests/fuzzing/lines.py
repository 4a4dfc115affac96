"""Command lines made of real and hostile options, run in this process."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

WORDS = [
    "", " ", "0", "1", "2", "3", "-1", "1-3", "3-1", "1,2", "1-", "-", "1-99999999999999", "9223372036854775807",
    "1e9", "nan", "inf",
    "-inf", "0.5", "1.5", "all", "agreement", "exit", "model", "suffix", "ngram:2", "ngram:0", "ngram:-1",
    "ngram:999999999999",
    "tree:2x1", "tree:0x0", "tree:9999x9999", "imported:none", "fixed", "confidence:0.5", "confidence:9", "os.system",
    "json.JSONDecoder",
    "no.such", "measured", "roofline", "h100", "cpu", "cuda", "cuda:99", "evil", "float32", "float8", "hooks",
    "nnsight", "prefill",
    "draft", "vllm", "residual", "mlp:1", "attention:0", "residual:99", "self-speculative", "speculative",
    "autoregressive",
    "early-exit", "svg", "pdf", "transformers", "\x1b[31mred", "\udcff", "\ud800", "a\0b", "x" * 5000, "😀",
    "\u202eabc", "%s", "{}", "'; rm x",
    "--", "-o", "--json", "@", "~", "~nobody/x", "/dev/full", "/dev/stdin", "/proc/self/mem", "../..", ".",
    "/etc/passwd/x", "n" * 300,
]  # fmt: skip


@contextmanager
def printed_faults() -> Iterator[None]:
    """A line that `run` would call a fault of our own, or the system's, is raised here as what it is."""
    from probekit.cli import app

    def raised(line: Any, problem: str, hint: str, status: int, before=app._fail) -> int:
        if problem.startswith("this is a fault of probekit's own"):
            raise
        return before(line, problem, hint, status)

    def of_the_system(error: OSError) -> str:
        raise error

    kept = app._fail, app._of_the_system
    app._fail, app._of_the_system = raised, of_the_system
    try:
        yield
    finally:
        app._fail, app._of_the_system = kept


def places(bases: Mapping[str, Path]) -> dict[str, list[str]]:
    """Words that name something that is there, by what it is."""
    files = bases["files"]
    return {
        "model": [str(bases[name]) for name in ("model", "model", "model", "shards",
        "adapter")] + [str(bases["gguf"] / "small.gguf")],
        "run": [str(bases[name]) for name in ("residuals", "residuals", "run", "sampled", "study")],
        "study": [str(bases["study"])],
        "prompts": [str(files / name) for name in ("prompts.txt", "prompts.jsonl", "prompts.csv", "log.json")],
        "any": [str(path) for path in sorted(files.iterdir())] + [str(bases["heads"] / "heads.safetensors"), "new",
        "out.json", "none"],
    }  # fmt: skip


def make_files(folder: Path) -> None:
    folder.mkdir()
    (folder / "prompts.txt").write_text("abc\nde\nf\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "abc", "response": "de"}\n{"prompt": "x", "response": "yz"}\n')
    (folder / "prompts.csv").write_text("prompt,kind\nabc,a\nde,b\n")
    (folder / "log.json").write_text('[{"prompt_token_ids": [1, 5], "token_ids": [7, 2]}]')
    (folder / "profile.csv").write_text("step,exit_layer,tokens,rows,context,seconds\nautoregressive,,1,1,8,0.01\n"
                                        "draft,1,1,1,8,0.002\nverify,,4,1,8,0.011\n")  # fmt: skip
    (folder / "empty.txt").write_text("")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("/dev/null")


def make_line(random: Random, there: Mapping[str, list[str]]) -> list[str]:
    """A command with some of its arguments and options."""
    import typer

    from probekit.cli.app import app

    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name = random.choice([*commands, "lens", "trace", "predict", "choose", "rank", "decode", "validate"])
    parameters = commands[name].params
    words = [name]
    for each in parameters:
        option = each.param_type_name == "option"
        if option and not each.required and random.random() > 2.5 / len(parameters):
            continue
        if random.random() < 0.03:
            continue
        if option:
            words.append(random.choice(each.opts))
            if getattr(each, "is_flag", False):
                continue
        words.append(_value(random, each, there))
    if name in ("study", "fit-heads") and random.random() < 0.9:  # which would work for long: a word that none takes
        words += ["--max-new-tokens", random.choice(["0", "-1", "x", "nan"])] if name == "study" else ["--seed", "x"]
    elif name in ("trace", "decode", "lens") and random.random() < 0.6:
        words += ["--max-new-tokens", random.choice(["1", "3", "8"])]
    if random.random() < 0.1:
        words.insert(random.randrange(len(words) + 1), random.choice(WORDS))
    return [word.replace("\0", "\\0") for word in words]  # which no command line can hold


def _value(random: Random, parameter: Any, there: Mapping[str, list[str]]) -> str:
    names = {"model": "model", "models": "model", "draft_model": "model", "run": "run", "runs": "run",
    "folder": "study",
             "study": "study", "prompts": "prompts", "from_logprobs": "prompts", "draft_vocabulary": "run",
             "adapter": "model"}  # fmt: skip
    if parameter.name in names and random.random() < 0.85:
        return random.choice(there[names[parameter.name]])
    if parameter.name == "output" and random.random() < 0.8:
        return random.choice(["new", "out.json", "heads.safetensors"])
    if parameter.type_descriptor.annotation in (int, float):
        return random.choice([str(random.choice([0, 1, 1, 2, 2, 3, 4, 8])), random.choice(WORDS)])
    if random.random() < 0.3:
        return random.choice(there["any"])
    return random.choice(WORDS)


CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def run_line(words: list[str]) -> int:
    """Run it: raises what is no ProbekitError, and AssertionError for output that steers a terminal or is no JSON."""
    from probekit.cli import terminal
    from probekit.cli.app import run

    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors), printed_faults():
        terminal.out.file, terminal.err.file = output, errors
        try:
            status = run(words)
        finally:
            terminal.out.file = terminal.err.file = None
    said, told = output.getvalue(), errors.getvalue()
    steers = CONTROL.search(said + told)
    assert steers is None, f"raw {steers[0]!r} in what {words} prints"
    assert status in (0, 1, 2), f"status {status}"
    assert "Traceback" not in told or {"--debug", "-v"} & set(words), told
    if (
        _asks_for_json(words)
        and status == 0
        and said
        and not {"--help", "-h", "--version", "--print-config"} & set(words)
    ):
        json.loads(said)
    if status == 2 and not {"--json", "--debug", "-v", "--quiet"} & set(words):
        lines = [line for line in told.splitlines() if line.startswith("probekit")]
        assert len(lines) == 1, f"{len(lines)} lines for one fault: {told!r}"
    return status


def _asks_for_json(words: list[str]) -> bool:
    """Not where it is another option's value: a file may be called so."""
    switches = ("--quiet", "--debug", "-v", "--given", "--chat", "--resume", "--rounds", "--raw", "--ways")
    pairs = zip(["", *words], words, strict=False)
    return any(word == "--json" and (not before.startswith("-") or before in switches) for before, word in pairs)
