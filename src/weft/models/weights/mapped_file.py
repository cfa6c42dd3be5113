"""A file mapped into memory, read where it is needed and forgotten afterwards. Torch-free."""

import mmap
from pathlib import Path


class MappedFile:
    """A private mapping of a whole file.

    Copy-on-write although nobody writes: tensors refuse to look at read-only memory without a warning. Raises OSError
    when the file cannot be opened, ValueError when it is empty.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def forget(self, offset: int, num_bytes: int) -> None:
        """Let go of the pages wholly inside a range, so that what was copied elsewhere does not count twice."""
        page = mmap.PAGESIZE
        start, stop = -(-offset // page) * page, (offset + num_bytes) // page * page
        if start < stop:
            self.data.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        """Unmap. No view of the data may be left."""
        self.data.close()
