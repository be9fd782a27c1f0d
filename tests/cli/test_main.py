import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

import tp_cosep
from tp_cosep.cli import demo
from tp_cosep.cli import main as cli
from tp_cosep.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demos(monkeypatch):
    """The calls of run_demo, which does nothing."""
    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda *args, **options: calls.append((args, options)))
    return calls


def failing(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(demo, "run_demo", fail)


def test_defaults(demos):
    assert cli.main(["demo"]) == 0
    assert demos == [
        (("digits", "tp_cosep_demo"), {"seed": 0, "epochs": None, "fine_tune_epochs": None, "threads": None})
    ]


def test_options(demos):
    words = "demo --data fashion-mnist --output there --seed 3 --epochs 4 --fine-tune-epochs 0 --threads 2"
    assert cli.main(words.split()) == 0
    assert demos == [(("fashion-mnist", "there"), {"seed": 3, "epochs": 4, "fine_tune_epochs": 0, "threads": 2})]


def test_arguments_of_the_process(demos, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tp-cosep", "demo", "--seed", "7"])
    assert cli.main() == 0
    assert demos[0][1]["seed"] == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "COMMAND"),
        ("train", "invalid choice: 'train'"),
        ("demo --data mnist", "invalid choice: 'mnist'"),
        ("demo --seed -1", "expected a whole number from 0, got '-1'"),
        ("demo --epochs many", "'many'"),
    ],
)
def test_wrong_usage(demos, capsys, words, message):
    with pytest.raises(SystemExit) as left:
        cli.main(words.split())
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not demos


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"tp-cosep {tp_cosep.__version__}\n"


@pytest.mark.parametrize("error", [InputError("demo: expected\n  something else."), OSError("disk\nfull")])
def test_errors_are_one_line(monkeypatch, capsys, error):
    failing(monkeypatch, error)
    assert cli.main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"tp-cosep: {' '.join(str(error).split())}\n"


class Bad(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        raise InputError("data: expected\n  something else.")


def test_errors_of_a_loaders_worker_are_one_line_too(monkeypatch, capsys):
    with pytest.raises(InputError) as raised:
        list(DataLoader(Bad(), num_workers=1))
    failing(monkeypatch, raised.value)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "tp-cosep: data: expected something else.\n"


@pytest.mark.parametrize("error", [InputError("reason"), OSError("reason")])
def test_debug_shows_where(monkeypatch, error):
    failing(monkeypatch, error)
    with pytest.raises(type(error), match="reason"):
        cli.main(["demo", "--debug"])


def test_other_errors_say_their_type_and_how_to_see_more(monkeypatch, capsys):
    failing(monkeypatch, ZeroDivisionError("a\nmistake"))
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "tp-cosep: ZeroDivisionError: a mistake (add --debug to see where)\n"
    with pytest.raises(ZeroDivisionError, match="a\nmistake"):
        cli.main(["demo", "--debug"])


def test_interrupt(monkeypatch, capsys):
    failing(monkeypatch, KeyboardInterrupt())
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "\ntp-cosep: interrupted\n"


def test_output_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "taken"
    path.write_text("")
    assert cli.main(["demo", "--output", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tp_cosep", "demo", "--epochs", "0", "--output", "/nonexistent"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tp-cosep: demo: expected epochs ≥ 1, got 0.\n"
