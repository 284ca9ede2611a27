"""The prepared script for a GPU, tried on the CPU: its norms by hand are those of each sample alone."""

import pytest
import torch

from . import gpu_extras


def test_ghost_norms_by_hand_are_those_of_each_sample():
    transformers = pytest.importorskip("transformers")
    try:
        transformers.GPT2LMHeadModel  # noqa: B018
    except ModuleNotFoundError as error:  # beside a torchvision that was built for another torch
        pytest.skip(f"transformers does not import here: {error}")
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        **dropout,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(50, (3, 12))
    found = gpu_extras.ghost_step(model, tokens)
    for b in range(3):
        model.zero_grad()
        gpu_extras.plain_step(model, tokens[b : b + 1])
        alone = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        assert abs(found[b] / alone - 1) < 0.02  # both in bf16


def test_auroc_and_distance():
    novel = torch.tensor([True, True, False, False])
    assert gpu_extras.auroc(torch.tensor([3.0, 2.0, 1.0, 2.0]), novel) == 0.875
    seen = torch.randn(500, 3) * torch.tensor([1.0, 10.0, 0.1])
    near, far = gpu_extras.mahalanobis(torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 5.0]]), seen)
    assert near < 1 < far


def test_a_detector_of_few_images(tmp_path):
    net = gpu_extras.network(8, 1)
    images = torch.rand(16, 3, 32, 32) * 2 - 1
    losses = gpu_extras.fit(net, images, 8, 2, 60)
    assert len(losses) == 2
    probabilities, gradients = gpu_extras.features(net, images)
    assert probabilities.shape == (16, 4)
    assert gradients.shape == (16, 4 * 32)
    net.eval()
    weight = net[-1].weight
    turned = gpu_extras.rotations(images[:1])
    loss = torch.nn.functional.cross_entropy(net(turned), torch.arange(4), reduction="sum")
    torch.testing.assert_close(gradients[0].view(4, 32), torch.autograd.grad(loss, weight)[0], rtol=1e-3, atol=1e-5)
