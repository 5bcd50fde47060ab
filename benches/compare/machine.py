"""The kernel's measurements of processes, and of other users of the machine."""

import os
import time

TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    """Processor time of a process, user and system, its threads that have ended included, to the nanosecond."""
    # clock_getcpuclockid(3): the clock of another process.
    return time.clock_gettime((~pid << 3) | 2)


def private_kb(pid):
    """Memory that only this process has."""
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def status_kb(pid, name):
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _stat(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return int(fields[1]), sum(int(ticks) for ticks in fields[11:15])


def _own_ticks():
    """Of this process and all below it, those that have ended and been waited for included."""
    parents, ticks = {}, {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parents[int(name)], ticks[int(name)] = _stat(name)
            except (FileNotFoundError, ProcessLookupError):
                pass  # gone meanwhile
    me, total = os.getpid(), 0
    for pid in ticks:
        above = pid
        while above not in (0, me):
            above = parents.get(above, 0)
        if above == me:
            total += ticks[pid]
    return total


def _machine_ticks():
    with open("/proc/stat") as lines:
        user, nice, system, _idle, _wait, _irq, _softirq, steal = map(int, lines.readline().split()[1:9])
    return user + nice + system, steal


class Watch:
    """How many cores others used while it was open, and how much of one the hypervisor took."""

    def __enter__(self):
        self._began = time.monotonic(), _own_ticks(), _machine_ticks()
        return self

    def __exit__(self, *_):
        began, own, (busy, steal) = self._began
        elapsed = max(time.monotonic() - began, 0.05) * TICK
        own, (now_busy, now_steal) = _own_ticks() - own, _machine_ticks()
        self.foreign = max(0.0, (now_busy - busy - own) / elapsed)
        self.stolen = (now_steal - steal) / elapsed

    @property
    def disturbed(self):
        # A tick of rounding must not count in a short run.
        return self.foreign > 0.15 or self.stolen > 0.05


def describe():
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), os.uname().machine)
    with open("/proc/loadavg") as file:
        load = file.read().split()[0]
    # BBR paces even the loopback, which takes more of a bulk transfer's processor time than its bytes do.
    with open("/proc/sys/net/ipv4/tcp_congestion_control") as file:
        congestion = file.read().strip()
    return {"cpu": model, "cores": os.cpu_count(), "kernel": os.uname().release, "congestion_control": congestion, "load_before": float(load)}
