"""Runs the items of a plan: the caller's thread reads, workers compute, one thread writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import string_at
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from pymerge import _C
from pymerge.checkpoint import ITEMSIZE, safe_name
from pymerge.engine.arena import Arena, Block, Closed, address_of, trim
from pymerge.engine.asking import rule_part, survey_key
from pymerge.engine.check import FLOATS
from pymerge.engine.feed import Feed, Range
from pymerge.engine.non_finite import settle_non_finite
from pymerge.engine.pipeline import Output, Pipeline, Segment
from pymerge.engine.plan import Item, Plan
from pymerge.engine.questions import answered, answered_purify, sweep_over
from pymerge.engine.ranges import batches, tiles
from pymerge.engine.sink import Sink
from pymerge.engine.survey import HeldSurvey, SweptSurvey, Tile
from pymerge.errors import InputError, Interrupted
from pymerge.methods.base import Combine, ElementWiseCombine, Purify, TensorInfo, chain_rule
from pymerge.ops.delta_rule import DeltaRule, resolve
from pymerge.ops.native import delta_params
from pymerge.recipe import Steps

PAGE = 4096
TRIMMED = 64 << 20  # bytes of workspace from which freed memory is handed back at once: milliseconds, among seconds
IDENTITY = DeltaRule(weights=(1.0,))  # copies one tensor, changing its dtype


class Progress(Protocol):
    def advance(self, read: int, name: str) -> None: ...


@dataclass
class Stop:
    """Set by a signal handler; looked at between pieces."""

    signal_number: int | None = None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of an item, loaded: where its inputs and its output are in memory."""

    item: Item
    first: int
    count: int
    inputs: tuple[tuple[int, str], ...]  # (address, dtype), base first
    input_views: tuple[memoryview, ...]
    out: tuple[int, str]
    out_view: memoryview
    number: int = 0

    def part(self, first: int, count: int) -> Piece:
        """The piece cut down to a range of the item's entries."""
        skip = first - self.first
        inputs = tuple(
            (a + skip * ITEMSIZE[t.dtype], d) for (a, d), t in zip(self.inputs, self.item.inputs, strict=True)
        )
        start = skip * self.item.out_width
        view = self.out_view[start : start + count * self.item.out_width]
        return replace(
            self, first=first, count=count, inputs=inputs, out=(self.out[0] + start, self.out[1]), out_view=view
        )

    @property
    def tile(self) -> Tile:
        has_base = self.item.mode != "copy" and self.item.entry.base is not None
        return Tile(
            base=self.inputs[0] if has_base else None,
            tuned=list(self.inputs[1:] if has_base else self.inputs),
            count=self.count,
            index0=self.first,
            number=self.number,
            rule=self.item.rule or IDENTITY,
        )

    def merge_into(self, out: tuple[int, str], params: _C.DeltaParams) -> list[int]:
        """Merges by an answered rule; counts of entries that are not finite, as `_C.delta_merge` returns them."""
        tile, entry = self.tile, self.item.entry
        subtracted, added = (tile.base if used else None for used in (entry.subtracts, entry.adds))
        return _C.delta_merge(subtracted, tile.tuned, added, out, self.count, self.first, params)


class Executor:
    """One run of a plan into a sink."""

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        *,
        threads: int,
        device: str,
        progress: Progress,
        stop: Stop,
        arena: Arena | None = None,
    ) -> None:
        """arena: in place of one of its own, of the size that the plan says."""
        self.plan, self.sink, self.device, self.progress, self.stop = plan, sink, device, progress, stop
        self.arena = arena if arena is not None else Arena(plan.arena_bytes)
        self.pipeline = Pipeline(self.arena, threads, self.write)
        self.done = {name: {(start, size) for start, size, _ in parts} for name, parts in sink.done.items()}
        self.forget_other_tiles()
        self.feed = Feed(plan, self.arena, sink)
        self.answers: list[DeltaRule] = []  # of the model-wide surveys
        self.decided: dict[tuple[int, ...], Combine] = {}  # survey_key of steps with a question -> what goes on
        self.cleaned: dict[int, Purify] = {}  # id of a purify step with a question -> what goes on
        self.params: dict[int, _C.DeltaParams] = {}  # id of an answered tiled item -> native parameters

    def run(self) -> None:
        """Everything that is not done yet. Raises Interrupted after a signal, with the finished work kept."""
        try:
            with self.numeric_threads(), self.pipeline:
                self.ask()
                for batch in batches(self.feed.order(self.todo())):
                    self.start(batch)
                self.pipeline.drain()
        except Closed:
            self.check_stop()
            self.pipeline.raise_error()
            raise
        finally:
            self.feed.stop()
            self.arena.discard()

    def ask(self) -> None:
        """What must be known of more than a tensor before any is merged."""
        for step, items in self.plan.purify_questions:
            if self.needed(items):
                self.cleaned[id(step)] = answered_purify(self, step, items)
        for steps, items in self.plan.surveys:
            self.answers.append(self.survey_model(steps, items))
        for steps, items in self.plan.questions:
            if any(item.count and not self.is_done(item, item.first, item.count) for item in items):
                self.decided[survey_key(steps)] = answered(self, steps, items)

    def needed(self, items: Sequence[Item]) -> bool:
        """Whether the answer for these items is still asked for: by what is left to do, or by a file beside."""
        return any(
            (item.count and not self.is_done(item, item.first, item.count))
            or (item.entry.steps is not None and bool(item.entry.steps.combine.beside))
            for item in items
        )

    def numeric_threads(self) -> AbstractContextManager[Any]:
        """Items run side by side, each with the numeric threads that the plan says."""
        if not any(item.mode == "generic" for item in self.plan.items):
            return nullcontext()
        from pymerge.engine.generic import threads_of_numerics

        return threads_of_numerics(self.plan.item_threads)

    def check_stop(self) -> None:
        if self.stop.signal_number is not None:
            raise Interrupted("stopped", self.stop.signal_number)

    def write(self, segment: Segment) -> None:
        self.sink.write(segment.name, segment.start, segment.view, segment.crc, segment.facts)
        self.feed.wrote(segment.name, len(segment.view))

    # what is left to do

    def forget_other_tiles(self) -> None:
        """Tensors that an earlier run cut into other tiles (another memory budget) are merged again as a whole."""
        planned: dict[str, set[tuple[int, int]]] = {}
        for item in self.plan.items:
            if item.entry.name in self.done:
                places = (
                    (first * item.out_width, n * item.out_width) for first, n in tiles(item, item.first, item.count)
                )
                planned.setdefault(item.entry.name, set()).update(places)
        for name in [name for name, parts in self.done.items() if not parts <= planned.get(name, set())]:
            self.sink.forget(name)
            del self.done[name]

    def todo(self) -> Iterator[tuple[Item, int, int]]:
        """(item, first, count) of every range to be read, in order; a held tensor is one range."""
        begun = {
            item.entry.join[0]
            for item in self.plan.items
            if item.entry.join is not None and not self.is_done(item, item.first, item.count)
        }
        for item in self.plan.items:
            step = item.count if item.mode == "held" else item.tile
            for first in range(item.first, item.first + item.count, max(1, step)):
                count = min(step, item.first + item.count - first)
                redone = item.entry.join is not None and item.entry.join[0] in begun
                if redone or not self.is_done(item, first, count):
                    yield item, first, count

    def is_done(self, item: Item, first: int, count: int) -> bool:
        """Whether the journal vouches for every tile of the range."""
        parts = self.done.get(item.entry.name)
        return parts is not None and all(
            (start * item.out_width, size * item.out_width) in parts for start, size in tiles(item, first, count)
        )

    # reading

    def load(self, ranges: Sequence[tuple[Item, int, int]]) -> tuple[Block, list[Piece]]:
        """Reads the ranges into one block that has room for their outputs too."""
        workspace = sum(item.workspace for item, _, _ in ranges)
        block = self.arena.take(sum(item.block_bytes(count) for item, _, count in ranges) + workspace)
        if workspace:
            block.lend(workspace)
        pieces, at = [], 0
        for item, first, count in ranges:
            self.check_stop()
            # Direct I/O wants memory and file offsets to agree modulo the page size.
            at += (self.plan.layout.slots[item.entry.name].offset + first * item.out_width) % PAGE
            out, size = at, count * item.out_width
            inputs, views = [], []
            for tensor, read in zip(item.inputs, item.input_bytes(count), strict=True):
                if item.lent(tensor):
                    view = tensor.lend(first * ITEMSIZE[tensor.dtype], read)
                    inputs.append((address_of(view), tensor.dtype))
                    views.append(view)
                    continue
                in_place = not inputs and item.mode == "copy" and tensor.dtype == item.entry.dtype
                start = out if in_place else -(-max(at, out + size) // PAGE) * PAGE
                tensor.read_into(block.view[start : start + read], first * ITEMSIZE[tensor.dtype])
                inputs.append((block.address + start, tensor.dtype))
                views.append(block.view[start : start + read])
                at = start + read
            pieces.append(
                Piece(
                    item=item,
                    first=first,
                    count=count,
                    inputs=tuple(inputs),
                    input_views=tuple(views),
                    out=(block.address + out, item.entry.dtype),
                    out_view=block.view[out : out + size],
                )
            )
            at = -(-max(at, out + size) // PAGE) * PAGE
            self.progress.advance(item.read_bytes * count // max(1, item.count), item.entry.name)
        return block, pieces

    def start(self, batch: Sequence[tuple[Item, int, int]]) -> None:
        """Read a batch and hand it to the workers."""
        item = batch[0][0]
        if item.mode == "swept" and id(item) not in self.params:
            self.answer_swept(item)
        block, pieces = self.load(batch)
        if len(pieces) == 1 and item.mode == "held":
            self.pipeline.submit(partial(self.compute_held, block, pieces[0]))
        else:
            self.pipeline.submit(partial(self.compute, block, pieces))

    # computing (worker threads)

    def compute(self, block: Block, pieces: Sequence[Piece]) -> Output:
        if pieces[0].item.mode == "generic":
            return Output(block, self.merge_generic(pieces))
        return Output(block, [self.merge(piece, self.answer(piece)) for piece in pieces])

    def merge_generic(self, pieces: Sequence[Piece]) -> list[Segment]:
        """The pieces' outputs by torch; several pieces are matrices that are merged as one."""
        from pymerge.engine.generic import merge_generic

        item = pieces[0].item
        rule = item.rule
        if rule is not None and item.survey_scope is not None:
            rule = replace(self.answers[item.survey_scope], keep=rule.keep, keys=rule.keys)
        facts = merge_generic(self.plan, pieces, self.device, self.steps_of(item), rule)
        if facts and item.part is not None:
            facts = {item.part.key: facts}
        self.feed.release(piece.item for piece in pieces)
        if item.workspace >= TRIMMED:
            trim()
        return [segment_of(piece, facts if piece is pieces[0] else {}) for piece in pieces]

    def steps_of(self, item: Item) -> Steps:
        """An item's steps, with the questions answered that have been."""
        steps = item.entry.steps
        assert steps is not None
        purify = tuple(self.cleaned.get(id(step), step) for step in steps.purify)
        return replace(steps, purify=purify, combine=self.decided.get(survey_key(steps), steps.combine))

    def compute_held(self, block: Block, piece: Piece) -> Output | None:
        """Answer the rule from memory, then let all workers apply it, tile by tile."""
        params = self.answer(piece)
        left = [
            piece.part(first, count)
            for first, count in tiles(piece.item, piece.first, piece.count)
            if not self.is_done(piece.item, first, count)
        ]
        block.hold(len(left) - 1)
        for part in reversed(left[1:]):
            self.pipeline.submit(partial(self.apply, block, part, params), first=True)
        return self.apply(block, left[0], params)

    def apply(self, block: Block, piece: Piece, params: _C.DeltaParams | None) -> Output:
        return Output(block, [self.merge(piece, params)])

    def answer(self, piece: Piece) -> _C.DeltaParams | None:
        """Native parameters of the piece's rule, every question answered."""
        item = piece.item
        if item.mode == "copy":
            return None
        if id(item) in self.params:
            return self.params[id(item)]
        assert item.rule is not None
        if item.survey_scope is not None:
            rule = replace(self.answers[item.survey_scope], keep=item.rule.keep, keys=item.rule.keys)
        else:
            rule = resolve(item.rule, HeldSurvey(piece.tile))  # only held items ask
        params = delta_params(rule)
        if piece.count < item.count:
            self.params[id(item)] = params
        return params

    def merge(self, piece: Piece, params: _C.DeltaParams | None) -> Segment:
        """Computes the piece's output in place and checks it."""
        if piece.item.mode == "copy":
            self.copy(piece)
        else:
            assert params is not None
            bad = piece.merge_into(piece.out, params)
            if any(bad):
                settle_non_finite(self.plan.recipe, piece, bad, params)
        return segment_of(piece)

    def copy(self, piece: Piece) -> None:
        """Checks what `load` has put in place; changes the dtype if asked."""
        entry, size = piece.item.entry, piece.count * piece.item.out_width
        (address, dtype), *others = piece.inputs
        for other, _ in others:
            if string_at(address, size) != string_at(other, size):
                raise InputError(
                    f"{safe_name(entry.name)}: {dtype} values differ between the models; integers are never averaged. "
                    "Say `relax: {buffers: base}` to keep the base's."
                )
        if dtype != entry.dtype:
            params = delta_params(IDENTITY)
            bad = _C.delta_merge(None, [(address, dtype)], None, piece.out, piece.count, piece.first, params)
            if any(bad):
                settle_non_finite(self.plan.recipe, piece, bad, params)
        elif dtype in FLOATS and self.plan.recipe.relaxations.get("nonfinite") != "keep":
            bad = _C.count_nonfinite((address, dtype), piece.count)[0]
            if bad:
                settle_non_finite(self.plan.recipe, piece, [bad, 0, bad], None)

    # surveys over more than fits into memory

    def each(self, ranges: Iterable[Range], look: Callable[[Sequence[Piece]], None]) -> None:
        """Loads all ranges and lets workers look at them, at small ones and matrices that are one together; waits."""

        def work(block: Block, pieces: Sequence[Piece]) -> None:
            look(pieces)
            self.feed.release(piece.item for piece in pieces)
            block.release()

        for batch in batches(self.feed.order(ranges)):
            self.pipeline.submit(partial(work, *self.load(batch)))
        self.pipeline.drain()

    def survey(self, items: Sequence[Item]) -> SweptSurvey:
        """Of all entries of the items."""
        return SweptSurvey(sweep_over(self, items), len(items[0].entry.tuned))

    def tile(self, piece: Piece) -> tuple[Tile, Any]:
        """What a rule is asked about in a piece, behind the purify steps that are no rule; and what holds it."""
        if piece.item.mode != "generic" or not rule_part(self.steps_of(piece.item))[0]:
            return piece.tile, None
        from pymerge.engine.generic import tile_behind

        return tile_behind(self.plan, piece, self.device, self.steps_of(piece.item))

    def answer_swept(self, item: Item) -> None:
        assert item.rule is not None
        self.params[id(item)] = delta_params(resolve(item.rule, self.survey([item])))

    def survey_model(self, steps: Steps, items: Sequence[Item]) -> DeltaRule:
        """The rule of the concatenation of all items, answered."""
        assert isinstance(steps.combine, ElementWiseCombine)
        tasks = len(items[0].entry.tuned)
        info = TensorInfo(name="", shape=(sum(item.count for item in items),), tasks=tasks, seed=self.plan.recipe.seed)
        return resolve(chain_rule(rule_part(steps)[1], steps.combine, info), self.survey(items))


def segment_of(piece: Piece, facts: Mapping[str, Any] | None = None) -> Segment:
    """The piece's finished output."""
    width = piece.item.out_width
    crc = _C.crc32c((piece.out[0], piece.count * width))
    return Segment(piece.item.entry.name, piece.first * width, piece.out_view, crc, facts or {})
