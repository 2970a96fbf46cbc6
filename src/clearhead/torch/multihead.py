"""`nn.MultiheadAttention` that computes with `attend`: the same parameters, names and arguments.

What `nn.TransformerEncoderLayer` does in eval mode without gradients is the trap: it hands the weights of its
`self_attn` to one fused kernel and never calls it. Here that path is closed twice: the layer asks its attention for
`_qkv_same_embed_dim`, which is False here whatever the parameters are, and it must call `merge_masks` on the way to the
kernel, which raises. `nn.TransformerEncoder` may also pack padded batches into a nested tensor for that kernel;
`patch` switches that off, and nested input raises.

Legend: b batch, h heads, n queries, m keys, d head dim, p = h * d, w width.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clearhead.attention.spec import Full, Performer, Selective
from clearhead.errors import UserError
from clearhead.torch.masks import read_masks
from clearhead.torch.mixing import Patched, Projected, called, mix, refuse_dropout


class PatchedMultiheadAttention(nn.MultiheadAttention):
    """A patched `nn.MultiheadAttention`; made by `patch`, never built.

    Arguments and results are torch's, with four differences. A query that sees no key gives 0 before the output matrix
    (torch: NaN when weights are asked for). Returned weights are those of the mechanism, without dropout and without
    a gradient. `is_causal=True` needs no mask; beside one it is checked, not believed. Nested tensors are refused.
    """

    clearhead_patch: Patched

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return False  # see the top of this file

    def merge_masks(self, *arguments: object, **keywords: object) -> tuple[Tensor | None, int | None]:
        """Called only on the way to a fused kernel that would bypass this layer."""
        raise RuntimeError(
            f"a layer of torch {torch.__version__} is about to bypass its patched attention "
            f"({self.clearhead_patch.spec.text!r}) by the inference fast path; please report this, and call "
            "torch.backends.mha.set_fastpath_enabled(False)"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See the class and `nn.MultiheadAttention.forward`."""
        called(self)
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("a patched MultiheadAttention takes no nested tensors; pad and pass key_padding_mask")
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
            raise ValueError(f"query, key and value: expected all batched (3-D) or all not (2-D), got {shapes}")
        x = self._project(query, key, value, batch_first=self.batch_first or not batched)
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        extra = x.key.shape[2] - x.bare[1].shape[1]
        if extra:
            attn_mask, key_padding_mask, is_causal = _longer(attn_mask, key_padding_mask, is_causal, x, extra)
        patched = self.clearhead_patch
        b, h, n, _ = x.query.shape
        seen = read_masks(
            attn_mask,
            key_padding_mask,
            is_causal,
            (b, h, n, x.key.shape[2]),
            scores=not isinstance(patched.spec.weights, Performer),
        )
        found = mix(
            patched,
            self,
            x,
            seen,
            dropout_p=self.dropout if self.training else 0.0,
            want=("weights",) if need_weights else (),
        )
        out = self.out_proj(found.out.transpose(1, 2).flatten(2))
        weights = found.extras["weights"].to(out.dtype) if need_weights else None
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, *, batch_first: bool) -> Projected:
        """Through the matrices, with the learned and the zero key behind the others where the layer has them."""
        same, same_source = query is key and key is value, key is value
        if query.dim() == 2:
            query, key, value = query[None], key[None], value[None]
        elif not batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        bias = self.in_proj_bias
        if self.in_proj_weight is None:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            parts = [F.linear(t, w, c) for t, w, c in zip((query, key, value), matrices, biases, strict=True)]
        elif same:
            parts = list(F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1))
        else:
            w = self.embed_dim
            of_query, of_source = (None, None) if bias is None else bias.split([w, 2 * w])
            matrix, source = self.in_proj_weight.split([w, 2 * w])
            parts = [F.linear(query, matrix, of_query)]
            if same_source:
                parts += F.linear(key, source, of_source).chunk(2, dim=-1)
            else:
                biases = (None, None) if of_source is None else of_source.chunk(2)
                parts += [F.linear(t, w, c) for t, w, c in zip((key, value), source.chunk(2), biases, strict=True)]
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in parts)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._with(k, self.bias_k), self._with(v, self.bias_v)
        if self.add_zero_attn:
            k, v = (torch.cat((t, torch.zeros_like(t[:, :, :1])), dim=2) for t in (k, v))
        return Projected(q, k, v, (parts[0], parts[1], parts[2]))

    def _with(self, x_bhmd: Tensor, added_11p: Tensor) -> Tensor:
        added = added_11p.view(1, self.num_heads, 1, self.head_dim).to(x_bhmd.dtype)
        return torch.cat((x_bhmd, added.expand(x_bhmd.shape[0], -1, -1, -1)), dim=2)


def _longer(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, x: Projected, extra: int
) -> tuple[Tensor | None, Tensor | None, bool]:
    """The masks with keys behind the others that all queries see; causality then is a mask of its own."""
    if is_causal and attn_mask is None:
        n, m = x.query.shape[2], x.bare[1].shape[1]
        attn_mask = torch.ones(n, m, dtype=torch.bool, device=x.query.device).triu(1)
    padded = (None if t is None else F.pad(t, (0, extra)) for t in (attn_mask, key_padding_mask))
    return (*padded, False)  # type: ignore[return-value]


def refuse_multihead(patched: Patched, name: str, layer: nn.MultiheadAttention) -> None:
    """Raise `UserError` for a layer that cannot have this spec, before anything is changed."""
    spec = patched.spec
    refuse_dropout(spec, name, layer.dropout)
    if layer.bias_k is None and not layer.add_zero_attn:
        return
    which = "add_bias_kv" if layer.bias_k is not None else "add_zero_attn"
    for choice in (spec.pattern, spec.weights, spec.temperature):
        if isinstance(choice, Performer | Selective) or (choice is spec.pattern and choice != Full()):
            assert choice is not None
            raise UserError(
                f"{name}: {which} adds a key that stands nowhere in the text, and {choice.name} needs to know where "
                "keys stand; patch it with another spec, or leave it out with skip"
            )
