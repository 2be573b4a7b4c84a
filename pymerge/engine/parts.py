"""A recipe of slices or modules: its parts cut out of the opened models, with the names that they have in the output.

Each part is checked as a merge of its own; all of them go into one plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import Checkpoint, safe_name
from pymerge.checkpoint.renamed import renamed
from pymerge.checkpoint.tied import tied_pairs
from pymerge.engine.asking import asks_model, survey_scope
from pymerge.engine.check import Checker, Entry
from pymerge.engine.inputs import shortened
from pymerge.engine.layer_config import layer_changes, lists_layers, own_layers
from pymerge.engine.layer_kinds import check_kinds
from pymerge.engine.problems import Problems
from pymerge.errors import InputError, RecipeError
from pymerge.recipe import Layers, ModelRef, Recipe, layer_depths, layer_positions
from pymerge.recipe.parts import Module, Part
from pymerge.recipe.stacks import LayerName, comes_before, kinds_of, known_modules, modules_of, stacks_of

if TYPE_CHECKING:
    from pymerge.engine.local import Inputs


@dataclass(frozen=True, kw_only=True)
class OpenPart:
    """One part: what it merges, under the names of the output."""

    recipe: Recipe
    base: Checkpoint | None
    models: tuple[Checkpoint, ...]
    labels: tuple[str, ...]
    label: str  # of what gives it its names: the base, or the first model
    layers: Layers


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All parts of a recipe; copied: what is in no part, of the base."""

    parts: tuple[OpenPart, ...]
    copied: Checkpoint | None
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class View:
    """Tensors of one model: name in the output -> name in the model."""

    ref: ModelRef
    model: Checkpoint
    names: Mapping[str, str]
    first: int = 0  # of its layers

    @property
    def label(self) -> str:
        return self.ref.path if self.ref.layers is None else f"{self.ref.path}{list(self.ref.layers)}"


def with_parts(recipe: Recipe, inputs: Inputs) -> Inputs:
    """The inputs with their parts; as they are where the recipe has none."""
    if not recipe.modules:
        return inputs
    cutter = Cutter(recipe, inputs)
    return replace(inputs, parts=cutter.run(), config_changes={**inputs.config_changes, **cutter.changes})


def check_parts(recipe: Recipe, parts: Parts) -> tuple[list[Entry], list[str]]:
    """What `check` returns, of all parts. Raises one error that lists every problem."""
    problems, notes, joins = Problems(), list(parts.notes), 0
    entries: list[Entry] = []
    for part in parts.parts:
        checker = Checker(part.recipe, part.base, part.models, part.labels, problems=problems, layers=part.layers)
        found = checker.run()
        entries += [replace(e, join=(e.join[0] + joins, e.join[1])) if e.join is not None else e for e in found]
        joins += len(set(checker.join_of.values()))
        notes += checker.notes
    for entry in entries:
        if entry.steps is not None and (survey_scope(entry.steps) == "model" or asks_model(entry.steps)):
            what = f"{entry.steps.combine.name} asks the whole model before it merges: not with slices or modules"
            problems.add(RecipeError, what)
            break
    problems.raise_all()
    if parts.copied is not None:
        copier = Checker(recipe, parts.copied, (), ())
        entries += [copier.copied(name, tensor) for name, tensor in parts.copied.items()]
    return in_file_order(entries), list(dict.fromkeys(notes))


def in_file_order(entries: Sequence[Entry]) -> list[Entry]:
    """So that files are read from their begin to their end, whatever part of the output a tensor is."""
    ranks: dict[Path | None, int] = {}
    for entry in entries:
        ranks.setdefault(entry.reference.file, len(ranks))
    return sorted(entries, key=lambda entry: (ranks[entry.reference.file], entry.reference.offset))


@dataclass
class Cutter:
    """Cuts the parts and collects what is wrong with them."""

    recipe: Recipe
    inputs: Inputs
    problems: Problems = field(default_factory=Problems)
    changes: dict[str, Any] = field(default_factory=dict)  # of config.json
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe, inputs = self.recipe, self.inputs
        self.opened = list(zip(recipe.models, inputs.models, strict=True))
        if recipe.base is not None and inputs.base is not None:
            self.opened.append((recipe.base, inputs.base))
        self.output = inputs.reference  # whose config the output gets
        self.label = (recipe.base or recipe.models[0]).path
        self.ties = {id(model): tied_pairs(model) for _, model in self.opened}
        self.tied = self.ties[id(self.output)]
        self.wanted = [module.name for module in recipe.modules if module.name]
        self.names: dict[int, dict[str, str]] = {}

    def run(self) -> Parts:
        parts: list[OpenPart] = []
        if self.wanted:
            self.members(self.output)
            self.problems.raise_all()
        for module in self.recipe.modules:
            parts += [self.whole(module)] if module.whole else self.sliced(module)
        copied = self.copied()
        self.problems.raise_all()
        names = [name for part in parts for name in part.layers.positions]
        depths = layer_depths([*names, *(copied or ())])
        parts = [replace(part, layers=replace(part.layers, depths=depths)) for part in parts]
        return Parts(parts=tuple(parts), copied=copied, notes=tuple(self.notes))

    def find(self, ref: ModelRef) -> Checkpoint:
        return next(model for known, model in self.opened if known.same_model(ref))

    def members(self, model: Checkpoint) -> dict[str, str]:
        """Tensor name -> module, of one model."""
        if id(model) not in self.names:
            found = modules_of(list(model), self.wanted) if self.wanted else dict.fromkeys(model, "")
            if found is None:
                path = next(ref.path for ref, its in self.opened if its is model)
                known = ", ".join(map(safe_name, known_modules(list(model))))
                text = f"modules: {', '.join(self.wanted)}: {path} has not all of these, it has {known}"
                self.problems.add(RecipeError, text)
            self.names[id(model)] = found if found is not None else dict.fromkeys(model, "")
        return self.names[id(model)]

    def copied(self) -> Checkpoint | None:
        """Of modules that the recipe does not name."""
        left = [name for name, module in self.members(self.output).items() if self.wanted and module not in self.wanted]
        if not left:
            return None
        modules = ", ".join(dict.fromkeys(safe_name(self.members(self.output)[name]) for name in left))
        if self.recipe.base is None:
            self.problems.add(
                RecipeError, f"modules: {modules}: not named: name them too, or give base_model to copy them from"
            )
        self.notes.append(f"modules that the recipe does not name, copied from the base: {modules}")
        return renamed(self.output, {name: name for name in left})

    def whole(self, module: Module) -> OpenPart:
        """A module that lists models."""
        (part,) = module.parts
        views = []
        for ref in refs_of(part.recipe):
            model = self.find(ref)
            names = [name for name in model.file_order() if self.members(model)[name] == module.name]
            views.append(View(ref=ref, model=model, names=dict(zip(names, names, strict=True))))
        return opened(part, views, layer_positions(views[-1].names))

    def sliced(self, module: Module) -> list[OpenPart]:
        stack = self.stack_of(module)
        if stack is None:
            return []
        parts, taken, offset = [], [], 0
        for part in module.parts:
            ends = (part is module.parts[0], part is module.parts[-1])
            views, count = self.views(part, module, stack, offset, ends)
            if count:
                local = {name: name for name in views[-1].names}
                for name in local:
                    if (layer := LayerName.of(name)) is not None and layer.stack == stack:
                        local[name] = layer.at(layer.number - offset)
                positions = layer_positions(local.values())
                parts.append(opened(part, views, {name: positions[at] for name, at in local.items()}))
                taken += [(views[-1], views[-1].first + i) for i in range(count)]
                offset += count
        if len(parts) == len(module.parts):
            self.note_layers(stack, parts)
            changes = self.change_config(stack, taken)
            if not {"missing", "extra"} & self.recipe.relaxations.keys():
                given = [(part.base or part.models[0], part.label) for part in parts]
                listed = lists_layers(changes)
                check_kinds(self.output, self.label, given, stack, self.problems, listed=listed)
        return parts

    def stack_of(self, module: Module) -> str | None:
        """The stack of layers that a module's slices are of."""
        members = self.members(self.output)
        stacks = stacks_of([name for name, its in members.items() if its == module.name])
        if len(stacks) == 1:
            return next(iter(stacks))
        found = ", ".join(f"{safe_name(stack)} ({count} layers)" for stack, count in stacks.items()) or "none"
        known = ", ".join(map(safe_name, known_modules(list(members))))
        hint = f": give slices module by module, under modules: {known}" if stacks and not module.name else ""
        self.problems.add(
            RecipeError, f"{module.where}: slices are of one stack of layers, {self.label} has {found}{hint}"
        )
        return None

    def views(
        self, part: Part, module: Module, stack: str, offset: int, ends: tuple[bool, bool]
    ) -> tuple[list[View], int]:
        """The part's models, and its base, which is the last, cut; and how many layers they give. None where they do
        not fit."""
        found, counts = [], {}
        for ref in refs_of(part.recipe):
            model = self.find(ref)
            names = [name for name, its in self.members(model).items() if its == module.name]
            names += [name for name in self.own_heads(module) if name in self.ties[id(model)] and name not in model]
            count = own_layers(model.config, stacks_of(names).get(stack, 0))
            first, last = ref.layers or (0, count)
            if count == 0 or last > count:
                text = f"{part.where}: {ref.path} has {count} layers called {safe_name(stack)}"
                self.problems.add(RecipeError, f"{text}, layer_range is {[first, last]}")
                return [], 0
            counts[ref.path] = last - first
            own = self.placed(part, ref, names, (stack, first, last, offset), ends)
            found.append(View(ref=ref, model=model, names=own, first=first))
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{path} {count}" for path, count in counts.items())
            self.problems.add(RecipeError, f"{part.where}: the sources must give equally many layers: {listed}")
            return [], 0
        return found, next(iter(counts.values()))

    def placed(
        self,
        part: Part,
        ref: ModelRef,
        names: Sequence[str],
        layers: tuple[str, int, int, int],
        ends: tuple[bool, bool],
    ) -> dict[str, str]:
        """Name in the output -> in the model, of one part. ends: whether it is the first and the last of its module."""
        stack, first, last, offset = layers
        model = self.find(ref)
        tied = self.ties[id(model)]
        placed: dict[str, str] = {}
        for name in names:
            layer = LayerName.of(name)
            if layer is not None and layer.stack == stack:
                if first <= layer.number < last:
                    placed[layer.at(layer.number - first + offset)] = name
            elif name in self.tied and name in tied:
                continue  # the output's head is its embedding
            elif self.belongs(part, ref, name, ends):
                placed[name] = name if name in model else tied[name]
                if name in self.tied:
                    self.problems.add(
                        InputError,
                        f"{safe_name(name)}: a head of its own in {ref.path}, tied to the embedding by the config of "
                        f"{self.label}, which the output gets: give a base_model that does not tie it",
                    )
        return placed

    def own_heads(self, module: Module) -> list[str]:
        """Output matrices of a module that are not tied in the output: where a model ties its own, it has them too."""
        return [name for name, its in self.members(self.output).items() if its == module.name and name not in self.tied]

    def belongs(self, part: Part, ref: ModelRef, name: str, ends: tuple[bool, bool]) -> bool:
        """Whether a tensor outside of the layers is in a part."""
        if all(ends):
            return True
        before = comes_before(name)
        if before is None and ends[0] and part.recipe.selects(name):
            self.problems.add(
                RecipeError,
                f"{safe_name(name)} of {ref.path}: its name does not tell whether it comes before the layers (from the "
                "first slice) or behind them (from the last): exclude it to copy it from the first",
            )
        return ends[1] if before is False else ends[0]

    def note_layers(self, stack: str, parts: Sequence[OpenPart]) -> None:
        """What the output is made of, for the plan and the summary."""
        said = []
        for part in parts:
            base = [f"base {part.label}"] if part.base is not None else []
            said.append(" with ".join([*part.labels, *base]))
        count = stacks_of([name for part in parts for name in part.layers.positions])[stack]
        self.notes.append(f"{safe_name(stack)}: {count} layers: {shortened(said)}")

    def change_config(self, stack: str, taken: Sequence[tuple[View, int]]) -> dict[str, Any]:
        """What changes in config.json for the layers that are taken."""
        config, names = self.output.config, list(self.output)
        if config is None:
            return {}
        kinds = kinds_of(names)
        kind = next(kinds[name] for name in names if (at := LayerName.of(name)) is not None and at.stack == stack)
        found = layer_changes(
            config, kind, stacks_of(names)[stack], [(view.model.config or {}, index) for view, index in taken]
        )
        if not found:
            text = f"{self.label}: config.json does not say how many layers {safe_name(stack)} has"
            self.problems.add(InputError, text)
        else:
            self.notes.append(f"config.json: {', '.join(found)} of the output's layers")
        self.changes |= found
        return found


def refs_of(recipe: Recipe) -> list[ModelRef]:
    """The models of a part, then the one that gives its output names: the base, or the first model."""
    return [*recipe.models, recipe.base or recipe.models[0]]


def opened(part: Part, views: Sequence[View], positions: Mapping[str, float]) -> OpenPart:
    """A part of its views, of which the last gives the names."""
    *models, reference = views
    own = {}
    for name in reference.names:
        names = tuple(view.names.get(name, name) for view in models)
        if any(its != name for its in names):
            own[name] = names
    checkpoints = [renamed(view.model, view.names) for view in models]
    has_base = part.recipe.base is not None
    return OpenPart(
        recipe=part.recipe,
        base=renamed(reference.model, reference.names) if has_base else None,
        models=tuple(checkpoints),
        labels=tuple(view.label for view in models),
        label=reference.label,
        layers=Layers(positions=positions, depths={}, own=own),
    )
