"""Which units of which architecture may be permuted without a change of what the model computes.

`spec_for(floating_shapes(model), config)` gives the groups of a model: of its residual stream, of each layer's heads,
of each MLP or convolution. A parameter that the family cannot place is an InputError, never left where it is.

Family      Module, what it covers
decoder     Llama and what calls its modules as it does: rotary positions, grouped queries, gated MLPs, experts
bert        BERT, RoBERTa
gpt2        GPT-2: weights stored [in, out], q, k and v fused
gpt_neox    GPT-NeoX: q, k and v fused head by head, partly rotary
vit         ViT and DeiT, names of timm and of transformers
clip        CLIP's towers; the joint space stays as it is
resnet      ResNet and ResNeXt, BatchNorm or GroupNorm
chain       VGG, AlexNet, MLPs

What a model gives out is not permuted: classes, tokens, a joint space. Only a model without a head gives out its last
hidden state, and with it aligned, in the anchor's order.

To add a family: a module here with `spec(shapes, config, *, tie_heads) -> Spec`, a line of `registry.FAMILIES`, and a
tiny model in tests/align, whose tests then shuffle its units and leave out its entries one by one. Transformers are
tables of `rows.Row`, nets of convolutions paths of `convnet.Layer`; `builder.Builder` collects what both say.
"""

from pymerge.align.specs.registry import families, floating_shapes, spec_for

__all__ = ["families", "floating_shapes", "spec_for"]
