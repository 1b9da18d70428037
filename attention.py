"""Where to look: scores -> weights -> context. Show, Attend and Tell (Xu et al., 2015).

Two score functions (additive and dot-product), two contexts (soft and hard), and the two extra
terms of the loss (doubly stochastic attention, REINFORCE). Nothing here knows of words or files.
Paper sections 3.1.2 (weights), 4.1 (hard), 4.2 (soft). Letters: B batch, L locations, D feature
size, A attention size, H hidden, T time steps.

Several captions may look at one image (beams, samples). Then h, alpha and z have N = n * B rows, n
in turn for each image, while keys and a have their B rows: nothing is copied. Otherwise N is B.
"""
import math

import torch
from torch import nn


# ---------------------------------------------------------------- scores and weights, eq. (4), (5)
class BahdanauAttention(nn.Module):
    """Additive scores e_ti = v^T tanh(W_a a_i + W_h h_{t-1}), alpha_t = softmax(e_t): eq. (4), (5).

    The formula is that of Bahdanau et al. (2014). W_a a_i does not change from word to word, so
    `project` computes it once for each image, and in the form that `additive_score` wants.
    """

    def __init__(self, feature_dim, hidden_dim, attn_dim):
        super().__init__()
        self.W_a = nn.Linear(feature_dim, attn_dim)
        self.W_h = nn.Linear(hidden_dim, attn_dim, bias=False)
        self.v = nn.Linear(attn_dim, 1, bias=False)

    def project(self, a):
        """Annotation vectors a (B, L, D) -> keys exp(2 W_a a) (B, L, A)."""
        return ExpKeys.apply(self.W_a(a))

    def forward(self, keys, h):
        """Keys (B, L, A) and the previous hidden state h (N, H) -> weights alpha (N, L), sum 1."""
        query = self.W_h(h)  # (N, A)
        e = additive_score(keys, query, self.v.weight[0].to(query.dtype))  # (N, L)
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
        """Keys (B, L, A) and the previous hidden state h (N, H) -> weights alpha (N, L), sum 1."""
        query = self.W_h(h).view(len(keys), -1, keys.shape[2])  # (B, n, A)
        e = (query @ keys.transpose(1, 2)).flatten(0, 1) / math.sqrt(keys.shape[2])  # (N, L)
        return torch.softmax(e, dim=1, dtype=h.dtype)


# ------------------------------------------------------------------------------------- contexts
def soft_context(alpha, a):
    """Expected context z = sum_i alpha_i a_i: eq. (13). (N, L), (B, L, D) -> (N, D)."""
    return (alpha.view(len(a), -1, a.shape[1]) @ a).flatten(0, 1)


def hard_context(alpha, a, s=None, soft=None):
    """One location for each caption, s ~ Multinoulli(alpha), and its vector z = a_s: eq. (8), (9).

    alpha (N, L), a (B, L, D). s (N,) gives the locations instead of sampling them. Where `soft`
    (N,) is true, z is soft_context's instead and log p(s) is 0.
    Returns z (N, D) and log p(s) (N,).
    """
    if s is None:
        # For E_i ~ Exp(1), argmax_i alpha_i / E_i is i with probability alpha_i. torch.multinomial
        # does the same, and makes the CPU wait for the GPU.
        s = (alpha / torch.empty_like(alpha).exponential_()).argmax(dim=1)  # (N,)
    image = torch.arange(len(s), device=a.device) // (len(s) // len(a))  # of each row
    z = a[image, s]  # (N, D)
    log_p_s = alpha.gather(1, s.unsqueeze(1)).squeeze(1).log()  # (N,)
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
def additive_score(exp_keys, query, v):
    """Scores v^T tanh(key_i + query) less the sum of v: exp(2 keys), (N, A), (A,) -> (N, L).

        tanh(x) = 1 - 2 r,  r = 1 / (1 + exp(2x)),  exp(2 (key + query)) = exp(2 key) exp(2 query)

    so that no word costs an exponential for each location. The sum of v is the same for every
    location and falls out of the softmax.
    """
    exp_query = query.clamp(-40, 40).mul(2).exp().to(exp_keys.dtype)  # CUDA's autocast widens exp
    exp_query = exp_query.view(len(exp_keys), -1, 1, query.shape[1])  # (B, n, 1, A)
    by_hand = hasattr(exp_keys.grad_fn, 'total') or not exp_keys.requires_grad
    if torch.compiler.is_compiling() or not by_hand:  # a compiler does better what follows
        return -2 * ((1 + exp_keys.unsqueeze(1) * exp_query).reciprocal() @ v).flatten(0, 1)
    return AdditiveScore.apply(exp_keys, exp_query, v)


class ExpKeys(torch.autograd.Function):
    """keys -> exp(2 keys), and where AdditiveScore adds up the gradient of keys word by word.

    Autograd would write an array (B, L, A) for each word and then add it to the others.
    """

    @staticmethod
    def forward(ctx, keys):
        """Beyond 40 on either side exp(2 keys) would leave the range of float32."""
        ctx.set_materialize_grads(False)
        ctx.total = None
        exp_keys = keys.clamp(-40, 40).mul_(2).exp_()
        ctx.save_for_backward(exp_keys)
        return exp_keys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        """The gradient that came through AdditiveScore, and d that came through autograd."""
        total, ctx.total = ctx.total, None
        if d is not None:
            d = 2 * d * ctx.saved_tensors[0]
            total = d if total is None else total + d
        return total


class AdditiveScore(torch.autograd.Function):
    """-2 r v of `additive_score`, a few images at a time, so that r never leaves the CPU's cache.

    r is not kept for the backward pass but computed again. exp_keys (B, L, A), exp_query (B, n, 1,
    A), v (A,) -> (B * n, L).
    """

    @staticmethod
    def blocks(exp_keys, exp_query):
        """Slices of the images, each with r (b, n, L, A) of about 4 MB; on a GPU all at once."""
        B, L, A = exp_keys.shape
        b = max(1, 2 ** 20 // (exp_query.shape[1] * L * A)) if exp_keys.is_cpu else max(1, B)
        one = exp_keys.new_ones(())
        for i in range(0, B, b):
            block = slice(i, i + b)
            yield block, torch.addcmul(one, exp_keys[block].unsqueeze(1),
                                       exp_query[block]).reciprocal_()

    @staticmethod
    def forward(ctx, exp_keys, exp_query, v):
        """The scores (B * n, L)."""
        e = exp_keys.new_empty(*exp_query.shape[:2], exp_keys.shape[1])  # (B, n, L)
        for block, r in AdditiveScore.blocks(exp_keys, exp_query):
            torch.matmul(r, v, out=e[block])
        ctx.save_for_backward(exp_keys, exp_query, v)
        ctx.keys = exp_keys.grad_fn  # its ExpKeys
        return e.flatten(0, 1).mul_(-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, de):
        """Gradient de (B * n, L) of the scores -> that of exp_query and v; that of keys is added.

        With x = key + query: d tanh(x)/dx = 4 (r - r^2).
        """
        exp_keys, exp_query, v = ctx.saved_tensors
        B, n = exp_query.shape[:2]
        de = de.reshape(B, n, 1, -1)  # (B, n, 1, L)
        sum_r, dquery = torch.empty_like(exp_query), torch.empty_like(exp_query)
        # Not where the gradient of keys is not asked for: nobody would fetch the sum.
        learn_keys = bool(ctx.keys) and torch._C._will_engine_execute_node(ctx.keys)
        if learn_keys and ctx.keys.total is None:
            ctx.keys.total = torch.zeros_like(exp_keys)
        for block, r in AdditiveScore.blocks(exp_keys, exp_query):
            torch.matmul(de[block], r, out=sum_r[block])
            r.addcmul_(r, r, value=-1).mul_(4 * v)  # d e/dx
            torch.matmul(de[block], r, out=dquery[block])
            for j in range(n if learn_keys else 0):
                ctx.keys.total[block].addcmul_(r[:, j], de[block][:, j].transpose(1, 2))
        return None, dquery / (2 * exp_query), -2 * sum_r.sum((0, 1, 2))
