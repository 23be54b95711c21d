"""Where every number comes from: commands, models, sources, versions of each given file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimcli.report.gather import Source

# Enough of a SHA-256 to tell files apart by eye.
DIGITS = 16


def facts_of(source: Source) -> dict[str, list[str]]:
    """What a file says of itself, name -> lines; nothing that it does not say."""
    document = source.document
    commands, model, device = commands_of(document), document.get("model") or {}, document.get("device")
    peaks = (document.get("peak_memory") or {}).items()
    memory = "".join(f", peak {place} memory {count / 2**30:.2f} GiB" for place, count in peaks)
    facts = {
        "file": [str(source.path)],
        "command" if len(commands) == 1 else "commands": commands,
        "model": [str(model.get("id"))] if model else [],
        "made from": [
            f"{role}: {Path(origin['path']).name}, SHA-256 {origin['sha256'][:DIGITS]}"
            for role, origin in (document.get("sources") or {}).items()
        ],
        "options": [", ".join(_set(document.get("options") or {}))],
        "versions": [", ".join(versions_of(document))],
        "computed": [f"on {device} in {document.get('compute_dtype', 'its dtype')}"] if device else [],
        "took": [f"{document['seconds']:,.1f} s{memory}"] if document.get("seconds") is not None else [],
        "remarks": [str(remark) for remark in document.get("remarks") or []],
    }
    facts["model"] += [f"{part} {model[part][:DIGITS]}" for part in ("structure", "content") if model.get(part)]
    return {name: lines for name, lines in facts.items() if any(lines)}


def commands_of(document: Mapping[str, Any]) -> list[str]:
    """Every command behind a file, each once."""
    behind = document.get("pruning") or {}
    lines = [*(document.get("commands") or []), *(behind.get("commands") or [])]
    lines += [behind.get("command_line"), document.get("command_line")]
    return [str(line) for line in dict.fromkeys(lines) if line]


def versions_of(document: Mapping[str, Any]) -> list[str]:
    """Every version behind a file, such as "torch 2.13.0"."""
    lm_eval = (document.get("lm_eval") or {}).get("version")
    found = {"trim": document.get("trim"), **(document.get("versions") or {}), "lm-eval": lm_eval}
    return [f"{name} {version}" for name, version in found.items() if version]


def _set(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Options that were set, nested ones by dotted name."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _set(value, f"{prefix}{name}.")
        elif value not in (None, False, "", []):
            yield f"{prefix}{name} {','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
