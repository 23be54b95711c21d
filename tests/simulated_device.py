"""A simulated accelerator: a device that exists in bookkeeping alone, for machines without a CUDA device.

Its tensors lie on the CPU and say that they lie on "sim:0". Mixing devices raises as on CUDA; copies to and from the
device, and what makes a CUDA device's host wait for it, are counted; memory runs out at `limit` bytes, counted by
the tensors that Python and autograd still hold.

What CUDA allows is allowed: CPU tensors without dimensions as operands, and CPU tensors as indices (a copy to the
device). What waits is known by name, from torch's CUDA kernels; what is not named here is taken for asynchronous.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_copy_from_and_resize"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Their value comes to the host where it is a tensor on the device.
FILLS = {"aten::masked_fill", "aten::masked_fill_", "aten::index_fill", "aten::index_fill_"}
# The host reads a number, or the size of the result.
WAITS = {
    "aten::_linalg_check_errors",
    "aten::_linalg_eigh",
    "aten::_linalg_svd",
    "aten::_local_scalar_dense",
    "aten::_unique",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::histc",
    "aten::masked_select",
    "aten::multinomial",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::unique_dim_consecutive",
}


@dataclass
class Counts:
    """Copies to the host, copies to the device, and other waits of the host for the device."""

    to_host: int = 0
    to_device: int = 0
    waits: int = 0

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(mine - theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


class SimulatedDevice:
    """What is known of the one simulated device.

    counts: since the process began. live, peak: bytes of its tensors' storages, now and at most since `reset`.
    limit: bytes at which memory runs out, None for never; allowed: those that the process says it may take at most.
    total: bytes that it says it has.
    """

    def __init__(self) -> None:
        self.device = torch.device("sim", 0)
        self.counts = Counts()
        self.live = self.peak = 0
        self.limit: int | None = None
        self.allowed: int | None = None
        self.total = 1 << 40
        self.emptied = 0
        self._watched: dict[int, weakref.ref[Tensor]] = {}
        self._holders: dict[int, int] = {}

    def reset(self) -> None:
        """No limit, and the peak from now on."""
        self.limit, self.allowed, self.total, self.emptied, self.peak = None, None, 1 << 40, 0, self.live

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Counts of what happens inside, complete at the end."""
        before, found = Counts(*astuple(self.counts)), Counts()
        yield found
        found.__dict__.update((self.counts - before).__dict__)

    def hold(self, tensor: Tensor, storage: torch.UntypedStorage) -> None:
        """Count a storage's bytes for as long as `tensor`, or another one on it, lives. Raises OutOfMemoryError."""
        key, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        if key not in self._holders:
            limit = min((one for one in (self.limit, self.allowed) if one is not None), default=None)
            if limit is not None and self.live + size > limit:
                raise torch.OutOfMemoryError(
                    f"{self.device} out of memory: {self.live} bytes are in use, {size} more were asked for, "
                    f"{limit} is the limit."
                )
            self.live += size
            self.peak = max(self.peak, self.live)
        self._holders[key] = self._holders.get(key, 0) + 1
        name = id(tensor)

        def let_go(_: object) -> None:
            del self._watched[name]
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self.live -= size

        self._watched[name] = weakref.ref(tensor, let_go)


class SimulatedTensor(Tensor):
    """A tensor on the simulated device; `held` is the CPU tensor that holds its values."""

    held: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "SimulatedTensor":
        device = simulated_device()
        made: SimulatedTensor = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=device.device,
        )
        made.held = held
        device.hold(made, held.untyped_storage())
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(op, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.held})"

    def __setitem__(self, index: Any, value: Any) -> None:
        # As for CUDA tensors: a number stays on the CPU, from where filling needs no copy.
        super().__setitem__(index, value if isinstance(value, Tensor) else torch.tensor(value, dtype=self.dtype))

    def tolist(self) -> Any:
        return self.cpu().tolist()


@contextmanager
def simulated() -> Iterator[SimulatedDevice]:
    """The device with all its memory, which `--device sim:0` names for the duration."""
    from trimcli.model.device import compute_device

    device = simulated_device()
    device.reset()

    def named(name: str) -> torch.device:
        return device.device if name == str(device.device) else compute_device(name)

    try:
        with patch("trimcli.model.skeleton.compute_device", named):
            yield device
    finally:
        device.reset()


class _Module:
    """What torch asks the module of a device, `torch.sim`, for."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        """Nothing random happens on the device."""

    def get_rng_state(self, _: Any = None) -> Tensor:
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, _: Any = None) -> None:
        """As little as to be got."""

    def mem_get_info(self, _: Any = None) -> tuple[int, int]:
        device = simulated_device()
        return device.total - device.live, device.total

    def memory_allocated(self, _: Any = None) -> int:
        return simulated_device().live

    def get_per_process_memory_fraction(self, _: Any = None) -> float:
        device = simulated_device()
        return 1.0 if device.allowed is None else device.allowed / device.total

    def set_per_process_memory_fraction(self, fraction: float, _: Any = None) -> None:
        device = simulated_device()
        device.allowed = None if fraction == 1 else int(fraction * device.total)

    def empty_cache(self) -> None:
        simulated_device().emptied += 1


@cache
def simulated_device() -> SimulatedDevice:
    """The device, registered with torch the first time it is asked for."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("sim", backend_module=_Module())
    # Tensors of the device come by __torch_dispatch__; this is for what makes the first of them.
    _factories.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    _copies.impl("_copy_from", _copied, "PrivateUse1")
    return SimulatedDevice()


# A library takes its registrations along when it goes.
_factories = torch.library.Library("_", "IMPL")
_copies = torch.library.Library("aten", "IMPL")


def _copied(source: Tensor, sink: Tensor, non_blocking: bool = False) -> Tensor:
    """What `torch.tensor` ends in, which goes past __torch_dispatch__."""
    return _run(torch.ops.aten.copy_.default, (sink, source, non_blocking), {})


def _run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the tensors' values; what comes out lies where CUDA would leave it."""
    name = op._schema.name
    given: dict[int, Tensor] = {}

    def held(value: Any) -> Any:
        """An argument as the CPU takes it."""
        if isinstance(value, Tensor):
            inside = value.held if isinstance(value, SimulatedTensor) else value
            given[id(inside)] = value
            return inside
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == "sim" else value

    def lies(value: Any) -> Any:
        """What the operation wrote to is given back as it was given, unless it has another shape (`arange`)."""
        if not isinstance(value, Tensor):
            return value
        if id(value) in given and given[id(value)].shape == value.shape:
            return given[id(value)]
        return SimulatedTensor(value) if target == "sim" else value

    inside = _mapped(args, held)
    named = {key: _mapped(value, held) for key, value in kwargs.items()}
    target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    if any(isinstance(tensor, SimulatedTensor) for tensor in given.values()):
        if name not in COPIES:
            _refuse_other_devices(name, args, given.values())
        _count(name, args, kwargs, target)
        target = target or "sim"
    return _mapped(op(*inside, **named), lies)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same arguments or results, each changed, inside lists and tuples too."""
    if isinstance(value, list | tuple):
        found = [_mapped(one, change) for one in value]
        return found if isinstance(value, list) else tuple(found)
    return change(value)


def _refuse_other_devices(name: str, args: tuple[Any, ...], tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError where CUDA would: CPU tensors are welcome as indices, and as operands without dimensions."""
    for tensor in tensors:
        if isinstance(tensor, SimulatedTensor) or tensor.device.type != "cpu":
            continue
        written = tensor is args[0] and name.endswith("_")
        index = name in INDEXED and any(tensor is one for one in args[1])
        if written or (tensor.ndim and not index):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two, sim:0 and cpu! ({name})"
            )


def _count(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], target: str | None) -> None:
    """Count one operation with a tensor of the device: the host waits, or bytes go over."""
    counts = simulated_device().counts
    if name in COPIES:
        source, sink = (args[0], target) if name == "aten::_to_copy" else (args[1], args[0].device.type)
        counts.to_host += isinstance(source, SimulatedTensor) and sink == "cpu"
        counts.to_device += not isinstance(source, SimulatedTensor) and sink == "sim"
    elif name in INDEXED:
        indices = [index for index in args[1] if index is not None]
        counts.to_device += sum(not isinstance(index, SimulatedTensor) for index in indices)
        masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        # One number into the places of one mask is a fill.
        number = len(args) > 2 and len(indices) == 1 and args[2].numel() == 1 and args[2].device.type == "cpu"
        counts.waits += masks and not number
    elif name == "aten::repeat_interleave":
        counts.waits += kwargs.get("output_size") is None
    elif name in FILLS:
        counts.waits += isinstance(args[-1], SimulatedTensor)
    else:
        counts.waits += name in WAITS
