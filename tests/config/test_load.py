"""Layers, flags and the wording of every kind of mistake."""

from pathlib import Path

import pytest

from flux_trainer.config.load import ConfigError, load, load_config
from flux_trainer.config.schema import JobConfig


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a TOML file into the working folder and return its name."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str, name: str = "a.toml") -> str:
        Path(name).write_text(text)
        return name

    return _write


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems


def test_no_words_give_the_defaults():
    assert load_config([]) == JobConfig()


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--training.steps", "10"], "training.steps", 10),
        (["--training.steps=10"], "training.steps", 10),
        (["--training.steps", "1_000"], "training.steps", 1000),
        (["--training.img-size", "512"], "training.img_size", 512),
        (["--lr-scheduler.min-lr-factor=0.5"], "lr_scheduler.min_lr_factor", 0.5),
        (["--optimizer.lr", "1e-5"], "optimizer.lr", 1e-5),
        (["--training.max_norm", "2"], "training.max_norm", 2.0),
        (["--checkpoint.load_step", "-1"], "checkpoint.load_step", -1),
        (["--flow.logit_mean=-0.5"], "flow.logit_mean", -0.5),
        (["--checkpoint.enable"], "checkpoint.enable", True),
        (["--checkpoint.enable", "--training.steps", "3"], "checkpoint.enable", True),
        (["--checkpoint.enable", "true"], "checkpoint.enable", True),
        (["--checkpoint.enable", "False"], "checkpoint.enable", False),
        (["--checkpoint.enable=false"], "checkpoint.enable", False),
        (["--encoder.no-autoencoder-sample"], "encoder.autoencoder_sample", False),
        (["--encoder.no_autoencoder_sample"], "encoder.autoencoder_sample", False),
        (["--checkpoint.enable", "--checkpoint.no-enable"], "checkpoint.enable", False),
        (["--training.steps", "1", "--training.steps", "2"], "training.steps", 2),
        (["--lr_scheduler.total_steps", "5"], "lr_scheduler.total_steps", 5),
        (["--lr_scheduler.total_steps", "none"], "lr_scheduler.total_steps", None),
        (["--lr_scheduler.decay_ratio=None"], "lr_scheduler.decay_ratio", None),
        (["--flow.shift", "flux"], "flow.shift", "flux"),
        (["--flow.shift", "none"], "flow.shift", "none"),
        (["--flow.shift", "3"], "flow.shift", 3.0),
        (["--job.description", "5"], "job.description", "5"),
        (["--job.description", "a = b, c"], "job.description", "a = b, c"),
        (["--job.description=--x"], "job.description", "--x"),
        (["--compile.components", "model"], "compile.components", ["model"]),
        (["--validation.prompts", "a cat,a dog"], "validation.prompts", ["a cat", "a dog"]),
        (["--validation.prompts", "a", "--validation.prompts=b"], "validation.prompts", ["a", "b"]),
        (["--validation.prompts", '["a cat, asleep", "b"]'], "validation.prompts", ["a cat, asleep", "b"]),
        (["--validation.prompts="], "validation.prompts", []),
    ],
)
def test_every_form_of_a_flag(flags, key, value):
    section, name = key.split(".")
    found = getattr(getattr(load_config(flags), section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "flux1"),
        (["--model.flavor=flux-tiny"], "flux1"),
        (["--model.flavor=flux2-klein-9b"], "flux2"),
        (["--model.flavor=flux-tiny", "--model.name=flux2"], "flux2"),  # which `check` refuses
    ],
)
def test_the_family_is_the_flavors_unless_it_is_given(flags, name):
    assert load_config(flags).model.name == name


def test_later_layers_win_and_the_command_line_wins_over_all(write):
    write("[training]\nsteps = 1\nimg_size = 128\nmax_norm = 3\n[optimizer]\nlr = 1e-3\n", "a.toml")
    write("[training]\nsteps = 2\nimg_size = 256\n", "b.toml")
    separate = ["--job.config_file", "a.toml", "--job.config-file=b.toml"]
    for files in (separate, ["--job.config_file", "a.toml,b.toml"]):
        loaded = load(["--training.img_size", "512", *files])
        training = loaded.config.training
        assert (training.steps, training.img_size, training.max_norm) == (2, 512, 3.0)
        assert loaded.config.optimizer.lr == 1e-3
        assert loaded.origins["training.max_norm"] == "a.toml"
        assert loaded.origins["training.steps"] == "b.toml"
        assert loaded.origins["training.img_size"] == "command line"
    backwards = load_config(["--job.config_file", "b.toml,a.toml"])
    assert backwards.training.steps == 1


def test_tables_of_sources_are_replaced_whole_and_overridden_by_index(write):
    write('[[data.sources]]\ntype = "folder"\npath = "x"\n[[data.sources]]\ntype = "jsonl"\npath = "y"\n')
    write('[[data.sources]]\ntype = "hf"\npath = "z"\n', "b.toml")
    base = ["--job.config_file", "a.toml"]
    sources = load_config([*base, "--data.sources.1.path", "w", "--data.sources.0.repeats=2"]).data.sources
    assert [(s.type, s.path, s.repeats) for s in sources] == [("folder", "x", 2), ("jsonl", "w", 1)]
    assert [s.path for s in load_config([*base, "--job.config_file", "b.toml"]).data.sources] == ["z"]
    added = load_config(
        [*base, "--data.sources.2.type", "synthetic", "--data.sources.2.size", "7"]
    ).data.sources
    assert (added[2].type, added[2].size) == ("synthetic", 7)
    assert problems(*base, "--data.sources.5.path", "w") == [
        "command line: data.sources.5.path: no such entry of [[data.sources]]; "
        "they count from 0, and the next is 2"
    ]
    assert problems(*base, "--data.sources.0", "w") == [
        "command line: data.sources.0: an entry of [[data.sources]] is a table: write data.sources.0.KEY"
    ]


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        ("[training]\nstepz = 1", "training.stepz: unknown key; did you mean training.steps?"),
        ("[training]\nlr = 1", "training.lr: unknown key; did you mean optimizer.lr?"),
        ("[trainin]\nsteps = 1", "trainin: unknown section; did you mean training?"),
        ("[trainin]", "trainin: unknown section; did you mean training?"),
        ("steps = 1", "steps: unknown key; did you mean training.steps?"),
        ("[ema]\nqqqq = 1", "ema.qqqq: unknown key; --help ema lists its section"),
        ("training = 3", "training = 3: wrong type; training is a section: write training.KEY"),
        ('[training]\nsteps = "ten"', 'training.steps = "ten": wrong type; expected an integer >= 1'),
        ("[training]\nsteps = 1.5", "training.steps = 1.5: wrong type; expected an integer >= 1"),
        ("[training]\nsteps = true", "training.steps = true: wrong type; expected an integer >= 1"),
        ("[training]\nsteps = 0", "training.steps = 0: out of range; expected an integer >= 1"),
        ("[optimizer]\nlr = 0", "optimizer.lr = 0: out of range; expected a number > 0"),
        ("[flow]\nlogit_mean = nan", "flow.logit_mean = nan: out of range; expected a number"),
        ("[ema]\nhalf_life = inf", "ema.half_life = inf: out of range; expected a number > 0"),
        ("[data]\nflip_prob = 1.5", "data.flip_prob = 1.5: out of range; expected a number from 0 to 1"),
        ('[ema]\nenable = "yes"', 'ema.enable = "yes": wrong type; expected true or false'),
        ("[job]\ndescription = 3", "job.description = 3: wrong type; expected a string"),
        (
            '[checkpoint]\nasync_mode = "asink"',
            'checkpoint.async_mode = "asink": not a valid choice; expected one of "disabled", "async"; '
            'did you mean "async"?',
        ),
        (
            '[model]\nflavor = "flux-dv"',
            'model.flavor = "flux-dv": not a valid choice; expected one of "flux-dev", "flux-schnell", '
            '"flux-debug", "flux-tiny", "flux2-dev", "flux2-klein-4b", "flux2-klein-9b", "flux2-debug", '
            '"flux2-tiny"; did you mean "flux-dev"?',
        ),
        (
            "[flow]\nshift = -1",
            'flow.shift = -1: out of range; expected one of "none", "flux" or a number > 0',
        ),
        (
            "[lr_scheduler]\ntotal_steps = 0",
            "lr_scheduler.total_steps = 0: out of range; expected an integer >= 1 or none",
        ),
        (
            '[compile]\ncomponents = ["model", "los"]',
            'compile.components.1 = "los": not a valid choice; expected one of "model", "loss"; '
            'did you mean "loss"?',
        ),
        ('[validation]\nprompts = "a"', 'validation.prompts = "a": wrong type; expected a list of strings'),
        (
            "[[data.sources]]\npath = 'x'",
            'data.sources.0.type: missing; expected one of "folder", "jsonl", "hf", "synthetic"',
        ),
        (
            "[[data.sources]]\ntype = 'hf'\npth = 'x'",
            "data.sources.0.pth: unknown key; did you mean data.sources.0.path?",
        ),
        ("[data]\nsources = ['x']", 'data.sources.0 = "x": wrong type; expected a table'),
        ("[data]\nsources = 'x'", 'data.sources = "x": wrong type; expected a list of tables'),
        ("[training.extra]\na = 1", "training.extra.a: unknown key; --help training lists its section"),
    ],
)
def test_a_mistake_names_file_key_and_what_would_be_right(write, toml, line):
    assert problems("--job.config_file", write(toml)) == [f"a.toml: {line}"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--training.stepz", "1"], "training.stepz: unknown key; did you mean training.steps?"),
        (["--trainig.steps", "1"], "trainig.steps: unknown key; did you mean training.steps?"),
        (["--steps", "1"], "steps: unknown key; did you mean training.steps?"),
        (["--training.steps", "ten"], 'training.steps = "ten": wrong type; expected an integer >= 1'),
        (["--training.steps", "-3"], "training.steps = -3: out of range; expected an integer >= 1"),
        (["--training.steps"], "training.steps: a value is missing"),
        (["--training.steps", "--ema.enable"], "training.steps: a value is missing"),
        (["--ema.enable=yes"], 'ema.enable = "yes": wrong type; expected true or false'),
        (["--ema.enable", "yes"], "yes: not a flag; settings are written --section.key value"),
        (["--ema.no-enable=true"], "ema.enable: --ema.no-enable takes no value"),
        (["--ema.no-enabel"], "ema.no_enabel: unknown key; did you mean ema.enable?"),
        (["steps", "--ema.enable"], "steps: not a flag; settings are written --section.key value"),
        (["--training", "3"], 'training = "3": wrong type; training is a section: write training.KEY'),
        (["--validation.prompts", "[a"], "validation.prompts: [a: not a TOML array"),
        (["--job.config_file"], "job.config_file: the name of a TOML file is missing"),
        (
            ["--flow.shift", "fluxx"],
            'flow.shift = "fluxx": not a valid choice; expected one of "none", "flux" or a number > 0; '
            'did you mean "flux"?',
        ),
        (
            ["--quux.x", "1"],
            "quux.x: unknown key; the sections are " + ", ".join(JobConfig.model_fields),
        ),
    ],
)
def test_a_mistake_on_the_command_line_says_so(flags, line):
    assert problems(*flags) == [f"command line: {line}"]


def test_all_mistakes_are_listed_at_once(write):
    write("[training]\nstepz = 1\nimg_size = 0\n", "a.toml")
    write("[ema\n", "b.toml")
    found = problems(
        "--job.config_file", "a.toml,b.toml,c.toml", "--ema.enable=3", "x", "--training.dataset", "y"
    )
    assert [line.split(": ")[0] for line in found] == [
        "command line",
        "b.toml:1",
        "c.toml",
        "command line",
        "a.toml",
        "a.toml",
        "command line",
    ]


def test_a_syntax_error_names_file_and_line(write):
    write("[training]\nsteps = 1\nimg_size 256\n")
    assert problems("--job.config_file", "a.toml") == [
        "a.toml:3: not TOML: Expected '=' after a key in a key/value pair"
    ]
    write("[training]\nsteps = [1,\n2")
    assert problems("--job.config_file", "a.toml") == ["a.toml:3: not TOML: Unclosed array"]
    Path("a.toml").write_bytes(b"[job]\ndescription = '\xff'\n")
    assert problems("--job.config_file", "a.toml") == ["a.toml:2: not TOML: this is not UTF-8 text"]


def test_a_byte_order_mark_is_no_part_of_the_settings(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 3\r\n")
    assert load_config(["--job.config_file", str(path)]).training.steps == 3
    path.write_bytes(b"\xef\xbb\xbf[training]\nsteps 3\n")
    assert problems("--job.config_file", str(path))[0].startswith(f"{path}:2: not TOML: ")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_called_what_they_are(tmp_path, encoding):
    """PowerShell's > writes UTF-16."""
    path = tmp_path / "a.toml"
    path.write_bytes("[training]\nsteps = 3\n".encode(encoding))
    assert problems("--job.config_file", str(path)) == [
        f"{path}:1: not TOML: this is UTF-16 or UTF-32 text; save it as UTF-8"
    ]


def test_the_home_folder_in_names_of_settings_files(write, monkeypatch):
    home = Path("home").absolute()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name, steps in (("home/a.toml", 3), ("home/b.toml", 4)):
        write(f"[training]\nsteps = {steps}\n", name)
    assert load_config(["--job.config_file=~/a.toml"]).training.steps == 3
    assert load_config(["--job.config_file", "~/a.toml, ~/b.toml"]).training.steps == 4
    assert problems("--job.config_file=~/c.toml")[0].startswith(f"{home}/c.toml: no such file")
    assert problems("--job.config_file=~nobody here/a.toml") == [
        "command line: job.config_file: ~nobody here is no known home folder; a name that begins with ~ is "
        "written ./~nobody here/a.toml"
    ]


def test_words_that_are_no_text_are_refused():
    """A run could not write them into its config.toml."""
    assert problems("--job.dump_folder=a\udcff") == [
        "command line: '--job.dump_folder=a\\udcff': not UTF-8 text"
    ]


def test_a_missing_file_lists_similar_ones(write):
    Path("train_configs").mkdir()
    write("", "train_configs/emoji_tiny.toml")
    [line] = problems("--job.config_file", "train_configs/emoji_tny.toml")
    assert line.startswith("train_configs/emoji_tny.toml: no such file (looked in ")
    assert line.endswith("; similar: train_configs/emoji_tiny.toml")
    assert problems("--job.config_file", "qqq.toml")[0].endswith("; there are train_configs/emoji_tiny.toml")
    assert problems("--job.config_file", "train_configs")[0].startswith("train_configs: cannot be read: ")


def test_overrides_of_a_file_that_cannot_be_read_are_not_blamed(write):
    found = problems("--job.config_file", "none.toml", "--data.sources.1.path", "x")
    assert len(found) == 1
    assert found[0].startswith("none.toml: no such file")


def test_help_lists_every_key_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        load_config(["--training.steps", "x", "--help"])
    assert stopped.value.code == 0
    page = capsys.readouterr().out
    words = page.split()
    for section, field in JobConfig.model_fields.items():
        assert f"[{section}]" in words
        for key, inner in field.annotation.model_fields.items():
            assert f"--{section}.{key}" in words
            assert " ".join((inner.description or "").split()) in " ".join(words)
    assert max(map(len, page.splitlines())) <= 110
    assert any(
        line.split(maxsplit=1) == ["--training.steps", "an integer >= 1; default 10000"]
        for line in page.splitlines()
    )


def test_help_for_one_section(capsys):
    for word in ("ema", "ema.enable", "--ema"):
        with pytest.raises(SystemExit):
            load_config(["--help", word.removeprefix("--")])
        page = capsys.readouterr().out
        assert page.startswith("[ema]\n")
        assert "[job]" not in page
    assert problems("--help", "emma") == ["--help: emma: unknown section; did you mean ema?"]
