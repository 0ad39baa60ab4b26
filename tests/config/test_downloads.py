"""The download commands that people are told to type, wherever the repository says them."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = (
    "flux_trainer/**/*.py",
    "train_configs/*.toml",
    "*.md",
    "docs/**/*.md",
    "assets/*.md",
    "assets/*/*.md",
)


def texts(path: Path) -> Iterator[str]:
    """A file's strings as a person reads them: literals put together, continued lines joined."""
    if path.suffix != ".py":
        yield re.sub(r"\\\n#?\s*", " ", path.read_text())
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


COMMANDS = sorted(
    {
        (str(path.relative_to(ROOT)), command.strip())
        for place in PLACES
        for path in ROOT.glob(place)
        for text in texts(path)
        for command in re.findall(r"hf download [^`\n]*", text)
    }
)


def test_the_commands_are_found():
    said = {path for path, _ in COMMANDS}
    assert {"flux_trainer/config/files.py", "train_configs/flux_dev.toml"} <= said
    assert sum("--include" in command for _, command in COMMANDS) >= 4


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_every_pattern_has_its_own_include(path, command):
    """`hf download REPO [FILENAMES]... [--include PATTERN]...`: with file names, patterns are ignored."""
    words = shlex.split(command)[2:]
    names = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if not word.startswith("--") and not before.startswith("--")
    ]
    assert names, "the repository is missing"
    if "--include" in words:
        assert len(names) == 1, f"{path}: {names[1:]} are taken for file names"
