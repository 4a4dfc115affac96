"""`--cache`: where a command keeps what it dequantised, and the one line where it cannot."""

from __future__ import annotations

import pytest
from models.test_loaded import write_gguf

from probekit.cli.app import run
from probekit.models.gguf_copies import cache_folder
from probekit.models.synthetic import synthetic


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    loaded = synthetic("tiny", seed=6, width=40, heads=4, key_value_heads=2, head_dim=10)
    return write_gguf(loaded, tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def test_a_folder_or_none(path, tmp_path, capsys):
    assert run(["inspect", str(path), "--device", "cpu", "--cache", str(tmp_path / "here")]) == 0
    assert len(list((tmp_path / "here" / "gguf").iterdir())) == 1
    assert run(["inspect", str(path), "--device", "cpu", "--cache", "none"]) == 0
    assert not (tmp_path / "xdg").exists()
    assert run(["lens", str(path), "once", "--max-new-tokens", "1", "--device", "cpu", "--quiet"]) == 0
    assert len(list((tmp_path / "xdg" / "probekit" / "gguf").iterdir())) == 1
    assert cache_folder(None) == tmp_path / "xdg" / "probekit", "the option is a command's, not the process's"
    assert "remark" not in capsys.readouterr().err


def test_one_remark_where_it_cannot_be_written(path, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    words = ["inspect", str(path), "--device", "cpu", "--cache", str(tmp_path / "taken")]
    assert run(words) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("no dequantised copy of small was kept") == 1
    assert said.startswith("remark: ")
    assert run([*words, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["predict", "compare", "models", "report"])
def test_commands_that_load_no_model_have_no_such_option(command, capsys):
    assert run([command, "--cache", "none"]) == 2
    assert "--cache" in capsys.readouterr().err
