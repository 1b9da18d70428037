"""Caption images and draw where the model looked, as in the paper's figures 2, 3 and 5.

    python sample.py img.jpg more.png photos/   captions, and img.attention.png beside each image
    python sample.py img.jpg --explain          word by word: gate, cells, likeliest words
    ... --checkpoint runs/NAME                  by another model than pretrained/soft.pt
"""
import argparse
import json
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data import PAD, START, UNK, UserError, is_image, load_image, open_image, run_command
from model import load_checkpoint

PANEL, LABEL, GAP = 224, 32, 6  # pixels: width of a panel, height of its label, space between
LARGE, SMALL = ImageFont.load_default(20), ImageFont.load_default(13)  # Pillow's own font


def attention_map(alpha, grid, size):
    """Weights alpha (L,), size (width, height) -> smooth (height, width), 1 where largest."""
    alpha = np.asarray(alpha, dtype=np.float32).reshape(grid)
    small = Image.fromarray((255 * alpha / alpha.max()).astype(np.uint8))
    blur = ImageFilter.GaussianBlur(max(size) / max(grid) / 3)
    weights = np.asarray(small.resize(size, Image.BICUBIC).filter(blur), dtype=np.float32)
    return weights / weights.max()


def drawable(letter):
    """The letter, or the end of its Unicode name where the font lacks it: e for é, ya for я."""
    if bytes(LARGE.getmask(letter)) != bytes(LARGE.getmask('\U0010ffff')):  # the box for no sign
        return letter
    name = unicodedata.name(letter, '?').split(' WITH')[0]  # LATIN SMALL LETTER E WITH ACUTE
    return name.replace('-', ' ').split()[-1].lower()


def draw_attention(image, words, alphas=None, betas=None, grid=None, columns=6):
    """One picture for a caption: the image, then for each word the image under its attention.

    image: PIL picture; words: T strings; alphas (>= T rows: <end> has one too) and betas, the
    gates, of a Hypothesis, None without attention; grid: (rows, columns) of the L locations.
    """
    shape = min(max(image.height / image.width, 0.5), 2)  # very long pictures are squeezed
    image = image.resize((PANEL, round(PANEL * shape)), Image.BICUBIC)
    words = [''.join(map(drawable, unicodedata.normalize('NFC', word))) for word in words]
    panels = [(image, ' '.join(words) if alphas is None else '', '')]
    pixels = np.asarray(image, dtype=np.float32)
    dark, bright = 0.22 * pixels, 0.7 * pixels + 0.3 * 255
    for word, alpha, beta in zip(words, alphas, betas) if alphas is not None else []:
        m = attention_map(alpha, grid, image.size)[:, :, None]
        look = Image.fromarray((dark + m * (bright - dark)).astype(np.uint8))
        panels.append((look, word, f'beta {beta:.2f}'))
    width, height, down = PANEL + GAP, image.height + LABEL + GAP, -(-len(panels) // columns)
    sheet = Image.new('RGB', (columns * width + GAP, down * height + GAP), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (panel, word, beta) in enumerate(panels):
        x, y = GAP + i % columns * width, GAP + i // columns * height + LABEL
        font = SMALL if beta and len(word) > 15 else LARGE
        draw.text((x, y - 6), word, 'black', font, anchor='ls')
        draw.text((x + PANEL, y - 6), beta, 'grey', SMALL, anchor='rs')
        sheet.paste(panel, (x, y))
    return sheet


def draw_page(path, drawings):
    """Save one picture of several: for each a path or pixels, then `draw_attention`'s arguments."""
    sheets = [draw_attention(open_image(source), *rest) for source, *rest in drawings]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack(sheets)).save(path, compress_level=1)  # fast, a tenth more bytes


def pick_device(name=''):
    """Device by name, or the best there is: cuda, mps or cpu. Raises UserError without it."""
    name = name or torch.accelerator.current_accelerator(check_available=True) or 'cpu'
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name} cannot be used here: {str(error)[:100]}') from None


def checkpoint_in(run, resume=False):
    """The checkpoint that a run's folder means: best.pt, or last.pt to go on with; or a file."""
    return Path(run) / ('last.pt' if resume else 'best.pt') if Path(run).is_dir() else Path(run)


def images_in(path):
    """A file, or the images of a folder and its folders; says how many other files are there."""
    if ':/' in str(path):
        raise UserError(f'{path} is an address: save the image, and give the name of its file')
    if not path.is_dir():
        return [path]
    files = [x for x in sorted(path.rglob('[!.]*')) if x.is_file() and '.attention.' not in x.name]
    images = list(filter(is_image, files))
    others = f'{len(files) - len(images)} files that Pillow does not know (convert HEIC to JPEG)'
    if not images:
        raise UserError(f'the folder {path} has no images, and {others}')
    if len(images) < len(files):
        print(f'left out of {path}: {others}', file=sys.stderr)
    return images


def parse_arguments():
    parser = argparse.ArgumentParser(description='Caption images and draw where the model looked.')
    add = parser.add_argument
    add('images', nargs='+', type=Path, help='image files, or folders of images')
    add('--checkpoint', default=Path(__file__).with_name('pretrained') / 'soft.pt',
        help='trained model: a file, or a folder such as runs/NAME [pretrained/soft.pt]')
    add('--explain', action='store_true', help='say how each word came about (not with --json)')
    add('--top', type=int, default=1, help='captions for each image, at most beam [1]')
    add('--beam', type=int, help='beam size [as in training]')
    add('--length-penalty', type=float, help='order by log p / length ** this [as in training]')
    add('--max-len', type=int, default=30, help='most words in a caption [30]')
    add('--hard-decode', choices=('argmax', 'expected'), help='hard attention [as in training]')
    add('--out', help='folder for the pictures [beside each image]')
    add('--json', action='store_true', help='print JSON instead of text')
    add('--batch-size', type=int, default=25, help='images captioned at once [25]')
    add('--device', default='', help='cpu, cuda or mps [the best there is]')
    args = parser.parse_args()
    if any(x is not None and x < 1 for x in (args.top, args.beam, args.max_len, args.batch_size)):
        raise UserError('--top, --beam, --max-len and --batch-size must be at least 1')
    return args


def explain(captioner, a, best, vocabulary, encoder):
    """Print the shapes along the way for one image's a (1, L, D), then how each word was chosen."""
    captions = torch.tensor([[START, *best.tokens]], device=a.device)  # (1, T+1)
    logits, (keys, _, (h, _)) = captioner(a, captions).logits, captioner.start(a)
    side, shapes = encoder.image_size, [tuple(x.shape[1:]) for x in (a, keys, h, logits)]
    print('  picture {}, a {}, keys {}, h {}, logits {}'.format((3, side, side), *shapes))
    cells = 'beta  weight at row,column from 0' if best.alphas is not None else ''
    print(f'  word         p     {cells:34}  p of the likeliest words')
    for t, (token, p) in enumerate(zip(best.tokens, logits[0].softmax(dim=1))):  # p (V,)
        p[[PAD, START, UNK]] = 0  # which beam search never says
        if best.alphas is not None:
            cells = f'{best.betas[t]:.2f}'
            for i in best.alphas[t].argsort()[:-4:-1]:
                cells += f'  {best.alphas[t, i]:.2f} {i // encoder.grid[1]},{i % encoder.grid[1]}'
        words = '  '.join(f'{x:.2f} {vocabulary.all[i]:8}' for x, i in zip(*p.topk(3)))
        print(f'  {vocabulary.all[token]:11}  {p[token]:.2f}  {cells:34}  {words}'[:100].rstrip())


@torch.no_grad()
def main():
    args, problems, results, drawings, pool = parse_arguments(), [], [], {}, ThreadPoolExecutor()
    checkpoint, device = checkpoint_in(args.checkpoint), pick_device(args.device)
    captioner, encoder, vocabulary, settings = load_checkpoint(checkpoint, device, args.hard_decode)
    beam = args.beam or settings['beam']
    penalty = settings['length_penalty'] if args.length_penalty is None else args.length_penalty
    print(f'model: {checkpoint} (--checkpoint names another)', file=sys.stderr)

    def readable(paths):
        """Yield (path, pixels) of the images that can be read; the others do not stop them."""
        for path in paths:
            try:
                yield path, load_image(path, encoder.image_size)
            except UserError as error:
                problems.append(str(error))
    images = readable([path for place in args.images for path in images_in(place)])
    while batch := list(islice(images, args.batch_size)):
        a = encoder(torch.from_numpy(np.stack([x for _, x in batch])).to(device))  # (B, L, D)
        found = captioner.beam_search(a, beam, args.max_len, penalty)
        for i, ((path, _), (best, *others)) in enumerate(zip(batch, found)):
            picture = Path(args.out or path.parent) / f'{path.stem}.attention.png'
            while picture in drawings:  # photo.jpg and photo.png, or of several folders
                picture = picture.with_name(f'_{picture.name}')
            drawing = path, vocabulary.decode(best.tokens), best.alphas, best.betas, encoder.grid
            drawings[picture] = pool.submit(draw_page, picture, [drawing])  # in the background
            captions = [{'caption': ' '.join(vocabulary.decode(h.tokens)),
                         'log_prob': h.log_prob} for h in (best, *others)[:args.top]]
            results.append({'image': str(path), 'captions': captions, 'picture': str(picture)})
            for c in captions if not args.json else []:
                print(f"{path}: {c['caption']}" + f"  ({c['log_prob']:.2f})" * (args.top > 1))
            if args.explain and not args.json:
                explain(captioner, a[i:i + 1], best, vocabulary, encoder)
    problems += [f'cannot write {picture} ({x.exception()}): name another folder with --out'
                 for picture, x in drawings.items() if x.exception()]
    if args.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    if problems:
        raise UserError('\nerror: '.join(problems))


if __name__ == '__main__':
    run_command(main)
