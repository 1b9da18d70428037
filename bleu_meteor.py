"""Scores for captions: BLEU-1..4 written out by hand, METEOR through NLTK.

    python bleu_meteor.py results.json references.json

The results have one caption for each image; `sample.py --json` and COCO's tools write them so:
    [{"image_id": .., "caption": ".."}, ..]
The references are of that form too, or of one of these:
    {"annotations": [{"image_id": .., "caption": ".."}, ..], ..}    COCO's
    {"image": ["caption", ..], ..}                                  written by train.py
    {"images": [{"filename": .., "split": .., "sentences": [{"raw": ".."}, ..]}, ..]}
                                                        Karpathy's; only the test split is used
Scores are per cent and count words alone: lower case, no punctuation, split as in coco-caption.
`--punctuation` counts punctuation as words, and ends every result with " ." because references do;
the authors scored that way, and the same captions score higher there.
"""
import functools
import json
import math
import re
import unicodedata
from argparse import ArgumentParser, RawTextHelpFormatter
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import nltk

from data import UserError, as_user_error, run_command

SYMBOLS = '&%$#@+=/*'  # coco-caption counts these as words
INSIDE_WORDS = '\u058a\u2010\u2011\u066b\u066c'  # hyphens, and marks between Arabic digits


def is_word(token):
    """Whether a token counts as a word: it has a letter, a number or one of SYMBOLS."""
    return any(sign.isalnum() or sign in SYMBOLS for sign in token)


@functools.cache  # captions repeat the same few thousand chunks
def split_chunk(chunk, punctuation):
    """A lower-case chunk without spaces -> its words; "cannot" -> ['can', 'not']."""
    for sign in set(chunk) - set(INSIDE_WORDS):
        if not sign.isascii() and unicodedata.category(sign)[0] not in 'LMN':
            chunk = chunk.replace(sign, f' {sign} ')  # no letter (L), accent (M) or number (N)
    # A full stop stands alone too, as in "wet .", but not after a lone letter ("u.s.": each letter
    # is behind a space or a stop), not after a stop ("..."), not before more of the word ("1.5").
    chunk = re.sub(r'(?<![\s.][a-z])(?<!\.)\.(?=[^\w.]|$)', ' .', ' ' + chunk)
    # NLTK always splits off the last stop of a text, even that of u.s.: it gets one more stop for
    # that, which [:-1] drops.
    tokens = nltk.NLTKWordTokenizer().tokenize(chunk + ' .')[:-1]
    return [token for token in tokens if punctuation or is_word(token)]


def tokenize(caption, punctuation=False):
    """Caption -> list of lower-case words, as coco-caption's tokenizer (Stanford's PTBTokenizer).

    "A man's T-shirt." -> ['a', 'man', "'s", 't-shirt']. With punctuation=True marks are words too.
    Unlike coco-caption it drops brackets (there "-lrb-") and the dot of "mr.".
    """
    words = []
    for chunk in caption.lower().replace('\u2019', "'").split():
        words += split_chunk(chunk, punctuation)
    return words


def ngrams(words, n):
    """How often each n-gram occurs in a list of words."""
    return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))


def bleu(references, hypotheses, brevity_penalty=True):
    """Corpus BLEU (Papineni et al., 2002) -> [BLEU-1, .., BLEU-4] in per cent.

        p_n = sum over captions of clipped n-gram matches / sum of n-grams
        BLEU-N = BP * (p_1 * .. * p_N) ** (1 / N),  BP = min(1, exp(1 - r / c))

    references: for each image a list of token lists; hypotheses: for each image a token list. c is
    the length of all hypotheses, r that of the references closest to each (of two the shorter). As
    in coco-caption, tiny constants keep p above 0. ValueError where an image lacks its captions.
    """
    matches, totals = [0] * 4, [0] * 4  # of n-grams, n = 1 .. 4
    c = r = 0
    for refs, hypothesis in zip(references, hypotheses, strict=True):
        c += len(hypothesis)
        lengths = [len(ref) for ref in refs]
        r += min(lengths, key=lambda length: (abs(length - len(hypothesis)), length))
        for n in 1, 2, 3, 4:
            most = Counter()  # the largest count of each n-gram in any one reference
            for ref in refs:
                most |= ngrams(ref, n)  # | takes the larger of two counts
            clipped = ngrams(hypothesis, n) & most  # & the smaller
            matches[n - 1] += sum(clipped.values())
            totals[n - 1] += max(len(hypothesis) - n + 1, 0)
    p = [(match + 1e-15) / (total + 1e-9) for match, total in zip(matches, totals)]
    BP = 1
    if brevity_penalty:
        ratio = (c + 1e-15) / (r + 1e-9)
        BP = min(1, math.exp(1 - 1 / ratio))
    return [100 * BP * math.prod(p[:N]) ** (1 / N) for N in (1, 2, 3, 4)]


@functools.cache
def get_wordnet():
    """Whether NLTK can read WordNet; where it is missing it is fetched."""
    for is_fetched in False, True:  # before and after fetching
        try:
            nltk.corpus.wordnet.synsets('dog')  # NLTK opens its files only now
            return True
        except Exception as error:  # NLTK has no one error for that
            reason = str(error.__context__ or error)  # its loader fails twice: the first tells why
        if not is_fetched:
            print('METEOR needs WordNet: fetching it (10 MB)')
            with suppress(Exception):  # whatever keeps a network or a disk from it
                nltk.download('wordnet', quiet=True)
    reason = reason.strip('\n *').split('\n')[0]  # NLTK puts it between lines of stars
    print(f'METEOR is left out, NLTK cannot read WordNet ({reason}): get it with "python -m '
          'nltk.downloader wordnet", or set NLTK_DATA to the folder of corpora/ (no symbolic link)')
    return False


def meteor(references, hypotheses):
    """METEOR (Denkowski and Lavie, 2014) by NLTK, in per cent, or None where WordNet is missing.

    Mean over images of the best score against any reference, with METEOR 1.5's parameters. NLTK
    lacks METEOR's paraphrases and weights of words: the two agree in scale, not in the digits.
    """
    if not get_wordnet():
        return None
    scores = [nltk.translate.meteor(refs, hypothesis, alpha=0.85, beta=0.2, gamma=0.6)
              for refs, hypothesis in zip(references, hypotheses)]
    return 100 * math.fsum(scores) / len(scores)  # fsum: the same in any order of images


def score(references, hypotheses):
    """The paper's columns: [B1, B2, B3, B4, METEOR], BLEU without brevity penalty."""
    return bleu(references, hypotheses, brevity_penalty=False) + [meteor(references, hypotheses)]


# ------------------------------------------------------------------------------- results in a file
def caption_rows(content):
    """What a JSON file of one of the forms above holds -> (image, caption), one after the other."""
    if isinstance(content, dict) and 'annotations' in content:
        content = content['annotations']
    if isinstance(content, list):
        for row in content:
            yield row['image_id'], row['caption']
    elif 'images' in content:
        for image in content['images']:
            if image['split'] == 'test':
                for sentence in image['sentences']:
                    yield image.get('cocoid', image['filename']), sentence['raw']
    else:
        for image, captions in content.items():
            if isinstance(captions, str):
                captions = [captions]
            for caption in captions:
                yield image, caption


def read_captions(path):
    """A JSON file of one of the forms above -> {image: captions}, or a UserError."""
    captions = defaultdict(list)
    with as_user_error(f'{path} cannot be read', 'captions are [{"image_id": .., "caption": ..}, '
                       '..] or the like: -h says what the files hold'):
        content = json.loads(Path(path).read_bytes())  # it tells UTF-8 from UTF-16 by itself
        for image, caption in caption_rows(content):
            captions[str(image)].append(caption.strip())  # some files have numbers, some text
        if not captions:
            raise ValueError('it has no captions')
    return captions


def main():
    """Score a results file against its references, without and with brevity penalty."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument('results')
    parser.add_argument('references')
    parser.add_argument('--punctuation', action='store_true', help='count punctuation as words')
    args = parser.parse_args()
    results, references = read_captions(args.results), read_captions(args.references)
    unpaired = references.keys() ^ results.keys()
    if unpaired:
        raise UserError(f'{len(unpaired)} images, such as {min(unpaired)}, are in only one of '
                        f'{args.results} ({len(results)}) and {args.references} '
                        f'({len(references)}): score the same images')
    hypotheses, targets = [], []
    for image, captions in results.items():
        if len(captions) > 1:
            raise UserError(f'image {image} has more than one caption in the results: keep one')
        caption = captions[0]
        if args.punctuation:
            caption = caption.rstrip(' .') + ' .'
        hypotheses.append(tokenize(caption, args.punctuation))
        targets.append([tokenize(text, args.punctuation) for text in references[image]])
    print(f'{len(results)} images; with punctuation: {args.punctuation}')
    for label, penalty in (('BLEU-1 .. 4', False), ('with brevity penalty', True)):
        print(f'{label:24}' + ' '.join(f'{x:6.2f}' for x in bleu(targets, hypotheses, penalty)))
    if get_wordnet():
        print(f'METEOR by NLTK          {meteor(targets, hypotheses):6.2f}')


if __name__ == '__main__':
    run_command(main)
