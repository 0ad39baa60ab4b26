"""`flux-trainer generate` with reference images: a flag for all prompts, a jsonl file for each."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.drawing import generate, pictures, words_of
from helpers.ranks import run_ranks
from helpers.referring import write_referring

from flux_trainer.cli.generate import plan
from flux_trainer.config.load import ConfigError, load_config
from flux_trainer.config.pictures import Prompt, read_prompts
from flux_trainer.config.toml import to_toml

pytestmark = pytest.mark.usefixtures("flavor_of_the_run")

SMALL = "--inference.reference_size=32"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    write_referring(folder)
    return folder


@pytest.fixture(scope="module")
def one_by_one(run, data) -> Path:
    """The prompts of the file, of which one refers to two images, one to none, and one to one."""
    run_ranks(1, generate, run[0], *words(data, data / "one"), "--batch=1")
    return data / "one"


def words(data: Path, out: Path) -> list[str]:
    return [f"--inference.prompts_path={data / 'prompts.jsonl'}", "--out", str(out), SMALL]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["one batch", "data", "context", "pipeline"])
def test_different_counts_share_a_batch_on_any_mesh(run, data, one_by_one, tmp_path, kind):
    """In float64; classifier-free guidance takes part."""
    mesh = [] if kind in ("one batch", "data") else [f"--parallelism.{kind}_parallel_degree=2"]
    run_ranks(1 if kind == "one batch" else 2, generate, run[0], *words(data, tmp_path), *mesh)
    got, want = pictures(tmp_path), pictures(one_by_one)
    assert list(got) == list(want) == [f"00{i}_{c}_16x16_seed0.png" for i, c in enumerate("abc", 1)]
    for name in want:
        assert np.array_equal(got[name], want[name]), name


@pytest.mark.slow
def test_every_reference_and_their_order_tell_in_the_picture(run, data, one_by_one, tmp_path):
    files = [str(data / f"reference{i}.png") for i in range(3)]
    name = "001_a_16x16_seed0.png"
    seen = {pictures(one_by_one)[name].tobytes()}
    for i, chosen in enumerate(([], files[:1], files[1::-1], files)):
        flags = [word for file in chosen for word in ("--reference", file)]
        run_ranks(1, generate, run[0], "a", "--out", str(tmp_path / str(i)), SMALL, *flags)
        seen.add(pictures(tmp_path / str(i))[name].tobytes())
        assert words_of(tmp_path / str(i) / name)["references"] == (chosen or None)
    assert len(seen) == 5
    flags = [f"--reference={file}" for file in files[:2]]
    run_ranks(1, generate, run[0], "a", "--out", str(tmp_path / "same"), SMALL, *flags)
    assert np.array_equal(pictures(tmp_path / "same")[name], pictures(one_by_one)[name])


def test_lines_end_where_lines_of_json_do(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two"}\r\n\n{"prompt": "three", "references": null}', "utf-8-sig")
    assert read_prompts(str(path)) == [Prompt("one\u2028two"), Prompt("three")]


def test_references_of_a_line_are_relative_to_the_file(data):
    names = [str(data / f"reference{i}.png") for i in range(3)]
    assert read_prompts(str(data / "prompts.jsonl")) == [
        Prompt("a", (names[0], names[1])),
        Prompt("b"),
        Prompt("c", (names[2],)),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a red apple", "line 2 is not JSON"),
        ('{"text": "a"}', 'line 2 has no "prompt"'),
        ('["a"]', 'line 2 has no "prompt"'),
        ('{"prompt": "a", "reference": ["b.png"]}', 'line 2: unknown field "reference"'),
        ('{"prompt": "a", "references": [1]}', 'line 2: "references" is neither a path nor a list'),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, words):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ValueError, match=words):
        read_prompts(str(tmp_path / "prompts.jsonl"))


def test_refusals(run, data, tmp_path):
    folder = str(run[0] / "run")
    for argv, words in (
        (["a", "--reference", str(data / "gone.png")], r"gone\.png: no such reference image"),
        (["a", "--reference"], "--reference: the name of an image file is missing"),
        (["a", "--reference", "--seed=1"], "--reference: the name of an image file is missing"),
        (["a", "--inference.reference_size=8"], "less than a token"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan([folder, *argv], 1)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"rubbish")
    with pytest.raises(AssertionError, match=r"broken\.png: corrupt image") as caught:
        run_ranks(1, generate, run[0], "a", "--out", str(tmp_path / "out"), f"--reference={broken}")
    assert "flux_trainer/generate.py" not in str(caught.value), "a sentence, no traceback"


def test_behind_two_dashes_all_words_are_prompts(run):
    order, _, _ = plan([str(run[0] / "run"), "a", "--", "--reference"], 1)
    assert [r.prompt for r in order.requests] == ["a", "--reference"]


def test_the_size_of_references_is_the_runs_if_it_had_any(run, data, tmp_path):
    """As its config.toml says."""
    copy, flag = tmp_path / "run", f"--reference={data / 'reference0.png'}"
    shutil.copytree(run[0] / "run", copy)
    assert plan([str(copy), "a", flag], 1)[1].inference.reference_size is None
    source = ["--data.sources.0.type=jsonl", "--data.sources.0.reference_key=references"]
    for more, size in (([], 16), (["--data.reference_size=48"], 48)):
        config = load_config([f"--job.config_file={copy / 'config.toml'}", *source, *more])
        (copy / "config.toml").write_text(to_toml(config))
        assert plan([str(copy), "a", flag], 1)[1].inference.reference_size == size
        assert (
            plan([str(copy), "a", flag, "--inference.reference_size=64"], 1)[1].inference.reference_size == 64
        )
