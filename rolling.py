"""Token rolling: the one idea of All-in-one (arXiv 2203.07303, section 3.2).

A transformer that looks at one frame at a time cannot see motion. So before every block, an eighth
of each frame's patch tokens moves to the next frame and another eighth to the previous one.
Attention inside a frame then also sees tokens of the neighbouring frames. Nothing is learnt and
nothing is computed: rolling is a permutation of tokens.

    python rolling.py        which frame each token comes from, and a check against the loop

Axes: B clips, T frames, N visual tokens per frame (CLS first), D width.
"Differs:" in a docstring says where this code departs from the authors' released code.
"""
import torch

FRACTIONS = (0, 1 / 8, 1 / 4, 1 / 2, 1)


def roll_groups(rows, cols, fraction=1 / 4, layout="spread"):
    """Choose the tokens that roll, in frames of rows x cols patches.

    fraction   share of the patches that move, half of it each way: one of FRACTIONS
    layout     "spread": a lattice over the picture; "block": the first and the last tokens;
               "none": no token moves
    Returns (forward, backward): two int64 tensors of token numbers. Token 0 is CLS and never moves;
    token 1 + r * cols + c is the patch in row r and column c. Both are empty if less than one
    token would move. With "spread" their sizes may differ (14 x 14, fraction 1/2: 50 and 48).
    Raises ValueError for an unknown layout or fraction.
    Differs: before it moves the first and the last eighth, the released op shuffles the patches of
    each frame at random, every frame differently, in evaluation too. "block" is the same slices
    without the shuffle. "spread" covers the picture as evenly as the shuffle does, and is
    deterministic. With fewer than 8 tokens an eighth is 0 tokens, and x[-0:] is all of x: the
    released op then moves everything, CLS included.
    """
    if layout not in ("spread", "block", "none"):
        raise ValueError(f"layout {layout!r} is unknown; choose spread, block or none")
    if fraction not in FRACTIONS:
        raise ValueError(f"fraction {fraction} is unknown; choose 0, 1/8, 1/4, 1/2 or 1")
    empty = torch.empty(0, dtype=torch.long)
    if layout == "none" or fraction == 0:
        return empty, empty
    period = round(2 / fraction)                # 2, 4, 8 or 16
    N = 1 + rows * cols
    count = (N - 1) // period
    if count == 0:
        return empty, empty
    if layout == "block":
        return torch.arange(1, 1 + count), torch.arange(N - count, N)
    # Every period-th patch would form columns where cols is a multiple of the period. So each row
    # is shifted by 3 against the one above: 3 is odd, the periods are powers of 2, and the result
    # is a lattice.
    row = torch.arange(rows)[:, None]
    col = torch.arange(cols)
    phase = ((col + 3 * row) % period).flatten()
    forward = 1 + (phase == 0).nonzero()[:, 0]
    backward = 1 + (phase == period // 2).nonzero()[:, 0]
    return forward, backward


def roll_tokens(x, forward, backward):
    """Move the tokens of `forward` to the next frame and those of `backward` to the previous one.
    The last frame's next is the first.

    x (B, T, N, D), any dtype, not modified; forward, backward: 1-d int64 tensors without a token in
    common. Returns a new tensor (B, T, N, D). Source: paper, section 3.2.
    Raises ValueError if x is not 4-d, and on a CPU also if the groups overlap, hold token 0 (CLS)
    or exceed N - 1.
    """
    check_groups(x, forward, backward)
    out = x.clone()
    out[:, :, forward] = x[:, :, forward].roll(1, dims=1)
    out[:, :, backward] = x[:, :, backward].roll(-1, dims=1)
    return out


def roll_loop(x, forward, backward):
    """The same as roll_tokens, one token at a time: the definition. Slow; for checking."""
    check_groups(x, forward, backward)
    B, T, N, D = x.shape
    out = x.clone()
    for b in range(B):
        for t in range(T):
            for n in forward.tolist():
                out[b, (t + 1) % T, n] = x[b, t, n]
            for n in backward.tolist():
                out[b, (t - 1) % T, n] = x[b, t, n]
    return out


def check_groups(x, forward, backward):
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; rolling needs (B, T, N, D)")
    if torch.compiler.is_compiling() or forward.device.type != "cpu":
        return      # reading values breaks torch.compile's graph, and makes the CPU wait for a GPU
    tokens = forward.tolist() + backward.tolist()
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"groups {forward.tolist()} and {backward.tolist()} overlap")
    if tokens and (min(tokens) < 1 or max(tokens) >= x.shape[2]):
        raise ValueError(f"groups hold tokens {min(tokens)} to {max(tokens)}; "
                         f"allowed are 1 to N - 1 = {x.shape[2] - 1}")


def picture(layout, T=3, side=12):              # the model's 14 do not fit into a terminal's width
    """Text: T frames of side x side patches after one roll; each cell names the frame that its
    token came from."""
    frame_of = torch.arange(T).view(1, T, 1, 1).expand(1, T, 1 + side * side, 1)
    rolled = roll_tokens(frame_of, *roll_groups(side, side, layout=layout))
    cells = rolled[0, :, 1:, 0].view(T, side, side)
    lines = [f"{layout}: each cell is the frame its token came from"]
    for row in range(side):
        frames = []
        for t in range(T):
            frames.append(" ".join(str(frame) for frame in cells[t, row].tolist()))
        lines.append("   ".join(frames))
    return "\n".join(lines)


def main():
    for layout in ("block", "spread"):
        print(picture(layout), end="\n\n")
    torch.manual_seed(0)
    for _ in range(25):
        rows, cols, B, T, D = torch.randint(3, 7, (5,)).tolist()
        x = torch.randn(B, T, 1 + rows * cols, D)
        for layout in ("block", "spread"):
            groups = roll_groups(rows, cols, layout=layout)
            assert torch.equal(roll_tokens(x, *groups), roll_loop(x, *groups)), (layout, x.shape)
    print("roll_tokens equals roll_loop on 25 random shapes, in both layouts")


if __name__ == "__main__":
    main()
