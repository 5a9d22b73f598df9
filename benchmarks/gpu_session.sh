#!/usr/bin/env bash
# One visit to a GPU machine, in order of value, within SESSION_LIMIT seconds (480). Run it in the project's root with
# what loratune needs installed (`gpu_wheels.sh` fetches it elsewhere); nothing is fetched and no setting of the card is touched.
#
#   SESSION_LIMIT=480    seconds for everything           SESSION_ONLY="1 3"  only these steps
#   SESSION_PEERS=""     arms of peers, after ours        SESSION_DRY=1       a rehearsal on a CPU: tiny shapes
#   PYTHON=python3       with loratune and the peers      OUT=./gpu-out       where the results go, kept after each step
#
# The results are five files: table.txt, said.txt (all that was printed), profile.txt, gpu-DEVICE.json and .md.
set -u
SECONDS=0
LIMIT=${SESSION_LIMIT:-480} DRY=${SESSION_DRY:-0} ONLY=${SESSION_ONLY:-1 2 3 4 5}
PEERS=${SESSION_PEERS-trl trainer-axolotl trl-liger trainer} PY=${PYTHON:-python3}
[ -d loratune ] || { echo "run this in the project's root" >&2; exit 2; }
OUT=${OUT:-./gpu-out}; mkdir -p "$OUT"; OUT=$(cd "$OUT" && pwd); : >"$OUT/table.txt"; : >"$OUT/said.txt"
place=${TMPDIR:-/tmp}  # 16 GB of weights are written once: into memory, where there is room for them
[ "$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print int($4 / 1048576)}')" -ge 40 ] 2>/dev/null && place=/dev/shm
WORK=$(mktemp -d "$place/loratune.XXXXXX"); trap 'rm -rf "$WORK"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TMPDIR=$WORK CI=1
export LORATUNE_CACHE=$WORK/cache TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1

left() { echo $((LIMIT - SECONDS - 6)); }
told() { printf '%s\n' "$*" | tee -a "$OUT/table.txt"; }
step() {  # NUMBER NAME SECONDS COMMAND...: all it says goes to said.txt, lines that begin with `= ` into the table as well
  local number=$1 name=$2 limit=$3 began=$SECONDS rc; shift 3
  case " $ONLY " in *" $number "*) ;; *) return 0 ;; esac
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  if [ "$limit" -lt 10 ]; then told "[$number] $name: skipped, no time is left"; return 0; fi
  echo "--- $number $name, at most $limit s" >&2
  timeout -s INT -k 8 "$limit" "$@" >"$WORK/said.txt" 2>&1; rc=$?
  { echo "--- $number $name"; cat "$WORK/said.txt"; } >>"$OUT/said.txt"
  told "[$number] $name: exit code $rc, $((SECONDS - began)) s$([ $rc = 124 ] && echo ', out of time')"
  grep -a '^= ' "$WORK/said.txt" | sed 's/^= /      /' | tee -a "$OUT/table.txt"
}

[ "$DRY" = 1 ] || { nvidia-smi; nproc; free -g; } >>"$OUT/said.txt" 2>&1
step 1 machine 60 "$PY" benchmarks/gpu_machine.py
step 2 run "${SESSION_RUN:-120}" "$PY" benchmarks/gpu_run.py "$WORK/runs"

tests() {  # warnings are told and not raised: an image of somebody else's has its own
  many=$("$PY" -c 'import os, xdist; print("-n", max(1, min(6, os.cpu_count() // 2)), "--dist", "worksteal")' 2>/dev/null)
  # shellcheck disable=SC2086
  "$PY" -m pytest -m gpu tests/gpu $many -W default --tb=short -rfE
}
export -f tests; export PY
step 3 tests "${SESSION_TESTS:-110}" bash -c tests
case " $ONLY " in *" 3 "*)
  grep -aE '^(FAILED|ERROR)|[0-9]+ (passed|failed|skipped)' "$WORK/said.txt" | cut -c1-180 | tail -12 | sed 's/^/      /' | tee -a "$OUT/table.txt" ;;
esac

step 4 kernels 45 "$PY" benchmarks/gpu_kernels.py

shape=(--steps 11 --warm 3)
[ "$DRY" = 1 ] && shape=(--shape tiny --shrink 64 --steps 3 --warm 1)
# shellcheck disable=SC2086
step 5 speed "$(left)" "$PY" benchmarks/gpu.py "${shape[@]}" --rounds 1 --model "$WORK/model" --limit "$(left)" \
  --out "$OUT" --profile "$OUT/profile.txt" --peer-python "$PY" --in-turn \
  --cases lora-2x4096 qlora-8x1024 qlora-1x2048 qlora-1x2048-checkpointed qlora-1x2048-offloaded --arms loratune loratune-plain loratune-compiled $PEERS

echo; echo "=== $(date -u +%FT%TZ), $SECONDS s of $LIMIT; results in $OUT"
cat "$OUT/table.txt"
