"""The toy world: short clips of colored shapes that move, change color, grow or shrink.

    python tools/toy.py data/toy                      every benchmark
    python tools/toy.py data/toy --only msrvtt-qa     one of them

Clips and annotations are real files in the layout of each dataset's owners, below data/toy/owners/.
tools/prepare.py makes one manifest per benchmark of them, as it does for the real datasets.
"which-way" is one manifest more: the questions of msrvtt-qa about the direction of a movement.

A model must compare frames to answer questions about time. The toy keeps this honest:

- A scene and its reverse are equally likely. They show the same frames in opposite order, and their
  answers to questions about time differ. A model that ignores frame order gets at most half right.
  Each manifest states this ceiling in dataset.json: "order_blind", a share per question type.
- Test clips with questions or captions come in pairs, a clip and its reverse. The options of a
  question about time always hold the answer of the reversed clip.
- A shape moves once around the picture: what leaves on one side enters on the other. Both ways
  visit the same places, and all places are equally likely at all times. While it rests, as in the
  three frames of evaluation, one frame and its time tell nothing about the direction.
- The middle frame shows the last color as often as the first. A model that knows the time of each
  frame can find the last color in the last frame; a model without time cannot.
- Turns and sizes can be read from the last frame; a movement needs two frames together. So the test
  clips of retrieval, multiple choice and actions move.
- Captions are true. Of a short one ("it moves left") only the event is worth a guess.
"""
# The tools run from a checkout: the core is one folder up.
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import csv
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import string
import threading
import zlib
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from multiprocessing import get_context, parent_process

import av
import numpy as np

from allinone import UserError, progress, run_main
from data import BENCHMARKS, SPECIAL, wordpiece
from tools.prepare import prepare

# ---- scenes --------------------------------------------------------------------------------------

COLORS = {
    "red": (222, 48, 44),
    "green": (58, 178, 72),
    "blue": (48, 88, 228),
    "yellow": (240, 218, 60),
    "purple": (168, 66, 200),
    "white": (242, 242, 242)
}
GROUNDS = {
    "black": (16, 16, 20),
    "gray": (98, 98, 104),
    "brown": (104, 66, 30),
    "navy": (16, 26, 92)
}
SHAPES = ("square", "ring", "triangle", "cross")
CORNERS = {
    "top left": (-0.45, -0.45),
    "top right": (0.45, -0.45),
    "bottom left": (-0.45, 0.45),
    "bottom right": (0.45, 0.45)
}
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
REVERSE = {
    "moves left": "moves right",
    "moves right": "moves left",
    "moves up": "moves down",
    "moves down": "moves up",
    "grows": "shrinks",
    "shrinks": "grows"
}
GROWTH = 1.7


@dataclass(frozen=True)
class Sprite:
    """One shape, in half widths of the picture: (-1, -1) is top left, (1, 1) bottom right."""
    shape: str
    color: str
    x: float
    y: float
    size: float

    def after(self, event, done):
        """The sprite when the share `done` of an event (see Scene) is over."""
        verb, *rest = event.split()
        if verb == "moves":
            dx, dy = WAYS[rest[0]]
            # Three hops of a third of the way around, with rests: 2 half widths are once around.
            hops, inside = divmod(3 * done, 1)
            hops += min(0.5, max(0.0, (inside - 0.85) / 0.3))
            hops += min(0.5, inside / 0.3)
            way = 2 / 3 * hops
            return replace(self, x=self.x + dx * way, y=self.y + dy * way)
        if verb == "turns":
            return replace(self, color=rest[0]) if done >= 0.5 else self
        if verb == "grows":
            return replace(self, size=self.size * (1 + (GROWTH - 1) * done))
        return replace(self, size=self.size / GROWTH * (1 + (GROWTH - 1) * (1 - done)))


@dataclass(frozen=True)
class Scene:
    """What a clip shows: the first sprite, the actor, has one or two events; the others stay still.

    An event is "moves WAY", "turns COLOR", "grows" or "shrinks".
    """
    sprites: tuple
    events: tuple
    ground: str

    @property
    def actor(self):
        return self.sprites[0]

    def spans(self):
        """[(start, end)] of each event, as shares of the clip.

        Two events lie around the thirds: a frame of each third shows before, between and after. A
        movement takes the whole clip, and a turn may happen on its way.
        One turn is early or late, and its reverse late or early, so that the color of the middle
        frame does not reveal the last color.
        """
        early = (0.28, 0.38)
        late = (0.62, 0.72)
        if len(self.events) == 2 and not moves(self):
            return [early, late]
        # Early if the two colors are in alphabetical order: in the reverse they are not.
        spans = []
        for event in self.events:
            if event.startswith("turns"):
                spans.append(early if f"turns {self.actor.color}" < event else late)
            else:
                spans.append((0.0, 1.0))
        return spans

    def at(self, when):
        """The sprites at `when`, 0 (first frame) to 1 (last frame)."""
        actor = self.actor
        for event, (start, end) in zip(self.events, self.spans()):
            done = min(1.0, max(0.0, (when - start) / (end - start)))
            actor = actor.after(event, done)
        return (actor, *self.sprites[1:])

    def reverse(self):
        """The scene played backwards."""
        events = []
        color = self.actor.color
        for event in self.events:
            if event in REVERSE:
                events.insert(0, REVERSE[event])
            else:
                events.insert(0, f"turns {color}")
                color = event.split()[1]
        return replace(self, sprites=self.at(1), events=tuple(events))


@dataclass(frozen=True)
class Film:
    """Scenes of equal length on one ground, one after another, as in long videos."""
    scenes: list
    ground: str

    def at(self, when):
        k = min(int(when * len(self.scenes)), len(self.scenes) - 1)
        return self.scenes[k].at(when * len(self.scenes) - k)


def pick(rng, names):
    return str(rng.choice(list(names)))


def make_scene(rng, events=None):
    """A random scene; its reverse is equally likely.

    events: how many (None: mostly one), or a tuple of "moves", "turns" and "sizes".
    """
    if events is None:
        events = 1 + (rng.random() < 0.15)
    if isinstance(events, tuple):
        verbs = events
    elif events == 1:
        verbs = rng.choice(["moves", "turns", "sizes"], 1, p=[0.8, 0.1, 0.1])
    elif rng.random() < 0.5:
        verbs = ["turns", "turns"]
    else:
        verbs = rng.permutation(["turns", "sizes"])
    color, *others = rng.permutation(list(COLORS)).tolist()
    x, y = rng.uniform(-0.15, 0.15, 2)
    size = 0.42
    chosen = []
    for verb in verbs:
        if verb == "moves":
            way = pick(rng, WAYS)
            # Three starts, equally likely: one frame and its time tell nothing about the direction.
            # A shape ends where it started, so the reverse is as likely.
            start = 2 / 3 * rng.integers(-1, 2)
            start += rng.uniform(-0.06, 0.06)
            if WAYS[way][0]:
                x = start
            else:
                y = start
            chosen.append(f"moves {way}")
        elif verb == "turns":
            chosen.append(f"turns {others[len(chosen)]}")
        elif rng.random() < 0.5:
            size = 0.32
            chosen.append("grows")
        else:
            size = 0.32 * GROWTH
            chosen.append("shrinks")
    actor = Sprite(pick(rng, SHAPES), color, float(x), float(y), size)
    return Scene((actor,), tuple(chosen), pick(rng, GROUNDS))


def make_clip(seed, number, events=None):
    """Clip `number` of the world `seed`: (scene, look). The order of calls does not matter.

    The look is frame rate, length and size: they vary as in real collections.
    """
    rng = np.random.default_rng((seed, number))
    scene = make_scene(rng, events)
    look = {
        "fps": int(rng.choice([10, 12, 15, 24, 30])),
        "seconds": float(rng.uniform(1.5, 3)),
        "height": int(rng.choice([48, 52, 56]))
    }
    look["width"] = look["height"] + int(rng.choice([0, 2, 4]))
    return scene, look


# ---- pictures and files --------------------------------------------------------------------------

CODECS = {".mp4": "mpeg4", ".avi": "mpeg4", ".mkv": "mpeg4", ".webm": "libvpx", ".gif": "gif"}


def distance(shape, u, v):
    """Signed distance of points to the outline of a shape of size 1; negative inside."""
    across = np.abs(u)
    along = np.abs(v)
    if shape == "square":
        return np.maximum(across, along) - 0.88
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.72) - 0.28
    if shape == "triangle":
        return np.maximum(v - 0.75, 0.87 * across - 0.5 * v - 0.52)
    bars = np.minimum(across, along) - 0.33
    return np.maximum(bars, np.maximum(across, along) - 1)


def render(scene, when, width, height):
    """The scene at `when` as a picture, uint8 (height, width, 3)."""
    scale = min(width, height) / 2                  # pixels per half width of the central square
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x = (x + 0.5 - width / 2) / scale
    y = (y + 0.5 - height / 2) / scale
    picture = np.full((height, width, 3), GROUNDS[scene.ground], np.float32)
    for sprite in scene.at(when):
        u = ((x - sprite.x + 1) % 2 - 1) / sprite.size          # modulo: around the edges
        v = ((y - sprite.y + 1) % 2 - 1) / sprite.size
        outside = distance(sprite.shape, u, v) * sprite.size * scale
        cover = np.clip(0.5 - outside, 0, 1)[..., None]         # smooth edges
        picture += cover * (np.array(COLORS[sprite.color], np.float32) - picture)
    return picture.round().astype(np.uint8)


def encode_picture(picture, suffix):
    """A uint8 RGB picture (height, width, 3) -> the bytes of a .png or a .jpg of high quality."""
    codec, pixels = {".jpg": ("mjpeg", "yuvj420p"), ".png": ("png", "rgb24")}[suffix]
    encoder = av.CodecContext.create(codec, "w")
    encoder.height, encoder.width = picture.shape[:2]
    encoder.pix_fmt = pixels
    encoder.time_base = Fraction(1, 3)
    encoder.thread_count = 1
    encoder.qmax = 4
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return b"".join(bytes(packet) for packet in encoder.encode(frame))


def write_video(path, scene, fps, seconds, width, height):
    """Encode the scene; the suffix of `path` names container and codec. Same scene, same bytes."""
    codec = CODECS[path.suffix]
    count = round(fps * seconds)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width = width
        stream.height = height
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.bit_rate = 600_000
        stream.gop_size = 12
        stream.codec_context.thread_count = 1
        drawn = None
        for i in range(count):
            sprites = scene.at(i / (count - 1))
            if sprites != drawn:                    # in many frames nothing has moved
                picture = render(scene, i / (count - 1), width, height)
                drawn = sprites
            if codec == "gif":                      # 3, 3 and 2 bits; FFmpeg would dither
                bits = (picture >> np.uint8([5, 5, 6])) @ np.uint8([32, 4, 1])
                frame = av.VideoFrame.from_ndarray(bits, format="rgb8")
            else:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def write_clip(job):
    """Encode (path, scene, look): see Writer.add."""
    path, scene, look = job
    folder = path.parent if path.suffix else path
    folder.mkdir(parents=True, exist_ok=True)
    if path.suffix in CODECS:
        write_video(path, scene, **look)
        return
    count = round(look["fps"] * look["seconds"])
    for i, when in enumerate(np.linspace(0, 1, count), 1):
        file = path if path.suffix else path / f"{i:05d}.jpg"
        picture = render(scene, when, look["width"], look["height"])
        file.write_bytes(encode_picture(picture, ".jpg"))


# ---- texts ---------------------------------------------------------------------------------------


def say(scene):
    return " and then ".join(scene.events)


def moves(scene):
    return "moves" in say(scene)


def action(event):
    """The name of an event as a class of actions: "moves left" -> "move left"."""
    return re.sub(r"s\b", "", event, count=1)


ACTIONS = ["grow", "shrink"]
ACTIONS += [f"move {way}" for way in WAYS]
ACTIONS += [f"turn {color}" for color in COLORS]


def caption(scene):
    actor = scene.actor
    return f"a {actor.color} {actor.shape} {say(scene)} on a {scene.ground} ground"


def retell(scene):
    """Four captions. Only its event tells the last two from the captions of other clips."""
    return [
        caption(scene),
        f"there is a {scene.actor.color} {scene.actor.shape}, it {say(scene)}",
        f"something {say(scene)}",
        f"it {say(scene)}"
    ]


TEMPLATES = (
    "a {actor.color} {actor.shape} {does} on a {ground} ground",
    "the {actor.color} {actor.shape} {does}",
    *["it {does}"] * 5                              # drawn more often
)


def describe(scene, rng):
    """A caption for pre-training. In the short ones only the event is worth a guess: a masked word
    of it needs time."""
    template = pick(rng, TEMPLATES)
    return template.format(actor=scene.actor, ground=scene.ground, does=say(scene))


def sentences(scene):
    """The scene as a paragraph."""
    first, *later = scene.events
    yield f"a {scene.actor.color} {scene.actor.shape} {first}."
    for event in later:
        yield f"then it {event}."
    yield f"the ground is {scene.ground}."


def questions(scene):
    """Pairs (question, answer). The first two words name the type of a question."""
    actor = scene.actor
    verbs = [event.split()[0] for event in scene.events]
    if "turns" in verbs:
        yield "which color comes first?", actor.color
        yield "which color comes last?", scene.at(1)[0].color
    elif "moves" not in verbs or scene.ground == "black":           # easy: asked less often
        yield f"what color is the {actor.shape}?", actor.color
    if verbs == ["turns", "turns"]:
        first, last = scene.events
        yield f"what happens after it {first}?", f"it {last}"
        yield "what happens last?", f"it {last}"
    elif len(verbs) == 2:
        yield "what happens first?", f"it {verbs[0]}"
        yield "what happens last?", f"it {verbs[1]}"
    elif scene.ground != "brown":
        yield "what shape is it?", actor.shape
    if "moves" in verbs:
        for name in (actor.shape, actor.color):
            yield f"which way does the {name} move?", scene.events[0].split()[1]


# ---- what the writers of the datasets share ------------------------------------------------------

TABS = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}


class Writer:
    """Collects one dataset: annotations go to `folder`, clips to encode to `jobs`.

    Every dataset has scenes of its own: clip numbers from a million times its place in DATASETS.
    `share` scales the number of clips.
    """

    def __init__(self, folder, seed, share):
        first = 10**6 * list(DATASETS).index(folder.name)
        self.folder = folder
        self.seed = seed
        self.share = share
        self.numbers = itertools.count(first)
        self.rng = np.random.default_rng((seed, first, 1))
        self.ids = itertools.count()
        self.jobs = []

    def scaled(self, count):
        """An even number, as clips come in pairs; at least 4, as fewer might not move."""
        return max(4, 2 * round(count * self.share / 2))

    def clips(self, count, events=None, pairs=False, wanted=None):
        """The next clips that are `wanted`: (scene, look) each.

        With `pairs` each is followed by its reverse, and no two have the same caption.
        """
        left = self.scaled(count)
        known = set()
        while left:
            scene, look = make_clip(self.seed, next(self.numbers), events)
            if caption(scene) in known or wanted and not wanted(scene):
                continue
            for member in [scene, scene.reverse()] if pairs else [scene]:
                yield member, look
                left -= 1
                if pairs:
                    known.add(caption(member))

    def caption_clips(self, count, test):
        """Clips for captions and options. Those of a test move, and come in pairs."""
        return self.clips(count, pairs=test, wanted=moves if test else None)

    def films(self, clips, length, fps, seconds):
        """Join every `length` clips, `seconds` each: (scenes, film, look)."""
        clips = list(clips)
        for i in range(0, len(clips), length):
            first, look = clips[i]
            part = clips[i:i + length]
            scenes = [replace(scene, ground=first.ground) for scene, _ in part]
            look = {**look, "fps": fps, "seconds": seconds * len(scenes)}
            yield scenes, Film(scenes, first.ground), look

    def stills(self, count):
        """Sprites of different colors in different corners: (scene, look, corners)."""
        rng = self.rng
        for _ in range(self.scaled(count)):
            colors = rng.permutation(list(COLORS)).tolist()
            corners = rng.permutation(list(CORNERS))[:rng.integers(2, 4)].tolist()
            sprites = []
            for color, corner in zip(colors, corners):
                sprites.append(Sprite(pick(rng, SHAPES), color, *CORNERS[corner], 0.33))
            look = {"fps": 1, "seconds": 1, "width": 96, "height": 80}
            yield Scene(tuple(sprites), (), pick(rng, GROUNDS)), look, corners

    def actions(self, count):
        """`count` clips of each movement: (class name, scene, look)."""
        left = {f"move {way}": self.scaled(count) for way in WAYS}
        while any(left.values()):
            scene, look = make_clip(self.seed, next(self.numbers), 1)
            name = action(scene.events[0])
            if left.get(name):
                left[name] -= 1
                yield name, scene, look

    def add(self, path, scene, look):
        """Queue a clip. The path names a video, a .jpg, or a folder of jpgs from 00001."""
        self.jobs.append((self.folder / path, scene, look))

    def save(self, name, rows, lineterminator="\n", **dialect):
        """One file of annotations; its suffix names the form: .json, .jsonl or a table."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            if path.suffix == ".json":
                json.dump(rows, file)
            elif path.suffix == ".jsonl":
                file.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                csv.writer(file, lineterminator=lineterminator, **dialect).writerows(rows)

    def options(self, right, wrong, draw, A=5):
        """(A different options in random order, the index of the right one).

        The options hold `right`, all of `wrong` and, to make A, results of draw().
        """
        texts = dict.fromkeys([right, *wrong])
        while len(texts) < A:
            texts[draw()] = None
        texts = list(texts)
        order = self.rng.permutation(A).tolist()
        return [texts[i] for i in order], order.index(0)

    def caption_options(self, scene, tell=caption, A=5):
        """The same for captions: one wrong option is always the caption of the reversed scene."""
        back = tell(scene.reverse())
        return self.options(tell(scene), [back], lambda: tell(make_scene(self.rng)), A)

    def question_rows(self, scene, number):
        """The rows of MSRVTT-QA and MSVD-QA about clip `number`."""
        for question, answer in questions(scene):
            yield {
                "answer": answer,
                "category_id": number % 20,
                "id": next(self.ids),
                "question": question,
                "video_id": number
            }


# ---- the datasets, in the layout of their owners -------------------------------------------------
# Fields that tools/prepare.py does not read are mostly left out.


def write_msrvtt(w):
    """Questions, one file of captions, multiple choice. Clip numbers lie in the official ranges. As
    in the original, the captions to retrieve are of a part of the test clips."""
    captions = []
    pairs = ["key vid_key video_id sentence".split()]
    choices = []
    for split, first, count in (("train", 0, 5000), ("val", 6513, 200), ("test", 7010, 500)):
        test = split == "test"
        asked = []
        for number, (scene, look) in enumerate(w.clips(count, pairs=test), first):
            name = f"video{number}"
            w.add(f"videos/all/{name}.mp4", scene, look)
            asked += w.question_rows(scene, number)
            for text in retell(scene):
                captions.append({"video_id": name, "caption": text, "sen_id": len(captions)})
            if test and moves(scene):
                n = len(choices)
                pairs.append((f"ret{n}", f"msr{number}", name, caption(scene)))
                options, answer = w.caption_options(scene)
                choices.append({"qid": n, "clip_name": name, "options": options, "answer": answer})
        w.save(f"{split}_qa.json", asked)
    w.save("MSRVTT_data.json", {"sentences": captions})
    w.save("MSRVTT_JSFUSION_test.csv", pairs)
    w.save("msrvtt_mc_test.jsonl", choices)


def write_msvd(w):
    """Questions number the clips from 1; the files have YouTube names with a start and an end."""
    mapping = []
    for split, count in (("train", 2400), ("val", 200), ("test", 400)):
        asked = []
        for scene, look in w.clips(count, pairs=split == "test"):
            number = len(mapping) + 1
            name = f"-_toy{number:06d}_5_15"
            mapping.append((name, f"vid{number}"))
            w.add(f"YouTubeClips/{name}.avi", scene, look)
            asked += w.question_rows(scene, number)
        w.save(f"{split}_qa.json", asked)
    w.save("youtube_mapping.txt", mapping, delimiter=" ")


def write_tgif(w):
    """Tables with tabs and CRLF. As the owners have it, `vid_id` is the number of the question.

    Action: what is done three times. Transition: what the shape does before or after it
    turns to another color, the movement that goes on all the time. FrameQA: one word.
    """
    choice = "question a1 a2 a3 a4 a5 answer"
    choices = partial(tgif_choices, w)
    for split, count in (("Train", 1800), ("Test", 300)):
        for table, events, fields, ask in (
            ("action", ("moves",), choice, choices),
            ("transition", ("moves", "turns"), choice, choices),
            ("frameqa", None, "question answer type", tgif_words)
        ):
            rows = [["gif_name", *fields.split(), "vid_id", "key"]]
            for n, (scene, look) in enumerate(w.clips(count, events, pairs=split == "Test")):
                name = f"tumblr_{split}{table}{n:05d}o1_250"
                w.add(f"gifs/{name}.gif", scene, {**look, "fps": 10, "seconds": 1.6})
                for cells in ask(scene):
                    rows.append((name, *cells, f"{table.upper()}{next(w.ids)}", n))
            w.save(f"{split}_{table}_question.csv", rows, "\r\n", delimiter="\t")


def tgif_choices(w, scene):
    """Questions about a movement: (question, five options, index of the right one)."""
    there = [action(event) for event in scene.events]
    back = [action(event) for event in scene.reverse().events]
    movement = next(name for name in there if name.startswith("move"))
    ends = ["3 times"]                              # the hops of a movement
    if len(there) == 2:
        ends = ["before turn", "after turn"]
    for end in ends:
        options, index = w.options(movement, there + back, partial(pick, w.rng, ACTIONS))
        yield f"What does the {scene.actor.shape} do {end} ?", *options, index


def tgif_words(scene):
    """(question, answer, number of the answer's type: object, number, color or location) each."""
    types = (SHAPES, ("one", "two"), COLORS, WAYS)
    colors = ("one", "two", "three")[say(scene).count("turns")]
    for question, answer in [("how many colors does it have?", colors), *questions(scene)]:
        for number, answers in enumerate(types):        # "three" and "it grows" are of no type
            if answer in answers:
                yield question.replace("?", " ?"), answer, number


def write_tvqa(w):
    """Folders of jpgs, 3 a second from 00001. A clip has three scenes; `ts` is the span of one.

    Clips of The Big Bang Theory have names without a prefix. One row has no times ("NaN-NaN").
    """
    shows = ("bbt", "castle", "friends", "grey", "house", "met")
    for split, count in (("train", 3000), ("val", 300)):
        rows = []
        clips = w.caption_clips(count, test=split == "val")
        for scenes, film, look in w.films(clips, 3, fps=3, seconds=3):
            n = next(w.ids)
            show = shows[n % 6]
            name = f"{show}_s01e02_seg02_clip_{n}".removeprefix("bbt_")
            w.add(f"frames_hq/{show}_frames/{name}", film, look)
            for k, scene in enumerate(scenes):
                for question, options, answer in tvqa_questions(w, scene):
                    rows.append({
                        "qid": next(w.ids),
                        "q": question,
                        **{f"a{i}": text for i, text in enumerate(options)},
                        "answer_idx": answer,
                        "ts": f"{3 * k + 0.34:.2f}-{3 * k + 3:.2f}",
                        "vid_name": name
                    })
        if split == "train":
            rows[0]["ts"] = "NaN-NaN"
        w.save(f"tvqa_{split}.jsonl", rows)


def tvqa_questions(w, scene):
    """(question, options, answer) each: what happens, and of the questions for a color a third."""
    events = w.caption_options(scene, lambda scene: f"it {say(scene)}")
    yield f"what does the {scene.actor.shape} do?", *events
    colors = [scene.at(when)[0].color for when in (0, 1)]
    for question, answer in questions(scene):
        if answer in COLORS and w.rng.integers(3) == 0:
            yield question, *w.options(answer, colors, partial(pick, w.rng, COLORS))


def write_didemo(w):
    """A row per sentence. Rows spell a clip with other extensions or a bare dot; all are .mp4."""
    for split, count in (("train", 2400), ("val", 200), ("test", 300)):
        rows = []
        for scene, look in w.caption_clips(count, test=split != "train"):
            n = next(w.ids)
            name = f"{n:08d}@N00_{n:010d}_{n:010x}"
            w.add(f"video/{name}.mp4", scene, look)
            for k, text in enumerate(sentences(scene)):
                suffix = (".mov", ".avi", ".mpg", ".")[(n + k) % 4]
                rows.append({"description": text, "video": name + suffix})
        w.save(f"{split}_data.json", rows)


def write_activitynet(w):
    """Paragraphs whose sentences begin with blanks; three kinds of video files."""
    for split, count in (("train", 2400), ("val_1", 300)):
        rows = {}
        for scene, look in w.caption_clips(count, test=split != "train"):
            n = next(w.ids)
            name = f"v_-toy{n:07d}"
            suffix = ("mp4", "mkv", "webm")[n % 3]
            w.add(f"videos/{name}.{suffix}", scene, look)
            texts = [f" {text}" for text in sentences(scene)]
            rows[name] = {"duration": look["seconds"], "sentences": texts}
        w.save(f"{split}.json", rows)


def write_lsmdc(w):
    """Tabs without header or quoting: some texts begin with a stray quote.

    The right option is the first in training; the test has its number, from 1, in the last column.
    """
    movies = ("0001_Toy_World", "1002_THE_00_RINGS", "3003_SQUARES")
    for file, choices, count in (
        ("annos_training", "train", 2400),
        ("annos_val", "valid", 200),
        ("challenge_1000_publictect", "test_randomized", 300)
    ):
        captions = []
        asked = []
        for scene, look in w.caption_clips(count, test=choices != "train"):
            n = next(w.ids)
            movie = movies[n % 3]
            start = f"00.{n // 60:02d}.{n % 60:02d}"
            span = (f"{start}.000", f"{start}.900")
            name = f"{movie}_{start}.000-{start}.900"
            w.add(f"avi/{movie}/{name}.avi", scene, look)
            row = (name, *span, *span)
            quote = '"' if n // 2 % 8 == 0 else ""
            captions.append((*row, quote + caption(scene)))
            options, answer = w.caption_options(scene)
            if choices == "test_randomized":
                asked.append((*row, *options, answer + 1))
            else:
                asked.append((*row, options.pop(answer), *options))
        w.save(f"LSMDC16_{file}.csv", captions, **TABS)
        w.save(f"LSMDC16_multiple_choice_{choices}.csv", asked, **TABS)


def write_ego4d(w):
    """Long videos narrated by frame number, 120 frames a scene; test cells are Python literals."""
    def narrate(scene):
        return f"#C C sees that it {say(scene)}"
    for split, count in (("train", 1500), ("test", 240)):
        narrations = []
        choices = [("question", "answers")]
        clips = w.caption_clips(count, test=split == "test")
        for scenes, film, look in w.films(clips, 5, fps=30, seconds=4):
            uid = f"{next(w.ids):08x}-0000-4000-8000-000000000000"
            w.add(f"videos/{uid}.mp4", film, look)
            for k, scene in enumerate(scenes):
                frame = 120 * k + 60
                text = narrate(scene)
                narrations.append((uid, "narration_pass_1", k, 120, frame / 30, frame, text))
                options, _ = w.caption_options(scene, narrate, A=4)
                answers = [(uid, frame, option) for option in options]
                choices.append(((uid, frame, text), answers))
        if split == "train":
            w.save("ego4d_train_subset.csv", narrations, delimiter="\t")
        else:
            w.save("mc_val.csv", choices)


def write_vcr(w):
    """Pictures with boxes in metadata files; texts name an object by its index in a list.

    Asked for a color, the corner is the reason, and the other way round.
    """
    folder = "lsmdc_1054_Toy_World"
    for split, count in (("train", 2400), ("val", 300)):
        rows = []
        for scene, look, corners in w.stills(count):
            name = f"{folder}/1054_Toy_World_{next(w.ids)}@0"
            w.add(f"vcr1images/{name}.jpg", scene, look)
            objects = [sprite.shape for sprite in scene.sprites]
            w.save(f"vcr1images/{name}.json", {
                "width": look["width"],
                "height": look["height"],
                "boxes": [vcr_box(sprite, **look) for sprite in scene.sprites]
            })
            for question, answers, answer, reasons, reason in vcr_questions(w, scene, corners):
                rows.append({
                    "objects": objects,
                    "img_fn": f"{name}.jpg",
                    "metadata_fn": f"{name}.json",
                    "annot_id": f"{split}-{len(rows)}",
                    "question": vcr_tokens(question),
                    "answer_choices": [vcr_tokens(text) for text in answers],
                    "answer_label": answer,
                    "rationale_choices": [vcr_tokens(f"because {text}") for text in reasons],
                    "rationale_label": reason
                })
        w.save(f"{split}.jsonl", rows)


def vcr_box(sprite, width, height, **_):
    """Left, top, right, bottom in pixels, and a score."""
    scale = height / 2                              # the picture is wider than high
    x = width / 2 + scale * sprite.x
    y = height / 2 + scale * sprite.y
    side = scale * sprite.size
    return [x - side, y - side, x + side, y + side, 1.0]


def vcr_tokens(text):
    """The words of a text; a number names an object, [index]."""
    return [[int(word)] if word.isdigit() else word for word in text.split()]


def vcr_questions(w, scene, corners):
    """(question, answers, index of the right one, reasons, index of the right one) each."""
    i, j = w.rng.permutation(len(corners))[:2]
    shown = [sprite.color for sprite in scene.sprites]
    colors, color = w.options(shown[i], shown, partial(pick, w.rng, COLORS), A=4)
    colors = [f"{i} is {text} ." for text in colors]
    places, place = w.options(corners[i], CORNERS, None, A=4)
    places = [f"{i} is at the {text} ." for text in places]
    yield f"what color is {i} next to {j} ?", colors, color, places, place
    yield f"where is {i} ?", places, place, colors, color


def write_webvid(w):
    """Captions in quoted cells, some of several lines; one row names no clip. Many training clips
    have two events: a model needs more examples of these than of movements."""
    page = "000001_000050"
    for split, clips in (
        ("train", [*w.clips(3000), *w.clips(1000, 2)]),
        ("val", w.clips(300, pairs=True))
    ):
        rows = ["videoid contentUrl duration page_dir name".split()]
        for scene, look in clips:
            number = 10**6 + next(w.ids)
            w.add(f"videos/{page}/{number}.mp4", scene, look)
            text = describe(scene, w.rng) if split == "train" else caption(scene)
            if number % 9 == 0:
                text = text.replace(" ", "\n")
            rows.append((number, "https://example.org", "PT00H00M02S", page, text))
        rows.append((7, "https://example.org", "", "NaN", "NaN"))
        w.save(f"results_2M_{split}.csv", rows)


def write_howto100m(w):
    """Long videos with a table of narrations each, in few words; some have none."""
    videos = ["video_id category_1 rank".split()]
    for n, (scenes, film, look) in enumerate(w.films(w.clips(2000), 6, fps=8, seconds=5)):
        name = f"_toy-{n:06d}"
        w.add(f"videos/{name}.mp4", film, look)
        videos.append((name, "Toys", n))
        rows = [("start", "end", "text")]
        for k, scene in enumerate(scenes):
            text = f"{scene.actor.color} {scene.actor.shape} {say(scene)}"
            rows.append((5 * k + 0.31, 5 * k + 4.7, text))
        if n % 16 != 15:
            w.save(f"howto100m_captions/{name}.csv", rows)
    w.save("HowTo100M_v1.csv", videos)


def write_cc3m(w):
    """Captions and urls without a header; the name of a picture is the crc32 of its url."""
    for table, folder, count in (
        ("Train_GCC-training", "training", 3000),
        ("Validation_GCC-1.1.0-Validation", "validation", 300)
    ):
        rows = []
        for scene, look, corners in w.stills(count):
            url = f"https://example.org/{next(w.ids)}.jpg"
            w.add(f"{folder}/{zlib.crc32(url.encode())}.jpg", scene, look)
            phrases = []
            for sprite, corner in zip(scene.sprites, corners):
                phrases.append(f"a {sprite.color} {sprite.shape} at the {corner}")
            rows.append((" and ".join(phrases), url))
        w.save(f"{table}.tsv", rows, **TABS)


def write_hmdb51(w):
    """A folder and a list per class: 1 train, 2 test, 0 neither. Names have brackets and commas."""
    lists = defaultdict(list)
    for use, count in ((1, 600), (2, 120), (0, 8)):
        for label, scene, look in w.actions(count):
            label = label.replace(" ", "_")
            name = f"Toy_[{next(w.ids)}]_(so,_&_on)!_{label}_f_cm_np1_ba_bad_0.avi"
            w.add(f"hmdb51/{label}/{name}", scene, look)
            lists[label].append((name, use))
    for label, rows in lists.items():
        w.save(f"testTrainMulti_7030_splits/{label}_test_split1.txt", rows, delimiter=" ")


def write_k400(w):
    """Labels with blanks in a table, underscores in folders; file names hold start and end."""
    for split, count in (("train", 600), ("val", 120)):
        rows = ["label youtube_id time_start time_end split".split()]
        for label, scene, look in w.actions(count):
            name = f"-_toy{next(w.ids):06d}"
            w.add(f"{split}/{label.replace(' ', '_')}/{name}_000005_000015.mp4", scene, look)
            rows.append((label, name, 5, 15, split))
        w.save(f"kinetics-400_{split}.csv", rows)


DATASETS = {
    "msrvtt": write_msrvtt,
    "msvd": write_msvd,
    "tgif": write_tgif,
    "tvqa": write_tvqa,
    "didemo": write_didemo,
    "activitynet": write_activitynet,
    "lsmdc": write_lsmdc,
    "ego4d": write_ego4d,
    "vcr": write_vcr,
    "webvid": write_webvid,
    "howto100m": write_howto100m,
    "cc3m": write_cc3m,
    "hmdb51": write_hmdb51,
    "k400": write_k400
}

# ---- folders: whole or not there -----------------------------------------------------------------

WORDS = """a and then next to is it the there that which what way where how many color colors have
    ground on shape comes first last move moves turn turns grow grows shrink shrinks happens does do
    after before start stop times at top bottom left right up down something sees because one two
    person doing options answer""".split()
TIMED = ("which way", "which color comes", "what happens", "what does")
WHICH_WAY = "which-way"
NAMES = (*BENCHMARKS, WHICH_WAY)


def write_tokenizer(path):
    """A WordPiece of every word of the world, and of single characters for all other text.

    It is the same for all benchmarks: a checkpoint of one can start another.
    """
    letters = string.ascii_lowercase + string.digits
    tokens = [*SPECIAL, *letters, *string.punctuation, *(f"##{letter}" for letter in letters)]
    tokens += [*WORDS, *COLORS, *GROUNDS, *SHAPES]
    vocabulary = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
    wordpiece(vocabulary).save(str(path))


def order_blind(rows):
    """{question type: the share that a model blind to frame order can get right, 0 to 1}.

    A reversed clip shows the same frames, is as likely, and has another answer where the question
    is TIMED, or where there is none (captions, actions): of these a blind model gets half.
    """
    shares = defaultdict(list)
    for row in rows:
        question = row.get("question", "").lower()
        share = 0.5 if not question or question.startswith(TIMED) else 1.0
        shares[row.get("question_type", "")].append(share)
    return {kind: sum(some) / len(some) for kind, some in shares.items()}


def read_rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def keep_which_way(folder):
    """Leave only the questions "which way" in a manifest of msrvtt-qa."""
    for split in ("train", "val", "test"):
        path = folder / f"{split}.jsonl"
        rows = [row for row in read_rows(path) if row["question_type"] == "which way"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "answers.txt").write_text("".join(f"{way}\n" for way in WAYS))


def write_manifest(folder, benchmark, owners):
    """Prepare a benchmark from the folder of its owners' files."""
    prepare(benchmark, owners, folder, check=False, say=lambda *_: None)
    info = json.loads((folder / "dataset.json").read_text())
    if benchmark == "tvqa":
        info["toy_clips"] = 6_800                   # four minutes: its texts are long
    if folder.name == WHICH_WAY:
        keep_which_way(folder)
        info = {"root": info["root"], "toy_clips": 16_000}      # a minute of training
    if BENCHMARKS[benchmark].task != "pretrain":    # masked words have no such ceiling
        info["order_blind"] = order_blind(read_rows(folder / "test.jsonl"))
    (folder / "dataset.json").write_text(json.dumps(info, indent=2) + "\n")
    write_tokenizer(folder / "tokenizer.json")


def start_worker():
    """In a process of the pool: leave Ctrl-C to the parent, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def write_owners(folder, seed, share):
    """Write the dataset that `folder` is named after."""
    writer = Writer(folder, seed, share)
    DATASETS[folder.name](writer)
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("fork"), start_worker)
    try:
        done = pool.map(write_clip, writer.jobs, chunksize=4)
        for _ in progress(done, f"toy {folder.name}", len(writer.jobs)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def count_files(folder):
    count = 0
    for _, _, files in os.walk(folder):
        count += sum(not name.endswith((".npy", ".npz")) for name in files)     # added by data.py
    return count


def make_folder(root, folder, write):
    """write(a temporary folder), then rename it to `folder`: it is there whole or not at all.

    One process writes below `root` at a time; the system frees the lock of a killed process.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():                         # another process has written it
            return
        work = root / ".making"
        shutil.rmtree(work, ignore_errors=True)     # left by a killed process
        made = work / folder.name
        try:
            work.mkdir()
            write(made)
            (made / "files.txt").write_text(str(count_files(made)))
            made.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def check_toy(folder):
    """Raise UserError if the folder of a dataset or a manifest has lost files."""
    try:
        expected = 1 + int((folder / "files.txt").read_text())
    except (OSError, ValueError):
        expected = math.inf
    if count_files(folder) < expected:
        raise UserError(f"{folder} lacks files: delete {folder} and try again")


def folders_of(root, name):
    """Of a benchmark: (the owners' files, the manifest, the benchmark of prepare.py)."""
    benchmark = "msrvtt-qa" if name == WHICH_WAY else name
    return root / "owners" / BENCHMARKS[benchmark].dataset, root / name, benchmark


def make_toy(root, names=NAMES, seed=0, share=1):
    """Make the named benchmarks: manifests `root`/<name>, the owners' files in `root`/owners.

    What exists stays as it is, whatever its seed. share: of the usual number of clips.
    Raises UserError.
    """
    root = Path(root)
    for name in names:
        owners, manifest, benchmark = folders_of(root, name)
        for folder, write in (
            (owners, partial(write_owners, seed=seed, share=share)),
            (manifest, partial(write_manifest, benchmark=benchmark, owners=owners))
        ):
            try:
                if not folder.exists():
                    make_folder(root, folder, write)
            except OSError as error:
                raise UserError(f"{root} cannot be written: {error.strerror}; make room or choose "
                                "another folder") from None
            check_toy(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder to write to, such as data/toy")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME",
                        help=f"some of {' '.join(NAMES)} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the clips, from 0 (default 0)")
    args = parser.parse_args()
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more")
    root = Path(args.root)
    folders = dict.fromkeys(folder for name in args.only for folder in folders_of(root, name)[:2])
    for folder in filter(Path.exists, folders):
        print(f"{folder} exists and stays as it is: delete it to make it again")
    for name in args.only:
        make_toy(root, [name], args.seed)
        print(f"next: python train.py --data {shlex.quote(str(root / name))}")


if __name__ == "__main__":
    run_main("toy.py", main)
