#!/usr/bin/env bash
# One run under an elastic torchrun. The same command on every node:
#
#   OUT=/shared/run NNODES=1:4 NPROC=1 RDZV=node0:29400 bash torchrun.sh --model llama-2m --data stdlib
#
# What follows are settings of `unbroken train` (not --workers, --out, --resume). A lost node costs no restart: the rest
# do its work. When a node comes, torchrun stops all, who save themselves, and starts them again with one more.
# Exits with the code of the run: 0 done, 1 error, 2 usage, 75 start it again, 93 do not.
set -u
: "${OUT:?is the run folder, which all nodes see}"
: "${NNODES:=1}" "${NPROC:=1}" "${RDZV:=localhost:0}" "${RUN_ID:=unbroken}" "${MAX_RESTARTS:=3}"
export OUT
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export CODE=$folder/code
# every round has a store of its own: what was said in the one before is not read again
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Runs a command and passes TERM and INT on to it as TERM. `code` is how it ended, `told` how often it was asked to.
passing_on() {
    child= told=0
    trap 'told=$((told + 1)); kill -TERM $child 2>/dev/null' TERM INT
    "$@" &
    child=$!
    [ $told = 0 ] || kill -TERM $child 2>/dev/null # it came before there was a child
    until heard=$told; wait $child; code=$?; [ $told = $heard ]; do :; done # a signal ends the wait, not the child
}

slot() {
    resume=()
    compgen -G "$OUT/checkpoints/step-*" >/dev/null && resume=(--resume)
    passing_on unbroken train --workers "$WORLD_SIZE" --out "$OUT" "${resume[@]}" "$@"
    [ $told = 0 ] || [ $code -ne 143 ] || code=75 # it was told before it could hear that: nothing is lost
    [ "${LOCAL_RANK:-0}" = 0 ] && echo $code >"$CODE"
    case $code in
    2 | 75 | 93) exit 0 ;; # torchrun would start it again, to no avail
    *) exit $code ;;
    esac
}
export -f passing_on slot

passing_on torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC" --rdzv-backend c10d --rdzv-endpoint "$RDZV" \
    --rdzv-id "$RUN_ID" --max-restarts "$MAX_RESTARTS" --log-dir "$folder" --no-python bash -c 'slot "$@"' slot "$@"
said=$(cat "$CODE" 2>/dev/null)
[ $told = 0 ] || exit "${said:-75}" # a run that has not begun loses nothing
[ $code = 0 ] || exit $code         # torchrun has given up
exit "${said:-0}"
