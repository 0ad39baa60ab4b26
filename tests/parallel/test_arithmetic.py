"""What settings come to, and which meshes are refused, before torch is there."""

import subprocess
import sys

import pytest

from flux_trainer.config.compute import Parallelism
from flux_trainer.config.load import load_config
from flux_trainer.config.problems import ConfigError
from flux_trainer.config.schema import JobConfig, Training
from flux_trainer.models.registry import FLAVORS
from flux_trainer.parallel.arithmetic import (
    check_heads,
    check_mesh,
    holds_weights,
    micro_batches,
    reference_room,
    reference_tokens,
    tokens,
)


def settings(flavor: str = "flux-dev", method: str = "auto", **degrees) -> JobConfig:
    config = JobConfig()
    config.model.flavor = flavor
    config.parallelism = Parallelism(**{f"{name}_parallel_degree": n for name, n in degrees.items()})
    config.parallelism.context_parallel_method = method
    return config


def test_heads_that_do_not_divide_are_refused_with_the_arithmetic():
    check_heads(FLAVORS["flux-dev"], 8)
    with pytest.raises(ValueError, match=r"24 attention heads cannot .*: 24 / 5 \(\w+\) = 4.8"):
        check_heads(FLAVORS["flux-dev"], 5)


def test_eight_bit_products_need_token_counts_that_they_can_sum_over():
    config = settings(context=2)
    config.training.img_size, config.training.local_batch_size = 80, 4  # 25 tokens: 13 and 12 on a rank
    check_mesh(config, 2)
    config.quantize.linears = "mxfp8"
    with pytest.raises(ConfigError, match=r"a multiple of 32 image tokens .* 4 x 1[23] tokens = (52|48)"):
        check_mesh(config, 2)
    config.training.local_batch_size = 32
    check_mesh(config, 2)


@pytest.mark.parametrize(
    ("degrees", "ranks", "words"),
    [
        ({"tensor": 5}, 10, "24 attention heads cannot be shared out evenly: 24 / 5"),
        ({"pipeline": 58}, 58, "58 stages for 57 blocks"),
        ({"pipeline": 4}, 4, "a step has 1, the pipeline 4 ranks"),
        ({"context": 32, "method": "ulysses"}, 32, "24 heads over 32 ranks leave 8 without"),
        ({"context": 3}, 4, "= 3 ranks, but the world has 4"),
    ],
)
def test_an_impossible_mesh_is_refused(degrees, ranks, words):
    with pytest.raises(ConfigError, match=words):
        check_mesh(settings(**degrees), ranks)


def test_an_impossible_mesh_is_refused_for_flux2():
    check_mesh(settings("flux2-dev", tensor=16), 16)
    with pytest.raises(ConfigError, match="24 attention heads cannot be shared out evenly: 24 / 16"):
        check_mesh(settings("flux2-klein-4b", tensor=16), 16)
    with pytest.raises(ConfigError, match="26 stages for 25 blocks"):
        check_mesh(settings("flux2-klein-4b", pipeline=26), 26)


def test_a_ring_chooses_what_computes_attention():
    """Also where it is what heads that do not divide come to."""
    for options in ({"context": 5}, {"context": 2, "method": "ring"}):
        config = settings(**options)
        check_mesh(config, options["context"])
        config.attention.backend = "flash"
        with pytest.raises(ConfigError, match=r'"flash" does not go with ring attention, .* "auto"'):
            check_mesh(config, options["context"])
        config.parallelism.context_parallel_method = "allgather"
        check_mesh(config, options["context"])
    config = settings(context=1, method="ring")
    config.attention.backend = "flash"
    check_mesh(config, 1)


def test_text_tokens_are_those_of_the_familys_encoder():
    for flavor, text in (("flux-dev", 256), ("flux2-dev", 384)):
        config = settings(flavor)
        config.training.img_size, config.encoder.max_llm_encoding_len = 512, 384
        assert tokens(config) == (1024, text)


def test_micro_batches_of_a_step():
    assert micro_batches(Training(local_batch_size=2, global_batch_size=-1), 4) == 1
    assert micro_batches(Training(local_batch_size=2, global_batch_size=48), 4) == 6


def test_a_pipeline_holds_gathered_weights_unless_told_otherwise():
    assert not holds_weights(Parallelism())
    assert holds_weights(Parallelism(pipeline_parallel_degree=2))
    assert not holds_weights(Parallelism(pipeline_parallel_degree=2, fsdp_reshard_after_forward="always"))
    assert holds_weights(Parallelism(fsdp_reshard_after_forward="never"))


def test_the_command_refuses_without_torch():
    code = """
import sys
from flux_trainer.cli.main import main
words = ["--model.flavor=flux-dev", "--parallelism.tensor_parallel_degree=5"]
words += ["--data.sources.0.type=synthetic"]
words += [f"--encoder.{name}_encoder=a/b" for name in ("t5", "clip")]
words += ["--encoder.autoencoder_path=assets/autoencoder/ae.safetensors"]
status = main(["config", "--ngpu", "5", "--quiet", *words])
print(status, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert "24 attention heads cannot be shared out evenly" in done.stderr
    assert done.stdout == "2 False\n"


def test_a_pipeline_has_room_for_references_in_few_lengths():
    for most in (1, 3, 4, 1000, 4096):
        rooms = [reference_room(longest, most) for longest in range(most + 1)]
        assert all(room >= longest for longest, room in enumerate(rooms))
        assert len(set(rooms)) <= 5
        assert rooms[0] == 0
        assert max(rooms) < most + 4


def test_references_are_counted_where_training_has_them():
    flags = ["--data.sources.0.type=jsonl", "--data.max_references=3", "--training.img_size=256"]
    key = "sources.0.reference_key=r"
    assert reference_tokens(load_config(flags)) == 0
    assert (
        reference_tokens(load_config([*flags, f"--validation.{key}", "--validation.sources.0.type=jsonl"]))
        == 0
    )
    assert reference_tokens(load_config([*flags, f"--data.{key}"])) == 3 * 256
    assert reference_tokens(load_config([*flags, f"--data.{key}", "--data.reference_size=512"])) == 3 * 1024
