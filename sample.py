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

from data import START, UserError, as_path, is_image, list_files, load_image, open_image
from data import result_name, run_command, write_whole
from model import PRETRAINED, checkpoint_in, load_checkpoint, pick_device

PANEL, LABEL, GAP = 224, 32, 6  # pixels: width of a panel, height of its label, space between
COLUMNS = 6  # panels in a row
LARGE, SMALL = ImageFont.load_default(20), ImageFont.load_default(13)  # Pillow's own font


def draw_look(image, alpha, grid):
    """Where the model looked -> a picture, and the share of it that holds half of the weight.

    The smallest region with half of the weights alpha (L,) has a yellow line around it and keeps
    the image's colours; elsewhere the picture is dim and grey.
    """
    pixels = np.float32(image)  # (height, width, 3)
    cells = Image.fromarray(np.float32(alpha).reshape(grid))
    w = np.asarray(cells.resize(image.size, Image.BICUBIC)).clip(0)  # the weight of each pixel
    smallest_first = np.sort(w, axis=None)
    sums = smallest_first.cumsum()
    half = np.searchsorted(sums, sums[-1] / 2)
    level = smallest_first[half]  # pixels from there on hold half of the weight
    grey = 0.45 * np.float32(image.convert('L'))[:, :, None]
    m = np.minimum(w / level, 1)[:, :, None] ** 2  # 1 inside of the region
    picture = grey + m * (pixels - grey)
    # The majority of 21 x 21 pixels decides what the line surrounds: no islands below a cell.
    blurred = Image.fromarray(w >= level).convert('L').filter(ImageFilter.BoxBlur(10))
    region = blurred.point(lambda value: value // 128)
    wider = region.filter(ImageFilter.MaxFilter(5))  # by two pixels
    picture[np.not_equal(region, wider)] = 255, 210, 0  # the line
    return Image.fromarray(np.uint8(picture)), 1 - half / w.size


def drawable(word):
    """The word in ASCII, which is what Pillow's font has: cafe for café, \\u72d7 for a sign."""
    letters = unicodedata.normalize('NFKD', word.replace('\u2019', "'"))  # é: e and an accent
    letters = ''.join(x for x in letters if not unicodedata.combining(x))
    return letters.encode('ascii', 'backslashreplace').decode()


def draw_attention(image, words, alphas=None, grid=None):
    """One picture for a caption: the image, then for each word where the model looked.

    image: PIL picture; words: T strings; alphas (>= T rows: <end> has one too) of a Hypothesis,
    None without attention; grid: (rows, columns) of the L locations. Beside each word stands the
    share of the picture that holds half of the weight: 50 % where attention is even.
    """
    height = math.ceil(PANEL * image.height / image.width)
    image = image.resize((PANEL, height), Image.BICUBIC)
    words = [drawable(word) for word in words]
    if alphas is None:
        panels = [(image, ' '.join(words), '')]
    else:
        panels = [(image, '', '')]
        for word, alpha in zip(words, alphas):
            look, share = draw_look(image, alpha, grid)
            panels.append((look, word, f'{share:.0%} of area'))
    right, down = PANEL + GAP, height + LABEL + GAP  # from one panel to the next
    rows = math.ceil(len(panels) / COLUMNS)
    sheet = Image.new('RGB', (COLUMNS * right + GAP, rows * down + GAP), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (panel, label, share) in enumerate(panels):
        row, column = divmod(i, COLUMNS)
        x, y = GAP + column * right, GAP + row * down + LABEL
        # A whole caption, which has no share, may be as wide as the sheet.
        font = SMALL if share and LARGE.getlength(label) > PANEL - 80 else LARGE
        draw.text((x, y - 6), label, 'black', font, anchor='ls')
        draw.text((x + PANEL, y - 6), share, 'grey', SMALL, anchor='rs')
        sheet.paste(panel, (x, y))
    return sheet


def images_in(path):
    """A file, or the images of a folder and its folders; says how many other files are there."""
    if not path.is_dir():
        return [path]
    files = list_files(path)
    images = [x for x in files if is_image(x)]
    if len(images) < len(files):
        print(f'{path}: left out {len(files) - len(images)} files that Pillow does not know '
              '(convert HEIC to JPEG)', file=sys.stderr)
    return images


def parse_arguments():
    parser = argparse.ArgumentParser(description='Caption images and draw where the model looked.')
    add = parser.add_argument
    add('images', nargs='+', type=as_path, help='image files, or folders of images')
    add('--checkpoint', default=PRETRAINED / 'soft.pt',
        help='trained model: a file, or a folder such as runs/NAME [pretrained/soft.pt]')
    add('--explain', action='store_true', help='say how each word came about')
    add('--beam', type=int, help='beam size [as in training]')
    add('--out', help='folder for the pictures [beside each image]')
    add('--json', action='store_true', help="print COCO's results file, and draw no pictures")
    add('--device', default='', help='cpu, cuda or mps [the best there is]')
    args = parser.parse_args()
    if args.beam is not None and not 1 <= args.beam <= 100:
        parser.error('--beam must be from 1 to 100')
    return args


def explain(captioner, a, best, vocabulary, encoder):
    """Print the shapes along the way for one image's a (1, L, D), then how each word was chosen."""
    captions = torch.tensor([[START, *best.tokens]], device=a.device)  # (1, T+1)
    logits = captioner(a, captions).logits[0]  # (T, V), of the words that were found
    keys, _, (h, _) = captioner.start(a)
    print(f'  picture (3, {encoder.image_size}, {encoder.image_size}), a {tuple(a[0].shape)}, '
          f'keys {tuple(keys[0].shape)}')
    print(f'  h {tuple(h[0].shape)}, logits {tuple(logits.shape)}')
    print('  word        p     beta  weight at row,column from 0       p of the likeliest words')
    for t, token in enumerate(best.tokens):
        look = ''
        if best.alphas is not None:
            look = f'{best.betas[t]:.2f}'
            for i in (-best.alphas[t]).argsort()[:3]:
                row, column = divmod(i, encoder.grid[1])
                look += f'  {best.alphas[t, i]:.2f} {row:2},{column:<2}'
        p = logits[t].softmax(dim=0)  # (V,)
        words = ''
        for i in p.topk(3).indices:
            words += f'  {p[i]:.2f} {vocabulary.all[i]}'
        print(f'  {vocabulary.all[token]:10}  {p[token]:.2f}  {look:40}{words}')


def save_picture(path, picture, best, vocabulary, grid):
    """Draw where the model looked for the words of the Hypothesis `best`, or a UserError."""
    sheet = draw_attention(open_image(path), vocabulary.decode(best.tokens), best.alphas, grid)
    with write_whole(picture, 'name another folder with --out') as file:
        sheet.save(file, 'PNG', compress_type=3)  # Z_RLE: fast, some more bytes


@torch.no_grad()
def main():
    args = parse_arguments()
    checkpoint, device = checkpoint_in(args.checkpoint), pick_device(args.device)
    captioner, encoder, vocabulary, settings = load_checkpoint(checkpoint, device)
    beam = args.beam or settings['beam']
    print(f'model: {checkpoint} (--checkpoint names another)', file=sys.stderr)
    paths = [path for place in args.images for path in images_in(place)]
    if not paths:
        raise UserError('there are no images')
    results, pictures, errors = [], {}, []
    pool = ThreadPoolExecutor()  # it draws pictures while the next batch is captioned
    for i in range(0, len(paths), 25):
        batch, pixels = [], []
        for path in paths[i:i + 25]:
            try:
                pixels.append(load_image(path, encoder.image_size))
                batch.append(path)
            except UserError as error:
                errors.append(error)
        if not batch:
            continue
        a = encoder(torch.from_numpy(np.stack(pixels)))  # (B, L, D), on the encoder's device
        found = captioner.beam_search(a, beam, settings['max_len'], settings['length_penalty'])
        for path, features, hypotheses in zip(batch, a, found):
            best = hypotheses[0]
            caption = ' '.join(vocabulary.decode(best.tokens))
            if args.json:
                results.append({'image_id': result_name(path), 'caption': caption,
                                'log_prob': best.log_prob})
                continue
            print(f'{path}: {caption}')
            if args.explain:
                explain(captioner, features.unsqueeze(0), best, vocabulary, encoder)
            picture = Path(args.out or path.parent) / f'{path.stem}.attention.png'
            while picture in pictures:  # photo.jpg and photo.png, or with --out of two folders
                picture = picture.with_name(f'_{picture.name}')
            pictures[picture] = pool.submit(save_picture, path, picture, best, vocabulary,
                                            encoder.grid)
    if args.json:
        print(json.dumps(results, indent=1))
    for drawn in pictures.values():
        try:
            drawn.result()
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserError('\nerror: '.join(map(str, errors)))  # run_command adds the first "error:"


if __name__ == '__main__':
    run_command(main)
