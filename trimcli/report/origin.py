"""Where every number comes from: commands, models, sources, versions of each given file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimcli.files.manifest import CALIBRATION, LAYER_SPARSITY, MASKS, PACKED, PRUNED, RESULTS, ROWS
from trimcli.report.gather import Gathered, Source

WHAT = {
    CALIBRATION: "calibration",
    LAYER_SPARSITY: "layer ratios",
    MASKS: "masks",
    PACKED: "packed model",
    PRUNED: "pruned model",
    RESULTS: "results",
    ROWS: "row statistics",
}
# Enough of a SHA-256 to tell files apart by eye.
DIGITS = 16


def facts_of(source: Source) -> list[tuple[str, list[str]]]:
    """What a file says of itself, as name and lines; nothing that it does not say."""
    document = source.document
    found = [("file", [str(source.path)]), *_commands(document), *_model(document), *_sources(document)]
    if settings := _set(document.get("options") or {}):
        found.append(("options", [", ".join(settings)]))
    versions = {"trim": document.get("trim"), **(document.get("versions") or {})}
    if lm_eval := (document.get("lm_eval") or {}).get("version"):
        versions["lm-eval"] = lm_eval
    found.append(("versions", [", ".join(f"{name} {text}" for name, text in versions.items() if text)]))
    if document.get("device"):
        found.append(("computed", [f"on {document['device']} in {document.get('compute_dtype', 'its dtype')}"]))
    if document.get("seconds") is not None:
        found.append(("took", [f"{document['seconds']:,.1f} s{_memory(document.get('peak_memory') or {})}"]))
    if remarks := document.get("remarks"):
        found.append(("remarks", [str(remark) for remark in remarks]))
    return found


def commands_of(gathered: Gathered) -> list[str]:
    """Every command behind the given files, each once."""
    lines = [line for source in gathered.sources for _, lines in _commands(source.document) for line in lines]
    return list(dict.fromkeys(lines))


def versions_of(gathered: Gathered) -> list[str]:
    """Every version behind the given files, such as "torch 2.13.0", each once."""
    found = []
    for source in gathered.sources:
        found.append(f"trim {source.document['trim']}" if source.document.get("trim") else "")
        found += [f"{name} {text}" for name, text in (source.document.get("versions") or {}).items()]
    return [text for text in dict.fromkeys(found) if text]


def _commands(document: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    lines = list(document.get("commands") or [])
    behind = document.get("pruning") or {}
    for line in (*(behind.get("commands") or []), behind.get("command_line"), document.get("command_line")):
        if line and line not in lines:
            lines.append(line)
    if not lines:
        return []
    return [("command" if len(lines) == 1 else "commands", [str(line) for line in lines])]


def _model(document: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    model = document.get("model")
    if not model:
        return []
    prints = [f"{part} {str(model[part])[:DIGITS]}" for part in ("structure", "content") if model.get(part)]
    return [("model", [str(model.get("id")), *prints])]


def _sources(document: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    lines = [
        f"{role}: {Path(source['path']).name}, SHA-256 {source['sha256'][:DIGITS]}"
        for role, source in (document.get("sources") or {}).items()
    ]
    return [("made from", lines)] if lines else []


def _set(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Options that were set, nested ones by dotted name."""
    found = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            found += _set(value, f"{prefix}{name}.")
        elif value not in (None, False, "", []):
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            found.append(f"{prefix}{name} {text}")
    return found


def _memory(peak: Mapping[str, int]) -> str:
    return "".join(f", peak {place} memory {count / 2**30:.2f} GiB" for place, count in peak.items())
