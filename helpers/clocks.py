"""How fast the clock of a GPU's multiprocessors ran, and what power it drew: at its power limit a GPU slows itself."""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections.abc import Iterator, Sequence
from typing import Any

PERIOD_S = 0.1


@contextlib.contextmanager
def watched(gpus: Sequence[str]) -> Iterator[dict[str, str]]:
    """Samples ``gpus``, named as in CUDA_VISIBLE_DEVICES, during the body; at its end the dict that it gives has the
    medians of each GPU, in their order and with spaces between: ``sm_mhz``, ``watts`` and ``limit_watts``.

    Empty texts where the driver does not say.
    """
    found = dict.fromkeys(("sm_mhz", "watts", "limit_watts"), "")
    try:
        import pynvml

        pynvml.nvmlInit()
        cards = [_card(pynvml, name) for name in gpus]
        samples = [[_read(pynvml, card)] for card in cards]
    except Exception:  # no driver, no NVML, a card that does not know its power
        yield found
        return
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(PERIOD_S):
            for card, mine in zip(cards, samples, strict=True):
                mine.append(_read(pynvml, card))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        medians = [[statistics.median(column) for column in zip(*mine, strict=True)] for mine in samples]
        found.update((name, " ".join(f"{row[i]:.0f}" for row in medians)) for i, name in enumerate(found))


def _card(pynvml: Any, name: str) -> Any:
    name = name.strip()
    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)


def _read(pynvml: Any, card: Any) -> tuple[float, float, float]:
    """MHz, watts and the most watts that it may draw."""
    return (
        pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM),
        pynvml.nvmlDeviceGetPowerUsage(card) / 1000,
        pynvml.nvmlDeviceGetPowerManagementLimit(card) / 1000,
    )
