"""Images and their captions: data sets, downloads, vocabulary, batches, the feature cache.

    shapes                      drawn here from a seed; needs no file and knows where objects are
    flickr8k, flickr30k, coco   read from --data-dir/NAME in any layout they are published in

Paper sections: 4.3 (batches of one length), 5.1 (data). Nothing here knows of models: an encoder
is just a function from images to arrays.
"""
import csv
import ctypes
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import sys
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

PAD, START, END, UNK = range(4)  # word ids that every vocabulary has


class UserError(Exception):
    """Something that the user can put right; its text says what is wrong and what to do."""


# --------------------------------------------------------------------- images, captions, vocabulary
class Object(NamedTuple):
    """A drawn object of the shapes set; box is (left, top, right, bottom) in 0..1 of the image."""
    shape: str
    colour: str
    size: str
    box: tuple


class Example(NamedTuple):
    """An image with its captions. image is a path, or the drawn pixels (H, W, 3) themselves."""
    image: object
    captions: list
    objects: tuple = ()  # shapes only
    name: object = ''    # what a results file calls the image: file name, or COCO's number


class Vocabulary:
    """Words and their ids: <pad> 0, <start> 1, <end> 2, <unk> 3, then `words` by frequency."""

    def __init__(self, words):
        self.words = list(words)
        self.all = ['<pad>', '<start>', '<end>', '<unk>'] + self.words
        self.ids = {word: i for i, word in enumerate(self.all)}

    @classmethod
    def build(cls, captions, max_size=10000, min_count=1):
        """The max_size most frequent words of `captions` (lists of words) seen min_count times."""
        counts = Counter(word for caption in captions for word in caption)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([word for word in ranked if counts[word] >= min_count][:max_size])

    def __len__(self):
        return len(self.all)

    def encode(self, words):
        """List of words -> list of ids; unknown words become <unk>."""
        return [self.ids.get(word, UNK) for word in words]

    def decode(self, ids):
        """Ids -> list of words; <pad>, <start> and <end> are left out."""
        return [self.all[int(i)] for i in ids if int(i) not in (PAD, START, END)]


# ------------------------------------------------------------------------------------------ batches
def length_batches(lengths, batch_size, rng):
    """Shuffled batches of captions of one length, paper section 4.3: no padding and no masks.

    lengths: (N,) words of each caption; rng: numpy Generator. Returns a list of index arrays; each
    caption is in exactly one.
    """
    order = rng.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind='stable')]
    edges = np.flatnonzero(np.diff(lengths[order])) + 1
    batches = [part[i:i + batch_size] for part in np.split(order, edges)
               for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def ahead(batches, read):
    """Yield (batch, read(batch)) for each batch; a thread reads the next one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(read, batch) for batch in batches[:1]]
        for i, batch in enumerate(batches):
            coming += [pool.submit(read, batch) for batch in batches[i + 1:i + 2]]
            yield batch, coming.pop(0).result()


def pinned(tensor, device):
    """The tensor in memory from which a GPU can fetch it while the CPU goes on."""
    return tensor.pin_memory() if device.type == 'cuda' else tensor


def read_rows(array, index, device):
    """Rows of what `cache_arrays` or `to_gpu` returns, as a tensor; index: array of integers."""
    if isinstance(array, torch.Tensor):
        return array[pinned(torch.from_numpy(index), device).to(device, non_blocking=True)]
    return pinned(torch.from_numpy(array[index]), device)


def to_gpu(array, device):
    """The array as a tensor on the GPU where that takes at most half of its free memory."""
    if device.type != 'cuda' or array.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return array
    tensor = torch.from_numpy(array[:0].copy()).new_empty(array.shape, device=device)
    for i in range(0, len(array), 1000):
        tensor[i:i + 1000] = torch.from_numpy(array[i:i + 1000].copy())
    return tensor


# -------------------------------------------------------------------------------- images and arrays
def is_image(name):
    """Whether a file's name is that of an image; `._*` are macOS's notes and no images."""
    endings = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff')
    return name.lower().endswith(endings) and not name.startswith('._')


def open_image(source):
    """Path, file or pixels (H, W, 3) -> upright RGB picture, whatever kind of image it was.

    Grey, palette, CMYK and 16-bit images become RGB, transparent ones are laid on white, and a
    camera's note of how it was held is obeyed. Raises UserError if the file is not an image.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    try:
        with Image.open(source) as image:
            if 0 in image.size:
                raise ValueError('it has no pixels')
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I') or image.mode == 'F':  # 16 or 32 bits of grey
                pixels = np.asarray(image, dtype=np.float64)
                top = 65535 if image.mode.startswith('I') else max(pixels.max(), 1e-9)
                image = Image.fromarray((pixels * (255 / top)).clip(0, 255).astype(np.uint8))
            elif image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')
    except FileNotFoundError:
        raise UserError(f'there is no image {source}') from None
    except UnidentifiedImageError:
        error = 'it is not an image that Pillow knows'
    except Image.DecompressionBombError:
        error = f'it has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels'
    except Exception as problem:  # whatever a broken file makes of Pillow's many readers
        error = getattr(problem, 'strerror', None) or problem
    raise UserError(f'{source} cannot be read ({error}): replace it or leave it out (in training '
                    '--skip-bad does)')


def broken_images(paths):
    """Open each image -> what is wrong with those that cannot be opened, {path: text}."""
    def problem(path):
        try:
            open_image(path)
        except UserError as error:
            return str(error)
    with ThreadPoolExecutor() as pool:
        return {path: text for path, text in zip(paths, pool.map(problem, paths)) if text}


def one_of(problems):
    """The first line of a list, and how many more there are."""
    return problems[0] + (f' (and {len(problems) - 1} more)' if problems[1:] else '')


def load_image(source, size):
    """Path or pixels -> uint8 array (3, size, size): the whole image, squeezed into a square."""
    image = open_image(source)
    if image.size != (size, size):
        image = image.resize((size, size), Image.BICUBIC)
    return np.array(image).transpose(2, 0, 1)


def image_batches(sources, size, batch_size=32):
    """Yield uint8 tensors (B, 3, size, size), in order, read by several threads."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(sources), batch_size):
            pixels = pool.map(lambda s: load_image(s, size), sources[i:i + batch_size])
            yield torch.from_numpy(np.stack(list(pixels)))


def npy_head(shape, dtype):
    """How a .npy file of this shape and dtype begins; its rows come next, one after the other."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {
        'descr': np.lib.format.dtype_to_descr(np.dtype(dtype)), 'fortran_order': False,
        'shape': shape})
    return head.getvalue()


def rows_in(file, head, bytes_a_row):
    """How many whole rows an open file has after this head; -1 if it begins otherwise."""
    same_head = file.read(len(head)) == head
    return (file.seek(0, os.SEEK_END) - len(head)) // bytes_a_row if same_head else -1


def cache_arrays(examples, size, cache_dir, label, encode=None, shape=None):
    """The examples' images as one array (N, ..) in the order of `examples`.

    encode maps image tensors (B, 3, size, size) to features (B, *shape), which are kept as float16
    in a memory-mapped file in cache_dir; with None the pixels (N, 3, size, size) are kept as they
    are, those of drawn images in memory. The file's name ends in a digest of `label` (which
    encoder), the size, and the images' names and bytes, so that another set's is not taken for it.
    It is called .part until it is whole; a run that is interrupted leaves that to the next one.
    """
    sources = [example.image for example in examples]
    drawn = isinstance(sources[0], np.ndarray)
    if encode is None and drawn:
        return np.concatenate([b.numpy() for b in image_batches(sources, size)])
    known = [hashlib.md5(x).hexdigest() if drawn else [x.name, x.stat().st_size] for x in sources]
    digest = hashlib.sha256(json.dumps([label, size, known]).encode()).hexdigest()[:12]
    path = Path(cache_dir) / f'{Path(label).stem}-{size}-{digest}.npy'
    dtype, row = (np.uint8, (3, size, size)) if encode is None else (np.float16, shape)
    head = npy_head((len(sources), *row), dtype)
    bytes_a_row = math.prod(row) * np.dtype(dtype).itemsize
    if path.exists():
        with open(path, 'rb') as file:
            if rows_in(file, head, bytes_a_row) == len(sources):
                return np.load(path, mmap_mode='r')
        print(f'{path} is made again: it is damaged or cut short')

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + '.part')
    write_rows(part, sources, size, encode, head, bytes_a_row)
    try:
        os.replace(part, path)
    except FileNotFoundError:  # another run, which wrote the same rows, was faster
        pass
    return np.load(path, mmap_mode='r')


def write_rows(part, sources, size, encode, head, bytes_a_row):
    """Write what `cache_arrays` returns into the file `part`, after the rows that it already has.

    Raises UserError for images that cannot be read, before the first of them is encoded, and for
    a full disk.
    """
    part.touch()
    # Open all the time: another run may be writing the same rows, and rename the file when done.
    with open(part, 'r+b') as file:
        done = rows_in(file, head, bytes_a_row)  # rows that an interrupted run has left
        need, free = (len(sources) - max(0, done)) * bytes_a_row, shutil.disk_usage(part).free
        if need > free:
            raise UserError(f'{part} needs {need / 1e9:.1f} GB more, the disk has '
                            f'{free / 1e9:.1f}: make room, or use another --cache-dir')
        try:
            if done < 0:
                done = file.seek(0)
                file.truncate()
                file.write(head)
                file.flush()
            broken = broken_images(sources[done:])  # before hours of computing
            if broken:
                raise UserError(one_of(list(broken.values())))
            print(f'computing {part.with_suffix("")} for {len(sources) - done} images')
            file.seek(len(head) + done * bytes_a_row)
            for images in image_batches(sources[done:], size):
                rows = images if encode is None else encode(images).half().cpu()
                file.write(rows.numpy().tobytes())
                done += len(rows)
                if sys.stdout.isatty():
                    print(f'\r{done}/{len(sources)} ', end='\r', flush=True)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f'cannot write {part} ({error.strerror}): make room and start again, '
                            'what is computed is kept') from None


# ------------------------------------------------------------------------ shapes, drawn from a seed
SHAPES = {'circle': ('circle', 'disc'), 'square': ('square', 'box'), 'triangle': ('triangle',),
          'star': ('star',), 'cross': ('cross', 'plus'), 'diamond': ('diamond', 'rhombus')}
COLOURS = {'red': (215, 40, 40), 'orange': (245, 140, 30), 'yellow': (245, 225, 60),
           'green': (45, 155, 65), 'blue': (45, 85, 215), 'purple': (140, 50, 170),
           'black': (20, 20, 20), 'white': (250, 250, 250)}
SIZES = {'small': ('small', 'little', 'tiny'), 'large': ('large', 'big', 'huge')}
RADIUS = {'small': (0.10, 0.12), 'large': (0.16, 0.20)}  # of the image's side
BACKGROUNDS = ('plain', 'striped', 'shaded', 'speckled')
# These pairs are never drawn for training and validation: does the model combine what it knows?
UNSEEN_PAIRS = {('circle', 'purple'), ('square', 'yellow'), ('triangle', 'blue'),
                ('star', 'black'), ('cross', 'red'), ('diamond', 'green')}
# Corners around (0, 0), y downwards; a circle's is the box around it.
CORNERS = {'circle': [(-1, -1), (1, 1)],
           'square': [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)],
           'triangle': [(0, -.95), (1, .8), (-1, .8)],
           'star': [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
                    for k, r in enumerate((1.15, .5) * 5)],
           'cross': [(-.36, -1), (.36, -1), (.36, -.36), (1, -.36), (1, .36), (.36, .36),
                     (.36, 1), (-.36, 1), (-.36, .36), (-1, .36), (-1, -.36), (-.36, -.36)],
           'diamond': [(0, -1.15), (.75, 0), (0, 1.15), (-.75, 0)]}
NOUNS = {noun: shape for shape, nouns in SHAPES.items() for noun in nouns}


def draw_background(kind, side, rng):
    """A square picture in a muted colour, none of COLOURS."""
    base = np.array([rng.randint(125, 185)] * 3) + [rng.randint(-20, 20) for _ in range(3)]
    y, x = np.mgrid[0:side, 0:side] / side
    shade = {'plain': 0 * x, 'shaded': 50 * (x + y - 1) * rng.choice((-1, 1)),
             'striped': 14 * np.sign(np.sin(2 * np.pi * rng.randint(5, 8) * rng.choice((x, y)))),
             'speckled': 28 * np.random.default_rng(rng.randrange(2 ** 32)).normal(size=x.shape)}
    pixels = base + shade[kind][:, :, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def apart(one, other, gap=0.05):
    """Whether two boxes (left, top, right, bottom) have a gap between them."""
    return (one[0] > other[2] + gap or one[2] < other[0] - gap
            or one[1] > other[3] + gap or one[3] < other[1] - gap)


def draw_scene(rng, unseen, side=64):
    """One to three objects that do not touch -> pixels (side, side, 3), objects, background.

    With `unseen` the first object is one of UNSEEN_PAIRS; without, none is.
    """
    background = rng.choice(BACKGROUNDS)
    big = 3 * side  # drawn three times as large and shrunk, for smooth edges
    picture = draw_background(background, side, rng).resize((big, big), Image.NEAREST)
    draw = ImageDraw.Draw(picture)
    objects, pairs = [], []
    for index in range(rng.choice((1, 2, 2, 3))):
        pair = None
        while pair is None or pair in pairs or (pair in UNSEEN_PAIRS) != (unseen and index == 0):
            pair = rng.choice(list(SHAPES)), rng.choice(list(COLOURS))
        size = rng.choice(list(SIZES))
        for _ in range(100):  # tries; where there is no room the object is left out
            r = rng.uniform(*RADIUS[size])
            x, y = (rng.uniform(1.2 * r, 1 - 1.2 * r) for _ in 'xy')
            corners = [(x + r * u, y + r * v) for u, v in CORNERS[pair[0]]]
            xs, ys = zip(*corners)
            box = (min(xs), min(ys), max(xs), max(ys))
            if all(apart(box, o.box) for o in objects):
                paint = draw.ellipse if pair[0] == 'circle' else draw.polygon
                paint([(big * u, big * v) for u, v in corners], fill=COLOURS[pair[1]])
                pairs.append(pair)
                objects.append(Object(*pair, size, box))
                break
    return np.asarray(picture.resize((side, side), Image.BOX)), objects, background


def centre(o):
    """Middle of an object's box (x, y)."""
    return (o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2


def place(o):
    """Where in the picture an object is, in words."""
    x, y = (int(3 * v) for v in centre(o))
    column, row = ('left', '', 'right')[x], ('top', '', 'bottom')[y]
    if column and row:
        return f'in the {row} {column} corner'
    return f'at the {row}' if row else f'on the {column}' if column else 'in the middle'


def relation(one, other, rng):
    """Where one object is from another, in words."""
    (x1, y1), (x2, y2) = centre(one), centre(other)
    if abs(x1 - x2) > abs(y1 - y2):
        return rng.choice(('left of', 'to the left of') if x1 < x2 else
                          ('right of', 'to the right of'))
    return rng.choice(('above', 'over') if y1 < y2 else ('below', 'under'))


def describe(objects, background, rng):
    """One of the many captions that a person could give to a scene.

    Large objects are named before small ones, and those of one size from left to right: as people
    do, and attention must know where to look before the word that it looks for is said.
    """
    def phrase(o):
        words = f'{o.colour} {rng.choice(SHAPES[o.shape])}'
        return f'{rng.choice(SIZES[o.size])} {words}' if rng.random() < 0.6 else words

    def article(words):
        return f'an {words}' if words[0] in 'aeiou' else f'a {words}'

    order = sorted(objects, key=lambda o: (o.size, o.box[0]))  # 'large' first, then from the left
    first, *rest = [article(phrase(o)) for o in order]
    ground = f'on a {background} background'
    if not rest:
        return rng.choice((f'{first} {place(order[0])}', f'there is {first} {place(order[0])}',
                           f'{first} {ground}', f'a picture of {first}',
                           f'one {phrase(order[0])} {ground}',
                           f'{first} sits {place(order[0])} {ground}'))
    related = f'{relation(*order[:2], rng)} {rest[0]}'
    if len(rest) == 1:
        return rng.choice((f'{first} {related}', f'{first} {related}', f'{first} is {related}',
                           f'there is {first} {related}', f'{first} sits {related}',
                           f'{first} and {rest[0]} {ground}'))
    return rng.choice((f'{first} {related} and {rest[1]} {place(order[2])}',
                       f'{first} is {related} with {rest[1]} {place(order[2])}',
                       f'there is {first} {related} and {rest[1]}',
                       f'{first} and {rest[0]} and {rest[1]} {ground}'))


def make_shapes(count, seed, unseen=False):
    """`count` Examples of the shapes set, five different captions each; the same for each seed."""
    examples = []
    for index in range(count):
        rng = random.Random(f'{seed} {index}')
        pixels, objects, background = draw_scene(rng, unseen)
        captions = []
        while len(captions) < 5:
            caption = describe(objects, background, rng)
            if caption not in captions:
                captions.append(caption)
        examples.append(Example(pixels, captions, tuple(objects), f'{seed}-{index}'))
    return examples


def pointing(words, alphas, objects, grid):
    """Whether attention lies on what a caption names -> (hits, object words).

    An object word is a shape noun; it is hit when the centre of the grid cell with the largest
    alpha lies in the box of an object of that shape, and of that colour where the word before is
    one. words: list; alphas: (at least len(words), L); grid: (rows, columns).
    """
    hits = nouns = 0
    for t, word in enumerate(words):
        if word not in NOUNS:
            continue
        nouns += 1
        colour = words[t - 1] if t and words[t - 1] in COLOURS else None
        row, column = divmod(int(alphas[t].argmax()), grid[1])
        x, y = (column + 0.5) / grid[1], (row + 0.5) / grid[0]
        hits += any(o.shape == NOUNS[word] and colour in (None, o.colour)
                    and o.box[0] <= x <= o.box[2] and o.box[1] <= y <= o.box[3] for o in objects)
    return hits, nouns


# -------------------------------------------------------------------------------- data sets on disk
GITHUB = 'https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/'
COCO = 'http://images.cocodataset.org/'
# What downloads when no file of a name like the first column is there: address, kind of sum, sum.
DOWNLOADS = {
    'flickr8k': [
        (r'.*\.jpg', GITHUB + 'Flickr8k_Dataset.zip', 'md5', 'f18a1e2920de5bd84dae7cf08ec78978'),
        (r'Flickr8k\.token\.txt|captions\.txt|dataset_flickr8k\.json',
         GITHUB + 'Flickr8k_text.zip', 'md5', 'bf6c1abcb8e4a833b7f922104de18627')],
    'flickr30k': [],  # the images ask for a form
    'coco': [
        (r'COCO_train2014_.*', COCO + 'zips/train2014.zip', 'md5',
         '0da8c0bd3d6becc4dcb32757491aca88'),
        (r'COCO_val2014_.*', COCO + 'zips/val2014.zip', 'md5', 'a3d79f5ed8d289b7a7554ce06a5782b3'),
        (r'captions_train2014\.json|dataset_coco\.json', COCO + 'annotations/annotations_'
         'trainval2014.zip', 'md5', '0a379cfc70b0e71301e0f377548639bd')]}
# Karpathy's splits of all three sets, with their captions: what papers compare on.
KARPATHY = ('https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip', 'sha256',
            '4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817')
# The caption files that a data set may come with; the first that is there is read.
CAPTION_FILES = {
    'flickr8k': ('dataset_flickr8k.json', 'Flickr8k.token.txt', 'captions.txt'),
    'flickr30k': ('dataset_flickr30k.json', 'results_20130124.token', 'results.csv'),
    'coco': ('dataset_coco.json', 'captions_train2014.json')}
NO_SUCH_IMAGE = '2258277193_586949ec62.jpg.1'  # Flickr8k has captions for it, and no picture


def file_digest(path, kind):
    """The md5 or sha256 sum of a file."""
    digest = hashlib.new(kind)
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download(address, kind, checksum, folder):
    """Fetch a zip archive with a progress bar, check it, and unpack it into `folder`.

    The file has its name only when all of it is there (until then .part), and so has the folder,
    named after the archive, that it is unpacked into. Raises UserError, with what to do by hand.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / address.rsplit('/', 1)[1]
    part, unpacked = folder / (archive.name + '.part'), folder / 'unpacking.part'
    advice = f'try again later, or get it in another way and put it into {folder}'
    fetched = not archive.exists()
    if fetched:
        print(f'downloading {address}')
        try:
            torch.hub.download_url_to_file(address, str(part))
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(f'cannot download {address} ({error}): {advice}') from None
    if file_digest(part if fetched else archive, kind) != checksum:
        part.unlink(missing_ok=True)
        raise UserError(f'{archive} has the wrong {kind} sum: delete it if it is there; {advice}')
    if fetched:
        os.replace(part, archive)
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:  # its extractall never leaves the folder
            file.extractall(unpacked)
        os.replace(unpacked, archive.with_suffix(''))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f'cannot unpack {archive}: {error}') from None
    if fetched:
        archive.unlink()


def list_files(folder):
    """All files below a folder, links followed, by name; `._*` are macOS's notes and no data."""
    return {name: Path(place, name) for place, _, names in os.walk(folder, followlinks=True)
            for name in names if not name.startswith('._') and 'unpacking.part' not in place}


def read_lists(path, *keys):
    """The lists that a JSON file holds under these keys. Raises UserError if it does not."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is not JSON, or not all of it ({error}): get it anew') from None
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in keys):
        raise UserError(f'{path} has no {" and ".join(keys)}: get it anew')
    return [content[key] for key in keys]


def read_karpathy(path, problems):
    """Karpathy's dataset_NAME.json -> {split: {image: captions}}; restval counts as train."""
    splits = {'train': {}, 'val': {}, 'test': {}}
    [images] = read_lists(path, 'images')
    for number, image in enumerate(images):
        try:
            split = 'train' if image['split'] == 'restval' else image['split']
            splits[split][image['filename']] = [s['raw'] for s in image['sentences']]
        except (KeyError, TypeError):
            problems.append(f'{path}: number {number} of its images lacks a part or has a wrong '
                            f'one: {image!s:.60}')
    return splits


def read_coco(files, problems):
    """COCO's captions_{train,val}2014.json -> {split: {image: captions}}.

    COCO publishes no test captions: the first 5,000 images of val by id are for validation (or
    half of what is there), the next 5,000 for testing. Karpathy's split, which is preferred, is
    what papers compare on.
    """
    print('There is no dataset_coco.json: the images of val2014 are divided by number, so scores '
          'cannot be compared with published ones')
    parts = {}
    for part in ('train', 'val'):
        path = files.get(f'captions_{part}2014.json')
        if path is None:
            raise UserError(f'COCO without captions_{part}2014.json: put it beside the other')
        images, annotations = read_lists(path, 'images', 'annotations')
        by_id = {}
        for entry in images + annotations:
            try:
                if 'caption' in entry:
                    by_id[int(entry['image_id'])][1].append(entry['caption'])
                else:
                    by_id[int(entry['id'])] = (str(entry['file_name']), [])
            except (KeyError, TypeError, ValueError, OverflowError):
                problems.append(f'{path}: an entry lacks a part, or its image: {entry!s:.60}')
        parts[part] = [by_id[i] for i in sorted(by_id)]
    train, val = parts['train'], parts['val']
    held = min(5000, -(-len(val) // 2))
    return {'train': dict(train), 'val': dict(val[:held]), 'test': dict(val[held:2 * held])}


def read_captions(path, problems):
    """A file with one caption a line -> {image: captions}.

    Three layouts: Flickr's `name.jpg#0<tab>caption`, Kaggle's Flickr8k `name.jpg,caption` and
    Kaggle's Flickr30k `name.jpg| 0| caption`, the last two under a line of column names.
    """
    captions, kaggle = {}, path.name in ('captions.txt', 'results.csv')
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = line.decode('utf-8-sig').strip()
            if not line or kaggle and number == 1 and line.startswith('image'):
                continue
            if path.name == 'captions.txt':
                name, caption = next(csv.reader([line]))
            elif kaggle:
                name, caption = re.split(r'\|\s*\d+\s*\|?', line, maxsplit=1)
            else:
                name, caption = line.split('\t', 1)
            if not name.strip() or not caption.strip():
                raise ValueError
            captions.setdefault(name.split('#')[0], []).append(caption.strip())
        except (ValueError, csv.Error):
            problems.append(f'{path}, line {number}: not an image and its caption: {line!s:.60}')
    captions.pop(NO_SUCH_IMAGE, None)
    return captions


def split_captions(files, captions):
    """Apply Flickr8k's split lists, or draw a split from a seed where there is none."""
    lists = {'train': 'Flickr_8k.trainImages.txt', 'val': 'Flickr_8k.devImages.txt',
             'test': 'Flickr_8k.testImages.txt'}
    if all(name in files for name in lists.values()):
        parts = {split: files[name].read_text(encoding='utf-8', errors='replace').split('\n')
                 for split, name in lists.items()}
        parts = {split: [x.strip() for x in parts[split] if x.strip()] for split in parts}
    else:
        held = min(1000, -(-len(captions) // 8))
        names = random.Random(0).sample(sorted(captions), len(captions))
        print(f'There is no list of splits: {held} images each for validation and test are drawn '
              'from a seed, so scores cannot be compared with published ones')
        parts = {'train': names[2 * held:], 'val': names[:held], 'test': names[held:2 * held]}
        if len(names) < 3:
            print('With so few images all of them are for training, validation and test')
            parts = dict.fromkeys(parts, names)
    return {split: {image: captions.get(image, []) for image in parts[split]} for split in parts}


def sound(captions, path, files, problems):
    """{image: captions} of a split -> its Examples, without missing images and empty captions.

    Each of them, and each image that is left without a caption, adds a line to `problems`.
    """
    examples = []
    for image, texts in captions.items():
        good = [text for text in texts if isinstance(text, str) and text.strip()]
        if len(good) < max(1, len(texts)):
            problems.append(f'{path}: {image} has {"an empty" if texts else "no"} caption')
        elif image not in files:
            problems.append(f'{path} has captions for {image}, which is not in the folder')
        if good and image in files:
            number = re.fullmatch(r'COCO_.*_(\d{12})\.jpg', image)  # COCO knows its images by it
            examples.append(Example(files[image], good, name=int(number[1]) if number else image))
    return examples


def data_files(name, folder):
    """The files below a data set's folder, by name; what is missing is downloaded first."""
    files = list_files(folder)
    if name == 'flickr30k' and not any(map(is_image, files)):
        raise UserError(f'{folder} has no images. Flickr30k is given out by its authors: fill in '
                        'the form at https://shannon.cs.illinois.edu/DenotationGraph/ and unpack '
                        'the images there')
    for pattern, *source in DOWNLOADS[name]:
        if not any(re.fullmatch(pattern, file) for file in files):
            download(*source, folder)
    files = list_files(folder)
    if f'dataset_{name}.json' not in files and 'Flickr_8k.trainImages.txt' not in files:
        try:
            download(*KARPATHY, folder)
        except UserError as error:  # without it a split is made, where there are captions
            print(error)
    return list_files(folder)


def load_captions(name, root='data', skip_bad=False):
    """A data set's {'train': [..], 'val': [..], 'test': [..]} of Example.

    name: shapes (which also has 'unseen', a second test split), flickr8k, flickr30k or coco;
    root: the folder that holds a folder of that name. What is missing is downloaded.
    Bad lines, captions that are empty or without their image, and images without captions are
    left out and counted with skip_bad, and so are images that cannot be read: each is opened once.
    Raises UserError for them otherwise, and where files are missing or cannot be read.
    """
    if name == 'shapes':
        return {'train': make_shapes(7000, 'train'), 'val': make_shapes(200, 'val'),
                'test': make_shapes(400, 'test'), 'unseen': make_shapes(400, 'unseen', True)}
    folder = Path(root) / name
    files = data_files(name, folder)
    path = next((files[file] for file in CAPTION_FILES[name] if file in files), None)
    if path is None:
        raise UserError(f'{folder} has none of the caption files {", ".join(CAPTION_FILES[name])}')
    problems = []  # a line each
    if path.name.startswith('dataset_'):
        splits = read_karpathy(path, problems)
    elif name == 'coco':
        splits = read_coco(files, problems)
    else:
        splits = split_captions(files, read_captions(path, problems))
    splits = {split: sound(splits[split], path, files, problems) for split in splits}
    if skip_bad:
        broken = broken_images([x.image for split in splits.values() for x in split])
        problems += broken.values()
        splits = {split: [x for x in splits[split] if x.image not in broken] for split in splits}
    if problems and not skip_bad:
        raise UserError(f'{one_of(problems)}: put it right, or leave out what is bad with '
                        '--skip-bad')
    if problems:
        print(f'left out {len(problems)} bad captions and images: {one_of(problems)}')
    for split in ('train', 'val'):
        if not splits[split]:
            raise UserError(f'{folder}: there is no image with captions for {split}')
    return {split: examples for split, examples in splits.items() if examples}


# -------------------------------------------------------------------------------- for every command
def keep_memory():
    """Let Linux programs keep the memory of arrays that are freed, for the next ones.

    By default large arrays go back to the system at once and come again as empty pages, one fault
    for every 4 kB: a CNN on a CPU can spend more time on those than on its arithmetic.
    """
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if hasattr(libc, 'mallopt'):  # glibc has it
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no array gets pages of its own
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: 2 GB of free memory may be kept


def run_command(main):
    """Run a script's main function; what a user can put right becomes one line and status 2."""
    keep_memory()
    for stream in sys.stdout, sys.stderr:  # a terminal that has not all letters shows their codes
        stream.reconfigure(errors='backslashreplace')
    try:
        main()
    except KeyboardInterrupt:
        print('\nstopped', file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f'error: {error.filename or "a file"}: {error.strerror or error}', file=sys.stderr)
        sys.exit(2)
