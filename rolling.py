"""Token rolling: the one idea of All-in-one (arXiv 2203.07303, section 3.2).

A transformer that looks at one frame at a time cannot see motion. Before every block, an eighth of each frame's
patch tokens moves to the next frame and another eighth to the previous one, so that ordinary attention inside a frame
reads its neighbours. Nothing is learnt and nothing is computed: the op is a permutation of tokens.

    python rolling.py                       which frame each token comes from, a check against the loop, and timings
    python rolling.py --svg figures/roll.svg        the same as a picture
"""
from html import escape

import torch


# ---- which tokens roll ----------------------------------------------------------------------------------------------

def roll_groups(rows, cols, fraction=1 / 4, layout="spread"):
    """Choose the slots that roll, in frames of rows x cols patches (slot 0 is CLS, slot 1 + r * cols + c a patch).

    fraction   share of the tokens that move, half of it each way: 0, or 2 / (an even whole number)
    layout     "spread": a lattice over the picture · "block": the first and the last slots · "none": nobody moves
    ->         (forward, backward), two int64 tensors of slots; both empty where fewer than one token would move
    Raises ValueError: an unknown layout, a fraction that is not of that form.
    Differs: the released op moves the first and the last eighth of the slots, after shuffling the patches of every
    frame at random on every call, in evaluation too. "block" is its slices without the shuffle, and rolls only the top
    and the bottom of the picture; "spread" covers the picture as evenly as the shuffle does, and is deterministic.
    """
    if layout not in ("spread", "block", "none"):
        raise ValueError(f"layout {layout!r} is unknown; choose spread, block or none")
    period = round(2 / fraction) if fraction else 0
    if fraction and (fraction < 0 or period < 2 or period % 2 or abs(period * fraction - 2) > 1e-9):
        raise ValueError(f"fraction {fraction} is not 0 or 2 / (an even whole number); choose 0, 1/8, 1/4, 1/2 or 1")
    N = 1 + rows * cols
    k = N // period if period else 0
    if layout == "none" or k == 0:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    if layout == "block":
        return torch.arange(1, 1 + k), torch.arange(N - k, N)
    # Every period-th patch in raster order would fall into columns on grids 4, 8 or 24 wide; 3 r shifts each row.
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    phase = ((c + 3 * r) % period).flatten()
    return 1 + (phase == 0).nonzero()[:, 0], 1 + (phase == period // 2).nonzero()[:, 0]


# ---- the op ---------------------------------------------------------------------------------------------------------

def roll_tokens(x, forward, backward):
    """Trade tokens between neighbouring frames: slots in `forward` move from frame t to frame (t + 1) mod T, slots in
    `backward` to frame (t - 1) mod T, every other token stays.

    x                   (B, T, N, D), any dtype, any strides; not modified
    forward, backward   1-d integer tensors of slots in 1..N-1, without a slot in common
    ->                  (B, T, N, D), a new tensor holding the same numbers; T = 1 gives x back
    Raises ValueError: x not 4-d; groups that overlap, repeat, leave 1..N-1, or hold slot 0 (CLS never moves).
    Source: paper section 3.2. Differs: with fewer than 8 slots the released op moves everything, CLS included; here
    roll_groups then gives empty groups and nothing moves. Slow twin: roll_loop.
    """
    check_groups(x, forward, backward)
    return Permute.apply(x, *roll_index(*x.shape[:3], forward.to(x.device), backward.to(x.device)))


def roll_loop(x, forward, backward):
    """The definition of roll_tokens, one token at a time. Same contract; for small shapes."""
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


def roll_index(B, T, N, forward, backward):
    """Rows of flat (B T N, D) for one roll: (index, inverse), int64 (B T N,); out[i] = x[index[i]], inverse undoes it.
    Built once per forward pass and shared by all blocks. Rolling the other way swaps the groups: the inverse."""
    frame, slot = torch.arange(T, device=forward.device), torch.arange(N, device=forward.device)
    clip = torch.arange(B, device=forward.device)[:, None, None] * T * N

    def source(down, up):                                   # where each (t, n) takes its token from
        rows = frame[:, None] * N + slot                                                        # (T, N)
        rows[:, down] = ((frame - 1) % T)[:, None] * N + down
        rows[:, up] = ((frame + 1) % T)[:, None] * N + up
        return (clip + rows).flatten()                                                          # (B T N,)

    return source(forward, backward), source(backward, forward)


class Permute(torch.autograd.Function):
    """x.view(rows, D)[index]. A function of its own because the gradient of a permutation is the inverse permutation,
    one more gather; autograd would otherwise scatter-add into zeros, which reads and writes the stream twice."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.reshape(-1, x.shape[-1]).index_select(0, index).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return grad.reshape(-1, grad.shape[-1]).index_select(0, inverse).view(grad.shape), None, None


def check_groups(x, forward, backward):
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; rolling needs (B, T, N, D)")
    slots = forward.tolist() + backward.tolist()
    if len(set(slots)) != len(slots):
        raise ValueError(f"groups {forward.tolist()} and {backward.tolist()} overlap or repeat a slot")
    if slots and not 1 <= min(slots) <= max(slots) < x.shape[2]:
        raise ValueError(f"groups reach from slot {min(slots)} to {max(slots)}; "
                         f"allowed are 1 to N - 1 = {x.shape[2] - 1}")


# ---- python rolling.py ----------------------------------------------------------------------------------------------

def picture(layout, T=3, side=14, color=True):
    """Text: T frames of side x side patches after one roll; each cell shows the frame that its token came from."""
    came_from = torch.arange(T).view(1, T, 1, 1).expand(1, T, 1 + side * side, 1)
    came_from = roll_tokens(came_from, *roll_groups(side, side, layout=layout))[0, :, 1:, 0].view(T, side, side)
    cell = [f"\033[4{6 - t};30m{t} \033[0m" if color else f"{t} " for t in range(T)]
    rows = ["   ".join("".join(cell[t] for t in came_from[f, r].tolist()) for f in range(T)) for r in range(side)]
    return "\n".join([f"{layout}:" + " " * 10 + "each cell: the frame its token came from"] + rows)


FRAMES = "#3f78d8", "#e8913a", "#3fa37c"                   # of three frames, also in other pictures
INK, SOFT, LINE = "#24292f", "#667079", "#dfe3e8"


def svg(width, height, *parts):
    """An SVG picture, on a white ground of its own: legible on any page."""
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                      f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}">',
                      box(0, 0, width, height, "#fff", 10), *parts, "</svg>\n"])


def box(x, y, width, height, fill, round=0):
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round}" fill="{fill}"/>'


def label(x, y, words, fill=INK, anchor="start", size=13, weight=400):
    return (f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}">'
            f'{escape(str(words))}</text>')


def figure(T=3, side=14, cell=12):
    """SVG: T frames of side x side patches before and after one roll, coloured by the frame each token comes from."""
    before = torch.arange(T).view(1, T, 1, 1).expand(1, T, 1 + side * side, 1)
    after, step = roll_tokens(before, *roll_groups(side, side)), side * cell + 26
    parts = [label(24, 34, "Token rolling", size=17, weight=600),
             label(24, 55, "Before every block, an eighth of each frame's tokens moves on by a frame, "
                           "an eighth back by one.", SOFT)]
    for row, (title, x) in enumerate({"before": before, "after": after}.items()):
        y = 92 + row * (side * cell + 40)
        parts.append(label(24, y + side * cell / 2 + 4, title, weight=600))
        for t in range(T):
            parts.append(label(94 + t * step, y - 8, f"frame {t}", SOFT))
            for f in range(T):
                tiles = (f"M{94 + t * step + i % side * cell} {y + i // side * cell}h{cell - 1}v{cell - 1}h{1 - cell}z"
                         for i in (x[0, t, 1:, 0] == f).nonzero()[:, 0].tolist())
                parts.append(f'<path d="{"".join(tiles)}" fill="{FRAMES[f]}"/>')
    bottom = 92 + 2 * (side * cell + 40) - 6
    parts += [part for t in range(T) for part in (box(94 + t * step, bottom - 10, 11, 11, FRAMES[t], 2),
                                                  label(111 + t * step, bottom, f"token from frame {t}"))]
    return svg(94 + T * step, bottom + 24, *parts)


def main():
    import argparse
    import sys
    from pathlib import Path
    from statistics import median
    from time import perf_counter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, help="write the picture to this file and stop")
    args = parser.parse_args()
    if args.svg:
        try:
            args.svg.parent.mkdir(parents=True, exist_ok=True)
            return args.svg.write_text(figure())
        except OSError as error:
            sys.exit(f"rolling.py: {args.svg} cannot be written: {error.strerror}")
    for layout in ("block", "spread"):
        print(picture(layout, color=sys.stdout.isatty()), end="\n\n")

    torch.manual_seed(0)
    for trial in range(50):
        rows, cols, B, T, D = (int(torch.randint(1, high, ())) for high in (8, 8, 4, 6, 5))
        groups = roll_groups(rows, cols, layout=("block", "spread")[trial % 2])
        x = torch.randn(B, T, 1 + rows * cols, D)
        assert torch.equal(roll_tokens(x, *groups), roll_loop(x, *groups)), (rows, cols, B, T, D)
    print("roll_tokens equals roll_loop exactly on 50 random shapes")

    # One block's stream at base size, 16 clips: 40 words, CLS and 196 patches per frame. The words never roll.
    x = torch.randn(16, 3, 237, 768, requires_grad=True)
    forward, backward = (slots + 40 for slots in roll_groups(14, 14, layout="block"))
    a, b = 41 + len(forward), 237 - len(backward)

    def roll_cat(x):                                        # the op as slices, torch.roll and cat would write it
        return torch.cat([x[:, :, :41], x[:, :, 41:a].roll(1, 1), x[:, :, a:b], x[:, :, b:].roll(-1, 1)], 2)

    assert torch.equal(roll_cat(x), roll_tokens(x, forward, backward))
    index, grad = roll_index(16, 3, 237, forward, backward), torch.ones_like(x)
    ways = {"clone": torch.clone, "roll_tokens": lambda x: Permute.apply(x, *index), "roll + cat": roll_cat}
    seconds = {way: ([], []) for way in ways}
    for _ in range(15):                                     # interleaved, so that a busy moment hits every way alike
        for way, op in ways.items():
            start = perf_counter()
            y = op(x)
            middle = perf_counter()
            y.backward(grad)
            seconds[way][0].append(middle - start)
            seconds[way][1].append(perf_counter() - start)
            x.grad = None
    start = perf_counter()
    roll_loop(x.detach(), forward, backward)
    loop = perf_counter() - start
    base = [median(s) for s in seconds["clone"]]
    print(f"\n(16, 3, 237, 768) float32, {torch.get_num_threads()} threads; "
          "medians, and ratio to a clone of the stream")
    for way, (once, both) in seconds.items():
        print(f"{way:12s} forward {median(once) * 1e3:8.1f} ms {median(once) / base[0]:7.2f} x"
              f"   forward + backward {median(both) * 1e3:8.1f} ms {median(both) / base[1]:7.2f} x")
    print(f"{'roll_loop':12s} forward {loop * 1e3:8.1f} ms {loop / base[0]:7.2f} x")


if __name__ == "__main__":
    main()
