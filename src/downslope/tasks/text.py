"""Text by its characters: a small language model on Python's own documentation."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from downslope.errors import BadInput
from downslope.recipe import Recipe
from downslope.rules import chain
from downslope.rules.adaptive import adamw
from downslope.rules.links import clip_norm
from downslope.schedule import cosine
from downslope.tasks.data import Batch
from downslope.tasks.definition import Task
from downslope.tasks.split import Parts

CONTEXT = 64
"""Characters that the model of `chars-transformer` sees at most."""

_RUN = 16  # windows that stay together when a text is split


def chars_transformer(seed: int = 0) -> Task:
    """The next character of Python's language reference, by a causal transformer with a context of 64."""
    from pydoc_data.topics import topics

    text = unique_paragraphs(topics.values())
    alphabet = "".join(sorted(set(text)))
    symbols = torch.tensor([alphabet.index(character) for character in text])
    return Task(
        **windows(symbols, CONTEXT, seed),
        model=lambda: Transformer(len(alphabet), CONTEXT),
        loss=next_character,
        metric_name="nats per character",
        target=1.45,
        tokens=CONTEXT,
        reference=(
            "downslope train chars-transformer --seed S, S = 0 to 4: mean 1.31, on test 1.33; counted "
            "single characters 3.24, pairs 2.43 (text of Python 3.11)"
        ),
        recipe=Recipe(
            chain(clip_norm(1.0), adamw(lr=cosine(1e-2, steps="100 %", warmup="5 %"), weight_decay=0.1)),
            steps="6 epochs",
            batch_size=32,
        ),
    )


def unique_paragraphs(texts: Iterable[str]) -> str:
    """The texts in a row, a paragraph that stands in several of them only where it comes first.

    So no paragraph can be both learnt and asked for.

    >>> unique_paragraphs(["one\\n\\ntwo", "two\\n\\nthree"])
    'one\\n\\ntwo\\n\\nthree'
    """
    paragraphs = (paragraph.strip("\n") for text in texts for paragraph in text.split("\n\n"))
    return "\n\n".join(dict.fromkeys(filter(None, paragraphs)))


def windows(symbols: Tensor, context: int, seed: int) -> Parts:
    """Pieces of a sequence, int64 [length], as (symbols, next symbols), both [items, context].

    Runs of 16 neighbours stay together and are shared out by `seed`: 90 % for training, 5 % each for
    validation and test; what is left at the end is in none. BadInput for a sequence of less than three runs.
    """
    count = (len(symbols) - 1) // context // _RUN
    if count < 3:
        raise BadInput(
            f"A text is split by runs of {_RUN * context} symbols, at least 3 of them, got {len(symbols)}."
        )
    pieces = symbols[: count * _RUN * context + 1].unfold(0, context + 1, context)
    runs = pieces.reshape(count, _RUN, context + 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = max(count // 20, 1)

    def part(items: Tensor) -> tuple[Tensor, ...]:
        taken = runs[items].flatten(0, 1)
        return taken[:, :-1].contiguous(), taken[:, 1:].contiguous()

    test, valid, train = order.tensor_split((held_out, 2 * held_out))
    return Parts(train=part(train), valid=part(valid), test=part(test))


def next_character(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy, nats per character, of logits `model(inputs)` [items, context, alphabet]."""
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


class Attention(nn.Module):
    """Causal self-attention: each place looks at itself and those before it. arXiv:1706.03762, 3.2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.asked = nn.Linear(width, 3 * width)
        self.told = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[items, places, width] → the same."""
        query, key, value = self.asked(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        told: Tensor = self.told(seen.transpose(1, 2).flatten(2))
        return told


class Block(nn.Module):
    """Attention, then a perceptron on each place, both beside a shortcut and behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[items, places, width] → the same."""
        x = x + self.attention(x)
        return x + self.perceptron(x)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A causal language model: characters [items, places] → logits of the next, [items, places, alphabet].

    Places are learnt, blocks normalise before they act (GPT-2). At most `context` places.
    """

    def __init__(self, alphabet: int, context: int, width: int = 64, heads: int = 4, blocks: int = 3) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits."""
        places = torch.arange(characters.shape[1], device=characters.device)
        x = self.characters(characters) + self.places(places)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits
