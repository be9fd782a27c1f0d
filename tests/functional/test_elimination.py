import pytest
import torch
from models import seeded

from tp_cosep.functional import elimination as module
from tp_cosep.functional.elimination import Consumer, backward_elimination, refit_losses

N = 7


def consumer(sizes, n_more, n_outputs, seed=0):
    """A consumer with ``sizes`` features of each component and ``n_more`` of none, and its weights W."""
    generator = seeded(seed)
    components = [i for i, size in enumerate(sizes) for _ in range(size)] + [-1] * n_more
    f = len(components)
    x = torch.randn(200, f, generator=generator, dtype=torch.float64)
    covariance = (x @ torch.randn(f, f, generator=generator, dtype=torch.float64)).T.cov()
    w = torch.randn(f, n_outputs, generator=generator, dtype=torch.float64)
    order = torch.randperm(f, generator=generator)
    return Consumer(covariance, w @ w.T, torch.tensor(components)[order]), w


def lost(consumer, w, kept):
    """Σ_o (w − ŵ)ᵀ C (w − ŵ) with ŵ refitted to the inputs of some components, by solving the normal equations."""
    c = consumer.covariance + torch.diag(
        1e-4 * consumer.covariance.diagonal() + 1e-10 * consumer.covariance.diagonal().mean()
    )
    kept_features = [
        i for i, component in enumerate(consumer.components.tolist()) if component == -1 or component in kept
    ]
    refitted = torch.zeros_like(w)
    refitted[kept_features] = torch.linalg.solve(c[kept_features][:, kept_features], c[kept_features] @ w)
    return float(((w - refitted) * (c @ (w - refitted))).sum())


@pytest.mark.parametrize("n_pending", [1, 5, 64])
@pytest.mark.parametrize("sizes", [[1] * N, [3] * N, [1, 2, 3, 1, 1, 4, 2]])
def test_every_step_prunes_the_cheapest(sizes, n_pending, monkeypatch):
    monkeypatch.setattr(module, "_MOST_PENDING", n_pending)
    parts = [consumer(sizes, 2, 5), consumer(sizes[::-1], 0, 3, seed=1)]
    elimination = backward_elimination([c for c, _ in parts], N)
    kept, before = set(range(N)), 0.0
    for pruned, cost in zip(elimination.order.tolist(), elimination.costs.tolist(), strict=True):
        after = {i: sum(lost(c, w, kept - {i}) for c, w in parts) for i in kept}
        assert min(after, key=after.get) == pruned
        assert cost == pytest.approx(after[pruned] - before, rel=1e-6)
        before = after[pruned]
        kept.remove(pruned)


def test_a_cluster_loses_its_last_member_only_when_all_are_down_to_one():
    clusters = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    part, _ = consumer([2] * N, 1, 5)
    order = backward_elimination([part], N, clusters).order
    assert sorted(clusters[order[-3:]].tolist()) == [0, 1, 2]
    free = backward_elimination([part], N).order
    assert sorted(clusters[free[-3:]].tolist()) != [0, 1, 2]  # or the constraint was not active


def test_of_equally_cheap_ones_the_lowest_index_is_kept():
    part = Consumer(torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), torch.arange(4))
    assert backward_elimination([part], 4).order.tolist() == [3, 2, 1, 0]


def test_constant_channels_are_pruned_first():
    part, _ = consumer([1] * 5, 0, 3)
    covariance = part.covariance.clone()
    covariance[2] = covariance[:, 2] = 0
    elimination = backward_elimination([Consumer(covariance, part.costs, torch.arange(5))], 5)
    assert elimination.order[0] == 2
    assert torch.isfinite(elimination.costs).all()
    assert elimination.costs[0] < 1e-6


@pytest.mark.parametrize("sizes", [[1] * N, [3] * N, [1, 2, 3, 1, 1, 4, 2]])
def test_losses_along_an_order_are_those_of_refits(sizes):
    parts = [consumer(sizes, 2, 5), consumer(sizes[::-1], 0, 3, seed=1)]
    order = torch.randperm(N, generator=seeded(2))
    kept, before = set(range(N)), 0.0
    for pruned, loss in zip(order.tolist(), refit_losses([c for c, _ in parts], order).tolist(), strict=True):
        kept.remove(pruned)
        after = sum(lost(c, w, kept) for c, w in parts)
        assert loss == pytest.approx(after - before, rel=1e-6)
        before = after


def test_losses_along_the_order_of_elimination_are_its_costs():
    parts = [consumer([1, 2, 3, 1, 1, 4, 2], 2, 5)[0]]
    elimination = backward_elimination(parts, N)
    assert refit_losses(parts, elimination.order).tolist() == pytest.approx(elimination.costs.tolist(), rel=1e-6)


def test_losses_of_constant_channels_are_none():
    part, _ = consumer([1] * 5, 0, 3)
    covariance = part.covariance.clone()
    covariance[2] = covariance[:, 2] = 0
    losses = refit_losses([Consumer(covariance, part.costs, torch.arange(5))], torch.tensor([4, 2, 0, 1, 3]))
    assert losses[1] < 1e-6 < losses[[0, 2, 3, 4]].min()
