"""The options of the commands, on the command line and in a file. Imports nothing slow."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tp_cosep._version import __version__
from tp_cosep.cli.values import any_number, count, number, pair, part, positive, share, target, whole

__all__ = ["DATA_KINDS", "EXAMPLES", "SELECTOR_OPTIONS", "contradiction", "parser"]

#: Shown by ``--help``; one command per line.
EXAMPLES = {
    "prune": """\
tp-cosep prune --model torchvision:resnet18 --model-args num_classes=4 --weights resnet.safetensors \
--data imagefolder:photos --input-size 64 --target macs=0.5 --epochs 5 --output pruned
tp-cosep prune --model my_project:make_net --weights net.pt --data my_project:make_loaders --output pruned
tp-cosep prune --config prune.toml --target params=0.3
torchrun --nproc-per-node 2 -m tp_cosep prune --config prune.toml""",
    "preview": """\
tp-cosep preview --model my_project:make_net --weights net.pt --data my_project:make_loaders \
--targets macs=0.75 macs=0.5 macs=0.25""",
    "report": """\
tp-cosep report pruned
tp-cosep report pruned/plan.json --html report.html""",
    "apply": """\
tp-cosep apply pruned/plan.json --model my_project:make_net --weights net.pt --output applied""",
    "export": """\
tp-cosep export pruned --model my_project:make_net --format onnx --output net.onnx
tp-cosep export pruned --model my_project:make_net --format torch-export --output net.pt2""",
    "demo": "tp-cosep demo",
}
_MODEL = (
    "torchvision:NAME, timm:NAME, hf:FOLDER (of AutoModelForImageClassification, safetensors), or MODULE:FUNCTION, a "
    "function of yours that returns the model; nothing is downloaded without --pretrained"
)
#: The options that each selector has; the others of the group are common to all.
SELECTOR_OPTIONS = {
    "reconstruction": ("class_weight", "knee", "spatial", "memory_budget"),
    "cosep": ("metric", "observe", "representative", "knee", "spatial", "max_class_pairs", "memory_budget"),
    "published": ("spatial", "max_class_pairs", "memory_budget"),
    "attention": ("knee", "scope"),
}
#: Kinds of image data; any other name is a function of the user's.
DATA_KINDS = ("imagefolder", "hf-dataset", "cifar10", "cifar100", "fashion-mnist")
_DATA = (
    "imagefolder:FOLDER (with train and val inside, or one folder of classes), hf-dataset:FOLDER (of "
    "datasets.save_to_disk), cifar10:FOLDER, cifar100:FOLDER, fashion-mnist:FOLDER, or MODULE:FUNCTION, a function of "
    "yours that returns a training and a test loader"
)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="tp-cosep",
        description="Structured pruning with complementary channels, for Torch-Pruning.",
        epilog="Exit codes: 0 done, 1 failed (with one line that says why), 2 wrong usage, 130 interrupted.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"tp-cosep {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, about, add in (
        ("prune", "prune a model, compensate for the pruned channels, and fine-tune it", _prune),
        ("preview", "show how many channels targets would keep, without pruning", _preview),
        ("report", "show a plan", _report),
        ("apply", "prune another copy of a model by a plan", _apply),
        ("export", "write a pruned model as ONNX or by torch.export, and check its outputs", _export),
        ("demo", "train, prune and fine-tune a small network, and compare it with the unpruned one", _demo),
    ):
        command = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog="examples:\n  " + EXAMPLES[name].replace("\n", "\n  "),
            formatter_class=_Help,
            allow_abbrev=False,
        )
        command.set_defaults(run=f"tp_cosep.cli.{name}")
        add(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def contradiction(options: argparse.Namespace, command: argparse.ArgumentParser) -> str | None:
    """The first contradiction between options that are valid one by one.

    Args:
        options: The parsed options.
        command: The parser of the command.

    Returns:
        The error message; ``None`` if there is no contradiction.
    """
    given = {name for name, value in vars(options).items() if value != command.get_default(name)}
    if {"target", "pruning_ratio"} <= given:
        return "--pruning-ratio: not together with --target, which decides how much every layer keeps"
    if "selector" in vars(options) and (wrong := _not_of_selector(options.selector, given)):
        return wrong
    if "data" in given:
        is_own = options.data.partition(":")[0] not in DATA_KINDS
        meaningless = {"input_size", "mean", "std", "download", "test_share", "batch_size", "workers"}
        for name in sorted(given & (meaningless if is_own else {"data_args"})):
            kind = "a function of yours decides that" if is_own else "only for a function of yours"
            return f"{_flag(name)}: not with --data {options.data}; {kind}"
    return None


def _not_of_selector(selector: str, given: set[str]) -> str | None:
    for name in sorted(given - {*SELECTOR_OPTIONS[selector]}):
        having = [other for other, names in SELECTOR_OPTIONS.items() if name in names]
        if having:
            return f"{_flag(name)}: not with --selector {selector}; it is an option of {', '.join(having)}"
    if selector == "attention" and (of_channels := given & {"target", "round_to"}):
        return f"{_flag(min(of_channels))}: not with --selector attention, which selects heads; use --pruning-ratio"
    return None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class _Help(argparse.HelpFormatter):
    """Wraps all text but the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


def _prune(command: argparse.ArgumentParser) -> None:
    _config(command)
    _model(command)
    _data(command)
    _pruning(command, [*SELECTOR_OPTIONS])
    group = command.add_argument_group("how much")
    group.add_argument(
        "--target",
        type=target,
        metavar="UNIT=VALUE",
        help="macs=0.5, params=2e6 or latency=0.5: below 1 a share of the model, above the number itself (milliseconds "
        "for one sample); 'none' (default) keeps the number at the knee of every layer's curve",
    )
    group.add_argument(
        "--pruning-ratio",
        type=share,
        metavar="SHARE",
        help="prune this share of every layer (of its heads with --selector attention), in place of a target",
    )
    group = command.add_argument_group("compensation")
    group.add_argument(
        "--compensate",
        choices=("off", "one-shot", "sequential"),
        default="one-shot",
        help="refit the downstream layers (default: %(default)s; sequential is slower, and better for deep residual "
        "networks and LayerNorm)",
    )
    group.add_argument(
        "--recalibrate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="re-estimate BatchNorm statistics (default: yes)",
    )
    group = command.add_argument_group("fine-tuning, through Accelerate")
    group.add_argument("--epochs", type=whole, default=0, metavar="N", help="after pruning (default: 0)")
    group.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="default: %(default)s")
    group.add_argument("--learning-rate", type=positive, default=0.01, metavar="X", help="default: %(default)s")
    group.add_argument("--weight-decay", type=number, default=1e-4, metavar="X", help="default: %(default)s")
    group.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no", help="default: %(default)s")
    group.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="random crops and flips of images, but not of fashion-mnist or of your own loaders (default: yes)",
    )
    group.add_argument(
        "--layerwise",
        action="store_true",
        help="the papers' schedule: group by group, with statistics collected again and fine-tuning in between; if it "
        "is interrupted, pruning starts over",
    )
    group.add_argument(
        "--layerwise-epochs", type=whole, default=1, metavar="N", help="after every group (default: %(default)s)"
    )
    group = command.add_argument_group("the run")
    group.add_argument("--output", required=True, metavar="FOLDER", help="where the pruned model is written")
    group.add_argument(
        "--restart",
        action="store_true",
        help="start over in a folder that holds a run, and replace it; without it the same command continues an "
        "unfinished run",
    )
    group.add_argument("--dry-run", action="store_true", help="print what the run would do, and exit")


def _preview(command: argparse.ArgumentParser) -> None:
    _config(command)
    _model(command)
    _data(command)
    _pruning(command, [name for name in SELECTOR_OPTIONS if name != "attention"])
    command.add_argument(
        "--targets",
        type=target,
        nargs="+",
        default=[("macs", 0.75), ("macs", 0.5), ("macs", 0.25), None],
        metavar="UNIT=VALUE",
        help="targets like macs=0.5, params=2e6 or latency=0.5; 'none' for the knee of every layer (default: macs=0.75 "
        "macs=0.5 macs=0.25 none)",
    )


def _report(command: argparse.ArgumentParser) -> None:
    command.add_argument("plan", type=Path, metavar="PLAN", help="a plan, or a folder with plan.json")
    command.add_argument("--html", type=Path, metavar="FILE", help="write an HTML page with the curves, too")


def _apply(command: argparse.ArgumentParser) -> None:
    command.add_argument("plan", type=Path, metavar="PLAN", help="a plan, or a folder with plan.json")
    _model(command)
    command.add_argument("--output", required=True, metavar="FOLDER", help="where the pruned model is written")
    command.add_argument("--overwrite", action="store_true", help="replace an existing model")


def _export(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of a pruned model")
    _model_name(command)
    command.add_argument("--format", choices=("onnx", "torch-export"), default="onnx", help="default: %(default)s")
    command.add_argument("--output", required=True, type=Path, metavar="FILE", help="the file to write")
    command.add_argument("--opset", type=whole, metavar="N", help="ONNX opset (default: torch's)")
    command.add_argument(
        "--tolerance",
        type=positive,
        default=1e-4,
        metavar="X",
        help="largest allowed difference between outputs, relative to the largest output (default: %(default)s)",
    )


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data",
        choices=("digits", "fashion-mnist"),
        default="digits",
        help="digits (default, seconds) or fashion-mnist (minutes)",
    )
    command.add_argument(
        "--output",
        metavar="FOLDER",
        default="tp_cosep_demo",
        help="where model, plan and plots are written (default: %(default)s)",
    )
    command.add_argument("--seed", type=whole, default=0, metavar="N", help="seed of weights and data (default: 0)")
    command.add_argument("--epochs", type=whole, metavar="N", help="epochs of training")
    command.add_argument("--fine-tune-epochs", type=whole, metavar="N", help="epochs of fine-tuning")
    command.add_argument("--threads", type=whole, metavar="N", help="threads of torch")


def _config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="options in TOML or YAML, named like the flags without dashes; the command line has precedence",
    )


def _model_name(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = command.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="WHICH", help=_MODEL)
    group.add_argument(
        "--model-args",
        type=pair,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments: num_classes=10",
    )
    return group


def _model(command: argparse.ArgumentParser) -> None:
    group = _model_name(command)
    group.add_argument("--weights", type=Path, metavar="FILE", help="a state_dict: .safetensors, or .pt and .pth")
    group.add_argument(
        "--allow-pickle",
        type=Path,
        metavar="FILE",
        help="unpickle this weights file in full, which runs any code in it; only for files that you trust",
    )
    group.add_argument(
        "--pretrained", action="store_true", help="let torchvision or timm download their published weights"
    )


def _data(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("data")
    group.add_argument("--data", required=True, metavar="WHICH", help=_DATA)
    group.add_argument("--data-args", type=pair, nargs="+", default=[], metavar="NAME=VALUE", help="of your function")
    group.add_argument("--download", action="store_true", help="let torchvision download the data set")
    group.add_argument("--input-size", type=count, metavar="PIXELS", help="default: the model's")
    group.add_argument(
        "--mean", type=any_number, nargs="+", metavar="X", help="mean for normalisation by channel, in [0, 1]"
    )
    group.add_argument(
        "--std", type=positive, nargs="+", metavar="X", help="standard deviation (default: by model and data set)"
    )
    group.add_argument(
        "--test-share",
        type=share,
        default=0.2,
        metavar="SHARE",
        help="of data without a test part (default: 0.2)",
    )
    group.add_argument(
        "--calibration",
        type=count,
        default=2000,
        metavar="N",
        help="samples for statistics (default: 2000)",
    )
    group.add_argument(
        "--batch-size",
        type=count,
        default=64,
        metavar="N",
        help="of each process (default: 64)",
    )
    group.add_argument("--workers", type=whole, default=0, metavar="N", help="processes that load data (default: 0)")


def _pruning(command: argparse.ArgumentParser, selectors: Sequence[str]) -> None:
    group = command.add_argument_group("selection", "In brackets: the selectors that have an option.")
    about = {
        "reconstruction": "by what refitted consumers lose",
        "cosep": "medoids in separability space",
        "published": "CoSeP as published",
        "attention": "whole heads, by their attention maps",
    }
    group.add_argument(
        "--selector",
        choices=selectors,
        default="reconstruction",
        help="; ".join(f"{name}: {about[name]}" for name in selectors) + " (default: %(default)s)",
    )

    def add(name: str, text: str, **options: Any) -> None:
        having = [selector for selector in selectors if name in SELECTOR_OPTIONS[selector]]
        if having:
            group.add_argument(_flag(name), help=f"{text} [{', '.join(having)}]", **options)

    add("class_weight", "weight of class means (default: 3)", type=number, metavar="X")
    add("metric", "distance between classes (default: jm)", choices=("jm", "hellinger", "wasserstein"))
    add(
        "representative",
        "the kept member of a cluster (default: medoid)",
        choices=("medoid", "max_norm", "reconstruction"),
    )
    add("observe", "tensors of a layer to observe (default: outputs)", choices=("outputs", "inputs"))
    add("knee", "how a curve gives a count (default: guarded)", choices=("guarded", "strongest", "first"))
    add("scope", "select heads in every layer or over the model (default: layer)", choices=("layer", "model"))
    add("spatial", "cells per dimension of pooled maps (default: 4; published: all)", type=count, metavar="N")
    add("max_class_pairs", "size of a sample of class pairs (default: all)", type=count, metavar="N")
    add("memory_budget", "memory for statistics (default: 4)", type=positive, metavar="GIB")
    group.add_argument(
        "--labels", choices=("given", "predicted"), default="given", help="classes of samples (default: %(default)s)"
    )
    group.add_argument(
        "--rare-classes",
        choices=("error", "drop"),
        default="error",
        help="what to do about classes with a single sample (default: %(default)s)",
    )
    group.add_argument(
        "--max-pruning-ratio", type=part, default=1.0, metavar="SHARE", help="largest share to prune of any layer"
    )
    group.add_argument("--round-to", type=count, metavar="N", help="keep multiples of this number")
    group.add_argument("--ignored-layers", nargs="+", default=[], metavar="NAME", help="layers to leave as they are")
    group.add_argument(
        "--on-failure",
        choices=("raise", "skip"),
        default="raise",
        help="what to do about a group that cannot be pruned (default: %(default)s)",
    )
    group.add_argument("--seed", type=whole, default=0, metavar="N", help="default: 0")
    group.add_argument("--device", choices=("auto", "cpu"), default="auto", help="default: %(default)s")
