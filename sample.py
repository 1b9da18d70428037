"""Caption images and draw where the model looked.

    python sample.py img.jpg                      caption, and img.attention.png beside the image
    python sample.py a.jpg b.png photos/ --top 3  several images or folders, three captions each
    python sample.py img.jpg --json               the same for a program to read

The model is the newest one in runs/, or pretrained/soft.pt where there is none, unless
--checkpoint names another. The pictures are those of the paper's figures 2, 3 and 5: for each word,
the image under the attention that chose it.
"""
import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data import UserError, ahead, is_image, load_image, open_image, run_command
from model import check_beam, load_checkpoint, pick_device

PANEL, LABEL, GAP = 224, 30, 6  # pixels: width of a panel, height of its label, space between


def attention_map(alpha, grid, size):
    """Weights alpha (L,) -> array (height, width) in 0..1, smoothly upsampled from the grid.

    size is (width, height). Divided by the largest value, so that a flat map is bright all over
    and a sharp one is a spot.
    """
    alpha = np.asarray(alpha, dtype=np.float32).reshape(grid)
    small = Image.fromarray((255 * alpha / alpha.max()).astype(np.uint8))
    blur = ImageFilter.GaussianBlur(max(size) / max(grid) / 3)
    weights = np.asarray(small.resize(size, Image.BICUBIC).filter(blur), dtype=np.float32)
    return weights / weights.max()


def under_attention(image, weights):
    """PIL picture, weights (height, width) in 0..1 -> the picture, lit where the model looked."""
    pixels, m = np.asarray(image, dtype=np.float32), weights[:, :, None]
    dark, bright = 0.22 * pixels, 0.7 * pixels + 0.3 * 255
    return Image.fromarray((dark + m * (bright - dark)).clip(0, 255).astype(np.uint8))


def draw_attention(image, words, alphas=None, betas=None, grid=None, columns=6):
    """One picture for a caption: the image, then for each word the image under its attention.

    image: PIL picture; words: T strings; alphas (>= T, L) and betas (>= T,) from a Hypothesis, or
    None for a model without attention, which leaves the image and the caption; grid: (rows,
    columns) of the L locations. Each panel has its word and the gate beta (section 4.2.1).
    """
    shape = min(max(image.height / image.width, 0.5), 2)  # very long pictures are squeezed
    image = image.resize((PANEL, round(PANEL * shape)), Image.BICUBIC)
    panels = [(image, '' if words else '(no words)', '')]
    if alphas is None:
        panels = [(image, ' '.join(words), '')]
    else:
        panels += [(under_attention(image, attention_map(alpha, grid, image.size)), word,
                    f'beta {beta:.2f}') for word, alpha, beta in zip(words, alphas, betas)]
    big, small = ImageFont.load_default(20), ImageFont.load_default(13)
    across, down = min(len(panels), columns), -(-len(panels) // columns)
    width = max(across * (PANEL + GAP), round(big.getlength(panels[0][1])) + GAP) + GAP
    height = image.height + LABEL + GAP
    sheet = Image.new('RGB', (width, down * height + GAP), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (panel, word, beta) in enumerate(panels):
        x, y = GAP + i % columns * (PANEL + GAP), GAP + i // columns * height
        draw.text((x + 2, y + LABEL - 6), word, 'black', big, anchor='ls')
        draw.text((x + PANEL - 2, y + LABEL - 6), beta, 'grey', small, anchor='rs')
        sheet.paste(panel, (x, y + LABEL))
    return sheet


def newest_checkpoint():
    """The best.pt that was written last below runs/, or the model that comes with this file.

    Raises UserError where there is neither.
    """
    found = sorted(Path('runs').glob('*/best.pt'), key=lambda path: path.stat().st_mtime)
    path = found[-1] if found else Path(__file__).with_name('pretrained') / 'soft.pt'
    if not path.exists():
        raise UserError(f'there is no trained model in runs/, and no {path}: train one with '
                        '"python train.py", or name one with --checkpoint')
    return path


def image_paths(names):
    """Files and folders -> the image files, those of a folder in order of name."""
    paths = []
    for path in map(Path, names):
        if not path.is_dir():
            paths.append(path)
            continue
        inside = [p for p in path.iterdir() if is_image(p.name) and '.attention.' not in p.name]
        if not inside:
            raise UserError(f'the folder {path} has no images')
        paths += sorted(inside)
    return paths


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description='Caption images and draw where the model looked.')
    parser.add_argument('images', nargs='+', help='image files or folders of images')
    parser.add_argument('--checkpoint', help='trained model (default: the newest '
                        'runs/*/best.pt, or else pretrained/soft.pt)')
    parser.add_argument('--top', type=int, default=1, help='captions for each image, at most beam')
    parser.add_argument('--beam', type=int, help='beam size (default: as in training)')
    parser.add_argument('--length-penalty', type=float,
                        help='order captions by log p / length ** this (default: as in training)')
    parser.add_argument('--max-len', type=int, default=30, help='most words in a caption')
    parser.add_argument('--hard-decode', choices=('argmax', 'expected'),
                        help='context of hard attention (default: as in training)')
    parser.add_argument('--out', help='folder for the pictures (default: beside each image)')
    parser.add_argument('--json', action='store_true', help='print JSON instead of text')
    parser.add_argument('--batch-size', type=int, default=25, help='images captioned at once')
    parser.add_argument('--device', default='', help='cpu, cuda or mps (default: the best)')
    args = parser.parse_args()
    if min(args.top, args.max_len, args.batch_size) < 1:
        raise UserError('--top, --max-len and --batch-size must be at least 1')
    return args


def read_images(paths, size):
    """Load images -> paths and tensor (B, 3, size, size) of those that can be, other problems."""
    good, images, problems = [], [], []
    for path in paths:
        try:
            images.append(load_image(path, size))
            good.append(path)
        except UserError as error:
            problems.append(str(error))
    return good, torch.from_numpy(np.stack(images)) if images else None, problems


def picture_path(path, out, taken):
    """Where path's picture goes: in the folder `out` or beside it, under a name not yet taken."""
    picture, number = Path(out or path.parent) / f'{path.stem}.attention.png', 2
    while picture in taken:  # photo.jpg and photo.png, or images of one name in several folders
        picture, number = picture.with_name(f'{path.stem}.{number}.attention.png'), number + 1
    taken.add(picture)
    return picture


def save_picture(path, picture, *drawing):
    """Draw path's attention and save it. Raises UserError where it cannot be written."""
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        # The lightest compression: four times as fast for a tenth more bytes.
        draw_attention(open_image(path), *drawing).save(picture, compress_level=1)
    except OSError as error:
        raise UserError(f'cannot write {picture} ({error.strerror}): name a folder for the '
                        'pictures with --out') from None


def main():
    """Caption all images in batches, print as they come, and draw."""
    args = parse_arguments()
    checkpoint = args.checkpoint or newest_checkpoint()
    device = pick_device(args.device)
    captioner, encoder, vocabulary, settings = load_checkpoint(checkpoint, device, args.hard_decode)
    beam = settings['beam'] if args.beam is None else args.beam
    penalty = settings['length_penalty'] if args.length_penalty is None else args.length_penalty
    check_beam(beam, vocabulary)
    print(f'model: {checkpoint}', file=sys.stderr)
    paths, results, problems, taken = image_paths(args.images), [], [], set()
    batches = [paths[i:i + args.batch_size] for i in range(0, len(paths), args.batch_size)]
    with ThreadPoolExecutor() as pool:  # pictures are drawn while the next images are captioned
        drawings = []
        for _, (batch, images, broken) in ahead(batches, partial(read_images,
                                                                 size=encoder.image_size)):
            problems += broken
            if not batch:
                continue
            with torch.inference_mode():
                found = captioner.beam_search(encoder(images.to(device)), beam, args.max_len,
                                              penalty)
            for path, hypotheses in zip(batch, found):
                captions = [{'caption': ' '.join(vocabulary.decode(h.tokens)),
                             'log_prob': h.log_prob} for h in hypotheses[:args.top]]
                best, picture = hypotheses[0], picture_path(path, args.out, taken)
                results.append({'image': str(path), 'captions': captions, 'picture': str(picture)})
                drawings.append(pool.submit(save_picture, path, picture,
                                            vocabulary.decode(best.tokens), best.alphas,
                                            best.betas, encoder.grid))
                for c in captions:
                    log_prob = f"  ({c['log_prob']:.2f})" if args.top > 1 else ''
                    if not args.json:
                        print(f"{path}: {c['caption']}{log_prob}")
    for result, drawing in zip(results, drawings):
        try:
            drawing.result()
        except UserError as error:
            problems.append(str(error))
            del result['picture']
    if args.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    if problems:
        raise UserError('\nerror: '.join(problems))


if __name__ == '__main__':
    run_command(main)
