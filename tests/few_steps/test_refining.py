"""Weights of all steps together: derivatives against those of autograd, and the end against the first fit's."""

import torch

from ddpm_hf.few_steps.refining import Ends, chain_of, normal_equations, refine_weights
from ddpm_hf.few_steps.trajectories import fit_weights, follow
from ddpm_hf.portable.multistep_ddpm_hf import EpsilonMultistepScheduler, karras_timesteps

BATCH = 7


def two_points(clip_sample=False):
    """A sampler, the exact network of data at -0.8 and 0.5 in each dimension, x_T, and where the flow ends."""
    scheduler = EpsilonMultistepScheduler(300, beta_end=0.06, clip_sample=clip_sample)
    alpha_bar = scheduler.diffusion.exact_tables.alphas_cumprod
    points = torch.tensor([-0.8, 0.5], dtype=torch.float64)

    def predict(x_t, t):
        a = alpha_bar[int(t[0])]
        width = a * 0.01 + 1 - a  # each is a Gaussian of variance 0.01
        logits = -((x_t[..., None] - a.sqrt() * points) ** 2) / (2 * width)
        means = a.sqrt() * points + 0 * x_t[..., None]
        score = (logits.softmax(-1) * (means - x_t[..., None])).sum(-1) / width
        return -score * (1 - a).sqrt()

    noise = torch.randn(24, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = follow(predict, scheduler, noise, karras_timesteps(scheduler.diffusion, 80), BATCH)
    return scheduler, predict, noise, teacher


def start(timesteps, **options):
    scheduler, predict, noise, teacher = two_points(**options)
    ends = Ends(predict, scheduler, chain_of(scheduler, timesteps), noise, teacher.states[-1], BATCH)
    targets = teacher.at([*timesteps[1:], -1])
    return ends, fit_weights(predict, scheduler, noise, timesteps, targets, BATCH)


def loss_of(ends, weights):
    return ends.loss(ends.differences(ends.follow(weights, ends.start, [])[0][-1]))


def chosen(number):
    teacher = two_points()[-1]
    return [teacher.timesteps[node * 80 // number] for node in range(number)]


def test_the_derivatives_are_those_of_the_whole_chain():
    """Else the method goes where the loss does not fall: autograd through the network gives the same gradient."""
    ends, weights = start(chosen(4))
    states, epsilons = ends.follow(weights, ends.start, [])
    matrix, gradient = normal_equations(ends.jacobian(weights, states, epsilons), ends.differences(states[-1]))
    sizes = [len(row) for row in weights]
    values = torch.tensor([one for row in weights for one in row], dtype=torch.float64)

    def distances(values):
        state, epsilons = ends.start, []
        for step, row in enumerate(values.split(sizes)):
            epsilons.append(ends.epsilon(step, state))
            size = ends.chain.rhos[step + 1] - ends.chain.rhos[step]
            state = state + size * sum(weight * epsilon for weight, epsilon in zip(row, reversed(epsilons)))
        return (state - ends.targets).flatten(1)

    jacobian = torch.autograd.functional.jacobian(distances, values)  # [M, D, P]
    base = distances(values)
    importance = 1 / base.norm(dim=1)
    torch.testing.assert_close(gradient, torch.einsum("mdp,md,m->p", jacobian, base, importance), rtol=0.02, atol=1e-3)
    exact = torch.einsum("mdp,mdq,m->pq", jacobian, jacobian, importance)
    torch.testing.assert_close(matrix, exact, rtol=0.02, atol=0.02 * exact.diagonal().max().item())


def test_the_refined_weights_are_a_minimum():
    """Else more could be had: the loss is far below that of the first fit, and rises in every direction."""
    ends, weights = start(chosen(4))
    refined = refine_weights(ends, weights)
    least = loss_of(ends, refined)
    assert least < 0.7 * loss_of(ends, weights)
    for step, row in enumerate(refined):
        for index in range(len(row)):
            for change in (-0.03, 0.03):
                moved = [list(one) for one in refined]
                moved[step][index] += change
                assert loss_of(ends, moved) > least - 1e-4


def test_what_is_clipped_does_not_count():
    """Else the fit spends its weights on what no image shows: a pixel beyond white is white."""
    ends, _ = start(chosen(3), clip_sample=True)
    far = ends.targets * 3
    ends.targets = ends.targets.sign()
    assert ends.loss(ends.differences(far.sign() * 5)) == 0
    free, _ = start(chosen(3))
    assert free.loss(free.differences(far)) > 0


def test_batches_do_not_matter():
    """Else a fit depends on --batch-size."""
    ends, weights = start(chosen(3))
    expected = ends.follow(weights, ends.start, [])[0][-1]
    ends.batch_size = 100
    torch.testing.assert_close(ends.follow(weights, ends.start, [])[0][-1], expected, rtol=1e-12, atol=1e-12)
    reached = follow(
        ends.predict, ends.scheduler, ends.start * ends.chain.signals[0], ends.chain.timesteps, 5, weights
    )
    torch.testing.assert_close(reached.states[-1], expected, rtol=1e-9, atol=1e-9)
