"""Plain torch and timm models with other attentions: `ch.torch.patch(model, spec)` and `ch.torch.unpatch(model)`.

    import clearhead as ch
    print(ch.torch.patch(model, "laser"))              # nn.MultiheadAttention, nn.Transformer*, timm's Attention
    vit = VisionTransformer(attn_layer=ch.torch.timm_attention("self_adjust"))

Inside this package `import torch` is the library, as everywhere: imports here are absolute.
"""

from clearhead._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "patch": "clearhead.torch.patching:patch",
        "unpatch": "clearhead.torch.patching:unpatch",
        "PatchReport": "clearhead.hf.report:PatchReport",
        "PatchedMultiheadAttention": "clearhead.torch.multihead:PatchedMultiheadAttention",
        "TimmAttention": "clearhead.torch.vision:TimmAttention",
        "timm_attention": "clearhead.torch.vision:timm_attention",
    },
)
