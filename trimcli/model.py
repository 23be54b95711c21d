"""The skeleton: a transformers model on the meta device, filled one decoder layer at a time.

Parameters live on the meta device, buffers are real. Decoder layers are the ModuleList of
`config.num_hidden_layers` entries, linears are found by type, what each layer is called with is recorded by one
forward pass in which every layer returns its input; so no architecture is named anywhere.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trimcli.artifacts import ModelFingerprint
from trimcli.checkpoint import Checkpoint, canonical_json, natural
from trimcli.errors import InputError, OptionError, TrimError
from trimcli.names import NameMap, map_names

# Of a config.json: what does not change which function of the weights the model is.
VOLATILE = {
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
SAMPLES = 64


@dataclass(frozen=True)
class Linear:
    """One prunable matrix.

    name: full module name. key: its weight's name in the checkpoint, None where only a config was read.
    transposed: stored as [D_in, D_out] (GPT-2's Conv1D). shape is always (D_out, D_in).
    """

    name: str
    module: nn.Module
    d_out: int
    d_in: int
    transposed: bool
    key: str | None

    @property
    def shape(self) -> tuple[int, int]:
        """(D_out, D_in)."""
        return self.d_out, self.d_in

    @property
    def numel(self) -> int:
        """How many weights."""
        return self.d_out * self.d_in

    @property
    def weight(self) -> Tensor:
        """The loaded weight as a [D_out, D_in] view; writing to it writes to the module."""
        return self.oriented(self.module.weight.data)  # type: ignore[union-attr, return-value, arg-type]

    def oriented(self, stored: Tensor) -> Tensor:
        """Between the stored orientation and [D_out, D_in], either way: a view."""
        return stored.T if self.transposed else stored


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer: index, full module name, module, and its linears in module order."""

    index: int
    name: str
    module: nn.Module
    linears: list[Linear]


@dataclass
class Recording:
    """What the layers are called with for batches of one shape: per layer (args, kwargs) after the hidden states."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class _AllRecorded(Exception):  # noqa: N818 - a jump out of the forward pass, not an error
    """Leaves the forward pass at the last decoder layer, before the head."""


class Skeleton:
    """A transformers model without weights, and the means to fill it in parts.

    checkpoint: an open Checkpoint (with or without weights). dtype: of the computation. device: where layers
    are put when their turn comes.
    """

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
        self._names = map_names(self.model, checkpoint.keys()) if checkpoint.has_weights else NameMap({}, [])
        self._tied = self._tied_names()
        if checkpoint.has_weights:
            self._refuse_other_shapes()
        container, modules = find_decoder_layers(self.model)
        self.layers = [
            DecoderLayer(index, f"{container}.{index}", module, self._linears(f"{container}.{index}", module))
            for index, module in enumerate(modules)
        ]
        self.linears = {linear.name: linear for layer in self.layers for linear in layer.linears}
        self._returns_tuple: bool | None = None
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    # --- names, shapes, identity -------------------------------------------------------------------------

    def _tied_names(self) -> dict[str, str]:
        """Parameter name -> the name whose checkpoint tensor it shares."""
        by_identity: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            by_identity.setdefault(id(parameter), []).append(name)
        tied = {}
        for names in by_identity.values():
            source = next((name for name in names if name in self._names.plain), names[0])
            tied.update({name: source for name in names if name != source})
        return tied

    def _refuse_other_shapes(self) -> None:
        made = {name for conversion in self._names.conversions for name in [conversion.name]}
        for name, tensor in self.model.state_dict().items():
            key = self._names.plain.get(self._tied.get(name, name))
            if key is None:
                parameter = name in dict(self.model.named_parameters(remove_duplicate=False))
                if parameter and not made and name not in self._tied:
                    raise InputError(
                        f"{self.checkpoint.directory} lacks a tensor for {name}, which its config.json calls for; "
                        "fetch the model anew."
                    )
            elif self.checkpoint.spec(key).shape != tuple(tensor.shape):
                raise InputError(
                    f"{self.checkpoint.directory}: {key} has shape {self.checkpoint.spec(key).shape} where config.json "
                    f"calls for {tuple(tensor.shape)}; fetch the model anew."
                )

    def _linears(self, prefix: str, layer: nn.Module) -> list[Linear]:
        from transformers.pytorch_utils import Conv1D

        found = []
        made = {conversion.name for conversion in self._names.conversions}
        for name, module in layer.named_modules():
            transposed = isinstance(module, Conv1D)
            if not transposed and not isinstance(module, nn.Linear):
                continue
            full = f"{prefix}.{name}"
            key = self._names.plain.get(f"{full}.weight")
            if self.checkpoint.has_weights and (key is None or f"{full}.weight" in made):
                continue
            shape = tuple(module.weight.shape)  # type: ignore[union-attr, arg-type]
            d_out, d_in = reversed(shape) if transposed else shape
            found.append(Linear(full, module, int(d_out), int(d_in), transposed, key))
        return found

    def left_dense(self) -> dict[str, tuple[int, ...]]:
        """Matrices inside the decoder layers that are not pruned (stacked experts, say): name -> shape."""
        pruned = {f"{name}.weight" for name in self.linears}
        return {
            f"{layer.name}.{name}": tuple(parameter.shape)
            for layer in self.layers
            for name, parameter in layer.module.named_parameters()
            if parameter.ndim > 1 and f"{layer.name}.{name}" not in pruned
        }

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        """Structure (config, module names, shapes) and, with weights, content (dtypes and a sample of every tensor)."""
        kept = {key: value for key, value in self.checkpoint.config_document.items() if key not in VOLATILE}
        shapes = {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}
        structure = hashlib.sha256(canonical_json([kept, shapes]).encode()).hexdigest()
        if not self.checkpoint.has_weights:
            return ModelFingerprint(self.checkpoint.id, structure)
        content = hashlib.sha256()
        for key in sorted(self.checkpoint.keys(), key=natural):
            spec = self.checkpoint.spec(key)
            content.update(f"{key} {spec.dtype} {list(spec.shape)}".encode())
            if math.prod(spec.shape):
                flat = self.checkpoint.load(key).reshape(-1)
                sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
                content.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
        return ModelFingerprint(self.checkpoint.id, structure, content.hexdigest())

    # --- parameters in and out ---------------------------------------------------------------------------

    def read_weight(self, linear: Linear) -> Tensor:
        """A linear's weight [D_out, D_in] in its stored dtype, straight from the checkpoint, checked to be finite."""
        if linear.key is None:
            raise InputError(f"{self.checkpoint.directory} has no weights for {linear.name}; give a directory with them.")
        return linear.oriented(finite(self.checkpoint.load(linear.key), linear.key, self.checkpoint))

    def load_layer(self, layer: DecoderLayer) -> None:
        """Put a layer's parameters on the compute device in the compute dtype. Raises InputError on NaN or infinity."""
        self._fill(layer.name, layer.module)

    def drop_layer(self, layer: DecoderLayer) -> None:
        """Put a layer's parameters back on the meta device."""
        _empty(layer.module)

    def load_everything(self) -> None:
        """Fill the whole model: what evaluating through other libraries needs. Tied parameters stay tied."""
        self._fill("", self.model)
        self.model.tie_weights()

    def _fill(self, prefix: str, module: nn.Module, *, recurse: bool = True) -> None:
        dotted = f"{prefix}." if prefix else ""
        made: dict[str, Tensor] = {}
        for conversion in self._names.conversions:
            if recurse and conversion.name.startswith(dotted):
                made.update(conversion.build(self.model, self.checkpoint.load))
        for name, parameter in list(module.named_parameters(recurse=recurse, remove_duplicate=False)):
            full = dotted + name
            if parameter.device.type != "meta":
                continue
            key = self._names.plain.get(self._tied.get(full, full))
            if key is None and full not in made:
                raise InputError(f"{self.checkpoint.directory} lacks a tensor for {full}; fetch the model anew.")
            stored = made[full] if key is None else self.checkpoint.load(key)
            value = finite(stored, key or full, self.checkpoint)
            _set(module, name, value.to(self.device, self.dtype if value.is_floating_point() else value.dtype))
        for name, buffer in module.named_buffers(recurse=recurse):
            key = self._names.plain.get(dotted + name)
            if key is not None:
                buffer.copy_(self.checkpoint.load(key).to(buffer.dtype))

    @contextmanager
    def _filled_on_use(self, *, but: nn.Module | None = None) -> Iterator[None]:
        """Fill modules outside the decoder layers (but `but`) when the forward pass calls them; empty them after."""
        inside = {id(module) for layer in self.layers for module in layer.module.modules()}
        hooks, outside = [], []
        for name, module in self.model.named_modules():
            if id(module) in inside or module is but or not any(True for _ in module.parameters(recurse=False)):
                continue
            outside.append(module)

            def fill(module: nn.Module, _: Any, *, name: str = name) -> None:
                self._fill(name, module, recurse=False)

            hooks.append(module.register_forward_pre_hook(fill))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in outside:
                _empty(module, recurse=False)

    # --- forward passes ----------------------------------------------------------------------------------

    def _forward(self, tokens: Tensor, replace: Any) -> Any:
        """The model's own forward pass with every layer's forward replaced by `replace(layer)`."""
        for layer in self.layers:
            layer.module.forward = replace(layer)
        try:
            with torch.no_grad():
                return self.model(input_ids=tokens.to(self.device, torch.long), use_cache=False)
        finally:
            for layer in self.layers:
                del layer.module.forward

    @property
    def returns_tuple(self) -> bool:
        """Whether the model expects its layers to return a tuple: seen by what arrives after the first one."""
        if self._returns_tuple is None:
            shapes: list[Any] = []

            def passing(_: DecoderLayer) -> Any:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    hidden = _split(args, kwargs)[0]
                    shapes.append(hidden.shape)
                    if len(shapes) == 2:
                        raise _AllRecorded
                    return hidden

                return forward

            probe = torch.zeros(1, 2, dtype=torch.long)
            with self._filled_on_use():
                try:
                    shapes.append(self._forward(probe, passing).logits.shape)
                except _AllRecorded:
                    pass
                except (RuntimeError, IndexError, AttributeError, TypeError):
                    shapes.append(())  # with a single layer the norm behind it met half a tuple
            self._returns_tuple = len(shapes[1]) != 3
        return self._returns_tuple

    @contextmanager
    def embedding(self) -> Iterator["Embedder"]:
        """The part before the first layer, loaded on use and dropped after: an Embedder."""
        with self._filled_on_use():
            yield Embedder(self)

    @contextmanager
    def head(self) -> Iterator["Head"]:
        """The part after the last layer (final norm, head), loaded on use and dropped after: a Head."""
        lookup = self.model.get_input_embeddings()

        def nothing(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
            return torch.zeros(*tokens.shape, lookup.embedding_dim, dtype=self.dtype, device=self.device)

        # What the embedding returns is replaced at the last layer anyway: its weights stay on disk.
        lookup.forward = nothing
        try:
            with self._filled_on_use(but=lookup):
                yield Head(self)
        finally:
            del lookup.forward


class Embedder:
    """Tokens to the first layer's input, and what every layer is called with."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Recording]:
        """Tokens [b, L] -> (hidden states [b, L, H], the recording for this batch)."""
        skeleton = self._skeleton
        recording = Recording()
        first: list[Tensor] = []

        def recorder(layer: DecoderLayer) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, rest, named = _split(args, kwargs)
                if not first:
                    first.append(hidden)
                recording.calls.append((rest, named))
                if len(recording.calls) == len(skeleton.layers):
                    raise _AllRecorded
                return (first[0],) if wrap else first[0]

            return forward

        wrap = skeleton.returns_tuple
        try:
            skeleton._forward(tokens, recorder)
        except _AllRecorded:
            return first[0].to(skeleton.dtype), recording
        raise TrimError(
            f"the forward pass of {skeleton.checkpoint.id} called {len(recording.calls)} of its "
            f"{len(skeleton.layers)} decoder layers once; its form is not supported."
        )


class Head:
    """Final hidden states to logits, through the model's own code after the last layer."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [b, L, H] -> logits [b, L, vocabulary]."""
        skeleton = self._skeleton
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long)
        value = (hidden,) if skeleton.returns_tuple else hidden
        logits: Tensor = skeleton._forward(tokens, lambda layer: lambda *args, **kwargs: value).logits
        return logits


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The hidden states, and the other positional and named arguments of a layer call."""
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


def first_output(result: Any) -> Tensor:
    """A layer's hidden states: layers return a tensor or a tuple, depending on the transformers version."""
    return result[0] if isinstance(result, tuple) else result


def build_empty(checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The transformers model of a config, parameters on the meta device, buffers real. Raises InputError."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as problem:  # any library behind a config may raise anything
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise InputError(
            f"no causal language model can be built from {checkpoint.directory / 'config.json'} ({reason}); "
            "check the config, or --trust-remote-code if the model brings its own code."
        ) from None
    model.tie_weights()
    return model.eval().requires_grad_(False)


def find_decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The decoder's ModuleList: `num_hidden_layers` entries; of several, the one with the most parameters."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    count = getattr(config, "num_hidden_layers", None)
    found = [
        (sum(parameter.numel() for parameter in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise InputError(f"{type(model).__name__} has no list of {count} decoder layers; its form is not supported.")
    _, name, module = max(found, key=lambda entry: entry[0])
    return name, module


def finite(tensor: Tensor, key: str, checkpoint: Checkpoint) -> Tensor:
    """`tensor` itself. Raises InputError naming `key` when it holds NaN or infinity."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise InputError(
                f"the tensor {key} of {checkpoint.directory} holds NaN or infinite values; fetch or train it anew."
            )
    return tensor


def compute_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The computation's dtype: as named, or for `auto` the checkpoint's own where the device has units for it.

    A CPU without 16-bit units multiplies float16 and bfloat16 a hundred times slower than float32, so `auto` is
    float32 there.
    """
    if name != "auto":
        if name not in ("float32", "bfloat16", "float16"):
            raise OptionError(f"--dtype {name!r} is none of auto, float32, bfloat16, float16.")
        return getattr(torch, name)  # type: ignore[no-any-return]
    stored = {checkpoint.spec(key).dtype for key in checkpoint.keys()[:64]} if checkpoint.has_weights else set()
    if torch.float32 in stored or torch.float64 in stored or not stored:
        return torch.float32
    wanted = torch.float16 if torch.float16 in stored else torch.bfloat16
    if device.type != "cpu":
        return wanted
    has = torch.cpu.get_capabilities()
    if wanted == torch.float16 and (has.get("avx512_fp16") or has.get("amx_fp16")):
        return torch.float16
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


def compute_device(name: str) -> torch.device:
    """The compute device: as named, or for `auto` the first CUDA device where there is one. Raises OptionError."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"--device {name!r} is none of auto, cpu, cuda, cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device {name!r} is none of auto, cpu, cuda, cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; give cpu.")
    return device


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _empty(module: nn.Module, *, recurse: bool = True) -> None:
    for owner in module.modules() if recurse else [module]:
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
