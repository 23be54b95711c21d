"""The model card section of a pruned directory: what was pruned, how, and the commands that did it."""

import re
from collections.abc import Mapping
from typing import Any

from trimcli.artifacts import PACKED

BEGIN, END = "<!-- trim:begin -->", "<!-- trim:end -->"
FRONT_MATTER = "---\nlibrary_name: transformers\ntags:\n- pruned\n- sparse\n---\n"


def with_card(readme: str | None, document: Mapping[str, Any]) -> str:
    """A directory's README.md: `readme` (None: a new one) with the section of `document` added or renewed."""
    section = model_card_section(document)
    if readme is None:
        return f"{FRONT_MATTER}\n{section}"
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return before + section.rstrip("\n") + after
    return readme.rstrip("\n") + "\n\n" + section


def model_card_section(document: Mapping[str, Any]) -> str:
    """Markdown, between the markers `<!-- trim:begin -->` and `<!-- trim:end -->`.

    document: `trim.json` of a pruned or packed directory. Its `pruning`, where present, is the manifest of
    the masks that were applied; otherwise the document is that of the prune itself.
    """
    pruning = document.get("pruning") or document
    lines = [BEGIN, "## Pruned with trim", ""]
    model = (pruning.get("model") or {}).get("id")
    linears = document["linears"]
    lines.append(
        f"{len(linears)} weight matrices of `{model}` were pruned: {document['sparsity']:.2%} of their "
        "weights are zero. Embeddings, head, biases and norms are untouched."
    )
    lines += ["", *_settings(pruning), ""]
    commands = document.get("commands") or []
    if commands:
        lines += ["Commands:", "", "```sh", *commands, "```", ""]
    lines += [*_table(linears), ""]
    if document["schema"] == PACKED:
        lines += [
            "The checkpoint is packed: pruned matrices are stored as keep bits and kept values. "
            "`trim unpack DIR -o OUT` writes the ordinary one, `trimcli.load_packed(DIR)` loads it.",
            "",
        ]
    lines += [f"`trim verify` checks these figures against the shards (trim {document['trim']}).", END, ""]
    return "\n".join(lines)


def _settings(pruning: Mapping[str, Any]) -> list[str]:
    """Every option that was set: off, absent and empty ones say nothing."""
    options = pruning.get("options") or {}
    shown = {key: value for key, value in options.items() if value not in (None, False, "", [], {})}
    return [f"- {key.replace('_', ' ')}: `{value}`" for key, value in shown.items()]


def _table(linears: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sparsity by kind of matrix: its name inside the decoder layer, experts counted together."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, entry in linears.items():
        kinds.setdefault(_kind(name), []).append(entry)
    rows = ["| matrices | number | weights | zero | sparsity |", "|---|---:|---:|---:|---:|"]
    for kind, members in kinds.items():
        weights = sum(member["shape"][0] * member["shape"][1] for member in members)
        zeros = sum(member["zeros"] for member in members)
        rows.append(f"| `{kind}` | {len(members)} | {weights:,} | {zeros:,} | {zeros / weights:.2%} |")
    return rows


def _kind(name: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `mlp.up_proj`."""
    inside = re.sub(r"^.*?\.\d+\.", "", name, count=1)
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", inside)
