"""Runs the items of a plan: the caller's thread reads, workers compute, one thread writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import string_at
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pymerge import _C
from pymerge.checkpoint import ITEMSIZE, safe_name
from pymerge.engine.arena import FREED, Arena, Block, Closed, address_of
from pymerge.engine.asking import rule_part, survey_key
from pymerge.engine.check import FLOATS
from pymerge.engine.devices import HOST
from pymerge.engine.feed import Feed, Range
from pymerge.engine.non_finite import settle_non_finite
from pymerge.engine.piece import IDENTITY, Piece, segment_of, segments_of
from pymerge.engine.pipeline import Output, Pipeline, Segment
from pymerge.engine.plan import Item, Plan
from pymerge.engine.questions import answered, answered_purify, model_rule, sweep, sweep_over
from pymerge.engine.ranges import batches, tiles
from pymerge.engine.sink import Sink
from pymerge.engine.survey import HeldSurvey, SweptSurvey, Tile
from pymerge.errors import InputError, Interrupted
from pymerge.methods.base import Combine, Purify
from pymerge.ops.delta_rule import DeltaRule, resolve
from pymerge.ops.native import delta_params
from pymerge.recipe import Steps

if TYPE_CHECKING:
    from pymerge.engine.lanes import Job, Lanes, Place

PAGE = 4096


class Progress(Protocol):
    def advance(self, read: int, name: str) -> None: ...


@dataclass
class Stop:
    """Set by a signal handler; looked at between pieces."""

    signal_number: int | None = None


class Executor:
    """One run of a plan into a sink."""

    def __init__(
        self, plan: Plan, sink: Sink, *, threads: int, progress: Progress, stop: Stop, arena: Arena | None = None
    ) -> None:
        """arena: in place of one of its own, of the size that the plan says."""
        self.plan, self.sink, self.progress, self.stop = plan, sink, progress, stop
        self.arena = arena if arena is not None else Arena(plan.arena_bytes)
        self.lanes = self.open_lanes()
        devices = [] if self.lanes is None else list(self.lanes.of)
        self.pipeline = Pipeline(self.arena, threads, self.write, devices)
        self.look_at_sink()
        self.feed = Feed(plan, self.arena, sink)
        self.answers: list[DeltaRule] = []  # of the model-wide surveys
        self.decided: dict[tuple[int, ...], Combine] = {}  # survey_key of steps with a question -> what goes on
        self.cleaned: dict[int, Purify] = {}  # id of a purify step with a question -> what goes on
        self.params: dict[int, _C.DeltaParams] = {}  # id of an answered tiled item -> native parameters

    def run(self) -> None:
        """Everything that is not done yet. Raises Interrupted after a signal, with the finished work kept."""
        try:
            with self.numeric_threads(), self.lanes or nullcontext(), self.pipeline:
                self.ask()
                for batch in batches(self.feed.order(self.todo())):
                    self.start(batch)
                self.pipeline.drain()
        except (Closed, InputError):  # what was being read over the network is not waited for
            self.check_stop()
            self.pipeline.raise_error()
            raise
        finally:
            self.feed.stop()
            self.arena.discard()

    def ask(self) -> None:
        """Answers the plan's questions that are still needed."""
        for step, items in self.plan.purify_questions:
            if self.needed(items):
                self.cleaned[id(step)] = answered_purify(self, step, items)
        for steps, items in self.plan.surveys:
            self.answers.append(model_rule(self.plan, steps, items, self.survey(items)))
        for steps, items in self.plan.questions:
            if self.left(items):
                self.decided[survey_key(steps)] = answered(steps, partial(sweep, self, items))

    def left(self, items: Sequence[Item]) -> bool:
        """Whether something of the items is not merged yet."""
        return any(item.count and not self.is_done(item, item.first, item.count) for item in items)

    def needed(self, items: Sequence[Item]) -> bool:
        """Whether the answer for these items is still asked for: by what is left to do, or by a file beside."""
        return self.left(items) or any(
            item.entry.steps is not None and item.entry.steps.combine.beside for item in items
        )

    def numeric_threads(self) -> AbstractContextManager[Any]:
        """Items run side by side, each with the numeric threads that the plan says."""
        if not any(item.mode == "generic" for item in self.plan.items):
            return nullcontext()
        from pymerge.engine.generic import threads_of_numerics

        return threads_of_numerics(self.plan.item_threads)

    def open_lanes(self) -> Lanes | None:
        """The devices beside the CPU that have something to do."""
        if not any(device.items for device in self.plan.devices):
            return None
        from pymerge.engine.lanes import Lanes

        return Lanes(self.plan.devices, self.plan.pinned_bytes, self.arena)

    def check_stop(self) -> None:
        if self.stop.signal_number is not None:
            raise Interrupted("stopped", self.stop.signal_number)

    def write(self, segment: Segment) -> None:
        self.sink.write(segment.name, segment.start, segment.view, segment.crc, segment.facts)
        self.feed.wrote(segment.name, len(segment.view))

    # what is left to do

    def look_at_sink(self) -> None:
        """What of the plan is done already."""
        self.done = {name: {(start, size) for start, size, _ in parts} for name, parts in self.sink.done.items()}
        self.forget_other_tiles()

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
        workspace = sum(item.host_workspace for item, _, _ in ranges)
        arena = self.arena if ranges[0][0].device == HOST or self.lanes is None else self.lanes.arena
        block = arena.take(sum(item.block_bytes(count) for item, _, count in ranges) + workspace)
        if workspace:
            block.lend(workspace)
        pieces, at, started = [], 0, time.perf_counter()
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
        self.pipeline.busy["read"] += time.perf_counter() - started
        return block, pieces

    def start(self, batch: Sequence[tuple[Item, int, int]]) -> None:
        """Read a batch and hand it to the workers."""
        item = batch[0][0]
        if item.mode == "swept" and id(item) not in self.params:
            self.answer_swept(item)
        block, pieces = self.load(batch)
        if item.device != HOST:
            job = self.stage(pieces)
            self.pipeline.submit(partial(self.compute_on, job, block), device=item.device)
        elif len(pieces) == 1 and item.mode == "held":
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
        return segments_of(pieces, self.merge_at(pieces))

    def merge_at(self, pieces: Sequence[Piece], place: Place | None = None) -> dict[str, Any]:
        """Computes them, on the CPU or where the place says. Returns what the steps note."""
        from pymerge.engine.generic import merge_generic

        item = pieces[0].item
        rule = item.rule
        if rule is not None and item.survey_scope is not None:
            rule = replace(self.answers[item.survey_scope], keep=rule.keep, keys=rule.keys)
        facts = merge_generic(self.plan, pieces, self.steps_of(item), rule, place)
        if facts and item.part is not None:
            facts = {item.part.key: facts}
        self.feed.release(piece.item for piece in pieces)
        FREED.add(item.host_workspace)
        return facts

    def stage(self, pieces: Sequence[Piece]) -> Job:
        """Sends pieces to their device."""
        assert self.lanes is not None
        return self.lanes.of[pieces[0].item.device].stage(pieces)

    def compute_on(self, job: Job, block: Block) -> Callable[[], Output]:
        """Merges on a device; what is left to do is to wait for the results."""
        facts = job.run(partial(self.merge_at, job.pieces, job))
        return partial(self.collect, job, block, facts)

    def collect(self, job: Job, block: Block, facts: Mapping[str, Any]) -> Output:
        job.finish()
        return Output(block, segments_of(job.pieces, facts))

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

    def each(
        self,
        ranges: Iterable[Range],
        question: Callable[[Sequence[Piece], Place | None], None],
        *,
        in_memory: bool = False,
    ) -> None:
        """Has `question(pieces, place)` answered for all ranges, where they are merged; waits for the answers.

        in_memory   it is about the bytes that were read, wherever they are merged"""
        for batch in batches(self.feed.order(ranges)):
            self.pose(batch, question, in_memory)
        self.pipeline.drain()

    def survey(self, items: Sequence[Item]) -> SweptSurvey:
        """Of all entries of the items."""
        return SweptSurvey(sweep_over(self, items), len(items[0].entry.tuned))

    def pose(self, batch: Sequence[Range], question: Callable[..., None], in_memory: bool) -> None:
        block, pieces = self.load(batch)
        device = HOST if in_memory else pieces[0].item.device
        job = None if device == HOST else self.stage(pieces)

        def work() -> None:
            if job is None:
                question(pieces, None)
            else:
                job.run(partial(question, pieces, job))
                job.finish()
            self.feed.release(piece.item for piece in pieces)
            block.release()

        self.pipeline.submit(work, device=device)

    def tile(self, piece: Piece) -> tuple[Tile, Any]:
        """What a rule is asked about in a piece, behind the purify steps that are no rule; and what holds it."""
        if piece.item.mode != "generic" or not rule_part(self.steps_of(piece.item))[0]:
            return piece.tile, None
        from pymerge.engine.generic import tile_behind

        return tile_behind(self.plan, piece, self.steps_of(piece.item))

    def answer_swept(self, item: Item) -> None:
        assert item.rule is not None
        self.params[id(item)] = delta_params(resolve(item.rule, self.survey([item])))
