"""Shapes of the models, without torch: settings are checked with them before it is imported."""

from dataclasses import dataclass
from typing import ClassVar

TIME_DIM = 256  # sinusoids of timestep and guidance


class _Shape:
    """What the shapes of all families have in common, and in what families differ."""

    family: ClassVar[str]
    """As `model.name` in the settings."""
    text_length: ClassVar[str]
    """Setting of [encoder] that says how many text tokens a sample has."""
    shared_modulation: ClassVar[bool]
    """Whether modulations are made once for all blocks, or in each block."""
    bias: ClassVar[bool]
    """Whether linears have one, those of qkv left aside."""
    gated: ClassVar[bool]
    """Whether MLPs have SwiGLU or GELU."""

    hidden_size: int
    mlp_ratio: float
    num_heads: int
    axes_dim: tuple[int, ...]
    theta: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def state_vectors(self) -> int:
        """Vectors [B, hidden_size] that go from block to block beside the tokens: timestep, guidance and
        caption in one, and modulations (two double-stream ones of 6, a single-stream one of 3) if shared."""
        return 1 + (15 if self.shared_modulation else 0)

    def _check(self, *positive: str) -> None:
        """Raise ValueError for what no model can be built of; the fields named must be positive."""
        name = type(self).__name__
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))  # a list when read from JSON
        for field in positive:
            if getattr(self, field) < 1:
                raise ValueError(f"{name}.{field} is {getattr(self, field)}; it must be at least 1.")
        for field in ("depth", "depth_single_blocks"):
            if getattr(self, field) < 0:
                raise ValueError(f"{name}.{field} is {getattr(self, field)}; it cannot be negative.")
        if self.mlp_hidden < 1 or self.theta <= 0:
            raise ValueError(
                f"{name}.mlp_ratio ({self.mlp_ratio}) and theta ({self.theta}) must be positive, "
                "and the MLP at least one channel wide."
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"{name}.hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})."
            )
        if any(dim < 2 or dim % 2 for dim in self.axes_dim):
            raise ValueError(
                f"{name}.axes_dim is {self.axes_dim}; rotary embeddings turn pairs: each must be even."
            )
        if sum(self.axes_dim) != self.head_dim:
            raise ValueError(
                f"{name}.axes_dim {self.axes_dim} adds up to {sum(self.axes_dim)}; it must give the "
                f"head dimension hidden_size / num_heads = {self.head_dim}."
            )


@dataclass(frozen=True)
class Flux1Config(_Shape):
    """Shape of a FLUX.1 transformer; the field names and their order are those of BFL's `FluxParams`."""

    in_channels: int
    """Channels of an image token (2 x 2 latents of 16 channels: 64)."""
    out_channels: int
    vec_in_dim: int
    """Size of the pooled caption (CLIP: 768)."""
    context_in_dim: int
    """Size of a text token (T5-XXL: 4096)."""
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    """Double-stream blocks."""
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    """Dimensions of a head given to each axis of the position ids."""
    theta: int
    """Base of the rotary frequencies."""
    qkv_bias: bool
    """Bias in the double-stream qkv projections; all other linears have one anyway."""
    guidance_embed: bool
    """Whether the model takes a guidance value (FLUX.1-dev does, schnell does not)."""

    family: ClassVar[str] = "flux1"
    text_length: ClassVar[str] = "max_t5_encoding_len"
    shared_modulation: ClassVar[bool] = False
    bias: ClassVar[bool] = True
    gated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check("in_channels", "out_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads")


@dataclass(frozen=True)
class Flux2Config(_Shape):
    """Shape of a FLUX.2 transformer; the field names and their order are those of BFL's `Flux2Params`."""

    in_channels: int
    """Channels of an image token, in and out (the autoencoder's 128)."""
    context_in_dim: int
    """Size of a text token (three layers of the text encoder side by side)."""
    hidden_size: int
    num_heads: int
    depth: int
    """Double-stream blocks."""
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    """Dimensions of a head given to each axis of the position ids: time, height, width, text."""
    theta: int
    """Base of the rotary frequencies."""
    mlp_ratio: float
    use_guidance_embed: bool
    """Whether the model takes a guidance value (dev does, klein does not)."""

    family: ClassVar[str] = "flux2"
    text_length: ClassVar[str] = "max_llm_encoding_len"
    shared_modulation: ClassVar[bool] = True
    bias: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = False
    gated: ClassVar[bool] = True
    vec_in_dim: ClassVar[int] = 0  # there is no pooled caption

    @property
    def out_channels(self) -> int:
        return self.in_channels

    @property
    def guidance_embed(self) -> bool:
        """`use_guidance_embed` by FLUX.1's name."""
        return self.use_guidance_embed

    def __post_init__(self) -> None:
        self._check("in_channels", "context_in_dim", "hidden_size", "num_heads")


ModelConfig = Flux1Config | Flux2Config
