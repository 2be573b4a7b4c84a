"""Llama and whatever has its names: (gated) MLPs, rotary positions, grouped queries, experts.

Every architecture whose modules are called as here gets a spec; what the rows do not place is an error. Rotary
positions are assumed over the whole head, which is valid with fewer or none too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.align.groups import Spec
from pymerge.align.specs.builder import Builder, Place
from pymerge.align.specs.rows import RESIDUAL, Row, embeddings, fill, number, refuse_untied
from pymerge.errors import InputError

ROWS = (
    embeddings("embed_tokens|embed_positions"),
    Row("q_proj", Place("{at}", "q"), RESIDUAL, tap="output"),
    Row("k_proj", Place("{at}", "k"), RESIDUAL, tap="output"),
    Row("v_proj", Place("{at}", "v"), RESIDUAL),
    Row(r"o_proj|out_proj|(?<=attn\.)dense", RESIDUAL, Place("{at}", "o"), tap="input"),
    # Each model routes tokens its own way: experts see no common samples, so they have no taps.
    Row(r"experts\.(?P<e>\d+)\.(?:w1|w3|gate_proj|up_proj)", Place("{at}.experts.{e}"), RESIDUAL),
    Row(r"experts\.(?P<e>\d+)\.(?:w2|down_proj)", RESIDUAL, Place("{at}.experts.{e}")),
    Row("gate", Place("{at}.experts"), RESIDUAL),
    Row("shared_expert_gate", None, RESIDUAL),
    Row("gate_proj|up_proj|fc1|c_fc", Place("{at}"), RESIDUAL),
    Row("down_proj|fc2|c_proj", RESIDUAL, Place("{at}"), tap="input"),
    Row(r"norm|(?<!\d\.)final_layer_?norm", RESIDUAL, tap="output"),
    Row("(?![qk]_norm)[^.]*norm", RESIDUAL),
)
FIXED = ("*rotary_emb.inv_freq",)


def spec(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], *, tie_heads: bool) -> Spec:
    """Groups "residual", one of Heads and one MLP a layer or expert, the order of experts. Nothing moves inside a head
    of q and k.

    Raises   InputError: parameters that no row places; positions that tell heads apart (ALiBi); fused or grouped
             experts"""
    refuse_untied(tie_heads)
    if config.get("alibi") or config.get("position_embedding_type") == "alibi":
        raise InputError(
            "ALiBi gives every head a slope of its own: heads may not be permuted, there is no spec for it"
        )
    if (config.get("n_group") or 1) > 1:
        raise InputError(
            "the router picks groups of experts first: experts may not be permuted, there is no spec for it"
        )
    heads = number(config, "num_attention_heads")
    # A head that is tied and yet stored is the embedding once more: permuted, but no second time in the similarity.
    head = Row(
        "lm_head|score|embed_out|qa_outputs", None, Place("residual", similarity=not config.get("tie_word_embeddings"))
    )
    builder = Builder(shapes, rotary=None)
    fill(builder, (*head_norms(shapes, heads), *ROWS, head), heads)
    for group in [name for name in builder.entries if name.rpartition(".")[2] == "experts"]:
        builder.members[group] = experts(shapes, group)
    return builder.spec(FIXED)


def head_norms(shapes: Mapping[str, Sequence[int]], heads: int) -> tuple[Row, ...]:
    """Norms of q and k: with a scale that all heads share, or one over all heads; of others there is no row."""
    name = next((name for name in shapes if name.endswith(".q_norm.weight")), None)
    if name is None:
        return ()
    rows = shapes.get(name.replace("q_norm", "q_proj"), (0,))[0]
    if tuple(shapes[name]) == (rows // heads,):
        return (Row("[qk]_norm", None),)
    if tuple(shapes[name]) == (rows,):
        return (Row("q_norm", Place("{at}", "q")), Row("k_norm", Place("{at}", "k")))
    return ()


def experts(shapes: Mapping[str, Sequence[int]], group: str) -> tuple[tuple[str, ...], ...]:
    """The parameters of each expert.

    Raises   InputError unless the experts are stored one by one, and all alike"""
    names = [name.removeprefix(f"{group}.0.") for name in shapes if name.startswith(f"{group}.0.")]
    if not names:
        raise InputError(
            f"{group}: the experts are not stored one by one, as transformers saves them; align the saved checkpoint, "
            "not the module's state dict"
        )
    count = len({name.removeprefix(f"{group}.").split(".")[0] for name in shapes if name.startswith(f"{group}.")})
    return tuple(tuple(f"{group}.{e}.{name}" for name in names) for e in range(count))
