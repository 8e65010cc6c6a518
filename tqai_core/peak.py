"""What a stretch of code needs in memory above what was held before it, and how that was measured."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from types import TracebackType

import torch

CUDA = "torch.cuda.max_memory_allocated above what was allocated before"
PROC = "peak resident memory of the process above what was resident before (VmHWM - VmRSS)"
RUSAGE = "growth of the process's own peak resident memory (ru_maxrss): 0 where loading the model took more"
NONE = "not measured: this system does not report the peak of a process"


class Peak:
    """``with Peak(device) as peak: ...``; then ``peak.nbytes``, or None where it cannot be measured, and ``peak.how``."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.how = device, NONE
        self.nbytes: int | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before, self.how = torch.cuda.memory_allocated(self.device), CUDA
            return self
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the run is served from what an earlier one left
        try:
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")  # the high-water mark starts anew
            self._before, self.how = status("VmRSS"), PROC
        except OSError:
            with suppress(ImportError):
                self._before, self.how = _maxrss(), RUSAGE
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.how == NONE:
            return
        now = torch.cuda.max_memory_allocated(self.device) if self.how == CUDA else status("VmHWM") if self.how == PROC else _maxrss()
        self.nbytes = max(now - self._before, 0)


def status(name: str) -> int:
    """Bytes of a line of this process's status, as ``VmRSS``. OSError off Linux."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))


def _maxrss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
