"""The walk proves itself: before a model is first used, layer by layer against its own forward pass.

Five short samples, the last one the fourth with another last token, pass through the model as transformers runs it, its
layers filled when they are called and emptied after. Then they walk, one at a time and in pairs, and whatever a layer
gives has to be what the model's next layer was given. What holds is the model's form; it is kept in the
stage cache, for all models of the same structure. Image classifiers are given five pictures of noise; what they do
between layers, from stage to stage, is a part of their own forward pass.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError, TrimError, first_line
from trimcli.files.cache import Cache
from trimcli.files.documents import read_json, write_json
from trimcli.files.manifest import LIBRARIES, installed, is_intact, sealed
from trimcli.methods.masks import slices
from trimcli.model.empty import empty
from trimcli.model.forward import Forward, first_output, form_of, split_call
from trimcli.model.pixels import picture_shape
from trimcli.model.skeleton import DecoderLayer, Form, Skeleton, open_model
from trimcli.options import RunOptions
from trimcli.pipeline.collector import LeftEarly
from trimcli.pipeline.walk import Walk, max_positions, not_finite

PROOF = "trim.proof/2"
SAMPLES, LENGTH = 5, 12
# How far a token's values may be from the model's own, relative to their norm: what the dtype's rounding may do within
# a layer. In 16 bits a token in ten may be further off: a router's near tie falls either way.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
SHARE = {torch.float32: 1.0, torch.float16: 0.9, torch.bfloat16: 0.9}
# And how far the half of the tokens may be from those of an equal beginning in the same batch.
CAUSAL = 1e-3


@dataclass
class _Own:
    """What the model's own forward pass gave. arrived: hidden states by layer, and after the last; order: of calls.

    gave: by layer, what left it.
    usable: bool [vocabulary], the predictions that are finite everywhere; others are for what measures to refuse.
    """

    arrived: list[Tensor] = field(default_factory=list)
    gave: list[Tensor] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    usable: Tensor | None = None


def open_proven(model: str, options: RunOptions, progress: Progress = NO_PROGRESS, *, images: bool = False) -> Skeleton:
    """`open_model` for what will be walked. Raises what it and `prove` raise."""
    skeleton = open_model(model, options, images=images)
    prove(skeleton, options.cache_dir, progress)
    return skeleton


def prove(skeleton: Skeleton, cache_dir: Path | None = None, progress: Progress = NO_PROGRESS) -> None:
    """Set the skeleton's `form` and `returns`: how the walk gives what the model's own forward pass gives.

    Raises InputError for a model that is not causal, whose own forward pass fails, or with which no form agrees.
    """
    path = _kept_at(skeleton, cache_dir)
    if path is not None and (known := _kept(path)):
        skeleton.form, skeleton.returns = known["form"], tuple(known["returns"])
        return
    skeleton.form = _form(skeleton, progress)
    if path is not None:
        found = {"model": skeleton.checkpoint.id, "form": skeleton.form, "returns": skeleton.returns}
        with contextlib.suppress(TrimError, OSError):
            write_json(path, sealed({"schema": PROOF, **found}), force=True)  # two runs may find the same at once


def _kept_at(skeleton: Skeleton, cache_dir: Path | None) -> Path | None:
    """Where the proof lies or will lie; None where it cannot be kept."""
    # Whatever its weights, a model of this structure is called alike; but of code that it brings nothing is known.
    if "auto_map" in skeleton.checkpoint.config_document:
        return None
    key = [skeleton.fingerprint.structure, str(skeleton.dtype), skeleton.device.type, *map(installed, LIBRARIES)]
    with contextlib.suppress(OSError):  # a cache that cannot be used is no reason not to go on
        return Cache(cache_dir).file("proofs", key, ".json")
    return None


def _kept(path: Path) -> dict[str, Any]:
    """The proof in `path`, empty unless there is a whole one."""
    with contextlib.suppress(TrimError):
        found = read_json(path, PROOF)
        return found if is_intact(found) else {}
    return {}


def _form(skeleton: Skeleton, progress: Progress) -> Form:
    samples = probe_pixels(skeleton) if skeleton.images else probe_tokens(skeleton)
    id = skeleton.checkpoint.id
    with progress.task("comparing with the model's own forward pass", 3) as advance:
        try:
            own = _own(skeleton, samples)
            _refuse_unusual(skeleton, own)
        except TrimError:
            raise
        except Exception as problem:  # any model's code may raise anything
            if "meta" in str(problem):  # the device of weights that are not filled
                raise _outside(skeleton) from None
            given = f"pictures of {list(samples.shape[1:])}" if skeleton.images else f"{samples.shape[1]} tokens"
            what = f"the forward pass of {id} fails on {SAMPLES} samples, {given}"
            raise InputError(f"{what} ({type(problem).__name__}: {first_line(problem)}); it cannot be used.") from None
        advance()
        found = ""
        form: Form
        for form in ("recorded", "suspended"):
            try:
                found = _difference(skeleton, samples, own, form)
            except Exception as problem:  # called in a way that is not its own, a layer may raise anything
                found = f"fails ({type(problem).__name__}: {first_line(problem)})"
            if not found:
                return form
            advance()
    kind = type(skeleton.model).__name__
    raise InputError(f"layer by layer, {kind} in {id} {found}; its form is not supported, so nothing is measured.")


def probe_pixels(skeleton: Skeleton) -> Tensor:
    """The pictures, float32 [5, C, H, W]: noise of the size that the config names."""
    return torch.randn(SAMPLES, *picture_shape(skeleton.config), generator=torch.Generator().manual_seed(0))


def probe_tokens(skeleton: Skeleton) -> Tensor:
    """The samples, int64 [5, L]: tokens without a meaning of their own, the last the fourth with another last one."""
    embedding = skeleton.model.get_input_embeddings()
    special = {value for config in _configs(skeleton.config) for value in _token_ids(config)}
    with skeleton.filled_on_use():  # rows of tokens that no text has may hold anything
        sound = torch.isfinite(embedding.weight[: min(embedding.num_embeddings, 4096)]).all(dim=1).tolist()
    plain = [token for token, finite in enumerate(sound) if finite and token not in special]
    if not plain:
        what = f"the embedding of {skeleton.checkpoint.id} has no finite row for a token without a meaning of its own"
        raise InputError(f"{what}; fetch or train it anew.")
    length = min(LENGTH, max_positions(skeleton.config) or LENGTH)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(plain), (SAMPLES, length), generator=generator)
    chosen[-1] = chosen[-2]
    chosen[-1, -1] = (chosen[-2, -1] + 1) % len(plain)
    return torch.tensor(plain)[chosen]


def _configs(config: Any) -> Iterator[dict[Any, Any]]:
    document = config.to_dict()
    yield document
    yield from (value for value in document.values() if isinstance(value, dict))


def _token_ids(config: dict[Any, Any]) -> Iterator[int]:
    for name, value in config.items():
        if str(name).endswith(("token_id", "token_index")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))


def _own(skeleton: Skeleton, samples: Tensor) -> _Own:
    """The model's own forward pass, one layer resident."""
    own = _Own()

    def filled(layer: DecoderLayer) -> Any:
        forward = layer.module.forward

        def called(*args: Any, **kwargs: Any) -> Any:
            own.order.append(layer.index)
            own.arrived.append(split_call(args, kwargs)[0].clone())
            if not skeleton.images:  # a large vocabulary's is as large as several layers; it is filled again on use
                empty(skeleton.model.get_input_embeddings(), recurse=False)
            skeleton.load_layer(layer)
            try:
                result = forward(*args, **kwargs)
            finally:
                skeleton.drop_layer(layer)
            skeleton.returns = skeleton.returns or form_of(result)
            own.gave.append(first_output(result).clone())
            if layer is skeleton.layers[-1]:
                own.arrived.append(first_output(result).clone())
            return result

        return called

    with skeleton.filled_on_use():
        own.logits = Forward(skeleton, samples).around(samples, filled).logits
    return own


def _refuse_unusual(skeleton: Skeleton, own: _Own) -> None:
    id = f"{type(skeleton.model).__name__} in {skeleton.checkpoint.id}"
    if own.order != list(range(len(skeleton.layers))):
        what = f"{id} calls its {len(skeleton.layers)} decoder layers in the order {own.order[:99]}"
        raise InputError(f"{what}, not each once; its form is not supported.")
    logits = own.logits
    if logits is None or logits.device.type == "meta" or logits.ndim != (2 if skeleton.images else 3):
        raise _outside(skeleton)
    for layer, states in zip(skeleton.layers, own.arrived[1:], strict=True):
        if not bool(torch.isfinite(states).all()):
            raise not_finite(layer)
    own.usable = torch.isfinite(logits).flatten(0, -2).all(dim=0)
    if not bool(own.usable.any()):
        raise InputError(f"the predictions of {id} hold NaN or infinite values; try --dtype float32.")
    own.logits = logits = logits[..., own.usable]
    if skeleton.images:
        return
    gaps, exact = _gaps(logits[-1, :-1], logits[-2, :-1]), logits.dtype == torch.float32
    if float(gaps.max()) > TOLERANCE[torch.float32] if exact else float(gaps.median()) > CAUSAL:
        what = f"{id} is no causal language model: another last token changes what it predicts before it"
        raise InputError(f"{what}; give a decoder.")


def _outside(skeleton: Skeleton) -> InputError:
    id = f"{type(skeleton.model).__name__} in {skeleton.checkpoint.id}"
    return InputError(f"{id} uses weights that lie outside of the modules it calls; its form is not supported.")


def _difference(skeleton: Skeleton, samples: Tensor, own: _Own, form: Form) -> str:
    """Where and by how much a walk of this form differs from the model's own forward pass; empty where it does not."""
    sizes = (1, 2) if form == "recorded" or skeleton.images else (1,)
    walks = [Walk(skeleton, samples, batch_size=size, form=form) for size in sizes]
    assert own.logits is not None, "checked by _refuse_unusual"
    with contextlib.ExitStack() as stack:
        for walk in walks:
            if gap := _arrived_apart(walk, own.arrived[0]):
                return f"gives other embeddings than its own forward pass, by {gap:.1%}"
        for layer in walks[0].layers():
            for walk in walks:
                if skeleton.images and (gap := _arrived_apart(walk, own.arrived[layer.index])):
                    return f"gives {layer.name} other hidden states than its own forward pass, by {gap:.1%}"
                stack.enter_context(walk.stream.advancing())
                expected = own.gave[layer.index] if skeleton.images else own.arrived[layer.index + 1]
                for rows in slices(SAMPLES, walk.batch_size):
                    if rows.start == 0:
                        _gather_nothing(walk, layer, rows)
                    result = walk.stream.run(layer, rows)
                    states = _samples(expected, rows, first_output(result))
                    if gap := _apart(first_output(result), states):
                        return f"differs from its own forward pass at {layer.name} by {gap:.1%}"
                    walk.stream.put(layer, rows, _with_states(result, states))
                stack.close()
        for walk in walks:
            with walk.head() as head:
                for rows in slices(SAMPLES, walk.batch_size):
                    found = head(rows, slice(None))[..., own.usable]
                    if gap := _apart(found, own.logits[rows]):
                        return f"differs from its own forward pass after the last layer by {gap:.1%}"
    return ""


def _arrived_apart(walk: Walk, expected: Tensor) -> float:
    """How far the walk's hidden states are from those expected of all samples; 0 where it is rounding."""
    for rows in slices(SAMPLES, walk.batch_size):
        found = walk.states(rows)
        if gap := _apart(found, _samples(expected, rows, found)):
            return gap
    return 0.0


def _gather_nothing(walk: Walk, layer: DecoderLayer, rows: slice) -> None:
    """Run the layer as when statistics are gathered, wholly and up to its last linear: it must leave no trace."""
    called: list[nn.Module] = []
    with contextlib.ExitStack() as hooks:
        for module in {linear.module for linear in layer.linears}:
            hooks.enter_context(module.register_forward_pre_hook(lambda module, _: called.append(module)))
        walk.call(layer, rows)
    if called and walk.stream.leaves:
        with called[-1].register_forward_pre_hook(_leave), contextlib.suppress(LeftEarly):
            walk.call(layer, rows)


def _leave(*_: Any) -> None:
    raise LeftEarly


def _samples(states: Tensor, rows: slice, like: Tensor) -> Tensor:
    """Those of samples `rows` among the states of all, which some models stack in other dimensions too."""
    count = rows.stop - rows.start
    for place, size in enumerate(states.shape):
        if size == SAMPLES and (found := states.narrow(place, rows.start, count)).shape == like.shape:
            return found
    return states


def _with_states(result: Any, states: Tensor) -> Any:
    """A layer's result with the model's own states in it, so that what the next one gives is that layer's doing."""
    if isinstance(result, tuple | list):
        return type(result)([states, *result[1:]])
    return states


def _apart(found: Tensor, expected: Tensor) -> float:
    """The difference relative to the norm of what is expected, token by token; 0 where it is rounding."""
    if found.shape != expected.shape:
        return float("inf")
    gap = float(_gaps(found, expected).flatten().quantile(SHARE[expected.dtype]))
    return 0.0 if gap <= TOLERANCE[expected.dtype] else gap  # NaN is no rounding


def _gaps(found: Tensor, expected: Tensor) -> Tensor:
    one, other = found.float(), expected.float()
    features = 1 if other.ndim == 4 else -1  # of maps [b, C, H, W]
    return (one - other).norm(dim=features) / other.norm(dim=features).clamp(min=1e-12)
