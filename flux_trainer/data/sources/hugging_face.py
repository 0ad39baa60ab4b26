"""Samples from a Hugging Face data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.sources.base import RawSample, checked, read


class HuggingFaceSource:
    """A split of a Hugging Face data set, from the hub or from a folder written by `save_to_disk`."""

    def __init__(self, path: str, split: str, image_key: str, caption_key: str) -> None:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise DataError(
                'A source of type "hf" needs the package datasets: pip install "flux_trainer[hf]"'
            ) from error
        self.name = f"hf {path} ({split})"
        self.image_key, self.caption_key = image_key, caption_key
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            table: Any = datasets.load_from_disk(path)
            if isinstance(table, datasets.DatasetDict):
                if split not in table:
                    raise DataError(f'{path} has no split "{split}"; it has: {", ".join(table)}.')
                table = table[split]
        else:
            table = datasets.load_dataset(path, split=split)
        for key, setting in ((image_key, "image_key"), (caption_key, "caption_key")):
            if key not in table.column_names:
                columns = ", ".join(table.column_names)
                raise DataError(f'{self.name} has no column "{key}"; it has: {columns}. Set {setting}.')
        table = table.select_columns([image_key, caption_key])
        self.table = table.cast_column(image_key, datasets.Image(decode=False))  # rows give the file's bytes
        self.fingerprint = f"{len(table)} rows"

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> RawSample:
        row = self.table[index]
        image = row[self.image_key]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise BadSample("no image")
        data = image["bytes"] if image["bytes"] is not None else read(image["path"])
        caption = checked(row[self.caption_key], f'"{self.caption_key}"')
        return RawSample(data, caption, image["path"] or f"row {index}")
