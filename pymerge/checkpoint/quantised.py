"""Weights that are stored as integers, and fp8 without scales: what they are, and what to do about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from pymerge.checkpoint.fp8 import FP8
from pymerge.checkpoint.header import safe_name
from pymerge.checkpoint.read import AnyTensor, Checkpoint


class Kind(NamedTuple):
    """A format: a tensor whose name ends so, beside others of the same stem."""

    end: str
    beside: tuple[str, ...]
    what: str
    todo: str


OTHER = "merge the model that it was made of, or dequantise it first with its own tools"
LOAD = "dequantise it first: load it with transformers, {}, and save that"
DENSE = LOAD.format("quantization_config=CompressedTensorsConfig(dequantize=True)")
KINDS = (
    Kind("_blocks", ("_scales",), "MXFP4", LOAD.format("quantization_config=Mxfp4Config(dequantize=True)")),
    Kind(".qweight", (".qzeros", ".g_idx"), "GPTQ", OTHER),
    Kind(".qweight", (".qzeros", ".scales"), "AWQ", OTHER),
    Kind(".weight", (".weight.absmax",), "bitsandbytes, 4 bits", LOAD.format("call model.dequantize()")),
    Kind(".weight", (".SCB",), "bitsandbytes, 8 bits", LOAD.format("call model.dequantize()")),
    Kind(".weight_packed", (".weight_scale",), "compressed-tensors, packed", DENSE),
    Kind(".W_q", (".scale",), "HQQ", OTHER),
    *(
        Kind(".weight", (scale,), "integers with scales", DENSE)
        for scale in (".weight_scale", ".weight_scale_inv", ".scales", ".scale")
    ),
)
BARE = (
    "fp8 without scales (weight_scale_inv or weight_scale beside it)",
    "give the checkpoint with its scales, or save it as bfloat16 where its values are the weights",
)
IN_MEMORY = ("fp8 with scales, in memory", "give the model's folder, whose config.json says how it is scaled")


def quantised(models: Mapping[str, Checkpoint], selects: Callable[[str], bool]) -> list[str]:
    """What is wrong with models that have quantised weights among the tensors to be merged, a line for each model.

    models  by their labels; the base may be among them twice"""
    lines = []
    for label, model in {id(model): (label, model) for label, model in models.items()}.values():
        found = [(name, kind) for name in model if selects(name) and (kind := kind_of(model, name)) is not None]
        for name, (what, todo) in found[:1]:
            lines.append(
                f"{safe_name(name)}: {model[name].dtype} in {label}: {what}, {len(found)} tensor(s) of the model. "
                f"Quantised weights are never averaged: {todo}."
            )
    return lines


def kind_of(model: Mapping[str, AnyTensor], name: str) -> tuple[str, str] | None:
    """What a tensor's format is and what to do about it; None where it is not known to be quantised."""
    tensor = model[name]
    if tensor.dtype in FP8:
        return IN_MEMORY if any(f"{name}{end}" in model for end in ("_scale_inv", "_scale")) else BARE
    if tensor.dtype.startswith(("F", "BF")) or len(tensor.shape) < 2:
        return None
    for kind in KINDS:
        stem = name.removesuffix(kind.end)
        if name.endswith(kind.end) and all(f"{stem}{end}" in model for end in kind.beside):
            return kind.what, kind.todo
    return None
