"""llm-compressor's pruning of a model, timed: a script for the interpreter of an environment that has it.

    PYTHON benchmarks/support/peer.py MODEL TOKENS METHOD REPEATS SPARSITY

MODEL: a directory. TOKENS: a safetensors file with `tokens`, int [N, L]. METHOD: wanda or sparsegpt. Prints the least
seconds from the directory to the pruned model in memory, of so many turns after a first one, as JSON.
"""

import json
import sys
import time

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def main() -> None:
    """Prune, time, print."""
    directory, file, method, repeats, sparsity = sys.argv[1:]
    rows = load_file(file)["tokens"].tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    seconds = []
    for _ in range(int(repeats) + 1):
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
        # The head stays dense, as it does here, and as many tokens are a batch.
        every = {"sparsity": float(sparsity), "mask_structure": "0:0", "targets": "Linear", "ignore": ["lm_head"]}
        modifier = MODIFIERS[method](**every)
        limits = {"num_calibration_samples": len(rows), "max_seq_length": len(rows[0])}
        limits["batch_size"] = max(1, 2048 // len(rows[0]))
        oneshot(model=model, dataset=data, recipe=[modifier], shuffle_calibration_samples=False, **limits)
        seconds.append(time.perf_counter() - started)
    weights = [layer.weight for layer in model.model.layers.modules() if hasattr(layer, "weight")]
    zeros = sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights if one.ndim == 2)
    print(json.dumps({"seconds": min(seconds[1:]), "zeros": zeros}))


if __name__ == "__main__":
    main()
