"""Pictures in files, as the command line reads them."""

import numpy as np
from PIL import Image


def write_pictures(folder, n=40, size=20):
    """PNGs of four classes, all of one grey value, which is 6 times their number."""
    for i in range(n):
        path = folder / "abcd"[i % 4] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size, size, 3), 6 * i, np.uint8)).save(path)


def idx(values):
    """The bytes of an IDX file, written from the format's description."""
    header = bytes([0, 0, 8, values.dim()]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return header + bytes(values.flatten().tolist())
