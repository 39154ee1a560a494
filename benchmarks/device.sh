#!/usr/bin/env bash
# usage: benchmarks/device.sh OUT [SECONDS] [STAGE...]
# On a machine with a GPU, in the present environment, offline: builds, checks, runs the demo and the benchmarks, and
# leaves logs and results in OUT within SECONDS (default 570). Ends with a short table.
# Stages: build selftest tests demo warm bench (all by default), and suite: the whole of `make test`.
# Without git history, name the commit: CROC_COMMIT=<hash> benchmarks/device.sh OUT
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:?usage: benchmarks/device.sh OUT [SECONDS] [STAGE...]}"
limit="${2:-570}"
shift $(($# > 2 ? 2 : $#))
stages=("$@")
[ ${#stages[@]} = 0 ] && stages=(build selftest tests demo warm bench)
PYTHON="${PYTHON:-python3}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 MPLBACKEND=Agg PYTHONUNBUFFERED=1
summary=()

left() { echo $((limit - SECONDS)); }

# stage NAME MOST_SECONDS COMMAND...: its output in OUT/NAME.log, its end on the terminal.
stage() {
  local name="$1" most="$2" start=$SECONDS status
  shift 2
  [ "$(left)" -lt "$most" ] && most="$(left)"
  if [ "$most" -lt 5 ]; then
    summary+=("$name: not run, the time is used up")
    return
  fi
  printf '=== %s (at most %s s)\n' "$name" "$most"
  timeout --signal=INT --kill-after=10 "$most" "$@" >"$out/$name.log" 2>&1 </dev/null
  status=$?
  tail -n "$([ "$name" = bench ] && echo 70 || echo 25)" "$out/$name.log"
  summary+=("$name: $([ $status = 0 ] && echo ok || echo "FAILED, status $status") in $((SECONDS - start)) s")
}

nvidia-smi 2>&1 | head -n 15
for name in "${stages[@]}"; do
  case "$name" in
    build) stage build 150 make --no-print-directory build PYTHON="$PYTHON" VENV= ;;
    selftest)
      stage selftest 90 "$PYTHON" -m croc_kernels.cli selftest
      "$PYTHON" -m croc_kernels.cli info --json >"$out/info.json" 2>>"$out/selftest.log"
      ;;
    tests) stage tests 240 "$PYTHON" -m pytest -q -m "gpu and not slow" --durations=10 ;;
    suite) stage suite 560 make --no-print-directory test PYTHON="$PYTHON" VENV= TEST_ARGS="-q --durations=10" ;;
    demo)
      demo="$(mktemp -d)"
      stage demo 150 "$PYTHON" -m croc_kernels.cli pretrain --demo --output "$demo"
      (cd "$demo" && find . -maxdepth 1 -name '*.png' -exec cp {} "$out" \;)
      rm -rf "$demo"
      ;;
    warm)
      # Each row once, without timing, in many processes: compiled kernels stay on disk for `bench`.
      stage warm 150 "$PYTHON" -m pytest benchmarks -q -n "${WARM_JOBS:-12}" -p no:cacheprovider -W ignore \
        --device=cuda -k "attention or cost or nearest or replace or reconstruction or mask_build or matching or layer_replace" ${WARM_ARGS:-}
      ;;
    bench)
      budget=$(($(left) - 45))
      [ "$budget" -lt 20 ] && budget=20
      stage bench "$(left)" "$PYTHON" -m benchmarks.run --output "$out" --seconds "$budget" ${BENCH_ARGS:-}
      ;;
    *) summary+=("$name: unknown stage") ;;
  esac
done
printf '\n=== summary, %s s\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
