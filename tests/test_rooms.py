"""Who may import whom. The table is the design: an arrow that it lacks is a bug, not a missing entry."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pymerge"
BELOW_RECIPE = {"methods", "align", "statistics", "checkpoint", "linalg", "ops", "remote", "hub", "errors"}
BELOW_ENGINE = BELOW_RECIPE | {"recipe"}
BELOW_REPORT = BELOW_ENGINE | {"vocabulary", "engine"}
# `version` is a leaf like `errors`: a string. `_C` is the native host module: buffers, checksums, files.
# `runtime` loads models and finds their layers as `statistics` does.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "hub": {"errors"},
    "remote": {"hub", "errors"},
    "version": set(),
    "ops": {"errors", "_C"},
    "linalg": {"ops", "errors"},
    "checkpoint": {"ops", "remote", "hub", "errors", "_C"},
    "statistics": {"linalg", "ops", "errors", "checkpoint"},
    "align": {"linalg", "ops", "errors", "checkpoint", "statistics"},
    "methods": {"linalg", "ops", "errors"},
    "recipe": {"methods", "align", "statistics", "remote", "hub", "errors"},
    "vocabulary": {"recipe", "checkpoint", "errors"},
    "engine": BELOW_ENGINE | {"vocabulary", "version", "_C"},
    "report": BELOW_REPORT | {"version"},
    "tuning": BELOW_REPORT | {"version"},
    "integrations": BELOW_REPORT | {"version"},
    "runtime": {"errors", "statistics"},
    "demo": {"public", "runtime"},
    "testing": {"public", "methods", "errors"},  # for the tests of methods, ours and those of others
    "cli": BELOW_REPORT | {"report", "integrations", "tuning", "demo", "version", "public"},
    "__main__": {"cli"},
}
# Names of `from pymerge import name` and `import pymerge`: the public API; a room by that name counts as the room.
ROOMS = set(ALLOWED) | {"_C"}


def imported_rooms(node: ast.AST) -> list[str]:
    """Rooms of pymerge that one statement imports; "public" for the package itself."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pymerge":
        below = (node.module or "").split(".")[1:2]
        return below or [alias.name if alias.name in ROOMS else "public" for alias in node.names]
    if isinstance(node, ast.Import):
        parts = [alias.name.split(".") for alias in node.names]
        return [p[1] if len(p) > 1 else "public" for p in parts if p[0] == "pymerge"]
    return []


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_the_map_allows(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text())
    used = {name for node in ast.walk(tree) for name in imported_rooms(node)}
    assert used <= ALLOWED.get(room, set()) | {room}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_are_absolute(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert not [node.lineno for node in nodes if node.level]


def test_every_room_is_in_the_table():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sources()}
    assert rooms <= set(ALLOWED)


def test_the_table_has_no_cycle():
    remaining = {room: used - {"public", "_C"} for room, used in ALLOWED.items()}
    while remaining:
        leaves = {room for room, used in remaining.items() if not used}
        assert leaves, f"these rooms import each other: {sorted(remaining)}"
        remaining = {room: used - leaves for room, used in remaining.items() if room not in leaves}


def test_delta_rule_is_a_leaf():
    """The rule is data that methods, the engine and the operators share: it imports neither pymerge nor torch."""
    tree = ast.parse((PACKAGE / "ops" / "delta_rule.py").read_text())
    for node in ast.walk(tree):
        assert not imported_rooms(node)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert "torch" not in [*names, getattr(node, "module", None)]


def test_finds_every_form_of_import():
    code = (
        "import pymerge\nimport pymerge.ops.delta\nfrom pymerge import ops, merge\nfrom pymerge.engine.plan import Plan"
    )
    found = [imported_rooms(node) for node in ast.parse(code).body]
    assert found == [["public"], ["ops"], ["ops", "public"], ["engine"]]
