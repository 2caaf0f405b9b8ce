"""An ablation for the toy size: the patches that roll are drawn anew for every block and batch, in
evaluation too. It is close to the released code, which shuffles the patches of each frame and rolls
the first and the last. Differs: one draw for all frames and clips of a batch.

    python tools/random_order.py --task vqa --data data/toy/which-way --out runs/random-order-s0

The figures are in the run's test.json: eval.py would roll the layout that the checkpoint names.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import allinone
import torch
import train
from rolling import roll_tokens


def roll_random(x, forward, backward):
    """roll_tokens with groups of the same sizes, drawn among the patches. x (B, T, S, D)."""
    toy = allinone.SIZES["toy"]
    if x.shape[3] != toy.width:
        raise allinone.UserError("random_order.py is for the toy size; leave out --size and --init")
    patches = toy.grid ** 2
    first = x.shape[2] - patches                # words and CLS come before
    order = first + torch.randperm(patches)
    backward = order[len(forward):len(forward) + len(backward)]
    return roll_tokens(x, order[:len(forward)], backward)


if __name__ == "__main__":
    allinone.roll_tokens = roll_random
    allinone.run_main("random_order.py", train.main)
