"""newllm_kernels: the recurrences of New-LLM as fused kernels, one operator each, on whatever backend serves fastest.

    scan            h_t = a_t h_{t-1} + b_t
    gated_scan      c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(d_t)
    context_update  one step of the cell: gates, update, LayerNorm, clamp
    context_scan    the cell over a whole sequence whose gates are known
    recurrent_context   the whole cell: hidden layers and gates see their own context
    layer_norm, add_layer_norm
    gated_scan_layer_norm   gated_scan, and LayerNorm of what it returns

    decode_linear   a linear layer at one token, fused with its neighbours; for generation

    ContextUpdate   the cell as a layer         LayerNorm   drop-in for torch.nn.LayerNorm
    ContextRNN      recurrent_context with the manners of torch.nn.LSTM

`explain("gated_scan", f, i, d)` says which backend a call takes and why; `python -m newllm_kernels` what this
installation holds; `record_seams` how `context_scan` went through time. Dimension letters, everywhere: B batch, T time steps,
D context_dim, H hidden_dim, N sequences.
"""

from __future__ import annotations

from newllm_kernels.backends import BackendError, current_backend, explain, operations, use_backend
from newllm_kernels.context_rnn import ContextRNN
from newllm_kernels.context_scan import context_scan, context_scan_packed
from newllm_kernels.context_scan.seams import record_seams
from newllm_kernels.context_update import context_update, context_update_packed
from newllm_kernels.decode_linear import decode_linear
from newllm_kernels.gated_scan import gated_scan, gated_scan_packed
from newllm_kernels.gated_scan_layer_norm import gated_scan_layer_norm, gated_scan_layer_norm_packed
from newllm_kernels.layer_norm import add_layer_norm, layer_norm
from newllm_kernels.modules import ContextUpdate, LayerNorm
from newllm_kernels.recurrent_context import recurrent_context
from newllm_kernels.scan import scan

__version__ = "0.1.0"

__all__ = [
    "BackendError", "ContextRNN", "ContextUpdate", "LayerNorm", "add_layer_norm", "context_scan", "context_scan_packed",
    "context_update", "context_update_packed", "current_backend", "decode_linear", "explain", "gated_scan", "gated_scan_layer_norm",
    "gated_scan_layer_norm_packed", "gated_scan_packed", "layer_norm", "operations", "record_seams", "recurrent_context",
    "scan", "use_backend",
]  # fmt: skip
