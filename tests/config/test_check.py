"""Checks between keys and of the files that are named: each mistake with its sentence."""

import json
from pathlib import Path

import pytest

from flux_trainer.config.check import check, check_generation, inconsistencies
from flux_trainer.config.files import missing_files
from flux_trainer.config.load import ConfigError, load
from flux_trainer.config.schema import FAMILIES, JobConfig, Model

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder that holds what the settings of `sound` name."""
    monkeypatch.chdir(tmp_path)
    for path in ("ae.safetensors", "pairs.jsonl", "prompts.txt"):
        Path(path).write_text("")
    Path("images").mkdir()
    Path("bad.jsonl").write_text("a red apple")
    Path("gone.jsonl").write_text(json.dumps({"prompt": "a", "references": ["gone.png"]}))


def sound(*flags: str) -> list[str]:
    """Flags of a run that is in order, and `flags` on top."""
    return [
        "--encoder.autoencoder_path=ae.safetensors",
        "--data.sources.0.type=folder",
        "--data.sources.0.path=images",
        *flags,
    ]


def problems(*flags: str, world_size: int | None = None) -> list[str]:
    config, _, origins = load(sound(*flags))
    with pytest.raises(ConfigError) as caught:
        check(config, world_size, origins)
    return caught.value.problems


DOUBLE = [f"--training.{key}=float64" for key in ("dtype", "mixed_precision_param", "mixed_precision_reduce")]


@pytest.mark.parametrize("world_size", [None, 1, 6])
def test_a_sound_run_passes_without_remarks(world_size):
    config = load(sound("--data.sources.1.type=jsonl", "--data.sources.1.path=pairs.jsonl")).config
    assert check(config, world_size) == []


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--model.name=flux2", "--model.flavor=flux-dev"],
            'model.flavor = "flux-dev" does not belong to model.name = "flux2", whose flavors are flux2-dev, '
            "flux2-klein-4b, flux2-klein-9b, flux2-debug, flux2-tiny; leave model.name out, and the flavor "
            "decides",
        ),
        (
            ["--training.img_size=250"],
            "training.img_size = 250 is not a multiple of 16 (8 pixels per latent, 2 latents per token); "
            "try 240 or 256",
        ),
        (
            ["--training.img_size=8"],
            "training.img_size = 8 is not a multiple of 16 (8 pixels per latent, 2 latents per token); "
            "try 16",
        ),
        (
            ["--training.spike_factor=0.5"],
            "training.spike_factor = 0.5 would skip ordinary steps; expected a number > 1, "
            "or 0 for no such limit",
        ),
        (
            ["--training.dtype=float64", "--training.mixed_precision_reduce=float64"],
            'training.mixed_precision_param = "bfloat16" would round what training.dtype = "float64" keeps; '
            'set it to "float64" too',
        ),
        (
            ["--training.dtype=bfloat16", "--training.mixed_precision_param=float32"],
            'training.mixed_precision_param = "float32" is wider than training.dtype = "bfloat16", '
            "the weights it is made from",
        ),
        (
            ["--training.global_batch_size=100", "--training.local_batch_size=8"],
            "training.global_batch_size = 100 is not a multiple of training.local_batch_size 8; "
            "try 96 or 104",
        ),
        (
            ["--training.global_batch_size=0"],
            "training.global_batch_size = 0 is out of range; expected an integer >= 1, "
            "or -1 for one local batch per rank",
        ),
        (
            ["--optimizer.beta2=1"],
            "optimizer.beta2 = 1.0 would never take in a gradient; expected a number below 1",
        ),
        (
            [*DOUBLE, "--optimizer.state_dtype=bfloat16"],
            'optimizer.state_dtype = "bfloat16" would round what training.dtype = "float64" keeps; '
            "leave it out",
        ),
        (
            ["--quantize.linears=float8", "--training.mixed_precision_param=float32"],
            'training.mixed_precision_param = "float32" does not go with quantize.linears = "float8", '
            'which takes "bfloat16"',
        ),
        (
            ["--quantize.linears=mxfp8", "--parallelism.tensor_parallel_degree=2"],
            'parallelism.tensor_parallel_degree = 2 does not go with quantize.linears = "mxfp8"; '
            "use FSDP alone, or context parallelism",
        ),
        (
            ["--optimizer.in_backward"],
            "training.max_norm = 1.0 needs the norm of all gradients before any step; "
            "with optimizer.in_backward = true, set it to 0",
        ),
        (
            ["--optimizer.in_backward", "--training.max_norm=0", "--training.spike_factor=4"],
            "training.spike_factor = 4.0 judges a step before it is done; "
            "with optimizer.in_backward = true, set it to 0",
        ),
        (
            ["--optimizer.in_backward", "--training.max_norm=0", "--parallelism.pipeline_parallel_degree=2"],
            "parallelism.pipeline_parallel_degree = 2 needs several micro-batches, "
            "of which optimizer.in_backward = true takes one",
        ),
        (
            ["--lr_scheduler.warmup_steps=20", "--lr_scheduler.total_steps=10"],
            "lr_scheduler.warmup_steps = 20 is longer than the whole schedule, lr_scheduler.total_steps = 10",
        ),
        (
            ["--parallelism.data_parallel_shard_degree=0"],
            "parallelism.data_parallel_shard_degree = 0 is out of range; expected an integer >= 1, "
            "or -1 for all ranks that remain",
        ),
        (
            ["--data.sources.1.type=folder"],
            'data.sources.1.path = "" is empty; a source of type "folder" needs one',
        ),
        (
            ["--data.sources.1.type=synthetic", "--data.sources.1.weight=2"],
            "data.sources.0.weight is missing: weights are given for all sources or for none",
        ),
        (
            ["--data.sources.0.weight=0"],
            "data.sources.0.weight = 0.0 is 0 as are all the others: no source would be drawn from",
        ),
        (
            ["--data.sources.0.weight=1", "--data.sources.0.repeats=2"],
            "data.sources.0.repeats = 2 has no effect beside a weight; give one of the two",
        ),
        (
            ["--data.sources.0.reference_key=refs"],
            'data.sources.0.reference_key = "refs" is for sources of type "jsonl"; this is "folder"',
        ),
        (
            ["--data.sources.0.type=synthetic", "--data.sources.0.reference_paths=old"],
            'data.sources.0.reference_paths = ["old"] is for sources of type "folder"; this is "synthetic"',
        ),
        (
            ["--data.reference_size=8"],
            "data.reference_size = 8 is less than a token; expected at least 16 pixels, or -1 for img_size",
        ),
        (
            ["--validation.enable"],
            "validation.enable = true has nothing to do; add [[validation.sources]] for the loss "
            "or validation.prompts for pictures",
        ),
        (
            ["--validation.samples=0"],
            "validation.samples = 0 is out of range; expected an integer >= 1, or -1 for all",
        ),
        (
            ["--validation.prompts=a", "--validation.prompts_path=prompts.txt"],
            'validation.prompts_path = "prompts.txt" and validation.prompts are both given; '
            "give one of the two",
        ),
        (
            ["--activation_checkpoint.selective_ac_option=0"],
            'activation_checkpoint.selective_ac_option = "0" is not a valid choice; '
            'expected "op" or a number such as "2"',
        ),
        (
            ["--activation_checkpoint.single_blocks=half"],
            'activation_checkpoint.single_blocks = "half" is not a valid choice; expected none, full, '
            'selective, attention, memory_budget, op, or a number such as "2"',
        ),
        (
            ["--activation_checkpoint.mode=memory_budget", "--compile.enable", "--compile.components=loss"],
            'activation_checkpoint.mode = "memory_budget" needs compile.enable = true with "model" in '
            "compile.components: the compiler is what keeps the budget",
        ),
        (
            ["--compile.enable", "--compile.components="],
            'compile.components = [] is empty, so compile.enable has nothing to do; name "model" or "loss"',
        ),
        (
            ["--attention.backend=cudnn", "--training.mixed_precision_param=float32"],
            'attention.backend = "cudnn" computes in bfloat16, not in training.mixed_precision_param = '
            '"float32"; take "auto"',
        ),
        (
            ["--attention.backend=efficient", *DOUBLE],
            'attention.backend = "efficient" does not take training.mixed_precision_param = "float64"; '
            'take "math" or "auto"',
        ),
        (
            ["--attention.backend=cudnn", "--debug.deterministic"],
            'attention.backend = "cudnn" does not go with debug.deterministic = true; take "flash" or "auto"',
        ),
        (
            ["--attention.backend=flex", "--compile.enable", "--compile.components=loss"],
            'attention.backend = "flex" needs compile.enable = true with "model" in compile.components where '
            "activation checkpointing keeps single results (selective op, attention); or set "
            'activation_checkpoint.mode to "full" or "none"',
        ),
        (
            ["--checkpoint.export=bfl"],
            'checkpoint.export = ["bfl"] needs checkpoint.enable = true: it is made from the last checkpoint',
        ),
        (
            ["--checkpoint.enable", "--checkpoint.export=bfl", "--checkpoint.export_ema"],
            "checkpoint.export_ema = true needs ema.enable = true, and a format in checkpoint.export",
        ),
        (
            ["--checkpoint.load_step=5"],
            "checkpoint.load_step = 5 has no effect without checkpoint.enable = true",
        ),
        (
            ["--checkpoint.load_step=-2"],
            "checkpoint.load_step = -2 is out of range; expected a step, or -1 for the newest",
        ),
        (
            ["--profiling.enable_profiling", "--profiling.profile_freq=3"],
            "profiling.profile_freq = 3 is less than profiler_warmup 3 + profiler_active 1",
        ),
    ],
)
def test_keys_that_do_not_go_together(flags, line):
    [found] = problems(*flags)
    assert found.split(": ", 1)[1] == line
    key = line.split(" ")[0]
    given = any(flag.startswith(f"--{key}=") or flag == f"--{key}" for flag in flags)
    assert found.startswith("command line: " if given else ("defaults: ", "command line: "))


@pytest.mark.parametrize(
    ("flags", "world_size", "line"),
    [
        (
            ["--training.global_batch_size=40"],
            4,
            "training.global_batch_size = 40 is not a multiple of training.local_batch_size 8 x 4 ranks = "
            "32; try 32 or 64",
        ),
        (
            ["--training.global_batch_size=8"],
            2,
            "training.global_batch_size = 8 is not a multiple of training.local_batch_size 8 x 2 ranks = 16; "
            "try 16",
        ),
        (
            ["--parallelism.data_parallel_replicate_degree=4"],
            6,
            "parallelism.data_parallel_replicate_degree = 4 does not divide the 6 ranks of this run; "
            "possible: 1, 2, 3, 6",
        ),
        (
            ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=4"],
            4,
            "parallelism.data_parallel_shard_degree = 4 x data_parallel_replicate_degree 2 = 8 ranks, "
            "but this run has 4; -1 takes all that remain",
        ),
        (
            ["--parallelism.context_parallel_degree=4", "--parallelism.data_parallel_replicate_degree=2"],
            12,
            "parallelism.context_parallel_degree = 4 x data_parallel_replicate_degree 2 = 8, which does not "
            "divide the 12 ranks of this run",
        ),
        (
            ["--training.global_batch_size=24", "--parallelism.context_parallel_degree=2"],
            4,
            "training.global_batch_size = 24 is not a multiple of training.local_batch_size 8 x 2 groups of "
            "ranks = 16; try 16 or 32",
        ),
    ],
)
def test_what_depends_on_the_number_of_ranks(flags, world_size, line):
    assert problems(*flags, world_size=world_size) == [f"command line: {line}"]
    assert not check(load(sound(*flags)).config, None)  # unknown number: nothing to say


@pytest.mark.parametrize(
    ("flags", "key", "parts"),
    [
        (
            ["--encoder.autoencoder_path=assets/hf/FLUX.1-dev/ae.safetensors"],
            "encoder.autoencoder_path",
            [
                "is not there (looked in ",
                "no such file; `hf download black-forest-labs/FLUX.1-dev ae.safetensors "
                "--local-dir assets/hf/FLUX.1-dev` brings FLUX's",
            ],
        ),
        (
            ["--encoder.t5_encoder=./t5"],
            "encoder.t5_encoder",
            ["no such folder", "hf download", "text_encoder_2"],
        ),
        (["--encoder.t5_encoder=t5"], "encoder.t5_encoder", ["no such folder"]),
        (["--encoder.t5_encoder=some/where/t5"], "encoder.t5_encoder", ["no such folder"]),
        (["--encoder.t5_encoder=images/t5"], "encoder.t5_encoder", ["no such folder"]),
        (
            ["--encoder.clip_tokenizer=/a/b/c"],
            "encoder.clip_tokenizer",
            ["no such folder", "clip-vit-large-patch14"],
        ),
        (["--data.sources.0.path=pics"], "data.sources.0.path", ["no such folder"]),
        (["--data.sources.0.type=jsonl"], "data.sources.0.path", ["no such file but a folder is"]),
        (
            ["--data.sources.0.reference_paths=pics,images"],
            "data.sources.0.reference_paths.0",
            ["no such folder"],
        ),
        (["--validation.prompts_path=p.txt"], "validation.prompts_path", ["no such file"]),
        (["--validation.prompts_path=bad.jsonl"], "validation.prompts_path", ["line 1 is not JSON"]),
        (
            ["--validation.prompts_path=gone.jsonl"],
            "validation.prompts_path",
            ["gone.png: no such reference"],
        ),
        (
            ["--checkpoint.initial_load_path=step-5"],
            "checkpoint.initial_load_path",
            ["no such file or folder"],
        ),
        (["--job.dump_folder=ae.safetensors"], "job.dump_folder", ["is a file; name a folder"]),
        (
            ["--checkpoint.enable", "--checkpoint.load_step=7", "--job.dump_folder=out"],
            "checkpoint.load_step",
            ["is not among the checkpoints in out/checkpoint; there are step-9, step-10"],
        ),
    ],
)
def test_a_missing_file_is_named_with_the_command_that_brings_it(flags, key, parts):
    for step in (10, 9):
        Path(f"out/checkpoint/step-{step}").mkdir(parents=True)
    [line] = problems(*flags)
    assert line.startswith(f"command line: {key} = ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("flavor", "repo"), [("flux2-dev", "FLUX.2-dev"), ("flux2-klein-4b", "FLUX.2-klein-4B")]
)
def test_flux2_needs_a_language_model_and_nothing_of_flux1s(flavor, repo):
    Path("tokenizer").mkdir()
    for llm, sentence in (("", f"but {flavor} needs a language model"), ("./llm", "no such folder")):
        config = load(
            sound(
                f"--encoder.llm_encoder={llm}",
                "--encoder.llm_tokenizer=./tokenizer",
                "--encoder.t5_encoder=./t5",
            )
        ).config
        model = config.model.model_copy(update={"flavor": flavor})
        [(key, found)] = missing_files(config.model_copy(update={"model": model}))
        assert key == "encoder.llm_encoder"
        assert sentence in found
        assert f"hf download black-forest-labs/{repo} --include" in found


def test_hub_ids_are_not_taken_for_folders():
    assert check(load(sound("--encoder.t5_encoder=google/t5-v1_1-small")).config, 1) == []


def test_an_optional_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert problems("--metrics.enable_wandb", "--data.sources.0.type=hf") == [
        'command line: data.sources.0.type = "hf" needs a package that is not installed: '
        'pip install "flux_trainer[hf]"',
        "command line: metrics.enable_wandb = true needs a package that is not installed: "
        'pip install "flux_trainer[wandb]"',
    ]


def test_all_mistakes_are_listed_at_once_with_their_origins():
    Path("a.toml").write_text("[training]\nimg_size = 250\n[[data.sources]]\ntype = 'folder'\npath = 'x'\n")
    config, _, origins = load(["--job.config_file=a.toml", "--validation.enable"])
    with pytest.raises(ConfigError) as caught:
        check(config, 1, origins)
    assert [line.split(" ")[0:2] for line in caught.value.problems] == [
        ["a.toml:", "training.img_size"],
        ["command", "line:"],
        ["defaults:", "encoder.autoencoder_path"],
        ["a.toml:", "data.sources.0.path"],
    ]


def test_nothing_to_train_on():
    [line] = [line for line in _problems_of(JobConfig()) if "data.sources" in line]
    assert line == (
        "defaults: data.sources = [] is empty: nothing to train on; "
        "add a [[data.sources]] table or --data.sources.0.type synthetic"
    )


def _problems_of(config: JobConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(config, 1)
    return caught.value.problems


def test_remarks_do_not_stop_a_run():
    short = load(sound("--training.steps=10")).config
    assert check(short, 1) == [
        "defaults: lr_scheduler.warmup_steps = 200 is cut to training.steps = 10; "
        "to try the first steps of a longer run as they are, set lr_scheduler.total_steps to its length"
    ]
    flags = sound(
        "--ema.enable", "--ema.rampup_ratio=0", "--training.steps=1000", "--training.local_batch_size=4"
    )
    [line] = check(load(flags).config, 2)
    assert line.startswith("defaults: ema.half_life = 500000 samples are more than the whole run's 8000, ")
    assert check(load(flags).config, None) == []
    ahead = load(sound("--training.encode_ahead", "--parallelism.data_parallel_replicate_degree=2")).config
    assert check(ahead, 2) == []
    [line] = check(ahead, 8)
    assert "training.encode_ahead = true has no effect where 4 ranks share a copy of the model" in line


@pytest.mark.parametrize("path", sorted(ROOT.glob("train_configs/*.toml")), ids=lambda path: path.name)
def test_every_config_in_the_repository_loads_and_is_consistent(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, notices, _ = load(["--job.config_file", str(path)])
    assert notices == []
    assert list(inconsistencies(config, None)) == []
    # The real FLUX needs downloads and the user's own images; everything else is in the repository.
    own = [
        f"data.sources.{i}.path"
        for i, source in enumerate(config.data.sources)
        if source.path == "data/images"
    ]
    missing = [(key, what) for key, what in missing_files(config) if key not in own]
    assert [(key, what) for key, what in missing if "hf download" not in what] == []


def test_the_flavors_are_those_of_the_registry():
    registry = pytest.importorskip("flux_trainer.models.registry")
    assert set(Model.model_fields["flavor"].annotation.__args__) == set(registry.FLAVORS)
    for name, flavors in FAMILIES.items():
        assert {flavor: registry.FLAVORS[flavor].family for flavor in flavors} == dict.fromkeys(flavors, name)


def test_a_flavor_of_another_family_is_refused_for_pictures_too():
    config = load(sound("--model.name=flux2", "--model.flavor=flux-dev")).config
    with pytest.raises(ConfigError, match=r"model\.flavor = .* does not belong"):
        check_generation(config, None)


def test_flex_goes_uncompiled_where_nothing_single_is_kept():
    flags, mode = ["--attention.backend=flex"], "--activation_checkpoint."
    check(load(sound(*flags, "--compile.enable")).config, None)
    for others in (["mode=full"], ["mode=none"], ["selective_ac_option=2"]):
        check(load(sound(*flags, *(mode + other for other in others))).config, None)
    for others in (["mode=full", "single_blocks=op"], ["double_blocks=none"]):
        assert len(problems(*flags, *(mode + other for other in others))) == 1


def test_a_backend_of_attention_is_refused_for_pictures_too():
    config = load(sound("--attention.backend=cudnn", "--training.mixed_precision_param=float32")).config
    with pytest.raises(ConfigError, match=r"attention\.backend = .* computes in bfloat16"):
        check_generation(config, None)


def test_a_step_in_backward_takes_no_accumulation():
    flags = ["--optimizer.in_backward", "--training.max_norm=0", "--training.local_batch_size=2"]
    assert problems(*flags, "--training.global_batch_size=8", world_size=2) == [
        "command line: training.global_batch_size = 8 needs gradient accumulation, "
        "which optimizer.in_backward = true cannot do; set it to 4, or to -1"
    ]
    check(load(sound(*flags, "--training.global_batch_size=4")).config, 2)
