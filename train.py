"""Train a captioner, validate it by BLEU, keep the best, and print its row of the paper's table.

    python train.py                                   shapes, soft attention, a few minutes on a CPU
    python train.py --attn soft --data flickr8k       downloads what is missing
    python train.py --resume runs/NAME                goes on where it stopped
    python train.py --eval runs/NAME --split test --beam 3
    python train.py --eval runs/A runs/B              an ensemble of several runs
    python train.py --data flickr8k -h                every setting and its default there
    torchrun --nproc_per_node=2 train.py              several GPUs or CPUs, with any of the above

Paper sections 4.2.1 and 4.3 (training), 5 (experiments).
"""
import argparse
import gc
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from attention import doubly_stochastic, entropy, reinforce_loss
from bleu_meteor import bleu, human_score, score, tokenize
from data import (END, START, UserError, Vocabulary, ahead, cache_arrays, length_batches,
                  load_captions, open_image, pinned, pointing, read_rows, run_command, to_gpu)
from model import (Captioner, CaptionerConfig, Encoder, check_beam, load_checkpoint, pick_device,
                   read_checkpoint, save_checkpoint)
from sample import draw_attention


def setting(default, text, choices=None):
    """A field of Settings: its default, and what -h says of it."""
    return field(default=default, metadata={'help': text, 'choices': choices})


@dataclass
class Settings:
    """All that a run depends on; every field is a flag. Defaults are for photographs."""
    data: str = setting('shapes', 'data set', ('shapes', 'flickr8k', 'flickr30k', 'coco'))
    data_dir: str = setting('data', 'folder that holds a folder for each data set')
    skip_bad: bool = setting(False, 'leave out bad captions and images in place of stopping')
    cache_dir: str = setting('cache', 'folder for cached features')
    out: str = setting('runs', 'folder for runs; each gets a folder of its own in it')
    name: str = setting('', 'name of the run (default: DATA-ATTN, numbered if it is taken)')
    # model
    attn: str = setting('soft', 'attention; none is Show and Tell', ('soft', 'hard', 'none'))
    score: str = setting('additive', 'attention scores', ('additive', 'dot'))
    cell: str = setting('lstm', 'recurrent cell', ('lstm', 'rnn'))
    encoder: str = setting('vgg19', 'tiny, a torchvision CNN by name, or a .pt2 file')
    finetune: bool = setting(False, 'train the CNN too, instead of caching its features')
    finetune_from: int = setting(0, 'epochs before the CNN begins to learn')
    image_size: int = setting(224, 'images are squeezed into squares of this side, pixels')
    embed_dim: int = setting(512, 'size of word embeddings')
    hidden_dim: int = setting(512, 'size of the recurrent state')
    attn_dim: int = setting(512, 'size of the attention layer')
    dropout: float = setting(0.5, 'share of units dropped in the output layer')
    input_dropout: float = setting(0.3, 'share dropped of word embeddings and image features')
    max_words: int = setting(10000, 'vocabulary: this many most frequent training words')
    min_count: int = setting(4, 'vocabulary: words seen at least this often')
    # loss
    lambda_ds: float = setting(0.02, 'weight of the doubly stochastic term, eq. (14); paper: 1')
    lambda_r: float = setting(0.02, 'hard: weight of the REINFORCE term, eq. (12)')
    lambda_h: float = setting(0.002, 'hard: weight of the entropy term, eq. (12)')
    samples: int = setting(1, 'hard: samples per caption; if above 1, the others are its baseline')
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
    clip: float = setting(5.0, 'largest norm of the gradient')
    seed: int = setting(0, 'seed of weights, dropout, batches and samples')
    amp: bool = setting(False, 'compute in bfloat16 where that is safe (torch.autocast)')
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
                       batch_size=100, epochs=4, beam=3, hard_decode='argmax', lambda_ds=0.0)


# ----------------------------------------------------------------------------------------- the loss
def batch_loss(captioner, a, captions, s, baseline=0.0, expected=None):
    """Loss of a batch (mean over its captions) and numbers for the log.

    a (B, L, D), captions (B, T+1). Soft: -log p(y) + lambda_ds * eq. (14). Hard: eq. (12), where
    the share `expected` (s.expected) of the captions does not sample.
    """
    expected = s.expected if expected is None else expected
    targets = captions[:, 1:]  # (B, T)
    samples = s.samples if expected < 1 else 1  # where nothing is sampled one pass will do
    if s.attn == 'hard':
        # Each caption once for each of its samples; the captioner repeats a itself.
        captions, targets = (x.repeat_interleave(samples, dim=0) for x in (captions, targets))
        soft = torch.rand(len(captions), 1, device=a.device) < expected  # these do not sample
        out = captioner(a, captions, soft=soft.expand(targets.shape))
    else:
        out = captioner(a, captions)
    nll = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction='none')
    log_p_y = -nll.view(targets.shape).sum(dim=1)  # (B,)
    numbers = {'nll/word': -log_p_y.mean() / targets.shape[1]}
    if s.attn == 'hard':
        if samples > 1:  # the other samples of the same caption are its baseline
            r = log_p_y.detach().view(-1, samples)
            baseline = ((r.sum(1, keepdim=True) - r) / (samples - 1)).flatten()
        loss = reinforce_loss(log_p_y, out.log_p_s.sum(1), out.alphas, baseline, s.lambda_r,
                              s.lambda_h)
        numbers |= {'reward': log_p_y.mean(), 'baseline': torch.as_tensor(baseline).mean(),
                    'entropy': entropy(out.alphas).mean() / targets.shape[1],
                    'sampled': 1 - soft.float().mean()}
    else:
        loss = -log_p_y
        if s.attn == 'soft' and s.lambda_ds:
            loss = loss + s.lambda_ds * doubly_stochastic(out.alphas)
    loss = loss.mean()
    return loss, {key: value.detach() for key, value in ({'loss': loss} | numbers).items()}


# ------------------------------------------------------------------------------- captions of images
def annotations(encoder, rows, device):
    """Rows of `image_arrays` -> annotation vectors a (B, L, D)."""
    rows = rows.to(device, non_blocking=True)
    return (rows if rows.dim() == 3 else encoder(rows)).float()


def image_arrays(encoder, examples, s):
    """The images as an array: features of a frozen CNN, cached; pixels for a CNN that learns."""
    if encoder.trainable:
        return cache_arrays(examples, encoder.image_size, s.cache_dir, 'pixels')
    return cache_arrays(examples, encoder.image_size, s.cache_dir, encoder.key,
                        lambda images: encoder(images.to(encoder.mean.device)),
                        (math.prod(encoder.grid), encoder.feature_dim))


def caption_images(captioner, encoder, images, s, others=()):
    """The best Hypothesis for each row of `images` (cached features or pixels), in order.

    others: captioners that form an ensemble with the first.
    Rank r of W captions the images r, r + W, ..; all of them get all captions.
    """
    captioner.eval()
    encoder.eval()
    (rank, world), device, found = ranks(), next(captioner.parameters()).device, []
    mine = np.arange(rank, len(images), world)
    with torch.no_grad():
        for i in range(0, len(mine), 25):
            a = annotations(encoder, read_rows(images, mine[i:i + 25], device), device)
            hypotheses = captioner.beam_search(a, s.beam, s.max_len, s.length_penalty, others)
            found += [best for best, *_ in hypotheses]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, found)
        found = [h for group in zip_longest(*parts) for h in group if h is not None]
    return found


# ------------------------------------------------------------------------------------------- scores
def reference_words(examples, s):
    """For each image the captions that people gave it, as lists of the words that count."""
    return [[tokenize(c, s.punctuation) for c in x.captions] for x in examples]


def hypothesis_words(found, vocabulary, s):
    """The model's captions likewise; where punctuation counts, each gets its full stop."""
    stop = ['.'] if s.punctuation else []
    return [vocabulary.decode(h.tokens) + stop for h in found]


def pointing_rate(examples, found, vocabulary, grid):
    """Share of object words, in per cent, at which attention lies on the object (shapes only).

    None where no caption has such a word, or the model has no attention.
    """
    hits = nouns = 0
    for example, h in zip(examples, found):
        if example.objects and h.alphas is not None:
            hit, noun = pointing(vocabulary.decode(h.tokens), h.alphas, example.objects, grid)
            hits, nouns = hits + hit, nouns + noun
    return 100 * hits / nouns if nouns else None


# Table 1 of the paper: BLEU-1..4, METEOR.
PAPER = {('flickr8k', 'none'): (63, 41, 27, None, None),
         ('flickr8k', 'soft'): (67, 44.8, 29.9, 19.5, 18.93),
         ('flickr8k', 'hard'): (67, 45.7, 31.4, 21.3, 20.30),
         ('flickr30k', 'none'): (66.3, 42.3, 27.7, 18.3, None),
         ('flickr30k', 'soft'): (66.7, 43.4, 28.8, 19.1, 18.49),
         ('flickr30k', 'hard'): (66.9, 43.9, 29.6, 19.9, 18.46),
         ('coco', 'none'): (66.6, 46.1, 32.9, 24.6, None),
         ('coco', 'soft'): (70.7, 49.2, 34.4, 24.3, 23.90),
         ('coco', 'hard'): (71.8, 50.4, 35.7, 25.0, 23.04)}


def print_row(label, columns):
    """One row of the table; a column that is None is a dash."""
    print(f'{label:36}' + ''.join('        -' if x is None else f'{x:9.2f}' for x in columns))


def report(captioner, encoder, vocabulary, s, split, examples, folder, others=()):
    """Caption a split, write a COCO results file, and print its row beside the paper's."""
    began = time.time()
    images = first_rank_first(lambda: image_arrays(encoder, examples, s))
    found = caption_images(captioner, encoder, images, s, others)
    if ranks()[0]:
        return
    references, hypotheses = reference_words(examples, s), hypothesis_words(found, vocabulary, s)
    captions = [' '.join(vocabulary.decode(h.tokens)) for h in found]
    for name, content in (
            ('results', [{'image_id': x.name, 'caption': c} for x, c in zip(examples, captions)]),
            ('references', {x.name: x.captions for x in examples})):
        stem = f'{split}-ensemble-{name}' if others else f'{split}-{name}'
        with open(folder / f'{stem}.json', 'w', encoding='utf-8') as file:
            json.dump(content, file, indent=0, ensure_ascii=False)

    print(f'\n{s.data} {split}: {len(examples)} images, encoder {encoder.key}, beam {s.beam}, '
          f'length penalty {s.length_penalty}, '
          f'{"punctuation counts" if s.punctuation else "words alone"}')
    header, row = ['B1', 'B2', 'B3', 'B4', 'METEOR'], score(references, hypotheses)
    if s.data == 'shapes':
        header.append('pointing')
        row.append(pointing_rate(examples, found, vocabulary, encoder.grid))
    print(' ' * 36 + ''.join(f'{x:>9}' for x in header))
    kinds = {model.config.attn.replace('none', 'no') for model in (captioner, *others)}
    how = ' and '.join(sorted(kinds)) + ' attention' + f', {s.hard_decode}' * (kinds == {'hard'})
    print_row(f'this model ({how})' if not others else f'{1 + len(others)} models ({how})', row)
    if (s.data, s.attn) in PAPER and len(kinds) == 1:
        name = 'the paper (Google NIC)' if s.attn == 'none' else 'the paper'
        print_row(name, PAPER[s.data, s.attn])
    people = human_score(references)
    if people:
        print_row('people, one against the others', people)
    print(f'BLEU has no brevity penalty, as in the paper; with it BLEU-4 is '
          f'{bleu(references, hypotheses)[3]:.2f}. METEOR is NLTK\'s with the parameters of METEOR '
          f'1.5. {time.time() - began:.0f} s.')


# --------------------------------------------------------------------------------- the command line
# Settings that make the model: --resume and --eval cannot change them.
FIXED = ('attn', 'score', 'cell', 'encoder', 'finetune', 'image_size', 'embed_dim', 'hidden_dim',
         'attn_dim', 'dropout', 'input_dropout', 'max_words', 'min_count')


def parse_settings():
    """Command line -> Settings, and the flags that are no settings: resume, eval, split."""
    parser = argparse.ArgumentParser(description='Train or evaluate a captioner.')
    for f in fields(Settings):
        kind = {'action': argparse.BooleanOptionalAction} if f.type is bool else {
            'type': f.type, 'choices': f.metadata['choices']}
        parser.add_argument('--' + f.name.replace('_', '-'), default=f.default, **kind,
                            help=f'{f.metadata["help"]} [%(default)s]')
    either = parser.add_mutually_exclusive_group()
    either.add_argument('--resume', metavar='RUN', nargs=1, help='folder of a run to go on with')
    either.add_argument('--eval', metavar='RUN', nargs='+',
                        help='folder of a run (or checkpoint) to score; of several: their ensemble')
    parser.add_argument('--split', default='test', choices=('train', 'val', 'test', 'unseen'),
                        help='split that --eval scores [%(default)s]')
    # --data, --resume and --eval decide the other defaults, so they are read before all else.
    first, _ = parser.parse_known_args([x for x in sys.argv[1:] if x not in ('-h', '--help')])
    if first.data == 'shapes':
        parser.set_defaults(**SHAPES_DEFAULTS)
    saved = {}
    if first.resume or first.eval:  # a run's own settings, but for those on the command line
        saved = {'input_dropout': 0.0}  # of older runs
        saved |= read_checkpoint(checkpoints_of(first)[0])['settings']
        parser.set_defaults(**saved)
    args = parser.parse_args()
    for name in ('epochs', 'patience', 'beam', 'max_len', 'max_words', 'batch_size', 'samples'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name.replace("_", "-")} must be at least 1')
    if not (0 <= args.dropout < 1 and 0 <= args.input_dropout < 1):
        raise UserError('--dropout and --input-dropout must be from 0 to below 1')
    if args.attn == 'hard' and args.warm_up >= args.epochs and not args.eval:
        raise UserError('--warm-up must be below --epochs: hard attention samples after it')
    # A run that goes on must also see the same batches in the same order.
    fixed = FIXED + (('data', 'optimizer', 'batch_size', 'seed') if args.resume else ())
    for name in fixed if saved else ():
        if getattr(args, name) != saved[name]:
            raise UserError(f'--{name.replace("_", "-")} is {saved[name]} in this run: leave the '
                            'flag out')
    return Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)}), args


def checkpoints_of(args):
    """The files that --resume or --eval mean: a run's last.pt or best.pt, or the file named."""
    name = 'last.pt' if args.resume else 'best.pt'
    return [path / name if path.is_dir() else path for path in map(Path, args.resume or args.eval)]


def load_ensemble(paths, device, hard_decode):
    """Checkpoints -> the first's captioner, encoder and vocabulary, and the other captioners.

    hard_decode is that of the first, and of the others if the first has hard attention.
    Raises UserError if they cannot speak together.
    """
    captioner, encoder, vocabulary, _ = load_checkpoint(paths[0], device, hard_decode)
    others = []
    for path in paths[1:]:
        other, its_encoder, its_vocabulary, _ = load_checkpoint(
            path, device, hard_decode if captioner.config.attn == 'hard' else None)
        same_images = (its_encoder.key, its_encoder.image_size) == (encoder.key, encoder.image_size)
        if encoder.trainable or not same_images or its_vocabulary.words != vocabulary.words:
            raise UserError(f'{path} and {paths[0]} are no ensemble: that takes one frozen encoder '
                            'and one vocabulary')
        others.append(other)
    return captioner, encoder, vocabulary, others


# -------------------------------------------------------------------------------- several processes
def join_ranks(name):
    """Pick the device; under torchrun, meet the other processes, one GPU each. -> device

    nccl works between GPUs, gloo between CPUs and for Python's objects. Only rank 0 prints.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        return pick_device(name)
    if name != 'cpu' and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        name = 'cuda'
    device = pick_device(name or 'cpu')
    dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo',
                            timeout=timedelta(days=1))  # rank 0 may compute features for hours
    if dist.get_rank():
        sys.stdout = open(os.devnull, 'w')
    return device


def leave_ranks():
    """End gloo's threads: one that still frees a tensor while Python ends aborts the process.

    Not after an error: ranks that have none would be waited for.
    """
    if dist.is_initialized():
        gc.collect()  # a DistributedDataParallel, in a circle of references, keeps them alive
        dist.destroy_process_group()


def ranks():
    """This process's rank and the number of processes: 0, 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_rank_0(make):
    """make() is called on rank 0 alone; all ranks get what it returns, or end if it fails."""
    rank, world = ranks()
    made, error = None, None
    if not rank:
        try:
            made = make()
        except (UserError, OSError) as problem:
            error = problem
    if world > 1:
        both = [made, error]
        dist.broadcast_object_list(both)
        made, error = both
    if error is not None:
        raise SystemExit(2) if rank else error
    return made


def first_rank_first(make):
    """make() on rank 0, then on the others, which find on disk what rank 0 put there."""
    made = []
    from_rank_0(lambda: made.append(make()))
    return made[0] if made else make()


def mean_over_ranks(x):
    """Mean of a tensor over the ranks."""
    _, world = ranks()
    if world > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x / world


# ----------------------------------------------------------------------------------------- training
def new_folder(s):
    """Make a run's folder without touching an older run."""
    base, number = s.name or f'{s.data}-{s.attn}', 1
    while True:
        folder = Path(s.out) / (base if number == 1 else f'{base}-{number}')
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def build(s, captions, device):
    """A new captioner, encoder and vocabulary (of the captions, lists of words) for settings s."""
    torch.manual_seed(s.seed)
    vocabulary = Vocabulary.build(captions, s.max_words, s.min_count)
    if not vocabulary.words:
        raise UserError(f'no word occurs {s.min_count} times in the training captions, so there is '
                        'none to learn: use a lower --min-count')
    encoder = Encoder(s.encoder, s.image_size, trainable=s.finetune or s.encoder == 'tiny')
    config = CaptionerConfig(len(vocabulary), encoder.feature_dim, s.attn, s.score, s.cell,
                             s.embed_dim, s.hidden_dim, s.attn_dim, s.dropout, s.hard_decode,
                             s.input_dropout)
    return Captioner(config).to(device), encoder.to(device), vocabulary


def evaluate(s, args, splits, device):
    """--eval: the table's row of one run, or of several as an ensemble."""
    paths = checkpoints_of(args)
    captioner, encoder, vocabulary, others = load_ensemble(paths, device, s.hard_decode)
    check_beam(s.beam, vocabulary)
    if args.split not in splits:
        raise UserError(f'{s.data} has no split {args.split}')
    report(captioner, encoder, vocabulary, s, args.split, splits[args.split], paths[0].parent,
           others)


def begin(s, args, captions, device):
    """A new run, or the one to --resume -> captioner, encoder, vocabulary, its folder, its state.

    captions are the training set's, as lists of words. A new run has no folder yet.
    """
    if not args.resume:
        state = {'epoch': 0, 'step': 0, 'best': -1.0, 'best_epoch': -1, 'baseline': 0.0,
                 'totals': {}}
        return *build(s, captions, device), None, state
    path, = checkpoints_of(args)
    state = read_checkpoint(path).get('training')
    if state is None:
        raise UserError(f'{path} holds a model and no state of a training, as last.pt does')
    captioner, encoder, vocabulary, _ = load_checkpoint(path, device, s.hard_decode)
    return captioner, encoder, vocabulary, path.parent, state


def make_optimizer(captioner, encoder, s, device, saved=None):
    """Adam or RMSprop, in the state `saved`; the learning rate is set before every step."""
    groups = [{'params': list(captioner.parameters()), 'first_lr': s.lr}]
    if encoder.trainable:
        groups.append({'params': list(encoder.parameters()), 'first_lr': s.encoder_lr})
    if s.optimizer == 'rmsprop':
        optimizer = torch.optim.RMSprop(groups)
    else:  # fused: all weights in one pass, which is faster
        optimizer = torch.optim.Adam(groups, fused=device.type in ('cpu', 'cuda'))
    if saved:
        groups_here = optimizer.state_dict()['param_groups']  # fused or not: as this device can
        optimizer.load_state_dict(saved | {'param_groups': groups_here})
    return optimizer


def compile_step(captioner, locations, s, device):
    """Compile the decoder's step, or say why not: it needs a C++ compiler or a supported GPU.

    It is compiled when it is first called, so it is called here, forward and backward.
    """
    plain, c = captioner.step, captioner.config
    captioner.step = torch.compile(plain)
    torch._dynamo.config.optimize_ddp = False  # that splits a compiled function among ranks
    try:
        a = torch.zeros(s.batch_size, locations, c.feature_dim, device=device)
        captions = torch.zeros(s.batch_size, 3, dtype=torch.long, device=device)
        with precision(s, device):
            captioner.train()(a, captions).logits.sum().backward()
    except Exception as error:  # whatever compilers and drivers come up with
        captioner.step = plain
        print(f'going on without --compile: {error!r:.100}')
    captioner.zero_grad()


def precision(s, device):
    """The context in which a training step computes: --amp or nothing special."""
    return torch.autocast(device.type, torch.bfloat16) if s.amp else nullcontext()


def validate(captioner, encoder, vocabulary, examples, images, s, epoch, totals):
    """Caption the validation split -> BLEU-4, the Hypotheses, and the epoch's lines of log.txt."""
    found = caption_images(captioner, encoder, images, s)
    hypotheses = hypothesis_words(found, vocabulary, s)
    bleu4 = bleu(reference_words(examples, s), hypotheses)[3]
    log = [f'epoch {epoch + 1}/{s.epochs}', *(f'{key} {x:.3f}' for key, x in totals.items()),
           f'val BLEU-4 with brevity penalty {bleu4:.2f}']
    point = pointing_rate(examples, found, vocabulary, encoder.grid)
    if point is not None:
        log.append(f'pointing {point:.1f}')
    return bleu4, found, ['  '.join(log)] + [
        f'    {" ".join(words)}   [{example.captions[0]}]'
        for words, example in list(zip(hypotheses, examples))[:2]]


def draw_validation(path, examples, found, vocabulary, grid):
    """Attention on a few validation images, one below the other, or a line if one is broken."""
    try:
        pictures = [open_image(x.image) for x in examples]
    except UserError as error:
        return print(f'there is no {path.name}: {error}')
    sheets = [draw_attention(picture, vocabulary.decode(h.tokens), h.alphas, h.betas, grid)
              for picture, h in zip(pictures, found)]
    page = Image.new('RGB', (max(x.width for x in sheets), sum(x.height for x in sheets)), 'white')
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    page.save(path)


def main():
    """Settings, data, model, then the loop."""
    s, args = parse_settings()
    device = join_ranks(s.device)
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
    rank, world = ranks()
    splits = from_rank_0(lambda: load_captions(s.data, s.data_dir, s.skip_bad))
    if args.eval:
        return evaluate(s, args, splits, device)

    captions = [tokenize(c) for x in splits['train'] for c in x.captions]
    captioner, encoder, vocabulary, folder, state = begin(s, args, captions, device)
    check_beam(s.beam, vocabulary)
    if s.compile:
        compile_step(captioner, math.prod(encoder.grid), s, device)
    optimizer = make_optimizer(captioner, encoder, s, device, state.get('optimizer'))

    # Images as arrays, captions as word ids.
    images = {name: first_rank_first(lambda: image_arrays(encoder, splits[name], s))
              for name in ('train', 'val')}
    images['train'] = to_gpu(images['train'], device)
    folder = folder or from_rank_0(lambda: new_folder(s))
    ids = [[START, *vocabulary.encode(words), END] for words in captions]
    image_of = np.repeat(np.arange(len(splits['train'])),  # caption i is of image image_of[i]
                         [len(x.captions) for x in splits['train']])
    lengths = np.array([len(words) for words in ids])
    weights = [group['params'] for group in optimizer.param_groups]
    print(f'{s.data}: {len(splits["train"])} training images, {len(ids)} captions, '
          f'{len(vocabulary)} words\n{s.attn} attention, encoder {encoder.key} with '
          f'{encoder.grid[0]} x {encoder.grid[1]} locations of {encoder.feature_dim}, '
          f'{sum(p.numel() for group in weights for p in group):,} trained weights, on {device}'
          f'{f" and {world - 1} more" if world > 1 else ""}\nrun: {folder}')

    def save_last():
        state['optimizer'] = optimizer.state_dict()
        save_checkpoint(folder / 'last.pt', captioner, encoder, vocabulary, asdict(s),
                        training=state)

    stop = []  # not empty after Ctrl-C

    def stop_after_step(*_):  # Ctrl-C ends the run after its step; a second one ends it at once
        stop.append(True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGINT, stop_after_step)
    decoder, cnn = captioner, encoder
    if world > 1:  # an RNN has no use for c_0
        decoder = DistributedDataParallel(captioner, find_unused_parameters=s.cell == 'rnn')
        cnn = DistributedDataParallel(encoder) if encoder.trainable else encoder
    began = saved = time.time()
    steps_done, speed, left = 0, 0.0, 0.0
    if not rank and not args.resume:
        save_last()  # a run can be resumed from its first moment on
    while state['epoch'] < s.epochs and state['epoch'] - state['best_epoch'] <= s.patience:
        epoch, epoch_began, captions_done = state['epoch'], time.time(), 0
        batches = length_batches(lengths, s.batch_size, np.random.default_rng((s.seed, epoch)))
        expected = 1.0 if epoch < s.warm_up else s.expected
        train_cnn = epoch >= s.finetune_from  # a frozen CNN stays as it is
        captioner.train()
        encoder.train(train_cnn)
        # This rank's captions; where a batch has none for it, one that counts 0 (see weight).
        mine = [batch[rank::world] if rank < len(batch) else batch[:1] for batch in batches]
        loaded = ahead(mine[state['step']:], lambda batch: (
            read_rows(images['train'], image_of[batch], device),
            pinned(torch.tensor([ids[i] for i in batch]), device)))
        for step, (batch, (rows, words)) in enumerate(loaded, state['step']):
            # Gradients are averaged over the ranks: one with fewer captions must count for less.
            weight = len(batches[step][rank::world]) * world / len(batches[step])
            done = (epoch + step / len(batches)) / s.epochs  # share of the training
            for group in optimizer.param_groups:
                group['lr'] = group['first_lr'] * 0.5 * (1 + math.cos(math.pi * done))
            words = words.to(device, non_blocking=True)  # (B, T+1)
            # Dropout and samples depend on the step alone: a run that is resumed draws the same.
            torch.manual_seed(hash((s.seed, rank, epoch, step)))
            with precision(s, device):
                with torch.set_grad_enabled(train_cnn):
                    a = annotations(cnn, rows, device)
                loss, numbers = batch_loss(decoder, a, words, s, state['baseline'], expected)
            optimizer.zero_grad(set_to_none=True)
            (weight * loss).backward()
            norms = [torch.nn.utils.clip_grad_norm_(group, s.clip) for group in weights]
            optimizer.step()
            if 'reward' in numbers:  # b_k = 0.9 b_{k-1} + 0.1 log p(y | s_k, a), paper 4.1
                reward = mean_over_ranks(weight * numbers['reward'])
                state['baseline'] = 0.9 * state['baseline'] + 0.1 * reward
            for key, value in numbers.items():  # tensors: a number would wait for the GPU
                state['totals'][key] = state['totals'].get(key, 0.0) + weight * value
            state['step'], steps_done = step + 1, steps_done + 1
            captions_done += len(batches[step])
            speed = captions_done / (time.time() - epoch_began)
            left = (time.time() - began) / steps_done * ((s.epochs - epoch) * len(batches) - step)
            if sys.stdout.isatty() and step % 10 == 0:
                print(f'\repoch {epoch + 1}/{s.epochs}  {step + 1}/{len(batches)}  loss '
                      f'{loss.item():.2f}  {speed:.0f} captions/s  {left / 60:.1f} min left ',
                      end='', flush=True)
            # Has any rank had Ctrl-C? The tensor is on the CPU, so no GPU is waited for.
            stopping = mean_over_ranks(torch.tensor(float(len(stop)))) > 0
            if step % 50 == 49 or step + 1 == len(batches) or stopping:
                if not math.isfinite(mean_over_ranks(state['totals']['loss']) + sum(norms)):
                    raise UserError(
                        f'the loss is not a number in epoch {epoch + 1}, by step {step + 1}: go on '
                        f'from what was saved before, python train.py --resume {folder} --lr '
                        f'{s.lr / 4:.0e}, or begin anew with a lower --lr')
                if not rank and time.time() - saved > 600:
                    save_last()
                    saved = time.time()
            if stopping:
                from_rank_0(save_last)  # a rank that ends before would have this one killed
                print(f'\nstopped; go on with: python train.py --resume {folder}')
                sys.exit(130)

        totals = {key: float(mean_over_ranks(x)) / len(batches)
                  for key, x in state['totals'].items()}
        bleu4, found, lines = validate(captioner, encoder, vocabulary, splits['val'],
                                       images['val'], s, epoch, totals)
        state.update(epoch=epoch + 1, step=0, totals={}, log=state.get('log', []) + lines)
        # Where sampling begins the model is another one: what was best before is forgotten.
        better = bleu4 > state['best'] or s.attn == 'hard' and epoch == s.warm_up
        if better:
            state.update(best=bleu4, best_epoch=epoch)
        if not rank:  # first what must not be lost
            (folder / 'log.txt').write_text('\n'.join(state['log']) + '\n', encoding='utf-8')
            if better:
                save_checkpoint(folder / 'best.pt', captioner, encoder, vocabulary, asdict(s),
                                half=True)
            save_last()
            draw_validation(folder / f'attention-{epoch + 1:02}.png', splits['val'][:3], found,
                            vocabulary, encoder.grid)
        if sys.stdout.isatty():
            print('\r\033[K', end='')  # clear the progress line
        print(f'{lines[0]}  {speed:.0f} captions/s  {left / 60:.1f} min left', *lines[1:], sep='\n')

    signal.signal(signal.SIGINT, signal.default_int_handler)
    captioner, encoder, vocabulary, _ = first_rank_first(
        lambda: load_checkpoint(folder / 'best.pt', device, s.hard_decode))
    print(f'best epoch: {state["best_epoch"] + 1}; {(time.time() - began) / 60:.1f} minutes')
    for split in ('test', 'unseen'):
        if split in splits:
            report(captioner, encoder, vocabulary, s, split, splits[split], folder)


if __name__ == '__main__':
    run_command(main)
    leave_ranks()
