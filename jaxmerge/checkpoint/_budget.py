"""Sizes as people write them, and how much memory there is."""

import os
import pathlib
import re

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def parse_size(value: int | str, what: str) -> int:
    """Bytes: a number, or such as "2GB", "512MiB", "5G".

    Raises:
      ValueError: it is neither, or not above 0.
    """
    if isinstance(value, str):
        m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtKMGT]?[iI]?)[bB]?\s*", value)
        if m is None or m[2].upper() not in UNITS:
            raise ValueError(f'{what}={value!r} is not a size; write bytes, or such as "2GB" or "512MiB".')
        value = int(float(m[1]) * UNITS[m[2].upper()])
    if value <= 0:
        raise ValueError(f"{what} must be above 0, got {value}.")
    return value


def show_size(n: int | float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5:  # what rounds to three digits
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.4g} TB"


def available() -> int:
    """Bytes of memory that a process may still take here: what the system has, within its container's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
        group = pathlib.Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(free, 1 << 20)


def peak_rss() -> int:
    """The most memory this process has had, in bytes.

    What `getrusage` says begins, on Linux, with what the process had that started this one.
    """
    import resource
    import sys

    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10
