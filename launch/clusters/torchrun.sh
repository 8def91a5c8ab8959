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
export CODE=$(mktemp)
trap 'rm -f "$CODE"' EXIT
# every round has a store of its own: what was said in the one before is not read again
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

slot() {
    resume=()
    compgen -G "$OUT/checkpoints/step-*" >/dev/null && resume=(--resume)
    unbroken train --workers "$WORLD_SIZE" --out "$OUT" "${resume[@]}" "$@" &
    child=$!
    trap 'kill -TERM $child 2>/dev/null' TERM INT
    wait $child
    code=$?
    while kill -0 $child 2>/dev/null; do  # a signal has ended the wait, and the run saves itself
        wait $child
        code=$?
    done
    [ "${LOCAL_RANK:-0}" = 0 ] && echo $code >"$CODE"
    case $code in
    2 | 75 | 93) exit 0 ;; # torchrun would start it again, to no avail
    *) exit $code ;;
    esac
}
export -f slot

torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC" --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "$RUN_ID" \
    --max-restarts "$MAX_RESTARTS" --no-python bash -c 'slot "$@"' slot "$@" &
launcher=$! asked=0
trap 'asked=1; kill -TERM $launcher 2>/dev/null' TERM INT
wait $launcher
code=$?
while kill -0 $launcher 2>/dev/null; do
    wait $launcher
    code=$?
done
told=$(cat "$CODE")
[ $code -ne 0 ] && [ $asked = 0 ] && exit $code # torchrun has given up
exit "${told:-$code}"
