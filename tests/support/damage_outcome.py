"""What comes of loading a damaged adapter folder: refused, loaded as it says, or what is wrong.

`python tests/support/damage_outcome.py 10000` counts what came of so many.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import resource
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import damage
import damage_work
import peft_by_hand
from hypothesis import HealthCheck, Phase, given, settings
from test_peft import LOAD, MODELS, loaded, survey

import lora_jax as lora

MAX_MESSAGE = 40_000  # characters


class TooLong(BaseException):
    """No `Exception`, so that nothing takes it for an error of the file."""


@contextlib.contextmanager
def limited(seconds):
    """Stops what takes longer, in processor time: what else the machine does has no say."""

    def stop(_: int, frame: Any) -> None:
        while frame is not None:
            if "gc_callback" in frame.f_code.co_name:  # which would swallow it; a moment later
                return signal.setitimer(signal.ITIMER_PROF, 0.01)
            frame = frame.f_back
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@dataclasses.dataclass
class Outcome:
    """kind: "refused", "loaded", or what is wrong. The peak is of what Python and numpy take."""

    kind: str
    what: str = ""
    seconds: float = 0.0
    peak: int = 0
    size: int = 0

    @property
    def good(self):
        return self.kind in ("refused", "loaded")


def size_of(folder):
    """Bytes on the disk, which of a sparse file are few."""
    return sum(p.stat().st_blocks * 512 for p in folder.iterdir() if p.is_file())


def outcome(name, folder, load=None, seconds=2.0) -> Outcome:
    """Loads once for the time and once for the memory, and checks what came."""
    load = load or (lambda: loaded_by(name, folder))
    size = size_of(folder)
    most = seconds + size / 2e6
    start = time.process_time()
    try:
        with limited(most):
            found, error = load(), None
    except TooLong:  # the clock of the timer may be ahead of the one that is read below
        return Outcome("too slow", f"more than {most:.1f} s", most, size=size)
    except lora.LoRAError as e:
        found, error = None, str(e)
    except Exception as e:
        return Outcome("crashed", repr(e)[:300], size=size)
    seconds = time.process_time() - start
    if seconds > most:  # also where a callback swallowed the exception
        return Outcome("too slow", error or "", seconds, size=size)
    peak = peak_of(load)
    if peak > (8 << 20) + 10 * size:
        return Outcome("too large", f"{peak:,} bytes", seconds, peak, size)
    if error is not None:
        problem = problem_of(error, folder)
        return Outcome("unclear" if problem else "refused", problem or error, seconds, peak, size)
    try:
        problem = peft_by_hand.difference(name, folder, found.adapters)
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as e:
        problem = f"not what PEFT could load: {e!r}"
    return Outcome("wrong" if problem else "loaded", problem or "", seconds, peak, size)


def peak_of(load):
    tracemalloc.start()
    with contextlib.suppress(lora.LoRAError):
        load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def problem_of(message, folder):
    """A message says where, and can be printed."""
    if str(folder) not in message:
        return f"does not name the folder: {message[:200]!r}"
    if len(message) > MAX_MESSAGE:
        return f"a message of {len(message):,} characters"
    if not all(line.isprintable() for line in message.split("\n")):
        return f"cannot be printed: {message[:200]!r}"
    return None


CACHE: dict = {}


def loaded_by(name, folder):
    fn, make, mapping, _ = MODELS[name]
    if name not in CACHE:
        CACHE[name] = (params := make(name)), survey(name, params, fn)
        loaded(name)  # what is only done once is not this folder's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of settings that were passed over
        return lora.peft.load(folder, *CACHE[name], mapping=mapping, **LOAD.get(name, {}))


def tried(w) -> Outcome:
    folder = Path(tempfile.mkdtemp())
    try:
        damage_work.write(w, folder)
        return outcome(w.name, folder)
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def address_space(more):
    """No more than this beside what the process has, by whatever takes it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def many(n, check):
    """Calls check(name, damages, outcome) for n damaged folders."""

    @settings(
        max_examples=n,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(damage.cases())
    def run(case):
        name, damages, w = case
        check(name, damages, tried(w))

    run()


def main(n):
    kinds, slowest, largest, bad = collections.Counter(), Outcome(""), Outcome(""), {}
    by_damage = collections.defaultdict(collections.Counter)

    def count(name, damages, out):
        nonlocal slowest, largest
        kinds[out.kind] += 1
        for d in set(damages):
            by_damage[d][out.kind] += 1
        slowest, largest = (
            max(slowest, out, key=lambda o: o.seconds),
            max(largest, out, key=lambda o: o.peak),
        )
        if not out.good:
            bad.setdefault((out.kind, out.what[:60]), (name, damages, out.what))

    many(50, lambda *_: None)  # compiles, fills caches
    with address_space(256 << 20), contextlib.suppress(KeyboardInterrupt):  # counts until then
        many(n, count)
    print(f"{sum(kinds.values()):,} folders: {dict(kinds)}")
    print(f"longest {slowest.seconds:.3f} s; largest peak {largest.peak / 2**20:.1f} MiB,", end=" ")
    print(f"of a folder of {largest.size:,} bytes; no more than 256 MiB of address space in all")
    for d, of in sorted(by_damage.items()):
        print(f"  {d:18}", dict(of))
    for (kind, _), (name, damages, what) in list(bad.items())[:40]:
        print(f"{kind}: {name} {'+'.join(damages)}: {what[:400]}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
