"""The Transformer one token at a time: a key-value cache that stays in place, and the same fused linear layers as New-LLM's.

The baseline's decoder is as good as ours: one program of linear layers between two attentions, one kernel (and a small one)
for rotary turn, append and attention.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from newllm.model.common import AS_IT_IS, State
from newllm.model.decode_attention import CachedAttention
from newllm.model.decoding_recall import RecallStep, fitting
from newllm.model.transformer import Transformer, rotary_angles
from newllm_kernels.decode_linear.program import Activation, DecodeLayer, DecodeProgram


class CacheDecoder:
    """Static buffers: tokens (B,) int64, position (B,) int64, logits (B, V), and per layer keys and values
    (B, heads, max_seq_len, head_dim) in the dtype of the weights. With recall the first program begins at what is recalled."""

    mixing = AS_IT_IS

    def __init__(self, model: Transformer, rows: int) -> None:
        config, weight = model.config, model.embedding.weight
        self.heads, self.window = config.num_heads, config.max_seq_len
        self.head_dim = config.embed_dim // config.num_heads
        device, acc = weight.device, torch.float32

        def buffer(*shape: int, dtype: torch.dtype = acc) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.tokens, self.position = buffer(rows, dtype=torch.int64), buffer(rows, dtype=torch.int64)
        self.logits = buffer(rows, config.vocab_size)
        self.qkv, self.attended = buffer(rows, 3 * config.embed_dim), buffer(rows, config.embed_dim)
        self.x = buffer(rows, config.embed_dim)  # the residual stream between two programs
        shape = (rows, self.heads, self.window, self.head_dim)
        dtype = model.blocks[0].attention.qkv.weight.dtype
        self.keys = [buffer(*shape, dtype=dtype) for _ in model.blocks]
        self.values = [buffer(*shape, dtype=dtype) for _ in model.blocks]
        self.attention = CachedAttention(rows, self.heads, self.window, self.head_dim, device)
        initial = model.initial_state(rows, device)
        tables = {key: value for key, value in initial.items() if key.startswith("recall.")}
        self.recall = RecallStep(model, rows, tables, acc) if tables else None
        with torch.no_grad():
            self.programs = fitting(lambda: self._programs(model, rows), self.recall, model)

    def _programs(self, model: Transformer, rows: int) -> list[DecodeProgram]:
        """The linear layers before the first attention, between two, and after the last."""

        def projection(x: Tensor | Activation, number: int, tokens: Tensor | None = None) -> DecodeLayer:
            block = model.blocks[number]
            norm = block.attention_norm
            return DecodeLayer(
                x,
                tokens=tokens,
                norm=(norm.weight, norm.bias),
                eps=norm.eps,
                weights=(block.attention.qkv.weight,),
                y=self.qkv,
            )

        table, begin, tokens = model.embedding.weight, [], self.tokens
        first: Tensor | Activation = table  # what the first block reads: the tokens' rows of the table
        if self.recall is not None:
            *begin, last = self.recall.layers()
            first, tokens, begin = last.y, None, [*begin, dataclasses.replace(last, kept=self.x)]
        programs = [DecodeProgram([*begin, projection(first, 0, tokens)], rows)]
        for number, block in enumerate(model.blocks):
            norm, ffn = block.ffn_norm, block.ffn
            mixed, inner, x = (Activation(width) for width in (table.shape[1], ffn.out.in_features, table.shape[1]))
            layers = [
                DecodeLayer(
                    self.attended, weights=(block.attention.out.weight,), y=mixed,
                    residual=self.x if number or begin else table, residual_tokens=None if number else tokens,
                ),
                DecodeLayer(
                    mixed, norm=(norm.weight, norm.bias), eps=norm.eps, weights=ffn.gate_and_value.weight.chunk(2), y=inner,
                    epilogue="gated",
                ),
                DecodeLayer(inner, weights=(ffn.out.weight,), residual=mixed, y=x, kept=self.x),
            ]  # fmt: skip
            if number + 1 < len(model.blocks):
                layers.append(projection(x, number + 1))
            else:
                norm = model.final_norm
                layers.append(
                    DecodeLayer(
                        x, norm=(norm.weight, norm.bias), eps=norm.eps, weights=(model.head.weight,), y=self.logits
                    )
                )
            programs.append(DecodeProgram(layers, rows))
        return programs

    def load(self, state: State) -> None:
        """Go on from a state of the model, whose caches end with each row's last token."""
        self.position.copy_(state["position"])
        cached = state["layers.0.keys"].shape[2]
        # Entries in front of a row's first token are padding, and fall into slots that it has yet to write.
        slots = (self.position[:, None] - cached + torch.arange(cached, device=self.position.device)) % self.window
        index = slots[:, None, :, None].expand(-1, self.heads, -1, self.head_dim)
        for n, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            keys.scatter_(2, index, state[f"layers.{n}.keys"].to(keys.dtype))
            values.scatter_(2, index, state[f"layers.{n}.values"].to(values.dtype))
        if self.recall is not None:
            self.recall.load(state)

    def run(self) -> None:
        """tokens -> logits, one token on."""
        if self.recall is not None:
            self.recall.before(self.tokens)
        rotation = rotary_angles(self.position, self.head_dim, torch.float32)  # (B, head_dim / 2) each
        self.programs[0].run()
        for n, program in enumerate(self.programs[1:]):
            self.attention(self.qkv, rotation, self.position, self.keys[n], self.values[n], self.attended)
            program.run()
        if self.recall is not None:
            self.recall.after(self.tokens, self.logits, self.mixing)
        self.position.add_(1)
