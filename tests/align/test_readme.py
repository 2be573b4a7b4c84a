"""The example of the README's section on alignment runs, and aligning helps in it."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_example_runs(capsys):
    pytest.importorskip("sklearn")
    section = README.read_text().split("\n## Align\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    plain, aligned = (float(number) for number in re.findall(r"tensor\((.*?)\)", capsys.readouterr().out))
    assert aligned > 0.85 and aligned > plain + 0.1
