"""The matrix of architectures: pruned and skipped groups of each family, and the cost of selection.

    python benchmarks/architectures.py run [PATTERN ...]   # e.g. 'timm:*vit*'; writes benchmarks/architectures.json
    python benchmarks/architectures.py table               # docs/architectures.md from that file

Every family runs in a process of its own, with a time limit. A run continues an earlier one; patterns run families
again. The families and their inputs are in tests/architectures.py, the checks in
tests/matrix.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401 -- makes torchvision usable before torch_pruning is imported
import torch  # noqa: E402
import torch_pruning as tp  # noqa: E402
from architectures import ARCHITECTURES, Architecture  # noqa: E402
from matrix import check, fit, prune  # noqa: E402

from tp_cosep import attention_heads  # noqa: E402

RECORDS = ROOT / "benchmarks" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
LIMIT = 600
#: Causes of failures in Torch-Pruning 1.6.1 with torch 2.13.
CAUSES = [
    "- *More channels than the layer has; shapes that do not fit; group building without end; division by zero",
    "  while tracing:* the reshape rule asks a view for `_saved_self_sizes`, which torch calls",
    "  `_saved_self_sym_sizes`; so its check of the number of dimensions never runs, any view may be taken for a",
    "  flattening, and channels are multiplied on every pass. The offsets of `chunk` use an outdated attribute, too.",
    "- *More channels than the layer has* also where something with one channel, or one entry per head or token, is",
    "  multiplied onto all channels: elementwise operations are taken to join equal channels.",
    "- *Division by zero while grouping:* every expansion of a 5-d tensor is taken for grouped-query attention.",
    "- *split_with_sizes, view and shape errors in the model's own code:* sizes written down at construction;",
    "  `adapt=` can correct them where the code reads them from an attribute.",
    "- *weight should contain n elements:* parameters inside subclasses of convolutions are taken to be handled.",
    "- *Layers that are not reached:* code that calls `F.linear` with a module's weight hides it from the trace.",
]


def record(architecture: Architecture) -> dict[str, Any]:
    """Prune a family automatically and at 50 %, check both, and time selection against a stock pruner."""
    model, selector, x = fit(architecture)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for name, ratio in (("automatic", None), ("half", 0.5)):
        outcome = prune(architecture, model, selector, x, ratio)
        check(outcome)
        pruned, all_of_it = outcome.n_parameters
        result[name] = {"pruned": outcome.n_pruned, "left": outcome.left, "share": round(pruned / all_of_it, 3)}
    result["seconds"] = timed(architecture, model, selector, x)
    return result


def timed(architecture: Architecture, model: Any, selector: Any, x: torch.Tensor) -> dict[str, float] | None:
    """CPU time in seconds of a stock pruner that prunes half, with random scores and with a selector."""

    def stock(importance: Any) -> float:
        net = copy.deepcopy(model)
        begin = time.process_time()
        tp.pruner.BasePruner(
            net,
            x[:1],
            importance,
            pruning_ratio=0.5,
            ignored_layers=[*architecture.ignored_layers(net), *heads_of_model(net)],
            num_heads=attention_heads(net),
            in_channel_groups={},
            out_channel_groups={},
        ).step()
        return time.process_time() - begin

    try:
        without = stock(tp.importance.RandomImportance())
        return {"without": round(without, 3), "with": round(stock(selector), 3)}
    except Exception as error:  # no comparison where the stock pruner fails
        print(f"  stock pruner: {type(error).__name__}: {error}")
        return None


def heads_of_model(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The classifiers: layers as wide as there are classes."""
    return [m for m in model.modules() if getattr(m, "out_features", getattr(m, "out_channels", None)) == 7]


def run(patterns: list[str]) -> None:
    """Run the families that match, or those without a record."""
    for architecture in ARCHITECTURES:
        key, records = architecture.key, load()
        is_due = any(fnmatch(key, p) for p in patterns) if patterns else key not in records
        if not is_due or architecture.unprunable:
            continue
        print(key, flush=True)
        command = [sys.executable, __file__, "one", key]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
            records = {**load(), key: json.loads(done.stdout.splitlines()[-1])}
        except subprocess.TimeoutExpired:
            print(f"  not finished within {LIMIT} s")
            continue
        except subprocess.CalledProcessError as error:
            print("  " + "\n  ".join(error.stderr.splitlines()[-3:]))
            continue
        RECORDS.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load() -> dict[str, Any]:
    """The existing records."""
    records: dict[str, Any] = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}
    return records


def table() -> str:
    """The page, from the records."""
    records = load()
    known = [(a, records[a.key]) for a in ARCHITECTURES if a.key in records]
    whole = [a for a, r in known if not r["half"]["left"] and not a.ignored]
    ratios = sorted(r["seconds"]["with"] / r["seconds"]["without"] - 1 for _, r in known if r["seconds"])
    lines = [
        "# Architectures",
        "",
        "<!-- generated by benchmarks/architectures.py -->",
        "",
        f"{len(known)} families of torchvision and timm, one small member of each with random weights and small",
        "inputs (large ones with fewer equal blocks in a row), were measured on eight samples and pruned",
        'automatically and at 50 %, with `on_failure="skip"` and `CoSePSelector(weights=None)`.',
        "In every row it was checked that exactly the selected channels were",
        "removed from each layer of each pruned group, that the model runs forward and backward afterwards, and that",
        "the plan, applied to a fresh copy, gives bit-equal weights.",
        "",
        f"- **{len(whole)}** are pruned in all their groups.",
        f"- **{len(known) - len(whole)}** are pruned but for some groups, named below with the reason.",
        f"- **{sum(a.unprunable is not None for a in ARCHITECTURES)}** cannot be pruned at all.",
        "",
        "Selection adds to the CPU time of the stock pruner, which traces and prunes half of the same model. Over",
        f"the {len(ratios)} families that the stock pruner can prune too, the ratio is",
        f"{statistics.median(ratios):.1f} in the median, {ratios[len(ratios) // 10]:.1f} and",
        f"{ratios[-len(ratios) // 10]:.1f} at the outer tenths. (Inputs are tiny here, so tracing is quick; the aim is",
        "1.)",
        "",
        "`python benchmarks/architectures.py run` makes the records, `… table` this page.",
        "",
        "| family | input | parameters | left at 50 % | groups pruned | groups left alone | time ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for a, r in known:
        half, seconds = r["half"], r["seconds"]
        ratio = f"{seconds['with'] / seconds['without'] - 1:.2f}" if seconds else "–"
        n_left = len(half["left"]) or ""
        note = " (some layers ignored)" if a.ignored else ""
        sizes = f"{a.size} | {r['parameters'] / 1e6:.1f} M | {half['share']:.0%}"
        lines.append(f"| {a.key}{note} | {sizes} | {half['pruned']} | {n_left} | {ratio} |")
    lines += ["", "## Groups left alone, and why", ""]
    for a, r in known:
        if a.ignored:
            patterns = ", ".join(f"`{p}`" for p in a.ignored)
            lines.append(f"- **{a.key}**: in `ignored_layers` are {patterns}: {a.cause}.")
        for reason, n in Counter(short(reason) for reason in r["half"]["left"].values()).most_common():
            lines.append(f"- **{a.key}**: {n} group{'s' * (n > 1)}: {reason}")
    lines += ["", "## Causes upstream", "", *CAUSES]
    lines += ["", "## Families that cannot be pruned", ""]
    lines += [f"- **{a.key}**: {a.unprunable}." for a in ARCHITECTURES if a.unprunable]
    return "\n".join(lines) + "\n"


def short(reason: str) -> str:
    """A reason without names of layers and advice, so that equal ones are counted together."""
    reason = reason.replace("\n", " ").removeprefix("cannot be pruned: ")
    if reason.startswith("layer '") and "': " in reason:
        reason = reason.split("': ", 1)[1]
    for advice in ("; put one of them", "; the model is as it was", "; put it into"):
        reason = reason.split(advice)[0]
    return re.sub(r"\b\d+(\.\d+)?\b", "n", reason[:220])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "one"])
    parser.add_argument("patterns", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if args.what == "run":
        run(args.patterns)
    elif args.what == "table":
        PAGE.write_text(table(), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    else:
        print(json.dumps(record(next(a for a in ARCHITECTURES if a.key == args.patterns[0]))))


if __name__ == "__main__":
    main()
