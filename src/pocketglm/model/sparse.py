"""Top-k attention: each query looks at the k keys with its largest scores, head by head.

softmax over {j : s_j >= the k-th largest of the scores that the query may see}; keys whose score
equals the k-th largest all stay, so that no order of equal keys decides. A gradient reaches the
kept scores alone. With no more than k keys it is plain attention. Scores of all pairs are held,
[B, heads, S, T]. Explicit sparse transformer: Zhao et al. 2019, https://arxiv.org/abs/1912.11637.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, top_k: int, dropout: float = 0.0
) -> Tensor:
    """q [B, heads, S, D], k and v [B, kv heads, T, D] -> [B, heads, S, D].

    attend: bool, broadcastable to [B, 1, S, T], with a key for every query; None = causal, S = T.
    top_k: fewer than T.
    """
    kv_heads, size = k.shape[1], q.shape[-1]
    grouped = q.view(len(q), kv_heads, -1, *q.shape[2:])
    scores = (grouped @ k[:, :, None].transpose(-1, -2)).float() * size**-0.5
    if attend is None:
        attend = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()[None, None]
    scores = scores.masked_fill(~attend[:, :, None], -torch.inf)
    least = scores.detach().topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    shares = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
    if dropout:
        shares = F.dropout(shares, dropout)
    out: Tensor = shares.to(v.dtype) @ v[:, :, None]
    return out.flatten(1, 2)
