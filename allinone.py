"""All-in-one (arXiv 2203.07303): one transformer that reads raw frames and words together. No video encoder, no text
encoder, no fusion module: a patch embedding, a word embedding, twelve blocks, and token rolling between frames.

Checked against the released model's outputs (random weights, shuffle off), the golden sizes and Hugging Face's ViLT.

    python allinone.py             the sizes: parameters, multiply-adds, milliseconds on this machine

Axes, the same letters in every file:
    B clips · T frames · L text tokens · N visual tokens per frame, CLS included · S = L + N · D width · H heads
    K = D // H · R image side · P patch side · A answers or options · V vocabulary
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rolling import Permute, roll_groups, roll_index


class UserError(ValueError):
    """A mistake that a user can mend: one line with what, the value, what is allowed and the next command."""


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
    dropout: float = 0.1            # after embeddings, attention output and both MLP layers
    drop_path: float = 0.1          # of the last block; rises linearly from 0 at the first

    def __post_init__(self):
        for big, small in (("width", "heads"), ("image", "patch")):
            if getattr(self, big) % getattr(self, small):
                raise UserError(f"{big} {getattr(self, big)} is not a multiple of {small} {getattr(self, small)}")
        roll_groups(1, 1, self.fraction, self.roll)         # names a bad layout or fraction

    @property
    def grid(self):
        return self.image // self.patch


SIZES = {
    "toy": Config(width=96, layers=4, heads=4, image=32, patch=8, dropout=0.0, drop_path=0.0),
    "tiny": Config(width=192, heads=3),                     # 11.43 M parameters without the MLM head
    "small": Config(width=384, heads=6),                    # 33.55 M
    "base": Config(),                                       # 109.87 M
}


def gmacs(config, L=40, T=None):
    """10^9 multiply-adds of the joint forward of one clip: T frames, each with L words; matrix products only."""
    D, N, T = config.width, 1 + config.grid ** 2, T or config.frames
    S = L + N
    per_frame = config.layers * (12 * S * D * D + 2 * S * S * D) + (N - 1) * 3 * config.patch ** 2 * D
    return (T * per_frame + D * D) / 1e9


# ---- the block ------------------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Pre-norm ViT block. It sees one frame (with the words) at a time: rows of x are frames, not clips."""

    def __init__(self, D, heads, dropout, drop_path):
        super().__init__()
        self.heads, self.dropout, self.drop_path = heads, dropout, drop_path
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.fc1 = nn.Linear(D, 4 * D)
        self.fc2 = nn.Linear(4 * D, D)

    def forward(self, x, keep, maps=None):
        """x (B*T, S, D); keep (B*T, 1, 1, S) bool, True at tokens that may be looked at, or None for all.
        A list given as `maps` receives the attention (B*T, H, S, S)."""
        x = x + self.drop(self.attention(self.norm1(x), keep, maps))
        return x + self.drop(self.mlp(self.norm2(x)))

    def attention(self, x, keep, maps):
        rows, S, D = x.shape
        q, k, v = self.qkv(x).view(rows, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B*T, H, S, K)
        if maps is None:
            x = F.scaled_dot_product_attention(q, k, v, keep)
        else:                                               # the same in two steps, for whoever wants to see it
            scores = q @ k.transpose(-1, -2) / math.sqrt(D // self.heads)
            maps.append((scores if keep is None else scores.masked_fill(~keep, -math.inf)).softmax(-1))
            x = maps[-1] @ v
        return F.dropout(self.proj(x.transpose(1, 2).reshape(rows, S, D)), self.dropout, self.training)

    def mlp(self, x):
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)

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


HEADS = ("matching", "mlm", "answer", "choice", "rank", "contrast")


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
        build = {
            "matching": lambda: nn.Linear(D, 2),            # column 1: the text belongs to the clip
            "mlm": lambda: nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D, eps=1e-12), nn.Linear(D, V)),
            "answer": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(D, D // 2), nn.LayerNorm(D // 2), nn.GELU(),
                                            nn.Linear(D // 2, config.answers)),
            "choice": lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(D, 256), nn.LayerNorm(256), nn.GELU(),
                                            nn.Linear(256, 1)),
            "rank": lambda: nn.Linear(D, 1),                # zero-shot multiple choice: starts as row 1 of matching
            "contrast": lambda: nn.ModuleDict({"text": nn.Linear(D, config.embed), "video": nn.Linear(D, config.embed)}),
        }
        self.heads = nn.ModuleDict({name: build[name]() for name in HEADS if name in heads})
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])        # ImageNet's
        self.register_buffer("scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(3, 1, 1), persistent=False)
        self.checkpointing = False                          # recompute blocks in backward: less memory, more time
        self.init_weights()

    def init_weights(self):
        """Normal with std 0.02 for every table and matrix, zero biases, LayerNorm 1 and 0, time zero: the released
        start. Differs: its patch convolution keeps PyTorch's default (std 0.0208 at base size)."""
        for name, p in self.named_parameters():
            if name == "time" or name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() > 1 or name == "cls":
                nn.init.normal_(p, std=0.02)
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
        return F.dropout(x, self.config.dropout, self.training) + self.modality[0]

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
        x = x + position[1:] + self.time[:T, None]          # time on patches only, as released
        cls = (self.cls + position[0]).expand(B, T, 1, -1)
        x = F.dropout(torch.cat([cls, x], 2), self.config.dropout, self.training)
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

    def fuse(self, video, words, keep=None, maps=None):
        """forward, for frames that are embedded already: video (B, T, N, D)."""
        B, T, N, D = video.shape
        L = words.shape[1]
        text = self.embed_words(words)
        x = torch.cat([text[:, None].expand(B, T, L, D), video], 2)                         # (B, T, S, D)
        if keep is not None:
            keep = F.pad(keep, (0, N), value=True)[:, None].expand(B, T, L + N)             # visual tokens always
        x = self.run(x, keep, slots=L, maps=maps)
        return Output(torch.tanh(self.pool(x[:, 0])), x[:, :L], x[:, L:])

    def encode_text(self, words, keep=None):
        """words (B, L), keep (B, L) -> (B, config.embed): the projected CLS of the words on their own.
        Differs: the released code runs T identical copies."""
        x = self.run(self.embed_words(words)[:, None], None if keep is None else keep[:, None])
        return self.heads["contrast"]["text"](x[:, 0])

    def encode_video(self, frames):
        """frames (B, T, 3, R, R) -> (B, config.embed): the projected CLS of the frames on their own."""
        x = self.run(self.embed_frames(frames), slots=0 if self.config.roll_unimodal else None)
        return self.heads["contrast"]["video"](x[:, 0])

    def run(self, x, keep=None, slots=None, maps=None):
        """The blocks, the final norm and the mean over frames: x (B, T, S, D), keep (B, T, S) -> (B, S, D).
        `slots`: where the visual tokens begin, to roll them; None: nothing rolls."""
        B, T, S, D = x.shape
        index = None
        if slots is not None and T > 1:
            side = math.isqrt(S - slots - 1)
            groups = roll_groups(side, side, self.config.fraction, self.config.roll)
            if len(groups[0]):
                index = roll_index(B, T, S, *(slots + g.to(x.device) for g in groups))
        if keep is not None:
            keep = keep.reshape(B * T, 1, 1, S)
        for block in self.blocks:
            if index is not None:
                x = Permute.apply(x.view(B, T, S, D), *index)
            x = x.view(B * T, S, D)
            if self.checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, keep, use_reentrant=False)
            else:
                x = block(x, keep, maps)
        return self.norm(x).view(B, T, S, D).mean(1)


def resize_positions(position, rows, cols):
    """position (1 + g * g, D), CLS first -> (1 + rows * cols, D), bicubic; itself where the grid is g x g."""
    g = math.isqrt(len(position) - 1)
    if (rows, cols) == (g, g):
        return position
    grid = position[1:].view(1, g, g, -1).permute(0, 3, 1, 2)                               # (1, D, g, g)
    grid = F.interpolate(grid, (rows, cols), mode="bicubic", align_corners=False)
    return torch.cat([position[:1], grid[0].flatten(1).T])
