"""Train All-in-one: pre-training, and fine-tuning for each task. Without --data, on the toy world.

    python train.py --task vqa                             a few minutes on a laptop's CPU
    python train.py --data data/msrvtt-qa --init base.pt
    python train.py --data data/webvid,data/cc3m --init vit.pt --task pretrain
    torchrun --nproc_per_node=8 train.py ...               the same on 8 GPUs

CUDA_VISIBLE_DEVICES= in front of the command trains on the CPU.
tools/prepare.py prepares a folder of data, tools/weights.py converts weights of other code.
What no flag sets comes from the recipe of the benchmark (python eval.py --list).
"""
import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, fields, replace

from allinone import (RANK, SIZES, WORLD, AllInOne, Config, UserError, check_positive,
                      check_workers, count_parameters, default_workers, init_narrow, join_processes,
                      load_checkpoint, load_model, load_run, load_weights, lock_folder,
                      pick_device, print0, printable, progress, run_main, save_checkpoint,
                      write_file)               # first: it prepares the import of torch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import (BENCHMARK_OF, MASK_SHARE, BatchSampler, InputSpec, MixedDataset, Tokenizer,
                  VideoTextDataset, benchmark_of, check_shared_memory, has_split, make_loader,
                  manifest_info, read_answers)
from eval import (EvalSettings, answer_scores, embeddings, evaluate, evaluate_folder,
                  format_metrics, option_scores, pretrain_scores, read_pairs, to_device)

# ---- losses --------------------------------------------------------------------------------------

TEMPERATURE = 0.05                              # of the cosines, as released


class Losses(nn.Module):
    """The losses of a batch, as a forward pass that DistributedDataParallel and torch.compile can
    wrap. Returns {name: loss}; their sum is minimised."""

    def __init__(self, model, benchmark):
        super().__init__()
        self.model = model
        self.benchmark = benchmark

    def forward(self, batch):
        task = self.benchmark.task
        if task == "retrieval":
            return retrieval_losses(self.model, batch)
        if task == "pretrain":
            return pretrain_losses(self.model, batch)
        if task in ("vqa", "action"):
            scores = answer_scores(self.model, batch)
        else:
            scores = option_scores(self.model, batch, self.benchmark.heads)
        return {task: cross_entropy(scores, batch["target"])}


def cross_entropy(scores, target):
    """The mean over the rows whose target is known (not -1: an answer outside the list); 0 if none
    is, where PyTorch's own mean is NaN."""
    loss = F.cross_entropy(scores.float(), target, ignore_index=-1, reduction="sum")
    return loss / (target >= 0).sum().clamp(min=1)


def contrastive_loss(text, video):
    """Cross-entropy over rows plus over columns of the cosines; text, video (B, embed) unit
    vectors. As released, both terms are added, not averaged. With --accum the negatives are those
    of one micro-batch. Differs: with several processes all their pairs are negatives."""
    target = RANK * len(text) + torch.arange(len(text), device=text.device)     # its partner
    with torch.autocast(text.device.type, enabled=False):   # scores up to 20 need float32
        text, video = text.float(), video.float()
        by_text = text @ gather_rows(video).T / TEMPERATURE
        by_video = video @ gather_rows(text).T / TEMPERATURE
        return F.cross_entropy(by_text, target) + F.cross_entropy(by_video, target)


def gather_rows(x):
    """The rows of all processes, with gradients."""
    return GatherRows.apply(x) if dist.is_initialized() else x


class GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(WORLD)]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)               # each process has a loss that reads these rows
        return gradient.chunk(WORLD)[RANK]


def retrieval_losses(model, batch):
    """Contrast; with --vtm also the rank loss (the clip's caption against drawn ones) and, at half
    weight, matching: the caption belongs to the clip, the first drawn one does not.
    Differs: for matching, the released code keeps the caption and draws another clip."""
    losses = {"contrast": contrastive_loss(*embeddings(model, batch))}
    if "rank" not in model.task_heads:
        return losses
    B, A, _ = batch["input_ids"].shape
    pooled = read_pairs(model, batch)
    scores = model.task_heads["rank"](pooled).view(B, A)
    match = model.task_heads["matching"](pooled).view(B, A, 2)
    match = match[:, :2].flatten(0, 1)                      # the clip's own text, and a drawn one
    is_own = torch.tensor([1, 0], device=match.device).repeat(B)
    losses["rank"] = cross_entropy(scores, batch["target"])
    losses["matching"] = 0.5 * cross_entropy(match, is_own)
    return losses


def pretrain_losses(model, batch):
    """Matching and masked words; with --contrast also contrast, of the caption as it is."""
    match, words = pretrain_scores(model, batch)
    losses = {"matching": cross_entropy(match, batch["target"]),
              "mlm": cross_entropy(words, batch["labels"])}
    if "contrast" in model.task_heads:
        losses["contrast"] = contrastive_loss(*embeddings(model, batch, number=2))
    return losses


# ---- data ----------------------------------------------------------------------------------------

# The toy size has its own recipe for each task, and for retrieval with --vtm: learning rate, batch,
# clips seen in all.
TOY = {"vqa": (6e-4, 16, 67_200), "choice": (6e-4, 8, 8_000), "vcr": (6e-4, 8, 8_000),
       "retrieval": (7e-4, 32, 45_000), "vtm": (7e-4, 32, 16_000),
       "pretrain": (7e-4, 32, 51_200), "action": (6e-4, 32, 16_000)}
TOY_NEGATIVES = 2       # drawn captions with --vtm; the released recipes have 10 or 15
TOY_MASK_SHARE = 0.5    # at 0.15 the word that only the order of frames reveals is seldom masked


class Data:
    """What a run reads: its folders, their benchmarks, tokenizer, answer list, the model's config,
    and the datasets."""

    def __init__(self, args, init):
        """init: the checkpoint of --init or None."""
        self.folders = find_folders(args)
        found = [benchmark_of(folder, args.task) for folder in self.folders]
        self.names = [name for name, _ in found]
        self.benchmarks = [benchmark for _, benchmark in found]
        self.benchmark = self.benchmarks[0]
        self.vtm = args.vtm or self.benchmark.vtm
        task = self.benchmark.task
        tasks = {benchmark.task for benchmark in self.benchmarks}
        if tasks != {"pretrain"} and (len(found) > 1 or args.contrast):
            raise UserError("several folders and --contrast are for pre-training, not for "
                            f"{', '.join(sorted(tasks - {'pretrain'}))}")
        if task != "retrieval" and args.vtm:
            raise UserError(f"--vtm is for retrieval, not for {task}")
        if args.frames and all(benchmark.frames == 1 for benchmark in self.benchmarks):
            raise UserError(f"--frames is not for {self.names[0]}, which has pictures")
        self.tokenizer = find_tokenizer(args, init, self.folders[0])
        self.answers = []
        if "answer" in self.benchmark.heads:
            self.answers = read_answers(self.folders[0])
        self.config = make_config(args, init, self.benchmark, self.tokenizer, self.answers)
        self.toy = self.config.width == SIZES["toy"].width      # a checkpoint names no size
        self.train = MixedDataset(self.datasets("train", args))
        self.val = []                           # your own data may have none
        if all(has_split(folder, "val") for folder in self.folders):
            self.val = self.datasets("val", args)

    def datasets(self, split, args):
        datasets = []
        train = split == "train"
        mask_share = TOY_MASK_SHARE if self.toy and train else MASK_SHARE
        for folder, benchmark in zip(self.folders, self.benchmarks):
            negatives = TOY_NEGATIVES if self.toy else benchmark.negatives
            spec = InputSpec(benchmark, self.config, self.tokenizer, self.answers,
                             negatives if self.vtm else 0, mask_share)
            datasets.append(VideoTextDataset(folder, split, spec, train, args.seed))
        return datasets


def find_folders(args):
    """The folders of --data; without it that of the toy world, made if it is not there."""
    if args.data:
        return [os.path.abspath(folder) for folder in args.data.split(",")]
    if args.task is None:
        tasks = ", ".join(BENCHMARK_OF)
        raise UserError(f"give --data FOLDER, or --task for the toy world: {tasks}")
    from tools.toy import make_toy              # here, as it imports data.py, and only for the toy
    name = BENCHMARK_OF[args.task]
    if RANK == 0:
        make_toy("data/toy", [name])
    wait_for_all()
    return [os.path.abspath(f"data/toy/{name}")]


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def find_tokenizer(args, init, folder):
    path = os.path.join(folder, "tokenizer.json")
    if args.tokenizer and init:                 # other ids would give words a wrong embedding
        raise UserError("--init brings its tokenizer; leave out --tokenizer")
    if args.tokenizer:
        return Tokenizer.load(args.tokenizer)
    if init:
        return Tokenizer.from_json(init["tokenizer"])
    if os.path.exists(path):
        return Tokenizer.load(path)
    raise UserError(f"{path} is not there; give --tokenizer vocab.txt or bert-base-uncased, or let "
                    "tools/prepare.py build one from your own texts")


def make_config(args, init, benchmark, tokenizer, answers):
    """The config of --size or --init, with the benchmark's text length. Frames: --frames, else the
    benchmark's, at least the paper's 3, so that a run on pictures can start one on videos."""
    config = init["config"] if init and not args.size else SIZES[args.size or "toy"]
    changes = {"vocab": len(tokenizer), "answers": len(answers),
               "text_length": benchmark.text_length,
               "frames": args.frames or max(3, benchmark.frames)}
    if args.roll:
        changes["roll"] = args.roll
    return replace(config, **changes, **parse_set(args.set))


SETTABLE = ("fraction", "time", "roll_unimodal", "dropout", "drop_path")


def parse_set(pairs):
    """["fraction=0.125", "time=0"] -> {"fraction": 0.125, "time": False}"""
    kinds = {field.name: field.type for field in fields(Config)}
    settings = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in SETTABLE:
            raise UserError(f"--set {pair}: give NAME=VALUE, NAME out of {', '.join(SETTABLE)}")
        if kinds[name] is bool:
            if text not in ("0", "1"):
                raise UserError(f"--set {pair}: {name} takes 0 or 1")
            settings[name] = text == "1"
            continue
        try:
            settings[name] = float(text)
        except ValueError:
            raise UserError(f"--set {pair}: {name} takes a number") from None
    return settings


# ---- model, recipe, optimiser --------------------------------------------------------------------


def make_model(args, init, data):
    heads = list(data.benchmark.heads)
    if args.contrast:
        heads.append("contrast")
    if data.vtm:
        heads += ["rank", "matching"]
    torch.manual_seed(args.seed)
    model = AllInOne(data.config, heads)
    if data.toy:
        init_narrow(model)
    if init:
        print0(f"{args.init}: {load_weights(model, init, data.answers)}")
    if data.benchmark.task == "action":         # linear evaluation, as released
        for name, p in model.named_parameters():
            p.requires_grad = name.startswith(("pooler.", "task_heads."))
    return model


@dataclass
class Recipe:
    """The benchmark's recipe, as the flags changed it."""
    batch: int          # clips per optimiser step, over all processes and micro-batches
    lr: float           # peak learning rate
    head_lr: float      # factor for task heads
    steps: int
    warmup: int         # steps
    steps_per_epoch: int


def make_recipe(args, data):
    """The Recipe, after printing it; also prints how to keep the usual batch."""
    benchmark = data.benchmark
    lr = benchmark.lr
    usual = benchmark.batch
    head_lr = benchmark.head_lr
    warmup = benchmark.warmup
    if data.toy:
        lr, usual, clips = TOY["vtm" if data.vtm else benchmark.task]
        head_lr = 1
        warmup = 0
    pieces = args.accum * WORLD
    lengths = [len(part) for part in data.train.parts]
    batch = min(args.batch or usual, min(lengths) // pieces * pieces)
    if batch == 0:
        raise UserError(f"{min(lengths)} rows are too few for {pieces} micro-batches (processes x "
                        "--accum)")
    if batch % pieces:
        raise UserError(f"the batch, {batch}, must be a multiple of {pieces} (processes x --accum);"
                        " give --batch")
    if batch < (args.batch or usual):
        print0(f"batch cut to {batch}: a data set has {min(lengths)} rows")
    steps_per_epoch = sum(length // batch for length in lengths)
    steps = benchmark.steps or benchmark.epochs * steps_per_epoch
    if data.toy:                                # its manifests may ask for fewer clips
        clips = manifest_info(data.folders[0]).get("toy_clips", clips)
        steps = min(clips, 100 * sum(lengths)) // batch         # at most 100 epochs
    steps = args.steps or max(1, steps)
    warmup = min(warmup or steps, round(0.1 * steps))       # at most a tenth of the steps
    recipe = Recipe(batch, args.lr or lr, head_lr, steps, warmup, steps_per_epoch)
    print0(f"recipe: batch {batch}, {steps} steps of which {steps_per_epoch} are an epoch, lr "
           f"{recipe.lr:g} (task heads x {head_lr:g}), warm-up {recipe.warmup} steps")
    if args.batch and batch < usual <= min(lengths):
        # The usual batches are powers of 2, and --accum must divide them.
        accum = 2 ** math.ceil(math.log2(args.accum * usual / batch))
        print0(f"the usual batch is {usual}; --batch {usual} --accum {accum} trains with it in the "
               "same memory")
    return recipe


def lr_at(step, recipe):
    """The share of the peak at step 0, 1, ...: linear from 0, then linear to 0, as released."""
    if step < recipe.warmup:
        return step / recipe.warmup
    return (recipe.steps - step) / max(1, recipe.steps - recipe.warmup)


def make_optimizer(model, recipe):
    """AdamW as released: no decay on biases, norms and single vectors; task heads learn faster."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = (name.startswith("task_heads."), p.dim() > 1)
            groups.setdefault(key, []).append(p)
    parts = []
    for (head, matrix), params in groups.items():
        peak = recipe.lr * (recipe.head_lr if head else 1)
        decay = 0.01 if matrix else 0.0
        parts.append({"params": params, "lr": peak, "peak": peak, "weight_decay": decay})
    return torch.optim.AdamW(parts, betas=(0.9, 0.98), eps=1e-8, fused=True)


# ---- the run folder ------------------------------------------------------------------------------


class RunFolder:
    """The files of a run: config.json (what must stay equal), metrics.jsonl (the log), last.pt (to
    resume from), best.pt (best on validation), bad.txt (clips left out), test.json. Only the first
    process writes, except bad.txt."""

    def __init__(self, folder, settings, resume):
        """Make the folder, or find it with the same settings. self.last is its last checkpoint."""
        self.folder = folder
        # logged: bytes of metrics.jsonl
        self.last = {"step": 0, "best": -math.inf, "bad": [], "logged": 0}
        if RANK == 0:
            self.claim(settings, resume)
        wait_for_all()
        if resume and os.path.exists(self.path("last.pt")):
            self.last |= load_checkpoint(self.path("last.pt"))
        if RANK == 0:
            self.cut_log()

    def path(self, name):
        return os.path.join(self.folder, name)

    def claim(self, settings, resume):
        path = self.path("config.json")
        if not resume and os.path.exists(path):
            raise UserError(f"{self.folder} holds a run; go on with --resume, or choose another "
                            "--out")
        if resume:
            self.check_settings(settings)
        try:
            os.makedirs(self.folder, exist_ok=True)
        except (OSError, ValueError) as error:
            raise UserError(f"--out {self.folder!r}: {error}; choose another folder") from None
        self.lock = lock_folder(self.folder)                # held as long as this process lives
        if not resume:
            write_file(path, json.dumps(settings, indent=1))

    def check_settings(self, settings):
        path = self.path("config.json")
        if not os.path.exists(path):
            raise UserError(f"--resume: there is no run in {self.folder}; leave out --resume")
        try:
            with open(path, encoding="utf-8") as file:
                before = dict(json.load(file))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"--resume: {path} cannot be read ({error}); start again with "
                            "another --out") from None
        for group in ("model", "recipe"):       # name what differs, not the whole group
            before |= before.get(group) or {}
            settings |= settings[group]
        for name, value in settings.items():
            if name not in ("model", "recipe") and before.get(name) != value:
                raise UserError(f"--resume: {name} was {before.get(name)}, now {value}; use the "
                                "same flags and data, or another --out")

    def cut_log(self):
        """Drop the lines logged after the last checkpoint, as those steps run again, and a last
        line that is cut."""
        try:
            with open(self.path("metrics.jsonl"), "a+b") as file:
                file.seek(0)
                end = file.read(self.last["logged"]).rfind(b"\n") + 1
                file.truncate(end)
        except OSError as error:
            raise UserError(f"{self.path('metrics.jsonl')}: {error.strerror}") from None

    def append(self, name, line):
        try:
            with open(self.path(name), "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(f"{self.path(name)} cannot be written: {error.strerror}; make room and "
                            "go on with --resume") from None

    def log(self, line):
        if RANK == 0:
            self.append("metrics.jsonl", json.dumps(line))

    def save(self, name, model, data, **about):
        """A checkpoint that needs no flags: it carries tokenizer, answers and folders."""
        if RANK > 0:
            return
        logged = os.path.getsize(self.path("metrics.jsonl"))        # cut_log has made it
        save_checkpoint(self.path(name), model, logged=logged, answers=data.answers,
                        tokenizer=data.tokenizer.to_json(), name="+".join(data.names),
                        data=data.folders, task=data.benchmark.task, **about)

    def restore(self, model, optimizer):
        """Fill both from the last checkpoint."""
        if "model" not in self.last:
            return
        try:
            model.load_state_dict(self.last.pop("model"))
            optimizer.load_state_dict(self.last.pop("optimizer"))
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            cause = str(error).splitlines()[0]
            raise UserError(f"{self.path('last.pt')} cannot be resumed from: {cause}") from None
        print0(f"resumed at step {self.last['step']}")


def run_settings(args, data, recipe):
    """What must be equal for a resumed run to be the same run. On a CPU threads too: their number
    changes the order of additions."""
    return {"names": data.names, "rows": [part.rows.crc for part in data.train.parts],
            "model": asdict(data.config), "recipe": asdict(recipe), "init": args.init,
            "accum": args.accum, "processes": WORLD,
            "threads": None if torch.cuda.is_available() else torch.get_num_threads(),
            "seed": args.seed, "amp": args.amp, "contrast": args.contrast, "vtm": data.vtm,
            "answer list": zlib.crc32("\n".join(data.answers).encode()),
            "tokenizer": zlib.crc32(data.tokenizer.to_json().encode())}


# ---- the loop ------------------------------------------------------------------------------------


class Stop(Exception):
    """SIGTERM or Ctrl-C: save and end."""


class StopSignal:
    """SIGTERM and Ctrl-C ask the loop to stop after the current step; waiting for data ends at
    once. With several processes the first one saves; the others go on until it has ended."""

    def __init__(self):
        self.asked = False
        self.waiting = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)    # a second Ctrl-C ends at once
        if RANK > 0:
            # The first process saves and ends; then the next gather here fails: hide its traceback.
            sys.excepthook = lambda *details: None
            return
        os.write(2, b"\nstopping after this step; Ctrl-C again ends at once\n")
        self.asked = True
        if self.waiting:
            raise Stop

    def next(self, batches):
        self.waiting = True
        try:
            if self.asked:
                raise Stop
            return next(batches)
        finally:
            self.waiting = False

    def release(self):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


class BadClips:
    """Training goes on without a few clips: up to 10 rows, but no more than 10 % of them; of 1,000
    rows or more up to 1 %. All are written to bad.txt, the first is printed."""

    def __init__(self, run, rows):
        self.run = run
        self.limit = max(rows // 100, min(10, rows // 10))
        self.seen = set(run.last["bad"])

    def note(self, batch):
        for name, cause in batch["errors"].items():
            if name not in self.seen:
                self.seen.add(name)
                self.run.append("bad.txt", f"{name}\t{cause}")
                if len(self.seen) == 1:
                    print(printable(f"left out: row {name}: {cause}"), flush=True)
        listed = f"{self.run.path('bad.txt')} lists them; prepare the data again"
        if "frames" not in batch:
            raise UserError(f"no training clip of a whole batch can be read; {listed}")
        if len(self.seen) > self.limit:
            raise UserError(f"{len(self.seen)} training clips cannot be read, the limit is "
                            f"{self.limit}; {listed}")


def train_step(losses, optimizer, micro_batches, amp):
    """One optimiser step over micro-batches. Returns {name: loss}, means of this process."""
    count = len(micro_batches)
    means = {}
    for n, batch in enumerate(micro_batches):
        # Gradients of all processes are averaged once, after the last micro-batch.
        more_follow = WORLD > 1 and n + 1 < count
        device = batch["frames"].device.type
        with losses.no_sync() if more_follow else contextlib.nullcontext():
            with torch.autocast(device, torch.bfloat16, enabled=amp):
                parts = losses(batch)
            (sum(parts.values()) / count).backward()
        for name, loss in parts.items():
            means[name] = means.get(name, 0) + loss.detach() / count
    optimizer.step()
    optimizer.zero_grad()
    return means


def check_losses(step, means, micro_batches):
    """Raises UserError if a loss is not finite, naming the step, the losses and the rows. On a GPU
    only logged steps are checked: the first bad step may be an earlier one."""
    if all(math.isfinite(loss) for loss in means.values()):
        return
    losses = ", ".join(f"{name} {loss:g}" for name, loss in means.items())
    rows = torch.cat([batch["index"] for batch in micro_batches]).tolist()
    raise UserError(f"step {step}: a loss is not finite ({losses}); training rows {rows}; lower "
                    "--lr, or look at these clips")


def mean_over_processes(means):
    """{name: float}. Waits for the device: call it only for what is printed."""
    values = torch.stack([loss.float() for loss in means.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= WORLD
    return dict(zip(means, values.tolist()))


def chance_losses(data, pairs):
    """The loss of a guess, in nats: a model whose loss stays there has learnt nothing.
    pairs: the clips of one micro-batch, which contrast tells apart."""
    row = data.train.parts[0].rows[0]
    options = len(row.get("options", ())) or max(1, len(data.answers))
    return {data.benchmark.task: math.log(options), "mlm": math.log(data.config.vocab),
            "matching": math.log(2) * (0.5 if data.vtm else 1), "contrast": 2 * math.log(pairs),
            "rank": math.log(1 + data.train.parts[0].spec.negatives)}


def loop(args, data, recipe, model, optimizer, run, settings):
    """Train from the last checkpoint on; validate and save on the way."""
    run.restore(model, optimizer)
    device = next(model.parameters()).device
    step = run.last["step"]
    best = run.last["best"]
    losses = wrap(Losses(model, data.benchmark), args, data, device)
    lengths = [len(part) for part in data.train.parts]
    sampler = BatchSampler(lengths, recipe.batch, args.seed, args.accum, RANK, WORLD, step)
    largest = max(data.train.parts, key=lambda part: part.spec.frames)
    check_shared_memory(largest, recipe.batch // sampler.pieces, args.workers)
    batches = make_loader(data.train, sampler, args.workers, data.tokenizer.pad)
    chance = chance_losses(data, recipe.batch // args.accum)
    bad = BadClips(run, sum(lengths))
    stop = StopSignal()
    started = time.perf_counter()
    first_step = step
    waited = 0.0                                # seconds, for data
    log_every = math.ceil(recipe.steps / 40)
    validate_every = max(recipe.steps_per_epoch, math.ceil(recipe.steps / 20))
    bar = progress(None, "training", total=recipe.steps - step)
    model.train()
    while step < recipe.steps:
        final = step + 1 == recipe.steps
        log_now = final or (step + 1) % log_every == 0
        validate_now = final or (step + 1) % validate_every == 0
        seed_step(args.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, recipe)
        wait_began = time.perf_counter()
        try:
            micro_batches = [stop.next(batches) for _ in range(args.accum)]
        except Stop:
            break
        waited += time.perf_counter() - wait_began
        for n, batch in enumerate(micro_batches):
            bad.note(batch)
            micro_batches[n] = to_device(batch, device)
        means = train_step(losses, optimizer, micro_batches, args.amp)
        step += 1
        if log_now or device.type == "cpu":     # on a GPU, reading a number makes the CPU wait
            means = mean_over_processes(means)
            check_losses(step, means, micro_batches)
        bar.update()
        if log_now:
            lr = optimizer.param_groups[0]["lr"]
            spent = time.perf_counter() - started
            speed = {"clips_per_s": (step - first_step) * recipe.batch / spent,
                     "waiting": waited / spent}
            print0(log_line(step, recipe, means, chance, lr, speed))
            run.log({"step": step, **means, "chance": chance, "lr": lr, **speed})
        if validate_now:
            metrics = validate(model, data, settings)
            score = step                        # without a val split the last is the best
            if metrics:
                score = metrics[data.benchmark.metric]
                print0(f"validation at step {step}: {format_metrics(metrics)}")
            run.log({"step": step, "val": metrics})
            if score > best:
                best = score
                run.save("best.pt", model, data, step=step)
        if log_now or validate_now:
            run.save("last.pt", model, data, step=step, best=best, bad=list(bad.seen),
                     optimizer=optimizer.state_dict())
    bar.close()
    stop.release()
    if step < recipe.steps or stop.asked:
        run.save("last.pt", model, data, step=step, best=best, bad=list(bad.seen),
                 optimizer=optimizer.state_dict())
        sys.exit(f"train.py: stopped at step {step}; go on with the same flags, --resume and --out "
                 f"{shlex.quote(run.folder)}")


def wrap(losses, args, data, device):
    """Wrap the losses in torch.compile and DistributedDataParallel, where asked for."""
    if args.compile:
        losses = torch.compile(losses)
    if WORLD > 1:
        # Contrast alone leaves the pooler, and time=0 the time embeddings, without gradients.
        unused = data.benchmark.task == "retrieval" or not data.config.time
        devices = [device] if device.type == "cuda" else None
        losses = nn.parallel.DistributedDataParallel(losses, devices,
                                                     find_unused_parameters=unused)
    return losses


def seed_step(seed, step):
    """All randomness of a step depends on these numbers: nothing to store for --resume."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, RANK)).generate_state(1)[0]))


def log_line(step, recipe, means, chance, lr, speed):
    """The printed line of a step: each loss with the loss of a guess, then lr and speed. The speed
    counts the time of validation too."""
    parts = [f"step {step:5d}/{recipe.steps}"]
    for name, loss in means.items():
        parts.append(f"{name} {loss:.3f} (chance {chance[name]:.3f})")
    left = (recipe.steps - step) * recipe.batch / speed["clips_per_s"]
    parts += [f"lr {lr:.1e}", f"{speed['clips_per_s']:.0f} clips/s",
              f"waiting for data {speed['waiting']:.0%}", f"{left:.0f} s left"]
    return " | ".join(parts)


def validate(model, data, settings):
    """The metrics of the validation set; of several, the mean."""
    sums = {}
    for dataset, benchmark in zip(data.val, data.benchmarks):
        metrics, _ = evaluate(model, dataset, benchmark, data.answers, settings)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value / len(data.val)
    return sums


def test(run, data, settings, device):
    """The test figures, once, of the checkpoint that was best on validation; without a test split
    those of val."""
    wait_for_all()                              # the first process may still be writing it
    model, checkpoint = load_model(run.path("best.pt"))
    model.to(device)
    figures = {}
    for name, folder in zip(data.names, data.folders):
        if not has_split(folder, "test") and not has_split(folder, "val"):
            continue
        metrics, table, _ = evaluate_folder(model, checkpoint, folder, None, settings)
        key = folder if name in figures else name           # two folders may have one name
        figures[key] = {"metrics": metrics, "table": table}
    if RANK == 0:
        write_file(run.path("test.json"), json.dumps(figures, indent=1, allow_nan=False))
    return figures


# ---- python train.py -----------------------------------------------------------------------------


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--task", choices=BENCHMARK_OF, help="what to train (default: what --data is for)")
    add("--data", metavar="FOLDER", help="a prepared folder; for pre-training several, with "
         "commas (default: the toy world, made in data/toy)")
    add("--tokenizer", metavar="FILE", help="tokenizer.json, vocab.txt or hub name (default: that "
         "of --init, else tokenizer.json in --data)")
    add("--workers", type=int, default=default_workers(), help="processes that read clips, for "
         "each process of torchrun (here %(default)s)")
    add = parser.add_argument_group("model").add_argument
    add("--size", choices=SIZES, help="default: that of --init, else toy")
    add("--init", metavar="RUN", help="a run folder or a checkpoint to start from (default: "
        "random weights)")
    add("--frames", type=int, help="T, frames of a clip (default: the recipe's)")
    add("--roll", choices=("spread", "block", "none"), help="which tokens roll (default: "
        "that of --init, else spread)")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other fields of the model: "
        + ", ".join(SETTABLE))
    add = parser.add_argument_group("recipe").add_argument
    add("--steps", type=int, help="optimiser steps")
    add("--batch", type=int, help="clips per step, over all processes and micro-batches")
    add("--accum", type=int, default=1, help="micro-batches per step (default 1)")
    add("--lr", type=float, help="peak learning rate")
    add("--vtm", action="store_true", help="retrieval: add the rank and the matching loss")
    add("--contrast", action="store_true", help="pre-training: add the contrastive loss")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="FOLDER", help="run folder (default: runs/NAME-SIZE-ROLL-sSEED; "
        "SIZE is init with --init; values of --set come before the seed)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--seed", type=int, default=0, help="of weights, order and frames (default 0)")
    add("--amp", action="store_true", help="bfloat16 (default: float32)")
    add("--compile", action="store_true", help="torch.compile the losses")
    return parser.parse_args()


def check_flags(args):
    """What can be wrong before any data is read."""
    check_positive(args, "steps", "batch", "accum", "lr", "frames")
    check_workers(args.workers)
    if not 0 <= args.seed < 2 ** 32:
        raise UserError(f"--seed {args.seed}: must be from 0 to 2^32 - 1")
    parse_set(args.set)
    if args.compile and not any(shutil.which(name) for name in ("cc", "gcc", "clang", "cl")):
        raise UserError("--compile needs a C compiler, and none is installed; leave it out")


def main():
    args = arguments()
    check_flags(args)
    device = pick_device(None)                  # CUDA_VISIBLE_DEVICES= trains on the CPU
    join_processes(device)
    init = load_run(args.init) if args.init else None
    data = Data(args, init)
    if data.toy:
        torch.set_num_threads(1)                # its matrices are too small to split over threads
    recipe = make_recipe(args, data)
    model = make_model(args, init, data).to(device)
    frames = max(part.spec.frames for part in data.train.parts)
    print0(f"model: {count_parameters(model) / 1e6:.2f} M parameters, T {frames}, roll "
           f"{data.config.roll} {data.config.fraction:g}, on {device}")
    optimizer = make_optimizer(model, recipe)
    run = RunFolder(args.out or default_folder(args, data), run_settings(args, data, recipe),
                    args.resume)
    # No larger batch than a micro-batch of training, as memory may be short.
    micro_batch = recipe.batch // (args.accum * WORLD)
    settings = EvalSettings(min(micro_batch, 64), args.workers, args.amp, allow_missing=True)
    start = time.perf_counter()
    loop(args, data, recipe, model, optimizer, run, settings)
    figures = test(run, data, settings, device)
    flags = "" if figures else " --split train"
    print0(f"{time.perf_counter() - start:.0f} s; next: python eval.py {shlex.quote(run.folder)}"
           f"{flags}")
    if dist.is_initialized():
        dist.destroy_process_group()


def default_folder(args, data):
    parts = ["+".join(data.names), args.size or ("init" if args.init else "toy"), data.config.roll]
    parts += [pair.replace("=", "") for pair in args.set]
    return "runs/" + "-".join([*parts, f"s{args.seed}"])


if __name__ == "__main__":
    run_main("train.py", main)
