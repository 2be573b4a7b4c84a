"""Weights of eight bits with scales (fp8), read as the float32 values that they stand for.

As DeepSeek-V3, Qwen3-FP8 (blocks), compressed-tensors, ModelOpt (tensors, channels, blocks) and FBGEMM (channels) store
them: value = entry * scale, whatever the scale is called. Scales, and those of activations, are gone from the names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge import _C
from pymerge.checkpoint.byte_tensor import ByteTensor
from pymerge.checkpoint.header import ITEMSIZE, name_list, safe_name
from pymerge.checkpoint.layout import component_of
from pymerge.errors import InputError, MergeError, ShapeMismatch, UnsupportedDtype

if TYPE_CHECKING:
    from pymerge.checkpoint.read import AnyTensor, Checkpoint

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("F32", "BF16", "F16", "F8_E8M0")
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")  # quant_method of config.json
CONFIGS = ("quantization_config", "compression_config")
# What a runtime multiplies activations or its cache with: no weights are made of them.
OF_ACTIVATIONS = """
    .input_scale .input_scale_ub .activation_scale .activation_scale_ub .output_scale .k_scale .v_scale .q_scale
    .kv_scale _input_scale _activation_scale
""".split()
BLOCK = 1 << 18  # entries that are read and decoded together: they stay in the processor's cache


class ScaledTensor(ByteTensor):
    """weight * the scale of its block, in float32: a merge sees what the model computes with.

    weight   fp8 [..., m, n], the last two axes a matrix
    scale    [..., ceil(m / block[0]), ceil(n / block[1])], in that order, or one for all
    stored   bfloat16: a merge is rounded to it at the end

    Looks like a LazyTensor. Reading costs the weight's bytes and the scales; memory some times BLOCK and the scales."""

    __slots__ = ("block", "dtype", "name", "nbytes", "offset", "scale", "shape", "stored", "weight")
    file: Path | None = None

    def __init__(self, weight: AnyTensor, scale: AnyTensor, block: tuple[int, int]) -> None:
        self.weight, self.scale, self.block = weight, scale, block
        self.name, self.shape, self.offset = weight.name, weight.shape, 0
        self.dtype, self.stored = "F32", "BF16"
        self.nbytes = self.numel * ITEMSIZE["F32"]

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Fill `view` with bytes start .. start + len(view) of the tensor, which are whole entries."""
        view = view.cast("B")
        if start < 0 or start + view.nbytes > self.nbytes or start % 4 or view.nbytes % 4:
            raise ValueError(f"{self.name}: bytes {start}..{start + view.nbytes} are not entries of it")
        first, count = start // 4, view.nbytes // 4
        if not count:
            return
        table, scales = decoded(self.weight.dtype), self._scales()
        raw = memoryview(bytearray(min(BLOCK, count)))
        for at in range(0, count, BLOCK):
            here = raw[: min(BLOCK, count - at)]
            self.weight.read_into(here, first + at)
            out = view[4 * at : 4 * (at + len(here))]
            _C.decode_scaled(here, out, table, scales, first + at, self.shape[-2:], self.block)

    def _scales(self) -> memoryview:
        """Those of all matrices, float32."""
        import numpy as np

        raw = bytearray(self.scale.nbytes)
        self.scale.read_into(memoryview(raw))
        wanted = math.prod(self.shape[:-2]) * math.prod(grid(self.shape[-2:], self.block))
        return np.resize(widened(raw, self.scale.dtype), wanted).data  # one for all stands for each

    def __repr__(self) -> str:
        return f"ScaledTensor({safe_name(self.name)}, {self.weight.dtype}, {list(self.shape)}, block {self.block})"


@cache
def decoded(code: str) -> bytes:
    """The float32 values of the 256 bytes of an fp8 dtype; NaN and Inf are such."""
    return widened(bytes(range(256)), code).tobytes()


def widened(raw: bytes | bytearray, code: str) -> Any:
    """Entries of a dtype of eight or sixteen bits, or float32, as float32. (torch, which could do it, takes a second
    and 200 MB to be there; a merge of other weights does without.)"""
    import numpy as np

    if code in ("F32", "F16"):
        return np.frombuffer(raw, f"f{ITEMSIZE[code]}").astype("f4")
    if code == "BF16":
        return (np.frombuffer(raw, "u2").astype("u4") << 16).view("f4")
    bits = np.frombuffer(raw, "u1").astype("u2")
    if code == "F8_E5M2":  # the upper half of a float16
        return (bits << 8).view("f2").astype("f4")
    if code == "F8_E8M0":  # an exponent
        return np.where(bits == 0xFF, np.nan, np.exp2(bits - 127.0)).astype("f4")
    # E4M3: as in float16, three bits to the right, an exponent greater by 8; no Inf, one NaN
    values = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).view("f2").astype("f4") * 256
    return np.where((bits & 0x7F) == 0x7F, np.float32(np.nan), values)


@dataclass
class Reader:
    """Finds the scales of a checkpoint's fp8 weights and collects what is wrong with them."""

    checkpoint: Checkpoint
    problems: list[tuple[type[MergeError], str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = dict(quantization_configs(self.checkpoint.config or {}))
        self.settings: Mapping[str, Any] = next(iter(config.values()), {})
        self.changes: dict[str, Any] = dict.fromkeys(config)
        self.where = "the model" if self.checkpoint.path is None else safe_name(str(self.checkpoint.path), 400)

    def run(self) -> Checkpoint:
        """The checkpoint with plain tensors in place of weights and scales; itself where it has none such."""
        names = [name for name, tensor in self.checkpoint.items() if tensor.dtype in FP8]
        pairs = {name: scale for name in names if (scale := self.scale_of(name)) is not None}
        if not pairs:
            return self.checkpoint
        inner = sorted({component_of(name, self.checkpoint.components) for name in pairs} - {""})
        if inner and self.checkpoint.components:  # their config.json, by which scales are read, is not the folder's
            raise UnsupportedDtype(
                f"{self.where}: component {name_list(inner)}: fp8 weights with scales: merge that folder by itself, or "
                "give the component in bfloat16"
            )
        if (method := self.settings.get("quant_method")) not in (*METHODS, None):
            raise UnsupportedDtype(
                f"{self.where}: fp8 weights of quant_method {method!r}, whose scales pymerge does not know (it knows "
                f"{', '.join(METHODS)}): dequantise the model with its own tools first"
            )
        made = {n: tensor for n, scale in pairs.items() if (tensor := self.scaled(n, scale)) is not None}
        if self.problems:
            kinds = {kind for kind, _ in self.problems}
            kind = kinds.pop() if len(kinds) == 1 else InputError
            more = [f"... and {len(self.problems) - 10} more"] if len(self.problems) > 10 else []
            raise kind("\n".join([text for _, text in self.problems[:10]] + more))
        scales = set(pairs.values())
        dropped = [name for name in self.checkpoint if name not in scales and self.is_of_activations(name)]
        tensors = {
            name: made.get(name, self.checkpoint[name])
            for name in self.checkpoint.file_order()
            if name not in scales and name not in dropped
        }
        blocks = f", blocks of {list(declared)}" if (declared := self.declared_block()) is not None else ""
        notes = [f"fp8 weights read with their scales: {len(made)} tensor(s){blocks}"]
        if dropped:
            notes.append(f"scales of activations, dropped: {len(dropped)} tensor(s): {name_list(dropped)}")
        return self.checkpoint.viewed(tensors, notes=notes, config_changes=self.changes)

    def scale_of(self, name: str) -> str | None:
        """The tensor that holds the scales of a weight."""
        stem = name.removesuffix(".weight")
        known = (f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.qscale_weight")
        found = [scale for scale in known if scale in self.checkpoint and scale != name]
        if len(found) > 1:
            self.problems.append((InputError, f"{self.where}: {safe_name(name)}: scales twice: {name_list(found)}"))
        return found[0] if found else None

    def scaled(self, name: str, scale: str) -> ScaledTensor | None:
        weight, factor = self.checkpoint[name], self.checkpoint[scale]
        text = f"{self.where}: {safe_name(name)}: {weight.dtype} {list(weight.shape)} with {safe_name(scale)}"
        if factor.dtype not in SCALES:
            self.problems.append((UnsupportedDtype, f"{text}, which is {factor.dtype}: expected {', '.join(SCALES)}"))
            return None
        block = block_of(weight.shape, factor.shape, self.declared_block())
        if block is None:
            self.problems.append((ShapeMismatch, f"{text} {list(factor.shape)}: expected {self.expected(weight)}"))
            return None
        return ScaledTensor(weight, factor, block)

    def declared_block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale, as config.json says."""
        found = self.settings.get("weight_block_size")
        if found is None:
            groups = self.settings.get("config_groups")
            weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if groups else []
            sizes = [w["block_structure"] for w in weights if isinstance(w, dict) and w.get("block_structure")]
            found = sizes[0] if sizes and all(size == sizes[0] for size in sizes) else None
        if not isinstance(found, list | tuple) or len(found) != 2:
            return None
        rows, columns = found
        return (rows, columns) if all(isinstance(size, int) and size > 0 for size in (rows, columns)) else None

    def expected(self, weight: AnyTensor) -> str:
        *lead, m, n = weight.shape if len(weight.shape) > 1 else (1, *weight.shape)
        declared = self.declared_block()
        if declared is None:
            blocks = "blocks only with weight_block_size in the quantization_config of config.json"
        else:
            blocks = f"{[*lead, *grid((m, n), declared)]} (blocks of {list(declared)})"
        return f"one number, {[*lead, m, 1]} (rows), or {blocks}"

    def is_of_activations(self, name: str) -> bool:
        return len(self.checkpoint[name].shape) < 2 and any(name.endswith(end) for end in OF_ACTIVATIONS)


def grid(matrix: Sequence[int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-matrix[0] // block[0]), -(-matrix[1] // block[1])


def block_of(
    shape: tuple[int, ...], scale: tuple[int, ...], declared: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the shapes do not go together."""
    if len(shape) < 2 or math.prod(shape) == 0:
        return None
    lead, (m, n) = shape[:-2], shape[-2:]
    if declared is not None and scale == (*lead, *grid((m, n), declared)):
        return declared
    if scale in ((), (1,), lead) or (declared is None and scale == (*lead, 1, 1)):
        return m, n
    if scale in ((*lead, m, 1), (*lead, m)):
        return 1, n
    if lead and scale == (*lead, 1, n):  # stored [in, out]
        return m, 1
    return None


def quantization_configs(config: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where a config.json says how its weights are stored: dotted key -> what it says, the outermost first."""
    for key in CONFIGS:
        if isinstance(config.get(key), dict):
            yield f"{at}{key}", config[key]
    for key, value in config.items():
        if isinstance(value, dict) and key not in CONFIGS:
            yield from quantization_configs(value, f"{at}{key}.")


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with fp8 weights that have scales as the values that they stand for, without the scales.

    fp8 weights without scales stay what they are.
    Raises   ShapeMismatch, UnsupportedDtype, InputError: scales of other shapes, dtypes or formats."""
    return Reader(checkpoint).run()
