"""Search a folder of videos: the ten clips nearest to a text.

    python tools/search.py RUN FOLDER "a red ring moves left"

RUN is a run folder of train.py or a checkpoint file; it needs the contrastive head, which
`python train.py --task retrieval` trains. Clips are ranked by the cosine of their embedding with
that of the text. FOLDER.embeddings.npz keeps the embeddings: a clip is read again only if its size
or its time stamp changes, or for another checkpoint. Ctrl-C keeps what was read so far.
"""
# The tools run from a checkout: the core is one folder up.
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import hashlib
import io
import os

import numpy as np
import torch
import torch.nn.functional as F

from allinone import (SIZES, UserError, load_model, pick_device, printable, progress, run_main,
                      write_file)
from data import MEDIA, Tokenizer, VideoError, frame_indices, read_frames


def list_clips(folder, sha256):
    """{key: name} of all clips below a folder. The key changes with the file and the checkpoint."""
    clips = {}
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: there is no such folder")
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() in MEDIA and path.is_file():
            name = str(path.relative_to(folder))
            stat = path.stat()
            clips[f"{sha256} {stat.st_size} {stat.st_mtime_ns} {name}"] = name
    if not clips:
        raise UserError(f"{folder} holds no clips; a clip ends in {' '.join(MEDIA)}")
    return clips


def load_embeddings(path):
    """{key: vector}; empty if there is no such file, or if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(zip(file["keys"].tolist(), file["vectors"], strict=True))
    except Exception:                                       # a broken file can fail in any way
        return {}


def save_embeddings(path, known):
    buffer = io.BytesIO()
    np.savez(buffer, keys=list(known), vectors=list(known.values()))
    try:
        write_file(path, buffer.getvalue())
    except UserError as error:                              # the search itself can go on
        print(printable(f"embeddings are not kept: {error}"))


def embed_folder(model, folder, clips, path):
    """Embed the clips that `path` does not hold, and add them to it; it also keeps those of other
    checkpoints. Names the clips that cannot be read. Returns {key: unit vector (embed,) float32}.
    """
    saved = load_embeddings(path)
    known = {key: saved[key] for key in clips if key in saved}
    new = [key for key in clips if key not in saved]
    try:
        for key in progress(new, "reading clips"):
            try:
                known[key] = embed_clip(model, os.path.join(folder, clips[key]))
            except VideoError as error:
                print(printable(f"cannot be read: {error}"))
    finally:                                                # also after Ctrl-C
        if known.keys() - saved.keys():
            save_embeddings(path, saved | known)
    if not known:
        raise UserError(f"none of the {len(clips)} clips in {folder} can be read")
    return known


def embed_clip(model, file):
    """The unit vector of one view: T frames from the middles of equal parts of the clip."""
    def pick(times):
        return frame_indices(len(times), model.config.frames, "eval")

    frames = read_frames(file, pick, model.config.image).to(model.pixel_mean.device)
    return F.normalize(model.encode_video(frames[None])[0], dim=0).cpu().numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "folder", "text"):
        parser.add_argument(name, metavar=name.upper())
    args = parser.parse_args()
    model, checkpoint = load_model(args.run)
    if model.config.width == SIZES["toy"].width:
        torch.set_num_threads(1)                            # its matrices are too small to share
    if "contrast" not in model.task_heads:
        raise UserError(f"{checkpoint['path']} has no contrast head; train one: python train.py "
                        "--task retrieval")
    device = pick_device(None)
    model.to(device)
    with open(checkpoint["path"], "rb") as file:
        clips = list_clips(args.folder, hashlib.file_digest(file, "sha256").hexdigest())
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])
    ids = tokenizer.encode(args.text, model.config.text_length)
    path = f"{os.path.abspath(args.folder)}.embeddings.npz"
    with torch.inference_mode():
        known = embed_folder(model, args.folder, clips, path)
        text = model.encode_text(torch.tensor([ids], device=device))[0]
    cosines = np.stack(list(known.values())) @ F.normalize(text, dim=0).cpu().numpy()
    if not np.isfinite(cosines).all():
        raise UserError(f"cosines are not finite; {checkpoint['path']} is of no use")
    print(printable(f"{len(known)} clips, {path} keeps their embeddings; cosine, name:"))
    names = [clips[key] for key in known]
    for n in np.argsort(-cosines, kind="stable")[:10]:
        print(printable(f"{cosines[n]:7.3f}  {names[n]}"))


if __name__ == "__main__":
    run_main("search.py", main)
