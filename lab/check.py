"""Check your answers to lab/exercises.py against the project's own functions, on random inputs.

    python lab/check.py                                  all exercises
    python lab/check.py roll_tokens ranks                some of them
    python lab/check.py --module lab/solutions.py        another file with the same functions

It states what is wrong: the shape, the dtype, or the first number that differs. It adds a hint if
it recognises a common mistake. The exit code is 0 if all that was checked is right, else 1.
"""
# The lab runs from a checkout: the core is one folder up.
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import copy
import runpy
import traceback

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import eval as evaluation
import rolling
import train
from allinone import SIZES, AllInOne, Attention, UserError, init_narrow, printable, run_main

# ---- one function per exercise -------------------------------------------------------------------
# Each yields calls of the student's function: (arguments, expected result, letters of its axes,
# {hint: the result of a common mistake}). NaN in the result of a mistake stands for any number.


def roll_tokens():
    groups = rolling.roll_groups(4, 4, 1 / 2)
    for T in (3, 5, 2, 1):
        x = torch.randn(2, T, 17, 4)
        expected = rolling.roll_tokens(x, *groups)
        open_ends = expected.clone()
        open_ends[:, [0, -1]] = torch.nan
        yield (x, *groups), expected, "BTND", {
            "rolled the wrong way: `forward` tokens go from frame t to frame t + 1":
                rolling.roll_tokens(x, *reversed(groups)),
            "roll along the axis of frames alone: give roll() its dims": roll_all_axes(x, *groups),
            "the tokens of `backward` move too": rolling.roll_tokens(x, groups[0], groups[1][:0]),
            "after the last frame comes the first": open_ends
        }


def roll_all_axes(x, forward, backward):
    out = x.clone()
    out[:, :, forward] = x[:, :, forward].roll(1)
    out[:, :, backward] = x[:, :, backward].roll(-1)
    return out


def roll_gradient():
    groups = rolling.roll_groups(4, 4, 1 / 2)
    for T in (3, 5):
        grad = torch.randn(2, T, 17, 4)
        rolled, vjp = torch.func.vjp(lambda x: rolling.roll_tokens(x, *groups), grad)
        yield (grad, *groups), vjp(grad)[0], "BTND", {
            "this is the roll itself; a gradient goes back the way that its token came": rolled
        }


def roll_groups():
    for layout in ("block", "spread"):
        for rows, cols, fraction in ((4, 4, 1 / 2), (3, 5, 1 / 4), (14, 14, 1 / 4), (2, 2, 1 / 4)):
            forward, backward = rolling.roll_groups(rows, cols, fraction, layout)
            yield (rows, cols, fraction, layout), (forward, backward), "n", {
                "CLS moves: it is token 0, and the first patch is token 1":
                    (forward - 1, backward - 1),
                "forward and backward are swapped": (backward, forward)
            }


def frame_indices():
    # With an odd number of frames no middle is an integer: rounding errors do not matter.
    for mode in ("eval", "train"):
        for num_frames, T in ((17, 4), (101, 8), (3, 8), (1, 2)):
            expected = data.frame_indices(num_frames, T, mode, np.random.default_rng(0))
            middles = np.arange(T) + 0.5
            yield (num_frames, T, mode, np.random.default_rng(0)), expected, "T", {
                "these are the starts of the segments":
                    [segment * num_frames // T for segment in range(T)],
                "linspace(0, num_frames - 1, T) is not the middles of T segments":
                    np.linspace(0, num_frames - 1, T).astype(int),
                "a segment has length num_frames / T, not num_frames // T":
                    (middles * (num_frames // T)).astype(int),
                "place p lies in frame floor(p); do not round": (middles * num_frames / T).round(),
                "these are the middles; in training the place is random":
                    data.frame_indices(num_frames, T, "eval")
            }


def attention():
    B, H, S, K = 2, 3, 7, 8
    module = Attention(H * K, H, dropout=0.0)
    module.proj = nn.Identity()
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
    mask[1, :, :, 4:] = False                           # clip 1 ends with padding
    for size in (1, 100):
        x = size * torch.randn(B, S, H * K)
        q, k, v = module.qkv(x).view(B, S, 3, H, K).permute(2, 0, 3, 1, 4)
        unmasked = F.scaled_dot_product_attention(q, k, v)
        unmasked[1, :, 4:] = torch.nan
        inverted = F.scaled_dot_product_attention(q, k, v, ~mask)
        inverted[0] = torch.nan                         # there it has no key at all
        scores = q @ k.mT / K ** 0.5
        fill = 0 if size == 1 else -100                 # each shows a fill that is not low enough
        expected = module(x, mask).unflatten(2, (H, K)).transpose(1, 2)
        yield (q, k, v, mask), expected, "BHSK", {
            "padding gets attention: mask the keys (last axis of the scores), not the queries":
                unmasked,
            "the mask is inverted: it is True where a token may be attended to": inverted,
            "the scores are not divided by sqrt(K)":
                F.scaled_dot_product_attention(q, k, v, mask, scale=1.0),
            "softmax runs over the keys, the last axis of the scores":
                scores.masked_fill(~mask, -torch.inf).softmax(-2) @ v,
            "the weights of a query do not sum to 1: mask before the softmax":
                (scores.softmax(-1) * mask) @ v,
            "fill with -inf; other scores can be below a finite number":
                scores.masked_fill(~mask, fill).softmax(-1) @ v
        }


def mlm_loss():
    B, L, V = 3, 6, 11
    scores = torch.randn(B, L, V)
    flat = scores.flatten(0, 1)
    nothing = torch.full((B, L), -1)
    labels = nothing.clone()
    labels[0, 1:4] = torch.tensor([5, 0, 10])
    labels[1, 2] = 7
    expected = train.cross_entropy(flat, labels.flatten())
    by_text = [train.cross_entropy(scores[b], labels[b]) for b in (0, 1)]
    yield (scores, labels), expected, "", {
        "this is the mean over all words; take it over the masked words":
            expected * 4 / (B * L),
        "this is the sum; take the mean": expected * 4,
        "this is the mean of the means of the texts; each masked word counts the same":
            sum(by_text) / 2,
        "word 0 is a word: use labels >= 0":
            train.cross_entropy(flat, labels.where(labels != 0, -1).flatten()),
        "a label of -1 means that nothing is asked; it is no word":
            train.cross_entropy(flat, labels.flatten() % V),
        "a label of -1 means that nothing is asked; it is not word 0":
            train.cross_entropy(flat, labels.flatten().clamp(min=0))
    }
    yield (scores, nothing), torch.tensor(0.0), "", {
        "in this call no word is masked": torch.tensor(torch.nan)
    }


def contrastive_loss():
    B = 6
    t = train.TEMPERATURE
    text, video = F.normalize(torch.randn(2, B, 8), dim=-1)
    expected = train.contrastive_loss(text, video)
    by_text = F.cross_entropy(text @ video.T / t, torch.arange(B))
    one_way = "this is one direction; add texts that choose clips and clips that choose texts"
    yield (text, video, t), expected, "", {
        one_way: by_text,
        f"{one_way}.": expected - by_text,
        "these are the same direction twice": 2 * by_text,
        "add the two directions; do not take their mean": expected / 2,
        "take the mean over the rows, not the sum": expected * B,
        "the temperature is not used": train.contrastive_loss(text * t, video),
        "divide by the temperature; do not multiply": train.contrastive_loss(text * t * t, video)
    }


def ranks():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (7, 9)).astype(float)   # few values: many ties
    target = rng.integers(0, 9, 7)
    half = np.zeros((7, 9))
    half[np.arange(7), target] = 0.5
    expected = evaluation.ranks(scores, target)
    yield (scores, target), expected, "Q", {
        "ties count as perfect; equal scores must share the mean of their places":
            evaluation.ranks(scores + half, target),
        "ties count as the worst place; equal scores must share the mean of their places":
            evaluation.ranks(scores - half, target),
        "argsort breaks ties by position; equal scores must share the mean of their places":
            1 + (-scores).argsort(1).argsort(1)[np.arange(7), target],
        "places better + 1 to better + equal have the mean better + (equal + 1) / 2":
            expected - 0.5,
        "the right candidate ties with itself; do not count it": expected + 0.5,
        "higher scores are better": evaluation.ranks(-scores, target),
        "count from 1: the best has rank 1": expected - 1
    }


def embed_with_time():
    config = SIZES["toy"]
    model = AllInOne(config)
    init_narrow(model)
    for T in (2, 3):
        frames = torch.randint(256, (2, T, 3, config.image, config.image), dtype=torch.uint8)
        expected = model.embed_frames(frames)
        time_embed = model.time_embed.clone()
        x = expected.clone()
        x[:, :, 1:] -= time_embed[:T, None]
        N = x.shape[2]
        mixed = x + time_embed[torch.arange(T * N) % T].view(T, N, -1)
        mixed[:, :, 0] = torch.nan
        yield (x, time_embed), expected, "BTND", {
            "patches of one frame get different rows: token i of all T * N is in frame i // N":
                mixed
        }


EXERCISES = {cases.__name__: cases for cases in (
    roll_tokens, roll_gradient, roll_groups, frame_indices, attention, mlm_loss, contrastive_loss,
    ranks, embed_with_time)}

TOKEN_0 = {
    "roll_tokens": "CLS is token 0 of each frame, and it must stay as it is",
    "roll_gradient": "tokens that do not roll pass their gradient on unchanged",
    "embed_with_time": "CLS is token 0 of each frame, and it must stay as it is"
}

# ---- comparison ----------------------------------------------------------------------------------


def tensors(value):
    parts = value if isinstance(value, tuple) else [value]
    return [torch.as_tensor(part) for part in parts]


def is_close(a, b):
    return torch.isclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def kind(tensor):
    return f"numbers of type {str(tensor.dtype).removeprefix('torch.')}"


def compare(name, got, expected, axes):
    """Lines that state what is wrong with one tensor; [] if nothing is."""
    if got.shape != expected.shape:
        return [f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"]
    if got.dtype != expected.dtype:
        lines = [f"{kind(got)}, expected {kind(expected)}"]
        if got.numel() == 0:
            lines.append("hint: an empty tensor is float32 unless you give dtype=torch.int64")
        return lines
    wrong = ~is_close(got, expected)
    if not wrong.any():
        return []
    first = tuple(wrong.nonzero()[0].tolist())
    place = ", ".join(f"{axis} {n}" for axis, n in zip(axes, first))
    values = f"yours {got[first].item():.5g}, expected {expected[first].item():.5g}"
    lines = [f"{wrong.sum()} of {wrong.numel()} numbers differ, the first at ({place}): {values}"]
    if not axes:
        lines = [values]
    if got[first].isnan():
        lines.append("hint: nan is 0 / 0 or inf / inf: is nothing or everything masked, or did "
                     "exp() overflow?")
    if axes == "BTND" and first[2] == 0:
        lines.append(f"hint: {TOKEN_0[name]}")
    return lines


def explains(mistake, got, expected):
    """Is `got` the result of this mistake? Not if there are no numbers, or of another dtype."""
    for wrong, part, right_part in zip(tensors(mistake), tensors(got), tensors(expected)):
        if right_part.numel() == 0 or part.dtype != right_part.dtype:
            return False
        if part.shape != wrong.shape or not (is_close(part, wrong) | wrong.isnan()).all():
            return False
    return True


def type_name(value):
    name = type(value).__name__
    article = "an" if name in ("int", "ndarray") else "a"
    return f"{article} {name}"


def check(name, function):
    """Lines that state what is wrong with a student's function; [] if it is right."""
    if function is None:
        return ["there is no such function"]
    torch.manual_seed(0)
    for args, expected, axes, mistakes in EXERCISES[name]():
        given = copy.deepcopy(args)
        got = function(*given)
        if not isinstance(got, type(expected)):
            return [f"it returned {type_name(got)}, expected {type_name(expected)}"]
        if len(tensors(got)) != len(tensors(expected)):
            return [f"it returned {len(got)} values, expected {len(expected)}"]
        lines = []
        labels = ("forward: ", "backward: ") if name == "roll_groups" else ("",)
        for label, part, right_part in zip(labels, tensors(got), tensors(expected)):
            found = compare(name, part, right_part, axes)
            if found:
                found[0] = label + found[0]
            lines += [line for line in found if line not in lines]
        if lines:
            lines += [f"hint: {hint}" for hint in mistakes
                      if explains(mistakes[hint], got, expected)]
        for before, after in zip(args, given):
            if isinstance(before, torch.Tensor) and not torch.equal(before, after):
                lines.append("it changed its input; work on a copy")
        if lines:
            values = [str(getattr(value, "shape", value)) for value in args]
            return [*lines, f"called with {', '.join(values)}"]
    return []


def explain(error, path):
    """A student's exception in one line, with the last line of the student's file in its trace."""
    place = Path(path).name
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == path:
            place = f"line {frame.lineno} of {Path(path).name}"
    text = f"{type(error).__name__} {error}"
    if not isinstance(error, SyntaxError):              # its text has the place
        text += f" ({place})"
    return printable(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXERCISES))
    parser.add_argument("--module", default=str(Path(__file__).with_name("exercises.py")),
                        metavar="FILE", help="the file to check (default: lab/exercises.py)")
    args = parser.parse_args()
    names = args.names or list(EXERCISES)
    for name in names:
        if name not in EXERCISES:
            raise UserError(f"exercise {name} is unknown; choose from {', '.join(EXERCISES)}")
    try:
        functions = runpy.run_path(args.module)
    except Exception as error:                          # a student's file can fail in any way
        raise UserError(explain(error, args.module)) from None
    right = 0
    for name in names:
        try:
            with torch.no_grad():
                lines = check(name, functions.get(name))
            if lines and name == "embed_with_time" and not args.names:
                lines = ["wrong; to see hints, check it by its name"]
        except Exception as error:
            lines = [explain(error, args.module)]
        right += not lines
        print(f"{name}: {lines[0] if lines else 'right'}")
        for line in lines[1:]:
            print(f"    {line}")
    print(f"{right} of {len(names)} right")
    sys.exit(right < len(names))


if __name__ == "__main__":
    run_main("check.py", main)
