"""The toy world: coloured shapes that move, turn another colour, grow and shrink, written to disk as real videos in the
official files and folders of each dataset, so that the code that reads MSRVTT reads the toy.

    python toy.py data/toy                  write every dataset that is not there yet; contact sheets beside them
    python toy.py data/toy --only msrvtt    one of them

Some questions need one frame (what color, what shape), some need time (which way, which color comes last, what happens
first). A scene and its reverse are equally likely, so whoever ignores the order of frames is right on those half of the
time at best: the order-blind ceiling.
"""
import argparse
import csv
import itertools
import json
import os
import shutil
import string
import tempfile
import threading
import zlib
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import av
import numpy as np
import tokenizers
from tqdm import tqdm

from allinone import UserError, run_main, writing
from data import BENCHMARKS, crop, encode_picture, find_media, load_split, pick_frames, read_frames, tint, wordpiece

# ---- scenes ---------------------------------------------------------------------------------------------------------

COLORS = {"red": (222, 48, 44), "green": (58, 178, 72), "blue": (48, 88, 228), "yellow": (240, 218, 60),
          "purple": (168, 66, 200), "white": (242, 242, 242)}
GROUNDS = {"black": (16, 16, 20), "gray": (98, 98, 104), "brown": (104, 66, 30), "navy": (16, 26, 92)}
SHAPES = ("square", "ring", "triangle", "cross")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
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
    """What is seen: the first thing acts, in one event or in two, one after the other; others, if any, stay still.
    An event is ("moves", way), ("turns", color), ("grows",) or ("shrinks",).

    Who moves goes once around: what leaves the picture on one side comes in on the other. A sum over frames, each seen
    on its own, then tells little about the way, whatever it knows of where and when; two frames seen together tell all.
    """
    things: tuple
    events: tuple
    ground: str

    def spans(self):
        """When each event takes place, in shares of the clip. Two are around its thirds: three frames, one out of each
        third, then show before, between and after. One turn is early or late, the reverse the other way round, lest
        the color of the middle frame give away the last."""
        early, late = (0.28, 0.38), (0.62, 0.72)
        if len(self.events) == 2:
            return early, late
        if self.events and self.events[0][0] == "turns":
            return (early if self.things[0].color < self.events[0][1] else late,)
        return ((0.0, 1.0),)

    def at(self, when):
        """The things as they are at `when`, 0 to 1."""
        actor = self.things[0]
        for event, (start, end) in zip(self.events, self.spans()):
            done = min(1.0, max(0.0, (when - start) / (end - start)))
            match event:
                case ("moves", way):                        # in three hops of a third of the picture, with rests
                    (dx, dy), (third, inside) = WAYS[way], divmod(3 * done, 1)
                    hops = third + min(0.5, max(0.0, (inside - 0.85) / 0.3)) + min(0.5, inside / 0.3)
                    gone = 2 / 3 * hops                     # half widths: 2 are once around
                    actor = replace(actor, x=actor.x + dx * gone, y=actor.y + dy * gone)
                case ("turns", color):
                    actor = replace(actor, color=color if done >= 0.5 else actor.color)
                case ("grows",):
                    actor = replace(actor, size=actor.size * (1 + 0.7 * done))
                case ("shrinks",):
                    actor = replace(actor, size=actor.size / 1.7 * (1 + 0.7 * (1 - done)))
        return (actor, *self.things[1:])

    def reverse(self):
        """The scene played backwards."""
        events, actor = [], self.at(1)[0]
        before = self.things[0].color
        for event in self.events:
            if event[0] == "turns":
                events.insert(0, ("turns", before))
                before = event[1]
            else:
                events.insert(0, tuple(OPPOSITE.get(w, w) for w in event))
        return Scene((actor, *self.things[1:]), tuple(events), self.ground)


def make_scene(rng, events=None):
    """A random scene; `events` fixes how many. Every scene is as likely as its reverse."""
    pick = lambda names: str(rng.choice(list(names)))
    if (events or 1 + (rng.random() < 0.15)) == 2:
        kinds = ["turns", "turns"] if rng.random() < 0.5 else rng.permutation(["turns", "sizes"])
    else:
        kinds = rng.choice(["moves", "turns", "sizes"], 1, p=[0.8, 0.1, 0.1])
    (color, *others), (x, y), size, acts = rng.permutation(list(COLORS)).tolist(), rng.uniform(-0.15, 0.15, 2), 0.42, []
    for kind in kinds:
        if kind == "moves":
            way = pick(WAYS)
            # About half begin in the middle, so that one frame hints at the way: else learning to compare frames takes
            # several times as long. Who begins in the middle also ends there, so the reverse is as likely.
            side = rng.choice([0, 1, -1], p=[0.48, 0.26, 0.26])
            start = 2 / 3 * side + rng.uniform(-0.06, 0.06)
            x, y = (start, y) if way in ("left", "right") else (x, start)
            acts.append(("moves", way))
        elif kind == "turns":
            acts.append(("turns", others[len(acts)]))
        else:
            grows = rng.random() < 0.5
            size = 0.32 if grows else 0.32 * 1.7
            acts.append(("grows",) if grows else ("shrinks",))
    return Scene((Thing(pick(SHAPES), color, float(x), float(y), size),), tuple(acts), pick(GROUNDS))


def render(scene, when, width, height):
    """The scene at `when` as a uint8 picture (height, width, 3)."""
    scale = min(width, height) / 2                          # pixels per half width of the central square
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (x + 0.5 - width / 2) / scale, (y + 0.5 - height / 2) / scale
    picture = np.full((height, width, 3), GROUNDS[scene.ground], np.float32)
    for thing in scene.at(when):
        u, v = (((a + 1) % 2 - 1) / thing.size for a in (x - thing.x, y - thing.y))         # around the edges
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
    shape, color, ask = actor.shape, actor.color, []
    if "turns" in verbs:
        ask += [("which color comes first?", color), ("which color comes last?", scene.at(1)[0].color)]
    elif "moves" not in verbs or scene.ground == "black":             # easy: asked less often
        ask += [(f"what color is the {shape}?", color)]
    if verbs == ["turns", "turns"]:
        ask += [(f"what happens {when}?", f"it {say(scene.events[1])}")
                for when in (f"after it {say(scene.events[0])}", "last")]
    elif len(verbs) == 2:
        ask += [("what happens first?", f"it {verbs[0]}"), ("what happens last?", f"it {verbs[1]}")]
    elif scene.ground != "brown":
        ask += [("what shape is it?", shape)]
    if "moves" in verbs:
        ask += [(f"which way does the {thing} move?", scene.events[0][1]) for thing in (shape, color)]
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
            if codec == "gif":                              # 3, 3 and 2 bits, without the dithering of FFmpeg
                bits = (picture >> np.uint8([5, 5, 6])) @ np.uint8([32, 4, 1])
                frame = av.VideoFrame.from_ndarray(bits, format="rgb8")
            else:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def random_look(rng):
    """Frame rate, length and size of a clip: they vary as in real collections."""
    fps, seconds = int(rng.choice([10, 12, 15, 24, 30])), float(rng.uniform(1.5, 3))
    height = int(rng.choice([48, 52, 56]))
    return dict(fps=fps, seconds=seconds, width=height + int(rng.choice([0, 2, 4])), height=height)


# ---- longer clips and still pictures --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Film:
    """Scenes on one ground, one after another, as in long videos."""
    scenes: tuple
    ground: str

    def at(self, when):
        k = min(int(when * len(self.scenes)), len(self.scenes) - 1)
        return self.scenes[k].at(when * len(self.scenes) - k)


@dataclass(frozen=True)
class Stepwise(Scene):
    """A scene whose event is done in so many steps, with a rest after each."""
    steps: int

    def at(self, when):
        done, step = divmod(when * self.steps, 1)
        return super().at((done + min(1, max(0, 2 * step - 0.5))) / self.steps)


def make_films(clips, length, fps, seconds):
    """Films of `length` clips, each for so many seconds: [(scenes, (film, look))]."""
    for i in range(0, len(clips), length):
        (first, look), *_ = part = clips[i:i + length]
        scenes = tuple(replace(scene, ground=first.ground) for scene, _ in part)
        yield scenes, (Film(scenes, first.ground), look | {"fps": fps, "seconds": seconds * len(scenes)})


CORNERS = {"top left": (-0.45, -0.45), "top right": (0.45, -0.45),
           "bottom left": (-0.45, 0.45), "bottom right": (0.45, 0.45)}


def make_still(rng):
    """Two or three things of different colors in different corners: (scene, look, the things' corners)."""
    count = int(rng.integers(2, 4))
    colors, shapes = rng.choice(list(COLORS), count, replace=False), rng.choice(SHAPES, count)
    where = rng.choice(list(CORNERS), count, replace=False).tolist()
    things = tuple(Thing(str(s), str(c), *CORNERS[w], 0.33) for s, c, w in zip(shapes, colors, where))
    return Scene(things, (), str(rng.choice(list(GROUNDS)))), dict(fps=1, seconds=1, width=96, height=80), where


def deed(event):
    """The bare verb: "move left"."""
    return " ".join([event[0][:-1], *event[1:]])


def deeds(scene):
    return " and then ".join(map(say, scene.events))


def retell(scene):
    """Three captions. The last names neither color nor shape: only the events tell it from others."""
    actor = scene.things[0]
    return [caption(scene), f"there is a {actor.color} {actor.shape}, it {deeds(scene)}", f"something {deeds(scene)}"]


def sentences(scene):
    """The scene as a paragraph."""
    actor, (first, *later) = scene.things[0], map(say, scene.events)
    return [f"a {actor.color} {actor.shape} {first}.", *(f"then it {event}." for event in later),
            f"the ground is {scene.ground}."]


# ---- what the writers of the datasets share -------------------------------------------------------------------------

CODECS = {".mp4": "mpeg4", ".avi": "mpeg4", ".mkv": "mpeg4", ".webm": "libvpx", ".gif": "gif"}
RAW = dict(delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
HEX, YOUTUBE = "0123456789abcdef", string.ascii_letters + string.digits + "-_"


def clip_of(seed, number, events=None):
    """Clip `number` of the world `seed`: its scene and its look, whoever asks and in whatever order."""
    rng = np.random.default_rng((seed, number))
    return make_scene(rng, events), random_look(rng)


def shoot(job):
    """Encode one clip; its path names the form: a video, a .jpg, or a folder of jpgs that count from 1."""
    path, scene, look = job
    if path.suffix in CODECS:
        return write_video(path, scene, codec=CODECS[path.suffix], **look)
    for i, when in enumerate(np.linspace(0, 1, round(look["fps"] * look["seconds"])), 1):
        picture = render(scene, when, look["width"], look["height"])
        file = path if path.suffix else path / f"{i:05d}.jpg"
        file.write_bytes(encode_picture(picture, file.suffix))


class Studio:
    """What the writer of a dataset works with: its folder, scenes that are its alone (from number `first` on), chance,
    and `each`, a map that runs in several processes. `share` scales all counts."""

    def __init__(self, folder, first, seed, share, each):
        self.folder, self.seed, self.share, self.each = folder, seed, share, each
        self.numbers, self.rng = itertools.count(first), np.random.default_rng((seed, first, 1))

    def some(self, count):
        return max(2, 2 * round(count * self.share / 2))

    def clips(self, count, events=None, pairs=False, wanted=lambda scene: True):
        """The next clips, [(scene, look)]. With `pairs`, each comes with its reverse, and all have different captions:
        who is blind to order is right on half of them at best."""
        chosen, told = [], set()
        while len(chosen) < self.some(count):
            scene, look = clip_of(self.seed, next(self.numbers), events)
            if wanted(scene) and caption(scene) not in told:
                both = (scene, scene.reverse())[:1 + pairs]
                chosen += [(s, look) for s in both]
                told.update(caption(s) for s in both if pairs)
        return chosen

    def acts(self, count):
        """([act], [clip]), so many of each act. None to the left or right: training mirrors these sets' clips."""
        acts = ["move up", "move down", "grow", "shrink", *(f"turn {color}" for color in COLORS)] * self.some(count)
        chosen = []
        while acts:
            clip = clip_of(self.seed, next(self.numbers), 1)
            if (act := deed(clip[0].events[0])) in acts:
                acts.remove(act)
                chosen.append((act, clip))
        return zip(*chosen)

    def stills(self, count):
        """({caption: (scene, look, the things' corners)}, [(scene, look)])"""
        stills = {}
        while len(stills) < self.some(count):
            scene, look, where = make_still(self.rng)
            text = " and ".join(f"a {thing.color} {thing.shape} at the {w}" for thing, w in zip(scene.things, where))
            stills[text] = scene, look, where
        return stills, [still[:2] for still in stills.values()]

    def shoot(self, paths, clips):
        """Encode the clips as these files below the dataset's folder. -> their names without folder and suffix"""
        paths = [self.folder / path for path in paths]
        for folder in {path.parent if path.suffix else path for path in paths}:
            folder.mkdir(parents=True, exist_ok=True)
        for _ in self.each(shoot, [(path, *clip) for path, clip in zip(paths, clips)]):
            pass
        return [path.stem for path in paths]

    def save(self, name, rows, **dialect):
        """One file of annotations; its suffix names the form."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            if path.suffix == ".json":
                json.dump(rows, file)
            elif path.suffix == ".jsonl":
                file.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                csv.writer(file, **{"lineterminator": "\n", **dialect}).writerows(rows)

    def id(self, letters, length):
        return "".join(self.rng.choice(list(letters), length))

    def options(self, right, wrong, draw, A=5):
        """(A different options in random order, the place of the right one): it, these wrong ones, draw()s."""
        texts = dict.fromkeys([right, *wrong])
        while len(texts) < A:
            texts[str(draw())] = None
        order = self.rng.permutation(A).tolist()
        return [list(texts)[i] for i in order], order.index(0)

    def captions(self, clips, tell=caption, A=5):
        """[(options, answer)]: each clip's caption among others, of which one is always that of the reversed clip."""
        draw = lambda: tell(make_scene(self.rng))
        return [self.options(tell(scene), [tell(scene.reverse())], draw, A) for scene, _ in clips]

    def asked(self, clips, first, ids):
        """The rows of MSRVTT-QA and MSVD-QA; clips are numbered from `first`."""
        return [{"answer": answer, "category_id": n % 20, "id": next(ids), "question": question, "video_id": n}
                for n, (scene, _) in enumerate(clips, first) for question, answer in questions(scene)]


# ---- datasets, in their owners' layout ------------------------------------------------------------------------------

def write_msrvtt(s):
    """Questions; retrieval 1k-A, captions of all clips in one file; multiple choice. Numbers in the official ranges."""
    ids, told = itertools.count(), []
    for split, first, count in (("train", 0, 5000), ("val", 6513, 200), ("test", 7010, 500)):
        clips = s.clips(count, pairs=split == "test")
        names = s.shoot((f"videos/all/video{first + i}.mp4" for i in range(len(clips))), clips)
        s.save(f"{split}_qa.json", s.asked(clips, first, ids))
        told += [{"video_id": name, "caption": text} for name, (c, _) in zip(names, clips) for text in retell(c)]
    s.save("MSRVTT_data.json", {"sentences": [row | {"sen_id": i} for i, row in enumerate(told)]})
    s.save("MSRVTT_JSFUSION_test.csv", [("key", "vid_key", "video_id", "sentence"), *(
        (f"ret{i}", f"msr{first + i}", name, caption(c)) for i, (name, (c, _)) in enumerate(zip(names, clips)))])
    s.save("msrvtt_mc_test.jsonl", [{"qid": i, "clip_name": name, "options": options, "answer": answer}
                                    for i, (name, (options, answer)) in enumerate(zip(names, s.captions(clips)))])


def write_msvd(s):
    """Clips are numbered in the questions; their files have YouTube names, with a start and an end."""
    ids, mapping = itertools.count(), []
    for split, count in (("train", 2400), ("val", 200), ("test", 400)):
        clips, first = s.clips(count, pairs=split == "test"), len(mapping) + 1
        names = s.shoot([f"YouTubeClips/{s.id(YOUTUBE, 11)}_5_15.avi" for _ in clips], clips)
        mapping += [(name, f"vid{n}") for n, name in enumerate(names, first)]
        s.save(f"{split}_qa.json", s.asked(clips, first, ids))
    s.save("youtube_mapping.txt", mapping, delimiter=" ")


def write_tgif(s):
    """Tables of tabs and CRLF whose `vid_id` is the question's id, `key` the gif's. Action: what is done several times;
    transition: what comes after the start, before the end; frameqa: a word of type object, number, color, location."""
    ways = [*(f"move {way}" for way in WAYS), "grow", "shrink"]
    turns = [f"turn {color}" for color in COLORS]
    types, keys = (SHAPES, ("one", "two"), {**COLORS, **GROUNDS}, WAYS), itertools.count(1)
    for split, count in (("Train", 1800), ("Test", 300)):
        once = s.clips(count, 1, split == "Test", wanted=lambda scene: scene.events[0][0] != "turns")
        steps = s.rng.integers(2, 4, len(once) // 2).repeat(2).tolist()                         # the same in a pair
        clips = [(Stepwise(c.things, c.events, c.ground, n), look) for (c, look), n in zip(once, steps)]
        clips += s.clips(count, 2, split == "Test", wanted=lambda scene: scene.events[0][0] != scene.events[1][0])
        gifs = s.shoot([f"gifs/tumblr_{s.id(YOUTUBE[:62], 17)}o1_250.gif" for _ in clips],
                       [(scene, look | {"fps": 10, "seconds": 1.6}) for scene, look in clips])
        action, transition, frame = [], [], []
        for gif, (scene, _), key in zip(gifs, clips, keys):
            shape, there, back = scene.things[0].shape, *([*map(deed, c.events)] for c in (scene, scene.reverse()))
            has = "how many colors does it have?", "two" if "turn" in str(there) else "one"
            for question, answer in [has, *(pair for pair in questions(scene) if not pair[1].startswith("it "))]:
                kind = next(i for i, names in enumerate(types) if answer in names)
                number = f"FRAMEQA{len(frame) + 1}"
                frame.append((gif, question.replace("?", " ?"), answer, kind, number, key, caption(scene)))
            if len(there) == 1:
                options, answer = s.options(there[0], back, partial(s.rng.choice, ways))
                question = f"What does the {shape} do {scene.steps} times ?"
                action.append((gif, question, *options, answer, f"ACTION{len(action) + 1}", key))
                continue
            for when, right, wrong in (("after start", *there), ("before stop", *reversed(there))):
                options, answer = s.options(right, [wrong, *back], partial(s.rng.choice, ways + turns))
                question = f"What does the {shape} do {when} ?"
                transition.append((gif, question, *options, answer, f"TRANS{len(transition) + 1}", key))
        five = ("gif_name", "question", "a1", "a2", "a3", "a4", "a5", "answer", "vid_id", "key")
        word = ("gif_name", "question", "answer", "type", "vid_id", "key", "description")
        tables = {"action": [five, *action], "transition": [five, *transition], "frameqa": [word, *frame]}
        for name, rows in tables.items():
            s.save(f"{split}_{name}_question.csv", rows, delimiter="\t", lineterminator="\r\n")


def write_tvqa(s):
    """Folders of jpgs at 3 per second, counted from 1; those of The Big Bang Theory have names without a prefix.
    A clip is three scenes long and a question is about the seconds `ts`; the first row has none."""
    shows, ids = ("bbt", "castle", "friends", "grey", "house", "met"), itertools.count()
    for season, (split, count) in enumerate((("train", 3000), ("val", 360)), 1):
        clips, films, rows = s.clips(count, pairs=split == "val"), {}, []
        tell = lambda scene: f"it {deeds(scene)}"
        for n, (scenes, film) in enumerate(make_films(clips, 3, fps=3, seconds=3)):
            name = f"{shows[n % 6]}_s{season:02d}e{n // 6:02d}_seg02_clip_00".removeprefix("bbt_")
            films[f"frames_hq/{shows[n % 6]}_frames/{name}"] = film
            for k, scene in enumerate(scenes):
                looks = [scene.at(when)[0].color for when in (0, 1)]
                draw = partial(s.rng.choice, list(COLORS))
                ask = [(q, *s.options(a, looks, draw)) for q, a in questions(scene) if a in COLORS]
                ask.append((f"what does the {scene.things[0].shape} do?", *s.captions([(scene, None)], tell)[0]))
                rows += [{"qid": next(ids), "q": question, **{f"a{i}": text for i, text in enumerate(options)},
                          "answer_idx": answer, "ts": f"{3 * k + 0.4:.2f}-{3 * k + 2.9:.2f}", "vid_name": name,
                          "show_name": shows[n % 6]} for question, options, answer in ask]
        if split == "train":
            rows[0]["ts"] = "NaN-NaN"
        s.shoot(films, films.values())
        s.save(f"tvqa_{split}.jsonl", rows)


def write_didemo(s):
    """A row per sentence; some clips are spelled with an extension and with a bare dot; all are .mp4 on disk."""
    for split, count in (("train", 2400), ("val", 200), ("test", 400)):
        clips, rows = s.clips(count, 2, pairs=split != "train"), []
        names = [f"{s.id('123456789', 8)}@N00_{s.id('123456789', 10)}_{s.id(HEX, 10)}" for _ in clips]
        s.shoot((f"video/{name}.mp4" for name in names), clips)
        for n, (name, (scene, _)) in enumerate(zip(names, clips)):
            rows += [{"num_segments": 6, "description": text, "times": [[k, k]] * 4, "annotation_id": len(rows) + k,
                      "dl_link": f"https://www.flickr.com/video_download.gne?id={name.split('_')[1]}",
                      "video": name + ("." if k and n % 9 == 0 else (".mov", ".avi", ".mpg")[n % 3])}
                     for k, text in enumerate(sentences(scene))]
        s.save(f"{split}_data.json", rows)


def write_activitynet(s):
    """Paragraphs whose sentences begin with blanks; three kinds of files."""
    for split, count in (("train", 2400), ("val_1", 400)):
        clips = s.clips(count, 2, pairs=split != "train")
        forms = itertools.cycle(("mp4", "mkv", "webm"))
        names = s.shoot([f"videos/v_{s.id(YOUTUBE, 11)}.{form}" for form, _ in zip(forms, clips)], clips)
        s.save(f"{split}.json", {
            name: {"duration": look["seconds"], "timestamps": [[0, look["seconds"]] for _ in sentences(scene)],
                   "sentences": [" " * k + text for k, text in enumerate(sentences(scene))]}
            for name, (scene, look) in zip(names, clips)})


def write_lsmdc(s):
    """Tabs without header or quoting (some texts begin with a stray quote); the right option is the first in training,
    and in the test the one whose number, from 1, comes last."""
    clock = lambda t: f"{t // 3600:02d}.{t // 60 % 60:02d}.{t % 60:02d}.{t * 37 % 1000:03d}"
    movies, seconds = ("0001_Toy_World", "1002_THE_00_RINGS", "3003_SQUARES"), itertools.count(0, 3)
    for file, choices, count in (("annos_training", "train", 2400), ("annos_val", "valid", 200),
                                 ("challenge_1000_publictect", "test_randomized", 400)):
        clips, told, asked = s.clips(count, pairs=choices != "train"), [], []
        times = [(movies[t % 9 // 3], clock(t), clock(t + 2)) for t, _ in zip(seconds, clips)]
        names = s.shoot((f"avi/{movie}/{movie}_{start}-{end}.avi" for movie, start, end in times), clips)
        rows = zip(names, times, clips, s.captions(clips))
        for n, (name, (_, *span), (scene, _), (options, answer)) in enumerate(rows):
            row, quote = (name, *span, *span), '"' * (n // 2 % 8 == 0)
            told += [(*row, quote + text) for text in retell(scene)[:2 if choices == "train" else 1]]
            if choices != "test_randomized":
                options.insert(0, options.pop(answer))
            asked.append((*row, *(quote + text for text in options), *[answer + 1] * (choices == "test_randomized")))
        s.save(f"LSMDC16_{file}.csv", told, **RAW)
        s.save(f"LSMDC16_multiple_choice_{choices}.csv", asked, **RAW)


def write_ego4d(s):
    """Long videos, told about by frame number, 120 frames for each scene; the test's cells are Python literals."""
    tell = lambda scene: f"#C C sees that it {deeds(scene)}"
    for split, count in (("train", 1500), ("test", 240)):
        clips, films, train, test = s.clips(count, pairs=split == "test"), {}, [], [("question", "answers")]
        asked = iter(s.captions(clips, tell, A=4))
        for scenes, film in make_films(clips, 15, fps=30, seconds=4):
            uid = "-".join(s.id(HEX, n) for n in (8, 4, 4, 4, 12))
            films[f"videos/{uid}.mp4"] = film
            for k, (scene, (options, _)) in enumerate(zip(scenes, asked)):
                frame = 120 * k + 60
                train.append((uid, "narration_pass_1", k, 120 * len(scenes), frame / 30, frame, tell(scene)))
                test.append(((uid, frame, tell(scene)), [(uid, frame, text) for text in options]))
        s.shoot(films, films.values())
        if split == "train":
            s.save("ego4d_train_subset.csv", train, delimiter="\t")
        else:
            s.save("mc_val.csv", test)


def write_vcr(s):
    """Pictures whose metadata hold the boxes; objects are named by their place in a list, from 0. Asked for the color,
    the corner is the reason, and the other way round."""
    for split, count in (("train", 2400), ("val", 300)):
        (stills, clips), rows, folder = s.stills(count), [], "lsmdc_1054_Toy_World"
        names = s.shoot((f"vcr1images/{folder}/1054_Toy_World_{split}_{n}@0.jpg" for n, _ in enumerate(clips)), clips)
        for name, (scene, look, where) in zip(names, stills.values()):
            w, h, objects = look["width"], look["height"], [thing.shape for thing in scene.things]
            s.save(f"vcr1images/{folder}/{name}.json", {
                "names": objects, "width": w, "height": h, "segms": [[] for _ in objects],
                "boxes": [[side + h / 2 * (at + sign * thing.size) for sign in (-1, 1) for side, at in (
                    (w / 2, thing.x), (h / 2, thing.y))] + [1.0] for thing in scene.things]})
            i, j = s.rng.permutation(len(objects))[:2].tolist()
            tints, draw = [thing.color for thing in scene.things], partial(s.rng.choice, list(COLORS))
            colors, color = s.options(tints[i], tints, draw, 4)
            corners, corner = s.options(where[i], CORNERS, None, 4)
            colors = [[[i], "is", text, "."] for text in colors], color
            corners = [[[i], "is", "at", "the", *text.split(), "."] for text in corners], corner
            for question, (answers, answer), (reasons, reason) in (
                    (["what", "color", "is", [i], "next", "to", [j], "?"], colors, corners),
                    (["where", "is", [i], "?"], corners, colors)):
                rows.append({"movie": folder, "objects": objects, "img_fn": f"{folder}/{name}.jpg",
                             "metadata_fn": f"{folder}/{name}.json", "annot_id": f"{split}-{len(rows)}",
                             "question": question, "answer_choices": answers, "answer_label": answer,
                             "rationale_choices": [["because", *text] for text in reasons], "rationale_label": reason})
        s.save(f"{split}.jsonl", rows)


def write_webvid(s):
    """Captions in quoted cells, some of several lines; some rows name no clip."""
    for split, count in (("train", 4000), ("val", 300)):
        clips, page = s.clips(count, pairs=split == "val"), "000001_000050"
        names = s.shoot((f"videos/{page}/10{split == 'val':d}{n:05d}.mp4" for n, _ in enumerate(clips)), clips)
        texts = [retell(scene)[n % 3 * (split == "train")] for n, (scene, _) in enumerate(clips)]
        s.save(f"results_2M_{split}.csv", [("videoid", "contentUrl", "duration", "page_dir", "name"), *(
            (name, f"https://example.org/{name}", "PT00H00M02S", page, text.replace(" ", "\n") if n % 9 == 0 else text)
            for n, (name, text) in enumerate(zip(names, texts))), (7, "https://example.org/7", "", "NaN", "NaN")])


def write_howto100m(s):
    """Long videos with narrations by the second, in a table each; small words are left out; some videos are silent."""
    films = {f"videos/{s.id(YOUTUBE, 11)}.mp4": film for film in make_films(s.clips(2000), 6, fps=8, seconds=5)}
    names = s.shoot(films, [clip for _, clip in films.values()])
    for n, (name, (scenes, _)) in enumerate(zip(names, films.values())):
        texts = [" ".join(w for w in caption(scene).split() if w not in ("a", "and", "then", "on")) for scene in scenes]
        if n % 16 != 15:
            s.save(f"howto100m_captions/{name}.csv", [("start", "end", "text"), *(
                (5 * k + 0.31, 5 * k + 4.7, text) for k, text in enumerate(texts))])
    s.save("HowTo100M_v1.csv", [("video_id", "category_1", "category_2", "rank", "task_id"), *(
        (name, "Toys", "Shapes", n, 7) for n, name in enumerate(names))])


def write_cc3m(s):
    """Captions and urls, without a header; a picture's name is the crc32 of its url."""
    for table, folder, count in (("Train_GCC-training", "training", 3000),
                                 ("Validation_GCC-1.1.0-Validation", "validation", 300)):
        stills, clips = s.stills(count)
        urls = [f"https://example.org/{folder}/{n}.jpg" for n, _ in enumerate(clips)]
        s.shoot((f"{folder}/{zlib.crc32(url.encode())}.jpg" for url in urls), clips)
        s.save(f"{table}.tsv", zip(stills, urls), **RAW)


def write_hmdb51(s):
    """A folder and a list per class: 1 train, 2 test, 0 neither; file names with brackets and commas."""
    lists = defaultdict(list)
    for use, count in ((1, 200), (2, 40), (0, 2)):
        acts, clips = s.acts(count)
        acts = [act.replace(" ", "_") for act in acts]
        names = s.shoot((f"hmdb51/{act}/Toy_[{n}]_(so,_&_on)!_{act}_f_cm_np1_ba_bad_{use}.avi"
                         for n, act in enumerate(acts)), clips)
        for act, name in zip(acts, names):
            lists[act].append((f"{name}.avi", use))
    for act, rows in lists.items():
        s.save(f"testTrainMulti_7030_splits/{act}_test_split1.txt", rows, delimiter=" ")


def write_k400(s):
    """A table of labels with blanks; folders of classes with underscores, files with start and end in six digits."""
    for split, count in (("train", 200), ("val", 40)):
        acts, clips = s.acts(count)
        ids = [s.id(YOUTUBE, 11) for _ in acts]
        s.shoot((f"{split}/{act.replace(' ', '_')}/{name}_000005_000015.mp4" for act, name in zip(acts, ids)), clips)
        s.save(f"kinetics-400_{split}.csv", [("label", "youtube_id", "time_start", "time_end", "split", "is_cc"), *(
            (act, name, 5, 15, split, 0) for act, name in zip(acts, ids))])


DATASETS = {"msrvtt": write_msrvtt, "msvd": write_msvd, "tgif": write_tgif, "tvqa": write_tvqa, "didemo": write_didemo,
            "activitynet": write_activitynet, "lsmdc": write_lsmdc, "ego4d": write_ego4d, "vcr": write_vcr,
            "webvid": write_webvid, "howto100m": write_howto100m, "cc3m": write_cc3m, "hmdb51": write_hmdb51,
            "k400": write_k400}

# ---- beside the data ------------------------------------------------------------------------------------------------

WORDS = """a and then next to is it the there that which what way where how many color colors have ground on shape comes
    first last moves move turns turn grows grow shrinks shrink changes happens does do after before start stop times at
    top bottom left right up down something sees because one two person doing options answer""".split()
TIMED = ("which way", "which color comes", "what happens", "what does")


def write_tokenizer(folder):
    """The world's WordPiece, the same for all datasets so that checkpoints can be exchanged, saved beside the data:
    every word of the world, and single characters for whatever else is asked."""
    special, letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], string.ascii_lowercase + string.digits
    known = [*special, *letters, *string.punctuation, *(f"##{c}" for c in letters), *WORDS, *COLORS, *GROUNDS, *SHAPES]
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys(known))}
    tokenizer = wordpiece(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_order_blind(folder, name):
    """What a model blind to the order of frames can reach on the test, by kind of question. The reversed clip shows the
    same frames, is as likely, and has another answer where the question is TIMED, or where there is none (captions,
    actions): half of these at best."""
    shares = defaultdict(list)
    for benchmark, b in BENCHMARKS.items():
        if b.dataset == name and b.task in ("vqa", "choice", "action"):
            for e in load_split(benchmark, str(folder), "test"):
                shares[e.kind].append(0.5 if not e.text or e.text.lower().startswith(TIMED) else 1.0)
    means = {kind: sum(some) / len(some) for kind, some in shares.items()}
    (folder / "order_blind.json").write_text(json.dumps(means))


def die_with_parent():
    """In a pool's process: it would wait for work for ever if its parent were killed."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def write_world(root, only=DATASETS, seed=0, share=1):
    """Write the named datasets below root, each in one step: a folder is there whole or not at all.
    share: of the usual number of clips."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for name in only:
        if (root / name).exists():                          # whole: see the end of this loop
            continue
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        with (ProcessPoolExecutor(os.cpu_count(), get_context("fork"), die_with_parent) as pool,
              tqdm(desc=f"toy {name}", unit=" clips", disable=None) as bar):
            def each(make, jobs):
                bar.total = (bar.total or 0) + len(jobs)
                for made in pool.map(make, jobs, chunksize=4):
                    bar.update()
                    yield made
            try:
                DATASETS[name](Studio(work, 10 ** 6 * list(DATASETS).index(name), seed, share, each))
                write_tokenizer(work)
                write_order_blind(work, name)
                work.chmod(0o755)
                work.rename(root / name)
            except OSError:
                if not (root / name).is_dir():              # else another run has written the same meanwhile
                    raise
            finally:
                shutil.rmtree(work, ignore_errors=True)


def contact_sheet(root, name, count=8, T=3, side=80):
    """root/<name>.png: for each benchmark of a dataset a row of frames per clip; what is said about them is printed."""
    rows, folder = [], str(Path(root) / name)
    for benchmark in [benchmark for benchmark, b in BENCHMARKS.items() if b.dataset == name]:
        split = "test" if "test" in BENCHMARKS[benchmark].splits else "val"
        clips = {(e.media, e.seconds, e.frames): e for e in load_split(benchmark, folder, split)}
        for e in list(clips.values())[:count]:
            pick = partial(pick_frames, example=e, T=T, views=1, rng=None)
            frames = read_frames(find_media(folder, e.media), pick, None if e.boxes else side)
            frames = crop(tint(frames, e.boxes), side, (0.5, 0.5)) if e.boxes else frames
            rows.append(np.pad(frames.permute(2, 0, 3, 1), ((2, 2), (0, 0), (2, 2), (0, 0))).reshape(side + 4, -1, 3))
            answer = e.options[e.answer] if e.options else e.answer
            print(f"{benchmark:16s}", e.text or " ".join(e.captions), " | ".join(e.options),
                  *["->", answer] * (answer is not None))
    (Path(root) / f"{name}.png").write_bytes(encode_picture(np.concatenate(rows), ".png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder to write to, such as data/toy")
    parser.add_argument("--only", nargs="+", choices=DATASETS, default=list(DATASETS), metavar="NAME",
                        help=f"out of {' '.join(DATASETS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens in the clips (default 0)")
    args = parser.parse_args()
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: a number from 0 on is needed")
    with writing(args.root):
        for name in args.only:
            if (Path(args.root) / name).exists():
                print(f"{args.root}/{name} is there already and stays as it is; delete it to write it anew")
        write_world(args.root, args.only, args.seed)
        for name in args.only:
            contact_sheet(args.root, name)


if __name__ == "__main__":
    run_main("toy.py", main)
