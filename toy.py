"""The toy world: coloured shapes that move, turn another colour, grow and shrink, written to disk as real videos in the
official files and folders of each dataset, so that the code that reads MSRVTT reads the toy.

    python toy.py data/toy                  write every dataset that is not there yet; contact sheets beside them
    python toy.py data/toy --only msrvtt    one of them

Some questions need one frame (what color, what shape), some need time (which way, which color comes last, what happens
first). A scene and its reverse are equally likely, so whoever ignores the order of frames is right on those half of the
time at best: the order-blind ceiling.
"""
import argparse
import json
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import tokenizers
from tqdm import tqdm

from data import wordpiece

# ---- scenes ---------------------------------------------------------------------------------------------------------

COLORS = {"red": (222, 48, 44), "green": (58, 178, 72), "blue": (48, 88, 228), "yellow": (240, 218, 60),
          "purple": (168, 66, 200), "white": (242, 242, 242)}
GROUNDS = {"black": (16, 16, 20), "gray": (98, 98, 104), "brown": (104, 66, 30), "navy": (16, 26, 92)}
SHAPES = ("square", "ring", "triangle", "cross")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TRAVEL = 0.7                                                # how far a move goes, in half widths of the picture
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "grows": "shrinks", "shrinks": "grows"}


@dataclass(frozen=True)
class Thing:
    """One shape. Positions and sizes are in half widths of the picture: (-1, -1) top left, (1, 1) bottom right."""
    shape: str
    color: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """What is seen: the first thing acts, in one or two events; others, where there are any, stay still.
    An event is ("moves", way), ("turns", color), ("grows",) or ("shrinks",)."""
    things: tuple
    events: tuple
    ground: str

    def spans(self):
        """When each event takes place, in shares of the clip. With two, the middle third is quiet: three frames, one
        out of each third, then show before, between and after."""
        return ((0.08, 0.92),) if len(self.events) == 1 else ((0.17, 0.33), (0.67, 0.83))

    def at(self, when):
        """The things as they are at `when`, 0 to 1."""
        actor = self.things[0]
        for event, (start, end) in zip(self.events, self.spans()):
            done = min(1.0, max(0.0, (when - start) / (end - start)))
            match event:
                case ("moves", way):
                    dx, dy = WAYS[way]
                    actor = replace(actor, x=actor.x + TRAVEL * dx * done, y=actor.y + TRAVEL * dy * done)
                case ("turns", color):
                    actor = replace(actor, color=color if done >= 0.5 else actor.color)
                case ("grows",):
                    actor = replace(actor, size=actor.size * (1 + 0.7 * done))
                case ("shrinks",):
                    actor = replace(actor, size=actor.size / (1 + 0.7 * done))
        return (actor, *self.things[1:])

    def reverse(self):
        """The scene played backwards."""
        events, actor = [], self.at(1)[0]
        before = self.things[0].color
        for event in self.events:
            events.insert(0, ("turns", before) if event[0] == "turns" else tuple(OPPOSITE.get(w, w) for w in event))
        return Scene((actor, *self.things[1:]), tuple(events), self.ground)


def make_scene(rng, events=None):
    """A random scene; `events` fixes how many. Every scene is as likely as its reverse."""
    pick = lambda names: str(rng.choice(list(names)))
    color, shape = pick(COLORS), pick(SHAPES)
    kinds = rng.choice(["moves", "turns", "sizes"], events or int(rng.integers(1, 3)), replace=False, p=[0.5, 0.25, 0.25])
    acts, (x, y), size = [], rng.uniform(-0.2, 0.2, 2), 0.46
    for kind in kinds:
        if kind == "moves":
            way = pick(WAYS)
            dx, dy = WAYS[way]
            x, y = x * (dx == 0) - TRAVEL / 2 * dx, y * (dy == 0) - TRAVEL / 2 * dy         # room to arrive
            acts.append(("moves", way))
        elif kind == "turns":
            acts.append(("turns", pick([c for c in COLORS if c != color])))
        else:
            grows = rng.random() < 0.5
            size = 0.33 if grows else 0.33 * 1.7
            acts.append(("grows",) if grows else ("shrinks",))
    dx, dy = rng.uniform(-0.05, 0.05, 2)
    scene = Scene((Thing(shape, color, float(x + dx), float(y + dy), size),), tuple(acts), pick(GROUNDS))
    return scene.reverse() if rng.random() < 0.5 else scene


def render(scene, when, width, height):
    """The scene at `when` as a uint8 picture (height, width, 3)."""
    scale = min(width, height) / 2                          # pixels per half width of the central square
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (x + 0.5 - width / 2) / scale, (y + 0.5 - height / 2) / scale
    picture = np.full((height, width, 3), GROUNDS[scene.ground], np.float32)
    for thing in scene.at(when):
        u, v = (x - thing.x) / thing.size, (y - thing.y) / thing.size
        au, av_ = np.abs(u), np.abs(v)
        outside = {"square": lambda: np.maximum(au, av_) - 0.88, "ring": lambda: np.abs(np.hypot(u, v) - 0.72) - 0.28,
                   "triangle": lambda: np.maximum(v - 0.75, 0.87 * au - 0.5 * v - 0.52),
                   "cross": lambda: np.maximum(np.minimum(au, av_) - 0.33, np.maximum(au, av_) - 1)}[thing.shape]()
        cover = np.clip(0.5 - outside * thing.size * scale, 0, 1)[..., None]                # smooth edges
        picture += cover * (np.array(COLORS[thing.color], np.float32) - picture)
    return picture.round().astype(np.uint8)


# ---- what is said about a scene -------------------------------------------------------------------------------------

def say(event):
    match event:
        case ("moves", way): return f"moves {way}"
        case ("turns", color): return f"turns {color}"
        case (verb,): return verb


def caption(scene):
    actor = scene.things[0]
    return f"a {actor.color} {actor.shape} {' and then '.join(map(say, scene.events))} on a {scene.ground} ground"


def questions(scene):
    """[(question, answer)]; its first two words name the kind of a question."""
    actor, verbs = scene.things[0], [event[0] for event in scene.events]
    ask = [("what color is the ground?", scene.ground)]
    if "turns" in verbs:
        ask += [("what shape changes color?", actor.shape), ("which color comes first?", actor.color),
                ("which color comes last?", scene.at(1)[0].color)]
    else:
        ask += [(f"what color is the {actor.shape}?", actor.color), (f"what shape is {actor.color}?", actor.shape)]
    if "moves" in verbs:
        ask += [("which way does it move?", dict(e for e in scene.events if len(e) == 2)["moves"])]
    if len(verbs) == 2:
        ask += [("what happens first?", f"it {verbs[0]}"), ("what happens last?", f"it {verbs[1]}")]
    return ask


# ---- encoding -------------------------------------------------------------------------------------------------------

def write_video(path, scene, fps=15, seconds=2.0, width=64, height=64, codec="mpeg4", gop=12):
    """Encode the scene as a real video; the suffix of `path` names the container. The same bytes for the same scene."""
    frames = max(2, round(fps * seconds))
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb8" if codec == "gif" else "yuv420p"
        stream.bit_rate, stream.gop_size, stream.codec_context.thread_count = 600_000, gop, 1
        drawn = None
        for i in range(frames):
            things = scene.at(i / (frames - 1))
            if things != drawn:                             # nothing moves for much of many clips
                drawn, picture = things, render(scene, i / (frames - 1), width, height)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def random_look(rng):
    """Frame rate, length and size of a clip: they vary as in real collections."""
    return dict(fps=int(rng.choice([10, 12, 15, 24, 30])), seconds=float(rng.uniform(1.5, 3)),
                width=int(rng.choice([56, 60, 64])), height=int(rng.choice([48, 52, 56])))


# ---- datasets, in their owners' layout ------------------------------------------------------------------------------

def clip_of(seed, number):
    """Clip `number` of the world `seed`: its scene and its look, whoever asks and in whatever order."""
    rng = np.random.default_rng((seed, number))
    return make_scene(rng), random_look(rng)


def make_msrvtt_clip(folder, seed, number):
    scene, look = clip_of(seed, number)
    write_video(folder / f"videos/all/video{number}.mp4", scene, **look)
    return scene


def write_msrvtt(folder, seed, each):
    """train_qa.json, val_qa.json, test_qa.json and videos/all/video<id>.mp4; ids in the official ranges."""
    (folder / "videos/all").mkdir(parents=True)
    row = 0
    for split, first, count in (("train", 0, 6000), ("val", 6513, 250), ("test", 7010, 600)):
        numbers, rows = range(first, first + count), []
        for number, scene in zip(numbers, each(partial(make_msrvtt_clip, folder, seed), numbers)):
            for question, answer in questions(scene):
                rows.append({"answer": answer, "category_id": number % 20, "id": row, "question": question,
                             "video_id": number})
                row += 1
        (folder / f"{split}_qa.json").write_text(json.dumps(rows))
    write_order_blind(folder)


def write_order_blind(folder):
    """What a model blind to the order of frames can reach, by kind of question: a scene and its reverse show the same
    frames, are equally likely, and on these questions have different answers."""
    (folder / "order_blind.json").write_text(json.dumps({"which way": 0.5, "which color": 0.5, "what happens": 0.5}))


def write_tokenizer(folder, seed, scenes=3000):
    """The world's own WordPiece, the same for all datasets so that checkpoints can be exchanged, saved beside the data."""
    texts = []
    for number in range(scenes):
        scene = clip_of(seed, number)[0]
        texts += [caption(scene), *(text for pair in questions(scene) for text in pair)]
    tokenizer = wordpiece(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.train_from_iterator(sorted(set(texts)), tokenizers.trainers.WordPieceTrainer(
        vocab_size=400, show_progress=False, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    tokenizer.save(str(folder / "tokenizer.json"))


DATASETS = {"msrvtt": write_msrvtt}


def write_world(root, only=DATASETS, seed=0):
    """Write the named datasets below root, each in one step: a folder is there whole or not at all."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for name in only:
        if (root / name).exists():
            continue
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool, tqdm(desc=f"toy {name}", unit=" clips", disable=None) as bar:
            def each(make, numbers):
                bar.total = (bar.total or 0) + len(numbers)
                for made in pool.map(make, numbers, chunksize=16):
                    bar.update()
                    yield made
            try:
                DATASETS[name](work, seed, each)
                write_tokenizer(work, seed)
                work.rename(root / name)
            finally:
                shutil.rmtree(work, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--only", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_world(args.root, args.only, args.seed)


if __name__ == "__main__":
    main()
