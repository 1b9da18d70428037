"""The captioner of Show, Attend and Tell (Xu et al., 2015) and the CNN in front of it.

LSTMCell, RNNCell  recurrent cells written out by hand, paper eq. (1)-(3)
Encoder            image -> annotation vectors, paper section 3.1.1
Captioner          teacher-forced forward pass and batched beam search, section 3.1.2
save_checkpoint, load_checkpoint

Letters, the same in every file:
    B batch   L locations   D feature size   T time steps   V vocabulary
    H hidden  M embedding   A attention size K beams
Paper symbols: a annotation vectors, alpha attention weights, beta gate, z context, h and c the
LSTM's state, E word embedding, y words, s a sampled location (in train.py s is the settings). A
line that changes a shape ends with it.
"""
import hashlib
import logging
import math
import os
import pickle
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from torch import nn

from attention import BahdanauAttention, DotAttention, hard_context, soft_context
from data import END, PAD, START, UNK, UserError, Vocabulary  # the capitals are word ids 0 to 3


# ---------------------------------------------------------------------------- recurrent cells
class LSTMCell(nn.Module):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997), paper eq. (1)-(3).

        i, f, o, g = the four quarters of W x_t + U h_{t-1} + b
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)   forget old memory and write new
        h_t = sigmoid(o) * tanh(c_t)                        choose what to show
    """
    gates = 4

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
        i, f, o, g = (Wx + self.U(h)).chunk(4, dim=1)  # four of (B, H)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # eq. (2)
        h = torch.sigmoid(o) * torch.tanh(c)  # eq. (3)
        return h, c


class RNNCell(nn.Module):
    """The plain recurrent network h_t = tanh(W x_t + U h_{t-1} + b) (Elman, 1990)."""
    gates = 1

    def __init__(self, input_dim, hidden_dim):
        super().__init__()
        self.W = nn.Linear(input_dim, hidden_dim)
        self.U = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def forward(self, x, state):
        """Input x (B, input_dim), state (h, c) -> (h, c); c is not used, an RNN has no memory."""
        return self.step(self.W(x), state)

    def step(self, Wx, state):
        """The same from W x + b (B, H)."""
        h, c = state
        return torch.tanh(Wx + self.U(h)).to(h.dtype), c  # float32, also with --amp


# ------------------------------------------------------------------------------------ encoder
class Coordinates(nn.Module):
    """Appends each pixel's x and y in -1..1 as channels, so that features know where they are."""

    def forward(self, images):
        """Images (B, 3, rows, columns) -> (B, 5, rows, columns)."""
        B, _, rows, columns = images.shape
        x = torch.linspace(-1, 1, columns, device=images.device).expand(B, 1, rows, columns)
        y = torch.linspace(-1, 1, rows, device=images.device).view(rows, 1).expand_as(x)
        return torch.cat([images, x, y], dim=1)


def tiny_cnn():
    """A small CNN of stride 8 and 128 features for pictures of simple shapes, trained jointly.

    Kernels of 4 where the stride is 2 keep each feature in the middle of what it sees; with 3 the
    attention maps would lie half a cell off.
    """
    def block(inputs, outputs, kernel, stride):
        return [nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False),
                nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(Coordinates(), *block(5, 16, 4, 2), *block(16, 32, 4, 2),
                         *block(32, 64, 4, 2), *block(64, 128, 3, 1))


def torchvision_cnn(name, pretrained=True):
    """A torchvision classifier's layers before the pooling, and a name for its weights.

    vgg19 ends after conv5_4 and its ReLU, before the last max pool, as in the paper.
    Raises UserError for a name that torchvision has not, or when the weights cannot be had.
    """
    import torchvision  # here: it loads as slowly as torch, and only this function needs it
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"no encoder is called '{name}': give 'tiny', a torchvision "
                        "classification CNN such as vgg19 or resnet50, or a path to a .pt2 file")
    weights = torchvision.models.get_model_weights(name).DEFAULT if pretrained else None
    try:
        cnn = torchvision.models.get_model(name, weights=weights)
    except Exception as error:  # no network, or a download that is broken in some way
        folder = Path(torch.hub.get_dir()) / 'checkpoints'
        raise UserError(f'cannot get the weights of {name} ({error}): download {weights.url} '
                        f'and put it into {folder}, in place of what may be there') from None
    if hasattr(cnn, 'layer4'):  # resnet, resnext, wide_resnet
        layers = [cnn.conv1, cnn.bn1, cnn.relu, cnn.maxpool,
                  cnn.layer1, cnn.layer2, cnn.layer3, cnn.layer4]
    elif hasattr(cnn, 'trunk_output'):  # regnet
        layers = [cnn.stem, cnn.trunk_output]
    elif isinstance(getattr(cnn, 'features', None), nn.Sequential) and 'swin' not in name:
        layers = list(cnn.features)
    else:
        raise UserError(f'{name} has no feature map that attention could look at: '
                        'give a CNN such as vgg19, resnet50, densenet121 or efficientnet_b0')
    if isinstance(layers[-1], nn.MaxPool2d):  # vgg, alexnet
        layers = layers[:-1]
    if name.startswith('densenet'):  # its last ReLU is not a layer of its own
        layers.append(nn.ReLU())
    return nn.Sequential(*layers), f'{name}-{Path(weights.url).stem}' if weights else name


def exported_key(path):
    """A name for the weights in a .pt2 file. Raises OSError where it cannot be read."""
    return f'{Path(path).stem}-{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]}'


class Encoder(nn.Module):
    """CNN that turns an image into annotation vectors a = {a_1 .. a_L}, paper section 3.1.1.

    name        'tiny', a torchvision classification CNN, or the path of a .pt2 file
                (torch.export) that maps ImageNet-normalised images (B, 3, H, W) to (B, D, h, w)
                and computes in float32; its weights may be kept as float16. Where it learns, its
                batch normalisation stays as it was exported
    image_size  pixels; images are squares of this side
    trainable   whether the CNN learns; a frozen one stays in evaluation mode for ever

    .grid is (rows, columns) with rows * columns = L, .feature_dim is D, and .key names the weights
    of a frozen CNN, so that features in a cache can be told apart.
    """

    def __init__(self, name='tiny', image_size=64, trainable=None, pretrained=True):
        super().__init__()
        self.name, self.image_size = str(name), image_size
        self.trainable = self.name == 'tiny' if trainable is None else trainable
        if self.name == 'tiny':
            self.cnn, self.key = tiny_cnn(), 'tiny'
        elif self.name.endswith('.pt2'):
            self.cnn, self.key = self.load_exported(self.name)
        else:
            self.cnn, self.key = torchvision_cnn(self.name, pretrained)
        self.cnn.requires_grad_(self.trainable)
        # Mean and standard deviation of ImageNet's pixels; not kept in checkpoints.
        self.register_buffer('mean', torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), False)
        self.register_buffer('std', torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), False)
        self.eval()
        with torch.no_grad():  # a trial run tells D and the grid
            try:
                features = self.cnn(torch.zeros(2, 3, image_size, image_size))
            except (RuntimeError, AssertionError) as error:
                raise UserError(f'the encoder {name} cannot take two images of {image_size} x '
                                f'{image_size} pixels (--image-size): {error}') from None
        if features.dim() != 4:
            raise UserError(f'the encoder {name} returns {tuple(features.shape)} for two images, '
                            'and not a map (B, D, rows, columns)')
        self.feature_dim, self.grid = features.shape[1], tuple(features.shape[2:])

    def load_exported(self, path):
        """The CNN in a .pt2 file and a name for its weights."""
        try:
            key = exported_key(path)
        except OSError as error:
            raise UserError(f'cannot read the encoder {path}: {error.strerror}') from None
        if not zipfile.is_zipfile(path):
            raise UserError(f'{path} is not a file that torch.export.save wrote, or not all of it')
        logging.getLogger('torch.export').disabled = True  # it would print a traceback of its own
        try:
            return torch.export.load(path).module().float(), key
        except Exception:  # it has no error of its own for another program's zip file
            raise UserError(f'torch.export cannot load {path}: it is of another program, or of a '
                            f'newer torch than {torch.__version__}') from None

    def train(self, mode=True):
        """A frozen CNN is never put into training mode, whatever the rest does."""
        self.training = mode
        if not isinstance(self.cnn, torch.fx.GraphModule):  # an exported one refuses both modes
            self.cnn.train(mode and self.trainable)
        return self

    def forward(self, images):
        """Images (B, 3, H, W), uint8 or float in 0..1 -> annotation vectors a (B, L, D)."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            images = (images - self.mean) / self.std
            # Channels last is the faster layout for convolutions, and what flattening wants.
            features = self.cnn(images.contiguous(memory_format=torch.channels_last))
        return features.flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, L, D)


# ---------------------------------------------------------------------------------- captioner
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


class Output(NamedTuple):
    """What the teacher-forced pass returns; attention is None with attn='none'."""
    logits: torch.Tensor                      # (B, T, V)
    alphas: Optional[torch.Tensor] = None     # (B, T, L)
    betas: Optional[torch.Tensor] = None      # (B, T)
    log_p_s: Optional[torch.Tensor] = None    # (B, T), hard attention only


class Look(NamedTuple):
    """One step's look at the image."""
    z: torch.Tensor                           # (B, D), after the gate
    alpha: torch.Tensor                       # (B, L)
    beta: torch.Tensor                        # (B,)
    log_p_s: Optional[torch.Tensor] = None    # (B,), hard attention only


class Hypothesis(NamedTuple):
    """A caption that beam search found."""
    tokens: list              # word ids without <start>; the last is <end> if the caption ended
    log_prob: float           # log p(tokens | a)
    alphas: object            # numpy (len(tokens), L), None with attn='none'
    betas: object             # numpy (len(tokens),), None with attn='none'


class Captioner(nn.Module):
    """The decoder: an LSTM that looks at the image anew for every word, section 3.1.2.

    With attn='none' it is Show and Tell (Vinyals et al., 2014): the mean annotation vector is the
    first input of the LSTM, and the image is not seen again.
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
            self.W_z = nn.Linear(c.feature_dim, self.cell.gates * c.hidden_dim, bias=False)
            self.L_z = nn.Linear(c.feature_dim, c.embed_dim, bias=False)
        self.L_h = nn.Linear(c.hidden_dim, c.embed_dim)  # L_h, L_z, L_o: eq. (7)
        self.L_o = nn.Linear(c.embed_dim, c.vocab_size)
        self.dropout = nn.Dropout(c.dropout)
        self.input_dropout = nn.Dropout(c.input_dropout)

    def start(self, a, copies=1):
        """Annotation vectors a (B, L, D) -> keys (B, L, A), a, and the first state (h, c).

        h and c (copies * B, H) have `copies` rows in turn for each image, one for each of its
        captions or beams.
        """
        mean = a.mean(dim=1)  # (B, D)
        if self.config.attn == 'none':  # Show and Tell: x_{-1} = W_I mean(a), h = c = 0 before it
            zero = mean.new_zeros(len(a), self.config.hidden_dim)
            keys, (h, c) = a[:, :0], self.cell(self.W_I(mean), (zero, zero))  # no keys
        else:
            keys = self.attention.project(a)
            # With --amp products are in bfloat16, and a with them; the state stays in float32.
            h = torch.tanh(self.f_init_h(mean)).to(a.dtype)
            c = torch.tanh(self.f_init_c(mean)).to(a.dtype)
            a = a.to(keys.dtype)
        return keys, a, tuple(x.repeat_interleave(copies, dim=0) for x in (h, c))

    def step(self, WEy, keys, a, state, s=None, soft=None):
        """One word: look at the image with h_{t-1}, then move the LSTM on.

        WEy (N, gates * H) is W E y_{t-1} + b, the word's part of eq. (1), for N = copies * B
        captions; keys and a as in `start`. s and soft are hard attention's choice, see
        `hard_context`.
        Returns the new state and the Look (None with attn='none').
        """
        if self.config.attn == 'none':
            return self.cell.step(WEy, state), None
        h = state[0]
        alpha = self.attention(keys, h)  # (N, L)
        evaluating = not self.training and s is None  # then nothing is drawn at random
        if self.config.attn == 'soft' or (evaluating and self.config.hard_decode == 'expected'):
            z, log_p_s = soft_context(alpha, a), None  # (N, D)
        else:
            s = alpha.argmax(dim=1) if evaluating else s  # where it is None one is sampled
            z, log_p_s = hard_context(alpha, a, s, soft)
        beta = torch.sigmoid(self.f_beta(h))  # (N, 1), section 4.2.1
        z = beta * z
        state = self.cell.step(WEy + self.W_z(z), state)
        return state, Look(z, alpha, beta.squeeze(1), log_p_s)

    def logits(self, Ey, h, z=None):
        """Deep output layer, eq. (7): words E y (..., M), h (..., H), z (..., D) -> (..., V).

        The tanh is in the authors' program and not in the paper's equation; the scores of the
        paper's table come from the program.
        """
        x = Ey + self.L_h(self.dropout(h))
        if z is not None:
            x = x + self.L_z(z)
        return self.L_o(self.dropout(torch.tanh(x)))

    def forward(self, a, captions, s=None, soft=None):
        """Teacher-forced pass over captions of one length -> Output.

        a (B, L, D); captions (B, T+1), word ids from <start> to <end>. If captions has n * B rows,
        each n rows in turn belong to one image.
        Hard attention only: s (B, T) gives the locations; by default they are sampled in training
        mode and follow config.hard_decode in evaluation mode. Where soft (B, T) is true, z is the
        expectation.
        """
        Ey = self.input_dropout(self.E(captions[:, :-1]))  # (B, T, M)
        if self.training and self.config.input_dropout:  # a feature is dropped at all locations
            a = a * self.input_dropout(torch.ones_like(a[:, :1]))  # (B, L, D)
        keys, a, state = self.start(a, len(captions) // len(a))
        h, looks = [], []
        for t, WEy in enumerate(self.cell.W(Ey).unbind(1)):  # the words' part, for all t at once
            s_t, soft_t = (x if x is None else x[:, t] for x in (s, soft))
            state, look = self.step(WEy, keys, a, state, s_t, soft_t)
            h.append(state[0])
            looks.append(look)
        h = torch.stack(h, dim=1)  # (B, T, H)
        if self.config.attn == 'none':
            return Output(self.logits(Ey, h))
        # T looks -> one tensor for each field of Look; soft attention has no log_p_s.
        z, alphas, betas, log_p_s = (None if part[0] is None else torch.stack(part, dim=1)
                                     for part in zip(*looks))
        return Output(self.logits(Ey, h, z), alphas, betas, log_p_s)

    def next_word(self, words, seen):
        """Words (B,) just said -> log p of the next one (B, V), `seen` after it, and the Look.

        seen: keys, a and the state, as `start` gives them.
        """
        keys, a, state = seen
        Ey = self.E(words)
        state, look = self.step(self.cell.W(Ey), keys, a, state)
        z = None if look is None else look.z
        return self.logits(Ey, state[0], z).log_softmax(dim=1), (keys, a, state), look

    @torch.no_grad()
    def beam_search(self, a, beam_size=3, max_len=30, length_penalty=0.0, others=()):
        """Captions of the highest log p(y | a), all images and all their beams at once.

        a (B, L, D) -> for each image a list of at most beam_size Hypothesis, best first: those
        that ended before those cut at max_len words, each ordered by
        log_prob / len(tokens) ** length_penalty. As in the authors' program, an image's beam
        narrows by one whenever a caption ends. <unk> is never said.
        With `others`, captioners of the same vocabulary, each word's probability is the mean of
        all of theirs, an ensemble; alphas and betas are those of the first.
        """
        if beam_size < 1 or max_len < 1:
            raise ValueError('beam_size and max_len must be at least 1')
        B, K, V = len(a), beam_size, self.config.vocab_size
        team = [self, *others]
        seen = [captioner.start(a, K) for captioner in team]  # its row b * K + k: image b, beam k
        words = a.new_full((B * K, 1), START, dtype=torch.long)  # (B*K, t) of each beam so far
        looked = []  # alphas (B*K, t, L) and betas (B*K, t), likewise
        log_prob = a.new_full((B, K), -torch.inf)  # of each beam that grows
        log_prob[:, 0] = 0  # at first an image's beams are equal: only one of them may grow
        width = torch.full((B, 1), K, device=a.device)  # of each image's beam
        live = torch.arange(B, device=a.device)  # images that still grow; below, B counts only them
        finished = []  # of each step: images, words, log_prob and looks of captions that ended
        for t in range(1, max_len + 1):
            log_ps, seen, looks = zip(*(captioner.next_word(words[:, -1], x)
                                        for captioner, x in zip(team, seen)))
            log_p = log_ps[0]  # (B*K, V)
            if others:
                log_p = torch.stack(log_ps).logsumexp(dim=0) - math.log(len(team))
            log_p = log_p.nan_to_num(nan=-1e4)  # a model that diverged still says something
            log_p[:, [PAD, START, UNK]] = -torch.inf
            total = (log_prob.view(-1, 1) + log_p).view(-1, K * V)  # any beam, then any word
            log_prob, best = total.topk(K, dim=1)  # (B, K), best first
            word = best % V  # (B, K)
            rows = torch.arange(len(live), device=a.device).unsqueeze(1) * K + best // V  # parents
            if looks[0] is not None:
                new = looks[0].alpha.unsqueeze(1), looks[0].beta.unsqueeze(1)
                looked = [torch.cat(x, dim=1) for x in zip(looked, new)] if looked else new
            kept = (torch.arange(K, device=a.device) < width) & (log_prob > -torch.inf)
            ended = kept & (word == END)
            b, k = (ended if t < max_len else kept).nonzero(as_tuple=True)
            tokens = torch.cat([words[rows[b, k]], word[b, k].unsqueeze(1)], dim=1)
            finished.append((live[b], tokens, log_prob[b, k], *(x[rows[b, k]] for x in looked)))
            growing = kept & ~ended
            going = growing.any(dim=1).nonzero().squeeze(1)
            if not len(going) or t == max_len:
                break
            width = width - ended.sum(dim=1, keepdim=True)
            log_prob = log_prob.masked_fill(~growing, -torch.inf)
            if len(going) <= len(live) / 2:  # copying pays when half of the images have finished
                live, rows, word, log_prob, width = (
                    x[going] for x in (live, rows, word, log_prob, width))
                seen = [(keys[going], a[going], state) for keys, a, state in seen]
            rows = rows.flatten()  # each beam goes on from its parent; an image has one a for all
            words = torch.cat([words[rows], word.view(-1, 1)], dim=1)
            looked = [x[rows] for x in looked]
            seen = [(keys, a, [x[rows] for x in state]) for keys, a, state in seen]
        return self._hypotheses(finished, B, length_penalty)

    @staticmethod
    def _hypotheses(finished, B, length_penalty):
        """What a beam search collected -> for each of B images its Hypotheses, best first."""
        found = [[] for _ in range(B)]
        for images, tokens, log_probs, *looks in finished:
            looks = [x.float().cpu().numpy() for x in looks] or [[None] * len(images)] * 2
            for image, *parts in zip(images.tolist(), tokens[:, 1:].tolist(), log_probs.tolist(),
                                     *looks):
                found[image].append(Hypothesis(*parts))
        return [sorted(f, key=lambda x: (x.tokens[-1] != END, -x.log_prob
                                         / len(x.tokens) ** length_penalty)) for f in found]


# --------------------------------------------------------------------------------- checkpoints
FORMAT = 'show-attend-tell 1'


def save_checkpoint(path, captioner, encoder, vocabulary, settings, half=False, **training):
    """Write one file with all that captioning needs, and whatever `training` adds for resuming.

    settings is a dictionary of numbers and strings. With `half` the matrices and filters are
    written as float16: half the bytes, and now and then a near tie of two captions falls the other
    way. The weights of a frozen encoder are not written: torchvision has them, and a .pt2 file is
    looked for where it was, beside the checkpoint, and in pretrained/.
    The file is written under another name and then renamed, so it is never half there. Raises
    UserError where it cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + '.part')

    def weights(module):
        return {name: x.half() if half and x.is_floating_point() and x.dim() in (2, 4) else x
                for name, x in module.state_dict().items()}
    content = {'format': FORMAT, 'config': asdict(captioner.config),
               'captioner': weights(captioner), 'words': vocabulary.words,
               'encoder': {'name': encoder.name, 'image_size': encoder.image_size,
                           'key': encoder.key,
                           'weights': weights(encoder) if encoder.trainable else None},
               'settings': settings, **training}
    try:
        with open(part, 'wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save has its own error for a full disk
        part.unlink(missing_ok=True)
        raise UserError(f'cannot write {path} ({error}): is the disk full? What was written '
                        'before is still there') from None


def read_checkpoint(path):
    """The dictionary in a checkpoint file; no code in it is run.

    Raises UserError if the file is none, was damaged, or is of another program or version.
    """
    advice = 'name a checkpoint of this program, such as runs/NAME/best.pt'
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the sums of the parts
            if file.testzip():
                raise zipfile.BadZipFile('it is damaged')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'there is no checkpoint {path}: {advice}') from None
    except pickle.UnpicklingError:
        raise UserError(f'{path} holds more than weights, numbers and text (code, perhaps), and is '
                        f'not loaded: {advice}') from None
    except Exception as error:  # a broken or foreign file: neither has an error of its own
        reason = str(error).partition('\n')[0][:100]
        raise UserError(f'{path} is not a checkpoint, or not all of one ({reason}): {advice}'
                        ) from None
    found = checkpoint.get('format') if isinstance(checkpoint, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} is of the format '{found}', and this program reads '{FORMAT}': "
                        f'{advice}')
    return checkpoint


def load_checkpoint(path, device='cpu', hard_decode=None):
    """Rebuild what a checkpoint holds -> captioner, encoder, vocabulary, settings.

    The first two are on `device` and in evaluation mode. hard_decode takes the place of what the
    configuration says. Raises UserError as `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    name, size, key, weights = (checkpoint['encoder'][k]
                                for k in ('name', 'image_size', 'key', 'weights'))
    if name.endswith('.pt2'):
        places = [Path(name), Path(path).with_name(Path(name).name),
                  Path(__file__).with_name('pretrained') / Path(name).name]
        name = next((str(p) for p in places if p.is_file() and exported_key(p) == key), None)
        if name is None:
            raise UserError(f'{path} was trained with the encoder {key}, and {places[0]} is not '
                            'there or another one: put the right one beside the checkpoint')
    encoder = Encoder(name, size, trainable=weights is not None, pretrained=weights is None)
    if weights is None and encoder.key != key:
        raise UserError(f'{name} has other weights than those that {path} was trained with')
    if weights is not None:
        encoder.load_state_dict(weights)
    captioner = Captioner(CaptionerConfig(**checkpoint['config']))
    captioner.config.hard_decode = hard_decode or captioner.config.hard_decode
    captioner.load_state_dict(checkpoint['captioner'])
    return (captioner.to(device).eval(), encoder.to(device).eval(),
            Vocabulary(checkpoint['words']), checkpoint['settings'])


def check_beam(beam, vocabulary):
    """Raise UserError unless a beam of this size makes sense."""
    if not 1 <= beam <= len(vocabulary):
        raise UserError(f'--beam {beam}: it must be from 1 to the {len(vocabulary)} words of the '
                        'vocabulary')


def pick_device(name=''):
    """Device by name, or the best there is: cuda, mps or cpu. Raises UserError without it."""
    if not name:
        name = ('cuda' if torch.cuda.is_available() else
                'mps' if torch.backends.mps.is_available() else 'cpu')
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name} cannot be used here: {str(error)[:100]}') from None
