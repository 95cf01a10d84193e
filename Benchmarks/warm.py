"""Memory that stays warm between and during measurements.

A virtual machine gives memory back to its host that was free for a moment, and touching it again costs about 3 CPU-seconds per GiB: as much as all
that is measured here. So hardly anything is free: huge pages of the kernel hold what no measurement needs, without touching it, and the rest is
held by this process, which lets go of it as fast as a measurement takes memory, and takes it back when one is over. The contestants get pages
that were in use a moment ago, as they would on a machine of iron.
"""
import mmap
import threading

from moves import memory_mebibytes

POOL = "/proc/sys/vm/nr_hugepages"
PIECE = 8  # MiB
POPULATE = 23  # MADV_POPULATE_WRITE


def free_mebibytes():
    return memory_mebibytes("MemFree")


class WarmMemory:
    """Holds all that is free but for a little, and lets go of it as it is needed. Needs root for the huge pages; without, holds nothing."""

    def __init__(self, needed, floor=256):
        """needed: MiB that one measurement takes beside what is in use now; floor: MiB that are always free."""
        self.floor, self.pieces, self.end = floor, [], threading.Event()
        self.lock = threading.Lock()
        self.pool = None
        spare = free_mebibytes() - needed - needed // 4 - floor
        if spare > 0:
            try:
                with open(POOL, "r+", encoding="ascii") as file:
                    self.pool = int(file.read())
                    file.seek(0)
                    file.write(str(self.pool + spare // 2))
            except OSError:
                self.pool = None
        self.thread = None
        if self.pool is not None:
            self.fill()
            self.thread = threading.Thread(target=self.follow, daemon=True)
            self.thread.start()

    def fill(self):
        """Takes what is free: right after a measurement, while its pages are still warm."""
        if self.pool is None:
            return
        while free_mebibytes() > self.floor + 2 * PIECE:
            piece = mmap.mmap(-1, PIECE << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # QEMU asks for huge pages; the kernel would have to put them together from what is freed here.
            piece.madvise(mmap.MADV_HUGEPAGE)
            piece.madvise(POPULATE)
            with self.lock:
                self.pieces.append(piece)

    def follow(self):
        while not self.end.wait(0.004):
            while self.pieces and free_mebibytes() < self.floor:
                with self.lock:
                    if self.pieces:
                        self.pieces.pop().close()

    def close(self):
        self.end.set()
        if self.thread:
            self.thread.join()
        for piece in self.pieces:
            piece.close()
        self.pieces = []
        if self.pool is not None:
            with open(POOL, "w", encoding="ascii") as file:
                file.write(str(self.pool))
