"""Do pymerge and mergekit give the same weights? Compared at dtype float32, tensor by tensor.

Deterministic methods: relative error of the merged delta, ||ours - theirs|| / ||theirs - base||. Where a selection
threshold cuts through a run of equal magnitudes, the entries of that run are excepted and counted: which of them
mergekit keeps depends on a sort that is not stable. Random methods: the share of changed entries and the L1 norm of the
merged delta, within six standard deviations of what two draws of the same distribution may differ by. SLERP,
Multi-SLERP and the Karcher mean: against the formula in float64, because mergekit's float32 scalar products are coarser
than the bound (its distance is reported).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tools
from checkpoints import from_bf16

BOUND = 2e-5  # float32 arithmetic in another order
STORED = (
    2.0**-22
)  # times ||w|| / ||delta||: both results are rounded to float32 beside the weight, not beside the delta
SIGMAS = 6.0
COARSE = 2e-3  # mergekit's slerp and kin against the formula in float64, relative to the merged delta
ROUNDING = 2.0**-23  # times sqrt(entries) and the merged weight: the rounding of its float32 sums is a random walk
WIDE = ("arcee_fusion",)  # mergekit's float32 divergence of a row is noise of several per cent: it runs in float64
PARALLEL = 0.9995  # |cosine| above which slerp is a straight line


class Weights:
    """Tensors of one folder as float32 (float64 rounded), read when asked."""

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, tuple[Path, int, dict]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self.entries |= {name: (path, 8 + length, entry) for name, entry in header.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        path, start, entry = self.entries[name]
        begin, end = entry["data_offsets"]
        raw = np.fromfile(path, dtype=np.uint8, count=end - begin, offset=start + begin)
        match entry["dtype"]:
            case "BF16":
                return from_bf16(raw.view(np.uint16))
            case "F32":
                return raw.view(np.float32)
            case "F16":
                return raw.view(np.float16).astype(np.float32)
            case "F64":
                return raw.view(np.float64).astype(np.float32)
            case other:
                raise ValueError(f"{path}: {name} is {other}, expected BF16 or F32")


def cuts(method: str, count: int) -> Iterator[int]:
    """Ranks (by magnitude, ascending) before which the selection of a method is cut."""
    density = tools.METHODS[method].get("density", 1.0)
    kept = int(density * count)
    if method == "ties":
        yield count - max(1, kept)
    elif method in ("breadcrumbs", "breadcrumbs_ties"):
        lowest = max(0, count - kept - int(tools.METHODS[method]["gamma"] * count))
        yield lowest
        yield lowest + kept


def near_threshold(base: np.ndarray, model: np.ndarray, share: float) -> np.ndarray:
    """Entries whose score in Arcee Fusion is within `share` of the threshold."""
    exponents = [np.exp(x - x.max(axis=-1, keepdims=True)) for x in (model.astype(np.float64), base.astype(np.float64))]
    p, q = (x / x.sum(axis=-1, keepdims=True) + 1e-8 for x in exponents)
    scores = np.abs(model - base) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    places = [int(x * (scores.size - 1)) for x in (0.25, 0.5, 0.75)]
    q1, median, q3 = np.partition(scores, places, axis=None)[places]
    threshold = median + 1.5 * (q3 - q1)
    return np.abs(scores - threshold) <= share * threshold


def at_threshold(method: str, base: np.ndarray, models: list[np.ndarray]) -> np.ndarray:
    """Entries that a cut through equal magnitudes leaves to the order of a sort."""
    if method == "arcee_fusion":  # mergekit takes the quartiles of a million entries that it draws
        return near_threshold(base, models[0], 0.01)
    excepted = np.zeros(base.shape, dtype=bool)
    for model in models:
        magnitude = np.abs(model - base)
        for cut in cuts(method, base.size):
            if 0 < cut < base.size:
                below, at = np.partition(magnitude, (cut - 1, cut), axis=None)[cut - 1 : cut + 1]
                if below == at > 0:  # an entry that is no different from the base gives the same either way
                    excepted |= magnitude == at
    return excepted


def compare_exact(
    method: str, base: np.ndarray, models: list[np.ndarray], ours: np.ndarray, theirs: np.ndarray
) -> dict:
    excepted = at_threshold(method, base, models)
    kept = ~excepted
    w, a, b = (x[kept].astype(np.float64) for x in (base, ours, theirs))
    delta = float(np.linalg.norm(b - w))
    difference = float(np.linalg.norm(a - b))
    bound = BOUND * delta + STORED * float(np.linalg.norm(b))
    error = difference / delta if delta else difference
    return {"error": error, "of_bound": difference / bound if bound else difference, "excepted": int(excepted.sum())}


def slerp(base: np.ndarray, models: list[np.ndarray], t: float) -> np.ndarray:
    """The formula, float64."""
    a, b = base, models[0]
    cosine = float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
    if abs(cosine) > PARALLEL:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def multislerp(base: np.ndarray, models: list[np.ndarray], weight: float) -> np.ndarray:
    """The formula with equal weights, float64: direction of the mean of the unit task vectors, mean of their norms."""
    deltas = [model - base for model in models]
    lengths = [float(np.linalg.norm(delta)) for delta in deltas]
    mean = sum(delta / (length + 1e-8) for delta, length in zip(deltas, lengths, strict=True))
    size = float(np.linalg.norm(mean))
    return base + (mean / size * (sum(lengths) / len(lengths)) if size else 0.0)


def karcher(base: np.ndarray, models: list[np.ndarray]) -> np.ndarray:
    """The iteration on the sphere, float64."""
    lengths = [float(np.linalg.norm(model)) for model in models]
    units = [model / length for model, length in zip(models, lengths, strict=True) if length > 1e-5]
    if not units:
        return np.zeros_like(base)
    mean = sum(units) / len(units)
    mean /= np.linalg.norm(mean)
    for _ in range(10):
        step = np.zeros_like(mean)
        for unit in units:
            cosine = min(1.0, float(np.dot(mean, unit)))
            angle = math.acos(cosine)
            if angle >= 1e-5:
                step += angle / math.sin(angle) * (unit - cosine * mean) / len(units)
        size = float(np.linalg.norm(step))
        if size < 1e-5:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
    return mean * (sum(lengths) / len(lengths))


FORMULAS = {"slerp": slerp, "multislerp": multislerp, "karcher": karcher}


def compare_formula(
    method: str, base: np.ndarray, models: list[np.ndarray], ours: np.ndarray, theirs: np.ndarray
) -> dict:
    wide = base.astype(np.float64)
    truth = FORMULAS[method](wide, [model.astype(np.float64) for model in models], **tools.METHODS[method])
    delta = float(np.linalg.norm(truth - wide))
    error, their_error = (float(np.linalg.norm(x - truth)) for x in (ours, theirs))
    size = float(np.linalg.norm(truth))
    their_bound = COARSE * delta + ROUNDING * math.sqrt(base.size) * size
    of_bound = max(error / (BOUND * delta + STORED * size), their_error / their_bound)
    return {"error": error / delta, "mergekit_error": their_error / delta, "of_bound": of_bound}


def compare_random(base: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> dict:
    """Two draws: shares and norms differ by no more than chance allows."""
    deltas = [np.abs(x.astype(np.float64) - base) for x in (ours, theirs)]
    shares = [float(np.count_nonzero(d)) / d.size for d in deltas]
    spread = math.sqrt(sum(p * (1 - p) for p in shares) / base.size) + 1 / base.size
    norms = [float(d.sum()) for d in deltas]
    wander = math.sqrt(sum(float((d * d).sum()) for d in deltas))
    share = abs(shares[0] - shares[1]) / (SIGMAS * spread)
    norm = abs(norms[0] - norms[1]) / (SIGMAS * wander) if wander else 0.0
    return {"share": shares, "l1": norms, "of_bound": max(share, norm)}


def compare_method(root: Path, method: str, ours: Path, theirs: Path) -> dict:
    """All tensors of one method: the worst of each figure."""
    base = Weights(root / "base")
    sources = [Weights(root / name) for name in tools.recipe_models(method) if name != "base"]
    first, second = Weights(ours), Weights(theirs)
    if first.entries.keys() != second.entries.keys():
        names = sorted(first.entries.keys() ^ second.entries.keys())
        return {"agrees": False, "reason": f"{len(names)} tensors in one output alone: {', '.join(names[:5])}"}
    rows = []
    for name in first.entries:
        w, a, b = base[name], first[name], second[name]
        if method in tools.RANDOM:
            rows.append(compare_random(w, a, b))
        elif method in FORMULAS:
            rows.append(compare_formula(method, w, [model[name] for model in sources], a, b))
        else:
            shape = first.entries[name][2]["shape"]
            w, a, b, *tuned = (x.reshape(shape) for x in (w, a, b, *(model[name] for model in sources)))
            rows.append(compare_exact(method, w, tuned, a, b))
    worst = max(row["of_bound"] for row in rows)
    entries = sum(int(np.prod(entry["shape"])) for _, _, entry in first.entries.values())
    result = {"agrees": worst <= 1.0, "worst_of_bound": worst, "tensors": len(rows), "entries": entries}
    if method in tools.RANDOM:
        return result | {"largest_share_gap": max(abs(row["share"][0] - row["share"][1]) for row in rows)}
    result["error"] = max(row["error"] for row in rows)
    if method in FORMULAS:
        return result | {"mergekit_error": max(row["mergekit_error"] for row in rows)}
    return result | {"excepted": sum(row["excepted"] for row in rows)}


def compare_methods(root: Path, methods: list[str], venv: Path, threads: int) -> dict[str, dict]:
    """Runs both programs on each method at dtype float32 (WIDE: mergekit at float64) and compares what they wrote."""
    results = {}
    for method in methods:
        recipe = tools.write_recipe(root, method, "float32")
        ours, theirs = root / f"{method}.pymerge", root / f"{method}.mergekit"
        tools.run(tools.pymerge_command(recipe, ours, threads), ours, threads)
        if method in WIDE:
            recipe = tools.write_recipe(root, method, "float64")
        tools.run(tools.mergekit_command(venv, recipe, theirs), theirs, threads)
        results[method] = compare_method(root, method, ours, theirs)
        verdict = "agrees" if results[method]["agrees"] else "DIFFERS"
        details = ", ".join(f"{key} {value}" for key, value in results[method].items() if key != "agrees")
        print(f"{method:16s} {verdict}: {details}", flush=True)
    return results
