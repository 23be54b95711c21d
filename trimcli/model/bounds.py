"""What a config.json may call for: sizes that no memory holds are refused before any is taken."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from trimcli.console import size
from trimcli.errors import InputError
from trimcli.files.checkpoint import CONFIG, Checkpoint

# Of what libraries make one by one, how many no model comes near, by how a config calls it.
COUNTED = {
    re.compile(r"(?:^|_)(?:layers?|blocks|depths?|stages)$"): 2_000,
    re.compile(r"(?:^|_)(?:experts|heads|groups)$"): 20_000,
    re.compile(r"(?:^|_)labels$"): 200_000,
}
MODULES = 150_000
MODULES_A_TENSOR = 64
WEIGHTS = 2**47
WEIGHTS_OF_A_TENSOR = 2**35
WEIGHTS_OF_A_VECTOR = 2**26
BUFFER_BYTES = 2**30


def refuse_absurd_counts(checkpoint: Checkpoint) -> None:
    """Raise InputError where a config.json counts more of something than any model has."""
    for name, value in _members(checkpoint.config_document):
        for counted, most in COUNTED.items():
            if counted.search(name) and isinstance(value, int | float) and not value <= most:
                raise _refusal(checkpoint, f"says {name} {value!r:.40}")


def _members(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield from ((name, one) for one in (value if isinstance(value, list) else [value]))
        if isinstance(value, dict):
            yield from _members(value)


@contextmanager
def counted_modules(checkpoint: Checkpoint) -> Iterator[None]:
    """While this lasts, InputError for more modules than the checkpoint's tensors can be for."""
    most, made = MODULES, 0
    if checkpoint.has_weights:
        most = min(most, MODULES_A_TENSOR * len(checkpoint.keys()) + 1000)

    def count(module: nn.Module, name: str, part: nn.Module | None) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise _refusal(checkpoint, f"calls for more than {most:,} modules")

    hook = nn.modules.module.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def refuse_absurd_sizes(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise InputError for parameters or buffers that no machine holds. model: on the meta device altogether."""
    most = WEIGHTS
    if checkpoint.has_weights:
        stored = sum(math.prod(spec.shape) for spec in checkpoint.specs().values())
        most = MODULES_A_TENSOR * stored + WEIGHTS_OF_A_VECTOR
    parameters = list(model.parameters())
    if (weights := sum(one.numel() for one in parameters)) > most:
        raise _refusal(checkpoint, f"calls for {weights:,} weights")
    for one in parameters:
        if one.numel() > (WEIGHTS_OF_A_VECTOR if one.ndim == 1 else WEIGHTS_OF_A_TENSOR):
            raise _refusal(checkpoint, f"calls for a tensor of {one.numel():,} weights")
    if (nbytes := sum(one.nbytes for one in model.buffers())) > BUFFER_BYTES:
        raise _refusal(checkpoint, f"calls for {size(nbytes)} beside the weights")


def _refusal(checkpoint: Checkpoint, what: str) -> InputError:
    return InputError(f"{checkpoint.directory / CONFIG} {what}, which is no model's; fetch it anew.")
