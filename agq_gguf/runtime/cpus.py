"""How many CPUs this process may use, by its CPU affinity and the quotas of its control groups.

Linux limits CPU time by quotas. A container has one, and a systemd service may have one. Groups nest: the smallest
quota of the process's own group and all groups above it applies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MAX_THREADS = 512  # that ggml can use for one computation: its GGML_MAX_N_THREADS


@dataclass(frozen=True)
class Quota:
    """CPU time that a control group may use."""

    cpus: float  # CPU seconds per second, such as 1.5
    file: Path  # the file that sets the quota


@dataclass(frozen=True)
class AvailableCpus:
    """The CPUs that a process may use."""

    allowed: int  # CPUs on which the scheduler may run it
    quota: Quota | None  # the smallest one; None: no quota
    cores: int | None = None  # physical cores of these CPUs; None: unknown

    @property
    def threads(self) -> int:
        """The number of threads to use.

        Quotas are rounded down. With one thread too many, that thread waits for its next time slice, while the others
        wait for it in ggml's spin barriers.
        """
        return max(1, min(self.allowed, int(self.quota.cpus))) if self.quota else self.allowed


def default_threads() -> int:
    """Number of CPUs this process may use, at least 1, and at most as many as ggml can use."""
    return min(available_cpus().threads, MAX_THREADS)


def available_cpus(root: Path = Path("/")) -> AvailableCpus:
    """The CPUs that this process may use. `root` is the folder that holds proc and sys; tests set it."""
    quota = min(_quotas(root), key=lambda quota: quota.cpus, default=None)
    if not hasattr(os, "sched_getaffinity"):
        return AvailableCpus(os.cpu_count() or 1, quota)
    allowed = os.sched_getaffinity(0)
    return AvailableCpus(len(allowed), quota, _cores(root, allowed))


def _cores(root: Path, cpus: set[int]) -> int | None:
    """The number of physical cores of these CPUs (several CPUs may share a core); None if unknown."""
    siblings = set()
    for cpu in cpus:
        file = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            siblings.add(file.read_text(encoding="ascii").strip())
        except (OSError, ValueError):
            return None
    return len(siblings)


def _quotas(root: Path) -> Iterator[Quota]:
    """All quotas that apply to this process."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # not Linux, or /proc is not mounted
        return
    for line in groups.splitlines():
        number, controllers, group = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:  # version 2 has one hierarchy for all controllers
            folders, read = _folders(mounts, "cgroup2", "", group), _quota_v2
        elif "cpu" in controllers.split(","):
            folders, read = _folders(mounts, "cgroup", "cpu", group), _quota_v1
        else:
            continue
        for folder in folders:
            quota = read(root / folder.relative_to("/"))
            if quota is not None:
                yield quota


def _folders(mounts: str, kind: str, controller: str, group: str) -> set[PurePosixPath]:
    """The folders of a group and the groups above it that are visible in file systems of this kind.

    `mounts` is the text of /proc/self/mountinfo, see proc_pid_mountinfo(5).
    """
    path = PurePosixPath(group)
    own: set[PurePosixPath] = set()
    mounted: set[PurePosixPath] = set()
    for line in mounts.splitlines():
        place, _, source = line.partition(" - ")
        fields, file_system = place.split(" "), source.split(" ")
        if len(fields) < 5 or file_system[0] != kind:
            continue
        if controller and controller not in file_system[-1].split(","):
            continue
        top, mount = (PurePosixPath(_unescape(field)) for field in fields[3:5])
        mounted.add(mount)
        # A container without its own cgroup namespace sees the group's whole path, but only its own group and those
        # below it are mounted.
        if path.is_relative_to(top) and ".." not in path.parts:
            folder = mount / path.relative_to(top)
            own |= {above for above in (folder, *folder.parents) if above.is_relative_to(mount)}
    return own or mounted  # the path may be relative to outside the container: then its group is what is mounted


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)


def _quota_v2(folder: Path) -> Quota | None:
    file = folder / "cpu.max"
    return _quota(file, _words(file))


def _quota_v1(folder: Path) -> Quota | None:
    file = folder / "cpu.cfs_quota_us"
    return _quota(file, _words(file) + _words(folder / "cpu.cfs_period_us"))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except (OSError, ValueError):  # the root group has no quota, nor do other controllers of version 1
        return []


def _quota(file: Path, words: list[str]) -> Quota | None:
    """Quota from `words`: CPU time and period, in microseconds. None if there is no quota ("max" or -1)."""
    try:
        time, period = map(int, words)
    except ValueError:
        return None
    return Quota(time / period, file) if time > 0 and period > 0 else None
