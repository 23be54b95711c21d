"""What training recovers: perplexity against training tokens, from the best one-shot directory, mode by mode.

    python -m benchmarks.recovery --model DIR --calibrate TRAIN.json.gz --measure HELDOUT.txt TEST.txt \
        --nsamples 128 --seqlen 256 --windows 120 --work WORK --runs benchmarks/recovery-runs.jsonl \
        --out benchmarks/RECOVERY.md

Each run is noted as it ends: stopped, the same command goes on where it was, inside of a run, too. `--modes` and
`--targets` run a part of the table, so that processes can share it; `--render` writes what was noted and runs nothing.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.support.ledger import Ledger
from benchmarks.support.provenance import machine, publish, table, versions
from benchmarks.support.study import Study, add_arguments, make_study
from trimcli import AllocateOptions, FinetuneOptions, PruneOptions, Recipe, VerifyOptions, finetune, prune, verify
from trimcli.methods.presets import PRESETS

# Mode by its name in the tables; what differs from FinetuneOptions' defaults.
MODES: dict[str, dict[str, Any]] = {
    "lora": {"mode": "lora", "kl": 0.0, "targets": ("all",)},
    "full": {"mode": "full", "kl": 0.0},
    "full + teacher": {"mode": "full"},
    "full + teacher, --kl 8": {"mode": "full", "kl": 8.0},
    "admm": {"mode": "admm"},
}
INTRODUCTION = """\
Every directory has the zeros of its target, checked by `trim verify`. *Nats* is the mean cross-entropy above the dense
model's; *left* is the share of the one-shot directory's nats that remain. Tokens are those trained on; `admm` starts
from the dense model and spends half of them on learning the masks. Training samples come from the text that the
one-shot directory is calibrated on, and no measured text is among them. Seconds include other work on the machine."""


def one_shot(study: Study, target: str, name: str) -> Path:
    """The directory that a preset prunes to the target, made the first time."""
    folder = study.folder / f"{name}-{target}"
    preset = PRESETS[name]
    run: dict[str, Any] = {"cache_dir": study.cache, "dtype": study.compute, "seed": study.seed}
    sparsity = float(target)
    allocate = AllocateOptions(method=preset.alloc, sparsity=sparsity, **run) if preset.alloc else None
    options = PruneOptions(
        recipe=Recipe(**preset.chosen(pattern=False)),
        sparsity=sparsity,
        save_model=folder,
        allocate=allocate,
        calibration=study.calibration(),
        **run,
    )
    with FileLock(study.folder / f"{name}-{target}.lock"):
        if not folder.is_dir():
            prune(str(study.model), study.folder / f"{name}-{target}.masks", options, force=True)
    return folder


def train(study: Study, target: str, mode: str, steps: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train, verify and measure."""
    pruned = one_shot(study, target, given.preset)
    output = study.folder / f"{re.sub(r'[^a-z0-9]', '', mode)}-{target}-{steps}"
    options = FinetuneOptions(
        dataset=str(study.source),
        nsamples=given.samples,
        seqlen=study.seqlen,
        steps=steps,
        batch_size=given.batch_size,
        accumulate=given.accumulate,
        lr=given.lr,
        interval=given.interval,
        sparsity=float(target) if mode == "admm" else None,
        teacher=str(study.model) if MODES[mode].get("kl", 1.0) else None,
        resume=True,
        dtype=study.compute,
        seed=study.seed,
        **MODES[mode],
    )
    start = study.model if mode == "admm" else pruned
    made = finetune(str(start), output, options, force=output.is_dir(), note=lambda line: print(line, file=sys.stderr))
    verify(output, VerifyOptions()).check()
    return {
        **study.measure(output),
        "tokens": made.tokens,
        "seconds": made.seconds,
        "peak": max(made.peak_memory.values()),
        "heldout": [made.before, made.after],
        "stood": made.best,
    }


def key(study: Study, target: str, mode: str, steps: int, given: argparse.Namespace) -> dict[str, Any]:
    """What a run is found again by."""
    course = {
        name: getattr(given, name) for name in ("preset", "samples", "batch_size", "accumulate", "lr", "interval")
    }
    return {**study.key, "target": target, "mode": mode, "steps": steps, "course": course}


def run(study: Study, ledger: Ledger, given: argparse.Namespace) -> None:
    """Run what is lacking of the asked."""
    shared = {"model": study.name, "machine": machine(), "versions": versions(), **study.facts()}

    def note(what: dict[str, Any], label: dict[str, Any], facts: dict[str, Any]) -> None:
        ledger.add(what, {**shared, **label, **facts})
        print(f"{label}: {facts['perplexity']}", file=sys.stderr, flush=True)

    dense = key(study, "dense", "dense", 0, given)
    if ledger.find(dense) is None:
        note(dense, {"target": "dense", "mode": "dense", "steps": 0}, study.measure(study.model))
    for target in given.targets:
        start = key(study, target, "one-shot", 0, given)
        if ledger.find(start) is None:
            found = study.measure(one_shot(study, target, given.preset))
            note(start, {"target": target, "mode": "one-shot", "steps": 0}, {**found, "tokens": 0})
        for steps in given.steps:
            for mode in given.modes:
                wanted = key(study, target, mode, steps, given)
                if ledger.find(wanted) is None:
                    label = {"target": target, "mode": mode, "steps": steps}
                    note(wanted, label, train(study, target, mode, steps, given))


def render(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The results file of all that was noted: a section a model and target, a table a text."""
    noted = {repr([entry["facts"][name] for name in ("model", "target", "mode", "steps")]): entry for entry in entries}
    runs = [entry["facts"] for entry in noted.values()]
    lines = ["# What training recovers", "", INTRODUCTION, ""]
    for model in dict.fromkeys(one["model"] for one in runs):
        mine = [one for one in runs if one["model"] == model]
        dense = next(one for one in mine if one["mode"] == "dense")
        lines += [f"## {model}", "", f"- trained and calibrated on {dense['calibrated on']}"]
        lines += [f"- measured on {dense['measured on']}"]
        lines += [f"- {one}" for one in dict.fromkeys(f"{run['machine']}; {run['versions']}" for run in mine)]
        for target in dict.fromkeys(one["target"] for one in mine if one["target"] != "dense"):
            lines += ["", f"### {model} at {float(target):.0%}", ""]
            lines += _table([one for one in mine if one["target"] == target], dense)
        lines.append("")
    return lines


def _table(runs: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> list[str]:
    texts = list(dense["perplexity"])
    start = next(one for one in runs if one["mode"] == "one-shot")

    def nats(one: Mapping[str, Any], text: str) -> float:
        return math.log(one["perplexity"][text] / dense["perplexity"][text])

    rows = []
    for one in sorted(runs, key=lambda one: (one["mode"] != "one-shot", list(MODES).index(one["mode"]), one["tokens"])
                      if one["mode"] in MODES else (False, 0, 0)):  # fmt: skip
        cells = [f"{one['perplexity'][text]:.2f} ({nats(one, text):.3f}, {_left(nats(one, text), nats(start, text))})"
                 for text in texts]  # fmt: skip
        cost = [f"{one['seconds']:,.0f}", f"{one['peak'] / 2**30:.2f}"] if one["tokens"] else ["", ""]
        rows.append([one["mode"], f"{one['tokens']:,}", *cells, *cost])
    heads = [f"{text}, dense {dense['perplexity'][text]:.2f}: perplexity (nats, left)" for text in texts]
    return table(["training", "tokens", *heads, "seconds", "peak GiB"], rows)


def _left(nats: float, before: float) -> str:
    return f"{nats / before:.0%}" if before > 0 else "-"


def main() -> None:
    """Run what was not noted yet, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="model directory (default: the embedded one)")
    parser.add_argument("--calibrate", type=Path, help="text to calibrate and train on (default: the demo's)")
    parser.add_argument("--targets", nargs="*", default=["0.7", "0.8"], help="sparsities")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES), help="only these")
    parser.add_argument("--steps", nargs="*", type=int, default=[125, 500], help="optimizer steps, a run each")
    parser.add_argument("--preset", default="best", choices=list(PRESETS), help="of the one-shot directory")
    parser.add_argument("--samples", type=int, default=8192, help="at most so many training samples")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a pass")
    parser.add_argument("--accumulate", type=int, default=2, help="passes a step")
    parser.add_argument("--lr", type=float, default=5e-4, help="highest learning rate")
    parser.add_argument("--interval", type=int, default=8, help="steps between projections of admm")
    parser.add_argument("--dtype", default="auto", help="of what is computed: auto trains in float32")
    parser.add_argument("--render", action="store_true", help="write tables of what was noted, run nothing")
    add_arguments(parser)
    given = parser.parse_args()
    study = replace(make_study(given, given.model, given.calibrate), compute=given.dtype)
    ledger = Ledger(given.runs or study.folder / "recovery.jsonl")
    if not given.render:
        run(study, ledger, given)
    publish(render(ledger), given.out)


if __name__ == "__main__":
    main()
