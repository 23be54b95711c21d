"""peft adapters whose product the masks hold: W + s (B A) * keep, in the forward pass and in the merge."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimcli.errors import OptionError
from trimcli.files.names import inside_layer
from trimcli.model.matrix import Matrix
from trimcli.training.masked import KeepOf
from trimcli.training.options import FinetuneOptions

USUAL = ("q_proj", "v_proj")


class MaskedLora(LoraLinear):
    """peft's adapter of a linear or of transformers' `Conv1D`, whose product is zero outside of a mask.

    gone: bool, shaped as the weight is stored, True where a weight is to stay zero; None for a dense matrix.
    """

    gone: Tensor | None

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)
        self.fan_in_fan_out = self.is_target_conv_1d_layer = isinstance(self.get_base_layer(), Conv1D)
        self.register_buffer("gone", None, persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The product s (B A) * keep, as the weight is stored: what the forward pass adds, and the merge."""
        delta = super().get_delta_weight(adapter)
        return delta if self.gone is None else delta.masked_fill(self.gone.to(delta.device), 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's outputs and, unless merged or disabled, those of the adapters' masked products."""
        if self.disable_adapters or self.merged:
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                delta = self.get_delta_weight(adapter)
                inputs = self.lora_dropout[adapter](x.to(delta.dtype))
                product = nn.functional.linear(inputs, delta.T if self.fan_in_fan_out else delta)
                result = result + product.to(result.dtype)
        return result


def adapted(linears: Mapping[str, Matrix], targets: Sequence[str]) -> list[Matrix]:
    """The linears that get adapters: whose names end in one of `targets`, or all. Raises OptionError for none."""
    if targets == ("all",):
        return list(linears.values())
    wanted = targets or USUAL
    found = [linear for name, linear in linears.items() if f".{name}".endswith(tuple(f".{end}" for end in wanted))]
    if not (targets or found):
        return list(linears.values())
    for end in targets:
        if not any(f".{name}".endswith(f".{end}") for name in linears):
            known = ", ".join(dict.fromkeys(inside_layer(name) for name in linears))
            raise OptionError(f"--targets {end!r} matches no linear; give some of {known}, or all.")
    return found


def add_adapters(
    model: Any, linears: Iterable[Matrix], held: Iterable[str], keep_of: KeepOf, options: FinetuneOptions, base: str
) -> PeftModel:
    """`model` with an adapter on each of `linears`, all else frozen. held: those that have masks. base: its path.

    Under `--merge none` the adapters are peft's own.
    """
    chosen = {linear.name: linear for linear in linears}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        target_modules=list(chosen),
        fan_in_fan_out=all(linear.transposed for linear in chosen.values()),
        base_model_name_or_path=base,
    )
    if options.merge == "masked":
        config._register_custom_module({nn.Linear: MaskedLora, Conv1D: MaskedLora})
    made = get_peft_model(model, config)
    masked = set(held)
    by_base = {id(linear.module): linear for linear in chosen.values()}
    for module in made.modules():
        if isinstance(module, MaskedLora):
            linear = by_base[id(module.get_base_layer())]
            if linear.name in masked:
                keep = keep_of(linear.name)
                gone = (~keep).T.contiguous() if linear.transposed else ~keep
                module.gone = gone.to(linear.parameter.device)
    return made
