"""HiP attention on tensors: what it returns, how close it is to dense, and what it reads."""

import torch
import torch.nn.functional as F

from hipserve import HiPConfig, hip_attention

torch.manual_seed(0)
q = torch.randn(1, 4096, 8, 64)  # [batch, query_len, num_q_heads, head_dim]
k, v = torch.randn(2, 1, 4096, 2, 64)  # [batch, kv_len, num_kv_heads, head_dim]

config = HiPConfig(budget=512)
out, lse = hip_attention(q, k, v, config=config, return_lse=True)
print("out", list(out.shape), "lse", list(lse.shape))

# With room for every key the result is that of dense attention.
dense = F.scaled_dot_product_attention(
    *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
).transpose(1, 2)
roomy = hip_attention(q, k, v, config=HiPConfig(budget=8192))
print(f"with room for every key: maximum difference {(roomy - dense).abs().max():.1e}")

# Settings are one record, and read and written as TOML or JSON.
print(config.dumps())
