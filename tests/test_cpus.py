"""The number of CPUs that a process may use, in made-up containers and in a real control group."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import environment

from agq_gguf.runtime.cpus import AvailableCpus, available_cpus, default_threads

V1 = "34 25 0:30 {top} {mount} rw,nosuid shared:9 master:2 - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "35 25 0:31 {top} {mount} rw,nosuid - cgroup2 cgroup rw,nsdelegate\n"
OTHERS = (
    "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
    "33 25 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "36 25 0:32 /inner /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
)


@pytest.fixture(autouse=True)
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)


class Machine:
    """A tree with /proc and /sys of a process."""

    def __init__(self, root: Path):
        self.root = root

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def groups(self, text: str, mounts: str) -> None:
        self.write("/proc/self/cgroup", text)
        self.write("/proc/self/mountinfo", OTHERS + mounts)

    def v1(self, folder: str, quota: int, period: int = 100_000) -> None:
        self.write(f"{folder}/cpu.cfs_quota_us", f"{quota}\n")
        self.write(f"{folder}/cpu.cfs_period_us", f"{period}\n")

    @property
    def threads(self) -> int:
        return available_cpus(self.root).threads


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("quota", "threads"),
    [
        ("max 100000", 64),
        ("150000 100000", 1),
        ("10000 100000", 1),
        ("399999 100000", 3),
        ("400000 100000", 4),
        ("20000 10000", 2),
        ("12800000 100000", 64),  # more than there are CPUs
        ("", 64),
        ("max", 64),
        ("nothing known", 64),
        ("100000 0", 64),
    ],
)
def test_threads_respect_the_quota_of_a_container(quota: str, threads: int, machine: Machine) -> None:
    machine.groups("0::/\n", V2.format(top="/", mount="/sys/fs/cgroup"))
    machine.write("/sys/fs/cgroup/cpu.max", f"{quota}\n")
    assert machine.threads == threads


@pytest.mark.parametrize(
    ("quota", "period", "threads"),
    [(-1, 100_000, 64), (100_000, 100_000, 1), (199_999, 100_000, 1), (150_000, 50_000, 3), (5_000, 100_000, 1)],
)
def test_version_1(quota: int, period: int, threads: int, machine: Machine) -> None:
    """A container with its own namespace of groups, or none but its own group mounted."""
    folder = "/sys/fs/cgroup/cpu,cpuacct"
    for group, top in (("/", "/"), ("/docker/0a1b", "/docker/0a1b")):
        machine.groups(f"4:memory:{group}\n3:cpu,cpuacct:{group}\n0::/\n", V1.format(top=top, mount=folder))
        machine.v1(folder, quota, period)
        assert machine.threads == threads


def test_the_quota_of_a_service(machine: Machine) -> None:
    """`systemctl set-property llm.service CPUQuota=250%`: nothing is said at the top."""
    group = "/system.slice/llm.service"
    machine.groups(f"0::{group}\n", V2.format(top="/", mount="/sys/fs/cgroup"))
    machine.write(f"/sys/fs/cgroup{group}/cpu.max", "250000 100000\n")
    machine.write("/sys/fs/cgroup/system.slice/other.service/cpu.max", "100000 100000\n")  # not ours
    assert machine.threads == 2
    quota = available_cpus(machine.root).quota
    assert quota is not None and quota.cpus == 2.5
    assert quota.file == machine.root / f"sys/fs/cgroup{group}/cpu.max"


@pytest.mark.parametrize(
    ("outer", "middle", "inner", "threads"),
    [
        ("max", "max", "300000", 3),
        ("300000", "max", "500000", 3),
        ("max", "200000", "max", 2),
        ("max", "max", "max", 64),
    ],
)
def test_every_ancestor_counts(outer: str, middle: str, inner: str, threads: int, machine: Machine) -> None:
    machine.groups("0::/a/b c/d\n", V2.format(top="/", mount="/sys/fs/cgroup"))
    for folder, quota in (("a", outer), ("a/b c", middle), ("a/b c/d", inner)):
        machine.write(f"/sys/fs/cgroup/{folder}/cpu.max", f"{quota} 100000\n")
    assert machine.threads == threads


def test_ancestors_of_version_1(machine: Machine) -> None:
    machine.groups("3:cpuacct,cpu:/kubepods/pod1/c1\n", V1.format(top="/", mount="/sys/fs/cgroup/cpu"))
    machine.v1("/sys/fs/cgroup/cpu", -1)
    machine.v1("/sys/fs/cgroup/cpu/kubepods", -1)
    machine.v1("/sys/fs/cgroup/cpu/kubepods/pod1", 400_000)
    machine.v1("/sys/fs/cgroup/cpu/kubepods/pod1/c1", 800_000)
    assert machine.threads == 4


def test_both_versions_at_once(machine: Machine) -> None:
    """The controller may be in either hierarchy; a file of the other version says nothing there."""
    mounts = V1.format(top="/", mount="/sys/fs/cgroup/cpu") + V2.format(top="/", mount="/sys/fs/cgroup/unified")
    machine.groups("3:cpu:/one\n0::/two\n", mounts)
    machine.write("/sys/fs/cgroup/cpu/one/cpu.max", "100000 100000\n")
    machine.v1("/sys/fs/cgroup/unified/two", 100_000)
    assert machine.threads == 64
    machine.v1("/sys/fs/cgroup/cpu/one", 500_000)
    assert machine.threads == 5
    machine.write("/sys/fs/cgroup/unified/two/cpu.max", "200000 100000\n")
    assert machine.threads == 2


@pytest.mark.parametrize(("group", "top"), [("/host/path", "/other"), ("/../../host/path", "/"), ("/", "/..")])
def test_a_group_that_is_told_from_outside(group: str, top: str, machine: Machine) -> None:
    """The path is not below what is mounted: then what is mounted is the container's group, or above it."""
    machine.groups(f"0::{group}\n", V2.format(top=top, mount="/sys/fs/cgroup"))
    machine.write("/sys/host/path/cpu.max", "200000 100000\n")
    machine.write("/sys/fs/cgroup/cpu.max", "300000 100000\n")
    assert machine.threads == 3


def test_another_mount_of_foreign_groups_does_not_count(machine: Machine) -> None:
    mounts = V2.format(top="/", mount="/sys/fs/cgroup") + V2.format(top="/neighbour", mount="/mnt/watched")
    machine.groups("0::/mine\n", mounts)
    machine.write("/mnt/watched/cpu.max", "100000 100000\n")
    machine.write("/sys/fs/cgroup/mine/cpu.max", "700000 100000\n")
    assert machine.threads == 7


def test_odd_paths(machine: Machine) -> None:
    """Colons in the group's name, spaces in that of the mount."""
    machine.groups("0::/a:b/c\n", V2.format(top="/", mount="/sys/fs/my\\040groups"))
    machine.write("/sys/fs/my groups/a:b/cpu.max", "600000 100000\n")
    assert machine.threads == 6


def test_no_control_groups(machine: Machine) -> None:
    assert available_cpus(machine.root) == AvailableCpus(64, None)


def test_a_sandbox_that_says_little(machine: Machine) -> None:
    machine.groups("\n0\n3:cpu:\n", "35 25\n - cgroup2\n" + V1.format(top="/", mount="/sys/fs/cgroup/cpu"))
    assert machine.threads == 64


def test_threads_of_one_core(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(8):
        machine.write(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 4, 5, 6}, raising=False)
    assert available_cpus(machine.root) == AvailableCpus(5, None, cores=3)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 99}, raising=False)
    assert available_cpus(machine.root).cores is None


def test_affinity(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.groups("0::/\n", V2.format(top="/", mount="/sys/fs/cgroup"))
    machine.write("/sys/fs/cgroup/cpu.max", "800000 100000\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert machine.threads == 2
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert machine.threads == 1


@pytest.fixture
def one_cpu() -> Iterator[Path]:
    """A real group, below that of this process, whose processes may use one CPU."""
    folder = Path("/sys/fs/cgroup/cpu") / f"agq-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("control groups of version 1 cannot be made here")
    try:
        (folder / "cpu.cfs_quota_us").write_text("100000")
        yield folder
    finally:
        folder.rmdir()


def test_a_real_group(one_cpu: Path) -> None:
    code = (
        "import os, pathlib, sys\npathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from agq_gguf.runtime.cpus import available_cpus\nprint(available_cpus().quota)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(one_cpu)], capture_output=True, text=True, check=False, env=environment()
    )
    assert result.stdout.startswith("Quota(cpus=1.0"), result.stderr


def test_this_process() -> None:
    assert 1 <= default_threads() <= 64
