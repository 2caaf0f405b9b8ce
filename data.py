"""Data: exact frames out of any video (PyAV), the benchmarks with their recipes, rows of a prepared
folder (the manifest), words into tokens, and batches.

    python data.py CLIP...       frames, seconds and what evaluation looks at, of any files

A batch is a dict:
    frames           (B, T, 3, R, R) uint8; with several views (B, views, T, 3, R, R)
    input_ids        (B, A, L) int64, the A texts of a clip:
                         vqa, action     one
                         choice, vcr     one for each option
                         retrieval       the caption; in training with --vtm also others' captions
                         pretrain        the text to match, the text with masks, the caption
    attention_mask   (B, A, L) bool, False at padding and in all of an absent option
    target           (B,) int64, the right answer or option, -1 if the answer list lacks it; in
                     pre-training 1 if the first text belongs to the clip
    masked, labels   (M,) int64, pre-training: the M tokens that are asked for, as positions in the
                     second text of all clips (B * L), and their true ids
    is_rationale     (B,) bool, multiple choice: True where the question is VCR's QA->R
    index            (B,) int64, rows of the data set
    errors           {row id: cause} of clips that cannot be read; if no clip of the batch can be
                     read, the batch has only this entry
"""
import argparse
import atexit
import colorsys
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
import traceback
import zipfile
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice

from allinone import LIMITS, Config, UserError, printable, run_main     # first: it prepares torch

import av
import numpy as np
import tokenizers
import torch
from av.error import FFmpegError
from av.sidedata.sidedata import SideDataContainer
from av.stream import Discard, Disposition
from av.video.frame import PictureType

# ---- frame sampler -------------------------------------------------------------------------------
# On a first reading, read frame_indices and the docstring of read_frames, and go on at "the
# benchmarks": all the rest gets the frames of _read_in_order, only faster.
# A frame needs the packets from its key frame on, and no others. So: list all packets without
# decoding them, sort them into display order, plan the runs of packets that lead to the wanted
# frames, decode these runs, and let FFmpeg skip the pictures that no other picture refers to.
# Where a file gives reason to doubt its timestamps or key frames, everything is decoded from the
# start, in order; this is also the definition of a right frame.

MAX_PIXELS = 100_000_000        # of one frame; more is a decompression bomb
LARGE_FILE = 8 << 20            # bytes; the packets of smaller files stay in memory
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
MEDIA = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".wmv", ".flv",
         ".mts", ".m2ts", ".ts", ".ogg", ".ogv", ".gif", *PICTURES)
FORMATS = ("mov,avi,matroska,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,asf,ogg,gif,"
           "image2,jpeg_pipe,png_pipe,webp_pipe")
OPEN_OPTIONS = {
    "format_whitelist": FORMATS,            # no playlists
    "protocol_whitelist": "file",           # no URLs
    "pattern_type": "none",                 # %03d is a name, not a pattern
    "max_pixels": str(MAX_PIXELS),
}
SKIPPABLE = {"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video"}       # FFmpeg can skip B-frames
ONE_TO_ONE = SKIPPABLE | {"vp9", "av1", "gif", "mjpeg", "png", "webp"}  # a packet is a frame
NO_TIME = -1 << 63              # FFmpeg's value of a timestamp that is absent


class VideoError(UserError):
    """A media file cannot give the frames asked of it. One line: the file and the cause."""


class _Doubt(Exception):
    """A file contradicts its listing, its timestamps or its key frames."""


@dataclass
class _Listing:
    """The packets of a video, numbered in file order, without their content.

    int64 arrays with one value per packet, unless said otherwise.
    """

    pts: np.ndarray             # display time in ticks of the stream
    dts: np.ndarray             # decoding time in ticks
    position: np.ndarray        # byte in the file
    size: np.ndarray            # bytes
    key: np.ndarray             # 1: decoding can start here
    hidden: np.ndarray          # 1: an edit list cuts it; other frames may still refer to it
    display: np.ndarray         # sorts the packets into display order
    skippable: np.ndarray       # 1: FFmpeg may skip its picture if no other refers to it
    order: np.ndarray           # (frames,) the packet of each frame; empty: only decoding shows it
    ticks: np.ndarray           # (frames,) sorted display times since the container's start
    unit: np.ndarray            # (1,) float64, seconds per tick; an array, as all are saved alike


def frame_indices(num_frames, T, mode, rng=None):
    """One frame number in each of T equal segments of range(num_frames), sorted.

    mode: "eval" takes the middle of each segment, "train" a uniformly random place in it.
    rng: numpy.random.Generator, for "train". If num_frames < T, numbers repeat.
    """
    if num_frames < 1 or T < 1 or mode not in ("train", "eval"):
        raise ValueError(f"frame_indices({num_frames=}, {T=}, {mode=}): at least 1 frame, T >= 1, "
                         "mode train or eval")
    inside = rng.random(T) if mode == "train" else np.full(T, 0.5)
    indices = ((np.arange(T) + inside) * num_frames / T).astype(int)
    return indices.clip(max=num_frames - 1).tolist()    # rounding can reach num_frames


def read_frames(path, pick, size=None, place=(0.5, 0.5), zoom=1.2, boxes=(), listings=None):
    """Chosen frames of a video, gif, picture or folder of pictures: exactly those that decoding
    from the start gives.

    pick: frame numbers in display order (repeats and any order allowed), or a function that
        returns them, given the times of all frames: float64, seconds since the container's start.
        It may be called twice, if a listing proves wrong. A folder's pictures are sorted by name,
        digits by their value; their times are 0, 1, 2 ...
    size: None for full frames; R for a square of side min(w, h) / zoom, scaled to R x R, at
        place = (x, y) of the upright picture, from 0 (left, top) to 1 (right, bottom).
    boxes: (x1, y1, x2, y2) as fractions of the upright picture; drawn on it before the crop.
    listings: folder that keeps the listings of large files for later visits; None: keep nothing.
    Returns (T, 3, R, R) or (T, 3, h, w) uint8 RGB.
    Raises VideoError if a picked frame is missing or cannot be decoded.
    """
    if size is not None and not (size >= 1 and zoom >= 1 and 0 <= min(place) <= max(place) <= 1):
        raise ValueError(f"read_frames({size=}, {zoom=}, {place=}): size and zoom are at least 1, "
                         "place is from 0 to 1")
    convert = partial(_to_rgb, size=size, place=place, zoom=zoom, boxes=boxes)
    if os.path.isdir(path):
        files = _picture_files(path)
        numbers = _pick_numbers(path, pick, np.arange(len(files), dtype=float))
        frames = {}
        for i in set(numbers):
            _, pictures = _read_file(files[i], [0], convert)
            frames[i] = pictures[0]
    else:
        numbers, frames = _read_file(path, pick, convert, listings)
    if len({frame.shape for frame in frames.values()}) > 1:
        raise VideoError(f"{path}: its frames differ in size; read them with a size")
    frames = np.stack([frames[i] for i in numbers])
    return torch.from_numpy(frames).contiguous()        # np.stack keeps a turned frame's axis order


def readable(path):
    """True if the file begins like a video or picture, or the folder holds a picture. Decodes
    nothing."""
    if os.path.isdir(path):
        return bool(_picture_files(path))
    with suppress(VideoError, FFmpegError), _open(path) as stream:
        for _ in _demux(stream):
            return True
    return False


def _picture_files(folder):
    """The pictures of a folder, no hidden files, frame2 before frame10."""
    def by_value(name):
        return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name), name
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder), key=by_value)
            if name.lower().endswith(PICTURES) and not name.startswith(".")]


def _pick_numbers(path, pick, times):
    """The frame numbers asked for. Raises VideoError if the file has no such frame."""
    if not len(times):
        raise VideoError(f"{path}: no frames in it")
    numbers = [int(i) for i in (pick(times) if callable(pick) else pick)]
    if not numbers or min(numbers) < 0 or max(numbers) >= len(times):
        raise VideoError(f"{path}: frames {numbers} asked for, it has 0 to {len(times) - 1}")
    return numbers


def _read_file(path, pick, convert, listings=None, trust=True):
    """-> (frame numbers, {number: convert(frame)}). trust: believe a kept listing, and seek.

    Tries the few packets that the listing names. If the file contradicts the listing, and packets
    came from the disk (a kept listing, or a large file), it tries again with a new listing and
    without seeking. If this fails too, it decodes everything in order.
    """
    try:
        # "explode": a damaged frame is an error here. In order, FFmpeg conceals what it can.
        with _open(path, err_detect="explode") as stream:
            listing, packets = _load_or_list(path, stream, listings, trust)
            numbers = _pick_numbers(path, pick, listing.ticks * listing.unit)
            if len(listing.order):
                with suppress(_Doubt):
                    reader = _Reader(stream, listing, packets, trust, _demux_file(path))
                    return numbers, _read_sparse(reader, listing, set(numbers), convert)
                if trust and not packets:
                    return _read_file(path, pick, convert, listings, trust=False)
        return numbers, _read_in_order(path, listing, set(numbers), convert)
    except FFmpegError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror})") from error


@contextmanager
def _open(path, **codec_options):
    """Opens a file; gives its first video stream that is not cover art."""
    if not os.path.isfile(path):                                # opening a pipe would block
        raise VideoError(f"{path}: no such file")
    options = dict(OPEN_OPTIONS)
    if str(path).lower().endswith(".gif"):
        options["analyzeduration"] = "1"                        # or FFmpeg decodes much of it
    # Without "file:", a name such as concat:a|b would be two files
    with av.open(f"file:{path}", options=options, metadata_errors="ignore") as container:
        videos = [stream for stream in container.streams.video
                  if not stream.disposition & Disposition.attached_pic]
        if not videos or videos[0].codec_context is None:
            raise VideoError(f"{path}: no video stream that FFmpeg can decode")
        for stream in container.streams:
            stream.discard = Discard.default if stream is videos[0] else Discard.all
        codec = videos[0].codec_context
        codec.thread_count = 1                                  # workers are the parallelism
        codec.options = {"max_pixels": str(MAX_PIXELS), **codec_options}
        yield videos[0]


def _demux(stream):
    """Yields the packets of a stream in file order."""
    try:
        for packet in stream.container.demux(stream):
            if packet.size:                                     # PyAV ends with an empty packet
                yield packet
    except IndexError:                  # PyAV looks the stream up by number and does not find it
        raise VideoError(f"{stream.container.name}: a stream begins late, which PyAV cannot "
                         "read") from None


def _list_packets(path, stream):
    """-> (_Listing, the packets of a small file or [])."""
    codec = stream.codec_context
    name = codec.codec.canonical_name
    small = os.path.getsize(path) <= LARGE_FILE
    rows = array("q")
    packets = []
    pictures = []
    for packet in _demux(stream):
        if not rows:
            header = bytes(packet) + (codec.extradata or b"")
        pts = NO_TIME if packet.pts is None else packet.pts
        # The first six fields of _Listing, in its order.
        rows.fromlist([pts, packet.dts or 0, packet.pos or 0, packet.size, packet.is_keyframe,
                       packet.is_discard])
        if name == "mpeg4":
            pictures.append(_mpeg4_pictures(packet))
        if small:
            packets.append(packet)
    if rows:
        is_cut = packet.is_corrupt
        is_trailer = name == "gif" and not _has_gif_picture(bytes(packet))
        if is_cut or is_trailer:
            del rows[-6:]
    if not rows:
        raise VideoError(f"{path}: no frames in it")
    if header[8:16] == b"WEBPVP8X" and header[20] & 2:          # the bit for animation
        raise VideoError(f"{path}: FFmpeg cannot decode an animated WebP; convert it to a GIF")
    rows = np.frombuffer(rows, np.int64).reshape(-1, 6).T
    return _order_packets(path, stream, rows, header, pictures), packets


def _has_gif_picture(content):
    """Is there a picture after the extension blocks of a GIF's packet? The last may have none.
    A block is "!", a label, and parts of (length, bytes) until the length is 0."""
    at = 0
    while content[at:at + 1] == b"!":
        at += 2
        while content[at:at + 1] > b"\0":                       # not 0, not past the end
            at += content[at] + 1
        at += 1
    return content[at:at + 1] in (b",", b"G")                   # G: GIF89a, the first packet


def _mpeg4_pictures(packet):
    """The type byte of each MPEG-4 picture in a packet; up to 8 bytes hold no picture."""
    return b"".join(re.findall(b"(?s)\0\0\1\xb6(.)", packet)) if packet.size > 8 else b""


def _display_packets(stream, rows, header, pictures):
    """-> (is every packet one frame?, display, skippable, display times). display sorts the
    packets into display order; None: only the decoder knows it.

    header: bytes of the first packet and the header. pictures: see _mpeg4_pictures.
    The pts give the order, except in AVI and MPEG-4 files.
    An AVI has no timestamps. FFmpeg invents pts in the order of packets; its dts count the frames.
    If H.264 in an AVI has B-frames, only the decoder knows the display order. In MPEG-4 the picture
    types give it: a B-frame is shown at once, any other frame when the next such one comes.
    XviD packs a B-frame into the packet of the later frame that it refers to. From then on the
    decoder holds one picture back, until an empty packet comes. FFmpeg does so only if the header
    announces it ("DivX503b1393p" in the user data), and loses pictures otherwise.
    """
    pts, dts, _, _, key, _ = rows
    codec = stream.codec_context
    name = codec.codec.canonical_name
    one_to_one = name in ONE_TO_ONE and codec.field_order <= 1    # not interlaced
    if name not in SKIPPABLE:                                   # without B-frames times must rise
        one_to_one = one_to_one and (np.diff(pts) > 0).all()
    display = pts
    times = pts
    skippable = np.full_like(pts, name in SKIPPABLE)
    if stream.container.format.name == "avi":
        display = None if codec.has_b_frames else pts
        times = dts
    if name == "mpeg4":
        # After each packet: the pictures read and not yet shown. Valid: 0, in a packed file also 1.
        waiting = np.cumsum([len(types) for types in pictures]) - np.arange(1, len(pictures) + 1)
        packed = re.search(rb"DivX\d+(Build|b)\d+p", header) is not None
        one_to_one = one_to_one and waiting.min() >= 0 and waiting.max() <= packed
        types = np.frombuffer(b"".join(pictures), np.uint8)[:len(pts)] >> 6
        display = 2 * np.arange(len(types))
        others = np.flatnonzero(types != 2)                     # 2: a B-frame
        # An I- or P-frame is shown just before the next one, the last one at the end.
        display[others] = np.append(display[others[1:]], 2 * len(types)) - 1
        # While a picture waits, the decoder works on that of another packet: nothing is skipped.
        # Only packet 0 announces the packing: decoding can start at no other (changes the listing).
        skippable = 1 - waiting
        key[1:] *= not waiting.any()
    return one_to_one, display, skippable, times


def _order_packets(path, stream, rows, header, pictures):
    """Sorts packets into display order -> _Listing. Decodes all if they do not show the frames."""
    pts, _, _, _, key, hidden = rows                            # edit lists hide packets
    pictures = pictures[:len(pts)]
    one_to_one, display, skippable, times = _display_packets(stream, rows, header, pictures)
    regular = one_to_one and key[0]
    shown = np.flatnonzero(hidden == 0)
    order = np.empty(0, np.int64)
    if regular and display is not None:
        order = shown[np.argsort(display[shown])]
        # No two at the same time, and none before the first key frame.
        regular = np.diff(np.sort(display)).all() and (display[shown] >= display[0]).all()
    if not regular:             # frame.pts is the number of its packet: see _decode
        shown = np.array([frame.pts for frame in _decode_all(path, len(pts))], np.int64)
        order = np.empty(0, np.int64)
    ticks = np.sort(times[shown])
    unit = float(stream.time_base)
    if NO_TIME in ticks:
        ticks = np.arange(len(ticks))
        unit = 1 / float(stream.average_rate or 1)
    else:
        ticks -= round((stream.container.start_time or 0) / av.time_base / unit)
    display = pts if display is None else display
    return _Listing(*rows, display, skippable, order, ticks, np.array([unit]))


def _decode(codec, packets, first, skip, damaged):
    """Yields the frames of packets first, first + 1, ...; frame.pts is the number of its packet.

    skip: packets of pictures that FFmpeg skips if no other picture refers to them.
    damaged: list that takes the packets that cannot be decoded.
    """
    codec.flush_buffers()
    for j, packet in enumerate(packets, first):
        codec.skip_frame = "NONREF" if j in skip else "DEFAULT"
        packet.pts = packet.dts = j
        try:
            yield from codec.decode(packet)
        except FFmpegError:
            damaged.append(j)
    with suppress(FFmpegError):
        yield from codec.decode(None)


def _decode_all(path, count):
    """Yields all frames of a file's first `count` packets."""
    with _open(path) as stream:
        yield from _decode(stream.codec_context, islice(_demux(stream), count), 0, (), [])


def _read_in_order(path, listing, numbers, convert):
    """The definition -> {number: convert(frame)}. Decodes everything up to the last number.

    A frame's number is that of its packet in display order; if the listing has no order, its place
    in the output.
    """
    number_of = {packet: number for number, packet in enumerate(listing.order.tolist())}
    frames = {}
    for count, frame in enumerate(_decode_all(path, len(listing.pts))):
        number = number_of.get(frame.pts) if number_of else count
        if number in numbers:
            frames[number] = convert(frame)
            if len(frames) == len(numbers):
                return frames
    raise VideoError(f"{path}: frame {min(numbers - frames.keys())} of {len(listing.ticks)} cannot "
                     f"be decoded (it is damaged, or has more than {MAX_PIXELS} pixels)")


def _read_sparse(reader, listing, numbers, convert):
    """The same frames from few packets. Raises _Doubt if the file contradicts its listing."""
    codec = reader.stream.codec_context
    wanted = {int(listing.order[number]): number for number in numbers}
    frames = {}
    latest = NO_TIME
    for first, last in _plan_runs(listing, wanted):
        display = dict(enumerate(listing.display[first:last + 1].tolist(), first))
        skippable = first + np.flatnonzero(listing.skippable[first:last])
        skip = set(skippable.tolist()) - wanted.keys()
        damaged = []
        starts_clean = first == 0
        for frame in _decode(codec, reader.read(first, last), first, skip, damaged):
            j = frame.pts
            if display[j] < latest:
                # The timestamps are wrong: _read_in_order must count frames as they come.
                listing.order = listing.order[:0]
                raise _Doubt
            latest = display[j]
            if j == first and frame.key_frame and frame.pict_type == PictureType.I:
                starts_clean = True
            if j in wanted:
                frames[wanted[j]] = convert(frame)
        # Frames shown before the key frame may fail, as they refer to frames that were jumped over;
        # none of them is wanted.
        if not starts_clean or any(display[j] >= display[first] for j in damaged):
            raise _Doubt
    if len(frames) < len(wanted):
        raise _Doubt
    return frames


def _plan_runs(listing, wanted):
    """[first, last] packets that lead to the wanted ones; each run begins at a key frame."""
    by_display = listing.display.__getitem__
    keys = sorted(np.flatnonzero(listing.key).tolist(), key=by_display)
    runs = []
    for packet in sorted(wanted, key=by_display):
        # The last key frame that is shown at or before this packet.
        first = keys[bisect_right(keys, by_display(packet), key=by_display) - 1]
        if runs and first <= runs[-1][1]:
            runs[-1][1] = max(runs[-1][1], packet)
        else:
            runs.append([first, packet])
    return runs


# ---- frame sampler: pixels -----------------------------------------------------------------------

# With the first flag alone, colours are 1 to 3 levels too dark.
SCALE_FLAGS = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"
UPRIGHT = np.eye(2, dtype=int)


def _to_rgb(frame, size, place, zoom, boxes=()):
    """One decoded frame -> (3, h, w) uint8 RGB, upright; with a size the square at `place`."""
    if boxes:
        upright = _to_rgb(frame, None, place, zoom).transpose(1, 2, 0)
        frame = av.VideoFrame.from_ndarray(_draw_boxes(upright, boxes), format="rgb24")
    turn = _orientation(frame)
    if turn is not UPRIGHT:
        place = turn @ (np.array(place) - 0.5) + 0.5
    if size is None:
        rgb = frame.to_ndarray(format="rgb24", threads=1).transpose(2, 0, 1)
    else:
        rgb = _crop(frame, size, place, zoom)
    if turn is UPRIGHT:
        return rgb
    if turn[0, 0] == 0:
        rgb = rgb.swapaxes(1, 2)
    step_x, step_y = turn.sum(0)        # each column has one entry: 1, or -1 to read backwards
    return rgb[:, ::step_y, ::step_x]


def _orientation(frame):
    """The matrix M, (2, 2) of 0 and +-1: stored (x, y) = M @ upright (x, y), from the centre."""
    try:
        side_data = SideDataContainer(frame)                    # frame.side_data makes a cycle
    except ValueError:                                          # PyAV fails on EXIF, type 31
        side_data = SideDataContainer(_filter(frame, ("sidedata", "mode=delete:type=31")))
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    turn = np.sign(np.frombuffer(matrix, np.int32)).reshape(3, 3)[:2, :2]
    return turn if (turn @ turn.T == UPRIGHT).all() else UPRIGHT


def _draw_boxes(rgb, boxes):
    """A copy of (h, w, 3) uint8, each box tinted with its colour (alpha 0.3), its border 3 px.

    Source: VCR in MERLOT and the released code.
    """
    rgb = np.array(rgb, order="C")
    height, width, _ = rgb.shape
    for number, box in enumerate(boxes):
        hue = 0.61803 * number % 1              # the golden ratio keeps neighbours apart
        color = 255 * np.array(colorsys.hsv_to_rgb(hue, 1, 1))
        corners = np.clip(box, 0, 1) * (width, height, width, height)
        left, top, right, bottom = corners.round().astype(int)
        inside = rgb[top:bottom, left:right]    # both are views: all is painted, then the middle
        middle = inside[3:-3, 3:-3]
        tinted = 0.7 * middle + 0.3 * color
        inside[:] = color.round()
        middle[:] = tinted.round()
    return rgb


def _crop(frame, size, place, zoom):
    """The square of a frame at `place`, scaled -> (3, size, size) uint8 RGB.

    Side and corner are even, as 4:2:0 video has one colour sample for 2 x 2 pixels.
    """
    side = max(int(min(frame.width, frame.height) / zoom) // 2 * 2, 1)
    left = int(place[0] * (frame.width - side)) // 2 * 2
    top = int(place[1] * (frame.height - side)) // 2 * 2
    square = _filter(
        frame,
        ("crop", f"{side}:{side}:{left}:{top}:exact=1"),
        ("scale", f"{size}:{size}:flags={SCALE_FLAGS}"),
        ("format", "gbrp"),                     # 2.5 times as fast as rgb24 with these flags
    )
    green, blue, red = (np.frombuffer(plane, np.uint8).reshape(size, -1)[:, :size]
                        for plane in square.planes)
    return np.stack((red, green, blue))


def _filter(frame, *filters):
    """The frame after FFmpeg filters: (name, options) each."""
    kind = frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range
    graph = _filter_graph(threading.get_ident(), kind, filters)
    graph.vpush(frame)
    return graph.vpull()


@lru_cache(4)
def _filter_graph(thread, kind, filters):
    """Kept for the next frame of this kind and this thread: no graph may serve two threads. A graph
    takes colour space and range from its first frame."""
    source = "video_size={}x{}:pix_fmt={}:time_base=1/1".format(*kind)
    graph = av.filter.Graph()
    graph.threads = 1
    nodes = [graph.add(*node) for node in (("buffer", source), *filters, ("buffersink",))]
    graph.link_nodes(*nodes).configure()
    return graph


# ---- frame sampler: kept listings ----------------------------------------------------------------
# To list the packets of a long file means to read all of it. So the listing of a large file, or of
# one whose frames only decoding can count, may be kept in a folder. A later visit reads no more
# than the runs it needs: it seeks to each key frame and compares every packet with the listing.
# If one differs, the file is listed again and read from its start.

@dataclass
class _Reader:
    """Runs of packets by their numbers: from memory, or from a large file."""

    stream: object
    listing: _Listing
    packets: list                   # of a small file
    can_seek: bool
    rest: object                    # of a large file: iterator over packets from number `at` on
    at: int = 0

    def read(self, first, last):
        """Yields packets first to last. Raises _Doubt if one is not as listed."""
        if self.packets:
            yield from self.packets[first:last + 1]
            return
        if self.can_seek and first > self.at:
            self._seek(first)
        for packet in self.rest:
            j = self.at
            listed = self.listing.pts[j], self.listing.position[j], self.listing.size[j]
            if (packet.pts, packet.pos or 0, packet.size) != listed:
                raise _Doubt
            self.at += 1
            if j >= first:
                yield packet
            if j == last:
                break

    def _seek(self, first):
        """Moves to packet `first` or before it. Raises _Doubt if that is not where it arrives."""
        for times in (self.listing.pts, self.listing.dts):      # MPEG-TS seeks by dts
            with suppress(FFmpegError, StopIteration, IndexError):
                self.stream.container.seek(int(times[first]), stream=self.stream)
                packets = _demux(self.stream)
                packet = next(packets)
                self.at = np.flatnonzero(self.listing.pts == packet.pts)[0]
                self.rest = chain([packet], packets)
                if self.at <= first:
                    return
        raise _Doubt


def _demux_file(path):
    """Yields the packets of a file from its start."""
    with _open(path) as stream:
        yield from _demux(stream)


def _listing_file(path, folder):
    """Where a listing is kept. The name depends on the file's path, size and time of change."""
    state = os.stat(path)
    key = repr((os.path.abspath(path), state.st_size, state.st_mtime_ns, av.__version__))
    return os.path.join(folder, hashlib.sha256(key.encode()).hexdigest()[:32] + ".npz")


def _load_or_list(path, stream, folder, trust):
    """-> (_Listing, the packets of a small file or [])."""
    if folder is None:
        return _list_packets(path, stream)
    file = _listing_file(path, folder)
    with suppress(Exception):       # absent or damaged: list again
        if trust:
            with np.load(file, allow_pickle=False) as kept:
                # Differences are kept: they compress well.
                return _Listing(**{name: kept[name].cumsum() for name in kept.files}), []
    listing, packets = _list_packets(path, stream)
    if not packets or not len(listing.order):       # it took time to make
        _save_listing(file, listing)
    return listing, packets


def _save_listing(file, listing):
    """Keeps a listing, if its folder can be written. Raises UserError if the disk is full.

    Many workers may write the same file at once, so each writes its own and renames it.
    """
    folder = os.path.dirname(file)
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):
        return
    part = f"{file}.{os.getpid()}.{threading.get_ident()}"
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as out:   # as np.savez_compressed
            for name, values in vars(listing).items():
                with out.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.diff(values, prepend=0))
        os.replace(part, file)
    except OSError as error:
        with suppress(OSError):
            os.unlink(part)
        raise UserError(f"{file} cannot be written: {error.strerror}; make room there") from None


# ---- the benchmarks ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, and the released recipe for it (from batch on)."""
    task: str                       # vqa, choice, vcr, retrieval, pretrain or action
    dataset: str                    # the clips it uses
    heads: tuple                    # task heads
    metric: str                     # chooses the best checkpoint: the highest
    batch: int                      # clips per optimiser step, over all processes
    lr: float
    epochs: int = 0
    steps: int = 0                  # where the recipe counts steps
    warmup: int = 0                 # steps; 0: a tenth of them
    head_lr: float = 1              # task heads learn faster by this factor
    text_length: int = 40           # L
    frames: int = 3                 # T
    option_format: str = "options"  # question, all options, one of them; "pair": question, option
    negatives: int = 0              # retrieval with --vtm: captions of other clips
    vtm: bool = False               # is --vtm, the paper's VTM loss, part of the recipe?
    views: int = 1                  # sets of frames in evaluation
    answers: int = 0                # length of the closed answer list
    rows: dict = field(default_factory=dict)        # official number of rows
    chance: float = 0.0             # of the metric on test
    rerun: str = ""                 # published: the authors' rerun (their EVAL.md)
    paper: str = ""                 # published: the paper, or one that cites it


QA = dict(task="vqa", heads=("answer",), metric="accuracy", batch=512, epochs=20, lr=1e-4,
          head_lr=10)
CHOICE = dict(task="choice", heads=("mc",), metric="accuracy", batch=512, epochs=100, lr=1e-4,
              head_lr=10, chance=1 / 5)
RANKED = dict(task="choice", heads=("rank",), metric="accuracy", batch=256)
RETRIEVAL = dict(task="retrieval", heads=("contrast",), metric="text to video R@1", batch=1024,
                 views=3)
PRETRAIN = dict(task="pretrain", heads=("matching", "mlm"), metric="matching + MLM accuracy",
                steps=200_000, lr=1e-4, warmup=2500)
LINEAR = dict(task="action", heads=("answer",), metric="accuracy", batch=256, epochs=50)
BENCHMARKS = {
    "tgif-action": Benchmark(
        **CHOICE, dataset="tgif", rows={"train": 20471, "test": 2274},
        rerun="93.0", paper="92.5"),
    "tgif-transition": Benchmark(
        **CHOICE, dataset="tgif", rows={"train": 52704, "test": 6232},
        rerun="93.0 (one figure for action and transition)", paper="92.5"),
    "tgif-frame": Benchmark(
        **QA, dataset="tgif", answers=1540, rows={"train": 39392, "test": 13691},
        rerun="65.0", paper="64.0"),
    "msrvtt-qa": Benchmark(
        **QA, dataset="msrvtt", answers=1500,
        rows={"train": 158581, "val": 12278, "test": 72821}, rerun="42.9", paper="42.5"),
    "msvd-qa": Benchmark(
        **QA, dataset="msvd", answers=1000, rows={"train": 30933, "val": 6415, "test": 13157},
        rerun="46.1", paper="46.5"),
    "tvqa": Benchmark(
        **CHOICE, dataset="tvqa", text_length=100, rows={"train": 122039, "test": 15253}),
    "msrvtt": Benchmark(
        **RETRIEVAL, dataset="msrvtt", epochs=200, lr=3e-4, negatives=15,
        rows={"train": 9000, "test": 1000}, chance=1 / 1000,
        rerun="VTC 35.6/62.8/71.3; VTC + VTM 35.4/67.0/77.6; co-trained VTC 41.8/68.5/76.7",
        paper="VTC 36.1/62.3/72.1; VTC + VTM 37.1/66.7/75.9"),
    "didemo": Benchmark(
        **RETRIEVAL, dataset="didemo", epochs=200, lr=6e-4, text_length=80, negatives=15,
        rows={"train": 8395, "val": 1065, "test": 1004}, chance=1 / 1004,
        paper="32.7/61.4/73.5 (cited by Singularity)"),
    "activitynet": Benchmark(
        **RETRIEVAL, dataset="activitynet", epochs=200, lr=3e-4, negatives=15,
        rows={"train": 10009, "test": 4917}, chance=1 / 4917,
        paper="22.4/53.7/67.7 (cited by Singularity)"),
    "lsmdc": Benchmark(
        **RETRIEVAL, dataset="lsmdc", epochs=50, lr=1e-4, text_length=80, negatives=10, vtm=True,
        rows={"val": 7408, "test": 1000}, chance=1 / 1000),
    "msrvtt-mc": Benchmark(
        **RANKED, dataset="msrvtt", epochs=10, lr=1e-4, rows={"train": 140200, "test": 2990},
        chance=1 / 5, rerun="78.1 zero-shot", paper="77.5 zero-shot"),
    "lsmdc-mc": Benchmark(
        **RANKED, dataset="lsmdc", epochs=20, lr=1e-5,
        rows={"train": 101079, "val": 7408, "test": 10053},
        chance=1 / 5, rerun="56.7 zero-shot", paper="56.3 zero-shot"),
    "ego4d-mc": Benchmark(
        **RANKED, dataset="ego4d", epochs=10, lr=1e-4,
        chance=1 / 4, rerun="36.5 zero-shot", paper="36.5 zero-shot"),
    "vcr": Benchmark(
        task="vcr", dataset="vcr", heads=("rank", "rank2"), metric="Q->AR", batch=256, epochs=200,
        lr=1e-4, frames=1, option_format="pair", chance=1 / 16,
        rows={"train": 2 * 212923, "test": 2 * 26534}),         # Q->A and QA->R
    "webvid": Benchmark(**PRETRAIN, dataset="webvid", batch=1024),
    "howto100m": Benchmark(**PRETRAIN, dataset="howto100m", batch=4096),
    "cc3m": Benchmark(
        **PRETRAIN, dataset="cc3m", batch=1024, frames=1, rows={"train": 3318333, "test": 15840}),
    "hmdb51": Benchmark(
        **LINEAR, dataset="hmdb51", lr=1e-4, answers=51, rows={"train": 3570, "test": 1530},
        chance=1 / 51, rerun="51.2", paper="50.8"),
    "k400": Benchmark(
        **LINEAR, dataset="k400", lr=3e-4, frames=8, answers=400, rows={"test": 19906},
        chance=1 / 400, rerun="52.3", paper="50.8"),
}
# Of each task: the benchmark whose recipe your own data has, and that train.py runs without --data.
BENCHMARK_OF = {"vqa": "msrvtt-qa", "choice": "tgif-action", "vcr": "vcr", "retrieval": "msrvtt",
                "pretrain": "webvid", "action": "hmdb51"}

# ---- the manifest --------------------------------------------------------------------------------
# All data is a folder: train.jsonl, val.jsonl, test.jsonl with one row a line; answers.txt where
# answers come from a closed list; dataset.json if tools/prepare.py wrote it. A row has a "video",
# an absolute path or one below "root" of dataset.json, else below the folder; perhaps an "id"; and
# one of
#     question, answer                                    vqa
#     options, answer (a number), perhaps question        choice, vcr
#     caption or captions                                 retrieval, pretrain
#     label (a number)                                    action
# and perhaps the part of the clip to look at: seconds or frames, [first, last]; boxes (VCR);
# question_type. The ids of VCR's two rows of a question end in /qa and /qar.

MAX_LABEL = LIMITS["answers"][1]
ROW_FIELDS = {"id", "video", "question", "answer", "options", "caption", "captions", "label",
              "seconds", "frames", "boxes", "question_type"}


def manifest_info(folder):
    """dataset.json of a prepared folder, {} for your own data. Raises UserError if the
    folder holds no data."""
    path = os.path.join(folder, "dataset.json")
    if not os.path.exists(path):
        if has_split(folder, "train") or has_split(folder, "test"):
            return {}
        raise UserError(f"{folder} holds no dataset.json, train.jsonl or test.jsonl; prepare data "
                        "with: python tools/prepare.py NAME ROOT (the toy world: python "
                        "tools/toy.py data/toy)")
    try:
        with open(path, encoding="utf-8") as file:
            info = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); prepare the data again") from None
    if not isinstance(info, dict) or not isinstance(info.get("root"), str):
        raise UserError(f"{path} names no root folder; prepare the data again")
    name = info.get("benchmark")
    if "benchmark" in info and name not in list(BENCHMARKS):    # a list: name may be unhashable
        raise UserError(f"{path}: benchmark {name!r:.40} is unknown; there are "
                        f"{', '.join(BENCHMARKS)}")
    return info


def has_split(folder, split):
    return os.path.exists(os.path.join(folder, f"{split}.jsonl"))


class Manifest:
    """The rows of one split, a sequence; each is read from the disk when it is asked for. Memory:
    8 bytes a row, which all workers share."""

    def __init__(self, folder, split):
        info = manifest_info(folder)
        self.root = info.get("root", folder)
        self.path = os.path.join(folder, f"{split}.jsonl")
        self.offsets, self.crc = line_offsets(self.path)
        self.file = None
        self.process = None
        if len(self) == 0:
            raise UserError(f"{self.path} has no rows")
        if "prepared" not in info:              # written by hand: find mistakes at the start
            task = row_task(self[0])
            for i in range(len(self)):
                if row_task(self[i]) != task:
                    raise UserError(f"{self.path}, row {i + 1}: its fields are not those of row 1, "
                                    f"which is for {task}; put other rows into another folder")

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        if self.process != os.getpid():         # a worker needs a file position of its own
            self.file = open(self.path, "rb")
            self.process = os.getpid()
        self.file.seek(self.offsets[i])
        try:
            row = json.loads(self.file.readline())
            check_row(row)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}, row {i + 1}: {error}") from None
        row.setdefault("id", str(i + 1))
        return row

    def __getstate__(self):
        return {**self.__dict__, "file": None, "process": None}


def line_offsets(path):
    """(int64 array with the position of every row, crc32 of the file). Found in one pass and kept
    in a file of the same name, where the folder can be written."""
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it holds one row a line, as "
                        "tools/prepare.py writes it") from None
    kept = f"{path}.offsets.npy"
    key = [stat.st_size, stat.st_mtime_ns]
    with suppress(Exception):        # absent or damaged: made again
        saved = np.load(kept, allow_pickle=False)
        if saved.dtype == np.int64 and saved.ndim == 1 and saved[:2].tolist() == key:
            return saved[3:], int(saved[2])
    crc = 0
    size = 0
    starts = [np.zeros(1, np.int64)]
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            starts.append(size + ends + 1)
            size += len(block)
    starts = np.concatenate(starts)
    offsets = starts[np.diff(starts, append=size) > 2]      # shorter lines are blank
    part = f"{kept}.{os.getpid()}.part"
    with suppress(OSError):
        with open(part, "wb") as file:
            np.save(file, np.concatenate([np.array([*key, crc], np.int64), offsets]))
        os.replace(part, kept)
    return offsets, crc


def row_task(row):
    """What the fields of a row are for: vqa, choice, retrieval or action."""
    if "label" in row:
        return "action"
    if "caption" in row or "captions" in row:
        return "retrieval"
    return "choice" if "options" in row else "vqa"


def check_row(row):
    """Raises ValueError if a row is not of the form above."""
    if not isinstance(row, dict) or not row.keys() <= ROW_FIELDS:
        raise ValueError(f"a row is an object with fields out of {', '.join(sorted(ROW_FIELDS))}")
    if not is_text(row.get("video")) or ".." in row["video"].split("/"):
        raise ValueError("video must be a path without '..', relative or absolute")
    task = row_task(row)
    if task == "action":
        good = type(row["label"]) is int and 0 <= row["label"] < MAX_LABEL
    elif task == "retrieval":
        good = is_text_list(captions_of(row), 1)
    elif task == "choice":
        question = row.get("question", "")
        good = is_text_list(row["options"], 2) and (question == "" or is_text(question))
        good = good and type(row.get("answer")) is int and 0 <= row["answer"] < len(row["options"])
    else:
        good = is_text(row.get("question")) and is_text(row.get("answer"))
    if not good:
        raise ValueError("a row has question and answer (texts); or question, options (two texts "
                         "or more) and answer (a number from 0 on); or caption (a text); or "
                         "captions (texts); or label (a number)")
    for name in ("id", "question_type"):
        if name in row and not is_text(row[name]):
            raise ValueError(f"{name} must be a text")
    for name in ("seconds", "frames"):
        if name in row and not is_span(row[name]):
            raise ValueError(f"{name} must be [first, last], from 0 on")
    boxes = row.get("boxes", [])
    if not isinstance(boxes, list) or not all(map(is_box, boxes)):
        raise ValueError("boxes must be a list of [x1, y1, x2, y2], each from 0 to 1")


def is_text(value):
    """A text with words in it, that can be encoded: no NUL, no half of a surrogate pair."""
    if not isinstance(value, str) or re.search("[\0\ud800-\udfff]", value):
        return False
    return value.strip() != ""


def is_text_list(value, least):
    return isinstance(value, list) and len(value) >= least and all(map(is_text, value))


def is_span(value):
    return are_numbers(value, 2) and 0 <= value[0] <= value[1] < math.inf


def is_box(value):
    return are_numbers(value, 4) and 0 <= min(value) <= max(value) <= 1


def are_numbers(value, count):
    """A list of so many numbers, none of them NaN."""
    if not isinstance(value, list) or len(value) != count:
        return False
    return all(type(x) in (int, float) and x == x for x in value)


def benchmark_of(folder, task=None):
    """(name, Benchmark) of a folder. Your own data has the folder's name, and the recipe of the
    benchmark that is most like it, for `task` if given. Raises UserError if a prepared folder is
    for another task."""
    name = manifest_info(folder).get("benchmark")
    if name is None:
        if task is None:
            split = "train" if has_split(folder, "train") else "test"
            task = row_task(Manifest(folder, split)[0])
        return os.path.basename(os.path.abspath(folder)), BENCHMARKS[BENCHMARK_OF[task]]
    if task not in (None, BENCHMARKS[name].task):
        raise UserError(f"{folder} is for --task {BENCHMARKS[name].task}, not {task}")
    return name, BENCHMARKS[name]


def captions_of(row):
    return row["captions"] if "captions" in row else [row["caption"]]


def read_answers(folder):
    """The closed answer list of a folder: line number = class. Where your own data has no
    answers.txt: the answers of train, the most frequent first; for labels class 0, class 1, ..."""
    path = os.path.join(folder, "answers.txt")
    if not os.path.exists(path):
        if not has_split(folder, "train"):
            raise UserError(f"{folder} holds neither answers.txt nor train.jsonl; write "
                            "answers.txt with one answer a line")
        return list_train_answers(Manifest(folder, "train"))
    return read_answer_file(path)


def read_answer_file(path):
    """The lines of a file, which must all differ. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:          # perhaps a byte order mark
            answers = file.read().removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if "" in answers or len(set(answers)) < len(answers):
        raise UserError(f"{path} is empty, has an empty line or repeats an answer; it holds one "
                        "answer a line")
    return answers


def list_train_answers(rows):
    counts = Counter()
    for row in rows:
        counts[row.get("label", row.get("answer"))] += 1
    if any(isinstance(answer, int) for answer in counts):
        return [f"class {label}" for label in range(max(counts) + 1)]
    return sorted(counts, key=lambda answer: (-counts[answer], answer))


# ---- words into tokens ---------------------------------------------------------------------------

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Tokenizer:
    """BERT WordPiece. Texts become [CLS] ... [SEP]; batches pad them to their longest text."""

    def __init__(self, tokenizer):
        tokenizer.no_padding()          # a file may switch both on: [PAD] would be read as a word
        tokenizer.no_truncation()
        ids = [tokenizer.token_to_id(name) for name in SPECIAL]
        if None in ids:
            raise UserError(f"the tokenizer lacks some of {', '.join(SPECIAL)}; give a BERT "
                            "WordPiece with --tokenizer vocab.txt")
        self.tokenizer = tokenizer
        self.pad, _, self.cls, self.sep, self.mask = ids
        self.size = max(tokenizer.get_vocab().values()) + 1         # ids may have gaps

    @classmethod
    def load(cls, source):
        """source: a tokenizer.json, a vocab.txt, or a hub name such as bert-base-uncased, which
        is downloaded."""
        try:
            if source.endswith(".txt"):
                tokenizer = wordpiece(tokenizers.models.WordPiece.read_file(source))
            elif source.endswith(".json"):
                tokenizer = tokenizers.Tokenizer.from_file(source)
            else:
                tokenizer = tokenizers.Tokenizer.from_pretrained(source)
        except Exception as error:              # the library raises bare Exception
            raise UserError(f"tokenizer {source}: {error}; give a tokenizer.json, a vocab.txt or a "
                            "hub name such as bert-base-uncased") from None
        return cls(tokenizer)

    @classmethod
    def from_json(cls, text):
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise UserError(f"the checkpoint's tokenizer is damaged: {error}") from None
        return cls(tokenizer)

    def to_json(self):
        return self.tokenizer.to_str()

    def __reduce__(self):                       # travels to workers as text
        return Tokenizer.from_json, (self.to_json(),)

    def __len__(self):
        return self.size

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, text, L):
        """[CLS] text [SEP], cut to L tokens."""
        return [self.cls, *self.ids(text)[:L - 2], self.sep]

    def encode_options(self, question, options, option_format, L):
        """A list of at most L tokens for each option: the option alone if there is no question;
        else "question [SEP] option" (format "pair") or "question options: all of them answer:
        option" (format "options"). A text that is too long loses the end of its question first,
        then the beginning of the rest.
        Differs: the released code puts no spaces around "Options:" and "Answer:", so that they
        stick to their neighbours."""
        before = self.ids(question)
        all_options = self.ids(f"options: {' '.join(options)}")
        texts = []
        for option in options:
            if not before:
                end = self.ids(option)
            elif option_format == "pair":
                end = [self.sep] + self.ids(option)
            else:
                end = all_options + self.ids(f"answer: {option}")
            end = end[-(L - 2):]
            texts.append([self.cls, *before[:L - 2 - len(end)], *end, self.sep])
        return texts

    def mask_words(self, text, L, rng, share):
        """Masked language modelling on whole words: a share of the words, at least one. Of their
        tokens 80 % become [MASK], 10 % a random token, 10 % stay.
        Returns (ids, labels); labels are -1 where nothing is asked."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids = encoding.ids[:L - 2]
        word_of = encoding.word_ids[:L - 2]
        words = len(set(word_of))
        chosen = set(rng.permutation(words)[:max(1, round(share * words))].tolist())
        labels = [-1] * len(ids)
        for i, word in enumerate(word_of):
            if word not in chosen:
                continue
            labels[i] = ids[i]
            dice = rng.random()
            if dice < 0.8:
                ids[i] = self.mask
            elif dice < 0.9:
                ids[i] = int(rng.integers(self.size))
        return [self.cls, *ids, self.sep], [-1, *labels, -1]


def wordpiece(vocabulary):
    """A tokenizers.Tokenizer of {token: id} that normalises and splits as BERT does. A vocabulary
    with capitals is cased: nothing is lowercased."""
    words = [token for token in vocabulary if token not in SPECIAL]
    lowercase = all(token == token.lower() for token in words)
    model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in SPECIAL if token in vocabulary])
    return tokenizer


# ---- rows into model inputs ----------------------------------------------------------------------


ACTION = "a person is doing {}"         # as released
MASK_SHARE = 0.15                       # BERT's


@dataclass(frozen=True)
class InputSpec:
    """How the rows of a benchmark become inputs of a model."""
    benchmark: Benchmark
    config: Config
    tokenizer: Tokenizer
    answers: list                   # the closed list, for vqa and action
    negatives: int = 0              # captions of other clips, for retrieval with --vtm
    mask_share: float = MASK_SHARE  # of the words, in pre-training

    @property
    def frames(self):
        """T: one for a benchmark of still pictures."""
        return 1 if self.benchmark.frames == 1 else self.config.frames


class VideoTextDataset(torch.utils.data.Dataset):
    """Items are asked for as (epoch, index). In training, all that is random depends on
    (seed, epoch, index) alone, however many workers there are; in evaluation nothing is random.

    A training row whose clip cannot be read gives the item of the next row, and item["errors"]
    {id: cause} names the row that was left out. In evaluation such a row is {"index", "errors"}.
    """

    def __init__(self, folder, split, spec, train=False, seed=0):
        self.rows = Manifest(folder, split)
        self.spec = spec
        self.train = train
        self.seed = seed
        self.views = 1 if train else spec.benchmark.views
        self.class_of = {answer: n for n, answer in enumerate(spec.answers)}
        self.listings = os.path.join(folder, "listings")
        task = spec.benchmark.task
        # Rows of VCR look like those of choice, rows of pre-training like those of retrieval.
        needed = {"vcr": "choice", "pretrain": "retrieval"}.get(task, task)
        if row_task(self.rows[0]) != needed:
            raise UserError(f"{self.rows.path}: its rows are for {row_task(self.rows[0])}, not for "
                            f"{task}; choose another --task")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index)) if self.train else None
        errors = {}
        tries = 100 if self.train else 1        # if 100 clips fail, the disk is probably gone
        for i in range(index, index + tries):
            number = i % len(self)
            row = self.rows[number]
            try:
                frames = self.load_frames(row, rng)
            except VideoError as error:
                errors[row["id"]] = str(error)
                continue
            return {"index": number, "frames": frames, "errors": errors,
                    **self.load_texts(row, rng)}
        return {"index": index, "errors": errors}

    def load_frames(self, row, rng):
        """(T, 3, R, R) uint8, or (views, T, 3, R, R) in evaluation with several views."""
        spec = self.spec
        views = self.views
        place = rng.random(2).tolist() if self.train else (0.5, 0.5)
        path = os.path.join(self.rows.root, row["video"])
        pick = partial(pick_frames, row=row, T=spec.frames, views=views, rng=rng)
        frames = read_frames(path, pick, spec.config.image, place, boxes=row.get("boxes", ()),
                             listings=self.listings)
        return frames.unflatten(0, (views, spec.frames)) if views > 1 else frames

    def load_texts(self, row, rng):
        """{"texts": a list of token lists, "target"}, and what else the task needs."""
        spec = self.spec
        task = spec.benchmark.task
        L = spec.config.text_length
        encode = spec.tokenizer.encode
        if task == "vqa":
            return {"texts": [encode(row["question"], L)],
                    "target": self.class_of.get(row["answer"], -1)}
        if task == "action":
            if row["label"] >= len(spec.answers):
                raise UserError(f"{self.rows.path}: row {row['id']} has label {row['label']}, the "
                                f"answer list {len(spec.answers)} classes")
            return {"texts": [encode(ACTION.format("[MASK]"), L)], "target": row["label"]}
        if task == "retrieval":
            captions = [draw(captions_of(row), rng)]
            if self.train:
                captions += [self.other_caption(row, rng) for _ in range(spec.negatives)]
            return {"texts": [encode(caption, L) for caption in captions], "target": 0}
        if task == "pretrain":
            return self.pretrain_text(row, rng)
        # choice and vcr
        texts = spec.tokenizer.encode_options(row.get("question", ""), row["options"],
                                              spec.benchmark.option_format, L)
        return {"texts": texts, "target": row["answer"],
                "is_rationale": row.get("question_type") == "QA->R"}

    def pretrain_text(self, row, rng):
        """Three texts: one to match, one with masks to fill in, the caption as it is. Target 1 if
        the first belongs to the clip; with probability 1/2 it is a caption of another clip.
        Differs: the released code keeps the caption and draws another clip."""
        if rng is None:                         # the same masks in every evaluation
            rng = np.random.default_rng(zlib.crc32(row["id"].encode()))
        tokenizer = self.spec.tokenizer
        L = self.spec.config.text_length
        caption = draw(captions_of(row), rng)
        to_match = caption if rng.random() < 0.5 else self.other_caption(row, rng)
        masked, labels = tokenizer.mask_words(caption, L, rng, self.spec.mask_share)
        texts = [tokenizer.encode(to_match, L), masked, tokenizer.encode(caption, L)]
        return {"texts": texts, "target": int(to_match in captions_of(row)), "labels": labels}

    def other_caption(self, row, rng):
        """A caption that this row does not have. (Its own if 100 draws find no other.)"""
        for _ in range(100):
            other = self.rows[int(rng.integers(len(self)))]
            caption = draw(captions_of(other), rng)
            if caption not in captions_of(row):
                break
        return caption


def draw(texts, rng):
    """One of the texts at random; the first in evaluation (rng None)."""
    return texts[0] if rng is None else texts[int(rng.integers(len(texts)))]


def pick_frames(times, row, T, views, rng):
    """The numbers of the frames to read, from the row's part of the clip. times: the seconds of all
    frames. With n views, view v has every n-th of n * T evenly spaced frames, from the v-th on."""
    first, last = 0, len(times) - 1
    if "seconds" in row:
        first = np.searchsorted(times, row["seconds"][0])
        last = np.searchsorted(times, row["seconds"][1], side="right") - 1
    elif "frames" in row:
        first, last = row["frames"]
    last = int(np.clip(last, 0, len(times) - 1))
    first = int(np.clip(first, 0, last))        # an empty span gives the nearest frame
    mode = "eval" if rng is None else "train"
    numbers = frame_indices(last - first + 1, T * views, mode, rng)
    picked = []
    for view in range(views):
        picked += [first + number for number in numbers[view::views]]
    return picked


class MixedDataset(torch.utils.data.Dataset):
    """Several datasets as one. Items are asked for as (part, epoch, index)."""

    def __init__(self, parts):
        self.parts = parts

    def __getitem__(self, key):
        part, epoch, index = key
        return self.parts[part][epoch, index]


class BatchSampler(torch.utils.data.Sampler):
    """Endless lists of (part, epoch, index) for one process, `accum` micro-batches for each step:
    a pure function of its arguments, so that any step can be reached again.

    lengths: rows of each dataset. A batch is of one dataset, as clips of several may differ in
    their number of frames. It is cut into accum * world equal pieces; process `rank` takes every
    world-th. The last, short batch of an epoch is left out.
    """

    def __init__(self, lengths, batch, seed, accum=1, rank=0, world=1, first_step=0):
        self.lengths = lengths
        self.batch = batch
        self.seed = seed
        self.pieces = accum * world
        self.rank = rank
        self.world = world
        self.first_step = first_step
        self.steps_per_epoch = sum(length // batch for length in lengths)

    def __iter__(self):
        epoch, first = divmod(self.first_step, self.steps_per_epoch)
        while True:
            rng = np.random.default_rng((self.seed, epoch))
            batches = []                                    # (part, row numbers)
            for part, length in enumerate(self.lengths):
                count = length // self.batch
                order = rng.permutation(length)[:count * self.batch]
                for numbers in order.reshape(count, self.batch):
                    batches.append((part, numbers))
            for k in rng.permutation(len(batches))[first:]:
                part, numbers = batches[k]
                for piece in np.split(numbers, self.pieces)[self.rank::self.world]:
                    yield [(part, epoch, int(i)) for i in piece]
            epoch += 1
            first = 0


def collate(items, pad):
    """Items into one batch: see the head of this file. Texts are padded to the longest of the
    batch, not to L: fewer tokens, the same result."""
    batch = {"errors": {}}
    for item in items:
        batch["errors"] |= item["errors"]
    items = [item for item in items if "frames" in item]
    if not items:
        return batch
    for name in ("index", "target", "is_rationale"):
        if name in items[0]:
            batch[name] = torch.tensor([item[name] for item in items])
    batch["frames"] = torch.stack([item["frames"] for item in items])
    A = max(len(item["texts"]) for item in items)
    L = max(len(ids) for item in items for ids in item["texts"])
    input_ids = torch.full((len(items), A, L), pad)
    attention_mask = torch.zeros(len(items), A, L, dtype=torch.bool)
    for b, item in enumerate(items):
        for a, ids in enumerate(item["texts"]):
            input_ids[b, a, :len(ids)] = torch.tensor(ids)
            attention_mask[b, a, :len(ids)] = True
    if "labels" in items[0]:    # positions here, as nonzero() on a GPU would make the CPU wait
        labels = torch.full((len(items), L), -1)
        for b, item in enumerate(items):
            labels[b, :len(item["labels"])] = torch.tensor(item["labels"])
        batch["masked"] = (labels.flatten() >= 0).nonzero()[:, 0]
        batch["labels"] = labels.flatten()[batch["masked"]]
    return {**batch, "input_ids": input_ids, "attention_mask": attention_mask}


PREFETCH = 4        # batches that each worker keeps ready
WAIT = 600          # seconds for one batch; longer means that the workers are stuck


def make_loader(dataset, batches, workers, pad):
    """Yield the batches that worker processes read; `batches` yields lists of keys of the dataset.
    Raises UserError if a worker dies or is stuck."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers,
        collate_fn=partial(collate, pad=pad), timeout=WAIT if workers else 0,
        prefetch_factor=PREFETCH if workers else None, worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator())            # its own: else it draws from the model's
    try:
        yield from loader
    except (RuntimeError, UserError) as error:
        traceback.clear_frames(error.__traceback__)         # its frames keep the workers alive
        cause = str(error).strip().splitlines()[-1]         # the last line of a worker's traceback
        if isinstance(error, UserError):
            raise UserError(cause.removeprefix("allinone.UserError: ")) from None
        raise UserError(f"reading data failed: {cause} (--workers 0 reads in the main process and "
                        "needs no shared memory)") from None


def start_worker(number):
    """A worker ignores signals: the main process needs it until it has saved."""
    os.nice(10)                                     # the model's threads come first
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Python would wait for workers, which ignore its SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # else torch reports their end as an error
    for process in multiprocessing.active_children():
        process.kill()


def check_shared_memory(dataset, batch, workers):
    """Workers hand frames over in /dev/shm. Docker gives it only 64 MB, and torch then hangs."""
    spec = dataset.spec
    clip = dataset.views * spec.frames * 3 * spec.config.image ** 2
    needed = clip * batch * PREFETCH * workers
    with suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free
        if needed > free:
            raise UserError(f"{workers} workers need {needed >> 20} MiB in /dev/shm, which has "
                            f"{free >> 20} MiB; start docker with --shm-size=8g, or give fewer "
                            "--workers (0 needs none)")


# ---- python data.py ------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="videos, gifs, pictures, folders of pictures")
    for path in parser.parse_args().files:
        seen = []

        def pick(times):
            seen[:] = times, frame_indices(len(times), 3, "eval")       # may be called twice
            return seen[1]

        try:
            frames = read_frames(path, pick)
        except VideoError as error:
            print(printable(error))
            continue
        times, picked = seen
        seconds = ", ".join(f"{times[i]:.2f}" for i in picked)
        print(f"{printable(path)}: {len(times)} frames of {frames.shape[3]} x {frames.shape[2]}, "
              f"from {times[0]:.2f} to {times[-1]:.2f} s; evaluation looks at frames {picked}: "
              f"{seconds} s")


if __name__ == "__main__":
    run_main("data.py", main)
