"""Folders that a run cannot write to, and what lies where its checkpoints will: named before it starts."""

from pathlib import Path

import pytest

from flux_trainer.config.load import load_config
from flux_trainer.config.outputs import folders_of_one_run, unusable_outputs

ALL = [
    "--checkpoint.enable",
    "--checkpoint.export=bfl",
    "--validation.enable",
    "--validation.prompts=a",
    "--metrics.enable_tensorboard",
    "--profiling.enable_profiling",
    "--profiling.enable_memory_snapshot",
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def found(*flags: str) -> list[tuple[str, str]]:
    return list(unusable_outputs(load_config(["--job.dump_folder=run", *flags])))


def test_nothing_is_wrong_with_a_new_folder():
    assert found(*ALL) == []
    assert list(Path().iterdir()) == []


def test_a_dump_folder_that_cannot_be_made_is_said_once():
    Path("file").touch()
    sentence = f"cannot be used: {Path('file').absolute()} is a file; name a folder"
    assert found(*ALL, "--job.dump_folder=file/x") == [("job.dump_folder", sentence)]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("checkpoint.folder", "checkpoint"),
        ("checkpoint.export", "export"),
        ("validation.save_img_folder", "img"),
        ("metrics.save_tb_folder", "tb"),
        ("profiling.save_traces_folder", "profile_traces"),
        ("profiling.save_memory_snapshot_folder", "memory_snapshot"),
    ],
)
def test_each_folder_is_named_by_its_setting_if_the_run_writes_into_it(key, name):
    Path("run").mkdir()
    (Path("run") / name).symlink_to("unmounted")
    [(got, sentence)] = found(*ALL)
    assert got == key
    place = Path("run").absolute() / name
    assert sentence.startswith(f"cannot be used: {place} is a link to unmounted, which is not there")
    assert found() == []


def test_what_lies_where_a_checkpoint_will_be_is_named():
    flags = ["--checkpoint.enable", "--checkpoint.interval=10", "--training.steps=45"]
    checkpoints = Path("run/checkpoint")
    for step in (10, 20):
        (checkpoints / f"step-{step}").mkdir(parents=True)
    for name in (
        "step-5",
        "step-30.old-backup",
        "step-50",
        "step-30x",
        "step-030",
    ):  # no checkpoint will be called so
        (checkpoints / name).touch()
    (checkpoints / "step-20/manifest.json").touch()
    assert found(*flags) == [], "step 10 is past"
    (checkpoints / "step-30").touch()  # a file
    (checkpoints / "step-33").mkdir()  # a signal may stop the run there
    (checkpoints / "step-40").mkdir()  # as of an interrupted copy
    (checkpoints / "step-45").symlink_to("unmounted")
    names = [sentence.split(",")[0] for key, sentence in found(*flags) if key == "checkpoint.folder"]
    assert names == [f"holds run/checkpoint/step-{step}" for step in (30, 33, 40, 45)]
    [(key, _), *_] = found(*flags, "--checkpoint.load_step=15")
    assert key == "checkpoint.load_step"
    assert found("--checkpoint.no-enable") == []


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        (["--checkpoint.enable"], ["job.dump_folder"]),
        (["--checkpoint.enable", "--checkpoint.folder=../big"], ["job.dump_folder", "checkpoint.folder"]),
        (["--checkpoint.enable", "--checkpoint.folder=linked"], ["job.dump_folder", "checkpoint.folder"]),
        (["--checkpoint.folder=../big"], ["job.dump_folder"]),
    ],
)
def test_what_belongs_to_one_run(flags, keys):
    for name in ("run", "big"):
        Path(name).mkdir()
    Path("run/linked").symlink_to("../big")
    found = list(folders_of_one_run(load_config(["--job.dump_folder=run", *flags])))
    assert [key for key, _ in found] == keys
    assert found[-1][1].resolve().name == ("big" if len(keys) == 2 else "run")
