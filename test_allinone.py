"""The contracts of the core, in the order of its files: rolling, allinone, data, eval, train."""
import contextlib
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import allinone
import data
import eval
import tools.toy
import train
from allinone import (AllInOne, build_model, Config, count_parameters, HEADS, init_narrow,
                      init_released, load_checkpoint, load_weights, lock_folder, multiply_adds,
                      Output, print0, printable, progress, resize_positions, run_main,
                      save_checkpoint, SIZES, UserError, write_file)
from data import (BatchSampler, benchmark_of, BENCHMARKS, check_shared_memory, collate,
                  frame_indices, InputSpec, make_loader, Manifest, manifest_info, MixedDataset,
                  pick_frames, read_answers, read_frames, readable, Tokenizer, VideoError,
                  VideoTextDataset, wordpiece)
from eval import EvalSettings, option_scores
from rolling import roll_groups, roll_loop, roll_tokens
from train import Recipe

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"             # outputs of the released code, not part of the project
torch.set_num_threads(1)                    # these tensors are too small to share

# ---- rolling -------------------------------------------------------------------------------------


def numbered(T=3, N=17):
    """x (2, T, N, 2) in which no number occurs twice: a misplaced token cannot hide."""
    return torch.arange(2.0 * T * N * 2).view(2, T, N, 2)


@pytest.mark.parametrize("layout", ["block", "spread"])
@pytest.mark.parametrize("fraction", [1 / 8, 1 / 4, 1 / 2, 1])
@pytest.mark.parametrize("rows, cols", [(4, 4), (7, 5), (2, 9)])
def test_fast_roll_equals_definition(layout, fraction, rows, cols):
    x = numbered(N=1 + rows * cols)
    groups = roll_groups(rows, cols, fraction, layout)
    assert torch.equal(roll_tokens(x, *groups), roll_loop(x, *groups))


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("N", [17, 50, 197])
def test_block_layout_equals_released_op(T, N):
    path = SHARED / "parity/roll_cases.npz"
    if not path.exists():
        pytest.skip("no outputs of the released op in ../shared/parity")
    cases = np.load(path)
    x = torch.from_numpy(cases[f"x_T{T}_L{N}"])
    y = torch.from_numpy(cases[f"y_T{T}_L{N}"])
    groups = roll_groups(1, N - 1, layout="block")
    rolled = roll_tokens(x.view(2, T, N, 4), *groups)
    assert torch.equal(rolled.flatten(0, 1), y)


@pytest.mark.parametrize("layout, forward, backward", [
    ("block", [1, 2], [15, 16]),
    ("spread", [1, 11], [6, 16])])
def test_tokens_move_by_one_frame(layout, forward, backward):
    """By hand, 4 x 4 patches: the frames that the tokens in frames 0, 1, 2 come from."""
    x = numbered()
    y = roll_tokens(x, *roll_groups(4, 4, layout=layout))
    came_from = dict.fromkeys(range(17), [0, 1, 2])
    came_from |= dict.fromkeys(forward, [2, 0, 1])
    came_from |= dict.fromkeys(backward, [1, 2, 0])
    for n, frames in came_from.items():
        assert torch.equal(y[:, :, n], x[:, frames, n])


def test_T_rolls_are_the_identity():
    """And fewer are not. CLS never moves."""
    x = numbered(T=5)
    y = x
    for rolls in range(1, 6):
        y = roll_tokens(y, *roll_groups(4, 4))
        assert torch.equal(y, x) == (rolls == 5)
        assert torch.equal(y[:, :, 0], x[:, :, 0])


def test_nothing_to_roll_is_the_identity():
    """Fewer than 8 tokens, fraction 0, layout none; or a single frame."""
    for groups in (roll_groups(2, 3),
                   roll_groups(2, 3, layout="block"),
                   roll_groups(4, 4, fraction=0),
                   roll_groups(4, 4, layout="none")):
        assert torch.equal(roll_tokens(numbered(), *groups), numbered())
    picture = numbered(T=1)
    assert torch.equal(roll_tokens(picture, *roll_groups(4, 4)), picture)


def test_roll_takes_any_strides_and_keeps_its_input():
    x = numbered(T=2).transpose(0, 1)
    before = x.clone()
    y = roll_tokens(x, *roll_groups(4, 4))
    assert torch.equal(y, roll_loop(before, *roll_groups(4, 4)))
    y.zero_()
    assert not x.is_contiguous()
    assert torch.equal(x, before)


def test_gradient_is_the_inverse_roll():
    x = numbered().requires_grad_()
    forward, backward = roll_groups(4, 4)
    roll_tokens(x, forward, backward).backward(numbered())
    assert torch.equal(x.grad, roll_loop(numbered(), backward, forward))


@pytest.mark.parametrize("side", [8, 14, 16, 24])
def test_spread_covers_the_picture_evenly(side):
    """An eighth of the patches each way; rows, like columns, differ by one patch at most."""
    for group in roll_groups(side, side):
        picture = torch.zeros(side * side)
        picture[group - 1] = 1
        picture = picture.view(side, side)
        assert abs(len(group) - side * side / 8) <= 1
        for axis in (0, 1):
            counts = picture.sum(axis)
            assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("forward, backward, line", [
    ([1, 3], [3], "overlap"),
    ([1, 1], [2], "overlap"),
    ([0], [2], "tokens 0 to 2; allowed are 1 to N - 1 = 16"),
    ([1], [17], "tokens 1 to 17")])
def test_roll_refuses_wrong_tokens(forward, backward, line):
    for roll in (roll_tokens, roll_loop):
        with pytest.raises(ValueError, match=line):
            roll(numbered(), torch.tensor(forward), torch.tensor(backward))


def test_rolling_refuses_wrong_choices():
    for fraction in (0.35, 1 / 3, 1 / 16, -1 / 4, 5e-324):
        with pytest.raises(ValueError, match="choose 0, 1/8, 1/4, 1/2 or 1"):
            roll_groups(4, 4, fraction)
    with pytest.raises(ValueError, match="'random' is unknown; choose spread, block or none"):
        roll_groups(4, 4, layout="random")
    with pytest.raises(ValueError, match="shape .3, 17, 2.; rolling needs .B, T, N, D."):
        roll_tokens(numbered()[0], *roll_groups(4, 4))


def test_rolling_script_fits_a_terminal():
    script = [sys.executable, HERE / "rolling.py"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[1].startswith("2 2 2 ")        # in frame 0, from frame 2
    assert lines[-1] == "roll_tokens equals roll_loop on 25 random shapes, in both layouts"
    assert max(map(len, lines)) <= 79


# ---- allinone: sizes -----------------------------------------------------------------------------

SMALL = Config(width=32, layers=3, heads=2, image=32, patch=8, frames=4, text_length=10, vocab=50,
               answers=5, embed=8, dropout=0.0, drop_path=0.0)


@pytest.mark.parametrize("size, millions, gmac", [
    ("tiny", 11.43, 4.64),
    ("small", 33.55, 16.82),
    ("base", 109.87, 63.84)])
def test_sizes_are_the_papers(size, millions, gmac):
    """Parameters without the MLM head; multiply-adds, half of the operations PyTorch counts."""
    config = SIZES[size]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = AllInOne(config, ("matching",))
        frames = torch.zeros(1, 3, 3, 224, 224, dtype=torch.uint8)
        model(frames, torch.zeros(1, 40, dtype=torch.long))
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.005)
    assert multiply_adds(config) / 1e9 == pytest.approx(gmac, abs=0.005)
    assert counter.get_total_flops() == 2 * multiply_adds(config)


def test_allinone_script_prints_the_sizes(monkeypatch, capsys):
    monkeypatch.setattr(allinone, "SIZES", {"toy": SIZES["toy"]})
    allinone.main()
    row = r"^toy +96 +4 +4 +32 +8 +3\.41 M +0\.08 +\d+\.\d ms$"
    assert re.search(row, capsys.readouterr().out, re.M)


@pytest.mark.parametrize("field, value, line", [
    ("width", -96, "width -96 is not from 8 to 8192"),
    ("width", "96", "width is '96', not int"),
    ("width", 10 ** 9, "width 1000000000 is not"),
    ("width", None, "width is None, not int"),
    ("layers", True, "layers is True, not int"),
    ("layers", 10 ** 6, "layers 1000000 is not from 1 to 128"),
    ("heads", 7, "width 768 is no multiple of heads 7"),
    ("image", 225, "image 225 is no multiple of patch 16"),
    ("roll", 7, "roll is 7, not str"),
    ("roll", "x", "layout 'x' is unknown; choose spread, block or none"),
    ("fraction", 0.3, "fraction 0.3 is unknown; choose 0, 1/8, "),
    ("dropout", float("nan"), "dropout nan is not from 0 to 0.9")])
def test_config_refuses_values_that_no_model_can_have(field, value, line):
    with pytest.raises(UserError, match=f"^config: {line}"):
        Config(**{field: value})


# ---- allinone: what must not matter --------------------------------------------------------------


def random_model(config=SMALL, task_heads=()):
    """In float64 and eval mode; every tensor is random and large enough to matter."""
    torch.manual_seed(0)
    model = AllInOne(config, task_heads).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1), std=0.15)
    return model


def inputs(B=2, T=3):
    """frames, input_ids, attention_mask. Texts have 7 tokens, 6, ... and padding up to 7."""
    torch.manual_seed(1)
    frames = torch.randint(0, 256, (B, T, 3, 32, 32), dtype=torch.uint8)
    input_ids = torch.randint(1, 50, (B, 7))
    lengths = torch.arange(7, 7 - B, -1)
    return frames, input_ids, torch.arange(7) < lengths[:, None]


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def differ(a, b):
    return bool((a - b).abs().max() > 1e-4)


def test_padding_is_inert():
    """Other words under the padding, or no padding: the same outputs at the real words."""
    model = random_model(task_heads=("contrast",))
    frames, input_ids, mask = inputs()
    other_ids = torch.where(mask, input_ids, 3)
    want = model(frames, input_ids, mask)
    got = model(frames, other_ids, mask)
    assert_close(got.pooled, want.pooled)
    assert_close(got.video, want.video)
    assert_close(got.text[mask], want.text[mask])
    shorter = model(frames[1:], input_ids[1:, :6])
    assert_close(shorter.pooled, want.pooled[1:])
    assert_close(model.encode_text(other_ids, mask), model.encode_text(input_ids, mask))


def test_clip_alone_equals_clip_in_a_batch():
    model = random_model(task_heads=("contrast",))

    def outputs(frames, input_ids, mask):
        text = model.encode_text(input_ids, mask)
        video = model.encode_video(frames)
        return [*model(frames, input_ids, mask), text, video]

    batch = inputs(B=3)
    alone = [part[1:2] for part in batch]
    want = [output[1:2] for output in outputs(*batch)]
    assert_close(outputs(*alone), want)


@pytest.mark.parametrize("queries", [1, 7])
def test_fewer_queries_give_the_same_numbers(queries):
    model = random_model()
    frames, input_ids, mask = inputs()
    want = model(frames, input_ids, mask)
    video = model.embed_frames(frames)
    got = model.joint(video, input_ids, mask, queries)
    assert_close(got.pooled, want.pooled)
    assert_close(got.text, want.text[:, :queries])


def test_pixels_are_normalised_as_imagenet():
    model = random_model()
    frames = inputs()[0]
    want = model.embed_frames(frames)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = (frames / 255 - mean) / std
    model.pixel_mean.zero_()
    model.pixel_std.fill_(1)
    assert_close(model.embed_frames(pixels), want)


# ---- allinone: what must matter ------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_gets_a_gradient(head):
    """Every row of it, except row 1 of text_segment and, where no head reads it, the pooler."""
    model = random_model(task_heads=(head,))
    frames = inputs(B=5, T=4)[0]
    input_ids = torch.arange(50).view(5, 10)
    idle = ["text_segment"]
    if head == "contrast":
        scores = model.encode_text(input_ids) + model.encode_video(frames)
    elif head == "mlm":
        scores = model.task_heads[head](model(frames, input_ids).text)
    else:
        scores = model.task_heads[head](model(frames, input_ids).pooled)
    if head in ("contrast", "mlm"):
        idle += ["pooler.weight", "pooler.bias"]
    scores.square().sum().backward()
    for name, p in model.named_parameters():
        trained = p.grad is not None and bool(p.grad.any(dim=-1).all())
        assert trained == (name not in idle), name
    assert model.text_segment.grad[0].all()


def test_visual_tokens_roll_before_every_block():
    """Blocks that return what they get see frames that have rolled once, twice, ..."""
    model = random_model()
    frames, input_ids, _ = inputs()
    seen = []

    def return_input(block, args, output):
        seen.append(args[0].view(2, 3, 7 + 17, 32))
        return args[0]

    for block in model.blocks:
        block.register_forward_hook(return_input)
    model(frames, input_ids)
    text = model.embed_text(input_ids)[:, None].expand(2, 3, 7, 32)
    video = model.embed_frames(frames)
    for x in seen:
        video = roll_tokens(video, *roll_groups(4, 4))
        assert_close(x, torch.cat([text, video], dim=2))
    assert len(seen) == 3


@pytest.mark.parametrize("roll, time, sees", [
    ("none", False, False),
    ("none", True, True),
    ("block", False, True),
    ("spread", False, True)])
def test_rolling_or_time_embeddings_see_frame_order(roll, time, sees):
    model = random_model(replace(SMALL, roll=roll, time=time))
    frames, input_ids, mask = inputs(T=4)
    want = model(frames, input_ids, mask).pooled
    assert differ(model(frames.flip(1), input_ids, mask).pooled, want) == sees
    shifted = model(frames.roll(1, dims=1), input_ids, mask).pooled
    assert differ(shifted, want) == time                # rolling goes round: a cyclic shift is none


@pytest.mark.parametrize("roll_unimodal", [False, True])
def test_video_alone_rolls_only_if_asked(roll_unimodal):
    config = replace(SMALL, roll_unimodal=roll_unimodal, time=False)
    model = random_model(config, ("contrast",))
    frames = inputs(T=4)[0]
    assert differ(model.encode_video(frames.flip(1)), model.encode_video(frames)) == roll_unimodal


def test_clips_may_have_fewer_frames():
    """They use the first time embeddings. One frame does not roll."""
    model = random_model()
    frames, input_ids, mask = inputs(T=2)
    want = model(frames, input_ids, mask)
    model.time_embed.data[2:] = 9
    assert_close(model(frames, input_ids, mask), want)
    still = random_model(replace(SMALL, roll="none"))
    picture = frames[:, :1]
    assert_close(model(picture, input_ids, mask), still(picture, input_ids, mask))


def test_model_refuses_more_than_it_has():
    model = AllInOne(SMALL)
    for T in (0, 5):
        with pytest.raises(ValueError, match=f"clips of {T} frames; .* for 1 to 4"):
            model.embed_frames(torch.zeros(2, T, 3, 32, 32))
    with pytest.raises(ValueError, match="texts of 11 tokens; .* for 10"):
        model.embed_text(torch.zeros(2, 11))
    with pytest.raises(UserError, match="task head 'beam' is unknown; choose from matching, mlm"):
        AllInOne(SMALL, ("beam",))


def test_dropout_follows_embeddings_attention_and_mlp():
    model = AllInOne(replace(SMALL, dropout=0.3))
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, *_: calls.append(module.p))
    model(*inputs())
    embeddings, attention, mlp = 2, 1, 2
    assert calls == [0.3] * (embeddings + 3 * (attention + mlp))


def test_drop_path_leaves_out_whole_frames():
    model = AllInOne(replace(SMALL, drop_path=0.2))
    assert [block.drop_path.p for block in model.blocks] == [0, 0.1, 0.2]
    last = model.blocks[2].drop_path
    torch.manual_seed(0)
    x = last(torch.ones(4000, 2, 3))
    assert x.mean() == pytest.approx(1, abs=0.05)
    for frame in x[:99]:
        assert len(frame.unique()) == 1
    assert last.eval()(x) is x


# ---- allinone: how weights start -----------------------------------------------------------------


@pytest.mark.parametrize("init, std, power", [
    (init_released, 0.02, 0),
    (init_narrow, 1, -0.5)])
def test_statistics_of_the_start(init, std, power):
    """Tables have this std, matrices std * fan_in ** power, time embeddings 0."""
    model = AllInOne(replace(SMALL, width=256), ("matching", "mlm", "contrast"))
    init(model)
    for name, p in model.named_parameters():
        want = std
        if p.dim() == 1 and name != "cls_token":        # biases, LayerNorms
            assert p.unique().tolist() == [float(name.endswith("weight"))], name
            continue
        if name == "time_embed":
            want = 0
        elif name.endswith("weight") and name != "text_embed.weight":
            want = std * p[0].numel() ** power
        assert p.detach().std() == pytest.approx(want, rel=0.2), name


@pytest.mark.parametrize("head", ["rank", "rank2"])
def test_fresh_rank_heads_are_row_1_of_matching(head):
    task_heads = AllInOne(SMALL, ("matching", head)).task_heads
    assert torch.equal(task_heads[head].weight, task_heads["matching"].weight[1:])


def checkpoint_of(model, answers=()):
    """What load_checkpoint returns for this model."""
    return {"config": model.config, "task_heads": list(model.task_heads), "tokenizer": "{}",
            "answers": list(answers), "model": model.state_dict()}


def test_one_line_accounts_for_every_tensor():
    source = AllInOne(SMALL, ("matching", "mlm", "answer"))
    model = AllInOne(SMALL, ("matching", "mc"))
    line = load_weights(model, checkpoint_of(source))
    assert line == "loaded 53 of 59 tensors; new: mc; not used: answer, mlm"
    theirs = source.state_dict()
    for name, tensor in model.state_dict().items():
        assert ".mc." in name or torch.equal(tensor, theirs[name]), name


def test_rank_heads_start_as_matching_where_the_file_lacks_them():
    source = random_model(task_heads=("matching", "rank2"))
    matching = source.task_heads["matching"]
    rank2 = source.task_heads["rank2"].weight.clone()
    model = random_model(task_heads=("rank", "rank2"))
    load_weights(model, checkpoint_of(source))
    assert torch.equal(model.task_heads["rank"].bias, matching.bias[1:])
    assert torch.equal(model.task_heads["rank"].weight, matching.weight[1:])
    assert torch.equal(model.task_heads["rank2"].weight, rank2)


def test_answer_head_needs_the_same_answers():
    source = checkpoint_of(AllInOne(SMALL, ("answer",)), answers="abcde")
    model = AllInOne(SMALL, ("answer",))
    assert load_weights(model, source, answers="abcde") == "loaded 57 of 57 tensors"
    for answers in ("edcba", "abcd", ""):
        line = load_weights(model, source, answers)
        assert line == "loaded 51 of 57 tensors; new: answer; not used: answer"


def test_positions_fit_other_frames_texts_and_images():
    """More frames start at zero, more text as in the new model."""
    source = random_model()
    more = random_model(replace(SMALL, image=48, frames=6, text_length=12))
    new = more.text_pos[10:].clone()
    load_weights(more, checkpoint_of(source))
    assert torch.equal(more.time_embed[:4], source.time_embed)
    assert not more.time_embed[4:].any()
    assert torch.equal(more.text_pos, torch.cat([source.text_pos, new]))
    assert torch.equal(more.pos_embed, resize_positions(source.pos_embed, 6))
    fewer = random_model(replace(SMALL, frames=2))
    load_weights(fewer, checkpoint_of(source))
    assert torch.equal(fewer.time_embed, source.time_embed[:2])


def test_positions_are_resized_bicubically():
    """CLS stays. A step between two rows stays one, and overshoots a little."""
    rows = torch.tensor([7.0] + [0.0] * 8 + [1.0] * 8)
    resized = resize_positions(rows[:, None], 6)
    picture = resized[1:].view(6, 6)
    assert resized[0] == 7
    assert picture[0].max() < 0.1 and picture[5].min() > 0.9
    assert picture.min() < -0.01 and picture.max() > 1.01


@pytest.mark.parametrize("field", ["width", "layers", "heads", "patch", "vocab"])
def test_weights_of_another_size_are_refused(field):
    source = checkpoint_of(AllInOne(SMALL))
    config = replace(SMALL, **{field: 2 * getattr(SMALL, field)})
    with pytest.raises(UserError, match="leave out --size"):
        load_weights(AllInOne(config), source)


# ---- allinone: our checkpoints -------------------------------------------------------------------

TINY = replace(SMALL, width=16, layers=1, image=16, text_length=4, vocab=10, answers=2)
CONFIG = asdict(TINY)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pt"


def write_content(path, **changes):
    """A checkpoint, with parts of its content replaced. -> its state dict"""
    model = AllInOne(TINY, ("answer",))
    content = checkpoint_of(model, answers=["yes", "no"])
    torch.save({**content, "config": CONFIG, **changes}, path)
    return model.state_dict()


def assert_refused(path, line):
    with pytest.raises(UserError, match=line) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_checkpoint_comes_back(path):
    model = AllInOne(TINY, ("answer",))
    save_checkpoint(path, model, answers=["yes", "no"], tokenizer="{}", step=3)
    checkpoint = load_checkpoint(path)
    again = build_model(checkpoint)
    assert not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    del checkpoint["model"]
    assert checkpoint == {"config": TINY, "task_heads": ["answer"], "answers": ["yes", "no"],
                          "tokenizer": "{}", "step": 3}


def test_flipped_bit_never_becomes_a_weight(path):
    """Anywhere in the file: it is refused, unless the bit means nothing."""
    state = write_content(path)
    good = path.read_bytes()
    refused = 0
    for position in range(0, len(good), len(good) // 150):
        flipped = bytearray(good)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        try:
            loaded = load_checkpoint(path)["model"]
        except UserError:
            refused += 1
            continue
        for name in state:
            assert torch.equal(loaded[name], state[name]), (position, name)
    assert refused > 50


def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded(path):
    path.write_text("the file before")
    model = AllInOne(TINY, ("answer",))
    model.norm.bias.data[3] = torch.nan
    with pytest.raises(UserError, match="norm.bias holds numbers that are not finite"):
        save_checkpoint(path, model, [], "{}")
    assert path.read_text() == "the file before"
    write_content(path, model=model.state_dict())
    assert_refused(path, "norm.bias holds numbers that are not finite")


def test_broken_files_are_one_line(path):
    write_content(path)
    good = path.read_bytes()
    source = zipfile.ZipFile(path)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():                      # a small file could hold gigabytes
            archive.writestr(name, source.read(name))
    for data in (b"", b"What is she doing?\n" * 99, good[:9000], packed.getvalue()):
        path.write_bytes(data)
        assert_refused(path, "is not a checkpoint, or is damaged")
    torch.save([1], path)
    assert_refused(path, "is not a checkpoint of train.py")
    assert_refused(path.parent, "cannot be read: Is a directory")
    assert_refused(path.parent / "none.pt", "cannot be read: No such file")


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_executed(zipped, path):
    bomb = Bomb(f"{path}.executed")
    torch.save({"config": CONFIG, "x": bomb}, path, _use_new_zipfile_serialization=zipped)
    assert_refused(path, "is not a checkpoint, or is damaged")
    assert not os.path.exists(bomb.target)
    pickle.loads(pickle.dumps(bomb))
    assert os.path.exists(bomb.target), "the bomb is a dud, so this test shows nothing"


@pytest.mark.parametrize("field, value, line", [
    ("config", None, "not a checkpoint of train.py; .* python tools/weights.py"),
    ("config", {}, "config fields .*'width'.* missing"),
    ("config", CONFIG | {"depth": 1}, "config fields .'depth'. are unknown"),
    ("config", CONFIG | {"width": -96}, "width -96 is not from 8 to 8192"),
    ("config", CONFIG | {"fraction": 5e-324}, "fraction 5e-324 is unknown"),
    ("model", None, "model is missing or not a dict"),
    ("task_heads", None, "task_heads is missing or not a list"),
    ("task_heads", [["answer"]], "task head .* is unknown"),
    ("answers", "ab", "answers is missing or not a list"),
    ("answers", ["a", 2], "answers are not all texts"),
    ("answers", ["a"], "1 answers for 2 classes"),
    ("tokenizer", None, "holds no tokenizer")])
def test_content_that_does_not_fit_is_named(field, value, line, path):
    write_content(path, **{field: value})
    assert_refused(path, line)


WEIGHT = torch.ones(16, 16)


@pytest.mark.parametrize("tensor, line", [
    (None, "is not a dense tensor"),
    (WEIGHT.to_sparse(), "is not a dense tensor"),
    (WEIGHT.to("meta"), "is not a dense tensor"),
    (WEIGHT.int(), "has dtype torch.int32, not float32"),
    (WEIGHT.cfloat(), "has dtype torch.complex64, not float32"),
    (WEIGHT.to(torch.float8_e5m2), "has dtype torch.float8_e5m2, not float32"),
    (WEIGHT.double(), "has dtype torch.float64, not float32"),
    (WEIGHT[:9], "has shape .9, 16., its config means .16, 16."),
    (WEIGHT[:1].clone().expand(16, 16), "lacks numbers")])
def test_tensors_that_do_not_fit_are_named(tensor, line, path):
    state = write_content(path)
    state["pooler.weight"] = tensor
    write_content(path, model=state)
    assert_refused(path, f"pooler.weight {line}")


@pytest.mark.filterwarnings("ignore")           # PyTorch warns about these kinds of tensors
def test_quantised_and_nested_tensors_are_named(path):
    state = write_content(path)
    state["pooler.weight"] = torch.quantize_per_tensor(WEIGHT, 1, 0, torch.qint8)
    write_content(path, model=state)
    assert_refused(path, "pooler.weight has dtype torch.qint8, not float32")
    state["pooler.weight"] = torch.nested.nested_tensor([WEIGHT])
    write_content(path, model=state)
    assert_refused(path, "pooler.weight is not a dense tensor")


def test_extra_and_missing_tensors_are_named(path):
    state = write_content(path)
    write_content(path, model={**state, "a\x1b[2J": WEIGHT})
    assert_refused(path, r"tensor a\\x1b\[2J has no place")
    del state["pooler.weight"]
    write_content(path, model=state)
    assert_refused(path, "lacks 1 tensors, among them pooler.weight")


def test_small_file_cannot_claim_gigabytes(path):
    """2 GiB of word embeddings: one number, repeated."""
    config = replace(TINY, width=512)
    state = AllInOne(config, ("answer",)).state_dict()
    state["text_embed.weight"] = torch.zeros(1).expand(2 ** 20, 512)
    claimed = asdict(config) | {"vocab": 2 ** 20}
    write_content(path, config=claimed, model=state)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(path, "text_embed.weight lacks numbers")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2 ** 18     # KiB


# ---- allinone: what every script needs -----------------------------------------------------------


def test_write_file_replaces_the_whole_file(path):
    write_file(path, "longer than what follows")
    write_file(path, "né")
    assert path.read_bytes() == "né".encode()
    write_file(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert os.listdir(path.parent) == ["file.pt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_file_before(call, path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    path.write_text("the file before")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match="file.pt cannot be written: No space left on device; "):
        write_file(path, "new")
    assert path.read_text() == "the file before"
    assert os.listdir(path.parent) == ["file.pt"]


def test_printable_escapes_what_moves_the_cursor():
    assert printable("a\x1b[2J\r\n\t\x7f\x9b") == r"a\x1b[2J\r\n\t\x7f\x9b"
    assert printable("\u2028\u202e\u2066") == r"\u2028\u202e\u2066"       # line, bidi controls
    assert printable("né, 你好, \\n") == "né, 你好, \\n"


def test_users_mistake_is_one_line_and_exit_code_2(capsys):
    def main():
        raise UserError("no file 'a\nb'")

    with pytest.raises(SystemExit) as done:
        run_main("x.py", main)
    assert done.value.code == 2
    assert capsys.readouterr().err == "x.py: no file 'a\\nb'\n"


def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_main("x.py", lambda: print("né"))
    assert terminal.buffer.getvalue() == b"n\\xe9\n"


def test_closed_pipe_is_no_error(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        run_main("x.py", lambda: print("a line"))


def test_ctrl_c_is_one_line():
    script = [sys.executable, "-c", "import allinone; raise KeyboardInterrupt"]
    done = subprocess.run(script, cwd=HERE, capture_output=True, text=True)
    assert done.stderr == "interrupted\n"
    assert done.returncode == -signal.SIGINT            # a shell shows 130


def test_folder_is_locked_until_its_process_ends(tmp_path):
    code = "import allinone, sys; kept = allinone.lock_folder(sys.argv[1]); print('ok'); input()"
    script = [sys.executable, "-uc", code, tmp_path]
    child = subprocess.Popen(script, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ok\n"
    with pytest.raises(UserError, match="is in use by another process; .* choose another --out"):
        lock_folder(tmp_path)
    child.kill()
    child.communicate()
    lock_folder(tmp_path).close()


@pytest.mark.parametrize("rank, terminal, bar", [
    ("0", True, True),
    ("0", False, False),
    ("1", True, False)])
def test_only_rank_0_prints(rank, terminal, bar, monkeypatch, capsys):
    """And only a terminal gets a progress bar, of at most 79 columns."""
    monkeypatch.setattr(allinone, "RANK", int(rank))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    print0("step", 3)
    assert list(progress("abc", "reading")) == ["a", "b", "c"]
    printed = capsys.readouterr()
    assert printed.out == ("step 3\n" if rank == "0" else "")
    assert ("reading: " in printed.err) == bar
    assert max(map(len, printed.err.split("\r"))) <= 79


# ---- data: frame sampler -------------------------------------------------------------------------

N = 60                              # frames of the clips below: file name, codec, its options
CLIPS = {
    "mpeg4.avi": ("mpeg4", {"g": "12"}),
    "mpeg4.mp4": ("mpeg4", {"g": "12"}),
    "mpeg4_b.avi": ("mpeg4", {"bf": "2", "g": "12"}),
    "mpeg4_b.m4v": ("mpeg4", {"bf": "2", "g": "12"}),
    "h264_b.mp4": ("libx264", {"bf": "3", "g": "12"}),
    "h264_b.avi": ("libx264", {"bf": "3", "g": "12"}),
    "h264_long.mkv": ("libx264", {"bf": "3", "g": "250"}),
    "open_gop.ts": ("libx264", {"bf": "3", "g": "12", "x264-params": "open-gop=1:b-adapt=0"}),
    "refresh.mp4": ("libx264", {"g": "12", "x264-params": "intra-refresh=1"}),
    "interlaced.mp4": ("libx264", {"flags": "+ildct+ilme", "x264-params": "tff=1"}),
    "ten_bit.mov": ("libx264", {"g": "12"}, "yuv420p10le"),
    "no_times.h264": ("libx264", {"bf": "2", "g": "12"}),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=12:log-level=none:pools=1"}),
    "vp8.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "10", "g": "20"}),
    "vp9.webm": ("libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    "mpeg2.mpg": ("mpeg2video", {"bf": "2", "g": "12"}),
    "loop.gif": ("gif", {}, "rgb8"),
}


def picture(i, w=80, h=48):
    """A moving square on a moving gradient, so that no two frames are alike."""
    y, x = np.mgrid[:h, :w]
    rgb = np.stack((x * 3 + i * 4, y * 5, x + y + i), -1).astype(np.uint8)
    rgb[8:24, i % w:i % w + 12] = 255 - 3 * i
    return rgb


def add_video(out, codec, options=(), pixels="yuv420p", w=80, h=48):
    try:
        stream = out.add_stream(codec, rate=24, options=dict(options))
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    stream.width, stream.height, stream.pix_fmt = w, h, pixels
    stream.codec_context.thread_count = 1
    return stream


def video_packets(stream, n=N, at=lambda i: i):
    """Encode n pictures, the i-th at time at(i) / 24 s."""
    for i in range(n):
        rgb = picture(i, stream.width, stream.height)
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        frame.pts = at(i)
        yield from stream.encode(frame)
    yield from stream.encode()


def sound_packets(stream):
    """A second of silence."""
    for i in range(43):
        silence = np.zeros((2, 1024), np.float32)
        sound = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
        sound.sample_rate, sound.pts = 44100, 1024 * i
        yield from stream.encode(sound)
    yield from stream.encode()


def encode(path, codec, options=(), pixels="yuv420p", n=N, at=lambda i: i, w=80, h=48):
    container = "m4v" if path.suffix == ".m4v" else None           # or it would be an mp4
    with av.open(str(path), "w", format=container) as out:
        out.mux(video_packets(add_video(out, codec, options, pixels, w, h), n, at))
    return path


def remux(source, path, edit):
    """Copy the packets that edit(list of packets) returns."""
    with av.open(str(source)) as inp, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(inp.streams.video[0])
        for packet in edit([packet for packet in inp.demux(video=0) if packet.size]):
            packet.stream = stream
            out.mux(packet)
    return path


def spoil(packets, numbers, change):
    """Replace the payloads of some packets by change(payload)."""
    for j in numbers:
        packet = av.Packet(change(bytes(packets[j])))
        packet.pts, packet.dts = packets[j].pts, packets[j].dts
        packet.time_base = packets[j].time_base
        packets[j] = packet
    return packets


def patch(source, path, offset, fmt, *values):
    """A copy of a file with a few bytes changed."""
    content = bytearray(source.read_bytes())
    struct.pack_into(fmt, content, offset, *values)
    path.write_bytes(content)
    return path


def decode_all(path):
    """The truth: every frame that can be decoded, in output order, nothing skipped."""
    frames = []
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        codec.thread_count = 1
        for packet in container.demux(video=0):
            with suppress(av.error.FFmpegError):
                frames += codec.decode(packet)
    return [frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for frame in frames]


def times_of(path):
    """The times that read_frames gives to pick."""
    seen = []
    read_frames(path, lambda times: seen.append(times) or [0])
    return seen[0]


def check_exact(path, **more):
    """Count, all frames at once, single ones, triples and the ends, each against decode_all."""
    truth = np.array(decode_all(path))
    rng = np.random.default_rng(0)
    assert len(times_of(path)) == len(truth)
    assert np.array_equal(read_frames(path, range(len(truth)), **more), truth)
    picks = [rng.integers(0, len(truth), T) for T in (1, 1, 1, 1, 3, 3, 3, 3)]
    for numbers in [*picks, [len(truth) - 1, 0]]:
        assert np.array_equal(read_frames(path, numbers, **more), truth[numbers]), numbers


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """media(name) -> path of that clip, made on first use."""
    folder = tmp_path_factory.mktemp("clips")

    def make(name):
        path = folder / name
        return path if path.exists() else encode(path, *CLIPS[name])
    return make


@pytest.fixture
def counts(monkeypatch):
    """Counts packets that are read ("read") and decoded ("fed"), and frames ("given")."""
    counter = Counter()
    demux, decode = data._demux, data._decode

    def count(items, name):
        for item in items:
            counter[name] += 1
            yield item
    monkeypatch.setattr(data, "_demux", lambda stream: count(demux(stream), "read"))
    monkeypatch.setattr(data, "_decode", lambda codec, packets, *rest: count(
        decode(codec, count(packets, "fed"), *rest), "given"))
    return counter


# ---- data: frame sampler, which frames ----

@pytest.mark.parametrize("n, T, expected", [
    (1, 3, [0, 0, 0]), (2, 3, [0, 1, 1]), (4, 3, [0, 2, 3]), (9, 3, [1, 4, 7]), (10, 1, [5])])
def test_frame_indices_eval(n, T, expected):
    """Evaluation takes the middle of each of T equal segments."""
    assert frame_indices(n, T, "eval") == expected


class Highest:
    """A generator whose draws are the float below 1, which added to an integer rounds up."""
    random = staticmethod(lambda T: np.full(T, np.nextafter(1, 0)))


@pytest.mark.parametrize("n, T", [(1, 3), (2, 3), (3, 3), (10, 3), (100, 8)])
def test_frame_indices_train(n, T):
    """Training stays in its segments, is sorted, and in the long run takes every frame."""
    rng = np.random.default_rng(0)
    draws = np.array([frame_indices(n, T, "train", rng) for _ in range(1500)])
    start = np.arange(T) * n / T
    assert (draws >= start.astype(int)).all() and (draws < np.ceil(start + n / T)).all()
    assert (np.diff(draws) >= 0).all() and set(draws.flat) == set(range(n))
    assert frame_indices(n, T, "train", Highest())[-1] == n - 1


@pytest.mark.parametrize("n, T, mode", [(0, 3, "eval"), (5, 0, "eval"), (5, 3, "test")])
def test_frame_indices_refuses(n, T, mode):
    with pytest.raises(ValueError):
        frame_indices(n, T, mode)


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_exact(media, name):
    """Of every container and codec: the frames of decoding everything, at the same numbers."""
    assert readable(media(name))
    check_exact(media(name))


@pytest.mark.parametrize("name, wanted, fed, given", [
    ("h264_b.mp4", [2, 14], 20, 20), ("h264_b.mp4", [2, 50], 20, 20), ("open_gop.ts", [30], 15, 14),
    ("h264_long.mkv", [50], 59, 40), ("mpeg4.mp4", [1], 2, 2), ("mpeg4_b.avi", [40], 13, 8)])
def test_few_frames_take_few_packets(media, counts, name, wanted, fed, given):
    """And of the pictures in these packets, those that no other refers to are not decoded."""
    read_frames(media(name), wanted)
    assert counts["fed"] <= fed and counts["given"] <= given, counts


def test_real_clips():
    """Real files with rotation, B-frames, packed B-frames and no frame counts are exact."""
    folder = SHARED / "reference/videos"
    if not folder.is_dir():
        pytest.skip("the optional folder ../shared is not there")
    for name in ("mm_demo.mp4", "mm_test.avi", "newton.gif", "realshort.mp4", "tc_nasa_13013.mp4"):
        truth = np.array(decode_all(folder / name))
        picks = np.random.default_rng(0).integers(0, len(truth), 5)
        assert np.array_equal(read_frames(folder / name, picks), truth[picks]), name
        assert len(times_of(folder / name)) == len(truth), name


def test_picks_out_of_range(media):
    """A frame that is not there is an error, as is no frame at all."""
    for picks in ([N], [-1], []):
        with pytest.raises(VideoError, match="0 to 59"):
            read_frames(media("h264_b.mp4"), picks)


def test_times_at_a_variable_rate(tmp_path):
    path = encode(tmp_path / "vfr.mp4", "libx264", {"bf": "2"}, n=10, at=lambda i: i * i)
    assert times_of(path).dtype == np.float64 and times_of(path)[0] == 0
    assert np.allclose(times_of(path), np.arange(10) ** 2 / 24, atol=1e-4)


@pytest.mark.parametrize("name, rate", [
    ("mpeg4_b.avi", 24), ("open_gop.ts", 24), ("vp8.webm", 24), ("no_times.h264", 25)])
def test_times_of_containers(media, name, rate):
    """AVI and raw streams have no timestamps, MPEG-TS starts at 1.4 s, Matroska rounds to 1 ms."""
    assert np.allclose(times_of(media(name)), np.arange(N) / rate, atol=6e-4)


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_times_count_from_the_container_start(tmp_path, name):
    """Where sound comes first, the first picture is not at 0."""
    with av.open(str(tmp_path / name), "w") as out:
        sound = out.add_stream("aac", rate=44100)
        video = add_video(out, "libx264")
        out.mux(sound_packets(sound))
        out.mux(video_packets(video, 24, lambda i: 12 + i))
    late = 0.5 + np.arange(24) / 24
    assert np.abs(times_of(tmp_path / name) - late).max() < 0.03    # the encoder's delay


@pytest.mark.parametrize("blocks", [
    b"!\xfe\5hello\3abc\0", b"!\xf9\4\4\x14\0\0\0", b"!\xfe\1,\0!\xf9\4\4\x14\0\0\0"])
def test_gif_may_end_in_an_extension(tmp_path, media, blocks):
    """Blocks after the last picture are no frame."""
    path = tmp_path / "comment.gif"
    path.write_bytes(media("loop.gif").read_bytes()[:-1] + blocks + b";")
    assert len(times_of(path)) == N
    assert np.array_equal(read_frames(path, [N - 1]), read_frames(media("loop.gif"), [N - 1]))


# ---- data: frame sampler, pixels ----

def test_square_is_scaled(tmp_path):
    """size=R is the square at `place` of side min(w, h) / zoom, scaled. Levels are kept."""
    path = encode(tmp_path / "one.png", "png", {}, "rgb24", n=1)
    full = torch.from_numpy(picture(0)).permute(2, 0, 1)[None].float()
    for place, x, y in (((0.5, 0.5), 20, 4), ((0, 0), 0, 0), ((1, 1), 40, 8), ((1, 0), 40, 0)):
        square = full[:, :, y:y + 40, x:x + 40]
        expected = F.interpolate(square, (32, 32), mode="bilinear", antialias=True)
        got = read_frames(path, [0, 0], 32, place)
        assert got.shape == (2, 3, 32, 32) and got.dtype == torch.uint8 and got.is_contiguous()
        assert (got - expected).abs().mean() < 0.6
    path = encode(tmp_path / "lossless.mp4", "libx264", {"qp": "0"}, n=2)
    level = read_frames(path, [1], 48, zoom=1.0).float().mean()
    assert abs(level - picture(1)[:, 16:64].mean()) < 0.6
    with pytest.raises(ValueError):
        read_frames(path, [0], 32, (0.5, 1.5))


def test_square_is_independent_of_history_and_threads(media):
    """The kept filter graphs leak nothing from one clip, place or thread to another."""
    jobs = [(media(name), [3, 40] * 9, 224, place)
            for name in ("h264_b.mp4", "mpeg4.mp4", "hevc.mp4") * 3 for place in ((0, 1), (1, 0))]
    alone = []
    for job in jobs:
        data._filter_graph.cache_clear()
        alone.append(read_frames(*job))
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda job: read_frames(*job), jobs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


@pytest.mark.parametrize("matrix, quarters, mirror", [
    ((0, 1, -1, 0), -1, 1), ((-1, 0, 0, -1), 2, 1), ((0, -1, 1, 0), 1, 1), ((-1, 0, 0, 1), 0, -1),
    ((0, 0, 0, 0), 0, 1)])
def test_rotation(media, tmp_path, matrix, quarters, mirror):
    """A display matrix turns and mirrors the frames; place is a place of the upright picture."""
    source = media("h264_b.mp4")
    identity = struct.pack(">5i", 1 << 16, 0, 0, 0, 1 << 16)
    at = source.read_bytes().index(identity, source.read_bytes().index(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    path = patch(source, tmp_path / "turned.mp4", at, ">5i", a, b, 0, c, d)
    upright = np.rot90(decode_all(source)[5], quarters, (1, 2))[:, :, ::mirror]
    assert np.array_equal(read_frames(path, [5])[0], upright)
    x, y = np.array(upright.shape[:0:-1]) // 4 - 12              # a quarter of what is left
    square = read_frames(path, [5], 48, (0.25, 0.25), 1.0)[0].numpy()
    assert np.abs(square - upright[:, y:y + 48, x:x + 48].astype(int)).mean() < 3


def test_exif_orientation(tmp_path):
    """All eight orientations of a photograph, four of which mirror it."""
    jpeg = encode(tmp_path / "plain.jpg", "mjpeg", {}, "yuvj420p", n=1)
    plain = decode_all(jpeg)[0].transpose(1, 2, 0)
    turned = np.rot90(plain, 2)
    upright = [plain, plain[:, ::-1], turned, plain[::-1], plain.swapaxes(0, 1),
               np.rot90(plain, -1), turned.swapaxes(0, 1), np.rot90(plain)]
    for orientation, expected in enumerate(upright, 1):
        tag = struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
        path = tmp_path / f"{orientation}.jpg"
        path.write_bytes(b"\xff\xd8\xff\xe1\0\x22Exif\0\0MM\0*" + tag + jpeg.read_bytes()[2:])
        assert np.array_equal(read_frames(path, [0])[0].permute(1, 2, 0), expected), orientation


def test_frames_are_let_go(media):
    """A converted frame is freed at once: a cycle would keep those of a whole clip."""
    with av.open(str(media("mpeg4.mp4"))) as container:
        frame = next(container.decode(video=0))
    before = sys.getrefcount(frame)
    data._to_rgb(frame, 32, (0.5, 0.5), 1.2)
    assert sys.getrefcount(frame) == before


def test_boxes_are_drawn_before_the_crop(tmp_path):
    """A box is washed with its colour and framed by 3 px. What leaves the picture is cut."""
    path = encode(tmp_path / "one.png", "png", {}, "rgb24", n=1)
    boxes = ((0.25, 0.25, 0.75, 0.75), (0.9, 0.5, 1.2, 1))
    red = np.array((255, 0, 0))
    expected = picture(0).astype(float)
    expected[12:36, 20:60] = red
    expected[15:33, 23:57] = 0.7 * picture(0)[15:33, 23:57] + 0.3 * red
    drawn = read_frames(path, [0], boxes=boxes)
    rgb = drawn[0].permute(1, 2, 0).numpy()
    assert np.abs(rgb - expected)[:, :72].max() <= 0.5
    assert (rgb[24:27, 72:] == rgb[24, 72]).all() and (rgb[24, 72] != red).any()
    square = F.interpolate(drawn[:, :, :40, 40:].float(), (32, 32), mode="bilinear", antialias=True)
    assert (read_frames(path, [0], 32, (1, 0), boxes=boxes) - square).abs().mean() < 0.6


def test_pictures_and_folders(tmp_path):
    """A picture is a clip of one frame. A folder is a clip that opens picked files only."""
    for i in (0, 1, 2, 10):
        encode(tmp_path / f"frame{i}.jpg", "mjpeg", {}, "yuvj420p", n=1, w=40 + 8 * i)
    for name in ("frame3.jpg", ".frame0.jpg", "notes.txt"):
        (tmp_path / name).write_text("not a picture")
    seen = []
    clip = read_frames(tmp_path, lambda times: seen.extend(times) or [4, 1, 1], 16)
    assert seen == [0, 1, 2, 3, 4] and readable(tmp_path)
    for frame, name in zip(clip, ("frame10.jpg", "frame1.jpg")):
        assert torch.equal(frame, read_frames(tmp_path / name, [0], 16)[0])
    with pytest.raises(VideoError, match="frame3.jpg"):
        read_frames(tmp_path, [3])
    with pytest.raises(VideoError, match="size"):
        read_frames(tmp_path, [0, 1])
    alpha = encode(tmp_path / "alpha.png", "png", {}, "rgba", n=1)
    assert np.array_equal(read_frames(alpha, [0])[0], picture(0).transpose(2, 0, 1))


# ---- data: frame sampler, files that lie or are damaged ----

def all_keys(packets):
    for packet in packets:
        packet.is_keyframe = True
    return packets


def swap_times(packets):
    for packet in packets:
        packet.dts -= 100                               # a muxer wants pts >= dts
    packets[20].pts, packets[21].pts = packets[21].pts, packets[20].pts
    return packets


def repeat_times(packets):
    for j, packet in enumerate(packets):
        packet.dts -= 100
        packet.pts = packets[j - 1].pts if j in (20, 21, 40) else packet.pts
    return packets


def drop_pictures(packets):
    """XviD's dropped pictures: vop_coded = 0 after type, time and marker bits."""
    return spoil(packets, (7, 20, 50), lambda payload: payload[:4] + bytes(
        [0b01010000 | payload[4] & 0x0F, payload[5] & 0b10000000 | 0b01011111, 0x7F]))


@pytest.mark.parametrize("source, path, edit", [
    ("h264_b.mp4", "cut.mkv", lambda packets: packets[5:]),
    ("open_gop.ts", "cut.ts", lambda packets: packets[24:]),
    ("mpeg4.mp4", "keys.mp4", all_keys),
    ("hevc.mp4", "keys_hevc.mp4", all_keys),
    ("vp9.webm", "swapped.webm", swap_times),
    ("vp9.webm", "repeated.webm", repeat_times),
    ("mpeg4.mp4", "dropped.avi", drop_pictures)])
def test_lies_of_containers(media, tmp_path, source, path, edit):
    """Cut starts, false key frames and times, dropped pictures: still what decoding gives."""
    check_exact(remux(media(source), tmp_path / path, edit))


def test_wrong_frame_count(media, tmp_path):
    source = media("mpeg4_b.avi")
    at = source.read_bytes().index(b"strh") + 40
    check_exact(patch(source, tmp_path / "count.avi", at, "<I", 999))


def test_edit_list_cuts_frames(media, tmp_path):
    """The first 20 frames are hidden, though others refer to them."""
    source = media("h264_b.mp4")
    at = source.read_bytes().index(b"elst") + 16        # past version, count, duration
    start, = struct.unpack_from(">i", source.read_bytes(), at)
    path = patch(source, tmp_path / "edit.mp4", at, ">i", start + 20 * 512)
    assert len(decode_all(path)) == N - 20
    check_exact(path)


@pytest.mark.parametrize("name", ["mpeg4.avi", "h264_b.mp4", "vp9.webm", "open_gop.ts", "loop.gif"])
def test_single_frame(tmp_path, name):
    check_exact(encode(tmp_path / name, *CLIPS[name], n=1))


def test_size_changes(tmp_path):
    """Frames of two sizes can only be read with a size."""
    parts = [encode(tmp_path / f"{w}.ts", "libx264", {"g": "12"}, n=20, w=w) for w in (80, 96)]
    path = tmp_path / "sizes.ts"
    path.write_bytes(parts[0].read_bytes() + parts[1].read_bytes())
    assert read_frames(path, [2, 30], 32).shape == (2, 3, 32, 32)
    with pytest.raises(VideoError, match="size"):
        read_frames(path, [2, 30])


def pack(packets, announced):
    """XviD's way: a reference and its first B-frame in one packet, an empty packet at the end."""
    start = b"\0\0\1\xb6"
    payloads = [bytes(packet) for packet in packets]
    is_b = [payload[payload.index(start) + 4] >> 6 == 2 for payload in payloads] + [False]
    payloads.append(b"")
    mark = b"\0\0\1\xb2DivX503b1393p" if announced else b""
    for j in range(len(packets)):
        own = b"" if is_b[j] else payloads[j]
        follower = payloads[j + 1] if is_b[j + 1] else b""
        spoil(packets, [j], lambda _: mark * (j == 0) + own + follower or start + b"\x50\x5f\x7f")
    return packets


@pytest.mark.parametrize("name", ["packed.avi", "packed.mkv"])
def test_packed_b_frames(tmp_path, counts, name):
    """Where packing is not announced FFmpeg loses pictures, and so do we."""
    plain = encode(tmp_path / f"plain_{name}", "mpeg4", {"bf": "2", "g": "12"})
    path = remux(plain, tmp_path / name, lambda packets: pack(packets, True))
    truth = decode_all(plain)
    assert np.array_equal(decode_all(path), truth)
    for i in range(N):
        counts.clear()
        assert np.array_equal(read_frames(path, [i])[0], truth[i])
        assert counts["given"] < 45                     # of 60, some are skipped
    path = remux(plain, tmp_path / f"silent_{name}", lambda packets: pack(packets, False))
    assert len(decode_all(path)) < N
    check_exact(path)


@pytest.mark.parametrize("name, keep", [
    ("h264_b.mp4", 0), ("h264_b.mp4", 6), ("h264_long.mkv", 6), ("mpeg4.mp4", 6)])
def test_damaged_packets(media, tmp_path, name, keep):
    """Frames that FFmpeg gives up are refused, all others are those of decoding the file whole."""
    path = remux(media(name), tmp_path / name, lambda packets: spoil(
        packets, (15, 16), lambda payload: payload[:keep] + bytes(range(1, 60))))
    good = []
    for i in range(N):
        with suppress(VideoError):
            good.append(read_frames(path, [i])[0].numpy())
    assert len(good) == N - 2 and np.array_equal(good, decode_all(path))


def test_concealed_damage(media, tmp_path):
    """Where FFmpeg conceals damage, skipping pictures would change what it makes up."""
    halve = lambda payload: payload[:len(payload) // 2].ljust(len(payload), b"U")
    path = remux(media("h264_b.mp4"), tmp_path / "spoilt.mp4",
                 lambda packets: spoil(packets, (14, 20, 40), halve))
    truth = decode_all(path)
    assert len(truth) == N
    assert all(np.array_equal(read_frames(path, [i])[0], truth[i]) for i in range(N))


@pytest.mark.parametrize("name", [
    "h264_long.mkv", "mpeg4.avi", "mpeg4_b.avi", "loop.gif", "open_gop.ts", "vp9.webm"])
def test_truncated(media, tmp_path, name):
    """A file that is cut gives its first frames exactly."""
    path = tmp_path / name
    content = media(name).read_bytes()
    path.write_bytes(content[:len(content) * 8 // 10])
    n = len(times_of(path))
    last = n - 1 if name == "mpeg4.avi" else 7
    truth = np.array(decode_all(media(name)))
    assert 7 < n < N and np.array_equal(read_frames(path, [2, last]), truth[[2, last]])


# ---- data: frame sampler, hostile files ----

def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


HOSTILE = {
    "empty.mp4": b"", "text.mp4": b"hello\n" * 99, "text.jpg": b"hello\n" * 99,
    "text.txt": b"hello\n" * 99, "zeros.avi": bytes(5000),
    "list.mp4": b"ffconcat version 1.0\nfile 'good.mp4'\n",
    "playlist.mp4": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n",
    "bomb.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b";",
    "bomb.png": b"\x89PNG\r\n\x1a\n" + chunk(        # 110 million pixels in 0.1 MB
        b"IHDR", struct.pack(">IIBBBBB", 11000, 10000, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(10000 * 11001))) + chunk(b"IEND", b""),
    "moving.webp": b"RIFF\x2c\0\0\0WEBPVP8X\x0a\0\0\0\2" + bytes(9) + b"ANIM\6\0\0\0" + bytes(6),
}


def sound_only(path, cover):
    """A file of sound, with or without a cover picture."""
    with av.open(str(path), "w") as out:
        sound = out.add_stream("aac", rate=44100)
        if cover:
            video = add_video(out, "png", (), "rgb24")
            video.disposition = av.stream.Disposition.attached_pic
            out.mux(video_packets(video, 1))
        out.mux(sound_packets(sound))


@pytest.mark.parametrize("name", [
    *HOSTILE, "sound.mp4", "cover.mp4", "late.ts", "missing.mp4", "cut.mp4", "folder",
    "http://127.0.0.1:1/a.mp4", "concat:a|b"])
def test_hostile(media, tmp_path, name):
    """Files that hold no frames give one VideoError of one line that names them, at once."""
    path = tmp_path / name if ":" not in name else name
    good = media("h264_b.mp4").read_bytes()
    (tmp_path / "good.mp4").write_bytes(good)
    if name in HOSTILE:
        path.write_bytes(HOSTILE[name])
    elif name in ("sound.mp4", "cover.mp4"):
        sound_only(path, name == "cover.mp4")
    elif name == "late.ts":                             # a stream that its start does not announce
        at = media("open_gop.ts").read_bytes().rindex(b"\x47\x41\0")
        patch(media("open_gop.ts"), path, at + 2, "B", 184)
    elif name == "cut.mp4":                             # its index is at its end
        path.write_bytes(good[:len(good) * 8 // 10])
    elif name == "folder":
        path.mkdir()
    start = time.perf_counter()
    with pytest.raises(VideoError) as error:
        read_frames(path, lambda times: frame_indices(len(times), 3, "eval"), 32)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert time.perf_counter() - start < 5
    assert ("animated WebP" in str(error.value)) == (name == "moving.webp")


def test_odd_names(media, tmp_path, monkeypatch):
    """A name is only a name, with a colon, a pattern or other bytes in it. A pipe is refused."""
    monkeypatch.chdir(tmp_path)
    encode(Path("1.jpg"), "mjpeg", {}, "yuvj420p", n=1)
    other = encode(Path("other.jpg"), "mjpeg", {}, "yuvj420p", n=1, w=96)
    for name in ("concat:a.jpg", "%d.jpg", os.fsdecode(b"\xff.jpg")):
        Path(name).write_bytes(other.read_bytes())
        assert torch.equal(read_frames(name, [0]), read_frames(other, [0]))
    os.mkfifo("pipe.mp4")
    refused = lambda: pytest.raises(VideoError, read_frames, "pipe.mp4", [0])
    reader = threading.Thread(target=refused, daemon=True)
    reader.start()
    reader.join(5)
    assert not reader.is_alive()


def test_bombs_are_not_decoded_by_opening(tmp_path):
    """FFmpeg decodes a picture to learn what it is; the limit must hold there too."""
    (tmp_path / "bomb.png").write_bytes(HOSTILE["bomb.png"])
    with av.open(str(tmp_path / "bomb.png"), options=data.OPEN_OPTIONS) as container:
        assert container.streams.video[0].codec_context.pix_fmt is None


# ---- data: frame sampler, kept listings ----

@pytest.fixture
def large(monkeypatch):
    """All files count as large."""
    monkeypatch.setattr(data, "LARGE_FILE", 0)


@pytest.mark.parametrize("name", [
    "h264_b.mp4", "h264_long.mkv", "open_gop.ts", "vp9.webm", "mpeg4_b.avi", "h264_b.avi",
    "mpeg2.mpg", "vp8.webm", "loop.gif"])
def test_large_files_are_exact(media, tmp_path, large, name):
    """On the first visit, on later ones, and in files that cannot seek."""
    check_exact(media(name))
    check_exact(media(name), listings=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["h264_b.mp4", "open_gop.ts", "mpeg4.avi", "vp9.webm"])
def test_later_visits_read_little(media, tmp_path, large, counts, name):
    """The first visit lists all packets and seeks, a later one only seeks."""
    first = read_frames(media(name), [50], 32, listings=tmp_path)
    assert counts["read"] < N + 25
    counts.clear()
    assert torch.equal(read_frames(media(name), [50], 32, listings=tmp_path), first)
    assert counts["read"] < 25


def test_workers_may_write_the_same_listing(media, tmp_path, large):
    read = lambda _: read_frames(media("h264_b.mp4"), [50], 32, listings=tmp_path)
    with ThreadPoolExecutor(4) as pool:
        clips = list(pool.map(read, range(8)))
    assert all(torch.equal(clip, clips[0]) for clip in clips)
    assert [file.suffix for file in tmp_path.iterdir()] == [".npz"]


def test_unknown_orders_are_counted_once(media, tmp_path, counts):
    """A small file too keeps its listing, if only decoding shows how many frames it has."""
    for given in (N + 21, 21):
        counts.clear()
        read_frames(media("vp8.webm"), [20], listings=tmp_path)
        assert counts["given"] == given
    read_frames(media("mpeg4.mp4"), [20], listings=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_listing_of_another_file(media, tmp_path, large):
    """Packets that differ from the listing are a doubt: the frames are right all the same."""
    read_frames(media("mpeg4.mp4"), [50], listings=tmp_path)
    file, = tmp_path.iterdir()
    file.rename(data._listing_file(media("h264_b.mp4"), tmp_path))
    check_exact(media("h264_b.mp4"), listings=tmp_path)


def test_damaged_listings_are_written_anew(media, tmp_path, large):
    """Empty, cut, overwritten or pickled: a listing that cannot be read is replaced."""
    read = lambda: read_frames(media("h264_b.mp4"), [50], 32, listings=tmp_path)
    right = read()
    file, = tmp_path.iterdir()
    good = file.read_bytes()
    half = len(good) // 2
    for content in (b"", good[:-9], good[:half] + bytes(9) + good[half + 9:], pickle.dumps(right)):
        file.write_bytes(content)
        assert torch.equal(read(), right)
        assert np.load(file)["pts"].shape == (N,)


def test_listings_that_cannot_be_written(media, tmp_path, large, monkeypatch):
    """A folder that cannot be written keeps nothing. A full disk is an error."""
    def full(*paths):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(data.UserError, match="No space left"):
        read_frames(media("h264_b.mp4"), [0], listings=tmp_path)
    monkeypatch.setattr(os, "access", lambda *args: False)
    read_frames(media("h264_b.mp4"), [0], listings=tmp_path)
    assert not list(tmp_path.iterdir())


CASES = Path(__file__).resolve().parent.parent / "shared/cases"         # not part of the project


def table(text):
    """The cells of a table written as text: one line a row, | between cells."""
    rows = []
    for line in text.strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        rows.append([int(cell) if cell.lstrip("-").isdigit() else cell for cell in cells])
    return rows


@contextlib.contextmanager
def one_line(cause):
    """What is done inside is a user's mistake: a UserError of one line, which matches `cause`."""
    with pytest.raises(UserError, match=cause) as error:
        yield
    assert "\n" not in str(error.value)


# ---- data: the benchmarks ------------------------------------------------------------------------

USUAL = ("epochs=0 steps=0 head_lr=1 warmup=0 text_length=40 frames=3 views=1 "
         "option_format=options")


@pytest.mark.parametrize("name, recipe", table("""
msrvtt-qa       | task=vqa heads=answer batch=512 epochs=20 lr=0.0001 head_lr=10 answers=1500
msvd-qa         | task=vqa heads=answer batch=512 epochs=20 lr=0.0001 head_lr=10 answers=1000
tgif-frame      | task=vqa heads=answer batch=512 epochs=20 lr=0.0001 head_lr=10 answers=1540
tgif-action     | task=choice heads=mc batch=512 epochs=100 lr=0.0001 head_lr=10
tgif-transition | task=choice heads=mc batch=512 epochs=100 lr=0.0001 head_lr=10
tvqa            | task=choice heads=mc batch=512 epochs=100 lr=0.0001 head_lr=10 text_length=100
msrvtt-mc       | task=choice heads=rank batch=256 epochs=10 lr=0.0001
lsmdc-mc        | task=choice heads=rank batch=256 epochs=20 lr=1e-05
ego4d-mc        | task=choice heads=rank batch=256 epochs=10 lr=0.0001
vcr             | task=vcr heads=rank,rank2 batch=256 epochs=200 frames=1 option_format=pair
msrvtt          | task=retrieval heads=contrast batch=1024 epochs=200 lr=0.0003 views=3
msrvtt          | epochs=200 views=3 negatives=15 vtm=False
activitynet     | task=retrieval heads=contrast batch=1024 epochs=200 lr=0.0003 views=3
didemo          | heads=contrast batch=1024 epochs=200 lr=0.0006 views=3 text_length=80
lsmdc           | heads=contrast batch=1024 epochs=50 lr=0.0001 views=3 text_length=80
lsmdc           | epochs=50 views=3 text_length=80 negatives=10 vtm=True
hmdb51          | task=action heads=answer batch=256 epochs=50 lr=0.0001 answers=51
k400            | task=action heads=answer batch=256 epochs=50 lr=0.0003 answers=400 frames=8
webvid          | task=pretrain heads=matching,mlm batch=1024 steps=200000 lr=0.0001 warmup=2500
howto100m       | task=pretrain heads=matching,mlm batch=4096 steps=200000 lr=0.0001 warmup=2500
"""))
def test_recipes_are_the_released_ones(name, recipe):
    benchmark = replace(BENCHMARKS[name], heads=",".join(BENCHMARKS[name].heads))
    expected = dict(setting.split("=") for setting in f"{USUAL} {recipe}".split())
    assert {field: str(getattr(benchmark, field)) for field in expected} == expected


@pytest.mark.parametrize("name, rerun, paper", table("""
msrvtt-qa       | 42.9               | 42.5
msvd-qa         | 46.1               | 46.5
tgif-frame      | 65.0               | 64.0
tgif-action     | 93.0               | 92.5
tgif-transition | 93.0               | 92.5
lsmdc-mc        | 56.7 zero-shot     | 56.3 zero-shot
msrvtt-mc       | 78.1 zero-shot     | 77.5 zero-shot
ego4d-mc        | 36.5 zero-shot     | 36.5 zero-shot
hmdb51          | 51.2               | 50.8
k400            | 52.3               | 50.8
msrvtt          | VTC 35.6/62.8/71.3 | VTC 36.1/62.3/72.1
msrvtt          | VTC + VTM 35.4/67.0/77.6 | VTC + VTM 37.1/66.7/75.9
msrvtt          | co-trained VTC 41.8/68.5/76.7 |
"""))
def test_published_figures(name, rerun, paper):
    assert rerun in BENCHMARKS[name].rerun
    assert paper in BENCHMARKS[name].paper


# ---- data: the manifest --------------------------------------------------------------------------

QUESTION = {"id": "7", "video": "a.mp4", "question": "what is it?", "answer": "ein Würfel"}
CAPTION = {"id": "8", "video": "b.mp4", "caption": "a red ring"}


def write_rows(folder, rows, split="train"):
    """Write rows (dicts, or lines as they are), without a newline at the end of the file."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def open_rows(folder, rows):
    return Manifest(write_rows(folder, rows), "train")


def write_info(folder, **info):
    """Make it a prepared folder, whose rows are checked only when they are read."""
    (folder / "dataset.json").write_text(json.dumps({"root": "/media", "prepared": {}, **info}))


def test_rows_come_back_as_written(tmp_path):
    """Blank lines are no rows, and the last line needs no newline."""
    as_text = json.dumps(QUESTION, ensure_ascii=False)
    rows = open_rows(tmp_path, ["", as_text, "", "", QUESTION])
    assert len(rows) == 2
    assert rows[1] == rows[0] == QUESTION


def test_rows_are_read_when_asked_for(tmp_path):
    """In memory is one number a row. A mistake in a prepared row shows when the row is read."""
    write_info(tmp_path)
    rows = open_rows(tmp_path, [QUESTION, "nonsense", CAPTION])
    assert rows.offsets.nbytes == 8 * 3
    assert rows[2] == CAPTION
    with one_line("train.jsonl, row 2"):
        rows[1]


def test_offsets_are_kept_until_the_file_changes(tmp_path):
    folder = write_rows(tmp_path, [CAPTION] * 2)
    Manifest(folder, "train")
    kept = tmp_path / "train.jsonl.offsets.npy"
    np.save(kept, np.load(kept)[:-1])           # one row less shows that this file is used
    assert len(Manifest(folder, "train")) == 1
    write_rows(tmp_path, [CAPTION] * 3)
    assert len(Manifest(folder, "train")) == 3
    kept.write_bytes(b"PK\3\4 damaged")
    assert len(Manifest(folder, "train")) == 3


def test_crc_changes_with_a_row(tmp_path):
    folder = write_rows(tmp_path, [QUESTION, QUESTION])
    crc = Manifest(folder, "train").crc
    assert Manifest(folder, "train").crc == crc
    write_rows(tmp_path, [QUESTION, QUESTION | {"id": "8"}])
    os.utime(tmp_path / "train.jsonl", (0, 0))
    assert Manifest(folder, "train").crc != crc


def test_a_folder_that_cannot_be_written_can_be_read(tmp_path, monkeypatch):
    def open_read_only(path, mode="r", **more):
        if "w" in mode:
            raise PermissionError
        return open(path, mode, **more)

    monkeypatch.setattr(data, "open", open_read_only, raising=False)
    assert len(open_rows(tmp_path, [CAPTION] * 2)) == 2
    assert os.listdir(tmp_path) == ["train.jsonl"]


def test_each_process_opens_its_own_file(tmp_path):
    """Processes that share an open file share its position, and would read each other's rows."""
    rows = open_rows(tmp_path, [QUESTION])
    file = rows.file
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    child = fork.Process(target=lambda: queue.put([rows[0], rows.file is file]))
    child.start()
    assert queue.get() == [QUESTION, False]
    child.join()
    assert pickle.loads(pickle.dumps(rows))[0] == QUESTION


def test_own_data_needs_no_dataset_json(tmp_path):
    """The folder is the root, rows are numbered from 1, and a path may be absolute."""
    absolute = {"video": "/clips/a.mp4", "label": 3}
    rows = open_rows(tmp_path, [absolute] * 2)
    assert rows.root == str(tmp_path)
    assert rows[1] == absolute | {"id": "2"}


@pytest.mark.parametrize("cause, line", table(r"""
Expecting | {"video"
Expecting | nonsense
fields    | ["a.mp4", "what?", "red"]
fields    | {"video": "a.mp4", "caption": "a ring", "vidoe": "b.mp4"}
video     | {"caption": "a ring"}
video     | {"caption": "a ring", "video": ""}
video     | {"caption": "a ring", "video": 5}
video     | {"caption": "a ring", "video": "clips/../../a.mp4"}
video     | {"caption": "a ring", "video": "a\u0000.mp4"}
video     | {"caption": "a ring", "video": "a\ud800.mp4"}
a row has | {"video": "a.mp4"}
a row has | {"video": "a.mp4", "question": "what?"}
a row has | {"video": "a.mp4", "question": " ", "answer": "red"}
a row has | {"video": "a.mp4", "question": "what?", "answer": 1}
a row has | {"video": "a.mp4", "question": "what \ud800?", "answer": "red"}
a row has | {"video": "a.mp4", "options": ["red"], "answer": 0}
a row has | {"video": "a.mp4", "options": "red", "answer": 0}
a row has | {"video": "a.mp4", "options": ["red", 5], "answer": 0}
a row has | {"video": "a.mp4", "options": ["red", "blue"]}
a row has | {"video": "a.mp4", "options": ["red", "blue"], "answer": 2}
a row has | {"video": "a.mp4", "options": ["red", "blue"], "answer": -1}
a row has | {"video": "a.mp4", "options": ["red", "blue"], "answer": true}
a row has | {"video": "a.mp4", "options": ["red", "blue"], "answer": "red"}
a row has | {"video": "a.mp4", "options": ["red", "blue"], "answer": 1, "question": null}
a row has | {"video": "a.mp4", "options": ["red", "blue"], "answer": 1, "question": "\ud800"}
a row has | {"video": "a.mp4", "caption": ""}
a row has | {"video": "a.mp4", "captions": []}
a row has | {"video": "a.mp4", "captions": ["a ring", ""]}
a row has | {"video": "a.mp4", "captions": "a ring"}
a row has | {"video": "a.mp4", "label": -1}
a row has | {"video": "a.mp4", "label": true}
a row has | {"video": "a.mp4", "label": "3"}
a row has | {"video": "a.mp4", "label": 9999999999999999999}
id        | {"video": "a.mp4", "label": 3, "id": 5}
question_ | {"video": "a.mp4", "label": 3, "question_type": ["what"]}
seconds   | {"video": "a.mp4", "label": 3, "seconds": [2, 1]}
seconds   | {"video": "a.mp4", "label": 3, "seconds": [-1, 1]}
seconds   | {"video": "a.mp4", "label": 3, "seconds": [0, NaN]}
seconds   | {"video": "a.mp4", "label": 3, "seconds": [0, Infinity]}
seconds   | {"video": "a.mp4", "label": 3, "seconds": [0, 1, 2]}
frames    | {"video": "a.mp4", "label": 3, "frames": 5}
frames    | {"video": "a.mp4", "label": 3, "frames": ["0", "9"]}
boxes     | {"video": "a.mp4", "label": 3, "boxes": 5}
boxes     | {"video": "a.mp4", "label": 3, "boxes": [[0, 0, 1]]}
boxes     | {"video": "a.mp4", "label": 3, "boxes": [[0, 0, 1, NaN]]}
boxes     | {"video": "a.mp4", "label": 3, "boxes": [[0, 0, 1, 640]]}
row 1     | {"video": "a.mp4", "question": "what?", "answer": "red"}
"""))
def test_a_malformed_row_is_one_line(cause, line, tmp_path):
    good = {"video": "a.mp4", "label": 3}
    with one_line(f"train.jsonl, row 2: .*{cause}"):
        open_rows(tmp_path, [good, line])


@pytest.mark.parametrize("cause, content", table("""
cannot be read | {"root": "/media"
cannot be read |
no root folder | ["/media"]
no root folder | {"benchmark": "msrvtt"}
no root folder | {"root": 5}
is unknown     | {"root": "/media", "benchmark": "msrvtt-qqq"}
is unknown     | {"root": "/media", "benchmark": null}
is unknown     | {"root": "/media", "benchmark": ["msrvtt"]}
"""))
def test_a_damaged_dataset_json_is_one_line(cause, content, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with one_line(f"dataset.json.*{cause}"):
        manifest_info(str(tmp_path))


def test_a_folder_without_data_names_the_next_command(tmp_path):
    with one_line("tools/prepare.py"):
        manifest_info(str(tmp_path))
    with one_line("val.jsonl .*tools/prepare.py"):
        Manifest(write_rows(tmp_path, [CAPTION]), "val")
    with one_line("train.jsonl has no rows"):
        benchmark_of(write_rows(tmp_path, [""]))
    (tmp_path / "val.jsonl").mkdir()
    with one_line("val.jsonl cannot be read"):
        Manifest(str(tmp_path), "val")
    (tmp_path / "dataset.json").mkdir()
    with one_line("dataset.json cannot be read"):
        manifest_info(str(tmp_path))


def test_a_prepared_folder_is_for_the_task_of_its_benchmark(tmp_path):
    write_info(tmp_path, benchmark="tvqa")
    assert benchmark_of(str(tmp_path)) == ("tvqa", BENCHMARKS["tvqa"])
    assert benchmark_of(str(tmp_path), "choice")[0] == "tvqa"
    with one_line("for --task choice, not vqa"):
        benchmark_of(str(tmp_path), "vqa")


@pytest.mark.parametrize("like, task, row", table("""
msrvtt-qa   |          | {"video": "a.mp4", "question": "what?", "answer": "red"}
tgif-action |          | {"video": "a.mp4", "options": ["red", "blue"], "answer": 0}
vcr         | vcr      | {"video": "a.mp4", "options": ["red", "blue"], "answer": 0}
msrvtt      |          | {"video": "a.mp4", "captions": ["a ring"]}
webvid      | pretrain | {"video": "a.mp4", "caption": "a ring"}
hmdb51      |          | {"video": "a.mp4", "label": 0}
"""))
def test_own_data_follows_the_recipe_of_a_benchmark(like, task, row, tmp_path):
    name, own = benchmark_of(write_rows(tmp_path, [row], "test"), task or None)
    assert name == tmp_path.name
    assert own == BENCHMARKS[like]


def test_answers_of_own_data_are_counted(tmp_path):
    """The most frequent first, equals in alphabetical order. An answers.txt is taken as it is."""
    rows = [QUESTION | {"answer": answer} for answer in "bdccabc"]
    assert read_answers(write_rows(tmp_path, rows)) == ["c", "b", "a", "d"]
    write_rows(tmp_path, [{"video": "a.mp4", "label": 1}])
    assert read_answers(str(tmp_path)) == ["class 0", "class 1"]
    (tmp_path / "answers.txt").write_text("d\nein Würfel\n", encoding="utf-8")
    assert read_answers(str(tmp_path)) == ["d", "ein Würfel"]


@pytest.mark.parametrize("content, cause", [
    (b"", "empty"),
    (b"red\n\nblue\n", "empty"),
    (b"red\nblue\nred\n", "repeats"),
    (b"red\n\xff\n", "cannot be read")])
def test_a_damaged_answers_txt_is_one_line(content, cause, tmp_path):
    (tmp_path / "answers.txt").write_bytes(content)
    with one_line(f"answers.txt .*{cause}"):
        read_answers(str(tmp_path))


# ---- data: words into tokens ---------------------------------------------------------------------

WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] a red blue ring square mov ##es left what is it ? options "
         ": answer person doing ##s").split()
VOCABULARY = {word: i for i, word in enumerate(WORDS)}
TOKENIZER = Tokenizer(wordpiece(VOCABULARY))


def spell(ids):
    return " ".join(WORDS[i] for i in ids)


def load_vocabulary(folder, words):
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return Tokenizer.load(str(folder / "vocab.txt"))


@pytest.mark.parametrize("text, L, expected", table("""
A RED ring | 40 | [CLS] a red ring [SEP]
a red ring | 4  | [CLS] a red [SEP]
moves?     | 40 | [CLS] mov ##es ? [SEP]
mauve      | 40 | [CLS] [UNK] [SEP]
           | 40 | [CLS] [SEP]
"""))
def test_a_text_is_cut_to_L_tokens(text, L, expected):
    assert spell(TOKENIZER.encode(text, L)) == expected


def test_a_file_cannot_ask_for_padding_or_truncation():
    """[PAD] would be read as a word."""
    foreign = wordpiece(VOCABULARY)
    foreign.enable_padding(length=20)
    foreign.enable_truncation(3)
    loaded = Tokenizer.from_json(foreign.to_str())
    assert spell(loaded.encode("what is it?", 40)) == "[CLS] what is it ? [SEP]"


@pytest.mark.skipif(not CASES.exists(), reason="needs ../shared/cases")
def test_padding_of_a_real_file_is_switched_off():
    padded = Tokenizer.load(str(CASES / "tokenizer_padding/tokenizer.json"))
    assert len(padded.encode("what shape is it?", 40)) == 7


def test_a_cased_vocabulary_stays_cased(tmp_path):
    cased = load_vocabulary(tmp_path, [*WORDS, "Café", "The"])
    assert cased.tokenizer.decode(cased.ids("The Café is red")) == "The Café is red"


def test_size_is_the_largest_id_plus_one(tmp_path):
    """A vocabulary that repeats a line has fewer words than ids."""
    repeated = load_vocabulary(tmp_path, [*WORDS, "red", "blue"])
    assert len(repeated) == len(WORDS) + 2


@pytest.mark.parametrize("name, content, cause", [
    ("bad.json", b"{", "bad.json: EOF .*; give a tokenizer.json, a vocab.txt or a hub name"),
    ("bad.txt", b"\xff\xfe", "bad.txt: .* UTF-8; give a tokenizer.json"),
    ("few.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nred", "lacks some of .*MASK")])
def test_a_damaged_tokenizer_is_one_line(name, content, cause, tmp_path):
    (tmp_path / name).write_bytes(content)
    with one_line(cause):
        Tokenizer.load(str(tmp_path / name))


def test_a_tokenizer_travels(tmp_path):
    """To workers by pickle, into checkpoints as text, between projects as vocab.txt."""
    with one_line("the checkpoint's tokenizer is damaged"):
        Tokenizer.from_json("{")
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.to_json())
    for same in (pickle.loads(pickle.dumps(TOKENIZER)), load_vocabulary(tmp_path, WORDS),
                 Tokenizer.load(str(tmp_path / "tokenizer.json"))):
        assert spell(same.encode("[MASK] moves?", 9)) == "[CLS] [MASK] mov ##es ? [SEP]"


@pytest.mark.parametrize("option_format, question, L, first, second", table("""
options | what is it? | 18 | what is it ? options : a ring red answer : a ring | answer : red
options | what is it? | 12 | what options : a ring red answer : a ring         | answer : red
options | what is it? | 7  | red answer : a ring                               | answer : red
options | what is it? | 3  | ring                                              | red
pair    | what is it? | 9  | what is it ? [SEP] a ring                         | [SEP] red
pair    | what is it? | 5  | [SEP] a ring                                      | what [SEP] red
options |             | 9  | a ring                                            | red
"""))
def test_an_option_is_kept_and_its_question_cut_first(option_format, question, L, first, second):
    texts = TOKENIZER.encode_options(question, ["a ring", "red"], option_format, L)
    assert spell(texts[0]) == f"[CLS] {first} [SEP]"
    assert spell(texts[1]).endswith(f"{second} [SEP]")
    assert len(texts[1]) <= L


def test_options_are_tokenized_once_for_all_texts(monkeypatch):
    """A thousand options cost a thousand short calls, not a thousand times all options."""
    calls = []
    ids = TOKENIZER.ids
    monkeypatch.setattr(TOKENIZER, "ids", lambda text: calls.append(text) or ids(text))
    options = ["a red ring"] * 1000
    TOKENIZER.encode_options("what is it?", options, "options", 40)
    assert len(calls) <= len(options) + 2
    assert sum(map(len, calls)) < 4 * len(str(options))


def mask(text, share=0.15, L=50, seed=0):
    """(plain ids, masked ids, labels) as arrays."""
    ids, labels = TOKENIZER.mask_words(text, L, np.random.default_rng(seed), share)
    return np.array([TOKENIZER.encode(text, L), ids, labels])


def test_masking_takes_whole_words():
    """15 % of 20 words of two tokens: three words. Labels are the ids of their tokens."""
    plain, ids, labels = mask("moves rings " * 10)
    asked = labels >= 0
    assert sorted(asked[1:-1].reshape(20, 2).sum(axis=1)) == [0] * 17 + [2] * 3
    assert (labels[asked] == plain[asked]).all()
    assert (ids[~asked] == plain[~asked]).all()


@pytest.mark.parametrize("text, L, tokens", table("""
red           | 50 | 1
moves         | 50 | 2
red ring ring | 4  | 1
              | 50 | 0
"""))
def test_masking_takes_at_least_one_word(text, L, tokens):
    _, _, labels = mask(text, 0.01, L)
    assert (labels >= 0).sum() == tokens


def test_masked_tokens_are_replaced_80_10_10():
    runs = [mask("red " * 40, 1, seed=seed)[:, 1:-1] for seed in range(50)]
    plain, ids, _ = np.concatenate(runs, axis=1)
    assert (ids == TOKENIZER.mask).mean() == pytest.approx(0.8, abs=0.03)
    assert (ids == plain).mean() == pytest.approx(0.1, abs=0.03)
    assert set(ids) == set(range(len(WORDS)))                   # any token may stand there


# ---- data: rows into model inputs ----------------------------------------------------------------


@pytest.fixture
def clip_folder(tmp_path):
    """A folder with a tiny video a.mp4: 12 frames of noise, 10 a second."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 48, 3), np.uint8)
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=10, width=48, height=32)
        for picture in noise:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        out.mux(stream.encode())
    return tmp_path


def dataset(folder, rows, task="vqa", train=False, seed=0, frames=3, views=1, negatives=0):
    """The rows as a data set of clips of 16 x 16 pixels."""
    benchmark = replace(BENCHMARKS[data.OWN[task]], frames=frames, views=views)
    config = Config(image=16, frames=frames, text_length=20)
    spec = InputSpec(benchmark, config, TOKENIZER, ["red", "blue"], negatives)
    return VideoTextDataset(write_rows(folder, rows), "train", spec, train, seed)


LOST = QUESTION | {"id": "lost", "video": "missing.mp4"}


def test_what_training_draws_depends_on_seed_epoch_and_index_alone(tmp_path, monkeypatch):
    """Three frame numbers, and the place of the crop."""
    def read(path, pick, size, place, **more):
        return torch.tensor([*pick(np.arange(50)), *place])

    monkeypatch.setattr(data, "read_frames", read)
    clips = dataset(tmp_path, [QUESTION] * 2, train=True)
    other_seed = dataset(tmp_path, [QUESTION] * 2, train=True, seed=1)
    items = [clips[0, 0], clips[0, 1], clips[1, 0], other_seed[0, 0], clips[0, 0]]
    draws = torch.stack([item["frames"] for item in items])
    assert len(draws.unique(dim=0)) == 4        # the last is the first again
    assert draws.std(dim=0).all()


def test_evaluation_takes_the_middle_of_equal_segments(clip_folder):
    clips = dataset(clip_folder, [QUESTION] * 2)
    middle = read_frames(clip_folder / "a.mp4", [2, 6, 10], 16)
    assert torch.equal(clips[0, 0]["frames"], middle)
    assert torch.equal(clips[5, 1]["frames"], middle)


def test_views_are_an_axis_in_evaluation_only(clip_folder):
    views = dataset(clip_folder, [QUESTION], frames=2, views=3)[0, 0]["frames"]
    assert len(views) == 3
    assert torch.equal(views[1], read_frames(clip_folder / "a.mp4", [3, 9], 16))
    train = dataset(clip_folder, [QUESTION], train=True, views=3)
    assert train.views == 1                     # what check_shared_memory counts
    assert train[0, 0]["frames"].shape == (3, 3, 16, 16)


@pytest.mark.parametrize("part, views, picked, first, last", table("""
{}                        | 1 | [5, 15]         | 0  | 19
{"seconds": [0.5, 1.4]}   | 1 | [7, 12]         | 5  | 14
{"seconds": [0.52, 0.58]} | 1 | [5, 5]          | 5  | 5
{"seconds": [5, 9]}       | 1 | [19, 19]        | 19 | 19
{"frames": [3, 6]}        | 1 | [4, 6]          | 3  | 6
{"frames": [18, 99]}      | 1 | [18, 19]        | 18 | 19
{}                        | 2 | [2, 12, 7, 17]  | 0  | 19
{"frames": [4, 11]}       | 2 | [5, 9, 7, 11]   | 4  | 11
"""))
def test_frames_come_from_the_part_of_the_clip(part, views, picked, first, last):
    """Of 20 frames, 10 a second. Training draws from all frames of the part. View v has every
    V-th of V * T even frames, from the v-th on. Beyond the end is the last frame."""
    times = np.arange(20) / 10
    row = json.loads(part)
    assert str(pick_frames(times, row, 2, views, None)) == picked
    drawn = set()
    for seed in range(200):
        drawn.update(pick_frames(times, row, 2, 1, np.random.default_rng(seed)))
    assert drawn == set(range(first, last + 1))


@pytest.mark.parametrize("task, row, text, target", table("""
vqa       | {"question": "What is it?", "answer": "blue"}  | what is it ?             | 1
vqa       | {"question": "What is it?", "answer": "mauve"} | what is it ?             | -1
action    | {"label": 1}                                   | a person is doing [MASK] | 1
retrieval | {"captions": ["red", "blue"]}                  | red                      | 0
choice    | {"options": ["red", "blue"], "answer": 1}      | red [SEP] [CLS] blue     | 1
vcr       | {"options": ["red", "blue"], "answer": 1}      | red [SEP] [CLS] blue     | 1
"""))
def test_what_each_task_reads_and_what_is_right(task, row, text, target, tmp_path):
    clips = dataset(tmp_path, [{"video": "a.mp4", **json.loads(row)}], task)
    item = clips.text(clips.rows[0], None)
    assert spell(sum(item["texts"], [])) == f"[CLS] {text} [SEP]"
    assert item["target"] == target
    assert not item.get("is_rationale")


def test_vcr_marks_the_question_for_a_reason(tmp_path):
    row = {"video": "a.mp4", "question": "what?", "question_type": "QA->R",
           "options": ["red", "blue"], "answer": 1}
    item = dataset(tmp_path, [row], "vcr").text(row, None)
    assert item["is_rationale"]
    assert spell(item["texts"][1]) == "[CLS] what ? [SEP] blue [SEP]"


CAPTIONS = [{"video": "a.mp4", "captions": ["red ring", "a ring"]},
            {"video": "b.mp4", "captions": ["red ring", "blue square"]},
            {"video": "c.mp4", "caption": "what is left"}]
OWN = {"red ring", "a ring"}                            # captions of row 0
OTHERS = {"blue square", "what is left"}                # captions that it does not have


def draw_texts(clips):
    """(texts, item) of row 0, drawn many times."""
    for seed in range(100):
        item = clips.text(clips.rows[0], np.random.default_rng(seed))
        yield [spell(ids[1:-1]) for ids in item["texts"]], item


def test_retrieval_draws_a_caption_and_wrong_ones(tmp_path):
    clips = dataset(tmp_path, CAPTIONS, "retrieval", train=True, negatives=1)
    drawn = [texts for texts, _ in draw_texts(clips)]
    right, wrong = zip(*drawn)
    assert set(right) == OWN
    assert set(wrong) == OTHERS


def test_pretraining_reads_a_text_to_match_a_masked_one_and_the_caption(tmp_path):
    """Half of the texts to match are captions of another clip and not of this one."""
    clips = dataset(tmp_path, CAPTIONS, "pretrain", train=True)
    targets = []
    for (to_match, _, caption), item in draw_texts(clips):
        targets.append(item["target"])
        assert caption in OWN
        assert to_match in (OWN if item["target"] else OTHERS)
        labels = np.array(item["labels"])
        filled = np.where(labels >= 0, labels, item["texts"][1])
        assert filled.tolist() == item["texts"][2]
    assert 35 < sum(targets) < 65


def test_pretraining_is_the_same_in_every_evaluation(tmp_path):
    clips = dataset(tmp_path, CAPTIONS, "pretrain")
    assert clips.text(clips.rows[0], None) == clips.text(clips.rows[0], None)


def test_pretraining_without_another_caption_ends(tmp_path):
    """Every text matches, as no other caption can be drawn."""
    clips = dataset(tmp_path, CAPTIONS[:1] * 2, "pretrain", train=True)
    assert {item["target"] for _, item in draw_texts(clips)} == {1}


def test_an_unreadable_training_clip_gives_the_next_row(clip_folder):
    (clip_folder / "broken.mp4").write_bytes(b"broken" * 99)
    rows = [QUESTION, QUESTION | {"video": "broken.mp4"}, LOST]
    item = dataset(clip_folder, rows, train=True)[0, 1]
    assert item["index"] == 0
    assert list(item["errors"]) == ["7", "lost"]


def test_an_unreadable_clip_is_not_replaced_in_evaluation(clip_folder):
    item = dataset(clip_folder, [LOST, QUESTION])[0, 0]
    assert item.keys() == {"index", "errors"}
    assert "missing.mp4" in item["errors"]["lost"]


def test_rows_of_another_task_are_refused(tmp_path):
    with one_line("rows are for vqa, not for choice"):
        dataset(tmp_path, [QUESTION], "choice")
    with one_line("has no rows"):
        dataset(tmp_path, [])


def test_a_label_beyond_the_answer_list_is_one_line(tmp_path):
    clips = dataset(tmp_path, [{"video": "a.mp4", "label": 2}], "action")
    with one_line("has label 2, the answer list 2 classes"):
        clips.text(clips.rows[0], None)


def test_mixed_datasets_keep_their_own_frames(clip_folder):
    part = dataset(clip_folder, [QUESTION] * 2, frames=1)
    item = MixedDataset([dataset(clip_folder, [QUESTION] * 2), part])[1, 0, 1]
    assert item["index"] == 1
    assert torch.equal(item["frames"], part[0, 1]["frames"])


# ---- data: batches -------------------------------------------------------------------------------


def batches(count, accum=1, seed=5, **more):
    """Parts of 10 and 7 rows: an epoch is two batches of four of the first, one of the second."""
    sampler = BatchSampler([10, 7], 4, seed, accum, **more)
    return list(itertools.islice(sampler, count * accum))


@pytest.mark.parametrize("start", [1, 3, 8])
def test_any_step_can_be_reached_again(start):
    pieces = batches(15, accum=2)
    assert batches(5, accum=2, start=start) == pieces[2 * start:2 * start + 10]
    assert batches(15, accum=2, seed=6) != pieces


def test_an_epoch_takes_rows_once_and_leaves_out_the_last_short_batch():
    orders = {}
    for epoch in range(5):
        parts, epochs, rows = zip(*sum(batches(3, start=3 * epoch), []))
        assert sorted([parts[:4], parts[4:8], parts[8:]]) == [(0,) * 4, (0,) * 4, (1,) * 4]
        assert set(epochs) == {epoch}
        assert len(set(zip(parts, rows))) == 12
        orders[rows] = parts
    assert len(orders) == 5
    assert len(set(orders.values())) > 1        # the part with one batch has no fixed place


@pytest.mark.parametrize("world, accum", [(1, 4), (2, 2), (2, 1)])
def test_pieces_of_all_processes_make_up_the_batch(world, accum):
    """The n-th pieces of all processes follow one another."""
    ranks = [batches(6, accum, rank=rank, world=world) for rank in range(world)]
    pieces = sum(zip(*ranks), ())
    assert sum(pieces, []) == sum(batches(6), [])


def make_item(*texts, **more):
    return {"index": 3, "errors": {}, "frames": torch.zeros(2, 3, 4, 4), "texts": texts, **more}


def test_texts_are_padded_to_the_longest_of_the_batch():
    """A clip with fewer options than others has options without any word."""
    batch = collate([make_item([5, 6], [7]), make_item([8])], pad=9)
    assert batch["input_ids"].tolist() == [[[5, 6], [7, 9]], [[8, 9], [9, 9]]]
    assert torch.equal(batch["attention_mask"], batch["input_ids"] != 9)


def test_masked_tokens_are_named_by_their_place_in_the_batch():
    items = [make_item([5, 6, 7], labels=[-1, 4, 4]), make_item([5, 6], labels=[-1, 8])]
    batch = collate(items, pad=9)
    assert batch["masked"].tolist() == [1, 2, 4]
    assert batch["labels"].tolist() == [4, 4, 8]


def test_a_batch_holds_the_readable_clips_and_all_errors():
    lost = {"index": 0, "errors": {"a": "broken"}}
    batch = collate([lost, make_item([5])], pad=9)
    assert batch["index"].tolist() == [3]
    assert batch["errors"] == {"a": "broken"}
    assert collate([lost], pad=9) == {"errors": {"a": "broken"}}


def test_workers_change_no_batch(clip_folder):
    clips = dataset(clip_folder, [QUESTION, QUESTION, QUESTION, LOST], train=True)
    keys = [[(0, 0), (0, 3)], [(1, 2), (1, 1)], [(2, 2)]]
    alone = make_loader(clips, keys, workers=0, pad=0)
    for batch, other in zip(alone, make_loader(clips, keys, workers=2, pad=0), strict=True):
        assert batch["errors"] == other["errors"]
        assert torch.equal(batch["frames"], other["frames"])


class Signalled(list):
    """A data set whose workers get a signal, the key, while they read."""

    def __getitem__(self, key):
        os.kill(os.getpid(), key)
        return {"errors": {}}


def test_a_killed_worker_is_one_line():
    with one_line("reading data failed: .*--workers 0"):
        list(make_loader(Signalled(), [[signal.SIGKILL]], workers=1, pad=0))


@pytest.mark.parametrize("key", [signal.SIGINT, signal.SIGTERM])
def test_workers_go_on_until_the_main_process_has_saved(key):
    """Ctrl-C and clusters signal all processes; only the main one ends by itself."""
    assert list(make_loader(Signalled(), [[key]], workers=1, pad=0)) == [{"errors": {}}]


def test_a_mistake_that_a_worker_finds_is_one_line(tmp_path):
    write_info(tmp_path)
    clips = dataset(tmp_path, [QUESTION, "nonsense"])
    with one_line("^/.*train.jsonl, row 2: Expecting"):
        list(make_loader(clips, [[(0, 1)]], workers=1, pad=0))
    gc.collect()
    assert multiprocessing.active_children() == []      # no cycle of frames keeps them


UNFINISHED = """
from allinone import UserError, run_main
from data import make_loader

class Endless(list):
    def __getitem__(self, key):
        return {"errors": {}}

def main():
    for batch in make_loader(Endless(), [[0]] * 999, workers=2, pad=0):
        raise EXCEPTION

run_main("main", main)
"""


@pytest.mark.parametrize("exception, code, stderr", [
    ("UserError('broken')", 2, "main: broken\n"), ("KeyboardInterrupt", -2, "interrupted\n")])
def test_no_worker_keeps_the_main_process_from_ending(exception, code, stderr):
    script = UNFINISHED.replace("EXCEPTION", exception)
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(data.__file__).parent,
                          timeout=60, capture_output=True, text=True)
    assert [done.returncode, done.stderr] == [code, stderr]


def test_too_little_shared_memory_is_found_out_before(monkeypatch):
    spec = InputSpec(BENCHMARKS["msrvtt-qa"], Config(), TOKENIZER, [])
    clips = SimpleNamespace(spec=spec, views=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    with one_line("2 workers need 110 MiB in /dev/shm, which has 64 MiB"):
        check_shared_memory(clips, batch=32, workers=2)
    check_shared_memory(clips, batch=32, workers=1)


def test_data_py_describes_any_file(clip_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["data.py", "missing\n.mp4", str(clip_folder / "a.mp4")])
    data.main()
    missing, described = capsys.readouterr().out.splitlines()
    assert missing.startswith(r"missing\n.mp4: ")
    assert "12 frames of 48 x 32, from 0.00 to 1.10 s" in described


# ---- eval and train: what their tests share ------------------------------------------------------


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """toy(NAME): the folder of a benchmark in a toy world of few clips."""
    root = tmp_path_factory.mktemp("toy")

    def folder(name):
        tools.toy.make_toy(root, [name], share=0.01)
        return f"{root}/{name}"

    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("train.py FLAGS") calls main() in an empty folder and returns what it prints. Training is
    two steps of four clips, into run/, unless the flags differ. With `error`, main() must end with
    code 2 and one line that contains it."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    defaults = {"train.py": "--workers 0 --steps 2 --batch 4 --out run", "eval.py": "--workers 0"}
    mains = {"train.py": train.main, "eval.py": eval.main}

    def call(command, error=None):
        script, *flags = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [script, *defaults[script].split(), *flags])
        if error is None:
            mains[script]()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            run_main(script, mains[script])
        lines = capsys.readouterr().err.splitlines()
        assert (stop.value.code, len(lines)) == (2, 1)
        assert error in lines[0]
        del stop                        # its traceback would hold the lock of the run folder

    yield call
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read_rows(path):
    lines = Path(path).read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]     # NaN is not JSON


def copy_data(folder, out, split, edit):
    """A copy of a prepared folder in which edit(rows) has changed a split."""
    shutil.copytree(folder, out)
    path = Path(out, f"{split}.jsonl")
    rows = read_rows(path)
    edit(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(path):
    return load_checkpoint(path)["model"]


def same_weights(one, other):
    one = weights(one)
    other = weights(other)
    return all(torch.equal(one[name], other[name]) for name in one)


SMALL_TOY = replace(SIZES["toy"], layers=2, vocab=50, answers=4)


def small_model(*heads):
    torch.manual_seed(0)
    model = AllInOne(SMALL_TOY, heads)
    init_narrow(model)
    return model.eval()


def random_batch(*shape):
    """Random frames, and texts of this shape, (B, A, L)."""
    torch.manual_seed(1)
    B = shape[0]
    frames = torch.randint(256, (B, 3, 3, 32, 32), dtype=torch.uint8)
    input_ids = torch.randint(5, 50, shape)
    attention_mask = torch.ones(shape, dtype=torch.bool)
    return {"frames": frames, "input_ids": input_ids, "attention_mask": attention_mask}


# ---- eval: metrics -------------------------------------------------------------------------------


def test_ranks_and_recalls_by_hand():
    """The tie in the second row costs half a place."""
    scores = np.array([
        [0.9, 0.1, 0.5],
        [0.3, 0.3, 0.2],
        [0.6, 0.7, 0.1]])
    rank = eval.ranks(scores, np.arange(3))
    assert rank.tolist() == [1, 1.5, 3]
    assert eval.recalls(rank, 3, "text to video") == pytest.approx({
        "text to video R@1": 100 / 3,
        "text to video R@5": 100,
        "text to video R@10": 100,
        "text to video MedR": 1.5,
        "text to video MeanR": 5.5 / 3})


def test_constant_scores_have_the_rank_of_chance():
    rank = eval.ranks(np.zeros((100, 100)), np.arange(100))
    assert set(rank) == {50.5}


@pytest.fixture
def judge(monkeypatch):
    """judge(NAME, rows, results, answers) -> metrics and records of a model with these results:
    scores of answers or options, a [text, video] pair, or None for a clip that cannot be read."""
    class Rows(list):
        spec = None

        @property
        def rows(self):
            return self

    def call(name, rows, results, answers=()):
        found = [i for i, result in enumerate(results) if result is not None]
        scores = torch.tensor([results[i] for i in found])
        for function in ("answer_scores", "option_scores"):
            monkeypatch.setattr(eval, function, lambda *_: scores)
        monkeypatch.setattr(eval, "embeddings", lambda *_: scores.unbind(1))

        def predict(model, dataset, step, settings):
            return {"index": torch.tensor(found), **step(None, {})}

        monkeypatch.setattr(eval, "predict", predict)
        return eval.evaluate(None, Rows(rows), BENCHMARKS[name], answers, EvalSettings())

    return call


def test_unknown_answers_are_wrong_and_lower_the_ceiling(judge):
    """Right, wrong, an answer outside the list, a missing clip."""
    rows = []
    for answer in ("red", "blue", "mauve", "red"):
        rows.append({"id": "1", "question": "what?", "answer": answer})
    results = [[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], None]
    metrics, records = judge("msrvtt-qa", rows, results, ["red", "blue"])
    assert metrics == pytest.approx({
        "accuracy": 25,
        "accuracy of known answers (as released)": 100 / 3,
        "ceiling of the answer list": 75})
    assert [record["prediction"] for record in records] == ["red", "red", "red", None]
    assert records[0]["score"] == pytest.approx(0.8808, abs=1e-4)       # softmax of 2 and 0


def test_options_that_repeat_a_text_are_judged_by_index(judge):
    rows = [{"id": "1", "options": ["a", "a"], "answer": 1}] * 2
    metrics, _ = judge("tgif-action", rows, [[2.0, 1.0], [1.0, 2.0]])
    assert metrics == {"accuracy": 50}


def test_vcr_needs_answer_and_rationale(judge):
    right = {"q1/qa": 1, "q2/qar": 0, "q1/qar": 1, "q2/qa": 1, "q3/qa": 1}
    rows = []
    for name in right:
        kind = "QA->R" if name.endswith("r") else "Q->A"
        rows.append({"id": name, "question_type": kind, "options": ["a", "b"], "answer": 1})
    results = [[0.5, good] for good in right.values()]
    metrics, _ = judge("vcr", rows, results)
    assert list(metrics)[0] == "Q->AR"
    assert metrics == pytest.approx({"Q->AR": 100 / 3, "Q->A": 100, "QA->R": 50, "accuracy": 80})


EAST = [1.0, 0.0]          # unit vectors of texts and clips
NORTH = [0.0, 1.0]


def test_texts_rank_clips_and_a_clip_its_best_text(judge):
    """Two texts of clip a, one of b: a text ranks two clips."""
    rows = [{"id": "1", "video": clip} for clip in "aab"]
    metrics, records = judge("msrvtt", rows, [[EAST, EAST], [NORTH, EAST], [NORTH, NORTH]])
    assert [record["score"] for record in records] == [1, 2, 1]
    assert [record["prediction"] for record in records] == ["a", "b", "b"]
    assert metrics["text to video MeanR"] == pytest.approx(4 / 3)
    assert metrics["video to text MeanR"] == 1.25       # two texts are equally near to b: 1.5


def test_parts_of_one_video_are_clips_of_their_own(judge):
    """Each text finds the part of the other."""
    rows = [{"id": "1", "video": "a", "seconds": part} for part in ([0, 5], [5, 9])]
    metrics, records = judge("msrvtt", rows, [[EAST, NORTH], [NORTH, EAST]])
    assert metrics["text to video R@1"] == 0
    assert [record["prediction"] for record in records] == ["a 5-9", "a 0-5"]


def test_missing_clips_rank_behind_all_others(judge):
    rows = [{"id": clip, "video": clip} for clip in "abc"]
    metrics, _ = judge("msrvtt", rows, [[EAST, EAST], [NORTH, NORTH], None])
    for direction in ("text to video", "video to text"):
        assert metrics[f"{direction} R@10"] == pytest.approx(200 / 3)
        assert metrics[f"{direction} MeanR"] == 2       # 1, 1, 4


# ---- eval: scores --------------------------------------------------------------------------------


def test_second_vcr_head_scores_rationales():
    model = small_model("rank", "rank2")
    batch = random_batch(2, 4, 6)
    batch["is_rationale"] = torch.tensor([False, True])
    scores = option_scores(model, batch, ("rank", "rank2"))
    first = option_scores(model, batch, ("rank",))
    second = option_scores(model, batch, ("rank2",))
    assert torch.equal(scores, torch.stack([first[0], second[1]]))
    assert not torch.equal(first, second)


def test_zero_shot_is_the_rank_head_before_training():
    model = small_model("matching", "rank")
    batch = random_batch(2, 4, 6)
    before_training = option_scores(model, batch, ("rank",))
    del model.task_heads["rank"]
    torch.testing.assert_close(option_scores(model, batch, ("rank",)), before_training)


def test_views_average_cosines():
    model = small_model("contrast")
    batch = random_batch(2, 1, 5)
    views = [batch["frames"], batch["frames"] // 8]
    cosines = 0
    for frames in views:
        text, video = eval.embeddings(model, {**batch, "frames": frames})
        torch.testing.assert_close(video.norm(dim=1), torch.ones(2))
        cosines = cosines + text @ video.T / 2
    batch["frames"] = torch.stack(views, dim=1)
    text, video = eval.embeddings(model, batch)
    torch.testing.assert_close(text @ video.T, cosines)


# ---- eval: a whole split -------------------------------------------------------------------------


def test_zero_shot_actions_score_a_sentence_for_each_class(run, toy):
    folder = toy("hmdb51")
    run(f"train.py --data {toy('webvid')}")
    run(f"eval.py run --data {folder} --split val --predictions p.jsonl")
    model, checkpoint = eval.load_model("run")
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])
    names = read_answers(folder)
    spec = InputSpec(BENCHMARKS["hmdb51"], model.config, tokenizer, names)
    frames = data.VideoTextDataset(folder, "val", spec)[0, 0]["frames"]
    scores = {}
    for name in names:
        input_ids = torch.tensor([tokenizer.encode(f"a person is doing {name}", 40)])
        pooled = model(frames[None], input_ids).pooled
        scores[name] = model.task_heads["matching"](pooled)[0, 1].item()
    assert read_rows("p.jsonl")[0]["prediction"] == max(scores, key=scores.get)


def test_evaluation_does_not_depend_on_batches_or_workers(run, toy):
    """Rows with two and with five options among them."""
    def shorten(rows):
        rows[1].update(options=rows[1]["options"][:2], answer=0)
    copy_data(toy("tgif-transition"), "data", "test", shorten)
    run("train.py --data data --set dropout=0.1")
    outputs = []
    for flags in ("--batch 64", "--batch 3", "--batch 1 --workers 2"):
        figures = run(f"eval.py run {flags} --predictions p.jsonl")
        outputs.append((figures, [row["prediction"] for row in read_rows("p.jsonl")]))
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("name", ["msrvtt-qa", "msrvtt", "webvid"])
def test_missing_clips_stop_evaluation_or_count_as_wrong(run, toy, name):
    def lose(rows):
        rows[0]["video"] = "gone.mp4"
        del rows[2:]

    run(f"train.py --data {toy(name)}")
    copy_data(toy(name), "data", "test", lose)
    command = "eval.py run --data data"
    run(command, error="1 of 2 rows of data/test.jsonl have a clip that cannot be read, the first")
    output = run(f"{command} --allow-missing --predictions p.jsonl")
    assert "1 of 2 rows of data/test.jsonl have a clip that cannot be read; they count" in output
    if name != "webvid":
        assert read_rows("p.jsonl")[0]["prediction"] is None


@pytest.mark.parametrize("name, head", [
    ("msrvtt-qa", "answer"),
    ("vcr", "rank"),
    ("msrvtt", "contrast"),
    ("webvid", "matching")])
def test_scores_that_are_not_finite_are_an_error(run, toy, name, head):
    run(f"train.py --data {toy(name)}")
    model, checkpoint = eval.load_model("run")
    for p in model.task_heads[head].parameters():
        p.data.fill_(math.nan)
    with pytest.raises(UserError, match="is not finite"):
        eval.evaluate_folder(model, checkpoint, toy(name), None, EvalSettings())


# ---- eval: what is printed -----------------------------------------------------------------------


def test_baselines_by_question_type(tmp_path):
    """Accuracy; one of the training answers to questions of the type, at random and the most
    frequent; what needs no order of frames."""
    rows = []
    for text in ("which up", "which up", "which left", "what red"):
        kind, answer = text.split()
        row = {"video": "v", "question": "?", "answer": answer, "question_type": kind}
        rows.append(json.dumps(row))
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    info = {"root": "", "prepared": {}, "order_blind": {"which": 0.5}}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    records = []
    for text in ("what red 0", "which up 1", "which left 0"):
        kind, truth, right = text.split()
        record = {"question_type": kind, "truth": truth, "correct": int(right), "options": 0}
        records.append(record)
    lines = eval.format_table(eval.baselines(records, tmp_path, "vqa", ["up", "left", "red"]))
    assert [line.split() for line in lines[1:]] == [
        "which 2 50.0 50.0 50.0 50.0".split(),
        "what 1 0.0 100.0 100.0 100.0".split(),
        "all 3 33.3 66.7 66.7 66.7".split()]


def test_a_label_of_training_beyond_the_list_is_counted(tmp_path):
    rows = [{"video": "v", "label": label} for label in (0, 7, 7)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    record = {"question_type": "", "truth": "run", "correct": 1, "options": 0}
    table = eval.baselines([record], tmp_path, "action", ["run"])
    assert table[0]["majority"] == 0


def test_list_names_every_benchmark(run):
    text = run("eval.py --list")
    assert re.findall(r"^(\S+) .* lr", text, re.M) == list(BENCHMARKS)
    assert "158,581 / 12,278 / 72,821; chance -; published: rerun 42.9, paper 42.5" in text


# ---- python eval.py ------------------------------------------------------------------------------


def first_clip(folder):
    root = data.manifest_info(folder)["root"]
    return os.path.join(root, data.Manifest(folder, "test")[0]["video"])


def test_a_question_about_your_own_video(run, toy):
    run(f"train.py --data {toy('msrvtt-qa')}")
    clip = first_clip(toy("msrvtt-qa"))
    looked, *answers, about = run(f"eval.py run --video {clip} --ask 'which way?'").splitlines()
    assert re.fullmatch(rf"looked at seconds \d\.\d\d, \d\.\d\d, \d\.\d\d of {clip}", looked)
    shares = [float(line.split("%")[0]) for line in answers]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True)
    assert about == "(trained on msrvtt-qa: 20 answers, 187 word pieces)"
    run(f"eval.py run --video {clip} --caption ring", error="run/best.pt has answer")


def test_your_own_picture_is_read_as_the_run_has_read(run, toy):
    """VCR: one frame, and pairs of question and option."""
    run(f"train.py --data {toy('vcr')} --steps 2")
    command = f"eval.py run --video {first_clip(toy('tvqa'))} --ask where"
    looked, *_ = run(f"{command} --options left right").splitlines()
    assert re.match(r"looked at pictures \d+\.00 of ", looked)


def test_a_folder_is_the_same_by_another_path(run, toy):
    """Its task is that of the run, which the rows do not tell: pre-training, not retrieval."""
    shutil.copytree(toy("webvid"), "own")
    root = data.manifest_info("own")["root"]
    Path("own/dataset.json").write_text(json.dumps({"root": root}))
    run("train.py --data own --task pretrain --steps 2")
    assert "matching accuracy" in run("eval.py run --data own")


def test_options_and_captions_for_your_own_folder_of_pictures(run, toy):
    """Options share 100 %. A caption's probability does not depend on the other captions. The
    matching head puts both into the same order."""
    run(f"train.py --data {toy('webvid')}")
    command = f"eval.py run --video {first_clip(toy('tvqa'))}"
    looked, first, second, _ = run(f"{command} --options red 'a blue ring'").splitlines()
    assert looked.startswith("looked at pictures ")
    shares = [float(line.split("%")[0]) for line in (first, second)]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    _, alone, _ = run(f"{command} --caption red").splitlines()
    _, *captions, _ = run(f"{command} --caption 'a blue ring' red").splitlines()
    assert alone in captions
    assert [line[9:] for line in captions] == [first[9:], second[9:]]


def test_a_run_is_a_folder_or_a_file_and_evaluation_writes_nothing(run, toy):
    folder = toy("msrvtt-qa")
    run(f"train.py --data {folder}")
    before = [sorted(Path(place).rglob("*")) for place in (".", folder)]
    assert run("eval.py run") == run("eval.py run/best.pt")
    assert [sorted(Path(place).rglob("*")) for place in (".", folder)] == before


@pytest.mark.parametrize("flags, error", [
    ("", "name a run folder or a checkpoint"),
    ("nowhere", "nowhere cannot be read: No such file or directory"),
    ("run --batch 0", "--batch 0: must be above 0"),
    ("run --workers -1", "--workers -1: must be from 0 to 999"),
    ("run --device x", "device x: "),
    ("run --data nowhere", "nowhere holds no dataset.json"),
    ("run --video x.mp4", "--video needs --ask TEXT"),
    ("run --video x.mp4 --ask what", "x.mp4: no such file")])
def test_mistakes_of_evaluation_are_one_line(run, toy, flags, error):
    run(f"train.py --data {toy('msrvtt-qa')}")
    run(f"eval.py {flags}", error=error)


def test_data_that_is_gone_is_one_line(run, toy):
    shutil.copytree(toy("msrvtt-qa"), "data")
    run("train.py --data data")
    shutil.rmtree("data")
    run("eval.py run", error="data holds no dataset.json, train.jsonl or test.jsonl; prepare")


# ---- train: losses -------------------------------------------------------------------------------


def softplus(x):
    """The cross-entropy of two scores, where the wrong one is higher by x."""
    return math.log(1 + math.exp(x))


def test_cross_entropy_leaves_unknown_targets_out():
    scores = torch.tensor([[0.0, 0.0], [9.0, 1.0], [2.0, 0.0]])
    loss = train.cross_entropy(scores, torch.tensor([0, -1, 1]))
    assert loss.item() == pytest.approx((softplus(0) + softplus(2)) / 2)
    unknown = torch.tensor([-1, -1, -1])
    assert train.cross_entropy(scores, unknown) == 0


def test_contrastive_loss_by_hand():
    """The cosines over the temperature are 0, 16 and 20, 12; the own ones are 0 and 12."""
    video = torch.tensor([[0.0, 1.0], [0.8, 0.6]])
    loss = train.contrastive_loss(torch.eye(2), video)
    rows = softplus(16) + softplus(8)
    columns = softplus(20) + softplus(4)
    assert loss.item() == pytest.approx((rows + columns) / 2)


class FakeModel:
    """The first token of a text is its score."""
    task_heads = {"rank": lambda pooled: pooled, "matching": lambda pooled: F.pad(pooled, (1, 0))}

    def embed_frames(self, frames):
        return frames

    def joint(self, video, input_ids, attention_mask, num_queries):
        return Output(input_ids[:, :1].float(), None, None)

    def encode_text(self, input_ids, attention_mask):
        return torch.eye(len(input_ids))

    def encode_video(self, frames):
        return torch.eye(len(frames))


def test_rank_and_matching_losses_by_hand():
    """Two clips: scores of the own caption and of two drawn ones. Matching reads the first two."""
    scores = torch.tensor([[2, 2, 2], [0, 1, 1]])
    batch = {
        "frames": torch.zeros(2, 1, 1, 1, 1),
        "input_ids": scores[:, :, None],
        "attention_mask": scores[:, :, None] >= 0,
        "target": torch.tensor([0, 0])}
    losses = train.retrieval_losses(FakeModel(), batch)
    matching = softplus(-2) + softplus(2) + softplus(0) + softplus(1)
    assert losses["matching"].item() == pytest.approx(0.5 * matching / 4)
    rank = math.log(3) + math.log(1 + 2 * math.e)
    assert losses["rank"].item() == pytest.approx(rank / 2)
    assert losses["contrast"].item() == pytest.approx(2 * softplus(-20), abs=1e-6)


def test_pretraining_reads_masked_words_alone():
    """PyTorch's losses of the model's plain outputs."""
    model = small_model("matching", "mlm", "contrast")
    batch = random_batch(2, 3, 6)
    batch["target"] = torch.tensor([0, 1])
    batch["masked"] = torch.tensor([1, 3, 11])
    batch["labels"] = torch.tensor([7, 9, 8])
    losses = train.pretrain_losses(model, batch)
    frames = batch["frames"]
    to_match, masked, caption = batch["input_ids"].unbind(dim=1)
    match = model.task_heads["matching"](model(frames, to_match).pooled)
    text = model(frames, masked).text                       # (2, 6, D)
    words = model.task_heads["mlm"](text[[0, 0, 1], [1, 3, 5]])
    plain = {**batch, "input_ids": caption[:, None]}
    torch.testing.assert_close(losses, {
        "matching": F.cross_entropy(match, batch["target"]),
        "mlm": F.cross_entropy(words, batch["labels"]),
        "contrast": train.contrastive_loss(*eval.embeddings(model, plain))})


# ---- train: recipe and optimiser -----------------------------------------------------------------


def recipe_of(name, rows, **flags):
    """What make_recipe makes of a benchmark with so many training rows, at a real size."""
    args = {"batch": None, "accum": 1, "lr": None, "steps": None, **flags}
    parts = Namespace(parts=[range(rows)])
    stand_in = Namespace(benchmark=BENCHMARKS[name], toy=False, train=parts)
    return train.make_recipe(Namespace(**args), stand_in)


@pytest.mark.parametrize("name, rows, expected", [
    ("msrvtt-qa", 158_581, Recipe(512, 1e-4, 10, 20 * 309, 618, 309)),
    ("msrvtt", 9000, Recipe(1024, 3e-4, 1, 200 * 8, 160, 8)),
    ("webvid", 2_500_000, Recipe(1024, 1e-4, 1, 200_000, 2500, 2441))])
def test_real_sizes_follow_the_released_recipe(name, rows, expected):
    assert recipe_of(name, rows) == expected


def test_what_flags_change_is_printed(capsys):
    recipe = recipe_of("msrvtt-qa", 6400, batch=64, lr=1e-5, steps=50)
    assert recipe == Recipe(64, 1e-5, 10, 50, 5, steps_per_epoch=100)
    assert capsys.readouterr().out.splitlines() == [
        "recipe: batch 64, 50 steps of which 100 are an epoch, lr 1e-05 (task heads x 10), warm-up "
        "5 steps",
        "the usual batch is 512; --batch 512 --accum 8 keeps it in the same memory"]
    recipe_of("msrvtt-qa", 6400, batch=100, steps=100)
    assert "--batch 512 --accum 8 " in capsys.readouterr().out
    assert recipe_of("webvid", 6400, steps=100).warmup == 10


def test_batch_is_cut_to_a_small_data_set(capsys):
    assert recipe_of("msrvtt-qa", 50, accum=4).batch == 48
    assert "batch cut to 48: a data set has 50 rows" in capsys.readouterr().out


def test_learning_rate_by_hand():
    """Up to the peak in two steps, then down to 0 at the end."""
    recipe = Recipe(batch=1, lr=1, head_lr=1, steps=10, warmup=2, steps_per_epoch=1)
    expected = {0: 0, 1: 0.5, 2: 1, 6: 0.5, 10: 0}
    for step, share in expected.items():
        assert train.lr_at(step, recipe) == share


def test_optimizer_holds_each_parameter_once():
    """Biases, norms and single vectors do not decay; task heads learn faster."""
    model = small_model(*HEADS)
    model.cls_token.requires_grad = False
    names = {p: name for name, p in model.named_parameters()}
    recipe = Recipe(batch=1, lr=0.1, head_lr=10, steps=1, warmup=0, steps_per_epoch=1)
    held = []
    for group in train.make_optimizer(model, recipe).param_groups:
        for p in group["params"]:
            held.append(names[p])
            assert group["peak"] == (1 if names[p].startswith("task_heads.") else 0.1)
            assert group["weight_decay"] == (0.01 if p.dim() > 1 else 0)
    assert sorted([*held, "cls_token"]) == sorted(names.values())


# ---- train: every task ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_trains_and_evaluates(run, toy, name):
    """eval.py repeats the figures to the digit."""
    output = run(f"train.py --data {toy(name)}")
    log = read_rows("run/metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 2]
    assert log[1]["lr"] == log[0]["lr"] / 2
    assert BENCHMARKS[name].metric in log[2]["val"]
    assert load_checkpoint("run/last.pt")["step"] == 2
    assert run("eval.py run") in output


@pytest.mark.parametrize("name, line", [
    ("msrvtt-qa", "new: answer; not used: contrast, matching, mlm"),
    ("tvqa", "new: mc; not used: contrast, matching, mlm"),
    ("vcr", "tensors; not used: contrast, matching, mlm"),
    ("msrvtt", "tensors; not used: matching, mlm"),
    ("hmdb51", "new: answer; not used: contrast, matching, mlm")])
def test_every_task_starts_from_pretraining(run, toy, name, line):
    run(f"train.py --data {toy('webvid')} --contrast --out pre")
    assert f"{line}\n" in run(f"train.py --data {toy(name)} --init pre/best.pt")


def test_actions_train_pooler_and_head_alone(run, toy):
    run(f"train.py --data {toy('webvid')} --out pre")
    run(f"train.py --data {toy('hmdb51')} --init pre/best.pt")
    before = weights("pre/best.pt")
    after = weights("run/last.pt")
    both = before.keys() & after.keys()
    changed = {name for name in both if not before[name].equal(after[name])}
    assert changed == {"pooler.weight", "pooler.bias"}


def test_pretraining_mixes_videos_and_pictures(run, toy, monkeypatch):
    frames = set()

    def spy(model, batch, losses=train.pretrain_losses):
        frames.add(batch["frames"].shape[1])
        return losses(model, batch)

    monkeypatch.setattr(train, "pretrain_losses", spy)
    run(f"train.py --data {toy('webvid')},{toy('cc3m')} --steps 6")
    assert frames == {1, 3}
    assert list(json.loads(Path("run/test.json").read_text())) == ["webvid", "cc3m"]


def test_eight_clips_are_learnt_by_heart(run, toy):
    """One question, eight answers: only the pixels tell."""
    answers = read_answers(toy("msrvtt-qa"))

    def choose(rows):
        clips = sorted({row["video"] for row in rows})
        del rows[8:]
        for row, clip, answer in zip(rows, clips, answers):
            row.update(question="what is it?", video=clip, answer=answer)

    copy_data(toy("msrvtt-qa"), "data", "train", choose)
    run("train.py --data data --batch 8 --steps 70 --lr 2e-3")
    assert "accuracy 100.00 %" in run("eval.py run/last.pt --split train")


# ---- train: the loop -----------------------------------------------------------------------------


def test_accumulation_equals_one_batch():
    batch = random_batch(4, 3, 6)
    batch["target"] = torch.tensor([0, 1, 2, 1])
    first = {name: value[:2] for name, value in batch.items()}
    second = {name: value[2:] for name, value in batch.items()}
    trained = []
    for micro_batches in ([], [batch], [first, second]):
        model = small_model("rank")
        losses = train.Losses(model, BENCHMARKS["msrvtt-mc"])
        optimizer = torch.optim.SGD(model.parameters(), lr=1)
        train.train_step(losses, optimizer, micro_batches, amp=False)
        trained.append(model.task_heads["rank"].weight)
    untrained, one, two = trained
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert not torch.allclose(one, untrained, atol=1e-3)


def test_same_seed_same_weights(run, toy):
    """However many workers there are."""
    for out, flags in (("a", ""), ("b", "--workers 2"), ("c", "--seed 1")):
        run(f"train.py --data {toy('msrvtt-qa')} --set dropout=0.1 --out {out} {flags}")
    assert same_weights("a/last.pt", "b/last.pt")
    assert not same_weights("a/last.pt", "c/last.pt")


def assert_same_run(one, other):
    """Two run folders hold the same weights, figures and losses."""
    for name in ("last.pt", "best.pt"):
        assert same_weights(f"{one}/{name}", f"{other}/{name}")
    assert Path(one, "test.json").read_text() == Path(other, "test.json").read_text()
    logs = []
    for folder in (one, other):
        logs.append(read_rows(f"{folder}/metrics.jsonl"))
        for line in logs[-1]:
            line.pop("clips_per_s", 0)
            line.pop("waiting", 0)
    assert logs[0] == logs[1]


def signal_at(patch, module, name, count, number):
    """Send a signal to this process at one call of a function."""
    function = getattr(module, name)
    calls = []

    def spy(*args, **more):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return function(*args, **more)

    patch.setattr(module, name, spy)


WITHIN_A_STEP = (train, "seed_step", 6)             # function and number of the call
WAITING_FOR_DATA = (data, "read_frames", 22)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment, workers", [(WITHIN_A_STEP, 2), (WAITING_FOR_DATA, 0)])
def test_stopped_and_resumed_to_the_bit(run, toy, monkeypatch, moment, workers, number):
    """In the middle of an epoch, with dropout."""
    flags = f"--steps 8 --workers {workers} --set dropout=0.1 drop_path=0.1"
    command = f"train.py --data {toy('msrvtt-qa')} {flags}"
    run(f"{command} --out whole")
    with monkeypatch.context() as patch:
        signal_at(patch, *moment, number)
        with pytest.raises(SystemExit, match="stopped at step 5; go on with the same flags"):
            run(command)
    assert not Path("run/test.json").exists()
    run(f"{command} --resume")
    assert_same_run("run", "whole")


def test_a_stop_in_the_last_validation_is_not_lost(run, toy, monkeypatch):
    command = f"train.py --data {toy('msrvtt-qa')} --steps 2 --workers 0"
    with monkeypatch.context() as patch:
        signal_at(patch, train, "validate", 1, signal.SIGTERM)
        with pytest.raises(SystemExit, match="stopped at step 2; go on with the same flags"):
            run(command)
    run(f"{command} --resume")
    assert Path("run/test.json").exists()


def test_killed_at_any_moment_files_are_whole_and_the_run_ends_equal(run, toy):
    flags = f"--data {toy('msrvtt-qa')} --steps 25 --batch 4 --workers 0 --out"
    run(f"train.py {flags} whole")
    command = [sys.executable, HERE / "train.py", *flags.split(), "run"]
    log = Path("run/metrics.jsonl")
    moments = random.Random(0)
    for least in (1, 6, 12):                            # steps
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not log.exists() or log.read_bytes().count(b"\n") < least:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.wait()
        for path in Path("run").glob("*.pt"):
            load_checkpoint(path)
        command = [*command, "--resume"]
    run(f"train.py {flags} run --resume")
    assert_same_run("run", "whole")


def test_best_checkpoint_is_the_best_on_validation(run, toy, monkeypatch):
    """Validation comes after each epoch, here of two steps."""
    def keep_eight(rows):
        del rows[8:]

    copy_data(toy("msrvtt-qa"), "data", "train", keep_eight)
    results = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(train, "validate", lambda *_: {"accuracy": next(results)})
    run("train.py --data data --steps 6")
    assert load_checkpoint("run/best.pt")["step"] == 4
    assert load_checkpoint("run/last.pt")["step"] == 6


def test_validation_of_several_folders_is_their_mean(monkeypatch):
    results = iter([({"accuracy": 10.0}, []), ({"accuracy": 20.0}, [])])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(results))
    stand_in = Namespace(val=[1, 2], benchmarks=[1, 2], answers=[])
    assert train.validate(None, stand_in, None) == {"accuracy": 15}


def test_losses_that_are_not_finite_end_the_run(run, toy):
    run(f"train.py --data {toy('msrvtt-qa')} --steps 20 --lr 9e8",
        error="a loss is not finite (vqa ")
    load_checkpoint("run/last.pt")                      # of the last step that was finite
    assert not Path("run/best.pt").exists()


@pytest.mark.parametrize("files", [2, 3])
def test_a_full_disk_is_one_line(run, toy, monkeypatch, files):
    """The last checkpoint stays, nothing is left half written, and the run can go on. config.json
    and last.pt fit; best.pt does or does not."""
    def full(descriptor, calls=[]):
        calls.append(descriptor)
        if len(calls) > files:
            raise OSError(28, "No space left on device")

    command = f"train.py --data {toy('msrvtt-qa')}"
    run(f"{command} --out whole")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        run(command, error="cannot be written: No space left on device; make room")
    assert load_checkpoint("run/last.pt")["step"] == 1
    assert not list(Path("run").glob("*.part"))
    run(f"{command} --resume")
    assert_same_run("run", "whole")


def test_training_goes_on_without_a_few_clips(run, toy):
    """More than 1 %, and more than ten, end the run."""
    def lose(rows, every):
        del rows[40:]
        for row in rows[::every]:
            row["video"] = "gone.mp4"

    copy_data(toy("msrvtt-qa"), "few", "train", partial(lose, every=20))
    copy_data(toy("msrvtt-qa"), "many", "train", partial(lose, every=2))
    run("train.py --data few --steps 10")
    lines = Path("run/bad.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == ["0", "20"]
    assert sorted(load_checkpoint("run/last.pt")["bad"]) == ["0", "20"]
    run("train.py --data many --steps 10 --out run2",
        error="training clips cannot be read, the limit is 4; run2/bad.txt lists them")


def test_missing_validation_clips_count_as_wrong_in_training(run, toy):
    def lose(rows):
        rows[0]["video"] = "gone.mp4"

    copy_data(toy("msrvtt-qa"), "data", "val", lose)
    output = run("train.py --data data")
    assert "val.jsonl have a clip that cannot be read; they count as wrong" in output


def test_classes_outside_the_list_are_one_line(run, toy):
    shutil.copytree(toy("hmdb51"), "data")
    Path("data/answers.txt").write_text("grow\nmove down\n")
    run("train.py --data data", error="the answer list 2 classes")


# ---- train: the run folder -----------------------------------------------------------------------


@pytest.mark.parametrize("flags, setting", [
    ("--lr 1", "lr"),
    ("--seed 1", "seed"),
    ("--frames 2", "frames"),
    ("--data rows", "rows"),
    ("--data answers", "answer list"),
    ("--tokenizer other.json", "tokenizer")])
def test_resume_refuses_another_run(run, toy, flags, setting):
    def change(rows):
        rows[0]["answer"] = rows[1]["answer"]

    folder = toy("msrvtt-qa")
    copy_data(folder, "rows", "train", change)
    shutil.copytree(folder, "answers")
    Path("answers/answers.txt").write_text("\n".join(reversed(read_answers(folder))))
    tokenizer = Path(folder, "tokenizer.json").read_text()
    Path("other.json").write_text(tokenizer.replace(": 100", ": 99"))       # longest word
    run(f"train.py --data {folder}")
    run(f"train.py --data {folder} --resume {flags}", error=f"--resume: {setting} was ")


def test_a_folder_with_a_run_is_not_overwritten(run, toy):
    command = f"train.py --data {toy('msrvtt-qa')}"
    run(command)
    run(command, error="run holds a run; go on with --resume, or choose another --out")
    lock = lock_folder("run")
    run(f"{command} --resume", error="run is in use by another process")
    lock.close()


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def empty(path):
    path.write_bytes(b"")


def other_kind(path):
    path.write_text("[]")


def become_folder(path):
    path.unlink()
    path.mkdir()


def no_run(path):
    save_checkpoint(path, small_model(), [], "")


@pytest.mark.parametrize("name, damage", [
    ("last.pt", cut),
    ("last.pt", empty),
    ("last.pt", other_kind),
    ("last.pt", become_folder),
    ("last.pt", no_run),
    ("config.json", cut),
    ("config.json", empty),
    ("config.json", other_kind),
    ("config.json", become_folder),
    ("metrics.jsonl", become_folder)])
def test_damaged_runs_are_one_line(run, toy, name, damage):
    command = f"train.py --data {toy('msrvtt-qa')}"
    run(command)
    damage(Path("run", name))
    run(f"{command} --resume", error="train.py: ")


@pytest.mark.parametrize("damage", [cut, empty, other_kind, become_folder, no_run])
def test_damaged_checkpoints_are_one_line(run, toy, damage):
    run(f"train.py --data {toy('msrvtt-qa')}")
    damage(Path("run/best.pt"))
    run("eval.py run", error="eval.py: ")


def test_a_log_that_was_cut_is_mended(run, toy, monkeypatch):
    command = f"train.py --data {toy('msrvtt-qa')} --steps 4"
    with monkeypatch.context() as patch:
        signal_at(patch, train, "seed_step", 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(command)
    log = Path("run/metrics.jsonl")
    log.write_text(log.read_text()[:-9])
    run(f"{command} --resume")
    assert [line["step"] for line in read_rows(log)] == [1, 3, 4, 4]


# ---- train: several processes --------------------------------------------------------------------

START = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import torch.distributed as dist
import allinone, eval, train
join = dist.init_process_group
dist.init_process_group = lambda backend: dist.is_initialized() or join(backend)
dist.destroy_process_group = lambda: None               # one group for all commands

def run(module, flags):
    sys.argv = [module.__name__, *flags.split(), "--workers", "0"]
    allinone.run_main(f"{{module.__name__}}.py", module.main)
"""


def torchrun(cwd, code):
    """Run START and this code in two processes."""
    Path(cwd, "script.py").write_text(START + code)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 script.py"
    command = [sys.executable, *torchrun.split()]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


# Flags of the one process that must train like two. A loss is a plain mean: two processes average
# over masked words as two micro-batches do.
PAIR = {"msrvtt-qa": "", "msrvtt": "", "webvid": "--accum 2"}


@pytest.fixture(scope="module")
def pair(toy, tmp_path_factory):
    """(Folder, result, result): two processes trained each of PAIR and were stopped in another run.
    Two others evaluated PAIR and resumed that run; then one of them failed."""
    cwd = tmp_path_factory.mktemp("pair")
    flags = "--steps 4 --batch 8 --out"
    training = "".join(f"run(train, '--data {toy(name)} {flags} {name}')\n" for name in PAIR)
    stopped = torchrun(cwd, training + f"""
def stop(seed, step):
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)

train.seed_step = stop
run(train, "--data {toy('msrvtt-qa')} {flags} stopped")
""")
    evaluation = "".join(f"run(eval, '{name} --batch 4')\n" for name in PAIR)
    failed = torchrun(cwd, evaluation + f"""
def fail(seed, step):
    if allinone.RANK == 1:
        raise allinone.UserError("the cause")

run(train, "--data {toy('msrvtt-qa')} {flags} stopped --resume")
train.seed_step = fail
run(train, "--data {toy('msrvtt-qa')} {flags} failed")
""")
    return cwd, stopped, failed


@pytest.mark.parametrize("name", PAIR)
def test_two_processes_train_like_one(run, toy, pair, name):
    """On the same global batch; losses differ by rounding."""
    run(f"train.py --data {toy(name)} --steps 4 --batch 8 {PAIR[name]}")
    two = read_rows(pair[0] / name / "metrics.jsonl")
    for one, other in zip(read_rows("run/metrics.jsonl"), two, strict=True):
        for key in one.keys() - {"chance", "clips_per_s", "waiting"}:
            assert other[key] == pytest.approx(one[key], abs=1e-5)


@pytest.mark.parametrize("name", PAIR)
def test_evaluation_does_not_depend_on_processes(run, pair, name):
    """Neither that of train.py, which ends with it, nor that of eval.py."""
    cwd, stopped, failed = pair
    output = run(f"eval.py {cwd / name}")
    assert output in stopped.stdout
    assert output in failed.stdout


def test_two_processes_stop_together_and_resume(run, toy, pair):
    cwd, stopped, failed = pair
    assert stopped.stderr.count("train.py: stopped at step 2; go on with the same flags") == 1
    assert failed.stdout.count("resumed at step 2") == 1
    assert_same_run(cwd / "stopped", cwd / "msrvtt-qa")
    run(f"train.py --data {toy('msrvtt-qa')} --steps 4 --batch 8 --out {cwd}/stopped --resume",
        error="processes was 2, now 1")


def test_a_process_that_fails_ends_the_run(pair):
    _, _, failed = pair
    assert failed.returncode != 0
    assert failed.stderr.count("train.py: the cause\n") == 1


# ---- python train.py -----------------------------------------------------------------------------

MISTAKES = {
    "": "give --data FOLDER, or --task for the toy world: vqa, choice, vcr, retrieval, pretrain",
    "--data nowhere": "nowhere holds no dataset.json, train.jsonl or test.jsonl; prepare data",
    "--data qa --steps 0": "--steps 0: must be above 0",
    "--data vcr --frames 5": "--frames is not for vcr, which has pictures",
    "--data qa --batch -1": "--batch -1: must be above 0",
    "--data qa --batch 1000000000": "--batch 1000000000: must be above 0 and below a billion",
    "--data qa --accum 3": "--batch 4 must be a multiple of 3",
    "--data qa --lr inf": "--lr inf: must be above 0",
    "--data qa --lr nan": "--lr nan: must be above 0",
    "--data qa --seed -1": "--seed -1",
    "--data qa --seed 18446744073709551616": "--seed 18446744073709551616",
    "--data qa --set x=1": "--set x=1: give NAME=VALUE, NAME out of fraction, time",
    "--data qa --set time=maybe": "--set time=maybe: time takes 0 or 1",
    "--data qa --set fraction=0.3": "fraction 0.3 is unknown; choose 0, 1/8, 1/4, 1/2 or 1",
    "--data qa --init nowhere": "nowhere cannot be read: No such file or directory",
    "--data qa --out a\0b": "--out 'a\\x00b'",
    "--data qa --compile": "--compile needs a C compiler, and none is installed",
    "--data webvid --task vqa": "webvid is for --task pretrain, not vqa",
    "--data qa,qa": "several folders and --contrast are for pre-training, not for vqa",
    "--data webvid,qa": "several folders and --contrast are for pre-training, not for vqa"}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_one_line_before_any_clip_is_read(run, toy, monkeypatch, flags):
    Path("qa").symlink_to(toy("msrvtt-qa"))
    Path("webvid").symlink_to(toy("webvid"))
    Path("vcr").symlink_to(toy("vcr"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(data, "read_frames", pytest.fail)
    run(f"train.py {flags}", error=MISTAKES[flags])
    assert not Path("run/last.pt").exists()


def test_quickstart(run, monkeypatch):
    """Without --data, train.py makes the toy world."""
    monkeypatch.setattr(tools.toy, "make_toy", partial(tools.toy.make_toy, share=0.01))
    monkeypatch.setattr(sys, "argv", ["train.py", "--task", "vqa", "--steps", "2"])
    train.main()
    assert Path("data/toy/msrvtt-qa/train.jsonl").exists()
    assert "msrvtt-qa, test, 12 rows" in run("eval.py runs/msrvtt-qa-toy-spread-s0")


# ---- docs ----------------------------------------------------------------------------------------


def test_map_leads_to_lines_that_hold_the_names():
    text = (HERE / "docs" / "map.md").read_text()
    places = re.findall(r"\[`(\w+\.py):(\d+)`\]\(\.\./\1#L\2\) `(.+?)`", text)
    assert len(places) > 20
    for file, line, name in places:
        assert name in (HERE / file).read_text().splitlines()[int(line) - 1], (file, line, name)


def test_readme_counts_the_lines():
    rows = re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", (HERE / "README.md").read_text(), re.M)
    assert len(rows) == 6
    for file, lines in rows:
        assert len((HERE / file).read_text().splitlines()) == int(lines.replace(",", "")), file
