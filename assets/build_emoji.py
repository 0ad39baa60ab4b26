"""Builds `assets/emoji/`: 1854 captioned pictures from two npm packages, fetched and verified here.

Pictures: Microsoft's Fluent 3D emoji (MIT), as packed in @lobehub/fluent-emoji-3d. Captions, keywords and
groups: Unicode CLDR (Unicode licence), as packed in emojibase-data (MIT). Skin-tone variants are left out.

Run from anywhere, with npm and Pillow installed (22 MB are downloaded, half a minute):

    python assets/build_emoji.py
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from pathlib import Path

from PIL import Image

# npm package, sha256 of its tarball
PICTURES = (
    "@lobehub/fluent-emoji-3d@1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
LABELS = "emojibase-data@17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"

SIZE = 128  # pixels
WEBP_QUALITY = 85
HELD_OUT_ONE_IN = 20


def fetch(package: str, sha256: str, folder: Path) -> Path:
    """The package's tarball in `folder`; stops if its bytes are not the ones this script was written for."""
    subprocess.run(
        ["npm", "pack", "--silent", package, "--pack-destination", str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    name, _, version = package.lstrip("@").replace("/", "-").rpartition("@")
    path = folder / f"{name}-{version}.tgz"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{package} has sha256 {found}, expected {sha256}: not using it.")
    return path


def read_json(tarball: Path, member: str) -> object:
    with tarfile.open(tarball) as tar:
        file = tar.extractfile(member)
        assert file is not None
        return json.load(file)


def plain_code(code: str) -> str:
    """`2764-FE0F` -> `2764`: the two packages disagree about the optional variation selector."""
    return code.lower().replace("-fe0f", "")


def slug(label: str) -> str:
    """`person: curly hair` -> `person-curly-hair`."""
    ascii_label = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_label.lower()).strip("-")


def held_out(label: str) -> bool:
    """Whether a picture is for validation: a property of its label alone, true for about one in twenty."""
    return int(hashlib.sha256(label.encode()).hexdigest()[:8], 16) % HELD_OUT_ONE_IN == 0


def on_white(data: bytes) -> Image.Image:
    """The picture composed on white at SIZE x SIZE."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    background = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(background, picture).convert("RGB")
    return flat.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def build(pictures: Path, labels: Path, out: Path) -> None:
    emoji = read_json(labels, "package/en/data.json")
    messages = read_json(labels, "package/en/messages.json")
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    by_code = {plain_code(entry["hexcode"]): entry for entry in emoji}

    shutil.rmtree(out / "images", ignore_errors=True)
    (out / "images").mkdir(parents=True)
    names: set[str] = set()
    splits: dict[str, list[tuple[int, dict[str, object]]]] = {"train": [], "validation": []}
    with tarfile.open(pictures) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            code = plain_code(Path(member.name).stem)
            if not member.name.endswith(".webp") or code not in by_code:
                continue  # a skin-tone variant, or a picture without a label
            entry = by_code[code]
            name = slug(entry["label"])
            if not name or name in names:
                name = f"{name}-{code}".lstrip("-")
            names.add(name)
            file = tar.extractfile(member)
            assert file is not None
            on_white(file.read()).save(out / "images" / f"{name}.webp", quality=WEBP_QUALITY, method=6)
            line = {
                "file_name": f"images/{name}.webp",
                "text": entry["label"].lower(),
                "group": groups.get(entry.get("group"), ""),
                "tags": entry.get("tags", []),
            }
            split = "validation" if held_out(entry["label"].lower()) else "train"
            splits[split].append((entry.get("order", 0), line))
    for split, lines in splits.items():
        lines.sort(key=lambda pair: pair[0])  # Unicode's order: faces, people, animals, food, ...
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for _, line in lines)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{split}: {len(lines)} pictures")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pictures = fetch(*PICTURES, Path(folder))
        labels = fetch(*LABELS, Path(folder))
        build(pictures, labels, Path(__file__).parent / "emoji")


if __name__ == "__main__":
    main()
