"""Tensors are read from files right into their place, wherever DCP's own reader would put the same values."""

import io
import pickle
import zipfile
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from flux_trainer.checkpoint.errors import CheckpointError
from flux_trainer.checkpoint.metadata import METADATA, SafeReader
from flux_trainer.checkpoint.plan import Part, ReadPlan
from flux_trainer.checkpoint.tensors import read_tensors, write_tensors

SAVED = {
    "matrix": torch.arange(35.0).view(7, 5),
    "transposed": torch.arange(35.0).view(5, 7).t(),
    "rows": torch.arange(70.0).view(14, 5)[3:10],
    "cube": torch.arange(24, dtype=torch.int64).view(2, 3, 4),
    "bf16": torch.arange(9.0).bfloat16(),
    "step": torch.tensor(7.0),
}


@pytest.fixture
def folder(tmp_path):
    write_tensors(tmp_path / "step-1", SAVED, None)
    return tmp_path / "step-1"


@pytest.fixture
def copied(monkeypatch) -> list[str]:
    """Names that DCP's own reader is asked for."""
    names: list[str] = []
    original: Callable = FileSystemReader.read_data

    def read_data(self, plan, planner):
        names.extend(item.storage_index.fqn for item in plan.items)
        return original(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", read_data)
    return names


def read_box(folder, name: str, offsets: tuple[int, ...], target: Tensor) -> None:
    reader = SafeReader(folder)
    table = reader.read_metadata()
    reader.set_up_storage_reader(table, is_coordinator=True)
    chunk = ChunkStorageMetadata(torch.Size(offsets), target.shape)
    plan = ReadPlan({MetadataIndex(name, chunk.offsets): Part(name, SAVED[name].shape, chunk, target)})
    plan.set_up_planner({}, table, is_coordinator=True)
    reader.read_data(plan.create_local_plan(), plan).wait()


def test_whole_tensors_are_read_into_their_place(folder, copied):
    got = {name: torch.full_like(tensor, -1).contiguous() for name, tensor in SAVED.items()}
    places = {name: tensor.data_ptr() for name, tensor in got.items()}
    read_tensors(folder, got, None)
    for name, tensor in SAVED.items():
        assert torch.equal(got[name], tensor), name
        assert got[name].data_ptr() == places[name]
    assert copied == ["transposed"]


@pytest.mark.parametrize(
    ("name", "offsets", "sizes", "run"),
    [
        ("matrix", (2, 0), (3, 5), True),
        ("matrix", (6, 1), (1, 3), True),
        ("matrix", (2, 1), (3, 4), False),
        ("transposed", (2, 1), (3, 4), False),
        ("rows", (6, 0), (1, 5), True),
        ("cube", (1, 1, 0), (1, 2, 4), True),
        ("cube", (0, 1, 0), (2, 2, 4), False),
        ("bf16", (3,), (4,), True),
    ],
)
def test_boxes(folder, copied, name, offsets, sizes, run):
    target = torch.full(sizes, -1, dtype=SAVED[name].dtype)
    read_box(folder, name, offsets, target)
    box = SAVED[name]
    for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        box = box.narrow(dim, start, size)
    assert torch.equal(target, box)
    assert copied == ([] if run else [name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_targets_of_other_strides_and_dtypes(folder, copied, dtype):
    around = torch.full((3, 9), -1.0, dtype=dtype)
    read_box(folder, "matrix", (1, 0), around[:, 2:7])
    assert torch.equal(around[:, 2:7], SAVED["matrix"][1:4].to(dtype))
    assert around[:, :2].eq(-1).all()
    assert around[:, 7:].eq(-1).all()
    assert copied == []


def test_an_archive_that_promises_more_than_it_has_is_refused(folder):
    """Its elements would be read from beyond its end: from another tensor's bytes."""
    whole, cut = io.BytesIO(), io.BytesIO()
    torch.save(torch.arange(300.0), whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(cut, "w") as target:
        for entry in source.namelist():
            content = source.read(entry)
            target.writestr(entry, content[:24] if entry.endswith("data/0") else content)
    (folder / "cut").write_bytes(cut.getvalue() + bytes(2000))
    table = pickle.loads((folder / METADATA).read_bytes())
    place = next(place for index, place in table.storage_data.items() if index.fqn == "bf16")
    place.relative_path, place.offset, place.length = "cut", 0, len(cut.getvalue())
    entry = table.state_dict_metadata["bf16"]
    entry.size = entry.chunks[0].sizes = torch.Size([300])
    (folder / METADATA).write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match="bf16 is cut off in cut"):
        read_tensors(folder, {"bf16": torch.zeros(300)}, None)
