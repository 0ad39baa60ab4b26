"""Saving and going on in a world of one: what comes back, what is refused, what is kept, what is repaired."""

import logging
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from flux_trainer.checkpoint import manager as manager_module
from flux_trainer.checkpoint.errors import CheckpointError, DamagedError
from flux_trainer.checkpoint.load import load_model
from flux_trainer.checkpoint.manager import CheckpointManager
from flux_trainer.config.schema import Checkpoint

ALONE = SimpleNamespace(rank=0, checkpoint=None)
IDENTITY = {"seed": 1, "global_batch_size": 8}


def tensors(value: float) -> dict[str, torch.Tensor]:
    weight = torch.full((5, 3), float(value))
    return {
        "img_in.weight": torch.nn.Parameter(weight.clone()),
        "optimizer.state.img_in.weight.exp_avg": weight / 2,
        "optimizer.state.img_in.weight.step": torch.tensor(float(value)),
        "ema.img_in.weight": weight * 2,
        "guard.skipped": torch.tensor(int(value)),
    }


def make(folder, **settings) -> CheckpointManager:
    return CheckpointManager(Checkpoint(enable=True, **settings), folder, ALONE)


def save(manager: CheckpointManager, step: int, **state) -> float:
    return manager.save(step, tensors(step), {"step": step, "identity": IDENTITY, **state})


def names(manager: CheckpointManager) -> list[str]:
    return sorted(path.name for path in manager.folder.iterdir())


def holds(got: dict[str, torch.Tensor], step: float) -> bool:
    return all(torch.equal(got[name], tensor) for name, tensor in tensors(step).items())


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_later_run_goes_on_from_the_newest(tmp_path, mode):
    manager = make(tmp_path, async_mode=mode)
    for step in (9, 10):
        save(manager, step, loss=0.1 + 0.2)
    manager.close()
    got = tensors(0)
    state = make(tmp_path).resume(got, IDENTITY)
    assert state == {"step": 10, "identity": IDENTITY, "loss": 0.1 + 0.2}
    assert holds(got, 10)
    assert names(manager) == ["step-10", "step-9"]
    assert manager.last.step == 10
    assert manager.last.bytes == sum(
        file.stat().st_size for file in (manager.folder / "step-10").iterdir() if file.name != "manifest.json"
    )


def test_a_fresh_run_has_nothing_to_go_on_from(tmp_path):
    manager = make(tmp_path)
    assert manager.latest() is None
    assert manager.resume(tensors(0), IDENTITY) is None


def test_disabled_checkpoints_leave_no_folder(tmp_path):
    CheckpointManager(Checkpoint(), tmp_path, ALONE).close()
    assert list(tmp_path.iterdir()) == []


def test_old_ones_are_deleted_but_never_the_one_just_written(tmp_path):
    manager = make(tmp_path, keep_latest_k=2)
    for step in (10, 20, 30):
        save(manager, step)
    assert names(manager) == ["step-20", "step-30"]
    save(manager, 15)  # the run went back
    assert names(manager) == ["step-15", "step-20", "step-30"]
    keeps_all = make(tmp_path / "all", keep_latest_k=0)
    for step in range(1, 5):
        save(keeps_all, step)
    assert len(names(keeps_all)) == 4


def test_an_old_one_that_lies_elsewhere_loses_its_link_alone(tmp_path):
    manager = make(tmp_path, keep_latest_k=2)
    for step in (1, 2):
        save(manager, step)
    (manager.folder / "step-1").rename(tmp_path / "big")
    (manager.folder / "step-1").symlink_to(tmp_path / "big")
    save(manager, 3)
    assert names(manager) == ["step-2", "step-3"]
    assert len(list((tmp_path / "big").iterdir())) == 4
    assert make(tmp_path, keep_latest_k=2).resume(tensors(0), IDENTITY)["step"] == 3


def test_load_step_goes_back_and_says_so(tmp_path, caplog):
    manager = make(tmp_path)
    for step in (1, 2, 3):
        save(manager, step)
    got = tensors(0)
    with caplog.at_level(logging.WARNING, "flux_trainer"):
        assert make(tmp_path, load_step=2).resume(got, IDENTITY)["step"] == 2
    assert holds(got, 2)
    assert "there are checkpoints up to step 3" in caplog.text
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 in .*; steps there: 1, 2, 3\."):
        make(tmp_path, load_step=7).resume(got, IDENTITY)


def test_other_settings_are_refused_unless_forced(tmp_path):
    save(make(tmp_path), 1)
    got = tensors(0)
    changed = {"seed": 2, "global_batch_size": 8}
    sentence = "seed 1 in the checkpoint, 2 now; set --checkpoint.force_resume to go on"
    with pytest.raises(CheckpointError, match=sentence):
        make(tmp_path).resume(got, changed)
    assert holds(got, 0)
    assert make(tmp_path, force_resume=True).resume(got, changed)["step"] == 1
    assert holds(got, 1)


def test_names_shapes_and_dtypes_must_be_the_same(tmp_path):
    save(make(tmp_path), 1)
    got = tensors(0)
    got["ema.new"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"step-1 does not fit: ema\.new is missing\."):
        make(tmp_path).resume(got, IDENTITY)
    got = tensors(0)
    del got["guard.skipped"]
    got["img_in.weight"] = got["img_in.weight"].detach().bfloat16()
    sentence = "guard.skipped is not in this run; img_in.weight is torch.float32, here torch.bfloat16"
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        make(tmp_path).resume(got, IDENTITY)


def damage(manager: CheckpointManager, step: int) -> None:
    path = manager.folder / f"step-{step}" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_newest_is_set_aside_and_the_one_before_taken(tmp_path, caplog):
    manager = make(tmp_path)
    for step in (1, 2, 3):
        save(manager, step)
    damage(manager, 2)
    damage(manager, 3)
    got = tensors(0)
    with caplog.at_level(logging.ERROR, "flux_trainer"):
        assert make(tmp_path).resume(got, IDENTITY)["step"] == 1
    assert holds(got, 1)
    assert "step-3 is damaged: __0_0.distcp (content changed). It is now called step-3.damaged" in caplog.text
    assert names(manager) == ["step-1", "step-2.damaged", "step-3.damaged"]


def test_when_all_are_damaged_no_run_starts_afresh_unasked(tmp_path):
    manager = make(tmp_path)
    save(manager, 1)
    damage(manager, 1)
    for _ in range(2):  # nor when the command is given again
        with pytest.raises(CheckpointError, match=r"no whole checkpoint left, only step-1\.damaged"):
            make(tmp_path).resume(tensors(0), IDENTITY)


def test_a_damaged_load_step_is_an_error_and_stays(tmp_path):
    manager = make(tmp_path)
    save(manager, 1)
    save(manager, 2)
    damage(manager, 2)
    with pytest.raises(DamagedError, match="step-2 is damaged"):
        make(tmp_path, load_step=2).resume(tensors(0), IDENTITY)
    assert names(manager) == ["step-1", "step-2"]


def test_weights_alone_can_start_another_run(tmp_path):
    manager = make(tmp_path)
    save(manager, 3)
    parameters = {"img_in.weight": torch.zeros(5, 3, dtype=torch.bfloat16)}
    load_model(manager.folder / "step-3", parameters)
    assert parameters["img_in.weight"].eq(3).all()
    with pytest.raises(CheckpointError, match=r"does not fit: img_in\.weight is not in this model"):
        load_model(manager.folder / "step-3", {"txt_in.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"Give a step-N folder\."):
        load_model(manager.folder, parameters)


def test_an_asynchronous_save_keeps_the_values_of_its_moment(tmp_path, monkeypatch):
    go = threading.Event()
    publish = manager_module.commit.publish
    write = manager_module.write_tensors
    monkeypatch.setattr(manager_module, "write_tensors", lambda *args: (go.wait(10), write(*args)))
    monkeypatch.setattr(manager_module.commit, "publish", lambda *args: (time.sleep(0.2), publish(*args)))
    manager = make(tmp_path, async_mode="async")
    live = tensors(5)
    state = {"step": 5, "list": [1]}
    blocked = manager.save(5, live, state)
    with torch.no_grad():
        for tensor in live.values():
            tensor.zero_()
    state["list"].append(2)
    assert names(manager) == [] or names(manager)[0].startswith("step-5.tmp-")
    go.set()
    assert manager.latest() == 5  # waits for the writing thread
    got = tensors(0)
    assert manager.load(got, 5) == {"step": 5, "list": [1]}
    assert holds(got, 5)
    assert manager.last.blocked_seconds == blocked
    assert blocked < 0.1 < 0.2 < manager.last.total_seconds
    manager.close()


def test_a_second_asynchronous_save_waits_for_the_first(tmp_path, monkeypatch):
    write = manager_module.write_tensors
    monkeypatch.setattr(manager_module, "write_tensors", lambda *args: (time.sleep(0.3), write(*args)))
    manager = make(tmp_path, async_mode="async")
    assert save(manager, 1) < 0.2
    assert save(manager, 2) > 0.25
    manager.close()
    got = tensors(0)
    manager = make(tmp_path)
    for step in (1, 2):  # the host copies are used again, yet the first save kept its values
        manager.load(got, step)
        assert holds(got, step)


def test_an_error_of_the_writing_thread_is_raised_at_the_next_call(tmp_path, monkeypatch):
    manager = make(tmp_path, async_mode="async")

    def fail(*args):
        raise OSError("the disk is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(manager_module.commit, "publish", fail)
        save(manager, 1)
        with pytest.raises(CheckpointError, match="the disk is on fire"):
            save(manager, 2)
    save(manager, 3)
    manager.close()
    assert names(manager) == ["step-3"]


def test_a_state_that_is_no_json_is_refused_at_once(tmp_path):
    manager = make(tmp_path, async_mode="async")
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(manager, 1, bad=torch.zeros(1))
    assert names(manager) == []
