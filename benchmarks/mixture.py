"""A small mixture of experts, trained here for some minutes: perplexity with and without its experts pruned.

    python -m benchmarks.mixture --steps 600 --out benchmarks/results-mixture.md

It has the Qwen3-MoE form and is trained, calibrated and measured on the demo's texts, which have no topic in common
between training and measurement.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from benchmarks.support.provenance import head, publish, table
from trimcli import CalibrateOptions, PruneOptions, Recipe, prune
from trimcli.demo import MODEL, DemoTexts, write_texts
from trimcli.evaluation.perplexity import perplexity
from trimcli.files.checkpoint import Checkpoint
from trimcli.model.skeleton import Skeleton
from trimcli.text.blocks import training_blocks

SEQLEN, BATCH = 128, 16
METHODS = ("magnitude", "wanda", "sparsegpt")
TARGETS = (0.5, 0.7)
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": True,
}


def trained(directory: Path, text: Path, steps: int) -> None:
    """Train the model on `text` and save it with its tokenizer; every block is seen about equally often."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    blocks = training_blocks(str(text), tokenizer, nsamples=1 << 20, seqlen=SEQLEN, seed=0).long()
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(vocab_size=len(tokenizer), **ends, **SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for batch in _batches(blocks, steps):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.config.output_router_logits = False
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _batches(blocks: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
        yield blocks[order[:BATCH]]
        order = order[BATCH:]


def measured(directory: Path, text: Path) -> float:
    """Perplexity of what was held back, in windows of the training's length."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // SEQLEN * SEQLEN]).view(-1, SEQLEN)
    return perplexity(Skeleton(Checkpoint.open(directory)), windows)


def rows(model: Path, texts: DemoTexts, scratch: Path, nsamples: int) -> Iterator[list[str]]:
    """A line of the table for each target and method."""
    for sparsity in TARGETS:
        for method in METHODS:
            found, share = [], []
            for skip in ((), ("*.experts.*",)):
                out = scratch / "pruned"
                run: dict[str, Any] = {"cache_dir": scratch / "cache", "device": "cpu"}
                drawn = CalibrateOptions(dataset=str(texts.calibration), nsamples=nsamples, seqlen=SEQLEN, **run)
                options = PruneOptions(
                    recipe=Recipe(method=method),
                    sparsity=sparsity,
                    skip=skip,
                    save_model=out,
                    calibrate=None if method == "magnitude" else drawn,
                    **run,
                )
                done = prune(str(model), scratch / "masks", options, force=True)
                found.append(f"{measured(out, texts.measurement):.2f}")
                share.append(f"{done.zeros / 1e6:.2f}")
            yield [f"{sparsity:.0%}", method, *found, *share]


def main() -> None:
    """Train, prune, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration samples")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: print)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        texts, model = write_texts(scratch), scratch / "mixture"
        trained(model, texts.calibration, given.steps)
        weights = sum(linear.numel for linear in Skeleton(Checkpoint.open(model)).linears.values())
        facts = {
            "model": f"8 experts in each of 4 layers, 2 a token, {weights / 1e6:.2f} M prunable weights, "
            f"{given.steps} steps of {BATCH} samples of {SEQLEN} tokens",
            "dense perplexity": f"{measured(model, texts.measurement):.2f}",
            "text": "the demo's: calibrated on what the model was trained on, measured on other topics",
        }
        found = list(rows(model, texts, scratch, given.nsamples))
    lines = head("A mixture of experts", "mixture", facts)
    columns = ("sparsity", "method", "everything pruned", "experts dense", "M zeros", "M zeros, experts dense")
    publish([*lines, *table(columns, found)], given.out)


if __name__ == "__main__":
    main()
