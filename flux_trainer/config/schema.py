"""Every setting of a run: one class per TOML section, one field per key, its meaning beside it.

Sections and keys are torchtitan v0.2.2's where the meaning is the same. This module imports no torch,
so that `--help` and a wrong key answer at once. Sections that do not change what is computed, but how, are in
`compute.py`. Checks between sections live in `check.py`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from flux_trainer.config.compute import ActivationCheckpoint, Attention, Compile, Parallelism, Quantize
from flux_trainer.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PathName,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
)


class Job(Section):
    dump_folder: PathName = "./outputs"
    """Everything the run writes goes below this folder."""
    description: str = "default job"
    """A name for people; shown in the log and in the trackers."""
    print_config: bool = False
    """Print the resolved settings when the run starts."""


Flux1Flavor = Literal["flux-dev", "flux-schnell", "flux-debug", "flux-tiny"]
Flux2Flavor = Literal["flux2-dev", "flux2-klein-4b", "flux2-klein-9b", "flux2-debug", "flux2-tiny"]
FAMILIES: dict[str, tuple[str, ...]] = {"flux1": get_args(Flux1Flavor), "flux2": get_args(Flux2Flavor)}
"""Flavors by model family."""


class Model(Section):
    name: Literal["flux1", "flux2"] = "flux1"
    """Model family; when only the flavor is given, the flavor's."""
    flavor: Literal[Flux1Flavor, Flux2Flavor] = "flux-dev"
    """Size of the model."""

    @model_validator(mode="before")
    @classmethod
    def _family_of_the_flavor(cls, values: Any) -> Any:
        if isinstance(values, dict) and "name" not in values:
            for name, flavors in FAMILIES.items():
                if values.get("flavor") in flavors:
                    return {**values, "name": name}
        return values


class Encoder(Section):
    t5_encoder: PathName = "google/t5-v1_1-xxl"
    """T5: a local folder or a hub id."""
    clip_encoder: PathName = "openai/clip-vit-large-patch14"
    """CLIP text model: a local folder or a hub id."""
    t5_tokenizer: PathName = ""
    """T5 tokenizer: a local folder or a hub id; empty: the one beside the encoder."""
    clip_tokenizer: PathName = ""
    """CLIP tokenizer: a local folder or a hub id; empty: the one beside the encoder."""
    max_t5_encoding_len: PositiveInt = 256
    """T5 tokens per caption, padded or cut (512 for FLUX.1-dev, 256 for schnell)."""
    llm_encoder: PathName = ""
    """FLUX.2's language model (Mistral for dev, Qwen3 for klein): a local folder or a hub id."""
    llm_tokenizer: PathName = ""
    """Its tokenizer: a local folder or a hub id; empty: the one beside the encoder."""
    max_llm_encoding_len: PositiveInt = 512
    """Its tokens per caption, with those of the chat around it, padded or cut."""
    autoencoder_path: PathName = "assets/hf/FLUX.1-dev/ae.safetensors"
    """Autoencoder: a file of Black Forest Labs, or a file or folder of diffusers."""
    autoencoder_sample: bool = True
    """Draw latents from the autoencoder's posterior; false: take its mean."""
    random_init: bool = False
    """Take only config.json of the text encoders and fill the weights at random (tests, demonstrations)."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Dtype of the frozen text encoders."""
    autoencoder_dtype: Literal["bfloat16", "float32", "float64"] = "float32"
    """Dtype of the frozen autoencoder."""


class Source(Section):
    type: Literal["folder", "jsonl", "hf", "synthetic"]
    """folder: images next to .txt captions, at any depth; jsonl: an object per line; hf: Hugging Face;
    synthetic: noise."""
    path: PathName = ""
    """Folder, jsonl file, or data set id (or a folder written by `save_to_disk`)."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    image_key: str = ""
    """Name of the image's field (jsonl: file_name, hf: image)."""
    caption_key: str = ""
    """Name of the caption's field (text)."""
    reference_key: str = ""
    """jsonl: the field with the path of a reference image, or a list of paths; where it is missing, a sample
    has none."""
    reference_paths: list[PathName] = []
    """folder: folders of reference images. A sample's are the files of the same relative name, whatever their
    ending, in each of these; where one has no such file, a sample has one fewer."""
    weight: NonNegativeFloat | None = None
    """Share of the draws; given for all sources or for none."""
    repeats: PositiveInt = 1
    """How often one epoch passes over this source, when no weights are given."""
    size: PositiveInt = 1024
    """Number of samples of a synthetic source."""

    @property
    def refers(self) -> bool:
        """Whether samples may have reference images."""
        return bool(self.reference_key or self.reference_paths)


class Data(Section):
    sources: list[Source] = Field(default_factory=list)
    """Where training samples come from, as [[data.sources]] tables."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut after the shorter side has been resized."""
    flip_prob: Probability = 0.0
    """Probability of a horizontal flip."""
    max_pixels: PositiveInt = 100_000_000
    """Larger images count as bad samples."""
    max_references: PositiveInt = 1
    """Samples with more reference images count as bad."""
    reference_size: int = -1
    """Reference images keep their aspect and are shrunk to the area of a square of so many pixels a side, if
    they are larger; -1: training.img_size."""
    max_bad_fraction: Probability = 0.05
    """The run stops when more than this share of its samples is bad."""
    num_workers: NonNegativeInt = 2
    """Processes per rank that load and decode; 0: the main process does."""
    prefetch_factor: PositiveInt = 2
    """Batches that each worker prepares ahead."""


class Flow(Section):
    timestep_sampling: Literal["uniform", "logit_normal"] = "logit_normal"
    """Density of t in [0, 1] (0 = data, 1 = noise)."""
    logit_mean: float = 0.0
    """Mean of logit(t) for logit_normal."""
    logit_std: PositiveFloat = 1.0
    """Deviation of logit(t) for logit_normal."""
    shift: Literal["none", "flux"] | PositiveFloat = "none"
    """Move t towards noise. flux: by FLUX.1's line in the token count; number s: t -> st / (1 + (s - 1)t)."""
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    """Loss weight as a function of t."""
    guidance: NonNegativeFloat = 1.0
    """Distilled guidance fed to guidance-embedding models. 1: plain conditional velocity, the target."""


class Training(Section):
    steps: PositiveInt = 10_000
    """Optimizer steps of the whole run."""
    local_batch_size: PositiveInt = 8
    """Samples of one forward pass on one rank."""
    global_batch_size: int = -1
    """Samples of one optimizer step; -1: one local batch on every rank, or on every group of ranks that share
    samples. More means gradient accumulation."""
    img_size: PositiveInt = 256
    """Side of the square training images in pixels (a multiple of 16)."""
    max_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this total norm; 0: never."""
    classifier_free_guidance_prob: Probability = 0.1
    """Probability that a caption is replaced by the empty one."""
    classifier_free_guidance_joint: bool = True
    """Drop for T5 and CLIP together; false: independently."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype of the parameters the optimizer sees."""
    mixed_precision_param: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Dtype of weights and activations in forward and backward."""
    mixed_precision_reduce: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype in which gradients are summed over ranks."""
    spike_factor: NonNegativeFloat = 0.0
    """Skip a step whose gradient norm exceeds this multiple of its running mean; 0: only non-finite steps."""
    max_skipped_steps: PositiveInt = 50
    """Stop after this many skipped steps in a row."""
    encode_ahead: bool = False
    """On CUDA: the frozen encoders work on the next global batch, on a stream of their own, while the model
    trains on this one. No result changes; data that cannot be read end the run a step earlier. The encoders'
    activations and two more steps' encoded samples lie beside the step's peak. No effect on other devices,
    nor where ranks share a copy of the model: there they share the text encoder, too, and its traffic would
    get in the way of the step's."""
    gc_freq: PositiveInt = 50
    """Collect Python's garbage every so many steps, on all ranks at once."""


class Optimizer(Section):
    name: Literal["AdamW", "Adam"] = "AdamW"
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    beta1: Probability = 0.9
    beta2: Probability = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    decay_all: bool = False
    """Decay biases and norm scales too, as torchtitan v0.2 does."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    state_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of Adam's two moments; unset: that of the parameters. What is stored in bfloat16, moments or
    parameters, is rounded stochastically: to one of its neighbours, and right on average."""
    in_backward: bool = False
    """Let every parameter step as soon as its gradient is there, and free that at once. Needs
    training.max_norm = 0, training.spike_factor = 0 and a single micro-batch. A parameter whose gradient is
    not finite stays as it is, while others move."""


class LRScheduler(Section):
    warmup_steps: NonNegativeInt = 200
    """Linear rise from 0 to the peak."""
    total_steps: PositiveInt | None = None
    """Horizon of the schedule, when it is not training.steps."""
    decay_ratio: Probability | None = None
    """Share of the horizon spent falling; unset: all after the warm-up; 0: constant."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    min_lr_factor: Probability = 0.0
    """The rate ends at this share of the peak."""


class EMA(Section):
    enable: bool = False
    """Keep an exponential moving average of the parameters, sharded, in float32."""
    half_life: PositiveFloat = 500_000
    """Samples after which a past value counts half."""
    rampup_ratio: NonNegativeFloat = 0.05
    """The half-life is at most this share of the samples seen; 0: no such limit."""


class Checkpoint(Section):
    enable: bool = False
    """Save checkpoints, and resume from the newest one in the dump folder."""
    folder: PathName = "checkpoint"
    """Below job.dump_folder, unless it is an absolute path."""
    interval: PositiveInt = 500
    """Steps between saves. The last step is always saved."""
    initial_load_path: PathName = ""
    """Weights that start a run which has nothing to resume: a checkpoint (step-N) of this trainer or of
    torchtitan, a file of Black Forest Labs, a folder of diffusers. What it is, is found out."""
    keep_latest_k: NonNegativeInt = 10
    """Older checkpoints are deleted; 0: keep all."""
    load_step: int = -1
    """Resume from this step; -1: the newest."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async: write in the background after a copy to host memory."""
    export: list[Literal["diffusers", "bfl"]] = []
    """After the last step, also write its weights for other programs, into job.dump_folder/export/step-N.
    diffusers: the folder transformer; bfl: a file in Black Forest Labs' layout."""
    export_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the exported weights."""
    export_ema: bool = False
    """Export the moving average in place of the weights."""
    force_resume: bool = False
    """Resume although seed, data or batch size have changed."""


class Validation(Section):
    enable: bool = False
    """Measure the loss on held-out samples, and draw the prompts."""
    freq: PositiveInt = 100
    """Steps between validations; also before the first and after the last step."""
    sources: list[Source] = Field(default_factory=list)
    """Held-out samples, as [[validation.sources]] tables."""
    samples: int = -1
    """How many of them; -1: all."""
    local_batch_size: PositiveInt = 8
    timesteps: PositiveInt = 8
    """The loss is averaged over t = (i + 0.5) / timesteps."""
    prompts: list[str] = []
    """Captions that are drawn as pictures at each validation."""
    prompts_path: PathName = ""
    """A text file with one prompt per line, in place of the list; or a jsonl file: {"prompt": "...",
    "references": ["a.png"]} in each line."""
    denoising_steps: PositiveInt = 50
    enable_classifier_free_guidance: bool = True
    classifier_free_guidance_scale: NonNegativeFloat = 5.0
    save_img_folder: PathName = "img"
    """Below job.dump_folder, unless it is an absolute path."""


class Inference(Section):
    prompts: list[str] = []
    """What `flux-trainer generate` draws."""
    prompts_path: PathName = ""
    """A text file with one prompt per line, in place of the list; -: standard input. Or a jsonl file:
    {"prompt": "...", "references": ["a.png"]} in each line."""
    references: list[PathName] = []
    """Image files that all prompts refer to, before those of a jsonl file."""
    reference_size: PositiveInt | None = None
    """As data.reference_size. Unset: as the run was trained, or as published: for FLUX.2 2024 pixels, 1024
    where there are several; for FLUX.1 the nearest of Kontext's sizes."""
    negative_prompt: str = ""
    """What classifier-free guidance leads away from."""
    sizes: list[str] = []
    """WIDTHxHEIGHT in pixels, multiples of 16, or one number for a square; every prompt is drawn in each.
    Empty: training.img_size of the run, of a settings file or a flag; 1024 where none says it."""
    images_per_prompt: PositiveInt = 1
    """Pictures of every prompt in every size; the k-th, from 0 on, has seed + k."""
    seed: NonNegativeInt = 0
    denoising_steps: PositiveInt | None = None
    """Euler steps. Unset, like the next two: as the run's validation draws, or as suits the flavor."""
    guidance: NonNegativeFloat | None = None
    """Distilled guidance, for models with an embedding of it."""
    cfg_scale: NonNegativeFloat | None = None
    """Classifier-free guidance against negative_prompt, at twice the time; 1: without."""
    local_batch_size: PositiveInt = 4
    """Pictures that are drawn at the same time on one rank."""
    ema: bool = False
    """Draw with the moving average of the weights."""
    contact_sheet: bool = True
    """Also put all pictures on one sheet."""
    overwrite: bool = False
    """Replace pictures of the same names."""
    save_img_folder: PathName = "inference_results"
    """Below job.dump_folder, unless it is an absolute path."""


class Metrics(Section):
    log_freq: PositiveInt = 10
    """Steps between log lines."""
    disable_color_printing: bool = False
    enable_tensorboard: bool = False
    save_tb_folder: PathName = "tb"
    """Below job.dump_folder, unless it is an absolute path."""
    enable_wandb: bool = False
    """Log to Weights & Biases (extra `wandb`)."""


class Profiling(Section):
    enable_profiling: bool = False
    save_traces_folder: PathName = "profile_traces"
    """Below job.dump_folder, unless it is an absolute path."""
    profile_freq: PositiveInt = 10
    """Steps from one trace to the next."""
    profiler_active: PositiveInt = 1
    """Steps in a trace."""
    profiler_warmup: NonNegativeInt = 3
    enable_memory_snapshot: bool = False
    """On CUDA: write an allocation history beside each trace."""
    save_memory_snapshot_folder: PathName = "memory_snapshot"
    """Below job.dump_folder, unless it is an absolute path."""


class Comm(Section):
    init_timeout_seconds: PositiveInt = 300
    """Patience of collectives until the first step is done."""
    train_timeout_seconds: PositiveInt = 100
    """Patience of collectives afterwards; nccl's, which do not end in order, get half as much again."""
    machine_timeout_seconds: PositiveInt = 6
    """A machine whose watchers have not answered by TCP for so long is given up."""


class Debug(Section):
    seed: NonNegativeInt = 0
    """All randomness of the run is a function of this number and of the position in the run."""
    deterministic: bool = False
    """Only deterministic kernels: bitwise equal runs on GPUs too."""


class JobConfig(Section):
    """All settings of a run."""

    job: Job = Field(default_factory=Job)
    model: Model = Field(default_factory=Model)
    encoder: Encoder = Field(default_factory=Encoder)
    data: Data = Field(default_factory=Data)
    flow: Flow = Field(default_factory=Flow)
    training: Training = Field(default_factory=Training)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = Field(default_factory=LRScheduler)
    ema: EMA = Field(default_factory=EMA)
    parallelism: Parallelism = Field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = Field(default_factory=ActivationCheckpoint)
    attention: Attention = Field(default_factory=Attention)
    compile: Compile = Field(default_factory=Compile)
    quantize: Quantize = Field(default_factory=Quantize)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    validation: Validation = Field(default_factory=Validation)
    inference: Inference = Field(default_factory=Inference)
    metrics: Metrics = Field(default_factory=Metrics)
    profiling: Profiling = Field(default_factory=Profiling)
    comm: Comm = Field(default_factory=Comm)
    debug: Debug = Field(default_factory=Debug)
