"""Models: `build_model(config)` gives the architecture a config names."""

from __future__ import annotations

from newllm.config import ModelConfig
from newllm.model.classic import Classic
from newllm.model.common import LanguageModel, State, detach_state, stack_states, state_bytes
from newllm.model.newllm import NewLLM
from newllm.model.transformer import Transformer

__all__ = [
    "Classic", "LanguageModel", "NewLLM", "State", "Transformer",
    "build_model", "detach_state", "stack_states", "state_bytes",
]  # fmt: skip

_ARCHITECTURES = {"newllm": NewLLM, "classic": Classic, "transformer": Transformer}


def build_model(config: ModelConfig) -> LanguageModel:
    """A freshly initialised model: `model(tokens (B, T), state=None) -> (logits (B, T, V), new_state)`."""
    return _ARCHITECTURES[config.architecture](config)
