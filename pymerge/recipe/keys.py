"""The words of a recipe."""

from __future__ import annotations

from typing import Final

KEYS: Final = (
    "base_model",
    "models",
    "slices",
    "modules",
    "merge_method",
    "parameters",
    "align",
    "purify",
    "calibrate",
    "exclude",
    "include",
    "spectral",
    "split",
    "join",
    "style",
    "seed",
    "strict",
    "relax",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
KEYS_OF_MODEL: Final = ("model", "parameters", "fisher", "statistics", "data")
BESIDE_MODEL: Final = ("fisher", "statistics", "data")  # what goes with a model; in Python a list with one a model
DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
RELAXATIONS: Final[dict[str, tuple[str, ...]]] = {
    "missing": ("base", "skip"),
    "extra": ("drop", "copy"),
    "vocabulary": ("base_rows", "truncate"),
    "overflow": ("clamp",),
    "nonfinite": ("keep",),
    "buffers": ("base",),
}
LENIENT: Final = {
    "missing": "base",
    "extra": "drop",
    "vocabulary": "base_rows",
    "overflow": "clamp",
    "nonfinite": "keep",
    "buffers": "base",
}  # strict: false


DTYPE_WORDS: Final = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}
