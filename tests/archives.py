"""ZIP files with something wrong inside, for the formats that are ZIP files."""

import zipfile
from pathlib import Path


def damage(path: Path, name: str) -> None:
    """Its entry of that name no longer unpacks."""
    with zipfile.ZipFile(path) as file:
        info = file.getinfo(name)
    data = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len(name)  # after the entry's own header, which ends with its name
    data[start : start + info.compress_size] = b"\xff" * info.compress_size
    path.write_bytes(data)
