"""Several processes with their shares of the data choose what one process with all of it chooses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "processes.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launcher():
    """It imports torch once for the processes of all cases."""
    with subprocess.Popen(
        [sys.executable, SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process


def run(launcher, out, world, kind, how, space="joint"):
    """What each process printed and its exit code, and what those saved that went well."""
    print(json.dumps([str(out), world, kind, how, space]), file=launcher.stdin, flush=True)
    codes = json.loads(launcher.stdout.readline())
    printed = [Path(f"{out}.{rank}.txt").read_text(encoding="utf-8") for rank in range(world)]
    saved = [Path(f"{out}.{rank}") for rank in range(world)]
    return [*zip(printed, codes, strict=True)], [torch.load(path) if path.is_file() else None for path in saved]


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
def test_as_one_process(launcher, tmp_path, kind, world, how, space):
    done, (expected,) = run(launcher, tmp_path / "one", 1, kind, how, space)
    assert done[0][1] == 0, done
    done, results = run(launcher, tmp_path / "all", world, kind, how, space)
    assert [code for _, code in done] == [0] * world, done
    for result in results:
        assert_same(result, expected)
    for result in results[1:]:  # not only nearly
        assert result["plan"] == results[0]["plan"]
        for name, x in results[0]["repaired"].items():
            assert torch.equal(result["repaired"][name], x), name
            assert bool(torch.isfinite(x).all())
    if kind == "vit":
        assert "qkv" in expected["moments"]


def test_a_process_that_fails_or_dies_ends_the_others(launcher, tmp_path):
    done, _ = run(launcher, tmp_path / "fails", 2, "vgg", "fails")
    assert [code for _, code in done] == [3, 3], done
    assert "DistributedError: process 1 of 2 failed: InputError: batch 0: expected integer labels" in done[0][0]
    assert done[1][0].startswith("InputError: batch 0: expected integer labels")
    done, _ = run(launcher, tmp_path / "dies", 3, "vgg", "dies")
    assert [code for _, code in done] == [3, 7, 3], done
    for text, code in done:
        assert code == 7 or "DistributedError: a process is gone, or did not answer" in text
