"""Context parallelism: the tokens of each sample are shared out over the ranks of a group.

Every rank holds a part of the text and a part of the image tokens, and computes all but attention on its
own. `ContextParallel.attention` takes the place of the plain one in each block. It is exact: attention is
neither masked nor causal, and positions are in q and k already, so the order of keys does not matter.

What each rank sends per call, with W ranks, L tokens and H heads that divide, b bytes an element of q and c
(float32 or wider) of a sum; in units of B D L H (W - 1) / W elements:

    method     forward    backward    when
    ulysses    4 b / W    4 b / W     as many heads as ranks; hardly any memory
    ring       2 b        2 b + 2 c   any number of heads; overlaps with compute
    allgather  2 b        2 c         any number of heads; one rank's keys and values are everybody's

The modules `ulysses`, `ring` and `gathered` say what holds where nothing divides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup

from flux_trainer.models.attention import Shapes, attention, without_padding
from flux_trainer.models.blocks import Attention
from flux_trainer.parallel.arithmetic import Method, check_context
from flux_trainer.parallel.gathered import gather_tokens, gathered_attention
from flux_trainer.parallel.group import shares
from flux_trainer.parallel.ring import ring_attention
from flux_trainer.parallel.ulysses import ulysses_attention

ops = torch.ops.flux_trainer
# Operators that communicate in forward: keep their results, and recomputation repeats no message.
COLLECTIVES = {
    ops.scatter_heads.default,
    ops.gather_heads.default,
    ops.ring_attention.default,
    ops.gather_keys_values.default,
}


class ContextParallel:
    """Splits tokens over a group of ranks, and attends across them.

    Tokens are shared out as `torch.tensor_split` does: parts may differ by one token, or be empty.
    """

    def __init__(
        self, group: ProcessGroup, method: Method, heads: int, attend: Attention = attention
    ) -> None:
        """heads: those of each call of `attention`; attend: what that is to whole sequences of keys, which a
        ring never has.

        Raises:
            ValueError: an unknown method, or ulysses with fewer heads than ranks.
        """
        if method not in get_args(Method):
            raise ValueError(f"context parallel method {method!r} is none of {', '.join(get_args(Method))}")
        self.rank, self.size = group.rank(), group.size()
        check_context(method, heads, self.size)
        self.method = method
        self.attend = attend
        self.group = group
        self.group_name: str = group.group_name
        # By how many tokens each rank's part is longer than this rank's. The lengths themselves are read from
        # q: a compiled block follows shapes, and is compiled anew only for another pattern of remainders.
        self._longer: tuple[int, ...] = ()
        self._own = 0

    def begin(self, *lengths: int) -> None:
        """Before each forward: the whole lengths of the streams that meet in attention (text, image).

        They hold for that forward, its backward and recomputation, until the next `begin`.
        """
        parts = [sum(part) for part in zip(*(shares(n, self.size) for n in lengths), strict=True)]
        self._own = parts[self.rank]
        self._longer = tuple(part - self._own for part in parts)

    def split(self, *streams: Tensor) -> tuple[Tensor, ...]:
        """This rank's tokens of each stream [B, L, ...]: views [B, L_r, ...]."""
        return tuple(x.tensor_split(self.size, dim=1)[self.rank] for x in streams)

    def padded(self, length: int) -> int:
        """The next multiple of the number of ranks: a length that `split_padded` shares out evenly."""
        return shares(length, self.size)[0] * self.size

    def split_padded(self, counts: Sequence[int], *streams: Tensor) -> tuple[Tensor, ...]:
        """This rank's share of each sample's own tokens, the first `counts[i]` of L, of streams [B, L, ...]:
        [B, ceil(L / W), ...], with zeros behind them. Shares are as even as `split`'s, padding has none."""
        parts = []
        for x in streams:
            part = x.new_zeros(x.shape[0], self.padded(x.shape[1]) // self.size, *x.shape[2:])
            for i, count in enumerate(counts):
                own = x[i, :count].tensor_split(self.size)[self.rank]
                part[i, : len(own)] = own
            parts.append(part)
        return tuple(parts)

    def gather(self, x: Tensor, length: int) -> Tensor:
        """A stream's tokens [B, L_r, ...] of all ranks -> [B, length, ...], in order. It has no gradient."""
        (whole,) = gather_tokens((x.detach(),), shares(length, self.size), self.group)
        return whole.transpose(0, 1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Shapes = ()) -> Tensor:
        """Attention of this rank's queries to all ranks' keys: [B, L_r, H, D] in and out.

        With `lengths`, padding is attended to by none, and its own result is zero.
        """
        if lengths:
            return without_padding(self._attend, q, k, v, lengths, self.rank)
        if not torch.compiler.is_compiling():  # there it would tie the graph to a length
            assert q.shape[1] == self._own, f"{q.shape[1]} tokens, but begin() said {self._own}"
        return self._attend(q, k, v, [q.shape[1] + more for more in self._longer])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        """`lengths`: tokens of each rank."""
        if self.method == "ring":
            return ring_attention(q, k, v, lengths, self.group_name)[0]
        method = ulysses_attention if self.method == "ulysses" else gathered_attention
        return method(q, k, v, lengths, self.group_name, self.attend)
