"""`trim eval`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimcli.cli.options import Model, OutputFile
from trimcli.cli.output import Say, facts, memory
from trimcli.cli.plan import announcing

if TYPE_CHECKING:
    from trimcli.commands.options import EvaluateOptions


def evaluate(model: Model, options: "EvaluateOptions", say: Say, output: OutputFile = None) -> None:
    """Measure perplexity, zero-shot tasks or accuracy of a dense, pruned or packed model, or of a model under masks.

    Perplexity and accuracy run layer by layer, so a model larger than memory can be measured. Only what is asked for is
    measured; the directory is left untouched. --seed is that of few-shot draws; lm-eval's own if not given.

    Example: trim eval Qwen2.5-3B-70 -o results.json --ppl wikitext2 --tasks boolq,rte

    Image classifiers: trim eval vit-50 -o results.json --images val
    """
    from trimcli.commands.evaluate import evaluate as run

    if "seed" in say.given:
        options = replace(options, fewshot_seed=options.seed)
    document = run(model, options, output, force=say.force, progress=say.progress, announce=announcing(say))
    say.result(lambda: document, lambda: _print(document, output))


def _print(document: Mapping[str, Any], output: Path | None) -> None:
    rows: dict[str, Any] = {"model": document["label"]}
    for entry in document["perplexity"]:
        windows = f"{entry['windows']} windows of {entry['seqlen']} tokens, {entry['dtype']}"
        windows += {"each": ", BOS in each", "none": ", no BOS"}.get(entry["bos"], "")
        rows[f"perplexity, {Path(entry['dataset']).name}"] = f"{entry['value']:.6g} ({windows})"
    for entry in document.get("images", []):
        shares = f"top-1 {entry['top1']:.2%}, top-5 {entry['top5']:.2%}"
        rows[f"accuracy, {Path(entry['dataset']).name}"] = f"{shares} ({entry['images']:,} pictures, {entry['dtype']})"
    for name, entry in document.get("tasks", {}).items():
        metrics = []
        for metric in (key for key in entry if f"{key}_stderr" in entry):
            error = entry[f"{metric}_stderr"]
            metrics.append(f"{metric} {entry[metric]:.4g}" + (f" ± {error:.2g}" if error else ""))
        measured = f"{entry['n_shot']}-shot, {entry['samples']} of {entry['documents']} documents"
        rows[name] = f"{', '.join(metrics)} ({measured})"
    if document.get("mean_acc_seven") is not None:
        rows["mean_acc_seven"] = f"{document['mean_acc_seven']:.4f}"
    sparsity = document["sparsity"]
    rows["sparsity"] = f"{sparsity['total']:.4%} ({sparsity['zeros']:,} of {sparsity['weights']:,} weights)"
    rows["seconds"] = f"{document['seconds']:.1f}"
    rows["peak memory"] = memory(document["peak_memory"])
    rows["results"] = output
    facts(rows)
