"""Repairing a model while Torch-Pruning prunes it: what reads a group learns to do without its channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tp_cosep.batches import BatchReader, evaluating, progress_bar, run_model
from tp_cosep.compensation import fit_linear, without
from tp_cosep.errors import InputError, NotFittedError
from tp_cosep.groups import module_names, prunable_groups, read_group
from tp_cosep.reading import Reading, reading_of
from tp_cosep.recalibration import recalibrate
from tp_cosep.second_moments import SecondMoments
from tp_cosep.tracing import ROOT_TYPES, trace

MODES = ("one-shot", "sequential")


@dataclass(frozen=True)
class Repair:
    name: str
    n_gone: int
    error: float | None
    ridge: float | None
    reason: str = ""


@dataclass
class _State:
    reading: Reading
    moments: SecondMoments
    inputs: Tensor
    outputs: Tensor
    pending: dict[str, list[int]] = field(default_factory=dict)


class Compensator:
    def __init__(self, model, example_inputs, *, mode="one-shot", max_positions=32, taps_apart=False, ridge=None,
                 recalibrate=False, seed=0, constant=True):
        self.model = model
        self.example_inputs = example_inputs
        self.mode = mode
        self.max_positions = max_positions
        self.taps_apart = taps_apart
        self.ridge = ridge
        self.recalibrate = recalibrate
        self.seed = seed
        self.constant = constant
        self.repairs: list[Repair] = []
        self._states: dict[nn.Module, _State] = {}

    def fit(self, loader: Iterable[Any], target_fn=None, progress=True):
        graph = trace(self.model, self.example_inputs)
        self._names = dict(graph._module2name)
        readings: dict[nn.Module, Reading] = {}
        for group in prunable_groups(graph, (), ROOT_TYPES):
            view = read_group(group)
            for m in view.readers:
                repeat = _repeat(m)
                r = reading_of(m.layer, taps_apart=self.taps_apart, repeat=repeat)
                if r is not None:
                    readings[m.layer] = r
        device = next(self.model.parameters()).device
        self._states = {}
        for layer, r in readings.items():
            n_out = layer.out_channels if hasattr(layer, "out_channels") else layer.out_features
            self._states[layer] = _State(r, SecondMoments(r.n_features, device), torch.arange(r.n_channels), torch.arange(n_out))
        self.loader = loader
        self.target_fn = target_fn
        generator = torch.Generator().manual_seed(self.seed)
        for inputs in self._batches():
            with watching({l: None for l in self._states}, lambda layer, x: self._states[layer].moments.update(
                    self._states[layer].reading.sampler(x.shape, self.max_positions, generator)(x))):
                with evaluating(self.model):
                    run_model(self.model, inputs)
        if self.mode == "sequential":
            self._original = deepcopy(self.model)
            self._twins = dict(zip(self.model.modules(), self._original.modules(), strict=True))
        return self

    def _batches(self):
        reader = BatchReader(self.model, self.target_fn, predicted=True)
        for i, batch in enumerate(self.loader):
            yield reader.split(batch, i)[0]

    @torch.no_grad()
    def __call__(self, group):
        names = module_names(group)
        graph = group._DG
        self._settle()
        reads: dict[nn.Module, set[int]] = {}
        for dep, idxs in group:
            layer = dep.target.module
            if layer not in names or not idxs:
                continue
            if layer in self._states or layer in self._original_bn():
                pass
            if graph.is_in_channel_pruning_fn(dep.handler) and layer in self._states:
                reads.setdefault(layer, set()).update(idxs)
            if graph.is_out_channel_pruning_fn(dep.handler) and layer in self._states:
                self._states[layer].pending["out"] = sorted(set(idxs))
        repairs = []
        for layer, idxs in reads.items():
            repairs.append(self._one_shot(graph, layer, sorted(idxs)))
        if self.mode == "sequential" and reads:
            if self.recalibrate:
                recalibrate(self.model, self.loader)
            self._sequential(graph, reads)
            if self.recalibrate:
                recalibrate(self.model, self.loader)
        self.repairs += repairs
        return repairs

    def _original_bn(self):
        return ()

    def _settle(self):
        for layer, s in self._states.items():
            gone = s.pending.pop("in", None)
            if gone is not None:
                keep = torch.tensor([i for i in range(len(s.inputs)) if i not in set(gone)])
                if s.reading.n_channels == len(keep):
                    s.inputs = s.inputs[keep]
                    s.moments = s.moments.of(s.reading.features_of(keep).to(s.moments.folds.device))
            gone = s.pending.pop("out", None)
            if gone is not None:
                keep = torch.tensor([i for i in range(len(s.outputs)) if i not in set(gone)])
                n_out = layer.out_channels if hasattr(layer, "out_channels") else layer.out_features
                if n_out == len(keep):
                    s.outputs = s.outputs[keep]

    def _one_shot(self, graph, layer, idxs):
        s = self._states[layer]
        r = s.reading
        channels = sorted({i // r.repeat for i in idxs})
        s.pending["in"] = channels
        maps = r.maps(layer.weight)
        g, f = maps.shape[:2]
        gone = r.features_of(channels).to(maps.device)
        constants, lost, energy = [], 0.0, 0.0
        for j in range(g):
            local = gone[(gone >= j * f) & (gone < (j + 1) * f)] - j * f
            part = s.moments.of(torch.arange(j * f, (j + 1) * f)).folds
            maps[j], c, fit = without(maps[j], part, local, constant=self.constant and r.takes_constant, ridge=self.ridge)
            constants.append(c)
            lost += fit.lost
            energy += fit.energy
        layer.weight.copy_(r.weight(maps, layer.weight))
        _add_constant(graph, layer, torch.cat(constants))
        return Repair(self._names[layer], len(channels), lost / energy if energy else 0.0, fit.ridge)

    def _sequential(self, graph, reads):
        cur = {l: l for l in reads}
        sums = {}
        for l in reads:
            s = self._states[l]
            r = s.reading
            kept = torch.tensor([i for i in range(len(s.inputs)) if i not in set(s.pending["in"])])
            sums[l] = (r.features_of(kept), [])
        gen = torch.Generator().manual_seed(self.seed)
        acc = {}
        for inputs in self._batches():
            seeds = {l: int(torch.randint(2**40, (1,), generator=gen)) for l in reads}
            rows = {l: [] for l in reads}
            def rec(key, layer, x):
                r = self._states[layer].reading
                rows[layer].append(r.sampler(x.shape, self.max_positions, torch.Generator().manual_seed(seeds[layer]))(x).double())
            with watching({self._twins[l]: None for l in reads}, lambda tw, x: rec("o", self._back[tw], x)), evaluating(self._original):
                run_model(self._original, inputs)
            with watching({l: None for l in reads}, lambda l, x: rec("c", l, x)), evaluating(self.model):
                run_model(self.model, inputs)
            for l, pair in rows.items():
                x0, x1 = pair
                x1 = x1[:, sums[l][0]]
                z = torch.cat([x0, x1, x1.new_ones(len(x1), 1)], 1)
                if l not in acc:
                    acc[l] = torch.zeros(2, z.shape[1], z.shape[1], dtype=torch.float64)
                h = len(z) // 2
                acc[l][0] += z[:h].T @ z[:h]
                acc[l][1] += z[h:].T @ z[h:]
        for l, folds in acc.items():
            s, tw = self._states[l], self._twins[l]
            r = s.reading
            assert r.groups == 1
            maps0 = r.maps(tw.weight)[0][:, s.outputs]
            n0 = len(maps0)
            w = maps0.flatten(1)
            fit = fit_linear(folds[:, n0:, n0:], folds[:, :n0, n0:], folds[:, :n0, :n0], w @ w.T,
                             constant=self.constant and r.takes_constant, ridge=self.ridge)
            maps = torch.zeros_like(r.maps(l.weight))
            maps[0, sums[l][0]] = torch.einsum("tk,top->kop", fit.coefficients, maps0)
            l.weight.copy_(r.weight(maps, l.weight))
            beta = torch.einsum("t,top->o", fit.constant, maps0)
            bn = _norm_behind(graph, l)
            if l.bias is None and bn is not None:
                bn0 = self._twins[bn]
                bn.running_mean.copy_(bn0.running_mean[s.outputs] - beta)
                bn.running_var.copy_(bn0.running_var[s.outputs])
            else:
                if l.bias is None:
                    l.bias = nn.Parameter(l.weight.new_zeros(len(beta)))
                b0 = tw.bias[s.outputs] if tw.bias is not None else 0
                l.bias.copy_(b0 + beta)

    @property
    def _back(self):
        return {v: k for k, v in self._twins.items()}


def _repeat(member):
    rows, ch = member.rows, member.channels
    if not isinstance(member.layer, nn.Linear) or len(rows) != member.n_channels:
        return 1
    counts = torch.bincount(ch)
    q = int(counts[0])
    if (counts == q).all() and torch.equal(ch.sort().values, ch) and q > 1:
        return q
    return 1


@contextmanager
def watching(layers, record):
    hs = []
    try:
        for l in layers:
            hs.append(l.register_forward_pre_hook(lambda m, a: record(m, a[0])))
        yield
    finally:
        for h in hs:
            h.remove()


def _norm_behind(graph, layer):
    node = graph.module2node[layer]
    if len(node.outputs) == 1 and isinstance(node.outputs[0].module, _BatchNorm):
        norm = node.outputs[0]
        if len(norm.inputs) == 1 and norm.module.running_mean is not None:
            return norm.module
    return None


def _add_constant(graph, layer, constant):
    bn = _norm_behind(graph, layer)
    if layer.bias is None and bn is not None:
        bn.running_mean.sub_(constant.to(bn.running_mean.dtype))
        return
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(constant)))
    layer.bias.add_(constant.to(layer.bias.dtype))
