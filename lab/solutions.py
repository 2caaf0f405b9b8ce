"""Answers to lab/exercises.py. Look here after you have tried.

    python lab/check.py --module lab/solutions.py
"""
import numpy as np
import torch


def roll_tokens(x, forward, backward):
    out = x.clone()
    out[:, :, forward] = x[:, :, forward].roll(1, dims=1)
    out[:, :, backward] = x[:, :, backward].roll(-1, dims=1)
    return out


def roll_gradient(grad, forward, backward):
    """A roll is a permutation. Its gradient is the permutation back: swap the groups."""
    return roll_tokens(grad, backward, forward)


def roll_groups(rows, cols, fraction, layout):
    N = 1 + rows * cols
    period = round(2 / fraction)
    count = (N - 1) // period
    if count == 0 or layout == "block":
        forward = torch.arange(1, 1 + count)
        backward = torch.arange(N - count, N)
        return forward, backward
    patch = torch.arange(rows * cols)
    phase = (patch % cols + 3 * (patch // cols)) % period
    forward = 1 + (phase == 0).nonzero()[:, 0]
    backward = 1 + (phase == period // 2).nonzero()[:, 0]
    return forward, backward


def frame_indices(num_frames, T, mode, rng=None):
    inside = 0.5
    if mode == "train":
        inside = rng.random(T)
    places = (np.arange(T) + inside) * num_frames / T
    return places.astype(int).tolist()


def attention(q, k, v, mask):
    K = q.shape[-1]
    scores = q @ k.mT / K ** 0.5                        # (B, H, S, S): queries, keys
    scores = scores.masked_fill(~mask, -torch.inf)
    # Without this line exp() overflows at scores above 88.
    scores = scores - scores.amax(-1, keepdim=True)
    weights = torch.exp(scores)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v


def mlm_loss(scores, labels):
    masked = labels >= 0
    right = labels[masked]                              # (M,)
    M = len(right)
    logs = scores[masked].log_softmax(-1)               # (M, V)
    losses = -logs[torch.arange(M), right]
    return losses.sum() / max(1, M)


def contrastive_loss(text, video, temperature=0.05):
    scores = text @ video.T / temperature               # (texts, clips)
    of_texts = -scores.log_softmax(1).diag().mean()
    of_clips = -scores.log_softmax(0).diag().mean()
    return of_texts + of_clips


def ranks(scores, target):
    row = np.arange(len(scores))
    own = scores[row, target][:, None]
    better = (scores > own).sum(1)
    equal = (scores == own).sum(1)                      # counts the right one too
    return 1 + better + (equal - 1) / 2


def embed_with_time(x, time_embed):
    """Token n of frame t is number t * N + n, so its frame is the number // N, not % T. And time
    is for patches alone."""
    out = x.clone()
    T = x.shape[1]
    out[:, :, 1:] += time_embed[:T, None]               # (T, 1, D): the same for all patches
    return out
