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
import rolling
import tools.toy
import train
from allinone import (AllInOne, build_model, Config, count_parameters, HEADS, init_narrow,
                      init_released, load_checkpoint, load_weights, lock_folder, multiply_adds,
                      printable, progress, resize_positions, run_main, save_checkpoint, SIZES,
                      UserError, write_file)
from data import (BatchSampler, benchmark_of, BENCHMARKS, check_shared_memory, collate,
                  frame_indices, InputSpec, make_loader, Manifest, manifest_info, pick_frames,
                  read_answers, read_frames, readable, Tokenizer, VideoError, VideoTextDataset,
                  wordpiece)
from eval import EvalSettings, option_scores
from rolling import roll_groups, roll_loop, roll_tokens
from train import Recipe

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)                    # these tensors are too small to share


@pytest.fixture(autouse=True)
def empty_folder(tmp_path):
    """Every test runs in an empty folder of its own: relative paths lead there."""
    with contextlib.chdir(tmp_path):
        yield


def shared(name):
    """Outputs of the released code, real clips: no part of the project, so a test may skip."""
    path = HERE.parent / "shared" / name
    if not path.exists():
        pytest.skip(f"needs ../shared/{name}")
    return path


def cell(text):
    """A JSON value, else the text as it is."""
    with suppress(ValueError):
        return json.loads(text)
    return text


def table(text):
    """The cells of a table written as text: one line a row, | between cells."""
    rows = []
    for line in text.strip().splitlines():
        rows.append([cell(part.strip()) for part in line.split("|")])
    return rows


def cases(names, rows):
    """Run a test once for each row; rows may be a table written as text."""
    if isinstance(rows, str):
        rows = table(rows)
    return pytest.mark.parametrize(names, rows)


@contextlib.contextmanager
def one_line(cause, kind=UserError):
    """What is done inside is a user's mistake: an error of one line, which matches `cause`."""
    with pytest.raises(kind, match=cause) as error:
        yield error
    assert "\n" not in str(error.value)


# ---- rolling -------------------------------------------------------------------------------------


def numbered(T=3, N=17):
    """x (2, T, N, 2) in which no number occurs twice: a misplaced token cannot hide."""
    return torch.arange(2.0 * T * N * 2).view(2, T, N, 2)


@cases("layout, fraction, rows, cols", """
block  | 0.125 | 4 | 4
block  | 0.25  | 7 | 5
block  | 0.5   | 2 | 9
block  | 1     | 4 | 4
spread | 0.125 | 4 | 4
spread | 0.25  | 7 | 5
spread | 0.5   | 2 | 9
spread | 1     | 4 | 4
""")
def test_fast_roll_equals_definition(layout, fraction, rows, cols):
    x = numbered(N=1 + rows * cols)
    groups = roll_groups(rows, cols, fraction, layout)
    assert torch.equal(roll_tokens(x, *groups), roll_loop(x, *groups))


@cases("T, N", """
1 | 17
2 | 197
3 | 50
8 | 197
""")
def test_block_layout_equals_released_op(T, N):
    cases = np.load(shared("parity/roll_cases.npz"))
    x = torch.from_numpy(cases[f"x_T{T}_L{N}"])
    y = torch.from_numpy(cases[f"y_T{T}_L{N}"])
    rolled = roll_tokens(x.view(2, T, N, 4), *roll_groups(1, N - 1, layout="block"))
    assert torch.equal(rolled.flatten(0, 1), y)


@cases("layout, forward, backward", """
block  | [1, 2]  | [15, 16]
spread | [1, 11] | [6, 16]
""")
def test_tokens_move_by_one_frame(layout, forward, backward):
    """By hand, 4 x 4 patches: the frames that the tokens in frames 0, 1, 2 come from."""
    x = numbered()
    y = roll_tokens(x, *roll_groups(4, 4, layout=layout))
    for n in range(17):
        frames = [0, 1, 2]
        if n in forward:
            frames = [2, 0, 1]
        if n in backward:
            frames = [1, 2, 0]
        assert torch.equal(y[:, :, n], x[:, frames, n])


@cases("side, fraction, layout", """
2 | 0.25 | spread
2 | 0.25 | block
4 | 0    | spread
4 | 0.25 | none
""")
def test_nothing_to_roll_is_the_identity(side, fraction, layout):
    """Fewer than 8 tokens, fraction 0, layout none."""
    groups = roll_groups(side, side, fraction, layout)
    assert torch.equal(roll_tokens(numbered(), *groups), numbered())


@cases("side", [8, 14, 16, 24])
def test_spread_covers_the_picture_evenly(side):
    """An eighth of the patches each way; rows, like columns, differ by one patch at most."""
    for group in roll_groups(side, side):
        patch = group - 1
        assert abs(len(group) - side * side / 8) <= 1
        for places in (patch // side, patch % side):
            counts = places.bincount(minlength=side)
            assert counts.max() - counts.min() <= 1


@cases("forward, backward, line", """
[1, 3] | [3]  | overlap
[0]    | [2]  | tokens 0 to 2; allowed are 1 to N - 1 = 16
[1]    | [17] | tokens 1 to 17
""")
def test_roll_refuses_wrong_tokens(forward, backward, line):
    with pytest.raises(ValueError, match=line):
        roll_tokens(numbered(), torch.tensor(forward), torch.tensor(backward))


def test_roll_refuses_a_single_clip():
    with pytest.raises(ValueError, match="shape .3, 17, 2.; rolling needs .B, T, N, D."):
        roll_tokens(numbered()[0], *roll_groups(4, 4))


def test_rolling_script_fits_a_terminal(capsys):
    rolling.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("2 2 2 ")        # in frame 0, from frame 2
    assert max(map(len, lines)) <= 79


# ---- allinone: sizes -----------------------------------------------------------------------------

SMALL = Config(width=32, layers=3, heads=2, image=32, patch=8, frames=4, text_length=10, vocab=50,
               answers=5, embed=8, dropout=0.0, drop_path=0.0)


@cases("size, millions, gmac", """
tiny  | 11.43  | 4.64
small | 33.55  | 16.82
base  | 109.87 | 63.84
""")
def test_sizes_are_the_papers(size, millions, gmac):
    """Parameters without the MLM head; multiply-adds, half of the operations PyTorch counts."""
    config = SIZES[size]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = AllInOne(config, ("matching",))
        frames = torch.zeros(1, 3, 3, 224, 224, dtype=torch.uint8)
        model(frames, torch.zeros(1, 40, dtype=torch.long))
    assert round(count_parameters(model) / 1e6, 2) == millions
    assert round(multiply_adds(config) / 1e9, 2) == gmac
    assert counter.get_total_flops() == 2 * multiply_adds(config)


def test_allinone_script_prints_the_sizes(monkeypatch, capsys):
    monkeypatch.setattr(allinone, "SIZES", {"toy": SIZES["toy"]})
    allinone.main()
    row = r"^toy +96 +4 +4 +32 +8 +3\.41 M +0\.08 +\d+\.\d ms$"
    assert re.search(row, capsys.readouterr().out, re.M)


@cases("field, value, line", """
width    | -96     | width -96 is not from 8 to 8192
width    | "96"    | width is '96', not int
layers   | true    | layers is True, not int
layers   | 1000000 | layers 1000000 is not from 1 to 128
heads    | 7       | width 768 is not a multiple of heads 7
image    | 225     | image 225 is not a multiple of patch 16
roll     | x       | layout 'x' is unknown; choose spread, block or none
fraction | 0.3     | fraction 0.3 is unknown; choose 0, 1/8, 1/4, 1/2 or 1
dropout  | NaN     | dropout nan is not from 0 to 0.9
""")
def test_config_refuses_values_that_no_model_can_have(field, value, line):
    with one_line(f"^config: {line}"):
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
    return frames, input_ids, torch.arange(7) < 7 - torch.arange(B)[:, None]


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6, check_dtype=False)


def differ(a, b):
    return bool((a - b).abs().max() > 1e-4)


def test_padding_is_inert():
    """Other words under the padding, or no padding and no other clip: the same outputs."""
    model = random_model(task_heads=("contrast",))
    frames, input_ids, mask = inputs()
    other_ids = torch.where(mask, input_ids, 3)
    want = model(frames, input_ids, mask)
    got = model(frames, other_ids, mask)
    alone = model(frames[1:], input_ids[1:, :6])
    assert_close(got.text[mask], want.text[mask])
    assert_close(alone.pooled, want.pooled[1:])
    assert_close(model.encode_text(other_ids, mask), model.encode_text(input_ids, mask))


def test_pixels_are_normalised_as_imagenet():
    model = random_model()
    frames = inputs()[0]
    want = model.embed_frames(frames)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model.pixel_mean.zero_()
    model.pixel_std.fill_(1)
    assert_close(model.embed_frames((frames / 255 - mean) / std), want)


# ---- allinone: what must matter ------------------------------------------------------------------


@cases("head", HEADS)
def test_every_parameter_gets_a_gradient(head):
    """Every row of it, except row 1 of text_segment and, where no head reads it, the pooler."""
    model = random_model(task_heads=(head,))
    frames = inputs(B=5, T=4)[0]
    input_ids = torch.arange(50).view(5, 10)
    untrained = {"text_segment"}
    if head == "contrast":
        scores = model.encode_text(input_ids) + model.encode_video(frames)
    else:
        output = model(frames, input_ids)
        scores = model.task_heads[head](output.text if head == "mlm" else output.pooled)
    if head in ("contrast", "mlm"):
        untrained |= {"pooler.weight", "pooler.bias"}
    scores.square().sum().backward()
    for name, p in model.named_parameters():
        trained = p.grad is not None and bool(p.grad.any(dim=-1).all())
        assert trained == (name not in untrained), name


def test_visual_tokens_roll_before_every_block():
    """Blocks that return what they get see frames that have rolled once, twice, ..."""
    model = random_model()
    frames, input_ids, _ = inputs()
    seen = []

    def return_input(block, args, output):
        seen.append(args[0])
        return args[0]

    for block in model.blocks:
        block.register_forward_hook(return_input)
    model(frames, input_ids)
    video = model.embed_frames(frames)
    for x in seen:
        video = roll_tokens(video, *roll_groups(4, 4))
        assert_close(x[:, 7:], video.flatten(0, 1))
    assert len(seen) == 3


@cases("roll, roll_unimodal, time, joint, alone", """
none   | false | false | false | false
none   | false | true  | true  | true
spread | false | false | true  | false
spread | true  | false | true  | true
""")
def test_rolling_or_time_embeddings_see_frame_order(roll, roll_unimodal, time, joint, alone):
    """In a video with a text, or alone."""
    config = replace(SMALL, roll=roll, roll_unimodal=roll_unimodal, time=time)
    model = random_model(config, ("contrast",))
    frames, input_ids, _ = inputs(T=4)
    backwards = frames.flip(1)
    assert differ(model(backwards, input_ids).pooled, model(frames, input_ids).pooled) == joint
    assert differ(model.encode_video(backwards), model.encode_video(frames)) == alone


def test_clips_may_have_fewer_frames():
    """They use the first time embeddings."""
    model = random_model()
    clip = inputs(T=2)
    want = model(*clip).pooled
    model.time_embed.data[2:] = 9
    assert_close(model(*clip).pooled, want)


def test_model_refuses_more_than_it_has():
    model = AllInOne(SMALL)
    with pytest.raises(ValueError, match="clips of 5 frames; .* for 1 to 4"):
        model.embed_frames(torch.zeros(2, 5, 3, 32, 32))
    with pytest.raises(ValueError, match="texts of 11 tokens; .* for 10"):
        model.embed_text(torch.zeros(2, 11))
    with one_line("task head 'beam' is unknown; choose from matching, mlm"):
        AllInOne(SMALL, ("beam",))


def test_dropout_follows_embeddings_attention_and_mlp():
    """After two kinds of embeddings; in each block one in the attention and two in the MLP."""
    model = AllInOne(replace(SMALL, dropout=0.3))
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, *_: calls.append(module.p))
    model(*inputs())
    assert calls == [0.3] * (2 + 3 * 3)


def test_drop_path_leaves_out_whole_frames():
    model = AllInOne(replace(SMALL, drop_path=0.2))
    assert [block.drop_path.p for block in model.blocks] == [0, 0.1, 0.2]
    last = model.blocks[2].drop_path
    torch.manual_seed(0)
    x = last(torch.ones(4000, 2, 3))
    assert x.mean() == pytest.approx(1, abs=0.05)
    assert not x.flatten(1).diff().any()
    assert last.eval()(x) is x


# ---- allinone: how weights start -----------------------------------------------------------------


@cases("init, time, std, power", [
    (init_released, 0, 0.02, 0),
    (init_narrow, 0.5, 1, -0.5)])
def test_statistics_of_the_start(init, time, std, power):
    """Tables have this std, matrices std * fan_in ** power."""
    model = AllInOne(replace(SMALL, width=256), ("matching", "mlm", "contrast"))
    init(model)
    for name, p in model.named_parameters():
        want = std
        if name == "time_embed":
            want = time
        elif p.dim() == 1 and name != "cls_token":      # biases, LayerNorms
            want = 0
            assert p[0] == name.endswith("weight"), name
        elif name.endswith("weight") and name != "text_embed.weight":
            want = std * p[0].numel() ** power
        assert p.detach().std() == pytest.approx(want, rel=0.2), name


@cases("head", ["rank", "rank2"])
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
    for name, p in model.named_parameters():
        assert ".mc." in name or torch.equal(p, source.get_parameter(name)), name


def test_rank_heads_start_as_matching_where_the_file_lacks_them():
    source = random_model(task_heads=("matching", "rank2"))
    model = AllInOne(SMALL, ("rank", "rank2"))
    load_weights(model, checkpoint_of(source))
    assert_close(model.task_heads["rank"].weight, source.task_heads["matching"].weight[1:])
    assert_close(model.task_heads["rank2"].weight, source.task_heads["rank2"].weight)


def test_answer_head_needs_the_same_answers():
    source = checkpoint_of(AllInOne(SMALL, ("answer",)), answers="abcde")
    model = AllInOne(SMALL, ("answer",))
    assert load_weights(model, source, answers="abcde") == "loaded 57 of 57 tensors"
    line = load_weights(model, source, answers="edcba")
    assert line == "loaded 51 of 57 tensors; new: answer; not used: answer"


def test_positions_fit_other_frames_texts_and_images():
    """More frames start at zero, more text as in the new model; fewer frames are the first."""
    source = random_model()
    more = random_model(replace(SMALL, image=48, frames=6, text_length=12))
    new = more.text_pos[10:].clone()
    load_weights(more, checkpoint_of(source))
    assert_close(more.time_embed, F.pad(source.time_embed, (0, 0, 0, 2)))
    assert_close(more.text_pos, torch.cat([source.text_pos, new]))
    assert_close(more.pos_embed, resize_positions(source.pos_embed, 6))
    fewer = random_model(replace(SMALL, frames=2))
    load_weights(fewer, checkpoint_of(source))
    assert_close(fewer.time_embed, source.time_embed[:2])


def test_positions_are_resized_bicubically():
    """CLS stays. A step between two rows stays one, and overshoots a little."""
    rows = torch.tensor([7.0] + [0.0] * 8 + [1.0] * 8)
    cls, *picture = resize_positions(rows[:, None], 6)[:, 0].tolist()
    assert cls == 7
    assert max(picture[:6]) < 0.1 and min(picture[-6:]) > 0.9
    assert min(picture) < -0.01 and max(picture) > 1.01


@cases("field", ["width", "layers", "heads", "patch", "vocab"])
def test_weights_of_another_size_are_refused(field):
    config = replace(SMALL, **{field: 2 * getattr(SMALL, field)})
    with one_line("leave out --size"):
        load_weights(AllInOne(config), checkpoint_of(AllInOne(SMALL)))


# ---- allinone: our checkpoints -------------------------------------------------------------------

TINY = replace(SMALL, width=16, layers=1, image=16, text_length=4, vocab=10, answers=2)
CONFIG = asdict(TINY)


FILE = Path("file.pt")


def write_content(path=FILE, **changes):
    """A checkpoint, with parts of its content replaced. -> its state dict"""
    model = AllInOne(TINY, ("answer",))
    content = checkpoint_of(model, answers=["yes", "no"])
    torch.save({**content, "config": CONFIG, **changes}, path)
    return model.state_dict()


def assert_refused(line, path=FILE):
    with one_line(f"{path}.*{line}"):
        load_checkpoint(path)


def test_checkpoint_comes_back():
    model = AllInOne(TINY, ("answer",))
    save_checkpoint(FILE, model, answers=["yes", "no"], tokenizer="{}", step=3)
    checkpoint = load_checkpoint(FILE)
    again = build_model(checkpoint)
    assert not again.training
    assert_close(again.state_dict(), model.state_dict())
    assert checkpoint == checkpoint_of(model, ["yes", "no"]) | {
        "model": checkpoint["model"], "step": 3}


def test_flipped_bit_never_becomes_a_weight():
    """Anywhere in the file: it is refused, unless the bit means nothing."""
    state = write_content()
    good = FILE.read_bytes()
    for position in range(0, len(good), len(good) // 150):
        flipped = bytearray(good)
        flipped[position] ^= 1
        FILE.write_bytes(flipped)
        with suppress(UserError):
            loaded = load_checkpoint(FILE)["model"]
            assert all(torch.equal(loaded[name], state[name]) for name in state), position


def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded():
    model = AllInOne(TINY, ("answer",))
    model.norm.bias.data[3] = torch.nan
    with one_line("norm.bias holds numbers that are not finite"):
        save_checkpoint(FILE, model, [], "{}")
    write_content(model=model.state_dict())
    assert_refused("norm.bias holds numbers that are not finite")


def test_broken_files_are_one_line():
    write_content()
    good = FILE.read_bytes()
    for content in (b"", b"What is she doing?\n" * 99, good[:9000]):
        FILE.write_bytes(content)
        assert_refused("is not a checkpoint, or is damaged")
    torch.save([1], FILE)
    assert_refused("is not a checkpoint of train.py")
    assert_refused("cannot be read: Is a directory", ".")
    assert_refused("cannot be read: No such file", "none.pt")


def test_compressed_files_are_refused():
    """A small file could hold gigabytes."""
    write_content()
    source = zipfile.ZipFile(FILE)
    with zipfile.ZipFile("packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    assert_refused("damaged .compressed.", "packed.pt")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_file_is_not_executed():
    torch.save({"config": CONFIG, "x": Bomb()}, FILE)
    assert_refused("is not a checkpoint, or is damaged")
    assert not os.path.exists("executed")


@cases("field, value, line", """
config     | null          | not a checkpoint of train.py; .* python tools/weights.py
config     | {}            | config fields .*'width'.* missing
model      | null          | model is missing or not a dict
task_heads | null          | task_heads is missing or not a list
task_heads | [["answer"]]  | task head .* is unknown
answers    | ab            | answers is missing or not a list
answers    | ["a", 2]      | answers are not all texts
answers    | ["a"]         | 1 answers for 2 classes
tokenizer  | null          | holds no tokenizer
""")
def test_content_that_does_not_fit_is_named(field, value, line):
    write_content(**{field: value})
    assert_refused(line)


@pytest.mark.filterwarnings("ignore")           # PyTorch warns about nested tensors
@cases("change, line", [
    (torch.Tensor.tolist, "is not a dense tensor"),
    (torch.Tensor.to_sparse, "is not a dense tensor"),
    (lambda weight: weight.to("meta"), "is not a dense tensor"),
    (lambda weight: torch.nested.nested_tensor([weight]), "is not a dense tensor"),
    (torch.Tensor.double, "has dtype torch.float64, not float32"),
    (lambda weight: weight[:9], "has shape .9, 16., its config means .16, 16.")])
def test_tensors_that_do_not_fit_are_named(change, line):
    state = write_content()
    state["pooler.weight"] = change(state["pooler.weight"])
    write_content(model=state)
    assert_refused(f"pooler.weight {line}")


def test_extra_and_missing_tensors_are_named():
    state = write_content()
    write_content(model={**state, "a\x1b[2J": state["norm.bias"]})
    assert_refused(r"tensor a\\x1b\[2J has no place")
    del state["pooler.weight"]
    write_content(model=state)
    assert_refused("lacks 1 tensors, among them pooler.weight")


def test_small_file_cannot_claim_gigabytes():
    """2 GiB of word embeddings: one number, repeated."""
    config = replace(TINY, width=512)
    state = AllInOne(config, ("answer",)).state_dict()
    state["text_embed.weight"] = torch.zeros(1).expand(2 ** 20, 512)
    claimed = asdict(config) | {"vocab": 2 ** 20}
    write_content(config=claimed, model=state)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused("text_embed.weight lacks numbers")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2 ** 18     # KiB


# ---- allinone: what every script needs -----------------------------------------------------------


def no_space(*args):
    raise OSError(28, "No space left on device")


def fill_disk(patch, free=0):
    """A disk on which `free` more files can be written."""
    def fsync(descriptor, calls=[]):
        calls.append(descriptor)
        if len(calls) > free:
            no_space()

    patch.setattr(os, "fsync", fsync)


def test_full_disk_leaves_the_file_before(monkeypatch):
    write_file(FILE, "the file before")
    fill_disk(monkeypatch)
    with one_line("file.pt cannot be written: No space left on device; make room"):
        write_file(FILE, "new")
    assert FILE.read_text() == "the file before"
    assert os.listdir() == ["file.pt"]


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


@cases("rank, terminal, bar", """
0 | true  | true
0 | false | false
1 | true  | false
""")
def test_terminal_of_rank_0_gets_a_progress_bar(rank, terminal, bar, monkeypatch, capsys):
    """Of at most 79 columns."""
    monkeypatch.setattr(allinone, "RANK", rank)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(progress("abc", "reading")) == ["a", "b", "c"]
    printed = capsys.readouterr().err
    assert ("reading: " in printed) == bar
    assert max(map(len, printed.split("\r"))) <= 79


# ---- data: frame sampler -------------------------------------------------------------------------

N = 60                              # frames of the clips below: file name, codec, its options
CLIPS = {name: row for name, *row in table("""
mpeg4.avi      | mpeg4      | g=12
mpeg4.mp4      | mpeg4      | g=12
mpeg4_b.avi    | mpeg4      | bf=2 g=12
mpeg4_b.m4v    | mpeg4      | bf=2 g=12
mpeg4_b.mkv    | mpeg4      | bf=2 g=12
h264_b.mp4     | libx264    | bf=3 g=12
h264_b.avi     | libx264    | bf=3 g=12
h264_long.mkv  | libx264    | bf=3 g=250
open_gop.ts    | libx264    | bf=3 g=12 x264-params=open-gop=1:b-adapt=0
refresh.mp4    | libx264    | g=12 x264-params=intra-refresh=1
interlaced.mp4 | libx264    | flags=+ildct+ilme x264-params=tff=1
ten_bit.mov    | libx264    | g=12 | yuv420p10le
no_times.h264  | libx264    | bf=2 g=12
hevc.mp4       | libx265    | x265-params=keyint=12:log-level=none:pools=1
vp8.webm       | libvpx     | auto-alt-ref=1 lag-in-frames=10 g=20
vp9.webm       | libvpx-vp9 | g=20 deadline=realtime cpu-used=8
mpeg2.mpg      | mpeg2video | bf=2 g=12
loop.gif       | gif        | | rgb8
""")}


def picture(i, w=80):
    """A moving square on a moving gradient, so that no two frames are alike."""
    y, x = np.mgrid[:48, :w]
    rgb = np.stack((x * 3 + i * 4, y * 5, x + y + i), -1).astype(np.uint8)
    rgb[8:24, i % w:i % w + 12] = 255 - 3 * i
    return rgb


def add_silence(out):
    """A second of sound."""
    stream = out.add_stream("aac", rate=44100)
    for i in range(43):
        silence = np.zeros((2, 1024), np.float32)
        sound = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
        sound.sample_rate, sound.pts = 44100, 1024 * i
        out.mux(stream.encode(sound))


def encode(path, codec, options="", pixels="yuv420p", n=N, at=lambda i: i, w=80, sound=False):
    """Write n pictures, the i-th at time at(i) / 24 s. With sound, a PNG is its cover picture."""
    path = Path(path)
    options = dict(option.split("=", 1) for option in options.split())
    container = "m4v" if path.suffix == ".m4v" else None           # or it would be an mp4
    with av.open(str(path), "w", format=container) as out:
        try:
            video = out.add_stream(codec, rate=24, options=options)
        except av.codec.codec.UnknownCodecError:
            pytest.skip(f"this FFmpeg has no encoder {codec}")
        video.width, video.height, video.pix_fmt = w, 48, pixels
        video.codec_context.thread_count = 1
        if sound:
            if codec == "png":
                video.disposition = av.stream.Disposition.attached_pic
            add_silence(out)
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(picture(i, w), format="rgb24")
            frame.pts = at(i)
            out.mux(video.encode(frame))
        out.mux(video.encode())
    return path


def photograph(path, w=80):
    return encode(path, "mjpeg", pixels="yuvj420p", n=1, w=w)


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


def patch(source, path, at, part):
    """A copy of a file with a few bytes changed."""
    content = source.read_bytes()
    Path(path).write_bytes(content[:at] + part + content[at + len(part):])
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


def check_exact(path, step=9, **more):
    """Count; all frames at once, single ones, and the ends; each against decode_all."""
    truth = np.array(decode_all(path))
    n = len(truth)
    assert len(times_of(path)) == n
    singles = [[i] for i in range(0, n, step)]
    for numbers in ([*range(n)], [n - 1, 0], [n // 2, n // 3, n // 4], *singles):
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

@cases("n, T, expected", """
1  | 3 | [0, 0, 0]
2  | 3 | [0, 1, 1]
4  | 3 | [0, 2, 3]
9  | 3 | [1, 4, 7]
10 | 1 | [5]
""")
def test_evaluation_takes_the_middle_of_each_segment(n, T, expected):
    assert frame_indices(n, T, "eval") == expected


def test_training_takes_every_frame_of_each_segment():
    rng = np.random.default_rng(0)
    draws = np.array([frame_indices(9, 3, "train", rng) for _ in range(300)])
    for t in range(3):
        assert set(draws[:, t]) == {3 * t, 3 * t + 1, 3 * t + 2}


def test_training_draws_no_frame_beyond_the_last():
    """The float below 1, added to an integer, rounds up."""
    highest = Namespace(random=lambda T: np.full(T, np.nextafter(1, 0)))
    assert frame_indices(9, 3, "train", highest)[-1] == 8


@cases("name", CLIPS)
def test_frames_are_exact(media, name):
    """Of every container and codec: the frames of decoding everything, at the same numbers."""
    assert readable(media(name))
    check_exact(media(name))


@cases("name, wanted, fed, given", """
h264_b.mp4    | [2, 14] | 20 | 20
h264_b.mp4    | [2, 50] | 20 | 20
open_gop.ts   | [30]    | 15 | 14
h264_long.mkv | [50]    | 59 | 40
mpeg4.mp4     | [1]     | 2  | 2
mpeg4_b.avi   | [40]    | 13 | 8
""")
def test_few_frames_take_few_packets(media, counts, name, wanted, fed, given):
    """And of the pictures in these packets, those that no other refers to are not decoded."""
    read_frames(media(name), wanted)
    assert counts["fed"] <= fed
    assert counts["given"] <= given


def test_pictures_of_packed_files_are_skipped_too(media, counts):
    path = remux(media("mpeg4_b.avi"), "packed.avi", pack)
    check_exact(path, step=1)
    counts.clear()
    read_frames(path, [30])
    assert counts["given"] < 30


@cases("name", [
    "mm_demo.mp4", "mm_test.avi", "newton.gif", "realshort.mp4", "tc_nasa_13013.mp4"])
def test_real_clips_are_exact(name):
    """With rotation, B-frames, packed B-frames and no frame counts."""
    check_exact(shared(f"reference/videos/{name}"), step=99)


@cases("picks", [[N], [-1], []])
def test_picks_out_of_range(media, picks):
    """A frame that is not there is an error, as is no frame at all."""
    with one_line("0 to 59", VideoError):
        read_frames(media("h264_b.mp4"), picks)


def test_times_at_a_variable_rate():
    path = encode("vfr.mp4", "libx264", "bf=2", n=10, at=lambda i: i * i)
    assert np.allclose(times_of(path), np.arange(10) ** 2 / 24, atol=1e-4)


@cases("name, rate", """
mpeg4_b.avi   | 24
open_gop.ts   | 24
vp8.webm      | 24
no_times.h264 | 25
""")
def test_times_of_containers(media, name, rate):
    """AVI and raw streams have no timestamps, MPEG-TS starts at 1.4 s, Matroska rounds to 1 ms."""
    assert np.allclose(times_of(media(name)), np.arange(N) / rate, atol=6e-4)


@cases("name", ["late.mp4", "late.mkv", "late.ts"])
def test_times_count_from_the_container_start(name):
    """Where sound comes first, the first picture is not at 0."""
    path = encode(name, "libx264", n=24, at=lambda i: 12 + i, sound=True)
    late = 0.5 + np.arange(24) / 24
    assert np.abs(times_of(path) - late).max() < 0.03           # the encoder's delay


@cases("blocks", [
    b"!\xfe\5hello\3abc\0", b"!\xf9\4\4\x14\0\0\0", b"!\xfe\1,\0!\xf9\4\4\x14\0\0\0"])
def test_gif_may_end_in_an_extension(media, blocks):
    """Blocks after the last picture are no frame."""
    path = Path("comment.gif")
    path.write_bytes(media("loop.gif").read_bytes()[:-1] + blocks + b";")
    check_exact(path)


# ---- data: frame sampler, pixels ----

@pytest.fixture
def still():
    return encode("one.png", "png", pixels="rgb24", n=1)


def scaled(square):
    """(3, h, w) -> (3, 32, 32)."""
    return F.interpolate(square[None].float(), (32, 32), mode="bilinear", antialias=True)[0]


@cases("place, x, y", """
[0.5, 0.5] | 20 | 4
[0, 0]     | 0  | 0
[1, 1]     | 40 | 8
[1, 0]     | 40 | 0
""")
def test_square_is_scaled(still, place, x, y):
    """size=R is the square at `place` of side min(w, h) / zoom, scaled."""
    square = read_frames(still, [0])[0, :, y:y + 40, x:x + 40]
    got = read_frames(still, [0, 0], 32, place)
    assert got.shape == (2, 3, 32, 32) and got.dtype == torch.uint8 and got.is_contiguous()
    assert (got[1] - scaled(square)).abs().mean() < 0.6


def test_scaling_keeps_the_levels():
    path = encode("lossless.mp4", "libx264", "qp=0", n=2)
    level = read_frames(path, [1], 48, zoom=1.0).float().mean()
    assert abs(level - picture(1)[:, 16:64].mean()) < 0.6


def test_square_is_independent_of_history_and_threads(media):
    """The kept filter graphs leak nothing from one clip, place or thread to another."""
    def read(job):
        name, place = job
        return read_frames(media(name), [3, 40] * 9, 224, place)

    jobs = [("h264_b.mp4", (0, 1)), ("hevc.mp4", (1, 0)), ("mpeg4.mp4", (0, 1))]
    alone = []
    for job in jobs:
        data._filter_graph.cache_clear()
        alone.append(read(job))
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(read, jobs * 6))
    assert all(map(torch.equal, alone * 6, together))


def display_matrix(a, b, c, d):
    return struct.pack(">5i", a << 16, b << 16, 0, c << 16, d << 16)


def upright(frame, quarters, mirror):
    return np.rot90(frame, quarters, (1, 2))[:, :, ::mirror]


@cases("matrix, quarters, mirror", """
[0, 1, -1, 0]  | -1 | 1
[-1, 0, 0, -1] | 2  | 1
[0, -1, 1, 0]  | 1  | 1
[-1, 0, 0, 1]  | 0  | -1
[0, 0, 0, 0]   | 0  | 1
""")
def test_rotation(media, matrix, quarters, mirror):
    """A display matrix turns and mirrors the frames; place is a place of the upright picture."""
    source = media("h264_b.mp4")
    at = source.read_bytes().rindex(display_matrix(1, 0, 0, 1))
    path = patch(source, "turned.mp4", at, display_matrix(*matrix))
    expected = upright(decode_all(source)[5], quarters, mirror)
    assert np.array_equal(read_frames(path, [5])[0], expected)
    corner = read_frames(path, [5], 48, (0, 0), zoom=1)[0].numpy()
    assert np.abs(corner - expected[:, :48, :48].astype(int)).mean() < 3


@cases("orientation, quarters, mirror", """
6 | -1 | 1
5 | -1 | -1
""")
def test_exif_orientation(orientation, quarters, mirror):
    jpeg = photograph("plain.jpg")
    tag = struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    path = Path("turned.jpg")
    path.write_bytes(b"\xff\xd8\xff\xe1\0\x22Exif\0\0MM\0*" + tag + jpeg.read_bytes()[2:])
    expected = upright(decode_all(jpeg)[0], quarters, mirror)
    assert np.array_equal(read_frames(path, [0])[0], expected)


def test_frames_are_let_go(media):
    """A converted frame is freed at once: a cycle would keep those of a whole clip."""
    with av.open(str(media("mpeg4.mp4"))) as container:
        frame = next(container.decode(video=0))
    before = sys.getrefcount(frame)
    data._to_rgb(frame, 32, (0.5, 0.5), 1.2)
    assert sys.getrefcount(frame) == before


@cases("row, col, share", """
11 | 40 | 0
12 | 40 | 1
14 | 40 | 1
15 | 40 | 0.3
35 | 40 | 1
24 | 22 | 1
24 | 23 | 0.3
24 | 59 | 1
24 | 60 | 0
""")
def test_box_is_washed_with_its_colour_and_framed(still, row, col, share):
    """By 3 px; of the first box it is red."""
    rgb = read_frames(still, [0], boxes=[(0.25, 0.25, 0.75, 0.75)])[0, :, row, col].numpy()
    expected = (1 - share) * picture(0)[row, col] + share * np.array((255, 0, 0))
    assert np.abs(rgb - expected).max() <= 0.5


def test_boxes_differ_in_colour_and_are_cropped_with_the_frame(still):
    boxes = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    full = read_frames(still, [0], boxes=boxes)[0]
    assert not torch.equal(full[:, 0, 0], full[:, 0, 79])
    square = read_frames(still, [0], 32, (1, 0), boxes=boxes)[0]
    assert (square - scaled(full[:, :40, 40:])).abs().mean() < 0.6


def test_folder_is_a_clip_of_its_pictures():
    """It opens picked files only."""
    for i in (0, 1, 2, 10):
        photograph(f"frame{i}.jpg", w=40 + 8 * i)
    for name in ("frame3.jpg", ".frame0.jpg", "notes.txt"):
        Path(name).write_text("not a picture")
    assert readable(".")
    assert times_of(".").tolist() == [0, 1, 2, 3, 4]
    for frame, name in zip(read_frames(".", [4, 1], 16), ("frame10.jpg", "frame1.jpg")):
        assert torch.equal(frame, read_frames(name, [0], 16)[0])
    with one_line("frame3.jpg", VideoError):
        read_frames(".", [3])
    with one_line("its frames differ in size; read them with a size", VideoError):
        read_frames(".", [0, 1])


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


def pack(packets, announced=True):
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


def halve(payload):
    return payload[:len(payload) // 2].ljust(len(payload), b"U")


@cases("source, path, edit", [
    ("h264_b.mp4", "cut.mkv", lambda packets: packets[5:]),
    ("open_gop.ts", "cut.ts", lambda packets: packets[24:]),
    ("mpeg4.mp4", "keys.mp4", all_keys),
    ("hevc.mp4", "keys_hevc.mp4", all_keys),
    ("vp9.webm", "repeated.webm", repeat_times),
    ("mpeg4.mp4", "dropped.avi", drop_pictures),
    ("mpeg4_b.avi", "packed.avi", pack),
    ("mpeg4_b.avi", "silent.avi", partial(pack, announced=False)),
    ("mpeg4_b.mkv", "packed.mkv", pack),
    ("mpeg4_b.mkv", "silent.mkv", partial(pack, announced=False)),
    ("h264_b.mp4", "concealed.mp4", partial(spoil, numbers=(14, 20, 40), change=halve))])
def test_lies_of_containers(media, source, path, edit):
    """Cut starts, false key frames and times, dropped or packed pictures (where packing is not
    announced FFmpeg loses some), damage that FFmpeg conceals: still what decoding gives."""
    check_exact(remux(media(source), path, edit))


def test_swapped_times_without_b_frames(media):
    """Times that fall from one packet to the next are wrong, also when one frame alone is read."""
    check_exact(remux(media("vp9.webm"), "swapped.webm", swap_times), step=1)


def test_edit_list_cuts_frames(media):
    """The first 20 frames are hidden, though others refer to them."""
    source = media("h264_b.mp4")
    at = source.read_bytes().index(b"elst") + 16        # past version, count, duration
    start, = struct.unpack_from(">i", source.read_bytes(), at)
    path = patch(source, "edit.mp4", at, struct.pack(">i", start + 20 * 512))
    assert len(decode_all(path)) == N - 20
    check_exact(path)


@cases("name, keep", """
h264_b.mp4    | 0
h264_b.mp4    | 6
h264_long.mkv | 6
mpeg4.mp4     | 6
""")
def test_damaged_packets(media, name, keep):
    """Frames that FFmpeg gives up are refused, all others are those of decoding the file whole."""
    spoilt = lambda payload: payload[:keep] + bytes(range(1, 60))
    path = remux(media(name), name, partial(spoil, numbers=(15, 16), change=spoilt))
    good = []
    for i in range(N):
        with suppress(VideoError):
            good.append(read_frames(path, [i])[0].numpy())
    assert len(good) == N - 2
    assert np.array_equal(good, decode_all(path))


@cases("name, last", """
h264_long.mkv | 7
mpeg4.avi     | -1
mpeg4_b.avi   | 7
loop.gif      | 7
open_gop.ts   | 7
vp9.webm      | 7
""")
def test_truncated(media, name, last):
    """A file that is cut gives its first frames exactly."""
    path = Path(name)
    content = media(name).read_bytes()
    path.write_bytes(content[:len(content) * 8 // 10])
    n = len(times_of(path))
    picks = [2, last % n]
    assert 7 < n < N
    assert np.array_equal(read_frames(path, picks), np.array(decode_all(media(name)))[picks])


# ---- data: frame sampler, hostile files ----

def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


HOSTILE = {
    "empty.mp4": b"", "text.mp4": b"hello\n" * 99, "text.jpg": b"hello\n" * 99,
    "zeros.avi": bytes(5000),
    "list.mp4": b"ffconcat version 1.0\nfile 'good.mp4'\n",
    "playlist.mp4": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n",
    "bomb.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b";",
    "bomb.png": b"\x89PNG\r\n\x1a\n" + chunk(        # 110 million pixels in 0.1 MB
        b"IHDR", struct.pack(">IIBBBBB", 11000, 10000, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(10000 * 11001))) + chunk(b"IEND", b""),
    "moving.webp": b"RIFF\x2c\0\0\0WEBPVP8X\x0a\0\0\0\2" + bytes(9) + b"ANIM\6\0\0\0" + bytes(6),
}


def refused_at_once(path, cause=""):
    start = time.perf_counter()
    with one_line(f"{path}.*{cause}", VideoError):
        read_frames(path, [0], 32)
    assert time.perf_counter() - start < 5


@cases("name", HOSTILE)
def test_files_without_frames_are_one_line(media, name):
    shutil.copy(media("h264_b.mp4"), "good.mp4")
    Path(name).write_bytes(HOSTILE[name])
    refused_at_once(name, "animated WebP" if name == "moving.webp" else "")


def test_empty_folder_is_one_line():
    refused_at_once(".", "no frames in it")


def test_stream_that_begins_late_is_one_line(media):
    """The start of the file does not announce it."""
    source = media("open_gop.ts")
    at = source.read_bytes().rindex(b"\x47\x41\0")
    refused_at_once(patch(source, "late.ts", at + 2, b"\xb8"), "begins late")


def test_sound_with_a_cover_picture_is_one_line():
    path = encode("cover.mp4", "png", pixels="rgb24", n=1, sound=True)
    refused_at_once(path, "no video stream")


def test_odd_names():
    """A name is only a name, with a colon, a pattern or other bytes in it."""
    photograph("1.jpg")
    other = photograph("other.jpg", w=96)
    for name in ("concat:a.jpg", "%d.jpg", os.fsdecode(b"\xff.jpg")):
        shutil.copy(other, name)
        assert torch.equal(read_frames(name, [0]), read_frames(other, [0]))


def test_pipe_does_not_block():
    os.mkfifo("pipe.mp4")
    reader = threading.Thread(target=refused_at_once, args=["pipe.mp4"], daemon=True)
    reader.start()
    reader.join(5)
    assert not reader.is_alive()


def test_bombs_are_not_decoded_by_opening():
    """FFmpeg decodes a picture to learn what it is; the limit must hold there too."""
    Path("bomb.png").write_bytes(HOSTILE["bomb.png"])
    with av.open("bomb.png", options=data.OPEN_OPTIONS) as container:
        assert container.streams.video[0].codec_context.pix_fmt is None


# ---- data: frame sampler, kept listings ----

@pytest.fixture
def large(monkeypatch):
    """All files count as large."""
    monkeypatch.setattr(data, "LARGE_FILE", 0)


@cases("name", ("h264_b.mp4 h264_long.mkv open_gop.ts vp9.webm mpeg4_b.avi h264_b.avi mpeg2.mpg "
                "vp8.webm loop.gif").split())
def test_large_files_are_exact(media, large, name):
    """On the first visit, on later ones, and in files that cannot seek."""
    check_exact(media(name))
    check_exact(media(name), listings=".")
    assert len(os.listdir()) == 1


@cases("name", ["h264_b.mp4", "open_gop.ts", "mpeg4.avi", "vp9.webm"])
def test_later_visits_read_little(media, large, counts, name):
    """The first visit lists all packets and seeks, a later one only seeks."""
    for most in (N + 25, 25):
        counts.clear()
        read_frames(media(name), [50], listings=".")
        assert counts["read"] < most


def test_workers_may_write_the_same_listing(media, large):
    read = lambda _: read_frames(media("h264_b.mp4"), [50], 32, listings=".")
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(read, range(8)))) == 8
    assert len(os.listdir()) == 1


def test_unknown_orders_are_counted_once(media, counts):
    """A small file too keeps its listing, if only decoding shows how many frames it has."""
    for given in (N + 21, 21):
        counts.clear()
        read_frames(media("vp8.webm"), [20], listings=".")
        assert counts["given"] == given
    read_frames(media("mpeg4.mp4"), [20], listings=".")
    assert len(os.listdir()) == 1


def test_listing_of_another_file(media, large):
    """Packets that differ from the listing are a doubt: the frames are right all the same."""
    read_frames(media("mpeg4.mp4"), [50], listings=".")
    file, = os.listdir()
    os.rename(file, data._listing_file(media("h264_b.mp4"), "."))
    check_exact(media("h264_b.mp4"), listings=".")


def test_damaged_listings_are_written_anew(media, large):
    """Cut or pickled: a listing that cannot be read is replaced."""
    read = lambda: read_frames(media("h264_b.mp4"), [50], 32, listings=".")
    right = read()
    file, = Path().iterdir()
    for content in (file.read_bytes()[:-9], pickle.dumps(right)):
        file.write_bytes(content)
        assert torch.equal(read(), right)
        assert np.load(file)["pts"].shape == (N,)


def test_listing_on_a_full_disk_is_one_line(media, large, monkeypatch):
    monkeypatch.setattr(os, "replace", no_space)
    with one_line("No space left on device; make room"):
        read_frames(media("h264_b.mp4"), [0], listings=".")
    assert not os.listdir()


def test_folder_that_cannot_be_written_keeps_no_listing(media, large, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    read_frames(media("h264_b.mp4"), [0], listings=".")
    assert not os.listdir()


# ---- data: the benchmarks ------------------------------------------------------------------------

USUAL = ("epochs=0 steps=0 head_lr=1 warmup=0 text_length=40 frames=3 views=1 "
         "option_format=options")


@cases("name, recipe", """
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
""")
def test_recipes_are_the_released_ones(name, recipe):
    benchmark = replace(BENCHMARKS[name], heads=",".join(BENCHMARKS[name].heads))
    expected = dict(setting.split("=") for setting in f"{USUAL} {recipe}".split())
    assert {field: str(getattr(benchmark, field)) for field in expected} == expected


@cases("name, rerun, paper", """
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
""")
def test_published_figures(name, rerun, paper):
    assert str(rerun) in BENCHMARKS[name].rerun
    assert str(paper) in BENCHMARKS[name].paper


# ---- data: the manifest --------------------------------------------------------------------------

QUESTION = {"id": "7", "video": "a.mp4", "question": "what is it?", "answer": "ein Würfel"}
CAPTION = {"id": "8", "video": "b.mp4", "caption": "a red ring"}


def write_rows(rows, file="train.jsonl"):
    """Write rows (dicts, or lines as they are), without a newline at the end of the file."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(file).write_text("\n".join(lines), encoding="utf-8")


def open_rows(rows):
    write_rows(rows)
    return Manifest(".", "train")


def write_info(**info):
    """Make it a prepared folder, whose rows are checked only when they are read."""
    Path("dataset.json").write_text(json.dumps({"root": "/media", "prepared": {}, **info}))


def test_rows_come_back_as_written():
    """Blank lines are no rows, and the last line needs no newline."""
    as_text = json.dumps(QUESTION, ensure_ascii=False)
    rows = open_rows(["", as_text, "", "", QUESTION])
    assert len(rows) == 2
    assert rows[0] == QUESTION


def test_rows_are_read_when_asked_for():
    """In memory is one number a row. A mistake in a prepared row shows when the row is read."""
    write_info()
    rows = open_rows([QUESTION, "nonsense", CAPTION])
    assert rows.offsets.nbytes == 8 * 3
    assert rows[2] == CAPTION
    with one_line("train.jsonl, row 2"):
        rows[1]


def test_offsets_are_kept_until_the_file_changes():
    open_rows([CAPTION] * 2)
    kept = Path("train.jsonl.offsets.npy")
    np.save(kept, np.load(kept)[:-1])           # one row less shows that this file is used
    assert len(Manifest(".", "train")) == 1
    assert len(open_rows([CAPTION] * 3)) == 3
    kept.write_bytes(b"PK\3\4 damaged")
    assert len(Manifest(".", "train")) == 3


def test_crc_changes_with_a_row():
    crc = open_rows([QUESTION]).crc
    write_rows([QUESTION | {"id": "8"}])      # as many bytes
    os.utime("train.jsonl", (0, 0))
    assert Manifest(".", "train").crc != crc


def test_a_folder_that_cannot_be_written_can_be_read(monkeypatch):
    monkeypatch.setattr(np, "save", no_space)
    assert len(open_rows([CAPTION] * 2)) == 2


def test_each_process_opens_its_own_file(monkeypatch):
    """Processes that share an open file share its position, and would read each other's rows."""
    rows = open_rows([QUESTION])
    file = rows.file
    assert pickle.loads(pickle.dumps(rows))[0] == QUESTION
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert rows[0] == QUESTION
    assert rows.file is not file


def test_own_data_needs_no_dataset_json():
    """The folder is the root, rows are numbered from 1, and a path may be absolute."""
    absolute = {"video": "/clips/a.mp4", "label": 3}
    rows = open_rows([absolute] * 2)
    assert rows.root == "."
    assert rows[1] == absolute | {"id": "2"}


@cases("cause, line", r"""
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
""")
def test_a_malformed_row_is_one_line(cause, line):
    good = {"video": "a.mp4", "label": 3}
    with one_line(f"train.jsonl, row 2: .*{cause}"):
        open_rows([good, line])


@cases("cause, info", """
no root folder | ["/media"]
no root folder | {"benchmark": "msrvtt"}
no root folder | {"root": 5}
is unknown     | {"root": "/media", "benchmark": "msrvtt-qqq"}
is unknown     | {"root": "/media", "benchmark": null}
is unknown     | {"root": "/media", "benchmark": ["msrvtt"]}
""")
def test_a_damaged_dataset_json_is_one_line(cause, info):
    Path("dataset.json").write_text(json.dumps(info))
    with one_line(f"dataset.json.*{cause}"):
        manifest_info(".")


def test_a_folder_without_data_names_the_next_command():
    with one_line("tools/prepare.py"):
        manifest_info(".")
    write_rows([""])
    with one_line("val.jsonl .*tools/prepare.py"):
        Manifest(".", "val")
    with one_line("train.jsonl has no rows"):
        benchmark_of(".")
    Path("dataset.json").write_text('{"root": "/me')
    with one_line("dataset.json cannot be read"):
        manifest_info(".")


@cases("like, task, row", """
msrvtt-qa   | null     | {"video": "a.mp4", "question": "what?", "answer": "red"}
tgif-action | null     | {"video": "a.mp4", "options": ["red", "blue"], "answer": 0}
vcr         | vcr      | {"video": "a.mp4", "options": ["red", "blue"], "answer": 0}
msrvtt      | null     | {"video": "a.mp4", "captions": ["a ring"]}
webvid      | pretrain | {"video": "a.mp4", "caption": "a ring"}
hmdb51      | null     | {"video": "a.mp4", "label": 0}
""")
def test_own_data_follows_the_recipe_of_a_benchmark(like, task, row):
    write_rows([row], "test.jsonl")
    assert benchmark_of(".", task) == (Path.cwd().name, BENCHMARKS[like])


def test_answers_of_own_data_are_counted():
    """The most frequent first, equals in alphabetical order."""
    write_rows([QUESTION | {"answer": answer} for answer in "bdccabc"])
    assert read_answers(".") == ["c", "b", "a", "d"]
    write_rows([{"video": "a.mp4", "label": 1}])
    assert read_answers(".") == ["class 0", "class 1"]


def test_answers_txt_is_taken_as_it_is():
    Path("answers.txt").write_text("d\nein Würfel\n", encoding="utf-8")
    assert read_answers(".") == ["d", "ein Würfel"]


@cases("content, cause", r"""
                     | empty
"red\n\nblue\n"      | empty
"red\nblue\nred\n"   | repeats
"red\n\u00ff\n"      | cannot be read
""")
def test_a_damaged_answers_txt_is_one_line(content, cause):
    Path("answers.txt").write_text(content, encoding="latin-1")
    with one_line(f"answers.txt .*{cause}"):
        read_answers(".")


# ---- data: words into tokens ---------------------------------------------------------------------

WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] a red blue ring square mov ##es left what is it ? options "
         ": answer person doing ##s").split()
VOCABULARY = {word: i for i, word in enumerate(WORDS)}
TOKENIZER = Tokenizer(wordpiece(VOCABULARY))


def spell(ids):
    return " ".join(WORDS[i] for i in ids)


def load_vocabulary(words):
    Path("vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return Tokenizer.load("vocab.txt")


@cases("text, L, expected", """
A RED ring | 40 | [CLS] a red ring [SEP]
a red ring | 4  | [CLS] a red [SEP]
moves?     | 40 | [CLS] mov ##es ? [SEP]
mauve      | 40 | [CLS] [UNK] [SEP]
           | 40 | [CLS] [SEP]
""")
def test_a_text_is_cut_to_L_tokens(text, L, expected):
    assert spell(TOKENIZER.encode(text, L)) == expected


def test_a_file_cannot_ask_for_padding_or_truncation():
    """[PAD] would be read as a word."""
    foreign = wordpiece(VOCABULARY)
    foreign.enable_padding(length=20)
    foreign.enable_truncation(3)
    loaded = Tokenizer.from_json(foreign.to_str())
    assert spell(loaded.encode("what is it?", 40)) == "[CLS] what is it ? [SEP]"


def test_a_cased_vocabulary_stays_cased():
    cased = load_vocabulary([*WORDS, "Café", "The"])
    assert cased.tokenizer.decode(cased.ids("The Café is red")) == "The Café is red"


def test_size_is_the_largest_id_plus_one():
    """A vocabulary that repeats a line has fewer words than ids."""
    repeated = load_vocabulary([*WORDS, "red", "blue"])
    assert len(repeated) == len(WORDS) + 2


@cases("name, content, cause", r"""
bad.json | {              | bad.json: EOF .*; give a tokenizer.json, a vocab.txt or a hub name
bad.txt  | "\u00ff\u00fe" | bad.txt: .* UTF-8; give a tokenizer.json
few.txt  | "[PAD]\n[UNK]\n[CLS]\n[SEP]\nred" | lacks some of .*MASK
""")
def test_a_damaged_tokenizer_is_one_line(name, content, cause):
    Path(name).write_text(content, encoding="latin-1")
    with one_line(cause):
        Tokenizer.load(name)


def test_a_tokenizer_travels():
    """To workers by pickle, into checkpoints as text, between projects as vocab.txt."""
    Path("tokenizer.json").write_text(TOKENIZER.to_json())
    for same in (pickle.loads(pickle.dumps(TOKENIZER)), load_vocabulary(WORDS),
                 Tokenizer.load("tokenizer.json")):
        assert spell(same.encode("[MASK] moves?", 9)) == "[CLS] [MASK] mov ##es ? [SEP]"


def test_a_damaged_tokenizer_of_a_checkpoint_is_one_line():
    with one_line("the checkpoint's tokenizer is damaged"):
        Tokenizer.from_json("{")


@cases("option_format, question, L, first, second", """
options | what is it? | 18 | what is it ? options : a ring red answer : a ring | answer : red
options | what is it? | 12 | what options : a ring red answer : a ring         | answer : red
options | what is it? | 7  | red answer : a ring                               | answer : red
options | what is it? | 3  | ring                                              | red
pair    | what is it? | 9  | what is it ? [SEP] a ring                         | [SEP] red
pair    | what is it? | 5  | [SEP] a ring                                      | what [SEP] red
options |             | 9  | a ring                                            | red
""")
def test_an_option_is_kept_and_its_question_cut_first(option_format, question, L, first, second):
    texts = TOKENIZER.encode_options(question, ["a ring", "red"], option_format, L)
    assert spell(texts[0]) == f"[CLS] {first} [SEP]"
    assert spell(texts[1]).endswith(f"{second} [SEP]")
    assert len(texts[1]) <= L


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


@cases("text, L, tokens", """
red           | 50 | 1
moves         | 50 | 2
red ring ring | 4  | 1
              | 50 | 0
""")
def test_masking_takes_at_least_one_word(text, L, tokens):
    _, _, labels = mask(text, 0.01, L)
    assert (labels >= 0).sum() == tokens


def test_masked_tokens_are_replaced_80_10_10():
    plain, ids, _ = mask("red " * 2000, share=1, L=2002)[:, 1:-1]
    assert (ids == TOKENIZER.mask).mean() == pytest.approx(0.8, abs=0.03)
    assert (ids == plain).mean() == pytest.approx(0.1, abs=0.03)
    assert set(ids) == set(range(len(WORDS)))                   # any token may stand there


# ---- data: rows into model inputs ----------------------------------------------------------------


@pytest.fixture
def clip():
    """A tiny video of 12 frames, a.mp4."""
    return encode("a.mp4", "mpeg4", n=12)


def dataset(rows, task="vqa", train=False, seed=0, frames=3, views=1, negatives=0):
    """The rows as a data set of clips of 16 x 16 pixels."""
    benchmark = replace(BENCHMARKS[data.BENCHMARK_OF[task]], frames=frames, views=views)
    config = Config(image=16, frames=frames, text_length=20)
    spec = InputSpec(benchmark, config, TOKENIZER, ["red", "blue"], negatives)
    write_rows(rows)
    return VideoTextDataset(".", "train", spec, train, seed)


LOST = QUESTION | {"id": "lost", "video": "missing.mp4"}


def test_what_training_draws_depends_on_seed_epoch_and_index_alone(monkeypatch):
    """Three frame numbers, and the place of the crop."""
    def read(path, pick, size, place, **more):
        return torch.tensor([*pick(np.arange(50)), *place])

    monkeypatch.setattr(data, "read_frames", read)
    draws = []
    for seed, *key in table("""
            0 | 0 | 0
            0 | 0 | 1
            0 | 1 | 0
            1 | 0 | 0
            0 | 0 | 0
            """):
        clips = dataset([QUESTION] * 2, train=True, seed=seed)
        draws.append(clips[key]["frames"])
    draws = torch.stack(draws)
    assert len(draws.unique(dim=0)) == 4        # the last is the first again
    assert draws.std(dim=0).all()


def test_views_are_an_axis_in_evaluation_only(clip):
    views = dataset([QUESTION], frames=2, views=3)[0, 0]["frames"]
    assert len(views) == 3
    assert torch.equal(views[1], read_frames(clip, [3, 9], 16))
    train = dataset([QUESTION], train=True, views=3)
    assert train[0, 0]["frames"].shape == (3, 3, 16, 16)


@cases("part, views, picked, first, last", """
{}                        | 1 | [5, 15]         | 0  | 19
{"seconds": [0.5, 1.4]}   | 1 | [7, 12]         | 5  | 14
{"seconds": [0.52, 0.58]} | 1 | [5, 5]          | 5  | 5
{"seconds": [5, 9]}       | 1 | [19, 19]        | 19 | 19
{"frames": [3, 6]}        | 1 | [4, 6]          | 3  | 6
{"frames": [18, 99]}      | 1 | [18, 19]        | 18 | 19
{}                        | 2 | [2, 12, 7, 17]  | 0  | 19
{"frames": [4, 11]}       | 2 | [5, 9, 7, 11]   | 4  | 11
""")
def test_frames_come_from_the_part_of_the_clip(part, views, picked, first, last):
    """Of 20 frames, 10 a second. Training draws from all frames of the part. View v has every
    V-th of V * T even frames, from the v-th on. Beyond the end is the last frame."""
    times = np.arange(20) / 10
    assert pick_frames(times, part, 2, views, None) == picked
    rng = np.random.default_rng(0)
    drawn = set()
    for _ in range(200):
        drawn.update(pick_frames(times, part, 2, 1, rng))
    assert drawn == set(range(first, last + 1))


@cases("task, row, text, target, reason", """
vqa       | {"question": "What is it?", "answer": "blue"}  | what is it ?             | 1  | false
vqa       | {"question": "What is it?", "answer": "mauve"} | what is it ?             | -1 | false
action    | {"label": 1}                                   | a person is doing [MASK] | 1  | false
retrieval | {"captions": ["red", "blue"]}                  | red                      | 0  | false
choice    | {"options": ["red", "blue"], "answer": 1}      | red [SEP] [CLS] blue     | 1  | false
vcr       | {"options": ["red", "blue"], "answer": 0}      | red [SEP] [CLS] blue     | 0  | false
vcr | {"options": ["a", "?"], "answer": 0, "question_type": "QA->R"} | a [SEP] [CLS] ? | 0 | true
""")
def test_what_each_task_reads_and_what_is_right(task, row, text, target, reason):
    clips = dataset([{"video": "a.mp4", **row}], task)
    item = clips.load_texts(clips.rows[0], None)
    assert spell(sum(item["texts"], [])) == f"[CLS] {text} [SEP]"
    assert item["target"] == target
    assert item.get("is_rationale", False) == reason


def test_vcr_reads_pairs_of_question_and_option():
    row = {"video": "a.mp4", "question": "what?", "options": ["red", "blue"], "answer": 1}
    item = dataset([row], "vcr").load_texts(row, None)
    assert spell(item["texts"][1]) == "[CLS] what ? [SEP] blue [SEP]"


CAPTIONS = [{"video": "a.mp4", "captions": ["red ring", "a ring"]},
            {"video": "b.mp4", "captions": ["red ring", "blue square"]},
            {"video": "c.mp4", "caption": "what is left"}]
OWN = {"red ring", "a ring"}                            # captions of row 0
OTHERS = {"blue square", "what is left"}                # captions that it does not have


def draw_texts(clips):
    """(texts, item) of row 0, drawn many times."""
    for seed in range(100):
        item = clips.load_texts(clips.rows[0], np.random.default_rng(seed))
        yield [spell(ids[1:-1]) for ids in item["texts"]], item


def test_retrieval_draws_a_caption_and_wrong_ones():
    clips = dataset(CAPTIONS, "retrieval", train=True, negatives=1)
    drawn = [texts for texts, _ in draw_texts(clips)]
    right, wrong = zip(*drawn)
    assert set(right) == OWN
    assert set(wrong) == OTHERS


def test_pretraining_reads_a_text_to_match_a_masked_one_and_the_caption():
    """Half of the texts to match are captions of another clip and not of this one."""
    clips = dataset(CAPTIONS, "pretrain", train=True)
    targets = []
    for (to_match, _, caption), item in draw_texts(clips):
        targets.append(item["target"])
        assert caption in OWN
        assert to_match in (OWN if item["target"] else OTHERS)
        labels = np.array(item["labels"])
        filled = np.where(labels >= 0, labels, item["texts"][1])
        assert filled.tolist() == item["texts"][2]
    assert 35 < sum(targets) < 65


def test_pretraining_without_another_caption_ends():
    """Every text matches, as no other caption can be drawn."""
    clips = dataset(CAPTIONS[:1] * 2, "pretrain", train=True)
    assert {item["target"] for _, item in draw_texts(clips)} == {1}


def test_an_unreadable_training_clip_gives_the_next_row(clip):
    item = dataset([QUESTION, LOST], train=True)[0, 1]
    assert item["index"] == 0
    assert "missing.mp4" in item["errors"]["lost"]


def test_an_unreadable_clip_is_not_replaced_in_evaluation():
    item = dataset([LOST, QUESTION])[0, 0]
    assert item.keys() == {"index", "errors"}


def test_rows_of_another_task_are_refused():
    with one_line("rows are for vqa, not for choice"):
        dataset([QUESTION], "choice")
    with one_line("has no rows"):
        dataset([])


# ---- data: batches -------------------------------------------------------------------------------


def batches(count, accum=1, seed=5, **more):
    """Parts of 10 and 7 rows: an epoch is two batches of four of the first, one of the second."""
    sampler = BatchSampler([10, 7], 4, seed, accum, **more)
    return list(itertools.islice(sampler, count * accum))


def test_any_step_can_be_reached_again():
    assert batches(5, first_step=2) == batches(7)[2:]


def test_an_epoch_takes_rows_once_and_leaves_out_the_last_short_batch():
    orders = []
    for epoch in range(5):
        pieces = batches(3, first_step=3 * epoch)
        keys = sum(pieces, [])
        assert len(set(keys)) == 12
        assert {key[1] for key in keys} == {epoch}
        orders.append([piece[0][0] for piece in pieces])
        assert sorted(orders[-1]) == [0, 0, 1]
    assert len(set(map(tuple, orders))) > 1     # the part with one batch has no fixed place


def test_every_epoch_has_an_order_of_its_own():
    first, second = [{i for _, _, i in sum(batches(3, first_step=n), [])} for n in (0, 3)]
    assert first != second


@cases("world, accum", """
1 | 4
2 | 2
2 | 1
""")
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


def test_a_batch_without_a_readable_clip_holds_the_errors():
    lost = {"index": 0, "errors": {"a": "broken"}}
    assert collate([lost], pad=9) == {"errors": {"a": "broken"}}


class Signalled(list):
    """A data set whose workers get a signal, the key, while they read."""

    def __getitem__(self, key):
        os.kill(os.getpid(), key)
        return {"errors": {}}


def test_a_killed_worker_is_one_line():
    with one_line("reading data failed: .*--workers 0"):
        list(make_loader(Signalled(), [[signal.SIGKILL]], workers=1, pad=0))


@cases("key", [signal.SIGINT, signal.SIGTERM])
def test_workers_go_on_until_the_main_process_has_saved(key):
    """Ctrl-C and clusters signal all processes; only the main one ends by itself."""
    assert list(make_loader(Signalled(), [[key]], workers=1, pad=0)) == [{"errors": {}}]


def test_a_mistake_that_a_worker_finds_is_one_line():
    write_info()
    clips = dataset([QUESTION, "nonsense"])
    with one_line("^./train.jsonl, row 2: Expecting"):
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


@cases("exception, code, line", """
UserError('broken') | 2  | main: broken
KeyboardInterrupt   | -2 | interrupted
""")
def test_no_worker_keeps_the_main_process_from_ending(exception, code, line):
    script = UNFINISHED.replace("EXCEPTION", exception)
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE,
                          timeout=60, capture_output=True, text=True)
    assert [done.returncode, done.stderr] == [code, f"{line}\n"]


def test_too_little_shared_memory_is_found_out_before(monkeypatch):
    spec = InputSpec(BENCHMARKS["msrvtt-qa"], Config(), TOKENIZER, [])
    clips = Namespace(spec=spec, views=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=64 << 20))
    with one_line("2 workers need 110 MiB in /dev/shm, which has 64 MiB"):
        check_shared_memory(clips, batch=32, workers=2)
    check_shared_memory(clips, batch=32, workers=1)


def test_data_py_describes_any_file(clip, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", "missing\n.mp4", str(clip)])
    data.main()
    missing, described = capsys.readouterr().out.splitlines()
    assert missing.startswith(r"missing\n.mp4: ")
    assert "12 frames of 80 x 48, from 0.00 to 0.46 s" in described


# ---- eval and train: what their tests share ------------------------------------------------------


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with every benchmark in a toy world of few clips."""
    root = tmp_path_factory.mktemp("toy")
    tools.toy.make_toy(root, share=0.01)
    return root


DEFAULTS = {"train.py": "--data toy/msrvtt-qa --workers 0 --steps 2 --batch 4 --out run",
            "eval.py": "--workers 0"}


@pytest.fixture
def run(toy, monkeypatch, capsys):
    """run("train.py FLAGS") calls main() and returns what it prints, in a folder with nothing but
    toy/, the toy world. Training is two steps of four clips of MSRVTT-QA, into run/, unless the
    flags differ. With `error`, main() must end with code 2 and one line that contains it."""
    os.symlink(toy, "toy")

    def call(command, error=None):
        script, *flags = shlex.split(command)
        main = train.main if script == "train.py" else eval.main
        monkeypatch.setattr(sys, "argv", [script, *DEFAULTS[script].split(), *flags])
        if error is None:
            main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            run_main(script, main)
        lines = capsys.readouterr().err.splitlines()
        assert (stop.value.code, len(lines)) == (2, 1)
        assert error in lines[0]
        del stop                        # its traceback would hold the lock of the run folder

    yield call
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def read_rows(path):
    lines = Path(path).read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]     # NaN is not JSON


def copy_data(folder, split, edit):
    """Make data/, a copy of a prepared folder in which edit(rows) has changed a split."""
    shutil.copytree(folder, "data")
    file = f"data/{split}.jsonl"
    rows = read_rows(file)
    edit(rows)
    write_rows(rows, file)


def lose_first(rows):
    rows[0]["video"] = "gone.mp4"


def weights(path):
    return load_checkpoint(path)["model"]


def same_weights(one, other):
    other = weights(other)
    return all(torch.equal(tensor, other[name]) for name, tensor in weights(one).items())


def random_batch(*shape):
    """Random frames, and texts of this shape, (B, A, L)."""
    torch.manual_seed(1)
    return {"frames": torch.randint(256, (shape[0], 3, 3, 32, 32), dtype=torch.uint8),
            "input_ids": torch.randint(5, 50, shape),
            "attention_mask": torch.ones(shape, dtype=torch.bool)}


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


@pytest.fixture
def judge(monkeypatch):
    """judge(NAME, rows, results, answers) -> metrics and records of a model with these results:
    scores of answers or options, a [text, video] pair, or None for a clip that cannot be read."""
    class Rows(list):
        spec = None
        rows = property(lambda self: self)

    def call(name, rows, results, answers=()):
        found = [i for i, result in enumerate(results) if result is not None]
        scores = torch.tensor([results[i] for i in found])

        def predict(model, dataset, step, settings):
            return {"index": torch.tensor(found), **step(None, {})}

        monkeypatch.setattr(eval, "predict", predict)
        monkeypatch.setattr(eval, "answer_scores", lambda *_: scores)
        monkeypatch.setattr(eval, "option_scores", lambda *_: scores)
        monkeypatch.setattr(eval, "embeddings", lambda *_: scores.unbind(1))
        return eval.evaluate(None, Rows(rows), BENCHMARKS[name], answers, EvalSettings())

    return call


def test_unknown_answers_are_wrong_and_lower_the_ceiling(judge):
    """Right, wrong, an answer outside the list, a missing clip."""
    row = {"id": "1", "question": "what?"}
    rows = [row | {"answer": answer} for answer in ("red", "blue", "mauve", "red")]
    results = [[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], None]
    metrics, records = judge("msrvtt-qa", rows, results, ["red", "blue"])
    assert list(metrics.values()) == pytest.approx([25, 100 / 3, 75])
    assert [record["prediction"] for record in records] == ["red", "red", "red", None]
    assert records[0]["score"] == pytest.approx(0.8808, abs=1e-4)       # softmax of 2 and 0


def test_options_that_repeat_a_text_are_judged_by_index(judge):
    rows = [{"id": "1", "options": ["a", "a"], "answer": 1}] * 2
    metrics, _ = judge("tgif-action", rows, [[2.0, 1.0], [1.0, 2.0]])
    assert metrics == {"accuracy": 50}


def test_vcr_needs_answer_and_rationale(judge):
    rows = []
    results = []
    for name, kind, right in table("""
            q1/qa  | Q->A  | 1
            q2/qar | QA->R | 0
            q1/qar | QA->R | 1
            q2/qa  | Q->A  | 1
            q3/qa  | Q->A  | 1
            """):
        rows.append({"id": name, "question_type": kind, "options": ["a", "b"], "answer": 1})
        results.append([0.5, right])
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
    _, records = judge("msrvtt", rows, [[EAST, NORTH], [NORTH, EAST]])
    assert [record["prediction"] for record in records] == ["a 5-9", "a 0-5"]


def test_missing_clips_rank_behind_all_others(judge):
    rows = [{"id": clip, "video": clip} for clip in "abc"]
    metrics, _ = judge("msrvtt", rows, [[EAST, EAST], [NORTH, NORTH], None])
    for direction in ("text to video", "video to text"):
        assert metrics[f"{direction} R@10"] == pytest.approx(200 / 3)
        assert metrics[f"{direction} MeanR"] == 2       # 1, 1, 4


# ---- eval: scores --------------------------------------------------------------------------------


def test_second_vcr_head_scores_rationales():
    model = random_model(task_heads=["rank", "rank2"])
    batch = random_batch(2, 4, 6)
    batch["is_rationale"] = torch.tensor([False, True])
    scores = option_scores(model, batch, ["rank", "rank2"])
    assert_close(scores[0], option_scores(model, batch, ["rank"])[0])
    assert_close(scores[1], option_scores(model, batch, ["rank2"])[1])


def test_views_average_cosines():
    model = random_model(task_heads=["contrast"])
    batch = random_batch(2, 1, 5)
    views = [batch["frames"], batch["frames"] // 8]
    batch["frames"] = torch.stack(views, dim=1)
    text, video = eval.embeddings(model, batch)
    one, other = [F.normalize(model.encode_video(frames), dim=1) for frames in views]
    assert_close(text @ video.T, text @ (one + other).T / 2)


# ---- eval: a whole split -------------------------------------------------------------------------


def test_zero_shot_actions_score_a_sentence_for_each_class(run):
    """As if these were the options of a question without words."""
    run("train.py --data toy/webvid")
    run("eval.py run --data toy/hmdb51 --predictions p.jsonl")
    found = read_rows("p.jsonl")[0]["prediction"]
    options = [f"'a person is doing {name}'" for name in read_answers("toy/hmdb51")]
    command = f"eval.py run --video {first_clip('toy/hmdb51')} --options {' '.join(options)}"
    assert run(command).splitlines()[1].endswith(f"  a person is doing {found}")


def test_evaluation_does_not_depend_on_batches_or_workers(run):
    """Rows with two and with five options among them."""
    def shorten(rows):
        rows[1].update(options=rows[1]["options"][:2], answer=0)
    copy_data("toy/tgif-transition", "test", shorten)
    run("train.py --data data --set dropout=0.1")
    outputs = []
    for flags in ("--batch 64", "--batch 3", "--batch 1 --workers 2"):
        figures = run(f"eval.py run {flags} --predictions p.jsonl")
        outputs.append((figures, [row["prediction"] for row in read_rows("p.jsonl")]))
    assert outputs[0] == outputs[1] == outputs[2]


@cases("name", ["msrvtt-qa", "msrvtt", "webvid"])
def test_missing_clips_stop_evaluation_or_count_as_wrong(run, name):
    run(f"train.py --data toy/{name}")
    copy_data(f"toy/{name}", "test", lose_first)
    command = "eval.py run --data data --predictions p.jsonl"
    run(command, error="rows of data/test.jsonl have a clip that cannot be read, the first")
    output = run(f"{command} --allow-missing")
    assert "rows of data/test.jsonl have a clip that cannot be read; they count as wrong" in output
    for row in read_rows("p.jsonl")[:1]:                # of pre-training there are none
        assert row["prediction"] is None


@cases("name", ["msrvtt-qa", "webvid"])
def test_scores_that_are_not_finite_are_an_error(run, name):
    run(f"train.py --data toy/{name}")
    model, checkpoint = eval.load_model("run")
    model.norm.bias.data.fill_(math.nan)
    with one_line("is not finite"):
        eval.evaluate_folder(model, checkpoint, f"toy/{name}", None, EvalSettings())


# ---- eval: what is printed -----------------------------------------------------------------------


def test_baselines_by_question_type():
    """Accuracy; one of the training answers to questions of the type, at random and the most
    frequent; what needs no order of frames."""
    rows = []
    for kind, answer in table("""
            which | up
            which | up
            which | left
            what  | red
            """):
        rows.append({"video": "v", "question": "?", "question_type": kind, "answer": answer})
    write_rows(rows)
    write_info(order_blind={"which": 0.5})
    records = []
    for kind, truth, correct in table("""
            what  | red | 0
            which | up  | 1
            which | up  | 0
            """):
        records.append({"question_type": kind, "truth": truth, "correct": correct, "options": 0})
    lines = eval.format_table(eval.baselines(records, ".", "vqa", ["up", "left", "red"]))
    assert [line.split() for line in lines[1:]] == [
        "which 2 50.0 50.0 100.0 50.0".split(),
        "what 1 0.0 100.0 100.0 100.0".split(),
        "all 3 33.3 66.7 100.0 66.7".split()]


def test_a_label_of_training_beyond_the_list_is_counted():
    write_rows([{"video": "v", "label": label} for label in (0, 7, 7)])
    record = {"question_type": "", "truth": "run", "correct": 1, "options": 0}
    total, = eval.baselines([record], ".", "action", ["run"])
    assert total["majority"] == 0


def test_list_names_every_benchmark(run):
    text = run("eval.py --list")
    assert re.findall(r"^(\S+) .* lr", text, re.M) == list(BENCHMARKS)
    assert "158,581 / 12,278 / 72,821; chance -; published: rerun 42.9, paper 42.5" in text


# ---- python eval.py ------------------------------------------------------------------------------


def first_clip(folder):
    root = data.manifest_info(folder)["root"]
    return os.path.join(root, data.Manifest(folder, "test")[0]["video"])


def shares(lines):
    return [float(line.split("%")[0]) for line in lines]


def test_a_question_about_your_own_video(run):
    run("train.py")
    clip = first_clip("toy/msrvtt-qa")
    looked, *answers, about = run(f"eval.py run --video {clip} --ask 'which way?'").splitlines()
    assert re.fullmatch(rf"looked at seconds \d\.\d\d, \d\.\d\d, \d\.\d\d of {clip}", looked)
    assert len(answers) == 5
    assert shares(answers) == sorted(shares(answers), reverse=True)
    assert about == "(trained on msrvtt-qa: 20 answers, 179 word pieces)"
    run(f"eval.py run --video {clip} --caption ring", error="run/best.pt has answer")


def test_your_own_picture_is_read_as_the_run_has_read(run):
    """VCR: one frame, and pairs of question and option."""
    run("train.py --data toy/vcr")
    command = f"eval.py run --video {first_clip('toy/tvqa')} --ask where"
    looked = run(f"{command} --options left right")
    assert re.match(r"looked at pictures \d+ of ", looked)


def test_a_folder_is_the_same_by_another_path(run):
    """Its task is that of the run, which the rows do not tell: pre-training, not retrieval."""
    shutil.copytree("toy/webvid", "own")
    root = data.manifest_info("own")["root"]
    Path("own/dataset.json").write_text(json.dumps({"root": root}))
    run("train.py --data own --task pretrain")
    assert "matching accuracy" in run("eval.py run --data own")


def test_options_and_captions_for_your_own_folder_of_pictures(run):
    """Options share 100 %. A caption's probability does not depend on the other captions. The
    matching head puts both into the same order."""
    run("train.py --data toy/webvid")
    command = f"eval.py run --video {first_clip('toy/tvqa')}"
    looked, *options, _ = run(f"{command} --options red 'a blue ring'").splitlines()
    assert looked.startswith("looked at pictures ")
    assert sum(shares(options)) == pytest.approx(100, abs=0.11)
    _, alone, _ = run(f"{command} --caption red").splitlines()
    _, *captions, _ = run(f"{command} --caption 'a blue ring' red").splitlines()
    assert alone in captions
    assert [line[9:] for line in captions] == [line[9:] for line in options]


def test_a_run_is_a_folder_or_a_file_and_evaluation_writes_nothing(run, toy):
    folder = "toy/msrvtt-qa"
    run(f"train.py --data {folder}")
    before = [sorted(place.rglob("*")) for place in (Path(), toy)]
    assert run("eval.py run") == run("eval.py run/best.pt")
    assert [sorted(place.rglob("*")) for place in (Path(), toy)] == before


@cases("flags, error", """
                           | name a run folder or a checkpoint
nowhere                    | nowhere cannot be read: No such file or directory
run --batch 0              | --batch 0: must be above 0
run --workers -1           | --workers -1: must be from 0 to 999
run --device x             | device x:
run --data nowhere         | nowhere holds no dataset.json, train.jsonl or test.jsonl; prepare
run --video x.mp4          | --video needs --ask TEXT
run --video x.mp4 --ask it | x.mp4: no such file
""")
def test_mistakes_of_evaluation_are_one_line(run, flags, error):
    run("train.py")
    run(f"eval.py {flags}", error=error)


# ---- train: losses -------------------------------------------------------------------------------


def test_cross_entropy_leaves_unknown_targets_out():
    scores = torch.randn(3, 2)
    loss = train.cross_entropy(scores, torch.tensor([0, -1, 1]))
    assert_close(loss, F.cross_entropy(scores[[0, 2]], torch.tensor([0, 1])))
    assert train.cross_entropy(scores, torch.full([3], -1)) == 0


def test_contrastive_loss_by_hand():
    """The cosines over the temperature are 0, 16 and 20, 12; the own ones are 0 and 12. Wrong ones
    are higher by 16 and 8 in the rows, by 20 and 4 in the columns."""
    video = torch.tensor([[0.0, 1.0], [0.8, 0.6]])
    loss = train.contrastive_loss(torch.eye(2), video)
    assert_close(loss, F.softplus(torch.tensor([16.0, 8, 20, 4])).sum() / 2)


def test_vtm_ranks_all_texts_and_matches_two():
    """PyTorch's losses of the model's plain outputs."""
    model = random_model(task_heads=["rank", "matching", "contrast"])
    batch = random_batch(2, 3, 6)
    batch["target"] = torch.zeros(2, dtype=torch.long)
    losses = train.retrieval_losses(model, batch)
    texts = batch["input_ids"].unbind(dim=1)
    pooled = [model(batch["frames"], input_ids).pooled for input_ids in texts]
    rank = torch.cat([model.task_heads["rank"](x) for x in pooled], dim=1)
    own, drawn = [model.task_heads["matching"](x) for x in pooled[:2]]
    matching = F.cross_entropy(own, torch.ones_like(batch["target"]))
    matching = matching + F.cross_entropy(drawn, batch["target"])
    assert_close(losses, {
        "contrast": train.contrastive_loss(*eval.embeddings(model, batch)),
        "rank": F.cross_entropy(rank, batch["target"]),
        "matching": 0.5 * matching / 2})


def test_pretraining_reads_masked_words_alone():
    """PyTorch's losses of the model's plain outputs."""
    model = random_model(task_heads=["matching", "mlm", "contrast"])
    batch = random_batch(2, 3, 6)
    batch["target"] = torch.tensor([0, 1])
    batch["masked"] = torch.tensor([1, 3, 11])
    batch["labels"] = torch.tensor([7, 9, 8])
    losses = train.pretrain_losses(model, batch)
    to_match, masked, _ = batch["input_ids"].unbind(dim=1)
    match = model.task_heads["matching"](model(batch["frames"], to_match).pooled)
    text = model(batch["frames"], masked).text              # (2, 6, D)
    words = model.task_heads["mlm"](text[[0, 0, 1], [1, 3, 5]])
    assert_close(losses, {
        "matching": F.cross_entropy(match, batch["target"]),
        "mlm": F.cross_entropy(words, batch["labels"]),
        "contrast": train.contrastive_loss(*eval.embeddings(model, batch, number=2))})


# ---- train: recipe and optimiser -----------------------------------------------------------------


def recipe_of(name, rows, accum=1, batch=None, lr=None, steps=None):
    """What make_recipe makes of a benchmark with so many training rows, at a real size."""
    args = Namespace(accum=accum, batch=batch, lr=lr, steps=steps)
    parts = Namespace(parts=[range(rows)])
    return train.make_recipe(args, Namespace(benchmark=BENCHMARKS[name], toy=False, train=parts))


@cases("name, rows, expected", """
msrvtt-qa | 158581  | [512, 0.0001, 10, 6180, 618, 309]
msrvtt    | 9000    | [1024, 0.0003, 1, 1600, 160, 8]
webvid    | 2500000 | [1024, 0.0001, 1, 200000, 2500, 2441]
""")
def test_real_sizes_follow_the_released_recipe(name, rows, expected):
    assert recipe_of(name, rows) == Recipe(*expected)


def test_what_flags_change_is_printed(capsys):
    recipe = recipe_of("msrvtt-qa", 6400, batch=100, lr=1e-5, steps=50)
    assert recipe == Recipe(100, 1e-5, 10, 50, 5, steps_per_epoch=64)
    assert capsys.readouterr().out.splitlines() == [
        "recipe: batch 100, 50 steps of which 64 are an epoch, lr 1e-05 (task heads x 10), warm-up "
        "5 steps",
        "the usual batch is 512; --batch 512 --accum 8 trains with it in the same memory"]


def test_warmup_is_at_most_a_tenth():
    assert recipe_of("webvid", 6400, steps=100).warmup == 10


def test_batch_is_cut_to_a_small_data_set(capsys):
    assert recipe_of("msrvtt-qa", 50, accum=4).batch == 48
    assert "batch cut to 48: a data set has 50 rows" in capsys.readouterr().out


@cases("step, share", """
0  | 0
1  | 0.5
2  | 1
6  | 0.5
10 | 0
""")
def test_learning_rate_by_hand(step, share):
    """Up to the peak in two steps, then down to 0 at the end."""
    assert train.lr_at(step, Namespace(steps=10, warmup=2)) == share


def test_optimizer_holds_each_parameter_once():
    """Biases, norms and single vectors do not decay; task heads learn faster."""
    model = random_model(task_heads=HEADS)
    model.cls_token.requires_grad = False
    names = {p: name for name, p in model.named_parameters()}
    recipe = Namespace(lr=0.1, head_lr=10)
    for group in train.make_optimizer(model, recipe).param_groups:
        for p in group["params"]:
            is_head = names.pop(p).startswith("task_heads.")
            assert group["peak"] == (1 if is_head else 0.1)
            assert group["weight_decay"] == (0.01 if p.dim() > 1 else 0)
    assert list(names.values()) == ["cls_token"]


# ---- train: every task ---------------------------------------------------------------------------


@cases("name", BENCHMARKS)
def test_every_benchmark_trains_and_evaluates(run, name):
    """eval.py repeats the figures to the digit."""
    output = run(f"train.py --data toy/{name}")
    log = read_rows("run/metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 2]
    assert log[1]["lr"] == log[0]["lr"] / 2
    assert BENCHMARKS[name].metric in log[2]["val"]
    assert run("eval.py run") in output


@cases("name, line", """
msrvtt-qa | new: answer; not used: contrast, matching, mlm
tvqa      | new: mc; not used: contrast, matching, mlm
vcr       | tensors; not used: contrast, matching, mlm
msrvtt    | tensors; not used: matching, mlm
hmdb51    | new: answer; not used: contrast, matching, mlm
""")
def test_every_task_starts_from_pretraining(run, name, line):
    run("train.py --data toy/webvid --contrast --out pre")
    assert f"{line}\n" in run(f"train.py --data toy/{name} --init pre/best.pt")
    run(f"train.py --data toy/{name} --init pre --tokenizer other.txt --out other",
        error="--init brings its tokenizer; leave out --tokenizer")


def test_vtm_reads_three_captions_in_the_toy_size(run):
    """Their guess costs ln 3."""
    assert "(chance 1.099)" in run("train.py --data toy/msrvtt --vtm")


def test_actions_train_pooler_and_head_alone(run):
    run("train.py --data toy/webvid --out pre")
    run("train.py --data toy/hmdb51 --init pre/best.pt")
    before = weights("pre/best.pt")
    for name, tensor in weights("run/last.pt").items():
        same = name in before and torch.equal(tensor, before[name])
        assert same != name.startswith(("pooler.", "task_heads.")), name


def test_pretraining_mixes_videos_and_pictures(run, monkeypatch):
    frames = set()

    def spy(model, batch, losses=train.pretrain_losses):
        frames.add(batch["frames"].shape[1])
        return losses(model, batch)

    monkeypatch.setattr(train, "pretrain_losses", spy)
    run("train.py --data toy/webvid,toy/cc3m --steps 6")
    assert frames == {1, 3}
    assert list(json.loads(Path("run/test.json").read_text())) == ["webvid", "cc3m"]


def test_eight_clips_are_learnt_by_heart(run):
    """One question, eight answers: only the pixels tell."""
    answers = read_answers("toy/msrvtt-qa")

    def choose(rows):
        clips = sorted({row["video"] for row in rows})
        del rows[8:]
        for row, clip, answer in zip(rows, clips, answers):
            row.update(question="what is it?", video=clip, answer=answer)

    copy_data("toy/msrvtt-qa", "train", choose)
    run("train.py --data data --batch 8 --steps 70 --lr 2e-3")
    assert "accuracy 100.00 %" in run("eval.py run/last.pt --split train")


# ---- train: the loop -----------------------------------------------------------------------------


def test_accumulation_equals_one_batch():
    batch = {**random_batch(4, 3, 6), "target": torch.tensor([0, 1, 2, 1])}
    halves = []
    for half in (slice(2), slice(2, 4)):
        halves.append({name: value[half] for name, value in batch.items()})
    trained = []
    for micro_batches in ([batch], halves):
        model = random_model(task_heads=["rank"])
        losses = train.Losses(model, BENCHMARKS["msrvtt-mc"])
        optimizer = torch.optim.SGD(model.parameters(), lr=1)
        train.train_step(losses, optimizer, micro_batches, amp=False)
        trained.append(model.state_dict())
    assert_close(*trained)


def test_same_seed_same_weights(run):
    """However many workers there are."""
    run("train.py --set dropout=0.1 --out a")
    run("train.py --set dropout=0.1 --out b --workers 2")
    run("train.py --set dropout=0.1 --out c --seed 1")
    assert same_weights("a/last.pt", "b/last.pt")
    assert not same_weights("a/last.pt", "c/last.pt")


def log_of(folder):
    """The lines of metrics.jsonl, without what depends on the time."""
    lines = read_rows(f"{folder}/metrics.jsonl")
    for line in lines:
        line.pop("clips_per_s", 0)
        line.pop("waiting", 0)
    return lines


def assert_same_run(one, other):
    """Two run folders hold the same weights, figures and losses."""
    for name in ("last.pt", "best.pt"):
        assert same_weights(f"{one}/{name}", f"{other}/{name}")
    assert Path(one, "test.json").read_text() == Path(other, "test.json").read_text()
    assert log_of(one) == log_of(other)


def signal_at(patch, module, name, count, number=signal.SIGTERM):
    """Send a signal to this process at one call of a function."""
    function = getattr(module, name)
    calls = itertools.count(1)

    def spy(*args, **more):
        if next(calls) == count:
            os.kill(os.getpid(), number)
        return function(*args, **more)

    patch.setattr(module, name, spy)


WITHIN_A_STEP = (train, "seed_step", 6)             # function and number of the call
WAITING_FOR_DATA = (data, "read_frames", 22)


@cases("number", [signal.SIGTERM, signal.SIGINT])
@cases("moment, workers", [(WITHIN_A_STEP, 2), (WAITING_FOR_DATA, 0)])
def test_stopped_and_resumed_to_the_bit(run, monkeypatch, moment, workers, number):
    """In the middle of an epoch, with dropout."""
    command = f"train.py --steps 8 --workers {workers} --set dropout=0.1 drop_path=0.1"
    run(f"{command} --out whole")
    with monkeypatch.context() as patch:
        signal_at(patch, *moment, number)
        with pytest.raises(SystemExit, match="stopped at step 5; go on with the same flags"):
            run(command)
    assert not Path("run/test.json").exists()
    run(f"{command} --resume")
    assert_same_run("run", "whole")


def test_a_stop_in_the_last_validation_is_not_lost(run, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, train, "validate", 1)
        with pytest.raises(SystemExit, match="stopped at step 2; go on with the same flags"):
            run("train.py")
    run("train.py --resume")
    assert Path("run/test.json").exists()


def test_killed_at_any_moment_files_are_whole_and_the_run_ends_equal(run):
    run("train.py --steps 25 --out whole")
    command = [sys.executable, HERE / "train.py", *DEFAULTS["train.py"].split(), "--steps", "25"]
    log = Path("run/metrics.jsonl")
    for steps, wait in ((1, 0.08), (6, 0.03), (12, 0.05)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not log.exists() or log.read_bytes().count(b"\n") < steps:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        process.wait()
        for path in Path("run").glob("*.pt"):
            load_checkpoint(path)
        command = [*command, "--resume"]
    run("train.py --steps 25 --resume")
    assert_same_run("run", "whole")


def test_best_checkpoint_is_the_best_on_validation(run, monkeypatch):
    """Validation comes after each epoch, here of two steps: 153 rows."""
    results = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(train, "validate", lambda *_: {"accuracy": next(results)})
    run("train.py --batch 64 --steps 6")
    assert load_checkpoint("run/best.pt")["step"] == 4
    assert load_checkpoint("run/last.pt")["step"] == 6


def test_validation_of_several_folders_is_their_mean(monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda model, accuracy, *_: ({"accuracy": accuracy}, []))
    stand_in = Namespace(val=[10, 20], benchmarks=[None, None], answers=[])
    assert train.validate(None, stand_in, None) == {"accuracy": 15}


def test_losses_that_are_not_finite_end_the_run(run):
    run("train.py --steps 20 --lr 9e8", error="a loss is not finite (vqa ")
    load_checkpoint("run/last.pt")                      # of the last step that was finite
    assert not Path("run/best.pt").exists()


@cases("files", [2, 3])
def test_a_full_disk_is_one_line(run, monkeypatch, files):
    """The last checkpoint stays, and the run can go on. config.json and last.pt fit; best.pt does
    or does not."""
    run("train.py --out whole")
    with monkeypatch.context() as patch:
        fill_disk(patch, free=files)
        run("train.py", error="cannot be written: No space left on device; make room")
    assert load_checkpoint("run/last.pt")["step"] == 1
    run("train.py --resume")
    assert_same_run("run", "whole")


def lose(rows, every):
    del rows[40:]
    for row in rows[::every]:
        row["video"] = "gone.mp4"


def test_training_goes_on_without_a_few_clips(run):
    copy_data("toy/msrvtt-qa", "train", partial(lose, every=20))
    run("train.py --data data --steps 10")
    listed = re.findall(r"^\d+", Path("run/bad.txt").read_text(), re.M)
    assert sorted(listed) == ["0", "20"]
    assert sorted(load_checkpoint("run/last.pt")["bad"]) == ["0", "20"]


def test_many_clips_that_cannot_be_read_end_training(run):
    """More than 1 %, and more than ten or a tenth."""
    copy_data("toy/msrvtt-qa", "train", partial(lose, every=2))
    run("train.py --data data --steps 10", error="the limit is 4; run/bad.txt lists them")


def test_missing_validation_clips_count_as_wrong_in_training(run):
    copy_data("toy/msrvtt-qa", "val", lose_first)
    output = run("train.py --data data")
    assert "val.jsonl have a clip that cannot be read; they count as wrong" in output


def test_classes_outside_the_list_are_one_line(run):
    shutil.copytree("toy/hmdb51", "data")
    Path("data/answers.txt").write_text("grow\nmove down\n")
    run("train.py --data data", error="the answer list 2 classes")


# ---- train: the run folder -----------------------------------------------------------------------


@cases("flags, setting", """
--lr 1                 | lr
--seed 1               | seed
--frames 2             | frames
--data data            | rows
--data answers         | answer list
--tokenizer other.json | tokenizer
""")
def test_resume_refuses_another_run(run, flags, setting):
    copy_data("toy/msrvtt-qa", "train", lose_first)
    shutil.copytree("toy/msrvtt-qa", "answers")
    Path("answers/answers.txt").write_text("\n".join(reversed(read_answers("answers"))))
    tokenizer = Path("answers/tokenizer.json").read_text()
    Path("other.json").write_text(tokenizer.replace(": 100", ": 99"))       # longest word
    run("train.py")
    run(f"train.py --resume {flags}", error=f"--resume: {setting} was ")


def test_a_folder_with_a_run_is_not_overwritten(run):
    run("train.py")
    run("train.py", error="run holds a run; go on with --resume, or choose another --out")


def test_two_runs_in_one_folder_are_refused(run):
    run("train.py")
    with lock_folder("run"):
        run("train.py --resume", error="run is in use by another process; wait for it, or choose")


@cases("name, content, error", """
last.pt       | text   | is not a checkpoint, or is damaged
config.json   | {"seed | config.json cannot be read
config.json   | 5      | config.json cannot be read
config.json   | []     | --resume: names was None
config.json   |        | config.json cannot be read
metrics.jsonl | null   | Is a directory
config.json   | null   | Is a directory
""")
def test_damaged_runs_are_one_line(run, name, content, error):
    run("train.py")
    path = Path("run", name)
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_text(str(content))
    run("train.py --resume", error=error)


def test_a_checkpoint_that_is_of_no_run_is_one_line(run):
    run("train.py")
    write_content("run/last.pt")
    run("train.py --resume", error="last.pt cannot be resumed from: ")


def test_a_log_that_was_cut_is_mended(run, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, train, "seed_step", 3)
        with pytest.raises(SystemExit):
            run("train.py --steps 4")
    log = Path("run/metrics.jsonl")
    log.write_text(log.read_text()[:-9])
    run("train.py --steps 4 --resume")
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
    training = "".join(f"run(train, '--data {toy}/{name} {flags} {name}')\n" for name in PAIR)
    stopped = torchrun(cwd, training + f"""
def stop(seed, step):
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)

train.seed_step = stop
run(train, "--data {toy}/msrvtt-qa {flags} stopped")
""")
    evaluation = "".join(f"run(eval, '{name} --batch 4')\n" for name in PAIR)
    failed = torchrun(cwd, evaluation + f"""
def fail(seed, step):
    if allinone.RANK == 1:
        raise allinone.UserError("the cause")

run(train, "--data {toy}/msrvtt-qa {flags} stopped --resume")
train.seed_step = fail
run(train, "--data {toy}/msrvtt-qa {flags} failed")
""")
    return cwd, stopped, failed


@cases("name", PAIR)
def test_two_processes_train_like_one(run, pair, name):
    """On the same global batch; losses differ by rounding."""
    run(f"train.py --data toy/{name} --steps 4 --batch 8 {PAIR[name]}")
    for one, two in zip(log_of("run"), log_of(pair[0] / name), strict=True):
        for key in one.keys() - {"chance"}:
            assert two[key] == pytest.approx(one[key], abs=1e-5)


@cases("name", PAIR)
def test_evaluation_does_not_depend_on_processes(run, pair, name):
    """Neither that of train.py, which ends with it, nor that of eval.py."""
    cwd, stopped, failed = pair
    output = run(f"eval.py {cwd / name}")
    assert output in stopped.stdout
    assert output in failed.stdout


def test_two_processes_stop_together_and_resume(run, pair):
    cwd, stopped, failed = pair
    assert stopped.stderr.count("train.py: stopped at step 2; go on with the same flags") == 1
    assert failed.stdout.count("resumed at step 2") == 1
    assert_same_run(cwd / "stopped", cwd / "msrvtt-qa")
    run(f"train.py --steps 4 --batch 8 --out {cwd}/stopped --resume",
        error="processes was 2, now 1")


def test_a_process_that_fails_ends_the_run(pair):
    _, _, failed = pair
    assert failed.returncode != 0
    assert failed.stderr.count("train.py: the cause\n") == 1


# ---- python train.py -----------------------------------------------------------------------------


@cases("flags, error", r"""
--data ''              | give --data FOLDER, or --task for the toy world: vqa, choice, vcr
--data nowhere         | nowhere holds no dataset.json, train.jsonl or test.jsonl; prepare data
--steps 0              | --steps 0: must be above 0
--data toy/vcr --frames 5 | --frames is not for vcr, which has pictures
--batch -1             | --batch -1: must be above 0
--batch 1000000000     | --batch 1000000000: must be above 0 and below a billion
--accum 3              | the batch, 4, must be a multiple of 3
--lr inf               | --lr inf: must be above 0
--lr nan               | --lr nan: must be above 0
--seed -1              | --seed -1
--seed 4294967296      | --seed 4294967296
--set x=1              | --set x=1: give NAME=VALUE, NAME out of fraction, time
--set time=maybe       | --set time=maybe: time takes 0 or 1
--set fraction=0.3     | fraction 0.3 is unknown; choose 0, 1/8, 1/4, 1/2 or 1
--init nowhere         | nowhere cannot be read: No such file or directory
--compile              | --compile needs a C compiler, and none is installed
--data toy/webvid --task vqa | webvid is for --task pretrain, not vqa
--contrast             | several folders and --contrast are for pre-training, not for vqa
--data toy/webvid,toy/vcr | several folders and --contrast are for pre-training, not for vcr
"--out a\u0000b"       | --out 'a\x00b'
""")
def test_mistakes_are_one_line_before_any_clip_is_read(run, monkeypatch, flags, error):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(data, "read_frames", pytest.fail)
    run(f"train.py {flags}", error=error)
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
