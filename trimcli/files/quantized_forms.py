"""The quantized forms that are not read, by what their tensors are called, and what makes 16-bit weights of them."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimcli.errors import InputError

INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.int64}
ORIGINAL = "give the 16-bit model that it was made from"
TRANSFORMERS = "load it with transformers, call `model.dequantize()` and save that"
COMPRESSED = "load it with transformers under `CompressedTensorsConfig(run_compressed=False)` and save that"
MXFP4 = "load it with transformers under `Mxfp4Config(dequantize=True)` and save that"


@dataclass(frozen=True)
class Form:
    """A quantized form: `tail` ends the name of one of its tensors, of `dtypes`; `beside` ends another's, if given."""

    name: str
    tail: str
    dtypes: Collection[torch.dtype]
    way_out: str
    beside: str | None = None


FORMS = (
    Form("bitsandbytes 4-bit", r"\.quant_state\.bitsandbytes__\w+", {torch.uint8}, TRANSFORMERS),
    Form("bitsandbytes 8-bit", r"\.SCB", {torch.float32, torch.float16}, TRANSFORMERS),
    Form("GPTQ", r"\.qweight", INTEGERS, ORIGINAL, beside=r"\.g_idx"),
    Form("AWQ", r"\.qweight", INTEGERS, ORIGINAL, beside=r"\.qzeros"),
    Form("MXFP4", r"_blocks", {torch.uint8}, MXFP4, beside=r"_scales"),
    Form("NVFP4", r"\.weight_global_scale", {torch.float32}, COMPRESSED, beside=r"\.weight_packed"),
    Form("NVFP4", r"\.weight_scale_2", {torch.float32}, ORIGINAL, beside=r"\.weight"),
    Form("Marlin 2:4", r"\.scale_packed", {torch.float16, torch.bfloat16}, ORIGINAL, beside=r"\.meta"),
    Form("pack-quantized", r"\.weight_packed", INTEGERS, COMPRESSED),
    Form("HQQ", r"\.W_q", INTEGERS, ORIGINAL),
    Form("quanto", r"\.weight\._data(\._\w+)?", INTEGERS | {torch.float8_e4m3fn}, ORIGINAL),
    Form("torchao", r"[._]qdata", INTEGERS | {torch.float8_e4m3fn}, ORIGINAL),
    Form("AQLM", r"\.codes", INTEGERS, ORIGINAL, beside=r"\.codebooks"),
    Form("int-quantized", r"\.weight", {torch.int8}, COMPRESSED, beside=r"\.weight_scale"),
)


def refuse_other_forms(dtypes: Mapping[str, torch.dtype], quantization: Mapping[str, Any], directory: Path) -> None:
    """Raise InputError if tensors, name -> dtype, are of a quantized form. quantization: the config's word on it."""
    method = str(quantization.get("quant_method") or "").lower()
    for form in FORMS:
        found = next((key for key, dtype in dtypes.items() if dtype in form.dtypes and _ends(key, form.tail)), None)
        if found is not None and (form.beside is None or any(_ends(key, form.beside) for key in dtypes)):
            name = method.upper() if {method.upper(), form.name} == {"GPTQ", "AWQ"} else form.name
            raise InputError(f"{directory} holds {name} weights ({found}), which are not read; {form.way_out}.")
    odd = [
        key for key, dtype in dtypes.items() if dtype in {*INTEGERS, torch.float4_e2m1fn_x2} and key.endswith("weight")
    ]
    if odd and quantization:
        what = f"{directory} holds weights quantized by {method or 'an unnamed method'} ({odd[0]})"
        raise InputError(f"{what}, which are not read; {ORIGINAL}.")


def _ends(key: str, tail: str) -> bool:
    return re.search(f"(?:{tail})$", key) is not None
