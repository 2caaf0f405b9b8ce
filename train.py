"""Train All-in-one: pre-training, and fine-tuning on each task. Without --data, on a toy world made on the spot.

    python train.py --task vqa                                  video questions on the toy world, a few minutes on a CPU
    python train.py --task vqa --data /data/msrvtt --size base --init all-in-one-base.ckpt --tokenizer bert-base-uncased
    torchrun --nproc_per_node=8 train.py --task pretrain ...    pre-training on 8 GPUs
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch: threads spinning while workers decode cost 2-3 x
import argparse
import contextlib
import io
import itertools
import json
import math
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from allinone import SIZES, AllInOne, Config, UserError, load_weights, millions, read_config, run_main, writing
from data import BENCHMARKS, Clips, Mixed, Order, Recipe, Words, answer_list, collate, has_split, load_split, loader
from eval import (by_kind, check_numbers, coverage, device_of, embeddings, evaluate, from_all, from_first, report,
                  roots_of, scores, survey, to_device, tokenizer_of)

# ---- tasks: their losses --------------------------------------------------------------------------------------------
# A loss is {name: (sum, unit)}: a sum over a micro-batch, and the name of what divides it, "rows" or "masked". The loop
# divides by the count over all micro-batches and processes, so the mean does not depend on how a batch was cut.

def answer_loss(task):
    def loss(model, batch):
        logits, target = scores(model, task, batch), batch["target"]
        return {task: (F.cross_entropy(logits.float(), target, reduction="sum", ignore_index=-1), "rows")}
    return loss


TEMPERATURE = 0.05                                          # of the cosines


def contrast(text, video):
    """Video-text contrast of unit vectors (B, E): cross-entropy over rows plus over columns of the cosines, as released
    (their sum). With --accum the negatives are those of one micro-batch: a smaller problem, not the same one.
    Differs: with several processes the negatives of all of them count."""
    (all_text, first), (all_video, _) = gathered(text), gathered(video)
    own = first + torch.arange(len(text), device=text.device)
    return {"contrast": (F.cross_entropy(text @ all_video.T / TEMPERATURE, own, reduction="sum")
                         + F.cross_entropy(video @ all_text.T / TEMPERATURE, own, reduction="sum"), "rows")}


def gathered(x):
    """(rows of all processes with gradients, where ours begin). Counts may differ: unreadable clips are left out."""
    if not dist.is_initialized():
        return x, 0
    sizes = from_all(len(x))
    parts = dist.nn.functional.all_gather(F.pad(x, (0, 0, 0, max(sizes) - len(x))))
    return torch.cat([part[:n] for part, n in zip(parts, sizes)]), sum(sizes[:dist.get_rank()])


def retrieval_loss(model, batch):
    """Contrast; with a matching head also matching: each pair, its text with a hard clip, its clip with a hard text,
    the mean of the three. Hard ones come out of one micro-batch of one process: --accum leaves fewer to draw from.
    Source: ALBEF (2107.07651, section 3.2); the released code has no matching loss in retrieval."""
    (text, video), real = embeddings(model, batch), batch["target"] >= 0        # see nothing()
    losses, words, keep, B = contrast(text[real], video[real]), batch["words"], batch["keep"], len(text)
    if "matching" in model.heads:
        same = (batch["index"][:, None] == batch["index"]) | (words[:, None] == words).all(-1)
        some, clips, texts = hard_negatives((text @ video.T).detach().float() / TEMPERATURE, same)
        every = torch.arange(B, device=some.device)
        clip_of, text_of = torch.cat([every, clips, some]), torch.cat([every, some, texts])
        frames = model.embed_frames(batch["frames"])[clip_of]
        match = model.heads["matching"](model.fuse(frames, words[text_of], keep[text_of], first=1).pooled)
        target = F.pad(torch.where(real, 1, -1), (0, 2 * len(some)))
        loss = F.cross_entropy(match.float(), target, reduction="sum", ignore_index=-1)
        losses["matching"] = loss / 3, "rows"
    return losses


def hard_negatives(sims, same):
    """Draw a clip for each text and a text for each clip, the likelier the more similar they are (softmax of sims).

    sims  (B, B) of texts with clips;  same (B, B) bool, symmetric: pairs that are of one clip, or whose texts are equal
    ->    rows (n,) that have a negative at all; for each a clip (n,) and a text (n,)
    """
    rows = (~same).any(1).nonzero()[:, 0]
    draw = lambda logits: logits.masked_fill(same, -math.inf)[rows].softmax(1).multinomial(1)[:, 0]
    return rows, draw(sims), draw(sims.T)


def pretrain_loss(model, batch):
    """Matching and masked words; both texts of a clip go through the model as one batch, the frames embedded once."""
    words, keep = batch["words"][:, :2], batch["keep"][:, :2]
    B, _, L = words.shape
    video = model.embed_frames(batch["frames"]).repeat_interleave(2, 0)
    out = model.fuse(video, words.flatten(0, 1), keep.flatten(0, 1), first=L)
    match = model.heads["matching"](out.pooled[::2])
    masked = batch["labels"] >= 0
    filled = model.heads["mlm"](out.text[1::2][masked])     # the vocabulary only where a word is masked
    losses = {"matching": (F.cross_entropy(match.float(), batch["target"], reduction="sum", ignore_index=-1), "rows"),
              "mlm": (F.cross_entropy(filled.float(), batch["labels"][masked], reduction="sum"), "masked")}
    if "contrast" in model.heads:
        both = embeddings(model, {**batch, "words": batch["words"][:, 2], "keep": batch["keep"][:, 2]})
        losses |= contrast(*(x[batch["target"] >= 0] for x in both))
    return losses


@dataclass(frozen=True)
class Task:
    benchmark: str                  # the default one
    heads: tuple
    loss: callable
    metric: str                     # the best checkpoint has the highest
    toy: tuple                      # lr, batch and clips seen in all, for the toy size, which starts from nothing
    lr: float = 1e-4                # published fine-tuning, for pre-trained models
    batch: int = 128
    epochs: int = 10


TASKS = {
    "vqa": Task("msrvtt-qa", ("answer",), answer_loss("vqa"), "accuracy", (6e-4, 16, 49_600)),
    "choice": Task("tgif-action", ("choice",), answer_loss("choice"), "accuracy", (6e-4, 8, 8_000)),
    "retrieval": Task("msrvtt", ("contrast",), retrieval_loss, "text to video R@1", (7e-4, 32, 30_000)),
    "vcr": Task("vcr", ("choice",), answer_loss("vcr"), "Q->AR", (6e-4, 8, 8_000)),
    "pretrain": Task("webvid", ("matching", "mlm"), pretrain_loss, "matching + MLM accuracy", (7e-4, 32, 16_000)),
    "action": Task("hmdb51", ("probe",), answer_loss("action"), "accuracy", (3e-2, 32, 16_000)),
}
HEAD_LR = 10                                                # heads of a pre-trained model learn so much faster; toy: 1


SETTABLE = {field.name: field.type for field in fields(Config)          # by --set; others have flags or follow the data
            if field.name not in ("frames", "roll", "words", "vocab", "answers")}


def lr_at(step, total, warmup=0.1):
    """The share of the peak learning rate at step 0, 1, ...: linear from 0 over the warm-up, then linear to 0."""
    up = max(1, round(warmup * total))
    return (step + 1) / up if step < up else max(0.0, (total - step) / max(1, total - up))


def parameter_groups(model, lr, head_lr):
    """AdamW's groups: no decay on biases, norms and single vectors; heads learn head_lr times faster."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((name.startswith("heads."), p.dim() > 1), []).append(p)
    return [{"params": params, "lr": lr * (head_lr if head else 1), "weight_decay": 0.01 if decay else 0.0}
            for (head, decay), params in groups.items()]


class Losses(nn.Module):
    """The task's losses as a forward pass, so that DistributedDataParallel and torch.compile can wrap it."""

    def __init__(self, model, task):
        super().__init__()
        self.model, self.loss = model, task.loss

    def forward(self, batch):
        return self.loss(self.model, batch)


def counts(batch):
    """How many rows of a batch can be right or wrong, and how many of its words are masked."""
    masked = int((batch["labels"] >= 0).sum()) if "labels" in batch else 0
    return {"rows": int((batch["target"] >= 0).sum()), "masked": masked}


def nothing(clips, pad):
    """A batch of one black clip that counts for nothing: no target, no masked word. It stands in for a batch of which
    not one clip can be read, because all processes must take the same steps."""
    clips = clips.parts[0] if isinstance(clips, Mixed) else clips
    item, (T, R) = clips.texts(clips.examples[0], None), (clips.recipe.T, clips.recipe.R)
    item |= {"index": 0, "target": None, "frames": torch.zeros(T, 3, R, R, dtype=torch.uint8)}
    return collate([item | {"labels": []} if "labels" in item else item], pad)


# ---- run folders ----------------------------------------------------------------------------------------------------

OTHERWISE = "choose another --out; a run that had begun goes on with --resume"       # where writing fails


def save(path, content):
    """Write beside, flush to the disk, rename: whatever happens, `path` is whole, the new one or the one before.
    content: a text, or what torch.save takes."""
    work, whole = Path(f"{path}.part"), io.BytesIO()        # through memory: torch.save to a full disk does not say so
    whole.write(content.encode()) if isinstance(content, str) else torch.save(content, whole)
    with writing(path, OTHERWISE):
        try:
            with open(work, "wb") as file:
                file.write(whole.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(work, path)
        except OSError:
            work.unlink(missing_ok=True)
            raise


def random_state(device):
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def open_run(out, settings, resume):
    """The run folder: made new, or for `resume` found with the same settings. -> the last checkpoint, or None where
    there is none yet. What was logged after it is forgotten: it will come again."""
    last, config, checkpoint = out / "last.pt", out / "config.json", None
    if resume:
        if not config.exists():
            raise UserError(f"--resume: {config} is not there; drop --resume to begin, "
                            "or name the run's folder with --out")
        before = json.loads(config.read_text())
        if different := [f"{k} was {before.get(k)}, now {v}" for k, v in settings.items() if before.get(k) != v]:
            raise UserError(f"--resume: another run than {out}: {'; '.join(different)}; "
                            "use the same flags, or another --out")
        checkpoint = torch.load(last, map_location="cpu", weights_only=True) if last.exists() else None
    else:
        with writing(out, OTHERWISE):
            if out.exists() and any(file.suffix != ".part" for file in out.iterdir()):
                raise UserError(f"{out} already holds a run; pass --resume to go on with it, or another --out")
            out.mkdir(parents=True, exist_ok=True)
        save(config, json.dumps(settings, indent=1))
    with writing(out / "metrics.jsonl", OTHERWISE), open(out / "metrics.jsonl", "ab") as log:
        log.truncate(min(log.tell(), checkpoint["logged"]) if checkpoint else 0)
    return checkpoint


# ---- python train.py ------------------------------------------------------------------------------------------------

def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data, model, optim, run = (parser.add_argument_group(g) for g in ("data", "model", "optimisation", "run"))
    toy = lambda i: ", ".join(f"{name} {task.toy[i]:g}" for name, task in TASKS.items())
    data.add_argument("--task", required=True, choices=TASKS)
    data.add_argument("--benchmark", metavar="NAME", help="out of eval.py --list; for pretrain several, with commas "
                      "(default: " + ", ".join(f"{task.benchmark} for {name}" for name, task in TASKS.items()) + ")")
    data.add_argument("--data", help="folder of the dataset as its owners distribute it, or a .jsonl; "
                      "one per benchmark, with commas (default: the toy world, made in data/toy)")
    data.add_argument("--tokenizer", help="tokenizer.json, vocab.txt or hub name (default: that of --init, else "
                      "tokenizer.json in or beside --data)")
    data.add_argument("--allow-missing", action="store_true", help="go on although clips are missing or unreadable")
    data.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2),
                      help="decoding processes, of each process of torchrun (here default %(default)s)")
    model.add_argument("--size", choices=SIZES, help="default: that of --init, else toy")
    model.add_argument("--frames", type=int, help="T, frames a clip (default: that of --init, else 3)")
    model.add_argument("--roll", choices=("spread", "block", "none"),
                       help="which tokens roll (default: that of --init, else spread)")
    model.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other fields of the model, such as "
                       f"fraction=0.125 time=0 (default: those of --init or --size); names: {', '.join(SETTABLE)}")
    model.add_argument("--init", metavar="FILE", help="weights to start from: ours, released All-in-one, "
                       "timm ViT or DeiT, Hugging Face ViLT (default: random)")
    optim.add_argument("--steps", type=int, help="optimiser steps (default: as many as --epochs makes)")
    optim.add_argument("--epochs", type=float, help="passes over the training split "
                       f"(default {Task.epochs}; toy size: until so many clips are seen: {toy(2)})")
    optim.add_argument("--batch", type=int, help="clips per optimiser step, over all processes "
                       f"(default {Task.batch}; toy size: {toy(1)})")
    optim.add_argument("--accum", type=int, default=1, help="micro-batches per process and step (default 1)")
    optim.add_argument("--lr", type=float, help=f"peak learning rate (default {Task.lr:g}; toy size: {toy(0)})")
    optim.add_argument("--contrast", action="store_true", help="pretrain: add the contrastive loss")
    optim.add_argument("--rerank", type=int, default=0, metavar="K", help="retrieval: add a matching loss with hard "
                       "negatives; its head orders the first K anew in evaluation (default 0: neither)")
    run.add_argument("--out", metavar="FOLDER", help="run folder (default runs/BENCHMARK-SIZE-ROLL-SET-sSEED)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--seed", type=int, default=0, help="of weights, order and frames (default 0)")
    run.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    run.add_argument("--amp", action="store_true", help="bfloat16 autocast (default: float32)")
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument("--checkpointing", action="store_true",
                     help="recompute blocks in backward: less memory, more time")
    run.add_argument("--views", type=int, default=1,
                     help="evaluation: sets of frames a clip, scores averaged (default 1)")
    return parser.parse_args(argv)


def overrides(pairs):
    """["fraction=0.125", "time=0"] -> {"fraction": 0.125, "time": False}, of the types of Config's fields."""
    changes = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        kind = SETTABLE.get(name)
        try:
            changes[name] = value = {"0": False, "1": True}[text] if kind is bool else kind(text)
            if kind is int and value < 1 or kind is float and not 0 <= value <= 1:
                raise ValueError
        except (TypeError, ValueError, KeyError):
            needed = {int: "a whole number above 0", float: "a number from 0 to 1", bool: "0 or 1"}
            raise UserError(f"--set {pair}: " + (f"{name} needs {needed[kind]}" if kind else
                            f"NAME=VALUE is needed, NAME one of {', '.join(SETTABLE)}")) from None
    return changes


def train(args):
    # -- what is asked for: the command line over the task's presets
    task, rank, world = TASKS[args.task], int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    check_numbers(args, ("steps", "epochs", "batch", "accum", "lr", "frames", "views"), ("workers", "seed", "rerank"))
    for flag, owner in (("contrast", "pretrain"), ("rerank", "retrieval")):
        if getattr(args, flag) and args.task != owner:
            raise UserError(f"--{flag} is for --task {owner}, not {args.task}; leave it out")
    if args.views > 1 and args.task == "pretrain":
        raise UserError(f"--views {args.views}: pretrain is no task of answering or finding; leave it out")
    device = device_of(f"cuda:{local}" if args.device in (None, "cuda") and torch.cuda.is_available() else args.device)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)                   # NCCL sends objects through the current one
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = print if rank == 0 else lambda *_, **__: None
    names = (args.benchmark or task.benchmark).split(",")
    if len(names) > 1 and args.task != "pretrain":
        raise UserError(f"--benchmark {args.benchmark}: only --task pretrain mixes several; choose one")
    for name in names:
        if name not in BENCHMARKS or BENCHMARKS[name].task != args.task:
            raise UserError(f"--benchmark {name}: --task {args.task} knows "
                            + ", ".join(n for n, b in BENCHMARKS.items() if b.task == args.task))
    size = args.size or (None if args.init else "toy")
    if size == "toy":
        torch.set_num_threads(1)                            # its products are too small to be shared out
    lr, batch, shown = task.toy if size == "toy" else (task.lr, task.batch, 0)
    lr, batch, head_lr = args.lr or lr, args.batch or batch, 1 if size == "toy" else HEAD_LR
    if batch % (world * args.accum):
        raise UserError(f"--batch {batch} cannot be cut into {world} processes x {args.accum} micro-batches "
                        "of equal size")

    # -- data
    bench, roots = BENCHMARKS[names[0]], roots_of(args.data, names)
    tested = all(has_split(name, root, "test") for name, root in zip(names, roots))
    wanted = ("train", "val", "test") if tested else ("train", "val")
    splits = {split: [load_split(name, root, split) for name, root in zip(names, roots)] for split in wanted}
    for split in splits:
        say(f"{split:5s} {survey(splits[split], roots, split, args.allow_missing)}")
    for name, root, rows in zip(names, roots, splits["val"]):
        if not has_split(name, root, "val"):
            say(f"{name}: val is a held-out slice of train: {len({e.media for e in rows})} clips")
    carried = None if args.tokenizer else tokenizer_of(args.init)
    beside = Path(roots[0]).parent if roots[0].endswith(".jsonl") else Path(roots[0])
    if not carried and not args.tokenizer and not (beside / "tokenizer.json").exists():
        raise UserError(f"no tokenizer: {beside}/tokenizer.json is not there; give --tokenizer vocab.txt, "
                        "a tokenizer.json or bert-base-uncased")
    words = Words.from_json(carried) if carried else Words.load(args.tokenizer or str(beside / "tokenizer.json"))
    answers = []
    if args.task == "vqa":
        answers = answer_list(splits["train"][0], bench.answers)
        listed = set(answers)
        known = [[e for e in splits["train"][0] if e.answer in listed]]
        final, unknown = wanted[-1], len(splits["train"][0]) - len(known[0])
        say(f"answers: {len(answers)}; they cover {coverage(splits[final][0], answers):.1%} of the {final} answers, "
            f"the ceiling; {unknown} training questions with other answers are left out")
        splits["train"] = known
    elif args.task == "action":
        answers = [f"class {i}" for i in range(1 + max(e.answer for parts in splits.values() for e in parts[0]))]

    # -- model
    heads = (*task.heads, *(("contrast",) if args.contrast else ()), *(("matching",) if args.rerank else ()))
    changes = {"vocab": len(words), "words": bench.length, "answers": len(answers),
               **{k: v for k, v in (("frames", args.frames), ("roll", args.roll)) if v}, **overrides(args.set)}
    torch.manual_seed(args.seed)
    try:
        if args.init and not args.size:
            config = read_config(args.init, **changes)
        else:                                               # of the checkpoint all that its weights were trained for
            kept = asdict(read_config(args.init)) if args.init else {}
            kept = {name: kept[name] for name in ("frames", "roll", "fraction", "roll_unimodal", "time") if kept}
            config = replace(SIZES[size], **{**kept, **changes})
        model = AllInOne(config, heads).to(device)
    except ValueError as error:                             # values of --set that do not go together
        raise UserError(str(error)) from None
    if args.init:
        say(f"{args.init}: {load_weights(model, args.init, answers)}")
    model.checkpointing = args.checkpointing
    if rank:                                                # the same weights everywhere, dropout of each one's own
        torch.manual_seed(args.seed + rank)
    if args.task == "action":                               # a linear probe: the backbone stays as it is
        for name, p in model.named_parameters():
            p.requires_grad = name.startswith("heads.")
        if not args.init:
            say("no --init: this is a linear probe of a random backbone")

    def clips_of(split):
        recipe = lambda b: Recipe(args.task, words, b.join, 1 if b.still else config.frames, config.image, config.words,
                                  {a: i for i, a in enumerate(answers)}, b.flip, args.views, args.rerank)
        parts = [Clips(e, root, recipe(BENCHMARKS[n]), args.seed) for e, root, n in zip(splits[split], roots, names)]
        return Mixed(parts) if len(parts) > 1 else parts[0]

    clips = {split: clips_of(split) for split in splits}
    groups = clips["train"].groups
    steps_per_epoch = Order(groups, batch, 1, args.seed).steps_per_epoch
    epochs = args.epochs or (shown / batch / steps_per_epoch if shown else task.epochs)
    total = args.steps or max(1, round(epochs * steps_per_epoch))

    # -- the run folder, and where it left off
    parts = "+".join(names), size or "init", config.roll, *(pair.replace("=", "") for pair in args.set), f"s{args.seed}"
    out = Path(args.out or "runs/" + "-".join(parts))
    settings = {"task": args.task, "benchmarks": names, "data": roots, **asdict(config), "init": args.init, "lr": lr,
                "batch": batch, "accum": args.accum, "processes": world, "device": device.type, "steps": total,
                "seed": args.seed, "contrast": args.contrast, "amp": args.amp, "views": args.views,
                "rerank": args.rerank, "tokenizer": f"crc32 {zlib.crc32(words.tokenizer.to_str().encode()):08x}"}
    last = from_first(lambda: open_run(out, settings, args.resume))
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, head_lr), betas=(0.9, 0.98), fused=True)
    peaks, first, best, bad = [group["lr"] for group in optimizer.param_groups], 0, -math.inf, {}
    if last:
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        first, best, bad = last["step"], last["best"], last["bad"]
        torch.set_rng_state(last["random"][rank]["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(last["random"][rank]["cuda"], device)
    if args.resume:
        say(f"resumed at step {first}")
    about = {"config": asdict(config), "heads": list(heads), "answers": answers, "task": args.task, "benchmarks": names,
             "data": roots, "tokenizer": words.tokenizer.to_str(), "views": args.views, "rerank": args.rerank}
    losses_of = Losses(model, task)
    losses_of = torch.compile(losses_of) if args.compile else losses_of
    if world > 1:                                           # contrast alone leaves the pooling without gradients
        unused = heads == ("contrast",) or not config.time
        losses_of = nn.parallel.DistributedDataParallel(losses_of, find_unused_parameters=unused)
    say(f"model: {millions(model):.2f} M parameters, {config.frames} frames, "
        f"roll {config.roll}, on {device}\n"
        f"batch: {batch // world // args.accum} micro x {args.accum} accum x {world} world = {batch} global; "
        f"{total} steps of which {steps_per_epoch} are an epoch; lr {lr:g}")

    # -- the loop
    order = Order(groups, batch, args.accum, args.seed, first, rank, world)
    batches = iter(loader(clips["train"], order, args.workers, words.pad))
    chance = {"vqa": len(answers), "action": len(answers), "choice": len(splits["train"][0][0].options), "vcr": 4,
              "matching": 2, "mlm": len(words), "contrast": (batch // args.accum) ** 2}        # contrast: two losses
    blank, examples = nothing(clips["train"], words.pad), list(itertools.chain(*splits["train"]))
    stop = []

    def stop_soon(number, _):                               # a scheduler wants the machine, or Ctrl-C: save, then end
        stop.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)                # a second Ctrl-C ends at once
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_soon)
    log, seen, waited, started = out / "metrics.jsonl", 0, 0.0, time.perf_counter()
    bar = tqdm(range(first, total), initial=first, total=total, disable=not (rank == 0 and sys.stderr.isatty()))
    tell = partial(say, flush=True) if bar.disable else bar.write               # not into the bar's line
    how = dict(workers=args.workers, amp=args.amp, allow_missing=args.allow_missing, batch=min(batch, 64))

    def note(line):
        if rank == 0:
            with writing(log, OTHERWISE), open(log, "a") as file:
                file.write(json.dumps(line) + "\n")

    model.train()
    for step in bar:
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * lr_at(step, total)
        begin = time.perf_counter()
        micro = [blank | next(batches) for _ in range(args.accum)]
        waited += time.perf_counter() - begin
        told = list(itertools.chain(*from_all([(b["errors"], counts(b)) for b in micro])))
        bad |= {i: cause for errors, _ in told for i, cause in errors.items()}
        if len(bad) > max(10, 0.01 * len(clips["train"])) and not args.allow_missing:
            raise UserError(f"{len(bad)} training rows have clips that cannot be read, more than 1 %; the last: "
                            f"{list(bad.values())[-1]}; mend them, or pass --allow-missing to train without them")
        count, sums = {unit: sum(some[unit] for _, some in told) for unit in ("rows", "masked")}, {}
        for i, b in enumerate(micro):
            b = to_device(b, device)
            quiet = losses_of.no_sync() if world > 1 and i + 1 < len(micro) else contextlib.nullcontext()
            with quiet:
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    losses = losses_of(b)
                losses = {name: value / max(1, count[unit]) for name, (value, unit) in losses.items()}
                (sum(losses.values()) * world).backward()                       # DistributedDataParallel takes the mean
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        told = from_all(({name: value.item() for name, value in sums.items()}, bool(stop)))
        sums, stopping = {name: sum(some[name] for some, _ in told) for name in sums}, any(flag for _, flag in told)
        if not math.isfinite(sum(sums.values()) + norm):
            ours = [i for b in micro for i in b["index"][b["target"] >= 0].tolist()]
            ids = [examples[i].id for some in from_all(ours) for i in some]
            parts = ", ".join(f"{k} {v:g}" for k, v in sums.items())
            raise UserError(f"step {step}: the loss is {sum(sums.values())} ({parts}; gradient {norm:g}); "
                            f"examples {', '.join(ids)}; lower --lr, or look at these clips")
        if count["rows"]:                                   # else --allow-missing, and not one clip can be read
            optimizer.step()
        optimizer.zero_grad()
        seen += batch
        due, ends = ((step + 1) % every == 0 or step + 1 == total for every in (max(1, total // 40), steps_per_epoch))
        if due:
            spent = time.perf_counter() - started
            line = {"step": step + 1, **sums, "lr": optimizer.param_groups[0]["lr"],
                    "clips_per_s": round(seen / spent, 1), "waiting": round(waited / spent, 3)}
            text = " | ".join([
                f"step {step + 1:5d}/{total}",
                *(f"{k} {v:.3f} (chance {math.log(chance[k]):.3f})" for k, v in sums.items()),
                f"lr {line['lr']:.1e}", f"{line['clips_per_s']:.0f} clips/s (waiting for data {line['waiting']:.0%})",
                f"eta {spent / (step + 1 - first) * (total - step - 1):.0f} s"])
            bar.set_postfix_str(text.split(" | ", 1)[1]) if not bar.disable else say(text, flush=True)
            note(line)
        if ends:
            metrics, _ = evaluate(model, clips["val"], **how)
            tell(f"validation at step {step + 1}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
            note({"step": step + 1, "val": metrics})
            if metrics[task.metric] > best:
                best = metrics[task.metric]
                if rank == 0:
                    save(out / "best.pt", {**about, "model": model.state_dict(), "step": step + 1, "val": metrics})
        if due or ends or stopping:
            states = from_all(random_state(device))
            if rank == 0:
                save(out / "last.pt", {**about, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                       "step": step + 1, "best": best, "bad": bad, "random": states,
                                       "logged": log.stat().st_size})
        if stopping:
            raise SystemExit(f"train.py: told to stop; {out}/last.pt is at step {step + 1}, "
                             f"go on with the same flags, --resume and --out {out}" if rank == 0 else 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))   # nothing is left to save
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if bad and rank == 0:
        say(f"{len(bad)} training rows were left out, their clips cannot be read: {out}/bad.txt")
        save(out / "bad.txt", "".join(f"{examples[i].id} {cause}\n" for i, cause in sorted(bad.items())))

    # -- the test figure, once, of the epoch that was best on validation
    if "test" in splits:
        stored = lambda: torch.load(out / "best.pt", map_location="cpu", weights_only=True)["model"]
        model.load_state_dict(from_first(stored))
        metrics, records = evaluate(model, clips["test"], **how)
        if rank == 0:
            table = by_kind(records, splits["train"][0], roots[0])
            save(out / "test.json", json.dumps({**metrics, "kinds": table}))
            say("\n".join(report(metrics, table)))
    else:
        say("no test rows here: the validation figure is the last")
    say(f"{time.perf_counter() - started:.0f} s; next: python eval.py {out}/best.pt")
    if world > 1:
        dist.destroy_process_group()


def heard_once():
    """train(args). Where several processes make the same mistake, only the first of the node says it; the others wait
    until torchrun ends them."""
    try:
        train(arguments())
    except UserError:
        if int(os.environ.get("LOCAL_RANK", 0)):
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
            time.sleep(10)
        raise


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # until the loop takes over: nothing is left half written
    run_main("train.py", heard_once)


if __name__ == "__main__":
    main()
