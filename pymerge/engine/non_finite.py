"""What happens when a kernel reports NaN or Inf: an error that says where, or a relaxation that the recipe names."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from pymerge import _C
from pymerge.checkpoint import ITEMSIZE, AnyTensor, safe_name
from pymerge.engine.arena import address_of
from pymerge.errors import NonFinite, Overflow
from pymerge.recipe import Recipe

if TYPE_CHECKING:
    from pymerge.engine.piece import Piece

CHUNK = 1 << 22  # entries looked at together


def settle_non_finite(recipe: Recipe, piece: Piece, bad: list[int], params: _C.DeltaParams | None) -> None:
    """`bad` as delta_merge returns it: base, tuned..., add, out. Raises unless the recipe relaxes just this."""
    bad_inputs = any(bad[:-1])
    if bad_inputs:
        if recipe.relaxations.get("nonfinite") != "keep":
            raise_bad_input(piece)
    elif params is None:  # a copy that changes no dtype cannot overflow
        return
    elif recipe.relaxations.get("overflow") == "clamp":
        clamp(piece, params)
    else:
        raise_overflow(piece, bad[-1], max(map(abs, in_float32(piece, params))))


def labels(piece: Piece) -> list[str]:
    """What the piece's inputs are called, base first where there is one."""
    entry = piece.item.entry
    if piece.item.factored:
        return ["base"]
    reference, *models = entry.labels or ("base", "the update")
    fisher = [f"Fisher information of {model}" for model in models] if entry.weights else []
    return ([reference] if piece.item.mode == "copy" or entry.base is not None else []) + models + fisher


def raise_bad_input(piece: Piece) -> NoReturn:
    name = safe_name(piece.item.entry.name)
    found = []
    for label, tensor in zip(labels(piece), piece.item.inputs, strict=False):
        count, first = count_non_finite(tensor)
        if count:
            found.append(
                f"{label}: {count} of {tensor.numel} entries, the first at {list(unravel(first, tensor.shape))}"
            )
    raise NonFinite(
        f"{name}: NaN or Inf in {'; '.join(found)}. Nothing was written. Mend or leave out the model, exclude the "
        "tensor (`exclude:`), or say `relax: {nonfinite: keep}` to merge it as it is."
    )


def count_non_finite(tensor: AnyTensor) -> tuple[int, int]:
    """(how many, index of the first) over the whole tensor, read again in chunks."""
    total, first = 0, -1
    buffer = memoryview(bytearray(CHUNK * ITEMSIZE[tensor.dtype]))
    address = address_of(buffer)
    for start in range(0, tensor.numel, CHUNK):
        count = min(CHUNK, tensor.numel - start)
        tensor.read_into(buffer[: count * ITEMSIZE[tensor.dtype]], start * ITEMSIZE[tensor.dtype])
        bad, where = _C.count_nonfinite((address, tensor.dtype), count)
        if bad and first < 0:
            first = start + where
        total += bad
    return total, first


def unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Position of a flat index."""
    position = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        position.append(rest)
    return tuple(reversed(position))


def in_float32(piece: Piece, params: _C.DeltaParams) -> memoryview[float]:
    """The piece's result before rounding, float32."""
    buffer = memoryview(bytearray(4 * piece.count))
    piece.merge_into((address_of(buffer), "F32"), params)
    return buffer.cast("f")


def raise_overflow(piece: Piece, count: int, largest: float) -> NoReturn:
    entry = piece.item.entry
    inputs = ", ".join(sorted({tensor.dtype for tensor in piece.item.inputs}))
    raise Overflow(
        f"{safe_name(entry.name)}: {count} merged entries (of the {piece.count} from entry {piece.first} on) do not "
        f"fit {entry.dtype}; the largest magnitude is {largest:.4g} (inputs {inputs}). Nothing was written. Use "
        "`out_dtype: bfloat16` or `float32`, or say `relax: {overflow: clamp}`."
    )


def clamp(piece: Piece, params: _C.DeltaParams) -> None:
    """Writes the piece's result again, cut to the largest finite value of the output dtype."""
    import torch

    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[piece.item.entry.dtype]
    limit = torch.finfo(dtype).max
    values = torch.frombuffer(in_float32(piece, params), dtype=torch.float32).clamp(-limit, limit).to(dtype)
    piece.out_view[:] = values.view(torch.uint8).numpy().data
