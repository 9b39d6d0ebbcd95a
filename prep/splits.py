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
    group = groups_of(rows.column("image_keys")[:n])
    sizes = np.bincount(group)
    groups = generator.permutation(len(sizes))
    wanted = left = min(round(n * cfg.val_share) or int(cfg.val_share > 0), max(0, n - 1))
    held_out = []  # the first groups that make `wanted` records, without those that are too large
    for number in groups.tolist():
        if sizes[number] <= left:
            held_out.append(number)
            left -= sizes[number]
    if wanted and not held_out and len(groups) > 1:  # all are too large
        held_out = [groups[np.argmin(sizes[groups])]]
    is_val = np.isin(group, held_out)
    order = np.argsort(np.argsort(groups)[group], kind="stable")  # rows, one group after another
    return {"train": (rows, order[~is_val[order]]), "val": (rows, np.flatnonzero(is_val))}


def groups_of(image_keys):
    """The group of each record, numbered by their first records: records that share an image are in
    one group, also if a third one links them. image_keys: of each record, 8 bytes per image."""
    from scipy.sparse import coo_array, csgraph

    n = len(image_keys)
    record = np.repeat(np.arange(n), [len(keys) // 8 for keys in image_keys])
    names, image = np.unique(np.frombuffer(b"".join(image_keys), np.int64), return_inverse=True)
    edges = coo_array((np.ones(len(record), np.int8), (record, n + image)), [n + len(names)] * 2)
    return csgraph.connected_components(edges, directed=False)[1][:n]
