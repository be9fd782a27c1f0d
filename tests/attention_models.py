"""Attention written out, and a small transformer of it."""

import torch
from models import initialise, vectors
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Softmax attention written out, with a fused or separate projections, and a temperature per head if wanted."""

    def __init__(self, width, num_heads=4, head_dim=6, *, fused=False, kv_heads=None, per_head=False):
        super().__init__()
        self.num_heads, self.head_dim, self.num_key_value_heads = num_heads, head_dim, kv_heads or num_heads
        if fused:
            self.qkv = nn.Linear(width, 3 * num_heads * head_dim)
        else:
            self.q_proj = nn.Linear(width, num_heads * head_dim)
            self.k_proj = nn.Linear(width, self.num_key_value_heads * head_dim)
            self.v_proj = nn.Linear(width, self.num_key_value_heads * head_dim)
        if per_head:
            self.logit_scale = nn.Parameter(torch.zeros(num_heads, 1, 1))
        self.proj = nn.Linear(num_heads * head_dim, width)

    def forward(self, x):
        n, length, _ = x.shape
        if hasattr(self, "qkv"):
            shape = (n, length, 3, self.num_heads, self.head_dim)
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            layers = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (m(x).view(n, length, -1, self.head_dim).transpose(1, 2) for m in layers)
        if self.num_key_value_heads < self.num_heads:
            k, v = (repeated(t, self.num_heads // self.num_key_value_heads) for t in (k, v))
        logits = q @ k.transpose(-2, -1) / 2
        if hasattr(self, "logit_scale"):
            logits = logits * self.logit_scale.exp()
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(n, length, -1))


def repeated(x, n_times):
    """Every head several times over, as Transformers writes it."""
    n, heads, length, dim = x.shape
    return x[:, :, None].expand(n, heads, n_times, length, dim).reshape(n, heads * n_times, length, dim)


class Transformer(nn.Module):
    """Attention layers with residuals, tokens averaged in pairs between them if wanted, and a head on their mean."""

    def __init__(self, n_layers=2, width=20, *, shrinking=False, **options):
        super().__init__()
        self.shrinking = shrinking
        self.embed = nn.Linear(20, width)
        self.layers = nn.ModuleList(Attention(width, **options) for _ in range(n_layers))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
            if self.shrinking:
                x = F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)
        return self.head(x.mean(1))


def transformer(**options):
    """A hand-made model, and sequences of five vectors for it."""
    return initialise(Transformer(**options)), *vectors(shape=(5, 20))
