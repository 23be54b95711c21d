"""What lies outside of the layers that are pruned one by one: a vision tower, its projection, the head."""

from collections.abc import Callable, Collection, Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd

from trimcli.model.matrix import Matrix, matrix_of


def find_outside(
    model: nn.Module,
    inside: Collection[nn.Module],
    key_of: Callable[[str], str | None],
    shared: Mapping[str, str],
    *,
    stored: bool,
) -> tuple[dict[str, Matrix], dict[str, str]]:
    """The matrices in no module of `inside`, by full module name in module order; and why others there stay dense.

    key_of: parameter name -> checkpoint key, None for what is put together from several tensors. shared: parameter
    name -> why it is not one module's alone. stored: whether there is a checkpoint.
    """
    matrices: dict[str, Matrix] = {}
    dense: dict[str, str] = {}
    for name, module in model.named_modules():
        own = () if module in inside else module.named_parameters(name, recurse=False)
        for full, parameter in own:
            if parameter.ndim < 2:
                continue
            key = key_of(full)
            whole = full == f"{name}.weight" and parameter.ndim in (2, 4)  # some linears are stacks of matrices
            found = matrix_of(name, module, key) if whole else None
            if full in shared:
                dense[full.removesuffix(".weight")] = shared[full]
            elif found is None:
                dense[full.removesuffix(".weight")] = _other_form(module)
            elif key is None and stored:
                dense[name] = "the checkpoint holds it in pieces"
            else:
                matrices[name] = found
    return matrices, dense


def _other_form(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "it is an embedding, whose rows are looked up"
    if isinstance(module, _ConvNd):
        return "it is a convolution that is no 1x1"
    return "it is no linear's"
