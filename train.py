"""Train a captioner, validate it by BLEU, keep the best, and print its row of the paper's table.
Below: settings, command line, processes, the loss (4.1, 4.2.1), scores (5), training (4.3).

    python train.py                                   shapes, soft attention, a few minutes on a CPU
    python train.py --attn soft --data flickr8k       downloads what is missing
    python train.py --data mine --init-from pretrained/soft.pt      own images, from a trained model
    python train.py --resume runs/NAME                goes on where it stopped
    python train.py --eval runs/NAME --split test --beam 3          (-h lists all settings)
    torchrun --nproc_per_node=2 train.py              several GPUs or CPUs, with any of the above
"""
import argparse
import gc
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from attention import doubly_stochastic, entropy, reinforce_loss
from bleu_meteor import bleu, human_score, score, tokenize
from data import (END, START, UserError, Vocabulary, cache_arrays, length_batches, load_captions,
                  pointing, read_rows, run_command, to_device)
from model import (Captioner, CaptionerConfig, Encoder, load_checkpoint, read_checkpoint,
                   save_checkpoint)
from sample import checkpoint_in, draw_page, pick_device


def setting(default, text, choices=None):
    """A field of Settings: its default, and what argparse is told of its flag."""
    kind = ({'action': argparse.BooleanOptionalAction} if isinstance(default, bool) else
            {'type': type(default), 'choices': choices})
    return field(default=default, metadata={'help': f'{text} [%(default)s]', **kind})


@dataclass
class Settings:
    """All that a run depends on; every field is a flag. Defaults are for photographs."""
    data: str = setting('shapes', 'shapes, flickr8k, flickr30k, coco, or any folder in data-dir')
    data_dir: str = setting('data', 'folder that holds a folder for each data set')
    skip_bad: bool = setting(False, 'leave out bad captions and images in place of stopping')
    cache_dir: str = setting('cache', 'folder for cached features')
    out: str = setting('runs', 'folder for runs; each gets a folder of its own in it')
    name: str = setting('', 'name of the run (default: DATA-ATTN, numbered if it is taken)')
    init_from: str = setting('', 'checkpoint or run to begin with: its model and its vocabulary')
    # model
    attn: str = setting('soft', 'attention; none is Show and Tell', ('soft', 'hard', 'none'))
    score: str = setting('additive', 'attention scores', ('additive', 'dot'))
    cell: str = setting('lstm', 'recurrent cell', ('lstm', 'rnn'))
    encoder: str = setting('pretrained/efficientnet_lite0_stages.pt2',
                           'a .pt2 file, a torchvision CNN by name (paper: vgg19), or tiny')
    finetune: bool = setting(False, 'train the CNN too, instead of caching its features')
    finetune_from: int = setting(0, 'epochs before the CNN begins to learn')
    image_size: int = setting(224, 'images are squeezed into squares of this side, pixels')
    embed_dim: int = setting(512, 'size of word embeddings')
    hidden_dim: int = setting(512, 'size of the recurrent state')
    attn_dim: int = setting(512, 'size of the attention layer')
    dropout: float = setting(0.5, 'share of units dropped in the output layer')
    input_dropout: float = setting(0.3, 'share dropped of word embeddings and image features')
    max_words: int = setting(10000, 'vocabulary: this many most frequent training words')
    min_count: int = setting(0, 'vocabulary: words seen so often (0: 4, below 10,000 captions 1)')
    # loss
    lambda_ds: float = setting(0.0, 'weight of the doubly stochastic term, eq. (14); paper: 1')
    lambda_r: float = setting(0.02, 'hard: weight of the REINFORCE term, eq. (12)')
    lambda_h: float = setting(0.002, 'hard: weight of the entropy term, eq. (12)')
    expected: float = setting(0.5, 'hard: share of captions that take the expectation instead')
    warm_up: int = setting(2, 'hard: epochs of soft attention before sampling begins')
    hard_decode: str = setting('expected', "hard: context in captioning", ('argmax', 'expected'))
    # training
    optimizer: str = setting('adam', 'paper: rmsprop for Flickr8k, else adam', ('adam', 'rmsprop'))
    lr: float = setting(1e-3, 'learning rate; falls to 0 along half a cosine over the epochs')
    encoder_lr: float = setting(1e-4, 'learning rate of a CNN that is fine-tuned')
    batch_size: int = setting(64, 'captions in a batch')
    epochs: int = setting(5, 'epochs at most')
    patience: int = setting(5, 'stop after this many epochs without a better validation BLEU-4')
    clip: float = setting(5.0, 'largest norm of the gradient, of decoder and CNN each')
    seed: int = setting(0, 'seed of weights, dropout, batches and samples')
    amp: bool = setting(False, 'multiply in 16 bits where that is safe (torch.autocast)')
    compile: bool = setting(False, 'compile the step of the decoder (torch.compile)')
    device: str = setting('', 'cpu, cuda or mps (default: the best there is)')
    # captioning
    beam: int = setting(5, 'beam size in validation and test')
    length_penalty: float = setting(0.7, 'captions are ordered by log p / length ** this')
    max_len: int = setting(30, 'most words in a caption')
    punctuation: bool = setting(False, 'score punctuation as words, as the authors did')


# The paper trains from pretrained CNNs on photographs; shapes learns all from nothing in minutes.
SHAPES_DEFAULTS = dict(encoder='tiny', image_size=64, embed_dim=128, hidden_dim=256, attn_dim=128,
                       dropout=0.1, input_dropout=0.0, min_count=1, lr=2e-3, encoder_lr=2e-3,
                       batch_size=100, epochs=4, beam=3, hard_decode='argmax')
SHOW_AND_TELL_DEFAULTS = dict(epochs=10, lr=5e-4)  # photographs; --init-from does not set them


# --------------------------------------------------------------------------------- the command line
# Settings that make a model, and those of a machine, which are never taken from a checkpoint.
MODEL = ('attn', 'score', 'cell', 'encoder', 'finetune', 'image_size', 'embed_dim', 'hidden_dim',
         'attn_dim', 'dropout', 'input_dropout', 'max_words', 'min_count')
MACHINE = ('data_dir', 'cache_dir', 'out', 'skip_bad', 'device', 'amp', 'compile')


def parse_settings():
    """Command line -> Settings, the other flags, the checkpoint they name: its path and content."""
    parser = argparse.ArgumentParser(description='Train or evaluate a captioner.')
    for f in fields(Settings):
        parser.add_argument('--' + f.name.replace('_', '-'), default=f.default, **f.metadata)
    either = parser.add_mutually_exclusive_group()
    either.add_argument('--resume', metavar='RUN', help='folder of a run to go on with')
    either.add_argument('--eval', metavar='RUN', help='folder of a run (or checkpoint) to score')
    parser.add_argument('--split', default='test', choices=('train', 'val', 'test', 'unseen'),
                        help='split that --eval scores [%(default)s]')
    # First pass: --data, --attn, --resume, --eval and --init-from decide the other defaults.
    first, _ = parser.parse_known_args([x for x in sys.argv[1:] if x not in ('-h', '--help')])
    parser.set_defaults(**(SHAPES_DEFAULTS if first.data == 'shapes' else
                           SHOW_AND_TELL_DEFAULTS if first.attn == 'none' else {}))
    path, content, fixed = first.resume or first.eval or first.init_from, {}, ()
    if path:
        path = checkpoint_in(path, first.resume)
        content = read_checkpoint(path)
        if first.resume and 'training' not in content:
            raise UserError(f'{path} has no training state: --resume needs a run with last.pt')
        saved = content['settings']
        kept = set(saved) - set(MACHINE) if first.resume or first.eval else MODEL
        parser.set_defaults(**{name: saved[name] for name in kept})
        fixed = MODEL + (('data', 'optimizer', 'batch_size', 'seed') if first.resume else ())
    args = parser.parse_args()
    cfg = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    for name in ('epochs', 'patience', 'beam', 'max_len', 'max_words', 'batch_size'):
        if getattr(cfg, name) < 1:
            raise UserError(f'--{name.replace("_", "-")} must be at least 1')
    for name in fixed:
        if getattr(cfg, name) != saved[name]:
            raise UserError(f'--{name.replace("_", "-")} is {saved[name]} in {path}: leave it out')
    if not 0 <= min(cfg.dropout, cfg.input_dropout) <= max(cfg.dropout, cfg.input_dropout) < 1:
        raise UserError('--dropout and --input-dropout must be from 0 to below 1')
    if cfg.attn == 'hard' and cfg.warm_up >= cfg.epochs and not args.eval:
        raise UserError('--warm-up must be below --epochs: hard attention samples after it')
    return cfg, args, path, content


# -------------------------------------------------------------------------------- several processes
WORLD = int(os.environ.get('WORLD_SIZE', 1))  # how many there are: torchrun says it
RANK = int(os.environ['RANK']) if WORLD > 1 else 0  # which of them this is
wait = dist.barrier if WORLD > 1 else lambda: None  # until all of them wait


def join_ranks(name):
    """Pick the device; under torchrun, meet the other processes, each with a GPU of its own."""
    if WORLD == 1:
        return pick_device(name)
    if name != 'cpu' and torch.cuda.is_available():
        if int(os.environ['LOCAL_WORLD_SIZE']) > torch.cuda.device_count():
            raise UserError(f'there are {torch.cuda.device_count()} GPUs: lower --nproc_per_node')
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(name)
    device = pick_device(name or 'cpu')
    dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo',
                            timeout=timedelta(days=1))  # rank 0 may compute features for hours
    if RANK:  # one is enough to print
        sys.stdout = open(os.devnull, 'w')
    return device


def mean_over_ranks(x):
    x = x / WORLD
    if WORLD > 1:
        dist.all_reduce(x)
    return x


# ----------------------------------------------------------------------------------------- the loss
def batch_loss(captioner, a, captions, cfg, baseline=0.0, expected=None):
    """Loss of a batch (mean over its captions) and numbers for the log.

    a (B, L, D), captions (B, T+1). Soft: -log p(y) + lambda_ds * eq. (14). Hard: eq. (12), where
    the share `expected` (cfg.expected) of the captions does not sample.
    """
    hard, expected = cfg.attn == 'hard', cfg.expected if expected is None else expected
    targets, soft = captions[:, 1:], None  # (B, T)
    if hard:  # these captions take the expectation in place of a sample
        soft = (torch.rand(len(captions), 1, device=a.device) < expected).expand(targets.shape)
    out = captioner(a, captions, soft=soft)
    nll = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction='none')
    log_p_y = -nll.view(targets.shape).sum(dim=1)  # (B,)
    loss, numbers = -log_p_y, {'nll/word': -log_p_y.mean() / targets.shape[1]}
    if cfg.attn == 'soft' and cfg.lambda_ds:
        loss = loss + cfg.lambda_ds * doubly_stochastic(out.alphas)
    if hard:
        loss = reinforce_loss(log_p_y, out.log_p_s.sum(1), out.alphas, baseline, cfg.lambda_r,
                              cfg.lambda_h)
        numbers |= {'reward': log_p_y.mean(), 'baseline': torch.as_tensor(baseline),
                    'entropy': entropy(out.alphas).mean() / targets.shape[1],
                    'sampled': 1 - soft.float().mean()}
    numbers = {'loss': loss.mean()} | numbers
    return numbers['loss'], {key: value.detach() for key, value in numbers.items()}


# ------------------------------------------------------------------------------ captions and scores
def caption_images(model, examples, images, cfg):
    """Caption images -> the best Hypothesis of each, references, hypotheses, pointing.

    images: their pixels or features, split evenly among ranks. references, hypotheses: what people
    and the model said, lists of words. pointing: per cent of object words that are hits.
    """
    captioner, encoder, vocabulary = model
    captioner.eval()
    encoder.eval()
    mine, found = np.array_split(np.arange(len(images)), WORLD)[RANK], []
    with torch.no_grad():
        for i in range(0, len(mine), 25):
            rows = read_rows(images, mine[i:i + 25], encoder.mean.device)
            a = (encoder(rows) if encoder.trainable else rows).float()  # (B, L, D)
            beams = captioner.beam_search(a, cfg.beam, cfg.max_len, cfg.length_penalty)
            found += [best for best, *_ in beams]
    if WORLD > 1:
        parts = [None] * WORLD
        dist.all_gather_object(parts, found)
        found = sum(parts, [])
    said = [vocabulary.decode(h.tokens) for h in found]
    counts = [pointing(words, h.alphas, x.objects, encoder.grid) for words, h, x
              in zip(said, found, examples) if x.objects and h.alphas is not None]
    hits, nouns = np.sum(counts or [(0, 0)], axis=0)
    references = [[tokenize(c, cfg.punctuation) for c in x.captions] for x in examples]
    hypotheses = [words + ['.'] * cfg.punctuation for words in said]  # each gets its full stop
    return found, references, hypotheses, float(100 * hits / nouns) if nouns else None


PAPER = {('flickr8k', 'none'): (63, 41, 27, None, None),  # table 1: BLEU-1..4, METEOR
         ('flickr8k', 'soft'): (67, 44.8, 29.9, 19.5, 18.93),
         ('flickr8k', 'hard'): (67, 45.7, 31.4, 21.3, 20.30),
         ('flickr30k', 'none'): (66.3, 42.3, 27.7, 18.3, None),
         ('flickr30k', 'soft'): (66.7, 43.4, 28.8, 19.1, 18.49),
         ('flickr30k', 'hard'): (66.9, 43.9, 29.6, 19.9, 18.46),
         ('coco', 'none'): (66.6, 46.1, 32.9, 24.6, None),
         ('coco', 'soft'): (70.7, 49.2, 34.4, 24.3, 23.90),
         ('coco', 'hard'): (71.8, 50.4, 35.7, 25.0, 23.04)}


def report(model, cfg, split, examples, images, folder):
    """Caption a split, write its results and references, print its row beside the paper's."""
    found, references, hypotheses, point = caption_images(model, examples, images, cfg)
    if RANK:
        return
    results = [{'image_id': x.name, 'caption': ' '.join(model[2].decode(h.tokens))}
               for x, h in zip(examples, found)]
    for name, content in (('references', {x.name: x.captions for x in examples}),
                          ('results', results)):
        text = json.dumps(content, indent=0, ensure_ascii=False)
        (folder / f'{split}-{name}.json').write_text(text, 'utf-8')
    shapes, attn = cfg.data == 'shapes', 'no' if cfg.attn == 'none' else cfg.attn
    rows = {f'this model ({attn} attention{f", {cfg.hard_decode}" * (attn == "hard")})':
            score(references, hypotheses) + [point] * shapes,
            'the paper' + ' (Google NIC)' * (attn == 'no'): PAPER.get((cfg.data, cfg.attn)),
            'people, one against the others': human_score(references)}
    print(f'\n{cfg.data} {split}: {len(examples)} images, encoder {model[1].key}, beam {cfg.beam}, '
          f'length penalty {cfg.length_penalty}' + ', punctuation counts' * cfg.punctuation)
    print(' ' * 36 + '       B1       B2       B3       B4   METEOR' + ' pointing' * shapes)
    for label, row in rows.items():
        if row:
            print(f'{label:36}' + ''.join('        -' if x is None else f'{x:9.2f}' for x in row))
    print('BLEU has no brevity penalty, as in the paper; with it BLEU-4 is '
          f"{bleu(references, hypotheses)[3]:.2f}. METEOR is NLTK's, with METEOR 1.5's parameters.")


# ----------------------------------------------------------------------------------------- training
def build(cfg, captions, device):
    """A new captioner, encoder and vocabulary (of the captions, lists of words)."""
    torch.manual_seed(cfg.seed)
    min_count = cfg.min_count or (4 if len(captions) >= 10000 else 1)
    vocabulary = Vocabulary.build(captions, cfg.max_words, min_count)
    if not vocabulary.words:
        raise UserError(f'no word occurs {min_count} times in training captions: lower --min-count')
    encoder = Encoder(cfg.encoder, cfg.image_size, trainable=cfg.finetune or cfg.encoder == 'tiny')
    config = CaptionerConfig(len(vocabulary), encoder.feature_dim, cfg.attn, cfg.score, cfg.cell,
                             cfg.embed_dim, cfg.hidden_dim, cfg.attn_dim, cfg.dropout,
                             cfg.hard_decode, cfg.input_dropout)
    return Captioner(config).to(device), encoder.to(device), vocabulary


def training_data(cfg, examples, vocabulary, images, device):
    """Training captions -> their lengths (N,), and a function that reads some by their indices.

    It returns this rank's part of the batch: images, captions (B, T+1), their weight in the mean.
    """
    words = [tokenize(c) for x in examples for c in x.captions]
    ids = [[START, *vocabulary.encode(caption), END] for caption in words]
    image_of = np.array([i for i, x in enumerate(examples) for _ in x.captions])
    if device.type == 'cuda' and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = torch.tensor(images, device=device)  # they fit on the GPU, and no copies wait
    known = sum(word in vocabulary.ids for caption in words for word in caption)
    print(f'{cfg.data}: {len(examples)} training images, {len(ids)} captions, {len(vocabulary)} '
          f'words ({100 * known / max(1, sum(map(len, words))):.1f} % of what is said)', flush=True)

    def read(batch):
        mine = batch[RANK::WORLD] if RANK < len(batch) else batch[:1]  # of weight 0
        return (read_rows(images, image_of[mine], device),
                to_device(torch.tensor([ids[i] for i in mine]), device),
                len(batch[RANK::WORLD]) * WORLD / len(batch))
    return np.array([len(caption) for caption in ids]), read


def half_precision(device):
    """The 16-bit numbers that --amp multiplies: bfloat16, or float16 on GPUs without it."""
    if device.type == 'cuda' and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    known = getattr(torch.cpu, 'get_capabilities', dict)() if device.type == 'cpu' else {}
    if known and not any(able for name, able in known.items() if 'bf16' in name):
        print('this CPU has no bfloat16 products: --amp will be slower than without it')
    return torch.bfloat16


def make_optimizer(model, cfg, device, half, state):
    """Adam or RMSprop, and the scaler of float16's gradients, where `state` left them."""
    groups = [{'params': [p for p in module.parameters() if p.requires_grad], 'first_lr': lr}
              for module, lr in ((model[0], cfg.lr), (model[1], cfg.encoder_lr))]
    optimizer = (torch.optim.RMSprop(groups) if cfg.optimizer == 'rmsprop' else
                 torch.optim.Adam(groups, fused=device.type in ('cpu', 'cuda')))  # in one pass
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    if 'optimizer' in state:  # the moments alone: rates come from cfg, `fused` from this device
        optimizer.load_state_dict(optimizer.state_dict() | {'state': state['optimizer']['state']})
        scaler.load_state_dict(scaler.state_dict() | state['scaler'])
    return optimizer, scaler


def log_epoch(folder, log, epoch, row, model, examples, found):
    """Append an epoch's row to `log`, write that as log.csv; print a caption, draw 3 images."""
    log += [','.join(['epoch', *row])] if epoch == 1 else []
    log.append(','.join(f'{x:g}' for x in (epoch, *row.values())))
    (folder / 'log.csv').write_text('\n'.join(log) + '\n', 'utf-8')
    said = [model[2].decode(h.tokens) for h in found[:3]]
    print(f'    {" ".join(said[0])}   [{examples[0].captions[0]}]', flush=True)
    draw_page(folder / f'attention-{epoch:02}.png', [
        (x.image, words, h.alphas, h.betas, model[1].grid)
        for x, words, h in zip(examples, said, found)])


def train(cfg, device, half, model, folder, state, splits, images):
    """The loop, from where `state` stands to the last epoch; best.pt holds the best one's model."""
    captioner, encoder, vocabulary = model
    lengths, read = training_data(cfg, splits['train'], vocabulary, images['train'], device)
    optimizer, scaler = make_optimizer(model, cfg, device, half, state)
    if cfg.compile:
        captioner.step = torch.compile(captioner.step)
    decoder, cnn = captioner, encoder
    if WORLD > 1:  # an RNN does not use f_init_c, which DistributedDataParallel must know
        torch._dynamo.config.optimize_ddp = False  # it would split a compiled step
        decoder = DistributedDataParallel(captioner, find_unused_parameters=cfg.cell == 'rnn')
        cnn = DistributedDataParallel(encoder) if encoder.trainable else encoder
    stop, saved = [], time.time()

    def on_ctrl_c(*_):  # the run ends after its step; a second Ctrl-C ends it at once
        stop.append(True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def save_last():
        state.update(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        save_checkpoint(folder / 'last.pt', *model, asdict(cfg), training=state)

    folder.mkdir(parents=True, exist_ok=True)
    if not RANK and 'optimizer' not in state:
        save_last()  # a run can be resumed from its first moment on
    print(f'run: {folder}', flush=True)
    signal.signal(signal.SIGINT, on_ctrl_c)
    while state['epoch'] < cfg.epochs and state['epoch'] - state['best_epoch'] <= cfg.patience:
        epoch, first, began = state['epoch'], state['step'], time.time()
        batches = length_batches(lengths, cfg.batch_size, np.random.default_rng((cfg.seed, epoch)))
        expected = 1.0 if epoch < cfg.warm_up else cfg.expected
        learns = encoder.trainable and epoch >= cfg.finetune_from
        captioner.train()
        encoder.train(learns)
        for step in range(first, len(batches)):
            rows, y, weight = read(batches[step])  # images, captions (B, T+1)
            # Dropout and samples depend on the step alone: a run that is resumed draws the same.
            torch.manual_seed(hash((cfg.seed, RANK, epoch, step)))
            done = (epoch + step / len(batches)) / cfg.epochs  # share of the training
            for group in optimizer.param_groups:
                group['lr'] = group['first_lr'] * 0.5 * (1 + math.cos(math.pi * done))
            with torch.autocast(device.type, half, enabled=cfg.amp):
                with torch.set_grad_enabled(learns):
                    a = (cnn(rows) if encoder.trainable else rows).float()  # (B, L, D)
                loss, numbers = batch_loss(decoder, a, y, cfg, state['baseline'], expected)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(weight * loss).backward()
            scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group['params'], cfg.clip)
            scaler.step(optimizer)
            scaler.update()

            state['step'] = step + 1
            for key, value in numbers.items():  # tensors: a number would wait for the GPU
                state['totals'][key] = state['totals'].get(key, 0.0) + weight * value
            if 'reward' in numbers:  # b_k = 0.9 b_{k-1} + 0.1 log p(y | s_k, a), paper 4.1
                reward = mean_over_ranks(weight * numbers['reward'])
                state['baseline'] = 0.9 * state['baseline'] + 0.1 * reward
            # Has any rank had Ctrl-C? The tensor is on the CPU, so no GPU is waited for.
            stopping = mean_over_ranks(torch.tensor(float(len(stop)))) > 0
            if step % 50 == 49 or step + 1 == len(batches) or stopping:
                watched = [state['totals']['loss'], *captioner.parameters(), *encoder.parameters()]
                if not all(x.isfinite().all() for x in watched):
                    raise UserError(f'the loss is not a number in epoch {epoch + 1}: go on from '
                                    f'last.pt with --resume {folder} --lr {cfg.lr / 4:.0e}')
                if sys.stdout.isatty():
                    print(f'epoch {epoch + 1}/{cfg.epochs}  {step + 1}/{len(batches)}  loss '
                          f'{loss.item():.2f}', end='  \r', flush=True)
                if not RANK and (stopping or time.time() - saved > 600):
                    save_last()
                    saved = time.time()
            if stopping:
                wait()  # a rank that ends before would have rank 0 killed
                print(f'\nstopped; go on with: python train.py --resume {folder} (--amp .. again)')
                sys.exit(130)

        speed = sum(map(len, batches[first:])) / (time.time() - began)
        for buffer in encoder.buffers() if WORLD > 1 else ():  # statistics of batch normalisation
            dist.broadcast(buffer, 0)
        found, references, hypotheses, point = caption_images(model, splits['val'], images['val'],
                                                              cfg)
        row = {key: float(mean_over_ranks(x)) / len(batches) for key, x in state['totals'].items()}
        row |= {'val BLEU-4': bleu(references, hypotheses)[3], 'captions/s': speed}
        row |= {'pointing': point or 0.0} if cfg.data == 'shapes' else {}
        state.update(epoch=epoch + 1, step=0, totals={})
        # Hard attention's best is chosen among the epochs that sample: earlier ones are replaced.
        if row['val BLEU-4'] > state['best'] or (cfg.attn == 'hard' and epoch <= cfg.warm_up):
            state.update(best=row['val BLEU-4'], best_epoch=epoch)
            if not RANK:
                save_checkpoint(folder / 'best.pt', *model, asdict(cfg), half=True)
        if not RANK:
            print(f'epoch {epoch + 1}/{cfg.epochs}', *(f' {key} {x:.3f}' for key, x in row.items()))
            log_epoch(folder, state['log'], epoch + 1, row, model, splits['val'], found)
            save_last()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main():
    cfg, args, path, content = parse_settings()
    device = join_ranks(cfg.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    half = half_precision(device) if cfg.amp else None
    head = [f'# command: {" ".join(sys.argv)}', f'# settings: {cfg}',
            f'# torch {torch.__version__}, {WORLD} x {device}' + f', {half}' * cfg.amp]
    print(*head, sep='\n')
    name, number = cfg.name or f'{cfg.data}-{cfg.attn}', 2
    folder = path.parent if args.resume or args.eval else Path(cfg.out) / name
    while folder.exists() and not (args.resume or args.eval):
        folder, number = Path(cfg.out) / f'{name}-{number}', number + 1
    wanted = (args.split,) if args.eval else ('train', 'val', 'test', 'unseen')
    if RANK:  # the others wait for rank 0 to download and compute, then find it on disk
        wait()
    splits = load_captions(cfg.data, cfg.data_dir, cfg.skip_bad, wanted)
    if missing := [split for split in wanted[:2] if split not in splits]:  # test is not needed
        raise UserError(f'{cfg.data} has no images with captions for {" and ".join(missing)}')
    model = (load_checkpoint(path, device, cfg.hard_decode)[:3] if path else
             build(cfg, [tokenize(c) for x in splits['train'] for c in x.captions], device))
    cnn = model[1]  # of a frozen one features (L, D) are kept; one that learns needs the pixels
    kept = ('pixels',) if cnn.trainable else (cnn.key, lambda images: cnn(images.to(device)))
    images = {split: cache_arrays(examples, cnn.image_size, cfg.cache_dir, *kept)
              for split, examples in splits.items()}
    if not RANK:
        wait()
    if not args.eval:
        state = content['training'] if args.resume else dict(
            epoch=0, step=0, best=-1.0, best_epoch=-1, baseline=0.0, totals={}, log=head)
        train(cfg, device, half, model, folder, state, splits, images)
        wait()
        model = load_checkpoint(folder / 'best.pt', device, cfg.hard_decode)[:3]
        print(f'best epoch: {state["best_epoch"] + 1}')
    for split in (args.split,) if args.eval else ('test', 'unseen'):
        if split in splits:
            report(model, cfg, split, splits[split], images[split], folder)
    print(f'\ncaption images with it: python sample.py img.jpg --checkpoint {args.eval or folder}')
    if WORLD > 1:
        gc.collect()  # a thread of gloo that still frees a tensor while Python ends aborts it
        dist.destroy_process_group()


if __name__ == '__main__':
    run_command(main)
