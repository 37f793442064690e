#!/usr/bin/env bash
# Makes the tables of assets/docs/RESULTS.md from nothing:   bash assets/tables.sh toy    (or ml100k, beauty, ml1m; PARTS="search main" for some of the parts)
# PARTS=record: how many seconds until METHODS (one; ilm) ranks ahead of MF at the moment on validation.
# Resumable run by run: what has its JSON in assets/results/NAME/ is not run again. Real data: SOURCE=folder with the raw files.
# A method may end in -h0, -h20 (so many items of the history beside the user's vector), in -none, -uniform, -tau1 (prior and temperature), in -k8 (soft tokens an item).
# ml100k-texts, beauty-texts: the text tasks alone, as the paper trains its ELM-24 table; ml100k-texts120: in 120 steps instead of 240.
# ml100k-smollm2, ml100k-smollm2-texts: a real chat LLM on a CPU (LLM=folder or hub id), sequential or text tasks alone.
# Settings that differ by data set stand in `case`; everything else is the same for every method.
set -euo pipefail
shopt -s extglob
cd "$(dirname "$0")/.."
name=$1 data=${1%%-*} seeds=${SEEDS:-0 1 2} parts=${PARTS:-search main show}
results=assets/results/$name runs=out/$name
mkdir -p "$results" "$runs"
all="itc itm itg ii ui" once="--controls --sasrec"  # of ilm with seed 0
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592   # memory is kept by the process: faster on CPU, same results
log() { echo "+ $*"; local began=$SECONDS; "$@" 2>&1 || { echo "failed: $*" >&2; return 1; }; echo "  took $((SECONDS - began)) s"; }
pretrain() { [ -d "$1" ] || [[ $name = *smollm2* ]] || log python assets/toy_llm/pretrain.py --data "data/$data" --out "$1" --vocab "$2" --steps 700 --width 768 --layers 2 --mlp-width 512 --lr 1.5e-3; }

llm=out/llm/$data queries="--num-queries 16"
stage1="--tokenizer out/llm/$data --steps 300 $queries"
stage2="--steps 400 --batch-size 8 --name-tokens 8 --valid-users 300 --eval-every 100 --mix .5 .5 0 --prompt-items tokens" evaluate="--batch-size 256"  # as the paper: no texts here, a history is soft tokens
case $data in
toy)
    llm=assets/toy_llm queries="" stage1="" stage2="" seeds=${SEEDS:-0 1 2 3 4}
    [ -d data/toy ] || log python data.py ;;
ml100k)
    [ -d data/ml100k ] || log python data.py --dataset openp5 --source "$SOURCE/openp5-ml100k" --items "$SOURCE/ml-100k/u.item" --out data/ml100k
    pretrain $llm 3072 ;;
beauty)
    stage2="${stage2/300/500}" stage2="${stage2/--batch-size 8/--batch-size 32}" evaluate="--batch-size 256 --max-users 5000 --max-texts 200" once="--controls --sasrec {\"dropout\":0.5,\"temperature\":0.07}"
    [ -d data/beauty ] || log python data.py --dataset openp5 --source "$SOURCE/openp5-beauty" --out data/beauty
    pretrain $llm 4096 ;;
ml1m)
    stage2="${stage2/--steps 400/--steps 800}" evaluate="--batch-size 256 --max-users 2000" seeds=${SEEDS:-0}
    [ -d data/ml1m ] || log python data.py --dataset openp5 --source "$SOURCE/openp5-ml1m" --out data/ml1m
    pretrain $llm 3072 ;;
*) echo "$name: give toy, ml100k, beauty or ml1m" >&2; exit 2 ;;
esac
case $name in
ml100k-smollm2*)
    llm=${LLM:-HuggingFaceTB/SmolLM2-135M-Instruct} seeds=${SEEDS:-0} queries="" once="--controls" evaluate="--batch-size 50 --max-users 250 --max-texts 10"
    stage1="--tokenizer $llm --steps 300"
    stage2="--steps 100 --batch-size 4 --accumulate 1 --name-tokens 8 --valid-users 60 --eval-every 50 --prompt-items tokens"
    case $name in *-texts) stage2="$stage2 --mix 0 0 1" ;; *) stage2="$stage2 --mix 1 0 0" ;; esac ;;
*-texts*)
    steps=${name##*-texts} stage2="--steps ${steps:-240} --batch-size 8 --name-tokens 8 --valid-users 150 --eval-every 20 --mix 0 0 1" once="--controls" ;;
esac
evaluate="$evaluate ${SC_ENCODER:+--sc-encoder $SC_ENCODER}"

align() {  # align LOSSES SEED [SUFFIX flags]: a stage-1 run; prints its folder
    local tag; tag=stage1-$(echo "$1" | tr ' ' -)${3:-}-s$2
    if [ ! -f "$results/$tag.json" ] || [ ! -f "$runs/$tag/model.safetensors" ]; then
        log python train_stage1.py --data "data/$data" --out "$runs/$tag" --losses $1 --seed "$2" $stage1 "${@:4}" >> "$results/log.txt" || exit  # in $( ) set -e does not hold
        log python evaluate.py --run "$runs/$tag" >> "$results/log.txt" || exit
        cp "$runs/$tag/metrics.json" "$results/$tag.json"
    fi
    echo "$runs/$tag"
}

flags() {  # flags METHOD SEED: what train_stage2.py needs for it
    local method=$1 k=${1##*-k} more=$queries
    case $method in ilm | ilm-it* | ilm-h* | ilm-shuffled) more="" ;; esac  # as their stage 1 has
    case $method in
    *-h[0-9]*) more="$more --history ${1##*-h}" ;; *-none) more="$more --prior none --temperature fixed" ;; *-uniform) more="$more --prior uniform --temperature fixed" ;;
    *-tau1) more="$more --temperature fixed" ;; *-k[0-9]*) more="--num-queries $k" ;;
    esac
    case ${method%-@(h0|h20|none|uniform|tau1)} in
    ilm | ilm-shuffled) echo "--stage1 $(align "$all" "$2") $more" ;;
    ilm-it) echo "--stage1 $(align "itc itm itg" "$2") $more" ;;
    ilm-it-ii) echo "--stage1 $(align "itc itm itg ii" "$2") $more" ;;
    ilm-it-ui) echo "--stage1 $(align "itc itm itg ui" "$2") $more" ;;
    ilm-k*) echo "--stage1 $(align "$all" "$2" "-k$k" --num-queries "$k")" ;;
    ilm-rand*) echo "--method ilm-rand $more" ;;
    mlp*) echo "--method mlp $more" ;;
    text) echo "--method text --train-llm --item-names random" ;;
    text-title) echo "--method text --train-llm" ;;
    esac
    [ "$method" != ilm-shuffled ] || echo "--shuffle-cf"
}

search() {  # search METHOD: the learning rate with the lowest validation loss, seed 0; as many are tried for each method
    local lr best rates="3e-4 1e-3 3e-3 6e-3"
    case $1 in mlp*) rates="3e-4 1e-3 3e-3 1e-2" ;; text*) rates="1e-4 3e-4 6e-4 1e-3" ;; esac
    case $name in beauty) rates="1e-3 3e-3" ;; ml1m) rates=3e-3 ;; *smollm2-texts) rates="1e-3 3e-3 1e-2" ;; esac
    case $name:$1 in *smollm2:ilm*) rates=3e-3 ;; *smollm2:mlp*) rates=1e-3 ;; esac  # found with SmolLM2 on ML-1M, of these two
    for lr in $rates; do
        grep -q "^$1	$lr	" "$results/search.tsv" 2> /dev/null && continue
        log python train_stage2.py --data "data/$data" --llm "$llm" --out "$runs/$1-lr$lr" $stage2 $(flags "$1" 0) --lr "$lr" > "$runs/search.txt"
        best=$(sed -n 's/.*best validation loss \([0-9.]*\).*/\1/p' "$runs/search.txt")
        [ -n "$best" ] || { cat "$runs/search.txt" >&2; exit 1; }
        cat "$runs/search.txt" >> "$results/log.txt"
        printf '%s\t%s\t%s\n' "$1" "$lr" "$best" >> "$results/search.tsv"
    done
}

rate() {  # rate METHOD: what the search found; the stages of the ablation, the prior's and the sweeps use their method's
    local method=${1%-k[0-9]*}
    method=${method%-@(none|uniform|tau1)}
    case $method in ilm-it* | ilm-shuffled) method=ilm ;; esac
    search "$method"
    awk -F'\t' -v m="$method" '$1 == m' "$results/search.tsv" | sort -t'	' -k3,3g | head -1 | cut -f2
}

run() {  # run METHOD SEED [evaluate flags]: train, evaluate, keep the JSON
    local tag=$1-s$2 lr
    [ -f "$results/$tag.json" ] && return
    lr=$(rate "$1")
    if [ "$2" = 0 ] && [ -f "$runs/$1-lr$lr/model.safetensors" ]; then  # the search has made it
        rm -rf "${runs:?}/$tag" && cp -r "$runs/$1-lr$lr" "$runs/$tag"
    else
        log python train_stage2.py --data "data/$data" --llm "$llm" --out "$runs/$tag" --seed "$2" $stage2 $(flags "$1" "$2") --lr "$lr" >> "$results/log.txt"
    fi
    log python evaluate.py --run "$runs/$tag" $evaluate "${@:3}" >> "$results/log.txt"
    cp "$runs/$tag/metrics.json" "$results/$tag.json"
}

for part in $parts; do
    case $part in
    search) for method in ${METHODS:-ilm ilm-rand mlp}; do search $method; done ;;
    main)  # seed by seed, so that an interrupted table has whole seeds
        for seed in $seeds; do
            run ilm "$seed" $([ "$seed" = 0 ] && echo $once)
            for method in ${METHODS:-ilm-rand mlp ilm-h0 mlp-h20 ilm-rand-none ilm-rand-uniform ilm-rand-tau1 ilm-it ilm-it-ii ilm-it-ui text}; do run "$method" "$seed"; done
        done ;;
    fractions)  # stage 1 alone, on a part of the texts (PERCENT=100: on all)
        for seed in 0 1 2; do for percent in ${PERCENT:-10 30 100}; do for losses in "itc itm itg" "itc itm itg ii" "itc itm itg ui" "$all"; do
            if [ $percent = 100 ]; then align "$losses" "$seed"; else align "$losses" "$seed" "-f$percent" --text-fraction "$(printf 0.%02d "$percent")"; fi > /dev/null
        done; done; done ;;
    queries)  # the number of soft tokens, Q-Former against MLP (4: the main part)
        for seed in 0 1 2; do for k in 1 4 16; do run ilm-k$k "$seed"; run mlp-k$k "$seed"; done; done ;;
    record)  # until it is ahead at two checks in a row; at most an hour
        method=${METHODS:-ilm} began=$SECONDS steps=0 ahead=0 best=0
        more="$stage2 $(flags "$method" 0) --lr $(awk -F'\t' -v m="$method" '$1 == m' "$results/search.tsv" | sort -t'	' -k3,3g | head -1 | cut -f2)"
        while [ $((SECONDS - began)) -lt 3600 ] && [ $ahead -lt 2 ]; do
            resume=$([ $steps = 0 ] || echo --resume) steps=$((steps + ${EVERY:-50}))
            python train_stage2.py --data "data/$data" --llm "$llm" --out "$runs/record" $more --steps $steps --eval-every "${EVERY:-50}" $resume > /dev/null
            python evaluate.py --run "$runs/record" --split valid --tasks sequential --batch-size 256 --max-users 2000 > /dev/null
            ratio=$(python -c "import json; print(round(json.load(open('$runs/record/metrics.json'))['retention'], 3))")
            best=$(printf '%s\n' "$best" "$ratio" | sort -g | tail -1)
            ahead=$(awk "BEGIN { print ($ratio > 1 ? $ahead + 1 : 0) }")
            echo "$name $method: $((SECONDS - began)) s, $steps steps, HR@10 on validation $ratio of MF at the moment, best $best"
        done ;;
    show) python evaluate.py --table "$results"/*.json ;;
    esac
done
