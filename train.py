"""Train a captioner, validate it by BLEU, keep the best, and print its row of the paper's table.
Below: settings, the loss (4.1, 4.2.1), scores (5), training (4.3), several processes, commands.

    python train.py                                   shapes, soft attention, a few minutes on a CPU
    python train.py --attn soft --data flickr8k       downloads what is missing
    python train.py --data mine --init-from pretrained/soft.pt      own images, from a trained model
    python train.py --resume runs/NAME                goes on where it stopped
    python train.py --eval runs/NAME --split test --beam 3          (-h lists all settings)
    torchrun --nproc_per_node=2 train.py              several GPUs or CPUs, with any of the above
"""
import argparse
import gc
import itertools
import json
import math
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from attention import doubly_stochastic, entropy, reinforce_loss
from bleu_meteor import bleu, score, tokenize
from data import END, START, UserError, Vocabulary, as_path, cache_images, as_user_error
from data import length_batches, load_captions, pointing, run_command
from model import Captioner, CaptionerConfig, Encoder, checkpoint_in, load_checkpoint, pick_device
from model import read_checkpoint, save_checkpoint


# ----------------------------------------------------------------------------------------- settings
def setting(default, text, choices=None, least=None, most=1e4):
    """A field of Settings: its default, its help, and what it may be."""
    options = {'help': f'{text} [{default}]'}
    if least is None:
        least = 1 if type(default) is int else 0  # a share may be 0, a size may not

    def number(given):
        value = type(default)(given)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f'{given} is not from {least} to {most:g}')
        return value
    if isinstance(default, bool):
        options['action'] = argparse.BooleanOptionalAction
    elif isinstance(default, str):
        options['choices'] = choices
    else:
        options['type'] = number
    return field(default=default, metadata=options)


@dataclass
class Settings:
    """All that a run depends on; every field is a flag. Defaults are for photographs."""
    data: str = setting('shapes', 'shapes, flickr8k, flickr30k, coco, a folder in data-dir, a path')
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
    encoder: str = setting('pretrained/efficientnet_lite0_14x14.pt2',
                           'a .pt2 file, a torchvision CNN by name (paper: vgg19), or tiny')
    finetune: bool = setting(False, 'train the CNN too, instead of caching its features')
    image_size: int = setting(224, 'images are squeezed into squares of this side')
    embed_dim: int = setting(512, 'size of word embeddings')
    hidden_dim: int = setting(512, 'size of the recurrent state')
    attn_dim: int = setting(256, 'size of the attention layer')
    dropout: float = setting(0.5, 'share of units dropped in the output layer', most=0.99)
    input_dropout: float = setting(0.15, 'share of word embeddings and features dropped', most=0.99)
    min_count: int = setting(0, 'vocabulary: words seen at least so often (0: 4 times, or once '
                             'where there are less than 10,000 captions)', least=0)
    # loss
    lambda_ds: float = setting(0.0, 'weight of the doubly stochastic term, eq. (14); paper: 1')
    lambda_r: float = setting(0.02, 'hard: weight of the REINFORCE term, eq. (12)')
    lambda_h: float = setting(0.002, 'hard: weight of the entropy term, eq. (12)')
    expected: float = setting(0.5, 'hard: share of captions that take the expectation', most=1)
    warm_up: int = setting(2, 'hard: epochs of soft attention before sampling begins', least=0)
    hard_decode: str = setting('expected', 'hard: context in captioning', ('argmax', 'expected'))
    # training
    lr: float = setting(1e-3, 'learning rate; falls to 0 along half a cosine', most=1)
    encoder_lr: float = setting(1e-4, 'learning rate of a CNN that is fine-tuned', most=1)
    batch_size: int = setting(64, 'captions in a batch')
    epochs: int = setting(7, 'epochs at most')
    clip: float = setting(5.0, 'largest norm of the gradient, of decoder and CNN each')
    seed: int = setting(0, 'seed of weights, dropout, batches, samples', least=0, most=1e9)
    amp: bool = setting(False, 'multiply in bfloat16 where that is safe (torch.autocast)')
    compile: bool = setting(False, 'compile the step of the decoder (torch.compile)')
    device: str = setting('', 'cpu, cuda or mps (default: the best there is)')
    # captioning
    beam: int = setting(5, 'beam size in validation and test')
    length_penalty: float = setting(0.7, 'captions are ordered by log p / length ** this', most=10)
    max_len: int = setting(30, 'most words in a caption')


# The paper trains from pretrained CNNs on photographs; shapes learns all from nothing in minutes.
SHAPES_DEFAULTS = dict(encoder='tiny', image_size=64, embed_dim=128, hidden_dim=256, attn_dim=128,
                       dropout=0.1, input_dropout=0.0, lr=2e-3, encoder_lr=2e-3,
                       batch_size=100, epochs=4, beam=3, hard_decode='argmax')
SHOW_AND_TELL_DEFAULTS = dict(embed_dim=1024, lr=2e-3, epochs=10)  # --attn none on photographs
# What no flag may change: MODEL when a checkpoint is given, RUN when a run is resumed.
MODEL = ('attn score cell encoder finetune image_size embed_dim hidden_dim attn_dim dropout '
         'input_dropout min_count').split()
RUN = MODEL + ['data', 'batch_size', 'seed', 'init_from']


def parse_settings():
    """The command line -> Settings, checkpoint, folder, split.

    checkpoint: what --resume, --eval or --init-from names, read, or None. folder: that of the run
    to resume or to score, or None. split: what --eval scores, None in training.
    """
    parser = argparse.ArgumentParser(
        usage='train.py [--setting VALUE ..]   (-h lists them)', argument_default=argparse.SUPPRESS,
        description='Train or evaluate a captioner. [..] are the defaults for photographs.')
    for f in fields(Settings):
        parser.add_argument('--' + f.name.replace('_', '-'), **f.metadata)
    either = parser.add_mutually_exclusive_group()
    either.add_argument('--resume', type=as_path, help='folder of a run to go on with')
    either.add_argument('--eval', type=as_path, help='folder of a run (or checkpoint) to score')
    parser.add_argument('--split', choices=('train', 'val', 'test', 'unseen'),
                        help='split that --eval scores [test]')
    given = vars(parser.parse_args())  # the flags that were given, and no defaults
    resume, evaluate = given.pop('resume', None), given.pop('eval', None)
    split = None
    if evaluate:
        split = given.pop('split', 'test')
    elif 'split' in given:
        parser.error('--split goes with --eval')

    checkpoint, folder, saved = None, None, {}
    if resume or evaluate or 'init_from' in given:
        if resume:
            path = resume / 'last.pt'
        else:
            path = checkpoint_in(evaluate or given['init_from'])
        checkpoint = read_checkpoint(path)
        saved = checkpoint['settings']
        fixed = RUN if resume else MODEL
        for name in fixed:
            if name in given and given[name] != saved[name]:
                raise UserError(f'{name} is {saved[name]} in {path} and stays so: leave it out')
        if resume or evaluate:
            folder = path.parent
        else:
            saved = {name: saved[name] for name in MODEL}

    # Later updates win: defaults, the data set's, the checkpoint's, the command line.
    settings = asdict(Settings())
    chosen = {**saved, **given}
    if chosen.get('data', 'shapes') == 'shapes':
        settings.update(SHAPES_DEFAULTS)
    elif chosen.get('attn') == 'none':
        settings.update(SHOW_AND_TELL_DEFAULTS)
    settings.update(chosen)
    # A checkpoint of another version may have more settings.
    cfg = Settings(**{name: settings[name] for name in asdict(Settings())})
    if cfg.attn == 'hard' and cfg.warm_up >= cfg.epochs and not evaluate:
        raise UserError('--warm-up must be below --epochs: hard attention samples after it')
    return cfg, checkpoint, folder, split


# ----------------------------------------------------------------------------------------- the loss
def batch_loss(captioner, a, captions, cfg, baseline=0.0, expected=0.5):
    """Loss of a batch (mean over its captions) and numbers for the log, tensors on a's device.

    a (B, L, D), captions (B, T+1). Soft: -log p(y) + lambda_ds * eq. (14). Hard: eq. (12), where
    the share `expected` of the captions takes the expectation and samples nothing.
    """
    targets, sampled = captions[:, 1:], None  # (B, T)
    T = targets.shape[1]
    if cfg.attn == 'hard':
        sampled = torch.rand(len(captions), device=a.device) >= expected  # (B,)
    out = captioner(a, captions, sampled=sampled)
    logits = out.logits.flatten(0, 1).float()  # (B*T, V); 16 bits would be too few for log p
    nll = F.cross_entropy(logits, targets.flatten(), reduction='none')  # (B*T,)
    log_p_y = -nll.view(targets.shape).sum(dim=1)  # (B,)
    numbers = {'nll/word': -log_p_y.mean() / T}
    loss = -log_p_y
    if cfg.attn == 'soft' and cfg.lambda_ds:
        loss = loss + cfg.lambda_ds * doubly_stochastic(out.alphas)
    if cfg.attn == 'hard':
        log_p_s = out.log_p_s.sum(dim=1)  # (B,), 0 where nothing was sampled
        loss = reinforce_loss(log_p_y, log_p_s, out.alphas, baseline, cfg.lambda_r, cfg.lambda_h)
        numbers['reward'] = log_p_y.mean()
        numbers['entropy'] = entropy(out.alphas).mean() / T
    numbers['loss'] = loss.mean()
    return loss.mean(), {name: x.detach() for name, x in numbers.items()}


# ------------------------------------------------------------------------------ captions and scores
def caption_images(model, examples, images, cfg):
    """Caption images -> references, hypotheses, pointing.

    images (N, ..): their pixels or features. references, hypotheses: what people and the model
    said, lists of words. pointing: per cent of object words that are hits, or None.
    """
    captioner, encoder, vocabulary = model
    captioner.eval()
    encoder.eval()
    found, references, hypotheses, hits = [], [], [], []
    for batch in images.split(25):
        batch = batch.to(captioner.E.weight.device)
        with torch.no_grad():
            a = (encoder(batch) if encoder.trainable else batch).float()  # (B, L, D)
        for hypotheses_of_image in captioner.beam_search(a, cfg.beam, cfg.max_len,
                                                         cfg.length_penalty):
            found.append(hypotheses_of_image[0])
    for h, example in zip(found, examples):
        words = vocabulary.decode(h.tokens)
        hypotheses.append(words)
        references.append([tokenize(caption) for caption in example.captions])
        if example.objects and h.alphas is not None:
            hits += pointing(words, h.alphas, example.objects, encoder.grid)
    share = 100 * np.mean(hits) if hits else None
    return references, hypotheses, share


def report(model, cfg, split, examples, images, folder):
    """Caption a split, print its row of the table, write its results and references."""
    _, encoder, _ = model
    references, hypotheses, share = caption_images(model, examples, images, cfg)
    print(f'\n{cfg.data} {split}: {len(examples)} images, encoder {encoder.key}, beam {cfg.beam}, '
          f'length penalty {cfg.length_penalty}')
    scores = score(references, hypotheses) + [share]
    print(f'{"":40}B1        B2        B3        B4    METEOR  pointing')
    cells = ['        -' if x is None else f'{x:9.2f}' for x in scores]
    print(f'this model (attention: {cfg.attn})    ', *cells)
    print('BLEU has no brevity penalty, as in the paper; with it BLEU-4 is '
          f"{bleu(references, hypotheses)[3]:.2f}. METEOR is NLTK's, with METEOR 1.5's parameters.")
    results, captions = [], {}
    for words, x in zip(hypotheses, examples):
        results.append({'image_id': x.name, 'caption': ' '.join(words)})
        captions[x.name] = x.captions
    for name, content in ('results', results), ('references', captions):
        (folder / f'{split}-{name}.json').write_text(json.dumps(content, indent=0))


# -------------------------------------------------------------------------------- several processes
# Only torchrun's variables count: other launchers set them with other meanings.
environment = os.environ if dist.is_torchelastic_launched() else {}
WORLD, RANK = int(environment.get('WORLD_SIZE', 1)), int(environment.get('RANK', 0))


def join_ranks(name):
    """Pick the device; under torchrun, meet the other processes, each with a GPU of its own."""
    if WORLD == 1:
        return pick_device(name)
    if name != 'cpu' and torch.cuda.is_available():
        name = f'cuda:{environment["LOCAL_RANK"]}'
    device, backend = pick_device(name or 'cpu'), 'gloo'
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        backend = 'cpu:gloo,cuda:nccl'
    dist.init_process_group(backend, timeout=timedelta(days=1))  # features may take hours
    if RANK:  # one is enough to print
        sys.stdout = open(os.devnull, 'w')
    return device


def wait():
    """Until all ranks are here."""
    if WORLD > 1:
        with as_user_error(f'process {RANK} cannot go on', 'another one says why'):
            dist.barrier()


# ----------------------------------------------------------------------------------------- training
def build(cfg, examples, device):
    """A new captioner, encoder and vocabulary for training examples."""
    torch.manual_seed(cfg.seed)
    captions = [tokenize(caption) for example in examples for caption in example.captions]
    min_count = cfg.min_count or (4 if len(captions) >= 10000 else 1)
    vocabulary = Vocabulary.build(captions, min_count=min_count)
    encoder = Encoder(cfg.encoder, cfg.image_size, cfg.finetune, device=device, trial_batch=32)
    config = CaptionerConfig(len(vocabulary), encoder.feature_dim, cfg.attn, cfg.score, cfg.cell,
                             cfg.embed_dim, cfg.hidden_dim, cfg.attn_dim, cfg.dropout,
                             cfg.hard_decode, cfg.input_dropout)
    return Captioner(config).to(device), encoder, vocabulary


def training_captions(cfg, examples, vocabulary):
    """Training captions as word ids, lists of T+1, and the number of each caption's image (N,)."""
    ids, image_of = [], []
    for i, example in enumerate(examples):
        for caption in example.captions:
            ids.append([START, *vocabulary.encode(tokenize(caption)), END])
            image_of.append(i)
    print(f'{cfg.data}: {len(examples)} training images, {len(ids)} captions, {len(vocabulary)} '
          'words')
    longer = sum(len(caption) - 2 > cfg.max_len for caption in ids)
    if longer:
        print(f'{longer} of these captions are longer than --max-len, which ends what the model '
              f'says after {cfg.max_len} words')
    return ids, torch.tensor(image_of)


def make_optimizer(model):
    """Adam with two groups of weights: the captioner's and the encoder's (none if it is frozen).

    `train` sets the learning rates.
    """
    captioner, encoder, _ = model
    groups = []
    for module in captioner, encoder:
        groups.append({'params': [p for p in module.parameters() if p.requires_grad]})
    return torch.optim.Adam(groups, fused=True)  # all weights in one pass


def compiled(step, device):
    """The decoder's step as one graph, or a UserError where nothing can be compiled."""
    with as_user_error('--compile finds no working compiler', 'install one (g++, Visual Studio, on '
                       'GPUs triton), or leave --compile out'):
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    return torch.compile(step)


def train(cfg, device, model, folder, run, splits, images):
    """The loop, from where `run` stands to the last epoch; best.pt holds the best one's model.

    run: what has been reached (see train_and_test): epoch, step, best score, sums for the log.
    """
    captioner, encoder, vocabulary = model
    optimizer = make_optimizer(model)
    if run.optimizer:  # --resume
        optimizer.load_state_dict(run.optimizer)
    decoder, cnn = captioner, encoder
    if WORLD > 1:
        decoder = DistributedDataParallel(  # the RNN does not use f_init_c
            captioner, find_unused_parameters=cfg.cell == 'rnn')
        cnn = DistributedDataParallel(encoder) if encoder.trainable else encoder

    def save_last():
        for weight in (*captioner.parameters(), *encoder.parameters()):
            if not weight.isfinite().all():
                raise UserError('the weights are not numbers any more: go on from the last save '
                                f'with --resume and a lower rate, such as --lr {cfg.lr / 4:.0e}')
        run.optimizer = optimizer.state_dict()
        if RANK == 0:
            save_checkpoint(folder / 'last.pt', *model, asdict(cfg), training=vars(run))
        return time.time()

    saved_at = save_last()  # a run can be resumed from its first moment on
    print(f'run: {folder}')
    ids, image_of = training_captions(cfg, splits['train'], vocabulary)
    lengths = np.array([len(caption) for caption in ids])
    while run.epoch < cfg.epochs:
        began = time.time()
        epoch = run.epoch
        rng = np.random.default_rng((cfg.seed, epoch))
        batches = length_batches(lengths, cfg.batch_size, rng)
        batches = [batch for batch in batches if len(batch) >= WORLD]
        expected = 1.0 if epoch < cfg.warm_up else cfg.expected
        captioner.train()
        encoder.train()
        for step in range(run.step, len(batches)):
            # Dropout and samples depend on the step alone: a run that is resumed draws the same.
            # (The hash of numbers is the same in every process.)
            torch.manual_seed(hash((cfg.seed, RANK, epoch, step)))
            done = (epoch + step / len(batches)) / cfg.epochs  # share of the training
            for group, rate in zip(optimizer.param_groups, (cfg.lr, cfg.encoder_lr)):
                group['lr'] = rate * 0.5 * (1 + math.cos(math.pi * done))
            batch = batches[step]
            equal = len(batch) - len(batch) % WORLD  # every rank gets as many captions
            batch = batch[RANK:equal:WORLD]
            x = images['train'][image_of[batch]].to(device)  # features (B, L, D), or pixels
            y = torch.tensor([ids[i] for i in batch]).to(device)  # (B, T+1)
            with torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp):
                a = (cnn(x) if encoder.trainable else x).float()  # (B, L, D)
                loss, numbers = batch_loss(decoder, a, y, cfg, run.baseline, expected)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group['params'], cfg.clip)
            optimizer.step()

            run.step = step + 1
            for name, value in numbers.items():  # tensors: .item() would wait for the GPU
                run.totals[name] = run.totals.get(name, 0) + value
            if cfg.attn == 'hard':  # b_k = 0.9 b_{k-1} + 0.1 log p(y | s_k, a), paper 4.1
                run.baseline = 0.9 * run.baseline + 0.1 * numbers['reward']  # each rank's own
            if step % 200 == 199:
                print(f'    step {step + 1} of {len(batches)}, loss {loss.item():.2f}')
            if time.time() - saved_at > 120:
                saved_at = save_last()

        save_last()  # no broken weights are validated
        row = {name: float(total) / len(batches) for name, total in run.totals.items()}
        row['seconds'] = time.time() - began
        if RANK == 0:
            validate(model, cfg, splits['val'], images['val'], folder, run, row)
        run.epoch, run.step, run.totals = epoch + 1, 0, {}
        saved_at = save_last()


def validate(model, cfg, examples, images, folder, run, row):
    """Caption the validation images; add to the epoch's row and the log; keep the best model."""
    references, hypotheses, _ = caption_images(model, examples, images, cfg)
    row['val BLEU-4'] = bleu(references, hypotheses)[3]
    if run.epoch == 0:
        run.log.append(','.join(['epoch', *row]))
    run.log.append(','.join(f'{x:g}' for x in (run.epoch + 1, *row.values())))
    (folder / 'log.csv').write_text('\n'.join(run.log) + '\n', 'utf-8')
    print(f'epoch {run.epoch + 1}/{cfg.epochs}', *(f' {name} {x:.3f}' for name, x in row.items()))
    print(f'    {" ".join(hypotheses[0])}   [{" ".join(references[0][0])}]')
    # Hard attention's best is one of the epochs that sample: the first of them replaces all before.
    first_sampled = cfg.attn == 'hard' and run.epoch == cfg.warm_up
    if first_sampled or row['val BLEU-4'] > run.best:
        run.best = row['val BLEU-4']
        save_checkpoint(folder / 'best.pt', *model, asdict(cfg), half=True)


# --------------------------------------------------------------------------------- the two programs
def prepare(cfg, device, checkpoint, needed, more=()):
    """Data, model (a new one, or the checkpoint's) and images -> splits, model, images.

    Splits in `needed` must be there; those in `more` come along if they are.
    """
    if RANK:  # rank 0 goes first: it downloads, and computes what the others then read
        wait()
    splits = load_captions(cfg.data, cfg.data_dir, cfg.skip_bad, (*needed, *more))
    for split in needed:
        if split not in splits:
            raise UserError(f'{cfg.data} has no images with captions for {split}: add some (three '
                            f'images are the least), or name some in {split}.txt')
    if checkpoint:
        *model, _ = load_checkpoint(checkpoint, device)  # all but its settings
    else:
        model = build(cfg, splits['train'], device)
    captioner, encoder, _ = model
    captioner.config.hard_decode = cfg.hard_decode  # a flag may change a checkpoint's
    encode = None if encoder.trainable else encoder  # a frozen one computes its features once
    images = {}
    for split, examples in splits.items():
        images[split] = cache_images(examples, encoder.image_size, cfg.cache_dir, encoder.key,
                                     encode)
    if RANK == 0:  # now the others
        wait()
    return splits, model, images


def new_folder(out, name):
    """Make a folder for a run, out/NAME or with a number after it: no two runs share one."""
    with as_user_error(f'cannot make a folder in {out}', 'name another with --out or --name'):
        as_path(out).mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = as_path(out) / (name if number == 1 else f'{name}-{number}')
            with suppress(FileExistsError):
                folder.mkdir()
                return folder


def train_and_test(cfg, device, checkpoint, folder):
    """Train a new run, or go on with the one in `folder`, and report its best model."""
    splits, model, images = prepare(cfg, device, checkpoint, ('train', 'val'), ('test', 'unseen'))
    captioner, _, _ = model
    if cfg.compile:
        captioner.step = compiled(captioner.step, device)
    log = [f'# command: {" ".join(sys.argv)}',
           f'# torch {torch.__version__}, {WORLD} x {device}', f'# settings: {cfg}']
    print(*log, sep='\n')
    # What has been reached; --resume restores it.
    run = SimpleNamespace(epoch=0, step=0, best=-1.0, baseline=torch.zeros(()), totals={},
                          log=log, optimizer=None)
    if folder:  # --resume
        vars(run).update(checkpoint['training'])
    elif RANK == 0:
        folder = new_folder(cfg.out, cfg.name or f'{as_path(cfg.data).resolve().name}-{cfg.attn}')
    run.baseline = run.baseline.to(device)
    try:
        train(cfg, device, model, folder, run, splits, images)
    except KeyboardInterrupt:
        hint = f'; go on with: python "{sys.argv[0]}" --resume "{folder}"'
        raise KeyboardInterrupt(hint if RANK == 0 else '') from None
    if RANK == 0:
        *model, _ = load_checkpoint(folder / 'best.pt', device)
        for split in 'test', 'unseen':
            if split in splits:
                report(model, cfg, split, splits[split], images[split], folder)
        sample = Path(sys.argv[0]).with_name('sample.py')
        print(f'\ncaption images with it: python "{sample}" img.jpg --checkpoint "{folder}"')


def main():
    cfg, checkpoint, folder, split = parse_settings()
    device = join_ranks(cfg.device)
    if split:
        splits, model, images = prepare(cfg, device, checkpoint, (split,))
        if RANK == 0:
            report(model, cfg, split, splits[split], images[split], folder)
    else:
        train_and_test(cfg, device, checkpoint, folder)
    wait()
    if WORLD > 1:
        gc.collect()  # else gloo may free a tensor while Python ends, and abort
        dist.destroy_process_group()


if __name__ == '__main__':
    run_command(main)
