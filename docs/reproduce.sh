#!/usr/bin/env bash
# Every table of docs/results.md from nothing: an estimated 2 hours on 2 cores; not run as a whole. Needs matplotlib for the last lines.
set -eu
cd "$(dirname "$0")/.."
python tools/toy.py data/toy
for seed in 0 1 2; do
    for roll in spread none; do
        python train.py --task vqa --data data/toy/which-way --roll $roll --seed $seed
        python train.py --data data/toy/msrvtt-qa --roll $roll --seed $seed
    done
done
for name in msvd-qa tgif-frame tgif-action tgif-transition tvqa msrvtt-mc lsmdc-mc ego4d-mc vcr \
    msrvtt didemo activitynet lsmdc hmdb51 k400 webvid cc3m howto100m; do
    python train.py --data data/toy/$name
done
python tools/plots.py table runs/which-way-*
python tools/plots.py table runs/msrvtt-qa-*
python tools/plots.py table runs/*-toy-spread-s0
