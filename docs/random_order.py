"""An ablation: which tokens roll is drawn anew for every block and batch, in evaluation too, as in
the released code (which shuffles the patches and rolls the first and the last of them).

    python docs/random_order.py --task vqa --data data/toy/which-way --out runs/random-order-s0
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import allinone
import torch
import train
from rolling import roll_tokens


def roll_random(x, forward, backward):
    patches = allinone.SIZES["toy"].grid ** 2
    first = x.shape[2] - patches                # words and CLS come before
    order = first + torch.randperm(patches)
    return roll_tokens(x, order[:len(forward)], order[-len(backward):])


allinone.roll_tokens = roll_random
allinone.run_main("random_order.py", train.main)
