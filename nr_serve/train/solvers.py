"""How a gate's direction is found: convex problems on the inputs of tokens of two kinds, with their solutions.

Shape suffixes: T tokens, d width of the stream, e = d + 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 2048
NEWTON_STEPS = 20
CURVATURE = 0.99
"""Share of the loss's curvature that a Newton step takes into account."""


def solve_ridge(u_Td: Tensor, y_T: Tensor, weight_T: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """w [d] and b [] that minimise sum_t weight_t (w · u_t + b - y_t)^2 + ridge v |w|^2, in float64.

    v is the mean weighted variance of a feature; weights are normalised to sum to 1. The bias is not penalised. If
    y has two values, this is Fisher's linear discriminant with shrinkage.
    """
    d = u_Td.shape[1]
    total = weight_T.double().sum()
    moment_dd = u_Td.new_zeros(d, d, dtype=torch.float64)
    cross_d, mean_d = moment_dd.new_zeros(d), moment_dd.new_zeros(d)
    for u, y, weight in zip(*(torch.split(t, CHUNK_TOKENS) for t in (u_Td, y_T, weight_T)), strict=True):
        u, weight = u.double(), weight.double() / total
        weighted = u * weight[:, None]
        moment_dd += weighted.T @ u
        cross_d += weighted.T @ y.double()
        mean_d += weighted.sum(0)
    mean_y = (y_T.double() * weight_T.double()).sum() / total
    covariance_dd = moment_dd - torch.outer(mean_d, mean_d)
    penalty_dd = ridge * covariance_dd.diagonal().mean() * torch.eye(d, dtype=torch.float64, device=u_Td.device)
    w_d = torch.linalg.solve(covariance_dd + penalty_dd, cross_d - mean_d * mean_y)
    return w_d, mean_y - w_d @ mean_d


def solve_logistic(u_Td: Tensor, y_T: Tensor, weight_T: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """w [d] and b [] that minimise sum_t weight_t CE(sigmoid(w · u_t + b), y_t) + ridge v |w|^2 / 2.

    v is the mean weighted variance of a feature; weights are normalised to sum to 1; y is 0 or 1. The problem is
    convex and is solved by Newton's method with step halving (iteratively reweighted least squares: Hastie,
    Tibshirani, Friedman, "The Elements of Statistical Learning", section 4.4.1). Unlike least squares, it does not
    penalise tokens that are already far on the right side: the easily confused tokens decide the direction.
    """
    p_T = (weight_T / weight_T.sum()).float()
    y_T = y_T.float()
    mean_d = p_T @ u_Td.float()
    x_Te = torch.ones(len(u_Td), u_Td.shape[1] + 1, device=u_Td.device)
    x_Td = torch.sub(u_Td.float(), mean_d, out=x_Te[:, :-1])
    parts = zip(torch.split(x_Td, CHUNK_TOKENS), torch.split(p_T, CHUNK_TOKENS), strict=True)
    variance_d = torch.stack([p @ x.square() for x, p in parts]).sum(0)
    scale = variance_d.mean().sqrt()
    x_Td /= scale
    v_e = torch.zeros_like(x_Te[0])
    for every in (8, 1):  # most steps use an eighth of the tokens, the last few use all
        v_e = _newton(x_Te[::every], y_T[::every], p_T[::every] / p_T[::every].sum(), ridge, v_e)
    w_d = v_e[:-1].double() / scale
    return w_d, v_e[-1].double() - w_d @ mean_d.double()


def _newton(x_Te: Tensor, y_T: Tensor, p_T: Tensor, ridge: float, v_e: Tensor) -> Tensor:
    """From v_e, the minimum of sum_t p_t CE(sigmoid(x_t · v), y_t) + ridge |v|^2 / 2; v's last is unpenalised."""
    penalty_e = torch.full_like(v_e, ridge)
    penalty_e[-1] = 0.0
    floor_ee = 1e-12 * torch.eye(len(v_e), dtype=torch.float64, device=v_e.device)

    def loss(z_T: Tensor, v_e: Tensor) -> float:
        return float((p_T * (F.softplus(z_T) - y_T * z_T)).sum() + 0.5 * (penalty_e * v_e * v_e).sum())

    z_T = x_Te @ v_e
    now = loss(z_T, v_e)
    for _ in range(NEWTON_STEPS):
        chance_T = torch.sigmoid(z_T)
        slope_e = (p_T * (chance_T - y_T)) @ x_Te + penalty_e * v_e
        curve_ee = _curvature(x_Te, p_T * chance_T * (1 - chance_T)) + penalty_e.diag()
        step_e = torch.linalg.solve(curve_ee.double() + floor_ee, slope_e.double()).float()
        moved_T, size = x_Te @ step_e, 1.0
        while (then := loss(z_T - size * moved_T, v_e - size * step_e)) > now and size > 1e-3:
            size /= 2
        if then >= now:
            break
        v_e, z_T, gain, now = v_e - size * step_e, z_T - size * moved_T, now - then, then
        if gain < 1e-6 * now:
            break
    return v_e


def _curvature(x_Te: Tensor, bend_T: Tensor) -> Tensor:
    """The sum of bend_t x_t x_t^T, [e, e], over the tokens that have CURVATURE of the total bend.

    The other tokens, about three quarters, are so far on their side that they hardly curve the loss. The gradient
    uses all tokens, so the minimum does not change.
    """
    most_T, order_T = bend_T.sort(descending=True)
    count = int(torch.searchsorted(most_T.cumsum(0), CURVATURE * most_T.sum())) + 1
    curve_ee = x_Te.new_zeros(x_Te.shape[1], x_Te.shape[1])
    # In parts, whose memory is used again: the system takes as long to hand out new pages as a product takes.
    for order, bend in zip(*(torch.split(t[:count], CHUNK_TOKENS) for t in (order_T, most_T)), strict=True):
        part_Te = x_Te[order]
        curve_ee += (part_Te * bend[:, None]).T @ part_Te
    return curve_ee


SOLVERS = {"closed-form": solve_ridge, "logistic": solve_logistic}
"""Solvers, by the recipe's name for them."""
