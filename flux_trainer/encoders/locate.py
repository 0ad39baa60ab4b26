"""Where an encoder's or tokenizer's files are: a local folder, or the Hugging Face hub.

Everything else in this layer reads from a local folder. A missing file is reported with the setting that
names it, the places that were searched, and a command that brings it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

HINTS = {
    "t5": (
        "FLUX.1's T5 as safetensors (google/t5-v1_1-xxl has none on its main branch), with its tokenizer: "
        "`hf download black-forest-labs/FLUX.1-dev --include '*_2/*' --local-dir assets/hf/FLUX.1-dev` "
        "(accept its licence on the hub first), then encoder.t5_encoder = "
        '"assets/hf/FLUX.1-dev/text_encoder_2".'
    ),
    "clip": (
        "FLUX.1's CLIP with its tokenizer: `hf download openai/clip-vit-large-patch14 config.json "
        "model.safetensors vocab.json merges.txt tokenizer_config.json "
        "--local-dir assets/hf/clip-vit-large-patch14`, then encoder.clip_encoder = "
        '"assets/hf/clip-vit-large-patch14".'
    ),
    "llm": (
        "FLUX.2's language model as safetensors, with its tokenizer.json (Mistral's tekken.json is not "
        "read): `hf download black-forest-labs/FLUX.2-klein-4B --include 'text_encoder/*' "
        "--include 'tokenizer/*' --local-dir assets/hf/FLUX.2-klein-4B`, then encoder.llm_encoder = "
        '"assets/hf/FLUX.2-klein-4B/text_encoder"; for klein 9B and dev the same of '
        "black-forest-labs/FLUX.2-klein-9B and FLUX.2-dev (accept their licences on the hub first)."
    ),
}
"""How to get each encoder."""


def locate(spec: str, key: str, files: Sequence[str], hint: str) -> Path:
    """The local folder that `spec` stands for; a hub id is fetched into the hub's cache first.

    Args:
        spec: a folder, or a hub id `owner/name`. A folder that exists wins.
        key: the setting `spec` comes from, for error messages (`encoder.t5_encoder`).
        files: names (with `*`) of the files to fetch from the hub; a local folder is taken as it is.
        hint: how to get the files, the end of the error message.

    Raises:
        FileNotFoundError: there is no such folder, and the hub does not give one.
    """
    if not spec:
        raise FileNotFoundError(f"{key} is empty: it must name a folder or a hub id. {hint}")
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise FileNotFoundError(
            f"{key} is {spec!r}, which is a file: name the folder that holds it with its config.json "
            f"or the tokenizer's other files. {hint}"
        )
    where = f"{key} is {spec!r}, but there is no folder {folder.absolute()}"
    if not HUB_ID.fullmatch(spec):
        raise FileNotFoundError(f"{where}. Give an existing folder, or a hub id like 'owner/name'. {hint}")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        # One request says what there is; without a network it fails at once, and cached files are used.
        return Path(snapshot_download(spec, allow_patterns=list(files)))
    except (EntryNotFoundError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{where}, and the Hugging Face hub did not give it ({reason}). {hint}"
        ) from error
