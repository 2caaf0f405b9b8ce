#!/usr/bin/env bash
# The commands of every table of docs/results.md, for seed 0 to SEEDS - 1 (default 1): an estimated 3 hours
# a seed on 2 cores. They were run one by one, not by this script. Needs matplotlib for the tables.
set -eu
cd "$(dirname "$0")/.."
python tools/toy.py data/toy
for seed in $(seq 0 $((${SEEDS:-1} - 1))); do
    for roll in spread none; do
        python train.py --task vqa --data data/toy/which-way --roll $roll --seed $seed
        python train.py --task vqa --roll $roll --seed $seed
        # The pipeline of the paper: pre-train once, then fine-tune each benchmark.
        python train.py --task pretrain --roll $roll --seed $seed
        start="--roll $roll --seed $seed --init runs/webvid-toy-$roll-s$seed"
        for name in msrvtt-mc lsmdc-mc ego4d-mc tgif-action tgif-transition tvqa msvd-qa tgif-frame msrvtt hmdb51 k400 vcr; do
            python train.py --data data/toy/$name $start
        done
        for name in msrvtt didemo activitynet lsmdc; do
            python train.py --data data/toy/$name $start --set roll_unimodal=1
        done
        python train.py --data data/toy/vcr --roll $roll --seed $seed
    done
    # Ablations of the question "which way".
    way="--task vqa --data data/toy/which-way --seed $seed"
    for setting in fraction=0.125 fraction=0.25 fraction=1 time=0; do
        python train.py $way --set $setting
    done
    python train.py $way --roll block
    for frames in 2 5; do
        python train.py $way --frames $frames --out runs/which-way-T$frames-s$seed
    done
    python tools/random_order.py $way --out runs/which-way-random-s$seed
done
python eval.py runs/webvid-toy-spread-s0 --data data/toy/msrvtt-mc
python train.py --data data/toy/cc3m --init runs/webvid-toy-spread-s0
python train.py --data data/toy/howto100m
python tools/plots.py table runs/which-way-*
python tools/plots.py table runs/msrvtt-qa-toy-*
python tools/plots.py table runs/*-init-* runs/webvid-* runs/vcr-toy-* runs/howto100m-*
