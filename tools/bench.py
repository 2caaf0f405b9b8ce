"""Measure speed and memory: the model, the data, the loader, the frame sampler.

    python tools/bench.py model             the model against plain code and transformers' ViltModel
    python tools/bench.py data              manifests of millions of rows (Linux)
    python tools/bench.py loader            does reading clips keep up with training?
    python tools/bench.py video FILE...     the frame sampler against other decoders (--long: Linux)

All ratios come from one run on one machine. For `model` on a CPU and for files of `video`, the
methods take turns, in a new random order in every round, and the figures are medians; the others
are measured once, one after the other. Packages that are not installed are left out.

Goals. model, on a CPU: a training step <= 0.85 x plain and <= 1 x ViLT, a forward pass <= 1 x both;
on a GPU: MFU >= 40 %, >= 1.3 x ViLT. data, 2.5 M rows: open <= 3 s, later <= 0.2 s; a row <= 40 us;
workers <= 1.2 x the memory of those with few rows; prepare.py <= 90 CPU seconds and <= 1 GiB.
loader: training waits < 5 % of the time.
"""
# The tools run from a checkout: the core is one folder up.
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from multiprocessing import active_children
from statistics import geometric_mean, median
from time import perf_counter, process_time
from types import SimpleNamespace
from unittest.mock import patch

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import allinone
from allinone import (SIZES, AllInOne, UserError, check_positive, make_head, multiply_adds,
                      pick_device, printable, run_main)
from data import (BENCHMARKS, SPECIAL, BatchSampler, InputSpec, Manifest, MixedDataset, Tokenizer,
                  VideoTextDataset, check_shared_memory, frame_indices, make_loader, read_frames,
                  wordpiece)
from eval import to_device
from train import Losses, make_optimizer, seed_step, train_step

# ---- timing --------------------------------------------------------------------------------------


def take_turns(runs, clock, budget):
    """Call each of the functions {name: run} once a round, in a new random order. 3 to 15 rounds;
    after the third, none starts after `budget` seconds. Returns {name: seconds of each round}."""
    times = {name: [] for name in runs}
    start = perf_counter()
    for number in range(15):
        if number >= 3 and perf_counter() - start > budget:
            break
        for name in random.sample(list(runs), len(runs)):
            begin = clock()
            runs[name]()
            times[name].append(clock() - begin)
    return times


def ratio(first, second):
    """The median over the rounds of first / second."""
    return median(a / b for a, b in zip(first, second))


def seconds(run, *args):
    if torch.cuda.is_available():
        torch.cuda.synchronize()                # what was asked for before does not count
    start = perf_counter()
    run(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start


def machine(device):
    name = "CPU"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif os.path.exists("/proc/cpuinfo"):
        text = Path("/proc/cpuinfo").read_text()
        name = text.partition("model name\t: ")[2].partition("\n")[0]
    return f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"


def train(losses, optimizer, batches, device, steps):
    """Training steps as train.py takes them, on a GPU in bfloat16. Returns the seconds that they
    waited for batches."""
    waited = 0.0
    for step in range(steps):
        seed_step(0, step)
        start = perf_counter()
        batch = next(batches)
        waited += perf_counter() - start
        train_step(losses, optimizer, [to_device(batch, device)], device == "cuda")
    return waited


# ---- model: what it is compared with -------------------------------------------------------------
# Each way has read(frames, input_ids, attention_mask) -> (pooled (B, D), text (B, L, D), ...), and
# is called with a batch for its losses.


class Ours(Losses):
    def read(self, *inputs):
        return self.model(*inputs)


class Separate(nn.Module):
    """Matching and masked words as two forward passes, as in the released code."""

    def forward(self, batch):
        ids = batch["input_ids"]
        mask = batch["attention_mask"]
        pooled = self.read(batch["frames"], ids[:, 0], mask[:, 0])[0]
        text = self.read(batch["frames"], ids[:, 1], mask[:, 1])[1]
        masked = text[:, :ids.shape[-1]].flatten(0, 1)[batch["masked"]]     # text may be padded
        match = self.task_heads["matching"](pooled)
        words = self.task_heads["mlm"](masked)
        return {"matching": F.cross_entropy(match.float(), batch["target"]),
                "mlm": F.cross_entropy(words.float(), batch["labels"])}


class Plain(Separate):
    """Our model (layout "block") with what the released code has in other ways: texts padded to L,
    rolling by slices and cat, attention written out, all tokens out of all blocks."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.task_heads = model.task_heads

    def read(self, frames, input_ids, attention_mask):
        padding = (0, self.model.config.text_length - input_ids.shape[1])
        ids = F.pad(input_ids, padding)
        mask = F.pad(attention_mask, padding)
        roll = patch.object(allinone, "roll_tokens", roll_by_slices)
        attention = patch.object(F, "scaled_dot_product_attention", attend)
        with roll, attention:
            return self.model(frames, ids, mask)


def roll_by_slices(x, forward, backward):
    n = len(forward)
    before = int(forward[0])                                # the words and CLS
    still = x.shape[2] - before - 2 * n
    parts = list(x.split([before, n, still, n], dim=2))
    parts[1] = parts[1].roll(1, dims=1)
    parts[3] = parts[3].roll(-1, dims=1)
    return torch.cat(parts, dim=2)


def attend(q, k, v, attn_mask):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~attn_mask, -torch.inf).softmax(dim=-1) @ v


class Vilt(Separate):
    """transformers' ViltModel of the same size, with random weights. It reads pictures: the frames
    of a clip are T sequences with the same text, and their mean is the clip. No rolling.
    Positions are added here, as it adds them picture by picture, for which a GPU would wait."""

    def __init__(self, config):
        from transformers import ViltConfig, ViltModel
        super().__init__()
        self.vilt = ViltModel(ViltConfig(
            vocab_size=config.vocab, hidden_size=config.width, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, intermediate_size=4 * config.width,
            image_size=config.image, patch_size=config.patch, hidden_dropout_prob=config.dropout))
        self.task_heads = nn.ModuleDict()
        for name in ("matching", "mlm"):
            self.task_heads[name] = make_head(name, config)

    def read(self, frames, input_ids, attention_mask):
        T = frames.shape[1]
        ids = input_ids.repeat_interleave(T, 0)
        mask = attention_mask.repeat_interleave(T, 0)
        parts = self.vilt.embeddings
        x = parts.patch_embeddings(frames.flatten(0, 1) / 127.5 - 1).flatten(2).mT
        cls = parts.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1) + parts.position_embeddings
        seen = torch.ones_like(x[:, :, 0])
        out = self.vilt(ids, mask, image_embeds=parts.dropout(x), pixel_mask=seen)
        text = out.last_hidden_state[:, :input_ids.shape[1]]
        pooled = out.pooler_output.unflatten(0, (-1, T)).mean(dim=1)
        return pooled, text.unflatten(0, (-1, T)).mean(dim=1)

    def compile(self):
        self.vilt.encoder.compile()


def make_ways(size):
    """(config, {name: way}), all with dropout."""
    torch.manual_seed(0)
    if size == "toy":
        torch.set_num_threads(1)                            # as train.py does
    config = replace(SIZES[size], roll="block", dropout=0.1, drop_path=0.1)
    model = AllInOne(config, ("matching", "mlm"))
    ways = {"ours": Ours(model, BENCHMARKS["webvid"]), "plain": Plain(model)}
    try:
        ways["ViLT"] = Vilt(config)
    except ImportError:
        print("transformers is not installed: no comparison with ViLT")
    return config, ways


def make_batch(config, B, L=40):
    """A pre-training batch of random pixels and L words; one word of 7 is masked."""
    R = config.image
    frames = torch.randint(256, (B, config.frames, 3, R, R), dtype=torch.uint8)
    ids = torch.randint(config.vocab, (B, 2, L))
    masked = torch.arange(0, B * L, 7)
    labels = ids[:, 1].flatten()[masked]
    return {"frames": frames, "input_ids": ids, "attention_mask": ids >= 0,
            "target": torch.arange(B) % 2, "masked": masked, "labels": labels}


def step_flops(config, L=40):
    """What a training step of ours computes for a clip; matrix products only.

    6 FLOPs per multiply-add (2 forward, 4 backward) of: two joint forward passes, 2 x
    multiply_adds(config, L); minus what is not computed, that is the second embedding of the
    patches, T (N - 1) 3 P^2 D, and all but 1 and L tokens out of the last block,
    T (S - 1 + N) (9 D^2 + 2 S D); plus the MLM head at the masked words, L / 7 (D^2 + D V).
    MFU, of ViLT too, is this over time and peak: nothing is gained by computing more.
    """
    D = config.width
    N = 1 + config.grid ** 2
    patches = (N - 1) * 3 * config.patch ** 2 * D
    S = L + N
    last_block = (S - 1 + N) * (9 * D + 2 * S) * D
    head = L / 7 * D * (D + config.vocab)
    return 6 * (2 * multiply_adds(config, L) - config.frames * (patches + last_block) + head)


# ---- model ---------------------------------------------------------------------------------------

RATES = SimpleNamespace(lr=1e-4, head_lr=1)             # what make_optimizer reads of a recipe


def bench_model(args):
    device = pick_device(args.device).type
    config, ways = make_ways(args.size)
    print(f"{args.size} on {machine(device)}", flush=True)
    if device == "cuda":
        bench_gpu(config, ways)
    else:
        bench_cpu(config, ways, args.clips)


def bench_cpu(config, ways, B):
    peak = peak_flops("cpu", torch.float32, 2048)
    batch = make_batch(config, B)
    print(f"{B} clips of {config.frames} frames, float32; ms, and ours / other", flush=True)
    for L in (40, 10):
        text = batch["input_ids"][:, 0, :L]
        runs = {}
        for name, way in ways.items():
            runs[name] = partial(way.eval().read, batch["frames"], text, text >= 0)
        with torch.inference_mode():
            pooled = {name: run()[0] for name, run in runs.items()}     # warms up
            torch.testing.assert_close(pooled["ours"], pooled["plain"], atol=1e-4, rtol=0)
            times = take_turns(runs, perf_counter, 20)
        print_times(f"forward, {L} words", times, 2 * B * multiply_adds(config, L) / peak)
    optimizers = {name: make_optimizer(way.train(), RATES) for name, way in ways.items()}
    for L in (40, 10):
        batch = make_batch(config, B, L)
        for name, way in ways.items():
            runs[name] = partial(train_step, way, optimizers[name], [batch], False)
            runs[name]()
        times = take_turns(runs, perf_counter, 60)
        print_times(f"step, {L} words", times, B * step_flops(config, L) / peak)


def print_times(what, times, least):
    """times: {name: seconds of each round}; least: the seconds that ours takes at the peak."""
    line = f"{what:17s}"
    for name in times:
        line += f"  {name} {1e3 * median(times[name]):.1f}"
        line += f" ({ratio(times['ours'], times[name]):.2f})"
    print(f"{line}  {least / median(times['ours']):.0%} of the peak", flush=True)


def peak_flops(device, dtype, side):
    a = torch.randn(side, side, device=device, dtype=dtype)
    least = min(seconds(torch.mm, a, a) for _ in range(20))
    peak = 2 * side ** 3 / least
    print(f"peak: {peak / 1e12:.3g} TFLOP/s, the fastest product of side {side}, {dtype}")
    return peak


def bench_gpu(config, ways):
    """Training steps in bfloat16 with larger and larger batches; then the best batch, compiled."""
    peak = peak_flops("cuda", torch.bfloat16, 8192)
    best = {}
    del ways["plain"]
    for name, way in ways.items():
        measure = partial(gpu_rate, way.cuda().train(), config, peak)
        rates = {}
        for B in (16, 32, 64, 128, 256):
            rates[B] = measure(B, name)
            if rates[B] < 1.02 * rates.get(B // 2, 0):
                break
        B = max(rates, key=rates.get)
        way.compile()
        compiled = measure(B, f"{name}, compiled")
        best[name] = np.array([rates[B], compiled])
        way.cpu()
    for name in list(ways)[1:]:
        print(f"clips/s, ours / {name}, eager and compiled: {best['ours'] / best[name]}")


def gpu_rate(way, config, peak, B, name):
    """Prints a line. Returns clips per second, 0 if B clips do not fit into memory."""
    batch = {key: tensor.pin_memory() for key, tensor in make_batch(config, B).items()}
    steps = partial(train, way, make_optimizer(way, RATES), repeat(batch), "cuda")
    try:
        steps(5)
        torch.cuda.reset_peak_memory_stats()
        step = seconds(steps, 10) / 10
        busy, stops = profile(partial(steps, 1))
    except torch.cuda.OutOfMemoryError:
        print(f"{name}: {B} clips do not fit", flush=True)
        return 0.0
    finally:
        way.zero_grad()
        torch.cuda.empty_cache()
    mfu = B * step_flops(config) / step / peak
    memory = torch.cuda.max_memory_allocated() / 2 ** 30
    print(f"{name}: {B} clips, {1e3 * step:.1f} ms a step, {B / step:.0f} clips/s, MFU {mfu:.1%}, "
          f"{memory:.1f} GiB; GPU idle {1 - busy / step:.1%}, the host waits for it {stops} times",
          flush=True)
    return B / step


def profile(run):
    """(seconds of kernels and copies on the GPU, how often the host waited for it)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text())["traceEvents"])


def read_trace(events):
    busy = 0.0
    stops = 0
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            busy += event["dur"] / 1e6
        stops += event.get("name") in ("cudaStreamSynchronize", "cudaEventSynchronize")
    return busy, stops


# ---- data: files of true size --------------------------------------------------------------------

WORDS = "a man woman dog walks runs jumps slowly near the old red house in rain at night".split()


def caption(i):
    return " ".join(WORDS[i % 7:8 + i % 11])


def clip_name(i):
    return f"{i // 500:06d}/{i}.mp4"


def write_manifest(folder, rows):
    """A manifest as prepare.py writes it for WebVid, of clips in folder/videos."""
    os.makedirs(folder, exist_ok=True)
    info = {"benchmark": "webvid", "root": f"{folder}/videos", "prepared": {}}
    Path(folder, "dataset.json").write_text(json.dumps(info))
    with open(f"{folder}/train.jsonl", "w") as file:
        for i in range(rows):
            row = {"id": str(i), "video": clip_name(i), "caption": caption(i)}
            file.write(json.dumps(row) + "\n")
    return folder


class NoVideo(VideoTextDataset):
    """Rows and texts are read, clips are not."""

    def load_frames(self, row, rng):
        return torch.zeros(1, 3, 1, 1, dtype=torch.uint8)


def open_loader(kind, folder, config, batch, workers):
    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(wordpiece(vocabulary))
    spec = InputSpec(BENCHMARKS["webvid"], config, tokenizer, [])
    rows = kind(folder, "train", spec, train=True)
    sampler = BatchSampler([len(rows)], batch, seed=0)
    check_shared_memory(rows, batch, workers)
    return make_loader(MixedDataset([rows]), sampler, workers, tokenizer.pad)


def open_rows(folder, workers):
    return open_loader(NoVideo, folder, SIZES["toy"], 250, workers)


def bench_data(args):
    rows = args.rows
    print(f"{rows} rows on {machine('cpu')}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        many = write_manifest(f"{folder}/many", rows)
        part = write_manifest(f"{folder}/part", rows // 5)
        few = write_manifest(f"{folder}/few", 1000)
        times = [seconds(Manifest, many, "train") for _ in range(2)]
        print(f"open a manifest: first {times[0]:.2f} s, later {times[1]:.3f} s")
        manifest = Manifest(many, "train")
        numbers = random.choices(range(rows), k=20_000)
        time = seconds(lambda: [manifest[i] for i in numbers])
        print(f"a row at random: {1e6 * time / len(numbers):.0f} us", flush=True)
        for name in (few, many):
            time = seconds(lambda: next(open_rows(name, 2)))
            print(f"start to first batch, {Path(name).name} rows: {time:.2f} s", flush=True)
        steps = rows // 5 // 250
        del manifest, numbers                               # workers would share them
        worker_memory(few, steps)                           # the first measure is too high
        least = worker_memory(few, steps)
        memory = worker_memory(part, steps)
        print(f"8 workers, an epoch of {rows // 5} rows: {memory / 2 ** 10:.0f} MiB in all, "
              f"{memory / least:.2f} x that of 1000 rows", flush=True)
        bench_prepare(f"{folder}/owners", rows)


def worker_memory(folder, steps):
    """KiB that 8 workers hold at most (proportional set size), over so many batches of 250."""
    peak = 0
    for step, _ in enumerate(islice(open_rows(folder, 8), steps)):
        if step % (1 + steps // 10) == 0:
            peak = max(peak, sum(map(proportional_memory, active_children())))
    return peak


def proportional_memory(process):
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    return int(text.partition("\nPss:")[2].split()[0])


def bench_prepare(root, rows):
    """tools/prepare.py on WebVid's csv; of every 12th row there is an (empty) clip."""
    for i in range(0, rows, 12):
        path = Path(root, "videos", clip_name(i))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for split, count in (("train", rows), ("val", 1000)):
        with open(f"{root}/results_2M_{split}.csv", "w") as file:
            file.write("videoid,contentUrl,duration,page_dir,name\n")
            for i in range(count):
                file.write(f"{i},https://x.org/y.mp4,PT15S,{i // 500:06d},{caption(i)}\n")
    command = [sys.executable, Path(__file__).with_name("prepare.py"), "webvid", root, "--out",
               f"{root}/out", "--no-check", "--allow-missing"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError("tools/prepare.py failed")
    print(f"tools/prepare.py, {rows} rows of WebVid: {usage.ru_utime + usage.ru_stime:.0f} CPU "
          f"seconds, {usage.ru_maxrss / 2 ** 20:.2f} GiB")


# ---- loader --------------------------------------------------------------------------------------


def encode(path, seed, count=None, repeats=1):
    """A file of 596 x 336 with 25 frames a second, some 0.7 Mbit/s: a texture that slides, with
    noise. h264, or mpeg4 where there is no encoder for it. count frames, by default of 10 to 20 s;
    the packets are written `repeats` times, one after the other."""
    rng = np.random.default_rng(seed)
    count = count or int(rng.integers(250, 500))
    texture = rng.integers(20, 230, (45, 80, 3), np.uint8)
    texture = texture.repeat(16, axis=0).repeat(16, axis=1)
    packets = []
    with av.open(str(path), "w") as file:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = file.add_stream(codec, 25, {"preset": "veryfast"}, width=596, height=336)
        for t in range(count):
            place = t % 384
            noise = rng.integers(0, 12, (336, 596, 1), np.uint8)
            picture = texture[place:place + 336, place:place + 596] + noise
            packets += stream.encode(av.VideoFrame.from_ndarray(picture))
        packets += stream.encode()
        times = [(packet.pts, packet.dts) for packet in packets]
        unit = packets[0].time_base                         # mux() changes all three
        for number in range(repeats):
            for packet, (pts, dts) in zip(packets, times):
                packet.time_base = unit
                packet.pts = pts + number * count
                packet.dts = dts + number * count
                file.mux(packet)


def make_clips(folder, count):
    """`count` clips with captions, of which 40 differ. Made once."""
    if os.path.exists(f"{folder}/dataset.json"):
        return
    paths = []
    for i in range(count):
        path = Path(folder, "videos", clip_name(i))
        path.parent.mkdir(parents=True, exist_ok=True)
        paths.append(path)
    with ProcessPoolExecutor() as pool:
        list(pool.map(encode, paths[:40], range(40)))
    for i, path in enumerate(paths[40:]):
        shutil.copyfile(paths[i % 40], path)
    write_manifest(folder, count)


def bench_loader(args):
    device = pick_device(args.device).type
    B = min(args.batch, args.clips)
    count = 2 * args.workers
    print(f"{args.size}, {args.workers} workers, batches of {B}, {machine(device)}", flush=True)
    folder = f"{args.folder}/{args.clips}"
    make_clips(folder, args.clips)
    config, ways = make_ways(args.size)
    way = ways["ours"].to(device).train()
    batches = open_loader(VideoTextDataset, folder, config, B, args.workers)
    steps = partial(train, way, make_optimizer(way, RATES), batches, device)
    skip(batches, count)                        # workers start, and at first end, all at once
    rate = count * B / seconds(skip, batches, count)
    print(f"reading alone: {rate:.0f} clips/s, {rate / args.workers:.1f} per worker", flush=True)
    steps(5)
    start = perf_counter()
    waited = steps(count)
    time = perf_counter() - start
    print(f"training: {count * B / time:.0f} clips/s, waits for data {waited / time:.1%} of the "
          "time")


def skip(batches, count):
    for _ in range(count):
        next(batches)


# ---- video ---------------------------------------------------------------------------------------
# method(path, numbers, R) -> (T, 3, R, R) uint8; R None: full size.


def ours(path, numbers, R):
    return read_frames(path, numbers, R).numpy()


def decode_all(path, numbers, R):
    """The definition: decode everything, keep some."""
    with av.open(path) as container:
        frames = list(container.decode(one_thread(container)))
    return np.stack([to_rgb(frames[i], R) for i in numbers])


def seek_each(path, numbers, R):
    """A seek before every frame, and decoding up to its time, known from a first pass."""
    pictures = []
    with av.open(path) as container:
        stream = one_thread(container)
        times = sorted(packet.pts for packet in container.demux(stream) if packet.size)
        for i in numbers:
            container.seek(times[i], stream=stream)
            frame = next(f for f in container.decode(stream) if f.pts >= times[i])
            pictures.append(to_rgb(frame, R))
    return np.stack(pictures)


def one_thread(container):
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    return stream


def to_rgb(frame, R):
    picture = frame.to_ndarray(format="rgb24", width=R, height=R)
    return np.rot90(picture, frame.rotation // 90).transpose(2, 0, 1)


def with_decord(path, numbers, R):
    import decord
    video = decord.VideoReader(path, num_threads=1, width=R or -1, height=R or -1)
    return video.get_batch(numbers).asnumpy().transpose(0, 3, 1, 2)


def with_cv2(path, numbers, R):
    import cv2
    cv2.setNumThreads(1)
    video = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    pictures = {}
    for i in range(max(numbers) + 1):
        if video.grab() and i in numbers:
            picture = video.retrieve()[1]
            pictures[i] = cv2.resize(picture, (R, R)) if R else picture
    bgr = np.stack([pictures[i] for i in numbers])
    return bgr[..., ::-1].transpose(0, 3, 1, 2)


def with_torchcodec(path, numbers, R):
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize
    resize = [Resize((R, R))] if R else []
    decoder = VideoDecoder(path, num_ffmpeg_threads=1, transforms=resize)
    return decoder.get_frames_at(numbers).data.numpy()


METHODS = {"ours": ours, "decode all": decode_all, "seek each": seek_each, "decord": with_decord,
           "cv2": with_cv2, "torchcodec": with_torchcodec}


def bench_video(args):
    """Processor time, as other processes count less in it; one thread; files in the page cache."""
    print(f"{machine('cpu')}; T frames of 224 x 224; processor ms of ours, and how many times as "
          "long others take; = exact, ! wrong frames, absent: not installed")
    if not args.files and not args.long:
        raise UserError("video: give files, or --long")
    torch.set_num_threads(1)
    ratios = defaultdict(list)
    for path in args.files:
        try:
            decode_all(path, middle_frames(path, 1), None)
        except av.error.FFmpegError as error:          # no truth to compare with
            print(f"{printable(path)}: left out, {error.strerror}")
            continue
        for T in (3, 8):
            marks, runs = check_methods(path, middle_frames(path, T))
            times = take_turns(runs, process_time, budget=10)
            line = f"{printable(Path(path).name):20.20s} T {T}: {1e3 * median(times['ours']):7.2f}"
            line += marks.pop("ours")
            for name, mark in marks.items():
                if name in runs:
                    ratios[T, name].append(ratio(times[name], times["ours"]))
                    mark = f"{ratios[T, name][-1]:.2f}{mark}"
                line += f"  {name} {mark}"
            print(line, flush=True)
    for (T, name), values in ratios.items():
        print(f"T {T}, {name}: geometric mean {geometric_mean(values):.2f}, least "
              f"{min(values):.2f}, of {len(values)} files")
    if args.long:
        bench_long("mkv")
        bench_long("mp4")


def middle_frames(path, T):
    """The frame numbers that evaluation looks at."""
    numbers = []

    def pick(times):
        numbers.extend(frame_indices(len(times), T, "eval"))
        return numbers

    read_frames(path, pick)
    return numbers


def check_methods(path, numbers):
    """({name: mark}, {name: run}): the exact methods are those that give decode_all's pixels."""
    truth = decode_all(path, numbers, None)
    marks = {}
    runs = {}
    for name, method in METHODS.items():
        try:
            equal = np.array_equal(method(path, numbers, None), truth)
            method(path, numbers, 224)
            marks[name] = "=" if equal else "!"
            runs[name] = partial(method, path, numbers, 224)
        except ImportError:
            marks[name] = "absent"
        except Exception:                                   # a refusal is a result
            marks[name] = "fails"
    return marks, runs


def bench_long(suffix):
    """Three frames out of two hours, 120 times the packets of a minute."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/long.{suffix}"
        encode(path, 0, count=1500, repeats=120)
        inputs = (path, middle_frames(path, 3), 224)
        read = partial(read_frames, *inputs, listings=folder)
        runs = {"bare demux": partial(demux, path), "first visit": read, "later visit": read,
                "torchcodec": partial(with_torchcodec, *inputs)}
        for name, run in runs.items():
            bytes_before = bytes_read()
            start = process_time()
            try:
                run()
            except (ImportError, OSError, RuntimeError):    # torchcodec, or its libraries
                continue
            print(f"2 h {suffix}, {os.path.getsize(path) / 1e6:.0f} MB, {name}: "
                  f"{1e3 * (process_time() - start):.0f} processor ms, "
                  f"{(bytes_read() - bytes_before) / 1e6:.1f} MB read", flush=True)


def demux(path):
    with av.open(path) as container:
        for _ in container.demux(video=0):
            pass


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


# ---- python tools/bench.py -----------------------------------------------------------------------

COMMANDS = {"model": bench_model, "data": bench_data, "loader": bench_loader, "video": bench_video}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("files", nargs="*", help="video: the files")
    add("--long", action="store_true", help="video: also two hours of mkv and mp4, made here")
    add("--size", choices=SIZES, default="base", help="model, loader (default base)")
    add("--device", help="model, loader: cuda, cpu (default: cuda if there is one)")
    add("--clips", type=int, help="model: in a batch on a CPU (default 2); loader: files to make "
        "(default 2000)")
    add("--workers", type=int, default=16, help="loader: reading processes (default 16)")
    add("--batch", type=int, default=64, help="loader: clips in a step (default 64)")
    add("--folder", default=f"{tempfile.gettempdir()}/bench-clips", help="loader: for its files, "
        "which stay (default %(default)s)")
    add("--rows", type=int, default=2_500_000, help="data: rows (default 2,500,000)")
    args = parser.parse_args()
    if args.clips is None:
        args.clips = 2 if args.command == "model" else 2000
    check_positive(args, "clips", "workers", "batch")
    if args.rows < 1250:
        raise UserError(f"--rows {args.rows}: must be at least 1250, five batches")
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_main("bench.py", main)
