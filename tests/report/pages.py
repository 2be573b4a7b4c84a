"""Sections, and summaries of merges, that the tests of pages draw."""

from __future__ import annotations

import json
from pathlib import Path

from pymerge.report.figures import Chart, Section, Table

# What a stranger's tensor may be called: each would end an element, an attribute, a string, or run where it is shown.
HOSTILE = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=1</script>",
    "\"'><img src=x onerror=window.hacked=1>",
    "<!--<script>",
    "javascript:window.hacked=1",
    "<b>bold</b>&lt;i&gt;&amp;",
    "$x_1$ %{y} ${z}",
    "line\nbreak\x00\x1b[31m\u2028\u202e\ud800",
)


def every_chart(x=(*HOSTILE, "plain", "last")) -> list[Chart]:
    """One chart of each kind; names are hostile, values have gaps."""
    count = len(x)
    up = [float(i + 1) for i in range(count)]
    gaps = [None if i % 4 == 3 else 10.0 ** (i - 3) for i in range(count)]
    nan = [float("nan"), float("inf"), *up[2:]]
    cells = {name: [value, 1.0] for name, value in zip(x, gaps, strict=True)}
    axes = {"x_label": HOSTILE[0], "y_label": "size <b>", "alt": HOSTILE[2]}
    return [
        Chart("line", "Lines", list(range(count)), {HOSTILE[1]: up, "gaps": gaps, "_private": nan}, **axes),
        Chart("bar", "Bars", x, {"first": up, HOSTILE[5]: up[::-1]}, **axes),
        Chart("heatmap", "Heat", ["a", HOSTILE[6]], cells, log_y=True, **axes),
        Chart("scatter", "Points", up, {HOSTILE[3]: up[::-1]}, log_y=True, **axes),
        Chart("histogram", "Counts", [0.0, 0.5, 1.0], {HOSTILE[4]: [3, 0, 5]}, **axes),
    ]


def hostile_sections() -> list[Section]:
    rows = [(f"{name}", number, None if number == 2 else number / 7) for number, name in enumerate(HOSTILE)]
    rows += [(f"row {number}", -number, 1e-9 * number) for number in range(250)]
    return [
        Section(HOSTILE[1], [HOSTILE[0], "code:\n  " + HOSTILE[2].replace("\n", "")], every_chart()),
        Section("Rows", tables=[Table(HOSTILE[2], ("name", "number", HOSTILE[5]), rows)]),
        Section("Closed", charts=every_chart()[:1], collapsed=True),
    ]


def summary_of_a_large_merge(folder: Path, layers: int = 80) -> Path:
    """merge.json as of a model of 70 GB, merged with four tasks and calibrated."""
    kinds = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    matrices = [f"model.layers.{n}.{kind}.weight" for n in range(layers) for kind in kinds]
    norms = [f"model.layers.{n}.{kind}.weight" for n in range(layers) for kind in ("input_layernorm", "post_norm")]

    def facts(n: int) -> dict:
        eta = 1 + (n % 97) / 50
        before = [1 / (1 + d + n % 13) for d in range(14)]
        return {
            "ranks": [2048] * 4,
            "condition": [1000.0 + n, 10.0 * n + 1],
            "mean_singular_value": 0.01 * (1 + n % 31),
            "smallest_ratio": 1 / (n + 2),
            "svc_alpha": 0.25,
            "svc_route": "gram" if n % 2 else "base",
            "svc_rank": 8192,
            "svc_silent": 0.0,
            "svc_eta_mean": eta,
            "svc_eta_least": 0.25,
            "svc_eta_most": eta * 2,
            "svc_eta_leading": [eta + i / 8 for i in range(8)],
            "svc_suppressed": (n % 7) / 7,
            "svc_amplified": 1 - (n % 7) / 7,
            "svc_at_alpha": (n % 5) / 5,
            "svc_before": before,
            "svc_after": [value / eta for value in before],
        }

    files = [f"model-{n:05d}-of-00030.safetensors" for n in range(1, 31)]
    models = [f"./{name}" for name in ("math", "code", "law", "med")]
    summary = {
        "format": 1,
        "pymerge": "0.1.0",
        "date": "2026-01-01T00:00:00+00:00",
        "machine": {"processor": "x86_64", "cpu_level": "avx512"},
        "recipe": {
            "base_model": "./base",
            "merge_method": "tsv_m",
            "models": [{"model": model} for model in models],
            "calibrate": [{"method": "svc"}],
        },
        "inputs": [{"path": p, "files": [[f, 4_700_000_000, 1, "0"] for f in files]} for p in ("./base", *models)],
        "tensors": {"merged": len(matrices) + len(norms), "copied": 0},
        "relaxations": {"nonfinite": "keep"},
        "notes": ["no weight matrices, merged without the steps for these"],
        "bytes_read": 705_000_000_000,
        "bytes_written": 141_000_000_000,
        "seconds": 1800.5,
        "busy_seconds": {"compute": 28_000.0, "read": 700.0, "write": 300.0},
        "peak_rss_bytes": 8_000_000_000,
        "per_tensor": {name: facts(n) for n, name in enumerate(matrices)},
        "checksums": {name: f"{n * 2654435761 % 2**32:08x}" for n, name in enumerate(matrices + norms)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merge.json").write_text(json.dumps(summary))
    return folder
