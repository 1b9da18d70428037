"""Where to look: scores -> weights -> context. Show, Attend and Tell (Xu et al., 2015).

BahdanauAttention, DotAttention   scores and weights, paper section 3.1.2
soft_context, doubly_stochastic   soft attention and its extra term of the loss, section 4.2
hard_context, reinforce_loss      hard attention and its loss, section 4.1

Shapes: B images, L locations, D features, A attention size, H hidden size, T words; model.py lists
every letter. Several beams may share an image. Then h, alpha and z have N = n * B rows, n
consecutive ones for each image, while keys and a keep their B rows: nothing is copied. Otherwise
N = B. All captions of a batch have the same length, so no step is padding.
"""
import torch
from torch import nn


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
        """Keys (B, L, A) and the previous hidden state h (N, H) -> weights alpha (N, L), sum 1."""
        B, L, A = keys.shape
        query = self.W_h(h).view(B, -1, 1, A)  # (B, n, 1, A)
        e = self.v(torch.tanh(keys.unsqueeze(1) + query))  # (B, n, L, 1), eq. (4)
        # Under autocast e has 16 bits; the weights must be as precise as h.
        return torch.softmax(e.view(-1, L), dim=1, dtype=h.dtype)  # (N, L), eq. (5)


class DotAttention(nn.Module):
    """Scaled dot-product scores e_ti = (W_a a_i) . (W_h h_{t-1}) / sqrt(A), alpha_t = softmax(e_t).

    The scores of Luong et al. (2015) with the scale of Vaswani et al. (2017); the paper's model is
    BahdanauAttention.
    """

    def __init__(self, feature_dim, hidden_dim, attn_dim):
        super().__init__()
        self.W_a = nn.Linear(feature_dim, attn_dim, bias=False)  # softmax would cancel its bias
        self.W_h = nn.Linear(hidden_dim, attn_dim)

    def project(self, a):
        """As BahdanauAttention.project."""
        return self.W_a(a)

    def forward(self, keys, h):
        """Keys (B, L, A) and the previous hidden state h (N, H) -> weights alpha (N, L), sum 1."""
        B, L, A = keys.shape
        query = self.W_h(h).view(B, -1, A)  # (B, n, A)
        e = query @ keys.transpose(1, 2) / A ** 0.5  # (B, n, L)
        return torch.softmax(e.flatten(0, 1), dim=1, dtype=h.dtype)  # (N, L)


def soft_context(alpha, a):
    """Expected context z = sum_i alpha_i a_i: eq. (13). (N, L), (B, L, D) -> (N, D)."""
    B, L, D = a.shape
    z = alpha.view(B, -1, L) @ a  # (B, n, D)
    return z.view(-1, D)  # (N, D)


def hard_context(alpha, a, s=None, sampled=None):
    """One location for each row, s ~ Multinoulli(alpha), and its vector z = a_s: eq. (8), (9).

    alpha (N, L), a (B, L, D). If s (N,) is given, those are the locations; otherwise they are
    drawn. Where `sampled` (N,) is false, z is soft_context's expectation instead and log p(s) is 0,
    as for half of the captions in section 4.1: it lowers the variance of the gradient.
    Returns z (N, D) and log p(s) (N,).
    """
    if s is None:
        # With noise_i ~ Exp(1), argmax_i alpha_i / noise_i is location i with probability alpha_i.
        # torch.multinomial does the same but makes the CPU wait for the GPU. The clamp rules out
        # 0 / 0.
        noise = torch.empty_like(alpha).exponential_().clamp_min_(torch.finfo(alpha.dtype).tiny)
        s = (alpha / noise).argmax(dim=1)  # (N,)
    rows_per_image = len(s) // len(a)
    image = torch.arange(len(s), device=a.device) // rows_per_image  # the image of each row, (N,)
    z = a[image, s]  # (N, D)
    log_p_s = alpha.gather(1, s.unsqueeze(1)).squeeze(1).log()  # (N,)
    if sampled is not None:
        z = torch.where(sampled.unsqueeze(1), z, soft_context(alpha, a))
        log_p_s = log_p_s.masked_fill(~sampled, 0.0)
    return z, log_p_s


def doubly_stochastic(alphas):
    """How far each location's weights are from summing to 1 over the words: eq. (14).

    The softmax makes them sum to 1 over the locations; hence "doubly".
    alphas (N, T, L) -> sum_i (1 - sum_t alpha_ti)^2 for each caption, (N,).
    """
    return (1.0 - alphas.sum(dim=1)).square().sum(dim=1)


def entropy(alphas):
    """Entropy of the weights in nats, summed over the time steps. (N, T, L) -> H[alpha] (N,)."""
    tiny = torch.finfo(alphas.dtype).tiny  # a weight that underflowed to 0 adds 0, not NaN
    return -(alphas * alphas.clamp_min(tiny).log()).sum(dim=(1, 2))


def reinforce_loss(log_p_y, log_p_s, alphas, baseline, lambda_r=1.0, lambda_h=0.0):
    """Loss (N,) for sampled locations, whose gradient is that of eq. (11), (12) with baseline b:

        -( log p(y | s, a) + lambda_r (log p(y | s, a) - b) log p(s | a) + lambda_h H[alpha] )

    No gradient flows through a sample. Instead log p(s | a) is multiplied by the advantage, held
    constant: how much likelier the words were after these looks than usual. Looks that helped
    become likelier, and every look is credited with the whole caption.

    log_p_y (N,) is log p(y | s, a) summed over the words, log_p_s (N,) log p(s | a) summed over the
    steps. Captions that took the expectation have log_p_s = 0, hence no REINFORCE term: their alpha
    learns through z. alphas (N, T, L) are the attention weights. baseline, a number or (N,), must
    not depend on this caption's own samples, or the gradient is biased.
    """
    advantage = (log_p_y - baseline).detach()
    return -(log_p_y                            # better words
             + lambda_r * advantage * log_p_s   # looks that led to better words become likelier
             + lambda_h * entropy(alphas))      # the choice stays open
