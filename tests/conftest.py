"""What every test shares: the helpers' place on the path, and one thread per process.

`tests/helpers` is imported as `helpers` (`from helpers.ranks import run_ranks`). Nothing here imports torch,
so that tests of the torch-free parts stay quick and can see that nobody else imports it.

GPUs are hidden; `TEST_GPU=1 pytest -m gpu` runs the tests that need one.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.environ.get("TEST_GPU"):  # the figures of these tests are a CPU's, and several ranks share no GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's script ignores it for what runs behind it
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def flavors():
    """Tests may put small models in the place of flavors; afterwards these are as they were."""
    from flux_trainer.models.registry import FLAVORS

    before = dict(FLAVORS)
    yield
    FLAVORS.clear()
    FLAVORS.update(before)


@pytest.fixture(autouse=True, scope="module")
def process_group():
    """Trainers in a test's own process leave theirs for the next test; the next file begins without."""
    yield
    if (distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture
def recorded_frequencies(monkeypatch):
    """Timesteps are embedded by the frequencies of the machine that wrote the golden files."""
    from helpers import golden

    golden.use_frequencies(monkeypatch, golden.recorded_frequencies())


@pytest.fixture
def float32_frequencies(monkeypatch):
    """Timesteps are embedded by the frequencies that diffusers computes on this machine."""
    from helpers import golden

    golden.use_frequencies(monkeypatch, golden.float32_frequencies())
