"""A checkpoint's table of contents is read without running what it says."""

import contextlib
import io
import os
import pickle
import random
import resource
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from flux_trainer.checkpoint.errors import CheckpointError
from flux_trainer.checkpoint.metadata import METADATA, TensorsOnly, read_metadata
from flux_trainer.checkpoint.tensors import read_tensors, write_tensors

TENSORS = {
    "img_in.weight": torch.arange(12.0).view(4, 3),
    "optimizer.state.img_in.weight.step": torch.tensor(7.0),
    "bf16": torch.ones(5, dtype=torch.bfloat16),
    "counts": torch.arange(3),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "step-1", TENSORS, None)
    return tmp_path / "step-1"


class Attack:
    """Unpickles by calling a function with arguments of its choice."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def plain(folder: Path) -> Metadata:
    """The table as DCP itself would read it."""
    return pickle.loads((folder / METADATA).read_bytes())


def same(a: Metadata, b: Metadata) -> bool:
    return a.state_dict_metadata == b.state_dict_metadata and a.storage_data == b.storage_data


def test_a_real_table_reads_as_with_plain_pickle(folder):
    table = read_metadata(folder)
    assert same(table, plain(folder))
    assert set(table.state_dict_metadata) == set(TENSORS)


def test_tensors_come_back(folder):
    got = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    read_tensors(folder, got, None)
    for name, tensor in TENSORS.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("function", "named"),
    [(os.system, "posix.system"), (eval, "builtins.eval"), (torch.load, "torch.serialization.load")],
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_malicious_table_is_refused_and_not_run(folder, tmp_path, function, named, inside):
    attack = Attack(
        function, f"touch {tmp_path}/owned" if function is os.system else f"open('{tmp_path}/owned', 'w')"
    )
    table = plain(folder)
    table.planner_data = attack
    (folder / METADATA).write_bytes(pickle.dumps(table if inside else attack))
    with pytest.raises(CheckpointError, match=f"it names {named}, which no table"):
        read_metadata(folder)
    with pytest.raises(CheckpointError, match=f"it names {named}"):
        read_tensors(folder, {"img_in.weight": torch.zeros(4, 3)}, None)
    assert not (tmp_path / "owned").exists()


def test_a_table_that_points_outside_the_folder_is_refused(folder):
    table = plain(folder)
    next(iter(table.storage_data.values())).relative_path = "../secret"
    (folder / METADATA).write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match=r"lies outside the folder, at '\.\./secret'"):
        read_metadata(folder)


def test_something_else_than_a_table_is_refused(folder):
    (folder / METADATA).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="no table of contents"):
        read_metadata(folder)
    (folder / METADATA).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        read_metadata(folder)


@pytest.fixture
def memory_limit():
    """A flipped bit can make pickle ask for gigabytes (a run's own table is hashed before it is read)."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("memory_limit")
def test_broken_tables_raise_nothing_but_our_error(folder):
    content = (folder / METADATA).read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        broken = bytearray(content[: rng.choice([len(content), rng.randrange(len(content))])])
        if broken:
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        (folder / METADATA).write_bytes(broken)
        with contextlib.suppress(CheckpointError):
            assert isinstance(read_metadata(folder), Metadata)


def test_entries_that_are_not_tensors_are_refused_and_not_run(tmp_path):
    dcp.save({"x": Attack(os.system, f"touch {tmp_path}/owned")}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert isinstance(read_metadata(tmp_path / "c").state_dict_metadata["x"], BytesStorageMetadata)
    with pytest.raises(CheckpointError, match="x is not a tensor"):
        read_tensors(tmp_path / "c", {"x": torch.zeros(1)}, None)
    item = ReadItem(
        LoadItemType.BYTE_IO, *[dcp.metadata.MetadataIndex("x"), torch.Size([0])] * 2, torch.Size([0])
    )
    with pytest.raises(CheckpointError, match="could run foreign code"):
        TensorsOnly().load_bytes(item, io.BytesIO())
    assert not (tmp_path / "owned").exists()


def test_a_malicious_tensor_file_is_refused_and_not_run(folder, tmp_path):
    table = plain(folder)
    index, place = next((i, p) for i, p in table.storage_data.items() if i.fqn == "counts")
    attack = io.BytesIO()
    torch.save(Attack(os.system, f"touch {tmp_path}/owned"), attack)
    (folder / "attack").write_bytes(attack.getvalue())
    place.relative_path, place.offset, place.length = "attack", 0, len(attack.getvalue())
    assert isinstance(table.state_dict_metadata[index.fqn], TensorStorageMetadata)
    (folder / METADATA).write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match="Weights only load failed"):
        read_tensors(folder, {"counts": torch.zeros(3, dtype=torch.int64)}, None)
    assert not (tmp_path / "owned").exists()


def test_mismatches_are_listed_before_anything_is_read(folder):
    table = plain(folder)
    table.state_dict_metadata["counts"].chunks.clear()
    (folder / METADATA).write_bytes(pickle.dumps(table))
    got = {
        "img_in.weight": torch.zeros(4, 2),
        "bf16": torch.zeros(5, dtype=torch.bfloat16),
        "counts": torch.zeros(3),
        "new": torch.zeros(1),
    }
    sentence = r"img_in\.weight has shape \[4, 3\], here \[4, 2\]; counts is incomplete; new is missing\."
    with pytest.raises(CheckpointError, match=sentence):
        read_tensors(folder, got, None)
    assert got["bf16"].eq(0).all()
