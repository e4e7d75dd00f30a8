#!/usr/bin/env python3
"""weft and PyTorch side by side: the same training steps on the same device in one run, by build/*/bench_step and
tools/peer/torch_step.py in turns. Prints each one's step time and peak memory and their ratios.

  tools/compare_pytorch.py                              # the GPU, exp1
  tools/compare_pytorch.py --device cpu --preset quick  # the CPU, on the same cores

Where PyTorch is not installed it says so and exits with 0. Of several rounds each program's best counts, as other work on
the machine can only slow a round down."""
import argparse
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def output_of(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def best_of(rounds):
    """By configuration, the result with the least median."""
    best = {}
    for r in rounds:
        for step in r["steps"]:
            name = step["configuration"]
            if name not in best or step["step_ms"] < best[name]["step_ms"]:
                best[name] = step
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--preset", default="exp1")
    parser.add_argument("--configs", default="baseline,lora,enhanced")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=0, help="of both programs; 0: 1 on a GPU, 3 on a CPU")
    parser.add_argument("--compile", default="", help="modes of torch.compile to try (none, default, reduce-overhead, ...); "
                        "default: default on a GPU, none,default on a CPU")
    parser.add_argument("--seconds", type=int, default=100000, help="PyTorch begins no configuration later than this (it "
                        "compiles each for half a minute or more)")
    parser.add_argument("--bench-step", default="", help="default: build/cuda/bench_step or build/cpu/bench_step")
    parser.add_argument("--python", default=sys.executable, help="the Python that has PyTorch")
    parser.add_argument("--json", default="", help="also write all results there")
    a = parser.parse_args()

    bench = a.bench_step or os.path.join(ROOT, "build", a.device, "bench_step")
    if not os.path.exists(bench):
        sys.exit(f"{bench} is not there: build it, or say where with --bench-step")
    ours = [bench, "--json", "--preset", a.preset, "--device", a.device, "--steps", str(a.steps), "--set", f"configs={a.configs}"]
    modes = a.compile or ("default" if a.device == "cuda" else "none,default")
    theirs = [a.python, os.path.join(ROOT, "tools", "peer", "torch_step.py"), "--preset", a.preset, "--device", a.device,
              "--steps", str(a.steps), "--configs", a.configs, "--compile", modes, "--seconds", str(a.seconds)]
    look = "import importlib.util as u, sys; sys.exit(3 if u.find_spec('torch') is None else 0)"
    try:
        found = subprocess.run([a.python, "-c", look]).returncode
    except OSError as e:
        sys.exit(f"--python {a.python}: {e.strerror}")
    if a.json and not os.access(os.path.dirname(a.json) or ".", os.W_OK):
        sys.exit(f"--json {a.json}: its folder cannot be written")
    if found == 3:
        print(f"torch not found by {a.python}: skipped")
        return
    rounds = [(output_of(ours), output_of(theirs)) for _ in range(a.rounds or (1 if a.device == "cuda" else 3))]
    weft, torch = best_of(r[0] for r in rounds), best_of(r[1] for r in rounds)
    first_ours, first_theirs = rounds[0]
    print(f"{first_ours['device']}; {first_theirs['program']} on {first_theirs['device']}; "
          f"{first_ours['batch']} x {first_ours['seq']} tokens a step, dropout, clipping and AdamW in every step")
    print(f"{'':<10} {'weft ms':>9} {'PyTorch ms':>11} {'ratio':>6} {'weft GB':>9} {'PyTorch GB':>11} {'ratio':>6}   torch.compile")
    for name in a.configs.split(","):
        w, t = weft[name], torch.get(name)
        if not t:
            print(f"{name:<10} {w['step_ms']:>9.2f} {'-':>11} {'-':>6} {w['peak_memory_gb']:>9.2f}   PyTorch: not run in time")
            continue
        memory = f"{w['peak_memory_gb']:>9.2f} {'-':>11} {'-':>6}"
        if t["peak_memory_gb"]:
            memory = (f"{w['peak_memory_gb']:>9.2f} {t['peak_memory_gb']:>11.2f} "
                      f"{w['peak_memory_gb'] / t['peak_memory_gb']:>6.2f}")
        print(f"{name:<10} {w['step_ms']:>9.2f} {t['step_ms']:>11.2f} {w['step_ms'] / t['step_ms']:>6.2f} {memory}   {t['compile']}")
    if a.json:
        with open(a.json + ".part", "w") as out:
            json.dump([{"weft": w, "pytorch": t} for w, t in rounds], out, indent=1)
        os.replace(a.json + ".part", a.json)


if __name__ == "__main__":
    main()
