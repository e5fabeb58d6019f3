"""The small configurations that the model tests walk, of odd sizes, so that a misread dimension shows."""

from __future__ import annotations

import torch

from newllm.config import ModelConfig
from newllm.model import LanguageModel, build_model

VOCAB = 23
SMALL = {"vocab_size": VOCAB, "embed_dim": 10, "hidden_dim": 14, "context_dim": 9, "num_layers": 2, "ffn_dim": 13}

COUPLINGS = [("none", 1), ("hops", 1), ("hops", 2), ("hops", 3), ("full", 1)]


def walk() -> dict[str, ModelConfig]:
    """Every architecture x coupling x norm x number of FNN layers, by name."""
    configs = {}
    for coupling, hops in COUPLINGS:
        for norm in ("state", "output", None):
            for fnn_layers in (0, 1, 2):
                settings = {**SMALL, "coupling": coupling, "hops": hops, "norm": norm, "fnn_layers": fnn_layers}
                name = f"{coupling}{hops if coupling == 'hops' else ''}-norm_{norm}-fnn{fnn_layers}"
                configs[f"newllm-{name}"] = ModelConfig(**settings)
                if coupling != "none" and fnn_layers:
                    configs[f"classic-{name}"] = ModelConfig(architecture="classic", **settings)
    configs["newllm-untied-tanh-clamped"] = ModelConfig(**SMALL, activation="tanh", clamp=1.0, tie_embeddings=False)
    configs["newllm-mixture"] = ModelConfig(**SMALL, softmaxes=3)
    # There are 23, 529 and 12,167 places: entries are taken over all the time, and, by the texts of the tests, hardly ever.
    for entries in (7, 1000):
        configs[f"newllm-recall{entries}"] = ModelConfig(**SMALL, fnn_layers=0, recall=entries)
    configs["newllm-recall-hops-mixture"] = ModelConfig(**SMALL, coupling="hops", hops=2, softmaxes=2, recall=30)
    for window in (5, 64):  # shorter and longer than the texts of the tests
        settings = {"vocab_size": VOCAB, "embed_dim": 12, "num_heads": 3, "ffn_dim": 13, "max_seq_len": window}
        configs[f"transformer-window{window}"] = ModelConfig(architecture="transformer", **settings)
        configs[f"transformer-window{window}-recall"] = ModelConfig(architecture="transformer", **settings, recall=30)
    return configs


WALK = walk()
RECURRENT = {name: config for name, config in WALK.items() if config.architecture != "transformer"}


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> LanguageModel:
    """An eval-mode model whose every parameter is random, biases, norms and residual projections too.

    What begins as zero or one hides mistakes.
    """
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        model.embedding.weight.mul_(0.5 / model.embedding.weight.std())
        if getattr(model, "recall", None) is not None:
            model.recall.shares.uniform_(0.005, 0.07)
    return model.to(dtype).eval()


def make_tokens(B: int, T: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))
