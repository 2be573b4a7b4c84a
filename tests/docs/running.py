"""Runs the blocks of one page in order, as a reader would, in a folder of its own."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from typer.testing import CliRunner

import pymerge
from pymerge.cli import app
from pymerge.cli.mergekit import command, mergekit_multi, mergekit_yaml
from tests.docs.blocks import Block
from tests.docs.world import World

ROOT = Path(__file__).parents[2]
CHECKED = ("make", "pip")  # commands that are not run: what they name must exist
OUT = re.compile(r"""(?:\bout=|\b(?:pymerge(?:-yaml)?\ merge|pymerge-yaml)\ \S+\ |-o\ |--out\ )["']?([\w./-]+)""")


class Page:
    """What the blocks of a page leave behind: files, variables, recipes."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder)
        self.folder = folder
        self.module = ModuleType("code_blocks_of_a_page")  # dataclasses look for the module that they are in
        self.variables: dict[str, Any] = self.module.__dict__
        self.recipes: dict[str, dict[str, Any]] = {}  # the last one of each section

    def run(self, block: Block) -> None:
        """AssertionError, or what the block raises, where it does not run."""
        if self.recipes and block.section not in self.recipes:  # recipe.yaml is the page's example there
            self._write("recipe.yaml", self._recipe_before(block))
        if block.first:
            self._python(block.first, block.place)
        self.world.need(block.text)
        if block.file:
            (self.folder / block.file).write_text(block.text)
        runners = {
            "yaml": self._recipe,
            "python": lambda b: b.file or self._python(b.text, b.place),
            "toml": lambda b: tomllib.loads(b.text),
            "json": lambda b: json.loads(b.text),
        } | dict.fromkeys(("console", "bash", "sh"), self._commands)
        assert block.language in runners, f"what to do with a block of {block.language!r}? {sorted(runners)} are known"
        runners[block.language](block)

    def _recipe(self, block: Block) -> None:
        """Merges by it. A fragment completes the recipe before it in its section, else that of the first section that
        has one: without a method all of it, without models its models."""
        given = yaml.safe_load(block.text)
        before = self._recipe_before(block)
        if "merge_method" not in given:
            given = before | given
        elif not {"models", "slices", "modules"} & given.keys():
            models = [{"model": entry["model"]} for entry in before["models"]]
            given = {"base_model": before["base_model"], "models": models} | given
        self.recipes[block.section] = given
        self.world.need(json.dumps(given))
        path = self._write(block.file or "recipe.yaml", given)
        out = self.folder / "out-of-recipe"
        shutil.rmtree(out, ignore_errors=True)
        pymerge.Recipe.from_yaml(path).run(out)
        pymerge.verify(out)

    def _recipe_before(self, block: Block) -> dict[str, Any]:
        return self.recipes.get(block.section) or next(iter(self.recipes.values()), {})

    def _write(self, name: str, recipe: Mapping[str, Any]) -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
        return path

    def _python(self, text: str, place: str) -> None:
        remove_outputs(text)
        tree = ast.parse(text, place)
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id not in self.variables.keys() | stored:
                try:
                    self.variables[node.id] = self.world.variable(node.id)
                except KeyError:
                    pass  # a builtin, or the block fails
        exec(compile(tree, place, "exec"), self.variables)

    def _commands(self, block: Block) -> None:
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and words[0] in CHECKED:
                exists(words)
            elif words:
                run_command(words)


def remove_outputs(text: str) -> None:
    """The folders that this text names as outputs: blocks of a page may write the same one."""
    for out in OUT.findall(text):
        shutil.rmtree(out, ignore_errors=True)


def exists(words: Sequence[str]) -> None:
    """The target of `make`, the extra of `pip install "pymerge[...]"`."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"the Makefile has no target {words[1]}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"[\w-]+", ",".join(re.findall(r"\bpymerge\[(.*?)\]", " ".join(words))))
    assert set(named) <= extras.keys(), f"pyproject.toml has no such extra: {named}"


def run_command(words: Sequence[str]) -> None:
    """A command of pymerge's, in this process."""
    remove_outputs(shlex.join(words))
    apps = {"pymerge": lambda: app, "pymerge-yaml": lambda: command(mergekit_yaml)}
    apps |= {"pymerge-multi": lambda: command(mergekit_multi)}
    assert words[0] in apps, f"{words[0]!r} is no command that can run here: {sorted((*apps, *CHECKED))}"
    done = CliRunner().invoke(apps[words[0]](), list(words[1:]))
    said = done.output if done.exception is None or isinstance(done.exception, SystemExit) else _trace(done.exception)
    assert done.exit_code == 0, f"{shlex.join(words)}: exit code {done.exit_code}\n{said}"


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
