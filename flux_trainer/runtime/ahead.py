"""One item ahead, on a CUDA stream of its own: while one item is used, the next one is made beside it.

    host        make 1, make 2, use 1    make 3, use 2    make 4, use 3    ...
    side        [ make 1 ][ make 2 ]     [ make 3 ]       [ make 4 ]
    main                   [ use 1 ]     [ use 2 ]        [ use 3 ]

The host does one after another, in an order that does not depend on time. On the device the main stream
waits for what it uses, and for nothing else.

Memory taken on the side stream goes back to that stream's pool: what is made next may get it, and would be
written while the main stream still reads. So when the host makes item k + 1, k - 1 is still held here; what
was let go are items up to k - 2, and the side stream waits until the main stream has left these. There are at
most three items: one just used, one to be used next, one in the making.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")


def one_ahead(items: Iterator[T], device: torch.device) -> Iterator[T]:
    """The same items; each is asked for before the one ahead of it is handed out.

    Args:
        items: their making may read what lay on the device before the first one; of what is changed there
            afterwards, nothing.
        device: of kind cuda.
    """
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    begun = main.record_event()  # the use of the latest item that was handed out

    def make() -> tuple[list[T], torch.cuda.Event]:
        """The next item, if there is one, and when it is there."""
        side.wait_event(begun)
        with torch.cuda.stream(side):
            return list(islice(items, 1)), side.record_event()

    coming = make()
    while coming[0]:
        following = make()
        (item, made), coming = coming, following  # only now is the item before let go
        main.wait_event(made)
        begun = main.record_event()
        yield item[0]
