"""Evaluation: every benchmark by its own protocol, and questions about your own video.

    python eval.py RUN                                        the test figures of a training run
    python eval.py base.pt --data data/msrvtt-mc              of any checkpoint, on any folder
    python eval.py RUN --video clip.mp4 --ask "what shape is it?"
    python eval.py RUN --video clip.mp4 --options "moves left" "moves right"
    python eval.py RUN --video clip.mp4 --caption "a red ring moves left"
    python eval.py --list                                     the benchmarks and their recipes

RUN is a run folder of train.py or a checkpoint file. Printed figures are in percent, except
ranks; the scores in --predictions are probabilities, or ranks.
"""
import argparse
import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass

from allinone import (RANK, WORLD, UserError, check_positive, check_workers, default_workers,
                      join_processes, load_model, pick_device, print0, printable, progress,
                      run_main, write_file)     # first: it prepares the import of torch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import (ACTION, BENCHMARK_OF, BENCHMARKS, InputSpec, Manifest, Tokenizer,
                  VideoTextDataset, benchmark_of, check_shared_memory, collate, frame_indices,
                  has_split, make_loader, manifest_info, read_answers, read_frames)

# ---- metrics -------------------------------------------------------------------------------------


def percent(values):
    """100 times the mean; 0 if there are no values."""
    values = list(values)
    return 100 * float(sum(values)) / max(1, len(values))


def ranks(scores, target):
    """The 1-based rank of column target[i] in row i of scores (Q, C); higher is better. Ties are
    averaged: equal scores give the rank of chance, (C + 1) / 2, not a perfect one."""
    own = scores[np.arange(len(scores)), target][:, None]
    better = (scores > own).sum(1)
    equal = (scores == own).sum(1)
    return 1 + better + (equal - 1) / 2


def recalls(rank, candidates, direction):
    """Ranks (Q,) among this many candidates, inf where the clip cannot be read -> R@1, R@5, R@10 in
    percent, median and mean rank. In median and mean such a clip ranks behind all others."""
    result = {f"{direction} R@{k}": percent(rank <= k) for k in (1, 5, 10)}
    finite = np.minimum(rank, candidates + 1)
    result[f"{direction} MedR"] = float(np.median(finite))
    result[f"{direction} MeanR"] = float(finite.mean())
    return result


# ---- scores of one batch -------------------------------------------------------------------------


def answer_scores(model, batch):
    """(B, answers), over the answer list."""
    return model.task_heads["answer"](read_pairs(model, batch))


def read_pairs(model, batch):
    """The joint model on each clip with each of its A texts, input_ids (B, A, L).
    -> pooled (B * A, D)."""
    ids = batch["input_ids"]
    mask = batch["attention_mask"]
    video = model.embed_frames(batch["frames"]).repeat_interleave(ids.shape[1], dim=0)
    return model.joint(video, ids.flatten(0, 1), mask.flatten(0, 1), num_queries=1).pooled


def option_scores(model, batch, heads):
    """(B, A) over the options. heads: one name, or two for VCR: the second is for QA->R."""
    pooled = read_pairs(model, batch)
    B, A, _ = batch["input_ids"].shape
    scores = text_score(model, pooled, heads[0]).view(B, A)
    if len(heads) == 2:
        second = text_score(model, pooled, heads[1]).view(B, A)
        scores = torch.where(batch["is_rationale"][:, None], second, scores)
    absent = ~batch["attention_mask"].any(dim=-1)           # rows with fewer options
    return scores.masked_fill(absent, -torch.inf)


def text_score(model, pooled, head):
    """How well each text fits its clip, a number for each row of pooled: by this head; if the model
    lacks it, by row 1 of matching, where rank heads start (zero-shot)."""
    name = head if head in model.task_heads else "matching"
    return model.task_heads[name](pooled)[:, -1]            # the one column, or matching's column 1


def pretrain_scores(model, batch):
    """(match, words): match (B, 2), scores of "the first text belongs to the clip"; words (M, V),
    scores of the M masked words of the second text."""
    ids = batch["input_ids"]
    mask = batch["attention_mask"]
    L = ids.shape[2]
    video = model.embed_frames(batch["frames"])             # once, for both
    pooled = model.joint(video, ids[:, 0], mask[:, 0], num_queries=1).pooled
    text = model.joint(video, ids[:, 1], mask[:, 1], num_queries=L).text
    words = text.flatten(0, 1)[batch["masked"]]             # the MLM head is large: no other words
    return model.task_heads["matching"](pooled), model.task_heads["mlm"](words)


def class_scores(model, batch, texts):
    """Zero-shot action recognition, as released: (B, A) scores of a sentence for each class.
    texts: a list of (1, L) ids; one at a time, as there may be 400."""
    video = model.embed_frames(batch["frames"])
    scores = []
    for input_ids in texts:
        out = model.joint(video, input_ids.expand(len(video), -1), num_queries=1)
        scores.append(text_score(model, out.pooled, "rank"))
    return torch.stack(scores, dim=1)


def embeddings(model, batch, number=0):
    """The unit vectors of text `number` and of the clip, (B, embed) each. Several views give the
    mean of their unit vectors: its product with a text is the mean of the views' cosines."""
    text = model.encode_text(batch["input_ids"][:, number], batch["attention_mask"][:, number])
    frames = batch["frames"]
    if frames.dim() == 5:
        frames = frames[:, None]                            # one view
    views = [F.normalize(model.encode_video(f), dim=-1) for f in frames.unbind(dim=1)]
    return F.normalize(text, dim=-1), torch.stack(views).mean(0)


# ---- a whole split -------------------------------------------------------------------------------

TOP = 5             # predictions kept for a row


@dataclass(frozen=True)
class EvalSettings:
    """The flags of an evaluation."""
    batch: int = 64                 # clips at a time
    workers: int = 0
    amp: bool = False
    allow_missing: bool = False


def predict(model, dataset, score_batch, settings):
    """score_batch(model, batch) -> {name: tensor (B, ...)} for every row that can be read.

    Returns {name: tensor (n, ...)}, with "index" the n row numbers in order. Several processes
    share the work and all return everything.
    Raises UserError: clips that cannot be read, unless allow_missing; results that are not finite.
    """
    device = next(model.parameters()).device
    starts = range(RANK * settings.batch, len(dataset), WORLD * settings.batch)
    batches = []
    for start in starts:
        stop = min(start + settings.batch, len(dataset))
        batches.append([(0, index) for index in range(start, stop)])    # epoch 0
    check_shared_memory(dataset, settings.batch, settings.workers)
    loader = make_loader(dataset, batches, settings.workers, dataset.spec.tokenizer.pad)
    training = model.training
    model.eval()
    results = defaultdict(list)
    errors = {}
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, settings.amp):
        for batch in progress(loader, "evaluating", total=len(batches)):
            errors |= batch["errors"]
            if "frames" in batch:
                for name, tensor in score_batch(model, to_device(batch, device)).items():
                    results[name].append(tensor.float().cpu())
                results["index"].append(batch["index"])
    model.train(training)
    results = {name: torch.cat(tensors) for name, tensors in results.items()}
    results, errors = gather(results, errors)
    if errors and not settings.allow_missing:
        raise UserError(f"{len(errors)} of {len(dataset)} rows of {dataset.rows.path} have a clip "
                        f"that cannot be read, the first: {next(iter(errors.values()))}; "
                        "--allow-missing counts such rows as wrong")
    if errors:
        print0(f"{len(errors)} of {len(dataset)} rows of {dataset.rows.path} have a clip that "
               "cannot be read; they count as wrong")
    if not results:
        raise UserError(f"no clip of {dataset.rows.path} can be read; look at one with: "
                        "python data.py CLIP")
    for name, tensor in results.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"the model's {name} is not finite; its weights or the precision are "
                            "bad (try without --amp)")
    return results


def gather(results, errors):
    """Everything from all processes, sorted by row."""
    everyone = [(results, errors)]
    if dist.is_initialized():
        everyone = [None] * WORLD
        dist.all_gather_object(everyone, (results, errors))
    parts = []
    for part, more in everyone:
        errors = errors | more
        if part:
            parts.append(part)
    if not parts:
        return {}, errors
    results = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = results["index"].argsort()
    return {name: tensor[order] for name, tensor in results.items()}, errors


def to_device(batch, device):
    moved = {}
    for name, value in batch.items():
        if torch.is_tensor(value):
            value = value.to(device, non_blocking=True)
        moved[name] = value
    return moved


def evaluate(model, dataset, benchmark, answers, settings, zero_shot=False):
    """Evaluate one split. zero_shot: score actions as sentences, without an answer head.
    Returns (metrics, records): {name: value}, the benchmark's own metric among them, and a dict
    for each row: id, question_type, prediction, truth, score, correct, top (the best predictions
    with their scores), options (how many there are to choose from; 0: the answer list)."""
    if benchmark.task == "retrieval":
        return evaluate_retrieval(model, dataset, settings)
    if benchmark.task == "pretrain":
        return evaluate_pretrain(model, dataset, settings), []
    return evaluate_answers(model, dataset, benchmark, answers, settings, zero_shot)


def evaluate_answers(model, dataset, benchmark, answers, settings, zero_shot):
    """Open-ended questions, actions and options: the best score against the truth."""
    spec = dataset.spec
    class_texts = []
    if zero_shot:
        for name in answers:
            ids = spec.tokenizer.encode(ACTION.format(name), model.config.text_length)
            class_texts.append(torch.tensor([ids], device=next(model.parameters()).device))

    def score_batch(model, batch):
        if benchmark.task in ("choice", "vcr"):
            scores = option_scores(model, batch, benchmark.heads)
        elif zero_shot:
            scores = class_scores(model, batch, class_texts)
        else:
            scores = answer_scores(model, batch)
        # topk before softmax: a probability that rounds to 0 would tie with an absent option.
        best, choices = scores.float().topk(min(TOP, scores.shape[1]))
        probs = (best - scores.float().logsumexp(-1, keepdim=True)).exp()
        missing = TOP - probs.shape[1]                      # batches may differ in their options
        return {"probs": F.pad(probs, (0, missing)), "choices": F.pad(choices, (0, missing))}

    results = predict(model, dataset, score_batch, settings)
    best = {}                                   # by row; a row whose clip cannot be read has none
    for n, i in enumerate(results["index"].tolist()):
        choices = results["choices"][n].int().tolist()
        best[i] = list(zip(choices, results["probs"][n].tolist()))
    records = []
    for i in range(len(dataset)):
        records.append(answer_record(dataset.rows[i], answers, best.get(i, [])))
    metrics = {"accuracy": percent(r["correct"] for r in records)}
    if benchmark.task == "vqa":
        listed = set(answers)
        known = [r["correct"] for r in records if r["truth"] in listed]
        metrics["accuracy of known answers (as released)"] = percent(known)
        metrics["ceiling of the answer list"] = 100 * len(known) / len(records)
    if benchmark.task == "vcr":
        metrics = {**vcr_metrics(records), **metrics}       # the benchmark's metric first
    return metrics, records


def answer_record(row, answers, best):
    """The record of a row. best: (number, probability) of the best answers, options or classes."""
    names = row.get("options", answers)
    top = [(names[number], round(prob, 6)) for number, prob in best[:len(names)]]
    prediction, score = top[0] if top else (None, 0.0)
    truth = row["answer"] if "answer" in row else row["label"]
    if isinstance(truth, int):                  # options may repeat a text: the number decides
        correct = bool(top) and best[0][0] == truth
        truth = names[truth] if truth < len(names) else f"class {truth}"
    else:
        correct = prediction == truth
    return {"id": row["id"], "question_type": row.get("question_type", ""), "truth": truth,
            "prediction": prediction, "score": score, "correct": correct, "top": top,
            "options": len(row.get("options", ()))}


def vcr_metrics(records):
    """Q->A, QA->R, and Q->AR: both of a question right."""
    pairs = defaultdict(list)
    for record in records:
        question = record["id"].rsplit("/", 1)[0]           # the ids end in /qa and /qar
        pairs[question].append(record["correct"])
    metrics = {"Q->AR": percent(len(pair) == 2 and all(pair) for pair in pairs.values())}
    for name in ("Q->A", "QA->R"):
        metrics[name] = percent(r["correct"] for r in records if r["question_type"] == name)
    return metrics


def evaluate_retrieval(model, dataset, settings):
    """Texts against clips by cosine, both ways. Several rows may describe one clip."""
    def score_batch(model, batch):
        text, video = embeddings(model, batch)
        return {"text": text, "video": video}

    results = predict(model, dataset, score_batch, settings)
    rows = [dataset.rows[i] for i in range(len(dataset))]
    found = results["index"].tolist()                       # Q rows whose clip can be read
    clips = list(dict.fromkeys(clip_name(rows[i]) for i in found))      # C of them
    column = {clip: c for c, clip in enumerate(clips)}
    target = np.array([column[clip_name(rows[i])] for i in found])      # (Q,)
    _, first = np.unique(target, return_index=True)         # the first row of each clip
    similarity = results["text"] @ results["video"][first].T            # (Q, C)

    text_rank = np.full(len(rows), np.inf)
    text_rank[found] = ranks(similarity.numpy(), target)
    num_clips = len({clip_name(row) for row in rows})
    clip_rank = np.full(num_clips, np.inf)
    # Row i: the clip of text i against all texts; the rank of text i among them.
    own_rank = ranks(similarity.T.numpy()[target], np.arange(len(found)))       # (Q,)
    np.minimum.at(clip_rank, target, own_rank)              # the best of a clip's texts
    metrics = recalls(text_rank, num_clips, "text to video")
    metrics |= recalls(clip_rank, len(rows), "video to text")

    cosines, columns = similarity.topk(min(TOP, len(clips)))
    best = {}
    for n, i in enumerate(found):
        best[i] = list(zip(columns[n].tolist(), cosines[n].tolist()))
    records = []
    for i, row in enumerate(rows):
        record = {"id": row["id"], "question_type": "", "truth": clip_name(row), "top": [],
                  "prediction": None, "score": None, "correct": False, "options": num_clips}
        if i in best:
            record["top"] = [(clips[c], round(cosine, 6)) for c, cosine in best[i]]
            record["prediction"] = record["top"][0][0]
            record["score"] = float(text_rank[i])
            record["correct"] = record["score"] == 1
        records.append(record)
    return metrics, records


def clip_name(row):
    """The video of a row, with the part of it that is looked at: rows may share a long video."""
    part = row.get("seconds", row.get("frames"))
    return f"{row['video']} {part[0]}-{part[1]}" if part else row["video"]


def evaluate_pretrain(model, dataset, settings):
    """Accuracy of matching, and of the masked words."""
    def score_batch(model, batch):
        scores, words = pretrain_scores(model, batch)
        match = scores.argmax(-1) == batch["target"]
        B, _, L = batch["input_ids"].shape
        row = batch["masked"] // L
        correct = torch.bincount(row[words.argmax(-1) == batch["labels"]], minlength=B)
        asked = torch.bincount(row, minlength=B)
        # scores only because predict() refuses those that are not finite
        return {"scores": scores, "match": match, "correct": correct, "asked": asked}

    results = predict(model, dataset, score_batch, settings)
    matching = 100 * results["match"].sum().item() / len(dataset)
    # Over the rows that can be read: the masked words of the others are unknown.
    mlm = 100 * results["correct"].sum().item() / max(1, results["asked"].sum().item())
    return {"matching + MLM accuracy": (matching + mlm) / 2, "matching accuracy": matching,
            "MLM accuracy": mlm}


# ---- what is printed -----------------------------------------------------------------------------


def baselines(records, folder, task, answers):
    """A table by question type: [{type, questions, accuracy, chance, majority, order-blind}], the
    most frequent first, "all" last; in percent, None where unknown.

    chance: a guess among the options, or among the answers that the type has in training. majority:
    always the most frequent of these. order-blind: what a model that ignores the order of frames
    can reach, where dataset.json states it.
    """
    ceilings = manifest_info(folder).get("order_blind", {})
    counts = {}
    if task in ("vqa", "action") and has_split(folder, "train"):
        counts = count_by_type(Manifest(folder, "train"), answers)
    groups = defaultdict(list)
    for record in records:
        groups[record["question_type"]].append(record)
    table = []
    everything = []
    for kind, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        # A type that training lacks has the answers of all types, a folder without a train split
        # those of the answer list.
        known = counts.get(kind) or counts.get(None) or Counter(answers)
        majority = max(known, key=known.get, default=None)
        figures = []
        for record in group:
            figures.append({"accuracy": record["correct"],
                            "chance": 1 / (record["options"] or len(known)),
                            "majority": record["truth"] == majority,
                            "order-blind": ceilings.get(kind, 1.0)})
        table.append(table_line(kind, figures, counts, ceilings))
        everything += figures
    total = table_line("all", everything, counts, ceilings)
    return [*table, total] if len(table) > 1 else [total]


def table_line(name, figures, counts, ceilings):
    line = {"type": name, "questions": len(figures)}
    for column in ("accuracy", "chance", "majority", "order-blind"):
        line[column] = percent(row[column] for row in figures)
    if not counts:
        line["majority"] = None
    if not ceilings:
        line["order-blind"] = None
    return line


def count_by_type(rows, answers):
    """{question type, None for all: Counter of the training answers}"""
    counts = defaultdict(Counter)
    for row in rows:
        answer = answer_record(row, answers, [])["truth"]
        counts[row.get("question_type", "")][answer] += 1
        counts[None][answer] += 1
    return counts


def format_metrics(metrics):
    parts = []
    for name, value in metrics.items():
        unit = "" if name.endswith(("MedR", "MeanR")) else " %"
        parts.append(f"{name} {value:.2f}{unit}")
    return ", ".join(parts)


def format_table(table):
    """The lines of baselines(), of the nine most frequent types."""
    *types, total = table
    lines = ["question type    questions  accuracy  chance  majority  order-blind"]
    for row in [*types[:9], total]:
        cells = []
        for name, width in (("chance", 7), ("majority", 9), ("order-blind", 12)):
            text = "-" if row[name] is None else f"{row[name]:.1f}"
            cells.append(f"{text:>{width}}")
        lines.append(f"{printable(row['type'] or '-')[:16]:16s} {row['questions']:9d} "
                     f"{row['accuracy']:9.1f} {' '.join(cells)}")
    return lines


def list_benchmarks():
    """The lines of --list."""
    lines = ["published figures: 'rerun' is the authors' later run of their code (their EVAL.md), "
             "'paper' is of the paper or of one that cites it"]
    for name, b in BENCHMARKS.items():
        length = f"{b.steps:,} steps" if b.steps else f"{b.epochs} epochs"
        lines.append(f"{name:16s} {b.task}, by {' and '.join(b.heads)}"
                     f"{' + VTM' if b.vtm else ''}; batch {b.batch}, {length}, "
                     f"lr {b.lr:g}, heads x {b.head_lr:g}, L {b.text_length}, T {b.frames}"
                     + (f", {b.views} views" if b.views > 1 else ""))
        rows = " / ".join(f"{b.rows[split]:,}" if split in b.rows else "-"
                          for split in ("train", "val", "test"))
        chance = f"{100 * b.chance:.2g} %" if b.chance else "-"
        lines.append(f"{'':16s} {b.metric}; rows {rows}; chance {chance}; published: rerun "
                     f"{b.rerun or '-'}, paper {b.paper or '-'}")
    return lines


# ---- python eval.py ------------------------------------------------------------------------------


def evaluate_folder(model, checkpoint, folder, split, settings):
    """Evaluate a checkpoint on one folder and print the figures.
    Returns (metrics, table, records) of evaluate() and baselines()."""
    # Captions fit retrieval and pre-training. A checkpoint knows which of them for the folders that
    # it was trained on.
    trained_on = os.path.abspath(folder) in checkpoint.get("data", [])
    name, benchmark = benchmark_of(folder, checkpoint["task"] if trained_on else None)
    answers, zero_shot = answers_for(checkpoint, folder, benchmark.task)
    heads = {"rank"} if zero_shot else set(benchmark.heads)
    check_heads(model, checkpoint, folder, heads)
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])
    spec = InputSpec(benchmark, model.config, tokenizer, answers)
    split = split or default_split(folder)
    if not has_split(folder, split):
        raise UserError(f"{folder} has no {split}.jsonl; choose another --split")
    dataset = VideoTextDataset(folder, split, spec)
    metrics, records = evaluate(model, dataset, benchmark, answers, settings, zero_shot)
    print0(f"{name}, {split}, {len(dataset)} rows: {format_metrics(metrics)}")
    table = []
    if records:
        table = baselines(records, folder, benchmark.task, answers)
        print0("\n".join(format_table(table)))
    return metrics, table, records


def answers_for(checkpoint, folder, task):
    """(the answers to choose from, zero_shot: whether no answer head is for them)."""
    if task != "action":
        return checkpoint["answers"], False
    classes = read_answers(folder)
    return classes, classes != checkpoint["answers"]


def default_split(folder):
    return "test" if has_split(folder, "test") else "val"


def check_heads(model, checkpoint, folder, heads):
    """Raises UserError if the model lacks the heads for a folder and has nothing to replace them.
    """
    if heads <= set(model.task_heads):
        return
    if heads <= {"mc", "rank", "rank2"} and "matching" in model.task_heads:
        print0("zero-shot, by row 1 of the matching head")
        return
    raise UserError(f"{folder} needs the head {' and '.join(sorted(heads))}, which "
                    f"{checkpoint['path']} lacks; fine-tune it: python train.py --data {folder} "
                    f"--init {checkpoint['path']}")


def ask(model, checkpoint, path, question, options, captions, amp):
    """The lines that answer a question about any video: the five best answers, all options, or how
    likely each caption is to belong to it."""
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])
    L = model.config.text_length
    task = checkpoint.get("task", "choice")                 # none if saved by hand
    recipe = BENCHMARKS.get(checkpoint["name"], BENCHMARKS[BENCHMARK_OF[task]])
    T = InputSpec(recipe, model.config, tokenizer, []).frames
    if captions:
        names = captions
        heads = ["matching"]
        texts = [tokenizer.encode(caption, L) for caption in captions]
    elif options:
        names = options
        heads = ["mc", "rank", "matching"]
        texts = tokenizer.encode_options(question, options, recipe.option_format, L)
    else:
        names = checkpoint["answers"]
        heads = ["answer"]
        texts = [tokenizer.encode(question, L)]
    usable = [head for head in heads if head in model.task_heads]
    if not usable:
        raise UserError(f"this needs a head {' or '.join(heads)}; {checkpoint['path']} has "
                        f"{', '.join(model.task_heads)} (answer: a run of --task vqa; mc: choice; "
                        "matching: pretrain)")
    seen = []

    def pick(times):
        numbers = frame_indices(len(times), T, "eval")
        seen[:] = times[numbers]                # read_frames may ask twice
        return numbers

    frames = read_frames(path, pick, model.config.image)
    item = {"index": 0, "frames": frames, "texts": texts, "target": 0, "errors": {}}
    device = next(model.parameters()).device
    batch = to_device(collate([item], tokenizer.pad), device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, amp):
        if captions:
            probs = model.task_heads["matching"](read_pairs(model, batch)).softmax(-1)[:, 1]
        elif options:
            probs = option_scores(model, batch, usable[:1]).softmax(-1)[0]
        else:
            probs = answer_scores(model, batch).softmax(-1)[0]
    if not torch.isfinite(probs).all():
        raise UserError(f"the answer is not finite; {checkpoint['path']} holds bad weights")
    count = len(names) if captions or options else min(TOP, len(names))
    best = probs.float().topk(count)
    unit, digits = ("pictures", 0) if os.path.isdir(path) else ("seconds", 2)
    looked = ", ".join(f"{time:.{digits}f}" for time in seen)
    lines = [f"looked at {unit} {looked} of {printable(path)}"]
    for prob, n in zip(best.values.tolist(), best.indices.tolist()):
        lines.append(f"{prob:7.1%}  {printable(names[n])}")
    known = f"{len(checkpoint['answers'])} answers, " if checkpoint["answers"] else ""
    lines.append(f"(trained on {checkpoint['name']}: {known}{len(tokenizer)} word pieces)")
    return lines


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="RUN", help="a run folder or a checkpoint file")
    add("--data", metavar="FOLDER", help="a prepared folder (default: that of the checkpoint)")
    add("--split", choices=("train", "val", "test"), help="default: test, else val")
    add("--predictions", metavar="FILE", help="write a JSON line for each row, of pre-training "
        "none: id, prediction, truth, score (its probability; in retrieval the right clip's rank)")
    add("--allow-missing", action="store_true", help="count clips that cannot be read as wrong")
    add("--batch", type=int, default=64, help="clips at a time (default 64)")
    add("--workers", type=int, default=default_workers(),
        help="processes that read clips (here %(default)s)")
    add("--amp", action="store_true", help="bfloat16 (default: float32)")
    add("--device", help="cuda, cpu (default: cuda if there is one)")
    add("--video", metavar="FILE", help="your own video, gif, picture or folder of pictures")
    add("--ask", metavar="TEXT", default="", help="a question about it")
    add("--options", metavar="TEXT", nargs="+", default=[], help="answers to choose from")
    add("--caption", metavar="TEXT", nargs="+", default=[], help="how well does each describe it?")
    add("--list", action="store_true", help="print the benchmarks and their recipes")
    return parser.parse_args()


def main():
    args = arguments()
    if args.list:
        print("\n".join(list_benchmarks()))
        return
    if args.checkpoint is None:
        raise UserError("name a run folder or a checkpoint; train one with: python train.py --task "
                        "vqa; the benchmarks: python eval.py --list")
    check_positive(args, "batch")
    check_workers(args.workers)
    device = pick_device(args.device)
    join_processes(device)
    model, checkpoint = load_model(args.checkpoint)
    model.to(device)
    if not args.video and (args.ask or args.options or args.caption):
        raise UserError("--ask, --options and --caption need --video FILE")
    if args.video:
        asks = bool(args.ask or args.options)
        if asks == bool(args.caption) or len(args.options) == 1:
            raise UserError("--video needs --ask TEXT or --options with two texts or more, or else "
                            "--caption TEXT")
        lines = ask(model, checkpoint, args.video, args.ask, args.options, args.caption, args.amp)
        print("\n".join(lines))
        return
    folders = [args.data] if args.data else checkpoint.get("data", [])
    if not folders:
        raise UserError(f"{args.checkpoint} was not trained on any data; give --data FOLDER")
    if args.predictions and not os.path.isdir(os.path.dirname(args.predictions) or "."):
        raise UserError(f"--predictions {args.predictions}: there is no such folder")
    settings = EvalSettings(args.batch, args.workers, args.amp, args.allow_missing)
    lines = []
    for folder in folders:
        _, _, records = evaluate_folder(model, checkpoint, folder, args.split, settings)
        for record in records:
            kept = {name: record[name] for name in ("id", "prediction", "truth", "score")}
            lines.append(json.dumps(kept, ensure_ascii=False, allow_nan=False) + "\n")
    if args.predictions and RANK == 0:
        write_file(args.predictions, "".join(lines))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main("eval.py", main)
