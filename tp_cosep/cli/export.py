"""``tp-cosep export``: write a pruned model as ONNX or as an exported program, and compare their outputs."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.cli.console import say
from tp_cosep.cli.models import make_model, module_of
from tp_cosep.errors import InputError
from tp_cosep.graph.structure import zeros_for
from tp_cosep.pruning import saving
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.utils.data import logits_of, run_model
from tp_cosep.utils.files import replacing

__all__ = ["run"]

# Sizes of batches. The export is traced with two samples: torch specialises a dimension of size one.
_TRACED, _COMPARED = 2, (1, 2, 5)


class _Scores(nn.Module):
    """The model with one input and its class scores as the only output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return logits_of(self.model(inputs))


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        InputError: If the model cannot be exported, or the outputs of the export differ.
    """
    model = saving.load(options.folder, lambda: make_model(options, with_weights=False))
    plan = PruningPlan.load(options.folder / saving.PLAN)
    example = _example(plan, options.folder)
    scores = _Scores(model).eval()
    write = _write_onnx if options.format == "onnx" else _write_program
    with _quiet(is_on=not options.debug), torch.no_grad(), replacing(options.output, "export") as temporary:
        answer = write(scores, _batch(example, _TRACED), temporary, options)
        worst = max(_difference(scores, answer, _batch(example, n)) for n in _COMPARED)
        if not worst <= options.tolerance:
            raise InputError(
                f"export: the exported model's outputs differ by {worst:.2g} of the largest output, more than the "
                f"--tolerance of {options.tolerance:.2g}; nothing was written."
            )
    say(
        f"{options.output}: {options.output.stat().st_size:,} bytes; outputs differ by at most {worst:.2g} of the "
        f"largest, with batches of {', '.join(map(str, _COMPARED))}"
    )


@contextmanager
def _quiet(*, is_on: bool) -> Iterator[None]:
    """Silence warnings and logs of the exporters; the outputs are compared instead."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        if is_on:
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def _example(plan: PruningPlan, folder: Path) -> Tensor:
    example = None if plan.inputs is None else zeros_for(plan.inputs, torch.device("cpu"))
    if not isinstance(example, Tensor) or not example.dim():
        raise InputError(f"export {str(folder)!r}: expected a model with one tensor as input; export it in Python.")
    return example


def _batch(example: Tensor, n: int) -> Tensor:
    """Random inputs: zeros would hide differences."""
    shape = (n, *example.shape[1:])
    generator = torch.Generator().manual_seed(n)
    if example.is_floating_point():
        return torch.randn(shape, generator=generator).to(example.dtype)
    return torch.zeros(shape, dtype=example.dtype)


def _difference(model: nn.Module, answer: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    expected = run_model(model, inputs).double()
    found = answer(inputs).double()
    if found.shape != expected.shape:
        raise InputError(
            f"export: expected outputs of shape {tuple(expected.shape)} for {len(inputs)} samples, got "
            f"{tuple(found.shape)}; nothing was written."
        )
    largest = float(expected.abs().max())
    return float((found - expected).abs().max()) / (largest or 1.0)


def _exported(model: nn.Module, inputs: Tensor) -> Any:
    try:
        return torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    except Exception as error:
        raise InputError(f"export: torch.export cannot export the model ({type(error).__name__}: {error}).") from error


def _write_program(model: nn.Module, inputs: Tensor, path: Path, options: argparse.Namespace) -> Any:
    # Through a buffer, since torch requires paths that end in .pt2.
    buffer = BytesIO()
    torch.export.save(_exported(model, inputs), buffer)
    path.write_bytes(buffer.getvalue())
    return torch.export.load(BytesIO(path.read_bytes())).module()


def _write_onnx(model: nn.Module, inputs: Tensor, path: Path, options: argparse.Namespace) -> Any:
    runtime = module_of("onnxruntime", "export")
    for package in ("onnx", "onnxscript"):
        module_of(package, "export")
    given: Mapping[str, Any] = {} if options.opset is None else {"opset_version": options.opset}
    try:
        program = torch.onnx.export(
            _exported(model, inputs),
            input_names=["inputs"],
            output_names=["scores"],
            dynamo=True,
            verbose=False,
            **given,
        )
        program.save(str(path), external_data=False)  # type: ignore[union-attr]
        # The converter only logs a failure, and keeps the opset.
        opset = program.model.opset_imports[""]  # type: ignore[union-attr]
        if options.opset not in (None, opset):
            raise InputError(
                f"--opset {options.opset}: ONNX cannot convert the model from opset {opset}; nothing was written. "
                "Choose another opset, or leave it out."
            )
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"export: the model cannot be converted to ONNX ({type(error).__name__}: {error}).") from error
    name = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])
