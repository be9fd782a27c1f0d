"""The command line run in this process."""

from tp_cosep.cli import main as cli

SMALL = ["--data-args", "n=300", "--calibration", "100"]


MLP = ["--model", "project:make_mlp", "--data", "project:make_loaders", *SMALL, "--device", "cpu"]


def run(*words):
    """Run the command in this process; returns its exit code."""
    return cli.main([str(word) for word in words])
