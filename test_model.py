"""Tests, in the order of the modules: each compares the code with something that is not the code.

    python -m pytest -q test_model.py

test_golden.npz has numbers from the authors' own Theano program (float32; theirs are row vectors,
gates in the order i, f, o, g, word 0 is <eos>, and the first word's vector is zero).
"""
import csv
import hashlib
import importlib
import io
import itertools
import json
import math
import operator
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from dataclasses import fields
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import DEFAULT, Mock, patch

import nltk.translate.bleu_score
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageColor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.nn import functional as F
from torch.testing import assert_close as close

import bleu_meteor
import data
import train
from attention import DotAttention, doubly_stochastic, entropy, hard_context, reinforce_loss
from attention import soft_context
from bleu_meteor import bleu, meteor, tokenize
from data import END, PAD, START, UNK, UserError, Vocabulary
from model import Captioner, CaptionerConfig, Encoder, LSTMCell, RNNCell, load_checkpoint
from model import save_checkpoint
from sample import PANEL, draw_attention, draw_look, drawable
from train import Settings, batch_loss

try:
    import resource
except ImportError:  # Windows has none
    resource = None

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / 'shared'
nltk.data.path.insert(0, str(SHARED / 'nltk_data'))
torch.set_num_threads(1)  # the models here are so small that more threads only wait
needs_shared = pytest.mark.skipif(not (SHARED / 'encoders').is_dir(),
                                  reason=f'needs the folder {SHARED} with data and WordNet')
every_rung = pytest.mark.parametrize('attn, score, cell', [text.split() for text in (
    'soft additive lstm', 'soft dot lstm', 'hard additive lstm', 'hard dot lstm',
    'none additive lstm', 'soft additive rnn', 'none additive rnn')])
on_every_device = pytest.mark.usefixtures('device')


@pytest.fixture(params=['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu'])
def device(request):
    """A test's tensors and modules are made on each device that there is, in turn."""
    with torch.device(request.param):
        yield torch.device(request.param)


def tiny_captioner(V=9, D=5, scale=3.0, **config):
    """A small captioner in evaluation mode whose random weights are large enough to matter."""
    torch.manual_seed(0)
    sizes = dict(embed_dim=6, hidden_dim=7, attn_dim=4, dropout=0.5) | config
    captioner = Captioner(CaptionerConfig(V, D, **sizes)).eval()
    for weight in captioner.parameters():
        weight.data.mul_(scale)
    return captioner


# ------------------------------------------------------------------------------------ attention
@on_every_device
def test_dot_attention_equals_torchs_scaled_dot_product():
    torch.manual_seed(0)  # additive attention: see the authors' program below
    attention, a, h = DotAttention(5, 7, 4), torch.randn(2, 3, 5), torch.randn(2, 7)
    z = soft_context(attention(attention.project(a), h), a)
    query = attention.W_h(h)[:, None]
    close(z, F.scaled_dot_product_attention(query, attention.W_a(a), a)[:, 0])


@on_every_device
def test_hard_context_draws_from_alpha_and_nothing_becomes_nan(monkeypatch):
    torch.manual_seed(0)
    alpha, a = torch.tensor([[0.5, 0.3, 0.2, 0.0]]), torch.eye(4)[None]
    z, log_p_s = hard_context(alpha.expand(20000, 4), a)
    assert (z.mean(0) - alpha).abs().max() < 0.015  # four standard deviations
    close(log_p_s.exp(), z @ alpha[0])
    # Some devices' exponential_ can return 0, and 0 / 0 would be NaN.
    monkeypatch.setattr(torch.Tensor, 'exponential_', lambda x: torch.tensor([[1.0, 1, 1, 0]]))
    assert hard_context(alpha, a)[0].tolist() == [[1, 0, 0, 0]]
    certain = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    entropy(certain).sum().backward()  # where 0 log 0 is 0
    assert certain.grad.isfinite().all()


# ------------------------------------------------------------------------------ model: the cells
@on_every_device
def test_cells_equal_torchs():
    torch.manual_seed(0)
    lstm, rnn = LSTMCell(7, 7).double(), RNNCell(7, 7).double()
    x, h, c = torch.randn(3, 3, 7).double()
    order = torch.arange(28).view(4, 7)[[0, 1, 3, 2]].flatten()  # torch has the gates i, f, g, o
    W, b, U = (weight[order] for weight in lstm.parameters())
    close(lstm(x, (h, c)), torch.lstm_cell(x, (h, c), W, U, b))
    expected = torch.rnn_tanh_cell(x, h, rnn.W.weight, rnn.U.weight, rnn.W.bias)
    close(rnn(x, (h, c)), (expected, c))


@on_every_device
def test_show_and_tell_is_a_cell_fed_the_image_first():
    captioner, a, zero = tiny_captioner(attn='none'), torch.rand(2, 3, 5), torch.zeros(2, 7)
    captions = torch.randint(9, (2, 4))
    Ey, state = captioner.E(captions[:, :-1]), (zero, zero)
    for x in (captioner.W_I(a.mean(1)), *Ey.unbind(1)):
        state = captioner.cell(x, state)
    expected = captioner.L_o(torch.tanh(Ey[:, -1] + captioner.L_h(state[0])))
    close(captioner(a, captions).logits[:, -1], expected)


# ------------------------------------------------ the authors' own program (golden arrays)
@pytest.fixture
def golden(device):
    with np.load(HERE / 'test_golden.npz') as arrays:
        return {key: torch.from_numpy(arrays[key]).to(device) for key in arrays.files}


def theirs_to_ours(words):
    """Their word ids -> ours: <eos> 0 -> <end>, 1, 2, .. -> 4, 5, .. Their 50 words are our 53."""
    return torch.where(words == 0, END, words.long() + 3)


# Ours and theirs. ff_logit_ctx_b is in our L_h.bias too.
PAIRS = """
    E.weight Wemb  cell.W.weight decoder_W  cell.W.bias decoder_b  cell.U.weight decoder_U
    W_z.weight decoder_Wc  attention.W_a.weight decoder_Wc_att  attention.W_a.bias decoder_b_att
    attention.W_h.weight decoder_Wd_att  attention.v.weight decoder_U_att
    f_beta.weight decoder_W_sel  f_beta.bias decoder_b_sel
    f_init_h.weight ff_state_W  f_init_h.bias ff_state_b
    f_init_c.weight ff_memory_W  f_init_c.bias ff_memory_b
    L_h.weight ff_logit_lstm_W  L_h.bias ff_logit_lstm_b  L_z.weight ff_logit_ctx_W
    L_o.weight ff_logit_W  L_o.bias ff_logit_b""".split()


def pairs(captioner, golden, group):
    """Each parameter of ours, its rows that they have too, golden[group/their name] for these."""
    for ours, theirs in zip(PAIRS[::2], PAIRS[1::2]):
        weight, array = captioner.get_parameter(ours), golden[f'{group}/{theirs}']
        rows = theirs_to_ours(torch.arange(50)) if len(weight) == 53 else slice(None)
        if theirs != 'Wemb':
            array = array.t()
        yield weight, rows, array.reshape(weight[rows].shape)


def authors_captioner(golden, attn='soft', eos=0.0):
    """Our captioner with the authors' parameters; `eos` is added to the bias of the end word."""
    captioner = Captioner(CaptionerConfig(53, 24, attn, embed_dim=16, hidden_dim=32, attn_dim=24,
                                           dropout=0.0))
    with torch.no_grad():
        captioner.L_o.bias.fill_(-1e9)  # our special words do not exist in their program
        for weight, rows, array in pairs(captioner, golden, 'param'):
            weight[rows] = array
        captioner.E.weight[START] = 0
        captioner.L_h.bias.add_(golden['param/ff_logit_ctx_b'])
        captioner.L_o.bias[END] += eos
    return captioner


def give_locations(monkeypatch, s, where):
    """Training takes the locations s (B, T) instead of drawing some, and samples where `where`
    (B, T) is true, unless Captioner.forward is given `sampled`, as it is by batch_loss."""
    columns = zip(s.unbind(1), where.unbind(1))

    def given(alpha, a, sampled=None):
        s_t, where_t = next(columns)
        return hard_context(alpha, a, s_t, where_t if sampled is None else sampled)
    monkeypatch.setattr('model.hard_context', given)


@on_every_device
@pytest.mark.parametrize('call', ['', 'call0', 'call1', 'call2'])
def test_attention_equals_the_authors_program_given_its_samples(golden, monkeypatch, call):
    captioner, N, T, L = authors_captioner(golden, 'hard' if call else 'soft'), 4, 7, 9
    words, mask = theirs_to_ours(golden['in/x'].T), golden['in/mask'].T  # (N, T), padded
    if call:
        sample = golden[f'{call}/out/alpha_sample'].transpose(0, 1)  # (N, T, L), a 1 in each row
        sampled = golden[f'{call}/h_sampling_mask_per_t'].bool().expand(N, T)  # a coin for a step
        give_locations(monkeypatch, sample.argmax(2), sampled)
    out = captioner(golden['in/ctx'], F.pad(words, (1, 0), value=START))
    p = out.logits.softmax(2).take_along_dim(words[..., None], 2).squeeze(2)
    costs = -((p + 1e-8).log() * mask).sum(1)  # their program adds 1e-8
    # Words are at steps 0 to lengths - 1, <eos> at lengths, then comes padding. There their state
    # stands still: each step has the alpha of step lengths + 1, made of the state after <eos>.
    step = torch.minimum(torch.arange(T), golden['in/lengths'][:, None] + 1)
    alphas = out.alphas.take_along_dim(step[..., None], 1)
    stem = f'{call}/out' if call else 'soft'
    close(costs, golden[f'{stem}/cost'], atol=1e-5, rtol=1e-5)
    close(alphas, golden[f'{stem}/alphas'].transpose(0, 1), atol=1e-5, rtol=0)
    if call == 'call0':
        return  # the golden file has the gradients of the others
    if call:  # theirs: sum over captions of [cost / N + (cost / T - b) log p(s) / 10 - 0.002 H]
        # = mean of [cost + (cost - T b) log p(s) N / (10 T) - 0.002 N H] = mean of reinforce_loss
        # with log p(y) = -cost, baseline -T b, lambda_r = N / (10 T), lambda_h = 0.002 N.
        log_p_s = (alphas * sample).sum(2).log() * sampled  # steps of the padding are in it too
        baseline = -T * golden[f'{call}/baseline_before']
        loss = reinforce_loss(-costs, log_p_s.sum(1), alphas, baseline, N / (10 * T), 0.002 * N)
    else:  # their term is N / L times the mean over captions of ours
        close(out.betas * mask, golden['soft/selector'].T * mask, atol=1e-5, rtol=0)
        loss = costs + N / L * doubly_stochastic(alphas)
        close(loss.mean(), golden['soft/total_loss'], atol=1e-5, rtol=1e-5)
    loss.mean().backward()
    for weight, rows, expected in pairs(captioner, golden, f'{call or "soft"}/grad'):
        error = (weight.grad[rows] - expected).abs().max()
        assert error <= 1e-5 * max(1, expected.abs().max())


@on_every_device
def test_beam_search_finds_the_authors_captions(golden):
    keys = re.findall(r'(gen(?:_eos([^/]*))?/(?:maxlen(\d+)/)?k(\d+)/)scores', ' '.join(golden))
    for stem, eos, max_len, K in keys:  # such as gen_eos-1/maxlen9/k3/scores
        captioner = authors_captioner(golden, eos=float(eos or 0)).eval()
        found = captioner.beam_search(golden['gen/ctx'], int(K), int(max_len or 30))
        for n, hypotheses in enumerate(found):
            ours = sorted([*h.tokens, -h.log_prob] for h in hypotheses)
            theirs = []
            arrays = [golden[stem + name][n] for name in ('samples', 'lengths', 'scores')]
            for words, length, score in zip(*arrays):
                theirs.append([*theirs_to_ours(words[:length]).tolist(), score.item()])
            for one, other in zip(ours, sorted(theirs), strict=True):
                assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert len(keys) == 33 and len(found) == 8


# --------------------------------------------------- hard attention by enumeration, beam search
@on_every_device
def test_reinforce_is_unbiased_and_the_bound_holds(monkeypatch):
    """All location sequences of L = 3, T = 2: E[estimator] = exact gradient of L_s."""
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)  # the loss in float64 too
    captioner = tiny_captioner(V=7, D=4, attn='hard', scale=2.0, dropout=0.0).double().train()
    a, captions = torch.randn(1, 3, 4).double(), torch.tensor([[START, 5, END]])
    s = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # (9, 2)

    def gradient(loss):
        return torch.autograd.grad(loss, list(captioner.parameters()), retain_graph=True)
    give_locations(monkeypatch, s, torch.ones(9, 2).bool())
    out = captioner(a.expand(9, -1, -1), captions.expand(9, -1))
    log_p_y = out.logits.log_softmax(2)[:, [0, 1], [5, END]].sum(1)
    p = out.log_p_s.sum(1).exp()
    bound = p @ log_p_y
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert bound <= (p @ log_p_y.exp()).log()  # eq. (10): L_s <= log p(y | a)
    cfg = Settings(attn='hard', lambda_r=1.0, lambda_h=0.0)
    for baseline in 0.0, bound.item():
        mean = 0
        for n in range(9):  # each sequence as batch_loss takes it, with samples for all captions
            row = s[n:n + 1]
            give_locations(monkeypatch, row, torch.ones(1, 2).bool())
            loss, _ = batch_loss(captioner, a, captions, cfg, baseline, expected=0.0)
            mean = mean + p[n].item() * loss
        close(gradient(-mean), gradient(bound), atol=1e-9, rtol=1e-6)


@on_every_device
def test_input_dropout_drops_a_feature_at_all_locations_and_only_in_training():
    captioner, a, seen = tiny_captioner(D=200, input_dropout=0.25), torch.ones(4, 3, 200), []
    captioner.attention.W_a.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    for training in True, False:
        captioner.train(training)(a, torch.ones(4, 4).long())
    dropped, whole = seen
    assert torch.equal(whole, a) and (dropped == dropped[:, :1]).all()
    close(dropped.unique(), torch.tensor([0, 4 / 3]))


@on_every_device
@every_rung
def test_wide_beam_equals_exhaustive_search_by_teacher_forcing(attn, score, cell):
    captioner = tiny_captioner(V=7, scale=2.0, attn=attn, score=score, cell=cell)
    a = torch.randn(3, 3, 5)
    for n, found in enumerate(captioner.beam_search(a, 60, max_len=3, length_penalty=0.5)):
        # All that three words can say: those that end after 0 to 2 words, and those cut off.
        assert len({tuple(h.tokens) for h in found}) == len(found) == 1 + 3 + 9 + 27
        ranks = [(h.tokens[-1] != END, -h.log_prob / len(h.tokens) ** 0.5) for h in found]
        assert ranks == sorted(ranks)
        for h in found:
            out = captioner(a[n:n + 1], torch.tensor([[START, *h.tokens]]))
            log_p = out.logits.log_softmax(2)[0, range(len(h.tokens)), h.tokens]
            assert h.log_prob == pytest.approx(log_p.sum().item(), abs=1e-5)
            if attn != 'none':
                close(torch.from_numpy(h.alphas), out.alphas[0].cpu())
                close(torch.from_numpy(h.betas), out.betas[0].cpu())


# ----------------------------------------------------------------------- encoders and checkpoints
@pytest.mark.parametrize('name', (
    'vgg19 resnet18 densenet121 efficientnet_v2_l convnext_tiny regnet_y_400mf mobilenet_v3_small'
    ).split())
def test_torchvision_encoders_are_the_classifier_before_its_pooling(name):
    torch.manual_seed(0)
    encoder = Encoder(name, 64, pretrained=False)
    torch.manual_seed(0)
    classifier = torchvision.models.get_model(name).eval()
    images = torch.rand(1, 3, 64, 64)
    features = encoder(images).transpose(1, 2).unflatten(2, encoder.grid)
    if name == 'vgg19':  # the paper's: its last layer is the ReLU after conv5_4
        features = F.max_pool2d(features, 2)
    features = getattr(classifier, 'avgpool', nn.AdaptiveAvgPool2d(1))(features)
    if name != 'convnext_tiny':  # its classifier flattens by itself
        features = features.flatten(1)
    head = classifier.fc if hasattr(classifier, 'fc') else classifier.classifier
    pixels = torchvision.models.get_model_weights(name).DEFAULT.transforms()  # as it was trained
    images = torchvision.transforms.functional.normalize(images, pixels.mean, pixels.std)
    close(head(features), classifier(images))


def test_a_frozen_encoder_never_changes_and_a_trained_one_learns():
    images = torch.rand(4, 3, 64, 64)
    for encoder in Encoder('resnet18', 64, pretrained=False), Encoder('tiny', 64):
        before, uint8 = encoder(images), (images * 255).round().byte()
        assert encoder.train()(images).requires_grad == encoder.trainable
        changed = not torch.equal(encoder.eval()(images), before)  # batch norm's statistics
        assert changed == encoder.trainable
        close(encoder(uint8), encoder(uint8 / 255))


def export(cnn, path, batch=Dim.DYNAMIC, change=None):
    """Write a .pt2 file as the program says that it should be made, or for another batch; `change`
    is made to the features."""
    shapes = None if batch is None else ({0: batch},)
    if change:
        cnn.register_forward_hook(lambda module, images, features: change(features))
    example = torch.zeros(2, 3, 32, 32)
    torch.export.save(torch.export.export(cnn.eval(), (example,), dynamic_shapes=shapes), path)


def test_an_exported_encoder_learns_and_is_kept(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    Path('cnns').mkdir()
    cnn, images = nn.Conv2d(3, 8, 8, 8), torch.rand(3, 3, 32, 32)
    export(cnn, 'cnns/cnn.pt2')
    encoder = Encoder('cnns\\cnn.pt2', 32, trainable=True).train()  # as Windows writes it
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    before = encoder(images)
    close(before, cnn((images - mean) / std).flatten(2).transpose(1, 2))
    before.square().sum().backward()
    torch.optim.SGD(encoder.parameters(), lr=0.1).step()
    save_checkpoint('a.pt', tiny_captioner(D=8), encoder, Vocabulary('abcde'), {})
    again = load_checkpoint('a.pt')[1](images)
    close(again, encoder(images))
    assert not torch.allclose(again, before, atol=1e-2)


def test_an_exported_cnns_constants_follow_it_to_the_device(tmp_path):
    constant = torch.arange(4.0)
    export(nn.Conv2d(3, 8, 8, 8), tmp_path / 'a.pt2', change=lambda x: x + constant + torch.ones(4))
    encoder = Encoder(tmp_path / 'a.pt2', 32, device='meta')
    assert encoder(torch.rand(3, 3, 32, 32)).is_meta


def test_what_cannot_be_the_encoder_is_said_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path('text.pt2').write_text('hello')
    export(nn.Conv2d(3, 8, 8, 8), 'two.pt2', batch=None)
    export(nn.Conv2d(3, 8, 8, 8), 'dict.pt2', change=lambda x: {'a': x})
    export(nn.Conv2d(3, 8, 8, 8), 'vectors.pt2', change=lambda x: x.flatten(2))
    for name in 'text.pt2 two.pt2 dict.pt2 vectors.pt2 none.pt2 resnet5000 vit_b_16'.split():
        with pytest.raises(UserError, match=f'^{name} cannot be the encoder [^\n]*$'):
            Encoder(name, 32, trial_batch=32)
    assert 'Traceback' not in capfd.readouterr().err  # of torch's own log


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch):
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url',
                        Mock(side_effect=OSError('no network')))
    with pytest.raises(UserError, match='no network.*download https://download.py.*vgg19.*pth'):
        Encoder('vgg19', 224)


@pytest.mark.parametrize('error', [torch.OutOfMemoryError, torch.AcceleratorError])
def test_an_error_of_the_device_is_never_called_a_bad_encoder(monkeypatch, error):
    monkeypatch.setattr(nn.Conv2d, 'forward', Mock(side_effect=error('CUDA')))
    with pytest.raises(error):
        Encoder('tiny', 32)


def test_a_checkpoint_is_enough_to_rebuild_the_model(tmp_path):
    captioner = tiny_captioner(D=128, attn='hard', score='dot', cell='rnn', input_dropout=0.3)
    encoder, vocabulary = Encoder('tiny', 32), Vocabulary(['a', 'dog', 'caf\u00e9', 'x', 'y'])
    save_checkpoint(tmp_path / 'a.pt', captioner, encoder, vocabulary, {'lr': 0.1}, half=True)
    captioner2, encoder2, vocabulary2, settings = load_checkpoint(tmp_path / 'a.pt')
    for one, other in (captioner2, captioner), (encoder2, encoder):  # float16 has 11 bits
        close(one.state_dict(), other.state_dict(), rtol=2 ** -11, atol=1e-7)
    assert captioner2.config == captioner.config and encoder2.image_size == 32
    assert vocabulary2.words == vocabulary.words and settings == {'lr': 0.1}
    assert torch.load(tmp_path / 'a.pt')['captioner']['E.weight'].dtype == torch.float16


def test_a_checkpoint_that_is_held_open_is_written_later_or_stays(tmp_path, monkeypatch):
    model = tiny_captioner(D=128), Encoder('tiny', 32), Vocabulary('abcde')
    path, held = tmp_path / 'a.pt', PermissionError(13, 'held open')
    # It fails twice, then works (DEFAULT), then fails for ever.
    replace = Mock(wraps=os.replace, side_effect=[held, held, DEFAULT, *[held] * 99])
    monkeypatch.setattr('os.replace', replace)
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    save_checkpoint(path, *model, {'run': 1})
    with pytest.raises(UserError, match='^[^\n]*held open[^\n]*$'):
        save_checkpoint(path, *model, {'run': 2})
    assert load_checkpoint(path)[3] == {'run': 1} and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------- train: the step
@every_rung
@pytest.mark.parametrize('trainable, device, dtype', [
    (True, 'meta', torch.float32), (False, 'cuda', torch.float32), (True, 'cuda', torch.bfloat16)])
def test_no_tensor_is_left_on_the_cpu(monkeypatch, attn, score, cell, trainable, device, dtype):
    """Fake tensors have devices and no values, and training asks for none: a GPU would wait."""
    monkeypatch.setattr('torch.cuda.amp.common.amp_definitely_not_available', lambda: False)
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda: True)
    encoder = Encoder('tiny', 32)
    encoder.trainable = trainable
    captioner = tiny_captioner(D=128, attn=attn, score=score, cell=cell)
    with FakeTensorMode(allow_non_fake_inputs=True):  # the weights
        encoder.to(device).train()
        captioner.to(device).train()
        images = torch.zeros(4, 3, 32, 32, device=device).byte()
        captions = torch.zeros(4, 6, device=device).long()
        with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
            a = encoder(images)
            loss, numbers = batch_loss(captioner, a.float(), captions, Settings(attn=attn))
        assert a.dtype == dtype
        kinds = {(x.device.type, x.dtype) for x in (loss, *numbers.values())}
        assert kinds == {(device, torch.float32)}
        if device == 'meta':  # where gradients need no GPU
            weights = [*encoder.parameters(), *captioner.parameters()]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 5.0)
            torch.optim.Adam(weights).step()
            if cell == 'lstm':  # an RNN has no use for f_init_c
                assert all(weight.grad is not None for weight in weights)
        # Captioning asks for values: these stand in for what beam_search does with them.
        with patch.multiple(
                torch.Tensor,
                __bool__=lambda x: True,  # `not log_prob.isfinite().any()`: it goes on to max_len
                nonzero=lambda x: np.zeros((1, 2), int),  # `ends.nonzero()`: beam 0 of image 0
                item=lambda x: 1,  # `words[b, k, 1:].tolist()`, which calls item: each word is 1
                numpy=lambda x: x.device.type):  # `alphas[b, k].cpu().numpy()` gives 'cpu'
            found, = captioner.eval().beam_search(a.float()[:1], 3, max_len=3)
    assert [h.tokens for h in found] == [[1], [1, 1], [1, 1, 1]]
    assert {h.alphas for h in found} == {None if attn == 'none' else 'cpu'}


@on_every_device
def test_log_p_of_words_is_as_precise_as_float32_whatever_the_logits_are():
    torch.manual_seed(0)
    logits, captions = torch.randn(3, 5, 1000).bfloat16(), torch.randint(1000, (3, 6))
    captioner = Mock()
    captioner.return_value.logits = logits
    loss, _ = batch_loss(captioner, None, captions, Settings(attn='none'))
    logits = logits.double().transpose(1, 2)
    expected = F.cross_entropy(logits, captions[:, 1:], reduction='sum') / 3
    close(loss.double(), expected, rtol=1e-6, atol=0)


@on_every_device
@every_rung
def test_every_rung_learns_a_batch_by_heart(attn, score, cell):
    torch.manual_seed(0)
    a, captions = torch.randn(8, 6, 10), torch.randint(4, 20, (8, 7))
    captions[:, 0], captions[:, -1] = START, END
    captioner = Captioner(CaptionerConfig(20, 10, attn, score, cell, 24, 24, 24, dropout=0.0))
    optimizer = torch.optim.Adam(captioner.parameters(), lr=0.01)
    for _ in range(200):
        loss, _ = batch_loss(captioner, a, captions, Settings(attn=attn))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = captioner.eval().beam_search(a, 3, 9)
    assert [best.tokens for best, *_ in found] == captions[:, 1:].tolist()


# --------------------------------------------------------------- data: shapes, words, batches
# A regular polygon in a circle of radius 1: width, area.
POLYGONS = {'circle': (2, math.pi), 'square': (2 ** 0.5, 2), 'triangle': (3 ** 0.5, 27 ** 0.5 / 4),
            'diamond': (2, 2)}


@pytest.mark.parametrize('unseen', [False, True])  # pairs of shape and colour for one split alone
def test_shapes_come_from_the_seed_and_are_what_and_where_their_objects_say(unseen):
    examples, twins = (data.make_shapes(60, 'test', unseen) for _ in range(2))
    for example, twin in zip(examples, twins):
        assert example.captions == twin.captions and (example.image == twin.image).all()
        assert len(set(example.captions)) == 5
        pairs = {(o.shape, o.colour) for o in example.objects}
        assert len(pairs.intersection(data.UNSEEN_PAIRS)) == unseen
        for o in example.objects:
            left, top, right, bottom = (round(64 * v) for v in o.box)
            row, column = (top + bottom) / 2 // (64 / 3), (left + right) / 2 // (64 / 3)
            assert o.cell == 3 * row + column
            # How much of the object's colour is in each pixel adds up to its area.
            grey = example.image[0, 0].astype(float)  # no object reaches that corner
            colour = np.array(ImageColor.getrgb(o.colour)) - grey
            shares = (example.image[top:bottom, left:right] - grey) @ colour / (colour @ colour)
            radius = 64 * data.RADIUS[o.size]
            width, area = POLYGONS[o.shape]
            assert shares.sum() == pytest.approx(radius ** 2 * area, rel=0.15)
            assert (shares.max(0) > 0.1).sum() == pytest.approx(radius * width, abs=2)


# What is between two objects -> where the second one lies: axis, sign.
RELATIONS = {'left of': (0, 1), 'right of': (0, -1), 'above': (1, 1), 'over': (1, 1),
             'below': (1, -1), 'under': (1, -1)}


def test_shapes_captions_tell_the_truth():
    phrase = re.compile(r'(\w+) (\w+) (circle|square|triangle|diamond)')
    for example in data.make_shapes(150, 'val'):
        named = {(o.colour, o.shape): o for o in example.objects}
        if len(named) < len(example.objects):
            continue  # two of a kind: which one is meant?
        for caption in example.captions:
            places = []
            for size, *pair in phrase.findall(caption):
                o = named[tuple(pair)]  # a KeyError: what is named is not there
                places.append((o.cell % 3, o.cell // 3))
                assert size in ('a', o.size)
            assert len(places) == len(named)
            after = phrase.split(caption)[4::4]  # what is after each object
            for relation, (axis, sign) in RELATIONS.items():
                if relation in after[0]:
                    assert sign * places[0][axis] < sign * places[1][axis], caption


def test_pointing_tells_whether_the_cell_is_in_the_named_object():
    objects = [data.Object('circle', 'red', 'small', 0, (0, 0, 0.25, 0.25)),
               data.Object('square', 'blue', 'large', 8, (0.5, 0.5, 1, 1))]
    # Where it looks at the last word, in a grid of 4 x 4. A shape without the colour is a miss.
    for words, cell, hits in (
            ('a red circle', 0, [True]), ('red circle', 1, [False]), ('blue square', 15, [True]),
            ('blue square', 11, [True]), ('or square', 15, [False]), ('square', 15, [False]),
            ('green square', 15, [False]), ('red over', 0, [])):
        alphas = np.eye(16)[[5] * words.count(' ') + [cell]]
        assert data.pointing(words.split(), alphas, objects, (4, 4)) == hits


def test_a_vocabulary_holds_the_most_frequent_words():
    captions = [['a', 'dog'], ['a', 'cat'], ['a', 'dog', 'z']]
    vocabulary = Vocabulary.build(captions, max_size=3)
    assert vocabulary.words == ['a', 'dog', 'cat']
    assert vocabulary.encode(['a', 'z', 'cat']) == [4, UNK, 6]
    assert vocabulary.decode([START, 4, UNK, 5, END, PAD]) == ['a', '<unk>', 'dog']
    assert Vocabulary.build(captions, min_count=2).words == ['a', 'dog']


def test_batches_hold_captions_of_one_length_and_each_caption_once():
    lengths = np.random.default_rng(0).integers(3, 9, size=500)
    batches = data.length_batches(lengths, 32, np.random.default_rng(1))
    assert sorted(np.concatenate(batches)) == list(range(500))
    for batch in batches:
        assert len(batch) <= 32 and len(set(lengths[batch])) == 1
    assert len(batches) == sum(-(-n // 32) for n in np.bincount(lengths))


# -------------------------------------------------------------------------- data sets on disk
SPLITS = {'train': ['a.jpg', 'b.jpg', 'c.jpg'], 'val': ['d.jpg'], 'test': ['e.jpg']}
SENTENCES = {f'{x}.jpg': [f'A {x} dog , number {i} .' for i in range(5)] for x in 'abcde'}
COCO_NAMES = [f'COCO_{part}2014_{i:012}.jpg' for i, part in enumerate(['train'] * 3 + ['val'] * 2)]
MINE = ['red.jpg', 'green.PNG', 'blue.webp', 'grey.tif']


def make_pictures(folder, names=SENTENCES):
    for example, name in zip(data.make_shapes(len(names), 'pictures'), names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(example.image).save(path)


def write(folder, files):
    """Files of a folder by name: bytes, text, or what becomes JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, (dict, list)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def karpathy(split_of, sentences):
    images = []
    for name, texts in sentences.items():
        raw = [{'raw': text} for text in texts]
        images.append({'filename': name, 'split': split_of[name], 'sentences': raw})
    return {'images': images}


def coco(sentences):
    images, annotations = [], []
    for i, name in enumerate(sentences):
        images.append({'id': i, 'file_name': name})
        annotations += [{'image_id': i, 'caption': text} for text in sentences[name]]
    return {'images': images, 'annotations': annotations}


FORMS = {  # of a layout: file, header, and what a line is made of, an image, a number, a caption
    'official': ('Flickr8k.token.txt', '', '{}#{}\t{}'),
    'kaggle8k': ('captions.txt', 'image,caption\n', '{0},"{2}"'),
    'kaggle30k': ('results.csv', 'image_name| comment_number| comment\n', '{}| {}| {}')}


def write_layout(folder, layout):
    """The same five images and their captions in one of the published layouts."""
    make_pictures(folder / 'Images')
    if layout == 'karpathy':
        split_of = {name: split for split in SPLITS for name in SPLITS[split]}
        content = karpathy(split_of | {'c.jpg': 'restval'}, SENTENCES)
        write(folder, {'dataset_flickr8k.json': content, 'captions.txt': 'a.jpg,Not this'})
    elif layout == 'coco':
        write(folder, {'captions_all.json': coco(SENTENCES)})
    else:
        file, header, form = FORMS[layout]
        lines = [form.format(name, i, text) for name in SENTENCES
                 for i, text in enumerate(SENTENCES[name])]
        if layout == 'official':  # Flickr8k has captions of a picture that it has not
            lines.append('2258277193_586949ec62.jpg.1#0\tA dog .')
            for split, name in zip(SPLITS, ('train', 'dev', 'test')):
                write(folder, {f'Flickr_8k.{name}Images.txt': '\n'.join(SPLITS[split])})
        write(folder, {file: header + '\n'.join(lines)})


def names(splits):
    return {split: [x.name for x in examples] for split, examples in splits.items()}


def said(splits):
    return {x.name: x.captions for examples in splits.values() for x in examples}


def load(folder, **options):
    return data.load_captions(folder.name, folder.parent, **options)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder of four own pictures, in root and in sub-folders, where nothing may be fetched."""
    monkeypatch.setattr(data, 'download', lambda *_: pytest.fail('something is downloaded'))
    for name, place in zip(MINE, ('', 'sub', 'sub/deeper', 'z')):
        make_pictures(tmp_path / 'mine' / place, [name])
    return tmp_path / 'mine'


every_layout = pytest.mark.parametrize('layout', [*FORMS, 'karpathy', 'coco'])


@every_layout
def test_layouts(tmp_path, capsys, layout):
    folder = tmp_path / 'flickr8k'
    write_layout(folder, layout)
    splits = load(folder)
    assert said(splits) == SENTENCES and splits['train'][0].image.is_file()
    if layout in ('official', 'karpathy'):
        assert names(splits) == SPLITS and 'drawn' not in capsys.readouterr().out
    else:
        assert capsys.readouterr().out.count('is drawn from train') == 2  # validation and test
    assert load(folder) == splits == data.load_captions(str(folder))


@pytest.mark.parametrize('mark', ['\t', ',', ';', '|'])
def test_a_table_is_read_as_python_writes_it(mine, mark):
    texts = ['A "red", red; thing|here', "It's 3 o'clock: \u72d7", '"Stop", it says', '2 dogs']
    with open(mine / 'captions.csv', 'w', newline='', encoding='utf-8-sig') as file:
        table = csv.writer(file, delimiter=mark)
        table.writerow(['image', 'caption'])
        for name in MINE:
            table.writerows([name, text] for text in texts)
    assert said(load(mine)) == dict.fromkeys(MINE, texts)


def test_a_caption_without_quotes_around_it_may_hold_any_mark(mine):
    write(mine, {'captions.tsv': '\n\n'.join([
        'red.jpg,A dog, a cat; both | here', 'red.jpg|"Sit" says he, "now"', '"red.jpg";2 dogs',
        'sub\\RED.JPG#10\t Two "big, dogs . ', ' z/red.jpg ; 3 ; 4 " of them'])})
    assert said(load(mine))['red.jpg'] == [
        'A dog, a cat; both | here', '"Sit" says he, "now"', '2 dogs', 'Two "big, dogs .',
        '4 " of them']


LINES = ''.join(f'{name},A thing\n' for name in MINE)


def test_lists_make_the_splits_and_what_they_lack_is_drawn(mine, capsys):
    write(mine, {'captions.txt': LINES, 'a/train.txt': '\ufeff' + '\r\n'.join(MINE),
                 'my_testImages.txt': f'c:\\{MINE[2].upper()}\n\n', 'mytest.txt': 'not a list'})
    splits, out = names(load(mine)), capsys.readouterr().out
    assert splits['test'] == [MINE[2]] and '1 images are also in the list of a later split' in out
    assert len(splits['val']) == 1 and 'val is drawn from train' in out
    assert len(splits['train']) == 2 and 'test is drawn' not in out


def test_more_pictures_never_move_one_from_training_to_validation_or_test():
    for seed in range(12):
        trained_on, names = set(), [f'{seed} {i}.jpg' for i in range(300)]
        for size in 1, 2, 3, 4, 6, 9, 20, 300:
            split_of = dict.fromkeys(names[:size], 'train')
            data.draw_missing(split_of)
            assert all(split_of[name] == 'train' for name in trained_on)
            counts = Counter(split_of.values())
            trained_on = {name for name in split_of if split_of[name] == 'train'}
        assert 10 < counts['val'] < 60 and 10 < counts['test'] < 60  # about a tenth each


def test_nothing_is_fetched_while_a_folder_holds_any_file_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'download', Mock())
    write(tmp_path / 'coco', {'.DS_Store': ''})  # it is not the user's
    with pytest.raises(UserError):
        load(tmp_path / 'coco')
    data.download.assert_called_once_with('coco', tmp_path / 'coco')
    # The first is the user's: it only resembles a download's own train2014.zip-unpacked.
    write(tmp_path / 'coco', {'train2014.zip-mine.txt': '', 'captions.txt': 'a.bmp,Ein Hund'})
    with pytest.raises(UserError, match='coco has no image a.bmp'):
        load(tmp_path / 'coco')
    data.download.assert_called_once()


@pytest.mark.parametrize('year, start', [('2014', 0), ('2017', -16)])
def test_coco_of_both_years(tmp_path, year, start):
    folder, files = tmp_path / 'coco', [name[start:] for name in COCO_NAMES]
    texts = dict(zip(files, SENTENCES.values()))
    for part, some in ('train', files[:3]), ('val', files[3:]):
        make_pictures(folder / f'{part}{year}', some)
        content = coco({name: texts[name] for name in some})
        write(folder / 'annotations', {f'captions_{part}{year}.json': content})
    splits = load(folder)
    assert said(splits) == dict(enumerate(texts.values()))  # by COCO's own numbers
    assert names(splits)['val'] == [3, 4]
    shutil.rmtree(folder / f'train{year}')  # what is not there is not asked for
    assert load(folder, splits=['val']) == {'val': splits['val']}


@needs_shared
def test_the_real_flickr8k_and_coco():
    splits = load(SHARED / 'data' / 'flickr8k')
    assert [len(splits[split]) for split in SPLITS] == [6000, 500, 500]  # half of val and test
    assert set(map(len, said(splits).values())) == {5}
    assert len(said(load(SHARED / 'data' / 'coco'))) == 159


def test_names_meet_whatever_system_wrote_them(tmp_path, mine):
    disk = ['Caf\u00e9 1.JPG', unicodedata.normalize('NFD', 'caf\u00e9 2.jpg'), 'STRASSE.Jpg']
    make_pictures(tmp_path / 'disk', [*disk, '000000000007.jpg'])
    place = os.symlink if os.name == 'posix' else shutil.move  # links are followed
    place(tmp_path / 'disk', mine / 'Images')
    words = ['C:\\Bilder\\caf\u00e9 1.jpg', './x/CAF\u00c9 2.jpg', 'stra\u00dfe.jpg',
             'COCO_val2014_000000000007.jpg', '']
    write(mine, {'captions.txt': '\tA dog\n'.join(words)})
    assert said(load(mine)).keys() == {*disk, 7}
    make_pictures(mine / 'small', ['RED.jpg'])
    with pytest.raises(UserError, match='red.jpg and .*small.RED.jpg have the same name: keep one'):
        load(mine)


def test_what_systems_leave_behind_is_no_file_of_a_data_set(tmp_path):
    left = ['.DS_Store', 'Thumbs.db', 'Desktop.ini', '~$b.csv', '$RECYCLE.BIN/b.jpg', '.git/b.jpg',
            '@eaDir/b.jpg', 'lost+found/b.jpg', 'b.attention.png']
    kept = ['a.jpg', 'sub/b.jpg', 'sub/c.txt']
    write(tmp_path, dict.fromkeys(left + kept, ''))
    assert data.list_files(tmp_path) == [tmp_path / name for name in kept]


def test_a_folder_that_may_not_be_read_is_not_an_empty_one(mine, monkeypatch):
    refused = PermissionError(13, 'Permission denied')  # to a user who is not root
    monkeypatch.setattr(os, 'scandir', Mock(side_effect=refused))
    with pytest.raises(PermissionError):
        load(mine)


BAD_LINES = {  # of a table
    'no mark': 'red.jpg A dog', 'no ending': 'red,A dog', 'another order': 'A dog,red.jpg',
    'two captions': 'red.jpg,"A dog","A cat"', 'and with tabs': 'red.jpg\tA dog\tA cat',
    'two lines': 'red.jpg,"A dog\nruns."', 'nothing': 'red.jpg,',
    'a list': 'red.jpg,"[""A dog"", ""A cat""]"', 'a long line': 'x' * 300_000}
LISTED = LINES + 'no.jpg,A dog'
BAD_PARTS = {  # files, of which a part is bad: what is said of it
    'no image': ({'captions.txt': LISTED, 'train.txt': 'no.jpg\nred.jpg', 'test.txt': 'grey.tif',
                  'val.txt': 'blue.webp'}, 'mine has no image no.jpg'),
    'no caption': ({'captions.txt': LINES, 'val.txt': 'x.jpg\nred.jpg', 'train.txt': 'grey.tif'},
                   'val.txt lists x.jpg, which has no caption'),
    'blank': ({'captions.txt': 'red.jpg, ""\ngrey.tif,A dog'}, 'an empty caption of red.jpg')}
for fault, line in BAD_LINES.items():
    BAD_PARTS[fault] = {'captions.txt': LINES + line}, 'captions.txt, line [56], is .*a.jpg,A dog'
BAD_FILES = {
    'more columns': ({'captions.csv': 'image,caption,licence\n'}, "columns 'image,cap.*should be"),
    'an index first': ({'captions.tsv': '\timage\tcaption\n'}, 'columns .*image.*should be'),
    'Excel': ({'captions.txt': b'red.jpg,Caf\xe9'}, 'captions.txt cannot be read .*in UTF-8'),
    'PowerShell': ({'captions.txt': b'\xff\xfer\0e\0d\0'}, 'in UTF-8.*PowerShell'),
    'not listed': ({'captions_x.json': '{"images": [], "annotations": [{"image_id": 7}]}'},
                   "not as Karpathy's and COCO's .*KeyError: 7.*write a captions.txt"),
    'a list in JSON': ({'captions_x.json': '[{"image": "red.jpg"}]'}, "not as Karpathy's and COCO"),
    'a text for each image': ({'red.txt': 'A dog', 'blue.txt': 'A cat'},
                              'no captions.txt, .csv or .tsv: put')}


@pytest.mark.parametrize('fault', [*BAD_PARTS, *BAD_FILES])
def test_what_is_wrong_is_said_in_one_line(mine, capsys, fault):
    files, message = (BAD_PARTS | BAD_FILES)[fault]
    write(mine, files)
    with pytest.raises(UserError, match=message) as error:
        load(mine)
    text = str(error.value)
    assert '\n' not in text and len(text) < 500
    if fault in BAD_PARTS:
        assert '--skip-bad' in text and load(mine, skip_bad=True)
        assert 'left out 1 bad captions and images, such as: ' in capsys.readouterr().out


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine with two archives; its address, folder."""
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


def test_a_download_goes_on_where_it_stopped_in_the_very_folder(tmp_path, monkeypatch, server):
    folder, sources = tmp_path / 'flickr8k', []
    for archive in 'texts.zip', 'images.zip':
        digest = hashlib.sha256((server[1] / archive).read_bytes()).hexdigest()
        sources.append(('what', f'{server[0]}/{archive}', 'sha256', digest))
    monkeypatch.setitem(data.DOWNLOADS, 'flickr8k', sources)
    (server[1] / 'images.zip').rename(tmp_path / 'later')
    with pytest.raises(UserError, match='cannot get .*images.zip .*404.*put it into'):
        load(folder)
    assert os.listdir(folder) == ['texts.zip-unpacked']
    (server[1] / 'texts.zip').unlink()  # it is not fetched again
    (tmp_path / 'later').rename(folder / 'images.zip')  # as the message says
    splits = load(folder)
    assert names(splits) == SPLITS and said(splits) == SENTENCES
    assert load(folder) == splits  # each archive has become a folder, and is deleted
    assert sorted(os.listdir(folder)) == ['images.zip-unpacked', 'texts.zip-unpacked']


def test_a_file_that_is_not_what_was_published_stays_and_is_named(tmp_path, monkeypatch, server):
    write(tmp_path / 'coco', {'texts.zip': 'perhaps the user has packed it'})
    monkeypatch.setitem(data.DOWNLOADS, 'coco', [('', f'{server[0]}/texts.zip', 'md5', '0' * 32)])
    with pytest.raises(UserError, match='delete texts.zip, its md5 sum is wrong.*another way'):
        load(tmp_path / 'coco')
    assert os.listdir(tmp_path / 'coco') == ['texts.zip']


# --------------------------------------------------------------------------- images and their cache
@pytest.mark.parametrize('name', ['RGB.png', 'P.gif', 'CMYK.tif', 'L.png', 'RGBA.png', 'LA.png'])
def test_every_kind_of_image_becomes_rgb_and_what_is_clear_white(tmp_path, name):
    picture = Image.new('RGBA', (60, 40))  # black, and clear where the mode can say so
    picture.paste((255, 102, 51), (0, 0, 30, 20))
    picture.convert(name.split('.')[0]).save(tmp_path / name)
    opened = data.open_image(tmp_path / name)
    assert opened.mode == 'RGB'
    inside = 142 if 'L' in name else (255, 102, 51)  # the same colour in grey
    outside = 255 if 'A' in name else 0
    assert np.abs(np.subtract(opened.getpixel((10, 10)), inside)).max() <= 3
    assert np.abs(np.subtract(opened.getpixel((50, 30)), outside)).max() <= 3


# EXIF's number for how a camera was held -> how it stores an upright picture.
STORED = dict(zip(range(2, 9), ('FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 '
                                'TRANSVERSE ROTATE_270').split()))


@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp'])
@pytest.mark.parametrize('held', STORED)
def test_pictures_come_out_upright_and_what_else_their_notes_say_is_ignored(tmp_path, ending, held):
    path, picture = tmp_path / f'a.{ending}', Image.new('RGB', (64, 48))
    picture.paste('orange', (0, 0, 32, 24))
    # Two entries of tag, type, count and value: how it was held, and a resolution (type 2, text, of
    # 5 letters at byte 0x26) that should be a fraction.
    notes = struct.pack('<HHHIIHHIII', 2, 0x112, 3, 1, held, 0x11a, 2, 5, 0x26, 0) + b'72/1\0'
    notes = b'Exif\0\0II*\0\x08\0\0\0' + notes
    picture.transpose(Image.Transpose[STORED[held]]).save(path, exif=notes, quality=95)
    difference = np.subtract(data.open_image(path), np.asarray(picture), dtype=int)
    assert np.abs(difference).mean() < 4


def test_files_that_are_no_images_are_named(tmp_path):
    write(tmp_path, {'empty.jpg': '', 'a.heic': 'hello' * 99, 'a.bmp': b'BM'})
    Image.new('I;16', (9, 9)).save(tmp_path / '16.png')
    Image.new('F', (9, 9)).save(tmp_path / '32.tif')
    path = tmp_path / 'sum.png'
    Image.new('L', (9, 9)).save(path, dpi=(9, 9))
    path.write_bytes(path.read_bytes().replace(b'pHYs', b'pHYt'))  # not what was summed
    for path in *tmp_path.iterdir(), tmp_path / 'none.jpg':
        with pytest.raises(UserError, match='cannot be read .*--skip-bad') as error:
            data.open_image(path)
        assert str(path) in str(error.value) and '\n' not in str(error.value)


def mean(images):
    """An encoder (B, 3, H, W) -> (B, 1, 3) whose features are easy to compute."""
    return images.float().mean(dim=(2, 3)).unsqueeze(1)


def fail(images):
    """An encoder that may not be called."""
    raise ZeroDivisionError


@pytest.fixture
def photos(tmp_path):
    """Three files, 20 times: more than one batch."""
    make_pictures(tmp_path, ['a.bmp', 'b.ppm', 'c.jpg'])
    return 20 * [data.Example(tmp_path / name, [], (), '') for name in ('a.bmp', 'b.ppm', 'c.jpg')]


def test_features_are_computed_once_for_each_encoder_size_and_set_of_pictures(photos, tmp_path):
    cache, path = partial(data.cache_images, cache_dir=tmp_path / 'cache'), photos[0].image
    for colour in 'red', 'lime':  # two pictures of as many bytes
        Image.new('RGB', (64, 64), colour).save(path)
        features = cache(photos, 32, label='mean', encode=mean)
        expected = [data.load_image(x.image, 32).mean(axis=(1, 2)) for x in photos]
        assert features.dtype == torch.float16
        np.testing.assert_allclose(features[:, 0], expected, rtol=2e-3)
        cache(photos, 32, label='mean', encode=fail)
    for some, size, label in (photos, 16, 'mean'), (photos[::-1], 32, 'mean'), (photos, 32, 'x'):
        with pytest.raises(ZeroDivisionError):
            cache(some, size, label=label, encode=fail)
    for file in (tmp_path / 'cache').iterdir():  # as a broken disk might leave it
        os.truncate(file, 200)
    with pytest.raises(UserError, match='mean-32-.* cannot be read .*delete it'):
        cache(photos, 32, label='mean', encode=fail)
    write(tmp_path, {'z.jpg': 'junk'})
    with pytest.raises(UserError, match='z.jpg cannot be read'):  # before any is encoded
        cache([*photos, data.Example(tmp_path / 'z.jpg', [], (), '')], 32, label='m', encode=fail)


@pytest.mark.parametrize('worst', [float('inf'), float('nan'), 70_000.0])
def test_features_that_float16_cannot_hold_leave_nothing(photos, tmp_path, worst):
    values = [worst, 65_000.0]
    with pytest.raises(UserError, match='features beyond float16'):
        data.cache_images(photos, 16, tmp_path / 'cache', 'x',
                          lambda images: torch.full((len(images), 3), values.pop()))
    assert not values and not os.listdir(tmp_path / 'cache')


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='needs the /proc of Linux')
def test_a_file_gets_its_name_when_it_is_closed_as_windows_asks(photos, tmp_path, monkeypatch):
    replace = os.replace

    def replace_as_windows(old, new):
        assert str(old) not in map(os.path.realpath, Path('/proc/self/fd').iterdir())
        replace(old, new)
    monkeypatch.setattr(os, 'replace', replace_as_windows)
    assert len(data.cache_images(photos, 16, tmp_path / 'cache', 'mean', mean)) == 60


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
    ('un perro \u00bfcorre? \u00a1s\u00ed!', 'un perro \u00bf corre \u00a1 s\u00ed'),
    ('\u00abquoted\u00bb \u201cwords\u201d \u2018of\u2019 \u201ethe\u201c \u201asign\u2018',
     'quoted words of \u201e the \u201a sign'),
    ('\u0939\u093f\u0928\u094d\u0926\u0940 \u0939\u0948\u0964',
     '\u0939\u093f\u0928\u094d\u0926\u0940 \u0939\u0948 \u0964'),
    ('\u0665\u066b\u0665 \u0661\u066c\u0660\u0660\u0660',
     '\u0665\u066b\u0665 \u0661\u066c\u0660\u0660\u0660')]


@pytest.mark.parametrize('caption, words', CAPTIONS)
def test_tokenize_equals_coco_captions_tokenizer(caption, words):
    assert tokenize(caption) == [word for word in words.split() if word not in MARKS]


# Two images with references, captions of both, and pycocoevalcap 1.2's BLEU-1 to 4 of these.
REFERENCES = [['two children play in the water', 'kids splash in a pool of water',
               'two kids playing in the water near a beach'],
              ['a man rides a bicycle down the street', 'a man on a bike',
               'the man is riding his bike down a busy street']]
RESULTS = ['two kids playing in the the water', 'a man is riding a bike']
COCO_BLEU = [92.30769230059173, 86.90481891805547, 69.49737481730259, 55.64924657083807]


def test_bleu_equals_nltks_corpus_bleu_and_coco_captions():
    rng = np.random.default_rng(0)

    def captions(count):
        return [rng.integers(5, size=n).tolist() for n in rng.integers(4, 14, count)]
    hypotheses = captions(99)
    references = [captions(n) for n in rng.integers(1, 6, 99)]
    weights = [[1 / n] * n for n in (1, 2, 3, 4)]
    expected = nltk.translate.bleu_score.corpus_bleu(references, hypotheses, weights)
    assert bleu(references, hypotheses) == pytest.approx([100 * x for x in expected], abs=1e-5)
    references = [[text.split() for text in texts] for texts in REFERENCES]
    found = bleu(references, [text.split() for text in RESULTS])
    assert found == pytest.approx(COCO_BLEU, abs=1e-6)


def test_bleu_of_captions_that_are_short_empty_or_missing():
    references, hypotheses = [[list('abcdefgh')]], [list('abcd')]
    assert bleu(references, hypotheses, brevity_penalty=False) == pytest.approx([100] * 4)
    assert bleu(references, hypotheses) == pytest.approx([100 * math.exp(1 - 8 / 4)] * 4)
    for nothing in ['y'], []:
        assert bleu(references, [nothing]) == pytest.approx([0] * 4, abs=1e-3)
    for refs, results in (references, []), ([[]], [['y']]):
        with pytest.raises(ValueError):
            bleu(refs, results)


@needs_shared
def test_meteor_has_the_parameters_of_meteor_1_5():
    """One exact match of two, in one chunk of one: F = P R / (.85 P + .15 R), penalty .6."""
    P, R = 1 / 2, 1 / 4
    expected = 100 * P * R / (0.85 * P + 0.15 * R) * (1 - 0.6 * (1 / 1) ** 0.2)
    assert meteor([[['dog', 'q1', 'q2', 'q3']]], [['dog', 'p1']]) == pytest.approx(expected)
    # The best of two references, a word with the same stem, and a synonym.
    found = meteor([[['nothing'], ['the', 'boys']], [['child']]], [['the', 'boy'], ['kid']])
    assert found == pytest.approx(100 * (1 - 0.6 * 0.5 ** 0.2 + 1 - 0.6) / 2)


ROWS = [{'image_id': 1, 'caption': 'a dog runs on grass'}, {'image_id': 2, 'caption': 'kids'}]
ENVIRONMENT = os.environ | {  # some clusters set WORLD_SIZE, also where torchrun has not been used
    'NLTK_DATA': str(SHARED / 'nltk_data'), 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': '2'}


def run(script, *arguments, cwd=HERE, environment=ENVIRONMENT, **options):
    """Run one of the scripts as a process; its folder need not be the current one."""
    script = script if script.startswith('-') else HERE / script
    return subprocess.run([sys.executable, script, *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, env=environment, timeout=300, **options)


@pytest.mark.parametrize('fetched', [True, False])
def test_wordnet_is_fetched_once_and_else_meteor_left_out(monkeypatch, capsys, fetched):
    missing, nltk = LookupError('\n*****\n  Resource wordnet not found.\n'), Mock()
    nltk.corpus.wordnet.synsets.side_effect = [missing, None if fetched else missing]
    monkeypatch.setattr('bleu_meteor.nltk', nltk)
    bleu_meteor.get_wordnet.cache_clear()
    assert [bleu_meteor.get_wordnet() for _ in range(3)] == 3 * [fetched]
    nltk.download.assert_called_once_with('wordnet', quiet=True)
    out = capsys.readouterr().out
    assert ('(Resource wordnet not found.): get it with' in out) != fetched
    bleu_meteor.get_wordnet.cache_clear()


@pytest.fixture
def command(monkeypatch, capsys):
    """Function: a script and its arguments, as a process would run it -> status, stdout, stderr."""
    def call(script, *arguments):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
        status = 0
        try:
            data.run_command(importlib.import_module(script[:-3]).main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def score(tmp_path, monkeypatch, command):
    """Function: what two JSON files hold, flags -> status, stdout, stderr; without METEOR."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('bleu_meteor.get_wordnet', lambda: False)

    def call(results, references, *flags):
        write(tmp_path, {'results.json': json.dumps(results).encode('utf-16'),  # PowerShell's
                         'references.json': json.dumps(references).encode('utf-8-sig')})
        return command('bleu_meteor.py', 'results.json', 'references.json', *flags)
    return call


MORE = [{'image_id': '1', 'caption': 'the dog', 'id': 9}, *ROWS]
RAW = [{'raw': 'the dog'}, {'raw': 'a dog runs on grass'}]
IN_EVERY_FORM = [
    MORE, {'info': {}, 'images': [{'id': 1}], 'annotations': MORE},
    {'2': 'kids', '1': ['the dog', 'a dog runs on grass']},
    {'dataset': 'x', 'images': [
        {'filename': '1', 'split': 'test', 'sentences': RAW},
        {'filename': 'b', 'cocoid': 2, 'split': 'test', 'sentences': [{'raw': 'kids'}]},
        {'filename': '3', 'split': 'train', 'sentences': RAW}]}]


@pytest.mark.parametrize('references', IN_EVERY_FORM)
def test_captions_are_read_in_every_form(score, references):
    for results in ROWS, {2: ['kids'], 1: 'a dog runs on grass'}:
        status, out, _ = score(results, references)
        assert status == 0 and out.startswith('2 images')
        assert out.count('100.00 100.00 100.00 100.00') == 2


def test_punctuation_counts_where_it_is_asked_for(score):
    for flags, BLEU_1 in ([], '100.00'), (['--punctuation'], '75.00'):
        _, out, _ = score({'1': 'a dog runs'}, {'1': 'A dog, runs'}, *flags)
        assert re.search(f'BLEU-1 .. 4 +{BLEU_1}', out)  # each result gets its full stop


@pytest.mark.parametrize('results, message', [
    ({'1': ['a', 'b'], '2': 'c'}, '1 .*than one caption'),
    ({'a/1': 'a', '1': 'b', '2': 'c'}, 'a/1'),
    ({'2': 'kids'}, '1 images, such as 1, .*results.json .1. and references.json .2.'),
    ([{'image_id': 1, 'text': 'a'}], "results.json .*'caption'.*-h says"), ([], 'no captions')])
def test_results_that_do_not_fit_are_refused_in_a_line(score, results, message):
    references = {'1': ['a dog'], '2': ['kids']}
    status, out, err = score(results, references)
    assert status == 2 and not out and re.fullmatch(f'error: .*{message}.*\n', err), err


# ------------------------------------------------------ train: the commands, as a user calls them
@pytest.mark.parametrize('stream', [None, io.StringIO()], ids=['closed', 'of a notebook'])
def test_any_stdout_will_do(monkeypatch, stream):
    for name in 'stdout', 'stderr':
        monkeypatch.setattr(sys, name, stream)
    data.run_command(lambda: print('hello'))
    assert stream is None or stream.getvalue() == 'hello\n'
    code = 'import data, os; data.run_command(lambda: print("caf\xe9") or os._exit(0))'
    result = run('-c', code, environment=ENVIRONMENT | {'PYTHONIOENCODING': 'ascii'})
    assert result.stdout == 'caf\\xe9\n', result.stderr  # at once, whatever a log's letters are


def test_who_has_read_enough_may_close_the_pipe():
    with subprocess.Popen([sys.executable, HERE / 'train.py'], env=ENVIRONMENT, cwd=HERE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b''
    assert process.returncode == 0


TINY = ('--encoder tiny --image-size 32 --embed-dim 8 --hidden-dim 8 --attn-dim 8 --batch-size 4 '
        '--epochs 3 --device cpu').split()
TRAIN = ['train.py', '--data', 'flickr8k', *TINY]
IMAGE, TOKENS = 'data/flickr8k/Images/b.jpg', 'data/flickr8k/Flickr8k.token.txt'
RUN, BEST, LAST = 'runs/the whole', 'runs/the whole/best.pt', 'runs/the whole/last.pt'
EVAL, RESUME = ['train.py', '--eval', RUN], ['train.py', '--resume', RUN]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a small data set and a run that was trained on it; what was printed."""
    folder = tmp_path_factory.mktemp('with space \u00e9')
    write_layout(folder / 'data' / 'flickr8k', 'official')
    result = run(*TRAIN, '--name', 'the whole', cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """The current folder of a test: a copy of `trained`."""
    shutil.copytree(trained[0], tmp_path / 'a copy')
    monkeypatch.chdir(tmp_path / 'a copy')
    return tmp_path / 'a copy'


def test_train_prints_and_keeps_what_a_user_wants_to_see(here, trained, command):
    out, log = trained[1], Path(RUN, 'log.csv').read_text()
    for text in ('3 training images, 15 captions', 'flickr8k test: 1 images',
                 '--name the whole', "data='flickr8k'", 'image_size=32', 'lr=0.001', 'amp=False',
                 f'torch {torch.__version__}, 1 x cpu'):
        assert text in out, text
    *head, titles, one, two, three = log.splitlines()
    assert len(head) == 3 and all(f'{line}\n' in out for line in head)
    for epoch, row in enumerate((one, two, three), 1):
        printed = re.search(rf'^epoch {epoch}\b.*', out, re.M)[0]
        numbers = [epoch, *map(float, re.findall(r' (\d+\.\d{3})', printed))]
        assert numbers == pytest.approx(list(map(float, row.split(','))), rel=1e-5, abs=6e-4)
        assert all(title in printed for title in titles.split(','))
    # The vocabulary is that of the training captions: "d" and "e" name the held-out images only.
    words = load_checkpoint(BEST)[2].words
    assert set(words) == set('a b c dog number 0 1 2 3 4'.split())
    # The last line can be pasted.
    _, script, image, *rest = shlex.split(out.split('caption images with it: ')[1])
    status, out, _ = command(Path(script).name, IMAGE, *rest)
    assert (status, image) == (0, 'img.jpg') and out.startswith(f'{IMAGE}: ')


@pytest.mark.parametrize('model', [
    '--amp --lr 0.01 --clip 0.5 --max-len 9', '--attn hard',
    '--cell rnn --finetune --encoder cnn.pt2'])
def test_ctrl_c_ends_at_once_and_the_line_said_goes_on_to_the_same_weights(
        here, command, monkeypatch, model):
    export(nn.Conv2d(3, 8, 8, 8), 'cnn.pt2')
    ticks, steps, batch_loss = itertools.count(0, 50), itertools.count(), train.batch_loss
    monkeypatch.setattr(train.time, 'time', lambda: next(ticks))  # an epoch's middle is saved too

    def interrupted(*arguments):
        if next(steps) in (0, 2, 7, 8):
            signal.raise_signal(signal.SIGINT)
        return batch_loss(*arguments)
    settings = [*TRAIN, *model.split(), '--epochs', '4', '--name']
    assert command(*settings, 'calm')[0] == 0
    monkeypatch.setattr(train, 'batch_loss', interrupted)
    status, _, err = command(*settings, 'four times cut')
    for _ in range(4):
        assert status == 130
        way = re.fullmatch('\nstopped.* go on with: python (.*)\n', err)[1]
        status, _, err = command(*shlex.split(way))
    assert_same_run('calm', 'four times cut')


def assert_same_run(one, other):
    """All but names and speeds is the same: weights, optimiser, best score, position, log."""
    contents = []
    for name in one, other:
        content = torch.load(f'runs/{name}/last.pt')
        titles, *rows = [line.split(',') for line in content['training'].pop('log')[3:]]
        for row in rows:
            del row[titles.index('seconds')]
        del content['settings']['name']
        contents.append(torch.utils._pytree.tree_leaves([content, rows]))
    for x, y in zip(*contents, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='Windows has no SIGKILL')
@pytest.mark.parametrize('epoch', ['run: ', 'epoch 2'])
def test_a_run_that_is_killed_goes_on_to_the_same_weights(here, command, epoch):
    command_line = [sys.executable, HERE / 'train.py', *TRAIN[1:], '--name', 'killed']
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True,
                          env=ENVIRONMENT) as process:
        for line in process.stdout:  # lines arrive at once, also in a pipe
            if line.startswith(epoch):
                process.kill()
    assert process.returncode == -signal.SIGKILL
    status, _, err = command('train.py', '--resume', 'runs\\killed')  # a path of Windows
    assert status == 0, err
    assert_same_run('the whole', 'killed')


def test_two_processes_train_like_one(here):
    with open(TOKENS, 'a') as file:
        file.write('\na.jpg#5\tA a dog , number 5 .')  # 16 captions: batches that two can share
    export(nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU()), 'cnn.pt2')
    settings = [*TRAIN[1:], '--encoder', 'cnn.pt2', '--dropout', '0', '--input-dropout', '0',
                '--epochs', '5', '--name']  # 20 steps
    one = run('train.py', *settings, 'one', cwd=here)
    two = run('-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone',
              HERE / 'train.py', *settings, 'two', cwd=here)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert two.stdout.count('\nepoch ') == 5 and two.stdout.count('this model') == 1  # one reports
    weights = [torch.load(f'runs/{name}/last.pt')['captioner'] for name in ('one', 'two')]
    close(*weights, atol=1e-5, rtol=1e-4)


def test_weights_that_are_no_numbers_stop_the_run_and_what_was_good_is_kept(
        here, command, monkeypatch):
    steps, batch_loss = itertools.count(), train.batch_loss

    def diverging(*arguments):
        loss, numbers = batch_loss(*arguments)
        return loss * (math.nan if next(steps) > 5 else 1), numbers  # in the second epoch
    monkeypatch.setattr(train, 'batch_loss', diverging)
    status, _, err = command(*TRAIN, '--name', 'nan')
    assert status == 2 and re.fullmatch('error: .*not numbers.*--lr 3e-04\n', err), err
    assert torch.load('runs/nan/last.pt')['training']['epoch'] == 1


def test_flags_win_over_the_checkpoints_settings_and_eval_scores_as_bleu_meteor_does(here, command):
    for path in BEST, LAST:  # of another machine
        content = torch.load(path)
        content['settings'] |= dict(device='cuda:99', data_dir='/none', cache_dir='/none')
        torch.save(content, path)
    flags = ['--device', 'cpu', '--data-dir', 'data', '--cache-dir', 'cache']
    status, out, err = command(*RESUME, *flags, '--epochs', '4')
    assert status == 0 and 'epoch 4/4' in out and 'epoch 3/4' not in out, err
    Path(BEST).unlink()  # the last one will do
    arguments = [*EVAL, *flags, '--split', 'val', '--beam', '2']
    out = command(*arguments)[1]
    row = out.split('(attention: soft)')[1].split()[:4]
    results, references = f'{RUN}/val-results.json', f'{RUN}/val-references.json'
    scores = command('bleu_meteor.py', results, references)[1].split('BLEU-1 .. 4')[1].split()
    assert scores[:4] == row and float(row[0]) > 0 and 'beam 2' in out


def test_own_pictures_and_captions_and_a_model_to_go_on_from(here, command):
    names, mine = ['ein gro\u00dfer Hund.jpg', 'b.jpg', 'c.PNG'], here / 'data' / 'mine'
    make_pictures(mine, names)  # one each for training, validation and test
    lines = [f'{name}\tdog\n{name}\t\u72d7 .\n{name}\t{"word " * 60}\n' for name in names]
    write(mine, {'captions.txt': ''.join(lines)})
    status, out, err = command('train.py', '--data', 'mine', *TINY)
    assert status == 0 and '1 training images, 3 captions' in out and 'mine test: 1 images' in out
    assert re.search('\n1 of these captions are longer than --max-len', out)
    # The model goes on with captions of words that it mostly does not know.
    write(mine, {'captions.txt': ''.join(f'{name},Dog\n{name},A cat\n' for name in names)})
    status, out, err = command('train.py', '--data', mine, '--epochs', '1', '--lr', '1e-9',
                               '--init-from', 'runs\\mine-soft\\last.pt', '--name', 'more')
    assert status == 0 and '1 training images, 2 captions' in out, err
    first, more = (load_checkpoint(f'runs/{name}/last.pt') for name in ('mine-soft', 'more'))
    assert set(more[2].words) == {'dog', 'word', '\u72d7'} and more[2].words == first[2].words
    close(more[0].state_dict(), first[0].state_dict(), atol=1e-6, rtol=0)


@pytest.mark.skipif(resource is None, reason='Windows has no limits of a file')
def test_a_full_disk_keeps_the_checkpoint_that_was_there(here):
    before = Path(LAST).read_bytes()
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
    result = run(*RESUME, '--epochs', '4', cwd=here, preexec_fn=full)
    assert result.returncode == 2
    assert re.fullmatch('error: cannot write .*last.pt .*make room.*\n', result.stderr)
    assert Path(LAST).read_bytes() == before and not list(Path(RUN).glob('*.part'))


def test_numbers_that_no_setting_can_have_are_refused_in_two_lines(command):
    settings = [f.name for f in fields(train.Settings) if type(f.default) in (int, float)]
    for name in settings:
        for value in '-1', 'nan', '1e99':
            status, out, err = command('train.py', f'--{name.replace("_", "-")}={value}')
            assert (status, out) == (2, '') and value in err and len(err.splitlines()) == 2
    assert len(settings) > 15


FAULTS = {  # flags: what the one line says
    '--data flickr30k --data-dir nowhere': 'flickr30k has no captions.txt',
    '--resume runs/none': 'no whole checkpoint',
    '--eval code.pt': 'code.pt is no whole checkpoint .*Weights only',
    '--eval other.pt': 'other.pt is no whole checkpoint .*something else',
    '--attn hard --warm-up 3': '--warm-up must be below',
    '--device cuda:99': '--device cuda:99 cannot be used',
    '--cache-dir code.pt': 'code.pt.*(exists|directory)',
    '--compile': '--compile finds no working compiler',
    '--batch-size 9 --resume "runs/the whole"': 'batch_size is 4 in runs.*leave it out',
    '--cell rnn --init-from "runs/the whole/last.pt"': 'cell is lstm in runs'}


@pytest.mark.parametrize('flags', FAULTS)
def test_what_a_user_can_put_right_is_said_in_one_line(here, command, monkeypatch, flags):
    monkeypatch.setattr(torch, 'compile', lambda step: 1 / 0)
    torch.save({'format': os.getcwd}, 'code.pt')
    torch.save({'settings': {}}, 'other.pt')
    before = {path: path.read_bytes() for path in here.rglob('*') if path.is_file()}
    status, _, err = command(*TRAIN, *shlex.split(flags))
    assert status == 2 and re.fullmatch(f'error: .*{FAULTS[flags]}.*\n', err), err
    assert before == {path: path.read_bytes() for path in before}


# --------------------------------------------------------------------------------- sample, README
@pytest.mark.parametrize('model', [[], ['--checkpoint', HERE / 'pretrained' / 'hard.pt']])
def test_the_models_that_come_along_caption_photographs_at_once(tmp_path, command, model):
    photos = {'a-dog-on-grass-with-a-red-disc': 'dog', 'two-riders-on-a-beach': 'horse'}
    for photo, word in photos.items():
        file = HERE / f'figures/{photo}.jpg'
        assert word in command('sample.py', file, '--out', tmp_path, *model)[1].split('.jpg: ')[1]
        assert (tmp_path / f'{photo}.attention.png').exists()
    assert sum(path.stat().st_size for path in (HERE / 'pretrained').iterdir()) < 42e6


MODELS = 'soft', 'hard', 'none'


@pytest.fixture
def sampled(tmp_path, monkeypatch, command):
    """Function: arguments of sample.py, in a folder with models and pictures -> as `command`."""
    monkeypatch.chdir(tmp_path)
    encoder, words = Encoder('tiny', 32), Vocabulary('a b c caf\u00e9 \u72d7'.split())
    for name in MODELS:
        captioner = tiny_captioner(len(words), encoder.feature_dim, attn=name)
        captioner.L_o.bias.data[UNK] += 1  # likely, and never said
        captioner.L_o.bias.data[END] -= 1.5
        Path('runs', name).mkdir(parents=True)
        save_checkpoint(f'runs/{name}/best.pt', captioner, encoder, words,
                        {'beam': 2, 'length_penalty': 0.7, 'max_len': 7})
    make_pictures(Path('album'), ['b.png', 'a.JPG', 'a.webp', 'more/a.png', '.c.png',
                                  '000000000139.jpg'])
    write(Path('album'), {'notes.txt': 'a, b', 'd.heic': b'\0\0\0\x18ftypheic\0\0\0\0mif1heic'})
    return lambda *arguments, model='soft': command(
        'sample.py', '--device', 'cpu', '--checkpoint', f'runs/{model}', *arguments)


def test_sample_takes_folders_and_says_what_it_leaves_out(sampled, command):
    Path('album/0.jpg').write_bytes(Path('album/a.JPG').read_bytes()[:400])
    shutil.copy('album/b.png', 'album/b.attention.png')  # an older picture
    status, out, err = sampled('album', '--json')
    rows = json.loads(out)
    assert [row['image_id'] for row in rows] == [139, 'a.JPG', 'a.webp', 'b.png', 'a.png']
    assert all(set(row) == {'image_id', 'caption', 'log_prob'} and row['log_prob'] < 0
               for row in rows)
    *_, notes, error = err.splitlines()
    assert 'album: left out 2 files' in notes and 'HEIC' in notes  # notes.txt, d.heic
    assert status == 2 and out.isascii() and error.startswith('error: album/0.jpg cannot be read')
    os.remove('album/0.jpg')
    status, out, _ = sampled('album', '--beam', '9', '--out', 'new/place')
    assert status == 0 and [line.split(': ')[0] for line in out.splitlines()] == [
        f'album/{name}' for name in ('000000000139.jpg', 'a.JPG', 'a.webp', 'b.png', 'more/a.png')]
    assert len(os.listdir('new/place')) == 5  # a.JPG's, a.webp's and more/a.png's too


@pytest.mark.parametrize('arguments, message', [
    (['empty'], 'there are no images'),
    (['album/d.heic', 'none.png', 'runs/soft/best.pt'],
     r'd.heic .*HEIC.*\nerror: none.png .*No such file.*\nerror: .*best.pt cannot be read'),
    (['album/b.png', '--out', 'album/notes.txt'], r'cannot write album/notes.txt/b.*--out'),
    (['album/b.png', '--beam', '0'], '--beam must be from 1 to 100')])
def test_sample_says_what_is_wrong(sampled, arguments, message):
    Path('empty').mkdir()
    status, _, err = sampled(*arguments)
    assert status == 2 and re.search(f'error: .*{message}', err), err


@pytest.mark.parametrize('model', MODELS)
def test_explain_tells_the_numbers_of_the_beam_search(sampled, model):
    status, out, _ = sampled('album/b.png', '--explain', model=model)
    captioner, encoder, *_ = load_checkpoint(f'runs/{model}/best.pt')
    pixels = torch.from_numpy(data.load_image('album/b.png', 32))
    best = captioner.beam_search(encoder(pixels[None]), 2, 7, 0.7)[0][0]
    caption, shapes, more, _, *rows = out.splitlines()
    assert 'picture (3, 32, 32), a (16, 128), ' in shapes and f'({len(rows)}, 9)' in more
    assert [row.split()[0] for row in rows] == [*caption.split()[1:], '<end>'][:len(rows)]
    log_prob, weights = 0, []
    for t, row in enumerate(rows):
        # A row has p, with attention beta and three weights, and p of the three likeliest words.
        p, *numbers = map(float, re.findall(r'\d\.\d\d', row))
        log_prob += math.log(p)
        if model != 'none':
            weights = [best.betas[t], *np.sort(best.alphas[t])[:-4:-1]]
            assert f' {best.alphas[t].argmax() // 4},{best.alphas[t].argmax() % 4} ' in row
        assert numbers[:-3] == pytest.approx(weights, abs=0.0051) and numbers[-3] >= p
    assert log_prob == pytest.approx(best.log_prob, abs=0.2)
    assert not re.search('<pad>|<start>', caption)


@pytest.mark.parametrize('word, drawn', [
    ('dog\u2019s', "dog's"), ('caf\u00e9', 'cafe'), ('cafe\u0301', 'cafe'), ('\ufb01sh', 'fish'),
    ('\u72d7', '.+'), ('\u044f', '.+'), ('\U0001f415', '.+')])
def test_what_pillows_font_lacks_is_drawn_as_plain_letters(word, drawn):
    letters = drawable(word)
    assert re.fullmatch(drawn, letters) and letters.isascii()
    sheets = [draw_attention(Image.new('RGB', (9, 9)), [text]) for text in (word, letters, '')]
    assert sheets[0] == sheets[1] != sheets[2]


def test_a_drawing_has_a_panel_for_each_word():
    image, alphas, heights = Image.new('RGB', (60, 30), 'red'), np.tile([1.0, 0, 0, 0], (13, 1)), []
    for T in 0, 5, 6, 11, 12:  # and one for the image itself: 1, 1, 2, 2, 3 rows of six
        sheet = draw_attention(image, ['dog'] * T, alphas, (2, 2))
        heights.append(sheet.height)
    assert 6 * PANEL < sheet.width < 7 * PANEL
    steps = np.diff(heights).tolist()
    assert steps == [0, steps[1], 0, steps[1]] and steps[1] > PANEL / 2


def test_a_look_keeps_the_colours_of_the_smallest_region_with_half_of_the_weight():
    image, alpha = Image.new('RGB', (240, 160), (200, 100, 0)), np.full(24, 0.01)
    alpha[8] = 0.77  # the cell 1,2 of 4 x 6
    look, share = draw_look(image, alpha, (4, 6))
    pixels = np.asarray(look).astype(int)
    assert (pixels[60, 100] == (200, 100, 0)).all() and (pixels[150, 10] < 60).all()
    assert 0.3 / 24 < share < 1.5 / 24
    line = np.argwhere((pixels == (255, 210, 0)).all(axis=2))
    centre, size = line.mean(axis=0), np.ptp(line, axis=0)
    assert np.abs(centre - (60, 100)).max() < 1.5 and (size < 50).all() and (size > 20).all()
    even, share = draw_look(image, np.full(24, 1 / 24), (4, 6))
    assert share == pytest.approx(0.5, abs=0.01) and np.asarray(even).std(axis=(0, 1)).max() < 1


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
