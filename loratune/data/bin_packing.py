"""Bin packing: which rows share a pack, a pure function of their lengths."""

from __future__ import annotations

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Pack rows best-fit-decreasing: the longest first, each into the pack with the least sufficient room.

    No row is cut. The rooms left are the bits of one integer, so that the smallest sufficient one is found with two
    shifts: a million rows take seconds.

    Args:
        lengths: of each row in tokens, 1 to `capacity`, shape (rows,).
        capacity: most tokens in a pack.

    Returns:
        Row indices of each pack, longest row first; every row is in exactly one.

    Source: D. S. Johnson, Near-optimal bin packing algorithms, MIT 1973.
    """
    assert len(lengths) == 0 or 0 < lengths.min() <= lengths.max() <= capacity, "rows are cut or refused before"
    order = np.argsort(-lengths, kind="stable")
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # packs by their room in tokens
    rooms = 0  # bit n is set if a pack has room for n tokens
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        sufficient = rooms >> length
        if sufficient:
            room = length + (sufficient & -sufficient).bit_length() - 1
            which = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            packs[which].append(row)
        else:
            room, which = capacity, len(packs)
            packs.append([row])
        if room > length:
            with_room.setdefault(room - length, []).append(which)
            rooms |= 1 << (room - length)
    return [np.array(rows, dtype=np.int64) for rows in packs]
