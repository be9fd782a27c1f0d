"""The processes of ``test_distributed.py``: one interpreter imports everything and forks them for each case."""

import datetime
import json
import os
import signal
import sys

import conftest  # noqa: F401 -- the shim for torchvision
import torch
import torch.distributed as dist
from models import build
from torch import nn

from tp_cosep import Compensator, CoSePPruner, CoSePSelector, ReconstructionSelector, recalibrate

SELECTORS = {"joint": ReconstructionSelector, "separability": CoSePSelector}


class ViT(nn.Module):
    """A little attention, so that some groups are compared by separability."""

    def __init__(self):
        super().__init__()
        self.embed, self.num_heads = nn.Linear(6, 12), 3
        self.qkv, self.proj, self.head = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):  # [samples, tokens, 6]
        x = self.embed(x)
        q, k, v = self.qkv(x).reshape(len(x), x.shape[1], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.proj(y)).mean(1))


def data(kind):
    if kind == "vit":
        torch.manual_seed(0)
        return ViT().eval(), torch.randn(40, 5, 6), torch.arange(40) % 4
    return build(kind, 12)


def shard(x, y, rank, world, how):
    """Batches of one process: uneven ones, one without a class, or none at all."""
    if world == 1:
        return [(x[:15], y[:15]), (x[15:], y[15:])]
    if how == "empty" and rank == world - 1:
        return []
    if how == "without a class":
        mine = (y != 2) if rank == 0 else (y == 2)
        return [(x[mine], y[mine])] if rank < 2 else []
    first, rest = 7 * rank, 7 * (rank + 1)
    last = rank == world - 1 or (how == "empty" and rank == world - 2)
    return [(x[first:], y[first:])] if last else [(x[first:rest], y[first:rest])]


def fit(kind, how, rank, world, space):
    model, x, y = data(kind)
    batches = shard(x, y, rank, world, how)
    selector = SELECTORS[space](spatial=2).fit(model, batches, progress=False)
    pruner = CoSePPruner(model, x[:1], selector, pruning_ratio=0.5)
    compensator = Compensator(model, x[:1]).fit(batches, progress=False)
    seconds = {r.name: r.moments.folds.sum(0) for r in compensator._consumers.values()}
    # As many samples in every batch: averages over batches are compared.
    again, _, _ = data(kind)
    recalibrate(again, [(x[i : i + 10], y[i : i + 10]) for i in range(10 * rank, 40, 10 * world)], progress=False)
    for group in pruner.step(interactive=True):
        compensator(group)
        group.prune()
    return {
        "plan": [(e.name, e.selection.keep_idxs) for e in pruner.plan if e.selection],
        "repaired": model.state_dict(),
        "recalibrated": again.state_dict(),
        "seconds": seconds,
        "moments": {n: (m.classes, m.count, m.mean, m.m2) for n, m in selector.statistics.moments.items()},
        "covariances": {n: m.covariance for n, m in selector.statistics.inputs.items()},
        "between": {n: m.between_classes for n, m in selector.statistics.inputs.items()},
    }


def run(out, rank, world, kind, how, space):
    """One process: its result is saved, and what it printed is in a file beside it."""
    signal.alarm(240)
    os.dup2(os.open(f"{out}.{rank}.txt", os.O_CREAT | os.O_WRONLY), sys.stdout.fileno())
    torch.set_num_threads(1)
    if world > 1:
        timeout = datetime.timedelta(seconds=20)
        init = f"file://{out}.store"
        dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=timeout)
    try:
        if how == "dies" and rank == 1:
            os._exit(7)
        if how == "fails":
            model, x, y = data(kind)
            ReconstructionSelector().fit(model, [(x, y if rank == 0 else y.float())], progress=False)
        result = fit(kind, how, rank, world, space)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(3)
    torch.save(result, f"{out}.{rank}")
    os._exit(0)


def forked(out, rank, world, *case):
    """The id of a new process. Nothing has computed in this one, so no thread is lost."""
    if pid := os.fork():
        return pid
    try:
        run(out, rank, world, *case)
    finally:
        os._exit(1)


def main():
    """Each line of the input is a case ``[out, world, kind, how, space]``; the exit codes are printed."""
    for line in sys.stdin:
        out, world, *case = json.loads(line)
        started = [forked(out, rank, world, *case) for rank in range(world)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]), flush=True)


if __name__ == "__main__":
    main()
