"""Evaluation: every benchmark by its own protocol, and questions about your own video.

    python eval.py RUN/best.pt                                           the test figure of a training run
    python eval.py RUN/best.pt --report page.html                        and one page about it
    python eval.py RUN/best.pt --video clip.mp4 --ask "what shape is it?"
    python eval.py RUN/best.pt --search "a red ring" --videos FOLDER     the clips nearest to a text
    python eval.py --list                                                the benchmarks
    python eval.py --compare RUN...                                      a table over seeds
    python eval.py --plot RUN...                                         curves of loss and validation
"""
import argparse
import base64
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from allinone import AllInOne, UserError, millions, read_config, read_weights, run_main, writing
from data import (BENCHMARKS, MEDIA, Clips, MissingMedia, Recipe, Words, collate, encode_picture, find_media,
                  frame_indices, has_split, load_split, loader, opens, read_frames)
from rolling import FRAMES, LINE, SOFT, box, label, roll_groups, roll_tokens, svg
from toy import write_world

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
         "choice": ("choice", "rank", "matching"), "vcr": ("choice", "rank", "matching")}   # any will do, best first


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
        return model.heads[head](pooled)[:, -1].view(B, A).masked_fill(~keep.any(-1), -math.inf)    # some have fewer
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
    batches = [[(None, int(i)) for i in g[s:s + batch]]
               for g in clips.groups for s in range(0, len(g), batch)][rank::world]
    training = model.training
    model.eval()
    rows, errors = {}, {}
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for b in loader(clips, batches, workers, clips.recipe.words.pad):
            errors |= b["errors"]
            if "frames" in b:
                out = {k: v.float().cpu() for k, v in step(model, to_device(b, device)).items()}
                for j, index in enumerate(b["index"].tolist()):
                    rows[index] = {k: v[j].clone() for k, v in out.items()}     # a view would send its whole batch
    model.train(training)
    for more, causes in from_all((rows, errors)):
        rows, errors = rows | more, errors | causes
    return [rows.get(i) for i in range(len(clips))], errors


def evaluate(model, clips, allow_missing=False, **how):
    """Evaluate one split. -> (metrics {name: value}, the first being the one that counts; records, one per example:
    {"id", "kind", "prediction", "truth", "score", "correct", ...}).
    Raises UserError for clips that cannot be read, unless allow_missing: they then count as wrong."""
    task = clips.recipe.task
    rows, errors = run_split(model, clips, STEPS[task], **how)
    if errors and not allow_missing:
        index, cause = min(errors.items())
        raise UserError(f"{len(errors)} of {len(clips)} rows have a clip that cannot be read, the first: {cause}; "
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
                  "correct": False, "known": bool(example.options) or truth in recipe.answers,
                  "options": len(example.options), "top": []}
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
    """The matching head's log odds (Q, C) that the text of example texts[q] belongs to the clip of example videos[c],
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
    """Scores (Q, C), the K highest of each row ordered by `odds` among themselves. The others stay, and stay below."""
    top = highest(scores, K)
    least = np.where(top, odds, math.inf).min(1, keepdims=True)
    return np.where(top, scores.max(1, keepdims=True) + 1 + odds - least, scores)


def recalls(by_text, by_clip, target, texts, media):
    """Texts among clips and clips among texts. by_text (Q, C), by_clip (C, Q): scores, higher is better; target (Q,):
    each text's clip. texts >= Q, media >= C: how many there are with those that cannot be read, so are never found.
    -> (ranks of the Q texts, metrics)"""
    rank, back = ranks(by_text, target), np.full(media, math.inf)
    np.minimum.at(back, target, ranks(by_clip[target], np.arange(len(target))))            # the best of a clip's texts
    both = {"text to video": np.append(rank, np.full(texts - len(rank), math.inf)), "video to text": back}
    return rank, {f"{way} {k}": v for way, some in both.items() for k, v in recall_metrics(some).items()}


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
    measure = partial(recalls, target=target, texts=len(rows), media=len({e.media for e in clips.examples}))

    sims = best = (text @ video.T).numpy()
    rank, metrics = measure(sims, sims.T)
    if K := clips.recipe.rerank:
        odds = judge(found, list(first.values()), highest(sims, K) | highest(sims.T, K).T)
        alone = {f"{name} by cosine alone": v for name, v in metrics.items() if "R@" in name}
        best = reranked(sims, odds, K)
        rank, metrics = measure(best, reranked(sims.T, odds.T, K))
        metrics |= alone
    top = [[(media[j], round(float(sims[n, j]), 6)) for j in some[:5]] for n, some in enumerate(np.argsort(-best, 1))]
    told, records = dict(zip(found, zip(rank.tolist(), top))), []
    for i, example in enumerate(clips.examples):
        place, top = told.get(i, (math.inf, []))
        records.append({"id": example.id, "kind": example.kind, "prediction": top[0][0] if top else None,
                        "truth": example.media, "score": place, "correct": place <= 1, "rank": place, "top": top})
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
    metrics = {"matching accuracy": total["match"] / max(1, len(rows)),
               "MLM accuracy": total["right"] / max(1, total["masked"])}
    return {"matching + MLM accuracy": sum(metrics.values()) / 2, **metrics}, []


STEPS = {"vqa": answer_step("vqa"), "action": answer_step("action"), "choice": answer_step("choice"),
         "vcr": answer_step("vcr"), "retrieval": retrieval_step, "pretrain": pretrain_step}
FINISH = {"vqa": finish_answers, "action": finish_answers, "choice": finish_answers, "vcr": finish_answers,
          "retrieval": finish_retrieval, "pretrain": finish_pretrain}


# ---- what is printed ------------------------------------------------------------------------------------------------

def survey(parts, roots, split, allow_missing=False, sample=200):
    """One line on a split: rows, clips listed, found, missing and unreadable. To open all would take too long: of those
    found `sample` at most, evenly spaced, are opened; training and evaluation count what else they meet.
    Raises UserError where any are missing or unreadable; of "train" only where more than 1 % are."""
    listed = sorted({(root, e.media) for part, root in zip(parts, roots) for e in part})
    found, missing = [], []
    for root, media in listed:
        try:
            found.append(find_media(root, media))
        except MissingMedia as error:
            missing.append(str(error))
    opened = found[::max(1, math.ceil(len(found) / sample))]
    unreadable = [f"{path} is empty or cannot be opened" for path in opened if not opens(path)]
    share, limit, how = ((0.01, "more than 1 %", "to go on without them") if split == "train" else
                         (0, "and evaluation leaves none out", "to count them as wrong"))
    for bad, all, what in ((missing, listed, "clips are missing"), (unreadable, opened, "clips opened are unreadable")):
        if len(bad) > share * len(all) and not allow_missing:
            raise UserError(f"{len(bad)} of {len(all)} {what}, {limit}; the first: {bad[0]}; "
                            f"mend this, or pass --allow-missing {how}")
    rows = [e for part in parts for e in part]
    majority = Counter(e.answer for e in rows if isinstance(e.answer, str)).most_common(1)
    return (f"{len(rows)} rows; clips: {len(listed)} listed, {len(found)} found, {len(missing)} missing, "
            f"{len(unreadable)} unreadable" + f" (of {len(opened)} opened)" * (len(opened) < len(found))
            + "".join(f"; majority answer {answer!r} {n / len(rows):.1%}" for answer, n in majority))


def coverage(examples, answers):
    """The share of examples whose answer is in the closed list: no model with that list can be right more often."""
    answers = set(answers)
    return sum(e.answer in answers for e in examples) / max(1, len(examples))


def by_kind(records, train, root):
    """{kind: {questions, accuracy, chance, majority, order-blind}}, the most frequent kind first, "all" the last; in
    shares of 1. Chance and majority are those of the training answers of that kind (of all kinds, where it has none),
    None without training rows; order-blind is the ceiling of a model that does not see the order of frames, where the
    data folder states it (order_blind.json, {kind: share}), else None. Examples that have no question, and retrieval,
    whose accuracy is R@1: "all" alone."""
    if not records:
        return {}
    if "rank" in records[0]:
        chance = 1 / len({r["truth"] for r in records})
        return {"all": {"questions": len(records), "accuracy": accuracy(records), "chance": chance,
                        "majority": None, "order-blind": None}}
    path = Path(root) / "order_blind.json"
    blind = json.loads(path.read_text()) if path.exists() else {}
    rows, answers = defaultdict(list), defaultdict(Counter)
    for e in train:
        answer = e.options[e.answer] if e.options else f"class {e.answer}" if isinstance(e.answer, int) else e.answer
        answers[e.kind][answer] += 1
    total = sum(answers.values(), Counter())
    for r in records:
        rows[r["kind"]].append(r)
    known = {kind: answers.get(kind, total) for kind in rows}
    usual = {kind: max(known[kind], key=known[kind].get, default=None) for kind in rows}
    table = {}
    named = sorted((item for item in rows.items() if item[0]), key=lambda item: -len(item[1]))
    for kind, some in [*named, ("all", records)]:
        mean = lambda value: sum(map(value, some)) / len(some)
        baseline = lambda value: mean(value) if total or all(r["options"] for r in some) else None
        table[kind] = {
            "questions": len(some), "accuracy": accuracy(some),
            "chance": baseline(lambda r: 1 / (r["options"] or len(known[r["kind"]]))),
            "majority": baseline(lambda r: 1 / r["options"] if r["options"] else r["truth"] == usual[r["kind"]]),
            "order-blind": mean(lambda r: blind.get(r["kind"], 1.0)) if blind else None}
    return table


BASELINES = ("chance", "majority", "order-blind")


def baselines(kinds):
    """What the first metric is to be compared with, out of by_kind: {name: share or None}."""
    if {"Q->A", "QA->R"} <= kinds.keys():                   # Q->AR: both are to be right
        return dict.fromkeys(BASELINES) | {"chance": kinds["Q->A"]["chance"] * kinds["QA->R"]["chance"]}
    return {name: kinds["all"][name] if kinds else None for name in BASELINES}


def figure(name, value):
    return f"{name} {value:g}" if name.endswith(("MedR", "MeanR", "missing")) or value > 1 else f"{name} {value:.2%}"


def report(metrics, table, split="test", most=9):
    """The lines that end a run: metrics, and for questions the table of by_kind."""
    lines = [f"{split}: " + ", ".join(figure(k, v) for k, v in metrics.items())]
    if not table or len(table) == 1 and table["all"]["majority"] is None:
        return lines
    share = lambda value: "-" if value is None else f"{value:.1%}"
    lines.append("kind             questions  accuracy  chance  majority  order-blind")
    for kind in [*sorted([*table][:-1][:most]), "all"]:
        row = table[kind]
        lines.append(f"{kind:16s} {row['questions']:9d} {row['accuracy']:9.1%} {share(row['chance']):>7s} "
                     f"{share(row['majority']):>9s} {share(row['order-blind']):>12s}")
    return lines


def benchmark_table():
    """The lines of --list."""
    lines = [f"{'benchmark':16s} {'dataset':12s} {'task':10s} {'metric':22s} {'rows train / val / test':>29s} "
             f"{'chance':>7s}  published"]
    for name, b in BENCHMARKS.items():
        rows = " / ".join("held out" if split not in b.splits and split == "val" else
                          f"{b.rows[split]:,}" if b.rows.get(split) else "-" for split in ("train", "val", "test"))
        lines.append(f"{name:16s} {b.dataset:12s} {b.task:10s} {b.metric:22s} {rows:>29s} "
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


def roots_of(data, names, known=(), beside="data/toy"):
    """One data folder per benchmark: out of --data, or else the known one, or the one beside it. Those of the toy world
    are made if absent."""
    roots = data.split(",") if data else [dict(known).get(n, f"{beside}/{BENCHMARKS[n].dataset}") for n in names]
    if len(roots) != len(names):
        raise UserError(f"--data names {len(roots)} folders for the {len(names)} benchmarks {','.join(names)}; "
                        "give one each")
    if not data and str(beside) == "data/toy":
        with writing(beside):
            from_first(lambda: write_world(beside, dict.fromkeys(BENCHMARKS[name].dataset for name in names)))
    return roots


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def tokenizer_of(path):
    """The tokenizer that one of our checkpoints carries, or None."""
    return read_weights(path)[2].get("tokenizer") if path else None


def load_model(path, device="cpu"):
    """A trained model out of a checkpoint -> (model, meta, words). It carries all that is needed: no flags."""
    source, tensors, meta = read_weights(path)
    if source != "ours" or "task" not in meta:
        raise UserError(f"{path} is no checkpoint of train.py but {source}; "
                        f"fine-tune it first: train.py --task ... --init {path}")
    model = AllInOne(read_config(path), meta["heads"])
    model.load_state_dict(tensors)
    return model.eval().to(device), meta, Words.from_json(meta["tokenizer"])


# ---- your own video -------------------------------------------------------------------------------------------------

def look(path, model):
    """T frames of a clip as evaluation sees them -> (frames (1, T, 3, R, R), the seconds they were taken at; in a
    folder of pictures, which has no clock: their numbers from 0)."""
    seen = []

    def pick(times):
        indices = frame_indices(len(times), model.config.frames, "eval")
        seen.extend(times[i] for i in indices)
        return indices

    return read_frames(path, pick, model.config.image)[None], seen


def need_head(model, meta, names, task):
    """The first of these heads that the model has. Raises UserError, naming the command that trains one."""
    found = next((name for name in names if name in model.heads), None)
    if found is None:
        raise UserError(f"this checkpoint was trained for {meta['task']} and has no {', '.join(names[:-1])}"
                        f"{' or ' * (len(names) > 1)}{names[-1]} head; train one: python train.py --task {task}")
    return found


@torch.inference_mode()
def ask(model, meta, words, path, question, options=(), captions=()):
    """The lines that answer a question about a clip: the five best answers, or all options, with probabilities; or, for
    each of `captions`, the probability that it belongs to the clip. First the seconds, or of a folder of pictures the
    numbers, that were looked at."""
    task = "choice" if options else "vqa"
    need_head(model, meta, *(("matching",), "pretrain") if captions else (NEEDS[task], task))
    frames, seconds = look(path, model)
    if captions:
        texts = [words.sentence(text, model.config.words) for text in captions]
    elif options:
        join = BENCHMARKS[meta["benchmarks"][0]].join if question else "bare"
        texts = words.choices(question, options, join, model.config.words)
    else:
        texts = [words.sentence(question, model.config.words)]
    batch = collate([{"index": 0, "frames": frames[0], "words": texts, "target": 0}], words.pad)
    batch = to_device(batch, next(model.parameters()).device)
    if captions:
        text, keep = batch["words"].view(len(texts), -1), batch["keep"].view(len(texts), -1)
        video = model.embed_frames(batch["frames"]).expand(len(texts), -1, -1, -1)
        share = model.heads["matching"](model.fuse(video, text, keep, first=1).pooled).softmax(-1)[:, 1].cpu()
    else:
        share = scores(model, task, batch)[0].softmax(0).cpu()
    names = captions or options or meta["answers"]
    best = share.topk(len(names) if captions or options else min(5, len(names)))
    looked = f"pictures {', '.join(f'{s:.0f}' for s in seconds)}" if os.path.isdir(path) else \
        f"{', '.join(f'{s:.2f}' for s in seconds)} s"
    return [f"looked at {looked} of {path}",
            *(f"{p:7.1%}  {names[i]}" for p, i in zip(best.values.tolist(), best.indices.tolist()))]


@torch.inference_mode()
def search(model, meta, words, folder, text, checkpoint, most=10):
    """The lines that name the clips in a folder nearest to a text, by cosine, with the seconds that were looked at.

    Embeddings are kept in FOLDER.embeddings.npz: of files whose size and time stamp are as before, under a checkpoint
    whose bytes are. Files that cannot be read are named and left out.
    """
    need_head(model, meta, NEEDS["retrieval"], "retrieval")
    folder, device = Path(folder), next(model.parameters()).device
    files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.suffix.lower() in MEDIA and f.is_file())
    if not files:
        raise UserError(f"--videos {folder}: no clips in it; expected files in {' '.join(MEDIA)}")
    with open(checkpoint, "rb") as file:
        sign = hashlib.file_digest(file, "sha256").hexdigest()
    keep = folder.resolve().with_name(folder.resolve().name + ".embeddings.npz")
    known, lost = {}, []
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or not one of ours
        with np.load(keep, allow_pickle=False) as saved:
            if saved["checkpoint"] == sign:
                rows = zip(*(saved[name].tolist() for name in ("names", "stamps", "seconds")), saved["vectors"])
                known = {(name, *stamp): (seconds, vector) for name, stamp, seconds, vector in rows}
    found, read, kept = {}, 0, f"kept in {keep}"
    try:
        for name in tqdm(files, desc="reading", unit=" clips", disable=None):
            stat = (folder / name).stat()
            key = name, stat.st_size, stat.st_mtime_ns
            if key not in known:
                try:
                    frames, seconds = look(str(folder / name), model)
                except UserError as error:
                    lost.append(str(error))
                    continue
                vector = F.normalize(model.encode_video(frames.to(device))[0], dim=0)
                known[key], read = (seconds, vector.cpu().numpy()), read + 1
            found[key] = known[key]
        if not found:
            raise UserError(f"--videos {folder}: not one of {len(files)} clips can be read, the first: {lost[0]}")
    finally:                                                # also after Ctrl-C: what was read is kept
        if read:
            done = {name for name, *_ in found}
            known = found | {key: value for key, value in known.items() if key[0] in {*files} - done}
            (names, *stamps), (seconds, vectors) = zip(*known), zip(*known.values())
            try:
                with open(f"{keep}.part", "wb") as file:
                    np.savez(file, checkpoint=sign, names=names, stamps=np.array(stamps).T, seconds=seconds,
                             vectors=vectors)
                os.replace(f"{keep}.part", keep)
            except OSError as error:
                kept = f"not kept: {error}"
    (names, *_), (seconds, vectors) = zip(*found), zip(*found.values())
    query = model.encode_text(torch.tensor([words.sentence(text, model.config.words)], device=device))
    cosines = np.stack(vectors) @ F.normalize(query[0], dim=0).cpu().numpy()
    return [*(f"cannot be read: {line}" for line in lost),
            f"{len(found)} clips, {read} read now; embeddings {kept}",
            *(f"{cosines[i]:7.3f}  {names[i]}  ({', '.join(f'{s:.2f}' for s in seconds[i])} s)"
              for i in np.argsort(-cosines, kind="stable")[:most])]


# ---- run folders: curves and tables ---------------------------------------------------------------------------------

def read_run(folder):
    """(config, [log line], test figures or None) of a run folder."""
    folder = Path(folder)
    try:
        config, test = json.loads((folder / "config.json").read_text()), folder / "test.json"
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return config, log, json.loads(test.read_text()) if test.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no run of train.py: {error}") from None


def ticks(top):
    """Round numbers from 0 on, at most six, the last at or above top."""
    unit = 10 ** math.floor(math.log10(top))
    step = next(unit * k for k in (0.2, 0.5, 1, 2) if unit * k * 5 >= top)
    return [i * step for i in range(math.ceil(round(top / step, 9)) + 1)]


def panel(y, title, unit, series, levels, end, height=170, width=440, left=70):
    """Curves {name: [(step, value)]}, dotted levels {name: (value, color)}, from step 0 to end, axes and a legend."""
    marks = ticks(max([v for points in series.values() for _, v in points] + [v for v, _ in levels.values()] + [1e-9]))
    px, py = lambda step: left + width * step / end, lambda value: y + height * (1 - value / marks[-1])
    parts, names = [label(left, y - 14, title, weight=600)], {}
    for value in marks:
        parts += [box(left, py(value), width, 1, LINE),
                  label(left - 8, py(value) + 4, f"{value:g}{unit}", SOFT, "end", 12)]
    for step in ticks(end):
        if step <= end:
            parts.append(label(px(step), y + height + 18, f"{step:g}", SOFT, "middle", 12))
    for color, (name, points) in zip(FRAMES, series.items()):
        line = " ".join(f"{px(step):.1f},{py(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        if len(points) < 20:
            parts += [f'<circle cx="{px(s):.1f}" cy="{py(v):.1f}" r="3" fill="{color}"/>' for s, v in points]
        names[name] = color, ""
    for name, (value, color) in levels.items():
        dash = ' stroke-dasharray="2 4"'
        parts.append(f'<path d="M{left} {py(value):.1f}h{width}" stroke="{color}" stroke-width="1.5"{dash}/>')
        names[f"{name} {value:.3g}{unit}"] = color, dash
    for i, (name, (color, dash)) in enumerate(names.items()):
        at = left + width + 20, y + 8 + 20 * i
        parts += [f'<path d="M{at[0]} {at[1]}h20" stroke="{color}" stroke-width="2"{dash}/>',
                  label(at[0] + 27, at[1] + 4, name)]
    return parts


def curves(folder):
    """SVG of a run: training losses with that of a guess (ln of the number of choices), and validation in percent with
    the chance and the order-blind ceiling of the test, where they are known."""
    config, log, test = read_run(folder)
    known = baselines(test["kinds"] if test else {})
    choices = {"vqa": config["answers"], "action": config["answers"], "vcr": 4, "matching": 2, "mlm": config["vocab"],
               "contrast": (config["batch"] // config["accum"]) ** 2,                     # both directions
               "choice": 1 / known["chance"] if known["chance"] else None}
    train, val = [line for line in log if "val" not in line], [line for line in log if "val" in line]
    if not train:
        raise UserError(f"{folder}/metrics.jsonl has no line yet; let train.py run on")
    losses = {name: [(line["step"], line[name]) for line in train] for name in choices if name in train[0]}
    guess = {f"{name}, a guess": (math.log(choices[name]), color)
             for name, color in zip(losses, FRAMES) if choices[name]}
    shares = {}
    for name in val[0]["val"] if val else ():
        if not name.endswith(("missing", "MedR", "MeanR")) and len(shares) < 3:
            points = [(line["step"], 100 * line["val"][name]) for line in val]
            shares |= {name: points} if points not in shares.values() else {}
    levels = {f"{name}, test": (100 * known[name], color)
              for name, color in (("chance", SOFT), ("order-blind", "#b93a20")) if known[name]}
    end = log[-1]["step"]
    return svg(800, 560, label(24, 34, Path(folder).resolve().name, size=17, weight=600),
               *panel(86, "Training loss (nats)", "", losses, guess, end),
               *(panel(326, "Validation", " %", shares, levels, end) if shares else ()),
               label(290, 538, "optimiser step", SOFT, "middle", 12))


def compare(folders):
    """A Markdown table of the test figures of runs, mean and standard deviation over seeds: a row for each group of
    runs that differ in nothing else, with the settings that vary within a benchmark. Runs of one benchmark are told
    apart by kind of question, with baselines below; those of several by their first metric, with baselines beside."""
    groups, lines = {}, []
    for folder in sorted(map(str, folders)):
        config, _, test = read_run(folder)
        if test is None:
            lines.append(f"{folder} has no test.json yet and is left out")
            continue
        seed = config.pop("seed")
        config["init"] = config["init"] and re.sub(rf"\bs{seed}\b", "sSEED", config["init"])     # the run of its seed
        seeds = groups.setdefault(json.dumps(config, sort_keys=True), {})
        if seed in seeds:
            raise UserError(f"{folder}: another run of the same settings has seed {seed} too; leave one of them out")
        seeds[seed] = test
    if not groups:
        raise UserError("not one of these runs has a test.json; let train.py finish")
    configs, tests = [json.loads(text) for text in groups], [[*seeds.values()] for seeds in groups.values()]
    alike = defaultdict(list)
    for config in configs:
        alike[",".join(config["benchmarks"])].append(config)
    differ = lambda name: any(len({str(config.get(name)) for config in some}) > 1 for some in alike.values())
    varies, share = [name for name in configs[0] if differ(name)], lambda x: "-" if x is None else f"{100 * x:.1f}"

    def spread(values):
        return share(np.mean(values)) + (f" ± {share(np.std(values, ddof=1))}" if len(values) > 1 else "")

    def row(config, some, *figures):
        told = ["-" if config.get(name) is None else str(config[name]) for name in varies]
        return [*told, str(len(some)), *map(spread, figures)]

    first = [[next(iter(test.values())) for test in some] for some in tests]
    kinds = tests[0][0]["kinds"]
    if len(alike) > 1:                                      # a row each, its baselines beside
        heads = ["benchmark", *varies, "runs", "figure", "in %", *BASELINES, "published, of the real benchmark"]
        rows = []
        for config, some, values in zip(configs, tests, first):
            *told, figure = row(config, some, values)
            names, beside = config["benchmarks"], baselines(some[0]["kinds"])
            rows.append([",".join(names), *told, next(iter(some[0])), figure, *(share(beside[k]) for k in BASELINES),
                         BENCHMARKS[names[0]].paper or "-"])
        rows.sort(key=lambda cells: [*BENCHMARKS].index(cells[0].split(",")[0]))
    else:                                                   # the kinds of question side by side
        common = set.intersection(*(set(test["kinds"]) for some in tests for test in some))
        several = len(common) > 2 and "Q->A" not in common  # VCR's Q->AR is no kind
        shown = ["all", *sorted(common - {"all"})[:9]] if several else []
        heads, rows = [*varies, "runs", *(shown or [next(iter(tests[0][0]))])], []
        for config, some, values in zip(configs, tests, first):
            by = [[test["kinds"][kind]["accuracy"] for test in some] for kind in shown]
            rows.append(row(config, some, *(by or [values])))
        for name in ("chance", "order-blind"):
            below = [kinds[kind][name] for kind in shown] or [baselines(kinds)[name]]
            if None not in below:
                rows.append([*(name, *[""] * len(varies))[:len(varies) + 1], *map(share, below)])
    wide = [max(map(len, column)) for column in zip(heads, *rows)]
    line = lambda cells: "| " + " | ".join(cell.ljust(n) for cell, n in zip(cells, wide)) + " |"
    return [*lines, line(heads), line(["-" * n for n in wide]), *map(line, rows), "",
            "test figures in %, mean ± standard deviation over seeds"]


# ---- one page about an evaluation (--report) ------------------------------------------------------------------------
# What an example shows is collected here as data; PAGE, an HTML file as a string, draws it. It inserts text as text,
# never as HTML, and its content policy forbids it the network.

MOST, PIXELS, BYTES = 60, 15e6, 3e6     # examples in the gallery; pixels and bytes of attention in all, at most


def wilson(share, n, z=1.96):
    """The 95 % confidence interval (low, high) of a share seen in n independent trials."""
    middle, half = share + z * z / 2 / n, z * math.sqrt(share * (1 - share) / n + z * z / 4 / n / n)
    return [max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))]


def chosen(records, most):
    """Indices of at most so many records that have a prediction, spread evenly over kinds, right and wrong."""
    turn, taken = {}, Counter()
    for i in sorted(range(len(records)), key=lambda i: zlib.crc32(records[i]["id"].encode())):
        if records[i]["prediction"] is not None:
            group = records[i]["kind"], records[i]["correct"]
            turn[i], taken[group] = taken[group], taken[group] + 1
    return sorted(sorted(turn, key=turn.get)[:most])


@torch.inference_mode()
def gaze(model, frames, words):
    """Where each word looks: the attention from words to patches, mean of the heads.

    frames (T, 3, R, R), words (L,) token ids -> (layers, L, T, N - 1), shares of the word's attention in a frame. A
    rolled token is met in another frame than it comes from; here it is sent home, so that places are those of pictures.
    """
    maps, L, config = [], len(words), model.config
    model.fuse(model.embed_frames(frames[None]), words[None], maps=maps)        # without `first`: rows of all words
    groups, looks = roll_groups(config.grid, config.grid, config.fraction, config.roll), []
    for rolls, seen in enumerate(maps, 1):                                                  # (T, H, S, S)
        seen = seen.mean(1)[:, :L, L:].transpose(1, 2)[None].cpu()                          # (1, T, N, L)
        for _ in range(rolls):
            seen = roll_tokens(seen, *groups[::-1])
        looks.append(seen[0, :, 1:].permute(2, 0, 1))
    return torch.stack(looks)


def page(title, about, model, clips, metrics, records, table):
    """The HTML of an evaluation: its figures, and a gallery with the frames that the model saw.

    title: a line; about: more of them; metrics, records: of evaluate(model, clips); table: of by_kind. -> text
    """
    config, recipe, examples, device = model.config, clips.recipe, clips.examples, next(model.parameters()).device
    retrieval, pictures, numbers = recipe.task == "retrieval", [], {}
    where = {example.media: i for i, example in reversed([*enumerate(examples)])}

    @functools.lru_cache(8)
    def frames_of(i):
        frames = clips[None, i]["frames"]
        return frames[0] if frames.dim() == 5 else frames                       # the first view

    def picture(i, t):
        """The number of frame t of example i among the pictures; those of a clip that was shown before are shared."""
        example = examples[i]
        key = example.media, example.seconds, example.frames, example.boxes, t
        if key not in numbers:
            suffix = ".png" if recipe.R <= 64 else ".jpg"
            code = base64.b64encode(encode_picture(frames_of(i)[t].permute(1, 2, 0).numpy(), suffix)).decode()
            numbers[key] = len(pictures)
            pictures.append(f"data:image/{'png' if suffix == '.png' else 'jpeg'};base64,{code}")
        return numbers[key]

    most = int(min(MOST, PIXELS // ((recipe.T + 5 * retrieval) * recipe.R ** 2)))
    picks, said = chosen(records, most), {}
    for i in picks if not retrieval else ():                # what is read: with options, the one that was chosen
        texts = clips.texts(examples[i], None)["words"]
        said[i] = texts[examples[i].options.index(records[i]["prediction"]) if examples[i].options else 0]
    cost = config.layers * sum(map(len, said.values())) * recipe.T * config.grid ** 2
    layers, items = [*range(config.layers)][::-1][::math.ceil(cost / BYTES) or 1][::-1], []
    for i in picks:
        example, r = examples[i], records[i]
        item = {"id": r["id"], "kind": r["kind"], "right": r["correct"], "truth": str(r["truth"]), "top": r["top"],
                "text": example.captions[0] if retrieval else example.text, "known": r.get("known", True),
                "frames": [picture(i, t) for t in range(recipe.T)]}
        if retrieval:
            item["rank"], item["shown"] = r["rank"], [picture(where[media], recipe.T // 2) for media, _ in r["top"]]
        else:
            looks = gaze(model, frames_of(i).to(device), torch.tensor(said[i], device=device))[layers]
            looks = (255 * looks / looks.amax((2, 3), keepdim=True)).round().byte()
            item["words"] = [recipe.words.tokenizer.id_to_token(n) for n in said[i]]
            item["looks"] = base64.b64encode(looks.numpy().tobytes()).decode()
        items.append(item)

    trials = len(records) // (2 if recipe.task == "vcr" else 1)                 # Q->AR: two rows are one trial
    name, value = next(iter(metrics.items()))
    head = {"name": name, "value": value, "interval": wilson(value, trials) if trials else None}
    head |= baselines(table)
    groups = roll_groups(config.grid, config.grid, config.fraction, config.roll if recipe.T > 1 else "none")
    data = {"title": title, "about": about, "head": head, "total": len(records), "pictures": pictures, "items": items,
            "metrics": [figure(k, v) for k, v in metrics.items()],
            "kinds": [{"kind": kind, **row, "interval": wilson(row["accuracy"], row["questions"])}
                      for kind, row in [*[*table.items()][:-1][:12], *[*table.items()][-1:]]],
            "retrieval": retrieval, "grid": config.grid, "layers": [n + 1 for n in layers],
            "forward": (groups[0] - 1).tolist(), "backward": (groups[1] - 1).tolist()}
    return PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>All-in-one</title>
<style>
:root { color-scheme: light dark; --back: #f6f6f3; --card: #fff; --ink: #1d1f23; --soft: #666c74; --line: #dfdfda;
        --mark: #2563d9; --good: #157a4e; --bad: #b93a20; --on: #f08c00; --under: #12a5b8 }
@media (prefers-color-scheme: dark) { :root { --back: #121316; --card: #1b1d21; --ink: #e9eaec; --soft: #9aa1aa;
        --line: #31353b; --mark: #82abff; --good: #52c890; --bad: #ff8b72; --on: #ffb84d; --under: #5fd7e6 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 }
h2 { font-size: 1.05rem; margin: 2.5rem 0 .5rem }
p { margin: .3rem 0; max-width: 46rem }
.soft, small { color: var(--soft); font-size: .85rem }
.head { display: flex; flex-wrap: wrap; gap: .5rem 2.2rem; align-items: end; margin: 1.5rem 0 .5rem }
.head div { display: flex; flex-direction: column-reverse }
.head b { font-size: 1.3rem; line-height: 1.25; font-weight: 600 }
.head div:first-child b { font-size: 3rem; line-height: 1; letter-spacing: -.02em }
.kinds { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr auto auto; gap: .45rem .9rem;
         align-items: center; max-width: 46rem }
.kinds > :nth-child(4n), .kinds > :nth-child(4n + 3) { text-align: right }
.bar { position: relative; height: 1.05rem; background: var(--line); border-radius: 3px }
.bar i { position: absolute; top: 0; bottom: 0 }
.bar .fill { left: 0; background: var(--mark); border-radius: 3px; opacity: .8 }
.bar .span { top: 45%; bottom: 45%; background: var(--ink) }
.bar .chance, .bar .blind { top: -3px; bottom: -3px; width: 0; border-left: 2px dotted var(--ink) }
.bar .blind { border-left: 2px solid var(--bad) }
.tools { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .5rem .9rem; padding: .6rem 0;
         background: var(--back); border-bottom: 1px solid var(--line) }
.tools span, .tools label { display: inline-flex; align-items: center; gap: .3rem }
button, select, input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
                        border-radius: 6px; padding: .2rem .6rem }
button { cursor: pointer }
button[aria-pressed=true] { background: var(--ink); color: var(--back); border-color: var(--ink) }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 1px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem;
         margin-top: 1rem }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem; min-width: 0;
        overflow-wrap: anywhere }
.card[hidden] { display: none }
.card h3 { font-size: 1rem; line-height: 1.35; margin: .5rem 0 .2rem }
.frames { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(5.5rem, 100%), 1fr)); gap: 4px }
.frame { position: relative; max-width: 14rem }
.frame > * { display: block; width: 100%; aspect-ratio: 1; border-radius: 4px }
.frame canvas, .frame svg { position: absolute; inset: 0 }
.small img, canvas { image-rendering: pixelated }
.rolled path { stroke: #0009; stroke-width: .06 }
body:not(.rolls) .rolled { display: none }
.words button { font: .8rem ui-monospace, monospace; padding: .05rem .35rem; margin: 0 .2rem .2rem 0 }
.top { display: grid; grid-template-columns: 1fr 6rem 3.6rem; gap: .15rem .6rem; align-items: center;
       margin-top: .5rem }
.top.clips { grid-template-columns: 3rem 1fr 4rem 3.6rem }
.top img { width: 3rem; border-radius: 4px; display: block }
.top .bar { height: .55rem }
.top b { text-align: right; font-weight: 400 }
.true { color: var(--good); font-weight: 600 }
.verdict { font-weight: 600; color: var(--bad) }
.verdict.right { color: var(--good) }
</style>
<body>
<script id="data" type="application/json">DATA</script>
<script>
addEventListener("error", event => document.documentElement.dataset.error = event.message)
const data = JSON.parse(document.getElementById("data").textContent)
const percent = x => (100 * x).toFixed(1) + " %"
document.title = data.title
const state = () => new URLSearchParams(location.hash.slice(1))
const set = (name, value) => {
  const next = state()
  value ? next.set(name, value) : next.delete(name)
  location.replace("#" + next)
}
function make(tag, look, ...inside) {             // an element; strings become text, never HTML
  const element = document.createElement(tag)
  Object.assign(element, typeof look === "string" ? {className: look} : look)
  element.append(...inside)
  return element
}
function bar(share, row = {}) {
  const fill = make("i", "fill"), all = make("div", "bar", fill)
  fill.style.width = 100 * Math.min(1, Math.max(0, share)) + "%"
  if (row.interval) {
    const span = all.appendChild(make("i", {className: "span", title: "95 % interval"}))
    span.style.left = 100 * row.interval[0] + "%"
    span.style.right = 100 - 100 * row.interval[1] + "%"
  }
  for (const [name, value] of [["chance", row.chance], ["blind", row["order-blind"]]]) {
    if (value == null) continue
    all.appendChild(make("i", {className: name, title: name + " " + percent(value)})).style.left = 100 * value + "%"
  }
  return all
}

// the figures
const head = make("div", "head")
const figure = (value, name) => head.append(make("div", "", make("small", "", name), make("b", "", value)))
figure(percent(data.head.value), data.head.name)
if (data.head.interval)
  figure(data.head.interval.map(x => (100 * x).toFixed(1)).join(" to ") + " %", "95 % confidence interval")
for (const [key, more] of [["chance", ""], ["majority", " answer"], ["order-blind", " ceiling"]])
  if (data.head[key] != null) figure(percent(data.head[key]), key + more)
document.body.append(make("header", "", make("h1", "", data.title), make("p", "soft", data.about.join(" · "))), head,
                     make("p", "soft", data.metrics.slice(1).join(" · ")))
if (data.kinds.length > 1) {
  const kinds = make("div", "kinds")
  for (const row of data.kinds)
    kinds.append(make("span", "", row.kind), bar(row.accuracy, row), make("b", "", percent(row.accuracy)),
                 make("small", "", "of " + row.questions))
  document.body.append(make("h2", "", "Accuracy by kind"), kinds,
    make("p", "soft", "Across the end of a bar: its 95 % interval (Wilson; questions about one clip are not " +
      "independent, so it is a little too narrow). Dotted: chance." + (data.kinds[0]["order-blind"] == null ? "" :
      " Red: the most that a model blind to the order of frames can reach.")))
}

// the gallery
const cards = make("div", "cards"), count = make("span", {id: "count", className: "soft"})
for (const item of data.items) {
  const frames = make("div", "frames"), overlays = []
  for (const number of item.frames) {
    const frame = make("div", "frame", make("img", {src: data.pictures[number], alt: "a frame of the clip"}))
    overlays.push(frame.appendChild(make("canvas", {width: data.grid, height: data.grid})))
    if (!data.retrieval) frame.append(marks())
    frames.append(frame)
  }
  const verdict = make("span", "verdict" + (item.right ? " right" : ""), item.right ? "✓ right" : "✗ wrong")
  const about = [item.kind, item.id].filter(Boolean)
  if (data.retrieval) about.unshift("rank " + item.rank)
  else if (!item.right) about.unshift("truth: " + item.truth + (item.known ? "" : " (not in the answer list)"))
  const card = make("article", "card", frames, make("h3", "", item.text),
                    make("small", "", verdict, about.map(part => " · " + part).join("")))
  if (item.words) {
    const bytes = Uint8Array.from(atob(item.looks), c => c.charCodeAt(0)), row = make("div", "words")
    card.draw = layer => overlays.forEach((canvas, t) => {
      const pen = canvas.getContext("2d"), cells = data.grid ** 2
      const shade = pen.createImageData(data.grid, data.grid)
      const start = ((layer * item.words.length + card.word) * overlays.length + t) * cells
      for (let n = 0; n < cells && card.word != null; n++) {          // from black to a clear orange
        const seen = bytes[start + n]
        shade.data.set([seen, 0.6 * seen, 0, 215 - 0.5 * seen], 4 * n)
      }
      pen.putImageData(shade, 0, 0)
    })
    item.words.forEach((word, n) => row.append(make("button", {textContent: word, onclick() {
      card.word = card.word === n ? null : n
      for (const [m, button] of [...row.children].entries()) button.ariaPressed = m === card.word
      card.draw(layer())
    }})))
    card.append(row)
  }
  const top = make("div", data.retrieval ? "top clips" : "top")
  item.top.forEach(([name, score], n) => {
    if (data.retrieval) top.append(make("img", {src: data.pictures[item.shown[n]], alt: "its middle frame"}))
    top.append(make("span", name === item.truth ? "true" : "", name), bar(score),
               make("b", "", data.retrieval ? score.toFixed(3) : percent(score)))
  })
  card.append(top)
  card.text = [item.text, item.truth, item.id, ...item.top.map(pair => pair[0])].join("\\n").toLowerCase()
  card.item = item
  cards.append(card)
}
function marks() {                                // which tokens roll: a triangle towards the frame that they go to
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg")
  svg.setAttribute("viewBox", `0 0 ${data.grid} ${data.grid}`)
  svg.setAttribute("class", "rolled")
  for (const [slots, color, way] of [[data.forward, "var(--on)", 1], [data.backward, "var(--under)", -1]]) {
    const path = svg.appendChild(document.createElementNS(svg.namespaceURI, "path"))
    const triangle = n => `M${n % data.grid + .5 - .25 * way} ${(n / data.grid | 0) + .2}v.6l${.5 * way}-.3z`
    path.setAttribute("d", slots.map(triangle).join(""))
    path.style.fill = color
  }
  return svg
}
const layer = () => Math.max(0, data.layers.indexOf(Number(state().get("layer") || data.layers.at(-1))))
const choice = (name, options) => make("span", "", ...options.map(([value, text]) =>
  make("button", {textContent: text, name, value, onclick() { set(name, value) }})))
const kind = make("select", {ariaLabel: "kind", onchange() { set("kind", kind.value) }}, new Option("every kind", ""),
  ...[...new Set(data.items.map(item => item.kind))].sort().map(name => new Option(name)))
const rolls = make("input", {type: "checkbox", onchange() { set("rolls", rolls.checked && "yes") }})
const text = make("input", {type: "search", placeholder: "search the text", oninput() { set("text", text.value) }})
const tools = make("div", "tools", choice("show", [["", "all"], ["right", "right"], ["wrong", "wrong"]]))
if (kind.length > 2) tools.append(kind)
tools.append(text)
if (!data.retrieval) {
  tools.append(make("span", "", make("small", "", "layer"), choice("layer", data.layers.map(n => [String(n), n]))))
  if (data.forward.length) tools.append(make("label", "", rolls, " rolled tokens"))
}
tools.append(count)
function update() {
  const now = state(), wanted = (now.get("text") || "").toLowerCase()
  let shown = 0
  for (const card of cards.children) {
    const item = card.item
    card.hidden = now.get("show") && (now.get("show") === "right") !== item.right
      || now.get("kind") && now.get("kind") !== item.kind || !card.text.includes(wanted)
    shown += !card.hidden
    card.draw?.(layer())
  }
  document.body.classList.toggle("rolls", rolls.checked = now.has("rolls"))
  for (const button of tools.querySelectorAll("button"))
    button.ariaPressed = button.value === String(button.name === "layer" ? data.layers[layer()] : now.get("show") || "")
  kind.value = now.get("kind") || ""
  if (text.value !== (now.get("text") || "")) text.value = now.get("text") || ""
  count.textContent = `${shown} of ${data.items.length} shown`
}
if (data.items.length) {
  document.body.append(
    make("h2", "", data.retrieval ? "Texts and the clips found for them" : "Clips as the model saw them"),
    make("p", "soft", `${data.items.length} of ${data.total}, spread evenly over kinds, right and wrong: ` +
      "not a fair sample. " + (data.retrieval ? "Above: the right clip. Below: the first five, with their cosines." :
      "Click a word: the more orange a patch, the more the word looks at it (mean of the heads; full orange: its " +
      "most in that layer). A rolled token is drawn where it comes from." + (data.forward.length ?
      " Before each layer, tokens marked ▸ go on to the next frame, ◂ to the one before." : ""))),
    tools, cards)
  cards.classList.toggle("small", data.pictures[0].startsWith("data:image/png"))      // small enough to show the pixels
  update()
  addEventListener("hashchange", update)
}
</script>
</body>
</html>
"""


# ---- python eval.py -------------------------------------------------------------------------------------------------

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="best.pt of a run")
    parser.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    data, own = parser.add_argument_group("evaluate a benchmark"), parser.add_argument_group("your own video")
    runs = parser.add_argument_group("about benchmarks and runs, without a checkpoint")
    data.add_argument("--benchmark", choices=BENCHMARKS, metavar="NAME",
                      help="out of --list (default: the checkpoint's)")
    data.add_argument("--data", help="folder of the dataset, or a .jsonl (default: that of the checkpoint)")
    data.add_argument("--report", metavar="HTML",
                      help="write one page: the figures; clips with what the model saw and said")
    data.add_argument("--predictions", metavar="JSONL", help="write a line per test item: id, prediction, truth, "
                      "score (retrieval: the rank of the right clip, null if it cannot be read)")
    data.add_argument("--views", type=int, help="sets of frames a clip, scores averaged (default: as trained)")
    data.add_argument("--rerank", type=int, metavar="K",
                      help="retrieval: the matching head orders the first K anew (default: as trained)")
    data.add_argument("--batch", type=int, default=64, help="clips at a time (default %(default)s)")
    data.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2),
                      help="decoding processes (here default %(default)s)")
    data.add_argument("--allow-missing", action="store_true", help="count clips that cannot be read as wrong")
    data.add_argument("--amp", action="store_true", help="bfloat16 autocast (default: float32)")
    own.add_argument("--video", metavar="FILE", help="a video, a gif, a picture, or a folder of pictures")
    own.add_argument("--ask", metavar="TEXT", default="", help="a question about it")
    own.add_argument("--options", metavar="TEXT", nargs="+", default=(), help="answers to choose from")
    own.add_argument("--caption", metavar="TEXT", nargs="+", default=(),
                     help="sentences: how probably is each about it?")
    own.add_argument("--search", metavar="TEXT", help="name the ten clips of --videos that are nearest to a text")
    own.add_argument("--videos", metavar="FOLDER", help="clips, also in folders below; embeddings are kept beside it")
    runs.add_argument("--list", action="store_true", help="print the benchmarks")
    runs.add_argument("--plot", metavar="RUN", nargs="+", default=(), help="write RUN/curves.svg: loss and validation")
    runs.add_argument("--compare", metavar="RUN", nargs="+",
                      help="print a table of test figures, mean and std over seeds")
    return parser.parse_args()


def run(args):
    if args.list:
        return print("\n".join(benchmark_table()))
    if args.compare:
        return print("\n".join(compare(args.compare)))
    for folder in args.plot:
        path = Path(folder) / "curves.svg"
        picture = curves(folder)
        with writing(path):
            path.write_text(picture, encoding="utf-8")
        print(path)
    if args.plot:
        return
    if not args.checkpoint:
        raise UserError("no checkpoint given; train one with python train.py --task vqa, or see python eval.py --list")
    check_numbers(args, ("views", "batch"), ("workers", "rerank"))
    for path in filter(None, (args.report, args.predictions)):
        if not Path(path).parent.is_dir():
            raise UserError(f"{path} cannot be written: there is no folder {Path(path).parent}; make it first")
    device = device_of(args.device)
    model, meta, words = load_model(args.checkpoint, device)
    if args.search or args.videos:
        if not (args.search and args.videos):
            raise UserError('--search "text" and --videos FOLDER belong together')
        return print("\n".join(search(model, meta, words, args.videos, args.search, args.checkpoint)))
    question = args.ask or args.options
    if bool(args.video) != bool(question or args.caption) or question and args.caption:
        raise UserError('--video FILE goes with --ask "question", with --options a b c, with both, '
                        'or with --caption "text"')
    if len(args.options) == 1:
        raise UserError(f"--options {args.options[0]}: give two or more to choose from")
    if args.video:
        return print("\n".join(ask(model, meta, words, args.video, args.ask, args.options, args.caption)))
    evaluate_all(args, model, meta, words)


def evaluate_all(args, model, meta, words):
    """Evaluate a checkpoint on the benchmark that --benchmark names, or on all that it was trained on."""
    trained = dict(zip(meta["benchmarks"], meta["data"]))
    names, said = [args.benchmark] if args.benchmark else list(trained), []
    if args.report and len(names) > 1:
        raise UserError(f"--report is about one benchmark; choose with --benchmark out of {','.join(names)}")
    for name, root in zip(names, roots_of(args.data, names, trained, Path(meta["data"][0]).parent)):
        bench, K = BENCHMARKS[name], meta["rerank"] if args.rerank is None else args.rerank
        head, lacks = next((head for head in NEEDS[bench.task] if head in model.heads), None), None
        if head is None:
            lacks = f"the {' or '.join(NEEDS[bench.task])} head"
        elif bench.task == "retrieval" and K and "matching" not in model.heads:
            lacks = "the matching head, for --rerank,"
        elif head == "probe" and name not in trained:
            lacks = "the classes"
        if lacks:
            raise UserError(f"{name} needs {lacks} that {args.checkpoint}, trained for {','.join(trained)}, has not; "
                            f"fine-tune: python train.py --task {bench.task} --benchmark {name} "
                            f"--init {args.checkpoint}" + f" --rerank {K}" * (bench.task == "retrieval" and K > 0))
        if bench.task == "pretrain" and (args.views or 1) > 1:
            raise UserError(f"--views {args.views}: {name} is no task of answering or finding; leave it out")
        split = "test" if has_split(name, root, "test") else "val"
        rows = load_split(name, root, split)
        recipe = Recipe(bench.task, words, bench.join, 1 if bench.still else model.config.frames, model.config.image,
                        model.config.words, {a: i for i, a in enumerate(meta["answers"])},
                        views=args.views or meta["views"], rerank=K)
        print(f"{name} {split}: {survey([rows], [root], split, args.allow_missing)}"
              + (f"; zero-shot, by the {head} head" if bench.task in ("choice", "vcr") and head != "choice" else ""))
        if bench.task == "action" and max(e.answer for e in rows) >= len(meta["answers"]):
            raise UserError(f"{name} {split} has class {max(e.answer for e in rows)}; {args.checkpoint} knows 0 to "
                            f"{len(meta['answers']) - 1}, those of its own training list")
        train, clips = [], Clips(rows, root, recipe)
        if bench.task in ("vqa", "action"):
            try:
                train = load_split(name, root, "train")
            except UserError as error:
                print(f"no chance and majority, which need the training rows: {error}")
        if bench.task == "vqa":
            train = [e for e in train if e.answer in recipe.answers]
        metrics, records = evaluate(model, clips, args.allow_missing,
                                    batch=args.batch, workers=args.workers, amp=args.amp)
        table = by_kind(records, train, root)
        print("\n".join(report(metrics, table, split)))
        if args.report:
            about = [args.checkpoint, f"{millions(model):.2f} M parameters",
                     f"{recipe.T} frames", f"roll {model.config.roll}, {model.config.fraction:g} of the tokens",
                     *["the first view is shown"] * (recipe.views > 1)]
            text = page(f"{name}, {split}", about, model, clips, metrics, records, table)
            with writing(args.report):
                Path(args.report).write_text(text, encoding="utf-8")
            print(f"report: {args.report}, {len(text) / 1e6:.1f} MB; open it in a browser")
        for r in records:
            score = None if r["score"] == math.inf else r["score"]
            said.append(json.dumps({k: r[k] for k in ("id", "prediction", "truth")} | {"score": score}) + "\n")
    if args.predictions:
        with writing(args.predictions):
            Path(args.predictions).write_text("".join(said))


def main():
    run_main("eval.py", lambda: run(arguments()))


if __name__ == "__main__":
    main()
