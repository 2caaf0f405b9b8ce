"""All-in-one (arXiv 2203.07303): one transformer that reads raw frames and words together. No video encoder, no text
encoder, no fusion module: a patch embedding, a word embedding, twelve blocks, and token rolling between frames.

Checked against the released model's outputs (random weights, shuffle off), the golden sizes and Hugging Face's ViLT.

    python allinone.py             the sizes: parameters, multiply-adds, milliseconds on this machine
    python allinone.py --bench     times and memory beside a plain reference, and beside what this machine can do
    python allinone.py --svg figures/sequence.svg       the joint sequence and who looks at whom, as a picture

Axes, the same letters in every file:
    B clips · T frames · L text tokens · N visual tokens per frame, CLS included · S = L + N · D width · H heads
    K = D // H · R image side · P patch side · A answers or options · V vocabulary (in data.py: views)
"""
import os
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # before the first tensor: huge pages, or a CPU spends more time
import argparse                                         # on getting memory than on arithmetic that fills it
import contextlib
import math
import multiprocessing
import re
import sys
import warnings
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rolling import FRAMES, LINE, SOFT, Permute, box, label, roll_groups, roll_index, roll_tokens, svg


class UserError(ValueError):
    """A mistake that a user can mend: one line with what, the value, what is allowed and the next command."""


def run_main(script, main):
    """main(); a UserError is one line and exit code 2, Ctrl-C is 130; a reader who closes the pipe early (| head) is no
    mistake."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def writing(path, otherwise="choose another place"):
    """Whatever hinders writing becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; make room there, or {otherwise}") from None


# ---- sizes ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """What a model is built from. Defaults are the paper's base model (ViT-B/16, bert-base-uncased)."""
    width: int = 768                # D
    layers: int = 12
    heads: int = 12                 # H
    image: int = 224                # R, pixels
    patch: int = 16                 # P, pixels
    frames: int = 3                 # T at most: so many time embeddings are learnt
    words: int = 40                 # L at most, [CLS] and [SEP] included
    vocab: int = 30522              # V, of the tokenizer in use
    answers: int = 0                # A, size of the closed answer list (0: no such head)
    embed: int = 512                # width of the contrastive space
    roll: str = "spread"            # layout of the rolled tokens: spread, block or none
    fraction: float = 1 / 4         # share of the tokens that roll, half of it each way
    roll_unimodal: bool = False     # roll in video-only runs too (not released)
    time: bool = True               # add time embeddings to the patches
    dropout: float = 0.1            # after embeddings, attention output and both MLP layers
    drop_path: float = 0.1          # of the last block; rises linearly from 0 at the first
    std: float = 0.02               # of matrices and tables at the start, time 0, as released; narrow models learn from
                                    # scratch only with 0: matrices 1 / sqrt(fan-in), tables and time 1

    def __post_init__(self):
        for big, small in (("width", "heads"), ("image", "patch")):
            if getattr(self, big) % getattr(self, small):
                raise UserError(f"{big} {getattr(self, big)} is not a multiple of {small} {getattr(self, small)}")
        for name, most in (("dropout", 0.2), ("drop_path", 0.9)):               # 5 x dropout before the answers
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"{name} {getattr(self, name)}: a number from 0 to {most} is needed")
        roll_groups(1, 1, self.fraction, self.roll)         # names a bad layout or fraction

    @property
    def grid(self):
        return self.image // self.patch


SIZES = {
    "toy": Config(width=96, layers=4, heads=4, image=32, patch=8, dropout=0.0, drop_path=0.0, std=0.0),
    "tiny": Config(width=192, heads=3),                     # 11.43 M parameters without the MLM head
    "small": Config(width=384, heads=6),                    # 33.55 M
    "base": Config(),                                       # 109.87 M
}


def millions(model):
    """10^6 parameters."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def gmacs(config, L=40, T=None):
    """10^9 multiply-adds of the joint forward of one clip: T frames, each with L words; matrix products only."""
    D, N, T = config.width, 1 + config.grid ** 2, T or config.frames
    S = L + N
    per_frame = config.layers * (12 * S * D * D + 2 * S * S * D) + (N - 1) * 3 * config.patch ** 2 * D
    return (T * per_frame + D * D) / 1e9


# ---- the block ------------------------------------------------------------------------------------------------------

def dropout(x, p, training):
    """F.dropout; on a CPU with cheaper random bits. There F.dropout's are a quarter of a small model's training step.

    x any shape and float dtype -> the same. Each number is 0 with probability p, rounded to 1/65536: one 64-bit draw of
    torch's generator decides four of them. The others are scaled up, by what keeps the expectation exact.
    """
    if not (training and p) or x.device.type != "cpu":
        return F.dropout(x, p, training)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.long).random_(-2 ** 63, None).view(torch.short)     # every bit
    lost = round(p * 2 ** 16)
    kept = (bits[:x.numel()] >= lost - 2 ** 15).view(x.shape)
    return torch.where(kept, x, 0).mul_(2 ** 16 / (2 ** 16 - lost))


ONEDNN = torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """nn.Linear. On a CPU, without gradients: the same product by oneDNN, which took 0.8 to 0.9 of the time of the BLAS
    that PyTorch gives it to (2 cores of an AMD EPYC). In training, or with a small matrix, it saves nothing."""

    def forward(self, x):
        usual = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        if usual or x.device.type != "cpu" or x.dtype != torch.float32 or self.weight.numel() < 2 ** 17 or not ONEDNN:
            return super().forward(x)
        return F.linear(x.to_mkldnn(), self.weight, self.bias).to_dense()


class Block(nn.Module):
    """Pre-norm ViT block. It sees one frame (with the words) at a time: rows of x are frames, not clips."""

    def __init__(self, D, heads, dropout, drop_path):
        super().__init__()
        self.heads, self.dropout, self.drop_path = heads, dropout, drop_path
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.qkv = Linear(D, 3 * D)
        self.proj = Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.fc1 = Linear(D, 4 * D)
        self.fc2 = Linear(4 * D, D)

    def forward(self, x, keep, maps=None, first=None):
        """x (B*T, S, D); keep (B*T, 1, 1, S) bool, True at tokens that may be looked at, or None for all.
        first: only so many tokens are wanted out of this block; all are looked at. None: all.
        A list given as `maps` receives the attention (B*T, H, S, S)."""
        x = x[:, :first] + self.drop(self.attention(self.norm1(x), keep, maps, first))
        return x + self.drop(self.mlp(self.norm2(x)))

    def attention(self, x, keep, maps, first):
        rows, S, D = x.shape
        q, k, v = self.qkv(x).view(rows, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)       # each (B*T, H, S, K)
        q = q[:, :, :first]
        if maps is None:
            x = F.scaled_dot_product_attention(q, k, v, keep)
        else:                                               # the same in two steps, for whoever wants to see it
            scores = q @ k.transpose(-1, -2) / math.sqrt(D // self.heads)
            maps.append((scores if keep is None else scores.masked_fill(~keep, -math.inf)).softmax(-1))
            x = maps[-1] @ v
        return dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)

    def mlp(self, x):
        x = dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return dropout(self.fc2(x), self.dropout, self.training)

    def drop(self, branch):
        """Drop path: in training, leave a frame's branch out with probability drop_path and scale up the others."""
        if not (self.training and self.drop_path):
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * (kept / (1 - self.drop_path)).to(branch.dtype)


# ---- the model ------------------------------------------------------------------------------------------------------

class Output(NamedTuple):
    pooled: Tensor                  # (B, D), tanh(dense(text CLS)) for the heads that score a clip with its text
    text: Tensor                    # (B, L, D), mean over the frames
    video: Tensor                   # (B, N, D), mean over the frames, CLS at slot 0


HEADS = ("matching", "mlm", "answer", "choice", "rank", "contrast", "probe")


class AllInOne(nn.Module):
    """The model of the paper, section 3. `heads`: names out of HEADS; "answer" needs config.answers."""

    def __init__(self, config, heads=()):
        super().__init__()
        if unknown := set(heads) - set(HEADS):
            raise UserError(f"heads {sorted(unknown)} are unknown; choose from {', '.join(HEADS)}")
        D, V = config.width, config.vocab
        self.config = config
        self.word = nn.Embedding(V, D)
        self.word_position = nn.Parameter(torch.zeros(config.words, D))
        self.segment = nn.Parameter(torch.zeros(2, D))      # BERT's table of two; row 1 is never used
        self.word_norm = nn.LayerNorm(D, eps=1e-12)
        self.modality = nn.Parameter(torch.zeros(2, D))     # added to words (row 0) and to visual tokens (row 1)
        self.patch = nn.Conv2d(3, D, config.patch, stride=config.patch)
        self.cls = nn.Parameter(torch.zeros(D))
        self.position = nn.Parameter(torch.zeros(1 + config.grid ** 2, D))
        self.time = nn.Parameter(torch.zeros(config.frames, D))
        self.blocks = nn.ModuleList(
            Block(D, config.heads, config.dropout, config.drop_path * i / max(1, config.layers - 1))
            for i in range(config.layers))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.pool = nn.Linear(D, D)
        build = {                                           # default dropout: 0.5 before answers, 0.1 before choices
            "matching": lambda: nn.Linear(D, 2),            # column 1: the text belongs to the clip
            "mlm": lambda: nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D, eps=1e-12), nn.Linear(D, V)),
            "answer": lambda: nn.Sequential(nn.Dropout(5 * config.dropout), nn.Linear(D, D // 2), nn.LayerNorm(D // 2),
                                            nn.GELU(), nn.Linear(D // 2, config.answers)),
            "choice": lambda: nn.Sequential(nn.Dropout(config.dropout), nn.Linear(D, 256), nn.LayerNorm(256), nn.GELU(),
                                            nn.Linear(256, 1)),
            "rank": lambda: nn.Linear(D, 1),                # zero-shot multiple choice: starts as row 1 of matching
            "contrast": lambda: nn.ModuleDict({side: nn.Linear(D, config.embed) for side in ("text", "video")}),
            "probe": lambda: nn.Linear(D, config.answers),  # actions, on a frozen backbone
        }
        self.heads = nn.ModuleDict({name: build[name]() for name in HEADS if name in heads})
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])        # ImageNet's
        self.register_buffer("scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(3, 1, 1), persistent=False)
        self.checkpointing = False                          # recompute blocks in backward: less memory, more time
        self.init_weights()

    def init_weights(self):
        """Normal with config.std; biases 0, LayerNorm 1 and 0, time 0: the released start. std 0: see Config.
        Differs: its patch convolution keeps PyTorch's default (std 0.0208 at base size)."""
        std, matrices = self.config.std, {m.weight for m in self.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        for name, p in self.named_parameters():
            if name.endswith("bias") or name == "time" and std:
                nn.init.zeros_(p)
            elif p.dim() > 1 or name == "cls":
                nn.init.normal_(p, std=std or (p[0].numel() ** -0.5 if p in matrices else 1.0))
        if "rank" in self.heads and "matching" in self.heads:
            self.rank_from_matching()

    @torch.no_grad()
    def rank_from_matching(self):
        self.heads["rank"].weight.copy_(self.heads["matching"].weight[1:])
        self.heads["rank"].bias.copy_(self.heads["matching"].bias[1:])

    # -- embeddings

    def embed_words(self, words):
        """words (B, L) token ids -> (B, L, D)."""
        L = words.shape[1]
        if L > self.config.words:
            raise ValueError(f"texts of {L} tokens; this model has positions for {self.config.words}")
        x = self.word_norm(self.word(words) + self.word_position[:L] + self.segment[0])
        return dropout(x, self.config.dropout, self.training) + self.modality[0]

    def embed_frames(self, frames):
        """frames (B, T, 3, R, R), uint8 RGB or already normalised floats -> (B, T, N, D), CLS first, then patches in
        raster order. Embed once, then use with as many texts as there are (options, captions)."""
        B, T = frames.shape[:2]
        if not 1 <= T <= self.config.frames:
            raise ValueError(f"clips of {T} frames; this model has time embeddings for 1 to {self.config.frames}")
        frames = frames.flatten(0, 1)
        if frames.dtype == torch.uint8:
            frames = frames.to(self.scale.dtype) * self.scale + self.shift
        x = self.patch(frames)                                                              # (B*T, D, rows, cols)
        x = x.flatten(2).transpose(1, 2).unflatten(0, (B, T))                               # (B, T, N-1, D)
        position = resize_positions(self.position, frames.shape[-2] // self.config.patch,
                                    frames.shape[-1] // self.config.patch)
        x = x + position[1:] + (self.time[:T, None] if self.config.time else 0)     # time on patches only, as released
        cls = (self.cls + position[0]).expand(B, T, 1, -1)
        x = dropout(torch.cat([cls, x], 2), self.config.dropout, self.training)
        return x + self.modality[1]

    # -- the three runs: joint, text alone, video alone

    def forward(self, frames, words, keep=None, maps=None):
        """Frames and words through the blocks together.

        frames  (B, T, 3, R, R) uint8 or normalised floats, 1 <= T <= config.frames
        words   (B, L) token ids;  keep (B, L) bool, True at real words, None: all are
        ->      Output(pooled (B, D), text (B, L, D), video (B, N, D))
        Source: paper section 3; equal to the released model with its patch shuffle off (layout "block").
        """
        return self.fuse(self.embed_frames(frames), words, keep, maps)

    def fuse(self, video, words, keep=None, maps=None, first=None):
        """forward, for frames that are embedded already: video (B, T, N, D). first: the number of tokens wanted out of
        the last block, 1 for pooled alone, L for the words too: that block's MLP then runs on these only."""
        B, T, N, D = video.shape
        L = words.shape[1]
        text = self.embed_words(words)
        x = torch.cat([text[:, None].expand(B, T, L, D), video], 2)                         # (B, T, S, D)
        if keep is not None:
            keep = F.pad(keep, (0, N), value=True)[:, None].expand(B, T, L + N)             # visual tokens always
        x = self.run(x, keep, slots=L, maps=maps, first=first)
        return Output(torch.tanh(self.pool(x[:, 0])), x[:, :L], x[:, L:])

    def encode_text(self, words, keep=None):
        """words (B, L), keep (B, L) -> (B, config.embed): the projected CLS of the words on their own.
        Differs: the released code runs T identical copies."""
        x = self.run(self.embed_words(words)[:, None], None if keep is None else keep[:, None], first=1)
        return self.heads["contrast"]["text"](x[:, 0])

    def encode_video(self, frames):
        """frames (B, T, 3, R, R) -> (B, config.embed): the projected CLS of the frames on their own."""
        x = self.run(self.embed_frames(frames), slots=0 if self.config.roll_unimodal else None, first=1)
        return self.heads["contrast"]["video"](x[:, 0])

    def run(self, x, keep=None, slots=None, maps=None, first=None):
        """The blocks, the final norm and the mean over frames: x (B, T, S, D), keep (B, T, S) -> (B, first or S, D).
        slots: where the visual tokens begin, to roll them; None: nothing rolls. first: tokens wanted, None: all."""
        B, T, S, D = x.shape
        index = None
        if slots is not None and T > 1:
            side = math.isqrt(S - slots - 1)
            groups = roll_groups(side, side, self.config.fraction, self.config.roll)
            if len(groups[0]):
                index = roll_index(B, T, S, *(slots + g.to(x.device) for g in groups))
        if keep is not None:
            keep = keep.reshape(B * T, 1, 1, S)
        for i, block in enumerate(self.blocks):
            if index is not None:
                x = Permute.apply(x.view(B, T, S, D), *index)
            wanted = first if i + 1 == len(self.blocks) else None
            x = x.view(B * T, S, D)
            if self.checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, keep, None, wanted, use_reentrant=False)
            else:
                x = block(x, keep, maps, wanted)
        return self.norm(x).unflatten(0, (B, T)).mean(1)


def resize_positions(position, rows, cols):
    """position (1 + g * g, D), CLS first -> (1 + rows * cols, D), bicubic; itself where the grid is g x g."""
    g = math.isqrt(len(position) - 1)
    if (rows, cols) == (g, g):
        return position
    grid = position[1:].view(1, g, g, -1).permute(0, 3, 1, 2)                               # (1, D, g, g)
    grid = F.interpolate(grid, (rows, cols), mode="bicubic", align_corners=False)
    return torch.cat([position[:1], grid[0].flatten(1).T])


# ---- weight import --------------------------------------------------------------------------------------------------

class Source(NamedTuple):
    sign: str                       # the name of a tensor that gives it away
    rows: list                      # (how names begin, our name for that) or (how names begin, None, why left out)
    new: tuple = ()                 # what such a file cannot hold, besides heads
    note: str = ""                  # what differs even where every tensor loads


def under(prefix, *rows):
    return [(prefix + begins, *rest) for begins, *rest in rows]


TEXT = [(r"word_embeddings\.", "word."), (r"position_embeddings\.weight$", "word_position"),
        (r"token_type_embeddings\.weight$", "segment"), (r"LayerNorm\.", "word_norm."),
        (r"position_ids$", None, "a constant")]
VIT = [(r"cls_token$", "cls"), (r"pos_embed$", "position"), (r"patch_embed\.proj\.", "patch."), (r"norm\.", "norm."),
       (r"blocks\.(\d+)\.(?:attn\.|mlp\.)?(norm1|qkv|proj|norm2|fc1|fc2)\.", r"blocks.\1.\2."),
       (r"dist_token$", None, "no distillation token here, nor its position"),
       (r"(head|head_dist|pre_logits|fc_norm)\.", None, "of an image classifier")]
MLM = [(r"transform\.dense\.", "heads.mlm.0."), (r"transform\.LayerNorm\.", "heads.mlm.2."),
       (r"decoder\.", "heads.mlm.3."), (r"bias$", "heads.mlm.3.bias")]
VILT = r"(?:vilt\.)?"
SOURCES = {                         # the first row that fits a name decides; /i marks part i of a fused tensor
    "ours": Source(r"blocks\.0\.qkv\.weight$", [("", "")]),
    "all-in-one": Source(r"transformer\.blocks\.0\.attn\.qkv\.weight$", [
        *under(r"text_embeddings\.", *TEXT), *under(r"transformer\.", *VIT), *under(r"mlm_score\.", *MLM),
        (r"transformer\.temporal_embed$", "time"), (r"token_type_embeddings\.weight$", "modality"),
        (r"pooler\.dense\.", "pool."), (r"itm_score\.fc\.", "heads.matching."), (r"rank_output\.", "heads.rank."),
        (r"vqa_classifier\.", "heads.answer."), (r"mc_vqa_classifier\.", "heads.choice."),
        (r"txt_proj\.", "heads.contrast.text."), (r"vid_proj\.", "heads.contrast.video.")]),
    "vit": Source(r"blocks\.0\.attn\.qkv\.weight$", VIT,
                  new=("word", "word_position", "segment", "word_norm", "modality", "time", "pool")),
    "vilt": Source(VILT + r"encoder\.layer\.0\.attention\.attention\.query\.weight$", [     # Hugging Face's names
        *under(VILT + r"embeddings\.text_embeddings\.", *TEXT),
        *under(VILT + r"embeddings\.",
               (r"token_type_embeddings\.weight$", "modality"), (r"cls_token$", "cls"),
               (r"position_embeddings$", "position"), (r"patch_embeddings\.projection\.", "patch.")),
        *under(VILT + r"encoder\.layer\.(\d+)\.",
               (r"layernorm_before\.", r"blocks.\1.norm1."), (r"layernorm_after\.", r"blocks.\1.norm2."),
               (r"attention\.attention\.query\.(weight|bias)$", r"blocks.\1.qkv.\2/0"),
               (r"attention\.attention\.key\.(weight|bias)$", r"blocks.\1.qkv.\2/1"),
               (r"attention\.attention\.value\.(weight|bias)$", r"blocks.\1.qkv.\2/2"),
               (r"attention\.output\.dense\.", r"blocks.\1.proj."),
               (r"intermediate\.dense\.", r"blocks.\1.fc1."), (r"output\.dense\.", r"blocks.\1.fc2.")),
        *under(VILT, (r"layernorm\.", "norm."), (r"pooler\.dense\.", "pool.")), *under(r"mlm_score\.", *MLM),
        (r"rank_output\.", "heads.rank."), (r"classifier\.", None, "a head of another shape")],
        new=("time",), note="ViLT was trained with LayerNorm eps 1e-12 in blocks (here 1e-6) and pixels in -1..1"),
}
# Classes that Lightning and DeiT files name beside the tensors. A plain dict stands in, so none of their code runs.
HARMLESS = [argparse.Namespace, (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
            (dict, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def read_weights(path):
    """Open a checkpoint, told apart by its tensor names, and execute nothing in it.

    ->  (source, tensors, meta): a key of SOURCES; {the file's name: tensor}; and what else our own files hold (config,
        heads, answers, task, ...; of other files {})
    Raises UserError: no file, cut short, not a checkpoint, another architecture, or more in it than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a .pt, .pth, .bin, .ckpt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            data = load_file(path)
        else:                       # mapped, not read: two thirds of our own files are the optimiser's
            with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(HARMLESS):
                data = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except ImportError:
        raise UserError(f"{path} needs one more package: pip install safetensors") from None
    except Exception as error:      # a broken file can break the reader in any way
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path} names {foreign[1]}, which only executing its pickle could load; that is never "
                            "done: ask its author for the state dict alone, best as .safetensors") from None
        raise UserError(f"{path} is cut short or not a checkpoint ({type(error).__name__}); fetch or copy it again, or "
                        "save the state dict alone with torch.save") from None
    data = data if isinstance(data, dict) else {}
    inside = next((key for key in ("state_dict", "model") if isinstance(data.get(key), dict)), None)
    tensors = data[inside] if inside else data
    if not tensors or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items()):
        raise UserError(f"{path} holds no state dict, bare or under state_dict or model; save one with torch.save")
    source = next((s for s in SOURCES if any(re.match(SOURCES[s].sign, name) for name in tensors)), None)
    if source is None:
        raise UserError(f"{path} is another architecture ({', '.join(list(tensors)[:3])}, ...); "
                        f"what loads: {', '.join(SOURCES)}")
    return source, tensors, {k: v for k, v in data.items() if k != inside} if source == "ours" and inside else {}


def rename(path, source, tensors):
    """The file's tensors as this model calls and shapes them: named {our name: tensor}, origin {our name: the file's
    names}, dropped {the file's name: why}."""
    parts, origin, dropped, unknown = {}, {}, {}, []
    for name, tensor in tensors.items():
        row = next((row for row in SOURCES[source].rows if re.match(row[0], name)), None)
        if row is None:
            unknown.append(name)
        elif row[1] is None:
            dropped[name] = row[2]
        else:
            new, _, part = re.sub("^" + row[0], row[1], name).partition("/")
            twin = parts.setdefault(new, {}).setdefault(part, tensor)
            if twin is not tensor and not torch.equal(twin, tensor):
                raise UserError(f"{path} has two different tensors for {new}: {', '.join(origin[new])} and {name}")
            origin.setdefault(new, []).append(name)
    if unknown:
        raise UserError(f"{path} looks like {source}, but is another architecture: {len(unknown)} unknown tensors, "
                        f"{', '.join(unknown[:3])}")
    named = {new: torch.cat([many[i] for i in sorted(many)]) if len(many) > 1 else many[min(many)]
             for new, many in parts.items()}
    if any(name.endswith("dist_token") for name in dropped) and "position" in named:
        named["position"] = named["position"].flatten(0, -2)[[0, *range(2, named["position"].shape[-2])]]
    for new in {"cls", "position", "time"} & set(named):    # elsewhere these have axes of length 1 in front
        named[new] = named[new].flatten() if new == "cls" else named[new].flatten(0, -2)
    return named, origin, dropped


def read_shapes(path, named):
    """The fields of Config that shapes show. The number of heads does not: a named size's, else D // 64."""
    if lost := {"patch.weight", "position", "blocks.0.norm1.weight"} - set(named):
        raise UserError(f"{path} lacks {', '.join(sorted(lost))}")
    if named["patch.weight"].dim() != 4:
        raise UserError(f"{path} has patch weights of shape {tuple(named['patch.weight'].shape)}, not (D, 3, P, P)")
    D, patch, patches = *named["patch.weight"].shape[::3], len(named["position"]) - 1
    if math.isqrt(patches) ** 2 != patches:
        raise UserError(f"{path} has positions for CLS and {patches} patches; only a square of patches can be loaded")
    fields = {"width": D, "patch": patch, "image": math.isqrt(patches) * patch,
              "layers": len({name.split(".")[1] for name in named if name.startswith("blocks.")}),
              "heads": next((size.heads for size in SIZES.values() if size.width == D), max(1, D // 64))}
    for field, name in (("frames", "time"), ("words", "word_position"), ("vocab", "word.weight"),
                        ("answers", "heads.answer.4.bias"), ("answers", "heads.probe.bias"),
                        ("embed", "heads.contrast.text.bias")):
        if name in named:
            fields[field] = len(named[name])
    return fields


def read_config(path, **changes):
    """The Config of a checkpoint: its own, or what its shapes show and Config's defaults; then `changes` on top
    (frames, words, image, roll, ...). Raises UserError as read_weights does."""
    source, tensors, meta = read_weights(path)
    fields = meta.get("config") or read_shapes(path, rename(path, source, tensors)[0])
    if foreign := set(fields) - set(Config.__dataclass_fields__):
        raise UserError(f"{path} has config fields {sorted(foreign)} of another version; update this code to load it")
    return Config(**{**fields, **changes})


def load_weights(model, path, answers=None):
    """Fill a fresh model from a checkpoint of any of SOURCES and say exactly what was used.

    model    an AllInOne with the file's width, layers, patch and vocabulary, best built from read_config(path). Another
             grid: positions are resized (bicubic). More frames: zero time embeddings; more words: new positions; fewer
             of either: the last are left out
    answers  this run's closed answer list. The answer head is loaded where its list is the same: our own files hold
             theirs, of others the length must do. Elsewhere the head stays new
    ->       "loaded 199/203 tensors; new: ...; dropped: ...; resized: ...; note: ...", counting the model's tensors
    Raises UserError: what read_weights refuses; sizes that differ, naming both; tensors that lack or have no place.
    Differs: rank starts from row 1 of matching wherever the file has only that; released, only where the run has a
    matching head too. ViLT resizes positions bilinearly, and was trained as its note says.
    """
    source, tensors, meta = read_weights(path)
    named, origin, dropped = rename(path, source, tensors)
    config, own, resized, notes = model.config, model.state_dict(), [], [SOURCES[source].note]
    theirs = {**read_shapes(path, named), "heads": meta.get("config", {}).get("heads", config.heads)}
    for field in ("width", "layers", "heads", "patch", "vocab"):
        if theirs.get(field, getattr(config, field)) != getattr(config, field):
            mend = "choose its own with --tokenizer" if field == "vocab" else "leave out --size and --set"
            raise UserError(f"{path} has {field} {theirs[field]}, this model {getattr(config, field)}; {mend}")

    for new, old in (("heads.rank.weight", "heads.matching.weight"), ("heads.rank.bias", "heads.matching.bias")):
        if new in own and new not in named and old in named:
            named[new] = named[old][1:]
            notes.append("rank is row 1 of matching" if new.endswith("weight") else "")
    tied = "heads.mlm.3.weight"                             # in ViLT, where a file may hold it once
    if source == "vilt" and "mlm" in model.heads and "heads.mlm.0.weight" in named and tied not in named:
        named[tied] = named["word.weight"]
        notes.append("the MLM decoder starts as the word embeddings")
    why = {head: f"no {head} head in this run" for head in HEADS if head not in model.heads}
    for head in {"answer", "probe"} & set(model.heads) & {group(name) for name in named}:
        if answers is None or len(answers) != theirs["answers"]:
            why[head] = f"for {theirs['answers']} answers, this run gives {len(answers or [])}"
        elif source != "ours":
            notes.append("answers are taken to be in the file's order")
        elif list(answers) != meta.get("answers"):
            why[head] = "for other answers"
    for name in [name for name in named if group(name) in why]:
        dropped.update(dict.fromkeys(origin[name], why[group(name)]))
        del named[name]
    if unknown := set(named) - set(own):
        raise UserError(f"{path} has tensors without a place here: {listing(dict.fromkeys(sorted(unknown), ''))}")

    for name, tensor in named.items():
        want = own[name]
        if name == "position" and len(tensor) != len(want):
            resized.append("position {0}x{0} -> {1}x{1}".format(math.isqrt(len(tensor) - 1), config.grid))
            tensor = resize_positions(tensor.to(want.dtype), config.grid, config.grid)
        elif name in ("time", "word_position", "modality") and len(tensor) != len(want):
            resized.append(f"{name} {len(tensor)} -> {len(want)}")
            more = torch.zeros_like(want) if name == "time" else want
            tensor = torch.cat([tensor.to(want), more[len(tensor):]])[:len(want)]
        if tensor.shape != want.shape:
            raise UserError(f"{path} has {name} of shape {tuple(tensor.shape)}, this model {tuple(want.shape)}")
        named[name] = tensor
    new = {name: "" for name in own if name not in named}
    loaded, may_lack = {group(name) for name in named}, {*HEADS, *SOURCES[source].new}
    if lost := {name: "" for name in new if group(name) in loaded or group(name) not in may_lack}:
        raise UserError(f"{path} lacks {listing(lost)}")
    model.load_state_dict({**own, **named})
    told = {"new": listing(new), "dropped": listing(dropped), "resized": ", ".join(resized),
            "note": ", ".join(filter(None, notes))}
    return "; ".join([f"loaded {len(named)}/{len(own)} tensors", *(f"{key}: {told[key]}" for key in told if told[key])])


def group(name):
    return name.removeprefix("heads.").split(".")[0]


def listing(names):
    """{name: why, or ""} -> "answer.* (6), head.* (2: of an image classifier), time"."""
    groups = {}
    for name, why in names.items():
        groups.setdefault((group(name), why), []).append(name)
    return ", ".join(f"{top}.* ({len(many)}{why and ': ' + why})" if len(many) > 1 else many[0] + (why and f" ({why})")
                     for (top, why), many in groups.items())


# ---- python allinone.py --bench: against a plain reference ----------------------------------------------------------

def plain(model, frames, words, keep):
    """AllInOne.forward, layout "block", as the released code computes it: texts padded to config.words and repeated for
    each frame, rolling by slices, roll and cat, attention written out, PyTorch's dropout, all tokens out of all blocks.
    frames None: the words alone, T identical copies. The embeddings are the model's own."""
    c, drop, linear = model.config, nn.Dropout(model.config.dropout).train(model.training), nn.Linear.forward
    L, T = c.words, c.frames
    words, keep = (F.pad(x, (0, L - x.shape[1])).repeat_interleave(T, 0) for x in (words, keep))
    x = model.embed_words(words)                                                            # (B*T, L, D)
    if frames is not None:
        x = torch.cat([x, model.embed_frames(frames).flatten(0, 1)], 1)                     # (B*T, S, D)
    rows, S, D = x.shape
    mask, n = ~F.pad(keep, (0, S - L), value=True)[:, None, None], (S - L) // 8
    for block in model.blocks:
        if frames is not None:
            video = x[:, L:].unflatten(0, (-1, T))                                          # (B, T, N, D)
            video = torch.cat([video[:, :, :1], video[:, :, 1:1 + n].roll(1, 1), video[:, :, 1 + n:-n],
                               video[:, :, -n:].roll(-1, 1)], 2)
            x = torch.cat([x[:, :L], video.flatten(0, 1)], 1)
        q, k, v = linear(block.qkv, block.norm1(x)).view(rows, S, 3, c.heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(D // c.heads)).masked_fill(mask, -math.inf).softmax(-1)
        x = x + block.drop(drop(linear(block.proj, (attention @ v).transpose(1, 2).flatten(2))))
        x = x + block.drop(drop(linear(block.fc2, drop(F.gelu(linear(block.fc1, block.norm2(x)))))))
    x = model.norm(x).unflatten(0, (-1, T)).mean(1)
    return Output(torch.tanh(model.pool(x[:, 0])), x[:, :L], x[:, L:])


def bench_loss(way, model, frames, words, keep, target, labels):
    """Matching and MLM. plain: a forward for each, and the vocabulary at every word. Else as train.py has it."""
    if way == "plain":
        (pooled, *_), (_, text, _) = (plain(model, frames, words[:, i], keep[:, i]) for i in (0, 1))
    else:
        video, masked = model.embed_frames(frames).repeat_interleave(2, 0), labels >= 0
        out = model.fuse(video, words.flatten(0, 1), keep.flatten(0, 1), first=words.shape[-1])
        pooled, text, labels = out.pooled[::2], out.text[1::2][masked], labels[masked]
    filled = model.heads["mlm"](text).flatten(0, -2)
    return F.cross_entropy(model.heads["matching"](pooled), target) + F.cross_entropy(filled, labels.flatten())


def bench_setup(size, B, device="cpu"):
    """A model of this size with dropout, its optimiser, and a batch: frames, words, keep, target, labels."""
    torch.manual_seed(0)
    c = replace(SIZES[size], roll="block", dropout=0.1, drop_path=0.1)
    model, words = AllInOne(c, ("matching", "mlm", "contrast")).to(device), torch.randint(c.vocab, (B, 2, c.words))
    batch = (torch.randint(256, (B, c.frames, 3, c.image, c.image), dtype=torch.uint8), words, words >= 0,
             torch.arange(B) % 2, words[:, 1].where(torch.arange(c.words) % 7 == 1, -100))
    return model, torch.optim.AdamW(model.parameters(), fused=True), [x.to(device) for x in batch]


def bench_step(way, model, optimizer, batch, loss=bench_loss):
    """One training step: way is plain, ours, or ours with a flag of train.py."""
    model.checkpointing, pieces = way == "--checkpointing", 2 if way == "--accum 2" else 1
    for piece in zip(*(x.chunk(pieces) for x in batch)):
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=way == "--amp"):
            value = loss(way, model, *piece) / pieces
        value.backward()
    optimizer.step()
    optimizer.zero_grad()


def bench_memory(way, size, B):
    """GiB that two training steps take at their peak, beyond weights and batch. Wants a process of its own."""
    from resource import RUSAGE_SELF, getrusage             # not on Windows
    setup, before = bench_setup(size, B), getrusage(RUSAGE_SELF).ru_maxrss
    seconds(lambda: bench_step(way, *setup), 2)             # the second has AdamW's moments from its start
    return (getrusage(RUSAGE_SELF).ru_maxrss - before) / 2 ** 20


def bench(size, B, least=3, most=9, enough=30):
    """On a CPU: ours against plain by turns, so that a busy moment hits both alike; a line as soon as it is known.
    least, most: turns; enough: seconds after which no more than the least are taken."""
    steps = {"training step": ("plain", "ours"), **{f: ("ours", f) for f in ("--amp", "--checkpointing", "--accum 2")}}
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as fresh:          # before torch has threads
        memory = {way: fresh.apply(bench_memory, (way, size, B)) for way in dict.fromkeys(sum(steps.values(), ()))}
    setup = model, _, (frames, words, keep, *_) = bench_setup(size, B)
    c, head, text = model.config, model.heads["contrast"]["text"], (words[:, 0], keep[:, 0])
    few, five = [x[:, :10] for x in text], [x[:1].repeat(5, 1) for x in text]
    runs = {
        "forward, 40 words": (lambda: plain(model, frames, *text)[0], lambda: model(frames, *text)[0]),
        "forward, 10 words": (lambda: plain(model, frames, *few)[0], lambda: model(frames, *few)[0]),
        "text alone": (lambda: head(plain(model, None, *text)[1][:, 0]), lambda: model.encode_text(*text)),
        "one clip, five options": (
            lambda: torch.cat([plain(model, frames[:1], words[:1, 0], keep[:1, 0])[0] for _ in range(5)]),
            lambda: model.fuse(model.embed_frames(frames[:1]).expand(5, -1, -1, -1), *five, first=1)[0]),
        **{name: [partial(bench_step, way, *setup) for way in pair] for name, pair in steps.items()}}
    a, b, peak = torch.randn(1422, 768), torch.randn(768, 3072), math.inf
    print(f"{size}, {B} clips x {c.frames} frames, float32, {torch.get_num_threads()} CPU threads, medians")
    for name, pair in runs.items():
        if name in ("forward, 40 words", "--amp"):
            first, second = ("ours", "with it") if name in steps else ("plain", "ours")
            print(f"\n{first:>34s} {second:>9s} ratio  of peak")
        times, start = [], perf_counter()
        model.train(name in steps)
        with torch.inference_mode(name not in steps):
            if name not in steps:
                one, other = (run() for run in pair)        # warms up, too
                assert torch.allclose(one, other, atol=1e-4), f"{name}: ours differs from plain"
            while len(times) < least or len(times) < most and perf_counter() - start < enough:
                times.append([*map(seconds, pair)])
                peak = min(peak, seconds(lambda: a @ b, 3))
        one, other = map(median, zip(*times))
        macs = 6 * gmacs(c) if name in steps else gmacs(c, int(name[9:11])) if "forward" in name else 0
        share = macs * B * peak / (1422 * 768 * 3072e-9) / other
        print(f"{name:23s} {one * 1e3:8.0f} ms {other * 1e3:6.0f} ms {median(y / x for x, y in times):5.2f}"
              + f"{share:9.0%}" * (macs > 0), flush=True)
        if name in steps:
            one, other = (memory[way] for way in steps[name])
            print(f"{'  its memory':23s} {one:7.2f} GiB {other:5.2f} GiB {other / one:5.2f}", flush=True)
    print(f"\npeak: {2 * 1422 * 768 * 3072e-9 / peak:.0f} GFLOP/s, the fastest product 1422 x 768 x 3072 so far")


def bench_gpu(size):
    """On a GPU: our training step in bfloat16, compiled, with ever larger batches until one does not fit."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds(lambda: a @ a, 3)
    peak, loss, B = 2 * 8192 ** 3 / seconds(lambda: a @ a, 20), torch.compile(bench_loss, dynamic=False), 8
    print(f"{size} on {torch.cuda.get_device_name()}; peak: {peak / 1e12:.0f} TFLOP/s, a bfloat16 product of side 8192")
    while True:
        try:
            setup = bench_setup(size, B, "cuda")
            seconds(lambda: bench_step("--amp", *setup, loss), 3)
            torch.cuda.reset_peak_memory_stats()
            each = seconds(lambda: bench_step("--amp", *setup, loss), 10)
        except torch.cuda.OutOfMemoryError:
            return
        share, memory = 12e9 * B * gmacs(SIZES[size]) / each / peak, torch.cuda.max_memory_allocated() / 2 ** 30
        print(f"{B:5d} clips {each * 1e3:8.0f} ms {B / each:7.0f} clips/s   MFU {share:4.0%}   {memory:6.1f} GiB")
        B *= 2


# ---- python allinone.py ---------------------------------------------------------------------------------------------

def seconds(run, times=1):
    start = perf_counter()
    for _ in range(times):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (perf_counter() - start) / times


def figure(L=7, real=5, cell=22, dot=5):
    """SVG: the tokens of three frames after one roll, coloured by the frame they come from, and the attention mask as
    the model applies it: each (query, key) where a toy model's attention is not zero."""
    config, maps = SIZES["toy"], []
    T, N = config.frames, 1 + config.grid ** 2
    S, side = L + N, T * (L + N) * dot
    frames, words = torch.zeros(1, T, 3, config.image, config.image), torch.zeros(1, L, dtype=torch.long)
    AllInOne(config).eval()(frames, words, torch.arange(L)[None] < real, maps)
    groups = roll_groups(config.grid, config.grid, config.fraction, config.roll)
    came_from = roll_tokens(torch.arange(T).view(1, T, 1, 1).expand(1, T, N, 1), *groups)[0, :, :, 0].tolist()
    at = lambda n: 92 + n * cell + 8 * (n >= L) + 8 * (n > L)                   # x of token n, with gaps around CLS
    parts = [label(24, 34, "The joint sequence", size=17, weight=600),
             label(24, 55, "One per frame: the same words in each, then that frame's CLS and patches.", SOFT)]
    for n, name in ((0, "words"), (real, "padding"), (L, "CLS"),
                    (L + 1, "patches, coloured by the frame they come from")):
        parts.append(label(at(n), 92, name, SOFT, size=12))
    for t in range(T):
        y, colors = 100 + t * (cell + 10), ["#9aa5b1"] * real + [LINE] * (L - real) + [FRAMES[f] for f in came_from[t]]
        parts.append(label(24, y + 16, f"frame {t}", weight=600))
        parts += [box(at(n), y, cell - 2, cell - 2, colors[n], 10 if n == L else 4) for n in range(S)]
    top = 100 + T * (cell + 10) + 66
    parts += [label(24, top - 34, "Who looks at whom", size=17, weight=600),
              label(24, top - 14, "A row for each token that looks, a column for each that is looked at.", SOFT),
              box(92, top, side, side, "#f3f5f7")]
    for t in range(T):
        parts.append(label(24, top + (t + 0.5) * S * dot + 4, f"frame {t}", weight=600))
        for q, seen in enumerate((maps[0][t].sum(0) > 0).tolist()):
            ends = [n for n in range(S + 1) if (n < S and seen[n]) != (n > 0 and seen[n - 1])]
            parts += [box(92 + (t * S + a) * dot, top + (t * S + q) * dot, (b - a) * dot, dot, FRAMES[t])
                      for a, b in zip(ends[::2], ends[1::2])]
    told = ("Attention stays inside a frame:", "three blocks, one per frame.", "",
            "Pale stripes: padding words are", "looked at by nobody.", "",
            "All that a frame hears of the", "others came with the tokens", "that rolled in.")
    parts += [label(92 + side + 24, top + 16 + 19 * i, line) for i, line in enumerate(told)]
    return svg(720, top + side + 24, *parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, help="write the picture to this file and stop")
    parser.add_argument("--bench", action="store_true", help="times and memory beside a plain reference")
    parser.add_argument("--size", choices=SIZES, default="base", help="of the bench (default base)")
    parser.add_argument("--clips", type=int, default=2, help="B of the bench on a CPU (default 2)")
    args = parser.parse_args()
    if args.svg:
        with writing(args.svg):
            args.svg.parent.mkdir(parents=True, exist_ok=True)
            return args.svg.write_text(figure())
    if args.clips < 1:
        raise UserError(f"--clips {args.clips}: 1 or more are needed")
    if args.bench:
        return bench_gpu(args.size) if torch.cuda.is_available() else bench(args.size, args.clips)
    print("size      D layers   H    R   P  parameters    GMAC    forward")
    for name, config in SIZES.items():
        model = AllInOne(config, ("matching",)).eval()
        frames = torch.zeros(1, config.frames, 3, config.image, config.image, dtype=torch.uint8)
        words, times = torch.zeros(1, config.words, dtype=torch.long), []
        with torch.inference_mode():
            for _ in range(4):                              # the first warms up and is not counted
                times.append(seconds(lambda: model(frames, words)))
        print(f"{name:6s} {config.width:4d} {config.layers:6d} {config.heads:3d} {config.image:4d} {config.patch:3d} "
              f"{millions(model):9.2f} M {gmacs(config):7.2f} "
              f"{min(times[1:]) * 1e3:7.1f} ms")
    print(f"one clip of 3 frames with 40 words, float32, {torch.get_num_threads()} CPU threads; no MLM head")


if __name__ == "__main__":
    run_main("allinone.py", main)
