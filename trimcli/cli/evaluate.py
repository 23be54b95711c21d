"""`trim eval`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from trimcli.cli import common
from trimcli.cli.common import boundary

TASKS = "Zero-shot tasks (lm-eval)"


@boundary
def evaluate(
    model: common.Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The results file (JSON) to write.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Measure the model under these masks, without writing it.")] = None,
    ppl: Annotated[
        str | None, typer.Option(help="Perplexity on wikitext2, c4, ptb or files, separated by commas.")
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(help="Tokens a window; the smaller of 2048 and the model's positions if not given."),
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows or task sequences a batch; chosen if not given.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-eval tasks or groups: boolq,rte,hellaswag,winogrande,...", rich_help_panel=TASKS),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder of local task files.", rich_help_panel=TASKS)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question.", rich_help_panel=TASKS)
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="Documents a task, or their fraction if below 1.", rich_help_panel=TASKS),
    ] = None,
    log_samples: Annotated[
        Path | None,
        typer.Option(help="A folder for one JSON lines file of answers a task.", rich_help_panel=TASKS),
    ] = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    seed: common.Seed = 0,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
    force: common.Force = False,
    cache_dir: common.CacheDir = None,
    trust_remote_code: common.TrustRemoteCode = False,
    revision: common.Revision = None,
) -> None:
    """Measure perplexity and zero-shot tasks of a dense, pruned or packed model, or of a model under masks.

    Perplexity runs layer by layer, so a model larger than memory can be measured. Only what is asked for is
    measured; the directory is left untouched.

    Example: trim eval Qwen2.5-3B-70 -o results.json --ppl wikitext2 --tasks boolq,rte
    """
    progress = common.start(quiet, as_json)
    from trimcli.commands.evaluate import EvaluateOptions
    from trimcli.commands.evaluate import evaluate as run

    options = EvaluateOptions(
        device=device,
        dtype=dtype,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        cache_dir=cache_dir,
        masks=masks,
        ppl=common.split(ppl),
        seqlen=seqlen,
        max_windows=max_windows,
        batch_size=batch_size,
        tasks=common.split(tasks),
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=log_samples,
    )
    document = run(model, options, output, force=force, progress=progress)
    if as_json:
        common.emit_json(document)
    elif not quiet:
        _print(document, output)


def _print(document: Mapping[str, Any], output: Path | None) -> None:
    rows: dict[str, Any] = {"model": document["label"]}
    for entry in document["perplexity"]:
        rows[f"perplexity, {Path(entry['dataset']).name}"] = (
            f"{entry['value']:.6g} ({entry['windows']} windows of {entry['seqlen']} tokens, {entry['dtype']})"
        )
    for name, entry in document.get("tasks", {}).items():
        metrics = {key: value for key, value in entry.items() if f"{key}_stderr" in entry}
        rows[name] = (
            ", ".join(
                f"{key} {value:.4g}" + (f" ± {entry[f'{key}_stderr']:.2g}" if entry[f"{key}_stderr"] else "")
                for key, value in metrics.items()
            )
            + f" ({entry['n_shot']}-shot, {entry['samples']} of {entry['documents']} documents)"
        )
    for name in ("mean_acc", "mean_acc_seven"):
        if document.get(name) is not None:
            rows[name] = f"{document[name]:.4f}"
    sparsity = document["sparsity"]
    rows["sparsity"] = f"{sparsity['total']:.4%} ({sparsity['zeros']:,} of {sparsity['weights']:,} weights)"
    rows["seconds"] = f"{document['seconds']:.1f}"
    rows["peak memory"] = common.memory(document["peak_memory"])
    rows["results"] = output
    common.facts(rows)
