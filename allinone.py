"""All-in-one (arXiv 2203.07303): one transformer that reads raw video frames and words together.

There is no video encoder, no text encoder and no fusion module: a patch embedding, a word
embedding, twelve blocks, and token rolling between frames (rolling.py).

    python allinone.py       the sizes: parameters, multiply-adds, time of one clip on this machine

Read in order: Config, Attention, MLP, Block, AllInOne, how weights start, our checkpoints.
The last section holds what every script needs and no paper mentions: errors, files, progress.

Axes, the same letters in every file:
    B clips   T frames   L text tokens   N visual tokens per frame, CLS included   S = L + N
    D width   H attention heads   K = D // H   R image side   P patch side
    A answers, or texts of a clip   V vocabulary   M masked tokens
The losses are named contrast (in the paper VTC), matching (VTM) and mlm.
"""
import io
import os
import sys

# This section must run before torch is imported: a short message for Ctrl-C, the version of Python,
# and the environment variables that torch reads when it loads.


def one_line_interrupt(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.version_info < (3, 11):
    sys.exit(f"Python {sys.version.split()[0]} is too old; this code needs 3.11 or newer")
sys.excepthook = one_line_interrupt                     # also while torch is being imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # threads that spin slow down the workers
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # huge pages: faster memory on a CPU
import contextlib
import fcntl
import math
import re
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from rolling import roll_groups, roll_tokens

# ---- sizes ---------------------------------------------------------------------------------------


# The least and the greatest value of a field. text_length is at least 3: [CLS], a word, [SEP];
# vocab at least 5: the special tokens. The upper limits refuse the nonsense of a damaged file.
LIMITS = {"width": (8, 8192), "layers": (1, 128), "heads": (1, 128), "image": (8, 2048),
          "patch": (1, 256), "frames": (1, 512), "text_length": (3, 4096), "vocab": (5, 2 ** 20),
          "answers": (0, 2 ** 20), "embed": (1, 8192),
          "dropout": (0, 0.9), "drop_path": (0, 0.9)}


@dataclass(frozen=True)
class Config:
    """The shape of a model. The defaults are the paper's base size (ViT-B/16, bert-base-uncased).
    Raises UserError for values outside LIMITS."""
    width: int = 768                # D
    layers: int = 12
    heads: int = 12                 # H, attention heads
    image: int = 224                # R, pixels
    patch: int = 16                 # P, pixels
    frames: int = 3                 # T at most: the number of time embeddings
    text_length: int = 40           # L at most, [CLS] and [SEP] included
    vocab: int = 30522              # V
    answers: int = 0                # A, the classes of the answer head
    embed: int = 512                # width of the contrastive space
    roll: str = "spread"            # layout of the rolled tokens: spread, block or none
    fraction: float = 1 / 4         # share of the patches that roll, half of it each way
    roll_unimodal: bool = False     # roll also when the video is read alone: not as released
    time: bool = True               # add time embeddings to the patches
    dropout: float = 0.1            # after embeddings, attention, MLP layers; in two heads
    drop_path: float = 0.1          # of the last block; rises linearly from 0 at the first

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise UserError(f"config: {field.name} is {value!r:.40}, not {field.type.__name__}")
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"config: {name} {value} is not from {low} to {high}")
        if self.width % self.heads:
            raise UserError(f"config: width {self.width} is not a multiple of heads {self.heads}")
        if self.image % self.patch:
            raise UserError(f"config: image {self.image} is not a multiple of patch {self.patch}")
        try:                                            # roll_groups knows what is allowed
            roll_groups(1, 1, self.fraction, self.roll)
        except ValueError as error:
            raise UserError(f"config: {error}") from None

    @property
    def grid(self):
        """Patches along one side of a frame."""
        return self.image // self.patch


SIZES = {
    # A quarter of the toy's 4 x 4 patches would be two each way, too few to see a shape move.
    "toy": Config(width=96, layers=4, heads=4, image=32, patch=8, fraction=1 / 2,
                  dropout=0.0, drop_path=0.0),
    "tiny": Config(width=192, heads=3),                     # 11.43 M parameters without MLM head
    "small": Config(width=384, heads=6),                    # 33.55 M
    "base": Config(),                                       # 109.87 M
}

# ---- the block -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention over the words and the tokens of one frame."""

    def __init__(self, D, heads, dropout):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, num_queries=None):
        """x (B*T, S, D); mask (B*T, 1, 1, S) bool, True where keys may be attended to, or None.
        num_queries: give only this many tokens, from the first on; None: all.
        -> (B*T, num_queries or S, D)"""
        BT, S, D = x.shape
        qkv = self.qkv(x).view(BT, S, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # each (B*T, H, S, K)
        x = F.scaled_dot_product_attention(q[:, :, :num_queries], k, v, attn_mask=mask)
        x = x.transpose(1, 2).flatten(2)
        return self.dropout(self.proj(x))


class MLP(nn.Module):
    def __init__(self, D, dropout):
        super().__init__()
        self.fc1 = nn.Linear(D, 4 * D)
        self.fc2 = nn.Linear(4 * D, D)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = self.dropout(F.gelu(self.fc1(x)))
        return self.dropout(self.fc2(x))


class DropPath(nn.Module):
    """In training, leave out a frame's branch with probability p, and scale up the others."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, branch):
        if not self.training or self.p == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.p
        return branch * (kept / (1 - self.p)).to(branch.dtype)


class Block(nn.Module):
    """A pre-norm ViT block. Each row of the batch is one frame together with the words."""

    def __init__(self, D, heads, dropout, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(D, heads, dropout)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = MLP(D, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, mask, num_queries=None):
        branch = self.attn(self.norm1(x), mask, num_queries)
        x = x[:, :num_queries] + self.drop_path(branch)
        return x + self.drop_path(self.mlp(self.norm2(x)))


# ---- the model -----------------------------------------------------------------------------------


class Output(NamedTuple):
    pooled: Tensor      # (B, D), tanh(dense(text CLS)), for heads that score a clip with its text
    text: Tensor        # (B, L, D), mean over frames; only the first num_queries tokens if given
    video: Tensor       # (B, N, D), mean over frames, CLS first; empty if num_queries is given


# Multiple choice has three heads: mc, with a hidden layer, for TGIF and TVQA; rank for the others;
# rank2 for VCR's second question, QA->R. Both ranks start as matching's output 1, the score of
# "the text is about the clip".
HEADS = ("matching", "mlm", "answer", "mc", "rank", "rank2", "contrast")


def make_head(name, config):
    """One task head, built as in the released code."""
    D, V = config.width, config.vocab
    if name == "matching":                                  # column 1: the text is about the clip
        return nn.Linear(D, 2)
    if name == "mlm":                                       # masked words
        norm = nn.LayerNorm(D, eps=1e-12)
        return nn.Sequential(nn.Linear(D, D), nn.GELU(), norm, nn.Linear(D, V))
    if name == "answer":                                    # open-ended questions, actions
        dropout = nn.Dropout(0.5 if config.dropout else 0)  # 0.5 as released; 0 means none at all
        hidden = D // 2
        return nn.Sequential(dropout, nn.Linear(D, hidden), nn.LayerNorm(hidden), nn.GELU(),
                             nn.Linear(hidden, config.answers))
    if name == "mc":                                        # one score for each option
        dropout = nn.Dropout(config.dropout)
        return nn.Sequential(dropout, nn.Linear(D, 256), nn.LayerNorm(256), nn.GELU(),
                             nn.Linear(256, 1))
    if name in ("rank", "rank2"):                           # one score for a text
        return nn.Linear(D, 1)
    if name == "contrast":
        return nn.ModuleDict({"text": nn.Linear(D, config.embed),
                              "video": nn.Linear(D, config.embed)})
    raise UserError(f"task head {name!r:.40} is unknown; choose from {', '.join(HEADS)}")


class AllInOne(nn.Module):
    """The model of the paper, section 3. task_heads: names out of HEADS."""

    def __init__(self, config, task_heads=()):
        super().__init__()
        D = config.width
        N = 1 + config.grid ** 2
        self.config = config
        self.text_embed = nn.Embedding(config.vocab, D)
        self.text_pos = nn.Parameter(torch.zeros(config.text_length, D))
        self.text_segment = nn.Parameter(torch.zeros(2, D))     # BERT's two; only row 0 is used
        self.text_norm = nn.LayerNorm(D, eps=1e-12)
        self.modality_embed = nn.Parameter(torch.zeros(2, D))   # row 0 to text, 1 to visual tokens
        self.patch_embed = nn.Conv2d(3, D, config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(torch.zeros(D))
        self.pos_embed = nn.Parameter(torch.zeros(N, D))
        self.time_embed = nn.Parameter(torch.zeros(config.frames, D))
        self.embed_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList()
        for i in range(config.layers):
            drop_path = config.drop_path * i / max(1, config.layers - 1)
            self.blocks.append(Block(D, config.heads, config.dropout, drop_path))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.pooler = nn.Linear(D, D)
        self.task_heads = nn.ModuleDict({name: make_head(name, config) for name in task_heads})
        with torch.device("cpu"):       # load_checkpoint builds on "meta", which has no nonzero()
            groups = roll_groups(config.grid, config.grid, config.fraction, config.roll)
        self.register_buffer("forward_group", groups[0], persistent=False)
        self.register_buffer("backward_group", groups[1], persistent=False)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)        # of ImageNet, as released
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        self.register_buffer("pixel_mean", 255 * mean, persistent=False)
        self.register_buffer("pixel_std", 255 * std, persistent=False)
        init_released(self)

    def embed_text(self, input_ids):
        """input_ids (B, L) -> (B, L, D)."""
        L = input_ids.shape[1]
        if L > self.config.text_length:
            raise ValueError(f"texts of {L} tokens; this model has positions for "
                             f"{self.config.text_length}")
        x = self.text_embed(input_ids) + self.text_pos[:L] + self.text_segment[0]
        return self.embed_dropout(self.text_norm(x)) + self.modality_embed[0]

    def embed_frames(self, frames):
        """frames (B, T, 3, R, R) uint8 RGB -> (B, T, N, D): CLS, then patches in raster order.
        Embed once, then use with as many texts as there are (options, captions)."""
        B, T = frames.shape[:2]
        if not 1 <= T <= self.config.frames:
            raise ValueError(f"clips of {T} frames; this model has time embeddings for 1 to "
                             f"{self.config.frames}")
        pixels = (frames.flatten(0, 1) - self.pixel_mean) / self.pixel_std
        x = self.patch_embed(pixels)                                    # (B*T, D, rows, cols)
        x = x.flatten(2).transpose(1, 2).unflatten(0, (B, T))           # (B, T, N-1, D)
        x = x + self.pos_embed[1:]
        if self.config.time:
            x = x + self.time_embed[:T, None]                           # not on CLS, as released
        cls = (self.cls_token + self.pos_embed[0]).expand(B, T, 1, -1)
        x = self.embed_dropout(torch.cat([cls, x], dim=2))
        return x + self.modality_embed[1]

    def forward(self, frames, input_ids, attention_mask=None):
        """Read frames and words together.

        frames           (B, T, 3, R, R) uint8 RGB, 1 <= T <= config.frames
        input_ids        (B, L) int64
        attention_mask   (B, L) bool, False at padding; None: no padding
        Returns Output(pooled (B, D), text (B, L, D), video (B, N, D)).
        Source: paper, section 3. With layout "block" this equals the released model without its
        patch shuffle.
        """
        return self.joint(self.embed_frames(frames), input_ids, attention_mask)

    def joint(self, video, input_ids, attention_mask=None, num_queries=None):
        """forward for frames that are embedded already: video (B, T, N, D).
        num_queries: how many tokens the last block computes: 1 for pooled, L for the text."""
        B, T, N, D = video.shape
        L = input_ids.shape[1]
        text = self.embed_text(input_ids)[:, None].expand(B, T, L, D)
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, N), value=True)  # visual tokens: always
        x = self.apply_blocks(torch.cat([text, video], dim=2), attention_mask, L, num_queries)
        return Output(torch.tanh(self.pooler(x[:, 0])), x[:, :L], x[:, L:])

    def encode_text(self, input_ids, attention_mask=None):
        """input_ids (B, L) -> (B, config.embed): the projected CLS of the text on its own.
        Differs: the released code runs T identical copies."""
        x = self.embed_text(input_ids)[:, None]                         # T = 1
        x = self.apply_blocks(x, attention_mask, None, num_queries=1)
        return self.task_heads["contrast"]["text"](x[:, 0])

    def encode_video(self, frames):
        """frames (B, T, 3, R, R) -> (B, config.embed): the projected CLS of the video on its own.
        As released, nothing rolls here, unless config.roll_unimodal."""
        first_visual = 0 if self.config.roll_unimodal else None
        x = self.apply_blocks(self.embed_frames(frames), None, first_visual, num_queries=1)
        return self.task_heads["contrast"]["video"](x[:, 0])

    def apply_blocks(self, x, attention_mask, first_visual, num_queries):
        """Roll and attend, block after block; then the final norm and the mean over frames.
        x (B, T, S, D), attention_mask (B, S) or None -> (B, num_queries or S, D).
        first_visual: the place of the first visual token in x; None: nothing rolls."""
        B, T, S, D = x.shape
        rolls = first_visual is not None
        if rolls:
            forward_group = self.forward_group + first_visual
            backward_group = self.backward_group + first_visual
        mask = None
        if attention_mask is not None:
            mask = attention_mask.repeat_interleave(T, dim=0).view(B * T, 1, 1, S)
        for i, block in enumerate(self.blocks):
            if rolls:
                x = roll_tokens(x.view(B, T, S, D), forward_group, backward_group)
            last = i + 1 == len(self.blocks)
            x = block(x.view(B * T, S, D), mask, num_queries if last else None)
        return self.norm(x).unflatten(0, (B, T)).mean(dim=1)


# ---- how weights start ---------------------------------------------------------------------------


def init_released(model):
    """Initial weights as released: normal with std 0.02; time embeddings and biases 0.
    Differs: the released patch convolution keeps PyTorch's default (std 0.0208 at base)."""
    init_weights(model, std=0.02)
    nn.init.zeros_(model.time_embed)


def init_narrow(model):
    """For the toy size: std 1 / sqrt(fan-in) for matrices, 1 for embedding tables. A model 96 wide
    does not learn from std 0.02 within minutes: its residual branches add next to nothing at the
    start. Time embeddings start with std 0.5: with 1 the model learns late to compare two frames,
    with 0 it learns late which frame is the last."""
    init_weights(model, std=None)
    nn.init.normal_(model.time_embed, std=0.5)


def init_weights(model, std):
    """Normal with this std; None: 1 / sqrt(fan-in) for matrices, 1 for embedding tables."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=std or fan_in ** -0.5)
            nn.init.zeros_(module.bias)
    for table in (model.text_embed.weight, model.text_pos, model.text_segment, model.cls_token,
                  model.modality_embed, model.pos_embed):
        nn.init.normal_(table, std=std or 1.0)
    state = model.state_dict()
    for head in ("rank", "rank2"):
        if "matching" in model.task_heads and head in model.task_heads:
            copy_rank_from_matching(state, head)
    model.load_state_dict(state)


def copy_rank_from_matching(state, head):
    """Row 1 of the matching head scores how well a text fits a clip: start a rank head there."""
    for part in ("weight", "bias"):
        row = state[f"task_heads.matching.{part}"][1:]
        state[f"task_heads.{head}.{part}"] = row.clone()


def load_weights(model, checkpoint, answers=()):
    """Start a model from a checkpoint (of load_checkpoint), perhaps of another task.

    The answer head is loaded only if the checkpoint's answer list equals `answers`. rank and rank2
    start as row 1 of matching where the file lacks them. If the grid differs, the positions of
    patches are resized (bicubic). If the model has more frames, their time embeddings are zero, as
    released; if it reads longer texts, the added positions keep the model's own initial values.
    Returns one line that accounts for every tensor. Raises UserError if sizes differ.
    """
    for name in ("width", "layers", "heads", "patch"):
        theirs = getattr(checkpoint["config"], name)
        ours = getattr(model.config, name)
        if theirs != ours:
            raise UserError(f"{name} is {theirs} in the file and {ours} in this model; leave out "
                            "--size")
    own = model.state_dict()
    state = dict(checkpoint["model"])
    for head in ("rank", "rank2"):
        if f"task_heads.{head}.weight" not in state and "task_heads.matching.weight" in state:
            copy_rank_from_matching(state, head)
    if list(answers) != checkpoint["answers"]:
        state = {name: t for name, t in state.items() if not name.startswith("task_heads.answer.")}
    state["pos_embed"] = resize_positions(state["pos_embed"], model.config.grid)
    state["time_embed"] = fit_rows(state["time_embed"], torch.zeros_like(own["time_embed"]))
    state["text_pos"] = fit_rows(state["text_pos"], own["text_pos"])
    loaded = {name: state[name] for name in own if name in state}
    for name, tensor in loaded.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)} in the file and "
                            f"{tuple(own[name].shape)} in this model; leave out --size and "
                            "--tokenizer")
    model.load_state_dict({**own, **loaded})
    line = f"loaded {len(loaded)} of {len(own)} tensors"
    new = sorted({top_name(name) for name in own if name not in loaded})
    unused = sorted({top_name(name) for name in checkpoint["model"] if name not in loaded})
    if new:
        line += f"; new: {', '.join(new)}"
    if unused:
        line += f"; not used: {', '.join(unused)}"
    return line


def top_name(name):
    """task_heads.mlm.0.weight -> mlm; blocks.0.attn.qkv.weight -> blocks"""
    return name.removeprefix("task_heads.").split(".")[0]


def fit_rows(table, target):
    """`table` with as many rows as `target`: cut, or continued with the last rows of `target`."""
    count = min(len(table), len(target))
    return torch.cat([table[:count].to(target), target[count:]])


def resize_positions(pos_embed, grid):
    """pos_embed (1 + g * g, D), CLS first -> (1 + grid * grid, D), bicubic."""
    g = math.isqrt(len(pos_embed) - 1)
    if g == grid:
        return pos_embed
    picture = pos_embed[1:].view(1, g, g, -1).permute(0, 3, 1, 2)       # (1, D, g, g)
    picture = F.interpolate(picture, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:1], picture[0].flatten(1).T])


# ---- our checkpoints -----------------------------------------------------------------------------


def save_checkpoint(path, model, answers, tokenizer, **about):
    """Write one self-describing file: config, task heads, weights, the answer list, the tokenizer
    (as JSON text), and what `about` adds. Raises UserError if a weight is not finite."""
    check_finite(path, model.state_dict())
    content = {"config": asdict(model.config), "task_heads": list(model.task_heads),
               "model": model.state_dict(), "answers": answers, "tokenizer": tokenizer, **about}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


def load_checkpoint(path):
    """Read a file of save_checkpoint, and check everything that the code relies on.

    Returns its dict, with "config" a Config. Raises UserError: not a checkpoint, damaged (the zip's
    checksums), fields of another version, or tensors that are not the dense, finite floats that
    this config has.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise UserError(f"{path} is not a checkpoint of train.py; convert weights of other code "
                        f"with: python tools/weights.py {path} converted.pt")
    names = {field.name for field in fields(Config)}
    odd = names ^ set(content["config"])
    if odd:
        raise UserError(f"{path}: config fields {printable(sorted(map(str, odd)))} are unknown or "
                        "missing; the file is of another version")
    for name, kind in (("model", dict), ("task_heads", list), ("answers", list)):
        if not isinstance(content.get(name), kind):
            raise UserError(f"{path}: {name} is missing or not a {kind.__name__}")
    if not isinstance(content.get("tokenizer"), str):
        raise UserError(f"{path} holds no tokenizer; write it again with train.py or "
                        "tools/weights.py --tokenizer vocab.txt")
    try:
        config = Config(**content["config"])
        with torch.device("meta"):                          # shapes alone: takes no memory
            expected = AllInOne(config, content["task_heads"]).state_dict()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not all(isinstance(answer, str) for answer in content["answers"]):
        raise UserError(f"{path}: answers are not all texts")
    if "answer" in content["task_heads"] and len(content["answers"]) != config.answers:
        raise UserError(f"{path}: {len(content['answers'])} answers for {config.answers} classes")
    check_tensors(path, content["model"], expected)
    return {**content, "config": config}


def load_run(path):
    """load_checkpoint of a file, or of best.pt in a run folder."""
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "best.pt")):
            if os.path.exists(os.path.join(path, "config.json")):
                raise UserError(f"{path} has no best.pt yet; go on with train.py, the same flags, "
                                f"--resume and --out {path}")
            raise UserError(f"{path} is no run folder: it holds no best.pt; train one with: python "
                            "train.py --task vqa")
        path = os.path.join(path, "best.pt")
    checkpoint = load_checkpoint(path)
    checkpoint.setdefault("name", os.path.basename(path))
    return {**checkpoint, "path": path}


def build_model(checkpoint):
    """The model of a checkpoint (of load_checkpoint), in eval mode."""
    model = AllInOne(checkpoint["config"], checkpoint["task_heads"])
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def load_model(path):
    """(model, checkpoint) of a file or a run folder."""
    checkpoint = load_run(path)
    return build_model(checkpoint), checkpoint


def read_torch_file(path):
    """torch.load without executing anything, with the zip's checksums checked, which torch does
    not do: a flipped bit would otherwise become a weight."""
    try:
        with open(path, "rb") as file:
            archive = io.BytesIO(file.read())
        zipped = zipfile.ZipFile(archive)
        cause = zipped.testzip()                            # None, or the name of a damaged part
        if any(entry.compress_type for entry in zipped.infolist()):
            cause = "compressed"                            # a small file could hold gigabytes
        if cause is None:
            archive.seek(0)
            return torch.load(archive, "cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:                              # a broken file can fail in any way
        cause = type(error).__name__
    raise UserError(f"{path} is not a checkpoint, or is damaged ({printable(cause)}); copy or "
                    "convert it again")


def check_tensors(path, tensors, expected):
    for name, tensor in tensors.items():
        if name not in expected:
            raise UserError(f"{path}: tensor {printable(name)} has no place in this model")
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not dense or tensor.is_meta or tensor.is_nested:
            raise UserError(f"{path}: {name} is not a dense tensor")
        if tensor.dtype != torch.float32:
            raise UserError(f"{path}: {name} has dtype {tensor.dtype}, not float32")
        if tensor.shape != expected[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, its config means "
                            f"{tuple(expected[name].shape)}")
        if tensor.untyped_storage().nbytes() < tensor.nbytes:   # expanded: stride 0
            raise UserError(f"{path}: {name} lacks numbers for its shape")
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} tensors, among them {missing[0]}")
    check_finite(path, tensors)


def check_finite(path, tensors):
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite")


# ---- python allinone.py --------------------------------------------------------------------------


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def multiply_adds(config, L=40):
    """Of one clip's joint forward: T frames, each with L text tokens; matrix products only."""
    D = config.width
    N = 1 + config.grid ** 2
    S = L + N
    block = 12 * S * D * D + 2 * S * S * D          # qkv 3, proj 1, MLP 8; q @ k and weights @ v
    patches = (N - 1) * 3 * config.patch ** 2 * D
    pooler = D * D
    return config.frames * (config.layers * block + patches) + pooler


def main():
    print("size      D layers   H    R   P  parameters    GMAC   forward")
    for name, config in SIZES.items():
        model = AllInOne(config, ("matching",)).eval()
        frames = torch.zeros(1, config.frames, 3, config.image, config.image, dtype=torch.uint8)
        input_ids = torch.zeros(1, 40, dtype=torch.long)
        times = []
        with torch.inference_mode():
            for _ in range(4):
                start = time.perf_counter()
                model(frames, input_ids)
                times.append(time.perf_counter() - start)
        print(f"{name:6s} {config.width:4d} {config.layers:6d} {config.heads:3d} "
              f"{config.image:4d} {config.patch:3d} {count_parameters(model) / 1e6:9.2f} M "
              f"{multiply_adds(config) / 1e9:7.2f} {1000 * min(times):6.1f} ms")
    print(f"one clip of 3 frames with 40 text tokens, float32, {torch.get_num_threads()} CPU "
          "threads; GMAC: 10^9 multiply-adds")


# ---- what every script needs: errors, files, progress --------------------------------------------


class UserError(ValueError):
    """A user's mistake, as one line: what, the value, what is allowed, the next command."""


def run_main(script, main):
    """Run a script's main(). A UserError is one line and exit code 2. A closed pipe (| head) is no
    error. Names that the terminal cannot encode are printed with backslashes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):           # a test's stream may be another class
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"{script}: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text):
    """Text of unknown origin, with control characters as escapes: no file name can move the cursor
    or forge a line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]",
                  lambda match: match[0].encode("unicode_escape").decode(), str(text))


def write_file(path, content):
    """Write a whole file or leave the old one: write a second file, flush it to the disk, rename.
    content: str or bytes. Raises UserError if the disk refuses."""
    if isinstance(content, str):
        content = content.encode()
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise UserError(f"{path} cannot be written: {error.strerror}; make room or choose another "
                        "folder") from None


def lock_folder(folder):
    """Hold `folder` until this process ends, or the file that is returned is closed.
    Raises UserError if another process holds it."""
    try:
        file = open(os.path.join(folder, ".lock"), "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process; wait for it, or choose another "
                        "--out") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another") from None
    return file


RANK = int(os.environ.get("RANK", 0))           # the number of this process; set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))    # how many processes there are


def pick_device(name):
    """The named device; else the GPU of this process, else the CPU."""
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise UserError(f"device {name}: {cause:.60}; eval.py takes --device cpu, cuda or "
                        "cuda:NUMBER; CUDA_VISIBLE_DEVICES= hides all GPUs") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def join_processes(device):
    """Join the other processes that torchrun has started, if any."""
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def print0(*parts):
    """Print on the first process alone."""
    if RANK == 0:
        print(*parts, flush=True)


def progress(iterable, what, total=None):
    """A progress bar of at most 79 columns, on the first process's terminal."""
    hidden = RANK > 0 or not sys.stderr.isatty()
    return tqdm(iterable, desc=what, total=total, ncols=79, disable=hidden, leave=False)


def default_workers():
    return min(8, (os.cpu_count() or 2) // 2)


def check_positive(args, *names):
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < 10 ** 9:
            raise UserError(f"--{name} {value}: must be above 0 and below a billion")


def check_workers(workers):
    if not 0 <= workers < 1000:
        raise UserError(f"--workers {workers}: must be from 0 to 999")


if __name__ == "__main__":
    run_main("allinone.py", main)
