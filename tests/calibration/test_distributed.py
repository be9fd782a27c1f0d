"""Several processes with their shares of the data choose what one process with all of it chooses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "processes.py"


def run(tmp_path, world, kind, how, kind="reconstruction"):
    """Exit codes and outputs of all processes, and what those saved that went well."""
    out, store = tmp_path / f"result{world}", tmp_path / f"store{world}"
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(world), str(store), str(out), kind, how, space],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    done = [(*p.communicate(timeout=240), p.returncode) for p in started]
    saved = [Path(f"{out}.{rank}") for rank in range(world)]
    return done, [torch.load(path) if path.is_file() else None for path in saved]


def assert_same(a, b):
    """Repaired weights apart: which halves the strength of the ridge is chosen on depends on the shares."""
    assert a["plan"] == b["plan"]
    assert len(a["plan"]) > 1
    for key in ("recalibrated", "seconds", "moments", "covariances", "between"):
        assert sorted(a[key]) == sorted(b[key])
        for name in a[key]:
            torch.testing.assert_close(a[key][name], b[key][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "world", "how", "space"),
    [
        ("vgg", 2, "uneven", "joint"),
        ("resnet", 3, "empty", "joint"),
        ("resnet", 2, "without a class", "separability"),
        ("vit", 3, "without a class", "joint"),
    ],
)
def test_as_one_process(tmp_path, kind, world, how, space):
    done, (expected,) = run(tmp_path, 1, kind, how, space)
    assert done[0][2] == 0, done
    done, results = run(tmp_path, world, kind, how, space)
    assert [code for _, _, code in done] == [0] * world, done
    for result in results:
        assert_same(result, expected)
    for result in results[1:]:  # not only nearly
        assert result["plan"] == results[0]["plan"]
        for name, x in results[0]["repaired"].items():
            assert torch.equal(result["repaired"][name], x), name
            assert bool(torch.isfinite(x).all())
    if kind == "vit":
        assert "qkv" in expected["moments"]


def test_a_process_that_fails_or_dies_ends_the_others(tmp_path):
    done, _ = run(tmp_path, 2, "vgg", "fails")
    assert [code for _, _, code in done] == [3, 3], done
    assert "DistributedError: process 1 of 2 failed: InputError: batch 0: expected integer labels" in done[0][0]
    assert done[1][0].startswith("InputError: batch 0: expected integer labels")
    done, _ = run(tmp_path / "again" if (tmp_path / "again").mkdir() is None else tmp_path, 3, "vgg", "dies")
    assert [code for _, _, code in done] == [3, 7, 3], done
    for text, _, code in done:
        assert code == 7 or "DistributedError: a process is gone, or did not answer" in text
