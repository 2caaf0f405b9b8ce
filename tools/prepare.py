"""Write the manifest folder of a benchmark from its owners' files, or of one file of your own.

    python tools/prepare.py msrvtt-qa /data/msrvtt      writes data/msrvtt-qa
    python tools/prepare.py mine.jsonl                  writes data/mine

The folder has train.jsonl, val.jsonl, test.jsonl, answers.txt (the closed list of answers, or the
names of the classes), dataset.json, and missing.txt (missing or unreadable clips). For a file of
your own it also has tokenizer.json: a copy of the one in the folder of that file, or else a new one
of its words. Training and evaluation read nothing else. An error in a file names the file and the
row.

Where the owners give no val, the rows of 5 % of the training clips become val: the crc32 of a
clip's path decides. Rows without a readable clip are left out of train, and of a val that was made
from train. Other rows of val and test stay; eval.py refuses them, or counts them as wrong with
--allow-missing.

Your own file has one row a line, in the form of the manifest (see data.py). "split" may mark a row
as train, val or test; rows without a mark are train then, and test has marked rows alone. In a file
without marks, 90 % of the clips are train, 5 % val and 5 % test.
"""
# The tools run from a checkout: the core is one folder up.
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import ast
import csv
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial

import numpy as np
from tokenizers.trainers import WordPieceTrainer

from allinone import UserError, lock_folder, printable, progress, run_main
from data import BENCHMARKS, MEDIA, SPECIAL, check_row, readable, row_task, wordpiece

# ---- the rows of a file --------------------------------------------------------------------------
# rows(path) yields a dict, a list of cells or a text for each row, None for a row without content.


def lines(path):
    """Lines without their ends. Each is decoded alone, so that an error names its row."""
    with open(path, "rb") as file:
        for line in file:
            yield line.decode("utf-8-sig").rstrip("\r\n")


def text_rows(path):
    return (line.strip() or None for line in lines(path))


def check_object(row):
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {row!r:.60}")
    return row


def jsonl_rows(path):
    return (check_object(json.loads(line)) if line else None for line in text_rows(path))


def json_rows(path):
    """The items of an array, of MSR-VTT's array in an object, or {video: row} of ActivityNet."""
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(rows, dict):
        rows = rows.get("sentences") or rows.get("annotations") or [
            {"clip_name": name, **check_object(row)} for name, row in rows.items()]
    return map(check_object, rows)


def csv_rows(path, header=True, **dialect):
    """Dicts by the names of the header, which counts as row 1, or lists of cells."""
    text = (line.replace("\r", " ") + "\n" for line in lines(path))     # csv refuses a bare CR
    rows = csv.reader(text, strict=True, **dialect)
    if header:
        names = next(rows, [])
        yield None
    for cells in rows:
        if cells and header:
            if len(cells) != len(names):
                raise ValueError(f"{len(cells)} columns where the header has {len(names)}")
            cells = dict(zip(names, cells))
        yield cells or None


tab_rows = partial(csv_rows, delimiter="\t")
cell_rows = partial(tab_rows, header=False)
raw_rows = partial(cell_rows, quoting=csv.QUOTE_NONE)       # quotes belong to the text
FORMS = {       # file name -> its rows; the first that matches
    "*.jsonl": jsonl_rows,
    "*.json": json_rows,
    "*.txt": text_rows,
    "*.list": text_rows,
    "T*_question.csv": tab_rows,
    "ht100_videos_split.csv": tab_rows,
    "ego4d_train_subset.csv": cell_rows,
    "*_success_full.tsv": cell_rows,
    "*GCC*.tsv": raw_rows,
    "LSMDC16_*.csv": raw_rows,
    "*.csv": csv_rows,
}

# ---- the folder of a data set --------------------------------------------------------------------

RANK = {extension: n for n, extension in enumerate(MEDIA)}      # .mp4 before .avi, ...


def stem(path):
    """A path without media extensions: "a.mp4.webm" -> "a", "b." -> "b". Other dots stay."""
    base, extension = os.path.splitext(path)
    if base and (extension == "." or extension.lower() in RANK):
        return stem(base)
    return path


def composed(name):
    """The name in Unicode's form NFC. Disks have an accent apart (NFD) or in its letter (NFC)."""
    return unicodedata.normalize("NFC", name)


class DataRoot:
    """A folder with annotation files and clips. Each folder below it is listed once."""

    def __init__(self, path):
        self.path = Path(os.path.abspath(path))
        self.listings = {}
        self.place = self.path              # the file that is read
        self.number = 0                     # of the row that is read, from 1
        self.folders = ()                   # where its clips may be
        self.classes = []                   # the names of the classes of actions
        self.left_out = Counter()           # reason -> rows

    def file(self, source, files):
        """The path of the first of `files` in the root or its folder annotations/. `source`: who
        has them."""
        for name, folder in itertools.product(files.split(), ("", "annotations")):
            path = self.path / folder / name
            if path.exists():
                return path
        raise UserError(f"no annotations in {self.path} or {self.path}/annotations: expected "
                        f"{files.replace(' ', ' or ')}; from {source}")

    def rows(self, source, files, *folders):
        """Yields the rows of the first of `files` that exists. Clips are in one of `folders`."""
        return self.rows_of(self.file(source, files), *folders)

    def rows_of(self, path, *folders):
        self.folders = folders
        self.place = path
        self.number = 0
        rows = next(FORMS[form] for form in FORMS if path.match(form))(path)
        self.number = 1
        for row in rows:
            if row is not None:
                yield row
            self.number += 1

    def listing(self, folder):
        """{name or stem, in NFC: name on disk}; {} where there is no such folder. A folder of
        pictures comes before a file with its stem; the order of MEDIA decides between files."""
        if folder not in self.listings:
            path = self.path / folder
            names = os.listdir(path) if path.is_dir() else []
            names.sort(key=lambda name: (RANK.get(os.path.splitext(name)[1].lower(), -1), name))
            names.reverse()                 # of equal keys the last one stays
            table = {composed(stem(name)): name for name in names}
            table.update({composed(name): name for name in names})
            self.listings[folder] = table
        return self.listings[folder]

    def find(self, path):
        """The path of a clip as it is on disk: its exact name, else its stem. None: missing."""
        folder, _, name = path.rpartition("/")
        if folder and not self.listing(folder):
            folder = self.find(folder) or folder        # in another form of Unicode
        names = self.listing(folder)
        found = names.get(composed(name)) or names.get(composed(stem(name)))
        return found and os.path.join(folder, found)

    def clip(self, *names):
        """The path of the first name that is in one of the folders, with its extension. Of a
        missing clip: the first possible path, without extension."""
        pairs = itertools.product(self.folders, map(safe_path, names))
        paths = list(itertools.starmap(os.path.join, pairs))
        return next(filter(None, map(self.find, paths)), stem(paths[0]))


# ---- checked values: each function raises ValueError with the value ------------------------------

TEXT = 10_000       # characters in a text or a literal; the longest paragraphs have a third of that


def clean(text):
    """A text without outer blanks and line breaks."""
    if not isinstance(text, str) or not text.strip() or len(text) > TEXT:
        raise ValueError(f"{text!r:.60} is no text of 1 to {TEXT} characters")
    text.encode()       # JSON can spell half a surrogate pair, which no tokenizer takes
    return " ".join(text.split())


def is_blank(text):
    """Is a cell empty? Tables that went through pandas have "NaN" there."""
    return text.strip().lower() in ("", "nan")


def safe_path(path):
    """`path` itself if it names something below the folder that it will be joined to."""
    if {"", ".", ".."}.intersection(path.split("/")) or len(path) > 1000:
        raise ValueError(f"{path!r:.80} is no path below the data folder (relative, without '..')")
    return path


def index(value, count, first=0):
    """A number from 0 to count - 1, from an int or its digits. `first`: the file's number for 0."""
    number = int(str(value)) - first        # str: True and 1.5 are no numbers
    if not 0 <= number < count:
        raise ValueError(f"{value!r:.60} is no number from {first} to {first + count - 1}")
    return number


def span(start, end):
    """(start, end) in seconds."""
    start = float(start)
    end = float(end)
    if not 0 <= start <= end < 10**9:
        raise ValueError(f"{start} to {end} is no span of seconds")
    return start, end


def either(row, *names):
    """The cell of the first name that the row has: the forms of a file differ in names."""
    return row[next(filter(row.__contains__, names), names[0])]


# ---- rows of the manifest ------------------------------------------------------------------------


def first_words(question):
    """The type of a question: "what color", "who is", "how many"."""
    return " ".join(question.lower().split()[:2])


def open_row(id, video, question, answer, question_type=""):
    question = clean(question)
    return {"id": str(id), "video": video, "question": question, "answer": clean(answer),
            "question_type": question_type or first_words(question)}


def choice_row(id, video, options, answer, count, question="", question_type="", **more):
    if type(options) is not list or len(options) != count:
        raise ValueError(f"{options!r:.60} is no list of {count} options")
    if question:
        question = clean(question)
        more["question_type"] = question_type or first_words(question)
    return {"id": str(id), "video": video, "question": question,
            "options": list(map(clean, options)), "answer": index(answer, count), **more}


def caption_row(id, video, caption, **more):
    caption = clean(caption)
    if is_blank(caption):
        raise ValueError(f"{caption!r} is no caption")
    return {"id": str(id), "video": video, "caption": caption, **more}


def insert_right(right, wrong, key):
    """(options, answer): the place of the right text depends on `key`. In a constant place it
    would be right for a model with equal scores."""
    place = zlib.crc32(key.encode()) % (len(wrong) + 1)
    return [*wrong[:place], right, *wrong[place:]], place


def by_clip(rows):
    """One row per clip with all its captions, in the order of first mention."""
    clips = {}
    for row in rows:
        caption = row.pop("caption")
        row["captions"] = []
        clips.setdefault(stem(row["video"]), row)["captions"].append(caption)
    return clips.values()


def by_paragraph(rows):
    """One row per clip; all its sentences are its caption."""
    for row in by_clip(rows):
        row["caption"] = " ".join(row.pop("captions"))
        yield row


def draw_options(rows, count):
    """Training rows where the owners have only a test: each caption among count - 1 captions of
    other clips, the same ones every time."""
    rows = list(rows)
    rng = random.Random(0)
    for row in rows:
        texts = {row["caption"]: None}      # in order, without repeats
        for _ in range(1000):
            other = rng.choice(rows)
            if other["video"] != row["video"]:
                texts[other["caption"]] = None
            if len(texts) == count:
                break
        right, *wrong = texts
        options, answer = insert_right(right, wrong, row["id"])
        row = {**row, "question": "", "options": options, "answer": answer}
        del row["caption"]
        yield row


# ---- readers: question answering -----------------------------------------------------------------
# read(root, split) yields the rows of "train", "val" or "test" in the owners' order.

XU = "github.com/xudejing/video-question-answering"
MSRVTT_CLIPS = ("videos/all", "videos", "TrainValVideo", "TestVideo")
SHOWN = {"train": "train", "test": "val"}       # the labels of some tests are hidden
LONG = {"train": "training", "test": "validation"}


def read_msrvtt_qa(root, split):
    """`video_id` is a number in the official json, "video7" in ClipBERT's jsonl, without ids."""
    files = f"{split}_qa.json msrvtt_qa_{split}.jsonl msrvtt_qa/{split}.jsonl"
    for row in root.rows(f"{XU} or ClipBERT", files, *MSRVTT_CLIPS):
        video = row["video_id"]
        if isinstance(video, int):
            video = f"video{video}"
        yield open_row(row.get("id", root.number), root.clip(video), row["question"],
                       row["answer"])


def read_msvd_qa(root, split):
    """Clips are numbered; youtube_mapping.txt has their file names. Some mirrors use vid1.avi."""
    mapping = root.rows(XU, "youtube_mapping.txt")
    names = dict(line.rsplit(maxsplit=1)[::-1] for line in mapping)
    files = f"{split}_qa.json {split}_qa_encode.json msvd_{split}_qa_encode.json"
    for row in root.rows(XU, files, "YouTubeClips", "videos"):
        number = f"vid{row['video_id']}"
        video = root.clip(names[number], number)
        yield open_row(row["id"], video, row["question"], row["answer"])


def read_tgif(root, split, kind):
    """The last headers of the csv are swapped: `vid_id` is the id of the question."""
    types = ("object", "number", "color", "location")
    files = f"{split.title()}_{kind}_question.csv {kind}_{split}.jsonl tgif_qa/{kind}_{split}.jsonl"
    source = "github.com/YunseokJANG/tgif-qa (dataset/) or ClipBERT"
    for row in root.rows(source, files, "gifs"):
        id = row.get("vid_id", root.number)
        video = root.clip(row["gif_name"])
        question = row["question"]
        if kind == "frameqa":
            question_type = row.get("answer_type") or types[index(row["type"], 4)]
            yield open_row(id, video, question, row["answer"], question_type)
        else:
            options = row["options"] if "options" in row else [row[f"a{i}"] for i in range(1, 6)]
            yield choice_row(id, video, options, row["answer"], 5, question)


def read_tvqa(root, split):
    """Frames at 3 a second in files that count from 1: second t is file max(1, int(3 t)). Some rows
    have no times. Differs: the released code widens spans of less than 2 T frames."""
    rows = root.rows("github.com/jayleicn/TVQA (data/)", f"tvqa_{SHOWN[split]}.jsonl", "frames_hq",
                     "frames/raw_frames/frames_hq", "raw_frames/frames_hq")
    for row in rows:
        video = row["vid_name"]
        show = re.match(r"(bbt|castle|friends|grey|house|met)_|s\d", video)
        if not show:
            raise ValueError(f"{video!r:.60} is of no known show")
        video = root.clip(f"{show[1] or 'bbt'}_frames/{video}")     # s01e01: bbt
        options = [row[f"a{i}"] for i in range(5)]
        more = {}
        if row["ts"] != "NaN-NaN":
            more["frames"] = [max(1, int(t * 3)) - 1 for t in span(*row["ts"].split("-"))]
        yield choice_row(row["qid"], video, options, row["answer_idx"], 5, row["q"], **more)


def read_vcr(root, split):
    """Two rows for each: Q->A, and QA->R, whose question ends with the true answer.

    A text names an object by class and number ("person 0"). Numbers follow the first mention in
    question, answers, rationales. boxes[number] is x1, y1, x2, y2 as fractions of width and height,
    for at most 21 objects as in the released code. The tokens of the file count objects from 0.
    """
    @lru_cache(maxsize=8)                   # the questions about a picture follow each other
    def metadata(name):
        return json.loads((root.path / root.clip(name)).read_text(encoding="utf-8"))

    def word(token):                        # with `objects` and `numbers` of the row below
        if isinstance(token, str):
            return token
        return " ".join(f"{objects[index(i, len(objects))]} {numbers.setdefault(i, len(numbers))}"
                        for i in token)

    def sentence(tokens):
        return " ".join(map(word, tokens))

    files = f"{SHOWN[split]}.jsonl vcr1annots/{SHOWN[split]}.jsonl"
    for row in root.rows("visualcommonsense.com", files, "vcr1images"):
        objects = row["objects"]
        numbers = {}                        # object -> its number in the texts
        question = sentence(row["question"])
        answers = list(map(sentence, row["answer_choices"]))
        reasons = list(map(sentence, row["rationale_choices"]))
        about = metadata(row["metadata_fn"])
        sizes = [about["width"], about["height"]] * 2
        boxes = np.array([box[:4] for box in about["boxes"]]) / sizes
        if boxes.shape != (len(objects), 4) or not np.isfinite(boxes).all():
            raise ValueError(f"{row['metadata_fn']} has not a box of four numbers for each object")
        boxes = boxes.clip(0, 1)[list(numbers)[:21]].tolist()
        id = row["annot_id"]
        video = root.clip(row["img_fn"])
        answer = row["answer_label"]
        yield choice_row(f"{id}/qa", video, answers, answer, 4, question, "Q->A", boxes=boxes)
        question = f"{question} {answers[index(answer, 4)]}"
        yield choice_row(f"{id}/qar", video, reasons, row["rationale_label"], 4, question, "QA->R",
                         boxes=boxes)


# ---- readers: retrieval and multiple choice ------------------------------------------------------

MSRVTT = "CLIP4Clip's msrvtt_data.zip, the MSR-VTT release, Frozen in Time or ClipBERT"
PAIRS = ("CLIP4Clip's msrvtt_data.zip or ClipBERT (Frozen in Time keeps the test captions in "
         "jsfusion_val_caption_idx.pkl, which is not opened)")
LSMDC = "MPII's LSMDC page (with a password)"
LSMDC_CLIPS = ("avi", "videos", "")
EGO4D = "the released code (meta_data/ego4d)"


def read_msrvtt_captions(root, tested):
    """A row per caption of all clips that are not in the rows `tested`."""
    tested = {stem(row["video"]) for row in tested}
    files = ("MSRVTT_data.json train_val_videodatainfo.json annotation/MSR_VTT.json "
             "msrvtt_retrieval/train.jsonl")
    rows = root.rows(MSRVTT, files, *MSRVTT_CLIPS)
    if "train_val" in root.file(MSRVTT, files).name:    # the release has two files
        more = root.rows(MSRVTT, "test_videodatainfo.json", *MSRVTT_CLIPS)
        rows = itertools.chain(rows, more)
    for row in rows:
        name = either(row, "video_id", "image_id", "clip_name")
        video = root.clip(name)
        if stem(video) not in tested:
            yield caption_row(f"{name}/{root.number}", video, row["caption"])


def read_msrvtt(root, split):
    """1k-A fixes one caption for each test clip; all other clips are for training ("9k").
    ClipBERT's train.jsonl has its own list ("7k")."""
    if split == "train":
        yield from by_clip(read_msrvtt_captions(root, read_msrvtt(root, "test")))
        return
    files = "MSRVTT_JSFUSION_test.csv msrvtt_test.csv msrvtt_retrieval/test.jsonl"
    for row in root.rows(PAIRS, files, *MSRVTT_CLIPS):
        id = either(row, "key", "retrieval_key")
        video = root.clip(either(row, "video_id", "clip_name"))
        yield caption_row(id, video, either(row, "sentence", "caption"))


def read_msrvtt_mc(root, split):
    if split == "train":
        yield from draw_options(read_msrvtt_captions(root, read_msrvtt_mc(root, "test")), 5)
        return
    files = ("msrvtt_mc_test.jsonl msrvtt_mc_test.json "
             "msrvtt_retrieval_mc/msrvtt_retrieval_mc_test.jsonl")
    for row in root.rows("ClipBERT, the released code or VindLU", files, *MSRVTT_CLIPS):
        video = root.clip(either(row, "clip_name", "video"))
        yield choice_row(root.number, video, either(row, "options", "caption"), row["answer"], 5)


def read_didemo_sentences(root, split):
    """A clip may have two spellings: with another extension, or with a bare dot at the end."""
    files = f"{split}_data.json didemo_retrieval/{split}.jsonl"
    source = "github.com/LisaAnne/LocalizingMoments (data/) or ClipBERT"
    for row in root.rows(source, files, "video", "videos"):
        name = either(row, "video", "clip_name")
        text = either(row, "description", "caption")
        yield caption_row(stem(Path(name).name), root.clip(name), text)


def read_didemo(root, split):
    return by_paragraph(read_didemo_sentences(root, split))


def read_activitynet(root, split):
    """Test is val_1. Sentences begin with blanks. The lists *_ids.json name more clips than have
    captions and are not read."""
    files = {"train": "train.json train.jsonl anet_retrieval/train.jsonl",
             "test": "val_1.json val1.jsonl anet_retrieval/val1.jsonl"}
    source = "ActivityNet Captions' captions.zip, the released code or ClipBERT"
    for row in root.rows(source, files[split], "videos", "activitynet_frames"):
        name = row["clip_name"]
        caption = " ".join(row["sentences"]) if "sentences" in row else row["caption"]
        yield caption_row(name, root.clip(name), caption)


def read_lsmdc_sentences(root, split):
    part = {"train": "annos_training", "val": "annos_val", "test": "challenge_1000_publictect"}
    cells = root.rows(LSMDC, f"LSMDC16_{part[split]}.csv", *LSMDC_CLIPS)
    for name, _, _, _, _, sentence in cells:
        video = root.clip(f"{name.rsplit('_', 1)[0]}/{name}")       # <movie>/<movie>_<times>
        yield caption_row(root.number, video, sentence)


def read_lsmdc(root, split):
    """Differs: the released reader takes the name of the clip for its caption."""
    rows = read_lsmdc_sentences(root, split)
    return by_clip(rows) if split == "train" else rows


def read_lsmdc_mc(root, split):
    """The test counts its answers from 1. Train and valid have no answers: the first is right."""
    part = {"train": "train", "val": "valid", "test": "test_randomized"}
    cells = root.rows(LSMDC, f"LSMDC16_multiple_choice_{part[split]}.csv", *LSMDC_CLIPS)
    for name, _, _, _, _, right, *wrong in cells:
        video = root.clip(f"{name.rsplit('_', 1)[0]}/{name}")
        options, answer = insert_right(right, wrong, f"{name}/{root.number}")
        if split == "test":
            options = [right, *wrong[:-1]]
            answer = index(wrong[-1], 5, first=1)
        yield choice_row(root.number, video, options, answer, 5)


def around(frame):
    """The 120 frames around a narrated one."""
    frame = index(frame, 10**9)
    return [max(0, frame - 60), frame + 59]


def read_ego4d_narrations(root):
    cells = root.rows(EGO4D, "ego4d_train_subset.csv", "videos")
    for uid, _, _, _, _, frame, text, *_ in cells:
        yield caption_row(root.number, root.clip(uid), text, frames=around(frame))


def read_ego4d_mc(root, split):
    """The test has Python literals in its cells; training rows are narrations. This is not EgoMCQ
    of EgoVLP, which has one text and five clips."""
    if split == "train":
        yield from draw_options(read_ego4d_narrations(root), 4)
        return
    for row in root.rows(EGO4D, "mc_val.csv", "videos"):
        uid, frame, *_, right = ast.literal_eval(row["question"][:TEXT])
        options = [answer[-1] for answer in ast.literal_eval(row["answers"][:TEXT])[:4]]
        last = 3 - options[::-1].index(right)           # of equal options, as released
        yield choice_row(root.number, root.clip(uid), options, last, 4, frames=around(frame))


# ---- readers: pre-training -----------------------------------------------------------------------


def read_webvid(root, split):
    """The tsv has no header, and captions of several lines."""
    files = f"results_2M_{SHOWN[split]}.csv webvid_{LONG[split]}_success_full.tsv"
    source = "the WebVid-2.5M release or the released code"
    for row in root.rows(source, files, "videos", SHOWN[split]):
        if isinstance(row, dict):
            row = [row["name"], row["page_dir"], row["videoid"]]
        caption, *path = row
        if any(map(is_blank, row)):
            root.left_out["rows without caption or clip"] += 1
        else:
            yield caption_row(path[-1], root.clip("/".join(path)), caption)


def shared_numbers(urls):
    """The crc32 numbers that two urls or more have. Takes 8 bytes a url: its crc32, and 32 bits of
    another hash."""
    hashes = (zlib.crc32(url.encode()) << 32 | hash(url) & 0xFFFFFFFF for url in urls)
    different = np.unique(np.fromiter(hashes, np.uint64))
    numbers, counts = np.unique(different >> 32, return_counts=True)
    return set(numbers[counts > 1].tolist())


def read_cc3m(root, split):
    """No header: caption and url, whose picture is stored as crc32(url) as in Frozen in Time; or
    caption and path. Where two urls have one number, its picture can be of either: both rows are
    left out."""
    official = {"train": "Train_GCC-training", "test": "Validation_GCC-1.1.0-Validation"}
    files = f"{official[split]}.tsv cc3m_{LONG[split]}_success_full.tsv"
    source = "Google's Conceptual Captions page or the released code"
    shared = shared_numbers(url for _, url in root.rows(source, files))
    for caption, url in root.rows(source, files, LONG[split], "images"):
        number = zlib.crc32(url.encode())
        is_url = "://" in url
        if is_blank(caption):
            root.left_out["rows without caption"] += 1
        elif is_url and number in shared:
            root.left_out["rows whose picture has two urls"] += 1
        else:
            yield caption_row(url, root.clip(str(number) if is_url else url), caption)


def read_howto100m(root, split):
    """A row per narration in the csv of each video, stretched to 4 s as in the released code."""
    source = "the HowTo100M page or the released code"
    folder = root.file(source, "howto100m_captions howto100m_csv")
    narrated = set(os.listdir(folder))      # some videos are silent
    listed = root.rows(source, "HowTo100M_v1.csv ht100_videos_split.csv", "videos")
    videos = [root.clip(either(row, "video_id", "Name")) for row in listed]
    for video in dict.fromkeys(videos):
        file = f"{Path(stem(video)).name}.csv"
        for row in root.rows_of(folder / file) if file in narrated else ():
            if is_blank(row["text"]) or float(row["end"]) < float(row["start"]):
                root.left_out["narrations without text, or that end before they start"] += 1
                continue
            start, end = span(row["start"], row["end"])
            more = max(0.0, (4 - (end - start)) / 2)
            yield caption_row(f"{stem(video)}/{root.number}", video, row["text"],
                              seconds=[max(0.0, start - more), end + more])


# ---- readers: action recognition -----------------------------------------------------------------

HMDB51_CLIPS = ("hmdb51", "videos", "")


def label_row(id, video, label):
    return {"id": id, "video": video, "label": label}


def listed_classes(root, path, count):
    """The class names of a released list, by their numbers; "class 0", ... if no file has them."""
    for name in ("hmdb51_classInd.txt", "kinetics_label_map.txt", "label_map_k400.txt"):
        file = path.parent / name
        if file.exists():                   # a line may begin with its number, from 1
            return [line.removeprefix(f"{root.number} ") for line in root.rows_of(file)]
    return [f"class {label}" for label in range(count)]


def read_hmdb51(root, split):
    """Split 1 of the official lists; or the released list with its own labels.

    The two number some classes differently (sword and sword_exercise change places).
    """
    end = "_test_split1.txt"
    path = root.file("the HMDB51 page (test_train_splits.rar) or github.com/FingerRec/RHE",
                     f"testTrainMulti_7030_splits hmdb51_rgb_{SHOWN[split]}_split_1.txt")
    if path.is_file():
        root.classes = listed_classes(root, path, 51)
        for row in root.rows_of(path, *HMDB51_CLIPS):
            name, _, label = row.rsplit(maxsplit=2)
            name = Path(name).name
            yield label_row(name, root.clip(name), index(label, len(root.classes)))
        return
    root.classes = sorted(file.name.removesuffix(end) for file in path.glob(f"*{end}"))
    for label, folder in enumerate(root.classes):
        for row in root.rows_of(path / f"{folder}{end}", *HMDB51_CLIPS):
            name, use = row.rsplit(maxsplit=1)
            if ("unused", "train", "test")[index(use, 3)] == split:
                yield label_row(name, root.clip(f"{folder}/{name}", name), label)


def read_k400(root, split):
    """The csv, whose labels have numbers in alphabetical order; or the released lists "path label",
    whose paths may end in ".zip".

    A clip is <split>/<class>/<id>_<start>_<end> or <split>/<class>/<id>, with blanks or underscores
    in the class.
    """
    source = "github.com/activitynet/ActivityNet (Crawler/Kinetics/data) or the released code"
    table = "kinetics-400_train.csv train.csv"
    files = {"train": f"{table} k400_train_tsm.list kinetics_video_trainlist.txt",
             "test": "kinetics-400_val.csv validate.csv k400_test_tsm.list "
                     "kinetics_video_vallist.txt"}
    path = root.file(source, files[split])
    if path.suffix == ".csv":
        root.classes = sorted({row["label"] for row in root.rows(source, table)})
    elif not root.classes:
        root.classes = listed_classes(root, path, 400)
    for row in root.rows_of(path, SHOWN[split]):
        if isinstance(row, dict):
            label = row["label"]
            name = f"{label}/{row['youtube_id']}"
            timed = f"{name}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
            names = [timed, name, timed.replace(" ", "_"), name.replace(" ", "_")]
            yield label_row(Path(timed).name, root.clip(*names), root.classes.index(label))
        else:
            name, label = row.rsplit(maxsplit=1)
            name = "/".join(name.split("/")[-2:]).removesuffix(".zip")
            yield label_row(name, root.clip(name), index(label, len(root.classes)))


READERS = {
    "tgif-action": partial(read_tgif, kind="action"),
    "tgif-transition": partial(read_tgif, kind="transition"),
    "tgif-frame": partial(read_tgif, kind="frameqa"),
    "msrvtt-qa": read_msrvtt_qa,
    "msvd-qa": read_msvd_qa,
    "tvqa": read_tvqa,
    "msrvtt": read_msrvtt,
    "didemo": read_didemo,
    "activitynet": read_activitynet,
    "lsmdc": read_lsmdc,
    "msrvtt-mc": read_msrvtt_mc,
    "lsmdc-mc": read_lsmdc_mc,
    "ego4d-mc": read_ego4d_mc,
    "vcr": read_vcr,
    "webvid": read_webvid,
    "howto100m": read_howto100m,
    "cc3m": read_cc3m,
    "hmdb51": read_hmdb51,
    "k400": read_k400,
}
SPLITS = ("train", "val", "test")
GIVEN = {       # the splits that the owners give
    **dict.fromkeys(READERS, ("train", "test")),
    **dict.fromkeys(("msrvtt-qa", "msvd-qa", "didemo", "lsmdc", "lsmdc-mc"), SPLITS),
    "howto100m": ("train",),
}

# ---- your own file -------------------------------------------------------------------------------


def tidy(value):
    """All texts in a field without outer blanks and line breaks."""
    if isinstance(value, list):
        return list(map(tidy, value))
    return clean(value) if isinstance(value, str) and value else value


def read_own(root, path):
    """Yields ("split" or None, row). All rows are for one task."""
    ids = set()
    tasks = set()
    for row in root.rows_of(path):
        mark = row.pop("split", None)
        check_row(row)
        id = row.get("id", str(root.number))
        tasks.add(row_task(row))
        if mark not in (None, *SPLITS):
            raise ValueError(f"split {mark!r:.20} is not train, val or test")
        if id in ids:
            raise ValueError(f"another row has the id {id!r:.60}, too")
        if len(tasks) > 1:
            raise ValueError(f"the rows are for two tasks, {' and '.join(sorted(tasks))}")
        ids.add(id)
        video = os.path.normpath(row.pop("video"))
        found = root.find(video) or video
        if composed(found) != composed(video):          # the extension is another one
            found = video
        row = {"id": id, "video": found, **{name: tidy(value) for name, value in row.items()}}
        if row.get("question"):
            row.setdefault("question_type", first_words(row["question"]))
        yield mark, row


def train_tokenizer(folder):
    """Write tokenizer.json, a WordPiece of all texts in the folder's rows."""
    texts = []
    for row in itertools.chain(*map(jsonl_rows, folder.glob("*.jsonl"))):
        texts += [row.get("question", ""), row.get("caption", "")]
        texts += row.get("options", []) + row.get("captions", [])
    tokenizer = wordpiece({"[UNK]": 0})
    letters = set("".join(map(tokenizer.normalizer.normalize_str, texts))) - {" "}
    # The trainer numbers the pieces ##a, ##b, ... in random order, unless they are given.
    given = [*SPECIAL, *(f"##{letter}" for letter in sorted(letters))]
    trainer = WordPieceTrainer(min_frequency=2, special_tokens=given, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    wordpiece(tokenizer.get_vocab(with_added_tokens=False)).save(str(folder / "tokenizer.json"))


# ---- the manifest --------------------------------------------------------------------------------


def read_all(root, name):
    """Yields (split, row). The split is None in your own file for a row without mark. Whatever
    goes wrong with a row is a UserError that names it."""
    try:
        if name not in READERS:
            yield from read_own(root, Path(name))
        for split in GIVEN.get(name, ()):
            for row in READERS[name](root, split):
                yield split, row
    except UserError:
        raise
    except Exception as error:              # a foreign row can provoke any
        cause = f"missing {error}" if isinstance(error, KeyError) else str(error)[:300]
        place = f"{root.place}, row {root.number}".removesuffix(", row 0")
        raise UserError(f"{place}: {cause}") from None


def find_problems(root, clips, check):
    """{clip: "missing" or "unreadable"}. Opens the headers in all processes."""
    problems = {clip: "missing" for clip in clips if root.find(clip) != clip}
    found = sorted(clips - problems.keys()) if check else []
    with ProcessPoolExecutor(os.cpu_count(), None, signal.signal,
                             (signal.SIGINT, signal.SIG_IGN)) as pool:
        opened = pool.map(readable, map(root.path.joinpath, found), chunksize=32)
        for clip, good in zip(found, progress(opened, "opening clips", len(found))):
            if not good:
                problems[clip] = "unreadable"
    return problems


def twentieth(clip):
    """A number from 0 to 20, which depends on the clip's path without extension alone."""
    return zlib.crc32(stem(clip).encode()) * 20 / 2**32


def hold_out(clips, parts):
    """{clip: split} of those that leave train: for each of `parts` 5 % of the clips, by crc32. If
    that leaves a split empty, one clip for each of `parts`, those with the smallest crc32."""
    moved = {}
    for clip in clips:
        if twentieth(clip) < len(parts):
            moved[clip] = parts[int(twentieth(clip))]
    if set(moved.values()) != set(parts) or len(moved) == len(clips):
        moved = dict(zip(sorted(clips, key=twentieth)[:-1], parts))
    return moved


def write_rows(folder, rows, problems, moved):
    """Write the (split, row) pairs to folder/<split>.jsonl. Returns {split: Counter of answers}."""
    files = {split: open(folder / f"{split}.jsonl", "w", encoding="utf-8") for split in SPLITS}
    answers = {split: Counter() for split in SPLITS}
    encode = json.JSONEncoder(ensure_ascii=False).encode
    for split, row in progress(rows, "writing rows"):
        video = row["video"]
        if split in (None, "train"):
            if video in problems:
                continue
            split = moved.get(video, "train")
            if split != "train" and "captions" in row:
                row["caption"] = row.pop("captions")[0]
        files[split].write(encode(row) + "\n")
        answers[split][row.get("label", row.get("answer"))] += 1
    for split, file in files.items():
        file.close()
        if not answers[split]:
            os.unlink(file.name)
    return answers


def closed_list(root, counts, size):
    """The class names, or the `size` most frequent answers, equal ones in alphabetical order."""
    if root.classes:
        return [name.replace("_", " ") for name in root.classes]
    answers = [answer for answer in counts if isinstance(answer, str)]
    return sorted(answers, key=lambda answer: (-counts[answer], answer))[:size]


def report(split, clips, problems, counts, official, answers, say):
    """Print what is known of a split. Returns it as a dict."""
    rows = counts.total()
    fate = Counter(found=0, missing=0, unreadable=0)
    fate.update(problems.get(clip, "found") for clip in clips)
    say(f"{split:5} {rows:>11} {official:>10} {len(clips):>9} {fate['found']:>9} "
        f"{fate['missing']:>9} {fate['unreadable']:>11}")
    if answers and rows:
        answer, count = counts.most_common(1)[0]
        if isinstance(answer, int):
            answer = answers[answer]
        else:
            covered = sum(counts[answer] for answer in answers)
            say(f"      {covered / rows:.1%} of the answers are in answers.txt")
        say(f"      majority answer: {printable(answer)} ({count / rows:.1%})")
    return {"rows": rows, "clips": len(clips), **fate}


def fill(folder, name, root, check, say):
    """Write all files of the manifest folder. Returns the task of its rows, and the splits that
    lack more clips than they may: 1 % of train, none of val and test."""
    own = root is None
    root = DataRoot(Path(name).parent if own else root)
    clips = {split: set() for split in SPLITS}
    marks = set(GIVEN.get(name, ()))
    for split, row in progress(read_all(root, name), "reading rows"):
        marks.add(split)
        clips[split or "train"].add(row["video"])
    for reason, count in root.left_out.items():
        say(f"left out: {count} {reason}")
    for split in ("train", *marks - {None}):
        if not clips[split]:
            raise UserError(f"{name}: there are no rows for {split}")
    parts = () if "val" in marks else ("val",)
    if marks == {None}:
        parts = ("val", "test")
    say(f"made from train: {' and '.join(parts) or 'nothing'}")
    problems = find_problems(root, set().union(*clips.values()), check)
    moved = hold_out(clips["train"] - problems.keys(), parts)
    counts = write_rows(folder, read_all(root, name), problems, moved)
    clips["train"] -= moved.keys()
    for clip, split in moved.items():
        clips[split].add(clip)

    answers = closed_list(root, counts["train"], None if own else BENCHMARKS[name].answers)
    if answers:
        (folder / "answers.txt").write_text("\n".join(answers) + "\n", encoding="utf-8")
    if (root.path / "tokenizer.json").exists():
        shutil.copy(root.path / "tokenizer.json", folder)
        say(f"tokenizer: copied from {root.path}")
    elif own:
        train_tokenizer(folder)
    if not check:
        say("clips were not opened (--no-check): unreadable ones count as found")
    say("split        rows   official     clips     found   missing  unreadable")
    info = {} if own else {"benchmark": name}
    info.update(root=str(root.path), prepared={})
    failed = []
    with open(folder / "missing.txt", "w", encoding="utf-8") as file:
        for split in filter(clips.get, SPLITS):
            official = "" if own else BENCHMARKS[name].rows.get(split, "")
            info["prepared"][split] = report(split, clips[split], problems, counts[split],
                                             official, answers, say)
            bad = sorted(clips[split] & problems.keys())
            file.writelines(f"{split}\t{clip}\t{problems[clip]}\n" for clip in bad)
            if len(bad) > (len(clips[split]) / 100 if split == "train" else 0):
                failed.append(f"{len(bad)} of {len(clips[split])} clips of {split}")
    (folder / "dataset.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return row_task(row), failed


def prepare(name, root, out, allow_missing=False, check=True, say=print):
    """Write the manifest folder `out`, whole or not at all.

    name: a benchmark, whose owners' files are below `root`; or a .jsonl file of your own, with
    root None. allow_missing: go on whatever clips are missing or unreadable. check: open the
    header of every clip. Raises UserError.
    """
    out = Path(out)
    part = out.parent / f".{out.name}-{os.getpid()}.part"
    try:
        if out.exists() and os.listdir(out) != ["missing.txt"]:
            written = "delete it, or " if (out / "dataset.json").exists() else ""
            raise UserError(f"{out} exists: {written}choose another --out")
        part.mkdir(parents=True)
        lock = lock_folder(part)    # noqa: F841        held until the end of this function
        for left in out.parent.glob(f".{out.name}-*.part"):
            with suppress(UserError, OSError):          # a process is at work in it
                lock_folder(left)
                shutil.rmtree(left)
        task, failed = fill(part, name, root, check, say)
        if failed and not allow_missing:
            out.mkdir(exist_ok=True)
            shutil.copy(part / "missing.txt", out)
            raise UserError(f"{', '.join(failed)} are missing or unreadable, as {out}/missing.txt "
                            "lists; --allow-missing goes on anyway")
        if not (part / "train.jsonl").exists():
            raise UserError(f"{name}: no training row has a clip")
        (out / "missing.txt").unlink(missing_ok=True)
        if (part / "missing.txt").stat().st_size == 0:
            (part / "missing.txt").unlink()
        part.rename(out)
        (out / ".lock").unlink()
    except (OSError, UnicodeError, BrokenExecutor) as error:
        raise UserError(f"{out} cannot be made: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    start = "--init base.pt" if root else f"--task {task}"
    say(f"next: python train.py --data {shlex.quote(str(out))} {start}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"{', '.join(READERS)}, or a .jsonl file of your own")
    parser.add_argument("root", nargs="?", help="the folder of the benchmark's owners' files")
    parser.add_argument("--out", help="the folder to write (default data/NAME)")
    parser.add_argument("--allow-missing", action="store_true",
                        help="go on if clips are missing or unreadable")
    parser.add_argument("--no-check", action="store_true", help="do not open the clips")
    args = parser.parse_args()
    own = args.name.endswith(".jsonl") and not args.root
    if own and not os.path.isfile(args.name):
        raise UserError(f"{args.name}: there is no such file")
    if not own and not (args.name in READERS and args.root):
        raise UserError(f"{args.name}: give a benchmark and the folder of its owners' files, or a "
                        "file of your own whose name ends in .jsonl, with one JSON object a line; "
                        f"the benchmarks are {', '.join(READERS)}")
    prepare(args.name, args.root, args.out or f"data/{Path(args.name).stem}",
            args.allow_missing, not args.no_check)


if __name__ == "__main__":
    run_main("prepare.py", main)
