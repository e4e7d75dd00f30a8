#!/usr/bin/env bash
# The GPU kernels at small sizes under compute-sanitizer: memcheck (accesses out of bounds or misaligned) and racecheck
# (accesses to shared memory that nothing orders). Needs a GPU and a CUDA build; exits with 1 if any run finds something.
#   tests/sanitize.sh [BUILD_DIR, build/cuda if not given]
set -uo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/cuda}
running=()
check() {  # tool and its options, test program and its arguments
  local start=$SECONDS log
  # shellcheck disable=SC2086
  if log=$(compute-sanitizer --error-exitcode 9 --tool $1 "$build/tests/$2" "${@:3}" 2>&1); then
    echo "ok      $*: $(tail -n 1 <<<"$log"), $((SECONDS - start)) s"
  else
    printf 'FAILED  %s\n%s\n' "$*" "$(tail -n 60 <<<"$log")"
    return 1
  fi
}
start() { check "$@" & running+=($!); }

start memcheck attention_test --test-suite=cuda "--test-case=*three tiles*,*same bits*,*keeps the share*"
start memcheck op_test cuda
# Attention's kernels on the ordinary cores read shared memory so often that racecheck gets one case of theirs. The
# warpgroups' are always among those it looks at: a kernel of clusters that it does not look at fails under it, any one.
warpgroup="--kernel-name kns=warpgroup"
start "racecheck --kernel-name kns=mma $warpgroup" attention_test --test-suite=cuda "--test-case=*three tiles*"
start "racecheck --kernel-name kns=simt $warpgroup" attention_test --test-suite=cuda "--test-case=*same bits*"
# Ops whose kernels use shared memory and that the programs below do not run.
for op in rms_norm add_rms_norm add_rms_norm_of_rows add_rms_norm_sum split_last split_last_normed router_logits \
          router_logits_and_expert_mlp matmul_linear matmul_joined_with_bias softmax cross_entropy linear_cross_entropy; do
  start racecheck op_test cuda $op
done
for program in moe_test optim_test loss_test in_place_test; do
  start memcheck $program --test-suite=cuda
  start racecheck $program --test-suite=cuda
done
failed=0
for job in "${running[@]}"; do wait "$job" || failed=1; done
exit $failed
