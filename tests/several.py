"""Runs several commands in one process, because importing PyTorch takes seconds.

    python several.py '[["pretrain.py", "--out=a"], ["pretrain.py", "--out=b"]]'

Prints one line of JSON for each: its status, what it printed, its errors. RANK in an argument
stands for the rank of the process.
"""

import json
import os
import sys
from dataclasses import asdict

import torch.distributed as dist
from conftest import ROOT, run

sys.path.insert(0, str(ROOT))
import train.run

train.run.peak_flops = lambda machine: 1e12  # as in conftest.py
dist.destroy_process_group = lambda: None  # the next command uses the same group
for argv in json.loads(sys.argv[1]):
    argv = [argument.replace("RANK", os.environ.get("RANK", "")) for argument in argv]
    print(json.dumps(asdict(run(*argv))), flush=True)
