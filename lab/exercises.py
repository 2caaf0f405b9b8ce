"""Nine functions to write. Each one is short, and the project has each of them too.

    python lab/check.py                 checks all of them
    python lab/check.py roll_tokens     checks one of them

Replace `raise NotImplementedError` by your code. The last function is complete but wrong: correct
it. Do not change what you are given: work on copies, such as x.clone().

Axes: B clips, T frames, N visual tokens per frame (CLS first), L text tokens, S = L + N tokens,
D width, H attention heads, K = D // H, V vocabulary, Q queries, C candidates.
"""
import numpy as np      # for frame_indices
import torch


def roll_tokens(x, forward, backward):
    """Move some tokens of each frame to its neighbours.

    x                   (B, T, N, D)
    forward, backward   1-d int64 tensors of token numbers, 0 to N - 1
    Returns a new tensor (B, T, N, D). The tokens `forward` move to the next frame, the tokens
    `backward` to the previous frame. After the last frame comes the first. A token keeps its
    number, and all other tokens stay.

    Example: T = 3 frames of N = 4 tokens, forward = [1], backward = [3]. A letter is a frame.
        frame 0:  a a a a          a c a b
        frame 1:  b b b b    ->    b a b c
        frame 2:  c c c c          c b c a
    """
    raise NotImplementedError


def roll_gradient(grad, forward, backward):
    """The gradient of roll_tokens, without autograd.

    grad   (B, T, N, D): the gradient of a loss with respect to the output of
           roll_tokens(x, forward, backward)
    Returns the gradient with respect to x, (B, T, N, D).

    Example: forward = [1]. Token 1 of frame 0 of x is in frame 1 of the output. So its gradient is
    in frame 1 of `grad`.
    """
    raise NotImplementedError


def roll_groups(rows, cols, fraction, layout):
    """Choose the tokens that roll, in frames of rows x cols patches.

    Token 0 is CLS and never rolls. The patch in row r and column c is token 1 + r * cols + c.
    There are N = 1 + rows * cols tokens. period = round(2 / fraction), and
    count = (N - 1) // period. If count is 0, both groups are empty.
    layout   "block": forward are the first `count` patches, backward the last `count`
             "spread": forward are all patches with (c + 3 * r) % period == 0, backward all with
             (c + 3 * r) % period == period // 2 (may be more than `count`)
    Returns (forward, backward): two int64 tensors, in rising order.

    Example: roll_groups(3, 3, 1 / 2, "block")  -> [1, 2], [8, 9]
             roll_groups(3, 3, 1 / 2, "spread") -> [1, 5, 9], [3, 7]
    """
    raise NotImplementedError


def frame_indices(num_frames, T, mode, rng=None):
    """Choose T frames of a clip of num_frames frames.

    Cut the clip into T equal segments and choose one frame in each of them. The segments may have
    a length that is not an integer, and may be shorter than a frame. Place p lies in frame
    floor(p).
    mode   "eval": the frame at the middle of each segment
           "train": the frame at a random place of each segment; call rng.random(T) once
    Returns a list of T ints from 0 to num_frames - 1, in rising order.

    Example: frame_indices(10, 2, "eval") -> [2, 7]       the middles are at 2.5 and 7.5
             frame_indices(2, 4, "eval")  -> [0, 0, 1, 1]
    """
    raise NotImplementedError


def attention(q, k, v, mask):
    """Scaled dot-product attention, with the softmax written out (torch.exp, no F.softmax).

    q, k, v   (B, H, S, K)
    mask      (B, 1, 1, S) bool: True where a token may be attended to, False at padding
    Returns (B, H, S, K). Every token is a query, padding too. Padding must get no attention.
    Scores may be in the thousands: exp() must not overflow.

    Example: with only mask[0, 0, 0, 0] True, every query of clip 0 gets v[0, :, 0].
    """
    raise NotImplementedError


def mlm_loss(scores, labels):
    """The loss of masked language modelling, in nats.

    scores   (B, L, V) float
    labels   (B, L) int64: the true word where a word was masked (word 0 is a word), -1 at all
             other places
    Returns a tensor without axes: the mean cross-entropy over all masked words of the batch, or 0
    if no word is masked.

    Example: with equal scores for all V words the loss is log(V), for any number of masked words
    above 0.
    """
    raise NotImplementedError


def contrastive_loss(text, video, temperature=0.05):
    """Each text must find its clip, and each clip its text.

    text, video   (B, D) unit vectors; row i of both belongs together
    Returns a tensor without axes: the mean cross-entropy of the texts, each choosing from the B
    clips, plus that of the clips, each choosing from the B texts. A score is a cosine divided by
    the temperature.

    Example: if all vectors are equal, the loss is 2 * log(B).
    """
    raise NotImplementedError


def ranks(scores, target):
    """The rank of the right candidate, 1 for the best. R@k is the share of ranks <= k.

    scores   (Q, C) numpy array of floats, higher is better
    target   (Q,) numpy array of ints, the column of the right candidate
    Returns a float array (Q,). Candidates with equal scores share the mean of their places.

    Example: scores [[5, 9, 1], [4, 4, 1]], target [0, 0] -> [2, 1.5]
    """
    raise NotImplementedError


def embed_with_time(x, time_embed):
    """Add a time embedding to the patches of each frame. This function has two bugs: find them.

    x            (B, T, N, D), CLS first in each frame
    time_embed   (T or more rows, D): one row per frame
    Returns a new tensor (B, T, N, D). Every patch of frame t gets row t. CLS gets nothing.
    """
    B, T, N, D = x.shape
    frame = torch.arange(T * N) % T
    return x + time_embed[frame].view(T, N, D)
