"""The meter's arithmetic, against a clock that the test turns."""

import math
from typing import ClassVar

import pytest
import torch

from flux_trainer.metrics.meter import Meter, to_numbers
from flux_trainer.metrics.peak import peak_flops


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, **overrides) -> Meter:
    settings = {"total_steps": 100, "devices": 2}
    return Meter(**{**settings, "peak_flops": 1e12, "clock": clock, **overrides})


def run_step(meter: Meter, clock: Clock, data: float, work: float) -> None:
    with meter.data_wait():
        clock.now += data
    clock.now += work
    meter.update(images=8, work=[(4 * 320, int(1.2e10))] * 2)


def test_rates():
    clock = Clock()
    meter = make(clock)
    for _ in range(5):
        run_step(meter, clock, data=0.1, work=0.4)
    values = {"loss": torch.tensor(1.5), "lr": 1e-4}
    assert meter.work == (5 * 8 * 320, 5 * 8 * 3e9)
    reading = meter.read(5, values, meter.work)
    assert meter.work == (0, 0)
    assert reading["step"] == 5
    assert reading["loss"] == 1.5
    assert reading["lr"] == 1e-4
    assert reading["seconds_per_step"] == pytest.approx(0.5)
    assert reading["images_per_second"] == pytest.approx(16)
    assert reading["tokens_per_second"] == pytest.approx(16 * 320)
    assert reading["tflops"] == pytest.approx(16 * 3e9 / 2 / 1e12)  # per device
    assert reading["mfu_percent"] == pytest.approx(100 * 16 * 3e9 / 2 / 1e12)
    assert reading["data_percent"] == pytest.approx(20)
    assert reading["data_seconds_per_step"] == pytest.approx(0.1)
    assert reading["elapsed_seconds"] == pytest.approx(2.5)
    assert reading["seconds_left"] == pytest.approx(95 * 0.5)


def test_each_reading_counts_from_the_last_one():
    clock = Clock()
    meter = make(clock)
    run_step(meter, clock, data=0.0, work=10.0)
    meter.read(1, {})
    run_step(meter, clock, data=0.0, work=1.0)
    reading = meter.read(2, {})
    assert reading["images_per_second"] == pytest.approx(8)
    assert reading["elapsed_seconds"] == pytest.approx(11)


def test_pauses_stay_out_of_throughput_and_come_into_the_time_left():
    clock = Clock()
    meter = make(clock)
    with meter.pause():  # validation before the first step: will not come again
        clock.now += 50
    for _ in range(10):
        run_step(meter, clock, data=0.0, work=1.0)
    with meter.pause():
        clock.now += 5
    reading = meter.read(10, {})
    assert reading["images_per_second"] == pytest.approx(8)
    assert reading["seconds_left"] == pytest.approx(90 * (1.0 + 5 / 10))


def test_time_left_is_not_fooled_by_a_slow_start_or_a_hiccup():
    clock = Clock()
    meter = make(clock)
    for step, seconds in enumerate([60.0, 1.0, 1.0, 1.0, 9.0], start=1):
        run_step(meter, clock, data=0.0, work=seconds)
        reading = meter.read(step, {})
    assert reading["seconds_left"] == pytest.approx(95 * 1.0)


def test_the_clock_starts_with_the_run():
    clock = Clock()
    meter = make(clock)
    clock.now += 1000  # encoders are loaded meanwhile
    assert meter.elapsed == 0
    run_step(meter, clock, data=1.0, work=1.0)
    reading = meter.read(1, {})
    assert reading["images_per_second"] == pytest.approx(4)
    assert reading["elapsed_seconds"] == meter.elapsed == pytest.approx(2)


def test_device_values_are_fetched_in_one_transfer():
    class Counted(torch.Tensor):
        """Notes what asks for its value."""

        fetches: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            if name in {"item", "tolist", "__bool__", "__int__", "__float__", "cpu", "to"}:
                cls.fetches.append(name)
            return super().__torch_function__(function, types, args, kwargs or {})

    values = {name: torch.tensor(1.0).as_subclass(Counted) for name in ("loss", "grad_norm", "skipped")}
    assert to_numbers(values) == dict.fromkeys(values, 1.0)
    assert Counted.fetches == ["tolist"]


def test_unknown_peak_gives_no_mfu():
    clock = Clock()
    meter = make(clock, peak_flops=None)
    run_step(meter, clock, 0.0, 1.0)
    assert meter.read(1, {})["mfu_percent"] is None


def test_to_numbers_keeps_names_order_kinds():
    values = {"a": torch.tensor([2.5]), "b": None, "c": 3, "d": torch.tensor(7), "e": torch.tensor(math.nan)}
    numbers = to_numbers(values)
    assert list(numbers) == list(values)
    assert numbers["a"] == 2.5
    assert numbers["b"] is None
    assert numbers["c"] == 3
    assert numbers["d"] == 7
    assert isinstance(numbers["d"], int)
    assert math.isnan(numbers["e"])


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA RTX A6000", None),
        ("Tesla T4", None),
    ],
)
def test_peak_table(name, tflops):
    assert peak_flops(name) == (None if tflops is None else pytest.approx(tflops * 1e12))
