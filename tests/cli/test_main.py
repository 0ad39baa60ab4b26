"""`flux-trainer COMMAND`: the table of commands, and what `config` prints and returns."""

import importlib
import os
import signal
from types import SimpleNamespace

import pytest
from helpers.headers import write_header

from flux_trainer import __version__
from flux_trainer.cli.main import COMMANDS, main
from flux_trainer.config.load import load_config
from flux_trainer.runtime.interrupt import STOP_SIGNALS


@pytest.fixture
def toml(tmp_path, monkeypatch):
    """A sound configuration in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_header(tmp_path / "ae.safetensors", {})
    text = '[encoder]\nautoencoder_path = "ae.safetensors"\n[[data.sources]]\ntype = "synthetic"\n'
    (tmp_path / "a.toml").write_text(text)
    return "a.toml"


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for command, (_, what) in COMMANDS.items():
        assert f"  {command}" in page
        assert what in page
    assert main([]) == 2
    capsys.readouterr()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flux_trainer {__version__}\n"


def test_an_unknown_command_is_refused_with_the_nearest(capsys):
    assert main(["confg"]) == 2
    assert capsys.readouterr().err == "flux-trainer: confg: unknown command; did you mean config?\n"
    assert main(["qqq"]) == 2
    assert capsys.readouterr().err.startswith("flux-trainer: qqq: unknown command; the commands are config")


def test_config_prints_settings_that_load_again(toml, tmp_path, capsys):
    words = ["--job.config_file", toml, "--training.steps", "300", "--checkpoint.enable"]
    assert main(["config", "--ngpu", "2", *words]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    (tmp_path / "resolved.toml").write_text(printed.out)
    assert load_config(["--job.config_file", "resolved.toml"]) == load_config(words)


def test_config_prints_notes_beside_the_settings_and_nothing_when_quiet(toml, capsys):
    words = ["config", "--job.config_file", toml, "--model.name", "flux", "--training.steps", "5"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("[job]\n")
    first, second = printed.err.splitlines()
    assert first == 'note: command line: model.name = "flux" is read as "flux1"'
    assert second.startswith("note: defaults: lr_scheduler.warmup_steps = 200 is cut to training.steps = 5; ")
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--training.stepz", "3"],
            "command line: training.stepz: unknown key; did you mean training.steps?",
        ),
        (["--ngpu", "many"], "command line: --ngpu = many: wrong type; expected an integer >= 1"),
        (["--ngpu=0"], "command line: --ngpu = 0: wrong type; expected an integer >= 1"),
        (
            ["--ngpu=3", "--parallelism.data_parallel_replicate_degree=2"],
            "command line: parallelism.data_parallel_replicate_degree = 2 does not divide "
            "the 3 ranks of this run; possible: 1, 3",
        ),
    ],
)
def test_config_lists_mistakes_and_returns_2(toml, words, line, capsys):
    assert main(["config", "--job.config_file", toml, *words]) == 2
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_stop_signal_ends_any_command_with_one_line(command, number, monkeypatch, capsys):
    def work(argv):
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(main=work))
    try:
        assert main([command]) == 130
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr() == ("", "Interrupted.\n")
