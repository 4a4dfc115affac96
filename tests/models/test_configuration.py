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
        ("rope_parameters", {"rope_type": "linear", "factor": 0}), ("rope_scaling", {"factor": float("inf")}),
        ("rope_theta", 1e308), ("rms_norm_eps", 1e308), ("sliding_window", 0), ("head_dim", 0),
        ("layer_types", ["sliding_attention"]), ("id2label", {str(label): "x" for label in range(10_001)}),
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


@pytest.mark.parametrize(("key", "value"), [("num_key_value_heads", 1), ("head_dim", 2**20)])
def test_weights_of_another_shape_are_named(tiny_folder, tmp_path, key, value):
    folder = tmp_path / "odd"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config[key] != value
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(
        InputError, match=r"does not fit its configuration: model\.layers\.0\.self_attn\.\w+\.weight is"
    ):
        load(folder)


def test_nothing_but_the_error_is_said(tiny_folder, tmp_path, capfd):
    folder = tmp_path / "odd"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_return_dict": False, "hidden_act": "none such"}))
    with pytest.raises(InputError):
        load(folder)
    assert capfd.readouterr() == ("", "")
