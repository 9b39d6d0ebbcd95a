"""What the tests of faults share: how many of them are tried."""

import os

FULL = os.environ.get("FAULTS") == "full"


def scale(few, many):
    """How often to try: `few` among the other tests, `many` where FAULTS=full is set."""
    return many if FULL else few
