"""The captioner of Show, Attend and Tell (Xu et al., 2015) and the CNN in front of it.

LSTMCell, RNNCell  recurrent cells written out by hand, paper eq. (1)-(3)
Encoder            image -> annotation vectors, paper section 3.1.1
Captioner          teacher-forced forward pass and batched beam search, section 3.1.2
save_checkpoint, load_checkpoint

Letters of shapes; a comment at the end of a line gives the shape that comes out:
    B images  L locations  D features  A attention  H hidden  M embedding  V vocabulary
    T time steps  K beams  N rows: the captions or beams of all images, n consecutive for each image
Paper symbols: a annotation vectors, alpha attention weights, beta gate, z context, h and c the
LSTM's state, E word embedding, y words, s a sampled location.
"""
import hashlib
import io
import logging
from collections import namedtuple
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

from attention import BahdanauAttention, DotAttention, hard_context, soft_context
from data import END, PAD, START, UNK  # ids of special words
from data import UserError, Vocabulary, as_path, as_user_error, write_whole

PRETRAINED = Path(__file__).resolve().with_name('pretrained')  # models shipped with this program


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
        """Input x (N, input_dim), state (h, c) of (N, H) each -> the new state (h, c)."""
        return self.step(self.W(x), state)

    def step(self, Wx, state):
        """As forward, from Wx = W x + b (N, 4H), which can be computed for all words at once."""
        h, c = state
        i, f, o, g = (Wx + self.U(h)).chunk(4, dim=1)  # four of (N, H), eq. (1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # eq. (2)
        h = torch.sigmoid(o) * torch.tanh(c)  # eq. (3)
        return h, c


class RNNCell(nn.Module):
    """The plain recurrent network h_t = tanh(W x_t + U h_{t-1} + b) (Elman, 1990); c is unused."""

    def __init__(self, input_dim, hidden_dim):
        super().__init__()
        self.W = nn.Linear(input_dim, hidden_dim)
        self.U = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def forward(self, x, state):
        """As LSTMCell.forward."""
        return self.step(self.W(x), state)

    def step(self, Wx, state):
        h, c = state
        h = torch.tanh(Wx + self.U(h)).to(h.dtype)  # float32, also where --amp made 16 bits of U h
        return h, c


# ----------------------------------------------------------------------------------- the encoder
def tiny_cnn():
    """A small CNN of stride 8 and 128 features for simple pictures, trained with the captioner."""
    # With stride 2 the first output stands for pixels 0 and 1. A kernel of 4 sees -1 to 2, evenly
    # around them; one of 3 would see -1 to 1.
    layers, channels = [], 3
    for outputs, kernel, stride in (16, 4, 2), (32, 4, 2), (64, 4, 2), (128, 3, 1):
        layers.append(nn.Conv2d(channels, outputs, kernel, stride, padding=1, bias=False))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        channels = outputs
    return nn.Sequential(*layers)


def exported_cnn(path, device):
    """A .pt2 file, at `path` or in pretrained/ -> its CNN, and a key: its name and a hash of it."""
    if not path.exists():
        path = PRETRAINED / path.name
    content = path.read_bytes()  # torch cannot open every path that Windows can
    logging.getLogger('torch.export').disabled = True  # of a bad file it would print a traceback
    program = torch.export.load(io.BytesIO(content))
    if str(device) != 'cpu':  # a later .to() would leave its constants behind on the CPU
        program = move_to_device_pass(program, str(device))
    cnn = program.module().float()  # its weights may be float16
    cnn.train = lambda mode: cnn  # its own raises an error: an exported CNN has one mode
    return cnn, f'{path.stem}-{hashlib.sha256(content).hexdigest()[:12]}'


FAMILIES = 'vgg resnet resnext wide_resnet densenet efficientnet convnext regnet mobilenet'


def torchvision_cnn(name, pretrained):
    """A torchvision classifier without pooling and head, and torchvision's entry of its weights."""
    if not name.startswith(tuple(FAMILIES.split())):  # others end with other layers
        raise ValueError('no such CNN')
    import torchvision  # here: it loads as slowly as torch, and only these CNNs need it
    weights = torchvision.models.get_model_weights(name).DEFAULT
    with as_user_error(f'cannot get the weights of {name}', f'download {weights.url} into '
                       f'{torch.hub.get_dir()}/checkpoints'):
        cnn = torchvision.models.get_model(name, weights=weights if pretrained else None)
    if not hasattr(cnn, 'features'):  # resnet and regnet end with avgpool and fc
        return nn.Sequential(*list(cnn.children())[:-2]), weights
    layers = cnn.features
    if name.startswith('vgg'):
        layers = layers[:-1]  # vgg19 ends after conv5_4 and its ReLU, as in the paper
    if name.startswith('densenet'):
        layers.append(nn.ReLU())  # which is not a layer of its own there
    return layers, weights


class Encoder(nn.Module):
    """CNN that turns an image into annotation vectors a = {a_1 .. a_L}, paper section 3.1.1.

    name        'tiny', a torchvision classification CNN, or the path of a .pt2 file (torch.export)
                that maps ImageNet-normalised images to feature maps (B, D, rows, columns)
    image_size  pixels; images are squares of this side
    trainable   whether the CNN learns, as tiny always does; a frozen one stays in evaluation mode
    pretrained  whether a torchvision CNN gets its ImageNet weights
    trial_batch images in the trial run: a CNN exported for fewer at once is refused

    .grid is (rows, columns) with rows * columns = L, .feature_dim is D, and .key names the weights
    of a frozen CNN. Raises UserError if the CNN cannot be loaded or does not give a feature map.
    """

    def __init__(self, name='tiny', image_size=64, trainable=False, pretrained=True, device='cpu',
                 trial_batch=2):
        super().__init__()
        self.name, self.image_size = str(name), image_size
        self.trainable = trainable or name == 'tiny'
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
        remedy = (f'give tiny, a CNN of torchvision ({FAMILIES}), or a .pt2 file that '
                  f'maps any number of images of {image_size} pixels to (B, D, rows, columns)')
        with as_user_error(f'{name} cannot be the encoder', remedy):
            if self.name == 'tiny':
                self.cnn, self.key = tiny_cnn(), 'tiny'
            elif self.name.endswith('.pt2'):
                self.cnn, self.key = exported_cnn(as_path(name), device)
            else:
                self.cnn, weights = torchvision_cnn(self.name, pretrained)
                self.key = f'{name}-{Path(weights.url).stem}'
                mean, std = weights.transforms().mean, weights.transforms().std
            self.cnn.requires_grad_(self.trainable)
            mean_std = torch.tensor([mean, std]).view(2, 3, 1, 1)
            self.register_buffer('mean_std', mean_std, persistent=False)
            self.to(device).eval()
            with torch.no_grad():  # a trial run tells the sizes
                features = self.features(torch.zeros(trial_batch, 3, image_size, image_size))
            _, self.feature_dim, rows, columns = features.shape
        self.grid = rows, columns

    def train(self, mode=True):
        """A frozen CNN is never put into training mode, whatever the rest does."""
        return super().train(mode and self.trainable)

    def features(self, images):
        """Images (B, 3, ..), uint8 or float in 0..1 -> the CNN's map (B, D, rows, columns)."""
        mean, std = self.mean_std  # (3, 1, 1) each
        images = images.to(mean.device)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        images = (images - mean) / std
        if images.device.type != 'mps':  # a faster layout; its backward pass on MPS has bugs
            images = images.contiguous(memory_format=torch.channels_last)
        return self.cnn(images)

    def forward(self, images):
        """Images (B, 3, ..), uint8 or float in 0..1 -> annotation vectors a (B, L, D)."""
        return self.features(images).flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------------- the captioner
@dataclass
class CaptionerConfig:
    """What a Captioner is built from. score and attn_dim are of use with attention only."""
    vocab_size: int
    feature_dim: int
    attn: str = 'soft'            # none (Show and Tell), soft, hard
    score: str = 'additive'       # additive (Bahdanau), dot
    cell: str = 'lstm'            # lstm, rnn
    embed_dim: int = 512
    hidden_dim: int = 512
    attn_dim: int = 256
    dropout: float = 0.5          # in the output layer
    hard_decode: str = 'argmax'   # context of hard attention when captioning: argmax, expected
    input_dropout: float = 0.0    # of word embeddings E y and of the features in a


# What the teacher-forced pass returns: logits (B, T, V), alphas (B, T, L), betas (B, T) and log_p_s
# (B, T). alphas and betas are None with attn='none'; log_p_s is None where no location was chosen.
Output = namedtuple('Output', 'logits alphas betas log_p_s')
# A caption that beam search found: word ids after <start>, the last is <end> unless it was cut off
# at max_len; log p(tokens | a); numpy alphas (len(tokens), L) and betas, None with attn='none'.
Hypothesis = namedtuple('Hypothesis', 'tokens log_prob alphas betas')


def stack(parts):
    """T tensors (B, ..), one from each step -> one tensor (B, T, ..); T times None -> None."""
    if parts[0] is None:
        return None
    return torch.stack(parts, dim=1)


class Captioner(nn.Module):
    """The decoder: an LSTM (or RNN) that looks at the image anew for every word, section 3.1.2.

    With attn='none' it is Show and Tell (Vinyals et al., 2014), which sees the image once, first.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, D, A = config.vocab_size, config.feature_dim, config.attn_dim
        M, H = config.embed_dim, config.hidden_dim
        self.E = nn.Embedding(V, M)
        nn.init.normal_(self.E.weight, std=0.1)
        self.cell = {'lstm': LSTMCell, 'rnn': RNNCell}[config.cell](M, H)
        if config.attn == 'none':
            self.W_I = nn.Linear(D, M)  # the image as a first word
        else:
            attention = {'additive': BahdanauAttention, 'dot': DotAttention}[config.score]
            self.attention = attention(D, H, A)
            self.f_init_h = nn.Linear(D, H)
            self.f_init_c = nn.Linear(D, H)
            self.f_beta = nn.Linear(H, 1)
            # The context's part of eq. (1); the word's and the state's are in the cell.
            self.W_z = nn.Linear(D, self.cell.W.out_features, bias=False)  # 4H; of an RNN H
            self.L_z = nn.Linear(D, M, bias=False)
        self.L_h = nn.Linear(H, M)  # L_h, L_z, L_o: eq. (7)
        self.L_o = nn.Linear(M, V)
        self.dropout = nn.Dropout(config.dropout)
        self.input_dropout = nn.Dropout(config.input_dropout)

    def start(self, a):
        """Annotation vectors a (B, L, D) -> keys (B, L, A), a, and the first state (h, c)."""
        mean = a.mean(dim=1)  # (B, D)
        if self.config.attn == 'none':  # Show and Tell: x_{-1} = W_I mean(a), h = c = 0 before it
            zero = mean.new_zeros(len(a), self.config.hidden_dim)
            h, c = self.cell(self.W_I(mean), (zero, zero))
            keys = a[:, :0]  # (B, 0, D): there are no locations to look at
        else:
            keys = self.attention.project(a)
            h = torch.tanh(self.f_init_h(mean)).float()  # the state is float32, also with --amp
            c = torch.tanh(self.f_init_c(mean)).float()
            a = a.to(keys.dtype)  # with --amp 16 bits
        return keys, a, (h, c)

    def context(self, alpha, a, sampled=None):
        """Context of weights alpha (N, L) over a (B, L, D) -> z (N, D), log p(s) (N,) or None.

        soft attention                                  z = sum_i alpha_i a_i       eq. (13)
        hard attention
          training: s ~ Multinoulli(alpha)              z = a_s                     eq. (8), (9)
            captions where `sampled` (N,) is false      z = sum_i alpha_i a_i
          evaluation, hard_decode='argmax'              z = a_s, s = argmax_i alpha_i
          evaluation, hard_decode='expected'            z = sum_i alpha_i a_i
        """
        if self.config.attn == 'hard' and self.training:
            return hard_context(alpha, a, sampled=sampled)
        if self.config.attn == 'hard' and self.config.hard_decode == 'argmax':
            return hard_context(alpha, a, s=alpha.argmax(dim=1))
        return soft_context(alpha, a), None

    def step(self, WEy, keys, a, state, sampled=None):
        """One word: look at the image with h_{t-1}, then move the LSTM on.

        WEy (N, 4H) is W E y_{t-1} + b, the word's part of eq. (1), for N captions or beams; keys
        and a as in `start`; sampled as in `context`. Returns the state and the look: z (N, D) after
        the gate, alpha (N, L), beta (N,), log p(s) (N,); these are None with attn='none'.
        """
        if self.config.attn == 'none':
            return self.cell.step(WEy, state), None, None, None, None
        h, _ = state
        alpha = self.attention(keys, h)  # (N, L)
        z, log_p_s = self.context(alpha, a, sampled)  # (N, D)
        beta = torch.sigmoid(self.f_beta(h))  # (N, 1), section 4.2.1
        z = beta * z
        state = self.cell.step(WEy + self.W_z(z), state)  # eq. (1)
        return state, z, alpha, beta.squeeze(1).float(), log_p_s

    def logits(self, Ey, h, z=None):
        """Deep output layer, eq. (7): words E y (..., M), h (..., H), z (..., D) -> (..., V)."""
        x = Ey + self.L_h(self.dropout(h))
        if z is not None:
            x = x + self.L_z(z)
        x = torch.tanh(x)  # which is in the authors' code and not in eq. (7)
        return self.L_o(self.dropout(x))

    def forward(self, a, captions, sampled=None):
        """Teacher-forced pass over captions of one length -> Output.

        a (B, L, D); captions (B, T+1), word ids from <start> to <end>. sampled (B,): which captions
        draw locations in hard attention's training (None: all); the others take the expectation.
        """
        Ey = self.input_dropout(self.E(captions[:, :-1]))  # (B, T, M)
        mask = self.input_dropout(torch.ones_like(a[:, :1]))  # (B, 1, D), for all locations
        a = a * mask
        keys, a, state = self.start(a)
        steps = []
        for WEy in self.cell.W(Ey).unbind(1):  # the words' part of eq. (1), for all t at once
            state, z, alpha, beta, log_p_s = self.step(WEy, keys, a, state, sampled)
            steps.append((state[0], z, alpha, beta, log_p_s))
        h, z, alphas, betas, log_p_s = map(stack, zip(*steps))  # h (B, T, H), z (B, T, D), ..
        return Output(self.logits(Ey, h, z), alphas, betas, log_p_s)

    def next_word(self, words, keys, a, state):
        """Words (N,) just said -> log p of the next one (N, V), the new state, alpha and beta."""
        Ey = self.E(words)  # (N, M)
        state, z, alpha, beta, _ = self.step(self.cell.W(Ey), keys, a, state)
        log_p = self.logits(Ey, state[0], z).log_softmax(dim=1)
        log_p[:, [PAD, START, UNK]] = -torch.inf  # never said
        return log_p, state, alpha, beta

    @torch.no_grad()
    def beam_search(self, a, beam_size=3, max_len=30, length_penalty=0.0):
        """Captions of the highest log p(y | a), all images and all their beams at once.

        a (B, L, D) -> for each image a list of at most beam_size Hypothesis, best first by
        log_prob / len(tokens) ** length_penalty; those cut off at max_len follow those that ended.
        <unk> is never said. As in the authors' program an image has one beam less after each
        caption that ends.

        Two beams of one image; each number is log p of the words so far:

            <start>        ->  a -0.5, the -1.2
            a, the         ->  a dog -1.4, a cat -1.9           the dog -2.1 is left behind
            a dog, a cat   ->  a dog <end> -1.6, a cat runs -2.8    one has ended, one beam left
            a cat runs     ->  a cat runs <end> -3.0            none left: two captions, -1.6, -3.0
        """
        B, K, V, device = len(a), beam_size, self.config.vocab_size, a.device
        keys, a, state = self.start(a)
        state = [x.repeat_interleave(K, dim=0) for x in state]  # row b * K + k: image b, beam k
        image = torch.arange(B, device=device).unsqueeze(1)  # (B, 1)
        words = torch.full((B, K, 1), START, device=device)  # each beam's words so far, (B, K, t)
        alphas = keys.new_zeros(B, K, 0, keys.shape[1])  # where it looked, (B, K, t, L)
        betas = keys.new_zeros(B, K, 0)  # (B, K, t)
        log_prob = a.new_full((B, K), -torch.inf)  # of each beam's words
        log_prob[:, 0] = 0  # an image's beams all start equal, so only the first may grow
        beams_left = torch.full((B, 1), K, device=device)
        found = [[] for _ in range(B)]
        for t in range(1, max_len + 1):
            log_p, state, alpha, beta = self.next_word(words[:, :, -1].flatten(), keys, a, state)
            total = log_prob.unsqueeze(2) + log_p.view(B, K, V)  # (B, K, V)
            log_prob, best = total.flatten(1).topk(K, dim=1)  # (B, K), of K * V continuations
            parent, word = best // V, best % V  # (B, K): which beam goes on, and with which word
            words = torch.cat([words[image, parent], word.unsqueeze(2)], dim=2)  # (B, K, t+1)
            if alpha is not None:  # the look that led to the word is its parent's
                alphas = torch.cat([alphas, alpha.view(B, K, 1, -1)], dim=2)[image, parent]
                betas = torch.cat([betas, beta.view(B, K, 1)], dim=2)[image, parent]
            rows = (image * K + parent).flatten()  # (B*K,)
            state = [x[rows] for x in state]
            # topk sorts: the first beams_left beams are the best.
            alive = (torch.arange(K, device=device) < beams_left) & log_prob.isfinite()
            ends = alive & ((word == END) | (t == max_len))  # (B, K)
            for b, k in ends.nonzero().tolist():
                seen = None, None
                if alpha is not None:
                    seen = alphas[b, k].cpu().numpy(), betas[b, k].cpu().numpy()
                tokens = words[b, k, 1:].tolist()
                found[b].append(Hypothesis(tokens, log_prob[b, k].item(), *seen))
            beams_left = beams_left - ends.sum(dim=1, keepdim=True)
            log_prob = log_prob.masked_fill(ends | ~alive, -torch.inf)
            if not log_prob.isfinite().any():
                break

        def rank(hypothesis):  # those that reached <end> come first, for False sorts before True
            tokens, log_p = hypothesis.tokens, hypothesis.log_prob
            return tokens[-1] != END, -log_p / len(tokens) ** length_penalty
        return [sorted(hypotheses, key=rank) for hypotheses in found]


# -------------------------------------------------------------------------- devices and checkpoints
def pick_device(name=''):
    """Device by name, or the best there is: cuda, mps or cpu. UserError if it cannot be used."""
    name = name or torch.accelerator.current_accelerator(check_available=True) or 'cpu'
    with as_user_error(f'--device {name} cannot be used here', 'leave it out'):
        return torch.zeros(1, device=name).device


def checkpoint_in(run):
    """The checkpoint in a run's folder: best.pt, or last.pt before there is a best one."""
    run = as_path(run)
    for path in run / 'best.pt', run / 'last.pt':
        if path.exists():
            return path
    return run  # it should be a checkpoint itself


def save_checkpoint(path, captioner, encoder, vocabulary, settings, half=False, **training):
    """Write one file with all that captioning needs, and whatever `training` adds for resuming.

    settings: numbers and strings. With `half` weights are float16. A frozen encoder's weights are
    not written. Raises UserError if the file cannot be written.
    """
    def weights(module):
        return {name: x.half() if half and x.is_floating_point() else x
                for name, x in module.state_dict().items()}
    cnn = {'name': encoder.name, 'image_size': encoder.image_size, 'key': encoder.key,
           'weights': weights(encoder) if encoder.trainable else None}
    content = {'config': asdict(captioner.config), 'captioner': weights(captioner),
               'words': vocabulary.words, 'encoder': cnn, 'settings': settings, **training}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with write_whole(as_path(path), 'make room, allow writing, or close what holds it') as file:
        file.write(buffer.getbuffer())


def read_checkpoint(path):
    """The dictionary in a checkpoint file; no code in it is run. UserError if it is not one."""
    with as_user_error(f'{path} is no whole checkpoint of this program',
                       'name another run, such as runs/NAME'):
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if 'captioner' not in checkpoint:
            raise ValueError('it holds something else')
        return checkpoint


def load_checkpoint(source, device='cpu'):
    """Rebuild what a checkpoint holds -> captioner, encoder, vocabulary, settings.

    source: a file, or what `read_checkpoint` made of one. captioner and encoder are on `device` and
    in evaluation mode. Raises UserError.
    """
    checkpoint = source if isinstance(source, dict) else read_checkpoint(source)
    cnn = checkpoint['encoder']
    own = cnn['weights'] is not None  # it was trained with the captioner
    encoder = Encoder(cnn['name'], cnn['image_size'], own, pretrained=not own, device=device)
    if not own and encoder.key != cnn['key']:
        raise UserError(f'the model was trained with the encoder {cnn["key"]}, and {cnn["name"]} '
                        f'is {encoder.key}: put the former one in its place')
    captioner = Captioner(CaptionerConfig(**checkpoint['config'])).to(device).eval()
    with as_user_error('the checkpoint is of another version of this program', 'train it anew'):
        captioner.load_state_dict(checkpoint['captioner'])
        if own:
            encoder.load_state_dict(cnn['weights'])
    return captioner, encoder, Vocabulary(checkpoint['words']), checkpoint['settings']
