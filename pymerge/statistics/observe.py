"""`pymerge.observe`: run a model over samples and keep what its linear layers see."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pymerge.errors import InputError
from pymerge.statistics.collect import Collector, linear_modules
from pymerge.statistics.store import Header, Statistics

DTYPES = {"float32": torch.float32, "float64": torch.float64}
HEADS = ("lm_head", "*.lm_head", "classifier", "*.classifier", "score", "embed_out", "cls.*")
MASKS = ("attention_mask", "padding_mask")


def selected(name: str, targets: Sequence[str], exclude: Sequence[str]) -> bool:
    chosen = not targets or any(fnmatchcase(name, pattern) for pattern in targets)
    return chosen and not any(fnmatchcase(name, pattern) for pattern in exclude)


def observe(
    model: nn.Module | str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    targets: Sequence[str] = (),
    exclude: Sequence[str] = HEADS,
    dtype: Literal["float32", "float64"] = "float32",
) -> Statistics:
    """Second moments of the inputs of a model's linear layers over a few samples, padding left out.

    model    a module (it is put in eval mode for the run), or a Hugging Face folder, which transformers loads
    batches  what the module is called with: mappings of keyword arguments (`attention_mask` says what is padding),
             tensors, or tuples of positional arguments
    targets, exclude  name patterns of modules; default: every Linear, Conv1D and fused attention but the heads
    dtype    of the sums: float64 where a spectrum's tail matters (PAVE on ill-conditioned inputs)
    Returns  Statistics: save(path), or hand them to `pymerge.merge(..., statistics=[...])`
    Raises   InputError (no batch, no such layer); NonFinite (an input with NaN, named by its layer)
    Cost     one forward pass a batch, and N n^2 / 2 multiply-adds for each distinct input of width n, which takes n^2
             numbers of memory (or N n, if that is less)."""
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    module, described = (model, {"class": type(model).__name__}) if isinstance(model, nn.Module) else load_model(model)
    modules = linear_modules(module, lambda name: selected(name, targets, exclude))
    if not modules:
        raise InputError(f"no linear layer of {type(module).__name__} fits targets={list(targets)}")
    collector, digest = Collector(modules, DTYPES[dtype]), hashlib.blake2b(digest_size=16)
    training, count = module.training, 0
    module.eval()
    try:
        with collector, torch.inference_mode():
            for batch in batches:
                count += 1
                add_to(digest, batch)
                collector.mask = mask_of(batch)
                call(module, batch)
    finally:
        module.train(training)
    if count == 0:
        raise InputError("observe: there was no batch")
    header = Header(
        model=described, data={"batches": count, "digest": digest.hexdigest()}, modules=dict(collector.holders)
    )
    held = {name: accumulator.finish() for name, accumulator in collector.accumulators.items()}
    return Statistics(header=header, held=held, rows={name: m.rows for name, m in held.items()})


def call(module: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        module(**batch)
    elif isinstance(batch, tuple | list):
        module(*batch)
    else:
        module(batch)


def mask_of(batch: Any) -> Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    mask = next((batch[key] for key in MASKS if isinstance(batch.get(key), Tensor)), None)
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def add_to(digest: Any, batch: Any) -> None:
    """Adds the values of a batch to a digest."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    for value in values:
        if isinstance(value, Tensor):
            digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def load_model(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a Hugging Face folder, as the class that its config names, and its fingerprint."""
    from pymerge.checkpoint import open_checkpoint

    try:
        import transformers
    except ImportError:
        raise InputError('observing a folder needs transformers; install with: pip install "pymerge[hf]"') from None
    with open_checkpoint(path) as checkpoint:
        fingerprint, config = checkpoint.fingerprint(), checkpoint.config or {}
    names = config.get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    model = (cls or transformers.AutoModel).from_pretrained(path, local_files_only=True)
    return model, {"class": type(model).__name__, **fingerprint}
