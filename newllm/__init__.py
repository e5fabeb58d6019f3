"""New-LLM: a recurrent language model whose memory is a context vector of fixed size, and its trainer.

    from newllm.config import preset
    from newllm.model import build_model

    model = build_model(preset("tiny"))
    logits, state = model(tokens)          # tokens (B, T) int64 -> logits (B, T, V)
    logits, state = model(more, state)     # goes on where the text stopped

Everything a person does with it goes through the command line: `newllm train | eval | generate | compare`.
"""

from __future__ import annotations

__version__ = "0.1.0"
