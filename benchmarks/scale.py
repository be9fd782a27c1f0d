"""Cost of a thousand classes, wide layers and much data.

    python -m benchmarks.scale collect     # statistics of a ResNet-50, against a plain forward pass
    python -m benchmarks.scale select      # selection in all of its groups, from all class pairs and from a sample
    python -m benchmarks.scale medoids     # k-medoids for all k, against FasterPAM and scikit-learn-extra's PAM
    python -m benchmarks.scale growth      # exponents in classes, channels and samples
    python -m benchmarks.scale profile     # profile of a selection

Each prints Markdown. Times that are compared are taken in turns in one run.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.selection import latent
from benchmarks.selection import timed as by_processor
from tp_cosep import ClassMoments, CoSePSelector, ReconstructionSelector, Selector
from tp_cosep.cli.torchvision_shim import import_torchvision
from tp_cosep.functional.kmedoids import KMedoids, k_medoids_path
from tp_cosep.functional.selection import ChannelSelection, select_channels
from tp_cosep.functional.separability import distances_from_gram, profile_gram

torchvision = import_torchvision()

import torch_pruning as tp  # noqa: E402 -- after torchvision

T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """A result and its time in seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def peak_mib() -> float:
    """Peak memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# ---- collect


def collect(size: int, batch: int, n_batches: int, name: str) -> None:
    """Time of collecting statistics against that of a plain forward pass of the same batch, taken in turns."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    images = torch.randn(batch, 3, size, size)
    print(f"{name}, batches of {batch} at {size}², 1000 classes, {torch.get_num_threads()} threads\n")
    print("| statistics | batch / forward, median | least … most | before the first batch, in forwards |")
    print("| --- | --- | --- | --- |")
    budget = {"memory_budget": 2**36}
    selectors: dict[str, Selector] = {
        "class moments, `CoSePSelector(spatial=1)`": CoSePSelector(spatial=1, **budget),
        "class moments, `CoSePSelector()` (4 × 4 cells)": CoSePSelector(**budget),
        "second moments, `ReconstructionSelector(class_weight=0)`": ReconstructionSelector(class_weight=0, **budget),
        "second moments and class means, `ReconstructionSelector()`": ReconstructionSelector(**budget),
    }
    for what, selector in selectors.items():
        ratios, first = _ratios(model, images, n_batches, selector)
        print(
            f"| {what} | {statistics.median(ratios):.2f} | {min(ratios):.2f} … {max(ratios):.2f} | {first:.1f} |",
            flush=True,
        )


def _ratios(model: nn.Module, images: Tensor, n_batches: int, selector: Selector) -> tuple[list[float], float]:
    """Quotients of all batches but the first, and what the first takes beyond them, in forward passes."""
    plain: list[float] = []
    measured: list[float] = []

    @torch.no_grad()
    def forward() -> Tensor:
        out: Tensor = model(images)
        return out

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(n_batches):
            plain.append(timed(forward)[1])
            start = time.perf_counter()
            yield images, torch.randint(1000, (len(images),), generator=generator)
            measured.append(time.perf_counter() - start)

    forward()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fit: ")  # classes seen only once, few samples
        selector.fit(model, loader(), rare_classes="drop", progress=False)
    ratios = [m / p for m, p in zip(measured, plain, strict=True)]
    return ratios[1:], measured[0] / plain[0] - statistics.median(ratios[1:])


# ---- select


def class_moments(n_classes: int, n_components: int, seed: int) -> ClassMoments:
    """Moments like those of a trained layer: class means of low rank plus noise, log-normal variances."""
    g = torch.Generator().manual_seed(seed)
    rank = max(8, n_components // 8)
    causes = torch.randn(n_classes, rank, generator=g, dtype=torch.float64)
    mixing = torch.randn(rank, n_components, generator=g, dtype=torch.float64) / rank**0.5
    strength = torch.rand(n_components, generator=g, dtype=torch.float64).log().neg()
    mean = strength * (causes @ mixing) + 0.05 * torch.randn(n_classes, n_components, generator=g, dtype=torch.float64)
    var = (0.3 * torch.randn(n_classes, n_components, generator=g, dtype=torch.float64)).exp()
    count = torch.full((n_classes,), 50)
    return ClassMoments(torch.arange(n_classes), count, mean[..., None], 50 * var[..., None])


def select(name: str, n_classes: int, n_pairs: int) -> None:
    """Time and memory of selections from all class pairs and from a sample, and how well the two agree."""
    model = torchvision.models.get_model(name).eval()
    example = torch.randn(1, 3, 224, 224)
    widths = {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    moments = {n: class_moments(n_classes, width, i) for i, (n, width) in enumerate(widths.items())}
    graph = tp.DependencyGraph().build_dependency(model, example)
    groups = list(graph.get_all_groups(ignored_layers=[model.fc]))
    before = peak_mib()
    found: dict[str, tuple[list[ChannelSelection | None], float]] = {}
    for what, options in {
        f"{n_pairs:,} pairs": {"max_class_pairs": n_pairs},
        "all pairs": {},
    }.items():
        selector = CoSePSelector(spatial=1, **options)
        selector.statistics.moments = moments
        used = time.process_time()
        found[what] = timed(lambda s=selector: [s.select(group) for group in groups])  # type: ignore[misc]
        used = time.process_time() - used
        print(
            f"{what}: {found[what][1]:.0f} s, {used:.0f} s of processors, {peak_mib() - before:.0f} MiB above the "
            f"moments, relative standard error at most {max(selector.sampling_errors.values(), default=0):.3f}",
            flush=True,
        )
    exact = found.pop("all pairs")[0]
    print(f"\n{name}, {len(groups)} groups, {n_classes} classes, {torch.get_num_threads()} threads\n")
    print("| | k, largest relative difference | kept channels shared, all | least of a group |")
    print("| --- | --- | --- | --- |")
    for what, (selections, _) in found.items():
        pairs = [(a, b) for a, b in zip(exact, selections, strict=True) if a is not None and b is not None]
        shared = [len({*a.keep_idxs} & {*b.keep_idxs}) / len(a.keep_idxs) for a, b in pairs]
        total = sum(s * len(a.keep_idxs) for s, (a, _) in zip(shared, pairs, strict=True))
        total /= sum(len(a.keep_idxs) for a, _ in pairs)
        worst = max(abs(a.k - b.k) / a.k for a, b in pairs)
        print(f"| {what} | {worst:.3f} | {total:.3f} | {min(shared):.3f} |", flush=True)


# ---- medoids


def medoids(largest: int) -> None:
    """k-medoids for all k, against other packages on the same matrices."""
    import kmedoids

    print("| n | other | ours, processor s | other's | other / ours | mean TD, ours / other's | worst |")
    print("| --- | --- | --- | --- | --- | --- | --- |")

    def report(n: int, what: str, d: Tensor, other: Callable[[], list[float]]) -> None:
        (ours, seconds), (theirs, other_seconds) = by_processor(lambda: k_medoids_path(d), 3), by_processor(other, 1)
        ratios = [a.total_deviation / b for a, b in zip(ours, theirs, strict=True) if b > 0]
        mean = sum(a.total_deviation for a in ours) / sum(theirs)
        print(
            f"| {n} | {what} | {seconds:.2f} | {other_seconds:.2f} | {other_seconds / seconds:.1f} | {mean:.5f} | "
            f"{max(ratios):.5f} |",
            flush=True,
        )

    for n in (256, 512):
        d = latent(n)
        array = d.numpy()
        report(
            n,
            "kmedoids.fasterpam, random start",
            d,
            lambda a=array, n=n: [kmedoids.fasterpam(a, k, random_state=0).loss for k in range(2, n + 1)],  # type: ignore
        )
    try:
        import sklearn_extra  # noqa: F401 -- whether it is installed
    except ImportError:
        print("\nscikit-learn-extra is not installed here (it needs Python < 3.12 and numpy < 2).")
    else:
        d = latent(256)

        def pam() -> list[float]:
            solutions: list[KMedoids] = k_medoids_path(d, backend="sklearn-extra")
            return [s.total_deviation for s in solutions]

        report(256, "scikit-learn-extra, PAM", d, pam)
    d = latent(largest)
    selection, seconds = by_processor(lambda: select_channels(d), 1)
    print(f"\nAutomatic selection for n = {largest}: {seconds:.1f} s of a processor, k = {selection.k}.")


# ---- growth


def exponent(xs: list[float], ys: list[float]) -> float:
    """Slope of a straight line through the logarithms."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (xs, ys))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def growth() -> None:
    """Fitted exponents of each part of a selection."""
    print("| of | in | sizes | processor s | exponent | in theory |")
    print("| --- | --- | --- | --- | --- | --- |")

    def row(of: str, variable: str, sizes: list[int], call: Callable[[int], object], theory: str) -> None:
        call(sizes[0])
        seconds = [by_processor(lambda n=n: call(n), 2)[1] for n in sizes]  # type: ignore[misc]
        times = ", ".join(f"{s:.3g}" for s in seconds)
        fitted = exponent([*map(float, sizes)], seconds)
        print(f"| {of} | {variable} | {', '.join(map(str, sizes))} | {times} | {fitted:.2f} | {theory} |", flush=True)

    by_class = {c: class_moments(c, 256, 0) for c in (10, 32, 100, 316, 1000)}
    row("distances, 256 channels", "classes", [*by_class], lambda c: profile_gram(by_class[c]), "2")
    by_width = {n: class_moments(100, n, 0) for n in (64, 128, 256, 512, 1024, 2048)}
    row("distances, 100 classes", "channels", [*by_width], lambda n: profile_gram(by_width[n]), "1 … 2")
    distances = {n: distances_from_gram(profile_gram(m)) for n, m in by_width.items()}
    row("selection, automatic", "channels", [*by_width], lambda n: select_channels(distances[n]), "2 (per k tried)")
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4096, 64, 16, generator=g), torch.randint(100, (4096,), generator=g)

    def measure(n: int) -> None:
        moments = ClassMoments()
        for start in range(0, n, 64):
            moments.update(x[start : start + 64], y[start : start + 64])

    row("class moments, 100 classes, 64 channels", "samples", [256, 512, 1024, 2048, 4096], measure, "1")


def profile() -> None:
    """Profiles of the distances and of a selection."""
    moments, distances = class_moments(1000, 512, 0), latent(1024)
    for what, call in {
        "distances, 512 channels, 1000 classes": lambda: profile_gram(moments),
        "selection, automatic, 1024 channels": lambda: select_channels(distances),
    }.items():
        profiler = cProfile.Profile()
        profiler.runcall(call)
        print(f"\n{what}\n")
        pstats.Stats(profiler).sort_stats("tottime").print_stats(10)


def main() -> None:
    """Run the requested part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collect", "select", "medoids", "growth", "profile"))
    parser.add_argument("--network", default="resnet50", help="of torchvision (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="of the images (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--classes", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=20_000, help="in the sample (default: %(default)s)")
    parser.add_argument("--largest", type=int, default=2048, help="points (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "collect":
        collect(options.size, options.batch, options.batches, options.network)
    elif options.what == "select":
        select(options.network, options.classes, options.pairs)
    elif options.what == "medoids":
        medoids(options.largest)
    elif options.what == "growth":
        growth()
    else:
        profile()


if __name__ == "__main__":
    main()
