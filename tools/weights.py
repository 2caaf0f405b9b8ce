"""Weights of other code -> a checkpoint of this code.

    python tools/weights.py all-in-one-base.ckpt base.pt --tokenizer vocab.txt
    python tools/weights.py deit_base.pth start.pt --tokenizer bert-base-uncased

Reads the released All-in-one (Lightning), ViLT (released or Hugging Face), and ViT or DeiT (timm or
Hugging Face). The file written holds config, task heads, answers and tokenizer, so that eval.py and
train.py --init take it as it is. One printed line accounts for every tensor.
Nothing in a file is executed. safetensors, for .safetensors files, is an optional package.
"""
import argparse
import math
import re
import sys
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run from a checkout: the core
                                                                    # is one folder up
from allinone import (HEADS, AllInOne, Config, UserError, check_tensors, copy_rank_from_matching,
                      printable, run_main, save_checkpoint, top_name)
from data import Tokenizer, read_answer_file

# ---- names ---------------------------------------------------------------------------------------

# Parts of Hugging Face's names, at any position. The released names contain none of them.
HUGGING_FACE = {
    "encoder.layer.": "blocks.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".attention.attention.query.": ".attn.q.",
    ".attention.attention.key.": ".attn.k.",
    ".attention.attention.value.": ".attn.v.",
    ".attention.output.dense.": ".attn.proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
    # a ViT's state_dict() in transformers 5, before save_pretrained gives it the names above
    ".attention.q_proj.": ".attn.q.",
    ".attention.k_proj.": ".attn.k.",
    ".attention.v_proj.": ".attn.v.",
    ".attention.o_proj.": ".attn.proj.",
}
# How names start, and our name for that. Blocks, norm, cls_token and pos_embed keep timm's names.
STARTS = {
    "layers.": "blocks.",
    "layernorm.": "norm.",
    "text_embeddings.word_embeddings.": "text_embed.",
    "text_embeddings.position_embeddings.weight": "text_pos",
    "text_embeddings.token_type_embeddings.weight": "text_segment",
    "text_embeddings.LayerNorm.": "text_norm.",
    "text_embeddings.position_ids": "position_ids",
    "token_type_embeddings.weight": "modality_embed",
    "patch_embed.proj.": "patch_embed.",
    "patch_embeddings.projection.": "patch_embed.",
    "position_embeddings": "pos_embed",
    "temporal_embed": "time_embed",
    "pooler.dense.": "pooler.",
    "itm_score.fc.": "task_heads.matching.",
    "mlm_score.transform.dense.": "task_heads.mlm.0.",
    "mlm_score.transform.LayerNorm.": "task_heads.mlm.2.",
    "mlm_score.decoder.": "task_heads.mlm.3.",
    "mlm_score.bias": "task_heads.mlm.3.bias",
    "vqa_classifier.": "task_heads.answer.",
    "mc_vqa_classifier.": "task_heads.mc.",
    "rank_output.": "task_heads.rank.",
    "txt_proj.": "task_heads.contrast.text.",
    "vid_proj.": "task_heads.contrast.video.",
}
CLASSIFIER = "a classifier that this model does not have"
DISTILLATION = "this model has no distillation token"
UNUSED = {
    "position_ids": "constant",
    "dist_token": DISTILLATION,
    "distillation_token": DISTILLATION,
    "mask_token": "for pictures with masks",
    "head": CLASSIFIER,
    "head_dist": CLASSIFIER,
    "pre_logits": CLASSIFIER,
    "classifier": CLASSIFIER,
    "cls_classifier": CLASSIFIER,
    "nlvr2_classifier": CLASSIFIER,
    "distillation_classifier": CLASSIFIER,
}
# What each kind of file cannot hold. Everything else must be there.
LACKS = {
    "All-in-one": (),
    "ViLT": ("time_embed",),
    "ViT": ("text_embed", "text_pos", "text_segment", "text_norm", "modality_embed", "time_embed",
            "pooler"),
}


def our_name(name):
    """The name of a foreign tensor in this model; a name that no rule knows stays as it is."""
    name = re.sub(r"^(transformer\.|vilt\.|vit\.|deit\.)?(embeddings\.)?", "", name)
    for theirs, ours in HUGGING_FACE.items():
        name = name.replace(theirs, ours)
    for theirs, ours in STARTS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


# ---- files ---------------------------------------------------------------------------------------

# Classes named in files of Lightning and DeiT. Plain data stands in: their code does not run.
HARMLESS = [
    argparse.Namespace,
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (dict, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
]


def read_tensors(path):
    """{name: tensor} of a file; the tensors are not checked yet. Raises UserError: no file,
    damaged, needs code that is not run, holds no state dict, or is a checkpoint of this code."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a .ckpt, .pt, .pth, .bin or .safetensors file")
    try:
        content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    except UserError:
        raise
    except Exception as error:                          # a broken file can fail in any way
        needs = re.search(r"GLOBAL (\S+)", str(error))
        if needs:
            raise UserError(f"{path} names {printable(needs[1])}, code that would have to run; ask "
                            "its author for the state dict alone") from None
        raise UserError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__}); copy "
                        "it again, or save the state dict alone with torch.save") from None
    tensors = content
    if isinstance(content, dict):
        for key in ("model", "state_dict"):             # DeiT, Lightning
            if isinstance(content.get(key), dict):
                tensors = content[key]
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} holds no state dict; save one with torch.save")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path} holds no state dict: {printable(name):.80} is no tensor")
    if "text_embed.weight" in tensors:
        raise UserError(f"{path} has this code's own names already; use it as it is")
    return tensors


def read_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path} needs one more package: pip install safetensors") from None
    return load_file(path)


def read_pickle(path):
    """A file of torch.save, also of the format before zip, which has no checksums."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > path.stat().st_size or archive.testzip() is not None:
                raise zipfile.BadZipFile                # compressed, or a wrong checksum
    with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(HARMLESS):
        return torch.load(path, "cpu", weights_only=True, mmap=zipped)


# ---- tensors -------------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of the tensors: {our name: why}."""
    kind: str           # All-in-one, ViLT or ViT
    new: dict           # of the model, not in the file
    unused: dict        # of the file, not in the model
    notes: list


def convert(path, answers=(), heads=None):
    """Read a foreign file as this model's weights.

    answers: the answer list; the answer head is kept only if it has as many classes
    heads: number of attention heads, which no tensor shows; None: by the width
    Returns (Config, task head names, {our name: float32 tensor}, Report). Where a ViT has no words,
    vocab is Config's default and text_embed is not in the state dict.
    Raises UserError: unreadable, another architecture, or tensors lacking, misshapen, not dense,
    not floats or not finite.
    Differs: the released code rolls a block of tokens, out of patches that it shuffles; this model
    spreads them (roll="spread") and does not shuffle.
    """
    path = Path(path)
    state, unused = rename(path, read_tensors(path))
    kind = "ViT"
    if "text_embed.weight" in state:
        kind = "All-in-one" if "time_embed" in state else "ViLT"
    report = Report(kind, {}, unused, [])
    drop_axes(path, state, report)
    fuse_qkv(path, state)
    if kind == "ViT":
        leave_out(state, "pooler.", "made for the image's CLS", report)
    classes = len(state.get("task_heads.answer.4.bias", ()))
    if kind == "ViLT":
        leave_out(state, "task_heads.answer.", CLASSIFIER, report)
    elif classes != len(answers):
        reason = f"{classes} classes, {len(answers)} answers given"
        leave_out(state, "task_heads.answer.", reason, report)
    if kind == "ViLT":
        report.notes.append("ViLT was trained on pixels from -1 to 1")
        if "task_heads.mlm.0.weight" in state and "task_heads.mlm.3.weight" not in state:
            state["task_heads.mlm.3.weight"] = state["text_embed.weight"]
            report.notes.append("the mlm decoder is text_embed")
    config = read_config(path, state, heads)
    task_heads = find_heads(state)
    with torch.device("meta"):                          # shapes alone
        expected = AllInOne(config, task_heads).state_dict()
    for name in list(expected):
        if name not in state and top_name(name) in LACKS[kind]:
            report.new[name] = f"not in a {kind}"
            del expected[name]
    check_tensors(path, state, expected)
    for head in ("rank", "rank2"):                      # zero-shot multiple choice reads them
        if "matching" in task_heads and head not in task_heads:
            copy_rank_from_matching(state, head)
            for part in ("weight", "bias"):
                report.new[f"task_heads.{head}.{part}"] = "row 1 of matching"
    return config, find_heads(state), state, report


def rename(path, tensors):
    """-> ({our name: float32 tensor}, {our name: why it is not used})."""
    state = {}
    unused = {}
    names = {name: our_name(name) for name in tensors}
    for name in ("patch_embed.weight", "cls_token", "pos_embed", "blocks.0.norm1.weight"):
        if name not in names.values():
            raise UserError(f"{path} lacks {name}: not All-in-one, ViLT, ViT or DeiT; its tensors: "
                            f"{printable(', '.join(list(tensors)[:3])):.100}, ...")
    for theirs, tensor in tensors.items():
        name = names[theirs]
        if top_name(name) in UNUSED:
            unused[name] = UNUSED[top_name(name)]
            continue
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            raise UserError(f"{path}: {printable(theirs)} is not a dense tensor")
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {printable(theirs)} has dtype {tensor.dtype}, not floats")
        if tensor.dim() == 0 or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {printable(theirs)} has shape {tuple(tensor.shape)}, but not "
                            "the numbers for it")
        tensor = tensor.detach().float()
        if name in state and not torch.equal(state[name], tensor):
            raise UserError(f"{path} holds two different tensors for {printable(name)}")
        state[name] = tensor
    return state, unused


def drop_axes(path, state, report):
    """Bring the tables to this model's shapes: no batch axis, no distillation token."""
    for name, axes in (("patch_embed.weight", 4), ("cls_token", 3), ("pos_embed", 3),
                       ("time_embed", 3)):
        if name in state and state[name].dim() != axes:
            raise UserError(f"{path}: {name} has shape {tuple(state[name].shape)}, not {axes} axes")
    state["cls_token"] = state["cls_token"].flatten()
    for name in ("pos_embed", "time_embed"):
        if name in state:
            state[name] = state[name].squeeze(0)
    if DISTILLATION in report.unused.values():
        table = state["pos_embed"]
        state["pos_embed"] = torch.cat([table[:1], table[2:]])
        report.notes.append(f"pos_embed cut from {len(table)} to {len(table) - 1} rows")
    if len(state.get("modality_embed", ())) > 2:        # ViLT for two pictures
        rows = len(state["modality_embed"])
        state["modality_embed"] = state["modality_embed"][:2]
        report.notes.append(f"modality_embed cut from {rows} to 2 rows")


def fuse_qkv(path, state):
    """Hugging Face keeps query, key and value apart."""
    for name in list(state):
        if ".attn.q." not in name:
            continue
        try:
            parts = [state.pop(name.replace(".attn.q.", f".attn.{letter}.")) for letter in "qkv"]
            fused = torch.stack(parts).flatten(0, 1)
        except (KeyError, RuntimeError):
            raise UserError(f"{path}: query, key and value of {printable(name)} are not alike or "
                            "not all there") from None
        state[name.replace(".attn.q.", ".attn.qkv.")] = fused


def leave_out(state, start, reason, report):
    for name in list(state):
        if name.startswith(start):
            del state[name]
            report.unused[name] = reason


def find_heads(state):
    tops = {name.split(".")[1] for name in state if name.startswith("task_heads.")}
    return [head for head in HEADS if head in tops]


# Of ViT tiny, small, base, large and huge.
ATTENTION_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


def read_config(path, state, heads):
    """The Config that the shapes show."""
    D, patch = state["patch_embed.weight"].shape[::3]
    patches = len(state["pos_embed"]) - 1
    grid = math.isqrt(max(0, patches))
    if grid ** 2 != patches:
        raise UserError(f"{path} has positions for CLS and {patches} patches, which are no square")
    if heads is None:
        heads = ATTENTION_HEADS.get(D)
    if heads is None:
        raise UserError(f"{path} does not show its number of attention heads, and width {D} is not "
                        f"a usual one ({', '.join(map(str, ATTENTION_HEADS))}); add --heads N")
    sizes = {"width": D, "patch": patch, "image": grid * patch, "heads": heads,
             "layers": len({name.split(".")[1] for name in state if name.startswith("blocks.")})}
    for field, name in (("frames", "time_embed"), ("text_length", "text_pos"),
                        ("vocab", "text_embed.weight"), ("answers", "task_heads.answer.4.bias"),
                        ("embed", "task_heads.contrast.text.bias")):
        if name in state:
            sizes[field] = len(state[name])
    try:
        return Config(**sizes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ---- python tools/weights.py ---------------------------------------------------------------------


def listing(reasons):
    """{name: why} -> "3: head, head_dist (why)": each name's first part, once."""
    groups = {}
    for name, why in reasons.items():
        groups.setdefault(why, {})[top_name(name)] = None
    texts = [f"{', '.join(names)} ({why})" for why, names in groups.items()]
    return f"{len(reasons)}: {', '.join(texts)}"


def report_line(report, config, total):
    line = (f"{report.kind}, {config.layers} layers {config.width} wide, {config.heads} attention "
            f"heads: loaded {total - len(report.new)} of {total} tensors")
    if report.new:
        line += f"; new {listing(report.new)}"
    if report.unused:
        line += f"; not used {listing(report.unused)}"
    for note in report.notes:
        line += f"; {note}"
    return line


def find_tokenizer(path):
    for name in ("tokenizer.json", "vocab.txt"):
        candidate = Path(path).with_name(name)
        if candidate.is_file():
            return str(candidate)
    raise UserError(f"the folder of {path} has no tokenizer.json or vocab.txt; add --tokenizer "
                    "vocab.txt (for the released weights: the one of bert-base-uncased)")


def main():
    parser = argparse.ArgumentParser(description="weights of other code into a checkpoint")
    parser.add_argument("source", metavar="IN", help=".ckpt, .pt, .pth, .bin or .safetensors")
    parser.add_argument("out", metavar="OUT.pt")
    parser.add_argument("--tokenizer", help="vocab.txt, tokenizer.json or hub name; default: "
                                            "the one in the folder of IN")
    parser.add_argument("--answers", help="text file, one answer a line, in the order "
                                          "of the classes; keeps the answer head of IN")
    parser.add_argument("--heads", type=int, help="attention heads; default: by the width")
    args = parser.parse_args()
    if Path(args.out).resolve() == Path(args.source).resolve():
        raise UserError(f"OUT {args.out} is IN itself; choose another file")
    tokenizer = args.tokenizer or find_tokenizer(args.source)
    answers = read_answer_file(args.answers) if args.answers else []
    config, task_heads, state, report = convert(args.source, answers, args.heads)
    words = Tokenizer.load(tokenizer)
    if "text_embed.weight" not in state:
        config = replace(config, vocab=len(words))
    elif len(words) > config.vocab:
        raise UserError(f"tokenizer {tokenizer} has {len(words)} tokens, {args.source} embeddings "
                        f"for {config.vocab}; give its own with --tokenizer")
    model = AllInOne(config, task_heads)
    start = model.state_dict()
    model.load_state_dict({**start, **state})
    if answers and "answer" not in task_heads:
        answers = []
        report.notes.append("--answers not used")
    save_checkpoint(args.out, model, answers=answers, tokenizer=words.to_json(), task="pretrain",
                    source=f"{Path(args.source).name} ({report.kind})")
    line = report_line(report, config, len(start))
    print(printable(f"{args.out}: {line}; tokenizer {tokenizer} ({len(words)} tokens for "
                    f"{config.vocab} embeddings)"))


if __name__ == "__main__":
    run_main("weights.py", main)
