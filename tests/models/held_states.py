"""The states in which people hold a small random model, each made by the library that they use for it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import AutoConfig, AutoModelForCausalLM

MAPS = ["q_proj", "v_proj", "down_proj"]


def fresh(family: str = "llama", width: int = 32, head: int = 8) -> nn.Module:
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        family, vocab_size=61, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=head, max_position_embeddings=128,
        initializer_range=0.35, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(kind: str = "LoraConfig", **settings) -> nn.Module:
    """A peft model whose adapters count: their weights are random."""
    peft = pytest.importorskip("peft")
    if kind == "LoraConfig":
        settings = {"r": 4, "target_modules": MAPS, "init_lora_weights": False, **settings}
    mixed = {"mixed": True} if settings.pop("mixed", False) else {}
    torch.manual_seed(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(fresh(), getattr(peft, kind)(**settings), **mixed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "ia3_", "magnitude", "vera_", "lokr_", "oft_")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def merged() -> nn.Module:
    model = adapted()
    model.merge_adapter()
    return model


def two_adapters() -> nn.Module:
    peft, model = pytest.importorskip("peft"), adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["o_proj", *MAPS], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model.eval()


def switched_off() -> nn.Module:
    model = adapted()
    model.base_model.disable_adapter_layers()
    return model


def parametrised(make: Callable[[nn.Module], object], name: str = "up_proj") -> nn.Module:
    model = fresh()
    for layer in model.model.layers:
        make(getattr(layer.mlp, name, None) or getattr(layer.self_attn, name))
    return model.eval()


class Half(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


def parametrised_ends() -> nn.Module:
    """Embedding, norms and head are functions of other weights."""
    model = fresh()
    for part in (model.model.embed_tokens, model.model.norm, model.model.layers[1].input_layernorm, model.lm_head):
        parametrize.register_parametrization(part, "weight", Half())
    return model


def pruned() -> nn.Module:
    model = fresh()
    for layer in model.model.layers:
        prune.l1_unstructured(layer.mlp.down_proj, "weight", amount=0.3)
    prune.l1_unstructured(model.lm_head, "weight", amount=0.2)
    return model


def checkpointed() -> nn.Module:
    model = fresh()
    model.gradient_checkpointing_enable()
    return model


def scaled_by_hand() -> nn.Module:
    """A module of the user's own in the place of a projection."""

    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            return 1.5 * self.inner(states)

    model = fresh()
    for layer in model.model.layers:
        layer.self_attn.o_proj = Scaled(layer.self_attn.o_proj)
    return model


def with_classes_of_ones_own() -> nn.Module:
    """A layer and a map whose classes were replaced by ones that compute something else."""
    model = fresh()
    layer = model.model.layers[1]

    class Louder(type(layer)):
        def forward(self, states, *args, **kwargs):
            return 1.1 * super().forward(states, *args, **kwargs)

    class Doubled(nn.Linear):
        def forward(self, states):
            return 2.0 * super().forward(states)

    layer.__class__, model.model.layers[2].mlp.up_proj.__class__ = Louder, Doubled
    return model


def with_a_forward_of_its_own() -> nn.Module:
    model = fresh()
    inner = model.model.layers[0].self_attn.q_proj
    inner.forward = lambda states, own=inner.forward: 1.5 * own(states)
    return model


def with_a_bias_on_the_head() -> nn.Module:
    model = fresh()
    torch.manual_seed(8)
    model.lm_head = nn.Linear(32, 61, bias=True).requires_grad_(False)
    return model.eval()


def with_a_head_that_casts() -> nn.Module:
    class Cast(nn.Sequential):
        def forward(self, states):
            return super().forward(states).float() / 3

    model = fresh()
    model.lm_head = Cast(model.lm_head)
    return model.eval()


def quantised_by_torchao(config: str, **settings) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = fresh()
    torchao.quantize_(model, getattr(torchao, config)(**settings))
    return model


def quantised_by_bitsandbytes(four: bool) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = fresh(width=64, head=16)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    sizes = linear.in_features, linear.out_features
                    if four:
                        made = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32)
                    else:
                        made = bitsandbytes.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                    made.load_state_dict(linear.state_dict())
                    setattr(block, name, made.to("cpu"))
    return model.eval()


def offloaded(where: str) -> nn.Module:
    import accelerate

    cpu, model = torch.device("cpu"), fresh()
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device=cpu)
    if where == "disk":
        return accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device=cpu)
    places: dict[str, str] = {f"model.layers.{layer}": "disk" if layer in (1, 3) else "cpu" for layer in range(5)}
    places |= dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tempfile.mkdtemp(), force_hooks=True)


def with_compiled_layers() -> nn.Module:
    model = fresh()
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    return model


def eager() -> nn.Module:
    model = fresh()
    model.set_attn_implementation("eager")
    return model


def made_for_inference() -> nn.Module:
    with torch.inference_mode():
        return fresh()


def frozen_in_parts() -> nn.Module:
    model = fresh()
    model.model.embed_tokens.requires_grad_(False)
    return model


STATES: dict[str, Callable[[], nn.Module]] = {
    "as it is": fresh,
    "LoRA, unmerged": adapted,
    "LoRA, merged in place": merged,
    "LoRA, merged and unloaded": lambda: adapted().merge_and_unload().eval(),
    "LoRA, switched off": switched_off,
    "LoRA on every map": lambda: adapted(target_modules="all-linear"),
    "LoRA on embedding and head": lambda: adapted(target_modules=[*MAPS, "embed_tokens", "lm_head"]),
    "LoRA with modules to save": lambda: adapted(modules_to_save=["lm_head", "embed_tokens", "norm"]),
    "LoRA with trained tokens": lambda: adapted(trainable_token_indices=[3, 5]),
    "two LoRA adapters": two_adapters,
    "mixed adapters": lambda: adapted(mixed=True),
    "DoRA": lambda: adapted(use_dora=True),
    "IA3": lambda: adapted(
        "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "AdaLoRA": lambda: adapted("AdaLoraConfig", target_modules=MAPS, total_step=10),
    "LoKr": lambda: adapted("LoKrConfig", r=4, target_modules=MAPS, init_weights=False),
    "OFT": lambda: adapted("OFTConfig", oft_block_size=8, target_modules=["q_proj"]),
    "VeRA": lambda: adapted("VeraConfig", r=4, target_modules=["q_proj", "o_proj"]),
    "weight norm": lambda: parametrised(parametrizations.weight_norm),
    "weight norm by hooks": lambda: parametrised(torch.nn.utils.weight_norm, "q_proj"),
    "spectral norm": lambda: parametrised(parametrizations.spectral_norm),
    "orthogonal": lambda: parametrised(parametrizations.orthogonal, "o_proj"),
    "parametrised ends": parametrised_ends,
    "pruned": pruned,
    "gradient checkpointing": checkpointed,
    "a module of one's own": scaled_by_hand,
    "classes of one's own": with_classes_of_ones_own,
    "a forward of its own": with_a_forward_of_its_own,
    "a head with a bias": with_a_bias_on_the_head,
    "a head that casts": with_a_head_that_casts,
    "int8 weights (torchao)": lambda: quantised_by_torchao("Int8WeightOnlyConfig"),
    "int4 weights (torchao)": lambda: quantised_by_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "float8 weights (torchao)": lambda: quantised_by_torchao("Float8WeightOnlyConfig"),
    "8 bits (bitsandbytes)": lambda: quantised_by_bitsandbytes(four=False),
    "4 bits (bitsandbytes)": lambda: quantised_by_bitsandbytes(four=True),
    "offloaded to the CPU": lambda: offloaded("cpu"),
    "offloaded to disk": lambda: offloaded("disk"),
    "dispatched over CPU and disk": lambda: offloaded("both"),
    "compiled": lambda: torch.compile(fresh(), backend="eager"),
    "compiled layers": with_compiled_layers,
    "data parallel": lambda: nn.DataParallel(fresh()).eval(),
    "eager attention": eager,
    "made for inference": made_for_inference,
    "frozen in parts": frozen_in_parts,
}
