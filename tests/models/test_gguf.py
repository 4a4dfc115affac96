"""GGUF: what the header tells before a tensor is read, hostile headers, and dequantised copies."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import struct
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from models.test_loaded import logits, write_gguf
from transformers import Gemma2Config, Gemma3TextConfig, Phi3Config

from probekit.errors import InputError, Remark
from probekit.models import gguf as gguf_room
from probekit.models import gguf_copies
from probekit.models.gguf import readable_architectures
from probekit.models.gguf_copies import cache_folder
from probekit.models.gguf_header import read_header
from probekit.models.loaded import load
from probekit.models.synthetic import synthetic


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model and its GGUF file."""
    loaded = synthetic("tiny", seed=6, width=40, heads=4, key_value_heads=2, head_dim=10)
    return loaded, write_gguf(loaded, tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture
def never_reads(monkeypatch):
    """From now on it is an error to read a GGUF file's tensors."""

    def refuse(*_):
        raise AssertionError("the tensors were read")

    monkeypatch.setattr(gguf_room, "_from_file", refuse)


# ------------------------------------------------------------------------------------------------ the header
def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def written(path: Path, *entries: bytes, tensors: bytes = b"", count: int = 0, version: int = 3, **more) -> Path:
    """A GGUF file of these key-value entries."""
    head = struct.pack("<IQQ", version, count, more.get("values", len(entries)))
    path.write_bytes(b"GGUF" + head + b"".join(entries) + tensors)
    return path


def string(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", 8) + text(value)


def array(key: str, kind: int, count: int, data: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, count) + data


LLAMA = string("general.architecture", "llama")


def test_a_header_is_what_was_written(small):
    loaded, path = small
    header = read_header(path)
    assert header.architecture == "llama"
    assert header.setting("block_count") == loaded.depth
    assert header.setting("rope.freq_base") == pytest.approx(10_000.0)
    assert header.counts["tokenizer.ggml.tokens"] == loaded.anatomy.vocabulary
    embedding = header.tensors["token_embd.weight"]
    assert embedding.shape == (40, loaded.anatomy.vocabulary)
    found = torch.from_numpy(header.numbers("token_embd.weight")).reshape(embedding.shape[::-1])
    assert torch.equal(found, loaded.anatomy.embedding.weight)


@pytest.mark.parametrize(
    "entries",
    [
        [LLAMA, array("tokenizer.ggml.tokens", 8, 2**40)],
        [LLAMA, array("tokenizer.ggml.scores", 6, 2**40)],
        [LLAMA, array("nested", 9, 2**40)],
        [LLAMA, array("strings", 8, 1, struct.pack("<Q", 2**62))],
        [text("general.architecture") + struct.pack("<I", 8) + struct.pack("<Q", 2**63)],
        [LLAMA, text("odd") + struct.pack("<I", 77) + b"\0" * 8],
        [LLAMA, text("general.alignment") + struct.pack("<II", 4, 0)],
        [string("general.architecture", "llama")[:-2]],
        [text("general.architecture") + struct.pack("<I", 8) + struct.pack("<Q", 2) + b"\xff\xfe"],
    ],
)
def test_a_hostile_header_is_refused_without_memory(tmp_path, entries):
    import tracemalloc

    path = written(tmp_path / "hostile.gguf", *entries)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"hostile\.gguf cannot be read as GGUF: its header is damaged"):
            load(path, cache=False)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_counts_that_the_file_cannot_hold(tmp_path):
    with pytest.raises(InputError, match="its header is damaged"):
        read_header(written(tmp_path / "values.gguf", LLAMA, values=2**60))
    with pytest.raises(InputError, match="its header is damaged"):
        read_header(written(tmp_path / "tensors.gguf", LLAMA, count=2**60))
    tensor = text("token_embd.weight") + struct.pack("<IQIQ", 1, 2**40, 0, 0)
    with pytest.raises(InputError, match=r"is cut short: its tensors reach to byte 4,398,"):
        read_header(written(tmp_path / "big.gguf", LLAMA, tensors=tensor, count=1))
    tensor = text("token_embd.weight") + struct.pack("<IQIQ", 1, 32, 999, 0)
    with pytest.raises(InputError, match=r"in the quantisation 999, which the gguf package does not know"):
        read_header(written(tmp_path / "odd.gguf", LLAMA, tensors=tensor, count=1))
    with pytest.raises(InputError, match=r"a GGUF file of version 1; versions 2 and 3"):
        read_header(written(tmp_path / "old.gguf", LLAMA, version=1))
    with pytest.raises(InputError, match=r"a GGUF file of the other byte order"):
        read_header(written(tmp_path / "big-endian.gguf", LLAMA, version=3 << 24))
    with pytest.raises(InputError, match="names no architecture"):
        read_header(written(tmp_path / "nameless.gguf", string("general.name", "x")))


def test_a_cut_file_is_refused_from_its_header(small, tmp_path, never_reads):
    path = tmp_path / "cut.gguf"
    path.write_bytes(small[1].read_bytes()[:-4096])
    with pytest.raises(InputError, match=r"cut\.gguf is cut short: its tensors reach to byte"):
        load(path)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([string("general.architecture", "rwkv7")], "'rwkv7' model"),
        ([string("general.architecture", "olmo2")], r"architecture 'olmo2', which transformers .* does not read"),
        ([string("general.architecture", "command-r")], r"architecture 'command-r', which transformers"),
        ([LLAMA, string("general.type", "adapter")], "kind 'adapter', not a model"),
        ([LLAMA, text("llama.expert_count") + struct.pack("<II", 4, 8)], "a mixture of 8 experts"),
        ([string("general.architecture", "gemma3"), string("gemma3.rope.scaling.type", "linear")], r"rotary .*linear"),
        ([LLAMA], "holds no tokenizer"),
        ([LLAMA, array("tokenizer.ggml.tokens", 8, 0)], "holds no embedding"),
    ],
)
def test_what_is_not_read_is_refused_from_the_header(tmp_path, never_reads, entries, says):
    with pytest.raises(InputError, match=says):
        load(written(tmp_path / "model.gguf", *entries))


def test_readable_architectures():
    assert {"llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"} <= readable_architectures()
    assert not {"general", "tokenizer", "olmo2", "granite", "command-r", "smollm3"} & readable_architectures()


# ------------------------------------------------------------------------------------------------ copies
def test_a_second_load_reads_the_copy(small, tmp_path, monkeypatch):
    loaded, path = small
    first = load(path, cache=tmp_path)
    monkeypatch.setattr(gguf_room, "_from_file", None)
    second = load(path, cache=tmp_path)
    assert torch.equal(logits(second), logits(loaded))
    assert second.weights_hash == first.weights_hash
    assert (second.name, second.path, second.reference) == (first.name, first.path, first.reference)
    assert second.eos_ids == first.eos_ids
    assert second.tokenizer("hello world").input_ids == first.tokenizer("hello world").input_ids
    assert second.model.config.to_dict().keys() == first.model.config.to_dict().keys()
    assert not list(tmp_path.glob("gguf/partial-*"))


def test_a_copy_belongs_to_one_file_one_dtype_and_one_transformers(small, tmp_path, monkeypatch):
    loaded, path = small
    load(path, cache=tmp_path)
    assert load(path, dtype="bfloat16", cache=tmp_path).dtype == torch.bfloat16
    other = synthetic("tiny", seed=7, width=40, heads=4, key_value_heads=2, head_dim=10)
    changed = shutil.copy(path, tmp_path / "small.gguf")
    assert torch.equal(logits(load(changed, cache=tmp_path)), logits(loaded))  # the same bytes by another name
    assert len(list((tmp_path / "gguf").iterdir())) == 2
    write_gguf(other, Path(changed))
    assert torch.equal(logits(load(changed, cache=tmp_path)), logits(other))
    monkeypatch.setattr(gguf_copies, "version", lambda _: "0.0")
    load(path, cache=tmp_path)
    assert len(list((tmp_path / "gguf").iterdir())) == 4


def test_frequency_divisors_come_with_the_copy(small, tmp_path):
    divisors = {"rope_freqs.weight": torch.tensor([1.0, 1.0, 2.0, 8.0, 32.0])}
    path = write_gguf(small[0], tmp_path / "long.gguf", extra=divisors)
    first, second = load(path, cache=tmp_path), load(path, cache=tmp_path)
    assert torch.equal(first.model.model.rotary_emb.inv_freq, second.model.model.rotary_emb.inv_freq)
    assert torch.equal(logits(first), logits(second))
    assert not torch.allclose(logits(first), logits(small[0]))


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "record", "file"])
def test_a_damaged_copy_is_made_again(small, tmp_path, damage):
    loaded, path = small
    load(path, cache=tmp_path)
    (folder,) = (tmp_path / "gguf").iterdir()
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "cut":
        weights.write_bytes(content[:-7])
    elif damage == "lose":
        weights.unlink()
    elif damage == "record":
        (folder / "copy.json").write_text("[")
    else:
        shutil.rmtree(folder)
        folder.write_text("not a folder")
    assert torch.equal(logits(load(path, cache=tmp_path)), logits(loaded))
    assert list((tmp_path / "gguf").iterdir()) == [folder]
    assert gguf_copies._checksum(weights) == json.loads((folder / "copy.json").read_text())["files"][weights.name]


def test_no_copy_is_kept_when_none_is_wanted(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(small[1], cache=False)
    assert not (tmp_path / "xdg").exists()
    load(small[1])
    assert len(list((tmp_path / "xdg" / "probekit" / "gguf").iterdir())) == 1


def test_where_copies_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == cache_folder(True) == tmp_path / ".cache" / "probekit"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder(None) == tmp_path / ".cache" / "probekit"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(None) == Path("/somewhere/probekit")
    assert cache_folder("~/here") == tmp_path / "here"
    assert cache_folder(False) is None


def full_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(gguf_copies.shutil, "disk_usage", lambda _: usage(10, 10, 1000))


def failing_write(monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_copies, "_write_tokenizer", fail)


def other_tokenizer(monkeypatch):
    monkeypatch.setattr(gguf_copies, "_write_tokenizer", lambda *_: False)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (full_disk, r"has 0 MB left, and it needs"),
        (failing_write, r"cannot be written: No space left on device"),
        (other_tokenizer, "its tokenizer would not come back the same"),
    ],
)
def test_without_room_the_model_is_loaded_with_one_remark(small, tmp_path, monkeypatch, spoil, says):
    loaded, path = small
    spoil(monkeypatch)
    with pytest.warns(Remark, match=says) as remarks:
        assert torch.equal(logits(load(path, cache=tmp_path)), logits(loaded))
    assert len(remarks) == 1
    assert not list((tmp_path / "gguf").iterdir())


def test_a_folder_that_is_a_file(small, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.warns(Remark, match=r"taken.* cannot be written"):
        load(small[1], cache=tmp_path / "taken")


def test_what_a_killed_process_left_goes_after_a_day(small, tmp_path):
    import os

    for name, age in (("partial-old", 2 * 86_400), ("partial-new", 60)):
        (tmp_path / "gguf" / name).mkdir(parents=True)
        then = (tmp_path / "gguf" / name).stat().st_mtime - age
        os.utime(tmp_path / "gguf" / name, (then, then))
    load(small[1], cache=tmp_path)
    assert [path.name for path in (tmp_path / "gguf").glob("partial-*")] == ["partial-new"]


def load_in_process(path, cache, start, results):
    start.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results.put(load(path, cache=cache).weights_hash)


@pytest.mark.second
def test_two_processes_at_once(small, tmp_path):
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    work = [context.Process(target=load_in_process, args=(small[1], tmp_path, start, results)) for _ in range(2)]
    for process in work:
        process.start()
    start.set()
    hashes = {results.get(timeout=120) for _ in work}
    for process in work:
        process.join(60)
        assert process.exitcode == 0
    assert len(hashes) == 1
    assert [path.name for path in (tmp_path / "gguf").iterdir() if path.name.startswith("partial-")] == []
    assert torch.equal(logits(load(small[1], cache=tmp_path)), logits(small[0]))


# ---------------------------------------------------------------------------------- what transformers leaves out
def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


def test_a_window_that_only_the_file_knows(tmp_path):
    """Phi-3's: transformers reads the other settings of its GGUF files, and not this one."""
    phi = [string("general.architecture", "phi3"), number("phi3.block_count", 2)]
    windowed = written(tmp_path / "windowed.gguf", *phi, number("phi3.attention.sliding_window", 2047))
    whole = written(tmp_path / "whole.gguf", *phi)
    for path, window in ((windowed, 2047), (whole, None)):
        config = Phi3Config(num_hidden_layers=2, sliding_window=None, pad_token_id=0)
        gguf_room._complete(config, read_header(path))
        assert config.sliding_window == window


@pytest.mark.parametrize(
    ("architecture", "layers", "heads", "scale"),
    [("gemma2", 46, 32, 144), ("gemma3", 62, 32, 168), ("gemma2", 42, 16, 256), ("gemma3", 34, 8, 256)],
)
def test_the_scale_of_the_largest_gemmas(tmp_path, architecture, layers, heads, scale):
    """The published config.json of 27B: 144 (Gemma 2) and 168 (Gemma 3), and 256 in the smaller ones."""
    config_of = {"gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}[architecture]
    width = {144: 4608, 168: 5376}.get(scale, 2560)
    config = config_of(num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads)
    entries = [string("general.architecture", architecture), number(f"{architecture}.attention.key_length", 128)]
    gguf_room._complete(config, read_header(written(tmp_path / "gemma.gguf", *entries)))
    assert (config.query_pre_attn_scalar, config.head_dim) == (scale, 128)
