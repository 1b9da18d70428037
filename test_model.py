"""Tests, in the order of the modules: each compares the code with something that is not the code.

    python -m pytest -q test_model.py

Comparisons are with torch's own cells, NLTK, coco-caption's output, sums over all possibilities,
and test_golden.npz: numbers from the authors' own Theano program (float32; theirs are row vectors,
gates in the order i, f, o, g, word 0 is <eos>, and the first word's vector is zero).
"""
import hashlib
import importlib
import itertools
import json
import math
import operator
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import unicodedata
import zipfile
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nltk.translate.bleu_score
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.export import Dim
from torch.nn import functional as F
from torch.testing import assert_close as close

import bleu_meteor
import data
import train
from attention import (DotAttention, doubly_stochastic, entropy, hard_context, reinforce_loss,
                       soft_context)
from bleu_meteor import bleu, human_score, meteor, tokenize
from data import END, PAD, START, UNK, UserError, Vocabulary
from model import (Captioner, CaptionerConfig, Encoder, LSTMCell, RNNCell, load_checkpoint,
                   save_checkpoint)
from sample import LARGE, PANEL, attention_map, draw_attention, draw_page, drawable
from train import Settings, batch_loss

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / 'shared'
nltk.data.path.insert(0, str(SHARED / 'nltk_data'))
torch.set_num_threads(1)  # the models here are so small that more threads only wait
needs_shared = pytest.mark.skipif(not (SHARED / 'encoders').is_dir(),
                                  reason=f'needs the folder {SHARED} with data and WordNet')
every_rung = pytest.mark.parametrize('attn, score, cell', [
    ('soft', 'additive', 'lstm'), ('soft', 'dot', 'lstm'), ('hard', 'additive', 'lstm'),
    ('hard', 'dot', 'lstm'), ('none', 'additive', 'lstm'), ('soft', 'additive', 'rnn'),
    ('none', 'additive', 'rnn')])
on_every_device = pytest.mark.usefixtures('device')


@pytest.fixture(params=['cpu', *['cuda'] * torch.cuda.is_available()])
def device(request):
    """A test's tensors and modules are made on each device that there is, in turn."""
    with torch.device(request.param):
        yield torch.device(request.param)


def tiny_captioner(V=9, D=5, seed=0, scale=3.0, **config):
    """A small captioner in evaluation mode whose random weights are large enough to matter."""
    torch.manual_seed(seed)
    sizes = dict(embed_dim=6, hidden_dim=7, attn_dim=4, dropout=0.5) | config
    captioner = Captioner(CaptionerConfig(V, D, **sizes)).eval()
    with torch.no_grad():
        for weight in captioner.parameters():
            weight.mul_(scale)
    return captioner


def same(one, other):
    """Whether two nested values are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def damage(path, count, read):
    """Overwrite, shorten, repeat or cut a file, `count` times -> how often `read` refuses it."""
    whole, rng, refused = path.read_bytes(), random.Random(path.name), 0
    for _ in range(count):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3, 10))):
            i, n = rng.randrange(len(content)), rng.choice((1, 1, 4, 20))
            noise, twice = rng.randbytes(n), 2 * content[i:i + 9 * n]
            content[i:i + n] = rng.choice((noise, noise, b'', twice))
        path.write_bytes(content[:rng.choice((None, None, None, rng.randrange(len(content))))])
        try:
            read()
        except UserError as error:
            assert '\n' not in str(error)
            refused += 1
    path.write_bytes(whole)
    return refused


# ------------------------------------------------------------------------------------ attention
@on_every_device
def test_dot_attention_equals_torchs_scaled_dot_product():
    torch.manual_seed(0)  # additive attention: see the authors' program below
    attention, a, h = DotAttention(5, 7, 4), torch.randn(2, 3, 5), torch.randn(2, 7)
    z = soft_context(attention(attention.project(a), h), a)
    expected = F.scaled_dot_product_attention(attention.W_h(h).unsqueeze(1), attention.W_a(a), a)
    close(z, expected.squeeze(1))


@on_every_device
def test_hard_context_samples_from_alpha_without_nan(monkeypatch):
    torch.manual_seed(0)
    alpha, a = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.eye(4).expand(20000, 4, 4)
    z, log_p_s = hard_context(alpha.expand(20000, 4), a)
    assert torch.equal(z.sum(1), torch.ones(20000))  # each z is one of the vectors, unmixed
    assert (z.mean(0) - alpha).abs().max() < 0.015  # four standard deviations
    close(log_p_s, (z @ alpha).log())
    mixed, log_p_s = hard_context(alpha.expand(2, 4), a[:2], torch.tensor([1, 1]),
                                  torch.tensor([True, False]))
    close(mixed, torch.stack([alpha, torch.eye(4)[1]]))
    close(log_p_s, torch.tensor([0, math.log(0.3)]))
    # Some devices' exponential_ can return 0, and 0 / 0 would be NaN.
    monkeypatch.setattr(torch.Tensor, 'exponential_',
                        lambda x: x.copy_(torch.tensor([[1.0, 1.0, 1.0, 0.0]])))
    z, log_p_s = hard_context(alpha.unsqueeze(0), a[:1])
    assert z.tolist() == [[1, 0, 0, 0]] and log_p_s.item() == pytest.approx(math.log(0.5))
    certain = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    entropy(certain).sum().backward()  # where 0 log 0 is 0
    assert torch.isfinite(certain.grad).all()


# ------------------------------------------------------------------------------ model: the cells
@on_every_device
@pytest.mark.parametrize('ours, theirs, order', [
    (LSTMCell, nn.LSTMCell, (0, 1, 3, 2)),  # torch orders the gates i, f, g, o
    (RNNCell, nn.RNNCell, (0,))])
def test_cells_equal_torch_in_outputs_and_gradients(ours, theirs, order):
    torch.manual_seed(0)
    cell, reference = ours(5, 7).double(), theirs(5, 7).double()
    pairs = [(cell.W.weight, reference.weight_ih), (cell.W.bias, reference.bias_ih),
             (cell.U.weight, reference.weight_hh)]

    def reorder(weight):  # our gate order -> torch's
        return torch.cat([weight.chunk(len(order))[i] for i in order])
    with torch.no_grad():
        reference.bias_hh.zero_()
        for mine, other in pairs:
            other.copy_(reorder(mine))
    x, h, c = torch.randn(3, 5).double(), torch.randn(3, 7).double(), torch.randn(3, 7).double()
    state = cell(x, cell(x, (h, c)))
    expected = (reference(x, reference(x, (h, c))) if ours is LSTMCell else
                (reference(x, reference(x, h)), c))
    close(tuple(state), tuple(expected))
    (state[0].sin().sum() + state[1].sum()).backward()
    (expected[0].sin().sum() + expected[1].sum()).backward()
    for mine, other in pairs:
        close(reorder(mine.grad), other.grad)


@on_every_device
def test_show_and_tell_is_a_cell_fed_the_image_first():
    captioner, a = tiny_captioner(attn='none'), torch.randn(2, 3, 5)
    captions = torch.tensor([[START, 5, 4, END], [START, 7, 8, END]])
    out, zero = captioner(a, captions), torch.zeros(2, 7)
    state = captioner.cell(captioner.W_I((a[:, 0] + a[:, 1] + a[:, 2]) / 3), (zero, zero))
    for t in range(3):
        Ey = captioner.E.weight[captions[:, t]]
        state = captioner.cell(Ey, state)
        expected = captioner.L_o(torch.tanh(Ey + captioner.L_h(state[0])))
        close(out.logits[:, t], expected)
    assert out.alphas is None


# ------------------------------------------------ the authors' own program (golden arrays)
@pytest.fixture
def golden(device):
    with np.load(HERE / 'test_golden.npz') as arrays:
        return {key: torch.from_numpy(arrays[key]).to(device) for key in arrays.files}


def theirs_to_ours(words):
    """Their word ids -> ours: <eos> 0 -> <end>, the others moved up behind the special words."""
    return torch.where(words == 0, END, words.long() + 3)


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
    captioner = Captioner(CaptionerConfig(53, 24, attn, 'additive', 'lstm', 16, 32, 24, 0.0))
    rows = theirs_to_ours(torch.arange(50))
    with torch.no_grad():
        for ours, theirs in PAIRS.items():
            weight = captioner.get_parameter(ours)
            weight.copy_(g[theirs].t().reshape(weight.shape))
        captioner.L_h.bias.add_(g['ff_logit_ctx_b'])
        captioner.E.weight.zero_()  # so <start> is a vector of zeros
        captioner.E.weight[rows] = g['Wemb']
        captioner.L_o.weight.zero_()
        captioner.L_o.weight[rows] = g['ff_logit_W'].T
        captioner.L_o.bias.fill_(-1e9)  # our special words do not exist in their program
        captioner.L_o.bias[rows] = g['ff_logit_b']
        captioner.L_o.bias[END] += eos
    return captioner


def authors_batch(captioner, golden, call):
    """Run their batch caption by caption -> costs (4,), alphas (4, 7, L), log p(s) (4,).

    Their batch is padded to 7 steps, and attention goes on in the padding from the last state. A
    further word at the end of our captions gives us just that attention.
    """
    found, log_p_s, choice = [], torch.zeros(7), ()
    for n, T in enumerate((golden['in/lengths'] + 1).tolist()):
        words = theirs_to_ours(golden['in/x'][:T, n])
        captions = torch.tensor([[START, *words, END]])
        if call:
            soft = golden[f'{call}/h_sampling_mask_per_t'] == 0  # (7,), steps of expectation
            s = golden[f'{call}/out/alpha_sample'][:, n].argmax(1)  # (7,)
            choice = F.pad(s, (0, 1))[None, :T + 1], F.pad(soft, (0, 1), value=True)[None, :T + 1]
        out = captioner(golden['in/ctx'][n:n + 1], captions, *choice)
        alphas = torch.cat([out.alphas[0, :T], out.alphas[0, -1:].expand(7 - T, -1)])
        if call:
            log_p_s = alphas[torch.arange(7), s].log().masked_fill(soft, 0)
            close(out.log_p_s[0, :T], log_p_s[:T])
        else:
            betas = golden['soft/selector'][:T, n]
            close(out.betas[0, :T], betas, atol=1e-5, rtol=0)
        p = out.logits[0, :T].softmax(dim=1)[torch.arange(T), words]
        found.append((-(p + 1e-8).log().sum(), alphas, log_p_s.sum()))  # their program adds 1e-8
    return map(torch.stack, zip(*found))


def assert_gradients(captioner, golden, prefix):
    rows = theirs_to_ours(torch.arange(50))
    grads = {theirs: captioner.get_parameter(ours).grad for ours, theirs in PAIRS.items()}
    grads |= {'Wemb': captioner.E.weight.grad[rows].T, 'ff_logit_b': captioner.L_o.bias.grad[rows],
              'ff_logit_W': captioner.L_o.weight.grad[rows]}
    for name, grad in grads.items():
        expected = golden[f'{prefix}/grad/{name}'].t().reshape(grad.shape)
        assert (grad - expected).abs().max() <= 1e-5 * max(1, expected.abs().max()), name


@on_every_device
@pytest.mark.parametrize('call', ['', 'call0', 'call1', 'call2'])
def test_attention_equals_the_authors_program_given_its_samples(golden, call):
    captioner = authors_captioner(golden, 'hard' if call else 'soft')
    costs, alphas, log_p_s = authors_batch(captioner, golden, call)
    out, N, T, L = f'{call}/out' if call else 'soft', 4, 7, 9
    close(costs, golden[f'{out}/cost'], atol=1e-5, rtol=1e-5)
    close(alphas, golden[f'{out}/alphas'].transpose(0, 1), atol=1e-5, rtol=0)
    if call == 'call0':
        return  # the golden file has the gradients of the others
    if call:  # theirs sums REINFORCE over captions and averages the rest, with the cost per step
        loss = reinforce_loss(-costs, log_p_s, alphas, -T * golden[f'{call}/baseline_before'],
                              lambda_r=N / (10 * T), lambda_h=0.002 * N).mean()
    else:  # their term is N / L times the mean over captions of ours
        loss = (costs + N / L * doubly_stochastic(alphas)).mean()
        close(loss, golden['soft/total_loss'], atol=1e-5, rtol=1e-5)
    loss.backward()
    assert_gradients(captioner, golden, call or 'soft')


@on_every_device
def test_beam_search_finds_the_authors_best_captions(golden):
    searches = [key[:-len('samples')] for key in golden if re.fullmatch('gen.*samples', key)]
    for stem in searches:  # such as gen_eos-1/maxlen9/k3/
        *group, K, _ = stem.split('/')
        eos = float(group[0][7:] or 0) if group[0].startswith('gen_eos') else 0.0
        max_len = int(group[1][6:]) if len(group) > 1 else 30
        captioner, K = authors_captioner(golden, eos=eos).eval(), int(K[1:])
        found = captioner.beam_search(golden['gen/ctx'], K, max_len)
        for n, hypotheses in enumerate(found):
            scores = golden[stem + 'scores'][n]
            best = int(scores.argmin())
            words = golden[stem + 'samples'][n, best, :golden[stem + 'lengths'][n, best]]
            ours = max(hypotheses, key=lambda h: h.log_prob)
            assert ours.tokens == theirs_to_ours(words).tolist() and len(hypotheses) == K
            assert -ours.log_prob == pytest.approx(float(scores[best]), rel=1e-5, abs=1e-5)
    assert len(searches) == 33 and len(found) == 8


# --------------------------------------------------- hard attention by enumeration, beam search
def forced(captioner, a, tokens, s=None):
    """log p of one image's words under teacher forcing, and all that the captioner returns."""
    out = captioner(a, torch.tensor([[START, *tokens]]), s=s)
    return out.logits.log_softmax(2)[0, torch.arange(len(tokens)), tokens].sum(), out


@on_every_device
def test_reinforce_is_unbiased_and_the_bound_holds():
    """All location sequences of L = 3, T = 2: E[estimator] = exact gradient of L_s."""
    captioner = tiny_captioner(V=7, D=4, attn='hard', scale=2.0, dropout=0.0).double()
    a, sequences = torch.randn(1, 3, 4).double(), list(itertools.product(range(3), repeat=2))

    def run(s):
        log_p_y, out = forced(captioner, a, [5, END], torch.tensor([s]))
        return log_p_y.view(1), out.log_p_s.sum(1), out.alphas

    def flat_gradient(loss):
        grads = torch.autograd.grad(loss, list(captioner.parameters()), retain_graph=True,
                                    allow_unused=True, materialize_grads=True)
        return nn.utils.parameters_to_vector(grads)

    runs = {s: run(s) for s in sequences}
    p = torch.stack([log_p_s.detach().exp() for _, log_p_s, _ in runs.values()])  # (9, 1)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    bound = sum(log_p_s.exp() * log_p_y for log_p_y, log_p_s, _ in runs.values())
    likelihood = sum((log_p_s + log_p_y).exp().item() for log_p_y, log_p_s, _ in runs.values())
    assert bound.item() <= math.log(likelihood)  # eq. (10): L_s <= log p(y | a)
    exact, spread = flat_gradient(bound), []
    for baseline in (0.0, bound.item()):
        found = torch.stack([-flat_gradient(reinforce_loss(*x, baseline)) for x in runs.values()])
        close((p * found).sum(0), exact, atol=1e-9, rtol=1e-6)
        spread.append(float((p * (found - exact).square()).sum()))
    assert abs(spread[0] - spread[1]) > 0.01 * spread[0]  # the variance changes

    cfg, mean = Settings(attn='hard', expected=0.0, lambda_r=1.0, lambda_h=0.0), 0.0
    for sequence, (_, log_p_s, _) in runs.items():  # and as a training step takes them
        loss, _ = batch_loss(lambda a, captions, soft: captioner(
            a, captions, s=torch.tensor([sequence])), a, torch.tensor([[START, 5, END]]), cfg, 0.5)
        mean = mean - math.exp(log_p_s.item()) * flat_gradient(loss)
    close(mean, exact, atol=1e-9, rtol=1e-6)


@on_every_device
def test_input_dropout_drops_a_feature_at_all_locations_and_only_in_training():
    captioner, seen = tiny_captioner(D=200, input_dropout=0.25), []
    captioner.attention.W_a.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    a, captions = torch.rand(4, 3, 200) + 1, torch.tensor([[START, 4, 5, END]] * 4)
    captioner.train()(a, captions)
    captioner.eval()(a, captions)
    close(seen[1], a)
    kept = seen[0] != 0
    close(seen[0], a * kept * 4 / 3)
    assert (kept == kept[:, :1]).all() and kept.float().mean() == pytest.approx(0.75, abs=0.06)


@on_every_device
@every_rung
def test_beam_searchs_numbers_are_those_of_teacher_forcing(attn, score, cell):
    captioner, a = tiny_captioner(attn=attn, score=score, cell=cell), torch.randn(6, 3, 5)
    for n, hypotheses in enumerate(captioner.beam_search(a, 3, max_len=8)):
        for h in hypotheses:
            log_p, out = forced(captioner, a[n:n + 1], h.tokens)
            assert h.log_prob == pytest.approx(log_p.item(), abs=1e-4)
            if attn != 'none':
                np.testing.assert_allclose(h.alphas, out.alphas[0].detach().cpu(), atol=1e-5)
                np.testing.assert_allclose(h.betas, out.betas[0].detach().cpu(), atol=1e-5)


@on_every_device
def test_wide_beam_equals_exhaustive_search():
    captioner, a = tiny_captioner(V=7, scale=2.0), torch.randn(3, 3, 5)
    sentences = [(*x, END) for n in range(3) for x in itertools.product((4, 5, 6), repeat=n)]
    for n, found in enumerate(captioner.beam_search(a, 60, max_len=3)):
        scores = {x: forced(captioner, a[n:n + 1], x)[0].item() for x in sentences}
        ranked, found = sorted(scores, key=scores.get, reverse=True), found[:len(scores)]
        assert [tuple(h.tokens) for h in found] == ranked  # before those cut at max_len
        assert [h.log_prob for h in found] == pytest.approx([scores[x] for x in ranked], abs=1e-5)


@on_every_device
def test_beam_search_returns_captions_that_never_end_and_orders_by_length_penalty():
    captioner, a, differ = tiny_captioner(V=20), torch.randn(4, 3, 5), False
    captioner.L_o.bias.data[END] = -1e4
    for hypotheses in captioner.beam_search(a, 3, max_len=5):
        assert [len(h.tokens) for h in hypotheses] == [5, 5, 5]
        assert all(END not in h.tokens for h in hypotheses)
    captioner.L_o.bias.data[END] = 2.0
    for hypotheses in captioner.beam_search(a, 5, max_len=20, length_penalty=1.0):
        ended = [h for h in hypotheses if h.tokens[-1] == END]
        scores = [h.log_prob / len(h.tokens) for h in ended]
        assert scores == sorted(scores, reverse=True) and len(scores) > 1
        differ |= ended != sorted(ended, key=lambda h: -h.log_prob)
    assert differ  # else the order by log_prob alone would pass too


# ----------------------------------------------------------------------- encoders and checkpoints
@pytest.mark.parametrize('name, dim, grid', [
    ('vgg19', 512, (14, 14)), ('resnet18', 512, (7, 7)), ('densenet121', 1024, (7, 7)),
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
        if name == 'vgg19':  # the paper's: its last layer is the ReLU after conv5_4
            features = F.max_pool2d(features, 2)
        features = getattr(classifier, 'avgpool', nn.AdaptiveAvgPool2d(1))(features)
        if name != 'convnext_tiny':  # its classifier flattens by itself
            features = features.flatten(1)
        head = classifier.fc if hasattr(classifier, 'fc') else classifier.classifier
        close(head(features), expected)


def test_a_frozen_encoder_never_changes_and_a_trained_one_learns():
    images = torch.rand(4, 3, 64, 64)
    for encoder in Encoder('resnet18', 64, pretrained=False), Encoder('tiny', 64):
        before, statistics = encoder(images), [b.clone() for b in encoder.buffers()]
        out = encoder.train()(images)
        changed = any(not torch.equal(x, y) for x, y in zip(statistics, encoder.buffers()))
        assert out.requires_grad == changed == encoder.trainable
        assert encoder.trainable or torch.equal(out, before)
        uint8 = (images * 255).round().to(torch.uint8)
        close(encoder.eval()(uint8), encoder(uint8 / 255))


def test_the_tiny_encoder_looks_at_the_middle_of_each_cell():
    encoder, images = Encoder('tiny', 64), torch.rand(1, 3, 64, 64, requires_grad=True)
    for row, column in ((3, 3), (4, 2)):
        seen = encoder(images)[0, row * 8 + column].sum()
        weight = torch.autograd.grad(seen, images)[0].abs().sum((0, 1))
        y, x = ((weight.sum(k) * (torch.arange(64) + 0.5)).sum() / weight.sum() for k in (1, 0))
        assert abs(y - 8 * (row + 0.5)) < 1.5 and abs(x - 8 * (column + 0.5)) < 1.5


def export(cnn, path, batch=Dim.DYNAMIC):
    """Write a .pt2 file as the program says that it should be made, or for another batch."""
    shapes = None if batch is None else ({0: batch},)
    example = torch.zeros(2, 3, 32, 32)
    torch.export.save(torch.export.export(cnn.eval(), (example,), dynamic_shapes=shapes), path)


def test_an_exported_encoder_learns_and_is_kept(tmp_path):
    torch.manual_seed(0)
    cnn, images = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8)), torch.rand(3, 3, 32, 32)
    cnn[1].running_mean.normal_()
    export(cnn, tmp_path / 'cnn.pt2')
    frozen = Encoder(tmp_path / 'cnn.pt2', 32).train()
    encoder = Encoder(tmp_path / 'cnn.pt2', 32, trainable=True).train()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    expected = cnn((images - mean) / std).flatten(2).transpose(1, 2)
    close(frozen(images), expected.detach())
    before = encoder(images)
    before.square().sum().backward()
    expected.square().sum().backward()
    for name, p in cnn.named_parameters():  # the gradient of the network that was exported
        close(encoder.cnn.get_parameter(name).grad, p.grad)
    torch.optim.SGD(encoder.parameters(), lr=0.1).step()
    save_checkpoint(tmp_path / 'a.pt', tiny_captioner(D=8), encoder, Vocabulary(['a'] * 8), {})
    again = load_checkpoint(tmp_path / 'a.pt')[1]
    close(again(images), encoder(images))
    assert not torch.allclose(again(images), before, atol=1e-2)


@pytest.mark.parametrize('batch, wrap', [
    (None, lambda x: x), (Dim('B', max=16), lambda x: x), (Dim('B'), lambda x: {'a': x}),
    (Dim('B'), lambda x: [x, x]), (Dim('B'), lambda x: x.flatten(2)),
    (Dim('B'), lambda x: x.mean((2, 3)))])
def test_a_pt2_file_that_will_not_do_says_how_to_export(tmp_path, batch, wrap):
    cnn = nn.Conv2d(3, 8, 8, 8)
    cnn.register_forward_hook(lambda module, images, features: wrap(features))
    export(cnn, tmp_path / 'a.pt2', batch)
    with pytest.raises(UserError, match=r'a.pt2 makes no map .* torch.export.export\(cnn') as error:
        Encoder(tmp_path / 'a.pt2', 32)(torch.rand(32, 3, 32, 32))  # as many as a batch of features
    assert '\n' not in str(error.value)


def test_an_encoder_that_is_not_there_is_said_in_one_line(tmp_path, monkeypatch, capfd):
    (tmp_path / 'text.pt2').write_text('hello')
    torch.save({}, tmp_path / 'zip.pt2')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *_, **__: 1 / 0)
    for name, message in (('resnet5000', 'is no encoder'),
                          (tmp_path / 'none.pt2', 'cannot load .*not there'),
                          (tmp_path / 'text.pt2', 'not of torch.export.save'),
                          (tmp_path / 'zip.pt2', 'cannot load'),
                          ('vit_b_16', 'makes no map'),  # what will not do is not downloaded
                          ('vgg19', r'zero.*download https://download.pytorch.org/.*/vgg19.*pth')):
        with pytest.raises(UserError, match=message):
            Encoder(name, 224)
    assert 'Traceback' not in capfd.readouterr().err  # of torch's own log
    # Mean and deviation are those that the weights were trained with.
    assert Encoder('efficientnet_v2_l', 32, pretrained=False).std.unique().tolist() == [0.5]


@pytest.mark.parametrize('attn', ['soft', 'none'])
def test_checkpoint_rebuilds_the_model_alone(tmp_path, attn):
    captioner, encoder = tiny_captioner(D=128, attn=attn), Encoder('tiny', 32)
    vocabulary, images = Vocabulary(['a', 'dog', 'caf\u00e9', 'x', 'y']), torch.rand(3, 3, 32, 32)
    save_checkpoint(tmp_path / 'a.pt', captioner, encoder, vocabulary, {'lr': 0.1})
    again, encoder2, vocabulary2, settings = load_checkpoint(tmp_path / 'a.pt')
    expected = captioner.beam_search(encoder(images), 3, 9)
    for one, other in zip(expected, again.beam_search(encoder2(images), 3, 9)):
        assert [(h.tokens, h.log_prob) for h in one] == [(h.tokens, h.log_prob) for h in other]
    assert vocabulary2.words == vocabulary.words and settings == {'lr': 0.1}
    assert [p.name for p in tmp_path.iterdir()] == ['a.pt']
    save_checkpoint(tmp_path / 'half.pt', captioner, encoder, vocabulary, {}, half=True)
    half = load_checkpoint(tmp_path / 'half.pt')[0].state_dict()
    for name, weight in captioner.state_dict().items():
        close(half[name], weight, rtol=2 ** -11, atol=1e-7)  # of float16's 11 bits
    assert (tmp_path / 'half.pt').stat().st_size < 0.6 * (tmp_path / 'a.pt').stat().st_size


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    path = tmp_path / 'a.pt'
    save_checkpoint(path, tiny_captioner(D=128), Encoder('tiny', 32), Vocabulary('abcde'), {})
    whole = torch.load(path)['captioner']

    def read():  # where it can be loaded, the damage was where nothing is
        assert same(load_checkpoint(path)[0].state_dict(), whole)
    assert damage(path, 100, read) > 70


# --------------------------------------------------------------- data: shapes, words, batches
def test_shapes_are_drawn_as_said_and_come_from_the_seed():
    examples, again, others = (data.make_shapes(60, seed) for seed in ('test', 'test', 'other'))
    for x, y, z in zip(examples, again, others):
        assert x.captions == y.captions and (x.image == y.image).all() != (x.image == z.image).all()
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
            assert np.ptp(xs) + 1 == pytest.approx(right - left, abs=4), o
            assert np.ptp(ys) + 1 == pytest.approx(bottom - top, abs=4), o
    objects = [o for x in examples for o in x.objects]
    assert len({o.shape for o in objects}) >= 5 and len({o.colour for o in objects}) == 8
    for unseen in 0, 1:  # pairs for the unseen split alone
        for example in data.make_shapes(150, f'unseen {unseen}', unseen):
            pairs = {(o.shape, o.colour) for o in example.objects}
            assert len(pairs & data.UNSEEN_PAIRS) == unseen


def test_shapes_captions_tell_the_truth():
    """Parse the relations back and check them against the boxes."""
    ways, checked = {'left of': (0, 1), 'right of': (0, -1), 'above': (1, 1), 'over': (1, 1),
                     'below': (1, -1), 'under': (1, -1)}, 0  # axis, which of two middles is larger
    for example in data.make_shapes(200, 'val'):
        named = {(o.colour, o.shape): o.box for o in example.objects}
        for caption in example.captions:
            words = caption.split()
            boxes = [named[words[t - 1], data.NOUNS[w]] for t, w in enumerate(words)
                     if w in data.NOUNS]  # a KeyError is a caption that names what is not there
            assert 'picture' in words or len(boxes) == len(named)
            for axis, sign in (ways[way] for way in ways if f' {way} ' in caption):
                first, second = (box[axis] + box[axis + 2] for box in boxes[:2])
                assert sign * first < sign * second, caption
                checked += 1
    assert checked > 300


def test_pointing_counts_the_cell_in_the_named_object():
    objects = (data.Object('circle', 'red', 'small', (0.0, 0.0, 0.25, 0.25)),
               data.Object('star', 'blue', 'large', (0.5, 0.5, 1.0, 1.0)))
    for caption, cells, found in (  # of a grid of 4 x 4
            ('a red disc above a blue star', [9, 9, 0, 9, 9, 9, 15], (2, 2)),
            ('a red disc above a blue star', [9, 9, 1, 9, 9, 9, 0], (0, 2)),
            ('a green star', [15, 15, 15], (0, 1)),  # it is not there: a miss wherever it looks
            ('a cat', [0, 0], (0, 0))):
        assert data.pointing(caption.split(), np.eye(16)[cells], objects, (4, 4)) == found


def test_vocabulary_and_batches():
    captions = [['a', 'dog'], ['a', 'cat'], ['a', 'dog', 'z']]
    vocabulary = Vocabulary.build(captions, max_size=3)
    assert vocabulary.words == ['a', 'dog', 'cat'] and len(vocabulary) == 7
    assert vocabulary.encode(['a', 'z', 'cat']) == [4, UNK, 6]
    assert vocabulary.decode([START, 4, UNK, 5, END, PAD]) == ['a', '<unk>', 'dog']
    assert Vocabulary.build(captions, min_count=2).words == ['a', 'dog']
    # Batches hold one length and each caption once.
    lengths = np.random.default_rng(0).integers(3, 9, size=500)
    batches = data.length_batches(lengths, 32, np.random.default_rng(1))
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(len(set(lengths[b])) == 1 and len(b) <= 32 for b in batches)
    assert len(batches) == sum(-(-n // 32) for n in np.bincount(lengths))
    assert [list(b) for b in batches] != sorted(map(list, batches))


def test_only_pinned_memory_is_copied_while_the_program_goes_on(monkeypatch):
    """Elsewhere such a copy could read what is already overwritten."""
    cpu, pinned, seen = torch.device('cpu'), torch.zeros(2), []
    for kind in (np.eye(6), torch.eye(6)):
        rows = data.read_rows(kind, np.array([4, 0, 4]), cpu)
        assert rows.argmax(1).tolist() == [4, 0, 4] and rows.sum() == 3
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self: pinned)
    monkeypatch.setattr(torch.Tensor, 'to', lambda self, device, non_blocking=False: seen.append(
        (self is pinned, non_blocking)))
    for name in ('cuda', 'mps', 'cpu'):
        data.to_device(torch.zeros(3), torch.device(name))
    assert seen == [(True, True), (False, False), (False, False)]


# -------------------------------------------------------------------------- data sets on disk
SPLITS = {'train': ['a.jpg', 'b.jpg', 'c.jpg'], 'val': ['d.jpg'], 'test': ['e.jpg']}
SENTENCES = {name: [f'A {name[0]} dog , number {i} .' for i in range(5)]
             for names in SPLITS.values() for name in names}
COCO_NAMES = [f'COCO_{part}2014_{i:012}.jpg' for i, part in enumerate(['train'] * 3 + ['val'] * 2)]
MINE = ['red.jpg', 'green.PNG', 'blue.webp', 'grey.tif']


def make_pictures(folder, names=SENTENCES):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.make_shapes(i + 1, 'pictures')[i].image).save(path)
        path.with_name(f'._{path.name}').write_bytes(b'not a picture')


def write(folder, files):
    """Files of a folder by name: bytes, text, or what becomes JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(content) if isinstance(content, (dict, list)) else content
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def karpathy(split_of, sentences):
    return {'images': [{'filename': n, 'split': split_of[n], 'sentences': [{'raw': c} for c in cs]}
                       for n, cs in sentences.items()]}


def coco(sentences):
    return {'images': [{'id': i, 'file_name': n} for i, n in enumerate(sentences)],
            'annotations': [{'image_id': i, 'caption': c}
                            for i, cs in enumerate(sentences.values()) for c in cs]}


def write_layout(folder, layout):
    """The same five images and their captions in one of the published layouts."""
    make_pictures(folder / 'Images')
    rows = [(n, i, c) for n in SENTENCES for i, c in enumerate(SENTENCES[n])]
    tokens = [f'{n}#{i}\t{c}' for n, i, c in rows]
    bars = [f'{n}| {i}| {c}' for n, i, c in rows]
    split_of = {n: s for s in SPLITS for n in SPLITS[s]} | {'c.jpg': 'restval'}
    tokens.append('2258277193_586949ec62.jpg.1#0\tA dog .')  # Flickr8k has no picture of it
    bars[3] = bars[3].replace('| A', '   A')  # Flickr30k's file has one such line
    quoted = ['image,caption'] + [f'{n},"{c}"' for n, _, c in rows]
    write(folder, {
        'official': {'Flickr8k.token.txt': '\n'.join(tokens)} | {
            f'Flickr_8k.{name}Images.txt': '\n'.join(SPLITS[split]) for split, name in
            (('train', 'train'), ('val', 'dev'), ('test', 'test'))},
        'kaggle8k': {'captions.txt': '\n'.join(quoted)},
        'token30k': {'results_20130124.token': '\n'.join(tokens)},
        'kaggle30k': {'results.csv': '\n'.join(['image_name| comment_number| comment', *bars])},
        'karpathy': {'dataset_flickr8k.json': karpathy(split_of, SENTENCES), 'dataset_x.json': ''},
        'coco': {'annotations.json': coco(SENTENCES)}}[layout])


def names(splits):
    return {split: [x.name for x in examples] for split, examples in splits.items()}


def said(splits):
    return {x.name: x.captions for examples in splits.values() for x in examples}


def load(folder, **options):
    return data.load_captions(folder.name, folder.parent, **options)


@pytest.fixture()
def mine(tmp_path, monkeypatch):
    """A folder of four own pictures, in root and in sub-folders, where nothing may be fetched."""
    monkeypatch.setattr(data, 'download', lambda *_: pytest.fail('something is downloaded'))
    for name, place in zip(MINE, ('', 'sub', 'sub/deeper', 'z')):
        make_pictures(tmp_path / 'mine' / place, [name])
    return tmp_path / 'mine'


every_layout = pytest.mark.parametrize('layout', ['official', 'karpathy', 'kaggle8k', 'token30k',
                                                  'kaggle30k', 'coco'])


@every_layout
def test_layouts(tmp_path, capsys, layout):
    folder = tmp_path / 'flickr8k'
    write_layout(folder, layout)
    splits = load(folder)
    assert said(splits) == SENTENCES and sum(map(len, splits.values())) == len(SENTENCES)
    assert all(x.image.name == x.name and x.image.is_file() for s in splits.values() for x in s)
    drawn = 'drawn from a seed' in capsys.readouterr().out
    assert drawn == (layout not in ('official', 'karpathy')) and load(folder) == splits
    assert drawn or names(splits) == SPLITS


TABLES = {  # titles (or None), then what a line of `name` and `text` is
    'commas': (None, '{name},{text}'), 'titles': ('Photo;Text', '{name};{text}'),
    'captions first': ('caption,file', '"{text}",{name}'), 'no titles': (None, '{text}\t{name}'),
    'pandas': (',file_name,text', '{i},{name},"{text}"'), 'bars': (None, '{name} | {i} | {text}'),
    'an identifier': ('id,image,text', 'X_{i}a,{name},{text}'),
    'a last field is blank': ('image,text,who', '{name},"{text}",'),
    'marks': ('image;text;;', '{name};"{text}";;'), 'a number': (None, '{i},{name},{text}'),
    'an address': ('text,image,url', '"{text}",{name},http://x.org/{i}.jpg'),
    'a split': ('split;text;image', 'train;"{text}";{name}'),
    'spaces': (None, '{name}, "{text}"'), 'a person': ('image\twho\ttext', '{name}\tAnn\t{text}')}


@pytest.mark.parametrize('table', TABLES)
@pytest.mark.parametrize('end, encoding', [('\n', 'utf-8'), ('\r\n', 'utf-8-sig')])
def test_tables_of_every_form(mine, table, end, encoding):
    first, form = TABLES[table]
    for texts in ([['Zwei H\u00fcte, sehr gro\u00df, auf dem Tisch.', 'A hat'], ['Hat, red, old .'],
                   ['One (1) thing, two things'], ['The third, of 3, stands upright, alone']],
                  [['\u72d7\u5728\u8349\u5730\u4e0a\u8dd1\u3002'] * 2, ['A1'], ['Dog.'], ['Cat.']],
                  [[f'Big; red, or so, as all{" of them" * i}; are'] for i in range(4)]):
        lines = [form.format(name=name, text=text, i=i) for i, name in enumerate(MINE)
                 for text in texts[i]]
        (mine / 'words.csv').write_bytes(end.join([first] * bool(first) + lines).encode(encoding))
        assert said(load(mine)) == dict(zip(MINE, texts))
    assert (list(load(mine)) == ['train']) == (table == 'a split')


def test_files_by_split_and_lists_of_images(mine, capsys):
    lines = [f'{name},A thing called {name[:3]}\n' for name in MINE]
    write(mine, {'captions_train.csv': ''.join(lines[:2]), 'captions_val.csv': ''.join(lines[2:])})
    assert names(load(mine)) == {'train': MINE[:2], 'val': ['blue.webp'], 'test': ['grey.tif']}
    assert 'val divided by name' in capsys.readouterr().out
    (mine / 'captions_val.csv').rename(mine / 'captions_test.csv')
    assert names(load(mine)) == {'train': MINE[:2], 'test': MINE[2:]}
    write(mine, {'captions_other.csv': lines[0]})  # of what split?
    with pytest.raises(UserError, match='captions_other.csv and .*: keep one of them'):
        load(mine)
    for path in mine.glob('captions_*'):
        path.unlink()
    write(mine, {'readme.txt': 'no captions', 'all.tsv': ''.join(lines).replace(',', '\t'),
                 'train.txt': f'Images/{MINE[3]}\r\n\r\n{MINE[2]}', 'my_val.txt': MINE[1].lower(),
                 'testImages.txt': '\ufeff' + MINE[0]})
    assert names(load(mine)) == {'train': MINE[:1:-1], 'val': MINE[1:2], 'test': MINE[:1]}


def test_the_users_files_win(tmp_path, monkeypatch):
    """Whatever is in the folder, nothing is fetched; a folder with anything in it is not empty."""
    monkeypatch.setattr(data, 'download', lambda *_: pytest.fail('something is downloaded'))
    for folder in tmp_path / 'flickr8k', tmp_path / 'coco':
        own = {f'{n}.bmp': [f'Ein Hund {n}.'] for n in 'pqrs'}
        make_pictures(folder, own)
        write(folder, {'annotations.json': coco(own)})
        assert said(load(folder)) == own
        shutil.rmtree(folder)
        write(folder, {'captions.txt': 'a.jpg,A dog'})
        with pytest.raises(UserError, match=f'{folder.name} has no images'):
            load(folder)


@pytest.mark.parametrize('year', ['2014', '2017'])
@pytest.mark.parametrize('own', [True, False])
def test_coco_of_both_years(tmp_path, year, own):
    folder, five = tmp_path / 'coco', dict(zip(COCO_NAMES, SENTENCES.values()))
    for part, some in (('train', COCO_NAMES[:3]), ('val', COCO_NAMES[3:])):
        disk = {n if year == '2014' else n[-16:]: five[n] for n in some}
        make_pictures(folder / f'{part}{year}', disk)
        if own:
            write(folder, {f'annotations/captions_{part}{year}.json': coco(disk),
                           f'annotations/instances_{part}{year}.json': {'images': []}})
    if not own:  # Karpathy's file has the names of 2014
        parts = dict(zip(five, ('train', 'restval', 'train', 'val', 'test')))
        write(folder, {'dataset_coco.json': karpathy(parts, five)})
    splits = load(folder)
    assert names(splits) == {'train': [0, 1, 2], 'val': [3], 'test': [4]}  # COCO's own numbers
    assert list(said(splits).values()) == list(SENTENCES.values())
    shutil.rmtree(folder / f'train{year}')  # scoring takes no training images
    assert names(load(folder, splits=('test',))) == {'test': [4]}
    assert list(load(folder)) == ['val', 'test']


def test_names_meet_whatever_system_wrote_them(mine):
    disk = ['Caf\u00e9 1.JPG', unicodedata.normalize('NFD', 'caf\u00e9 2.jpg'), 'STRASSE.Jpg']
    words = ['C:\\Bilder\\caf\u00e9 1.jpg', './x/CAF\u00c9 2.jpg', 'stra\u00dfe.jpg']
    make_pictures(mine / 'Images', disk)
    write(mine, {'captions.txt': ''.join(f'{n}\tA dog .\n' for n in words)})
    os.symlink(mine, mine / 'again')  # a folder that is met twice is one folder
    os.symlink(mine / 'sub', mine / 'link')
    assert sorted(said(load(mine))) == sorted(disk)
    make_pictures(mine / '.thumbnails', ['RED.jpg'])
    with pytest.raises(UserError, match='mine/red.jpg and .*thumbnails/RED.jpg have the same name'):
        load(mine)


def test_images_in_two_splits_are_counted_and_not_trained_on(mine, capsys):
    write(mine, {'captions.txt': ''.join(f'{name},A dog\n' for name in MINE), 'test.txt': MINE[3],
                 'train.txt': '\n'.join(MINE), 'val.txt': '\n'.join(MINE[1:3])})
    with pytest.raises(UserError, match='2 images of train are also in val: blue.webp'):
        load(mine)
    splits = load(mine, skip_bad=True)
    assert names(splits) == {'train': MINE[:1], 'val': MINE[1:3], 'test': MINE[3:]}
    assert 'left out 2 bad' in capsys.readouterr().out
    for split, some in (('test', MINE[3:]), ('train', MINE)):  # what is not used does not matter
        assert names(load(mine, splits=(split,))) == {split: some}


@needs_shared
def test_the_real_coco():
    files = (SHARED / 'data' / 'coco' / 'annotations').glob('captions_*.json')
    images = [x['id'] for path in files for x in json.loads(path.read_text())['images']]
    assert sorted(said(load(SHARED / 'data' / 'coco'))) == sorted(images)


LINES = ''.join(f'{name},A thing\n' for name in MINE)
ENTRY = {'filename': 'red.jpg', 'split': 'train', 'sentences': [{'raw': 'A thing'}]}
BAD = {  # what is wrong: files, what the line says, and whether the rest is good
    'no caption in a line': ({'captions.txt': LINES + 'red.jpg'}, "line 5: not .*'red.jpg'", True),
    'not in UTF-8': ({'captions.txt': (LINES + 'red.jpg,\xdf').encode('latin1')}, 'line 5', True),
    'a long line': ({'captions.txt': LINES + 'x' * 300_000}, 'line 5: not', True),
    'marks before the end': ({'captions.txt': 'image,text,split\n' + LINES.replace('\n', ',train\n')
                              + 'red.jpg,Red, or so,train'}, "line 6: not .*'red.jpg,Red", True),
    'no image': ({'captions.txt': LINES + 'no.jpg,A dog'}, 'for no.jpg, which is not in', True),
    'not in the captions': ({'captions.txt': LINES[:-17], 'train.txt': '\n'.join(MINE)},
                            'grey.tif has no caption, or an empty', True),
    'an empty one': ({'x.json': {'images': [ENTRY, ENTRY | {'sentences': [{'raw': ' '}]}]}},
                     'red.jpg has no caption, or an empty one', True),
    'no words': ({'x.json': {'images': [ENTRY | {'sentences': [{'raw': 5}]}]}}, 'no capti', False),
    'not listed': ({'x.json': coco({n: ['A'] for n in MINE}) | {'images': [
        {'id': i, 'file_name': n} for i, n in enumerate(MINE[:3])]}}, 'for image 3, which', True),
    'cut short': ({'x.json': '{"images": [{"file_name": '}, 'is not JSON, or not all', False),
    'deep': ({'x.json': '[' * 100_000}, 'is not JSON', False),
    'another program': ({'x.json': {'pictures': []}}, "KeyError.*images.*get it anew", False),
    'odd splits': ({'x.json': {'images': [ENTRY | {'split': [5]}]}}, 'no image of train', False),
    'an empty file': ({'captions.txt': ''}, 'has no image of train', False),
    'no file': ({'readme.md': ''}, 'no file of captions .* write captions.txt', False)}


@pytest.mark.parametrize('fault', BAD)
def test_what_is_wrong_is_said_in_one_line(mine, capsys, fault):
    files, message, rest = BAD[fault]
    write(mine, files)
    with pytest.raises(UserError, match=message) as error:
        load(mine)
    assert len(str(error.value).splitlines()) == 1
    if rest:
        assert '--skip-bad' in str(error.value) and load(mine, skip_bad=True)
        assert 'left out 1 bad captions and images, such as: ' in capsys.readouterr().out


@every_layout
def test_damaged_caption_files_are_read_or_one_line(tmp_path, layout):
    folder = tmp_path / 'flickr8k'
    write_layout(folder, layout)
    path = min(p for p in folder.iterdir() if p.is_file() and 'Images.txt' not in p.name)

    def read(skip_bad):
        texts = sum(said(load(folder, skip_bad=skip_bad)).values(), [])
        assert texts and all(isinstance(text, str) and text.strip() for text in texts)
    refused = [damage(path, 150, partial(read, skip_bad)) for skip_bad in (False, True)]
    assert 150 > refused[0] > 90 and refused[0] >= refused[1]  # some were good, or good in parts


@pytest.fixture()
def server(tmp_path, monkeypatch):
    """A web server on this machine with two archives as macOS makes them; its address, folder."""
    monkeypatch.setenv('no_proxy', '*')
    handler, site = SimpleHTTPRequestHandler, tmp_path / 'site'
    monkeypatch.setattr(handler, 'log_message', lambda *_: None)
    site.mkdir()
    write_layout(tmp_path / 'source', 'official')
    shutil.make_archive(site / 'images', 'zip', tmp_path / 'source', 'Images')
    shutil.rmtree(tmp_path / 'source' / 'Images')
    shutil.make_archive(site / 'texts', 'zip', tmp_path / 'source')
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(handler, directory=site)) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{http.server_port}', site
        http.shutdown()


def source(server, name, kind):
    """What data.py is to know of an archive on the server: its address, kind of sum, sum."""
    content = (server[1] / name).read_bytes()
    return f'{server[0]}/{name}', kind, hashlib.new(kind, content).hexdigest()


def test_a_download_goes_on_where_it_stopped(tmp_path, monkeypatch, server):
    site, both = server[1], (('images.zip', 'md5'), ('texts.zip', 'sha256'))
    monkeypatch.setitem(data.DOWNLOADS, 'flickr8k', [('', *source(server, *x)) for x in both])
    (site / 'texts.zip').rename(site / 'later')
    (tmp_path / 'disk').mkdir()
    os.symlink(tmp_path / 'disk', tmp_path / 'flickr8k')  # an empty folder elsewhere
    with pytest.raises(UserError, match='cannot get .*texts.zip .*404'):
        load(tmp_path / 'flickr8k')
    assert not any((tmp_path / 'flickr8k').iterdir())  # no half of a data set
    (site / 'images.zip').unlink()  # it is not fetched again
    (site / 'later').rename(site / 'texts.zip')
    splits = load(tmp_path / 'flickr8k')
    assert names(splits) == SPLITS and said(splits) == SENTENCES
    assert {p.name for p in (tmp_path / 'flickr8k').iterdir()} == {'images', 'texts'}
    (site / 'texts.zip').unlink()
    assert load(tmp_path / 'flickr8k') == splits  # nothing is fetched again
    assert sorted(p.name for p in tmp_path.iterdir()) == ['disk', 'flickr8k', 'site', 'source']


def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch, server):
    for *wrong, message in ((f'{server[0]}/images.zip', 'md5', '0' * 32, 'wrong md5 sum'),
                            (f'{server[0]}/images.zip', 'sha256', '0' * 64, 'wrong sha256 sum'),
                            (f'{server[0]}/nothing.zip', 'md5', '0', '404.*another way'),
                            ('http://127.0.0.1:9/x.zip', 'md5', '0', 'refused.*try again')):
        monkeypatch.setitem(data.DOWNLOADS, 'flickr8k', [('', *wrong)])
        with pytest.raises(UserError, match=message):
            load(tmp_path / 'new' / 'flickr8k')
        assert not [path for path in (tmp_path / 'new').rglob('*') if path.is_file()]


def test_an_archive_cannot_write_outside_its_folder(tmp_path, server):
    link = zipfile.ZipInfo('link')
    link.external_attr = 0o120777 << 16  # a symbolic link, as Unix packs it
    with zipfile.ZipFile(tmp_path / 'site' / 'evil.zip', 'w') as archive:
        for name in ('../up.txt', '../../up.txt', f'{tmp_path}/absolute.txt', 'good.txt'):
            archive.writestr(name, 'text')
        archive.writestr(link, str(tmp_path))
        archive.writestr('link/through.txt', 'text')
    before, inside = set(tmp_path.iterdir()), tmp_path / 'd' / 'flickr8k'
    with pytest.raises(UserError, match='evil.zip'):  # a file below what is not a folder
        data.download(*source(server, 'evil.zip', 'md5'), inside)
    assert set(tmp_path.iterdir()) - before == {tmp_path / 'd'}
    assert {p.name for p in (tmp_path / 'd').iterdir()} == {'flickr8k'}
    assert (inside / 'evil' / 'good.txt').read_text() == 'text'
    assert not any(p.is_symlink() for p in inside.rglob('*'))


def test_every_kind_of_image_becomes_upright_rgb(tmp_path):
    rgb, orange = np.zeros((40, 60, 3), np.uint8), (200, 100, 50)
    rgb[:20, :30] = orange  # the top left quarter
    picture, alpha = Image.fromarray(rgb), Image.fromarray(rgb)
    grey = np.asarray(picture.convert('L'))
    level = grey[0, 0]
    alpha.putalpha(Image.fromarray((grey > 0) * np.uint8(255)))
    for name, image, inside in (
            ('plain.png', picture, orange), ('two.gif', picture, orange), ('a.png', alpha, orange),
            ('p.png', picture.quantize(4), orange), ('c.tif', picture.convert('CMYK'), orange),
            ('l.png', picture.convert('L'), level), ('1.png', Image.fromarray(grey > 0), 255),
            ('deep.png', Image.fromarray(grey.astype(np.uint16) * 257), level),
            ('float.tif', Image.fromarray(grey / np.float32(level)), 255)):
        image.save(tmp_path / name)
        opened = data.open_image(tmp_path / name)
        assert opened.mode == 'RGB' and opened.size == (60, 40), name
        pixels = np.asarray(opened).astype(int)
        assert np.abs(pixels[10, 10] - inside).max() <= 6, name
        assert np.abs(pixels[30, 50] - (255 if image is alpha else 0)).max() <= 6, name


def png_chunk(kind, content, wrong=0):
    return (struct.pack('>I', len(content)) + kind + content
            + struct.pack('>I', zlib.crc32(kind + content) ^ wrong))


# How a camera was held, as EXIF has it -> how it stores a picture, as Image.transpose has it.
STORED = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}


@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp'])
@pytest.mark.parametrize('held', STORED)
def test_pictures_come_out_upright_whatever_else_their_notes_say(tmp_path, ending, held):
    rgb = np.zeros((48, 64, 3), np.uint8)
    rgb[:24, :32], rgb[24:, 32:] = (200, 100, 50), (0, 80, 250)
    for text in b'', struct.pack('<HHII', 0x11a, 2, 5, 0x26) + b'\0\0\0\x0072/1\0':
        notes = struct.pack('<HHHIHH', 1 + bool(text), 0x112, 3, 1, held, 0) + text  # a resolution
        exif = b'Exif\0\0II*\0\x08\0\0\0' + notes + bytes(4)
        picture = Image.fromarray(rgb).transpose(STORED[held])
        picture.save(tmp_path / f'a.{ending}', exif=exif, quality=95)
        opened = np.asarray(data.open_image(tmp_path / f'a.{ending}')).astype(int)
        assert opened.shape == rgb.shape
        assert np.abs(opened[4:20, 4:28] - rgb[4:20, 4:28]).mean() < 8


def test_whole_pixels_are_read_whatever_is_wrong_beside_them(tmp_path):
    picture, path = Image.fromarray(data.make_shapes(1, 'x')[0].image), tmp_path / 'a.png'
    picture.save(path)
    whole = path.read_bytes()
    long = zlib.compress(b'<x/>' * 900_000)
    for chunk in (png_chunk(b'gAMA', b'\0\0\xb1\x8f', 1), png_chunk(b'tIME', b'\x07\xe8\x01', 1),
                  png_chunk(b'eXIf', b'MM\0*\0\0\xff\xff'), png_chunk(b'iCCP', b'a\0\0' + long),
                  png_chunk(b'iTXt', b'XML\0\1\0\0\0' + long), png_chunk(b'pHYs', b'\0')):
        path.write_bytes(whole[:33] + chunk + whole[33:])
        assert (np.asarray(data.open_image(path)) == np.asarray(picture)).all(), chunk[:40]


def test_files_that_are_no_images_are_named(tmp_path):
    head = struct.pack('>IIBBBBB', 20000, 20000, 8, 2, 0, 0, 0)
    huge = b'\x89PNG\r\n\x1a\n' + png_chunk(b'IHDR', head) + png_chunk(b'IDAT', bytes(20))
    cases = {'none.jpg': (None, 'No such file'), 'empty.jpg': (b'', 'cannot identify'),
             'text.jpg': (b'hello' * 99, 'cannot identify'), 'huge.png': (huge, 'of 178956970 pix'),
             'a.bmp': (b'BM' + bytes(60), 'cannot be read'),
             'a.heic': (b'\0\0\0\x18ftypheic' + bytes(99), 'HEIC file by a JPEG')}
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for ending in 'jpg', 'png', 'webp', 'tif':
        Image.fromarray(noise).save(tmp_path / f'whole.{ending}')
        whole = (tmp_path / f'whole.{ending}').read_bytes()
        for part in 0.3, 0.9:
            cases[f'{part}.{ending}'] = whole[:int(len(whole) * part)], 'cannot be read'
    for name, (content, message) in cases.items():
        write(tmp_path, {} if content is None else {name: content})
        with pytest.raises(UserError, match=message) as error:
            data.open_image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and '\n' not in str(error.value)
    assert data.is_image('x/A.WebP') and data.is_image('b.JFIF') and not data.is_image('jpg')


@pytest.mark.parametrize('ending', ['jpg', 'png'])
def test_damaged_images_are_pictures_or_one_line(tmp_path, ending):
    path = tmp_path / f'a.{ending}'
    Image.fromarray(data.make_shapes(1, 'fuzz')[0].image).save(path)

    def read():
        assert data.load_image(path, 32).shape == (3, 32, 32)
    assert 50 < damage(path, 300, read) < 300  # some were damaged in a place that does not matter


def test_feature_cache(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ('a.bmp', 'b.ppm', 'c.jpg')]
    make_pictures(tmp_path, [path.name for path in files])
    examples = [data.Example(path, []) for path in files]
    cache = partial(data.cache_arrays, cache_dir=tmp_path / 'cache')

    def mean(images):  # of each colour: three features that are easy to compute
        return images.float().mean(dim=(2, 3)).unsqueeze(1)  # (B, 1, 3)
    cached = partial(cache, encode=lambda images: mean(images[:1 / 0 if images.any() else None]))

    def check():
        features = cache(examples, 32, label='mean', encode=mean)
        expected = [data.load_image(path, 32).mean(axis=(1, 2)) for path in files]
        assert features.dtype == np.float16 and isinstance(features, np.memmap)
        np.testing.assert_allclose(features[:, 0], expected, rtol=2e-3)
    check()
    cached(examples, 32, label='mean')
    for some, size, label in ((examples, 16, 'mean'), (examples[:2], 32, 'mean'),
                              (examples, 32, 'other')):
        with pytest.raises(ZeroDivisionError):  # another size, data set or encoder
            cached(some, size, label=label)
    file, = (tmp_path / 'cache').iterdir()
    whole, size = file.read_bytes(), files[1].stat().st_size
    for broken in whole[:-2], whole[:50], b'', b'junk' + whole:
        file.write_bytes(broken)
        check()
    Image.new('RGB', (64, 64), 'lime').save(files[1])  # another picture of as many bytes
    assert files[1].stat().st_size == size
    check()
    assert (cache(examples, 32, label='pixels')[1] == data.load_image(files[1], 32)).all()
    files[1].write_bytes(b'junk')
    with pytest.raises(UserError, match='b.ppm cannot be read.*one of 1'):  # before any is encoded
        cached(examples, 32, label='mean')
    with pytest.raises(ZeroDivisionError):  # and before that: does the encoder take a batch?
        cache(examples, 32, label='mean', encode=lambda images: 1 / 0)
    monkeypatch.setattr(data.shutil, 'disk_usage', lambda folder: type('Disk', (), {'free': 5}))
    with pytest.raises(UserError, match='make room'):
        cached(examples[:1], 16, label='mean')


@pytest.mark.parametrize('worst', [float('inf'), float('nan'), 70_000.0])
def test_features_that_float16_cannot_hold_leave_nothing(tmp_path, worst):
    examples, values = data.make_shapes(70, 'x'), iter([65_000.0, 65_000.0, worst])
    with pytest.raises(UserError, match='mean has features beyond float16'):
        data.cache_arrays(examples, 16, tmp_path, 'mean',
                          lambda images: torch.full((len(images), 1, 3), next(values)))
    assert next(values, None) is None and not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------- bleu_meteor
# coco-caption's own output (pycocoevalcap 1.2: PTBTokenizer, Bleu(4)) for these sentences. It lets
# some marks beyond ASCII stand as words; here they are left out like all others.
MARKS = '\u00bf \u00a1 \u00b0 \u00d7 \u201a \u201e \u0964 \uff01 \uff0c'.split()
CAPTIONS = [
    ("A man's dog isn't here, can't you see?", "a man 's dog is n't here ca n't you see"),
    ("It's 3:30 p.m. in the U.S. and she'll go", "it 's 3:30 p.m. in the u.s. and she 'll go"),
    ("A dog & a cat's 50% off $5.00 @ home", "a dog & a cat 's 50 % off $ 5.00 @ home"),
    ("we're they've I'm I'd gonna wanna cannot",
     "we 're they 've i 'm i 'd gon na wan na can not"),
    ('Two T-shirts -- one "red"; one blue... wet .', 'two t-shirts one red one blue wet'),
    ('a black-and-white dog, number # 28!', 'a black-and-white dog number # 28'),
    ("The dogs' bowls; the girl\u2019s caf\u00e9 na\u00efve \u2014 dash \u2013 en",
     "the dogs bowls the girl 's caf\u00e9 na\u00efve dash en"),
    ('A 1.5 liter bottle, 3.5% fat.', 'a 1.5 liter bottle 3.5 % fat'),
    ('The T\u2011shirt, 2.0.1\u2026it is 1/2 or 1.5.', 'the t\u2011shirt 2.0.1 it is 1/2 or 1.5'),
    ('1,000 men on 12/25/2010', '1,000 men on 12/25/2010'),
    ('un perro \u00bfcorre? \u00a1s\u00ed!', 'un perro \u00bf corre \u00a1 s\u00ed'),
    ('\u00abquoted\u00bb \u201cwords\u201d \u2018of\u2019 \u201ethe\u201c \u201asign\u2018',
     'quoted words of \u201e the \u201a sign'),
    ('\u4f60\u597d\uff0c\u4e16\u754c\uff01', '\u4f60\u597d \uff0c \u4e16\u754c \uff01'),
    ('\u0939\u093f\u0928\u094d\u0926\u0940 \u0939\u0948\u0964',
     '\u0939\u093f\u0928\u094d\u0926\u0940 \u0939\u0948 \u0964'),
    ('a dog runs\U0001f600 \U0001f44d\U0001f3fd', 'a dog runs'),
    ('30\u00b0C and 3\u00d74', '30 \u00b0 c and 3 \u00d7 4'),
    ('\u0438 \u0442.\u0434.', '\u0438 \u0442.\u0434'),
    ('\u0665\u066b\u0665 \u0661\u066c\u0660\u0660\u0660',
     '\u0665\u066b\u0665 \u0661\u066c\u0660\u0660\u0660')]


@pytest.mark.parametrize('caption, words', CAPTIONS)
def test_tokenize_equals_coco_captions_tokenizer(caption, words):
    assert tokenize(caption) == [word for word in words.split() if word not in MARKS]
    assert tokenize('A dog , running .', punctuation=True) == ['a', 'dog', ',', 'running', '.']


# Two images with references, captions of both, and pycocoevalcap 1.2's BLEU-1 to 4 of these.
REFERENCES = [['two children play in the water', 'kids splash in a pool of water',
               'two kids playing in the water near a beach'],
              ['a man rides a bicycle down the street', 'a man on a bike',
               'the man is riding his bike down a busy street']]
RESULTS = ['two kids playing in the the water', 'a man is riding a bike']
COCO_BLEU = [92.30769230059173, 86.90481891805547, 69.49737481730259, 55.64924657083807]


def test_bleu_equals_nltks_corpus_bleu_and_coco_captions(monkeypatch):
    for seed in range(5):
        rng, words = np.random.default_rng(seed), list('abcdefg')
        references = [[list(rng.choice(words, rng.integers(3, 12)))
                       for _ in range(rng.integers(1, 6))] for _ in range(40)]
        hypotheses = [list(rng.choice(words, rng.integers(4, 14))) for _ in range(40)]
        expected = [100 * nltk.translate.bleu_score.corpus_bleu(references, hypotheses, [1 / n] * n)
                    for n in (1, 2, 3, 4)]
        assert bleu(references, hypotheses) == pytest.approx(expected, abs=1e-5)
    found = bleu([[r.split() for r in refs] for refs in REFERENCES], [h.split() for h in RESULTS])
    assert found == pytest.approx(COCO_BLEU, abs=1e-6)
    references, hypotheses = [[list('abcdefgh')]], [list('abcd')]
    assert bleu(references, hypotheses, brevity_penalty=False) == pytest.approx([100] * 4)
    assert bleu(references, hypotheses) == pytest.approx([100 * math.exp(1 - 8 / 4)] * 4)
    for nothing in ['y'], []:  # an empty caption is no error
        assert bleu([[['x']]], [nothing]) == pytest.approx([0] * 4, abs=1e-3)
    with pytest.raises(ValueError, match='one caption for each image'):
        bleu([[['x']]], [])
    monkeypatch.setattr('bleu_meteor.meteor', lambda *_: None)
    found = human_score([[list('abcd'), list('abcd'), list('xyzw')]])  # two of three have a twin
    assert found[:4] == pytest.approx([200 / 3] * 4, abs=1e-4) and found[4] is None
    assert human_score([[['a']]]) is None


@needs_shared
def test_meteor_has_the_parameters_of_meteor_1_5():
    """One exact match of two, in one chunk of one: F = P R / (.85 P + .15 R), penalty .6."""
    P, R = 1 / 2, 1 / 4
    expected = 100 * P * R / (0.85 * P + 0.15 * R) * (1 - 0.6 * (1 / 1) ** 0.2)
    assert meteor([[['dog', 'q1', 'q2', 'q3']]], [['dog', 'p1']]) == pytest.approx(expected)
    # The best of two references, a word with the same stem, and a synonym.
    found = meteor([[['nothing'], ['the', 'boys']], [['child']]], [['the', 'boy'], ['kid']])
    assert found == pytest.approx(100 * (1 - 0.6 * 0.5 ** 0.2 + 1 - 0.6) / 2)


def test_without_wordnet_nltks_reason_is_said_once_beside_the_scores(tmp_path):
    write(tmp_path, {'results.json': ROWS, 'references.json': ROWS})
    code = 'import bleu_meteor as b; b.nltk.data.path[:] = []; b.main(), b.main()'
    result = subprocess.run([sys.executable, '-c', code, tmp_path / 'results.json',
                             tmp_path / 'references.json'], text=True, cwd=HERE,
                            capture_output=True)
    assert result.returncode == 0 and result.stdout.count('100.00 100.00 100.00') == 4
    assert len(re.findall("'wordnet' not found.*nltk.downloader", result.stdout)) == 1


@pytest.fixture
def command(monkeypatch, capsys):
    """Function: a script and its arguments, as a process would run it -> status, stdout, stderr."""
    def call(script, *arguments):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
        try:
            data.run_command(importlib.import_module(script[:-3]).main)
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return 0, *capsys.readouterr()
    return call


@pytest.fixture
def score(tmp_path, monkeypatch, command):
    """Function: what two JSON files hold, flags -> status, stdout, stderr; without METEOR."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bleu_meteor, 'meteor', lambda *_: None)

    def call(*contents, flags=()):
        files = dict(zip(('results.json', 'references.json'), contents))
        write(tmp_path, {name: '\ufeff' + json.dumps(x) for name, x in files.items()})
        return command('bleu_meteor.py', *files, *flags)  # with the mark of some editors
    return call


ROWS = [{'image_id': 1, 'caption': 'a dog runs on grass'}, {'image_id': 2, 'caption': 'kids'}]
MORE = [*ROWS, {'image_id': 1, 'caption': 'the dog', 'id': 9}]
TEXTS = {1: ['a dog runs on grass', 'the dog'], 2: ['kids'], 3: ['of another split']}
GUESSES = [{'caption': 'a dog runs on grass', 'log_prob': -1}, {'caption': 'x', 'log_prob': -2}]
RESULT_FORMS = {
    'dictionary': {'1': 'a dog runs on grass', '2': 'kids'},
    'pycocoevalcap': {'1': ['a dog runs on grass'], '2': ['kids']},
    'sample.py': [{'image': 'photos/1', 'captions': GUESSES, 'picture': 'p'},
                  {'image': 'photos\\2', 'captions': [{'caption': 'kids', 'log_prob': -1}]}],
    'other keys': [row | {'id': 7, 'log_prob': -1} for row in ROWS]}
REFERENCE_FORMS = {
    'rows': MORE, 'COCO': {'info': {'year': 1}, 'images': [{'id': 1}], 'annotations': MORE},
    'folders': {'a/1': TEXTS[1], 'a/2': TEXTS[2]},
    'Karpathy': {'dataset': 'x', 'images': [
        {'filename': f'{n}.jpg', 'cocoid': n, 'split': 'test' if n < 3 else 'train',
         'sentences': [{'raw': t, 'tokens': t.split()} for t in texts]}
        for n, texts in TEXTS.items()]}}


@pytest.mark.parametrize('form', [*RESULT_FORMS, *REFERENCE_FORMS])
def test_captions_are_read_in_every_form(score, form):
    plain = {'1': TEXTS[1], '2': TEXTS[2]}
    expected = score(ROWS, plain)
    assert expected[0] == 0 and '100.00 100.00 100.00 100.00' in expected[1]
    assert expected == score(RESULT_FORMS.get(form, ROWS), REFERENCE_FORMS.get(form, plain))


@pytest.mark.parametrize('results, message', [
    ({'1': ['a', 'b'], '2': 'c'}, "1 images captioned twice in the results, such as .'1'"),
    ({'x/1': 'a', '2': 'c', '1': 'b'}, "1 images captioned twice in the results, such as .'1'"),
    ({'2': 'kids'}, "1 of 2 images have no caption in results.json .--allow-missing .*'1'"),
    ({'1': 'a', '2': 'c', '3': 'b'}, "1 of 3 results have no reference, such as .'3'"),
    ([{'id': 1, 'caption': 'a'}], 'results.json: an entry is no image .*"image_id"'),
    ([{'image_id': 5, 'caption': None}], 'results.json: 5 is no image with a caption'),
    ([], 'results.json: .*"image_id"'), (7, 'results.json: .*"image_id"')])
def test_results_that_do_not_fit_are_refused_in_a_line(score, results, message):
    references = {'1': ['a dog'], '2': ['kids']}
    status, out, err = score(results, references)
    assert status == 2 and not out and err.count('\n') == 1
    assert re.match(f'error: .*{message}', err), err
    if '--allow-missing' in message:
        _, out, _ = score(results, references, flags=['--allow-missing'])
        assert out.startswith('1 images, 1 left out') and '100.00' in out


# ------------------------------------------------------------------------------- train: the step
@every_rung
def test_a_training_step_never_asks_the_device_for_a_value(attn, score, cell):
    """Tensors on the device 'meta' have no values: whoever wants one, such as .item(), fails."""
    captioner = Captioner(CaptionerConfig(50, 32, attn, score, cell)).to('meta').train()
    optimizer = torch.optim.Adam(captioner.parameters())
    a = torch.empty(8, 9, 32, device='meta')
    captions = torch.empty(8, 6, dtype=torch.long, device='meta')
    cfg = Settings(attn=attn)
    loss, numbers = batch_loss(captioner, a, captions, cfg, torch.zeros((), device='meta'))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(captioner.parameters(), 5.0)
    optimizer.step()
    unused = [name for name, weight in captioner.named_parameters() if weight.grad is None]
    assert loss.is_meta and unused == ['f_init_c.weight', 'f_init_c.bias'] * (
        cell == 'rnn' and attn != 'none')


@on_every_device
@every_rung
def test_every_rung_learns_a_batch_by_heart(attn, score, cell):
    torch.manual_seed(0)
    a, words = torch.randn(8, 6, 10), torch.randint(4, 20, (8, 5))
    captions = torch.cat([torch.full((8, 1), START), words, torch.full((8, 1), END)], dim=1)
    captioner = Captioner(CaptionerConfig(20, 10, attn, score, cell, 24, 24, 24, dropout=0.0))
    optimizer = torch.optim.Adam(captioner.parameters(), lr=0.01)
    baseline, losses = 0.0, []
    for _ in range(150):
        loss, numbers = batch_loss(captioner, a, captions, Settings(attn=attn), baseline)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        baseline = 0.9 * baseline + 0.1 * float(numbers.get('reward', 0))
        losses.append(float(numbers['nll/word']))
    assert losses[0] > 2.5 and losses[-1] < 0.3
    found = captioner.eval().beam_search(a, 3, 9)
    assert sum(h[0].tokens == c.tolist() for h, c in zip(found, captions[:, 1:])) >= 7


@on_every_device
@pytest.mark.parametrize('attn', ['soft', 'hard'])
def test_a_compiled_step_is_one_graph_and_computes_the_same(attn):
    """Traced and differentiated by the compiler, but run as it is: that takes no C++ compiler."""
    captioner = tiny_captioner(attn=attn, dropout=0.0)
    a, captions = torch.randn(6, 4, 5), torch.randint(4, 9, (6, 5))
    s = torch.randint(0, 4, (6, 4)) if attn == 'hard' else None

    def run_model():
        out = captioner(a, captions, s=s)
        loss = out.logits.log_softmax(2)[:, :, 4:].sum() + out.alphas.square().sum()
        loss = loss if s is None else loss + out.log_p_s.sum()
        return loss, torch.autograd.grad(loss, list(captioner.parameters()))
    plain = run_model()
    torch._dynamo.reset()
    captioner.step = torch.compile(captioner.step, backend='aot_eager', fullgraph=True)
    close(run_model(), plain, atol=1e-4, rtol=1e-4)
    captioner.train()(a, captions).logits.sum().backward()  # and where it samples
    assert not torch._dynamo.utils.counters['graph_break']


def test_amp_takes_float16_where_a_gpu_lacks_bfloat16(monkeypatch, capsys):
    cuda, cpu = torch.device('cuda'), torch.device('cpu')
    for able, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: able)
        assert train.half_precision(cuda) == expected
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx2': True, 'avx512_bf16': False},
                        raising=False)
    assert train.half_precision(cpu) == torch.bfloat16
    assert 'slower' in capsys.readouterr().out


# ------------------------------------------------------ train: the commands, as a user calls them
ENVIRONMENT = os.environ | {'NLTK_DATA': str(SHARED / 'nltk_data'), 'OMP_NUM_THREADS': '1'}
TINY = ['--encoder', 'tiny', '--image-size', '32', '--embed-dim', '8', '--hidden-dim', '8',
        '--attn-dim', '8', '--batch-size', '4', '--epochs', '3', '--device', 'cpu']
TRAIN = ['train.py', '--data', 'flickr8k', *TINY]


def run(script, *arguments, cwd, **options):
    """Run one of the scripts as a process; its folder need not be the current one."""
    script = script if script == '-m' else HERE / script
    return subprocess.run([sys.executable, script, *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, env=ENVIRONMENT, timeout=300, **options)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a small data set and a run that was trained on it; what was printed."""
    folder = tmp_path_factory.mktemp('with space \u00e9')
    write_layout(folder / 'data' / 'flickr8k', 'official')
    result = run(*TRAIN, '--name', 'whole', cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """The current folder of a test: a copy of `trained`."""
    shutil.copytree(trained[0], tmp_path / 'copy')
    monkeypatch.chdir(tmp_path / 'copy')
    return tmp_path / 'copy'


def test_train_prints_and_keeps_what_a_user_wants_to_see(here, trained):
    out, lines = trained[1], Path('runs/whole/log.csv').read_text().splitlines()
    head, (titles, *rows) = lines[:3], [line.split(',') for line in lines[3:]]
    for text in ('3 training images, 15 captions', 'of what is said', 'flickr8k test: 1 images',
                 'the paper', '18.93', 'people', 'sample.py img.jpg --checkpoint runs/whole'):
        assert text in out, text
    assert len(list(Path('runs/whole').glob('attention-*.png'))) == 3
    assert out.startswith('\n'.join(head)) and f'torch {torch.__version__}, 1 x cpu' in head[-1]
    for text in '--name whole', "data='flickr8k'", 'image_size=32', 'lr=0.001', 'amp=False':
        assert text in ' '.join(head), text
    assert [row[0] for row in rows] == ['1', '2', '3'] and 'val BLEU-4' in titles
    for epoch, *values in rows:  # the numbers printed
        printed = re.search(rf'^epoch {epoch}/3 (.*)', out, re.M)[1]
        for title, value in zip(titles[1:], values, strict=True):
            number = float(re.search(rf' {title} (-?[\d.]+)', printed)[1])
            assert number == pytest.approx(float(value), rel=1e-5, abs=6e-4)
    # The vocabulary is that of the training captions: "d" and "e" name the held-out images only.
    words = load_checkpoint('runs/whole/best.pt')[2].words
    assert set(words) == set('a b c dog number 0 1 2 3 4'.split())


@pytest.mark.parametrize('how, model', [
    (signal.SIGINT, ['--attn', 'soft']), (signal.SIGINT, ['--attn', 'hard', '--batch-size', '15']),
    (signal.SIGKILL, ['--cell', 'rnn'])], ids=['soft', 'hard', 'killed'])
def test_a_run_that_is_stopped_at_any_moment_goes_on_to_the_same_weights(here, command, how, model):
    """STOPS=20 in the environment stops it twenty times, at random moments."""
    settings = [*TRAIN, *model, '--epochs', '15', '--patience', '99', '--name']
    assert command(*settings, 'calm')[0] == 0
    cut, rng, stops = Path('runs/cut'), random.Random(0), int(os.environ.get('STOPS', 1))
    script, *arguments = [*settings, 'cut']
    while stops:
        with subprocess.Popen([sys.executable, '-u', HERE / script, *arguments], text=True,
                              stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
            for line in process.stdout:
                if line.startswith('run: '):  # it begins: give it half a second at most
                    threading.Timer(rng.uniform(0, 0.5), process.send_signal, [how]).start()
        status = process.wait()
        assert status in (0, 130 if how == signal.SIGINT else -signal.SIGKILL)
        stops -= status != 0
        if status and (cut / 'last.pt').exists():
            script, *arguments = 'train.py', '--resume', cut
        else:  # it came to its end, or was stopped before it began
            shutil.rmtree(cut, ignore_errors=True)
            script, *arguments = [*settings, 'cut']
    status, _, err = command(script, *arguments)
    assert status == 0, err
    calm, rest = (torch.load(f'runs/{name}/last.pt') for name in ('calm', 'cut'))
    # All but the run's name and the log's speeds: weights, optimiser, best score, position.
    del calm['training']['log'], rest['training']['log']
    for part in ('captioner', 'encoder', 'training', 'words', 'config'):
        assert same(calm[part], rest[part]), part
    calm, rest = (re.findall(r'\n\d+,.*,', Path(f'runs/{name}/log.csv').read_text())
                  for name in ('calm', 'cut'))
    assert calm == rest and len(calm) == 15  # a row for each epoch; the speed comes last


def test_two_processes_train_like_one(here):
    export(nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU()), 'cnn.pt2')
    settings = [*TRAIN[1:], '--encoder', 'cnn.pt2', '--dropout', '0', '--input-dropout', '0',
                '--epochs', '5']  # 20 steps
    one = run('train.py', *settings, '--name', 'one', cwd=here)
    # Threads wait longer for each other here: one of gloo's that frees a tensor late would abort.
    Path('slow.py').write_text(
        f'import runpy, sys\nsys.setswitchinterval(0.02)\nsys.path.insert(0, {str(HERE)!r})\n'
        f'runpy.run_path({str(HERE / "train.py")!r}, run_name="__main__")\n')
    two = run('-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', 'slow.py',
              *settings, '--name', 'two', cwd=here)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    losses = [re.findall(r'loss ([\d.]+)', result.stdout) for result in (one, two)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    one, two = (torch.load(f'runs/{name}/last.pt')['captioner'] for name in ('one', 'two'))
    for name in one:  # Adam would make a small difference in a gradient a large one here
        close(two[name], one[name], atol=1e-5, rtol=1e-4)


def test_shapes_are_what_is_learned_where_nothing_else_is_said(here, monkeypatch, command):
    make, made = data.make_shapes, []
    monkeypatch.setattr(data, 'make_shapes', lambda n, *rest: made.append(n) or make(20, *rest))
    status, out, err = command('train.py', '--epochs', '1', '--device', 'cpu')
    assert status == 0 and made == [7000, 200, 400, 400], err
    assert '20 training images, 100 captions' in out and 'METEOR pointing' in out
    assert 'shapes test: 20 images' in out and 'shapes unseen: 20 images' in out


def test_a_cnn_learns_only_from_its_epoch_on_and_no_run_is_overwritten(here, command):
    torch.manual_seed(0)
    before = Encoder('tiny', 32).state_dict()
    for first, name in ((0, 'flickr8k-none'), (1, 'flickr8k-none-2')):
        status, _, err = command(*TRAIN, '--attn', 'none', '--epochs', '1', '--amp',
                                 '--finetune-from', first)
        assert status == 0, err
        after = load_checkpoint(f'runs/{name}/last.pt')[1].state_dict()
        assert same(before, after) == (first == 1)


@pytest.mark.parametrize('attn', ['soft', 'hard'])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_good(here, command, attn):
    status, _, err = command(*TRAIN, '--attn', attn, '--lr', '1e38', '--name', 'nan')
    assert status == 2 and 'the loss is not a number in epoch' in err
    weights = load_checkpoint('runs/nan/last.pt')[0].parameters()
    assert all(weight.isfinite().all() for weight in weights)


def test_a_run_goes_on_and_is_scored_on_another_machine(here, command):
    """Its device, folders and --amp are not those of the machine where it was trained."""
    for name in ('best.pt', 'last.pt'):
        content = torch.load(f'runs/whole/{name}')
        content['settings'] |= dict(device='cuda:99', amp=True, data_dir='/none', cache_dir='/none')
        torch.save(content, f'runs/whole/{name}')
    status, out, err = command('train.py', '--resume', 'runs/whole', '--epochs', '4')
    assert status == 0 and re.search('1 x (cpu|cuda:0|mps:0)\n', out) and 'epoch 4/4' in out, err
    status, out, err = command('train.py', '--eval', 'runs/whole', '--split', 'val', '--beam', '2')
    assert status == 0, err
    row = next(line.split() for line in out.splitlines() if line.startswith('this model'))
    files = [f'runs/whole/val-{name}.json' for name in ('results', 'references')]
    _, out, _ = command('bleu_meteor.py', *files)  # gives the same scores
    line = next(line.split() for line in out.splitlines() if line.startswith('BLEU-1 .. 4'))
    assert line[3:] == row[4:8] and float(line[3]) > 0


def test_own_pictures_and_captions_and_a_model_to_go_on_from(here, command):
    name, mine = 'ein gro\u00dfer Hund.jpg', here / 'data' / 'mine'
    captions = ['dog', 'Ein gro\u00dfer Hund auf der Stra\u00dfe .', '\u4e00\u53ea\u72d7',
                ' '.join(f'word{i}' for i in range(60)), '. . .']
    make_pictures(mine, [name])  # one image is for training, validation and test
    write(mine, {'captions.txt': ''.join(f'{name}\t{x}\n' for x in captions)})
    status, out, err = command('train.py', '--data', 'mine', *TINY, '--max-len', '70')
    assert status == 0 and '1 training images, 5 captions' in out and 'mine test: 1 images' in out
    first, _, words, _ = load_checkpoint('runs/mine-soft/last.pt')
    assert {'\u4e00\u53ea\u72d7', 'stra\u00dfe', 'word59', 'dog'} <= set(words.words)

    shutil.rmtree(mine)  # the model goes on with others, of words that it mostly does not know
    make_pictures(mine, SENTENCES)
    write(mine, {'captions.txt': ''.join(f'{n},Dog\n{n},A cat\n' for n in SENTENCES)})
    for lr in '1e-9', '1e-2':
        status, out, err = command('train.py', '--data', 'mine', '--epochs', '1', '--lr', lr,
                                   '--init-from', 'runs/mine-soft/last.pt', '--name', lr)
        assert status == 0 and '3 training images, 6 captions' in out and '(33.3 %' in out, err
        again, encoder, words_again, _ = load_checkpoint(f'runs/{lr}/last.pt')
        assert words_again.words == words.words and again.config == first.config
        change = max((again.get_parameter(x) - p).abs().max() for x, p in first.named_parameters())
        assert (change < 1e-6) == (lr == '1e-9')  # it began with the same weights


def test_skip_bad_goes_on_without_what_is_bad_and_counts_it(here, command):
    with open(TOKENS, 'ab') as file:
        file.write(b'\nnonsense\na.jpg#9\t\xff\ngone.jpg#0\tA dog .\n')
    with open('data/flickr8k/Flickr_8k.trainImages.txt', 'a') as file:
        file.write('\ngone.jpg')
    Path(IMAGE).write_bytes(Path(IMAGE).read_bytes()[:600])
    status, out, err = command(*TRAIN, '--epochs', '1', '--skip-bad')
    assert status == 0 and 'left out 4 bad captions and images' in out, err
    assert '2 training images, 10 captions' in out


def test_a_full_disk_keeps_the_checkpoint_that_was_there(here):
    last = here / 'runs' / 'whole' / 'last.pt'
    before = last.read_bytes()
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
    result = run('train.py', '--resume', 'runs/whole', '--epochs', '4', cwd=here, preexec_fn=full)
    assert result.returncode == 2 and 'Traceback' not in result.stderr, result.stderr
    assert re.search(r'error: cannot write .*\.pt .*is the disk full', result.stderr)
    assert last.read_bytes() == before and not list(last.parent.glob('*.part'))


class Code:
    def __reduce__(self):
        return os.mkdir, ('it ran',)


EVAL, RESUME = ['train.py', '--eval', 'runs/whole'], ['train.py', '--resume', 'runs/whole']
IMAGE, TOKENS = 'data/flickr8k/Images/b.jpg', 'data/flickr8k/Flickr8k.token.txt'
BEST, LAST = 'runs/whole/best.pt', 'runs/whole/last.pt'
# What is wrong: files and their new content (a dictionary as a checkpoint has it, or to how many
# bytes it is cut); the command; what its one line says.
FAULTS = {
    'no data folder': ({}, ['train.py', '--data', 'flickr30k', '--data-dir', 'nowhere'],
                       'nowhere/flickr30k has no images: put'),
    'a bad line': ({TOKENS: b'a.jpg#0\tA dog .\nb.jpg'}, TRAIN, 'txt, line 2: not .*--skip-bad'),
    'no validation': ({'data/flickr8k/Flickr_8k.devImages.txt': b''}, TRAIN, 'images .* for val'),
    'no checkpoint': ({}, ['train.py', '--resume', 'runs/none'], 'runs/none is no whole checkp'),
    'no training to go on with': ({}, ['train.py', '--resume', BEST], 'best.pt has no training'),
    'half a checkpoint': ({BEST: 9000}, EVAL, 'best.pt is no whole checkpoint'),
    "another program's": ({BEST: {'w': torch.ones(2)}}, EVAL, "best.pt is no whole .*'format'"),
    'another version': ({BEST: {'format': 'show-attend-tell 9'}}, EVAL, 'format show-attend-te'),
    'code': ({BEST: {'format': Code()}}, EVAL, 'best.pt is no whole .*Weights only'),
    'no words': ({}, [*TRAIN, '--min-count', '99'], 'no word occurs 99 times.*--min-count'),
    'no sampling': ({}, [*TRAIN, '--attn', 'hard', '--warm-up', '3'], '--warm-up must be below'),
    'no such GPU': ({}, [*TRAIN, '--device', 'cuda:99'], '--device cuda:99 cannot be used here'),
    'no cache folder': ({'c': b'a file'}, [*TRAIN, '--cache-dir', 'c'], 'c/.*Not a directory'),
    'another batch': ({}, [*RESUME, '--batch-size', '9'], '--batch-size is 4 in runs'),
    'another model': ({}, ['train.py', '--data', 'flickr8k', '--init-from', LAST, '--cell', 'rnn'],
                      '--cell is lstm in runs'),
    'half of results': ({'a.json': b'[{"image_id": '}, ['bleu_meteor.py', 'a.json', 'a.json'],
                        '-h says what the files hold')}


@pytest.mark.parametrize('fault', FAULTS)
def test_what_a_user_can_put_right_is_said_in_one_line(here, command, fault):
    changes, arguments, message = FAULTS[fault]
    for name, content in changes.items():
        if isinstance(content, dict):
            torch.save(content, name)
        else:
            Path(name).write_bytes(content if isinstance(content, bytes) else
                                   Path(name).read_bytes()[:content])
    before = {path: path.read_bytes() for path in here.rglob('*') if path.is_file()}
    status, _, err = command(*arguments)
    assert status == 2 and err.count('\n') == 1 and re.match(f'error: .*{message}', err), err
    assert before == {path: path.read_bytes() for path in before} and not Path('it ran').exists()


@pytest.mark.parametrize('attn', ['soft', 'hard'])
def test_the_models_that_come_along_caption_photographs_at_once(tmp_path, attn):
    said = {'a-dog-on-grass-with-a-red-disc': 'dog', 'a-dog-and-a-man-on-a-surfboard': 'surf'}
    for name in said:
        shutil.copy(HERE / 'figures' / f'{name}.jpg', tmp_path)
    choice = ['--checkpoint', HERE / 'pretrained' / 'hard.pt'] if attn == 'hard' else []
    result = run('sample.py', '.', *choice, cwd=tmp_path)
    assert result.returncode == 0 and f'{attn}.pt' in result.stderr, result.stderr  # which model
    captions = dict(line.split('.jpg: ') for line in result.stdout.splitlines())
    for name, word in said.items():
        assert word in captions[name] and (tmp_path / f'{name}.attention.png').exists(), captions
    assert sum(path.stat().st_size for path in (HERE / 'pretrained').iterdir()) <= 65e6


# --------------------------------------------------------------------------------- sample, README
MODELS = {'soft': dict(attn='soft'), 'dot': dict(attn='soft', score='dot', cell='rnn'),
          'argmax': dict(attn='hard'), 'expected': dict(attn='hard', hard_decode='expected'),
          'none': dict(attn='none')}


@pytest.fixture
def sampled(tmp_path, monkeypatch, command):
    """Function: arguments of sample.py, in a folder with models and pictures -> as `command`."""
    monkeypatch.chdir(tmp_path)
    encoder, words = Encoder('tiny', 32), Vocabulary('a b c caf\u00e9 \u72d7'.split())
    for name, config in MODELS.items():
        captioner = tiny_captioner(len(words), encoder.feature_dim, seed=2, **config)
        captioner.L_o.bias.data[UNK] += 1  # likely, and never said
        captioner.L_o.bias.data[END] -= 1.5
        Path('runs', name).mkdir(parents=True)
        save_checkpoint(f'runs/{name}/best.pt', captioner, encoder, words,
                        {'beam': 2, 'length_penalty': 0.7})
    Path('album/more').mkdir(parents=True)
    for i, name in enumerate(('b.png', 'a.JPG', 'a.webp', 'more/a.png', '.c.png', 'd.heic')):
        picture = Image.fromarray(data.make_shapes(i + 1, 'pictures')[i].image)
        picture.save(f'album/{name}', format=None if 'heic' not in name else 'PNG')
    Path('album/notes.txt').write_text('a, b')
    fixed = 'sample.py', '--max-len', '7', '--device', 'cpu', '--checkpoint'
    return lambda *arguments, model='soft': command(*fixed, f'runs/{model}', *arguments)


def test_sample_takes_folders_and_says_what_it_leaves_out(sampled):
    Path('album/cut.jpg').write_bytes(Path('album/a.JPG').read_bytes()[:400])
    Path('album/b.attention.png').write_bytes(Path('album/b.png').read_bytes())  # an older picture
    status, out, err = sampled('album', '--json', '--out', 'new/place', '--batch-size', 2)
    found = json.loads(out)
    images = [f'album/{name}' for name in ('a.JPG', 'a.webp', 'b.png', 'more/a.png')]
    assert [x['image'] for x in found] == images
    assert all(len(x['captions']) == 1 and x['captions'][0]['log_prob'] < 0 for x in found)
    assert len({x['picture'] for x in found} & {str(p) for p in Path('new/place').iterdir()}) == 4
    *_, notes, error = err.splitlines()
    assert 'left out of album: 2 files' in notes and 'HEIC' in notes
    assert status == 2 and error.startswith('error: album/cut.jpg cannot be read')
    status, out, _ = sampled('album/more', 'album/b.png', '--top', '2', '--beam', '99')
    assert status == 0 and re.fullmatch(r'(album/more/a.png: .*  \(-\d+\.\d\d\)\n){2}'
                                        r'(album/b.png: .*  \(-\d+\.\d\d\)\n){2}', out)
    assert Path('album/more/a.attention.png').exists()


@pytest.mark.parametrize('arguments, message', [
    (['https://example.org/a.jpg'], 'is an address: save'),
    (['empty'], 'the folder empty has no images'),
    (['album/d.heic', 'none.png', 'runs/soft/best.pt'],
     r'd.heic .*HEIC.*\nerror: none.png .*No such file.*\nerror: .*best.pt cannot be read'),
    (['album/b.png', '--out', 'album/notes.txt'], r'cannot write album/notes.txt/b.*--out'),
    (['album/b.png', '--beam', '0'], '--beam, .* at least 1')])
def test_sample_says_what_is_wrong(sampled, arguments, message):
    Path('empty').mkdir()
    Path('album/d.heic').write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic')
    status, _, err = sampled(*arguments)
    assert status == 2 and re.search(f'error: .*{message}', err)


@pytest.mark.parametrize('model', MODELS)
def test_explain_tells_the_numbers_of_the_beam_search(sampled, monkeypatch, model):
    best, search = [], Captioner.beam_search
    monkeypatch.setattr(Captioner, 'beam_search', lambda *x: best.extend(search(*x)) or best)
    status, out, _ = sampled('album/b.png', '--explain', '--beam', 3, model=model)
    assert status == 0 and max(map(len, out.splitlines())) <= 100
    caption, shapes, head, *rows = out.splitlines()
    hypothesis, total, slack = best[0][0], 0, 0
    assert len(rows) > 1 and f', logits ({len(hypothesis.tokens)}, 9)' in shapes
    assert 'picture (3, 32, 32), a (16, 128), ' in shapes
    assert caption.split()[1:] == [row.split()[0] for row in rows if '<end>' not in row[:9]]
    for t, row in enumerate(rows):
        p, *numbers = map(float, re.findall(r'(?<= )\d\.\d\d', row))
        total, slack = total + math.log(p), slack + 0.005 / (p - 0.005)
        likeliest = re.findall(r'(\d\.\d\d) (<?[^\W\d]+>?)', row)
        assert len(likeliest) == 3 and float(likeliest[0][0]) >= p
        assert not re.search('<unk>|<pad>|<start>', row)
        if model == 'none':
            assert len(numbers) == 3 and 'beta' not in head
            continue
        assert numbers[0] == pytest.approx(hypothesis.betas[t], abs=0.0051)
        cells, alpha = re.findall(r'(\d\.\d\d) (\d),(\d)', row), hypothesis.alphas[t]
        for (weight, i, j), largest in zip(cells, np.sort(alpha)[:-4:-1], strict=True):
            assert alpha.reshape(4, 4)[int(i), int(j)] == largest
            assert float(weight) == pytest.approx(largest, abs=0.0051)
    assert abs(total - hypothesis.log_prob) < slack < 1


@pytest.mark.parametrize('word, drawn', [
    ('dog\u2019s', 'dog\u2019s'), ('caf\u00e9', 'cafe'), ('cafe\u0301', 'cafe'), ('\u72d7', '72d7'),
    ('\u0142\u00f3d\u017a', 'lodz'), ('\u044f', 'ya'), ('\u05d0', 'alef'), ('\U0010fffe', '?')])
def test_letters_that_pillows_font_lacks_are_spelled(word, drawn):
    letters = ''.join(map(drawable, unicodedata.normalize('NFC', word)))
    box = bytes(LARGE.getmask('\U0010ffff'))  # what a font shows of a letter that it lacks
    assert letters == drawn and all(bytes(LARGE.getmask(letter)) != box for letter in letters)
    sheets = [np.asarray(draw_attention(Image.new('RGB', (9, 9)), [x])) for x in (word, drawn)]
    assert (sheets[0] == sheets[1]).all() and (sheets[0][:30] == 0).any()


def test_a_drawing_has_a_panel_for_each_word(tmp_path):
    def panels(sheet):  # red ones -> how many in the first row, and rows
        red = np.asarray(sheet)[:, :, 0].astype(int) - np.asarray(sheet)[:, :, 1] > 30
        rows, columns = (np.diff(np.flatnonzero(red.any(axis=k)), prepend=-9) > 5 for k in (1, 0))
        return columns.sum(), rows.sum()
    image, alphas = Image.new('RGB', (60, 30), 'red'), np.tile([1.0, 0, 0, 0], (13, 1))
    for T, across, down in ((0, 1, 1), (1, 2, 1), (11, 6, 2), (12, 6, 3)):
        sheet = draw_attention(image, ['dog'] * T, alphas, np.ones(13), (2, 2))
        assert panels(sheet) == (across, down) and sheet.width > 6 * PANEL
    lit = np.asarray(sheet)[66, 236 + np.array([PANEL // 4, 3 * PANEL // 4]), 0]
    assert lit[0] > 200 and lit[1] < 100  # the first word's panel, left and right
    weights = attention_map(np.eye(24)[8], (4, 6), (224, 224))  # it looks at the cell 1,2
    y, x = np.unravel_index(weights.argmax(), weights.shape)
    assert abs(y - 84) < 6 and abs(x - 93) < 6 and weights.max() == 1 and weights[-1, -1] < 0.1
    assert panels(draw_attention(image, ['dog'] * 3, alphas, np.ones(13), (2, 2), 2)) == (2, 2)
    pixels = np.asarray(image)
    draw_page(tmp_path / 'new' / 'page.png', [(pixels, ['dog'] * 7, alphas, np.ones(13), (2, 2)),
                                              (pixels, ['dog', 'runs'])])  # without attention: one
    assert panels(Image.open(tmp_path / 'new' / 'page.png')) == (6, 3)


def test_the_readmes_map_names_what_is_there():
    checked = 0
    for row in (HERE / 'README.md').read_text(encoding='utf-8').splitlines():
        if row.startswith('|') and '.py`' in row:
            for name in re.findall(r'`([\w.]+)`', row.rsplit('|', 2)[1]):
                if name.endswith('.py'):
                    module = importlib.import_module(name[:-3])
                else:
                    assert callable(operator.attrgetter(name)(module))
                    checked += 1
    assert checked >= 18
