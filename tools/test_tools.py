"""Tests of the tools and the lab: prepare, toy, weights, report, search, plots, bench, lab."""
import base64
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import time
import unicodedata
import zipfile
import zlib
from argparse import Namespace
from collections import Counter, defaultdict
from contextlib import chdir, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend
from torch.utils.flop_counter import FlopCounterMode

MAIN = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(MAIN))
from allinone import (AllInOne, build_model, Config, init_narrow, load_checkpoint, load_weights,
                      load_model, save_checkpoint, SIZES)
from data import (BENCHMARKS, manifest_info, pick_frames, read_answers, read_frames,
                  SPECIAL, Tokenizer, wordpiece)
from eval import EvalSettings
from rolling import roll_groups, roll_loop
from test_allinone import Bomb, cases, one_line, read_rows, shared, table
from tools import bench, prepare as tool, random_order, report, search, toy, weights
from tools.prepare import DataRoot, GIVEN, hold_out, prepare, read_all, READERS, stem
from tools.toy import encode_picture, make_clip, make_toy
from tools.weights import convert, our_name

GIF = bytes.fromhex("47494638396101000100800000000000ffffff2c000000000100010000020244010"
                    "03b")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path):
    """Every test runs in an empty folder of its own: relative paths lead there."""
    with chdir(tmp_path):
        yield


@pytest.fixture
def command(monkeypatch, capsys):
    """command(main, *words): what a tool prints that is called with these words."""
    def call(main, *words):
        monkeypatch.setattr(sys, "argv", ["tool.py", *map(str, words)])
        main()
        return capsys.readouterr().out

    return call


def write(files):
    """Write {name: text, bytes, or rows}: a list as an array or as JSON lines."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl") and isinstance(content, list):
            content = "\n".join(map(json.dumps, content))
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(name, split):
    """The rows of one split alone."""
    with mock.patch.dict(GIVEN, {name: (split,)}):
        return [row for _, row in read_all(DataRoot("."), name)]


def pick(rows, *fields):
    """Some fields of each row."""
    return [tuple(map(row.get, fields)) for row in rows]


def make(name, allow_missing=True, check=False):
    """Write out/. Returns ({split: rows}, the printed lines)."""
    said = []
    prepare(name, "." if name in READERS else None, "out", allow_missing, check, said.append)
    return {path.stem: read_rows(path) for path in Path("out").glob("*.jsonl")}, said


# ---- the owners' files ---------------------------------------------------------------------------

# In the tables below, these words stand for the begin of a good row, and for other long texts.
WORDS = {
    "TVQA": '{"a0": "a", "a1": "b", "a2": "c", "a3": "d", "a4": "e ", "answer_idx": 4, "qid": 7,'
            '"q": "What is held?", "ts": "1.21-8.49", "vid_name": "met_s06e22_seg01_clip_02"',
    "VCR": '{"objects": ["person", "car", "person"], "question": ["Does", [2], "drive", "?"],'
           '"answer_choices": [["No"], [[0, 2], "drive"], ["Yes"], ["Maybe"]], "answer_label": 1,'
           '"rationale_choices": [["The", [1], "moves"], ["a"], ["b"], ["c"]],'
           '"rationale_label": 0, "img_fn": "m/a@0.jpg", "metadata_fn": "m/a@0.json",'
           '"annot_id": "val-1"',
    "META": '{"width": 200, "height": 100,'
            '"boxes": [[0, 0, 50, 100, 0.9], [-9, 0, 900, 50, 0.8], [100, 50, 150, 100, 0.7]]}',
    "QA": '{"answer": "a", "id": 1, "question": "who?", "video_id": "video1"',
    "LSMDC": "3011_BLIND_DATING_01.11.23.496-01.11.25.853\t0\t0\t0\t0",
    "K400": "label,youtube_id,time_start,time_end,split,is_cc",
    "DEEP": "[" * 10**5
}


def file_content(text):
    r"""The bytes of a file in a table, where \n and \xff are spelled out."""
    for word, meaning in WORDS.items():
        text = text.replace(word, meaning)
    return text.encode("latin-1").decode("unicode_escape").encode("latin-1")


# benchmark: behaviour; then file | content; then split | its rows, with the fields that matter.
# classes | how the list of classes begins. left out | how many rows are. A line may go on below.
ROWS = r'''
tgif-action: csv with tabs, CRLF, doubled quotes and a BOM; vid_id is the id of the question
Train_action_question.csv | \xef\xbb\xbfgif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\r\n
    | tumblr_a\tWhat does it do ?\tnod\t"say ""hi"""\tjump\trun\tsit\t4\tACTION4\r\n
train | {"id": "ACTION4", "video": "gifs/tumblr_a", "question": "What does it do ?", "answer": 4,
    | "options": ["nod", "say \"hi\"", "jump", "run", "sit"], "question_type": "what does"}

tgif-action: ClipBERT's jsonl numbers its rows
tgif_qa/action_test.jsonl | {"gif_name": "tumblr_a", "question": "What is it ?", "answer": 0,
    | "options": ["nod", "jump", "run", "sit", "say"]}
test | {"id": "1", "video": "gifs/tumblr_a", "question": "What is it ?", "answer": 0,
    | "options": ["nod", "jump", "run", "sit", "say"], "question_type": "what is"}

tgif-frame: types are numbers or words
Test_frameqa_question.csv | gif_name\tquestion\tanswer\ttype\tvid_id\n
    | g\twhere ?\tsea\t0\tF0\ng\twhere ?\tsea\t1\tF1\n
    | g\twhere ?\tsea\t2\tF2\ng\twhere ?\tsea\t3\tF3\n
test | {"question_type": "object"}, {"question_type": "number"}, {"question_type": "color"},
    | {"question_type": "location", "id": "F3", "video": "gifs/g", "answer": "sea"}
frameqa_train.jsonl | {"gif_name": "g", "question": "?", "answer": "man", "answer_type": "location"}
train | {"question_type": "location"}

msrvtt-qa: videos are numbered or named
val_qa.json | [{"answer": "coversation", "id": 8582, "question": "what is it?", "video_id": 6513}]
val | {"id": "8582", "video": "videos/all/video6513", "question": "what is it?",
    | "answer": "coversation", "question_type": "what is"}
msrvtt_qa/train.jsonl | {"answer": "couch", "question": "who?", "video_id": "video6513"}
train | {"id": "1", "video": "videos/all/video6513"}

msvd-qa: numbers are mapped to files, whose names begin with "-" and hold "_", or are the files
youtube_mapping.txt | -4ws_5_15 vid1\n-7K_Z_205_208 vid2
YouTubeClips/vid1.avi |
test_qa.json | [{"answer": "man", "id": 0, "question": "who?", "video_id": 2},
    | {"answer": "man", "id": 1, "question": "who?", "video_id": 1}]
test | {"video": "YouTubeClips/-7K_Z_205_208"}, {"video": "YouTubeClips/vid1.avi"}

tvqa: NaN-NaN is the whole clip, zero length one frame, second 0 file 1; no prefix is bbt
tvqa_val.jsonl | TVQA}\nTVQA, "ts": "NaN-NaN", "vid_name": "s03e21_clip_08"}\n
    | TVQA, "ts": "19.18-19.18"}\nTVQA, "ts": "0-0"}
test | {"video": "frames_hq/met_frames/met_s06e22_seg01_clip_02", "frames": [2, 24], "answer": 4,
    | "options": ["a", "b", "c", "d", "e"]},
    | {"video": "frames_hq/bbt_frames/s03e21_clip_08", "frames": null},
    | {"frames": [56, 56]}, {"frames": [0, 0]}

vcr: tokens count objects from 0, numbers follow first mention, QA->R has the answer, boxes are cut
vcr1annots/val.jsonl | VCR}
vcr1images/m/a@0.json | META
vcr1images/m/a@0.jpg |
test | {"id": "val-1/qa", "question_type": "Q->A", "question": "Does person 0 drive ?", "answer": 1,
    | "options": ["No", "person 1 person 0 drive", "Yes", "Maybe"],
    | "video": "vcr1images/m/a@0.jpg",
    | "boxes": [[0.5, 0.5, 0.75, 1], [0, 0, 0.25, 1], [0, 0, 1, 0.5]]},
    | {"id": "val-1/qar", "question_type": "QA->R", "answer": 0,
    | "question": "Does person 0 drive ? person 1 person 0 drive",
    | "options": ["The car 2 moves", "a", "b", "c"],
    | "video": "vcr1images/m/a@0.jpg",
    | "boxes": [[0.5, 0.5, 0.75, 1], [0, 0, 0.25, 1], [0, 0, 1, 0.5]]}

msrvtt: 1k-A trains on all other clips
MSRVTT_data.json | {"sentences": [{"video_id": "video0", "caption": "see 0"},
    | {"video_id": "video9770", "caption": "see 9770"}, {"video_id": "video7", "caption": "see 7"},
    | {"video_id": "video0", "caption": "hear 0"}]}
annotations/MSRVTT_JSFUSION_test.csv | key,vid_key,video_id,sentence\nret0,msr9770,video9770,a man
test | {"id": "ret0", "video": "videos/all/video9770", "caption": "a man"}
train | {"video": "videos/all/video0", "captions": ["see 0", "hear 0"]},
    | {"video": "videos/all/video7", "captions": ["see 7"]}

msrvtt: the release has two files
train_val_videodatainfo.json | {"sentences": [{"video_id": "video0", "caption": "see 0"}]}
test_videodatainfo.json | {"sentences": [{"video_id": "video9770", "caption": "see 9770"},
    | {"video_id": "video7", "caption": "see 7"}]}
MSRVTT_JSFUSION_test.csv | key,vid_key,video_id,sentence\nret0,msr9770,video9770,a man
train | {"video": "videos/all/video0"}, {"video": "videos/all/video7"}

msrvtt: Frozen in Time has other names
annotation/MSR_VTT.json | {"annotations": [{"image_id": "video9770", "caption": "see 9770"},
    | {"image_id": "video7", "caption": "see 7"}]}
MSRVTT_JSFUSION_test.csv | key,vid_key,video_id,sentence\nret0,msr9770,video9770,a man
train | {"video": "videos/all/video7", "captions": ["see 7"]}

msrvtt: ClipBERT has its own lists
msrvtt_retrieval/train.jsonl | {"caption": "a cartoon", "clip_name": "video2960"}
msrvtt_retrieval/test.jsonl | {"caption": "a", "clip_name": "video9770", "retrieval_key": "ret0"}
train | {"id": "video2960/1", "video": "videos/all/video2960"}
test | {"id": "ret0", "video": "videos/all/video9770"}

msrvtt-mc: ClipBERT's questions have no text
msrvtt_retrieval_mc/msrvtt_retrieval_mc_test.jsonl | {"clip_name": "video9", "answer": 3,
    | "options": ["a", "b", "c", "d", "e"]}
test | {"id": "1", "video": "videos/all/video9", "question": "", "answer": 3,
    | "options": ["a", "b", "c", "d", "e"]}

didemo: a clip under two extensions is one paragraph in file order; a bare dot ends a name
val_data.json | [{"video": "1@N0_a.mov", "description": "one."},
    | {"video": "2@N1_b.", "description": "x"}, {"video": "1@N0_a.", "description": "two"}]
videos/1@N0_a.mp4 |
val | {"id": "1@N0_a", "video": "videos/1@N0_a.mp4", "caption": "one. two"},
    | {"id": "2@N1_b", "video": "video/2@N1_b", "caption": "x"}

activitynet: sentences become a paragraph
val_1.json | {"v_a": {"sentences": ["A pi\xc3\xb1ata.", "  The coach helps."]}}
test | {"id": "v_a", "video": "videos/v_a", "caption": "A pi\u00f1ata. The coach helps."}

activitynet: ClipBERT has paragraphs
anet_retrieval/train.jsonl | {"clip_name": "v_a", "caption": "A coach helps."}
train | {"id": "v_a", "video": "videos/v_a", "caption": "A coach helps."}

lsmdc: the caption is the sixth column, quotes are text, clips lie in folders; train has a row each
LSMDC16_annos_training.csv | LSMDC\t"SOMEONE waits.\nLSMDC\tHe "nods"\n
LSMDC16_challenge_1000_publictect.csv | LSMDC\t"SOMEONE waits.\nLSMDC\tHe "nods"\n
avi/3011_BLIND_DATING/3011_BLIND_DATING_01.11.23.496-01.11.25.853.avi |
test | {"video": "avi/3011_BLIND_DATING/3011_BLIND_DATING_01.11.23.496-01.11.25.853.avi",
    | "caption": "\"SOMEONE waits."}, {"caption": "He \"nods\""}
train | {"captions": ["\"SOMEONE waits.", "He \"nods\""]}

lsmdc-mc: the test counts answers from 1
LSMDC16_multiple_choice_test_randomized.csv | LSMDC\ta\tb\tc\td\te\t5\n
test | {"options": ["a", "b", "c", "d", "e"], "answer": 4}

ego4d-mc: Python literals in cells, the last of equal options, 120 frames around the narrated one
mc_val.csv | question,answers\n"('uid', 30, 'x', '#C opens')",
    | "[('u', 'a'), ('u', '#C opens'), ('u', '#C opens'), ('u', 'b'), ('u', 'c')]"\n
test | {"video": "videos/uid", "options": ["a", "#C opens", "#C opens", "b"], "answer": 2,
    | "frames": [0, 89]}

webvid: captions of several lines, doubled quotes, bare CR as a blank; the tsv has no header
results_2M_train.csv | videoid,page_dir,name\n1,01,"a ""b""\nc, d"\n2,01,a\rcat\n
webvid_validation_success_full.tsv | "first\nline"\t01_02/7\r\nb\t01_02/8\r\n
train | {"id": "1", "video": "videos/01/1", "caption": "a \"b\" c, d"},
    | {"id": "2", "video": "videos/01/2", "caption": "a cat"}
test | {"video": "videos/01_02/7", "caption": "first line"},
    | {"video": "videos/01_02/8", "caption": "b"}

webvid: blank rows are left out
results_2M_train.csv | videoid,page_dir,name\n1,01,a\n2,01,\n3,NaN,x\n4,01,nan\n
train | {"caption": "a"}
left out | 3

cc3m: pictures are named by the crc32 of their url, quotes are text; the released tsv has paths
Train_GCC-training.tsv | "a" quote\thttp://x/y.jpg\n
cc3m_validation_success_full.tsv | b\t00/1.jpg\n
train | {"video": "training/3945302316", "caption": "\"a\" quote"}
test | {"video": "validation/00/1"}

cc3m: pictures of two urls with one crc32 are left out; two captions of one url are no fault
Train_GCC-training.tsv | c\thttp://x/plumless\nc\thttp://x/buckeroo\n
    | c\thttp://x/same\nd\thttp://x/same\n
train | {"id": "http://x/same", "caption": "c"}, {"id": "http://x/same", "caption": "d"}
left out | 2

cc3m: blank rows are left out
Train_GCC-training.tsv | NaN\thttp://a\n \thttp://c\nb\thttp://b\nNaN\tx\n
train | {"caption": "b"}
left out | 3

howto100m: narrations are stretched to 4 s, not below 0; silent and repeated videos are passed over
HowTo100M_v1.csv | video_id,rank\n-t.C,1\nzz,1\n-t.C,1\n
howto100m_captions/-t.C.csv | start,end,text\n0.4,2.4,check pic\n10,16,pick\n
train | {"id": "videos/-t.C/2", "video": "videos/-t.C", "caption": "check pic",
    | "seconds": [0, 3.4]}, {"id": "videos/-t.C/3", "caption": "pick", "seconds": [10, 16]}

howto100m: the released list has paths; blank and backward narrations are left out
ht100_videos_split.csv | Name\tx\nfood/v.mp4\t1\n
howto100m_csv/v.csv | start,end,text\n1,2,NaN\n3,1,x\n1,2,\n1,2,y\n
train | {"video": "videos/food/v", "caption": "y"}
left out | 3

hmdb51: classes in alphabetical order, 1 is train, 2 test, 0 none; brackets in names
testTrainMulti_7030_splits/sword_exercise_test_split1.txt | it's_[b].avi 1 \nb2.avi 2 \nb3.avi 0\n
testTrainMulti_7030_splits/sword_test_split1.txt | it's_[a]_(b)!&,_0.avi 1 \na2.avi 2 \na3.avi 0\n
sword/it's_[a]_(b)!&,_0.avi |
classes | ["sword", "sword_exercise"]
train | {"id": "it's_[a]_(b)!&,_0.avi", "label": 0, "video": "sword/it's_[a]_(b)!&,_0.avi"},
    | {"id": "it's_[b].avi", "label": 1, "video": "hmdb51/sword_exercise/it's_[b]"}
test | {"id": "a2.avi", "label": 0}, {"id": "b2.avi", "label": 1}

hmdb51: labels of the released list count from 0, those of classInd from 1
hmdb51_classInd.txt | 1 brush_hair\n2 fallFloor\n
hmdb51_rgb_val_split_1.txt | /home/hmdb51/a_[1] 47 1\n
classes | ["brush_hair", "fallFloor"]
test | {"id": "a_[1]", "video": "hmdb51/a_[1]", "label": 1}

k400: the csv counts the labels of train; names with or without times, with blanks or underscores
kinetics-400_train.csv | K400\nzumba,z,1,11,train,0\nair drumming,a,7,17,train,0\n
kinetics-400_val.csv | K400\nzumba,y,417,427,val,0\nair drumming,x,0,10,val,0\n
val/air_drumming/x.mp4 |
classes | ["air drumming", "zumba"]
train | {"video": "train/zumba/z_000001_000011", "label": 1},
    | {"video": "train/air drumming/a_000007_000017", "label": 0}
test | {"video": "val/zumba/y_000417_000427", "label": 1},
    | {"video": "val/air_drumming/x.mp4", "label": 0}

k400: released lists name zips; without a label map the classes are numbers
k400_train_tsm.list | /zips/snow_boarding/M_000129_000139.zip\t332\n
    | /zips/abseiling/N_000129_000139.zip\t0\n
kinetics_video_vallist.txt | /val_256/abseiling/0wR5jVB-WPk.mp4 0\n
train/abseiling/N_000129_000139.mp4 |
classes | ["class 0", "class 1"]
train | {"video": "train/snow_boarding/M_000129_000139", "label": 332},
    | {"video": "train/abseiling/N_000129_000139.mp4", "label": 0}
test | {"id": "abseiling/0wR5jVB-WPk.mp4", "video": "val/abseiling/0wR5jVB-WPk", "label": 0}

k400: a label map next to the list names the classes
k400_test_tsm.list | a/zumba/w.zip 1\n
kinetics_label_map.txt | air_drumming\nzumba\n
classes | ["air_drumming", "zumba"]
test | {"video": "val/zumba/w", "label": 1}
'''


@pytest.mark.parametrize("case", ROWS.strip().split("\n\n"),
                         ids=lambda case: case.splitlines()[0])
def test_owners_files_give_these_rows(case):
    title, *lines = case.splitlines()
    parts = defaultdict(str)
    place = ""
    for line in lines:
        start, _, text = line.partition("|")
        place = start.strip() or place                      # without a start the line goes on
        parts[place] += text.strip()
    left_out = int(parts.pop("left out", 0))
    classes = json.loads(parts.pop("classes", "[]"))
    files = parts.keys() - tool.SPLITS
    write({file: file_content(parts[file]) for file in files})
    root = DataRoot(".")
    for split in filter(parts.get, tool.SPLITS):
        expected = json.loads(f"[{parts[split]}]")
        rows = list(READERS[title.split(":")[0]](root, split))
        assert len(rows) == len(expected)
        for row, fields in zip(rows, expected):
            assert {name: row.get(name) for name in fields} == fields
        assert root.classes[:len(classes)] == classes
    assert root.left_out.total() == left_out


def test_vcr_metadata_is_parsed_once_per_picture():
    write({"val.jsonl": file_content(r"VCR}\n" * 9), "vcr1images/m/a@0.json": WORDS["META"]})
    with mock.patch.object(Path, "read_text", autospec=True, side_effect=Path.read_text) as parse:
        assert len(read("vcr", "test")) == 18
    assert parse.call_count == 1


def captions(*numbers):
    """Two captions of each video, in the form of MSRVTT."""
    pairs = [(n, word) for n in numbers for word in ("see", "hear")]
    return {"sentences": [{"video_id": f"video{n}", "caption": f"{word} {n}"} for n, word in pairs]}


def test_msrvtt_mc_draws_its_training_options():
    """A clip's caption and four of other clips, at places that vary, the same every time."""
    write({"msrvtt_mc_test.jsonl": [{"clip_name": "video9", "options": list("abcde"), "answer": 3}],
           "MSRVTT_data.json": captions(*range(10))})
    train = read("msrvtt-mc", "train")
    assert len(train) == 18 and train == read("msrvtt-mc", "train")
    assert len({row["answer"] for row in train}) > 1
    for row in train:
        own = [option.endswith(row["video"][-1]) for option in row["options"]]
        assert len(set(row["options"])) == 5 and sum(own) == 1 and own[row["answer"]]
        assert "see 9" not in row["options"]


def test_lsmdc_mc_moves_the_right_sentence_to_all_places():
    """It comes first in the file."""
    write({"LSMDC16_multiple_choice_train.csv": file_content(r"LSMDC\tright\tb\tc\td\te\n" * 20)})
    rows = read("lsmdc-mc", "train")
    assert {row["options"][row["answer"]] for row in rows} == {"right"}
    assert {row["answer"] for row in rows} == {0, 1, 2, 3, 4}


def test_ego4d_mc_trains_on_narrations():
    lines = [f"uid{n}\t0\t0\t999\t0\t{100 * n}\tnarration {n}\n" for n in range(5)]
    write({"ego4d_train_subset.csv": "".join(lines)})
    row = read("ego4d-mc", "train")[4]
    assert row["frames"] == [340, 459] and row["options"][row["answer"]] == "narration 4"


def test_howto100m_is_streamed():
    """A row comes before the next file is opened."""
    write({"HowTo100M_v1.csv": "video_id\na\nb\n", "howto100m_captions/b.csv": b"\xff",
           "howto100m_captions/a.csv": "start,end,text\n1,2,x\n"})
    assert next(read_all(DataRoot("."), "howto100m"))[1]["caption"] == "x"


# ---- errors in the owners' files -----------------------------------------------------------------

# benchmark, split, file | content | error
BAD_ROWS = r"""
msrvtt-qa train msrvtt_qa_train.jsonl | QA}\n\xff\n | row 2: 'utf-8' codec
msrvtt-qa train msrvtt_qa_train.jsonl | QA}\n\n{ | row 3: Expecting
msrvtt-qa train msrvtt_qa_train.jsonl | QA}\n[] | row 2: expected a JSON object, found
msrvtt-qa train msrvtt_qa_train.jsonl | null | row 1: expected a JSON object, found None
msrvtt-qa train msrvtt_qa_train.jsonl | DEEP | row 1: maximum recursion
msrvtt-qa train train_qa.json | DEEP | maximum recursion
msrvtt-qa train train_qa.json | [\xff] | 'utf-8' codec
msrvtt-qa train train_qa.json | 7 | 'int' object
msrvtt-qa train train_qa.json | {"train": []} | expected a JSON object, found
msrvtt-qa train train_qa.json | [QA}, QA, "video_id": "../x"}] | row 2: '../x' is no path
msrvtt-qa train train_qa.json | [QA, "video_id": "/etc/x"}] | row 1: '/etc/x' is no path
msrvtt-qa train train_qa.json | [QA, "video_id": ""}] | row 1: '' is no path
msrvtt-qa train train_qa.json | [QA, "answer": ["a", "b"]}] | row 1: .* is no text
msrvtt-qa train train_qa.json | [QA, "question": "\\ud800"}] | row 1: 'utf-8' codec can't encode
msrvtt-qa train train_qa.json | [{"id": 1}] | row 1: missing 'video_id'
msvd-qa train train_qa.json | [QA, "video_id": 7}] | row 1: missing 'vid7'
tgif-action train Train_action_question.csv | a\tb\n1\t2\t3 | row 2: 3 columns where the header
tgif-action train Train_action_question.csv | a\tb\n1\t"2 | row 2: unexpected end of data
tvqa train tvqa_train.jsonl | TVQA}\nTVQA, "ts": "NaN-3"} | row 2: nan to 3.0 is no span
tvqa train tvqa_train.jsonl | TVQA, "ts": "9-3"} | row 1: 9.0 to 3.0 is no span
tvqa train tvqa_train.jsonl | TVQA, "ts": "9-inf"} | row 1: 9.0 to inf is no span
tvqa train tvqa_train.jsonl | TVQA, "answer_idx": true} | row 1: .*'True'
tvqa train tvqa_train.jsonl | TVQA, "answer_idx": 5} | row 1: 5 is no number from 0 to 4
tvqa train tvqa_train.jsonl | TVQA, "a3": " "} | row 1: ' ' is no text
tvqa train tvqa_train.jsonl | TVQA, "vid_name": "lost_s01"} | row 1: 'lost_s01' is of no known show
vcr train train.jsonl | VCR, "question": [[3]]} | row 1: 3 is no number from 0 to 2
vcr train train.jsonl | VCR, "question": [[-1]]} | row 1: -1 is no number from 0 to 2
vcr train train.jsonl | VCR, "answer_choices": [["a"], ["b"]]} | row 1: .* is no list of 4 options
vcr train train.jsonl | VCR, "metadata_fn": "../../x.json"} | row 1: '../../x.json' is no path
vcr train train.jsonl | VCR, "metadata_fn": "none.json"} | row 1: .*No such file
vcr train train.jsonl | VCR, "objects": ["a", "b", "c", "d"]} | row 1: m/a@0.json has not a box
didemo val val_data.json | [{"video": "a", "description": "NaN"}] | row 1: 'NaN' is no caption
activitynet train train.json | {"v_a": {"sentences": []}} | row 1: '' is no text
lsmdc test LSMDC16_challenge_1000_publictect.csv | a\t0\t0\t0\t0 | row 1: not enough values
lsmdc-mc test LSMDC16_multiple_choice_test_randomized.csv | LSMDC\t\t\t\t\t\t0 | row 1: .* from 1
lsmdc-mc test LSMDC16_multiple_choice_test_randomized.csv | LSMDC\t\t\t\t\te | row 1: .*'e'
ego4d-mc test mc_val.csv | question,answers\n"DEEP",x | row 2:
ego4d-mc test mc_val.csv | question,answers\n"__import__('os').getpid()",x | row 2: malformed node
ego4d-mc test mc_val.csv | question,answers\n"('u', 1, 'no')","['a', 'b', 'c']" | row 2: 'no' is
hmdb51 test hmdb51_rgb_val_split_1.txt | a 3 51\n | row 1: '51' is no number from 0 to 50
howto100m train howto100m_captions/v.csv | start,end,text\nx,2,y\n | row 2: could not convert
webvid test webvid_validation_success_full.tsv | ok\t1/2\n"no\t1/2\n | row 2: unexpected end of data
"""


@cases("case", BAD_ROWS.strip().splitlines())
def test_a_bad_row_is_one_line_with_file_and_row(case):
    where, content, message = case.split(" | ")
    name, split, file = where.split()
    write({"youtube_mapping.txt": "a vid1", "vcr1images/m/a@0.json": WORDS["META"],
           "HowTo100M_v1.csv": "video_id\nv\n", file: file_content(content)})
    with one_line(rf"{file}\W+{message}") as error:
        read(name, split)
    assert len(str(error.value)) < 500


@cases("name", READERS)
def test_missing_annotations_name_the_files_that_would_do(name):
    for split in GIVEN[name]:
        with one_line(r"no annotations in .*: expected \S+.*; from \S+"):
            read(name, split)


@cases("name, file, message", """
msrvtt | annotation/MSR_VTT.json | MSRVTT_JSFUSION_test.csv .*pkl, which is not opened
k400   | kinetics-400_val.csv    | expected kinetics-400_train.csv
""")
def test_a_second_file_is_asked_for(name, file, message):
    write({file: ""})
    with one_line(message):
        read(name, "test")


def test_every_benchmark_has_a_reader():
    assert list(READERS) == list(BENCHMARKS) == list(GIVEN)


# ---- media ---------------------------------------------------------------------------------------


def test_clips_are_found_by_name_and_by_stem():
    """Dots, @ and brackets belong to names; mp4 before others; a folder of pictures is a clip."""
    found = dict(table("""
        v_1                    | v_1.mp4.webm
        1006_Slum_00.25.49.077 | 1006_Slum_00.25.49.077.avi
        a@0                    | a@0.JPG
        b[1]*?                 | b[1]*?.gif
        c                      | c.mp4
        c.mkv                  | c.mkv
        c.avi                  | c.mp4
        """))
    write(dict.fromkeys([*found.values(), "a@0.json", "folder/00001.jpg"], ""))
    root = DataRoot(".")
    assert {name: root.find(name) for name in found} == found
    assert root.find("folder") == "folder"
    assert root.find("none") is None and root.find("c/x") is None


@cases("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_all_forms_of_unicode(forms):
    on_disk, asked = (unicodedata.normalize(form, "\u00e9t\u00e9/caf\u00e9") for form in forms)
    write({f"{on_disk}.mp4": ""})
    assert DataRoot(".").find(asked) == f"{on_disk}.mp4"


def test_links_may_lead_out_of_the_root():
    write({"elsewhere/a.mp4": "", "data/x": ""})
    os.symlink("../elsewhere", "data/videos")
    assert DataRoot("data").find("videos/a") == "videos/a.mp4"


def test_each_folder_is_listed_once():
    write({"videos/01/a.mp4": "", "results_2M_train.csv": "videoid,page_dir,name\n1,01,x\n2,01,x"})
    with mock.patch.object(os, "listdir", side_effect=os.listdir) as listdir:
        read("webvid", "train")
    assert listdir.call_count == 2          # the root (for a folder train/01) and videos/01


# ---- the manifest folder -------------------------------------------------------------------------

QUESTION = {"answer": "a", "id": 1, "question": "who?"}


def write_msrvtt_qa(clips, suffix=".gif", content=GIF):
    """MSRVTT-QA with a question for each training clip, and one clip in val and in test."""
    rows = [{**QUESTION, "id": n, "video_id": n, "answer": "bca"[n % 4 % 3]} for n in range(clips)]
    write({"train_qa.json": rows, "val_qa.json": [{**QUESTION, "video_id": 7000}],
           "test_qa.json": [{**QUESTION, "video_id": 8000, "answer": "never"}]})
    write({f"videos/all/video{n}{suffix}": content for n in [*range(clips), 7000, 8000]})


def test_a_manifest_folder():
    write_msrvtt_qa(8)
    rows, said = make("msrvtt-qa", allow_missing=False, check=True)
    assert [len(rows[split]) for split in ("train", "val", "test")] == [8, 1, 1]
    assert json.dumps(rows["train"][0]) == (
        '{"id": "0", "video": "videos/all/video0.gif", "question": "who?", "answer": "b", '
        '"question_type": "who?"}')
    assert Path("out/answers.txt").read_text() == "b\na\nc\n"
    info = manifest_info("out")
    assert (info["benchmark"], info["root"]) == ("msrvtt-qa", os.getcwd())
    assert info["prepared"]["train"] == {
        "rows": 8, "clips": 8, "found": 8, "missing": 0, "unreadable": 0}
    text = "\n".join(said)
    for part in ("158581", "majority answer: b (50.0%)", "0.0% of the answers are in answers.txt"):
        assert part in text
    assert said[-1] == "next: python train.py --data out --init base.pt"


def test_the_closed_list_has_the_most_frequent_answers_or_the_classes_in_words():
    root = DataRoot(".")
    assert tool.closed_list(root, {"a": 1, "c": 3, "b": 3, "d": 1}, 3) == ["b", "c", "a"]
    root.classes = ["air_drumming", "abseiling"]
    assert tool.closed_list(root, {}, None) == ["air drumming", "abseiling"]


def test_missing_and_unreadable_clips_are_named():
    """Training rows without a clip are left out, test rows stay with their expected path."""
    write_msrvtt_qa(8)
    os.unlink("videos/all/video1.gif")
    write({"videos/all/video8000.gif": ""})
    named = "train\tvideos/all/video1\tmissing\ntest\tvideos/all/video8000.gif\tunreadable\n"
    with one_line("1 of 8 clips of train, 1 of 1 clips of test are missing"):
        make("msrvtt-qa", allow_missing=False, check=True)
    assert Path("out/missing.txt").read_text() == named and len(os.listdir("out")) == 1
    rows, _ = make("msrvtt-qa", check=True)
    assert [row["id"] for row in rows["train"]] == list("0234567")
    assert rows["test"][0]["video"] == "videos/all/video8000.gif"
    assert Path("out/missing.txt").read_text() == named


def test_one_percent_of_train_may_be_missing_but_none_of_test():
    write_msrvtt_qa(100, ".mp4", "")
    os.unlink("videos/all/video5.mp4")
    rows, _ = make("msrvtt-qa", allow_missing=False)
    assert len(rows["train"]) == 99
    shutil.rmtree("out")
    write({"test_qa.json": [{**QUESTION, "video_id": n} for n in range(100)]})
    with one_line("1 of 100 clips of test are missing"):
        make("msrvtt-qa", allow_missing=False)


def test_held_out_clips_depend_on_their_crc32_alone():
    clips = {f"videos/v{n}.mp4" for n in range(1000)}
    small = [clip for clip in clips if zlib.crc32(stem(clip).encode()) < 2**32 / 20]
    assert hold_out(clips, ("val",)) == dict.fromkeys(small, "val")


def test_a_small_set_holds_out_one_clip_for_each_split():
    """Those with the smallest crc32, here "c" and "b". Train never loses its last clip."""
    assert hold_out({"a", "b", "c"}, ("val", "test")) == {"c": "val", "b": "test"}
    assert hold_out({"a"}, ("val",)) == {}


def test_a_held_out_retrieval_clip_keeps_its_first_caption():
    write({"MSRVTT_data.json": captions(*range(40)),
           "MSRVTT_JSFUSION_test.csv": "key,video_id,sentence\nret0,video9770,a man\n"})
    write({f"videos/video{n}.mp4": "" for n in range(40)})
    rows, _ = make("msrvtt")
    assert {len(row["captions"]) for row in rows["train"]} == {2}
    for row in rows["val"]:
        assert row["caption"] == f"see {stem(row['video']).removeprefix('videos/video')}"


def test_an_interrupted_run_leaves_nothing():
    write_msrvtt_qa(8)
    with mock.patch.object(tool, "write_rows", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            make("msrvtt-qa")
    assert not [name for name in os.listdir() if "out" in name]


def test_what_a_killed_process_left_is_deleted():
    """Not what another folder's process left. A finished folder is kept."""
    write_msrvtt_qa(8)
    write({".out-1.part/train.jsonl": "", ".other-1.part/x": ""})
    make("msrvtt-qa")
    assert [name for name in os.listdir() if name.endswith(".part")] == [".other-1.part"]
    with one_line("out exists: delete it"):
        make("msrvtt-qa")


def test_empty_splits_are_errors():
    write_msrvtt_qa(8)
    write({"test_qa.json": []})
    with one_line("no rows for test"):
        make("msrvtt-qa")
    shutil.rmtree("videos")
    write({"test_qa.json": [{**QUESTION, "video_id": 1}]})
    with one_line("no training row has a clip"):
        make("msrvtt-qa")


@cases("words, message", """
mine.json  | whose name ends in .jsonl
mine.JSONL | whose name ends in .jsonl
msrvtt     | the folder of its owners' files
none x     | benchmarks are tgif-action
""")
def test_wrong_arguments_are_one_line(command, words, message):
    with one_line(message):
        command(tool.main, *words.split())


# ---- your own file -------------------------------------------------------------------------------


def make_own(*rows):
    """out/ of mine.jsonl, whose clips are 0.mp4 to 9.mp4."""
    write({"mine.jsonl": list(rows), **{f"{n}.mp4": "" for n in range(10)}})
    return make("mine.jsonl")


def test_own_rows_are_split_by_clip():
    """90 % of the clips are train, 5 % val and 5 % test."""
    rows = [{"video": f"./v{n // 2}.mp4", "question": " What is\nit? ", "answer": "cat"}
            for n in range(400)]
    write({f"v{n}.mp4": "" for n in range(200)})
    made, said = make_own(*rows)
    train, val, test = ({*pick(made[split], "video")} for split in ("train", "val", "test"))
    assert len(train | val | test) == len(train) + len(val) + len(test) == 200
    assert 3 <= len(val) <= 17 and 3 <= len(test) <= 17
    assert pick(made["train"], "id", "question", "question_type", "answer")[0] == (
        "1", "What is it?", "what is", "cat")
    assert "benchmark" not in manifest_info("out")
    assert said[-1].endswith("out --task vqa")


def test_own_rows_may_name_their_split():
    """Without a val, one is held out of train. All fields of the manifest are kept."""
    test = {"id": "mine", "video": "9.mp4", "captions": ["a", "b"], "seconds": [1, 2]}
    rows = [{"video": f"{n}.mp4", "caption": "a dog"} for n in range(3)]
    made, _ = make_own(*rows, {**test, "split": "test"})
    assert [len(made[split]) for split in ("train", "val", "test")] == [2, 1, 1]
    assert made["test"] == [test]


def test_own_names_are_exact():
    """Another extension will not do; a video may be elsewhere, by an absolute path."""
    write({"elsewhere/b.mp4": ""})
    there = os.path.abspath("elsewhere/b.mp4")
    made, _ = make_own({"video": "1.avi", "label": 0, "split": "val"}, {"video": there, "label": 1})
    assert made["train"] == [{"id": "2", "video": there, "label": 1}]
    assert Path("out/missing.txt").read_text() == "val\t1.avi\tmissing\n"


def test_own_texts_make_a_tokenizer():
    """The same one every time: letters are in order. Every letter has a token. One next to the
    file is taken instead."""
    texts = ["a red ring moves", "a red cross moves", "caf\u00e9 moves \u6f22"]
    rows = [{"video": "1.mp4", "caption": text} for text in texts]
    make_own(*rows)
    text = Path("out/tokenizer.json").read_text()
    shutil.rmtree("out")
    letters = re.findall('"(##.)":', text)
    assert letters == sorted(letters)
    tokenizer = Tokenizer.from_json(text)
    unknown = tokenizer.tokenizer.token_to_id("[UNK]")
    assert len(tokenizer.ids("RED moves")) == 2
    assert unknown not in tokenizer.ids("Cafe \u6f22 grins") and unknown in tokenizer.ids("\u6f23")
    write({"tokenizer.json": text + " "})
    make_own(*rows)
    assert Path("out/tokenizer.json").read_text() == text + " "


# fields of row 2 | error
BAD_OWN_ROWS = """
"video": "../a", "caption": "c" | without '..'
"video": "a" | a row has question
"video": "a", "question": "q", "options": ["x", "y"], "answer": 2 | a row has question
"video": "a", "caption": "c", "fps": 3 | fields out of
"video": "a", "caption": "c", "split": "dev" | split 'dev' is not train
"video": "a", "caption": "c", "id": "1" | another row has the id '1'
"video": "a", "label": 1 | two tasks, action and retrieval
"""


@cases("fields, message", BAD_OWN_ROWS)
def test_bad_own_rows_are_named(fields, message):
    with one_line(f"mine.jsonl, row 2: .*{message}"):
        make_own({"video": "b", "caption": "c"}, json.loads(f"{{{fields}}}"))


# ---- real rows -----------------------------------------------------------------------------------

HARRY = "1054_Harry_Potter_and_the_prisoner_of_azkaban"
# benchmark, split, rows, file [its name here]: parts of the first row
FILES = """
tgif-action test 20 tgifqa/Test_action_question.csv: ACTION4 tumblr_nk172bbdPI1u1lr18o1_250 flap
tgif-action train 20 tgifqa/Train_action_question.csv: ACTION1 gifs/tumblr_nqc2mbmU2J1uxhtnwo1_400
tgif-transition test 20 tgifqa/Test_transition_question.csv: TRANS23 tumblr_n9y2jhq01L1rts5xfo1_250
tgif-frame test 20 tgifqa/Test_frameqa_question.csv: FRAMEQA1159 tumblr_no73q2fm0I1uuf348o1 cookie
tgif-action test 1 tgifqa/clipbert_action_test.jsonl action_test.jsonl: tumblr_nk172bbdPI1u1lr18o1
tgif-frame test 1 tgifqa/clipbert_frameqa_test.jsonl frameqa_test.jsonl: no73q2fm0I1uuf348o1 cookie
msrvtt-qa val 2 msrvtt_qa/val_qa.json: 158581 videos/all/video6513 couch
msrvtt-qa train 1 msrvtt_qa/clipbert_train.jsonl msrvtt_qa/train.jsonl: videos/all/video6513 couch
msvd-qa train 20 msvd_qa/train_qa.json: 0 YouTubeClips/-4wsuPCjDBc_5_15 animal
tvqa train 1 tvqa/tvqa_train_README_sample.jsonl tvqa_train.jsonl: A beer bottle [2, 24]
msrvtt test 20 msrvtt_retrieval/MSRVTT_JSFUSION_test.csv: ret0 video9770 connecting something
msrvtt train 1 msrvtt_retrieval/clipbert_train.jsonl msrvtt_retrieval/train.jsonl: a cartoon animals
msrvtt test 1 msrvtt_retrieval/clipbert_test.jsonl msrvtt_retrieval/test.jsonl: ret0 a person
didemo val 20 didemo/val_data.json: 35034348999@N01_6060447507_dc1a90b8ef bends over the machine
didemo test 20 didemo/test_data.json: 26292851@N04_4253489686_265c3c8051 someone kicks the bug
activitynet train 20 activitynet/train.json: v_QOlSCBRmfWY leads into her dancing. The girl dances
activitynet test 20 activitynet/val_1.json: videos/v_uqiMw7tQ1Cc is given. The coach helps
vcr test 2 vcr/val.jsonl: val-1/qa @0 No , person 0 is a visitor .
webvid test 20 webvid/webvid_validation_success_full.tsv: 027701_027750/1053841541 on top of
webvid test 2 webvid/webvid_validation_multiline_row.tsv webvid_validation_success_full.tsv: pandoro
howto100m train 20 howto100m/-tCQ4tCQdWE.csv howto100m_captions/nVbIUDjzWY4.csv: check pic 4.16
hmdb51 train 20 hmdb51/hmdb51_rgb_train_split_1.txt: hmdb51/Phillies_dad_catches_foul_ball 2
hmdb51 test 20 hmdb51/hmdb51_rgb_val_split_1.txt: hmdb51/St__Louis_Goalkeeping__Academy_elite 19
k400 test 20 kinetics400/kinetics-400_val.csv: val/abseiling/0wR5jVB-WPk_000417_000427 0
k400 test 20 kinetics400/kinetics_video_vallist.txt: val/abseiling/0wR5jVB-WPk 0
"""


@cases("line", FILES.strip().splitlines())
def test_real_rows(line):
    """Every excerpt of a real file gives all its rows, the first as read off it by eye."""
    line, parts = line.split(": ")
    name, split, count, file, *target = line.split()
    picture = f"lsmdc_{HARRY}/{HARRY}_00.01.46.736-00.01.50.168@0.json"
    copies = {f"vcr1images/{picture}": f"vcr/{Path(picture).name}",
              "youtube_mapping.txt": "msvd_qa/youtube_mapping.txt",
              "msrvtt_retrieval/test.jsonl": "msrvtt_retrieval/clipbert_test.jsonl",
              "kinetics-400_train.csv": "kinetics400/kinetics-400_val.csv",
              "HowTo100M_v1.csv": "howto100m/HowTo100M_v1_README_rows.csv",
              "".join(target) or Path(file).name: file}
    folder = shared("reference/annotations")
    write({place: (folder / source).read_bytes() for place, source in copies.items()})
    rows = read(name, split)
    assert len(rows) == int(count) and len({row["id"] for row in rows}) == len(rows)
    assert all(part in json.dumps(rows[0]) for part in parts.split())


# ---- toy: the world ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory):
    """The whole toy world with few clips. With this seed a test pair of MSRVTT does not move."""
    root = tmp_path_factory.mktemp("toy")
    make_toy(root, seed=5, share=0.01)
    return root


def toy_rows(root, name, split="test"):
    return read_rows(root / name / f"{split}.jsonl")


def toy_frames(root, name, row, pick=None):
    """Three frames of a row's clip, or those of `pick`, 32 pixels high and wide."""
    media = manifest_info(root / name)["root"]
    pick = pick or partial(pick_frames, row=row, T=3, views=1, rng=None)
    return read_frames(f"{media}/{row['video']}", pick, 32).float()


def files_below(folder):
    """{path: bytes}."""
    paths = filter(Path.is_file, Path(folder).rglob("*"))
    return {path.relative_to(folder): path.read_bytes() for path in paths}


@cases("name", ["activitynet", "tgif-action", "vcr"])
def test_same_seed_same_bytes(name):
    """mp4, mkv, webm; gif; jpg."""
    small_toy(name, "a")
    small_toy(name, "b")
    small_toy(name, "c", seed=1)
    assert files_below("a/owners") == files_below("b/owners") != files_below("c/owners")


@cases("events", [None, ("moves", "turns")])
def test_reversed_scene_shows_the_same_frames(events):
    for number in range(40):
        scene, _ = make_clip(0, number, events)
        back = scene.reverse()
        assert toy.caption(back) != toy.caption(scene) == toy.caption(back.reverse())
        for when in (0, 0.29, 0.76):
            picture = toy.render(scene, when, 40, 32).astype(int)
            assert abs(picture - toy.render(back, 1 - when, 40, 32)).max() <= 1


def test_scene_and_reverse_are_equally_likely():
    """Counted by first event and by where the shape starts, in thirds of the picture. A movement
    starts anywhere: one frame and its time tell nothing about the way."""
    counts = Counter()
    starts = Counter()
    for number in range(4000):
        scene, _ = make_clip(0, number)
        for sign, one in ((1, scene), (-1, scene.reverse())):
            start = (round(1.5 * one.actor.x) % 3, round(1.5 * one.actor.y) % 3)
            counts[one.events[0], start] += sign
            starts[one.events[0], start] += 1
    assert max(map(abs, counts.values())) < 100              # about 3 standard deviations
    thirds = [starts["moves left", (third, 0)] for third in range(3)]
    assert min(thirds) > 0.8 * max(thirds)


@cases("events", [1, 2])
def test_middle_frame_does_not_tell_the_last_color(events):
    last = []
    for number in range(3000):
        scene, _ = make_clip(0, number, events)
        if toy.say(scene).count("turns") == 1:
            last.append(scene.at(0.52)[0].color == scene.at(1)[0].color)
    assert abs(np.mean(last) - 0.5) < 0.06


RING = toy.Sprite("ring", "red", x=0, y=0, size=0.4)


def test_pre_training_captions_vary():
    """Every caption has the event; the short one has nothing else of the scene."""
    scene = toy.Scene((RING,), ("moves left",), "navy")
    rng = np.random.default_rng(0)
    texts = {toy.describe(scene, rng) for _ in range(300)}
    assert texts == {"a red ring moves left on a navy ground", "the red ring moves left",
                     "it moves left"}


# ---- toy: its manifests --------------------------------------------------------------------------


@cases("name", toy.NAMES)
def test_every_manifest_is_readable(toy_root, name):
    """Splits share no clip, clips decode, every text is made of whole words of the vocabulary."""
    tokenizer = Tokenizer.load(str(toy_root / name / "tokenizer.json")).tokenizer
    seen = set()
    for split in ("train", "val", "test"):
        if (name, split) == ("howto100m", "test"):
            continue
        rows = toy_rows(toy_root, name, split)
        clips = {row["video"]: row for row in rows}
        assert clips and not seen & clips.keys()
        seen |= clips.keys()
        for row in clips.values():
            frames = toy_frames(toy_root, name, row)
            assert frames.shape == (3, 3, 32, 32) and frames.std() > 5
        for row in rows:
            texts = [row.get("question", ""), row.get("caption", ""), *row.get("options", [])]
            texts += [*row.get("captions", []), str(row.get("answer", ""))]
            for token in tokenizer.encode(" ".join(texts)).tokens:
                assert token != "[UNK]" and not token.startswith("##"), texts


@cases("name", [n for n, b in BENCHMARKS.items() if b.task == "retrieval"])
def test_test_clips_come_with_their_reverse(toy_root, name):
    """All test captions differ and have a movement; the last frame of a clip is the first of the
    next one."""
    rows = toy_rows(toy_root, name)
    assert sum("moves" in text for text in {row["caption"] for row in rows}) == len(rows)
    def ends(times):
        return [0, len(times) - 1]
    for row, back_row in zip(rows[::2], rows[1::2], strict=True):
        clip = toy_frames(toy_root, name, row, ends)
        back = toy_frames(toy_root, name, back_row, ends)
        assert (clip - back.flip(0)).abs().mean() < 6


@cases("name", [n for n, b in BENCHMARKS.items() if b.task in ("vqa", "choice")])
def test_order_blind_model_gets_half_of_the_timed_questions(toy_root, name):
    """They are asked of a clip and its reverse with different answers; options hold both."""
    clips = defaultdict(dict)
    for row in toy_rows(toy_root, name):
        clips[row["video"], str(row.get("frames"))][row["question"]] = row
    clips = list(clips.values())
    asked = 0
    for clip, back in zip(clips[::2], clips[1::2], strict=True):
        for question, row in clip.items():
            if question and not question.lower().startswith(toy.TIMED):
                continue
            asked += 1
            options = row.get("options")
            if options:
                other = back[question]["options"][back[question]["answer"]]
                assert other in options and other != options[row["answer"]]
            else:
                assert back[question]["answer"] != row["answer"]
    assert asked


def test_order_blind_share_of_each_question_type(toy_root):
    def share(name):
        return manifest_info(toy_root / name).get("order_blind")
    assert share("msrvtt-qa").items() >= {"which way": 0.5, "what shape": 1.0}.items()
    assert share("msrvtt") == share("hmdb51") == share("msrvtt-mc") == {"": 0.5}
    assert share("vcr") == {"Q->A": 1.0, "QA->R": 1.0}
    assert share("webvid") is None


def test_tvqa_rows_show_one_scene_each(toy_root):
    spans = {str(row["frames"]) for row in toy_rows(toy_root, "tvqa")}
    assert spans == {"[0, 8]", "[9, 17]", "[18, 26]"}


def test_answers_are_all_directions_or_actions(toy_root):
    for name, verb in (("which-way", ""), ("k400", "move "), ("hmdb51", "move ")):
        assert {*read_answers(toy_root / name)} == {verb + way for way in toy.WAYS}


# ---- toy: creation -------------------------------------------------------------------------------


def small_toy(name, folder=".", seed=0):
    make_toy(folder, [name], seed, share=0.01)


def test_interrupted_creation_leaves_nothing():
    def stop(iterable, what, total):
        yield next(iter(iterable))
        raise KeyboardInterrupt

    with mock.patch.object(toy, "progress", stop), pytest.raises(KeyboardInterrupt):
        small_toy("msvd-qa")
    assert {*os.listdir()} <= {".lock", "owners"} and os.listdir("owners") == []
    small_toy("msvd-qa")
    assert os.listdir("owners") == ["msvd"]


def start_toy(share):
    """make_toy in another process."""
    code = (f"import sys; sys.path.insert(0, {str(MAIN)!r}); from tools.toy import make_toy; "
            f"make_toy('.', ['msvd-qa'], share={share})")
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited for a minute")


def test_killed_creation_ends_its_workers_and_is_swept():
    process = start_toy(share=1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: list(Path().glob(".making/msvd/YouTubeClips/*")))
    workers = children.read_text().split()
    process.kill()
    process.wait()
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in workers))
    assert workers and os.path.exists(".making")
    small_toy("msvd-qa")
    assert not os.path.exists(".making") and os.listdir("owners") == ["msvd"]


def test_two_first_runs_at_once():
    runs = [start_toy(share=0.01) for _ in range(2)]
    assert [run.communicate()[1] for run in runs] == [b"", b""]
    small_toy("msvd-qa")


def test_existing_folders_stay_and_missing_files_are_an_error():
    small_toy("msvd-qa")
    before = files_below(".")
    small_toy("msvd-qa", seed=1)
    assert files_below(".") == before
    for folder, file in (("msvd-qa", "train.jsonl"), ("owners/msvd", "val_qa.json")):
        os.unlink(f"{folder}/{file}")
        write({f"{folder}/listings/a.npz": ""})             # made by data.py
        with one_line(f"lacks files: delete {folder} and"):
            small_toy("msvd-qa")


def test_toy_names_what_exists_and_what_is_wrong(command):
    write({"file": ""})
    with one_line("--seed -1: must be"):
        command(toy.main, ".", "--seed", "-1")
    with one_line("file cannot be written"):
        command(toy.main, "file")
    small_toy("vcr")
    assert "owners/vcr exists and stays as it is" in command(toy.main, ".", "--only", "vcr")


def test_three_colors_are_not_counted():
    """The answers are "one" and "two"."""
    scene = toy.Scene((RING,), ("turns blue", "turns green"), "navy")
    assert "how many" not in str([*toy.tgif_words(scene)])


def test_encoded_picture_is_read_back():
    picture = np.arange(144, dtype=np.uint8).reshape(6, 8, 3)
    write({"a.png": encode_picture(picture, ".png")})
    frames = read_frames("a.png", lambda times: [0])
    assert np.array_equal(frames[0].permute(1, 2, 0), picture)


# ---- weights: files in foreign naming ------------------------------------------------------------

SMALL = Config(width=192, layers=2, heads=3, image=32, patch=8, frames=3, text_length=9, vocab=30,
               answers=4, embed=8)
THEIR_SIZE = dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=3,
                  intermediate_size=768, image_size=32, patch_size=8)      # in transformers' words
RELEASED_HEADS = ("matching", "mlm", "answer", "mc", "rank", "contrast")
RELEASED_NAMES = """
    text_embed.                 text_embeddings.word_embeddings.
    text_pos                    text_embeddings.position_embeddings.weight
    text_segment                text_embeddings.token_type_embeddings.weight
    text_norm.                  text_embeddings.LayerNorm.
    modality_embed              token_type_embeddings.weight
    patch_embed.                transformer.patch_embed.proj.
    cls_token                   transformer.cls_token
    pos_embed                   transformer.pos_embed
    time_embed                  transformer.temporal_embed
    blocks.                     transformer.blocks.
    norm.                       transformer.norm.
    pooler.                     pooler.dense.
    task_heads.matching.        itm_score.fc.
    task_heads.mlm.0.           mlm_score.transform.dense.
    task_heads.mlm.2.           mlm_score.transform.LayerNorm.
    task_heads.mlm.3.weight     mlm_score.decoder.weight
    task_heads.mlm.3.bias       mlm_score.bias
    task_heads.answer.          vqa_classifier.
    task_heads.mc.              mc_vqa_classifier.
    task_heads.rank.            rank_output.
    task_heads.contrast.text.   txt_proj.
    task_heads.contrast.video.  vid_proj.
""".split()                             # how our names start, and the released ones


def scrambled(module):
    """Every tensor random and large enough to matter."""
    generator = torch.Generator().manual_seed(0)
    for p in module.eval().parameters():
        p.data = 0.15 * torch.randn(p.shape, generator=generator) + (p.dim() == 1)
    return module


def released_file(heads=RELEASED_HEADS):
    """A state dict in the released naming."""
    tensors = {"text_embeddings.position_ids": torch.arange(9)[None]}
    for name, tensor in scrambled(AllInOne(SMALL, heads)).state_dict().items():
        for ours, theirs in zip(RELEASED_NAMES[::2], RELEASED_NAMES[1::2]):
            if name.startswith(ours):
                new = theirs + name.removeprefix(ours)
        if name in ("cls_token", "pos_embed", "time_embed"):
            tensor = tensor.view(1, -1, SMALL.width)
        tensors[new] = tensor
    return tensors


def vit_file():
    """The same in timm's naming, with a classifier."""
    tensors = {}
    for name, tensor in released_file().items():
        if name.startswith("transformer.") and "temporal" not in name:
            tensors[name.removeprefix("transformer.")] = tensor
    return tensors | {"head.weight": torch.ones(5, 192)}


def saved(content, name="file.pt"):
    torch.save(content, name)
    return name


@pytest.fixture
def run(command):
    """run(content, *flags): the command on a file with that content -> (checkpoint, its line)."""
    write({"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nred\ncat\ndog"})

    def run(content, *flags):
        line = command(weights.main, saved(content, "in.ckpt"), "out.pt", *flags)
        return load_checkpoint("out.pt"), line

    return run


def assert_close(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def as_floats(model):
    """Take pixels that are normalised already."""
    model.pixel_mean.zero_()
    model.pixel_std.fill_(1)
    return model.eval()


# ---- weights: the same outputs -------------------------------------------------------------------


@cases("name", ["parity_tiny", "parity_tiny_T1"])
def test_equals_released_model(name):
    """A released file gives all the released outputs, with the patch shuffle off there."""
    z = {k: torch.from_numpy(v) for k, v in np.load(shared(f"parity/{name}.npz")).items()}
    tensors = {k.removeprefix("sd/"): t for k, t in z.items() if k.startswith("sd/")}
    path = saved({"epoch": 3, "state_dict": tensors})
    config, heads, state, _ = convert(path, answers=["?"] * 11, heads=3)
    model = AllInOne(replace(config, roll="block"), heads)
    model.load_state_dict(state)
    model = as_floats(model.double())
    head = model.task_heads
    frames = z["in/image"].double()
    ids = z["in/text_ids"]
    mask = z["in/text_masks"].bool()
    B, A, L = z["in/option_ids"].shape
    with torch.no_grad():
        o = model(frames, ids, mask)
        video = model.embed_frames(frames).repeat_interleave(A, dim=0)
        option = model.joint(video, z["in/option_ids"].flatten(0, 1),
                             z["in/option_masks"].bool().flatten(0, 1), num_queries=1).pooled
        wrong = z["out/itm/itm_labels"] == 0
        mixed = frames.clone()
        mixed[wrong] = z["in/false_image"][wrong].double()
        got = {
            "cls_feats": o.pooled,
            "text_feats": o.text,
            "image_feats": o.video,
            "itm_logits": head["matching"](o.pooled),
            "vqa_logits": head["answer"](o.pooled),
            "rank_output": head["rank"](o.pooled)[:, 0],
            "mlm_logits": head["mlm"](model(frames, z["in/text_ids_mlm"], mask).text),
            "mc_scores": head["rank"](option).view(B, A),
            "mc_vqa_scores": head["mc"](option).view(B, A),
            "itc_text_emb": model.encode_text(ids, mask),
            "itc_video_emb": model.encode_video(frames),
            "itm/logits": head["matching"](model(mixed, ids, mask).pooled)}
    for key, value in got.items():
        assert (value - z[f"out64/{key}"]).abs().max() < 1e-12, key


def test_released_base_names_all_have_a_place():
    """All 186 tensors of the released base, by name and number of values."""
    listing = shared("reference/state_dict_base.txt").read_text()
    theirs = {}
    for name, shape in re.findall(r"^([^#\t]+)\t\((.*?),?\)", listing, re.M):
        theirs[our_name(name)] = math.prod(map(int, shape.split(", ")))
    assert len(theirs) == 186 and theirs.pop("position_ids") == 40
    with torch.device("meta"):
        model = AllInOne(replace(SIZES["base"], answers=1501), RELEASED_HEADS)
    assert theirs == {name: t.numel() for name, t in model.state_dict().items()}


def test_vilt_gives_huggingface_outputs(monkeypatch):
    """ViLT with its mlm head, whose decoder is the word embeddings."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViltConfig(vocab_size=30, max_position_embeddings=9,
                                     layer_norm_eps=1e-6, **THEIR_SIZE)
    theirs = scrambled(transformers.ViltForMaskedLM(config))
    theirs.vilt.embeddings.text_embeddings.LayerNorm.eps = 1e-12        # as in the original ViLT
    theirs.mlm_score.transform.LayerNorm.eps = 1e-12
    tensors = theirs.state_dict()
    del tensors["mlm_score.decoder.weight"]
    config, heads, state, report = convert(saved(tensors, "pytorch_model.bin"))
    assert heads == ["mlm"] and report.new == {"time_embed": "not in a ViLT"}
    ours = AllInOne(replace(config, frames=1), heads)
    ours.load_state_dict(state | {"time_embed": torch.zeros(1, 192)})
    # ViltModel draws a random order of the patches, in evaluation too.
    monkeypatch.setattr(torch, "multinomial", lambda weights, n, *_, **__: torch.arange(int(n)))
    frames = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64)
    ids = torch.randint(1, 30, (2, 9))
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    want = theirs.double().vilt(input_ids=ids, attention_mask=mask.long(),
                                pixel_values=frames[:, 0])
    got = as_floats(ours.double())(frames, ids, mask)
    assert_close(got.pooled, want.pooler_output)
    assert_close(torch.cat([got.text, got.video], dim=1), want.last_hidden_state)
    words = ours.task_heads["mlm"](got.text)
    assert_close(words, theirs.mlm_score(want.last_hidden_state[:, :9]))


def test_vit_gives_huggingface_outputs():
    """Names as save_pretrained writes them, and those of the state dict."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(layer_norm_eps=1e-6, **THEIR_SIZE)
    theirs = scrambled(transformers.ViTModel(config))
    theirs.save_pretrained(".")
    paths = ["model.safetensors", saved(theirs.state_dict())]
    frames = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64)
    want = theirs.double()(frames[:, 0]).last_hidden_state
    for path in paths:
        config, _, state, report = convert(path)
        assert {"pooler.weight", "pooler.bias"} == set(report.unused)
        ours = AllInOne(config)
        ours.load_state_dict(ours.state_dict() | state)
        ours = as_floats(ours.double())
        ours.modality_embed.data.zero_()
        assert_close(ours.apply_blocks(ours.embed_frames(frames), None, None, None), want)


def test_deit_loses_its_distillation_token():
    """timm's names, in the file format before zip."""
    tensors = vit_file()
    own = convert(saved(tensors))[2]
    table = tensors["pos_embed"]
    token = torch.full((1, 1, 192), 9.0)
    tensors["pos_embed"] = torch.cat([table[:, :1], token, table[:, 1:]], dim=1)
    tensors["dist_token"] = token
    content = {"model": tensors, "args": Namespace(lr=1)}
    torch.save(content, "deit.pth", _use_new_zipfile_serialization=False)
    config, heads, state, report = convert("deit.pth")
    assert heads == [] and config == Config(width=192, layers=2, heads=3, image=32, patch=8)
    assert report.notes == ["pos_embed cut from 18 to 17 rows"] and "dist_token" in report.unused
    assert_close(state, own, 0)


# ---- weights: what is loaded, new, not used ------------------------------------------------------


@cases("file_heads, loaded", """
["matching", "mlm"] | ["matching", "mlm", "rank", "rank2"]
["rank"]            | ["rank"]
["contrast"]        | ["contrast"]
["mc"]              | ["mc"]
["answer"]          | []
""")
def test_authors_checkpoint_starts_every_benchmark(file_heads, loaded, run):
    checkpoint = run({"state_dict": released_file(file_heads)})[0]
    for benchmark in BENCHMARKS.values():
        config = replace(checkpoint["config"], frames=benchmark.frames, answers=benchmark.answers,
                         text_length=benchmark.text_length)
        model = AllInOne(config, benchmark.heads)
        new = re.search("new: ([^;]*)", load_weights(model, checkpoint))
        assert set(new[1].split(", ") if new else []) == set(benchmark.heads) - set(loaded)
        state = model.state_dict()
        for name in checkpoint["model"].keys() & state.keys() - {"time_embed", "text_pos"}:
            assert torch.equal(state[name], checkpoint["model"][name]), name


def test_one_line_accounts_for_every_tensor(run):
    tensors = released_file(("matching", "answer"))
    checkpoint, line = run({"state_dict": tensors})
    assert ("out.pt: All-in-one, 2 layers 192 wide, 3 attention heads: loaded 41 of 45 tensors; "
            "new 4: rank, rank2 (row 1 of matching); not used 7: position_ids (constant), "
            "answer (4 classes, 0 answers given); tokenizer ") in line and line.count("\n") == 1
    assert len(tensors) == 41 + 7
    for head in ("rank", "rank2"):
        row = tensors["itm_score.fc.weight"][1:]
        assert torch.equal(checkpoint["model"][f"task_heads.{head}.weight"], row)
    checkpoint, line = run({name: tensor.half() for name, tensor in vit_file().items()})
    assert checkpoint["model"]["norm.weight"].dtype == torch.float32
    assert checkpoint["config"].vocab == 9 and checkpoint["task"] == "pretrain"
    assert ("loaded 30 of 39 tensors; new 9: text_pos, text_segment, modality_embed, time_embed, "
            "text_embed, text_norm, pooler (not in a ViT); not used 1: head (a class") in line
    build_model(checkpoint)


def test_answer_head_needs_as_many_answers(run):
    tensors = released_file(("answer",))
    write({"four.txt": "yes\nno\nred\nblue\n", "two.txt": "yes\nno\n"})
    checkpoint, line = run(tensors, "--answers", "four.txt")
    assert checkpoint["answers"] == ["yes", "no", "red", "blue"]
    assert checkpoint["task_heads"] == ["answer"] and "not used 1: position_ids (" in line
    checkpoint, line = run(tensors, "--answers", "two.txt")
    assert checkpoint["answers"] == checkpoint["task_heads"] == []
    assert "answer (4 classes, 2 answers given); --answers not used" in line
    del tensors["transformer.temporal_embed"]               # ViLT's classifier has another form
    assert "answer (a classifier" in run(tensors, "--answers", "four.txt")[1]


def test_tokenizer_must_be_there_and_fit(run):
    os.rename("vocab.txt", "own.txt")
    tensors = released_file()
    with one_line("add --tokenizer vocab.txt"):
        run(tensors)
    assert run(tensors, "--tokenizer", "own.txt")[0]["tokenizer"]
    with open("own.txt", "a") as file:
        file.write("".join(f"\nword{i}" for i in range(22)))
    with one_line("has 31 tokens, .* embeddings for 30"):
        run(tensors, "--tokenizer", "own.txt")


# ---- weights: what is refused --------------------------------------------------------------------


def test_lightning_classes_are_not_needed():
    """Plain data stands in for a class that Lightning leaves in a file."""
    module = "pytorch_lightning.utilities.parsing"
    made = type("AttributeDict", (dict,), {"__module__": module})
    modules = {"pytorch_lightning": Namespace(), module: Namespace(AttributeDict=made)}
    with mock.patch.dict(sys.modules, modules):
        saved({"state_dict": released_file(), "hyper_parameters": made(lr=1e-4)})
    assert convert("file.pt")[3].kind == "All-in-one"


def test_safetensors_or_how_to_install_it(monkeypatch):
    pytest.importorskip("safetensors")
    write({"vit.safetensors": "not safe tensors"})
    with one_line("damaged"):
        convert("vit.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with one_line("pip install safetensors$"):
        convert("vit.safetensors")


W = torch.ones(192, 192)


@cases("name, tensor, line", [
    ("transformer.blocks.1.attn.proj.bias", None, "lacks 1 tensors, .* blocks.1.attn.proj.bias"),
    ("transformer.pos_embed", torch.ones(1, 16, 192), "CLS and 15 patches"),
    ("transformer.cls_token", W, r"cls_token has shape \(192, 192\), not 3 axes"),
    ("transformer.blocks.1.ls1.gamma", W, "blocks.1.ls1.gamma has no place"),
    ("mlm_score.decoder.bias", torch.zeros(30), "two different tensors for task_heads.mlm.3"),
    ("pooler.dense.weight", W[:9], r"pooler.weight has shape \(9, 192\)"),
    ("pooler.dense.weight", W.int(), "dtype torch.int32, not floats"),
    ("pooler.dense.weight", W.cfloat(), "dtype torch.complex64, not floats"),
    ("pooler.dense.weight", W.to_sparse(), "not a dense tensor"),
    ("pooler.dense.weight", W.to("meta"), "not a dense tensor"),
    ("pooler.dense.weight", torch.ones(1).expand(192, 192), "not the numbers for it"),
    ("pooler.dense.weight", W.double() * 1e300, "not finite")])
def test_odd_tensors_are_named(name, tensor, line):
    tensors = released_file() | {name: tensor}
    if tensor is None:
        del tensors[name]
    with one_line(line):
        convert(saved(tensors))


def test_broken_foreign_or_malicious_files_are_one_line(recwarn):
    """Nothing in a file is executed, and no warning adds to the line."""
    vit = vit_file()
    good = Path(saved(vit)).read_bytes()
    weight = vit["norm.weight"].numpy().tobytes()
    old = io.BytesIO()
    torch.save(Bomb(), old, _use_new_zipfile_serialization=False)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("file/data.pkl", b"0" * 10 ** 6)
    cases = [
        (good[:len(good) // 2], "not a checkpoint, or is damaged"),
        (good.replace(weight, b"?" + weight[1:]), "damaged"),
        (packed.getvalue(), "damaged"),
        (old.getvalue(), "names posix.mkdir"),
        ({"model": vit, "x": Bomb()}, "names posix.mkdir"),
        ({"conv1.weight": W}, "not All-in-one.* conv1.weight"),
        ({}, "no state dict"),
        ({"state_dict": {"a": 1}}, "no state dict: a is no tensor"),
        (AllInOne(SMALL).state_dict(), "use it as it is")]
    for content, line in cases:
        if isinstance(content, bytes):
            write({"file.pt": content})
        else:
            saved(content)
        with one_line(f"file.pt.*{line}"):
            convert("file.pt")
    with one_line("not a file"):
        convert(".")
    assert not os.path.exists("executed") and not recwarn.list
    pickle.loads(pickle.dumps(Bomb()))
    assert os.path.exists("executed"), "the bomb is a dud, so these cases show nothing"


HOSTILE = "</script><img src=x onerror=alert(1)> & \u2028"

# ---- report, search and plots: a small world -----------------------------------------------------


def write_clips(*rows):
    """A clip of five noisy pictures for each row, as its video, and the rows as train and test."""
    rng = np.random.default_rng(0)
    for n in range(len(rows)):
        for k in range(5):
            picture = rng.integers(0, 255, (40, 40, 3), np.uint8)
            write({f"clip{n}/{k}.png": encode_picture(picture, ".png")})
    rows = [{"video": f"clip{n}", **row} for n, row in enumerate(rows)]
    write({"train.jsonl": rows, "test.jsonl": rows})


def write_checkpoint(*heads):
    words = [*SPECIAL, "red", "ring", "is", "it", "?", "a"]
    tokenizer = Tokenizer(wordpiece({word: n for n, word in enumerate(words)}))
    model = AllInOne(replace(SIZES["toy"], vocab=len(words), answers=2, layers=2), heads)
    init_narrow(model)
    save_checkpoint("a.pt", model, answers=["red", "blue"], tokenizer=tokenizer.to_json())


def make_page(head, *rows):
    """(the HTML, its data) of these test rows."""
    write_clips(*rows)
    write_checkpoint(head)
    model, checkpoint = load_model("a.pt")
    html = report.make_page(report.page_data(model, checkpoint, ".", "test", 9, EvalSettings()))
    return html, json.loads(re.search(r'application/json">(.*?)</script>', html, re.S)[1])


QUESTIONS = [{"question": "is it red ?", "answer": "red"},
             {"question": "is it red ?", "answer": "red", "video": "clip0"},
             {"question": f"is it {HOSTILE}", "answer": "red"}]
OPTIONS = {"question": "is it", "options": ["red", "ring"], "answer": 0}

# ---- report --------------------------------------------------------------------------------------


def test_recorded_attention_is_that_of_the_model():
    """With its values it gives the output of the module; padding gets nothing."""
    model = AllInOne(replace(SIZES["toy"], layers=1)).eval()
    attention = model.blocks[0].attn
    x = torch.randn(2, 7, 96)
    mask = (torch.arange(7) < 5).expand(2, 1, 1, 7)
    with report.record_attention(model) as maps:
        out = attention(x, mask, 3)
    v = attention.qkv(x).view(2, 7, 3, 4, 24)[:, :, 2].transpose(1, 2)
    expected = attention.proj((maps[0] @ v).transpose(1, 2).flatten(2))
    assert_close(out, expected, 1e-5)
    assert maps[0].shape == (2, 4, 3, 7) and (maps[0][..., 5:] == 0).all()
    attention(x, mask, 3)
    assert len(maps) == 1                                   # the hook is gone


def test_attention_is_shown_where_tokens_come_from():
    config = replace(SIZES["toy"], roll="block", layers=3)
    model = AllInOne(config).eval()
    frames = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    input_ids = torch.arange(7)
    result = report.word_attention(model, frames, input_ids)
    with torch.inference_mode(), report.record_attention(model) as maps:
        model(frames[None], input_ids[None])
    groups = roll_groups(4, 4, config.fraction, "block")
    home = torch.arange(3 * 17).view(1, 3, 17, 1)           # where each token comes from
    for block in range(3):
        home = roll_loop(home, *groups)
        seen = maps[block].mean(1)[:, :7, 7:].transpose(0, 1)
        expected = torch.zeros(7, 51).index_copy(1, home.flatten(), seen.flatten(1))
        assert torch.equal(result[block], expected.view(7, 3, 17)[:, :, 1:])


def test_gallery_is_spread_over_types_right_and_wrong():
    records = []
    for n in range(100):
        records.append({"id": str(n), "question_type": "ab"[n % 10 == 0], "correct": n % 4 > 0,
                        "prediction": "x" if n >= 40 else None})
    chosen = report.choose(records, 12)
    groups = [(records[i]["question_type"], records[i]["correct"]) for i in chosen]
    assert [groups.count(group) for group in sorted(set(groups))] == [3, 3, 3, 3]
    assert min(chosen) >= 40 and chosen == sorted(set(chosen))


def test_page_shows_what_the_model_saw():
    """The frames of evaluation to the bit, each once; an attention map for every word."""
    _, data = make_page("answer", *QUESTIONS)
    assert len(data["pictures"]) == 6 and [item["id"] for item in data["items"]] == list("123")
    frames = read_frames("clip2", lambda times: [0], 32)
    png = encode_picture(frames[0].permute(1, 2, 0).numpy(), ".png")
    picture = data["pictures"][data["items"][2]["frames"][0]]
    assert picture == f"data:image/png;base64,{base64.b64encode(png).decode()}"
    for item in data["items"]:
        attention = np.frombuffer(base64.b64decode(item["attention"]), np.uint8)
        assert (attention.reshape(2, len(item["words"]), 48).max(2) == 255).all()
    assert data["table"][-1]["majority"] == 100


@cases("head, row, optional", [
    ("answer", QUESTIONS[0], {"shown"}), ("mc", OPTIONS, {"shown"}),
    ("contrast", {"caption": "a red ring"}, {"words", "attention"})])
def test_page_has_what_its_script_reads(head, row, optional):
    """Its own fields aside; "shown" is for retrieval alone, words for the others."""
    html, data = make_page(head, row, row)
    script = html[html.rindex("<script>"):]
    assert set(re.findall(r"\bdata\.([a-z]\w*)", script)) <= data.keys()
    fields = set(re.findall(r"\bitem\.([a-z]\w*)", script)) - {"card", "draw"}
    assert fields - optional <= data["items"][0].keys()


def test_page_is_safe_from_its_texts():
    """They stay data; the page reaches no network."""
    html, data = make_page("answer", *QUESTIONS)
    assert HOSTILE in data["items"][2]["text"] and "<img src=x" not in html
    assert html.count("</script>") == 2
    assert "Content-Security-Policy\" content=\"default-src 'none'; img-src data:;" in html
    assert not re.search(r"innerHTML|insertAdjacentHTML|https?:|url\(|@import", html)


@cases("head, rows", [
    ("mc", [OPTIONS, {**OPTIONS, "video": "clip0", "options": ["ring", "red"]}]),
    ("matching", [{"label": 0}, {"label": 2}])])
def test_page_reads_the_chosen_text(head, rows):
    """In whatever place the option is; of classes, which are no answers here, a sentence."""
    write({"answers.txt": "is\nred\nring"})
    for item in make_page(head, *rows)[1]["items"]:
        assert item["words"][-2:] == [item["top"][0][0], "[SEP]"]


def test_page_of_retrieval_shows_what_was_found():
    items = make_page("contrast", *[{"caption": "a red ring"}] * 3)[1]["items"]
    middle = {item["truth"]: item["frames"][1] for item in items}
    for item in items:
        assert item["shown"] == [middle[video] for video, _ in item["top"]]
        assert "attention" not in item


# ---- search --------------------------------------------------------------------------------------


def test_search_ranks_clips_by_cosine(command):
    """Clips that cannot be read are named."""
    write_clips({})
    write({"clip0/broken.mp4": "no video"})
    write_checkpoint("contrast")
    printed = command(search.main, "a.pt", "clip0", "a red ring")
    broken, line, *found = printed.splitlines()
    assert broken.startswith("cannot be read: clip0/broken.mp4") and line.startswith("5 clips")
    model, checkpoint = load_model("a.pt")
    ids = Tokenizer.from_json(checkpoint["tokenizer"]).encode("a red ring", 40)
    with torch.inference_mode():
        text = F.normalize(model.encode_text(torch.tensor([ids]))[0], dim=0).numpy()
        cosines = {f"{n}.png": search.embed_clip(model, f"clip0/{n}.png") @ text for n in range(5)}
    names = sorted(cosines, key=cosines.get, reverse=True)
    assert found == [f"{cosines[name]:7.3f}  {name}" for name in names]


@pytest.fixture
def embedded(monkeypatch):
    """embedded(sha256, stop_at) -> the names of the clips in clip0/ that were read."""
    write_clips({})

    def embed(sha256="a", stop_at=None):
        read = []

        def embed_clip(model, file):
            if file == stop_at:
                raise KeyboardInterrupt
            read.append(Path(file).stem)
            return np.ones(2)

        monkeypatch.setattr(search, "embed_clip", embed_clip)
        with suppress(KeyboardInterrupt):
            search.embed_folder(None, "clip0", search.list_clips("clip0", sha256), "kept.npz")
        return "".join(read)

    return embed


def test_search_reads_only_what_changed(embedded):
    assert embedded() == "01234" and embedded() == ""
    os.utime("clip0/1.png", (1, 1))
    assert embedded() == "1"
    os.unlink("clip0/2.png")
    assert embedded() == "" and embedded("another checkpoint") == "0134" and embedded() == ""


def test_search_survives_damaged_embeddings(embedded):
    """And executes nothing that lies in them."""
    write({"kept.npz": b"PK\3\4"})
    assert embedded() == "01234" and embedded() == ""
    np.savez("kept.npz", keys=np.array([Bomb()], object))
    assert embedded() == "01234"
    assert not os.path.exists("executed")


def test_search_keeps_what_was_read_before_ctrl_c(embedded):
    assert embedded(stop_at="clip0/2.png") == "01"
    assert embedded() == "234"
    os.utime("clip0/0.png", (1, 1))
    embedded(stop_at="clip0/0.png")                         # the others are still known
    assert embedded() == "0"


# ---- plots ---------------------------------------------------------------------------------------


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib")
    from tools import plots
    return plots


def write_run(folder, value=50.0, test=True, name="msrvtt-qa", metric="accuracy", log="", **config):
    """A run folder as train.py leaves it."""
    model = {"roll": "spread", "width": 768}
    row = {"type": "which way", "accuracy": 9.0, "chance": 25.0, "order-blind": 50.0}
    table = [row, {**row, "type": "all", "accuracy": value}]
    config = {"model": model, "recipe": {"lr": 1}, "seed": 0, "init": None, **config}
    write({f"{folder}/config.json": config, f"{folder}/metrics.jsonl": log})
    if test:
        figures = {"metrics": {metric: value}, "table": table}
        write({f"{folder}/test.json": {name: figures}})


def test_table_groups_runs_by_what_varies(plots, capsys):
    """Runs that differ in nothing but the seed are one group. Seed and layout in the path of --init
    are no difference of their own.
    Only rows of size base show published figures."""
    for seed, value in ((0, 50.0), (1, 70.0)):
        write_run(f"a{seed}", value, seed=seed, init=f"runs/pre-spread-s{seed}/best.pt")
        write_run(f"b{seed}", value + 20, seed=seed, init=f"runs/pre-none-s{seed}/best.pt",
                  model={"roll": "none", "width": 768})
    write_run("c", test=False)
    heads, _, *rows = plots.table_rows(plots.group_runs(["a0", "b1", "c", "b0", "a1"]))
    assert heads[1:5] == ["figure", "roll", "runs", "test"]
    assert [" | ".join(row[1:5]) for row in rows] == [
        "accuracy | spread | 2 | 60.0 ± 14.1",
        "accuracy | none | 2 | 80.0 ± 14.1",
        "which way | spread | 2 | 9.0 ± 0.0",
        "which way | none | 2 | 9.0 ± 0.0"]
    assert heads[5:] == "range chance order-blind paper rerun".split()     # no majority
    assert rows[0][5:] == ["50.0 to 70.0", "25.0", "50.0", "42.5", "42.9"]
    assert capsys.readouterr().err == "c has no test figures and is left out\n"


def test_table_of_several_benchmarks_has_their_main_figures(plots):
    write_run("a")
    write_run("b", name="msrvtt", metric="R@1", recipe={"lr": 2},
              model={"roll": "spread", "width": 96})
    heads, _, *rows = plots.table_rows(plots.group_runs(["a", "b"]))
    assert "lr" not in heads                                # it does not vary within a benchmark
    # Chance and order-blind are those of all questions; published figures are for size base.
    assert rows == ["msrvtt-qa accuracy 1 50.0 25.0 50.0 42.5 42.9".split(),
                    "msrvtt R@1 1 50.0 25.0 50.0".split() + ["", ""]]


@cases("runs, message", """
a b     | b: another run of these settings has seed 0
c       | none of these runs
nowhere | no run of train.py
""")
def test_table_refuses(plots, runs, message):
    write_run("a")
    write_run("b")
    write_run("c", test=False)
    with one_line(message):
        plots.group_runs(runs.split())


def test_curves_show_the_log(plots):
    """Of two runs in one figure, with the loss of a guess. Half a last line does no harm."""
    train = '{"step": 1, "vqa": 3, "chance": {"vqa": 2.5, "mlm": 9}}\n{"step": 2, "vqa": 2}\n'
    val = '{"step": 2, "val": {"accuracy": 40, "x MedR": 9}}\n'
    write_run("a", log=train + val + '{"step": 3, "vq')
    write_run("b", log=train)
    above, below = plots.draw_curves(["a", "b"]).axes
    assert [list(line.get_ydata()) for line in above.lines] == [[3, 2], [2.5, 2.5]] * 2
    assert [line.get_xydata().tolist() for line in below.lines] == [[[2, 40]]]
    write_run("c")
    with one_line("c has logged nothing yet"):
        plots.draw_curves(["c"])


def test_figures_come_from_the_ops(plots):
    tokens = plots.draw_roll(side=16).axes[4].collections[0].get_array()
    assert np.bincount(tokens.ravel()).tolist() == [0, 32, 192, 32]     # frame 1, after the roll
    mask = plots.draw_sequence().axes[1].collections[0].get_array()
    assert mask.sum() == 3 * 24 * 22                        # three frames, 2 of 24 keys are padding
    counts = [frames.sum(dim=(1, 2)).tolist() for _, frames in plots.spread_states(T=3, side=8)]
    assert counts == [[0, 64, 0], [8, 48, 8], [64, 64, 64]]


def test_sheet_names_classes_and_marks_answers(plots):
    assert plots.describe({"label": 1}, ["run", "jump"]) == ["✓ jump"]
    row = {"question": "what?", "options": ["a", "b"], "answer": 1}
    assert plots.describe(row, []) == ["what?", "   a", "✓ b"]
    write_clips(*QUESTIONS)
    figure = plots.draw_sheet(".", "test", 8)
    assert ["✓ red" in axes.texts[0].get_text() for axes in figure.axes] == [True, True]


def test_plots_without_matplotlib_is_one_line():
    code = "import sys; sys.modules['matplotlib'] = None; import tools.plots"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=MAIN)
    assert done.stderr == "plots.py needs matplotlib: pip install matplotlib\n"


# ---- bench ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_batch():
    """(config, ways in eval mode, a batch)."""
    config, ways = bench.make_ways("toy")
    for way in ways.values():
        way.eval()
    return config, ways, bench.make_batch(config, 7)


def test_plain_computes_what_ours_does(toy_batch):
    """Also for a text that it pads."""
    config, ways, batch = toy_batch
    ids = batch["input_ids"][:, 0, :10]
    with torch.inference_mode():
        assert_close(ways["plain"](batch), ways["ours"](batch), 1e-5)
        ours = ways["ours"].read(batch["frames"], ids, ids >= 0)
        plain = ways["plain"].read(batch["frames"], ids, ids >= 0)
    assert_close(plain.pooled, ours.pooled, 1e-5)
    assert_close(plain.text[:, :10], ours.text, 1e-5)


def test_vilt_reads_pictures_as_transformers_does(toy_batch):
    pytest.importorskip("transformers")
    config, ways, batch = toy_batch
    frames = batch["frames"]
    ids = batch["input_ids"][:, 0]
    with torch.inference_mode():
        pooled, _ = ways["ViLT"].read(frames, ids, ids >= 0)
        pixels = frames.flatten(0, 1) / 127.5 - 1
        ids = ids.repeat_interleave(3, 0)
        theirs = ways["ViLT"].vilt(ids, ids >= 0, pixel_values=pixels).pooler_output
    assert_close(pooled, theirs.unflatten(0, (-1, 3)).mean(dim=1), 1e-5)


def test_step_flops_are_those_that_torch_counts(toy_batch):
    config, ways, batch = toy_batch
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ways["ours"](batch)
    forward = bench.step_flops(config) / 3                  # backward is twice forward
    assert math.isclose(counter.get_total_flops() / 7, forward, rel_tol=1e-3)


def test_methods_take_turns_in_changing_order():
    called = []
    runs = {name: lambda name=name: called.append(name) for name in "abcd"}
    bench.take_turns(runs, time.perf_counter, budget=10)
    rounds = np.reshape(called, (15, 4))
    assert (np.sort(rounds) == list("abcd")).all()
    assert len(np.unique(rounds, axis=0)) > 1
    times = bench.take_turns(runs, time.perf_counter, budget=0)
    assert [len(seconds) for seconds in times.values()] == [3] * 4


def test_a_trace_gives_kernel_time_and_host_waits():
    events = [{"cat": "kernel", "dur": 300},
              {"cat": "gpu_memcpy", "dur": 100},
              {"cat": "gpu_user_annotation", "dur": 900},
              {"cat": "cuda_runtime", "name": "cudaStreamSynchronize"},
              {"cat": "cuda_runtime", "name": "cudaLaunchKernel"}]
    busy, stops = bench.read_trace(events)
    assert math.isclose(busy, 400e-6) and stops == 1


def test_long_files_repeat_their_first_frames():
    bench.encode("long.mp4", seed=0, count=30, repeats=3)
    frames = read_frames("long.mp4", lambda times: range(len(times)))
    assert torch.equal(frames, frames[:30].repeat(3, 1, 1, 1))
    assert np.array_equal(bench.decode_all("long.mp4", [3, 44, 89], None), frames[[3, 44, 89]])


def test_exact_methods_are_marked_and_absent_ones_left_out(monkeypatch):
    bench.encode("a.mp4", seed=0, count=40)
    wrong = {"ours": bench.ours, "other": lambda path, numbers, R: bench.ours(path, [0, 1], R)}
    wrong["decord"] = lambda path, numbers, R: __import__("no_such_package")
    monkeypatch.setattr(bench, "METHODS", wrong)
    marks, runs = bench.check_methods("a.mp4", [5, 20])
    assert marks == {"ours": "=", "other": "!", "decord": "absent"}
    assert list(runs) == ["ours", "other"]


@cases("words, message", """
loader --workers 0      | --workers
data --rows 999         | --rows 999: must be
video                   | give files
video /no/such/file.mp4 | file.mp4
""")
def test_bench_names_bad_arguments(command, words, message):
    with one_line(message):
        command(bench.main, *words.split())


LAB = MAIN / "lab"


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script here, as `python SCRIPT ARGS` does: (exit code, stdout, stderr)."""
    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = int(end.code)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def check_answers(run_script):
    """Run check.py on the solutions with other code at their end."""
    def check(code, *names):
        write({"mine.py": f"{(LAB / 'solutions.py').read_text()}\n\n{code}"})
        return run_script(LAB / "check.py", *names, "--module", "mine.py")

    return check


def test_all_solutions_are_right(run_script):
    code, out, _ = run_script(LAB / "check.py", "--module", LAB / "solutions.py")
    assert (code, out.splitlines()[-1]) == (0, "9 of 9 right")


def test_every_exercise_is_wrong_before_it_is_solved(run_script):
    code, out, err = run_script(LAB / "check.py")
    assert (code, out.splitlines()[-1], err) == (1, "0 of 9 right", "")
    assert "\nranks: NotImplementedError  (line " in out
    assert "\nembed_with_time: wrong; to see hints, check it by its name\n0 of 9 right\n" in out


# Wrong code of a student, below lines that its check prints; these are all of its hints.
MISTAKES = '''
# hint: rolled the wrong way
# it changed its input
def roll_tokens(x, forward, backward):
    x[:, :, forward] = x[:, :, forward].roll(-1, dims=1)
    x[:, :, backward] = x[:, :, backward].roll(1, dims=1)
    return x

# hint: roll along the axis of frames alone: give roll() its dims
def roll_tokens(x, forward, backward):
    out = x.clone()
    out[:, :, forward] = x[:, :, forward].roll(1)
    out[:, :, backward] = x[:, :, backward].roll(-1)
    return out

# hint: tokens that do not roll pass their gradient on unchanged
def roll_gradient(grad, forward, backward):
    return grad.roll(1, dims=1)

# roll_groups: forward: 4 of 4
# backward: 4 of 4
# hint: CLS moves
right = roll_groups
def roll_groups(*shape):
    forward, backward = right(*shape)
    return forward - 1, backward - 1

# roll_groups: forward: numbers of type float32, expected numbers of type int64
# backward: numbers of type float32, expected numbers of type int64
# hint: an empty tensor is float32 unless you give dtype=torch.int64
# called with 2, 2, 0.25, block
right = roll_groups
def roll_groups(*shape):
    forward, backward = right(*shape)
    if len(forward) == 0:
        return torch.tensor([]), torch.tensor([])
    return forward, backward

# hint: these are the starts of the segments
# called with 17, 4, eval, Gen
def frame_indices(num_frames, T, mode, rng=None):
    return [t * num_frames // T for t in range(T)]

# hint: linspace(0, num_frames - 1, T) is not the middles of T segments
def frame_indices(n, T, mode, rng=None):
    return np.linspace(0, n - 1, T).astype(int).tolist()

# hint: a segment has length num_frames / T, not num_frames // T
def frame_indices(n, T, mode, rng=None):
    return [int((t + 0.5) * (n // T)) for t in range(T)]

# hint: place p lies in frame floor(p); do not round
def frame_indices(n, T, mode, rng=None):
    return [round((t + 0.5) * n / T) for t in range(T)]

# hint: padding gets attention: mask the keys
def attention(q, k, v, mask):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask.mT, -1e9).softmax(-1) @ v

# hint: the weights of a query do not sum to 1: mask before the softmax
def attention(q, k, v, mask):
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) * mask) @ v

# hint: fill with -inf; other scores can be below a finite number
def attention(q, k, v, mask):
    return (q @ k.mT / q.shape[-1] ** 0.5 * mask).softmax(-1) @ v

# hint: fill with -inf; other scores can be below a finite number
def attention(q, k, v, mask):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -100).softmax(-1) @ v

# hint: softmax runs over the keys
def attention(q, k, v, mask):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-2) @ v

# hint: this is the mean over all words
def mlm_loss(scores, labels):
    masked = labels >= 0
    losses = scores[masked].log_softmax(-1).gather(1, labels[masked, None])
    return -losses.sum() / labels.numel()

# hint: this is the mean of the means of the texts; each masked word counts the same
def mlm_loss(scores, labels):
    means = []
    for row, words in zip(scores, labels):
        if (words >= 0).any():
            right = row.log_softmax(-1)[words >= 0]
            means.append(-right.gather(1, words[words >= 0, None]).mean())
    return torch.stack(means).mean()

# hint: word 0 is a word: use labels >= 0
def mlm_loss(scores, labels):
    masked = labels > 0
    losses = scores[masked].log_softmax(-1).gather(1, labels[masked, None])
    return -losses.mean()

# mlm_loss: it returned an int, expected a Tensor
right = mlm_loss
def mlm_loss(scores, labels):
    return right(scores, labels) if (labels >= 0).any() else 0

# hint: this is one direction
def contrastive_loss(text, video, temperature):
    return -(text @ video.T / temperature).log_softmax(1).diagonal().mean()

# hint: ties count as perfect
def ranks(scores, target):
    own = scores[np.arange(len(scores)), target]
    return 1.0 + (scores > own[:, None]).sum(1)

# hint: argsort breaks ties by position; equal scores must share the mean of their places
def ranks(scores, target):
    order = (-scores).argsort(1)
    return 1.0 + (order == target[:, None]).argmax(1)

# hint: places better + 1 to better + equal have the mean better + (equal + 1) / 2
right = ranks
def ranks(scores, target):
    return right(scores, target) - 0.5

# numbers of type int64
def ranks(scores, target):
    own = scores[np.arange(len(scores)), target]
    return 1 + (scores > own[:, None]).sum(1)

# hint: CLS is token 0
def embed_with_time(x, time_embed):
    return x + time_embed[:x.shape[1], None]
'''


@cases("case", MISTAKES.strip().split("\n\n"))
def test_common_mistakes_get_their_hints(check_answers, case):
    name = re.search(r"def (\w+)", case)[1]
    code, out, err = check_answers(case, name)
    assert (code, out.splitlines()[-1], err) == (1, "0 of 1 right", "")
    assert out.startswith(f"{name}: ") and out.count("hint: ") == case.count("hint: ")
    for line in re.findall("^# (.*)", case, re.M):
        assert line in out


def test_the_example_of_the_readme_is_what_check_prints(check_answers):
    code = "right = roll_tokens\ndef roll_tokens(x, a, b):\n    return right(x, b, a)\n"
    _, out, _ = check_answers(code, "roll_tokens")
    assert out.removesuffix("0 of 1 right\n") in (LAB / "README.md").read_text(encoding="utf-8")


@cases("code, line", [
    ("ranks = None", "ranks: there is no such function"),
    ("def ranks(a, b):\n    return a.nothing\n",
     "ranks: AttributeError 'numpy.ndarray' object has no attribute 'nothing' (line N of mine.py)"),
    ("def ranks(a):\n    pass\n",
     "ranks: TypeError ranks() takes 1 positional argument but 2 were given (mine.py)"),
    ("def ranks(a, b):\n    pass\n", "ranks: it returned a NoneType, expected an ndarray")
])
def test_failing_code_of_a_student_is_one_line(check_answers, code, line):
    _, out, err = check_answers(code, "ranks")
    out = re.sub(r"line \d+", "line N", out)
    assert (out, err) == (f"{line}\n0 of 1 right\n", "")


@cases("code, name, line", [
    ("def ranks(:\n", "ranks", "SyntaxError invalid syntax (mine.py, line N)\n"),
    ("", "roll", "exercise roll is unknown; choose from roll_tokens, ")
])
def test_what_check_cannot_run_is_one_line(check_answers, code, name, line):
    code, out, err = check_answers(code, name)
    assert (code, out) == (2, "")
    assert re.sub(r"line \d+", "line N", err).startswith(f"check.py: {line}")


def test_walkthrough_shows_the_tensors_in_79_columns(run_script):
    code, out, err = run_script(LAB / "walkthrough.py")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 79
    assert "    frame 0    0 | 0000000000000000    0 | 2010020110200102\n" in out
    assert "    after block 0, frame 0: 01..4\n    after block 0, frame 1: 012..\n" in out
    assert out.count("01234\n") == 5                        # after block 1: everything
    assert out.splitlines()[-11].startswith("with T = 5")   # the README shows `tail -11`
    assert "\nw word, C CLS, digit: the frame a patch came from\n" in out


def test_python_in_the_readme_prints_what_the_answers_state(run_script):
    text = (LAB / "README.md").read_text(encoding="utf-8")
    questions = re.findall(r"```python\n(.*?)```", text, re.S)
    text = (LAB / "answers.md").read_text(encoding="utf-8")
    answers = re.findall(r"```text\n(.*?)```", text, re.S)
    assert len(questions) == len(answers) > 4
    for question, answer in zip(questions, answers):
        write({"question.py": question})
        assert run_script("question.py") == (0, answer, "")


# ---- random_order --------------------------------------------------------------------------------


def test_random_order_rolls_patches_alone():
    """Of 9 words and CLS none, of 16 patches as many as the groups have."""
    frame_of = torch.arange(3).view(1, 3, 1, 1).expand(1, 3, 26, 96)
    groups = roll_groups(4, 4, 0.5)
    moved = random_order.roll_random(frame_of, *groups) != frame_of
    assert moved[:, :, 10:].sum() == moved.sum() == 3 * 8 * 96
