"""The tests, in the order of the files: rolling, allinone, data, toy, eval, train.

    python -m pytest -q test_allinone.py            offline, on a CPU; what needs more skips and says what
"""
import base64
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from argparse import Namespace
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import permutations
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import allinone
import data
import eval
import rolling
import toy
import train
from allinone import (HEADS, SIZES, AllInOne, Config, UserError, gmacs, load_weights, millions, read_config,
                      read_weights, resize_positions, run_main)
from data import (BENCHMARKS, Clips, Example, MissingMedia, Mixed, Order, Recipe, VideoError, Words, answer_list,
                  collate, crop, encode_picture, find_media, frame_indices, has_split, hold_out, load_split, loader,
                  pick_frames, read_frames, read_jsonl_file, tint, wordpiece)
from eval import (FINISH, benchmark_table, by_kind, chosen, coverage, embeddings, evaluate, gaze, match_odds, page,
                  ranks, recall_metrics, report, scores, survey, wilson)
from rolling import roll_groups, roll_loop, roll_tokens
from train import TASKS, counts, lr_at, overrides, parameter_groups

SHARED = Path(__file__).resolve().parent / "../shared"          # fixtures that are not part of the project
PARITY = SHARED / "parity"

# ---- rolling --------------------------------------------------------------------------------------------------------

NOBODY = torch.empty(0, dtype=torch.long)

def numbered(B=2, T=3, N=17, D=2):
    """Every number of the tensor is its own, so that a misplaced token cannot hide."""
    return torch.arange(B * T * N * D, dtype=torch.float32).view(B, T, N, D)

@pytest.mark.parametrize("layout", ["block", "spread"])
@pytest.mark.parametrize("fraction", [1 / 8, 1 / 4, 1 / 2])
def test_fast_equals_loop(layout, fraction):
    """roll_tokens is roll_loop to the bit, over batch sizes, frames and grids, square or not."""
    for B, T, rows, cols in [(1, 1, 4, 4), (1, 2, 4, 4), (2, 3, 7, 5), (3, 5, 2, 9), (2, 8, 14, 14)]:
        x, groups = numbered(B, T, 1 + rows * cols), roll_groups(rows, cols, fraction, layout)
        assert torch.equal(roll_tokens(x, *groups), roll_loop(x, *groups))

def test_equals_released_op():
    """The block layout moves exactly what the released op moves, from 8 tokens on (below, that op moves CLS too)."""
    if not (PARITY / "roll_cases.npz").exists():
        pytest.skip("no fixtures of the released op in ../shared/parity")
    z, seen = np.load(PARITY / "roll_cases.npz"), 0
    for key in [key[1:] for key in z if key[0] == "x"]:
        T, N = (int(part[1:]) for part in key[1:].split("_"))
        if N >= 8:
            x, y = (torch.from_numpy(z[side + key]).view(2, T, N, 4) for side in "xy")
            groups = roll_groups(1, N - 1, layout="block")
            assert torch.equal(roll_tokens(x, *groups), y) and torch.equal(roll_loop(x, *groups), y), key
            seen += 1
    assert seen == 15

def test_direction():
    """Forward tokens arrive one frame later, backward ones one earlier, around the ends; CLS and the rest stay."""
    x, forward, backward = numbered(B=1), torch.tensor([1, 5]), torch.tensor([2])
    y = roll_tokens(x, forward, backward)
    assert torch.equal(y[:, 1, forward], x[:, 0, forward]) and torch.equal(y[:, 0, forward], x[:, 2, forward])
    assert torch.equal(y[:, 1, backward], x[:, 2, backward]) and torch.equal(y[:, 2, backward], x[:, 0, backward])
    stay = [n for n in range(17) if n not in (1, 2, 5)]
    assert torch.equal(y[:, :, stay], x[:, :, stay])

@pytest.mark.parametrize("layout", ["block", "spread"])
def test_T_rolls_are_the_identity(layout):
    """Tokens go round: after T rolls, and not before, each is home; CLS never left; the other way round undoes one."""
    x, groups = numbered(T=5), roll_groups(4, 4, layout=layout)
    y = x
    for t in range(5):
        y = roll_tokens(y, *groups)
        assert torch.equal(y[:, :, 0], x[:, :, 0]) and torch.equal(y, x) == (t == 4)
    assert torch.equal(roll_tokens(roll_tokens(x, *groups), *groups[::-1]), x)

def test_nothing_to_roll_is_the_identity():
    """One frame, fewer than 8 tokens, fraction 0, layout none: the same numbers, and groups that are empty."""
    assert torch.equal(roll_tokens(numbered(T=1), *roll_groups(4, 4)), numbered(T=1))
    for groups in (roll_groups(2, 3), roll_groups(2, 3, layout="block"), roll_groups(4, 4, 0),
                   roll_groups(4, 4, layout="none")):
        assert len(groups[0]) == len(groups[1]) == 0
    assert torch.equal(roll_tokens(numbered(N=7), NOBODY, NOBODY), numbered(N=7))

def test_any_strides_and_input_untouched():
    """A transposed view rolls as its contiguous copy, and the input keeps its numbers, also where nothing moves."""
    x, groups = numbered(3, 4, 17).transpose(0, 1), roll_groups(4, 4)
    before = x.clone()
    y = roll_tokens(x, *groups)
    assert not x.is_contiguous() and torch.equal(y, roll_loop(x.contiguous(), *groups))
    y.zero_()
    roll_tokens(x, NOBODY, NOBODY).zero_()
    assert torch.equal(x, before)

def test_gradient_is_the_inverse_roll():
    """The gradient goes back where its token came from; double precision gradcheck agrees."""
    x, groups = numbered().double().requires_grad_(), roll_groups(4, 4)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    roll_tokens(x, *groups).backward(grad)
    assert torch.equal(x.grad, roll_loop(grad, *groups[::-1]))
    assert torch.autograd.gradcheck(lambda x: roll_tokens(x, *groups), numbered(1, 3, 17, 1).double().requires_grad_())

@pytest.mark.parametrize("side", [8, 14, 16, 24])
def test_spread_covers_the_picture(side):
    """An eighth of the patches goes each way; every row and every column has as many of them, give or take one."""
    for slots in roll_groups(side, side):
        picture = torch.zeros(side * side).index_fill_(0, slots - 1, 1).view(side, side)
        assert abs(picture.sum() - side * side / 8) <= 1
        for axis in (0, 1):
            assert picture.sum(axis).max() - picture.sum(axis).min() <= 1

def test_rolling_refuses():
    """Wrong ranks, bad groups, unknown layouts and fractions are refused in both twins."""
    one, two = torch.tensor([1]), torch.tensor([2])
    for roll in (roll_tokens, roll_loop):
        for x, forward, backward, line in [
                (numbered()[0], one, two, r"\(B, T, N, D\)"), (numbered(), one, one, "overlap"),
                (numbered(), torch.tensor([1, 1]), two, "repeat"), (numbered(), torch.tensor([0]), two, "slot 0"),
                (numbered(), one, torch.tensor([17]), "slot 1 to 17"),
                (numbered(), torch.tensor([-1]), two, "slot -1")]:
            with pytest.raises(ValueError, match=line):
                roll(x, forward, backward)
    for wrong in ({"layout": "random"}, {"fraction": 0.3}, {"fraction": 2 / 3}, {"fraction": -1 / 4}, {"fraction": 2}):
        with pytest.raises(ValueError, match="choose"):
            roll_groups(4, 4, **wrong)

def drawn(svg):
    """[(tag, attributes, text)] of an SVG, which must be sound XML; its texts, about 6.8 px a letter, must fit in."""
    root = ElementTree.fromstring(svg)
    for e in root.iter():
        if e.get("text-anchor") == "start":
            wide = 6.8 * len(e.text or "") * int(e.get("font-size")) / 13
            assert float(e.get("x")) + wide < float(root.get("width")), e.text
    return [(e.tag.split("}")[1], e.attrib, e.text) for e in root.iter()]

def test_roll_figure_shows_the_op():
    """Each frame has as many squares of each colour as tokens of that frame: all before, 3/4 and twice 1/8 after."""
    paths = [a["d"].count("z") for tag, a, _ in drawn(rolling.figure(side=16)) if tag == "path"]
    assert paths == [256, 0, 0, 0, 256, 0, 0, 0, 256, 192, 32, 32, 32, 192, 32, 32, 32, 192]

def test_a_reader_may_close_the_pipe(monkeypatch):
    """As `| head` does: no traceback, neither at once nor when the interpreter flushes at its end."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        run_main("x.py", lambda: print("a line"))

def test_pictures_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """One line for a folder in the way, of either script that draws; and for a bench of no clips."""
    for script, flags, line in ((allinone, ("--svg", tmp_path), f"{tmp_path} cannot be written"),
                                (rolling, ("--svg", tmp_path), f"{tmp_path} cannot be written"),
                                (allinone, ("--bench", "--clips", 0), "--clips 0: 1 or more")):
        monkeypatch.setattr(sys, "argv", ["x.py", *map(str, flags)])
        with pytest.raises(SystemExit) as done:
            run_main("x.py", script.main)
        assert line in f"{done.value.code} {capsys.readouterr().err}"

def test_ctrl_c_is_one_line(capsys):
    """Anywhere but in the training loop, which saves first: no traceback, and the code that shells expect."""
    def pressed():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as done:
        run_main("x.py", pressed)
    assert done.value.code == 130 and capsys.readouterr().err == "x.py: interrupted\n"

# ---- allinone: helpers ----------------------------------------------------------------------------------------------

SMALL = Config(width=32, layers=3, heads=2, image=32, patch=8, frames=4, words=10, vocab=50, answers=5, embed=8,
               dropout=0.0, drop_path=0.0)

def scrambled(module, seed=0):
    """The module in float64 and evaluation mode, every tensor random and large enough to matter, time too."""
    g = torch.Generator().manual_seed(seed)
    for p in module.double().eval().parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.15 + (p.dim() == 1)
    return module

def ready(config=SMALL, heads=()):
    return scrambled(AllInOne(config, heads))

def inputs(config=SMALL, B=2, T=3, L=7, seed=1):
    """Frames, words and keep, the last clip's text one token shorter than the first's."""
    g = torch.Generator().manual_seed(seed)
    frames = torch.randn(B, T, 3, config.image, config.image, generator=g, dtype=torch.float64)
    words = torch.randint(1, config.vocab, (B, L), generator=g)
    return frames, words, torch.arange(L) < torch.arange(L, L - B, -1)[:, None]

def close(a, b, tol=1e-9):
    """Equal up to tol: two tensors, or two rows of them."""
    if isinstance(a, torch.Tensor):
        return torch.allclose(a.double(), torch.as_tensor(b).double(), rtol=0, atol=tol)
    return all(close(x, y, tol) for x, y in zip(a, b, strict=True))

# ---- allinone: against the released model ---------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, out, tol", [(torch.float32, "out/", 2e-5), (torch.float64, "out64/", 1e-6)])
@pytest.mark.parametrize("name", ["parity_tiny", "parity_tiny_T1"])
def test_equals_released_model(name, dtype, out, tol, tmp_path):
    """A Lightning file of the released tensors loads whole and gives all the released outputs, its shuffle off."""
    if not (PARITY / f"{name}.npz").exists():
        pytest.skip("no fixtures of the released model in ../shared/parity")
    z = np.load(PARITY / f"{name}.npz")
    path, tensors = tmp_path / "all.ckpt", {k[3:]: torch.from_numpy(z[k]) for k in z if k.startswith("sd/")}
    torch.save({"epoch": 3, "state_dict": tensors}, path)
    assert read_weights(path)[::2] == ("all-in-one", {})
    config = read_config(path, roll="block", heads=3)
    assert config == Config(48, 3, 3, 32, 8, int(z["cfg/num_frames"]), 16, 200, 11, 32, "block")
    model = AllInOne(config, RELEASED).to(dtype).eval()
    assert load_weights(model, path, answers=[str(i) for i in range(11)]) == (
        "loaded 77/77 tensors; dropped: text_embeddings.position_ids (a constant); "
        "note: answers are taken to be in the file's order")
    head = model.heads
    given = {k[3:]: torch.from_numpy(z[k]) for k in z if k.startswith("in/")}
    frames, words, keep = given["image"].to(dtype), given["text_ids"], given["text_masks"].bool()
    with torch.no_grad():
        o = model(frames, words, keep)
        got = {"cls_feats": o.pooled, "text_feats": o.text, "image_feats": o.video,
               "itm_logits": head["matching"](o.pooled), "vqa_logits": head["answer"](o.pooled),
               "rank_output": head["rank"](o.pooled)[:, 0]}
        got["vqa_loss"] = F.cross_entropy(got["vqa_logits"], given["vqa_labels"])
        got["mlm_logits"] = head["mlm"](model(frames, given["text_ids_mlm"], keep).text)
        got["mlm_loss"] = F.cross_entropy(got["mlm_logits"].flatten(0, 1), given["text_labels_mlm"].flatten())
        B, A, L = given["option_ids"].shape                 # frames are embedded once for all the options
        pooled = model.fuse(model.embed_frames(frames).repeat_interleave(A, 0), given["option_ids"].flatten(0, 1),
                            given["option_masks"].bool().flatten(0, 1)).pooled
        for key, name in (("mc", "rank"), ("mc_vqa", "choice")):
            got[key + "_scores"] = head[name](pooled).view(B, A)
            got[key + "_loss"] = F.cross_entropy(got[key + "_scores"], given["answer"])
        got["itc_text_emb"], got["itc_video_emb"] = model.encode_text(words, keep), model.encode_video(frames)
        sim = F.normalize(got["itc_text_emb"], dim=-1) @ F.normalize(got["itc_video_emb"], dim=-1).T
        got["itc_sim"] = sim
        got["itc_loss"] = sum(F.cross_entropy(s / 0.05, torch.arange(B)) for s in (sim, sim.T))
        true = torch.from_numpy(z["out/itm/itm_labels"]).long()
        mixed = torch.where(true.view(-1, 1, 1, 1, 1) == 1, frames, given["false_image"].to(dtype))
        got["itm/logits"] = head["matching"](model(mixed, words, keep).pooled)
        got["itm/itm_loss"] = F.cross_entropy(got["itm/logits"], true)
    for key, value in got.items():
        assert np.abs(value.numpy() - z[out + key]).max() < tol, key

# ---- allinone: golden numbers ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, parameters, mlm, multiply_adds", [
    ("tiny", 11_431_490, 5.93e6, 4.64), ("small", 33_553_538, 11.9e6, 16.8), ("base", 109_869_314, 24.1e6, 63.8)])
def test_golden_sizes(size, parameters, mlm, multiply_adds):
    """Parameters without and of the MLM head, and multiply-adds of a clip, are the released model's."""
    with torch.device("meta"):
        counts = [round(1e6 * millions(AllInOne(SIZES[size], heads))) for heads in (("matching",), ("matching", "mlm"))]
    assert counts[0] == parameters and counts[1] - counts[0] == pytest.approx(mlm, rel=5e-3)
    assert gmacs(SIZES[size]) == pytest.approx(multiply_adds, rel=2e-3)

def test_gmacs_equal_counted_flops():
    """The formula gives what PyTorch's own counter sees in a forward pass of one clip."""
    for config, T, L in ((SMALL, 3, 7), (SIZES["tiny"], 3, 40)):
        with FlopCounterMode(display=False) as counter:             # with gradients: it does not know oneDNN's product,
            frames, words = torch.zeros(1, T, 3, config.image, config.image), torch.zeros(1, L, dtype=torch.long)
            AllInOne(config).eval()(frames, words, maps=[])         # nor, but for maps, fused attention
        assert counter.get_total_flops() == pytest.approx(2e9 * gmacs(config, L, T), rel=1e-12)

# ---- allinone: what must not matter ---------------------------------------------------------------------------------

def test_padding_is_inert():
    """Other words under the padding, more padding or none: the same pooled feature and real words."""
    model, (frames, words, keep) = ready(), inputs()
    out = model(frames, words, keep)
    for other in (model(frames, torch.where(keep, words, 3), keep),
                  model(frames, F.pad(words, (0, 3), value=9), F.pad(keep, (0, 3)))):
        assert close((other.pooled, other.video, other.text[:, :7][keep]), (out.pooled, out.video, out.text[keep]))
    alone = model(frames[1:], words[1:, :6])                # its real length, nothing to mask
    assert close((alone.pooled, alone.video, alone.text), (out.pooled[1:], out.video[1:], out.text[1:, :6]))
    assert not close(model(frames, words).pooled[1:], out.pooled[1:], 1e-3)

def test_alone_equals_in_a_batch():
    """A clip's outputs and embeddings do not depend on its neighbours in the batch."""
    model, (frames, words, keep) = ready(heads=("contrast",)), inputs(B=3)
    text, video = model.encode_text(words, keep), model.encode_video(frames)
    for b in range(3):
        one = slice(b, b + 1)
        assert close(model(frames[one], words[one], keep[one]), (o[one] for o in model(frames, words, keep)))
        assert close(model.encode_text(words[one], keep[one]), text[one])
        assert close(model.encode_video(frames[one]), video[one])

def test_attention_maps_change_nothing():
    """Asking for attention gives the same outputs, and maps (B*T, H, S, S) of rows that sum to 1, zero on padding."""
    model, (frames, words, keep), maps = ready(), inputs(), []
    assert close(model(frames, words, keep, maps), model(frames, words, keep))
    assert len(maps) == 3 and all(m.shape == (6, 2, 24, 24) for m in maps)
    assert all(torch.allclose(m.sum(-1), torch.ones(()).double()) and (m[3:, :, :, 6] == 0).all() for m in maps)

def test_uint8_equals_normalised_floats():
    """Bytes are normalised on the device with ImageNet's mean and deviation."""
    model, (_, words, _) = ready(), inputs()
    pixels = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(c).double().view(3, 1, 1) for c in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert close(model(pixels, words), model((pixels / 255.0 - mean) / std, words), 1e-5)

def test_checkpointing_gives_the_same_gradients():
    """Every block runs twice, to keep nothing for backward, and no gradient changes, with dropout and drop path on."""
    model, (frames, words, keep) = ready(replace(SMALL, dropout=0.1, drop_path=0.3)).train(), inputs()
    grads, runs = [], []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda *_: runs.append(1))
    for model.checkpointing, times in ((False, 1), (True, 2)):
        torch.manual_seed(0)
        model.zero_grad()
        runs.clear()
        model(frames, words, keep).pooled.square().sum().backward()
        assert len(runs) == 3 * times
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert close(*grads)

# ---- allinone: what must matter -------------------------------------------------------------------------------------

def use(model, head, frames, words, keep):
    """A number that the head's loss would be made of."""
    if head == "contrast":
        return model.encode_text(words, keep).square().sum() + model.encode_video(frames).square().sum()
    out = model(frames, words, keep)
    return model.heads[head](out.text if head == "mlm" else out.pooled).square().sum()

@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_gets_a_gradient(head):
    """Each head trains all that it is made of and rests on, but for the pooling that MLM and contrast do not use."""
    model = ready(heads=(head,))
    use(model, head, *inputs(T=4, L=10)).backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == ({"pool.weight", "pool.bias"} if head in ("mlm", "contrast") else set())

def test_rolling_is_what_sees_order():
    """With time at zero and no rolling any order of the frames looks the same; rolling, only cyclic shifts do."""
    frames, words, keep = inputs(T=4)
    for roll in ("none", "spread", "block"):
        model = ready(replace(SMALL, roll=roll))
        model.time.data.zero_()
        pooled = model(frames, words, keep).pooled
        for order in permutations(range(4)):
            blind = roll == "none" or all((b - a) % 4 == 1 for a, b in zip(order, order[1:]))
            assert close(model(frames[:, order], words, keep).pooled, pooled, 1e-9 if blind else 1e-4) == blind

def test_time_and_unimodal_rolling_see_order():
    """Time embeddings tell a reversed clip; frames alone tell it only with roll_unimodal."""
    frames, words, keep = inputs(T=4)
    timed = ready(replace(SMALL, roll="none"))
    assert not close(timed(frames.flip(1), words).pooled, timed(frames, words).pooled, 1e-4)
    for unimodal in (False, True):
        model = ready(replace(SMALL, roll_unimodal=unimodal), heads=("contrast",))
        model.time.data.zero_()
        assert close(model.encode_video(frames.flip(1)), model.encode_video(frames), 1e-4) != unimodal

def test_frames_come_from_the_input():
    """T is the clip's: fewer frames than the model has times for use the first times; one frame never rolls."""
    model, (frames, words, keep) = ready(), inputs(T=4)
    assert model(frames[:, :2], words, keep).video.shape == (2, 17, 32)
    still = ready(replace(SMALL, roll="none"))
    assert close(model(frames[:, :1], words, keep), still(frames[:, :1], words, keep))
    assert not close(model(frames[:, :2], words, keep), still(frames[:, :2], words, keep), 1e-4)

def test_positions_are_resized_for_other_images():
    """A larger picture runs, with positions resized smoothly: CLS as is, a ramp down the rows stays one."""
    assert ready()(*[torch.zeros(1, 2, 3, 48, 48).double(), torch.ones(1, 3).long()]).video.shape == (1, 37, 32)
    table = torch.cat([torch.tensor([[7.0]]), torch.arange(16).view(16, 1) // 4 * 1.0])
    big = resize_positions(table, 6, 6)
    grid = big[1:].view(6, 6)
    assert big[0] == 7 and (grid.diff(dim=0) > 0).all() and grid.diff(dim=1).abs().max() < 1e-5
    assert torch.equal(resize_positions(table, 4, 4), table)

def test_fresh_rank_is_matching():
    """A fresh model's rank head is row 1 of its matching head."""
    head = AllInOne(SMALL, ("matching", "rank")).heads
    assert torch.equal(head["rank"].weight, head["matching"].weight[1:])

def test_model_refuses():
    """A user's mistakes name the value and what is allowed."""
    for wrong, line in (({"width": 100, "heads": 3}, "width 100"), ({"image": 33}, "image 33"),
                        ({"roll": "random"}, "spread, block or none"), ({"fraction": 0.3}, "fraction 0.3"),
                        ({"dropout": 0.3}, "dropout 0.3: .* 0.2"), ({"drop_path": 1.0}, "drop_path 1.0: .* 0.9")):
        with pytest.raises(ValueError, match=line):
            replace(SMALL, **wrong)
    with pytest.raises(UserError, match="heads .*'beam'.* choose from matching"):
        AllInOne(SMALL, ("beam",))
    model, (frames, words, _) = ready(), inputs(T=4)
    with pytest.raises(ValueError, match="texts of 11 tokens"):
        model(frames, torch.ones(2, 11, dtype=torch.long))
    for T in (0, 5):
        with pytest.raises(ValueError, match=f"clips of {T} frames"):
            model(torch.zeros(2, T, 3, 32, 32).double(), words)

def test_without_time_only_rolling_tells_order():
    """time=False: the embeddings are there but add nothing, so without rolling any order of frames looks the same."""
    frames, words, keep = inputs(T=4)
    blind, seeing = (ready(replace(SMALL, roll=roll, time=False)) for roll in ("none", "spread"))
    assert close(blind(frames.flip(1), words, keep).pooled, blind(frames, words, keep).pooled)
    assert not close(seeing(frames.flip(1), words, keep).pooled, seeing(frames, words, keep).pooled, 1e-4)

def test_sequence_figure_shows_the_mask():
    """Of 72 x 72 pairs those within a frame are filled, but not the two columns of padding."""
    boxes = [a for tag, a, _ in drawn(allinone.figure()) if tag == "rect" and a["height"] == "5"]
    assert sum(float(a["width"]) for a in boxes) / 5 == 3 * 24 * 22 and len({a["y"] for a in boxes}) == 72
    assert {(float(a["x"]) - 92) // 120 == (float(a["y"]) - float(boxes[0]["y"])) // 120 for a in boxes} == {True}

# ---- allinone: speed ------------------------------------------------------------------------------------------------

def test_dropout_rate_scale_and_gradient():
    """0.1 of a million numbers are lost, neighbours independently; the others and their gradients are scaled alike; the
    global generator alone decides."""
    x = torch.rand(1000, 1001, generator=torch.Generator().manual_seed(1)) + 1
    x.requires_grad = True
    torch.manual_seed(0)
    y = allinone.dropout(x, 0.1, True)
    y.sum().backward()
    lost = y == 0
    assert abs(lost.double().mean() - 0.1) < 1.5e-3         # five deviations of the mean
    for shift in (1, 2, 3, 4):                              # four numbers share one draw
        assert abs((lost[:, :-shift] & lost[:, shift:]).double().mean() - 0.01) < 6e-4
    assert torch.equal(lost, x.grad == 0)
    assert close(y[~lost], x[~lost] / 0.9, 1e-4) and close(x.grad[~lost], torch.full_like(x, 1 / 0.9)[~lost], 1e-4)
    torch.manual_seed(0)
    assert torch.equal(y, allinone.dropout(x, 0.1, True)) and not torch.equal(y, allinone.dropout(x, 0.1, True))

@pytest.mark.parametrize("p, dtype, shape", [
    (0.5, torch.float64, (300, 301)), (0.1, torch.bfloat16, (999, 77)), (0.1, torch.float32, ())])
def test_dropout_of_any_shape_and_dtype(p, dtype, shape):
    """Rate and scale hold for other probabilities and dtypes, also where the count is not a multiple of four."""
    y = allinone.dropout(torch.ones(shape, dtype=dtype), p, True)
    kept = y[y != 0].double() * (1 - p)
    assert y.dtype == dtype and y.shape == shape and torch.allclose(kept, torch.ones_like(kept), atol=4e-3)
    assert not shape or abs((y == 0).double().mean() - p) < 0.01

def test_dropout_is_off():
    """In evaluation, and with p = 0, the very input comes back and no random number is used up."""
    x, state = torch.ones(5), torch.get_rng_state()
    assert torch.equal(allinone.dropout(x, 0.1, False), x) and torch.equal(allinone.dropout(x, 0.0, True), x)
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize("shape", [(600, 768), (2, 3, 7, 384), (1, 512), (5, 340)])
def test_linear_is_nn_linear(shape, monkeypatch):
    """With gradients, in float64, under autocast or with a small matrix nn.Linear to the bit; else by oneDNN, within
    float32's error."""
    torch.manual_seed(0)
    ours, x = allinone.Linear(shape[-1], 385), torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]    # not contiguous
    want, calls, to_mkldnn = F.linear(x, ours.weight, ours.bias), [], torch.Tensor.to_mkldnn
    assert torch.equal(ours(x), want) and ours(x).requires_grad
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda x: calls.append(1) or to_mkldnn(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), F.linear(x, ours.weight, ours.bias)) and not calls
    with torch.no_grad():
        got = ours(x)
        assert len(calls) == (shape[-1] != 340 and allinone.ONEDNN)
        assert got.shape == want.shape and torch.allclose(got, want, atol=1e-5)
        assert torch.equal(ours.double()(x.double()), F.linear(x.double(), ours.weight, ours.bias)) and len(calls) < 2

def test_plain_reference_gives_our_outputs():
    """The bench compares like with like: outputs, losses and gradients in evaluation mode, words padded or not."""
    config = replace(SMALL, roll="block", frames=3)
    model = ready(config, ("matching", "mlm", "contrast"))
    frames, words, keep = inputs(config)
    got, want = allinone.plain(model, frames, words, keep), model(frames, words, keep)
    assert close((got.pooled, got.video), (want.pooled, want.video)) and close(got.text[:, :7], want.text)
    alone = allinone.plain(model, None, words, keep).text[:, 0]
    assert close(model.heads["contrast"]["text"](alone), model.encode_text(words, keep))
    words, keep = words.repeat(1, 2)[:, :10].unsqueeze(1).repeat(1, 2, 1), torch.ones(2, 2, 10, dtype=torch.bool)
    labels, losses, grads = words[:, 1].where(torch.arange(10) % 3 == 1, -100), [], []
    for way in ("plain", "ours"):
        model.zero_grad()
        losses.append(allinone.bench_loss(way, model, frames, words, keep, torch.tensor([0, 1]), labels))
        losses[-1].backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert close(losses[0], losses[1]) and close(*grads)
    del model.heads["contrast"]                             # and train.py's own
    b = {"frames": frames, "words": words, "keep": keep, "target": torch.tensor([0, 1]), "labels": labels}
    both = TASKS["pretrain"].loss(model, b)
    assert close(both["matching"][0] / 2 + both["mlm"][0] / (labels >= 0).sum(), losses[0].float(), 1e-5)

def test_bench_prints_times_ratios_and_memory():
    """The command as typed, on the toy size: every line has its figures, every ratio is a number above 0."""
    done = subprocess.run([sys.executable, Path(allinone.__file__), "--bench", "--size", "toy", "--clips", "2"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
    line = r"^{} +\d+ ms +\d+ ms +(\d+\.\d\d)"
    for name in ("forward, 40 words", "forward, 10 words", "text alone", "one clip, five options", "training step",
                 "--amp", "--checkpointing", "--accum 2"):
        assert float(re.search(line.format(name), done.stdout, re.M)[1]) > 0
    assert len(re.findall(r"its memory +\d+\.\d\d GiB +\d+\.\d\d GiB +\d+\.\d\d$", done.stdout, re.M)) == 4
    assert re.search(r"peak: [1-9]\d* GFLOP/s", done.stdout)

# ---- weights: helpers -----------------------------------------------------------------------------------------------

TINY = Config(width=48, layers=2, heads=3, image=32, patch=8, frames=1, words=9, vocab=30, answers=4, embed=8,
              roll="block", dropout=0.0, drop_path=0.0)
ANSWERS = ["red", "green", "blue", None]
RELEASED = ("matching", "mlm", "answer", "choice", "rank", "contrast")

def built(config, path, heads=(), **more):
    """A float64 model filled from the file, and the line about it."""
    model = AllInOne(config, heads).double().eval()
    return model, load_weights(model, path, **more)

def saved(tmp_path, what, name="file.pt"):
    torch.save(what, tmp_path / name)
    return tmp_path / name

def vit_dict(config=TINY, dist=False):
    """A state dict in timm's naming, from our model's own tensors."""
    model, out = ready(config), {}
    for name, t in model.state_dict().items():
        if name in ("cls", "position"):
            out[{"cls": "cls_token", "position": "pos_embed"}[name]] = t.view(1, -1, config.width)
        elif name.startswith(("patch.", "norm.")):
            out[name.replace("patch.", "patch_embed.proj.")] = t
        elif name.startswith("blocks."):
            out[re.sub("(qkv|proj)", r"attn.\1", re.sub("(fc.)", r"mlp.\1", name))] = t
    if dist:
        out["pos_embed"] = torch.cat([out["pos_embed"][:, :1], torch.full((1, 1, config.width), 9.0),
                                      out["pos_embed"][:, 1:]], 1)
        out["dist_token"], out["head_dist.weight"] = torch.ones(1, 1, config.width), torch.ones(5, config.width)
    return out | {"head.weight": torch.ones(5, config.width), "head.bias": torch.ones(5)}

def released_dict(config=TINY):
    """A state dict in the released naming: the ViT under transformer., and the rest."""
    own = ready(config, RELEASED).state_dict()
    back = {"word.": "text_embeddings.word_embeddings.", "word_position": "text_embeddings.position_embeddings.weight",
            "segment": "text_embeddings.token_type_embeddings.weight", "word_norm.": "text_embeddings.LayerNorm.",
            "modality": "token_type_embeddings.weight", "pool.": "pooler.dense.", "heads.matching.": "itm_score.fc.",
            "heads.mlm.0.": "mlm_score.transform.dense.", "heads.mlm.2.": "mlm_score.transform.LayerNorm.",
            "heads.mlm.3.weight": "mlm_score.decoder.weight", "heads.mlm.3.bias": "mlm_score.bias",
            "heads.answer.": "vqa_classifier.", "heads.choice.": "mc_vqa_classifier.", "heads.rank.": "rank_output.",
            "heads.contrast.text.": "txt_proj.", "heads.contrast.video.": "vid_proj."}
    out = {"text_embeddings.position_ids": torch.arange(config.words)[None],
           "transformer.temporal_embed": own["time"][None]}
    out |= {"transformer." + k: t for k, t in vit_dict(config).items() if not k.startswith("head")}
    for name, t in own.items():
        out |= {new + name[len(old):]: t for old, new in back.items() if name.startswith(old)}
    return out

# ---- weights: outputs -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["vilt.", ""])
def test_vilt_gives_huggingface_outputs(prefix, tmp_path, monkeypatch):
    """transformers' ViltModel and its MLM and ranking heads, saved with or without a prefix, answer the same here."""
    vilt = pytest.importorskip("transformers.models.vilt.modeling_vilt")
    config = pytest.importorskip("transformers").ViltConfig(
        vocab_size=30, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=32,
        patch_size=8, max_position_embeddings=9)
    theirs = scrambled(vilt.ViltForMaskedLM(config))
    rank = scrambled(nn.Linear(48, 1))
    for name, m in theirs.named_modules():                  # one eps for all there; here 1e-6 in the blocks
        if isinstance(m, nn.LayerNorm) and "text_embeddings" not in name and "mlm" not in name:
            assert m.eps == 1e-12
            m.eps = 1e-6
    # ViltModel draws a random order of the patches, in evaluation too.
    monkeypatch.setattr(torch, "multinomial", lambda weights, num, *a, **k: torch.arange(int(num)))
    tensors = {k.removeprefix("vilt.") if not prefix else k: t for k, t in theirs.state_dict().items()}
    del tensors["mlm_score.decoder.weight"]                 # tied: safetensors leave it out
    tensors |= {"rank_output.weight": rank.weight.data, "rank_output.bias": rank.bias.data}
    path = saved(tmp_path, tensors, "pytorch_model.bin")
    assert read_config(path, heads=3) == Config(width=48, layers=2, heads=3, image=32, patch=8, words=9, vocab=30)
    model, line = built(TINY, path, ("mlm", "rank"))
    assert line == ("loaded 46/47 tensors; new: time; note: ViLT was trained with LayerNorm eps 1e-12 in blocks (here "
                    "1e-6) and pixels in -1..1, the MLM decoder starts as the word embeddings")
    frames, ids, keep = inputs(TINY, T=1, L=9)
    want = theirs.vilt(input_ids=ids, attention_mask=keep.long(), pixel_values=frames[:, 0])
    got = model(frames, ids, keep)
    assert close(got.pooled, want.pooler_output)
    assert close(torch.cat([got.text, got.video], 1), want.last_hidden_state)
    assert close(model.heads["mlm"](got.text), theirs.mlm_score(want.last_hidden_state[:, :9]))
    assert close(model.heads["rank"](got.pooled), rank(want.pooler_output))

@pytest.mark.parametrize("dist", [False, True])
def test_vit_gives_torch_encoder_outputs(dist, tmp_path):
    """A timm file, with and without a distillation token, runs with words as torch.nn.TransformerEncoderLayer does."""
    w = vit_dict(dist=dist)
    w["norm.weight"] = w["norm.weight"] * 100               # so that the eps of the last norm shows
    model, line = built(TINY, saved(tmp_path, {"model": w, "args": Namespace(lr=1)}, "deit.pth"))
    gone = "dist_token (no distillation token here, nor its position), head_dist.weight (of an image classifier), "
    assert line == ("loaded 30/39 tensors; new: word_position, segment, modality, time, word.weight, word_norm.* (2), "
                    "pool.* (2); dropped: " + gone * dist + "head.* (2: of an image classifier)")
    frames, ids, keep = inputs(TINY, T=1, L=9)
    position = w["pos_embed"][:, [0, *range(2, 18)]] if dist else w["pos_embed"]
    x = F.conv2d(frames[:, 0], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
    x = torch.cat([w["cls_token"].expand(2, 1, 48), x.flatten(2).transpose(1, 2)], 1) + position + model.modality[1]
    text = model.word.weight[ids] + model.word_position + model.segment[0]
    text = F.layer_norm(text, (48,), model.word_norm.weight, model.word_norm.bias, 1e-12) + model.modality[0]
    x = torch.cat([text, x], 1)
    for i in range(2):
        layer = nn.TransformerEncoderLayer(48, 3, 192, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).double()
        layer.load_state_dict({ours + kind: w[f"blocks.{i}.{timm}{kind}"] for ours, timm, kind in (
            ("self_attn.in_proj_", "attn.qkv.", "weight"), ("self_attn.in_proj_", "attn.qkv.", "bias"),
            *((ours, timm, kind) for kind in (".weight", ".bias") for ours, timm in (
                ("self_attn.out_proj", "attn.proj"), ("linear1", "mlp.fc1"), ("linear2", "mlp.fc2"),
                ("norm1", "norm1"), ("norm2", "norm2"))))})
        x = layer(x, src_key_padding_mask=F.pad(~keep, (0, 17)))
    x = F.layer_norm(x, (48,), w["norm.weight"], w["norm.bias"], 1e-6)
    got = model(frames, ids, keep)
    assert close(torch.cat([got.text, got.video], 1), x)

def test_own_checkpoint_comes_back(tmp_path):
    """Our own file gives its config, the same outputs, and an answer head only for the very same list."""
    model = ready(TINY, RELEASED)
    path = saved(tmp_path, {"model": model.state_dict(), "config": asdict(TINY), "heads": list(RELEASED), "task": "vqa",
                            "answers": ANSWERS, "optimizer": {"state": {0: torch.ones(2)}}})
    source, tensors, meta = read_weights(path)
    assert source == "ours" and set(meta) == {"config", "heads", "answers", "task", "optimizer"}
    assert read_config(path) == TINY and read_config(path, frames=8, roll="none").frames == 8
    again, line = built(read_config(path), path, RELEASED, answers=ANSWERS)
    assert line == f"loaded {len(tensors)}/{len(tensors)} tensors"
    said = [m.heads["answer"](m(*inputs(TINY, T=1, L=9)).pooled) for m in (model, again)]
    assert torch.equal(*said)
    for other, why in ((ANSWERS[::-1], "for other answers"), (None, "for 4 answers, this run gives 0"),
                       (ANSWERS[:3], "for 4 answers, this run gives 3")):
        line = built(TINY, path, RELEASED, answers=other)[1]
        assert line == f"loaded 59/65 tensors; new: answer.* (6); dropped: answer.* (6: {why})"
    line = built(TINY, path, ("rank",))[1]
    assert line.startswith("loaded 41/41") and "dropped: matching.* (2: no matching head in this run), mlm.* (6" in line
    with pytest.raises(UserError, match="heads 3, this model 4; leave out --size and --set$"):
        built(replace(TINY, heads=4), path)
    path = saved(tmp_path, {"model": model.state_dict() | {"extra": torch.ones(1)}, "config": {"beams": 3}})
    with pytest.raises(UserError, match="without a place here: extra"):
        built(TINY, path, RELEASED, answers=ANSWERS)
    with pytest.raises(UserError, match="config fields .'beams'. of another version"):
        read_config(path)

def test_safetensors_or_how_to_install_it(tmp_path, monkeypatch):
    """A .safetensors file is read; without that package one line says how to get it."""
    path = tmp_path / "vit.safetensors"
    pytest.importorskip("safetensors.torch").save_file({k: t.contiguous() for k, t in vit_dict().items()}, path)
    assert built(TINY, path)[1].startswith("loaded 30/39 tensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cut short"):
        read_weights(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        read_weights(path)

# ---- weights: what is told, fitted and refused ----------------------------------------------------------------------

def test_lightning_metadata_is_ignored(tmp_path, monkeypatch):
    """Classes that Lightning leaves in a file are not needed, not imported and not run: plain data stands in."""
    metadata = {"hyper_parameters": Namespace(lr=1e-4)}
    monkeypatch.setitem(sys.modules, "pytorch_lightning", Namespace())
    for key, module, name in (("hparams", "utilities.parsing", "AttributeDict"),
                              ("callbacks", "callbacks.model_checkpoint", "ModelCheckpoint")):
        made = type(name, (dict,), {"__module__": "pytorch_lightning." + module})
        monkeypatch.setitem(sys.modules, made.__module__, Namespace(**{name: made}))
        metadata[key] = made(a=1) if key == "hparams" else {made: {"best": "x.ckpt"}}
    path = saved(tmp_path, {"state_dict": released_dict(), **metadata})
    monkeypatch.undo()
    assert read_weights(path)[::2] == ("all-in-one", {})

def test_line_tells_everything(tmp_path):
    """The one line counts, names what is new, left out and resized, with reasons."""
    tensors = released_dict(replace(TINY, frames=3))
    for name in [k for k in tensors if k.startswith(("rank_output", "txt_proj", "vid_proj"))]:
        del tensors[name]
    path = saved(tmp_path, {"state_dict": tensors})
    heads = ("matching", "answer", "rank", "contrast")
    model, line = built(replace(TINY, image=48, frames=8, words=12), path, heads, answers=["yes", "no"])
    assert line == ("loaded 43/53 tensors; new: answer.* (6), contrast.* (4); "
                    "dropped: text_embeddings.position_ids (a constant), mlm_score.* (6: no mlm head in this run), "
                    "vqa_classifier.* (6: for 4 answers, this run gives 2), "
                    "mc_vqa_classifier.* (6: no choice head in this run); "
                    "resized: time 3 -> 8, position 4x4 -> 6x6, word_position 9 -> 12; note: rank is row 1 of matching")

def test_positions_fit_the_run(tmp_path):
    """Another grid is resized, more frames get zeros, more words keep fresh rows, fewer of either are cut."""
    tensors = released_dict(replace(TINY, frames=3))
    path = saved(tmp_path, {"state_dict": tensors})
    time, texts = tensors["transformer.temporal_embed"][0], tensors["text_embeddings.position_embeddings.weight"]
    more = AllInOne(replace(TINY, image=48, frames=5, words=12)).double()
    fresh = more.word_position.detach().clone()
    load_weights(more, path)
    assert torch.equal(more.position, resize_positions(tensors["transformer.pos_embed"][0], 6, 6))
    assert torch.equal(more.time, torch.cat([time, torch.zeros(2, 48)]))
    assert torch.equal(more.word_position, torch.cat([texts, fresh[9:]]))
    less = built(replace(TINY, frames=2, words=5), path)[0]
    assert torch.equal(less.time, time[:2]) and torch.equal(less.word_position, texts[:5])

def test_rank_starts_as_matching(tmp_path):
    """Without a rank head in the file, rank is row 1 of matching, whether or not the run has a matching head."""
    tensors = released_dict()
    path = saved(tmp_path, {"state_dict": tensors})
    assert torch.equal(built(TINY, path, ("rank",))[0].heads["rank"].weight, tensors["rank_output.weight"])
    del tensors["rank_output.weight"], tensors["rank_output.bias"]
    path = saved(tmp_path, {"state_dict": tensors})
    for heads in (("rank",), ("rank", "matching")):
        rank = built(TINY, path, heads)[0].heads["rank"]
        assert torch.equal(rank.weight, tensors["itm_score.fc.weight"][1:])
        assert torch.equal(rank.bias, tensors["itm_score.fc.bias"][1:])

def test_config_is_read_off_shapes(tmp_path):
    """Width, layers, grid, frames, words and vocabulary come from the tensors; heads from a named size or D // 64."""
    for size in ("toy", "tiny"):
        config = replace(SIZES[size], layers=1, vocab=20, frames=5, words=7, answers=4)
        read = read_config(saved(tmp_path, {"state_dict": released_dict(config)}))
        assert read == replace(config, dropout=0.1, drop_path=0.1, std=0.02)
    assert read_config(saved(tmp_path, vit_dict(replace(TINY, width=128, heads=2))), image=64) == Config(
        width=128, layers=2, heads=2, image=64, patch=8)

@pytest.mark.parametrize("edit, line", [
    (lambda sd: sd.pop("transformer.blocks.1.attn.proj.bias"), "lacks blocks.1.proj.bias"),
    (lambda sd: sd.pop("itm_score.fc.bias"), "lacks matching.bias|lacks heads.matching.bias"),
    (lambda sd: sd.pop("transformer.temporal_embed"), "lacks time"),
    (lambda sd: sd.pop("transformer.pos_embed"), "lacks position"),
    (lambda sd: sd.update({"transformer.blocks.1.ls1.gamma": torch.ones(48)}), r"1 unknown tensors, .*ls1\.gamma"),
    (lambda sd: sd.update({"transformer.pos_embed": torch.ones(1, 16, 48)}), "CLS and 15 patches"),
    (lambda sd: sd.update({"transformer.patch_embed.proj.weight": torch.ones(48, 192)}), r"of shape \(48, 192\), not"),
    (lambda sd: sd.update({"pooler.dense.weight": torch.ones(9, 48)}), r"pool.weight of shape \(9, 48\), this model"),
    (lambda sd: sd.update({"mlm_score.decoder.bias": torch.zeros(30)}), "two different tensors for heads.mlm.3.bias"),
    (lambda sd: sd.update({"text_embeddings.word_embeddings.weight": torch.ones(99, 48)}),
     "vocab 99, this model 30; .*--tokenizer"),
])
def test_incomplete_or_foreign_tensors_are_named(edit, line, tmp_path):
    """A lost, extra or misshapen tensor is an error that names it: nothing is loaded loosely."""
    tensors = released_dict()
    edit(tensors)
    with pytest.raises(UserError, match=line) as error:
        built(TINY, saved(tmp_path, {"state_dict": tensors}), RELEASED, answers=ANSWERS)
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("change, line", [({"width": 96}, "width 48, this model 96"), ({"layers": 3}, "layers 2"),
                                          ({"patch": 16}, "patch 8, this model 16")])
def test_other_sizes_are_errors(change, line, tmp_path):
    """A model of another size is refused with both numbers."""
    with pytest.raises(UserError, match=line):
        built(replace(TINY, **change), saved(tmp_path, vit_dict()))

class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)

def test_broken_foreign_or_malicious_files_are_one_line(tmp_path, recwarn):
    """Whatever is wrong with a file, one line says so, no warning beside it, and nothing in it is executed."""
    good = saved(tmp_path, vit_dict(), "good.pt").read_bytes()
    mark, path = tmp_path / "executed", tmp_path / "bad.pt"
    resnet = {"conv1.weight": torch.ones(4, 3, 7, 7), "layer1.0.conv1.weight": torch.ones(4, 4, 3, 3)}
    cases = [
        (lambda: path.write_bytes(good[:len(good) // 2]), "cut short or not a checkpoint"),
        (lambda: path.write_bytes(b""), "cut short or not a checkpoint"),
        (lambda: path.write_text("What is the woman doing?\n" * 20), "cut short or not a checkpoint"),
        (lambda: torch.save(resnet, path), "another architecture .conv1.weight.*ours, all-in-one, vit, vilt"),
        (lambda: torch.save([torch.ones(3)], path), "no state dict"),
        (lambda: torch.save({"state_dict": {"a": 1}}, path), "no state dict"),
        (lambda: torch.save({}, path), "no state dict"),
        (lambda: torch.save({"model": vit_dict(), "x": Bomb(mark)}, path), "names posix.system.*never done"),
        (lambda: torch.save(Bomb(mark), path, _use_new_zipfile_serialization=False), "names posix.system.*never done"),
        (lambda: path.write_bytes(pickle.dumps(Bomb(mark))), "cut short or not a checkpoint"),
        (lambda: torch.save({"model": vit_dict(), "args": Path("x")}, path), "names pathlib.*never done"),
    ]
    for write, line in cases:
        write()
        for use in (read_weights, read_config, lambda p: load_weights(AllInOne(TINY), p)):
            with pytest.raises(UserError, match=line) as error:
                use(path)
            assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not mark.exists() and not recwarn.list
    pickle.loads(path.write_bytes(pickle.dumps(Bomb(mark))) and path.read_bytes())
    assert mark.exists(), "the bomb is a dud, so the cases above show nothing"
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match="not a file"):
            read_weights(missing)

# ---- data: frame sampler --------------------------------------------------------------------------------------------

N = 60                                                               # frames of the clips below
CLIPS = {                                                            # file name: codec, its options, pixel format
    "mpeg4.avi": ("mpeg4", {"g": "12"}, "yuv420p"),
    "mpeg4.mp4": ("mpeg4", {"g": "12"}, "yuv420p"),
    "mpeg4_b.avi": ("mpeg4", {"bf": "2", "g": "12"}, "yuv420p"),
    "h264_b.mp4": ("libx264", {"bf": "3", "g": "12", "x264-params": "sync-lookahead=0:rc-lookahead=0"}, "yuv420p"),
    "h264_b.avi": ("libx264", {"bf": "3", "g": "12"}, "yuv420p"),
    "h264_long.mkv": ("libx264", {"bf": "3", "g": "250"}, "yuv420p"),
    "open_gop.ts": ("libx264", {"bf": "3", "g": "12", "x264-params": "open-gop=1:b-adapt=0"}, "yuv420p"),
    "refresh.mp4": ("libx264", {"g": "12", "x264-params": "intra-refresh=1"}, "yuv420p"),
    "interlaced.mp4": ("libx264", {"flags": "+ildct+ilme", "x264-params": "tff=1"}, "yuv420p"),
    "ten_bit.mov": ("libx264", {"g": "12"}, "yuv420p10le"),
    "no_times.h264": ("libx264", {"bf": "2", "g": "12"}, "yuv420p"),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=12:log-level=none:pools=1"}, "yuv420p"),
    "vp8.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "10", "g": "20"}, "yuv420p"),
    "vp9.webm": ("libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}, "yuv420p"),
    "mpeg2.mpg": ("mpeg2video", {"bf": "2", "g": "12"}, "yuv420p"),
    "loop.gif": ("gif", {}, "rgb8"),
}

def picture(i, w=80, h=48):
    """A moving square on a moving gradient, so that no two frames are alike."""
    y, x = np.mgrid[:h, :w]
    rgb = np.stack((x * 3 + i * 4, y * 5, x + y + i), -1).astype(np.uint8)
    rgb[8:24, i % w:i % w + 12] = 255 - 3 * i
    return rgb

def encode(path, codec, options, pixels, n=N, w=80, h=48, at=lambda i: i):
    """Write n pictures, the i-th at time at(i) / 24 s."""
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.thread_count = w, h, pixels, 1
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(picture(i, w, h), format="rgb24")
            frame.pts = at(i)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path

def remux(source, path, edit):
    """Copy the packets that edit(list of packets) returns."""
    with av.open(str(source)) as inp, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(inp.streams.video[0])
        for packet in edit([p for p in inp.demux(video=0) if p.size]):
            packet.stream = stream
            out.mux(packet)
    return path

def spoil(packets, change):
    """Replace the payload of packets[j] by change[j](payload)."""
    for j, new in change.items():
        packet = av.Packet(new(bytes(packets[j])))
        packet.pts, packet.dts, packet.time_base = packets[j].pts, packets[j].dts, packets[j].time_base
        packets[j] = packet
    return packets

def patched(path, offset, fmt, *values):
    content = bytearray(path.read_bytes())
    struct.pack_into(fmt, content, offset, *values)
    path.write_bytes(content)

def decode_all(path):
    """The truth: every frame of the file in output order, single-threaded, nothing skipped."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return [frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for frame in container.decode(video=0)]

def check_exact(path, seed=0):
    """Count, all frames at once, single ones, triples and the ends, each against decode_all."""
    truth, rng, counted = decode_all(path), np.random.default_rng(seed), []
    everything = read_frames(path, lambda times: counted.append(len(times)) or range(len(times)))
    assert counted == [len(truth)] and np.array_equal(everything, truth)
    for T in (1, 1, 1, 1, 3, 3, 3, 3):
        picks = rng.integers(0, len(truth), T).tolist()
        assert np.array_equal(read_frames(path, picks), [truth[i] for i in picks]), picks
    assert np.array_equal(read_frames(path, [len(truth) - 1, 0]), [truth[-1], truth[0]])

@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """media(name) -> path of that clip, made on first use."""
    folder = tmp_path_factory.mktemp("clips")
    return lambda name: folder / name if (folder / name).exists() else encode(folder / name, *CLIPS[name])

@pytest.mark.parametrize("n, T, expected", [(1, 3, [0, 0, 0]), (2, 3, [0, 1, 1]), (3, 3, [0, 1, 2]), (4, 3, [0, 2, 3]),
                                            (9, 3, [1, 4, 7]), (10, 1, [5]), (2, 5, [0, 0, 1, 1, 1])])
def test_frame_indices_eval(n, T, expected):
    """Evaluation takes the middle of each of T equal segments."""
    assert frame_indices(n, T, "eval") == expected

class Highest:
    """A generator whose draws are the float below 1, which added to an integer rounds up."""
    random = staticmethod(lambda T: np.full(T, np.nextafter(1, 0)))

@pytest.mark.parametrize("n, T", [(1, 3), (2, 3), (3, 3), (10, 3), (100, 8)])
def test_frame_indices_train(n, T):
    """Training stays in its segments, is sorted, and in the long run takes every frame, the last one too."""
    draws = np.array([frame_indices(n, T, "train", np.random.default_rng(seed)) for seed in range(1500)])
    segment = np.arange(T)
    assert (draws >= segment * n // T).all() and (draws < -(-(segment + 1) * n // T)).all()
    assert (np.diff(draws) >= 0).all() and set(draws.flat) == set(range(n))
    assert frame_indices(n, T, "train", Highest())[-1] == n - 1

@pytest.mark.parametrize("n, T, mode", [(0, 3, "eval"), (5, 0, "eval"), (5, 3, "test")])
def test_frame_indices_refuses(n, T, mode):
    """No frames, T = 0 and an unknown mode are errors."""
    with pytest.raises(ValueError):
        frame_indices(n, T, mode)

@pytest.mark.parametrize("name", CLIPS)
def test_exact(media, name):
    """Frames of every container and codec are those of decoding everything, at the same numbers."""
    check_exact(media(name))

class Counted:
    """A decoder that counts the packets it is fed and the frames it gives."""

    def __init__(self, codec):
        vars(self).update(codec=codec, fed=0, given=0)

    def __getattr__(self, name):
        return getattr(self.codec, name)

    def __setattr__(self, name, value):
        setattr(self.codec, name, value)

    def decode(self, packet):
        frames = self.codec.decode(packet)
        vars(self).update(fed=self.fed + 1, given=self.given + len(frames))
        return frames

@pytest.mark.parametrize("name, wanted, fed, given", [("h264_b.mp4", {2, 14}, 22, 20), ("h264_b.mp4", {2, 50}, 22, 20),
                                                      ("open_gop.ts", {30}, 16, 14), ("h264_long.mkv", {50}, 60, 40),
                                                      ("mpeg4.mp4", {1}, 3, 2), ("mpeg4_b.avi", {40}, 14, 8)])
def test_sparse(media, name, wanted, fed, given):
    """A few frames take few packets, and few of the pictures in them, not the clip."""
    clip = data._Clip(media(name))
    clip.codec = Counted(clip.codec)
    assert clip._sparse(wanted, lambda frame: 1).keys() == wanted
    assert clip.codec.fed <= fed and clip.codec.given <= given, (clip.codec.fed, clip.codec.given)

@pytest.mark.parametrize("name", ["h264_b.mp4", "mpeg4_b.avi", "loop.gif"])
def test_exact_beyond_the_memory_budget(media, name, monkeypatch):
    """A file whose packets do not fit the budget gives the same frames."""
    monkeypatch.setattr(data, "PACKET_BYTES", 1000)
    check_exact(media(name))
    assert not data._Clip(media(name)).packets

def test_real_clips():
    """Real files with rotation, B-frames, packed B-frames, no frame counts: the same frames as decoding everything."""
    folder = SHARED / "reference/videos"
    if not folder.is_dir():
        pytest.skip("the optional folder ../shared is not there")
    for name in ("mm_demo.mp4", "mm_test.avi", "newton.gif", "pancake.mkv", "realshort.mp4", "tc_nasa_13013.mp4"):
        path, rng = folder / name, np.random.default_rng(0)
        truth = decode_all(path)
        picks = rng.integers(0, len(truth), 5).tolist()
        assert np.array_equal(read_frames(path, picks), [truth[i] for i in picks]), name
        assert len(data._Clip(path).times) == len(truth), name

def test_times(tmp_path):
    """pick gets the seconds of every frame from the first, also when the rate varies."""
    path, seen = encode(tmp_path / "vfr.mp4", "libx264", {"bf": "2"}, "yuv420p", n=10, at=lambda i: 5 + i * i), []
    read_frames(path, lambda times: seen.append(times) or [0])
    assert seen[0].dtype == np.float64 and np.allclose(seen[0], np.arange(10) ** 2 / 24, atol=1e-4)

def test_scaled(tmp_path):
    """size=R is the square at `place` of side min(w, h) / zoom, scaled; flip mirrors it; colours keep their level."""
    path = encode(tmp_path / "one.png", "png", {}, "rgb24", n=1)
    full = torch.from_numpy(picture(0)).permute(2, 0, 1)[None].float()
    for place, x, y in (((0.5, 0.5), 20, 4), ((0, 0), 0, 0), ((1, 1), 40, 8), ((1, 0), 40, 0)):
        square = full[:, :, y:y + 40, x:x + 40]
        expected = torch.nn.functional.interpolate(square, size=(32, 32), mode="bilinear", antialias=True)
        got = read_frames(path, [0, 0], 32, place)
        assert got.shape == (2, 3, 32, 32) and got.dtype == torch.uint8 and got.is_contiguous()
        assert (got - expected).abs().mean() < 0.6
        assert torch.equal(read_frames(path, [0, 0], 32, place, flip=True), got.flip(3))
    path = encode(tmp_path / "lossless.mp4", "libx264", {"qp": "0"}, "yuv420p", n=2)
    assert (read_frames(path, [1], 48, zoom=1.0).float().mean() - picture(1)[:, 16:64].mean()).abs() < 0.6
    with pytest.raises(ValueError):
        read_frames(path, [0], 32, (0.5, 1.5))

def test_scaled_is_independent_of_history_and_threads(media):
    """The kept filter graphs leak nothing from one clip, place or thread to another."""
    names, places = ("h264_b.mp4", "mpeg4.mp4", "hevc.mp4"), ((0, 1), (1, 0))
    jobs = [(media(name), [3, 40] * 9, 224, place) for name in names for place in places] * 3
    alone = []
    for job in jobs:
        data._scaler.cache_clear()
        alone.append(read_frames(*job))
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda job: read_frames(*job), jobs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))

def test_rotation(media, tmp_path):
    """A display matrix turns and mirrors the frames, and place is a place of the upright picture."""
    source = media("h264_b.mp4").read_bytes()
    plain, path = decode_all(media("h264_b.mp4"))[5], tmp_path / "rotated.mp4"
    at = source.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), source.index(b"tkhd"))
    turned = lambda quarters: np.rot90(plain, quarters, (1, 2))
    for (a, b, c, d), upright in (((0, 1, -1, 0), turned(-1)), ((-1, 0, 0, -1), turned(2)), ((0, -1, 1, 0), turned(1)),
                                  ((-1, 0, 0, 1), plain[:, :, ::-1])):
        path.write_bytes(source)
        patched(path, at, ">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        assert np.array_equal(read_frames(path, [5])[0], upright)
        x = 10 if upright.shape[2] == 80 else 0                      # 0.3 of what is left, rounded to even as stored
        got = read_frames(path, [5], 48, (0.3, 0), 1.0)[0].numpy()
        assert np.abs(got - upright[:, :48, x:x + 48].astype(int)).mean() < 3

def test_frames_are_let_go(media):
    """A converted frame is freed at once: a circle of references would keep all of a clip's, 3 MB each at 1080p."""
    with av.open(str(media("mpeg4.mp4"))) as container:
        frame = next(container.decode(video=0))
    before = sys.getrefcount(frame)
    data._to_rgb(frame, 32, (0.5, 0.5), 1.2)
    assert sys.getrefcount(frame) == before

def test_pictures_and_folders(tmp_path):
    """Single pictures are clips of one frame; a folder is a clip in the order of names that opens picked files only."""
    for i in range(5):
        encode(tmp_path / f"{i}.jpg", "mjpeg", {}, "yuvj420p", n=1, w=40 + 8 * i)
    (tmp_path / "3.jpg").write_text("not a picture")
    (tmp_path / "notes.txt").write_text("not a frame")
    seen = []
    clip = read_frames(tmp_path, lambda times: seen.append(times.tolist()) or [4, 1, 1], 16)
    assert seen == [[0, 1, 2, 3, 4]] and torch.equal(clip[1], read_frames(tmp_path / "1.jpg", [0], 16)[0])
    assert np.array_equal(read_frames(tmp_path / "0.jpg", [0, 0]), decode_all(tmp_path / "0.jpg") * 2)
    with pytest.raises(VideoError, match="3.jpg"):
        read_frames(tmp_path, [3])
    with pytest.raises(VideoError, match="size"):
        read_frames(tmp_path, [0, 1])
    alpha = encode(tmp_path / "alpha.png", "png", {}, "rgba", n=1)
    assert np.array_equal(read_frames(alpha, [0])[0], picture(0).transpose(2, 0, 1))

def test_encoded_pictures_come_back(tmp_path):
    """Through a PNG to the bit, through a JPEG nearly, at odd sizes too."""
    picture = np.fromfunction(lambda y, x, c: (3 * x + 2 * y + 40 * c) % 256, (37, 51, 3)).astype(np.uint8)
    for suffix, most in ((".png", 0), (".jpg", 6)):
        (tmp_path / f"a{suffix}").write_bytes(encode_picture(picture, suffix))
        again = read_frames(tmp_path / f"a{suffix}", [0])[0].permute(1, 2, 0).numpy()
        assert np.abs(again.astype(int) - picture).mean() <= most

def test_lies_of_containers(media, tmp_path):
    """Wrong counts, cut starts, edit lists, swapped or repeated times, a single frame, dropped XviD pictures, changing
    sizes: still what decoding gives."""
    path = tmp_path / "count.avi"
    path.write_bytes(media("mpeg4_b.avi").read_bytes())
    patched(path, path.read_bytes().index(b"avih") + 24, "<I", 999)
    patched(path, path.read_bytes().index(b"strh") + 40, "<I", 999)
    check_exact(path)
    check_exact(remux(media("h264_b.mp4"), tmp_path / "cut.mkv", lambda packets: packets[5:]))
    from_a_key = lambda packets: packets[[j for j, p in enumerate(packets) if p.is_keyframe][2]:]
    check_exact(remux(media("open_gop.ts"), tmp_path / "cut_open_gop.ts", from_a_key))

    def all_keys(packets):
        for packet in packets:
            packet.is_keyframe = True
        return packets
    check_exact(remux(media("mpeg4.mp4"), tmp_path / "keys.mp4", all_keys))
    check_exact(remux(media("hevc.mp4"), tmp_path / "hevc_keys.mp4", all_keys))

    def swap(packets):
        for packet in packets:
            packet.dts -= 100                                        # a muxer wants pts >= dts
        packets[20].pts, packets[21].pts = packets[21].pts, packets[20].pts
        return packets
    check_exact(remux(media("vp9.webm"), tmp_path / "swapped.webm", swap))

    def repeat(packets):
        for j, packet in enumerate(packets):
            packet.dts -= 100
            packet.pts = packets[j - 1].pts if j in (20, 21, 40) else packet.pts
        return packets
    check_exact(remux(media("vp9.webm"), tmp_path / "repeated.webm", repeat))
    for name in ("mpeg4.avi", "h264_b.mp4", "vp9.webm", "open_gop.ts", "loop.gif"):
        check_exact(encode(tmp_path / f"single_{name}", *CLIPS[name], n=1))
    path = tmp_path / "edit.mp4"
    path.write_bytes(media("h264_b.mp4").read_bytes())
    at = path.read_bytes().index(b"elst") + 16                       # past version, count, duration: the first time
    patched(path, at, ">i", struct.unpack_from(">i", path.read_bytes(), at)[0] + 20 * 512)
    assert len(decode_all(path)) == N - 20
    check_exact(path)

    def drop(payload):                                               # vop_coded = 0 after type, time and marker bits
        return payload[:4] + bytes([0b01010000 | payload[4] & 0x0F, payload[5] & 0b10000000 | 0b01011111, 0x7F])
    path = remux(media("mpeg4.mp4"), tmp_path / "dropped.avi", partial(spoil, change=dict.fromkeys((7, 20, 50), drop)))
    assert len(decode_all(path)) < N
    check_exact(path)
    path = tmp_path / "sizes.ts"
    parts = [encode(tmp_path / f"{w}.ts", "libx264", {"g": "12"}, "yuv420p", n=20, w=w).read_bytes() for w in (80, 96)]
    path.write_bytes(parts[0] + parts[1])
    assert read_frames(path, [2, 30], 32).shape == (2, 3, 32, 32)
    with pytest.raises(VideoError, match="size"):
        read_frames(path, [2, 30])

@pytest.mark.parametrize("name", ["packed.avi", "packed.mkv"])
def test_packed_b_frames(tmp_path, name):
    """XviD's way: a reference and its first B-frame in one packet, one B-frame late from then on, an empty packet.
    Where it is not announced FFmpeg loses pictures, and so do we."""
    def pack(packets, announced=True):
        payloads = [bytes(p) for p in packets]
        late = [data[data.index(b"\0\0\1\xb6") + 4] >> 6 == 2 for data in payloads] + [False]
        empty = b"\0\0\1\xb6" + bytes([0b01010000, 0b01011111, 0x7F])
        change = {j: (b"" if late[j] else payloads[j]) + (payloads[j + 1] if late[j + 1] else empty)
                  for j in range(len(payloads)) if late[j] or late[j + 1]}
        change[0] = announced * b"\0\0\1\xb2DivX503b1393p" + change.get(0, payloads[0])
        return spoil(packets, {j: lambda _, new=new: new for j, new in change.items()})
    plain = encode(tmp_path / f"plain_{name}", "mpeg4", {"bf": "2", "g": "12"}, "yuv420p")
    path, truth = remux(plain, tmp_path / name, pack), decode_all(plain)
    assert np.array_equal(decode_all(path), truth)
    see = partial(data._to_rgb, size=None, place=None, zoom=None)
    for i in range(N):
        clip = data._Clip(path)
        clip.codec = Counted(clip.codec)
        assert np.array_equal(clip._sparse({i}, see)[i], truth[i])
    assert clip.codec.given < 45                                     # pictures decoded; the clip has 60
    path = remux(plain, tmp_path / f"silent_{name}", partial(pack, announced=False))
    assert len(decode_all(path)) < N
    check_exact(path)

@pytest.mark.parametrize("name, keep", [("h264_b.mp4", 0), ("h264_b.mp4", 6), ("h264_long.mkv", 6), ("mpeg4.mp4", 6)])
def test_damaged_packets(media, tmp_path, name, keep):
    """Packets of garbage: frames that FFmpeg gives up are refused, all others are those of decoding the file whole."""
    garbage = lambda payload: payload[:keep] + bytes(range(1, 60))
    path = remux(media(name), tmp_path / name, partial(spoil, change={15: garbage, 16: garbage}))
    truth = {}
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        codec.thread_count = 1
        for packet in container.demux(video=0):
            try:
                truth |= {f.pts: f.to_ndarray(format="rgb24").transpose(2, 0, 1) for f in codec.decode(packet)}
            except av.error.FFmpegError:
                pass
    clip, refused = data._Clip(path), 0
    stamps = [clip.pts[j] for j in clip.order]
    for i in range(N):
        try:
            assert np.array_equal(read_frames(path, [i])[0], truth[stamps[i]]), i
        except VideoError:
            refused += 1
    assert refused == 2 and len(truth) == N - 2

def test_concealed_damage(media, tmp_path):
    """Where FFmpeg conceals damage without a word, skipping pictures would change what it makes up: it must not."""
    half = lambda payload: payload[:len(payload) // 2].ljust(len(payload), b"U")
    path = remux(media("h264_b.mp4"), tmp_path / "spoilt.mp4", partial(spoil, change=dict.fromkeys((14, 20, 40), half)))
    truth = decode_all(path)
    assert len(truth) == N and all(np.array_equal(read_frames(path, [i])[0], truth[i]) for i in range(N))

@pytest.mark.parametrize("name", ["h264_long.mkv", "mpeg4.avi", "mpeg4_b.avi", "loop.gif", "open_gop.ts", "vp9.webm",
                                  "h264_b.mp4"])
def test_truncated(media, tmp_path, name):
    """A file cut in the middle gives its first frames exactly, or (mp4: the index is at the end) one VideoError."""
    path = tmp_path / name
    path.write_bytes(media(name).read_bytes()[:media(name).stat().st_size * 8 // 10])
    if name.endswith("mp4"):
        with pytest.raises(VideoError):
            read_frames(path, [0])
    else:
        truth, n = decode_all(media(name)), len(data._Clip(path).times)
        last = n - 1 if name == "mpeg4.avi" else 7
        assert np.array_equal(read_frames(path, [2, last]), [truth[2], truth[last]]) and 7 < n < N

def png_of(w, h):
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    pixels = zlib.compress(bytes(h * (w + 1)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")

HOSTILE = {
    "empty.mp4": b"", "text.mp4": b"hello\n" * 99, "text.jpg": b"hello\n" * 99, "text.txt": b"hello\n" * 99,
    "zeros.avi": bytes(5000),
    "list.mp4": b"ffconcat version 1.0\nfile 'good.mp4'\n",
    "playlist.mp4": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n",
    "bomb.png": png_of(11000, 10000), "bomb.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b";",
}

@pytest.mark.parametrize("name", [*HOSTILE, "sound.mp4", "cover.mp4", "missing.mp4", "http://127.0.0.1:1/a.mp4",
                                  "concat:a|b", "folder"])
def test_hostile(media, tmp_path, name):
    """Files that hold no frames give exactly one VideoError of one line that names them, at once."""
    path = tmp_path / name if ":" not in name else name
    (tmp_path / "good.mp4").write_bytes(media("h264_b.mp4").read_bytes())
    if name in HOSTILE:
        path.write_bytes(HOSTILE[name])
    elif name in ("sound.mp4", "cover.mp4"):
        with av.open(str(path), "w") as out:
            stream = out.add_stream("aac", rate=44100)
            if name == "cover.mp4":
                cover = out.add_stream("png", rate=1)
                cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
                cover.disposition = av.stream.Disposition.attached_pic
                out.mux(cover.encode(av.VideoFrame.from_ndarray(picture(0, 16, 16), format="rgb24")))
            sound = av.AudioFrame.from_ndarray(np.zeros((2, 4608), np.float32), format="fltp", layout="stereo")
            sound.sample_rate = 44100
            out.mux(stream.encode(sound))
            out.mux(stream.encode())
    elif name == "folder":
        path.mkdir()
    start = time.perf_counter()
    with pytest.raises(VideoError) as error:
        read_frames(path, lambda times: frame_indices(len(times), 3, "eval"), 32)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and time.perf_counter() - start < 5

def test_odd_names(media, tmp_path, monkeypatch):
    """A name is only a name, with a colon or a pattern in it too; a pipe is refused, not waited for."""
    monkeypatch.chdir(tmp_path)
    encode("1.jpg", "mjpeg", {}, "yuvj420p", n=1), encode("other.jpg", "mjpeg", {}, "yuvj420p", n=1, w=96)
    for name, source in (("concat:a.mp4", media("h264_b.mp4")), ("%d.jpg", Path("other.jpg"))):
        (tmp_path / name).write_bytes(source.read_bytes())
        assert torch.equal(read_frames(name, [0]), read_frames(source, [0]))
    os.mkfifo("pipe.mp4")
    reader = threading.Thread(target=lambda: pytest.raises(VideoError, read_frames, "pipe.mp4", [0]), daemon=True)
    reader.start()
    reader.join(5)
    assert not reader.is_alive()

def test_bombs_are_not_decoded_by_opening(tmp_path):
    """FFmpeg decodes a picture to learn what it is; the limit must hold there too."""
    (tmp_path / "bomb.png").write_bytes(HOSTILE["bomb.png"])
    with av.open(str(tmp_path / "bomb.png"), options=data.OPEN) as container:
        assert container.streams.video[0].codec_context.pix_fmt is None

def test_picks_out_of_range(media):
    """A frame that is not there is an error, as is no frame at all."""
    for picks in ([N], [-1], []):
        with pytest.raises(VideoError, match="0 to 59"):
            read_frames(media("h264_b.mp4"), picks)

# ---- data: readers --------------------------------------------------------------------------------------------------

REAL = SHARED / "reference/annotations"

def write(root, files):
    """Write {name: text, bytes, or rows} below root: a list as a JSON array or JSON lines, a dict as JSON."""
    for name, content in files.items():
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if name.endswith(".jsonl") and isinstance(content, list):
            content = "\n".join(map(json.dumps, content))
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        with open(path, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
    return str(root)

def read(name, root, split):
    return BENCHMARKS[name].read(str(root), split)

# ---- data: readers, question answering ------------------------------------------------------------------------------

ACTION = ("gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey\r\n"
          'tumblr_a_250\tWhat does it do ?\tnod\t"say ""hi"""\tjump\trun\tsit\t4\tACTION4\t26\r\n')

def test_tgif_action_csv_and_jsonl(tmp_path):
    """Tabs, CRLF, doubled quotes and a BOM; vid_id is the question's id; ClipBERT's jsonl gives the same example."""
    row = {"gif_name": "tumblr_a_250", "question": "What does it do ?",
           "options": ["nod", 'say "hi"', "jump", "run", "sit"], "answer": 4}
    write(tmp_path / "csv", {"Train_action_question.csv": b"\xef\xbb\xbf" + ACTION.encode()})
    write(tmp_path / "jsonl", {"action_train.jsonl": [row]})
    expected = Example("ACTION4", "gifs/tumblr_a_250", "What does it do ?", 4, tuple(row["options"]), kind="what does")
    assert read("tgif-action", tmp_path / "csv", "train") == [expected]
    assert read("tgif-action", tmp_path / "jsonl", "train") == [replace(expected, id="1")]

def test_tgif_frame_types(tmp_path):
    """FrameQA's type is a number in the csv and a word in the jsonl."""
    rows = "".join(f"g\twhere is it ?\tbeach\t{n}\tFRAMEQA{n}\t7\tx\r\n" for n in range(4))
    row = {"gif_name": "g", "question": "where is it ?", "answer": "beach", "answer_type": "location"}
    head = "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription\r\n"
    write(tmp_path, {"Test_frameqa_question.csv": head + rows, "frameqa_train.jsonl": [row]})
    test, train = read("tgif-frame", tmp_path, "test"), read("tgif-frame", tmp_path, "train")
    assert [e.kind for e in test] == ["object", "number", "color", "location"]
    assert train == [replace(test[3], id="1")] and (test[3].id, test[3].answer) == ("FRAMEQA3", "beach")

def test_msrvtt_qa_number_or_name(tmp_path):
    """The official json numbers its videos, ClipBERT's jsonl names them; a single-line array is read whole."""
    row = {"answer": "coversation", "id": 8582, "question": "what is a family having?", "video_id": 6513}
    clipbert = {"answer": "couch", "question": "who?", "video_id": "video6513", "answer_type": "who"}
    write(tmp_path, {"val_qa.json": [row, row | {"id": 8583}], "msrvtt_qa_train.jsonl": [clipbert]})
    a, b = read("msrvtt-qa", tmp_path, "val")
    assert a == Example("8582", "videos/all/video6513", "what is a family having?", "coversation", kind="what is")
    assert b.id == "8583" and read("msrvtt-qa", tmp_path, "train")[0].media == a.media

def test_msvd_qa_mapping(tmp_path):
    """Video 2 is a YouTube id that begins with "-" and holds "_"; where the clip is on disk as vid2, that is it."""
    write(tmp_path, {"youtube_mapping.txt": "-4wsuPCjDBc_5_15 vid1\n-7K_ZQEsJW4_205_208 vid2", "test_qa.json":
                     [{"answer": "man", "id": 0, "question": "who opens a box?", "video_id": 2}]})
    assert read("msvd-qa", tmp_path, "test")[0].media == "YouTubeClips/-7K_ZQEsJW4_205_208"
    write(tmp_path, {"YouTubeClips/vid2.avi": ""})
    assert read("msvd-qa", tmp_path, "test")[0].media == "YouTubeClips/vid2"

def tvqa_row(**more):
    return {f"a{n}": f"option {n} " for n in range(5)} | {
        "answer_idx": 4, "q": "What is held?", "qid": 7, "ts": "1.21-8.49", "vid_name": "met_s06e22_seg01_clip_02",
        "show_name": "How I Met You Mother"} | more

def test_tvqa_times_and_shows(tmp_path):
    """NaN-NaN is the whole clip, zero length is one frame, clips without a prefix are of bbt, second 0 is file 1."""
    write(tmp_path, {"tvqa_val.jsonl": [tvqa_row(), tvqa_row(ts="NaN-NaN", vid_name="s03e21_seg02_clip_08"),
                                        tvqa_row(ts="19.18-19.18"), tvqa_row(ts="0-0")]})
    a, b, c, d = read("tvqa", tmp_path, "test")
    assert a.media == "frames_hq/met_frames/met_s06e22_seg01_clip_02" and a.frames == (2, 24)
    assert (a.answer, a.options[4], a.kind) == (4, "option 4", "what is")
    assert b.media == "frames_hq/bbt_frames/s03e21_seg02_clip_08" and b.frames is None
    assert c.frames == (56, 56) and d.frames == (0, 0)

def vcr_row(**more):
    return {"objects": ["person", "car", "person"], "img_fn": "movie/a@0.jpg", "metadata_fn": "movie/a@0.json",
            "question": ["Does", [2], "drive", "?"], "answer_choices": [["No"], [[0, 2], "drive"], ["Yes"], ["Maybe"]],
            "answer_label": 1, "rationale_choices": [["The", [1], "moves"], ["a"], ["b"], ["c"]], "rationale_label": 0,
            "annot_id": "val-1", "question_orig": "Does 3 drive?"} | more

VCR_META = {"boxes": [[0, 0, 50, 100, .9], [0, 0, 200, 100, .8], [100, 50, 150, 100, .7]], "width": 200, "height": 100,
            "names": ["person", "car", "person"], "segms": []}

def test_vcr(tmp_path):
    """Tokens count objects from 0, numbers follow first mention, boxes have five numbers, QA->R has the answer."""
    folder = "vcr1images/movie"
    write(tmp_path, {"vcr1annots/val.jsonl": [vcr_row()], f"{folder}/a@0.json": VCR_META, f"{folder}/a@0.jpg": ""})
    qa, qar = read("vcr", tmp_path, "test")
    assert [(e.id, e.kind, e.answer) for e in (qa, qar)] == [("val-1/qa", "Q->A", 1), ("val-1/qar", "QA->R", 0)]
    assert qa.text == "Does person 0 drive ?" and qa.options[1] == "person 1 person 0 drive"
    assert qar.text == "Does person 0 drive ? person 1 person 0 drive" and qar.options[0] == "The car 2 moves"
    assert qa.boxes == ((.5, .5, .75, 1), (0, 0, .25, 1), (0, 0, 1, 1)) == qar.boxes
    assert find_media(tmp_path.as_posix(), qa.media).endswith("a@0.jpg")

@pytest.mark.parametrize("box, expected", [
    ([0, 0, float("nan"), 9, 1], "has not a box"), ([0, 0, 1], "has not a box"), ([-9, 0, 900, 50, 1], (0, 0, 1, .5)),
    ("link", "links may")])
def test_vcr_boxes(tmp_path, box, expected):
    """Boxes are cut at the picture's border; NaN, missing numbers and a link that leads out of the root are refused."""
    root = write(tmp_path / "data", {"val.jsonl": [vcr_row()], "vcr1images/movie/b.json": ""})
    meta = VCR_META | {"boxes": [*VCR_META["boxes"][:2], box]}
    write(tmp_path, {"outside.json" if box == "link" else "data/vcr1images/movie/a@0.json": meta})
    if box == "link":
        os.symlink(tmp_path / "outside.json", tmp_path / "data" / "vcr1images" / "movie" / "a@0.json")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            read("vcr", root, "test")
    else:
        assert read("vcr", root, "test")[0].boxes[0] == expected

# ---- data: readers, retrieval and multiple choice -------------------------------------------------------------------

def sentences(*videos):
    return {"videos": [], "sentences": [{"sen_id": n, "video_id": f"video{v}", "caption": f"{w} {v}"}
                                        for n, (v, w) in enumerate((v, w) for v in videos for w in ("see", "hear"))]}

PAIRS = "key,vid_key,video_id,sentence\nret0,msr9770,video9770,a person is connecting something\n"

@pytest.mark.parametrize("files", [
    {"MSRVTT_data.json": sentences(0, 9770, 7)},
    {"train_val_videodatainfo.json": sentences(0), "test_videodatainfo.json": sentences(9770, 7)},
    {"annotation/MSR_VTT.json": {"images": [], "annotations": [
        {"image_id": s["video_id"], "caption": s["caption"]} for s in sentences(0, 9770, 7)["sentences"]]}}])
def test_msrvtt_1k_a(tmp_path, files):
    """The test caption is the csv's; all other clips train, each once with all its captions, from all forms alike."""
    write(tmp_path, files | {"annotations/MSRVTT_JSFUSION_test.csv": PAIRS})
    test, train = read("msrvtt", tmp_path, "test"), read("msrvtt", tmp_path, "train")
    assert test == [Example("ret0", "videos/all/video9770", captions=("a person is connecting something",))]
    assert [(e.media, e.captions) for e in train] == [
        (f"videos/all/video{n}", (f"see {n}", f"hear {n}")) for n in (0, 7)]

def test_msrvtt_clipbert(tmp_path):
    """ClipBERT's jsonl carries its own lists."""
    write(tmp_path / "msrvtt_retrieval", {
        "train.jsonl": [{"caption": "a cartoon", "clip_name": "video2960", "sen_id": 0}],
        "test.jsonl": [{"caption": "a man", "clip_name": "video9770", "retrieval_key": "ret0"}]})
    assert [e.media for e in read("msrvtt", tmp_path, "train") + read("msrvtt", tmp_path, "test")] == [
        "videos/all/video2960", "videos/all/video9770"]

def test_msrvtt_mc(tmp_path):
    """Test options as published; in training the clip's caption and four of other clips, the same every time."""
    write(tmp_path, {"msrvtt_mc_test.jsonl": [{"qid": 0, "clip_name": "video9", "options": list("abcde"), "answer": 3}],
                     "MSRVTT_data.json": sentences(*range(10))})
    assert read("msrvtt-mc", tmp_path, "test") == [Example("1", "videos/all/video9", answer=3, options=tuple("abcde"))]
    train = read("msrvtt-mc", tmp_path, "train")
    assert len(train) == 18 and train == read("msrvtt-mc", tmp_path, "train") and len({e.answer for e in train}) > 1
    for e in train:
        number = e.media.removeprefix("videos/all/video")
        assert len(set(e.options)) == 5 and [o.split()[1] == number for o in e.options].index(True) == e.answer
        assert sum(o.split()[1] == number for o in e.options) == 1 and not any(o.endswith(" 9") for o in e.options)

def test_didemo_spellings(tmp_path):
    """One clip under two extensions is one paragraph in file order; a bare dot ends a name; on disk: any extension."""
    rows = [{"video": f"1@N0_9_a{end}", "description": text, "times": [], "annotation_id": n, "num_segments": 6}
            for n, (end, text) in enumerate([(".mov", "one."), (".", "two")])]
    write(tmp_path, {"val_data.json": [rows[0], rows[1] | {"video": "2@N1_8_b."}, rows[1]], "videos/1@N0_9_a.mp4": "",
                     "didemo_retrieval/test.jsonl": [{"caption": "one. two", "clip_name": "1@N0_9_a.mov"}]})
    assert [(e.id, e.media, e.captions) for e in read("didemo", tmp_path, "val")] == [
        ("1@N0_9_a", "videos/1@N0_9_a", ("one. two",)), ("2@N1_8_b", "video/2@N1_8_b", ("two",))]
    assert read("didemo", tmp_path, "test")[0].captions == ("one. two",)
    assert find_media(str(tmp_path), "videos/1@N0_9_a").endswith(".mp4")

def test_activitynet_paragraph(tmp_path):
    """Sentences lose their leading blanks and are joined; test is val_1; the released jsonl gives the same."""
    row = {"duration": 55.15, "timestamps": [[0, 1]], "sentences": ["A pi\u00f1ata.", "  The coach helps."]}
    name, paragraph = "v_uqiMw7tQ1Cc", "A pi\u00f1ata. The coach helps."
    write(tmp_path, {"val_1.json": {name: row}, "train.jsonl": [{"clip_name": name, "caption": paragraph}]})
    expected = [Example(name, f"videos/{name}", captions=(paragraph,))]
    assert read("activitynet", tmp_path, "test") == expected == read("activitynet", tmp_path, "train")

LSMDC = "3011_BLIND_DATING_01.11.23.496-01.11.25.853\t0\t0\t0\t0"

def test_lsmdc(tmp_path):
    """The caption is the sixth column, quotes are text, clips lie in movie folders; only train groups by clip."""
    text = f'{LSMDC}\t"SOMEONE waits.\n{LSMDC}\tHe "nods"\n'
    write(tmp_path, {f"LSMDC16_{name}.csv": text for name in ("annos_training", "challenge_1000_publictect")})
    (train,), test = read("lsmdc", tmp_path, "train"), read("lsmdc", tmp_path, "test")
    assert train.media == "avi/3011_BLIND_DATING/3011_BLIND_DATING_01.11.23.496-01.11.25.853" == test[1].media
    assert train.captions == ('"SOMEONE waits.', 'He "nods"') == test[0].captions + test[1].captions

def test_lsmdc_mc_labels(tmp_path):
    """The test counts from 1; the right sentence, always first in train, is moved to places that vary and repeat."""
    rows = "".join(f"{LSMDC}\tright\tb\tc\td\te\n" for _ in range(20))
    write(tmp_path, {"LSMDC16_multiple_choice_train.csv": rows,
                     "LSMDC16_multiple_choice_test_randomized.csv": f"{LSMDC}\ta\tb\tc\td\te\t5\n"})
    assert [(e.options, e.answer) for e in read("lsmdc-mc", tmp_path, "test")] == [(tuple("abcde"), 4)]
    train = read("lsmdc-mc", tmp_path, "train")
    assert {e.options[e.answer] for e in train} == {"right"} and {e.answer for e in train} == {0, 1, 2, 3, 4}

def test_ego4d_mc(tmp_path):
    """Python literals in cells, the last of equal options, a window of 120 frames; training draws its distractors."""
    texts = "a", "#C C opens", "#C C opens", "b", "c"
    question, answers = ("uid", 30, "x", "#C C opens"), [("u", text) for text in texts]
    write(tmp_path, {"mc_val.csv": f'question,answers\n"{question}","{answers}"\n', "ego4d_train_subset.csv": "".join(
        f"uid{n}\t0\t0\t999\t0\t{100 * n}\tnarration {n}\n" for n in range(5))})
    assert read("ego4d-mc", tmp_path, "test") == [
        Example("2", "videos/uid", answer=2, options=("a", "#C C opens", "#C C opens", "b"), frames=(0, 89))]
    train = read("ego4d-mc", tmp_path, "train")
    assert train[4].frames == (340, 459) and all(len(set(e.options)) == 4 for e in train)
    assert all(e.options[e.answer] == f"narration {e.media[-1]}" for e in train)

# ---- data: readers, pre-training and action recognition -------------------------------------------------------------

def test_webvid_and_cc3m(tmp_path):
    """Captions of several lines, doubled quotes, no captions, no header; CC3M: raw quotes, files by crc32(url)."""
    write(tmp_path, {
        "results_2M_train.csv": "videoid,contentUrl,duration,page_dir,name\n"
                                '1,u,PT,01_02,"a ""b""\nc, d"\n2,u,PT,01_02,\n3,u,PT,NaN,x\n',
        "webvid_validation_success_full.tsv": '"first\nline"\t01_02/7\r\nsecond\t01_02/8\r\n',
        "Train_GCC-training.tsv": 'a "quoted\thttp://x/y.jpg\n', "cc3m_validation_success_full.tsv": "b\t00/1.jpg\n"})
    assert [(e.media, e.captions) for e in read("webvid", tmp_path, "train")] == [("videos/01_02/1", ('a "b" c, d',))]
    assert [(e.media, e.captions) for e in read("webvid", tmp_path, "test")] == [
        ("videos/01_02/7", ("first line",)), ("videos/01_02/8", ("second",))]
    assert [(e.media, e.captions) for e in read("cc3m", tmp_path, "train") + read("cc3m", tmp_path, "test")] == [
        (f"training/{zlib.crc32(b'http://x/y.jpg')}", ('a "quoted',)), ("validation/00/1", ("b",))]

def test_howto100m(tmp_path):
    """Every narration is an example, stretched to 4 s but never below 0; silent videos are passed over."""
    write(tmp_path, {"HowTo100M_v1.csv": "video_id,category_1,category_2,rank,task_id\n-t.C,a,b,1,2\nzz,a,b,1,2\n",
                     "howto100m_captions/-t.C.csv": "start,end,text\n0.4,2.4,check pic\n10,16,pick\n"})
    assert [(e.media, e.captions, e.seconds) for e in read("howto100m", tmp_path, "train")] == [
        ("videos/-t.C", ("check pic",), (0, 3.4)), ("videos/-t.C", ("pick",), (10, 16))]
    os.rename(tmp_path / "HowTo100M_v1.csv", tmp_path / "old")
    write(tmp_path, {"ht100_videos_split.csv": "Name\tx\nfood/-t.C.mp4\t1\n"})
    assert read("howto100m", tmp_path, "train")[0].media == "videos/food/-t.C"

def test_hmdb51(tmp_path):
    """Classes are alphabetical, marks 1 and 2 train and test; the released list has its labels; names have brackets."""
    name = "it's_[a]_(b)!&,_catch_0"
    classes = "catch", "sword", "sword_exercise"
    write(tmp_path / "a", {
        f"testTrainMulti_7030_splits/{c}_test_split{n}.txt": f"{c}_{name}.avi 1 \n{c}2.avi 2 \n{c}3.avi 0 \n"
        for c in reversed(classes) for n in (1, 2)} | {f"sword/sword_{name}.avi": ""})
    train = read("hmdb51", tmp_path / "a", "train")
    assert [(e.id, e.answer) for e in train] == [(f"{c}_{name}.avi", n) for n, c in enumerate(classes)]
    assert train[1].media == f"sword/sword_{name}" and find_media(str(tmp_path / "a"), train[1].media).endswith(".avi")
    assert [e.id for e in read("hmdb51", tmp_path / "a", "test")] == [f"{c}2.avi" for c in classes]
    write(tmp_path / "b", {"hmdb51_rgb_val_split_1.txt": f"/home/wjp/Data/hmdb51/{name} 47 45\n"})
    assert read("hmdb51", tmp_path / "b", "test") == [Example(name, f"hmdb51/{name}", answer=45)]

def test_k400(tmp_path):
    """Test labels count in the training file's classes; clips are named with or without times; lists have labels."""
    head = "label,youtube_id,time_start,time_end,split,is_cc\n"
    write(tmp_path / "a", {
        "kinetics-400_train.csv": head + "zumba,z,1,11,train,0\nair drumming,a-_,7,17,train,0\n",
        "kinetics-400_val.csv": head + "zumba,y,417,427,val,0\nzumba,x,0,10,val,0\n", "val/zumba/x.mp4": ""})
    assert [(e.media, e.answer) for e in read("k400", tmp_path / "a", "train")] == [
        ("train/zumba/z_000001_000011", 1), ("train/air drumming/a-__000007_000017", 0)]
    assert [(e.media, e.answer) for e in read("k400", tmp_path / "a", "test")] == [
        ("val/zumba/y_000417_000427", 1), ("val/zumba/x", 1)]
    write(tmp_path / "b", {"k400_train_tsm.list": "/data/zips/air drumming/M_1_2.zip\t1\n",
                           "kinetics_video_vallist.txt": "/Data/val_256/abseiling/0wR5jVB-WPk.mp4 0\n"})
    assert [e.answer for e in read("k400", tmp_path / "b", "train") + read("k400", tmp_path / "b", "test")] == [1, 0]

# ---- data: readers, media, splits, one's own data -------------------------------------------------------------------

def test_find_media(tmp_path):
    """By stem whatever the extension; dots, @ and brackets belong to names; new files are seen; exact names first."""
    names = ["v_1.mp4.webm", "1006_Slum_00.25.49.077-01.25.54.718.avi", "a@0.JPG", "a@0.json", "b[1]*?.gif",
             "c.mkv", "c.mp4", "r/00001.jpg"]
    root = write(tmp_path / "data", {name: "" for name in names})
    for media, found in {"v_1": names[0], names[1][:-4]: names[1], "a@0": names[2], "b[1]*?": names[4], "c": "c.mp4",
                         "c.mkv": "c.mkv", "r": "r", "c.avi": "c.mp4"}.items():
        assert find_media(root, media) == os.path.realpath(os.path.join(root, found))
    with pytest.raises(MissingMedia, match="no clip 'late'"):
        find_media(root, "late")
    write(root, {"late.mov": ""})
    assert find_media(root, "late").endswith("late.mov")
    assert find_media(os.path.join(root, "my.jsonl"), "c.mkv").endswith("c.mkv")
    with pytest.raises(MissingMedia, match="there is no .*data/c.avi"):         # of one's own the name is exact
        find_media(os.path.join(root, "my.jsonl"), "c.avi")

@pytest.mark.parametrize("media", [
    "../secret", "r/../../secret", "/etc/hostname", "", ".", "r/", "x\0y", "\ud800", "a" * 2000, "link", "dir/f"])
def test_media_stays_inside_the_root(tmp_path, media):
    """No text and no link leads out of the data root."""
    root = write(tmp_path / "data", {"r/1.jpg": ""})
    write(tmp_path, {"secret.mp4": "", "elsewhere/f.mp4": ""})
    os.symlink(tmp_path / "secret.mp4", tmp_path / "data" / "link.mp4")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "dir")
    with pytest.raises(UserError, match="below the data folder|outside the data folder|can't encode") as error:
        find_media(root, media)
    assert not isinstance(error.value, MissingMedia) and "\n" not in str(error.value)

def test_links_within_the_root_and_of_the_root(tmp_path):
    """The root itself may be a link, and links inside it may point to each other."""
    write(tmp_path / "data", {"a.mp4": ""})
    os.symlink("a.mp4", tmp_path / "data" / "b.mp4")
    os.symlink(tmp_path / "data", tmp_path / "link")
    assert find_media(str(tmp_path / "link"), "b") == os.path.realpath(tmp_path / "data" / "a.mp4")

def test_hold_out_is_by_clip_disjoint_and_stable():
    """Both parts make the whole, share no clip, and depend neither on the order nor on the process."""
    rows = [Example(str(n), f"videos/v{n // 3}") for n in range(300)]
    val, train = hold_out(rows, "val"), hold_out(rows, "train")
    assert len(val) == 15 and sorted(val + train, key=lambda e: int(e.id)) == rows
    assert not {e.media for e in val} & {e.media for e in train}
    shuffled = random.Random(1).sample(rows, len(rows))
    assert {e.id for e in hold_out(shuffled, "val")} == {e.id for e in val}
    assert sorted({e.media for e in val}) == ["videos/v19", "videos/v44", "videos/v50", "videos/v54", "videos/v58"]
    with pytest.raises(UserError, match="cannot be split"):
        hold_out(rows[:3], "val")

def test_load_split(tmp_path):
    """Without a val of the owners', train and val are slices of train; a held-out retrieval clip keeps one caption."""
    write(tmp_path, {"MSRVTT_data.json": sentences(*range(40)), "MSRVTT_JSFUSION_test.csv": PAIRS,
                     "val_qa.json": [{"answer": "a", "id": 1, "question": "who?", "video_id": 1}], "test_qa.json": []})
    train, val, test = (load_split("msrvtt", str(tmp_path), split) for split in ("train", "val", "test"))
    assert [len(x) for x in (train, val, test)] == [38, 2, 1] and {len(e.captions) for e in train} == {2}
    assert {len(e.captions) for e in val} == {1} and len(load_split("msrvtt-qa", str(tmp_path), "val")) == 1
    for name, split, message in [
            ("no", "train", "no benchmark"), ("msrvtt", "dev", "no split 'dev'"), ("msrvtt-qa", "test", "no rows")]:
        with pytest.raises(UserError, match=message):
            load_split(name, str(tmp_path), split)

def test_own_jsonl(tmp_path):
    """Questions, options, captions, ids and splits; val held out of train unless marked; the wrong task is refused."""
    rows = [{"video": f"./clips/v{n}.mp4", "question": "What is it?", "answer": "cat"} for n in range(10)]
    mc = {"video": "a", "question": "q", "options": ["x", "y"], "answer": 1}
    root = write(tmp_path, {"qa.jsonl": rows + [rows[0] | {"split": "test", "id": "mine"}], "clips/v0.mp4": "",
                            "mc.jsonl": [mc, mc | {"split": "val"}],
                            "text.jsonl": [{"video": f"v{n // 2}", "caption": f"c{n}"} for n in range(8)]})
    qa, mc, text = (os.path.join(root, name) for name in ("qa.jsonl", "mc.jsonl", "text.jsonl"))
    expected = [Example("mine", "clips/v0.mp4", "What is it?", "cat", kind="what is")]
    assert load_split("msrvtt-qa", qa, "test") == expected
    assert [len(load_split("msrvtt-qa", qa, split)) for split in ("train", "val")] == [9, 1]
    assert len(read_jsonl_file(qa)) == 11
    assert find_media(qa, "clips/v0.mp4") == os.path.realpath(os.path.join(root, "clips/v0.mp4"))
    assert [(e.id, e.options, e.answer) for e in load_split("tvqa", mc, "val")] == [("2", ("x", "y"), 1)]
    assert {e.captions for e in load_split("didemo", text, "train")} <= {(f"c{n}", f"c{n + 1}") for n in (0, 2, 4, 6)}
    for name, path, split, message in [
            ("tvqa", qa, "train", "is for vqa, not choice"), ("tvqa", mc, "test", 'mark some with "split"')]:
        with pytest.raises(UserError, match=message):
            load_split(name, path, split)

# ---- data: readers, hostile files -----------------------------------------------------------------------------------

QA, BIG, DEEP = {"answer": "a", "id": 1, "question": "who?", "video_id": "video1"}, "x" * 10**7, "[" * 10**5
HEAD, LSMDC_MC = "question,answers\n", "LSMDC16_multiple_choice_test_randomized.csv"
TGIF = "tgif-action", "train", "Train_action_question.csv"

@pytest.mark.parametrize("name, split, file, content, message", [
    ("msrvtt-qa", "train", "msrvtt_qa_train.jsonl", json.dumps(QA).encode() + b"\n\xff\n", "row 2: 'utf-8' codec"),
    ("msrvtt-qa", "train", "msrvtt_qa_train.jsonl", json.dumps(QA) + "\n\n{", "row 3: Expecting"),
    ("msrvtt-qa", "train", "msrvtt_qa_train.jsonl", [QA, []], "row 2: list indices"),
    ("msrvtt-qa", "train", "msrvtt_qa_train.jsonl", "null", "row 1: "),
    ("msrvtt-qa", "train", "msrvtt_qa_train.jsonl", DEEP, "row 1: nested too deeply"),
    ("msrvtt-qa", "train", "train_qa.json", DEEP, "nested too deeply"),
    ("msrvtt-qa", "train", "train_qa.json", b"[\xff]", "train_qa.json: 'utf-8' codec"),
    ("msrvtt-qa", "train", "train_qa.json", "7", "train_qa.json: "),
    ("msrvtt-qa", "train", "train_qa.json", [QA, QA | {"video_id": "../../etc/x"}], "row 2: '../../etc/x' is no path"),
    ("msrvtt-qa", "train", "train_qa.json", [QA | {"video_id": "/etc/passwd"}], "row 1: '/etc/passwd' is no path"),
    ("msrvtt-qa", "train", "train_qa.json", [QA | {"video_id": ""}], "row 1: '' is no path"),
    ("msrvtt-qa", "train", "train_qa.json", [QA | {"answer": ["a", "b"]}], "row 1: .* is no text"),
    ("msrvtt-qa", "train", "train_qa.json", [QA | {"question": BIG}], "row 1: 'xxx.* is no text of 1 to"),
    ("msrvtt-qa", "train", "train_qa.json", [QA | {"question": "\ud800"}], "row 1: 'utf-8' codec can't encode"),
    ("msrvtt-qa", "train", "train_qa.json", [{"id": 1}], "row 1: missing 'video_id'"),
    ("msvd-qa", "train", "train_qa.json", [QA | {"video_id": 7}], "row 1: missing 'vid7'"),
    (*TGIF, ACTION + "g\tq\ta\r\n", "row 3: 3 columns where the header has 10"),
    (*TGIF, ACTION.replace("\t4\t", "\t5\t"), "row 2: '5' is no number from 0 to 4"),
    (*TGIF, ACTION.replace("jump", " "), "row 2: ' ' is no text"),
    (*TGIF, ACTION.replace("jump", BIG), "row 2: field larger than"),
    (*TGIF, ACTION.replace("jump", '"jump'), "row 2: "),
    ("tvqa", "train", "tvqa_train.jsonl", [tvqa_row(), tvqa_row(ts="NaN-3")], "row 2: nan to 3.0 is no span"),
    ("tvqa", "train", "tvqa_train.jsonl", [tvqa_row(ts="9-3")], "row 1: 9.0 to 3.0 is no span"),
    ("tvqa", "train", "tvqa_train.jsonl", [tvqa_row(ts="9-inf")], "row 1: 9.0 to inf is no span"),
    ("tvqa", "train", "tvqa_train.jsonl", [tvqa_row(ts="1-1e308")], "row 1: "),
    ("tvqa", "train", "tvqa_train.jsonl", [tvqa_row(answer_idx=True)], "row 1: True is no number"),
    ("tvqa", "train", "tvqa_train.jsonl", [tvqa_row(vid_name="lost_s01")], "row 1: 'lost_s01' is of no known show"),
    ("vcr", "train", "train.jsonl", [vcr_row(question=[[3]])], "row 1: 3 is no number from 0 to 2"),
    ("vcr", "train", "train.jsonl", [vcr_row(question=[[-1]])], "row 1: -1 is no number from 0 to 2"),
    ("vcr", "train", "train.jsonl", [vcr_row(answer_choices=[["a"]] * 3, answer_label=0)], "row 1: .* is no list of 4"),
    ("vcr", "train", "train.jsonl", [vcr_row(metadata_fn="../../x.json")], "row 1: '../../x.json' is no path"),
    ("vcr", "train", "train.jsonl", [vcr_row(metadata_fn="none.json")], "row 1: .*No such file"),
    ("vcr", "train", "train.jsonl", [vcr_row(objects=["person"] * 4)], "row 1: .*has not a box"),
    ("didemo", "val", "val_data.json", [{"video": "../a.mov", "description": "d"}], "row 1: '../a.mov' is no path"),
    ("activitynet", "train", "train.json", {"v_a": {"sentences": []}}, "row 1: '' is no text"),
    ("lsmdc", "test", "LSMDC16_challenge_1000_publictect.csv", LSMDC + "\tx\n" + LSMDC, "row 2: not enough values"),
    ("lsmdc-mc", "test", LSMDC_MC, LSMDC + "\ta\tb\tc\td\te\t0", "row 1: '0' is no number from 1 to 5"),
    ("lsmdc-mc", "test", LSMDC_MC, LSMDC + "\ta\tb\tc\td\te", "row 1: 'e' is no number from 1 to 5"),
    ("ego4d-mc", "test", "mc_val.csv", HEAD + f'"{DEEP[:9999]}",x', "row 2: "),
    ("ego4d-mc", "test", "mc_val.csv", HEAD + f'"{"-" * 9999}1",x', "row 2: "),
    ("ego4d-mc", "test", "mc_val.csv", HEAD + f"\"('u', 1, '{BIG[:99999]}')\",x", "row 2: unterminated"),
    ("ego4d-mc", "test", "mc_val.csv", HEAD + '"__import__(\'os\').getpid()",x', "row 2: malformed node"),
    ("ego4d-mc", "test", "mc_val.csv", HEAD + "\"('u', 1, 'no')\",\"['a', 'b', 'c', 'd']\"", "row 2: the right narr"),
    ("hmdb51", "test", "hmdb51_rgb_val_split_1.txt", "a 3 51\n", "row 1: '51' is no number from 0 to 50"),
    ("webvid", "test", "webvid_validation_success_full.tsv", 'ok\t1/2\n"no\t1/2\n', "row 2: unexpected end of data")])
def test_hostile_rows(tmp_path, name, split, file, content, message):
    """A bad row is one line that names the file and the row."""
    root = write(tmp_path, {"youtube_mapping.txt": "a vid1", "vcr1images/movie/a@0.json": VCR_META, file: content})
    with pytest.raises(UserError, match=message) as error:
        read(name, root, split)
    assert file in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500

@pytest.mark.parametrize("row, message", [
    ({"video": "../a", "caption": "c"}, "is no path"), ({"video": "/a", "caption": "c"}, "is no path"),
    ({"video": "a"}, "missing 'question'"), ({"video": 7, "caption": "c"}, "expected str"),
    ({"video": "a", "question": "q", "options": ["x"], "answer": 0}, "is no list of 2 options"),
    ({"video": "a", "question": "q", "options": "yes", "answer": 0}, "is no list of 3 options"),
    ({"video": "a", "question": "q", "options": ["x", "y"], "answer": 2}, "no number from 0 to 1"),
    ({"video": "a", "caption": "c", "fps": 3}, "expected an object with fields"),
    ({"video": "a", "caption": "c", "split": "dev"}, "split: train, val or test"),
    ({"video": "a", "caption": "c", "id": "1"}, "ids repeat")])
def test_hostile_own_rows(tmp_path, row, message):
    """A bad line of one's own file is named by its number."""
    path = os.path.join(write(tmp_path, {"my.jsonl": [{"video": "b", "caption": "c"}, row]}), "my.jsonl")
    with pytest.raises(UserError, match=message) as error:
        read_jsonl_file(path)
    assert "row 2" in str(error.value) or "repeat" in message

@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_annotations(tmp_path, name):
    """A missing file: the folder, the files that would do, and where they come from."""
    for split in BENCHMARKS[name].splits:
        with pytest.raises(UserError, match=r"no annotations in .*: expected \S+\.?.*; from \S+") as error:
            read(name, tmp_path, split)
        assert str(tmp_path) in str(error.value)

def test_registry():
    """The order of the table; every entry has a train split, a known task, and closed lists where they are needed."""
    order = ("tgif-action tgif-transition tgif-frame msrvtt-qa msvd-qa tvqa msrvtt didemo activitynet lsmdc "
             "msrvtt-mc lsmdc-mc ego4d-mc vcr webvid howto100m cc3m hmdb51 k400")
    assert " ".join(BENCHMARKS) == order
    for b in BENCHMARKS.values():
        assert "train" in b.splits and set(b.rows) <= set(b.splits) and b.join in ("options", "pair", "bare")
        assert b.task in ("vqa", "choice", "retrieval", "vcr", "pretrain", "action")
        assert (b.answers is not None) == (b.task in ("vqa", "action"))

# ---- data: readers, the real rows -----------------------------------------------------------------------------------

HARRY = "1054_Harry_Potter_and_the_prisoner_of_azkaban"
FILES = """tgif-action test 20 tgifqa/Test_action_question.csv: ACTION4 gifs/tumblr_nk172bbdPI1u1lr18o1_250 flap wings
tgif-action train 20 tgifqa/Train_action_question.csv: ACTION1 gifs/tumblr_nqc2mbmU2J1uxhtnwo1_400 chew food
tgif-transition test 20 tgifqa/Test_transition_question.csv: \
TRANS23 gifs/tumblr_n9y2jhq01L1rts5xfo1_250 sing passionately
tgif-frame test 20 tgifqa/Test_frameqa_question.csv: FRAMEQA1159 gifs/tumblr_no73q2fm0I1uuf348o1_250 cookie
tgif-action test 1 tgifqa/clipbert_action_test.jsonl action_test.jsonl: 1 gifs/tumblr_nk172bbdPI1u1lr18o1_250 flap wings
tgif-frame test 1 tgifqa/clipbert_frameqa_test.jsonl frameqa_test.jsonl: 1 gifs/tumblr_no73q2fm0I1uuf348o1_250 cookie
msrvtt-qa val 2 msrvtt_qa/val_qa.json: 158581 videos/all/video6513 couch
msrvtt-qa train 1 msrvtt_qa/clipbert_train.jsonl msrvtt_qa/train.jsonl: 1 videos/all/video6513 couch
msvd-qa train 20 msvd_qa/train_qa.json: 0 YouTubeClips/-4wsuPCjDBc_5_15 animal
tvqa train 1 tvqa/tvqa_train_README_sample.jsonl tvqa_train.jsonl: \
7 frames_hq/met_frames/met_s06e22_seg01_clip_02 A beer bottle (2, 24)
msrvtt test 20 msrvtt_retrieval/MSRVTT_JSFUSION_test.csv: ret0 video9770 connecting something
msrvtt train 1 msrvtt_retrieval/clipbert_train.jsonl msrvtt_retrieval/train.jsonl: \
videos/all/video2960 a cartoon animals
msrvtt test 1 msrvtt_retrieval/clipbert_test.jsonl msrvtt_retrieval/test.jsonl: \
ret0 videos/all/video9770 a person is connecting something to system
didemo val 20 didemo/val_data.json: \
35034348999@N01_6060447507_dc1a90b8ef the man in the hat briefly bends over the machine
didemo test 20 didemo/test_data.json: 26292851@N04_4253489686_265c3c8051 someone kicks the bug towards some rocks.
activitynet train 20 activitynet/train.json: v_QOlSCBRmfWY leads into her dancing. The girl dances
activitynet test 20 activitynet/val_1.json: v_uqiMw7tQ1Cc videos/v_uqiMw7tQ1Cc is given. The coach helps
vcr test 2 vcr/val.jsonl: val-1/qa @0 No , person 0 is a visitor .
webvid test 20 webvid/webvid_validation_success_full.tsv: \
videos/027701_027750/1053841541 story on top of mountains. young man
webvid test 2 webvid/webvid_validation_multiline_row.tsv webvid_validation_success_full.tsv: \
195501_195550/1007078764 rotating pandoro
howto100m train 20 howto100m/-tCQ4tCQdWE.csv howto100m_captions/nVbIUDjzWY4.csv: \
videos/nVbIUDjzWY4 check pic tonight pick 4.16
hmdb51 train 20 hmdb51/hmdb51_rgb_train_split_1.txt: hmdb51/Phillies_dad_catches_foul_ball 2
hmdb51 test 20 hmdb51/hmdb51_rgb_val_split_1.txt: \
hmdb51/St__Louis_Goalkeeping__Academy_elite_training_jump_f_nm_np1_ri_bad_12 19
k400 test 20 kinetics400/kinetics-400_val.csv: val/abseiling/0wR5jVB-WPk_000417_000427 0
k400 test 20 kinetics400/kinetics_video_vallist.txt: val/abseiling/0wR5jVB-WPk 0"""

@pytest.mark.skipif(not os.path.isdir(REAL), reason="the excerpts of the real files are not beside the project")
@pytest.mark.parametrize("line", FILES.splitlines())
def test_real_rows(tmp_path, line):
    """Every excerpt of a real file parses to all its rows, the first to what was read off it by eye."""
    line, meaning = line.split(": ")
    name, split, rows, file, *target = line.split()
    picture = f"lsmdc_{HARRY}/{HARRY}_00.01.46.736-00.01.50.168@0.json"
    copies = {f"vcr/{picture.split('/')[1]}": f"vcr1images/{picture}",
              "msvd_qa/youtube_mapping.txt": "youtube_mapping.txt",
              "msrvtt_retrieval/clipbert_test.jsonl": "msrvtt_retrieval/test.jsonl",
              "kinetics400/kinetics-400_val.csv": "kinetics-400_train.csv",
              "howto100m/HowTo100M_v1_README_rows.csv": "HowTo100M_v1.csv"}
    for source, target in [*copies.items(), (file, (target or [os.path.basename(file)])[0])]:
        os.makedirs(os.path.dirname(tmp_path / target), exist_ok=True)
        shutil.copyfile(os.path.join(REAL, source), tmp_path / target)
    examples = read(name, tmp_path, split)
    assert len(examples) == int(rows) and len({e.id for e in examples}) == len(examples)
    assert all(e.media and (e.text or e.options or e.captions or e.answer is not None) for e in examples)
    e = examples[0]
    said = f"{e.id} {e.media} {e.captions or e.options and e.options[e.answer] or e.answer} {e.frames} {e.seconds}"
    assert all(part in said for part in meaning.split())

# ---- data: words ----------------------------------------------------------------------------------------------------

VOCAB = ("[PAD] [UNK] [CLS] [SEP] [MASK] a red blue ring square mov ##es left right what is it ? options : answer "
         "person doing ##s").split()

@pytest.fixture(scope="session")
def words():
    """A WordPiece of the words of these tests; "moves" and "rings" take two tokens."""
    tokenizer = wordpiece(tokenizers.models.WordPiece({w: i for i, w in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(VOCAB[:5])
    return Words(tokenizer)

def spell(ids):
    return " ".join(VOCAB[i] for i in ids)

def test_sentences_are_cut(words):
    """[CLS], the text in lower case, [SEP]; what is too long loses its end, never [SEP]."""
    for text, L, said in (("A RED ring", 40, "a red ring"), ("a red ring", 5, "a red ring"), ("a red ring", 4, "a red"),
                          ("", 40, ""), ("moves", 3, "mov"), ("mauve", 9, "[UNK]")):
        assert spell(words.sentence(text, L)) == " ".join(["[CLS]", *said.split(), "[SEP]"])

def test_action_prompt_from_a_vocabulary_file(words, tmp_path):
    """The linear probe's prompt holds one [MASK], from a vocab.txt as from a tokenizer.json."""
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    prompt = "a person is doing [MASK]"
    assert Words.load(str(tmp_path / "vocab.txt")).ids(prompt) == words.ids(prompt)

@pytest.mark.parametrize("join, L, said", [
    ("bare", 40, "what is it ? ring"), ("bare", 5, "what is ring"), ("pair", 40, "what is it ? [SEP] ring"),
    ("pair", 5, "what [SEP] ring"), ("options", 40, "what is it ? options : ring red square answer : ring"),
    ("options", 12, "what is options : ring red square answer : ring"), ("options", 8, "ring red square answer : ring"),
    ("options", 3, "ring"), ("bare", 3, "ring"), ("pair", 3, "ring")])
def test_choices_keep_the_option(words, join, L, said):
    """All three ways to join question and options; too long: the question goes first, the option last."""
    said = " ".join(said.split()[-(L - 2):])
    first, second = words.choices("What is it?", ("ring", "red square"), join, L)
    assert spell(first) == f"[CLS] {said} [SEP]" and max(len(first), len(second)) <= L
    assert spell(second).endswith("square [SEP]")

def test_masking_takes_whole_words(words):
    """15 % of the words with all their tokens: 80 % [MASK], 10 % random, 10 % as they were; other labels are -100."""
    text, rng, done = " ".join(["moves", "rings"] * 10), np.random.default_rng(0), []
    plain = words.sentence(text, 50)
    for _ in range(400):
        ids, labels = words.masked(text, 50, rng)
        assert len(ids) == len(labels) == 42 and labels[0] == labels[-1] == -100
        hit = np.array(labels[1:-1]).reshape(20, 2) >= 0
        assert (hit.all(1) == hit.any(1)).all() and hit.all(1).sum() == 3                   # of 20 words
        assert all(i == p if y < 0 else y == p for i, y, p in zip(ids, labels, plain))
        done += [(i, y) for i, y in zip(ids, labels) if y >= 0]
    share = lambda some: sum(map(some, done)) / len(done)
    V = len(VOCAB)
    assert share(lambda d: d[0] == words.mask) == pytest.approx(0.8 + 0.1 / V, abs=0.025)
    assert share(lambda d: d[0] == d[1]) == pytest.approx(0.1 + 0.1 / V, abs=0.02)
    assert {i for i, _ in done} == set(range(V))            # any token may stand in
    ids, labels = words.masked(text, 9, rng)
    assert len(ids) == 9 and ids[-1] == words.sep and sum(y >= 0 for y in labels) in (1, 2)
    assert sum(y >= 0 for y in words.masked("red", 9, rng)[1]) == 1                         # at least one
    assert words.masked("", 9, rng) == ([words.cls, words.sep], [-100, -100])
    assert words.masked(text, 40, np.random.default_rng(7)) == words.masked(text, 40, np.random.default_rng(7))

def test_words_travel_and_load(words, tmp_path):
    """Through pickle, a tokenizer.json and a vocab.txt alike; what is no such file, or no BERT's, is one line."""
    words.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    loaded = [Words.load(str(tmp_path / name)) for name in ("tokenizer.json", "vocab.txt")]
    for same in (pickle.loads(pickle.dumps(words)), *loaded):
        assert spell(same.ids("Rings? moves")) == spell(words.ids("Rings? moves")) == "ring ##s ? mov ##es"
        assert len(same) == len(VOCAB)
    write(tmp_path, {"bad.json": "{", "short.txt": "\n".join(VOCAB[:4])})
    for name, line in (("bad.json", "bad.json: .*vocab.txt"), ("none.txt", "none.txt"), ("short.txt", "lacks .*MASK")):
        with pytest.raises(UserError, match=line) as error:
            Words.load(str(tmp_path / name))
        assert "\n" not in str(error.value)

# ---- data: examples into batches ------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """world(dataset) -> the folder of that toy dataset with few clips, made on first use."""
    root = tmp_path_factory.mktemp("toy")
    def made(dataset):
        toy.write_world(root, [dataset], share=0.03)
        return str(root / dataset)
    return made

def recipe(words, task="vqa", T=3, R=32, L=20, join="options", answers=("red", "blue"), **more):
    return Recipe(task, words, join, T, R, L, {a: i for i, a in enumerate(answers)}, **more)

CLIPS4 = [Example(str(n), f"videos/all/video{n}", "what is it?", "red") for n in range(4)]

def test_pixels_depend_on_seed_epoch_and_index_alone(world, words):
    """Not on workers, order or neighbours; another epoch or seed gives other pixels; in evaluation nothing does."""
    root, keys = world("msrvtt"), [(e, i) for e in (0, 1, None) for i in range(4)]
    made = {}
    for seed, workers, order in ((0, 0, keys), (0, 2, keys[::-1]), (1, 0, keys)):
        batches = loader(Clips(CLIPS4, root, recipe(words), seed), [[key] for key in order], workers, words.pad)
        made[seed, workers] = {key: b["frames"] for key, b in zip(order, batches)}
    a, other_workers, other_seed = made.values()
    assert all(torch.equal(a[key], other_workers[key]) for key in keys)
    assert all(torch.equal(a[key], other_seed[key]) == (key[0] is None) for key in keys)
    assert not any(torch.equal(a[0, i], a[1, i]) for i in range(4))
    path = find_media(root, CLIPS4[0].media)
    pick = lambda times: frame_indices(len(times), 3, "eval")
    assert torch.equal(a[None, 0][0], read_frames(path, pick, 32))

def test_only_training_mirrors_and_only_if_allowed(words, monkeypatch):
    """About half of the training clips are mirrored where the benchmark allows it, none elsewhere."""
    seen = []
    monkeypatch.setattr(data, "read_frames", lambda *_, flip: seen.append(flip) or torch.zeros(3, 3, 4, 4))
    monkeypatch.setattr(data, "find_media", lambda *_: "")
    for flip, epoch, low, high in ((True, 0, 10, 30), (True, None, 0, 0), (False, 0, 0, 0)):
        seen.clear()
        for seed in range(40):
            Clips(CLIPS4, "", recipe(words, flip=flip), seed)[epoch, 0]
        assert len(seen) == 40 and low <= sum(seen) <= high

SECONDS = np.arange(20) / 10

@pytest.mark.parametrize("span, T, views, expected, first, last", [
    ({}, 2, 1, [5, 15], 0, 19), ({"seconds": (0.5, 1.4)}, 2, 1, [7, 12], 5, 14),
    ({"seconds": (0.52, 0.58)}, 2, 1, [5, 5], 5, 5), ({"seconds": (5.0, 9.0)}, 2, 1, [19, 19], 19, 19),
    ({"frames": (3, 6)}, 2, 1, [4, 6], 3, 6), ({"frames": (18, 99)}, 2, 1, [18, 19], 18, 19),
    ({"frames": (50, 60)}, 2, 1, [19, 19], 19, 19), ({}, 2, 2, [2, 12, 7, 17], 0, 19),
    ({"frames": (4, 11)}, 2, 2, [5, 9, 7, 11], 4, 11)])
def test_spans_and_views(span, T, views, expected, first, last):
    """Frames come from the example's seconds or frame numbers; views take turns over evenly spaced frames."""
    example = Example("1", "v", **span)
    assert pick_frames(SECONDS, example, T, views, None) == expected
    drawn = {n for s in range(200) for n in pick_frames(SECONDS, example, T, 1, np.random.default_rng(s))}
    assert drawn == set(range(first, last + 1))

def test_views_come_as_an_axis(world, words):
    """With views V evaluation gives (V, T, ...), the views one after the other; training gives one view."""
    clips = Clips(CLIPS4, world("msrvtt"), recipe(words, T=2, views=3))
    frames = clips[None, 1]["frames"]
    assert frames.shape == (3, 2, 3, 32, 32) and clips[0, 1]["frames"].shape == (2, 3, 32, 32)
    pick = lambda times: frame_indices(len(times), 6, "eval")
    every = read_frames(find_media(clips.root, CLIPS4[1].media), pick, 32)
    assert torch.equal(frames[1], every[[1, 4]])

def test_bad_clips_are_told_not_replaced(world, words, tmp_path):
    """A missing and a broken clip come back as index and cause; their batch holds the others, as they are."""
    shutil.copytree(world("msrvtt"), tmp_path / "msrvtt")
    (tmp_path / "msrvtt/videos/all/video1.mp4").write_bytes(b"broken" * 99)
    (tmp_path / "msrvtt/videos/all/video2.mp4").unlink()
    clips = Clips(CLIPS4, str(tmp_path / "msrvtt"), recipe(words))
    assert [set(clips[0, i]) for i in (1, 2)] == [{"index", "error"}] * 2
    some, none = loader(clips, [[(0, 3), (0, 2), (0, 1), (0, 0)], [(0, 2)]], 0, words.pad)
    assert some["index"].tolist() == [3, 0] and len(some["frames"]) == len(some["words"]) == len(some["target"]) == 2
    assert torch.equal(some["frames"][1], clips[0, 0]["frames"])
    assert list(some["errors"]) == [2, 1] and "video2" in some["errors"][2] and "video1.mp4" in some["errors"][1]
    assert "frames" not in none and list(none["errors"]) == [2]

def test_texts_of_every_task(words):
    """What each task reads and what is right; in training captions are drawn, in evaluation it is the first."""
    said = lambda item: [spell(ids) for ids in item["words"]]
    def item(task, rng=None, **fields):
        return Clips([], "", recipe(words, task)).texts(Example("1", "v", **fields), rng)
    vqa = item("vqa", text="what is it?", answer="blue")
    assert said(vqa) == ["[CLS] what is it ? [SEP]"] and vqa["target"] == 1
    assert item("vqa", text="what?", answer="mauve")["target"] == -1
    action = item("action", answer=3)
    assert said(action) == ["[CLS] a person is doing [MASK] [SEP]"] and action["target"] == 3
    for task in ("choice", "vcr"):
        mc = item(task, text="what?", options=("ring", "square"), answer=1)
        assert len(mc["words"]) == 2 and mc["target"] == 1 and said(mc)[1].endswith("answer : square [SEP]")
    captions = ("red", "blue", "ring")
    assert said(item("retrieval", captions=captions)) == ["[CLS] red [SEP]"]
    drawn = {said(item("retrieval", np.random.default_rng(s), captions=captions))[0] for s in range(30)}
    assert drawn == {f"[CLS] {c} [SEP]" for c in captions}

def test_pretraining_texts(words):
    """A text that matches or, half of the time, one of another clip, never one of its own; a masked one; the plain."""
    captions = {"a": ("red ring", "a ring"), "b": ("red ring", "blue square"), "c": ("what moves left",)}
    examples = [Example(id, id, captions=some) for id, some in captions.items()]
    clips, matched = Clips(examples, "", recipe(words, "pretrain")), []
    for s in range(200):
        item = clips.texts(examples[0], np.random.default_rng(s))
        match, masked, plain = (spell(ids)[6:-6] for ids in item["words"])
        assert plain in examples[0].captions and len(item["labels"]) == len(item["words"][1])
        filled = [y if y >= 0 else i for i, y in zip(item["words"][1], item["labels"])]
        assert filled == item["words"][2] and any(y >= 0 for y in item["labels"])
        assert match == plain if item["target"] else match in ("blue square", "what mov ##es left")
        matched.append(item["target"])
    assert 70 < sum(matched) < 130
    again = [clips.texts(examples[0], None) for _ in range(2)]
    assert again[0] == again[1]

class Finite(list):
    draws = 0

    def __getitem__(self, i):
        self.draws += 1
        assert self.draws < 1000, "it draws for ever"
        return super().__getitem__(i)

def test_pretraining_without_another_caption_ends(words):
    """Where no clip has another caption, as in a held-out slice of one clip, the text matches; it does not hang."""
    example = Example("a", "a", captions=("red ring",))
    clips = Clips(Finite([example]), "", recipe(words, "pretrain"))
    assert all(clips.texts(example, np.random.default_rng(s))["target"] == 1 for s in range(8))

def micro(order, n):
    return list(itertools.islice(iter(order), n))

GROUPS = [np.arange(10), np.arange(10, 17), np.arange(17, 20)]

def test_order_is_a_pure_function():
    """Begun at any step it goes on as from the start; epochs differ, and take every index once, one group a batch."""
    order = partial(Order, GROUPS, 4, 2, 5)
    long = micro(order(), 40)
    assert order().steps_per_epoch == 4 and long == micro(order(), 40)
    for start in (1, 3, 4, 5, 9):
        assert micro(order(start=start), 10) == long[2 * start:2 * start + 10]
    steps = [a + b for a, b in zip(long[::2], long[1::2])]
    epochs = [steps[e * 4:e * 4 + 4] for e in range(5)]
    for e, batches in enumerate(epochs):
        groups = [{0 if i < 10 else 1 if i < 17 else 2 for _, i in batch} for batch in batches]
        assert {epoch for batch in batches for epoch, _ in batch} == {e}
        assert sorted(map(tuple, groups)) == [(0,), (0,), (1,), (2,)]
        taken = Counter(i for batch in batches for _, i in batch)
        assert all(n == 1 for i, n in taken.items() if i < 17) and sum(taken.values()) == 16
        assert {i for i in taken if i >= 17} == {17, 18, 19}                                # a tiny group repeats
    assert len({str([[i for _, i in batch] for batch in batches]) for batches in epochs}) == 5
    assert micro(Order(GROUPS, 4, 2, 6), 8) != long[:8]

@pytest.mark.parametrize("world_size, accum", [(1, 4), (2, 2), (4, 1), (2, 1)])
def test_order_cuts_one_batch_into_pieces(world_size, accum):
    """The n-th micro-batches of all processes are, one after another, the n-th of a single process."""
    whole = micro(Order(GROUPS, 4, 1, 5, 2), 9)
    ranks = [micro(Order(GROUPS, 4, accum, 5, 2, rank, world_size), 9 * accum) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert [key for n in range(step * accum, (step + 1) * accum) for pieces in ranks for key in pieces[n]] == batch

def test_hostile_files_in_workers(media, words, tmp_path):
    """Whatever stands where a clip should be, a worker tells it in one line, and reads the next clip."""
    for name, content in HOSTILE.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.mp4").write_bytes(media("h264_b.mp4").read_bytes())
    names = ["good.mp4", *HOSTILE, "missing.mp4", "good.mp4"]
    clips = Clips([Example(name, name, "what?", "red") for name in names], str(tmp_path), recipe(words))
    start, batches = time.perf_counter(), [[(None, i)] for i in range(len(names))]
    for i, b in enumerate(loader(clips, batches, 2, words.pad)):
        if names[i] == "good.mp4":
            assert len(b["frames"]) == 1 and not b["errors"]
        else:
            assert "frames" not in b and names[i].split(".")[0] in b["errors"][i] and "\n" not in b["errors"][i]
    assert time.perf_counter() - start < 60

def test_mixed_parts_keep_their_own(world, words):
    """Indices count through; each part decodes its own number of frames; what is bad is told by the common index."""
    parts = [Clips(CLIPS4[:n], world("msrvtt"), recipe(words, T=T)) for n, T in ((3, 2), (4, 1))]
    parts[1].examples = [*CLIPS4[:3], Example("x", "videos/all/none", "what?", "red")]
    mixed = Mixed(parts)
    assert len(mixed) == 7 and [g.tolist() for g in mixed.groups] == [[0, 1, 2], [3, 4, 5, 6]]
    for index, (part, own) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        assert mixed[0, index]["index"] == index
        assert torch.equal(mixed[0, index]["frames"], parts[part][0, own]["frames"])
    assert set(mixed[0, 6]) == {"index", "error"} and mixed[0, 6]["index"] == 6

def test_collate_pads_to_the_longest():
    """Texts are padded to the longest of the batch, options make an axis, labels -100 and hidden answers -1 beyond."""
    frames = torch.zeros(2, 3, 4, 4)
    items = [{"index": 3, "frames": frames, "words": [[5, 1, 7], [5, 6]], "target": None, "labels": [-100, 9]},
             {"index": 1, "frames": frames, "words": [[5], [8, 9]], "target": 1, "labels": [-100, 4, 4]},
             {"index": 0, "error": "gone"}]
    b = collate(items, 1)
    assert b["words"].tolist() == [[[5, 1, 7], [5, 6, 1]], [[5, 1, 1], [8, 9, 1]]]
    assert b["keep"].tolist() == [[[True] * 3, [True, True, False]], [[True, False, False], [True, True, False]]]
    assert b["labels"].tolist() == [[-100, 9, -100], [-100, 4, 4]] and b["target"].tolist() == [-1, 1]
    assert b["index"].tolist() == [3, 1] and b["errors"] == {0: "gone"}
    one = collate([{"index": 0, "frames": frames, "words": [[5, 6]], "target": 0}], 1)
    assert one["words"].tolist() == [[5, 6]] and one["keep"].tolist() == [[True, True]]

def test_boxes_are_washed_and_pictures_cropped():
    """A box has a frame of 3 px and a wash of 0.3 in a colour of its own, no more changes; crops lie where asked."""
    picture = torch.full((1, 3, 40, 80), 100, dtype=torch.uint8)
    out = tint(picture, [(0.25, 0.25, 0.5, 0.75), (0.6, 0, 1, 0.5)])[0]
    assert (picture == 100).all() and (out[:, :, :20] == 100).all() and (out[:, 30:] == 100).all()
    assert out[:, 10, 20].tolist() == out[:, 12, 22].tolist() == [255, 0, 0] == out[:, 29, 39].tolist()     # hue 0
    assert out[:, 13, 23].tolist() == [146, 70, 70] and out[:, 20, 40].tolist() == [100] * 3
    assert out[:, 1, 50].tolist() not in ([100] * 3, [255, 0, 0])
    noise = torch.randint(0, 256, (2, 3, 48, 96), dtype=torch.uint8)
    for place, x, y in (((0, 0), 0, 0), ((1, 0), 56, 0), ((0.5, 1), 28, 8)):
        assert torch.equal(crop(noise, 40, place), noise[..., y:y + 40, x:x + 40])
    assert crop(noise, 16, (0, 0)).shape == (2, 3, 16, 16)

def test_answer_list():
    """The most frequent answers first, ties in alphabetical order, no more than asked for."""
    rows = [Example("", "", answer=a) for a in "b d c c a b c".split()]
    assert answer_list(rows) == ["c", "b", "a", "d"] and answer_list(rows, 2) == ["c", "b"]

# ---- toy ------------------------------------------------------------------------------------------------------------

SHARE = 0.02
splits = lambda b: ("train", "val", *("test" for split in b.splits if split == "test"))

def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

@pytest.mark.parametrize("name", ("tgif", "activitynet", "vcr", "ego4d"))
def test_same_bytes(tmp_path, name):
    """The same seed gives the same bytes, gif, mp4, mkv, webm and jpg; another seed gives others."""
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        toy.write_world(tmp_path / folder, [name], seed, SHARE)
    a, b, c = (digest(tmp_path / folder / name) for folder in "abc")
    assert a == b and a != c and len(a) > 5

def test_interrupted(tmp_path, monkeypatch):
    """A run that stops half way leaves nothing; the next one writes the whole dataset, and does not touch it again."""
    def stop(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy, "write_order_blind", stop)
        toy.write_world(tmp_path, ["msvd"], share=SHARE)
    assert list(tmp_path.iterdir()) == []
    toy.write_world(tmp_path, ["msvd"], share=SHARE)
    before = digest(tmp_path)
    toy.write_world(tmp_path, ["msvd"], seed=1, share=SHARE)
    assert digest(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["msvd"]

def test_no_process_survives_its_parent(tmp_path):
    """kill -9 of who writes a toy world ends its helpers too."""
    code = (f"import sys; sys.path.insert(0, {os.path.dirname(toy.__file__)!r}); "
            "import toy; toy.write_world('toy', ['msvd'])")
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    children = lambda: Path(f"/proc/{writer.pid}/task/{writer.pid}/children").read_text().split()
    while not children():
        time.sleep(0.1)
    pool = children()
    time.sleep(0.5)
    writer.kill()
    writer.wait()
    for _ in range(300):
        if not any(os.path.exists(f"/proc/{pid}/exe") for pid in pool):
            return
        time.sleep(0.1)
    assert False, "still there"

@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_readable(world, benchmark):
    """Every reader reads the toy: clips of train, val and test are apart, are found and decode; answers are in range;
    all texts are whole words of the vocabulary."""
    b, root = BENCHMARKS[benchmark], world(BENCHMARKS[benchmark].dataset)
    words, seen = Words.load(f"{root}/tokenizer.json"), set()
    for split in splits(b):
        examples = load_split(benchmark, root, split)
        clips = {e.media: e for e in examples}
        assert not seen & clips.keys()
        seen |= clips.keys()
        for media, e in clips.items():
            frames = read_frames(find_media(root, media), partial(pick_frames, example=e, T=3, views=1, rng=None), 32)
            assert frames.shape == (3, 3, 32, 32) and frames.float().std() > 5
        for e in examples:
            assert not e.options or len(set(e.options)) == len(e.options) and 0 <= e.answer < len(e.options)
            for text in (e.text, *e.options, *e.captions, *[e.answer] * (b.task == "vqa")):
                tokens = words.tokenizer.encode(text).tokens
                assert not [token for token in tokens if token == "[UNK]" or token.startswith("##")], text

def test_reversed_scenes():
    """A scene and its reverse show the same pictures in opposite order, have other captions, and are equally likely."""
    kind = lambda scene: (scene.events[0], *(round(1.5 * v) % 3 for v in (scene.things[0].x, scene.things[0].y)))
    events = Counter()                                       # and where it begins, in thirds of the way around
    for number in range(4000):
        scene = toy.clip_of(0, number)[0]
        back = scene.reverse()
        events[kind(scene)] += 1
        events[kind(back)] -= 1
        assert toy.caption(back) != toy.caption(scene) == toy.caption(back.reverse())
        if number < 40:
            for when in (0, 0.29, 0.3, 0.5, 0.76, 1):
                assert np.abs(toy.render(scene, when, 40, 32) - 1.0 * toy.render(back, 1 - when, 40, 32)).max() <= 1
    assert max(map(abs, events.values())) < 100              # about 3 standard deviations

@pytest.mark.parametrize("events", (1, 2))
def test_no_order_in_a_frame_count(events):
    """Of clips that change color, as many show the last color in the middle as the first: counting tells nothing."""
    scenes = [toy.clip_of(0, number, events)[0] for number in range(3000)]
    turning = [s for s in scenes if str(s.events).count("turns") == 1]          # of two turns the last is never there
    last = sum(s.at(0.52)[0].color == s.at(1)[0].color for s in turning)
    assert abs(last / len(turning) - 0.5) < 0.06

@pytest.mark.parametrize("benchmark", [name for name, b in BENCHMARKS.items() if b.task == "retrieval"])
def test_retrieval_pairs(world, benchmark):
    """All test captions differ, and clips come in pairs: one's last frame is the other's first."""
    root = world(BENCHMARKS[benchmark].dataset)
    examples = load_split(benchmark, root, "test")
    assert len({e.captions for e in examples}) == len(examples) and len(examples) % 2 == 0
    ends = [read_frames(find_media(root, e.media), lambda times: [0, len(times) - 1], 32).float() for e in examples]
    for clip, back in zip(ends[::2], ends[1::2]):
        assert (clip - back.flip(0)).abs().mean() < 6

@pytest.mark.parametrize("name", ("msrvtt", "msvd", "tgif", "lsmdc", "ego4d"))
def test_order_blind_pairs(world, name):
    """Test questions that need order are asked of a clip and its reverse; their answers differ, both are options."""
    for benchmark, b in BENCHMARKS.items():
        if b.dataset != name or b.task not in ("vqa", "choice"):
            continue
        clips = defaultdict(dict)
        for e in load_split(benchmark, world(name), "test"):
            clips[e.media, e.frames][e.text] = (e.options[e.answer], e.options) if e.options else (e.answer, ())
        clips, asked = list(clips.values()), 0
        for clip, back in zip(clips[::2], clips[1::2], strict=True):
            for text in [text for text in clip if not text or text.lower().startswith(toy.TIMED)]:
                (a, options), (b_, back_options) = clip[text], back[text]
                assert a != b_ and (not options or a in back_options and b_ in options)
                asked += 1
        assert asked or benchmark == "tgif-frame"

def test_toy_py(tmp_path, monkeypatch, capsys):
    """What is there already stays and is said to; a seed below 0 or a file in the way is one line."""
    def called(*flags):
        monkeypatch.setattr(sys, "argv", ["toy.py", *map(str, flags)])
        run_main("toy.py", toy.main)
        return capsys.readouterr()
    monkeypatch.setattr(toy, "write_world", lambda root, only, seed: os.makedirs(Path(root, *only), exist_ok=True))
    monkeypatch.setattr(toy, "contact_sheet", lambda root, name: None)
    assert called(tmp_path / "w", "--only", "vcr").out == ""
    assert f"{tmp_path}/w/vcr is there already and stays" in called(tmp_path / "w", "--only", "vcr").out
    write(tmp_path, {"file": "x"})
    for flags, line in (((tmp_path, "--seed", -1), "--seed -1: a number from 0"),
                        ((tmp_path / "file",), "file cannot be written")):
        with pytest.raises(SystemExit):
            called(*flags)
        assert line in capsys.readouterr().err

def test_two_first_runs_at_once(tmp_path, monkeypatch):
    """Whoever comes second finds the world of the first, and leaves nothing else."""
    monkeypatch.setattr(toy, "write_tokenizer", lambda work: write(tmp_path, {"vcr/first": "x"}))
    monkeypatch.setattr(toy, "write_order_blind", lambda work, name: write(work, {"second": "x"}))
    monkeypatch.setitem(toy.DATASETS, "vcr", lambda studio: None)
    toy.write_world(tmp_path, ["vcr"])
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["vcr", "vcr/first"]

# ---- eval: metrics --------------------------------------------------------------------------------------------------

def test_ranks_and_recall_by_hand():
    """Three texts, three clips, one tie worth half a place; a constant score is worth chance, not a perfect rank."""
    sims = np.array([[0.9, 0.1, 0.5], [0.3, 0.3, 0.2], [0.6, 0.7, 0.1]])
    rank = ranks(sims, np.arange(3))
    assert rank.tolist() == [1, 1.5, 3]
    assert recall_metrics(rank) == {"R@1": 1 / 3, "R@5": 1, "R@10": 1, "MedR": 1.5, "MeanR": pytest.approx(5.5 / 3)}
    constant = recall_metrics(ranks(np.zeros((100, 100)), np.arange(100)))
    assert constant == {"R@1": 0, "R@5": 0, "R@10": 0, "MedR": 50.5, "MeanR": 50.5}

def test_nan_scores_rank_last():
    """A model that says NaN finds nothing."""
    assert (ranks(np.full((4, 4), np.nan), np.arange(4)) >= 2.5).all()

def finish(task, examples, rows, words, answers=("red", "blue"), judge=None, **more):
    """FINISH of hand-made rows: lists of logits, (text, video) vectors, or None for a missing clip."""
    names = ("text", "video") if task == "retrieval" else ("logits",)
    rows = [row and {k: torch.tensor(v) for k, v in zip(names, row)} for row in rows]
    return FINISH[task](judge, Clips(examples, "", recipe(words, task, answers=answers, **more)), rows)

def test_open_answers_outside_the_list_are_wrong(words):
    """Four questions: right, wrong, unknown answer, missing clip; the released figure leaves the unknown one out."""
    examples = [Example(str(n), f"v{n}", "what?", a) for n, a in enumerate(("red", "blue", "mauve", "red"))]
    metrics, records = finish("vqa", examples, [[[2., 0]], [[1., 0]], [[1., 0]], None], words)
    assert metrics == {"accuracy": 1 / 4, "accuracy, released (unknown answers left out)": 1 / 3}
    assert [r["prediction"] for r in records] == ["red", "red", "red", None] and records[0]["truth"] == "red"
    assert [r["correct"] for r in records] == [True, False, False, False]
    assert records[0]["score"] == pytest.approx(np.exp(2) / (1 + np.exp(2)), abs=1e-6)

def test_options_are_right_by_place(words):
    """Of two options with the same text only the one that is meant is right."""
    examples = [Example(str(n), "v", answer=1, options=("a", "a", "b")) for n in range(2)]
    metrics, _ = finish("choice", examples, [[[2., 1, 0]], [[1., 2, 0]]], words)
    assert metrics == {"accuracy": 0.5}

def test_vcr_counts_both_right(words):
    """Q->AR is right where answer and rationale of the same question are, whatever the order of the rows."""
    right = {"q1/qa": 1, "q1/qar": 1, "q2/qa": 1, "q2/qar": 0, "q3/qa": 0, "q3/qar": 1, "q4/qa": 1}
    examples = [Example(id, "v", answer=0, options=tuple("abcd"), kind="QA->R" if id.endswith("r") else "Q->A")
                for id in sorted(right, key=lambda id: id[::-1])]
    metrics, _ = finish("vcr", examples, [[[1., 2 - 2 * right[e.id], 0, 0]] for e in examples], words)
    assert list(metrics)[0] == "Q->AR" and metrics == {"Q->AR": 1 / 4, "accuracy": 5 / 7, "Q->A": 3 / 4, "QA->R": 2 / 3}

def test_retrieval_with_several_texts_per_clip(words):
    """Two texts of clip a, one of b: texts rank 2 clips, not 3; a clip is found as soon as its best text is."""
    examples = [Example(str(n), m, captions=("red",)) for n, m in enumerate("aab")]
    a, b = [1., 0], [0., 1]
    metrics, records = finish("retrieval", examples, [(a, a), (b, a), (b, b)], words)
    assert [r["rank"] for r in records] == [1, 2, 1] and [r["prediction"] for r in records] == ["a", "b", "b"]
    assert metrics["text to video R@1"] == 2 / 3 and metrics["text to video MeanR"] == 4 / 3
    assert metrics["video to text R@1"] == 0.5              # of clip b, two texts are as near: 1.5
    assert metrics["video to text MeanR"] == 1.25

def test_missing_clips_are_never_retrieved(words):
    """Three clips are found, one is missing: its text is not at R@5, though only three clips are ranked."""
    a, b, c = ([1., 0, 0], [0., 1, 0], [0., 0, 1])
    examples = [Example(m, m, captions=("red",)) for m in "abcd"]
    metrics, _ = finish("retrieval", examples, [(a, a), (b, b), (c, c), None], words)
    assert metrics["text to video R@1"] == 0.75 == metrics["text to video R@5"] == metrics["video to text R@5"]

def test_reranking_orders_the_first_k_and_no_more(words):
    """Three texts, three clips, K = 2: the first two change places where matching says so; the third stays the third,
    whatever matching would say of it; matching is asked about the first two of each direction only."""
    sims = torch.tensor([[.9, .8, .1], [.2, .7, .6], [.5, .4, .3]])
    odds = np.array([[-2., 3, 9], [0, 1, 1], [-1, -1, 9]], np.float32)
    examples = [Example(m, m, captions=("red",)) for m in "abc"]
    asked = []
    def judge(texts, videos, wanted):
        asked.append(wanted.tolist())
        return np.where(wanted, odds, np.nan)
    rows = [(t, v) for t, v in zip(sims.tolist(), torch.eye(3).tolist())]
    metrics, records = finish("retrieval", examples, rows, words, judge=judge, rerank=2)
    assert asked == [[[True, True, False], [False, True, True], [True, True, True]]]        # rows', columns' first two
    assert [r["rank"] for r in records] == [2, 1.5, 3]      # the cosines' 1, 1, 3; matching ties on the second text
    assert [r["top"][0][0] for r in records] == ["b", "b", "a"] and records[0]["top"][0][1] == pytest.approx(.8)
    assert metrics["text to video R@1"] == 0 and metrics["text to video R@1 by cosine alone"] == 2 / 3
    assert metrics["video to text MeanR"] == (2 + 2 + 1) / 3        # a: text 2; b: text 0; c: text 2, its own, before 1
    plain, _ = finish("retrieval", examples, rows, words)
    assert {f"{k} by cosine alone" for k in plain if "R@" in k} == metrics.keys() - plain.keys()
    again, _ = finish("retrieval", examples, rows, words, judge=lambda t, v, wanted: sims.numpy(), rerank=3)
    assert {k: again[k] for k in plain} == plain            # a judge that agrees changes nothing

# ---- eval: the model on a split -------------------------------------------------------------------------------------

def test_options_score_as_each_would_alone():
    """A batch of A options is scored as each option on its own, by the best head there is; views are averaged."""
    frames, words, _ = inputs(B=2, L=9)
    words = torch.stack([words, words.flip(1), words + 1], 1).clamp(max=49)                 # (B, A, L)
    lengths = torch.tensor([[9, 4, 6], [5, 9, 2]])
    b = {"frames": frames, "words": words, "keep": torch.arange(9) < lengths[..., None]}
    for heads in (("choice", "rank", "matching"), ("rank", "matching"), ("matching",)):
        model = ready(heads=heads)
        got = scores(model, "choice", b)
        for i, a in np.ndindex(2, 3):
            pooled = model(frames[i:i + 1], words[i:i + 1, a, :lengths[i, a]]).pooled
            assert close(got[i, a], model.heads[heads[0]](pooled)[0, -1])
        fewer = scores(model, "choice", {**b, "keep": b["keep"] & (torch.arange(3) < 2)[None, :, None]})
        assert close(fewer[:, :2], got[:, :2]) and (fewer[:, 2] == -math.inf).all()         # a row of two options
        views = torch.stack([frames, frames.flip(1)], 1)
        both = got + scores(model, "choice", {**b, "frames": frames.flip(1)})
        assert close(scores(model, "choice", {**b, "frames": views}), both / 2)
    model = ready(heads=("contrast",))
    text, video = embeddings(model, {"frames": views, "words": words[:, 0], "keep": b["keep"][:, 0]})
    assert close(text.norm(dim=-1), torch.ones(2)) and close(video.norm(dim=-1), torch.ones(2), 0.1)
    one, other = (F.normalize(model.encode_video(f), dim=-1) for f in views.unbind(1))
    assert close(F.normalize(video, dim=-1), F.normalize(one + other, dim=-1))

def small_model(words, *heads, **more):
    return AllInOne(replace(SIZES["toy"], layers=2, vocab=len(words), words=20, answers=2, **more), heads).eval()

def test_evaluation_does_not_depend_on_batches(world, words):
    """Any batch size and any number of workers give the same metrics and records, and the model is left as it was."""
    model, clips = small_model(words, "answer", dropout=0.1).train(), Clips(CLIPS4, world("msrvtt"), recipe(words))
    (metrics, records), *others = [evaluate(model, clips, batch=n, workers=w) for n, w in ((4, 0), (3, 0), (1, 2))]
    for other, again in others:
        assert other == metrics and [r["prediction"] for r in again] == [r["prediction"] for r in records]
        assert [r["score"] for r in again] == pytest.approx([r["score"] for r in records], abs=1e-5)
    assert model.training and [r["id"] for r in records] == list("0123")


@pytest.mark.parametrize("task, head", [("vqa", "answer"), ("retrieval", "contrast"),
                                        pytest.param("pretrain", "matching")])
def test_missing_clips_stop_or_count_as_wrong(world, words, task, head):
    """Evaluation stops at clips that cannot be read, naming one; with allow_missing they are wrong and are counted."""
    gone = [Example(f"gone{n}", f"videos/all/gone{n}", "what?", "red", captions=(f"blue {n}",)) for n in range(12)]
    found = [replace(e, captions=("red ring", "a ring")[:1]) for e in CLIPS4]
    clips, model = Clips(found + gone, world("msrvtt"), recipe(words, task)), small_model(words, head, "mlm")
    with pytest.raises(UserError, match="12 of 16 rows have a clip that cannot be read, .* no clip 'gone0'.*--allow-m"):
        evaluate(model, clips)
    metrics, records = evaluate(model, clips, allow_missing=True)
    assert metrics["missing"] == 12
    share = metrics[{"vqa": "accuracy", "retrieval": "text to video R@1", "pretrain": "matching accuracy"}[task]]
    assert share <= 4 / 16 and not any(r["correct"] for r in records[4:])

@pytest.mark.parametrize("views", [1, 2])
def test_matching_scores_only_what_is_wanted_in_small_batches(world, words, views):
    """Log odds of single runs of the model where they are wanted, NaN elsewhere; never more clips or pairs at a time
    than `batch`, and every clip is decoded once."""
    clips = Clips([replace(e, captions=(f"a {'red ' * int(e.id)}ring",)) for e in CLIPS4], world("msrvtt"),
                  recipe(words, "retrieval", views=views))
    model, sizes = small_model(words, "matching"), {"embed_frames": [], "fuse": []}
    wanted = np.array([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]], bool)
    for name, seen in sizes.items():
        def counted(x, *more, run=getattr(model, name), seen=seen, **how):
            seen.append(len(x))
            return run(x, *more, **how)
        setattr(model, name, counted)
    odds = match_odds(model, clips, [3, 0, 1], [2, 0, 1, 3], wanted, batch=2)
    assert max(sum(sizes.values(), [])) == 2 and sum(sizes["embed_frames"]) == 4 * views
    assert sum(sizes["fuse"]) == wanted.sum() * views and np.array_equal(~np.isnan(odds), wanted)
    for q, c in np.argwhere(wanted):
        item, said = clips[None, [2, 0, 1, 3][c]], clips[None, [3, 0, 1][q]]["words"]
        frames = item["frames"].view(views, 3, 3, 32, 32)
        logits = model.heads["matching"](model(frames, torch.tensor(said).expand(views, -1)).pooled)
        assert odds[q, c] == pytest.approx((logits[:, 1] - logits[:, 0]).mean().item(), abs=1e-5)

def test_coverage_and_survey(world, tmp_path):
    """Share of answers in the list; rows, clips, majority. Missing or unreadable clips stop it unless allowed: of
    training more than 1 %, of other splits one."""
    assert coverage([Example("", "", answer=a) for a in "aabc"], ["a", "c"]) == 0.75
    root, rows = world("msrvtt"), [*CLIPS4, replace(CLIPS4[0], id="9", answer="blue")]
    assert survey([rows], [root], "train") == ("5 rows; clips: 4 listed, 4 found, 0 missing, 0 unreadable; "
                                               "majority answer 'red' 80.0%")
    lost = [rows + [Example("x", "none")]], [root]
    with pytest.raises(UserError, match="1 of 5 clips are missing, more than 1 %; .*no clip 'none'.*to go on without"):
        survey(*lost, "train")
    assert "clips: 5 listed, 4 found, 1 missing" in survey(*lost, "train", allow_missing=True)
    many = [{e.media: e for e in load_split("msrvtt-qa", root, "train")}.values()], [root]
    many[0][0] = [*many[0][0], Example("x", "none")]
    assert len(many[0][0]) > 101 and "1 missing" in survey(*many, "train")
    with pytest.raises(UserError, match="1 of 1.. clips are missing, and evaluation leaves none out; .* as wrong$"):
        survey(*many, "test")
    video = Path(find_media(root, CLIPS4[0].media)).read_bytes()
    write(tmp_path, {"a.mp4": "", "b.mp4": "no video", "c.mp4": video, "d/1.jpg": "", "e/readme.txt": "",
                     "f.mp4": video[:300]})
    rows = [Example(name, name) for name in "abcdef"]
    with pytest.raises(UserError, match="4 of 6 clips opened are unreadable, .*a.mp4 is empty or .*--allow-missing"):
        survey([rows], [str(tmp_path)], "train")
    assert survey([rows], [str(tmp_path)], "val", True) == "6 rows; clips: 6 listed, 6 found, 0 missing, 4 unreadable"
    told = survey([rows], [str(tmp_path)], "val", True, sample=3)  # a, c and e
    assert told == "6 rows; clips: 6 listed, 6 found, 0 missing, 2 unreadable (of 3 opened)"

def record(kind, truth, correct, options=0):
    return {"kind": kind, "truth": truth, "correct": correct, "options": options}

def test_report_tells_kinds_chance_and_majority(tmp_path):
    """By kind: accuracy, chance and majority among the training answers of that kind, order-blind ceiling."""
    write(tmp_path, {"order_blind.json": {"which": 0.5}})
    pairs = ("which", "left"), ("which", "left"), ("which", "up"), ("what", "red")
    train = [Example("", "", answer=answer, kind=kind) for kind, answer in pairs]
    records = [record("which", "left", True), record("which", "up", False), record("what", "red", True)]
    lines = report({"accuracy": 2 / 3}, by_kind(records, train, tmp_path))
    assert lines[0] == "test: accuracy 66.67%" and [line.split() for line in lines[2:]] == [
        ["what", "1", "100.0%", "100.0%", "100.0%", "100.0%"], ["which", "2", "50.0%", "50.0%", "50.0%", "50.0%"],
        ["all", "3", "66.7%", "66.7%", "66.7%", "66.7%"]]
    train = [Example("", "", answer=1, options=tuple("abcd"))]
    lines = report({"MedR": 1}, by_kind([record("", "b", True, 4)], train, "nowhere"))
    assert lines[0] == "test: MedR 1" and lines[-1].split() == ["all", "1", "100.0%", "25.0%", "25.0%", "-"]

def test_report_where_training_tells_little():
    """A kind that training lacks is guessed among all answers, never as if there were one; without training rows
    nothing is known; examples without a question have no kind of their own."""
    train = [Example("", "", answer=answer, kind="which") for answer in ("left", "up", "up", "red")]
    records = [record("who", "left", True), record("who", "up", True), record("which", "up", True)]
    told = lambda table: [line.split()[3:5] for line in report({"accuracy": 1}, table)[2:]]
    assert told(by_kind(records, train, "nowhere")) == [["33.3%", "100.0%"], ["33.3%", "50.0%"], ["33.3%", "66.7%"]]
    assert told(by_kind(records, [], "nowhere")) == [["-", "-"]] * 3
    assert [*by_kind([record("", "b", True, 4)] * 2, [], "nowhere")] == ["all"]

def test_report_knows_the_majority_class():
    """Actions, whose training answers are numbers and whose records have names, have a majority too."""
    lines = report({"accuracy": 1}, by_kind([record("", "class 1", True)], [Example("", "", answer=1)], "nowhere"))
    assert lines[-1].split()[4] == "100.0%"

def test_figures_are_percent_and_ranks_are_not():
    """Shares are printed as percent; a median rank of 1 and a count of one clip are not."""
    metrics = {"text to video R@1": 1.0, "text to video MedR": 1.0, "video to text MeanR": 1.0, "missing": 1}
    line, = report(metrics, {}, "val")
    assert line == "val: text to video R@1 100.00%, text to video MedR 1, video to text MeanR 1, missing 1"

def test_list_names_every_benchmark():
    """One line each, in the registry's order: held-out validation is named as such, rows, chance, published figure."""
    lines = dict(zip(BENCHMARKS, benchmark_table()[1:]))
    assert all(line.split()[0] == name for name, line in lines.items()) and "held out" in lines["tgif-action"]
    assert re.search(r"158,581 / 12,278 / 72,821 +-  42.9 \(released EVAL.md, OOV dropped; paper 42.5\)",
                     lines["msrvtt-qa"])
    assert re.search(r"9,000 / held out / 1,000 +0.1%  35.6/62.8/71.3 \(released", lines["msrvtt"])
    assert re.search(r"122,039 / held out / 15,253 +20.0%  -$", lines["tvqa"])

# ---- eval: your own video -------------------------------------------------------------------------------------------

def stored(path, words, *heads, seed=0):
    """A checkpoint of a small random model, as train.py would leave it."""
    torch.manual_seed(seed)
    model = small_model(words, *heads)
    torch.save({"model": model.state_dict(), "config": asdict(model.config), "heads": heads, "answers": ["red", "blue"],
                "task": "pretrain", "benchmarks": [], "tokenizer": words.tokenizer.to_str(), "views": 1}, path)
    return model

def test_captions_are_scored_by_matching(world, words, run):
    """Each caption gets the probability of its pair alone, whatever stands beside it; the best comes first."""
    model, path = stored("a.pt", words, "matching"), f"{world('msrvtt')}/videos/all/video0.mp4"
    texts = ["a red ring", "red", "a blue ring moves left and then stops"]
    line, *told = run("eval", "a.pt", "--video", path, "--caption", *texts).splitlines()
    frames = read_frames(path, lambda times: frame_indices(len(times), 3, "eval"), 32)[None]
    with torch.no_grad():
        share = {text: model.heads["matching"](model(frames, torch.tensor([words.sentence(text, 20)])).pooled)
                 .softmax(-1)[0, 1].item() for text in texts}
    assert told == [f"{share[text]:7.1%}  {text}" for text in sorted(texts, key=share.get, reverse=True)]
    assert re.fullmatch(rf"looked at \d\.\d\d, \d\.\d\d, \d\.\d\d s of {path}", line)

@pytest.fixture
def folder(world, tmp_path):
    """clips/: two clips, a third in a folder below, and one that is broken."""
    (tmp_path / "clips/more").mkdir(parents=True)
    for n, name in enumerate(("b.mp4", "a b.mp4", "more/c.mp4")):
        shutil.copy(f"{world('msrvtt')}/videos/all/video{n}.mp4", tmp_path / "clips" / name)
    write(tmp_path, {"clips/broken.mp4": "no video", "clips/note.txt": "no clip"})
    return tmp_path / "clips"

def test_search_ranks_a_folder(folder, words, run):
    """All clips by cosine with the seconds that were looked at; what cannot be read is named and left out."""
    model = stored("a.pt", words, "contrast")
    broken, line, *told = run("eval", "a.pt", "--search", "a red ring", "--videos", "clips").splitlines()
    assert re.match("cannot be read: clips/broken.mp4: ", broken)
    assert line.startswith("3 clips, 3 read now; embeddings kept")
    text, cosines = torch.tensor([words.sentence("a red ring", 20)]), {}
    for name in ("b.mp4", "a b.mp4", "more/c.mp4"):
        frames = read_frames(folder / name, lambda times: frame_indices(len(times), 3, "eval"), 32)[None]
        with torch.no_grad():
            cosines[name] = F.cosine_similarity(model.encode_text(text), model.encode_video(frames)).item()
    for name, shown in zip(sorted(cosines, key=cosines.get, reverse=True), told, strict=True):
        assert re.fullmatch(rf" *(-?\d\.\d+)  {name}  \((\d\.\d\d(, )?){{3}} s\)", shown)
        assert float(shown.split()[0]) == pytest.approx(cosines[name], abs=6e-4)

def test_search_reads_what_changed(folder, words, run, tmp_path, monkeypatch):
    """Embeddings are kept beside the folder: nothing is read twice but changed files, or all under another checkpoint;
    a damaged file of embeddings, or one that would execute something, is made anew."""
    def read(checkpoint="a.pt"):
        return int(re.search(r"(\d+) read now", run("eval", checkpoint, "--search", "red", "--videos", "clips"))[1])
    stored("a.pt", words, "contrast"), stored("b.pt", words, "contrast", seed=1)
    first = run("eval", "a.pt", "--search", "ring", "--videos", "clips").splitlines()[2:]
    assert read() == 0 and run("eval", "a.pt", "--search", "ring", "--videos", "clips").splitlines()[2:] == first
    os.utime(folder / "b.mp4", (1, 1))
    assert read() == 1 and read() == 0
    (folder / "a b.mp4").unlink()
    assert read() == 0 and read("b.pt") == 2
    kept = tmp_path / "clips.embeddings.npz"
    for spoil in (lambda: kept.write_bytes(kept.read_bytes()[:99]), lambda: kept.write_text("no"),
                  lambda: kept.write_bytes(b""), lambda: np.savez(kept, checkpoint=np.array([Path("x")], object))):
        spoil()
        assert read() == 2 and read() == 0
    assert {p.name for p in tmp_path.iterdir()} == {"a.pt", "b.pt", "clips", kept.name}
    shutil.copy(folder / "b.mp4", folder / "z.mp4")
    assert read() == 1
    for name in ("b.mp4", "more/c.mp4"):
        os.utime(folder / name, (2, 2))
    def look(path, model, real=eval.look):                  # Ctrl-C at the second: neither first nor third is read again
        if path.endswith("c.mp4"):
            raise KeyboardInterrupt
        return real(path, model)
    with monkeypatch.context() as context, pytest.raises(SystemExit, match="130"):
        context.setattr(eval, "look", look)
        run("eval", "a.pt", "--search", "red", "--videos", "clips")
    assert read() == 1

def test_a_folder_of_pictures_has_numbers(world, words, run):
    """What was looked at are then pictures, counted from 0, and no seconds."""
    stored("a.pt", words, "answer")
    write(Path("shots"), {f"{n}.png": encode_picture(np.full((40, 40, 3), 40 * n, np.uint8), ".png") for n in range(6)})
    told = run("eval", "a.pt", "--video", "shots", "--ask", "what?").splitlines()
    assert told[0] == "looked at pictures 1, 3, 5 of shots" and len(told) == 3

def test_own_video_needs_the_head(folder, words, run):
    """Without the head that a question needs, one line names the command that trains it; clashing flags get one too."""
    stored("a.pt", words, "answer"), stored("c.pt", words, "contrast")
    write(folder, {"empty/x.txt": ""})
    video = "--video", "clips/b.mp4"
    for flags, line in (
            (("a.pt", *video, "--caption", "x"), "no matching head; train one: python train.py --task pretrain"),
            (("a.pt", "--search", "x", "--videos", "clips"),
             "no contrast head; train one: python train.py --task retrieval"),
            (("c.pt", *video, "--ask", "x"), "no answer head; train one: python train.py --task vqa"),
            (("c.pt", "--search", "x", "--videos", "clips/empty"), "--videos clips/empty: no clips in it"),
            (("c.pt", "--search", "x"), "belong together"), (("c.pt", "--videos", "clips"), "belong together"),
            (("c.pt", *video, "--options", "x"), "--options x: give two or more"),
            (("a.pt", *video), "--video FILE goes with --ask"), (("a.pt", "--ask", "x"), "--video FILE goes with"),
            (("a.pt", *video, "--ask", "x", "--caption", "y"), "--video FILE goes with")):
        run("eval", *flags, refused=line)

# ---- eval: run folders ----------------------------------------------------------------------------------------------

def run_folder(name, test=None, log=(), **config):
    """A run folder as train.py leaves it, with these test figures and log lines."""
    Path(name).mkdir(parents=True)
    config = {"benchmarks": ["msrvtt-qa"], "roll": "spread", "init": None, "seed": 0, "answers": 8, "vocab": 9,
              "batch": 4, "accum": 1} | config
    files = {"config.json": json.dumps(config), "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in log)}
    write(Path(name), files | ({"test.json": json.dumps(test)} if test else {}))

def figures_of(which, way=0.5):
    return {"accuracy": which, "kinds": {
        kind: {"questions": 9, "accuracy": value, "chance": 0.25, "majority": 0.3, "order-blind": blind}
        for kind, value, blind in (("which", which, 0.5), ("way", way, 1), ("all", which, 0.75))}}

def test_compare_groups_runs_by_what_varies(tmp_path, monkeypatch):
    """Two groups of two and one run: mean and deviation by hand; runs that start from their seed's run are alike."""
    monkeypatch.chdir(tmp_path)
    for seed, a, b in ((0, 0.5, 0.9), (1, 0.7, 0.8)):
        run_folder(f"a{seed}", figures_of(a), seed=seed, roll="none", init=f"runs/pre-s{seed}/best.pt")
        run_folder(f"b{seed}", figures_of(b, 0.1 * seed), seed=seed, init=f"runs/pre-s{seed}/best.pt")
    run_folder("c", figures_of(1 / 3)), run_folder("d")
    lost, *table = eval.compare(["a0", "a1", "b0", "b1", "c", "d"])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[:-2]]
    assert lost == "d has no test.json yet and is left out" and len({len(line) for line in table[:-2]}) == 1
    start = "runs/pre-sSEED/best.pt"
    assert cells[:1] + cells[2:] == [
        ["init", "roll", "runs", "all", "way", "which"],
        [start, "none", "2", "60.0 ± 14.1", "50.0 ± 0.0", "60.0 ± 14.1"],
        [start, "spread", "2", "85.0 ± 7.1", "5.0 ± 7.1", "85.0 ± 7.1"],
        ["-", "spread", "1", "33.3", "50.0", "33.3"],
        ["chance", "", "", "25.0", "25.0", "25.0"], ["order-blind", "", "", "75.0", "100.0", "50.0"]]

def test_compare_puts_several_benchmarks_side_by_side(tmp_path, monkeypatch):
    """A row each in the registry's order, by the first metric, with its baselines and the published figure; only what
    varies within a benchmark is told. Q->AR by luck: a quarter of a quarter."""
    monkeypatch.chdir(tmp_path)
    half = {"questions": 9, "accuracy": 0.5, "chance": 0.25, "majority": 0.3, "order-blind": 0.6}
    run_folder("v", {"Q->AR": 0.3, "kinds": {"Q->A": half, "QA->R": half, "all": half}}, benchmarks=["vcr"], lr=3)
    run_folder("w", {"VTM": 0.9, "kinds": {}}, benchmarks=["webvid", "cc3m"])
    for seed in (0, 1):
        for roll in ("none", "spread"):
            run_folder(f"q{seed}{roll}", figures_of(0.25 + seed / 2), seed=seed, roll=roll)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in eval.compare("v w q0none q0spread q1none "
                                                                                     "q1spread".split())[:-2]]
    question = ["2", "accuracy", "50.0 ± 35.4", "25.0", "30.0", "75.0", BENCHMARKS["msrvtt-qa"].paper]
    assert cells[:1] + cells[2:] == [
        ["benchmark", "roll", "runs", "figure", "in %", "chance", "majority", "order-blind",
         "published, of the real benchmark"],
        ["msrvtt-qa", "none", *question], ["msrvtt-qa", "spread", *question],
        ["vcr", "spread", "1", "Q->AR", "30.0", "6.2", "-", "-", "-"],
        ["webvid,cc3m", "spread", "1", "VTM", "90.0", "-", "-", "-", "-"]]

def test_compare_knows_what_runs_share(tmp_path, monkeypatch):
    """Kinds of question that not all runs have are left out; VCR is compared by Q->AR."""
    monkeypatch.chdir(tmp_path)
    half = {"questions": 9, "accuracy": 0.5, "chance": 0.25, "majority": 0.3, "order-blind": None}
    run_folder("a", {"accuracy": 0.4, "kinds": {"which": half, "who": half, "all": half}}, data="a.jsonl")
    run_folder("b", {"accuracy": 0.6, "kinds": {"which": half, "where": half, "all": half}}, data="b.jsonl")
    vcr = {"Q->AR": 0.3, "kinds": {"Q->A": half, "QA->R": half, "all": half}}
    run_folder("c", vcr, benchmarks=["vcr"]), run_folder("d", vcr, benchmarks=["vcr"], roll="none")
    cells = lambda *runs: [[c.strip() for c in line.split("|")[1:-1]] for line in eval.compare(runs)[:-2]]
    head, _, one, two, chance = cells("a", "b")
    assert head[1:] == ["runs", "accuracy"] and (one[2], two[2], chance[2]) == ("40.0", "60.0", "25.0")
    head, _, none, spread, chance = cells("c", "d")
    assert head[1:] == ["runs", "Q->AR"] and none[2] == spread[2] == "30.0" and chance[2] == "6.2"

def test_compare_refuses(tmp_path, monkeypatch):
    """No run, none that is finished, the same run twice: one line each."""
    monkeypatch.chdir(tmp_path)
    run_folder("a", figures_of(0.5)), run_folder("b", figures_of(0.5)), run_folder("c")
    for runs, line in ((["none"], "none is no run of train.py"), (["c"], "not one of these runs has a test.json"),
                       (["a", "b"], "b: another run of the same settings has seed 0")):
        with pytest.raises(UserError, match=line):
            eval.compare(runs)

def test_ticks_are_round():
    """From 0 in at most five steps of 1, 2 or 5, to just above the highest value."""
    for top, want in ((1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (2.32, [0, 0.5, 1, 1.5, 2, 2.5]), (89, [0, 20, 40, 60, 80, 100]),
                      (2104, [0, 500, 1000, 1500, 2000, 2500]), (0.03, [0, 0.01, 0.02, 0.03])):
        assert eval.ticks(top) == pytest.approx(want)

def test_curves_show_the_log(tmp_path, monkeypatch):
    """A line per loss and figure, at the right heights; guesses, chance, ceiling dotted; nothing logged, one line."""
    monkeypatch.chdir(tmp_path)
    log = [{"step": 10 * n, "vqa": 4 / n, "lr": 1, "clips_per_s": 9, "waiting": 0} for n in (1, 2, 4)]
    log.insert(2, {"step": 20, "val": {"accuracy": 0.5, "same": 0.5, "text to video MedR": 1.0, "missing": 1}})
    log.append({"step": 40, "val": {"accuracy": 0.5, "same": 0.5, "text to video MedR": 1.0}})
    run_folder("a <b>", figures_of(0.5), log), run_folder("c")
    parts = drawn(eval.curves("a <b>"))
    lines = [a["points"] for tag, a, _ in parts if tag == "polyline"]
    texts = [text for tag, _, text in parts if tag == "text"]
    assert lines == ["180.0,86.0 290.0,171.0 510.0,213.5", "290.0,389.8 510.0,389.8"]
    assert {"0 %", "80 %", "optimiser step"} <= {*texts}
    assert {"a <b>", "vqa", "vqa, a guess 2.08", "accuracy", "chance, test 25 %", "order-blind, test 75 %"} <= {*texts}
    with pytest.raises(UserError, match="c/metrics.jsonl has no line yet"):
        eval.curves("c")

# ---- eval: one page about an evaluation ------------------------------------------------------------------------------

def test_wilson_by_hand():
    """8 of 10; the interval stays within 0 and 1 where all or none are right."""
    assert wilson(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert wilson(1, 5) == pytest.approx([0.5655, 1], abs=1e-4) and wilson(0, 5) == pytest.approx([0, 0.4345], abs=1e-4)

def test_the_gallery_is_spread():
    """Of 90 right and 6 wrong, two missing, 12 are 6 and 4; a second kind gets its share; the same every time."""
    records = [{"id": str(n), "kind": "a", "correct": n % 16 > 0, "prediction": "x" if n % 48 else None}
               for n in range(96)]
    picks = chosen(records, 12)
    assert picks == sorted(set(picks)) == chosen(records, 12) and len(picks) == 12
    assert sum(not records[i]["correct"] for i in picks) == 4
    more = chosen(records + [{**records[1], "id": str(n), "kind": "b"} for n in range(96, 130)], 12)
    assert Counter(i >= 96 for i in more) == {True: 4, False: 8}

@pytest.mark.parametrize("layout", ["spread", "none"])
def test_words_look_where_the_tokens_come_from(layout):
    """Attention to a token is drawn in the frame that the token started in, layer after layer, traced by number."""
    model, (frames, words, _), maps = ready(replace(SMALL, roll=layout)), inputs(B=1, T=4), []
    model(frames, words, maps=maps)
    looks, groups = gaze(model, frames[0], words[0]), roll_groups(4, 4, layout=layout)
    home = torch.arange(4 * 17).view(1, 4, 17, 1)
    assert looks.shape == (3, 7, 4, 16)
    for layer in range(3):
        home, seen = roll_loop(home, *groups), maps[layer].mean(1)[:, :7, 7:]               # (T, L, N)
        for t, n in np.ndindex(4, 17):
            frame, slot = divmod(home[0, t, n].item(), 17)
            assert not slot or close(looks[layer, :, frame, slot - 1], seen[t, :, n])

def told_by(path):
    """The data inside a report."""
    return json.loads(re.search(r'type="application/json">(.*?)</script>', Path(path).read_text(), re.S)[1])

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MARKUP = """</script><script>document.title = 'broken'</script><img src=x onerror=alert(1)> & "quotes" \u2028"""

@pytest.fixture
def browse(tmp_path):
    """browse(file, "show=wrong", ..) -> the page's DOM after its scripts ran with these filters; no error is logged."""
    if not BROWSER:
        pytest.skip("no Chromium here to open the page with")
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
             "--disable-component-update --disable-sync --enable-logging=stderr --v=0").split()
    def dom(path, *state):
        done = subprocess.run([BROWSER, *flags, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom",
                               f"{Path(path).resolve().as_uri()}#{'&'.join(state)}"], capture_output=True, timeout=100)
        assert b"CONSOLE" not in done.stderr, done.stderr.decode()
        return done.stdout.decode()
    return dom

@pytest.fixture
def reported(world, words):
    """A report on eight questions, four right, about four clips, two of which are asked about in hostile words."""
    examples = [replace(e, id=str(n), text=f"{MARKUP if n % 4 > 1 else 'is it a ring?'} {n}", kind=f"kind {n % 2}")
                for n, e in enumerate(CLIPS4 * 2)]
    clips = Clips(examples, world("msrvtt"), recipe(words))
    torch.manual_seed(0)
    model = small_model(words, "answer")
    metrics, records = evaluate(model, clips)
    for n, r in enumerate(records):
        r.update(correct=n % 2 == 0, truth=r["prediction"] if n % 2 == 0 else "mauve")
    return page(MARKUP, ["x"], model, clips, {"accuracy": 0.5}, records, by_kind(records, examples, "nowhere"))

def test_report_in_a_browser(reported, browse, tmp_path):
    """It draws without an error, whatever the texts hold; filters by right or wrong, kind and text; a click on a word
    colours the frames; nothing refers to the network."""
    path = tmp_path / "page.html"
    path.write_text(reported)
    assert not re.search(r"""(src|href)=["']?http|url\(|@import""", reported)
    for state, shown in (("show=wrong", "kind=kind+1"), 4), (("text=RING", "show=right"), 2):
        dom = browse(path, *state)
        assert f'"soft">{shown} of 8 shown' in dom and dom.count("<article") == 8 and "data-error" not in dom
        assert len(re.findall("<article[^>]*hidden", dom)) == 8 - shown
        assert "<img src=\"x\"" not in dom and ("<title>&lt;/script&gt;" in dom or "<title>true,[CLS]</title>" in dom)
        path.write_text(reported.replace("</body>", """<script>
            document.querySelector(".words button").click()
            const pixels = document.querySelector("canvas").getContext("2d").getImageData(0, 0, 4, 4).data
            document.title = [pixels.some(Boolean), document.querySelector(".words [aria-pressed=true]").textContent]
            </script></body>"""))
    assert "<title>true,[CLS]</title>" in dom

def test_report_shows_what_the_model_saw(reported, world):
    """The pictures are the frames of evaluation to the bit, shared among questions on one clip; the numbers agree."""
    told = json.loads(re.search(r'type="application/json">(.*?)</script>', reported, re.S)[1])
    assert len(told["pictures"]) == 12 and told["items"][0]["frames"] == told["items"][4]["frames"] == [0, 1, 2]
    head, code = told["pictures"][1].split(",")
    with av.open(io.BytesIO(base64.b64decode(code))) as png:
        seen = next(png.decode(video=0)).to_ndarray(format="rgb24")
    path = find_media(world("msrvtt"), CLIPS4[0].media)
    frames = read_frames(path, lambda times: frame_indices(len(times), 3, "eval"), 32)
    assert head == "data:image/png;base64" and np.array_equal(seen, frames[1].permute(1, 2, 0))
    assert told["title"] == MARKUP and told["head"]["interval"] == pytest.approx(wilson(0.5, 8))
    assert [k["kind"] for k in told["kinds"]] == ["kind 0", "kind 1", "all"]
    looks = np.frombuffer(base64.b64decode(told["items"][0]["looks"]), np.uint8)
    looks = looks.reshape(len(told["layers"]), len(told["items"][0]["words"]), 3, 16)
    assert (looks.max((2, 3)) == 255).all() and told["layers"] == [1, 2]
    assert [told["forward"], told["backward"]] == [(g - 1).tolist() for g in roll_groups(4, 4)]

# ---- train: schedule, parameters, losses ----------------------------------------------------------------------------

def test_schedule_by_hand():
    """20 steps: 2 up to the peak, then linear to just above 0; the peak in the first step where there is but one."""
    assert [lr_at(step, 20) for step in range(4)] == [0.5, 1, 1, 17 / 18] and lr_at(11, 20) == 0.5
    assert lr_at(19, 20) == pytest.approx(1 / 18) and lr_at(0, 1) == 1
    assert min(lr_at(step, 7) for step in range(7)) > 0

def test_parameter_groups_hold_everything_once():
    """Every parameter that learns is in one group; only matrices and tables decay; heads learn faster."""
    model = AllInOne(SMALL, HEADS)
    model.cls.requires_grad = False
    groups, name_of = parameter_groups(model, 1e-3, 10), {id(p): name for name, p in model.named_parameters()}
    held = [name_of[id(p)] for group in groups for p in group["params"]]
    assert sorted([*held, "cls"]) == sorted(name_of.values())
    for group in groups:
        for p in group["params"]:
            assert group["lr"] == (1e-2 if name_of[id(p)].startswith("heads.") else 1e-3)
            assert group["weight_decay"] == (0.01 if p.dim() > 1 else 0)

def made_batch(task, rows, lengths):
    """Random frames and texts of these lengths; row 3 has an unknown answer, row r has r + 1 masked words."""
    items, texts = [], 1 if task == "vqa" else 3
    for r, L in zip(rows, lengths):
        g = torch.Generator().manual_seed(r)
        ids, masked = torch.randint(5, 50, (texts + 1, L), generator=g).tolist(), min(L, r + 1)
        item = {"index": r, "frames": torch.randn(2, 3, 32, 32, generator=g, dtype=torch.float64),
                "words": [ids[a][a == 2:] for a in range(texts)],
                "target": r % 2 if texts > 1 else -1 if r == 3 else r % 5}
        items.append(item | ({"labels": ids[-1][:masked] + [-100] * (L - masked)} if task == "pretrain" else {}))
    return collate(items, 0)

@pytest.mark.parametrize("task, heads", [
    ("vqa", ()), ("choice", ()), ("retrieval", ("matching",)), ("pretrain", ("contrast",))])
def test_a_batch_of_nothing_counts_for_nothing(world, words, task, heads):
    """It goes through every loss, and leaves a gradient of 0 with every parameter that a real batch reaches."""
    name = {"vqa": "msrvtt-qa", "choice": "msrvtt-mc", "retrieval": "msrvtt", "pretrain": "webvid"}[task]
    root = world(BENCHMARKS[name].dataset)
    clips = Clips(load_split(name, root, "val"), root, recipe(words, task, join="bare", answers=["red"]))
    config = replace(SIZES["toy"], layers=2, vocab=len(words), words=20, answers=1)
    model = AllInOne(config, (*TASKS[task].heads, *heads))
    b = train.nothing(clips, words.pad)
    assert counts(b) == {"rows": 0, "masked": 0}
    loss = sum(value for value, _ in TASKS[task].loss(model, b).values())
    loss.backward()
    assert loss == 0 and not any(p.grad is None or p.grad.any() for p in model.parameters())

@pytest.mark.parametrize("task", ["vqa", "choice", "pretrain"])
def test_accumulation_changes_nothing(task):
    """2 x 4 and 8 x 1 clips give the gradients of 8, with answers, masked words and text lengths spread unequally."""
    model, lengths, grads = ready(heads=TASKS[task].heads), [3, 10, 7, 5, 9, 4, 4, 8], []
    whole = {"rows": 7 if task == "vqa" else 8, "masked": sum(map(min, lengths, range(1, 9))) * (task == "pretrain")}
    for size in (8, 4, 1):
        batches = [made_batch(task, range(8)[i:i + size], lengths[i:i + size]) for i in range(0, 8, size)]
        count = {unit: sum(counts(b)[unit] for b in batches) for unit in ("rows", "masked")}
        model.zero_grad()
        for b in batches:
            sum(value / count[unit] for value, unit in TASKS[task].loss(model, b).values()).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert count == whole
    assert close(grads[0], grads[1], 1e-6) and close(grads[0], grads[2], 1e-6)
    assert max(g.abs().max() for g in grads[0]) > 1e-3

def test_overrides_by_name():
    """--set gives Config's types; a wrong name or value is one line that says what is allowed."""
    assert overrides(["fraction=0.125", "time=0", "roll_unimodal=1", "layers=2"]) == {
        "fraction": 0.125, "time": False, "roll_unimodal": True, "layers": 2}
    for pair, line in (("frames=3", "NAME one of width, .*fraction, roll_unimodal, time"),
                       ("time", "time needs 0 or 1"), ("time=yes", "time needs 0 or 1"),
                       ("layers=0", "layers needs a whole number above 0"), ("layers=1.5", "a whole"),
                       ("fraction=2", "fraction needs a number from 0 to 1"), ("std=nan", "std needs")):
        with pytest.raises(UserError, match=f"--set {pair}: .*{line}"):
            overrides([pair])

def test_losses_by_hand():
    """A pretraining batch: PyTorch's losses of the model's plain outputs, and contrast as a loop over pairs."""
    model = ready(heads=("matching", "mlm", "contrast"))
    b = made_batch("pretrain", range(4), [6, 9, 5, 8])
    got = TASKS["pretrain"].loss(model, b)
    match, filled = (model(b["frames"], b["words"][:, a], b["keep"][:, a]) for a in (0, 1))
    want = F.cross_entropy(model.heads["matching"](match.pooled), b["target"], reduction="sum")
    assert close(got["matching"][0], want.float(), 1e-4) and got["matching"][1] == "rows"
    want = F.cross_entropy(model.heads["mlm"](filled.text).flatten(0, 1), b["labels"].flatten(), reduction="sum")
    assert close(got["mlm"][0], want.float(), 1e-4) and got["mlm"][1] == "masked"
    text = [F.normalize(model.encode_text(b["words"][i:i + 1, 2], b["keep"][i:i + 1, 2])[0], dim=0) for i in range(4)]
    video = [F.normalize(model.encode_video(b["frames"][i:i + 1])[0], dim=0) for i in range(4)]
    loss = 0
    for i in range(4):
        for one, many in ((text[i], video), (video[i], text)):
            scores = [float(one.detach() @ other.detach()) / 0.05 for other in many]
            loss += math.log(sum(math.exp(s) for s in scores)) - scores[i]
    assert close(got["contrast"][0], loss, 1e-6) and got["contrast"][1] == "rows"

def test_hard_negatives_are_others_and_the_similar_ones():
    """Drawn by similarity among the clips and texts that are not of the row's own clip and do not say the same; a row
    without any is left out."""
    torch.manual_seed(0)
    same = torch.eye(5, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True                          # rows 0 and 1: one clip, or one text
    sims = torch.zeros(5, 5)
    sims[2, 4] = sims[3, 2] = 50                            # text 2 is like clip 4, clip 2 like text 3
    drawn = torch.stack([torch.stack(train.hard_negatives(sims, same)) for _ in range(100)])       # (100, 3, 5)
    rows, clips, texts = drawn.unbind(1)
    assert (rows == torch.arange(5)).all() and not same[rows, clips].any() and not same[rows, texts].any()
    assert (clips[:, 2] == 4).all() and (texts[:, 2] == 3).all() and set(clips[:, 0].tolist()) == {2, 3, 4}
    same[3], same[:, 3] = True, True
    rows, clips, texts = train.hard_negatives(sims, same)
    assert rows.tolist() == [0, 1, 2, 4] and 3 not in {*clips.tolist(), *texts.tolist()}
    assert all(len(drawn) == 0 for drawn in train.hard_negatives(sims, torch.ones(5, 5, dtype=torch.bool)))

def test_retrieval_loss_by_hand(monkeypatch):
    """Contrast as in pretraining; matching is the mean of PyTorch's losses of the pair and its two hard negatives. Rows
    with equal texts, and rows of one clip, are no negatives of each other."""
    model, b = ready(heads=("contrast", "matching")), made_batch("vqa", range(5), [6, 9, 5, 8, 7])
    b["words"][1], b["keep"][1] = b["words"][0], b["keep"][0]                               # says the same as row 0
    b["index"][3] = 2                                                                       # the same clip as row 2
    b["target"].zero_()
    asked, drawn = [], (torch.tensor([0, 1, 2, 4]), torch.tensor([4, 2, 0, 3]), torch.tensor([2, 4, 1, 0]))
    monkeypatch.setattr(train, "hard_negatives", lambda *args: asked.append(args) or drawn)
    got = TASKS["retrieval"].loss(model, b)
    text, video = embeddings(model, b)
    (sims, same), = asked
    assert close(sims, text @ video.T / 0.05, 1e-4) and not sims.requires_grad
    assert same.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [2, 3], [3, 2], [3, 3], [4, 4]]
    pairs = [*((i, i, 1) for i in range(5)),
             (4, 0, 0), (2, 1, 0), (0, 2, 0), (3, 4, 0), (0, 2, 0), (1, 4, 0), (2, 1, 0), (4, 0, 0)]
    loss = 0
    for clip, said, target in pairs:
        out = model(b["frames"][clip:clip + 1], b["words"][said:said + 1], b["keep"][said:said + 1])
        loss += F.cross_entropy(model.heads["matching"](out.pooled), torch.tensor([target]))
    assert close(got["matching"][0], loss.float() / 3, 1e-4) and got["matching"][1] == "rows"
    assert got["contrast"] == train.contrast(text, video)["contrast"]
    assert set(TASKS["retrieval"].loss(ready(heads=("contrast",)), b)) == {"contrast"}

def test_eight_clips_are_learnt_by_heart(world, words):
    """One question, eight clips, eight answers: only the pixels tell, and they suffice for 100 %."""
    examples = [Example(str(n), f"videos/all/video{n}", "what is it?", VOCAB[5 + n]) for n in range(8)]
    clips = Clips(examples, world("msrvtt"), recipe(words, answers=[e.answer for e in examples]))
    torch.manual_seed(0)
    model = AllInOne(replace(SIZES["toy"], layers=2, vocab=len(words), words=20, answers=8), ("answer",))
    optimizer = torch.optim.AdamW(parameter_groups(model, 2e-3, 1))
    b = collate([clips[None, i] for i in range(8)], words.pad)
    for step in range(60):
        loss = TASKS["vqa"].loss(model, b)["vqa"][0] / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert evaluate(model, clips)[0]["accuracy"] == 1

# ---- train and eval, end to end -------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path, monkeypatch, capsys, world):
    """run("train" or "eval", *flags) calls main() in an empty folder -> what it printed. refused: it must end with code
    2 and one line that matches. Training takes two steps on the toy MSRVTT, into run/, unless flags say otherwise."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    basic = "--task", "vqa", "--data", world("msrvtt"), "--steps", 2, "--batch", 4, "--out", "run", "--device", "cpu"
    def call(script, *flags, refused=None):
        flags = [*(basic if script == "train" else ()), "--workers", 0, *flags]
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        main = {"train": train, "eval": eval}[script].main
        if refused is None:
            return main() or capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            main()
        told = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and re.search(refused, told[-1]) and (len(told) == 1 or "usage" in told[0]), told
    yield call
    signal.signal(signal.SIGTERM, before)

def logged(out):
    return [json.loads(line) for line in open(f"{out}/metrics.jsonl")]

@pytest.mark.parametrize("name", [name for name, b in BENCHMARKS.items() if b.dataset in toy.DATASETS])
def test_every_benchmark_trains_and_evaluates(world, run, name):
    """Two steps on the toy's files in their owners' format, and eval.py repeats the test figure to the digit."""
    root, task = world(BENCHMARKS[name].dataset), BENCHMARKS[name].task
    told = run("train", "--task", task, "--benchmark", name, "--data", root)
    assert [line["step"] for line in logged("run")] == [1, 2, 2] and TASKS[task].metric in logged("run")[2]["val"]
    files = {"config.json", "metrics.jsonl", "last.pt", "best.pt"}
    if not has_split(name, root, "test"):
        assert "no test rows here" in told and {f.name for f in Path("run").iterdir()} == files
        assert f"{name} val: " in run("eval", "run/best.pt")
        return
    held = f"{name}: val is a held-out slice of train: " in told
    assert held == ("val" not in BENCHMARKS[name].splits) and "0 missing, 0 unreadable" in told
    figures = re.search(r"^test: .*$(?:\n(?:kind| ?\S*(?: \S+)? +\d+ +\d).*$)*", told, re.M)[0]
    assert figures in run("eval", "run/best.pt", "--predictions", "said.jsonl", "--report", "page.html")
    told = told_by("page.html")
    assert len(told["items"]) == (task != "pretrain") * min(60, told["total"])
    assert Path("page.html").stat().st_size < 1e7
    assert all(len(item["top"]) == len(item.get("shown", item["top"])) > 0 for item in told["items"])
    assert {f.name for f in Path("run").iterdir()} == files | {"test.json"}
    assert ("\nall " in figures) == (task not in ("retrieval", "pretrain"))
    assert len(open("said.jsonl").readlines()) == (0 if task == "pretrain" else len(load_split(name, root, "test")))

def test_any_task_starts_from_any_other(world, run):
    """A chain in which every task is once the start and once what is started, over text lengths 40, 80 and 100; the
    line tells which heads are new, which are left out, and what is resized."""
    chain, lines = ("webvid", "didemo", "msrvtt-qa", "tvqa", "vcr", "hmdb51", "webvid"), []
    for i, name in enumerate(chain):
        start = ("--init", f"{i - 1}/best.pt") if i else ()
        told = run("train", "--task", BENCHMARKS[name].task, "--benchmark", name,
                   "--data", world(BENCHMARKS[name].dataset), "--out", i, *start)
        lines += re.findall(r"^\d/best.pt: loaded .*", told, re.M)
    heads = [TASKS[BENCHMARKS[name].task].heads for name in chain]
    assert {task for task in TASKS} == {BENCHMARKS[name].task for name in chain[1:]} and len(lines) == 6
    for line, old, new in zip(lines, heads, heads[1:]):
        fresh, out = (re.search(f"; {word}: (.*?)(;|$)", line) for word in ("new", "dropped"))
        assert {h for h in HEADS if fresh and h in fresh[1]} == {*new} - {*old}, line
        assert {h for h in HEADS if out and f"no {h} head in this run" in out[1]} == {*old} - {*new}, line
    sizes = [re.findall(r"word_position (\d+ -> \d+)", line) for line in lines]
    assert sizes == [["40 -> 80"], ["80 -> 40"], ["40 -> 100"], ["100 -> 40"], [], []]

def test_a_pretrained_checkpoint_is_evaluated_on_everything(world, run):
    """Trained on two sets at once: each has its figures, or the named one; without further training options are chosen
    by matching, and clips found by contrast and re-ranked by matching."""
    run("train", "--task", "pretrain", "--benchmark", "webvid,cc3m",
        "--data", f"{world('webvid')},{world('cc3m')}", "--contrast")
    world("msrvtt")                                         # beside webvid: found without --data
    told = run("eval", "run/best.pt")
    assert re.findall(r"^(\w+) test: \d+ rows", told, re.M) == ["webvid", "cc3m"]
    assert told.count("matching accuracy") == 2
    assert re.findall(r"^(\w+) test: \d+ rows", run("eval", "run/best.pt", "--benchmark", "cc3m"), re.M) == ["cc3m"]
    told = run("eval", "run/best.pt", "--benchmark", "msrvtt-mc", "--predictions", "said.jsonl")
    assert "; zero-shot, by the matching head" in told and "\nall " in told
    rows = load_split("msrvtt-mc", world("msrvtt"), "test")
    said = [json.loads(line) for line in open("said.jsonl")]
    assert [r["truth"] for r in said] == [e.options[e.answer] for e in rows]
    model, meta, text = eval.load_model("run/best.pt")
    clips = Clips(rows, world("msrvtt"), recipe(text, "choice", L=40, join="bare"))
    for e, r, item in zip(rows[:4], said, (clips[None, i] for i in range(4))):
        logits = [model.heads["matching"](model(item["frames"][None], torch.tensor([w])).pooled)[0, 1]
                  for w in item["words"]]
        assert r["prediction"] == e.options[int(torch.stack(logits).argmax())]
    told = run("eval", "run/best.pt", "--benchmark", "msrvtt", "--rerank", 2)
    assert "text to video R@1 " in told and "video to text R@10 by cosine alone" in told
    run("eval", "run/best.pt", "--benchmark", "hmdb51",
        refused="hmdb51 needs the probe head that run/best.pt, trained for webvid,cc3m,")
    run("eval", "run/best.pt", "--data", "x", refused="--data names 1 folders for the 2 benchmarks webvid,cc3m")

def own_files(folder):
    """One's own files beside the toy's clips: for each task, a benchmark of that task and the path."""
    numbers = sorted(int(path.stem[5:]) for path in (folder / "videos/all").iterdir())
    clips = [(f"videos/all/video{n}.mp4", "train" if n < 6513 else "val" if n < 7010 else "test", n) for n in numbers]
    about = {"vqa": lambda n: {"question": "what shape is it?", "answer": ("ring", "square")[n % 2]},
             "choice": lambda n: {"question": "what?", "options": ["red", "a blue ring", "green"], "answer": n % 3},
             "retrieval": lambda n: {"caption": f"a ring number {n}"}, "pretrain": lambda n: {"caption": f"ring {n}"}}
    write(folder, {f"{task}.jsonl": [{"video": video, "split": split} | say(n) for video, split, n in clips]
                   for task, say in about.items()})
    return {"vqa": "msrvtt-qa", "choice": "tgif-action", "retrieval": "msrvtt", "pretrain": "webvid"}

def test_own_files_train_every_task_and_answer(world, run, tmp_path):
    """Two steps per task on one's own JSONL; then questions about a clip; then fine-tuning from the pretraining run."""
    shutil.copytree(world("msrvtt"), tmp_path, dirs_exist_ok=True)
    for task, name in own_files(tmp_path).items():
        told = run("train", "--task", task, "--benchmark", name, "--data", f"{task}.jsonl", "--out", task,
                   *(("--contrast",) if task == "pretrain" else ("--accum", 2)))
        assert "validation at step 2" in told and "\ntest: " in told
    tests = [line for line in Path("vqa.jsonl").read_text().splitlines() if '"test"' in line]
    write(tmp_path, {"only.jsonl": "\n".join(tests)})
    told = run("eval", "vqa/best.pt", "--data", "only.jsonl")
    assert "no chance and majority, which need the training rows: only.jsonl: no rows for" in told and "\nall  " in told
    run("train", "--data", "only.jsonl", refused="only.jsonl: no rows for 'train'")
    learn = [{**json.loads(tests[0]), "split": split, "answer": text}
             for split, text in (("train", "cat"), ("train", "cat"), ("train", "ring"), ("val", "ring"))]
    write(tmp_path, {"cats.jsonl": "\n".join([*tests, *map(json.dumps, learn)])})
    told = run("eval", "vqa/best.pt", "--data", "cats.jsonl")           # knows rings and squares, no cats
    assert re.search(r"^all +\d+ +[\d.]+% +100.0% ", told, re.M)        # chance: one of the answers that it can give
    Path("videos/all/video7010.mp4").rename("video.mp4")
    run("eval", "retrieval/best.pt", "--allow-missing", "--predictions", "said.jsonl")
    said = [json.loads(line, parse_constant=pytest.fail) for line in open("said.jsonl")]       # JSON knows no Infinity
    assert [row["id"] for row in said if row["score"] is None] == [said[0]["id"]]
    Path("video.mp4").rename("videos/all/video7010.mp4")
    question = "--video", "videos/all/video0.mp4", "--ask", "what is it?"
    line, *best = run("eval", "vqa/best.pt", *question).splitlines()
    assert re.fullmatch(r"looked at \d\.\d\d, \d\.\d\d, \d\.\d\d s of videos/all/video0.mp4", line)
    assert {b.split()[1] for b in best} == {"ring", "square"}
    assert sum(float(b.split("%")[0]) for b in best) == pytest.approx(100, abs=0.2)
    for task in ("choice", "pretrain"):                     # the second one by its matching head: zero-shot
        told = run("eval", f"{task}/best.pt", *question, "--options", "red", "a ring", "green", "a", "b", "c")
        assert len(told.splitlines()) == 7 and "%  a ring" in told
    run("eval", "choice/best.pt", *question, refused="no answer head; train one: python train.py --task vqa")
    run("eval", "retrieval/best.pt", *question, "--options", "a", "b", refused="no choice, rank or matching head")
    told = run("train", "--data", "vqa.jsonl", "--init", "pretrain/best.pt", "--out", "tuned")
    assert re.search(r"pretrain/best.pt: loaded \d+/\d+ tensors; new: answer\.", told)

def test_a_probe_learns_and_its_backbone_does_not(world, run):
    """After one step and after three all weights but the head's are the same to the bit."""
    for steps in (1, 3):
        run("train", "--task", "action", "--data", world("hmdb51"), "--steps", steps, "--out", steps)
    one, three = (torch.load(f"{steps}/last.pt")["model"] for steps in (1, 3))
    for name in one:
        assert torch.equal(one[name], three[name]) != name.startswith("heads."), name

def test_a_start_keeps_how_its_weights_roll(run):
    """--init with --size: layout, share, time and frames are those of the checkpoint, unless a flag says otherwise."""
    run("train", "--roll", "none", "--frames", 2, "--set", "time=0", "--out", "a")
    for flags, roll in (((), "none"), (("--size", "toy"), "none"), (("--size", "toy", "--roll", "block"), "block")):
        run("train", "--init", "a/best.pt", *flags, "--out", f"b{roll}{len(flags)}")
        config = json.loads(Path(f"b{roll}{len(flags)}/config.json").read_text())
        assert (config["roll"], config["frames"], config["time"], config["width"]) == (roll, 2, False, 96)

def test_classes_that_training_lacks(world, run, monkeypatch):
    """A class that only the test has still has its place; one that the checkpoint has not heard of is one line."""
    without = lambda name, root, split: [e for e in load_split(name, root, split) if split != "train" or e.answer < 9]
    monkeypatch.setattr(train, "load_split", without)
    assert "\nall " in run("train", "--task", "action", "--data", world("hmdb51"))
    more = lambda *which: [replace(e, answer=e.answer + 9) for e in load_split(*which)]
    monkeypatch.setattr(eval, "load_split", more)
    run("eval", "run/best.pt", refused="hmdb51 test has class 18; run/best.pt knows 0 to 9")

def test_no_tokenizer(world, run, tmp_path):
    """It is looked for beside one's own file; without one the line says what to give, not what was never given."""
    shutil.copytree(world("msrvtt"), tmp_path, dirs_exist_ok=True)
    own_files(tmp_path)
    Path("tokenizer.json").unlink()
    run("train", "--data", "vqa.jsonl", refused="no tokenizer: ./tokenizer.json is not there; give --tokenizer vocab")

def test_retrieval_with_matching_ranks_anew(world, run):
    """--rerank trains both losses, eval.py repeats the figures, and --rerank 0 gives those of the cosines alone."""
    told = run("train", "--task", "retrieval", "--rerank", 3)
    assert {"contrast", "matching"} < logged("run")[0].keys()
    assert "text to video R@1 by cosine alone" in logged("run")[2]["val"]
    figures = re.search(r"^test: .*", told, re.M)[0]
    assert figures in run("eval", "run/best.pt")
    plain = re.search(r"^test: (.*)", run("eval", "run/best.pt", "--rerank", 0), re.M)[1]
    told = told.replace(" by cosine alone", "")
    assert all(part in told for part in plain.split(", ") if "R@" in part) and "MedR" in plain

def test_the_loop_is_a_plain_loop(world, run):
    """Four steps have the losses and end at the weights of a loop written out here, cut into micro-batches or not."""
    flags = "train", "--steps", 4, "--lr", 0.01, "--out"
    run(*flags, "1"), run(*flags, "2", "--accum", 2)
    saved, plain = torch.load("1/last.pt"), []
    text, answers = Words.from_json(saved["tokenizer"]), {a: i for i, a in enumerate(saved["answers"])}
    root = world("msrvtt")
    clips = Clips(load_split("msrvtt-qa", root, "train"), root, recipe(text, L=40, answers=answers))
    torch.manual_seed(0)
    model = AllInOne(Config(**saved["config"]), saved["heads"])
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01, 1), betas=(0.9, 0.98))
    for step, keys in zip(range(4), Order([np.arange(len(clips))], 4, 1, 0)):
        b = collate([clips[key] for key in keys], text.pad)
        loss = F.cross_entropy(scores(model, "vqa", b), b["target"])
        plain.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * lr_at(step, 4)
        optimizer.step()
    for out in ("1", "2"):
        assert [line["vqa"] for line in logged(out)[:4]] == pytest.approx(plain, abs=2e-3)
        weights = torch.load(f"{out}/last.pt")["model"]
        assert max((weights[name] - p).abs().mean() for name, p in model.state_dict().items()) < 1e-4

@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_stopped_and_resumed_to_the_bit(run, monkeypatch, number):
    """SIGTERM or Ctrl-C to the run and its workers in the middle of an epoch saves and stops; resumed, with workers,
    dropout and drop path on, the run ends in the very tensors and figures of one that was not stopped."""
    monkeypatch.setitem(SIZES, "toy", replace(SIZES["toy"], layers=2, dropout=0.1, drop_path=0.1))
    flags, schedule, asked = ("--steps", 10, "--batch", 32, "--workers", 2), train.lr_at, []
    run("train", *flags, "--out", "whole")
    def stopping(step, total):
        if step == 8 and not asked:                         # once: it is called for each group of parameters
            asked.append(True)
            workers = [worker.pid for worker in multiprocessing.active_children()]
            pids = map(str, [os.getpid(), *workers])
            subprocess.run(["kill", f"-{number.value}", *pids])                 # not by the parent, whom workers obey
        return schedule(step, total)
    monkeypatch.setattr(train, "lr_at", stopping)
    with pytest.raises(SystemExit, match="run/last.pt is at step 9, go on with the same flags, --resume and --out run"):
        run("train", *flags)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler        # a second Ctrl-C ends at once
    assert torch.load("run/last.pt")["step"] == 9 and not Path("run/test.json").exists()
    monkeypatch.setattr(train, "lr_at", schedule)
    run("train", *flags, "--resume")
    for file in ("last.pt", "best.pt"):
        whole, again = (torch.load(f"{out}/{file}") for out in ("whole", "run"))
        for key in {"model", "best", "step", "val"} & whole.keys():
            torch.testing.assert_close(again[key], whole[key], rtol=0, atol=0)
    assert Path("run/test.json").read_text() == Path("whole/test.json").read_text()
    assert [line["step"] for line in logged("run")] == [line["step"] for line in logged("whole")]

def test_what_was_logged_after_the_last_checkpoint_is_forgotten(tmp_path):
    """A killed run comes by those steps again. A log that is shorter than it should be stays."""
    train.open_run(tmp_path / "run", {"seed": 0}, False)
    for text, kept in (("one\ntwo\n", "one\n"), ("o", "o")):
        (tmp_path / "run/metrics.jsonl").write_text(text)
        torch.save({"logged": 4}, tmp_path / "run/last.pt")
        train.open_run(tmp_path / "run", {"seed": 0}, True)
        assert (tmp_path / "run/metrics.jsonl").read_text() == kept

def test_a_loss_that_is_no_number_stops(run):
    """Step and examples are named, and no checkpoint holds the broken weights."""
    run("train", "--steps", 3, "--lr", "1e38",
        refused=r"^train.py: step 1: the loss is nan \(vqa nan; gradient nan\); examples (\d+, ){3}\d+; lower --lr")
    assert not Path("run/best.pt").exists() and torch.load("run/last.pt")["step"] == 1

@pytest.mark.parametrize("file", ["last.pt.part", "best.pt.part", "metrics.jsonl"])
def test_a_full_disk_is_one_line(run, monkeypatch, file):
    """It says what to do, leaves the last checkpoint whole and nothing half written; once there is room it goes on."""
    schedule, path = train.lr_at, Path("run", file)
    def filling(step, total):
        if step == 3 and not path.is_symlink():             # asked once for each group of parameters
            path.rename("log") if path.exists() else None
            path.symlink_to("/dev/full")
        return schedule(step, total)
    monkeypatch.setattr(train, "lr_at", filling)
    run("train", "--steps", 4,
        refused=rf"^train.py: run/{file.removesuffix('.part')} cannot be written: No space left on device; "
        "make room there, or choose another --out; a run that had begun goes on with --resume")
    assert torch.load("run/last.pt")["step"] == 3 and not [f for f in os.listdir("run") if f.endswith(".part")]
    if file == "metrics.jsonl":
        os.replace("log", path)
    monkeypatch.setattr(train, "lr_at", schedule)
    run("train", "--steps", 4, "--resume")
    assert [line["step"] for line in logged("run")] == [1, 2, 3, 4, 4]

def test_a_folder_that_cannot_be_written_is_one_line(run):
    """Where no folder can be made, before anything is trained; no right to rename, after."""
    run("train", "--out", "/proc/run",
        refused="^train.py: /proc/run cannot be written: .*; make room there, or choose another --out")
    Path("run/best.pt").mkdir(parents=True)
    run("train", refused="run already holds a run; pass --resume")

KILLER = """
import os, pathlib, random, shutil, sys, time, traceback
import torch, train
train.SIZES["toy"] = train.replace(train.SIZES["toy"], layers=2, dropout=0.1, drop_path=0.1)
flags, run, random = sys.argv[1:], pathlib.Path("run"), random.Random(0)

def life(out, *more):
    if (pid := os.fork()) == 0:
        try:
            train.train(train.arguments([*flags, "--out", out, *more]))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def saved():
    return os.stat("run/last.pt").st_mtime_ns if os.path.exists("run/last.pt") else 0

assert os.waitpid(life("whole"), 0)[1] == 0
killed = 0
while killed < 20:
    before, pid, ended = saved(), life("run", *["--resume"] * (run / "config.json").exists()), 0
    time.sleep(random.uniform(0, 0.3) if killed % 4 == 0 else 0)                # anywhere, or soon after a save
    while killed % 4 and saved() == before and not ended:
        ended = os.waitpid(pid, os.WNOHANG)[0]
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    if not ended:
        os.kill(pid, 9)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, 9), status
        killed += status == 9
        ended = status == 0
    for file in run.glob("*.pt"):
        torch.load(file, weights_only=True)
    if ended:                                                                   # too fast to be killed: once more
        shutil.rmtree(run)
assert os.waitpid(life("run", *["--resume"] * (run / "config.json").exists()), 0)[1] == 0
"""

def test_killed_twenty_times(world, tmp_path):
    """kill -9, at random: whatever lies there is whole, --resume goes on, the run ends as if nothing had happened."""
    flags = f"--task vqa --data {world('msrvtt')} --steps 60 --batch 4 --workers 0 --device cpu".split()
    home = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run([sys.executable, "-c", KILLER, *flags], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHONPATH": home, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for file in ("last.pt", "best.pt"):
        saved = (torch.load(tmp_path / out / file)["model"] for out in ("run", "whole"))
        torch.testing.assert_close(*saved, rtol=0, atol=0)
    assert [line["step"] for line in logged(tmp_path / "run")] == [*range(1, 61), 60]

def broken_world(world, folder, broken):
    """A copy of the toy MSRVTT in which the training clips whose number is broken(number) cannot be read."""
    shutil.copytree(world("msrvtt"), folder)
    for e in {e.media: e for e in load_split("msrvtt-qa", str(folder), "train")}.values():
        if broken(int(e.media.split("video")[-1])):
            Path(find_media(str(folder), e.media)).write_bytes(b"broken")

def test_clips_that_cannot_be_read(world, run, tmp_path, monkeypatch):
    """Training goes on without unreadable clips only where allowed, says how many, and leaves a list. A look at some
    clips at the start stops it at once; what is found out later stops it then."""
    broken_world(world, tmp_path / "data", lambda n: n % 3 == 0)
    flags = "train", "--data", "data", "--steps", 11, "--batch", 8
    run(*flags, refused=r"^train.py: \d+ of 1\d\d clips opened are unreadable, more than 1 %.*--allow-missing")
    monkeypatch.setattr(eval, "opens", lambda path: True)
    run(*flags, refused=r"^train.py: 1\d training rows have clips that cannot be read, .*video\d+.mp4.*--allow-missing")
    told, bad = run(*flags, "--allow-missing", "--out", "loose"), Path("loose/bad.txt").read_text().splitlines()
    assert f"{len(bad)} training rows were left out" in told and all("video" in line for line in bad)

def test_a_batch_of_nothing_but_bad_clips_is_passed_over(world, run, tmp_path):
    """With --allow-missing training goes on even if a whole batch is lost."""
    broken_world(world, tmp_path / "data", lambda n: n != 1)
    run("train", "--data", "data", "--steps", 11, "--batch", 2, "--allow-missing")

@pytest.fixture(scope="module")
def mistakes(world, tmp_path_factory):
    """A folder with a run of one step in old/, data folders that lack something, and one that is for retrieval."""
    folder = tmp_path_factory.mktemp("mistakes")
    before = signal.getsignal(signal.SIGTERM)
    train.train(train.arguments(f"--task vqa --data {world('msrvtt')} --steps 1 --batch 4 --workers 0 --device cpu "
                                f"--out {folder / 'old'}".split()))
    signal.signal(signal.SIGTERM, before)
    for name in ("empty", "norows", "noclips"):
        shutil.copytree(world("msrvtt"), folder / name, ignore=shutil.ignore_patterns("videos"))
    write(folder, {"empty/train_qa.json": "", "norows/train_qa.json": "[]", "pairs/MSRVTT_JSFUSION_test.csv": PAIRS,
                   "pairs/MSRVTT_data.json": sentences(0, 1, 9770), "pairs/videos/all/video9770.mp4": ""})
    torch.save(AllInOne(SMALL).state_dict(), folder / "foreign.pt")
    text = Path(world("msrvtt"), "tokenizer.json").read_text()
    other = {"red": "blue", "blue": "red"}
    write(folder, {"swapped.json": re.sub('"(red|blue)": ', lambda m: f'"{other[m[1]]}": ', text)})
    return folder

MISTAKES = [
    ("train --task beam", "invalid choice: 'beam'"), ("train --resume", "run/config.json is not there; drop --resume"),
    ("train --benchmark none", "--benchmark none: --task vqa knows tgif-frame, msrvtt-qa, msvd-qa"),
    ("train --benchmark msrvtt", "--benchmark msrvtt: --task vqa knows"), ("train --accum 3", "--batch 4 cannot"),
    ("train --benchmark msrvtt-qa,msvd-qa", "only --task pretrain mixes several"),
    ("train --task pretrain --benchmark webvid,cc3m", "--data names 1 folders for the 2"),
    ("train --contrast", "--contrast is for --task pretrain, not vqa"),
    ("train --rerank 5", "--rerank is for --task retrieval, not"),
    ("train --task pretrain --views 2", "--views 2: pretrain is no task of answering"),
    ("train --data nowhere", "no annotations in nowhere.*expected train_qa.json"),
    ("train --data empty", "train_qa.json: Expecting value"), ("train --data my.jsonl", "my.jsonl.*No such file"),
    ("train --data norows", "no rows for 'train' of msrvtt-qa"), ("train --data noclips", "clips are missing, more"),
    ("train --tokenizer none.json", "--tokenizer none.json"), ("train --init none.pt", "none.pt is not a file"),
    ("train --set speed=1", "--set speed=1: NAME=VALUE is needed"),
    ("train --set fraction=0.3", "fraction 0.3 is not 0 or 2"),
    ("train --set width=97", "width 97 is not a multiple of heads 4"),
    ("eval --plot empty", "empty is no run of train.py"), ("eval --compare old empty", "empty is no run of train.py"),
    ("train --out old", "old already holds a run; pass --resume"),
    ("train --out old --resume --steps 1 --seed 3", "another run than old: seed was 0, now 3; use"),
    ("train --out old --resume --steps 1 --frames 2", "another run than old: frames was 3, now 2; use"),
    ("train --out old --resume --steps 1 --tokenizer swapped.json", "than old: tokenizer was crc32 .*, now crc32"),
    *(pytest.param(f"train {wrong}", wrong.split()[0]) for wrong in (
        "--accum 0", "--steps -1", "--frames -1", "--views 0", "--workers -1", "--device nope", "--lr 0", "--batch 0")),
    ("eval", "no checkpoint given"), ("eval none.pt", "none.pt is not a file"),
    ("eval foreign.pt", "foreign.pt is no checkpoint of train.py but ours"),
    ("eval old/best.pt --rerank -1", "--rerank -1: a number from 0 on"),
    ("eval old/best.pt --data noclips", "clips are missing, and evaluation leaves none out"),
    ("eval old/best.pt --video none.mp4 --ask what?", "none.mp4: no such file"),
    pytest.param("eval old/best.pt --benchmark msrvtt --data pairs --allow-missing", "needs the contrast head that")]

@pytest.mark.parametrize("command, line", MISTAKES)
def test_mistakes_are_one_line(mistakes, run, monkeypatch, command, line):
    """A user's mistake ends with code 2 and one line, and writes no checkpoint."""
    monkeypatch.chdir(mistakes)
    before = (mistakes / "old/last.pt").read_bytes()
    run(*command.split(), refused=line)
    assert (mistakes / "old/last.pt").read_bytes() == before and not list(mistakes.glob("run/*.pt"))

# ---- several processes ----------------------------------------------------------------------------------------------

ALL_TASKS = [("vqa", "--accum", 2), ("retrieval",), ("pretrain", "--contrast", "--accum", 2)]
DROPOUT = replace(SIZES["toy"], layers=2, dropout=0.1, drop_path=0.1)
STEPS10 = ("--task vqa --data vqa.jsonl --tokenizer tokenizer.json --steps 10 --batch 8 --workers 1 --device cpu "
           "--allow-missing --out").split()

def in_float64(task, *flags):
    """Two steps of train.py in float64, a third of the clips broken -> the gradients of both."""
    gradients = []
    class Spy(torch.optim.AdamW):
        def step(self):
            gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]
                              if p.grad is not None])
            super().step()
    name = {"vqa": "msrvtt-qa", "retrieval": "msrvtt", "pretrain": "webvid"}[task]
    flags = ["--task", task, "--benchmark", name, "--data", f"{task}.jsonl", "--tokenizer", "tokenizer.json",
             "--steps", 2, "--batch", 8, "--workers", 0, "--device", "cpu", "--allow-missing", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Spy)
        torch.set_default_dtype(torch.float64)
        train.train(train.arguments([*map(str, flags)]))
    torch.set_default_dtype(torch.float32)
    return gradients

def one_of_two():
    """What each of the two processes does that torchrun starts for the test below."""
    dist.init_process_group("gloo")
    train.dist.init_process_group = train.dist.destroy_process_group = lambda *_: None      # one group for all the runs
    rank, schedule, SIZES["toy"] = dist.get_rank(), train.lr_at, replace(SIZES["toy"], layers=2)
    for task, *flags in ALL_TASKS:
        torch.save(in_float64(task, *flags, "--out", f"{task}2"), f"{task}{rank}.pt")
    def stopping(step, total):
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step, total)
    SIZES["toy"] = DROPOUT
    train.train(train.arguments([*STEPS10, "whole"]))
    train.lr_at = stopping
    try:
        train.train(train.arguments([*STEPS10, "stopped"]))
    except SystemExit as stop:
        print(stop.code, flush=True)
    train.lr_at = schedule
    train.train(train.arguments([*STEPS10, "stopped", "--resume"]))

def torchrun(folder, code):
    """Two processes of this Python on the CPU that run this code in this folder, as torchrun would start train.py."""
    here = os.path.dirname(os.path.abspath(__file__))
    (folder / "script.py").write_text(f"import sys\nsys.path.insert(0, {here!r})\n{code}\n")
    command = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py"
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=300)

@pytest.fixture(scope="module")
def pair(world, tmp_path_factory):
    """(A folder where two processes have trained, what they printed.)"""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(world("msrvtt"), folder, dirs_exist_ok=True)
    own_files(folder)
    for path in (folder / "videos/all").iterdir():
        if int(path.stem[5:]) % 3 == 2 and int(path.stem[5:]) < 6513:
            path.write_bytes(b"broken")
    done = torchrun(folder, "import test_allinone\ntest_allinone.one_of_two()")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout

@pytest.mark.parametrize("task, flags", [(task, flags) for task, *flags in ALL_TASKS], ids=lambda value: str(value))
def test_two_processes_equal_one(pair, run, monkeypatch, capsys, task, flags):
    """Losses and gradients of each step, all figures of validation and test, though clips are missing unequally."""
    monkeypatch.chdir(pair[0])
    monkeypatch.setitem(SIZES, "toy", replace(SIZES["toy"], layers=2))
    alone = in_float64(task, *flags, "--out", f"{task}1")
    for step in range(2):
        assert max(p.abs().max() for p in alone[step]) > 1e-3
        for rank in range(2):
            assert close(torch.load(f"{task}{rank}.pt")[step], alone[step], 1e-6)
    for one, two in zip(logged(f"{task}1"), logged(f"{task}2"), strict=True):
        for name in one.keys() - {"clips_per_s", "waiting"}:
            assert one[name] == (two[name] if name == "val" else pytest.approx(two[name], abs=1e-6))
    assert Path(f"{task}1/test.json").read_text() == Path(f"{task}2/test.json").read_text()
    assert Path(f"{task}1/bad.txt").read_text() == Path(f"{task}2/bad.txt").read_text()

def test_two_processes_lost_whole_micro_batches(pair):
    """What the test above is worth: one process had a micro-batch without a clip while the other had some."""
    examples = read_jsonl_file(str(pair[0] / "vqa.jsonl"), "train")
    broken = [int(e.media.split("video")[-1].split(".")[0]) % 3 == 2 for e in examples]
    ranks = [micro(Order([np.arange(len(examples))], 8, 2, 0, 0, rank, 2), 4) for rank in range(2)]
    lost = [[all(broken[i] for _, i in piece) for piece in pieces] for pieces in ranks]
    assert any(a != b for a, b in zip(*lost))

def test_two_processes_stop_together_and_resume(pair, run, monkeypatch):
    """Told to stop, one process alone, both save the same step; resumed, they end in the tensors of a run that was not
    stopped. Only the first prints. One process cannot go on: its random numbers would be others."""
    folder, told = pair
    assert told.count("batch: 2 micro x 2 accum x 2 world = 8 global") == 2
    assert told.count("batch: 4 micro x 1 accum x 2") == 4
    assert told.count("train.py: told to stop; stopped/last.pt is at step 4, go on with the same flags, ") == 1
    assert told.count("resumed at step 4") == 1 and told.count("\ntest: ") == 5
    for file in ("last.pt", "best.pt"):
        whole, again = (torch.load(folder / out / file) for out in ("whole", "stopped"))
        for key in {"model", "best", "step", "val", "random"} & whole.keys():
            torch.testing.assert_close(again[key], whole[key], rtol=0, atol=0)
    assert not torch.equal(*(state["cpu"] for state in torch.load(folder / "whole/last.pt")["random"]))
    monkeypatch.chdir(folder)
    monkeypatch.setitem(SIZES, "toy", DROPOUT)
    run("train", *STEPS10, "stopped", "--resume", refused="another run than stopped: processes was 2, now 1; use")

FAILURES = {
    "one": ("def fail(step, total):\n    if step == 1 and train.dist.get_rank() == 1:\n"
            "        raise train.UserError('the cause')\n    return 1\ntrain.lr_at = fail", "train.py: the cause"),
    "all": ("sys.argv += ['--data', 'nowhere']", "train.py: no annotations in nowhere")}

@pytest.mark.parametrize("who", FAILURES)
def test_a_process_that_fails_ends_the_run(world, tmp_path, who):
    """Whether one process fails or all do, the run ends soon, not with code 0, and the cause is told once."""
    code, line = FAILURES[who]
    flags = f"--task vqa --data {world('msrvtt')} --steps 99 --batch 4 --workers 1 --device cpu".split()
    start = time.perf_counter()
    done = torchrun(tmp_path, f"sys.argv += {flags}\nimport train\n{code}\ntrain.main()")
    assert done.returncode != 0 and done.stderr.count(line) == 1, done.stderr
    assert time.perf_counter() - start < 60

def test_two_lines_of_the_readme(world, tmp_path):
    """The commands as typed, each in a process of its own: eval.py repeats train.py's figures to the digit."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/toy").symlink_to(Path(world("msrvtt")).parent)
    told = []
    for command in ("train.py --task vqa --steps 2 --workers 1", "eval.py runs/msrvtt-qa-toy-spread-s0/best.pt"):
        script, *flags = command.split()
        done = subprocess.run([sys.executable, Path(__file__).with_name(script), *flags], cwd=tmp_path,
                              capture_output=True, text=True, timeout=100)
        assert done.returncode == 0 and not done.stderr, done.stderr
        told.append(done.stdout)
    figures = told[0][told[0].index("test: acc"):].splitlines()[:-1]
    assert len(figures) > 4 and "\n".join(figures) in told[1]
    assert "next: python eval.py runs/msrvtt-qa-toy-spread-s0/best.pt" in told[0]
