"""Plans in files: the published schema, and the model that a plan knows."""

import json
from importlib import metadata
from pathlib import Path

import jsonschema
import pytest
import torch
from models import KINDS, build
from saved_models import saved

import tp_cosep
from tp_cosep import InputError, PruningPlan
from tp_cosep.graph.structure import structure_of
from tp_cosep.pruning.saving import PLAN

SCHEMA = json.loads((Path(tp_cosep.__file__).parent / "pruning" / "plan.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"pruning_ratio": None, "target": {"macs": 0.5}}, {"compensate": True}],
    ids=["ratio", "target", "repair"],
)
def test_saved_plans_follow_the_schema(kind, options, tmp_path):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    _, _, plan, _ = saved(kind, tmp_path, **options)
    document = json.loads((tmp_path / PLAN).read_text())
    jsonschema.validate(document, SCHEMA, jsonschema.Draft202012Validator)
    assert document["versions"]["tp_cosep"] == tp_cosep.__version__
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"]["torch_pruning"] == metadata.version("torch_pruning")
    assert document["model"]["tensors"] == structure_of(build(kind, 12)[0])
    assert document["model"]["fingerprint"] == plan.fingerprint


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.pop("versions"),
        lambda d: d.update(version=2),
        lambda d: d["model"].update(fingerprint="short"),
        lambda d: d["model"]["tensors"].update(x="float32"),
        lambda d: d.update(inputs={"tensor": "float32 [1]", "value": 3}),
        lambda d: d["groups"][0].update(side="up"),
        lambda d: d["groups"][0]["selection"].update(surprise=1),
        lambda d: d["groups"][0]["selection"].update(keep_idxs=[-1]),
    ],
)
def test_the_schema_refuses(spoil, tmp_path):
    saved("mlp", tmp_path)
    document = json.loads((tmp_path / PLAN).read_text())
    spoil(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA, jsonschema.Draft202012Validator)


def test_a_plan_with_a_changed_structure_is_refused(tmp_path):
    saved("mlp", tmp_path)
    document = json.loads((tmp_path / PLAN).read_text())
    document["model"]["tensors"]["fc1.weight"] = "float32 [13, 20]"
    (tmp_path / PLAN).write_text(json.dumps(document))
    with pytest.raises(InputError, match="damaged, ValueError: the model's fingerprint"):
        PruningPlan.load(tmp_path / PLAN)


def test_a_plan_without_what_is_new(tmp_path):
    """Plans that were saved by earlier versions, and plans made by hand."""
    make, model, plan, x = saved("mlp", tmp_path)
    document = json.loads((tmp_path / PLAN).read_text())
    for key in ("versions", "model", "inputs"):
        del document[key]
    (tmp_path / PLAN).write_text(json.dumps(document))
    old = PruningPlan.load(tmp_path / PLAN)
    assert (old.structure, old.inputs, old.versions, old.fingerprint) == ({}, None, {}, None)
    assert old.groups == plan.groups
    fresh = old.apply(make(), x[:1])
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
