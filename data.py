"""Images and their captions: vocabulary, batches, images, feature cache, and the data sets.

    shapes         drawn here from a seed; needs no file and knows where objects are
    anything else  pictures and captions in --data-dir/NAME, as `load_captions` reads them;
                   flickr8k and coco are downloaded where that folder is empty

Paper sections 4.3 and 5.1. Nothing here knows of models: an encoder is a function of images.
"""
import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import sys
import textwrap
import time
import unicodedata
import warnings
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

PAD, START, END, UNK = range(4)  # word ids that every vocabulary has
Image.MAX_IMAGE_PIXELS = 500_000_000  # a phone's picture may have 200 million


class UserError(Exception):
    """Something that the user can put right; its text says what is wrong and what to do."""


@contextmanager
def as_user_error(problem, remedy):
    """Any error inside becomes a UserError: the problem, the error's words cut short, a remedy."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # a GPU's own errors would be explained wrongly
    except Exception as error:
        words = textwrap.shorten(f'{type(error).__name__}: {error}', 120)
        raise UserError(f'{problem} ({words}): {remedy}') from None


def as_path(text):
    """A path that may have been written on Windows."""
    return Path(str(text).replace('\\', '/'))


@contextmanager
def write_whole(path, remedy):
    """A file to write bytes to; it gets the name `path` when it is whole.

    Where the disk or the folder refuses, nothing stays behind, and a UserError gives the remedy.
    """
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, 'wb') as file:
            yield file
        for seconds in 0.1, 0.5, 2:  # Windows refuses while another program holds the file
            with suppress(PermissionError):
                return os.replace(part, path)
            time.sleep(seconds)
        os.replace(part, path)  # the last try, whose error counts
    except OSError as error:
        raise UserError(f'cannot write {path} ({error.strerror}): {remedy}') from None
    finally:
        with suppress(OSError):
            part.unlink()


# ------------------------------------------------------------------------------ words and batches
# A drawn object: cell is 0 to 8 in the 3 x 3 grid; box is (left, top, right, bottom) of the circle
# around it, in 0..1 of the image.
Object = namedtuple('Object', 'shape colour size cell box')
# An image: a path, or the pixels (rows, columns, 3) of a drawn one; its captions; the objects in a
# drawn one; and its name in a results file.
Example = namedtuple('Example', 'image captions objects name')


class Vocabulary:
    """Words and their ids: <pad> 0, <start> 1, <end> 2, <unk> 3, then `words` by frequency."""

    def __init__(self, words):
        self.words = list(words)
        self.all = ['<pad>', '<start>', '<end>', '<unk>'] + self.words
        self.ids = {word: i for i, word in enumerate(self.all)}

    @classmethod
    def build(cls, captions, max_size=10000, min_count=1):
        """The most frequent words of `captions` (lists of words), seen at least min_count times."""
        counts = Counter()
        for caption in captions:
            counts.update(caption)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([word for word in ranked if counts[word] >= min_count][:max_size])

    def __len__(self):
        return len(self.all)

    def encode(self, words):
        """List of words -> list of ids; unknown words become <unk>."""
        return [self.ids.get(word, UNK) for word in words]

    def decode(self, ids):
        """Ids -> list of words; <pad>, <start> and <end> are left out."""
        return [self.all[i] for i in ids if i not in (PAD, START, END)]


def length_batches(lengths, batch_size, rng):
    """Shuffled batches of captions of one length, paper section 4.3: no padding and no masks.

    lengths: (N,) of the captions; rng: numpy Generator. Returns index arrays.
    """
    order = rng.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind='stable')]  # by length, shuffled within each
    edges = np.flatnonzero(np.diff(lengths[order])) + 1  # where the length changes
    batches = []
    for part in np.split(order, edges):  # the captions of one length
        for i in range(0, len(part), batch_size):
            batches.append(part[i:i + batch_size])
    return [batches[i] for i in rng.permutation(len(batches))]


# -------------------------------------------------------------------------------- images and arrays
def is_image(path):
    """Whether Pillow can read files with this ending, in upper or lower case."""
    return Image.registered_extensions().get(Path(path).suffix.lower()) in Image.OPEN


def open_image(source):
    """Path, file or pixels (rows, columns, 3) -> upright RGB picture, or a UserError."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    with as_user_error(f'{source} cannot be read', 'check its name, make a JPEG of it (of HEIC, 16 '
                       'bits of grey, a huge one), or leave it out (in training --skip-bad does)'):
        with Image.open(source) as image:
            image.load()
            with suppress(Exception):  # the camera's notes, which say what is up, may be broken
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in 'IF':  # I, I;16, F
                raise ValueError('16 or 32 bits of grey, whose range is not known')
            if image.has_transparency_data:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')


def load_image(source, size):
    """Path or pixels -> uint8 array (3, size, size): the whole image, squeezed into a square."""
    image = open_image(source).resize((size, size), Image.BICUBIC)
    return np.array(image).transpose(2, 0, 1)


def image_batches(sources, size, encode=None):
    """Yield uint8 tensors (B, 3, size, size), in order, or what encode makes of them as float16."""
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(sources), 32):
            pixels = pool.map(lambda source: load_image(source, size), sources[i:i + 32])
            batch = torch.from_numpy(np.stack(list(pixels)))
            if encode:
                batch = encode(batch).half().cpu()
            if not batch.isfinite().all():
                raise UserError('the encoder has features beyond float16: set another --encoder')
            yield batch.contiguous()


def cache_images(examples, size, cache_dir, label, encode=None):
    """The examples' images as one tensor (N, ..) in the order of `examples`.

    encode maps image tensors (B, 3, size, size) to features (B, ..), which become float16; with
    None the pixels are kept. For photographs they lie in a memory-mapped file in cache_dir. Its
    name ends in a digest of `label` (which encoder), the size, and the images' names, bytes and
    times. Raises UserError for images that cannot be read, before any is encoded, and for features
    that float16 cannot hold.
    """
    sources = [example.image for example in examples]
    if isinstance(sources[0], np.ndarray):  # drawn ones are few
        return torch.cat(list(image_batches(sources, size, encode)))
    known = [label, size, encode is None]
    for path in sources:
        known += [path.name, path.stat().st_size, path.stat().st_mtime_ns]
    digest = hashlib.sha256(str(known).encode()).hexdigest()[:12]
    cache = as_path(cache_dir) / f'{label}-{size}-{digest}.npy'
    if not cache.exists():
        print(f'computing {cache} for {len(sources)} images')
        for _ in image_batches(sources, size):  # a broken image is found before hours of computing
            pass
        with write_whole(cache, 'name another folder with --cache-dir') as file:
            for batch in image_batches(sources, size, encode):
                rows = batch.numpy()
                if file.tell() == 0:  # an .npy file begins with the shape of the whole array
                    header = np.lib.format.header_data_from_array_1_0(rows)
                    header['shape'] = len(sources), *rows.shape[1:]
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(rows)  # np.save would need all of them in memory
    with as_user_error(f'{cache} cannot be read', 'delete it, and it is computed anew'):
        return torch.from_numpy(np.load(cache, mmap_mode='c'))  # torch warns of mode 'r'


# ------------------------------------------------------------------------ shapes, drawn from a seed
# A shape is a regular polygon of so many sides, turned by so many degrees.
SHAPES = {'circle': (60, 0), 'square': (4, 0), 'triangle': (3, 0), 'diamond': (4, 45)}
COLOURS = 'red pink yellow green blue purple black white'.split()
RADIUS = {'small': 0.1, 'large': 0.16}  # of the image's side
# Red circles and the like are never drawn for training: does the model combine what it knows?
UNSEEN_PAIRS = list(zip(SHAPES, COLOURS))  # one for each shape
SEEN_PAIRS = [(shape, colour) for shape in SHAPES for colour in COLOURS
              if (shape, colour) not in UNSEEN_PAIRS]
PLACES = ('in the top left corner', 'at the top', 'in the top right corner',
          'on the left', 'in the middle', 'on the right',
          'in the bottom left corner', 'at the bottom', 'in the bottom right corner')


def draw_scene(rng, unseen, side=64):
    """One to three objects in different cells of a 3 x 3 grid -> pixels (side, side, 3), objects.

    With `unseen` the first is one of UNSEEN_PAIRS; all others are of SEEN_PAIRS.
    """
    big = 3 * side  # drawn three times as large and shrunk, for smooth edges
    grey = rng.randint(125, 185)
    picture = Image.new('RGB', (big, big), (grey, grey, grey))
    draw, objects = ImageDraw.Draw(picture), []
    for cell in rng.sample(range(9), rng.choice((1, 2, 2, 3))):
        shape, colour = rng.choice(UNSEEN_PAIRS if unseen and not objects else SEEN_PAIRS)
        size = rng.choice(list(RADIUS))
        row, column = divmod(cell, 3)
        x, y, r = (column + 0.5) / 3, (row + 0.5) / 3, RADIUS[size]
        circle = big * x, big * y, big * r  # around the polygon
        draw.regular_polygon(circle, *SHAPES[shape], fill=colour)
        objects.append(Object(shape, colour, size, cell, (x - r, y - r, x + r, y + r)))
    return np.array(picture.resize((side, side), Image.BOX)), objects


def describe(objects, rng):
    """One of the captions that people could give a scene: large objects first, then row by row."""
    objects = sorted(objects, key=lambda o: (-RADIUS[o.size], o.cell))
    phrases = []
    for o in objects:
        phrase = f'{o.colour} {o.shape}'
        if rng.random() < 0.6:
            phrase = f'{o.size} {phrase}'
        phrases.append(f'a {phrase}')
    place = PLACES[objects[-1].cell]
    if len(objects) == 1:
        return rng.choice(('{} {}', '{} is {}', 'there is {} {}')).format(phrases[0], place)
    first, second = objects[0].cell, objects[1].cell
    if first // 3 == second // 3:  # in one row
        where = 'left of' if first < second else 'right of'
    else:
        where = rng.choice(('above', 'over') if first < second else ('below', 'under'))
    caption = phrases[0] + rng.choice((' ', ' is ')) + f'{where} {phrases[1]}'
    if len(objects) == 3:
        caption += f' and {phrases[2]} {place}'
    return caption


def make_shapes(count, seed, unseen=False):
    """`count` Examples of the shapes set, five different captions each; seed: a split's name."""
    examples = []
    for index in range(count):
        rng = random.Random(f'{seed} {index}')
        pixels, objects = draw_scene(rng, unseen)
        captions = {}  # a set that keeps its order
        while len(captions) < 5:
            captions[describe(objects, rng)] = True
        examples.append(Example(pixels, list(captions), tuple(objects), f'{seed}-{index}'))
    return examples


def pointing(words, alphas, objects, grid):
    """For each shape that a caption names: whether attention lies on it.

    It does if the centre of the grid cell with the largest alpha lies in the box of an object of
    that shape and of the colour that is the word before.
    words: list; alphas: (at least len(words), L); grid: (rows, columns).
    """
    hits = []
    for t, word in enumerate(words):
        if word not in SHAPES:
            continue
        row, column = divmod(int(alphas[t].argmax()), grid[1])
        x, y = (column + 0.5) / grid[1], (row + 0.5) / grid[0]
        hits.append(False)
        for o in objects:
            left, top, right, bottom = o.box
            inside = left <= x <= right and top <= y <= bottom
            if inside and words[t - 1:t + 1] == [o.colour, o.shape]:
                hits[-1] = True
    return hits


# -------------------------------------------------------------------------------- data sets on disk
GITHUB = 'https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/'
COCO = 'http://images.cocodataset.org/zips/'
# Karpathy's splits of Flickr8k, Flickr30k and COCO, with their captions: what papers compare on.
KARPATHY = ('https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip', 'sha256',
            '4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817')
# What an empty folder of that name is filled with: what it is, address, kind of checksum, checksum.
# Captions come first: if they cannot be had, nobody waits for gigabytes of images.
DOWNLOADS = {
    'flickr8k': [
        ('captions', GITHUB + 'Flickr8k_text.zip', 'md5', 'bf6c1abcb8e4a833b7f922104de18627'),
        ('images', GITHUB + 'Flickr8k_Dataset.zip', 'md5', 'f18a1e2920de5bd84dae7cf08ec78978')],
    'coco': [
        ('captions', *KARPATHY),
        ('images', COCO + 'train2014.zip', 'md5', '0da8c0bd3d6becc4dcb32757491aca88'),
        ('images', COCO + 'val2014.zip', 'md5', 'a3d79f5ed8d289b7a7554ce06a5782b3')]}
SPLITS = {'train': 'train', 'restval': 'train', 'val': 'val', 'dev': 'val', 'valid': 'val',
          'validation': 'val', 'test': 'test'}
# The name of a list of images, such as train.txt or Flickr_8k.trainImages.txt, in small letters;
# SPLIT stands for a word of SPLITS.
SPLIT_LIST = r'(.*[^a-z])?SPLIT(images)?\.txt'
# Patterns of the names of caption files: the first that fits any file is used.
CAPTION_FILES = ('dataset_NAME.json', 'dataset_*.json', 'captions_*.json', 'flickr8k.token.txt',
                 'results_20130124.token', 'results.csv', 'captions.txt', 'captions.csv',
                 'captions.tsv')
# Hidden files, what systems leave in folders, and sample.py's pictures.
LEFT_BEHIND = re.compile(r'[.@$~].*|thumbs\.db|desktop\.ini|lost\+found|.*\.attention\..*', re.I)


def download(name, folder):
    """Fill a folder of a known name with what an earlier call has not fetched, or a UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    for what, address, kind, checksum in DOWNLOADS[name]:
        archive = folder / address.rsplit('/', 1)[1]
        unpacked = Path(f'{archive}-unpacked')
        if unpacked.exists() and not archive.exists():  # complete: the archive is deleted last
            continue
        with as_user_error(f'cannot get {address}', 'try again later, or get the file in another '
                           f'way and put it into {folder}'):
            if not archive.exists():
                print(f'downloading {what}: {address}')
                torch.hub.download_url_to_file(address, str(archive))
            with open(archive, 'rb') as file:
                digest = hashlib.file_digest(file, kind).hexdigest()
            if digest != checksum:
                raise ValueError(f'delete {archive.name}, its {kind} sum is wrong')
            shutil.unpack_archive(archive, unpacked, 'zip')  # no file can escape from there
            archive.unlink()


def list_files(folder):
    """All files below a folder, links followed, but for what systems and programs leave behind."""
    def refuse(error):  # a folder that may not be read is not an empty one
        raise error

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not LEFT_BEHIND.fullmatch(name)]
        files += [Path(place, name) for name in names if not LEFT_BEHIND.fullmatch(name)]
    return sorted(files)


def plain(name):
    """An image's name without folder, upper case and COCO's prefix, in one form of Unicode.

    Names in caption files and on disk are compared in this form.
    """
    name = unicodedata.normalize('NFC', str(name).casefold()).replace('\\', '/').split('/')[-1]
    return re.sub(r'^coco_[a-z]+20\d\d_', '', name)


def result_name(path):
    """An image's name in a results file: its file's name, or COCO's number."""
    number = re.fullmatch(r'(\d{12})\.jpg', plain(path))
    return int(number[1]) if number else path.name


def read_text(path):
    """The text of a file in UTF-8, or a UserError."""
    with as_user_error(f'{path} cannot be read', 'save it in UTF-8 (in Excel as "CSV UTF-8", '
                       'in PowerShell with "-Encoding utf8")'):
        return path.read_text('utf-8-sig')


def read_json(path):
    """Karpathy's dataset_NAME.json or COCO's annotations -> rows (plain name, caption, split)."""
    rows, names = [], {}
    with as_user_error(f"{path} is not whole, or not as Karpathy's and COCO's files are",
                       'get it anew, or move it away and write a captions.txt'):
        content = json.loads(read_text(path))
        for image in content['images']:
            name = plain(image.get('filename') or image['file_name'])
            names[image.get('id')] = name
            for sentence in image.get('sentences', []):  # Karpathy's
                rows.append((name, sentence['raw'], SPLITS[image['split']]))
        for annotation in content.get('annotations', []):  # COCO's
            rows.append((names[annotation['image_id']], annotation['caption'], ''))
    return rows


MARK = r'\s*[\t,;|]\s*'
FORM = ('an image with its ending (.jpg or another that Pillow reads), a mark (tab, comma, '
        'semicolon or bar), and its caption in one column, such as "a.jpg,A dog runs."')


def read_row(line):
    """A line of a table -> an image and its caption, or None if the line is not of that FORM."""
    row = re.fullmatch(rf'"?([^"\t,;|]+?)"?(#\d+)?{MARK}(.+)', line)  # a.jpg, or Flickr's a.jpg#0
    if not row or not is_image(row[1]):
        return None
    image, caption = row[1], row[3]
    # The caption's number may have a column: "0|A dog". But in "1,000 birds" and "2, 3 or 4 dogs"
    # it belongs to the caption: a digit follows the comma. (After *+ that cannot be a blank.)
    number = re.match(r'\d+\s*([\t;|]\s*|,\s*+(?!\d))', caption)
    if number:
        caption = caption[number.end():]
    if re.fullmatch(r'"([^"]|"")*"', caption):
        caption = caption[1:-1].replace('""', '"')
    elif '\t' in caption or re.match(r'"([^"]|"")*"\s*[,;|]', caption):  # more columns
        return None
    if re.match(r'[\[({]\s*["\']', caption):  # a list of captions: "['A dog', ..]"
        return None
    return image, caption


def read_table(path, problems):
    """A text file with an image and its caption in each line -> rows (plain name, caption, split).

    A first line without an image is a header. What is wrong with other lines goes to `problems`.
    """
    rows = []
    lines = read_text(path).split('\n')
    columns = re.split(MARK, lines[0])
    if '.' not in columns[0]:  # a header; Flickr30k's has three columns, and comment_number is one
        if len(columns) != 2 and 'comment_number' not in columns:
            raise UserError(f'{path} has the columns {lines[0]!r:.80}: each line should be {FORM}')
        lines[0] = ''
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith('2258277193_586949ec62.jpg.1#'):
            continue  # Flickr8k has captions of that image, and no such image
        row = read_row(line.strip())
        if row:
            rows.append((plain(row[0]), row[1], ''))
        else:
            problems.append(f'{path}, line {number}, is {line!r:.60}: it should be {FORM}')
    return rows


def read_captions(folder, files, problems):
    """All captions -> {plain name: captions}, {plain name: split} where the files say it."""
    paths, captions, split_of = [], defaultdict(list), {}
    for pattern in CAPTION_FILES:
        pattern = pattern.replace('NAME', folder.name).lower()
        paths = paths or [path for path in files if fnmatch(path.name.lower(), pattern)]
    if not paths:
        raise UserError(f'{folder} has no captions.txt, .csv or .tsv: put images there, and a '
                        f'table of such a name, with {FORM} in each line')
    print(f'{folder.name}: captions from {", ".join(map(str, paths)):.300}')
    # Files for training first: an image's split is what the last file says.
    paths.sort(key=lambda path: 'train' not in path.name.lower())
    for path in paths:
        named = re.search('_(train|val|dev|test)', path.name.lower())  # captions_train2014.json
        rows = read_json(path) if path.suffix == '.json' else read_table(path, problems)
        for image, caption, split in rows:
            if not isinstance(caption, str) or not caption.strip():
                problems.append(f'{path} has an empty caption of {image:.80}')
                continue
            captions[image].append(caption)
            if split or named:
                split_of[image] = split or SPLITS[named[1]]
    return captions, split_of


def read_lists(files, captions, problems):
    """Lists of images, such as train.txt -> {plain name: split}; a later split's list wins."""
    split_of, moved = {}, 0
    for word, split in SPLITS.items():
        for path in files:
            if not re.fullmatch(SPLIT_LIST.replace('SPLIT', word), path.name.lower()):
                continue
            for line in read_text(path).split('\n'):
                name = plain(line.strip())
                if name in captions:
                    if split_of.get(name, split) != split:  # it is in an earlier split's list too
                        moved += 1
                    split_of[name] = split
                elif name:
                    problems.append(f'{path} lists {name:.80}, which has no caption')
    if moved:
        print(f'{moved} images are also in the list of a later split: they stay in that one alone')
    return split_of


def draw_missing(split_of):
    """Move a tenth of the training images to val, and to test, where the files have none.

    A hash of an image's own name decides, so adding pictures never moves one out of training.
    """
    for split in 'val', 'test':
        names = [name for name in split_of if split_of[name] == 'train']
        if split in split_of.values() or not names:
            continue
        print(f'{split} is drawn from train: scores cannot be compared with published ones')
        digests = {}
        for name in names:
            text = f'{split} {name}'.encode(errors='replace')
            digests[name] = hashlib.md5(text).hexdigest()
        first = min(names, key=digests.get)  # one at least
        for name in names:
            if name == first or digests[name] < '1a':  # the first digits: 26 of 256, a tenth
                split_of[name] = split


def data_files(name, root):
    """A data set's folder and all files in it; one of a known name without files is filled."""
    folder = as_path(name)  # a path comes first
    if not folder.is_dir():
        folder = as_path(root) / name
    files = list_files(folder) if folder.exists() else []
    archives = tuple(address.rsplit('/', 1)[1] for _, address, *_ in DOWNLOADS.get(name, ()))
    # Files that are neither archives nor what `download` unpacked from them:
    own = [path for path in files if not str(path.relative_to(folder)).startswith(archives)]
    if archives and not own:
        download(name, folder)
        files = list_files(folder)
    return folder, files


def load_captions(name, root='data', skip_bad=False, splits=('train', 'val', 'test', 'unseen')):
    """A data set's {'train': [..], 'val': [..], 'test': [..]} of Example, those of `splits` alone.

    name: shapes (which alone has 'unseen', a second test split), a path, or a folder in `root`. A
    split without images is left out. Raises UserError for the first problem; with skip_bad lines,
    captions and images that are bad are left out instead.
    """
    if name == 'shapes':
        sizes = {'train': 7000, 'val': 200, 'test': 400, 'unseen': 400}
        return {split: make_shapes(sizes[split], split, split == 'unseen') for split in splits}
    folder, files = data_files(name, root)
    on_disk, problems, found = {}, [], defaultdict(list)
    for path in filter(is_image, files):
        image = plain(path)
        if image in on_disk:
            raise UserError(f'{on_disk[image]} and {path} have the same name: keep one of them in '
                            f'{folder}')
        on_disk[image] = path
    captions, split_of = read_captions(folder, files, problems)
    split_of = split_of or read_lists(files, captions, problems)
    split_of = split_of or dict.fromkeys(captions, 'train')
    draw_missing(split_of)
    for image, split in split_of.items():
        if split not in splits:
            continue
        try:
            if image not in on_disk:
                raise UserError(f'{folder} has no image {image:.80}')
            path = on_disk[image]
            if skip_bad:  # else cache_images stops at it
                open_image(path)
            found[split].append(Example(path, captions[image], (), result_name(path)))
        except UserError as error:
            problems.append(str(error))
    if problems and not skip_bad:
        raise UserError(f'{problems[0]} (one of {len(problems)}): put it right, or leave out what '
                        'is bad with --skip-bad')
    if problems:
        print(f'left out {len(problems)} bad captions and images, such as: {problems[0]}')
    return found


# -------------------------------------------------------------------------------- for every command
def keep_memory():
    """For speed: glibc would give the memory of large arrays back to the system and ask anew."""
    if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):  # glibc has it
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no array gets pages of its own
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: 2 GB of free memory may be kept


def run_command(main):
    """Run a script's main function; what a user can put right becomes one line and status 2."""
    keep_memory()
    warnings.filterwarnings('ignore', module='PIL')  # of odd pictures that it reads all the same
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):  # a notebook's has not, and without a console it is None
            stream.reconfigure(errors='backslashreplace', line_buffering=True)
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f'\nstopped{stop}', file=sys.stderr)  # train.py adds how to go on
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        sys.stdout = open(os.devnull, 'w')
    except (UserError, OSError) as error:  # OSError: what cannot be read or written
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
