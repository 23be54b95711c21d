"""How a stage keeps to memory: where its hidden states lie and how much is worked on at a time, or that nothing does.

Without limits the device's own batches are taken, and hidden states go to files where memory has no room for them.
Under `--max-memory` and `--max-device-memory` batches are halved, too, until the estimate fits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trimcli.console import size
from trimcli.errors import ResourceError
from trimcli.memory import available_bytes
from trimcli.model.device import free_bytes
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline import estimate
from trimcli.pipeline.estimate import Memory
from trimcli.pipeline.walk import batch_of

Place = Literal["device", "host", "files"]
"""Where hidden states lie: in the memory of an accelerator, in the host's, or in files."""

HOST, DEVICE = "--max-memory", "--max-device-memory"
MIB = 1 << 20


@dataclass(frozen=True)
class Fit:
    """What was chosen. batch_size: samples. logit_tokens: whose logits are held at a time, None where none are.

    spill: the folder for hidden states, None unless they lie in files. why: a line for each choice that is not usual.
    limited: whether limits are in force.
    """

    memory: Memory
    place: Place
    batch_size: int
    seqlen: int
    logit_tokens: int | None = None
    spill: Path | None = None
    why: tuple[str, ...] = ()
    limited: bool = False

    @property
    def host_bytes(self) -> int:
        """Peak of the host's memory."""
        return self.memory.host + (self.memory.states if self.place == "host" else 0)

    @property
    def device_bytes(self) -> int:
        """Peak of the accelerator's memory, 0 where there is none."""
        return self.memory.device + (self.memory.states if self.place == "device" else 0)

    @property
    def spill_bytes(self) -> int:
        """Bytes of hidden states in files."""
        return self.memory.states if self.place == "files" else 0

    def document(self) -> dict[str, Any]:
        """What was chosen, and the estimate, as JSON."""
        return {
            "peak_host_bytes": self.host_bytes,
            "peak_device_bytes": self.device_bytes,
            "spill_bytes": self.spill_bytes,
            "batch_size": self.batch_size,
            "logit_tokens": self.logit_tokens,
            "hidden_states": self.place if self.memory.states else None,
            "why": list(self.why),
        }

    def hold(self, skeleton: Skeleton) -> None:
        """Let the walks of a proven skeleton keep to it.

        Raises ResourceError where hidden states were to lie in files and the model's form does not let them.
        """
        if skeleton.form == "suspended" and self.place == "files" and skeleton.limits.host is not None:
            needed, limit = self.memory.host + self.memory.states, skeleton.limits.host
            if needed > limit:
                what = f"the hidden states of {skeleton.checkpoint.id} belong to passes of its own and stay in memory"
                more = f"some {size(needed)} in all, and {HOST} allows {size(limit)}"
                raise ResourceError(f"{what}, {more}; give fewer samples or {HOST} {_mebibytes(needed)}.")
        skeleton.spill = self.spill
        skeleton.on_host = self.place == "host" if self.limited else None
        skeleton.batch_tokens = self.batch_size * self.seqlen if self.limited else None
        skeleton.logit_tokens = self.logit_tokens if self.limited else None


class Work(NamedTuple):
    """What is to fit, in words, and how: samples of seqlen tokens, in batches of a size that was asked for or None.

    memory(batch_size, logit_tokens): its estimate. spill: the folder for hidden states, if one was named; otherwise:
    where they may go, None where they may not. logits: numbers of tokens to choose from, the usual one first.
    """

    words: str
    memory: Callable[[int, int | None], Memory]
    nsamples: int
    seqlen: int
    batch_size: int | None = None
    spill: Path | None = None
    otherwise: Path | None = None
    logits: Sequence[int | None] = (None,)


def fit(skeleton: Skeleton, work: Work) -> Fit:
    """What keeps the work in memory, nearest to what is usual. Raises ResourceError where a limit leaves nothing."""
    usual = batch_of(skeleton, work.nsamples, work.seqlen, work.batch_size)
    limited = _limited(skeleton)
    sizes = [usual] if work.batch_size or not limited else list(_halved(usual))
    logits = work.logits if limited else work.logits[:1]
    last: Fit | None = None
    for tokens in logits:
        for batch_size in sizes:
            memory = work.memory(batch_size, tokens)
            for place in _places(skeleton, work, memory):
                spill = (work.spill or work.otherwise) if place == "files" else None
                last = Fit(memory, place, batch_size, work.seqlen, tokens, spill, limited=limited)
                if _fits(skeleton, last, work):
                    return _explained(skeleton, last, work, usual)
    assert last is not None, "there is a place for hidden states, and a size of a batch"
    raise _refusal(skeleton, last, work)


def _limited(skeleton: Skeleton) -> bool:
    """Whether a limit is in force."""
    on_device = skeleton.device.type != "cpu"
    return skeleton.limits.host is not None or (on_device and skeleton.limits.device is not None)


def _halved(number: int) -> Iterator[int]:
    while number:
        yield number
        number //= 2


def _places(skeleton: Skeleton, work: Work, memory: Memory) -> Iterator[Place]:
    on_device = skeleton.device.type != "cpu"
    if not memory.states:
        yield "device" if on_device else "host"
    elif work.spill is not None:
        yield "files"
    else:
        if on_device:
            yield "device"
        if not on_device or _limited(skeleton):
            yield "host"
        if work.otherwise is not None:
            yield "files"


def _fits(skeleton: Skeleton, chosen: Fit, work: Work) -> bool:
    """Whether the limits allow it, and memory has room for hidden states that could go elsewhere."""
    limits, on_device = skeleton.limits, skeleton.device.type != "cpu"
    if limits.host is not None and chosen.host_bytes > limits.host:
        return False
    if on_device and limits.device is not None and chosen.device_bytes > limits.device:
        return False
    if chosen.place == "files" or not chosen.memory.states or (on_device and not _limited(skeleton)):
        return True
    if chosen.place == "device":
        return limits.device is not None or chosen.device_bytes <= free_bytes(skeleton.device)
    room = available_bytes() if work.otherwise is not None else None
    return room is None or chosen.host_bytes <= room


def _explained(skeleton: Skeleton, chosen: Fit, work: Work, usual: int) -> Fit:
    """The choice with a line for everything that is not as without limits."""
    limits, why = skeleton.limits, list[str]()
    host = f"{HOST} {size(limits.host)}" if limits.host is not None else ""
    device = f"{DEVICE} {size(limits.device)}" if limits.device is not None else ""
    states = f"hidden states ({size(chosen.memory.states)})"
    if chosen.place == "files" and work.spill is None:
        whole = chosen.memory.host + chosen.memory.states
        room = host if limits.host is not None and whole > limits.host else "what is free of memory"
        why.append(f"{states} in files: {room} would not hold them")
    elif chosen.place == "host" and skeleton.device.type != "cpu":
        why.append(f"{states} in the host's memory: {device or 'the device'} would not hold them")
    flags = " and ".join(filter(None, (host, device if skeleton.device.type != "cpu" else "")))
    if chosen.batch_size < usual:
        why.append(f"batches of {chosen.batch_size}, not {usual}: {flags} would not hold more")
    if chosen.logit_tokens != work.logits[0]:
        why.append(f"logits of {chosen.logit_tokens} tokens at a time, not {work.logits[0]}: {flags}")
    return replace(chosen, why=tuple(why))


def _refusal(skeleton: Skeleton, least: Fit, work: Work) -> ResourceError:
    """What to say where not even the least fits."""
    limits, parts = skeleton.limits, dict(least.memory.parts)
    on_device = skeleton.device.type != "cpu"
    if on_device and limits.device is not None and least.device_bytes > limits.device:
        flag, limit, needed, where = DEVICE, limits.device, least.device_bytes, f"the memory of {skeleton.device}"
    else:
        assert limits.host is not None, "without limits everything fits"
        flag, limit, needed, where = HOST, limits.host, least.host_bytes, "memory"
        parts = {estimate.PYTHON: least.memory.host} if on_device else parts
    if least.place == ("device" if flag == DEVICE else "host"):
        parts[estimate.STATES] = least.memory.states
    most = max(parts, key=lambda name: parts[name])
    what = f"{work.words} takes at least {size(needed)} of {where}, of which {most} {size(parts[most])}"
    ways = [f"give {flag} {_mebibytes(needed)}", *_less(skeleton, least, work, most)]
    return ResourceError(f"{what}, and {flag} allows {size(limit)}; {' or '.join(ways)}.")


def _less(skeleton: Skeleton, least: Fit, work: Work, most: str) -> list[str]:
    """What else to do where `most` is most of what is needed."""
    half = ["compute in half of it with --dtype bfloat16"] if skeleton.dtype.itemsize > 2 else []
    smaller = "--batch-size" if work.batch_size and least.batch_size > 1 else "--seqlen"
    ways = {
        estimate.ACTIVATIONS: [f"a smaller {smaller}"],
        estimate.STATES: ["fewer samples"],
        estimate.STATISTICS_OF: ["fewer samples, or a method that gathers less, such as wanda"],
        estimate.MATRIX: ["leave the largest matrices dense with --skip"],
        estimate.REBUILDING: ["leave --prune-barber out"],
        estimate.FITTING: ["leave --reconstruct and --refine learned out"],
        estimate.PICTURES: ["fewer samples"],
        estimate.PYTHON: [],
        estimate.LOGITS: [],
    }
    return ways.get(most, half)


def _mebibytes(nbytes: int) -> str:
    return f"{math.ceil(nbytes / MIB)}MiB"
