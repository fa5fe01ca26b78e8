"""Time and memory of functions, side by side in one process."""

import ctypes
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm


def machine(device: str) -> dict[str, str | int | None]:
    """What a result has to be read with."""
    facts: dict[str, str | int | None] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {"cuda": torch.version.cuda, "driver": printed(query), "triton": importlib.metadata.version("triton")}
    return facts


def commit() -> str | None:
    """That of the code, with a mark if files were changed since."""
    return printed(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"])


def printed(command: list[str]) -> str | None:
    """The first line that a program prints; `None` where it is missing or fails."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0]


def write_json(path: Path, result: dict, device: str) -> None:
    """Writes a result with the command and the machine it came from; what was there goes when all is written."""
    result = {"command": shlex.join(["python", *sys.argv]), "machine": machine(device), **result}
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def once(function: Callable[[], object], device: str, repeat: int) -> float:
    """Seconds of a call: the mean over `repeat` calls in a row, none of which waits for the one before on a GPU."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeat):
        function()
    synchronize(device)
    return (time.perf_counter() - begin) / repeat


def profile(function: Callable[[], object], device: str, count: int = 8) -> list[str]:
    """Where a call spends its time: the shares of the operators that take most of it, on a GPU of the kernels."""
    activity = torch.profiler.ProfilerActivity
    function()
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if device == "cuda" else [])]) as profiler:
        function()
        synchronize(device)
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events)
    return [f"{getattr(event, field) / total:6.1%} {event.count:6} x {event.key}" for event in events[:count]]


def interleaved(functions: Mapping[str, Callable[[], object]], device: str, seconds: float) -> dict[str, list[float]]:
    """
    Seconds of each call, in rounds: every function once a round, so that whatever else the machine does meets all of
    them alike.

    Args:
        functions (`Mapping[str, Callable[[], object]]`): what to time.
        device (`str`): `"cpu"` or `"cuda"`.
        seconds (`float`): about how long to go on; three rounds at least, after two calls that do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()  # compiles what is compiled
    first = {name: once(function, device, 1) for name, function in functions.items()}
    # On a GPU so many calls in a row that starting the first does not count.
    repeat = {name: max(1, int(0.02 / time)) if device == "cuda" else 1 for name, time in first.items()}
    start, rounds = time.perf_counter(), 0
    with tqdm(total=seconds, leave=False, bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f}s") as progress:
        while rounds < 3 or time.perf_counter() - start < seconds:
            for name, function in functions.items():
                times[name].append(once(function, device, repeat[name]))
            rounds += 1
            progress.update(min(time.perf_counter() - start, seconds) - progress.n)
    return times


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """The median over the rounds of how many times as long `name` took as `to`."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))


def peak_memory(function: Callable[[], object], device: str) -> float:
    """MiB that a call adds to what is allocated before it: of GPU memory, or of the process (Linux)."""
    function()  # what is allocated once, such as workspaces and compiled code, does not count
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        function()
        synchronize(device)
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    # What is freed goes back to the system at once: else memory of earlier calls would serve this one, unseen, or its
    # own be counted twice. Timings are taken with the threshold that malloc comes to by itself.
    libc, mmap_threshold = ctypes.CDLL("libc.so.6"), -3
    libc.mallopt(mmap_threshold, 2**16)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = process_memory("VmRSS")
    function()
    peak = process_memory("VmHWM") - before
    libc.mallopt(mmap_threshold, 2**25)
    return peak


def process_memory(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)
