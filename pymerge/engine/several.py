"""Several merges of the same models in one pass: each range is read once, then merged for one after the other."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pymerge import _C
from pymerge.engine.arena import Arena, Block
from pymerge.engine.asking import rule_part
from pymerge.engine.execute import PAGE, Executor, Progress, Stop
from pymerge.engine.feed import Range
from pymerge.engine.in_step import InStep
from pymerge.engine.piece import Piece, segment_of
from pymerge.engine.pipeline import Output, Segment
from pymerge.engine.plan import Item, Plan
from pymerge.engine.questions import sweep_over
from pymerge.engine.ranges import tiles
from pymerge.engine.sink import Sink
from pymerge.engine.survey import SweptSurvey
from pymerge.errors import Overflow
from pymerge.ops.delta_rule import DeltaRule

if TYPE_CHECKING:
    from pymerge.engine.lanes import Place


@dataclass(frozen=True, kw_only=True)
class Family:
    """Outputs that one merge serves.

    plan     of the output; where they are scaled, of the update: float32, the base not added
    outputs  number of each output -> its plan, which adds the base and the update times its scale where they are scaled
    """

    plan: Plan
    outputs: Mapping[int, Plan]
    scaled: bool


@dataclass(frozen=True, kw_only=True)
class Together:
    """What one pass does. The items of all plans are the same ranges in the same order.

    reading  what is read, with room for an update where outputs are scaled
    room     bytes for outputs that are being written
    labels   of the outputs, for messages
    """

    reading: Plan
    families: tuple[Family, ...]
    room: int
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Addressed(Segment):
    """A segment and where it goes."""

    sink: Sink


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a family wants to see of some ranges."""

    ranges: Sequence[Range]
    look: Callable[[Sequence[Piece], Place | None], None]


class Nowhere:
    """A sink that has nothing and gets nothing."""

    done: Mapping[str, Sequence[tuple[int, int, int]]] = {}

    def write(self, name: str, start: int, view: memoryview, crc: int, facts: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def forget(self, name: str) -> None:
        raise NotImplementedError

    def read_into(self, name: str, view: memoryview) -> None:
        raise NotImplementedError


class InputArena(Arena):
    """The memory of what is read; closed or given back, that of what is written is too."""

    def __init__(self, size: int, outputs: Arena) -> None:
        super().__init__(size)
        self.outputs = outputs

    def close(self) -> None:
        super().close()
        self.outputs.close()

    def discard(self) -> None:
        super().discard()
        self.outputs.discard()


class SharedSurvey(SweptSurvey):
    """Of several families that rank the same magnitudes: counted once for all."""

    def __init__(self, maker: Maker, items: Sequence[Item]) -> None:
        super().__init__(sweep_over(maker, items), len(items[0].entry.tuned))
        self.step, self.items = maker.step, tuple((item.entry.name, item.first) for item in items)

    def histogram(self, rule: DeltaRule, prefix: list[int] | None) -> array[int]:
        masked = (rule.keep, rule.keys) if rule.mask_first else None
        key: Hashable = (self.items, masked, None if prefix is None else tuple(prefix))
        return self.step.once(key, lambda: SweptSurvey.histogram(self, rule, prefix))


class Follower(Executor):
    """Merges what another executor has read."""

    def __init__(self, plan: Plan, sink: Sink, reader: SeveralExecutor) -> None:
        super().__init__(
            plan,
            sink,
            threads=1,
            progress=reader.progress,
            stop=reader.stop,
            arena=reader.arena,
        )
        self.twins = {(item.entry.name, item.first): item for item in plan.items}

    def twin(self, item: Item) -> Item:
        """This plan's item of the same range."""
        found = self.twins[item.entry.name, item.first]
        if found.entry.inputs and not item.entry.inputs:  # of a module that did not run
            return replace(found, entry=replace(found.entry, inputs=()))
        return found

    def lacks(self, item: Item, first: int, count: int) -> bool:
        return not self.is_done(self.twin(item), first, count)

    def lacks_any(self, pieces: Sequence[Piece]) -> bool:
        return any(self.lacks(piece.item, piece.first, piece.count) for piece in pieces)


class Maker(Follower):
    """Merges for the outputs of one family."""

    step: InStep  # while questions are asked

    def __init__(self, reader: SeveralExecutor, family: Family, sinks: Sequence[Sink]) -> None:
        self.reader, self.scaled = reader, family.scaled
        self.outputs: dict[int, Follower] = {}
        if family.scaled:
            self.outputs = {n: Follower(plan, sinks[n], reader) for n, plan in family.outputs.items()}
        super().__init__(family.plan, Nowhere() if family.scaled else sinks[next(iter(family.outputs))], reader)
        if not family.scaled:
            self.outputs = dict.fromkeys(family.outputs, self)

    def is_done(self, item: Item, first: int, count: int) -> bool:
        if not self.scaled:
            return super().is_done(item, first, count)
        return not any(output.lacks(item, first, count) for output in self.outputs.values())

    def each(
        self,
        ranges: Iterable[Range],
        question: Callable[[Sequence[Piece], Place | None], None],
        *,
        in_memory: bool = False,
    ) -> None:
        self.step.ask(Look(ranges=list(ranges), look=question))

    def survey(self, items: Sequence[Item]) -> SweptSurvey:
        if any(item.entry.steps is not None and rule_part(item.entry.steps)[0] for item in items):
            return super().survey(items)  # behind steps that differ
        return SharedSurvey(self, items)

    def make(self, block: Block, pieces: Sequence[Piece], params: _C.DeltaParams | None = None) -> None:
        """Merges what the outputs lack of the pieces, and queues it for writing. params: of a held tensor's rule."""
        wanted = {n: output for n, output in self.outputs.items() if output.lacks_any(pieces)}
        if not wanted:
            return
        if not self.scaled:
            ((number, output),) = wanted.items()
            with self.reader.named(number):
                room, placed = self.reader.placed(output, pieces)
                self.reader.put(output, self.made(room, placed, params))
            return
        updates = self.made(block, [as_piece_of(self.twin(piece.item), piece) for piece in pieces], params).segments
        for number, output in wanted.items():
            with self.reader.named(number):
                room, placed = self.reader.placed(output, [with_update(piece) for piece in pieces])
                segments = zip(output.compute(room, placed).segments, updates, strict=True)
                found = [replace(segment, facts=update.facts) for segment, update in segments]
                self.reader.put(output, Output(room, found))

    def made(self, block: Block, pieces: Sequence[Piece], params: _C.DeltaParams | None) -> Output:
        return self.compute(block, pieces) if params is None else self.apply(block, pieces[0], params)


def as_piece_of(item: Item, piece: Piece) -> Piece:
    """A piece of another plan's item of that range; an update of adapters reads no weight."""
    used = len(item.inputs)
    return replace(piece, item=item, inputs=piece.inputs[:used], input_views=piece.input_views[:used])


def with_update(piece: Piece) -> Piece:
    """The piece with base (where there is one) and update as its inputs."""
    base = piece.inputs[:1] if piece.item.entry.base is not None else ()
    return replace(piece, inputs=(*base, piece.out), input_views=())


class SeveralExecutor(Executor):
    """One pass for several outputs."""

    def __init__(
        self,
        together: Together,
        sinks: Sequence[Sink],
        *,
        threads: int,
        progress: Progress,
        stop: Stop,
    ) -> None:
        reading, self.room, self.labels = together.reading, Arena(together.room), together.labels
        arena = InputArena(reading.arena_bytes, self.room)
        super().__init__(reading, Nowhere(), threads=threads, progress=progress, stop=stop, arena=arena)
        self.makers = [Maker(self, family, sinks) for family in together.families]
        self.outputs = [output for maker in self.makers for output in maker.outputs.values()]

    # what is left

    def is_done(self, item: Item, first: int, count: int) -> bool:
        return not any(output.lacks(item, first, count) for output in self.outputs)

    def makers_of(self, item: Item) -> list[Maker]:
        """Those that have not merged all of it."""
        return [maker for maker in self.makers if not maker.is_done(maker.twin(item), item.first, item.count)]

    # questions: each maker asks its own, in a thread of its own; what all ask is read once

    def ask(self) -> None:
        items = self.plan.items
        makers = [maker for maker in self.makers if any(item.count and maker in self.makers_of(item) for item in items)]
        self.in_step({maker: maker.ask for maker in makers})

    def answer_swept(self, item: Item) -> None:
        makers = self.makers_of(item)
        self.in_step({maker: partial(maker.answer_swept, maker.twin(item)) for maker in makers})
        self.params[id(item)] = makers[0].params[id(makers[0].twin(item))]  # says that it is answered

    def in_step(self, functions: Mapping[Maker, Callable[[], None]]) -> None:
        step = InStep()
        for maker in functions:
            maker.step = step
        step.run(list(functions.values()), self.look)

    def look(self, looks: Sequence[Look]) -> None:
        """One pass over all ranges that anybody wants to see."""
        wanted: dict[tuple[str, int, int], list[tuple[Look, Item]]] = {}
        ranges: list[Range] = []
        twins = {(item.entry.name, item.first): item for item in self.plan.items}
        for look in looks:
            for item, first, count in look.ranges:
                key = (item.entry.name, first, count)
                if key not in wanted:
                    twin = twins[item.entry.name, item.first]
                    ranges.append((replace(twin, entry=replace(twin.entry, adds=item.entry.adds)), first, count))
                wanted.setdefault(key, []).append((look, item))

        def show(pieces: Sequence[Piece], place: Place | None) -> None:
            asking = [wanted[piece.item.entry.name, piece.first, piece.count] for piece in pieces]
            for look in looks:
                own = [
                    as_piece_of(item, piece)
                    for piece, found in zip(pieces, asking, strict=True)
                    for one, item in found
                    if one is look
                ]
                if own:
                    look.look(own, place)

        self.each(ranges, show)

    # computing (worker threads)

    def compute_held(self, block: Block, piece: Piece) -> Output | None:
        """Answer all rules from memory, then let all workers apply them, tile by tile."""
        answers = {
            maker: maker.answer(replace(piece, item=maker.twin(piece.item))) for maker in self.makers_of(piece.item)
        }
        left = [
            piece.part(first, count)
            for first, count in tiles(piece.item, piece.first, piece.count)
            if not self.is_done(piece.item, first, count)
        ]
        block.hold(len(left) - 1)
        for part in reversed(left[1:]):
            self.pipeline.submit(partial(self.make, block, [part], answers), first=True)
        return self.make(block, [left[0]], answers)

    def compute(self, block: Block, pieces: Sequence[Piece]) -> Output | None:  # type: ignore[override]
        return self.make(block, pieces, {})

    def make(
        self, block: Block, pieces: Sequence[Piece], answers: Mapping[Maker, _C.DeltaParams | None]
    ) -> Output | None:
        """Merges the pieces for all outputs. Returns what is copied: the same bytes for all."""
        merged = [piece for piece in pieces if piece.item.mode != "copy"]
        for maker in self.makers if merged else ():
            maker.make(block, merged, answers.get(maker))
        self.feed.release(piece.item for piece in merged)
        copied = []
        for piece in pieces:
            if piece.item.mode == "copy":
                self.copy(piece)
                lacking = [output for output in self.outputs if output.lacks_any([piece])]
                copied += [addressed(segment_of(piece), output) for output in lacking]
        if copied:
            return Output(block, copied)
        block.release()
        return None

    def placed(self, output: Follower, pieces: Sequence[Piece]) -> tuple[Block, list[Piece]]:
        """The pieces as the output's, with places for its bytes; waits for the writer where there is no room."""
        block = self.room.take(sum(place_bytes(output.twin(piece.item), piece.count) for piece in pieces))
        found, at = [], 0
        for piece in pieces:
            item = output.twin(piece.item)
            # Direct I/O wants memory and file offsets to agree modulo the page size.
            start = at + (output.plan.layout.slots[item.entry.name].offset + piece.first * item.out_width) % PAGE
            end = start + piece.count * item.out_width
            out, view = (block.address + start, item.entry.dtype), block.view[start:end]
            found.append(replace(piece, item=item, out=out, out_view=view))
            at = -(-end // PAGE) * PAGE
        return block, found

    @contextmanager
    def named(self, number: int) -> Iterator[None]:
        """Errors of one output say of which."""
        try:
            yield
        except Overflow as error:
            raise Overflow(f"{self.labels[number]}: {error}") from error

    # writing

    def put(self, output: Follower, finished: Output) -> None:
        segments = [addressed(segment, output) for segment in finished.segments]
        self.pipeline.finish(Output(finished.block, segments))

    def write(self, segment: Segment) -> None:
        assert isinstance(segment, Addressed)
        segment.sink.write(segment.name, segment.start, segment.view, segment.crc, segment.facts)


def addressed(segment: Segment, output: Follower) -> Addressed:
    return Addressed(**vars(segment), sink=output.sink)


def place_bytes(item: Item, count: int) -> int:
    """Of the output of so many entries, with alignment."""
    return count * item.out_width + 2 * PAGE
