"""How much memory a process took. No torch."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far, in bytes.

    Linux keeps it per address space (VmHWM). getrusage's figure survives exec, so that a small child of a large parent
    would report the parent's; it is used elsewhere for want of better.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
