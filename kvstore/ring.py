"""Spans of a session's ring: first fit over whole pages, so that the lowest and warmest bytes are used again first.

A ring of 64 MiB has at most 16,384 spans; the free list stays short because neighbours merge. Owner thread.
"""

from bisect import bisect_left

from kvproto.limits import PAGE_BYTES


class Ring:
    """The free pages of one ring."""

    __slots__ = ("_starts", "_sizes", "pages", "free_pages")

    def __init__(self, ring_bytes: int) -> None:
        self.pages = ring_bytes // PAGE_BYTES
        self.free_pages = self.pages
        self._starts = [0] if self.pages else []
        self._sizes = [self.pages] if self.pages else []

    def spans_free(self, span_pages: int, most: int) -> int:
        """How many spans `take` would give, up to `most`."""
        free = 0
        for size in self._sizes:
            free += size // span_pages
            if free >= most:
                return most
        return free

    def take(self, span_pages: int, count: int) -> list[int]:
        """First pages of up to `count` spans of `span_pages` each; fewer when the ring is that full."""
        taken: list[int] = []
        i = 0
        while i < len(self._starts) and len(taken) < count:
            fits = min(self._sizes[i] // span_pages, count - len(taken))
            start = self._starts[i]
            taken += range(start, start + fits * span_pages, span_pages)
            self._starts[i] += fits * span_pages
            self._sizes[i] -= fits * span_pages
            if self._sizes[i] == 0:
                del self._starts[i], self._sizes[i]
            else:
                i += 1
        self.free_pages -= len(taken) * span_pages
        return taken

    def give(self, page: int, span_pages: int) -> None:
        """Return a span."""
        i = bisect_left(self._starts, page)
        before_ends = self._starts[i - 1] + self._sizes[i - 1] if i else -1
        after_starts = self._starts[i] if i < len(self._starts) else self.pages
        assert before_ends <= page, "span given back twice"
        assert page + span_pages <= after_starts, "span given back twice"
        self.free_pages += span_pages
        joins_after = i < len(self._starts) and page + span_pages == after_starts
        if before_ends == page:
            self._sizes[i - 1] += span_pages
            if joins_after:
                self._sizes[i - 1] += self._sizes[i]
                del self._starts[i], self._sizes[i]
        elif joins_after:
            self._starts[i] = page
            self._sizes[i] += span_pages
        else:
            self._starts.insert(i, page)
            self._sizes.insert(i, span_pages)

    def check(self) -> None:
        """Assert that the free list is in order, merged, and adds up."""
        ends = -1
        for start, size in zip(self._starts, self._sizes, strict=True):
            assert size > 0, "empty extent"
            assert start > ends, "extents overlap or touch"
            ends = start + size
        assert ends <= self.pages, "extent past the ring"
        assert sum(self._sizes) == self.free_pages, "free pages do not add up"
