"""Layers that add a low-rank expert to what they give, chosen for each sample by the mean of the layer's input."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymerge.errors import InputError

MASKS = ("attention_mask", "encoder_attention_mask", "padding_mask")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A forward pass that is running.

    batch     samples; None: unknown
    masks     [B, S], what is no padding
    routes    layer -> the expert of each sample, int64 [B]
    decoding  a cache goes on: routes are those of its prompt
    """

    module: nn.Module | None = None
    batch: int | None = None
    masks: tuple[Tensor, ...] = ()
    routes: dict[str, Tensor]
    decoding: bool = False


class Router:
    """What the routed layers of one model share: the passes that are running, and the routes of caches.

    labels  the tasks; forced: number of the one that all samples take, None: each sample its own
    """

    def __init__(self, labels: Sequence[str], forced: int | None) -> None:
        self.labels, self.forced = tuple(labels), forced
        self.calls: list[Call] = []
        self.caches: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()
        self.last: dict[str, Tensor] = {}  # layer -> the expert of each sample that it saw last

    def watch(self, module: nn.Module) -> None:
        """Its calls tell batch, padding and cache."""
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = arguments(module, args, kwargs)
        stale = next((i for i, call in enumerate(self.calls) if call.module is module), None)
        if stale is not None:  # an earlier pass was interrupted by the keyboard: no hook has told
            del self.calls[stale:]
        outer = self.calls[-1] if self.calls else None
        batch = next((v.shape[0] for v in given.values() if isinstance(v, Tensor) and v.dim() > 1), None)
        masks = tuple(mask for key in MASKS if (mask := no_padding(given.get(key))) is not None)
        if outer is not None and not any(key in given for key in MASKS):
            masks = outer.masks
        cache = given.get("past_key_values")
        decoding = cache is not None and bool(cache.get_seq_length() > 0)
        if decoding and cache not in self.caches:
            raise InputError("past_key_values: this cache was not filled by this model with its experts: start anew")
        routes = outer.routes if outer is not None else self.caches[cache] if decoding else {}
        if cache is not None:
            self.caches[cache] = routes
        self.calls.append(Call(module=module, batch=batch, masks=masks, routes=routes, decoding=decoding))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.calls and self.calls[-1].module is module:  # not where `enter` has refused
            call = self.calls.pop()
            if (cache := getattr(output, "past_key_values", None)) is not None:
                self.caches[cache] = call.routes

    @property
    def call(self) -> Call:
        return self.calls[-1] if self.calls else Call(routes={})


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """By name, in the order of the signature."""
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:  # the call itself will say it
        bound = {}
    return {**bound, **kwargs}


def no_padding(mask: Any) -> Tensor | None:
    """[B, S], from what `attention_mask` may be: that, or for each query (of a kind of layers) what it attends to."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask.bool()
    queries = mask.shape[2]  # the last one sees all that is no padding; behind these the cache has room
    row = mask[:, 0, -1, : queries if queries > 1 else None]
    return row == 0 if row.is_floating_point() else row.bool()


class Experts(nn.Module):
    """The experts of one layer, kept as its child and moved with it; the layer's own parameters stay as they are.

    left [T, m, r], right [T, r, n], prototypes [T, n] of norm 1
    """

    left: Tensor
    right: Tensor
    prototypes: Tensor

    def __init__(self, name: str, left: Tensor, right: Tensor, prototypes: Tensor, router: Router) -> None:
        super().__init__()
        self.name, self.router = name, router
        for key, tensor in (("left", left), ("right", right), ("prototypes", prototypes)):
            self.register_buffer(key, tensor, persistent=False)

    def attach(self, layer: nn.Module) -> None:
        layer.esmpp_experts = self
        fused = isinstance(layer, nn.MultiheadAttention)
        layer.register_forward_hook(self.attend if fused else self.add, with_kwargs=True)

    def routes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., n] as samples [B, S, n]; the expert of each, int64 [B]."""
        call, name = self.router.call, self.name
        x, mask = samples(x, call)
        kept = call.routes.get(name) if call.decoding and self.router.forced is None else None
        if kept is not None and len(kept) != len(x):
            raise InputError(f"{name}: the cache is of {len(kept)} prompts, {len(x)} samples go on with it")
        found = kept if kept is not None else self.chosen(x, mask)
        call.routes[name] = self.router.last[name] = found
        return x, found

    def chosen(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """argmax_t <f, p_t>, f the mean over tokens that are no padding; its length does not matter."""
        if self.router.forced is not None:
            return torch.full((len(x),), self.router.forced, device=x.device)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        return (x.sum(1, dtype=torch.float32) @ self.prototypes.float().mT).argmax(1)

    def add(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        """The layer's output plus B (A x) of each sample's expert."""
        if output.numel() == 0:
            return output
        x, chosen = self.routes(args[0] if args else next(iter(kwargs.values())))
        groups = by_expert(chosen)
        parts = [F.linear(F.linear(x[rows], self.right[t]), self.left[t]) for t, rows in groups]
        return output + joined(parts, groups, 0).reshape(output.shape)

    def attend(
        self, layer: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        """Fused attention projects its inputs inside: it runs again, with W + B A, on the samples of each expert."""
        if output[0].numel() == 0:
            return output
        given = arguments(layer, args, kwargs)
        query, dim = given["query"], 0 if layer.batch_first else 1
        if query.dim() == 2:  # one sample without a batch dimension
            dim = None
        _, chosen = self.routes(query[None] if dim is None else query.transpose(0, dim))
        groups, results = by_expert(chosen), []
        for t, rows in groups:
            part = given if dim is None else {k: of_samples(k, v, rows, dim, layer.num_heads) for k, v in given.items()}
            results.append(self.attended(layer, layer.in_proj_weight + self.left[t] @ self.right[t], part))
        if dim is None:
            return results[0]
        weights = None if output[1] is None else joined([w for _, w in results], groups, 0)
        return joined([out for out, _ in results], groups, dim), weights

    def attended(self, layer: nn.MultiheadAttention, weight: Tensor, given: dict[str, Any]) -> tuple[Tensor, Any]:
        """The layer's own forward with another projection."""
        own = layer._parameters["in_proj_weight"]
        layer._parameters["in_proj_weight"] = weight  # type: ignore[assignment]
        try:
            return layer.forward(**given)
        finally:
            layer._parameters["in_proj_weight"] = own


def samples(x: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """x [..., n] as [B, S, n] and which of its tokens are no padding [B, S]; None: all.

    Rows [B S, n] are taken apart by the mask, or by the batch of the call; so are windows of images [B windows, S, n].
    Without either the first dimension is that of the samples."""
    for mask in call.masks:
        if x.shape[:-1] == mask.shape or (x.dim() == 2 and len(x) == mask.numel()):
            return x.reshape(*mask.shape, x.shape[-1]), mask.to(x.device)
    batch = call.batch if call.batch and x.shape[0] % call.batch == 0 else x.shape[0]
    return x.reshape(batch, -1, x.shape[-1]), None


def by_expert(chosen: Tensor) -> list[tuple[int, Any]]:
    """(expert, its samples: an index) for each expert that samples have chosen; one for all: no copy is made."""
    used = chosen.unique().tolist()
    return [(t, slice(None) if len(used) == 1 else (chosen == t).nonzero()[:, 0]) for t in used]


def joined(parts: list[Tensor], groups: list[tuple[int, Any]], dim: int) -> Tensor:
    """The results of the groups in the order of the samples, which are along `dim`."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim).index_select(dim, torch.cat([rows for _, rows in groups]).argsort())


def of_samples(name: str, value: Any, rows: Any, dim: int, heads: int) -> Any:
    """An argument of MultiheadAttention cut down to some samples."""
    if name in ("query", "key", "value"):
        return value[(slice(None),) * dim + (rows,)]
    if name == "key_padding_mask" and value is not None:
        return value[rows]
    if name == "attn_mask" and value is not None and value.dim() == 3:  # [B heads, L, S]
        return value.unflatten(0, (-1, heads))[rows].flatten(0, 1)
    return value
