"""The command line, and options in files."""

import inspect
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tp_cosep import AttentionMapSelector, CoSePSelector, ReconstructionSelector
from tp_cosep.cli import main as cli
from tp_cosep.cli.arguments import EXAMPLES, SELECTOR_OPTIONS, parser
from tp_cosep.cli.config import parse
from tp_cosep.cli.demo import DATA
from tp_cosep.cli.setup import selector_of

ROOT = Path(__file__).resolve().parents[2]
BASE = ["prune", "--model", "m:f", "--data", "d:f", "--output", "out"]
TOML = """
model = "project:make_net"
data = "imagefolder:photos"
output = "out"
epochs = 3
learning-rate = 1e-3
recalibrate = false
layerwise = true
ignored_layers = ["a", "b"]
target = {macs = 0.5}
model-args = {num_classes = 10, name = "x"}
mean = [0.5, 0.25, 0.125]
"""
YAML = """
model: project:make_net
data: imagefolder:photos
output: out
epochs: 3
learning-rate: 0.001
recalibrate: no
layerwise: yes
ignored_layers: [a, b]
target: macs=0.5
model-args:
  num_classes: 10
  name: x
mean:
  - 0.5
  - 0.25
  - 0.125
"""


def parsed(*words):
    return parse(parser(), list(words))


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML)])
def test_a_file_says_what_the_command_line_would(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    found = vars(parsed("prune", "--config", str(tmp_path / name)))
    words = "prune --model project:make_net --data imagefolder:photos --output out --epochs 3 --learning-rate 1e-3 "
    words += "--no-recalibrate --layerwise --ignored-layers a b --target macs=0.5 --model-args num_classes=10 name=x "
    expected = vars(parsed(*(words + "--mean 0.5 0.25 0.125").split()))
    assert found.pop("config") == tmp_path / name
    assert expected.pop("config") is None
    assert found == expected
    assert found["model_args"] == [("num_classes", 10), ("name", "x")]


def test_the_command_line_wins(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(TOML)
    words = ["--epochs", "7", "--ignored-layers", "c", "--recalibrate", "--target", "none"]
    for argv in (["prune", *words, "--config", str(path)], ["prune", f"--config={path}", *words]):
        found = parsed(*argv)
        assert (found.epochs, found.ignored_layers, found.recalibrate, found.target) == (7, ["c"], True, None)
        assert found.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "epoch = 3", "a.toml': unknown option 'epoch'; did you mean 'epochs'?"),
        ("a.toml", "learning_rat = 3", "unknown option 'learning_rat'; did you mean 'learning-rate'?"),
        ("a.toml", "debug = true", "unknown option 'debug'"),
        ("a.toml", "[prune]\nepochs = 3", "unknown option 'prune'"),
        ("a.toml", "epochs = [3]", "expected a single value for 'epochs', got [3]"),
        ("a.toml", "ignored-layers = 'a'", "expected a list for 'ignored-layers', got 'a'"),
        ("a.toml", "recalibrate = 'yes'", "expected true or false for 'recalibrate', got 'yes'"),
        ("a.toml", "epochs = true", "expected a single value for 'epochs', got True"),
        ("a.yaml", "labels: off", "for 'labels', got False; if it is meant as text, put it in quotes."),
        ("a.yaml", "ignored-layers: [a, no]", "for 'ignored-layers', got ['a', False]; if it is meant as text"),
        ("a.toml", "epochs = 'many'", "argument --epochs: expected a whole number from 0, got 'many'"),
        ("a.toml", "selector = 'here'", "argument --selector: invalid choice: 'here'"),
        ("a.toml", "scope = 'model'", "--scope: not with --selector reconstruction; it is an option of attention"),
        ("a.toml", "target = {macs = 0.5, params = 3}", "expected a single value for 'target'"),
        ("a.toml", "epochs = ", "a.toml': expected TOML, got"),
        ("a.yaml", "epochs: [", "a.yaml': expected YAML, got"),
        ("a.yaml", "- epochs", "expected options by name, got a list"),
        ("a.yaml", "epochs:", "expected a single value for 'epochs', got None"),
        ("a.yaml", "!!python/object/apply:os.mkdir [made]", "expected YAML, got"),
        ("a.json", "{}", "expected a file that ends in .toml, .yaml or .yml"),
    ],
)
def test_files_that_are_refused(name, text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(SystemExit) as left:
        cli.main([*BASE, "--config", name])
    assert left.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("made").exists()


def test_words_that_yaml_reads_as_booleans(tmp_path):
    path = tmp_path / "a.yaml"
    for text in ("compensate: off\nmixed-precision: no", "compensate: 'off'\nmixed_precision: off"):
        path.write_text(text)
        found = parsed(*BASE, "--config", str(path))
        assert (found.compensate, found.mixed_precision) == ("off", "no")


def test_preview_takes_the_file_of_prune(tmp_path, capsys):
    path = tmp_path / "a.toml"
    path.write_text(TOML)
    found = parsed("preview", "--config", str(path))
    assert (found.model, found.ignored_layers, found.mean) == ("project:make_net", ["a", "b"], [0.5, 0.25, 0.125])
    assert not hasattr(found, "epochs")
    for command, key, nearest in (("preview", "epoch", "epochs"), ("prune", "targets", "target")):
        path.write_text(f"{key} = 3")
        with pytest.raises(SystemExit):
            parsed(command, *BASE[1:5], "--config", str(path))
        said = " ".join(capsys.readouterr().err.split())
        assert f"unknown option '{key}'; did you mean '{nearest}'?" in said


def test_a_file_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*BASE, "--config", "/nowhere/a.toml"])
    assert left.value.code == 2
    assert "/nowhere/a.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--target flops=3", "expected macs=VALUE, params=VALUE, latency=VALUE or none, got 'flops=3'"),
        ("--target macs=-1", "expected a number above 0, got '-1'"),
        ("--model-args ten", "expected NAME=VALUE, got 'ten'"),
        ("--batch-size 0", "expected a whole number from 1, got '0'"),
        ("--pruning-ratio 2", "expected a share between 0 and 1, got '2'"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
        ("--target macs=half", "argument --target: expected a number above 0, got 'half'"),
        ("--mean nan", "argument --mean: expected a number, got 'nan'"),
        ("--target macs=0.5 --pruning-ratio 0.5", "--pruning-ratio: not together with --target"),
        (
            "--max-class-pairs 9",
            "--max-class-pairs: not with --selector reconstruction; it is an option of cosep, published",
        ),
        ("--selector cosep --class-weight 0", "--class-weight: not with --selector cosep; it is an option of reconstr"),
        ("--selector published --metric jm", "--metric: not with --selector published; it is an option of cosep"),
        (
            "--selector attention --spatial 4",
            "--spatial: not with --selector attention; it is an option of reconstruct",
        ),
        ("--selector attention --target macs=0.5", "--target: not with --selector attention, which selects heads"),
        ("--scope model", "--scope: not with --selector reconstruction; it is an option of attention"),
        ("--input-size 32", "--input-size: not with --data d:f; a function of yours decides that"),
        ("--mean 0.5 --std 0.5", "--mean: not with --data d:f"),
        ("--download", "--download: not with --data d:f"),
        ("--data cifar10:there --data-args n=3", "--data-args: not with --data cifar10:there; only for a function"),
    ],
)
def test_wrong_usage(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*BASE, *words.split()])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_line_can_take_back_what_a_file_says(tmp_path):
    (tmp_path / "a.toml").write_text('target = "macs=0.5"')
    options = parsed(*BASE, "--config", str(tmp_path / "a.toml"), "--target", "none", "--pruning-ratio", "0.5")
    assert (options.target, options.pruning_ratio) == (None, 0.5)


def commands():
    return [(name, line) for name, text in EXAMPLES.items() for line in text.splitlines()]


@pytest.mark.parametrize(("name", "line"), commands())
def test_examples_are_valid_and_shown(name, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("prune.toml").write_text(TOML)
    words = shlex.split(line)
    start = words.index("tp_cosep") if "tp_cosep" in words else words.index("tp-cosep")
    assert parsed(*words[start + 1 :]).command == name
    with pytest.raises(SystemExit):
        parsed(name, "--help")
    assert line in capsys.readouterr().out


def test_the_demo_has_the_data_that_it_says():
    assert parsed("demo").data == DATA[0]
    for data in DATA:
        assert parsed("demo", "--data", data).data == data


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, tp_cosep.cli.main\n"
        "try: tp_cosep.cli.main.main(['prune', '--help'])\n"
        "finally: assert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        ("", ReconstructionSelector, {"class_weight": 3.0, "spatial": 4, "memory_budget": 2**32}),
        (
            "--class-weight 0 --spatial 2 --memory-budget 0.5",
            ReconstructionSelector,
            {"class_weight": 0, "spatial": 2, "memory_budget": 2**29},
        ),
        ("--selector cosep", CoSePSelector, {"metric": "jm", "representative": "medoid", "knee": "guarded"}),
        (
            "--selector cosep --metric hellinger --observe inputs --representative max_norm --knee first",
            CoSePSelector,
            {"metric": "hellinger", "observe": "inputs", "representative": "max_norm", "knee": "first"},
        ),
        (
            "--selector published --max-class-pairs 9",
            CoSePSelector,
            {"knee": "first", "spatial": None, "max_class_pairs": 9},
        ),
        ("--selector attention --scope model", AttentionMapSelector, {"scope": "model", "knee": "guarded"}),
    ],
)
def test_the_selector_has_its_options(words, kind, expected):
    selector = selector_of(parsed(*BASE, *words.split()))
    assert type(selector) is kind
    assert {name: getattr(selector, name) for name in expected} == expected


@pytest.mark.parametrize("name", SELECTOR_OPTIONS)
def test_every_selector_accepts_the_options_that_the_command_line_gives_it(name):
    parameters = inspect.signature(type(selector_of(parsed(*BASE, "--selector", name)))).parameters
    assert set(SELECTOR_OPTIONS[name]) <= set(parameters)


def test_preview_has_no_heads(capsys):
    with pytest.raises(SystemExit):
        parsed("preview", *BASE[1:5], "--selector", "attention")
    assert "invalid choice: 'attention'" in capsys.readouterr().err
    assert not hasattr(parsed("preview", *BASE[1:5]), "scope")
