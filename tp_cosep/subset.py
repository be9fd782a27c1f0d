"""Greedy column subset selection."""
from __future__ import annotations
import torch
from torch import Tensor


def column_subset(covariances, metrics, n_keep=None):
    """order, errors"""
    n = len(covariances[0])
    n_keep = n if n_keep is None else n_keep
    R = torch.stack([c.double() for c in covariances])
    M = torch.stack([m.double() for m in metrics])
    total = float((R * M).sum())
    diag0 = R.diagonal(dim1=1, dim2=2).clone()
    q = ((R @ M) * R).sum(2)  # (R M R)_jj
    left = torch.ones(n, dtype=torch.bool)
    order, errors = [], [total]
    for _ in range(n_keep):
        d = R.diagonal(dim1=1, dim2=2)
        ok = d > 1e-10 * diag0
        gain = torch.where(ok, q.clamp(min=0) / d.clamp(min=1e-300), 0).sum(0)
        gain[~left] = -1
        j = int(gain.argmax())
        left[j] = False
        order.append(j)
        errors.append(errors[-1] - float(gain[j]))
        for c in range(len(R)):
            if not ok[c, j]:
                continue
            r, dj = R[c, :, j].clone(), R[c, j, j].clone()
            v = M[c] @ r
            u = R[c] @ v
            q[c] += -2 * u * r / dj + r**2 * (r @ v) / dj**2
            R[c].addr_(r, r, alpha=-1 / float(dj))
    return order, errors
