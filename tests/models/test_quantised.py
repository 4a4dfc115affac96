"""Quantised checkpoints: read by transformers' own integrations where these run, refused by name where they do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import probekit
from probekit.cli.app import run as run_line
from probekit.costs.roofline import Dimensions, roofline_costs
from probekit.decoding.autoregressive import Autoregressive
from probekit.decoding.speculative import SelfSpeculative
from probekit.errors import InputError
from probekit.models.loaded import load
from probekit.models.quantised import check_runs, quantised_by
from probekit.models.states import is_quantised
from probekit.models.weight_files import BUNDLED

PROMPT = "Once upon a time there was a king"
NEW = 12
CONFIGS = {
    "int8": ("Int8WeightOnlyConfig", {}),
    "int4": ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4}),
    "float8": ("Float8WeightOnlyConfig", {}),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request, tmp_path_factory) -> Path:
    """A bundled model, quantised by torchao through transformers, and saved."""
    library = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    name, settings = CONFIGS[request.param]
    config = TorchAoConfig(getattr(library, name)(**settings))
    made = tmp_path_factory.mktemp("quantised") / request.param
    base = BUNDLED / "tales-draft"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(base).save_pretrained(made)
    return made


def test_tokens_and_rounds_are_the_models_own(folder):
    loaded = load(folder, device="cpu")
    assert is_quantised(loaded.model.model.layers)
    ids = loaded.tokenizer(PROMPT)["input_ids"]
    whole = loaded.model.generate(input_ids=torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
    expected = whole[0, len(ids) :].tolist()
    assert Autoregressive(loaded).decode([ids], max_new_tokens=NEW)[0].tokens == expected
    assert SelfSpeculative(loaded, 1, 3).decode([ids], max_new_tokens=NEW)[0].tokens == expected
    trace = probekit.trace(loaded, [PROMPT, "The king"], max_new_tokens=NEW)
    assert trace.outputs(0).tolist() == expected
    costs = roofline_costs(trace, bandwidth=1e10, flops=1e12)
    assert probekit.validate(loaded, trace, [(1, 3)], costs=costs).holds


def test_its_bytes_are_known(folder, tmp_path, capsys):
    """By inspect, by a run, and by the roofline that `choose` reads from it."""
    loaded, plain = load(folder, device="cpu").anatomy, load("tales-draft", device="cpu").anatomy
    assert loaded.parameters == plain.parameters
    maps = sum(part.weight.numel() for part in plain.layers.modules() if type(part) is torch.nn.Linear)
    assert plain.bytes - 3 * maps < loaded.bytes < plain.bytes - 2.8 * maps
    out = tmp_path / "run"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n")
    traced = ["trace", str(folder), "--prompts", str(prompts), "-o", str(out), "--max-new-tokens", "4", "--quiet"]
    assert run_line([*traced, "--device", "cpu"]) == 0
    run, bare = probekit.Trace.open(out), load("tales-draft", device="cpu")
    sizes, whole = map(Dimensions.of, (run, bare))
    assert sizes.head_bytes == 4 * whole.head_parameters  # the head is not quantised
    assert 1.0 < sizes.layer_bytes / whole.layer_parameters < 1.3
    early = [
        roofline_costs(one, bandwidth=1.0, flops=1e15, context=0, dtype="float32").early_s[1] for one in (run, bare)
    ]
    assert early[0] < 0.4 * early[1]
    capsys.readouterr()
    assert run_line(["choose", str(out), "--costs", "roofline", "--device", "h100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["costs"]["source"] == "roofline"


def test_another_dtype_is_refused_in_a_line(folder):
    with pytest.raises(InputError, match=r"compute in float32, not in bfloat16.*Leave --dtype out") as caught:
        load(folder, device="cpu", dtype="bfloat16")
    assert "\n" not in str(caught.value)


def with_config(tmp_path: Path, config) -> Path:
    made = Path(shutil.copytree(BUNDLED / "tales-draft", tmp_path / "claimed"))
    path = made / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    return made


@pytest.mark.parametrize("method", sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
def test_a_method_that_does_not_run_names_what_is_missing(method, tmp_path):
    """Each method that transformers knows: it is read, or one line says which package or device it wants."""
    settings = {"gptq": {"bits": 4}, "bitsandbytes_4bit": {"load_in_4bit": True}}.get(method, {})
    config = {"quant_method": "bitsandbytes" if method.startswith("bitsandbytes") else method, **settings}
    said = ""
    try:
        check_runs({"quantization_config": config}, "claimed", torch.device("cpu"))
    except InputError as error:
        said = str(error)
    assert "\n" not in said
    assert quantised_by({"quantization_config": config}) == config["quant_method"]
    if not said:
        return  # it runs here
    assert said.startswith(f"claimed is quantised ({config['quant_method']}), which cannot be read here: ")
    with pytest.raises(InputError, match="which cannot be read here"):
        load(with_config(tmp_path, config), device="cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "nonsense"}, r"quantised \(nonsense\).*Unknown quantization type"),
        ({"bits": 4}, "a method without a name"),
        ("awq", "a method without a name"),
        (["awq"], "a method without a name"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "os.system", "_data": {}}}}, "torchao"),
    ],
)
def test_configurations_that_mean_nothing(config, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        load(with_config(tmp_path, config), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_claim_without_quantised_weights_is_no_model(tmp_path):
    """torchao's settings over plain weights: whatever comes of it, it is no traceback."""
    pytest.importorskip("torchao")
    config = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
    made = with_config(tmp_path, config)
    try:
        assert load(made, device="cpu").depth == 2
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either is right
