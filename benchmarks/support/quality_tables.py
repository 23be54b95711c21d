"""Tables and plots of `benchmarks.quality`, from the runs that were noted."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.support.provenance import table
from benchmarks.support.questions import CHOICES

Facts = Mapping[str, Any]
NOTES = Path(__file__).parents[1] / "quality-notes.md"
INTRODUCTION = """\
Every figure is at the same count of zeros, calibrated on one text and measured on others. *Nats* is the mean
cross-entropy above the dense model's: 0 is no damage, and it adds up where perplexities multiply. Each is the mean over
calibration draws, with the largest distance from it. *Of the best published* compares with the lowest published nats of
the same class at the same target, on samples of the same origin. *Original weights*: only the mask is chosen. *Updated
weights*: kept weights change, from calibration samples alone, layer by layer."""


def render(entries: Sequence[Mapping[str, Any]], out: Path | None) -> list[str]:
    """The results file, and beside it, where it is a file, the plots that it shows."""
    runs = [entry["facts"] for entry in {_identity(entry): entry for entry in entries}.values()]
    lines = ["# Damage at equal counts of zeros", "", INTRODUCTION, ""]
    for model, calibrated in dict.fromkeys((run["model"], run["calibrated on"]) for run in runs):
        mine = [run for run in runs if (run["model"], run["calibrated on"]) == (model, calibrated)]
        dense = next(run for run in mine if run["label"] == "dense")
        samples = calibrated.split(", ")[-1]
        title, stem = f"{model}, {samples}", f"{model}-{samples.split()[0]}"
        lines += [f"## {title}", "", f"- calibrated on {calibrated}", f"- measured on {dense['measured on']}"]
        lines += [f"- {one}" for one in dict.fromkeys(f"{run['machine']}; {run['versions']}" for run in mine)]
        for text in dense["perplexity"]:
            lines += ["", f"### {title} on {text}, dense {dense['perplexity'][text]:.2f}", ""]
            lines += _table(mine, dense, text)
            if out is not None:
                picture = out.with_name(f"quality-{stem}-{Path(text).stem}.svg")
                _plot(mine, dense, text, picture)
                lines += ["", f"![nats above dense against sparsity and against seconds]({picture.name})"]
        lines += [*_accuracies(mine, title), ""]
    return [*lines, *NOTES.read_text(encoding="utf-8").splitlines()]


def _identity(entry: Mapping[str, Any]) -> str:
    facts = entry["facts"]
    return repr([facts["model"], facts["calibrated on"], facts["label"], facts["target"], facts.get("draw")])


def nats(runs: Iterable[Facts], dense: Facts, text: str) -> list[float]:
    """What each run's mean cross-entropy is above the dense model's."""
    return [math.log(run["perplexity"][text] / dense["perplexity"][text]) for run in runs]


def _grouped(runs: Iterable[Facts]) -> dict[tuple[str, str], list[Facts]]:
    found: dict[tuple[str, str], list[Facts]] = {}
    for run in runs:
        if run["label"] != "dense":
            found.setdefault((run["label"], run["target"]), []).append(run)
    return found


def _table(runs: Sequence[Facts], dense: Facts, text: str) -> list[str]:
    cells = _grouped(runs)
    targets = sorted({target for _, target in cells}, key=lambda target: (":" in target, target))
    lines: list[str] = []
    for weights in dict.fromkeys(run["weights"] for run in runs if run["label"] != "dense"):
        labels = {run["label"]: run["published"] for run in runs if run.get("weights") == weights}
        own = {run["label"]: run.get("self_share") for run in runs}
        worst = {
            label: max(mean(nats(found, dense, text)) for (one, _), found in cells.items() if one == label)
            for label in labels
        }
        labels = dict(sorted(labels.items(), key=lambda item: (not item[1], -worst[item[0]])))
        rows = []
        for label, published in labels.items():
            row = [label]
            for target in targets:
                found = nats(cells.get((label, target), []), dense, text)
                others = [
                    mean(nats(cells[one, target], dense, text))
                    for one, theirs in labels.items()
                    if theirs and (one, target) in cells and own[one] == own[label]
                ]
                row.append(_cell(found, min(others, default=None), dense["perplexity"][text], published))
            rows.append(row)
        lines += [*table((f"{weights}: nats (perplexity)", *targets), rows), ""]
    return lines[:-1]


def _accuracies(runs: Sequence[Facts], title: str) -> list[str]:
    """Shares of a zero-shot task's questions that are answered right, where they were asked."""
    asked = [run for run in runs if "accuracy" in run]
    if not asked:
        return []
    cells = _grouped(asked)
    targets = sorted({target for _, target in cells}, key=lambda target: (":" in target, target))
    dense = next(run["accuracy"] for run in asked if run["label"] == "dense")
    rows = []
    for label in dict.fromkeys(label for label, _ in cells):
        found = [[run["accuracy"] for run in cells.get((label, target), [])] for target in targets]
        rows.append([label, *(f"{mean(one):.1%}" if one else "-" for one in found)])
    lines = table((f"questions answered right, dense {dense:.1%}, by chance {1 / CHOICES:.0%}", *targets), rows)
    return ["", f"### {title}, which of four pieces of text goes on", "", *lines]


def _cell(found: list[float], best: float | None, dense: float, published: bool) -> str:
    if not found:
        return "-"
    middle = mean(found)
    spread = f" ± {max(abs(one - middle) for one in found):.3f}" if len(found) > 1 else ""
    share = f", **{middle / best:.0%}** of the best published" if best and not published else ""
    return f"{middle:.3f}{spread} ({dense * math.exp(middle):.1f}){share}"


def _plot(runs: Sequence[Facts], dense: Facts, text: str, out: Path) -> None:
    """Nats against sparsity, and at 70% against seconds where any were noted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "trim"
    cells = _grouped(run for run in runs if ":" not in run["target"])
    timed = any("seconds" in run for (_, target), found in cells.items() if target == "0.7" for run in found)
    panels = 2 if timed else 1
    figure, axes = plt.subplots(1, panels, figsize=(4 + 4.5 * panels, 4.5), layout="constrained", squeeze=False)
    left, right = axes[0, 0], axes[0, -1]
    for place, label in enumerate(dict.fromkeys(label for label, _ in cells)):
        points = {float(target): found for (one, target), found in cells.items() if one == label}
        published = next(iter(points.values()))[0]["published"]
        style = {
            "linestyle": ":" if published else "-",
            "marker": "o" if published else "D",
            "markersize": 4,
            "color": f"C{place % 10}",
        }
        order = sorted(points)
        left.plot(order, [mean(nats(points[at], dense, text)) for at in order], label=label, **style)
        if seconds := [run["seconds"] for run in points.get(0.7, []) if "seconds" in run]:
            middle = mean(nats(points[0.7], dense, text))
            right.scatter([mean(seconds)], [middle], color=style["color"], marker=style["marker"])
    left.set(xlabel="sparsity", ylabel="nats above dense", yscale="log", title=text)
    if timed:
        right.set(xlabel="seconds of the prune, beside other work", xscale="log", yscale="log", title="at 70%")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
