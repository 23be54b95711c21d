"""The skeleton: a transformers model on the meta device, buffers real, filled one decoder layer at a time."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimcli.errors import InputError, first_line
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.manifest import ModelFingerprint
from trimcli.files.masks import MaskFile
from trimcli.files.names import grouped
from trimcli.files.tensors import dtype_name
from trimcli.memory import Limits, collect_as_usual, return_what_is_freed, return_what_was_kept
from trimcli.model.device import compute_device, compute_dtype, limit_device
from trimcli.model.empty import (
    architectures,
    build_empty,
    classifies_images,
    empty,
    expert_counts,
    find_layers,
    set_parameter,
)
from trimcli.model.fingerprint import fingerprint_of
from trimcli.model.matrix import Matrix, finite, matrices_in, routers_in
from trimcli.model.names import NameMap, map_names, saved_shapes
from trimcli.model.outside import find_outside
from trimcli.options import RunOptions

FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}

Form = Literal["recorded", "suspended"]
"""How hidden states pass the layers: called as was recorded, or inside of the model's own, suspended forward pass."""

Returns = tuple[Literal["tensor", "tuple", "list"], int]
"""What a layer gives back: hidden states alone, or a sequence of so many things that begins with them."""


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer: index, full module name, module, and its matrices in module order."""

    index: int
    name: str
    module: nn.Module
    linears: list[Matrix]


class LeftDense(NamedTuple):
    """A matrix that stays dense: its shape, and why."""

    shape: tuple[int, ...]
    why: str


class Skeleton:
    """A transformers model without weights, and the means to fill it in parts. dtype: of the computation.

    form, returns: what `trimcli.pipeline.proof` found to hold for the model; returns is None while nobody looked.
    limits: what may be taken of memory; the rest keeps its walks within them (`trimcli.pipeline.fit`).
    spill: the folder in whose files the hidden states of its walks lie, None for memory. on_host: whether that is the
    host's; None where that hangs on what the compute device has free. batch_tokens: in a batch that is not chosen
    otherwise, logit_tokens: whose logits are held at a time; None for what suits the device.
    linears: the layers' matrices by full module name. outside: those that no layer has, which no walk prunes;
    outside_dense: why other weights there stay dense, by the module's name, or the parameter's.
    """

    form: Form = "recorded"
    returns: Returns | None = None
    limits = Limits()
    spill: Path | None = None
    on_host: bool | None = None
    batch_tokens: int | None = None
    logit_tokens: int | None = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        self.model = build_empty(checkpoint, dtype, trust_remote_code=trust_remote_code)
        self.config = self.model.config
        self.config.__dict__.pop("quantization_config", None)  # what is read is not quantized
        self._names = map_names(self.model, checkpoint.keys()) if checkpoint.has_weights else NameMap({}, [])
        # Taken now: once untied, or filled and emptied, parameters that were tied are no longer one.
        self._shapes = {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}
        self._tied = self._tied_names()
        made = {conversion.name for conversion in self._names.conversions}
        if checkpoint.has_weights:
            self._refuse_other_shapes(made)
        found = find_layers(self.model)
        self._inside = tuple(f"{name}." for name, _ in found)
        self._kept = dict.fromkeys(self._used_twice(self._inside), "more than one layer uses it")
        self.layers = list(self._found_in(found))
        self.linears = {linear.name: linear for layer in self.layers for linear in layer.linears}
        inside = {module for layer in self.layers for module in layer.module.modules()}
        stored, shared = checkpoint.has_weights, self._shared()
        self.outside, self.outside_dense = find_outside(self.model, inside, self.key_of, shared, stored=stored)
        self._cover: dict[str, tuple[Matrix, MaskFile]] = {}
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    @property
    def images(self) -> bool:
        """Whether it classifies images; else it reads text."""
        return classifies_images(self.checkpoint.config_document)

    def is_last(self, layer: DecoderLayer) -> bool:
        """Whether no decoder layer comes after it."""
        return layer.index + 1 == len(self.layers)

    def place(self, layer: DecoderLayer) -> str:
        """Which of the decoder layers it is, as progress says it."""
        return f"layer {layer.index + 1}/{len(self.layers)}"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Full module name -> (D_out, D_in) of every linear."""
        return {name: linear.shape for name, linear in self.linears.items()}

    def _found_in(self, modules: list[tuple[str, nn.Module]]) -> Iterator[DecoderLayer]:
        """The layers with their matrices; notes what stays dense, and why."""
        checkpoint, experts, names = self.checkpoint, expert_counts(self.config), self._names
        shapes = {key: spec.shape for key, spec in checkpoint.specs().items()} if checkpoint.has_weights else {}
        if experts and not checkpoint.has_weights:  # whose matrices are called what the checkpoint would call them
            shapes = saved_shapes(self.model)
            names = map_names(self.model, shapes)
        own = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        pieces = {one.name: one.joined(shapes.__getitem__, own.get(one.name, ())) for one in names.conversions}
        whole = {name for name, found in pieces.items() if not found}
        self._kept |= dict.fromkeys(whole, "the checkpoint holds it in pieces")
        keys = {name: key for name, key in names.plain.items() if name not in pieces}
        for index, (name, module) in enumerate(modules):
            self._kept.update(dict.fromkeys(routers_in(module, name, experts), "it routes or gates"))
            known: dict[str, Any] = {"dense": self._kept, "experts": experts, "pieces": pieces}
            linears = list(matrices_in(module, name, keys.get, stored=checkpoint.has_weights, **known))
            if not checkpoint.has_weights:
                linears = [replace(linear, key=None) for linear in linears]
            yield DecoderLayer(index, name, module, linears)

    def _tied_names(self) -> dict[str, str]:
        """Parameter name -> the name whose checkpoint tensor it shares.

        As transformers 5 does, one that the checkpoint has with other values of its own is no longer tied.
        """
        tied: dict[str, str] = {}
        listed = getattr(self.model, "all_tied_weights_keys", {})  # transformers 4 ties in any case
        parameters = self.model.named_parameters(remove_duplicate=False)
        for same in grouped(parameters, lambda item: id(item[1])).values():
            names = [name for name, _ in same]
            source = next((name for name in names if name in self._names.plain), names[0])
            for name in names:
                own = name in self._names.plain and (name in listed or source in listed)
                if own and name != source and not self._are_equal(name, source):
                    set_parameter(self.model, name, same[0][1].detach().clone())
                    for config in (self.config, self.config.get_text_config()):
                        config.tie_word_embeddings = False
                elif name != source:
                    tied[name] = source
        return tied

    def _are_equal(self, *names: str) -> bool:
        one, other = (self.checkpoint.load(self._names.plain[name]).to(self.dtype) for name in names)
        return torch.equal(one, other)

    def _refuse_other_shapes(self, made: Collection[str]) -> None:
        # One conversion may yield several parameters: which ones shows when it runs, in `_fill`.
        several = any(len(conversion.converter.target_patterns) > 1 for conversion in self._names.conversions)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in self.model.state_dict().items():
            key = self._key(name)
            if key is None:
                if name in parameters and not several and name not in made and name not in self._tied:
                    raise InputError(f"{self.checkpoint.directory} lacks a tensor for {name}; fetch the model anew.")
            elif (shape := self.checkpoint.spec(key).shape) != tuple(tensor.shape):
                what = f"{key} has shape {shape} where config.json calls for {tuple(tensor.shape)}"
                raise InputError(f"{self.checkpoint.directory}: {what}; fetch the model anew.")
            elif name in parameters and (dtype := self.checkpoint.spec(key).dtype) not in FLOATS:
                what = f"{self.checkpoint.directory} holds {key} as {dtype_name(dtype)}"
                raise InputError(f"{what}, which is not supported; convert the model.")

    def _used_twice(self, inside: tuple[str, ...]) -> Iterator[str]:
        """The parameters of the layers, whose names begin with these, that are one with another of theirs."""
        for same in grouped(self._tied, self._tied.__getitem__).items():
            names = [name for name in (same[0], *same[1]) if name.startswith(inside)]
            yield from names if len(names) > 1 else ()

    def left_dense(self) -> dict[str, LeftDense]:
        """Matrices inside the decoder layers that are not pruned, by full parameter name, and why."""
        pruned = {(linear.module, linear.parameter_name) for linear in self.linears.values()}
        return {
            full: LeftDense(tuple(parameter.shape), self._kept.get(full) or _other_form(parameter))
            for layer in self.layers
            for place, module in layer.module.named_modules(remove_duplicate=False)
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if parameter.ndim > 1 and (module, name) not in pruned
            for full in [".".join(filter(None, (layer.name, place, name)))]
        }

    def _shared(self) -> dict[str, str]:
        """Parameter name -> why it is not one module's alone: with which other it is one, or what it is made of."""
        made = {name for conversion in self._names.conversions for name in conversion.names}
        others = {source: name for name, source in self._tied.items()} | self._tied
        tied = {name: f"it is one with {other}" for name, other in others.items()}
        return dict.fromkeys(made, "the checkpoint holds it in pieces") | tied

    def matrices(self, named: Iterable[str] = ()) -> dict[str, Matrix]:
        """The layers' matrices by name, and those outside of the layers that are among `named`, such as masks'."""
        return self.linears | {name: self.outside[name] for name in named if name in self.outside}

    @contextmanager
    def covered(self, mask: MaskFile | None) -> Iterator[None]:
        """Lay masks over what lies outside of the layers whenever it is filled; what fills layers sees to theirs."""
        names = [] if mask is None else [name for name in mask.names if name in self.outside]
        before = self._cover
        self._cover = {f"{name}.weight": (self.outside[name], mask) for name in names if mask is not None}
        try:
            yield
        finally:
            self._cover = before

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        """Which model this is."""
        return fingerprint_of(self.checkpoint, self._shapes)

    def _key(self, parameter: str) -> str | None:
        """The checkpoint tensor that fills a parameter, which others may share."""
        return self._names.plain.get(self._tied.get(parameter, parameter))

    def key_of(self, parameter: str) -> str | None:
        """The checkpoint tensor that a parameter, by full name, alone is; None where several parameters use it."""
        return None if parameter in self._kept or parameter in self._tied else self._names.plain.get(parameter)

    def borrows(self, module: nn.Module) -> bool:
        """Whether the weight of a module outside the layers, once filled, is the checkpoint's own mapped memory."""
        if self.device.type != "cpu" or not self.checkpoint.has_weights:
            return False
        name = next(f"{name}.weight" for name, one in self.model.named_modules() if one is module)
        key = self._key(name)
        return key is not None and name not in self._cover and self.checkpoint.spec(key).dtype == self.dtype

    def stored_parameters(self) -> dict[str, str]:
        """Checkpoint tensor -> the parameter that it alone makes, by full name; tensors of tied ones have one each."""
        made = {name for conversion in self._names.conversions for name in conversion.names}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return {key: name for name, key in self._names.plain.items() if name in parameters and name not in made}

    def load_layer(self, layer: DecoderLayer) -> None:
        """Put a layer's parameters on the compute device in the compute dtype. Raises InputError on NaN or infinity."""
        self._fill(layer.name, layer.module, copy=True)

    def drop_layer(self, layer: DecoderLayer) -> None:
        """Put a layer's parameters back on the meta device."""
        empty(layer.module)
        return_what_was_kept()

    def load_everything(self) -> None:
        """Fill the whole model: what evaluating through other libraries needs. Tied parameters stay tied."""
        self._fill("", self.model, copy=True)
        self.model.tie_weights()

    def _fill(self, prefix: str, module: nn.Module, *, recurse: bool = True, copy: bool = False) -> None:
        """Fill what is empty. copy: for what will be written to: a tensor as stored is the checkpoint's own memory."""
        dotted = f"{prefix}." if prefix else ""
        made: dict[str, Tensor] = {}
        for conversion in self._names.conversions:
            if any(name.startswith(dotted) for name in conversion.names):
                try:
                    made |= conversion.build(self.model, self.checkpoint.load)
                except RuntimeError as problem:
                    what = f"the tensors of {self.checkpoint.directory} do not make up {conversion.name}"
                    raise InputError(f"{what} ({first_line(problem)}); fetch the model anew.") from None
        for name, parameter in list(module.named_parameters(recurse=recurse, remove_duplicate=False)):
            full = dotted + name
            if parameter.device.type != "meta":
                continue
            key = self._key(full)
            if key is None and full not in made:
                raise InputError(f"{self.checkpoint.directory} lacks a tensor for {full}; fetch the model anew.")
            stored = made[full] if key is None else self.checkpoint.load(key)
            if stored.shape != parameter.shape:
                pair = f"{tuple(stored.shape)} where config.json calls for {tuple(parameter.shape)}"
                what = f"the tensors of {self.checkpoint.directory} give {full} the shape {pair}"
                raise InputError(f"{what}; fetch the model anew.")
            # Outside the layers: rows of tokens that no text has, say. What they do to outputs is seen there.
            inside = full.startswith(self._inside)
            value = finite(stored, key or full, self.checkpoint) if inside else stored
            dtype = self.dtype if value.is_floating_point() else value.dtype
            value = value.to(self.device, dtype, copy=copy or full in self._cover)
            if full in self._cover:
                matrix, mask = self._cover[full]
                matrix.inside(value).masked_fill_(~mask.keep(matrix.name).to(self.device), 0)
            set_parameter(module, name, value)
        for name, buffer in module.named_buffers(recurse=recurse):
            key = self._names.plain.get(dotted + name)
            if key is not None:
                buffer.copy_(self.checkpoint.load(key).to(buffer.dtype))

    @contextmanager
    def filled_on_use(self, *, but: nn.Module | None = None) -> Iterator[None]:
        """Fill modules outside the decoder layers (but `but`) when the forward pass calls them; empty them after."""
        return_what_was_kept()
        inside = {id(module) for layer in self.layers for module in layer.module.modules()}
        with ExitStack() as undo:
            for name, module in self.model.named_modules():
                if id(module) in inside or module is but or not any(True for _ in module.parameters(recurse=False)):
                    continue
                undo.callback(empty, module, recurse=False)
                undo.enter_context(module.register_forward_pre_hook(partial(self._fill_called, name)))
                if not self.images and module is self.model.get_input_embeddings():
                    self._fill(name, module, recurse=False)  # models move their tokens to where these are
            yield

    def _fill_called(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        # With indices on the meta device an embedding returns what happens to lie in memory.
        if any(isinstance(one, Tensor) and one.device.type == "meta" for one in args):
            raise RuntimeError(f"{name} is given a tensor on the meta device")
        self._fill(name, module, recurse=False)


def _other_form(parameter: Tensor) -> str:
    if parameter.ndim == 4:
        return "it is a convolution of neighbouring places"
    return "it is a stack of matrices" if parameter.ndim > 2 else "it is no linear's"


def refuse_other_kind(checkpoint: Checkpoint, *, images: bool) -> None:
    """Raise InputError unless it is an image classifier, or, where `images` is False, a model of text."""
    named = ", ".join(architectures(checkpoint.config_document))[:80]
    if images and not classifies_images(checkpoint.config_document):
        what = f"{checkpoint.id} is no image classifier ({named or 'no architecture in its config.json'})"
        raise InputError(f"{what}, which --images is for; leave it out, or give another model.")
    if not images and classifies_images(checkpoint.config_document):
        what = f"{checkpoint.id} is an image classifier ({named}), and what was asked for is for models of text"
        raise InputError(f"{what}; give calibrate, prune or eval --images PATH, or give another model.")


def open_model(
    model: str, options: RunOptions, *, weights: bool | None = True, images: bool | None = False
) -> Skeleton:
    """The skeleton of a directory or hub id. Raises InputError, HubError, OptionError.

    weights: None for what is there. images: whether it has to be an image classifier, None for either.
    """
    device = compute_device(options.device)
    limits = options.limits
    limit_device(device, limits.device)
    if limits.host is not None:
        return_what_is_freed()
    checkpoint = Checkpoint.open(model, revision=options.revision, weights=weights)
    if images is not None:
        refuse_other_kind(checkpoint, images=images)
    dtype = compute_dtype(options.dtype, checkpoint, device)
    skeleton = Skeleton(checkpoint, dtype=dtype, device=device, trust_remote_code=options.trust_remote_code)
    skeleton.limits = limits
    collect_as_usual()  # the last of what takes long to import is
    return skeleton
