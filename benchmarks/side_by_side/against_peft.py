"""pymerge and PEFT on the same LoRA adapters: add_weighted_adapter against `as_adapter`, with agreement.

    python benchmarks/side_by_side/against_peft.py --tasks 4 --rank 16 --reps 3

The matrices of one BERT-base or ViT-B block (four of 768 x 768, one each way of 768 x 3072), float32. PEFT starts from
adapters that are loaded in a model in memory and ends with the new adapter on disk; pymerge starts from the adapter
folders and the base's on disk. Both in this process, on one thread, imports not counted. PEFT's SVD is asked for thin
factors (`svd_full_matrices=False`), which is faster than its default. What is compared: the products B A.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peer_tools
import rows
import torch
from rows import REPOSITORY, Row
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHT = 0.5
DENSITY = 0.25
KINDS: dict[str, dict[str, Any]] = {  # combination_type -> pymerge's words (docs/coming_from.md)
    "cat": {"method": "task_arithmetic"},
    "svd": {"method": "task_arithmetic"},
    "magnitude_prune_svd": {"method": "task_arithmetic", "purify": {"method": "trim", "density": DENSITY}},
    "ties_svd": {
        "method": "ties",
        "density": 1,
        "scope": "tensor",
        "purify": {"method": "trim", "density": DENSITY},
    },
    "dare_ties_svd": {
        "method": "dare_ties",
        "density": DENSITY,
        "trim": 1,
        "merge_func": "mean",
        "scope": "tensor",
        "seed": 0,
    },
}
RANDOM = ("dare_ties_svd",)
BOUND = 1e-3  # of products cut where singular values are close, from float32 sums
RANDOM_BOUND = 0.1  # of the norms of two draws


def shapes(hidden: int) -> dict[str, tuple[int, int]]:
    square = {f"attention.{name}": (hidden, hidden) for name in ("query", "key", "value", "output")}
    return square | {"mlp.up": (4 * hidden, hidden), "mlp.down": (hidden, 4 * hidden)}


class Block(torch.nn.Module):
    """Linear layers under their names; PEFT needs no forward pass to combine adapters."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes(hidden).items():
            layer = torch.nn.Linear(shape[1], shape[0], bias=False)
            layer.weight.data = 0.02 * torch.randn(shape, generator=generator)
            *owners, last = name.split(".")
            owner: torch.nn.Module = self
            for part in owners:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(last, layer)


def write(root: Path, hidden: int, tasks: int, rank: int) -> None:
    """root/base, root/a1, root/a2, ...: a checkpoint and adapters of it as PEFT saves them; no two entries alike."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "base").mkdir(parents=True)
    save_file(Block(hidden).state_dict(), root / "base" / "model.safetensors")
    for task in range(1, tasks + 1):
        generator = torch.Generator().manual_seed(task)
        tensors = {}
        for name, (m, n) in shapes(hidden).items():
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, n, generator=generator) / n**0.5
            tensors[f"{key}.lora_B.weight"] = 0.02 * torch.randn(m, rank, generator=generator)
        folder = root / f"a{task}"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(shapes(hidden))}
        (folder / "adapter_config.json").write_text(json.dumps(config))


def loaded(root: Path, hidden: int, tasks: int) -> Any:
    from peft import PeftModel

    model = PeftModel.from_pretrained(Block(hidden), str(root / "a1"), adapter_name="a1")
    for task in range(2, tasks + 1):
        model.load_adapter(str(root / f"a{task}"), adapter_name=f"a{task}")
    return model


def candidates(kind: str, root: Path, args: Namespace) -> dict[str, Callable[[], Any]]:
    import pymerge

    model, names = loaded(root, args.hidden, args.tasks), [f"a{task}" for task in range(1, args.tasks + 1)]
    outs = {name: root / f"{kind}.{name}" for name in ("ours", "theirs")}
    options = pymerge.Options(threads=1, progress=False)

    def theirs() -> dict[str, Tensor]:
        shutil.rmtree(outs["theirs"], ignore_errors=True)
        torch.manual_seed(0)
        how = {"svd_rank": args.rank, "svd_full_matrices": False, "density": DENSITY} if kind != "cat" else {}
        model.add_weighted_adapter(names, [WEIGHT] * args.tasks, "merged", kind, **how)
        model.save_pretrained(str(outs["theirs"]), selected_adapters=["merged"])
        model.delete_adapter("merged")
        return load_file(outs["theirs"] / "merged" / "adapter_model.safetensors")

    def ours() -> dict[str, Tensor]:
        shutil.rmtree(outs["ours"], ignore_errors=True)
        pymerge.merge(
            root / "base",
            [root / name for name in names],
            out=outs["ours"],
            options=options,
            as_adapter=True if kind == "cat" else args.rank,
            weight=WEIGHT,
            scale=1,
            **KINDS[kind],
        )
        return load_file(outs["ours"] / "adapter_model.safetensors")

    return {"pymerge": ours, f"PEFT {importlib.metadata.version('peft')}": theirs}


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A of each matrix; both sides' alpha equals the rank."""
    stems = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    return {stem: tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"] for stem in stems}


def agreement(kind: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Any]:
    one, other = products(ours), products(theirs)
    if one.keys() != other.keys():
        return {"agrees": False, "compared": "names of the matrices"}
    if kind in RANDOM:
        sizes = [sum(float(x.square().sum()) for x in found.values()) for found in (one, other)]
        agrees = abs((sizes[0] / sizes[1]) ** 0.5 - 1) <= RANDOM_BOUND
        return {"agrees": agrees, "compared": f"norm of all products, of two draws, to {RANDOM_BOUND:g}"}
    apart = max(peer_tools.relative(one[name], other[name]) for name in one)
    return {"difference": apart, "agrees": apart <= BOUND, "compared": f"products B A, to {BOUND:g}"}


def main() -> int:
    parser = rows.arguments(__doc__, "peft")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "peft", help="adapters and results")
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.tasks, args.rank, args.reps = 64, 2, 4, 1
    peer_tools.one_core()
    root = args.work / f"{args.hidden}x{args.tasks}x{args.rank}"
    write(root, args.hidden, args.tasks, args.rank)
    found = []
    for kind in KINDS:
        runs, results = peer_tools.take_turns(candidates(kind, root, args), args.reps)
        name = next(name for name in runs if name != "pymerge")
        found.append(
            Row(
                peer="peft",
                method=f"{kind} as an adapter",
                setting=f"{args.tasks} adapters of rank {args.rank}, a block of width {args.hidden}, float32, 1 thread",
                measure="cpu",
                pymerge=runs["pymerge"],
                opponents={name: runs[name]},
                note="PEFT: adapters in memory to disk; pymerge: disk to disk",
                **agreement(kind, results["pymerge"], results[name]),
            )
        )
        peer_tools.show(found[-1:])
    rows.save(args.json, found)
    return 0 if all(row.agrees for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
