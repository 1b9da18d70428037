"""Where to look: scores -> weights -> context. Show, Attend and Tell (Xu et al., 2015).

Two score functions (additive and dot-product), two contexts (soft and hard), and the two extra
terms of the loss (doubly stochastic attention, REINFORCE). Nothing here knows of words or files.
Paper sections 3.1.2 (weights), 4.1 (hard), 4.2 (soft). Letters: B batch, L locations, D feature
size, A attention size, H hidden, T time steps.
"""
import math

import torch
from torch import nn


# ---------------------------------------------------------------- scores and weights, eq. (4), (5)
class BahdanauAttention(nn.Module):
    """Additive scores e_ti = v^T tanh(W_a a_i + W_h h_{t-1}), alpha_t = softmax(e_t): eq. (4), (5).

    The formula is that of Bahdanau et al. (2014). W_a a_i does not change from word to word, so
    `project` computes it once for each image.
    """

    def __init__(self, feature_dim, hidden_dim, attn_dim):
        super().__init__()
        self.W_a = nn.Linear(feature_dim, attn_dim)
        self.W_h = nn.Linear(hidden_dim, attn_dim, bias=False)
        self.v = nn.Linear(attn_dim, 1, bias=False)

    def project(self, a):
        """Annotation vectors a (B, L, D) -> keys W_a a (B, L, A)."""
        return self.W_a(a)

    def forward(self, keys, h):
        """Keys (B, L, A) and the previous hidden state h (B, H) -> weights alpha (B, L), sum 1."""
        query = self.W_h(h)  # (B, A)
        # tanh(keys + query.unsqueeze(1)) @ v, but for a constant that softmax removes.
        e = AdditiveScore.apply(keys, query, self.v.weight[0].to(query.dtype))  # (B, L)
        return torch.softmax(e, dim=1, dtype=h.dtype)  # as precise as h, also under autocast


class DotAttention(nn.Module):
    """Scaled dot-product scores e_ti = (W_a a_i) . (W_h h_{t-1}) / sqrt(A), alpha_t = softmax(e_t).

    The scores of Luong et al. (2015) with the scale of Vaswani et al. (2017); the paper's model is
    BahdanauAttention.
    """

    def __init__(self, feature_dim, hidden_dim, attn_dim):
        super().__init__()
        self.W_a = nn.Linear(feature_dim, attn_dim)
        self.W_h = nn.Linear(hidden_dim, attn_dim)

    def project(self, a):
        """Annotation vectors a (B, L, D) -> keys W_a a (B, L, A)."""
        return self.W_a(a)

    def forward(self, keys, h):
        """Keys (B, L, A) and the previous hidden state h (B, H) -> weights alpha (B, L), sum 1."""
        query = self.W_h(h).unsqueeze(2)  # (B, A, 1)
        e = (keys @ query).squeeze(2) / math.sqrt(keys.shape[2])  # (B, L)
        return torch.softmax(e, dim=1, dtype=h.dtype)


# ------------------------------------------------------------------------------------- contexts
def soft_context(alpha, a):
    """Expected context z = sum_i alpha_i a_i: eq. (13). (B, L), (B, L, D) -> (B, D)."""
    return (alpha.unsqueeze(1) @ a).squeeze(1)


def hard_context(alpha, a, s=None, soft=None):
    """One location for each caption, s ~ Multinoulli(alpha), and its vector z = a_s: eq. (8), (9).

    alpha (B, L), a (B, L, D). s (B,) gives the locations instead of sampling them. Where `soft`
    (B,) is true, z is soft_context's instead and log p(s) is 0.
    Returns z (B, D) and log p(s) (B,).
    """
    if s is None:
        # For E_i ~ Exp(1), argmax_i alpha_i / E_i is i with probability alpha_i. torch.multinomial
        # does the same, and makes the CPU wait for the GPU.
        s = (alpha / torch.empty_like(alpha).exponential_()).argmax(dim=1)  # (B,)
    z = a[torch.arange(len(a), device=a.device), s]  # (B, D)
    log_p_s = alpha.gather(1, s.unsqueeze(1)).squeeze(1).log()  # (B,)
    if soft is not None:
        z = torch.where(soft.unsqueeze(1), soft_context(alpha, a), z)
        log_p_s = log_p_s.masked_fill(soft, 0.0)
    return z, log_p_s


# ------------------------------------------------------------------------- terms of the loss
def doubly_stochastic(alphas):
    """How far each location's weights are from summing to 1 over the words: eq. (14).

    Over the locations they sum to 1 by themselves: hence doubly stochastic.
    alphas (B, T, L) -> sum_i (1 - sum_t alpha_ti)^2 for each caption, (B,).
    """
    return (1.0 - alphas.sum(dim=1)).square().sum(dim=1)


def entropy(alphas):
    """Entropy of the weights in nats, summed over the time steps. (B, T, L) -> H[alpha] (B,)."""
    tiny = torch.finfo(alphas.dtype).tiny  # a weight that underflowed to 0 adds 0, not NaN
    return -(alphas * alphas.clamp_min(tiny).log()).sum(dim=(1, 2))


def reinforce_loss(log_p_y, log_p_s, alphas, baseline, lambda_r=1.0, lambda_h=0.0):
    """Loss (B,) for sampled locations; its gradient is minus the estimate of eq. (11), (12).

    No gradient flows through a sample. Instead log p(s | a) is weighted by how much likelier than
    usual (the baseline) the words were after these looks: looks that helped become likelier.

    log_p_y (B,) is log p(y | s, a) summed over the words, log_p_s (B,) is log p(s | a) summed over
    the steps, 0 for captions that took the expectation: they have no REINFORCE term, and the
    gradient reaches their weights through z. alphas (B, T, L) are the attention weights.
    baseline is a number or a tensor (B,) that does not depend on this caption's samples.
    """
    advantage = (log_p_y - baseline).detach()
    return -(log_p_y                            # better words
             + lambda_r * advantage * log_p_s   # looks that led to better words become likelier
             + lambda_h * entropy(alphas))      # the choice stays open


# ------------------------------------------------------------ additive scores, computed fast
class AdditiveScore(torch.autograd.Function):
    """2 v^T sigmoid(2 (key_i + query)): the scores v^T tanh(key_i + query) plus the sum of v.

    tanh(x) = 2 sigmoid(2x) - 1, and the sum of v, the same for every location, falls out of the
    softmax. torch's sigmoid is several times faster on a CPU than its tanh, and a gradient by hand
    goes over an array (B, L, A) less often and works in the one that the forward pass keeps for
    each word: with 196 locations a training step takes 0.8 to 0.9 of the time. keys (B, L, A),
    query (B, A), v (A,) -> (B, L).
    """

    @staticmethod
    def forward(ctx, keys, query, v):
        """The scores (B, L)."""
        sigma = torch.add(2 * query.unsqueeze(1), keys, alpha=2).sigmoid_()  # (B, L, A)
        ctx.save_for_backward(sigma, v)
        return 2 * (sigma @ v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, de):
        """Gradient de (B, L) of the scores -> those of keys, query and v."""
        sigma, v = ctx.saved_tensors
        dv = 2 * (de.flatten() @ sigma.flatten(0, 1))
        # d(2 sigma(2x))/dx = 4 (sigma - sigma^2)
        dx = sigma.addcmul_(sigma, sigma, value=-1).mul_(4 * v).mul_(de.unsqueeze(2))
        return dx, dx.sum(dim=1), dv
