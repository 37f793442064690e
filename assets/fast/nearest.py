"""data.nearest for a whole pool: a matrix product for 512 items in place of one for each."""

import numpy as np


def nearest_of_each(unit, pool, nearest):
    """{item: nearest(unit, pool, item)} for the items of a pool (n,); unit (I, E) has rows of
    length 1.

    Rounding differs between products: where the two highest cosines are not told apart, the
    definition says which it is.
    """
    found = {}
    for begin in range(0, len(pool), 512):
        some = pool[begin : begin + 512]
        cosine = unit[some] @ unit[pool].T
        cosine[some[:, None] == pool] = -2  # itself
        best = cosine.argmax(1)
        highest = cosine[np.arange(len(some)), best, None]
        rivals = (cosine > highest - 1e-5).sum(1)
        for item, place, count in zip(some.tolist(), best, rivals):
            found[item] = (
                [int(pool[place])] if count == 1 < len(pool) else nearest(unit, pool, item)
            )
    return found
