"""Novelty detection: the models, the representations, the classifier on factors, the scores and the estimator."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor

from gradext.losses import bce
from gradext.novelty import (
    SCORES,
    VAE,
    ConvVAE,
    GradientAlignment,
    GradientFeatures,
    NoiseClassifier,
    NoveltyDetector,
    Statistics,
    characterize,
    distort,
    features,
    train,
    train_classifier,
)
from gradext.novelty.detector import CLASSIFIER_SCORES, fit_score
from gradext.novelty.plots import overlap
from gradext.novelty.training import OneCycle, PlainAdam
from gradext.oracles import loop_layer_grads


@pytest.fixture(scope="module")
def digits():
    """(class 0, all other classes) of scikit-learn's digits, [N, 64] in [0, 1]."""
    bunch = load_digits()
    x = torch.from_numpy(bunch.data / 16).float()
    return x[bunch.target == 0], x[bunch.target != 0]


@pytest.fixture(scope="module")
def model(digits):
    torch.manual_seed(0)
    model = VAE(64, 32, 4).eval()
    train(model, digits[0][:120], digits[0][120:], epochs=150, progress=False)
    return model


@pytest.fixture(scope="module")
def inliers(model, digits):
    return characterize(model, digits[0][:120])


# --- model and training ----------------------------------------------------------------------------------------------


def test_vae_loss_is_bce_plus_kl(model, digits):
    x = digits[0][:7]
    reconstruction, mu, logvar = model(x)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(model.loss(x), bce(reconstruction, x) + kl.sum(1))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 4)])
def test_conv_vae_is_a_vae_of_images_flat_or_not(shape):
    torch.manual_seed(0)
    model, x = ConvVAE(shape, channels=3, latent_dim=2).eval(), torch.rand(5, *shape)
    reconstruction, mu, logvar = model(x)
    assert reconstruction.shape == (5, math.prod(shape))
    for flat, shaped in zip(model(x.flatten(1)), (reconstruction, mu, logvar), strict=True):
        assert torch.equal(flat, shaped)
    pixels = torch.nn.functional.binary_cross_entropy(reconstruction, x.flatten(1), reduction="none").sum(1)
    divergence = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
    torch.testing.assert_close(model.loss(x), pixels + divergence)
    seen = characterize(model, x.flatten(1), layer=("first", "encoder.0", "last"))
    assert list(seen.gradients) == ["decoder.0.weight", "encoder.0.weight", "decoder.5.weight"]
    for name, gradients in seen.gradients.items():
        weight = model.get_parameter(name)
        for k in range(5):
            loss = torch.nn.functional.binary_cross_entropy(
                model(x[k : k + 1])[0], x[k : k + 1].flatten(1), reduction="sum"
            )
            (expected,) = torch.autograd.grad(loss, weight)
            torch.testing.assert_close(gradients[k : k + 1].materialize()[0], expected, rtol=1e-4, atol=1e-5)


def test_conv_vae_refuses_sizes_that_do_not_halve_twice():
    with pytest.raises(ValueError, match=r"multiples of 4 .* but got \(1, 10, 8\)"):
        ConvVAE((1, 10, 8))


def test_vae_draws_in_training_mode_only(digits):
    model = VAE(64, 16, 3)
    x = digits[0][:2]
    assert not torch.equal(model(x)[0], model(x)[0])
    assert torch.equal(model.eval()(x)[0], model(x)[0])


def test_train_keeps_the_best_epoch_and_the_global_random_state(digits):
    torch.manual_seed(0)
    model = VAE(64, 32, 4)
    state = torch.get_rng_state()
    history = train(model, digits[0][:60], digits[0][60:80], epochs=60, learning_rate=0.02, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert history.best_epoch == int(np.argmin(history.validation))
    assert history.best_epoch < 59, "the learning rate of this test is chosen so that the last epoch is not the best"
    with torch.no_grad():
        loss = model.eval().loss(digits[0][60:80]).mean().item()
    assert loss == pytest.approx(history.validation[history.best_epoch], rel=1e-6)
    assert history.validation[-1] < history.validation[0]


def test_adam_is_torchs():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(5, 3).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = PlainAdam(list(ours.parameters()), lr=0.01), torch.optim.Adam(theirs.parameters(), lr=0.01)
    for k in range(20):
        x = torch.randn(7, 5, dtype=torch.float64)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - k).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-12, atol=1e-12)


def test_one_cycle_is_torchs_descent():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(5, 3).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    cycle = OneCycle(list(ours.parameters()), lr=0.1, steps=20)
    descent = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rates = []
    for k in range(20):
        x = torch.randn(7, 5, dtype=torch.float64)
        descent.param_groups[0]["lr"] = cycle.rate
        rates.append(cycle.rate)
        for model, optimizer in ((ours, cycle), (theirs, descent)):
            optimizer.zero_grad()
            (model(x) - k).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-12)
    assert (rates[0], rates[6]) == pytest.approx((0.004, 0.1))
    assert rates == sorted(rates[:7]) + sorted(rates[7:], reverse=True)


def test_train_is_seeded(digits):
    def weights(seed):
        torch.manual_seed(7)
        model = VAE(64, 8, 2)
        train(model, digits[0][:40], digits[0][40:60], epochs=3, seed=seed, progress=False)
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_alignment_is_the_mean_cosine_and_can_be_differentiated(digits):
    torch.manual_seed(0)
    model, x = VAE(64, 8, 2).double().eval(), digits[0][:6].double()
    penalty = GradientAlignment(weight=2.0)
    assert penalty(model, digits[0][6:20].double()) == 0, "there is no mean to align with yet"
    mean = dict(penalty.mean)

    def expected():
        cosines = []
        for name in ("decoder.0.weight", "decoder.2.weight"):
            weight = model.get_parameter(name)
            for sample in x.split(1):
                value = torch.nn.functional.binary_cross_entropy(model(sample)[0], sample, reduction="sum")
                (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
                cosines.append(torch.nn.functional.cosine_similarity(gradient.flatten(), mean[name].flatten(), dim=0))
        return -2 * torch.stack(cosines).mean()

    found, wanted = penalty(model, x), expected()
    torch.testing.assert_close(found, wanted)
    parameters = [p for name, p in model.named_parameters() if "logvar" not in name]
    for a, b in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.medium
def test_alignment_in_training_aligns_the_gradients_of_new_inliers(digits):
    def misalignment(penalty):
        torch.manual_seed(0)
        model = VAE(64, 32, 4).eval()
        train(model, digits[0][:120], digits[0][120:], epochs=100, penalty=penalty, progress=False)
        held_out = characterize(model, digits[0][120:])
        statistics = Statistics.of(characterize(model, digits[0][:120]))
        return SCORES["gradient_cosine"](held_out, statistics).mean().item()

    assert misalignment(GradientAlignment(weight=30.0)) < 0.5 * misalignment(None)


def test_train_refuses_what_cannot_work(digits):
    with pytest.raises(ValueError, match="x_validation: expected at least one sample"):
        train(VAE(64, 8, 2), digits[0], digits[0][:0])
    with pytest.raises(ValueError, match="epochs"):
        train(VAE(64, 8, 2), digits[0], digits[0], epochs=0)
    with pytest.raises(RuntimeError, match="lower learning_rate"):
        train(VAE(64, 8, 2), digits[0], digits[0], epochs=50, learning_rate=1e6, progress=False)
    with pytest.raises(ValueError, match="expected 64 elements a sample, but got 63"):
        VAE(64)(torch.rand(2, 63))
    with pytest.raises(ValueError, match="latent_dim"):
        VAE(64, latent_dim=0)


# --- representations -------------------------------------------------------------------------------------------------


def test_characterize_is_the_papers_three_representations(model, digits):
    x = digits[0][:9]
    seen = characterize(model, x)
    reconstruction, mu, logvar = model(x)
    pixels = torch.nn.functional.binary_cross_entropy(reconstruction, x, reduction="none")
    torch.testing.assert_close(seen.reconstruction, pixels.detach())
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(seen.latent, kl.detach(), atol=1e-5, rtol=1e-5)
    expected = loop_layer_grads(model, x, bce, ["decoder.0.weight"])["decoder.0.weight"]
    torch.testing.assert_close(seen.gradient.materialize(), expected)


def test_characterize_takes_either_end_of_the_decoder_and_any_batching(model, digits):
    x = digits[0][:11]
    assert characterize(model, x, layer="last").gradient.shape == (11, 64, 32)
    assert characterize(model, x, layer="decoder.0").gradient.shape == (11, 32, 4)
    whole, parts = characterize(model, x), characterize(model, x, batch_size=3)
    torch.testing.assert_close(parts.gradient.materialize(), whole.gradient.materialize())
    torch.testing.assert_close(parts[2:5].latent, whole.latent[2:5])
    with pytest.raises(ValueError, match="at least one sample"):
        characterize(model, x[:0])


def test_characterize_keeps_several_layers_in_the_order_of_the_choice(model, digits):
    x = digits[0][:5]
    both = characterize(model, x, layer=("last", "first"))
    assert list(both.gradients) == ["decoder.2.weight", "decoder.0.weight"]
    assert both.gradient is both.gradients["decoder.2.weight"]
    for name in both.gradients:
        expected = loop_layer_grads(model, x, bce, [name])[name]
        torch.testing.assert_close(both.gradients[name].materialize(), expected)
        torch.testing.assert_close(both[1:3].gradients[name].materialize(), expected[1:3])


def test_characterize_leaves_the_model_in_its_mode(digits):
    model = VAE(64, 8, 2).train()
    model.decoder.eval()
    characterize(model, digits[0][:3])
    assert model.training
    assert not any(module.training for module in model.decoder.modules())
    assert model.encoder.training


def test_no_sample_depends_on_others_where_the_sigmoid_saturates(digits):
    model, x = VAE(64, 8, 2).double(), digits[0][:5].double()
    with torch.no_grad():
        model.decoder[2].bias.fill_(40.0)
    alone = characterize(model, x, layer=("first", "last"))
    x[2] += 1  # leaves [0, 1]
    seen = characterize(model, x, layer=("first", "last"))
    kept = [0, 1, 3, 4]
    for name, factors in seen.gradients.items():
        assert (alone.gradients[name].norm() > 0).all()
        torch.testing.assert_close(factors[kept].materialize(), alone.gradients[name][kept].materialize())
        one = characterize(model, x[2:3], layer=name).gradient
        torch.testing.assert_close(factors[2].materialize(), one.materialize())


def test_reconstruction_of_distorted_images_is_the_linear_continuation(model, digits):
    """Noise leaves [0, 1], where torch's binary cross entropy refuses its target: the formula still holds."""
    x = distort(digits[0][:5], std=0.5, seed=3)
    assert x.min() < 0
    assert x.max() > 1
    p = model(x)[0].detach()
    expected = -(x * p.log() + (1 - x) * (1 - p).log())
    torch.testing.assert_close(characterize(model, x).reconstruction, expected, rtol=1e-4, atol=1e-4)


def test_distort_is_seeded_noise_of_the_given_size(digits):
    x = digits[0]
    noisy = distort(x, std=0.25, seed=1)
    assert torch.equal(noisy, distort(x, std=0.25, seed=1))
    assert not torch.equal(noisy, distort(x, std=0.25, seed=2))
    assert (noisy - x).std().item() == pytest.approx(0.25, rel=0.05)
    clipped = distort(x, std=0.25, clip=True, seed=1)
    assert torch.equal(clipped, noisy.clamp(0, 1))
    with pytest.raises(ValueError, match="std"):
        distort(x, std=0)


# --- classifier on factors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [False, True])
def test_gradient_features_are_direction_and_magnitude(inliers, whiten):
    made = features("gradient", inliers, whiten=whiten)(inliers)
    flat = made.materialize()
    assert flat.shape == (120, 32 * 4 + 1)
    direction, magnitude = flat[:, :-1], flat[:, -1]
    torch.testing.assert_close(torch.linalg.vector_norm(direction, dim=1), torch.full((120,), 30.0))
    assert magnitude.mean().item() == pytest.approx(0, abs=1e-3)
    assert magnitude.std(correction=0).item() == pytest.approx(10, rel=1e-3)
    gradient = inliers.gradient.materialize().double()
    if whiten:
        A, D = (damped(rows) for rows in (inliers.gradient.activation, inliers.gradient.delta))
        L_A, L_D = torch.linalg.cholesky(A), torch.linalg.cholesky(D)
        gradient = torch.linalg.inv(L_D) @ gradient @ torch.linalg.inv(L_A).T
    cosine = torch.nn.functional.cosine_similarity(direction.double(), gradient.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(120, dtype=torch.float64), rtol=1e-5, atol=0)


def damped(rows):
    """Second moments with the ridge of a tenth of their mean, in fp64."""
    moments = rows.double().T @ rows.double() / len(rows)
    return moments + 0.1 * moments.diagonal().mean() * torch.eye(len(moments))


def test_whitened_features_have_the_kronecker_fisher_norm(inliers):
    whitened = features("gradient", inliers).whitened(inliers.gradient)
    norm = SCORES["kronecker_fisher"](inliers, Statistics.of(inliers, ["kronecker_fisher"]))
    torch.testing.assert_close(whitened.norm(), norm, rtol=1e-4, atol=1e-5)


def test_features_of_a_zero_gradient_are_finite(inliers):
    dead = GradientFeatures.of(
        type(inliers.gradient)(inliers.gradient.activation, inliers.gradient.delta * 0), 0.0, 1.0
    )
    assert dead.materialize().isfinite().all()
    assert dead.materialize()[:, :-1].eq(0).all()


def test_the_length_of_directions_is_an_option_that_a_copy_of_the_score_keeps(inliers):
    score = fit_score("gradient_classifier", inliers, inliers, direction_length=2.0, epochs=1)
    for made in (score, score.with_tensors(score.tensors())):
        directions = made.features(inliers).direction
        torch.testing.assert_close(directions.norm(), torch.full((len(inliers),), 2.0))


def test_classifier_on_factors_equals_the_materialised_one_in_value_and_training(model, digits, inliers):
    """Same seed, same data: scores, and weights after training, agree with the classifier on written-out gradients."""
    featurize = features("gradient", inliers)
    inside, outside = featurize(inliers), featurize(characterize(model, distort(digits[0][:120], seed=1)))
    classifier = NoiseClassifier(inside.dim, 16)
    torch.testing.assert_close(classifier(inside), classifier(inside.materialize()), rtol=1e-4, atol=1e-5)

    def to64(f):
        return GradientFeatures(f.direction.to(torch.float64), f.magnitude.double())

    inside, outside = to64(inside), to64(outside)
    factored = train_classifier(inside, outside, hidden_dim=16, epochs=20, seed=3)
    materialised = train_classifier(inside.materialize(), outside.materialize(), hidden_dim=16, epochs=20, seed=3)
    for a, b in zip(factored.parameters(), materialised.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_classifier_never_forms_a_gradient_per_sample(largest_result):
    """No tensor of N·O·I elements, or even of one batch's B·O·I, in training or scoring."""
    N, O, I, H = 512, 96, 64, 8
    generator = torch.Generator().manual_seed(0)
    from gradext import GradFactors

    def made():
        return GradientFeatures(
            GradFactors(torch.randn(N, I, generator=generator), torch.randn(N, O, generator=generator)),
            torch.randn(N, generator=generator),
        )

    inside, outside = made(), made()
    with largest_result() as largest:
        classifier = train_classifier(inside, outside, hidden_dim=H, epochs=2, batch_size=128)
        classifier(inside)
    assert largest.elements < 64 * O * I, f"{largest.elements} elements, a half batch of gradients has {64 * O * I}"


def test_classifier_separates_and_is_seeded(model, digits, inliers):
    noisy = characterize(model, distort(digits[0][:120], std=0.4, seed=1))
    featurize = features("reconstruction", inliers)
    first, second = (train_classifier(featurize(inliers), featurize(noisy), seed=5) for _ in range(2))
    with torch.no_grad():
        logits = torch.cat([first(featurize(inliers)), first(featurize(noisy))])
    assert roc_auc_score(np.repeat([0, 1], 120), logits) > 0.9
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="at least one sample of each"):
        train_classifier(featurize(inliers)[:0], featurize(noisy))
    with pytest.raises(ValueError, match="representation: expected one of"):
        features("pixels", inliers)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_their_formulas(model, digits):
    layers = ("first", "encoder.0", "last")
    inliers, sample = characterize(model, digits[0], layer=layers), characterize(model, digits[1][:20], layer=layers)
    gradient, inside = (seen.gradient.materialize().flatten(1).double() for seen in (sample, inliers))
    delta, activation = sample.gradient.delta.double(), sample.gradient.activation.double()
    mean, fisher = inside.mean(0), inside.square().mean(0)

    def inverse(rows):
        return torch.linalg.inv(damped(rows))

    def standardised(of):
        logs = torch.stack([of(seen.gradients[name]).double().log() for name in names for seen in (inliers,)], dim=1)
        found = torch.stack([of(sample.gradients[name]).double().log() for name in names], dim=1)
        return (found - logs.mean(0)) / logs.std(0, correction=0)

    names = ["decoder.0.weight", "encoder.0.weight", "decoder.2.weight"]

    whitened = torch.einsum("bo,op,bp->b", delta, inverse(inliers.gradient.delta), delta)

    def whitened_norm(gradient, delta_inverse):
        return torch.einsum("bo,op,bp->b", gradient.delta.double(), delta_inverse, gradient.delta.double()).sqrt()

    z_whitened = 0
    for name in names[:-1]:
        D_inv = inverse(inliers.gradients[name].delta)
        logs, inside_logs = (whitened_norm(seen.gradients[name], D_inv).log() for seen in (sample, inliers))
        z_whitened = z_whitened + (logs - inside_logs.mean()) / inside_logs.std(correction=0)
    z_delta = standardised(lambda gradient: gradient.delta.norm(dim=1))
    z_gradient = standardised(lambda gradient: gradient.materialize().flatten(1).norm(dim=1))

    def numbers(seen):
        norms = [seen.gradients[name].materialize().flatten(1).norm(dim=1) for name in names]
        return torch.stack([*norms, seen.reconstruction.sum(1), seen.latent.sum(1)], dim=1).double()

    logs, inside_logs = numbers(sample).log(), numbers(inliers).log()
    mean_log, std_log = inside_logs.mean(0), inside_logs.std(0, correction=0)
    C = np.corrcoef(inside_logs.numpy(), rowvar=False) + 0.1 * np.eye(5)

    def half_mahalanobis(rows):
        z = ((rows - mean_log) / std_log).numpy()
        return torch.from_numpy(np.einsum("bi,ij,bj->b", z, np.linalg.inv(C), z) / 2)

    evidence, inside_evidence = (
        torch.cat([half_mahalanobis(numbers(seen).log())[:, None], numbers(seen)[:, 3:]], dim=1)
        for seen in (sample, inliers)
    )
    z_evidence = (evidence - inside_evidence.mean(0)) / inside_evidence.std(0, correction=0)
    kronecker = torch.einsum("bi,ij,bj->b", activation, inverse(inliers.gradient.activation), activation) * whitened
    constant, of_inliers = (
        torch.cat([seen.gradient.activation, torch.ones(len(seen), 1)], dim=1).double() for seen in (sample, inliers)
    )
    with_bias = torch.einsum("bi,ij,bj->b", constant, inverse(of_inliers), constant)
    lof = LocalOutlierFactor(n_neighbors=20, novelty=True).fit(inliers.gradient.activation.double().numpy())
    distances = (
        torch.cdist(gradient, inside).topk(5, largest=False).values[:, -1],
        torch.cdist(inside, inside).fill_diagonal_(torch.inf).topk(5, largest=False).values[:, -1],
    )
    factors = (
        torch.from_numpy(-lof.score_samples(activation.numpy())),
        torch.from_numpy(-lof.negative_outlier_factor_),
    )
    local = sum(
        (of_sample.log() - of_inliers.log().mean()) / of_inliers.log().std(correction=0)
        for of_sample, of_inliers in (distances, factors)
    )
    whole = torch.linalg.inv(damped(inside - mean))
    expected = {
        "gradient_mahalanobis": torch.einsum("bi,ij,bj->b", gradient - mean, whole, gradient - mean).sqrt(),
        "local_gradient": local,
        "whitened_gradient": whitened.sqrt() * with_bias.pow(0.25),
        "gradient_norm": gradient.norm(dim=1),
        "delta_norm": delta.norm(dim=1),
        "gradient_cosine": 1 - gradient @ mean / (gradient.norm(dim=1) * mean.norm()),
        "diagonal_fisher": (gradient.square() / (fisher + 0.1 * fisher.mean())).sum(1).sqrt(),
        "kronecker_fisher": kronecker.sqrt(),
        "whitened_delta_norm": whitened.sqrt(),
        "log_norm_density": z_gradient.square().sum(1) / 2,
        "combined_delta_norm": z_delta.sum(1),
        "combined_whitened_norm": z_whitened + z_delta[:, 2],
        "joint_density": half_mahalanobis(logs),
        "combined_evidence": z_evidence.sum(1),
        "reconstruction_error": sample.reconstruction.double().sum(1),
        "latent_loss": sample.latent.double().sum(1),
    }
    assert set(expected) == set(SCORES)
    for name, value in expected.items():
        found = SCORES[name](sample, Statistics.of(inliers, [name]))
        torch.testing.assert_close(found.double(), value, rtol=2e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(SCORES[name](sample, Statistics.of(inliers)), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_joint_density_without_a_latent_loss_is_that_of_the_others(model, digits, dtype):
    model = copy.deepcopy(model).to(dtype)
    inliers, sample = (
        replace(characterize(model, digits[k][:89].to(dtype)), latent=torch.zeros(89, 0, dtype=dtype)) for k in range(2)
    )  # as of an autoencoder that has none
    logs, inside = (
        torch.stack([seen.gradient.norm(), seen.reconstruction.sum(1)], dim=1).double().log().numpy()
        for seen in (sample, inliers)
    )
    z = (logs - inside.mean(0)) / inside.std(0)
    C = np.corrcoef(inside, rowvar=False) + 0.1 * 2 / 3 * np.eye(2)  # of three numbers one never varies
    expected = np.einsum("bi,ij,bj->b", z, np.linalg.inv(C), z) / 2
    found = SCORES["joint_density"](sample, Statistics.of(inliers, ["joint_density"]))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_scores_of_dead_gradients_are_finite(digits):
    """A decoder whose hidden units never fire gives gradients of zero: no NaN, and no novelty either."""
    dead = VAE(64, 8, 2).eval()
    with torch.no_grad():
        dead.decoder[0].bias.fill_(-100)
    seen = characterize(dead, digits[0][:9], layer=("first", "last"))
    assert seen.gradient.norm().eq(0).all()
    statistics = Statistics.of(seen)
    for name, score in SCORES.items():
        assert score(seen, statistics).isfinite().all(), name


def test_fit_score_refuses_unknown_names_and_missing_outliers(inliers):
    with pytest.raises(ValueError, match="score: expected one of"):
        fit_score("norm", inliers, None)
    with pytest.raises(ValueError, match="training outliers"):
        fit_score("gradient_classifier", inliers, None)


# --- the estimator ---------------------------------------------------------------------------------------------------

FAST = {"hidden_dim": 64, "latent_dim": 8, "epochs": 400, "batch_size": 32, "learning_rate": 3e-3, "random_state": 0}


@pytest.fixture(scope="module")
def detector(digits):
    return NoveltyDetector(**FAST).fit(digits[0][:140].numpy())


def test_detector_tells_classes_apart(detector, digits):
    inside, outside = digits[0][140:].numpy(), digits[1][:200].numpy()
    scores = detector.score_samples(np.concatenate([inside, outside]))
    normal = np.repeat([1, 0], [len(inside), len(outside)])
    assert roc_auc_score(normal, scores) > 0.95, "higher is more normal"


def test_decision_and_prediction_follow_the_threshold(detector, digits):
    X = np.concatenate([digits[0][140:].numpy(), digits[1][:50].numpy()])
    decision = detector.decision_function(X)
    np.testing.assert_allclose(decision, detector.score_samples(X) - detector.offset_)
    np.testing.assert_array_equal(detector.predict(X), np.where(decision < 0, -1, 1))
    assert set(detector.predict(X)) == {-1, 1}


@pytest.mark.medium
@pytest.mark.parametrize("score", [*SCORES, *CLASSIFIER_SCORES])
def test_every_score_works_in_the_detector(digits, score):
    detector = NoveltyDetector(score, **{**FAST, "epochs": 20}).fit(digits[0])
    scores = detector.score_samples(digits[1][:10])
    assert scores.shape == (10,)
    assert np.isfinite(scores).all()


@pytest.mark.medium
def test_detector_is_deterministic_and_indifferent_to_order_and_batching(detector, digits):
    X = digits[1][:40].numpy()
    again = clone(detector).fit(digits[0][:140].numpy())
    np.testing.assert_array_equal(again.score_samples(X), detector.score_samples(X))
    np.testing.assert_allclose(detector.score_samples(X[::-1])[::-1], detector.score_samples(X), rtol=1e-5)
    one_by_one = np.concatenate([detector.score_samples(X[k : k + 1]) for k in range(5)])
    np.testing.assert_allclose(one_by_one, detector.score_samples(X)[:5], rtol=1e-4)


def test_detector_takes_images_flat_arrays_tensors_and_other_float_types(detector, digits):
    X = digits[1][:6]
    expected = detector.score_samples(X)
    for same in (X.numpy(), X.reshape(6, 1, 8, 8), X.reshape(6, 8, 8).numpy().astype(np.float64)):
        np.testing.assert_allclose(detector.score_samples(same), expected, rtol=1e-5)


def test_parameters_are_kept_as_given():
    detector = NoveltyDetector("delta_norm", epochs=3, target_fpr=0.2)
    assert detector.get_params()["novelty_score"] == "delta_norm"
    assert clone(detector).set_params(epochs=4).epochs == 4


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (np.zeros((0, 64)), ValueError, r"Found array with 0 sample\(s\)"),
        (np.zeros((0, 8, 8)), ValueError, r"Found array with 0 sample\(s\)"),
        (np.zeros((4, 0)), ValueError, r"Found array with 0 feature\(s\)"),
        (np.zeros(64), ValueError, "Expected 2D array, got 1D array instead"),
        (np.full((4, 64), np.nan), ValueError, "4 samples hold NaN or infinity"),
        (np.full((4, 64), np.inf), ValueError, "4 samples hold NaN or infinity"),
        (np.zeros((1, 64)), ValueError, "at least 3 samples"),
    ],
)
def test_fit_names_what_is_wrong_with_its_input(X, error, message):
    with pytest.raises(error, match=message):
        NoveltyDetector(epochs=1).fit(X)


def test_detector_refuses_wrong_use(detector):
    with pytest.raises(NotFittedError):
        NoveltyDetector().score_samples(np.zeros((2, 64)))
    with pytest.raises(ValueError, match="X has 63 features, but NoveltyDetector is expecting 64 features"):
        detector.score_samples(np.zeros((2, 63)))
    with pytest.raises(ValueError, match="novelty_score: expected one of"):
        NoveltyDetector("norm").fit(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="target_fpr"):
        NoveltyDetector(target_fpr=1.0).fit(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="validation_fraction"):
        NoveltyDetector(validation_fraction=0).fit(np.zeros((4, 4)))


# --- pictures --------------------------------------------------------------------------------------------------------


def test_overlap_of_known_distributions():
    rng = np.random.default_rng(0)
    same, _ = overlap(rng.random(200_000), rng.random(200_000))
    apart, _ = overlap(rng.random(1000), rng.random(1000) + 5)
    half, _ = overlap(rng.random(200_000), rng.random(200_000) + 0.5)
    assert same == pytest.approx(1, abs=0.02)
    assert apart == 0
    assert half == pytest.approx(0.5, abs=0.03)
    _, edges = overlap(rng.random(30), rng.random(200))
    assert len(edges) == 15 + 1, "bins of two samples on average"
    constant, edges = overlap(np.zeros(3), np.zeros(4))
    assert constant == 1
    assert math.isfinite(edges[-1])
