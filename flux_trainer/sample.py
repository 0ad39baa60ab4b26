"""Pictures of prompts: Euler steps from noise to data, shared out over the data-parallel groups of a mesh.

Noise is a function of a picture's own seed and size, so the batch it is drawn in and the number of ranks
change a picture by the rounding of sums alone. Pictures of different sizes never share a batch; groups may
draw different sizes at the same time, for all they have to agree on is the number of calls of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from flux_trainer.config.pictures import Request
from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.reference import load_reference
from flux_trainer.encoders.choose import TextEncoder
from flux_trainer.encoders.text import TextFeatures
from flux_trainer.flow import rng
from flux_trainer.flow.euler import euler
from flux_trainer.flow.latents import LatentSpace, References
from flux_trainer.flow.rng import Purpose
from flux_trainer.flow.timesteps import MU, Mu, schedule
from flux_trainer.models.registry import FLAVORS
from flux_trainer.parallel.mesh import DataGroup
from flux_trainer.runtime.dist import all_gather

Predict = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, References | None], Tensor]
"""(x_t [B, C, h, w], t [B], txt [B, L, D], vec [B, D'], guidance [B], references) -> velocity [B, C, h, w].
Families without a pooled caption have vec None, models without guidance have guidance None."""

Shown = Mapping[tuple[str, ...], Sequence[Tensor]]
"""By a request's `references`: the latents [C, h, w] of each, in host memory."""

Round = list[list[int]]
"""Numbers of the requests that each group draws at the same time; groups beyond its end are without any."""


def sampler_mu(flavor: str) -> Mu | None:
    """How the sampler's times are shifted: as is the family's way; FLUX.1-schnell's are not."""
    return None if flavor == "flux-schnell" else MU[FLAVORS[flavor].family]


def share_out(requests: Sequence[Request], groups: int, batch_size: int) -> list[Round]:
    """Batches of at most `batch_size` requests of one kind, in rounds of one batch per group.

    A kind is split evenly, and over all groups rather than into full batches for a few of them. Batches of
    one round take the same number of steps.
    """
    kinds: dict[tuple[int, bool, int, int, bool], list[int]] = {}
    for number, r in enumerate(requests):
        kind = (r.steps, r.guided, r.height, r.width, r.guidance is None)
        kinds.setdefault(kind, []).append(number)
    batches: dict[int, list[list[int]]] = {}  # by steps
    for (steps, *_), numbers in kinds.items():
        full = -(-len(numbers) // batch_size)
        count = min(len(numbers), -(-full // groups) * groups)
        cuts = [len(numbers) * i // count for i in range(count + 1)]
        batches.setdefault(steps, []).extend(numbers[a:b] for a, b in pairwise(cuts))
    return [each[i : i + groups] for each in batches.values() for i in range(0, len(each), groups)]


def prompts_of(requests: Iterable[Request]) -> list[str]:
    """Every text that the requests' pictures need, once."""
    texts = ((r.prompt, r.negative_prompt) if r.guided else (r.prompt,) for r in requests)
    return list(dict.fromkeys(text for pair in texts for text in pair))


def encode_prompts(
    requests: Sequence[Request],
    rounds: Sequence[Round],
    encoders: TextEncoder,
    group: DataGroup,
) -> dict[str, TextFeatures]:
    """Features (txt [L, C], vec [D] if any) of each text that this rank's group needs, in host memory.

    Text by text: the sums of a batch are rounded in another order, and the pictures would depend on it. All
    ranks make the same number of calls of the encoders, as a sharded T5 requires.
    """
    needed = [
        prompts_of(requests[i] for batches in rounds for i in batch_of(batches, number))
        for number in range(group.count)
    ]
    mine = needed[group.number]
    features: dict[str, TextFeatures] = {}
    for number in range(max(map(len, needed))):
        text = mine[number] if number < len(mine) else ""
        encoded = encoders.encode(encoders.tokenize([text]))
        vec = None if encoded.vec is None else encoded.vec[0].cpu()
        features[text] = TextFeatures(encoded.txt[0].cpu(), vec)
    return features


def reference_encoder(
    encode: Callable[[Tensor], Tensor], side_of: Callable[[int], int | None], max_pixels: int
) -> Callable[[str, int], Tensor]:
    """(file, how many references its picture has) -> latents [C, h, w] in host memory, computed once.

    It raises DataError for a file that cannot be taken.

    Args:
        encode: uint8 [1, 3, H, W] -> latents [1, C, h, w].
        side_of: how many references -> `side` of `load_reference`.
    """

    @cache
    def once(path: str, side: int | None) -> Tensor:
        try:
            image = load_reference(path, side, max_pixels)
        except BadSample as error:
            raise DataError(str(error)) from error
        return encode(image[None])[0].cpu()

    return lambda path, count: once(path, side_of(count))


def encode_references(
    requests: Sequence[Request],
    rounds: Sequence[Round],
    encode: Callable[[str, int], Tensor],
    group: DataGroup,
) -> dict[tuple[str, ...], list[Tensor]]:
    """Latents of the reference images that this rank's group needs; `encode` is a `reference_encoder`."""
    mine = [requests[i] for batches in rounds for i in batch_of(batches, group.number)]
    return {r.references: [encode(path, len(r.references)) for path in r.references] for r in mine}


@torch.no_grad()
def draw(
    requests: Sequence[Request],
    rounds: Sequence[Round],
    features: Mapping[str, TextFeatures],
    predict: Predict,
    decode: Callable[[Tensor], Tensor],
    *,
    space: LatentSpace,
    mu: Mu | None,
    group: DataGroup,
    dtype: torch.dtype,
    shown: Shown | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(number of the request, its picture uint8 [3, H, W] in host memory), round by round, on every rank.

    Every group makes the same number of calls of `predict`; one without a batch works along for nothing.

    Args:
        rounds: from `share_out`.
        features: from `encode_prompts`.
        decode: latents [1, C, h, w] -> uint8 [1, 3, H, W].
        space: of the latents.
        mu: how times are shifted (`sampler_mu`).
        dtype: of noise and latents, float32 or wider.
        shown: from `encode_references`; None: no request has references.
    """
    for batches in rounds:
        numbers = batch_of(batches, group.number)
        batch = [requests[i] for i in numbers]
        latents = denoise(batch, features, predict, space, mu, group.world.device, dtype, shown)
        drawn = None
        if group.leads and group.number < len(batches):
            drawn = [(i, decode(x[None])[0].cpu()) for i, x in zip(numbers, latents, strict=True)]
        for theirs in all_gather(drawn, group.world.control):
            yield from theirs or ()


def batch_of(batches: Round, group: int) -> list[int]:
    """What a group computes in a round; one without a batch of its own repeats the last."""
    return batches[min(group, len(batches) - 1)]


def denoise(
    batch: Sequence[Request],
    features: Mapping[str, TextFeatures],
    predict: Predict,
    space: LatentSpace,
    mu: Mu | None,
    device: torch.device,
    dtype: torch.dtype,
    shown: Shown | None = None,
) -> Tensor:
    """Latents [B, C, h, w] of requests of one kind."""
    steps, height, width = batch[0].steps, batch[0].height, batch[0].width
    shape = space.shape(height, width)
    noise = [
        rng.normal(r.seed, Purpose.PICTURE, torch.tensor([r.draw], device=device), shape, dtype)
        for r in batch
    ]
    times = schedule(steps, mu and mu(space.tokens(height, width), steps))
    references = [shown[r.references] if shown else [] for r in batch]
    start = torch.cat(noise)
    if batch[0].guided:
        references *= 2
    tokens = space.references(references, start)
    return euler(guided(batch, features, predict, device, dtype, tokens), start, times)


def guided(
    batch: Sequence[Request],
    features: Mapping[str, TextFeatures],
    predict: Predict,
    device: torch.device,
    dtype: torch.dtype,
    references: References | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity that a batch of one kind follows: (x [B, ...], t [B]) -> [B, ...].

    Classifier-free guidance (Ho & Salimans 2022): u + cfg_scale (c - u), with c for the prompt and u for the
    negative one, both in one call of the model. `references` are those of all its samples: u sees them too.
    """
    texts = [r.prompt for r in batch]
    repeats = 1
    if batch[0].guided:
        texts, repeats = [r.negative_prompt for r in batch] + texts, 2
    txt = torch.stack([features[text].txt for text in texts]).to(device)  # [B or 2B, L, C]
    vecs = [vec for text in texts if (vec := features[text].vec) is not None]
    vec = torch.stack(vecs).to(device) if vecs else None  # [B or 2B, D]
    guidance = None
    if batch[0].guidance is not None:
        guidance = torch.tensor([r.guidance for r in batch] * repeats, dtype=dtype, device=device)
    scale = torch.tensor([r.cfg_scale for r in batch], dtype=dtype, device=device).view(-1, 1, 1, 1)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if repeats == 1:
            return predict(x, t, txt, vec, guidance, references).to(x.dtype)
        both = predict(torch.cat([x, x]), torch.cat([t, t]), txt, vec, guidance, references)
        u, c = both.to(x.dtype).chunk(2)
        return u + scale * (c - u)

    return velocity
