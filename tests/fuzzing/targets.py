"""Every reader of what comes from outside: a valid input, what may become of it, and all that is done with it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from fuzzing import mutate

from probekit.errors import ProbekitError
from probekit.files import sha256_of

GONE, PIPE, FOLDER, LINK = "gone", "pipe", "folder", "link"  # in place of a file's bytes
Changed = dict[str, Any]  # {file, named from the folder: its bytes, or one of these words}


@dataclass(frozen=True)
class Target:
    """A reader. change: what a mutated input is, above `base`; read: raises nothing but ProbekitError, whatever it is.

    kind: under which it is counted.
    """

    name: str
    kind: str
    change: Callable[[Random, Path], Changed]
    read: Callable[[Path], Any]
    base: str | None = None


TARGETS: dict[str, Target] = {}


def target(name: str, kind: str, base: str | None = None):
    """A function (random, base folder) -> changed files, with the reader that it was decorated with."""

    def add(reader: Callable[[Path], Any]):
        def with_change(change: Callable[[Random, Path], Changed]):
            TARGETS[name] = Target(name, kind, change, reader, base)
            return change

        return with_change

    return add


def lay_out(target: Target, changed: Mapping[str, Any], bases: Mapping[str, Path], place: Path) -> Path:
    """The input as files below an empty folder `place`: its base, with what changed."""
    if target.base is not None:
        shutil.copytree(bases[target.base], place, dirs_exist_ok=True, symlinks=True)
    for name, content in changed.items():
        path = place / name
        with suppress(FileNotFoundError):
            path.unlink()
        if content == PIPE:
            os.mkfifo(path)
        elif content == FOLDER:
            path.mkdir()
        elif content == LINK:
            path.symlink_to("/dev/zero")
        elif content != GONE:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return place


def odd_file(random: Random, content: bytes) -> Any:
    """A mutated file; seldom no file at all."""
    return random.choice([GONE, PIPE, FOLDER, LINK, b"", b"\0"]) if random.random() < 0.02 else content


def only(folder: Path) -> Path:
    """The one file of an input, there or not."""
    return next(folder.iterdir(), folder / "prompts.txt")


def read_all(attempts: list[Callable[[], Any]]) -> None:
    """Each of these, whatever those before it refused."""
    for attempt in attempts:
        with suppress(ProbekitError):
            attempt()


# ---------------------------------------------------------------------------------------------------------- bases
def make_bases(folder: Path) -> dict[str, Path]:
    """The valid folders that others are made of."""
    from models.test_loaded import write_gguf
    from traces.fabricate import fabricate

    from probekit.models.loaded import load
    from probekit.models.synthetic import synthetic
    from probekit.tracing.tracer import trace

    bases = {
        name: folder / name
        for name in ("model", "shards", "run", "sampled", "residuals", "gguf", "adapter", "heads", "study")
    }
    model = synthetic("tiny-draft", seed=3)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    for name, size in (("model", "1GB"), ("shards", "8KB")):
        model.model.save_pretrained(bases[name], max_shard_size=size)
        model.tokenizer.chat_template = template
        model.tokenizer.save_pretrained(bases[name])
    loaded = load(bases["model"], device="cpu")
    fabricate(depth=4, prompts=3, tokens=8, drafter=True, top=1).save(bases["run"])
    fabricate(depth=4, prompts=3, tokens=8, text="sampled").save(bases["sampled"])
    trace(loaded, ["abc", "de"], bases["residuals"], max_new_tokens=3, keep_residuals=[1])
    bases["gguf"].mkdir()
    small = synthetic("tiny-draft", seed=6, width=40, heads=4, key_value_heads=2, head_dim=10)
    write_gguf(small, bases["gguf"] / "small.gguf")
    _make_adapter(bases["adapter"], bases["model"])
    _make_heads(bases["heads"], loaded)
    _make_study(bases["study"])
    return bases


def _make_adapter(folder: Path, base: Path) -> None:
    import peft

    from probekit.models.loaded import load

    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    peft.get_peft_model(load(base, device="cpu").model, settings).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))


def _make_heads(folder: Path, loaded: Any) -> None:
    import torch

    from probekit.lens.exit_heads import ExitHead, save_heads

    folder.mkdir()
    width = loaded.anatomy.width
    save_heads(folder / "heads.safetensors", {1: ExitHead(torch.zeros(width, width), torch.zeros(width))})


def _make_study(folder: Path) -> None:
    from presentation.fabricate_study import fabricate_study

    fabricate_study(folder, ["one"], depth=4, prompts=4, tokens=6, draft_lengths=(1, 2))


# --------------------------------------------------------------------------------------------------------- prompts
RECORDS = [
    {"prompt": "Once upon a time", "kind": "tale", "response": "there was"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"turns": ["first", "second"], "category": "math"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "part"}]}]},
]


@cache
def tokenizer() -> Any:
    from probekit.models.synthetic import synthetic

    made = synthetic("tiny-draft", seed=3).tokenizer
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return made


@cache
def template(process: int) -> Any:
    """The template of that tokenizer; one for each process, for its answers come through a pipe."""
    from probekit.tracing.prompts import chat_template

    return chat_template(tokenizer())


def read_prompts(folder: Path) -> None:
    from probekit.tracing.prompt_store import PromptStore
    from probekit.tracing.prompts import encode, load_prompts, stream_prompts

    path = only(folder)
    for options in ({}, {"chat": True}, {"given": True}):
        with suppress(ProbekitError):
            list(stream_prompts(path, **options))
        with suppress(ProbekitError):
            prompts = load_prompts(path, **options)
            store = PromptStore()
            for prompt in prompts[:50]:
                with suppress(ProbekitError):
                    store.add(encode(prompt, tokenizer(), given="given" in options, template=template(os.getpid())))
            assert store.hash.startswith("sha256:")


@target("prompts.txt", "text")(read_prompts)
def _(random: Random, _: Path) -> Changed:
    return {"prompts.txt": odd_file(random, mutate.of_bytes(random, "Once upon\nThe kïng\n\nA dog 😀\n".encode()))}


@target("prompts.jsonl", "JSON")(read_prompts)
def _(random: Random, _: Path) -> Changed:
    lines = [json.dumps(record).encode() for record in random.sample(RECORDS, random.randrange(1, 4))]
    lines.append(mutate.of_json(random, random.choice(RECORDS)).replace(b"\n", b" "))
    return {"prompts.jsonl": odd_file(random, b"\n".join(lines))}


@target("prompts.json", "JSON")(read_prompts)
def _(random: Random, _: Path) -> Changed:
    records = [*random.sample(RECORDS, random.randrange(1, 4)), "Once"]
    return {"prompts.json": odd_file(random, mutate.of_json(random, records))}


@target("prompts.csv", "text")(read_prompts)
def _(random: Random, _: Path) -> Changed:
    text = 'prompt,kind,response\n"Once, upon",tale,"a ""time"""\nThe king,,x\n'
    return {"prompts.csv": odd_file(random, mutate.of_bytes(random, text.encode()))}


def prompts_table() -> pa.Table:
    frame = pd.DataFrame({"prompt": ["Once", "The king", "x"], "kind": ["a", None, "b"], "response": ["r", "s", None]})
    nested = pa.array([[{"role": "user", "content": "Hi"}], None, [{"role": "user", "content": "x"}]])
    return pa.Table.from_pandas(frame, preserve_index=False).append_column("messages", nested)


@target("prompts.parquet", "Parquet")(read_prompts)
def _(random: Random, _: Path) -> Changed:
    return {"prompts.parquet": odd_file(random, mutate.of_table(random, prompts_table()))}


@target("prompts.arrow", "Parquet")(read_prompts)
def _(random: Random, _: Path) -> Changed:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, prompts_table().schema) as stream:
        stream.write_table(prompts_table())
    return {"prompts.arrow": odd_file(random, mutate.of_bytes(random, sink.getvalue()))}


# -------------------------------------------------------------------------------------------------- runs and studies
def read_run(folder: Path) -> None:
    """All that is ever read of a run, its checksums made right where the manifest lists some."""
    from probekit.prediction.predict import predict
    from probekit.traces.trace import Trace
    from probekit.verification.verify import verify

    _make_sums_right(folder)
    with suppress(ProbekitError):
        verify(folder)
    with suppress(ProbekitError):
        trace = Trace.open(folder)
        read_all([
            lambda: [repr(trace), trace._repr_html_(), trace.near_tie_count()],
            lambda: [getattr(trace, name) for name in ("texts", "tokens", "layers", "top", "drafter", "draft_head")],
            lambda: [trace.text(prompt) + trace.continuation(prompt) + trace.ended(prompt) for prompt in trace.prompts],
            lambda: [(trace.agreement(prompt), trace.outputs(prompt),
            trace.prompt_ids(prompt)) for prompt in trace.prompts],
            lambda: predict(trace, [1, 2], [1, 3]).to_json(),
            lambda: predict(trace, [1], [2], drafter=True),
            lambda: trace.residuals(1).numpy(),
            lambda: trace.frequent_tokens(),
        ])  # fmt: skip


def _make_sums_right(folder: Path) -> None:
    path = folder / "manifest.json"
    with suppress(ValueError, OSError, AttributeError, TypeError, RecursionError):
        document = json.loads(path.read_text()) if path.is_file() else {}
        listed = document["files"] if isinstance(document.get("files"), dict) else {}
        right = {name: sha256_of(folder / name) for name in listed if (folder / name).is_file()}
        if right and right != listed:
            path.write_text(json.dumps(document | {"files": listed | right}))


@target("manifest", "JSON", "run")(read_run)
def _(random: Random, base: Path) -> Changed:
    document = json.loads((base / "manifest.json").read_text())
    return {"manifest.json": odd_file(random, mutate.of_json(random, document))}


@target("parts", "Parquet", "run")(read_run)
def _(random: Random, base: Path) -> Changed:
    return _part(random, base)


@target("sampled parts", "Parquet", "sampled")(read_run)
def _(random: Random, base: Path) -> Changed:
    return _part(random, base)


def _part(random: Random, base: Path) -> Changed:
    path = random.choice(sorted(base.glob("*.parquet")))
    return {path.name: odd_file(random, mutate.of_table(random, pq.read_table(path)))}


@target("residuals", "safetensors", "residuals")(read_run)
def _(random: Random, base: Path) -> Changed:
    path = base / "residuals-00000.safetensors"
    return {path.name: odd_file(random, of_safetensors(random, path.read_bytes()))}


def of_safetensors(random: Random, content: bytes) -> bytes:
    """Its header's JSON, its length, or any bytes."""
    size = int.from_bytes(content[:8], "little")
    if random.random() < 0.6:
        header = mutate.of_json(random, json.loads(content[8 : 8 + size]))
        length = len(header) if random.random() < 0.9 else random.choice([0, 2**20, 2**62])
        return length.to_bytes(8, "little") + header + content[8 + size :]
    return mutate.of_bytes(random, content)


def read_study(folder: Path) -> None:
    from probekit.presentation.report import write_report
    from probekit.presentation.study_folder import TABLES, open_study
    from probekit.verification.verify import verify

    read_all([
        lambda: verify(folder),
        lambda: write_report(folder),
        lambda: [(study := open_study(folder, keys=("choice",))).table(name) for name in TABLES] and study.models,
    ])  # fmt: skip


@target("study", "JSON", "study")(read_study)
def _(random: Random, base: Path) -> Changed:
    path = base / "summary.json"
    return {path.name: odd_file(random, mutate.of_json(random, json.loads(path.read_text())))}


@target("study tables", "text", "study")(read_study)
def _(random: Random, base: Path) -> Changed:
    path = random.choice(sorted((base / "tables").glob("*.csv")))
    return {f"tables/{path.name}": odd_file(random, mutate.of_bytes(random, path.read_bytes()))}


def read_kept(folder: Path) -> None:
    from probekit.kept import Kept

    Kept(folder, "digest").once("costs", dict)


@target("kept phases", "JSON")(read_kept)
def _(random: Random, _: Path) -> Changed:
    document = {"digest": "digest", "sha256": sha256(b'{"a": 1}').hexdigest(), "made": {"a": 1}}
    return {"costs.json": odd_file(random, mutate.of_json(random, document))}


def read_kept_costs(folder: Path) -> None:
    from probekit.costs.profile import Costs
    from probekit.foreign.json import read_object

    costs = Costs.from_json(read_object(only(folder)))
    read_all([costs.to_json, costs.to_pandas, costs._repr_html_, lambda: repr(costs)])


@cache
def some_costs() -> Any:
    from presentation.fabricate_study import fabricate_costs

    return fabricate_costs(4, 3, True).to_json()


@target("costs", "JSON")(read_kept_costs)
def _(random: Random, _: Path) -> Changed:
    return {"costs.json": odd_file(random, mutate.of_json(random, some_costs()))}


def read_list(folder: Path) -> None:
    from probekit.checksums import read_sums
    from probekit.verification.verify import verify

    read_all([lambda: read_sums(folder), lambda: verify(folder)])


@target("checksums", "text")(read_list)
def _(random: Random, _: Path) -> Changed:
    text = f"{'0' * 64}  choice.json\n\\{'1' * 64}  odd\\nname\n"
    return {"SHA256SUMS": odd_file(random, mutate.of_bytes(random, text.encode())), "choice.json": b"{}"}


# ------------------------------------------------------------------------------------------------ costs and drafters
def read_costs(folder: Path) -> None:
    from probekit.costs.engine_profile import read_profile

    path = only(folder)
    profile = read_profile(path)
    profile.to_json()
    for rows, context in ((1, None), (4, 128), (1, 10**6)):
        with suppress(ProbekitError):
            profile.costs(4, rows=rows, context=context).to_json()


STEPS = [
    {"step": "autoregressive", "seconds": 0.01, "context": 128},
    {"step": "draft", "seconds": 0.002, "exit_layer": 2, "context": 128},
    {"step": "verify", "seconds": 0.011, "tokens": 4, "context": 128},
]


@target("profile.json", "JSON")(read_costs)
def _(random: Random, _: Path) -> Changed:
    document = {"schema": "probekit/cost-profile/1", "engine": "e", "device": "d", "dtype": "float16", "steps": STEPS}
    return {"profile.json": odd_file(random, mutate.of_json(random, document))}


@target("profile.csv", "text")(read_costs)
def _(random: Random, _: Path) -> Changed:
    text = pd.DataFrame(STEPS).astype({"exit_layer": "Int64", "tokens": "Int64"}).to_csv(index=False)
    return {"profile.csv": odd_file(random, mutate.of_bytes(random, text.encode()))}


@cache
def a_trace(text: str) -> Any:
    from traces.fabricate import fabricate

    return fabricate(depth=4, prompts=3, tokens=8, text=text, seed=5)


def read_drafter(folder: Path) -> None:
    from probekit.drafting.imported import import_drafter
    from probekit.prediction.predict import predict

    path = only(folder)
    for text in ("greedy", "sampled"):
        with suppress(ProbekitError):
            drafter = import_drafter(path, a_trace(text))
            predict(a_trace(text), drafters=[drafter], draft_lengths=[2])


@target("drafter.parquet", "Parquet")(read_drafter)
def _(random: Random, _: Path) -> Changed:
    rows = [
        {"prompt": prompt, "output": output, "token": int(token), "depth": 0, "text_id": int(token), "q": 0.5}
        for prompt in a_trace("greedy").prompts for output, token in enumerate(a_trace("greedy").outputs(prompt))
    ]  # fmt: skip
    table = pa.Table.from_pandas(pd.DataFrame(rows), preserve_index=False)
    return {"drafter.parquet": odd_file(random, mutate.of_table(random, table))}


def read_engine_log(folder: Path) -> None:
    from probekit.tracing.prompts import load_log

    path = only(folder)
    load_log(path)


LOGS = [
    {"prompt_token_ids": [1, 5], "token_ids": [7, 2], "kind": "x"},
    {"prompt": "abc", "choices": [{"token_ids": [1, 2], "logprobs": {"content": [{"token_id": 3}]}}]},
    {
        "input_ids": [1],
        "meta_info": {"output_token_logprobs": [[-0.1, 3], [-0.2, 4]], "input_token_logprobs": [[0, 1]]},
    },
    {"prompt": [1, 2], "completion_probabilities": [{"id": 3}], "tokens": []},
    {"prompt_token_ids": [3], "outputs": [{"token_ids": [1]}, {"output_ids": [2]}]},
]


@target("log.json", "JSON")(read_engine_log)
def _(random: Random, _: Path) -> Changed:
    return {"log.json": odd_file(random, mutate.of_json(random, random.sample(LOGS, random.randrange(1, 4))))}


@target("log.jsonl", "JSON")(read_engine_log)
def _(random: Random, _: Path) -> Changed:
    lines = [json.dumps(random.choice(LOGS)).encode(), mutate.of_json(random, random.choice(LOGS)).replace(b"\n", b" ")]
    return {"log.jsonl": odd_file(random, b"\n".join(lines))}


def read_settings(folder: Path) -> None:
    """`--config FILE` of a study; `--print-config` stops before any work."""
    from contextlib import redirect_stdout

    from fuzzing.lines import printed_faults

    from probekit.cli.app import run

    path = only(folder)
    with redirect_stdout(io.StringIO()), printed_faults():
        run(["study", "--config", str(path), "--print-config"])


@target("study.toml", "text")(read_settings)
def _(random: Random, _: Path) -> Changed:
    text = 'max-new-tokens = 8\ndraft-lengths = [1, 2]\nmodels = ["tales-tied"]\ntemperature = 0.5\nchat = true\n'
    return {"study.toml": odd_file(random, mutate.of_bytes(random, text.encode()))}


def read_heads(folder: Path) -> None:
    from probekit.lens.exit_heads import load_heads

    load_heads(folder / "heads.safetensors", a_model().anatomy)


@cache
def a_model() -> Any:
    from probekit.models.synthetic import synthetic

    return synthetic("tiny-draft", seed=3)


@target("exit heads", "safetensors", "heads")(read_heads)
def _(random: Random, base: Path) -> Changed:
    path = base / "heads.safetensors"
    return {path.name: odd_file(random, of_safetensors(random, path.read_bytes()))}


# ---------------------------------------------------------------------------------------------------------- models
def read_model(folder: Path) -> None:
    """Load it, describe it, put messages through its template, write four tokens."""
    import probekit
    from probekit.models.loaded import describe, load
    from probekit.tracing.prompts import as_prompts, encode

    loaded = load(folder, device="cpu", cache=False)
    describe(loaded)
    read_all([
        lambda: encode(as_prompts([[{"role": "user", "content": "abc"}]])[0], loaded.tokenizer),
        lambda: probekit.decode(loaded, "ab", max_new_tokens=4),
        lambda: loaded.remark,
    ])  # fmt: skip


MODEL_FILES = (
    "config.json",
    "config.json",
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)


@target("model folders", "model folders", "model")(read_model)
def _(random: Random, base: Path) -> Changed:
    name = random.choice([*MODEL_FILES, "model.safetensors", "chat_template.jinja"])
    if name == "model.safetensors":
        return {name: odd_file(random, of_safetensors(random, (base / name).read_bytes()))}
    if name == "chat_template.jinja":
        return {name: odd_file(random, random.choice(TEMPLATES))}
    document = json.loads((base / name).read_text()) if (base / name).is_file() else {}
    return {name: odd_file(random, mutate.of_json(random, document))}


TEMPLATES = [
    b"{% for i in range(10000000000) %}{% endfor %}",
    b"{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    b"{{ ''.__class__.__mro__[1].__subclasses__() }}", b"{{ 'a' * 10000000000 }}", b"{{ 10 ** 10 ** 8 }}",
    b"{% include '/etc/passwd' %}",
    b"{{ messages }}", b"\xff\xfe", b"{% raw %}", b"{{ raise_exception('\x1b[31mred') }}",
    b"{% set x = [0] %}{{ x * 1000000000 }}",
    b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", b"{{ '%99999999999d' % 1 }}",
    b"{{ '{:>99999999999}'.format(1) }}",
    b"{{ 'a'|center(9999999999) }}", b"{{ range(1000000000)|list|length }}", b"{{ lipsum(n=10000000) }}",
    b"{{ '\\ud800' }}",
]  # fmt: skip


@target("sharded folders", "model folders", "shards")(read_model)
def _(random: Random, base: Path) -> Changed:
    path = base / "model.safetensors.index.json"
    return {path.name: odd_file(random, mutate.of_json(random, json.loads(path.read_text())))}


def read_adapter(folder: Path) -> None:
    from probekit.models.loaded import load

    load(folder, device="cpu")


@target("adapters", "adapters", "adapter")(read_adapter)
def _(random: Random, base: Path) -> Changed:
    if random.random() < 0.4:
        path = base / "adapter_model.safetensors"
        return {path.name: odd_file(random, of_safetensors(random, path.read_bytes()))}
    path = base / "adapter_config.json"
    return {path.name: odd_file(random, mutate.of_json(random, json.loads(path.read_text())))}


def read_gguf_header(folder: Path) -> None:
    from probekit.models.reference import find_checkpoint

    find_checkpoint(folder / "small.gguf")


@target("GGUF headers", "GGUF", "gguf")(read_gguf_header)
def _(random: Random, base: Path) -> Changed:
    return {"small.gguf": odd_file(random, of_gguf(random, (base / "small.gguf").read_bytes()))}


def of_gguf(random: Random, content: bytes) -> bytes:
    """Mostly the header: everything before the tensors' numbers."""
    cut = content.find(b"blk.0.") + 3000
    return mutate.of_bytes(random, content[:cut]) + content[cut:]


def read_gguf_file(folder: Path) -> None:
    from probekit.models.loaded import load

    load(folder / "small.gguf", device="cpu", cache=False)


@target("GGUF files", "GGUF", "gguf")(read_gguf_file)
def _(random: Random, base: Path) -> Changed:
    return {"small.gguf": of_gguf(random, (base / "small.gguf").read_bytes())}
