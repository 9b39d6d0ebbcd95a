"""Which records are trained on, and which are held out for validation.

Rows that show the same picture stay together. Otherwise a picture that several rows ask about could
be trained on and held out at once: LLaVA-Instruct-150K has about two rows a picture.
"""

import numpy as np


def splits_of(cfg, journals, limit):
    """{split: (journal, numbers of its records)}; training numbers come in a seeded order."""
    rows = journals["rows"]
    n = min(len(rows), limit or len(rows))
    if "val_rows" in journals:
        order = np.random.default_rng(cfg.seed).permutation(n)
        return {"train": (rows, order), "val": (journals["val_rows"],
                                                np.arange(len(journals["val_rows"])))}
    group = groups_of(rows, n)
    sizes = np.bincount(group)
    groups = np.random.default_rng(cfg.seed).permutation(len(sizes))  # in the order they are drawn
    wanted = min(round(n * cfg.val_share) or int(cfg.val_share > 0), max(0, n - 1))
    held = np.isin(group, drawn(groups, sizes, wanted))
    order = np.argsort(np.argsort(groups)[group], kind="stable")  # rows, one group after another
    return {"train": (rows, order[~held[order]]), "val": (rows, np.flatnonzero(held))}


def groups_of(rows, n):
    """The group of each of the first n records, by number: records with a picture in common are of
    one, and so are those that a third one links; a record without a picture is alone."""
    record, keys = rows.image_keys(n)
    names, picture = np.unique(keys, return_inverse=True)
    group = np.arange(n)  # the first record of it that is known so far
    while True:
        lowest = np.full(len(names), n)
        np.minimum.at(lowest, picture, group[record])
        joined = group.copy()
        np.minimum.at(joined, group[record], lowest[picture])
        joined = joined[joined]
        if np.array_equal(joined, group):
            return np.unique(group, return_inverse=True)[1]
        group = joined


def drawn(groups, sizes, wanted):
    """The first groups that make `wanted` records, without those too large for what is left.

    Where all are too large, the smallest; but never all there are.
    """
    held, left = [], wanted
    for group in groups.tolist():
        if left == 0:
            return held
        if sizes[group] <= left:
            held.append(group)
            left -= sizes[group]
    if not held and wanted and len(groups) > 1:
        return [groups[np.argmin(sizes[groups])]]
    return held
