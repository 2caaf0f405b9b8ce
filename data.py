"""Data: exact frames out of any video (PyAV), words into tokens, and the readers of every benchmark, into batches.

    python data.py CLIP...              in these files or folders of pictures: frames, seconds, what is looked at
    python data.py --bench FILE...      milliseconds per clip, beside decoding everything and other libraries

A batch is a dict:
    frames  (B, T, 3, R, R) uint8; with V views (B, V, T, 3, R, R)
    words   (B, L) int64 ids; (B, A, L) with A options; (B, 3, L) in pre-training: to match, with masks, as it is
    keep    bool, the shape of words, True at real words
    target  (B,) the class, -1: counts for nothing
    labels  (B, L) in pre-training: the masked ids, -100 elsewhere
    index   (B,) places in the data set
    errors  {index: cause} of the clips that cannot be read; the only entry where none can
"""
import argparse
import ast
import colorsys
import csv
import fnmatch
import functools
import importlib
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import threading
import time
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache, partial

import av
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from av.error import FFmpegError
from av.sidedata.sidedata import SideDataContainer
from av.stream import Discard, Disposition
from av.video.frame import PictureType

from allinone import UserError, run_main


# ---- frame sampler ---------------------------------------------------------------------------------------------------
# An exact frame needs what leads to it from its keyframe on, and nothing else. So: list all packets of the file without
# decoding any, sort them by time, feed the decoder only the runs that lead to a wanted frame, and let it skip pictures
# that no other picture refers to. Nothing seeks: a jump is an index into the list. Wherever a file gives reason to
# doubt its timestamps or keyframes, everything is decoded from the start, in order.

MAX_PIXELS = 100_000_000            # in one frame; more is a decompression bomb
PACKET_BYTES = 64 << 20             # packets kept in memory; a bigger file is read a second time instead
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = "mov,avi,matroska,mpegts,mpeg,mpegvideo,h264,hevc,flv,asf,ogg,gif,image2,jpeg_pipe,png_pipe,webp_pipe"
OPEN = {"format_whitelist": FORMATS, "protocol_whitelist": "file", "pattern_type": "none",    # no playlist, URL, %03d
        "max_pixels": str(MAX_PIXELS)}
SKIPPABLE = {"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video"}        # FFmpeg can skip their unreferenced pictures
ONE_TO_ONE = SKIPPABLE | {"vp9", "av1", "gif", "mjpeg", "png", "webp"}   # one packet gives exactly one frame


class VideoError(UserError):
    """A media file cannot give the frames asked of it. One line: the file and the cause."""


def frame_indices(num_frames, T, mode, rng=None):
    """One frame number in each of T equal segments of range(num_frames), sorted; fewer frames than T repeat.

    mode: "eval" the middle of each segment, "train" a uniformly random place in it (rng: numpy.random.Generator).
    """
    if num_frames < 1 or T < 1 or mode not in ("train", "eval"):
        raise ValueError(f"frame_indices({num_frames=}, {T=}, {mode=}): 1 frame or more, T >= 1, mode train or eval")
    inside = rng.random(T) if mode == "train" else np.full(T, 0.5)
    return ((np.arange(T) + inside) * num_frames / T).astype(int).clip(max=num_frames - 1).tolist()


def read_frames(path, pick, size=None, place=(0.5, 0.5), zoom=1.2, flip=False):
    """Chosen frames of a video, gif, picture or folder of pictures: the very pixels that decoding everything gives.

    pick: frame numbers in display order, repeats allowed, any order; or a function that returns them, given the float64
        seconds of every frame since the first (in a folder, sorted by name: the frame numbers).
    size: None for full frames; R for a square of side min(w, h) / zoom, scaled to R x R (that is: the short side to
        zoom x R, then a crop of R), at place = (x, y), 0 left or top to 1, of the upright picture; flip mirrors it.
    -> (T, 3, R, R) or (T, 3, h, w) uint8 RGB. VideoError if a picked frame is missing or undecodable.
    """
    if size is not None and not (size >= 1 and zoom >= 1 and 0 <= min(place) <= max(place) <= 1):
        raise ValueError(f"read_frames({size=}, {zoom=}, {place=}): size and zoom at least 1, place from 0 to 1")
    see = partial(_to_rgb, size=size, place=place, zoom=zoom)
    if os.path.isdir(path):
        files = sorted(entry.path for entry in os.scandir(path) if entry.name.lower().endswith(PICTURES))
        times = np.arange(len(files), dtype=np.float64)
        read = lambda numbers: {i: _Clip(files[i]).read({0}, see)[0] for i in numbers}
    else:
        clip = _Clip(path)
        times, read = clip.times, partial(clip.read, see=see)
    if not len(times):
        raise VideoError(f"{path}: no frames in it")
    numbers = [int(i) for i in (pick(times) if callable(pick) else pick)]
    if not numbers or min(numbers) < 0 or max(numbers) >= len(times):
        raise VideoError(f"{path}: frames {numbers} asked for, it has 0 to {len(times) - 1}")
    try:
        frames = read(set(numbers))
    except FFmpegError as error:
        raise VideoError(f"{path}: {error}") from error
    if len({frame.shape for frame in frames.values()}) > 1:
        raise VideoError(f"{path}: its frames differ in size, they can only be read with a size")
    clip = torch.from_numpy(np.stack([frames[i] for i in numbers]))
    return (clip.flip(3) if flip else clip).contiguous()


def opens(path):
    """Does the file begin like a video or picture, or has the folder a picture? Reads a header, decodes nothing."""
    if os.path.isdir(path):
        return any(name.lower().endswith(PICTURES) for name in os.listdir(path))
    with suppress(VideoError), closing(_demux(path)) as packets:
        return next(packets, None) is not None
    return False


def _demux(path):
    """Yields the packets of the first video stream that is not cover art, in file order. Decodes nothing."""
    if not os.path.isfile(path):                                     # a pipe would block for ever
        raise VideoError(f"{path}: no such file")
    options = OPEN | {"analyzeduration": "1"} if str(path).lower().endswith(".gif") else OPEN  # or it decodes much
    try:
        with av.open(f"file:{path}", options=options, metadata_errors="ignore") as container:   # concat:... is a name
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise VideoError(f"{path}: no video stream")
            for other in container.streams:
                other.discard = Discard.default if other is streams[0] else Discard.all
            streams[0].codec_context.thread_count = 1                # the worker processes are the parallelism
            for packet in container.demux(streams[0]):
                if packet.size:                                      # PyAV ends with an empty packet
                    yield packet
    except VideoError:
        raise
    except (FFmpegError, OSError, ValueError, AttributeError) as error:   # AttributeError: a codec FFmpeg does not know
        raise VideoError(f"{path}: not a readable video or picture ({getattr(error, 'strerror', error)})") from error


class _Clip:
    """What a file's packets tell about its frames; a packet is named by its place j in the file.
    times: the seconds of each frame; order: the packet of each frame, or None where only decoding can tell."""

    def __init__(self, path):
        self.path, self.packets, self.damaged = path, [], set()
        rows, size, is_b, self.held = [], 0, [], [0]      # held: undecoded pictures left over from the packets before j
        for packet in _demux(path):
            if not rows:                             # only the codec stays usable when the file is closed
                stream, self.codec = packet.stream, packet.stream.codec_context
                avi, name = stream.container.format.name == "avi", self.codec.codec.canonical_name
                unit, rate = float(stream.time_base), float(stream.average_rate or 1)
                reorders, interlaced = self.codec.has_b_frames, self.codec.field_order > 1
                packs = bool(re.search(rb"DivX\d+(Build|b)\d+p", (self.codec.extradata or b"") + bytes(packet)))
            rows.append((packet.pts, packet.is_keyframe, packet.is_discard))
            size += packet.size
            if name == "mpeg4" and packet.size > 8:  # XviD: a packet of two pictures, later an empty one; or just that
                is_b += [0x80 <= p[0] < 0xC0 for p in bytes(packet).split(b"\0\0\1\xb6")[1:] if p]
            self.held.append(len(is_b) - len(rows) if name == "mpeg4" else 0)
            self.packets.append(packet) if size <= PACKET_BYTES else self.packets.clear()
        if rows and packet.is_corrupt:
            rows.pop()                                               # the file was cut here
        self.times, self.order = np.zeros(0), None
        if not rows:
            return
        pts, self.is_key, discard = zip(*rows)
        sound = name in ONE_TO_ONE and {*self.held} <= {0, packs} and not interlaced and None not in pts
        self.pts, self.whole, self.skippable = pts, [(0, len(rows) - 1)], name in SKIPPABLE
        if sound and avi and is_b:                                   # FFmpeg makes AVI's timestamps up, in packet order
            when, ahead = [], len(rows)
            for j in reversed(range(len(rows))):                     # no B-frame: it is shown when the next such comes
                when.append(j if is_b[j] else ahead - 0.5)
                ahead = ahead if is_b[j] else j
            self.pts = when[::-1]
        shown = [j for j, cut in enumerate(discard) if not cut]      # edit lists cut frames that others refer to
        start = self.is_key[0] and sound and all(self.pts[j] >= self.pts[0] for j in shown)
        if sound and avi and reorders and not is_b:
            pass                                                     # only its decoder knows
        elif start and len({*self.pts}) == len(rows):
            self.order = shown = sorted(shown, key=self.pts.__getitem__)
            keys = (j for j, key in enumerate(self.is_key) if key)   # how pictures are packed is told at the start only
            self.keys = [0] if any(self.held) else sorted(keys, key=self.pts.__getitem__)
        else:
            shown = [frame.pts for frame in self._decode(self.whole)]
        stamps = [pts[j] for j in shown]
        if None in stamps:
            stamps, unit = range(len(stamps)), 1 / rate
        self.times = np.array(sorted(stamps), np.float64) * unit
        self.times -= self.times[:1]

    def _decode(self, runs, wanted=None):
        """Feeds the packets of runs = [(start, end), ...], yields frames whose pts is the j of their packet, notes in
        `damaged` the packets that cannot be decoded. With `wanted` (a set of j), unreferenced pictures outside it are
        skipped, and damage counts that FFmpeg would conceal."""
        strict = {} if wanted is None else {"err_detect": "explode"}
        self.codec.options = {"max_pixels": str(MAX_PIXELS), **strict}
        packets = enumerate(self.packets or _demux(self.path))
        for start, end in runs:
            self.codec.flush_buffers()
            for j, packet in packets:
                if j < start:
                    continue
                skip = wanted is not None and self.skippable and j not in wanted
                skip = skip and not self.is_key[j] and not self.held[j + 1]    # or what the packet leaves over is lost
                self.codec.skip_frame = "NONREF" if skip else "DEFAULT"
                packet.pts = packet.dts = j
                try:
                    yield from self.codec.decode(packet)
                except FFmpegError:
                    self.damaged.add(j)
                if j == end:
                    break
            with suppress(FFmpegError):
                yield from self.codec.decode(None)

    def read(self, numbers, see):
        """{number: see(frame)} for a set of frame numbers."""
        frames = self._sparse(numbers, see) if self.order else self._in_order(numbers, see)
        if frames is None:
            fresh = _Clip(self.path)                                 # a decoder that has met none of the trouble
            fresh.order = self.order
            frames = fresh._in_order(numbers, see)
        if lost := numbers - frames.keys():
            raise VideoError(f"{self.path}: frame {min(lost)} of {len(self.times)} cannot be decoded "
                             f"(it is damaged, or has more than {MAX_PIXELS} pixels)")
        return frames

    def _in_order(self, numbers, see):
        """The definition: decode everything. A frame's number is its timestamp's rank, or its place in the output."""
        frames, rank = {}, {j: i for i, j in enumerate(self.order or ())}
        for count, frame in enumerate(self._decode(self.whole)):
            i = rank.get(frame.pts) if self.order else count
            if i in numbers:
                frames[i] = see(frame)
                if len(frames) == len(numbers):
                    break
        return frames

    def _sparse(self, numbers, see):
        """The same frames from few packets; None where the file contradicts its own timestamps or keyframes."""
        wanted, when = {self.order[i]: i for i in numbers}, self.pts.__getitem__
        runs, frames, intra, before = [], {}, {0}, -np.inf
        for j in sorted(wanted, key=when):
            key = self.keys[bisect_right(self.keys, when(j), key=when) - 1]
            if runs and key <= runs[-1][1]:
                runs[-1] = runs[-1][0], max(runs[-1][1], j)
            else:
                runs.append((key, j))
        for frame in self._decode(runs, wanted):
            if when(frame.pts) < before:
                self.order = None                                    # not shown in the order of the timestamps
                return None
            before = when(frame.pts)
            if frame.key_frame and frame.pict_type == PictureType.I:
                intra.add(frame.pts)
            if frame.pts in wanted:
                frames[wanted[frame.pts]] = see(frame)
        # Pictures shown before the keyframe of a jump refer to pictures jumped over: their damage does not matter.
        early = {j for start, end in runs for j in range(start, end) if when(j) < when(start)}
        whole = len(frames) == len(wanted) and self.damaged <= early
        return frames if whole and intra.issuperset(start for start, _ in runs) else None


def _to_rgb(frame, size, place, zoom):
    """One decoded frame -> (3, h, w) uint8 RGB, upright."""
    swap, mirror_x, mirror_y = _orientation(frame)
    if size is None:
        rgb = frame.to_ndarray(format="rgb24", threads=1).transpose(2, 0, 1)
    else:
        x, y = place                                                 # of the upright picture; the stored one is cropped
        x, y = 1 - x if mirror_x else x, 1 - y if mirror_y else y
        x, y = (y, x) if swap else (x, y)
        w, h = frame.width, frame.height
        side = max(int(min(w, h) / zoom) // 2 * 2, 1)                # even: 4:2:0 has a colour sample per 2 x 2 pixels
        kind = w, h, frame.format.name, frame.colorspace, frame.color_range
        graph, crop = _scaler(threading.get_ident(), kind, side, size)
        for axis, free in (("x", x * (w - side)), ("y", y * (h - side))):
            crop.process_command(axis, str(int(free) // 2 * 2))
        graph.vpush(frame)
        green, blue, red = (np.frombuffer(p, np.uint8).reshape(size, -1)[:, :size] for p in graph.vpull().planes)
        rgb = np.stack((red, green, blue))
    rgb = rgb.swapaxes(1, 2) if swap else rgb
    return rgb[:, ::-1 if mirror_y else 1, ::-1 if mirror_x else 1]


@lru_cache(32)
def _scaler(thread, kind, side, size):
    """The filter graph that cuts a square and scales it, and its crop filter. Kept, as building one takes as long as
    opening a small clip; no graph may serve two threads. Without these flags colours are 1 to 3 levels too dark; with
    them swscale makes planes (gbrp) 2.5 times as fast as rgb24."""
    w, h, pixels = kind[:3]
    graph = av.filter.Graph()
    graph.threads = 1
    crop = graph.add("crop", f"{side}:{side}:0:0:exact=1")
    graph.link_nodes(graph.add("buffer", f"video_size={w}x{h}:pix_fmt={pixels}:time_base=1/1"), crop,
                     graph.add("scale", f"{size}:{size}:flags=bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"),
                     graph.add("format", "gbrp"), graph.add("buffersink")).configure()
    return graph, crop


def _orientation(frame):
    """-> (swap x and y, then mirror x, then mirror y), what turns the stored picture upright."""
    try:
        matrix = SideDataContainer(frame).get("DISPLAYMATRIX")       # frame.side_data would keep the frame: a cycle
    except ValueError:                                               # PyAV cannot list the EXIF data of a photograph
        turns = frame.rotation // 90 % 4
        return turns % 2 == 1, turns in (2, 3), turns in (1, 2)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]
    swap = abs(a) < abs(b)
    return (True, c < 0, b < 0) if swap else (False, a < 0, d < 0)


def encode_picture(picture, suffix):
    """One picture, uint8 RGB (height, width, 3) -> the bytes of a .jpg (of high quality) or a .png file."""
    codec, pixels = {".jpg": ("mjpeg", "yuvj420p"), ".png": ("png", "rgb24")}[suffix]
    encoder = av.CodecContext.create(codec, "w")
    encoder.height, encoder.width, encoder.pix_fmt = *picture.shape[:2], pixels
    encoder.time_base, encoder.thread_count, encoder.qmax = Fraction(1, 3), 1, 4
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return b"".join(map(bytes, encoder.encode(frame)))


# ---- what a row and a benchmark are ---------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Example:
    """One row of a benchmark, whatever its file format."""
    id: str                          # unique within the split
    media: str                       # the clip below the data root: folder + stem ("videos/all/video7")
    text: str = ""                   # the question; "" where there is none
    answer: str | int | None = None  # words (open-ended) | 0-based index (options, classes) | None where hidden
    options: tuple = ()              # the A choices
    captions: tuple = ()             # retrieval and pre-training: the caption(s), or ONE joined paragraph
    kind: str = ""                   # for break-downs: a question's first two words, FrameQA's type, "Q->A" or "QA->R"
    seconds: tuple | None = None     # (start, end) part of the clip to sample from; None: all of it
    frames: tuple | None = None      # (first, last) 0-based inclusive frame numbers to sample from; the sampler clamps
    boxes: tuple = ()                # VCR: (x1, y1, x2, y2) as fractions of width and height, by the objects' numbers


@dataclass(frozen=True)
class Benchmark:
    """What training and evaluation need to know. Where the owners give no "val", it is a held-out slice of train."""
    dataset: str
    task: str                        # vqa choice retrieval vcr pretrain action
    read: Callable                   # (root, split) -> list[Example]
    splits: dict                     # our split name -> which of the owners' rows it reads
    metric: str
    chance: float | None = None      # of the metric's first figure on test
    answers: int | None = None       # size of the closed answer list as published, or the number of classes
    join: str = "options"            # "question Options: o1 .. Answer: oi" | "pair": question [SEP] oi | "bare": oi
    length: int = 40                 # L, tokens with [CLS] and [SEP]
    still: bool = False              # clips of one frame, not of T times the same picture
    flip: bool = False               # may training mirror the picture? never where left or right can be the answer
    rows: dict = field(default_factory=dict)  # official number of examples per split; absent: unknown
    paper: str = ""                  # the published All-in-one figure and its source; "": none found


# ---- media: from an id to a file that lies inside the data root -----------------------------------------------------

MEDIA = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".wmv", ".flv", ".mts", ".m2ts",
         ".ts", ".ogg", ".ogv", ".gif",
         ".jpg", ".jpeg", ".png", ".webp")


class MissingMedia(UserError):
    """A clip that an annotation file names is not on disk."""


def stem(name):
    """A file name without its media extensions: "a.mp4.webm" -> "a", "b." -> "b"; other dots belong to the name."""
    base, extension = os.path.splitext(name)
    return stem(base) if base and (extension == "." or extension.lower() in MEDIA) else name


def safe(path):
    """`path` itself if, as text, it names something below the folder it will be joined to. Raises ValueError."""
    if not isinstance(path, str) or "\0" in path or len(path.encode()) > 1000 or {"", ".", ".."} & {*path.split("/")}:
        raise ValueError(f"{path!r:.80} is no path below the data folder (relative, without '..')")
    return path


@functools.lru_cache(maxsize=None)
def listing(folder, changed):
    """{stem: file name}; `changed` is the folder's time stamp, so that new files are seen. mp4 wins over avi, ..."""
    rank = {extension: n for n, extension in enumerate(MEDIA)}
    names = sorted(os.listdir(folder), key=lambda name: (rank.get(os.path.splitext(name)[1].lower(), -1), name))
    return {stem(name): name for name in reversed(names)}


def stems(folder):
    """{stem: file name} of a folder, {} where there is none."""
    return listing(folder, os.stat(folder).st_mtime_ns) if os.path.isdir(folder) else {}


def inside(root, path):
    """The absolute path, links resolved; it must still lie inside `root`."""
    real, top = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([real, top]) != top:
        raise UserError(f"{path} is {real}, outside the data folder {top}: move it there, links may not leave it")
    return real


def find_media(root, media):
    """Absolute path of a clip: a file with a media extension, or a folder of jpgs. `root`: a folder, or a .jsonl in it.

    The exact name wins over the same stem with another extension, which will do in an owner's folder, since releases
    differ, but not beside one's own .jsonl. Ids are looked up in a listing, never globbed.
    Raises MissingMedia if there is none, UserError if it leaves the root by "..", as an absolute path or by a link.
    """
    own = root.endswith(".jsonl")
    root = os.path.dirname(root) or "." if own else root
    try:
        folder, name = os.path.split(os.path.join(root, safe(media)))
    except ValueError as error:
        raise UserError(str(error)) from None
    found = name if os.path.exists(os.path.join(folder, name)) else None if own else stems(folder).get(stem(name))
    if found is None and own:
        raise MissingMedia(f"there is no {os.path.join(folder, name)}")
    if found is None:
        raise MissingMedia(f"no clip {name!r} in {folder}: expected a folder of jpgs or a file in {' '.join(MEDIA)}")
    return inside(root, os.path.join(folder, found))


def clips_in(root, *folders):
    """clip(*names) -> media id: the first name in the first folder where it is on disk, else just the first."""
    names_in = functools.cache(lambda folder: stems(os.path.join(root, folder)))
    def clip(*names):
        medias = [stem(f"{folder}/{safe(name)}" if folder else safe(name)) for folder in folders for name in names]
        return next((m for m in medias if os.path.basename(m) in names_in(os.path.dirname(m))), medias[0])
    return clip


# ---- annotation files: rows and their numbers -----------------------------------------------------------------------

BLANK = object()  # what rows_*(path) yield for a row that counts but holds nothing


def decoded(path):
    """Lines of UTF-8, decoded one by one so that a bad byte is blamed on its own row."""
    with open(path, "rb") as file:
        for n, line in enumerate(file):
            yield (line if n else line.removeprefix(b"\xef\xbb\xbf")).decode()


def rows_lines(path):
    return (line.strip() or BLANK for line in decoded(path))


def rows_jsonl(path):
    return (json.loads(line) if line.strip() else BLANK for line in decoded(path))


def rows_json(path):
    """The items of an array, of MSRVTT's array of captions inside an object, or an object's (name, value) pairs."""
    with open(path, encoding="utf-8-sig") as file:
        rows = json.load(file)
    return rows if isinstance(rows, list) else rows.get("sentences") or rows.get("annotations") or rows.items()


def rows_csv(path, delimiter=",", header=True, quoting=csv.QUOTE_MINIMAL):
    """Dicts by the header's names, or lists of cells. A header counts as row 1, as in a spreadsheet."""
    names = None
    for cells in csv.reader(decoded(path), delimiter=delimiter, quoting=quoting, strict=True):
        if header and names is None:
            names, cells = cells, None
        if names and cells and len(cells) != len(names):
            raise ValueError(f"{len(cells)} columns where the header has {len(names)}")
        yield BLANK if not cells else dict(zip(names, cells)) if names else cells

rows_tabs = partial(rows_csv, delimiter="\t")
rows_cells = partial(rows_tabs, header=False)
rows_raw = partial(rows_cells, quoting=csv.QUOTE_NONE)  # for files with stray quotes
DIALECTS = {  # file name -> how to read it; the first that matches
    "*.jsonl": rows_jsonl, "*.json": rows_json, "*.txt": rows_lines, "*.list": rows_lines,
    "T*_question.csv": rows_tabs, "ht100_videos_split.csv": rows_tabs, "ego4d_train_subset.csv": rows_cells,
    "*_success_full.tsv": rows_cells, "*GCC*.tsv": rows_raw, "LSMDC16_*.csv": rows_raw, "*.csv": rows_csv}


def read_rows(path, make):
    """make(row, n), an Example or a list, of all rows of a file. Whatever is wrong with row n: a UserError about it."""
    out, n, end, name = [], 0, object(), os.path.basename(path)
    try:
        rows = iter(next(rows for pattern, rows in DIALECTS.items() if fnmatch.fnmatchcase(name, pattern))(path))
        for n in itertools.count(1):
            if (row := next(rows, end)) is end:
                return out
            made = make(row, n) if row is not BLANK else []
            out += made if isinstance(made, list) else [made]
    except (RecursionError, MemoryError):
        raise UserError(f"{path}, row {n}: nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, SyntaxError, csv.Error, OSError) as e:
        what = "missing " * isinstance(e, KeyError) + " ".join(str(e).split())[:300]
        raise UserError(f"{path}, row {n}: {what}" if n else f"{path}: {what}") from None


def pick(root, source, *names):
    """The first of `names` that exists in the root or its folder annotations/; the official form is named first."""
    for name, top in itertools.product(names, ("", "annotations")):
        if os.path.exists(path := os.path.join(root, top, name)):
            return path
    raise UserError(f"no annotations in {root} or {root}/annotations: expected {' or '.join(names)}; from {source}")

OURS = {"train": "train", "val": "val", "test": "test"}
VAL = {"train": "train", "test": "val"}  # for owners who hide the labels of their test


def reader(source, *files, folders=("videos",), names=OURS):
    """Makes (root, split) -> list[Example] of a function of one row: (row, n, clip) -> Example or a list of them.

    `files`: the forms, told apart by which file exists; `folders`: where media may lie; in both, {} and {1} are the
    words of names[split]. clip(name): the media id. `source`: where to get the files.
    """
    def wrap(make):
        def read(root, split):
            own = names[split].split()
            clip = clips_in(root, *(folder.format(*own) for folder in folders))
            return read_rows(pick(root, source, *(f.format(*own) for f in files)), lambda row, n: make(row, n, clip))
        return functools.wraps(make)(read)
    return wrap


# ---- cells: checked values; each raises ValueError with the value ---------------------------------------------------

TEXT = 10_000  # characters in a text or a literal; the longest paragraphs have a third of that


def words(value):
    """A text without outer blanks or line breaks (ActivityNet's sentences and WebVid's captions have them)."""
    if not isinstance(value, str) or not value.strip() or len(value) > TEXT:
        raise ValueError(f"{value!r:.60} is no text of 1 to {TEXT} characters")
    value.encode()  # a lone surrogate, which JSON can spell, would break the tokenizer much later
    return " ".join(value.split())


def index(value, n, first=0):
    """0-based index below n, from an int or its digits; `first` is the number that the file gives to the first one."""
    number = int(value) if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value) else value
    if type(number) is not int or not first <= number < first + n:
        raise ValueError(f"{value!r:.60} is no number from {first} to {first + n - 1}")
    return number - first


def span(start, end):
    """(start, end) in seconds."""
    start, end = float(start), float(end)
    if not 0 <= start <= end < math.inf:
        raise ValueError(f"{start} to {end} is no span of seconds")
    return start, end


def either(row, *names):
    """The cell of the first name that the row has: the forms of a file differ in their names."""
    return row[next((name for name in names if name in row), names[0])]


# ---- examples: one constructor per task -----------------------------------------------------------------------------

def kind_of(question):
    """The first two words name the kind of a question: "what color", "who is", "how many"."""
    return " ".join(question.lower().split()[:2])


def asked(id, media, question, answer, kind=None):
    question = words(question)
    return Example(str(id), media, question, words(answer), kind=kind or kind_of(question))


def choice(id, media, options, answer, A, question="", kind=None, **more):
    if not isinstance(options, (list, tuple)) or len(options) != A:
        raise ValueError(f"{options!r:.60} is no list of {A} options")
    question = question and words(question)
    kind = kind or kind_of(question)
    return Example(str(id), media, question, index(answer, A), tuple(map(words, options)), kind=kind, **more)


def captioned(id, media, caption, **more):
    return Example(str(id), media, captions=(words(caption),), **more)


def place(right, wrong, key):
    """(options, answer), the place of the right text depending on `key` alone; a constant place would reward ties."""
    at = zlib.crc32(key.encode()) % (len(wrong) + 1)
    return (*wrong[:at], right, *wrong[at:]), at


def by_clip(examples):
    """One example per clip with all its captions, in the order of first mention."""
    clips = {}
    for e in examples:
        clips.setdefault(e.media, (e, []))[1].extend(e.captions)
    return [replace(e, captions=tuple(captions)) for e, captions in clips.values()]


def distract(examples, A):
    """A training set where only a test exists: each caption with A - 1 captions of other clips, the same every time."""
    rng, out = random.Random(0), []
    for e in examples:
        texts = {e.captions[0]: None}  # in order, without repeats
        for other in (rng.choice(examples) for _ in range(1000)):
            if other.media != e.media:
                texts[other.captions[0]] = None
            if len(texts) == A:
                break
        else:
            raise UserError(f"{len(examples)} captions are too few to draw {A - 1} wrong ones from other clips")
        right, *wrong = texts
        options, answer = place(right, wrong, e.id)
        out.append(replace(e, captions=(), options=options, answer=answer))
    return out


# ---- readers: question answering ------------------------------------------------------------------------------------

MSRVTT = ("videos/all", "videos", "TrainValVideo", "TestVideo")
GIFS = partial(reader, "github.com/YunseokJANG/tgif-qa (dataset/) or ClipBERT", folders=("gifs",),
               names={"train": "Train train", "test": "Test test"})
XU = "github.com/xudejing/video-question-answering"


@reader(f"{XU} or ClipBERT", "{}_qa.json", "msrvtt_qa_{}.jsonl", "msrvtt_qa/{}.jsonl", folders=MSRVTT)
def read_msrvtt_qa(row, n, clip):
    """`video_id` is an int in the official json, "videoN" in ClipBERT's jsonl, which has no ids."""
    video = row["video_id"]
    video = f"video{video}" if isinstance(video, int) else video
    return asked(row.get("id", n), clip(video), row["question"], row["answer"])


def read_msvd_qa(root, split):
    """Clips are numbered; youtube_mapping.txt has their file names. (Some mirrors call them vid1.avi, ...)"""
    pairs = read_rows(pick(root, XU, "youtube_mapping.txt"), lambda line, n: tuple(line.rsplit(maxsplit=1)))
    names = {number: name for name, number in pairs}
    def make(row, n, clip):
        video = f"vid{index(row['video_id'], 10**6)}"
        return asked(row["id"], clip(names[video], video), row["question"], row["answer"])
    files = "{}_qa.json", "{}_qa_encode.json", "msvd_{}_qa_encode.json"
    return reader(XU, *files, folders=("YouTubeClips", "videos"))(make)(root, split)


def tgif_choice(row, n, clip):
    """Action, transition. The csv's last headers are swapped: `vid_id` is the question's id, `key` the gif's number."""
    options = row["options"] if "options" in row else [row[f"a{i}"] for i in range(1, 6)]
    return choice(row.get("vid_id", n), clip(row["gif_name"]), options, row["answer"], 5, row["question"])


@GIFS("{}_frameqa_question.csv", "frameqa_{1}.jsonl")
def read_tgif_frame(row, n, clip):
    types = "object", "number", "color", "location"
    kind = types[index(row["type"], 4)] if "type" in row else words(row["answer_type"])
    return asked(row.get("vid_id", n), clip(row["gif_name"]), row["question"], row["answer"], kind)


@reader("github.com/jayleicn/TVQA (data/)", "tvqa_{}.jsonl", names=VAL,
        folders=("frames_hq", "frames/raw_frames/frames_hq", "raw_frames/frames_hq"))
def read_tvqa(row, n, clip):
    """Frames at 3 per second in files that count from 1: second t is file max(1, int(3 t)). Some rows have no times.

    Differs: the released code widens spans of less than 2 T frames.
    """
    video, frames = row["vid_name"], None
    show = "bbt" if re.match(r"s\d", video) else video.split("_")[0]  # The Big Bang Theory's clips carry no prefix
    if show not in ("bbt", "castle", "friends", "grey", "house", "met"):
        raise ValueError(f"{video!r:.60} is of no known show")
    if row["ts"] != "NaN-NaN":
        start, end = row["ts"].split("-")
        frames = tuple(max(1, int(t * 3)) - 1 for t in span(start, end))
    options = [row[f"a{i}"] for i in range(5)]
    return choice(row["qid"], clip(f"{show}_frames/{video}"), options, row["answer_idx"], 5, row["q"], frames=frames)


def read_vcr(root, split):
    """Two examples a row: Q->A, and QA->R with the true answer appended to the question.

    An object is spoken of as class and number ("person 0"). Numbers follow the first mention over question, answers and
    rationales; boxes[number] is its box. At most 21 boxes, as in the released code. Tokens index objects from 0.
    """
    @functools.lru_cache(maxsize=8)  # the questions about one picture follow each other
    def metadata(path):
        with open(inside(root, os.path.join(root, path)), encoding="utf-8") as file:
            return json.load(file)
    def make(row, n, clip):
        objects, numbers, meta = row["objects"], {}, metadata(clip(row["metadata_fn"]))
        def name(i):
            return f"{objects[index(i, len(objects))]} {numbers.setdefault(i, len(numbers))}"
        def say(tokens):
            return " ".join(token if isinstance(token, str) else " ".join(map(name, token)) for token in tokens)
        question = say(row["question"])
        answers, rationales = ([*map(say, row[name])] for name in ("answer_choices", "rationale_choices"))
        sizes = [1 + index(meta[side], 10**5, first=1) for side in ("width", "height")] * 2
        boxes = [zip(meta["boxes"][i], sizes) for i in [*numbers][:21]]
        boxes = tuple(tuple(min(max(x / size, 0.0), 1.0) for x, size in box) for box in boxes)
        if len(meta["boxes"]) != len(objects) or not all(len(box) == 4 and all(x >= 0 for x in box) for box in boxes):
            raise ValueError(f"{row['metadata_fn']} has not a box of four numbers per object")
        a, r, media = row["answer_label"], row["rationale_label"], clip(row["img_fn"])
        question_and_answer = f"{question} {answers[index(a, 4)]}"
        return [choice(f"{row['annot_id']}/qa", media, answers, a, 4, question, "Q->A", boxes=boxes),
                choice(f"{row['annot_id']}/qar", media, rationales, r, 4, question_and_answer, "QA->R", boxes=boxes)]
    files = "{}.jsonl", "vcr1annots/{}.jsonl"
    return reader("visualcommonsense.com", *files, folders=("vcr1images",), names=VAL)(make)(root, split)


# ---- readers: retrieval and multiple choice -------------------------------------------------------------------------

CLIP4CLIP = "CLIP4Clip's msrvtt_data.zip, the MSR-VTT release, Frozen in Time or ClipBERT"


def msrvtt_captions(root, without):
    """An example per caption of the clips that are not among those of the examples `without`."""
    owners, others = "train_val_videodatainfo.json", ("annotation/MSR_VTT.json", "msrvtt_retrieval/train.jsonl")
    files = [pick(root, CLIP4CLIP, "MSRVTT_data.json", owners, *others)]
    if files[0].endswith(owners):  # the owners' captions come in two files
        files.append(pick(root, CLIP4CLIP, "test_videodatainfo.json"))
    clip, tested = clips_in(root, *MSRVTT), {e.media for e in without}
    def make(row, n):
        video = either(row, "video_id", "image_id", "clip_name")
        return captioned(f"{video}/{n}", clip(video), row["caption"])
    return [e for file in files for e in read_rows(file, make) if e.media not in tested]


@reader(CLIP4CLIP, "MSRVTT_JSFUSION_test.csv", "msrvtt_test.csv", "msrvtt_retrieval/test.jsonl", folders=MSRVTT)
def msrvtt_pairs(row, n, clip):
    """1k-A fixes one caption per test clip. (Frozen keeps that choice in a pickle, which is not opened.)"""
    key, video = either(row, "key", "retrieval_key"), either(row, "video_id", "clip_name")
    return captioned(key, clip(video), either(row, "sentence", "caption"))


def read_msrvtt(root, split):
    """1k-A: every clip that is not tested is for training ("9k"); ClipBERT's train.jsonl lists its own ("7k")."""
    test = msrvtt_pairs(root, "test")
    return test if split == "test" else by_clip(msrvtt_captions(root, without=test))


@reader("ClipBERT, the released code or VindLU", "msrvtt_mc_test.jsonl", "msrvtt_mc_test.json", folders=MSRVTT)
def msrvtt_options(row, n, clip):
    return choice(n, clip(either(row, "clip_name", "video")), either(row, "options", "caption"), row["answer"], 5)


def read_msrvtt_mc(root, split):
    test = msrvtt_options(root, "test")
    return test if split == "test" else distract(msrvtt_captions(root, without=test), 5)


def read_didemo(root, split):
    """A clip's sentences are joined in file order. A clip may be spelled with two extensions, or end in a bare dot."""
    def make(row, n, clip):
        media = clip(either(row, "video", "clip_name"))
        return captioned(os.path.basename(media), media, either(row, "description", "caption"))
    source, folders = "github.com/LisaAnne/LocalizingMoments (data/) or ClipBERT", ("video", "videos")
    sentences = reader(source, "{}_data.json", "didemo_retrieval/{}.jsonl", folders=folders)(make)(root, split)
    return [replace(e, captions=(" ".join(e.captions),)) for e in by_clip(sentences)]


@reader("ActivityNet Captions' captions.zip or the released code", "{}.json", "{1}.jsonl",
        names={"train": "train train", "test": "val_1 val1"}, folders=("videos", "activitynet_frames"))
def read_activitynet(row, n, clip):
    """Sentences begin with blanks. The lists *_ids.json name more clips than are captioned and are not read."""
    if isinstance(row, dict):
        return captioned(row["clip_name"], clip(row["clip_name"]), row["caption"])
    video, captions = row
    return captioned(video, clip(video), " ".join(captions["sentences"]))

LSMDC = partial(reader, "MPII's LSMDC page (with a password)", folders=("avi", "videos", ""))


@LSMDC("LSMDC16_{}.csv", names={"train": "annos_training", "val": "annos_val", "test": "challenge_1000_publictect"})
def lsmdc_pairs(row, n, clip):
    name, _, _, _, _, sentence = row
    return captioned(n, clip(f"{name.rsplit('_', 1)[0]}/{name}"), sentence)  # <movie>/<clip>


def read_lsmdc(root, split):
    """Differs: the released reader feeds the clip's id as its caption."""
    return by_clip(lsmdc_pairs(root, split)) if split == "train" else lsmdc_pairs(root, split)


def read_lsmdc_mc(root, split):
    """The test counts its answers from 1; train and valid have no such column and put the right sentence first."""
    def make(row, n, clip):
        name, _, _, _, _, right, *wrong = row
        if split == "test":
            options, answer = (right, *wrong[:-1]), index(wrong[-1], 5, first=1)
        else:
            options, answer = place(right, wrong, f"{name}/{n}")
        return choice(n, clip(f"{name.rsplit('_', 1)[0]}/{name}"), options, answer, 5)
    names = {"train": "train", "val": "valid", "test": "test_randomized"}
    return LSMDC("LSMDC16_multiple_choice_{}.csv", names=names)(make)(root, split)


def read_ego4d_mc(root, split):
    """Test: Python literals in csv cells. Training: narrations and distractors. Frames: 120 around the narrated one.

    This is not EgoVLP's EgoMCQ, which has one text and five clips.
    """
    def window(frame):
        return max(0, index(frame, 10**9) - 60), index(frame, 10**9) + 59
    def test(row, n, clip):
        (uid, frame, *_, right), answers = (ast.literal_eval(row[name][:TEXT]) for name in ("question", "answers"))
        options = [answer[-1] for answer in answers[:4]]
        if right not in options:
            raise ValueError(f"the right narration {right!r:.60} is not among the options")
        answer = max(i for i, option in enumerate(options) if option == right)  # the last of equal texts
        return choice(n, clip(uid), options, answer, 4, frames=window(frame))
    def train(row, n, clip):
        uid, _, _, _, _, frame, narration, *_ = row
        return captioned(n, clip(uid), narration, frames=window(frame))
    source = "the released code (meta_data/ego4d)"
    if split == "test":
        return reader(source, "mc_val.csv")(test)(root, split)
    return distract(reader(source, "ego4d_train_subset.csv")(train)(root, split), 4)


# ---- readers: pre-training and action recognition -------------------------------------------------------------------

@reader("the WebVid-2.5M release or the released code", "results_2M_{}.csv", "webvid_{1}_success_full.tsv",
        names={"train": "train training", "test": "val validation"}, folders=("videos", "{}"))
def read_webvid(row, n, clip):
    """Rows without caption or folder (empty or "NaN") name no clip. The tsv: no header, captions of several lines."""
    if isinstance(row, list):
        caption, name = row
        return captioned(name, clip(name), caption)
    video, page, caption = row["videoid"], row["page_dir"], row["name"]
    blank = {"", "nan"} & {cell.strip().lower() for cell in (video, page, caption)}
    return [] if blank else captioned(video, clip(f"{page}/{video}"), caption)


@reader("Google's Conceptual Captions page or the released code", "{2}.tsv", "cc3m_{1}_success_full.tsv",
        names={"train": "train training Train_GCC-training", "test": "val validation Validation_GCC-1.1.0-Validation"},
        folders=("{1}", "images"))
def read_cc3m(row, n, clip):
    """No header: caption and url, whose picture is stored as crc32(url) as in Frozen; or caption and path."""
    caption, name = row
    return captioned(name, clip(str(zlib.crc32(name.encode())) if "://" in name else name), caption)


def read_howto100m(root, split):
    """An example per narration of the folder of <id>.csv, stretched to 4 s as in the released code.

    All 136 million would need some 50 GB of memory: shorten the list of videos, as the released code does.
    """
    source = "the HowTo100M page or the released code"
    listed = reader(source, "HowTo100M_v1.csv", "ht100_videos_split.csv")
    medias = listed(lambda row, n, clip: clip(either(row, "video_id", "Name")))(root, split)
    said = pick(root, source, "howto100m_captions", "howto100m_csv")
    def narration(row, n, media):
        start, end = span(row["start"], row["end"])
        pad = max(0.0, (4 - (end - start)) / 2)
        return captioned(f"{media}/{n}", media, row["text"], seconds=(max(0.0, start - pad), end + pad))
    files = {media: os.path.join(said, f"{os.path.basename(media)}.csv") for media in medias}
    return [e for media, file in files.items() if os.path.exists(file)  # some videos are silent
            for e in read_rows(file, partial(narration, media=media))]


def read_hmdb51(root, split):
    """Split 1 of testTrainMulti_7030_splits/, classes in alphabetical order; or the released list with its own labels.

    The two number some classes differently (sword and sword_exercise change places): never mix them.
    """
    path = pick(root, "the HMDB51 page (test_train_splits.rar) or github.com/FingerRec/RHE",
                "testTrainMulti_7030_splits", f"hmdb51_rgb_{VAL[split]}_split_1.txt")
    clip, end = clips_in(root, "hmdb51", "videos", ""), "_test_split1.txt"
    def listed(row, n):
        name, _, label = row.rsplit(maxsplit=2)
        name = name.rsplit("/", 1)[-1]
        return Example(name, clip(name), answer=index(label, 51))
    def official(row, n, label, folder):
        name, use = row.rsplit(maxsplit=1)  # 1 train, 2 test, 0 not in this split
        used = ("unused", "train", "test")[index(use, 3)] == split
        return Example(name, clip(f"{folder}/{name}", name), answer=label) if used else []
    if not os.path.isdir(path):
        return read_rows(path, listed)
    folders = sorted(name.removesuffix(end) for name in os.listdir(path) if name.endswith(end))
    return [e for label, folder in enumerate(folders)
            for e in read_rows(os.path.join(path, folder + end), partial(official, label=label, folder=folder))]


def read_k400(root, split):
    """The csv, classes being the training file's labels in alphabetical order; or the released lists "path label".

    A clip is <split>/<class>/<id>_<start>_<end> or <split>/<class>/<id>, with blanks or underscores in the class.
    """
    names = {"train": "train train train", "test": "val validate test"}
    forms = partial(reader, "github.com/activitynet/ActivityNet (Crawler/Kinetics/data) or the released code",
                    "kinetics-400_{}.csv", "{1}.csv", names=names, folders=("{}",))
    @functools.cache
    def classes():
        return sorted({*forms()(lambda row, n, clip: row["label"])(root, "train")})
    def make(row, n, clip):
        if isinstance(row, str):
            path, label = row.rsplit(maxsplit=1)
            name = "/".join(path.split("/")[-2:])
            return Example(name, clip(name), answer=index(label, 400))
        video, label = row["youtube_id"], row["label"]
        timed = f"{video}_{index(row['time_start'], 10**6):06d}_{index(row['time_end'], 10**6):06d}"
        places = (f"{folder}/{name}" for folder in (label, label.replace(" ", "_")) for name in (timed, video))
        return Example(timed, clip(*places), answer=classes().index(label))
    return forms("k400_{2}_tsm.list", "kinetics_video_{}list.txt")(make)(root, split)


# ---- one's own data -------------------------------------------------------------------------------------------------

def read_jsonl_file(path, split=None):
    """Anyone's own data, one JSON object a line; paths count from the file's folder. `split` None: all rows.

    {"video": .., "question": .., "answer": "words"}, or with "options": [..] and "answer": 0-based index, or
    {"video": .., "caption": ..}; also "id", and "split": "train" (the default), "val" or "test".
    """
    known = {"video", "question", "answer", "options", "caption", "id", "split"}
    def make(row, n):
        if not isinstance(row, dict) or not known >= row.keys() or row.get("split", "train") not in OURS:
            raise ValueError(f"expected an object with fields of {' '.join(sorted(known))}; split: train, val or test")
        id, media = words(str(row.get("id", n))), safe(os.path.normpath(row["video"]))
        if "caption" in row:
            e = captioned(id, media, row["caption"])
        elif "options" in row:
            e = choice(id, media, row["options"], row["answer"], max(2, len(row["options"])), row["question"])
        else:
            e = asked(id, media, row["question"], row["answer"])
        return row.get("split", "train"), e
    rows = read_rows(path, make)
    if len({e.id for _, e in rows}) < len(rows):
        raise UserError(f'{path}: ids repeat; give every line an "id" of its own, or none')
    return [e for part, e in rows if split in (None, part)]


def read_own(task, root, split):
    """The rows of one's own file that are marked `split`; all must be of the kind that the task needs."""
    examples = read_jsonl_file(root, split)
    for e in examples:
        kind = "retrieval" if e.captions else "choice" if e.options else "vqa"
        if kind != ("retrieval" if task == "pretrain" else task):
            raise UserError(f"{root}: row {e.id!r} is for {kind}, not {task}; own files: vqa choice retrieval pretrain")
    return by_clip(examples) if (task, split) == ("retrieval", "train") else examples


# ---- the registry ---------------------------------------------------------------------------------------------------

NO_VAL, HIDDEN = {"train": "train", "test": "test"}, {"train": "train", "test": "val (the labels of test are hidden)"}
DRAWN = {"train": "captions of other clips, drawn distractors", "test": "test"}
ACC, RANKS, MATCH = "accuracy", "R@1/5/10, MedR", "matching + MLM accuracy"
BENCHMARKS = {
    "tgif-action": Benchmark(
        "tgif", "choice", GIFS("{}_action_question.csv", "action_{1}.jsonl")(tgif_choice), NO_VAL, ACC, 1 / 5,
        rows={"train": 20471, "test": 2274}, paper="93.0 (released EVAL.md; paper 92.5)"),
    "tgif-transition": Benchmark(
        "tgif", "choice", GIFS("{}_transition_question.csv", "transition_{1}.jsonl")(tgif_choice), NO_VAL, ACC, 1 / 5,
        rows={"train": 52704, "test": 6232}),
    "tgif-frame": Benchmark(
        "tgif", "vqa", read_tgif_frame, NO_VAL, ACC, answers=1540, rows={"train": 39392, "test": 13691},
        paper="65.0 (released EVAL.md, OOV dropped; paper 64.0)"),
    "msrvtt-qa": Benchmark(
        "msrvtt", "vqa", read_msrvtt_qa, OURS, ACC, answers=1500, rows={"train": 158581, "val": 12278, "test": 72821},
        paper="42.9 (released EVAL.md, OOV dropped; paper 42.5)"),
    "msvd-qa": Benchmark(
        "msvd", "vqa", read_msvd_qa, OURS, ACC, answers=1000, rows={"train": 30933, "val": 6415, "test": 13157},
        paper="46.1 (released EVAL.md, OOV dropped; paper 46.5)"),
    "tvqa": Benchmark(
        "tvqa", "choice", read_tvqa, HIDDEN, ACC, 1 / 5, length=100, rows={"train": 122039, "test": 15253}),
    "msrvtt": Benchmark(
        "msrvtt", "retrieval", read_msrvtt, {"train": "1k-A, 9k clips", "test": "1k-A"}, RANKS, 1 / 1000,
        rows={"train": 9000, "test": 1000}, paper="35.6/62.8/71.3 (released EVAL.md, VTC; paper 36.1/62.3/72.1)"),
    "didemo": Benchmark(
        "didemo", "retrieval", read_didemo, OURS, RANKS, 1 / 1004, length=80,
        rows={"train": 8395, "val": 1065, "test": 1004}, paper="32.7/61.4/73.5 (as cited by Singularity)"),
    "activitynet": Benchmark(
        "activitynet", "retrieval", read_activitynet, {"train": "train", "test": "val_1 (test has no captions)"}, RANKS,
        1 / 4917, rows={"train": 10009, "test": 4917}, paper="22.4/53.7/67.7 (as cited by Singularity)"),
    "lsmdc": Benchmark(
        "lsmdc", "retrieval", read_lsmdc, OURS | {"test": "1000 public pairs"}, RANKS,
        1 / 1000, length=80, rows={"val": 7408, "test": 1000}),
    "msrvtt-mc": Benchmark(
        "msrvtt", "choice", read_msrvtt_mc, DRAWN, ACC, 1 / 5, join="bare", rows={"train": 140200, "test": 2990},
        paper="78.1 zero-shot (released EVAL.md; paper 77.5)"),
    "lsmdc-mc": Benchmark(
        "lsmdc", "choice", read_lsmdc_mc, OURS, ACC, 1 / 5, join="bare",
        rows={"train": 101079, "val": 7408, "test": 10053}, paper="56.7 zero-shot (released EVAL.md; paper 56.3)"),
    "ego4d-mc": Benchmark(
        "ego4d", "choice", read_ego4d_mc, DRAWN, ACC, 1 / 4, join="bare",
        paper="36.5 zero-shot (released EVAL.md; paper 36.5)"),
    "vcr": Benchmark(
        "vcr", "vcr", read_vcr, HIDDEN, "Q->AR, Q->A, QA->R", 1 / 16, join="pair",
        rows={"train": 2 * 212923, "test": 2 * 26534}),
    "webvid": Benchmark("webvid", "pretrain", read_webvid, {"train": "train", "test": "val"}, MATCH),
    "howto100m": Benchmark("howto100m", "pretrain", read_howto100m, {"train": "train"}, MATCH),
    "cc3m": Benchmark(
        "cc3m", "pretrain", read_cc3m, {"train": "train", "test": "val"}, MATCH, still=True,
        rows={"train": 3318333, "test": 15840}),
    "hmdb51": Benchmark(
        "hmdb51", "action", read_hmdb51, {"train": "split 1", "test": "split 1"}, "top-1", 1 / 51, answers=51,
        flip=True, rows={"train": 3570, "test": 1530}, paper="51.2 linear probe (released EVAL.md; paper 50.8)"),
    "k400": Benchmark(
        "k400", "action", read_k400, HIDDEN, "top-1", 1 / 400, answers=400, flip=True, rows={"test": 19906},
        paper="52.3 linear probe (released EVAL.md; paper 50.8)")}


def hold_out(examples, part, share=0.05):
    """The "train" or "val" part of a training set: the clips with the smallest crc32 are val, with all their rows."""
    clips = sorted({e.media for e in examples}, key=lambda media: (zlib.crc32(media.encode()), media))
    if len(clips) < 2:
        raise UserError(f"{len(clips)} clip(s) cannot be split into train and val: add clips")
    val = set(clips[:max(1, round(share * len(clips)))])
    return [e for e in examples if (e.media in val) == (part == "val")]


def load_split(name, root, split):
    """The rows of a split of BENCHMARKS[name]; `root`: the benchmark's folder, or one's own .jsonl. Raises UserError.

    Where the owners give no val, "val" and "train" are the two parts of hold_out(train); a held-out retrieval clip
    keeps its first caption, as test clips have one.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; there are {' '.join(BENCHMARKS)}")
    b, own = BENCHMARKS[name], root.endswith(".jsonl")
    if split not in (known := OURS if own else {**b.splits, "val": ""}):
        raise UserError(f"{name} has no split {split!r}; it has {' '.join(known)}")
    read = partial(read_own, b.task) if own else b.read
    held = split != "test" and not has_split(name, root, "val")
    rows = "train" if held else split
    examples = read(root, rows)
    if not examples:
        raise UserError(f"{root}: no rows for {rows!r} of {name}" + own * '; mark some with "split"')
    examples = hold_out(examples, split) if held else examples
    if held and split == "val" and b.task == "retrieval":
        examples = [replace(e, captions=e.captions[:1]) for e in examples]
    return examples


def has_split(name, root, split):
    """Do the owners give this split? Some have no val, howto100m has no test, one's own .jsonl may lack either."""
    return bool(read_jsonl_file(root, split)) if root.endswith(".jsonl") else split in BENCHMARKS[name].splits


# ---- words into tokens ----------------------------------------------------------------------------------------------

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class Words:
    """BERT WordPiece. Texts become [CLS] ... [SEP]; nothing is padded here (batches pad to their longest text)."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        ids = [tokenizer.token_to_id(name) for name in SPECIAL]
        if None in ids:
            raise UserError(f"the tokenizer lacks {', '.join(n for n, i in zip(SPECIAL, ids) if i is None)}; "
                            "give a BERT WordPiece with --tokenizer")
        self.pad, _, self.cls, self.sep, self.mask = ids

    @classmethod
    def load(cls, source):
        """source: a tokenizer.json, a vocab.txt, or a hub name such as bert-base-uncased, which is downloaded."""
        try:
            if source.endswith(".txt"):
                tokenizer = wordpiece(tokenizers.models.WordPiece.from_file(source, unk_token="[UNK]"))
                tokenizer.add_special_tokens([name for name in SPECIAL if tokenizer.token_to_id(name) is not None])
                return cls(tokenizer)
            if source.endswith(".json"):
                return cls(tokenizers.Tokenizer.from_file(source))
            return cls(tokenizers.Tokenizer.from_pretrained(source))
        except UserError:
            raise
        except Exception as error:                          # the library raises bare Exception for every cause
            raise UserError(f"--tokenizer {source}: {str(error).splitlines()[0]}; give a tokenizer.json, a vocab.txt "
                            "or a hub name such as bert-base-uncased") from None

    def __len__(self):
        return self.tokenizer.get_vocab_size()

    def __reduce__(self):                                   # travels to worker processes and into checkpoints as text
        return Words.from_json, (self.tokenizer.to_str(),)

    @staticmethod
    def from_json(text):
        return Words(tokenizers.Tokenizer.from_str(text))

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def sentence(self, text, L):
        """[CLS] text [SEP], cut to L tokens."""
        return [self.cls, *self.ids(text)[:L - 2], self.sep]

    def choices(self, question, options, join, L):
        """One token list per option, at most L each. Where a text is too long the question is cut, then the other
        options; the option itself stays, being the end. `join`: see Benchmark.
        Differs: spaces around "Options:" and "Answer:", which the released code glues to their neighbours."""
        head, out = self.ids(question), []
        for option in options:
            match join:
                case "bare": tail = self.ids(option)
                case "pair": tail = [self.sep, *self.ids(option)]
                case "options": tail = self.ids(f"options: {' '.join(options)} answer: {option}")
            tail = tail[-(L - 2):]
            out.append([self.cls, *head[:L - 2 - len(tail)], *tail, self.sep])
        return out

    def masked(self, text, L, rng):
        """Whole-word masking for MLM: (ids, labels); 15 % of the words, at least one; of their tokens 80 % become
        [MASK], 10 % a random token, 10 % stay. Labels are -100 elsewhere."""
        code = self.tokenizer.encode(text, add_special_tokens=False)
        ids, word_of = code.ids[:L - 2], code.word_ids[:L - 2]
        count = len(set(word_of))
        chosen = set(rng.permutation(count)[:max(1, round(0.15 * count))].tolist()) if count else ()
        labels = [-100] * len(ids)
        for i, word in enumerate(word_of):
            if word in chosen:
                labels[i], dice = ids[i], rng.random()
                ids[i] = self.mask if dice < 0.8 else int(rng.integers(len(self))) if dice < 0.9 else ids[i]
        return [self.cls, *ids, self.sep], [-100, *labels, -100]


def wordpiece(model):
    """bert-base-uncased's normalisation and word splitting around a WordPiece model."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


# ---- examples into batches ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """How examples become model inputs: what every worker needs to know."""
    task: str
    words: Words
    join: str                       # see Benchmark
    T: int
    R: int
    L: int
    answers: dict = field(default_factory=dict)             # answer -> class, for the tasks with a closed list
    flip: bool = False
    views: int = 1                  # evaluation: V sets of T frames a clip, whose scores are averaged
    rerank: int = 0                 # evaluation of retrieval: the first K are ordered anew by the matching head


class Clips(torch.utils.data.Dataset):
    """Examples, decoded one at a time, asked for as (epoch, index): everything random depends on (seed, epoch, index)
    alone, whatever the number of workers. epoch None is evaluation, without anything random.
    A clip that cannot be read comes back as {"index", "error"}: the caller decides, nothing is replaced."""

    def __init__(self, examples, root, recipe, seed=0):
        self.examples, self.root, self.recipe, self.seed = examples, root, recipe, seed
        self.groups = [np.arange(len(examples))]            # batches do not cross groups: see Mixed

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        epoch, index = key
        example, recipe = self.examples[index], self.recipe
        train = epoch is not None
        rng = np.random.default_rng((self.seed, epoch if train else 0, index))
        pick = partial(pick_frames, example=example, T=recipe.T,
                       views=1 if train else recipe.views, rng=rng if train else None)
        place = tuple(rng.random(2)) if train else (0.5, 0.5)
        flip = bool(train and recipe.flip and rng.random() < 0.5)
        try:
            path = find_media(self.root, example.media)
            if example.boxes:                               # boxes are drawn before the picture is cut
                frames = crop(tint(read_frames(path, pick), example.boxes), recipe.R, place)
            else:
                frames = read_frames(path, pick, recipe.R, place, flip=flip)
        except (VideoError, MissingMedia) as error:
            return {"index": index, "error": str(error)}
        if not train and recipe.views > 1:
            frames = frames.unflatten(0, (recipe.views, recipe.T))
        return {"index": index, "frames": frames, **self.texts(example, rng if train else None)}

    def texts(self, example, rng):
        """The words of an example as token lists, and what is right, as its task wants them. rng None: evaluation."""
        recipe, words, L = self.recipe, self.recipe.words, self.recipe.L
        draw = lambda some: some[int(rng.integers(len(some)))] if rng else some[0]
        match recipe.task:
            case "vqa":
                return {"words": [words.sentence(example.text, L)], "target": recipe.answers.get(example.answer, -1)}
            case "action":
                return {"words": [words.sentence("a person is doing [MASK]", L)], "target": example.answer}
            case "choice" | "vcr":
                return {"words": words.choices(example.text, example.options, recipe.join, L), "target": example.answer}
            case "retrieval":
                return {"words": [words.sentence(draw(example.captions), L)], "target": 0}
            case "pretrain":                                # three texts: to match, to fill in, as it is
                rng = rng or np.random.default_rng(zlib.crc32(example.id.encode()))         # the same mask every time
                lone = all(e.captions == example.captions for e in self.examples[:1000])    # nothing to swap with
                caption, matched = draw(example.captions), lone or bool(rng.random() < 0.5)
                match_text = caption
                while not matched and match_text in example.captions:
                    match_text = draw(draw(self.examples).captions)
                masked, labels = words.masked(caption, L, rng)
                return {"words": [words.sentence(match_text, L), masked, words.sentence(caption, L)],
                        "target": int(matched), "labels": labels}


class Mixed(torch.utils.data.Dataset):
    """Several Clips as one, items still asked for as (epoch, index). Each keeps its own number of frames, so batches
    must not cross parts: `groups` lists the indices of each."""

    def __init__(self, parts):
        self.parts, self.recipe = parts, parts[0].recipe    # of one task, words and tokenizer
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self.groups = [np.arange(a, b) for a, b in zip(self.starts, self.starts[1:])]

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, key):
        epoch, index = key
        part = int(np.searchsorted(self.starts, index, "right")) - 1
        return {**self.parts[part][epoch, index - int(self.starts[part])], "index": index}


class Order(torch.utils.data.Sampler):
    """Endless micro-batches of (epoch, index) for one process: a pure function of its arguments, so that any step can
    be reached again. Every global batch is cut into accum x world equal pieces; the n-th ones of all processes make up
    the n-th of a process alone. An epoch's last, short batch is left out."""

    def __init__(self, groups, batch, accum, seed, start=0, rank=0, world=1):
        self.groups, self.batch, self.accum, self.seed = groups, batch, accum, seed
        self.start, self.rank, self.world = start, rank, world
        self.steps_per_epoch = sum(max(1, len(g) // batch) for g in groups)

    def __iter__(self):
        epoch, first = divmod(self.start, self.steps_per_epoch)
        while True:
            rng, batches = np.random.default_rng((self.seed, epoch)), []
            for group in self.groups:
                order = np.resize(rng.permutation(group), max(len(group), self.batch))      # repeats fill a tiny set
                batches += [order[i:i + self.batch] for i in range(0, len(order) - self.batch + 1, self.batch)]
            for k in rng.permutation(len(batches))[first:]:
                for piece in np.split(batches[k], self.accum * self.world)[self.rank::self.world]:
                    yield [(epoch, int(i)) for i in piece]
            epoch, first = epoch + 1, 0


def pick_frames(times, example, T, views, rng):
    """The frame numbers of one clip: T of them within the example's span; with views V, view v takes every V-th of T V
    evenly spaced ones, so view after view follows in the result."""
    first, last = 0, len(times) - 1
    if example.seconds is not None:
        begin, end = example.seconds
        first, last = np.searchsorted(times, begin), np.searchsorted(times, end, "right") - 1
    elif example.frames is not None:
        first, last = example.frames
    last = int(np.clip(last, 0, len(times) - 1))
    first = int(np.clip(first, 0, last))                    # a span of nothing, or past the end, is its nearest frame
    numbers = frame_indices(last - first + 1, T * views, "eval" if rng is None else "train", rng)
    return [first + n for v in range(views) for n in numbers[v::views]]


def tint(picture, boxes):
    """VCR: each box washed with its own fixed colour (alpha 0.3) and framed (3 px), as in MERLOT and the released code.
    picture (T, 3, h, w) uint8; boxes as fractions of width and height."""
    picture, (h, w) = picture.float(), picture.shape[-2:]
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        # the golden ratio walks around the hue circle without ever coming close to itself early on
        color = torch.tensor(colorsys.hsv_to_rgb(0.61803 * number % 1, 1, 1)).view(3, 1, 1) * 255
        top, left, bottom, right = (round(v) for v in (y1 * h, x1 * w, y2 * h, x2 * w))
        inside = picture[..., top:bottom, left:right]
        framed = torch.ones(inside.shape[-2:], dtype=torch.bool)
        framed[3:-3, 3:-3] = False
        inside.copy_(torch.where(framed, color, 0.7 * inside + 0.3 * color))
    return picture.round().to(torch.uint8)


def crop(picture, R, place, zoom=1.2):
    """read_frames' crop for a picture in memory: (T, 3, h, w) uint8 -> (T, 3, R, R)."""
    h, w = picture.shape[-2:]
    side = int(min(h, w) / zoom)
    top, left = int(place[1] * (h - side)), int(place[0] * (w - side))
    square = picture[..., top:top + side, left:left + side].float()
    return F.interpolate(square, (R, R), mode="bilinear", antialias=True).round().to(torch.uint8)


def collate(items, pad):
    """Items -> one batch; texts padded to the longest of the batch, not to L: fewer tokens, the same result."""
    good = [item for item in items if "error" not in item]
    batch = {"errors": {item["index"]: item["error"] for item in items if "error" in item}}
    if good:
        batch["index"] = torch.tensor([item["index"] for item in good])
        batch["frames"] = torch.stack([item["frames"] for item in good])
        batch["target"] = torch.tensor([-1 if item["target"] is None else item["target"] for item in good])
        L = max(len(ids) for item in good for ids in item["words"])
        words = np.full((len(good), max(len(item["words"]) for item in good), L), pad)
        lengths = np.zeros(words.shape[:2], int)
        for b, item in enumerate(good):
            for a, ids in enumerate(item["words"]):
                words[b, a, :len(ids)], lengths[b, a] = ids, len(ids)
        keep = np.arange(L) < lengths[..., None]
        if words.shape[1] == 1:
            words, keep = words[:, 0], keep[:, 0]
        batch["words"], batch["keep"] = torch.from_numpy(words), torch.from_numpy(keep)
        if "labels" in good[0]:
            batch["labels"] = torch.full((len(good), L), -100)
            for b, item in enumerate(good):
                batch["labels"][b, :len(item["labels"])] = torch.tensor(item["labels"])
    return batch


def loader(clips, batches, workers, pad):
    """Batches out of worker processes; `batches` yields lists of (epoch, index). Workers are nice: on few cores they
    take what the model's threads leave, and up to 4 batches each are ready ahead."""
    return torch.utils.data.DataLoader(
        clips, batch_sampler=batches, num_workers=workers, collate_fn=partial(collate, pad=pad),
        persistent_workers=workers > 0, prefetch_factor=4 if workers else None, worker_init_fn=be_nice,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator())                        # its own: else it draws on the model's, and resume differs


def be_nice(worker):
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C reaches all processes of a terminal
    if hasattr(signal, "sigwaitinfo"):                      # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_parent_alone, daemon=True).start()


def obey_parent_alone():
    """A scheduler tells all processes of a job to stop; the run needs its workers until it has saved."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def answer_list(examples, size=None):
    """The closed answer list: the `size` most frequent answers of the training questions, ties alphabetically."""
    counts = Counter(e.answer for e in examples)
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:size]


# ---- python data.py -------------------------------------------------------------------------------------------------

def decode_all(path, numbers, R):
    """What everybody writes first: decode every frame, keep some. Shares only the conversion with read_frames."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = list(container.decode(stream))
    return np.stack([_to_rgb(frames[i], R, (0.5, 0.5), 1.2) for i in numbers])


def seek_each(path, numbers, R):
    """What everybody writes next: before every frame a seek, then decoding up to its time, known from a first pass."""
    times, frames = _Clip(path).times, []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for i in numbers:
            at = (stream.start_time or 0) + round(times[i] / float(stream.time_base))
            container.seek(at, stream=stream)
            frames.append(next(frame for frame in container.decode(stream) if frame.pts >= at))
    return np.stack([_to_rgb(frame, R, (0.5, 0.5), 1.2) for frame in frames])


def with_decord(decord, path, numbers, R):
    video = decord.VideoReader(path, num_threads=1, width=R or -1, height=R or -1)
    return video.get_batch(numbers).asnumpy().transpose(0, 3, 1, 2)


def with_cv2(cv2, path, numbers, R):
    cv2.setNumThreads(1)
    video, frames = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]), {}
    for i in range(max(numbers) + 1):
        if video.grab() and i in numbers:
            frame = video.retrieve()[1]
            frames[i] = cv2.cvtColor(cv2.resize(frame, (R, R)) if R else frame, cv2.COLOR_BGR2RGB)
    return np.stack([frames[i] for i in numbers]).transpose(0, 3, 1, 2)


def with_torchcodec(torchcodec, path, numbers, R):
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize
    decoder = VideoDecoder(path, num_ffmpeg_threads=1, transforms=[Resize((R, R))] if R else [])
    return decoder.get_frames_at(numbers).data.numpy()


def bench(paths, R=224, rounds=5):
    """Milliseconds of processor time for T frames of R x R, and how many times as long the others take, by file and as
    geometric means; `=`: their full-size pixels are those of decode_all, `!`: they are not. Medians of shuffled rounds,
    one thread, the file in the page cache. Processor time, as a neighbour's load does not count in it."""
    torch.set_num_threads(1)
    methods = {"ours": lambda *a: read_frames(*a).numpy(), "all": decode_all, "each": seek_each}
    for name, method in (("decord", with_decord), ("cv2", with_cv2), ("torchcodec", with_torchcodec)):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):                 # a library without its own libraries
            continue
        methods[name] = lambda *a, method=method, module=module: method(module, *a)
    ratios, peers = {}, list(methods)[1:]
    head = "".join(f"{name + '/ours':>16}" for name in peers)
    print(f"{'file':24}{'frames':>7}{'keys':>5}{'T':>3}{'ours ms':>9}{head}")
    for path in paths:
        clip = _Clip(path)
        n, keys = len(clip.times), sum(clip.is_key)
        families = {"all files": True, "mp4 with B-frames": clip.codec.has_b_frames and path.endswith(".mp4"),
                    "GOP <= 30 and >= 18 s": n <= 30 * keys and round(clip.times[-1]) >= 18}
        for T in (3, 8):
            numbers, ms, marks = frame_indices(n, T, "eval"), {name: [] for name in methods}, {}
            truth = decode_all(path, numbers, None)
            for name in random.sample(list(methods), len(methods)) * rounds:
                try:
                    if name not in marks:
                        marks[name] = "=" if np.array_equal(methods[name](path, numbers, None), truth) else "!"
                    start = time.process_time()
                    np.ascontiguousarray(methods[name](path, numbers, R))
                    ms[name].append((time.process_time() - start) * 1e3)
                except Exception:                                    # a peer's refusal is a result
                    marks[name] = "fails"
            ours, line = statistics.median(ms["ours"]), ""
            for name in peers:
                failed = marks[name] == "fails"
                line += f"{'fails':>16}" if failed else f"{statistics.median(ms[name]) / ours:>15.2f}{marks[name]}"
                for family in [f for f, member in families.items() if member and not failed]:
                    ratios.setdefault((family, T, name), []).append(statistics.median(ms[name]) / ours)
            name = os.path.basename(path)[:23]
            print(f"{name:24}{n:>7}{keys:>5}{T:>3}{ours:>8.2f}{marks['ours']}{line}", flush=True)
    for family, T in dict.fromkeys(key[:2] for key in ratios):
        line = ""
        for name in peers:
            values = ratios.get((family, T, name), [math.nan])
            line += f"{statistics.geometric_mean(values):>8.2f} ({min(values):5.2f})"
        print(f"{family:36}{T:>3}{'':9}{line}   geometric mean (least)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="videos, gifs, pictures, folders of pictures")
    parser.add_argument("--bench", action="store_true",
                        help="time the sampler beside decoding everything and other libraries")
    args = parser.parse_args()
    if args.bench:
        return bench(args.files)
    for path in args.files:
        seen = []
        try:
            frames = read_frames(path, lambda times: seen.append(times) or frame_indices(len(times), 3, "eval"))
        except VideoError as error:
            print(error)
            continue
        times, picked = seen[0], frame_indices(len(seen[0]), 3, "eval")
        print(f"{path}: {len(times)} frames of {frames.shape[3]} x {frames.shape[2]}, {times[-1]:.2f} s from the first "
              f"to the last; evaluation looks at frames {picked}, {', '.join(f'{times[i]:.2f}' for i in picked)} s")


if __name__ == "__main__":
    run_main("data.py", main)
