"""`pymerge.observe`: run a model over samples and keep what its linear layers see."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from pymerge.checkpoint import Checkpoint, open_checkpoint
from pymerge.errors import InputError
from pymerge.statistics.collect import Collector, linear_modules, stored_transposed
from pymerge.statistics.moments import Moments
from pymerge.statistics.names import stored_module, stored_names
from pymerge.statistics.store import Header, Statistics, StatisticsWriter, open_statistics

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
    stream_to: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Statistics:
    """Second moments of the inputs of a model's linear layers over a few samples, padding left out.

    model    a module (it is put in eval mode for the run), or a Hugging Face folder, which transformers loads
    batches  what the module is called with: mappings of keyword arguments (`attention_mask` says what is padding),
             tensors, or tuples of positional arguments
    targets, exclude  name patterns of modules; default: every Linear, Conv1D and fused attention but the heads
    dtype    of the sums. float32 is off by less than activations in bfloat16 are: ESM's update by 1e-2 against 5e-2
             where some tokens are 3000 times as large as the others, 2e-5 against 3e-3 at 300 times. float64, at twice
             the time and memory, where activations are float32 and a spectrum's tail matters
    stream_to  file to write: the weights of a folder are read module by module as it runs, the moments of each layer go
             to this file at once; the samples must be one batch. For models that do not fit in memory.
    progress  called with "batch N" after each batch; streamed, with the name of each layer that has been seen
    Returns  Statistics, modules named as in the checkpoint; `save(path)` writes them
    Raises   InputError (no batch, no such layer); NonFinite (an input with NaN, named by its layer)
    Cost     one forward pass a batch, and N n^2 / 2 multiply-adds for each distinct input of width n, which takes n^2
             numbers of memory (or N n, if that is less)."""
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if stream_to is not None:
        return observe_streamed(model, batches, targets, exclude, DTYPES[dtype], Path(stream_to), progress)
    if isinstance(model, nn.Module):
        module, described, stored = model, {"class": type(model).__name__}, {}
    else:
        module, described, stored = load_model(model)
    modules = linear_modules(module, lambda name: selected(name, targets, exclude))
    if not modules:
        raise InputError(f"no linear layer of {type(module).__name__} fits targets={list(targets)}")
    names = {name: stored_module(name, stored) for name in modules}
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
                if progress is not None:
                    progress(f"batch {count}")
    finally:
        module.train(training)
    if count == 0:
        raise InputError("observe: there was no batch")
    holders = {names[name]: names[holder] for name, holder in collector.holders.items()}
    header = Header(
        model=described,
        data={"batches": count, "digest": digest.hexdigest()},
        modules=holders,
        transposed=stored_transposed(modules, names),
    )
    held = {names[name]: accumulator.finish() for name, accumulator in collector.accumulators.items()}
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


def observe_streamed(
    model: Any,
    batches: Iterable[Any],
    targets: Sequence[str],
    exclude: Sequence[str],
    dtype: torch.dtype,
    out: Path,
    progress: Callable[[str], None] | None = None,
) -> Statistics:
    """As `observe`, of a folder, with the weights of one module in memory at a time."""
    from pymerge.statistics.stream import Finished, StreamingCollector, reader, weights_on_demand

    if isinstance(model, nn.Module):
        raise InputError("stream_to is for models in a folder: this one is in memory already")
    one = list(islice(batches, 2))
    if len(one) != 1:
        raise InputError(f"streamed samples must be one batch, got {'more' if one else 'none'}: put them together")
    with open_checkpoint(model) as checkpoint, StatisticsWriter(out) as writer:
        made = Streamable.of(checkpoint, Path(model), targets, exclude)

        def found(name: str, moments: Moments | None) -> None:
            if moments is not None:
                writer.add(made.names[name], moments)
            if progress is not None:
                progress(made.names[name])

        collector = StreamingCollector(made.modules, dtype, found)
        collector.mask = mask_of(one[0])
        # An input is summed before the module's weights are read.
        with collector, weights_on_demand(made.module, reader(checkpoint), made.stored), torch.inference_mode():
            with contextlib.suppress(Finished):
                call(made.module, one[0])
        holders = {made.names[name]: made.names[holder] for name, holder in collector.holders.items()}
        writer.finish(made.header(checkpoint, one[0], holders))
    return open_statistics(out)


@dataclass(frozen=True, kw_only=True)
class Streamable:
    """A model without weights, and the linear modules of it that are observed.

    modules  by their names in the model
    names    of the modules, in the checkpoint
    stored   of the parameters, in the checkpoint
    """

    module: nn.Module
    modules: Mapping[str, nn.Module]
    names: Mapping[str, str]
    stored: Mapping[str, str]

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, folder: Path, targets: Sequence[str] = (), exclude: Sequence[str] = HEADS
    ) -> Self:
        """Raises InputError (no config.json, no such layer)."""
        from pymerge.statistics.stream import empty_model

        if checkpoint.config is None:
            raise InputError(f"{folder}: samples are run through models in folders with a config.json; it has none")
        module = empty_model(model_class(checkpoint.config), folder).eval()
        modules = linear_modules(module, lambda name: selected(name, targets, exclude))
        if not modules:
            raise InputError(f"no linear layer of {type(module).__name__} fits targets={list(targets)}")
        stored = stored_names(module, checkpoint)
        names = {name: stored_module(name, stored) for name in modules}
        return cls(module=module, modules=modules, names=names, stored=stored)

    def header(self, checkpoint: Checkpoint, batch: Any, holders: Mapping[str, str]) -> Header:
        """Of the statistics for one batch; holders: as `Header.modules`."""
        digest = hashlib.blake2b(digest_size=16)
        add_to(digest, batch)
        return Header(
            model={"class": type(self.module).__name__, **checkpoint.fingerprint()},
            data={"batches": 1, "digest": digest.hexdigest()},
            modules=holders,
            transposed=stored_transposed(self.modules, self.names),
        )


def model_class(config: Mapping[str, Any] | None) -> type:
    """The transformers class that a config names."""
    try:
        import transformers
    except ImportError:
        raise InputError('observing a folder needs transformers; install with: pip install "pymerge[hf]"') from None
    names = (config or {}).get("architectures") or []
    return (getattr(transformers, names[0], None) if names else None) or transformers.AutoModel


def load_model(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any], dict[str, str]]:
    """The model of a Hugging Face folder, as the class that its config names; its fingerprint; its parameters' names
    in the checkpoint."""
    with open_checkpoint(path) as checkpoint:
        cls = model_class(checkpoint.config)
        try:
            model = cls.from_pretrained(path, local_files_only=True, dtype="auto")  # type: ignore[attr-defined]
        except (OSError, ValueError) as e:
            why = str(e).splitlines()[0]
            raise InputError(f"{path}: transformers cannot load it, load it yourself and give the module: {why}") from e
        return model, {"class": type(model).__name__, **checkpoint.fingerprint()}, stored_names(model, checkpoint)
