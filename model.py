"""The captioner of Show, Attend and Tell (Xu et al., 2015) and the CNN in front of it.

LSTMCell, RNNCell  recurrent cells written out by hand, paper eq. (1)-(3)
Encoder            image -> annotation vectors, paper section 3.1.1
Captioner          teacher-forced forward pass and batched beam search, section 3.1.2
save_checkpoint, load_checkpoint

Letters of shapes, which stand at the end of a line that changes a shape:
    B images  L locations  D features  A attention  H hidden  M embedding  V vocabulary
    T time steps  K beams  N rows: the captions or beams of all images, n consecutive for each image
Paper symbols: a annotation vectors, alpha attention weights, beta gate, z context, h and c the
LSTM's state, E word embedding, y words, s a sampled location.
"""
import hashlib
import logging
import os
import zipfile
from collections import namedtuple
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import nn

from attention import BahdanauAttention, DotAttention, hard_context, soft_context
from data import END, PAD, START, UNK, UserError, Vocabulary  # the capitals are word ids 0 to 3


class LSTMCell(nn.Module):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997), paper eq. (1)-(3).

        i, f, o, g = the four quarters of W x_t + U h_{t-1} + b
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)   forget old memory and write new
        h_t = sigmoid(o) * tanh(c_t)                        choose what to show
    """

    def __init__(self, input_dim, hidden_dim):
        super().__init__()
        self.W = nn.Linear(input_dim, 4 * hidden_dim)
        self.U = nn.Linear(hidden_dim, 4 * hidden_dim, bias=False)

    def forward(self, x, state):
        """Input x (B, input_dim), state (h, c) of (B, H) each -> the new state (h, c)."""
        return self.step(self.W(x), state)

    def step(self, Wx, state):
        """The same from W x + b (B, 4H), which a caller may compute for all words at once."""
        h, c = state
        i, f, o, g = (Wx + self.U(h)).chunk(4, dim=1)  # four of (B, H), eq. (1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # eq. (2)
        h = torch.sigmoid(o) * torch.tanh(c)  # eq. (3)
        return h, c


class RNNCell(nn.Module):
    """The plain recurrent network h_t = tanh(W x_t + U h_{t-1} + b) (Elman, 1990); c is unused."""

    def __init__(self, input_dim, hidden_dim):
        super().__init__()
        self.W = nn.Linear(input_dim, hidden_dim)
        self.U = nn.Linear(hidden_dim, hidden_dim, bias=False)

    forward = LSTMCell.forward

    def step(self, Wx, state):
        h, c = state
        return torch.tanh(Wx + self.U(h)).to(h.dtype), c  # float32, also with --amp


class Coordinates(nn.Module):
    """Appends each pixel's x and y in -1..1 as channels, so that features know where they are."""

    def forward(self, images):
        """Images (B, 3, rows, columns) -> (B, 5, rows, columns)."""
        B, _, rows, columns = images.shape
        x = torch.linspace(-1, 1, columns, device=images.device).expand(B, 1, rows, columns)
        y = torch.linspace(-1, 1, rows, device=images.device).view(rows, 1).expand_as(x)
        return torch.cat([images, x, y], dim=1)


def tiny_cnn():
    """A small CNN of stride 8 and 128 features for pictures of simple shapes, trained jointly."""
    # Kernel 4 with stride 2 centres each feature on the pixels it sees; kernel 3 would shift it.
    def block(inputs, outputs, kernel, stride):
        return [nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False),
                nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(Coordinates(), *block(5, 16, 4, 2), *block(16, 32, 4, 2),
                         *block(32, 64, 4, 2), *block(64, 128, 3, 1))


def torchvision_cnn(name, weights=None):
    """A torchvision classifier without pooling and head; vgg's without its last max pool too."""
    import torchvision  # here: it loads as slowly as torch, and only torchvision's CNNs need it
    cnn = torchvision.models.get_model(name, weights=weights)
    head = 'avgpool', 'classifier', 'fc', 'heads'
    layers = [layer for _, layer in takewhile(lambda x: x[0] not in head, cnn.named_children())]
    if isinstance(layers[-1], nn.Sequential) and isinstance(layers[-1][-1], nn.MaxPool2d):
        layers[-1] = layers[-1][:-1]  # vgg19 ends after conv5_4 and its ReLU, as in the paper
    relu = [nn.ReLU()] * name.startswith('densenet')  # which is not a layer of its own there
    return nn.Sequential(*layers, *relu)


class Encoder(nn.Module):
    """CNN that turns an image into annotation vectors a = {a_1 .. a_L}, paper section 3.1.1.

    name        'tiny', a torchvision classification CNN, or the path of a .pt2 file (torch.export)
                that maps ImageNet-normalised images to feature maps (B, D, rows, columns)
    image_size  pixels; images are squares of this side
    trainable   whether the CNN learns (None: tiny alone); a frozen one stays in evaluation mode

    .grid is (rows, columns) with rows * columns = L, .feature_dim is D, and .key names the weights
    of a frozen CNN. Raises UserError where the CNN cannot be had or gives no map.
    """

    def __init__(self, name='tiny', image_size=64, trainable=None, pretrained=True):
        super().__init__()
        self.name, self.image_size = str(name), image_size
        self.trainable = self.name == 'tiny' if trainable is None else trainable
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
        if self.name == 'tiny':
            self.cnn, self.key = tiny_cnn(), 'tiny'
        elif self.name.endswith('.pt2'):
            self.load_exported(Path(name))
        else:
            mean, std = self.load_torchvision(pretrained)
        self.cnn.requires_grad_(self.trainable)
        self.register_buffer('mean', torch.tensor(mean).view(3, 1, 1), False)  # in no checkpoint
        self.register_buffer('std', torch.tensor(std).view(3, 1, 1), False)
        self.eval()
        with torch.no_grad():  # a trial run tells D and the grid
            features = self.features(torch.zeros(2, 3, image_size, image_size))
        self.feature_dim, self.grid = features.shape[1], tuple(features.shape[2:])

    def load_exported(self, path):
        """The CNN in a .pt2 file: where it is said to be, or in pretrained/ beside this program."""
        path = path if path.exists() else Path(__file__).with_name('pretrained') / path.name
        logging.getLogger('torch.export').disabled = True  # it would print a traceback of its own
        try:
            self.key = f'{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}'
            self.cnn = torch.export.load(path).module().float()  # its weights may be float16
        except Exception as error:  # it has no error of its own for another program's file
            raise UserError(f'cannot load {self.name}: it is not there, not whole, or not of '
                            f'torch.export.save by this torch or older ({error!r:.80})') from None

    def load_torchvision(self, pretrained):
        """A CNN of torchvision -> mean and deviation of pixels that its weights were made for."""
        import torchvision
        if self.name not in torchvision.models.list_models(module=torchvision.models):
            raise UserError(f'{self.name} is no encoder: give tiny, a CNN of torchvision or a .pt2')
        self.cnn = torchvision_cnn(self.name).eval()
        with torch.no_grad():  # does it give a map? Its weights may be a large download
            self.features(torch.zeros(2, 3, self.image_size, self.image_size))
        weights = torchvision.models.get_model_weights(self.name).DEFAULT
        try:
            self.cnn = torchvision_cnn(self.name, weights) if pretrained else self.cnn
        except Exception as error:  # no network, or a download that is broken in some way
            raise UserError(f'cannot get the weights of {self.name} ({error}): download '
                            f'{weights.url} into {torch.hub.get_dir()}/checkpoints') from None
        self.key = f'{self.name}-{Path(weights.url).stem}'
        return weights.transforms().mean, weights.transforms().std

    def train(self, mode=True):
        """A frozen CNN is never put into training mode, whatever the rest does."""
        self.training = mode
        if not isinstance(self.cnn, torch.fx.GraphModule):  # an exported one refuses both modes
            self.cnn.train(mode and self.trainable)
        return self

    def features(self, images):
        """Normalised images (B, 3, ..) -> the map (B, D, rows, columns), or a UserError."""
        try:  # channels last is the faster layout for convolutions, and what flattening wants
            features = self.cnn(images.contiguous(memory_format=torch.channels_last))
            B, D, rows, columns = features.shape
        except (RuntimeError, AssertionError, AttributeError, ValueError) as error:
            raise error if isinstance(error, torch.OutOfMemoryError) else UserError(
                f'{self.name} makes no map (B, D, rows, columns) of {len(images)} images of '
                f"{self.image_size} pixels ({' '.join(str(error).split())[:200]}): export a CNN "
                'that does by torch.export.export(cnn, (torch.zeros(2, 3, 224, 224),), '
                'dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), or set --image-size') from None
        return features

    def forward(self, images):
        """Images (B, 3, ..), uint8 or float in 0..1 -> annotation vectors a (B, L, D)."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            features = self.features((images - self.mean) / self.std)
        return features.flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, L, D)


@dataclass
class CaptionerConfig:
    """What a Captioner is built from. attn_dim and score have no meaning with attn='none'."""
    vocab_size: int
    feature_dim: int
    attn: str = 'soft'            # none (Show and Tell), soft, hard
    score: str = 'additive'       # additive (Bahdanau), dot
    cell: str = 'lstm'            # lstm, rnn
    embed_dim: int = 512
    hidden_dim: int = 512
    attn_dim: int = 512
    dropout: float = 0.5          # in the output layer
    hard_decode: str = 'argmax'   # context of hard attention when captioning: argmax, expected
    input_dropout: float = 0.0    # of word embeddings E y and of the features in a


# What the teacher-forced pass returns: logits (N, T, V), alphas (N, T, L), betas (N, T) and log_p_s
# (N, T). alphas and betas are None with attn='none'; log_p_s is None unless z was one location's.
Output = namedtuple('Output', 'logits alphas betas log_p_s')
# A caption that beam search found: word ids without <start>, of which the last is <end> if it
# ended; log p(tokens | a); numpy alphas (len(tokens), L) and betas, None with attn='none'.
Hypothesis = namedtuple('Hypothesis', 'tokens log_prob alphas betas')


class Captioner(nn.Module):
    """The decoder: an LSTM that looks at the image anew for every word, section 3.1.2.

    With attn='none' it is Show and Tell (Vinyals et al., 2014), which sees the image once, first.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.E = nn.Embedding(c.vocab_size, c.embed_dim)
        nn.init.normal_(self.E.weight, std=0.1)
        self.cell = {'lstm': LSTMCell, 'rnn': RNNCell}[c.cell](c.embed_dim, c.hidden_dim)
        if c.attn == 'none':
            self.W_I = nn.Linear(c.feature_dim, c.embed_dim)  # the image as a first word
        else:
            attention = {'additive': BahdanauAttention, 'dot': DotAttention}[c.score]
            self.attention = attention(c.feature_dim, c.hidden_dim, c.attn_dim)
            self.f_init_h = nn.Linear(c.feature_dim, c.hidden_dim)
            self.f_init_c = nn.Linear(c.feature_dim, c.hidden_dim)
            self.f_beta = nn.Linear(c.hidden_dim, 1)
            # The context's part of eq. (1); the word's and the state's are in the cell.
            self.W_z = nn.Linear(c.feature_dim, self.cell.W.out_features, bias=False)
            self.L_z = nn.Linear(c.feature_dim, c.embed_dim, bias=False)
        self.L_h = nn.Linear(c.hidden_dim, c.embed_dim)  # L_h, L_z, L_o: eq. (7)
        self.L_o = nn.Linear(c.embed_dim, c.vocab_size)
        self.dropout = nn.Dropout(c.dropout)
        self.input_dropout = nn.Dropout(c.input_dropout)

    def start(self, a, copies=1):
        """Annotation vectors a (B, L, D) -> keys (B, L, A), a, and the first state (h, c).

        h and c (copies * B, H) have `copies` rows in turn for each image: its captions or beams.
        """
        mean = a.mean(dim=1)  # (B, D)
        if self.config.attn == 'none':  # Show and Tell: x_{-1} = W_I mean(a), h = c = 0 before it
            zero = mean.new_zeros(len(a), self.config.hidden_dim)
            keys, (h, c) = a[:, :0], self.cell(self.W_I(mean), (zero, zero))  # no keys
        else:
            keys = self.attention.project(a)
            # With --amp products are in 16 bits, and a with them; the state stays in float32.
            h = torch.tanh(self.f_init_h(mean)).to(a.dtype)
            c = torch.tanh(self.f_init_c(mean)).to(a.dtype)
            a = a.to(keys.dtype)
        return keys, a, tuple(x.repeat_interleave(copies, dim=0) for x in (h, c))

    def context(self, alpha, a, s=None, soft=None):
        """What weights alpha (N, L) make of a (B, L, D) -> z (N, D), log p(s) (N,) or None.

        soft attention                                  z = sum_i alpha_i a_i       eq. (13)
        hard attention
          s given                                       z = a_s                     eq. (9)
          training: s ~ Multinoulli(alpha)              z = a_s                     eq. (8), (9)
            in captions where `soft` (N,) is true       z = sum_i alpha_i a_i
          captioning, hard_decode='argmax'              z = a_s, s = argmax_i alpha_i
          captioning, hard_decode='expected'            z = sum_i alpha_i a_i
        """
        captioning = not self.training and s is None
        if self.config.attn == 'soft' or (captioning and self.config.hard_decode == 'expected'):
            return soft_context(alpha, a), None
        if captioning:
            s = alpha.argmax(dim=1)  # (N,)
        return hard_context(alpha, a, s, soft)

    def step(self, WEy, keys, a, state, s=None, soft=None):
        """One word: look at the image with h_{t-1}, then move the LSTM on -> state, look.

        WEy (N, 4H) is W E y_{t-1} + b, the word's part of eq. (1), for N = copies * B captions;
        keys and a as in `start`; s and soft as in `context`. The look is z (N, D) after the gate,
        alpha (N, L), beta (N,) and log p(s) (N,); all are None with attn='none'.
        """
        if self.config.attn == 'none':
            return self.cell.step(WEy, state), (None, None, None, None)
        h = state[0]
        alpha = self.attention(keys, h)  # (N, L)
        z, log_p_s = self.context(alpha, a, s, soft)  # (N, D)
        beta = torch.sigmoid(self.f_beta(h))  # (N, 1), section 4.2.1
        z = beta * z
        state = self.cell.step(WEy + self.W_z(z), state)  # eq. (1)
        return state, (z, alpha, beta.squeeze(1), log_p_s)

    def logits(self, Ey, h, z=None):
        """Deep output layer, eq. (7): words E y (..., M), h (..., H), z (..., D) -> (..., V)."""
        x = Ey + self.L_h(self.dropout(h))
        if z is not None:
            x = x + self.L_z(z)
        return self.L_o(self.dropout(torch.tanh(x)))  # the tanh is the authors' program's alone

    def forward(self, a, captions, s=None, soft=None):
        """Teacher-forced pass over captions of one length -> Output.

        a (B, L, D); captions (N, T+1), word ids from <start> to <end>, n = N / B consecutive rows
        for each image. s (N, T) and soft (N, T) are those of `context`, a column for each word.
        """
        Ey = self.input_dropout(self.E(captions[:, :-1]))  # (N, T, M)
        if self.training and self.config.input_dropout:  # a feature is dropped at all locations
            a = a * self.input_dropout(torch.ones_like(a[:, :1]))  # (B, L, D)
        keys, a, state = self.start(a, len(captions) // len(a))
        h, looks = [], []
        for t, WEy in enumerate(self.cell.W(Ey).unbind(1)):  # the words' part, for all t at once
            s_t, soft_t = (x if x is None else x[:, t] for x in (s, soft))
            state, look = self.step(WEy, keys, a, state, s_t, soft_t)
            h.append(state[0])
            looks.append(look)
        z, alphas, betas, log_p_s = (None if part[0] is None else torch.stack(part, dim=1)
                                     for part in zip(*looks))  # of T parts one tensor (N, T, ..)
        return Output(self.logits(Ey, torch.stack(h, dim=1), z), alphas, betas, log_p_s)

    def next_word(self, words, keys, a, state):
        """Words (N,) just said -> log p of the next one (N, V), the new state, alpha and beta."""
        Ey = self.E(words)  # (N, M)
        state, (z, alpha, beta, _) = self.step(self.cell.W(Ey), keys, a, state)
        log_p = self.logits(Ey, state[0], z).log_softmax(dim=1)
        log_p = log_p.nan_to_num(nan=-1e4)  # a model that diverged still says something
        log_p[:, [PAD, START, UNK]] = -torch.inf
        return log_p, state, alpha, beta

    @torch.no_grad()
    def beam_search(self, a, beam_size=3, max_len=30, length_penalty=0.0):
        """Captions of the highest log p(y | a), all images and all their beams at once.

        a (B, L, D) -> for each image a list of at most beam_size Hypothesis, best first by
        log_prob / len(tokens) ** length_penalty; those cut off at max_len follow those that ended.
        As in the authors' program a beam narrows by one when a caption ends. <unk> is never said.

        Two beams of one image; each number is log p of the words so far:

            <start>        ->  a -0.5, the -1.2
            a, the         ->  a dog -1.4, a cat -1.9           the dog -2.1 is left behind
            a dog, a cat   ->  a dog <end> -1.6, a cat runs -2.8    one has ended, one beam left
            a cat runs     ->  a cat runs <end> -3.0            none left: two captions, -1.6, -3.0
        """
        B, K, V, device = len(a), beam_size, self.config.vocab_size, a.device
        keys, a, state = self.start(a, K)  # the state's row b * K + k: image b, beam k
        words = torch.full((B * K, 1), START, device=device)  # (B*K, t), each beam's words so far
        seen = []  # alphas (B*K, t, L) and betas (B*K, t), likewise
        log_prob = torch.full((B, K), -torch.inf, device=device)  # of each beam's words
        log_prob[:, 0] = 0  # an image's beams all start equal, so only the first may grow
        beams_left = torch.full((B, 1), K, device=device)
        growing = torch.arange(B, device=device)  # the images with beams left; G of them, G <= B
        ended = []  # of each step: images, words, log_prob, alphas, betas of captions that ended
        for t in range(1, max_len + 1):
            log_p, state, alpha, beta = self.next_word(words[:, -1], keys, a, state)  # (G*K, V)
            total = (log_prob.view(-1, 1) + log_p).view(-1, K * V)  # (G, K*V): k * V + word
            log_prob, best = total.topk(K, dim=1)  # (G, K): beam best // V says word best % V
            parents = best // V + K * torch.arange(len(growing), device=device).unsqueeze(1)
            new = [] if alpha is None else [alpha.unsqueeze(1), beta.unsqueeze(1)]
            seen = [torch.cat(x, dim=1) for x in zip(seen, new)] if seen else new
            carried = [torch.cat([words[parents], (best % V).unsqueeze(2)], dim=2),
                       *(x[parents] for x in seen)]  # (G, K, t+1), (G, K, t, L), (G, K, t)
            kept = (torch.arange(K, device=device) < beams_left) & (log_prob > -torch.inf)
            ends = kept & (best % V == END) if t < max_len else kept  # (G, K)
            image, beam = ends.nonzero(as_tuple=True)
            ended.append([growing[image], *(x[image, beam] for x in (log_prob, *carried))])
            beams_left = beams_left - ends.sum(dim=1, keepdim=True)
            log_prob = log_prob.masked_fill(ends | ~kept, -torch.inf)
            still = (log_prob > -torch.inf).any(dim=1).nonzero().squeeze(1)
            if not len(still):
                break
            if len(still) < len(growing):  # images without beams are left behind
                growing, log_prob, beams_left, parents, keys, a, *carried = (
                    x[still] for x in (growing, log_prob, beams_left, parents, keys, a, *carried))
            words, *seen = (x.flatten(0, 1) for x in carried)
            state = [x[parents.flatten()] for x in state]  # each beam goes on from its parent
        return hypotheses(ended, B, length_penalty)


def hypotheses(ended, B, length_penalty):
    """What beam_search gathered in `ended` -> for each of B images its Hypotheses, best first."""
    def key(h):  # captions that reached <end> come first
        return h.tokens[-1] != END, -h.log_prob / len(h.tokens) ** length_penalty
    found = [[] for _ in range(B)]
    for images, log_probs, words, *seen in ended:
        looks = [x.float().cpu().numpy() for x in seen] or [[None] * len(images)] * 2
        for image, *x in zip(images.tolist(), words[:, 1:].tolist(), log_probs.tolist(), *looks):
            found[image].append(Hypothesis(*x))
    return [sorted(some, key=key) for some in found]


FORMAT = 'show-attend-tell 1'


def save_checkpoint(path, captioner, encoder, vocabulary, settings, half=False, **training):
    """Write one file with all that captioning needs, and whatever `training` adds for resuming.

    settings: numbers and strings. With `half` matrices and filters are float16. A frozen encoder's
    weights are not written. The file is renamed when whole. Raises UserError if that fails.
    """
    def weights(module):
        return {name: x.half() if half and x.is_floating_point() and x.dim() in (2, 4) else x
                for name, x in module.state_dict().items()}
    content = {'format': FORMAT, 'config': asdict(captioner.config),
               'captioner': weights(captioner), 'words': vocabulary.words,
               'encoder': {'name': encoder.name, 'image_size': encoder.image_size,
                           'key': encoder.key,
                           'weights': weights(encoder) if encoder.trainable else None},
               'settings': settings, **training}
    part = Path(f'{path}.part')
    try:
        torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save has its own error for a full disk
        part.unlink(missing_ok=True)
        raise UserError(f'cannot write {path} ({error}): is the disk full?') from None


def read_checkpoint(path):
    """The dictionary in a checkpoint file; no code in it is run. Raises UserError if it is none."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the sums of the parts
            if file.testzip():
                raise zipfile.BadZipFile('it is damaged')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if checkpoint['format'] != FORMAT:
            raise ValueError(f"it is of the format {checkpoint['format']}, not {FORMAT}")
        return checkpoint
    except Exception as error:  # missing, broken and foreign files each have another error
        raise UserError(f'{path} is no whole checkpoint of this program ({error!r:.120}): name '
                        'another, such as runs/NAME/best.pt') from None


def load_checkpoint(path, device='cpu', hard_decode=None):
    """Rebuild what a checkpoint holds -> captioner, encoder, vocabulary, settings.

    The first two are on `device` and in evaluation mode; hard_decode is in place of the saved one.
    Raises UserError.
    """
    checkpoint = read_checkpoint(path)
    cnn = checkpoint['encoder']
    own = cnn['weights'] is not None  # it was trained with the captioner
    encoder = Encoder(cnn['name'], cnn['image_size'], own, pretrained=not own)
    if own:
        encoder.load_state_dict(cnn['weights'])
    elif encoder.key != cnn['key']:
        raise UserError(f'{path} was trained with the encoder {cnn["key"]}, and {cnn["name"]} is '
                        f'{encoder.key}: put the right one there')
    captioner = Captioner(CaptionerConfig(**checkpoint['config']))
    captioner.config.hard_decode = hard_decode or captioner.config.hard_decode
    captioner.load_state_dict(checkpoint['captioner'])
    return (captioner.to(device).eval(), encoder.to(device).eval(),
            Vocabulary(checkpoint['words']), checkpoint['settings'])
