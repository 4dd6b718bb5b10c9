"""``--mechanism as-released``: what authors' released code does in place of private training. It guarantees nothing.

It is here so that papers can be reproduced, and so that anyone can see what honest privacy costs beside it. Read from
the code of LA-LoRA (github.com/junkangLiu0/LA-LORA) and DEeR (github.com/CUHK-AIM-Group/DEeR); written anew.
"""

import statistics
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_dp.fed.data.examples import Examples
from lora_dp.fed.methods import LALoRA, Method, State, factor
from lora_dp.fed.models.task_losses import task_losses
from lora_dp.fed.rounds.local_training import LocalTraining
from lora_dp.fed.rounds.messages import Task
from lora_dp.fed.rounds.privacy_plan import PrivacyPlan
from lora_dp.fed.rounds.regulators import regulators
from lora_dp.privacy.accounting import calibrate_noise_multiplier
from lora_dp.privacy.filtering import make_filter

# Above which LA-LoRA's code does not raise its clip bound.
LARGEST_BOUND = 0.4
WEIGHT_DECAY = {"sgd": 0.001, "adamw": 0.01}


def replaces_training(method: Method) -> bool:
    """Whether the released code perturbs each local step (LA-LoRA), rather than the whole update (DEeR)."""
    return isinstance(method, LALoRA)


def claimed_noise_multiplier(plan: PrivacyPlan, method: Method) -> float:
    """σ for an ε that is not kept.

    DEeR's code composes minibatch steps over the examples of all clients together, though it perturbs once a turn.
    LA-LoRA's runs no accountant: σ is an option, 0.2 by default. In its place stands what federated code of this kind
    often does, one event a round at the clients' sample rate, though noise is added at every local step.
    """
    assert plan.epsilon is not None
    if replaces_training(method):
        rate, steps = plan.client_rate, plan.rounds
    else:
        rate, steps = min(1.0, plan.batch_size / plan.examples), plan.rounds * plan.steps * plan.clients
    return calibrate_noise_multiplier(plan.epsilon, plan.delta, rate, steps, plan.accountant)


def train_la_lora(
    model: nn.Module,
    training: LocalTraining,
    plan: PrivacyPlan,
    method: Method,
    examples: Examples,
    on_step: Callable[[], None],
) -> None:
    """LA-LoRA's local steps, A and B by turns: the *batch* gradient of each tensor is clipped at the median of the
    tensors' norms (at most 0.4) and noised in proportion to that bound; what the filter leaves of it moves the factor
    in a step of its own, before the optimizer's with all of it; weights decay; batches are shuffled."""
    noise_multiplier = claimed_noise_multiplier(plan, method)
    device = next(model.parameters()).device
    model.train()
    optimizer, low_pass = training.make_optimizer(model), make_filter(training.low_pass, training.low_pass_strength)
    for group in optimizer.param_groups:
        group["weight_decay"] = WEIGHT_DECAY[training.optimizer]
    batch_size = min(training.batch_size, len(examples))
    parameters, step = dict(model.named_parameters()), 0
    while step < training.local_steps:
        for batch in DataLoader(examples, batch_size, shuffle=True, collate_fn=examples.collate):
            if step == training.local_steps:
                break
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            optimizer.zero_grad()
            task_losses(model, batch, training.precision).mean().backward()
            trained = "AB"[step % 2]
            gradients = {}
            for name, parameter in parameters.items():
                if factor(name) not in (None, trained):
                    parameter.grad = None
                elif parameter.grad is not None:
                    gradients[name] = parameter.grad
            bound = min(statistics.median(float(g.norm()) for g in gradients.values()), LARGEST_BOUND)
            for name, gradient in gradients.items():
                gradient.mul_(min(1.0, bound / max(float(gradient.norm()), 1e-30)))
                gradient.add_(torch.randn_like(gradient), alpha=noise_multiplier * bound / batch_size)
                if low_pass is not None and factor(name) is not None:
                    parameters[name].data.add_(low_pass(gradient), alpha=-training.learning_rate)
            optimizer.step()
            step += 1
            on_step()


def noised_deer_update(plan: PrivacyPlan, method: Method, trained: State, task: Task) -> State:
    """DEeR's update: the change of each *tensor* is clipped by itself, in the plain norm, and noised once with noise in
    the weight's shape mapped back onto the factor, its deviation divided by √clients; the head is left as it is."""
    noise_multiplier = claimed_noise_multiplier(plan, method)
    deviation = noise_multiplier * plan.max_update_norm / plan.clients**0.5
    rules = regulators(method, task.state, task.round, task.turn)
    noised = dict(trained)
    for name, rule in rules.items():
        change = trained[name] - task.state[name]
        change = change * min(1.0, plan.max_update_norm / max(float(change.norm()), 1e-30))
        noise = rule.restored(torch.randn_like(change) * deviation)
        noised[name] = task.state[name] + change + noise
    return noised
