"""The layer ratios file: what is to go of every linear, and why."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimcli.errors import InputError, MismatchError
from trimcli.files.documents import read_json
from trimcli.files.forms import MODEL, NUMBER, OBJECT, SIZE, TEXT, Each, Must, check_form
from trimcli.files.manifest import LAYER_SPARSITY, ModelFingerprint, check_model, manifest

FORM = {
    "method": Must(TEXT),
    "parameters": Must(OBJECT),
    "target": Must(NUMBER),
    "numerics": Must(TEXT),
    "sparsity": Must(Each(Must(NUMBER))),
    "metric": Each(NUMBER),
    "pattern": Each(Must((Must(SIZE), Must(SIZE)))),
    "model": MODEL,
    "commands": [Must(TEXT)],
    "command_line": TEXT,
}


@dataclass(frozen=True)
class LayerSparsity:
    """A sparsity for every linear of a model; reference numerics may ask for more than 1, which is read back as 1.

    target: mean over all weights. metric: what each was derived from. pattern: for mixed N:M, name -> (kept, group).
    model: without content, any of that structure.
    """

    method: str
    parameters: dict[str, Any]
    target: float
    numerics: str
    sparsity: dict[str, float]
    metric: dict[str, float | None]
    pattern: dict[str, tuple[int, int]] | None
    model: ModelFingerprint
    path: Path | None = field(default=None, compare=False)

    def document(self, options: Mapping[str, Any], sources: Mapping[str, Path | None]) -> dict[str, Any]:
        """The JSON form: a manifest with this object's fields, without `pattern` where there is none."""
        outside = {"path", "model", *(["pattern"] if self.pattern is None else [])}
        fields = {name: value for name, value in vars(self).items() if name not in outside}
        return manifest(LAYER_SPARSITY, "alloc-layers", options, self.model, sources, **fields)

    @classmethod
    def load(cls, path: Path) -> "LayerSparsity":
        """Read a layer ratios file. Raises InputError (missing, damaged) and MismatchError (schema)."""
        found = read_json(path, LAYER_SPARSITY)
        check_form(found, FORM, path, "layer ratios")
        try:
            sparsity = {name: float(value) for name, value in found["sparsity"].items()}
            pattern, metric = found.get("pattern"), found.get("metric") or {}
            if pattern is not None:
                pattern = {name: (int(kept), int(group)) for name, (kept, group) in pattern.items()}
            result = cls(
                method=str(found["method"]),
                parameters=dict(found["parameters"]),
                target=float(found["target"]),
                numerics=str(found["numerics"]),
                sparsity=sparsity,
                metric={name: None if metric.get(name) is None else float(metric[name]) for name in sparsity},
                pattern=pattern,
                model=ModelFingerprint(**(found.get("model") or {"id": "unknown", "structure": ""})),
                path=path,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            reason = f"{type(problem).__name__}: {problem}"
            raise InputError(f"{path} is not a whole layer ratios file ({reason}); make it anew.") from None
        for name, value in sparsity.items():
            if result.numerics == "reference" and 1 < value < math.inf:
                sparsity[name] = 1.0
            elif not 0 <= value <= 1:
                raise InputError(f"{path} gives {name} the sparsity {value}, outside 0..1; correct it.")
        for name, (kept, group) in (pattern or {}).items():
            if not 1 <= kept <= group:
                raise InputError(f"{path} has {name} keep {kept} of {group}, no N:M pattern; correct it.")
        if pattern is not None and pattern.keys() != sparsity.keys():
            raise InputError(f"{path} has other names under `pattern` than under `sparsity`; make it anew.")
        return result

    def check(
        self, shapes: Mapping[str, tuple[int, int]], model: ModelFingerprint, chosen: Collection[str] | None = None
    ) -> None:
        """Raise MismatchError unless this is for a model's linears (name -> (D_out, D_in)), or the `chosen` ones."""
        origin = self.path or Path("layer ratios")
        missing = [name for name in shapes if name not in self.sparsity and (chosen is None or name in chosen)]
        extra = [name for name in self.sparsity if name not in shapes]
        if missing or extra:
            what = f"it lacks {_listed(missing)} and has {_listed(extra)} besides"
            way = "make it anew for this model, with the same --only and --skip"
            raise MismatchError(f"{origin} is not for the linears of {model.id!r}: {what}; {way}.")
        for name, (_, group) in (self.pattern or {}).items():
            if (inputs := shapes[name][1]) % group:
                what = f"{origin} has groups of {group} for {name}, which has {inputs} inputs"
                raise MismatchError(f"{what}; make it anew.")
        check_model({"model": self.model.document()}, model, origin)


def _listed(names: list[str]) -> str:
    return (", ".join(names[:3]) or "none") + (f" and {len(names) - 3} more" if len(names) > 3 else "")
