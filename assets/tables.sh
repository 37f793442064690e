#!/usr/bin/env bash
# Makes the README's tables from nothing:   bash assets/tables.sh toy        (or ml100k, beauty; PARTS="search main" for some of the parts)
# Resumable run by run: what has its JSON in assets/results/NAME/ is not run again. Real data: SOURCE=folder with the raw files.
# METHODS="ilm-bert ilm-bert-rand": the paper's start, the text branch from BERT's weights (BERT=folder; 384 wide, 6 layers), and its ilm-rand.
# A method may end in -1200, so many steps instead of 400 or 200 (its rate is not searched again), or in -k8, so many soft tokens an item.
# ml100k-texts, beauty-texts: the text tasks alone, as the paper trains its ELM-24 table; ml100k-texts120: in 120 steps instead of 240.
# Settings that differ by data set stand in `case`; everything else is the same for every method.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 data=${1%-texts*} seeds=${SEEDS:-0 1 2 3 4} parts=${PARTS:-search main fractions queries show}
results=assets/results/$name runs=out/$name
mkdir -p "$results" "$runs"
all="itc itm itg ii ui" tuning="" measured="" once="--controls --sasrec"  # of ilm: measured in every run, in that of seed 0
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592   # memory is kept by the process: faster on CPU, same results
log() { echo "+ $*"; local began=$SECONDS; "$@" 2>&1 || { echo "failed: $*" >&2; return 1; }; echo "  took $((SECONDS - began)) s"; }

case $data in
toy)
    llm=assets/toy_llm stage1="" stage2="--steps 200" evaluate="" measured="--controls"
    [ -d data/toy ] || log python data.py ;;
ml100k)
    llm=out/llm/ml100k stage1="--tokenizer $llm --steps 300" stage2="--steps 400 --batch-size 8 --name-tokens 8 --valid-users 150 --eval-every 100" evaluate="--batch-size 25" tuning="--steps 200"
    [ -d data/ml100k ] || log python data.py --dataset openp5 --source "$SOURCE/openp5-ml100k" --items "$SOURCE/ml-100k/u.item" --out data/ml100k --cf-dim 32
    [ -d $llm ] || log python assets/toy_llm/pretrain.py --data data/ml100k --out $llm --vocab 3072 --steps 700 --width 768 --layers 2 --mlp-width 512 --lr 1.5e-3 ;;
beauty)
    llm=out/llm/beauty stage1="--tokenizer $llm --steps 300" stage2="--steps 400 --batch-size 8 --name-tokens 8 --valid-users 250 --eval-every 100" evaluate="--batch-size 50 --max-users 1000 --max-texts 200"
    [ -d data/beauty ] || log python data.py --dataset openp5 --source "$SOURCE/openp5-beauty" --out data/beauty --cf-dim 32
    [ -d $llm ] || log python assets/toy_llm/pretrain.py --data data/beauty --out $llm --vocab 4096 --steps 700 --width 768 --layers 2 --mlp-width 512 --lr 1.5e-3 ;;
esac
if [ "$name" != "$data" ]; then
    steps=${name##*-texts} stage2="--steps ${steps:-240} --batch-size 8 --name-tokens 8 --valid-users 150 --eval-every 20 --mix 0 0 1" tuning="" once="--controls"
fi
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
    local k=${1##*-k}
    case $1 in
    ilm | ilm-shuffled) echo "--stage1 $(align "$all" "$2")" ;;
    ilm-it) echo "--stage1 $(align "itc itm itg" "$2")" ;;
    ilm-it-ii) echo "--stage1 $(align "itc itm itg ii" "$2")" ;;
    ilm-it-ui) echo "--stage1 $(align "itc itm itg ui" "$2")" ;;
    ilm-k*) echo "--stage1 $(align "$all" "$2" "-k$k" --num-queries "$k")" ;;
    ilm-rand | mlp) echo "--method $1" ;;
    ilm-bert) echo "--stage1 $(align "$all" "$2" -bert --init-bert "$BERT" --tokenizer "$BERT" --width 384 --layers 6 --lr 3e-4 --steps 200)" ;;
    ilm-bert-rand) echo "--method ilm-rand --width 384 --layers 6" ;;
    mlp-k*) echo "--method mlp --num-queries $k" ;;
    text) echo "--method text --train-llm --item-names random" ;;
    text-title) echo "--method text --train-llm" ;;
    esac
    [ "$1" != ilm-shuffled ] || echo "--shuffle-cf"
}

search() {  # search METHOD: the learning rate with the lowest validation loss, seed 0; as many are tried for each method
    local lr best rates="1e-3 2e-3 4e-3 1e-2"
    [ "$name" = toy ] || rates=$([ "$1" = mlp ] && echo 3e-3 1e-2 2e-2 || echo 1e-3 3e-3 1e-2)
    if [ "$name" = beauty ]; then rates=$([ "$1" = mlp ] && echo 1e-2 || echo 3e-3); fi  # ML-100K's best, not searched again
    [[ $1 == text* ]] && rates=$([ "$name" = beauty ] && echo 6e-4 || echo 3e-4 6e-4 1e-3 3e-3)
    for lr in $rates; do
        grep -q "^$1	$lr	" "$results/search.tsv" 2> /dev/null && continue
        log python train_stage2.py --data "data/$data" --llm "$llm" --out "$runs/$1-lr$lr" $stage2 $tuning $(flags "$1" 0) --lr "$lr" > "$runs/search.txt"
        best=$(sed -n 's/.*best validation loss \([0-9.]*\).*/\1/p' "$runs/search.txt")
        [ -n "$best" ] || { cat "$runs/search.txt" >&2; exit 1; }
        cat "$runs/search.txt" >> "$results/log.txt"
        printf '%s\t%s\t%s\n' "$1" "$lr" "$best" >> "$results/search.tsv"
    done
}

rate() {  # rate METHOD: what the search found; the stages of the ablation and the sweeps use their method's
    local method=${1%-k*}
    case $method in ilm-it* | ilm-shuffled) method=ilm ;; ilm-bert*) echo 1e-3; return ;; esac  # a Q-Former three times as wide: not searched
    search "$method"
    awk -F'\t' -v m="$method" '$1 == m' "$results/search.tsv" | sort -t'	' -k3,3g | head -1 | cut -f2
}

run() {  # run METHOD SEED [evaluate flags]: train, evaluate, keep the JSON
    local tag=$1-s$2 lr method=${1%-1200} longer=""
    [ -f "$results/$tag.json" ] && return
    [ "$1" = "$method" ] || longer="--steps 1200 --eval-every 200"
    lr=$(rate "$method")
    if [ "$2" = 0 ] && [ -z "$tuning" ] && [ -f "$runs/$1-lr$lr/model.safetensors" ]; then  # the search has made it
        rm -rf "${runs:?}/$tag" && cp -r "$runs/$1-lr$lr" "$runs/$tag"
    else
        log python train_stage2.py --data "data/$data" --llm "$llm" --out "$runs/$tag" --seed "$2" $stage2 $longer $(flags "$method" "$2") --lr "$lr" >> "$results/log.txt"
    fi
    log python evaluate.py --run "$runs/$tag" $evaluate "${@:3}" >> "$results/log.txt"
    cp "$runs/$tag/metrics.json" "$results/$tag.json"
}

for part in $parts; do
    case $part in
    search) for method in ilm ilm-rand mlp text; do search $method; done ;;
    main)  # seed by seed, so that an interrupted table has whole seeds
        for seed in $seeds; do
            run ilm "$seed" $measured $([ "$seed" = 0 ] && echo $once)
            for method in ${METHODS:-ilm-rand mlp ilm-it ilm-it-ii ilm-it-ui text ilm-shuffled}; do run "$method" "$seed"; done
        done ;;
    fractions)  # stage 1 alone, on a part of the texts (PERCENT=100: on all)
        for seed in 0 1 2; do for percent in ${PERCENT:-10 30 100}; do for losses in "itc itm itg" "itc itm itg ii" "itc itm itg ui" "$all"; do
            if [ $percent = 100 ]; then align "$losses" "$seed"; else align "$losses" "$seed" "-f$percent" --text-fraction "0.$percent"; fi > /dev/null
        done; done; done ;;
    queries)  # the number of soft tokens, Q-Former against MLP (4: the main part)
        for seed in 0 1 2; do for k in 1 2 8 16; do run ilm-k$k "$seed"; run mlp-k$k "$seed"; done; done ;;
    show) python evaluate.py --table "$results"/*.json ;;
    esac
done
