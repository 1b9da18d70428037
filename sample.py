"""Caption images and draw where the model looked, as in the paper's figures 2, 3 and 5.

    python sample.py img.jpg more.png photos/   captions, and img.attention.png beside each image
    python sample.py img.jpg --explain          word by word: gate, cells, likeliest words
    ... --checkpoint runs/NAME                  by another model than pretrained/soft.pt
"""
import argparse
import json
import math
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data import PAD, START, UNK, UserError, as_path, in_one_line, is_image, list_files, load_image
from data import open_image, result_name, run_command
from model import PRETRAINED, checkpoint_in, load_checkpoint, pick_device

PANEL, LABEL, GAP = 224, 32, 6  # pixels: width of a panel, height of its label, space between
LARGE, SMALL = ImageFont.load_default(20), ImageFont.load_default(13)  # Pillow's own font


def attention_map(alpha, grid, size):
    """Weights alpha (L,), size (width, height) -> smooth (height, width), 1 where largest."""
    alpha = np.asarray(alpha, dtype=np.float32).reshape(grid)
    small = Image.fromarray((255 * alpha / alpha.max()).astype(np.uint8))
    blur = ImageFilter.GaussianBlur(max(size) / max(grid) / 3)
    weights = np.asarray(small.resize(size, Image.BICUBIC).filter(blur), dtype=np.float32)
    return weights / weights.max()


def drawable(word):
    """The word in ASCII, which is what Pillow's font has: cafe for café, \\u72d7 for a sign."""
    letters = unicodedata.normalize('NFKD', word.replace('\u2019', "'"))  # é: e and an accent
    letters = ''.join(x for x in letters if not unicodedata.combining(x))
    return letters.encode('ascii', 'backslashreplace').decode()


def draw_attention(image, words, alphas=None, betas=None, grid=None, columns=6):
    """One picture for a caption: the image, then for each word the image under its attention.

    image: PIL picture; words: T strings; alphas (>= T rows: <end> has one too) and betas, the
    gates, of a Hypothesis, None without attention; grid: (rows, columns) of the L locations.
    """
    height = math.ceil(PANEL * image.height / image.width)
    image = image.resize((PANEL, height), Image.BICUBIC)
    words = [drawable(word) for word in words]
    if alphas is None:
        panels = [(image, ' '.join(words), '')]
    else:
        panels = [(image, '', '')]
        pixels = np.asarray(image, dtype=np.float32)
        dark, bright = 0.22 * pixels, 0.7 * pixels + 0.3 * 255
        for word, alpha, beta in zip(words, alphas, betas):
            m = attention_map(alpha, grid, image.size)[:, :, None]
            look = Image.fromarray((dark + m * (bright - dark)).astype(np.uint8))
            panels.append((look, word, f'beta {beta:.2f}'))
    width, height = PANEL + GAP, height + LABEL + GAP  # of a panel with all around it
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new('RGB', (columns * width + GAP, rows * height + GAP), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (panel, word, beta) in enumerate(panels):
        row, column = divmod(i, columns)
        x, y = GAP + column * width, GAP + row * height + LABEL
        font = SMALL if beta and len(word) > 15 else LARGE  # room for beta
        draw.text((x, y - 6), word, 'black', font, anchor='ls')
        draw.text((x + PANEL, y - 6), beta, 'grey', SMALL, anchor='rs')
        sheet.paste(panel, (x, y))
    return sheet


def images_in(path):
    """A file, or the images of a folder and its folders; says how many other files are there."""
    if not path.is_dir():
        return [path]
    files = list_files(path)
    images = [x for x in files if is_image(x)]
    others = f'{len(files) - len(images)} files that Pillow does not know (convert HEIC to JPEG)'
    if not images:
        raise UserError(f'the folder {path} has no images, and {others}')
    if len(images) < len(files):
        print(f'left out of {path}: {others}', file=sys.stderr)
    return images


def parse_arguments():
    parser = argparse.ArgumentParser(description='Caption images and draw where the model looked.',
                                     usage='sample.py IMAGE [IMAGE ..] [--checkpoint RUN ..]')

    add = parser.add_argument
    add('images', nargs='+', type=as_path, help='image files, or folders of images')
    add('--checkpoint', default=PRETRAINED / 'soft.pt',
        help='trained model: a file, or a folder such as runs/NAME [pretrained/soft.pt]')
    add('--explain', action='store_true', help='say how each word came about (not with --json)')
    add('--top', type=int, default=1, help='captions for each image, at most beam [1]')
    add('--beam', type=int, help='beam size [as in training]')
    add('--hard-decode', choices=('argmax', 'expected'), help='hard attention [as in training]')
    add('--out', help='folder for the pictures [beside each image]')
    add('--json', action='store_true', help="print COCO's results file instead of text")
    add('--device', default='', help='cpu, cuda or mps [the best there is]')
    args = parser.parse_args()
    if args.top < 1 or args.beam is not None and args.beam < 1:
        parser.error('--top and --beam must be at least 1')
    return args


def explain(captioner, a, best, vocabulary, encoder):
    """Print the shapes along the way for one image's a (1, L, D), then how each word was chosen."""
    # The words that were found go through the model once more, for their p.
    captions = torch.tensor([[START, *best.tokens]], device=a.device)  # (1, T+1)
    logits = captioner(a, captions).logits[0]  # (T, V)
    keys, _, (h, _) = captioner.start(a)
    shapes = f'picture {(3, encoder.image_size, encoder.image_size)}'
    for name, x in ('a', a[0]), ('keys', keys[0]), ('h', h[0]), ('logits', logits):
        shapes += f', {name} {tuple(x.shape)}'
    print(f'  {shapes}')
    cells = '' if best.alphas is None else 'beta  weight at row,column from 0'
    print(f'  word         p     {cells:34}  p of the likeliest words')
    for t, token in enumerate(best.tokens):
        p = logits[t].softmax(dim=0)  # (V,)
        p[[PAD, START, UNK]] = 0  # which beam search never says
        if best.alphas is not None:
            cells = f'{best.betas[t]:.2f}'
            for i in (-best.alphas[t]).argsort()[:3]:
                row, column = divmod(i, encoder.grid[1])
                cells += f'  {best.alphas[t, i]:.2f} {row},{column}'
        words = ''
        for i in p.topk(3).indices:
            words += f'{p[i]:.2f} {vocabulary.all[i]:8}  '
        print(f'  {vocabulary.all[token]:11}  {p[token]:.2f}  {cells:34}  {words}'[:100].rstrip())


def save_picture(path, picture, best, vocabulary, grid):
    """Draw where the model looked for the words of the Hypothesis `best`, or a UserError."""
    words = vocabulary.decode(best.tokens)
    sheet = draw_attention(open_image(path), words, best.alphas, best.betas, grid)
    with in_one_line(f'cannot write {picture}', 'name another folder with --out'):
        picture.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(picture, compress_level=1)  # fast, a tenth more bytes


@torch.no_grad()
def main():
    args = parse_arguments()
    checkpoint, device = checkpoint_in(args.checkpoint), pick_device(args.device)
    captioner, encoder, vocabulary, settings = load_checkpoint(checkpoint, device)
    if args.hard_decode:
        captioner.config.hard_decode = args.hard_decode
    beam = args.beam or settings['beam']
    print(f'model: {checkpoint} (--checkpoint names another)', file=sys.stderr)
    paths = [path for place in args.images for path in images_in(place)]
    results, pictures, failed = [], {}, False
    pool = ThreadPoolExecutor()  # it draws pictures while the next batch is captioned
    for i in range(0, len(paths), 25):
        batch, pixels = [], []
        for path in paths[i:i + 25]:
            try:
                pixels.append(load_image(path, encoder.image_size))
                batch.append(path)
            except UserError as error:
                print(f'error: {error}', file=sys.stderr)
                failed = True
        if not batch:
            continue
        a = encoder(torch.from_numpy(np.stack(pixels)))  # (B, L, D)
        found = captioner.beam_search(a, beam, settings['max_len'], settings['length_penalty'])
        for path, features, hypotheses in zip(batch, a, found):
            for h in hypotheses[:args.top]:
                caption = ' '.join(vocabulary.decode(h.tokens))
                results.append({'image_id': result_name(path), 'caption': caption,
                                'log_prob': h.log_prob})
                if not args.json:
                    print(f'{path}: {caption}' + (f'  ({h.log_prob:.2f})' if args.top > 1 else ''))
            best = hypotheses[0]
            if args.explain and not args.json:
                explain(captioner, features.unsqueeze(0), best, vocabulary, encoder)
            picture = Path(args.out or path.parent) / f'{path.stem}.attention.png'
            while picture in pictures:  # photo.jpg and photo.png, or with --out of two folders
                picture = picture.with_name(f'_{picture.name}')
            pictures[picture] = pool.submit(save_picture, path, picture, best, vocabulary,
                                            encoder.grid)
    for drawn in pictures.values():
        try:
            drawn.result()
        except UserError as error:
            print(f'error: {error}', file=sys.stderr)
            failed = True
    if args.json:
        print(json.dumps(results, indent=1))
    if failed:
        sys.exit(2)


if __name__ == '__main__':
    run_command(main)
