"""The model card section of a pruned directory: what was pruned, how, and the commands that did it."""

import math
import re
from collections.abc import Mapping
from typing import Any

from trimcli.files.manifest import PACKED
from trimcli.files.names import kinds_of
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.rows.base import ROWS
from trimcli.methods.scores import SCORES
from trimcli.methods.updates.base import UPDATES

BEGIN, END = "<!-- trim:begin -->", "<!-- trim:end -->"
HOW_IT_RAN = {"device", "dtype", "batch_size", "resume", "save_model", "stats_out", "trust_remote_code"}
FRONT_MATTER = "---\nlibrary_name: transformers\ntags:\n- pruned\n- sparse\n---\n"


def with_card(readme: str | None, document: Mapping[str, Any]) -> str:
    """A directory's README.md: `readme` (None: a new one) with the section of `document` added or renewed."""
    section = model_card_section(document)
    if readme is None:
        return f"{FRONT_MATTER}\n{section}"
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + section.rstrip("\n") + after if end else readme.rstrip("\n") + "\n\n" + section


def model_card_section(document: Mapping[str, Any]) -> str:
    """Markdown between the markers. document: `trim.json`, of a prune or, with `pruning`, of the masks applied."""
    pruning, linears = document.get("pruning") or document, document["linears"]
    model = (pruning.get("model") or {}).get("id")
    what = (
        f"{len(linears)} weight matrices of {_code(model)} were pruned: {document['sparsity']:.2%} of their "
        f"weights are zero. {_untouched(pruning)}"
    )
    lines = [BEGIN, "## Pruned with trim", "", what, "", *_settings(pruning), ""]
    if commands := document.get("commands"):
        fence = _fence("\n".join(commands), 3)
        lines += ["Commands:", "", f"{fence}sh", *commands, fence, ""]
    lines += [*_trained(document), *_table(linears), ""]
    if document["schema"] == PACKED:
        packed = (
            "The checkpoint is packed: pruned matrices are stored as keep bits and kept values. "
            "`trim unpack DIR -o OUT` writes the ordinary one, `trimcli.load_packed(DIR)` loads it."
        )
        lines += [packed, ""]
    lines += [f"`trim verify` checks these figures against the shards (trim {document['trim']}).", END, ""]
    return "\n".join(lines)


def _untouched(pruning: Mapping[str, Any]) -> str:
    errors = (pruning.get("reconstruction") or {}).values()
    if any(pair is not None and pair[1] < pair[0] for pair in errors):
        return "Norms and biases of the decoder layers were trained along with them; all else is untouched."
    return "What is not listed below is untouched."


def _trained(document: Mapping[str, Any]) -> list[str]:
    """How the directory was fine-tuned, where it was."""
    training = document.get("training")
    if not training:
        return []
    phases = training["phases"]
    measured = {step: loss for phase in phases[-1:] for step, loss in phase["heldout"]}
    if not (measured and phases[0]["heldout"] and phases[-1]["best"] in measured):
        return []
    losses = phases[0]["heldout"][0][1], measured[phases[-1]["best"]]
    steps, tokens = (sum(phase.get(what) or 0 for phase in phases) for what in ("steps", "tokens"))
    teacher = f", taught by {_code(training['teacher'])}" if training.get("teacher") else ""
    what = f"Fine-tuned ({training['mode']}{teacher}): {steps:,} steps, {tokens:,} tokens, every zero kept; "
    return [f"{what}held-out loss {losses[0]:.4f} before, {losses[1]:.4f} after.", ""]


def _settings(pruning: Mapping[str, Any]) -> list[str]:
    """What shaped the result, by option: off, absent and empty ones say nothing."""
    options = dict(pruning.get("options") or {})
    options = {**(options.pop("recipe", None) or {}), **options}
    if isinstance(options.get("update"), Mapping) and options.get("method") != "sparsegpt":
        del options["update"]  # early manifests give the update's options whether or not there was one
    if (options.get("calibrate") or {}).get("tokens"):  # then nothing was drawn, and these are defaults unused
        drawn = ("dataset", "nsamples", "seqlen", "seed")
        options["calibrate"] = {key: value for key, value in options["calibrate"].items() if key not in drawn}
    elif (options.get("calibrate") or {}).get("images"):
        options["calibrate"] = {
            key: value for key, value in options["calibrate"].items() if key not in ("dataset", "bos")
        }
    elif options.get("calibrate") and pruning.get("bos"):
        options["calibrate"] = {**options["calibrate"], "bos": pruning["bos"]}  # what `auto` came to
    shown = {key: value for key, value in options.items() if _shapes(key, value)}
    found = [f"- {key.replace('_', ' ')}: {_spelled(value)}" for key, value in shown.items()]
    if "score" in options:  # what early manifests do not name
        chosen: list[tuple[Mapping[str, Any], Any]]
        chosen = [(SCORES, options["score"]), (ROWS, options.get("rows")), (UPDATES, options.get("update"))]
        chosen.append((ALLOCATIONS, (pruning.get("allocation") or {}).get("method")))
        sources = dict.fromkeys(registry[str(name)].source for registry, name in chosen if str(name) in registry)
        more = {"barber": "Su et al. 2024", "reconstruct": "Guo et al. 2024"}
        found.append(f"- sources: {'; '.join([*sources, *(more[key] for key in more if options.get(key))])}")
    return found


def _shapes(key: str, value: Any) -> bool:
    return key not in HOW_IT_RAN and value is not None and value is not False and value not in ("", [], {})


def _spelled(value: Any) -> str:
    if isinstance(value, Mapping):
        parts = {key.replace("_", " "): part for key, part in value.items() if _shapes(key, part)}
        return ", ".join(f"{key} {_spelled(part)}" for key, part in parts.items())
    if isinstance(value, list):
        return ", ".join(_spelled(part) for part in value)
    return "yes" if value is True else _code(value)


def _code(value: Any) -> str:
    """A value as Markdown shows it, letter by letter."""
    text = " ".join(str(value).split())
    fence = _fence(text, 1)
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _fence(text: str, least: int) -> str:
    """Backticks, `least` or more, that do not stand in the text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def _table(linears: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sparsity by kind of matrix: its name inside the layer, experts counted together."""
    rows = ["| matrices | number | weights | zero | sparsity |", "|---|---:|---:|---:|---:|"]
    for kind, names in kinds_of(linears).items():
        weights = sum(math.prod(linears[name]["shape"]) for name in names)
        zeros = sum(linears[name]["zeros"] for name in names)
        rows.append(f"| `{kind}` | {len(names)} | {weights:,} | {zeros:,} | {zeros / weights:.2%} |")
    return rows
