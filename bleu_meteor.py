"""Scores for captions: BLEU-1..4 written out by hand, METEOR through NLTK.

    python bleu_meteor.py results.json references.json

Both files are JSON in one of these forms, with one caption for each image in the results:
    [{"image_id": .., "caption": ".."}, ..]             COCO's; also below "annotations"
    {"image": ["caption", ..], ..}                      or {"image": "caption", ..}
    [{"image": .., "captions": [{"caption": ".."}, ..]}, ..]    sample.py --json, the best first
    {"images": [{"filename": .., "split": .., "sentences": [{"raw": ".."}, ..]}, ..]}  Karpathy's
Scores are per cent and count words alone: lower case, no punctuation, split as in coco-caption.
`--punctuation` keeps punctuation as words and gives every result its full stop; the authors' own
reference files are of that kind, and the same captions score higher there.
"""
import functools
import json
import math
import re
import unicodedata
from argparse import ArgumentParser, RawTextHelpFormatter
from collections import Counter
from ntpath import basename  # of paths with / or \

import nltk

SYMBOLS = set('&%$#@+=/*')  # coco-caption counts these as words
print_once = functools.cache(print)  # for what would else be said at every score


@functools.cache
def split_chunk(chunk, punctuation):
    """Lower-case text without spaces -> its words, as in `tokenize`: two for "cannot"."""
    for ch in set(chunk) - set('\u058a\u2010\u2011\u066b\u066c'):  # hyphens, Arabic decimal signs
        if not ch.isascii() and unicodedata.category(ch)[0] not in 'LMN':  # no letter or number
            chunk = chunk.replace(ch, f' {ch} ')  # but a mark: it stands alone
    # So does a full stop that ends a word, but not those of u.s. NLTK would split the last stop of
    # a text in any case, so a ' .' is added as the last, and dropped.
    chunk = re.sub(r'(?<![\s.][a-z])(?<!\.)\.(?=[^\w.]|$)', ' .', ' ' + chunk)
    return [w for w in nltk.NLTKWordTokenizer().tokenize(chunk + ' .')[:-1]
            if punctuation or any(ch.isalnum() or ch in SYMBOLS for ch in w)]


def tokenize(caption, punctuation=False):
    """Caption -> list of lower-case words, as coco-caption's tokenizer (Stanford's PTBTokenizer).

    "A man's T-shirt." -> a, man, 's, t-shirt. With punctuation=True the marks are words too.
    Where coco-caption keeps "-lrb-" for a bracket or the dot of "mr.", these are left out.
    """
    chunks = caption.lower().replace('\u2019', "'").split()
    return [word for chunk in chunks for word in split_chunk(chunk, punctuation)]


def ngrams(words, n):
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(references, hypotheses, brevity_penalty=True):
    """Corpus BLEU (Papineni et al., 2002) -> [BLEU-1, .., BLEU-4] in per cent.

        p_n = sum over captions of clipped n-gram matches / sum of n-grams
        BLEU-N = BP * (p_1 * .. * p_N) ** (1 / N),  BP = min(1, exp(1 - r / c))

    references: for each image a list of token lists; hypotheses: for each image a token list. c is
    the length of all hypotheses, r that of the references closest to each (of two the shorter). As
    in coco-caption, tiny constants stand for zeros. ValueError where an image lacks its captions.
    """
    if len(references) != len(hypotheses) or not all(references):
        raise ValueError('give one caption for each image, and at least one reference')
    matches, totals, c, r = [0] * 4, [0] * 4, 0, 0
    for refs, hypothesis in zip(references, hypotheses):
        c += len(hypothesis)
        r += min((abs(len(ref) - len(hypothesis)), len(ref)) for ref in refs)[1]
        for n in range(4):
            most = Counter()  # how often an n-gram occurs in the reference that has it most
            for ref in refs:
                most |= ngrams(ref, n + 1)
            matches[n] += sum((ngrams(hypothesis, n + 1) & most).values())
            totals[n] += max(len(hypothesis) - n, 0)
    p = [(match + 1e-15) / (total + 1e-9) for match, total in zip(matches, totals)]
    BP = min(1, math.exp(1 - 1 / ((c + 1e-15) / (r + 1e-9)))) if brevity_penalty else 1
    return [100 * BP * math.prod(p[:N]) ** (1 / N) for N in (1, 2, 3, 4)]


def meteor(references, hypotheses):
    """METEOR (Denkowski and Lavie, 2014) by NLTK, in per cent, or None where WordNet is missing.

    Mean over images of the best score against any reference, with METEOR 1.5's parameters. NLTK has
    neither its paraphrases nor its weights of words: the two agree in scale, not in the digits.
    """
    try:
        nltk.corpus.wordnet.synsets('dog')  # here, if at all, it fails
    except Exception as error:  # NLTK has no one error for that
        reason = re.search(r'\w.*|$', str(error.__context__ or error))[0]  # its first line of text
        print_once(f'METEOR is left out, NLTK cannot read WordNet ({reason}): get it with "python '
                   '-m nltk.downloader wordnet", or set NLTK_DATA to the folder (no link) it is in')
        return None
    scores = [nltk.translate.meteor(refs, hypothesis, alpha=0.85, beta=0.2, gamma=0.6)
              for refs, hypothesis in zip(references, hypotheses)]
    return 100 * math.fsum(scores) / len(scores)  # whatever the order of the images


def score(references, hypotheses):
    """The paper's columns: [B1, B2, B3, B4, METEOR], BLEU without brevity penalty as there."""
    return bleu(references, hypotheses, brevity_penalty=False) + [meteor(references, hypotheses)]


def human_score(references):
    """How people `score`: n-th captions against the others, mean over n; None if one is alone."""
    people = min(len(refs) for refs in references)
    if people < 2:
        return None
    rows = [score([refs[:i] + refs[i + 1:] for refs in references],
                  [refs[i] for refs in references]) for i in range(people)]
    return [None if None in column else sum(column) / people for column in zip(*rows)]


def find_captions(content, image=None):
    """JSON in any form above -> list of (image, caption). An image is its (split, name, ..)."""
    if isinstance(content, str) and image:
        return [(image, content)]
    if isinstance(content, list) and content:
        guesses = [x for x in content if image and isinstance(x, dict) and 'log_prob' in x]
        parts = [(image, part) for part in guesses[:1] or content]  # the likeliest of sample.py
    elif isinstance(content, dict) and content:
        naming = 'image_id', 'image', 'filename', 'cocoid'
        holding = 'caption', 'captions', 'raw', 'sentences', 'annotations', 'images'
        names = [str(content[key]) for key in naming if key in content]
        image = (content.get('split'), *names) if names else image
        parts = [(image, content[key]) for key in holding if key in content][:1]
        parts = parts or [((None, name), part) for name, part in content.items()]
    else:
        raise ValueError(f'{image[1] if image else "an entry"} is no image with a caption')
    return [pair for image, part in parts for pair in find_captions(part, image)]


def pair_up(results, references, args):
    """Pairs of both files -> captions, references of each, images left out. Raises ValueError."""
    by_image = {}
    for image, caption in references:
        by_image.setdefault(image, []).append(caption)
    # A result belongs to the image with exactly its name, or else to the one with its file name.
    meant = {f(name): image for f in (basename, str) for image in by_image for name in image[1:]}
    images = [meant.get(name, meant.get(basename(name))) for (_, name, *_), _ in results]
    counts, splits = Counter(images), {image[0] for image in images if image}
    strangers = [named[1] for (named, _), image in zip(results, images) if not image]
    missing = [image[1] for image in by_image if image[0] in splits and not counts[image]]
    for wrong, problem in (
            (strangers, f'of {len(results)} results have no reference'),
            ([i[1] for i in by_image if counts[i] > 1], 'images captioned twice in the results'),
            ([] if args.allow_missing else missing, f'of {len(missing) + len(counts)} images have '
             f'no caption in {args.results} (--allow-missing scores the others alone)')):
        if wrong:
            raise ValueError(f'{len(wrong)} {problem}, such as {wrong[:3]}')
    return [caption for _, caption in results], [by_image[i] for i in images], missing


def main():
    """Score a results file against its references, without and with brevity penalty."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument('results')
    parser.add_argument('references')
    parser.add_argument('--punctuation', action='store_true', help='count punctuation as words')
    parser.add_argument('--allow-missing', action='store_true', help='score what has a caption')
    args = parser.parse_args()
    pairs = []
    try:
        for path in args.results, args.references:
            with open(path, encoding='utf-8-sig') as file:
                pairs.append(find_captions(json.load(file)))
        captions, references, missing = pair_up(*pairs, args)
    except (OSError, ValueError, RecursionError) as error:
        parser.exit(2, f'error: {path}: {error}; captions are [{{"image_id": .., "caption": ".."}},'
                       ' ..] or the like: -h says what the files hold\n')
    if args.punctuation:
        captions = [caption.rstrip(' .') + ' .' for caption in captions]
    hypotheses = [tokenize(caption, args.punctuation) for caption in captions]
    references = [[tokenize(r, args.punctuation) for r in refs] for refs in references]
    print(f'{len(captions)} images, {len(missing)} left out; with punctuation: {args.punctuation}')
    for label, penalty in (('BLEU-1 .. 4', False), ('with brevity penalty', True)):
        print(f'{label:24}' + ' '.join(f'{x:6.2f}' for x in bleu(references, hypotheses, penalty)))
    if (value := meteor(references, hypotheses)) is not None:
        print(f'METEOR by NLTK          {value:6.2f}')


if __name__ == '__main__':
    main()
