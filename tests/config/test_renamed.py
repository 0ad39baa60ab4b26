"""What torchtitan v0.2.2's users have on disk loads, or the line says which key to use instead."""

from pathlib import Path

import pytest

from flux_trainer.config.fields import field_at
from flux_trainer.config.load import ConfigError, load
from flux_trainer.config.renamed import RENAMED, VALUES

GOLDEN = Path(__file__).parents[1] / "golden" / "torchtitan_v0.2.2"
FILES = {
    "debug_model.toml": ("cc12m-test", 48),
    "flux_dev_model.toml": ("cc12m-wds", 12),
    "flux_schnell_model.toml": ("cc12m-wds", 6),
}


@pytest.mark.parametrize("name", FILES)
def test_the_three_flux_files_name_the_renamed_keys(name, monkeypatch):
    monkeypatch.chdir(GOLDEN)
    with pytest.raises(ConfigError) as caught:
        load(["--job.config_file", name])
    dataset, steps = FILES[name]
    assert caught.value.problems == [
        f'{name}: training.dataset = "{dataset}": a torchtitan v0.2 key, unknown here; '
        "use [[data.sources]] tables",
        f'{name}: validation.dataset = "coco-validation": a torchtitan v0.2 key, unknown here; '
        "use [[validation.sources]] tables",
        f"{name}: validation.steps = {steps}: a torchtitan v0.2 key, unknown here; "
        "use validation.samples (= steps x validation.local_batch_size x ranks; -1: all)",
    ]


@pytest.mark.parametrize("name", FILES)
def test_without_those_keys_they_load_with_their_values(name, tmp_path):
    lines = (GOLDEN / name).read_text().splitlines()
    validation = lines.index("[validation]")
    kept = [
        line
        for i, line in enumerate(lines)
        if not line.startswith("dataset") and not (i > validation and line.startswith("steps"))
    ]
    assert len(lines) - len(kept) == 3
    path = tmp_path / name
    path.write_text("\n".join(kept))
    config, notices, _ = load(["--job.config_file", str(path), "--data.sources.0.type", "synthetic"])
    assert config.model.name == "flux1"
    assert config.model.flavor == {"d": "flux-debug", "f": "flux-" + name.split("_")[1]}[name[0]]
    assert config.training.classifier_free_guidance_prob == 0.447
    assert config.lr_scheduler.decay_ratio == 0.0
    assert config.training.steps == (10 if "debug" in name else 30_000)
    assert config.encoder.max_t5_encoding_len == (512 if "dev" in name else 256)
    said = [notice.removeprefix(f"{path}: ").split(":")[0] for notice in notices]
    expected = {
        "job.custom_config_module is ignored",
        'model.name = "flux" is read as "flux1"',
        "checkpoint.last_save_model_only is ignored",
        "validation.save_img_count is ignored",
        "validation.all_timesteps is ignored",
    }
    if "debug" in name:
        expected.add("model.hf_assets_path is ignored")
        assert config.inference.save_img_folder == "inference_results"
        assert config.inference.prompts_path.endswith("prompts.txt")  # not there, and not needed to train
    assert set(said) == expected
    assert len(said) == len(expected)


def test_no_listed_key_is_a_key_of_the_schema():
    for key, old in RENAMED.items():
        assert field_at(key.split(".")) is None, key
        if old.kind in ("moved", "switch"):
            assert field_at(old.note.split(".")) is not None, old.note
    for key, words in VALUES.items():
        section, name = key.split(".")
        for word in words.values():
            load([f"--{section}.{name}", word])


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--training.classifer_free_guidance_prob", "0.3"], "training.classifier_free_guidance_prob", 0.3),
        (["--training.dataloader.num_workers", "4"], "data.num_workers", 4),
        (["--training.dataloader.prefetch-factor=3"], "data.prefetch_factor", 3),
        (["--model.name", "flux"], "model.name", "flux1"),
        (["--checkpoint.last_save_in_hf"], "checkpoint.export", ["diffusers"]),
        (["--checkpoint.async_mode", "async_with_pinned_mem"], "checkpoint.async_mode", "async"),
    ],
)
def test_a_key_of_the_same_meaning_is_translated_with_a_notice(flags, key, value):
    config, notices, _ = load(flags)
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == value
    assert len(notices) == 1
    assert " is read as " in notices[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--checkpoint.no-last-save-model-only"],
        ["--checkpoint.last_save_model_only"],
        ["--checkpoint.no-last-save-in-hf"],
        ["--checkpoint.initial_load_in_hf"],
        ["--training.test_mode", "false"],
        ["--training.seq_len", "2048"],
        ["--training.dataloader.pin_memory", "true"],
        ["--checkpoint.exclude_from_loading=[]"],
        ["--fault_tolerance.group_size", "2"],
        ["--parallelism.expert_parallel_degree=1"],
    ],
)
def test_a_harmless_key_is_ignored_with_a_notice(flags):
    config, notices, _ = load(flags)
    assert config == load([]).config
    assert len(notices) == 1
    assert " is ignored: " in notices[0]


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--training.test_mode"], "encoder.random_init"),
        (["--validation.eval_freq", "5"], "validation.freq"),
        (["--checkpoint.exclude_from_loading", "optimizer"], "checkpoint.initial_load_path"),
        (["--checkpoint.no-initial-load-model-only"], "checkpoint.initial_load_path"),
        (["--checkpoint.last_save_in_hf", "3"], "checkpoint.export"),
        (["--training.dataset_path", "/x"], "[[data.sources]]"),
        (["--fault_tolerance.enable"], "does not have it"),
        (["--parallelism.expert_parallel_degree", "2"], "FLUX has no experts"),
    ],
)
def test_a_key_of_another_meaning_is_refused_with_the_way_to_say_it(flags, hint):
    with pytest.raises(ConfigError) as caught:
        load(flags)
    [line] = caught.value.problems
    assert line.startswith("command line: ")
    assert hint in line


def test_an_ignored_section_is_mentioned_once(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[inference]\nlocal_batch_size = 2\nimg_size = 256\n[memory_estimation]\na = 1\nb = 2\n")
    config, notices, _ = load(["--job.config_file", str(path)])
    names = [notice.removeprefix(f"{path}: ").split(" ")[0] for notice in notices]
    assert names == ["inference.img_size", "memory_estimation"]
    assert config.inference.local_batch_size == 2
