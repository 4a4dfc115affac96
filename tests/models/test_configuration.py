"""Configurations from strangers are refused in one line, before a model is built."""

from __future__ import annotations

import json
import shutil

import pytest

from probekit.errors import InputError
from probekit.models.loaded import load


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**6), ("num_hidden_layers", 5000), ("num_hidden_layers", 1.5), ("num_labels", 10**9),
        ("architectures", [5]), ("output_hidden_states", "x"), ("return_dict", 0), ("vocab_size", 2**40),
        ("rope_theta", 0), ("rope_theta", float("nan")), ("_attn_implementation", "strangers/kernel"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}), ("hidden_size", -1),
    ],
)  # fmt: skip
def test_a_configuration_out_of_bounds(tiny_folder, tmp_path, key, value):
    folder = tmp_path / "odd"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=r"config\.json") as error:
        load(folder)
    assert "\n" not in str(error.value)
