"""Brings FLUX.1's two tokenizers into `assets/tokenizers/`: CLIP's byte pairs, T5's sentencepiece model.

Both are taken from the wheel of diffsynth 1.1.9 on PyPI (Apache-2.0), which is downloaded and verified but
not installed. Only the files that transformers needs are kept: it rebuilds T5's `tokenizer.json` (2.4 MB)
from `spiece.model`, with the same ids.

Run from anywhere (12 MB are downloaded):

    python assets/build_tokenizers.py
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "diffsynth==1.1.9"
SHA256 = "9a47387385840e11537613f319cb01ac7d1ac24073ea4a42454c839f11c6d7cc"
SOURCE = "diffsynth/tokenizer_configs/flux"
FILES = {
    "clip": (f"{SOURCE}/tokenizer_1", ("vocab.json", "merges.txt", "tokenizer_config.json")),
    "t5": (f"{SOURCE}/tokenizer_2", ("spiece.model", "tokenizer_config.json")),
}
LICENSE = "diffsynth-1.1.9.dist-info/LICENSE"


def main() -> None:
    out = Path(__file__).parent / "tokenizers"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"{wheel.name} has sha256 {found}, expected {SHA256}: not using it.")
        with zipfile.ZipFile(wheel) as archive:
            for name, (source, files) in FILES.items():
                (out / name).mkdir(parents=True, exist_ok=True)
                for file in files:
                    (out / name / file).write_bytes(archive.read(f"{source}/{file}"))
                (out / name / "LICENSE").write_bytes(archive.read(LICENSE))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
