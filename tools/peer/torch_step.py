#!/usr/bin/env python3
"""One training step of bench_step's configurations, as fast as a PyTorch user would write it: the peer of
tools/compare_pytorch.py. torch.compile, scaled_dot_product_attention, grouped expert products, fused AdamW, bf16 autocast
over float32 weights on a GPU and float32 on a CPU; dropout on, gradients clipped, AdamW on every weight in every step.
Prints JSON of bench_step's form. Nothing in a step waits for the device."""
import argparse
import json
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

PRESETS = {  # as in train/recipe.cpp
    "exp1": dict(width=768, layers=10, heads=12, ffn=3072, experts=8, vocab=49152, seq=512, batch=16),
    "quick": dict(width=96, layers=2, heads=4, ffn=256, experts=4, vocab=256, seq=128, batch=8),
}
TOP_K, DROPOUT, NOISE, BALANCE = 2, 0.1, 0.1, 0.01
ALIGN = 16  # rows: torch._grouped_mm wants each expert's rows to start at a multiple of 16 bytes


class Rope(nn.Module):
    def __init__(self, size, length, factor=1.0):
        super().__init__()
        angle = torch.outer(torch.arange(length) / factor, 10000.0 ** (-torch.arange(0, size, 2) / size))
        self.register_buffer("cos", angle.cos()[None, :, None])
        self.register_buffer("sin", angle.sin()[None, :, None])

    def forward(self, x):  # [B, T, H, R], pairs (2i, 2i+1)
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = (even * self.cos - odd * self.sin, even * self.sin + odd * self.cos)
        return torch.stack(pairs, -1).flatten(-2).to(x.dtype)


def causal_attention(q, k, v, training):  # [B, T, H, D] each
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True,
                                       dropout_p=DROPOUT if training else 0.0)
    return y.transpose(1, 2).flatten(2)


class MultiHead(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c["heads"]
        self.qkv = nn.Linear(c["width"], 3 * c["width"], bias=False)
        self.out = nn.Linear(c["width"], c["width"], bias=False)
        self.rope = Rope(c["width"] // c["heads"], c["seq"])

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.out(causal_attention(self.rope(q), self.rope(k), v, self.training))


class Latent(nn.Module):
    def __init__(self, c, rotary, value, bias, factor):
        super().__init__()
        width, self.heads, self.rotary = c["width"], c["heads"], rotary
        q_rank, self.kv_rank = (max(8, (width // share + 7) // 8 * 8) for share in (6, 3))
        self.q_a = nn.Linear(width, q_rank, bias=bias)
        self.q_norm = nn.RMSNorm(q_rank, eps=1e-6)
        self.q_b = nn.Linear(q_rank, self.heads * rotary, bias=False)
        self.kv_a = nn.Linear(width, self.kv_rank + rotary, bias=bias)
        self.kv_norm = nn.RMSNorm(self.kv_rank, eps=1e-6)
        self.kv_b = nn.Linear(self.kv_rank, self.heads * value, bias=False)
        self.out = nn.Linear(self.heads * value, width, bias=bias)
        self.rope = Rope(rotary, c["seq"], factor)

    def forward(self, x):
        q = self.q_b(self.q_norm(self.q_a(x))).unflatten(-1, (self.heads, -1))
        latent, key = self.kv_a(x).split([self.kv_rank, self.rotary], -1)
        k = self.rope(key.unsqueeze(2)).expand(-1, -1, self.heads, -1)  # one rotary key for all heads
        v = self.kv_b(self.kv_norm(latent)).unflatten(-1, (self.heads, -1))
        return self.out(causal_attention(self.rope(q), k, v, self.training))


def make_attention(name, c):
    head = c["width"] // c["heads"]
    if name == "baseline":
        return MultiHead(c)
    if name == "lora":
        return Latent(c, rotary=head, value=head, bias=False, factor=1.0)
    return Latent(c, rotary=2 * head, value=3 * head, bias=True, factor=2.0)


class TakeRows(torch.autograd.Function):
    """x[rows] where rows holds no index twice: its gradient is a copy and needs no atomics."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.size = x.size(0)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, dy):
        (rows,) = ctx.saved_tensors
        return dy.new_zeros(ctx.size, dy.size(1)).index_copy(0, rows, dy), None


class Experts(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.count = c["experts"]
        self.gate = nn.Linear(c["width"], self.count, bias=False)
        self.up = nn.Parameter(torch.randn(self.count, c["ffn"], c["width"]) * 0.02)
        self.down = nn.Parameter(torch.randn(self.count, c["width"], c["ffn"]) * 0.02)

    def grouped(self, x, chosen, counts):
        """On a GPU: one product over all experts, whose row counts stay on the device."""
        padded = (counts + ALIGN - 1) // ALIGN * ALIGN
        ends = padded.cumsum(0)
        order = chosen.argsort(stable=True)
        expert = chosen[order]
        rank = torch.arange(chosen.numel(), device=x.device) - (counts.cumsum(0) - counts)[expert]
        rows = torch.empty_like(order).scatter_(0, order, (ends - padded)[expert] + rank)  # of each choice
        spread = x.to(torch.bfloat16)[:, None].expand(-1, TOP_K, -1).flatten(0, 1)
        sorted_x = spread.new_zeros(chosen.numel() + self.count * ALIGN, x.size(1)).index_copy(0, rows, spread)
        offsets = ends.to(torch.int32)
        hidden = torch._grouped_mm(sorted_x, self.up.to(torch.bfloat16).transpose(1, 2), offs=offsets)
        hidden = F.dropout(F.silu(hidden), DROPOUT, self.training)
        return TakeRows.apply(torch._grouped_mm(hidden, self.down.to(torch.bfloat16).transpose(1, 2), offs=offsets), rows)

    def looped(self, x, chosen, counts):
        """On a CPU: rows sorted by expert, one pair of products each."""
        order = chosen.argsort(stable=True)
        parts = x[order // TOP_K].split(counts.tolist())
        hidden = [F.linear(part, w) for part, w in zip(parts, self.up)]
        hidden = F.dropout(F.silu(torch.cat(hidden)), DROPOUT, self.training).split(counts.tolist())
        y = torch.cat([F.linear(part, w) for part, w in zip(hidden, self.down)])
        return TakeRows.apply(y, torch.empty_like(order).scatter_(0, order, torch.arange(order.numel())))

    def forward(self, x):
        flat = x.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(flat.float(), self.gate.weight)
        if self.training:
            logits = logits + NOISE * torch.randn_like(logits)
        top, chosen = logits.topk(TOP_K, -1)
        chosen = chosen.flatten()
        counts = F.one_hot(chosen, self.count).sum(0)
        balance = BALANCE * self.count * (counts / chosen.numel() * logits.softmax(-1).mean(0)).sum()
        y = (self.grouped if x.is_cuda else self.looped)(flat, chosen, counts)
        return (y.unflatten(0, (-1, TOP_K)) * top.softmax(-1)[..., None]).sum(1).view_as(x), balance


class Block(nn.Module):
    def __init__(self, name, c):
        super().__init__()
        self.attention_norm = nn.RMSNorm(c["width"], eps=1e-6)
        self.attention = make_attention(name, c)
        self.ffn_norm = nn.RMSNorm(c["width"], eps=1e-6)
        self.experts = Experts(c)

    def forward(self, x):
        x = x + F.dropout(self.attention(self.attention_norm(x)), DROPOUT, self.training)
        y, balance = self.experts(self.ffn_norm(x))
        return x + F.dropout(y, DROPOUT, self.training), balance


class LanguageModel(nn.Module):
    def __init__(self, name, c):
        super().__init__()
        self.embedding = nn.Embedding(c["vocab"], c["width"])
        self.blocks = nn.ModuleList(Block(name, c) for _ in range(c["layers"]))
        self.norm = nn.RMSNorm(c["width"], eps=1e-6)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens, targets):
        x = F.dropout(self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim), DROPOUT, self.training)
        balances = []
        for block in self.blocks:
            x, balance = block(x)
            balances.append(balance)
        logits = F.linear(F.dropout(self.norm(x), DROPOUT, self.training), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) + torch.stack(balances).sum()


def step_times(step, device, steps):
    """Milliseconds of each of `steps` steps that follow one another without a pause."""
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in zip(marks, marks[1:])]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def bench(name, c, device, compile_mode, steps):
    torch.manual_seed(42)
    torch._dynamo.reset()
    model = LanguageModel(name, c).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    run = model if compile_mode == "none" else torch.compile(model, mode=compile_mode)
    ids = torch.randint(0, c["vocab"], (c["batch"], c["seq"] + 1), device=device)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = run(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    start = time.perf_counter()
    losses = [float(step().detach()) for _ in range(5)]
    ready = time.perf_counter() - start
    peak = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = sorted(step_times(step, device, steps))
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    at = lambda share: times[int(share * (len(times) - 1))]
    return {"configuration": name, "compile": compile_mode, "parameters": sum(p.numel() for p in model.parameters()),
            "step_ms": at(0.5), "step_ms_p10": at(0.1), "step_ms_p90": at(0.9), "step_ms_min": times[0],
            "tokens_per_second": 1e3 * c["batch"] * c["seq"] / at(0.5), "peak_memory_gb": peak,
            "losses": losses, "ready_seconds": ready}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="exp1", choices=PRESETS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--configs", default="baseline,lora,enhanced")
    parser.add_argument("--compile", default="default",
                        help="mode of torch.compile, or none; several, joined by commas: each is timed, the fastest kept")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=0, help="0: the preset's; fewer compile sooner")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no configuration later than this")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    a = parser.parse_args()
    torch.set_float32_matmul_precision("high" if a.device == "cuda" else "highest")
    if a.threads:
        torch.set_num_threads(a.threads)
    c = PRESETS[a.preset] | ({"layers": a.layers} if a.layers else {})
    best, start = [], time.perf_counter()
    for name in a.configs.split(","):
        if time.perf_counter() - start > a.seconds:
            print(f"{name}: not run, {a.seconds:.0f} s are over", file=sys.stderr)
            continue
        tried = [bench(name, c, a.device, mode, a.steps) for mode in a.compile.split(",")]
        best.append(min(tried, key=lambda t: t["step_ms"]) |
                    {"all_modes": {t["compile"]: t["step_ms"] for t in tried}})
    device = torch.cuda.get_device_name() if a.device == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    print(json.dumps({"program": f"PyTorch {torch.__version__}", "device": device, "batch": c["batch"], "seq": c["seq"],
                      "steps": best}, indent=2))


if __name__ == "__main__":
    main()
