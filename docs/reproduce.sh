#!/usr/bin/env bash
# Every table of docs/results.md, from nothing; its runs have not been trained in one go. Needs
# matplotlib (pip install matplotlib).
#
#     JOBS=2 bash docs/reproduce.sh                 4 hours on 2 cores (sum of its runs)
#     SEEDS=0 JOBS=2 bash docs/reproduce.sh         one seed of the pipeline and of the ablations
#
# JOBS runs train at once, each on one core. What has finished is not run again: the script can be
# stopped and started. The output of a run is in runs/NAME.log.
set -eu
cd "$(dirname "$0")/.."
seeds=${SEEDS:-0 1 2}
mkdir -p runs

run() {                                         # NAME FLAGS: train runs/NAME unless it is done
    local out=runs/$1 script=${SCRIPT:-train.py} resume=
    shift
    [ ! -e "$out/test.json" ] || return 0
    [ ! -e "$out/config.json" ] || resume=--resume
    echo "python $script --out $out $*"
    python "$script" --out "$out" --workers 1 $resume "$@" >> "$out.log" 2>&1 ||
        { tail -n 1 "$out.log"; return 1; }
}
export -f run
all() { xargs -P "${JOBS:-2}" -I{} bash -c 'run {}'; }      # the lines of standard input

python -c "import matplotlib"                   # for the tables, after hours
python tools/toy.py data/toy

for seed in 0 1 2 3 4; do
    for roll in spread none; do
        flags="--roll $roll --seed $seed"
        echo "which-way-toy-$roll-s$seed --task vqa --data data/toy/which-way $flags"
        echo "msrvtt-qa-toy-$roll-s$seed --task vqa $flags"
    done
done | all

# The pipeline of the paper: pre-train once, then fine-tune each benchmark. Tokens also roll when
# the video is read alone (--set roll_unimodal=1), which the released code does not do.
for seed in $seeds; do
    for roll in spread none; do
        flags="--task pretrain --contrast --set roll_unimodal=1 --roll $roll --seed $seed"
        echo "pretrained-$roll-s$seed $flags"
    done
done | all
for seed in $seeds; do
    for roll in spread none; do
        flags="--init runs/pretrained-$roll-s$seed --roll $roll --seed $seed"
        for name in msrvtt-mc lsmdc-mc ego4d-mc tgif-action tgif-transition tgif-frame msvd-qa \
                tvqa msrvtt didemo activitynet lsmdc hmdb51 k400; do
            echo "$name-init-$roll-s$seed --data data/toy/$name $flags"
        done
        flags+=" --set roll_unimodal=0"
        echo "msrvtt-init-$roll-roll_unimodal0-s$seed --data data/toy/msrvtt $flags"
    done
    for name in vcr cc3m; do                    # pictures: nothing to roll
        flags="--init runs/pretrained-spread-s$seed --seed $seed"
        echo "$name-init-spread-s$seed --data data/toy/$name $flags"
    done
done | all

# Ablations: one change each, with half of the steps; five frames also with all steps; and without
# pre-training.
for seed in $seeds; do
    flags="--task vqa --data data/toy/which-way --steps 500 --seed $seed"
    echo "way500-spread-s$seed $flags"
    echo "way500-block-s$seed $flags --roll block"
    for setting in fraction=0.125 fraction=0.25 fraction=1 time=0; do
        echo "way500-${setting/=/}-s$seed $flags --set $setting"
    done
    for frames in 2 5; do
        echo "way500-frames$frames-s$seed $flags --frames $frames"
    done
    for roll in spread none; do
        flags="--task vqa --data data/toy/which-way --seed $seed --frames 5 --roll $roll"
        echo "way1000-frames5-$roll-s$seed $flags"
    done
    echo "msrvtt-mc-toy-spread-s$seed --data data/toy/msrvtt-mc --seed $seed"
done | all
export SCRIPT=tools/random_order.py
for seed in $seeds; do
    echo "way500-random-s$seed --task vqa --data data/toy/which-way --steps 500 --seed $seed"
done | all

table() { echo; python tools/plots.py table "$@"; }
table runs/which-way-toy-*[0-9]
table runs/way500-[!r]*[0-9]
table runs/way1000-*[0-9]
table runs/way500-random-*[0-9]
table runs/msrvtt-qa-toy-*[0-9]
table runs/pretrained-*[0-9]
table runs/*-init-{spread,none}-s*[0-9]
table runs/msvd-qa-init-*[0-9]                              # by type of question
table runs/tgif-frame-init-*[0-9]
table runs/msrvtt-init-*[0-9]                               # retrieval: with and without rolling
table runs/msrvtt-mc-{init,toy}-spread-*[0-9]               # with and without pre-training
for seed in $seeds; do
    for roll in spread none; do
        echo "zero-shot, runs/pretrained-$roll-s$seed"
        python eval.py "runs/pretrained-$roll-s$seed" --data data/toy/msrvtt-mc
    done
done
