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
import tempfile
import textwrap
import unicodedata
import warnings
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

PAD, START, END, UNK = range(4)  # word ids that every vocabulary has
Image.MAX_IMAGE_PIXELS = 500_000_000  # a phone's picture may have 200 million


class UserError(Exception):
    """Something that the user can put right; its text says what is wrong and what to do."""


@contextmanager
def in_one_line(problem, remedy):
    """Any error inside becomes a UserError: the problem, the library's words cut short, a remedy.
    """
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


# ------------------------------------------------------------------------------ words and batches
# A drawn object: cell is 0 to 8 in the 3 x 3 grid; box is (left, top, right, bottom) of the circle
# around it, in 0..1 of the image.
Object = namedtuple('Object', 'shape colour size cell box')
# An image: a path, or the pixels (rows, columns, 3) of a drawn one; its captions; the objects in a
# drawn one; and its name in a results file.
Example = namedtuple('Example', 'image captions objects name', defaults=((), ''))


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
    with in_one_line(f'{source} cannot be read', 'check its name, convert it (HEIC, 16 bits of '
                     'grey) to a JPEG, or leave it out (in training --skip-bad does)'):
        with Image.open(source) as image:
            image.load()
            with suppress(Exception):  # the camera's notes, which say what is up, may be broken
                image.getexif()  # Pillow keeps what it has read
                image.info.pop('exif', None)  # so that it does not write broken notes anew
                image = ImageOps.exif_transpose(image)
            if image.mode[0] in 'IF':  # I, I;16, F
                raise ValueError('16 or 32 bits of grey, whose range is not known')
            if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')


def load_image(source, size):
    """Path or pixels -> uint8 array (3, size, size): the whole image, squeezed into a square."""
    image = open_image(source).resize((size, size), Image.BICUBIC)
    return np.array(image).transpose(2, 0, 1)


def progress(text):
    """Show a line that the next one replaces; on a terminal alone, not in a log file."""
    if sys.stdout.isatty():
        print(f'{text:79}', end='\r', flush=True)


def image_batches(sources, size, encode=None):
    """Yield uint8 tensors (B, 3, size, size), in order, or what encode makes of them as float16."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(sources), 32):
            progress(f'{i} of {len(sources)} images')
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
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
            part = Path(folder, 'part')
            with open(part, 'wb') as file:  # plain writes: mapped, a full disk would be a crash
                for batch in image_batches(sources, size, encode):
                    if not file.tell():  # an .npy file begins with a header; np.save needs all rows
                        header = np.lib.format.header_data_from_array_1_0(batch.numpy())
                        header['shape'] = len(sources), *batch.shape[1:]
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(batch.numpy())
            with suppress(PermissionError):  # on Windows: another run has it open already
                os.replace(part, cache)
    with in_one_line(f'{cache} cannot be read', 'delete it, and it is computed anew'):
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
            named = t and o.shape == word and o.colour == words[t - 1]
            if named and left <= x <= right and top <= y <= bottom:
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
UNFINISHED = '.unfinished-download'  # this file marks a folder until its download is complete
SPLITS = {'train': 'train', 'restval': 'train', 'val': 'val', 'dev': 'val', 'valid': 'val',
          'validation': 'val', 'test': 'test'}
SPLIT_LIST = r'(.*[^a-z])?SPLIT(images)?\.txt'  # such as train.txt, Flickr_8k.trainImages.txt
# Patterns of the names of caption files: the first that fits any file is used.
CAPTION_FILES = (r'dataset_NAME\.json', r'dataset_.*\.json', r'captions_.*\.json',
                 r'flickr8k\.token\.txt', r'results_20130124\.token', r'results\.csv',
                 r'captions\.txt', r'captions\.csv', r'captions\.tsv')
# Hidden files, what systems leave in folders, and sample.py's pictures.
LEFT_BEHIND = re.compile(r'[.@$~].*|thumbs\.db|desktop\.ini|lost\+found|.*\.attention\..*', re.I)


def download(name, folder):
    """Fill an empty folder of a known name, but for what an earlier call fetched. UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    for _, address, kind, checksum in DOWNLOADS[name]:
        archive = folder / address.rsplit('/', 1)[1]
        unpacked = archive.with_suffix('')
        if unpacked.exists() and not archive.exists():  # complete: the archive is deleted last
            continue
        with in_one_line(f'cannot get {address}', 'try again later, or get the file in another way '
                         f'and put it into {folder}'):
            if not archive.exists():
                print(f'downloading {address}')
                torch.hub.download_url_to_file(address, str(archive))
            digest = hashlib.new(kind)
            with open(archive, 'rb') as file:
                while part := file.read(2 ** 20):
                    digest.update(part)
            if digest.hexdigest() != checksum:
                archive.unlink()
                raise ValueError(f'it had the wrong {kind} sum')
            shutil.unpack_archive(archive, unpacked, 'zip')  # no file can escape from there
            archive.unlink()
    (folder / UNFINISHED).unlink()


def list_files(folder):
    """All files below a folder, links followed, but for what systems and programs leave behind."""
    def refuse(error):  # a folder that may not be read is not an empty one
        raise error

    files, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in seen:  # a link leads back to where we were
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
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
    try:
        text = path.read_text('utf-8-sig')
    except UnicodeDecodeError:
        text = '\0'
    if '\0' in text:
        raise UserError(f'{path} is not in UTF-8: save it so (in Excel as "CSV UTF-8", '
                        'in PowerShell with "-Encoding utf8")')
    return text


def read_json(path):
    """Karpathy's dataset_NAME.json or COCO's annotations -> rows (plain name, caption, split)."""
    rows, names = [], {}
    with in_one_line(f"{path} is not whole, or not as Karpathy's and COCO's files are",
                     'get it anew, or write a captions.txt instead'):
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
ROW = re.compile(rf"""\s*
    "?(?P<image>[^"\t,;|]+?)"?(\#\d+)?{MARK}   # a.jpg or, in Flickr's own files, a.jpg#0
    (\d+(\s*[\t;|]\s*|\s*,\s*(?![\s\d])        # or the number is a field, but not that of "1,000"
    | (?<=\|\s\d)\s\s+))?                    # (once in Flickr30k without its mark)
    ("(?P<quoted>([^"]|"")*)"                  # a caption in quotes ..
    | (?!"([^"]|"")*"?\s*([\t,;|]|$))          # .. or without; not one that began and does not end
      (?P<caption>.*\S))\s*""", re.X)
FORM = ('an image with its ending, a mark (tab, comma, semicolon or bar), and its caption in one '
        'column, such as "a.jpg,A dog runs."')


def read_table(path, problems):
    """A text file with an image and its caption in each line -> rows (plain name, caption, split).

    A first line without an image is a header. What is wrong with other lines goes to `problems`.
    """
    rows = []
    lines = read_text(path).split('\n')
    columns = re.split(MARK, lines[0])
    if '.' not in columns[0]:  # a header, perhaps Flickr30k's
        if len(columns) != 2 and columns[1:2] != ['comment_number']:
            raise UserError(f'{path} has the columns {lines[0]!r:.80}: each line should be {FORM}')
        lines[0] = ''
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith('2258277193_586949ec62.jpg.1#'):
            continue  # Flickr8k has captions of that image, and no such image
        row = ROW.fullmatch(line.strip())
        if row and is_image(row['image']):
            caption = row['caption'] or row['quoted'].replace('""', '"')
            is_list = re.match(r'[\[({]\s*["\']', caption)
            if not is_list:
                rows.append((plain(row['image']), caption, ''))
                continue
        problems.append(f'{path}, line {number}, is {line!r:.60}: it should be {FORM}')
    return rows


def read_captions(name, files, problems):
    """All captions -> {plain name: captions}, {plain name: split} where the files say it."""
    paths, captions, split_of = [], defaultdict(list), {}
    for pattern in CAPTION_FILES:
        pattern = pattern.replace('NAME', re.escape(name.lower()))
        paths = [x for x in files if re.fullmatch(pattern, x.name.lower())]
        if paths:
            break
    if not paths:
        others = [x.name for x in files if not is_image(x)]
        raise UserError(f'{name} has no captions.txt, .csv or .tsv, but {len(others)} other files '
                        f'{others[:1]}: name its table so, with {FORM} in each line. A list in a '
                        'cell and a text file for each image are not read')
    print(f'{name}: captions from {", ".join(map(str, paths))}')
    for path in paths:
        named = re.search('_(train|val|dev|test)', path.name.lower())  # captions_train2014.json
        rows = read_json(path) if path.suffix == '.json' else read_table(path, problems)
        for image, caption, split in rows:
            if not isinstance(caption, str) or not caption.strip():
                problems.append(f'{path} has an empty caption of {image}')
                continue
            captions[image].append(caption)
            if split or named:
                split_of[image] = split or SPLITS[named[1]]
    return captions, split_of


def read_lists(files, captions, problems):
    """Lists of images, such as train.txt -> {plain name: split}; a later split's list wins."""
    split_of, moved = {}, 0
    for split in SPLITS:
        for path in files:
            if not re.fullmatch(SPLIT_LIST.replace('SPLIT', split), path.name.lower()):
                continue
            for line in read_text(path).split('\n'):
                name = plain(line.strip())
                if name in captions:
                    if split_of.get(name, SPLITS[split]) != SPLITS[split]:
                        moved += 1
                    split_of[name] = SPLITS[split]
                elif name:
                    problems.append(f'{path} lists {name}, which has no caption')
    if moved:
        print(f'{moved} images are also in the list of a later split: they stay in that one alone')
    return split_of


def draw_missing(split_of):
    """Move a tenth of the training images to val, and to test, where the files have none.

    A hash of an image's own name decides, so adding pictures never moves one out of training.
    """
    for split in 'val', 'test':
        def place(name):  # from 0 to 1, another one in each split
            text = f'{split} {name}'.encode(errors='replace')
            return int(hashlib.md5(text).hexdigest(), 16) / 16 ** 32
        names = [name for name in split_of if split_of[name] == 'train']
        if split in split_of.values() or not names:
            continue
        print(f'{split} is drawn from train: scores cannot be compared with published ones')
        for i, name in enumerate(sorted(names, key=place)):
            if i == 0 or place(name) < 0.1:  # one at least
                split_of[name] = split


def data_files(name, root):
    """A data set's folder and all files in it; an empty one of a known name is downloaded into."""
    if as_path(name).is_dir():  # a path comes first
        folder = as_path(name)
    else:
        folder = as_path(root) / name
    files = list_files(folder) if folder.exists() else []
    archives = tuple(Path(address).stem for _, address, *_ in DOWNLOADS.get(name, ()))
    users = [path for path in files if not str(path.relative_to(folder)).startswith(archives)]
    if archives and not users and (not files or (folder / UNFINISHED).exists()):
        download(name, folder)
        files = list_files(folder)
    return folder, files


def load_captions(name, root='data', skip_bad=False, splits=('train', 'val', 'test', 'unseen')):
    """A data set's {'train': [..], 'val': [..], 'test': [..]} of Example, those of `splits` alone.

    name: shapes (which alone has 'unseen', a second test split), a path, or a folder in `root`. A
    split of which no image is there is left out. Raises UserError for the first problem; with
    skip_bad lines, captions and images that are bad are left out instead.
    """
    if name == 'shapes':
        sizes = {'train': 7000, 'val': 200, 'test': 400, 'unseen': 400}
        return {split: make_shapes(sizes[split], split, split == 'unseen') for split in splits}
    folder, files = data_files(name, root)
    on_disk, problems, found = {}, [], {}
    for path in filter(is_image, files):
        if plain(path) in on_disk:
            raise UserError(f'{on_disk[plain(path)]} and {path} have the same name: keep one of '
                            f'them in {folder}')
        on_disk[plain(path)] = path
    if not on_disk:
        raise UserError(f'{folder} has no images: put them there')
    captions, split_of = read_captions(folder.name, files, problems)
    split_of = split_of or read_lists(files, captions, problems)
    split_of = split_of or dict.fromkeys(captions, 'train')
    if len(split_of) < len(captions):
        print(f'{len(captions) - len(split_of)} images are in no split and left out')
    if captions and not on_disk.keys() & captions:
        raise UserError(f'{folder} has none of the images that have captions, such as '
                        f'{min(captions)}')
    draw_missing(split_of)
    for split in splits:
        images = [image for image in split_of if split_of[image] == split]
        if not on_disk.keys() & images:  # this machine does not have that split
            continue
        found[split] = []
        for image in images:
            try:
                if image not in on_disk:
                    raise UserError(f'{folder} has no image {image}')
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
    return {split: examples for split, examples in found.items() if examples}


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
    sys.stdout = sys.stdout or open(os.devnull, 'w')  # None under pythonw
    sys.stderr = sys.stderr or open(os.devnull, 'w')
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):  # a notebook's has not
            stream.reconfigure(errors='backslashreplace', line_buffering=True)
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f'\nstopped{stop}', file=sys.stderr)  # train.py adds how to go on
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        sys.stdout = open(os.devnull, 'w')
    except (UserError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        if isinstance(error, OSError) and error.filename:
            error = f'{error.filename}: {error.strerror}'
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
