"""How far an export is, told on stderr: a bar on a terminal, else one line a component."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TextIO


class Progress:
    """Tells one component after another to `stream`; None tells nothing."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self._bar = stream is not None and stream.isatty()
        self._label, self._total, self._done, self._start = "", 0, 0, 0.0

    def start(self, label: str, total: int) -> None:
        """Begins a component of `total` steps."""
        self._label, self._total, self._done, self._start = label, total, 0, time.monotonic()
        self._draw()

    def total(self, total: int) -> None:
        """The component that was begun has so many steps, none of them done."""
        self._total, self._done = total, 0
        self._draw()

    def note(self, sentence: str) -> None:
        """Tells what was assumed, as a line of its own."""
        if self._stream is not None:
            print(f"note: {sentence}", file=self._stream, flush=True)

    def step(self) -> None:
        """One step is done."""
        self._done += 1
        self._draw()

    def steps(self, items: Iterable) -> Iterator:
        """The items, each a step once it is done with."""
        for item in items:
            yield item
            self.step()

    def finish(self) -> None:
        """The component is done."""
        if self._stream is None:
            return
        line = f"{self._label}  {time.monotonic() - self._start:.1f} s"
        print(("\r\x1b[K" if self._bar else "") + line, file=self._stream, flush=True)

    def _draw(self) -> None:
        if not self._bar:
            return
        width = 24
        filled = width * self._done // max(self._total, 1)
        bar = "#" * filled + "-" * (width - filled)
        seconds = time.monotonic() - self._start
        self._stream.write(f"\r\x1b[K{self._label}  [{bar}] {self._done}/{self._total}  {seconds:.0f} s")
        self._stream.flush()
