"""Transformers models without weights: built on the meta device, filled and emptied in parts."""

import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimcli.errors import InputError, first_line
from trimcli.files.checkpoint import CONFIG, Checkpoint
from trimcli.model.bounds import counted_modules, refuse_absurd_counts, refuse_absurd_sizes


def build_empty(checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The transformers model of a config, parameters on the meta device, buffers real. Raises InputError."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    refuse_absurd_counts(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)
        if getattr(config, "is_encoder_decoder", False):
            what = f"{checkpoint.directory / CONFIG} is of an encoder-decoder ({config.model_type})"
            raise InputError(f"{what}, whose decoder reads what its encoder made of other tokens; give a decoder.")
        make = partial(_kind_of(config).from_config, config, dtype=dtype, trust_remote_code=trust_remote_code)
        # What is drawn for weights that a checkpoint brings takes most of the time of making a model.
        with _no_drawing():
            _refuse_absurd(make, checkpoint)
            with init_empty_weights(include_buffers=False):
                model = make()
    except InputError:
        raise
    except Exception as problem:  # any library behind a config may raise anything
        kind = "image classifier" if classifies_images(checkpoint.config_document) else "causal language model"
        what = f"no {kind} can be built from {checkpoint.directory / CONFIG}"
        hint = "check the config, or --trust-remote-code if the model brings its own code."
        reason = "its tensors fit into no memory" if "allocate memory" in str(problem) else first_line(problem)
        raise InputError(f"{what} ({reason}); {hint}") from None
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _no_drawing() -> contextlib.AbstractContextManager[None]:
    """While this lasts, transformers draws no weights for the models that it makes."""
    try:
        home: Any = importlib.import_module("transformers.initialization")
    except ImportError:  # transformers 4
        home = importlib.import_module("transformers.modeling_utils")
    return home.no_init_weights()


def _kind_of(config: Any) -> Any:
    """The class of transformers' that makes the model: it classifies images, reads them beside text, or text alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    if classifies_images(config.to_dict()):
        return AutoModelForImageClassification
    seeing = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    decoder = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = seeing in architectures(config.to_dict())
    return AutoModelForImageTextToText if seeing and (named or decoder is None) else AutoModelForCausalLM


def classifies_images(config: Mapping[str, Any]) -> bool:
    """Whether a config document's architectures are an image classifier's."""
    return any("ForImageClassification" in name for name in architectures(config))


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The classes of transformers' that a config document names; none where it says anything else."""
    named = config.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _refuse_absurd(make: Callable[[], Any], checkpoint: Checkpoint) -> None:
    """Raise InputError where a model is of absurd size; it is made once without any memory to tell."""
    try:
        with counted_modules(checkpoint), torch.device("meta"):
            model = make()
    except InputError:
        raise
    except Exception:  # some read their buffers as they are made; what is wrong shows when they are real
        return
    refuse_absurd_sizes(model, checkpoint)


def find_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """The layers that are pruned one by one, in order, each with its full name.

    Of an image classifier whose config gives `depths` they are spread over as many stages: a layer is a block of a
    stage. Raises InputError where no layers are found.
    """
    depths = getattr(model.config, "depths", None) if classifies_images(model.config.to_dict()) else None
    if isinstance(depths, list | tuple) and depths:
        return _find_blocks(model, depths)
    name, modules = find_decoder_layers(model)
    return [(f"{name}.{index}", module) for index, module in enumerate(modules)]


def _find_blocks(model: Any, depths: Sequence[int]) -> list[tuple[str, nn.Module]]:
    """The blocks of all stages, each with its full name.

    The stages are the largest outermost list of as many as there are depths, a stage's blocks the largest in it of as
    many as its depth says.
    """
    found: list[tuple[str, nn.Module]] = []
    name, stages = _largest_list(model, len(depths))
    for index, (stage, depth) in enumerate(zip(stages, depths, strict=False)):
        inner, blocks = _largest_list(stage, depth)
        found += [(f"{name}.{index}.{inner}.{place}", block) for place, block in enumerate(blocks)]
    if not found or len(found) != sum(depths):
        what = f"{type(model).__name__} does not hold its blocks in stages of {list(depths)}"
        raise InputError(f"{what}, as its config says; its form is not supported.")
    return found


def _largest_list(module: nn.Module, length: int) -> tuple[str, list[nn.Module]]:
    """The outermost list of so many modules with the most weights: its name below `module`, and its entries, if any."""
    lists = {name: one for name, one in module.named_modules() if isinstance(one, nn.ModuleList | nn.Sequential)}
    lists = {name: one for name, one in lists.items() if name and len(one) == length}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    name = max(outer, key=lambda name: sum(one.numel() for one in lists[name].parameters()), default="")
    return name, list(lists.get(name, ()))


def find_decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The decoder's ModuleList: of those with `num_hidden_layers` entries if any, and of the outermost, the largest.

    Raises InputError where there is none, or where a layer is spread over several lists.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {name: one for name, one in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    sizes = {name: sum(parameter.numel() for parameter in one.parameters()) for name, one in outer.items()}
    decoder = set(model.get_decoder().modules()) if hasattr(model, "get_decoder") else set()

    def fitness(name: str) -> tuple[bool, bool, int, int]:
        counted = len(outer[name]) == getattr(config, "num_hidden_layers", None)
        return counted, outer[name] in decoder, -name.count("."), sizes[name]

    name = max((name for name, size in sizes.items() if size), key=fitness, default=None)
    if name is None:
        raise InputError(f"{type(model).__name__} has no list of decoder layers; its form is not supported.")
    parent = name.rpartition(".")[0]
    beside = [
        other
        for other, one in outer.items()
        if other.rpartition(".")[0] == parent and len(one) == len(outer[name]) and sizes[other] > sizes[name] / 5
    ]
    if len(beside) > 1:
        spread = f"spreads a layer over the lists {', '.join(beside)}"
        raise InputError(f"{type(model).__name__} {spread}, so none can be pruned on its own; it is not supported.")
    return name, outer[name]


def expert_counts(config: Any) -> set[int]:
    """How many experts a model's config, or one within, speaks of."""
    documents = [config.to_dict()]
    documents += [value for value in documents[0].values() if isinstance(value, dict)]
    named = {value for one in documents for name, value in one.items() if str(name).endswith("experts")}
    return {value for value in named if isinstance(value, int) and value > 1}


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the parameter `name` (a path below `module`), without gradient."""
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def empty(module: nn.Module, *, recurse: bool = True) -> None:
    """Put the parameters of a module (and of those below it) back on the meta device."""
    for owner in module.modules() if recurse else [module]:
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
