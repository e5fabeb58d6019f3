"""Muon against PyTorch's, which takes matrices one by one and its learning rate from the host."""

import copy
import dataclasses

import pytest
import torch

from newllm.config import ModelConfig
from newllm.model import build_model
from newllm.muon import Muon, orthogonalised
from newllm.training_config import TrainingConfig
from newllm.weights import make_optimizer

SHAPES = [(24, 24), (48, 16), (16, 40), (24, 24)]


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
def test_three_steps_are_those_of_torch(lr):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    muon = Muon([{"params": ours, "weight_decay": 0.3, "muon": True}], lr=lr, capturable=isinstance(lr, torch.Tensor))
    torchs = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * 1e-3  # its size does not matter
            q.grad = p.grad.clone()
        muon.step()
        torchs.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        error = (p - q).norm() / (q - start).norm()
        assert error < 0.02  # of a bfloat16 iteration whose products are rounded in another order


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 24, 40)])
def test_directions_stay_and_lengths_become_alike(shape):
    torch.manual_seed(1)
    x = torch.randn(shape)
    y = orthogonalised(x)
    assert y.dtype == torch.bfloat16
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    inner = left.mT @ y.float() @ right.mT
    lengths = inner.diagonal(dim1=1, dim2=2)
    assert lengths.min() > 0.5
    assert lengths.max() < 1.3
    assert (inner - torch.diag_embed(lengths)).abs().max() < 0.03


def test_only_matrices_between_features_take_its_steps():
    config = ModelConfig(
        vocab_size=50, embed_dim=16, context_dim=24, ffn_dim=32, num_layers=2, softmaxes=2, fnn_layers=0
    )
    model = build_model(config)
    groups = make_optimizer(model, dataclasses.replace(TrainingConfig(), optimizer="muon")).param_groups
    taken = {id(p) for group in groups if group["muon"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in taken}
    inner = ("mixer.cell.from_x", "mixer.output_gate", "mixer.out", "ffn.gate_and_value", "ffn.out")
    assert names == {f"blocks.{n}.{layer}.weight" for n in range(2) for layer in inner} | {"mixture.latent.weight"}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_loaded_state_goes_on_as_the_saved_one():
    torch.manual_seed(2)
    models = [torch.nn.Linear(12, 8) for _ in range(2)]
    muons = [
        Muon(
            [{"params": [m.bias], "weight_decay": 0.0}, {"params": [m.weight], "weight_decay": 0.1, "muon": True}],
            lr=0.1,
        )
        for m in models
    ]
    gradients = torch.randn(4, 8, 12)

    def step(n, which):
        models[which].weight.grad, models[which].bias.grad = gradients[n].clone(), gradients[n, :, 0].clone()
        muons[which].step()

    for n in range(2):
        step(n, 0)
    models[1].load_state_dict(models[0].state_dict())
    muons[1].load_state_dict(copy.deepcopy(muons[0].state_dict()))
    for n in range(2, 4):
        step(n, 0)
        step(n, 1)
    assert torch.equal(models[0].weight, models[1].weight)
    assert torch.equal(models[0].bias, models[1].bias)
