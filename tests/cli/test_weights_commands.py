"""`flux-trainer convert` and `flux-trainer verify`, as commands: messages, exit status, signals."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import weights_files
from safetensors.torch import load_file, save_file

from flux_trainer.cli.main import main
from flux_trainer.hub.contents import read_header


@pytest.fixture
def config(tmp_path):
    """The model's fields in a file."""
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads((weights_files.EPS / "config.json").read_text())["bfl"]))
    return path


def command(*words):
    return [sys.executable, "-m", "flux_trainer", *map(str, words)]


def test_convert_and_verify(tmp_path, config, capsys):
    source, target = weights_files.bfl(tmp_path), tmp_path / "out"
    assert main(["convert", str(source), str(target), "--config", str(config), "--dtype", "bf16"]) == 0
    said = capsys.readouterr().err
    assert "FLUX.1 transformer in Black Forest Labs' layout, float32" in said
    assert "GB, 100 %" in said
    assert main(["verify", str(target)]) == 0
    page = capsys.readouterr().out
    for part in (
        "diffusers' layout, bfloat16",
        "depth 1",
        "as they were written (CRC-32)",
        "verdict:     whole",
    ):
        assert part in page
    count = sum(x.numel() for x in weights_files.native().values())
    assert f"{count:,} in 80 tensors" in page
    assert main(["convert", str(source), str(target), "--config", str(config)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(source), str(target), "--config", str(config), "--overwrite"]) == 0
    weights = load_file(target / "diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float32}


def test_the_average_of_a_run(tmp_path, config, capsys):
    run, target = weights_files.own(tmp_path), tmp_path / "ema.safetensors"
    assert main(["convert", str(run), str(target), "--ema", "--config", str(config)]) == 0
    assert torch.equal(load_file(target)["img_in.bias"], -weights_files.native()["img_in.bias"])
    assert main(["verify", str(run), "--config", str(config)]) == 0
    page = capsys.readouterr().out
    assert "step-10" in page
    assert page.count("present") == 2  # average and optimizer


def test_mistakes_in_the_arguments_need_no_torch(tmp_path):
    code = (
        "import sys; from flux_trainer.cli.main import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    words = ["convert", tmp_path / "nothing", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "there is no file or folder" in done.stderr
    with pytest.raises(SystemExit) as caught:
        main(["convert", "a", "b", "--to", "gguf"])
    assert caught.value.code == 2


@pytest.mark.parametrize("words", [["--flavor", "flux-deb"], ["--config", "model.json"]])
def test_a_model_that_does_not_exist(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.json").write_text('{"size": 3}')
    assert main(["verify", str(weights_files.bfl(tmp_path)), *words]) == 2
    said = capsys.readouterr().err
    assert "there are flux-dev" in said or "model.json cannot be used: it has the fields size" in said


def test_a_model_described_by_a_file_with_a_byte_order_mark(tmp_path, config):
    marked = tmp_path / "marked.json"
    marked.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert main(["verify", str(weights_files.bfl(tmp_path)), "--config", str(marked)]) == 0


def test_the_home_folder_in_arguments(tmp_path, config, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = weights_files.bfl(tmp_path).name
    assert main(["convert", f"~/{weights}", "~/out", f"--config=~/{config.name}"]) == 0, capsys.readouterr()
    assert (tmp_path / "out").is_dir()
    assert main(["verify", "~/out", f"--config=~/{config.name}"]) == 0
    with pytest.raises(SystemExit):
        main(["verify", "~stranger/a"])
    assert "~stranger is no known home folder" in capsys.readouterr().err


def damaged(name, tmp_path):
    """Broken weights, and what is said of them."""
    if name == "flipped":
        path = tmp_path / "x.safetensors"
        main(["convert", str(weights_files.diffusers(tmp_path)), str(path)])
        data = bytearray(path.read_bytes())
        data[-7] ^= 4
        path.write_bytes(data)
        return path, "the data are not those that were written"
    if name == "cut":
        path = weights_files.bfl(tmp_path)
        path.write_bytes(path.read_bytes()[:-1])
        return path, "its header speaks of"
    if name == "shard":
        folder = weights_files.sharded(tmp_path)
        next(folder.glob("*-00002-of-*")).unlink()
        return folder, "files that are not beside it"
    if name == "checkpoint":
        path = weights_files.own(tmp_path) / "checkpoint" / "step-9"
        file = next(path.glob("*.distcp"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        return path, "content changed"
    if name == "hostile":
        path = weights_files.torchtitan(tmp_path) / "step-5"
        (path / ".metadata").write_bytes(pickle.dumps(Hostile(str(tmp_path / "ran"))))
        return path, "do not trust it"
    if name == "pickle":
        (tmp_path / "flux.ckpt").write_bytes(pickle.dumps({}))
        return tmp_path / "flux.ckpt", "is a pickle"
    path = weights_files.bfl(tmp_path)
    weights = load_file(path)
    del weights["txt_in.bias"]
    save_file(weights, path)
    return path, "1 missing (txt_in.bias)"


class Hostile:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["flipped", "cut", "shard", "checkpoint", "hostile", "pickle", "key"])
def test_verify_finds_what_is_wrong(name, tmp_path, config, capsys):
    path, told = damaged(name, tmp_path)
    assert main(["verify", str(path), "--config", str(config)]) == 1
    page = capsys.readouterr().out
    assert told in page
    assert "NOT whole" in page
    assert not (tmp_path / "ran").exists()


def test_convert_does_not_take_a_damaged_checkpoint(tmp_path, config, capsys):
    path, told = damaged("checkpoint", tmp_path)
    assert main(["convert", str(path), str(tmp_path / "x.safetensors"), "--config", str(config)]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_a_taken_target_is_said_before_the_hashing(tmp_path, config, capsys):
    source = weights_files.own(tmp_path)
    (tmp_path / "x.safetensors").write_text("taken")
    assert main(["convert", str(source), str(tmp_path / "x.safetensors"), "--config", str(config)]) == 1
    said = capsys.readouterr().err
    assert "exists already" in said
    assert "hashes" not in said


def test_verify_looks_at_each_part_of_a_pipeline(tmp_path, capsys):
    folder = weights_files.diffusers(tmp_path)
    (folder / "vae").mkdir()
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, folder / "vae" / "x.safetensors")
    assert main(["verify", str(folder)]) == 1
    page = capsys.readouterr().out
    assert page.count("verdict:     whole") == 1
    assert page.count("NOT whole") == 1


def test_a_foreign_checkpoint_is_not_trusted_for_its_content(tmp_path, config, capsys):
    assert main(["verify", str(weights_files.torchtitan(tmp_path)), "--config", str(config)]) == 0
    assert "the format has no hashes" in capsys.readouterr().out


SLOW_WRITE = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or tests under nohup would ignore it, and so would the command
from flux_trainer.hub import write
copy = write._copy
def slow(*args):
    try:
        time.sleep(0.05)
    except KeyboardInterrupt:  # as C code may
        pass
    return copy(*args)
write._copy = slow
from flux_trainer.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "x"), (signal.SIGINT, "x.safetensors"), (signal.SIGHUP, "x")]
)
def test_an_interrupted_conversion_leaves_nothing(number, name, tmp_path, config):
    source, folder = weights_files.bfl(tmp_path), tmp_path / "out"
    folder.mkdir()
    words = ["convert", source, folder / name, "--config", config]
    process = subprocess.Popen([sys.executable, "-c", SLOW_WRITE, *map(str, words)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(path.is_file() for path in folder.rglob("*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert any(folder.iterdir())
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert b"was not written" in said
    assert list(folder.iterdir()) == []


MEASURE = """
import sys, threading, time
import flux_trainer.hub.convert
from flux_trainer.hub.weights import open_weights
import torch
torch.zeros(1).bfloat16()
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
before = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
source, target, to, dtype = sys.argv[1:]
dtype = getattr(torch, dtype) if dtype != "keep" else None
flux_trainer.hub.convert.convert(open_weights(source, ahead=True), target, to, dtype)
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_for_a_few_tensors(tmp_path):
    """0.8 GB in float32, whose largest tensors have 57 MB, through every format."""
    import dataclasses

    from flux_trainer.hub.families import FLUX1
    from flux_trainer.models.registry import FLAVORS

    config = dataclasses.replace(
        FLAVORS["flux-schnell"], hidden_size=1408, num_heads=11, depth=1, depth_single_blocks=3
    )
    shapes = FLUX1.shapes(config)
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    largest = max(stored.nbytes for stored in header.tensors.values())
    total = sum(stored.nbytes for stored in header.tensors.values())
    assert largest > 50e6
    assert total > 2 * (2 * largest + 100e6)  # or the limit would be no limit
    steps = [
        ("a.safetensors", "b", "diffusers", "keep"),
        ("b", "c.safetensors", "bfl", "bfloat16"),
        ("a.safetensors", "d", "dcp", "keep"),
        ("d", "e", "diffusers", "float16"),
        ("d", "f", "torchtitan", "keep"),
        ("f", "g.safetensors", "bfl", "keep"),
    ]
    for source, target, to, dtype in steps:
        words = [tmp_path / source, tmp_path / target, to, dtype]
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *map(str, words)], capture_output=True, text=True, check=True
        )
        used = int(done.stdout)
        print(f"{source} -> {target}: {used / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")
        assert used < 2 * largest + 100e6, (source, target)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_while_a_large_tensor_is_cast(tmp_path):
    """From DCP to DCP, which read and write tensors as a whole; the largest has 183 MB in float32."""
    import dataclasses

    from flux_trainer.hub.families import FLUX1
    from flux_trainer.models.registry import FLAVORS

    config = dataclasses.replace(
        FLAVORS["flux-schnell"], hidden_size=2560, num_heads=20, depth=0, depth_single_blocks=2
    )
    weights = {name: torch.randn(shape) for name, shape in FLUX1.shapes(config).items()}
    largest = max(x.nbytes for x in weights.values())
    assert sum(x.nbytes for x in weights.values()) > 1.5 * (2 * largest + 100e6)
    save_file(weights, tmp_path / "a.safetensors")
    del weights
    for words in (("a.safetensors", "d", "dcp", "keep"), ("d", "h", "torchtitan", "bfloat16")):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        print(f"{words}: {int(done.stdout) / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")
        assert int(done.stdout) < 2 * largest + 100e6, words
