"""``tp-cosep prune``: fit, prune, compensate, fine-tune, save; an interrupted run is continued."""

from __future__ import annotations

import argparse
import json
import shutil
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from tp_cosep.calibration.io import fingerprint
from tp_cosep.cli.console import check_free
from tp_cosep.cli.finetune import Training, accuracy, fine_tune
from tp_cosep.cli.processes import Processes, processes
from tp_cosep.cli.setup import Subject, fit_options, fitted, prepare, pruner_options, selector_of
from tp_cosep.errors import InputError
from tp_cosep.graph.structure import versions
from tp_cosep.pruning import saving
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.pruning.pruner import CoSePPruner
from tp_cosep.report.benchmark import ModelStats, measure_models
from tp_cosep.report.tables import layer_table, model_rows, model_table
from tp_cosep.utils.distributed import agreed
from tp_cosep.utils.files import replacing

__all__ = ["REPORT", "SUMMARY", "run"]

REPORT, SUMMARY = "report.html", "summary.json"
_FORMAT, _VERSION = "tp_cosep.run", 1
# Options that do not change the result.
_NOT_COMPARED = (
    "command",
    "run",
    "config",
    "output",
    "restart",
    "dry_run",
    "debug",
    "workers",
    "allow_pickle",
    "download",
)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    with processes(options) as together:
        _Run(options, together).go()


class _Run:
    """A run, and its state in the folder ``unfinished`` of its output.

    ``run.json`` holds the options, the model's fingerprint and accuracies; ``moments.safetensors`` the statistics;
    ``pruned`` the pruned model; ``fine-tuning.safetensors`` the state after the last epoch of fine-tuning.
    """

    def __init__(self, options: argparse.Namespace, processes: Processes) -> None:
        self.options, self.processes = options, processes
        self.output = Path(options.output)
        self.unfinished = self.output / "unfinished"
        self.accuracies: dict[str, float] = {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The options that determine the result, as they are read back from JSON."""
        chosen = {key: value for key, value in vars(self.options).items() if key not in _NOT_COMPARED}
        found: dict[str, Any] = json.loads(json.dumps(chosen, default=str))
        return found

    def go(self) -> None:
        """Do what the run has not done yet."""
        options, say = self.options, self.processes.say
        subject = prepare(options, self.processes)
        model_id = fingerprint(subject.model)
        goes_on = agreed(lambda: self._goes_on(model_id))
        if options.dry_run:
            self._describe(goes_on)
            return
        self._begin(model_id, goes_on=goes_on)
        if goes_on:
            say(f"continuing the run in {self.output}")
        self._measure_accuracy("unpruned", subject.model, subject)
        pruned, plan = self._pruned(subject)
        models = {"unpruned": subject.model, "compensated" if self._refits else "pruned": deepcopy(pruned)}
        if options.epochs:
            say(f"fine-tuning for {options.epochs} epochs")
            kept = self.unfinished / "fine-tuning.safetensors"
            fine_tune(pruned, subject.data, self._training(options.epochs, 0), self.processes, kept=kept)
            models["fine-tuned"] = pruned
            self._measure_accuracy("fine-tuned", pruned, subject)
        if self.processes.is_first:
            self._save(pruned, plan, models, subject)
        self.processes.wait()

    @property
    def _refits(self) -> bool:
        """Whether the kept weights or BatchNorm statistics change."""
        return bool(self.options.compensate != "off" or self.options.recalibrate)

    def _goes_on(self, model_id: str) -> bool:
        """Whether there is an unfinished run of the same options to continue."""
        path = self.unfinished / "run.json"
        if self.options.restart or not path.is_file():
            written = () if self.options.restart else (*saving.FILES, SUMMARY, REPORT)
            check_free(self.output, written, "--restart")
            return False
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            version, config, other = document["version"], document["options"], document["model"]
            self.accuracies = {str(name): float(value) for name, value in document["accuracies"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"run {str(path)!r}: damaged ({error}); add --restart to start over.") from error
        if version != _VERSION:
            raise InputError(f"run {str(path)!r}: expected version {_VERSION}, got {version!r}; add --restart.")
        for key in [*self.config, *config]:
            if config.get(key) != self.config.get(key):
                raise InputError(
                    f"output {str(self.output)!r}: has an unfinished run with other options: "
                    f"--{key.replace('_', '-')} was {config.get(key)!r}, is {self.config.get(key)!r}. Use the same "
                    "ones to continue it, choose another folder, or add --restart to start over."
                )
        if other != model_id:
            raise InputError(
                f"output {str(self.output)!r}: has an unfinished run of a model with other weights; add --restart to "
                "start over."
            )
        return True

    def _begin(self, model_id: str, *, goes_on: bool) -> None:
        # Every process looks for an unfinished run before the first one writes.
        self.processes.wait()
        self.model_id = model_id
        if self.processes.is_first and not goes_on:
            if self.unfinished.is_dir():
                shutil.rmtree(self.unfinished)
            self.unfinished.mkdir(parents=True)
            self._write_state()
        self.processes.wait()

    def _write_state(self) -> None:
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model_id,
            "options": self.config,
            "accuracies": self.accuracies,
        }
        with replacing(self.unfinished / "run.json", "run") as temporary:
            temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")

    def _measure_accuracy(self, name: str, model: nn.Module, subject: Subject) -> None:
        if name not in self.accuracies:
            self.accuracies[name] = accuracy(model, subject.data, self.processes)
            if self.processes.is_first:
                self._write_state()
        self.processes.say(f"accuracy, {name}: {self.accuracies[name]:.2%}")

    def _pruned(self, subject: Subject) -> tuple[nn.Module, PruningPlan]:
        """The pruned and compensated model and its plan; those of an interrupted run if it got that far."""
        folder = self.unfinished / "pruned"
        if (folder / saving.MANIFEST).is_file():
            model = saving.load(folder, lambda: deepcopy(subject.model), example_inputs=subject.example)
            plan = PruningPlan.load(folder / saving.PLAN)
        else:
            model, plan = self._prune(subject)
            if self.processes.is_first:
                saving.save(model, plan, folder)
        if self._refits and not self.options.layerwise:
            is_known = "pruned" in self.accuracies
            bare = subject.model if is_known else plan.apply(deepcopy(subject.model), subject.example)
            self._measure_accuracy("pruned", bare, subject)
        self._measure_accuracy("compensated" if self._refits else "pruned", model, subject)
        self.processes.wait()
        return model, plan

    def _prune(self, subject: Subject) -> tuple[nn.Module, PruningPlan]:
        options, calibration = self.options, subject.data.calibration
        model = deepcopy(subject.model)
        if options.layerwise:
            selector = selector_of(options)
        else:
            kept = self.unfinished / "moments.safetensors"
            selector = fitted(options, replace(subject, model=model), self.processes, kept)
        n_groups = 0

        def between(model: nn.Module) -> None:
            nonlocal n_groups
            n_groups += 1
            self.processes.say(f"group {n_groups}: fine-tuning")
            training = self._training(options.layerwise_epochs, 1000 * n_groups)
            fine_tune(model, subject.data, training, self.processes)

        self.processes.say("pruning")
        pruner = CoSePPruner(
            model,
            subject.example,
            importance=selector,
            pruning_ratio=options.pruning_ratio,
            loader=calibration,
            layerwise=options.layerwise,
            fine_tune=between if options.layerwise and options.layerwise_epochs else None,
            compensate=False if options.compensate == "off" else options.compensate,
            recalibrate=options.recalibrate,
            fit_options=fit_options(options, self.processes),
            **pruner_options(options, options.target),
        )
        pruner.step()
        return model, pruner.plan

    def _training(self, epochs: int, offset: int) -> Training:
        options = self.options
        seed = options.seed + offset
        return Training(epochs, options.optimizer, options.learning_rate, options.weight_decay, seed)

    def _save(self, model: nn.Module, plan: PruningPlan, models: dict[str, nn.Module], subject: Subject) -> None:
        measured = measure_models(models, subject.example)
        stats = {name: replace(found, accuracy=self.accuracies[name]) for name, found in measured.items()}
        console = self.processes.console
        console.print("", layer_table(plan), "", model_table(stats), "", sep="\n")
        saving.save(model, plan, self.output)
        self._write_summary(stats)
        plan.report(self.output / REPORT, stats=stats, class_names=subject.data.class_names)
        shutil.rmtree(self.unfinished)
        names = sorted(path.name for path in self.output.iterdir() if path.is_file())
        self.processes.say(f"{self.output}: {', '.join(names)}")
        self.processes.say(
            f"load it with tp_cosep.load({str(self.output)!r}, make), where make() returns the unpruned model"
        )

    def _write_summary(self, stats: dict[str, ModelStats]) -> None:
        rows = [asdict(row) for row in model_rows(stats)]
        document = {
            "format": "tp_cosep.summary",
            "version": 1,
            "versions": versions(),
            "options": self.config,
            "accuracies": self.accuracies,
            "models": rows,
        }
        with replacing(self.output / SUMMARY, "summary") as temporary:
            temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")

    def _describe(self, goes_on: bool) -> None:
        options, say = self.options, self.processes.say
        heads = "'s heads" if options.selector == "attention" else ""
        counts = {
            "to the knee of every layer's curve": options.target is None and options.pruning_ratio is None,
            f"to a target of {options.target and '='.join(map(str, options.target))}": options.target is not None,
            f"a share of {options.pruning_ratio} of every layer{heads}": options.pruning_ratio is not None,
        }
        say("would")
        if goes_on:
            say(f"  continue the unfinished run in {self.output}")
        say(f"  prune {next(text for text, is_it in counts.items() if is_it)}")
        if options.layerwise:
            say(f"  prune group by group, with {options.layerwise_epochs} epochs of fine-tuning in between")
        if self._refits:
            both = {f"refitting ({options.compensate})": options.compensate != "off"}
            both["BatchNorm re-estimation"] = options.recalibrate
            say(f"  compensate by {' and '.join(name for name, is_on in both.items() if is_on)}")
        if options.epochs:
            say(
                f"  fine-tune for {options.epochs} epochs ({options.optimizer}, learning rate {options.learning_rate}, "
                f"mixed precision: {options.mixed_precision}, {self.processes.accelerator.num_processes} processes on "
                f"{self.processes.device.type})"
            )
        say(f"  write {', '.join((*saving.FILES, SUMMARY))} and {REPORT} to {self.output}")
