"""What lies below a folder of images: the images, their captions, and what is passed over.

Links to folders are followed, and each folder is listed once: by its own path if it has one below the folder,
else by the first link to it in the order of paths. So loops do no harm, and the file system's order is free.
"""

from __future__ import annotations

import os
from collections import Counter

from flux_trainer.data.bad import DataError
from flux_trainer.data.image import EXTENSIONS

CAPTION = ".txt"
_MADE_BY_SYSTEMS = ("@eaDir", "__MACOSX")  # a Synology's thumbnails, what zip files of macOS leave behind


class Listing:
    """The image files below a folder.

    `images`: paths relative to the folder, sorted.
    `captions`: for stems whose caption has its suffix in other letters than `.txt`, the caption's path.
    `passed_over`: how many there are of what is neither.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, root: str) -> None:
        check_folder(root)
        self.root = root
        self.images: list[str] = []
        self.captions: dict[str, str] = {}
        self.passed_over: Counter[str] = Counter()
        self._seen: set[str] = set()  # real paths of folders
        self._plain: set[str] = set()  # stems of captions in .txt
        links = [""]  # first the folder itself, then the links found in it, then those found in them
        while links:
            links = sorted(link for top in links for link in self._walk(top))
        self.images.sort()
        for stem in self._plain & self.captions.keys():
            del self.captions[stem]
        captions = self._plain | self.captions.keys()
        if unpaired := len(captions.difference(os.path.splitext(image)[0] for image in self.images)):
            self.passed_over[f"unpaired {CAPTION} file"] = unpaired

    def _walk(self, top: str) -> list[str]:
        """List the folder or link `top` and all folders below it; returns the links to folders among them."""
        start = os.path.join(self.root, top)
        real = os.path.realpath(start)
        if top and _contains(real, os.path.realpath(os.path.dirname(start))):
            self.passed_over["looping link"] += 1
            return []
        if real in self._seen:
            self.passed_over["repeated link"] += 1
            return []
        links: list[str] = []
        for path, folders, files in os.walk(start, onerror=self._unreadable):
            real = os.path.realpath(path)
            if real in self._seen:  # an earlier link has led there
                folders.clear()
                continue
            self._seen.add(real)
            below = os.path.relpath(path, self.root)
            below = "" if below == os.curdir else below
            for name in [name for name in folders if _hidden(name)]:
                folders.remove(name)
                self.passed_over["hidden folder"] += 1
            linked = [name for name in folders if os.path.islink(os.path.join(path, name))]
            links += [os.path.join(below, name) for name in linked]
            folders[:] = [name for name in folders if name not in linked]
            for name in files:
                self._add(os.path.join(below, name))
        return links

    def _add(self, file: str) -> None:
        stem, suffix = os.path.splitext(file)
        if os.path.basename(file).startswith("."):
            self.passed_over["hidden file"] += 1
        elif suffix.lower() in EXTENSIONS:
            self.images.append(file)
        elif suffix == CAPTION:
            self._plain.add(stem)
        elif suffix.lower() == CAPTION:
            self.captions[stem] = file
        elif not suffix and not os.path.exists(os.path.join(self.root, file)):  # to a disk not mounted
            self.passed_over["broken link"] += 1
        else:
            self.passed_over[f"{suffix.lower()} file" if suffix else "other file"] += 1

    def _unreadable(self, error: OSError) -> None:
        self.passed_over["unreadable folder"] += 1


def images_named(stems: set[str], folder: str, passed_over: Counter[str]) -> dict[str, str]:
    """By stem, the image in `folder` of that relative name, whatever its suffix, where there is one.

    Raises:
        DataError: there is no such folder, or it has several such images for one stem.
    """
    check_folder(folder)
    found: dict[str, str] = {}
    for below in sorted({os.path.dirname(stem) for stem in stems}):
        path = os.path.join(folder, below)
        entries = os.scandir(path) if os.path.isdir(path) else ()
        for name in sorted(entry.name for entry in entries if not entry.is_dir()):
            stem, suffix = os.path.splitext(os.path.join(below, name))
            if stem not in stems or suffix.lower() == CAPTION:
                continue
            if suffix.lower() not in EXTENSIONS:
                passed_over[f"{suffix.lower() or 'other'} reference"] += 1
            elif stem in found:
                raise DataError(f"{folder} has several images for one name, of which one is {found[stem]}.")
            else:
                found[stem] = stem + suffix
    return found


def check_folder(path: str) -> None:
    """Raises DataError if there is no such folder."""
    if not os.path.isdir(path):
        raise DataError(f"The image folder {path} does not exist.")


def _hidden(name: str) -> bool:
    """Whether a program made the folder for itself."""
    return name.startswith(".") or name in _MADE_BY_SYSTEMS


def _contains(outer: str, inner: str) -> bool:
    """Whether one real path is the other, or a folder above it."""
    return os.path.commonpath([outer, inner]) == outer
