"""The ranks among which something is shared out: how much each gets, and their group by name.

Operators of a compiled graph take a group by its name, as torch's functional collectives do.
"""

from __future__ import annotations

from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.distributed_c10d import GroupName, ProcessGroup


def shares(n: int, size: int) -> list[int]:
    """How many of n things each of `size` ranks gets: the rule of `torch.tensor_split`."""
    return [(n + size - 1 - rank) // size for rank in range(size)]


def group_named(name: str) -> ProcessGroup:
    """The process group whose `group_name` is `name`."""
    return _resolve_process_group(GroupName(name))
