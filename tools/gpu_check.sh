#!/usr/bin/env bash
# Everything that only a GPU can show, in one run of at most 8 minutes:
#     bash tools/gpu_check.sh                         base size, on one GPU
#     DEVICE=cpu bash tools/gpu_check.sh quick        a rehearsal without one, toy size
# Prints PASS, FAIL, TIMEOUT or SKIP (no time left) for each step, and keeps all output in
# $OUT/gpu_check.log.
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} STEPS=300
export OUT=${OUT:-/tmp/gpu_check} WORK
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$OUT"
LOG=$OUT/gpu_check.log
TOTAL=480                                   # seconds for all steps
SLOWER=1                                    # factor of all limits
SIZE=base CLIPS=2000 WORKERS=16 BATCH=64
if [ "${1:-full}" = quick ]; then
    SIZE=toy CLIPS=8 WORKERS=2 BATCH=4 STEPS=20
fi
if [ "$DEVICE" = cpu ]; then
    export CUDA_VISIBLE_DEVICES=""
    SLOWER=4
fi
: >"$LOG"
RESULTS=()
FAILED=0

step() {                                    # step NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * SLOWER)) start=$SECONDS result=PASS code
    shift 2
    if ((limit > TOTAL * SLOWER - SECONDS)); then
        limit=$((TOTAL * SLOWER - SECONDS))
    fi
    printf '\n==== %s\n' "$name" | tee -a "$LOG"
    if ((limit < 5)); then
        result=SKIP
    else
        timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$LOG"
        code=${PIPESTATUS[0]}
        case $code in
            0) ;;
            124 | 137) result=TIMEOUT ;;
            *) result=FAIL ;;
        esac
    fi
    [ "$result" = PASS ] || FAILED=1
    RESULTS+=("$(printf '%-8s %4d s  %s' "$result" $((SECONDS - start)) "$name")")
}

cat >"$WORK/check.py" <<'PYTHON'
"""check.py maths: this device against the CPU. check.py processes: under torchrun."""
import os
import sys
from copy import deepcopy
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, os.getcwd())
from allinone import SIZES, AllInOne
from data import BENCHMARKS
from eval import to_device
from rolling import roll_groups, roll_loop, roll_tokens
from tools.bench import RATES, make_batch
from train import Losses, make_optimizer, train_step

DEVICE = os.environ["DEVICE"]
FAILED = []


def check(what, error, limit):
    good = error <= limit
    print(f"{'ok  ' if good else 'BAD '} {what}: {error:.1e} (limit {limit:.0e})", flush=True)
    if not good:
        FAILED.append(what)


def difference(ours, theirs):
    """The largest difference, relative to the largest value."""
    theirs = theirs.detach().double().cpu()
    return float((ours.detach().double().cpu() - theirs).abs().max() / theirs.abs().max())


def make_model(size):
    torch.manual_seed(0)
    config = replace(SIZES[size], dropout=0.0, drop_path=0.0)
    return config, AllInOne(config, ("matching", "mlm")).eval()


def inputs_of(config, device):
    torch.manual_seed(1)
    batch = to_device(make_batch(config, 4), device)
    ids = batch["input_ids"][:, 0]
    mask = torch.arange(40, device=device) < torch.tensor([[40], [21], [9], [2]], device=device)
    return batch["frames"], ids, mask


def gradients(model, device, config):
    out = model(*inputs_of(config, device))
    sum(part.square().mean() for part in out).backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def maths():
    torch.backends.cudnn.allow_tf32 = False             # float32 is to be float32 here
    x = torch.randn(2, 3, 17, 8)
    for layout in ("spread", "block"):
        groups = roll_groups(4, 4, 1 / 2, layout)
        rolled = roll_tokens(x.to(DEVICE), *(group.to(DEVICE) for group in groups))
        check(f"roll_tokens = roll_loop, {layout}", difference(rolled, roll_loop(x, *groups)), 0)
    for size in ("toy", "tiny"):
        config, model = make_model(size)
        for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            theirs, their_gradients = gradients(deepcopy(model).to(dtype), "cpu", config)
            ours, our_gradients = gradients(deepcopy(model).to(DEVICE, dtype), DEVICE, config)
            for name in ours._fields:
                error = difference(getattr(ours, name), getattr(theirs, name))
                check(f"{size}, {dtype}, {name}, {DEVICE} = cpu", error, limit)
            largest = max(float(g.abs().max()) for g in their_gradients.values())
            errors = []
            for name, theirs in their_gradients.items():
                ours = our_gradients[name].cpu()
                scale = max(float(theirs.abs().max()), 1e-3 * largest)
                errors.append(float((ours - theirs).abs().max()) / scale)
            error = float(torch.tensor(errors).max())       # nan if one of them is
            check(f"{size}, {dtype}, gradients, {DEVICE} = cpu", error, limit)
        model.to(DEVICE)
        frames, ids, mask = inputs_of(config, DEVICE)
        with torch.inference_mode():
            whole = model(frames, ids, mask)
            other = model(frames, torch.where(mask, ids, 7), mask)
            check(f"{size}, padding is inert", difference(other.pooled, whole.pooled), 1e-5)
            with torch.autocast(DEVICE, torch.bfloat16):
                low = model(frames, ids, mask)
            for name in low._fields:
                error = difference(getattr(low, name), getattr(whole, name))
                check(f"{size}, bfloat16 = float32, {name}", error, 2e-2)
    compiled = torch.compile(model)
    with torch.no_grad():
        whole = model(frames, ids, mask)
        error = difference(compiled(frames, ids, mask).pooled, whole.pooled)
    check(f"{size}, compiled = eager", error, 1e-4)


def processes():
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    for name in ("msrvtt", "webvid"):
        benchmark = BENCHMARKS[name]
        config = SIZES["toy"]
        model = AllInOne(config, benchmark.heads).to(DEVICE)
        losses = Losses(model, benchmark)
        optimizer = make_optimizer(model, RATES)
        losses = DistributedDataParallel(losses, find_unused_parameters=name == "msrvtt")
        batch = to_device(make_batch(config, 8), DEVICE)
        for _ in range(2):
            means = train_step(losses, optimizer, [batch], DEVICE == "cuda")
        print(f"{name}, {dist.get_backend()}: {means}")
        if not all(loss.isfinite() for loss in means.values()):
            FAILED.append(name)
    dist.destroy_process_group()


{"maths": maths, "processes": processes}[sys.argv[1]]()
if FAILED:
    sys.exit(f"failed: {', '.join(FAILED)}")
PYTHON

same() {                                    # same FIRST SECOND TOLERANCE: two accuracies
    echo "accuracies: $1 and $2, may differ by $3"
    awk "BEGIN { d = $1 - $2; exit !(d <= $3 && -d <= $3) }"
}

accuracy() {                                # of a test.json
    $PYTHON -c "import json, sys
for figures in json.load(open(sys.argv[1])).values():
    print(figures['metrics']['accuracy'])" "$1"
}

resume() {
    local run="$PYTHON train.py --data $WORK/toy/msrvtt-qa --steps $STEPS --out"
    $run "$WORK/whole" || return 1
    $run "$WORK/cut" &
    local process=$! waited=0
    until [ -s "$WORK/cut/metrics.jsonl" ] || ((waited++ > 300)); do
        sleep 0.2
    done
    kill -TERM $process
    wait $process
    $run "$WORK/cut" --resume | tee "$WORK/resumed" || return 1
    grep "resumed at step" "$WORK/resumed" || return 1
    same "$(accuracy "$WORK/whole/test.json")" "$(accuracy "$WORK/cut/test.json")" 3
}

devices() {
    local device
    for device in cpu "$DEVICE"; do
        $PYTHON eval.py "$WORK/whole" --device "$device" | tee "$WORK/eval.$device" || return 1
    done
    same "$(sed -n 's/^[^:]*: accuracy \([0-9.]*\).*/\1/p' "$WORK/eval.cpu" | head -1)" \
         "$(sed -n 's/^[^:]*: accuracy \([0-9.]*\).*/\1/p' "$WORK/eval.$DEVICE" | head -1)" 0.2
}

torchrun_steps() {
    local run="$PYTHON -m torch.distributed.run --standalone --nproc_per_node=1"
    $run "$WORK/check.py" processes || return 1
    $run train.py --data "$WORK/toy/msrvtt" --steps 2 --out "$WORK/retrieval" || return 1
    $run train.py --data "$WORK/toy/webvid" --steps 2 --out "$WORK/pretrain"
}
export -f same accuracy resume devices torchrun_steps

step "model bench, GPU idle" 200 "$PYTHON" tools/bench.py model --size $SIZE --device "$DEVICE"
step "loader bench" 120 "$PYTHON" tools/bench.py loader --size $SIZE --device "$DEVICE" \
    --clips $CLIPS --workers $WORKERS --batch $BATCH --folder "$WORK/clips"
step "maths: GPU = CPU" 100 "$PYTHON" "$WORK/check.py" maths
step "toy world" 60 "$PYTHON" tools/toy.py "$WORK/toy" --only msrvtt-qa msrvtt webvid
step "train --amp" 60 "$PYTHON" train.py --task vqa --data "$WORK/toy/msrvtt-qa" --amp \
    --steps $STEPS --out "$WORK/amp"
step "SIGTERM and --resume" 90 bash -c resume
step "eval on both devices" 40 bash -c devices
step "torchrun" 90 bash -c torchrun_steps

printf '\n==== results\n' | tee -a "$LOG"
printf '%s\n' "${RESULTS[@]}" | tee -a "$LOG"
exit $FAILED
