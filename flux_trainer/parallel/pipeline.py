"""Pipeline parallelism: stages of consecutive blocks on several ranks, fed with micro-batches.

`torch.distributed.pipelining` has the schedules; here the stages are made and run. What travels is the state
that goes from block to block. All else that a stage needs (position ids), its rank has itself, for the ranks
of a pipeline work on the same samples.

In each step, S stages send for each of n micro-batches the state forward and its gradient back:

    2 n (S - 1) B (L + v) h elements in the dtype of the computation

for a state of B x L tokens and B x v vectors of size h: one that modulates; with FLUX.2 also the 15 of the
modulations that all blocks share, which the first stage makes and whose gradient, summed over all blocks,
comes back to it. A prediction sends (S - 1) states
forward, then the output to all ranks of the pipeline. Before the first step with a shape, neighbours exchange
a few bytes.

FSDP treats a micro-batch of a pipeline as it does one of gradient accumulation: it gathers a stage's weights
for each forward and each backward, and reduces gradients after each backward. With `hold` it does all that
once in a step, and the rank has room for the weights and gradients of its whole stages meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from flux_trainer.models.model import Arguments, FluxModel
from flux_trainer.parallel.cut import take
from flux_trainer.parallel.stages import STAGES_PER_RANK
from flux_trainer.runtime import peers

Inputs = Arguments
"""Those of all ranks of a pipeline are the same."""


class Pipeline:
    """This rank's stages of a model, and how all ranks of the pipeline run them together.

    `parts` are the stages' modules, on the meta device at first: whoever made the pipeline makes them
    parallel in other ways, and gives them memory.
    """

    def __init__(
        self,
        model: FluxModel,
        spans: Sequence[range],
        group: dist.ProcessGroup,
        *,
        schedule: str,
        dtype: torch.dtype,
        hold: bool = False,
    ) -> None:
        """Cut `model`, which lies on the meta device.

        Args:
            spans: the blocks of each stage (`stages.spans`).
            group: the ranks of this pipeline; stage s lies on its rank s mod size.
            schedule: its name, one of `STAGES_PER_RANK`.
            dtype: of the computation, hence of the states.
            hold: let FSDP gather weights and reduce gradients once in a step.
        """
        self.group, self.rank, self.size = group, group.rank(), group.size()
        assert len(spans) == STAGES_PER_RANK[schedule] * self.size
        self.schedule, self.hold = schedule, hold
        self.last = len(spans) - 1
        self.numbers = range(self.rank, len(spans), self.size)
        self.parts = [
            take(model, spans[number], embedders=number == 0, head=number == self.last)
            for number in self.numbers
        ]
        # The model without blocks, on the meta device: what its ends return has the shapes of all states and
        # of the output.
        self.ends = [
            take(model, (), embedders=not head, head=head).to(device="meta", dtype=dtype)
            for head in (False, True)
        ]
        self.schedules: dict[Any, Any] = {}  # by what they depend on: the number and shapes of micro-batches
        self.inputs: Sequence[Inputs] = ()  # of the present step, by micro-batch
        self.loss: Callable[[Tensor, int], Tensor]

    @property
    def device(self) -> torch.device:
        return next(self.parts[0].parameters()).device

    def forward_backward(self, inputs: Sequence[Inputs], loss: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Run all micro-batches of a step; add the gradients of the sum of their losses to the parameters'.

        Args:
            inputs: of each micro-batch; all of the same shapes.
            loss: (the model's output, number of the micro-batch) -> scalar; called on the last stage.

        Returns:
            The sum of the losses on the rank that has the last stage, zero elsewhere: a scalar on the device.
        """
        self.inputs, self.loss = inputs, loss
        losses: list[Tensor] = []
        numbers = torch.arange(len(inputs))  # what the schedule splits into micro-batches
        self._schedule().step(index=numbers, target=numbers, losses=losses, return_outputs=False)
        self.inputs = ()
        return sum((each.detach() for each in losses), torch.zeros((), device=self.device))

    @torch.no_grad()
    def predict(self, inputs: Inputs) -> Tensor:
        """The model's output, on every rank of the pipeline, without gradients."""
        like, output_like = self.shapes(inputs)
        output: Any = None
        for number, part in zip(self.numbers, self.parts, strict=True):
            state = None
            if number > 0:
                state = tuple(torch.empty_like(s, device=self.device) for s in like)
                for s in state:
                    dist.recv(s, group=self.group, group_src=(number - 1) % self.size)
            output = part(**inputs, state=state)
            if number < self.last:
                for s in output:
                    dist.send(s.contiguous(), group=self.group, group_dst=(number + 1) % self.size)
        if self.rank == self.size - 1:
            output = output.contiguous()
        else:
            output = torch.empty_like(output_like, device=self.device)
        dist.broadcast(output, group=self.group, group_src=self.size - 1)
        return output

    def shapes(self, inputs: Inputs) -> tuple[tuple[Tensor, ...], Tensor]:
        """A state and the output for such inputs, on the meta device."""
        on_meta: dict[str, Any] = {
            name: x.to("meta") if isinstance(x, Tensor) else x for name, x in inputs.items()
        }
        with torch.no_grad():
            state = tuple(contiguous_copy(s) for s in self.ends[0](**on_meta))
            return state, contiguous_copy(self.ends[1](**on_meta, state=state))

    def _schedule(self) -> Any:
        """The schedule for the present micro-batches."""
        shapes = [
            {name: x.shape for name, x in each.items() if isinstance(x, Tensor)} for each in self.inputs
        ]
        assert all(each == shapes[0] for each in shapes), f"micro-batches of different shapes: {shapes}"
        key = (len(shapes), *shapes[0].items())
        if not self.schedules:  # all ranks at once: nccl connects a group in its first collective
            dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
        if key not in self.schedules:
            kind = get_schedule_class(self.schedule)
            stages = [self._stage(local) for local in range(len(self.parts))]
            self.schedules[key] = kind(
                stages if issubclass(kind, PipelineScheduleMulti) else stages[0],
                n_microbatches=len(shapes),
                loss_fn=lambda output, index: self.loss(output, int(index)),
                scale_grads=False,
            )
        return self.schedules[key]

    def _stage(self, local: int) -> PipelineStage:
        """torch's view of stage `numbers[local]`, for the shapes of the present micro-batches."""
        like, output_like = self.shapes(self.inputs[0])
        state = tuple(s.requires_grad_() for s in like)
        number = self.numbers[local]
        return _MarkedStage(
            _Stage(lambda *state, index: self._run(local, state, index)),
            stage_index=number,
            num_stages=self.last + 1,
            device=self.device,
            input_args=() if number == 0 else state,
            output_args=output_like.requires_grad_() if number == self.last else state,
            group=self.group,
        )

    def _run(self, local: int, state: tuple[Tensor, ...], index: int) -> Any:
        """Forward of a stage for one micro-batch."""
        part = self.parts[local]
        if state:
            state = _Boundary.apply(None, *state)
        output = part(**self.inputs[index], state=state or None)
        is_last = index == len(self.inputs) - 1
        output = _Boundary.apply(
            lambda: self._before_backward(part, is_last), *(output if isinstance(output, tuple) else [output])
        )
        return output if self.numbers[local] < self.last else output[0]

    def _before_backward(self, part: FluxModel, is_last: bool) -> None:
        """Tell FSDP what to do after the coming backward."""
        if isinstance(part, FSDPModule):
            part.set_is_last_backward(is_last)
            if self.hold:
                part.set_requires_gradient_sync(is_last)
                part.set_reshard_after_backward(is_last)
            else:  # HSDP: replicas exchange what was summed within each
                part.set_requires_all_reduce(is_last)


def contiguous_copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


class _MarkedStage(PipelineStage):
    """Leaves a mark of progress when a micro-batch is through. A rank that waits for a neighbour's has by
    then made at least as many as that one, in all schedules here."""

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(*args, **kwargs)
        peers.mark()
        return output

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        gradients = super().backward_one_chunk(*args, **kwargs)
        peers.mark()
        return gradients


class _Stage(nn.Module):
    """What torch takes for a stage's module. It hides the real one, so that torch leaves FSDP to us."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *state: Tensor, index: Tensor) -> Any:
        return self.run(*state, index=int(index))


class _Boundary(torch.autograd.Function):
    """The identity, with results and gradients that may be sent: contiguous (gloo takes no other), and not
    somebody else's memory. `before_backward` is called first in a stage's backward."""

    @staticmethod
    def forward(ctx: Any, before_backward: Callable[[], None] | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.before_backward = before_backward
        return tuple(contiguous_copy(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.before_backward is not None:
            ctx.before_backward()
        return None, *(gradient.contiguous() for gradient in gradients)
