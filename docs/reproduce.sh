#!/usr/bin/env bash
# The commands of every table of docs/results.md: an estimated 3 hours on 2 cores. They were run one by one, not by this
# script. Needs matplotlib for the tables.
set -eu
cd "$(dirname "$0")/.."
python tools/toy.py data/toy
for roll in spread none; do
    for seed in 0 1 2 3 4; do
        python train.py --task vqa --data data/toy/which-way --roll $roll --seed $seed
    done
    python train.py --task vqa --roll $roll
    # The pipeline of the paper: pre-train once, then fine-tune each benchmark.
    python train.py --task pretrain --roll $roll
    start="--roll $roll --init runs/webvid-toy-$roll-s0"
    for name in msrvtt-mc lsmdc-mc ego4d-mc tgif-action tgif-transition tvqa vcr msrvtt hmdb51 k400; do
        python train.py --data data/toy/$name $start
    done
    python train.py --data data/toy/vcr --roll $roll
    for name in msvd-qa tgif-frame; do
        python train.py --data data/toy/$name $start --steps 3000
    done
    for name in msrvtt didemo activitynet; do
        python train.py --data data/toy/$name $start --set roll_unimodal=1
    done
    python train.py --data data/toy/lsmdc $start --set roll_unimodal=1 --steps 450
done
python train.py --data data/toy/cc3m --init runs/webvid-toy-spread-s0 --steps 700
python train.py --data data/toy/howto100m
python tools/plots.py table runs/which-way-*
python tools/plots.py table runs/msrvtt-qa-toy-*
python tools/plots.py table runs/*-init-* runs/webvid-* runs/howto100m-*
