"""Muon for the hidden matrices, AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of
every matrix with a quintic Newton-Schulz iteration. Matrices of one shape go through it as a batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Returns roughly the nearest semi-orthogonal matrices to matrices [N, rows, cols] with rows <= cols."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """The Muon optimiser. A stacked parameter is split into its matrices, each of which is updated by itself.

    lr is the spectral norm of an update of a square matrix.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])  # Nesterov
                for weight, matrix in zip(self._matrices(p), self._matrices(update)):
                    by_shape[min(matrix.shape), max(matrix.shape)].append((weight, matrix))
                p.mul_(1 - group["lr"] * group["weight_decay"])
            for pairs in by_shape.values():
                wide = torch.stack([m if m.shape[0] <= m.shape[1] else m.t() for _, m in pairs])
                for (weight, matrix), result in zip(pairs, orthogonalise(wide)):
                    result = result if matrix.shape[0] <= matrix.shape[1] else result.t()
                    scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                    weight.add_(result, alpha=-group["lr"] * scale)

    @staticmethod
    def _matrices(p: Tensor) -> list[Tensor]:
        """Returns the matrices of a parameter: itself, or one for each expert of a stack, two where gate and up
        projections are stacked."""
        if p.dim() == 2:
            return [p]
        if p.shape[1] < p.shape[2]:  # gate_up [E, 2I, H]
            return [half for w in p for half in w.chunk(2)]
        return list(p)
