"""Evaluation: every benchmark by its own protocol, and questions about your own video.

    python eval.py runs/msrvtt-qa/best.pt                                        the test figure of a training run
    python eval.py runs/msrvtt-qa/best.pt --video clip.mp4 --ask "what shape is it?"
    python eval.py --list                                                        the benchmarks
"""
import argparse
import json
import math
import os
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from allinone import AllInOne, Config, UserError, read_weights
from data import (BENCHMARKS, Clips, MissingMedia, Mixed, Recipe, Words, collate, find_media, frame_indices, has_split,
                  load_split, loader, opens, read_frames)

# ---- metrics: pure functions ----------------------------------------------------------------------------------------

def ranks(scores, target):
    """1-based rank of column target[i] in row i of scores (Q, C), higher is better. Ties are averaged: a constant score
    gives the rank of chance, (C + 1) / 2, not a perfect one."""
    own = scores[np.arange(len(scores)), target][:, None]
    return 1 + (~(scores <= own)).sum(1) + (np.maximum((scores == own).sum(1), 1) - 1) / 2      # a NaN ranks last


def recall_metrics(rank):
    """Ranks (Q,) -> R@1, R@5, R@10 (shares of 1), median and mean rank."""
    return {**{f"R@{k}": float((rank <= k).mean()) for k in (1, 5, 10)},
            "MedR": float(np.median(rank)), "MeanR": float(rank.mean())}


def accuracy(records):
    """Share of records that are right; what cannot be answered (out of the list, missing clip) counts as wrong."""
    return sum(r["correct"] for r in records) / max(1, len(records))


def released_accuracy(records):
    """The released code's figure for open-ended questions: answers outside the list are left out of the count."""
    return accuracy([r for r in records if r["known"]])


def joint_accuracy(records):
    """VCR's Q->AR: answer and rationale of the same question both right."""
    both = defaultdict(list)
    for r in records:
        both[r["id"].rsplit("/", 1)[0]].append(r["correct"])
    return sum(len(rows) == 2 and all(rows) for rows in both.values()) / max(1, len(both))


# ---- the model on one batch -----------------------------------------------------------------------------------------

NEEDS = {"vqa": ("answer",), "action": ("probe",), "retrieval": ("contrast",), "pretrain": ("mlm",),
         "choice": ("choice", "rank", "matching"), "vcr": ("choice", "rank", "matching")}   # heads that will do, the best first


def scores(model, task, batch):
    """Answer scores of a batch: (B, A) over the answer list (vqa, action) or over the options (choice, vcr).
    Frames are embedded once for all options. A model without a choice head scores zero-shot by matching."""
    frames, words, keep = batch["frames"], batch["words"], batch["keep"]
    if frames.dim() == 6:                                   # (B, views, T, ...): the mean score of the views
        views = [scores(model, task, {**batch, "frames": frames[:, v]}) for v in range(frames.shape[1])]
        return torch.stack(views).mean(0)
    video = model.embed_frames(frames)
    if task in ("choice", "vcr"):
        B, A, L = words.shape
        pooled = model.fuse(video.repeat_interleave(A, 0), words.flatten(0, 1), keep.flatten(0, 1), first=1).pooled
        head = next(name for name in NEEDS[task] if name in model.heads)
        return model.heads[head](pooled)[:, -1].view(B, A)
    return model.heads["probe" if task == "action" else "answer"](model.fuse(video, words, keep, first=1).pooled)


def embeddings(model, batch):
    """Unit vectors of a batch's texts and clips, (B, E) each; views of a clip are averaged."""
    frames = batch["frames"]
    views = [model.encode_video(f) for f in (frames.unbind(1) if frames.dim() == 6 else [frames])]
    video = torch.stack([F.normalize(v, dim=-1) for v in views]).mean(0)
    return F.normalize(model.encode_text(batch["words"], batch["keep"]), dim=-1), F.normalize(video, dim=-1)


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


# ---- several processes ----------------------------------------------------------------------------------------------

def from_all(thing):
    """[the first process's thing, the second's, ...], the same list on all of them."""
    things = [thing]
    if dist.is_initialized():
        things = [None] * dist.get_world_size()
        dist.all_gather_object(things, thing)
    return things


def from_first(make):
    """make() on the first process alone: what it returns is returned by all, its UserError raised by all."""
    box = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            box = [make()]
        except UserError as error:
            box = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


# ---- a whole split --------------------------------------------------------------------------------------------------

def run_split(model, clips, step, batch=64, workers=0, amp=False):
    """step(model, batch) -> {name: tensor (B, ...)} over every example, in fixed batches, each on one process.
    -> (list by index of {name: row} or None where the clip cannot be read, {index: error})."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    groups = clips.groups if isinstance(clips, Mixed) else [np.arange(len(clips))]
    batches = [[(None, int(i)) for i in g[s:s + batch]] for g in groups for s in range(0, len(g), batch)][rank::world]
    words = (clips.parts[0] if isinstance(clips, Mixed) else clips).recipe.words
    training = model.training
    model.eval()
    rows, errors = {}, {}
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for b in loader(clips, batches, workers, words.pad):
            errors |= b["errors"]
            if "frames" in b:
                out = {k: v.float().cpu() for k, v in step(model, to_device(b, device)).items()}
                for j, index in enumerate(b["index"].tolist()):
                    rows[index] = {k: v[j].clone() for k, v in out.items()}     # a view would be sent with its whole batch
    model.train(training)
    for more, causes in from_all((rows, errors)):
        rows, errors = rows | more, errors | causes
    return [rows.get(i) for i in range(len(clips))], errors


def evaluate(model, clips, allow_missing=False, **how):
    """Evaluate one split. -> (metrics {name: value}, the first being the one that counts; records, one per example:
    {"id", "kind", "prediction", "truth", "score", "correct", ...}).
    Raises UserError for clips that cannot be read, unless allow_missing: they then count as wrong."""
    task = (clips.parts[0] if isinstance(clips, Mixed) else clips).recipe.task
    rows, errors = run_split(model, clips, STEPS[task], **how)
    if errors and not allow_missing:
        index, cause = min(errors.items())
        raise UserError(f"{len(errors)} of {len(clips)} clips cannot be read, the first: {cause}; "
                        "mend them, or pass --allow-missing to count them as wrong")
    metrics, records = FINISH[task](partial(match_odds, model, clips, **how), clips, rows)
    return {**metrics, **({"missing": len(errors)} if errors else {})}, records


def answer_step(task):
    return lambda model, batch: {"logits": scores(model, task, batch)}


def finish_answers(judge, clips, rows):
    """Open-ended questions, actions, options: the best score against the truth."""
    recipe, records = clips.recipe, []
    names = list(recipe.answers)
    for example, row in zip(clips.examples, rows):
        labels = example.options or names
        truth = labels[example.answer] if isinstance(example.answer, int) else example.answer
        record = {"id": example.id, "kind": example.kind, "prediction": None, "truth": truth, "score": 0.0,
                  "correct": False, "known": bool(example.options) or truth in recipe.answers, "options": len(example.options), "top": []}
        if row is not None:
            share, best = row["logits"].softmax(0).topk(min(5, len(labels)))
            top = [(labels[i], round(p, 6)) for i, p in zip(best.tolist(), share.tolist())]
            # options may repeat a text, so indices decide
            right = best[0].item() == example.answer if isinstance(example.answer, int) else top[0][0] == truth
            record.update(prediction=top[0][0], score=top[0][1], correct=right, top=top)
        records.append(record)
    metrics = {"accuracy": accuracy(records)}
    if recipe.task == "vqa":
        metrics["accuracy, released (unknown answers left out)"] = released_accuracy(records)
    if recipe.task == "vcr":
        for kind in ("Q->A", "QA->R"):
            metrics[kind] = accuracy([r for r in records if r["kind"] == kind])
        metrics = {"Q->AR": joint_accuracy(records), **metrics}
    return metrics, records


def retrieval_step(model, batch):
    text, video = embeddings(model, batch)
    return {"text": text, "video": video}


def match_odds(model, clips, texts, videos, wanted, batch=64, **how):
    """The matching head's log odds (Q, C) that text q, that of example texts[q], belongs to the clip of example videos[c],
    where wanted (Q, C); NaN elsewhere. Each clip is decoded and embedded once, `batch` clips, then pairs, at a time."""
    tokens = [torch.tensor(clips.texts(clips.examples[i], None)["words"][0]) for i in texts]
    words = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    keep = torch.arange(words.shape[1]) < torch.tensor([len(t) for t in tokens])[:, None]

    def step(model, b):
        views = b["frames"].unbind(1) if b["frames"].dim() == 6 else [b["frames"]]
        odds = torch.full((len(views), len(views[0]), len(texts)), math.nan)
        for v, frames in enumerate(views):
            video = model.embed_frames(frames)
            for pairs in torch.from_numpy(wanted.T[b["index"].cpu().numpy()]).nonzero().split(batch):
                clip, text = pairs.T
                L = int(keep[text].sum(1).max())
                said = to_device({"words": words[text, :L], "keep": keep[text, :L]}, video.device)
                logits = model.heads["matching"](model.fuse(video[clip], **said, first=1).pooled).float().cpu()
                odds[v, clip, text] = logits[:, 1] - logits[:, 0]
        return {"odds": odds.mean(0)}

    part = Clips([clips.examples[i] for i in videos], clips.root, clips.recipe)
    rows, _ = run_split(model, part, step, batch, **how)
    return torch.stack([row["odds"] if row else torch.full((len(texts),), math.nan) for row in rows], 1).numpy()


def highest(scores, K):
    """(Q, C) bool: the K highest of each row; of equal ones the first."""
    return np.argsort(np.argsort(-scores, 1, kind="stable"), 1) < K


def reranked(scores, odds, K):
    """Scores (Q, C) whose K highest in each row are ordered by `odds` among themselves. The others stay, and stay below."""
    top = highest(scores, K)
    return np.where(top, scores.max(1, keepdims=True) + 1 + odds - np.where(top, odds, math.inf).min(1, keepdims=True), scores)


def finish_retrieval(judge, clips, rows):
    """Texts against clips by cosine, both directions. A clip that several texts describe counts once as a clip.
    With recipe.rerank the first K of each direction are then ordered by the matching head: these are the metrics, and
    recalls by cosine alone come last."""
    found = [i for i, row in enumerate(rows) if row is not None]
    if not found:
        raise UserError("not one clip of this split can be read; look at the first with eval.py --video")
    first = {}                                              # clip -> the first row that has it
    for i in found:
        first.setdefault(clips.examples[i].media, i)
    media, where = list(first), {m: j for j, m in enumerate(first)}
    text = torch.stack([rows[i]["text"] for i in found])
    video = torch.stack([rows[i]["video"] for i in first.values()])
    target = np.array([where[clips.examples[i].media] for i in found])

    def measure(by_text, by_clip):
        rank = np.full(len(rows), math.inf)                 # a missing clip is never found
        rank[found] = ranks(by_text, target)
        back = np.full(len({e.media for e in clips.examples}), math.inf)        # video to text: the best of its own texts
        np.minimum.at(back, target, ranks(by_clip[target], np.arange(len(found))))
        return rank, {**{f"text to video {k}": v for k, v in recall_metrics(rank).items()},
                      **{f"video to text {k}": v for k, v in recall_metrics(back).items()}}

    sims = best = (text @ video.T).numpy()
    rank, metrics = measure(sims, sims.T)
    if K := clips.recipe.rerank:
        odds = judge(found, list(first.values()), highest(sims, K) | highest(sims.T, K).T)
        alone = {f"{name} by cosine alone": v for name, v in metrics.items() if "R@" in name}
        best = reranked(sims, odds, K)
        rank, metrics = measure(best, reranked(sims.T, odds.T, K))
        metrics |= alone
    order, records = np.argsort(-best, 1)[:, :5], []
    line = {i: n for n, i in enumerate(found)}
    for i, example in enumerate(clips.examples):
        top = [(media[j], round(float(sims[line[i], j]), 6)) for j in order[line[i]]] if i in line else []
        records.append({"id": example.id, "kind": example.kind, "prediction": top[0][0] if top else None,
                        "truth": example.media, "score": float(rank[i]), "correct": bool(rank[i] <= 1), "rank": float(rank[i]), "top": top})
    return metrics, records


def pretrain_step(model, batch):
    """Per example: is the match judged rightly; how many masked words are filled in rightly, of how many."""
    video, words, keep = model.embed_frames(batch["frames"]), batch["words"], batch["keep"]
    match = model.heads["matching"](model.fuse(video, words[:, 0], keep[:, 0]).pooled).argmax(-1) == batch["target"]
    filled = model.heads["mlm"](model.fuse(video, words[:, 1], keep[:, 1]).text).argmax(-1)
    masked = batch["labels"] >= 0
    return {"match": match, "right": ((filled == batch["labels"]) & masked).sum(1), "masked": masked.sum(1)}


def finish_pretrain(judge, clips, rows):
    """Clips that cannot be read are matched wrongly; their masked words are unknown and not counted."""
    total = {k: sum(row[k].item() for row in rows if row is not None) for k in ("match", "right", "masked")}
    metrics = {"matching accuracy": total["match"] / max(1, len(rows)), "MLM accuracy": total["right"] / max(1, total["masked"])}
    return {"matching + MLM accuracy": sum(metrics.values()) / 2, **metrics}, []


STEPS = {"vqa": answer_step("vqa"), "action": answer_step("action"), "choice": answer_step("choice"), "vcr": answer_step("vcr"),
         "retrieval": retrieval_step, "pretrain": pretrain_step}
FINISH = {"vqa": finish_answers, "action": finish_answers, "choice": finish_answers, "vcr": finish_answers,
          "retrieval": finish_retrieval, "pretrain": finish_pretrain}


# ---- what is printed ------------------------------------------------------------------------------------------------

def survey(parts, roots, allow_missing=False, sample=200):
    """One line on a split: rows, clips listed, found, missing and unreadable. To open all would take too long: of the found
    ones every so manieth is opened, `sample` at most; training and evaluation count what else they meet.
    Raises UserError where more than 1 % are missing, or of those opened more than 1 % unreadable."""
    listed = sorted({(root, e.media) for part, root in zip(parts, roots) for e in part})
    found, missing = [], []
    for root, media in listed:
        try:
            found.append(find_media(root, media))
        except MissingMedia as error:
            missing.append(str(error))
    opened = found[::max(1, math.ceil(len(found) / sample))]
    unreadable = [f"{path} is empty or cannot be opened" for path in opened if not opens(path)]
    for bad, all, what in ((missing, listed, "clips are missing"), (unreadable, opened, "clips opened are unreadable")):
        if len(bad) > 0.01 * len(all) and not allow_missing:
            raise UserError(f"{len(bad)} of {len(all)} {what}, more than 1 %; the first: {bad[0]}; "
                            "mend this, or pass --allow-missing to go on without them")
    rows = [e for part in parts for e in part]
    majority = Counter(e.answer for e in rows if isinstance(e.answer, str)).most_common(1)
    return f"{len(rows)} rows; clips: {len(listed)} listed, {len(found)} found, {len(missing)} missing, {len(unreadable)} unreadable" \
        + f" (of {len(opened)} opened)" * (len(opened) < len(found)) \
        + "".join(f"; majority answer {answer!r} {n / len(rows):.1%}" for answer, n in majority)


def coverage(examples, answers):
    """The share of examples whose answer is in the closed list: no model with that list can be right more often."""
    answers = set(answers)
    return sum(e.answer in answers for e in examples) / max(1, len(examples))


def report(metrics, records, train, root, split="test", most=9):
    """The lines that end a run: metrics, and for questions the accuracy by kind, beside the chance of guessing among the
    training answers of that kind, the majority answer, and the ceiling of a model blind to the order of frames where
    the data folder states it (order_blind.json, {kind: share})."""
    lines = [f"{split}: " + ", ".join(f"{k} {v:g}" if k.endswith(("MedR", "MeanR", "missing")) else f"{k} {v:.2%}"
                                  for k, v in metrics.items())]
    if not records or "rank" in records[0]:
        return lines
    path = Path(root) / "order_blind.json"
    blind, rows, answers = json.loads(path.read_text()) if path.exists() else {}, defaultdict(list), defaultdict(Counter)
    for e in train:
        answers[e.kind][e.options[e.answer] if e.options else f"class {e.answer}" if isinstance(e.answer, int) else e.answer] += 1
    for r in records:
        rows[r["kind"]].append(r)
    shown = sorted(sorted(rows, key=lambda kind: -len(rows[kind]))[:most])
    lines.append(f"{'kind':16s} {'questions':>9s} {'accuracy':>9s} {'chance':>7s} {'majority':>9s} {'order-blind':>12s}")
    for kind in [*shown, "all"]:
        some = records if kind == "all" else rows[kind]
        mean = lambda value: sum(map(value, some)) / len(some)
        guess = mean(lambda r: 1 / (r["options"] or max(1, len(answers[r["kind"]]))))
        major = mean(lambda r: 1 / r["options"] if r["options"] else
                     bool(answers[r["kind"]]) and r["truth"] == answers[r["kind"]].most_common(1)[0][0])
        ceiling = f"{mean(lambda r: blind.get(r['kind'], 1.0)):12.1%}" if blind else f"{'-':>12s}"
        lines.append(f"{kind:16s} {len(some):9d} {accuracy(some):9.1%} {guess:7.1%} {major:9.1%} {ceiling}")
    return lines


def benchmark_table():
    """The lines of --list."""
    lines = [f"{'benchmark':16s} {'dataset':12s} {'task':10s} {'metric':22s} {'rows train / val / test':>25s} {'chance':>7s}  published"]
    for name, b in BENCHMARKS.items():
        rows = " / ".join("held out" if split not in b.splits and split == "val" else f"{b.rows[split]:,}" if b.rows.get(split) else "-"
                          for split in ("train", "val", "test"))
        lines.append(f"{name:16s} {b.dataset:12s} {b.task:10s} {b.metric:22s} {rows:>25s} "
                     f"{f'{b.chance:.1%}' if b.chance else '-':>7s}  {b.paper or '-'}")
    return lines


# ---- flags ----------------------------------------------------------------------------------------------------------

def check_numbers(args, positive, natural=()):
    """Flags that must be above 0, or 0 and above, where they are given."""
    for name in (*positive, *natural):
        value = getattr(args, name)
        if value is not None and (value < 0 or value == 0 and name in positive):
            raise UserError(f"--{name} {value}: a number {'above 0' if name in positive else 'from 0 on'} is needed")


def device_of(name=None):
    """The named device, or cuda where there is one, else cpu."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; here there is cpu"
                        + ", cuda" * torch.cuda.is_available()) from None


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def tokenizer_of(path):
    """The tokenizer that one of our checkpoints carries, or None."""
    return read_weights(path)[2].get("tokenizer") if path else None


def load_model(path, device="cpu", **changes):
    """A trained model out of a checkpoint -> (model, meta, words). It carries all that is needed: no flags."""
    source, tensors, meta = read_weights(path)
    if source != "ours" or "task" not in meta:
        raise UserError(f"{path} is no checkpoint of train.py but {source}; fine-tune it first: train.py --task ... --init {path}")
    model = AllInOne(replace(Config(**meta["config"]), **changes), meta["heads"])
    model.load_state_dict(tensors)
    return model.eval().to(device), meta, Words.from_json(meta["tokenizer"])


# ---- your own video -------------------------------------------------------------------------------------------------

def look(path, model):
    """T frames of a clip as evaluation sees them -> (frames (1, T, 3, R, R), the seconds they were taken at)."""
    seen = []

    def pick(times):
        indices = frame_indices(len(times), model.config.frames, "eval")
        seen.extend(times[i] for i in indices)
        return indices

    return read_frames(path, pick, model.config.image)[None], seen


@torch.inference_mode()
def ask(model, meta, words, path, question, options=()):
    """The lines that answer a question about a clip: the five best answers, or the options, with probabilities."""
    frames, seconds = look(path, model)
    task = "choice" if options else "vqa"
    wanted = "choice, rank or matching" if options else "answer"
    if not set(model.heads) & (set(wanted.replace(" or", ",").split(", ")) if options else {"answer"}):
        raise UserError(f"this checkpoint was trained for {meta['task']} and has no {wanted} head; "
                        f"train one: python train.py --task {task}")
    if options:
        texts = words.choices(question, options, "options" if question else "bare", model.config.words)
    else:
        texts = [words.sentence(question, model.config.words)]
    device = next(model.parameters()).device
    batch = collate([{"index": 0, "frames": frames[0], "words": texts, "target": 0}], words.pad)
    share = scores(model, task, to_device(batch, device))[0].softmax(0).cpu()
    names = options or meta["answers"]
    best = share.topk(min(5, len(names)))
    return [f"looked at {', '.join(f'{s:.2f}' for s in seconds)} s of {path}",
            *(f"{p:7.1%}  {names[i]}" for p, i in zip(best.values.tolist(), best.indices.tolist()))]


# ---- python eval.py -------------------------------------------------------------------------------------------------

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="best.pt of a run")
    parser.add_argument("--list", action="store_true", help="print the benchmarks and stop")
    data, own = parser.add_argument_group("evaluate a benchmark"), parser.add_argument_group("your own video")
    data.add_argument("--benchmark", choices=BENCHMARKS, help="default: that of the checkpoint")
    data.add_argument("--data", help="folder of the dataset, or a .jsonl (default: that of the checkpoint)")
    data.add_argument("--predictions", help="write one JSON line per test item: id, prediction, truth, score")
    data.add_argument("--views", type=int, help="sets of frames a clip, scores averaged (default: as trained)")
    data.add_argument("--rerank", type=int, metavar="K", help="retrieval: the matching head orders the first K anew (default: as trained)")
    data.add_argument("--batch", type=int, default=64, help="clips at a time (default 64)")
    data.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2), help="decoding processes (default %(default)s)")
    data.add_argument("--allow-missing", action="store_true", help="count clips that cannot be read as wrong")
    data.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    data.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    own.add_argument("--video", help="any file that PyAV opens, or a folder of pictures")
    own.add_argument("--ask", default="", help="a question about it")
    own.add_argument("--options", nargs="+", default=(), help="answers to choose from")
    return parser.parse_args()


def run(args):
    if args.list:
        return print("\n".join(benchmark_table()))
    if not args.checkpoint:
        raise UserError("no checkpoint given; train one with python train.py --task vqa, or see python eval.py --list")
    check_numbers(args, ("views", "batch"), ("workers", "rerank"))
    device = device_of(args.device)
    model, meta, words = load_model(args.checkpoint, device)
    if args.video:
        return print("\n".join(ask(model, meta, words, args.video, args.ask, args.options)))
    trained = dict(zip(meta["benchmarks"], meta["data"]))
    names, beside, said = [args.benchmark] if args.benchmark else list(trained), Path(meta["data"][0]).parent, []
    roots = args.data.split(",") if args.data else [trained.get(n, f"{beside}/{BENCHMARKS[n].dataset}") for n in names]
    if len(roots) != len(names):
        raise UserError(f"--data names {len(roots)} folders for the benchmarks {','.join(names)}; give one each, or --benchmark")
    if not args.data and str(beside) == "data/toy":
        from toy import write_world
        write_world(beside, [BENCHMARKS[name].dataset for name in names])
    for name, root in zip(names, roots):
        bench, K = BENCHMARKS[name], meta.get("rerank", 0) if args.rerank is None else args.rerank
        head = next((head for head in NEEDS[bench.task] if head in model.heads), None)
        lacks = (f"the {' or '.join(NEEDS[bench.task])} head" if head is None else "the matching head, for --rerank,"
                 if bench.task == "retrieval" and K and "matching" not in model.heads else "the classes"
                 if head == "probe" and name not in trained else None)
        if lacks:
            raise UserError(f"{name} needs {lacks} that {args.checkpoint}, trained for {','.join(trained)}, has not; fine-tune: "
                            f"python train.py --task {bench.task} --benchmark {name} --init {args.checkpoint}")
        split = "test" if has_split(name, root, "test") else "val"
        rows = load_split(name, root, split)
        train = load_split(name, root, "train") if bench.task in ("vqa", "action") else []
        recipe = Recipe(bench.task, words, bench.join, 1 if bench.still else model.config.frames, model.config.image,
                        model.config.words, {a: i for i, a in enumerate(meta["answers"])}, views=args.views or meta["views"], rerank=K)
        print(f"{name} {split}: {survey([rows], [root], args.allow_missing)}"
              + ("; zero-shot, by the matching head" if bench.task in ("choice", "vcr") and head != "choice" else ""))
        metrics, records = evaluate(model, Clips(rows, root, recipe), args.allow_missing, batch=args.batch,
                                    workers=args.workers, amp=args.amp)
        print("\n".join(report(metrics, records, train, root, split)))
        said += [json.dumps({k: r[k] for k in ("id", "prediction", "truth", "score")}) + "\n" for r in records]
    if args.predictions:
        Path(args.predictions).write_text("".join(said))


def main():
    try:
        run(arguments())
    except UserError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
