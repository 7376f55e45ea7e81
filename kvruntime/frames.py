"""Whether code runs in the middle of other code of its own thread: signal handlers and finalizers
do, where no lock keeps them out.
"""

from __future__ import annotations

import sys
from types import FrameType


def is_on_stack(wanted: FrameType | None) -> bool:
    """Whether that frame is one of the callers. Unlike a lock or a mark, a frame does not stay when
    an interrupt ends it. O(depth of the stack); O(1) for None.
    """
    frame = sys._getframe(1) if wanted else None
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None
