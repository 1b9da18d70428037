"""Images and their captions: data sets, downloads, vocabulary, batches, the feature cache.

    shapes         drawn here from a seed; needs no file and knows where objects are
    anything else  pictures and captions in --data-dir/NAME, in any layout that `load_captions`
                   knows; flickr8k and coco are downloaded where that folder is empty

Paper sections 4.3 and 5.1. Nothing here knows of models: an encoder is a function of images.
"""
import csv
import ctypes
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFile, ImageOps, PngImagePlugin

PAD, START, END, UNK = range(4)  # word ids that every vocabulary has
# Let Pillow's PNG reader, and no other, ignore damaged metadata; damaged pixels stay an error.
PngImagePlugin.ImageFile = SimpleNamespace(**vars(ImageFile) | {'LOAD_TRUNCATED_IMAGES': True})


class UserError(Exception):
    """Something that the user can put right; its text says what is wrong and what to do."""


# ------------------------------------------------------------ images, captions, vocabulary, batches
# A drawn object of the shapes set; box is (left, top, right, bottom) in 0..1 of the image.
Object = namedtuple('Object', 'shape colour size box')
# An image: a path, or the pixels (rows, columns, 3) of a drawn one; its captions; the objects in a
# drawn one; and its name in a results file, which is its file's name or COCO's number.
Example = namedtuple('Example', 'image captions objects name', defaults=((), ''))


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


def length_batches(lengths, batch_size, rng):
    """Shuffled batches of captions of one length, paper section 4.3: no padding and no masks.

    lengths: (N,) words of each caption; rng: numpy Generator. Returns index arrays.
    """
    order = rng.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind='stable')]
    edges = np.flatnonzero(np.diff(lengths[order])) + 1
    batches = [part[i:i + batch_size] for part in np.split(order, edges)
               for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def to_device(tensor, device):
    """The tensor on the device. A GPU fetches it from pinned memory while the CPU goes on."""
    if device.type == 'cuda':
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)  # elsewhere a copy that does not wait may read what is overwritten


def read_rows(array, index, device):
    """Rows of an array, or of a tensor on the device, as a tensor there; index: integers (N,)."""
    if isinstance(array, torch.Tensor):
        return array[to_device(torch.from_numpy(index), device)]
    return to_device(torch.from_numpy(array[index]), device)


# -------------------------------------------------------------------------------- images and arrays
def is_image(path):
    """Whether Pillow opens files of such an ending, in any case of letters, by its own list."""
    return Image.registered_extensions().get(Path(path).suffix.lower()) in Image.OPEN


def to_rgb(image):
    """Grey, palette, CMYK and 16-bit pictures become RGB, transparent ones are laid on white."""
    if image.mode.startswith('I') or image.mode == 'F':  # 16 or 32 bits of grey
        pixels = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith('I') else max(pixels.max(), 1e-9)
        image = Image.fromarray((pixels * (255 / top)).clip(0, 255).astype(np.uint8))
    elif image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def open_image(source):
    """Path, file or pixels (rows, columns, 3) -> upright RGB picture, or a UserError."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    try:
        with Image.open(source) as image:
            with suppress(Exception):  # how the camera was held is kept, if that can be read
                image.getexif()
            image.info.pop('exif', None)  # what else is there may be broken
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # whatever a broken file makes of Pillow's many readers
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'{source} cannot be read ({reason}): replace it (a HEIC file by a JPEG), '
                        'or leave it out (in training --skip-bad does)') from None


def broken_images(paths):
    """Open each image -> what is wrong with those that cannot be opened, {path: text}."""
    with ThreadPoolExecutor() as pool:
        opened = {path: pool.submit(lambda x: open_image(x).size, path) for path in paths}
    return {path: str(x.exception()) for path, x in opened.items() if x.exception()}


def load_image(source, size):
    """Path or pixels -> uint8 array (3, size, size): the whole image, squeezed into a square."""
    image = open_image(source).resize((size, size), Image.BICUBIC)
    return np.array(image).transpose(2, 0, 1)


def image_batches(sources, size, batch_size=32):
    """Yield uint8 tensors (B, 3, size, size), in order, read by several threads."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(sources), batch_size):
            pixels = pool.map(lambda s: load_image(s, size), sources[i:i + batch_size])
            yield torch.from_numpy(np.stack(list(pixels)))


def cache_arrays(examples, size, cache_dir, label, encode=None):
    """The examples' images as one array (N, ..) in the order of `examples`.

    encode maps image tensors (B, 3, size, size) to features (B, ..), which are kept as float16 in a
    memory-mapped file in cache_dir; with None the pixels are kept, those of drawn images in memory.
    The file's name ends in a digest of `label` (which encoder), the size, and the images' names,
    bytes and times. Raises UserError for images that cannot be read, before any is encoded, a full
    disk, and features that float16 cannot hold.
    """
    sources = [example.image for example in examples]
    drawn = isinstance(sources[0], np.ndarray)
    if encode is None and drawn:
        return np.concatenate([batch.numpy() for batch in image_batches(sources, size)])
    known = [hashlib.md5(x).hexdigest() if drawn else
             (x.name, x.stat().st_size, x.stat().st_mtime_ns) for x in sources]
    digest = hashlib.sha256(json.dumps([label, size, known]).encode()).hexdigest()[:12]
    path = Path(cache_dir) / f'{label}-{size}-{digest}.npy'
    with suppress(FileNotFoundError, ValueError, EOFError):  # it is not there, or not all of it
        return np.load(path, mmap_mode='r')
    first = torch.zeros(min(32, len(sources)), 3, size, size, dtype=torch.uint8)
    if encode:  # may fail (an exported CNN may not take 32 images), and tells shape and type
        first = encode(first).half().cpu()
    if not drawn and (broken := broken_images(sources)):  # before hours of computing
        raise UserError(f'{next(iter(broken.values()))} (one of {len(broken)})')
    path.parent.mkdir(parents=True, exist_ok=True)
    need = len(sources) * first[0].nbytes
    if need > shutil.disk_usage(path.parent).free:
        raise UserError(f'{path} takes {need / 1e9:.1f} GB: make room, or set --cache-dir')
    print(f'computing {path} for {len(sources)} images')
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as unfinished:
        array = np.lib.format.open_memmap(f'{unfinished}/part', 'w+', first.numpy().dtype,
                                          (len(sources), *first[0].shape))
        for i, images in zip(range(0, len(sources), 32), image_batches(sources, size, 32)):
            rows = images if encode is None else encode(images).half().cpu()
            if not rows.isfinite().all():
                raise UserError(f'{label} has features beyond float16: set another --encoder')
            array[i:i + 32] = rows.numpy()
            if sys.stdout.isatty():
                print(f'{i}/{len(sources)} ', end='\r', flush=True)
        os.replace(f'{unfinished}/part', path)
    return np.load(path, mmap_mode='r')


# ------------------------------------------------------------------------ shapes, drawn from a seed
SHAPES = {'circle': ('circle', 'disc'), 'square': ('square', 'box'), 'triangle': ('triangle',),
          'star': ('star',), 'cross': ('cross', 'plus'), 'diamond': ('diamond', 'rhombus')}
COLOURS = {'red': (215, 40, 40), 'orange': (245, 140, 30), 'yellow': (245, 225, 60),
           'green': (45, 155, 65), 'blue': (45, 85, 215), 'purple': (140, 50, 170),
           'black': (20, 20, 20), 'white': (250, 250, 250)}
SIZES = {'small': ('small', 'little', 'tiny'), 'large': ('large', 'big', 'huge')}
RADIUS = {'small': (0.10, 0.12), 'large': (0.16, 0.20)}  # of the image's side
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
PLACES = (('in the top left corner', 'at the top', 'in the top right corner'),
          ('on the left', 'in the middle', 'on the right'),
          ('in the bottom left corner', 'at the bottom', 'in the bottom right corner'))
# What is said of one to three objects a, b and c. `place` is the last one's.
SENTENCES = (('{a} {place}', 'there is {a} {place}', '{a} {ground}', 'a picture of {a}',
              'one {again} {ground}', '{a} sits {place} {ground}'),
             ('{a} {where} {b}', '{a} {where} {b}', '{a} is {where} {b}',
              'there is {a} {where} {b}', '{a} sits {where} {b}', '{a} and {b} {ground}'),
             ('{a} {where} {b} and {c} {place}', '{a} is {where} {b} with {c} {place}',
              'there is {a} {where} {b} and {c}', '{a} and {b} and {c} {ground}'))


def draw_scene(rng, unseen, side=64):
    """A scene with one of UNSEEN_PAIRS or with none -> pixels (side, side, 3), objects, ground."""
    ground = rng.choice(('plain', 'striped', 'shaded', 'speckled'))
    base = np.array([rng.randint(125, 185)] * 3) + [rng.randint(-20, 20) for _ in range(3)]
    y, x = np.mgrid[0:side, 0:side] / side
    shade = {'plain': 0 * x, 'shaded': 50 * (x + y - 1) * rng.choice((-1, 1)),
             'striped': 14 * np.sign(np.sin(2 * np.pi * rng.randint(5, 8) * rng.choice((x, y)))),
             'speckled': 28 * np.random.default_rng(rng.randrange(2 ** 32)).normal(size=x.shape)}
    pixels = (base + shade[ground][:, :, None]).clip(0, 255)  # muted, none of COLOURS
    big = 3 * side  # drawn three times as large and shrunk, for smooth edges
    picture = Image.fromarray(pixels.astype(np.uint8)).resize((big, big), Image.NEAREST)
    draw, objects = ImageDraw.Draw(picture), []
    for index in range(rng.choice((1, 2, 2, 3))):
        pair, taken = None, [(o.shape, o.colour) for o in objects]
        while pair is None or pair in taken or (pair in UNSEEN_PAIRS) != (unseen and index == 0):
            pair = rng.choice(list(SHAPES)), rng.choice(list(COLOURS))
        size = rng.choice(list(SIZES))
        for _ in range(100):  # tries; where there is no room the object is left out
            r = rng.uniform(*RADIUS[size])
            x, y = (rng.uniform(1.2 * r, 1 - 1.2 * r) for _ in 'xy')
            corners = [(x + r * u, y + r * v) for u, v in CORNERS[pair[0]]]
            box = (*map(min, zip(*corners)), *map(max, zip(*corners)))
            if all(box[0] > b[2] + 0.05 or box[1] > b[3] + 0.05 or b[0] > box[2] + 0.05
                   or b[1] > box[3] + 0.05 for *_, b in objects):  # there is room between them
                paint = draw.ellipse if pair[0] == 'circle' else draw.polygon
                paint([(big * u, big * v) for u, v in corners], fill=COLOURS[pair[1]])
                objects.append(Object(*pair, size, box))
                break
    return np.asarray(picture.resize((side, side), Image.BOX)), objects, ground


def describe(objects, ground, rng):
    """One of the captions that people could give a scene, in an order that attention can follow."""
    def phrase(o):
        words = f'{o.colour} {rng.choice(SHAPES[o.shape])}'
        return f'{rng.choice(SIZES[o.size])} {words}' if rng.random() < 0.6 else words

    order = sorted(objects, key=lambda o: (o.size, o.box[0]))  # 'large' first, then from the left
    phrases = [phrase(o) for o in order]
    words = dict(zip('abc', (f'an {x}' if x[0] in 'aeiou' else f'a {x}' for x in phrases)))
    middles = [((o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2) for o in order]
    if len(order) == 1:
        words['again'] = phrase(order[0])
    else:
        (x1, y1), (x2, y2) = middles[:2]
        if abs(x1 - x2) > abs(y1 - y2):
            ways = ('left of', 'to the left of') if x1 < x2 else ('right of', 'to the right of')
        else:
            ways = ('above', 'over') if y1 < y2 else ('below', 'under')
        words['where'] = rng.choice(ways)
    column, row = (int(3 * v) for v in middles[-1])
    return rng.choice(SENTENCES[len(order) - 1]).format(
        **words, place=PLACES[row][column], ground=f'on a {ground} background')


def make_shapes(count, seed, unseen=False):
    """`count` Examples of the shapes set, five different captions each; the same for each seed."""
    examples = []
    for index in range(count):
        rng = random.Random(f'{seed} {index}')
        pixels, objects, ground = draw_scene(rng, unseen)
        captions = {}
        while len(captions) < 5:
            captions[describe(objects, ground, rng)] = True
        examples.append(Example(pixels, list(captions), tuple(objects), f'{seed}-{index}'))
    return examples


def pointing(words, alphas, objects, grid):
    """Whether attention lies on what a caption names -> (hits, object words).

    An object word is a shape noun; it is hit when the centre of the grid cell with the largest
    alpha lies in the box of an object of that shape, and of that colour where the word before is
    one. words: list; alphas: (at least len(words), L); grid: (rows, columns).
    """
    hits, nouns = 0, [t for t, word in enumerate(words) if word in NOUNS]
    for t in nouns:
        colour = words[t - 1] if t and words[t - 1] in COLOURS else None
        row, column = divmod(int(alphas[t].argmax()), grid[1])
        x, y = (column + 0.5) / grid[1], (row + 0.5) / grid[0]
        hits += any(o.shape == NOUNS[words[t]] and colour in (None, o.colour)
                    and o.box[0] <= x <= o.box[2] and o.box[1] <= y <= o.box[3] for o in objects)
    return hits, len(nouns)


# -------------------------------------------------------------------------------- data sets on disk
GITHUB = 'https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/'
COCO = 'http://images.cocodataset.org/zips/'
# Karpathy's splits of all three sets, with their captions: what papers compare on.
KARPATHY = ('https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip', 'sha256',
            '4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817')
# What an empty folder of that name is filled with: what it is, address, kind of checksum, checksum.
DOWNLOADS = {
    'flickr8k': [
        ('images', GITHUB + 'Flickr8k_Dataset.zip', 'md5', 'f18a1e2920de5bd84dae7cf08ec78978'),
        ('captions', GITHUB + 'Flickr8k_text.zip', 'md5', 'bf6c1abcb8e4a833b7f922104de18627')],
    'coco': [
        ('images', COCO + 'train2014.zip', 'md5', '0da8c0bd3d6becc4dcb32757491aca88'),
        ('images', COCO + 'val2014.zip', 'md5', 'a3d79f5ed8d289b7a7554ce06a5782b3'),
        ('captions', *KARPATHY)]}
SPLITS = {'train': 'train', 'restval': 'train', 'val': 'val', 'dev': 'val', 'valid': 'val',
          'validation': 'val', 'test': 'test'}
SPLIT_LIST = r'(?:.*[^a-z])?(train|val|dev|test)(?:images)?\.txt'  # Flickr_8k.trainImages.txt
# Names of caption files; those of the first kind that is there are read.
CAPTION_FILES = (r'dataset_NAME\.json', r'dataset.*\.json', r'captions_.*\.json',
                 r'flickr8k\.token\.txt|results_20130124\.token|results\.csv',
                 r'captions?([^a-z].*)?\.(txt|csv|tsv)',
                 rf'(?!readme|licen|{SPLIT_LIST}$).*\.(json|txt|.sv|token)')


def download(address, kind, checksum, folder):
    """Fetch a zip archive, check it, and unpack it into a folder of its name; or a UserError."""
    archive = folder / address.rsplit('/', 1)[1]
    unpacked = archive.with_suffix('')
    if unpacked.exists() and not archive.exists():  # all of it is there from an earlier call
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not archive.exists():
            print(f'downloading {address}')
            torch.hub.download_url_to_file(address, str(archive))
        if hashlib.new(kind, np.memmap(archive, mode='r')).hexdigest() != checksum:
            archive.unlink()
            raise OSError(f'it had the wrong {kind} sum')
        shutil.unpack_archive(archive, unpacked, 'zip')  # nothing gets out of that folder
        archive.unlink()
    except (OSError, ValueError) as error:
        raise UserError(f'cannot get {address} ({error}): try again later, or get the file in '
                        f'another way and put it into {folder}') from None


def list_files(name, folder):
    """All files below a data set's folder, links followed. An empty one is downloaded into."""
    files, seen = [], {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        real = {os.path.realpath(f'{place}/{x}'): x for x in sorted(folders)}
        folders[:] = [x for path, x in real.items() if path not in seen]
        seen.update(real)
        files += [Path(place, x) for x in sorted(names) if not x.startswith('._')]  # macOS's notes
    if files or name not in DOWNLOADS:
        return files
    home = folder.resolve()  # perhaps behind a link to a larger disk
    whole = home.with_name(f'{name}.part')  # it gets its name when all of it is there
    for _, *source in DOWNLOADS[name]:
        download(*source, whole)
    shutil.rmtree(home, ignore_errors=True)
    os.replace(whole, home)
    return list_files(name, folder)


def plain(name):
    """A file's name without its folder, case, form of Unicode and COCO's prefix: so names meet."""
    name = unicodedata.normalize('NFC', str(name).casefold()).replace('\\', '/').split('/')[-1]
    return re.sub(r'^coco_[a-z]+20\d\d_', '', name)


def read_json(path, problems):
    """Karpathy's dataset_NAME.json or COCO's annotations -> rows (plain name, caption, split)."""
    rows, captions = [], defaultdict(list)
    try:
        content = json.loads(path.read_text(encoding='utf-8-sig'))
        for entry in content.get('annotations', []):
            captions[entry['image_id']].append(entry['caption'])
        for x in content['images']:
            name, split = x.get('filename') or x['file_name'], x.get('split') or ''
            said = [y['raw'] for y in x.get('sentences', [])] or captions.pop(x.get('id'), [''])
            rows += [(plain(name), text, str(split)) for text in said]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not JSON, or not all of it, or not as Karpathy's and COCO's "
                        f'files are ({error!r:.80}): get it anew') from None
    problems += [f'{path} has captions for image {x}, which it does not list' for x in captions]
    return rows


def read_table(path, problems):
    """A text file with an image and a caption in each line -> rows (plain name, caption, split).

    Columns are separated by tab, bar, semicolon or comma; a first line without an image is a
    header. The captions are in the column with most letters; in the last one they need no quotes,
    whatever is in them. A list of images has empty captions.
    """
    def columns(line, mark, width=99):
        row = next(csv.reader([line[:99999]], delimiter=mark, skipinitialspace=True))
        last = f'{mark} '.join(row[width - 1:])
        return [field.strip() for field in row[:width - 1] + [last] * (len(row) >= width)]

    def letters(x):  # of a field's words; images, splits, numbers and addresses have none
        return 0 if is_image(x) or x.lower() in SPLITS else len(re.sub(r'\S*[\d/]\S*|\s', '', x))

    text = path.read_bytes().decode('utf-8-sig', 'replace').replace('\0', '\ufffd')
    text = re.sub(r'(?m)^(.+\.\w+)#\d+\t', r'\1\t', text)  # Flickr's own files count the captions
    text = re.sub(r'(?m)^([^|\n]+\|\s*\d+)\s\s+(?=\w)', r'\1| ', text)  # a line of Flickr30k's
    text = re.sub(r'(?m)^2258277193_586949ec62\.jpg\.1\t.*', '', text)  # Flickr8k has no such image
    lines = {n: line for n, line in enumerate(re.split('\r\n?|\n', text), 1) if line.strip()}
    head = list(lines.values())[:1000] or ['']
    mark = max('\t|;,', key=lambda x: sum(max(  # the mark that cuts the most off image names
        (len(line) - len(y) for y in columns(line, x) if is_image(y)), default=0) for line in head))
    some = [columns(line, mark) for line in head]
    titled = not any(map(is_image, some[0])) and len(some[0]) > 1
    width = len(some[0]) if titled else min((  # letterless columns and a caption, perhaps cut up
        min(len(row), 1 + sum(not letters(x) for x in row)) for row in some
        if len(row) > 1 and any(map(is_image, row))), default=1)
    some = [row for row in some[titled:] if len(row) == width] or [
        row for line in head[titled:] if len(row := columns(line, mark, width)) == width]
    image = max(range(width), key=lambda c: sum(is_image(row[c]) for row in some))
    caption = max(range(width), key=lambda c: (c != image, sum(letters(x[c]) for x in some)))
    split = [c for c in {*range(width)} - {image} if all(row[c].lower() in SPLITS for row in some)]
    rows = []
    for number, line in list(lines.items())[titled:]:
        row = columns(line, mark, width if caption == width - 1 else 99)
        if len(row) != width or not is_image(row[image]) or '\ufffd' in line:
            problems.append(f'{path}, line {number}: not an image and its caption: {line!r:.60}')
        else:
            rows.append((plain(row[image]), row[caption] if caption != image else '',
                         ''.join(row[c] for c in split[:1])))
    return rows


def caption_files(name, files):
    """The caption files of a data set -> {path: split, or '' for all of them}, or a UserError."""
    for pattern in CAPTION_FILES:
        pattern = pattern.replace('NAME', re.escape(name.lower()))
        found = {path: re.search('(?<![a-z])(train|val|dev|test)|$', path.name.lower())[0]
                 for path in files if re.fullmatch(pattern, path.name.lower())}
        if len(found) > max(1, len({*found.values()} - {''})):
            raise UserError(f'{" and ".join(map(str, found))} have captions: keep one of them')
        if found:
            return found
    raise UserError('there is no file of captions beside the images: write captions.txt, with a '
                    'line "image,caption" and then lines such as "a.jpg,A dog runs."')


def divide(said, splits, files, problems):
    """Captions' {split: plain names}, '' for no split -> the same without '', and how it was done.

    Lists such as train.txt decide, or else a draw. What is in two splits stays in the later alone.
    """
    lists = {SPLITS[m[1]]: path for path in files
             if (m := re.fullmatch(SPLIT_LIST, path.name.lower()))}
    how = 'that of the captions'
    if '' in said and 'train' in lists:
        how = f'that of {lists["train"].name} and the like'
        said = {split: [row[0] for row in read_table(lists[split], problems)] for split in lists}
    for split, other in (('train', 'val'), ('train', 'test'), ('val', 'test')):
        twice = set(said.get(split, ())) & set(said.get(other, ()))
        if twice and {split, other} <= set(splits):
            problems.append(f'{len(twice)} images of {split} are also in {other}: {min(twice)}, ..')
            said[split] = [name for name in said[split] if name not in twice]
    if '' in said:
        how = 'drawn from a seed, so scores cannot be compared with published ones'
        names = sorted(set().union(*said.values()))
        names = random.Random(0).sample(names, len(names))
        held = min(1000, -(-len(names) // 8))
        said = {'val': names[:held], 'test': names[held:2 * held] or names,
                'train': names[2 * held:] or names}  # one or two images are in all of them
    elif 'test' not in said and 'val' in said:  # COCO's test images have no published captions
        how += ', val divided by name, so scores cannot be compared with published ones'
        names = sorted(said['val'])
        held = min(5000, -(-len(names) // 2))
        said |= {'val': names[:held], 'test': names[held:2 * held]}
    return said, how


def load_captions(name, root='data', skip_bad=False, splits=('train', 'val', 'test', 'unseen')):
    """A data set's {'train': [..], 'val': [..], 'test': [..]} of Example, those of `splits` alone.

    name: shapes (which alone has 'unseen', a second test split), or a folder in `root`. A split of
    which no image is there is left out. A UserError says what is wrong first; with skip_bad lines,
    captions and images that are bad, and training images of other splits, are left out instead.
    """
    if name == 'shapes':
        sizes = {'train': 7000, 'val': 200, 'test': 400, 'unseen': 400}
        return {x: make_shapes(sizes[x], x, x == 'unseen') for x in splits}
    folder, problems, on_disk = Path(root) / name, [], {}
    files = list_files(name, folder)
    for path in filter(is_image, files):
        if (twin := on_disk.setdefault(plain(path), path)) != path:
            raise UserError(f'{twin} and {path} have the same name: keep one of them in {folder}')
    if not on_disk:
        raise UserError(f'{folder} has no images: put them there')
    captions, said, paths = defaultdict(list), defaultdict(dict), caption_files(name, files)
    for path, part in paths.items():
        read = read_json if path.suffix.lower() == '.json' else read_table
        for image, text, split in read(path, problems):
            captions[image].append(text)
            said[SPLITS.get((split or part).lower(), split)][image] = True  # a set in order
    said, how = divide(said, splits, files, problems)
    print(f'{name}: captions of {", ".join(map(str, paths))}; split: {how}')
    found = {x: [] for x in splits  # without one that has no image here, unless it was drawn
             if x in said and (how.startswith('drawn') or on_disk.keys() & set(said[x]))}
    for split in found:
        for image in said[split]:
            path = on_disk.get(image)
            good = [text for text in captions[image] if isinstance(text, str) and text.strip()]
            if not path:
                problems.append(f'there are captions for {image}, which is not in {folder}')
            elif len(good) < max(1, len(captions[image])):
                problems.append(f'{path} has no caption, or an empty one')
            if path and good:
                coco = re.fullmatch(r'(\d{12})\.jpg', image)  # COCO calls its images by number
                found[split].append(Example(path, good, (), int(coco[1]) if coco else path.name))
    if skip_bad:
        broken = broken_images([x.image for part in found.values() for x in part])
        problems += broken.values()
        found = {split: [x for x in found[split] if x.image not in broken] for split in found}
    if problems and not skip_bad:
        raise UserError(f'{problems[0]}: put it right, or leave out what is bad with --skip-bad')
    if problems:
        print(f'left out {len(problems)} bad captions and images, such as: {problems[0]}')
    if not any(found.values()):
        raise UserError(f'{folder} has no image of {", ".join(splits[:3])} with a caption')
    return {split: part for split, part in found.items() if part}


# -------------------------------------------------------------------------------- for every command
def keep_memory():
    """Keep the memory of freed arrays for the next ones: new pages cost a fault for every 4 kB."""
    if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):  # glibc has it
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
    except (UserError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        known = getattr(error, 'filename', None) and error.strerror
        print(f'error: {error.filename}: {known}' if known else f'error: {error}', file=sys.stderr)
        sys.exit(2)
