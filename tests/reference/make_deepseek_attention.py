"""Makes deepseek_attention.safetensors: outputs and gradients of Hugging Face transformers' DeepSeek-V3 attention
(5.24, float32 on a CPU, causal, no dropout) for three shapes of latent attention, which tests/model_test.cpp has too.
Per case: x, dy, y = attention(x), dx, param.NAME and grad.NAME of sum(y * dy).
Needs torch, transformers and safetensors."""
import os
import torch
from safetensors.torch import save_file
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

B, T, D, H, KV, NOPE, ROPE, V = 2, 24, 32, 2, 20, 12, 16, 10
CASES = {
    "yarn": dict(q=None, bias=False, length=256,
                 rope=dict(rope_type="yarn", rope_theta=100.0, factor=4.0, beta_fast=4.0, beta_slow=0.5, mscale=1.0,
                           mscale_all_dim=0.8, original_max_position_embeddings=64)),
    "linear": dict(q=14, bias=True, length=64, rope=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    "dynamic": dict(q=14, bias=False, length=16, rope=dict(rope_type="dynamic", rope_theta=10000.0, factor=3.0)),
}
torch.manual_seed(7)
tensors = {}
for name, case in CASES.items():
    config = DeepseekV3Config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=case["q"], kv_lora_rank=KV,
        qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=V, attention_bias=case["bias"],
        max_position_embeddings=case["length"], rope_parameters=case["rope"], rope_interleave=True)
    config._attn_implementation = "eager"
    attention = DeepseekV3Attention(config, 0).eval()
    for p in attention.parameters():  # away from the initial values, so that every term matters
        torch.nn.init.normal_(p, 0.5 if p.dim() == 1 else 0.0, 0.2)
    x, dy = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    position = DeepseekV3RotaryEmbedding(config)(x, torch.arange(T)[None])
    y = attention(x, position, mask)[0]
    (y * dy).sum().backward()
    tensors |= {f"{name}.x": x.detach(), f"{name}.dy": dy, f"{name}.y": y.detach(), f"{name}.dx": x.grad}
    for n, p in attention.named_parameters():
        tensors |= {f"{name}.param.{n}": p.detach(), f"{name}.grad.{n}": p.grad}
here = os.path.dirname(os.path.abspath(__file__))
save_file({k: v.contiguous() for k, v in tensors.items()}, os.path.join(here, "deepseek_attention.safetensors"))
