"""One web page about an evaluation: the figures, and what the model saw and attended to.

    python tools/report.py RUN page.html

RUN is a run folder of train.py or a checkpoint file. The page is one file that needs no network:
tools/report.html, with the data of the evaluation in place of its DATA.
"""
# The tools run from a checkout: the core is one folder up.
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import base64
import json
import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace

import torch

from allinone import (UserError, check_positive, check_workers, count_parameters,
                      default_workers, load_model, pick_device, run_main, write_file)
from data import ACTION, InputSpec, Tokenizer, VideoTextDataset, benchmark_of, captions_of
from eval import EvalSettings, answers_for, default_split, evaluate_folder
from rolling import roll_groups, roll_tokens
from tools.toy import encode_picture

# ---- attention -----------------------------------------------------------------------------------


@contextmanager
def record_attention(model):
    """A list that a forward pass fills: for each block (B*T, H, queries, S), shares that sum to 1
    over the keys. The model does not keep its attention, so a hook computes it again."""
    maps = []

    def hook(attention, inputs, output):
        x, mask, num_queries = inputs
        rows, S, D = x.shape
        K = D // attention.heads
        qkv = attention.qkv(x).view(rows, S, 3, attention.heads, K)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)                            # each (B*T, H, S, K)
        scores = q[:, :, :num_queries] @ k.mT / K ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        maps.append(scores.softmax(-1))

    handles = [block.attn.register_forward_hook(hook) for block in model.blocks]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def word_attention(model, frames, input_ids):
    """How much each word attends to each patch: the mean of the heads.

    frames (T, 3, R, R) uint8, input_ids (L,) -> (layers, L, T, N - 1); for one block, word and
    frame, the shares sum to at most 1. A rolled token is seen in another frame than its own; here
    its share is at its own place in its own frame.
    """
    L = len(input_ids)
    config = model.config
    with torch.inference_mode(), record_attention(model) as maps:
        model(frames[None], input_ids[None])
    groups = roll_groups(config.grid, config.grid, config.fraction, config.roll)
    result = []
    for rolls, attention in enumerate(maps, 1):
        seen = attention.mean(1)[:, :L, L:].transpose(1, 2)[None].cpu()     # (1, T, N, L)
        for _ in range(rolls):                                              # send tokens home
            seen = roll_tokens(seen, *reversed(groups))
        result.append(seen[0, :, 1:].permute(2, 0, 1))
    return torch.stack(result)


# ---- the data of the page ------------------------------------------------------------------------


def choose(records, count):
    """At most `count` row numbers, spread evenly over question types, right and wrong."""
    groups = defaultdict(list)
    for i, record in enumerate(records):
        if record["prediction"] is not None:
            groups[record["question_type"], record["correct"]].append(i)
    turns = []
    for group in groups.values():
        group.sort(key=lambda i: zlib.crc32(records[i]["id"].encode()))
        turns += enumerate(group)
    return sorted(i for _, i in sorted(turns)[:count])


def picture_number(pictures, frame):
    """The number of a frame (3, R, R) in pictures {data URL: number}, where it is added."""
    small = frame.shape[1] <= 64
    content = encode_picture(frame.permute(1, 2, 0).numpy(), ".png" if small else ".jpg")
    kind = "png" if small else "jpeg"
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return pictures.setdefault(url, len(pictures))


def retrieval_item(dataset, row, record, first_row, pictures):
    """A caption, and the middle frames of the clips that were found."""
    shown = []
    for video, _ in record["top"]:
        frames = dataset.load_frames(dataset.rows[first_row[video]], None)
        shown.append(picture_number(pictures, frames[len(frames) // 2]))
    return {"text": captions_of(row)[0], "shown": shown}


def answer_item(model, dataset, row, record, frames, zero_shot):
    """A question, and for each word of the text that was read where it attends: bytes, 255 for the
    most of a word in a block. Of several texts, it is that of the chosen option or class."""
    tokenizer = dataset.spec.tokenizer
    texts = dataset.load_texts(row, None)["texts"]
    input_ids = texts[0]
    if "options" in row:
        input_ids = texts[row["options"].index(record["prediction"])]
    elif zero_shot:
        text = ACTION.format(record["prediction"])
        input_ids = tokenizer.encode(text, model.config.text_length)
    device = model.pixel_mean.device
    ids = torch.tensor(input_ids, device=device)
    attention = word_attention(model, frames.to(device), ids)
    attention = 255 * attention / attention.amax((2, 3), keepdim=True)
    content = attention.round().byte().numpy().tobytes()
    return {"text": row.get("question", ""),
            "words": [tokenizer.tokenizer.id_to_token(n) for n in input_ids],
            "attention": base64.b64encode(content).decode()}


def page_data(model, checkpoint, folder, split, count, settings):
    """Evaluate, and collect what the page shows."""
    metrics, table, records = evaluate_folder(model, checkpoint, folder, split, settings)
    name, benchmark = benchmark_of(folder)
    retrieval = benchmark.task == "retrieval"
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])
    answers, zero_shot = answers_for(checkpoint, folder, benchmark.task)
    spec = InputSpec(replace(benchmark, views=1), model.config, tokenizer, answers)
    dataset = VideoTextDataset(folder, split, spec)
    first_row = {}
    for i, record in enumerate(records):
        first_row.setdefault(record["truth"], i)
    pictures = {}
    items = []
    for i in choose(records, count):
        row = dataset.rows[i]
        frames = dataset.load_frames(row, None)                              # (T, 3, R, R)
        numbers = [picture_number(pictures, frame) for frame in frames]
        if retrieval:
            item = retrieval_item(dataset, row, records[i], first_row, pictures)
        else:
            item = answer_item(model, dataset, row, records[i], frames, zero_shot)
        items.append({**records[i], **item, "frames": numbers})
    config = model.config
    return {"title": f"{name}, {split}: {checkpoint['path']}",
            "about": f"{count_parameters(model) / 1e6:.1f} M parameters, frames: {spec.frames}, "
                     f"blocks: {config.layers}, rolling: {config.roll}",
            "metrics": metrics,
            "table": table,
            "rows": len(dataset),
            "items": items,
            "pictures": list(pictures),
            "blocks": config.layers,
            "grid": config.grid,
            "answers": answers,
            "retrieval": retrieval}


def make_page(data):
    """The HTML. No text of `data` can end the script element that holds it."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return template.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder or a checkpoint file")
    add("page", metavar="PAGE", help="the file to write")
    add("--data", metavar="FOLDER", help="a prepared folder (default: that of the checkpoint)")
    add("--split", choices=("train", "val", "test"), help="default: test, else val")
    add("--rows", type=int, default=24, help="clips in the gallery (default 24)")
    add("--allow-missing", action="store_true", help="count clips that cannot be read as wrong")
    add("--workers", type=int, default=default_workers(), help="processes that read clips")
    args = parser.parse_args()
    check_positive(args, "rows")
    check_workers(args.workers)
    if Path(args.page).is_dir() or not Path(args.page).absolute().parent.is_dir():
        raise UserError(f"PAGE {args.page}: give a file to write, in a folder that exists")
    model, checkpoint = load_model(args.run)
    folders = [args.data] if args.data else checkpoint.get("data")
    if not folders:
        raise UserError(f"{args.run} was not trained on any data; give --data FOLDER")
    split = args.split or default_split(folders[0])
    model.to(pick_device(None))
    settings = EvalSettings(workers=args.workers, allow_missing=args.allow_missing)
    data = page_data(model, checkpoint, folders[0], split, args.rows, settings)
    write_file(args.page, make_page(data))
    shown = f"{len(data['items'])} of {data['rows']} rows" if data["items"] else "figures alone"
    print(f"{args.page}: {shown}; open it in a browser")


if __name__ == "__main__":
    run_main("report.py", main)
