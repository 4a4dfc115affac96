"""How are the bundled models made? Trains tales-untied, tales-tied, tales-layerskip and tales-draft from one text.

    python analyses/train_reference_models.py fairy_tales.txt.xz -o probekit/models/bundled --work build/training

The models differ in one thing each: the head (tied or its own), the recipe (plain or LayerSkip), or the depth (the
drafter). Seed, batches and the start of every shared tensor are the same. A killed run goes on where it stopped.

A second command trains smaller models, tied or not, plain or LayerSkip, over several seeds, traces each, and keeps
the tables instead of the weights: what one run of each model cannot tell apart from chance.

    python analyses/train_reference_models.py two-by-two fairy_tales.txt.xz -o docs/results/science
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.core import TyperGroup

from probekit.hooks.capture import Capture
from probekit.models.anatomy import anatomy
from probekit.models.loaded import Loaded
from probekit.tracing.prompts import Prompt, bundled_prompts
from probekit.training.layerskip import LayerSkip, LayerSkipLoss, exit_loss

SEED = 20240425
DEPTH, WIDTH, INNER, HEADS, KEY_VALUE_HEADS, VOCABULARY, CONTEXT = 12, 128, 352, 4, 2, 4096, 512
SEQUENCES, LENGTH = 8, 256
MATRIX_RATE, VECTOR_RATE, WARM_UP = 0.02, 0.003, 100
HELD_OUT = (
    "Long, long ago there stood in the midst of a country covered with lakes",
    "Dorothy lived in the midst of the",
)
HELD_OUT_TITLE = "The Violet Fairy Book (Andrew Lang, ed.)"
END_OF_TEXT = "<|endoftext|>"


LAYERSKIP = LayerSkip(dropout=0.1, exit_scale=1.0, exits_per_step=1, seed=SEED)


@dataclass(frozen=True)
class Shape:
    """Dimensions that models of one comparison share; the deepest of them has `depth` layers."""

    depth: int = DEPTH
    width: int = WIDTH
    inner: int = INNER
    heads: int = HEADS
    key_value_heads: int = KEY_VALUE_HEADS
    vocabulary: int = VOCABULARY


@dataclass(frozen=True)
class Variant:
    name: str
    description: str
    depth: int = DEPTH
    tied: bool = False
    recipe: LayerSkip | None = None
    shape: Shape = Shape()
    seed: int = SEED
    sequences: int = SEQUENCES


# The 2 x 2: smaller models, so that twelve of them train in a while on a CPU.
SMALL = Shape(depth=4, width=48, inner=128, heads=2, key_value_heads=1, vocabulary=512)
SMALL_SEQUENCES, SMALL_PARAGRAPHS = 4, 12_000
SEEDS = (1, 2, 3)
HELD_OUT_WINDOWS = 48  # of the kept-out book, for the losses of the 2 x 2
GIVEN_TEXTS, CONTEXT_CHARACTERS, GIVEN_CHARACTERS = 24, 80, 400

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("tales-untied", "head of its own, plain training"),
        Variant("tales-tied", "head shares the embedding, plain training", tied=True),
        Variant(
            "tales-layerskip",
            "head of its own, layer dropout and early-exit loss (arXiv 2404.16710)",
            recipe=LAYERSKIP,
        ),
        Variant("tales-draft", "two layers, head of its own: a drafter for two-model decoding", depth=2),
    )
}


def main(
    corpus: Annotated[Path, typer.Argument(help="Text, one paragraph a line; .txt or .txt.xz.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that receives one folder a model.")],
    work: Annotated[Path, typer.Option(help="Checkpoints and tokenised text.")] = Path("build/training"),
    only: Annotated[list[str] | None, typer.Option(help="Train only these models.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 3000,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    precision: Annotated[str, typer.Option(help="bfloat16 or float32, for the products.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    save_every: Annotated[int, typer.Option(min=1)] = 100,
) -> None:
    """Train the bundled models (the default command)."""
    console = Console(stderr=True)
    unknown = [name for name in only or [] if name not in VARIANTS]
    if unknown:
        raise typer.BadParameter(f"no such model: {', '.join(unknown)}; choose from {', '.join(VARIANTS)}")
    prepare_torch(threads, device)
    work.mkdir(parents=True, exist_ok=True)

    tokenizer, training, held_out = prepare_text(corpus, work)
    console.print(f"{len(training):,} training tokens, {len(held_out):,} held-out tokens ({HELD_OUT_TITLE})")
    for name in only or VARIANTS:
        variant = VARIANTS[name]
        model, losses = train(variant, training, work / name, steps, device, precision, save_every, console)
        by_exit = held_out_losses(model, held_out)
        export(variant, model, tokenizer, output / name, losses, by_exit, corpus, steps, device, precision)
        console.print(
            f"[bold]{name}[/bold]: held-out loss {by_exit[-1]:.3f} nats a token; by exit "
            + " ".join(f"{loss:.2f}" for loss in by_exit)
        )


def prepare_torch(threads: int, device: str) -> None:
    """Threads of the CPU (0: torch's choice); on the CPU only algorithms that give the same bits each time."""
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(device == "cpu")


def two_by_two(
    corpus: Annotated[Path, typer.Argument(help="Text, one paragraph a line; .txt or .txt.xz.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that receives the tables.")],
    work: Annotated[Path, typer.Option(help="Checkpoints and tokenised text.")] = Path("build/two-by-two"),
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seeds; each trains four models.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 600,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each greedy continuation.")] = 48,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    precision: Annotated[str, typer.Option(help="bfloat16 or float32, for the products.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    save_every: Annotated[int, typer.Option(min=1)] = 100,
) -> None:
    """Tied or not, plain or LayerSkip, over several seeds: train each small model, trace it, keep the tables."""
    console = Console(stderr=True)
    prepare_torch(threads, device)
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer, training, held_out = prepare_text(corpus, work, SMALL.vocabulary, SMALL_PARAGRAPHS)
    layers, exits = [], []
    for variant in small_variants(seeds or SEEDS):
        model, losses = train(variant, training, work / variant.name, steps, device, precision, save_every, console)
        by_site = held_out_losses(model, held_out[: HELD_OUT_WINDOWS * LENGTH + 1])
        by_layer, by_exit = measure(variant, model, tokenizer, held_out_paragraphs(corpus), max_new_tokens)
        layers.append(by_layer.assign(held_out_loss=by_layer["layer"].map(dict(enumerate(by_site)))))
        exits.append(by_exit)
        console.print(f"{variant.name}: training loss {sum(losses[-50:]) / len(losses[-50:]):.3f}, "
                      f"held-out loss {by_site[-1]:.3f} nats a token")  # fmt: skip
    pd.concat(layers).to_csv(output / "two_by_two_layers.csv", index=False, float_format="%.6g")
    pd.concat(exits).to_csv(output / "two_by_two_exits.csv", index=False, float_format="%.6g")
    record = {
        "schema": "probekit/two-by-two/1", "shape": asdict(SMALL), "seeds": list(seeds or SEEDS), "steps": steps,
        "tokens_seen": steps * SMALL_SEQUENCES * LENGTH, "recipe": asdict(LAYERSKIP), "max_new_tokens": max_new_tokens,
        "corpus_sha256": hashlib.sha256(corpus.read_bytes()).hexdigest(), "device": device, "precision": precision,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    (output / "two_by_two.json").write_text(json.dumps(record, indent=2) + "\n")


def small_variants(seeds: Sequence[int]) -> list[Variant]:
    """The four models of each seed: same start of every shared tensor, same batches."""
    return [
        Variant(
            f"seed{seed}-{'tied' if tied else 'untied'}-{'layerskip' if recipe else 'plain'}", "one of the 2 x 2",
            depth=SMALL.depth, tied=tied, recipe=replace(recipe, seed=seed) if recipe else None, shape=SMALL, seed=seed,
            sequences=SMALL_SEQUENCES,
        )
        for seed in seeds
        for tied in (False, True)
        for recipe in (None, LAYERSKIP)
    ]  # fmt: skip


def held_out_paragraphs(corpus: Path) -> list[Prompt]:
    """Long paragraphs of the kept-out book, evenly spaced: an opening as context, what follows as the given text."""
    lines, first, last = read_lines(corpus)
    whole = [line for line in lines[first:last] if len(line) >= CONTEXT_CHARACTERS + GIVEN_CHARACTERS]
    prompts = []
    for index in range(min(GIVEN_TEXTS, len(whole))):
        line = whole[index * len(whole) // min(GIVEN_TEXTS, len(whole))]
        cut = line.rindex(" ", 0, CONTEXT_CHARACTERS)
        prompts.append(Prompt(index, line[:cut], response=line[cut : CONTEXT_CHARACTERS + GIVEN_CHARACTERS]))
    return prompts


def measure(
    variant: Variant, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, given: list[Prompt], budget: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trace one model on its own greedy text and on given text: figures by layer, and by exit and draft length."""
    from probekit.prediction.predict import predict
    from probekit.tracing.tracer import trace
    from probekit.tying.shares import class_shares

    model = model.float().requires_grad_(False)
    loaded = Loaded(model, tokenizer, anatomy(model), variant.name, variant.name, None, None, f"trained:{variant.name}")
    keys = {"seed": variant.seed, "tied": variant.tied, "layerskip": variant.recipe is not None}
    layers, exits = [], []
    for text in ("greedy", "given"):
        made = trace(
            loaded, given if text == "given" else bundled_prompts("tales"), max_new_tokens=budget,
            given=text == "given", top_prompts=0,
        )  # fmt: skip
        generated = made.layers[(made.layers["output"] >= 0) & (made.layers["lens"] == "final-norm")]
        means = generated.groupby("layer")[["agrees", "echo", "entropy", "kl", "overlap"]].mean()
        means["gibberish"] = class_shares(made).values[-1]
        means["looped"] = made.texts["looped"].mean()
        layers.append(means.reset_index().assign(text=text, **keys))
        cells = predict(made).to_pandas()[
            ["exit_layer", "draft_length", "acceptance_rate", "alpha", "tokens_per_round"]
        ]
        exits.append(cells.assign(text=text, **keys))
    return pd.concat(layers), pd.concat(exits)


def read_lines(corpus: Path) -> tuple[list[str], int, int]:
    """The text's lines, and where the kept-out book begins and ends."""
    raw = corpus.read_bytes()
    lines = (lzma.decompress(raw) if corpus.suffix == ".xz" else raw).decode("utf-8").splitlines()
    first, last = (next(i for i, line in enumerate(lines) if line.startswith(start)) for start in HELD_OUT)
    return lines, first, last


def prepare_text(
    corpus: Path, work: Path, vocabulary: int = VOCABULARY, paragraphs: int | None = None
) -> tuple[PreTrainedTokenizerFast, torch.Tensor, torch.Tensor]:
    """Split off the kept-out book, train the tokenizer on the rest, encode both. Tokens: (n,), int64.

    paragraphs: use the first so many of the rest only.
    """
    lines, first, last = read_lines(corpus)
    rest = (lines[:first] + lines[last:])[:paragraphs]
    folder = work / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(
            (line + "\n" for line in rest),
            trainers.BpeTrainer(
                vocab_size=vocabulary,
                special_tokens=[END_OF_TEXT],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=CONTEXT
        )
        wrapped.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def encode(part: list[str]) -> torch.Tensor:
        rows = tokenizer([line + "\n" for line in part])["input_ids"]
        return torch.tensor([token for row in rows for token in row])

    return tokenizer, encode(rest), encode(lines[first:last])


def batch_at(
    step: int, tokens: torch.Tensor, seed: int = SEED, sequences: int = SEQUENCES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step, (sequences, length) each: a function of the seed and the step alone.

    Each epoch cuts the text into windows at a phase of its own and visits them in an order of its own.
    """
    windows = (len(tokens) - 1 - LENGTH) // LENGTH
    per_epoch = windows // sequences
    epoch, place = divmod(step, per_epoch)
    draw = torch.Generator().manual_seed(seed * 1000 + epoch)
    phase = int(torch.randint(LENGTH, (1,), generator=draw))
    order = torch.randperm(windows, generator=draw)[place * sequences : (place + 1) * sequences]
    index = order[:, None] * LENGTH + phase + torch.arange(LENGTH + 1)
    rows = tokens[index]
    return rows[:, :-1], rows[:, 1:]


def build(variant: Variant) -> LlamaForCausalLM:
    """A model whose every tensor starts as the same tensor of the deep untied one."""
    shape = variant.shape

    def fresh(depth: int, tied: bool) -> LlamaForCausalLM:
        torch.manual_seed(variant.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
                num_hidden_layers=depth,
                num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0, pad_token_id=0, rms_norm_eps=1e-5,
            )
        )  # fmt: skip

    source = fresh(shape.depth, tied=False).state_dict()
    model = fresh(variant.depth, variant.tied)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not (variant.tied and name == "lm_head.weight"):
                tensor.copy_(source[name])
    return model


def train(
    variant: Variant, tokens: torch.Tensor, folder: Path, steps: int, device: str, precision: str, save_every: int,
    console: Console,
) -> tuple[LlamaForCausalLM, list[float]]:  # fmt: skip
    """Train one model, or go on from its checkpoint. Returns it with the loss of every step, nats a token."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    model = build(variant).to(device).train()
    loss_of = LayerSkipLoss(model, variant.recipe, steps)
    optimizers = make_optimizers(model)
    losses: list[float] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["steps"] != steps:
            raise typer.BadParameter(f"{checkpoint} belongs to a run of {state['steps']} steps, not {steps}")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        loss_of.generator.set_state(state["generator"].cpu())
        losses = state["losses"]

    def save() -> None:
        state = {
            "steps": steps, "losses": losses, "model": model.state_dict(), "generator": loss_of.generator.get_state(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("loss {task.fields[loss]:.3f}"))  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(variant.name, total=steps, completed=len(losses), loss=float("nan"))
        started = time.monotonic()
        for step in range(len(losses), steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * schedule(step, steps)
            inputs, targets = (part.to(device) for part in batch_at(step, tokens, variant.seed, variant.sequences))
            with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                loss = loss_of(step, inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            progress.update(task, advance=1, loss=sum(losses[-50:]) / len(losses[-50:]))
            if (step + 1) % save_every == 0 or step + 1 == steps:
                save()
                if not console.is_terminal:
                    recent = sum(losses[-save_every:]) / len(losses[-save_every:])
                    rate = (time.monotonic() - started) / max(1, step + 1 - (len(losses) - (step + 1)))
                    console.print(f"{variant.name} step {step + 1}/{steps} loss {recent:.3f} {rate:.2f} s/step")
    return model.eval(), losses


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(
        [{"params": matrices, "peak": MATRIX_RATE}], lr=MATRIX_RATE, momentum=0.95, weight_decay=0.1,
        adjust_lr_fn="original",
    )  # fmt: skip
    adam = torch.optim.AdamW(
        [{"params": others, "peak": VECTOR_RATE}], lr=VECTOR_RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    return [muon, adam]


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then linear to zero."""
    warm_up = min(WARM_UP, steps // 10)
    return (step + 1) / (warm_up + 1) if step < warm_up else (steps - step) / (steps - warm_up)


@torch.inference_mode()
def held_out_losses(model: LlamaForCausalLM, tokens: torch.Tensor, batch: int = 16) -> list[float]:
    """Mean next-token loss, nats, of the kept-out book after 0..L layers, in windows of LENGTH tokens."""
    parts = anatomy(model.float())
    windows = (len(tokens) - 1) // LENGTH
    inputs = tokens[: windows * LENGTH].view(windows, LENGTH).to(parts.device)
    targets = tokens[1 : windows * LENGTH + 1].view(windows, LENGTH).to(parts.device)
    total = torch.zeros(parts.depth + 1)
    for start in range(0, windows, batch):
        rows = slice(start, start + batch)
        with Capture(parts) as capture:
            parts.decoder(input_ids=inputs[rows], use_cache=False)
        for site in parts.sites:
            total[site] += exit_loss(parts, capture[site], targets[rows]).cpu() * len(inputs[rows])
    return (total / windows).tolist()


def export(
    variant: Variant, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, losses: list[float],
    by_exit: list[float], corpus: Path, steps: int, device: str, precision: str,
) -> None:  # fmt: skip
    """Write the model, its tokenizer, its card and the record of its training."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 8 * 2**20, f"{weights} is larger than 8 MiB"
    record: dict[str, Any] = {
        "name": variant.name, "says": variant.description, "tied": variant.tied, "layers": variant.depth,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(variant.recipe) if variant.recipe else None,
        "steps": steps, "tokens_seen": steps * SEQUENCES * LENGTH, "seed": SEED,
        "optimiser": f"Muon {MATRIX_RATE} inside the layers, AdamW {VECTOR_RATE} elsewhere, linear to zero",
        "training_loss": sum(losses[-100:]) / len(losses[-100:]),
        "held_out": {"book": HELD_OUT_TITLE, "loss_by_site": by_exit},
        "corpus_sha256": hashlib.sha256(corpus.read_bytes()).hexdigest(),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "device": device, "precision": precision,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    rows = "\n".join(f"| {site} | {loss:.3f} |" for site, loss in enumerate(by_exit))
    sentence = variant.description[0].upper() + variant.description[1:]
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
language: en
library_name: transformers
---
# {variant.name}

{sentence}. One of probekit's bundled models, a controlled experiment: they share seed,
batches and the start of every shared tensor, and differ in one thing each.

- **Shape**: {variant.depth} layers of width {WIDTH}, {HEADS} query and {KEY_VALUE_HEADS} key/value heads,
  {VOCABULARY} tokens, {record["parameters"]:,} parameters; trained on {LENGTH} tokens at a time.
- **Data**: 32 books of English fairy and folk tales in the public domain (Project Gutenberg);
  *{HELD_OUT_TITLE}* was kept out for the losses below and for the bundled prompts.
- **Recipe**: {steps:,} steps of {SEQUENCES} x {LENGTH} tokens, {record["optimiser"]}, {precision} products on {device}.
  Early-exit training: {record["recipe"] or "none"}.
- **Licence**: Apache-2.0. **Weights** (sha256): `{record["weights_sha256"]}`
- Made by `python analyses/train_reference_models.py`; small, old-fashioned, and no source of facts or advice.

Held-out loss of `head(norm(h))`, nats a token, after the given number of layers:

| layers | loss |
|---|---|
{rows}
"""
    )


class BundledByDefault(TyperGroup):
    """The command may be left out: `train_reference_models.py CORPUS -o DIR` trains the bundled models."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["bundled", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=BundledByDefault, add_completion=False, no_args_is_help=True, help=__doc__)
app.command("bundled")(main)
app.command("two-by-two")(two_by_two)

if __name__ == "__main__":
    app()
