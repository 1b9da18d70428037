"""Scores for captions: BLEU-1..4 written out by hand, METEOR through NLTK.

    python bleu_meteor.py results.json references.json

results.json is a COCO results file, [{"image_id": .., "caption": ".."}, ..]; references.json is a
COCO annotation file or simply {"image_id": ["caption", ..], ..}. All scores are per cent.

Both count words alone: lower case, without punctuation, split as coco-caption's tokenizer does.
`--punctuation` keeps punctuation as words and gives every result its full stop; the authors' own
reference files are of that kind, and the same captions score higher there.
"""
import argparse
import functools
import json
import math
import re
from collections import Counter

import nltk

SYMBOLS = set('&%$#@+=/*')  # coco-caption counts these as words
TREEBANK = nltk.NLTKWordTokenizer()


@functools.cache
def treebank(chunk):
    """The words in a chunk of letters: two in "cannot"."""
    return TREEBANK.tokenize(chunk)


def tokenize(caption, punctuation=False):
    """Caption -> list of lower-case words, as coco-caption's tokenizer (Stanford's PTBTokenizer).

    "A man's T-shirt." -> a, man, 's, t-shirt. With punctuation=True the marks are words too.
    Where coco-caption keeps "-lrb-" for a bracket or the dot of "mr.", these are left out.
    """
    caption = caption.lower().replace('\u2019', "'")
    if re.fullmatch(r'([a-z]+( , |, |-| ))*[a-z]{2,} ?\.? *', caption):  # most: the quick way
        words = [w for chunk in re.sub('([,.])', r' \1', caption).split() for w in treebank(chunk)]
    else:
        caption = re.sub(r'(\w\w)\.(?=\W|$)', r'\1 .', caption)  # full stops inside a caption
        words = TREEBANK.tokenize(caption)
        words = [w + '.' if re.fullmatch(r'(\w\.)+\w', w) else w for w in words]  # u.s. at the end
    if not punctuation:
        words = [w for w in words if any(ch.isalnum() or ch in SYMBOLS for ch in w)]
    return words


def ngrams(words, n):
    """Counter of the n-grams in a list of words."""
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(references, hypotheses, brevity_penalty=True):
    """Corpus BLEU (Papineni et al., 2002) -> [BLEU-1, .., BLEU-4] in per cent.

        p_n = sum over captions of clipped n-gram matches / sum of n-grams
        BLEU-N = BP * (p_1 * .. * p_N) ** (1 / N),  BP = min(1, exp(1 - r / c))

    references: for each image a list of token lists; hypotheses: for each image a token list.
    c is the length of all hypotheses, r that of the references closest to each in length (the
    shorter of two equally close). The paper's table has no brevity penalty. Equal to coco-caption,
    whose tiny constants keep a count of zero from being a special case.
    Raises ValueError if the two lists differ in length or an image has no reference.
    """
    if len(references) != len(hypotheses) or not all(references):
        raise ValueError(f'{len(hypotheses)} captions for {len(references)} images, each of which '
                         'must have a reference: give one caption for each image')
    matches, totals, c, r = [0] * 4, [0] * 4, 0, 0
    for refs, hypothesis in zip(references, hypotheses):
        c += len(hypothesis)
        r += min((abs(len(ref) - len(hypothesis)), len(ref)) for ref in refs)[1]
        for n in range(4):
            most = Counter()  # how often an n-gram occurs in the reference that has it most
            for ref in refs:
                most |= ngrams(ref, n + 1)
            counts = ngrams(hypothesis, n + 1)
            matches[n] += sum((counts & most).values())
            totals[n] += sum(counts.values())
    penalty = 1.0
    if brevity_penalty:
        ratio = (c + 1e-15) / (r + 1e-9)
        penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(4):
        product *= (matches[n] + 1e-15) / (totals[n] + 1e-9)
        scores.append(100 * penalty * product ** (1 / (n + 1)))
    return scores


@functools.cache
def print_once(text):
    """Print what would otherwise be said for every score."""
    print(text)


def meteor(references, hypotheses):
    """METEOR (Denkowski and Lavie, 2014) by NLTK, in per cent, or None where WordNet is missing.

    Mean over images of the best score against any reference, with the parameters of METEOR 1.5 for
    English: alpha .85, beta .2, gamma .6. NLTK matches words, stems and WordNet synonyms, all of
    weight 1; the Java program also knows paraphrases and weighs function words, so the two agree
    in scale and not in the digits. Arguments as for `bleu`.
    """
    from nltk.translate.meteor_score import meteor_score
    try:
        nltk.corpus.wordnet.ensure_loaded()  # also where no word needs it
        scores = [meteor_score(refs, hypothesis, alpha=0.85, beta=0.2, gamma=0.6)
                  for refs, hypothesis in zip(references, hypotheses)]
    except TypeError:  # what was given are no lists of words
        raise
    except Exception as error:  # no WordNet, or not all of it: NLTK has no one error for that
        print_once(f'METEOR is left out, NLTK cannot read WordNet ({type(error).__name__}): '
                   'get it with "python -m nltk.downloader wordnet", or set NLTK_DATA to a folder '
                   'that has it')
        return None
    return 100 * math.fsum(scores) / len(scores)  # whatever the order of the images


def score(references, hypotheses):
    """The paper's columns: [B1, B2, B3, B4, METEOR], BLEU without brevity penalty as there."""
    return bleu(references, hypotheses, brevity_penalty=False) + [meteor(references, hypotheses)]


def human_score(references):
    """How people score: each image's n-th caption against its others, mean over n. As `score`.

    None where an image has one caption only.
    """
    people = min(len(refs) for refs in references)
    if people < 2:
        return None
    rows = [score([refs[:i] + refs[i + 1:] for refs in references],
                  [refs[i] for refs in references]) for i in range(people)]
    return [None if None in column else sum(column) / people for column in zip(*rows)]


def read_pair(results, references):
    """Two JSON files (see the top of this file) -> captions and references, image by image."""
    with open(results, encoding='utf-8') as file:
        captions = {str(r['image_id']): str(r['caption']) for r in json.load(file)}
    with open(references, encoding='utf-8') as file:
        content = json.load(file)
    by_image = content
    if 'annotations' in content:
        by_image = {}
        for r in content['annotations']:
            by_image.setdefault(str(r['image_id']), []).append(r['caption'])
    for image, texts in by_image.items():
        if not texts or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise ValueError(f'the references of {image} are not a list of captions')
    missing = [image for image in captions if image not in by_image]
    if missing or not captions:
        raise ValueError(f'{len(missing)} of {len(captions)} results have no reference, such as '
                         f'{missing[:3]}: give two files on the same images')
    return list(captions.values()), [by_image[image] for image in captions]


def main():
    """Score a results file against its references, without and with brevity penalty."""
    parser = argparse.ArgumentParser(description='Score captions: BLEU-1..4 and METEOR.')
    parser.add_argument('results', help='COCO results file: [{"image_id": .., "caption": ..}, ..]')
    parser.add_argument('references', help='COCO annotation file, or {"image_id": [caption, ..]}')
    parser.add_argument('--punctuation', action='store_true',
                        help='count punctuation as words and end every result with a full stop')
    args = parser.parse_args()
    try:
        captions, references = read_pair(args.results, args.references)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        parser.exit(2, f'error: {error}; -h says what the files hold\n')
    if args.punctuation:
        captions = [caption.rstrip(' .') + ' .' for caption in captions]
    hypotheses = [tokenize(caption, args.punctuation) for caption in captions]
    references = [[tokenize(r, args.punctuation) for r in refs] for refs in references]
    counted = 'punctuation counts' if args.punctuation else 'words alone'
    print(f'{len(captions)} images, {counted}')
    for label, penalty in (('BLEU-1 .. 4', False), ('with brevity penalty', True)):
        print(f'{label:24}' + ' '.join(f'{x:6.2f}' for x in bleu(references, hypotheses, penalty)))
    value = meteor(references, hypotheses)
    if value is not None:
        print(f'METEOR by NLTK          {value:6.2f}')


if __name__ == '__main__':
    main()
