"""The config is data: it validates, survives JSON, and every preset finds its Transformer."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from newllm.config import PRESETS, ModelConfig, count_parameters, preset, transformer_like
from newllm.model import build_model


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    config = preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_round_trip_keeps_what_differs_from_the_defaults():
    config = ModelConfig(vocab_size=7, coupling="hops", hops=3, norm=None, clamp=2, dropout=0.5, tie_embeddings=False)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["norm"] is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "lstm"),
        ("architecture", ["newllm"]),
        ("vocab_size", 0),
        ("vocab_size", "4096"),
        ("vocab_size", 4096.0),
        ("embed_dim", True),
        ("context_dim", -1),
        ("num_layers", None),
        ("fnn_layers", -1),
        ("activation", "swish2"),
        ("activation", None),
        ("coupling", "half"),
        ("hops", 0),
        ("norm", "rms"),
        ("clamp", 0.0),
        ("clamp", float("inf")),
        ("clamp", "10"),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("dropout", None),
        ("input_dropout", 1),
        ("output_dropout", -1),
        ("embed_dropout", "much"),
        ("context_init", -1.0),
        ("forget_init", "long"),
        ("input_init", math.inf),
        ("context_init", "small"),
        ("context_init", 0.3),  # of coupling="none": no weight reads the context
        ("recurrent_dropout", 1.0),
        ("recall_dropout", 1.0),
        ("recall_dropout", 0.5),  # without recall
        ("recurrent_dropout", 0.5),  # of coupling="none": no weight reads the context
        ("locked_dropout", 1),
        ("softmaxes", 0),
        ("tie_embeddings", 1),
    ],
)
def test_bad_values_raise_and_name_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=field) as error:
        ModelConfig.from_dict({field: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hops": 2}, "hops"),  # hops of a model that takes none
        ({"architecture": "transformer", "embed_dim": 30, "num_heads": 4}, "num_heads"),
        (
            {"architecture": "transformer", "embed_dim": 12, "num_heads": 4},
            "num_heads",
        ),  # heads 3 wide: RoPE wants pairs
        ({"architecture": "classic", "coupling": "none"}, "coupling"),
        ({"architecture": "classic", "coupling": "full", "fnn_layers": 0}, "fnn_layers"),
    ],
)
def test_fields_that_contradict_each_other_raise(values, named):
    with pytest.raises(ValueError, match=f"ModelConfig.{named}"):
        ModelConfig(**values)


def test_from_dict_names_unknown_fields_and_the_wrong_type():
    with pytest.raises(ValueError, match="n_layer, zeta"):
        ModelConfig.from_dict({"zeta": 1, "n_layer": 2, "vocab_size": 10})
    with pytest.raises(ValueError, match="list"):
        ModelConfig.from_dict([("vocab_size", 10)])


def test_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").vocab_size = 1


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'huge'.*classic, tiny, 40m, 100m, 1b"):
        preset("huge")


@pytest.mark.parametrize(
    ("name", "millions"), [("tiny", (1, 2)), ("40m", (38, 42)), ("100m", (95, 105)), ("1b", (950, 1100))]
)
def test_presets_are_as_large_as_they_are_called(name, millions):
    assert millions[0] <= count_parameters(preset(name)) / 1e6 <= millions[1]


def test_classic_preset_is_the_cell_of_the_design():
    config = preset("classic")
    assert (config.embed_dim, config.hidden_dim, config.context_dim, config.fnn_layers) == (256, 512, 256, 1)
    assert (config.architecture, config.coupling, config.norm, config.clamp) == ("classic", "full", "state", 10.0)


def test_count_parameters_counts_the_real_model():
    config = dataclasses.replace(preset("tiny"), vocab_size=50)
    assert count_parameters(config) == build_model(config).num_parameters()


@pytest.mark.parametrize(
    "config",
    [
        *PRESETS.values(),
        *(dataclasses.replace(preset(name), vocab_size=33278) for name in PRESETS),  # word-level WikiText-2
        ModelConfig(vocab_size=60, embed_dim=16, hidden_dim=24, context_dim=20, ffn_dim=40),
        ModelConfig(vocab_size=257, embed_dim=33, coupling="full", norm="state", tie_embeddings=False),
    ],
)
def test_transformer_like_matches_parameters_within_two_percent(config):
    like = transformer_like(config)
    assert like.architecture == "transformer"
    assert (like.vocab_size, like.dropout, like.max_seq_len) == (config.vocab_size, config.dropout, config.max_seq_len)
    assert abs(count_parameters(like) / count_parameters(config) - 1) <= 0.02
    assert ModelConfig.from_dict(like.to_dict()) == like


def test_transformer_like_with_the_same_tables():
    config = dataclasses.replace(preset("40m"), recall_dropout=0.1)
    like = transformer_like(config, recall=True)
    assert (like.recall, like.recall_dropout) == (config.recall, 0.1)
    assert (transformer_like(config).recall, transformer_like(config).recall_dropout) == (0, 0.0)
    assert abs(count_parameters(like) / count_parameters(config) - 1) <= 0.02


def test_transformer_like_of_a_transformer_is_itself():
    config = transformer_like(preset("tiny"))
    assert transformer_like(config) is config


def test_transformer_like_says_when_there_is_none():
    with pytest.raises(ValueError, match="embed_dim=256"):
        transformer_like(
            ModelConfig(vocab_size=10, embed_dim=256, context_dim=4, num_layers=1, ffn_dim=1, fnn_layers=0)
        )


OTHERS = {  # a second value for every field that some model does not read
    "hidden_dim": 24, "context_dim": 24, "num_layers": 3, "fnn_layers": 2, "ffn_dim": 24, "activation": "tanh",
    "hops": 2, "clamp": 0.01, "context_init": 0.5, "forget_init": 1.0, "input_init": 0.5, "recurrent_dropout": 0.5,
    "recall_dropout": 0.5, "tie_embeddings": False, "num_heads": 1, "max_seq_len": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(fnn_layers=0, norm="output"),
        ModelConfig(fnn_layers=1, norm=None),
        ModelConfig(fnn_layers=1, coupling="full", norm="state", recall=9),
        ModelConfig(architecture="classic", fnn_layers=1, coupling="full", norm="state"),
        ModelConfig(architecture="transformer"),
    ],
    ids=["newllm-fnn0", "newllm-no-norm", "newllm-full", "classic", "transformer"],
)
def test_a_field_is_unread_exactly_where_it_changes_nothing(config):
    config = dataclasses.replace(
        config, vocab_size=11, embed_dim=16, hidden_dim=16, context_dim=16, ffn_dim=16, num_heads=2
    )
    tokens = torch.arange(40).reshape(2, 20) % 5  # of places that come again

    def made(config):
        """First weights, and logits in training (dropout and all) of others."""
        torch.manual_seed(0)
        model = build_model(config).train()
        first = {key: x.clone() for key, x in model.state_dict().items()}
        with torch.no_grad():  # matrices that begin at zero would hide what is read before them
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
        return first, model(tokens)[0]

    weights, logits = made(config)
    others = OTHERS | {
        "coupling": "none" if config.coupling == "full" else "full",  # "hops" of one hop is "none"
        "norm": None if config.norm else "state",
        "recall": 0 if config.recall else 8,
    }
    for field, value in others.items():
        try:
            changed = made(dataclasses.replace(config, **{field: value}))
        except ValueError:  # refused, so nobody can type it
            continue
        same = changed[0].keys() == weights.keys() and all(
            torch.equal(changed[0][key], x) for key, x in weights.items()
        )
        assert (same and torch.equal(changed[1], logits)) == (field in config.unread), field
