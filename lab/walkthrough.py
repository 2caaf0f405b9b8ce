"""One toy clip and one question through the main tensors of the toy model, in forward order.

    python lab/walkthrough.py

The numbers come from the model's own functions; hooks record what its modules read and return. The
attention map alone is computed again (see tools/report.py).
The weights are random: the shapes mean something, the attention and the answer do not yet.
"""
# The lab runs from a checkout: the core is one folder up.
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tempfile
from dataclasses import replace
from unittest import mock

import numpy as np
import torch

from allinone import SIZES, AllInOne, init_narrow, run_main
from data import Tokenizer, frame_indices
from rolling import roll_tokens
from tools.report import record_attention
from tools.toy import GROUNDS, WAYS, Scene, Sprite, render, write_tokenizer

SCENE = Scene((Sprite("square", "red", 0.0, 0.0, 0.42),), ("moves right",), "navy")
QUESTION = "which way does the square move?"
DIGITS = "0123456789"


# Names of modules and parameters are those of the model; what they return, in forward order.
INPUTS = {
    "frames": "B, T, RGB, R, R: pixels, uint8",
    "patch_embed reads": "normalised; from here a row is a frame",
    "patch_embed": "a vector of D for each patch of P x P",
    "pos_embed": "added by place in the frame, CLS first",
    "time_embed": "added by frame, to patches, not to CLS",
    "cls_token": "the first token of each frame",
    "embed_frames": "B, T, N, D: the sum, and modality 1",
    "input_ids": "B, L: numbers of the words",
    "text_embed": "B, L, D: a vector for each word",
    "text_norm": "plus position and segment, normalised",
    "embed_text": "plus modality 0",
    "roll_tokens reads": "B, T, S, D: a copy of the words, video"
}
BLOCK = {
    "blocks.0 reads": "rows are frames: attention stays inside",
    "blocks.0.norm1": "normalised",
    "blocks.0.attn.qkv": "query, key and value of each token",
    "blocks.0.attn": "weighted values; added to the input",
    "blocks.0.mlp.fc1": "each token on its own",
    "blocks.0.mlp": "added too",
    "blocks.0": "to the next roll and the next block"
}
OUTPUTS = {
    "blocks.3": "the last block",
    "norm": "normalised",
    "text": "B, L, D: mean over frames",
    "video": "B, N, D: mean over frames",
    "pooled": "B, D: tanh of a layer on the first word",
    "task_heads.answer": "B, A: scores of the answers"
}


def show(seen, meanings):
    for name, meaning in meanings.items():
        print(f"{name:17s} {str(tuple(seen[name].shape)):18s} {meaning}")


def draw(values, symbols):
    """A line of text: one symbol for each number."""
    return "".join(symbols[int(value)] for value in values)


def record(model):
    """{name: a parameter, or what a module returns; "NAME reads": its input}, filled by a forward
    pass."""
    seen = dict(model.named_parameters())
    for name, module in model.named_modules():
        def hook(module, inputs, output, name=name):
            seen[f"{name} reads"] = inputs[0]
            seen[name] = output
        module.register_forward_hook(hook)
    return seen


def make_frames(T, R):
    """Frames of a clip of 30, as evaluation picks them: (1, T, 3, R, R) uint8."""
    picked = frame_indices(30, T, "eval")
    print(f"a clip of 30 frames: a square {SCENE.events[0]}; evaluation reads frames {picked}\n")
    pictures = np.stack([render(SCENE, i / 29, R, R) for i in picked])
    square = (pictures != GROUNDS["navy"]).any(-1)
    for row in square.transpose(1, 0, 2)[::4]:
        print("    ".join(draw(line[::2], ".#") for line in row))
    print()
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)[None]


def show_roll(frame, rolled):
    """frame, rolled (T, N): the frame that each token comes from."""
    print("\nthe frame that CLS | each patch comes from, before and after the roll")
    for t in range(len(frame)):
        before = draw(frame[t], DIGITS)
        after = draw(rolled[t], DIGITS)
        print(f"    frame {t}    {before[0]} | {before[1:]}    {after[0]} | {after[1:]}")
    print()


def show_attention(shares, words, frame):
    """shares (S, S): how much each query attends to each key, in one frame and one head.
    frame (N,): the frame that CLS and each patch come from."""
    print("\nframe 1, block 0, head 0: how much words and CLS (rows) attend to all tokens")
    print("w word, C CLS, digit: the frame a patch came from")
    print("from space (0) to @ (highest); random weights")
    print(f"{'':12s} {'w' * len(words)} C {draw(frame[1:], DIGITS)}")
    for name, row in zip([*words, "CLS"], shares):
        cells = draw(9 * row / row.max(), " .:-=+*#%@")
        print(f"{name:>12s} {cells[:len(words)]} {cells[len(words)]} {cells[len(words) + 1:]}")
    print()


def show_reach(T=5):
    """Change one frame, and see which frames change after each block."""
    model = AllInOne(replace(SIZES["toy"], frames=T))
    init_narrow(model)
    seen = record(model)
    # Clip 0 is the original; clip 1 + t has another frame t.
    video = torch.randn(1, T, 17, model.config.width).repeat(1 + T, 1, 1, 1)
    for t in range(T):
        video[1 + t, t] = torch.randn(17, model.config.width)
    model.joint(video, torch.zeros(1 + T, 3, dtype=torch.long))
    print(f"\nwith T = {T}, the frames that each frame has information from")
    for i in (0, 1):
        x = seen[f"blocks.{i}"].unflatten(0, (1 + T, T))
        changed = (x[1:] - x[0]).abs().amax((2, 3)) > 1e-4      # (changed frame, frame)
        source = torch.arange(T)[:, None].where(changed, T)
        for t in range(T):
            print(f"    after block {i}, frame {t}: {draw(source[:, t], DIGITS[:T] + '.')}")


@torch.no_grad()
def main():
    torch.manual_seed(0)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        write_tokenizer(file.name)
        tokenizer = Tokenizer.load(file.name)
    config = replace(SIZES["toy"], vocab=len(tokenizer), answers=len(WAYS))
    model = AllInOne(config, ["answer"]).eval()
    init_narrow(model)
    seen = record(model)
    frames = make_frames(config.frames, config.image)
    input_ids = torch.tensor([tokenizer.encode(QUESTION, config.text_length)])
    words = [tokenizer.tokenizer.id_to_token(n) for n in input_ids[0].tolist()]
    L = len(words)
    with mock.patch("allinone.roll_tokens", wraps=roll_tokens) as rolls:
        with record_attention(model) as maps:
            out = model(frames, input_ids)
    model.task_heads["answer"](out.pooled)
    joint, *groups = rolls.call_args_list[0].args
    seen["frames"] = frames
    seen["input_ids"] = input_ids
    seen["embed_frames"] = model.embed_frames(frames)
    seen["embed_text"] = model.embed_text(input_ids)
    seen["roll_tokens reads"] = joint
    seen.update(out._asdict())

    print(f"{' '.join(words)}   answers: {' '.join(WAYS)}\n")
    show(seen, INPUTS)
    frame = torch.arange(config.frames).view(1, -1, 1, 1).expand(*joint.shape[:3], 1)
    rolled = roll_tokens(frame, *groups)[0, :, L:, 0]
    show_roll(frame[0, :, L:, 0], rolled)
    show(seen, BLOCK)
    show_attention(maps[0][1, 0], words, rolled[1])
    show(seen, OUTPUTS)
    show_reach()


if __name__ == "__main__":
    run_main("walkthrough.py", main)
