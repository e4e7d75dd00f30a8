#!/usr/bin/env bash
# The GPU kernels at small sizes under compute-sanitizer: memcheck (accesses out of bounds or misaligned) and racecheck
# (accesses to shared memory that nothing orders). Needs a GPU and a CUDA build; exits with 1 if any run finds something.
#   tests/sanitize.sh [BUILD_DIR, build/cuda if not given]
set -uo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/cuda}
check() {  # tool, program, cases, more options of the tool
  local start=$SECONDS log
  if log=$(compute-sanitizer --tool "$1" --error-exitcode 9 "${@:4}" "$build/tests/$2" --test-suite=cuda \
             --test-case="$3" 2>&1); then
    echo "ok      ${*:1:3}: $(tail -n 1 <<<"$log"), $((SECONDS - start)) s"
  else
    printf 'FAILED  %s\n' "${*:1:3}" "$(tail -n 60 <<<"$log")"
    return 1
  fi
}
# Attention's kernels on the ordinary cores read shared memory so often that racecheck gets one case of theirs. The
# warpgroups' are always among those it looks at: a kernel of clusters that it does not look at fails under it, any one.
warpgroup=(--kernel-name kns=warpgroup)
running=()
check memcheck attention_test "*three tiles*,*same bits*,*keeps the share*" & running+=($!)
check racecheck attention_test "*three tiles*" --kernel-name kns=mma "${warpgroup[@]}" & running+=($!)
check racecheck attention_test "*same bits*" --kernel-name kns=simt "${warpgroup[@]}" & running+=($!)
check memcheck op_test "*" & running+=($!)
check racecheck op_test "*" --kernel-name-exclude kns=simt & running+=($!)
for program in moe_test optim_test loss_test in_place_test; do
  for tool in memcheck racecheck; do
    check $tool $program "*" & running+=($!)
  done
done
failed=0
for job in "${running[@]}"; do wait "$job" || failed=1; done
exit $failed
