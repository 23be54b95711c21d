"""Module names against checkpoint names, by transformers' own mapping: what it would load is what is pruned."""

import contextlib
import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimcli.model.matrix import Joined, Piece


@dataclass
class Conversion:
    """A parameter (the first of several) that transformers builds from pieces, (pattern, checkpoint key)."""

    name: str
    converter: Any
    pieces: list[tuple[str, str]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The names of all parameters that it yields."""
        first, *others = self.converter.target_patterns
        return [self.name, *(self.name.replace(first, other) for other in others)]

    def build(self, model: Any, load: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters this conversion yields, by full module name."""
        converter = copy.deepcopy(self.converter)
        for pattern, key in self.pieces:
            converter.add_tensor(self.name, key, pattern, load(key))
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def joined(self, shape_of: Callable[[str], tuple[int, ...]], shape: tuple[int, ...]) -> list[Piece]:
        """Where each matrix lies in a stack of experts of this `shape`; empty where they are put together otherwise."""
        from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

        operations = self.converter.operations
        steps = [(type(step), getattr(step, "dim", None)) for step in operations]
        if len(shape) != 3 or len(self.converter.target_patterns) != 1:
            return []
        if steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            return self._merged(shape_of)
        if len(steps) == len(self.pieces) == 1 and isinstance(operations[0], Transpose):
            turn, (_, key) = operations[0], self.pieces[0]
            stays = turn.check_dims and tuple(shape_of(key)) == shape
            if {turn.dim0, turn.dim1} == {1, 2}:
                whole = [Joined(expert, 0, shape[1]) for expert in range(shape[0])]
                return [Piece(key, (shape[1], shape[2]), one, one.expert, not stays) for one in whole]
        return []

    def _merged(self, shape_of: Callable[[str], tuple[int, ...]]) -> list[Piece]:
        """One expert's after another, those of a source pattern below those of the one before."""
        found, start = [], 0
        for pattern in self.converter.source_patterns:
            keys = [key for own, key in self.pieces if own == pattern]
            shapes = {shape_of(key) for key in keys}
            if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
                return []
            stop = start + shape[0]
            found += [Piece(key, (shape[0], shape[1]), Joined(expert, start, stop)) for expert, key in enumerate(keys)]
            start = stop
        return found


@dataclass(frozen=True)
class NameMap:
    """plain: parameter or buffer name -> checkpoint key. conversions: what is assembled from several keys."""

    plain: dict[str, str]
    conversions: list[Conversion]


def map_names(model: torch.nn.Module, keys: Iterable[str]) -> NameMap:
    """Match the checkpoint's `keys` with the names in `model.state_dict()`; what the model lacks is left out."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return _map_names_v4(model, keys)

    wanted: dict[str, Any] = model.state_dict()
    prefix: str = model.base_model_prefix  # type: ignore[assignment]
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    plain: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            continue
        if pattern is None:
            plain[name] = key
        else:
            entry = conversions.setdefault(name, Conversion(name, by_pattern[pattern]))
            entry.pieces.append((pattern, key))
    return NameMap(plain, list(conversions.values()))


def saved_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """What transformers would save of a model, its weights on the meta device: checkpoint key -> shape."""
    meta = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    with contextlib.suppress(ImportError):  # version 4 saves everything as it is
        from transformers.core_model_loading import revert_weight_conversion

        meta = revert_weight_conversion(model, meta)
    return {key: tuple(tensor.shape) for key, tensor in meta.items()}


def _map_names_v4(model: torch.nn.Module, keys: Iterable[str]) -> NameMap:
    """The same for transformers 4: regular expressions on the class, and the base prefix added or removed."""
    wanted = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    norms = {r"LayerNorm\.beta$": "LayerNorm.bias", r"LayerNorm\.gamma$": "LayerNorm.weight"}
    renames = {**getattr(model, "_checkpoint_conversion_mapping", {}), **norms}
    plain = {}
    for key in keys:
        name = key
        for source, target in renames.items():
            name = re.sub(source, target, name)
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in wanted:
                plain[candidate] = key
                break
    return NameMap(plain, [])
