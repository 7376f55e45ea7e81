"""A KeyboardInterrupt at a chosen line of the runtime's own code."""

import sys
import weakref
from pathlib import Path

import allocator
import kvruntime

FOLDERS = tuple(
    str(Path(package.__file__).parent) for package in (allocator, kvruntime) if package.__file__
)


def interrupt():
    raise KeyboardInterrupt


class Interrupts:
    """Counts the lines that run in the runtime's files, and raises at the one numbered ``at``.

    files: ends of the names of the files that count; none: all of them. what: called in place of
    raising, as a signal handler is.
    """

    def __init__(self, at, files=(), what=interrupt):
        self.at, self.files, self.what = at, files, what
        self.count = 0
        self.where = None

    def __enter__(self):
        sys.settrace(self._enter_frame)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    @property
    def happened(self):
        return self.where is not None

    def _enter_frame(self, frame, event, argument):
        name = frame.f_code.co_filename
        if not name.startswith(FOLDERS) or (self.files and not name.endswith(self.files)):
            return None
        caller = frame
        while caller is not None:
            if caller.f_code.co_filename == weakref.__file__:
                return None  # Python drops what a finalizer raises
            caller = caller.f_back
        return self._line

    def _line(self, frame, event, argument):
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.where = (Path(frame.f_code.co_filename).name, frame.f_lineno)
                sys.settrace(None)
                self.what()
        return self._line
