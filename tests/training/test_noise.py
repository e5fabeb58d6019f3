"""Data noising: how often which words are replaced, and by what."""

import numpy as np
import torch

from newllm.noise import Noise

from .test_trainer import trainer

# 0 is always followed by 1; 1 by 0, 2, 3 and 4; 2, 3 and 4 by 0. Followers: 1, 4, 1, 1, 1 of 4, 4, 1, 1, 1.
TEXT = np.array([0, 1, 0, 1, 2, 0, 1, 3, 0, 1, 4, 0], np.uint16)


def test_pairs_are_replaced_as_often_as_kneser_ney_discounts_them():
    torch.manual_seed(0)
    noise = Noise(TEXT, 6, 0.4, torch.device("cpu"))
    followers, counts = np.array([1, 4, 1, 1, 1, 0]), np.array([5, 4, 1, 1, 1, 0])
    assert np.allclose(noise.probability, 0.4 * followers / np.maximum(counts, 1))
    n = 200_000
    for token, p in enumerate(noise.probability.tolist()):
        inputs, targets = noise(torch.full((2, n), token), torch.full((2, n), 5))
        assert targets.max() <= 5
        replaced = targets != 5  # 5 follows nothing, so it is never drawn
        assert abs(replaced.float().mean().item() - p) < 0.005
        assert torch.equal(inputs[~replaced], torch.full_like(inputs[~replaced], token))
        if p:
            before = np.array([4, 1, 1, 1, 1])  # how many different tokens each follows
            drawn = torch.bincount(targets[replaced], minlength=5) / replaced.sum()
            assert np.allclose(drawn, before / before.sum(), atol=0.01)
            drawn = torch.bincount(inputs[replaced], minlength=5) / replaced.sum()
            assert np.allclose(drawn, before / before.sum(), atol=0.01)


def test_a_trainer_reads_noise_and_a_resumed_one_the_same(tmp_path):
    finals = {}
    for name, noise, stops in (("none", 0.0, (12,)), ("whole", 0.5, (12,)), ("parts", 0.5, (5, 12))):
        for stop in stops:
            one = trainer(tmp_path / name, noise=noise)
            if one.run.last_file.exists():
                one.load()
            one.train(stop - one.step)
        finals[name] = [p.detach().clone() for p in one.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(finals["whole"], finals["parts"], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(finals["whole"], finals["none"], strict=True) if a.dim() > 1)


def test_what_is_not_replaced_stays():
    noise = Noise(TEXT, 6, 0.0, torch.device("cpu"))
    pairs = torch.randint(5, (2, 3, 400))
    assert all(torch.equal(a, b) for a, b in zip(noise(*pairs), pairs, strict=True))
