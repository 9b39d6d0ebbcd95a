"""The split of records into training and validation.

Rows that show the same image stay together, as an image that several rows ask about could else be
in both: LLaVA-Instruct-150K has about two rows per image.
"""

import numpy as np


def splits_of(cfg, records, limit):
    """{split: (Records, numbers of its records)}; training numbers come in a seeded order."""
    rows = records["rows"]
    n, generator = min(len(rows), limit or len(rows)), np.random.default_rng(cfg.seed)
    if "val_rows" in records:
        val = records["val_rows"]
        return {"train": (rows, generator.permutation(n)), "val": (val, np.arange(len(val)))}
    group = groups_of(rows, n)
    sizes = np.bincount(group)
    groups = generator.permutation(len(sizes))
    wanted = min(round(n * cfg.val_share) or int(cfg.val_share > 0), max(0, n - 1))
    is_val = np.isin(group, validation_groups(groups, sizes, wanted))
    order = np.argsort(np.argsort(groups)[group], kind="stable")  # rows, one group after another
    return {"train": (rows, order[~is_val[order]]), "val": (rows, np.flatnonzero(is_val))}


def groups_of(rows, n):
    """The group of each of the first n records, by number: records that share an image are in one
    group, also if a third one links them; a record without an image is alone."""
    record, keys = rows.image_keys(n)
    names, image = np.unique(keys, return_inverse=True)
    group = np.arange(n)  # the first record of it that is known so far
    while True:
        lowest = np.full(len(names), n)
        np.minimum.at(lowest, image, group[record])
        joined = group.copy()
        np.minimum.at(joined, group[record], lowest[image])
        joined = joined[joined]
        if np.array_equal(joined, group):
            return np.unique(group, return_inverse=True)[1]
        group = joined


def validation_groups(groups, sizes, wanted):
    """The first groups that make `wanted` records, without those too large for what is left.

    Where all are too large, the smallest; but never all there are.
    """
    chosen, left = [], wanted
    for group in groups.tolist():
        if left == 0:
            return chosen
        if sizes[group] <= left:
            chosen.append(group)
            left -= sizes[group]
    if not chosen and wanted and len(groups) > 1:
        return [groups[np.argmin(sizes[groups])]]
    return chosen
