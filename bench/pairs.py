"""Timing two functions against each other on a machine that others use too.

A lone timing on a shared machine measures its neighbours. Here the two functions alternate, each call is timed beside
the processor time that other processes took meanwhile, and only pairs during which those took next to nothing count;
the figure is the median of the pairs' ratios.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

_TICKS = os.sysconf("SC_CLK_TCK")
_CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Pairs:
    """Seconds of the quiet pairs, and how many pairs were timed in all."""

    pairs: list[tuple[float, float]]
    tried: int

    @property
    def ratio(self) -> float:
        """Median of a / b over the quiet pairs: above 1, b is the faster."""
        return statistics.median(a / b for a, b in self.pairs)

    @property
    def spread(self) -> tuple[float, float]:
        ratios = [a / b for a, b in self.pairs]
        return min(ratios), max(ratios)

    @property
    def best(self) -> tuple[float, float]:
        """Least seconds of each."""
        return min(a for a, _ in self.pairs), min(b for _, b in self.pairs)


def paired(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    want: int = 5,
    tries: int = 25,
    limit: float = 0.05,
    patience: float = 20.0,
) -> Pairs:
    """Alternate ``a`` and ``b`` until ``want`` pairs were quiet or ``tries`` pairs were timed.

    Args:
        a: called without arguments; must block until its work is done.
        b: likewise.
        want: quiet pairs wanted.
        tries: pairs to time at most.
        limit: largest share of the machine that other processes may use during a call.
        patience: seconds to wait for a quiet moment before each call.

    Returns:
        The quiet pairs; should there be none, all pairs, with ``tried`` negated: such figures are rough.
    """
    quiet, everything = [], []
    while len(quiet) < want and len(everything) < tries:
        _wait_quiet(patience)
        (seconds_a, noise_a), (seconds_b, noise_b) = _timed(a), _timed(b)
        everything.append((seconds_a, seconds_b))
        if max(noise_a, noise_b) < limit:
            quiet.append((seconds_a, seconds_b))
    return Pairs(quiet, len(everything)) if quiet else Pairs(everything, -len(everything))


def repeat(function: Callable[[], object], seconds: float = 0.12) -> tuple[Callable[[], None], int]:
    """A block of as many calls as fill ``seconds``, and their number; compiles and warms up.

    Processor time is accounted in ticks of 10 ms, so a shorter block could not tell whether its neighbours were quiet.
    """
    function()
    start = time.perf_counter()
    function()
    count = max(1, round(seconds / (time.perf_counter() - start)))

    def block() -> None:
        for _ in range(count):
            function()

    return block, count


def _timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call, and the share of the machine that other processes used during it."""
    others, start = _others(), time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    return seconds, max(0.0, _others() - others) / seconds / _CORES


def _wait_quiet(patience: float, limit: float = 0.1, hold: float = 0.2) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        others = _others()
        time.sleep(hold)
        if (_others() - others) / hold / _CORES < limit:
            return


def _others() -> float:
    """Processor seconds that all other processes have used; 0 where the system does not tell."""
    try:
        with open("/proc/stat") as file:
            fields = [int(x) for x in file.readline().split()[1:9]]
    except OSError:
        return 0.0
    own = os.times()
    busy = (sum(fields) - fields[3] - fields[4]) / _TICKS  # all but idle and waiting for disks
    return busy - (own.user + own.system + own.children_user + own.children_system)
