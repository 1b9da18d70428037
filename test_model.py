"""Tests: each compares the code with something that is not the code.

    python -m pytest -q test_model.py

Comparisons are with torch's own cells, NLTK, coco-caption's output, sums over all possibilities,
and test_golden.npz: numbers from the authors' own Theano program (float32; theirs are row vectors,
gates in the order i, f, o, g, word 0 is <eos>, and the first word's vector is zero).
"""
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import md5, sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import bleu_meteor
import data
import train
from attention import (BahdanauAttention, DotAttention, ExpKeys, additive_score,
                       doubly_stochastic, entropy, hard_context, reinforce_loss, soft_context)
from bleu_meteor import bleu, human_score, meteor, tokenize
from data import END, PAD, START, UNK, UserError, Vocabulary
from model import (Captioner, CaptionerConfig, Encoder, LSTMCell, RNNCell, load_checkpoint,
                   save_checkpoint)
from sample import PANEL, attention_map, draw_attention
from train import Settings, batch_loss

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / 'shared'
torch.set_num_threads(1)  # the models here are so small that more threads only wait
needs_shared = pytest.mark.skipif(not (SHARED / 'encoders').is_dir(),
                                  reason=f'needs the folder {SHARED} with data and an encoder')


def tiny_captioner(V=9, D=5, seed=0, scale=3.0, **config):
    """A small captioner in evaluation mode whose random weights are large enough to matter."""
    torch.manual_seed(seed)
    sizes = dict(embed_dim=6, hidden_dim=7, attn_dim=4, dropout=0.5) | config
    captioner = Captioner(CaptionerConfig(V, D, **sizes)).eval()
    with torch.no_grad():
        for weight in captioner.parameters():
            weight.mul_(scale)
    return captioner


# ------------------------------------------------------------------------- cells and attention
@pytest.mark.parametrize('ours, theirs, order', [
    (LSTMCell, nn.LSTMCell, (0, 1, 3, 2)),  # torch orders the gates i, f, g, o
    (RNNCell, nn.RNNCell, (0,))])
def test_cells_equal_torch_in_outputs_and_gradients(ours, theirs, order):
    torch.manual_seed(0)
    X, H = 5, 7
    cell, reference = ours(X, H).double(), theirs(X, H).double()

    def reorder(weight):  # our gate order -> torch's
        return torch.cat([weight.chunk(len(order))[i] for i in order])
    with torch.no_grad():
        reference.weight_ih.copy_(reorder(cell.W.weight))
        reference.bias_ih.copy_(reorder(cell.W.bias))
        reference.weight_hh.copy_(reorder(cell.U.weight))
        reference.bias_hh.zero_()
    x, h, c = torch.randn(3, X).double(), torch.randn(3, H).double(), torch.randn(3, H).double()
    state = cell(x, cell(x, (h, c)))
    if ours is LSTMCell:
        expected = reference(x, reference(x, (h, c)))
    else:
        expected = (reference(x, reference(x, h)), c)
    torch.testing.assert_close(tuple(state), tuple(expected))
    (state[0].sin().sum() + state[1].sum()).backward()
    (expected[0].sin().sum() + expected[1].sum()).backward()
    torch.testing.assert_close(reorder(cell.W.weight.grad), reference.weight_ih.grad)
    torch.testing.assert_close(reorder(cell.W.bias.grad), reference.bias_ih.grad)
    torch.testing.assert_close(reorder(cell.U.weight.grad), reference.weight_hh.grad)


def test_additive_attention_is_bahdanaus_formula():
    torch.manual_seed(0)
    attention, a, h = BahdanauAttention(5, 7, 4), torch.randn(2, 3, 5), torch.randn(2, 7)
    alpha = attention(attention.project(a), h).detach()
    for b in range(2):
        query = attention.W_h.weight @ h[b]
        keys = [attention.W_a.weight @ a[b, i] + attention.W_a.bias for i in range(3)]
        e = [(attention.v.weight[0] @ torch.tanh(key + query)).item() for key in keys]
        total = sum(math.exp(x) for x in e)
        for i in range(3):
            assert float(alpha[b, i]) == pytest.approx(math.exp(e[i]) / total, abs=1e-6)


@pytest.mark.parametrize('n', [1, 2])  # captions that look at one image
def test_additive_attentions_gradient_by_hand_equals_autograds(n):
    """Over two words, and with arrays so large that images are scored one after the other."""
    torch.manual_seed(0)
    B, L, A = 3, 600, 1000
    attention = BahdanauAttention(5, 7, A).double()
    a = torch.randn(B, L, 5).double()
    hs = [torch.randn(n * B, 7).double().requires_grad_() for _ in range(2)]
    weights, pull = [*hs, *attention.parameters()], torch.randn(n * B, L).double()

    def gradient(alphas):
        return torch.autograd.grad(((alphas[0] + 2 * alphas[1]) * pull).sum(), weights)
    e = [attention.v(torch.tanh(attention.W_a(a).repeat_interleave(n, dim=0)
                                + attention.W_h(h).unsqueeze(1))).squeeze(2) for h in hs]
    expected = [torch.softmax(x, dim=1) for x in e]
    keys = attention.project(a)
    alphas = [attention(keys, h) for h in hs]
    torch.testing.assert_close(alphas, expected)
    expected = gradient(expected)
    torch.autograd.grad((alphas[1] * pull).sum(), hs[1], retain_graph=True)  # leaves nothing
    torch.testing.assert_close(gradient(alphas), expected)
    # Keys that were copied have the same gradient, which then comes through autograd.
    copies = attention.project(a).repeat_interleave(n, dim=0)
    torch.testing.assert_close(gradient([attention(copies, h) for h in hs]), expected)


def test_additive_scores_of_any_size():
    """tanh(x) by a product of exponentials: exact, and finite beyond float32's exponentials."""
    keys, query = torch.linspace(-200, 200, 41).view(1, 41, 1), torch.tensor([[-30.0], [0.0], [30]])
    keys.requires_grad_()
    e = additive_score(ExpKeys.apply(keys), query, torch.ones(1))  # (3, 41)
    expected = torch.tanh(keys.detach()[:, :, 0] + query)
    torch.testing.assert_close(e + 1, expected, atol=1e-6, rtol=1e-6)
    assert torch.autograd.grad(e.sum(), keys)[0].isfinite().all()


def test_dot_attention_equals_torchs_scaled_dot_product():
    torch.manual_seed(0)
    attention, a, h = DotAttention(5, 7, 4), torch.randn(2, 3, 5), torch.randn(2, 7)
    z = soft_context(attention(attention.project(a), h), a)
    expected = F.scaled_dot_product_attention(attention.W_h(h).unsqueeze(1), attention.W_a(a), a)
    torch.testing.assert_close(z, expected.squeeze(1))


def test_doubly_stochastic_and_entropy_by_loops():
    alphas = torch.softmax(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)), dim=2)
    for n in range(2):
        penalty = sum((1 - sum(float(alphas[n, t, i]) for t in range(4))) ** 2 for i in range(3))
        nats = -sum(float(x) * math.log(x) for x in alphas[n].flatten())
        assert float(doubly_stochastic(alphas)[n]) == pytest.approx(penalty, rel=1e-5)
        assert float(entropy(alphas)[n]) == pytest.approx(nats, rel=1e-5)
    certain = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    entropy(certain).sum().backward()
    assert torch.isfinite(certain.grad).all()


def test_hard_context_samples_from_alpha():
    torch.manual_seed(0)
    alpha = torch.tensor([0.5, 0.3, 0.2, 0.0])
    a = torch.eye(4).expand(20000, 4, 4)
    z, log_p_s = hard_context(alpha.expand(20000, 4), a)
    assert torch.equal(z.sum(1), torch.ones(20000))  # each z is one of the vectors, unmixed
    assert (z.mean(0) - alpha).abs().max() < 0.015  # four standard deviations
    torch.testing.assert_close(log_p_s, (z @ alpha).log())
    mixed, log_p_s = hard_context(alpha.expand(2, 4), a[:2], torch.tensor([1, 1]),
                                  torch.tensor([True, False]))
    torch.testing.assert_close(mixed, torch.stack([alpha, torch.eye(4)[1]]))
    torch.testing.assert_close(log_p_s, torch.tensor([0, math.log(0.3)]))


def test_show_and_tell_equals_torchs_lstm_fed_the_image_first():
    captioner = tiny_captioner(attn='none')
    a, captions = torch.randn(2, 3, 5), torch.tensor([[START, 5, 4, END], [START, 7, 8, END]])
    lstm = nn.LSTM(6, 7, batch_first=True)
    order = [0, 1, 3, 2]
    with torch.no_grad():
        for mine, theirs in ((captioner.cell.W.weight, lstm.weight_ih_l0),
                             (captioner.cell.U.weight, lstm.weight_hh_l0),
                             (captioner.cell.W.bias, lstm.bias_ih_l0)):
            theirs.copy_(torch.cat([mine.chunk(4)[i] for i in order]))
        lstm.bias_hh_l0.zero_()
    words = captioner.E(captions[:, :-1])
    h, _ = lstm(torch.cat([captioner.W_I(a.mean(1)).unsqueeze(1), words], dim=1))
    expected = captioner.L_o(torch.tanh(words + captioner.L_h(h[:, 1:])))
    out = captioner(a, captions)
    torch.testing.assert_close(out.logits, expected)
    assert out.alphas is None and out.betas is None


# ------------------------------------------------------- the authors' own program (golden arrays)
@pytest.fixture(scope='module')
def golden():
    with np.load(HERE / 'test_golden.npz') as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def theirs_to_ours(words):
    """Their word ids -> ours: <eos> 0 -> <end>, the others moved up behind the special words."""
    return torch.where(words == 0, END, words.long() + 3)


def transpose(weight):
    return weight.T if weight.dim() == 2 else weight


PAIRS = {'cell.W.weight': 'decoder_W', 'cell.W.bias': 'decoder_b', 'cell.U.weight': 'decoder_U',
         'W_z.weight': 'decoder_Wc', 'attention.W_a.weight': 'decoder_Wc_att',
         'attention.W_a.bias': 'decoder_b_att', 'attention.W_h.weight': 'decoder_Wd_att',
         'attention.v.weight': 'decoder_U_att', 'f_beta.weight': 'decoder_W_sel',
         'f_beta.bias': 'decoder_b_sel', 'f_init_h.weight': 'ff_state_W',
         'f_init_h.bias': 'ff_state_b', 'f_init_c.weight': 'ff_memory_W',
         'f_init_c.bias': 'ff_memory_b', 'L_h.weight': 'ff_logit_lstm_W',
         'L_h.bias': 'ff_logit_lstm_b', 'L_z.weight': 'ff_logit_ctx_W'}


def authors_captioner(golden, attn='soft', eos=0.0):
    """Our captioner with the authors' parameters; `eos` is added to the bias of the end word."""
    g = {key[6:]: value for key, value in golden.items() if key.startswith('param/')}
    captioner = Captioner(CaptionerConfig(53, 24, attn, embed_dim=16, hidden_dim=32, attn_dim=24,
                                          dropout=0.0))
    rows = theirs_to_ours(torch.arange(50))
    with torch.no_grad():
        for ours, theirs in PAIRS.items():
            weight = captioner.get_parameter(ours)
            weight.copy_(transpose(g[theirs]).reshape(weight.shape))
        captioner.L_h.bias.add_(g['ff_logit_ctx_b'])
        captioner.E.weight.zero_()  # so <start> is a vector of zeros
        captioner.E.weight[rows] = g['Wemb']
        captioner.L_o.weight.zero_()
        captioner.L_o.weight[rows] = g['ff_logit_W'].T
        captioner.L_o.bias.fill_(-1e9)  # our special words do not exist in their program
        captioner.L_o.bias[rows] = g['ff_logit_b']
        captioner.L_o.bias[END] += eos
    return captioner


def authors_batch(captioner, golden, call=None):
    """Run their batch caption by caption -> costs (4,), alphas (4, 7, L), log p(s) (4,), outputs.

    Their batch is padded to 7 steps, and attention goes on in the padding from the last state. A
    further word at the end of our captions gives us just that attention.
    """
    costs, alphas, log_p_s, outs = [], [], [], []
    for n, T in enumerate((golden['in/lengths'] + 1).tolist()):
        words = theirs_to_ours(golden['in/x'][:T, n])
        captions = torch.cat([torch.tensor([START]), words, torch.tensor([END])]).unsqueeze(0)
        choice = ()
        if call:
            coin = golden[f'{call}/h_sampling_mask_per_t'] == 0  # their steps of expectation
            s = golden[f'{call}/out/alpha_sample'][:, n].argmax(1)  # (7,)
            ahead = min(T + 1, 7)
            choice = (F.pad(s[:ahead], (0, T + 1 - ahead)).unsqueeze(0),
                      F.pad(coin[:ahead], (0, T + 1 - ahead), value=True).unsqueeze(0))
        out = captioner(golden['in/ctx'][n:n + 1], captions, *choice)
        p = out.logits[0, :T].softmax(dim=1)[torch.arange(T), words]
        costs.append(-(p + 1e-8).log().sum())  # their program adds 1e-8
        alphas.append(torch.cat([out.alphas[0, :T], out.alphas[0, -1:].expand(7 - T, -1)]))
        if call:
            chosen = alphas[-1][torch.arange(7), s].log().masked_fill(coin, 0)
            torch.testing.assert_close(out.log_p_s[0, :T], chosen[:T])
            log_p_s.append(chosen.sum())
        outs.append(out)
    return (torch.stack(costs), torch.stack(alphas),
            torch.stack(log_p_s) if call else None, outs)


def assert_gradients(captioner, golden, prefix):
    rows = theirs_to_ours(torch.arange(50))
    for ours, theirs in PAIRS.items():
        grad, expected = captioner.get_parameter(ours).grad, golden[f'{prefix}/grad/{theirs}']
        expected = transpose(expected).reshape(grad.shape)
        assert (grad - expected).abs().max() <= 1e-5 * max(1, expected.abs().max()), ours
    for grad, theirs in ((captioner.E.weight.grad[rows], 'Wemb'),
                         (captioner.L_o.weight.grad[rows], 'ff_logit_W'),
                         (captioner.L_o.bias.grad[rows], 'ff_logit_b')):
        expected = golden[f'{prefix}/grad/{theirs}']
        expected = transpose(expected) if theirs == 'ff_logit_W' else expected
        assert (grad - expected).abs().max() <= 1e-5 * max(1, expected.abs().max()), theirs


def test_soft_attention_equals_the_authors_program(golden):
    captioner = authors_captioner(golden)
    costs, alphas, _, outs = authors_batch(captioner, golden)
    torch.testing.assert_close(costs, golden['soft/cost'], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alphas, golden['soft/alphas'].transpose(0, 1), atol=1e-5, rtol=0)
    for n, out in enumerate(outs):
        T = out.betas.shape[1] - 1
        torch.testing.assert_close(out.betas[0, :T], golden['soft/selector'][:T, n], atol=1e-5,
                                   rtol=0)
    # Their term is N / L times the mean over captions of ours.
    loss = (costs + 4 / 9 * doubly_stochastic(alphas)).mean()
    torch.testing.assert_close(loss, golden['soft/total_loss'], atol=1e-5, rtol=1e-5)
    loss.backward()
    assert_gradients(captioner, golden, 'soft')


@pytest.mark.parametrize('call', ['call0', 'call1', 'call2'])
def test_hard_attention_equals_the_authors_program_given_their_samples(golden, call):
    captioner = authors_captioner(golden, 'hard')
    costs, alphas, log_p_s, _ = authors_batch(captioner, golden, call)
    torch.testing.assert_close(costs, golden[f'{call}/out/cost'], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alphas, golden[f'{call}/out/alphas'].transpose(0, 1), atol=1e-5,
                               rtol=0)
    if call == 'call0':
        return  # the golden file has the gradients of the other two
    # Theirs sums REINFORCE over the N = 4 captions and averages the rest, with the cost per step.
    N, T = 4, 7
    loss = reinforce_loss(-costs, log_p_s, alphas, -T * golden[f'{call}/baseline_before'],
                          lambda_r=N / (10 * T), lambda_h=0.002 * N).mean()
    loss.backward()
    assert_gradients(captioner, golden, call)


def test_beam_search_finds_the_authors_best_captions(golden):
    compared = 0
    for key in golden:
        if not (key.startswith('gen') and key.endswith('samples')):
            continue
        group, K = key.split('/')[:-2], int(key.split('/')[-2][1:])
        eos = float(group[0][7:] or 0) if group[0].startswith('gen_eos') else 0.0
        max_len = int(group[1][6:]) if len(group) > 1 else 30
        captioner = authors_captioner(golden, eos=eos).eval()
        found = captioner.beam_search(golden['gen/ctx'], K, max_len)
        stem = key[:-len('samples')]
        for n in range(8):
            scores = golden[stem + 'scores'][n]
            best = int(scores.argmin())
            words = golden[key][n, best, :golden[stem + 'lengths'][n, best]]
            ours = max(found[n], key=lambda h: h.log_prob)
            assert ours.tokens == theirs_to_ours(words).tolist()
            assert -ours.log_prob == pytest.approx(float(scores[best]), rel=1e-5, abs=1e-5)
            assert len(found[n]) == K
            compared += 1
    assert compared == 33 * 8


# --------------------------------------------------------------- hard attention by enumeration
def test_reinforce_is_unbiased_and_the_bound_holds():
    """All location sequences of L = 3, T = 2: E[estimator] = exact gradient of L_s."""
    captioner = tiny_captioner(V=7, D=4, attn='hard', scale=2.0, dropout=0.0).double()
    a = torch.randn(1, 3, 4, dtype=torch.double)
    captions = torch.tensor([[START, 5, END]])
    weights = [p for p in captioner.parameters()]

    def run(s):
        out = captioner(a, captions, s=torch.tensor([s]))
        log_p_y = out.logits.log_softmax(2)[0, torch.arange(2), captions[0, 1:]].sum()
        return log_p_y.view(1), out.log_p_s.sum(1), out.alphas

    def flat_gradient(loss):
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        return torch.cat([(torch.zeros_like(w) if g is None else g).flatten()
                          for w, g in zip(weights, grads)])

    sequences = list(itertools.product(range(3), repeat=2))
    bound, likelihood, total = 0.0, 0.0, 0.0
    for s in sequences:
        log_p_y, log_p_s, _ = run(s)
        bound = bound + log_p_s.exp() * log_p_y
        likelihood += (log_p_s + log_p_y).exp().item()
        total += log_p_s.exp().item()
    assert total == pytest.approx(1, abs=1e-12)
    assert bound.item() <= math.log(likelihood)  # eq. (10): L_s <= log p(y | a)
    exact = flat_gradient(bound)

    spread = {}
    for baseline in (0.0, bound.item()):
        mean = square = 0.0
        for s in sequences:
            log_p_y, log_p_s, alphas = run(s)
            p = log_p_s.exp().item()
            estimate = -flat_gradient(reinforce_loss(log_p_y, log_p_s, alphas, baseline, 1.0))
            mean, square = mean + p * estimate, square + p * estimate.square()
        torch.testing.assert_close(mean, exact, atol=1e-9, rtol=1e-6)
        spread[baseline] = float((square - mean.square()).sum())
    assert abs(spread[0.0] - spread[bound.item()]) > 0.01 * spread[0.0]  # the variance changes

    # --samples 2: the other sample's log p(y | s, a) is the baseline, over all pairs of sequences.
    settings = Settings(attn='hard', samples=2, expected=0.0, lambda_r=1.0, lambda_h=0.0)
    mean = 0.0
    for pair in itertools.product(sequences, repeat=2):
        p = math.exp(sum(run(s)[1].item() for s in pair))
        loss, _ = batch_loss(lambda a, captions, soft: captioner(
            a, captions, s=torch.tensor(pair)), a, captions, settings, baseline=1e9)
        mean = mean - p * flat_gradient(loss)
    torch.testing.assert_close(mean, exact, atol=1e-9, rtol=1e-6)


def test_input_dropout_drops_a_feature_at_all_locations_and_only_in_training():
    captioner, seen = tiny_captioner(D=200, input_dropout=0.25), []
    captioner.attention.W_a.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    a, captions = torch.rand(4, 3, 200) + 1, torch.tensor([[START, 4, 5, END]] * 4)
    captioner.train()(a, captions)
    captioner.eval()(a, captions)
    scale = seen[0] / a
    torch.testing.assert_close(scale, scale[:, :1].expand_as(scale))
    assert torch.isclose(scale, torch.tensor(4 / 3)).logical_or(scale == 0).all()
    assert (scale == 0).float().mean() == pytest.approx(0.25, abs=0.06)
    torch.testing.assert_close(seen[1], a)


# ------------------------------------------------------------------------------ beam search
@pytest.mark.parametrize('attn, score, cell', [
    ('soft', 'additive', 'lstm'), ('soft', 'dot', 'lstm'), ('hard', 'additive', 'lstm'),
    ('none', 'additive', 'lstm'), ('soft', 'additive', 'rnn'), ('none', 'additive', 'rnn')])
def test_beam_search_against_teacher_forcing(attn, score, cell):
    """Beam 1 is greedy; a hypothesis' score is what teacher forcing gives its words."""
    captioner, a = tiny_captioner(attn=attn, score=score, cell=cell), torch.randn(6, 3, 5)
    banned = [PAD, START, UNK]
    greedy = torch.full((6, 1), START)
    for _ in range(8):  # from scratch for every word
        logits = captioner(a, F.pad(greedy, (0, 1))).logits[:, -1]
        logits[:, banned] = -math.inf
        greedy = torch.cat([greedy, logits.argmax(1, keepdim=True)], dim=1)
    for n, (hypothesis,) in enumerate(captioner.beam_search(a, 1, max_len=8)):
        words = greedy[n, 1:].tolist()
        assert hypothesis.tokens == (words[:words.index(END) + 1] if END in words else words)
    for n, hypotheses in enumerate(captioner.beam_search(a, 3, max_len=8)):
        for h in hypotheses:
            captions = torch.tensor([[START] + h.tokens])
            out = captioner(a[n:n + 1], captions)
            log_p = out.logits.log_softmax(2)[0, torch.arange(len(h.tokens)), captions[0, 1:]]
            assert h.log_prob == pytest.approx(log_p.sum().item(), abs=1e-4)
            if attn != 'none':
                np.testing.assert_allclose(h.alphas, out.alphas[0].detach(), atol=1e-5)
                np.testing.assert_allclose(h.betas, out.betas[0].detach(), atol=1e-5)


def test_a_batch_gives_the_captions_of_its_images_one_by_one():
    captioner, a = tiny_captioner(V=30), torch.randn(12, 3, 5)
    for n, hypotheses in enumerate(captioner.beam_search(a, 4, max_len=12)):
        alone = captioner.beam_search(a[n:n + 1], 4, max_len=12)[0]
        assert [h.tokens for h in hypotheses] == [h.tokens for h in alone]
        assert [h.log_prob for h in hypotheses] == pytest.approx([h.log_prob for h in alone])


def test_wide_beam_equals_exhaustive_search():
    captioner, a = tiny_captioner(V=7, scale=2.0), torch.randn(3, 3, 5)
    words = [4, 5, 6]
    sentences = [[*middle, END] for n in range(3) for middle in itertools.product(words, repeat=n)]
    found = captioner.beam_search(a, 60, max_len=3)
    for n in range(3):
        scores = {}
        for sentence in sentences:
            out = captioner(a[n:n + 1], torch.tensor([[START] + sentence]))
            log_p = out.logits.log_softmax(2)[0, torch.arange(len(sentence)), sentence]
            scores[tuple(sentence)] = log_p.sum().item()
        ended = [h for h in found[n] if h.tokens[-1] == END]
        assert [tuple(h.tokens) for h in ended] == sorted(scores, key=scores.get, reverse=True)
        assert [h.log_prob for h in ended] == pytest.approx(sorted(scores.values(), reverse=True),
                                                            abs=1e-5)


def test_beam_search_returns_captions_that_never_end_and_orders_by_length_penalty():
    captioner, a = tiny_captioner(V=20), torch.randn(4, 3, 5)
    with torch.no_grad():
        captioner.L_o.bias[END] = -1e4
    for hypotheses in captioner.beam_search(a, 3, max_len=5):
        assert [len(h.tokens) for h in hypotheses] == [5, 5, 5]
        assert all(END not in h.tokens for h in hypotheses)
    with torch.no_grad():
        captioner.L_o.bias[END] = 2.0
    differ = False
    for hypotheses in captioner.beam_search(a, 5, max_len=20, length_penalty=1.0):
        ended = [h for h in hypotheses if h.tokens[-1] == END]
        scores = [h.log_prob / len(h.tokens) for h in ended]
        assert scores == sorted(scores, reverse=True) and len(scores) > 1
        differ |= ended != sorted(ended, key=lambda h: -h.log_prob)
    assert differ  # else the order by log_prob alone would pass too


def test_an_ensemble_says_the_mean_of_its_members_probabilities():
    team, a = [tiny_captioner(seed=seed) for seed in range(3)], torch.randn(4, 3, 5)
    differ = 0
    for n, hypotheses in enumerate(team[0].beam_search(a, 3, max_len=8, others=team[1:])):
        for h in hypotheses:
            captions = torch.tensor([[START] + h.tokens])
            outs = [captioner(a[n:n + 1], captions) for captioner in team]
            p = sum(out.logits.softmax(2)[0] for out in outs) / 3  # (T, V)
            log_p = p[torch.arange(len(h.tokens)), h.tokens].log().sum()
            assert h.log_prob == pytest.approx(log_p.item(), abs=1e-4)
            np.testing.assert_allclose(h.alphas, outs[0].alphas[0].detach(), atol=1e-5)
        alone = team[0].beam_search(a[n:n + 1], 3, max_len=8)[0]
        differ += [h.tokens for h in alone] != [h.tokens for h in hypotheses]
    assert differ


# ------------------------------------------------------------------------------------ scores
# coco-caption's own output (pycocoevalcap 1.2: PTBTokenizer, Bleu(4)) for these sentences.
CAPTIONS = [
    ("A man's dog isn't here, can't you see?", "a man 's dog is n't here ca n't you see"),
    ("It's 3:30 p.m. in the U.S. and she'll go", "it 's 3:30 p.m. in the u.s. and she 'll go"),
    ("A dog & a cat's 50% off $5.00 @ home", "a dog & a cat 's 50 % off $ 5.00 @ home"),
    ("we're they've I'm I'd gonna wanna cannot",
     "we 're they 've i 'm i 'd gon na wan na can not"),
    ('Two T-shirts -- one "red"; one blue... wet .', 'two t-shirts one red one blue wet'),
    ('A dog runs. It is red. A cat sits', 'a dog runs it is red a cat sits'),
    ('a black-and-white dog, number # 28!', 'a black-and-white dog number # 28'),
    ('A man at 3 p.m. in the U.S.', 'a man at 3 p.m. in the u.s.'),
    ('a sign says "stop." and a car stops', 'a sign says stop and a car stops'),
    ("The dogs' bowls; the girl\u2019s caf\u00e9 na\u00efve \u2014 dash \u2013 en",
     "the dogs bowls the girl 's caf\u00e9 na\u00efve dash en")]


def test_plain_captions_are_tokenized_the_same_the_quick_way(monkeypatch):
    rng, words = random.Random(0), 'a dog cannot gonna t-shirt two , runs, x b. wanna - lemme is'
    captions = [' '.join(rng.choices(words.split(), k=rng.randint(1, 9)))
                + rng.choice(('', ' .', '.')) for _ in range(500)]
    quick = [tokenize(c, punctuation=True) for c in captions]
    monkeypatch.setattr(bleu_meteor.re, 'fullmatch', lambda pattern, text: (
        None if 'a-z' in pattern else re.match(f'(?:{pattern})$', text)))
    assert quick == [tokenize(c, punctuation=True) for c in captions]


@pytest.mark.parametrize('caption, words', CAPTIONS)
def test_tokenize_equals_coco_captions_tokenizer(caption, words):
    assert ' '.join(tokenize(caption)) == words


def test_tokenize_keeps_punctuation_when_asked():
    assert tokenize('A dog , running .', punctuation=True) == ['a', 'dog', ',', 'running', '.']


def random_corpus(seed=0, images=40):
    rng = np.random.default_rng(seed)
    words = list('abcdefg')
    references = [[list(rng.choice(words, rng.integers(3, 12))) for _ in range(rng.integers(1, 6))]
                  for _ in range(images)]
    return references, [list(rng.choice(words, rng.integers(4, 14))) for _ in range(images)]


@pytest.mark.parametrize('seed', range(5))
def test_bleu_equals_nltks_corpus_bleu(seed):
    from nltk.translate.bleu_score import corpus_bleu
    references, hypotheses = random_corpus(seed)
    for n, value in enumerate(bleu(references, hypotheses), start=1):
        assert value == pytest.approx(100 * corpus_bleu(references, hypotheses, [1 / n] * n),
                                      abs=1e-5)


REFERENCES = [
    ['a dog runs on the green grass', 'the brown dog is running', 'a dog on grass'],
    ['two children play in the water', 'kids splash in a pool of water',
     'two kids playing in the water near a beach'],
    ['a man rides a bicycle down the street', 'a man on a bike',
     'the man is riding his bike down a busy street'],
    ['a small red circle left of a large blue star', 'a tiny red disc to the left of a star',
     'a red circle and a blue star'],
    ['a woman in a red coat walks her dog', 'a lady walks a dog in the snow',
     'the woman is walking']]
RESULTS = ['a brown dog is running on the grass', 'two kids playing in the the water',
           'a man is riding a bike',
           'a small red disc left of a big blue star on a plain background', 'a woman']


def test_bleu_equals_coco_caption():
    """The numbers are what pycocoevalcap 1.2's Bleu(4) gives for these sentences."""
    found = bleu([[r.split() for r in refs] for refs in REFERENCES], [h.split() for h in RESULTS])
    assert found == pytest.approx([83.78378378151936, 72.3635715410822, 53.73477111196163,
                                   37.71724016404608], abs=1e-6)


@needs_shared
def test_scores_do_not_depend_on_the_order_of_images(monkeypatch):
    import nltk
    monkeypatch.setattr(nltk.data, 'path', [str(SHARED / 'nltk_data')])
    references, hypotheses = random_corpus(3)
    pairs = list(zip(references, hypotheses))
    random.Random(0).shuffle(pairs)
    for scores in bleu, meteor:
        assert scores(*zip(*pairs)) == scores(references, hypotheses)


@needs_shared
def test_meteor_has_the_parameters_of_meteor_1_5(monkeypatch):
    """One exact match of two, in one chunk of one: F = P R / (.85 P + .15 R), penalty .6."""
    import nltk
    monkeypatch.setattr(nltk.data, 'path', [str(SHARED / 'nltk_data')])
    P, R = 1 / 2, 1 / 4
    F_mean = P * R / (0.85 * P + 0.15 * R)
    expected = 100 * F_mean * (1 - 0.6 * (1 / 1) ** 0.2)
    references, hypotheses = [[['dog', 'q1', 'q2', 'q3']]], [['dog', 'p1']]
    assert meteor(references, hypotheses) == pytest.approx(expected)
    # The best of two references, a word with the same stem, and a synonym.
    references = [[['nothing'], ['the', 'boys']], [['child']]]
    assert meteor(references, [['the', 'boy'], ['kid']]) == pytest.approx(
        100 * (1 - 0.6 * 0.5 ** 0.2 + 1 - 0.6) / 2)


def test_without_wordnet_the_scores_are_printed_all_the_same(tmp_path):
    (tmp_path / 'results.json').write_text('[{"image_id": 1, "caption": "A dog runs."}]')
    (tmp_path / 'references.json').write_text('{"1": ["a dog runs ."]}')
    nowhere = dict.fromkeys(('HOME', 'USERPROFILE', 'NLTK_DATA'), str(tmp_path))
    result = subprocess.run([sys.executable, HERE / 'bleu_meteor.py', 'results.json',
                             'references.json'], cwd=tmp_path, text=True, capture_output=True,
                            env=os.environ | nowhere)
    assert result.returncode == 0 and '100.00' in result.stdout
    assert result.stdout.count('nltk.downloader wordnet') == 1


def test_human_score_leaves_each_caption_out_once(monkeypatch):
    monkeypatch.setattr('bleu_meteor.meteor', lambda *_: None)
    refs = [[['a', 'b', 'c', 'd'], ['a', 'b', 'c', 'd'], ['x', 'y', 'z', 'w']]]
    found = human_score(refs)
    assert found[:4] == pytest.approx([200 / 3] * 4, abs=1e-4) and found[4] is None
    assert human_score([[['a']]]) is None


def test_bleu_without_brevity_penalty_and_with_nothing_in_common():
    references, hypotheses = [[list('abcdefgh')]], [list('abcd')]
    assert bleu(references, hypotheses, brevity_penalty=False) == pytest.approx([100] * 4)
    assert bleu(references, hypotheses) == pytest.approx([100 * math.exp(1 - 8 / 4)] * 4)
    assert bleu([[['x']]], [['y']])[0] == pytest.approx(0, abs=1e-6)
    assert bleu([[['x']]], [[]])[3] == pytest.approx(0, abs=1e-6)  # an empty caption is no error
    with pytest.raises(ValueError, match='one caption for each image'):
        bleu([[['x']]], [])


# ------------------------------------------------------------------------------------ shapes
def test_shapes_are_drawn_as_said_and_come_from_the_seed():
    examples = data.make_shapes(60, 'test')
    for one, other in zip(examples, data.make_shapes(60, 'test')):
        assert one.captions == other.captions and (one.image == other.image).all()
    assert any((one.image != other.image).any()
               for one, other in zip(examples, data.make_shapes(60, 'other')))
    for example in examples:
        assert 1 <= len(example.objects) <= 3 and len(set(example.captions)) == 5
        for o in example.objects:
            left, top, right, bottom = (round(64 * v) for v in o.box)
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
            colour = np.array(data.COLOURS[o.colour])
            near = np.abs(example.image.astype(int) - colour).max(axis=2) < 45
            assert near[(top + bottom) // 2, (left + right) // 2]
            # Up to its thin tips, the box is the smallest around what has the colour.
            ys, xs = near[max(top - 2, 0):bottom + 2, max(left - 2, 0):right + 2].nonzero()
            assert xs.max() - xs.min() + 1 == pytest.approx(right - left, abs=4), o
            assert ys.max() - ys.min() + 1 == pytest.approx(bottom - top, abs=4), o
    assert len({o.shape for x in examples for o in x.objects}) >= 5
    assert len({o.colour for x in examples for o in x.objects}) == 8


def test_shapes_captions_tell_the_truth():
    """Parse the relations back and check them against the boxes."""
    def middle(o):
        return (o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2
    checked = 0
    for example in data.make_shapes(200, 'val'):
        named = {(o.colour, o.shape): o for o in example.objects}
        for caption in example.captions:
            words = caption.split()
            things = [named[words[t - 1], data.NOUNS[w]] for t, w in enumerate(words)
                      if w in data.NOUNS]  # a KeyError is a caption that names what is not there
            assert 'picture' in words or len(things) == len(example.objects)
            if len(things) < 2:
                continue
            (x1, y1), (x2, y2) = middle(things[0]), middle(things[1])
            between = caption[caption.index(things[0].colour):caption.index(things[1].colour)]
            for word, true in (('left of', x1 < x2), ('right of', x1 > x2), ('above', y1 < y2),
                               ('over', y1 < y2), ('below', y1 > y2), ('under', y1 > y2)):
                if f' {word}' in between:
                    assert true, caption
                    checked += 1
    assert checked > 300


def test_unseen_pairs_are_only_in_the_unseen_split():
    for seed in ('train', 'val', 'test'):
        assert not any((o.shape, o.colour) in data.UNSEEN_PAIRS
                       for x in data.make_shapes(150, seed) for o in x.objects)
    for example in data.make_shapes(50, 'unseen', unseen=True):
        assert sum((o.shape, o.colour) in data.UNSEEN_PAIRS for o in example.objects) == 1


def test_pointing_counts_the_cell_in_the_named_object():
    objects = (data.Object('circle', 'red', 'small', (0.0, 0.0, 0.25, 0.25)),
               data.Object('star', 'blue', 'large', (0.5, 0.5, 1.0, 1.0)))
    def look(*cells):
        return np.eye(16)[list(cells)]  # a grid of 4 x 4
    words = 'a red disc above a blue star'.split()
    assert data.pointing(words, look(9, 9, 0, 9, 9, 9, 15), objects, (4, 4)) == (2, 2)
    assert data.pointing(words, look(9, 9, 1, 9, 9, 9, 0), objects, (4, 4)) == (0, 2)
    # A noun for something that is not there is a miss wherever attention lies.
    assert data.pointing('a green star'.split(), look(15, 15, 15), objects, (4, 4)) == (0, 1)
    assert data.pointing('a cat'.split(), look(0, 0), objects, (4, 4)) == (0, 0)


# -------------------------------------------------------------------------- data sets on disk
SPLITS = {'train': ['a.jpg', 'b.jpg', 'c.jpg'], 'val': ['d.jpg'], 'test': ['e.jpg']}
SENTENCES = {name: [f'A {name[0]} dog , number {i} .' for i in range(5)]
             for names in SPLITS.values() for name in names}

COCO_NAMES = {n: f'COCO_{part}2014_{i:012}.jpg' for i, (n, part) in enumerate(
    zip('abcde', ['train'] * 3 + ['val'] * 2))}


def make_pictures(folder, names=SENTENCES):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(data.make_shapes(i + 1, 'pictures')[i].image).save(folder / name)
        (folder / f'._{name}').write_bytes(b'not a picture')


def write_layout(folder, layout):
    """The same five images and their captions in one of the published layouts."""
    if layout == 'official':
        make_pictures(folder / 'Flicker8k_Dataset')
        lines = [f'{n}#{i}\t{c}' for n in SENTENCES for i, c in enumerate(SENTENCES[n])]
        lines.append(f'{data.NO_SUCH_IMAGE}#0\tA dog .')
        (folder / 'Flickr8k.token.txt').write_text('\n'.join(lines) + '\n')
        for split, official in (('train', 'train'), ('val', 'dev'), ('test', 'test')):
            (folder / f'Flickr_8k.{official}Images.txt').write_text('\n'.join(SPLITS[split]))
    elif layout == 'kaggle8k':
        make_pictures(folder / 'Images')
        rows = [f'{n},"{c}"' for n in SENTENCES for c in SENTENCES[n]]
        (folder / 'captions.txt').write_text('image,caption\n' + '\n'.join(rows) + '\n')
    elif layout == 'token30k':
        make_pictures(folder / 'flickr30k-images')
        lines = [f'{n}#{i}\t{c}' for n in SENTENCES for i, c in enumerate(SENTENCES[n])]
        (folder / 'results_20130124.token').write_text('\n'.join(lines))
    elif layout == 'kaggle30k':
        make_pictures(folder / 'flickr30k_images' / 'flickr30k_images')
        rows = [f'{n}| {i}| {c}' for n in SENTENCES for i, c in enumerate(SENTENCES[n])]
        rows[3] = rows[3].replace('| A', '   A')  # the published file has one such line
        (folder / 'results.csv').write_text('image_name| comment_number| comment\n'
                                            + '\n'.join(rows))
    elif layout == 'coco':
        (folder / 'annotations').mkdir(parents=True)
        for part, letters in (('train2014', 'abc'), ('val2014', 'de')):
            make_pictures(folder / part, [COCO_NAMES[n] for n in letters])
            content = {'images': [{'id': ord(n), 'file_name': COCO_NAMES[n]} for n in letters],
                       'annotations': [{'image_id': ord(n), 'caption': c}
                                       for n in letters for c in SENTENCES[f'{n}.jpg']]}
            (folder / 'annotations' / f'captions_{part}.json').write_text(json.dumps(content))
    elif layout.startswith('karpathy'):
        make_pictures(folder / 'Images')
        split_of = {n: s for s in SPLITS for n in SPLITS[s]} | {'c.jpg': 'restval'}
        images = [{'filename': n, 'split': split_of[n], 'sentences': [{'raw': c} for c in cs]}
                  for n, cs in SENTENCES.items()]
        (folder / f'dataset_{layout[8:]}.json').write_text(json.dumps({'images': images}))


@pytest.mark.parametrize('name, layout', [
    ('flickr8k', 'official'), ('flickr8k', 'karpathyflickr8k'),
    ('flickr30k', 'karpathyflickr30k')])
def test_layouts_with_a_split(tmp_path, name, layout):
    write_layout(tmp_path / name, layout)
    splits = data.load_captions(name, tmp_path)
    assert {s: [x.name for x in splits[s]] for s in splits} == SPLITS
    for example in (x for split in splits.values() for x in split):
        assert example.captions == SENTENCES[example.name]
        assert Path(example.image).name == example.name and Path(example.image).is_file()


@pytest.mark.parametrize('name, layout', [
    ('flickr8k', 'kaggle8k'), ('flickr30k', 'token30k'), ('flickr30k', 'kaggle30k')])
def test_layouts_without_a_split_get_the_same_one_every_time(tmp_path, capsys, monkeypatch, name,
                                                             layout):
    monkeypatch.setattr(data, 'KARPATHY', ('http://127.0.0.1:9/splits.zip', 'md5', ''))
    write_layout(tmp_path / name, layout)
    splits = data.load_captions(name, tmp_path)
    assert 'drawn from a seed' in capsys.readouterr().out
    found = {x.name: x.captions for split in splits.values() for x in split}
    assert found == SENTENCES and sum(len(x) for x in splits.values()) == len(SENTENCES)
    assert splits == data.load_captions(name, tmp_path)


def test_one_image_is_for_training_validation_and_test(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'KARPATHY', ('http://127.0.0.1:9/splits.zip', 'md5', ''))
    make_pictures(tmp_path / 'flickr8k', ['a.jpg'])
    (tmp_path / 'flickr8k' / 'captions.txt').write_text('image,caption\na.jpg,"A dog, alone."\n')
    splits = data.load_captions('flickr8k', tmp_path)
    assert {s: [x.captions for x in splits[s]] for s in splits} == dict.fromkeys(
        ('train', 'val', 'test'), [['A dog, alone.']])


def test_coco_annotations(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'KARPATHY', ('http://127.0.0.1:9/splits.zip', 'md5', ''))
    folder, names = tmp_path / 'coco', COCO_NAMES
    write_layout(folder, 'coco')
    splits = data.load_captions('coco', tmp_path)
    assert [x.name for x in splits['train']] == [0, 1, 2]  # COCO's own numbers
    assert [[x.name for x in splits[s]] for s in ('val', 'test')] == [[3], [4]]
    assert splits['train'][0].captions == SENTENCES['a.jpg']
    images = [{'filename': names[n], 'split': split, 'filepath': 'val2014',
               'sentences': [{'raw': 'A dog.'}]}
              for n, split in zip('abcde', ('train', 'restval', 'val', 'val', 'test'))]
    (folder / 'dataset_coco.json').write_text(json.dumps({'images': images}))
    splits = data.load_captions('coco', tmp_path)  # Karpathy's split comes first
    assert [[x.name for x in splits[s]] for s in ('train', 'val', 'test')] == [[0, 1], [2, 3], [4]]


@needs_shared
def test_the_real_flickr8k():
    splits = data.load_captions('flickr8k', SHARED / 'data')
    assert [len(splits[s]) for s in ('train', 'val', 'test')] == [6000, 500, 500]
    assert all(len(x.captions) == 5 for split in splits.values() for x in split)
    assert {x.name for x in splits['train']}.isdisjoint(x.name for x in splits['test'])


# ----------------------------------------------------------------------------------- downloads
class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture()
def server(tmp_path, monkeypatch):
    """A web server on this machine with two archives as macOS makes them; its address, folder."""
    monkeypatch.setenv('no_proxy', '*')
    site = tmp_path / 'site'
    site.mkdir()
    write_layout(tmp_path / 'source', 'official')
    for name, pattern in (('images', '*/*'), ('texts', '*.txt')):
        with zipfile.ZipFile(site / f'{name}.zip', 'w') as archive:
            for path in sorted((tmp_path / 'source').glob(pattern)):
                archive.write(path, path.relative_to(tmp_path / 'source'))
            archive.writestr(f'__MACOSX/._{name}', 'not data')
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=site)) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{http.server_port}', site
        http.shutdown()


@pytest.mark.parametrize('kind, digest', [('md5', md5), ('sha256', sha256)])
def test_a_missing_data_set_is_downloaded(tmp_path, monkeypatch, server, kind, digest):
    address, site = server
    pictures, texts = ((pattern, f'{address}/{name}.zip', kind,
                        digest((site / f'{name}.zip').read_bytes()).hexdigest())
                       for (pattern, *_), name in zip(data.DOWNLOADS['flickr8k'],
                                                      ('images', 'texts')))
    monkeypatch.setitem(data.DOWNLOADS, 'flickr8k', [pictures, texts])
    splits = data.load_captions('flickr8k', tmp_path / 'new')
    assert {s: [x.name for x in splits[s]] for s in splits} == SPLITS
    left = {p.name for p in (tmp_path / 'new' / 'flickr8k').iterdir()}
    assert left == {'images', 'texts'}
    (site / 'images.zip').unlink()
    assert data.load_captions('flickr8k', tmp_path / 'new') == splits  # nothing is fetched again


def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch, server):
    address, _ = server
    for source, message in (((f'{address}/images.zip', 'md5', '0' * 32), 'wrong md5 sum'),
                            ((f'{address}/images.zip', 'sha256', '0' * 64), 'wrong sha256 sum'),
                            ((f'{address}/nothing.zip', 'md5', '0'), 'cannot download.*404'),
                            (('http://127.0.0.1:9/x.zip', 'md5', '0'), 'cannot download')):
        monkeypatch.setitem(data.DOWNLOADS, 'flickr8k', [('.*', *source)])
        with pytest.raises(UserError, match=message):
            data.load_captions('flickr8k', tmp_path / 'new')
        assert list((tmp_path / 'new' / 'flickr8k').iterdir()) == []
    with pytest.raises(UserError, match='form at'):
        data.load_captions('flickr30k', tmp_path / 'new')


# -------------------------------------------------------------- vocabulary, batches, images, cache
def test_vocabulary():
    captions = [['a', 'dog'], ['a', 'cat'], ['a', 'dog', 'z']]
    vocabulary = Vocabulary.build(captions, max_size=3)
    assert vocabulary.words == ['a', 'dog', 'cat'] and len(vocabulary) == 7
    assert vocabulary.encode(['a', 'z', 'cat']) == [4, UNK, 6]
    assert vocabulary.decode([START, 4, UNK, 5, END, PAD]) == ['a', '<unk>', 'dog']
    assert Vocabulary.build(captions, min_count=2).words == ['a', 'dog']


def test_batches_hold_one_length_and_each_caption_once():
    lengths = np.random.default_rng(0).integers(3, 9, size=500)
    batches = data.length_batches(lengths, 32, np.random.default_rng(1))
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(len(set(lengths[b])) == 1 and len(b) <= 32 for b in batches)
    again = data.length_batches(lengths, 32, np.random.default_rng(2))
    assert [list(b) for b in batches] != [list(b) for b in again]


def test_every_kind_of_image_becomes_upright_rgb(tmp_path):
    rgb = np.zeros((40, 60, 3), np.uint8)
    rgb[:20, :30] = (200, 100, 50)  # the top left quarter
    picture = Image.fromarray(rgb)
    grey = np.asarray(picture.convert('L'))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held at a right angle
    alpha = picture.convert('RGBA')
    alpha.putalpha(Image.fromarray(np.where(rgb[:, :, 0] > 0, 255, 0).astype(np.uint8)))
    cases = {'plain.png': (picture, {}), 'grey.png': (picture.convert('L'), {}),
             'palette.png': (picture.quantize(4), {}), 'cmyk.tif': (picture.convert('CMYK'), {}),
             'deep.png': (Image.fromarray(grey.astype(np.uint16) * 257), {}),
             'float.tif': (Image.fromarray(grey.astype(np.float32) / grey.max()), {}),
             'alpha.png': (alpha, {}), 'bw.png': (picture.convert('1', dither=0), {}),
             'turned.jpg': (picture.transpose(Image.Transpose.ROTATE_90),
                            {'exif': exif, 'quality': 95, 'subsampling': 0})}
    for name, (image, options) in cases.items():
        image.save(tmp_path / name, **options)
        opened = data.open_image(tmp_path / name)
        assert opened.mode == 'RGB' and opened.size == (60, 40), name
        inside, outside = (np.asarray(opened)[y, x].astype(int) for y, x in ((10, 10), (30, 50)))
        want = {'grey.png': [grey[10, 10]] * 3, 'deep.png': [grey[10, 10]] * 3,
                'float.tif': [255] * 3,
                'bw.png': [255 * (grey[10, 10] > 127)] * 3}.get(name, [200, 100, 50])
        assert np.abs(inside - want).max() <= 6, (name, inside)
        assert np.abs(outside - (255 if name == 'alpha.png' else 0)).max() <= 6, (name, outside)
        assert data.load_image(tmp_path / name, 32).shape == (3, 32, 32)


@pytest.mark.parametrize('content, message', [
    (None, 'there is no image'), (b'', 'not an image'), (b'hello' * 99, 'not an image'),
    (b'\x89PNG\r\n\x1a\n' + b'\0' * 50, 'cannot be read|not an image')])
def test_files_that_are_no_images_are_named(tmp_path, content, message):
    path = tmp_path / 'photo.jpg'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        data.open_image(path)
    assert str(path) in str(error.value)


def test_a_truncated_jpeg_is_an_error(tmp_path):
    make_pictures(tmp_path, ['a.jpg'])
    path = tmp_path / 'a.jpg'
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match='a.jpg cannot be read'):
        data.open_image(path)


def test_feature_cache(tmp_path, capsys):
    write_layout(tmp_path / 'flickr8k', 'official')
    examples = data.load_captions('flickr8k', tmp_path)['train']
    def encode(images):  # three features that are easy to check
        return images.float().mean(dim=(2, 3)).unsqueeze(1)
    features = data.cache_arrays(examples, 32, tmp_path / 'cache', 'mean', encode, (1, 3))
    expected = [data.load_image(x.image, 32).mean(axis=(1, 2)) for x in examples]
    assert features.dtype == np.float16 and isinstance(features, np.memmap)
    np.testing.assert_allclose(features[:, 0], expected, rtol=2e-3)

    def never(images):
        raise AssertionError('the cache was not used')
    again = data.cache_arrays(examples, 32, tmp_path / 'cache', 'mean', never, (1, 3))
    np.testing.assert_array_equal(features, again)
    make_pictures(tmp_path / 'elsewhere', SPLITS['train'][::-1])
    moved = [x._replace(image=tmp_path / 'elsewhere' / x.name) for x in examples]
    for other in ((examples, 16, 'mean'), (examples[:2], 32, 'mean'), (examples, 32, 'other'),
                  (moved, 32, 'mean')):
        with pytest.raises(AssertionError):  # another size, data set or encoder is another cache
            data.cache_arrays(other[0], other[1], tmp_path / 'cache', other[2], never, (1, 3))
    file = Path(features.filename)
    whole = file.read_bytes()
    np.save(tmp_path / 'other.npy', np.zeros((3, 1, 2), np.float16))
    for broken in whole[:-2], whole[:50], b'', (tmp_path / 'other.npy').read_bytes():
        file.write_bytes(broken)
        again = data.cache_arrays(examples, 32, tmp_path / 'cache', 'mean', encode, (1, 3))
        np.testing.assert_allclose(again[:, 0], expected, rtol=2e-3)
        assert 'made again: it is ' in capsys.readouterr().out


def test_an_interrupted_feature_cache_is_taken_up_again(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
    examples, calls = [data.Example(x, []) for x in pixels], []

    def encode(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return images.float().mean(dim=(2, 3)).unsqueeze(1)
    with pytest.raises(KeyboardInterrupt):
        data.cache_arrays(examples, 16, tmp_path, 'mean', encode, (1, 3))
    part, = tmp_path.iterdir()
    part.write_bytes(part.read_bytes()[:-1])  # not even a whole row
    features = data.cache_arrays(examples, 16, tmp_path, 'mean', encode, (1, 3))
    assert calls == [32, 32, 32, 32, 5] and len(features) == 100  # 63 rows were there
    np.testing.assert_allclose(features[:, 0], pixels.mean(axis=(1, 2)), rtol=2e-3)
    assert [x.name for x in tmp_path.iterdir()] == [Path(features.filename).name]

    # What another program left under that name is not taken for features, now or after a stop.
    Path(features.filename).rename(part)
    part.write_bytes(b'junk' + part.read_bytes())
    calls[:] = [0, 0]
    with pytest.raises(KeyboardInterrupt):
        data.cache_arrays(examples, 16, tmp_path, 'mean', encode, (1, 3))
    features = data.cache_arrays(examples, 16, tmp_path, 'mean', encode, (1, 3))
    np.testing.assert_allclose(features[:, 0], pixels.mean(axis=(1, 2)), rtol=2e-3)
    monkeypatch.setattr(data.shutil, 'disk_usage', lambda folder: type('Disk', (), {'free': 500}))
    with pytest.raises(UserError, match='make room'):
        data.cache_arrays(examples, 16, tmp_path, 'other', encode, (1, 3))


def test_a_run_that_stops_leaves_the_rows_of_another_one_alone(tmp_path, monkeypatch):
    """Two runs begin at once; one stops when the other has written its first rows."""
    pixels = np.random.default_rng(0).integers(1, 256, (96, 16, 16, 3), dtype=np.uint8)
    paths = [tmp_path / f'{i}.png' for i in range(96)]
    for path, x in zip(paths, pixels):
        Image.fromarray(x).save(path)
    examples, calls = [data.Example(path, []) for path in paths], []
    begun, stopped = threading.Event(), threading.Event()

    def encode(images):
        calls.append(len(images))
        if len(calls) == 2:  # the first rows are written
            begun.set()
            stopped.wait(20)
        return images.float().mean(dim=(2, 3)).repeat(1, 500).unsqueeze(1)  # 96 kB a batch

    def interrupted(images):
        raise KeyboardInterrupt
    arguments = examples, 16, tmp_path / 'cache', 'mean'
    really_broken = data.broken_images
    with ThreadPoolExecutor(1) as pool:
        def meanwhile(paths):
            monkeypatch.setattr(data, 'broken_images', really_broken)
            others.append(pool.submit(data.cache_arrays, *arguments, encode, (1, 1500)))
            begun.wait(20)
            return {}
        others = []
        monkeypatch.setattr(data, 'broken_images', meanwhile)
        with pytest.raises(KeyboardInterrupt):
            data.cache_arrays(*arguments, interrupted, (1, 1500))
        stopped.set()
        features = others[0].result()
    np.testing.assert_allclose(features[:, 0, :3], pixels.mean(axis=(1, 2)), rtol=2e-3)


# ----------------------------------------------------------------------- encoders and checkpoints
@pytest.mark.parametrize('name, dim, grid', [
    ('vgg11', 512, (14, 14)), ('resnet18', 512, (7, 7)), ('densenet121', 1024, (7, 7)),
    ('efficientnet_b0', 1280, (7, 7)), ('convnext_tiny', 768, (7, 7)),
    ('regnet_y_400mf', 440, (7, 7)), ('mobilenet_v3_small', 576, (7, 7))])
def test_torchvision_encoders_are_the_classifier_before_its_pooling(name, dim, grid):
    import torchvision
    torch.manual_seed(0)
    encoder = Encoder(name, 224, pretrained=False)
    assert (encoder.feature_dim, encoder.grid) == (dim, grid)
    torch.manual_seed(0)
    classifier = torchvision.models.get_model(name).eval()
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = classifier((images - encoder.mean) / encoder.std)
        features = encoder(images).transpose(1, 2).unflatten(2, grid)
        if name == 'vgg11':
            features = F.max_pool2d(features, 2)
        if hasattr(classifier, 'avgpool'):
            features = classifier.avgpool(features)
        else:
            features = F.adaptive_avg_pool2d(features, 1)
        if name != 'convnext_tiny':  # its classifier flattens by itself
            features = features.flatten(1)
        head = classifier.fc if hasattr(classifier, 'fc') else classifier.classifier
        torch.testing.assert_close(head(features), expected)


def test_vgg19_is_the_papers_conv5_4():
    encoder = Encoder('vgg19', 224, pretrained=False)
    assert (encoder.feature_dim, encoder.grid) == (512, (14, 14))
    assert sum(isinstance(x, nn.Conv2d) for x in encoder.cnn) == 16
    assert isinstance(encoder.cnn[-1], nn.ReLU)


def test_a_frozen_encoder_never_changes_and_a_trained_one_learns():
    images = torch.rand(4, 3, 64, 64)
    frozen, trained = Encoder('resnet18', 64, pretrained=False), Encoder('tiny', 64)
    for encoder in (frozen, trained):
        before = encoder(images).clone()
        statistics = [b.clone() for b in encoder.buffers()]
        encoder.train()
        out = encoder(images)
        changed = any(not torch.equal(x, y) for x, y in zip(statistics, encoder.buffers()))
        assert out.requires_grad == changed == encoder.trainable
        if encoder is frozen:
            assert torch.equal(out, before)
        uint8 = (images * 255).round().to(torch.uint8)
        encoder.eval()
        torch.testing.assert_close(encoder(uint8), encoder(uint8 / 255))


def test_the_tiny_encoder_looks_at_the_middle_of_each_cell():
    encoder = Encoder('tiny', 64)
    for row, column in ((3, 3), (4, 2)):
        images = torch.rand(1, 3, 64, 64, requires_grad=True)
        encoder(images)[0, row * 8 + column].sum().backward()
        weight = images.grad[0].abs().sum(0)
        along = torch.arange(64) + 0.5
        y = float((weight.sum(1) * along).sum() / weight.sum())
        x = float((weight.sum(0) * along).sum() / weight.sum())
        assert abs(y - 8 * (row + 0.5)) < 1.5 and abs(x - 8 * (column + 0.5)) < 1.5


@needs_shared
def test_an_exported_encoder():
    encoder = Encoder(SHARED / 'encoders' / 'efficientnet_lite0.pt2', 224)
    assert (encoder.feature_dim, encoder.grid) == (1280, (7, 7))
    encoder.train()
    images = torch.rand(2, 3, 224, 224)
    plain = torch.export.load(SHARED / 'encoders' / 'efficientnet_lite0.pt2').module()
    normalised = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = plain(normalised).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(images), expected, atol=1e-4, rtol=1e-4)
    assert not encoder(images).requires_grad


def test_an_exported_encoder_learns_and_is_kept(tmp_path):
    torch.manual_seed(0)
    cnn = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), torch.nn.BatchNorm2d(8))
    cnn[1].running_mean.normal_()
    cnn.eval()
    dynamic = ({0: torch.export.Dim('B')},)
    program = torch.export.export(cnn, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / 'cnn.pt2')
    encoder = Encoder(tmp_path / 'cnn.pt2', 32, trainable=True).train()
    images = torch.rand(3, 3, 32, 32)
    before = encoder(images)
    before.square().sum().backward()
    cnn((images - encoder.mean) / encoder.std).square().sum().backward()
    for name, p in cnn.named_parameters():  # the gradient of the network that was exported
        torch.testing.assert_close(encoder.cnn.get_parameter(name).grad, p.grad)
    torch.optim.SGD(encoder.parameters(), lr=0.1).step()
    save_checkpoint(tmp_path / 'a.pt', tiny_captioner(D=8), encoder, Vocabulary(['a'] * 8), {})
    again = load_checkpoint(tmp_path / 'a.pt')[1]
    torch.testing.assert_close(again(images), encoder(images))
    assert not torch.allclose(again(images), before, atol=1e-2)


def test_an_encoder_that_is_not_there_is_said_in_one_line(tmp_path, monkeypatch, capfd):
    (tmp_path / 'text.pt2').write_text('hello')
    torch.save({}, tmp_path / 'zip.pt2')
    for name, message in (('resnet5000', 'no encoder is called'),
                          (tmp_path / 'none.pt2', 'cannot read the encoder'),
                          (tmp_path / 'text.pt2', 'torch.export.save wrote'),
                          (tmp_path / 'zip.pt2', 'cannot load'),
                          ('vit_b_16', 'no feature map'), ('swin_t', 'no feature map')):
        with pytest.raises(UserError, match=message):
            Encoder(name, 224, pretrained=False)
    assert 'Traceback' not in capfd.readouterr().err  # of torch's own log

    def no_network(*_, **__):
        raise OSError('no network')
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', no_network)
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', no_network)
    with pytest.raises(UserError, match='download https://download.pytorch.org/models/vgg19.*pth'):
        Encoder('vgg19', 224)


@pytest.mark.parametrize('attn', ['soft', 'none'])
def test_checkpoint_rebuilds_the_model_alone(tmp_path, attn):
    captioner, encoder = tiny_captioner(D=128, attn=attn), Encoder('tiny', 32)
    vocabulary = Vocabulary(['a', 'dog', 'caf\u00e9', 'x', 'y'])
    save_checkpoint(tmp_path / 'a.pt', captioner, encoder, vocabulary, {'lr': 0.1})
    again, encoder2, vocabulary2, settings = load_checkpoint(tmp_path / 'a.pt')
    images = torch.rand(3, 3, 32, 32)
    encoder.eval()
    expected = captioner.beam_search(encoder(images), 3, 9)
    for one, other in zip(expected, again.beam_search(encoder2(images), 3, 9)):
        assert [(h.tokens, h.log_prob) for h in one] == [(h.tokens, h.log_prob) for h in other]
    assert vocabulary2.words == vocabulary.words and settings == {'lr': 0.1}
    assert [p.name for p in tmp_path.iterdir()] == ['a.pt']
    save_checkpoint(tmp_path / 'half.pt', captioner, encoder, vocabulary, {}, half=True)
    half = load_checkpoint(tmp_path / 'half.pt')[0].state_dict()
    for name, weight in captioner.state_dict().items():  # float16 keeps 11 bits
        torch.testing.assert_close(half[name], weight, rtol=2 ** -11, atol=1e-7)
    weights = sum(p.numel() for p in [*captioner.parameters(), *encoder.parameters()])
    saved_bytes = [(tmp_path / name).stat().st_size for name in ('a.pt', 'half.pt')]
    assert 1.9 * weights < saved_bytes[0] - saved_bytes[1] < 2.1 * weights


# ------------------------------------------------------------- the commands, as a user calls them
def run(*command, cwd=HERE, **options):
    """Run one of the scripts as a process; its folder need not be the current one."""
    script, *arguments = map(str, command)
    script = script if script == '-m' else HERE / script
    environment = os.environ | {'NLTK_DATA': str(SHARED / 'nltk_data'), 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, script, *arguments], cwd=cwd, text=True,
                          capture_output=True, env=environment, timeout=300, **options)


TINY_RUN = ['--data', 'flickr8k', '--data-dir', 'd', '--encoder', 'tiny', '--image-size', '32',
            '--min-count', '1', '--embed-dim', '8', '--hidden-dim', '8', '--attn-dim', '8',
            '--batch-size', '4', '--epochs', '3', '--patience', '9', '--device', 'cpu']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a small data set and a run that was trained on it by the command."""
    folder = tmp_path_factory.mktemp('with space \u00e9')
    write_layout(folder / 'd' / 'flickr8k', 'official')
    result = run('train.py', *TINY_RUN, '--name', 'whole', cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_train_prints_what_a_user_wants_to_see(trained):
    folder, out = trained
    for text in ('3 training images, 15 captions', 'epoch 1/3', 'captions/s', 'min left',
                 'val BLEU-4', 'flickr8k test: 1 images', 'the paper', '18.93', 'people'):
        assert text in out, text
    whole = folder / 'runs' / 'whole'
    assert {p.name for p in whole.iterdir()} == {
        'attention-01.png', 'attention-02.png', 'attention-03.png', 'best.pt', 'last.pt',
        'log.txt', 'test-results.json', 'test-references.json'}
    # The vocabulary is that of the training captions: "d" and "e" name the held-out images only.
    assert set(load_checkpoint(whole / 'best.pt')[2].words) == set('a b c dog number 0 1 2 3 4'
                                                                   .split())


def same(one, other):
    """Whether two nested values are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize('attn, batch', [('soft', '4'), ('hard', '15')])  # 4 steps an epoch, 1
def test_an_interrupted_run_goes_on_to_the_same_weights(trained, attn, batch):
    folder, _ = trained
    whole, cut = f'whole-{attn}', f'cut-{attn}'
    settings = [*TINY_RUN, '--attn', attn, '--batch-size', batch, '--epochs', '15']
    result = run('train.py', *settings, '--name', whole, cwd=folder)
    assert result.returncode == 0, result.stderr
    command = [sys.executable, '-u', HERE / 'train.py', *settings, '--name', cut]
    environment = os.environ | {'OMP_NUM_THREADS': '1'}  # the same sums in the same order
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True,
                          env=environment) as process:
        for line in process.stdout:
            if 'epoch 1/15' in line:
                process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    result = run('train.py', '--resume', f'runs/{cut}', cwd=folder)
    assert result.returncode == 0, result.stderr
    whole, cut = (torch.load(folder / 'runs' / name / 'last.pt') for name in (whole, cut))
    # All but the run's name: weights, optimiser, generators, best score, position.
    for part in ('captioner', 'encoder', 'training', 'words', 'config'):
        assert same(cut[part], whole[part]), part


def test_two_processes_train_like_one(trained):
    folder, _ = trained
    torch.manual_seed(0)
    cnn = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), torch.nn.ReLU())
    exported = torch.export.export(cnn, (torch.zeros(2, 3, 32, 32),),
                                   dynamic_shapes=({0: torch.export.Dim('B')},))
    torch.export.save(exported, folder / 'cnn.pt2')
    settings = [*TINY_RUN, '--encoder', 'cnn.pt2', '--dropout', '0', '--input-dropout', '0',
                '--epochs', '5']  # 20 steps
    one = run('train.py', *settings, '--name', 'one', cwd=folder)
    # Python's threads wait longer for each other here than usual: one of gloo's that still frees a
    # tensor while Python ends aborts the process.
    (folder / 'slow.py').write_text(
        'import runpy, sys\nsys.setswitchinterval(0.02)\n'
        f'sys.path.insert(0, {str(HERE)!r})\n'
        f'runpy.run_path({str(HERE / "train.py")!r}, run_name="__main__")\n')
    two = run('-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', 'slow.py',
              *settings, '--name', 'two', cwd=folder)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    losses = [re.findall(r'loss ([\d.]+)', result.stdout) for result in (one, two)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    one, two = (torch.load(folder / 'runs' / x / 'last.pt')['captioner'] for x in ('one', 'two'))
    for name in one:  # Adam would make a small difference in a gradient a large one here
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('attn, score, samples', [
    ('soft', 'additive', 1), ('soft', 'dot', 1), ('hard', 'additive', 1), ('hard', 'additive', 3),
    ('none', 'additive', 1)])
def test_a_training_step_never_asks_the_device_for_a_value(attn, score, samples):
    """Tensors on the device 'meta' have no values: whoever wants one, such as .item(), fails."""
    captioner = Captioner(CaptionerConfig(50, 32, attn, score)).to('meta').train()
    optimizer = torch.optim.Adam(captioner.parameters())
    a = torch.empty(8, 9, 32, device='meta')
    captions = torch.empty(8, 6, dtype=torch.long, device='meta')
    loss, numbers = batch_loss(captioner, a, captions, Settings(attn=attn, samples=samples),
                               torch.zeros((), device='meta'))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(captioner.parameters(), 5.0)
    optimizer.step()
    assert loss.is_meta and all(weight.grad.is_meta for weight in captioner.parameters())


def test_rows_of_an_array_and_of_a_tensor_are_the_same():
    array, index = np.arange(24, dtype=np.float16).reshape(6, 2, 2), np.array([4, 0, 4])
    cpu = torch.device('cpu')
    assert data.to_gpu(array, cpu) is array  # there is no GPU to put it on
    for kind in (array, torch.from_numpy(array)):
        rows = data.read_rows(kind, index, cpu)
        np.testing.assert_array_equal(rows.numpy(), array[[4, 0, 4]])


def test_without_a_compiler_training_goes_on(monkeypatch, capsys):
    captioner = tiny_captioner()

    def no_compiler(step):
        def fail(*_):
            raise RuntimeError('no C++ compiler')
        return fail
    monkeypatch.setattr(torch, 'compile', no_compiler)
    train.compile_step(captioner, 4, Settings(), torch.device('cpu'))
    assert 'no C++ compiler' in capsys.readouterr().out
    captioner(torch.zeros(2, 4, captioner.config.feature_dim), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize('attn', ['soft', 'hard'])
def test_a_compiled_step_has_the_same_gradient(monkeypatch, attn):
    """Traced and differentiated by the compiler, but run as it is: that takes no C++ compiler."""
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))
    captioner = tiny_captioner(attn=attn, dropout=0.0)
    a, captions = torch.randn(6, 4, captioner.config.feature_dim), torch.randint(4, 9, (6, 5))
    s = torch.randint(0, 4, (6, 4)) if attn == 'hard' else None

    def gradient():
        out = captioner(a, captions, s=s)
        seen = out.alphas if s is None else out.log_p_s
        loss = out.logits.log_softmax(2)[:, :, 4:].sum() + seen.square().sum()
        return torch.autograd.grad(loss, list(captioner.parameters()))
    plain, step = gradient(), captioner.step
    train.compile_step(captioner, 4, Settings(), torch.device('cpu'))
    assert captioner.step != step
    torch.testing.assert_close(gradient(), plain)


@pytest.mark.skipif(sys.platform != 'linux', reason="it is about Linux's allocator")
def test_freed_memory_is_not_fetched_anew():
    """Page faults of arrays of 40 MB, one after the other, by the system's own count."""
    code = """if True:
        import resource, sys, torch, data
        if sys.argv[1] == 'keep':
            data.keep_memory()
        faults = []
        for _ in range(40):
            torch.ones(10_000_000)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(faults[-1] - faults[20])"""
    kept, plain = (int(subprocess.run([sys.executable, '-c', code, how], cwd=HERE, check=True,
                                      capture_output=True).stdout) for how in ('keep', 'plain'))
    assert kept < plain / 5


def test_batches_are_read_ahead_in_order():
    begun = []
    for i, (batch, rows) in enumerate(data.ahead([3, 1, 2], lambda x: begun.append(x) or x * 10)):
        assert (batch, rows) == ([3, 1, 2][i], [30, 10, 20][i])
    assert begun == [3, 1, 2] and list(data.ahead([], None)) == []
    with pytest.raises(OSError):  # what fails in the thread is not lost
        list(data.ahead([1], lambda x: open('/no such file')))


def test_a_cnn_learns_only_from_its_epoch_on(trained):
    folder, _ = trained
    torch.manual_seed(0)
    before = Encoder('tiny', 32).state_dict()
    for epoch in (0, 1):
        result = run('train.py', *TINY_RUN, '--epochs', '1', '--finetune-from', epoch,
                     '--name', f'from-{epoch}', cwd=folder)
        assert result.returncode == 0, result.stderr
        after = load_checkpoint(folder / 'runs' / f'from-{epoch}' / 'last.pt')[1].state_dict()
        assert same(before, after) == (epoch == 1)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_good(trained):
    folder, _ = trained
    for attn in ('soft', 'hard'):
        result = run('train.py', *TINY_RUN, '--attn', attn, '--lr', '1e38', '--name',
                     f'nan-{attn}', cwd=folder)
        assert result.returncode == 2 and 'Traceback' not in result.stderr
        assert 'the loss is not a number in epoch' in result.stderr
        captioner, *_ = load_checkpoint(folder / 'runs' / f'nan-{attn}' / 'last.pt')
        assert all(torch.isfinite(weight).all() for weight in captioner.parameters())


def test_eval_and_the_score_command_agree(trained):
    folder, _ = trained
    result = run('train.py', '--eval', 'runs/whole', '--split', 'val', '--beam', '2', cwd=folder)
    assert result.returncode == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if line.startswith('this model'))
    scored = run('bleu_meteor.py', 'runs/whole/val-results.json', 'runs/whole/val-references.json',
                 cwd=folder)
    assert scored.returncode == 0, scored.stderr
    line = next(line for line in scored.stdout.splitlines() if line.startswith('BLEU-1 .. 4'))
    assert line.split()[3:] == row.split()[4:8] and float(line.split()[3]) > 0


def test_an_ensemble_is_scored(trained):
    folder, _ = trained
    shutil.copytree(HERE / 'pretrained', folder / 'models')  # results are written beside the first
    result = run('train.py', '--eval', 'models/soft.pt', 'models/hard.pt', '--data-dir', 'd',
                 cwd=folder)
    assert result.returncode == 0, result.stderr
    assert '2 models (hard and soft attention) ' in result.stdout
    assert '\nthe paper' not in result.stdout  # it has no row for both
    assert json.loads((folder / 'models' / 'test-ensemble-results.json').read_text())


@pytest.mark.parametrize('attn, score, cell', [
    ('soft', 'additive', 'lstm'), ('soft', 'dot', 'lstm'), ('hard', 'additive', 'lstm'),
    ('none', 'additive', 'lstm'), ('soft', 'additive', 'rnn'), ('none', 'additive', 'rnn')])
def test_every_rung_learns_a_batch_by_heart(attn, score, cell):
    torch.manual_seed(0)
    a, words = torch.randn(8, 6, 10), torch.randint(4, 20, (8, 5))
    captions = torch.cat([torch.full((8, 1), START), words, torch.full((8, 1), END)], dim=1)
    captioner = Captioner(CaptionerConfig(20, 10, attn, score, cell, 24, 24, 24, dropout=0.0))
    optimizer = torch.optim.Adam(captioner.parameters(), lr=0.01)
    settings, baseline, losses = Settings(attn=attn), 0.0, []
    for _ in range(150):
        loss, numbers = batch_loss(captioner, a, captions, settings, baseline)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        baseline = 0.9 * baseline + 0.1 * float(numbers.get('reward', 0))
        losses.append(float(numbers['nll/word']))
    assert losses[0] > 2.5 and losses[-1] < 0.3
    found = captioner.eval().beam_search(a, 3, 9)
    assert sum(h[0].tokens == c.tolist() for h, c in zip(found, captions[:, 1:])) >= 7


def test_hard_attention_that_always_takes_the_expectation_is_soft_attention():
    a, captions, found = torch.randn(4, 6, 10), torch.randint(4, 20, (4, 5)), []
    for attn in ('soft', 'hard'):
        torch.manual_seed(0)
        captioner = Captioner(CaptionerConfig(20, 10, attn, 'additive', 'lstm', 8, 8, 8, 0.0))
        settings = Settings(attn=attn, lambda_ds=0.0, lambda_h=0.0, samples=1)
        loss, numbers = batch_loss(captioner, a, captions, settings, -3.0, expected=1.0)
        found.append(torch.autograd.grad(loss, list(captioner.parameters())))
    torch.testing.assert_close(*found)
    assert numbers['sampled'] == 0


def test_bfloat16_changes_the_gradient_little():
    a, captions = torch.randn(16, 9, 32), torch.randint(4, 50, (16, 8))
    for attn, score in (('soft', 'additive'), ('soft', 'dot'), ('none', 'additive'),
                        ('hard', 'additive')):
        torch.manual_seed(0)
        captioner = Captioner(CaptionerConfig(50, 32, attn, score, 'lstm', 24, 24, 24, 0.0))
        losses, gradients = [], []
        for amp in (False, True):
            with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                loss, _ = batch_loss(captioner, a, captions, Settings(attn=attn), expected=1.0)
                out = captioner(a, captions)
            parts = torch.autograd.grad(loss, list(captioner.parameters()))
            losses.append(loss.item())
            gradients.append(torch.cat([x.flatten() for x in parts]))
        assert out.logits.dtype == torch.bfloat16
        if attn != 'none':  # the weights are summed to 1 in full precision
            torch.testing.assert_close(out.alphas.sum(2), torch.ones(16, 7))
        assert losses[1] == pytest.approx(losses[0], rel=5e-3)
        assert F.cosine_similarity(*gradients, dim=0) > 0.999


def test_no_run_is_overwritten(trained):
    folder, _ = trained
    for name in ('flickr8k-none', 'flickr8k-none-2'):
        result = run('train.py', *TINY_RUN, '--attn', 'none', '--epochs', '1', cwd=folder)
        assert result.returncode == 0, result.stderr
        assert (folder / 'runs' / name / 'best.pt').exists()


def test_sample_captions_files_and_folders(trained, tmp_path):
    folder, _ = trained
    make_pictures(tmp_path / 'photos', ['b.jpg', 'a.jpg'])
    checkpoint = folder / 'runs' / 'whole' / 'best.pt'
    result = run('sample.py', tmp_path / 'photos', '--checkpoint', checkpoint, '--top', '2')
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [Path(line.split(': ')[0]).name for line in lines] == ['a.jpg'] * 2 + ['b.jpg'] * 2
    with Image.open(tmp_path / 'photos' / 'a.attention.png') as picture:
        assert picture.width > 200 and picture.height > 200
    again = run('sample.py', tmp_path / 'photos', '--json', '--out', tmp_path, cwd=folder)
    found = json.loads(again.stdout)  # the newest run, and no captions of its own pictures
    assert [Path(x['image']).name for x in found] == ['a.jpg', 'b.jpg']
    assert all(x['captions'][0]['log_prob'] < 0 and Path(x['picture']).exists() for x in found)


# ---------------------------------------------------------- what users and disks do to files
@pytest.mark.parametrize('attn', ['soft', 'hard'])
def test_the_models_that_come_along_caption_drawings_at_once(tmp_path, attn):
    said = {'dog': 'dog', 'surfer': 'surf|water', 'children': 'child|boy|girl|people|men'}
    for name in said:
        shutil.copy(HERE / 'figures' / f'{name}.png', tmp_path)
    choice = ['--checkpoint', HERE / 'pretrained' / 'hard.pt'] if attn == 'hard' else []
    result = run('sample.py', '.', *choice, cwd=tmp_path)  # no run is there
    assert result.returncode == 0, result.stderr
    assert f'{attn}.pt' in result.stderr  # which model it was
    captions = dict(line.split('.png: ') for line in result.stdout.splitlines())
    for name, words in said.items():
        assert re.search(words, captions[name]), captions
        assert (tmp_path / f'{name}.attention.png').exists()
    sizes = [path.stat().st_size for path in (HERE / 'pretrained').iterdir()]
    assert sum(sizes) <= 40e6


def mutations(content, count, seed):
    """`count` damaged copies of some bytes: flipped, cut, repeated, overwritten."""
    rng = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 3, 10))):
            i, j = sorted(rng.randrange(len(damaged) + 1) for _ in 'ij')
            kind = rng.choice(('flip', 'flip', 'cut', 'drop', 'repeat', 'noise'))
            if kind == 'flip' and i < len(damaged):
                damaged[i] ^= 1 << rng.randrange(8)
            elif kind == 'cut':
                del damaged[j:]
            elif kind == 'drop':
                del damaged[i:min(j, i + 20)]
            elif kind == 'repeat':
                damaged[i:i] = damaged[i:min(j, i + 200)]
            elif kind == 'noise':
                damaged[i:i + 4] = rng.randbytes(4)
        yield bytes(damaged)


@pytest.mark.parametrize('ending', ['jpg', 'png'])
def test_damaged_images_are_pictures_or_one_line(tmp_path, ending):
    path, refused = tmp_path / f'a.{ending}', 0
    Image.fromarray(data.make_shapes(1, 'fuzz')[0].image).save(path)
    for content in mutations(path.read_bytes(), 300, ending):
        path.write_bytes(content)
        try:
            assert data.load_image(path, 32).shape == (3, 32, 32)
        except UserError as error:
            assert str(path) in str(error) and '\n' not in str(error)
            refused += 1
    assert 100 < refused < 300  # some were damaged in a place that does not matter


@pytest.mark.parametrize('name, layout', [
    ('flickr8k', 'official'), ('flickr8k', 'kaggle8k'), ('flickr30k', 'token30k'),
    ('flickr30k', 'kaggle30k'), ('flickr8k', 'karpathyflickr8k'), ('coco', 'coco')])
def test_damaged_caption_files_are_read_or_one_line(tmp_path, monkeypatch, name, layout):
    monkeypatch.setattr(data, 'KARPATHY', ('file:///none', 'md5', ''))
    folder = tmp_path / name
    write_layout(folder, layout)
    endings = ('.json', '.csv', '.token', '.txt')
    path = min((p for p in folder.rglob('*') if p.name.endswith(endings)
                and 'Images.txt' not in p.name), key=lambda p: p.name)
    outcomes = []
    for number, content in enumerate(mutations(path.read_bytes(), 300, layout)):
        path.write_bytes(content)
        try:
            splits = data.load_captions(name, tmp_path, skip_bad=number % 2)
            texts = [c for split in splits.values() for x in split for c in x.captions]
            assert texts and all(isinstance(text, str) and text.strip() for text in texts)
            outcomes.append(number % 2)
        except UserError as error:
            assert '\n' not in str(error)
            outcomes.append('refused')
    assert len(set(outcomes)) == 3  # some were refused, some were good, some were good in parts


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    path, refused = tmp_path / 'a.pt', 0
    save_checkpoint(path, tiny_captioner(D=128), Encoder('tiny', 32), Vocabulary('abcde'), {})
    whole = torch.load(path)['captioner']
    for content in mutations(path.read_bytes(), 100, 'checkpoint'):
        path.write_bytes(content)
        try:
            captioner = load_checkpoint(path)[0]
            assert same(captioner.state_dict(), whole)  # the damage was where nothing is
        except UserError as error:
            assert str(path) in str(error) and '\n' not in str(error)
            refused += 1
    assert refused > 70


def test_an_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch, server):
    link = zipfile.ZipInfo('link')
    link.external_attr = 0o120777 << 16  # a symbolic link, as Unix packs it
    with zipfile.ZipFile(tmp_path / 'site' / 'evil.zip', 'w') as archive:
        for name in ('../up.txt', '../../up.txt', f'{tmp_path}/absolute.txt', 'good.txt'):
            archive.writestr(name, 'text')
        archive.writestr(link, str(tmp_path))
        archive.writestr('link/through.txt', 'text')
    before = set(tmp_path.iterdir())
    address, site = server
    source = f'{address}/evil.zip', 'md5', md5((site / 'evil.zip').read_bytes()).hexdigest()
    try:
        data.download(*source, tmp_path / 'd' / 'flickr8k')
    except UserError:
        pass  # a file below what is not a folder may stop it
    inside = tmp_path / 'd' / 'flickr8k'
    assert set(tmp_path.iterdir()) - before == {tmp_path / 'd'}
    assert {p.name for p in (tmp_path / 'd').iterdir()} == {'flickr8k'}
    assert not any(p.is_symlink() for p in inside.rglob('*'))


def huge_png():
    """The head of a picture of 20,000 x 20,000 pixels."""
    head = b'IHDR' + (20000).to_bytes(4, 'big') * 2 + bytes([8, 2, 0, 0, 0])
    sum_of_it = zlib.crc32(head).to_bytes(4, 'big')
    return b'\x89PNG\r\n\x1a\n\0\0\0\r' + head + sum_of_it + b'\0\0\0\x10IDAT' + bytes(20)


def saved(**content):
    """The bytes of a file that torch.save wrote."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


class Code:
    def __reduce__(self):
        return os.mkdir, ('it ran',)


TRAIN = ['train.py', *TINY_RUN]
EVAL = ['train.py', '--eval', 'runs/whole']
SAMPLE = ['sample.py', '--checkpoint', 'runs/whole/best.pt']
IMAGE, TOKENS = 'd/flickr8k/Flicker8k_Dataset/b.jpg', 'd/flickr8k/Flickr8k.token.txt'
BEST, KARPATHY = 'runs/whole/best.pt', 'd/flickr8k/dataset_flickr8k.json'
SCORE = ['bleu_meteor.py', 'bad.json', 'runs/whole/test-references.json']
# What is wrong: the file that is changed and its new content, a number of bytes to cut it to, or
# None where it is gone; the command; what its one line says.
FAULTS = {
    'no data folder': ({}, ['train.py', '--data', 'flickr30k', '--data-dir', 'nowhere'],
                       'nowhere/flickr30k has no images. .* form at'),
    'no images': ({'d/flickr30k/results_20130124.token': b'a.jpg#0\tA dog .'},
                  ['train.py', '--data', 'flickr30k', '--data-dir', 'd'], 'd/flickr30k has no im'),
    'no caption in a line': ({TOKENS: b'a.jpg#0\tA dog .\nb.jpg'}, TRAIN, 'token.txt, line 2: not '
                             '.*: b.jpg .*--skip-bad'),
    'a line not in UTF-8': ({TOKENS: b'a.jpg#0\t\xff dog'}, TRAIN, 'token.txt, line 1: not'),
    'a caption without its image': ({IMAGE: None}, TRAIN, 'captions for b.jpg, which is not'),
    'an image without caption': ({TOKENS: b'a.jpg#0\tA dog .'}, TRAIN, 'b.jpg has no caption .an'),
    'an empty caption': ({KARPATHY: b'{"images": [{"filename": "a.jpg", "split": "train", '
                                    b'"sentences": [{"raw": " "}]}]}'}, TRAIN, 'a.jpg has an emp'),
    'captions cut short': ({KARPATHY: b'{"images": [{"filename": "a.jpg", '}, TRAIN,
                           'dataset_flickr8k.json is not JSON, or not all of it'),
    'captions of another program': ({KARPATHY: b'{"pictures": []}'}, TRAIN, 'has no images: get'),
    'a truncated image': ({IMAGE: 600}, TRAIN, 'b.jpg cannot be read .*[Tt]runcated.*--skip-bad'),
    'an empty image': ({IMAGE: 0}, TRAIN, 'b.jpg cannot be read .it is not an image'),
    'no checkpoint': ({}, ['train.py', '--resume', 'runs/none'], 'is no checkpoint runs/none'),
    'no training to go on with': ({}, ['train.py', '--resume', BEST], 'best.pt holds a model and '),
    'half a checkpoint': ({BEST: 9000}, EVAL, 'best.pt is not a checkpoint, or not all of one'),
    "another program's": ({BEST: saved(w=torch.ones(2))}, EVAL, "this program reads 'show-att"),
    'another version': ({BEST: saved(format='show-attend-tell 9')}, EVAL, "format 'show-attend-te"),
    'code': ({BEST: saved(format=Code())}, EVAL, 'best.pt holds more than weights.*is not loaded'),
    'an ensemble of CNNs that learned': ({}, [*EVAL, BEST], 'whole/best.pt are no ensemble: that'),
    'no words': ({}, [*TRAIN, '--min-count', '99'], 'no word occurs 99 times.*--min-count'),
    'no beam': ({}, [*EVAL, '--beam', '0'], '--beam must be at least 1'),
    'too wide a beam': ({}, [*TRAIN, '--beam', '99'], '--beam 99: it must be from 1 to'),
    'no such GPU': ({}, [*TRAIN, '--device', 'cuda:99'], '--device cuda:99 cannot be used here'),
    'no encoder': ({}, [*TRAIN, '--encoder', 'none.pt2'], 'cannot read the encoder none.pt2'),
    'no such CNN': ({}, [*TRAIN, '--encoder', 'alexnet9'], 'alexnet9'),
    'no cache folder': ({'c': b'a file'}, [*TRAIN, '--cache-dir', 'c'], 'c: '),
    'another size': ({}, [*EVAL, '--hidden-dim', '9'], '--hidden-dim is 8 in this run'),
    'no image': ({}, [*SAMPLE, 'none.jpg'], 'there is no image none.jpg'),
    'no picture': ({'bad.jpg': b'hello'}, [*SAMPLE, 'bad.jpg', IMAGE], 'bad.jpg cannot be read'),
    'no pixels': ({'bad.bmp': b'BM' + bytes(12) + b'\x28' + bytes(40)}, [*SAMPLE, 'bad.bmp'],
                  'bad.bmp cannot be read'),
    'too many pixels': ({'bad.png': huge_png()}, [*SAMPLE, 'bad.png'], 'more than 179 million pix'),
    'no images here': ({'empty/a.txt': b''}, [*SAMPLE, 'empty'], 'the folder empty has no images'),
    'no place for pictures': ({'out': b''}, [*SAMPLE, IMAGE, '--out', 'out'], 'cannot write out/b'),
    'a beam of nothing': ({}, [*SAMPLE, IMAGE, '--beam', '0'], '--beam 0: it must be from 1'),
    'no results': ({}, SCORE, 'bad.json'),
    'results cut short': ({'bad.json': b'[{"image_id": '}, SCORE, '-h says what the files hold'),
    'references that are no list': ({'bad.json': b'[{"image_id": 1, "caption": "a"}]',
                                     'good.json': b'{"1": "a dog"}'}, [*SCORE[:2], 'good.json'],
                                    'the references of 1 are not a list of captions'),
    'results of other images': ({'bad.json': b'[{"image_id": 7, "caption": "a"}]'}, SCORE,
                                "1 of 1 results have no reference, such as .'7'"),
}


@pytest.fixture(scope='module')
def faults(trained, tmp_path_factory):
    """Every command of FAULTS in its own copy of `trained`, two at a time -> folder, result."""
    def attempt(fault):
        folder = tmp_path_factory.mktemp('fault') / 'copy'
        for part in ('d', 'runs/whole'):
            shutil.copytree(trained[0] / part, folder / part)
        changes, command, _ = FAULTS[fault]
        for name, content in changes.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[:content] if isinstance(content, int)
                                 else content)
        before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
        return before, run(*command, cwd=folder)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAULTS, pool.map(attempt, FAULTS)))


@pytest.mark.parametrize('fault', FAULTS)
def test_what_a_user_can_put_right_is_said_in_one_line(faults, fault):
    before, result = faults[fault]
    errors = [line for line in result.stderr.splitlines() if not line.startswith('model: ')]
    assert result.returncode == 2 and len(errors) == 1, result.stderr
    assert re.search(f'error: .*{FAULTS[fault][2]}', errors[0])
    for path, content in before.items():
        assert path.read_bytes() == content, path
    if fault == 'no picture':  # one bad file does not stop the others
        assert any(path.with_name('b.attention.png').exists() for path in before)


def test_skip_bad_goes_on_without_what_is_bad_and_counts_it(trained, tmp_path):
    shutil.copytree(trained[0] / 'd', tmp_path / 'd')
    with open(tmp_path / TOKENS, 'ab') as file:
        file.write(b'nonsense\na.jpg#9\t\xff\ngone.jpg#0\tA dog .\n')
    with open(tmp_path / 'd/flickr8k/Flickr_8k.trainImages.txt', 'a') as file:
        file.write('\ngone.jpg')
    (tmp_path / IMAGE).write_bytes((tmp_path / IMAGE).read_bytes()[:600])
    result = run(*TRAIN, '--epochs', '1', '--skip-bad', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'left out 4 bad captions and images: ' in result.stdout
    assert '2 training images, 10 captions' in result.stdout


def test_one_image_and_captions_of_every_kind(tmp_path):
    folder = tmp_path / 'd' / 'flickr8k'
    folder.mkdir(parents=True)
    name = 'ein gro\u00dfer Hund.jpg'
    make_pictures(folder, [name])
    for split in ('train', 'dev', 'test'):
        (folder / f'Flickr_8k.{split}Images.txt').write_text(name, encoding='utf-8')
    captions = ['dog', 'Ein gro\u00dfer Hund l\u00e4uft \u00fcber die Stra\u00dfe .',
                '\u4e00\u53ea\u72d7', ' '.join(f'word{i}' for i in range(60)), '. . .']
    lines = [f'{name}#{i}\t{caption}' for i, caption in enumerate(captions)]
    (folder / 'Flickr8k.token.txt').write_text('\n'.join(lines), encoding='utf-8')
    result = run(*TRAIN, '--epochs', '2', '--max-len', '70', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert '1 training images, 5 captions' in result.stdout
    words = load_checkpoint(tmp_path / 'runs/flickr8k-soft/best.pt')[2].words
    assert {'\u4e00\u53ea\u72d7', 'stra\u00dfe', 'word59', 'dog'} <= set(words)
    result = run('sample.py', folder / name, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (folder / 'ein gro\u00dfer Hund.attention.png').exists()


def test_the_same_command_writes_the_same_log(trained):
    folder, _ = trained
    data_before = {p: p.stat().st_mtime for p in (folder / 'd').rglob('*')}
    result = run(*TRAIN, '--name', 'again', cwd=folder)
    assert result.returncode == 0, result.stderr
    assert data_before == {p: p.stat().st_mtime for p in (folder / 'd').rglob('*')}
    whole, again = (folder / 'runs' / name / 'log.txt' for name in ('whole', 'again'))
    assert whole.read_text() == again.read_text() and whole.read_text().count('epoch') == 3


def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_weights(trained):
    """KILLS=20 in the environment kills it twenty times, at random moments."""
    folder, _ = trained
    kills = int(os.environ.get('KILLS', 2))
    settings = [*TRAIN[1:], '--cell', 'rnn', '--epochs', 8 + 2 * kills, '--patience', '99']
    result = run('train.py', *settings, '--name', 'calm', cwd=folder)
    assert result.returncode == 0, result.stderr
    last, rng = folder / 'runs' / 'killed' / 'last.pt', random.Random(0)
    environment = os.environ | {'OMP_NUM_THREADS': '1'}

    def command():
        if last.exists():
            return ['--resume', 'runs/killed']
        shutil.rmtree(last.parent, ignore_errors=True)  # it was killed before it began
        return [*map(str, settings), '--name', 'killed']
    while kills:
        with subprocess.Popen([sys.executable, '-u', HERE / 'train.py', *command()], cwd=folder,
                              stdout=subprocess.PIPE, env=environment) as process:
            for line in process.stdout:
                if line.startswith(b'run: '):  # it begins: give it half a second at most
                    threading.Timer(rng.uniform(0, 0.5), process.kill).start()
            killed = process.wait() == -signal.SIGKILL
        kills -= killed
        if last.exists():
            load_checkpoint(last)
        if not killed:  # it came to its end: begin anew
            last.unlink()
    result = run('train.py', *command(), cwd=folder)
    assert result.returncode == 0, result.stderr
    calm, killed = (torch.load(folder / 'runs' / name / 'last.pt') for name in ('calm', 'killed'))
    for part in ('captioner', 'encoder', 'training'):
        assert same(calm[part], killed[part]), part


def test_a_full_disk_keeps_the_checkpoint_that_was_there(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / 'copy')
    last = tmp_path / 'copy' / 'runs' / 'whole' / 'last.pt'
    before = last.read_bytes()
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
    result = run('train.py', '--resume', 'runs/whole', '--epochs', '4', cwd=tmp_path / 'copy',
                 preexec_fn=full)
    assert result.returncode == 2 and 'Traceback' not in result.stderr, result.stderr
    assert re.search(r'error: cannot write .*\.pt .*is the disk full', result.stderr)
    assert last.read_bytes() == before and not list(last.parent.glob('*.part'))


# -------------------------------------------------------------------------------------- drawing
def test_the_attention_map_lies_where_the_weight_is():
    for grid in ((7, 7), (14, 14), (4, 6)):
        alpha = np.full(grid, 0.01)
        alpha[1, 2] = 1.0
        weights = attention_map(alpha.flatten(), grid, (224, 224))
        y, x = np.unravel_index(weights.argmax(), weights.shape)
        assert abs(y - 1.5 * 224 / grid[0]) < 0.1 * 224 / grid[0]
        assert abs(x - 2.5 * 224 / grid[1]) < 0.1 * 224 / grid[1]
        assert weights.max() == pytest.approx(1) and weights[-1, -1] < 0.1
    flat = attention_map(np.full(49, 1 / 49), (7, 7), (100, 50))
    assert flat.shape == (50, 100) and flat.min() == flat.max() == 1


def test_a_drawing_has_a_panel_for_each_word():
    image = Image.new('RGB', (60, 30), 'red')
    for T, across, down in ((1, 2, 1), (11, 6, 2), (12, 6, 3)):
        alphas = np.tile([1.0, 0, 0, 0], (T + 1, 1))  # all on the upper left quarter
        sheet = draw_attention(image, ['dog'] * T, alphas, np.ones(T + 1), (2, 2))
        red = np.asarray(sheet)[:, :, 0].astype(int) - np.asarray(sheet)[:, :, 1] > 30
        rows, columns = (np.diff(np.flatnonzero(red.any(axis=k)), prepend=-9) > 5 for k in (1, 0))
        assert (columns.sum(), rows.sum()) == (across, down)
    plain = draw_attention(image, ['dog', 'runs'])  # without attention: one panel
    assert plain.width < 1.2 * PANEL and (np.asarray(plain)[-20, 50] == [255, 0, 0]).all()


def test_the_readmes_map_names_what_is_there():
    import importlib
    checked = 0
    for row in (HERE / 'README.md').read_text(encoding='utf-8').splitlines():
        if row.startswith('|') and '.py`' in row:
            module = None
            for name in re.findall(r'`([\w.]+)`', row.rsplit('|', 2)[1]):
                if name.endswith('.py'):
                    module = importlib.import_module(name[:-3])
                    continue
                thing = module
                for part in name.split('.'):
                    thing = getattr(thing, part)
                assert callable(thing)
                checked += 1
    assert checked >= 18
