"""Settings that name files and folders: all of them know the home folder."""

from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from flux_trainer.config.fields import leaves
from flux_trainer.config.load import ConfigError, load_config
from flux_trainer.config.section import PathName

# Every other text: a new setting goes into this list, or is a path.
TEXTS = {
    "activation_checkpoint.double_blocks",
    "activation_checkpoint.selective_ac_option",
    "activation_checkpoint.single_blocks",
    "compile.backend",
    "inference.negative_prompt",
    "inference.prompts",
    "inference.sizes",
    "job.description",
    "quantize.filter",
    "quantize.skip",
    "validation.prompts",
    *(
        f"{section}.sources.0.{key}"
        for section in ("data", "validation")
        for key in ("split", "image_key", "caption_key", "reference_key")
    ),
}
EXPAND = get_args(PathName)[1]
FIELDS = {".".join(path): field for path, field in leaves()}
PATHS = [
    name
    for name, field in FIELDS.items()
    if EXPAND in field.metadata or any(EXPAND in get_args(item) for item in get_args(field.annotation))
]


def is_text(field: FieldInfo) -> bool:
    return any(field.annotation == kind for kind in (str, list[str], list[PathName]))


def test_every_text_is_a_path_or_known_to_be_none():
    assert {name for name, field in FIELDS.items() if is_text(field)} == {*PATHS, *TEXTS}
    assert not TEXTS.intersection(PATHS)


@pytest.mark.parametrize("key", PATHS)
def test_the_home_folder_is_known_everywhere(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--data.sources.0.type=folder", "--validation.sources.0.type=folder"]
    section: Any = load_config([*flags, f"--{key}=~/a/~b"])
    for name in key.split("."):
        section = section[0] if name == "0" else getattr(section, name)
    assert section in (f"{tmp_path}/a/~b", [f"{tmp_path}/a/~b"])
    with pytest.raises(ConfigError) as caught:
        load_config([*flags, f"--{key}=~stranger/a"])
    [line] = caught.value.problems
    assert line.startswith(f"command line: {key}")
    assert ' = "~stranger/a": ~stranger is no known home folder; ' in line


def test_a_name_that_begins_so_can_be_written():
    assert load_config(["--job.dump_folder=./~a"]).job.dump_folder == "./~a"
