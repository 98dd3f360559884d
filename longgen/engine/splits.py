"""Into how many parts one query's keys are cut, so that all of a GPU reads them."""

from __future__ import annotations

# The most keys that are few.
FEW_KEYS = 8192
# Keys that one program still reads alone, and the fewest for which others are cut in parts.
WHOLE_KEYS = 512
SPLIT_KEYS = 96
MOST_SPLITS = 128
# The share of programs at work that is not improved on, and how often all of them may begin anew.
FULL_ENOUGH = 0.9
MOST_ROUNDS = 4


def choose_splits(pairs: int, capacity: int, *, programs: int, processors: int) -> int:
    """Cut the keys of each pair of a sequence and a key head for a kernel with a program a part.

    A GPU runs so many programs at a time. With a few more than that, and if they read many keys,
    most of it waits for those: on an H100 4 of 64 keys a multiprocessor read 3.06 TB/s, 4.1 of them
    2.61 (docs/experiments.md).

    Args:
        pairs: sequences times key heads, at least 1.
        capacity: the most keys of one.
        programs: as many as a multiprocessor runs at a time, or a multiple.
        processors: multiprocessors.
    """
    if capacity <= WHOLE_KEYS:
        return 1
    most = min(-(-capacity // SPLIT_KEYS), MOST_SPLITS)
    room = programs * processors
    if capacity <= FEW_KEYS:
        return max(1, min(-(-room // pairs), most))
    best, fullest = 1, 0.0
    for rounds in range(1, MOST_ROUNDS + 1):
        splits = min(rounds * room // pairs, most)
        full = splits * pairs / (rounds * room)
        if full > fullest:
            best, fullest = splits, full
        if full >= FULL_ENOUGH or splits == most:
            break
    return best
