"""The inputs of stacked experts: which tokens each is given, seen where its slice of a parameter is multiplied.

An experts module is called once, with all tokens; inside of it transformers loops over experts, multiplies sorted
tokens by groups, or every expert by a batch of its own. Whatever it does ends in a few products of matrices, one factor
of which lies in the memory of the parameter: where there tells the expert, and the other factor is what it was given.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trimcli.files.names import grouped
from trimcli.model.matrix import Matrix

Take = Callable[[Tensor], None]
"""Is given some tokens [T, D_in] of an expert's."""

# Products by operator: where among its arguments inputs and weights stand.
PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::bmm": (0, 1), "aten::baddbmm": (1, 2)}
# Those of sorted tokens [S, D_in] with a stack, after which stands where each expert's end, int32 [E].
GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
# The implementations of experts whose products are among these; any other gives way to transformers' loop.
SEEN = ("eager", "grouped_mm")


@contextmanager
def watching_experts(takers: Mapping[Matrix, Take]) -> Iterator[None]:
    """While this lasts, whatever the expert of each matrix is given is taken. Matrices: one of each slice."""
    with ExitStack() as undo:
        for module, matrices in grouped(takers, lambda matrix: matrix.module).items():
            undo.enter_context(_watched(module, {matrix: takers[matrix] for matrix in matrices}))
        yield


@contextmanager
def _watched(module: nn.Module, takers: Mapping[Matrix, Take]) -> Iterator[None]:
    config, forward = getattr(module, "config", None), module.forward
    chosen = getattr(config, "_experts_implementation", None)

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _Products(takers, [*args, *kwargs.values()]):
            return forward(*args, **kwargs)

    if chosen is not None and chosen not in SEEN:
        config._experts_implementation = "eager"  # type: ignore[union-attr]
    module.forward = watched
    try:
        yield
    finally:
        del module.forward
        if chosen is not None:
            config._experts_implementation = chosen  # type: ignore[union-attr]


class _Products(TorchDispatchMode):
    """Sees the products that one call of an experts module computes. given: what it is called with."""

    def __init__(self, takers: Mapping[Matrix, Take], given: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._takers: dict[int, dict[int, Take]] = {}
        self._parameters: dict[int, Tensor] = {}
        for matrix, take in takers.items():
            assert matrix.expert is not None
            parameter = matrix.parameter
            memory = parameter.untyped_storage().data_ptr()
            self._parameters[memory] = parameter
            self._takers.setdefault(memory, {})[matrix.expert] = take
        routes = (one for one in given if isinstance(one, Tensor) and one.ndim == 2 and not one.is_floating_point())
        self._chosen = next(routes, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        places = (0, 1) if name in GROUPED else PRODUCTS.get(name)
        if places is not None:
            inputs, weight = (args[place] for place in places)
            if (memory := weight.untyped_storage().data_ptr()) in self._takers:
                ends = None
                if name in GROUPED:
                    ends = args[2] if len(args) > 2 else (kwargs or {})["offs"]
                self._take(memory, inputs, weight, ends)
        return result

    def _take(self, memory: int, inputs: Tensor, weight: Tensor, ends: Tensor | None) -> None:
        takers, parameter = self._takers[memory], self._parameters[memory]
        if ends is not None:
            start = 0
            for expert, end in enumerate(ends.tolist()):
                if end > start and expert in takers:
                    takers[expert](inputs[start:end])
                start = max(start, end)
        elif weight.ndim == 3 and len(weight) == len(parameter):
            for expert, take in takers.items():
                tokens = self._routed(inputs[expert], expert)
                if len(tokens):
                    take(tokens)
        else:
            expert = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            if expert in takers and inputs.numel():
                takers[expert](inputs.reshape(-1, inputs.shape[-1]))

    def _routed(self, tokens: Tensor, expert: int) -> Tensor:
        """Those of all tokens [T, D_in] that the expert was chosen for: the others are zeros, or their outputs are."""
        if self._chosen is not None and len(self._chosen) == len(tokens):
            return tokens[(self._chosen == expert).any(dim=1)]
        return tokens[tokens.any(dim=1)]
