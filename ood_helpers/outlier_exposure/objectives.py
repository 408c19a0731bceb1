"""The losses of outlier exposure, and the training steps of DOE.

Sources: Hendrycks et al., "Deep Anomaly Detection with Outlier Exposure", ICLR 2019, arXiv 1812.04606; Liu et al.,
"Energy-based Out-of-distribution Detection", NeurIPS 2020, arXiv 2010.03759; Wang et al., "Out-of-distribution Detection
with Implicit Outlier Transformation" (DOE), ICLR 2023, arXiv 2303.05033.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ood_helpers.outlier_exposure.recipe import DOEObjective, EnergyObjective

Batch = tuple[Tensor, Tensor, Tensor]
Losses = Callable[[nn.Module, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]


def uniform_cross_entropy(logits: Tensor) -> Tensor:
    """Cross-entropy to the uniform distribution over the outputs, logsumexp(o) - mean_c o_c: logits o [N, C] -> [N].

    At least log C. Source: Hendrycks et al., arXiv 1812.04606.
    """
    return logits.logsumexp(dim=1) - logits.mean(dim=1)


def energy_margin_losses(
    id_logits: Tensor, outlier_logits: Tensor, margins: EnergyObjective
) -> tuple[Tensor, Tensor]:
    """Squared hinges of the energy E(z) = -logsumexp(z), both scalars, at least 0.

    inside = mean relu(E - m_in)^2 of the ID logits [N, C], outside = mean relu(m_out - E)^2 of the outliers' [M, C].

    Source: Liu et al., arXiv 2010.03759.
    """
    inside = F.relu(-id_logits.logsumexp(dim=1) - margins.inside).square().mean()
    outside = F.relu(margins.outside + outlier_logits.logsumexp(dim=1)).square().mean()
    return inside, outside


def scaling_penalty(logits: Tensor) -> Tensor:
    """Squared derivative at s = 1 of the mean of mean_c(s o_c) - logsumexp(s o), a scalar, of outliers' logits o [N, C].

    The derivative is mean_c o_c - sum_c softmax(o)_c o_c. Source: Wang et al. (DOE), arXiv 2303.05033.
    """
    return (logits.mean(dim=1) - (logits.softmax(dim=1) * logits).sum(dim=1)).mean().square()


def direction(weight: Tensor, change: Tensor) -> Tensor:
    """A change of a weight tensor, scaled to the tensor's norm: ||w|| / (||change|| + 1e-20) change."""
    return weight.norm() / (change.norm() + 1e-20) * change


class DOE:
    """The training steps of distributional-agnostic outlier exposure (DOE).

    In the first `unperturbed_epochs` a step descends c + weight U, with c the loss of the ID images and U that of the
    outliers. Afterwards each batch makes two steps, with gamma drawn anew from `strengths`:

    1. A copy of the network without dropout makes one SGD step of learning rate 1 down the `scaling_penalty` of the
       outliers. Its change of each weight tensor of two or more dimensions gives a `direction`, and those a running mean D.
    2. One step down weight U alone, whose gradient is taken at the weights + gamma D (and with it the statistics of batch
       norm move).
    3. One step down c alone.

    All gradients are clipped to `max_norm`; those of the copy are its own, without momentum from earlier batches (in the
    public code those of the network are clipped in their place, and the momentum is kept). Weight decay acts in all three.

    Parameters
    ----------
    losses : (network, batch) -> c, U, values to log
    weight_decay : of the copy's step

    Attributes
    ----------
    epoch : from 1, to be set before an epoch's first step
    directions : D by the name of the parameter, empty before the first perturbed step; all that it remembers

    Source: Wang et al., "Out-of-distribution Detection with Implicit Outlier Transformation", arXiv 2303.05033.
    """

    def __init__(self, objective: DOEObjective, losses: Losses, weight_decay: float) -> None:
        self.objective, self.losses, self.weight_decay = objective, losses, weight_decay
        self.epoch = 1
        self.directions: dict[str, Tensor] = {}

    def step(
        self, network: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Train on a batch (images [B, 3, h, w], labels [B], outliers [M, 3, h, w]): c + weight U and values to log."""
        if self.epoch <= self.objective.unperturbed_epochs:
            id_loss, outlier_loss, values = self.losses(network, batch)
            loss = id_loss + self.objective.weight * outlier_loss
            self._descend(loss, optimizer)
            return loss, values
        self._update_directions(network, batch)
        strength = self.objective.strengths[int(torch.randint(len(self.objective.strengths), ()))]
        self._move(network, strength)
        _, outlier_loss, _ = self.losses(network, batch)
        self._descend(self.objective.weight * outlier_loss, optimizer)
        self._move(network, -strength)
        id_loss, _, values = self.losses(network, batch)
        self._descend(id_loss, optimizer)
        return id_loss + self.objective.weight * outlier_loss, {
            **values,
            "outlier_loss": outlier_loss.detach(),
        }

    def _descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.objective.max_norm)
        optimizer.step()

    def _update_directions(self, network: nn.Module, batch: Batch) -> None:
        """Step 1, without a copy: the gradient at the network's own weights says how the copy would change."""
        images, _, outliers = batch
        parameters = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        # Copies of the statistics of batch norm take the pass's changes.
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        dropouts = [module for module in network.modules() if isinstance(module, nn.Dropout)]
        for module in dropouts:
            module.eval()
        logits = torch.func.functional_call(network, buffers, (torch.cat([images, outliers]),))
        for module in dropouts:
            module.train()
        penalty = scaling_penalty(logits[len(images) :])
        gradients = torch.autograd.grad(penalty, list(parameters.values()))
        norm = nn.utils.get_total_norm(gradients)
        scale = (self.objective.max_norm / (norm + 1e-6)).clamp(max=1)  # as clip_grad_norm_
        for (name, weight), gradient in zip(parameters.items(), gradients, strict=True):
            if weight.ndim >= 2:
                weight = weight.detach()
                new = direction(weight, -(scale * gradient + self.weight_decay * weight))
                old = self.directions.get(name, new).to(new)
                self.directions[name] = self.objective.kept * old + (1 - self.objective.kept) * new

    @torch.no_grad()
    def _move(self, network: nn.Module, strength: float) -> None:
        for name, change in self.directions.items():
            network.get_parameter(name).add_(change, alpha=strength)
