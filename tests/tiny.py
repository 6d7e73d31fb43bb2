"""A real byte-level BPE tokenizer of a few hundred tokens, trained in a few milliseconds."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin|>", "<|im_end|>", "<|pad|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as most models ship it: nothing in it says which text the assistant wrote."""

CHATML_WITH_GENERATION = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}"
    "{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The same text, with the assistant's part between generation markers."""

CORPUS = (
    "the teacher runs once and the student reads its logits from disk",
    "a question and its answer: which of the four is the capital of France? Paris is the capital.",
    "user system assistant prompt response token tokens mask",
    "What is two plus three? Two plus three is five.",
)


def tiny_tokenizer(
    *,
    vocab_size: int = 384,
    corpus: tuple[str, ...] = CORPUS,
    bos: bool = False,
    eos: bool = True,
    appends_eos: bool = False,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer that reads any text: 256 bytes, the special tokens, and merges learned from ``corpus``.

    ``bos`` and ``appends_eos`` make the tokenizer itself put BOS before and EOS after a text, as Llama and T5 do.
    """
    special_tokens = [PAD, "<|im_start|>", EOS, *([BOS] if bos else [])]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    if bos or appends_eos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS if bos else ''} $A {EOS if appends_eos else ''}".strip(),
            special_tokens=[(token, backend.token_to_id(token)) for token in special_tokens],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS if bos else None,
        eos_token=EOS if eos else None,
        pad_token=PAD,
        chat_template=chat_template,
    )
