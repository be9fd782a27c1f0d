"""Tensors with a header in a file: back as they were, or refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tp_cosep.utils.files import digest, read_safetensors, write_safetensors

BASE = torch.arange(24.0)
TENSORS = {
    "whole": BASE,
    "same storage, other shape": BASE.view(4, 6),
    "a part": BASE[3:7],
    "transposed": BASE.view(4, 6).T,
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "no dimension": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "bf16": torch.randn(3).bfloat16(),
    "bools": torch.tensor([True, False, True]),
    "double": torch.tensor([1e-300, float("inf"), float("nan")], dtype=torch.float64),
}
HEADER = {"names": ["ä", "b"], "n": 3, "nothing": None}


def test_views_of_one_storage_come_back_apart(tmp_path):
    path = tmp_path / "file"
    write_safetensors(path, TENSORS, HEADER)
    tensors, header = read_safetensors(path)
    assert header == HEADER
    assert tensors.keys() == TENSORS.keys()
    for name, x in TENSORS.items():
        assert tensors[name].dtype == x.dtype
        torch.testing.assert_close(tensors[name], x, rtol=0, atol=0, equal_nan=True)
    theirs = load_file(path)  # any program that reads the format has them
    torch.testing.assert_close(theirs["transposed"], TENSORS["transposed"], rtol=0, atol=0)


def test_no_byte_of_a_file_can_change_unseen(tmp_path):
    path = tmp_path / "file"
    write_safetensors(path, {"b": torch.arange(5), "a": torch.ones(2, 3)}, {"x": 1})
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            _, header = read_safetensors(path)
        except ValueError:
            continue
        assert header is None, at  # our mark itself is gone: the file of another program


def test_a_file_of_another_program_has_no_header(tmp_path):
    path = tmp_path / "file"
    save_file({"x": torch.ones(2)}, path, {"format": "pt"})
    tensors, header = read_safetensors(path)
    assert header is None
    assert torch.equal(tensors["x"], torch.ones(2))
    save_file({"x": torch.ones(2)}, path, {"tp_cosep": json.dumps({"x": 1})})
    with pytest.raises(ValueError, match="not those that were written"):
        read_safetensors(path)


def test_a_digest_is_of_names_shapes_types_values_and_text():
    x = torch.arange(6.0)
    others = [
        ({"x": x, "y": x}, ""),
        ({"y": x}, ""),
        ({"x": x.view(2, 3)}, ""),
        ({"x": x.view(torch.int32)}, ""),
        ({"x": x + torch.tensor([0, 0, 0, 0, 0, 1e-6])}, ""),
        ({"x": x}, "text"),
    ]
    found = [digest({"x": x}), *(digest(*other) for other in others)]
    assert digest({"x": x.clone()}) == found[0]
    assert len(set(found)) == len(found)
